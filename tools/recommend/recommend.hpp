// `personalize recommend`: slates for one user or for every user, served through the header.
#pragma once

#include <CLI/CLI.hpp>

namespace personalize::tools {

void add_recommend(CLI::App& app);

}  // namespace personalize::tools
