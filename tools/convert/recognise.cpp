// Known architectures, told by their parameters' names and shapes.
#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "command/command.hpp"
#include "convert/mapping.hpp"
#include "data/fields.hpp"

namespace personalize::tools {
namespace {

// The tensors under one prefix that may be weights, and which of them an architecture has claimed.
class Names {
 public:
  Names(const TensorFile& file, std::string prefix, const std::set<std::string>& copies)
      : prefix_(std::move(prefix)) {
    for (const Tensor& tensor : file.tensors)
      // Counters and masks of training are integers and have no part in inference.
      if (tensor.name.starts_with(prefix_) && is_real(tensor.dtype) && !copies.count(tensor.name))
        tensors_.push_back(&tensor);
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
  std::vector<std::string> all() const {
    std::vector<std::string> names;
    for (const Tensor* tensor : tensors_) names.push_back(tensor->name.substr(prefix_.size()));
    return names;
  }
  std::size_t claimed() const { return claimed_.size(); }
  const std::string& prefix() const { return prefix_; }

  // Why nothing was recognised, where the architecture can tell.
  std::nullopt_t refuse(std::string reason) {
    reason_ = std::move(reason);
    return std::nullopt;
  }
  const std::string& reason() const { return reason_; }

 private:
  std::string prefix_, reason_;
  std::vector<const Tensor*> tensors_;
  std::set<const Tensor*> claimed_;
};

// A number by itself, as a hyperparameter is kept: no architecture has a weight of that shape.
bool is_scalar(const Tensor& tensor) { return tensor.shape.empty(); }
std::uint64_t rows(const Tensor& tensor) { return tensor.shape.empty() ? 1 : tensor.shape[0]; }
bool is_matrix(const Tensor& tensor) { return tensor.shape.size() == 2; }
bool is_column(const Tensor& tensor, std::uint64_t size) {
  return tensor.elements() == size && rows(tensor) == size;
}

bool mentions(const std::string& name, std::initializer_list<const char*> words) {
  const std::string text = lower_case(name);
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
    if (!mentions(name, {"bias", "mean"})) continue;
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
  const auto at = std::find_if(matrices.begin(), matrices.end(), is_embedding);
  if (at == matrices.end()) return names.refuse("none of its tensors can be the embedding");
  if (const auto other = std::find_if(at + 1, matrices.end(), is_embedding);
      other != matrices.end())
    return names.refuse("two of its tensors could be the embedding, " +
                        names.find(*at)->describe() + " and " + names.find(*other)->describe() +
                        ", and they differ");
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
  // Any other number an item, as popularity or a loss's weights, is not added to the scores.
  if (left.size() == 1 && !mapping.output_bias && is_column(*names.find(left[0]), items) &&
      (mentions(left[0], {"bias"}) || left[0] == "b"))
    mapping.output_bias = names.part(left[0]);
  if (names.find("item_embedding.weight") && names.find("gru_layers.weight_ih_l0") &&
      names.find("dense.weight")) {
    mapping.architecture = "recbole gru4rec";
    mapping.index_offset = 1;  // RecBole's [PAD]
  } else {
    mapping.padding_if_zero = true;
    if (const Layer& last = mapping.layers.back(); last.type == Type::linear)
      mapping.notes.push_back("taken for granted: no activation follows the layer '" +
                              last.weights.at("weight")[0].tensor + "'");
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

// An architecture that the tensors under a prefix nearly are.
struct Attempt {
  std::string architecture, reason;
  std::size_t claimed = 0;
};

std::string list(const std::vector<std::string>& names, std::size_t shown) {
  std::string text;
  for (std::size_t n = 0; n < std::min(shown, names.size()); ++n)
    text += (n == 0 ? "" : ", ") + names[n];
  if (names.size() > shown) text += " and " + std::to_string(names.size() - shown) + " more";
  return text;
}

std::string refusal(const TensorFile& file, const Attempt& nearest) {
  std::string text = file.name + ": not a known architecture";
  const auto has = [&](const char* tensor) { return file.find(tensor) != nullptr; };
  if (has("data") && has("indices") && has("indptr"))
    return file.name +
           ": holds a sparse matrix, as SciPy and implicit's nearest-neighbour models "
           "save it, and no factors; nothing here ranks by one";
  if (!nearest.architecture.empty()) text += "; the nearest is " + nearest.architecture;
  if (!nearest.reason.empty()) text += ": " + nearest.reason;
  for (const Tensor& tensor : file.tensors)
    if (tensor.dtype == DType::foreign)
      return file.name + ": tensor '" + tensor.name + "' is " + tensor.type_name +
             ", which is not read; save it as F32 or BF16";
  const auto is_lstm = [](const Tensor& t) {
    return t.name.find("weight_hh") != std::string::npos && is_matrix(t) &&
           t.shape[0] == 4 * t.shape[1];
  };
  const auto is_reverse = [](const Tensor& t) { return t.name.ends_with("_reverse"); };
  if (std::any_of(file.tensors.begin(), file.tensors.end(), is_lstm))
    text += " (an LSTM has no counterpart in the runtime)";
  if (std::any_of(file.tensors.begin(), file.tensors.end(), is_reverse))
    text += " (a bidirectional GRU reads events that have not happened yet)";
  text += "; say what is what with --mapping (tools/convert/README.md); its tensors: ";
  std::vector<std::string> tensors;
  for (const Tensor& tensor : file.tensors) tensors.push_back(tensor.describe());
  text += tensors.empty() ? "none" : list(tensors, 60);
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

// The nearest by the parts of the tensors' names.
std::string nearest_by_name(const TensorFile& file) {
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
  return nearest ? nearest->name : "";
}

// What a checkpoint keeps beside the model: the state of the optimiser and of the training.
bool is_training_state(const std::string& name) {
  static const std::set<std::string> whole{
      "opt",  "lr",   "amp",     "ema",        "step",        "iter",    "epoch",      "args",
      "loss", "rng",  "sampler", "model_ema",  "loops",       "config",  "history",    "hparams",
      "best", "seed", "scaler",  "amp_scaler", "grad_scaler", "metrics", "loss_scaler"};
  return whole.count(lower_case(name)) > 0 ||
         mentions(name, {"optim", "sched", "rng_state", "random_state", "criterion", "callback",
                         "hyper_param", "state_dict_ema", "ema_state", "loss"});
}

// The prefixes under which a whole model may lie: none, and what wrappers and checkpoints put in
// front where nothing else of the file can be a part of the model.
std::vector<std::string> model_prefixes(const TensorFile& file) {
  std::vector<std::string> prefixes{""};
  for (std::size_t p = 0; p < prefixes.size(); ++p) {
    const std::string prefix = prefixes[p];
    constexpr std::size_t deepest = 4;
    if (static_cast<std::size_t>(std::count(prefix.begin(), prefix.end(), '.')) == deepest) break;
    std::vector<std::string> parts;  // behind the prefix, in the file's order
    std::set<std::string> numbers;   // those that are a number by themselves
    for (const Tensor& tensor : file.tensors) {
      if (!tensor.name.starts_with(prefix)) continue;
      const std::size_t dot = tensor.name.find('.', prefix.size());
      const std::string part = tensor.name.substr(
          prefix.size(), dot == std::string::npos ? dot : dot + 1 - prefix.size());
      if (std::find(parts.begin(), parts.end(), part) == parts.end()) parts.push_back(part);
      if (dot == std::string::npos && is_scalar(tensor)) numbers.insert(part);
    }
    for (const std::string& part : parts) {
      if (!part.ends_with('.')) continue;
      const bool dictionary =
          part == "state_dict." || part == "model_state_dict." || part == "model_state.";
      const auto beside = [&](const std::string& other) {
        return other == part || numbers.count(other) > 0 ||
               is_training_state(other.substr(0, other.size() - other.ends_with('.')));
      };
      if (dictionary || (!is_training_state(part.substr(0, part.size() - 1)) &&
                         std::all_of(parts.begin(), parts.end(), beside)))
        prefixes.push_back(prefix + part);
    }
  }
  return prefixes;
}

// Matrices that hold the same numbers as another one: a tied embedding under two names. By the name
// of each, its first like.
std::map<std::string, std::string> copies_of(TensorFile& file) {
  std::map<std::string, std::string> copies;
  for (std::size_t t = 0; t < file.tensors.size(); ++t) {
    const Tensor& tensor = file.tensors[t];
    if (!is_matrix(tensor) || !is_real(tensor.dtype) || tensor.dtype == DType::foreign) continue;
    for (std::size_t o = 0; o < t; ++o) {
      const Tensor& other = file.tensors[o];
      if (other.shape != tensor.shape || other.dtype != tensor.dtype || copies.count(other.name) ||
          !same_values(file, other, tensor))
        continue;
      copies[tensor.name] = other.name;
      break;
    }
  }
  return copies;
}

std::optional<Mapping> recognise_with(TensorFile& file, const std::vector<std::string>& prefixes,
                                      const std::map<std::string, std::string>& copies,
                                      Attempt& nearest) {
  std::set<std::string> left_out;
  for (const auto& [copy, original] : copies) left_out.insert(copy);
  for (const std::string& prefix : prefixes) {
    for (const Known& architecture : known()) {
      Names names(file, prefix, left_out);
      auto mapping = architecture.recognise(names);
      std::vector<std::string> scalars, others;
      for (const std::string& name : names.unclaimed())
        (is_scalar(*names.find(name)) ? scalars : others).push_back(names.find(name)->describe());
      if (mapping && others.empty() && names.claimed() > 0) {
        const auto note = [&](const std::vector<std::string>& tensors, const std::string& why) {
          if (tensors.empty()) return;
          mapping->notes.push_back("left out: " + list(tensors, 8) + " (" + why + ")");
        };
        note(scalars, "numbers by themselves, as hyperparameters are");
        std::vector<std::string> integers, doubles, beside;
        std::map<std::string, std::size_t> counts;  // of the tensors of what lies beside the model
        for (const Tensor& tensor : file.tensors) {
          if (!tensor.name.starts_with(prefix))
            ++counts[tensor.name.substr(0, tensor.name.find('.'))];
          else if (!is_real(tensor.dtype))
            integers.push_back(tensor.describe());
          else if (const auto copy = copies.find(tensor.name); copy != copies.end())
            doubles.push_back(tensor.describe() + " = " + copy->second);
        }
        note(integers, "no floating-point numbers: counters, masks, names");
        note(doubles, "the same numbers under a second name");
        for (const auto& [part, count] : counts)
          beside.push_back("'" + part + "' with " + std::to_string(count) +
                           (count == 1 ? " tensor" : " tensors"));
        note(beside, "not under '" + prefix + "'");
        return mapping;
      }
      if ((mapping || !names.reason().empty()) && names.claimed() >= nearest.claimed) {
        nearest = {architecture.name, names.reason(), names.claimed()};
        if (mapping) nearest.reason = "it has no place for " + list(others, 8);
      }
    }
  }
  return std::nullopt;
}

}  // namespace

Mapping recognise(TensorFile& file) {
  const auto prefixes = model_prefixes(file);
  Attempt nearest{nearest_by_name(file), "", 0};
  if (auto mapping = recognise_with(file, prefixes, {}, nearest)) return *mapping;
  if (const auto copies = copies_of(file); !copies.empty()) {
    Attempt unused = nearest;
    if (auto mapping = recognise_with(file, prefixes, copies, unused)) return *mapping;
    // The first of the names may be the one that an architecture does not know.
    std::map<std::string, std::string> originals;
    for (const auto& [copy, original] : copies) originals[original] = copy;
    if (auto mapping = recognise_with(file, prefixes, originals, unused)) return *mapping;
  }
  throw Failure(refusal(file, nearest));
}

}  // namespace personalize::tools
