// Packs users' histories into parallel streams for truncated back-propagation through time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "data/dataset.hpp"

namespace personalize::tools {

inline constexpr std::uint32_t time_gap_buckets = 32;

// A block of `steps` consecutive steps of `batch` streams; the arrays are time-major: [step * batch
// + stream].
struct Chunk {
  std::size_t batch = 0, steps = 0, events = 0;  // events: cells with a target
  std::vector<std::int64_t> item, event_type, time_gap;
  std::vector<std::int64_t> target;  // the next item; -1 in an empty cell
  std::vector<std::uint8_t> reset;   // 1 where a history (or its cut end) begins
};

// The streams [first, last) of a chunk, as a chunk.
Chunk slice(const Chunk& chunk, std::size_t first, std::size_t last);

// All histories of an epoch, shuffled, laid end to end and cut into `batch` streams of equal length
// (at most batch - 1 cells of the whole epoch stay empty). A history cut by a stream's edge goes on
// in the next stream from a zero state: that costs at most batch - 1 histories their early context,
// other ones in each epoch.
class Streams {
 public:
  // histories must outlive the streams; those with fewer than 2 events predict nothing and are
  // skipped.
  Streams(std::span<const std::span<const Event>> histories, std::size_t batch, std::size_t bptt,
          std::uint64_t seed, std::uint64_t epoch);
  std::size_t chunks() const { return chunks_; }
  std::uint64_t events() const { return starts_.back(); }
  Chunk chunk(std::size_t index) const;

 private:
  std::vector<std::span<const Event>> order_;
  std::vector<std::uint64_t> starts_;  // of each history's predictions in the laid-out epoch
  std::size_t batch_, chunks_;
  std::uint64_t length_;  // steps of the longest stream
};

}  // namespace personalize::tools
