// What stays and what goes when a recommender goes on with another model.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "small_model.hpp"

// Of its own: several test files are compiled as one.
namespace swap_tests {

namespace pz = personalize;

namespace {

constexpr std::int64_t day = 86'400;
constexpr std::int64_t now = 1'700'000'000;

using ModelPointer = std::shared_ptr<const pz::Model>;

// No automatic updates, and a clock that stands at `now`, unless told otherwise.
pz::RecommenderOptions usual(pz::RecommenderOptions options = {.exploration_weight = 0}) {
  options.update_interval = {};
  if (!options.clock) options.clock = [] { return now; };
  options.recommendation_key = {{1, 2}};
  return options;
}

pz::Recommender make(const ModelPointer& model, const pz::RecommenderOptions& options = usual()) {
  auto shop = pz::Recommender::create(model, options);
  REQUIRE(shop);
  return std::move(*shop);
}

ModelPointer model_of(pz::ModelParts parts) {
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE_MESSAGE(model, (model ? "" : model.error().message));
  return *model;
}

pz::SwapReport swap(pz::Recommender& shop, const ModelPointer& model) {
  const auto report = shop.swap(model);
  REQUIRE_MESSAGE(report, (report ? "" : report.error().message));
  return *report;
}

struct Event {
  std::string_view item, type = {};
  std::int64_t timestamp = now;
};

pz::Recorded learn(pz::Recommender& shop, std::string_view user, const Event& event,
                   std::string_view session = {}) {
  const auto recorded = shop.record({.user = user,
                                     .session = session,
                                     .item = event.item,
                                     .event_type = event.type,
                                     .timestamp = event.timestamp});
  REQUIRE(recorded);
  return *recorded;
}

// A slate, bit for bit.
struct Line {
  std::string item;
  std::uint32_t score, propensity;
  pz::Reason reason;
  friend bool operator==(const Line&, const Line&) = default;
};
std::vector<Line> lines_of(const pz::Slate& slate) {
  std::vector<Line> lines;
  for (const pz::Pick& pick : slate.items)
    lines.push_back({std::string(pick.item), std::bit_cast<std::uint32_t>(pick.score),
                     std::bit_cast<std::uint32_t>(pick.propensity), pick.reason});
  return lines;
}
std::vector<Line> slate_of(pz::Recommender& shop, const pz::Request& request) {
  const auto slate = shop.recommend(request);
  REQUIRE(slate);
  return lines_of(*slate);
}
std::vector<Line> ranking_of(pz::Recommender& shop, std::string_view user,
                             std::string_view session = {}, bool exclude = false) {
  return slate_of(shop, {.user = user,
                         .session = session,
                         .count = 1000,
                         .exclude_interacted = exclude,
                         .timestamp = now});
}
bool holds(const std::vector<Line>& lines, std::string_view item) {
  return std::any_of(lines.begin(), lines.end(), [&](const Line& l) { return l.item == item; });
}

pz::Explanation explained(const pz::Recommender& shop, std::string_view user,
                          std::string_view item) {
  const auto parts = shop.explain({.user = user}, item);
  REQUIRE(parts);
  return *parts;
}
void check_same(const pz::Explanation& a, const pz::Explanation& b) {
  CHECK(std::bit_cast<std::uint32_t>(a.score) == std::bit_cast<std::uint32_t>(b.score));
  CHECK(std::bit_cast<std::uint32_t>(a.relevance) == std::bit_cast<std::uint32_t>(b.relevance));
  CHECK(std::bit_cast<std::uint32_t>(a.quality) == std::bit_cast<std::uint32_t>(b.quality));
  CHECK(std::bit_cast<std::uint32_t>(a.taste) == std::bit_cast<std::uint32_t>(b.taste));
  CHECK(std::bit_cast<std::uint32_t>(a.discount) == std::bit_cast<std::uint32_t>(b.discount));
  CHECK(std::bit_cast<std::uint32_t>(a.uncertainty) == std::bit_cast<std::uint32_t>(b.uncertainty));
  CHECK(a.positive == b.positive);
  CHECK(a.expected == b.expected);
  CHECK(a.age == b.age);
  CHECK(a.explorable == b.explorable);
}

// The parts with these rows of items, in this order.
pz::ModelParts chosen(pz::ModelParts parts, const std::vector<std::uint32_t>& rows) {
  pz::ModelParts next = parts;
  next.fingerprints.reset();
  next.item_ids = {};
  next.biases.clear();
  next.statistics.clear();
  for (const std::uint32_t row : rows) {
    REQUIRE(next.item_ids.add(parts.item_ids[row]));
    next.biases.push_back(parts.biases[row]);
    next.statistics.push_back(parts.statistics[row]);
  }
  next.item_vectors = parts.item_vectors.select(rows);
  if (!parts.input_vectors.empty()) next.input_vectors = parts.input_vectors.select(rows);
  return next;
}
template <class Wanted>
pz::ModelParts only(pz::ModelParts parts, Wanted wanted) {
  std::vector<std::uint32_t> rows;
  for (std::uint32_t i = 0; i < parts.item_ids.size(); ++i)
    if (wanted(parts.item_ids[i])) rows.push_back(i);
  return chosen(std::move(parts), rows);
}
pz::ModelParts without(pz::ModelParts parts, std::string_view id) {
  return only(std::move(parts), [&](std::string_view other) { return other != id; });
}
pz::ModelParts reversed(pz::ModelParts parts) {
  std::vector<std::uint32_t> rows(parts.item_ids.size());
  std::iota(rows.rbegin(), rows.rend(), 0u);
  return chosen(std::move(parts), rows);
}
// With these event types, each with a vector of its own.
pz::ModelParts typed(pz::ModelParts parts, const std::vector<std::string>& types) {
  small_model::Random random{99};
  parts.event_types = {};
  for (const std::string& type : types) REQUIRE(parts.event_types.add(type));
  parts.event_type_embedding =
      types.empty()
          ? pz::Matrix{}
          : small_model::random_matrix(random, types.size(), parts.inputs().columns(), 0.3f);
  return parts;
}
// One GRU, and nothing else.
pz::ModelParts plain(const small_model::Shape& shape) {
  using Kind = pz::EncoderOp::Kind;
  small_model::Random random{shape.seed + 100};
  pz::ModelParts parts = small_model::parts(shape);
  const std::size_t d = shape.dimension, h = shape.hidden;
  parts.operations = {{Kind::embed_sum}, {Kind::gru}, {Kind::linear}};
  parts.weights.clear();
  for (const auto& [rows, columns] : std::vector<std::pair<std::size_t, std::size_t>>{
           {3 * h, d}, {3 * h, h}, {1, 3 * h}, {1, 3 * h}, {d, h}, {1, d}})
    parts.weights.push_back(small_model::random_matrix(random, rows, columns, 0.3f));
  return parts;
}
pz::ModelParts with_inputs(pz::ModelParts parts) {
  small_model::Random random{5};
  parts.input_vectors =
      small_model::random_matrix(random, parts.item_ids.size(), parts.item_vectors.columns(), 0.4f);
  return parts;
}
pz::ModelParts with_user(pz::ModelParts parts, std::string_view user, std::size_t hidden) {
  small_model::Random random{8};
  REQUIRE(parts.user_ids.add(user));
  parts.user_states =
      small_model::random_matrix(random, 1, hidden + parts.item_vectors.columns(), 0.5f);
  return parts;
}

struct Named {
  const char* name;
  pz::ModelParts parts;
};
// Models that follow on small_model::parts().
std::vector<Named> successors() {
  using small_model::parts;
  std::vector<Named> all;
  const auto add = [&](const char* name, pz::ModelParts made) {
    all.push_back({name, std::move(made)});
  };
  add("trained again", parts({.seed = 2}));
  add("permuted", reversed(parts({.seed = 2})));
  add("a third of the items is missing",
      only(parts({.seed = 2}), [](std::string_view id) { return (id.back() - '0') % 3 != 0; }));
  add("new items", parts({.items = 77, .seed = 2}));
  add("new items, permuted", reversed(parts({.items = 77, .seed = 2})));
  add("fewer dimensions", parts({.dimension = 17, .seed = 2}));
  add("more dimensions", parts({.dimension = 45, .seed = 2}));
  add("smaller states", parts({.hidden = 7, .seed = 2}));
  add("larger states", parts({.hidden = 50, .seed = 2}));
  add("another program", plain({.seed = 2}));
  add("event types permuted, and a new one", typed(parts({.seed = 2}), {"buy", "click", "view"}));
  add("an event type is missing", typed(parts({.seed = 2}), {"click"}));
  add("no event types", parts({.event_types = false, .seed = 2}));
  add("no time gaps", parts({.time_gaps = false, .seed = 2}));
  add("input vectors", with_inputs(parts({.seed = 2})));
  add("int8", small_model::quantised(parts({.seed = 2})));
  add("a bit of all",
      small_model::quantised(typed(
          only(reversed(with_inputs(plain({.items = 66, .dimension = 33, .hidden = 9, .seed = 3}))),
               [](std::string_view id) { return id.back() != '4'; }),
          {"buy", "click"})));
  return all;
}

// Of a user, on items that all successors have, and on some that one or the other lacks.
const std::vector<Event> usual_events{
    {"i7", "view", now - 9 * day},         {"i3", "click", now - 8 * day},
    {"i14", "click", now - 8 * day + 100}, {"i25", "", now - 5 * day},
    {"i7", "click", now - 5 * day + 3},    {"i41", "view", now - day}};

// What a recommender that never knew another model makes of these events.
std::vector<Line> fresh_ranking(const ModelPointer& model, const std::vector<Event>& events,
                                std::string_view user = "u", bool exclude = false) {
  auto fresh = make(model);
  for (const Event& event : events) learn(fresh, user, event);
  return ranking_of(fresh, user, {}, exclude);
}

}  // namespace

// ----------------------------------------------------------------------------- the same model

TEST_CASE("swapping to the same model changes nothing that anyone sees") {
  for (const bool same_object : {true, false}) {
    CAPTURE(same_object);
    auto parts = with_user(small_model::parts(), "stored", 24);
    parts.statistics[49] = {};  // new: nobody knows since when
    parts.statistics[48] = {0, pz::no_timestamp, pz::no_timestamp, now - day};
    const auto model = model_of(parts);
    std::int64_t clock = now;
    const auto options = usual({.exploration_weight = 0.5f, .clock = [&clock] { return clock; }});
    auto shop = make(model, options), twin = make(model, options);
    const auto both = [&](auto call) {
      call(shop);
      call(twin);
    };
    pz::Slate before, before_of_twin;
    both([&](pz::Recommender& r) {
      for (const char* user : {"u", "v", "w"})
        for (const Event& event : usual_events) learn(r, user, event);
      learn(r, "w", {"i49"});
      learn(r, {}, {"i12"}, "visitor");
      REQUIRE(r.update(clock));
    });
    clock += 3 * day;
    both([&](pz::Recommender& r) {
      for (int n = 0; n < 30; ++n)
        for (const char* user : {"u", "v"}) {
          const auto slate = r.recommend({.user = user, .count = 10});
          REQUIRE(slate);
          REQUIRE(r.record({.user = user,
                            .item = slate->items[static_cast<std::size_t>(n) % 3].item,
                            .event_type = "click",
                            .recommendation_id = slate->id,
                            .event_id = "event " + std::to_string(n)}));
        }
      pz::Slate& last = &r == &shop ? before : before_of_twin;
      REQUIRE(r.recommend({.user = "u", .count = 10}, last));
    });
    REQUIRE(twin.update());
    const auto report = swap(shop, same_object ? model : model_of(parts));
    CHECK(report.states_kept);
    CHECK(report.sums_kept);
    CHECK(report.items_added == 0);
    CHECK(report.items_put == 0);
    CHECK(report.items_dropped == 0);
    CHECK(std::abs(explained(twin, "u", "i7").taste) > 0);
    for (const char* user : {"u", "v", "w", "stored", "nobody"})
      for (int i = 0; i < 50; ++i) {
        CAPTURE(user);
        CAPTURE(i);
        const std::string item = "i" + std::to_string(i);
        check_same(explained(shop, user, item), explained(twin, user, item));
      }
    for (const char* user : {"u", "v", "w", "stored", "nobody"})
      for (int n = 0; n < 3; ++n) {
        const auto a = shop.recommend({.user = user}), b = twin.recommend({.user = user});
        REQUIRE(a);
        REQUIRE(b);
        CHECK(lines_of(*a) == lines_of(*b));
        CHECK(a->id == b->id);
        CHECK(a->propensity == b->propensity);
      }
    CHECK(slate_of(shop, {.session = "visitor"}) == slate_of(twin, {.session = "visitor"}));
    const auto answered = shop.record({.user = "u",
                                       .item = before.items[4].item,
                                       .event_type = "click",
                                       .recommendation_id = before.id});
    REQUIRE(answered);
    CHECK(*answered == pz::Recorded::learned);
    const auto again = shop.record({.user = "u", .item = "i1", .event_id = "event 7"});
    REQUIRE(again);
    CHECK(*again == pz::Recorded::duplicate);
  }
}

// ------------------------------------------------------------------------------ another model

TEST_CASE("a user ranks after a swap as if the new model had seen all their events") {
  for (Named& successor : successors()) {
    CAPTURE(successor.name);
    const auto old = small_model::model(), next = model_of(std::move(successor.parts));
    auto shop = make(old);
    for (const char* user : {"asks", "explains", "ranks", "batch", "records", "merges", "waits"})
      for (const Event& event : usual_events) learn(shop, user, event);
    for (const Event& event : usual_events) learn(shop, {}, event, "visitor");
    for (const Event& event : usual_events) learn(shop, {}, event, "signs in");
    learn(shop, "lapsed", {"i7", "", now - 3 * day});
    learn(shop, "lapsed", {"i3", "", now - 2 * day});
    std::vector<std::optional<std::uint32_t>> numbers;
    for (int i = 0; i < 50; ++i) numbers.push_back(shop.find_item("i" + std::to_string(i)));

    const auto report = swap(shop, next);
    CHECK_FALSE(report.states_kept);
    CHECK_FALSE(report.sums_kept);
    for (int i = 0; i < 50; ++i)
      CHECK(shop.find_item("i" + std::to_string(i)) == numbers[static_cast<std::size_t>(i)]);
    std::size_t added = 0, dropped = 0;
    for (std::uint32_t i = 0; i < next->item_count(); ++i)
      added += !old->find_item(next->item_id(i));
    for (std::uint32_t i = 0; i < old->item_count(); ++i)
      dropped += !next->find_item(old->item_id(i));
    CHECK(report.items_added == added);
    CHECK(report.items_dropped == dropped);
    CHECK(report.items_put == 0);
    CHECK(shop.item_count() == 50 + added);

    const auto expected = fresh_ranking(next, usual_events);
    REQUIRE(expected.size() == next->item_count());
    REQUIRE(expected[0].reason == pz::Reason::relevance);
    CHECK(ranking_of(shop, "asks") == expected);
    CHECK(ranking_of(shop, {}, "visitor") == expected);
    CHECK(ranking_of(shop, "asks", {}, true) == fresh_ranking(next, usual_events, "u", true));
    // By way of everything that reads a user.
    const auto parts_of_score = shop.explain({.user = "explains"}, expected[5].item);
    REQUIRE(parts_of_score);
    CHECK(std::bit_cast<std::uint32_t>(parts_of_score->score) == expected[5].score);
    CHECK(parts_of_score->taste == 0);
    std::vector<std::string_view> candidates;
    for (const Line& line : expected) candidates.push_back(line.item);
    std::reverse(candidates.begin(), candidates.end());
    pz::Slate order;
    REQUIRE(shop.rank({.user = "ranks", .timestamp = now}, candidates, order));
    CHECK(lines_of(order) == expected);
    const std::array<pz::Request, 3> requests{pz::Request{.user = "nobody", .count = 100},
                                              pz::Request{.user = "batch", .count = 100},
                                              pz::Request{.user = "asks", .count = 100}};
    std::array<pz::Slate, 3> slates;
    REQUIRE(shop.recommend(requests, slates));
    CHECK(lines_of(slates[1]) == expected);
    CHECK(lines_of(slates[2]) == expected);
    CHECK(slates[0].items.size() == next->item_count());

    auto more = usual_events;
    more.push_back({"i8", "click"});
    learn(shop, "records", more.back());
    CHECK(ranking_of(shop, "records") == fresh_ranking(next, more));

    // The last event before the swap is on an item that not every model has.
    const std::vector<Event> with_i3{
        {"i7", "", now - 3 * day}, {"i3", "", now - 2 * day}, {"i8", "click"}};
    learn(shop, "lapsed", with_i3[2]);
    CHECK(ranking_of(shop, "lapsed") == fresh_ranking(next, with_i3));

    auto twice = usual_events;
    twice.insert(twice.end(), usual_events.begin(), usual_events.end());
    const auto merged = shop.merge_session("signs in", "merges");
    REQUIRE(merged);
    CHECK(*merged);
    CHECK(ranking_of(shop, "merges") == fresh_ranking(next, twice));

    // Nobody asks for this one before the pass over all users.
    REQUIRE(shop.update());
    CHECK(ranking_of(shop, "waits") == expected);
  }
}

TEST_CASE("users that came with the models begin with the new one's state") {
  for (const bool known_before : {false, true}) {
    CAPTURE(known_before);
    const auto old = known_before ? model_of(with_user(small_model::parts(), "stored", 24))
                                  : small_model::model();
    const auto next = model_of(with_user(
        reversed(small_model::parts({.dimension = 17, .hidden = 30, .seed = 2})), "stored", 30));
    auto shop = make(old);
    (void)ranking_of(shop, "stored");
    swap(shop, next);
    CHECK(ranking_of(shop, "stored") == fresh_ranking(next, {}, "stored"));
    auto after = make(old);
    for (const Event& event : usual_events) learn(after, "stored", event);
    swap(after, next);
    CHECK(ranking_of(after, "stored") == fresh_ranking(next, usual_events, "stored"));
  }
}

TEST_CASE(
    "events that the model was trained on are not given to the state that it has for a user") {
  const auto old = small_model::model();
  auto parts = with_user(small_model::parts({.seed = 2}), "stored", 24);
  parts.statistics[0].last_timestamp = now - 6 * day;
  const auto next = model_of(std::move(parts));
  auto shop = make(old);
  for (const Event& event : usual_events) learn(shop, "stored", event);
  for (const Event& event : usual_events) learn(shop, "other", event);
  swap(shop, next);
  std::vector<Event> later;
  for (const Event& event : usual_events)
    if (event.timestamp > now - 6 * day) later.push_back(event);
  REQUIRE(later.size() == 3);
  CHECK(ranking_of(shop, "stored") == fresh_ranking(next, later, "stored"));
  CHECK(ranking_of(shop, "other") == fresh_ranking(next, usual_events, "other"));
}

TEST_CASE("a user all of whose events are on items that the model lacks is as one without events") {
  const auto old = small_model::model();
  auto parts = only(small_model::parts({.seed = 2}),
                    [](std::string_view id) { return id != "i7" && id != "i3"; });
  auto shop = make(old);
  for (const char* user : {"u", "v"}) {
    learn(shop, user, {"i7", "click"});
    learn(shop, user, {"i3", "view"});
  }
  swap(shop, model_of(std::move(parts)));
  const auto nobody = ranking_of(shop, "nobody");
  REQUIRE(nobody[0].reason == pz::Reason::popular);
  CHECK(ranking_of(shop, "u") == nobody);
  learn(shop, "v", {"i8", "click"});
  CHECK(ranking_of(shop, "v")[0].reason == pz::Reason::relevance);
  // With the items come the events back.
  const auto third = small_model::model({.seed = 3});
  swap(shop, third);
  CHECK(ranking_of(shop, "u") == fresh_ranking(third, {{"i7", "click"}, {"i3", "view"}}));
}

TEST_CASE("a thread gives users the new model's state where nobody asks for them") {
  auto options = usual();
  options.update_interval = std::chrono::hours{2};
  options.updates = pz::Updates::by_thread;
  auto shop = make(small_model::model(), options);
  for (int n = 0; n < 700; ++n)
    learn(shop, "user " + std::to_string(n), {"i" + std::to_string(n % 50), "click"});
  const std::size_t before = shop.memory().users;
  swap(shop, small_model::model({.hidden = 96, .seed = 2}));
  // A state has 64 floats more.
  for (int n = 0; n < 2000 && shop.memory().users < before + 700 * 64 * 4; ++n)
    std::this_thread::sleep_for(std::chrono::milliseconds{5});
  CHECK(shop.memory().users >= before + 700 * 64 * 4);
}

TEST_CASE("an update gives users the new model's state where nobody asks for them") {
  auto shop = make(small_model::model());
  for (int n = 0; n < 700; ++n)
    learn(shop, "user " + std::to_string(n), {"i" + std::to_string(n % 50), "click"});
  const std::size_t before = shop.memory().users;
  swap(shop, small_model::model({.hidden = 96, .seed = 2}));
  REQUIRE(shop.update());
  CHECK(shop.memory().users >= before + 700 * 64 * 4);
}

TEST_CASE("slates from before a swap are answered after it, whatever the model") {
  for (Named& successor : successors()) {
    CAPTURE(successor.name);
    const auto next = model_of(std::move(successor.parts));
    for (const bool log : {false, true}) {
      std::vector<std::string> logged;
      auto options = usual();
      options.slate_log_bytes = 1 << 16;  // the least
      options.remembered_slates = 40;
      if (log) options.log = [&](const pz::LogEntry& entry) { logged.emplace_back(entry.item); };
      auto shop = make(small_model::model(), options);
      for (const Event& event : usual_events) learn(shop, "u", event);
      const auto slate = shop.recommend({.user = "u", .count = 5}),
                 other = shop.recommend({.user = "nobody", .count = 1000});
      REQUIRE(slate);
      REQUIRE(other);
      swap(shop, next);
      const std::string item(slate->items[1].item);
      const bool there = next->find_item(item).has_value();
      const auto answered = shop.record(
          {.user = "u", .item = item, .event_type = "click", .recommendation_id = slate->id});
      REQUIRE(answered);
      CHECK(*answered == (there ? pz::Recorded::learned : pz::Recorded::unknown_item));
      if (log) CHECK(std::find(logged.begin(), logged.end(), item) != logged.end());
      const auto seen = shop.record_impression({.user = "nobody", .recommendation_id = other->id});
      REQUIRE(seen);
      CHECK(*seen == pz::Recorded::learned);
      REQUIRE(shop.update());
      const auto parts_of_score = shop.explain({.user = "v"}, slate->items[1].item);
      REQUIRE(parts_of_score.has_value() == there);
      if (there) CHECK(parts_of_score->positive == doctest::Approx(1));
      // And slates from after it.
      for (int n = 0; n < 60; ++n) {
        const auto later = shop.recommend({.user = "u", .count = 5});
        REQUIRE(later);
        const auto known = shop.record({.user = "u",
                                        .item = later->items[0].item,
                                        .event_type = "click",
                                        .recommendation_id = later->id});
        REQUIRE(known);
        CHECK(*known == pz::Recorded::learned);
      }
      REQUIRE(shop.update());
    }
  }
}

TEST_CASE(
    "what a user interacted with before a swap is left out after it where that is asked for") {
  auto shop = make(small_model::model());
  for (const Event& event : usual_events) learn(shop, "u", event);
  swap(shop, model_of(reversed(small_model::parts({.items = 60, .seed = 2}))));
  const auto lines = ranking_of(shop, "u", {}, true);
  CHECK(lines.size() == 60 - 5);
  for (const Event& event : usual_events) CHECK_FALSE(holds(lines, event.item));
  pz::ItemMask eligible(shop.item_count());
  for (const char* item : {"i7", "i8", "i59"}) eligible.set(*shop.find_item(item));
  const auto few = slate_of(shop, {.user = "u", .eligible = &eligible});
  REQUIRE(few.size() == 3);
  for (const char* item : {"i7", "i8", "i59"}) CHECK(holds(few, item));
}

TEST_CASE("a log of slates too small for queries of the new model keeps slates without them") {
  auto options = usual();
  options.slate_log_bytes = 1 << 16;
  options.remembered_slates = 4000;  // whose places take all of it
  auto shop = make(small_model::model(), options);
  for (const std::size_t dimension : {std::size_t{45}, std::size_t{400}, std::size_t{20}}) {
    CAPTURE(dimension);
    swap(shop, small_model::model({.dimension = dimension, .seed = dimension}));
    for (int n = 0; n < 40; ++n) {
      const std::string user = "u" + std::to_string(n);
      learn(shop, user, {"i3"});
      const auto slate = shop.recommend({.user = user, .count = 5});
      REQUIRE(slate);
      const auto known = shop.record({.user = user,
                                      .item = slate->items[0].item,
                                      .event_type = "click",
                                      .recommendation_id = slate->id});
      REQUIRE(known);
      CHECK(*known == pz::Recorded::learned);
    }
    REQUIRE(shop.update());
  }
  CHECK(explained(shop, "u0", "i3").taste != 0);
}

TEST_CASE("an impression that names a user and a session counts once after a swap") {
  auto shop = make(small_model::model());
  learn(shop, {}, {"i3"}, "visitor");
  const std::vector<std::string_view> theirs{"i20", "i21", "i22"}, shown{"i30", "i31"};
  swap(shop, small_model::model({.seed = 2}));
  REQUIRE(shop.record_impression({.user = "other", .items = theirs}));
  const double before = explained(shop, "v", "i20").expected;
  REQUIRE(before > 0);
  REQUIRE(shop.record_impression({.user = "u", .session = "visitor", .items = shown}));
  CHECK(explained(shop, "v", "i20").expected == before);
  CHECK(explained(shop, "v", "i30").expected > 0);
  CHECK(explained(shop, "v", "i31").expected > 0);
}

// -------------------------------------------------------------------------------- what is counted

TEST_CASE("counts of feedback go on with another model, and with them what they teach") {
  auto shop = make(small_model::model());
  const std::vector<std::string_view> shown{"i5", "i6", "i8"};
  for (int n = 0; n < 60; ++n) {
    const std::string user = "u" + std::to_string(n);
    learn(shop, user, {"i3"});
    REQUIRE(shop.record({.user = user, .item = "i5", .impressions = shown}));
  }
  const auto before = explained(shop, "v", "i5"), ignored = explained(shop, "v", "i6");
  CHECK(before.positive == doctest::Approx(60).epsilon(1e-3));
  swap(shop, model_of(without(reversed(small_model::parts({.dimension = 27, .seed = 2})), "i4")));
  const auto after = explained(shop, "v", "i5");
  CHECK(after.positive == before.positive);
  CHECK(after.expected == before.expected);
  CHECK(explained(shop, "v", "i6").expected == ignored.expected);
  CHECK(after.quality > 0);
  CHECK(explained(shop, "v", "i6").quality < 0);
  REQUIRE(shop.record({.user = "w", .item = "i5", .impressions = shown}));
  CHECK(explained(shop, "v", "i5").positive == doctest::Approx(before.positive + 1).epsilon(1e-6));
}

TEST_CASE("interactions that the new model was trained on do not count twice") {
  for (const std::int64_t until : {now - day, now, now + 5 * day, now + 10 * day, now + 11 * day}) {
    CAPTURE(until);
    std::int64_t clock = now;
    const auto options = usual({.exploration_weight = 0, .clock = [&clock] { return clock; }});
    auto shop = make(small_model::model(), options);
    clock = now + day;
    for (int n = 0; n < 5000; ++n) learn(shop, "u" + std::to_string(n), {"i45", {}, clock});
    clock = now + 10 * day;
    auto parts = reversed(small_model::parts({.seed = 2}));
    parts.statistics[3].last_timestamp = until;
    const auto next = model_of(std::move(parts));
    auto fresh = make(next, options);
    swap(shop, next);
    const auto of = [](pz::Recommender& r) { return slate_of(r, {.user = "nobody", .count = 50}); };
    const auto lines = of(shop), trained = of(fresh);
    if (until >= clock) {
      CHECK(lines == trained);
    } else {
      CHECK(lines[0].item == "i45");
      CHECK(trained[0].item != "i45");
    }
    if (until == now + 5 * day) {
      // Half of the ten days: a little less than half of what there was, which fades.
      const double share = static_cast<double>(std::bit_cast<float>(lines[0].score)),
                   count = share / (1 - share) * 50 * 975;
      CHECK(count > 1200);
      CHECK(count < 3300);
    }
    // Nor at the next update.
    for (pz::Recommender* one : {&shop, &fresh}) {
      learn(*one, "w", {"i45", {}, clock});
      REQUIRE(one->update());
    }
    if (until >= clock)
      CHECK(explained(shop, "nobody", "i45").score == explained(fresh, "nobody", "i45").score);
    // What comes from now on counts in full.
    for (int n = 0; n < 5000; ++n) learn(shop, "v" + std::to_string(n), {"i44", {}, clock});
    REQUIRE(shop.update());
    CHECK(of(shop)[0].item == "i44");
  }
}

namespace {

// With what queries of slates teach of i3 and i5, which some like and others do not.
pz::Recommender with_taste(const ModelPointer& model) {
  auto shop = make(model);
  for (int n = 0; n < 80; ++n) {
    const std::string user = "u" + std::to_string(n);
    learn(shop, user, {n % 2 == 0 ? "i10" : "i20", "click"});
    const auto slate = shop.recommend({.user = user, .count = 50});
    REQUIRE(slate);
    REQUIRE(shop.record({.user = user,
                         .item = n % 2 == 0 ? "i3" : "i5",
                         .event_type = "click",
                         .recommendation_id = slate->id}));
  }
  REQUIRE(shop.update(now));
  return shop;
}

}  // namespace

TEST_CASE("taste and users' offsets go with the item space and stay where fingerprints agree") {
  auto parts = small_model::parts();
  const auto model = model_of(parts);
  auto shop = with_taste(model), twin = with_taste(model);
  REQUIRE(explained(shop, "u0", "i3").taste != 0);
  for (pz::Recommender* one : {&shop, &twin}) learn(*one, "v", {"i2"});  // a reason to update
  auto same = reversed(parts);
  same.fingerprints = model->fingerprints();
  const auto kept = swap(shop, model_of(same));
  CHECK(kept.states_kept);
  CHECK(kept.sums_kept);
  REQUIRE(twin.update(now));
  for (const char* user : {"u0", "u1", "u33"})
    for (const char* item : {"i3", "i5", "i10"}) {
      CHECK(explained(shop, user, item).taste ==
            doctest::Approx(static_cast<double>(explained(twin, user, item).taste)).epsilon(1e-4));
      CHECK(explained(shop, user, item).relevance ==
            doctest::Approx(static_cast<double>(explained(twin, user, item).relevance))
                .epsilon(1e-4));
    }
  // The same encoder, but items that lie elsewhere.
  auto moved = same;
  moved.fingerprints->items ^= 1;
  const auto gone = swap(shop, model_of(moved));
  CHECK(gone.states_kept);
  CHECK_FALSE(gone.sums_kept);
  for (const char* user : {"u0", "u1", "u33"})
    for (const char* item : {"i3", "i5", "i10"}) {
      CHECK(explained(shop, user, item).taste == 0);
      CHECK(explained(shop, user, item).relevance ==
            doctest::Approx(static_cast<double>(explained(twin, user, item).relevance))
                .epsilon(1e-4));
    }
  // Another encoder of the same items.
  auto other = with_taste(model);
  auto encoder = parts;
  encoder.fingerprints = model->fingerprints();
  encoder.fingerprints->encoder ^= 1;
  const auto again = swap(other, model_of(encoder));
  CHECK_FALSE(again.states_kept);
  CHECK(again.sums_kept);
  CHECK(explained(other, "u0", "i3").taste != 0);
}

TEST_CASE("taste is learnt anew with a model of another dimension") {
  for (const std::size_t dimension : {std::size_t{9}, std::size_t{20}, std::size_t{61}}) {
    CAPTURE(dimension);
    auto shop = with_taste(small_model::model());
    swap(shop, small_model::model({.dimension = dimension, .seed = 2}));
    CHECK(explained(shop, "u0", "i3").taste == 0);
    for (int round = 0; round < 2; ++round)
      for (int n = 0; n < 80; ++n) {
        const std::string user = "u" + std::to_string(n);
        const auto slate = shop.recommend({.user = user, .count = 50});
        REQUIRE(slate);
        REQUIRE(shop.record({.user = user,
                             .item = n % 2 == 0 ? "i13" : "i15",
                             .event_type = "click",
                             .recommendation_id = slate->id}));
      }
    REQUIRE(shop.update(now));
    const auto one = explained(shop, "u0", "i13"), other = explained(shop, "u1", "i13");
    CHECK(one.taste != 0);
    CHECK(one.taste != other.taste);
    CHECK(std::isfinite(one.score));
  }
}

// ------------------------------------------------------------------------------------------ items

namespace {

const pz::NewItem put_item{.item = "put",
                           .creation_timestamp = now - day,
                           .fields = {{"GENRE", "bow|sword"}, {"PRICE", "2"}}};

}  // namespace

TEST_CASE("an item that was put stays by its fields where the new model lacks it") {
  auto shop = make(small_model::model());
  REQUIRE(shop.put_item(put_item));
  REQUIRE(shop.put_item({.item = "without fields"}));
  REQUIRE(shop.update());
  const auto number = shop.find_item("put");
  const std::vector<Event> events{{"i7", "view", now - day}, {"put", "click"}};
  for (const Event& event : events) CHECK(learn(shop, "u", event) == pz::Recorded::learned);
  for (Named& successor : successors()) {
    CAPTURE(successor.name);
    const auto next = model_of(std::move(successor.parts));
    const auto report = swap(shop, next);
    CHECK(report.items_put == 2);
    CHECK(shop.find_item("put") == number);
    auto fresh = make(next);
    REQUIRE(fresh.put_item(put_item));
    REQUIRE(fresh.put_item({.item = "without fields"}));
    REQUIRE(fresh.update());
    for (const Event& event : events) learn(fresh, "u", event);
    const auto lines = ranking_of(shop, "u");
    CHECK(holds(lines, "put"));
    CHECK(lines == ranking_of(fresh, "u"));
    CHECK(explained(shop, "u", "put").age == explained(fresh, "u", "put").age);
  }
}

TEST_CASE("an item that was put again, and waits for that, stays meanwhile") {
  auto shop = make(small_model::model());
  REQUIRE(shop.put_item(put_item));
  REQUIRE(shop.update());
  REQUIRE(shop.put_item(put_item));
  REQUIRE(shop.put_item({.item = "never there", .fields = {{"GENRE", "bow"}}}));
  for (Named& successor : successors()) {
    CAPTURE(successor.name);
    CHECK(swap(shop, model_of(std::move(successor.parts))).items_put == 1);
    CHECK(explained(shop, "u", "put").expected == 0);
    CHECK_FALSE(shop.find_item("never there"));
  }
  REQUIRE(shop.remove_item("put"));
  (void)swap(shop, small_model::model());
  CHECK_FALSE(shop.explain({.user = "u"}, "put"));
  REQUIRE(shop.update());
  CHECK_FALSE(shop.explain({.user = "u"}, "put"));
  CHECK(shop.find_item("never there"));
}

TEST_CASE("an item that was put has the model's own vector once a model has it") {
  auto shop = make(small_model::model());
  REQUIRE(shop.put_item({.item = "i55", .fields = {{"GENRE", "sword"}}}));
  REQUIRE(shop.update());
  const auto number = shop.find_item("i55");
  learn(shop, "u", {"i55", "click"});
  const auto next = small_model::model({.items = 60, .seed = 2});
  const auto report = swap(shop, next);
  CHECK(report.items_put == 0);
  CHECK(report.items_added == 9);
  CHECK(shop.find_item("i55") == number);
  CHECK(ranking_of(shop, "u") == fresh_ranking(next, {{"i55", "click"}}));
}

TEST_CASE("an item that the model lacks leaves, keeps its number and comes back with its counts") {
  auto shop = make(small_model::model());
  const std::vector<std::string_view> shown{"i5", "i6"};
  for (int n = 0; n < 20; ++n)
    REQUIRE(shop.record({.user = "u" + std::to_string(n), .item = "i5", .impressions = shown}));
  learn(shop, "u", {"i5", "click"});
  const auto number = shop.find_item("i5");
  const double positive = explained(shop, "v", "i5").positive;
  REQUIRE(positive > 10);
  const auto report = swap(shop, model_of(without(small_model::parts({.seed = 2}), "i5")));
  CHECK(report.items_dropped == 1);
  CHECK_FALSE(holds(ranking_of(shop, "u"), "i5"));
  CHECK_FALSE(holds(ranking_of(shop, "nobody"), "i5"));
  const auto unknown = shop.explain({.user = "u"}, "i5");
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == pz::Errc::unknown_item);
  CHECK(learn(shop, "u", {"i5"}) == pz::Recorded::unknown_item);
  CHECK_FALSE(shop.model()->find_item("i5"));
  REQUIRE(shop.put_item({.item = "another"}));
  REQUIRE(shop.update());
  CHECK(*shop.find_item("another") == 50);
  CHECK(shop.find_item("i5") == number);
  const auto third = small_model::model({.seed = 3});
  const auto back = swap(shop, third);
  CHECK(back.items_added == 0);
  CHECK(shop.find_item("i5") == number);
  CHECK(explained(shop, "v", "i5").positive == positive);
  REQUIRE(shop.remove_item("another"));
  REQUIRE(shop.update());
  CHECK(holds(ranking_of(shop, "u"), "i5"));
}

