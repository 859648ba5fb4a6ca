// Known architectures, told by their parameters' names and shapes.
#include <algorithm>
#include <cctype>
#include <functional>
#include <set>

#include "command/command.hpp"
#include "convert/mapping.hpp"

namespace personalize::tools {
namespace {

// The tensors under one prefix, and which of them an architecture has claimed.
class Names {
 public:
  Names(const TensorFile& file, std::string prefix) : prefix_(std::move(prefix)) {
    for (const Tensor& tensor : file.tensors)
      // Counters and masks of training are integers and have no part in inference.
      if (tensor.name.starts_with(prefix_) && is_weight(tensor)) tensors_.push_back(&tensor);
  }

  static bool is_weight(const Tensor& tensor) {
    return tensor.dtype == DType::f64 || tensor.dtype == DType::f32 || tensor.dtype == DType::f16 ||
           tensor.dtype == DType::bf16;
  }

  const Tensor* claim(const std::string& name) {
    const Tensor* tensor = find(name);
    if (tensor) claimed_.insert(tensor);
    return tensor;
  }
  const Tensor* find(const std::string& name) const {
    for (const Tensor* tensor : tensors_)
      if (tensor->name.size() == prefix_.size() + name.size() && tensor->name.ends_with(name))
        return tensor;
    return nullptr;
  }
  TensorPart part(const std::string& name) {
    claim(name);
    return {.tensor = prefix_ + name};
  }
  // Adds the weight where there is such a tensor.
  bool give(Layer& layer, const std::string& role, const std::string& name) {
    if (!claim(name)) return false;
    layer.weights[role] = {{.tensor = prefix_ + name}};
    return true;
  }
  std::vector<std::string> unclaimed() const {
    std::vector<std::string> names;
    for (const Tensor* tensor : tensors_)
      if (!claimed_.count(tensor)) names.push_back(tensor->name.substr(prefix_.size()));
    return names;
  }
  bool all_claimed() const { return !tensors_.empty() && claimed_.size() == tensors_.size(); }
  std::vector<std::string> all() const {
    std::vector<std::string> names;
    for (const Tensor* tensor : tensors_) names.push_back(tensor->name.substr(prefix_.size()));
    return names;
  }

