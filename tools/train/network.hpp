// The network that `personalize train` fits: a GRU encoder whose output is compared with the item
// vectors that it also reads.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.hpp"
#include "train/streams.hpp"

namespace personalize::tools {

struct NetworkShape {
  std::size_t trained_items = 0;  // items with interactions; the ones after them have only metadata
  std::size_t items = 0;
  std::size_t dimension = 128, layers = 1, feed_forward = 4;
  std::size_t event_types = 0;       // 0: no event-type embedding
  std::size_t time_gap_buckets = 0;  // 0: no time-gap embedding
};

struct Parameter {
  std::string name;
  at::Tensor value;
};

class Network {
 public:
  Network(const NetworkShape& shape, std::span<const MetadataColumn> metadata, std::uint64_t seed);

  const NetworkShape& shape() const { return shape_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  const at::Tensor& parameter(const std::string& name) const;
  const at::Tensor& biases() const { return biases_; }

  // id embedding + sum of metadata embeddings. trained: [trained_items, d]; all: [items, d], where
  // an item without interactions has only its metadata's part.
  at::Tensor item_vectors() const;
  at::Tensor all_item_vectors() const;

  std::vector<at::Tensor> initial_state(std::size_t batch) const;

  // Hidden outputs [steps * batch, d] of a chunk (only the last step's [batch, d] with
  // last_step_only). state: one [batch, d] per layer, carried on in place. Dropout happens only
  // with a seed.
  at::Tensor encode(const at::Tensor& vectors, const Chunk& chunk, std::vector<at::Tensor>& state,
                    double dropout, std::optional<std::uint64_t> dropout_seed,
                    bool last_step_only = false) const;

 private:
  struct Bag {  // a metadata column as torch's embedding_bag takes it
    at::Tensor embedding, values, offsets;
    std::int64_t trained_values;
  };
  struct Layer {
    at::Tensor w_ih, w_hh, b_ih, b_hh, norm1_weight, norm1_bias;
    at::Tensor linear1_weight, linear1_bias, linear2_weight, linear2_bias, norm2_weight, norm2_bias;
  };
  at::Tensor add(std::string name, at::Tensor value);

  NetworkShape shape_;
  std::vector<Parameter> parameters_;
  at::Tensor item_embedding_, biases_, event_type_embedding_, time_gap_embedding_, norm_weight_,
      norm_bias_;
  std::vector<Bag> bags_;
  std::vector<Layer> layers_;
};

// An int64 tensor over the values (no copy: they must outlive it).
at::Tensor view(const std::vector<std::int64_t>& values);

}  // namespace personalize::tools
