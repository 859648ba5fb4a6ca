// The layers of an ONNX graph: follows the events' vector from the embedding's Gather to the
// scores.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <set>

#include "command/command.hpp"
#include "convert/mapping.hpp"

namespace personalize::tools {
namespace {

// What a name of the graph stands for.
struct Value {
  enum class Kind {
    other,     // shapes, indices, initial states: of no interest
    weight,    // an initialiser, perhaps transposed
    sequence,  // the events' vector behind `layers` of the layers
    linear,    // a product with a weight, which a bias may follow
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
  Kind kind = Kind::other;
  TensorPart weight = {};
  std::size_t layers = 0;
};

using Kind = Value::Kind;

class Tracer {
 public:
  explicit Tracer(TensorFile& file) : file_(file) {}

  Mapping trace() {
    const Graph& graph = *file_.graph;
    for (const Tensor& tensor : file_.tensors) {
      if (tensor.dtype == DType::f32 || tensor.dtype == DType::f64 || tensor.dtype == DType::f16 ||
          tensor.dtype == DType::bf16)
        values_[tensor.name] = {.kind = Kind::weight, .weight = {.tensor = tensor.name}};
    }
    for (const GraphNode& node : graph.nodes) {
      where_ = file_.name + ": ONNX node " + node.operation;
      step(node);
    }
    for (const std::string& output : graph.outputs)
      if (const Value value = value_of(output); value.kind == Kind::linear) finish(value);
    if (!has_embedding_)
      throw Failure(file_.name + ": ONNX: no Gather of an embedding by item index was found");
    const auto is_newest = [&](const std::string& name) {
      const Value value = value_of(name);
      return value.kind == Kind::sequence && value.layers == layers_.size();
    };
    if (!output_ && std::none_of(graph.outputs.begin(), graph.outputs.end(), is_newest))
      throw Failure(file_.name + ": ONNX: no output is a score for each item or the last vector");
    Mapping mapping{.architecture = "onnx graph"};
    mapping.embedding = embedding_;
    mapping.output = output_;
    mapping.output_bias = output_bias_;
    mapping.padding_if_zero = true;
    place_residuals(mapping);
    return mapping;
  }

 private:
  struct Residual {
    std::size_t from, to;  // numbers of layers: saved behind `from`, added behind `to`
  };

  [[noreturn]] void refuse(const std::string& what) const { throw Failure(where_ + ": " + what); }

