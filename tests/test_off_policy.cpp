// Off-policy estimates against direct recomputations, and against the truth in simulated worlds.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/csv.hpp"
#include "../tools/data/fields.hpp"
#include "../tools/evaluate/off_policy.hpp"
#include "../tools/simulate/world.hpp"
#include "refusal.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;

namespace {

using namespace personalize::tools;

void check_equal(const PolicyValue& value, double mean, double half_width) {
  CHECK(std::abs(value.mean - mean) < 1e-9);
  CHECK(std::abs(value.high - (mean + half_width)) < 1e-9);
  CHECK(std::abs(value.low - (mean - half_width)) < 1e-9);
}

struct BanditRow {
  std::string item, position;
  double click, propensity;
};

std::vector<BanditRow> bandit_rows(const std::string& path) {
  CsvReader reader(path);
  const auto text = [&](const char* name) {
    return std::string(reader.field(reader.require(name)));
  };
  std::vector<BanditRow> rows;
  while (reader.next())
    rows.push_back({text("item_id"), text("position"), *read_number(text("click")),
                    *read_number(text("propensity_score"))});
  return rows;
}

// Each formula as it stands in its paper, over rows of single choices; target(item, position).
template <class Target>
void check_open_bandit(const std::vector<BanditRow>& rows, const std::vector<std::string>& items,
                       Target target, const OffPolicyEvaluation& found) {
  const auto n = static_cast<double>(rows.size());
  // The reward model of row r: clicks of the item in the rows of the other parity.
  std::map<std::pair<std::size_t, std::string>, std::pair<double, double>> by_item;
  double clicks[2] = {0, 0}, counts[2] = {0, 0};
  for (std::size_t r = 0; r < rows.size(); ++r) {
    auto& [click, count] = by_item[{r % 2, rows[r].item}];
    click += rows[r].click, count += 1;
    clicks[r % 2] += rows[r].click, counts[r % 2] += 1;
  }
  const auto q = [&](std::size_t r, const std::string& item) {
    const auto [click, count] = by_item[{(r + 1) % 2, item}];
    const double mean = clicks[(r + 1) % 2] / counts[(r + 1) % 2];
    return (click + 100 * mean) / (count + 100);
  };
  std::vector<double> w, ips, dr;
  std::map<std::pair<std::size_t, std::string>, double> averages;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    w.push_back(target(rows[r].item, rows[r].position) / rows[r].propensity);
    auto [average, added] = averages.try_emplace({r % 2, rows[r].position}, 0.0);
    if (added)
      for (const std::string& item : items)
        average->second += target(item, rows[r].position) * q(r, item);
    ips.push_back(w[r] * rows[r].click);
    dr.push_back(average->second + w[r] * (rows[r].click - q(r, rows[r].item)));
  }
  const auto mean_and_width = [&](const std::vector<double>& values) {
    double mean = 0, square = 0;
    for (const double v : values) mean += v / n;
    for (const double v : values) square += (v - mean) * (v - mean) / (n - 1);
    return std::pair{mean, 1.959964 * std::sqrt(square / n)};
  };
  const auto [ips_mean, ips_width] = mean_and_width(ips);
  check_equal(found.ips, ips_mean, ips_width);
  const auto [dr_mean, dr_width] = mean_and_width(dr);
  check_equal(found.doubly_robust, dr_mean, dr_width);
  double weighted = 0, weights = 0, squares = 0, spread = 0;
  for (std::size_t r = 0; r < rows.size(); ++r)
    weighted += w[r] * rows[r].click, weights += w[r], squares += w[r] * w[r];
  for (std::size_t r = 0; r < rows.size(); ++r)
    spread += std::pow(w[r] * (rows[r].click - weighted / weights), 2);
  check_equal(found.snips, weighted / weights,
              1.959964 * std::sqrt(spread * n / (n - 1)) / weights);
  CHECK(found.effective_sample_size == doctest::Approx(weights * weights / squares).epsilon(1e-12));
  CHECK(found.decisions == rows.size());
}

const std::string open_bandit = "../../shared/datasets/open-bandit-men/";

}  // namespace

