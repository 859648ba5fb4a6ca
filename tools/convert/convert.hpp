// `personalize convert`: models that were trained elsewhere, in and out.
#pragma once

namespace CLI {
class App;
}

namespace personalize::tools {

void add_convert(CLI::App& app);

}  // namespace personalize::tools
