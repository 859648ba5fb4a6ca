#include "convert/mapping.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "command/command.hpp"
#include "command/json.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

using Json = nlohmann::json;

// Reads one JSON object and refuses keys that nobody asked for.
class Object {
 public:
  Object(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) throw Failure(where_ + ": expected an object");
  }

  const Json* find(const std::string& key) {
    known_.push_back(key);
    const auto found = json_.find(key);
    return found == json_.end() ? nullptr : &*found;
  }
  const Json& require(const std::string& key) {
    if (const Json* value = find(key)) return *value;
    throw Failure(where_ + ": needs \"" + key + "\"");
  }
  std::string text(const std::string& key, const std::string& otherwise) {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_string()) refuse(key, "text");
    return value->get<std::string>();
  }
  bool boolean(const std::string& key, bool otherwise) {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_boolean()) refuse(key, "true or false");
    return value->get<bool>();
  }
  std::optional<std::uint64_t> natural(const std::string& key) {
    const Json* value = find(key);
    if (!value) return std::nullopt;
    if (!value->is_number_unsigned()) refuse(key, "a natural number");
    return value->get<std::uint64_t>();
  }
  double number(const std::string& key, double otherwise) {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_number()) refuse(key, "a number");
    return value->get<double>();
  }
  void refuse_others() const {
    for (const auto& [key, value] : json_.items())
      if (std::find(known_.begin(), known_.end(), key) == known_.end())
        throw Failure(where_ + ": unknown key \"" + key + "\"");
  }

 private:
  [[noreturn]] void refuse(const std::string& key, const char* expected) const {
    throw Failure(where_ + ": \"" + key + "\" is not " + expected);
  }
  const Json& json_;
  std::string where_;
  std::vector<std::string> known_;
};

// "name" or {"tensor": "name", "transpose": true, "slice": [0, 1]}
TensorPart parse_part(const Json& json, const std::string& where) {
  if (json.is_string()) return {.tensor = json.get<std::string>()};
  Object object(json, where);
  TensorPart part;
  const Json& tensor = object.require("tensor");
  if (!tensor.is_string()) throw Failure(where + ": \"tensor\" is not text");
  part.tensor = tensor.get<std::string>();
  part.transpose = object.boolean("transpose", false);
  if (const Json* slice = object.find("slice")) {
    if (!slice->is_array() || slice->size() != 2 || !(*slice)[0].is_number_unsigned() ||
        !(*slice)[1].is_number_unsigned())
      throw Failure(where + ": \"slice\" is not [first, last + 1]");
    part.slice = {(*slice)[0].get<std::uint64_t>(), (*slice)[1].get<std::uint64_t>()};
  }
  object.refuse_others();
  return part;
}

Weight parse_weight(const Json& json, const std::string& where) {
  if (!json.is_array()) return {parse_part(json, where)};
  Weight weight;
  for (const Json& part : json) weight.push_back(parse_part(part, where));
  if (weight.empty()) throw Failure(where + ": an empty list of tensors");
  return weight;
}

