// The layers of an ONNX graph: follows the events' vector from the embedding's Gather to the
// scores. Whatever depends on the history's items is followed or refused, node by node; what
// depends on its length alone, or on nothing, is looked up in runs over a few histories.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <set>

#include "command/command.hpp"
#include "convert/mapping.hpp"
#include "convert/run_graph.hpp"
#include "data/fields.hpp"

namespace personalize::tools {
namespace {

// What a name of the graph depends on.
enum class Dependence : std::uint8_t { nothing, length, items };

// What a name that depends on the history's items stands for.
struct Value {
  enum class Kind : std::uint8_t {
    unknown,
    indices,   // the history's item indices, as they came in
    sequence,  // the events' vectors behind `layers` of the layers
    linear,    // their product with a weight, which a bias may follow
    scores,
    // Parts of a layer norm or of GELU that was exported as single operations.
    mean,
    centred,
    squared,
    variance,
    deviation,
    normalised,
    scaled,
    erf_input,
    erf,
    erf_plus_one,
    gelu_twice,
  };
  Kind kind = Kind::unknown;
  TensorPart weight = {};
  std::size_t layers = 0;
  bool last = false;  // the last event's alone
};

using Kind = Value::Kind;
using Array = GraphRunner::Array;

class Tracer {
 public:
  explicit Tracer(TensorFile& file) : file_(file) {}

  Mapping trace() {
    const Graph& graph = *file_.graph;
    prepare(graph);
    std::optional<Mapping> vectors;
    std::string failure;
    struct Scored {
      std::string output;
      Mapping mapping;
    };
    std::vector<Scored> scored;
    bool failed_with_scores = false;
    for (const std::string& output : graph.outputs) {
      if (dependence(output) != Dependence::items) continue;
      try {
        Mapping mapping = trace_output(output);
        if (mapping.output)
          scored.push_back({output, std::move(mapping)});
        else if (!vectors)
          vectors = std::move(mapping);
      } catch (const Failure& refused) {
        // Of several, the one about an output with a score for each item.
        const bool has_scores = looks_like_scores(output);
        if (failure.empty() || (has_scores && !failed_with_scores)) failure = refused.what();
        failed_with_scores = failed_with_scores || has_scores;
      }
    }
    if (!scored.empty()) {
      Scored& first = scored.front();
      for (const Scored& other : scored)
        if (&other != &first && !same_scores(first.mapping, other.mapping))
          throw Failure(file_.name + ": ONNX: the outputs '" + first.output + "' and '" +
                        other.output +
                        "' both have a score for each item; export the graph with one of them");
      for (const std::string& output : graph.outputs)
        if (output != first.output)
          first.mapping.notes.push_back("left out: the graph's output '" + output + "'");
      return std::move(first.mapping);
    }
    if (!failure.empty()) throw Failure(failure);
    if (!vectors)
      throw Failure(file_.name +
                    ": ONNX: no output follows from the history by a Gather of an embedding");
    vectors->notes.push_back("the graph ends in a vector, '" + vectors->graph_output +
                             "'; scores are its products with the items' embedding");
    return std::move(*vectors);
  }

 private:
  struct Residual {
    std::size_t from, to;  // numbers of layers: saved behind `from`, added behind `to`
  };

  [[noreturn]] void refuse(const std::string& what) const { throw Failure(where_ + ": " + what); }

  // Runs the graph over histories of a few lengths and sorts its nodes by what they depend on.
  void prepare(const Graph& graph) {
    std::vector<std::string> inputs;
    for (const GraphInput& input : graph.inputs)
      if (!file_.find(input.name)) inputs.push_back(input.name);
    if (inputs.size() != 1) {
      std::string names;
      for (const std::string& name : inputs) names += (names.empty() ? "'" : ", '") + name + "'";
      throw Failure(file_.name + ": ONNX: its inputs are " + (names.empty() ? "none" : names) +
                    "; a graph whose one input is the history's item indices converts");
    }
    dependence_[inputs[0]] = Dependence::items;
    input_ = inputs[0];
    lengths_ = {1, 2, 3};
    if (const auto fixed = GraphRunner(file_).fixed_length()) lengths_ = {*fixed};
    for (const std::size_t length : lengths_) {
      // The last event is another than those before it.
      std::vector<std::int64_t> rows(length);
      rows.back() = 1;
      runs_.push_back(std::make_unique<GraphRunner>(file_));
      runs_.back()->run(rows);
    }
    flatten(graph.nodes);
  }

