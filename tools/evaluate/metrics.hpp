// Ranking metrics with binary relevance, in Amazon Personalize's definitions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace personalize::tools {

// One user's figures for one slate. Each lies in [0, 1].
struct SlateMetrics {
  static constexpr std::array<std::size_t, 3> cutoffs{5, 10, 25};
  std::array<double, 3> ndcg{};       // DCG / ideal DCG, gain 1 / log2(rank + 1), rank from 1
  std::array<double, 3> precision{};  // relevant items among the first K, divided by K
  std::array<double, 3> recall{};     // relevant items among the first K, divided by all relevant
  double reciprocal_rank = 0;         // 1 / rank of the first relevant item within 25, else 0

  SlateMetrics& operator+=(const SlateMetrics& other);
  SlateMetrics operator/(double divisor) const;
};

// slate: best first, distinct; relevant: distinct, at least one. Cost: slate x relevant.
SlateMetrics slate_metrics(std::span<const std::string_view> slate,
                           std::span<const std::string_view> relevant);

}  // namespace personalize::tools
