// The training loop: epochs, schedule, validation, checkpoints, export. No libtorch in this header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "data/dataset.hpp"
#include "data/split.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

enum class TimeGap { automatic, on, off };

struct TrainOptions {
  std::string output, checkpoint;  // checkpoint empty: OUTPUT.checkpoint
  Protocol protocol = Protocol::leave_one_out;
  std::size_t hidden_dimension = 128, bptt = 32, layers = 1, feed_forward = 4, batch_size = 128;
  std::size_t epochs = 24, patience = 10, validation_users = 2000;
  double dropout = 0.3, learning_rate = 1e-3, weight_decay = 0.01, clip_norm = 5, max_minutes = 0;
  double min_user_history_length_percentile = 0, max_user_history_length_percentile = 0.99;
  TimeGap time_gap = TimeGap::automatic;
  std::uint64_t seed = 0;
  unsigned threads = 0;  // 0: a thread a core
  ElementType element_type = ElementType::i8;
  bool resume = false;
  std::function<bool()> interrupted;  // asked after each step; true: save, export, return
};

struct RankingMetrics {
  double ndcg10 = 0, recall10 = 0;
  std::size_t users = 0;
};

struct TrainSummary {
  bool interrupted = false;
  std::size_t epochs = 0;      // finished ones
  std::size_t best_epoch = 0;  // the one exported, from 1; 0: none was validated
  std::uint64_t steps = 0, events_per_epoch = 0, parameters = 0;
  std::size_t training_users = 0, items = 0;
  double loss = 0;            // mean of the last epoch, in nats
  RankingMetrics validation;  // of the exported parameters
  double events_per_second = 0, seconds = 0;
  std::string checkpoint;
};

// Where a run with these options keeps its checkpoint.
std::string checkpoint_path(const TrainOptions& options);

// Trains, exports to options.output, and removes the checkpoint; interrupted, it exports the best
// so far and keeps the checkpoint. Throws Failure.
TrainSummary train(const Dataset& dataset, const TrainOptions& options);

}  // namespace personalize::tools
