#include "train/export.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

Matrix matrix(const at::Tensor& tensor) {
  const at::Tensor t = tensor.detach().contiguous();
  const auto rows = static_cast<std::size_t>(t.dim() == 2 ? t.size(0) : 1);
  const auto columns = static_cast<std::size_t>(t.size(t.dim() - 1));
  Matrix m = Matrix::zeros(rows, columns);
  std::copy_n(t.data_ptr<float>(), rows * columns, m.f32().begin());
  return m;
}

// An item without interactions starts like an unpopular one: at the biases' tenth percentile.
float unseen_bias(std::vector<float> biases) {
  const auto tenth = biases.begin() + static_cast<std::ptrdiff_t>(biases.size() / 10);
  std::nth_element(biases.begin(), tenth, biases.end());
  return *tenth;
}

}  // namespace

ModelParts export_network(const Network& network, const Dataset& dataset, std::string metadata) {
  const at::NoGradGuard no_gradient;
  const NetworkShape& shape = network.shape();
  ModelParts parts;
  parts.metadata = std::move(metadata);
  parts.item_ids = dataset.item_ids;
  parts.item_vectors = matrix(network.all_item_vectors());
  const at::Tensor biases = network.biases().detach().contiguous();
  parts.biases.assign(biases.data_ptr<float>(), biases.data_ptr<float>() + biases.numel());
  parts.biases.resize(shape.items, unseen_bias(parts.biases));
  constexpr std::int64_t unknown = std::numeric_limits<std::int64_t>::min();
  for (const ItemInfo& item : dataset.items)
    parts.statistics.push_back({.interactions = item.interactions,
                                .first_timestamp = item.first.value_or(unknown),
                                .last_timestamp = item.last.value_or(unknown),
                                .creation_timestamp = item.creation_timestamp.value_or(unknown)});
  if (shape.event_types > 0) {
    parts.event_types = dataset.event_types;
    parts.event_type_embedding = matrix(network.parameter("event_type_embedding"));
  }
  if (shape.time_gap_buckets > 0)
    parts.time_gap_embedding = matrix(network.parameter("time_gap_embedding"));
  for (const MetadataColumn& column : dataset.metadata)
    parts.fields.push_back({.name = column.name,
                            .numeric = column.numeric,
                            .vocabulary = column.vocabulary,
                            .boundaries = column.boundaries,
                            .embedding = matrix(network.parameter("metadata." + column.name))});

  const auto operation = [&](EncoderOp::Kind kind, std::initializer_list<std::string> weights,
                             std::uint32_t argument = 0) {
    parts.operations.push_back({.kind = kind, .argument = argument});
    for (const std::string& name : weights)
      parts.weights.push_back(matrix(network.parameter(name)));
  };
  using Kind = EncoderOp::Kind;
  operation(Kind::embed_sum, {});
  operation(Kind::layer_norm, {"norm.weight", "norm.bias"});
  for (std::size_t k = 0; k < shape.layers; ++k) {
    const std::string prefix = "layer" + std::to_string(k) + ".";
    operation(Kind::save, {});
    operation(Kind::gru, {prefix + "w_ih", prefix + "w_hh", prefix + "b_ih", prefix + "b_hh"});
    operation(Kind::add, {});
    operation(Kind::layer_norm, {prefix + "norm1.weight", prefix + "norm1.bias"});
    if (shape.feed_forward == 0) continue;
    operation(Kind::save, {});
    operation(Kind::linear, {prefix + "linear1.weight", prefix + "linear1.bias"});
    operation(Kind::activation, {}, static_cast<std::uint32_t>(Activation::gelu));
    operation(Kind::linear, {prefix + "linear2.weight", prefix + "linear2.bias"});
    operation(Kind::add, {});
    operation(Kind::layer_norm, {prefix + "norm2.weight", prefix + "norm2.bias"});
  }
  return parts;
}

}  // namespace personalize::tools
