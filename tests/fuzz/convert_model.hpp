// What the fuzz targets of the converter share: everything that follows once a file is open.
#pragma once

#include <cstdint>
#include <span>

#include "command/command.hpp"
#include "convert/build.hpp"
#include "convert/check.hpp"
#include "convert/mapping.hpp"
#include "convert/tensors.hpp"

// Whatever the bytes are, they convert or are refused with a Failure; any other exception is a bug.
inline int convert_model(std::span<const std::uint8_t> data,
                         personalize::tools::TensorFile (*open)(const personalize::tools::Input&)) {
  using namespace personalize::tools;
  try {
    TensorFile file = open({"fuzz", std::as_bytes(data)});
    for (const Tensor& tensor : file.tensors) {
      try {
        (void)read_values(file, tensor);
      } catch (const Failure&) {
        continue;
      }
    }
    Catalogue catalogue;
    for (const char* id : {"a", "b", "c", "d"}) (void)catalogue.items.item_ids.add(id);
    catalogue.items.items.resize(4);
    const Mapping mapping = file.graph ? trace_graph(file) : recognise(file);
    const Built built = build_model(file, mapping, catalogue, personalize::ElementType::f32);
    if (file.graph) (void)verify_graph(built.parts, file, mapping, built.rows);
  } catch (const Failure&) {
    return 0;
  }
  return 0;
}