  // Puts the branch that is taken in place of an If.
  void flatten(const std::vector<GraphNode>& nodes) {
    for (const GraphNode& node : nodes) {
      where_ = file_.name + ": ONNX node " + node.describe();
      Dependence depends = Dependence::nothing;
      for (const std::string& name : node.inputs) depends = std::max(depends, dependence(name));
      if (node.operation == "If") {
        if (depends == Dependence::items)
          refuse("chooses by the history's items, which the model file cannot express");
        const Graph* chosen = runs_[0]->branch(node);
        for (const auto& run : runs_)
          if (!chosen || run->branch(node) != chosen)
            refuse(
                "takes another branch for a history of another length, or it is not known which; "
                "where it comes from squeeze(), index the axis instead: hidden[:, -1]");
        flatten(chosen->nodes);
        for (std::size_t o = 0; o < std::min(chosen->outputs.size(), node.outputs.size()); ++o)
          append({.operation = "Identity",
                  .name = node.name,
                  .inputs = {chosen->outputs[o]},
                  .outputs = {node.outputs[o]}},
                 dependence(chosen->outputs[o]));
        continue;
      }
      // What a subgraph reads of the outer graph is not among the node's inputs.
      if (!node.graphs.empty()) depends = Dependence::items;
      if ((node.operation == "Shape" || node.operation == "Size") && depends == Dependence::items)
        depends = Dependence::length;
      append(node, depends);
    }
  }

  void append(GraphNode node, Dependence depends) {
    nodes_.push_back(std::move(node));
    for (const std::string& output : nodes_.back().outputs) {
      dependence_[output] = depends;
      producers_[output] = nodes_.size() - 1;
    }
  }

  Dependence dependence(const std::string& name) const {
    const auto found = dependence_.find(name);
    return found == dependence_.end() ? Dependence::nothing : found->second;
  }
  const GraphNode* producer(const std::string& name) const {
    const auto found = producers_.find(name);
    return found == producers_.end() ? nullptr : &nodes_[found->second];
  }

  // Of each run its value; null where one is not known.
  std::vector<const Array*> looked_up(const std::string& name) const {
    std::vector<const Array*> arrays;
    for (const auto& run : runs_) arrays.push_back(run->find(name));
    return arrays;
  }
  // A value that is the same in all runs.
  std::optional<Array> constant(const std::string& name) const {
    if (name.empty() || dependence(name) == Dependence::items) return std::nullopt;
    const Array* first = runs_[0]->load(name);
    if (!first) return std::nullopt;
    if (dependence(name) == Dependence::length)
      for (const auto& run : runs_) {
        const Array* other = run->find(name);
        if (!other || other->values != first->values) return std::nullopt;
      }
    return *first;
  }

  bool looks_like_scores(const std::string& output) const {
    const Array* array = runs_.back()->find(output);
    return has_embedding_ && array && !array->shape.empty() &&
           array->shape.back() == static_cast<std::int64_t>(items_);
  }

  static bool same_scores(const Mapping& a, const Mapping& b) {
    return a.output->tensor == b.output->tensor && a.layers.size() == b.layers.size() &&
           a.output_bias.has_value() == b.output_bias.has_value() &&
           (!a.output_bias || a.output_bias->tensor == b.output_bias->tensor);
  }

  Mapping trace_output(const std::string& output) {
    values_.clear();
    layers_.clear();
    residuals_.clear();
    bias_terms_.clear();
    notes_.clear();
    output_.reset();
    has_embedding_ = monotone_ = false;
    scale_ = 1;
    values_[input_] = {.kind = Kind::indices};
    score_product_ = find_score_product(output);
    const auto needed = ancestors(output);
    for (std::size_t n = 0; n < nodes_.size(); ++n) {
      if (!needed[n] || dependence(nodes_[n].outputs[0]) != Dependence::items) continue;
      where_ = file_.name + ": ONNX node " + nodes_[n].describe();
      step(nodes_[n]);
    }
    where_ = file_.name + ": ONNX output '" + output + "'";
    if (!has_embedding_) refuse("does not follow from a Gather of an embedding");
    Value result = value_of(output);
    if (result.kind == Kind::linear) result = settle(result);
    Mapping mapping{.architecture = "onnx graph"};
    if (result.kind == Kind::scores) {
      mapping.output = output_;
      mapping.output_bias = bias(output);
    } else {
      if (result.kind != Kind::sequence) refuse("is neither scores nor a vector");
      current(result);
    }
    mapping.embedding = embedding_;
    mapping.padding_if_zero = true;
    mapping.graph_output = output;
    mapping.notes = notes_;
    if (scale_ != 1)
      mapping.notes.push_back("left out: a factor of " + number_text(scale_) +
                              " of all scores, which changes no ranking");
    if (lengths_.size() == 1)
      mapping.notes.push_back("the graph takes histories of exactly " +
                              std::to_string(lengths_[0]) +
                              " events; the model takes any, and pads none");
    place_residuals(mapping);
    return mapping;
  }

