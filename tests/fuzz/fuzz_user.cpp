// A user's blob from anywhere: it is refused and changes nothing, or the user is served as promised
// and can be exported again. The mutator makes the checksum right.
#include <zstd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "small_shop.hpp"

namespace pz = personalize;
using promises::require;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static std::optional<pz::Recommender> shop;
  static int rounds = 0;
  if (rounds++ % 500 == 0) {
    shop.reset();
    auto made = pz::Recommender::create(small_shop::model(), small_shop::options());
    require(made.has_value(), "a recommender is made");
    shop.emplace(std::move(*made));
    small_shop::fill(*shop);
  }
  const std::size_t before = shop->user_count();
  const auto report = shop->import_user(std::as_bytes(std::span(data, size)));
  if (!report) {
    require(!report.error().message.empty(), "an error says why");
    require(shop->user_count() == before, "what is refused changes nothing");
    return 0;
  }
  require(report->user.empty() != report->session.empty(), "it is a user or a session");
  require(report->events <= 20, "no more events are kept than allowed");
  const auto slate =
      shop->recommend({.user = report->user, .session = report->session, .count = 5});
  require(slate.has_value(), "a request is answered");
  promises::check_slate(*slate, 5, *shop);
  const auto parts = shop->explain({.user = report->user, .session = report->session}, "i1");
  require(parts.has_value(), "an item is explained");
  promises::check_explanation(*parts);
  const auto blob = shop->export_user(report->user, report->session);
  require(blob.has_value(), "a user is exported");
  // One of whom nothing is known is not kept.
  require(!blob->empty() || report->events == 0, "a user with events stays");
  if (!blob->empty()) require(shop->import_user(*blob).has_value(), "and comes in again");
  if (size % 8 == 0) small_shop::use(*shop);
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  if (size < 17 || seed % 64 == 0) return LLVMFuzzerMutate(data, size, max_size);
  std::vector<std::uint8_t> raw(data + 9, data + size - 8);
  if (data[4] == 1) {
    raw.resize(1 << 16);
    const std::size_t got = ZSTD_decompress(raw.data(), raw.size(), data + 9, size - 17);
    raw.resize(ZSTD_isError(got) ? 0 : got);
  }
  const std::size_t before = raw.size();
  raw.resize(before + 64);
  raw.resize(LLVMFuzzerMutate(raw.data(), before, raw.size()));
  std::vector<std::uint8_t> made(data, data + 9);
  std::memcpy(made.data(), "PZU\1", 5);
  const auto claimed = static_cast<std::uint32_t>(raw.size());
  std::memcpy(made.data() + 5, &claimed, 4);
  made.insert(made.end(), raw.begin(), raw.end());
  const std::uint64_t checksum = pz::xxh64(std::as_bytes(std::span(made)));
  made.resize(made.size() + 8);
  std::memcpy(made.data() + made.size() - 8, &checksum, 8);
  if (made.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, made.data(), made.size());
  return made.size();
}
