// Exact top-k against a full sort of every score.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
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

TEST_CASE("a paged array that grows reads no more of its base than there is") {
  struct Counted {
    int* reads = nullptr;
    Counted() = default;
    explicit Counted(int& n) : reads(&n) {}
    Counted(const Counted& other) = default;
    Counted& operator=(const Counted& other) {
      reads = other.reads;
      if (reads) ++*reads;
      return *this;
    }
  };
  int reads = 0, behind = 0;
  const std::array<Counted, 3> base{Counted(reads), Counted(reads), Counted(behind)};
  pz::PagedArray<Counted> array(nullptr, std::span(base).first(2));
  array.push_back(Counted());
  CHECK(array.size() == 3);
  CHECK(reads == 2);
  CHECK(behind == 0);
}

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
          // Beside a mask without the best items, whose scores are no threshold then.
          pz::ItemMask others(items, true);
          for (const pz::ScoredItem& one :
               full_sort(scorer, items, query, std::min<std::size_t>(3 * k + 10, items / 2), {}))
            others.reset(one.item);
          filters.push_back({&others, &any, count});
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
  const pz::Scorer large{stored, biases, pz::usual_query_length(**model)};
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

TEST_CASE("rows that lose what a query asks for when they are quantised are found nevertheless") {
  // The query asks for small values beside a large one, which only some rows have exactly.
  constexpr std::size_t items = 700, d = 32;
  for (const bool int8 : {false, true})
    for (const std::size_t largest_8bit : {pz::Scorer::usual_largest_8bit, std::size_t{0}})
      for (const float usual_length : {0.0f, 1.0f, 50.0f}) {
        const bool bytes = largest_8bit != 0;
        if (int8 && bytes) continue;  // nothing is lost
        const float most = bytes ? 127.0f : 7.0f, step = int8 ? 18.0f : 1.0f;
        pz::Matrix vectors =
            pz::Matrix::zeros(items, d, int8 ? pz::ElementType::i8 : pz::ElementType::f32);
        std::vector<float> biases(items);
        for (std::size_t i = 0; i < items; ++i) {
          const bool lossy = i % 37 == 5;
          const float times = (lossy ? 3.0f : 1.0f) + 1e-3f * static_cast<float>(i % 11);
          const float small = lossy ? 0.45f : i % 2 == 0 ? 1.0f : 0.0f;
          if (int8) vectors.scales()[i] = times;
          for (std::size_t c = 0; c < d; ++c) {
            const float value = step * (c == 0 ? most : small);
            if (int8)
              vectors.i8()[i * d + c] = static_cast<std::int8_t>(value);
            else
              vectors.f32()[i * d + c] = times * value;
          }
        }
        const pz::Scorer scorer(pz::ItemRows({std::shared_ptr<const void>(), &vectors}),
                                pz::PagedArray<float>({}, biases), usual_length,
                                pz::kernels::chosen(), largest_8bit);
        for (const float length : {0.1f, 1.0f, 30.0f}) {
          std::vector<float> query(pz::kernels::padded(d));
          std::fill(query.begin() + 1, query.begin() + d, length);
          for (const std::size_t k : {1u, 10u, 40u})
            same(top_k(scorer, query, k), full_sort(scorer, items, query, k, {}));
        }
      }
}

