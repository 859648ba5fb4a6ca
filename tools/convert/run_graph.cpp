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

const std::string not_run = "cannot run the ONNX graph to compare with it: ";
// More than the scores of a large catalogue behind a long history.
constexpr std::size_t max_elements = std::size_t{1} << 28;

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

std::int64_t attribute(const GraphNode& node, const char* name, std::int64_t otherwise) {
  const auto found = node.integers.find(name);
  return found == node.integers.end() ? otherwise : found->second;
}

[[noreturn]] void refuse(const GraphNode& node, const std::string& what) {
  throw Failure(not_run + node.operation + " " + what);
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

}  // namespace

GraphRunner::GraphRunner(TensorFile& file) : file_(file) {
  for (const Tensor& tensor : file.tensors) {
    if (tensor.dtype == DType::other) continue;
    Array& array = constants_[tensor.name];
    for (const std::uint64_t size : tensor.shape)
      array.shape.push_back(static_cast<std::int64_t>(size));
    if (tensor.dtype == DType::i64) {  // the end of a Slice does not fit an f32
      std::vector<std::int64_t> values(static_cast<std::size_t>(tensor.elements()));
      file.sources[tensor.source]->read(tensor.offset, std::as_writable_bytes(std::span(values)));
      array.values.assign(values.begin(), values.end());
    } else {
      const auto values = read_values(file, tensor);
      array.values.assign(values.begin(), values.end());
    }
  }
}

std::vector<float> GraphRunner::run(const std::vector<std::int64_t>& rows, std::size_t items) {
  values_.clear();
  const Graph& graph = *file_.graph;
  // Older exporters list initialisers as inputs, too.
  for (const std::string& name : graph.inputs) {
    if (constants_.count(name)) continue;
    if (!values_.empty()) throw Failure(not_run + "it has more than one input");
    values_[name] = {{1, static_cast<std::int64_t>(rows.size())}, {rows.begin(), rows.end()}};
  }
  for (const GraphNode& node : graph.nodes) {
    auto results = apply(node);
    for (std::size_t o = 0; o < std::min(results.size(), node.outputs.size()); ++o) {
      if (elements(results[o].shape) != results[o].values.size())
        refuse(node, "has values that do not fit their shape");
      if (!node.outputs[o].empty()) values_[node.outputs[o]] = std::move(results[o]);
    }
  }
  for (const std::string& name : graph.outputs)
    if (const auto found = values_.find(name);
        found != values_.end() && !found->second.shape.empty() &&
        found->second.shape.back() == static_cast<std::int64_t>(items) &&
        found->second.values.size() >= items)
      return {found->second.values.end() - static_cast<std::ptrdiff_t>(items),
              found->second.values.end()};
  throw Failure(not_run + "no output has a score for each item");
}

bool GraphRunner::has_input(const GraphNode& node, std::size_t index) const {
  return index < node.inputs.size() && !node.inputs[index].empty();
}

const GraphRunner::Array& GraphRunner::input(const GraphNode& node, std::size_t index) const {
  if (!has_input(node, index)) refuse(node, "lacks an input");
  if (const auto found = values_.find(node.inputs[index]); found != values_.end())
    return found->second;
  const auto found = constants_.find(node.inputs[index]);
  if (found == constants_.end())
    refuse(node, "reads '" + node.inputs[index] + "', which is unknown");
  return found->second;
}

// Given as an input by newer operator sets, as an attribute by older ones.
std::vector<std::int64_t> GraphRunner::integers(const GraphNode& node, std::size_t index,
                                                const char* name) const {
  if (const auto found = node.integer_lists.find(name); found != node.integer_lists.end())
    return found->second;
  if (!has_input(node, index)) return {};
  const Array& array = input(node, index);
  std::vector<std::int64_t> values;
  for (const double value : array.values) values.push_back(integer(value));
  return values;
}

std::size_t GraphRunner::elements(const std::vector<std::int64_t>& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0 || (size > 0 && count > max_elements / static_cast<std::size_t>(size)))
      throw Failure(not_run + "an array is too large");
    count *= static_cast<std::size_t>(size);
  }
  return count;
}

std::vector<std::int64_t> GraphRunner::common_shape(const Array& a, const Array& b) {
  const std::size_t rank = std::max(a.shape.size(), b.shape.size());
  std::vector<std::int64_t> shape(rank, 1);
  for (const Array* array : {&a, &b})
    for (std::size_t d = 0; d < array->shape.size(); ++d) {
      std::int64_t& size = shape[rank - array->shape.size() + d];
      if (array->shape[d] != 1) size = array->shape[d];
    }
  return shape;
}

