// What the programs of this folder share: models of any size, quantiles, times, memory, and a line
// of JSON a figure.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "../personalize_runtime.hpp"

namespace pz = personalize;

inline double quantile(std::vector<double> values, double part) {
  const auto at = static_cast<std::ptrdiff_t>(part * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<std::size_t>(at)];
}

using Clock = std::chrono::steady_clock;

inline double since(Clock::time_point begin) {  // microseconds
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

inline void line(const std::string& name, const std::string& data, double value, const char* unit,
                 const std::string& peer = {}, double peer_value = 0) {
  std::printf(R"({"name": "%s", "data": "%s", "value": %.4g, "unit": "%s")", name.c_str(),
              data.c_str(), value, unit);
  if (!peer.empty())
    std::printf(R"(, "peer": "%s", "peer_value": %.4g, "ratio": %.3g)", peer.c_str(), peer_value,
                value / peer_value);
  std::printf("}\n");
  std::fflush(stdout);
}

inline double mebibytes(double bytes) { return bytes / (1 << 20); }

// Bytes that a line of /proc/self/status tells; 0 where there is none.
inline double status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string text; std::getline(status, text);)
    if (text.starts_with(field + ":")) return std::stod(text.substr(field.size() + 1)) * 1024;
  return 0;
}
inline double resident() { return status_bytes("VmRSS"); }

// Bytes that the program holds: what the allocator has given out of its heaps, and what is mapped
// beside them.
inline double bytes_in_use() {
#if defined(__GLIBC__)
  const auto info = ::mallinfo2();
  return static_cast<double>(info.uordblks) + status_bytes("VmData") -
         static_cast<double>(info.arena);
#else
  return 0;
#endif
}

inline pz::Matrix random_matrix(std::size_t rows, std::size_t columns, std::mt19937& random,
                                float spread = 0) {
  pz::Matrix m = pz::Matrix::zeros(rows, columns);
  std::normal_distribution<float> normal;
  for (std::size_t r = 0; r < rows; ++r) {
    const float length = std::exp(spread * normal(random)) / std::sqrt(static_cast<float>(columns));
    for (std::size_t c = 0; c < columns; ++c) m.f32()[r * columns + c] = normal(random) * length;
  }
  return m;
}

inline pz::ModelParts parts_of(std::size_t items, std::size_t d, pz::ElementType type,
                               float spread = 0) {
  using Kind = pz::EncoderOp::Kind;
  std::mt19937 random(1);
  pz::ModelParts parts;
  parts.metadata = "{}";
  for (std::size_t i = 0; i < items; ++i)
    if (!parts.item_ids.add("i" + std::to_string(i))) std::abort();
  const auto stored = [type](pz::Matrix m) {
    return type == pz::ElementType::i8 && m.rows() > 1 ? m.quantised() : m;
  };
  parts.item_vectors = stored(random_matrix(items, d, random, spread));
  parts.biases.resize(items);
  // Well known, and too old to be explored.
  parts.statistics.assign(items, {100, 1'600'000'000, 1'690'000'000, 1'600'000'000});
  parts.operations = {{Kind::embed_sum}, {Kind::gru}};
  for (const auto& [rows, columns] :
       {std::pair{3 * d, d}, {3 * d, d}, {std::size_t{1}, 3 * d}, {1, 3 * d}})
    parts.weights.push_back(stored(random_matrix(rows, columns, random)));
  return parts;
}
