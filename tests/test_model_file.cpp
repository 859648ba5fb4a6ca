// Reading and writing of the container, and what hostile files meet.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

namespace {

using Bytes = pz::Vector<std::byte>;

std::span<const std::byte> bytes_of_text(std::string_view text) {
  return std::as_bytes(std::span(text));
}

Bytes small_file(pz::WriteOptions options = {}, std::size_t dimension = 5) {
  auto bytes = pz::write_model(
      small_model::parts({.items = 9, .dimension = dimension, .hidden = 4}), options);
  REQUIRE(bytes);
  return *bytes;
}

// With many chunks, and item vectors in 4 bits.
Bytes small_chunked_file() {
  return small_file({.element_type = pz::ElementType::i4, .chunk_bytes = 64}, 17);
}

// What a forger would do: change bytes, then make every checksum right again.
void reseal(Bytes& file) {
  std::uint32_t count;
  std::memcpy(&count, file.data() + 12, 4);
  const auto put = [&](std::size_t at, std::uint64_t value) {
    std::memcpy(file.data() + at, &value, 8);
  };
  const auto get = [&](std::size_t at, std::size_t size = 8) {
    std::uint64_t value = 0;
    std::memcpy(&value, file.data() + at, size);
    return value;
  };
  const std::size_t table = std::size_t{count} * 72;
  if (64 + table <= file.size()) {
    for (std::size_t entry = 64; entry < 64 + table; entry += 72) {
      const std::uint64_t offset = get(entry + 40), size = get(entry + 48);
      if (offset > file.size() || size > file.size() - offset) continue;
      // The chunks' sizes, as far as they lie inside the section, tell where its directory ends.
      std::uint64_t directory = 0;
      for (std::uint64_t end = 0; end + directory < size && directory + 12 <= size; directory += 12)
        end += get(offset + directory, 4);
      std::uint64_t at = offset + directory;
      for (std::uint64_t chunk = 0; chunk < directory; chunk += 12) {
        const std::uint64_t stored = get(offset + chunk, 4);
        if (at > offset + size || stored > offset + size - at) break;
        put(offset + chunk + 4, pz::xxh64(std::span(file).subspan(at, stored)));
        at += stored;
      }
      put(entry + 64, pz::xxh64(std::span(file).subspan(offset, directory)));
    }
    put(24, pz::xxh64(std::span(file).subspan(64, table)));
  }
  put(56, pz::xxh64(std::span(file).first(56)));
}

std::size_t entry_of(const Bytes& file, std::string_view tag, std::uint32_t index = 0) {
  const auto sections = pz::list_sections(file);
  REQUIRE(sections);
  for (std::size_t s = 0; s < sections->size(); ++s)
    if (std::string_view((*sections)[s].tag.data(), 4) == tag && (*sections)[s].index == index)
      return 64 + s * 72;
  FAIL("no section ", std::string(tag));
  return 0;
}

template <class T>
void poke(Bytes& file, std::size_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

template <class T>
T peek(const Bytes& file, std::size_t at) {
  T value;
  std::memcpy(&value, file.data() + at, sizeof value);
  return value;
}

}  // namespace

TEST_CASE("XXH64 agrees with the specification's vectors") {
  // Of the reference implementation's test set and the python-xxhash documentation.
  CHECK(pz::xxh64({}) == 0xef46db3751d8e999u);
  CHECK(pz::xxh64({}, 1) == 0xd5afba1336a3be4bu);
  CHECK(pz::xxh64(bytes_of_text("a")) == 0xd24ec4f1a98c6e5bu);
  CHECK(pz::xxh64(bytes_of_text("abc")) == 0x44bc2cf5ad770999u);
  CHECK(pz::xxh64(bytes_of_text("xxhash")) == 3665147885093898016u);
  CHECK(pz::xxh64(bytes_of_text("xxhash"), 20141025) == 13067679811253438005u);
  CHECK(pz::xxh64(bytes_of_text("Nobody inspects the spammish repetition")) == 0xfbcea83c8a378bf1u);
}

TEST_CASE("what is written is read back, byte for byte") {
  for (const auto type : {pz::ElementType::f32, pz::ElementType::i8, pz::ElementType::i4}) {
    for (const int level : {0, 3, 19}) {
      CAPTURE(level);
      CAPTURE(pz::name(type));
      for (const std::uint32_t chunk : {64u, 256u, 1u << 20}) {
        CAPTURE(chunk);
        const pz::ModelParts parts = small_model::parts();
#ifdef PERSONALIZE_NO_ZSTD
        if (level != 0) continue;
#endif
        const auto file = pz::write_model(
            parts, {.element_type = type, .zstd_level = level, .chunk_bytes = chunk});
        REQUIRE(file);
        const auto read = pz::read_model(*file);
        REQUIRE(read);
        CHECK(read->metadata == parts.metadata);
        REQUIRE(read->item_ids.size() == parts.item_ids.size());
        for (std::size_t i = 0; i < parts.item_ids.size(); ++i) {
          CHECK(read->item_ids[i] == parts.item_ids[i]);
          CHECK(read->statistics[i].interactions == parts.statistics[i].interactions);
          CHECK(read->statistics[i].creation_timestamp == parts.statistics[i].creation_timestamp);
        }
        CHECK(read->biases == parts.biases);
        CHECK(read->item_vectors.type() ==
              (type == pz::ElementType::f32 ? type : pz::ElementType::i8));
        CHECK(read->fields.size() == 2);
        CHECK(read->fields[1].boundaries == parts.fields[1].boundaries);
        CHECK(read->fields[0].vocabulary[2] == "shield");
        REQUIRE(read->weights.size() == parts.weights.size());
        for (std::size_t w = 0; w < parts.weights.size(); ++w) {
          const pz::Matrix& a = read->weights[w];
          const pz::Matrix& b = parts.weights[w];
          REQUIRE(a.rows() == b.rows());
          float squares = 0, errors = 0;
          for (std::size_t r = 0; r < a.rows(); ++r) {
            const float step = a.type() == pz::ElementType::i8 ? a.scales()[r] : 0.0f;
            for (std::size_t c = 0; c < a.columns(); ++c) {
              const float e = std::abs(a.at(r, c) - b.at(r, c));
              if (type != pz::ElementType::i4) REQUIRE(e <= 0.5001f * step);
              squares += b.at(r, c) * b.at(r, c);
              errors += e * e;
            }
          }
          REQUIRE(errors <= 0.01f * squares);
        }
        const auto again = pz::write_model(
            *read, {.element_type = type, .zstd_level = level, .chunk_bytes = chunk});
        REQUIRE(again);
        CHECK(*again == *file);
      }
    }
  }
}

TEST_CASE("every flipped bit of a small file is noticed") {
  for (const Bytes& file : {small_file(), small_chunked_file()}) {
    REQUIRE(pz::read_model(file));
    for (std::size_t at = 0; at < file.size(); ++at) {
      for (const unsigned bit : {0u, 3u, 7u}) {
        Bytes damaged = file;
        damaged[at] ^= static_cast<std::byte>(1u << bit);
        const auto read = pz::read_model(damaged);
        REQUIRE_MESSAGE(!read, "byte ", at, " bit ", bit);
        REQUIRE_FALSE(read.error().message.empty());
        REQUIRE_FALSE(pz::list_sections(damaged));
      }
    }
  }
}

TEST_CASE("every truncation of a small file is an error, and so is a longer file") {
  for (const Bytes& file : {small_file(), small_chunked_file()}) {
    for (std::size_t size = 0; size < file.size(); ++size) {
      const auto read = pz::read_model(std::span(file).first(size));
      REQUIRE_MESSAGE(!read, "size ", size);
      const pz::Errc code = read.error().code;
      REQUIRE((code == (size < 8 ? pz::Errc::format : pz::Errc::truncated)));
    }
    Bytes longer = file;
    longer.push_back(std::byte{0});
    CHECK_FALSE(pz::read_model(longer));
  }
}

TEST_CASE("a resealed forgery of every byte of header and table ends in a value or an error") {
  const Bytes file = small_file();
  const std::size_t table_end = 64 + 72 * peek<std::uint32_t>(file, 12);
  for (std::size_t at = 8; at < table_end; ++at) {
    for (const unsigned value : {0x00u, 0x01u, 0x7fu, 0x80u, 0xffu}) {
      Bytes forged = file;
      forged[at] = static_cast<std::byte>(value);
      reseal(forged);
      if (const auto read = pz::read_model(forged); !read)
        REQUIRE_FALSE(read.error().message.empty());
    }
  }
}

TEST_CASE("a resealed forgery of every byte of the stored sections ends in a value or an error") {
  for (const Bytes& file : {small_file({.zstd_level = 0}), small_chunked_file()}) {
    const std::size_t table_end = 64 + 72 * peek<std::uint32_t>(file, 12);
    for (std::size_t at = table_end; at < file.size(); ++at) {
      for (const unsigned value : {0x00u, 0x7fu, 0xffu}) {
        Bytes forged = file;
        forged[at] = static_cast<std::byte>(value);
        reseal(forged);
        if (const auto model = pz::Model::from_bytes(forged); !model)
          REQUIRE_FALSE(model.error().message.empty());
      }
    }
  }
}

TEST_CASE("forged sizes are refused before memory is taken") {
  const Bytes file = small_file({.zstd_level = 0});
  const std::size_t vectors = entry_of(file, "IVEC");
  const auto refuse = [&](std::size_t at, std::uint64_t value, pz::Errc code) {
    Bytes forged = file;
    poke(forged, at, value);
    reseal(forged);
    const auto read = pz::read_model(forged);
    REQUIRE_FALSE(read);
    CHECK(read.error().code == code);
    CHECK(read.error().message.find("IVEC") != std::string::npos);
  };
  constexpr auto huge = std::numeric_limits<std::uint64_t>::max();
  refuse(vectors + 16, huge, pz::Errc::corrupt);  // rows
  refuse(vectors + 16, std::uint64_t{1} << 62, pz::Errc::corrupt);
  refuse(vectors + 40, huge - 3, pz::Errc::corrupt);  // offset
  refuse(vectors + 48, huge, pz::Errc::corrupt);      // stored size
  refuse(vectors + 56, huge, pz::Errc::limit);        // raw size
}

TEST_CASE("chunks that contradict the table are refused") {
  const Bytes file =
      small_file({.element_type = pz::ElementType::i4, .zstd_level = 0, .chunk_bytes = 64}, 17);
  const std::size_t entry = entry_of(file, "IVEC");
  const auto directory = static_cast<std::size_t>(peek<std::uint64_t>(file, entry + 40));
  const auto refuse = [&](auto change, const char* what) {
    Bytes forged = file;
    change(forged);
    reseal(forged);
    const auto read = pz::read_model(forged);
    REQUIRE_FALSE(read);
    CAPTURE(read.error().message);
    CHECK(read.error().code == pz::Errc::corrupt);
    CHECK(read.error().message.find("IVEC") != std::string::npos);
    CHECK(read.error().message.find(what) != std::string::npos);
  };
  const auto log2 = [&](std::uint8_t value) {
    return [&, value](Bytes& forged) { poke(forged, entry + 11, value); };
  };
  refuse(log2(0), "bad table entry");
  refuse(log2(5), "bad table entry");
  refuse(log2(31), "bad table entry");
  const auto first = peek<std::uint32_t>(file, directory);
  refuse([&](Bytes& forged) { poke(forged, directory, first + 1); }, "impossible stored size");
  refuse([&](Bytes& forged) { poke(forged, entry + 10, std::uint8_t{3}); }, "bad table entry");
  refuse([&](Bytes& forged) { poke(forged, entry + 24, std::uint64_t{15}); }, "IVEC");
}

#ifndef PERSONALIZE_NO_ZSTD
TEST_CASE("a compression bomb is stopped at its declared size") {
  const Bytes file = small_file();
  Bytes forged = file;
  const std::size_t ids = entry_of(file, "META");
  // Claims to decompress to 1 TB: over the limit.
  poke(forged, ids + 8, std::uint8_t{1});
  poke(forged, ids + 56, std::uint64_t{1} << 40);
  reseal(forged);
  const auto read = pz::read_model(forged);
  REQUIRE_FALSE(read);
  CHECK(read.error().code == pz::Errc::limit);
  // Claims a size that the frame does not declare.
  poke(forged, ids + 56, std::uint64_t{1} << 20);
  poke(forged, ids + 16, std::uint64_t{1} << 20);
  reseal(forged);
  const auto other = pz::read_model(forged);
  REQUIRE_FALSE(other);
  CHECK(other.error().code == pz::Errc::compression);
}
#endif

TEST_CASE("values that are not finite, duplicate ids and odd encoders are refused by name") {
  const auto refuse = [](auto change, const char* what) {
    pz::ModelParts parts = small_model::parts();
    change(parts);
    const auto file = pz::write_model(parts);
    REQUIRE_FALSE(file);
    CAPTURE(file.error().message);
    CHECK(file.error().message.find(what) != std::string::npos);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  refuse([&](auto& p) { p.item_vectors.f32()[7] = nan; }, "IVEC");
  refuse([&](auto& p) { p.biases[3] = -infinity; }, "BIAS");
  refuse([&](auto& p) { p.weights[2].f32()[0] = nan; }, "ENCW");
  refuse([&](auto& p) { p.fields[1].boundaries = {3.0f, 2.0f}; }, "FBND");
  refuse([&](auto& p) { p.fields[0].embedding = pz::Matrix::zeros(2, 20); }, "FEMB");
  refuse([&](auto& p) { p.biases.pop_back(); }, "BIAS");
  refuse([&](auto& p) { p.statistics.pop_back(); }, "STAT");
  refuse([&](auto& p) { p.operations.pop_back(); }, "encoder");
  refuse([&](auto& p) { p.operations[2].kind = pz::EncoderOp::Kind{99}; }, "unknown kind");
  refuse([&](auto& p) { p.operations[3].argument = 8; }, "slot");
  refuse([&](auto& p) { p.operations[7].argument = 2; }, "another length");
  refuse([&](auto& p) { p.operations[5].argument = 0; }, "activation");
  refuse([&](auto& p) { p.operations.erase(p.operations.begin()); }, "embed_sum");
  refuse([&](auto& p) { p.weights.pop_back(); }, "missing");

  pz::StringTable ids;
  REQUIRE(ids.add("twice"));
  const auto second = ids.add("twice");
  REQUIRE_FALSE(second);
  CHECK(second.error().message.find("'twice' stands twice") != std::string::npos);
  CHECK_FALSE(ids.add(""));
  CHECK_FALSE(ids.add(std::string(257, 'x')));
  CHECK(ids.add(std::string(256, 'x')));
}

TEST_CASE(
    "a file keeps the fingerprints of what it was written from, whatever that is rounded to") {
  const pz::ModelParts parts = small_model::parts();
  const pz::Fingerprints original = pz::fingerprints_of(parts);
  for (const auto type : {pz::ElementType::f32, pz::ElementType::i8, pz::ElementType::i4}) {
    CAPTURE(pz::name(type));
    const auto file = pz::write_model(parts, {.element_type = type, .zstd_level = 0});
    REQUIRE(file);
    auto read = pz::read_model(*file);
    REQUIRE(read);
    REQUIRE(read->fingerprints);
    CHECK(*read->fingerprints == original);
    const auto model = pz::Model::from_bytes(*file);
    REQUIRE(model);
    CHECK((*model)->fingerprints() == original);
    // Written again, in another type, and read again.
    const auto again = pz::Model::from_bytes(*pz::write_model((*model)->parts()));
    REQUIRE(again);
    CHECK((*again)->fingerprints() == original);
    // Those of the rounded numbers are others.
    read->fingerprints.reset();
    CHECK((pz::fingerprints_of(*read) == original) == (type == pz::ElementType::f32));
  }
}

TEST_CASE("a file without fingerprints gets those of its content, one with odd ones is refused") {
  Bytes file = small_file({.zstd_level = 0});
  const std::size_t entry = entry_of(file, "FGPR");
  Bytes without = file;
  std::memcpy(without.data() + entry, "NONE", 4);
  reseal(without);
  auto read = pz::read_model(without);
  REQUIRE(read);
  CHECK_FALSE(read->fingerprints);
  const auto model = pz::Model::from_bytes(without);
  REQUIRE(model);
  CHECK((*model)->fingerprints() == pz::fingerprints_of(*read));
  // One number instead of two, and numbers of another kind.
  Bytes short_one = file;
  poke(short_one, entry + 16, std::uint64_t{1});
  Bytes floats = file;
  poke(floats, entry + 9, static_cast<std::uint8_t>(pz::ElementType::f32));
  for (Bytes& forged : {std::ref(short_one), std::ref(floats)}) {
    reseal(forged);
    const auto refused = pz::read_model(forged);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == pz::Errc::corrupt);
    CHECK(refused.error().message.find("section FGPR: ") == 0);
  }
}

TEST_CASE("a newer major version is refused, unknown sections are skipped") {
  Bytes newer = small_file();
  poke(newer, 8, std::uint16_t{3});
  reseal(newer);
  const auto read = pz::read_model(newer);
  REQUIRE_FALSE(read);
  CHECK(read.error().code == pz::Errc::version);

  Bytes minor = small_file();
  const std::size_t gaps = entry_of(minor, "GAPE");
  poke(minor, 10, std::uint16_t{7});
  std::memcpy(minor.data() + gaps, "NEWS", 4);
  reseal(minor);
  const auto skipped = pz::read_model(minor);
  REQUIRE(skipped);
  CHECK(skipped->time_gap_embedding.empty());
}

TEST_CASE("limits are limits") {
  const Bytes file = small_file();
  CHECK(pz::read_model(file, {.limits = {.items = 9}}));
  const auto items = pz::read_model(file, {.limits = {.items = 8}});
  CHECK_FALSE(items);
  CHECK_FALSE(pz::read_model(file, {.limits = {.file_bytes = file.size() - 1}}));
  CHECK_FALSE(pz::read_model(file, {.limits = {.raw_bytes = 100}}));
  CHECK_FALSE(pz::read_model(file, {.limits = {.sections = 3}}));
  CHECK_FALSE(pz::read_model(file, {.limits = {.dimension = 4}}));
}

TEST_CASE("files: replaced at once, errors name the path") {
  const auto folder = std::filesystem::temp_directory_path() / "personalize_test_model_file";
  std::filesystem::create_directories(folder);
  const std::string path = (folder / "m.pzm").string();
  REQUIRE(pz::save_model(small_model::parts(), path));
  CHECK(pz::Model::load(path));
  CHECK_FALSE(std::filesystem::exists(path + ".part"));
  const auto missing = pz::Model::load((folder / "none.pzm").string());
  REQUIRE_FALSE(missing);
  CHECK(missing.error().code == pz::Errc::io);
  CHECK(missing.error().message.find("none.pzm: cannot open") != std::string::npos);
  CHECK_FALSE(pz::save_model(small_model::parts(), (folder / "no" / "m.pzm").string()));
  CHECK_FALSE(pz::Model::load(path, {.limits = {.file_bytes = 10}}));
  CHECK_FALSE(pz::Model::load(folder.string()));
  std::filesystem::remove_all(folder);
}

TEST_CASE("chunks have 64 bytes to 16 MiB") {
  const auto parts = small_model::parts({.items = 9});
  for (const std::uint32_t chunk : {1u << 6, 1u << 24})
    CHECK(pz::read_model(*pz::write_model(parts, {.zstd_level = 0, .chunk_bytes = chunk})));
  for (const std::uint32_t chunk : {0u, 1u, 32u, 100u, 1u << 25, 1u << 30}) {
    const auto refused = pz::write_model(parts, {.chunk_bytes = chunk});
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == pz::Errc::invalid_argument);
  }
}

