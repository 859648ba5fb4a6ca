// A model that takes on the order of other ids.
#include <doctest/doctest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;
using pz::detail::in_order;

namespace {

using Names = std::vector<std::string_view>;

// With an input vector of its own for each item, and users with a state.
pz::ModelParts full_parts(bool int8) {
  small_model::Random random{3};
  pz::ModelParts parts = small_model::parts({.items = 30, .dimension = 17, .hidden = 8});
  parts.input_vectors = small_model::random_matrix(random, 30, 17, 0.4f);
  REQUIRE(parts.user_ids.add("u"));
  parts.user_states = small_model::random_matrix(random, 1, 8 + 17, 0.2f);
  if (int8) {
    parts = small_model::quantised(std::move(parts));
    parts.input_vectors = parts.input_vectors.quantised();
  }
  return parts;
}

std::shared_ptr<const pz::Model> model_of(pz::ModelParts parts) {
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  return *model;
}

void check_same_row(const pz::Matrix& a, std::size_t row, const pz::Matrix& b, std::size_t other) {
  REQUIRE(a.type() == b.type());
  REQUIRE(a.columns() == b.columns());
  if (a.type() == pz::ElementType::i8) CHECK(a.scales()[row] == b.scales()[other]);
  for (std::size_t c = 0; c < a.columns(); ++c)
    REQUIRE(std::bit_cast<std::uint32_t>(a.at(row, c)) ==
            std::bit_cast<std::uint32_t>(b.at(other, c)));
}

void check_zero_row(const pz::Matrix& a, std::size_t row) {
  for (std::size_t c = 0; c < a.columns(); ++c)
    REQUIRE(std::bit_cast<std::uint32_t>(a.at(row, c)) == 0);
}

}  // namespace

TEST_CASE("a matrix gives the rows that are asked for, bit for bit, and zeros for no row") {
  small_model::Random random{7};
  const pz::Matrix f32 = small_model::random_matrix(random, 5, 9, 1);
  constexpr std::uint32_t none = pz::Matrix::no_row;
  const std::vector<std::uint32_t> rows{4, none, 0, 4, 2};
  for (const pz::Matrix& matrix : {f32, f32.quantised()}) {
    const pz::Matrix selected = matrix.select(rows);
    REQUIRE(selected.rows() == rows.size());
    for (std::size_t r = 0; r < rows.size(); ++r)
      if (rows[r] == none)
        check_zero_row(selected, r);
      else
        check_same_row(selected, r, matrix, rows[r]);
    CHECK(matrix.select(std::vector<std::uint32_t>{0, 1, 2, 3, 4}) == matrix);
    CHECK(matrix.select({}).empty());
    // What kernels load behind the last row is zero as in every matrix.
    pz::Matrix made = pz::Matrix::zeros(5, 9, matrix.type());
    CHECK(matrix.select(std::vector<std::uint32_t>(5, none)) == made);
  }
}

TEST_CASE("a model in another order has the rows of its ids, and zeros for ids that it lacks") {
  for (const bool int8 : {false, true}) {
    CAPTURE(int8);
    const auto model = model_of(full_parts(int8));
    const Names items{"new", "i7", "i0", "newer", "i29"}, types{"buy", "click"};
    const auto made = in_order(model, items, types);
    REQUIRE(made);
    const pz::ModelParts& from = model->parts();
    const pz::ModelParts& to = made->model->parts();
    CHECK(made->lacking == pz::Vector<std::uint32_t>{0, 3});
    REQUIRE(made->model->item_count() == 32);
    std::vector<std::string> ids(items.begin(), items.end());
    for (std::size_t i = 0; i < 30; ++i)
      if (i != 0 && i != 7 && i != 29) ids.push_back("i" + std::to_string(i));
    for (std::uint32_t i = 0; i < ids.size(); ++i) {
      CHECK(made->model->item_id(i) == ids[i]);
      const auto row = model->find_item(ids[i]);
      if (!row) {
        check_zero_row(to.item_vectors, i);
        check_zero_row(to.input_vectors, i);
        CHECK(to.biases[i] == 0);
        CHECK(to.statistics[i].interactions == 0);
        CHECK(to.statistics[i].first_timestamp == pz::no_timestamp);
        CHECK(to.statistics[i].last_timestamp == pz::no_timestamp);
        CHECK(to.statistics[i].creation_timestamp == pz::no_timestamp);
        continue;
      }
      check_same_row(to.item_vectors, i, from.item_vectors, *row);
      check_same_row(to.input_vectors, i, from.input_vectors, *row);
      CHECK(to.biases[i] == from.biases[*row]);
      CHECK(to.statistics[i].interactions == from.statistics[*row].interactions);
      CHECK(to.statistics[i].creation_timestamp == from.statistics[*row].creation_timestamp);
    }
    REQUIRE(to.event_types.size() == 3);
    CHECK(to.event_types[0] == "buy");
    CHECK(to.event_types[1] == "click");
    CHECK(to.event_types[2] == "view");
    check_zero_row(to.event_type_embedding, 0);
    check_same_row(to.event_type_embedding, 1, from.event_type_embedding, 1);
    check_same_row(to.event_type_embedding, 2, from.event_type_embedding, 0);
    // All else is the model's.
    CHECK(made->model->fingerprints() == model->fingerprints());
    CHECK(to.metadata == from.metadata);
    CHECK(to.time_gap_embedding == from.time_gap_embedding);
    CHECK(to.weights == from.weights);
    CHECK(to.operations.size() == from.operations.size());
    CHECK(to.user_ids[0] == "u");
    CHECK(to.user_states == from.user_states);
    REQUIRE(to.fields.size() == 2);
    CHECK(to.fields[0].vocabulary[1] == from.fields[0].vocabulary[1]);
    CHECK(to.fields[1].embedding == from.fields[1].embedding);
  }
}