TEST_CASE("a sample that promised more than there is leaves nothing out") {
  // 64 chunks of rows in the order of their number. The sample holds nearly all of the best;
  // elsewhere some rows may reach what it promised by what their bits do not show, and better ones
  // cannot.
  constexpr std::size_t chunk = 256, items = 64 * chunk, d = 32;
  pz::Matrix vectors = pz::Matrix::zeros(items, d);
  std::vector<float> biases(items);
  for (std::size_t i = 0; i < items; ++i) {
    const std::size_t row = i % chunk, of = i / chunk;
    const bool vague = of == 30 && row < 20;
    biases[i] = of == 4 && row < 9    ? 10.0f
                : vague               ? 9.0f + 1e-3f * static_cast<float>(row)
                : of == 40 && row < 5 ? 9.5f + 1e-3f * static_cast<float>(row)
                                      : 0.0f;
    float* const values = vectors.f32().data() + i * d;
    values[0] = 200.0f - 1e-3f * static_cast<float>(i) - biases[i];
    for (std::size_t c = 1; vague && c < d; ++c) values[c] = c % 2 == 0 ? 0.3f : -0.3f;
  }
  const pz::Scorer scorer(vectors, biases, 1.0f);
  std::vector<float> query(pz::kernels::padded(d));
  std::fill(query.begin() + 1, query.begin() + d, 1.0f);
  for (const std::size_t k : {8u, 9u, 10u, 12u, 20u})
    same(top_k(scorer, query, k), full_sort(scorer, items, query, k, {}));
}

TEST_CASE("the length of a row is never taken for less than it is") {
  small_model::Random random{15};
  for (int n = 0; n < 2000; ++n) {
    std::array<float, 21> row;
    std::array<std::int8_t, 21> bytes;
    long double squares = 0, of_bytes = 0;
    for (std::size_t c = 0; c < row.size(); ++c) {
      row[c] = random.normal();
      bytes[c] = static_cast<std::int8_t>(static_cast<int>(random.below(255)) - 127);
      squares += static_cast<long double>(row[c]) * static_cast<long double>(row[c]);
      of_bytes += static_cast<long double>(bytes[c] * bytes[c]);
    }
    const float scale = 0.1f + std::abs(random.normal());
    const double norm = pz::detail::norm_above(row.data(), scale, row.size());
    const double norm_of_bytes = pz::detail::norm_above(bytes.data(), scale, bytes.size());
    const long double exact = static_cast<long double>(scale) * std::sqrt(squares);
    const long double exact_of_bytes = static_cast<long double>(scale) * std::sqrt(of_bytes);
    REQUIRE(static_cast<long double>(norm) >= exact);
    REQUIRE(static_cast<long double>(norm) <= exact * 1.00001L);
    REQUIRE(static_cast<long double>(norm_of_bytes) >= exact_of_bytes);
    REQUIRE(static_cast<long double>(norm_of_bytes) <= exact_of_bytes * 1.00001L);
  }
}

TEST_CASE("biases that leave the products few bits are exact as well") {
  constexpr std::size_t items = 3000, d = 16;
  small_model::Random random{12};
  for (const std::size_t largest_8bit : {pz::Scorer::usual_largest_8bit, std::size_t{0}})
    for (const float large : {1e4f, 1e6f, -1e6f, 1e7f, -3e7f}) {
      const pz::Matrix vectors = small_model::random_matrix(random, items, d, 1.0f);
      std::vector<float> biases(items);
      for (float& bias : biases) bias = large + large * 1e-6f * random.normal();
      const pz::Scorer scorer(pz::ItemRows({std::shared_ptr<const void>(), &vectors}),
                              pz::PagedArray<float>({}, biases), 4.0f, pz::kernels::chosen(),
                              largest_8bit);
      for (int n = 0; n < 20; ++n) {
        const auto query = random_query(random, d);
        same(top_k(scorer, query, 50), full_sort(scorer, items, query, 50, {}));
      }
    }
}

