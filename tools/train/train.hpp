#pragma once

#include "command/command.hpp"

namespace personalize::tools {

inline constexpr const char* train_description = "Train a recommender on a file of interactions";

void add_train(CLI::App& app);

}  // namespace personalize::tools
