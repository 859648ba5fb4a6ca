// The kernels of every instruction set that this processor can run, against the scalar reference.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

namespace {

std::vector<const pz::kernels::Table*> tables() {
  std::size_t count = 0;
  const pz::kernels::Table* const* first = pz::kernels::available(count);
  return {first, first + count};
}

const pz::kernels::Table& reference() { return *tables().back(); }

}  // namespace

TEST_CASE("the processor's instruction sets are listed best first, the reference last") {
  const auto all = tables();
  REQUIRE(all.size() >= 2);
  CHECK(std::string(all.back()->name) == "scalar");
  std::string names;
  for (const auto* table : all) names += std::string(names.empty() ? "" : ", ") + table->name;
  MESSAGE("instruction sets: ", names);
  const bool has_vnni = names.find("avx512+vnni") != std::string::npos;
  if (!has_vnni) MESSAGE("no AVX-512 with VNNI here: its kernels are not tested");
  CHECK(std::find(all.begin(), all.end(), &pz::kernels::chosen()) != all.end());
}

TEST_CASE("slates and scores have the same bits on every instruction set") {
  for (const bool int8 : {true, false}) {
    const auto model = small_model::model({.items = 3000, .dimension = 45}, int8);
    const pz::Scorer plain{*model, reference()};
    auto workspace = plain.make_workspace();
    small_model::Random random{5};
    for (const auto* table : tables()) {
      CAPTURE(table->name);
      const pz::Scorer scorer{*model, *table};
      CHECK(std::string(scorer.instruction_set()) == table->name);
      for (int round = 0; round < 20; ++round) {
        std::vector<float> query(pz::kernels::padded(45));
        for (std::size_t c = 0; c < 45; ++c) query[c] = random.normal();
        std::vector<pz::ScoredItem> want, got;
        plain.top_k(query, 50, {}, workspace, want);
        scorer.top_k(query, 50, {}, workspace, got);
        REQUIRE(got.size() == want.size());
        for (std::size_t r = 0; r < got.size(); ++r) {
          REQUIRE(got[r].item == want[r].item);
          REQUIRE(got[r].score == want[r].score);
        }
      }
    }
  }
}

TEST_CASE("encoder steps agree to rounding") {
  for (const bool int8 : {true, false}) {
    const auto model = small_model::model({.dimension = 50, .hidden = 70}, int8);
    for (const auto* table : tables()) {
      CAPTURE(table->name);
      const pz::Encoder encoder{*model, *table}, plain{*model, reference()};
      auto workspace = encoder.make_workspace();
      std::vector<float> state(encoder.state_size()), want(encoder.state_size());
      small_model::Random random{3};
      for (int event = 0; event < 50; ++event) {
        const pz::EncoderInput input{random.below(50), random.below(2), random.below(12)};
        encoder.step(input, state, workspace);
        plain.step(input, want, workspace);
      }
      double difference = 0, norm = 0;
      for (std::size_t c = 0; c < 50; ++c) {
        const double a = encoder.query(state)[c], b = plain.query(want)[c];
        difference += (a - b) * (a - b);
        norm += b * b;
      }
      // With int8 weights an instruction set may round its inputs to fewer steps.
      CHECK(std::sqrt(difference / norm) < (int8 ? 6.0 / table->query_limit : 2e-5));
    }
  }
}
