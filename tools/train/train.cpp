#include "train/train.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/output.hpp"
#include "data/dataset.hpp"
#include "train/trainer.hpp"

namespace personalize::tools {
namespace train_command {

struct Arguments {
  DatasetOptions data;
  TrainOptions train;
  bool json = false;
};

void check(const TrainOptions& o) {
  require_range("--hidden-dimension", static_cast<double>(o.hidden_dimension), 32, 256);
  require_range("--bptt", static_cast<double>(o.bptt), 2, 32);
  require_range("--layers", static_cast<double>(o.layers), 1, 4);
  require_range("--feed-forward", static_cast<double>(o.feed_forward), 0, 8);
  require_range("--dropout", o.dropout, 0.0, 0.9);
  require_range("--learning-rate", o.learning_rate, 1e-6, 1.0);
  require_range("--weight-decay", o.weight_decay, 0.0, 1.0);
  require_range("--batch-size", static_cast<double>(o.batch_size), 1, 4096);
  require_range("--epochs", static_cast<double>(o.epochs), 1, 10000);
  require_range("--patience", static_cast<double>(o.patience), 0, 10000);
  require_range("--validation-users", static_cast<double>(o.validation_users), 0, 1e7);
  require_range("--max-minutes", o.max_minutes, 0.0, 1e6);
  require_range("--clip-norm", o.clip_norm, 0.0, 1e6);
  require_range("--threads", o.threads, 0, 1024);
  require_range("--min-user-history-length-percentile", o.min_user_history_length_percentile, 0.0,
                1.0);
  require_range("--max-user-history-length-percentile", o.max_user_history_length_percentile, 0.0,
                1.0);
  if (o.min_user_history_length_percentile > o.max_user_history_length_percentile)
    throw Usage(
        "--min-user-history-length-percentile is above --max-user-history-length-percentile");
}

void print_summary(const TrainSummary& s, const TrainOptions& options) {
  nlohmann::ordered_json json = {{"model", options.output},
                                 {"complete", !s.interrupted},
                                 {"epochs", s.epochs},
                                 {"best_epoch", s.best_epoch},
                                 {"steps", s.steps},
                                 {"loss", s.loss},
                                 {"items", s.items},
                                 {"training_users", s.training_users},
                                 {"events_per_epoch", s.events_per_epoch},
                                 {"parameters", s.parameters},
                                 {"events_per_second", s.events_per_second},
                                 {"seconds", s.seconds}};
  if (s.best_epoch > 0)
    json["validation"] = {{"users", s.validation.users},
                          {"ndcg_at_10", s.validation.ndcg10},
                          {"recall_at_10", s.validation.recall10}};
  if (s.interrupted) json["checkpoint"] = s.checkpoint;
  print_json(json);
}

void run(Arguments& arguments) {
  check(arguments.train);
  // Before the training rather than after it.
  const TrainOptions& options = arguments.train;
  if (is_device(options.output)) {
    if (options.checkpoint.empty())
      throw Usage("-o " + options.output + " is no regular file: name a --checkpoint file as well");
    if (arguments.json && is_standard_output(options.output))
      throw Usage("--json and the model cannot both go to standard output");
  }
  if (is_device(checkpoint_path(options)))
    throw Usage("--checkpoint " + options.checkpoint + " is no regular file");
  for (const std::string& path : {options.output, checkpoint_path(options)}) require_writable(path);
  Progress reading("read");
  const Dataset dataset = read_dataset(arguments.data, &reading);
  dataset.bad_rows.report("train");
  arguments.train.interrupted = [] { return noted_signal() != 0; };
  note_signals();
  const TrainSummary summary = train(dataset, options);
  if (arguments.json) print_summary(summary, options);
  if (summary.interrupted)
    throw Interrupted(noted_signal(), "interrupted; " + options.output +
                                          " holds the best so far; go on with --resume (" +
                                          summary.checkpoint + ")");
}

// An option that takes one of a few words.
template <class T>
void add_choice(CLI::App& command, const std::string& name, T& value,
                const std::vector<std::pair<std::string, T>>& choices, const std::string& text) {
  std::vector<std::string> words;
  std::string initial;
  for (const auto& [word, meaning] : choices) {
    words.push_back(word);
    if (meaning == value) initial = word;
  }
  command
      .add_option_function<std::string>(
          name,
          [&value, choices](const std::string& chosen) {
            value = std::find_if(choices.begin(), choices.end(), [&](const auto& choice) {
                      return choice.first == chosen;
                    })->second;
          },
          text)
      ->check(CLI::IsMember(words))
      ->default_str(initial);
}

}  // namespace train_command

void add_train(CLI::App& app) {
  using namespace train_command;
  CLI::App* command = app.add_subcommand("train", train_description);
  auto arguments = std::make_shared<Arguments>();
  DatasetOptions& data = arguments->data;
  TrainOptions& o = arguments->train;
  command
      ->add_option(
          "interactions,--interactions", data.interactions,
          "CSV (plain or zstd) with USER_ID, ITEM_ID, TIMESTAMP and optionally EVENT_TYPE; "
          "as an argument or as an option")
      ->required();
  command->add_option("--items", data.items, "CSV with ITEM_ID and metadata columns");
  command->add_option("-o,--output", o.output, "The model file to write")->default_val("model.pzm");
  command->add_option("--event-type", data.event_type_filter,
                      "Keep only events of this EVENT_TYPE");
  command->add_flag("--skip-bad-rows", data.skip_bad_rows,
                    "Leave out malformed rows and report them");
  add_choice(*command, "--protocol", o.protocol,
             {{"leave-one-out", Protocol::leave_one_out},
              {"holdout", Protocol::holdout},
              {"all", Protocol::all}},
             "What is hidden from training for later evaluation");
  const auto number = [&](const char* name, auto& value, const char* text) {
    command->add_option(name, value, text)->capture_default_str();
  };
  number("--hidden-dimension", o.hidden_dimension,
         "Width of item vectors and hidden state, [32, 256]");
  number("--bptt", o.bptt, "Steps of truncated back-propagation through time, [2, 32]");
  number("--layers", o.layers, "GRU blocks, [1, 4]");
  number("--feed-forward", o.feed_forward,
         "Width of a block's feed-forward part in hidden dimensions, [0, 8]");
  number("--dropout", o.dropout, "[0, 0.9]");
  number("--learning-rate", o.learning_rate, "AdamW's peak rate, [1e-6, 1]");
  number("--weight-decay", o.weight_decay, "On matrices only, [0, 1]");
  number("--batch-size", o.batch_size,
         "Parallel streams at most; small data takes fewer, [1, 4096]");
  number("--epochs", o.epochs, "Length of the cosine schedule, [1, 10000]");
  number("--patience", o.patience, "Epochs without better validation before stopping; 0: never");
  number("--max-minutes", o.max_minutes, "Time limit that the schedule also ends by; 0: none");
  number("--clip-norm", o.clip_norm, "Largest norm of the gradient; 0: any");
  number("--seed", o.seed,
         "Of everything random: the same seed, data and --threads give the same model");
  number("--threads", o.threads, "0: all cores; [0, 1024]");
  number("--validation-users", o.validation_users,
         "Users sampled for validation, [0, 1e7]; 0: none, the last epoch is kept");
  number("--min-user-history-length-percentile", o.min_user_history_length_percentile,
         "Users with shorter histories leave the training data, [0, 1]");
  number("--max-user-history-length-percentile", o.max_user_history_length_percentile,
         "Users with longer histories leave the training data, [0, 1]");
  add_choice(*command, "--time-gap", o.time_gap,
             {{"auto", TimeGap::automatic}, {"on", TimeGap::on}, {"off", TimeGap::off}},
             "Embedding of the time since the previous event; auto: where gaps differ");
  add_choice(*command, "--element-type", o.element_type,
             {{"int8", ElementType::i8}, {"int4", ElementType::i4}, {"f32", ElementType::f32}},
             "Of the matrices in the model file");
  command->add_option("--checkpoint", o.checkpoint, "Default: OUTPUT.checkpoint");
  command->add_flag("--resume", o.resume, "Go on from the checkpoint of an interrupted run");
  command->add_flag("--json", arguments->json, "Print a summary as JSON on stdout");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace personalize::tools
