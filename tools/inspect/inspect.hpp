// `personalize inspect`: what a model file holds.
#pragma once

#include "command/command.hpp"

namespace personalize::tools {

void add_inspect(CLI::App& app);

}  // namespace personalize::tools
