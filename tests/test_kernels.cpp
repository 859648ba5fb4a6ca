// The SIMD form of each kernel against the scalar reference, over sizes that do not fit the width.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernel_inputs.hpp"

namespace pz = personalize;

namespace {

using Fast = pz::kernels::Kernels<pz::kernels::Default>;
using Reference = pz::kernels::Kernels<pz::kernels::Scalar>;
using kernel_inputs::close;
using kernel_inputs::Panels;
using kernel_inputs::Query;
using kernel_inputs::Random;
using kernel_inputs::rows_of;
using kernel_inputs::values;

}  // namespace

template <int Bits>
void scan_is_exact() {
  const pz::kernels::Table& table = pz::kernels::table_of<pz::kernels::Default>;
  const int limit = Bits == 8 ? table.query_limit : 127;
  Random random{1};
  for (const std::size_t d : {1u, 3u, 4u, 5u, 15u, 16u, 17u, 64u, 100u, 149u, 1024u}) {
    for (const std::size_t count : {1u, 3u, 4u, 9u, 37u}) {
      CAPTURE(d);
      CAPTURE(count);
      const Panels<Bits> panels{random, d, count};
      std::vector<std::int8_t> integers = kernel_inputs::integers(random, d, limit);
      // The extremes of every product, for one of the widths.
      if (d == 64)
        for (std::size_t c = 0; c < d; ++c)
          integers[c] = static_cast<std::int8_t>(c % 3 == 0 ? -limit : limit);
      const Query query{integers}, zero{std::vector<std::int8_t>(integers.size())};
      const std::size_t all = panels.all();
      std::vector<float> fast(all), want(all);
      for (std::size_t r = 0; r < all; ++r) {
        std::int64_t dot = 0;
        for (std::size_t c = 0; c < d; ++c) dot += panels.rows[r][c] * query.values[c];
        want[r] =
            static_cast<float>(static_cast<double>(dot) * 0.02f * panels.wide(panels.scales[r]) +
                               panels.wide(panels.biases[r]));
      }
      if constexpr (Bits == 8) {
        Fast::matrix_vector_i8(panels.view(), count, panels.scanned(query), fast.data());
        close(fast, want, all, 2e-6f);
      }
      const float margin = 0.25f;
      for (const float at : {-1e30f, -0.5f, 0.0f, 0.7f, 1e30f})
        for (const std::size_t first : {std::size_t{0}, count / 2}) {
          const auto found = panels.scan(table, {&query, 1}, at, margin, first)[0];
          // As the second of two queries.
          REQUIRE(panels.scan(table, std::vector{zero, query}, at, margin, first)[1] == found);
          std::size_t next = 0;
          for (std::size_t r = first * pz::kernels::panel_rows; r < all; ++r) {
            const bool reached = next < found.rows.size() && found.rows[next] == r;
            // Rounding may decide where a score lies on the limit.
            if (std::abs(want[r] - at) > 1e-5f * std::max(1.0f, std::abs(want[r])))
              REQUIRE(reached == (want[r] >= at));
            if (Bits == 8 && reached) {
              REQUIRE(found.lower[next] == fast[r] - margin);
              REQUIRE(found.upper[next] == fast[r] + margin);
            }
            next += reached;
          }
          REQUIRE(next == found.rows.size());
        }
      auto nothing = panels;
      for (auto& b : nothing.biases) b = panels.real(std::numeric_limits<float>::quiet_NaN());
      constexpr float any = -std::numeric_limits<float>::infinity();
      REQUIRE(nothing.scan(table, {&query, 1}, any)[0].rows.empty());
      REQUIRE(nothing.scan(table, std::vector{zero, query}, any)[1].rows.empty());
    }
  }
}

TEST_CASE("products with rows of 8 bits are exact") { scan_is_exact<8>(); }
TEST_CASE("products with rows of 4 bits are exact") { scan_is_exact<4>(); }

