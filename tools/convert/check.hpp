// Runs histories through a converted model and compares with what it was made from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/mapping.hpp"
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
  std::string what, with;  // what was compared with what
  std::size_t histories = 0;
  // Of the hidden states: the largest difference over the largest magnitude in a history's state.
  std::optional<double> hidden_deviation = std::nullopt;
  // Share of the histories. Items whose scores differ by rounding alone may change places.
  std::optional<double> same_top20 = std::nullopt;
  std::string first_difference = {};  // of the histories: "for user 'u3' ..."

  bool agrees() const;  // up to rounding
};

// The model file with an encoder and scores in double precision from the parts as they were read,
// in f32.
Agreement compare_with_source(const Model& model, const ModelParts& source,
                              const std::vector<History>& histories);

// Those parts with the ONNX graph itself, run node by node. rows: of the embedding, each item's.
Agreement compare_with_graph(const ModelParts& source, TensorFile& file, const Mapping& mapping,
                             const std::vector<std::uint64_t>& rows,
                             const std::vector<History>& histories);

// Those parts with tensors "hidden" [histories, d] or "scores" [histories, N] of a file in any
// format.
Agreement compare_with_reference(const ModelParts& source, TensorFile& reference,
                                 const std::vector<History>& histories);

// Whether the parts rank all items as the ONNX graph does behind a few histories of different
// lengths, which have all of a small catalogue's items. Empty, or why this is not known. Throws
// Failure where they do not, which names a history and two items.
std::string verify_graph(const ModelParts& source, TensorFile& file, const Mapping& mapping,
                         const std::vector<std::uint64_t>& rows);

}  // namespace personalize::tools
