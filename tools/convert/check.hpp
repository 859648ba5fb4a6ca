// Runs histories through a converted model and compares with what it was made from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/tensors.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

struct History {
  std::string user;
  std::vector<EncoderInput> events;  // in time order
};

// Interactions with USER_ID, ITEM_ID and, where the model knows their like, EVENT_TYPE; TIMESTAMP
// orders them and gives the time gaps. Users in order of first appearance. Throws Failure: a bad
// row or an unknown item (unless skipped and counted in `bad`), or no history at all.
std::vector<History> read_histories(const std::string& path, const ModelParts& parts, BadRows& bad);

struct Agreement {
  std::string with;  // what the model was compared with
  std::size_t histories = 0;
  // Of the hidden states: the largest difference over the largest magnitude in a history's state.
  std::optional<double> hidden_deviation = std::nullopt;
  // Share of the histories. Items whose scores differ by rounding alone may change places.
  std::optional<double> same_top20 = std::nullopt;
};

// With an encoder and scores in double precision from the parts as they were read, in f32.
Agreement compare_with_source(const Model& model, const ModelParts& source,
                              const std::vector<History>& histories);

// With the ONNX graph itself, run node by node.
Agreement compare_with_graph(const Model& model, TensorFile& file, std::uint64_t first_row,
                             const std::vector<History>& histories);

// With tensors "hidden" [histories, d] or "scores" [histories, N] of a file in any format.
Agreement compare_with_reference(const Model& model, TensorFile& reference,
                                 const std::vector<History>& histories);

}  // namespace personalize::tools
