// How close the header's results are to another implementation's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "personalize_runtime.hpp"

namespace parity {

inline constexpr double tolerance = 1e-4;
inline constexpr double tie = 1e-5;  // relative distance below which rounding may swap two scores
inline constexpr std::size_t top_count = 20;

// |a - b| / |b|, Euclidean.
inline double norm_error(std::span<const float> a, std::span<const float> b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

// The largest |a_i - b_i| / |b_i|. An element far below b's root mean square is a difference of
// larger numbers and carries their rounding: the denominator is at least a tenth of that mean.
inline double element_error(std::span<const float> a, std::span<const float> b) {
  double squares = 0;
  for (const float value : b) squares += std::pow(static_cast<double>(value), 2);
  const double floor = 0.1 * std::sqrt(squares / static_cast<double>(b.size()));
  double largest = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double expected = static_cast<double>(b[i]);
    const double error = std::abs(static_cast<double>(a[i]) - expected);
    // The negation lets a NaN count as an error.
    if (!(error <= largest * std::max(std::abs(expected), floor)))
      largest = error / std::max(std::abs(expected), floor);
  }
  return largest;
}

enum class Order { same, swapped_in_ties, different };

// Compares `top`, best first, with the items in the order of the reference's `scores`, of which
// `reference` holds the first ones, more than `top` has. Items may change places only within a run
// of the reference in which each score is within `tie` of the next.
inline Order compare_order(std::span<const personalize::ScoredItem> top,
                           std::span<const std::int64_t> reference, std::span<const float> scores) {
  Order order = Order::same;
  std::size_t begin = 0;
  while (begin < top.size()) {
    const auto score = [&](std::size_t rank) {
      return static_cast<double>(scores[static_cast<std::size_t>(reference[rank])]);
    };
    std::size_t end = begin + 1;
    while (end < reference.size() && score(end - 1) - score(end) <= tie * std::abs(score(end - 1)))
      ++end;
    const auto run = reference.subspan(begin, end - begin);
    const std::size_t last = std::min(end, top.size());
    for (std::size_t rank = begin; rank < last; ++rank) {
      const std::int64_t item = top[rank].item;
      if (item == reference[rank]) continue;
      if (std::find(run.begin(), run.end(), item) == run.end()) return Order::different;
      order = Order::swapped_in_ties;
    }
    for (std::size_t rank = begin + 1; rank < last; ++rank)
      for (std::size_t other = begin; other < rank; ++other)
        if (top[rank].item == top[other].item) return Order::different;
    begin = end;
  }
  return order;
}

// What a set of histories came to. Histories with swaps within ties must be rare.
struct Agreement {
  double hidden_norm = 0, hidden_element = 0, score = 0;
  std::size_t histories = 0, swapped = 0, different = 0;

  void add(std::span<const float> hidden, std::span<const float> expected_hidden,
           std::span<const float> scores, std::span<const float> expected_scores,
           std::span<const personalize::ScoredItem> top, std::span<const std::int64_t> reference) {
    const auto keep_largest = [](double& largest, double error) {
      if (!(error <= largest)) largest = error;
    };
    keep_largest(hidden_norm, norm_error(hidden, expected_hidden));
    keep_largest(hidden_element, element_error(hidden, expected_hidden));
    keep_largest(score, element_error(scores, expected_scores));
    const Order order =
        top.size() == top_count ? compare_order(top, reference, expected_scores) : Order::different;
    ++histories;
    swapped += order == Order::swapped_in_ties ? 1 : 0;
    different += order == Order::different ? 1 : 0;
  }

  bool good() const {
    return hidden_norm <= tolerance && hidden_element <= tolerance && score <= tolerance &&
           different == 0 && swapped * 100 <= histories;
  }
};

}  // namespace parity
