// Cost of what a request is made of, on synthetic models. One thread; see bench/README.md.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

namespace {

pz::Matrix random_matrix(std::size_t rows, std::size_t columns, std::mt19937& random) {
  pz::Matrix m = pz::Matrix::zeros(rows, columns);
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(columns)));
  for (float& v : m.f32()) v = normal(random);
  return m;
}

// The trainer's default network: layer norm, GRU, residual, feed-forward with GELU, residual.
std::shared_ptr<const pz::Model> synthetic_model(std::size_t items, std::size_t d,
                                                 pz::ElementType type) {
  using Kind = pz::EncoderOp::Kind;
  std::mt19937 random(1);
  pz::ModelParts parts;
  parts.metadata = "{}";
  for (std::size_t i = 0; i < items; ++i) {
    if (!parts.item_ids.add("i" + std::to_string(i))) std::abort();
  }
  const auto stored = [type](pz::Matrix m) {
    return type == pz::ElementType::i8 && m.rows() > 1 ? m.quantised() : m;
  };
  parts.item_vectors = stored(random_matrix(items, d, random));
  parts.biases.resize(items);
  parts.statistics.resize(items);
  parts.operations = {{Kind::embed_sum},
                      {Kind::layer_norm},
                      {Kind::save, 0},
                      {Kind::gru},
                      {Kind::add, 0},
                      {Kind::layer_norm},
                      {Kind::save, 0},
                      {Kind::linear},
                      {Kind::activation, static_cast<std::uint32_t>(pz::Activation::gelu)},
                      {Kind::linear},
                      {Kind::add, 0},
                      {Kind::layer_norm}};
  for (const auto& [rows, columns] : {std::pair{std::size_t{1}, d},
                                      {1, d},
                                      {3 * d, d},
                                      {3 * d, d},
                                      {1, 3 * d},
                                      {1, 3 * d},
                                      {1, d},
                                      {1, d},
                                      {4 * d, d},
                                      {1, 4 * d},
                                      {d, 4 * d},
                                      {1, d},
                                      {1, d},
                                      {1, d}})
    parts.weights.push_back(stored(random_matrix(rows, columns, random)));
  auto model = pz::Model::from_parts(std::move(parts));
  if (!model) std::abort();
  return *model;
}

void encoder_step(benchmark::State& state) {
  const auto type = state.range(1) == 0 ? pz::ElementType::i8 : pz::ElementType::f32;
  const auto model = synthetic_model(1000, static_cast<std::size_t>(state.range(0)), type);
  const pz::Encoder encoder(*model);
  std::vector<float> user(encoder.state_size());
  auto workspace = encoder.make_workspace();
  std::uint32_t item = 0;
  for (auto _ : state) {
    encoder.step({.item = item}, user, workspace);
    item = (item + 1) % 1000;
  }
  state.SetLabel(std::string(pz::name(type)));
}
BENCHMARK(encoder_step)->ArgsProduct({{64, 128}, {0, 1}});

void top_100(benchmark::State& state) {
  const auto items = static_cast<std::size_t>(state.range(0));
  const auto model = synthetic_model(items, 64, pz::ElementType::i8);
  const pz::Scorer scorer(*model);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> queries(100, std::vector<float>(64));
  for (auto& query : queries)
    for (float& v : query) v = normal(random);
  auto workspace = scorer.make_workspace();
  std::vector<pz::ScoredItem> top;
  std::size_t next = 0;
  for (auto _ : state) {
    scorer.top_k(queries[next++ % queries.size()], 100, {}, workspace, top);
    benchmark::DoNotOptimize(top.data());
  }
  state.SetLabel(scorer.instruction_set());
}
BENCHMARK(top_100)->Arg(10'000)->Arg(100'000)->Arg(1'000'000)->Unit(benchmark::kMicrosecond);

void event_and_slate_of_25(benchmark::State& state) {
  const auto model = synthetic_model(10'000, 128, pz::ElementType::i8);
  auto shop = pz::Recommender::create(model);
  if (!shop) std::abort();
  pz::Slate slate;
  std::int64_t now = 0;
  for (auto _ : state) {
    const std::string item = "i" + std::to_string(now % 10'000);
    if (!shop->record({.user = "u", .item = item, .timestamp = ++now}) ||
        !shop->recommend({.user = "u", .count = 25, .exclude_interacted = true}, slate))
      std::abort();
  }
}
BENCHMARK(event_and_slate_of_25)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
