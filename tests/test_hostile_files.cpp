// Small files that claim much: refused before they cost time or memory. And what is large and
// honest still loads.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>
#ifndef PERSONALIZE_NO_ZSTD
#include <zstd.h>
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;

namespace {

using Bytes = pz::Vector<std::byte>;

// A section as a forger has it: its chunks as they are stored.
struct Forged {
  pz::SectionInfo info;
  std::vector<Bytes> chunks;
  bool right_checksums = true;
};

// The sections of a file, to be changed and sealed again.
class Forgery {
 public:
  std::vector<Forged> sections;

  // In format version 2, stored: one chunk a section.
  static Forgery of(const pz::ModelParts& parts) {
    const auto file = pz::write_model(parts, {.zstd_level = 0, .chunk_bytes = 1u << 24});
    REQUIRE(file);
    const auto table = pz::list_sections(*file);
    REQUIRE(table);
    Forgery forgery;
    for (const pz::SectionInfo& info : *table) {
      Forged section{info, {}, true};
      if (info.raw_size > 0) {
        const auto raw = std::span(*file).subspan(info.offset + 12, info.raw_size);
        section.chunks.emplace_back(raw.begin(), raw.end());
      }
      forgery.sections.push_back(std::move(section));
    }
    return forgery;
  }

  Forged& at(std::string_view tag, std::uint32_t index = 0) {
    for (Forged& section : sections)
      if (std::string_view(section.info.tag.data(), 4) == tag && section.info.index == index)
        return section;
    FAIL("no section ", std::string(tag));
    std::abort();
  }

  // The bytes of the file; version 1: a section is its first chunk.
  Bytes seal(std::uint16_t version = 2) const {
    using pz::detail::append_integer;
    Bytes body, table;
    const std::size_t begin = 64 + 72 * sections.size();
    for (const Forged& section : sections) {
      Bytes stored, directory;
      for (const Bytes& chunk : section.chunks) {
        append_integer(directory, static_cast<std::uint32_t>(chunk.size()));
        append_integer(directory, section.right_checksums ? pz::xxh64(chunk) : 7u);
        stored.insert(stored.end(), chunk.begin(), chunk.end());
      }
      std::uint64_t checksum = pz::xxh64(directory);
      if (version == 1) {
        directory.clear();
        checksum = section.right_checksums ? pz::xxh64(stored) : 7u;
      }
      for (const char c : section.info.tag) table.push_back(static_cast<std::byte>(c));
      append_integer(table, section.info.index);
      append_integer(table, static_cast<std::uint8_t>(section.info.codec));
      append_integer(table, static_cast<std::uint8_t>(section.info.element_type));
      append_integer(table, section.info.rank);
      append_integer(table, version == 1 ? std::uint8_t{0} : section.info.chunk_log2);
      append_integer(table, 0u);
      for (const std::uint64_t extent : section.info.shape) append_integer(table, extent);
      append_integer(table, static_cast<std::uint64_t>(begin + body.size()));
      append_integer(table, static_cast<std::uint64_t>(directory.size() + stored.size()));
      append_integer(table, section.info.raw_size);
      append_integer(table, checksum);
      body.insert(body.end(), directory.begin(), directory.end());
      body.insert(body.end(), stored.begin(), stored.end());
    }
    Bytes file;
    for (const unsigned char c : pz::detail::model_file.magic)
      file.push_back(static_cast<std::byte>(c));
    append_integer(file, version);
    append_integer(file, std::uint16_t{0});
    append_integer(file, static_cast<std::uint32_t>(sections.size()));
    append_integer(file, static_cast<std::uint64_t>(begin + body.size()));
    append_integer(file, pz::xxh64(table));
    file.resize(56);
    append_integer(file, pz::xxh64(file));
    file.insert(file.end(), table.begin(), table.end());
    file.insert(file.end(), body.begin(), body.end());
    return file;
  }
};

// Shapes a section's raw size anew, its first extent growing to what fills `raw` bytes.
void grow(pz::SectionInfo& info, std::uint64_t raw) {
  const std::uint64_t row = info.element_type == pz::ElementType::string
                                ? 8
                                : std::max<std::uint64_t>(info.raw_size / info.shape[0], 1);
  info.shape[0] = raw / row;
  info.raw_size = info.element_type == pz::ElementType::string ? raw : info.shape[0] * row;
}

// What loading a file came to, in a process of its own.
struct Outcome {
  bool loaded = false;
  pz::Errc code{};
  double milliseconds = 0;  // of CPU
  long kilobytes = 0;       // of memory beyond what there was
  std::array<char, 256> message{};
};

long peak_kilobytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::atol(line.c_str() + 6);
  return -1;
}

