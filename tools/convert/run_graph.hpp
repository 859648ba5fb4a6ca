// Runs an ONNX graph node by node in double precision: to see what its nodes do, and to compare
// with what was converted from it. Knows the operations that recurrent recommenders are exported
// with.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "convert/tensors.hpp"

namespace personalize::tools {

class GraphRunner {
 public:
  struct Array {
    std::vector<std::int64_t> shape = {};
    std::vector<double> values = {};
    bool integral = false;
    // Large initialisers stay in the file: which tensor the values are.
    std::optional<std::size_t> stored = std::nullopt;
    bool transposed = false;
  };

  // The file must outlive the runner.
  explicit GraphRunner(TensorFile& file);

  // Computes what follows from a history of embedding rows; what depends on an operation that it
  // does not know stays unknown. Throws Failure: the graph has not one input, or one of a fixed
  // length other than the history's.
  void run(const std::vector<std::int64_t>& rows);

  // A value of the last run. Null where it is unknown.
  const Array* find(const std::string& name);
  const Array* load(const std::string& name);  // never one that is stored
  // The branch of an If node that the last run took. Null where it is unknown.
  const Graph* branch(const GraphNode& node);
  // The scores behind the last event: the last `rows` values of the output, or of the first one
  // with so many if its name is empty. Throws Failure, which says what is not known.
  std::vector<double> scores(const std::string& output, std::size_t rows);

  // The only length of a history that the graph takes.
  std::optional<std::size_t> fixed_length() const;

 private:
  std::vector<std::vector<std::int64_t>> layouts(std::size_t events) const;
  void spend(std::uint64_t elements, std::uint64_t work);
  std::size_t compute(const std::vector<GraphNode>& nodes);
  const Array& raw_input(const GraphNode& node, std::size_t index);
  const Array& input(const GraphNode& node, std::size_t index);
  const Array& loaded(const Array& array);
  bool has_input(const GraphNode& node, std::size_t index) const;
  std::vector<std::int64_t> integers(const GraphNode& node, std::size_t index,
                                     const char* attribute);
  std::vector<Array> apply(const GraphNode& node);
  Array constant(const GraphNode& node);
  Array elementwise(const GraphNode& node);
  Array gather(const GraphNode& node);
  Array gather_elements(const GraphNode& node);
  Array slice(const GraphNode& node);
  Array concatenate(const GraphNode& node);
  std::vector<Array> split(const GraphNode& node);
  Array matrix_product(const GraphNode& node);
  Array layer_norm(const GraphNode& node);
  Array reduce(const GraphNode& node);
  Array softmax(const GraphNode& node);
  Array dequantise(const GraphNode& node);
  std::vector<Array> gru(const GraphNode& node);

  TensorFile& file_;
  std::optional<GraphInput> input_;
  std::optional<std::size_t> layout_;
  std::uint64_t stored_elements_ = 0, elements_left_ = 0, work_left_ = 0;  // of the run
  std::map<std::string, Array> constants_, values_;
  std::map<std::pair<std::size_t, bool>, Array> loaded_;
  std::map<std::string, std::string> unknown_;  // and why
};

}  // namespace personalize::tools
