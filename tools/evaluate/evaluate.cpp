#include "evaluate/evaluate.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/parallel.hpp"
#include "evaluate/off_policy.hpp"

namespace personalize::tools {
namespace evaluate_command {

constexpr std::uint32_t slate_length = 25;

// The users to evaluate, each with the number of events that are given; the rest is to be
// predicted.
struct Task {
  std::uint32_t user;
  std::size_t given;
};

std::vector<Task> tasks_of(const Dataset& data, const EvaluationOptions& options) {
  std::vector<Task> tasks;
  for (std::uint32_t user = 0; user < data.histories.size(); ++user) {
    const UserSplit split = split_user(options.protocol, options.seed, data.user_ids[user],
                                       data.histories[user].size());
    if (split.test_begin < data.histories[user].size()) tasks.push_back({user, split.test_begin});
  }
  return tasks;
}

class Evaluator {
 public:
  Evaluator(Recommender& recommender, const Dataset& data, const EvaluationOptions& options)
      : recommender_(recommender), data_(data), exclude_(options.exclusion_window > 0) {}

  SlateMetrics user(const Task& task, std::vector<std::string_view>& slate_items) {
    const std::string id(data_.user_ids[task.user]);
    const auto& history = data_.histories[task.user];
    for (std::size_t e = 0; e < task.given; ++e) {
      const Event& event = history[e];
      const std::string_view type =
          data_.event_types.size() == 0 ? std::string_view{} : data_.event_types[event.event_type];
      const auto recorded = recommender_.record({.user = id,
                                                 .item = data_.item_ids[event.item],
                                                 .event_type = type,
                                                 .timestamp = event.timestamp});
      if (!recorded) throw Failure("user " + id + ": " + recorded.error().message);
    }
    const auto served = recommender_.recommend(
        {.user = id, .count = slate_length, .exclude_interacted = exclude_}, slate_);
    if (!served) throw Failure("user " + id + ": " + served.error().message);
    recommender_.forget(id);
    slate_items.clear();
    for (const Pick& pick : slate_.items) slate_items.push_back(pick.item);
    relevant_.clear();
    for (std::size_t e = task.given; e < history.size(); ++e) {
      const std::string_view item = data_.item_ids[history[e].item];
      if (std::find(relevant_.begin(), relevant_.end(), item) == relevant_.end())
        relevant_.push_back(item);
    }
    return slate_metrics(slate_items, relevant_);
  }