  std::vector<bool> ancestors(const std::string& output) const {
    std::vector<bool> needed(nodes_.size());
    std::vector<std::string> open{output};
    while (!open.empty()) {
      const auto found = producers_.find(open.back());
      open.pop_back();
      if (found == producers_.end() || needed[found->second]) continue;
      needed[found->second] = true;
      for (const std::string& input : nodes_[found->second].inputs) open.push_back(input);
    }
    return needed;
  }

  // The last product before the output, where nothing but one chain of operations follows it.
  const GraphNode* find_score_product(const std::string& output) const {
    std::string name = output;
    for (std::size_t steps = 0; steps < nodes_.size(); ++steps) {
      const GraphNode* node = producer(name);
      if (!node || node->operation == "MatMul" || node->operation == "Gemm") return node;
      name.clear();
      for (const std::string& input : node->inputs) {
        if (dependence(input) != Dependence::items) continue;
        if (!name.empty()) return nullptr;
        name = input;
      }
      if (name.empty()) return nullptr;
    }
    return nullptr;
  }

  Value value_of(const std::string& name) const {
    const auto found = values_.find(name);
    return found == values_.end() ? Value{} : found->second;
  }
  Value input(const GraphNode& node, std::size_t index) const {
    return index < node.inputs.size() ? value_of(node.inputs[index]) : Value{};
  }
  static std::string input_name(const GraphNode& node, std::size_t index) {
    return index < node.inputs.size() ? node.inputs[index] : "";
  }
  void set(const GraphNode& node, const Value& value) {
    for (const std::string& output : node.outputs) values_[output] = value;
  }
  std::int64_t integer(const GraphNode& node, const char* name, std::int64_t otherwise) const {
    const auto found = node.integers.find(name);
    return found == node.integers.end() ? otherwise : found->second;
  }
  float number(const GraphNode& node, const char* name, float otherwise) const {
    const auto found = node.floats.find(name);
    return found == node.floats.end() ? otherwise : found->second;
  }

  // A weight: an initialiser, perhaps transposed, or what is computed from some.
  std::optional<TensorPart> weight(const std::string& name) {
    if (name.empty() || dependence(name) != Dependence::nothing) return std::nullopt;
    if (const Tensor* tensor = file_.find(name)) {
      if (tensor->dtype == DType::foreign)
        throw Failure(file_.name + ": tensor '" + name + "' is " + tensor->type_name +
                      ", which is not read; save it as FLOAT or BFLOAT16");
      return TensorPart{.tensor = name};
    }
    const GraphNode* node = producer(name);
    if (!node || node->inputs.empty()) return std::nullopt;
    if (node->operation == "Identity" || node->operation == "Dropout")
      return weight(node->inputs[0]);
    if (node->operation == "Transpose") {
      auto part = weight(node->inputs[0]);
      if (part && file_.at(part->tensor).shape.size() == 2) {
        const auto order = node->integer_lists.find("perm");
        if (order == node->integer_lists.end() || order->second.empty() || order->second[0] == 1)
          part->transpose = !part->transpose;
        return part;
      }
    }
    const auto computed = constant(name);
    if (!computed || computed->integral) return std::nullopt;
    add_tensor(name, computed->shape, computed->values);
    return TensorPart{.tensor = name};
  }
  TensorPart weight(const GraphNode& node, std::size_t index) {
    if (auto part = weight(input_name(node, index))) return *part;
    refuse("input " + std::to_string(index) + " is no weight of the file");
  }

  void add_tensor(const std::string& name, const std::vector<std::int64_t>& shape,
                  const std::vector<double>& values) {
    Tensor tensor{.name = name, .dtype = DType::f32, .shape = {}, .strides = {}};
    tensor.shape.assign(shape.begin(), shape.end());
    std::vector<std::byte> bytes(values.size() * sizeof(float));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto value = static_cast<float>(values[i]);
      std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    }
    file_.add(std::move(tensor), std::move(bytes));
  }

