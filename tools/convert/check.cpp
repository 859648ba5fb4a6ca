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
constexpr double tolerance = 1e-4;  // of a hidden state: more than rounding does

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

std::vector<std::uint32_t> top_of(const Vector& scores) {
  std::vector<std::uint32_t> top(scores.size());
  std::iota(top.begin(), top.end(), 0u);
  const auto middle = top.begin() + static_cast<std::ptrdiff_t>(std::min(ranked, top.size()));
  std::partial_sort(top.begin(), middle, top.end(), [&](std::uint32_t a, std::uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  top.erase(middle, top.end());
  return top;
}

// The first place at which `top` has another item than the best of the scores has, unless that
// scores the same up to rounding.
std::optional<std::size_t> first_other(const std::vector<std::uint32_t>& top,
                                       const Vector& scores) {
  constexpr double tie = 1e-5;
  const auto best = top_of(scores);
  double largest = 0;
  for (const std::uint32_t item : best) largest = std::max(largest, std::abs(scores[item]));
  for (std::size_t place = 0; place < best.size(); ++place)
    if (place >= top.size() ||
        !(std::abs(scores[top[place]] - scores[best[place]]) <= tie * largest))
      return place;
  return std::nullopt;
}

Vector score(const ModelParts& parts, const Vector& hidden) {
  Vector scores(parts.item_ids.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    scores[i] = double{parts.biases[i]};
    for (std::size_t c = 0; c < hidden.size(); ++c)
      scores[i] += hidden[c] * double{parts.item_vectors.at(i, c)};
  }
  return scores;
}

double deviation(const Vector& state, const Vector& expected) {
  double largest = 0, difference = 0;
  for (std::size_t c = 0; c < expected.size(); ++c) {
    largest = std::max(largest, std::abs(expected[c]));
    difference = std::max(difference, std::abs(state[c] - expected[c]));
  }
  return largest > 0 ? difference / largest : difference;
}

// Gathers what one Agreement says, history by history.
class Comparison {
 public:
  Comparison(std::string what, std::string with, const std::vector<History>& histories)
      : histories_(histories),
        result_{.what = std::move(what), .with = std::move(with), .histories = histories.size()} {}

  void add_hidden(const Vector& state, const Vector& expected) {
    const double found = deviation(state, expected);
    result_.hidden_deviation = std::max(result_.hidden_deviation.value_or(0), found);
    if (found > tolerance) note("hidden states differ by " + number_text(found));
  }

  void add_top(const std::vector<std::uint32_t>& top, const Vector& expected,
               const StringTable& items) {
    const auto place = first_other(top, expected);
    same_ += !place;
    tops_ = true;
    if (!place) return;
    const auto name = [&](const std::vector<std::uint32_t>& ranking) {
      return *place < ranking.size() ? "'" + std::string(items[ranking[*place]]) + "'" : "nothing";
    };
    note("place " + std::to_string(*place + 1) + " is " + name(top) + " instead of " +
         name(top_of(expected)));
  }

  void next() { ++history_; }

  Agreement result() {
    if (tops_)
      result_.same_top20 = static_cast<double>(same_) / static_cast<double>(result_.histories);
    return std::move(result_);
  }

 private:
  void note(const std::string& difference) {
    if (result_.first_difference.empty())
      result_.first_difference = "for user '" + histories_[history_].user + "' " + difference;
  }

  const std::vector<History>& histories_;
  Agreement result_;
  std::size_t history_ = 0, same_ = 0;
  bool tops_ = false;
};

// The graph's scores of the items behind a history of items.
class GraphOfItems {
 public:
  GraphOfItems(const ModelParts& source, TensorFile& file, const Mapping& mapping,
               const std::vector<std::uint64_t>& rows)
      : source_(source), graph_(file), mapping_(mapping), rows_(rows) {
    const Tensor& embedding = file.at(mapping.embedding.tensor);
    if (embedding.shape.size() == 2)
      all_rows_ = static_cast<std::size_t>(embedding.shape[mapping.embedding.transpose ? 1 : 0]);
  }

  Vector run(const std::vector<std::uint32_t>& items) {
    const auto slice = mapping_.embedding.slice;
    const auto row_of = [&](std::uint64_t row) { return row + (slice ? slice->first : 0); };
    std::vector<std::int64_t> history;
    for (const std::uint32_t item : items)
      history.push_back(static_cast<std::int64_t>(row_of(rows_[item])));
    graph_.run(history);
    Vector scores;
    if (!mapping_.graph_output.empty() && !mapping_.output) {  // the graph ends in a vector
      scores = score(source_, graph_.scores(mapping_.graph_output, source_.item_vectors.columns()));
    } else {
      const auto all = graph_.scores(mapping_.graph_output, all_rows_);
      for (const std::uint64_t row : rows_)
        scores.push_back(all[static_cast<std::size_t>(row_of(row))]);
    }
    if (std::any_of(scores.begin(), scores.end(), [](double v) { return std::isnan(v); }))
      throw Failure("the ONNX graph gives scores that are no numbers");
    return scores;
  }

  std::optional<std::size_t> fixed_length() const { return graph_.fixed_length(); }

 private:
  const ModelParts& source_;
  GraphRunner graph_;
  const Mapping& mapping_;
  const std::vector<std::uint64_t>& rows_;
  std::size_t all_rows_ = 0;
};

// Two items that `expected` ranks in this order and `scores` in the other, by more than rounding
// could do. Their scales may differ.
std::optional<std::pair<std::uint32_t, std::uint32_t>> first_swap(const Vector& scores,
                                                                  const Vector& expected) {
  constexpr double rounding = 1e-5;
  // An item that `by` puts behind another one although `other` has it in front.
  const auto swap_in =
      [](const Vector& by,
         const Vector& other) -> std::optional<std::pair<std::uint32_t, std::uint32_t>> {
    std::vector<std::uint32_t> order(by.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      return by[a] != by[b] ? by[a] > by[b] : other[a] > other[b];
    });
    const auto [low, high] = std::minmax_element(other.begin(), other.end());
    std::uint32_t lowest = order[0];
    for (const std::uint32_t item : order) {
      if (!(other[item] <= other[lowest] + rounding * (*high - *low)))
        return std::pair(lowest, item);
      if (other[item] < other[lowest]) lowest = item;
    }
    return std::nullopt;
  };
  if (const auto swapped = swap_in(expected, scores)) return swapped;
  if (const auto swapped = swap_in(scores, expected))
    return std::pair(swapped->second, swapped->first);
  return std::nullopt;
}

struct Difference : Failure {
  using Failure::Failure;
};

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

bool Agreement::agrees() const {
  return hidden_deviation.value_or(0) <= tolerance && same_top20.value_or(1) == 1;
}

Agreement compare_with_source(const Model& model, const ModelParts& source,
                              const std::vector<History>& histories) {
  Comparison comparison("the model file", "the source's weights in double precision", histories);
  DirectEncoder direct(source);
  const Encoder encoder(model);
  const Scorer scorer(model);
  auto workspace = encoder.make_workspace();
  std::vector<float> state(encoder.state_size());
  auto scratch = scorer.make_workspace();
  std::vector<ScoredItem> best;
  for (const History& history : histories) {
    std::fill(state.begin(), state.end(), 0.0f);
    if (const auto user = model.parts().user_ids.find(history.user)) encoder.load(*user, state);
    for (const EncoderInput& event : history.events) encoder.step(event, state, workspace);
    const auto query = encoder.query(state);
    scorer.top_k(query, ranked, {}, scratch, best);
    std::vector<std::uint32_t> top;
    for (const ScoredItem& item : best) top.push_back(item.item);
    const auto served = query.first(model.dimension());
    const Vector hidden = direct.run(history);
    comparison.add_hidden({served.begin(), served.end()}, hidden);
    comparison.add_top(top, score(source, hidden), source.item_ids);
    comparison.next();
  }
  return comparison.result();
}

Agreement compare_with_graph(const ModelParts& source, TensorFile& file, const Mapping& mapping,
                             const std::vector<std::uint64_t>& rows,
                             const std::vector<History>& histories) {
  Comparison comparison("the converted model", "the ONNX graph, run node by node", histories);
  DirectEncoder direct(source);
  GraphOfItems graph(source, file, mapping, rows);
  for (const History& history : histories) {
    std::vector<std::uint32_t> items;
    for (const EncoderInput& event : history.events) items.push_back(event.item);
    comparison.add_top(top_of(score(source, direct.run(history))), graph.run(items),
                       source.item_ids);
    comparison.next();
  }
  return comparison.result();
}

Agreement compare_with_reference(const ModelParts& source, TensorFile& reference,
                                 const std::vector<History>& histories) {
  Comparison comparison("the converted model", reference.name, histories);
  const auto rows_of = [&](const char* name, std::size_t columns) -> std::vector<float> {
    const Tensor* tensor = reference.find(name);
    if (!tensor) return {};
    if (tensor->shape != std::vector<std::uint64_t>{histories.size(), columns})
      throw Failure(reference.name + ": " + tensor->describe() + " is not [" +
                    std::to_string(histories.size()) + ", " + std::to_string(columns) + "]");
    return read_values(reference, *tensor);
  };
  const std::size_t d = source.item_vectors.columns(), items = source.item_ids.size();
  const auto hidden = rows_of("hidden", d), scores = rows_of("scores", items);
  if (hidden.empty() && scores.empty())
    throw Failure(reference.name + ": has neither a tensor 'hidden' nor 'scores'");
  DirectEncoder direct(source);
  for (std::size_t h = 0; h < histories.size(); ++h) {
    const auto row = [&](const std::vector<float>& values, std::size_t columns) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(h * columns);
      return Vector(begin, begin + static_cast<std::ptrdiff_t>(columns));
    };
    const Vector state = direct.run(histories[h]);
    if (!hidden.empty()) comparison.add_hidden(state, row(hidden, d));
    if (!scores.empty())
      comparison.add_top(top_of(score(source, state)), row(scores, items), source.item_ids);
    comparison.next();
  }
  return comparison.result();
}

