#include "convert/run_graph.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

const std::string not_run = "the ONNX graph cannot be run: ";
// Of one array: more than the scores of a large catalogue behind each event of a history.
constexpr std::size_t max_elements = std::size_t{1} << 27;

double truth(bool value) { return value ? 1 : 0; }
double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

std::int64_t attribute(const GraphNode& node, const char* name, std::int64_t otherwise) {
  const auto found = node.integers.find(name);
  return found == node.integers.end() ? otherwise : found->second;
}

[[noreturn]] void refuse(const GraphNode& node, const std::string& what) {
  throw Failure(not_run + node.describe() + " " + what);
}

// An element that is a size, an index or an axis.
std::int64_t integer(double value) {
  if (!(std::abs(value) <= 0x1p63)) throw Failure(not_run + "an index is no number");
  return value >= 0x1p63 ? std::numeric_limits<std::int64_t>::max()
                         : static_cast<std::int64_t>(value);
}

// A dimension counted from the back where it is negative.
std::size_t axis_of(const GraphNode& node, std::int64_t axis, std::size_t rank) {
  if (axis < 0) axis += static_cast<std::int64_t>(rank);
  if (axis < 0 || axis >= static_cast<std::int64_t>(rank)) refuse(node, "has an axis out of range");
  return static_cast<std::size_t>(axis);
}

using Array = GraphRunner::Array;

double scalar(const GraphNode& node, const Array& array) {
  if (array.values.size() != 1) refuse(node, "has an array for a number");
  return array.values[0];
}

// To a TensorProto.DataType.
Array cast(const GraphNode& node, Array array) {
  const std::int64_t to = attribute(node, "to", 0);
  array.integral = to != 1 && to != 10 && to != 11 && to != 16;
  if (!array.integral) return array;
  const std::int64_t bits = to == 2 || to == 3 ? 8 : to == 4 || to == 5 ? 16 : 64;
  const bool has_sign = to == 3 || to == 5 || to == 6 || to == 7;
  for (double& value : array.values) {
    if (to == 9) {
      value = truth(value != 0);
      continue;
    }
    value = std::trunc(value);
    if (bits == 64) continue;
    const double span = std::ldexp(1.0, static_cast<int>(bits));
    value -= span * std::floor(value / span);
    if (has_sign && value >= span / 2) value -= span;
  }
  return array;
}

std::size_t elements(const std::vector<std::int64_t>& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0 || (size > 0 && count > max_elements / static_cast<std::size_t>(size)))
      throw Failure(not_run + "an array is too large");
    count *= static_cast<std::size_t>(size);
  }
  return count;
}

std::vector<std::int64_t> common_shape(const Array& a, const Array& b) {
  const std::size_t rank = std::max(a.shape.size(), b.shape.size());
  std::vector<std::int64_t> shape(rank, 1);
  for (const Array* array : {&a, &b})
    for (std::size_t d = 0; d < array->shape.size(); ++d) {
      std::int64_t& size = shape[rank - array->shape.size() + d];
      if (array->shape[d] != 1) size = array->shape[d];
    }
  return shape;
}

Array broadcast(const Array& array, const std::vector<std::int64_t>& shape) {
  if (array.shape.size() > shape.size()) throw Failure(not_run + "shapes do not fit");
  Array out{
      .shape = shape, .values = std::vector<double>(elements(shape)), .integral = array.integral};
  const std::size_t missing = shape.size() - array.shape.size();
  std::vector<std::int64_t> index(shape.size());
  for (double& value : out.values) {
    std::size_t at = 0;
    for (std::size_t d = 0; d < array.shape.size(); ++d)
      at = at * static_cast<std::size_t>(array.shape[d]) +
           static_cast<std::size_t>(array.shape[d] == 1 ? 0 : index[missing + d]);
    if (at >= array.values.size()) throw Failure(not_run + "shapes do not fit");
    value = array.values[at];
    for (std::size_t d = index.size(); d-- > 0;) {
      if (++index[d] < shape[d]) break;
      index[d] = 0;
    }
  }
  return out;
}

Array transposed(const Array& array, const std::vector<std::int64_t>& order) {
  const std::size_t rank = array.shape.size();
  Array out{.integral = array.integral};
  std::vector<std::size_t> strides(rank, 1);
  for (std::size_t d = rank; d-- > 1;)
    strides[d - 1] = strides[d] * static_cast<std::size_t>(array.shape[d]);
  for (const std::int64_t d : order) out.shape.push_back(array.shape[static_cast<std::size_t>(d)]);
  out.values.resize(array.values.size());
  std::vector<std::int64_t> index(rank);
  for (double& value : out.values) {
    std::size_t at = 0;
    for (std::size_t d = 0; d < rank; ++d)
      at += static_cast<std::size_t>(index[d]) * strides[static_cast<std::size_t>(order[d])];
    value = array.values[at];
    for (std::size_t d = rank; d-- > 0;) {
      if (++index[d] < out.shape[d]) break;
      index[d] = 0;
    }
  }
  return out;
}

}  // namespace

GraphRunner::GraphRunner(TensorFile& file) : file_(file) {
  for (const GraphInput& input : file.graph->inputs) {
    if (file.find(input.name)) continue;  // older exporters list initialisers as inputs, too
    if (input_) throw Failure(not_run + "it has more than one input");
    input_ = input;
  }
  if (!input_) throw Failure(not_run + "it has no input");
  for (const Tensor& tensor : file.tensors)
    if (element_bytes(tensor.dtype) > 0) stored_elements_ += tensor.elements();
}

