// Runs an ONNX graph node by node in double precision, for comparison with what was converted from
// it. Knows the operations that recurrent recommenders are exported with.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "convert/tensors.hpp"

namespace personalize::tools {

class GraphRunner {
 public:
  // Reads all initialisers. The file must outlive the runner.
  explicit GraphRunner(TensorFile& file);

  // The scores behind the last of the given embedding rows: the last `items` values of the graph's
  // output that has at least so many. Throws Failure: an operation it does not know.
  std::vector<float> run(const std::vector<std::int64_t>& rows, std::size_t items);

 private:
  struct Array {
    std::vector<std::int64_t> shape;
    std::vector<double> values;
  };

  const Array& input(const GraphNode& node, std::size_t index) const;
  bool has_input(const GraphNode& node, std::size_t index) const;
  std::vector<std::int64_t> integers(const GraphNode& node, std::size_t index,
                                     const char* attribute) const;
  std::vector<Array> apply(const GraphNode& node) const;
  Array elementwise(const GraphNode& node) const;
  Array gather(const GraphNode& node) const;
  Array slice(const GraphNode& node) const;
  Array concatenate(const GraphNode& node) const;
  Array matrix_product(const GraphNode& node) const;
  Array layer_norm(const GraphNode& node) const;
  Array reduce_mean(const GraphNode& node) const;
  std::vector<Array> gru(const GraphNode& node) const;
  static Array transposed(const Array& array, const std::vector<std::int64_t>& order);
  static Array broadcast(const Array& array, const std::vector<std::int64_t>& shape);
  static std::vector<std::int64_t> common_shape(const Array& a, const Array& b);
  static std::size_t elements(const std::vector<std::int64_t>& shape);

  TensorFile& file_;
  std::map<std::string, Array> constants_, values_;
};

}  // namespace personalize::tools
