// What a model's tensors mean: written by hand as JSON, or found from names, shapes or an ONNX
// graph. README.md in this folder documents the JSON form.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "convert/tensors.hpp"

namespace personalize::tools {

// A matrix or vector: one tensor, or several put below one another. Dimensions of 1 are dropped.
struct TensorPart {
  std::string tensor;
  bool transpose = false;
  // Rows [first, second) of the tensor, before it is transposed.
  std::optional<std::pair<std::uint64_t, std::uint64_t>> slice = std::nullopt;
};
using Weight = std::vector<TensorPart>;

// One layer of the encoder, in the order in which an event passes them.
struct Layer {
  enum class Type { gru, lru, linear, layer_norm, activation, save, add, decay };
  Type type;
  std::map<std::string, Weight> weights = {};  // by role: w_ih, w_hh, b_ih, b_hh; weight, bias; ...
  std::string gate_order = "rzn";              // gru: of the blocks of its weights
  bool reset_after = true;    // gru: n = tanh(i_n + r (W_hn h + b_hn)); else r h is multiplied
  bool update_keeps = true;   // gru: h = (1 - z) n + z h; else h = z n + (1 - z) h
  bool gate_input = false;    // gru: the embedding holds W_ih's product; no w_ih
  std::string function = {};  // activation: sigmoid, tanh, relu, gelu
  std::uint32_t slot = 0;     // save, add
  double keep = 1, take = 0;  // decay: h = keep h + take x
};

struct Mapping {
  std::string architecture = {};               // for provenance
  TensorPart embedding = {};                   // [rows, e]: what the encoder takes in
  std::optional<TensorPart> output = {};       // [rows, d]; absent: the embedding
  std::optional<TensorPart> output_bias = {};  // [rows]
  std::uint64_t index_offset = 0;              // row of the first item
  std::optional<std::uint64_t> padding_row = {};
  bool padding_if_zero = false;  // row 0 is padding if it is zero and a row too many
  std::vector<Layer> layers = {};
  std::optional<TensorPart> users = {};  // [users, d]: states of known users
  std::uint64_t user_index_offset = 0;
  std::string item_ids = {}, user_ids = {};  // CSV files; empty: given on the command line
  std::string graph_output = {};             // ONNX: what the model was traced from
  std::vector<std::string> notes = {};       // what of the file is left out, a sentence each
};

// Throws Failure: not JSON, an unknown key, a value of the wrong type. Files that it names are
// relative to the mapping's folder.
Mapping read_mapping(const std::string& path);

// From parameter names and shapes. Throws Failure that lists the tensors and names the nearest
// known architecture.
Mapping recognise(TensorFile& file);

// From the nodes of an ONNX graph. Throws Failure: a node that has no counterpart.
Mapping trace_graph(TensorFile& file);

}  // namespace personalize::tools
