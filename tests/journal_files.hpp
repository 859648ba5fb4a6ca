// Journals whose records are texts, and what their files hold.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../personalize_runtime.hpp"
#include "temporary_folder.hpp"

namespace journals {

namespace pz = personalize;
namespace detail = pz::detail;

inline const detail::JournalHeader header{
    .lineage = 0x1122334455667788, .number = 3, .first_sequence = 10, .model = {5, 6}};

inline std::unique_ptr<detail::Journal> begin(const std::string& path,
                                              detail::JournalSettings settings = {},
                                              const detail::JournalHeader& of = header) {
  auto journal = detail::Journal::create(path, of, settings);
  if (!journal) FAIL(journal.error().message);
  return std::move(*journal);
}

inline std::unique_ptr<detail::JournalFile> next_file(const std::string& path, std::uint64_t number,
                                                      std::uint64_t first) {
  auto file = detail::JournalFile::create(
      path, {.lineage = header.lineage, .number = number, .first_sequence = first, .model = {}});
  if (!file) FAIL(file.error().message);
  return std::move(*file);
}

inline std::uint64_t append(detail::Journal& journal, std::string_view text,
                            std::uint32_t type = 1) {
  detail::Reservation record = journal.reserve(text.size());
  record.add(detail::text_bytes(text));
  return journal.append(std::move(record), type);
}

struct Contents {
  std::vector<std::string> texts;
  std::vector<std::uint64_t> numbers;
  std::vector<std::uint32_t> types;
  pz::Result<detail::JournalEnd> end;
};

inline Contents read(const std::string& path, const detail::JournalExpectation& expected = {}) {
  Contents contents{{}, {}, {}, detail::JournalEnd{}};
  contents.end = detail::read_journal(
      path, expected,
      [&](std::uint64_t number, std::uint32_t type,
          std::span<const std::byte> payload) -> pz::Result<void> {
        contents.texts.emplace_back(reinterpret_cast<const char*>(payload.data()), payload.size());
        contents.numbers.push_back(number);
        contents.types.push_back(type);
        return {};
      });
  return contents;
}

}  // namespace journals