// What a run may take goes with the weights: a few bytes can ask for more than any machine has.
void GraphRunner::spend(std::uint64_t elements, std::uint64_t work) {
  elements_left_ -= std::min(elements_left_, elements);
  work_left_ -= std::min(work_left_, work);
  if (elements_left_ == 0 || work_left_ == 0)
    throw Failure(not_run + "it computes more than its weights are worth");
}

std::optional<std::size_t> GraphRunner::fixed_length() const {
  if (!input_->shape) return std::nullopt;
  std::int64_t length = 1;
  for (const std::int64_t size : *input_->shape) {
    if (size < 0) return std::nullopt;
    length *= std::clamp<std::int64_t>(size, 0, 1 << 20);
  }
  return static_cast<std::size_t>(std::max<std::int64_t>(length, 1));
}

// The shapes that a history may have as the graph's input: a list, or one of a batch of one.
std::vector<std::vector<std::int64_t>> GraphRunner::layouts(std::size_t events) const {
  const auto length = static_cast<std::int64_t>(events);
  std::vector<std::vector<std::int64_t>> fitting;
  for (const auto& shape : {std::vector<std::int64_t>{1, length}, {length, 1}, {length}}) {
    if (!input_->shape ? shape.size() != 2 : shape.size() != input_->shape->size()) continue;
    bool fits = true;
    for (std::size_t d = 0; input_->shape && d < shape.size(); ++d)
      fits = fits && ((*input_->shape)[d] < 0 || (*input_->shape)[d] == shape[d]);
    if (fits) fitting.push_back(shape);
  }
  return fitting;
}

void GraphRunner::run(const std::vector<std::int64_t>& rows) {
  const auto shapes = layouts(rows.size());
  if (shapes.empty()) {
    std::string text;
    for (const std::int64_t size : input_->shape.value_or(std::vector<std::int64_t>{}))
      text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    throw Failure(not_run + "its input '" + input_->name + "' has shape [" + text +
                  "], which is not that of one history; export it with a batch of one");
  }
  const auto compute_as = [&](const std::vector<std::int64_t>& shape) {
    values_.clear();
    unknown_.clear();
    elements_left_ = (std::uint64_t{1} << 22) + 64 * stored_elements_;
    work_left_ = (std::uint64_t{1} << 28) + 1024 * stored_elements_;
    values_[input_->name] = {
        .shape = shape, .values = {rows.begin(), rows.end()}, .integral = true};
    return compute(file_.graph->nodes);
  };
  if (layout_ && *layout_ < shapes.size()) {
    compute_as(shapes[*layout_]);
    return;
  }
  // Whether the events or the batch come first shows where a GRU runs over more than one history.
  layout_ = 0;
  if (compute_as(shapes[0]) == 0 || shapes.size() == 1) return;
  const std::size_t unknown = unknown_.size();
  if (compute_as(shapes[1]); unknown_.size() < unknown) {
    layout_ = 1;
    return;
  }
  compute_as(shapes[0]);
}

// How many nodes' results stay unknown.
std::size_t GraphRunner::compute(const std::vector<GraphNode>& nodes) {
  std::size_t unknown = 0;
  for (const GraphNode& node : nodes) {
    try {
      if (node.operation == "If") {
        const Graph* chosen = branch(node);
        if (!chosen) refuse(node, "has an unknown condition");
        unknown += compute(chosen->nodes);
        for (std::size_t o = 0; o < std::min(chosen->outputs.size(), node.outputs.size()); ++o)
          if (const Array* result = find(chosen->outputs[o])) values_[node.outputs[o]] = *result;
        continue;
      }
      for (const std::string& name : node.inputs)
        if (const Array* array = find(name)) spend(0, array->values.size());
      auto results = apply(node);
      for (std::size_t o = 0; o < std::min(results.size(), node.outputs.size()); ++o) {
        if (!results[o].stored && elements(results[o].shape) != results[o].values.size())
          refuse(node, "has values that do not fit their shape");
        spend(results[o].values.size(), results[o].values.size());
        if (!node.outputs[o].empty()) values_[node.outputs[o]] = std::move(results[o]);
      }
    } catch (const Failure& failure) {
      ++unknown;
      // What follows from an unknown value is unknown for the same reason.
      std::string reason = failure.what();
      for (const std::string& name : node.inputs)
        if (const auto root = unknown_.find(name); root != unknown_.end()) reason = root->second;
      for (const std::string& name : node.outputs) unknown_[name] = reason;
    }
  }
  return unknown;
}

const Graph* GraphRunner::branch(const GraphNode& node) {
  const Array* condition = node.inputs.empty() ? nullptr : find(node.inputs[0]);
  if (!condition || condition->values.size() != 1) return nullptr;
  const auto found = node.graphs.find(condition->values[0] != 0 ? "then_branch" : "else_branch");
  return found == node.graphs.end() ? nullptr : found->second.get();
}

