// The SIMD form of each kernel against the scalar reference, over sizes that do not fit the width.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

namespace {

using Fast = pz::kernels::Kernels<pz::kernels::Default>;
using Reference = pz::kernels::Kernels<pz::kernels::Scalar>;
using small_model::Random;

std::vector<float> values(Random& random, std::size_t n, float scale = 1.0f) {
  std::vector<float> v(n + pz::kernels::lanes);
  for (std::size_t i = 0; i < n; ++i) v[i] = random.normal() * scale;
  return v;
}

void close(const std::vector<float>& a, const std::vector<float>& b, std::size_t n, float bound) {
  for (std::size_t i = 0; i < n; ++i) {
    CAPTURE(i);
    REQUIRE(std::abs(a[i] - b[i]) <= bound * std::max(1.0f, std::abs(b[i])));
  }
}

}  // namespace

TEST_CASE("row scores") {
  Random random{1};
  for (const std::size_t d : {1u, 3u, 4u, 15u, 16u, 17u, 64u, 100u, 149u}) {
    for (const std::size_t rows : {1u, 2u, 5u, 64u}) {
      CAPTURE(d);
      CAPTURE(rows);
      std::vector<float> query(pz::kernels::padded(d));
      for (std::size_t c = 0; c < d; ++c) query[c] = random.normal();
      std::vector<std::int8_t> i8(rows * d + pz::kernels::lanes);
      for (auto& v : i8) v = static_cast<std::int8_t>(random.below(255) - 127);
      const auto f32 = values(random, rows * d);
      auto scales = values(random, rows, 0.01f);
      const auto biases = values(random, rows);
      std::vector<float> fast(rows), reference(rows);
      Fast::score_rows(i8.data(), d, rows, query.data(), scales.data(), biases.data(), fast.data());
      Reference::score_rows(i8.data(), d, rows, query.data(), scales.data(), biases.data(),
                            reference.data());
      close(fast, reference, rows, 1e-4f);
      Fast::score_rows(f32.data(), d, rows, query.data(), nullptr, biases.data(), fast.data());
      Reference::score_rows(f32.data(), d, rows, query.data(), nullptr, biases.data(),
                            reference.data());
      close(fast, reference, rows, 1e-5f);
    }
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

TEST_CASE("activations over their whole range") {
  constexpr std::size_t n = 4001;
  std::vector<float> x(n + pz::kernels::lanes);
  for (std::size_t i = 0; i < n; ++i) x[i] = (static_cast<float>(i) - 2000) * 0.05f;
  const auto compare = [&](auto fast_form, auto reference_form, float bound) {
    auto fast = x, reference = x;
    fast_form(n, fast.data());
    reference_form(n, reference.data());
    close(fast, reference, n, bound);
  };
  compare(&Fast::sigmoid, &Reference::sigmoid, 1e-6f);
  compare(&Fast::tanh, &Reference::tanh, 1e-6f);
  compare(&Fast::relu, &Reference::relu, 0.0f);
  compare(&Fast::gelu, &Reference::gelu, 1e-6f);
}
