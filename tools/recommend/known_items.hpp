// How much of a file of interactions a model knows.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

struct KnownItems {
  std::uint64_t items = 0, known_items = 0;  // distinct ones of the interactions
  std::uint64_t interactions = 0, known_interactions = 0;
};

// Of these histories of the data set.
KnownItems known_items(const Dataset& data, std::span<const std::vector<Event>> histories,
                       const Model& model);

// Throws Failure where the whole file has interactions and none of their items is in the model.
// Else what to say of those that are not, or nothing where there are none: `consequence` is what
// comes of their interactions.
std::optional<std::string> report_known(const Dataset& data, const KnownItems& known,
                                        const Model& model, const std::string& interactions_path,
                                        const std::string& consequence);

}  // namespace personalize::tools
