#include "convert/check.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <unordered_map>

#include "command/command.hpp"
#include "convert/run_graph.hpp"
#include "data/csv.hpp"

namespace personalize::tools {
namespace {

using Vector = std::vector<double>;
constexpr std::size_t ranked = 20;

// The encoder as the comments on EncoderOp read, in double precision.
class DirectEncoder {
 public:
  explicit DirectEncoder(const ModelParts& parts) : parts_(parts) {}

  Vector run(const History& history) {
    states_.clear();
    stored_ = parts_.user_ids.find(history.user);
    stored_column_ = 0;
    Vector x;
    for (const EncoderInput& event : history.events) x = step(event);
    return x;
  }

 private:
  using Op = EncoderOp::Kind;

  Vector step(const EncoderInput& event) {
    const auto add = [](const Matrix& m, std::size_t row, Vector& x) {
      for (std::size_t c = 0; c < x.size(); ++c) x[c] += double{m.at(row, c)};
    };
    Vector x(parts_.inputs().columns());
    add(parts_.inputs(), event.item, x);
    if (event.event_type != no_event_type) add(parts_.event_type_embedding, event.event_type, x);
    if (!parts_.time_gap_embedding.empty()) add(parts_.time_gap_embedding, event.time_gap, x);
    std::size_t state = 0;
    weight_ = 0;
    for (const EncoderOp& op : parts_.operations) {
      switch (op.kind) {
        case Op::embed_sum:
          break;
        case Op::linear:
          x = affine(x);
          break;
        case Op::gru:
          x = gru(op.argument, x, state++);
          break;
        case Op::layer_norm:
          x = layer_norm(x);
          break;
        case Op::activation:
          for (double& v : x) v = activate(static_cast<Activation>(op.argument), v);
          break;
        case Op::save:
          saved_[op.argument] = x;
          break;
        case Op::add:
          for (std::size_t c = 0; c < x.size(); ++c) x[c] += saved_[op.argument][c];
          break;
        case Op::lru:
          x = lru(x, state++);
          break;
        case Op::decay: {
          const Matrix &keep = next(), &take = next();
          Vector& h = hidden(state++, x.size());
          for (std::size_t c = 0; c < x.size(); ++c)
            h[c] = double{keep.at(0, c)} * h[c] + double{take.at(0, c)} * x[c];
          x = h;
          break;
        }
      }
    }
    return x;
  }

  // The state of one recurrent operation: at first the stored user's, else zero. Operations ask in
  // order, and so lie their columns.
  Vector& hidden(std::size_t state, std::size_t size) {
    const auto [found, added] = states_.try_emplace(state, size);
    if (added && stored_)
      for (double& value : found->second)
        value = double{parts_.user_states.at(*stored_, stored_column_++)};
    return found->second;
  }

  const Matrix& next() { return parts_.weights[weight_++]; }

  static Vector multiply(const Matrix& w, const Vector& x) {
    Vector y(w.rows());
    for (std::size_t r = 0; r < w.rows(); ++r)
      for (std::size_t c = 0; c < w.columns(); ++c) y[r] += double{w.at(r, c)} * x[c];
    return y;
  }
  static void add_row(const Matrix& row, Vector& x) {
    for (std::size_t c = 0; c < x.size(); ++c) x[c] += double{row.at(0, c)};
  }
  Vector affine(const Vector& x) {
    Vector y = multiply(next(), x);
    add_row(next(), y);
    return y;
  }

  Vector gru(std::uint32_t form, const Vector& x, std::size_t state) {
    Vector input = (form & GruForm::gate_input) ? x : multiply(next(), x);
    const Matrix &w = next(), &input_bias = next(), &bias = next();
    const std::size_t n = w.columns();
    Vector& h = hidden(state, n);
    add_row(input_bias, input);
    Vector recurrent = multiply(w, h);
    add_row(bias, recurrent);
    Vector reset(n);
    for (std::size_t j = 0; j < n; ++j) reset[j] = sigmoid(input[j] + recurrent[j]);
    if (form & GruForm::reset_before) {
      Vector kept(n);
      for (std::size_t j = 0; j < n; ++j) kept[j] = reset[j] * h[j];
      Vector again = multiply(w, kept);
      add_row(bias, again);
      for (std::size_t j = 0; j < n; ++j) recurrent[2 * n + j] = again[2 * n + j];
    } else {
      for (std::size_t j = 0; j < n; ++j) recurrent[2 * n + j] *= reset[j];
    }
    for (std::size_t j = 0; j < n; ++j) {
      const double update = sigmoid(input[n + j] + recurrent[n + j]);
      h[j] = (1 - update) * std::tanh(input[2 * n + j] + recurrent[2 * n + j]) + update * h[j];
    }
    return h;
  }