const GraphRunner::Array* GraphRunner::find(const std::string& name) {
  if (const auto found = values_.find(name); found != values_.end()) return &found->second;
  if (const auto found = constants_.find(name); found != constants_.end()) return &found->second;
  const auto tensor = std::find_if(file_.tensors.begin(), file_.tensors.end(),
                                   [&](const Tensor& candidate) { return candidate.name == name; });
  if (tensor == file_.tensors.end() || element_bytes(tensor->dtype) == 0 || unknown_.count(name))
    return nullptr;
  Array array;
  for (const std::uint64_t size : tensor->shape)
    array.shape.push_back(static_cast<std::int64_t>(size));
  constexpr std::uint64_t large = 1 << 16;
  if (tensor->shape.size() == 2 && is_real(tensor->dtype) && tensor->elements() >= large) {
    array.stored = static_cast<std::size_t>(tensor - file_.tensors.begin());
  } else if (tensor->dtype == DType::i64 && tensor->strides.empty()) {
    // The end of a Slice does not fit an f32.
    std::vector<std::int64_t> values(static_cast<std::size_t>(tensor->elements()));
    file_.sources[tensor->source]->read(tensor->offset, std::as_writable_bytes(std::span(values)));
    array.values.assign(values.begin(), values.end());
  } else {
    const auto values = read_values(file_, *tensor);
    array.values.assign(values.begin(), values.end());
  }
  array.integral = !is_real(tensor->dtype);
  return &(constants_[name] = std::move(array));
}

const Array* GraphRunner::load(const std::string& name) {
  const Array* found = find(name);
  return found ? &loaded(*found) : nullptr;
}

std::vector<double> GraphRunner::scores(const std::string& output, std::size_t rows) {
  std::string reason = "no output has a score for each item";
  for (const std::string& name : file_.graph->outputs) {
    if (!output.empty() && name != output) continue;
    if (const auto why = unknown_.find(name); why != unknown_.end()) {
      reason = why->second;
      if (reason.starts_with(not_run)) reason.erase(0, not_run.size());
    }
    const Array* found = find(name);
    if (!found || found->stored || found->shape.empty() ||
        found->shape.back() != static_cast<std::int64_t>(rows) || found->values.size() < rows)
      continue;
    return {found->values.end() - static_cast<std::ptrdiff_t>(rows), found->values.end()};
  }
  throw Failure(not_run + reason);
}

bool GraphRunner::has_input(const GraphNode& node, std::size_t index) const {
  return index < node.inputs.size() && !node.inputs[index].empty();
}

const GraphRunner::Array& GraphRunner::raw_input(const GraphNode& node, std::size_t index) {
  if (!has_input(node, index)) refuse(node, "lacks an input");
  if (const Array* found = find(node.inputs[index])) return *found;
  refuse(node, "reads '" + node.inputs[index] + "', which is unknown");
}

const GraphRunner::Array& GraphRunner::input(const GraphNode& node, std::size_t index) {
  return loaded(raw_input(node, index));
}

const GraphRunner::Array& GraphRunner::loaded(const Array& array) {
  if (!array.stored) return array;
  Array& whole = loaded_[{*array.stored, array.transposed}];
  if (!whole.values.empty()) return whole;
  const auto values = read_values(file_, file_.tensors[*array.stored]);
  whole.shape = array.shape;
  if (array.transposed) std::swap(whole.shape[0], whole.shape[1]);
  whole.values.assign(values.begin(), values.end());
  if (array.transposed) whole = transposed(whole, {1, 0});
  return whole;
}

// Given as an input by newer operator sets, as an attribute by older ones.
std::vector<std::int64_t> GraphRunner::integers(const GraphNode& node, std::size_t index,
                                                const char* name) {
  if (const auto found = node.integer_lists.find(name); found != node.integer_lists.end())
    return found->second;
  if (!has_input(node, index)) return {};
  const Array& array = input(node, index);
  std::vector<std::int64_t> values;
  for (const double value : array.values) values.push_back(integer(value));
  return values;
}

