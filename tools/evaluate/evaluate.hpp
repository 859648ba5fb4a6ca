// `personalize evaluate`: how well a model file predicts, measured through the header as users are
// served.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "command/command.hpp"
#include "data/dataset.hpp"
#include "data/split.hpp"
#include "evaluate/metrics.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

struct EvaluationOptions {
  Protocol protocol = Protocol::leave_one_out;
  std::uint64_t seed = 0;  // of the holdout protocol's choice of users
  // A user's last items that are not recommended again; 0: none.
  std::uint32_t exclusion_window = RecommenderOptions{}.history_length;
  unsigned threads = 1;
};

struct Evaluation {
  SlateMetrics mean;    // over users
  double coverage = 0;  // share of the catalogue that stands in at least one slate of 25
  std::uint64_t users = 0;
  std::uint64_t predicted_events = 0;  // relevant events, all users together
  double seconds = 0;
};

Evaluation evaluate(const std::shared_ptr<const Model>& model, const Dataset& data,
                    const EvaluationOptions& options, class Progress* progress = nullptr);

// Why the figures may say something else than how well the model predicts, a sentence each: what
// the model was trained on, as its metadata tells, and what is evaluated do not fit.
std::vector<std::string> doubts(const Model& model, const Dataset& data,
                                const EvaluationOptions& options);

void add_evaluate(CLI::App& app);

}  // namespace personalize::tools
