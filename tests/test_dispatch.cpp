// The kernels of every instruction set that this processor can run, against the scalar reference.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "kernel_inputs.hpp"

namespace pz = personalize;

namespace {

std::vector<const pz::kernels::Table*> tables() {
  std::size_t count = 0;
  const pz::kernels::Table* const* first = pz::kernels::available(count);
  return {first, first + count};
}

const pz::kernels::Table& reference() { return *tables().back(); }

using kernel_inputs::close;
using kernel_inputs::Found;
using kernel_inputs::integers;
using kernel_inputs::Panels;
using kernel_inputs::Query;
using kernel_inputs::Random;
using kernel_inputs::rows_of;
using kernel_inputs::values;

// Two groups of four queries, one of two and one alone.
constexpr std::size_t most = 11;

// Rounding may decide about a score that lies on the limit, about no other.
template <int Bits>
void scans_find_the_same() {
  for (const auto* table : tables()) {
    CAPTURE(std::string(table->name));
    Random random{1};
    for (const std::size_t d : {1u, 5u, 16u, 64u, 149u})
      for (const std::size_t count : {1u, 4u, 9u, 16u, 21u}) {
        CAPTURE(d);
        CAPTURE(count);
        const Panels<Bits> panels(random, d, count);
        std::vector<Query> queries;
        for (std::size_t q = 0; q < most; ++q)
          queries.emplace_back(random, d, Bits == 8 ? table->query_limit : 127);
        const float limit = 0.3f;
        std::vector<Found> alone;
        for (const Query& query : queries) {
          alone.push_back(panels.scan(*table, {&query, 1}, limit)[0]);
          const auto more = panels.scan(reference(), {&query, 1}, limit - 1e-4f)[0];
          const auto fewer = panels.scan(reference(), {&query, 1}, limit + 1e-4f)[0];
          const auto& got = alone.back();
          REQUIRE(
              std::includes(more.rows.begin(), more.rows.end(), got.rows.begin(), got.rows.end()));
          REQUIRE(std::includes(got.rows.begin(), got.rows.end(), fewer.rows.begin(),
                                fewer.rows.end()));
          for (std::size_t i = 0; i < got.lower.size(); ++i) {
            const auto at = std::find(more.rows.begin(), more.rows.end(), got.rows[i]);
            const float want = more.lower[static_cast<std::size_t>(at - more.rows.begin())];
            REQUIRE(std::abs(got.lower[i] - want) <= 2e-6f * std::max(1.0f, std::abs(want)));
          }
        }
        // Rows may go by other numbers.
        for (const std::size_t together : {std::size_t{1}, most}) {
          const auto some = std::span(queries).first(together);
          const auto shifted = panels.scan(*table, some, limit, 0, 0, false, 1000);
          for (std::size_t q = 0; q < together; ++q) {
            auto want = alone[q];
            for (auto& row : want.rows) row += 1000;
            REQUIRE(shifted[q] == want);
          }
        }
        for (std::size_t together = 2; together <= most; ++together) {
          // What follows comes from memory meanwhile; here it is the same again.
          const auto found =
              panels.scan(*table, std::span(queries).first(together), limit, 0, 0, true);
          for (std::size_t q = 0; q < together; ++q) REQUIRE(found[q] == alone[q]);
        }
        if constexpr (Bits == 8) {
          std::vector<float> got(panels.all()), want(panels.all());
          for (std::size_t q = 0; q < most; ++q) {
            const auto query = panels.scanned(queries[q]);
            table->matrix_vector_i8(panels.view(), count, query, got.data());
            reference().matrix_vector_i8(panels.view(), count, query, want.data());
            close(got, want, panels.all(), 2e-6f);
            for (std::size_t i = 0; i < alone[q].rows.size(); ++i)
              REQUIRE(alone[q].lower[i] == got[alone[q].rows[i]]);
          }
        }
      }
  }
}

void same_slates(const std::vector<pz::ScoredItem>& got, const std::vector<pz::ScoredItem>& want) {
  REQUIRE(got.size() == want.size());
  for (std::size_t r = 0; r < got.size(); ++r) {
    REQUIRE(got[r].item == want[r].item);
    REQUIRE(got[r].score == want[r].score);
  }
}

std::vector<float> query_of(Random& random, std::size_t d) {
  std::vector<float> query(pz::kernels::padded(d));
  for (std::size_t c = 0; c < d; ++c) query[c] = random.normal();
  return query;
}

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

TEST_CASE("scans of 8 bits, of one query to four, and products with int8 weights") {
  scans_find_the_same<8>();
}

TEST_CASE("scans of 4 bits, of one query to four") { scans_find_the_same<4>(); }

TEST_CASE("products of single rows, and what prepares a query") {
  for (const auto* table : tables()) {
    CAPTURE(std::string(table->name));
    Random random{3};
    for (const std::size_t d : {1u, 15u, 64u, 65u, 149u, 1000u}) {
      CAPTURE(d);
      const auto rows = integers(random, 9 * d, 127);
      const auto f32 = values(random, 9 * d, 1e3f);

      const std::vector<std::uint32_t> items{8, 0, 4, 4, 7, 1};
      const auto some = rows_of(rows, d, items);
      const auto some_f32 = rows_of(f32, d, items);
      const Query query{random, d, 127};
      std::vector<std::int32_t> dots(items.size()), want(items.size());
      table->row_dots(some.data(), d, query.values.data(), -128 * query.sum, dots.data(),
                      items.size());
      reference().row_dots(some.data(), d, query.values.data(), -128 * query.sum, want.data(),
                           items.size());
      REQUIRE(dots == want);
      auto x = values(random, d, 2.0f);
      std::vector<double> wide(pz::kernels::padded(d)), exact(items.size()), direct(items.size());
      for (std::size_t c = 0; c < d; ++c) wide[c] = x[c];
      table->dots_i8(some.data(), d, wide.data(), exact.data(), items.size());
      reference().dots_i8(some.data(), d, wide.data(), direct.data(), items.size());
      REQUIRE(exact == direct);
      table->dots_f32(some_f32.data(), d, wide.data(), exact.data(), items.size());
      reference().dots_f32(some_f32.data(), d, wide.data(), direct.data(), items.size());
      REQUIRE(exact == direct);
      std::vector<std::int8_t> q(pz::kernels::padded(d)), want_q(q.size());
      std::int32_t sum = 0, want_sum = 0;
      const float step = table->quantise(d, x.data(), 127, q.data(), sum);
      CHECK(step == reference().quantise(d, x.data(), 127, want_q.data(), want_sum));
      REQUIRE(q == want_q);
      REQUIRE(sum == want_sum);
      const std::size_t k = (d + 2) / 3, size = pz::kernels::padded(d);
      std::fill(x.begin() + static_cast<std::ptrdiff_t>(d), x.end(),
                -std::numeric_limits<float>::infinity());
      const float low = -std::numeric_limits<float>::infinity();
      CHECK(table->kth_largest(size, x.data(), k, low) ==
            reference().kth_largest(size, x.data(), k, low));
    }
  }
}

TEST_CASE("a NaN reaches nothing, and no instruction set loses or invents one") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float low = -std::numeric_limits<float>::infinity();
  for (const auto* table : tables()) {
    CAPTURE(std::string(table->name));
    Random random{6};
    for (std::size_t at = 0; at < 32; ++at) {
      auto x = values(random, 32);
      x.resize(32);
      x[at] = nan;
      const float found = table->kth_largest(32, x.data(), 5, low);
      CHECK(found == reference().kth_largest(32, x.data(), 5, low));
      CHECK(std::count_if(x.begin(), x.end(), [&](float v) { return v >= found; }) == 5);
      // The largest magnitude but for it.
      std::vector<std::int8_t> q(32);
      std::int32_t sum = 0;
      float largest = 0;
      for (const float v : x)
        if (!std::isnan(v)) largest = std::max(largest, std::abs(v));
      CHECK(table->quantise(32, x.data(), 127, q.data(), sum) == largest / 127);
      auto y = x;
      table->relu(32, y.data());
      for (std::size_t i = 0; i < 32; ++i) CHECK(y[i] == (x[i] > 0 ? x[i] : 0.0f));
      for (const auto curve : {table->tanh, table->sigmoid, table->gelu}) {
        y = x;
        curve(32, y.data());
        for (std::size_t i = 0; i < 32; ++i) CHECK(std::isnan(y[i]) == (i == at));
      }
    }
    const std::vector<float> all(32, nan);
    CHECK(table->kth_largest(32, all.data(), 1, low) == low);
  }
}

