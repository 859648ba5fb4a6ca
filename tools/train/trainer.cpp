#include "train/trainer.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numbers>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "command/command.hpp"
#include "command/output.hpp"
#include "command/parallel.hpp"
#include "data/random.hpp"
#include "train/checkpoint.hpp"
#include "train/export.hpp"
#include "train/kernels.hpp"
#include "train/loss.hpp"
#include "train/network.hpp"
#include "train/streams.hpp"

namespace personalize::tools {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

// Events that validation's ranking is computed from: as many as the runtime remembers.
const std::size_t input_window = RecommenderOptions{}.history_length;
constexpr std::size_t steps_per_epoch_wanted = 50;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The streams of a chunk are shared out among threads; within one, everything is sequential. That
// scales better than threads inside each operation, and libtorch's and OpenBLAS's pools would spin
// against each other.
void make_operations_sequential() {
  at::set_num_threads(1);
  // Looked up, because only some of the BLAS libraries that libtorch may have loaded have it.
  if (void* symbol = ::dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))
    reinterpret_cast<void (*)(int)>(symbol)(1);
}

// Calls work(0) ... work(count - 1) on up to `threads` threads.
template <class Work>
void on_threads(std::size_t count, std::size_t threads, const Work& work) {
  for_each_parallel(count, threads, [&] {
    at::globalContext().setFlushDenormal(true);  // a setting of the thread
    return [&](std::size_t i) { work(i); };
  });
}

struct Example {  // a user whose event after `input` is to be ranked
  std::span<const Event> input;
  std::uint32_t target;
};

struct Data {
  std::vector<std::span<const Event>> training;
  std::vector<Example> validation;
};

// Users outside the two percentiles of history length leave the training data.
void keep_history_lengths(std::vector<std::span<const Event>>& histories, double low, double high) {
  if (histories.empty()) return;
  std::vector<std::size_t> lengths;
  for (const auto history : histories) lengths.push_back(history.size());
  std::sort(lengths.begin(), lengths.end());
  const auto at = [&](double p) {
    return lengths[static_cast<std::size_t>(
        std::lround(p * static_cast<double>(lengths.size() - 1)))];
  };
  const std::size_t shortest = at(low);
  const std::size_t longest = at(high);
  std::erase_if(histories, [&](auto h) { return h.size() < shortest || h.size() > longest; });
}

Data split_data(const Dataset& dataset, const TrainOptions& options) {
  Data data;
  for (std::size_t u = 0; u < dataset.histories.size(); ++u) {
    const std::span<const Event> history = dataset.histories[u];
    const UserSplit split =
        split_user(options.protocol, options.seed, dataset.user_ids[u], history.size());
    if (split.train_end >= 2) data.training.push_back(history.first(split.train_end));
    if (split.validates && split.train_end > 0)
      data.validation.push_back({history.first(split.train_end), history[split.train_end].item});
  }
  keep_history_lengths(data.training, options.min_user_history_length_percentile,
                       options.max_user_history_length_percentile);
  if (data.training.empty())
    throw Failure(
        "no user has two or more events left to train on; use --protocol all, or more data");

  // A fixed sample: the same users in every epoch and every run with this seed.
  auto& sample = data.validation;
  const std::uint64_t seed = mix(options.seed, 0x76616c);
  for (std::size_t i = sample.size(); i > 1; --i)
    std::swap(sample[i - 1], sample[mix(seed, i) % i]);
  if (sample.size() > options.validation_users) sample.resize(options.validation_users);
  std::stable_sort(sample.begin(), sample.end(), [](const Example& a, const Example& b) {
    return std::min(a.input.size(), input_window) < std::min(b.input.size(), input_window);
  });
  return data;
}

bool gaps_differ(const std::vector<std::span<const Event>>& histories) {
  std::optional<std::uint32_t> seen;
  for (const auto history : histories)
    for (std::size_t i = 1; i < history.size(); ++i) {
      const std::uint32_t bucket =
          time_gap_bucket(history[i - 1].timestamp, history[i].timestamp, time_gap_buckets);
      if (seen && *seen != bucket) return true;
      seen = bucket;
    }
  return false;
}