TEST_CASE("in another order a model gives the same scores, bit for bit") {
  for (const bool int8 : {false, true}) {
    CAPTURE(int8);
    const auto model = model_of(full_parts(int8));
    std::vector<std::string> ids{"new"};
    for (int i = 29; i >= 0; i -= 2) ids.push_back("i" + std::to_string(i));
    const Names items(ids.begin(), ids.end());
    const auto made = in_order(model, items, Names{"more", "click", "view"});
    REQUIRE(made);
    const auto scores_of = [&](const std::shared_ptr<const pz::Model>& of) {
      auto shop = pz::Recommender::create(of, {.exploration_weight = 0});
      REQUIRE(shop);
      for (const char* item : {"i3", "i4", "i29", "i0"})
        for (const char* type : {"click", "view", ""})
          REQUIRE(shop->record(
              {.user = "u", .item = item, .event_type = type, .timestamp = 1'700'000'000}));
      Names known;
      for (std::uint32_t i = 0; i < model->item_count(); ++i) known.push_back(model->item_id(i));
      pz::Slate slate;
      REQUIRE(shop->rank({.user = "u"}, known, slate));
      std::vector<std::pair<std::string, std::uint32_t>> scores;
      for (const pz::Pick& pick : slate.items)
        scores.emplace_back(pick.item, std::bit_cast<std::uint32_t>(pick.score));
      REQUIRE(scores.size() == 30);
      return scores;
    };
    CHECK(scores_of(made->model) == scores_of(model));
  }
}

TEST_CASE("a model whose order is asked for already is given back as it is") {
  const auto model = model_of(full_parts(false));
  for (const Names& items : {Names{}, Names{"i0"}, Names{"i0", "i1", "i2"}})
    for (const Names& types : {Names{}, Names{"view"}, Names{"view", "click"}}) {
      const auto made = in_order(model, items, types);
      REQUIRE(made);
      CHECK(made->model == model);
      CHECK(made->lacking.empty());
    }
  const auto types = in_order(model, Names{"i0"}, Names{"click"});
  REQUIRE(types);
  CHECK(types->model != model);
  CHECK(types->lacking.empty());
  CHECK(types->model->parts().item_vectors == model->parts().item_vectors);
}

TEST_CASE("a model without event types gets rows of zeros for those that are asked for") {
  const auto model = small_model::model({.event_types = false});
  const auto made = in_order(model, Names{}, Names{"buy", "see"});
  REQUIRE(made);
  const pz::ModelParts& parts = made->model->parts();
  CHECK(parts.event_types.find("see") == 1);
  REQUIRE(parts.event_type_embedding.rows() == 2);
  CHECK(parts.event_type_embedding.type() == pz::ElementType::f32);
  for (std::size_t r = 0; r < 2; ++r) check_zero_row(parts.event_type_embedding, r);
  const auto none = in_order(model, Names{"i1"}, Names{});
  REQUIRE(none);
  CHECK(none->model->parts().event_type_embedding.empty());
}

TEST_CASE("an order in which a name stands twice, or is no id, is refused") {
  const auto model = small_model::model();
  const auto code_of = [&](const Names& items, const Names& types) {
    const auto made = in_order(model, items, types);
    REQUIRE_FALSE(made);
    return made.error().code;
  };
  CHECK(code_of({"i3", "i3"}, {}) == pz::Errc::corrupt);
  CHECK(code_of({"new", "new"}, {}) == pz::Errc::corrupt);
  CHECK(code_of({}, {"buy", "buy"}) == pz::Errc::corrupt);
  CHECK(code_of({"new\n"}, {}) == pz::Errc::invalid_argument);
}