TEST_CASE("products of a row with a query are exact") {
  Random random{12};
  for (const std::size_t d : {1u, 15u, 16u, 17u, 63u, 64u, 65u, 149u, 1000u}) {
    std::vector<std::int8_t> rows(9 * d + pz::kernels::lanes), query(pz::kernels::padded(d));
    std::int32_t sum = 0;
    for (auto& v : rows) v = static_cast<std::int8_t>(static_cast<int>(random.below(255)) - 127);
    for (std::size_t c = 0; c < d; ++c) {
      query[c] = static_cast<std::int8_t>(static_cast<int>(random.below(255)) - 127);
      if (d == 64) query[c] = rows[4 * d + c] = -127;
      sum += query[c];
    }
    const std::vector<std::uint32_t> items{8, 0, 4, 4, 7};
    std::vector<std::int32_t> dots(items.size());
    Fast::row_dots(rows_of(rows, d, items).data(), d, query.data(), -128 * sum, dots.data(),
                   items.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
      std::int32_t direct = 0;
      for (std::size_t c = 0; c < d; ++c) direct += rows[items[i] * d + c] * query[c];
      REQUIRE(dots[i] == direct);
    }
  }
}

TEST_CASE("what at least k values reach, and few more") {
  Random random{13};
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  for (const std::size_t size : {16u, 160u, 992u})
    for (const std::size_t k : {1u, 3u, 16u, 100u, 600u}) {
      if (k > size) continue;
      auto x = values(random, size);
      x.resize(size);
      if (k < size) x[size / 2] = nothing;
      for (const float low : {nothing, -3.0f}) {
        const auto reach = [&](float limit) {
          return static_cast<std::size_t>(
              std::count_if(x.begin(), x.end(), [&](float v) { return v >= limit; }));
        };
        if (reach(low) < k) continue;
        for (const float found : {Fast::kth_largest(size, x.data(), k, low),
                                  Reference::kth_largest(size, x.data(), k, low)}) {
          CHECK(found >= low);
          CHECK(reach(found) >= k);
          CHECK(reach(found) <= k + k / 16 + 1);
        }
      }
      std::fill(x.begin(), x.end(), 2.0f);
      CHECK(Fast::kth_largest(size, x.data(), k, nothing) == 2.0f);
    }
}

TEST_CASE("the products that define scores have the same bits everywhere") {
  Random random{7};
  const std::vector<std::uint32_t> items{3, 0, 6, 6, 1, 2, 5};
  for (const std::size_t d : {1u, 7u, 8u, 45u, 64u, 149u, 1000u}) {
    std::vector<double> query(pz::kernels::padded(d));
    for (std::size_t c = 0; c < d; ++c) query[c] = static_cast<double>(random.normal() * 3);
    std::vector<std::int8_t> i8(9 * d + pz::kernels::lanes);
    for (auto& v : i8) v = static_cast<std::int8_t>(static_cast<int>(random.below(255)) - 127);
    const auto f32 = values(random, 9 * d, 1e3f);
    const auto i8_rows = rows_of(i8, d, items);
    const auto f32_rows = rows_of(f32, d, items);
    std::vector<double> fast(items.size()), reference(items.size());
    Fast::dots_f32(f32_rows.data(), d, query.data(), fast.data(), items.size());
    Reference::dots_f32(f32_rows.data(), d, query.data(), reference.data(), items.size());
    REQUIRE(fast == reference);
    Fast::dots_i8(i8_rows.data(), d, query.data(), fast.data(), items.size());
    Reference::dots_i8(i8_rows.data(), d, query.data(), reference.data(), items.size());
    REQUIRE(fast == reference);
    for (std::size_t i = 0; i < items.size(); ++i) {
      double direct = 0;
      for (std::size_t c = 0; c < d; ++c) direct += i8[items[i] * d + c] * query[c];
      CHECK(fast[i] == doctest::Approx(direct).epsilon(1e-9));
    }
  }
}

TEST_CASE("quantisation is within half a step and remembers its sum") {
  Random random{8};
  for (const std::size_t n : {1u, 5u, 16u, 100u, 149u}) {
    auto x = values(random, n, 2.0f);
    x.resize(pz::kernels::padded(n) + pz::kernels::lanes);
    std::vector<std::int8_t> q(pz::kernels::padded(n));
    std::int32_t sum = 0, direct = 0;
    const float step = Fast::quantise(n, x.data(), 100, q.data(), sum);
    for (std::size_t j = 0; j < n; ++j) {
      REQUIRE(std::abs(static_cast<float>(q[j]) * step - x[j]) <= 0.5001f * step);
      REQUIRE(std::abs(q[j]) <= 100);
      direct += q[j];
    }
    CHECK(sum == direct);
    std::fill(x.begin(), x.end(), 0.0f);
    CHECK(Fast::quantise(n, x.data(), 100, q.data(), sum) == 0.0f);
    CHECK(sum == 0);
  }
}

