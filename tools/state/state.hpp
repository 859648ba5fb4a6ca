// `personalize state`: what a recommender's folder holds, whether it is sound, what can be saved of
// one that is not, and the users' events for a training. Needs no model.
#pragma once

#include "command/command.hpp"

namespace personalize::tools {

void add_state(CLI::App& app);

}  // namespace personalize::tools