TEST_CASE("estimates on Open Bandit Data equal a direct recomputation") {
  if (!std::filesystem::exists(open_bandit)) {
    MESSAGE("SKIPPED: no " << open_bandit);
    return;
  }
  const std::string uniform = open_bandit + "random.csv.zst",
                    thompson = open_bandit + "bts.csv.zst";
  const auto uniform_rows = bandit_rows(uniform), thompson_rows = bandit_rows(thompson);
  std::vector<std::string> items;
  for (const BanditRow& row : uniform_rows)
    if (std::find(items.begin(), items.end(), row.item) == items.end()) items.push_back(row.item);
  CHECK(items.size() == 34);
  std::map<std::pair<std::string, std::string>, double> shown;
  std::map<std::string, double> all;
  for (const BanditRow& row : thompson_rows) {
    shown[{row.item, row.position}] += 1;
    all[row.position] += 1;
  }

  BadRows bad;
  const auto to_thompson = evaluate_off_policy(read_open_bandit_log(uniform, thompson, bad));
  check_open_bandit(
      uniform_rows, items,
      [&](const std::string& item, const std::string& position) {
        return shown[{item, position}] / all[position];
      },
      to_thompson);
  const auto to_uniform = evaluate_off_policy(read_open_bandit_log(thompson, "", bad));
  check_open_bandit(
      thompson_rows, items, [&](const std::string&, const std::string&) { return 1.0 / 34; },
      to_uniform);
  // Each policy's log says what the other's should have foretold.
  CHECK(to_thompson.doubly_robust.low < to_uniform.logged.mean);
  CHECK(to_uniform.logged.mean < to_thompson.doubly_robust.high);
  CHECK(to_uniform.doubly_robust.low < to_thompson.logged.mean);
  CHECK(to_thompson.logged.mean < to_uniform.doubly_robust.high);
}

TEST_CASE("estimates of slates equal a direct recomputation") {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform;
  std::vector<LoggedDecision> decisions(300);
  for (LoggedDecision& decision : decisions)
    for (std::size_t k = 1 + random() % 4; k > 0; --k)
      decision.push_back({uniform(random) < 0.3 ? 1.0 : 0.0, 2 * uniform(random), uniform(random),
                          uniform(random)});
  // The product of ratios of places 0 .. k.
  const auto weight = [](const LoggedDecision& decision, std::size_t k) {
    double product = 1;
    for (std::size_t i = 0; i <= k; ++i) product *= decision[i].ratio;
    return product;
  };
  double ips = 0, dr = 0, snips = 0, logged = 0;
  for (const LoggedDecision& decision : decisions)
    for (std::size_t k = 0; k < decision.size(); ++k) {
      const double before = k == 0 ? 1 : weight(decision, k - 1);
      logged += decision[k].reward / 300;
      ips += weight(decision, k) * decision[k].reward / 300;
      dr += (before * decision[k].target_value +
             weight(decision, k) * (decision[k].reward - decision[k].value)) /
            300;
    }
  for (std::size_t k = 0; k < 4; ++k) {
    double rewards = 0, weights = 0, count = 0;
    for (const LoggedDecision& decision : decisions) {
      if (decision.size() <= k) continue;
      rewards += weight(decision, k) * decision[k].reward;
      weights += weight(decision, k);
      count += 1;
    }
    snips += rewards / weights * count / 300;
  }
  const OffPolicyEvaluation found = evaluate_off_policy(decisions);
  CHECK(std::abs(found.logged.mean - logged) < 1e-9);
  CHECK(std::abs(found.ips.mean - ips) < 1e-9);
  CHECK(std::abs(found.snips.mean - snips) < 1e-9);
  CHECK(std::abs(found.doubly_robust.mean - dr) < 1e-9);
  CHECK_THROWS_AS(evaluate_off_policy({}), Failure);
}