std::vector<Array> GraphRunner::apply(const GraphNode& node) {
  const std::string& op = node.operation;
  if (op == "Constant") return {constant(node)};
  if (op == "Identity" || op == "Dropout") return {raw_input(node, 0)};
  if (op == "Shape" || op == "Size") {
    const auto& shape = raw_input(node, 0).shape;
    if (op == "Size") return {{.values = {static_cast<double>(elements(shape))}, .integral = true}};
    const auto rank = static_cast<std::int64_t>(shape.size());
    const auto bound = [&](const char* name, std::int64_t otherwise) {
      const std::int64_t at = attribute(node, name, otherwise);
      return std::clamp<std::int64_t>(at < 0 ? at + rank : at, 0, rank);
    };
    const auto first = shape.begin() + bound("start", 0);
    const auto last = std::max(first, shape.begin() + bound("end", rank));
    return {{.shape = {last - first}, .values = {first, last}, .integral = true}};
  }
  if (op == "ConstantOfShape") {
    const auto shape = integers(node, 0, "");
    const Array* given = file_.find(node.outputs[0]) ? find(node.outputs[0]) : nullptr;
    const double value = given && !given->values.empty() ? given->values[0] : 0.0;
    return {{.shape = shape,
             .values = std::vector<double>(elements(shape), value),
             .integral = given && given->integral}};
  }
  if (op == "Transpose") {
    Array array = raw_input(node, 0);
    auto order = integers(node, 1, "perm");
    if (order.empty()) {
      order.resize(array.shape.size());
      std::iota(order.rbegin(), order.rend(), 0);
    }
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    if (sorted.size() != array.shape.size()) refuse(node, "has another rank than its input");
    for (std::size_t d = 0; d < sorted.size(); ++d)
      if (sorted[d] != static_cast<std::int64_t>(d)) refuse(node, "has an order that is none");
    if (!array.stored) return {transposed(array, order)};
    if (order[0] == 1) {
      std::swap(array.shape[0], array.shape[1]);
      array.transposed = !array.transposed;
    }
    return {array};
  }
  if (op == "Squeeze" || op == "Unsqueeze") {
    Array array = input(node, 0);
    const auto axes = integers(node, 1, "axes");
    const std::size_t rank = array.shape.size() + (op == "Unsqueeze" ? axes.size() : 0);
    std::vector<std::size_t> sorted;
    for (const std::int64_t axis : axes) sorted.push_back(axis_of(node, axis, rank));
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
      refuse(node, "has an axis twice");
    const auto at = [&](std::size_t axis) {
      return array.shape.begin() + static_cast<std::ptrdiff_t>(axis);
    };
    if (op == "Unsqueeze")
      for (const std::size_t axis : sorted) array.shape.insert(at(axis), 1);
    else if (axes.empty())
      std::erase(array.shape, 1);
    else
      for (std::size_t a = sorted.size(); a-- > 0;) array.shape.erase(at(sorted[a]));
    return {array};
  }
  if (op == "Reshape" || op == "Flatten") {
    Array array = input(node, 0);
    std::vector<std::int64_t> shape;
    if (op == "Flatten") {
      const std::int64_t axis = attribute(node, "axis", 1);
      const std::size_t split = axis == static_cast<std::int64_t>(array.shape.size())
                                    ? array.shape.size()
                                    : axis_of(node, axis, array.shape.size());
      const auto begin = array.shape.begin(), middle = begin + static_cast<std::ptrdiff_t>(split);
      shape = {static_cast<std::int64_t>(elements({begin, middle})),
               static_cast<std::int64_t>(elements({middle, array.shape.end()}))};
    } else {
      shape = integers(node, 1, "shape");
    }
    std::vector<std::int64_t> known;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] == 0 && d < array.shape.size() && attribute(node, "allowzero", 0) == 0)
        shape[d] = array.shape[d];
      if (shape[d] >= 0) known.push_back(shape[d]);
    }
    const std::size_t others = std::max<std::size_t>(elements(known), 1);
    for (std::int64_t& size : shape)
      if (size < 0) size = static_cast<std::int64_t>(array.values.size() / others);
    array.shape = shape;
    return {array};
  }
  if (op == "Expand") {
    const Array& array = input(node, 0);
    return {broadcast(array, common_shape(array, {.shape = integers(node, 1, "")}))};
  }
  if (op == "Range") {
    const double start = scalar(node, input(node, 0)), limit = scalar(node, input(node, 1)),
                 step = scalar(node, input(node, 2));
    const double count = std::max(0.0, std::ceil((limit - start) / step));
    if (!(count <= static_cast<double>(max_elements))) refuse(node, "has no end");
    Array out{.shape = {static_cast<std::int64_t>(count)}, .integral = input(node, 0).integral};
    for (double i = 0; i < count; ++i) out.values.push_back(start + i * step);
    return {out};
  }
  if (op == "Gather") return {gather(node)};
  if (op == "GatherElements") return {gather_elements(node)};
  if (op == "Slice") return {slice(node)};
  if (op == "Concat") return {concatenate(node)};
  if (op == "Split") return split(node);
  if (op == "MatMul" || op == "Gemm") return {matrix_product(node)};
  if (op == "GRU") return gru(node);
  if (op == "LayerNormalization") return {layer_norm(node)};
  if (op == "Softmax" || op == "LogSoftmax") return {softmax(node)};
  if (op == "DequantizeLinear") return {dequantise(node)};
  if (op.starts_with("Reduce")) return {reduce(node)};
  return {elementwise(node)};
}

Array GraphRunner::constant(const GraphNode& node) {
  if (file_.find(node.outputs[0]))
    if (const Array* found = find(node.outputs[0])) return *found;
  if (const auto value = node.integers.find("value_int"); value != node.integers.end())
    return {.values = {static_cast<double>(value->second)}, .integral = true};
  if (const auto value = node.floats.find("value_float"); value != node.floats.end())
    return {.values = {double{value->second}}};
  if (const auto list = node.integer_lists.find("value_ints"); list != node.integer_lists.end())
    return {.shape = {static_cast<std::int64_t>(list->second.size())},
            .values = {list->second.begin(), list->second.end()},
            .integral = true};
  refuse(node, "has no value that is read");
}

