#include "evaluate/metrics.hpp"

#include <algorithm>
#include <cmath>

namespace personalize::tools {

SlateMetrics& SlateMetrics::operator+=(const SlateMetrics& other) {
  for (std::size_t c = 0; c < cutoffs.size(); ++c) {
    ndcg[c] += other.ndcg[c];
    precision[c] += other.precision[c];
    recall[c] += other.recall[c];
  }
  reciprocal_rank += other.reciprocal_rank;
  return *this;
}

SlateMetrics SlateMetrics::operator/(double divisor) const {
  SlateMetrics result = *this;
  for (std::size_t c = 0; c < cutoffs.size(); ++c) {
    result.ndcg[c] /= divisor;
    result.precision[c] /= divisor;
    result.recall[c] /= divisor;
  }
  result.reciprocal_rank /= divisor;
  return result;
}

SlateMetrics slate_metrics(std::span<const std::string_view> slate,
                           std::span<const std::string_view> relevant) {
  const auto gain = [](std::size_t index) {
    return 1.0 / std::log2(static_cast<double>(index) + 2.0);
  };
  SlateMetrics metrics;
  for (std::size_t c = 0; c < SlateMetrics::cutoffs.size(); ++c) {
    const std::size_t cutoff = SlateMetrics::cutoffs[c];
    double dcg = 0, ideal = 0, hits = 0;
    for (std::size_t i = 0; i < std::min(cutoff, slate.size()); ++i) {
      if (std::find(relevant.begin(), relevant.end(), slate[i]) == relevant.end()) continue;
      dcg += gain(i);
      hits += 1;
      if (metrics.reciprocal_rank == 0)
        metrics.reciprocal_rank = 1.0 / (static_cast<double>(i) + 1.0);
    }
    for (std::size_t i = 0; i < std::min(cutoff, relevant.size()); ++i) ideal += gain(i);
    metrics.ndcg[c] = dcg / ideal;
    metrics.precision[c] = hits / static_cast<double>(cutoff);
    metrics.recall[c] = hits / static_cast<double>(relevant.size());
  }
  return metrics;
}

}  // namespace personalize::tools
