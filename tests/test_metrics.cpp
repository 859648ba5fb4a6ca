// The ranking metrics, and a whole evaluation, against direct computations.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/evaluate/evaluate.hpp"
#include "../tools/evaluate/metrics.hpp"
#include "../tools/recommend/known_items.hpp"
#include "refusal.hpp"
#include "small_model.hpp"
#include "strings.hpp"

namespace {

using namespace personalize::tools;
namespace pz = personalize;
using Strings = std::vector<std::string>;

// From the definitions, relevant item by relevant item.
SlateMetrics direct_metrics(const Strings& slate, const std::set<std::string>& relevant) {
  SlateMetrics m;
  std::vector<std::size_t> ranks;  // from 1
  for (const std::string& item : relevant) {
    const auto found = std::find(slate.begin(), slate.end(), item);
    if (found != slate.end()) ranks.push_back(static_cast<std::size_t>(found - slate.begin()) + 1);
  }
  for (std::size_t c = 0; c < 3; ++c) {
    const std::size_t k = std::array<std::size_t, 3>{5, 10, 25}[c];
    double hits = 0, dcg = 0, ideal = 0;
    for (const std::size_t rank : ranks) {
      if (rank > k) continue;
      hits += 1;
      dcg += std::log(2.0) / std::log(static_cast<double>(rank) + 1);
    }
    for (std::size_t rank = 1; rank <= k && rank <= relevant.size(); ++rank)
      ideal += std::log(2.0) / std::log(static_cast<double>(rank) + 1);
    m.ndcg[c] = dcg / ideal;
    m.precision[c] = hits / static_cast<double>(k);
    m.recall[c] = hits / static_cast<double>(relevant.size());
  }
  if (!ranks.empty()) {
    const std::size_t best = *std::min_element(ranks.begin(), ranks.end());
    if (best <= 25) m.reciprocal_rank = 1.0 / static_cast<double>(best);
  }
  return m;
}

void check_equal(const SlateMetrics& a, const SlateMetrics& b) {
  const auto near = [](double x, double y) { CHECK(std::abs(x - y) < 1e-12); };
  for (std::size_t c = 0; c < 3; ++c) {
    CAPTURE(SlateMetrics::cutoffs[c]);
    near(a.ndcg[c], b.ndcg[c]);
    near(a.precision[c], b.precision[c]);
    near(a.recall[c], b.recall[c]);
  }
  near(a.reciprocal_rank, b.reciprocal_rank);
}

SlateMetrics metrics_of(const Strings& slate, const std::set<std::string>& relevant) {
  const std::vector<std::string_view> items(slate.begin(), slate.end()),
      wanted(relevant.begin(), relevant.end());
  return slate_metrics(items, wanted);
}

// Users of the small model's items and event types, and of some that the model does not know.
Dataset random_events(std::size_t users, std::uint32_t items, std::uint64_t seed) {
  small_model::Random random{seed};
  Dataset data;
  for (std::uint32_t i = 0; i < items; ++i) REQUIRE(data.item_ids.add("i" + std::to_string(i)));
  REQUIRE(data.item_ids.add("unknown"));
  data.items.resize(data.item_ids.size());
  data.event_types = table_of({"buy", "click", "view"});
  for (std::size_t u = 0; u < users; ++u) {
    REQUIRE(data.user_ids.add("user" + std::to_string(u)));
    auto& history = data.histories.emplace_back();
    std::int64_t now = 1'600'000'000;
    // Skewed, so that users come back to items and that relevant items repeat.
    const bool only_unknown = u % 16 == 3;
    for (std::uint32_t n = 1 + random.below(60); n > 0; --n) {
      const std::uint32_t item =
          only_unknown ? items
                       : random.below(1 + random.below(static_cast<std::uint32_t>(items + 1)));
      history.push_back({item, random.below(3), now += random.below(100'000)});
    }
    data.interactions += history.size();
  }
  return data;
}

Evaluation direct_evaluation(const pz::Model& model, const Dataset& data,
                             const EvaluationOptions& options) {
  Evaluation result;
  std::set<std::string> covered;
  const pz::ModelParts& parts = model.parts();
  const pz::Encoder encoder(model);
  auto workspace = encoder.make_workspace();
  for (std::size_t u = 0; u < data.user_ids.size(); ++u) {
    const auto& history = data.histories[u];
    const UserSplit split =
        split_user(options.protocol, options.seed, data.user_ids[u], history.size());
    if (split.test_begin == history.size()) continue;

    std::vector<float> state(encoder.state_size(), 0.0f);
    std::vector<std::uint32_t> given;
    std::optional<std::int64_t> previous;
    for (std::size_t e = 0; e < split.test_begin; ++e) {
      const auto item = model.find_item(data.item_ids[history[e].item]);
      if (!item) continue;
      const auto gaps = static_cast<std::uint32_t>(parts.time_gap_embedding.rows());
      encoder.step({*item,
                    parts.event_types.find(data.event_types[history[e].event_type])
                        .value_or(pz::no_event_type),
                    pz::time_gap_bucket(previous, history[e].timestamp, gaps)},
                   state, workspace);
      previous = history[e].timestamp;
      given.push_back(*item);
    }

    std::set<std::uint32_t> excluded;
    for (std::size_t n = 0; n < given.size() && n < options.exclusion_window; ++n)
      excluded.insert(given[given.size() - 1 - n]);
    std::vector<std::pair<double, std::uint32_t>> ranking;  // negative score, item
    const auto query = encoder.query(state);
    for (std::uint32_t i = 0; i < model.item_count(); ++i) {
      if (excluded.contains(i)) continue;
      double score = parts.biases[i];
      for (std::size_t c = 0; c < model.dimension(); ++c)
        score += double{query[c]} * double{parts.item_vectors.at(i, c)};
      if (given.empty()) score = static_cast<double>(parts.statistics[i].interactions);
      ranking.push_back({-score, i});
    }
    std::sort(ranking.begin(), ranking.end());
    Strings slate;
    for (std::size_t r = 0; r < ranking.size() && r < 25; ++r)
      slate.emplace_back(model.item_id(ranking[r].second));
    std::set<std::string> relevant;
    for (std::size_t e = split.test_begin; e < history.size(); ++e)
      relevant.emplace(data.item_ids[history[e].item]);

    covered.insert(slate.begin(), slate.end());
    result.mean += direct_metrics(slate, relevant);
    result.users += 1;
    result.predicted_events += history.size() - split.test_begin;
  }
  result.mean = result.mean / static_cast<double>(result.users);
  result.coverage = static_cast<double>(covered.size()) / static_cast<double>(model.item_count());
  return result;
}

}  // namespace

TEST_CASE("a slate's figures, worked out by hand") {
  // Relevant items at ranks 2 and 6, and one that is not in the slate.
  const SlateMetrics m = metrics_of({"a", "B", "c", "d", "e", "F", "g"}, {"B", "F", "Z"});
  CHECK(m.precision == std::array{1 / 5.0, 2 / 10.0, 2 / 25.0});
  CHECK(m.recall == std::array{1 / 3.0, 2 / 3.0, 2 / 3.0});
  CHECK(m.reciprocal_rank == 0.5);
  const double ideal = 1 + 1 / std::log2(3.0) + 1 / 2.0;
  CHECK(m.ndcg[0] == doctest::Approx(1 / std::log2(3.0) / ideal));
  CHECK(m.ndcg[1] == doctest::Approx((1 / std::log2(3.0) + 1 / std::log2(7.0)) / ideal));
}

TEST_CASE("slate metrics equal a direct computation on random slates") {
  small_model::Random random{3};
  for (int round = 0; round < 3000; ++round) {
    const std::uint32_t catalogue = 5 + random.below(60);
    Strings slate;
    std::set<std::string> relevant;
    for (std::uint32_t i = 0; i < catalogue; ++i) slate.push_back(std::to_string(i));
    for (std::uint32_t i = catalogue; i > 1; --i) std::swap(slate[i - 1], slate[random.below(i)]);
    for (std::uint32_t n = 1 + random.below(40); n > 0; --n)
      relevant.insert(std::to_string(random.below(catalogue + 20)));
    // Also slates beyond 25, whose tail must not count.
    slate.resize(std::min<std::size_t>(random.below(40), slate.size()));
    CAPTURE(round);
    check_equal(metrics_of(slate, relevant), direct_metrics(slate, relevant));
  }
}

TEST_CASE("an evaluation equals a direct computation, with any number of threads") {
  for (const bool int8 : {false, true}) {
    const auto model = small_model::model({.items = 120, .dimension = 9, .hidden = 8}, int8);
    const Dataset data = random_events(250, 120, 9);
    for (const Protocol protocol : {Protocol::leave_one_out, Protocol::holdout})
      for (const std::uint32_t window : {0u, 3u, 200u}) {
        EvaluationOptions options{
            .protocol = protocol, .seed = 4, .exclusion_window = window, .threads = 1};
        CAPTURE(int8);
        CAPTURE(name(protocol));
        CAPTURE(window);
        const Evaluation one = evaluate(model, data, options);
        const Evaluation direct = direct_evaluation(*model, data, options);
        CHECK(one.users == direct.users);
        CHECK(one.users > 10);
        CHECK(one.predicted_events == direct.predicted_events);
        CHECK(one.coverage == direct.coverage);
        CHECK(one.mean.reciprocal_rank > 0);
        check_equal(one.mean, direct.mean);
        options.threads = 2;
        const Evaluation two = evaluate(model, data, options);
        CHECK(two.users == one.users);
        CHECK(two.predicted_events == one.predicted_events);
        CHECK(two.coverage == one.coverage);
        CHECK(two.mean.ndcg == one.mean.ndcg);
        CHECK(two.mean.precision == one.mean.precision);
        CHECK(two.mean.recall == one.mean.recall);
        CHECK(two.mean.reciprocal_rank == one.mean.reciprocal_rank);
      }
  }
}

TEST_CASE("a data set without event types is evaluated too") {
  const auto model = small_model::model({.items = 40});
  Dataset data = random_events(30, 40, 2);
  // Types that the model does not know, just as a missing one.
  data.event_types = table_of({"none", "nothing", "nil"});
  const Evaluation direct = direct_evaluation(*model, data, {});
  data.event_types = {};
  check_equal(evaluate(model, data, {}).mean, direct.mean);
}

TEST_CASE("an evaluation that cannot be done says why") {
  const auto model = small_model::model();
  Dataset data = random_events(5, 50, 1);
  CHECK_THROWS_WITH_AS(evaluate(model, data, {.exclusion_window = 65536}),
                       "RecommenderOptions::history_length is outside [1, 65535]", Failure);
  for (auto& history : data.histories) history.resize(1);
  CHECK_THROWS_WITH_AS(evaluate(model, data, {}),
                       "the protocol leaves no user to evaluate: histories are too short", Failure);
}

TEST_CASE("what of a file a model knows is counted, a file without any of it is refused") {
  const auto model = small_model::model({.items = 4});  // i0 to i3
  Dataset data;
  data.item_ids = table_of({"i0", "x", "i3", "y", "unused"});
  data.histories = {{{0, 0, 1}, {1, 0, 2}, {0, 0, 3}}, {{2, 0, 4}, {3, 0, 5}, {3, 0, 6}}};
  const auto all = known_items(data, data.histories, *model);
  CHECK(all.items == 4);
  CHECK(all.known_items == 2);
  CHECK(all.interactions == 6);
  CHECK(all.known_interactions == 3);
  const auto report = [&](const KnownItems& known) {
    return report_known(data, known, *model, "log.csv", "were left out");
  };
  CHECK(report(all) ==
        "2 of 4 items of log.csv are in the model; 3 of 6 interactions are with others and were "
        "left out");
  const auto first = known_items(data, std::span(data.histories).first(1), *model);
  CHECK(first.items == 2);
  CHECK(first.known_interactions == 2);
  data.histories[0].push_back({4, 0, 7});
  CHECK(report(known_items(data, data.histories, *model)) ==
        "warning: only 2 of 5 items of log.csv are in the model; there 'x', in the model 'i0'; 4 "
        "of 7 interactions are with others and were left out");
  data.histories = {{{0, 0, 1}, {2, 0, 2}}};
  CHECK_FALSE(report(known_items(data, data.histories, *model)));
  CHECK_FALSE(report(known_items(data, {}, *model)));  // nothing is not known of nothing
  data.histories = {{{1, 0, 1}, {3, 0, 2}}};
  CHECK(refusal([&] { report(known_items(data, data.histories, *model)); }) ==
        "0 of 2 items of log.csv are in the model; there 'x', in the model 'i0'; name the "
        "interactions of the model's own items");
}

TEST_CASE("a model and an evaluation that do not fit are told apart from those that do") {
  Dataset data;
  data.item_ids = table_of({"i0", "i1"});
  data.user_ids = table_of({"a", "b"});
  constexpr std::int64_t one_day = 86'400, begin = 18'518 * one_day;  // 2020-09-13
  data.histories = {{{0, 0, begin}, {1, 0, begin + 1}, {0, 0, begin + 2}},
                    {{0, 0, begin}, {1, 0, begin + one_day}, {0, 0, begin + 3 * one_day}}};
  data.interactions = 6;
  data.first_timestamp = begin;
  data.last_timestamp = begin + 3 * one_day;
  const auto told = [&](const std::string& metadata, const EvaluationOptions& options = {}) {
    pz::ModelParts parts = small_model::parts({.items = 2});
    parts.metadata = metadata;
    auto model = pz::Model::from_parts(std::move(parts));
    REQUIRE(model);
    return doubts(**model, data, options);
  };
  const auto metadata = [&](const std::string& protocol, std::int64_t interactions,
                            std::int64_t last) {
    return R"({"protocol":")" + protocol + R"(","seed":4,"data":{"users":2,"interactions":)" +
           std::to_string(interactions) + R"(,"first_timestamp":)" + std::to_string(begin) +
           R"(,"last_timestamp":)" + std::to_string(last) + "}}";
  };
  const std::int64_t end = begin + 3 * one_day;
  CHECK(told(metadata("leave-one-out", 6, end)).empty());
  CHECK(told(metadata("holdout", 6, end), {.protocol = Protocol::holdout, .seed = 4}).empty());

  const Strings other = told(metadata("leave-one-out", 6, end), {.protocol = Protocol::holdout});
  REQUIRE(other.size() == 1);
  CHECK(
      other[0].starts_with("the model was trained for --protocol leave-one-out: events that "
                           "holdout asks for taught it"));
  CHECK(told(metadata("holdout", 6, end)).at(0).find("--protocol holdout: ") != std::string::npos);
  CHECK(told(metadata("all", 6, end)).at(0).find("--protocol all: ") != std::string::npos);
  CHECK(told(metadata("holdout", 6, end), {.protocol = Protocol::holdout, .seed = 5})
            .at(0)
            .starts_with("the model was trained with --seed 4: most of the users that --seed 5"));
  for (const char* nothing : {"", "{}", "[1]", R"({"protocol":"x"})", R"({"protocol":3})"})
    CHECK(told(nothing).at(0).starts_with("the model file does not say what it was trained on"));

  // A model of later data, of other data, and one that ended before what it is to predict.
  const Strings later = told(metadata("leave-one-out", 9, end + one_day));
  REQUIRE(later.size() == 1);
  CHECK(later[0] ==
        "the model was trained on other interactions (9 of 2 users, 2020-09-13 to 2020-09-17) than "
        "these (6 of 2 users, 2020-09-13 to 2020-09-16); 2 of the events to predict are not later "
        "than all of those, and may be among them: the figures may be too good");
  CHECK(told(metadata("leave-one-out", 5, end)).at(0).find("; 2 of the events") !=
        std::string::npos);
  CHECK(told(metadata("leave-one-out", 5, begin + one_day)).at(0).find("; 1 of the events") !=
        std::string::npos);
  CHECK(told(metadata("leave-one-out", 5, begin + 1)).at(0).ends_with("to 2020-09-16)"));
  CHECK(told(metadata("holdout", 5, end)).size() == 2);
}
