#include "train/network.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <stdexcept>
#include <utility>

#include "data/random.hpp"
#include "train/gru.hpp"
#include "train/kernels.hpp"

namespace personalize::tools {
namespace {

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

}  // namespace

at::Tensor view(const std::vector<std::int64_t>& values) {
  return at::from_blob(const_cast<std::int64_t*>(values.data()), {size(values.size())}, at::kLong);
}

at::Tensor Network::add(std::string name, at::Tensor value) {
  value.requires_grad_(true);
  parameters_.push_back({std::move(name), value});
  return value;
}

const at::Tensor& Network::parameter(const std::string& name) const {
  for (const Parameter& p : parameters_)
    if (p.name == name) return p.value;
  throw std::logic_error("no parameter " + name);
}

Network::Network(const NetworkShape& shape, std::span<const MetadataColumn> metadata,
                 std::uint64_t seed)
    : shape_(shape) {
  const std::int64_t d = size(shape.dimension);
  at::manual_seed(mix(seed, 0x6e6574));
  const auto normal = [](std::int64_t rows, std::int64_t columns, double deviation) {
    return at::randn({rows, columns}).mul_(deviation);
  };
  const auto uniform = [](at::IntArrayRef sizes, std::int64_t fan) {
    const double bound = 1 / std::sqrt(static_cast<double>(fan));
    return at::empty(sizes, at::kFloat).uniform_(-bound, bound);
  };

  item_embedding_ = add("item_embedding", normal(size(shape.trained_items), d,
                                                 0.3 / std::sqrt(static_cast<double>(d))));
  biases_ = add("item_bias", at::zeros({size(shape.trained_items)}));
  if (shape.event_types > 0)
    event_type_embedding_ = add("event_type_embedding", normal(size(shape.event_types), d, 0.02));
  if (shape.time_gap_buckets > 0)
    time_gap_embedding_ = add("time_gap_embedding", normal(size(shape.time_gap_buckets), d, 0.02));
  for (const MetadataColumn& column : metadata) {
    const std::size_t rows =
        column.numeric ? column.boundaries.size() + 1 : column.vocabulary.size();
    std::vector<std::int64_t> values;
    std::vector<std::int64_t> offsets;
    for (const auto& of_item : column.values) {
      offsets.push_back(size(values.size()));
      values.insert(values.end(), of_item.begin(), of_item.end());
    }
    offsets.push_back(size(values.size()));
    const std::int64_t trained_values = offsets[shape.trained_items];
    offsets.pop_back();
    bags_.push_back({add("metadata." + column.name, normal(size(rows), d, 0.02)),
                     view(values).clone(), view(offsets).clone(), trained_values});
  }
  norm_weight_ = add("norm.weight", at::ones({d}));
  norm_bias_ = add("norm.bias", at::zeros({d}));
  for (std::size_t k = 0; k < shape.layers; ++k) {
    const std::string prefix = "layer" + std::to_string(k) + ".";
    const std::int64_t wide = size(shape.feed_forward) * d;
    Layer layer;
    layer.w_ih = add(prefix + "w_ih", uniform({3 * d, d}, d));
    layer.w_hh = add(prefix + "w_hh", uniform({3 * d, d}, d));
    layer.b_ih = add(prefix + "b_ih", uniform({3 * d}, d));
    layer.b_hh = add(prefix + "b_hh", uniform({3 * d}, d));
    layer.norm1_weight = add(prefix + "norm1.weight", at::ones({d}));
    layer.norm1_bias = add(prefix + "norm1.bias", at::zeros({d}));
    if (wide > 0) {
      layer.linear1_weight = add(prefix + "linear1.weight", uniform({wide, d}, d));
      layer.linear1_bias = add(prefix + "linear1.bias", uniform({wide}, d));
      layer.linear2_weight = add(prefix + "linear2.weight", uniform({d, wide}, wide));
      layer.linear2_bias = add(prefix + "linear2.bias", uniform({d}, wide));
      layer.norm2_weight = add(prefix + "norm2.weight", at::ones({d}));
      layer.norm2_bias = add(prefix + "norm2.bias", at::zeros({d}));
    }
    layers_.push_back(std::move(layer));
  }
}

at::Tensor Network::item_vectors() const {
  at::Tensor vectors = item_embedding_;
  for (const Bag& bag : bags_)
    if (bag.trained_values > 0)
      vectors = vectors + std::get<0>(at::embedding_bag(
                              bag.embedding, bag.values.narrow(0, 0, bag.trained_values),
                              bag.offsets.narrow(0, 0, size(shape_.trained_items))));
  return vectors;
}

at::Tensor Network::all_item_vectors() const {
  const at::NoGradGuard no_gradient;
  at::Tensor vectors = at::zeros({size(shape_.items), size(shape_.dimension)});
  vectors.narrow(0, 0, size(shape_.trained_items)).copy_(item_embedding_);
  for (const Bag& bag : bags_)
    if (bag.values.numel() > 0)
      vectors += std::get<0>(at::embedding_bag(bag.embedding, bag.values, bag.offsets));
  return vectors;
}

std::vector<at::Tensor> Network::initial_state(std::size_t batch) const {
  std::vector<at::Tensor> state;
  for (std::size_t k = 0; k < shape_.layers; ++k)
    state.push_back(at::zeros({size(batch), size(shape_.dimension)}));
  return state;
}

at::Tensor Network::encode(const at::Tensor& vectors, const Chunk& chunk,
                           std::vector<at::Tensor>& state, double dropout,
                           std::optional<std::uint64_t> dropout_seed, bool last_step_only) const {
  const std::int64_t d = size(shape_.dimension);
  const std::int64_t steps = size(chunk.steps);
  const std::int64_t batch = size(chunk.batch);
  std::uint64_t dropouts = 0;
  const auto drop = [&](const at::Tensor& x) {
    if (!dropout_seed || dropout <= 0) return x;
    return seeded_dropout(x, dropout, mix(*dropout_seed, dropouts++));
  };

  at::Tensor x = vectors.index_select(0, view(chunk.item));
  if (shape_.event_types > 0) x = x + event_type_embedding_.index_select(0, view(chunk.event_type));
  if (shape_.time_gap_buckets > 0)
    x = x + time_gap_embedding_.index_select(0, view(chunk.time_gap));
  x = drop(at::layer_norm(x, {d}, norm_weight_, norm_bias_));
  const at::Tensor reset =
      at::from_blob(const_cast<std::uint8_t*>(chunk.reset.data()), {steps, batch}, at::kByte);
  for (std::size_t k = 0; k < layers_.size(); ++k) {
    const Layer& layer = layers_[k];
    at::Tensor y = gru(x.view({steps, batch, d}), state[k], layer.w_ih, layer.w_hh, layer.b_ih,
                       layer.b_hh, reset);
    state[k] = y.detach()[steps - 1].clone();
    y = y.view({steps * batch, d});
    if (last_step_only && k + 1 == layers_.size()) {
      x = x.narrow(0, (steps - 1) * batch, batch);
      y = y.narrow(0, (steps - 1) * batch, batch);
    }
    x = at::layer_norm(x + drop(y), {d}, layer.norm1_weight, layer.norm1_bias);
    if (!layer.linear1_weight.defined()) continue;
    y = drop(at::gelu(at::linear(x, layer.linear1_weight, layer.linear1_bias)));
    y = drop(at::linear(y, layer.linear2_weight, layer.linear2_bias));
    x = at::layer_norm(x + y, {d}, layer.norm2_weight, layer.norm2_bias);
  }
  return x;
}

}  // namespace personalize::tools
