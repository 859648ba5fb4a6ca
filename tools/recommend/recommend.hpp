// `personalize recommend`: slates for one user or for every user, served through the header.
#pragma once

#include "command/command.hpp"

namespace personalize::tools {

void add_recommend(CLI::App& app);

}  // namespace personalize::tools
