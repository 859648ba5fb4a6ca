// Bytes from anywhere as a pickle, in PyTorch's format before 1.6.
#include "convert_model.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return convert_model({data, size}, personalize::tools::open_legacy_pytorch);
}
