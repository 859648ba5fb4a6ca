#include "evaluate/evaluate.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "command/parallel.hpp"
#include "evaluate/off_policy.hpp"
#include "recommend/known_items.hpp"

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

nlohmann::ordered_json to_json(const Evaluation& e, const EvaluationOptions& options,
                               const KnownItems& known, const std::vector<std::string>& warnings) {
  nlohmann::ordered_json out{{"protocol", name(options.protocol)},
                             {"users", e.users},
                             {"predicted_events", e.predicted_events},
                             {"interactions", known.interactions},
                             {"items", known.items},
                             {"known_items", known.known_items},
                             {"exclusion_window", options.exclusion_window},
                             {"coverage", e.coverage},
                             {"mean_reciprocal_rank_at_25", e.mean.reciprocal_rank}};
  for (std::size_t c = 0; c < SlateMetrics::cutoffs.size(); ++c) {
    const std::string at = "_at_" + std::to_string(SlateMetrics::cutoffs[c]);
    out["normalized_discounted_cumulative_gain" + at] = e.mean.ndcg[c];
    out["precision" + at] = e.mean.precision[c];
    out["recall" + at] = e.mean.recall[c];
  }
  out["seconds"] = e.seconds;
  out["warnings"] = warnings;
  return out;
}

void print_text(const Evaluation& e, const EvaluationOptions& options, const KnownItems& known) {
  const auto count = [](std::uint64_t n) { return static_cast<unsigned long long>(n); };
  std::printf(
      "protocol %s, %llu users, %llu events to predict, %llu of %llu items known to the model, "
      "%.1f s\n",
      std::string(name(options.protocol)).c_str(), count(e.users), count(e.predicted_events),
      count(known.known_items), count(known.items), e.seconds);
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

// What a model's metadata tells of its training; a model from elsewhere tells nothing.
struct Trained {
  std::optional<Protocol> protocol;
  std::optional<std::uint64_t> seed;
  std::optional<std::int64_t> users, interactions, first_timestamp, last_timestamp;
};

Trained trained_with(const Model& model) {
  const auto metadata =
      nlohmann::json::parse(model.parts().metadata, nullptr, /*allow_exceptions=*/false);
  Trained trained;
  if (!metadata.is_object()) return trained;
  if (const auto found = metadata.find("protocol"); found != metadata.end() && found->is_string())
    for (const Protocol protocol : {Protocol::leave_one_out, Protocol::holdout, Protocol::all})
      if (found->get<std::string>() == name(protocol)) trained.protocol = protocol;
  if (const auto found = metadata.find("seed");
      found != metadata.end() && found->is_number_unsigned())
    trained.seed = found->get<std::uint64_t>();
  const auto data = metadata.find("data");
  if (data == metadata.end() || !data->is_object()) return trained;
  for (const auto& [key, value] :
       {std::pair{"users", &trained.users}, std::pair{"interactions", &trained.interactions},
        std::pair{"first_timestamp", &trained.first_timestamp},
        std::pair{"last_timestamp", &trained.last_timestamp}})
    if (const auto found = data->find(key); found != data->end() && found->is_number_integer())
      *value = found->get<std::int64_t>();
  return trained;
}

// "2026-11-27", in UTC.
std::string date(std::int64_t timestamp) {
  const auto seconds = static_cast<std::time_t>(timestamp);
  std::tm day{};
  char text[32];
  if (!::gmtime_r(&seconds, &day) || std::strftime(text, sizeof text, "%Y-%m-%d", &day) == 0)
    return std::to_string(timestamp);
  return text;
}

// Events to be predicted that are no later than the end of the model's training data.
std::uint64_t not_later(const Dataset& data, const EvaluationOptions& options, std::int64_t end) {
  std::uint64_t events = 0;
  for (const Task& task : tasks_of(data, options)) {
    const auto& history = data.histories[task.user];
    events += static_cast<std::uint64_t>(
        std::count_if(history.begin() + static_cast<std::ptrdiff_t>(task.given), history.end(),
                      [&](const Event& event) { return event.timestamp <= end; }));
  }
  return events;
}

// What the protocol that the model was trained for makes of this one's figures.
std::optional<std::string> protocol_doubt(const Trained& trained,
                                          const EvaluationOptions& options) {
  const std::string protocol(name(options.protocol));
  if (!trained.protocol)
    return "the model file does not say what it was trained on; if that includes the events to "
           "predict, the figures are too good";
  if (*trained.protocol != options.protocol)
    return "the model was trained for --protocol " + std::string(name(*trained.protocol)) +
           ": events that " + protocol +
           " asks for taught it or chose it, and the figures are too good; train with --protocol " +
           protocol;
  if (options.protocol == Protocol::holdout && trained.seed && *trained.seed != options.seed)
    return "the model was trained with --seed " + std::to_string(*trained.seed) +
           ": most of the users that --seed " + std::to_string(options.seed) +
           " holds out taught it, and the figures are too good";
  return std::nullopt;
}

// "6123 of 300 users, 2026-01-02 to 2026-03-02"
std::string extent(std::int64_t interactions, std::int64_t users, std::int64_t first,
                   std::int64_t last) {
  return std::to_string(interactions) + " of " + std::to_string(users) + " users, " + date(first) +
         " to " + date(last);
}

// What it makes of them that the model was trained on other interactions.
std::optional<std::string> data_doubt(const Trained& trained, const Dataset& data,
                                      const EvaluationOptions& options) {
  if (!trained.users || !trained.interactions || !trained.first_timestamp ||
      !trained.last_timestamp)
    return std::nullopt;
  const auto interactions = static_cast<std::int64_t>(data.interactions);
  const auto users = static_cast<std::int64_t>(data.user_ids.size());
  if (*trained.interactions == interactions && *trained.users == users &&
      *trained.first_timestamp == data.first_timestamp &&
      *trained.last_timestamp == data.last_timestamp)
    return std::nullopt;
  std::string text = "the model was trained on other interactions (" +
                     extent(*trained.interactions, *trained.users, *trained.first_timestamp,
                            *trained.last_timestamp) +
                     ") than these (" +
                     extent(interactions, users, data.first_timestamp, data.last_timestamp) + ")";
  const std::uint64_t seen = not_later(data, options, *trained.last_timestamp);
  if (seen > 0)
    text += "; " + std::to_string(seen) +
            " of the events to predict are not later than all of those, and may be among them: the "
            "figures may be too good";
  return text;
}

}  // namespace evaluate_command

