// What another policy would have earned, from the log of the one that ran.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/fields.hpp"

namespace personalize::tools {

// One choice of the log: a place of a slate, or a row of a log of single choices.
struct LoggedStep {
  double reward;
  double ratio;         // probability under the evaluated policy over that under the logging one
  double value;         // reward that a model expects of the choice
  double target_value;  // the same, averaged over the choices of the evaluated policy here
};

// A slate's steps in order; each choice depends on those before it.
using LoggedDecision = std::vector<LoggedStep>;

struct PolicyValue {
  double mean = 0, low = 0, high = 0;  // reward a decision, with its 95 % confidence interval
};

struct OffPolicyEvaluation {
  std::uint64_t decisions = 0;
  PolicyValue logged;            // mean reward of the log itself
  PolicyValue ips;               // inverse propensity scores, a step at a time (Precup et al. 2000)
  PolicyValue snips;             // self-normalised (Swaminathan and Joachims 2015)
  PolicyValue doubly_robust;     // Dudik et al. 2011; for slates Jiang and Li 2016
  double effective_sample_size;  // (sum of weights)^2 / sum of squared weights, decisions
};

// With weights w_k = ratio_1 ... ratio_k and n decisions:
//   ips = 1/n sum sum_k w_k reward_k
//   snips = sum_k (sum w_k reward_k / sum w_k) n_k / n, n_k the decisions that have a step k
//   doubly robust = 1/n sum sum_k w_(k-1) target_value_k + w_k (reward_k - value_k)
// Intervals are normal approximations over decisions; that of snips by the delta method.
OffPolicyEvaluation evaluate_off_policy(const std::vector<LoggedDecision>& decisions);

// The runtime's interaction log (personalize::log_csv_header) as decisions of its policy at another
// exploration weight, in [0, 1]. Slates of which a place was not seen are left out and counted in
// `incomplete`. Throws Failure.
std::vector<LoggedDecision> read_interaction_log(const std::string& path, double target_weight,
                                                 std::uint64_t& incomplete, BadRows& bad);

// Open Bandit Data (Saito et al. 2020), columns item_id, position, click, propensity_score. The
// evaluated policy chooses an item at a position as often as `target_path` has it there or, where
// that is empty, every item alike. The reward model is the click rate of an item, drawn towards the
// mean as by 100 impressions, from the other half of the rows. Throws Failure.
std::vector<LoggedDecision> read_open_bandit_log(const std::string& path,
                                                 const std::string& target_path, BadRows& bad);

// Which of the two a file is, by its columns. Throws Failure where it is neither.
bool is_interaction_log(const std::string& path);

struct OffPolicyOptions {
  std::string log, target_log;
  std::optional<double> target_weight;  // of an interaction log; absent: 0
  bool json = false, skip_bad_rows = false;
};
void run_off_policy(const OffPolicyOptions& options);

}  // namespace personalize::tools