GraphRunner::Array GraphRunner::broadcast(const Array& array,
                                          const std::vector<std::int64_t>& shape) {
  if (array.shape.size() > shape.size()) throw Failure(not_run + "shapes do not fit");
  Array out{shape, std::vector<double>(elements(shape))};
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

GraphRunner::Array GraphRunner::transposed(const Array& array,
                                           const std::vector<std::int64_t>& order) {
  const std::size_t rank = array.shape.size();
  Array out;
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

std::vector<GraphRunner::Array> GraphRunner::apply(const GraphNode& node) const {
  const std::string& op = node.operation;
  if (op == "Constant") {
    const auto found = constants_.find(node.outputs[0]);
    if (found == constants_.end()) return {};
    return {found->second};
  }
  if (op == "Identity" || op == "Dropout" || op == "Cast") return {input(node, 0)};
  if (op == "Shape") {
    const auto& shape = input(node, 0).shape;
    return {{{static_cast<std::int64_t>(shape.size())}, {shape.begin(), shape.end()}}};
  }
  if (op == "ConstantOfShape") {
    const auto shape = integers(node, 0, "");
    const auto value = constants_.find(node.outputs[0]);
    return {{shape, std::vector<double>(elements(shape),
                                        value == constants_.end() || value->second.values.empty()
                                            ? 0.0
                                            : value->second.values[0])}};
  }
  if (op == "Transpose") {
    const Array& array = input(node, 0);
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
    return {transposed(array, order)};
  }
  if (op == "Squeeze" || op == "Unsqueeze") {
    Array array = input(node, 0);
    auto axes = integers(node, 1, "axes");
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
  if (op == "Reshape") {
    Array array = input(node, 0);
    auto shape = integers(node, 1, "shape");
    std::vector<std::int64_t> known;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] == 0 && d < array.shape.size()) shape[d] = array.shape[d];
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
    const Array wanted{integers(node, 1, ""), {}};
    return {broadcast(array, common_shape(array, wanted))};
  }
  if (op == "Gather") return {gather(node)};
  if (op == "Slice") return {slice(node)};
  if (op == "Concat") return {concatenate(node)};
  if (op == "MatMul" || op == "Gemm") return {matrix_product(node)};
  if (op == "GRU") return gru(node);
  if (op == "LayerNormalization") return {layer_norm(node)};
  if (op == "ReduceMean") return {reduce_mean(node)};
  return {elementwise(node)};
}

GraphRunner::Array GraphRunner::elementwise(const GraphNode& node) const {
  using Unary = double (*)(double);
  using Binary = double (*)(double, double);
  static const std::unordered_map<std::string, Unary> unary{
      {"Tanh", [](double v) { return std::tanh(v); }},
      {"Sigmoid", sigmoid},
      {"Relu", [](double v) { return std::max(v, 0.0); }},
      {"Erf", [](double v) { return std::erf(v); }},
      {"Sqrt", [](double v) { return std::sqrt(v); }},
      {"Gelu", [](double v) { return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0))); }}};
  static const std::unordered_map<std::string, Binary> binary{
      {"Add", [](double a, double b) { return a + b; }},
      {"Sub", [](double a, double b) { return a - b; }},
      {"Mul", [](double a, double b) { return a * b; }},
      {"Div", [](double a, double b) { return a / b; }},
      {"Pow", [](double a, double b) { return std::pow(a, b); }}};
  if (const auto function = unary.find(node.operation); function != unary.end()) {
    Array array = input(node, 0);
    for (double& value : array.values) value = function->second(value);
    return array;
  }
  const auto function = binary.find(node.operation);
  if (function == binary.end()) refuse(node, "is an operation that it does not know");
  const Array &a = input(node, 0), &b = input(node, 1);
  const auto shape = common_shape(a, b);
  Array left = broadcast(a, shape);
  const Array right = broadcast(b, shape);
  for (std::size_t i = 0; i < left.values.size(); ++i)
    left.values[i] = function->second(left.values[i], right.values[i]);
  return left;
}

GraphRunner::Array GraphRunner::gather(const GraphNode& node) const {
  const Array &data = input(node, 0), &indices = input(node, 1);
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), data.shape.size());
  const auto split = data.shape.begin() + static_cast<std::ptrdiff_t>(axis);
  const std::size_t outer = elements({data.shape.begin(), split});
  const std::size_t inner = elements({split + 1, data.shape.end()});
  const std::int64_t size = *split;
  Array out;
  out.shape.assign(data.shape.begin(), split);
  out.shape.insert(out.shape.end(), indices.shape.begin(), indices.shape.end());
  out.shape.insert(out.shape.end(), split + 1, data.shape.end());
  out.values.reserve(elements(out.shape));
  for (std::size_t o = 0; o < outer; ++o)
    for (const double value : indices.values) {
      auto index = integer(value);
      if (index < 0) index += size;
      if (index < 0 || index >= size) refuse(node, "has an index out of range");
      const auto begin =
          data.values.begin() +
          static_cast<std::ptrdiff_t>(
              (o * static_cast<std::size_t>(size) + static_cast<std::size_t>(index)) * inner);
      out.values.insert(out.values.end(), begin, begin + static_cast<std::ptrdiff_t>(inner));
    }
  return out;
}

