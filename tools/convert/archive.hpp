// A whole model as safetensors and back: the way out of the .pzm format.
#pragma once

#include <string>

#include "command/output.hpp"
#include "convert/tensors.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

// Appends every part, matrices as f32; to be committed. Throws Failure.
void write_archive(const ModelParts& parts, OutputFile& file);

// Whether write_archive made the file.
bool is_archive(const TensorFile& file);

// element_type: of the item vectors, inputs and user states, as in build_model. Throws Failure.
ModelParts read_archive(TensorFile& file, ElementType element_type);

}  // namespace personalize::tools