TEST_CASE("threads and the way a file comes in change nothing about what is read") {
  const auto folder = std::filesystem::temp_directory_path() / "personalize_test_model_threads";
  std::filesystem::create_directories(folder);
  const std::string path = (folder / "m.pzm").string();
  for (const auto type : {pz::ElementType::i4, pz::ElementType::i8, pz::ElementType::f32}) {
    const pz::ModelParts parts = small_model::parts({.items = 3000, .dimension = 33});
    const pz::WriteOptions write{.element_type = type, .zstd_level = 1, .chunk_bytes = 1024};
    const auto file = pz::write_model(parts, write);
    REQUIRE(file);
    REQUIRE(pz::write_file(path, *file));
    for (const unsigned threads : {1u, 2u, 7u}) {
      const auto from_memory = pz::read_model(*file, {.threads = threads});
      const auto from_disk = pz::read_model(path, {.threads = threads});
      REQUIRE(from_memory);
      REQUIRE(from_disk);
      CHECK(from_memory->item_ids.find("i2999") == 2999);
      CHECK(pz::write_model(*from_memory, write).operator*() == *file);
      CHECK(pz::write_model(*from_disk, write).operator*() == *file);
      // Of several faults, the first in the file is told, whichever thread comes upon it.
      Bytes damaged = *file;
      const auto statistics = peek<std::uint64_t>(damaged, entry_of(*file, "STAT") + 40);
      for (std::size_t at = statistics + 5000; at < damaged.size(); at += 100)
        damaged[at] ^= std::byte{1};
      const auto refused = pz::read_model(damaged, {.threads = threads});
      REQUIRE_FALSE(refused);
      CHECK(refused.error().message.find("STAT") != std::string::npos);
    }
  }
  for (const unsigned threads : {0u, 65u}) {
    const auto refused = pz::read_model(path, {.threads = threads});
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == pz::Errc::invalid_argument);
  }
  std::filesystem::remove_all(folder);
}