TEST_CASE("an interaction log becomes the decisions of its policy at another weight") {
  const TemporaryFolder folder;
  // At weight w and logit 0 the pool takes a slot with probability w / 2 (w up to 1 / 2).
  const std::string path = folder.write(
      "log.csv", std::string(pz::log_csv_header) +
                     // The ranking's best, in the pool as well: 0.4 / 2 * 0.25 + 1 - 0.4 / 2.
                     "1,u,a,x,1,0,0.85,1,0.25,0,0.3,0.3,0.1\n"
                     // From the pool: 0.4 / 2 * 0.5.
                     "1,u,a,y,2,0,0.1,0,0.5,0,0.2,0.4,0.6\n"
                     "2,u,a,y,2,1,0.1,0,0.5,0,0.2,0.4,0.6\n"
                     // The pool was empty.
                     "1,u,b,x,1,0,1,1,0,-inf,0.3,0.3,0\n"
                     // The ranking had ended.
                     "1,u,c,x,1,0,0.5,1,0.5,inf,0.3,0.3,0.2\n"
                     // Its first place was not seen.
                     "1,u,d,x,2,0,1,1,0,-inf,0.3,0.3,0\n");
  std::uint64_t skipped = 0;
  BadRows bad;
  const auto same = read_interaction_log(path, 0.4, skipped, bad);
  CHECK(skipped == 1);
  REQUIRE(same.size() == 3);
  for (const LoggedDecision& decision : same)
    for (const LoggedStep& step : decision) CHECK(step.ratio == doctest::Approx(1));
  CHECK(same[0][0].reward == 0);
  CHECK(same[0][1].reward == 1);
  const auto other = read_interaction_log(path, 0.2, skipped, bad);
  CHECK(other[0][0].ratio == doctest::Approx((0.1 * 0.25 + 0.9) / 0.85));
  CHECK(other[0][1].ratio == doctest::Approx(0.5));
  CHECK(other[0][1].value == doctest::Approx(0.2));
  CHECK(other[0][1].target_value == doctest::Approx(0.1 * 0.6 + 0.9 * 0.4));
  CHECK(other[1][0].ratio == doctest::Approx(1));
  CHECK(other[2][0].ratio == doctest::Approx(1));
  const auto greedy = read_interaction_log(path, 0, skipped, bad);
  CHECK(greedy[0][0].ratio == doctest::Approx(1 / 0.85));
  CHECK(greedy[0][1].ratio == 0);
  CHECK(greedy[0][1].target_value == doctest::Approx(0.4));

  const auto refused = [&](const std::string& row, const char* reason) {
    const std::string file = folder.write("bad.csv", std::string(pz::log_csv_header) + row);
    BadRows none;
    CHECK_THROWS_WITH_AS(
        read_interaction_log(file, 0.1, skipped, none),
        (file + ":2: column " + reason + "; correct the row or pass --skip-bad-rows").c_str(),
        Failure);
  };
  refused("1,u,a,x,1,0,0,1,0,0,0,0,0\n", "PROPENSITY: a propensity lies in (0, 1]");
  refused("1,u,a,x,0,0,1,1,0,0,0,0,0\n", "POSITION: a position is a whole number from 1 to 10000");
  refused("1,u,a,x,1,0,1e-320,1,0,0,0,0,0\n",
          "PROPENSITY: a propensity below 1e-30 is no measurement");
  refused("1,u,a,x,1,0,1,1,0,0,inf,0,0\n", "EXPECTED: is not finite");
  for (const char* propensity : {"nan", "inf", "-0.5", "1.0001", "-inf"})
    refused("1,u,a,x,1,0," + std::string(propensity) + ",1,0,0,0,0,0\n",
            std::string(propensity) == "nan" ? "PROPENSITY: 'nan' is not a number"
                                             : "PROPENSITY: a propensity lies in (0, 1]");
  refused("1,u,a,x,1,2,1,1,0,0,0,0,0\n", "POSITIVE: is 0 or 1");
  refused("1,u,a,x,1,0,1,0.5,0,0,0,0,0\n", "BEST: is 0 or 1");
  refused("1,u,a,x,1,0,1,1,1.01,0,0,0,0\n", "POOL_SHARE: a share lies in [0, 1]");
  refused("1,u,a,x,1,0,1,1,-0.1,0,0,0,0\n", "POOL_SHARE: a share lies in [0, 1]");
  refused("1,u,a,x,1,0,1,1,0,0,-1,0,0\n", "EXPECTED: an expected reward is not negative");
  refused("1,u,a,x,1,0,1,1,0,0,0,nan,0\n", "BEST_EXPECTED: 'nan' is not a number");
  refused("1,u,a,x,1,0,1,1,0,0,0,0,-inf\n", "POOL_EXPECTED: is not finite");
  refused("1,u,a,x,1,0,1,1,0,0 0,0,0,0\n", "POOL_LOGIT: '0 0' is not a number");
  refused("1x,u,a,x,1,0,1,1,0,0,0,0,0\n", "TIMESTAMP: '1x' is not a whole number of Unix seconds");
  refused("1,u,a,x,1,0,1,1,0,zero,0,0,0\n", "POOL_LOGIT: 'zero' is not a number");
}

