#include "train/train.hpp"

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
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

void print_summary(const TrainSummary& s, const TrainOptions& options) {
  nlohmann::ordered_json json = {{"output", options.output},
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
                          {"normalized_discounted_cumulative_gain_at_10", s.validation.ndcg10},
                          {"recall_at_10", s.validation.recall10}};
  if (s.interrupted) json["checkpoint"] = s.checkpoint;
  print_json(json);
}

void run(Arguments& arguments) {
  const TrainOptions& options = arguments.train;
  if (options.min_user_history_length_percentile > options.max_user_history_length_percentile)
    throw Usage(
        "--min-user-history-length-percentile is above --max-user-history-length-percentile");
  // Before the training rather than after it.
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
  reading.finish("");
  require_sequences(dataset, arguments.data.interactions);
  report(dataset, "train", /*describe=*/true);
  arguments.train.interrupted = [] { return noted_signal() != 0; };
  note_signals();
  const TrainSummary summary = train(dataset, options);
  if (arguments.json) print_summary(summary, options);
  if (summary.interrupted)
    throw Interrupted(noted_signal(), "interrupted; " + options.output +
                                          " holds the best so far; go on with --resume (" +
                                          summary.checkpoint + ")");
}

}  // namespace train_command

void add_train(CLI::App& app) {
  using namespace train_command;
  CLI::App* command = app.add_subcommand("train", train_description);
  auto arguments = std::make_shared<Arguments>();
  DatasetOptions& data = arguments->data;
  TrainOptions& o = arguments->train;
  add_interactions(*command, data.interactions,
                   "CSV (plain, gzip, zstd or zip) or JSON lines with USER_ID, ITEM_ID, TIMESTAMP "
                   "and optionally EVENT_TYPE and EVENT_VALUE")
      ->required();
  command->add_option("--items", data.items,
                      "The same with ITEM_ID, optionally CREATION_TIMESTAMP, and metadata columns");
  o.output = "model.pzm";
  add_output(*command, o.output, "The model file to write")->capture_default_str();
  add_event_options(*command, data);
  add_item_options(*command, data);
  add_skip_bad_rows(*command, data.skip_bad_rows);
  add_choice<Protocol>(*command, "--protocol", o.protocol,
                       {{"leave-one-out", Protocol::leave_one_out},
                        {"holdout", Protocol::holdout},
                        {"all", Protocol::all}},
                       "What is hidden from training for later evaluation");
  const auto number = [&](const char* name, auto& value, const char* text, double low,
                          double high) { add_number(*command, name, value, text, low, high); };
  number("--hidden-dimension", o.hidden_dimension, "Width of item vectors and hidden state", 32,
         256);
  number("--bptt", o.bptt, "Steps of truncated back-propagation through time", 2, 32);
  number("--layers", o.layers, "GRU blocks", 1, 4);
  number("--feed-forward", o.feed_forward,
         "Width of a block's feed-forward part in hidden dimensions", 0, 8);
  number("--dropout", o.dropout, "Share of values that a step leaves out", 0, 0.9);
  number("--learning-rate", o.learning_rate, "AdamW's peak rate", 1e-6, 1);
  number("--weight-decay", o.weight_decay, "On matrices only", 0, 1);
  number("--batch-size", o.batch_size, "Parallel streams at most; small data takes fewer", 1, 4096);
  number("--epochs", o.epochs, "Length of the cosine schedule", 1, 10'000);
  number("--patience", o.patience, "Epochs without better validation before stopping; 0: never", 0,
         10'000);
  number("--max-minutes", o.max_minutes, "Time limit that the schedule also ends by; 0: none", 0,
         1e6);
  number("--clip-norm", o.clip_norm, "Largest norm of the gradient; 0: any", 0, 1e6);
  command
      ->add_option("--seed", o.seed,
                   "Of everything random: the same seed, data and --threads give the same model")
      ->capture_default_str();
  add_threads(*command, o.threads);
  number("--validation-users", o.validation_users,
         "Users sampled for validation; 0: none, the last epoch is kept", 0, 1e7);
  number("--min-user-history-length-percentile", o.min_user_history_length_percentile,
         "Users with shorter histories leave the training data", 0, 1);
  number("--max-user-history-length-percentile", o.max_user_history_length_percentile,
         "Users with longer histories leave the training data", 0, 1);
  add_choice<TimeGap>(*command, "--time-gap", o.time_gap,
                      {{"auto", TimeGap::automatic}, {"on", TimeGap::on}, {"off", TimeGap::off}},
                      "Embedding of the time since the previous event; auto: where gaps differ");
  add_element_type(*command, o.element_type);
  command->add_option("--checkpoint", o.checkpoint, "Where an interrupted run can go on")
      ->default_str("OUTPUT.checkpoint");
  command->add_flag("--resume", o.resume, "Go on from the checkpoint of an interrupted run");
  add_json(*command, arguments->json);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace personalize::tools
