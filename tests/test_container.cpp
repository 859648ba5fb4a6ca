// Files of sections apart from what models put into them: state files, sections that are made when
// they are written, and a reader with one section in memory at a time.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;
using pz::detail::FileBuilder;
using pz::detail::model_file;
using pz::detail::state_file;
using Bytes = pz::Vector<std::byte>;

namespace {

struct Section {
  std::string label;
  Bytes bytes;
  bool stored = false;
};

Bytes repeated(std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i % 7);
  return bytes;
}

Bytes random_bytes(std::size_t size, std::uint64_t seed) {
  small_model::Random random{seed};
  Bytes bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.bits());
  return bytes;
}

// Of all sizes that differ in how they are cut: empty ones at both ends and in the middle.
std::vector<Section> some_sections() {
  return {{"NONE", {}},
          {"HEAD", repeated(20)},
          {"USRS", random_bytes(300, 1), true},
          {"USRS[1]", random_bytes(64, 2), true},
          {"GAP0", {}},
          {"GAP0[1]", {}},
          {"TEXT", repeated(1000)},
          {"LAST[4000000000]", {}}};
}

std::pair<std::string, std::uint32_t> parsed(const std::string& label) {
  const std::size_t bracket = label.find('[');
  return {label.substr(0, 4),
          bracket == std::string::npos
              ? 0
              : static_cast<std::uint32_t>(std::stoul(label.substr(bracket + 1)))};
}

Bytes file_of(const std::vector<Section>& sections, int level = 0, unsigned chunk_log2 = 6,
              const pz::detail::FileKind& kind = state_file) {
  pz::detail::MemorySink sink;
  FileBuilder file{sink, kind, level, chunk_log2};
  for (const Section& section : sections) {
    const auto [tag, index] = parsed(section.label);
    file.add_made(
        tag, index,
        [&](Bytes& out) -> pz::Result<void> {
          REQUIRE(out.empty());
          out.insert(out.end(), section.bytes.begin(), section.bytes.end());
          return {};
        },
        section.stored ? pz::Codec::stored : pz::Codec::zstd);
  }
  REQUIRE(file.finish());
  return sink.bytes;
}

struct Visited {
  std::vector<Section> sections;
  std::vector<pz::SectionInfo> infos;
  pz::Result<void> result;
};

Visited visit_all(pz::detail::ByteSource source, const pz::LoadOptions& options = {},
                  const pz::detail::FileKind& kind = state_file) {
  Visited visited;
  visited.result = pz::detail::read_each_section(
      source, kind, options,
      [&](const pz::SectionInfo& section, std::span<const std::byte> raw) -> pz::Result<void> {
        visited.sections.push_back({section.label(), Bytes(raw.begin(), raw.end())});
        visited.infos.push_back(section);
        return {};
      });
  return visited;
}
Visited visit_all(std::span<const std::byte> file, const pz::LoadOptions& options = {},
                  const pz::detail::FileKind& kind = state_file) {
  return visit_all(pz::detail::ByteSource{file}, options, kind);
}

// Whether they are the first so many of the others.
void check_first(const std::vector<Section>& some, const std::vector<Section>& all) {
  REQUIRE(some.size() <= all.size());
  for (std::size_t s = 0; s < some.size(); ++s) {
    REQUIRE(some[s].label == all[s].label);
    REQUIRE(some[s].bytes == all[s].bytes);
  }
}

template <class T>
void poke(Bytes& file, std::size_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

// Makes the checksums of header and table right again.
void reseal_table(Bytes& file) {
  std::uint32_t count;
  std::memcpy(&count, file.data() + 12, 4);
  const std::size_t table = std::size_t{count} * 72;
  if (64 + table <= file.size()) poke(file, 24, pz::xxh64(std::span(file).subspan(64, table)));
  poke(file, 56, pz::xxh64(std::span(file).first(56)));
}

}  // namespace