TEST_CASE("an item that left with its model can be put again, and is as old as that") {
  std::int64_t clock = now;
  auto shop =
      make(small_model::model(), usual({.exploration_weight = 0, .clock = [&] { return clock; }}));
  swap(shop, model_of(without(small_model::parts({.seed = 2}), "i5")));
  REQUIRE(shop.put_item({.item = "i5", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.update());
  clock += 4 * day;
  learn(shop, "u", {"i5", {}, clock});
  CHECK(explained(shop, "u", "i5").age == 4 * day);
}

TEST_CASE("an item that was removed stays so, whatever the model has") {
  auto shop = make(small_model::model());
  REQUIRE(*shop.remove_item("i5"));
  REQUIRE(shop.put_item(put_item));
  REQUIRE(shop.update());
  REQUIRE(*shop.remove_item("put"));
  REQUIRE(shop.update());
  for (const std::uint64_t seed : {2u, 3u}) {
    auto parts = small_model::parts({.items = 51, .seed = seed});
    const auto last = small_model::parts({.items = 50, .seed = seed});
    parts.item_ids = {};
    for (std::uint32_t i = 0; i < 50; ++i) REQUIRE(parts.item_ids.add(last.item_ids[i]));
    REQUIRE(parts.item_ids.add("put"));
    swap(shop, model_of(std::move(parts)));
    for (const char* user : {"u", "nobody"}) {
      CHECK_FALSE(holds(ranking_of(shop, user), "i5"));
      CHECK_FALSE(holds(ranking_of(shop, user), "put"));
    }
  }
  REQUIRE(shop.put_item({.item = "i5"}));
  REQUIRE(shop.update());
  CHECK(holds(ranking_of(shop, "u"), "i5"));
}

TEST_CASE("items that wait for an update, and events on them, wait on through a swap") {
  for (const bool has_it : {false, true}) {
    CAPTURE(has_it);
    auto shop = make(small_model::model());
    REQUIRE(shop.put_item({.item = "i50", .fields = {{"GENRE", "bow"}}}));
    CHECK(learn(shop, "u", {"i50", "click"}) == pz::Recorded::pending_item);
    REQUIRE(*shop.remove_item("i7"));
    swap(shop, small_model::model({.items = has_it ? 51u : 50u, .seed = 2}));
    CHECK(learn(shop, "v", {"i50", "click"}) ==
          (has_it ? pz::Recorded::learned : pz::Recorded::pending_item));
    CHECK(holds(ranking_of(shop, "nobody"), "i7"));
    REQUIRE(shop.update());
    CHECK(shop.update_report().events_replayed == (has_it ? 1 : 2));
    CHECK_FALSE(holds(ranking_of(shop, "nobody"), "i7"));
    for (const char* user : {"u", "v"}) {
      CHECK_FALSE(holds(ranking_of(shop, user, {}, true), "i50"));
      CHECK(holds(ranking_of(shop, user), "i50"));
      CHECK(ranking_of(shop, user)[0].reason == pz::Reason::relevance);
    }
  }
}

// ------------------------------------------------------------------------------- users and errors

TEST_CASE("a user of the old model who was forgotten stays so where the new one has them, too") {
  auto shop = make(model_of(with_user(small_model::parts(), "stored", 24)));
  const auto next = model_of(with_user(small_model::parts({.seed = 2}), "stored", 24));
  CHECK(ranking_of(shop, "stored")[0].reason == pz::Reason::relevance);
  CHECK(shop.forget("stored"));
  swap(shop, next);
  CHECK(ranking_of(shop, "stored")[0].reason == pz::Reason::popular);
  learn(shop, "stored", {"i3"});
  CHECK(ranking_of(shop, "stored") == fresh_ranking(next, {{"i3"}}));
}

TEST_CASE("users who are forgotten while a model comes stay forgotten") {
  const auto parts = [](std::uint64_t seed) {
    auto made = small_model::parts({.items = 4000, .seed = seed});
    small_model::Random random{8};
    for (int n = 0; n < 2000; ++n) REQUIRE(made.user_ids.add("u" + std::to_string(n)));
    made.user_states = small_model::random_matrix(random, 2000, 24 + 20, 0.5f);
    return model_of(std::move(made));
  };
  const auto a = parts(1), b = parts(2);
  auto shop = make(a);
  std::atomic<bool> stop{false};
  std::thread forgetting([&] {
    for (int n = 0; n < 2000 && !stop; ++n) {
      (void)shop.forget("u" + std::to_string(n));
      std::this_thread::sleep_for(std::chrono::microseconds{20});
    }
    stop = true;
  });
  for (int n = 0; !stop; ++n) swap(shop, n % 2 == 0 ? b : a);
  forgetting.join();
  swap(shop, b);
  int remembered = 0;
  for (int n = 0; n < 2000; ++n) {
    const auto slate = shop.recommend({.user = "u" + std::to_string(n), .count = 1});
    REQUIRE(slate);
    remembered += slate->items[0].reason != pz::Reason::popular;
  }
  CHECK(remembered == 0);
}

TEST_CASE("a model that cannot be taken is an error, and the old one stays") {
  const auto model = small_model::model();
  auto shop = make(model);
  for (const Event& event : usual_events) learn(shop, "u", event);
  const auto before = ranking_of(shop, "u");
  const auto none = shop.swap(nullptr);
  REQUIRE_FALSE(none);
  CHECK(none.error().code == pz::Errc::invalid_argument);
  for (int which = 0; which < 3; ++which) {
    auto parts = small_model::parts({.seed = 2});
    auto& s = parts.statistics[7];
    (which == 0   ? s.first_timestamp
     : which == 1 ? s.last_timestamp
                  : s.creation_timestamp) = now + 2 * day;
    const auto ahead = shop.swap(model_of(std::move(parts)));
    REQUIRE_FALSE(ahead);
    CHECK(ahead.error().code == pz::Errc::invalid_argument);
    CHECK(ahead.error().message.find("'i7'") != std::string::npos);
  }
  CHECK(shop.model() == model);
  CHECK(ranking_of(shop, "u") == before);
}

// ----------------------------------------------------------------------------------------- memory

TEST_CASE("the old model ends when its last reader is done, and no earlier") {
  auto model = small_model::model();
  const std::weak_ptr<const pz::Model> old = model;
  auto shop = make(model);
  learn(shop, "u", {"i3"});
  pz::Slate slate;
  REQUIRE(shop.recommend({.user = "u"}, slate));
  const auto lines = lines_of(slate);
  swap(shop, model);  // to itself: it is no other model that ends
  swap(shop, model);
  model.reset();
  swap(shop, small_model::model({.seed = 2}));
  REQUIRE(shop.update());
  CHECK_FALSE(old.expired());
  CHECK(lines_of(slate) == lines);
  slate = {};
  REQUIRE(shop.update());
  CHECK(old.expired());
}

TEST_CASE("models that come and go in turn end, each once nobody has it") {
  auto a = small_model::model({.seed = 1}), b = small_model::model({.seed = 2});
  const std::weak_ptr<const pz::Model> first = a, second = b;
  auto shop = make(a);
  for (int n = 0; n < 3; ++n) {
    swap(shop, b);
    swap(shop, a);
  }
  a.reset();
  b.reset();
  swap(shop, small_model::model({.seed = 3}));
  swap(shop, small_model::model({.seed = 4}));
  CHECK(first.expired());
  CHECK(second.expired());
}

TEST_CASE("a recommender takes no more memory the more often models come") {
  auto shop = make(small_model::model());
  const auto a = model_of(reversed(small_model::parts({.items = 300, .seed = 2}))),
             b = small_model::model({.items = 280, .dimension = 27, .hidden = 9, .seed = 3});
  for (int n = 0; n < 100; ++n)
    for (const Event& event : usual_events) learn(shop, "u" + std::to_string(n), event);
  REQUIRE(shop.put_item(put_item));
  REQUIRE(shop.update());
  std::vector<std::size_t> totals;
  for (int n = 0; n < 20; ++n) {
    swap(shop, a);
    swap(shop, b);
    REQUIRE(shop.update());
    (void)ranking_of(shop, "u1");
    totals.push_back(shop.memory().total());
  }
  CHECK(totals.back() == totals[1]);
}

// ---------------------------------------------------------------------------------------- threads

TEST_CASE("no request fails or sees half a model while models come") {
  const std::array<ModelPointer, 4> models{
      small_model::model({.items = 80}),
      model_of(only(reversed(small_model::parts({.items = 90, .dimension = 33, .seed = 2})),
                    [](std::string_view id) { return id.back() != '6'; })),
      small_model::model({.items = 85, .hidden = 40, .seed = 3}, true), model_of([] {
        auto parts = reversed(small_model::parts({.items = 80}));
        parts.fingerprints = pz::fingerprints_of(small_model::parts({.items = 80}));
        return parts;
      }())};
  for (const auto updates : {pz::Updates::by_caller, pz::Updates::by_thread}) {
    pz::RecommenderOptions options{.exploration_weight = 0.3f};
    options.updates = updates;
    options.clock = [] { return now; };
    options.log = [](const pz::LogEntry& entry) {
      if (entry.item.empty()) std::abort();
    };
    auto shop = pz::Recommender::create(models[0], options);
    REQUIRE(shop);
    std::atomic<const char*> broken{nullptr};
    std::atomic<bool> stop{false};
    const auto require = [&](bool kept, const char* promise) {
      if (!kept) broken = promise;
    };
    const auto valid = [&](const pz::Slate& slate, std::size_t least) {
      std::set<std::string_view> items;
      for (const pz::Pick& pick : slate.items) {
        items.insert(pick.item);
        require(std::isfinite(pick.score), "scores are finite");
        require(pick.item.starts_with("i") || pick.item == "put", "items have their ids");
      }
      require(items.size() == slate.items.size(), "items are distinct");
      require(items.size() >= least, "a slate is full");
    };
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        small_model::Random random{t};
        pz::Slate slate, order;
        std::array<pz::Slate, 3> slates;
        while (!stop && !broken) {
          const std::string user = "u" + std::to_string(random.below(12)),
                            session = "s" + std::to_string(random.below(12)),
                            item = "i" + std::to_string(random.below(92));
          const std::array<std::string_view, 3> items{item, "i1", "i2"};
          const bool exclude = random.below(2) == 0;
          require(shop->record({.user = user, .item = item, .event_type = "click"}).has_value(),
                  "events are recorded");
          require(
              shop->record({.session = session, .item = "i2", .impressions = items}).has_value(),
              "events with impressions are recorded");
          require(shop->recommend({.user = user,
                                   .session = session,
                                   .count = 20,
                                   .exclude_interacted = exclude},
                                  slate)
                      .has_value(),
                  "requests are answered");
          valid(slate, exclude ? 0 : 20);  // some have seen nearly all
          if (!slate.items.empty()) {
            const auto known = shop->record({.user = user,
                                             .item = slate.items[0].item,
                                             .event_type = "click",
                                             .recommendation_id = slate.id});
            // The user may be forgotten, and the slate with them.
            require(known.has_value() && *known != pz::Recorded::unknown_slate,
                    "slates are answered");
          }
          const std::array<pz::Request, 3> requests{pz::Request{.user = user, .count = 10},
                                                    pz::Request{.session = session, .count = 10},
                                                    pz::Request{.user = "u1", .count = 10}};
          require(shop->recommend(requests, slates).has_value(), "batches are answered");
          for (const pz::Slate& one : slates) valid(one, 10);
          require(shop->rank({.user = user}, items, order).has_value() && order.items.size() == 3,
                  "items are ranked");
          const auto explained = shop->explain({.user = user}, item);
          require(explained ? std::isfinite(explained->score)
                            : explained.error().code == pz::Errc::unknown_item,
                  "items are explained");
          require(shop->record_impression({.user = user, .session = session, .items = items})
                      .has_value(),
                  "impressions are recorded");
          if (random.below(4) == 0)
            require(shop->merge_session(session, user).has_value(), "sessions are merged");
          if (random.below(8) == 0) (void)shop->forget(user);
          if (random.below(8) == 0) require(shop->put_item(put_item).has_value(), "items are put");
          if (random.below(8) == 0)
            require(shop->remove_item("put").has_value(), "items are removed");
        }
      });
    std::size_t swaps = 0;
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds{600};
    while (!broken && (swaps < 6 || std::chrono::steady_clock::now() < end)) {
      require(shop->swap(models[++swaps % models.size()]).has_value(), "models come");
      if (swaps % 3 == 0) require(shop->update().has_value(), "updates are made");
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
    const char* promise = broken;
    CHECK_MESSAGE(!promise, std::string(promise ? promise : ""));
    CHECK(swaps > 4);
    CHECK(shop->restarted_states() == 0);
    // Afterwards all is as it would be had nothing run at the same time.
    swap(*shop, models[2]);
    (void)shop->forget("u3");
    for (const Event& event : usual_events) learn(*shop, "u3", event);
    REQUIRE(shop->update());
    CHECK(slate_of(*shop, {.user = "u3", .count = 5}).size() == 5);
  }
}

}  // namespace swap_tests