  // The number that all of a constant's elements are.
  std::optional<double> uniform(const std::string& name) const {
    const auto array = constant(name);
    if (!array || array->values.empty()) return std::nullopt;
    const auto& values = array->values;
    const bool all =
        std::all_of(values.begin(), values.end(), [&](double value) { return value == values[0]; });
    return all ? std::optional(values[0]) : std::nullopt;
  }
  bool is_constant(const std::string& name, double expected) const {
    const auto given = uniform(name);
    return given && std::abs(*given - expected) < 1e-6;
  }

  // Only the newest vector can go on through layers; an older one is a residual.
  void current(const Value& value) const {
    if (value.kind != Kind::sequence || value.layers != layers_.size())
      refuse("reads a vector that is not the newest; only chains with residual additions convert");
  }
  Value sequence(bool last) const {
    return {.kind = Kind::sequence, .layers = layers_.size(), .last = last};
  }
  // A product without a bias, where something other than a bias follows, is a layer.
  Value settle(const Value& value) {
    return value.kind == Kind::linear ? finish(value, std::nullopt) : value;
  }

  void step(const GraphNode& node) {
    const std::string& op = node.operation;
    static const std::set<std::string> layout{"Identity", "Dropout",   "Cast",
                                              "Squeeze",  "Unsqueeze", "Transpose",
                                              "Reshape",  "Flatten",   "Expand"};
    static const std::set<std::string> selections{"Gather", "GatherElements", "Slice"};
    static const std::set<std::string> activations{"Tanh", "Sigmoid", "Relu", "Gelu"};
    const bool scores = input(node, 0).kind == Kind::scores || input(node, 1).kind == Kind::scores;
    if (op == "Gather" && dependence(input_name(node, 0)) == Dependence::nothing) {
      embed(node);
    } else if (layout.count(op)) {
      pass(node);
    } else if (op == "Slice" && is_whole(node)) {
      set(node, input(node, 0));
    } else if (input(node, 0).kind == Kind::indices ||
               (input(node, 1).kind == Kind::indices && !scores)) {
      refuse(
          "changes the history's item indices before the embedding, which the model file cannot "
          "express; change the histories instead, and export the graph without it");
    } else if (selections.count(op)) {
      select(node);
    } else if (scores) {
      change_scores(node);
    } else if (op == "GRU") {
      gru(node);
    } else if (op == "MatMul" || op == "Gemm") {
      product(node);
    } else if (op == "Add") {
      add(node);
    } else if (op == "LayerNormalization") {
      layer_norm(node);
    } else if (activations.count(op)) {
      activation(node);
    } else {
      arithmetic(node);
    }
  }

  void embed(const GraphNode& node) {
    const Value indices = input(node, 1);
    if (indices.kind != Kind::indices)
      refuse("gathers by something else than the history's item indices");
    const auto data = weight(input_name(node, 0));
    if (!data) refuse("gathers from what is no weight of the file");
    const Tensor& tensor = file_.at(data->tensor);
    if (tensor.shape.size() != 2 || !is_real(tensor.dtype) || data->transpose ||
        integer(node, "axis", 0) != 0)
      refuse("does not gather rows of an embedding: of " + tensor.describe());
    if (has_embedding_)
      refuse("a second embedding (" + tensor.name +
             ") is gathered; only items' indices can be an input");
    has_embedding_ = true;
    embedding_ = *data;
    items_ = tensor.shape[0];
    set(node, sequence(false));
  }

  // Layout alone: the values stay as they are, in the same order.
  void pass(const GraphNode& node) {
    const Value value = input(node, 0);
    if (value.kind == Kind::unknown) refuse("reads something unknown");
    if (node.operation == "Dropout" && uniform(input_name(node, 2)).value_or(0) != 0)
      refuse("drops values at random; export the graph in evaluation mode");
    if (node.operation == "Cast") {
      const std::int64_t to = integer(node, "to", 0);
      const bool real = to == 1 || to == 10 || to == 11 || to == 16;
      const bool whole = to == 6 || to == 7 || to == 12 || to == 13;
      // Indices as f32 are exact up to 2^24, as halves up to 2^11.
      if (value.kind == Kind::indices ? !(whole || to == 11 || (to == 1 && rows_fit_f32())) : !real)
        refuse("converts to a type that does not hold all values");
    }
    const auto from = looked_up(node.inputs[0]), into = looked_up(node.outputs[0]);
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      if (!from[r] || !into[r]) refuse("cannot be followed: it depends on an unknown value");
      if (from[r]->values != into[r]->values && node.operation != "Cast")
        refuse("puts values in another order");
    }
    set(node, value);
  }

