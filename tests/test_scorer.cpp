// Exact top-k against a full sort of every score.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

namespace {

std::vector<pz::ScoredItem> top_k(const pz::Scorer& scorer, const std::vector<float>& query,
                                  std::size_t k, const pz::Eligibility& eligibility = {}) {
  auto workspace = scorer.make_workspace();
  std::vector<pz::ScoredItem> top;
  scorer.top_k(query, k, eligibility, workspace, top);
  return top;
}

std::vector<pz::ScoredItem> full_sort(const pz::Scorer& scorer, std::size_t items,
                                      const std::vector<float>& query, std::size_t k,
                                      const pz::Eligibility& eligibility) {
  std::vector<pz::ScoredItem> all;
  for (std::uint32_t i = 0; i < items; ++i) {
    const float score = scorer.score(query, i);
    if (eligibility.test(i) && std::isfinite(score)) all.push_back({i, score});
  }
  std::sort(all.begin(), all.end(), pz::ranks_before);
  all.resize(std::min(k, all.size()));
  return all;
}

void same(const std::vector<pz::ScoredItem>& got, const std::vector<pz::ScoredItem>& want) {
  REQUIRE(got.size() == want.size());
  for (std::size_t r = 0; r < got.size(); ++r) {
    REQUIRE(got[r].item == want[r].item);
    REQUIRE(got[r].score == want[r].score);
  }
}

std::vector<float> random_query(small_model::Random& random, std::size_t d) {
  std::vector<float> query(pz::kernels::padded(d));
  for (std::size_t c = 0; c < d; ++c) query[c] = random.normal();
  return query;
}

}  // namespace

TEST_CASE("a score is the dot product with the dequantised row, plus the bias") {
  for (const bool int8 : {false, true}) {
    const auto model = small_model::model({.items = 67, .dimension = 45}, int8);
    const pz::Scorer scorer{*model};
    small_model::Random random{3};
    const auto query = random_query(random, 45);
    auto workspace = scorer.make_workspace();
    std::vector<std::uint32_t> items(67);
    std::iota(items.rbegin(), items.rend(), 0u);
    std::vector<float> together(67);
    scorer.score(query, items, workspace, together);
    for (std::uint32_t i = 0; i < 67; ++i) REQUIRE(together[i] == scorer.score(query, items[i]));
    for (std::uint32_t i = 0; i < 67; ++i) {
      double want = model->parts().biases[i];
      for (std::size_t c = 0; c < 45; ++c)
        want += static_cast<double>(query[c]) * model->parts().item_vectors.at(i, c);
      CHECK(scorer.score(query, i) == doctest::Approx(want).epsilon(1e-5));
    }
  }
}

TEST_CASE("top k is the head of a full sort") {
  small_model::Random random{11};
  for (const std::size_t items : {1u, 2u, 63u, 64u, 65u, 1000u, 5000u}) {
    for (const bool int8 : {false, true}) {
      const auto model = small_model::model({.items = items, .dimension = 20}, int8);
      const pz::Scorer scorer{*model};
      std::vector<pz::ScoredItem> top;
      for (const std::size_t k : {1u, 7u, 25u, 100u, 3000u, 6000u}) {
        CAPTURE(items);
        CAPTURE(k);
        const auto query = random_query(random, 20);
        top = top_k(scorer, query, k, {});
        same(top, full_sort(scorer, model->item_count(), query, k, {}));
        pz::ItemMask eligible(items), excluded(items);
        for (std::uint32_t i = 0; i < items; ++i) {
          if (random.below(3) > 0) eligible.set(i);
          if (random.below(5) == 0) excluded.set(i);
        }
        const pz::Eligibility eligibility{&eligible, &excluded};
        top = top_k(scorer, query, k, eligibility);
        same(top, full_sort(scorer, model->item_count(), query, k, eligibility));
      }
      top = top_k(scorer, random_query(random, 20), 0, {});
      CHECK(top.empty());
    }
  }
}