TEST_CASE("a scorer takes the memory that its declaration states, and a change that of its pages") {
  constexpr std::size_t items = 20'480, d = 64;
  small_model::Random random{13};
  const pz::Matrix vectors = small_model::random_matrix(random, items, d, 1.0f);
  const std::vector<float> biases(items);
  const pz::ItemRows rows({std::shared_ptr<const void>(), &vectors});
  const pz::PagedArray<float> before({}, biases);
  for (const bool bytes : {true, false}) {
    const pz::Scorer scorer(rows, before, 0.0f, pz::kernels::chosen(),
                            bytes ? items * d : items * d - 1);
    CHECK(static_cast<double>(scorer.bytes()) ==
          doctest::Approx(items * (bytes ? d + 24 : d / 2 + 20)).epsilon(0.01));
    // Of a query without length the panels are in the order of the items: one a page is changed.
    using OfBytes = pz::PagedArray<float>;
    using OfHalves = pz::PagedArray<std::uint16_t>;
    const std::size_t step = bytes ? OfBytes::page_size : OfHalves::page_size;
    const std::size_t page = bytes ? step * sizeof(float) : step * sizeof(std::uint16_t);
    pz::PagedArray<float> after = before;
    std::vector<std::uint32_t> changed;
    for (std::size_t item = 0; item < items; item += step) {
      changed.push_back(static_cast<std::uint32_t>(item));
      after.edit(changed.back()) = 1;
    }
    const pz::Scorer other = scorer.changed(rows, after, changed);
    CHECK(static_cast<double>(other.bytes() - scorer.bytes()) ==
          doctest::Approx(static_cast<double>(changed.size() * page)).epsilon(0.1));
  }
}

TEST_CASE("the bits by which scores are sorted are in the order of the scores") {
  const std::vector<float> ascending{
      -std::numeric_limits<float>::infinity(), -1e30f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 1e30f,
      std::numeric_limits<float>::infinity()};
  for (std::size_t i = 1; i < ascending.size(); ++i)
    CHECK(pz::detail::ordered_bits(ascending[i - 1]) < pz::detail::ordered_bits(ascending[i]));
  CHECK(pz::detail::ordered_bits(-0.0f) == pz::detail::ordered_bits(0.0f));
}

TEST_CASE("how long queries usually are follows from a last layer norm, or from the dimension") {
  pz::ModelParts parts = small_model::parts({.dimension = 20, .hidden = 20});
  CHECK(pz::usual_query_length(*small_model::model()) == doctest::Approx(std::sqrt(20.0)));
  parts.operations.pop_back();  // a linear map behind the layer norm
  parts.weights.resize(parts.weights.size() - 2);
  double squares = 0;
  for (const pz::Matrix* row : {&parts.weights[parts.weights.size() - 2], &parts.weights.back()})
    for (const float v : row->f32()) squares += static_cast<double>(v) * static_cast<double>(v);
  const auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  CHECK(pz::usual_query_length(**model) == doctest::Approx(std::sqrt(squares)));
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
  // A mask of more items than there are.
  pz::ItemMask more = few;
  more.resize(9000);
  for (const std::uint32_t item : {5000u, 5063u, 5064u, 8999u}) REQUIRE(more.set(item));
  for (const std::size_t k : {3u, 100u})
    same(top_k(scorer, query, k, {&more, nullptr}), top_k(scorer, query, k, {&few, nullptr}));
}