  bool rows_fit_f32() const {
    return std::all_of(file_.tensors.begin(), file_.tensors.end(), [](const Tensor& tensor) {
      return tensor.shape.size() != 2 || tensor.shape[0] <= std::uint64_t{1} << 24;
    });
  }

  // Whether a Slice keeps everything, of a history of whatever length.
  bool is_whole(const GraphNode& node) const {
    const auto list = [&](std::size_t index, const char* name) -> std::vector<double> {
      if (const auto found = node.integer_lists.find(name); found != node.integer_lists.end())
        return {found->second.begin(), found->second.end()};
      const auto array = constant(input_name(node, index));
      return array ? array->values : std::vector<double>{};
    };
    const auto starts = list(1, "starts"), ends = list(2, "ends"), axes = list(3, "axes"),
               steps = list(4, "steps");
    const Array *longest = runs_.back()->find(node.inputs[0]),
                *shortest = runs_.front()->find(node.inputs[0]);
    if (starts.empty() || ends.size() != starts.size() || !longest || !shortest) return false;
    for (std::size_t s = 0; s < starts.size(); ++s) {
      double axis = s < axes.size() ? axes[s] : static_cast<double>(s);
      if (axis < 0) axis += static_cast<double>(longest->shape.size());
      const auto d = static_cast<std::size_t>(axis);
      if (d >= longest->shape.size() || d >= shortest->shape.size()) return false;
      const bool fixed = longest->shape[d] == shortest->shape[d];
      if (starts[s] != 0 || (s < steps.size() && steps[s] != 1) ||
          ends[s] < (fixed ? static_cast<double>(longest->shape[d])
                           : double{std::numeric_limits<std::int32_t>::max()}))
        return false;
    }
    return true;
  }