TEST_CASE("sections of a state file are shown in their order, as they were made") {
  const TemporaryFolder folder;
  const std::vector<Section> sections = some_sections();
  for (const int level : {0, 3})
    for (const unsigned chunk_log2 : {6u, 8u, 20u}) {
      CAPTURE(level);
      CAPTURE(chunk_log2);
      const Bytes file = file_of(sections, level, chunk_log2);
      const std::string path = folder.file("a.pzs");
      REQUIRE(pz::write_file(path, file));
      auto on_disk = pz::detail::ByteSource::open(path);
      REQUIRE(on_disk);
      // Threads that are asked for are not used: there is one section at a time.
      for (const Visited& visited :
           {visit_all(file), visit_all(std::move(*on_disk)), visit_all(file, {.threads = 7})}) {
        REQUIRE(visited.result);
        REQUIRE(visited.sections.size() == sections.size());
        check_first(visited.sections, sections);
        for (const pz::SectionInfo& info : visited.infos) {
          CHECK(info.element_type == pz::ElementType::u8);
          CHECK(info.rank == 1);
          CHECK(info.shape[0] == info.raw_size);
        }
      }
      CHECK(file_of(sections, level, chunk_log2) == file);
    }
  const Visited none = visit_all(file_of({}));
  CHECK(none.result);
  CHECK(none.sections.empty());
}

#ifndef PERSONALIZE_NO_ZSTD
TEST_CASE("a section can be stored where the others are compressed") {
  std::vector<Section> sections{{"WELL", repeated(5000)}, {"RAWS", repeated(5000), true}};
  const Visited packed = visit_all(file_of(sections, 3, 10));
  REQUIRE(packed.result);
  CHECK(packed.infos[0].codec == pz::Codec::zstd);
  CHECK(packed.infos[0].stored_size < 1000);
  CHECK(packed.infos[1].codec == pz::Codec::stored);
  CHECK(packed.infos[1].stored_size == 5000 + 5 * 12);
  check_first(packed.sections, sections);
  const Visited plain = visit_all(file_of(sections, 0, 10));
  REQUIRE(plain.result);
  CHECK(plain.infos[0].codec == pz::Codec::stored);
}
#endif

TEST_CASE("a kind of file is refused where another is read") {
  const Bytes state = file_of(some_sections());
  const auto as_model = pz::read_model(state);
  REQUIRE_FALSE(as_model);
  CHECK(as_model.error().code == pz::Errc::format);
  CHECK(as_model.error().message == "not a model file: the first 8 bytes are not a .pzm header's");
  CHECK(as_model.error().offset == 0);
  CHECK_FALSE(pz::list_sections(state));
  const auto model = pz::write_model(small_model::parts({.items = 9}), {.zstd_level = 0});
  REQUIRE(model);
  const Visited as_state = visit_all(*model);
  REQUIRE_FALSE(as_state.result);
  CHECK(as_state.result.error().code == pz::Errc::format);
  CHECK(as_state.result.error().message ==
        "not a state file: the first 8 bytes are not a .pzs header's");
  CHECK(as_state.sections.empty());
  Bytes longer = state;
  longer.push_back(std::byte{0});
  const Visited behind = visit_all(longer);
  REQUIRE_FALSE(behind.result);
  CHECK(behind.result.error().message == "bytes follow the end of the state");
}

TEST_CASE("a state file of a newer major version is refused, of a newer minor one it is read") {
  const std::vector<Section> sections = some_sections();
  Bytes file = file_of(sections);
  std::uint16_t version[2];
  std::memcpy(version, file.data() + 8, sizeof version);
  CHECK(version[0] == 1);
  CHECK(version[1] == 0);
  poke(file, 10, std::uint16_t{9});
  reseal_table(file);
  CHECK(visit_all(file).sections.size() == sections.size());
  poke(file, 8, std::uint16_t{2});
  reseal_table(file);
  const Visited newer = visit_all(file);
  REQUIRE_FALSE(newer.result);
  CHECK(newer.result.error().code == pz::Errc::version);
  CHECK(newer.result.error().message.find("format version 2, this reader knows up to 1") !=
        std::string::npos);
}