TEST_CASE("progress rises to the size of the file, and can cancel at any time") {
  const auto file = pz::write_model(small_model::parts({.items = 500}), {.chunk_bytes = 512});
  REQUIRE(file);
  for (const unsigned threads : {1u, 3u}) {
    std::uint64_t last = 0;
    int calls = 0;
    pz::LoadOptions options{.threads = threads};
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      REQUIRE(total == file->size());
      REQUIRE(done >= last);
      REQUIRE(done <= total);
      last = done;
      ++calls;
      return true;
    };
    REQUIRE(pz::read_model(*file, options));
    CHECK(last == file->size());
    CHECK(calls >= 1);
    if (threads > 1) continue;
    CHECK(calls > 20);
    for (int stop = 1; stop <= calls; ++stop) {
      int call = 0;
      options.progress = [&](std::uint64_t, std::uint64_t) { return ++call < stop; };
      const auto cancelled = pz::Model::from_bytes(*file, options);
      REQUIRE_FALSE(cancelled);
      CHECK(cancelled.error().code == pz::Errc::cancelled);
      CHECK(call == stop);
    }
  }
}

#ifndef PERSONALIZE_NO_ZSTD
TEST_CASE("the golden file of format version 2.1 reads as it always did") {
  // Written with element_type i4, chunk_bytes 256.
  const auto golden = pz::read_model("golden/model_v2_1.pzm");
  REQUIRE(golden);
  const pz::ModelParts original = small_model::parts({.items = 9, .dimension = 21, .hidden = 4});
  // What fingerprints_of() made of those parts when the file was written: states and models that
  // were saved with them are to fit for ever.
  constexpr pz::Fingerprints written{0x562279f5a5af1978, 0x3257b49e651f80c8};
  REQUIRE(golden->fingerprints);
  CHECK(*golden->fingerprints == written);
  CHECK(pz::fingerprints_of(original) == written);
  CHECK(golden->biases == original.biases);
  const pz::WriteOptions stored{.element_type = pz::ElementType::i4, .zstd_level = 0};
  const auto again = pz::write_model(*golden, stored);
  const auto today = pz::write_model(original, stored);
  REQUIRE(again);
  REQUIRE(today);
  CHECK(*again == *today);
}