  // Takes the last event's vector or scores, in histories of all lengths.
  void select(const GraphNode& node) {
    Value value = input(node, 0);
    for (std::size_t i = 1; i < node.inputs.size(); ++i)
      if (dependence(node.inputs[i]) == Dependence::items)
        refuse("selects by the history's items, which the model file cannot express");
    const auto from = looked_up(node.inputs[0]), into = looked_up(node.outputs[0]);
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      if (!from[r] || !into[r]) refuse("cannot be followed: it depends on an unknown value");
      const auto &all = from[r]->values, &kept = into[r]->values;
      const std::size_t events = value.last ? 1 : lengths_[r];
      if (kept.size() * events != all.size() ||
          !std::equal(kept.begin(), kept.end(),
                      all.end() - static_cast<std::ptrdiff_t>(kept.size())))
        refuse(value.kind == Kind::scores
                   ? "takes something else than the last event's scores of all items in order"
                   : "takes something else than the last event");
    }
    value.last = true;
    set(node, value);
  }

  void gru(const GraphNode& node) {
    const Value value = settle(input(node, 0));
    current(value);
    if (value.last) refuse("runs over the last event alone, without the history before it");
    if (const auto direction = node.strings.find("direction");
        direction != node.strings.end() && direction->second != "forward")
      refuse("direction " + direction->second + ": only forward reads the past alone");
    if (node.floats.count("clip")) refuse("clip has no counterpart");
    if (const auto functions = node.strings.find("activations");
        functions != node.strings.end() && functions->second != "Sigmoid,Tanh")
      refuse("activations " + functions->second + ": only Sigmoid,Tanh converts");
    if (!input_name(node, 4).empty())
      refuse("takes lengths of sequences; export the graph for one history");
    if (const std::string& state = input_name(node, 5); !state.empty()) {
      for (const Array* array : looked_up(state))
        if (dependence(state) == Dependence::items || !array ||
            std::any_of(array->values.begin(), array->values.end(),
                        [](double v) { return v != 0; }))
          refuse("begins with a state other than zero");
    }
    Layer layer{.type = Layer::Type::gru};
    layer.gate_order = "zrn";
    layer.reset_after = integer(node, "linear_before_reset", 0) != 0;
    layer.weights["w_ih"] = {weight(node, 1)};
    layer.weights["w_hh"] = {weight(node, 2)};
    if (!input_name(node, 3).empty()) {
      TensorPart part = weight(node, 3);
      const std::uint64_t half = file_.at(part.tensor).elements() / 2;
      part.slice = {0, half};
      layer.weights["b_ih"] = {part};
      part.slice = {half, 2 * half};
      layer.weights["b_hh"] = {part};
    }
    layers_.push_back(layer);
    set(node, sequence(false));
    if (node.outputs.size() > 1) values_[node.outputs[1]] = sequence(true);
  }

  void product(const GraphNode& node) {
    const Value left = settle(input(node, 0));
    if (left.kind != Kind::sequence)
      refuse(input(node, 1).kind == Kind::unknown ? "multiplies something unknown"
                                                  : "a product with the weight in front");
    current(left);
    TensorPart right = weight(node, 1);
    // Linear layers keep [outputs, inputs], MatMul wants [inputs, outputs].
    right.transpose = !right.transpose;
    std::optional<TensorPart> added;
    if (node.operation == "Gemm") {
      if (integer(node, "transA", 0) != 0 || number(node, "alpha", 1) != 1 ||
          number(node, "beta", 1) != 1)
        refuse("transA, alpha and beta other than 0, 1 and 1 have no counterpart");
      if (integer(node, "transB", 0) != 0) right.transpose = !right.transpose;
      if (!input_name(node, 2).empty()) added = weight(node, 2);
    }
    const Value value{
        .kind = Kind::linear, .weight = right, .layers = layers_.size(), .last = left.last};
    if (&node == score_product_ && outputs(right) == items_) {
      output_ = right;
      if (added) add_bias(node.inputs[2], 1);
      set(node, {.kind = Kind::scores, .layers = layers_.size(), .last = left.last});
    } else {
      set(node, added ? finish(value, added) : value);
    }
  }

  // Outputs of a weight as linear layers keep it.
  std::uint64_t outputs(const TensorPart& part) const {
    const Tensor& tensor = file_.at(part.tensor);
    if (tensor.shape.size() != 2) refuse(tensor.describe() + " is not a matrix");
    return tensor.shape[part.transpose ? 1 : 0];
  }

  // Takes a product, and a bias if there is one, as a layer.
  Value finish(const Value& product, const std::optional<TensorPart>& added) {
    if (product.layers != layers_.size()) refuse("a product that is used after later layers");
    Layer layer{.type = Layer::Type::linear};
    layer.weights["weight"] = {product.weight};
    if (added) layer.weights["bias"] = {*added};
    layers_.push_back(layer);
    return sequence(product.last);
  }

  // What follows the scores: constants that are added to them are a bias; what keeps their order is
  // left out; all else has no counterpart.
  void change_scores(const GraphNode& node) {
    const std::string& op = node.operation;
    const bool first = input(node, 0).kind == Kind::scores;
    const std::string other = input_name(node, first ? 1 : 0);
    const Value value = input(node, first ? 0 : 1);
    if (op == "Softmax" || op == "LogSoftmax" || op == "Sigmoid") {
      if (op != "Sigmoid")
        for (const Array* array : looked_up(node.inputs[0])) {
          const auto rank = array ? static_cast<std::int64_t>(array->shape.size()) : 0;
          if (const std::int64_t axis = integer(node, "axis", -1); axis != -1 && axis != rank - 1)
            refuse("is over another axis than the items'");
        }
      monotone_ = true;
      notes_.push_back("left out: " + node.describe() + " of the scores, which changes no ranking");
      return set(node, value);
    }
    const auto number = uniform(other);
    if (!monotone_ && (op == "Add" || (op == "Sub" && first))) {
      add_bias(other, op == "Add" ? 1 : -1);
    } else if (!monotone_ && (op == "Mul" || (op == "Div" && first)) && number && *number > 0) {
      scale_ *= op == "Mul" ? *number : 1 / *number;
    } else {
      refuse("changes the scores in a way that the model file cannot express");
    }
    set(node, value);
  }

  struct BiasTerm {
    std::string name;
    double sign, scale;  // of the scores before it was added
  };

  void add_bias(const std::string& name, double sign) {
    const auto array = constant(name);
    const Tensor* stored = array ? nullptr : file_.find(name);
    const std::uint64_t size = array ? array->values.size() : stored ? stored->elements() : 0;
    if (dependence(name) == Dependence::items || (size != 1 && size != items_))
      refuse("adds to the scores what is no constant of the items");
    bias_terms_.push_back({name, sign, scale_});
  }

  std::optional<TensorPart> bias(const std::string& output) {
    if (bias_terms_.empty()) return std::nullopt;
    if (const BiasTerm& only = bias_terms_[0];
        bias_terms_.size() == 1 && only.sign == 1 && only.scale == 1)
      if (const auto part = weight(only.name); part && file_.at(part->tensor).elements() == items_)
        return part;
    std::vector<double> sum(static_cast<std::size_t>(items_));
    for (const BiasTerm& term : bias_terms_) {
      const auto array = constant(term.name);
      if (!array) refuse("adds a constant that is not known");
      for (std::size_t i = 0; i < sum.size(); ++i)
        sum[i] += term.sign / term.scale * array->values[array->values.size() == 1 ? 0 : i];
    }
    const std::string name = output + " bias";
    if (!file_.find(name)) add_tensor(name, {static_cast<std::int64_t>(items_)}, sum);
    return TensorPart{.tensor = name};
  }

  void add(const GraphNode& node) {
    const std::size_t constant_at = dependence(input_name(node, 0)) == Dependence::items ? 1 : 0;
    const std::string& other = input_name(node, constant_at);
    if (dependence(other) != Dependence::items) {
      const Value value = input(node, 1 - constant_at);
      if (value.kind == Kind::linear) return set(node, finish(value, weight(node, constant_at)));
      if (value.kind == Kind::scaled)
        return end_norm(node, value, value.weight, weight(node, constant_at));
      if (value.kind == Kind::variance) {
        if (!is_constant(other, 1e-5)) refuse("a layer norm whose epsilon is not 1e-5");
        return set(node, value);
      }
      if (value.kind == Kind::erf && is_constant(other, 1))
        return set(node, {.kind = Kind::erf_plus_one, .layers = value.layers, .last = value.last});
      refuse("adds a weight to the events' vector, as position embeddings do");
    }
    Value left = settle(input(node, 0)), right = settle(input(node, 1));
    if (left.kind != Kind::sequence || right.kind != Kind::sequence)
      refuse("adds something unknown to the events' vector");
    if (left.last != right.last) refuse("adds the last event's vector to those of all events");
    if (left.layers < right.layers) std::swap(left, right);
    current(left);
    residuals_.push_back({right.layers, layers_.size()});
    layers_.push_back({.type = Layer::Type::add});
    set(node, sequence(left.last));
  }

  std::int64_t rank(const std::string& name) const {
    const Array* array = runs_.back()->find(name);
    if (!array) refuse("cannot be followed: it depends on an unknown value");
    return static_cast<std::int64_t>(array->shape.size());
  }

  void layer_norm(const GraphNode& node) {
    const Value value = settle(input(node, 0));
    current(value);
    const std::int64_t axis = integer(node, "axis", -1);
    if (axis != -1 && axis != rank(node.inputs[0]) - 1)
      refuse("normalises another axis than the last");
    if (std::abs(number(node, "epsilon", 1e-5f) - 1e-5f) > 1e-9f)
      refuse("an epsilon other than 1e-5");
    std::optional<TensorPart> added;
    if (!input_name(node, 2).empty()) added = weight(node, 2);
    end_norm(node, value, weight(node, 1), added);
  }

  void end_norm(const GraphNode& node, const Value& value, const TensorPart& scale,
                const std::optional<TensorPart>& added) {
    Layer layer{.type = Layer::Type::layer_norm};
    layer.weights["weight"] = {scale};
    if (added) layer.weights["bias"] = {*added};
    layers_.push_back(layer);
    set(node, sequence(value.last));
  }

  void activation(const GraphNode& node) {
    const Value value = settle(input(node, 0));
    current(value);
    if (const auto form = node.strings.find("approximate");
        form != node.strings.end() && form->second != "none")
      refuse("approximate " + form->second + ": only the exact GELU converts");
    add_activation(node, value, node.operation);
  }

  void add_activation(const GraphNode& node, const Value& value, const std::string& function) {
    Layer layer{.type = Layer::Type::activation};
    layer.function = lower_case(function);
    layers_.push_back(layer);
    set(node, sequence(value.last));
  }

  bool is_mean_of_last_axis(const GraphNode& node) const {
    const std::int64_t size = rank(node.inputs[0]);
    std::vector<double> axes;
    if (const auto list = node.integer_lists.find("axes"); list != node.integer_lists.end())
      axes.assign(list->second.begin(), list->second.end());
    else if (const auto array = constant(input_name(node, 1)))
      axes = array->values;
    return node.operation == "ReduceMean" && axes.size() == 1 &&
           (axes[0] == -1 || axes[0] == static_cast<double>(size - 1));
  }

  // Layer norm and GELU as older operator sets write them.
  void arithmetic(const GraphNode& node) {
    const std::string& op = node.operation;
    if (!node.inputs.empty() && input(node, 0).kind == Kind::linear)
      values_[node.inputs[0]] = settle(input(node, 0));
    const Value left = input(node, 0), right = input(node, 1);
    const std::string second = input_name(node, 1);
    const auto to = [&](Kind kind) {
      set(node, {.kind = kind, .layers = left.layers, .last = left.last});
    };
    const bool newest = left.layers == layers_.size() &&
                        (right.kind == Kind::unknown || right.layers == layers_.size());
    if (newest) {
      if (left.kind == Kind::sequence && op == "ReduceMean" && is_mean_of_last_axis(node))
        return to(Kind::mean);
      if (op == "Sub" && left.kind == Kind::sequence && right.kind == Kind::mean)
        return to(Kind::centred);
      if (op == "Pow" && left.kind == Kind::centred && is_constant(second, 2))
        return to(Kind::squared);
      if (left.kind == Kind::squared && op == "ReduceMean" && is_mean_of_last_axis(node))
        return to(Kind::variance);
      if (op == "Sqrt" && left.kind == Kind::variance) return to(Kind::deviation);
      if (op == "Div" && left.kind == Kind::centred && right.kind == Kind::deviation)
        return to(Kind::normalised);
      if (op == "Mul" && left.kind == Kind::normalised)
        if (const auto scale = weight(second))
          return set(
              node,
              {.kind = Kind::scaled, .weight = *scale, .layers = left.layers, .last = left.last});
      if (op == "Div" && left.kind == Kind::sequence && is_constant(second, std::sqrt(2.0)))
        return to(Kind::erf_input);
      if (op == "Erf" && left.kind == Kind::erf_input) return to(Kind::erf);
      if (op == "Mul" && left.kind == Kind::sequence && right.kind == Kind::erf_plus_one)
        return to(Kind::gelu_twice);
      if (op == "Mul" && left.kind == Kind::gelu_twice && is_constant(second, 0.5))
        return add_activation(node, left, "gelu");
    }
    refuse("has no counterpart in the runtime");
  }

  // Puts saves in front of the layers whose input is added later.
  void place_residuals(Mapping& mapping) {
    std::array<std::size_t, 8> busy_until{};
    std::sort(residuals_.begin(), residuals_.end(),
              [](const Residual& a, const Residual& b) { return a.from < b.from; });
    std::map<std::size_t, std::vector<std::uint32_t>> saves;
    for (const Residual& residual : residuals_) {
      const auto slot = std::find_if(busy_until.begin(), busy_until.end(),
                                     [&](std::size_t until) { return until <= residual.from; });
      if (slot == busy_until.end()) refuse("more than 8 residuals at a time");
      *slot = residual.to;
      const auto number = static_cast<std::uint32_t>(slot - busy_until.begin());
      saves[residual.from].push_back(number);
      layers_[residual.to].slot = number;
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      for (const std::uint32_t slot : saves[l]) {
        Layer save{.type = Layer::Type::save};
        save.slot = slot;
        mapping.layers.push_back(save);
      }
      mapping.layers.push_back(layers_[l]);
    }
  }

  TensorFile& file_;
  std::string where_, input_;
  std::vector<std::size_t> lengths_;                // of the histories of the runs
  std::vector<std::unique_ptr<GraphRunner>> runs_;  // shortest history first
  std::vector<GraphNode> nodes_;
  std::map<std::string, Dependence> dependence_;
  std::map<std::string, std::size_t> producers_;
  // Of one output:
  const GraphNode* score_product_ = nullptr;
  std::map<std::string, Value> values_;
  std::vector<Layer> layers_;
  std::vector<Residual> residuals_;
  std::vector<std::string> notes_;
  bool has_embedding_ = false;
  std::uint64_t items_ = 0;  // rows of the embedding
  TensorPart embedding_;
  std::optional<TensorPart> output_;
  std::vector<BiasTerm> bias_terms_;
  double scale_ = 1;       // of the scores
  bool monotone_ = false;  // something that keeps their order alone was left out
};

}  // namespace

Mapping trace_graph(TensorFile& file) { return Tracer(file).trace(); }

}  // namespace personalize::tools
