// A model file from anywhere: reading it, and serving from what was accepted, stays inside bounds.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

namespace {

// Without right checksums nothing behind them would ever be reached.
void reseal(std::vector<std::byte>& file) {
  if (file.size() < 64) return;
  const auto put = [&](std::size_t at, std::uint64_t value) {
    std::memcpy(file.data() + at, &value, 8);
  };
  const auto get = [&](std::size_t at, std::size_t size = 8) {
    std::uint64_t value = 0;
    std::memcpy(&value, file.data() + at, size);
    return value;
  };
  std::memcpy(file.data(), "\x89PZM\r\n\x1a\n", 8);
  put(16, file.size());
  const bool chunked = get(8, 2) != 1;
  const std::uint64_t table = get(12, 4) * 72;
  if (table <= file.size() - 64) {
    for (std::size_t at = 64; at < 64 + table; at += 72) {
      const std::uint64_t offset = get(at + 40), size = get(at + 48);
      if (offset > file.size() || size > file.size() - offset) continue;
      std::uint64_t sealed = size;
      if (chunked) {
        // The chunks' sizes tell where the directory ends.
        sealed = 0;
        for (std::uint64_t end = 0; end + sealed < size && sealed + 12 <= size; sealed += 12)
          end += get(offset + sealed, 4);
        std::uint64_t chunk = offset + sealed;
        for (std::uint64_t entry = offset; entry < offset + sealed; entry += 12) {
          const std::uint64_t stored = get(entry, 4);
          if (chunk > offset + size || stored > offset + size - chunk) break;
          put(entry + 4, pz::xxh64(std::span(file).subspan(chunk, stored)));
          chunk += stored;
        }
      }
      put(at + 64, pz::xxh64(std::span(file).subspan(offset, sealed)));
    }
    put(24, pz::xxh64(std::span(file).subspan(64, static_cast<std::size_t>(table))));
  }
  put(56, pz::xxh64(std::span(file).first(56)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  std::vector<std::byte> file(input.begin(), input.end());
  reseal(file);
  const pz::LoadOptions options{
      .limits = {.file_bytes = 1 << 20, .raw_bytes = 1 << 22, .dimension = 64}};
  const auto model = pz::Model::from_bytes(file, options);
  if (!model) return 0;
  auto shop = pz::Recommender::create(*model);
  if (!shop) return 0;
  for (std::uint32_t i = 0; i < (*model)->item_count() && i < 8; ++i)
    (void)shop->record({.user = "u", .item = (*model)->item_id(i), .timestamp = i});
  (void)shop->recommend({.user = "u", .count = 5});
  return 0;
}
