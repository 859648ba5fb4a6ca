// Runs policies in the same worlds and compares them.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "simulate/policy.hpp"

namespace personalize::tools {

class Progress;

// One policy in one world.
struct PolicyRun {
  std::vector<double> reward;            // clicks, a day
  std::vector<double> days_to_discover;  // of each good new item, ascending; found ones only
  std::size_t good_items = 0;            // new ones, a tenth of those that arrived in time
};

struct Comparison {
  WorldOptions world;
  double weight = 0;
  std::vector<std::uint64_t> seeds;
  std::vector<std::string> policies;
  std::vector<std::vector<PolicyRun>> runs;  // [policy][seed]
};

// An item is good where its appeal is among the highest tenth of the new items, and discovered with
// its 100th impression. Items that arrive in the last third of the days are left out: they have no
// time to be found.
// `seen` is called after every visit with what was shown and what of it was clicked, `day_done` at
// the end of each day.
using Seen = std::function<void(const World&, const World::Visit&,
                                const std::vector<std::uint32_t>&, const std::vector<bool>&)>;
PolicyRun run_policy(const std::string& name, const WorldOptions& options,
                     const PolicyOptions& policy, const Seen& seen = {},
                     const std::function<void()>& day_done = {});

// Worlds with seeds from options.seed on. The number of threads changes no figure.
Comparison compare(const std::vector<std::string>& policies, const WorldOptions& options,
                   double weight, std::uint32_t seeds, unsigned threads = 1,
                   Progress* progress = nullptr);

// Mean and half the width of its 95 % confidence interval (Student).
struct Estimate {
  double mean = 0, half_width = 0;
};
Estimate estimate(const std::vector<double>& values);

// Seed by seed: the first policy's reward over the highest of all policies but the runtime's own;
// nullopt where there is none.
std::optional<std::vector<double>> over_best_other(const Comparison& comparison);

nlohmann::ordered_json to_json(const Comparison& comparison);
void print_text(const Comparison& comparison);
// Two plots: cumulative reward by day, and share of good new items discovered by age.
std::string to_svg(const Comparison& comparison);

}  // namespace personalize::tools