Array GraphRunner::elementwise(const GraphNode& node) {
  using Unary = double (*)(double);
  using Binary = double (*)(double, double);
  static const std::unordered_map<std::string, Unary> unary{
      {"Tanh", [](double v) { return std::tanh(v); }},
      {"Sigmoid", sigmoid},
      {"Relu", [](double v) { return std::max(v, 0.0); }},
      {"Erf", [](double v) { return std::erf(v); }},
      {"Sqrt", [](double v) { return std::sqrt(v); }},
      {"Neg", [](double v) { return -v; }},
      {"Abs", [](double v) { return std::abs(v); }},
      {"Exp", [](double v) { return std::exp(v); }},
      {"Log", [](double v) { return std::log(v); }},
      {"Floor", [](double v) { return std::floor(v); }},
      {"Ceil", [](double v) { return std::ceil(v); }},
      {"Reciprocal", [](double v) { return 1 / v; }},
      {"Not", [](double v) { return truth(v == 0); }}};
  static const std::unordered_map<std::string, Binary> binary{
      {"Add", [](double a, double b) { return a + b; }},
      {"Sum", [](double a, double b) { return a + b; }},
      {"Sub", [](double a, double b) { return a - b; }},
      {"Mul", [](double a, double b) { return a * b; }},
      {"Div", [](double a, double b) { return a / b; }},
      {"Pow", [](double a, double b) { return std::pow(a, b); }},
      {"Min", [](double a, double b) { return std::min(a, b); }},
      {"Max", [](double a, double b) { return std::max(a, b); }},
      {"Equal", [](double a, double b) { return truth(a == b); }},
      {"Less", [](double a, double b) { return truth(a < b); }},
      {"LessOrEqual", [](double a, double b) { return truth(a <= b); }},
      {"Greater", [](double a, double b) { return truth(a > b); }},
      {"GreaterOrEqual", [](double a, double b) { return truth(a >= b); }},
      {"And", [](double a, double b) { return truth(a != 0 && b != 0); }},
      {"Or", [](double a, double b) { return truth(a != 0 || b != 0); }}};
  const std::string& op = node.operation;
  if (op == "Cast") return cast(node, input(node, 0));
  if (op == "Clip") {
    Array array = input(node, 0);
    const auto bound = [&](std::size_t index, const char* name, double otherwise) {
      if (const auto given = node.floats.find(name); given != node.floats.end())
        return double{given->second};
      return has_input(node, index) ? scalar(node, input(node, index)) : otherwise;
    };
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double low = bound(1, "min", -infinity), high = bound(2, "max", infinity);
    for (double& value : array.values) value = std::min(std::max(value, low), high);
    return array;
  }
  if (op == "Gelu") {
    const auto form = node.strings.find("approximate");
    if (form != node.strings.end() && form->second != "none")
      refuse(node, "approximates by " + form->second);
    Array array = input(node, 0);
    for (double& value : array.values) value = 0.5 * value * (1 + std::erf(value / std::sqrt(2.0)));
    return array;
  }
  if (op == "Where") {
    const Array &condition = input(node, 0), &a = input(node, 1), &b = input(node, 2);
    const auto shape = common_shape({.shape = common_shape(condition, a)}, b);
    const Array chosen = broadcast(condition, shape), otherwise = broadcast(b, shape);
    Array out = broadcast(a, shape);
    for (std::size_t i = 0; i < out.values.size(); ++i)
      if (chosen.values[i] == 0) out.values[i] = otherwise.values[i];
    return out;
  }
  if (const auto function = unary.find(op); function != unary.end()) {
    Array array = input(node, 0);
    for (double& value : array.values) value = function->second(value);
    return array;
  }
  const auto function = binary.find(op);
  if (function == binary.end()) refuse(node, "is an operation that is not known");
  Array left = input(node, 0);
  for (std::size_t i = 1; i < std::max<std::size_t>(node.inputs.size(), 2); ++i) {
    const Array& more = input(node, i);
    const auto shape = common_shape(left, more);
    const bool integral = left.integral && more.integral;
    left = broadcast(left, shape);
    const Array right = broadcast(more, shape);
    for (std::size_t v = 0; v < left.values.size(); ++v)
      left.values[v] = function->second(left.values[v], right.values[v]);
    left.integral = integral;
    if (integral && op == "Div")
      for (double& value : left.values) value = std::trunc(value);
  }
  return left;
}

Array GraphRunner::gather(const GraphNode& node) {
  const Array& indices = input(node, 1);
  const Array* raw = &raw_input(node, 0);
  // Of a large matrix only the rows that are asked for.
  const bool by_rows = raw->stored && !raw->transposed && attribute(node, "axis", 0) == 0 &&
                       file_.tensors[*raw->stored].strides.empty();
  const Array& data = by_rows ? *raw : loaded(*raw);
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), data.shape.size());
  const auto split = data.shape.begin() + static_cast<std::ptrdiff_t>(axis);
  const std::size_t outer = elements({data.shape.begin(), split});
  const std::size_t inner = elements({split + 1, data.shape.end()});
  const std::int64_t size = *split;
  Array out{.integral = data.integral};
  out.shape.assign(data.shape.begin(), split);
  out.shape.insert(out.shape.end(), indices.shape.begin(), indices.shape.end());
  out.shape.insert(out.shape.end(), split + 1, data.shape.end());
  out.values.reserve(elements(out.shape));
  for (std::size_t o = 0; o < outer; ++o)
    for (const double value : indices.values) {
      auto index = integer(value);
      if (index < 0) index += size;
      if (index < 0 || index >= size) refuse(node, "has an index out of range");
      if (by_rows) {
        Tensor row = file_.tensors[*data.stored];
        row.shape = {inner};
        row.offset += static_cast<std::uint64_t>(index) * inner * element_bytes(row.dtype);
        const auto values = read_values(file_, row);
        out.values.insert(out.values.end(), values.begin(), values.end());
        continue;
      }
      const auto begin =
          data.values.begin() +
          static_cast<std::ptrdiff_t>(
              (o * static_cast<std::size_t>(size) + static_cast<std::size_t>(index)) * inner);
      out.values.insert(out.values.end(), begin, begin + static_cast<std::ptrdiff_t>(inner));
    }
  return out;
}

Array GraphRunner::gather_elements(const GraphNode& node) {
  const Array &data = input(node, 0), &indices = input(node, 1);
  const std::size_t rank = data.shape.size();
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), rank);
  if (indices.shape.size() != rank) refuse(node, "has indices of another rank");
  Array out{.shape = indices.shape, .integral = data.integral};
  std::vector<std::int64_t> at(rank);
  for (const double value : indices.values) {
    std::int64_t index = integer(value);
    if (index < 0) index += data.shape[axis];
    std::size_t flat = 0;
    for (std::size_t d = 0; d < rank; ++d) {
      const std::int64_t place = d == axis ? index : at[d];
      if (place < 0 || place >= data.shape[d]) refuse(node, "has an index out of range");
      flat = flat * static_cast<std::size_t>(data.shape[d]) + static_cast<std::size_t>(place);
    }
    out.values.push_back(data.values[flat]);
    for (std::size_t d = rank; d-- > 0;) {
      if (++at[d] < indices.shape[d]) break;
      at[d] = 0;
    }
  }
  return out;
}