Outcome load(const std::string& path, unsigned threads = 1) {
  std::array<int, 2> pipe{};
  REQUIRE(::pipe(pipe.data()) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    Outcome outcome;
    const long before = peak_kilobytes();
    const std::clock_t begin = std::clock();
    {
      const auto model = pz::Model::load(path, {.threads = threads});
      outcome.loaded = model.has_value();
      if (!model) {
        outcome.code = model.error().code;
        model.error().message.copy(outcome.message.data(), outcome.message.size() - 1);
      }
    }
    outcome.milliseconds = 1e3 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    outcome.kilobytes = peak_kilobytes() - before;
    const bool told = ::write(pipe[1], &outcome, sizeof outcome) == sizeof outcome;
    ::_exit(told ? 0 : 1);
  }
  ::close(pipe[1]);
  Outcome outcome;
  REQUIRE(::read(pipe[0], &outcome, sizeof outcome) == sizeof outcome);
  ::close(pipe[0]);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(status == 0);
  return outcome;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool measures = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool measures = false;  // a sanitizer takes time and memory of its own
#else
constexpr bool measures = true;
#endif
#else
constexpr bool measures = true;
#endif

// Under 16 MiB, and 10 ms where the compiler optimises.
void cheap(const Outcome& outcome) {
  if (!measures) return;
  CHECK(outcome.kilobytes < 16 * 1024);
#ifdef NDEBUG
  CHECK(outcome.milliseconds < 10);
#endif
}

class Hostile {
 public:
  explicit Hostile(std::string what) : what_(std::move(what)) {}

  // The file is refused, at once. measured: up to so many threads; where chunks have to be decoded
  // to see the fault, others go on reading meanwhile.
  void refused(const Bytes& file, const char* message = "", unsigned measured = 3) const {
    for (const unsigned threads : {1u, 3u}) {
      const Outcome outcome = tried(file, threads);
      const std::string told = outcome.message.data();
      INFO(what_, ", ", threads, " threads: ", told);
      CHECK_FALSE(outcome.loaded);
      CHECK(told.find(message) != std::string::npos);
      if (threads <= measured) cheap(outcome);
    }
  }
  void accepted(const Bytes& file) const {
    const Outcome outcome = tried(file, 1);
    INFO(what_, ": ", std::string(outcome.message.data()));
    CHECK(outcome.loaded);
    cheap(outcome);
  }

 private:
  static Outcome tried(const Bytes& file, unsigned threads) {
    const TemporaryFolder folder;
    const std::string path = folder.file("hostile.pzm");
    REQUIRE(pz::write_file(path, file));
    Outcome outcome = load(path, threads);
    // The time is that of the quickest of some: what runs beside counts for nothing.
    for (int again = 0; measures && again < 30 && outcome.milliseconds >= 10; ++again)
      outcome.milliseconds = std::min(outcome.milliseconds, load(path, threads).milliseconds);
    return outcome;
  }

  std::string what_;
};

const pz::ModelParts& honest() {
  static const pz::ModelParts parts = small_model::parts({.items = 50});
  return parts;
}

// Every section of a model but the empty ones, by tag and index.
std::vector<std::pair<std::string, std::uint32_t>> all_sections() {
  std::vector<std::pair<std::string, std::uint32_t>> all;
  for (const Forged& section : Forgery::of(honest()).sections)
    all.emplace_back(std::string(section.info.tag.data(), 4), section.info.index);
  return all;
}

}  // namespace

TEST_CASE("a section that claims a gigabyte in chunks of a gigabyte is refused at the table") {
  for (const auto& [tag, index] : all_sections()) {
    Forgery forgery = Forgery::of(honest());
    Forged& section = forgery.at(tag, index);
    grow(section.info, std::uint64_t{1} << 30);
    section.info.codec = pz::Codec::zstd;
    section.info.chunk_log2 = 30;
    Hostile(tag + " in one chunk").refused(forgery.seal(), "bad table entry");
  }
}