 private:
  Recommender& recommender_;
  const Dataset& data_;
  bool exclude_;
  Slate slate_;
  std::vector<std::string_view> relevant_;
};

nlohmann::json to_json(const Evaluation& e, const EvaluationOptions& options) {
  nlohmann::json out;
  out["protocol"] = std::string(name(options.protocol));
  out["users"] = e.users;
  out["predicted_events"] = e.predicted_events;
  out["exclusion_window"] = options.exclusion_window;
  out["coverage"] = e.coverage;
  out["mean_reciprocal_rank_at_25"] = e.mean.reciprocal_rank;
  for (std::size_t c = 0; c < SlateMetrics::cutoffs.size(); ++c) {
    const std::string at = "_at_" + std::to_string(SlateMetrics::cutoffs[c]);
    out["normalized_discounted_cumulative_gain" + at] = e.mean.ndcg[c];
    out["precision" + at] = e.mean.precision[c];
    out["recall" + at] = e.mean.recall[c];
  }
  out["seconds"] = e.seconds;
  return out;
}

void print_text(const Evaluation& e, const EvaluationOptions& options) {
  std::printf("protocol %s, %llu users, %llu events to predict, %.1f s\n",
              std::string(name(options.protocol)).c_str(), static_cast<unsigned long long>(e.users),
              static_cast<unsigned long long>(e.predicted_events), e.seconds);
  std::printf("%-10s %10s %10s %10s\n", "", "@5", "@10", "@25");
  const auto row = [](const char* label, const std::array<double, 3>& values) {
    std::printf("%-10s %10.4f %10.4f %10.4f\n", label, values[0], values[1], values[2]);
  };
  row("NDCG", e.mean.ndcg);
  row("precision", e.mean.precision);
  row("recall", e.mean.recall);
  std::printf("%-10s %10s %10s %10.4f\n", "MRR", "", "", e.mean.reciprocal_rank);
  std::printf("coverage   %.4f\n", e.coverage);
  std::fflush(stdout);
}

}  // namespace evaluate_command

Evaluation evaluate(const std::shared_ptr<const Model>& model, const Dataset& data,
                    const EvaluationOptions& options, Progress* progress) {
  using namespace evaluate_command;
  const auto start = std::chrono::steady_clock::now();
  // The bare model's ranking.
  auto recommender =
      Recommender::create(model, {.history_length = std::max(1u, options.exclusion_window),
                                  .exploration_weight = 0,
                                  .feedback = false});
  if (!recommender) throw Failure(recommender.error().message);
  const std::vector<Task> tasks = tasks_of(data, options);
  if (tasks.empty())
    throw Failure("the protocol leaves no user to evaluate: histories are too short");

  std::vector<SlateMetrics> figures(tasks.size());
  std::vector<std::atomic<bool>> covered(model->item_count());
  std::mutex mutex;  // of progress
  for_each_parallel(tasks.size(), options.threads, [&] {
    return [&, evaluator = Evaluator(*recommender, data, options),
            slate = std::vector<std::string_view>{}](std::size_t t) mutable {
      figures[t] = evaluator.user(tasks[t], slate);
      for (const std::string_view item : slate)
        covered[*model->find_item(item)].store(true, std::memory_order_relaxed);
      if (!progress || t % 256 != 0) return;
      const std::lock_guard lock{mutex};
      progress->update(static_cast<double>(t) / static_cast<double>(tasks.size()),
                       std::to_string(t) + " of " + std::to_string(tasks.size()) + " users");
    };
  });

  // Summed in task order, so that the figures do not depend on the number of threads.
  Evaluation result;
  for (const SlateMetrics& figure : figures) result.mean += figure;
  result.mean = result.mean / static_cast<double>(tasks.size());
  result.users = tasks.size();
  for (const Task& task : tasks)
    result.predicted_events += data.histories[task.user].size() - task.given;
  result.coverage = static_cast<double>(std::count(covered.begin(), covered.end(), true)) /
                    static_cast<double>(model->item_count());
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

namespace evaluate_command {

struct Options {
  std::string model, interactions, protocol, event_type;
  OffPolicyOptions off_policy;
  std::uint32_t exclusion_window = EvaluationOptions{}.exclusion_window;
  std::optional<std::uint64_t> seed;
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  bool json = false, skip_bad_rows = false;
  std::vector<CLI::Option*> of_a_model, of_a_log;  // by protocol: the others are refused
};

// The protocol and the seed: as given or else as the model was trained with.
EvaluationOptions settings_of(const Options& options, const Model& model) {
  const auto metadata =
      nlohmann::json::parse(model.parts().metadata, nullptr, /*allow_exceptions=*/false);
  const auto trained_with = [&](const char* key) -> const nlohmann::json* {
    return metadata.is_object() && metadata.contains(key) ? &metadata[key] : nullptr;
  };
  EvaluationOptions settings;
  std::string protocol = options.protocol;
  if (const auto* known = trained_with("protocol"); protocol.empty() && known && known->is_string())
    protocol = known->get<std::string>();
  settings.protocol = parse_protocol(protocol.empty() ? "leave-one-out" : protocol);
  if (settings.protocol == Protocol::all)
    throw Usage(
        "the model was trained on all events: nothing is held out; give --protocol to measure on "
        "events that it has seen");
  settings.seed = options.seed.value_or(0);
  if (const auto* known = trained_with("seed");
      !options.seed && known && known->is_number_unsigned())
    settings.seed = known->get<std::uint64_t>();
  return settings;
}

void run(const Options& options) {
  const bool off_policy = options.protocol == "off-policy";
  for (const CLI::Option* option : off_policy ? options.of_a_model : options.of_a_log)
    if (option->count() > 0)
      throw Usage("option " + option->get_name() + " has no meaning " +
                  (off_policy ? "with" : "without") + " --protocol off-policy");
  if (off_policy) {
    if (options.off_policy.log.empty()) throw Usage("--protocol off-policy needs --log");
    require_range("--target-weight", options.off_policy.target_weight.value_or(0), 0, 1);
    OffPolicyOptions off_policy_options = options.off_policy;
    off_policy_options.json = options.json;
    off_policy_options.skip_bad_rows = options.skip_bad_rows;
    return run_off_policy(off_policy_options);
  }
  if (options.model.empty() || options.interactions.empty())
    throw Usage("--model and --interactions are required");
  auto model = Model::load(options.model);
  if (!model) throw Failure(model.error().message);
  EvaluationOptions settings = settings_of(options, **model);
  settings.exclusion_window = options.exclusion_window;
  settings.threads = options.threads;
  DatasetOptions files;
  files.interactions = options.interactions;
  files.skip_bad_rows = options.skip_bad_rows;
  files.event_type_filter = options.event_type;
  const Dataset data = read_dataset(files);
  data.bad_rows.report("evaluate");
  Progress progress("evaluating");
  const Evaluation result = evaluate(*model, data, settings, &progress);
  progress.finish("");
  if (options.json)
    print_json(to_json(result, settings));
  else
    print_text(result, settings);
}

}  // namespace evaluate_command

void add_evaluate(CLI::App& app) {
  using namespace evaluate_command;
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "evaluate",
      "Measure a model file on held-out interactions, served through the runtime, or another "
      "policy on the log of the one that ran");
  const auto for_models = [&](CLI::Option* option) { options->of_a_model.push_back(option); };
  const auto for_logs = [&](CLI::Option* option) { options->of_a_log.push_back(option); };
  for_models(command->add_option("--model,-m", options->model, "Model file (.pzm)"));
  for_models(command->add_option("--interactions,-i", options->interactions,
                                 "Interactions CSV (or .csv.zst)"));
  command->add_option("--protocol", options->protocol,
                      "leave-one-out, holdout (default: the one that the model was trained for) or "
                      "off-policy, which takes --log");
  for_logs(command->add_option("--log", options->off_policy.log,
                               "Off-policy: the runtime's interaction log, or Open Bandit Data"));
  for_logs(command->add_option("--target-weight", options->off_policy.target_weight,
                               "Off-policy, interaction log: the exploration weight to evaluate, 0 "
                               "to 1 (default: 0)"));
  for_logs(command->add_option("--target-log", options->off_policy.target_log,
                               "Off-policy, Open Bandit Data: evaluate the policy that wrote this "
                               "log (default: every item alike)"));
  for_models(command->add_option(
      "--seed", options->seed,
      "Of the holdout users (default: the one that the model was trained with)"));
  for_models(command
                 ->add_option("--exclusion-window", options->exclusion_window,
                              "A user's last items that are not recommended again, 0 to 65535; 0: "
                              "none")
                 ->check(CLI::Range(0u, 65535u))
                 ->capture_default_str());
  for_models(command->add_option("--event-type", options->event_type,
                                 "Use only events of this EVENT_TYPE"));
  for_models(
      command->add_option("--threads", options->threads, "1 to 256")->check(CLI::Range(1u, 256u)));
  command->add_flag("--skip-bad-rows", options->skip_bad_rows, "Leave out malformed rows");
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
