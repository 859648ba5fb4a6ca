#include "evaluate/off_policy.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "command/command.hpp"
#include "command/json.hpp"
#include "data/csv.hpp"
#include "data/fields.hpp"
#include "data/statistics.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace off_policy {

PolicyValue interval(const std::vector<double>& values, double mean) {
  const double half_width = normal_quantile * standard_error(values);
  return {mean, mean - half_width, mean + half_width};
}

PolicyValue interval(const std::vector<double>& values) {
  return interval(values, mean_of(values));
}

// (sum of weights)^2 / sum of squared weights. The weights are scaled first: those of long slates
// have squares beyond what a double holds.
double effective_sample_size(const std::vector<double>& weights) {
  const double largest = *std::max_element(weights.begin(), weights.end());
  if (largest == 0) return 0;
  double sum = 0, squares = 0;
  for (const double weight : weights) {
    sum += weight / largest;
    squares += (weight / largest) * (weight / largest);
  }
  return sum * sum / squares;
}

double finite(const CsvReader& reader, std::size_t column) {
  const double value = number_field(reader, column);
  if (!std::isfinite(value)) reader.refuse(column, "is not finite");
  return value;
}

// Of rewards; less than nothing is expected of no item.
double expected_reward(const CsvReader& reader, std::size_t column) {
  const double value = finite(reader, column);
  if (value < 0) reader.refuse(column, "an expected reward is not negative");
  return value;
}

bool flag(const CsvReader& reader, std::size_t column) {
  const double value = number_field(reader, column);
  if (value != 0 && value != 1) reader.refuse(column, "is 0 or 1");
  return value == 1;
}

// A share that was computed in single precision may exceed 1 by its rounding.
double share(const CsvReader& reader, std::size_t column) {
  const double value = number_field(reader, column);
  if (!(value >= 0 && value <= 1 + 1e-6)) reader.refuse(column, "a share lies in [0, 1]");
  return value;
}

double probability(const CsvReader& reader, std::size_t column) {
  const double value = number_field(reader, column);
  // Less than the runtime can draw; its inverse would drown everything else.
  constexpr double least = 1e-30;
  if (!(value > 0 && value <= 1)) reader.refuse(column, "a propensity lies in (0, 1]");
  if (value < least) reader.refuse(column, "a propensity below 1e-30 is no measurement");
  return value;
}

struct BanditRow {
  std::size_t item, position;
  double click, propensity;
};

std::vector<BanditRow> read_bandit_rows(const std::string& path,
                                        std::map<std::string, std::size_t>& items,
                                        std::map<std::string, std::size_t>& positions,
                                        BadRows& bad) {
  CsvReader reader(path);
  const std::size_t item = reader.require("item_id"), position = reader.require("position");
  const std::size_t click = reader.require("click"), score = reader.require("propensity_score");
  std::vector<BanditRow> rows;
  const auto index = [](std::map<std::string, std::size_t>& known, std::string_view text) {
    return known.try_emplace(std::string(text), known.size()).first->second;
  };
  for_each_row(reader, bad, [&] {
    const double clicked = finite(reader, click), propensity = probability(reader, score);
    rows.push_back({index(items, reader.field(item)), index(positions, reader.field(position)),
                    clicked, propensity});
  });
  if (rows.empty()) throw Failure(path + ": has no rows" + bad.reason());
  return rows;
}

nlohmann::ordered_json to_json(const PolicyValue& value) {
  return {{"mean", value.mean}, {"low", value.low}, {"high", value.high}};
}

}  // namespace off_policy

OffPolicyEvaluation evaluate_off_policy(const std::vector<LoggedDecision>& decisions) {
  using namespace off_policy;
  if (decisions.empty()) throw Failure("the log has no complete decision");
  OffPolicyEvaluation result;
  result.decisions = decisions.size();
  const auto n = static_cast<double>(decisions.size());
  std::vector<double> logged, ips, robust;
  // A step's sums over decisions: weights, weighted rewards, decisions that have it.
  struct Step {
    double weights = 0, rewards = 0, count = 0;
  };
  std::vector<Step> steps;
  std::vector<double> weights;
  for (const LoggedDecision& decision : decisions) {
    double weight = 1, reward = 0, scored = 0, corrected = 0;
    steps.resize(std::max(steps.size(), decision.size()));
    for (std::size_t k = 0; k < decision.size(); ++k) {
      const LoggedStep& step = decision[k];
      corrected += weight * step.target_value;
      weight *= step.ratio;
      corrected += weight * (step.reward - step.value);
      scored += weight * step.reward;
      reward += step.reward;
      steps[k].weights += weight;
      steps[k].rewards += weight * step.reward;
      steps[k].count += 1;
    }
    logged.push_back(reward);
    ips.push_back(scored);
    robust.push_back(corrected);
    weights.push_back(weight);
  }
  result.logged = interval(logged);
  result.ips = interval(ips);
  result.doubly_robust = interval(robust);
  result.effective_sample_size = effective_sample_size(weights);

  double mean = 0;
  for (const Step& step : steps)
    if (step.weights > 0) mean += step.rewards / step.weights * step.count / n;
  std::vector<double> influence;
  for (const LoggedDecision& decision : decisions) {
    double weight = 1, sum = mean;
    for (std::size_t k = 0; k < decision.size(); ++k) {
      weight *= decision[k].ratio;
      const Step& step = steps[k];
      if (step.weights > 0)
        sum +=
            weight * (decision[k].reward - step.rewards / step.weights) * step.count / step.weights;
    }
    influence.push_back(sum);
  }
  result.snips = interval(influence, mean);
  bool finite = std::isfinite(result.effective_sample_size);
  for (const PolicyValue* value :
       {&result.logged, &result.ips, &result.snips, &result.doubly_robust})
    finite = finite && std::isfinite(value->low) && std::isfinite(value->high);
  // The sums over a step's weights, by which snips divides.
  for (const Step& step : steps)
    finite = finite && std::isfinite(step.weights) && std::isfinite(step.rewards);
  if (!finite)
    throw Failure(
        "the log's propensities are so small, or its rewards so large, that the estimates "
        "overflow");
  return result;
}