TEST_CASE("a model's sections can be shown one by one, of every version") {
  const auto model = pz::write_model(small_model::parts({.items = 9, .dimension = 17}),
                                     {.element_type = pz::ElementType::i4, .zstd_level = 0});
  REQUIRE(model);
  const Visited visited = visit_all(*model, {}, model_file);
  REQUIRE(visited.result);
  const auto listed = pz::list_sections(*model);
  REQUIRE(listed);
  REQUIRE(visited.infos.size() == listed->size());
  for (std::size_t s = 0; s < listed->size(); ++s) {
    CHECK(visited.infos[s].label() == (*listed)[s].label());
    CHECK(visited.sections[s].bytes.size() == (*listed)[s].raw_size);
  }
  CHECK(visited.sections[0].label == "META");
  CHECK(std::memcmp(visited.sections[0].bytes.data(), R"({"recipe": "test"})", 18) == 0);
#ifndef PERSONALIZE_NO_ZSTD
  for (const char* golden : {"golden/model_v1.pzm", "golden/model_v2.pzm"}) {
    const auto bytes = pz::read_file(golden, 1 << 20);
    REQUIRE(bytes);
    const Visited old = visit_all(*bytes, {}, model_file);
    CHECK(old.result);
    CHECK(old.sections.size() == pz::list_sections(*bytes)->size());
  }
#endif
}

TEST_CASE("a section is made when those before it are written, and an error of it ends the file") {
  pz::detail::MemorySink sink;
  FileBuilder file{sink, state_file, 0, 6};
  std::vector<std::size_t> written;
  for (std::uint32_t index = 0; index < 3; ++index)
    file.add_made("PART", index, [&](Bytes& out) -> pz::Result<void> {
      CHECK(out.empty());
      written.push_back(sink.bytes.size());
      out.resize(100);
      return {};
    });
  bool later = false;
  file.add_made("FAIL", 0, [](Bytes&) -> pz::Result<void> {
    return pz::Error{pz::Errc::limit, "too many users"};
  });
  file.add_made("NEXT", 0, [&](Bytes&) -> pz::Result<void> {
    later = true;
    return {};
  });
  const auto finished = file.finish();
  REQUIRE_FALSE(finished);
  CHECK(finished.error().code == pz::Errc::limit);
  CHECK(finished.error().message == "too many users");
  CHECK_FALSE(later);
  const std::size_t head = 64 + 5 * 72, section = 2 * 12 + 100;
  CHECK(written == std::vector<std::size_t>{head, head + section, head + 2 * section});
  CHECK_FALSE(visit_all(sink.bytes).result);
}

TEST_CASE(
    "every flipped bit and every truncation of a state file is noticed, and what is shown is "
    "right") {
  const std::vector<Section> sections = some_sections();
  for (const int level : {0, 3}) {
    const Bytes file = file_of(sections, level);
    for (std::size_t at = 0; at < file.size(); ++at)
      for (const unsigned bit : {0u, 3u, 7u}) {
        Bytes damaged = file;
        damaged[at] ^= static_cast<std::byte>(1u << bit);
        const Visited visited = visit_all(damaged);
        REQUIRE_MESSAGE(!visited.result, "byte ", at, " bit ", bit);
        REQUIRE_FALSE(visited.result.error().message.empty());
        REQUIRE(visited.result.error().offset);
        check_first(visited.sections, sections);
        if (at < 64 + 72 * sections.size()) {
          REQUIRE(visited.sections.empty());
        } else {
          // Of a section, which is told by name.
          std::size_t s = 0;
          const Visited sound = visit_all(file);
          while (at >= sound.infos[s].offset + sound.infos[s].stored_size) ++s;
          REQUIRE(visited.sections.size() <= s);
          REQUIRE(visited.result.error().offset == sound.infos[s].offset);
          REQUIRE(visited.result.error().message.find("section " + sections[s].label + ": ") == 0);
        }
      }
    for (std::size_t size = 0; size < file.size(); ++size) {
      const Visited visited = visit_all(std::span(file).first(size));
      REQUIRE_FALSE(visited.result);
      const pz::Errc code = visited.result.error().code;
      REQUIRE((code == (size < 8 ? pz::Errc::format : pz::Errc::truncated)));
      REQUIRE(visited.sections.empty());
    }
  }
}

