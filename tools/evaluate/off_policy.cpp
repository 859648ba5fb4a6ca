#include "evaluate/off_policy.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "command/command.hpp"
#include "data/csv.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

// The mean of the values with its interval.
PolicyValue interval(const std::vector<double>& values, double mean) {
  double square = 0;
  for (const double v : values) square += (v - mean) * (v - mean);
  const auto n = static_cast<double>(values.size());
  const double half_width = values.size() < 2 ? 0 : 1.959964 * std::sqrt(square / (n - 1) / n);
  return {mean, mean - half_width, mean + half_width};
}

PolicyValue interval(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return interval(values, sum / static_cast<double>(values.size()));
}

double number(const CsvReader& reader, std::size_t column) {
  const std::string text(reader.field(column));
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end != '\0' || std::isnan(value))
    reader.refuse(column, "'" + text + "' is not a number");
  return value;
}

double probability(const CsvReader& reader, std::size_t column) {
  const double value = number(reader, column);
  if (!(value > 0 && value <= 1)) reader.refuse(column, "a propensity lies in (0, 1]");
  return value;
}

// Runs read(), turning a bad row into a Failure that names file and line.
template <class Read>
void each_row(CsvReader& reader, Read read) {
  try {
    while (reader.next()) read();
  } catch (const BadRow& row) {
    throw Failure(reader.name() + ":" + std::to_string(row.line) + ": " +
                  (row.column.empty() ? "" : "column " + row.column + ": ") + row.reason);
  }
}

struct BanditRow {
  std::size_t item, position;
  double click, propensity;
};

std::vector<BanditRow> read_bandit_rows(const std::string& path,
                                        std::map<std::string, std::size_t>& items,
                                        std::map<std::string, std::size_t>& positions) {
  CsvReader reader(path);
  const std::size_t item = reader.require("item_id"), position = reader.require("position");
  const std::size_t click = reader.require("click"), score = reader.require("propensity_score");
  std::vector<BanditRow> rows;
  const auto index = [](std::map<std::string, std::size_t>& known, std::string_view text) {
    return known.try_emplace(std::string(text), known.size()).first->second;
  };
  each_row(reader, [&] {
    rows.push_back({index(items, reader.field(item)), index(positions, reader.field(position)),
                    number(reader, click), probability(reader, score)});
  });
  if (rows.empty()) throw Failure(path + ": has no rows");
  return rows;
}

nlohmann::json to_json(const PolicyValue& value) {
  return {{"mean", value.mean}, {"low", value.low}, {"high", value.high}};
}

}  // namespace

OffPolicyEvaluation evaluate_off_policy(const std::vector<LoggedDecision>& decisions) {
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
  double weights = 0, squares = 0;
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
    weights += weight;
    squares += weight * weight;
  }
  result.logged = interval(logged);
  result.ips = interval(ips);
  result.doubly_robust = interval(robust);
  result.effective_sample_size = squares > 0 ? weights * weights / squares : 0;

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
  return result;
}

std::vector<LoggedDecision> read_interaction_log(const std::string& path, double target_weight,
                                                 std::uint64_t& skipped) {
  CsvReader reader(path);
  const std::size_t id = reader.require("RECOMMENDATION_ID"), position = reader.require("POSITION");
  const std::size_t positive = reader.require("POSITIVE"), best = reader.require("BEST");
  const std::size_t propensity = reader.require("PROPENSITY"), share = reader.require("POOL_SHARE");
  const std::size_t logit = reader.require("POOL_LOGIT"), expected = reader.require("EXPECTED");
  const std::size_t best_expected = reader.require("BEST_EXPECTED");
  const std::size_t pool_expected = reader.require("POOL_EXPECTED");
  const SlotPolicy target(static_cast<float>(target_weight), exploration_temperature);

  std::vector<LoggedDecision> decisions;
  std::unordered_map<std::string, std::size_t> index;
  constexpr double unseen = -1;
  each_row(reader, [&] {
    const auto [found, added] = index.try_emplace(std::string(reader.field(id)), decisions.size());
    if (added) decisions.emplace_back();
    const double place = number(reader, position);
    if (!(place >= 1 && place <= 10'000) || place != std::floor(place))
      reader.refuse(position, "a position is a whole number from 1 to 10000");
    LoggedDecision& decision = decisions[found->second];
    const auto k = static_cast<std::size_t>(place) - 1;
    if (decision.size() <= k) decision.resize(k + 1, LoggedStep{0, unseen, 0, 0});
    LoggedStep& step = decision[k];
    if (number(reader, positive) > 0) {
      step.reward = 1;
      return;
    }
    // The pool against the best of the ranking, at the evaluated weight.
    const double odds = number(reader, logit);
    const bool ranking_ended = odds == std::numeric_limits<double>::infinity();
    const double explore = ranking_ended ? 1 : target_weight * target.win(odds);
    const double chosen = explore * number(reader, share) +
                          (number(reader, best) > 0 && !ranking_ended ? 1 - explore : 0);
    step.ratio = chosen / probability(reader, propensity);
    step.value = number(reader, expected);
    step.target_value =
        explore * number(reader, pool_expected) + (1 - explore) * number(reader, best_expected);
  });
  const std::size_t all = decisions.size();
  std::erase_if(decisions, [](const LoggedDecision& decision) {
    return std::any_of(decision.begin(), decision.end(),
                       [](const LoggedStep& step) { return step.ratio == unseen; });
  });
  skipped = all - decisions.size();
  return decisions;
}

std::vector<LoggedDecision> read_open_bandit_log(const std::string& path,
                                                 const std::string& target_path) {
  std::map<std::string, std::size_t> items, positions;
  const std::vector<BanditRow> rows = read_bandit_rows(path, items, positions);
  std::vector<BanditRow> target_rows;
  if (!target_path.empty()) target_rows = read_bandit_rows(target_path, items, positions);
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
  std::uint64_t skipped = 0;
  const bool own = is_interaction_log(options.log);
  if (own && !options.target_log.empty())
    throw Usage("--target-log is for Open Bandit Data; an interaction log takes --target-weight");
  const OffPolicyEvaluation result =
      evaluate_off_policy(own ? read_interaction_log(options.log, options.target_weight, skipped)
                              : read_open_bandit_log(options.log, options.target_log));
  if (options.json) {
    std::cout << nlohmann::json{{"protocol", "off-policy"},
                                {"decisions", result.decisions},
                                {"skipped", skipped},
                                {"effective_sample_size", result.effective_sample_size},
                                {"logged", to_json(result.logged)},
                                {"inverse_propensity", to_json(result.ips)},
                                {"self_normalised", to_json(result.snips)},
                                {"doubly_robust", to_json(result.doubly_robust)}}
                     .dump(2)
              << '\n';
    return;
  }
  std::printf("%llu decisions (%llu incomplete ones left out), effective sample size %.0f\n",
              static_cast<unsigned long long>(result.decisions),
              static_cast<unsigned long long>(skipped), result.effective_sample_size);
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
