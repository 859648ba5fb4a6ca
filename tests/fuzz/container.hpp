// Model files taken apart into sections and put together again, right or deliberately wrong.
#pragma once

#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "personalize_runtime.hpp"

namespace container {

namespace pz = personalize;

using Bytes = pz::Vector<std::byte>;

inline std::uint64_t get(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  std::uint64_t value = 0;
  if (at <= bytes.size() && size <= bytes.size() - at) std::memcpy(&value, bytes.data() + at, size);
  return value;
}

inline void put(std::span<std::byte> bytes, std::size_t at, std::uint64_t value,
                std::size_t size = 8) {
  if (at <= bytes.size() && size <= bytes.size() - at) std::memcpy(bytes.data() + at, &value, size);
}

// Makes all checksums of a file right, and its magic and total size. Without right checksums
// nothing behind them would ever be reached.
inline void seal(Bytes& file) {
  if (file.size() < 64) return;
  std::memcpy(file.data(), "\x89PZM\r\n\x1a\n", 8);
  put(file, 16, file.size());
  const bool chunked = get(file, 8, 2) != 1;
  const std::uint64_t table = get(file, 12, 4) * 72;
  if (table <= file.size() - 64) {
    for (std::size_t at = 64; at < 64 + table; at += 72) {
      const std::uint64_t offset = get(file, at + 40, 8), size = get(file, at + 48, 8);
      if (offset > file.size() || size > file.size() - offset) continue;
      std::uint64_t sealed = size;
      if (chunked) {
        // The chunks' sizes tell where the directory ends.
        sealed = 0;
        for (std::uint64_t end = 0; end + sealed < size && sealed + 12 <= size; sealed += 12)
          end += get(file, offset + sealed, 4);
        std::uint64_t chunk = offset + sealed;
        for (std::uint64_t entry = offset; entry < offset + sealed; entry += 12) {
          const std::uint64_t stored = get(file, entry, 4);
          if (chunk > offset + size || stored > offset + size - chunk) break;
          put(file, entry + 4, pz::xxh64(std::span(file).subspan(chunk, stored)));
          chunk += stored;
        }
      }
      put(file, at + 64, pz::xxh64(std::span(file).subspan(offset, sealed)));
    }
    put(file, 24, pz::xxh64(std::span(file).subspan(64, static_cast<std::size_t>(table))));
  }
  put(file, 56, pz::xxh64(std::span(file).first(56)));
}

struct Section {
  std::array<char, 4> tag{};
  std::uint32_t index = 0;
  std::uint8_t codec = 0, element_type = 0, rank = 1, chunk_log2 = 20;
  std::array<std::uint64_t, 3> shape{1, 1, 1};
  Bytes raw;

  bool is(const char* name) const { return std::memcmp(tag.data(), name, 4) == 0; }
};

// Of all chunks but the last.
inline std::size_t chunk_bytes(const Section& section) {
  const unsigned log2 = std::clamp<unsigned>(section.chunk_log2, 6, 30);
  if (section.element_type == static_cast<std::uint8_t>(pz::ElementType::i4) &&
      section.shape[1] > 0 && section.shape[1] <= 1u << 20)
    return pz::FourBitRows::rows_in_chunk(section.shape[1], log2) *
           pz::FourBitRows::row_bytes(section.shape[1]);
  return std::size_t{1} << log2;
}

// The sections of a file in format version 2, as far as they can be read; `most` raw bytes each.
inline std::vector<Section> take_apart(std::span<const std::byte> file,
                                       std::size_t most = 1 << 20) {
  std::vector<Section> sections;
  const std::size_t count = get(file, 12, 4);
  if (get(file, 8, 2) != 2 || count > 256) return sections;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = 64 + 72 * i;
    if (at + 72 > file.size()) break;
    Section section;
    std::memcpy(section.tag.data(), file.data() + at, 4);
    section.index = static_cast<std::uint32_t>(get(file, at + 4, 4));
    section.codec = static_cast<std::uint8_t>(get(file, at + 8, 1));
    section.element_type = static_cast<std::uint8_t>(get(file, at + 9, 1));
    section.rank = static_cast<std::uint8_t>(get(file, at + 10, 1));
    section.chunk_log2 = static_cast<std::uint8_t>(get(file, at + 11, 1));
    for (std::size_t d = 0; d < 3; ++d) section.shape[d] = get(file, at + 16 + 8 * d, 8);
    const std::uint64_t offset = get(file, at + 40, 8), stored = get(file, at + 48, 8);
    const std::uint64_t raw = get(file, at + 56, 8);
    if (offset > file.size() || stored > file.size() - offset || raw > most) continue;
    const std::uint64_t piece = chunk_bytes(section);
    const std::uint64_t pieces = raw / piece + (raw % piece != 0);
    std::uint64_t chunk = offset + 12 * pieces;
    section.raw.resize(raw);
    for (std::uint64_t p = 0; p < pieces; ++p) {
      const std::uint64_t size = get(file, offset + 12 * p, 4);
      if (chunk > file.size() || size > file.size() - chunk) break;
      const auto target =
          std::span(section.raw).subspan(p * piece, std::min(piece, raw - p * piece));
      if (size == target.size())
        std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(chunk), size, target.begin());
      else
        ZSTD_decompress(target.data(), target.size(), file.data() + chunk, size);
      chunk += size;
    }
    sections.push_back(std::move(section));
  }
  return sections;
}

// A file of these sections, without checksums. What a section says of itself is written down as it
// is, whether it fits its bytes or not.
inline Bytes put_together(std::span<const Section> sections) {
  Bytes file(64 + 72 * sections.size());
  put(file, 8, 2, 2);
  put(file, 12, sections.size(), 4);
  for (std::size_t i = 0; i < sections.size(); ++i) {
    const Section& section = sections[i];
    const std::size_t at = 64 + 72 * i, offset = file.size();
    const std::size_t piece = chunk_bytes(section);
    Bytes directory, chunks, packed;
    for (std::size_t begin = 0; begin < section.raw.size(); begin += piece) {
      const auto raw =
          std::span(section.raw).subspan(begin, std::min(piece, section.raw.size() - begin));
      std::span<const std::byte> stored = raw;
      if (section.codec == 1) {
        packed.resize(ZSTD_compressBound(raw.size()));
        const std::size_t size =
            ZSTD_compress(packed.data(), packed.size(), raw.data(), raw.size(), 1);
        if (!ZSTD_isError(size) && size < raw.size()) stored = std::span(packed).first(size);
      }
      directory.resize(directory.size() + 12);
      put(directory, directory.size() - 12, stored.size(), 4);
      chunks.insert(chunks.end(), stored.begin(), stored.end());
    }
    file.insert(file.end(), directory.begin(), directory.end());
    file.insert(file.end(), chunks.begin(), chunks.end());
    std::memcpy(file.data() + at, section.tag.data(), 4);
    put(file, at + 4, section.index, 4);
    put(file, at + 8, section.codec, 1);
    put(file, at + 9, section.element_type, 1);
    put(file, at + 10, section.rank, 1);
    put(file, at + 11, section.chunk_log2, 1);
    for (std::size_t d = 0; d < 3; ++d) put(file, at + 16 + 8 * d, section.shape[d]);
    put(file, at + 40, offset);
    put(file, at + 48, file.size() - offset);
    put(file, at + 56, section.raw.size());
  }
  return file;
}

}  // namespace container