TEST_CASE("at weight 1 the pool takes every slot, but for an empty pool") {
  const TemporaryFolder folder;
  const std::string path =
      folder.write("log.csv", std::string(pz::log_csv_header) +
                                  // The ranking's best, in the pool as well; then from the pool.
                                  "1,u,a,x,1,0,0.85,1,0.25,0,0.3,0.3,0.1\n"
                                  "1,u,a,y,2,0,0.1,0,0.5,-20,0.2,0.4,0.6\n"
                                  // The pool was empty.
                                  "1,u,b,x,1,0,1,1,0,-inf,0.3,0.3,0\n"
                                  // The ranking had ended.
                                  "1,u,c,x,1,0,0.5,1,0.5,inf,0.3,0.3,0.2\n");
  std::uint64_t incomplete = 0;
  BadRows bad;
  const auto all = read_interaction_log(path, 1, incomplete, bad);
  REQUIRE(all.size() == 3);
  CHECK(all[0][0].ratio == doctest::Approx(0.25 / 0.85));
  CHECK(all[0][0].target_value == doctest::Approx(0.1));
  CHECK(all[0][1].ratio == doctest::Approx(0.5 / 0.1));
  CHECK(all[1][0].ratio == 1);
  CHECK(all[1][0].target_value == doctest::Approx(0.3));
  CHECK(all[2][0].ratio == 1);
  const pz::SlotPolicy everything(1, pz::exploration_temperature);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  CHECK(everything.win(-infinity) == 0);
  CHECK(everything.win(-1e300) == 1);
  CHECK(everything.win(infinity) == 1);
  CHECK(pz::SlotPolicy(0.3f, pz::exploration_temperature).win(-infinity) == 0);
}

TEST_CASE("rows that cannot be read are skipped and counted, and their slates left out") {
  using namespace std::string_literals;
  const TemporaryFolder folder;
  const std::string whole = "1,u,a,x,1,0,0.5,1,0,-inf,0.3,0.3,0\n";
  const std::string path = folder.write(
      "log.csv",
      std::string(pz::log_csv_header) + whole + "1,u\0v,b,x,1,0,0.5,1,0,-inf,0.3,0.3,0\n"s +
          "1,u\xff,c,x,1,0,0.5,1,0,-inf,0.3,0.3,0\n" + "1,u,d,x,1,0,nought,1,0,-inf,0.3,0.3,0\n" +
          "1700000000000,u,e,x,1,0,0.5,1,0,-inf,0.3,0.3,0\n");
  std::uint64_t incomplete = 0;
  BadRows bad{.skip = true};
  const auto decisions = read_interaction_log(path, 0, incomplete, bad);
  CHECK(decisions.size() == 1);
  CHECK(incomplete == 1);  // d
  CHECK(bad.count == 4);
  CHECK(bad.reports[0] == path + ":3: a NUL byte; is this a text file?");
  CHECK(bad.reports[1].starts_with(path + ":4: column USER_ID: not valid UTF-8"));
  BadRows strict;
  CHECK_THROWS_WITH_AS(
      read_interaction_log(path, 0, incomplete, strict),
      (path + ":3: a NUL byte; is this a text file?; correct the row or pass --skip-bad-rows")
          .c_str(),
      Failure);
  const std::string bandit = folder.write("bandit.csv",
                                          "item_id,position,click,propensity_score\n"
                                          "1,1,1,0.5\n2,1,0,0\n2,1,\xff,0.5\n2,1,0,0.5\n");
  BadRows rows{.skip = true};
  CHECK(read_open_bandit_log(bandit, "", rows).size() == 2);
  CHECK(rows.count == 2);
}