TEST_CASE("a section that is smaller than zstd could make it is refused at the table") {
  for (const auto& [tag, index] : all_sections())
    for (const std::uint16_t version : {std::uint16_t{1}, std::uint16_t{2}}) {
      Forgery forgery = Forgery::of(honest());
      Forged& section = forgery.at(tag, index);
      grow(section.info, std::uint64_t{200} << 20);
      section.info.codec = pz::Codec::zstd;
      section.info.chunk_log2 = 24;
      section.chunks.assign(version == 1 ? 1 : 13, Bytes(100, std::byte{1}));
      Hostile(tag + " of 200 MiB").refused(forgery.seal(version), "smaller than zstd can make");
    }
}

TEST_CASE("a section of a size that does not follow from the others is refused at the table") {
  for (const bool right_checksums : {false, true})
    for (const auto& [tag, index] : all_sections()) {
      Forgery forgery = Forgery::of(honest());
      Forged& section = forgery.at(tag, index);
      grow(section.info, std::uint64_t{192} << 20);
      section.info.codec = pz::Codec::zstd;
      section.info.chunk_log2 = 24;
      section.chunks.assign(12, Bytes(600, std::byte{1}));
      section.right_checksums = right_checksums;
      Hostile(tag + " of 192 MiB").refused(forgery.seal());
    }
}

TEST_CASE("sections of one wrong size together are refused at the first of them") {
  for (const bool right_checksums : {false, true}) {
    Forgery forgery = Forgery::of(honest());
    for (const char* tag : {"IIDS", "IVEC", "BIAS", "STAT"}) {
      Forged& section = forgery.at(tag);
      section.info.element_type =
          std::string_view(tag) == "IVEC" ? pz::ElementType::f32 : section.info.element_type;
      const std::uint64_t items = 500'000;
      section.info.raw_size = items * (tag[1] == 'V'   ? 80u
                                       : tag[0] == 'S' ? 32u
                                       : tag[0] == 'B' ? 4u
                                                       : 8u);
      section.info.shape[0] = items;
      section.info.codec = pz::Codec::zstd;
      section.info.chunk_log2 = 24;
      section.chunks.assign((section.info.raw_size >> 24) + 1, Bytes(600, std::byte{1}));
      section.right_checksums = right_checksums;
    }
    Hostile("500,000 items").refused(forgery.seal(), "IIDS");
  }
}

TEST_CASE("limits of a file are proportional to it, and a field") {
  const pz::LoadLimits limits;
  const std::uint64_t mebibyte = 1 << 20;
  CHECK(limits.raw_bytes_of(0) == 256 * mebibyte);
  CHECK(limits.raw_bytes_of(mebibyte) == 2048 * mebibyte);
  CHECK(limits.raw_bytes_of(std::uint64_t{1} << 62) == limits.raw_bytes);
  CHECK(pz::LoadLimits{.raw_bytes = 100}.raw_bytes_of(mebibyte) == 100);
  CHECK(pz::LoadLimits{.expansion = 0}.raw_bytes_of(mebibyte) == 256 * mebibyte);

  Forgery forgery = Forgery::of(honest());
  Forged& section = forgery.at("IVEC");
  grow(section.info, 300 * mebibyte);
  const auto read = pz::read_model(forgery.seal());
  REQUIRE_FALSE(read);
  CHECK(read.error().code == pz::Errc::limit);
}

TEST_CASE("a program of a million operations and four thousand weights are refused at the table") {
  Forgery operations = Forgery::of(honest());
  Forged& program = operations.at("ENCO");
  program.info.shape[0] = 1'000'000;
  program.info.raw_size = 8'000'000;
  program.chunks = {Bytes(8'000'000, std::byte{1})};
  Hostile("10^6 operations").refused(operations.seal(), "256 operations");

  Forgery weights = Forgery::of(honest());
  for (std::uint32_t w = 14; w < 4000; ++w) {
    Forged weight = weights.at("ENCW", 13);
    weight.info.index = w;
    weights.sections.push_back(std::move(weight));
  }
  Hostile("4,000 weights").refused(weights.seal(), "more weights");
}