// Inputs end in the last step; the empty cells before them are undone by the reset at the first
// event.
Chunk input_chunk(std::span<const Example> examples) {
  Chunk chunk;
  chunk.batch = examples.size();
  for (const Example& e : examples)
    chunk.steps = std::max(chunk.steps, std::min(e.input.size(), input_window));
  const std::size_t cells = chunk.batch * chunk.steps;
  chunk.item.assign(cells, 0);
  chunk.event_type.assign(cells, 0);
  chunk.time_gap.assign(cells, 0);
  chunk.reset.assign(cells, 0);
  for (std::size_t b = 0; b < chunk.batch; ++b) {
    const auto input = examples[b].input;
    const std::size_t n = std::min(input.size(), input_window);
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t at = input.size() - n + i;
      const std::size_t cell = (chunk.steps - n + i) * chunk.batch + b;
      const auto before = at > 0 ? std::optional(input[at - 1].timestamp) : std::nullopt;
      chunk.item[cell] = input[at].item;
      chunk.event_type[cell] = input[at].event_type;
      chunk.time_gap[cell] = time_gap_bucket(before, input[at].timestamp, time_gap_buckets);
      chunk.reset[cell] = i == 0 ? 1 : 0;
    }
  }
  return chunk;
}

// Full ranking over the catalogue, items of the input window excluded.
RankingMetrics validate_block(const Network& network, const at::Tensor& vectors,
                              std::span<const Example> block) {
  const at::NoGradGuard no_gradient;
  RankingMetrics sums;
  const std::size_t items = network.shape().trained_items;
  const Chunk chunk = input_chunk(block);
  std::vector<at::Tensor> state = network.initial_state(chunk.batch);
  const at::Tensor hidden = network.encode(vectors, chunk, state, 0, std::nullopt, true);
  const at::Tensor scores = at::addmm(network.biases(), hidden, vectors.t());
  for (std::size_t b = 0; b < block.size(); ++b) {
    float* s = scores.data_ptr<float>() + b * items;
    const auto input = block[b].input.last(std::min(block[b].input.size(), input_window));
    for (const Event& e : input) s[e.item] = -INFINITY;
    const float target = s[block[b].target];
    if (!std::isfinite(target)) continue;  // the target itself is excluded: a miss
    const auto rank = std::count_if(s, s + items, [&](float x) { return x > target; });
    if (rank >= 10) continue;
    sums.recall10 += 1;
    sums.ndcg10 += 1 / std::log2(static_cast<double>(rank) + 2);
  }
  return sums;
}

RankingMetrics validate(const Network& network, std::span<const Example> examples,
                        std::size_t threads) {
  const at::NoGradGuard no_gradient;
  const std::size_t batch =
      std::clamp<std::size_t>((std::size_t{1} << 23U) / network.shape().trained_items, 8, 128);
  const at::Tensor vectors = network.item_vectors();
  std::vector<RankingMetrics> blocks((examples.size() + batch - 1) / batch);
  on_threads(blocks.size(), threads, [&](std::size_t i) {
    blocks[i] =
        validate_block(network, vectors,
                       examples.subspan(i * batch, std::min(batch, examples.size() - i * batch)));
  });
  RankingMetrics metrics;
  metrics.users = examples.size();
  for (const RankingMetrics& sums : blocks) {
    metrics.recall10 += sums.recall10;
    metrics.ndcg10 += sums.ndcg10;
  }
  if (metrics.users > 0) {
    metrics.recall10 /= static_cast<double>(metrics.users);
    metrics.ndcg10 /= static_cast<double>(metrics.users);
  }
  return metrics;
}

