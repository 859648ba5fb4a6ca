// `personalize recommend`: slates for one user or for every user, served through the header.
#pragma once

namespace CLI {
class App;
}

namespace personalize::tools {

void add_recommend(CLI::App& app);

}  // namespace personalize::tools