  Vector lru(const Vector& x, std::size_t state) {
    const Matrix& lambda = next();
    const Vector input = affine(x);
    const std::size_t pairs = input.size() / 2;
    Vector& h = hidden(state, 2 * pairs);
    for (std::size_t j = 0; j < pairs; ++j) {
      const double real = double{lambda.at(0, j)}, imaginary = double{lambda.at(0, pairs + j)};
      const double before = h[j];
      h[j] = real * before - imaginary * h[pairs + j] + input[j];
      h[pairs + j] = real * h[pairs + j] + imaginary * before + input[pairs + j];
    }
    return h;
  }

  Vector layer_norm(Vector x) {
    const Matrix &weight = next(), &bias = next();
    const auto size = static_cast<double>(x.size());
    const double mean = std::accumulate(x.begin(), x.end(), 0.0) / size;
    double variance = 0;
    for (const double v : x) variance += (v - mean) * (v - mean) / size;
    for (std::size_t c = 0; c < x.size(); ++c)
      x[c] = (x[c] - mean) / std::sqrt(variance + 1e-5) * double{weight.at(0, c)} +
             double{bias.at(0, c)};
    return x;
  }

  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }
  static double activate(Activation activation, double v) {
    switch (activation) {
      case Activation::sigmoid:
        return sigmoid(v);
      case Activation::tanh:
        return std::tanh(v);
      case Activation::relu:
        return std::max(v, 0.0);
      case Activation::gelu:
        return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    }
    return v;
  }

  const ModelParts& parts_;
  std::size_t weight_ = 0, stored_column_ = 0;
  std::optional<std::uint32_t> stored_;
  std::unordered_map<std::size_t, Vector> states_;
  std::array<Vector, 8> saved_;
};

// Whether `top` is the best of the scores, best first: at each rank, an item that scores as the
// best one does, up to rounding.
bool agrees(const std::vector<std::uint32_t>& top, Vector scores) {
  constexpr double tie = 1e-5;
  Vector taken;
  for (const std::uint32_t item : top) taken.push_back(scores[item]);
  const auto end = scores.begin() + static_cast<std::ptrdiff_t>(top.size());
  std::partial_sort(scores.begin(), end, scores.end(), std::greater<>());
  double largest = 0;
  for (std::size_t rank = 0; rank < top.size(); ++rank)
    largest = std::max(largest, std::abs(scores[rank]));
  for (std::size_t rank = 0; rank < top.size(); ++rank)
    if (!(std::abs(taken[rank] - scores[rank]) <= tie * largest)) return false;
  return true;
}

// Runs every history through the model; compare(history, hidden state, its best items).
template <class Function>
void serve(const Model& model, const std::vector<History>& histories, Function compare) {
  const Encoder encoder(model);
  const Scorer scorer(model);
  auto workspace = encoder.make_workspace();
  std::vector<float> state(encoder.state_size());
  auto scratch = scorer.make_workspace();
  std::vector<ScoredItem> top;
  for (std::size_t h = 0; h < histories.size(); ++h) {
    std::fill(state.begin(), state.end(), 0.0f);
    if (const auto user = model.parts().user_ids.find(histories[h].user))
      encoder.load(*user, state);
    for (const EncoderInput& event : histories[h].events) encoder.step(event, state, workspace);
    const auto query = encoder.query(state);
    scorer.top_k(query, ranked, {}, scratch, top);
    std::vector<std::uint32_t> items;
    for (const ScoredItem& scored : top) items.push_back(scored.item);
    compare(h, query.first(model.dimension()), items);
  }
}

double deviation(std::span<const float> state, const Vector& expected) {
  double largest = 0, difference = 0;
  for (std::size_t c = 0; c < expected.size(); ++c) {
    largest = std::max(largest, std::abs(expected[c]));
    difference = std::max(difference, std::abs(double{state[c]} - expected[c]));
  }
  return largest > 0 ? difference / largest : difference;
}

}  // namespace