Json recipe_json(const TrainOptions& o, const NetworkShape& shape, std::size_t batch_size) {
  return {{"protocol", name(o.protocol)},
          {"seed", o.seed},
          {"hidden_dimension", o.hidden_dimension},
          {"bptt", o.bptt},
          {"layers", o.layers},
          {"feed_forward", o.feed_forward},
          {"dropout", o.dropout},
          {"learning_rate", o.learning_rate},
          {"weight_decay", o.weight_decay},
          {"batch_size", batch_size},
          {"epochs", o.epochs},
          {"patience", o.patience},
          {"max_minutes", o.max_minutes},
          {"clip_norm", o.clip_norm},
          {"validation_users", o.validation_users},
          {"min_user_history_length_percentile", o.min_user_history_length_percentile},
          {"max_user_history_length_percentile", o.max_user_history_length_percentile},
          {"time_gap_buckets", shape.time_gap_buckets}};
}

// Tells apart data sets, not files: a checkpoint goes on only with the data it was begun with.
std::uint64_t fingerprint(const Dataset& dataset) {
  std::uint64_t hash = mix(dataset.item_ids.size(), dataset.metadata.size());
  for (const auto& history : dataset.histories) {
    hash = mix(hash, history.size());
    for (const Event& e : history)
      hash = mix(hash ^ e.event_type, e.item ^ static_cast<std::uint64_t>(e.timestamp) << 20U);
  }
  return hash;
}

void require_same_recipe(const std::string& checkpoint_path, const std::string& saved_text,
                         const Json& wanted) {
  const Json saved = Json::parse(saved_text, nullptr, false);
  for (const auto& [key, value] : wanted.items())
    if (!saved.is_object() || !saved.contains(key) || saved[key] != value)
      throw Failure(
          checkpoint_path + ": was begun with other " +
          (key == "data"
               ? std::string("data")
               : key + " (" +
                     (saved.is_object() && saved.contains(key) ? saved[key].dump() : "none") +
                     ", now " + value.dump() + ")") +
          "; use the same, or start without --resume");
}

class Training {
 public:
  Training(const Dataset& dataset, const TrainOptions& options)
      : dataset_(dataset),
        options_(options),
        data_(split_data(dataset, options)),
        shape_(make_shape()),
        batch_size_(make_batch_size()),
        threads_(make_threads()),
        network_(shape_, dataset.metadata, options.seed) {
    options_.checkpoint = checkpoint_path(options);
    recipe_ = recipe_json(options_, shape_, batch_size_);
    Json saved = recipe_;
    saved["data"] = fingerprint(dataset_);
    if (options_.resume) {
      position_ = load_checkpoint(options_.checkpoint);
      require_same_recipe(options_.checkpoint, position_.recipe, saved);
      require_fitting(position_);
      restore(position_.parameters);
    } else {
      if (std::filesystem::exists(options_.checkpoint))
        throw Failure(options_.checkpoint +
                      ": exists, from a run that did not finish; pass --resume to go on with it, "
                      "or remove it");
      position_.recipe = saved.dump();
      for (const Parameter& p : network_.parameters()) {
        position_.parameters.push_back(p.value);
        position_.first_moments.push_back(at::zeros_like(p.value));
        position_.second_moments.push_back(at::zeros_like(p.value));
      }
    }
    for (std::size_t i = 0; i < network_.parameters().size(); ++i)
      position_.parameters[i] = network_.parameters()[i].value;
  }

