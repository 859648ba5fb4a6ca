// The encoder's step against a direct computation in double precision.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

namespace {

using Vector = std::vector<double>;

// Follows the program as the comments on EncoderOp read, without packing, padding or SIMD.
class DirectEncoder {
 public:
  explicit DirectEncoder(const pz::ModelParts& parts) : parts_(parts) {}

  Vector step(const pz::EncoderInput& input) {
    Vector x;
    std::size_t next = 0, gru = 0;
    const auto& w = parts_.weights;
    for (const auto& op : parts_.operations) {
      using Kind = pz::EncoderOp::Kind;
      switch (op.kind) {
        case Kind::embed_sum:
          x.resize(parts_.item_vectors.columns());
          for (std::size_t c = 0; c < x.size(); ++c) {
            x[c] = parts_.item_vectors.at(input.item, c);
            if (input.event_type < parts_.event_type_embedding.rows())
              x[c] += parts_.event_type_embedding.at(input.event_type, c);
            if (input.time_gap < parts_.time_gap_embedding.rows())
              x[c] += parts_.time_gap_embedding.at(input.time_gap, c);
          }
          break;
        case Kind::linear:
          x = affine(w[next], w[next + 1], x);
          next += 2;
          break;
        case Kind::gru: {
          if (hidden_.size() <= gru) hidden_.emplace_back(w[next].rows() / 3, 0.0);
          Vector& h = hidden_[gru++];
          const Vector i = affine(w[next], w[next + 2], x), r = affine(w[next + 1], w[next + 3], h);
          const std::size_t n = h.size();
          for (std::size_t j = 0; j < n; ++j) {
            const double reset = 1 / (1 + std::exp(-(i[j] + r[j])));
            const double update = 1 / (1 + std::exp(-(i[n + j] + r[n + j])));
            const double candidate = std::tanh(i[2 * n + j] + reset * r[2 * n + j]);
            h[j] = (1 - update) * candidate + update * h[j];
          }
          x = h;
          next += 4;
          break;
        }
        case Kind::layer_norm: {
          double mean = 0, variance = 0;
          for (const double v : x) mean += v / static_cast<double>(x.size());
          for (const double v : x)
            variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
          for (std::size_t c = 0; c < x.size(); ++c)
            x[c] = (x[c] - mean) / std::sqrt(variance + 1e-5) * w[next].at(0, c) +
                   w[next + 1].at(0, c);
          next += 2;
          break;
        }
        case Kind::activation:
          for (double& v : x) v = activate(static_cast<pz::Activation>(op.argument), v);
          break;
        case Kind::save:
          saved_[op.argument] = x;
          break;
        case Kind::add:
          for (std::size_t c = 0; c < x.size(); ++c) x[c] += saved_[op.argument][c];
          break;
        default:
          FAIL("an operation that this test does not know");
      }
    }
    return x;
  }

 private:
  static Vector affine(const pz::Matrix& w, const pz::Matrix& b, const Vector& x) {
    Vector y(w.rows());
    for (std::size_t r = 0; r < w.rows(); ++r) {
      y[r] = b.at(0, r);
      for (std::size_t c = 0; c < w.columns(); ++c) y[r] += static_cast<double>(w.at(r, c)) * x[c];
    }
    return y;
  }
  static double activate(pz::Activation a, double v) {
    switch (a) {
      case pz::Activation::sigmoid:
        return 1 / (1 + std::exp(-v));
      case pz::Activation::tanh:
        return std::tanh(v);
      case pz::Activation::relu:
        return v > 0 ? v : 0;
      case pz::Activation::gelu:
        return v / 2 * (1 + std::erf(v / std::sqrt(2.0)));
    }
    return v;
  }

