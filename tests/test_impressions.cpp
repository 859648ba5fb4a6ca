#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "small_model.hpp"

// Of its own: several test files are compiled as one.
namespace impressions_tests {

namespace pz = personalize;
using Counted = pz::ItemCounters::Kind;

namespace {

constexpr std::int64_t day = 86'400;
constexpr std::int64_t now = 1'700'000'000;

std::string add_slate(pz::SlateLog& log, std::string_view owner, std::int64_t timestamp,
                      std::uint32_t item = 0) {
  std::string id;
  pz::LoggedSlate slate;
  slate.timestamp = timestamp;
  slate.picks.emplace_back().item = item;
  log.add(owner, slate, timestamp, id);
  return id;
}

pz::SlateStatus status(pz::SlateLog& log, std::string_view id, std::string_view owner,
                       std::int64_t timestamp) {
  pz::LoggedSlate slate;
  bool reported = false;
  return log.read(id, owner, timestamp, timestamp, slate, reported);
}

}  // namespace

TEST_CASE("the keyed hash agrees with the reference values of SipHash-2-4") {
  // Aumasson and Bernstein 2012, appendix A, and their vectors_sip64: key 00 .. 0f, input 00 ..
  // n-1.
  const pz::detail::HashKey key{0x0706050403020100u, 0x0F0E0D0C0B0A0908u};
  std::vector<std::byte> input;
  CHECK(pz::detail::siphash(key, input) == 0x726FDB47DD0E0E31u);
  for (int i = 0; i < 15; ++i) input.push_back(static_cast<std::byte>(i));
  CHECK(pz::detail::siphash(key, input) == 0xA129CA6149BE45E5u);
}

TEST_CASE("a counter decays by half in a half-life, whenever it is read or added to") {
  const pz::Decay decay(14 * day);
  pz::ItemCounters counters(10);
  double expected = 0;
  std::int64_t t = now;
  std::mt19937 random(1);
  for (int i = 0; i < 200; ++i) {
    const std::int64_t gap = static_cast<std::int64_t>(random() % (3 * day));
    const double amount = static_cast<double>(random() % 1000) / 500.0;
    expected = expected * std::exp2(-static_cast<double>(gap) / (14.0 * day)) + amount;
    t += gap;
    counters.add(Counted::expected, 3, amount, decay.at(t));
    CHECK(counters.value(Counted::expected, 3, decay.at(t)) ==
          doctest::Approx(expected).epsilon(1e-5));
  }
  CHECK(counters.value(Counted::expected, 3, decay.at(t + 14 * day)) ==
        doctest::Approx(expected / 2).epsilon(1e-5));
  CHECK(counters.value(Counted::positive, 3, decay.at(t)) == 0);
  CHECK(counters.value(Counted::expected, 4, decay.at(t)) == 0);
}

TEST_CASE("an increment that arrives late counts as much as if it had come in time") {
  const pz::Decay decay(14 * day);
  pz::ItemCounters in_order(1), late(1);
  in_order.add(Counted::positive, 0, 5, decay.at(now));
  in_order.add(Counted::positive, 0, 3, decay.at(now + 60 * day));
  late.add(Counted::positive, 0, 3, decay.at(now + 60 * day));
  late.add(Counted::positive, 0, 5, decay.at(now));
  CHECK(late.value(Counted::positive, 0, decay.at(now + 60 * day)) ==
        doctest::Approx(in_order.value(Counted::positive, 0, decay.at(now + 60 * day)))
            .epsilon(1e-6));
}

TEST_CASE("hostile timestamps and amounts neither overflow nor wrap a counter") {
  const pz::Decay decay(14 * day);
  pz::ItemCounters counters(1);
  for (const std::int64_t t : {std::numeric_limits<std::int64_t>::min(), std::int64_t{-1}, now,
                               std::numeric_limits<std::int64_t>::max()}) {
    counters.add(Counted::positive, 0, 1e30, decay.at(t));
    const double value = counters.value(Counted::positive, 0, decay.at(t));
    CHECK(value > 0);
    CHECK(value <= std::exp2(30));
  }
}

TEST_CASE("no increment is lost between threads that add and a table that grows") {
  const pz::Decay decay(14 * day);
  constexpr int threads = 4, rounds = 20'000;
  constexpr std::uint32_t items = 50;
  pz::ItemCounters counters(items);
  std::vector<std::thread> writers;
  for (int t = 0; t < threads; ++t)
    writers.emplace_back([&counters, &decay, t] {
      pz::ItemCounters mine = counters;
      for (int i = 0; i < rounds; ++i) {
        const auto item = static_cast<std::uint32_t>((i * 7 + t) % static_cast<int>(items));
        mine.add(Counted::positive, item, 1, decay.at(0));
        if (i % 1000 == 0) mine = mine.grown(mine.size() + 1000);
      }
    });
  for (std::thread& writer : writers) writer.join();
  double total = 0;
  for (std::uint32_t item = 0; item < items; ++item)
    total += counters.value(Counted::positive, item, decay.at(0));
  CHECK(total == threads * rounds);
}

TEST_CASE("increments survive while other threads age the same counters") {
  const pz::Decay decay(14 * day);
  constexpr int rounds = 20'000;
  // Each writer adds at times of its own, a whole number of half-lives apart.
  pz::ItemCounters counters(1);
  std::vector<std::thread> writers;
  for (int t = 0; t < 3; ++t)
    writers.emplace_back([&counters, &decay, t] {
      for (int i = 0; i < rounds; ++i)
        counters.add(Counted::positive, 0, 1 << (5 + t), decay.at((100 + t) * 14 * day));
    });
  for (std::thread& writer : writers) writer.join();
  // 2^5 made two half-lives ago, 2^6 one ago and 2^7 now: each contributes 2^k.
  CHECK(counters.value(Counted::positive, 0, decay.at(102 * 14 * day)) ==
        doctest::Approx(rounds * (8 + 32 + 128)).epsilon(1e-6));
}

TEST_CASE("context sums add up and decay as the counters do") {
  const pz::Decay decay(14 * day);
  pz::ContextSums sums(2);
  const std::vector<float> query{1, -2};
  sums.prepare(7);
  sums.add_positive(7, query, decay.at(now));
  sums.add_expected(7, query, 0.25, decay.at(now));
  sums.add_expected(7, query, 0.25, decay.at(now + 14 * day));
  int visits = 0;
  sums.for_each(decay.at(now + 14 * day), [&](std::uint32_t item, std::span<const float> positive,
                                              std::span<const float> expected) {
    ++visits;
    CHECK(item == 7);
    CHECK(positive[0] == doctest::Approx(0.5));
    CHECK(positive[1] == doctest::Approx(-1.0));
    CHECK(expected[0] == doctest::Approx(0.375));
    CHECK(expected[1] == doctest::Approx(-0.75));
  });
  CHECK(visits == 1);
}

TEST_CASE("context sums keep to their budget: those added to longest ago give way") {
  const pz::Decay decay(14 * day);
  const std::vector<float> query{1, -2};
  // Four rows in each of the 64 parts, which items fall into by their remainder.
  pz::ContextSums sums(2, 64 * 4 * (2 * 2 * sizeof(float) + 32));
  const auto add = [&](std::uint32_t item) {
    sums.prepare(item);
    sums.add_expected(item, query, 0.25, decay.at(now));
  };
  const auto kept = [&] {
    std::set<std::uint32_t> items;
    sums.for_each(decay.at(now), [&](std::uint32_t item, auto, auto) { items.insert(item); });
    return items;
  };
  for (const std::uint32_t item : {0u, 64u, 128u, 192u}) add(item);
  add(0);
  add(256);
  CHECK(kept() == std::set<std::uint32_t>{0, 128, 192, 256});
  add(1);
  sums.add_positive(128, query, decay.at(now));
  add(320);
  CHECK(kept() == std::set<std::uint32_t>{0, 1, 128, 256, 320});
}

TEST_CASE("a user's impressions of an item add up, fade, and end when the item is chosen") {
  pz::RecentImpressions recent;
  recent.add(1, now);
  recent.add(1, now);
  recent.add(2, now);
  CHECK(recent.count(1, now) == doctest::Approx(2));
  CHECK(recent.count(1, now + pz::RecentImpressions::half_life) == doctest::Approx(1));
  // Looked at from before it was shown, it has not faded.
  CHECK(recent.count(1, now - pz::RecentImpressions::half_life) == doctest::Approx(2));
  CHECK(recent.count(3, now) == 0);
  recent.remove(1);
  CHECK(recent.count(1, now) == 0);
  CHECK(recent.count(2, now) == doctest::Approx(1));
}

TEST_CASE("a user's impressions take bounded memory: the item shown longest ago gives way") {
  pz::RecentImpressions recent;
  const auto capacity = static_cast<std::uint32_t>(pz::RecentImpressions::capacity);
  for (std::uint32_t i = 0; i < capacity; ++i) recent.add(i, now + i);
  recent.add(0, now + 1000);
  recent.add(5000, now + 1001);
  CHECK(recent.size() == capacity);
  CHECK(recent.count(0, now + 1001) > 1);
  CHECK(recent.count(1, now + 1001) == 0);
  CHECK(recent.count(5000, now + 1001) == doctest::Approx(1));
}

TEST_CASE("a recommendation id finds its slate for its owner and nobody else") {
  pz::SlateLog log(100, day, {1, 2});
  const std::string id = add_slate(log, "u1", now, 42);
  CHECK(id.size() == 32);
  pz::LoggedSlate slate;
  bool reported = true;
  CHECK(log.read(id, "u1", now + 5, now + 5, slate, reported) == pz::SlateStatus::found);
  REQUIRE(slate.picks.size() == 1);
  CHECK(slate.picks[0].item == 42);
  CHECK_FALSE(reported);
  CHECK(status(log, id, "u2", now) == pz::SlateStatus::unknown);
  CHECK(status(log, id, "", now) == pz::SlateStatus::unknown);
}

TEST_CASE("an altered, made-up or foreign recommendation id is unknown") {
  pz::SlateLog log(100, day, {1, 2}), other(100, day, {1, 3});
  const std::string id = add_slate(log, "u1", now), foreign = add_slate(other, "u1", now);
  CHECK(status(log, foreign, "u1", now) == pz::SlateStatus::unknown);
  for (std::size_t i = 0; i < id.size(); ++i) {
    for (const char c : {'0', '1', 'f', 'F', '-', '\0'}) {
      std::string forged = id;
      if (forged[i] == c) continue;
      forged[i] = c;
      CHECK(status(log, forged, "u1", now) == pz::SlateStatus::unknown);
    }
  }
  for (const std::string_view text : {"", "x", "00000000000000000000000000000000"})
    CHECK(status(log, text, "u1", now) == pz::SlateStatus::unknown);
  CHECK(status(log, id + "0", "u1", now) == pz::SlateStatus::unknown);
}

TEST_CASE("slates expire by age and by displacement") {
  pz::SlateLog log(4, day, {1, 2});
  const std::string first = add_slate(log, "u1", now);
  CHECK(status(log, first, "u1", now + day) == pz::SlateStatus::found);
  CHECK(status(log, first, "u1", now + day + 1) == pz::SlateStatus::expired);
  std::vector<std::string> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(add_slate(log, "u1", now));
  CHECK(status(log, first, "u1", now) == pz::SlateStatus::expired);
  for (const std::string& id : ids) CHECK(status(log, id, "u1", now) == pz::SlateStatus::found);
}

TEST_CASE("a slate is read whole or as expired, however many newer ones fill the log's bytes") {
  pz::SlateLog log(500, day, {1, 2}, 1 << 16, 8, true);
  REQUIRE(log.most_picks() > 20);
  struct Added {
    std::string id;
    std::uint32_t first;
    std::size_t picks;
  };
  std::vector<Added> added;
  pz::LoggedSlate read;
  bool reported = false;
  for (std::uint32_t n = 0; n < 400; ++n) {
    pz::LoggedSlate slate;
    slate.timestamp = now;
    slate.query.assign(n % 3 == 0 ? 0 : 8, static_cast<float>(n));
    slate.picks.resize(1 + n * 7 % 20);
    slate.choices.resize(slate.picks.size());
    for (std::uint32_t p = 0; p < slate.picks.size(); ++p) slate.picks[p].item = 100 * n + p;
    Added& one = added.emplace_back();
    one.first = 100 * n;
    one.picks = std::min(slate.picks.size(), log.most_picks());
    log.add("u1", slate, now, one.id);
    // The newest ones are there; each that is has its own picks and query, in the same memory.
    std::size_t found = 0;
    for (std::size_t back = 0; back < added.size(); ++back) {
      const Added& of = added[added.size() - 1 - back];
      const auto is = log.read(of.id, "u1", now, now, read, reported);
      if (is != pz::SlateStatus::found) {
        CHECK(is == pz::SlateStatus::expired);
        continue;
      }
      ++found;
      REQUIRE(read.picks.size() == of.picks);
      REQUIRE(read.choices.size() == of.picks);
      const std::uint32_t number = of.first / 100;
      REQUIRE(read.query == pz::Vector<float>(number % 3 == 0 ? 0 : 8, static_cast<float>(number)));
      for (std::uint32_t p = 0; p < of.picks; ++p) REQUIRE(read.picks[p].item == of.first + p);
    }
    CHECK(found >= std::min<std::size_t>(added.size(), 16));
  }
  CHECK(log.read(added[0].id, "u1", now, now, read, reported) == pz::SlateStatus::expired);
}

TEST_CASE("a line of the log names time, user, recommendation and item, in quotes where it must") {
  pz::LogEntry entry{};
  entry.timestamp = now;
  entry.user = "a \"user\", one";
  entry.recommendation_id = "r";
  entry.item = "two\nlines";
  entry.position = 3;
  entry.positive = true;
  entry.choice.propensity = 0.5f;
  entry.choice.pick = entry.choice.best = {7, 1.5f};
  entry.choice.pool_share = 0.25f;
  entry.choice.pool_logit = -2;
  entry.choice.pool_value = 0.125f;
  entry.expected = 4;
  entry.best_expected = 8;
  std::string line = "before;";
  pz::append_csv(entry, line);
  CHECK(line ==
        "before;1700000000,\"a \"\"user\"\", one\",r,\"two\nlines\",3,1,0.5,1,0.25,-2,4,8,0.125\n");
}

TEST_CASE("to read a slate touches as much memory as it has picks, whatever the log has room for") {
  pz::SlateLog log(1, day, {1, 2}, std::size_t{64} << 20);
  const std::string id = add_slate(log, "u1", now);
  REQUIRE(log.most_picks() > 100'000);
  pz::LoggedSlate slate;
  slate.picks.resize(log.most_picks());
  for (pz::LoggedPick& pick : slate.picks) pick.item = 77;
  slate.picks.clear();
  const pz::LoggedPick* const memory = slate.picks.data();
  bool reported = false;
  REQUIRE(log.read(id, "u1", now, now, slate, reported) == pz::SlateStatus::found);
  REQUIRE(slate.picks.size() == 1);
  REQUIRE(slate.picks.data() == memory);
  std::size_t as_before = 0;
  for (std::size_t pick = 1; pick < log.most_picks(); ++pick) as_before += memory[pick].item == 77;
  CHECK(as_before == log.most_picks() - 1);
}

TEST_CASE("slates of many threads all find their own picks") {
  // An owner's slates lie in one of the parts: each has room for all.
  pz::SlateLog log(64 * 8000, day, {1, 2});
  std::vector<std::thread> threads;
  std::array<int, 4> wrong{};
  std::array<std::vector<std::string>, 4> ids;
  for (std::uint32_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      const std::string owner = "u" + std::to_string(t);
      for (std::uint32_t i = 0; i < 2000; ++i) {
        const std::string id = add_slate(log, owner, now, 10'000 * t + i);
        ids[t].push_back(id);
        pz::LoggedSlate slate;
        bool reported = false;
        if (log.read(id, owner, now, now, slate, reported) != pz::SlateStatus::found ||
            slate.picks[0].item != 10'000 * t + i)
          ++wrong[t];
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::set<std::string> distinct;
  for (std::size_t t = 0; t < 4; ++t) {
    CHECK(wrong[t] == 0);
    distinct.insert(ids[t].begin(), ids[t].end());
  }
  CHECK(distinct.size() == 8000);
}

TEST_CASE("a small slate log survives threads that overtake one another") {
  pz::SlateLog log(2, day, {1, 2});
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < 4; ++t)
    threads.emplace_back([&log, t] {
      const std::string owner = "u" + std::to_string(t);
      for (std::uint32_t i = 0; i < 2000; ++i) {
        const std::string id = add_slate(log, owner, now, i);
        log.mark(id, owner, [](std::uint32_t, pz::LoggedPick& pick) { pick.seen = true; });
        log.for_each_reported(10, [](const pz::LoggedSlate& slate) {
          if (slate.picks.size() != 1 || !slate.picks[0].seen) std::abort();
        });
      }
    });
  for (std::thread& thread : threads) thread.join();
}

namespace {

pz::Recommender make(const pz::RecommenderOptions& options = {.exploration_weight = 0,
                                                              .update_interval = {}}) {
  auto shop = pz::Recommender::create(small_model::model(), options);
  REQUIRE(shop);
  return std::move(*shop);
}

// A user with one event, and their slate of five.
pz::Slate slate_for(pz::Recommender& shop, std::string_view user, std::int64_t timestamp = now) {
  REQUIRE(shop.record({.user = user, .item = "i3", .timestamp = timestamp}));
  auto slate = shop.recommend({.user = user, .count = 5, .timestamp = timestamp});
  REQUIRE(slate);
  REQUIRE(slate->items.size() == 5);
  return *slate;
}

pz::Explanation counts(pz::Recommender& shop, std::string_view item, std::int64_t timestamp = now) {
  auto explained = shop.explain({.user = "observer", .timestamp = timestamp}, item);
  REQUIRE(explained);
  return *explained;
}

double discount(pz::Recommender& shop, std::string_view user, std::string_view item) {
  auto explained = shop.explain({.user = user, .timestamp = now}, item);
  REQUIRE(explained);
  return static_cast<double>(explained->discount);
}

pz::Recorded click(pz::Recommender& shop, std::string_view user, std::string_view item,
                   std::string_view recommendation_id, std::int64_t timestamp = now) {
  const auto recorded = shop.record({.user = user,
                                     .item = item,
                                     .event_type = "click",
                                     .timestamp = timestamp,
                                     .recommendation_id = recommendation_id});
  REQUIRE(recorded);
  return *recorded;
}

}  // namespace

TEST_CASE("an event that names a slate counts all its picks as seen, once") {
  auto shop = make();
  const pz::Slate slate = slate_for(shop, "u");
  CHECK(click(shop, "u", slate.items[1].item, slate.id) == pz::Recorded::learned);
  std::vector<double> expected;
  for (const pz::Pick& pick : slate.items) {
    const pz::Explanation counted = counts(shop, pick.item);
    expected.push_back(counted.expected);
    CHECK(counted.expected > 0);
    CHECK(counted.positive == doctest::Approx(pick.item == slate.items[1].item ? 1 : 0));
  }
  click(shop, "u", slate.items[1].item, slate.id);
  click(shop, "u", slate.items[2].item, slate.id);
  for (std::size_t i = 0; i < 5; ++i) {
    const pz::Explanation counted = counts(shop, slate.items[i].item);
    CHECK(counted.expected == doctest::Approx(expected[i]));
    CHECK(counted.positive == doctest::Approx(i == 1 || i == 2 ? 1 : 0));
  }
}

TEST_CASE("the expected events of an impression are examination times calibrated relevance") {
  auto shop =
      make({.exploration_weight = 0, .examination = {1.0f, 0.25f, 0.125f}, .update_interval = {}});
  const pz::Slate slate = slate_for(shop, "u");
  auto best = shop.recommend({.user = "u", .count = 32, .timestamp = now});
  REQUIRE(best);
  double sum = 0;
  for (const pz::Pick& pick : best->items) sum += std::exp(static_cast<double>(pick.score));
  REQUIRE(shop.record_impression({.user = "u", .recommendation_id = slate.id, .timestamp = now}));
  // Before any update slope is 1 and intercept 0: a softmax among the best 32.
  const std::vector<double> examination{1, 0.25, 0.125, 0.125, 0.125};
  for (std::size_t i = 0; i < 5; ++i)
    CHECK(
        counts(shop, slate.items[i].item).expected ==
        doctest::Approx(examination[i] * std::exp(static_cast<double>(slate.items[i].score)) / sum)
            .epsilon(1e-4));
}

TEST_CASE("an explicit list of impressions wins over the slate, whichever comes first") {
  auto shop = make();
  const pz::Slate slate = slate_for(shop, "u");
  const std::vector<std::string_view> shown{slate.items[0].item, slate.items[3].item};
  REQUIRE(shop.record({.user = "u",
                       .item = slate.items[3].item,
                       .timestamp = now,
                       .recommendation_id = slate.id,
                       .impressions = shown}));
  click(shop, "u", slate.items[0].item, slate.id);
  for (std::size_t i = 0; i < 5; ++i)
    CHECK((counts(shop, slate.items[i].item).expected > 0) == (i == 0 || i == 3));
}

TEST_CASE("impressions without a slate are counted by the user's present state") {
  auto shop = make();
  slate_for(shop, "u");
  const std::vector<std::string_view> shown{"i7", "i9", "not in the catalogue"};
  REQUIRE(shop.record({.user = "u", .item = "i9", .timestamp = now, .impressions = shown}));
  CHECK(counts(shop, "i7").expected > 0);
  CHECK(counts(shop, "i7").positive == 0);
  CHECK(counts(shop, "i9").expected > 0);
  CHECK(counts(shop, "i9").positive == doctest::Approx(1));
  CHECK(discount(shop, "u", "i7") > 0);
  CHECK(discount(shop, "u", "i9") == 0);
}

TEST_CASE("record_impression counts without an event, and a later event is attributed") {
  auto shop = make();
  const pz::Slate slate = slate_for(shop, "u");
  REQUIRE(shop.record_impression({.user = "u", .recommendation_id = slate.id, .timestamp = now}));
  CHECK(counts(shop, slate.items[4].item).expected > 0);
  CHECK(discount(shop, "u", slate.items[4].item) > 0);
  // No recommendation id: the user's remembered impression is enough, once.
  click(shop, "u", slate.items[4].item, {});
  click(shop, "u", slate.items[4].item, {});
  CHECK(counts(shop, slate.items[4].item).positive == doctest::Approx(1));
  CHECK(discount(shop, "u", slate.items[4].item) == 0);
  CHECK_FALSE(shop.record_impression({.user = "u"}));
  CHECK_FALSE(shop.record_impression({.recommendation_id = slate.id}));
}

TEST_CASE("an event on an item that was never shown is no choice of an impression") {
  auto shop = make();
  slate_for(shop, "u");
  click(shop, "u", "i20", {});
  CHECK(counts(shop, "i20").positive == 0);
}

TEST_CASE("an unknown or expired recommendation id keeps the interaction and says so") {
  auto shop =
      make({.exploration_weight = 0, .update_interval = {}, .slate_expiry = std::chrono::hours{1}});
  const pz::Slate slate = slate_for(shop, "u");
  const auto top = [&] { return shop.recommend({.user = "u", .timestamp = now})->items[0].score; };
  const float before = top();
  CHECK(click(shop, "u", "i9", "no such id") == pz::Recorded::unknown_slate);
  const float after_unknown = top();
  CHECK(after_unknown != before);
  CHECK(click(shop, "u", slate.items[0].item, slate.id, now + 3601) == pz::Recorded::expired_slate);
  CHECK(top() != after_unknown);
  for (const pz::Pick& pick : slate.items) CHECK(counts(shop, pick.item).expected == 0);
}

TEST_CASE("nobody reports on another user's slate") {
  auto shop = make();
  const pz::Slate slate = slate_for(shop, "u");
  CHECK(click(shop, "mallory", slate.items[0].item, slate.id) == pz::Recorded::unknown_slate);
  for (const pz::Pick& pick : slate.items) {
    CHECK(counts(shop, pick.item).expected == 0);
    CHECK(counts(shop, pick.item).positive == 0);
  }
}

TEST_CASE("a visitor's slate can be answered after signing in") {
  auto shop = make();
  REQUIRE(shop.record({.session = "s", .item = "i3", .timestamp = now}));
  const auto slate = shop.recommend({.session = "s", .count = 5, .timestamp = now});
  REQUIRE(slate);
  const auto recorded = shop.record({.user = "u",
                                     .session = "s",
                                     .item = slate->items[0].item,
                                     .timestamp = now,
                                     .recommendation_id = slate->id});
  REQUIRE(recorded);
  CHECK(*recorded == pz::Recorded::learned);
  CHECK(counts(shop, slate->items[0].item).positive == doctest::Approx(1));
}

TEST_CASE("an event id counts once for its user") {
  auto shop = make();
  const auto record = [&](std::string_view user, std::string_view id, std::string_view item) {
    const auto recorded =
        shop.record({.user = user, .item = item, .timestamp = now, .event_id = id});
    REQUIRE(recorded);
    return *recorded;
  };
  const auto score = [&] {
    return shop.recommend({.user = "u", .timestamp = now})->items[0].score;
  };
  CHECK(record("u", "e1", "i3") == pz::Recorded::learned);
  const float once = score();
  CHECK(record("u", "e1", "i3") == pz::Recorded::duplicate);
  CHECK(score() == once);
  CHECK(record("u", "e2", "i4") == pz::Recorded::learned);
  CHECK(score() != once);
  CHECK(record("v", "e1", "i3") == pz::Recorded::learned);
}

TEST_CASE("only positive event types are choices, all types report the slate as seen") {
  auto shop = make(
      {.exploration_weight = 0, .positive_event_types = {"buy", "click"}, .update_interval = {}});
  const pz::Slate slate = slate_for(shop, "u");
  const std::string_view first = slate.items[0].item;
  REQUIRE(shop.record({.user = "u",
                       .item = first,
                       .event_type = "view",
                       .timestamp = now,
                       .recommendation_id = slate.id}));
  CHECK(counts(shop, first).positive == 0);
  CHECK(counts(shop, first).expected > 0);
  click(shop, "u", first, slate.id);
  CHECK(counts(shop, first).positive == doctest::Approx(1));
}

TEST_CASE("with feedback off slates have no id and the ranking stays the model's") {
  auto shop = make({.exploration_weight = 0, .feedback = false});
  auto bare = shop.recommend({.user = "u", .count = 50, .timestamp = now});
  const pz::Slate slate = slate_for(shop, "u");
  CHECK(slate.id.empty());
  const std::vector<std::string_view> shown{"i1", "i2"};
  REQUIRE(shop.record_impression({.user = "u", .items = shown, .timestamp = now}));
  const auto before = shop.recommend({.user = "u", .count = 50, .timestamp = now});
  REQUIRE(shop.update(now + day));
  const auto after = shop.recommend({.user = "u", .count = 50, .timestamp = now});
  const pz::Scorer scorer(*shop.model());
  for (std::size_t i = 0; i < 50; ++i) {
    CHECK(before->items[i].item == after->items[i].item);
    CHECK(before->items[i].score == after->items[i].score);
  }
  CHECK(counts(shop, "i1").expected == 0);

  // Without impressions nothing would ever be explored enough.
  auto default_weight = make({.feedback = false});
  REQUIRE(default_weight.record({.user = "u", .item = "i3", .timestamp = now}));
  const auto same = default_weight.recommend({.user = "u", .count = 50, .timestamp = now});
  for (std::size_t i = 0; i < 50; ++i) {
    CHECK(same->items[i].item == before->items[i].item);
    CHECK(same->items[i].propensity == 1);
  }
}

TEST_CASE("hostile impressions are refused or harmless") {
  auto shop = make();
  slate_for(shop, "u");
  const std::vector<std::string_view> many(10'001, "i1");
  CHECK_FALSE(shop.record({.user = "u", .item = "i1", .impressions = many}));
  CHECK_FALSE(shop.record_impression({.user = "u", .items = many}));
  const std::vector<std::string_view> odd{"", "i1", "i1", std::string_view("\0", 1)};
  CHECK(shop.record({.user = "u", .item = "i1", .timestamp = now, .impressions = odd}));
  CHECK(shop.update(std::numeric_limits<std::int64_t>::min()));
  const auto slate =
      shop.recommend({.user = "u", .timestamp = std::numeric_limits<std::int64_t>::min()});
  REQUIRE(slate);
  for (const pz::Pick& pick : slate->items) CHECK(std::isfinite(pick.score));
}

}  // namespace impressions_tests