GraphRunner::Array GraphRunner::slice(const GraphNode& node) const {
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
    if (s < steps.size() && steps[s] != 1) refuse(node, "has a step other than 1");
    const std::size_t axis = axis_of(node, axes[s], array.shape.size());
    const std::int64_t size = array.shape[axis];
    const auto clamped = [&](std::int64_t at) {
      return std::clamp<std::int64_t>(at < 0 ? at + size : at, 0, size);
    };
    const std::int64_t begin = clamped(starts[s]), end = std::max(begin, clamped(ends[s]));
    const auto split = array.shape.begin() + static_cast<std::ptrdiff_t>(axis);
    const std::size_t outer = elements({array.shape.begin(), split});
    const auto inner = static_cast<std::ptrdiff_t>(elements({split + 1, array.shape.end()}));
    std::vector<double> kept;
    for (std::size_t o = 0; o < outer; ++o) {
      const auto block = array.values.begin() + static_cast<std::ptrdiff_t>(o) * size * inner;
      kept.insert(kept.end(), block + begin * inner, block + end * inner);
    }
    array.values = std::move(kept);
    array.shape[axis] = end - begin;
  }
  return array;
}

GraphRunner::Array GraphRunner::concatenate(const GraphNode& node) const {
  Array out = input(node, 0);
  const std::size_t axis = axis_of(node, attribute(node, "axis", 0), out.shape.size());
  if (axis != 0) refuse(node, "joins another axis than the first");
  for (std::size_t i = 1; i < node.inputs.size(); ++i) {
    const Array& more = input(node, i);
    out.values.insert(out.values.end(), more.values.begin(), more.values.end());
    if (more.shape.size() != out.shape.size()) refuse(node, "joins arrays of different ranks");
    out.shape[0] += more.shape[0];
  }
  return out;
}

// [..., m, k] x [k, n]; Gemm with its transposed second factor and its bias.
GraphRunner::Array GraphRunner::matrix_product(const GraphNode& node) const {
  const Array& a = input(node, 0);
  Array b = input(node, 1);
  const bool gemm = node.operation == "Gemm";
  if (b.shape.size() != 2) refuse(node, "has a second factor that is no matrix");
  if (gemm && attribute(node, "transB", 0) != 0) b = transposed(b, {1, 0});
  const auto inner = static_cast<std::size_t>(b.shape[0]),
             columns = static_cast<std::size_t>(b.shape[1]);
  if (a.shape.empty() || a.shape.back() != b.shape[0] || inner == 0)
    refuse(node, "has factors that do not fit");
  Array out{a.shape, {}};
  out.shape.back() = b.shape[1];
  out.values.resize(elements(out.shape));
  for (std::size_t r = 0; r < a.values.size() / inner; ++r)
    for (std::size_t k = 0; k < inner; ++k)
      for (std::size_t c = 0; c < columns; ++c)
        out.values[r * columns + c] += a.values[r * inner + k] * b.values[k * columns + c];
  if (gemm && has_input(node, 2)) {
    const Array bias = broadcast(input(node, 2), out.shape);
    for (std::size_t i = 0; i < out.values.size(); ++i) out.values[i] += bias.values[i];
  }
  return out;
}

GraphRunner::Array GraphRunner::layer_norm(const GraphNode& node) const {
  Array array = input(node, 0);
  const Array &scale = input(node, 1), &bias = input(node, 2);
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

GraphRunner::Array GraphRunner::reduce_mean(const GraphNode& node) const {
  const Array& array = input(node, 0);
  const auto axes = integers(node, 1, "axes");
  if (array.shape.empty() || array.shape.back() == 0 || axes.size() != 1 ||
      axis_of(node, axes[0], array.shape.size()) + 1 != array.shape.size())
    refuse(node, "reduces another axis than the last");
  const auto size = static_cast<std::size_t>(array.shape.back());
  Array out{array.shape, {}};
  out.shape.back() = 1;
  if (attribute(node, "keepdims", 1) == 0) out.shape.pop_back();
  for (std::size_t begin = 0; begin < array.values.size(); begin += size) {
    const auto first = array.values.begin() + static_cast<std::ptrdiff_t>(begin);
    out.values.push_back(std::accumulate(first, first + static_cast<std::ptrdiff_t>(size), 0.0) /
                         static_cast<double>(size));
  }
  return out;
}

// Equations of the ONNX operator GRU: gates z, r, h; X [steps, 1, in] or, by layout 1, batch first.
std::vector<GraphRunner::Array> GraphRunner::gru(const GraphNode& node) const {
  const Array &x = input(node, 0), &w = input(node, 1), &r = input(node, 2);
  if (attribute(node, "layout", 0) != 0) refuse(node, "has the batch first");
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
  Array all{{x.shape[0], 1, 1, r.shape[2]}, {}};
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
  return {all, {{1, 1, r.shape[2]}, hidden}};
}

}  // namespace personalize::tools