  const pz::ModelParts& parts_;
  std::vector<Vector> hidden_;
  Vector saved_[8];
};

double relative_error(std::span<const float> got, const Vector& want) {
  double difference = 0, norm = 0;
  for (std::size_t c = 0; c < want.size(); ++c) {
    difference += (got[c] - want[c]) * (got[c] - want[c]);
    norm += want[c] * want[c];
  }
  return std::sqrt(difference / norm);
}

double worst_error(const pz::Model& model, std::uint64_t seed,
                   const pz::kernels::Table& table = pz::kernels::chosen()) {
  const pz::Encoder encoder{model, table};
  auto workspace = encoder.make_workspace();
  small_model::Random random{seed};
  double worst = 0;
  for (int history = 0; history < 20; ++history) {
    DirectEncoder direct{model.parts()};
    std::vector<float> state(encoder.state_size());
    for (int event = 0; event < 40; ++event) {
      const pz::EncoderInput input{random.below(static_cast<std::uint32_t>(model.item_count())),
                                   random.below(4) == 0 ? pz::no_event_type : random.below(2),
                                   random.below(12)};
      const Vector want = direct.step(input);
      encoder.step(input, state, workspace);
      worst = std::max(worst, relative_error(encoder.query(state), want));
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("a step is what its program says, for every width") {
  for (const std::size_t d : {1u, 5u, 16u, 20u, 33u, 64u}) {
    for (const std::size_t h : {1u, 7u, 16u, 50u, 128u}) {
      CAPTURE(d);
      CAPTURE(h);
      const small_model::Shape shape{.dimension = d, .hidden = h, .seed = d * 1000 + h};
      // One value only: layer norm of a single value is its bias, whatever rounding did before.
      const auto model = small_model::model(shape);
      CHECK(worst_error(*model, h) < 2e-5);
      CHECK(worst_error(*model, h, pz::kernels::table_of<pz::kernels::Scalar>) < 2e-5);
    }
  }
}

TEST_CASE("an int8 model's step is that of its dequantised weights, with inputs rounded to steps") {
  const auto model = small_model::model({.dimension = 128, .hidden = 128}, true);
  const double steps = pz::kernels::chosen().query_limit;
  // Uniform rounding of inputs of about three standard deviations, through four products.
  CHECK(worst_error(*model, 3) < 6 / steps);
  CHECK(worst_error(*model, 3) > 1e-5);
}

TEST_CASE("int8 weights leave the hidden state of a GRU where f32 weights take it") {
  pz::ModelParts parts = small_model::parts({.items = 300, .dimension = 128, .hidden = 128});
  using Kind = pz::EncoderOp::Kind;
  parts.operations = {{Kind::embed_sum}, {Kind::gru}};
  parts.weights = {parts.weights[2], parts.weights[3], parts.weights[4], parts.weights[5]};
  const auto exact = pz::Model::from_parts(parts);
  const auto int8 = pz::Model::from_parts(small_model::quantised(parts));
  REQUIRE(exact);
  REQUIRE(int8);
  for (const auto* table : {&pz::kernels::table_of<pz::kernels::Scalar>, &pz::kernels::chosen()}) {
    const pz::Encoder rounded{**int8, *table}, plain{**exact, *table};
    std::vector<float> got(rounded.state_size()), want(plain.state_size());
    auto workspace = plain.make_workspace();
    small_model::Random random{4};
    for (int event = 0; event < 50; ++event) {
      const pz::EncoderInput input{random.below(300), random.below(2), random.below(12)};
      rounded.step(input, got, workspace);
      plain.step(input, want, workspace);
    }
    double product = 0, a = 0, b = 0;
    for (std::size_t c = 0; c < 128; ++c) {
      product += static_cast<double>(rounded.query(got)[c]) * plain.query(want)[c];
      a += static_cast<double>(got[c]) * got[c];
      b += static_cast<double>(want[c]) * want[c];
    }
    const double cosine = product / std::sqrt(a * b);
    MESSAGE(std::string(table->name), ": cosine ", cosine);
    // AVX2 without VNNI rounds inputs to 63 steps.
    CHECK(cosine >= (table->query_limit == 127 ? 0.9999 : 0.9997));
  }
}

TEST_CASE("gates that are looked up give the same hidden states") {
  using Kind = pz::EncoderOp::Kind;
  constexpr std::size_t d = 20, h = 24, items = 50;
  for (const auto* table : {&pz::kernels::table_of<pz::kernels::Scalar>, &pz::kernels::chosen()})
    for (const int between : {0, 1, 2})  // nothing, a layer norm, a linear layer
      for (const bool saved : {false, true})
        for (const bool context : {false, true})
          for (const bool int8 : {false, true}) {
            CAPTURE(between);
            CAPTURE(saved);
            CAPTURE(context);
            CAPTURE(int8);
            small_model::Random random{static_cast<std::uint64_t>(between + 1)};
            pz::ModelParts parts = small_model::parts(
                {.items = items, .dimension = d, .event_types = context, .time_gaps = context});
            parts.operations = {{Kind::embed_sum}};
            parts.weights.clear();
            const auto weight = [&](std::size_t rows, std::size_t columns) {
              parts.weights.push_back(small_model::random_matrix(random, rows, columns, 0.3f));
            };
            if (between == 1) {
              parts.operations.push_back({Kind::layer_norm});
              weight(1, d), weight(1, d);
            } else if (between == 2) {
              parts.operations.push_back({Kind::linear});
              weight(h, d), weight(1, h);
            }
            const std::size_t inner = between == 2 ? h : d;
            if (saved) parts.operations.push_back({Kind::save, 2});
            parts.operations.push_back({Kind::gru});
            weight(3 * inner, inner), weight(3 * inner, inner);
            weight(1, 3 * inner), weight(1, 3 * inner);
            if (saved) parts.operations.push_back({Kind::add, 2});
            parts.operations.push_back({Kind::linear});
            weight(d, inner), weight(1, d);
            const auto model = pz::Model::from_parts(int8 ? small_model::quantised(parts) : parts);
            REQUIRE(model);
            const pz::Encoder plain{**model, *table}, quick{**model, *table, true};
            REQUIRE_FALSE(plain.looks_up_gates());
            REQUIRE(quick.looks_up_gates());
            auto workspace = plain.make_workspace();
            std::vector<float> got(quick.state_size()), want(plain.state_size());
            DirectEncoder direct{(*model)->parts()};
            for (int event = 0; event < 40; ++event) {
              const pz::EncoderInput input{
                  random.below(items), random.below(4) == 0 ? pz::no_event_type : random.below(2),
                  random.below(14)};
              quick.step(input, got, workspace);
              plain.step(input, want, workspace);
              const Vector exact = direct.step(input);
              if (int8) {
                // Nearer to the dequantised weights than with inputs rounded to steps.
                REQUIRE(relative_error(quick.query(got), exact) < 4.0 / table->query_limit);
              } else {
                for (std::size_t c = 0; c < got.size(); ++c)
                  REQUIRE(std::abs(got[c] - want[c]) <= 1e-5f);
              }
            }
          }
}

TEST_CASE("the gates of a model that `personalize train` made can be looked up") {
  const auto model = pz::Model::load("golden/trained.pzm");
  REQUIRE(model);
  const pz::Encoder plain{**model}, quick{**model, pz::kernels::chosen(), true};
  REQUIRE(quick.looks_up_gates());
  auto workspace = plain.make_workspace();
  std::vector<float> got(quick.state_size()), want(plain.state_size());
  small_model::Random random{6};
  for (int event = 0; event < 30; ++event) {
    const pz::EncoderInput input{random.below(400), pz::no_event_type, random.below(32)};
    quick.step(input, got, workspace);
    plain.step(input, want, workspace);
  }
  const auto query = plain.query(want);
  CHECK(relative_error(quick.query(got), {query.begin(), query.end()}) <
        4.0 / pz::kernels::chosen().query_limit);
}

TEST_CASE("where a program begins otherwise, nothing is looked up") {
  pz::ModelParts parts = small_model::parts();
  parts.operations.insert(
      parts.operations.begin() + 2,
      {pz::EncoderOp::Kind::activation, static_cast<std::uint32_t>(pz::Activation::tanh)});
  const auto model = pz::Model::from_parts(parts);
  REQUIRE(model);
  const pz::Encoder plain{**model}, quick{**model, pz::kernels::chosen(), true};
  CHECK_FALSE(quick.looks_up_gates());
  auto workspace = plain.make_workspace();
  std::vector<float> got(quick.state_size()), want(plain.state_size());
  plain.step({3, 1, 5}, want, workspace);
  quick.step({3, 1, 5}, got, workspace);
  CHECK(got == want);
}

TEST_CASE("a model without event types and time gaps ignores both") {
  const auto model = small_model::model({.event_types = false, .time_gaps = false});
  const pz::Encoder encoder{*model};
  auto workspace = encoder.make_workspace();
  std::vector<float> a(encoder.state_size()), b(encoder.state_size());
  encoder.step({3, 1, 5}, a, workspace);
  encoder.step({3}, b, workspace);
  CHECK(a == b);
}

TEST_CASE("every activation, two recurrent layers") {
  using Kind = pz::EncoderOp::Kind;
  for (std::uint32_t a = 1; a <= 4; ++a) {
    CAPTURE(a);
    small_model::Random random{a};
    pz::ModelParts parts = small_model::parts({.dimension = 12});
    parts.weights.clear();
    parts.operations = {{Kind::embed_sum}, {Kind::gru},    {Kind::activation, a},
                        {Kind::gru},       {Kind::linear}, {Kind::activation, a}};
    for (const auto& [rows, columns] : std::vector<std::pair<std::size_t, std::size_t>>{{60, 12},
                                                                                        {60, 20},
                                                                                        {1, 60},
                                                                                        {1, 60},
                                                                                        {27, 20},
                                                                                        {27, 9},
                                                                                        {1, 27},
                                                                                        {1, 27},
                                                                                        {12, 9},
                                                                                        {1, 12}})
      parts.weights.push_back(small_model::random_matrix(random, rows, columns, 0.4f));
    const auto model = pz::Model::from_parts(parts);
    REQUIRE(model);
    CHECK(worst_error(**model, a) < 2e-5);
  }
}

TEST_CASE("an item's input vector counts as the item does whose row it is") {
  for (const bool int8 : {false, true}) {
    const auto model = small_model::model({.items = 30, .dimension = 20, .hidden = 24}, int8);
    std::vector<float> row(20);
    for (const bool lookup : {false, true}) {
      const pz::Encoder encoder{*model, pz::kernels::chosen(), lookup};
      REQUIRE(encoder.looks_up_gates() == lookup);
      auto workspace = encoder.make_workspace();
      std::vector<float> by_row(encoder.state_size()), by_span(encoder.state_size());
      small_model::Random random{7};
      for (int event = 0; event < 30; ++event) {
        const pz::EncoderInput input{random.below(30), random.below(2), random.below(12)};
        REQUIRE(encoder.step(input, by_row, workspace));
        model->parts().item_vectors.row(input.item, row);
        // The item is then not looked at.
        const pz::EncoderInput given{4'000'000'000u, input.event_type, input.time_gap, row};
        REQUIRE(encoder.step(given, by_span, workspace));
        if (!lookup) {
          REQUIRE(by_span == by_row);
        } else {
          const float bound =
              int8 ? 4.0f / static_cast<float>(pz::kernels::chosen().query_limit) : 1e-5f;
          for (std::size_t c = 0; c < by_row.size(); ++c)
            REQUIRE(std::abs(by_span[c] - by_row[c]) <= bound);
        }
      }
    }
  }
}

TEST_CASE("a step tells whether the state is finite, and stays so") {
  using Kind = pz::EncoderOp::Kind;
  // Finite weights, the largest that are allowed, of which three products are no float.
  pz::ModelParts parts = small_model::parts({.items = 3, .dimension = 4});
  parts.operations = {{Kind::embed_sum}, {Kind::linear}, {Kind::linear}, {Kind::decay}};
  parts.weights = {pz::Matrix::zeros(4, 4), pz::Matrix::zeros(1, 4), pz::Matrix::zeros(4, 4),
                   pz::Matrix::zeros(1, 4), pz::Matrix::zeros(1, 4), pz::Matrix::zeros(1, 4)};
  for (const std::size_t w : {0u, 2u})
    for (std::size_t i = 0; i < 4; ++i) parts.weights[w].f32()[5 * i] = 1e18f;
  for (std::size_t i = 0; i < 4; ++i) {
    parts.weights[4].f32()[i] = 0.5f;
    parts.weights[5].f32()[i] = 1;
    parts.item_vectors.f32()[i] = 1e-30f;
    parts.item_vectors.f32()[4 + i] = 1e18f;
  }
  parts.event_types = {};
  parts.event_type_embedding = {};
  parts.time_gap_embedding = {};
  const auto model = pz::Model::from_parts(parts);
  REQUIRE(model);
  const pz::Encoder encoder{**model};
  auto workspace = encoder.make_workspace();
  std::vector<float> state(encoder.state_size());
  CHECK(encoder.step({0}, state, workspace));
  CHECK(encoder.step({0}, state, workspace));
  CHECK_FALSE(encoder.step({1}, state, workspace));
  CHECK_FALSE(encoder.step({0}, state, workspace));
  std::fill(state.begin(), state.end(), 0.0f);
  CHECK(encoder.step({0}, state, workspace));
}