std::vector<std::string> doubts(const Model& model, const Dataset& data,
                                const EvaluationOptions& options) {
  using namespace evaluate_command;
  const Trained trained = trained_with(model);
  std::vector<std::string> found;
  if (auto doubt = protocol_doubt(trained, options)) found.push_back(std::move(*doubt));
  if (auto doubt = data_doubt(trained, data, options)) found.push_back(std::move(*doubt));
  return found;
}

namespace evaluate_command {

struct Options {
  std::string model, protocol;
  DatasetOptions data;
  OffPolicyOptions off_policy;
  std::uint32_t exclusion_window = EvaluationOptions{}.exclusion_window;
  std::optional<std::uint64_t> seed;
  unsigned threads = 0;
  bool json = false;
  std::vector<CLI::Option*> of_a_model, of_a_log;  // by protocol: the others are refused
};

// The protocol and the seed: as given or else as the model was trained with.
EvaluationOptions settings_of(const Options& options, const Trained& trained) {
  EvaluationOptions settings;
  settings.protocol = !options.protocol.empty()
                          ? parse_protocol(options.protocol)
                          : trained.protocol.value_or(Protocol::leave_one_out);
  if (settings.protocol == Protocol::all)
    throw Usage(
        "the model was trained on all events: nothing is held out; give --protocol to measure on "
        "events that it has seen");
  settings.seed = options.seed.value_or(trained.seed.value_or(0));
  settings.exclusion_window = options.exclusion_window;
  settings.threads = thread_count(options.threads);
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
    OffPolicyOptions off_policy_options = options.off_policy;
    off_policy_options.json = options.json;
    off_policy_options.skip_bad_rows = options.data.skip_bad_rows;
    return run_off_policy(off_policy_options);
  }
  if (options.model.empty() || options.data.interactions.empty())
    throw Usage("--model and --interactions are required");
  auto model = Model::load(options.model);
  if (!model) throw Failure(model.error().message);
  const EvaluationOptions settings = settings_of(options, trained_with(**model));
  Progress reading("read");
  const Dataset data = read_dataset(options.data, &reading);
  reading.finish("");
  report(data, "evaluate");
  const KnownItems known = known_items(data, data.histories, **model);
  if (const auto unknown =
          report_known(data, known, **model, options.data.interactions,
                       "teach it nothing; where they are to be predicted they count as missed"))
    note("evaluate", *unknown);
  const std::vector<std::string> warnings = doubts(**model, data, settings);
  for (const std::string& warning : warnings) note("evaluate", "warning: " + warning);
  Progress progress("evaluate");
  const Evaluation result = evaluate(*model, data, settings, &progress);
  progress.finish("");
  if (options.json)
    print_json(to_json(result, settings, known, warnings));
  else
    print_text(result, settings, known);
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
  for_models(add_model(*command, options->model));
  for_models(add_interactions(*command, options->data.interactions,
                              "CSV with the histories to predict the ends of"));
  add_choice<std::string>(
      *command, "--protocol", options->protocol,
      {{"leave-one-out", "leave-one-out"}, {"holdout", "holdout"}, {"off-policy", "off-policy"}},
      "How to measure; off-policy takes --log")
      ->default_str("the model's");
  for_logs(command->add_option("--log", options->off_policy.log,
                               "Off-policy: the runtime's interaction log, or Open Bandit Data"));
  for_logs(add_number(*command, "--target-weight", options->off_policy.target_weight,
                      "Off-policy, interaction log: the exploration weight to evaluate", 0, 1,
                      "0"));
  for_logs(command
               ->add_option("--target-log", options->off_policy.target_log,
                            "Off-policy, Open Bandit Data: evaluate the policy that wrote this log")
               ->default_str("every item alike"));
  for_models(command->add_option("--seed", options->seed, "Of the holdout users")
                 ->default_str("the model's"));
  for_models(add_number(*command, "--exclusion-window", options->exclusion_window,
                        "A user's last items that are not recommended again; 0: none", 0, 65535));
  for (CLI::Option* const option : add_event_options(*command, options->data)) for_models(option);
  for_models(add_threads(*command, options->threads));
  add_skip_bad_rows(*command, options->data.skip_bad_rows);
  add_json(*command, options->json);
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