namespace off_policy {

// The columns of the runtime's interaction log, as log_csv_header names them.
class LogColumns {
 public:
  LogColumns(const CsvReader& reader, double target_weight)
      : reader_(reader),
        weight_(target_weight),
        target_(static_cast<float>(target_weight), exploration_temperature) {}

  std::string id() const { return std::string(reader_.field(id_)); }
  void check_time() const {
    timestamp_field(reader_, time_, std::numeric_limits<std::int64_t>::min());
  }
  bool positive() const { return flag(reader_, positive_); }

  std::size_t place() const {  // from 0
    const double place = number_field(reader_, position_);
    if (!(place >= 1 && place <= 10'000) || place != std::floor(place))
      reader_.refuse(position_, "a position is a whole number from 1 to 10000");
    return static_cast<std::size_t>(place) - 1;
  }

  // An impression: the pool against the best of the ranking, at the evaluated weight.
  void read(LoggedStep& step) const {
    const double odds = number_field(reader_, logit_);
    const bool ranking_ended = odds == std::numeric_limits<double>::infinity();
    const double explore = ranking_ended ? 1 : weight_ * target_.win(odds);
    const double chosen = explore * share(reader_, share_) +
                          (flag(reader_, best_) && !ranking_ended ? 1 - explore : 0);
    step.value = expected_reward(reader_, expected_);
    step.target_value = explore * expected_reward(reader_, pool_expected_) +
                        (1 - explore) * expected_reward(reader_, best_expected_);
    step.ratio = chosen / probability(reader_, propensity_);
  }

 private:
  const CsvReader& reader_;
  double weight_;
  SlotPolicy target_;
  std::size_t time_ = reader_.require("TIMESTAMP"), id_ = reader_.require("RECOMMENDATION_ID"),
              position_ = reader_.require("POSITION"), positive_ = reader_.require("POSITIVE"),
              best_ = reader_.require("BEST"), propensity_ = reader_.require("PROPENSITY"),
              share_ = reader_.require("POOL_SHARE"), logit_ = reader_.require("POOL_LOGIT"),
              expected_ = reader_.require("EXPECTED"),
              best_expected_ = reader_.require("BEST_EXPECTED"),
              pool_expected_ = reader_.require("POOL_EXPECTED");
};

}  // namespace off_policy

std::vector<LoggedDecision> read_interaction_log(const std::string& path, double target_weight,
                                                 std::uint64_t& incomplete, BadRows& bad) {
  using namespace off_policy;
  CsvReader reader(path);
  const LogColumns columns(reader, target_weight);
  std::vector<LoggedDecision> decisions;
  std::unordered_map<std::string, std::size_t> index;
  constexpr double unseen = -1;
  for_each_row(reader, bad, [&] {
    columns.check_time();
    const std::size_t k = columns.place();
    const auto [found, added] = index.try_emplace(columns.id(), decisions.size());
    if (added) decisions.emplace_back();
    LoggedDecision& decision = decisions[found->second];
    if (decision.size() <= k) decision.resize(k + 1, LoggedStep{0, unseen, 0, 0});
    if (columns.positive())
      decision[k].reward = 1;
    else
      columns.read(decision[k]);  // of a bad row the step stays unseen, and its slate is left out
  });
  const std::size_t all = decisions.size();
  std::erase_if(decisions, [](const LoggedDecision& decision) {
    return std::any_of(decision.begin(), decision.end(),
                       [](const LoggedStep& step) { return step.ratio == unseen; });
  });
  incomplete = all - decisions.size();
  return decisions;
}

std::vector<LoggedDecision> read_open_bandit_log(const std::string& path,
                                                 const std::string& target_path, BadRows& bad) {
  using namespace off_policy;
  std::map<std::string, std::size_t> items, positions;
  const std::vector<BanditRow> rows = read_bandit_rows(path, items, positions, bad);
  std::vector<BanditRow> target_rows;
  if (!target_path.empty()) target_rows = read_bandit_rows(target_path, items, positions, bad);
  // [position][item]
  std::vector<std::vector<double>> target(
      positions.size(),
      std::vector<double>(items.size(),
                          target_rows.empty() ? 1.0 / static_cast<double>(items.size()) : 0.0));
  std::vector<double> shown(positions.size());
  for (const BanditRow& row : target_rows) shown[row.position] += 1;
  for (const BanditRow& row : target_rows)
    target[row.position][row.item] += 1 / shown[row.position];

  // Click rates from the even and from the odd rows; each half is judged by the other's.
  std::array<std::vector<double>, 2> clicks, counts;
  std::array<double, 2> clicked{}, count{};
  for (std::size_t half = 0; half < 2; ++half) {
    clicks[half].resize(items.size());
    counts[half].resize(items.size());
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    clicks[r % 2][rows[r].item] += rows[r].click;
    counts[r % 2][rows[r].item] += 1;
    clicked[r % 2] += rows[r].click;
    count[r % 2] += 1;
  }
  const auto value = [&](std::size_t half, std::size_t item) {
    const double mean = count[half] > 0 ? clicked[half] / count[half] : 0;
    return (clicks[half][item] + 100 * mean) / (counts[half][item] + 100);
  };
  std::array<std::vector<double>, 2> averaged;  // [half][position]
  for (std::size_t half = 0; half < 2; ++half)
    for (const auto& shares : target) {
      double sum = 0;
      for (std::size_t item = 0; item < items.size(); ++item)
        sum += shares[item] * value(half, item);
      averaged[half].push_back(sum);
    }
  std::vector<LoggedDecision> decisions;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const BanditRow& row = rows[r];
    const std::size_t other = 1 - r % 2;
    decisions.push_back({{row.click, target[row.position][row.item] / row.propensity,
                          value(other, row.item), averaged[other][row.position]}});
  }
  return decisions;
}

bool is_interaction_log(const std::string& path) {
  const CsvReader reader(path);
  if (reader.column("RECOMMENDATION_ID")) return true;
  if (reader.column("propensity_score")) return false;
  throw Failure(path +
                ": has neither RECOMMENDATION_ID (an interaction log of the runtime) nor "
                "propensity_score (Open Bandit Data)");
}

void run_off_policy(const OffPolicyOptions& options) {
  using namespace off_policy;
  std::uint64_t incomplete = 0;
  BadRows bad{.skip = options.skip_bad_rows};
  const bool own = is_interaction_log(options.log);
  if (own && !options.target_log.empty())
    throw Usage("--target-log is for Open Bandit Data; an interaction log takes --target-weight");
  if (!own && options.target_weight)
    throw Usage("--target-weight is for an interaction log; Open Bandit Data takes --target-log");
  const auto decisions =
      own ? read_interaction_log(options.log, options.target_weight.value_or(0), incomplete, bad)
          : read_open_bandit_log(options.log, options.target_log, bad);
  bad.report("evaluate");
  if (decisions.empty()) throw Failure(options.log + ": holds no complete decision" + bad.reason());
  const OffPolicyEvaluation result = evaluate_off_policy(decisions);
  // Below, the normal approximation of the intervals says little (the usual rule of thumb).
  constexpr double enough = 30;
  if (result.effective_sample_size < enough)
    note("evaluate", "warning: the estimates rest on an effective sample of " +
                         number_text(result.effective_sample_size) + " of " +
                         std::to_string(result.decisions) +
                         " decisions: the evaluated policy seldom does what the log shows, and the "
                         "intervals are not to be trusted");
  if (options.json) {
    print_json(nlohmann::ordered_json{{"protocol", "off-policy"},
                                      {"decisions", result.decisions},
                                      {"skipped", incomplete},
                                      {"bad_rows", bad.count},
                                      {"effective_sample_size", result.effective_sample_size},
                                      {"logged", to_json(result.logged)},
                                      {"inverse_propensity", to_json(result.ips)},
                                      {"self_normalised", to_json(result.snips)},
                                      {"doubly_robust", to_json(result.doubly_robust)}});
    return;
  }
  std::printf("%llu decisions (%llu incomplete ones left out), effective sample size %.0f\n",
              static_cast<unsigned long long>(result.decisions),
              static_cast<unsigned long long>(incomplete), result.effective_sample_size);
  std::printf("%-28s %10s   95 %% interval\n", "reward a decision", "mean");
  const auto row = [](const char* label, const PolicyValue& v) {
    std::printf("%-28s %10.5f   %.5f to %.5f\n", label, v.mean, v.low, v.high);
  };
  row("logging policy, observed", result.logged);
  row("inverse propensity", result.ips);
  row("self-normalised", result.snips);
  row("doubly robust", result.doubly_robust);
  std::fflush(stdout);
}

}  // namespace personalize::tools
