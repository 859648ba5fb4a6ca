// Bytes from anywhere as a zip archive: NumPy's .npz or PyTorch's .pt.
#include "convert_model.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return convert_model({data, size}, personalize::tools::open_zip);
}