TEST_CASE("products in f32, gates, norms and activations") {
  for (const auto* table : tables()) {
    CAPTURE(std::string(table->name));
    Random random{4};
    for (const std::size_t n : {1u, 7u, 16u, 50u, 149u}) {
      CAPTURE(n);
      constexpr std::size_t blocks = 9, outputs = blocks * pz::kernels::lanes;
      const auto packed = values(random, n * outputs), rows = values(random, 5 * n);
      const auto bias = values(random, outputs), x = values(random, n);
      const auto summands = values(random, 2 * outputs);
      std::vector<float> got(outputs), want(outputs);
      table->matrix_vector(packed.data(), bias.data(), n, blocks, x.data(), got.data());
      reference().matrix_vector(packed.data(), bias.data(), n, blocks, x.data(), want.data());
      close(got, want, outputs, 2e-5f);
      table->rows_vector(rows.data(), bias.data(), n, 5, x.data(), got.data());
      reference().rows_vector(rows.data(), bias.data(), n, 5, x.data(), want.data());
      close(got, want, 5, 2e-5f);
      const std::size_t stride = pz::kernels::padded(n);
      for (const float scale : {0.1f, 3.0f, 60.0f}) {
        const auto input = values(random, 3 * stride, scale);
        const auto recurrent = values(random, 3 * stride, scale);
        auto hidden = values(random, stride), same = hidden;
        table->gru_gates(n, stride, input.data(), recurrent.data(), hidden.data());
        reference().gru_gates(n, stride, input.data(), recurrent.data(), same.data());
        close(hidden, same, n, 2e-6f);
      }
      const std::vector<const float*> terms{summands.data(), bias.data(),
                                            summands.data() + outputs};
      for (const std::size_t count : {1u, 2u, 3u}) {
        table->scaled_sum(outputs, terms.data(), count, 0.7f, bias.data(), got.data());
        reference().scaled_sum(outputs, terms.data(), count, 0.7f, bias.data(), want.data());
        close(got, want, outputs, 1e-6f);
      }
      auto normed = values(random, n, 3.0f), same = normed;
      const float factor = table->layer_norm(n, 1e-5f, packed.data(), bias.data(), normed.data());
      const float want_factor =
          reference().layer_norm(n, 1e-5f, packed.data(), bias.data(), same.data());
      if (n > 1) {
        CHECK(factor == doctest::Approx(want_factor).epsilon(1e-5));
        close(normed, same, n, 1e-5f);
      }
      using Activation = void (*)(std::size_t, float*) noexcept;
      const auto compare = [&](Activation one, Activation other, float bound) {
        for (const float scale : {0.01f, 1.0f, 30.0f}) {
          auto a = values(random, n, scale), b = a;
          one(n, a.data());
          other(n, b.data());
          close(a, b, n, bound);
        }
      };
      compare(table->sigmoid, reference().sigmoid, 1e-6f);
      compare(table->tanh, reference().tanh, 1e-6f);
      compare(table->relu, reference().relu, 0.0f);
      compare(table->gelu, reference().gelu, 1e-6f);
    }
  }
}

