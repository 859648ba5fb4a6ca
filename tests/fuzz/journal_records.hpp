// A journal's records taken apart and put together again, numbered and sealed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "personalize_runtime.hpp"

namespace journal_records {

namespace pz = personalize;
namespace detail = pz::detail;

struct Record {
  std::uint32_t type = 0;
  std::vector<std::byte> payload;
};

// As a journal has them; what does not fit is cut.
inline std::vector<Record> take_apart(std::span<const std::byte> bytes) {
  std::vector<Record> records;
  while (bytes.size() >= detail::record_frame_size && records.size() < 1000) {
    const std::size_t size =
        std::min<std::size_t>(detail::load_integer<std::uint32_t>(bytes.data()),
                              bytes.size() - detail::record_frame_size);
    const auto payload = bytes.subspan(detail::record_head_size, size);
    records.push_back(
        {detail::load_integer<std::uint32_t>(bytes.data() + 4), {payload.begin(), payload.end()}});
    bytes = bytes.subspan(detail::record_frame_size + size);
  }
  return records;
}

inline pz::Vector<std::byte> put_together(std::span<const Record> records, std::uint64_t first,
                                          std::uint64_t seed) {
  pz::Vector<std::byte> bytes;
  for (const Record& record : records) {
    const std::size_t begin = bytes.size();
    detail::append_integer(bytes, static_cast<std::uint32_t>(record.payload.size()));
    detail::append_integer(bytes, record.type);
    detail::append_integer(bytes, first++);
    bytes.insert(bytes.end(), record.payload.begin(), record.payload.end());
    detail::append_integer(bytes, pz::xxh64(std::span(bytes).subspan(begin), seed));
  }
  return bytes;
}

}  // namespace journal_records