Array GraphRunner::slice(const GraphNode& node) {
  Array array = input(node, 0);
  const auto starts = integers(node, 1, "starts"), ends = integers(node, 2, "ends"),
             steps = integers(node, 4, "steps");
  auto axes = integers(node, 3, "axes");
  if (axes.empty()) {
    axes.resize(starts.size());
    std::iota(axes.begin(), axes.end(), 0);
  }
  if (ends.size() != starts.size() || axes.size() != starts.size())
    refuse(node, "has starts, ends and axes that do not fit");
  for (std::size_t s = 0; s < starts.size(); ++s) {
    const std::int64_t step = s < steps.size() ? steps[s] : 1;
    if (step == 0) refuse(node, "has a step of 0");
    const std::size_t axis = axis_of(node, axes[s], array.shape.size());
    const std::int64_t size = array.shape[axis];
    const auto clamped = [&](std::int64_t at) {
      return std::clamp<std::int64_t>(at < 0 ? at + size : at, step < 0 ? -1 : 0,
                                      step < 0 ? size - 1 : size);
    };
    const std::int64_t begin = clamped(starts[s]), end = clamped(ends[s]);
    const auto split = array.shape.begin() + static_cast<std::ptrdiff_t>(axis);
    const std::size_t outer = elements({array.shape.begin(), split});
    const auto inner = static_cast<std::ptrdiff_t>(elements({split + 1, array.shape.end()}));
    std::vector<double> kept;
    std::int64_t count = 0;
    for (std::size_t o = 0; o < outer; ++o) {
      const auto block = array.values.begin() + static_cast<std::ptrdiff_t>(o) * size * inner;
      count = 0;
      for (std::int64_t at = begin; step > 0 ? at < end : at > end; ++count) {
        kept.insert(kept.end(), block + at * inner, block + (at + 1) * inner);
        if (step > size || step < -size)
          at = end;
        else
          at += step;
      }
    }
    array.values = std::move(kept);
    array.shape[axis] = count;
  }
  return array;
}

Array GraphRunner::concatenate(const GraphNode& node) {
  const Array& first = input(node, 0);
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), first.shape.size());
  const auto split = static_cast<std::ptrdiff_t>(axis);
  const std::size_t outer = elements({first.shape.begin(), first.shape.begin() + split});
  Array out{.shape = first.shape, .integral = first.integral};
  out.shape[axis] = 0;
  for (std::size_t i = 0; i < node.inputs.size(); ++i) {
    const Array& more = input(node, i);
    if (more.shape.size() != first.shape.size()) refuse(node, "joins arrays of different ranks");
    for (std::size_t d = 0; d < more.shape.size(); ++d)
      if (d != axis && more.shape[d] != first.shape[d])
        refuse(node, "joins arrays that do not fit");
    out.shape[axis] += more.shape[axis];
  }
  spend(0, elements(out.shape));
  for (std::size_t o = 0; o < outer; ++o)
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      const Array& more = input(node, i);
      const auto block = static_cast<std::ptrdiff_t>(more.values.size() / outer);
      const auto begin = more.values.begin() + static_cast<std::ptrdiff_t>(o) * block;
      out.values.insert(out.values.end(), begin, begin + block);
    }
  return out;
}

std::vector<Array> GraphRunner::split(const GraphNode& node) {
  const Array& array = input(node, 0);
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), array.shape.size());
  const std::int64_t size = array.shape[axis];
  auto parts = integers(node, 1, "split");
  if (parts.empty()) {
    const auto count = static_cast<std::int64_t>(node.outputs.size());
    const std::int64_t each = (size + count - 1) / count;
    for (std::int64_t p = 0; p < count; ++p)
      parts.push_back(std::clamp<std::int64_t>(size - p * each, 0, each));
  }
  if (std::accumulate(parts.begin(), parts.end(), std::int64_t{0}) != size ||
      std::any_of(parts.begin(), parts.end(), [](std::int64_t part) { return part < 0; }))
    refuse(node, "has parts that do not fit");
  const auto split_at = array.shape.begin() + static_cast<std::ptrdiff_t>(axis);
  const std::size_t outer = elements({array.shape.begin(), split_at});
  const auto inner = static_cast<std::ptrdiff_t>(elements({split_at + 1, array.shape.end()}));
  std::vector<Array> results;
  std::int64_t from = 0;
  for (const std::int64_t part : parts) {
    Array out{.shape = array.shape, .integral = array.integral};
    out.shape[axis] = part;
    for (std::size_t o = 0; o < outer; ++o) {
      const auto begin =
          array.values.begin() +
          (static_cast<std::ptrdiff_t>(o) * size + static_cast<std::ptrdiff_t>(from)) * inner;
      out.values.insert(out.values.end(), begin, begin + part * inner);
    }
    from += part;
    results.push_back(std::move(out));
  }
  return results;
}

