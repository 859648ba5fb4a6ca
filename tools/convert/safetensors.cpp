// safetensors: u64 length of a JSON header, the header, the tensors' bytes back to back.
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "command/command.hpp"
#include "command/json.hpp"
#include "convert/tensors.hpp"

namespace personalize::tools {
namespace {

DType dtype_of(const std::string& text) {
  static const std::unordered_map<std::string, DType> types{
      {"F64", DType::f64}, {"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16},
      {"I64", DType::i64}, {"I32", DType::i32}, {"I16", DType::i16}, {"I8", DType::i8},
      {"U64", DType::u64}, {"U32", DType::u32}, {"U16", DType::u16}, {"U8", DType::u8},
      {"BOOL", DType::u8}, {"C64", DType::f32}};
  const auto found = types.find(text);
  return found == types.end() ? DType::foreign : found->second;
}

std::uint64_t natural(const nlohmann::json& value, const std::string& where) {
  if (!value.is_number_unsigned()) throw Failure(where + ": a size is not a natural number");
  return value.get<std::uint64_t>();
}

}  // namespace

TensorFile open_safetensors(const Input& input) {
  TensorFile file;
  file.name = input.name;
  file.format = "safetensors";
  file.sources.push_back(input.open());
  ByteSource& source = *file.sources[0];
  std::uint64_t length;
  std::array<std::byte, 8> head;
  source.read(0, head);
  std::memcpy(&length, head.data(), 8);
  if (length > source.size() - 8)
    throw Failure(input.name + ": its header is longer than the file; copy it again");
  if (length > max_json_bytes)
    throw Failure(input.name + ": its header is over " + std::to_string(max_json_bytes) + " bytes");
  std::vector<std::byte> bytes(static_cast<std::size_t>(length));
  source.read(8, bytes);
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  const std::string where = input.name + ": its safetensors header";
  const auto header = parse_json({text, bytes.size()}, where);
  if (!header.is_object()) throw Failure(where + " is not a JSON object");

  const std::uint64_t begin = 8 + length, size = source.size() - begin;
  for (const auto& [name, entry] : header.items()) {
    const std::string at = input.name + ": tensor '" + name.substr(0, 100) + "'";
    if (name == "__metadata__") {
      if (!entry.is_object()) throw Failure(input.name + ": __metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) throw Failure(input.name + ": __metadata__ holds more than text");
        file.text[key] = value.get<std::string>();
      }
      continue;
    }
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
        !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
        !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2)
      throw Failure(at + ": needs dtype, shape and data_offsets");
    Tensor tensor;
    tensor.name = name;
    const auto type = entry["dtype"].get<std::string>();
    tensor.dtype = dtype_of(type);
    if (tensor.dtype == DType::foreign) tensor.type_name = type.substr(0, 20);
    for (const auto& value : entry["shape"]) tensor.shape.push_back(natural(value, at));
    if (type == "C64") tensor.shape.push_back(2);
    const std::uint64_t first = natural(entry["data_offsets"][0], at),
                        last = natural(entry["data_offsets"][1], at);
    if (first > last || last > size) throw Failure(at + ": lies outside the file");
    tensor.offset = begin + first;
    file.add(std::move(tensor));
    const Tensor& added = file.tensors.back();
    if (added.dtype != DType::foreign &&
        added.elements() * element_bytes(added.dtype) != last - first)
      throw Failure(at + ": its shape and its bytes differ in size");
  }
  return file;
}

}  // namespace personalize::tools
