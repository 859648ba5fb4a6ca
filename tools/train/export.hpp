// From a trained network to the plain data of a model file.
#pragma once

#include <string>

#include "data/dataset.hpp"
#include "personalize_runtime.hpp"
#include "train/network.hpp"

namespace personalize::tools {

// metadata: JSON about the run. Throws Failure where ids cannot be stored.
ModelParts export_network(const Network& network, const Dataset& dataset, std::string metadata);

}  // namespace personalize::tools