// [..., m, k] x [k, n]; Gemm with its transposed factors, its scales and its bias. A large second
// factor is read from the file row by row.
Array GraphRunner::matrix_product(const GraphNode& node) {
  const bool gemm = node.operation == "Gemm";
  const auto factor = [&](const char* name) {
    const auto found = node.floats.find(name);
    return found == node.floats.end() ? 1.0 : double{found->second};
  };
  Array a = input(node, 0);
  if (gemm && attribute(node, "transA", 0) != 0) {
    if (a.shape.size() != 2) refuse(node, "has a first factor that is no matrix");
    a = transposed(a, {1, 0});
  }
  Array b = raw_input(node, 1);
  if (b.shape.size() != 2) refuse(node, "has a second factor that is no matrix");
  if (gemm && attribute(node, "transB", 0) != 0) {
    if (b.stored) {
      std::swap(b.shape[0], b.shape[1]);
      b.transposed = !b.transposed;
    } else {
      b = transposed(b, {1, 0});
    }
  }
  const auto inner = static_cast<std::size_t>(b.shape[0]),
             columns = static_cast<std::size_t>(b.shape[1]);
  if (a.shape.empty() || a.shape.back() != b.shape[0] || inner == 0)
    refuse(node, "has factors that do not fit");
  Array out{.shape = a.shape};
  out.shape.back() = b.shape[1];
  out.values.resize(elements(out.shape));
  const std::size_t rows = a.values.size() / inner;
  spend(0, std::uint64_t{out.values.size()} * inner);
  if (b.stored) {
    TensorReader reader(file_, file_.tensors[*b.stored]);
    std::vector<float> row(b.transposed ? inner : columns);
    for (std::size_t stored_row = 0; stored_row < (b.transposed ? columns : inner); ++stored_row) {
      reader.read(row);
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t c = 0; c < row.size(); ++c) {
          const std::size_t k = b.transposed ? c : stored_row, n = b.transposed ? stored_row : c;
          out.values[r * columns + n] += a.values[r * inner + k] * double{row[c]};
        }
    }
  } else {
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t k = 0; k < inner; ++k)
        for (std::size_t c = 0; c < columns; ++c)
          out.values[r * columns + c] += a.values[r * inner + k] * b.values[k * columns + c];
  }
  if (!gemm) return out;
  for (double& value : out.values) value *= factor("alpha");
  if (has_input(node, 2)) {
    const Array bias = broadcast(input(node, 2), out.shape);
    for (std::size_t i = 0; i < out.values.size(); ++i)
      out.values[i] += factor("beta") * bias.values[i];
  }
  return out;
}

Array GraphRunner::layer_norm(const GraphNode& node) {
  Array array = input(node, 0);
  const Array& scale = input(node, 1);
  const Array bias = has_input(node, 2) ? input(node, 2)
                                        : Array{.shape = scale.shape,
                                                .values = std::vector<double>(scale.values.size())};
  const auto found = node.floats.find("epsilon");
  const double epsilon = found == node.floats.end() ? 1e-5 : double{found->second};
  const std::size_t size = scale.values.size();
  if (size == 0 || bias.values.size() != size) refuse(node, "has weights that do not fit");
  for (std::size_t begin = 0; begin + size <= array.values.size(); begin += size) {
    const std::span row(array.values.data() + begin, size);
    const double mean = std::accumulate(row.begin(), row.end(), 0.0) / static_cast<double>(size);
    double variance = 0;
    for (const double v : row) variance += (v - mean) * (v - mean) / static_cast<double>(size);
    for (std::size_t c = 0; c < size; ++c)
      row[c] = (row[c] - mean) / std::sqrt(variance + epsilon) * scale.values[c] + bias.values[c];
  }
  return array;
}

Array GraphRunner::reduce(const GraphNode& node) {
  const std::string& op = node.operation;
  const Array& array = input(node, 0);
  std::vector<bool> reduced(array.shape.size());
  const auto axes = integers(node, 1, "axes");
  for (const std::int64_t axis : axes) reduced[axis_of(node, axis, array.shape.size())] = true;
  if (axes.empty()) reduced.assign(array.shape.size(), true);
  Array kept{.shape = array.shape, .integral = array.integral};
  double count = 1;
  for (std::size_t d = 0; d < array.shape.size(); ++d)
    if (reduced[d]) {
      count *= static_cast<double>(array.shape[d]);
      kept.shape[d] = 1;
    }
  const bool largest = op == "ReduceMax", smallest = op == "ReduceMin",
             product = op == "ReduceProd", mean = op == "ReduceMean", sum = op == "ReduceSum";
  if (!(largest || smallest || product || mean || sum) || array.values.empty())
    refuse(node, "is an operation that is not known");
  constexpr double infinity = std::numeric_limits<double>::infinity();
  kept.values.assign(elements(kept.shape), largest    ? -infinity
                                           : smallest ? infinity
                                           : product  ? 1.0
                                                      : 0.0);
  std::vector<std::int64_t> index(array.shape.size());
  for (const double value : array.values) {
    std::size_t at = 0;
    for (std::size_t d = 0; d < index.size(); ++d)
      at = at * static_cast<std::size_t>(kept.shape[d]) +
           static_cast<std::size_t>(reduced[d] ? 0 : index[d]);
    double& result = kept.values[at];
    result = largest    ? std::max(result, value)
             : smallest ? std::min(result, value)
             : product  ? result * value
                        : result + value;
    for (std::size_t d = index.size(); d-- > 0;) {
      if (++index[d] < array.shape[d]) break;
      index[d] = 0;
    }
  }
  if (mean)
    for (double& value : kept.values) value /= count;
  if (attribute(node, "keepdims", 1) == 0) {
    std::vector<std::int64_t> shape;
    for (std::size_t d = 0; d < array.shape.size(); ++d)
      if (!reduced[d]) shape.push_back(array.shape[d]);
    kept.shape = shape;
  }
  return kept;
}

