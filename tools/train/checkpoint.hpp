// What an interrupted training run needs to go on as if it had not been interrupted.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace personalize::tools {

struct Checkpoint {
  std::string recipe;  // JSON: the options and the data that the run was started with
  // Tensors of f32.
  std::vector<at::Tensor> parameters, first_moments, second_moments;  // in the network's order
  std::vector<at::Tensor> best_parameters;      // empty: no epoch validated yet
  std::vector<at::Tensor> state;                // hidden state carried between chunks
  std::int64_t epoch = 0, chunk = 0, step = 0;  // the next chunk to train on; steps done
  std::int64_t epoch_events = 0, best_epoch = 0, stale_epochs = 0;
  double epoch_loss = 0, last_loss = 0, best_ndcg10 = -1, best_recall10 = 0, elapsed_seconds = 0;
  double fraction = 0;  // position in the learning rate's schedule
};

// Replaces the file at once, or leaves it as it was. Throws Failure.
void save_checkpoint(const Checkpoint& state, const std::string& path);
// Runs nothing that the file holds, and takes no more memory than its size. Throws Failure:
// missing, of another version, or damaged, be it by one bit.
Checkpoint load_checkpoint(const std::string& path);

}  // namespace personalize::tools
