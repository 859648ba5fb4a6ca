// Puts a mapping's tensors together as a model.
#pragma once

#include <string>
#include <vector>

#include "convert/mapping.hpp"
#include "data/dataset.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

struct Catalogue {
  Dataset items;         // item_ids, items and metadata
  StringTable user_ids;  // of the model's users
};

struct Built {
  ModelParts parts;
  std::vector<std::uint64_t> rows;  // of the embedding: each item's
};

// element_type: of the item vectors, inputs and user states, which are converted as they are read;
// everything else is f32. Throws Failure.
Built build_model(TensorFile& file, const Mapping& mapping, const Catalogue& catalogue,
                  ElementType element_type);

}  // namespace personalize::tools