  TrainSummary run() {
    TrainSummary summary;
    start_ = Clock::now();
    elapsed_before_ = position_.elapsed_seconds;
    Progress progress("train");
    progress.start(std::to_string(data_.training.size()) + " users, " +
                   std::to_string(shape_.items) + " items, " + std::to_string(events_per_epoch_) +
                   " events an epoch, at most " + std::to_string(options_.epochs) + " epochs, " +
                   std::to_string(threads_) + (threads_ == 1 ? " thread" : " threads") +
                   (position_.epoch > 0 || position_.chunk > 0
                        ? ", going on in epoch " + std::to_string(position_.epoch + 1)
                        : ""));
    while (!finished() && !summary.interrupted) {
      summary.interrupted = !train_epoch(progress);
      if (!summary.interrupted) finish_epoch(progress);
    }
    position_.elapsed_seconds = elapsed();
    if (summary.interrupted) save_checkpoint(position_, options_.checkpoint);
    summary.epochs = static_cast<std::size_t>(position_.epoch);
    summary.best_epoch = static_cast<std::size_t>(position_.best_epoch);
    summary.steps = static_cast<std::uint64_t>(position_.step);
    summary.events_per_epoch = events_per_epoch_;
    for (const Parameter& p : network_.parameters())
      summary.parameters += static_cast<std::uint64_t>(p.value.numel());
    summary.training_users = data_.training.size();
    summary.items = shape_.items;
    summary.loss = position_.last_loss;
    if (position_.best_epoch > 0)
      summary.validation = {position_.best_ndcg10, position_.best_recall10,
                            data_.validation.size()};
    summary.seconds = position_.elapsed_seconds;
    summary.events_per_second = training_seconds_ > 0 ? trained_events_ / training_seconds_ : 0;
    summary.checkpoint = options_.checkpoint;

    if (!position_.best_parameters.empty()) restore(position_.best_parameters);
    export_model(summary);
    char text[160];
    std::snprintf(text, sizeof text, "%s after %zu epochs, loss %.4f, %.0f events/s, %.0f s",
                  summary.interrupted ? "interrupted" : "done", summary.epochs, summary.loss,
                  summary.events_per_second, summary.seconds);
    std::string line = text;
    if (summary.best_epoch > 0) {
      std::snprintf(text, sizeof text,
                    "; kept epoch %zu, validation NDCG@10 %.4f, Recall@10 %.4f of %zu users",
                    summary.best_epoch, summary.validation.ndcg10, summary.validation.recall10,
                    summary.validation.users);
      line += text;
    }
    progress.finish(line + "; " + options_.output);
    if (!summary.interrupted) {
      std::error_code ignored;
      std::filesystem::remove(options_.checkpoint, ignored);
    }
    return summary;
  }

 private:
  NetworkShape make_shape() const {
    NetworkShape shape;
    shape.items = dataset_.item_ids.size();
    for (const auto& history : dataset_.histories)
      for (const Event& e : history)
        shape.trained_items = std::max<std::size_t>(shape.trained_items, e.item + 1);
    shape.dimension = options_.hidden_dimension;
    shape.layers = options_.layers;
    shape.feed_forward = options_.feed_forward;
    shape.event_types = dataset_.event_types.size() >= 2 ? dataset_.event_types.size() : 0;
    const bool gaps = options_.time_gap == TimeGap::automatic ? gaps_differ(data_.training)
                                                              : options_.time_gap == TimeGap::on;
    shape.time_gap_buckets = gaps ? time_gap_buckets : 0;
    return shape;
  }

  std::size_t make_batch_size() {
    events_per_epoch_ = 0;
    for (const auto history : data_.training) events_per_epoch_ += history.size() - 1;
    const auto small =
        static_cast<std::size_t>(events_per_epoch_ / (steps_per_epoch_wanted * options_.bptt));
    return std::clamp<std::size_t>(small, 1, options_.batch_size);
  }

  std::size_t make_threads() const {
    // Each thread holds up to three gradients of all item vectors; together at most 4 GiB.
    constexpr std::size_t memory = std::size_t{4} << 30U;
    const std::size_t of_a_thread = 3 * sizeof(float) * shape_.trained_items * shape_.dimension;
    return std::clamp<std::size_t>(memory / of_a_thread, 1, thread_count(options_.threads));
  }

  bool finished() const {
    const bool stale = options_.patience > 0 &&
                       position_.stale_epochs >= static_cast<std::int64_t>(options_.patience);
    return stale || position_.fraction >= 1 ||
           position_.epoch >= static_cast<std::int64_t>(options_.epochs);
  }

  double elapsed() const { return elapsed_before_ + seconds_since(start_); }