TEST_CASE("masks") {
  pz::ItemMask mask(130, true);
  CHECK(mask.count() == 130);
  CHECK(mask.test(129));
  CHECK(mask.reset(129));
  CHECK(mask.reset(129));
  CHECK_FALSE(mask.test(129));
  CHECK(mask.count() == 129);
  CHECK(mask.set(129));
  CHECK(mask.set(129));
  CHECK(mask.test(129));
  CHECK(mask.count() == 130);
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

TEST_CASE("a mask knows nothing of items behind its last") {
  for (const std::size_t items : {0u, 1u, 63u, 64u, 65u}) {
    pz::ItemMask mask(items, true);
    const auto last = static_cast<std::uint32_t>(items);
    for (const std::uint32_t item : {last, last + 1, last + 64, ~0u}) {
      CHECK_FALSE(mask.set(item));
      CHECK_FALSE(mask.reset(item));
      CHECK_FALSE(mask.test(item));
    }
    CHECK(mask.count() == items);
    CHECK(mask.word(items / 64 + 1) == 0);
    mask.resize(items + 70);
    CHECK(mask.count() == items);
    CHECK_FALSE(mask.test(last));
    CHECK(mask.set(last));
    mask.resize(items);
    mask.resize(items + 70);
    CHECK(mask.count() == items);
    CHECK_FALSE(mask.test(last));
  }
}

TEST_CASE(
    "masks shorter than the catalogue: what they do not know is neither eligible nor excluded") {
  constexpr std::uint32_t items = 1000, known = 100;
  const auto model = small_model::model({.items = items, .dimension = 20}, true);
  const pz::Scorer scorer{*model};
  small_model::Random random{21};
  const pz::ItemMask eligible(known, true), few(known / 10, true), excluded(known, true);
  for (const std::size_t k : {5u, 2000u}) {
    const auto query = random_query(random, 20);
    std::vector<pz::ScoredItem> front, tenth, back;
    for (std::uint32_t i = 0; i < items; ++i) {
      const pz::ScoredItem one{i, scorer.score(query, i)};
      (i < known ? front : back).push_back(one);
      if (i < known / 10) tenth.push_back(one);
    }
    for (auto* all : {&front, &tenth, &back}) {
      std::sort(all->begin(), all->end(), pz::ranks_before);
      all->resize(std::min(k, all->size()));
    }
    same(top_k(scorer, query, k, {&eligible, nullptr}), front);
    same(top_k(scorer, query, k, {&few, nullptr}), tenth);
    same(top_k(scorer, query, k, {nullptr, &excluded}), back);
  }
}

TEST_CASE("a list of excluded items does what a mask of them does") {
  small_model::Random random{23};
  for (const std::size_t items : {40u, 1000u, 20'000u}) {
    const auto model = small_model::model({.items = items, .dimension = 20}, true);
    for (const std::size_t largest_8bit : {std::size_t{0}, pz::Scorer::usual_largest_8bit}) {
      const pz::Scorer scorer(pz::ItemRows({model, &model->parts().item_vectors}),
                              pz::PagedArray<float>(model, model->parts().biases), 5.0f,
                              pz::kernels::chosen(), largest_8bit);
      for (const std::size_t k : {1u, 25u, 100u})
        for (const std::size_t count : {std::size_t{0}, std::size_t{1}, k, 3 * k, items}) {
          CAPTURE(items);
          CAPTURE(k);
          CAPTURE(count);
          const auto query = random_query(random, 20);
          pz::ItemMask mask(items), eligible(items), other(items);
          std::vector<std::uint32_t> list;
          for (const pz::ScoredItem& best : full_sort(scorer, items, query, count, {}))
            mask.set(random.below(4) == 0 ? random.below(static_cast<std::uint32_t>(items))
                                          : best.item);
          for (std::uint32_t i = 0; i < items; ++i) {
            if (mask.test(i)) list.push_back(i);
            if (random.below(20) == 0) eligible.set(i);
            if (random.below(9) == 0) other.set(i);
          }
          for (const pz::ItemMask* only : {static_cast<const pz::ItemMask*>(nullptr),
                                           static_cast<const pz::ItemMask*>(&eligible)}) {
            const auto want = full_sort(scorer, items, query, k, {only, &mask});
            same(top_k(scorer, query, k, {.eligible = only, .excluded_items = list}), want);
          }
          pz::ItemMask both = other;
          for (const std::uint32_t item : list) both.set(item);
          same(top_k(scorer, query, k, {.excluded = &other, .excluded_items = list}),
               full_sort(scorer, items, query, k, {nullptr, &both}));
        }
    }
  }
}

namespace {

// What the kernels of `counting_table` did since `reset`.
struct Counts {
  std::size_t exact_rows = 0, panels = 0;
};
Counts counts;
pz::kernels::Table real_table = pz::kernels::chosen();

pz::kernels::Table counting_table() {
  pz::kernels::Table table = real_table;
  table.dots_f32 = [](auto... a) noexcept {
    counts.exact_rows += std::get<4>(std::tuple(a...));
    return real_table.dots_f32(a...);
  };
  table.dots_i8 = [](auto... a) noexcept {
    counts.exact_rows += std::get<4>(std::tuple(a...));
    return real_table.dots_i8(a...);
  };
  table.scan_8bit = [](const auto& rows, std::size_t first, std::size_t last, auto... a) noexcept {
    counts.panels += last - first;
    return real_table.scan_8bit(rows, first, last, a...);
  };
  return table;
}

}  // namespace

TEST_CASE("a scan gives few items exact scores, and a tight filter scans nothing") {
  constexpr std::size_t items = 20'000;
  const auto table = counting_table();
  for (const bool int8 : {false, true}) {
    const auto model = small_model::model({.items = items, .dimension = 20}, int8);
    const pz::Scorer scorer{*model, table};
    small_model::Random random{5};
    const auto query = random_query(random, 20);
    pz::ItemMask half(items), few(items);
    for (std::uint32_t i = 0; i < items; i += 2) half.set(i);
    for (std::uint32_t i = 0; i < items; i += 100) few.set(i);
    const pz::ItemMask* const everything = nullptr;
    for (const pz::ItemMask* eligible : {everything, static_cast<const pz::ItemMask*>(&half)}) {
      counts = {};
      same(top_k(scorer, query, 25, {eligible}), full_sort(scorer, items, query, 25, {eligible}));
      CHECK(counts.exact_rows < 500);
      CHECK(counts.panels >= items / pz::kernels::panel_rows / 2);
    }
    counts = {};
    pz::Scorer::Workspace unused;
    std::vector<pz::ScoredItem> top;
    scorer.top_k(query, 25, {&few}, unused, top);
    same(top, full_sort(scorer, items, query, 25, {&few}));
    CHECK(counts.exact_rows < 2 * few.count());
    CHECK(counts.panels == 0);
  }
}

TEST_CASE("where norms differ a scan ends early, also after the catalogue has changed many times") {
  constexpr std::size_t items = 20'000, d = 20;
  const auto table = counting_table();
  small_model::Random random{6};
  auto vectors = std::make_shared<pz::Matrix>(pz::Matrix::zeros(items, d));
  for (std::size_t i = 0; i < items; ++i) {
    const float length = std::exp(2 * random.symmetric());
    for (std::size_t c = 0; c < d; ++c) vectors->f32()[i * d + c] = random.symmetric() * length;
  }
  pz::ItemRows rows{std::make_shared<const pz::Matrix>(vectors->quantised())};
  pz::PagedArray<float> biases;
  for (std::size_t i = 0; i < items; ++i) biases.push_back(0);
  pz::Scorer scorer{rows, biases, 4.0f, table};
  const auto panels_scanned = [&] {
    small_model::Random queries{1};
    counts = {};
    for (int q = 0; q < 20; ++q) (void)top_k(scorer, random_query(queries, d), 25);
    return counts.panels;
  };
  const std::size_t before = panels_scanned();
  CHECK(before < 20 * items / pz::kernels::panel_rows / 2);
  std::vector<float> row(d);
  for (int change = 0; change < 700; ++change) {
    const auto item = random.below(items);
    scorer.rows().row(item, row);
    pz::ItemRows more = scorer.rows();
    pz::PagedArray<float> other = scorer.biases();
    more.push_back(row);
    other.push_back(0);
    const auto biased = random.below(items);
    other.edit(biased) = random.symmetric() * 0.1f;
    scorer = scorer.changed(std::move(more), std::move(other), {&biased, 1});
  }
  CHECK(panels_scanned() < before + before / 4);
}

TEST_CASE("rows of items: copies share pages, and no change to one is seen by another") {
  constexpr std::size_t d = 5, page = pz::ItemRows::page_rows;
  small_model::Random random{31};
  for (const bool int8 : {false, true}) {
    CAPTURE(int8);
    const std::size_t items = 2 * page + 3;
    const auto made = small_model::random_matrix(random, items, d, 1.0f);
    const auto base = std::make_shared<const pz::Matrix>(int8 ? made.quantised() : made);
    const auto at = [&](const pz::ItemRows& rows, std::size_t r) { return rows.stored(r).data(); };
    const auto holds = [&](const pz::ItemRows& rows, std::size_t r, const pz::Matrix& matrix,
                           std::size_t m) {
      std::vector<float> got(d), want(d);
      rows.row(r, got);
      matrix.row(m, want);
      for (std::size_t c = 0; c < d; ++c) CHECK(rows.at(r, c) == want[c]);
      return got == want && rows.scale(r) == (int8 ? matrix.scales()[m] : 1.0f);
    };
    const pz::ItemRows first{base};
    REQUIRE(first.rows() == items);
    for (const std::size_t r : {std::size_t{0}, page, items - 1}) CHECK(holds(first, r, *base, r));

    pz::ItemRows second = first;
    pz::Matrix other = pz::Matrix::zeros(1, d, base->type());
    const std::vector<float> values{1.5f, -2, 0, 0.25f, 7};
    other.set_row(0, values);
    second.set_row(1, values);
    CHECK(holds(second, 1, other, 0));
    CHECK(holds(second, 0, *base, 0));
    CHECK(holds(first, 1, *base, 1));
    CHECK(at(second, page) == at(first, page));
    const std::size_t bytes_a_page = page * (int8 ? d + sizeof(float) : d * sizeof(float));
    CHECK(second.bytes() >= first.bytes() + bytes_a_page);
    CHECK(second.bytes() <= first.bytes() + bytes_a_page + 300);

    // What was copied is not written to again, by either.
    pz::ItemRows third = second;
    CHECK(third.bytes() == second.bytes());
    CHECK(third.bytes(&second) == first.bytes());
    const std::vector<float> zeros(d);
    second.set_row(1, zeros);
    CHECK(holds(third, 1, other, 0));
    third.set_row(0, zeros);
    CHECK(holds(second, 0, *base, 0));

    for (std::size_t added = 0; added < 2 * page; ++added) second.push_back(values);
    REQUIRE(second.rows() == items + 2 * page);
    CHECK(holds(second, items, other, 0));
    CHECK(holds(second, items + 2 * page - 1, other, 0));
    CHECK(holds(second, items - 1, *base, items - 1));
    CHECK(at(second, page + 1) == at(first, page + 1));
    CHECK(third.rows() == items);
    CHECK(holds(third, items - 1, *base, items - 1));

    const pz::ItemRows moved = std::move(second);
    CHECK(moved.rows() == items + 2 * page);
    CHECK(holds(moved, items, other, 0));
  }
}

TEST_CASE("a workspace fits every scorer, whichever it was used with before") {
  pz::Scorer::Workspace workspace;
  small_model::Random random{17};
  std::vector<pz::ScoredItem> top;
  for (const std::size_t d : {20u, 5u, 45u}) {
    const auto model = small_model::model({.items = 2000, .dimension = d}, true);
    for (const std::size_t largest_8bit : {pz::Scorer::usual_largest_8bit, std::size_t{0}}) {
      const pz::Scorer scorer(pz::ItemRows({model, &model->parts().item_vectors}),
                              pz::PagedArray<float>(model, model->parts().biases), 5.0f,
                              pz::kernels::chosen(), largest_8bit);
      for (const std::size_t k : {25u, 300u}) {
        const auto query = random_query(random, d);
        scorer.top_k(query, k, {}, workspace, top);
        same(top, full_sort(scorer, 2000, query, k, {}));
        const std::vector<std::uint32_t> items{7, 1999};
        std::vector<float> scores(2);
        scorer.score(query, items, workspace, scores);
        CHECK(scores[1] == scorer.score(query, 1999));
      }
    }
  }
}

TEST_CASE("what was removed, and what has no finite score, never ranks") {
  constexpr std::uint32_t items = 600;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  pz::Matrix vectors = pz::Matrix::zeros(items, 20);
  small_model::Random random{41};
  for (float& v : vectors.f32()) v = random.normal();
  std::vector<float> biases(items);
  biases[1] = std::numeric_limits<float>::quiet_NaN();
  biases[2] = infinity;
  biases[3] = -infinity;
  const auto check = [&](std::size_t ranked) {
    const pz::Scorer scorer{vectors, biases, 4.0f};
    const auto query = random_query(random, 20);
    const auto top = top_k(scorer, query, items);
    same(top, full_sort(scorer, items, query, items, {}));
    CHECK(top.size() == ranked);
    for (const pz::ScoredItem& one : top) CHECK(std::isfinite(one.score));
    CHECK(std::isnan(scorer.score(query, 1)));
  };
  check(items - 3);
  vectors.f32()[4 * 20 + 7] = std::numeric_limits<float>::quiet_NaN();
  vectors.f32()[5 * 20 + 7] = infinity;
  check(items - 5);
  std::fill(biases.begin(), biases.end(), std::numeric_limits<float>::quiet_NaN());
  check(0);
}

TEST_CASE("a row whose length f32 cannot hold still ranks where its scores are finite") {
  pz::Matrix vectors = pz::Matrix::zeros(600, 20);
  small_model::Random random{43};
  for (float& v : vectors.f32()) v = random.normal();
  for (std::size_t c = 0; c < 20; ++c) vectors.f32()[9 * 20 + c] = 3e38f;
  const std::vector<float> biases(600);
  const pz::Scorer scorer{vectors, biases, 4.0f};
  std::vector<float> query(pz::kernels::padded(20));
  query[0] = 0.5f;
  const auto top = top_k(scorer, query, 10);
  same(top, full_sort(scorer, 600, query, 10, {}));
  CHECK(top[0].item == 9);
}

namespace {

// A catalogue and how it is changed at random, with what it should hold beside it.
struct Changing {
  Changing(std::uint64_t seed, std::size_t items, std::size_t columns, bool int8, float spread_of)
      : random(seed), d(columns), spread(spread_of) {
    mirror = pz::Matrix::zeros(items, d, int8 ? pz::ElementType::i8 : pz::ElementType::f32);
    for (std::size_t i = 0; i < items; ++i) {
      mirror.set_row(i, row());
      wanted.push_back(bias());
    }
    rows = pz::ItemRows{std::make_shared<const pz::Matrix>(mirror)};
    for (const float b : wanted) biases.push_back(b);
  }

  std::vector<float> row() {
    std::vector<float> values(d);
    const float length = std::exp(spread * random.symmetric());
    for (float& v : values) v = random.symmetric() * length;
    // Some that f32 cannot bound, some alike.
    if (random.below(400) == 0 && mirror.type() == pz::ElementType::f32) values[0] = 3e38f;
    if (random.below(20) == 0) std::fill(values.begin(), values.end(), 0.25f);
    return values;
  }
  float bias() {
    return random.below(12) == 0 ? std::numeric_limits<float>::quiet_NaN() : random.symmetric();
  }

  // n items get another bias, another row, or both; some become what they are.
  std::vector<std::uint32_t> change(std::size_t n) {
    biases = pz::PagedArray<float>(biases);  // the scorer has the pages that were there
    std::vector<std::uint32_t> items;
    for (std::size_t i = 0; i < n; ++i)
      items.push_back(random.below(static_cast<std::uint32_t>(mirror.rows())));
    std::sort(items.begin(), items.end());
    items.erase(std::unique(items.begin(), items.end()), items.end());
    for (const std::uint32_t item : items) {
      const auto kind = random.below(4);
      if (kind != 0) wanted[item] = biases.edit(item) = bias();
      if (kind >= 2) {
        const auto values = row();
        rows.set_row(item, values);
        mirror.set_row(item, values);
      }
    }
    return items;
  }
  void add(std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      const auto values = row();
      rows.push_back(values);
      mirror.resize_rows(mirror.rows() + 1);
      mirror.set_row(mirror.rows() - 1, values);
      wanted.push_back(bias());
      biases.push_back(wanted.back());
    }
  }

  small_model::Random random;
  std::size_t d;
  float spread;
  pz::ItemRows rows;
  pz::PagedArray<float> biases;
  pz::Matrix mirror;
  std::vector<float> wanted;
};

}  // namespace

TEST_CASE("a scorer of a changed catalogue answers as one made of it, and older ones as before") {
  struct Answer {
    pz::Scorer scorer;
    std::vector<float> query;
    std::vector<pz::ScoredItem> top;
  };
  constexpr std::size_t d = 20, items = 3000;
  // All in 8 bits, all in 4, and across the border on the way.
  for (const std::size_t largest_8bit : {2 * items * d, std::size_t{0}, (items + 150) * d})
    for (const bool int8 : {true, false})
      for (const float spread : {0.0f, 2.0f}) {
        CAPTURE(largest_8bit);
        CAPTURE(int8);
        CAPTURE(spread);
        Changing catalogue(largest_8bit + int8, items, d, int8, spread);
        small_model::Random random{largest_8bit + 3};
        pz::Scorer scorer(catalogue.rows, catalogue.biases, 4.0f, pz::kernels::chosen(),
                          largest_8bit);
        pz::Scorer::Workspace workspace;
        std::vector<Answer> older;
        for (int generation = 0; generation < 60; ++generation) {
          CAPTURE(generation);
          // Mostly a few; now and then so many that parts are made anew, or all.
          const std::size_t few = random.below(6), some = random.below(150);
          const auto changed = catalogue.change(generation % 10 == 9    ? some
                                                : generation % 25 == 24 ? 3 * items
                                                                        : few);
          catalogue.add(generation % 7 == 6 ? some / 2 : random.below(3));
          scorer = scorer.changed(catalogue.rows, catalogue.biases, changed);
          const std::size_t count = catalogue.mirror.rows();
          const pz::Scorer plain(catalogue.mirror, catalogue.wanted, 4.0f);
          const auto query = random_query(random, d);
          pz::ItemMask excluded(count);
          for (std::size_t i = 0; i < count / 3; ++i)
            excluded.set(random.below(static_cast<std::uint32_t>(count)));
          for (const std::size_t k : {std::size_t{1}, std::size_t{25}, 2 * items})
            for (const pz::Eligibility& which : {pz::Eligibility{}, {nullptr, &excluded}}) {
              std::vector<pz::ScoredItem> top;
              scorer.top_k(query, k, which, workspace, top);
              same(top, full_sort(plain, count, query, k, which));
            }
          if (generation % 6 == 0) older.push_back({scorer, query, top_k(scorer, query, 40)});
        }
        for (const Answer& then : older) same(top_k(then.scorer, then.query, 40), then.top);
      }
}

TEST_CASE("a catalogue that grows from nothing, item by item, and is then removed") {
  constexpr std::size_t d = 7;
  pz::ItemRows rows{std::make_shared<const pz::Matrix>(pz::Matrix::zeros(0, d))};
  pz::PagedArray<float> biases;
  pz::Scorer scorer(rows, biases, 3.0f);
  small_model::Random random{51};
  const auto query = random_query(random, d);
  CHECK(top_k(scorer, query, 10).empty());
  for (std::uint32_t i = 0; i < 400; ++i) {
    const auto row = random_query(random, d);
    rows.push_back(std::span(row).first(d));
    biases = pz::PagedArray<float>(biases);
    biases.push_back(random.symmetric());
    scorer = scorer.changed(rows, biases, {});
    if (i % 13 == 0) same(top_k(scorer, query, 10), full_sort(scorer, i + 1, query, 10, {}));
  }
  for (std::uint32_t i = 0; i < 400; ++i) {
    biases = pz::PagedArray<float>(biases);
    biases.edit(i) = std::numeric_limits<float>::quiet_NaN();
    scorer = scorer.changed(rows, biases, {&i, 1});
    if (i % 13 == 0) same(top_k(scorer, query, 10), full_sort(scorer, 400, query, 10, {}));
  }
  CHECK(top_k(scorer, query, 10).empty());
}