TEST_CASE("four thousand sections that nobody knows cost nothing to skip") {
  Forgery forgery = Forgery::of(honest());
  for (std::uint32_t s = 0; s < 4000; ++s) {
    Forged empty{{}, {}, true};
    empty.info.tag = {'N', 'E', 'W', 'S'};
    empty.info.index = s;
    empty.info.shape = {0, 1, 1};
    empty.info.chunk_log2 = 20;
    forgery.sections.push_back(empty);
  }
  Hostile("4,000 empty sections").accepted(forgery.seal());
  forgery.sections.back().info.index = 7;
  Hostile("4,000 empty sections, one twice").refused(forgery.seal(), "NEWS[7]: stands twice");
}

TEST_CASE("sections in another order than the format's are refused") {
  Forgery forgery = Forgery::of(honest());
  std::swap(forgery.at("IIDS"), forgery.at("IVEC"));
  Hostile("IVEC before IIDS").refused(forgery.seal(), "stands before section");
}

TEST_CASE("a row of 4 bits that is longer than a chunk may be is refused") {
  Forgery forgery = Forgery::of(honest());
  Forged& section = forgery.at("IVEC");
  section.info.element_type = pz::ElementType::i4;
  for (const std::uint64_t columns : {std::uint64_t{1} << 25, std::uint64_t{1} << 62}) {
    section.info.shape = {1, columns, 1};
    Hostile("a row of 4 bits").refused(forgery.seal(), "bad table entry");
  }
}

#ifndef PERSONALIZE_NO_ZSTD

namespace {

// So many bytes of one value, as a frame that our own decoder takes.
Bytes packed(std::uint64_t size, int value = 0) {
  const std::vector<char> raw(size, static_cast<char>(value));
  Bytes frame(ZSTD_compressBound(size));
  frame.resize(ZSTD_compress(frame.data(), frame.size(), raw.data(), size, 19));
  return frame;
}

// Fills a section with zeros that are really there, `raw` bytes of them.
void fill_with_zeros(Forged& section, std::uint64_t raw) {
  grow(section.info, raw);
  section.info.codec = pz::Codec::zstd;
  section.info.chunk_log2 = 20;
  static const Bytes whole = packed(1 << 20);
  section.chunks.assign(section.info.raw_size >> 20, whole);
  if (const std::uint64_t rest = section.info.raw_size & ((1 << 20) - 1))
    section.chunks.push_back(packed(rest));
}

}  // namespace

TEST_CASE("sections full of zeros that are really there are refused at the table") {
  for (const std::uint64_t mebibytes : {100u, 512u})
    for (const auto& [tag, index] : all_sections()) {
      Forgery forgery = Forgery::of(honest());
      fill_with_zeros(forgery.at(tag, index), mebibytes << 20);
      Hostile(tag + ": zeros, " + std::to_string(mebibytes) + " MiB").refused(forgery.seal());
    }
}

TEST_CASE("a section full of zeros that nobody knows is skipped without a look") {
  Forgery forgery = Forgery::of(honest());
  Forged zeros{{}, {}, true};
  zeros.info.tag = {'N', 'E', 'W', 'S'};
  zeros.info.shape = {1, 1, 1};
  zeros.info.raw_size = 1;
  fill_with_zeros(zeros, std::uint64_t{200} << 20);
  forgery.sections.push_back(zeros);
  Hostile("an unknown section of 200 MiB").accepted(forgery.seal());
  fill_with_zeros(forgery.sections.back(), std::uint64_t{512} << 20);
  Hostile("an unknown section of 512 MiB").refused(forgery.seal(), "LoadLimits");
}

TEST_CASE("files of format version 1 are refused as early") {
  for (const auto& [tag, index] : all_sections()) {
    Forgery forgery = Forgery::of(honest());
    Forged& section = forgery.at(tag, index);
    grow(section.info, std::uint64_t{100} << 20);
    section.info.codec = pz::Codec::zstd;
    static const Bytes frame = packed(std::uint64_t{100} << 20);
    section.chunks = {frame};
    Hostile(tag + ": zeros, version 1").refused(forgery.seal(1));
  }
}

