// `personalize convert`: models that were trained elsewhere, in and out.
#pragma once

#include "command/command.hpp"

namespace personalize::tools {

void add_convert(CLI::App& app);

}  // namespace personalize::tools
