// Bytes from anywhere as an ONNX graph: read, traced, and run.
#include "convert_model.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return convert_model({data, size}, personalize::tools::open_onnx);
}