  // What the training step then relies on.
  void require_fitting(const Checkpoint& checkpoint) const {
    std::vector<at::Tensor> parameters;
    for (const Parameter& p : network_.parameters()) parameters.push_back(p.value);
    const std::vector<at::Tensor> state = network_.initial_state(batch_size_);
    const auto alike = [](const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
        return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() && x.is_contiguous();
      });
    };
    const bool fits =
        alike(checkpoint.parameters, parameters) && alike(checkpoint.first_moments, parameters) &&
        alike(checkpoint.second_moments, parameters) && alike(checkpoint.state, state) &&
        (checkpoint.best_parameters.empty() || alike(checkpoint.best_parameters, parameters)) &&
        std::min({checkpoint.epoch, checkpoint.chunk, checkpoint.step}) >= 0;
    if (!fits)
      throw Failure(options_.checkpoint +
                    ": does not fit the network; remove it and start without --resume");
  }

  void restore(const std::vector<at::Tensor>& values) {
    const at::NoGradGuard no_gradient;
    const auto& parameters = network_.parameters();
    for (std::size_t i = 0; i < parameters.size(); ++i)
      at::Tensor(parameters[i].value).copy_(values[i]);
  }

  double learning_rate(std::size_t chunks) const {
    const double total = static_cast<double>(options_.epochs * chunks);
    const double warm_up = std::clamp(total / 10, 1.0, 100.0);
    const double cosine =
        0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, position_.fraction)));
    return options_.learning_rate *
           std::min(1.0, static_cast<double>(position_.step + 1) / warm_up) *
           (0.02 + 0.98 * cosine);
  }

  void advance_schedule(std::size_t chunks) {
    double fraction =
        static_cast<double>(position_.step) / static_cast<double>(options_.epochs * chunks);
    if (options_.max_minutes > 0)
      fraction = std::max(fraction, elapsed() / (60 * options_.max_minutes));
    position_.fraction = std::max(position_.fraction, fraction);
  }

  // Mean loss of the chunk; leaves its gradient in the parameters' grad(). The sum over threads has
  // a fixed order.
  double compute_gradients(const Chunk& chunk, std::uint64_t step_seed) {
    const std::size_t parts = std::min(threads_, batch_size_);
    const at::Tensor vectors = network_.item_vectors();
    // The parameters that the parts use other than through the item vectors.
    std::vector<at::Tensor> shared;
    for (const Parameter& p : network_.parameters())
      if (p.name != "item_embedding" && !p.name.starts_with("metadata.")) shared.push_back(p.value);
    std::vector<double> losses(parts, 0.0);
    std::vector<std::vector<at::Tensor>> gradients(parts);
    std::vector<std::vector<at::Tensor>> states(parts);
    on_threads(parts, parts, [&](std::size_t part) {
      const std::size_t first = batch_size_ * part / parts;
      const std::size_t last = batch_size_ * (part + 1) / parts;
      const Chunk mine = slice(chunk, first, last);
      for (const at::Tensor& state : position_.state)
        states[part].push_back(state.narrow(0, static_cast<std::int64_t>(first),
                                            static_cast<std::int64_t>(last - first)));
      const double weight = static_cast<double>(mine.events) / static_cast<double>(chunk.events);
      std::vector<at::Tensor> inputs{vectors.detach().requires_grad_(true)};
      inputs.insert(inputs.end(), shared.begin(), shared.end());
      const at::Tensor hidden =
          network_.encode(inputs[0], mine, states[part], options_.dropout, mix(step_seed, part));
      const at::Tensor loss =
          catalogue_cross_entropy(hidden, inputs[0], network_.biases(), view(mine.target)) * weight;
      losses[part] = loss.item<double>();
      gradients[part] = torch::autograd::grad({loss}, inputs);
    });
    for (std::size_t part = 1; part < parts; ++part)
      for (std::size_t i = 0; i < gradients[0].size(); ++i)
        gradients[0][i].add_(gradients[part][i]);
    for (std::size_t k = 0; k < position_.state.size(); ++k) {
      std::vector<at::Tensor> pieces;
      for (const auto& state : states) pieces.push_back(state[k]);
      position_.state[k] = at::cat(pieces);
    }
    torch::autograd::backward({vectors}, {gradients[0][0]});
    for (std::size_t i = 0; i < shared.size(); ++i) shared[i].mutable_grad() = gradients[0][i + 1];
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }

  void update_parameters(double rate) {
    const at::NoGradGuard no_gradient;
    const auto& parameters = network_.parameters();
    double squares = 0;
    for (const Parameter& p : parameters)
      if (p.value.grad().defined()) squares += std::pow(p.value.grad().norm().item<double>(), 2);
    const double norm = std::sqrt(squares);
    AdamStep step{.learning_rate = static_cast<float>(rate),
                  .weight_decay = 0,
                  .correction1 = 0,
                  .correction2 = 0};
    const auto t = static_cast<double>(position_.step + 1);
    step.correction1 = static_cast<float>(1 - std::pow(static_cast<double>(step.beta1), t));
    step.correction2 = static_cast<float>(1 - std::pow(static_cast<double>(step.beta2), t));
    if (options_.clip_norm > 0 && norm > options_.clip_norm)
      step.gradient_scale = static_cast<float>(options_.clip_norm / norm);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const at::Tensor& p = parameters[i].value;
      if (!p.grad().defined()) continue;
      const at::Tensor gradient = p.grad().contiguous();
      step.weight_decay = p.dim() > 1 ? static_cast<float>(options_.weight_decay) : 0.0F;
      float* x = p.data_ptr<float>();
      const float* g = gradient.data_ptr<float>();
      float* m = position_.first_moments[i].data_ptr<float>();
      float* v = position_.second_moments[i].data_ptr<float>();
      adamw(x, g, m, v, static_cast<std::size_t>(p.numel()), step);
      at::Tensor(p).mutable_grad() = at::Tensor();
    }
  }

  // false: interrupted; position_ then tells where to go on.
  bool train_epoch(Progress& progress) {
    const auto start = Clock::now();
    const double events_before = trained_events_;
    const Streams streams(data_.training, batch_size_, options_.bptt, options_.seed,
                          static_cast<std::uint64_t>(position_.epoch));
    const std::size_t chunks = streams.chunks();
    if (position_.chunk == 0) position_.state = network_.initial_state(batch_size_);
    bool interrupted = false;
    while (position_.chunk < static_cast<std::int64_t>(chunks) && !interrupted) {
      const Chunk chunk = streams.chunk(static_cast<std::size_t>(position_.chunk));
      const std::uint64_t step_seed =
          mix(options_.seed, static_cast<std::uint64_t>(position_.step));
      const double rate = learning_rate(chunks);
      const double value = compute_gradients(chunk, step_seed);
      if (!std::isfinite(value)) {
        char text[128];
        std::snprintf(
            text, sizeof text,
            "the loss is not finite at epoch %lld, step %lld; lower --learning-rate (now %g)",
            static_cast<long long>(position_.epoch + 1), static_cast<long long>(position_.step + 1),
            options_.learning_rate);
        throw Failure(text);
      }
      update_parameters(rate);
      ++position_.step;
      ++position_.chunk;
      position_.epoch_loss += value * static_cast<double>(chunk.events);
      position_.epoch_events += static_cast<std::int64_t>(chunk.events);
      trained_events_ += static_cast<double>(chunk.events);
      advance_schedule(chunks);
      progress.update(done(), report((trained_events_ - events_before) / seconds_since(start)));
      interrupted = options_.interrupted && options_.interrupted();
      if (position_.fraction >= 1) break;
    }
    training_seconds_ += seconds_since(start);
    return !interrupted || position_.chunk == static_cast<std::int64_t>(chunks);
  }

  void finish_epoch(Progress& progress) {
    position_.last_loss = position_.epoch_loss /
                          static_cast<double>(std::max<std::int64_t>(1, position_.epoch_events));
    ++position_.epoch;
    position_.chunk = position_.epoch_events = 0;
    position_.epoch_loss = 0;
    if (!data_.validation.empty()) {
      const RankingMetrics metrics = validate(network_, data_.validation, threads_);
      last_ndcg10_ = metrics.ndcg10;
      ++position_.stale_epochs;
      if (metrics.ndcg10 > position_.best_ndcg10) {
        position_.best_ndcg10 = metrics.ndcg10;
        position_.best_recall10 = metrics.recall10;
        position_.best_epoch = position_.epoch;
        position_.stale_epochs = 0;
        position_.best_parameters.clear();
        for (const Parameter& p : network_.parameters())
          position_.best_parameters.push_back(p.value.detach().clone());
      }
    }
    position_.elapsed_seconds = elapsed();
    save_checkpoint(position_, options_.checkpoint);
    progress.milestone(done(),
                       report(training_seconds_ > 0 ? trained_events_ / training_seconds_ : 0));
  }

  double done() const { return std::min(1.0, position_.fraction); }

  std::string report(double events_per_second) const {
    const double loss = position_.epoch_events > 0
                            ? position_.epoch_loss / static_cast<double>(position_.epoch_events)
                            : position_.last_loss;
    double left = done() > 0 ? elapsed() * (1 - done()) / done() : 0;
    if (options_.max_minutes > 0)
      left = std::min(left, std::max(0.0, 60 * options_.max_minutes - elapsed()));
    char text[160];
    std::snprintf(
        text, sizeof text,
        "epoch %lld/%zu  loss %.4f  NDCG@10 %.4f (best %.4f)  %.0f events/s  %d:%02d left",
        static_cast<long long>(position_.epoch + (position_.chunk > 0 ? 1 : 0)), options_.epochs,
        loss, last_ndcg10_, std::max(0.0, position_.best_ndcg10), events_per_second,
        static_cast<int>(left) / 60, static_cast<int>(left) % 60);
    return text;
  }

  void export_model(const TrainSummary& summary) const {
    Json metadata = {{"recipe", "hrnn"},
                     {"parameters", recipe_},
                     {"protocol", name(options_.protocol)},
                     {"seed", options_.seed},
                     {"data",
                      {{"items", shape_.items},
                       {"items_with_interactions", shape_.trained_items},
                       {"users", dataset_.user_ids.size()},
                       {"interactions", dataset_.interactions},
                       {"training_users", summary.training_users},
                       {"training_events_per_epoch", summary.events_per_epoch},
                       {"first_timestamp", dataset_.first_timestamp},
                       {"last_timestamp", dataset_.last_timestamp}}},
                     {"training",
                      {{"epochs", summary.epochs},
                       {"best_epoch", summary.best_epoch},
                       {"steps", summary.steps},
                       {"loss", summary.loss},
                       {"complete", !summary.interrupted}}}};
    if (summary.best_epoch > 0)
      metadata["validation"] = {
          {"users", summary.validation.users},
          {"normalized_discounted_cumulative_gain_at_10", summary.validation.ndcg10},
          {"recall_at_10", summary.validation.recall10}};
    const ModelParts parts = export_network(network_, dataset_, metadata.dump());
    OutputFile file(options_.output);
    file.append_model(parts, {.element_type = options_.element_type});
    file.commit();
  }

  const Dataset& dataset_;
  TrainOptions options_;
  Data data_;
  NetworkShape shape_;
  std::uint64_t events_per_epoch_ = 0;
  std::size_t batch_size_, threads_;
  Network network_;
  Json recipe_;
  Checkpoint position_;
  Clock::time_point start_ = Clock::now();
  double elapsed_before_ = 0, training_seconds_ = 0, trained_events_ = 0, last_ndcg10_ = 0;
};

}  // namespace

std::string checkpoint_path(const TrainOptions& options) {
  return options.checkpoint.empty() ? options.output + ".checkpoint" : options.checkpoint;
}

TrainSummary train(const Dataset& dataset, const TrainOptions& options) {
  make_operations_sequential();
  return Training(dataset, options).run();
}

}  // namespace personalize::tools
