// Random models of any shape, the same for the same seed on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../personalize_runtime.hpp"

namespace small_model {

namespace pz = personalize;

// SplitMix64; the standard library's distributions differ between implementations.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(bits() % n); }
  // Uniform in (-1, 1).
  float symmetric() { return static_cast<float>(static_cast<double>(bits() >> 11) * 0x1p-52 - 1); }
  // Close to normal: the sum of twelve uniforms.
  float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += symmetric() * 0.5f;
    return sum;
  }

 private:
  std::uint64_t state_;
};

inline pz::Matrix random_matrix(Random& random, std::size_t rows, std::size_t columns,
                                float scale) {
  pz::Matrix m = pz::Matrix::zeros(rows, columns);
  for (float& v : m.f32()) v = random.normal() * scale;
  return m;
}

struct Shape {
  std::size_t items = 50, dimension = 20, hidden = 24;
  bool event_types = true, time_gaps = true, fields = true;
  std::uint64_t seed = 1;
};

// embed_sum, layer norm, GRU, layer norm, then a feed-forward part with a residual.
inline pz::ModelParts parts(const Shape& shape = {}) {
  Random random{shape.seed};
  pz::ModelParts p;
  p.metadata = R"({"recipe": "test"})";
  const std::size_t d = shape.dimension, h = shape.hidden;
  for (std::size_t i = 0; i < shape.items; ++i) {
    if (!p.item_ids.add("i" + std::to_string(i))) std::abort();
    p.biases.push_back(random.normal() * 0.5f);
    const auto first = 1'600'000'000 + static_cast<std::int64_t>(i);
    p.statistics.push_back({1000 - std::min<std::uint64_t>(i, 1000), first, first + 1000,
                            i % 3 == 0 ? pz::no_timestamp : first - 10});
  }
  p.item_vectors = random_matrix(random, shape.items, d, 0.5f);
  if (shape.event_types) {
    for (const char* type : {"view", "click"})
      if (!p.event_types.add(type)) std::abort();
    p.event_type_embedding = random_matrix(random, 2, d, 0.3f);
  }
  if (shape.time_gaps) p.time_gap_embedding = random_matrix(random, 12, d, 0.3f);
  if (shape.fields) {
    pz::MetadataField genre;
    genre.name = "GENRE";
    for (const char* value : {"bow", "sword", "shield"})
      if (!genre.vocabulary.add(value)) std::abort();
    genre.embedding = random_matrix(random, 3, d, 0.3f);
    pz::MetadataField price;
    price.name = "PRICE";
    price.numeric = true;
    price.boundaries = {1.0f, 2.5f};
    price.embedding = random_matrix(random, 3, d, 0.3f);
    p.fields.push_back(std::move(genre));
    p.fields.push_back(std::move(price));
  }
  using Kind = pz::EncoderOp::Kind;
  const auto weight = [&](std::size_t rows, std::size_t columns) {
    p.weights.push_back(
        random_matrix(random, rows, columns, 1.0f / std::sqrt(static_cast<float>(columns))));
  };
  const auto row = [&](std::size_t columns) {
    p.weights.push_back(random_matrix(random, 1, columns, 0.5f));
  };
  p.operations = {
      {Kind::embed_sum},  {Kind::layer_norm},
      {Kind::gru},        {Kind::save, 3},
      {Kind::linear},     {Kind::activation, static_cast<std::uint32_t>(pz::Activation::gelu)},
      {Kind::linear},     {Kind::add, 3},
      {Kind::layer_norm}, {Kind::linear}};
  row(d), row(d);
  weight(3 * h, d), weight(3 * h, h), row(3 * h), row(3 * h);
  weight(2 * h, h), row(2 * h);
  weight(h, 2 * h), row(h);
  row(h), row(h);
  weight(d, h), row(d);
  return p;
}

// The same parts, quantised to int8 as a model file would.
inline pz::ModelParts quantised(pz::ModelParts p) {
  const auto shrink = [](pz::Matrix& m) {
    if (m.rows() > 1) m = m.quantised();
  };
  shrink(p.item_vectors);
  shrink(p.event_type_embedding);
  shrink(p.time_gap_embedding);
  for (auto& field : p.fields) shrink(field.embedding);
  for (auto& w : p.weights) shrink(w);
  return p;
}

inline std::shared_ptr<const pz::Model> model(const Shape& shape = {}, bool int8 = false) {
  auto m = pz::Model::from_parts(int8 ? quantised(parts(shape)) : parts(shape));
  if (!m) std::abort();
  return *m;
}

}  // namespace small_model
