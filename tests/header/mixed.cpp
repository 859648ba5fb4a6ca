// Compiled twice by mixed.sh: the unit that runs, and the one that does not but calls the same.
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

// Its own in each unit, as a user's code would be. std::to_string would be one for both.
namespace {

std::string named(char kind, int number) {
  std::string name(1, kind);
  for (int digit = 1000; digit > 0; digit /= 10)
    name.push_back(static_cast<char>('0' + number / digit % 10));
  return name;
}

pz::ModelParts parts() {
  constexpr int items = 400;
  constexpr std::size_t d = 32;
  pz::ModelParts p;
  const auto matrix = [](std::size_t rows, std::size_t columns) {
    pz::Matrix m = pz::Matrix::zeros(rows, columns);
    for (std::size_t i = 0; i < rows * columns; ++i)
      m.f32()[i] = static_cast<float>(i * 7 % 31) / 31.0f - 0.5f;
    return m;
  };
  for (int i = 0; i < items; ++i) {
    if (!p.item_ids.add(named('i', i))) return p;
    p.statistics.push_back(
        {static_cast<std::uint64_t>(items - i), 1'600'000'000, 1'600'001'000, 1'600'000'000});
    p.biases.push_back(0);
  }
  p.item_vectors = matrix(items, d).quantised();
  p.operations = {{pz::EncoderOp::Kind::embed_sum}, {pz::EncoderOp::Kind::gru}};
  p.weights = {matrix(3 * d, d).quantised(), matrix(3 * d, d).quantised(), matrix(1, 3 * d),
               matrix(1, 3 * d)};
  return p;
}

// A model to a file's bytes and back, served, fed and updated.
bool serve() {
  const auto bytes = pz::write_model(parts());
  if (!bytes) return false;
  const auto model = pz::Model::from_bytes(*bytes);
  if (!model) return false;
  auto recommender = pz::Recommender::create(*model, {.updates = pz::Updates::by_caller});
  if (!recommender || !recommender->put_item({.item = "new"})) return false;
  std::string session;
  for (int i = 0; i < 50; ++i) {
    session = named('s', i % 7);
    const std::string item = named('i', i * 3);
    if (!recommender->record({.session = session, .item = item})) return false;
    const auto slate = recommender->recommend({.session = session, .count = 50});
    if (!slate ||
        !recommender->record_impression({.session = session, .recommendation_id = slate->id}))
      return false;
  }
  return recommender->update() && recommender->merge_session(session, "u") &&
         recommender->recommend({.user = "u"}) && recommender->model() != nullptr;
}

}  // namespace

bool serve_in_other_unit();
#if RUNS
int main(int argc, char**) {
  if (argc > 1) return serve_in_other_unit() ? 0 : 1;
  return serve() ? 0 : 1;
}
#else
bool serve_in_other_unit() { return serve(); }
#endif