  Value value_of(const std::string& name) const {
    const auto found = values_.find(name);
    return found == values_.end() ? Value{} : found->second;
  }
  Value input(const GraphNode& node, std::size_t index) const {
    return index < node.inputs.size() ? value_of(node.inputs[index]) : Value{};
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
  // The value of a weight of one element.
  std::optional<float> constant(const Value& value) const {
    if (value.kind != Kind::weight) return std::nullopt;
    const Tensor& tensor = file_.at(value.weight.tensor);
    if (tensor.elements() != 1) return std::nullopt;
    return read_values(file_, tensor)[0];
  }
  bool is_constant(const Value& value, double expected) const {
    const auto given = constant(value);
    return given && std::abs(static_cast<double>(*given) - expected) < 1e-6;
  }

  // Only the newest vector can go on through layers; an older one is a residual.
  std::size_t current(const Value& value) const {
    if (value.kind != Kind::sequence || value.layers != layers_.size())
      refuse("reads a vector that is not the newest; only chains with residual additions convert");
    return value.layers;
  }
  Value sequence() const { return {.kind = Kind::sequence, .layers = layers_.size()}; }

  void step(const GraphNode& node) {
    const std::string& op = node.operation;
    static const std::set<std::string> transparent{"Identity", "Dropout",   "Cast",
                                                   "Squeeze",  "Unsqueeze", "Transpose",
                                                   "Slice",    "Reshape",   "Flatten"};
    if (op == "Gather") {
      gather(node);
    } else if (transparent.count(op)) {
      pass(node);
    } else if (op == "GRU") {
      gru(node);
    } else if (op == "MatMul" || op == "Gemm") {
      product(node);
    } else if (op == "Add") {
      add(node);
    } else if (op == "LayerNormalization") {
      layer_norm(node);
    } else if (op == "Tanh" || op == "Sigmoid" || op == "Relu" || op == "Gelu") {
      activation(node);
    } else {
      arithmetic(node);
    }
  }

  void gather(const GraphNode& node) {
    const Value data = input(node, 0);
    if (data.kind == Kind::sequence || data.kind == Kind::linear) {
      require_last(node);
      set(node, data);
      return;
    }
    if (data.kind != Kind::weight) return;
    const Tensor& tensor = file_.at(data.weight.tensor);
    if (tensor.shape.size() != 2) return;
    if (has_embedding_)
      refuse("a second embedding (" + tensor.name +
             ") is gathered; only items' indices can be an input");
    has_embedding_ = true;
    embedding_ = data.weight;
    items_ = tensor.shape[data.weight.transpose ? 1 : 0];
    values_[node.outputs[0]] = sequence();
  }

  // Where the index is a constant: the last event's vector is taken, no other.
  void require_last(const GraphNode& node) {
    const Tensor* index = node.inputs.size() > 1 ? file_.find(node.inputs[1]) : nullptr;
    if (!index || index->dtype != DType::i64 || index->elements() != 1) return;
    if (read_values(file_, *index)[0] != -1) refuse("takes another event than the last");
  }

  void pass(const GraphNode& node) {
    Value value = input(node, 0);
    if (value.kind == Kind::weight && node.operation == "Transpose" &&
        file_.at(value.weight.tensor).shape.size() == 2)
      value.weight.transpose = !value.weight.transpose;
    else if (value.kind == Kind::weight && node.operation == "Slice")
      value = {};
    set(node, value);
  }

  void gru(const GraphNode& node) {
    current(input(node, 0));
    if (const auto direction = node.strings.find("direction");
        direction != node.strings.end() && direction->second != "forward")
      refuse("direction " + direction->second + ": only forward reads the past alone");
    if (node.floats.count("clip")) refuse("clip has no counterpart");
    if (const auto functions = node.strings.find("activations");
        functions != node.strings.end() && functions->second != "Sigmoid,Tanh")
      refuse("activations " + functions->second + ": only Sigmoid,Tanh converts");
    if (const Value state = input(node, 5); state.kind == Kind::weight) {
      const auto values = read_values(file_, file_.at(state.weight.tensor));
      if (std::any_of(values.begin(), values.end(), [](float v) { return v != 0; }))
        refuse("an initial state other than zero");
    }
    Layer layer{.type = Layer::Type::gru};
    layer.gate_order = "zrn";
    layer.reset_after = integer(node, "linear_before_reset", 0) != 0;
    layer.weights["w_ih"] = {weight(node, 1)};
    layer.weights["w_hh"] = {weight(node, 2)};
    if (input(node, 3).kind == Kind::weight) {
      TensorPart bias = weight(node, 3);
      const std::uint64_t half = file_.at(bias.tensor).elements() / 2;
      bias.slice = {0, half};
      layer.weights["b_ih"] = {bias};
      bias.slice = {half, 2 * half};
      layer.weights["b_hh"] = {bias};
    }
    layers_.push_back(layer);
    set(node, sequence());
  }

  TensorPart weight(const GraphNode& node, std::size_t index) const {
    const Value value = input(node, index);
    if (value.kind != Kind::weight) refuse("input " + std::to_string(index) + " is no initialiser");
    return value.weight;
  }

  void product(const GraphNode& node) {
    const Value left = input(node, 0), right = input(node, 1);
    if (left.kind != Kind::sequence) {
      if (right.kind == Kind::sequence) refuse("a product with the weight in front");
      if (left.kind != Kind::other && left.kind != Kind::weight)
        refuse("has no counterpart in the runtime");
      return;
    }
    current(left);
    if (right.kind != Kind::weight) refuse("its second input is no initialiser");
    Value value{.kind = Kind::linear, .weight = right.weight, .layers = layers_.size()};
    // Linear layers keep [outputs, inputs], MatMul wants [inputs, outputs].
    value.weight.transpose = !value.weight.transpose;
    if (node.operation == "Gemm") {
      if (integer(node, "transA", 0) != 0 || number(node, "alpha", 1) != 1 ||
          number(node, "beta", 1) != 1)
        refuse("transA, alpha and beta other than 0, 1 and 1 have no counterpart");
      if (integer(node, "transB", 0) != 0) value.weight.transpose = !value.weight.transpose;
      if (input(node, 2).kind == Kind::weight) {
        finish(value, input(node, 2).weight);
        set(node, after_);
        return;
      }
    }
    set(node, value);
  }

  // Outputs of a weight as linear layers keep it.
  std::uint64_t outputs(const TensorPart& part) const {
    const Tensor& tensor = file_.at(part.tensor);
    if (tensor.shape.size() != 2) refuse(tensor.describe() + " is not a matrix");
    return tensor.shape[part.transpose ? 1 : 0];
  }

  // Takes a product, and a bias if there is one, as the scores or as a layer.
  void finish(const Value& product, std::optional<TensorPart> bias = std::nullopt) {
    if (!output_ && outputs(product.weight) == items_) {
      output_ = product.weight;
      output_bias_ = bias;
      after_ = {};
      return;
    }
    if (product.layers != layers_.size()) refuse("a product that is used after later layers");
    Layer layer{.type = Layer::Type::linear};
    layer.weights["weight"] = {product.weight};
    if (bias) layer.weights["bias"] = {*bias};
    layers_.push_back(layer);
    after_ = sequence();
  }

  void add(const GraphNode& node) {
    Value left = input(node, 0), right = input(node, 1);
    if (left.kind == Kind::weight) std::swap(left, right);
    if (left.kind == Kind::linear && right.kind == Kind::weight) {
      finish(left, right.weight);
      set(node, after_);
    } else if (left.kind == Kind::scaled && right.kind == Kind::weight) {
      end_norm(node, left.weight, right.weight);
    } else if (left.kind == Kind::variance && right.kind == Kind::weight) {
      if (!is_constant(right, 1e-5)) refuse("a layer norm whose epsilon is not 1e-5");
      set(node, left);
    } else if (left.kind == Kind::erf && is_constant(right, 1)) {
      set(node, {.kind = Kind::erf_plus_one, .layers = left.layers});
    } else if (left.kind == Kind::sequence && right.kind == Kind::weight) {
      refuse("adds a weight to the events' vector, as position embeddings do");
    } else if (left.kind == Kind::sequence || right.kind == Kind::sequence) {
      // A product without a bias that meets a residual is a whole layer.
      for (Value* value : {&left, &right})
        if (value->kind == Kind::linear) {
          finish(*value);
          *value = after_;
        }
      if (left.kind != Kind::sequence || right.kind != Kind::sequence)
        refuse("adds something unknown to the events' vector");
      if (left.layers < right.layers) std::swap(left, right);
      current(left);
      residuals_.push_back({right.layers, layers_.size()});
      layers_.push_back({.type = Layer::Type::add});
      set(node, sequence());
    }
  }

  void layer_norm(const GraphNode& node) {
    current(input(node, 0));
    if (integer(node, "axis", -1) != -1 && integer(node, "axis", -1) != 2)
      refuse("normalises another axis than the last");
    if (std::abs(number(node, "epsilon", 1e-5f) - 1e-5f) > 1e-9f)
      refuse("an epsilon other than 1e-5");
    end_norm(node, weight(node, 1), weight(node, 2));
  }

  void end_norm(const GraphNode& node, const TensorPart& scale, const TensorPart& bias) {
    Layer layer{.type = Layer::Type::layer_norm};
    layer.weights["weight"] = {scale};
    layer.weights["bias"] = {bias};
    layers_.push_back(layer);
    set(node, sequence());
  }

  void activation(const GraphNode& node) {
    Value value = input(node, 0);
    if (value.kind == Kind::linear) {
      finish(value);
      value = after_;
    }
    if (value.kind == Kind::other || value.kind == Kind::weight) return;
    current(value);
    if (const auto form = node.strings.find("approximate");
        form != node.strings.end() && form->second != "none")
      refuse("approximate " + form->second + ": only the exact GELU converts");
    add_activation(node, node.operation);
  }

  void add_activation(const GraphNode& node, std::string function) {
    Layer layer{.type = Layer::Type::activation};
    for (char& c : function) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    layer.function = function;
    layers_.push_back(layer);
    set(node, sequence());
  }

  // Layer norm and GELU as older operator sets write them.
  void arithmetic(const GraphNode& node) {
    const std::string& op = node.operation;
    Value left = input(node, 0);
    const Value right = input(node, 1);
    if (left.kind == Kind::linear) {
      finish(left);
      left = after_;
      values_[node.inputs[0]] = left;
    }
    const auto to = [&](Kind kind) { set(node, {.kind = kind, .layers = layers_.size()}); };
    if (op == "ReduceMean" && left.kind == Kind::sequence) return to(Kind::mean);
    if (op == "Sub" && left.kind == Kind::sequence && right.kind == Kind::mean)
      return to(Kind::centred);
    if (op == "Pow" && left.kind == Kind::centred && is_constant(right, 2))
      return to(Kind::squared);
    if (op == "ReduceMean" && left.kind == Kind::squared) return to(Kind::variance);
    if (op == "Sqrt" && left.kind == Kind::variance) return to(Kind::deviation);
    if (op == "Div" && left.kind == Kind::centred && right.kind == Kind::deviation)
      return to(Kind::normalised);
    if (op == "Mul" && left.kind == Kind::normalised && right.kind == Kind::weight)
      return set(node, {.kind = Kind::scaled, .weight = right.weight, .layers = layers_.size()});
    if (op == "Div" && left.kind == Kind::sequence && is_constant(right, std::sqrt(2.0)))
      return to(Kind::erf_input);
    if (op == "Erf" && left.kind == Kind::erf_input) return to(Kind::erf);
    if (op == "Mul" && left.kind == Kind::sequence && right.kind == Kind::erf_plus_one)
      return to(Kind::gelu_twice);
    if (op == "Mul" && left.kind == Kind::gelu_twice && is_constant(right, 0.5))
      return add_activation(node, "gelu");
    static const std::set<std::string> ignored{"Constant", "Shape",  "ConstantOfShape",
                                               "Concat",   "Expand", "Range",
                                               "Equal",    "Where",  "Sub",
                                               "Mul",      "Div",    "Softmax"};
    const auto matters = [&](const std::string& name) {
      const Kind kind = value_of(name).kind;
      return kind != Kind::other && kind != Kind::weight;
    };
    // Of the vector's shape, an initial state is made.
    if (op == "Shape") return;
    if (ignored.count(op) && std::none_of(node.inputs.begin(), node.inputs.end(), matters)) return;
    if (std::any_of(node.inputs.begin(), node.inputs.end(), matters))
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
  std::string where_;
  std::map<std::string, Value> values_;
  std::vector<Layer> layers_;
  std::vector<Residual> residuals_;
  bool has_embedding_ = false;
  std::uint64_t items_ = 0;
  TensorPart embedding_;
  std::optional<TensorPart> output_, output_bias_;
  Value after_;  // what the last finished product stands for
};

}  // namespace

Mapping trace_graph(TensorFile& file) { return Tracer(file).trace(); }

}  // namespace personalize::tools