TEST_CASE("a few excluded items, the best or any, known how many or not, are exact as well") {
  small_model::Random random{29};
  for (const std::size_t items : {40u, 1000u, 20'000u}) {
    for (const bool int8 : {false, true}) {
      const auto model = small_model::model({.items = items, .dimension = 20}, int8);
      const pz::Scorer scorer{*model};
      auto workspace = scorer.make_workspace();
      for (const std::size_t k : {1u, 25u, 100u})
        for (const std::size_t count : {std::size_t{1}, k / 2, k, 2 * k}) {
          CAPTURE(items);
          CAPTURE(k);
          CAPTURE(count);
          const auto query = random_query(random, 20);
          const auto best = full_sort(scorer, items, query, count, {});
          pz::ItemMask first(items), any(items);
          for (const pz::ScoredItem& one : best) {
            first.set(one.item);
            any.set(random.below(static_cast<std::uint32_t>(items)));
          }
          std::vector<pz::Eligibility> filters{{}};
          for (const pz::ItemMask* excluded : {&first, &any})
            for (const std::size_t known : {count, count + 3, pz::Eligibility::unknown})
              filters.push_back({nullptr, excluded, known});
          std::vector<std::vector<pz::ScoredItem>> tops(filters.size());
          std::vector<pz::Scorer::Query> batch;
          for (std::size_t f = 0; f < filters.size(); ++f) {
            CAPTURE(f);
            same(top_k(scorer, query, k, filters[f]),
                 full_sort(scorer, items, query, k, filters[f]));
            batch.push_back({query, k, filters[f], &tops[f]});
          }
          scorer.top_k(batch, workspace);
          for (std::size_t f = 0; f < filters.size(); ++f)
            same(tops[f], full_sort(scorer, items, query, k, filters[f]));
        }
    }
  }
}

TEST_CASE("equal scores are ordered by item index") {
  pz::ModelParts parts = small_model::parts({.items = 700});
  std::fill(parts.biases.begin(), parts.biases.end(), 1.0f);
  std::ranges::fill(parts.item_vectors.f32(), 0.0f);
  const auto model = pz::Model::from_parts(parts);
  REQUIRE(model);
  const pz::Scorer scorer{**model};
  std::vector<pz::ScoredItem> top;
  small_model::Random random{2};
  top = top_k(scorer, random_query(random, 20), 300, {});
  REQUIRE(top.size() == 300);
  for (std::uint32_t r = 0; r < 300; ++r) CHECK(top[r].item == r);
  pz::ItemMask first(700);
  for (std::uint32_t i = 0; i < 50; ++i) first.set(i);
  top = top_k(scorer, random_query(random, 20), 60, {nullptr, &first, 50});
  REQUIRE(top.size() == 60);
  for (std::uint32_t r = 0; r < 60; ++r) CHECK(top[r].item == 50 + r);
}

TEST_CASE("rising scores, the worst case of a threshold, are exact as well") {
  pz::ModelParts parts = small_model::parts({.items = 3000});
  for (std::size_t i = 0; i < parts.biases.size(); ++i)
    parts.biases[i] = static_cast<float>(i) * 0.01f;
  std::ranges::fill(parts.item_vectors.f32(), 0.0f);
  const auto model = pz::Model::from_parts(parts);
  REQUIRE(model);
  const pz::Scorer scorer{**model};
  std::vector<pz::ScoredItem> top;
  small_model::Random random{2};
  top = top_k(scorer, random_query(random, 20), 10, {});
  REQUIRE(top.size() == 10);
  for (std::uint32_t r = 0; r < 10; ++r) CHECK(top[r].item == 2999 - r);
}

TEST_CASE("where items alike stand together, a sample of them misleads nobody") {
  // All norms are the same, so that the scan keeps the order of the items; 256 in a row hardly
  // differ. 300,000 x 64 is scanned in 4 bits. Some of those that match are in the sample.
  constexpr std::size_t d = 64, alike = 256, k = 100;
  for (const std::size_t items : {20'000u, 300'000u}) {
    CAPTURE(items);
    small_model::Random random{items};
    pz::Matrix vectors = pz::Matrix::zeros(items, d);
    std::vector<float> kind(d);
    for (std::size_t i = 0; i < items; ++i) {
      if (i % alike == 0)
        for (float& v : kind) v = random.below(2) == 0 ? -1.0f : 1.0f;
      for (std::size_t c = 0; c < d; ++c)
        vectors.f32()[i * d + c] = random.below(50) == 0 ? -kind[c] : kind[c];
    }
    vectors = vectors.quantised();
    const std::vector<float> biases(items);
    const pz::Scorer scorer(vectors, biases, 8.0f);
    pz::ItemMask excluded(items);
    for (std::uint32_t i = 0; i < items; ++i)
      if (random.below(5) == 0) excluded.set(i);
    std::vector<std::vector<float>> queries;
    std::vector<std::vector<pz::ScoredItem>> tops(18);
    std::vector<pz::Scorer::Query> batch;
    for (std::size_t q = 0; q < tops.size(); ++q) {
      queries.emplace_back(pz::kernels::padded(d));
      vectors.row((q * alike + random.below(alike)) % items, queries.back());
    }
    for (std::size_t q = 0; q < tops.size(); ++q)
      batch.push_back({queries[q], k, {nullptr, &excluded}, &tops[q]});
    auto workspace = scorer.make_workspace();
    scorer.top_k(batch, workspace);
    for (std::size_t q = 0; q < tops.size(); ++q) {
      CAPTURE(q);
      same(tops[q], top_k(scorer, queries[q], k, {nullptr, &excluded}));
      if (items < 100'000 || q >= 7)
        same(tops[q], full_sort(scorer, items, queries[q], k, {nullptr, &excluded}));
    }
  }
}

TEST_CASE("every element type, many bits of difference, both widths of the scan") {
  // 300,000 x 64 is scanned in 4 bits, the others in 8.
  for (const std::size_t items : {20'000u, 300'000u}) {
    small_model::Random random{items};
    pz::ItemMask excluded(items);
    for (std::uint32_t i = 0; i < items; ++i)
      if (random.below(3) == 0) excluded.set(i);
    for (const float spread : {0.0f, 1.5f}) {
      pz::Matrix vectors = pz::Matrix::zeros(items, 64);
      std::vector<float> biases(items);
      for (std::size_t i = 0; i < items; ++i) {
        // A few rows of zeros, a few huge ones, many alike.
        const float length = i % 1000 == 7   ? 0.0f
                             : i % 5000 == 3 ? 1e4f
                                             : std::exp(spread * random.symmetric());
        for (std::size_t c = 0; c < 64; ++c)
          vectors.f32()[i * 64 + c] = (i % 3 == 0 ? 0.5f : random.symmetric()) * length;
        biases[i] = random.symmetric();
      }
      for (const bool int8 : {true, false}) {
        const pz::Matrix stored = int8 ? vectors.quantised() : vectors;
        const pz::Scorer scorer{stored, biases, 8.0f};
        auto workspace = scorer.make_workspace();
        for (const float scale : {1e-6f, 1.0f, 1e6f}) {
          CAPTURE(items);
          CAPTURE(spread);
          CAPTURE(scale);
          auto query = random_query(random, 64);
          for (float& v : query) v *= scale;
          std::vector<std::uint32_t> all(items);
          std::iota(all.begin(), all.end(), 0u);
          std::vector<float> scores(items);
          scorer.score(query, all, workspace, scores);
          std::vector<pz::ScoredItem> sorted;
          const pz::Eligibility eligibility{nullptr, scale == 1.0f ? &excluded : nullptr};
          for (std::uint32_t i = 0; i < items; ++i)
            if (eligibility.test(i)) sorted.push_back({i, scores[i]});
          std::sort(sorted.begin(), sorted.end(), pz::ranks_before);
          sorted.resize(100);
          same(top_k(scorer, query, 100, eligibility), sorted);
        }
      }
    }
  }
}

namespace {

// The hidden states of users of the golden model after each event of golden/trained_histories.txt:
// a user a line, item and seconds since the event before.
std::vector<std::vector<float>> trained_queries(const pz::Model& model) {
  const pz::Encoder encoder{model};
  auto workspace = encoder.make_workspace();
  std::ifstream file("golden/trained_histories.txt");
  std::vector<std::vector<float>> queries;
  for (std::string line; std::getline(file, line);) {
    std::istringstream events(line);
    std::vector<float> state(encoder.state_size());
    std::string id;
    for (std::int64_t gap = 0; events >> id >> gap;) {
      const auto item = model.find_item(id);
      REQUIRE(item);
      const auto buckets = static_cast<std::uint32_t>(model.parts().time_gap_embedding.rows());
      encoder.step({*item, pz::no_event_type, pz::time_gap_bucket(0, gap, buckets)}, state,
                   workspace);
      const auto query = encoder.query(state);
      queries.emplace_back(query.begin(), query.end());
    }
  }
  return queries;
}

}  // namespace

// golden/trained.pzm: `personalize simulate --write-dataset data --users 500 --items 400 --days 30
// --seed 7`, items.csv without TITLE, then `personalize train --hidden-dimension 32 --feed-forward
// 1 --epochs 20 --threads 1 --seed 7`, stored without zstd for builds that have none; the histories
// are the last events of 44 of its users.
TEST_CASE("trained vectors and the hidden states of users are exact as well") {
  const auto model = pz::Model::load("golden/trained.pzm");
  REQUIRE(model);
  const pz::ModelParts& parts = (*model)->parts();
  const std::size_t trained = parts.item_vectors.rows(), d = parts.item_vectors.columns();
  const auto queries = trained_queries(**model);
  REQUIRE(queries.size() == 44 * 8);
  const pz::Scorer scorer{**model};
  for (std::size_t q = 0; q < queries.size(); ++q) {
    CAPTURE(q);
    for (const std::size_t k : {1u, 25u, 100u})
      same(top_k(scorer, queries[q], k), full_sort(scorer, trained, queries[q], k, {}));
  }
  // So many that the scan is in 4 bits: each row many times over, with a little noise.
  constexpr std::size_t items = 530'000;
  pz::Matrix many = pz::Matrix::zeros(items, d);
  std::vector<float> biases(items);
  small_model::Random random{4};
  for (std::size_t i = 0; i < items; ++i) {
    const std::size_t row = i % trained;
    parts.item_vectors.row(row, {many.f32().data() + i * d, d});
    for (std::size_t c = 0; c < d; ++c) many.f32()[i * d + c] += 0.02f * random.normal();
    biases[i] = parts.biases[row] + 0.02f * random.normal();
  }
  const pz::Matrix stored = many.quantised();
  const pz::Scorer large{stored, biases, pz::Scorer::usual_query_length(**model)};
  for (std::size_t q = 0; q < queries.size(); q += 88)
    same(top_k(large, queries[q], 100), full_sort(large, items, queries[q], 100, {}));
}

TEST_CASE("a batch gives each query what it gets alone") {
  // The second is scanned in 4 bits, the third ends at a different row for every query.
  for (const auto& [items, spread] :
       {std::pair<std::size_t, float>{3000, 0.3f}, std::pair<std::size_t, float>{270'000, 0.3f},
        std::pair<std::size_t, float>{20'000, 2.0f}}) {
    small_model::Random random{items};
    pz::Matrix vectors = pz::Matrix::zeros(items, 64);
    std::vector<float> biases(items);
    for (std::size_t i = 0; i < items; ++i) {
      const float length = std::exp(spread * random.symmetric());
      for (std::size_t c = 0; c < 64; ++c) vectors.f32()[i * 64 + c] = random.symmetric() * length;
      biases[i] = random.symmetric();
    }
    vectors = vectors.quantised();
    const pz::Scorer scorer{vectors, biases, 8.0f};
    pz::ItemMask half(items), few(items), excluded(items);
    for (std::uint32_t i = 0; i < items; ++i) {
      if (random.below(2) == 0) half.set(i);
      if (random.below(100) == 0) few.set(i);
      if (random.below(10) == 0) excluded.set(i);
    }
    std::vector<std::vector<float>> queries;
    std::vector<std::vector<pz::ScoredItem>> tops(140);  // more than go through a chunk together
    std::vector<pz::Scorer::Query> batch;
    for (std::size_t i = 0; i < tops.size(); ++i) {
      queries.push_back(random_query(random, 64));
      for (float& v : queries.back()) v *= i % 7 == 6 ? 0.0f : std::exp(random.symmetric());
      if (i == 20) queries.back()[5] = std::numeric_limits<float>::infinity();
    }
    for (std::size_t i = 0; i < tops.size(); ++i)
      batch.push_back({queries[i],
                       std::vector<std::size_t>{100, 1, 25, 0, 700}[i % 5],
                       {i % 3 == 0   ? nullptr
                        : i % 3 == 1 ? &half
                                     : &few,
                        i % 2 == 0 ? nullptr : &excluded},
                       &tops[i]});
    auto workspace = scorer.make_workspace();
    for (int twice = 0; twice < 2; ++twice) {
      scorer.top_k(batch, workspace);
      for (std::size_t i = 0; i < tops.size(); ++i) {
        CAPTURE(vectors.rows());
        CAPTURE(i);
        same(tops[i], top_k(scorer, queries[i], batch[i].k, batch[i].eligibility));
        if (twice == 0 && items < 100'000)
          same(tops[i],
               full_sort(scorer, vectors.rows(), queries[i], batch[i].k, batch[i].eligibility));
      }
    }
  }
}

TEST_CASE("a query that is zero, and one that is not finite") {
  const auto model = small_model::model({.items = 500, .dimension = 20}, true);
  const pz::Scorer scorer{*model};
  std::vector<float> query(pz::kernels::padded(20));
  same(top_k(scorer, query, 30), full_sort(scorer, model->item_count(), query, 30, {}));
  query[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(top_k(scorer, query, 30).empty());
}

TEST_CASE("a filter that leaves little is exact as well") {
  const auto model = small_model::model({.items = 5000, .dimension = 20}, true);
  const pz::Scorer scorer{*model};
  small_model::Random random{6};
  pz::ItemMask few(5000);
  for (const std::uint32_t item : {3u, 64u, 4999u, 2500u}) few.set(item);
  const auto query = random_query(random, 20);
  same(top_k(scorer, query, 3, {&few, nullptr}),
       full_sort(scorer, model->item_count(), query, 3, {&few, nullptr}));
}

TEST_CASE("masks") {
  pz::ItemMask mask(130, true);
  CHECK(mask.test(129));
  mask.reset(129);
  CHECK_FALSE(mask.test(129));
  mask.set(129);
  CHECK(mask.test(129));
  const auto model = small_model::model({.items = 130});
  const pz::Scorer scorer{*model};
  const pz::ItemMask none(130);
  std::vector<pz::ScoredItem> top;
  small_model::Random random{9};
  top = top_k(scorer, random_query(random, 20), 10, {&none, nullptr});
  CHECK(top.empty());
  // The bits behind the last item must not let anything in.
  top = top_k(scorer, random_query(random, 20), 200, {&mask, nullptr});
  CHECK(top.size() == 130);
}