namespace {

constexpr std::size_t length = World::slate_length;

std::string user_id(std::uint32_t user) { return "u" + std::to_string(user); }

pz::Recommender make(const World& world, pz::RecommenderOptions options) {
  options.update_interval = {};
  options.recommendation_key = std::array<std::uint64_t, 2>{1, 2};
  auto shop = pz::Recommender::create(world.model(), options);
  REQUIRE(shop);
  for (const World::Event& event : world.history())
    REQUIRE(shop->record({.user = user_id(event.user),
                          .item = world.item_id(event.item),
                          .timestamp = event.timestamp}));
  return std::move(*shop);
}

// Expected clicks if these items were shown.
double worth(const World& world, const World::Visit& visit, const std::vector<pz::Pick>& picks) {
  double sum = 0;
  for (std::size_t place = 0; place < std::min(length, picks.size()); ++place)
    sum += world.click_probability(
        visit, static_cast<std::uint32_t>(std::stoul(std::string(picks[place].item.substr(1))) - 1),
        place);
  return sum;
}

// In one world, the runtime at logged_weight writes its log. Is the value of the policy at
// target_weight on the same visits within the doubly robust interval?
// At weight 0 that value is known from the ranking, while the runtime goes on learning. At others
// it is averaged over slates of a second runtime, which hears of the same events and, as both
// do without updates, knows the same.
bool covered(std::uint64_t seed, float logged_weight, float target_weight) {
  World world({.users = 100, .items = 300, .days = 1, .slates = 240, .seed = seed});
  const TemporaryFolder folder;
  std::string csv(pz::log_csv_header);
  auto shop = make(world, {.exploration_weight = logged_weight,
                           .seed = seed,
                           .log = [&](const pz::LogEntry& entry) { pz::append_csv(entry, csv); }});
  auto twin = make(world, {.exploration_weight = target_weight, .seed = seed + 1});
  std::vector<std::string> ids;
  double truth = 0, visits = 0;
  for (std::size_t tick = 0; tick < World::ticks; ++tick) {
    for (std::size_t item = world.advance(); item < world.items().size(); ++item)
      REQUIRE(shop.put_item({.item = world.item_id(item),
                             .creation_timestamp = world.items()[item].created,
                             .fields = {{"GENRE", world.genre_name(world.items()[item].genre)}}}));
    if (target_weight == 0) REQUIRE(shop.update(world.now()));
    ids.resize(shop.model()->item_count());
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = world.item_id(i);
    const std::vector<std::string_view> all(ids.begin(), ids.end());
    for (const World::Visit& visit : world.visits()) {
      const std::string user = user_id(visit.user);
      // The twin hears of items without their slate, and takes it that every item was eligible.
      const pz::Request request{.user = user,
                                .count = length,
                                .exclude_interacted = target_weight == 0,
                                .timestamp = visit.timestamp};
      pz::Slate other;
      if (target_weight == 0) {
        REQUIRE(shop.rank(request, all, other));
        truth += worth(world, visit, other.items);
      } else {
        constexpr int draws = 4;
        for (int draw = 0; draw < draws; ++draw) {
          REQUIRE(twin.recommend(request, other));
          truth += worth(world, visit, other.items) / draws;
        }
      }
      visits += 1;
      const auto slate = shop.recommend(request);
      REQUIRE(slate);
      std::vector<std::uint32_t> shown;
      std::vector<std::string_view> shown_ids;
      for (const pz::Pick& pick : slate->items) {
        shown.push_back(
            static_cast<std::uint32_t>(std::stoul(std::string(pick.item.substr(1))) - 1));
        shown_ids.push_back(pick.item);
      }
      const std::vector<bool> clicked = world.show(visit, shown);
      REQUIRE(shop.record_impression(
          {.user = user, .recommendation_id = slate->id, .timestamp = visit.timestamp}));
      REQUIRE(
          twin.record_impression({.user = user, .items = shown_ids, .timestamp = visit.timestamp}));
      for (std::size_t place = 0; place < shown.size(); ++place) {
        if (!clicked[place]) continue;
        const pz::Interaction event{
            .user = user, .item = shown_ids[place], .timestamp = visit.timestamp};
        pz::Interaction answer = event;
        answer.recommendation_id = slate->id;
        REQUIRE(shop.record(answer));
        REQUIRE(twin.record(event));
      }
      if (target_weight == 0) continue;
      const pz::Request next{.user = user, .timestamp = visit.timestamp};
      for (const std::string& id : {ids[0], ids[17]})
        REQUIRE(twin.explain(next, id)->score ==
                doctest::Approx(shop.explain(next, id)->score).epsilon(1e-4));
    }
  }
  std::uint64_t skipped = 0;
  BadRows bad;
  const OffPolicyEvaluation found = evaluate_off_policy(read_interaction_log(
      folder.write("log.csv", csv), static_cast<double>(target_weight), skipped, bad));
  CHECK(skipped == 0);
  CHECK(found.decisions == 240);
  // Evaluated at the weight that it was written at, a log tells what was observed.
  if (logged_weight == target_weight) {
    CHECK(found.effective_sample_size == doctest::Approx(240).epsilon(1e-3));
    CHECK(found.ips.mean == doctest::Approx(found.logged.mean).epsilon(1e-3));
  }
  return found.doubly_robust.low < truth / visits && truth / visits < found.doubly_robust.high;
}

}  // namespace

