// What a server relies on: time, growth, memory and what clients may send.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <limits>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "small_model.hpp"

// Of its own: several test files are compiled as one.
namespace service_tests {

namespace pz = personalize;

namespace {

constexpr std::int64_t day = 86'400;
constexpr std::int64_t now = 1'700'000'000;

// No automatic updates, and a clock that stands at `now`, unless told otherwise.
pz::RecommenderOptions usual(pz::RecommenderOptions options = {.exploration_weight = 0}) {
  options.update_interval = {};
  if (!options.clock) options.clock = [] { return now; };
  options.recommendation_key = {{1, 2}};
  return options;
}

pz::Recommender make(const pz::RecommenderOptions& options = usual(),
                     const std::shared_ptr<const pz::Model>& model = small_model::model()) {
  auto shop = pz::Recommender::create(model, options);
  REQUIRE(shop);
  return std::move(*shop);
}

void learn(pz::Recommender& shop, std::string_view user, std::string_view item,
           std::int64_t timestamp = now) {
  const auto recorded = shop.record({.user = user, .item = item, .timestamp = timestamp});
  REQUIRE(recorded);
  REQUIRE(*recorded == pz::Recorded::learned);
}

std::vector<std::string> slate_of(pz::Recommender& shop, const pz::Request& request) {
  const auto slate = shop.recommend(request);
  REQUIRE(slate);
  std::vector<std::string> ids;
  for (const pz::Pick& pick : slate->items) ids.emplace_back(pick.item);
  return ids;
}

bool holds(const std::vector<std::string>& ids, std::string_view id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

double score_of(pz::Recommender& shop, std::string_view user, std::string_view item) {
  const auto parts = shop.explain({.user = user, .timestamp = now}, item);
  REQUIRE(parts);
  return static_cast<double>(parts->score);
}

std::shared_ptr<const pz::Model> model_of(pz::ModelParts parts) {
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  return *model;
}

}  // namespace

// ---------------------------------------------------------------------------------------- time

TEST_CASE("what is further ahead of the clock than the skew is refused everywhere, with its unit") {
  auto shop = make(usual({.exploration_weight = 0, .clock_skew = std::chrono::hours{1}}));
  const std::vector<std::string_view> shown{"i1"};
  const auto refusals = [&](std::int64_t t) {
    std::vector<std::string> messages;
    const auto note = [&](const auto& result) {
      if (!result) {
        CHECK(result.error().code == pz::Errc::invalid_argument);
        messages.push_back(result.error().message);
      }
    };
    note(shop.record({.user = "u", .item = "i1", .timestamp = t}));
    note(shop.record_impression({.user = "u", .items = shown, .timestamp = t}));
    note(shop.recommend({.user = "u", .timestamp = t}));
    note(shop.explain({.user = "u", .timestamp = t}, "i1"));
    pz::Slate slate;
    note(shop.rank({.user = "u", .timestamp = t}, shown, slate));
    const std::array<pz::Request, 1> requests{pz::Request{.user = "u", .timestamp = t}};
    std::array<pz::Slate, 1> slates;
    note(shop.recommend(requests, slates));
    note(shop.put_item({.item = "new", .creation_timestamp = t}));
    note(shop.update(t));
    return messages;
  };
  CHECK(refusals(now + 3600).empty());
  CHECK(refusals(std::numeric_limits<std::int64_t>::min()).empty());
  for (const auto& [time, unit] : std::vector<std::pair<std::int64_t, std::string>>{
           {now * 1'000, "milliseconds"},
           {now * 1'000'000, "microseconds"},
           {now * 1'000'000'000, "nanoseconds"},
           {(now - 300 * day) * 1'000, "milliseconds"}}) {
    const auto messages = refusals(time);
    REQUIRE(messages.size() == 8);
    for (const std::string& message : messages) CHECK(message.find(unit) != std::string::npos);
  }
  for (const std::int64_t time :
       {now + 3601, now + 40 * day, std::numeric_limits<std::int64_t>::max()}) {
    const auto messages = refusals(time);
    REQUIRE(messages.size() == 8);
    for (const std::string& message : messages)
      CHECK(message.find("looks like") == std::string::npos);
  }
}

TEST_CASE(
    "where no time is given it is the clock's, and the clock is the caller's if there is one") {
  std::int64_t clock = now;
  auto shop = make(usual({.exploration_weight = 0, .clock = [&] { return clock; }}));
  REQUIRE(shop.put_item({.item = "new"}));
  REQUIRE(shop.update());
  clock += 5 * day;
  REQUIRE(shop.record({.user = "u", .item = "i1"}));
  CHECK(shop.explain({.user = "u"}, "new")->age == 5 * day);
  CHECK(shop.update_report().timestamp == now);
}

TEST_CASE("a clock that runs ahead within the skew ages no item and counts at the clock's time") {
  auto shop = make(usual({.exploration_weight = 0, .clock_skew = std::chrono::days{100}}));
  REQUIRE(shop.put_item({.item = "new", .creation_timestamp = now}));
  REQUIRE(shop.update());
  learn(shop, "u", "i1", now + 90 * day);
  CHECK(shop.explain({.user = "u", .timestamp = now}, "new")->age == 0);
  const std::vector<std::string_view> shown{"i5"};
  REQUIRE(shop.record(
      {.user = "evil", .item = "i5", .timestamp = now + 90 * day, .impressions = shown}));
  for (int n = 0; n < 1000; ++n)
    REQUIRE(shop.record(
        {.user = "u" + std::to_string(n), .item = "i5", .timestamp = now, .impressions = shown}));
  CHECK(shop.explain({.user = "u", .timestamp = now}, "i5")->positive ==
        doctest::Approx(1001).epsilon(1e-3));
}

TEST_CASE(
    "a model whose statistics lie ahead of the clock is refused, and the error names the item") {
  for (int which = 0; which < 3; ++which) {
    auto parts = small_model::parts();
    auto& s = parts.statistics[7];
    (which == 0   ? s.first_timestamp
     : which == 1 ? s.last_timestamp
                  : s.creation_timestamp) = now * 1000;
    const auto shop = pz::Recommender::create(model_of(std::move(parts)), usual());
    REQUIRE_FALSE(shop);
    CHECK(shop.error().code == pz::Errc::invalid_argument);
    CHECK(shop.error().message.find("'i7'") != std::string::npos);
    CHECK(shop.error().message.find("milliseconds") != std::string::npos);
  }
}

TEST_CASE("impressions of long ago leave every score finite") {
  for (const std::int64_t then :
       {std::int64_t{0}, std::int64_t{946'684'800}, std::int64_t{956'703'932}}) {
    auto shop = make();
    learn(shop, "u", "i3");
    const std::vector<std::string_view> shown{"i7"};
    REQUIRE(shop.record_impression({.user = "v", .items = shown, .timestamp = then}));
    REQUIRE(shop.update());
    for (const char* user : {"u", "nobody"}) {
      const auto slate = shop.recommend({.user = user, .count = 50, .timestamp = now});
      REQUIRE(slate);
      CHECK(slate->items.size() == 50);
      for (const pz::Pick& pick : slate->items) CHECK(std::isfinite(pick.score));
    }
    CHECK(std::isfinite(shop.explain({.user = "u", .timestamp = now}, "i8")->quality));
  }
}

TEST_CASE(
    "the prior is moved by no item without expected events, and by none that has decayed away") {
  const std::vector<pz::ItemFeedback> counted{{3, 2}, {0, 1}, {5, 4}};
  const pz::GammaPrior start{10, 1}, plain = pz::fit_prior(counted, start);
  for (const double expected : {0.0, 1e-188, 1e-300}) {
    auto more = counted;
    more.push_back({0, expected});
    const pz::GammaPrior prior = pz::fit_prior(more, start);
    CHECK(prior.mean == doctest::Approx(plain.mean));
    CHECK(prior.strength == doctest::Approx(plain.strength));
  }
}

TEST_CASE("an event on an item that nobody knows does not count as a use of its user") {
  auto shop = make(usual({.max_users = 256, .exploration_weight = 0}));
  learn(shop, "once", "i1");
  for (int n = 0; n < 4000; ++n) {
    const auto unknown = shop.record({.user = "once", .item = "no such item"});
    REQUIRE(unknown);
    REQUIRE(*unknown == pz::Recorded::unknown_item);
    learn(shop, "u" + std::to_string(n), "i1");
  }
  const std::size_t users = shop.user_count();
  CHECK_FALSE(shop.forget("once"));
  REQUIRE(shop.record({.user = "once", .item = "no such item"}));
  CHECK(shop.user_count() == users);
}

TEST_CASE("an expired slate stays so, whatever time the next event claims") {
  auto shop = make(usual({.exploration_weight = 0, .slate_expiry = std::chrono::hours{1}}));
  learn(shop, "u", "i3", now - 2 * 3600);
  const auto slate = shop.recommend({.user = "u", .count = 5, .timestamp = now - 2 * 3600});
  const auto report = [&](std::int64_t t) {
    return *shop.record_impression({.user = "u", .recommendation_id = slate->id, .timestamp = t});
  };
  CHECK(report(now) == pz::Recorded::expired_slate);
  CHECK(report(now - 2 * 3600 + 1) == pz::Recorded::expired_slate);
  CHECK(report(std::numeric_limits<std::int64_t>::min()) == pz::Recorded::expired_slate);
}

// --------------------------------------------------------------------------------------- updates

TEST_CASE("a thread takes in what was put and learns when its interval has passed") {
  std::atomic<std::int64_t> clock{now};
  pz::RecommenderOptions options{.exploration_weight = 0, .clock = [&] { return clock.load(); }};
  options.recommendation_key = {{1, 2}};
  auto shop = make(options);
  learn(shop, "u", "i3");
  const auto slate = shop.recommend({.user = "u", .count = 5});
  REQUIRE(shop.record({.user = "u", .item = slate->items[3].item, .recommendation_id = slate->id}));
  REQUIRE(shop.put_item({.item = "new"}));
  CHECK(shop.model()->item_count() == 51);  // waits for it
  CHECK(shop.explain({.user = "u"}, slate->items[3].item)->quality == 0);
  CHECK_FALSE(shop.update_due());
  clock += 7200;
  // The report is the last thing that an update does.
  std::size_t learnt = 0;
  for (int n = 0; n < 2000 && learnt == 0; ++n) {
    std::this_thread::sleep_for(std::chrono::milliseconds{5});
    learnt = shop.update_report().items_learnt;
  }
  CHECK(learnt >= 5);
  CHECK(shop.explain({.user = "u"}, slate->items[3].item)->quality > 0);
}

TEST_CASE("work at a pace rests fifteen times as long as it worked, after a millisecond of it") {
  using pz::detail::Pace;
  std::vector<Pace::Clock::duration> rests;
  const auto begun = Pace::Clock::now();
  Pace pace([&](Pace::Clock::duration time) { rests.push_back(time); });
  while (rests.size() < 3) pace.step();
  Pace::Clock::duration sum{};
  for (const auto& rest : rests) {
    CHECK(rest >= 15 * std::chrono::milliseconds{1});
    sum += rest;
  }
  CHECK(sum <= 15 * (Pace::Clock::now() - begun));
  // Small steps ask for the time at every 64th.
  std::this_thread::sleep_for(std::chrono::milliseconds{2});
  for (std::size_t n = 1; n < 64; ++n) pace.step(n);
  CHECK(rests.size() == 3);
  pace.step(64);
  CHECK(rests.size() == 4);
  Pace without;
  without.step();
  without.rest();
}

// A service whose thread is to learn of a few items what gives all others another score.
struct Taught {
  std::atomic<std::int64_t> clock{now};
  std::atomic<bool> hold{false};  // requests within the log
  pz::Recommender shop;
  std::thread request;

  Taught()
      : shop(make({.exploration_weight = 0,
                   .updates = pz::Updates::by_thread,
                   .clock = [this] { return clock.load(); },
                   .recommendation_key = {{1, 2}},
                   .log =
                       [this](const pz::LogEntry&) {
                         while (hold) std::this_thread::sleep_for(std::chrono::milliseconds{1});
                       }},
                  small_model::model({.items = 60'000, .dimension = 8, .hidden = 8}))) {
    for (int n = 0; n < 30; ++n) {
      const std::string user = "u" + std::to_string(n);
      learn(shop, user, "i" + std::to_string(n));
      const auto slate = shop.recommend({.user = user, .count = 20});
      REQUIRE(slate);
      for (std::size_t pick = 0; pick < 20; pick += 2)
        REQUIRE(shop.record(
            {.user = user, .item = slate->items[pick].item, .recommendation_id = slate->id}));
    }
  }
  ~Taught() {
    hold = false;
    if (request.joinable()) request.join();
  }

  // From now on a request is under way, which takes no processor.
  void begin_request() {
    const auto slate = shop.recommend({.user = "u1", .count = 20});
    REQUIRE(slate);
    hold = true;
    request = std::thread([this, id = slate->id] {
      (void)shop.record_impression({.user = "u1", .recommendation_id = id});
    });
    std::this_thread::sleep_for(std::chrono::milliseconds{100});
  }

  // How long the update took, in the processor time that all threads took meanwhile. during: what
  // is done while it is under way.
  template <class During>
  double update(During during) {
    const std::clock_t begun = std::clock();
    clock += 7200;
    for (int n = 0; n < 5000 && shop.update_due(); ++n)
      std::this_thread::sleep_for(std::chrono::milliseconds{1});
    during();
    for (int n = 0; n < 5000 && shop.update_report().items_learnt == 0; ++n)
      std::this_thread::sleep_for(std::chrono::milliseconds{5});
    const double worked = static_cast<double>(std::clock() - begun) / CLOCKS_PER_SEC;
    const pz::UpdateReport report = shop.update_report();
    REQUIRE(report.items_learnt > 0);
    return std::chrono::duration<double>(report.duration).count() / worked;
  }
};

TEST_CASE("while requests are under way the recommender's own thread rests most of the time") {
  Taught alone;
  CHECK(alone.update([] {}) < 6);
  Taught beside;
  beside.begin_request();
  CHECK(beside.update([] {}) > 8);
}

TEST_CASE("an update under way takes no rests while a caller waits for one") {
  Taught taught;
  taught.begin_request();
  // The caller's own update finds nothing to do, and the report is that of the thread.
  CHECK(taught.update([&] { REQUIRE(taught.shop.update()); }) < 6);
}

TEST_CASE("a caller who runs updates hears when one is due, and nothing runs by itself") {
  std::int64_t clock = now;
  pz::RecommenderOptions options{
      .exploration_weight = 0, .updates = pz::Updates::by_caller, .clock = [&] { return clock; }};
  auto shop = make(options);
  clock += 8000;
  CHECK_FALSE(shop.update_due());  // nothing new
  learn(shop, "u", "i3");
  REQUIRE(shop.put_item({.item = "new"}));
  CHECK(shop.update_due());
  REQUIRE(shop.recommend({.user = "u"}));
  CHECK(shop.item_count() == 50);
  REQUIRE(shop.update());
  CHECK(shop.item_count() == 51);
  CHECK_FALSE(shop.update_due());
  // The next interval begins there, and either is something new by itself.
  learn(shop, "u", "i3");
  CHECK_FALSE(shop.update_due());
  clock += 8000;
  CHECK(shop.update_due());
  REQUIRE(shop.update());
  clock += 8000;
  CHECK_FALSE(shop.update_due());
  REQUIRE(shop.put_item({.item = "newer"}));
  CHECK(shop.update_due());
}

TEST_CASE("after an update that learnt, what is expected of a pick is still the model's alone") {
  auto shop = make();
  learn(shop, "u", "i3");
  for (int n = 0; n < 30; ++n) {
    const std::string user = "user" + std::to_string(n);
    learn(shop, user, "i3");
    const auto slate = shop.recommend({.user = user, .count = 10, .timestamp = now});
    REQUIRE(shop.record({.user = user,
                         .item = slate->items[7].item,
                         .timestamp = now,
                         .recommendation_id = slate->id}));
  }
  REQUIRE(shop.update());
  const pz::Request request{.user = "u", .count = 20, .timestamp = now};
  const auto slate = shop.recommend(request);
  std::vector<double> relevance, expected, quality;
  for (const pz::Pick& pick : slate->items) {
    const auto parts = shop.explain(request, pick.item);
    relevance.push_back(static_cast<double>(parts->relevance));
    quality.push_back(static_cast<double>(parts->quality));
    expected.push_back(-parts->expected);
  }
  REQUIRE(shop.record_impression({.user = "u", .recommendation_id = slate->id, .timestamp = now}));
  CHECK(*std::max_element(quality.begin(), quality.end()) -
            *std::min_element(quality.begin(), quality.end()) >
        0.1);
  // log(expected / examination) is affine in the model's own score.
  std::vector<double> logs;
  for (std::size_t i = 0; i < slate->items.size(); ++i) {
    expected[i] += shop.explain(request, slate->items[i].item)->expected;
    logs.push_back(std::log(expected[i] * std::log2(static_cast<double>(i) + 2)));
  }
  double sx = 0, sy = 0, sxx = 0, sxy = 0;
  const auto n = static_cast<double>(logs.size());
  for (std::size_t i = 0; i < logs.size(); ++i)
    sx += relevance[i], sy += logs[i], sxx += relevance[i] * relevance[i],
        sxy += relevance[i] * logs[i];
  const double slope = (n * sxy - sx * sy) / (n * sxx - sx * sx), at = (sy - slope * sx) / n;
  for (std::size_t i = 0; i < logs.size(); ++i)
    CHECK(logs[i] == doctest::Approx(at + slope * relevance[i]).epsilon(1e-3));
}

TEST_CASE("without an interval no update is ever due") {
  std::int64_t clock = now;
  auto shop = make({.update_interval = {}, .clock = [&] { return clock; }});
  learn(shop, "u", "i3");
  clock += 1000 * day;
  CHECK_FALSE(shop.update_due());
}

TEST_CASE("updates within requests learn") {
  std::int64_t clock = now;
  auto shop = make({.exploration_weight = 0, .updates = pz::Updates::in_requests, .clock = [&] {
                      return clock;
                    }});
  learn(shop, "u", "i3");
  const auto slate = shop.recommend({.user = "u", .count = 5});
  REQUIRE(slate);
  const std::string chosen(slate->items[3].item);
  REQUIRE(shop.record({.user = "u", .item = chosen, .recommendation_id = slate->id}));
  CHECK(shop.explain({.user = "u"}, chosen)->quality == 0);
  clock += 7200;
  learn(shop, "u", "i3", clock);
  CHECK(shop.update_report().items_learnt >= 5);
  CHECK(shop.explain({.user = "u"}, chosen)->quality > 0);
}

TEST_CASE("where no interaction is known of, no item has an age") {
  auto parts = small_model::parts();
  for (std::size_t i = 0; i < 50; ++i)
    parts.statistics[i] = {0, pz::no_timestamp, pz::no_timestamp, now - 9 * day};
  auto shop = make(usual(), model_of(std::move(parts)));
  CHECK_FALSE(shop.explain({.user = "u"}, "i7")->age);
  learn(shop, "u", "i3");
  CHECK(shop.explain({.user = "u"}, "i7")->age == 9 * day);
}

TEST_CASE("lists of impressions leave nothing in the memory of requests") {
  auto shop = make();
  learn(shop, "u", "i3");
  std::vector<std::string> ids;
  for (int i = 4; i < 40; ++i) ids.push_back("i" + std::to_string(i));
  const std::vector<std::string_view> shown(ids.begin(), ids.end());
  for (int n = 0; n < 10; ++n) REQUIRE(shop.record_impression({.user = "u", .items = shown}));
  const std::size_t before = shop.memory().scratch;
  for (int n = 0; n < 300; ++n) REQUIRE(shop.record_impression({.user = "u", .items = shown}));
  CHECK(shop.memory().scratch == before);
}

TEST_CASE("of what users say by lists of their own, only the first waits for a second") {
  pz::detail::Catalogue catalogue;
  using Kind = pz::ItemCounters::Kind;
  const auto moment = pz::Decay(pz::detail::Catalogue::half_life).at(now);
  const auto confirmed = [&](double positive, double unconfirmed) {
    catalogue.counters = std::make_shared<pz::ItemCounters>(2);
    catalogue.counters->add(Kind::positive, 1, positive, moment);
    catalogue.counters->add(Kind::unconfirmed, 1, unconfirmed, moment);
    return catalogue.confirmed_feedback_of(1, moment).positive;
  };
  CHECK(confirmed(1, 0) == doctest::Approx(1).epsilon(1e-3));
  CHECK(confirmed(1, 1) == doctest::Approx(0.25).epsilon(1e-3));
  CHECK(confirmed(0.5, 0.5) == doctest::Approx(0.125).epsilon(1e-3));
  CHECK(confirmed(3, 3) == doctest::Approx(2.25).epsilon(1e-3));
  CHECK(confirmed(3, 1) == doctest::Approx(2.25).epsilon(1e-3));
  CHECK(catalogue.confirmed_feedback_of(0, moment).positive == 0);
}

TEST_CASE("priors are those of all items with feedback, the well known and the others apart") {
  auto parts = small_model::parts();
  std::array<std::uint64_t, 50> interactions{};
  for (std::size_t i = 0; i < 50; ++i)
    parts.statistics[i].interactions = interactions[i] = i % 2 == 0 ? 100 : 0;
  auto shop = make(usual(), model_of(std::move(parts)));
  for (int n = 0; n < 60; ++n) {
    const std::string user = "u" + std::to_string(n);
    learn(shop, user, "i" + std::to_string(n % 50));
    ++interactions[static_cast<std::size_t>(n % 50)];
    const auto slate = shop.recommend({.user = user, .count = 20});
    REQUIRE(slate);
    for (std::size_t pick = 0; pick < 20; pick += n % 3 == 0 ? 3 : 4) {
      const std::string item(slate->items[pick].item);
      REQUIRE(shop.record({.user = user, .item = item, .recommendation_id = slate->id}));
      ++interactions[std::stoul(item.substr(1))];
    }
  }
  REQUIRE(shop.update());
  for (const bool well_known : {true, false}) {
    CAPTURE(well_known);
    std::vector<pz::Explanation> seen;
    std::vector<pz::ItemFeedback> counted;
    for (std::uint32_t i = 0; i < 50; ++i) {
      if ((interactions[i] >= 10) != well_known) continue;
      const auto of = shop.explain({.user = "fresh"}, "i" + std::to_string(i));
      REQUIRE(of);
      if (of->expected == 0) continue;
      seen.push_back(*of);
      counted.push_back({of->positive, of->expected});
    }
    REQUIRE(seen.size() > 5);
    const pz::GammaPrior prior =
        pz::fit_prior(counted, well_known ? pz::GammaPrior{10, 1} : pz::GammaPrior{2, 1});
    REQUIRE(std::abs(prior.mean - 1) > 0.05);
    for (const pz::Explanation& of : seen) {
      const auto posterior = pz::posterior(prior, {of.positive, of.expected});
      CHECK(of.uncertainty == doctest::Approx(posterior.deviation).epsilon(1e-3));
      // The same for any slope and level: how far apart two items' qualities are.
      const auto first = pz::posterior(prior, {seen[0].positive, seen[0].expected});
      const auto last = pz::posterior(prior, {seen.back().positive, seen.back().expected});
      CHECK(static_cast<double>((of.quality - seen[0].quality) * (last.mean - first.mean)) ==
            doctest::Approx(static_cast<double>((posterior.mean - first.mean) *
                                                (seen.back().quality - seen[0].quality)))
                .epsilon(1e-3));
    }
  }
}

TEST_CASE("an item that some kind of users choose is moved towards them") {
  auto shop = make();
  const auto slate_for = [&](const std::string& user, const char* item) {
    learn(shop, user, item);
    const auto slate = shop.recommend({.user = user, .count = 50});
    REQUIRE(slate);
    return *slate;
  };
  const std::string theirs(slate_for("one", "i3").items[1].item);
  const std::string others(slate_for("another", "i20").items[1].item);
  REQUIRE(theirs != others);
  for (int n = 0; n < 80; ++n) {
    const bool chooses = n % 2 == 0;
    const std::string user = "u" + std::to_string(n);
    const pz::Slate slate = slate_for(user, chooses ? "i3" : "i20");
    REQUIRE(shop.record(
        {.user = user, .item = chooses ? theirs : others, .recommendation_id = slate.id}));
  }
  REQUIRE(shop.update());
  learn(shop, "like those", "i3");
  learn(shop, "like the others", "i20");
  const auto taste = [&](const char* user, const std::string& item) {
    return shop.explain({.user = user}, item)->taste;
  };
  CHECK(taste("like those", theirs) > taste("like the others", theirs) + 0.01f);
  CHECK(taste("like those", others) < taste("like the others", others) - 0.01f);
  // It stays so when the next update has heard nothing more of them.
  learn(shop, "somebody", "i9");
  const float before = taste("like those", theirs);
  REQUIRE(shop.update());
  CHECK(taste("like those", theirs) == doctest::Approx(before).epsilon(0.01));
}

TEST_CASE("an item that was passed over lowers none but itself") {
  const auto model = small_model::model({.items = 3000, .dimension = 8, .hidden = 8});
  auto shop = make(usual(), model);
  learn(shop, "u", "i3");
  const std::vector<std::string_view> shown{"i2054", "i1030"};
  REQUIRE(shop.record_impression({.user = "u", .items = shown}));
  for (std::uint32_t i = 0; i < 3000; ++i) {
    const auto of = shop.explain({.user = "u"}, "i" + std::to_string(i));
    REQUIRE(of);
    if (i == 2054 || i == 1030)
      CHECK(of->discount > 0);
    else
      REQUIRE(of->discount == 0);
  }
}

TEST_CASE("for who is new, an item that one user chose stands before one that nobody did") {
  auto parts = small_model::parts();
  for (std::size_t i = 0; i < 50; ++i) parts.statistics[i].interactions = i == 40 ? 1 : 0;
  auto shop = make(usual(), model_of(std::move(parts)));
  CHECK(slate_of(shop, {.user = "nobody", .count = 2}) == std::vector<std::string>{"i40", "i0"});
}

TEST_CASE("the popular items are looked at no further than they are asked for") {
  const auto model = small_model::model();
  const auto options = usual();
  auto catalogue = *pz::detail::CatalogueBuilder::first(model, options, pz::kernels::chosen(),
                                                        pz::detail::HashKey{}, now, now);
  const auto visited = [&](std::size_t wanted) {
    std::vector<std::uint32_t> items;
    catalogue.for_popular([&](std::uint32_t item) {
      items.push_back(item);
      return items.size() < wanted;
    });
    return items;
  };
  const auto all = visited(50);
  REQUIRE(all.size() == 50);
  // Some as if they had come later.
  catalogue.later_items = {all[4], all[10], all[48]};
  std::sort(catalogue.later_items.begin(), catalogue.later_items.end());
  catalogue.popular_later = {all[4], all[10], all[48]};
  for (std::size_t wanted = 1; wanted <= 50; ++wanted)
    CHECK(visited(wanted) == std::vector<std::uint32_t>(
                                 all.begin(), all.begin() + static_cast<std::ptrdiff_t>(wanted)));
}

TEST_CASE("without feedback a catalogue holds nothing for it") {
  const auto with = make(usual({.exploration_weight = 0})).memory().catalogue;
  const auto without = make(usual({.exploration_weight = 0, .feedback = false})).memory().catalogue;
  CHECK(without + 50 * 2 * sizeof(float) <= with);
}

// ----------------------------------------------------------------------------------------- items

TEST_CASE("an item that was put again keeps what is not named") {
  auto shop = make();
  learn(shop, "u", "i3");
  const auto vector = [&](std::string_view id) {
    const auto model = shop.model();
    std::vector<float> row(model->dimension());
    model->parts().item_vectors.row(*model->find_item(id), row);
    return row;
  };
  REQUIRE(shop.put_item(
      {.item = "a", .creation_timestamp = now - 9 * day, .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.put_item({.item = "b",
                         .creation_timestamp = now - 9 * day,
                         .fields = {{"GENRE", "bow"}, {"PRICE", "2"}}}));
  REQUIRE(shop.update());
  CHECK(vector("a") != vector("b"));
  REQUIRE(shop.put_item({.item = "a", .fields = {{"PRICE", "2"}}}));  // GENRE stays
  REQUIRE(shop.update());
  CHECK(vector("a") == vector("b"));
  CHECK(shop.explain({.user = "u", .timestamp = now}, "a")->age == 9 * day);
  REQUIRE(shop.put_item({.item = "a", .creation_timestamp = now - 3 * day}));  // the vector stays
  REQUIRE(shop.update());
  CHECK(vector("a") == vector("b"));
  CHECK(shop.explain({.user = "u", .timestamp = now}, "a")->age == 3 * day);

  // A trained item keeps its vector, and its creation unless a new one is named.
  const auto trained = vector("i1");
  const auto created = shop.model()->parts().statistics[1].creation_timestamp;
  REQUIRE(shop.put_item({.item = "i1", .fields = {{"GENRE", "shield"}}}));
  REQUIRE(shop.update());
  CHECK(vector("i1") == trained);
  CHECK(shop.model()->parts().statistics[1].creation_timestamp == created);
}

TEST_CASE(
    "an item of the model that was never interacted with keeps its vector unless fields are "
    "given") {
  auto parts = small_model::parts();
  parts.statistics[4].interactions = 0;
  const auto model = model_of(std::move(parts));
  auto shop = make(usual(), model);
  learn(shop, "u", "i3");
  const auto before = score_of(shop, "u", "i4");
  REQUIRE(shop.put_item({.item = "i4", .creation_timestamp = now - 5}));
  REQUIRE(shop.update());
  CHECK(score_of(shop, "u", "i4") == before);
  REQUIRE(shop.put_item({.item = "i4", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.update());
  CHECK(score_of(shop, "u", "i4") != before);
  // Events on it go through its new vector.
  auto twin = make(usual(), model);
  learn(twin, "u", "i3");
  learn(shop, "u", "i4");
  learn(twin, "u", "i4");
  CHECK(slate_of(shop, {.user = "u", .count = 30}) != slate_of(twin, {.user = "u", .count = 30}));
}

TEST_CASE("of a new item of which nothing is known the vector is neutral and the bias low") {
  auto parts = small_model::parts({.items = 400});
  for (std::size_t i = 0; i < 400; ++i) parts.biases[i] = 3.0f - 0.015f * static_cast<float>(i);
  auto shop = make(usual(), model_of(std::move(parts)));
  REQUIRE(shop.put_item({.item = "new"}));
  REQUIRE(shop.update());
  const auto model = shop.model();
  const std::uint32_t item = *model->find_item("new");
  for (std::size_t c = 0; c < model->dimension(); ++c)
    CHECK(model->parts().item_vectors.at(item, c) == 0);
  // A tenth of the items have a lower one.
  const auto lower = std::count_if(model->parts().biases.begin(), model->parts().biases.end() - 1,
                                   [&](float b) { return b < model->parts().biases[item]; });
  CHECK(lower == 40);
}

TEST_CASE(
    "a new item with metadata lies near its like and apart from new items of other metadata") {
  // Items in three groups, each around its genre's embedding.
  auto parts = small_model::parts({.items = 300});
  small_model::Random random{11};
  pz::Matrix& genres = parts.fields[0].embedding;
  for (float& v : genres.f32()) v = random.normal();
  const std::size_t d = parts.item_vectors.columns();
  for (std::size_t i = 0; i < 300; ++i)
    for (std::size_t c = 0; c < d; ++c)
      parts.item_vectors.f32()[i * d + c] = genres.at(i % 3, c) + 0.4f * random.normal();
  for (std::size_t i = 0; i < 300; ++i) parts.biases[i] = i % 3 == 0 ? -2.0f : 3.0f;
  auto shop = make(usual(), model_of(std::move(parts)));
  REQUIRE(shop.put_item({.item = "bow", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.put_item({.item = "cheap bow", .fields = {{"GENRE", "bow"}, {"PRICE", "0.5"}}}));
  REQUIRE(shop.put_item({.item = "dear bow", .fields = {{"GENRE", "bow"}, {"PRICE", "9"}}}));
  REQUIRE(shop.update());
  const auto model = shop.model();
  const auto distance = [&](std::uint32_t a, std::uint32_t b) {
    double sum = 0;
    for (std::size_t c = 0; c < d; ++c) {
      const double e = static_cast<double>(model->parts().item_vectors.at(a, c)) -
                       static_cast<double>(model->parts().item_vectors.at(b, c));
      sum += e * e;
    }
    return std::sqrt(sum);
  };
  const std::uint32_t bow = *model->find_item("bow"), cheap = *model->find_item("cheap bow"),
                      dear = *model->find_item("dear bow");
  std::vector<std::pair<double, std::uint32_t>> order;
  for (std::uint32_t i = 0; i < 300; ++i) order.push_back({distance(bow, i), i});
  std::sort(order.begin(), order.end());
  for (int n = 0; n < 50; ++n) CHECK(order[static_cast<std::size_t>(n)].second % 3 == 0);
  CHECK(distance(cheap, dear) > 0.1 * distance(0, 1));
  CHECK(distance(bow, cheap) > 0);
  // It is as long as its like at most, and its bias is the mean of theirs.
  const auto square = [&](std::uint32_t item) {
    double sum = 0;
    for (std::size_t c = 0; c < d; ++c) {
      const auto v = static_cast<double>(model->parts().item_vectors.at(item, c));
      sum += v * v;
    }
    return sum;
  };
  double longest = 0;
  for (std::uint32_t i = 0; i < 300; i += 3) longest = std::max(longest, square(i));
  CHECK(square(bow) <= longest);
  CHECK(model->parts().biases[bow] == doctest::Approx(-2));
}

TEST_CASE("an item that waits remembers its events, which count when it is in") {
  auto shop = make();
  learn(shop, "u", "i3");
  REQUIRE(shop.put_item({.item = "new", .fields = {{"GENRE", "bow"}}}));
  const auto early = shop.record({.user = "u", .item = "new", .timestamp = now, .event_id = "e1"});
  REQUIRE(early);
  CHECK(*early == pz::Recorded::pending_item);
  CHECK(pz::name(*early) == "pending item");
  CHECK(*shop.record({.user = "u", .item = "new", .timestamp = now, .event_id = "e1"}) ==
        pz::Recorded::duplicate);
  CHECK(*shop.record({.session = "s", .item = "new", .timestamp = now}) ==
        pz::Recorded::pending_item);
  CHECK(*shop.record({.user = "u", .item = "never put", .timestamp = now}) ==
        pz::Recorded::unknown_item);
  REQUIRE(shop.update());
  CHECK(shop.update_report().events_replayed == 2);
  CHECK(shop.user_count() == 2);

  auto late = make();
  learn(late, "u", "i3");
  REQUIRE(late.put_item({.item = "new", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(late.update());
  learn(late, "u", "new");
  CHECK(slate_of(shop, {.user = "u", .count = 51}) == slate_of(late, {.user = "u", .count = 51}));
  CHECK_FALSE(holds(slate_of(shop, {.user = "u", .count = 51, .exclude_interacted = true}), "new"));
}

TEST_CASE("what waits is bounded in bytes, with one entry an id") {
  auto shop = make(usual({.exploration_weight = 0, .pending_bytes = 1 << 14}));
  for (int n = 0; n < 10'000; ++n) REQUIRE(shop.put_item({.item = "same"}));
  const auto one = shop.memory().pending;
  CHECK(one < 1000);
  int taken = 0;
  while (taken < 1000 && shop.put_item({.item = "item " + std::to_string(taken)})) ++taken;
  CHECK(taken > 10);
  CHECK(taken < 200);
  const auto refused = shop.put_item({.item = "one more"});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == pz::Errc::limit);
  CHECK(shop.memory().pending <= 1 << 14);
  // Events on what waits find no room either.
  CHECK(*shop.record({.user = "u", .item = "same", .timestamp = now}) ==
        pz::Recorded::unknown_item);
  REQUIRE(shop.update());
  CHECK(shop.item_count() == static_cast<std::size_t>(51 + taken));
  CHECK(shop.put_item({.item = "one more"}));
}

TEST_CASE("what new items take is in memory()") {
  auto shop = make();
  const std::size_t before = shop.memory().catalogue;
  constexpr std::size_t items = 4096;
  for (std::size_t n = 0; n < items; ++n)
    REQUIRE(shop.put_item({.item = "an id of thirty-two bytes, no. " + std::to_string(n)}));
  REQUIRE(shop.update());
  // An id and its string, and a row of 16 values or more.
  CHECK(shop.memory().catalogue >= before + items * (32 + sizeof(std::string) + 16));
}

TEST_CASE("events that wait count towards the same budget until they are in") {
  auto shop = make();
  REQUIRE(shop.put_item({.item = "new"}));
  const std::size_t before = shop.memory().pending;
  for (int n = 0; n < 10; ++n)
    REQUIRE(*shop.record({.user = "u", .item = "new", .timestamp = now}) ==
            pz::Recorded::pending_item);
  CHECK(shop.memory().pending >= before + 10 * 3 * sizeof(std::string));
  REQUIRE(shop.update());
  CHECK(shop.update_report().events_replayed == 10);
  CHECK(shop.memory().pending <= before);
}

TEST_CASE("put_item says at once what cannot be taken in") {
  auto shop = make();
  const auto refused = [&](const pz::NewItem& item, std::string_view text) {
    const auto put = shop.put_item(item);
    REQUIRE_FALSE(put);
    CHECK(put.error().code == pz::Errc::invalid_argument);
    CHECK(put.error().message.find(text) != std::string::npos);
  };
  refused({.item = ""}, "1 to 256");
  refused({.item = std::string(257, 'x')}, "1 to 256");
  refused({.item = std::string_view("a\0b", 3)}, "UTF-8");
  refused({.item = "a\xff"}, "UTF-8");
  refused({.item = "x", .fields = {{"GENRES", "bow"}}}, "GENRE, PRICE");
  const std::string large(70'000, 'x');
  refused({.item = "x", .fields = {{"GENRE", large}}}, "64 KiB");
  REQUIRE(shop.put_item({.item = "x", .fields = {{"GENRE", "bow|no such|shield"}}}));
  REQUIRE(shop.update());
  CHECK(shop.update_report().items_added == 1);
  CHECK(shop.update_report().values_unknown == 1);
}

TEST_CASE("an item that was removed is nowhere, and comes back with what was learnt of it") {
  auto shop = make();
  learn(shop, "u", "i3");
  const auto before = slate_of(shop, {.user = "u", .count = 50});
  const auto popular = slate_of(shop, {.user = "nobody", .count = 50});
  REQUIRE(holds(before, "i7"));
  CHECK_FALSE(*shop.remove_item("no such item"));
  CHECK(*shop.remove_item("i7"));
  CHECK(holds(slate_of(shop, {.user = "u", .count = 50}), "i7"));
  REQUIRE(shop.update());
  CHECK(shop.update_report().items_removed == 1);
  CHECK_FALSE(*shop.remove_item("i7"));
  for (const char* user : {"u", "nobody"}) {
    const auto slate = slate_of(shop, {.user = user, .count = 50});
    CHECK(slate.size() == 49);
    CHECK_FALSE(holds(slate, "i7"));
  }
  CHECK_FALSE(shop.explain({.user = "u", .timestamp = now}, "i7"));
  CHECK(*shop.record({.user = "u", .item = "i7", .timestamp = now}) == pz::Recorded::unknown_item);
  const std::vector<std::string_view> given{"i7", "i8"};
  pz::Slate ranked;
  REQUIRE(shop.rank({.user = "u", .timestamp = now}, given, ranked));
  CHECK(ranked.items[1].item == "i7");
  CHECK(ranked.items[1].reason == pz::Reason::unknown);
  REQUIRE(shop.record_impression({.user = "v", .items = given, .timestamp = now}));
  REQUIRE(shop.update());
  CHECK_FALSE(holds(slate_of(shop, {.user = "u", .count = 50}), "i7"));

  REQUIRE(shop.put_item({.item = "i7"}));
  REQUIRE(shop.update());
  CHECK(holds(slate_of(shop, {.user = "u", .count = 50}), "i7"));
  CHECK(slate_of(shop, {.user = "nobody", .count = 50}).size() == popular.size());

  // Nor is it in the model that is saved meanwhile.
  CHECK(shop.model()->find_item("i7"));
  CHECK(*shop.remove_item("i7"));
  REQUIRE(shop.update());
  CHECK(shop.model()->item_count() == 49);
  CHECK_FALSE(shop.model()->find_item("i7"));
  CHECK(shop.item_count() == 50);

  // The numbers of masks stay what they were, while those of the saved model close up.
  CHECK(*shop.model()->find_item("i8") == 7);
  CHECK(*shop.find_item("i8") == 8);
  CHECK(*shop.find_item("i7") == 7);
  CHECK_FALSE(shop.find_item("i50"));
  pz::ItemMask only(50);
  only.set(*shop.find_item("i8"));
  CHECK(slate_of(shop, {.user = "u", .count = 50, .eligible = &only}) ==
        std::vector<std::string>{"i8"});

  // What was put and removed before an update never was.
  REQUIRE(shop.put_item({.item = "short"}));
  CHECK(*shop.remove_item("short"));
  REQUIRE(shop.update());
  CHECK(shop.item_count() == 50);
  CHECK_FALSE(shop.model()->find_item("short"));
  CHECK_FALSE(shop.find_item("short"));
}

TEST_CASE("popular items are ordered by interactions and by what impressions taught") {
  auto parts = small_model::parts({.items = 30});
  for (auto& s : parts.statistics) s = {50, now - 90 * day, now - day, now - 90 * day};
  auto shop = make(usual({.exploration_weight = 0}), model_of(std::move(parts)));
  const auto place_of = [&](std::string_view item) {
    const auto slate = slate_of(shop, {.user = "nobody", .count = 30});
    return std::find(slate.begin(), slate.end(), item) - slate.begin();
  };
  CHECK(place_of("i2") < place_of("i9"));
  // As many interactions with each; only one is chosen where both are shown.
  const std::vector<std::string_view> both{"i2", "i9"};
  for (int n = 0; n < 40; ++n) {
    const std::string user = "u" + std::to_string(n), other = "v" + std::to_string(n);
    learn(shop, user, "i5");
    REQUIRE(shop.record({.user = user, .item = "i9", .timestamp = now, .impressions = both}));
    learn(shop, other, "i2");
  }
  REQUIRE(shop.update());
  CHECK(place_of("i9") < place_of("i2"));
}

TEST_CASE("a new item takes after trained items, however near the others are") {
  auto parts = small_model::parts({.items = 60});
  small_model::Random random{5};
  const pz::Matrix& genres = parts.fields[0].embedding;
  const std::size_t d = parts.item_vectors.columns();
  for (std::size_t i = 0; i < 60; ++i) {
    const bool trained = i % 2 == 0;
    for (std::size_t c = 0; c < d; ++c)
      parts.item_vectors.f32()[i * d + c] = genres.at(0, c) + (trained ? random.normal() : 0.0f);
    parts.statistics[i] = {trained ? 20u : 0u, now - 90 * day, now - day, now - 90 * day};
    parts.biases[i] = trained ? -2.0f : 7.0f;
  }
  auto shop = make(usual(), model_of(std::move(parts)));
  REQUIRE(shop.put_item({.item = "bow", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.update());
  CHECK(shop.model()->parts().biases[*shop.find_item("bow")] == doctest::Approx(-2));
}

TEST_CASE("an item without any time is new until somebody interacts with it, and then it ages") {
  auto parts = small_model::parts({.items = 30});
  for (std::size_t i = 0; i < 30; ++i)
    parts.statistics[i] = {20, now - 90 * day, now - day, now - 90 * day};
  for (const std::size_t i : {std::size_t{4}, std::size_t{5}})
    parts.statistics[i] = {0, pz::no_timestamp, pz::no_timestamp, pz::no_timestamp};
  std::int64_t clock = now;
  auto shop = make(usual({.exploration_weight = 1, .clock = [&] { return clock; }}),
                   model_of(std::move(parts)));
  const auto explorable = [&](std::string_view item) {
    const auto explanation = shop.explain({.user = "u"}, item);
    REQUIRE(explanation);
    return explanation->explorable;
  };
  CHECK(explorable("i4"));
  CHECK(explorable("i5"));
  CHECK_FALSE(explorable("i6"));
  learn(shop, "u", "i4", clock);
  REQUIRE(shop.update());
  CHECK(explorable("i4"));
  clock += 60 * day;
  learn(shop, "v", "i7", clock);
  REQUIRE(shop.update());
  CHECK_FALSE(explorable("i4"));
  CHECK(explorable("i5"));
}

// Half of the items are new: they are explored.
std::shared_ptr<const pz::Model> half_new() {
  auto parts = small_model::parts();
  for (std::size_t i = 0; i < parts.statistics.size(); i += 2)
    parts.statistics[i] = {0, pz::no_timestamp, now, now - day};
  return model_of(std::move(parts));
}

TEST_CASE("a batch gives each request what it gets alone, also where one user asks several times") {
  auto together = make(usual({.exploration_weight = 1}), half_new());
  auto alone = make(usual({.exploration_weight = 1}), half_new());
  for (pz::Recommender* shop : {&together, &alone})
    for (const char* user : {"u", "v"}) learn(*shop, user, "i3");
  std::vector<pz::Request> requests;
  for (const char* user : {"u", "u", "v", "nobody", "u", "nobody", "v"})
    requests.push_back({.user = user, .count = 20, .timestamp = now});
  std::vector<pz::Slate> slates(requests.size());
  REQUIRE(together.recommend(requests, slates));
  std::vector<std::vector<std::string>> of_u;
  for (std::size_t r = 0; r < requests.size(); ++r) {
    CAPTURE(r);
    std::vector<std::string> ids;
    for (const pz::Pick& pick : slates[r].items) ids.emplace_back(pick.item);
    CHECK(ids == slate_of(alone, requests[r]));
    if (requests[r].user == "u") of_u.push_back(ids);
  }
  CHECK(of_u[0] != of_u[1]);
  CHECK(of_u[1] != of_u[2]);
}

TEST_CASE(
    "a pick's score, an item's rank and its explanation are one number, ignored or explored") {
  auto shop = make(usual({.exploration_weight = 1}), half_new());
  learn(shop, "u", "i3");
  const std::vector<std::string_view> given{"i4", "i5", "i8", "i9"};
  const double before = score_of(shop, "u", "i5");
  for (int n = 0; n < 3; ++n)
    REQUIRE(shop.record_impression({.user = "u", .items = given, .timestamp = now}));
  CHECK(score_of(shop, "u", "i5") < before);
  pz::Slate ranked;
  REQUIRE(shop.rank({.user = "u", .timestamp = now}, given, ranked));
  for (const pz::Pick& pick : ranked.items)
    CHECK(static_cast<double>(pick.score) ==
          doctest::Approx(score_of(shop, "u", pick.item)).epsilon(1e-5));
  std::size_t explored = 0;
  for (int n = 0; n < 10; ++n) {
    const auto slate = shop.recommend({.user = "u", .count = 20, .timestamp = now});
    REQUIRE(slate);
    for (const pz::Pick& pick : slate->items) {
      explored += pick.reason == pz::Reason::exploration;
      CHECK(static_cast<double>(pick.score) ==
            doctest::Approx(score_of(shop, "u", pick.item)).epsilon(1e-5));
    }
  }
  CHECK(explored > 20);
}

TEST_CASE("a catalogue of which every item was removed gives empty slates, and no model") {
  auto shop = make(usual(), model_of(small_model::parts({.items = 3})));
  learn(shop, "u", "i1");
  for (const char* item : {"i0", "i1", "i2"}) CHECK(*shop.remove_item(item));
  REQUIRE(shop.update());
  for (const char* user : {"u", "nobody"})
    CHECK(slate_of(shop, {.user = user, .count = 50}).empty());
  CHECK(shop.model() == nullptr);
  REQUIRE(shop.put_item({.item = "i1"}));
  REQUIRE(shop.update());
  CHECK(slate_of(shop, {.user = "u", .count = 50}) == std::vector<std::string>{"i1"});
  CHECK(shop.model()->item_count() == 1);
}

TEST_CASE("an item that is explored leaves the pool when it is removed") {
  auto shop = make(usual({.exploration_weight = 1}));
  learn(shop, "u", "i3");
  REQUIRE(shop.put_item({.item = "new", .creation_timestamp = now}));
  REQUIRE(shop.update());
  CHECK(shop.explain({.user = "u", .timestamp = now}, "new")->explorable);
  CHECK(*shop.remove_item("new"));
  REQUIRE(shop.update());
  const auto slate = shop.recommend({.user = "u", .count = 51, .timestamp = now});
  for (const pz::Pick& pick : slate->items) CHECK(pick.item != "new");
}

TEST_CASE("an item without interactions and without a creation timestamp is new") {
  auto parts = small_model::parts();
  parts.statistics[5] = {};
  parts.statistics[6] = {3, pz::no_timestamp, pz::no_timestamp, pz::no_timestamp};
  auto shop = make(usual({.exploration_weight = 1}), model_of(std::move(parts)));
  learn(shop, "u", "i3");
  const pz::Request request{.user = "u", .timestamp = now};
  CHECK(shop.explain(request, "i5")->explorable);
  CHECK(shop.explain(request, "i5")->age == 0);
  CHECK_FALSE(shop.explain(request, "i6")->explorable);
  // From its first interaction on it has an age.
  learn(shop, "v", "i5");
  REQUIRE(shop.update());
  learn(shop, "v", "i3", now);
  CHECK(shop.explain(request, "i5")->age == 0);
}

TEST_CASE("many generations share a catalogue and agree with one that was built at once") {
  auto step = make(usual({.exploration_weight = 0.4f}));
  auto once = make(usual({.exploration_weight = 0.4f}));
  for (int n = 0; n < 60; ++n) {
    const std::string id = "new" + std::to_string(n);
    const pz::NewItem item{.item = id,
                           .creation_timestamp = now,
                           .fields = {{"GENRE", n % 2 ? "bow" : "shield"}, {"PRICE", "2"}}};
    REQUIRE(step.put_item(item));
    REQUIRE(step.update());
    REQUIRE(once.put_item(item));
  }
  REQUIRE(once.update());
  CHECK(step.item_count() == 110);
  for (auto* shop : {&step, &once}) {
    learn(*shop, "u", "i3");
    learn(*shop, "u", "new7");
  }
  CHECK(slate_of(step, {.user = "u", .count = 110}) == slate_of(once, {.user = "u", .count = 110}));
  CHECK(slate_of(step, {.user = "nobody", .count = 110}) ==
        slate_of(once, {.user = "nobody", .count = 110}));
  CHECK(step.model()->parts().item_vectors == once.model()->parts().item_vectors);
}

TEST_CASE("a slate's items stay readable while generations come and go") {
  auto shop = make();
  REQUIRE(shop.put_item({.item = "an item with a name of more than fifteen bytes"}));
  REQUIRE(shop.update());
  const auto slate = shop.recommend({.user = "nobody", .count = 51});
  for (int n = 0; n < 50; ++n) {
    REQUIRE(shop.put_item({.item = "new" + std::to_string(n)}));
    REQUIRE(shop.update());
  }
  const auto kept =
      std::find_if(slate->items.begin(), slate->items.end(), [](const pz::Pick& pick) {
        return pick.item == "an item with a name of more than fifteen bytes";
      });
  CHECK(kept != slate->items.end());
}

// ------------------------------------------------------------------------------------ popularity

TEST_CASE("what is interacted with at run time becomes popular, and fades as training's does") {
  std::int64_t clock = now;
  auto shop = make(usual({.exploration_weight = 0, .clock = [&] { return clock; }}));
  const auto first = [&] { return slate_of(shop, {.user = "nobody", .count = 1})[0]; };
  REQUIRE(first() == "i0");
  for (int n = 0; n < 400; ++n) learn(shop, "u" + std::to_string(n), "i40");
  CHECK(first() == "i0");
  REQUIRE(shop.update());
  CHECK(first() == "i40");
  const auto slate = shop.recommend({.user = "nobody", .count = 50});
  double shares = 0;
  for (const pz::Pick& pick : slate->items) shares += static_cast<double>(pick.score);
  CHECK(shares == doctest::Approx(1).epsilon(1e-3));
  CHECK(static_cast<double>(slate->items[0].score) ==
        doctest::Approx(1360.0 / (48775.0 + 400)).epsilon(1e-3));

  // Both fade alike: a year later the order is the same, and new events weigh more.
  clock += 365 * day;
  for (int n = 0; n < 3; ++n) learn(shop, "late" + std::to_string(n), "i45", clock);
  REQUIRE(shop.update());
  CHECK(first() == "i45");
  CHECK(slate_of(shop, {.user = "nobody", .count = 2})[1] == "i40");
}

TEST_CASE("an item becomes well known by interactions at run time") {
  auto parts = small_model::parts();
  parts.statistics[9] = {0, pz::no_timestamp, pz::no_timestamp, now - 100 * day};
  auto shop = make(usual(), model_of(std::move(parts)));
  const auto uncertainty = [&] {
    return static_cast<double>(shop.explain({.user = "x", .timestamp = now}, "i9")->uncertainty);
  };
  CHECK(uncertainty() == doctest::Approx(std::sqrt(std::log(1.5))).epsilon(1e-4));
  for (int n = 0; n < 10; ++n) learn(shop, "u" + std::to_string(n), "i9");
  CHECK(uncertainty() == doctest::Approx(std::sqrt(std::log(1.1))).epsilon(1e-4));
}

// ---------------------------------------------------------------------------------- hostile input

TEST_CASE("ids that no table or log line could hold are refused") {
  auto shop = make();
  const std::vector<std::string_view> bad{std::string_view("a\0b", 3),
                                          "line\nbreak",
                                          "\x7f",
                                          "\xff",
                                          "\xc3",
                                          "\xed\xa0\x80",
                                          "\xc0\xaf"};
  for (const std::string_view id : bad) {
    CHECK_FALSE(shop.record({.user = id, .item = "i1", .timestamp = now}));
    CHECK_FALSE(shop.record({.session = id, .item = "i1", .timestamp = now}));
    CHECK_FALSE(shop.record({.user = "u", .item = "i1", .timestamp = now, .event_id = id}));
    CHECK(slate_of(shop, {.user = id}) == slate_of(shop, {.user = "nobody"}));
    CHECK_FALSE(shop.merge_session(id, "u"));
    CHECK_FALSE(shop.put_item({.item = id}));
    CHECK_FALSE(shop.forget(id));
  }
  CHECK(shop.user_count() == 0);
  CHECK(shop.record(
      {.user = "\xc3\xa9t\xc3\xa9 \xf0\x9f\x8f\xb9, \"quoted\"", .item = "i1", .timestamp = now}));
}

TEST_CASE("an item that a list repeats counts once") {
  auto once = make(), often = make();
  const std::vector<std::string_view> one{"i3", "i4"};
  std::vector<std::string_view> many(5000, "i3");
  many[1] = "i4";
  REQUIRE(once.record_impression({.user = "u", .items = one, .timestamp = now}));
  REQUIRE(often.record_impression({.user = "u", .items = many, .timestamp = now}));
  for (const char* item : {"i3", "i4"})
    CHECK(often.explain({.user = "x", .timestamp = now}, item)->expected ==
          once.explain({.user = "x", .timestamp = now}, item)->expected);
}

TEST_CASE("a user's choices of one item count once for others where they bring their own list") {
  auto shop = make();
  const std::vector<std::string_view> shown{"i7"};
  for (int n = 0; n < 1000; ++n)
    REQUIRE(shop.record(
        {.user = "evil", .item = "i7", .timestamp = now - n * 60, .impressions = shown}));
  CHECK(shop.explain({.user = "x", .timestamp = now}, "i7")->positive <= 1);
  CHECK(shop.explain({.user = "x", .timestamp = now}, "i7")->expected < 0.5);
  for (int n = 0; n < 10; ++n)
    REQUIRE(shop.record(
        {.user = "u" + std::to_string(n), .item = "i7", .timestamp = now, .impressions = shown}));
  CHECK(shop.explain({.user = "x", .timestamp = now}, "i7")->positive ==
        doctest::Approx(11).epsilon(0.01));
}

TEST_CASE("one user's own list moves an item by a quarter of a choice until a second confirms it") {
  const std::vector<std::string_view> shown{"i49"};
  const auto quality = [&](int users) {
    auto shop = make();
    for (int n = 0; n < users; ++n)
      REQUIRE(shop.record({.user = "u" + std::to_string(n),
                           .item = "i49",
                           .timestamp = now,
                           .impressions = shown}));
    REQUIRE(shop.update());
    return static_cast<double>(shop.explain({.user = "x", .timestamp = now}, "i49")->quality);
  };
  const double one = quality(1), ten = quality(10);
  CHECK(one < 0.05);
  CHECK(ten > 5 * one);
}

TEST_CASE("in a replay one user moves what ages are counted to by a week at most") {
  auto shop = make(usual({.exploration_weight = 0, .clock = [] { return now + 400 * day; }}));
  REQUIRE(shop.put_item({.item = "new", .creation_timestamp = now}));
  REQUIRE(shop.update());
  const auto age = [&] { return *shop.explain({.user = "x"}, "new")->age; };
  learn(shop, "u", "i1", now);
  CHECK(age() == 0);
  for (int n = 0; n < 50; ++n) learn(shop, "evil", "i1", now + 40 * day);
  CHECK(age() == 7 * day);
  learn(shop, "v", "i1", now + 9 * day);
  CHECK(age() == 9 * day);
  // By the clock, nobody waits.
  learn(shop, "w", "i1", now + 400 * day - 5);
  CHECK(age() == 400 * day - 5);
}

TEST_CASE("in a replay an event far ahead of the others counts for all a week after them") {
  auto shop = make(usual({.exploration_weight = 0, .clock = [] { return now + 400 * day; }}));
  learn(shop, "u", "i1", now);
  const std::vector<std::string_view> shown{"i2"};
  const auto choose = [&](std::string_view user, std::int64_t at) {
    REQUIRE(shop.record({.user = user, .item = "i2", .timestamp = at, .impressions = shown}));
    return shop.explain({.user = "x", .timestamp = at}, "i2")->positive;
  };
  CHECK(choose("evil", now + 40 * day) == doctest::Approx(std::exp2(-33.0 / 14)).epsilon(0.001));
}

TEST_CASE("a user's choices of one item from slates count a few times for others") {
  auto shop = make();
  learn(shop, "evil", "i3");
  std::string item;
  for (int n = 0; n < 100; ++n) {
    const auto slate = shop.recommend({.user = "evil", .count = 50, .timestamp = now});
    if (item.empty()) item = slate->items[0].item;
    REQUIRE(shop.record(
        {.user = "evil", .item = item, .timestamp = now, .recommendation_id = slate->id}));
  }
  CHECK(shop.explain({.user = "x", .timestamp = now}, item)->positive ==
        doctest::Approx(4).epsilon(0.01));
  // Popularity as well.
  for (int n = 0; n < 1000; ++n) learn(shop, "another", "i49");
  REQUIRE(shop.update());
  CHECK(slate_of(shop, {.user = "nobody", .count = 1})[0] != "i49");
}

TEST_CASE("what one user adds in all is capped, whichever items they take in turn") {
  constexpr int items = 500;
  auto shop = make(usual(), small_model::model({.items = items}));
  for (int round = 0; round < 50; ++round)
    for (int i = 0; i < items; ++i) {
      const std::string item = "i" + std::to_string(i);
      const std::vector<std::string_view> shown{item};
      REQUIRE(shop.record({.user = "evil", .item = item, .timestamp = now, .impressions = shown}));
    }
  double positive = 0;
  for (int i = 0; i < items; ++i) {
    const auto parts = shop.explain({.user = "x", .timestamp = now}, "i" + std::to_string(i));
    CHECK(parts->positive <= 10.5);
    positive += parts->positive;
  }
  CHECK(positive == doctest::Approx(4096).epsilon(1e-4));
}

TEST_CASE("what one user's events add is capped in all, and comes back with time") {
  auto parts = small_model::parts({.items = 500});
  for (auto& s : parts.statistics) s.interactions = 0;
  std::int64_t clock = now;
  auto shop = make(usual({.exploration_weight = 0, .clock = [&] { return clock; }}),
                   model_of(std::move(parts)));
  for (int i = 0; i < 400; ++i)
    for (int n = 0; n < 4; ++n) learn(shop, "u", "i" + std::to_string(i), clock);
  learn(shop, "u", "i450", clock);
  clock += 140 * day;
  learn(shop, "u", "i451", clock);
  REQUIRE(shop.update());
  const auto popularity = [&](const char* item) {
    return shop.explain({.user = "nobody"}, item)->relevance;
  };
  CHECK(popularity("i450") == popularity("i460"));
  CHECK(popularity("i451") > popularity("i460") + 0.5f);
}

TEST_CASE("a state that overflows begins anew, and is told") {
  auto parts = small_model::parts();
  using Kind = pz::EncoderOp::Kind;
  const std::size_t d = parts.item_vectors.columns();
  bool at_once = true;
  const auto weigh = [&](std::size_t rows, float w) {
    parts.weights.push_back(pz::Matrix::zeros(rows, d));
    for (float& v : parts.weights.back().f32()) v = w;
  };
  const auto weigh_layers = [&](int layers) {
    for (int layer = 0; layer < layers; ++layer)
      for (const std::size_t rows : {d, std::size_t{1}}) weigh(rows, 1e18f);
  };
  SUBCASE("a decay, after many events") {
    parts.operations = {{Kind::embed_sum}, {Kind::decay}};
    parts.weights.clear();
    for (const float w : {1.0f, 1e18f}) weigh(1, w);
    at_once = false;
  }
  SUBCASE("linear layers, at once") {
    for (int layer = 0; layer < 3; ++layer) parts.operations.push_back({Kind::linear});
    weigh_layers(3);
  }
  SUBCASE("what was saved between them, added") {
    for (const auto kind : {Kind::linear, Kind::linear, Kind::save, Kind::linear, Kind::add})
      parts.operations.push_back({kind});
    weigh_layers(3);
  }
  for (float& v : parts.item_vectors.f32()) v = 1e17f;
  for (auto& s : parts.statistics) s = {0, pz::no_timestamp, now, now};
  const auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE_MESSAGE(model, (model ? "" : model.error().message));
  auto shop = make(usual({.exploration_weight = 1}), *model);
  for (int n = 0; n < 5000; ++n)
    REQUIRE(shop.record({.user = "u", .item = "i3", .timestamp = now}));
  CHECK(shop.restarted_states() > 0);
  const auto slate = shop.recommend({.user = "u", .count = 25, .timestamp = now});
  REQUIRE(slate);
  if (!at_once) CHECK(shop.restarted_states() == 1);  // 1e35 an event, of 3.4e38
  std::vector<std::string_view> given{"i1", "i2", "i3"};
  pz::Slate ranked;
  REQUIRE(shop.rank({.user = "u", .timestamp = now}, given, ranked));
  for (const pz::Slate* each : {&*slate, static_cast<const pz::Slate*>(&ranked)})
    for (const pz::Pick& pick : each->items) CHECK(std::isfinite(pick.score));
}

TEST_CASE("item vectors so short that steps would overflow leave a user's slates whole") {
  auto parts = small_model::parts();
  for (float& v : parts.item_vectors.f32()) v *= 1e-20f;
  auto shop = make(usual(), model_of(std::move(parts)));
  learn(shop, "u", "i3");
  for (int n = 0; n < 5; ++n) {
    const auto slate = shop.recommend({.user = "u", .count = 10, .timestamp = now});
    REQUIRE(slate->items.size() == 10);
    REQUIRE(shop.record({.user = "u",
                         .item = slate->items[4].item,
                         .timestamp = now,
                         .recommendation_id = slate->id}));
  }
  CHECK(slate_of(shop, {.user = "u", .count = 50}).size() == 50);
}

TEST_CASE("event ids are remembered however many others come, within the window") {
  auto shop = make(usual({.exploration_weight = 0, .remembered_event_ids = 64 * 128}));
  const auto record = [&](std::string_view user, const std::string& id) {
    return *shop.record({.user = user, .item = "i1", .timestamp = now, .event_id = id});
  };
  CHECK(record("u", "payment") == pz::Recorded::learned);
  for (int n = 0; n < 5'000; ++n)
    REQUIRE(record("u", "x" + std::to_string(n)) == pz::Recorded::learned);
  CHECK(record("u", "payment") == pz::Recorded::duplicate);
  CHECK(record("v", "payment") == pz::Recorded::learned);
  // An event that changes nothing takes no place.
  for (int n = 0; n < 20'000; ++n)
    REQUIRE(
        *shop.record(
            {.user = "u", .item = "none", .timestamp = now, .event_id = "y" + std::to_string(n)}) ==
        pz::Recorded::unknown_item);
  CHECK(record("u", "payment") == pz::Recorded::duplicate);
  // Behind the window they are forgotten, and nothing grows.
  for (int n = 0; n < 60'000; ++n)
    REQUIRE(record("u", "z" + std::to_string(n)) == pz::Recorded::learned);
  CHECK(record("u", "z59999") == pz::Recorded::duplicate);
  CHECK(record("u", "z59000") == pz::Recorded::duplicate);
  CHECK(record("u", "payment") == pz::Recorded::learned);
  CHECK(shop.memory().event_ids <= 30 * 64 * 128);
}

TEST_CASE("a visitor who asks for many slates displaces few of others'") {
  auto shop = make(usual({.exploration_weight = 0, .remembered_slates = 4096}));
  std::vector<std::pair<std::string, pz::Slate>> slates;
  for (int n = 0; n < 200; ++n) {
    const std::string user = "u" + std::to_string(n);
    slates.push_back({user, *shop.recommend({.user = user, .count = 5, .timestamp = now})});
  }
  pz::Slate slate;
  for (int n = 0; n < 20'000; ++n)
    REQUIRE(shop.recommend({.session = "flood", .count = 1, .timestamp = now}, slate));
  int there = 0;
  for (const auto& [user, of] : slates)
    there +=
        *shop.record_impression({.user = user, .recommendation_id = of.id, .timestamp = now}) ==
        pz::Recorded::learned;
  CHECK(there >= 190);
}

// ----------------------------------------------------------------------------- users and sessions

TEST_CASE(
    "a session gets what a user with the same events gets, and an unknown one what is popular") {
  auto shop = make();
  for (const char* item : {"i4", "i5"}) {
    REQUIRE(shop.record({.session = "s", .item = item, .timestamp = now}));
    REQUIRE(shop.record({.user = "u", .item = item, .timestamp = now}));
  }
  learn(shop, "other", "i9");
  const auto user = slate_of(shop, {.user = "u"});
  CHECK(slate_of(shop, {.user = "other"}) != user);
  CHECK(slate_of(shop, {.session = "s"}) == user);
  CHECK(slate_of(shop, {.user = "nobody", .session = "s"}) == user);
  CHECK(slate_of(shop, {.session = "nobody"}) == slate_of(shop, {.user = "nobody"}));
}

TEST_CASE("forgetting a user takes back what came with the model, and their slates") {
  auto parts = small_model::parts({.items = 40, .dimension = 16, .hidden = 16});
  REQUIRE(parts.user_ids.add("alice"));
  REQUIRE(parts.user_ids.add("bob"));
  parts.user_states = pz::Matrix::zeros(2, 16 + 16);
  for (float& v : parts.user_states.f32()) v = 1.0f;
  auto shop = make(usual(), model_of(std::move(parts)));
  const auto reason = [&](std::string_view user) {
    return shop.recommend({.user = user, .count = 1, .timestamp = now})->items[0].reason;
  };
  CHECK(reason("alice") == pz::Reason::relevance);
  const auto slate = shop.recommend({.user = "alice", .count = 5, .timestamp = now});
  learn(shop, "alice", "i1");
  CHECK(shop.forget("alice"));
  CHECK_FALSE(shop.forget("alice"));
  CHECK(reason("alice") == pz::Reason::popular);
  CHECK(reason("bob") == pz::Reason::relevance);
  CHECK(*shop.record_impression(
            {.user = "alice", .recommendation_id = slate->id, .timestamp = now}) ==
        pz::Recorded::expired_slate);
  // New events begin from nothing.
  learn(shop, "alice", "i1");
  learn(shop, "carol", "i1");
  CHECK(slate_of(shop, {.user = "alice"}) == slate_of(shop, {.user = "carol"}));
  CHECK(shop.forget("bob"));
}

TEST_CASE("a user who came with the model goes on from there at the first event") {
  auto parts = small_model::parts({.items = 40, .dimension = 16, .hidden = 16});
  REQUIRE(parts.user_ids.add("alice"));
  parts.user_states = pz::Matrix::zeros(1, 16 + 16);
  for (float& v : parts.user_states.f32()) v = 0.7f;
  const auto model = model_of(std::move(parts));
  auto shop = make(usual(), model);
  learn(shop, "alice", "i1");
  learn(shop, "carol", "i1");

  const pz::Encoder encoder{*model};
  const pz::Scorer scorer{*model};
  auto workspace = encoder.make_workspace();
  std::vector<float> state(encoder.state_size());
  const auto buckets = static_cast<std::uint32_t>(model->parts().time_gap_embedding.rows());
  const auto expected = [&] {
    REQUIRE(encoder.step({*model->find_item("i1"), pz::no_event_type,
                          buckets == 0 ? 0 : pz::time_gap_bucket({}, now, buckets)},
                         state, workspace));
    return static_cast<double>(scorer.score(encoder.query(state), *model->find_item("i5")));
  };
  CHECK(score_of(shop, "carol", "i5") == doctest::Approx(expected()));
  encoder.load(0, state);
  CHECK(score_of(shop, "alice", "i5") == doctest::Approx(expected()));
  CHECK(score_of(shop, "alice", "i5") != doctest::Approx(score_of(shop, "carol", "i5")));
}

TEST_CASE("of a visitor without events the impressions are remembered") {
  auto shop = make();
  const std::vector<std::string_view> shown{"i7"};
  REQUIRE(shop.record_impression({.session = "s", .items = shown, .timestamp = now}));
  CHECK(shop.user_count() == 1);
  CHECK(static_cast<double>(shop.explain({.session = "s", .timestamp = now}, "i7")->discount) ==
        doctest::Approx(0.4));
  // Somebody of whom nothing was counted leaves nothing.
  REQUIRE(shop.record({.session = "t", .item = "no such item", .timestamp = now}));
  CHECK(shop.user_count() == 1);
}

TEST_CASE("a session's impressions add to the user's") {
  auto shop = make();
  const std::vector<std::string_view> shown{"i7"};
  learn(shop, "u", "i3");
  REQUIRE(shop.record({.session = "s", .item = "i3", .timestamp = now}));
  REQUIRE(shop.record_impression({.user = "u", .items = shown, .timestamp = now}));
  for (int n = 0; n < 2; ++n)
    REQUIRE(shop.record_impression({.session = "s", .items = shown, .timestamp = now}));
  REQUIRE(*shop.merge_session("s", "u"));
  CHECK(static_cast<double>(shop.explain({.user = "u", .timestamp = now}, "i7")->discount) ==
        doctest::Approx(3 * 0.4));
}

TEST_CASE("users stay within their budget in bytes, the least recently used go") {
  auto shop = make(usual({.user_bytes = 1 << 20, .exploration_weight = 0}));
  for (int n = 0; n < 20'000; ++n) {
    learn(shop, "u" + std::to_string(n), "i1");
    if (n % 50 == 0) learn(shop, "keeper", "i2");
    if (n % 16 == 0) REQUIRE(shop.memory().users <= 1 << 20);
  }
  CHECK(shop.memory().users > (1 << 20) * 3 / 4);
  CHECK(shop.recommend({.user = "keeper", .count = 1, .timestamp = now})->items[0].reason ==
        pz::Reason::relevance);
  CHECK(shop.recommend({.user = "u0", .count = 1, .timestamp = now})->items[0].reason ==
        pz::Reason::popular);
}

TEST_CASE("who only asks is kept as who acts is, and histories count towards the budget") {
  auto shop = make(usual({.user_bytes = 1 << 20, .exploration_weight = 0}));
  learn(shop, "keeper", "i2");
  for (int n = 0; n < 20'000; ++n) {
    learn(shop, "u" + std::to_string(n), "i1");
    if (n % 50 == 0) REQUIRE(shop.recommend({.user = "keeper", .count = 1, .timestamp = now}));
  }
  CHECK(shop.recommend({.user = "keeper", .count = 1, .timestamp = now})->items[0].reason ==
        pz::Reason::relevance);

  auto wide = make(usual());
  const auto all_learn = [&](int events) {
    for (int n = 0; n < 500; ++n)
      for (int e = 0; e < events; ++e) learn(wide, "u" + std::to_string(n), "i1");
    return wide.memory().users;
  };
  const std::size_t before = all_learn(1);
  CHECK(all_learn(60) >
        before + 500 * 60 * 2);  // an event: item, type and time, a byte or more each
}

TEST_CASE("a user at hidden 128 with 50 events and 20 impressions takes 2 KiB") {
  auto parts = small_model::parts({.items = 1000, .dimension = 128, .hidden = 128});
  // A state of 128 values and a query of 128, as of a GRU, in a step that takes no time.
  using Kind = pz::EncoderOp::Kind;
  parts.operations = {{Kind::embed_sum}, {Kind::decay}};
  parts.weights.assign(2, pz::Matrix::zeros(1, 128));
  for (pz::Matrix& weight : parts.weights)
    for (float& v : weight.f32()) v = 0.5f;
  auto shop = make(usual(), model_of(std::move(parts)));
  std::vector<std::string> ids;
  for (int i = 0; i < 1000; ++i) ids.push_back("i" + std::to_string(i));
  constexpr int users = 640;
  for (int u = 0; u < users; ++u) {
    const std::string user = "user" + std::to_string(u);
    for (int e = 0; e < 50; ++e)
      learn(shop, user, ids[static_cast<std::size_t>((u * 7 + e * 13) % 1000)],
            now - (50 - e) * 3000);
    std::vector<std::string_view> shown;
    for (int i = 0; i < 20; ++i)
      shown.push_back(ids[static_cast<std::size_t>((u + i * 31) % 1000)]);
    REQUIRE(shop.record_impression({.user = user, .items = shown, .timestamp = now}));
  }
  CHECK(shop.memory().users / users <= 2048);
}

TEST_CASE("what a user remembers comes back whole from its compact form") {
  // Times forwards and backwards, at both ends of the range, and more events than are kept.
  auto owner = pz::detail::User::make(pz::detail::UserKey("u", {}, {1, 2}), 3);
  pz::detail::User& user = *owner;
  std::vector<pz::detail::RememberedEvent> kept;
  small_model::Random random{3};
  for (int n = 0; n < 300; ++n) {
    if (const std::size_t wanted = user.tail_for(1, 0, 0); wanted != 0) {
      void* memory = ::operator new(wanted);
      user.move_tail(memory, wanted);
      ::operator delete(memory);
    }
    const std::int64_t t = n % 50 == 7 ? std::numeric_limits<std::int64_t>::min()
                           : n % 50 == 20
                               ? std::numeric_limits<std::int64_t>::max()
                               : static_cast<std::int64_t>(random.bits() % 2'000'000'000);
    const pz::detail::RememberedEvent event{random.below(0xffffffff),
                                            n % 3 == 0 ? pz::no_event_type : random.below(300), t};
    user.remember(event, 40);
    kept.push_back(event);
    if (kept.size() > 40) kept.erase(kept.begin());
    std::size_t at = 0;
    user.for_each_event([&](const pz::detail::RememberedEvent& read) {
      REQUIRE(at < kept.size());
      REQUIRE(read.item == kept[at].item);
      REQUIRE(read.event_type == kept[at].event_type);
      REQUIRE(read.timestamp == kept[at].timestamp);
      ++at;
    });
    REQUIRE(at == kept.size());
  }
}

TEST_CASE("halves are rounded to nearest and keep sign, zero and range") {
  for (std::uint32_t h = 0; h < 0x7c00; ++h) {
    const float value = pz::detail::float_of(static_cast<std::uint16_t>(h));
    REQUIRE(pz::detail::half_of(value) == h);
    REQUIRE(pz::detail::half_of(-value) == (h | 0x8000));
    if (h + 1 == 0x7c00) break;
    const float next = pz::detail::float_of(static_cast<std::uint16_t>(h + 1));
    REQUIRE(pz::detail::half_of(value + (next - value) * 0.49f) == h);
    REQUIRE(pz::detail::half_of(value + (next - value) * 0.51f) == h + 1);
  }
  CHECK(pz::detail::half_of(1e30f) == 0x7bff);
}

// ----------------------------------------------------------------------------------------- slots

TEST_CASE("an item outside the pool has no share of it and takes nothing from it") {
  std::vector<pz::ScoredItem> ranking, pool{{1, 0.3f}, {4, 0.2f}};
  for (std::uint32_t i = 0; i < 6; ++i) ranking.push_back({i, 0.5f - 0.1f * static_cast<float>(i)});
  pz::SlotPolicy policy(0.5f, 0.5f);
  pz::ItemMask taken(6);
  std::vector<pz::SlotChoice> choices;
  for (std::uint64_t n = 0; n < 200; ++n) {
    policy.choose(ranking, pool, {}, 6, pz::CounterRandom(1, n), taken, choices);
    REQUIRE(choices.size() == 6);
    for (const pz::SlotChoice& c : choices)
      CHECK((c.pool_share > 0) == (c.pick.item == 1 || c.pick.item == 4));
  }
}

TEST_CASE("a pool without weight leaves the ranking as it is") {
  std::vector<pz::ScoredItem> ranking{{0, 1.0f}, {1, 0.5f}};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float score : {nan, -std::numeric_limits<float>::infinity()}) {
    const std::vector<pz::ScoredItem> pool{{2, score}, {3, score}};
    pz::SlotPolicy policy(1.0f, 0.07f);
    pz::ItemMask taken(4);
    std::vector<pz::SlotChoice> choices;
    for (const bool with_ranking : {true, false}) {
      policy.choose(with_ranking ? std::span<const pz::ScoredItem>(ranking)
                                 : std::span<const pz::ScoredItem>{},
                    pool, {}, 4, pz::CounterRandom(1, 1), taken, choices);
      REQUIRE(choices.size() == (with_ranking ? 2 : 0));
      for (const pz::SlotChoice& c : choices) {
        CHECK(c.pick.item < 2);
        CHECK(c.propensity == 1);
        CHECK(c.pool_share == 0);
        CHECK(c.pool_value == 0);
      }
    }
  }
}

}  // namespace service_tests