std::vector<History> read_histories(const std::string& path, const ModelParts& parts,
                                    BadRows& bad) {
  struct Row {
    std::size_t user;
    std::int64_t timestamp;
    EncoderInput input;
  };
  CsvReader reader(path);
  const std::size_t user = reader.require("USER_ID"), item = reader.require("ITEM_ID");
  const auto time = reader.column("TIMESTAMP"), type = reader.column("EVENT_TYPE");
  std::unordered_map<std::string, std::size_t> users;
  std::vector<History> histories;
  std::vector<Row> events;
  for_each_row(reader, bad, [&] {
    const auto index = parts.item_ids.find(reader.field(item));
    if (!index) reader.refuse(item, "'" + std::string(reader.field(item)) + "' is not an item");
    Row event{0, time ? timestamp_field(reader, *time) : 0, {.item = *index}};
    if (type)
      event.input.event_type = parts.event_types.find(reader.field(*type)).value_or(no_event_type);
    const auto [found, added] =
        users.try_emplace(std::string(reader.field(user)), histories.size());
    if (added) histories.push_back({found->first, {}});
    event.user = found->second;
    events.push_back(event);
  });
  if (events.empty()) throw Failure(path + ": holds no interactions" + bad.reason());
  std::stable_sort(events.begin(), events.end(),
                   [](const Row& a, const Row& b) { return a.timestamp < b.timestamp; });
  const auto buckets = static_cast<std::uint32_t>(parts.time_gap_embedding.rows());
  std::vector<std::optional<std::int64_t>> previous(histories.size());
  for (Row& event : events) {
    if (buckets > 0)
      event.input.time_gap = time_gap_bucket(previous[event.user], event.timestamp, buckets);
    previous[event.user] = event.timestamp;
    histories[event.user].events.push_back(event.input);
  }
  return histories;
}

Agreement compare_with_source(const Model& model, const ModelParts& source,
                              const std::vector<History>& histories) {
  Agreement result{.with = "the source's weights in double precision",
                   .histories = histories.size()};
  DirectEncoder direct(source);
  double worst = 0;
  std::size_t same = 0;
  Vector scores(source.item_ids.size());
  serve(model, histories, [&](std::size_t h, std::span<const float> state, const auto& items) {
    const Vector hidden = direct.run(histories[h]);
    worst = std::max(worst, deviation(state, hidden));
    for (std::size_t i = 0; i < scores.size(); ++i) {
      double score = double{source.biases[i]};
      for (std::size_t c = 0; c < hidden.size(); ++c)
        score += hidden[c] * double{source.item_vectors.at(i, c)};
      scores[i] = score;
    }
    same += agrees(items, scores);
  });
  result.hidden_deviation = worst;
  result.same_top20 = static_cast<double>(same) / static_cast<double>(histories.size());
  return result;
}

Agreement compare_with_graph(const Model& model, TensorFile& file, std::uint64_t first_row,
                             const std::vector<History>& histories) {
  Agreement result{.with = "the ONNX graph, run node by node", .histories = histories.size()};
  GraphRunner graph(file);
  std::size_t same = 0;
  const std::size_t items = model.item_count();
  serve(model, histories, [&](std::size_t h, std::span<const float>, const auto& top) {
    std::vector<std::int64_t> rows;
    for (const EncoderInput& event : histories[h].events)
      rows.push_back(static_cast<std::int64_t>(event.item + first_row));
    const std::vector<float> scores = graph.run(rows, items + static_cast<std::size_t>(first_row));
    const auto begin = scores.begin() + static_cast<std::ptrdiff_t>(first_row);
    same += agrees(top, {begin, scores.end()});
  });
  result.same_top20 = static_cast<double>(same) / static_cast<double>(histories.size());
  return result;
}

Agreement compare_with_reference(const Model& model, TensorFile& reference,
                                 const std::vector<History>& histories) {
  Agreement result{.with = reference.name, .histories = histories.size()};
  const auto rows_of = [&](const char* name, std::size_t columns) -> std::vector<float> {
    const Tensor* tensor = reference.find(name);
    if (!tensor) return {};
    if (tensor->shape != std::vector<std::uint64_t>{histories.size(), columns})
      throw Failure(reference.name + ": " + tensor->describe() + " is not [" +
                    std::to_string(histories.size()) + ", " + std::to_string(columns) + "]");
    return read_values(reference, *tensor);
  };
  const std::size_t d = model.dimension(), items = model.item_count();
  const auto hidden = rows_of("hidden", d), scores = rows_of("scores", items);
  if (hidden.empty() && scores.empty())
    throw Failure(reference.name + ": has neither a tensor 'hidden' nor 'scores'");
  double worst = 0;
  std::size_t same = 0;
  serve(model, histories, [&](std::size_t h, std::span<const float> state, const auto& top) {
    const auto row = [&](const std::vector<float>& values, std::size_t columns) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(h * columns);
      return Vector(begin, begin + static_cast<std::ptrdiff_t>(columns));
    };
    if (!hidden.empty()) worst = std::max(worst, deviation(state, row(hidden, d)));
    if (!scores.empty()) same += agrees(top, row(scores, items));
  });
  if (!hidden.empty()) result.hidden_deviation = worst;
  if (!scores.empty())
    result.same_top20 = static_cast<double>(same) / static_cast<double>(histories.size());
  return result;
}

}  // namespace personalize::tools
