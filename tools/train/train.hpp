#pragma once

namespace CLI {
class App;
}

namespace personalize::tools {

void add_train(CLI::App& app);

}  // namespace personalize::tools