 private:
  std::string prefix_;
  std::vector<const Tensor*> tensors_;
  std::set<const Tensor*> claimed_;
};

std::uint64_t rows(const Tensor& tensor) { return tensor.shape.empty() ? 1 : tensor.shape[0]; }
bool is_matrix(const Tensor& tensor) { return tensor.shape.size() == 2; }
bool is_column(const Tensor& tensor, std::uint64_t size) {
  return tensor.elements() == size && rows(tensor) == size;
}

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}
bool mentions(const std::string& name, std::initializer_list<const char*> words) {
  const std::string text = lower(name);
  return std::any_of(words.begin(), words.end(),
                     [&](const char* word) { return text.find(word) != std::string::npos; });
}

using Type = Layer::Type;

// Sessions with Recurrent Neural Networks, its authors' PyTorch version: Wy, By, G, and E or GE.
std::optional<Mapping> gru4rec(Names& names) {
  if (!names.find("Wy.weight") || !names.find("By.weight")) return std::nullopt;
  Mapping mapping{.architecture = "gru4rec, shared embedding"};
  mapping.embedding = names.part("Wy.weight");
  mapping.output_bias = names.part("By.weight");
  std::size_t index = 0;
  if (names.find("E.weight")) {
    mapping.architecture = "gru4rec, separate embedding";
    mapping.output = mapping.embedding;
    mapping.embedding = names.part("E.weight");
  } else if (names.find("GE.Wx0.weight")) {
    mapping.architecture = "gru4rec, one-hot input";
    mapping.output = mapping.embedding;
    mapping.embedding = names.part("GE.Wx0.weight");
    Layer layer{.type = Type::gru};
    layer.gate_order = "nrz";
    layer.update_keeps = false;
    layer.gate_input = true;
    // Newer versions keep one matrix for all gates and reset its product; older ones reset the
    // state, with a matrix of its own for the candidate.
    layer.reset_after = !names.find("GE.Wrz0");
    Weight& recurrent = layer.weights["w_hh"];
    recurrent = {names.part("GE.Wh0")};
    if (!layer.reset_after) recurrent.push_back(names.part("GE.Wrz0"));
    for (TensorPart& part : recurrent) part.transpose = true;
    names.give(layer, "b_ih", "GE.Bh0");
    mapping.layers.push_back(layer);
  }
  for (;; ++index) {
    const std::string cell = "G." + std::to_string(index) + ".";
    Layer layer{.type = Type::gru};
    if (!names.give(layer, "w_ih", cell + "weight_ih")) break;
    names.give(layer, "w_hh", cell + "weight_hh");
    names.give(layer, "b_ih", cell + "bias_ih");
    names.give(layer, "b_hh", cell + "bias_hh");
    mapping.layers.push_back(layer);
  }
  if (mapping.layers.empty()) return std::nullopt;
  return mapping;
}

// LRURec (Yue et al., WSDM 2024). Row 0 of its embedding is padding.
std::optional<Mapping> lrurec(Names& names) {
  if (!names.find("embedding.token.weight") || !names.find("model.bias") ||
      !names.find("model.lru_blocks.0.lru_layer.params_log"))
    return std::nullopt;
  Mapping mapping{.architecture = "lrurec", .index_offset = 1};
  mapping.embedding = names.part("embedding.token.weight");
  mapping.output_bias = names.part("model.bias");
  const auto add = [&](Type type,
                       std::initializer_list<std::pair<const char*, std::string>> roles) {
    Layer layer{.type = type};
    if (type == Type::activation) layer.function = "gelu";
    for (const auto& [role, name] : roles) names.give(layer, role, name);
    mapping.layers.push_back(layer);
  };
  const auto norm = [&](const std::string& name) {
    add(Type::layer_norm, {{"weight", name + ".weight"}, {"bias", name + ".bias"}});
  };
  norm("embedding.layer_norm");
  for (int block = 0;; ++block) {
    const std::string prefix = "model.lru_blocks." + std::to_string(block) + ".";
    const std::string lru = prefix + "lru_layer.", feed = prefix + "feed_forward.";
    if (!names.find(lru + "params_log")) break;
    add(Type::save, {});
    add(Type::lru, {{"params_log", lru + "params_log"},
                    {"in_proj", lru + "in_proj.weight"},
                    {"in_bias", lru + "in_proj.bias"},
                    {"out_proj", lru + "out_proj.weight"},
                    {"out_bias", lru + "out_proj.bias"}});
    add(Type::add, {});
    norm(lru + "layer_norm");
    add(Type::save, {});
    add(Type::linear, {{"weight", feed + "w_1.weight"}, {"bias", feed + "w_1.bias"}});
    add(Type::activation, {});
    add(Type::linear, {{"weight", feed + "w_2.weight"}, {"bias", feed + "w_2.bias"}});
    add(Type::add, {});
    norm(feed + "layer_norm");
  }
  return mapping;
}

// What `personalize train` trains, under its own parameters' names. What more a .pzm of it holds
// (event types, time gaps, metadata) comes back from personalize convert --to safetensors.
std::optional<Mapping> trainer(Names& names) {
  if (!names.find("item_embedding") || !names.find("item_bias") || !names.find("layer0.w_ih"))
    return std::nullopt;
  Mapping mapping{.architecture = "personalize train"};
  mapping.embedding = names.part("item_embedding");
  mapping.output_bias = names.part("item_bias");
  const auto add = [&](Type type, const std::string& name = "") {
    Layer layer{.type = type};
    if (type == Type::activation) layer.function = "gelu";
    for (const char* role : {"weight", "bias"})
      if (!name.empty()) names.give(layer, role, name + "." + role);
    mapping.layers.push_back(layer);
  };
  add(Type::layer_norm, "norm");
  for (int number = 0;; ++number) {
    const std::string prefix = "layer" + std::to_string(number) + ".";
    Layer gru{.type = Type::gru};
    if (!names.give(gru, "w_ih", prefix + "w_ih")) return mapping;
    for (const char* role : {"w_hh", "b_ih", "b_hh"}) names.give(gru, role, prefix + role);
    add(Type::save);
    mapping.layers.push_back(gru);
    add(Type::add);
    add(Type::layer_norm, prefix + "norm1");
    if (!names.find(prefix + "linear1.weight")) continue;
    add(Type::save);
    add(Type::linear, prefix + "linear1");
    add(Type::activation);
    add(Type::linear, prefix + "linear2");
    add(Type::add);
    add(Type::layer_norm, prefix + "norm2");
  }
}

// One matrix of users and one of items, with biases or without.
std::optional<Mapping> matrix_factorisation(Names& names) {
  std::string users, items;
  for (const std::string& name : names.all()) {
    if (!is_matrix(*names.find(name)) || names.find(name)->shape[1] == 1) continue;
    const bool user = mentions(name, {"user"}), item = mentions(name, {"item"});
    if (user == item) return std::nullopt;
    std::string& role = user ? users : items;
    if (!role.empty()) return std::nullopt;
    role = name;
  }
  if (users.empty() || items.empty() || names.find(users)->shape[1] != names.find(items)->shape[1])
    return std::nullopt;
  Mapping mapping{.architecture = "matrix factorisation"};
  mapping.embedding = names.part(items);
  mapping.users = names.part(users);
  for (const std::string& name : names.unclaimed()) {
    const Tensor& tensor = *names.find(name);
    if (!mentions(name, {"bias", "mean"})) return std::nullopt;
    if (mentions(name, {"item"}) && is_column(tensor, rows(*names.find(items))))
      mapping.output_bias = names.part(name);
    else if ((mentions(name, {"user"}) && is_column(tensor, rows(*names.find(users)))) ||
             tensor.elements() == 1)
      names.claim(name);  // the same for all items: it changes no ranking
  }
  mapping.layers = {{.type = Type::decay}};
  return mapping;
}

// Splits "gru.weight_ih_l0" into "gru." and 0, "cells.1.weight_ih" into "cells.1." and 0.
std::optional<std::pair<std::string, int>> gru_layer(const std::string& name) {
  const std::size_t at = name.rfind("weight_ih");
  if (at == std::string::npos || (at > 0 && name[at - 1] != '.')) return std::nullopt;
  const std::string rest = name.substr(at + 9);
  if (rest.empty()) return std::pair{name.substr(0, at), 0};
  if (!rest.starts_with("_l") || rest.size() > 4 || rest.size() < 3 ||
      !std::all_of(rest.begin() + 2, rest.end(), [](char c) { return c >= '0' && c <= '9'; }))
    return std::nullopt;
  return std::pair{name.substr(0, at), std::stoi(rest.substr(2))};
}

// An embedding, torch.nn.GRU or GRUCells in order, then perhaps a linear layer; scores from the
// embedding or from a linear layer with a row an item. RecBole's GRU4Rec is one of these.
std::optional<Mapping> torch_gru(Names& names) {
  Mapping mapping{.architecture = "torch gru"};
  std::vector<std::pair<std::pair<std::string, int>, std::string>> layers;
  for (const std::string& name : names.all())
    if (const auto layer = gru_layer(name)) layers.push_back({*layer, name});
  if (layers.empty()) return std::nullopt;
  // Files differ in the order of their tensors. "cells.10." comes behind "cells.9.".
  std::sort(layers.begin(), layers.end(), [](const auto& a, const auto& b) {
    const auto key = [](const auto& l) {
      return std::tuple(l.first.first.size(), l.first.first, l.first.second);
    };
    return key(a) < key(b);
  });
  std::uint64_t first_input = 0, width = 0;
  for (const auto& [layer, name] : layers) {
    const std::string suffix = name.substr(layer.first.size() + 9);
    Layer made{.type = Type::gru};
    const Tensor& input = *names.find(name);
    names.give(made, "w_ih", name);
    if (!names.give(made, "w_hh", layer.first + "weight_hh" + suffix)) return std::nullopt;
    const Tensor& recurrent = *names.find(layer.first + "weight_hh" + suffix);
    if (!is_matrix(input) || !is_matrix(recurrent) || rows(recurrent) != rows(input) ||
        rows(input) != 3 * recurrent.shape[1] || (width != 0 && input.shape[1] != width))
      return std::nullopt;
    names.give(made, "b_ih", layer.first + "bias_ih" + suffix);
    names.give(made, "b_hh", layer.first + "bias_hh" + suffix);
    if (first_input == 0) first_input = input.shape[1];
    width = recurrent.shape[1];
    mapping.layers.push_back(made);
  }

  std::vector<std::string> matrices, vectors;
  for (const std::string& name : names.unclaimed())
    (is_matrix(*names.find(name)) && names.find(name)->shape[1] > 1 ? matrices : vectors)
        .push_back(name);
  const auto bias_of = [&](const std::string& name) -> std::string {
    if (!name.ends_with("weight")) return "";
    const std::string bias = name.substr(0, name.size() - 6) + "bias";
    return names.find(bias) ? bias : "";
  };
  const auto is_embedding = [&](const std::string& name) {
    return bias_of(name).empty() && names.find(name)->shape[1] == first_input &&
           !mentions(name, {"out", "dense", "fc", "head", "decoder", "proj", "linear"});
  };
  const auto candidates = std::count_if(matrices.begin(), matrices.end(), is_embedding);
  if (candidates != 1) return std::nullopt;
  const auto at = std::find_if(matrices.begin(), matrices.end(), is_embedding);
  const std::uint64_t items = rows(*names.find(*at));
  mapping.embedding = names.part(*at);
  matrices.erase(at);
  // What is left: a linear layer, the output embedding, or one after the other.
  std::optional<std::string> output;
  for (std::size_t m = 0; m < matrices.size(); ++m) {
    const std::string& name = matrices[m];
    const Tensor& tensor = *names.find(name);
    if (rows(tensor) != items) {
      Layer linear{.type = Type::linear};
      if (tensor.shape[1] != width || mapping.layers.back().type == Type::linear)
        return std::nullopt;
      names.give(linear, "weight", name);
      if (const std::string bias = bias_of(name); !bias.empty()) names.give(linear, "bias", bias);
      width = rows(tensor);
      mapping.layers.push_back(linear);
    } else if (!output) {
      output = name;
    } else {
      return std::nullopt;
    }
  }
  if (output) {
    if (names.find(*output)->shape[1] != width) return std::nullopt;
    mapping.output = names.part(*output);
    if (const std::string bias = bias_of(*output); !bias.empty())
      mapping.output_bias = names.part(bias);
  } else if (width != first_input) {
    return std::nullopt;
  }
  const auto left = names.unclaimed();
  if (left.size() == 1 && !mapping.output_bias && is_column(*names.find(left[0]), items))
    mapping.output_bias = names.part(left[0]);
  if (names.find("item_embedding.weight") && names.find("gru_layers.weight_ih_l0") &&
      names.find("dense.weight")) {
    mapping.architecture = "recbole gru4rec";
    mapping.index_offset = 1;  // RecBole's [PAD]
  } else {
    mapping.padding_if_zero = true;
  }
  return mapping;
}

struct Known {
  const char* name;
  std::optional<Mapping> (*recognise)(Names&);
  std::vector<const char*> parts;  // of names, for the nearest one
};

const std::vector<Known>& known() {
  static const std::vector<Known> all{
      {"gru4rec", gru4rec, {"Wy", "By", "G.", "GE."}},
      {"lrurec", lrurec, {"lru", "params_log", "in_proj", "out_proj", "feed_forward"}},
      {"personalize train", trainer, {"item_embedding", "layer0.", "layer1.", "norm"}},
      {"matrix factorisation", matrix_factorisation, {"user", "item", "factors"}},
      {"torch gru", torch_gru, {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "emb", "gru"}}};
  return all;
}

std::string refusal(const TensorFile& file) {
  const Known* nearest = nullptr;
  std::size_t best = 0;
  for (const Known& architecture : known()) {
    std::size_t hits = 0;
    for (const Tensor& tensor : file.tensors)
      hits += std::any_of(
          architecture.parts.begin(), architecture.parts.end(),
          [&](const char* part) { return tensor.name.find(part) != std::string::npos; });
    if (hits > best) {
      best = hits;
      nearest = &architecture;
    }
  }
  std::string text = file.name + ": not a known architecture";
  if (nearest) text += "; the nearest is " + std::string(nearest->name);
  const auto is_lstm = [](const Tensor& t) {
    return t.name.find("weight_hh") != std::string::npos && is_matrix(t) &&
           t.shape[0] == 4 * t.shape[1];
  };
  const auto is_reverse = [](const Tensor& t) { return t.name.ends_with("_reverse"); };
  if (std::any_of(file.tensors.begin(), file.tensors.end(), is_lstm))
    text += " (an LSTM has no counterpart in the runtime)";
  if (std::any_of(file.tensors.begin(), file.tensors.end(), is_reverse))
    text += " (a bidirectional GRU reads events that have not happened yet)";
  text += "; say what is what with --mapping (tools/convert/README.md); its tensors:";
  constexpr std::size_t shown = 60;
  for (std::size_t t = 0; t < std::min(shown, file.tensors.size()); ++t)
    text += (t == 0 ? " " : ", ") + file.tensors[t].describe();
  if (file.tensors.size() > shown)
    text += " and " + std::to_string(file.tensors.size() - shown) + " more";
  if (file.tensors.empty()) text += " none";
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

}  // namespace

Mapping recognise(TensorFile& file) {
  // A checkpoint keeps the model beside the optimiser's state; wrappers put their name in front.
  for (const char* checkpoint :
       {"", "state_dict.", "model_state_dict.", "model_state.", "model.", "module."})
    for (const char* wrapper : {"", "module.", "model."}) {
      const std::string prefix = std::string(checkpoint) + wrapper;
      const bool whole = prefix.find("state") == std::string::npos;
      if (whole && !std::all_of(file.tensors.begin(), file.tensors.end(),
                                [&](const Tensor& t) { return t.name.starts_with(prefix); }))
        continue;
      for (const Known& architecture : known()) {
        Names names(file, prefix);
        auto mapping = architecture.recognise(names);
        if (mapping && names.all_claimed()) return *mapping;
      }
    }
  throw Failure(refusal(file));
}

}  // namespace personalize::tools
