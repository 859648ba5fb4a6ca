// Ways to choose a slate, side by side: the runtime's own, and those it is compared with.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simulate/world.hpp"

namespace personalize::tools {

class Policy {
 public:
  virtual ~Policy() = default;
  // A new item; it may be shown from the next update on.
  virtual void add_item(const World& world, std::uint32_t item) = 0;
  virtual void update(std::int64_t now) = 0;
  // World::slate_length distinct items that the user has not clicked yet.
  virtual void choose(const World::Visit& visit, std::vector<std::uint32_t>& slate) = 0;
  // What became of the slate just chosen.
  virtual void learn(const World::Visit& visit, const std::vector<std::uint32_t>& slate,
                     const std::vector<bool>& clicked) = 0;
};

struct PolicyOptions {
  double weight = 0.3;  // of exploration: share of the places that may explore
  std::uint64_t seed = 1;
  std::function<void(const LogEntry&)> log = {};  // of the runtime's own policy
};

// runtime                    the header's recommender at this weight
// runtime-0                  the same at weight 0: feedback without exploration
// greedy                     the model alone
// epsilon-greedy             the model; a place is a random cold item with probability `weight`
// epsilon-greedy-feedback    runtime-0; a place is a random cold item with probability `weight`
// thompson                   a Beta posterior of the click rate for each item
// linucb                     the model and a linear bandit for each item on the user's state (Li et
//                            al. 2010), with impression discount
// age-count-bonus            the model, a bonus for young and rarely shown items, with impression
//                            discount
const std::vector<std::string>& policy_names();

// Throws Usage where there is no such policy.
std::unique_ptr<Policy> make_policy(const std::string& name, const World& world,
                                    const PolicyOptions& options);

}  // namespace personalize::tools
