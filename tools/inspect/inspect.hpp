// `personalize inspect`: what a model file holds.
#pragma once

namespace CLI {
class App;
}

namespace personalize::tools {

void add_inspect(CLI::App& app);

}  // namespace personalize::tools