TEST_CASE("matrix times vector") {
  Random random{2};
  for (const std::size_t inputs : {1u, 7u, 16u, 149u})
    for (const std::size_t blocks : {1u, 2u, 3u, 9u, 24u}) {
      const auto packed = values(random, inputs * blocks * pz::kernels::lanes);
      const auto bias = values(random, blocks * pz::kernels::lanes);
      const auto x = values(random, inputs);
      std::vector<float> fast(bias.size()), reference(bias.size());
      Fast::matrix_vector(packed.data(), bias.data(), inputs, blocks, x.data(), fast.data());
      Reference::matrix_vector(packed.data(), bias.data(), inputs, blocks, x.data(),
                               reference.data());
      close(fast, reference, blocks * pz::kernels::lanes, 2e-5f);
    }
}

TEST_CASE("gates") {
  Random random{3};
  for (const std::size_t size : {1u, 8u, 50u, 128u}) {
    const std::size_t stride = pz::kernels::padded(size);
    for (const float scale : {0.1f, 3.0f, 60.0f}) {
      const auto input = values(random, 3 * stride, scale);
      const auto recurrent = values(random, 3 * stride, scale);
      auto fast = values(random, stride);
      auto reference = fast;
      Fast::gru_gates(size, stride, input.data(), recurrent.data(), fast.data());
      Reference::gru_gates(size, stride, input.data(), recurrent.data(), reference.data());
      close(fast, reference, size, 2e-6f);
    }
  }
}

TEST_CASE("layer norm") {
  Random random{4};
  for (const std::size_t size : {2u, 5u, 16u, 31u, 149u}) {
    auto fast = values(random, size, 3.0f);
    auto reference = fast;
    const auto weight = values(random, size), bias = values(random, size);
    Fast::layer_norm(size, 1e-5f, weight.data(), bias.data(), fast.data());
    Reference::layer_norm(size, 1e-5f, weight.data(), bias.data(), reference.data());
    close(fast, reference, size, 1e-5f);
  }
}

// Calls of `form` on every 509th finite float, of both signs; error(x, result) must not exceed 1.
template <class Form, class Error>
void sweep(Form form, Error error) {
  constexpr std::size_t together = 4096;
  std::vector<float> x, y;
  double worst = 0;
  float at = 0;
  const auto run = [&] {
    y = x;
    y.resize(pz::kernels::padded(x.size()) + pz::kernels::lanes);
    form(x.size(), y.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double e = error(static_cast<double>(x[i]), static_cast<double>(y[i]));
      if (!(e <= worst)) worst = e, at = x[i];
    }
    x.clear();
  };
  constexpr std::uint32_t infinity = 0x7f800000;
  for (std::uint32_t bits = 0; bits < infinity; bits += 509)
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      x.push_back(pz::detail::bit_cast<float>(bits | sign));
      if (x.size() == together) run();
    }
  x.push_back(std::numeric_limits<float>::max());
  x.push_back(std::numeric_limits<float>::lowest());
  run();
  CAPTURE(at);
  CHECK(worst <= 1);
}

TEST_CASE("activations keep their stated bounds over all floats") {
  const auto all = [](auto kernels) {
    using K = decltype(kernels);
    // Below the smallest normal float, results may lack digits.
    constexpr double tiny = 1e-38;
    sweep(&K::tanh, [](double x, double y) {
      const double want = std::tanh(x);
      return std::abs(y - want) / (5e-7 * std::abs(want) + tiny);
    });
    sweep(&K::sigmoid, [](double x, double y) {
      if (y < 0 || y > 1) return 2.0;
      return std::abs(y - 1 / (1 + std::exp(-x))) / 3e-7;
    });
    sweep(&K::gelu, [](double x, double y) {
      const double want = x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
      return std::abs(y - want) / (x < 2 ? 1e-6 : 5e-7 * want);
    });
    sweep(&K::relu, [](double x, double y) { return y == std::max(x, 0.0) ? 0.0 : 2.0; });
    std::vector<float> x(pz::kernels::lanes, std::numeric_limits<float>::quiet_NaN());
    for (const auto form : {&K::tanh, &K::sigmoid, &K::gelu}) {
      auto y = x;
      form(y.size(), y.data());
      CHECK(std::isnan(y[0]));
    }
  };
  all(Fast{});
  all(Reference{});
}