std::string verify_graph(const ModelParts& source, TensorFile& file, const Mapping& mapping,
                         const std::vector<std::uint64_t>& rows) {
  if (!source.user_ids.empty()) return "a known user's scores do not follow from a history";
  const std::size_t items = source.item_ids.size();
  try {
    GraphOfItems graph(source, file, mapping, rows);
    std::vector<std::size_t> lengths{1, 2, 3, 5, 8, 13, 34};
    // Each reads all of a large catalogue.
    if (items * source.item_vectors.columns() > std::size_t{1} << 22) lengths = {1, 3, 8};
    if (const auto fixed = graph.fixed_length()) lengths.assign(3, *fixed);
    DirectEncoder direct(source);
    // The first item, the last, then all of a small catalogue: the step is prime to its size.
    std::size_t item = 0, step = std::max<std::size_t>(1, items * 5 / 8);
    while (std::gcd(step, items) != 1) ++step;
    for (const std::size_t length : lengths) {
      std::vector<std::uint32_t> history;
      while (history.size() < length) {
        history.push_back(static_cast<std::uint32_t>(items - 1 - item));
        item = (item + step) % items;
      }
      History probe;
      for (const std::uint32_t each : history) probe.events.push_back({.item = each});
      const Vector model = score(source, direct.run(probe)), expected = graph.run(history);
      const auto swapped = first_swap(model, expected);
      if (!swapped) continue;
      std::string text;
      for (const std::uint32_t each : history)
        text += (text.empty() ? "'" : ", '") + std::string(source.item_ids[each]) + "'";
      throw Difference(file.name +
                       ": ONNX: the graph does what the converted model does not: behind the "
                       "history " +
                       text + " it ranks '" + std::string(source.item_ids[swapped->first]) +
                       "' before '" + std::string(source.item_ids[swapped->second]) +
                       "', the model behind it");
    }
  } catch (const Difference&) {
    throw;
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

}  // namespace personalize::tools