TEST_CASE("the golden file of format version 2 reads as it always did") {
  // Written with element_type i4, chunk_bytes 256.
  auto golden = pz::read_model("golden/model_v2.pzm");
  REQUIRE(golden);
  // It has none.
  CHECK_FALSE(golden->fingerprints);
  const pz::ModelParts original = small_model::parts({.items = 9, .dimension = 21, .hidden = 4});
  // Rows of 4 columns are too narrow for 4 bits; those of one row stay f32.
  CHECK(golden->weights[3] == original.weights[3].quantised());
  CHECK(golden->weights[4] == original.weights[4]);
  CHECK(golden->biases == original.biases);
  CHECK(golden->statistics[1].creation_timestamp == 1'599'999'991);
  CHECK(golden->item_ids.find("i8") == 8);
  golden->fingerprints = pz::fingerprints_of(original);
  const pz::WriteOptions stored{.element_type = pz::ElementType::i4, .zstd_level = 0};
  const auto again = pz::write_model(*golden, stored);
  const auto today = pz::write_model(original, stored);
  REQUIRE(again);
  REQUIRE(today);
  CHECK(*again == *today);
}

TEST_CASE("the golden file of format version 1 reads as it always did") {
  const auto bytes = pz::read_file("golden/model_v1.pzm", 1 << 20);
  REQUIRE(bytes);
  const auto golden = pz::read_model(*bytes);
  REQUIRE(golden);
  CHECK_FALSE(golden->fingerprints);
  const pz::ModelParts expected =
      small_model::quantised(small_model::parts({.items = 9, .dimension = 5, .hidden = 4}));
  CHECK(golden->item_ids.size() == 9);
  CHECK(golden->item_ids[8] == "i8");
  for (std::size_t i = 0; i < 9; ++i)
    for (std::size_t c = 0; c < 5; ++c)
      CHECK(golden->item_vectors.at(i, c) == expected.item_vectors.at(i, c));
  for (std::size_t w = 0; w < expected.weights.size(); ++w)
    CHECK(golden->weights[w] == expected.weights[w]);
  CHECK(golden->biases == expected.biases);
  CHECK(golden->statistics[1].creation_timestamp == 1'599'999'991);
  // What is written today differs at most in how zstd packs it.
  const auto again = pz::write_model(*golden, {.zstd_level = 0});
  const auto today = pz::write_model(expected, {.zstd_level = 0});
  REQUIRE(again);
  REQUIRE(today);
  CHECK(*again == *today);
}
#endif
