// What a Recommender promises of every answer, whatever it was asked. A broken promise ends the
// program, so that the fuzzer keeps the input.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "personalize_runtime.hpp"

namespace promises {

namespace pz = personalize;

inline void require(bool kept, const char* promise) {
  if (kept) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

// A slate of shop.recommend(): at most `count` distinct items of the catalogue, with finite scores
// and a probability each.
inline void check_slate(const pz::Slate& slate, std::size_t count, const pz::Recommender& shop) {
  require(slate.items.size() <= count, "a slate is no longer than asked for");
  require(slate.ids != nullptr, "a slate holds the ids of its picks");
  double product = 1;
  std::vector<std::string_view> items;
  for (const pz::Pick& pick : slate.items) {
    require(std::isfinite(pick.score), "scores are finite");
    require(pick.propensity > 0 && pick.propensity <= 1, "propensities are in (0, 1]");
    require(pick.reason != pz::Reason::unknown, "recommend() knows its items");
    require(shop.find_item(pick.item).has_value(), "picks are items of the catalogue");
    product *= static_cast<double>(pick.propensity);
    items.push_back(pick.item);
  }
  std::sort(items.begin(), items.end());
  require(std::adjacent_find(items.begin(), items.end()) == items.end(), "items are distinct");
  require(std::abs(slate.propensity - product) <= 1e-4 * product,
          "a slate's propensity is the product of its picks'");
  require(slate.id.empty() || slate.id.size() == 32, "a recommendation id has 32 characters");
}

// An order of rank(): the same items as were given, best first, those that cannot be ranked last.
inline void check_order(const pz::Slate& slate, std::vector<std::string_view> given) {
  require(slate.items.size() == given.size(), "rank() keeps the number of items");
  std::vector<std::string_view> ranked;
  bool unranked = false;
  for (std::size_t i = 0; i < slate.items.size(); ++i) {
    const pz::Pick& pick = slate.items[i];
    ranked.push_back(pick.item);
    require(std::isfinite(pick.score), "scores are finite");
    const bool last = pick.reason == pz::Reason::unknown || pick.reason == pz::Reason::excluded;
    require(last || !unranked, "what cannot be ranked comes last");
    unranked = last;
    require(unranked || i == 0 || pick.score <= slate.items[i - 1].score, "rank() sorts by score");
  }
  std::sort(ranked.begin(), ranked.end());
  std::sort(given.begin(), given.end());
  require(ranked == given, "rank() gives back the items that it was given");
}

inline void check_explanation(const pz::Explanation& parts) {
  for (const float value : {parts.score, parts.relevance, parts.quality, parts.taste,
                            parts.discount, parts.uncertainty})
    require(std::isfinite(value), "explanations are finite");
  require(parts.positive >= 0 && parts.expected >= 0, "counts are not negative");
  require(!parts.age || *parts.age >= 0, "ages are not negative");
}

}  // namespace promises