TEST_CASE("slates and scores have the same bits on every instruction set, alone and together") {
  const auto compare = [](const pz::Model& model, int rounds) {
    const std::size_t d = model.dimension();
    const pz::Scorer plain{model, reference()};
    auto workspace = plain.make_workspace();
    small_model::Random random{5};
    std::vector<std::vector<float>> queries;
    std::vector<std::vector<pz::ScoredItem>> want(static_cast<std::size_t>(rounds));
    for (auto& top : want) {
      queries.push_back(query_of(random, d));
      plain.top_k(queries.back(), 50, {}, workspace, top);
    }
    for (const auto* table : tables()) {
      CAPTURE(std::string(table->name));
      const pz::Scorer scorer{model, *table};
      CHECK(std::string(scorer.instruction_set()) == table->name);
      std::vector<std::vector<pz::ScoredItem>> tops(want.size());
      std::vector<pz::Scorer::Query> batch;
      std::vector<pz::ScoredItem> top;
      for (std::size_t i = 0; i < want.size(); ++i) {
        scorer.top_k(queries[i], 50, {}, workspace, top);
        same_slates(top, want[i]);
        batch.push_back({queries[i], 50, {}, &tops[i]});
      }
      scorer.top_k(batch, workspace);
      for (std::size_t i = 0; i < want.size(); ++i) same_slates(tops[i], want[i]);
    }
  };
  SUBCASE("rows of 8 bits") {
    for (const bool int8 : {true, false})
      compare(*small_model::model({.items = 3000, .dimension = 45}, int8), 20);
  }
  SUBCASE("rows of 4 bits, which larger catalogues have") {
    constexpr std::size_t d = 509, items = (std::size_t{1} << 24) / d + 2;
    compare(*small_model::model({.items = items, .dimension = d, .hidden = 16}, true), 5);
  }
}

TEST_CASE("an option chooses the instruction set, or says which there are") {
  const auto model = small_model::model({.items = 300}, true);
  std::vector<std::string> want;
  for (const auto* table : tables()) {
    auto shop = pz::Recommender::create(
        model, {.seed = 1, .recommendation_key = {{1, 2}}, .instruction_set = table->name});
    REQUIRE(shop);
    CHECK(std::string(shop->instruction_set()) == table->name);
    const auto slate = shop->recommend({.user = "u", .count = 10, .timestamp = 0});
    REQUIRE(slate);
    std::vector<std::string> items;
    for (const pz::Pick& pick : slate->items) items.emplace_back(pick.item);
    if (want.empty()) want = items;
    CHECK(items == want);
  }
  const auto usual = pz::Recommender::create(model);
  REQUIRE(usual);
  CHECK(std::string(usual->instruction_set()) == pz::kernels::chosen().name);
  const auto unknown = pz::Recommender::create(model, {.instruction_set = "mmx"});
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == pz::Errc::invalid_argument);
  CHECK(unknown.error().message.find("'mmx'") != std::string::npos);
  for (const auto* table : tables())
    CHECK(unknown.error().message.find(table->name) != std::string::npos);
}

TEST_CASE("encoder steps agree to rounding") {
  for (const bool int8 : {true, false}) {
    const auto model = small_model::model({.dimension = 50, .hidden = 70}, int8);
    for (const auto* table : tables()) {
      CAPTURE(std::string(table->name));
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
