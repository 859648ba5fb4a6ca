// Means and how far they are to be trusted.
#pragma once

#include <cmath>
#include <vector>

namespace personalize::tools {

inline constexpr double normal_quantile = 1.959964;  // 97.5 % of the standard normal distribution

// values: not empty.
inline double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

// Of their mean; 0 of a single value.
inline double standard_error(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = mean_of(values);
  const auto n = static_cast<double>(values.size());
  double square = 0;
  for (const double v : values) square += (v - mean) * (v - mean);
  return std::sqrt(square / (n - 1) / n);
}

}  // namespace personalize::tools