TEST_CASE("two million equal ids are refused at the second") {
  constexpr std::uint64_t items = 2'000'000;
  for (const std::size_t length : {1u, 8u}) {
    Forgery forgery = Forgery::of(honest());
    for (const char* tag : {"IVEC", "BIAS", "STAT"}) {
      Forged& section = forgery.at(tag);
      fill_with_zeros(section, section.info.raw_size / 50 * items);
    }
    Forged& ids = forgery.at("IIDS");
    // Lengths, then text, cut into chunks of 1 MiB.
    std::vector<char> raw(items * (2 + length), 'x');
    for (std::size_t i = 0; i < items; ++i)
      raw[2 * i] = static_cast<char>(length), raw[2 * i + 1] = 0;
    ids.info.shape[0] = items;
    ids.info.raw_size = raw.size();
    ids.info.codec = pz::Codec::zstd;
    ids.info.chunk_log2 = 20;
    ids.chunks.clear();
    for (std::size_t begin = 0; begin < raw.size(); begin += 1 << 20) {
      const std::size_t size = std::min<std::size_t>(1 << 20, raw.size() - begin);
      Bytes frame(ZSTD_compressBound(size));
      frame.resize(ZSTD_compress(frame.data(), frame.size(), raw.data() + begin, size, 19));
      ids.chunks.push_back(std::move(frame));
    }
    Hostile("2,000,000 equal ids").refused(forgery.seal(), "string 1: ", 1);
  }
}

TEST_CASE("a fresh model of zeros loads, however small its file is") {
  pz::ModelParts parts = small_model::parts({.items = 300'000, .dimension = 64, .hidden = 4});
  parts.item_vectors = pz::Matrix::zeros(300'000, 64);
  std::fill(parts.biases.begin(), parts.biases.end(), 0.0f);
  std::fill(parts.statistics.begin(), parts.statistics.end(), pz::ItemStatistics{});
  const auto file = pz::write_model(parts, {.element_type = pz::ElementType::f32, .zstd_level = 3});
  REQUIRE(file);
  const auto read = pz::read_model(*file);
  REQUIRE_MESSAGE(read, read.error().message);
  CHECK(read->item_vectors == parts.item_vectors);
}

#endif

TEST_CASE("metadata is UTF-8, at most 16 MiB, and nests at most 64 deep") {
  const auto with = [](std::string metadata) {
    pz::ModelParts parts = honest();
    parts.metadata = std::move(metadata);
    return pz::Model::from_parts(std::move(parts));
  };
  const auto nested = [](int depth, char open, char close) {
    return std::string(static_cast<std::size_t>(depth), open) +
           std::string(static_cast<std::size_t>(depth), close);
  };
  CHECK(with(nested(64, '[', ']')));
  CHECK(with(R"({"a": "[[{{\"[[{{\\"})"));
  CHECK(with("{\"a\": \"" + std::string(1000, '[') + "\", \"b\": \"\\\"" + std::string(1000, '{') +
             "\"}"));
  std::string wide = "[";
  for (int i = 0; i < 1000; ++i) wide += "[],";
  CHECK(with(wide + "1]"));
  for (const auto& deep : {nested(65, '[', ']'), nested(65, '{', '}'),
                           "\"a\\\\\"" + nested(65, '[', ']'), nested(1'000'000, '[', ']')}) {
    const auto model = with(deep);
    REQUIRE_FALSE(model);
    CHECK(model.error().message.find("64") != std::string::npos);
  }
  CHECK_FALSE(with("{\"a\": \"\xff\"}"));
  CHECK(with(std::string(std::size_t{1} << 24, ' ')));
  CHECK_FALSE(with(std::string((std::size_t{1} << 24) + 1, ' ')));
  // The same of a file.
  Forgery forgery = Forgery::of(honest());
  Forged& section = forgery.at("META");
  const std::string deep = nested(65, '[', ']');
  section.info.shape[0] = section.info.raw_size = deep.size();
  const auto bytes = std::as_bytes(std::span(deep));
  section.chunks = {Bytes(bytes.begin(), bytes.end())};
  Hostile("nested metadata").refused(forgery.seal(), "deeper than 64");
}

TEST_CASE("strings of a file that are not UTF-8 are refused, whichever they are") {
  for (const char* tag : {"IIDS", "EVTY", "FLDN", "FVOC"})
    for (const char bad : {'\0', '\n', '\x7f', '\xff'}) {
      Forgery forgery = Forgery::of(honest());
      forgery.at(tag).chunks[0].back() = static_cast<std::byte>(bad);
      Hostile(std::string(tag) + " with a control character").refused(forgery.seal(), "UTF-8");
    }
  pz::ModelParts parts = honest();
  parts.fields[0].name = "GEN\nRE";
  CHECK_FALSE(pz::Model::from_parts(parts));
}
