// `personalize inspect`: what a model file holds.
#pragma once

#include <CLI/CLI.hpp>

namespace personalize::tools {

void add_inspect(CLI::App& app);

}  // namespace personalize::tools