// Over one axis, as operator sets from 13 on have it.
Array GraphRunner::softmax(const GraphNode& node) {
  Array array = input(node, 0);
  const std::size_t axis = axis_of(node, attribute(node, "axis", -1), array.shape.size());
  const auto split = array.shape.begin() + static_cast<std::ptrdiff_t>(axis);
  const std::size_t outer = elements({array.shape.begin(), split}),
                    size = static_cast<std::size_t>(*split),
                    inner = elements({split + 1, array.shape.end()});
  for (std::size_t o = 0; o < outer; ++o)
    for (std::size_t i = 0; i < inner; ++i) {
      const auto at = [&](std::size_t k) -> double& {
        return array.values[(o * size + k) * inner + i];
      };
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::size_t k = 0; k < size; ++k) largest = std::max(largest, at(k));
      for (std::size_t k = 0; k < size; ++k) sum += std::exp(at(k) - largest);
      for (std::size_t k = 0; k < size; ++k)
        at(k) = node.operation == "Softmax" ? std::exp(at(k) - largest) / sum
                                            : at(k) - largest - std::log(sum);
    }
  return array;
}

// (x - zero point) scale, of the whole tensor or along one axis.
Array GraphRunner::dequantise(const GraphNode& node) {
  Array array = input(node, 0);
  Array scale = input(node, 1), zero{.values = {0}};
  if (has_input(node, 2)) zero = input(node, 2);
  if (scale.shape.size() == 1 && scale.values.size() > 1) {
    const std::size_t axis = axis_of(node, attribute(node, "axis", 1), array.shape.size());
    std::vector<std::int64_t> shape(array.shape.size(), 1);
    shape[axis] = scale.shape[0];
    scale.shape = shape;
    if (zero.values.size() == scale.values.size()) zero.shape = shape;
  }
  const Array factor = broadcast(scale, array.shape), offset = broadcast(zero, array.shape);
  for (std::size_t i = 0; i < array.values.size(); ++i)
    array.values[i] = (array.values[i] - offset.values[i]) * factor.values[i];
  array.integral = false;
  return array;
}

// Equations of the ONNX operator GRU: gates z, r, h; X [steps, 1, in] or, by layout 1, batch first.
std::vector<Array> GraphRunner::gru(const GraphNode& node) {
  Array x = input(node, 0);
  const Array &w = input(node, 1), &r = input(node, 2);
  if (const auto direction = node.strings.find("direction");
      direction != node.strings.end() && direction->second != "forward")
    refuse(node, "does not run forward");
  if (has_input(node, 4) || node.floats.count("clip") || node.strings.count("activations"))
    refuse(node, "has lengths, a clip or activations of its own");
  // With a batch of one, the order of the values is the same.
  if (attribute(node, "layout", 0) != 0 && x.shape.size() == 3) std::swap(x.shape[0], x.shape[1]);
  if (x.shape.size() != 3 || x.shape[1] != 1 || w.shape.size() != 3 || r.shape.size() != 3)
    refuse(node, "does not run over one sequence");
  const auto steps = static_cast<std::size_t>(x.shape[0]),
             in = static_cast<std::size_t>(x.shape[2]), n = static_cast<std::size_t>(r.shape[2]);
  std::vector<double> bias(6 * n);
  if (has_input(node, 3)) bias = input(node, 3).values;
  if (w.values.size() != 3 * n * in || r.values.size() != 3 * n * n || bias.size() != 6 * n)
    refuse(node, "has weights that do not fit");
  std::vector<double> hidden(n);
  if (has_input(node, 5)) hidden = input(node, 5).values;
  if (hidden.size() != n) refuse(node, "has an initial state that does not fit");
  const bool reset_after = attribute(node, "linear_before_reset", 0) != 0;
  spend(0, std::uint64_t{steps} * (w.values.size() + r.values.size()));
  Array all{.shape = {x.shape[0], 1, 1, r.shape[2]}};
  std::vector<double> update(n), reset(n), kept(n), next(n);
  for (std::size_t t = 0; t < steps; ++t) {
    const auto from_input = [&](std::size_t row) {
      double sum = bias[row];
      for (std::size_t c = 0; c < in; ++c) sum += w.values[row * in + c] * x.values[t * in + c];
      return sum;
    };
    const auto from_state = [&](std::size_t row, const std::vector<double>& state) {
      double sum = bias[3 * n + row];
      for (std::size_t c = 0; c < n; ++c) sum += r.values[row * n + c] * state[c];
      return sum;
    };
    for (std::size_t j = 0; j < n; ++j) {
      update[j] = sigmoid(from_input(j) + from_state(j, hidden));
      reset[j] = sigmoid(from_input(n + j) + from_state(n + j, hidden));
      kept[j] = reset[j] * hidden[j];
    }
    for (std::size_t j = 0; j < n; ++j) {
      const double recurrent =
          reset_after ? reset[j] * from_state(2 * n + j, hidden) : from_state(2 * n + j, kept);
      next[j] =
          (1 - update[j]) * std::tanh(from_input(2 * n + j) + recurrent) + update[j] * hidden[j];
    }
    hidden = next;
    all.values.insert(all.values.end(), hidden.begin(), hidden.end());
  }
  return {all, {.shape = {1, 1, r.shape[2]}, .values = hidden}};
}

}  // namespace personalize::tools
