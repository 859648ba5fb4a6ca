#include "train/streams.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "data/random.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

Chunk slice(const Chunk& chunk, std::size_t first, std::size_t last) {
  Chunk part;
  part.batch = last - first;
  part.steps = chunk.steps;
  const auto copy = [&](const auto& from, auto& to) {
    to.reserve(part.batch * part.steps);
    for (std::size_t t = 0; t < chunk.steps; ++t) {
      const auto row = from.begin() + static_cast<std::ptrdiff_t>(t * chunk.batch);
      to.insert(to.end(), row + static_cast<std::ptrdiff_t>(first),
                row + static_cast<std::ptrdiff_t>(last));
    }
  };
  copy(chunk.item, part.item);
  copy(chunk.event_type, part.event_type);
  copy(chunk.time_gap, part.time_gap);
  copy(chunk.target, part.target);
  copy(chunk.reset, part.reset);
  part.events = static_cast<std::size_t>(std::count_if(
      part.target.begin(), part.target.end(), [](std::int64_t target) { return target >= 0; }));
  return part;
}

Streams::Streams(std::span<const std::span<const Event>> histories, std::size_t batch,
                 std::size_t bptt, std::uint64_t seed, std::uint64_t epoch)
    : batch_(batch) {
  for (const auto history : histories)
    if (history.size() >= 2) order_.push_back(history);
  const std::uint64_t stream_seed = mix(seed, epoch);
  for (std::size_t i = order_.size(); i > 1; --i)
    std::swap(order_[i - 1], order_[static_cast<std::size_t>(mix(stream_seed, i) % i)]);
  starts_.reserve(order_.size() + 1);
  starts_.push_back(0);
  for (const auto history : order_) starts_.push_back(starts_.back() + history.size() - 1);
  length_ = (events() + batch_ - 1) / batch_;
  chunks_ = static_cast<std::size_t>((length_ + bptt - 1) / bptt);
}

Chunk Streams::chunk(std::size_t index) const {
  // Chunks of nearly equal length, so that the last step of an epoch is not a noisy small one.
  const std::uint64_t first = length_ * index / chunks_;
  const std::uint64_t last = length_ * (index + 1) / chunks_;
  Chunk chunk;
  chunk.batch = batch_;
  chunk.steps = static_cast<std::size_t>(last - first);
  const std::size_t cells = chunk.batch * chunk.steps;
  chunk.item.assign(cells, 0);
  chunk.event_type.assign(cells, 0);
  chunk.time_gap.assign(cells, 0);
  chunk.target.assign(cells, -1);
  chunk.reset.assign(cells, 0);
  for (std::size_t b = 0; b < batch_; ++b) {
    const std::uint64_t stream_begin = events() * b / batch_;
    const std::uint64_t stream_end = events() * (b + 1) / batch_;
    const std::uint64_t begin = stream_begin + first;
    const std::uint64_t end = std::min(stream_begin + last, stream_end);
    if (begin >= end) continue;
    auto user = static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) -
                                         starts_.begin() - 1);
    for (std::uint64_t position = begin; position < end; ++position) {
      if (position == starts_[user + 1]) ++user;
      const auto at = static_cast<std::size_t>(position - starts_[user]);
      const std::size_t cell = static_cast<std::size_t>(position - begin) * batch_ + b;
      const Event& event = order_[user][at];
      const auto before = at > 0 ? std::optional(order_[user][at - 1].timestamp) : std::nullopt;
      chunk.item[cell] = event.item;
      chunk.event_type[cell] = event.event_type;
      chunk.time_gap[cell] = time_gap_bucket(before, event.timestamp, time_gap_buckets);
      chunk.target[cell] = order_[user][at + 1].item;
      chunk.reset[cell] = at == 0 || position == stream_begin ? 1 : 0;
      ++chunk.events;
    }
  }
  return chunk;
}

}  // namespace personalize::tools
