#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "small_model.hpp"

// Of its own: several test files are compiled as one.
namespace recommender_tests {

namespace pz = personalize;

namespace {

pz::Recommender make(const pz::RecommenderOptions& options = {.exploration_weight = 0},
                     const small_model::Shape& shape = {}) {
  auto shop = pz::Recommender::create(small_model::model(shape), options);
  REQUIRE(shop);
  return std::move(*shop);
}

void learn(pz::Recommender& shop, std::string_view user, std::string_view item,
           std::int64_t timestamp = 1000, std::string_view event_type = {}) {
  const auto recorded =
      shop.record({.user = user, .item = item, .event_type = event_type, .timestamp = timestamp});
  REQUIRE(recorded);
  REQUIRE(*recorded == pz::Recorded::learned);
}

std::vector<std::string> items(const pz::Slate& slate) {
  std::vector<std::string> ids;
  for (const auto& pick : slate.items) ids.emplace_back(pick.item);
  return ids;
}

std::vector<std::string> slate_of(pz::Recommender& shop, const pz::Request& request) {
  auto slate = shop.recommend(request);
  REQUIRE(slate);
  return items(*slate);
}

}  // namespace

TEST_CASE("an unknown user gets popular items, with their share as score") {
  auto shop = make();
  const auto slate = shop.recommend({.user = "nobody", .count = 5});
  REQUIRE(slate);
  CHECK(items(*slate) == std::vector<std::string>{"i0", "i1", "i2", "i3", "i4"});
  double interactions = 0;
  for (const auto& s : shop.model()->parts().statistics)
    interactions += static_cast<double>(s.interactions);
  CHECK(slate->items[1].score == doctest::Approx(999 / interactions));
  CHECK(slate->items[0].reason == pz::Reason::popular);
  CHECK(shop.user_count() == 0);
}

TEST_CASE("many requests together get what they get one by one") {
  const pz::RecommenderOptions options{.exploration_weight = 0.5f,
                                       .seed = 3,
                                       .recommendation_key = std::array<std::uint64_t, 2>{1, 2}};
  auto together = make(options, {.items = 700});
  auto alone = make(options, {.items = 700});
  pz::ItemMask odd(700);
  for (std::uint32_t i = 1; i < 700; i += 2) odd.set(i);
  std::vector<std::string> users;
  for (int u = 0; u < 70; ++u) users.push_back("u" + std::to_string(u));
  std::vector<pz::Request> requests;
  small_model::Random random{5};
  for (std::size_t u = 0; u < users.size(); ++u) {
    for (std::size_t e = 0; e < u % 5; ++e) {
      const std::string item = "i" + std::to_string(random.below(700));
      learn(together, users[u], item, 1000);
      learn(alone, users[u], item, 1000);
    }
    requests.push_back({.user = users[u],
                        .count = static_cast<std::uint32_t>(1 + u % 40),
                        .exclude_interacted = u % 2 == 0,
                        .eligible = u % 3 == 0 ? &odd : nullptr,
                        .timestamp = 2000});
  }
  requests.push_back(requests[4]);  // a user twice
  std::vector<pz::Slate> slates(requests.size());
  REQUIRE(together.recommend(requests, slates));
  for (std::size_t r = 0; r < requests.size(); ++r) {
    CAPTURE(r);
    const auto want = alone.recommend(requests[r]);
    REQUIRE(want);
    CHECK(slates[r].id == want->id);
    CHECK(slates[r].propensity == want->propensity);
    REQUIRE(items(slates[r]) == items(*want));
    for (std::size_t p = 0; p < want->items.size(); ++p) {
      CHECK(slates[r].items[p].score == want->items[p].score);
      CHECK(slates[r].items[p].reason == want->items[p].reason);
    }
  }
  CHECK(together.recommend({}, slates));
  requests[3].count = 0;
  CHECK(together.recommend(requests, slates).error().code == pz::Errc::invalid_argument);
  requests[3].count = 1;
  slates.pop_back();
  CHECK(together.recommend(requests, slates).error().code == pz::Errc::invalid_argument);
}

TEST_CASE("looking up gates changes no ranking, and new items are looked up too") {
  auto plain = make({.exploration_weight = 0, .recommendation_key = {{1, 2}}});
  auto quick = make({.exploration_weight = 0, .recommendation_key = {{1, 2}}, .gate_lookup = true});
  for (auto* shop : {&plain, &quick}) {
    learn(*shop, "u", "i3", 1000, "click");
    REQUIRE(
        shop->put_item({.item = "new", .creation_timestamp = 900, .fields = {{"GENRE", "bow"}}}));
    REQUIRE(shop->update(2000));
    learn(*shop, "u", "new", 2000);
    learn(*shop, "u", "i7", 3000);
  }
  const pz::Request request{.user = "u", .count = 20, .timestamp = 4000};
  const auto want = plain.recommend(request), got = quick.recommend(request);
  REQUIRE(want);
  REQUIRE(got);
  REQUIRE(items(*got) == items(*want));
  for (std::size_t i = 0; i < 20; ++i)
    CHECK(got->items[i].score == doctest::Approx(want->items[i].score).epsilon(1e-5));
}

TEST_CASE("a known user gets the top k of the encoder's state") {
  auto shop = make();
  const auto& model = *shop.model();
  const pz::Encoder encoder{model};
  const pz::Scorer scorer{model};
  auto workspace = encoder.make_workspace();
  std::vector<float> state(encoder.state_size());
  std::optional<std::int64_t> previous;
  const std::vector<std::pair<std::string, std::int64_t>> events{
      {"i3", 100}, {"i40", 107}, {"i7", 107}, {"i3", 90'000}};
  for (const auto& [item, timestamp] : events) {
    learn(shop, "u", item, timestamp, "click");
    encoder.step({*model.find_item(item), 1, pz::time_gap_bucket(previous, timestamp, 12)}, state,
                 workspace);
    previous = timestamp;
  }
  auto scoring = scorer.make_workspace();
  std::vector<pz::ScoredItem> top;
  scorer.top_k(encoder.query(state), 10, {}, scoring, top);
  const auto slate = shop.recommend({.user = "u", .count = 10});
  REQUIRE(slate);
  REQUIRE(slate->items.size() == 10);
  for (std::size_t r = 0; r < 10; ++r) {
    CHECK(slate->items[r].item == model.item_id(top[r].item));
    CHECK(slate->items[r].score == top[r].score);
    CHECK(slate->items[r].reason == pz::Reason::relevance);
  }
}

TEST_CASE("items already interacted with are left out where asked, and only there") {
  auto shop = make();
  for (const char* item : {"i1", "i2", "i9"}) learn(shop, "u", item);
  const auto all = slate_of(shop, {.user = "u", .count = 50});
  CHECK(all.size() == 50);
  const auto fresh = slate_of(shop, {.user = "u", .count = 50, .exclude_interacted = true});
  CHECK(fresh.size() == 47);
  for (const char* item : {"i1", "i2", "i9"})
    CHECK(std::find(fresh.begin(), fresh.end(), item) == fresh.end());
  // The order of the others is the same.
  auto rest = all;
  std::erase_if(rest, [](const auto& id) { return id == "i1" || id == "i2" || id == "i9"; });
  CHECK(rest == fresh);
  CHECK(slate_of(shop, {.user = "u", .count = 50}).size() == 50);
}

TEST_CASE("an eligibility mask holds for known and unknown users") {
  auto shop = make();
  learn(shop, "u", "i1");
  pz::ItemMask even(50);
  for (std::uint32_t i = 0; i < 50; i += 2) even.set(i);
  for (const char* user : {"u", "nobody"}) {
    const auto slate = shop.recommend({.user = user, .count = 50, .eligible = &even});
    REQUIRE(slate);
    CHECK(slate->items.size() == 25);
    for (const auto& pick : slate->items) CHECK(*shop.find_item(pick.item) % 2 == 0);
  }
  pz::ItemMask shorter(30, true);  // items beyond it are left out
  const auto slate = shop.recommend({.user = "u", .count = 50, .eligible = &shorter});
  REQUIRE(slate);
  CHECK(slate->items.size() == 30);
  const pz::ItemMask longer(51);
  CHECK_FALSE(shop.recommend({.user = "u", .eligible = &longer}));
}

TEST_CASE("a session's events become the user's") {
  auto shop = make();
  for (const char* item : {"i4", "i5"})
    REQUIRE(shop.record({.session = "s", .item = item, .timestamp = 50}));
  CHECK(slate_of(shop, {.session = "s"}) != slate_of(shop, {.user = "nobody"}));
  // Answered from the session while the user is unknown.
  CHECK(slate_of(shop, {.user = "u", .session = "s"}) == slate_of(shop, {.session = "s"}));

  auto direct = make();
  for (const char* item : {"i4", "i5"}) learn(direct, "u", item, 50);
  SUBCASE("by asking") {
    const auto merged = shop.merge_session("s", "u");
    REQUIRE(merged);
    CHECK(*merged);
    CHECK_FALSE(*shop.merge_session("s", "u"));
  }
  SUBCASE("by an event that names both") {
    REQUIRE(shop.record({.user = "u", .session = "s", .item = "i6", .timestamp = 60}));
    learn(direct, "u", "i6", 60);
  }
  CHECK(slate_of(shop, {.user = "u"}) == slate_of(direct, {.user = "u"}));
  CHECK(shop.user_count() == 1);
  CHECK_FALSE(shop.merge_session("", "u"));
}

TEST_CASE("a user and a session of the same name are two") {
  auto shop = make();
  learn(shop, "x", "i1");
  REQUIRE(shop.record({.session = "x", .item = "i30", .timestamp = 5}));
  CHECK(shop.user_count() == 2);
  CHECK(shop.forget("x"));
  CHECK_FALSE(shop.forget("x"));
  CHECK(shop.user_count() == 1);
  CHECK(shop.forget("", "x"));
  CHECK(shop.user_count() == 0);
  CHECK_FALSE(shop.forget("", ""));
}

TEST_CASE("ranking orders the given items, unknown ones last") {
  auto shop = make();
  learn(shop, "u", "i1");
  const std::vector<std::string_view> given{"i7", "nothing", "i3", "i44", "i1"};
  pz::Slate slate;
  REQUIRE(shop.rank({.user = "u", .exclude_interacted = true}, given, slate));
  REQUIRE(slate.items.size() == 5);
  const auto all = slate_of(shop, {.user = "u", .count = 50});
  const auto place = [&](std::string_view id) {
    return std::find(all.begin(), all.end(), id) - all.begin();
  };
  CHECK(place(slate.items[0].item) < place(slate.items[1].item));
  CHECK(place(slate.items[1].item) < place(slate.items[2].item));
  CHECK(slate.items[3].item == "nothing");
  CHECK(slate.items[3].reason == pz::Reason::unknown);
  CHECK(slate.items[4].item == "i1");
  REQUIRE(shop.rank({.user = "nobody"}, given, slate));
  CHECK(slate.items[0].item == "i1");
  CHECK(slate.items[0].reason == pz::Reason::popular);
}

TEST_CASE("wrong arguments are errors and change nothing") {
  auto shop = make();
  CHECK_FALSE(pz::Recommender::create(nullptr));
  CHECK_FALSE(pz::Recommender::create(small_model::model(), {.history_length = 0}));
  CHECK_FALSE(pz::Recommender::create(small_model::model(), {.max_users = 3}));
  CHECK_FALSE(shop.record({.item = "i1"}));
  CHECK_FALSE(shop.record({.user = std::string(257, 'x'), .item = "i1"}));
  CHECK_FALSE(shop.recommend({.count = 5}));
  CHECK_FALSE(shop.recommend({.user = "u", .count = 0}));
  CHECK_FALSE(shop.recommend({.user = "u", .count = 10'001}));
  const auto unknown = shop.record({.user = "u", .item = "nothing", .timestamp = 1});
  REQUIRE(unknown);
  CHECK(*unknown == pz::Recorded::unknown_item);
  CHECK(shop.user_count() == 0);
}

TEST_CASE("only the last events of a user are remembered, the state keeps them all") {
  auto shop = make({.history_length = 3, .exploration_weight = 0});
  for (int i = 0; i < 10; ++i) learn(shop, "u", "i" + std::to_string(i), i);
  const auto fresh = slate_of(shop, {.user = "u", .count = 50, .exclude_interacted = true});
  CHECK(fresh.size() == 47);
  auto long_memory = make();
  for (int i = 0; i < 10; ++i) learn(long_memory, "u", "i" + std::to_string(i), i);
  CHECK(slate_of(shop, {.user = "u", .count = 50}) ==
        slate_of(long_memory, {.user = "u", .count = 50}));
}

TEST_CASE("the least recently used users go first when there are too many") {
  auto shop = make({.max_users = 64 * 8, .exploration_weight = 0});
  for (int i = 0; i < 5000; ++i) {
    learn(shop, "u" + std::to_string(i), "i1");
    // Kept by being used again and again.
    if (i % 3 == 0) learn(shop, "keeper", "i2");
  }
  CHECK(shop.user_count() <= 64 * 8);
  CHECK(shop.user_count() > 64 * 4);
  const auto slate = shop.recommend({.user = "keeper", .count = 1});
  REQUIRE(slate);
  CHECK(slate->items[0].reason == pz::Reason::relevance);
  const auto gone = shop.recommend({.user = "u0", .count = 1});
  REQUIRE(gone);
  CHECK(gone->items[0].reason == pz::Reason::popular);
}

TEST_CASE("the same calls give the same slates, bit for bit") {
  auto a = make(), b = make();
  small_model::Random random{4};
  for (int event = 0; event < 500; ++event) {
    const std::string user = "u" + std::to_string(random.below(20));
    const std::string item = "i" + std::to_string(random.below(50));
    learn(a, user, item, event * 37);
    learn(b, user, item, event * 37);
    const auto x = a.recommend({.user = user});
    const auto y = b.recommend({.user = user});
    REQUIRE(x);
    REQUIRE(y);
    REQUIRE(items(*x) == items(*y));
    for (std::size_t r = 0; r < x->items.size(); ++r)
      REQUIRE(x->items[r].score == y->items[r].score);
  }
}

TEST_CASE("a slate outlives its recommender") {
  pz::Slate slate;
  {
    auto shop = make();
    REQUIRE(shop.recommend({.user = "u"}, slate));
  }
  CHECK(slate.items[0].item == "i0");
}

TEST_CASE("threads record, recommend, rank, merge and forget at once") {
  auto shop = make({.max_users = 640, .exploration_weight = 0});
  std::atomic<int> failures = 0;
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 6; ++t)
    threads.emplace_back([&shop, &failures, t] {
      small_model::Random random{t};
      pz::Slate slate;
      for (int i = 0; i < 800; ++i) {
        const std::string user = "u" + std::to_string(random.below(200));
        const std::string item = "i" + std::to_string(random.below(50));
        switch (random.below(6)) {
          case 0:
            failures += !shop.recommend({.user = user, .exclude_interacted = true}, slate);
            failures += slate.items.size() != 25;
            break;
          case 1:
            failures += !shop.record({.session = user, .item = item, .timestamp = i});
            break;
          case 2:
            failures += !shop.merge_session(user, user);
            break;
          case 3: {
            const std::vector<std::string_view> given{"i1", "i2", item};
            failures += !shop.rank({.user = user}, given, slate);
            break;
          }
          case 4:
            if (random.below(4) == 0) shop.forget(user);
            break;
          default:
            failures += !shop.record({.user = user, .item = item, .timestamp = i});
        }
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(shop.user_count() <= 640);
}

}  // namespace recommender_tests