TEST_CASE("forged tables of a state file end in sections or an error, within its limits") {
  const Bytes file = file_of(some_sections());
  const std::size_t table_end = 64 + 72 * some_sections().size();
  for (std::size_t at = 8; at < table_end; ++at)
    for (const unsigned value : {0x00u, 0x01u, 0x05u, 0x7fu, 0x80u, 0xffu}) {
      Bytes forged = file;
      forged[at] = static_cast<std::byte>(value);
      reseal_table(forged);
      const Visited visited = visit_all(forged, {.limits = {.raw_bytes = 1 << 20}});
      if (!visited.result) REQUIRE_FALSE(visited.result.error().message.empty());
      std::size_t bytes = 0;
      for (const Section& section : visited.sections) bytes += section.bytes.size();
      REQUIRE(bytes <= 1 << 20);
    }
  Bytes odd_codec = file;
  poke(odd_codec, 64 + 72 + 8, std::uint8_t{7});
  reseal_table(odd_codec);
  const Visited refused = visit_all(odd_codec);
  REQUIRE_FALSE(refused.result);
  CHECK(refused.result.error().code == pz::Errc::unsupported);
  CHECK(refused.result.error().message == "section HEAD: unknown codec");
  for (const pz::LoadLimits& limits :
       {pz::LoadLimits{.file_bytes = file.size() - 1}, pz::LoadLimits{.raw_bytes = 1383},
        pz::LoadLimits{.sections = 7}}) {
    const Visited over = visit_all(file, {.limits = limits});
    REQUIRE_FALSE(over.result);
    CHECK(over.result.error().code == pz::Errc::limit);
    CHECK(over.sections.empty());
  }
  CHECK(visit_all(file, {.limits = {.raw_bytes = 1384, .sections = 8}}).result);
}

TEST_CASE("an error of who is shown a section ends the reading and names the section") {
  const std::vector<Section> sections = some_sections();
  const Bytes file = file_of(sections);
  // Empty ones, such in the middle and the last included.
  for (std::size_t bad = 0; bad < sections.size(); ++bad) {
    CAPTURE(sections[bad].label);
    const auto fail_with = [&](const pz::Error& error) {
      pz::detail::ByteSource source{file};
      std::size_t seen = 0;
      std::uint64_t offset = 0;
      const auto read = pz::detail::read_each_section(
          source, state_file, {},
          [&](const pz::SectionInfo& section, std::span<const std::byte>) -> pz::Result<void> {
            offset = section.offset;
            if (seen++ == bad) return error;
            return {};
          });
      REQUIRE_FALSE(read);
      CHECK(seen == bad + 1);
      return std::pair(read.error(), offset);
    };
    for (const pz::Errc code : {pz::Errc::corrupt, pz::Errc::limit}) {
      const auto [error, offset] = fail_with({code, std::string("has no users")});
      CHECK(error.code == code);
      CHECK(error.message == "section " + sections[bad].label + ": has no users");
      CHECK(error.offset == offset);
    }
    const auto own = fail_with({pz::Errc::corrupt, std::string("entry 3 is odd"), 17}).first;
    CHECK(own.message == "entry 3 is odd");
    CHECK(own.offset == 17);
    CHECK(fail_with({pz::Errc::out_of_memory, "out of memory"}).first.message == "out of memory");
  }
}

TEST_CASE("reading section by section reports progress, and stops where it is told to") {
  const Bytes file = file_of(some_sections());
  std::uint64_t last = 0;
  int calls = 0;
  pz::LoadOptions options;
  options.progress = [&](std::uint64_t done, std::uint64_t total) {
    REQUIRE(total == file.size());
    REQUIRE(done >= last);
    last = done;
    ++calls;
    return true;
  };
  REQUIRE(visit_all(file, options).result);
  CHECK(last == file.size());
  for (int stop = 1; stop <= calls; ++stop) {
    int call = 0;
    options.progress = [&](std::uint64_t, std::uint64_t) { return ++call < stop; };
    const Visited cancelled = visit_all(file, options);
    REQUIRE_FALSE(cancelled.result);
    CHECK(cancelled.result.error().code == pz::Errc::cancelled);
  }
}
