// Writes small models in every form that the format has: what the fuzzers begin with.
// usage: seed_models FOLDER
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "../small_model.hpp"

namespace pz = personalize;
using Kind = pz::EncoderOp::Kind;

namespace {

void save(const pz::ModelParts& parts, const std::string& path, const pz::WriteOptions& options) {
  const auto saved = pz::save_model(parts, path, options);
  if (saved) return;
  std::fprintf(stderr, "%s: %s\n", path.c_str(), saved.error().message.c_str());
  std::exit(1);
}

// Young items, so that some are explored.
pz::ModelParts young(const small_model::Shape& shape) {
  pz::ModelParts p = small_model::parts(shape);
  for (std::size_t i = 0; i < p.statistics.size(); ++i) {
    p.statistics[i] = {i % 2 == 0 ? 0 : 100 - i, 1'699'900'000, 1'699'990'000,
                       1'699'800'000 + static_cast<std::int64_t>(i)};
  }
  return p;
}

// The operations of `kind` with weights that fit, between embed_sum and a linear one.
pz::ModelParts with(Kind kind, std::uint32_t argument, std::size_t d, std::size_t hidden) {
  pz::ModelParts p = young({.items = 12, .dimension = d, .hidden = hidden, .fields = false});
  small_model::Random random{7};
  p.weights.clear();
  const auto weight = [&](std::size_t rows, std::size_t columns) {
    p.weights.push_back(small_model::random_matrix(random, rows, columns, 0.4f));
  };
  p.operations = {{Kind::embed_sum}};
  std::size_t width = d;
  switch (kind) {
    case Kind::gru:
      if ((argument & pz::GruForm::gate_input) != 0) {
        p.operations.push_back({Kind::linear});
        weight(3 * hidden, d), weight(1, 3 * hidden);
      } else {
        weight(3 * hidden, d);
      }
      weight(3 * hidden, hidden), weight(1, 3 * hidden), weight(1, 3 * hidden);
      width = hidden;
      break;
    case Kind::lru:
      weight(1, 2 * hidden), weight(2 * hidden, d), weight(1, 2 * hidden);
      width = 2 * hidden;
      break;
    default:
      weight(1, d), weight(1, d);
      break;
  }
  p.operations.push_back({kind, argument});
  p.operations.push_back({Kind::linear});
  weight(d, width), weight(1, d);
  return p;
}

// Two users with a state of the size that the model's encoder has.
pz::ModelParts with_users(pz::ModelParts p, std::size_t state) {
  for (const char* user : {"u", "v"})
    if (!p.user_ids.add(user)) std::abort();
  small_model::Random random{9};
  p.user_states = small_model::random_matrix(random, 2, state + p.item_vectors.columns(), 0.5f);
  return p;
}

// What the encoder takes in for an item is not its vector.
pz::ModelParts with_inputs(pz::ModelParts p) {
  small_model::Random random{11};
  p.input_vectors =
      small_model::random_matrix(random, p.item_ids.size(), p.item_vectors.columns(), 0.5f);
  return p;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const std::string folder = std::string(arguments[1]) + "/";
  const pz::WriteOptions stored{.element_type = pz::ElementType::f32, .zstd_level = 0},
      packed{.chunk_bytes = 64}, four_bits{.element_type = pz::ElementType::i4};
  const small_model::Shape small{.items = 10, .dimension = 4, .hidden = 4};
  save(young(small), folder + "f32_stored.pzm", stored);
  save(young(small), folder + "i8_small_chunks.pzm", packed);
  save(young({.items = 16, .dimension = 20, .hidden = 4, .fields = false}), folder + "i4.pzm",
       four_bits);
  save(with(Kind::gru, pz::GruForm::gate_input, 4, 3), folder + "gru_gate_input.pzm", {});
  save(with(Kind::gru, pz::GruForm::reset_before, 4, 3), folder + "gru_reset_before.pzm", {});
  save(with(Kind::lru, 0, 4, 3), folder + "lru.pzm", {});
  save(with(Kind::decay, 0, 4, 3), folder + "decay.pzm", stored);
  save(with_users(with(Kind::decay, 0, 4, 3), 4), folder + "users.pzm", {});
  save(with_inputs(with(Kind::gru, 0, 4, 3)), folder + "inputs.pzm", packed);
  save(with(Kind::decay, 0, 1, 1), folder + "one_dimension.pzm", stored);
  return 0;
}