TEST_CASE("a log of weight 1 whose pools run empty is evaluated at weight 1 as it was observed") {
  World world({.users = 20, .items = 300, .days = 1, .slates = 60});
  const TemporaryFolder folder;
  std::string csv(pz::log_csv_header);
  auto shop = make(world, {.exploration_weight = 1,
                           .exploration_item_age_cut_off = std::chrono::days(3),
                           .seed = 7,
                           .log = [&](const pz::LogEntry& entry) { pz::append_csv(entry, csv); }});
  world.advance();
  for (std::uint32_t user = 0; user < 20; ++user) {
    const auto slate =
        shop.recommend({.user = user_id(user), .count = length, .timestamp = world.now() + user});
    REQUIRE(slate);
    REQUIRE(shop.record_impression(
        {.user = user_id(user), .recommendation_id = slate->id, .timestamp = world.now() + user}));
    REQUIRE(shop.record({.user = user_id(user),
                         .item = slate->items[user % length].item,
                         .timestamp = world.now() + user,
                         .recommendation_id = slate->id}));
  }
  REQUIRE(csv.find(",-inf,") != std::string::npos);
  REQUIRE(csv.find(",1,1,0,-inf,") != std::string::npos);
  std::uint64_t incomplete = 0;
  BadRows bad;
  const auto decisions = read_interaction_log(folder.write("log.csv", csv), 1, incomplete, bad);
  REQUIRE(decisions.size() == 20);
  for (const LoggedDecision& decision : decisions)
    for (const LoggedStep& step : decision) CHECK(step.ratio == doctest::Approx(1).epsilon(1e-5));
  const OffPolicyEvaluation found = evaluate_off_policy(decisions);
  CHECK(found.logged.mean == 1);
  CHECK(found.ips.mean == doctest::Approx(1).epsilon(1e-4));
  CHECK(found.snips.mean == doctest::Approx(1).epsilon(1e-4));
  CHECK(std::isfinite(found.doubly_robust.low));
  CHECK(std::isfinite(found.doubly_robust.high));
}

TEST_CASE("the doubly robust interval covers the truth in 90 of 100 simulated worlds") {
  for (const auto& weights : {std::pair{0.3f, 0.0f}, {0.3f, 0.4f}, {1.0f, 1.0f}}) {
    const auto logged_weight = weights.first, target_weight = weights.second;
    int within = 0;
    for (std::uint64_t seed = 1; seed <= 100; ++seed)
      within += covered(seed, logged_weight, target_weight) ? 1 : 0;
    CAPTURE(target_weight);
    MESSAGE("covered: " << within << " of 100");
    CHECK(within >= 90);
  }
}

TEST_CASE("products of small propensities give right figures or a refusal, never a NaN") {
  const auto slates = [](std::vector<double> ratios, double value) {
    LoggedDecision decision;
    for (const double ratio : ratios) decision.push_back({0, ratio, value, value});
    return decision;
  };
  // Weights whose squares a double does not hold: all alike, so that all of them count.
  for (const double weight : {1e-200, 1e200}) {
    CAPTURE(weight);
    const std::vector<LoggedDecision> alike(4, slates({weight}, 0));
    CHECK(evaluate_off_policy(alike).effective_sample_size == doctest::Approx(4));
  }
  CHECK(evaluate_off_policy({slates({1e-200, 1e-200}, 0.5)}).effective_sample_size == 0);
  const std::string overflow =
      "the log's propensities are so small, or its rewards so large, that the estimates overflow";
  for (const double value : {0.0, 0.5})
    for (const double last : {1e200, 0.0}) {
      const std::vector<LoggedDecision> log{slates({1e200, 1e200, last}, value), slates({1}, 0)};
      CHECK(refusal([&] { evaluate_off_policy(log); }) == overflow);
    }
  CHECK(refusal([&] {
          evaluate_off_policy(std::vector<LoggedDecision>(3, {{1e308, 1, 0, 0}}));
        }) == overflow);
  // What is expected of no item changes nothing.
  const auto none = evaluate_off_policy({slates({0.5, 2}, 0), slates({1, 0}, 0)});
  CHECK(none.doubly_robust.mean == 0);
  CHECK(none.effective_sample_size == doctest::Approx(1));
}
