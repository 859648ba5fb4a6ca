// A state file from anywhere: it is refused, or it serves, keeps every promise, and can be saved
// and read again. The mutator makes all checksums right, so that what lies behind them is reached.
#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "container.hpp"
#include "small_shop.hpp"

namespace pz = personalize;
using container::Bytes;
using promises::require;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

// A file without a folder.
std::string file_of(std::span<const std::byte> bytes) {
  static const int descriptor = ::memfd_create("state", 0);
  require(
      descriptor >= 0 && ::ftruncate(descriptor, 0) == 0 &&
          ::pwrite(descriptor, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
      "a file can be made");
  return "/proc/self/fd/" + std::to_string(descriptor);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string path = file_of(std::as_bytes(std::span(data, size)));
  auto shop = pz::Recommender::restore(path, small_shop::model(), small_shop::options());
  if (!shop) {
    require(!shop.error().message.empty(), "an error says why");
    return 0;
  }
  static const small_shop::Folder folder;
  const std::string saved = folder.path() + "/state";
  require(shop->save(saved).has_value(), "what was read can be saved");
  auto again = pz::Recommender::restore(saved, small_shop::model(), small_shop::options());
  require(again.has_value(), "what was saved can be read");
  require(again->user_count() == shop->user_count(), "no user is lost");
  small_shop::use(*shop);
  small_shop::use(*again);
  // Another model reads it as well, or says why not.
  static const auto other =
      small_model::model({.items = 7, .dimension = 4, .hidden = 3, .seed = 2});
  auto foreign = pz::Recommender::restore(path, other, small_shop::options());
  if (foreign) small_shop::use(*foreign);
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  Bytes file(size);
  if (size > 0) std::memcpy(file.data(), data, size);
  // A state has a model's outside, but for its magic and version.
  container::put(file, 8, 2, 2);
  auto sections = container::take_apart(file);
  small_model::Random random(seed);
  if (sections.empty() || random.below(64) == 0) return LLVMFuzzerMutate(data, size, max_size);
  std::vector<container::Section*> full;
  for (auto& section : sections)
    if (section.raw.size() > 8 || random.below(16) == 0) full.push_back(&section);
  for (std::uint32_t n = 1 + random.below(3); n > 0 && !full.empty(); --n) {
    Bytes& raw = full[random.below(static_cast<std::uint32_t>(full.size()))]->raw;
    const std::size_t before = raw.size();
    if (random.below(2) == 0 && before >= 8) {
      // A number of which it knows nothing.
      const std::size_t width = std::size_t{1} << random.below(4);
      const std::uint64_t extremes[] = {0,          1,          255,   65535,      0xffffffff,
                                        1ull << 40, 1ull << 63, ~0ull, 0x7f800000, 0xff800000};
      container::put(raw, random.below(static_cast<std::uint32_t>(before - width + 1)),
                     random.below(3) == 0 ? random.bits() : extremes[random.below(10)], width);
    } else {
      raw.resize(before + 64);
      raw.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(raw.data()), before, raw.size()));
    }
    for (auto& section : sections)
      if (&section.raw == &raw) section.shape[0] = raw.size();
  }
  if (random.below(64) == 0)
    sections.erase(sections.begin() + random.below(static_cast<std::uint32_t>(sections.size())));
  Bytes made = container::put_together(sections);
  container::seal(made);
  std::memcpy(made.data(), "\x89PZS\r\n\x1a\n", 8);
  container::put(made, 8, 1, 2);
  container::put(made, 56, pz::xxh64(std::span(made).first(56)));
  if (made.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, made.data(), made.size());
  return made.size();
}
