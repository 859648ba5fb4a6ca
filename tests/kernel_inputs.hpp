// Random arrays, queries and panels for the tests of kernels.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "small_model.hpp"

namespace kernel_inputs {

namespace pz = personalize;
using small_model::Random;

// n values, and as many more as kernels may read.
inline std::vector<float> values(Random& random, std::size_t n, float scale = 1.0f) {
  std::vector<float> v(pz::kernels::padded(n) + pz::kernels::lanes);
  for (std::size_t i = 0; i < n; ++i) v[i] = random.normal() * scale;
  return v;
}

// The same in [-most, most]; zero behind the n.
inline std::vector<std::int8_t> integers(Random& random, std::size_t n, int most) {
  std::vector<std::int8_t> v(pz::kernels::padded(n) + pz::kernels::lanes);
  for (std::size_t i = 0; i < n; ++i)
    v[i] = static_cast<std::int8_t>(
        static_cast<int>(random.below(static_cast<std::uint32_t>(2 * most + 1))) - most);
  return v;
}

inline void close(std::span<const float> got, std::span<const float> want, std::size_t n,
                  float bound) {
  for (std::size_t i = 0; i < n; ++i) {
    CAPTURE(i);
    REQUIRE(std::abs(got[i] - want[i]) <= bound * std::max(1.0f, std::abs(want[i])));
  }
}

// Where some of the rows that lie one behind the other begin.
template <class Element>
std::vector<const Element*> rows_of(const std::vector<Element>& all, std::size_t columns,
                                    std::span<const std::uint32_t> which) {
  std::vector<const Element*> rows;
  for (const std::uint32_t row : which) rows.push_back(all.data() + row * columns);
  return rows;
}

struct Query {
  explicit Query(std::vector<std::int8_t> all) : values(std::move(all)) {
    for (const std::int8_t v : values) sum += v;
  }
  Query(Random& random, std::size_t d, int most) : Query(integers(random, d, most)) {}

  std::vector<std::int8_t> values;
  std::int32_t sum = 0;
};

// What a scan found for a query: rows, and with rows of 8 bits the bounds of their scores.
struct Found {
  std::vector<std::uint32_t> rows;
  std::vector<float> lower, upper;
  bool operator==(const Found&) const = default;
};

// Rows of 8 bits with their scales and biases as floats, or of 4 bits with bfloat16.
template <int Bits>
struct Panels {
  static constexpr int largest = Bits == 8 ? 127 : 7;
  using Real = std::conditional_t<Bits == 8, float, std::uint16_t>;

  Panels(Random& random, std::size_t d, std::size_t n)
      : columns(d), count(n), bytes(n * pz::kernels::panel_bytes<Bits>(d)) {
    for (std::size_t r = 0; r < all(); ++r) {
      rows.push_back(integers(random, d, largest));
      pz::kernels::put_in_panel<Bits>(
          bytes.data() + r / pz::kernels::panel_rows * pz::kernels::panel_bytes<Bits>(d),
          r % pz::kernels::panel_rows, rows.back().data(), d);
      scales.push_back(real(random.normal() * 0.01f));
      biases.push_back(real(random.normal()));
    }
  }

  static Real real(float v) {
    if constexpr (Bits == 8)
      return v;
    else
      return static_cast<std::uint16_t>(personalize::detail::bit_cast<std::uint32_t>(v) >> 16);
  }
  static float wide(Real v) {
    if constexpr (Bits == 8)
      return v;
    else
      return personalize::detail::bit_cast<float>(std::uint32_t{v} << 16);
  }

  std::size_t all() const { return count * pz::kernels::panel_rows; }
  pz::kernels::PanelRows<Real> view() const {
    return {bytes.data(), scales.data(), biases.data(), columns};
  }
  static pz::kernels::PanelQuery scanned(const Query& query) {
    return {query.values.data(), (Bits == 8 ? -128 : -8) * query.sum, 0.02f};
  }

  // What each query finds in the panels from `first` on, all in one scan; the rows go by numbers
  // from `first_row` on. ahead: with the same panels for those that come next.
  std::vector<Found> scan(const pz::kernels::Table& table, std::span<const Query> queries,
                          float limit, float margin = 0, std::size_t first = 0, bool ahead = false,
                          std::size_t first_row = 0) const {
    std::vector<Found> found(
        queries.size(),
        {std::vector<std::uint32_t>(all()), std::vector<float>(all()), std::vector<float>(all())});
    std::vector<pz::kernels::PanelQuery> scans;
    std::vector<pz::kernels::PanelQuery*> pointers;
    for (const Query& query : queries) scans.push_back(scanned(query));
    for (std::size_t q = 0; q < queries.size(); ++q) {
      scans[q].limit = limit;
      scans[q].margin = margin;
      scans[q].rows = found[q].rows.data();
      scans[q].lower = found[q].lower.data();
      scans[q].upper = found[q].upper.data();
      pointers.push_back(&scans[q]);
    }
    auto seen = view();
    seen.first_row = first_row;
    scan_of(table)(seen, first, count, ahead ? &seen : nullptr, pointers.data(), pointers.size());
    for (std::size_t q = 0; q < queries.size(); ++q) {
      found[q].rows.resize(scans[q].found);
      found[q].lower.resize(Bits == 8 ? scans[q].found : 0);
      found[q].upper.resize(found[q].lower.size());
    }
    return found;
  }

  std::size_t columns, count;
  std::vector<std::uint8_t> bytes;
  std::vector<std::vector<std::int8_t>> rows;
  std::vector<Real> scales, biases;

 private:
  static auto scan_of(const pz::kernels::Table& table) {
    if constexpr (Bits == 8)
      return table.scan_8bit;
    else
      return table.scan_4bit;
  }
};

}  // namespace kernel_inputs