Layer parse_layer(const Json& json, const std::string& where) {
  struct Known {
    Layer::Type type;
    std::vector<const char*> required, optional;
  };
  using Type = Layer::Type;
  static const std::unordered_map<std::string, Known> types{
      {"gru", {Type::gru, {"w_hh"}, {"w_ih", "b_ih", "b_hh"}}},
      {"lru", {Type::lru, {"params_log", "in_proj", "out_proj"}, {"in_bias", "out_bias"}}},
      {"linear", {Type::linear, {"weight"}, {"bias"}}},
      {"layer_norm", {Type::layer_norm, {"weight", "bias"}, {}}},
      {"activation", {Type::activation, {}, {}}},
      {"save", {Type::save, {}, {}}},
      {"add", {Type::add, {}, {}}},
      {"decay", {Type::decay, {}, {}}}};
  Object object(json, where);
  const std::string type = object.text("type", "");
  const auto known = types.find(type);
  if (known == types.end()) throw Failure(where + ": unknown type \"" + type + "\"");
  Layer layer{.type = known->second.type};
  for (const char* role : known->second.required)
    layer.weights[role] = parse_weight(object.require(role), where + "." + role);
  for (const char* role : known->second.optional)
    if (const Json* weight = object.find(role))
      layer.weights[role] = parse_weight(*weight, where + "." + role);
  if (layer.type == Type::gru) {
    layer.gate_order = object.text("gate_order", "rzn");
    // Keras and ONNX call the candidate h.
    std::replace(layer.gate_order.begin(), layer.gate_order.end(), 'h', 'n');
    std::string sorted = layer.gate_order;
    std::sort(sorted.begin(), sorted.end());
    if (sorted != "nrz") throw Failure(where + ": gate_order has each of r, z and n (or h) once");
    layer.reset_after = object.boolean("reset_after", true);
    const std::string update = object.text("update_gate", "keeps");
    if (update != "keeps" && update != "replaces")
      throw Failure(where + ": update_gate is \"keeps\" or \"replaces\"");
    layer.update_keeps = update == "keeps";
    const std::string input = object.text("input", "vector");
    if (input != "vector" && input != "gates")
      throw Failure(where + ": input is \"vector\" or \"gates\"");
    layer.gate_input = input == "gates";
    if (layer.gate_input == (layer.weights.count("w_ih") > 0))
      throw Failure(where + (layer.gate_input ? ": input \"gates\" has no w_ih" : ": needs w_ih"));
    // Keras keeps weights as [inputs, outputs].
    if (object.boolean("transpose", false))
      for (const char* role : {"w_ih", "w_hh"})
        if (const auto found = layer.weights.find(role); found != layer.weights.end())
          for (TensorPart& part : found->second) part.transpose = !part.transpose;
  }
  if (layer.type == Type::activation) {
    layer.function = object.text("function", "");
    if (layer.function != "sigmoid" && layer.function != "tanh" && layer.function != "relu" &&
        layer.function != "gelu")
      throw Failure(where + ": function is sigmoid, tanh, relu or gelu (exact)");
  }
  if (layer.type == Type::save || layer.type == Type::add) {
    const std::uint64_t slot = object.natural("slot").value_or(0);
    if (slot > 7) throw Failure(where + ": slot is outside [0, 7]");
    layer.slot = static_cast<std::uint32_t>(slot);
  }
  if (layer.type == Type::decay) {
    layer.keep = object.number("keep", 1);
    layer.take = object.number("take", 0);
    if (!(std::abs(layer.keep) <= 1))
      throw Failure(where + ": keep is outside [-1, 1]: the state would grow without end");
    if (!(std::abs(layer.take) <= std::numeric_limits<float>::max()))
      throw Failure(where + ": take is no number that a float can hold");
  }
  object.refuse_others();
  return layer;
}

}  // namespace

Mapping read_mapping(const std::string& path) {
  const auto bytes = read_file(path, max_json_bytes);
  if (!bytes) throw Failure(bytes.error().message);
  const Json json =
      parse_json({reinterpret_cast<const char*>(bytes->data()), bytes->size()}, path + ":");
  Object object(json, path);
  Mapping mapping;
  mapping.architecture = object.text("architecture", "mapping");
  mapping.embedding = parse_part(object.require("embedding"), path + ": embedding");
  if (const Json* output = object.find("output"))
    mapping.output = parse_part(*output, path + ": output");
  if (const Json* bias = object.find("output_bias"))
    mapping.output_bias = parse_part(*bias, path + ": output_bias");
  mapping.index_offset = object.natural("index_offset").value_or(0);
  mapping.padding_row = object.natural("padding_row");
  const Json& layers = object.require("layers");
  if (!layers.is_array() || layers.empty()) throw Failure(path + ": \"layers\" is not a list");
  for (std::size_t l = 0; l < layers.size(); ++l)
    mapping.layers.push_back(parse_layer(layers[l], path + ": layers[" + std::to_string(l) + "]"));
  if (const Json* users = object.find("users"))
    mapping.users = parse_part(*users, path + ": users");
  mapping.user_index_offset = object.natural("user_index_offset").value_or(0);
  const std::size_t slash = path.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  const auto relative = [&](const std::string& file_name) {
    return file_name.empty() || file_name.front() == '/' ? file_name : folder + file_name;
  };
  mapping.item_ids = relative(object.text("item_ids", ""));
  mapping.user_ids = relative(object.text("user_ids", ""));
  object.refuse_others();
  return mapping;
}

}  // namespace personalize::tools
