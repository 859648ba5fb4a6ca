#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "small_model.hpp"

// Of its own: several test files are compiled as one.
namespace exploration_tests {

namespace pz = personalize;

namespace {

// Upper tail of the chi-square distribution: the regularised incomplete gamma function Q(k/2, x/2)
// (Abramowitz and Stegun 6.5), by series or continued fraction.
double chi_square_tail(double x, double degrees) {
  const double a = degrees / 2, z = x / 2;
  if (z <= 0) return 1;
  const double front = std::exp(-z + a * std::log(z) - std::lgamma(a));
  if (z < a + 1) {
    double term = 1 / a, sum = term;
    for (int n = 1; n < 10'000 && term > sum * 1e-15; ++n) sum += term *= z / (a + n);
    return 1 - front * sum;
  }
  double b = z + 1 - a, c = 1e300, d = 1 / b, h = d;
  for (int n = 1; n < 10'000; ++n) {
    const double an = -n * (n - a);
    b += 2;
    d = 1 / (an * d + b);
    c = b + an / c;
    h *= d * c;
    if (std::abs(d * c - 1) < 1e-15) break;
  }
  return front * h;
}

struct Setting {
  std::vector<pz::ScoredItem> ranking, pool;
  std::uint32_t items;
};

// Some items of the pool stand in the ranking as well, with a lower score there, as in serving.
Setting random_setting(std::mt19937& random, std::uint32_t items, std::uint32_t pool_items) {
  std::normal_distribution<float> normal;
  Setting setting;
  setting.items = items;
  for (std::uint32_t item = 0; item < items; ++item) {
    const float score = 0.4f * normal(random);
    setting.ranking.push_back({item, score});
    if (item < pool_items) setting.pool.push_back({item, score + 0.2f});
  }
  std::sort(setting.ranking.begin(), setting.ranking.end(), pz::ranks_before);
  return setting;
}

}  // namespace

TEST_CASE("the random generator agrees with the reference values of Philox4x32-10") {
  // Random123's kat_vectors.
  using Block = std::array<std::uint32_t, 4>;
  CHECK(pz::CounterRandom::block(0, {0, 0}) ==
        Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(pz::CounterRandom::block(~0ull, {~0ull, ~0ull}) ==
        Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(pz::CounterRandom::block(0x299f31d0a4093822u, {0x85a308d3243f6a88u, 0x0370734413198a2eu}) ==
        Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("stated propensities are the frequencies of the slates") {
  constexpr int settings = 20, slates = 100'000;
  std::mt19937 random(7);
  for (int s = 0; s < settings; ++s) {
    const auto items = static_cast<std::uint32_t>(3 + random() % 8);
    const auto pool_items = static_cast<std::uint32_t>(1 + random() % items);
    const std::size_t count = 1 + random() % 4;
    const float weight = s == 0 ? 1.0f : s == 1 ? 0.8f : 0.05f * static_cast<float>(random() % 20);
    const float temperature = s % 3 == 0 ? 0.15f : 0.5f;
    const Setting setting = random_setting(random, items, pool_items);
    pz::SlotPolicy policy(weight, temperature);
    pz::ItemMask taken(items);
    std::vector<pz::SlotChoice> choices;

    // For each prefix of picks: how often it stood, what followed, and what was stated of that.
    struct Following {
      std::map<std::uint32_t, std::pair<int, double>> items;  // count, stated propensity
      int total = 0;
    };
    std::map<std::vector<std::uint32_t>, Following> prefixes;
    for (int n = 0; n < slates; ++n) {
      policy.choose(setting.ranking, setting.pool, {}, count,
                    pz::CounterRandom(static_cast<std::uint64_t>(s), static_cast<std::uint64_t>(n)),
                    taken, choices);
      std::vector<std::uint32_t> prefix;
      for (const pz::SlotChoice& choice : choices) {
        Following& following = prefixes[prefix];
        auto& [seen, stated] = following.items[choice.pick.item];
        if (seen > 0) REQUIRE(stated == doctest::Approx(static_cast<double>(choice.propensity)));
        ++seen, ++following.total;
        stated = static_cast<double>(choice.propensity);
        prefix.push_back(choice.pick.item);
      }
    }

    double statistic = 0, degrees = 0, error = 0, cells = 0;
    for (const auto& [prefix, following] : prefixes) {
      if (following.total < 200) continue;
      double rest = 1, rest_seen = following.total;
      int large = 0;
      for (const auto& [item, observed] : following.items) {
        const auto& [seen, stated] = observed;
        if (prefix.empty() || following.total > 20'000) {
          error += std::abs(static_cast<double>(seen) / following.total - stated);
          cells += 1;
        }
        if (stated * following.total < 5) continue;
        const double expected = stated * following.total;
        statistic += (seen - expected) * (seen - expected) / expected;
        rest -= stated;
        rest_seen -= seen;
        ++large;
      }
      if (rest * following.total >= 5) {
        statistic += (rest_seen - rest * following.total) * (rest_seen - rest * following.total) /
                     (rest * following.total);
        ++large;
      }
      degrees += std::max(0, large - 1);
    }
    CAPTURE(s);
    if (degrees > 0) CHECK(chi_square_tail(statistic, degrees) > 0.001 / settings);
    CHECK(error / std::max(cells, 1.0) < 0.002);
  }
}

TEST_CASE("a pool of hundreds of items is drawn from as stated, place after place") {
  constexpr std::uint32_t items = 300;
  constexpr int slates = 60'000;
  std::mt19937 random(8);
  const Setting setting = random_setting(random, items, items);
  pz::SlotPolicy policy(1, 0.5f);
  pz::ItemMask taken(items);
  std::vector<pz::SlotChoice> choices;
  // At each of three places: how often a group of items was drawn, and how often that was to be
  // expected by the shares as the slate stood.
  constexpr std::size_t groups = 6;
  std::array<std::array<double, groups>, 3> seen{}, expected{}, variance{};
  for (int n = 0; n < slates; ++n) {
    policy.choose(setting.ranking, setting.pool, {}, 3,
                  pz::CounterRandom(9, static_cast<std::uint64_t>(n)), taken, choices);
    REQUIRE(choices.size() == 3);
    double left = 0;
    std::array<double, groups> weights{};
    for (const pz::ScoredItem& item : setting.pool) {
      const double weight = std::exp(static_cast<double>(item.score) / 0.5);
      left += weight;
      weights[item.item * groups / items] += weight;
    }
    for (std::size_t place = 0; place < 3; ++place) {
      const pz::ScoredItem& pick = choices[place].pick;
      REQUIRE(choices[place].explored);
      const double weight = std::exp(static_cast<double>(pick.score) / 0.5);
      REQUIRE(static_cast<double>(choices[place].pool_share) ==
              doctest::Approx(weight / left).epsilon(1e-3));
      for (std::size_t g = 0; g < groups; ++g) {
        const double p = weights[g] / left;
        expected[place][g] += p;
        variance[place][g] += p * (1 - p);
      }
      const std::size_t group = pick.item * groups / items;
      ++seen[place][group];
      left -= weight;
      weights[group] -= weight;
    }
  }
  for (std::size_t place = 0; place < 3; ++place)
    for (std::size_t g = 0; g < groups; ++g)
      CHECK(std::abs(seen[place][g] - expected[place][g]) < 4.5 * std::sqrt(variance[place][g]));
}

TEST_CASE("at weight 0 the slate is the ranking, whatever the pool") {
  std::mt19937 random(3);
  const Setting setting = random_setting(random, 30, 20);
  pz::SlotPolicy policy(0, 0.15f);
  pz::ItemMask taken(30);
  std::vector<pz::SlotChoice> choices;
  for (std::uint64_t n = 0; n < 100; ++n) {
    policy.choose(setting.ranking, setting.pool, {}, 10, pz::CounterRandom(1, n), taken, choices);
    REQUIRE(choices.size() == 10);
    for (std::size_t i = 0; i < choices.size(); ++i) {
      CHECK(choices[i].pick.item == setting.ranking[i].item);
      CHECK(choices[i].propensity == 1.0f);
      CHECK_FALSE(choices[i].explored);
    }
  }
}

TEST_CASE("at weight 1 every slot explores while the pool lasts, then the ranking goes on") {
  std::mt19937 random(4);
  const Setting setting = random_setting(random, 30, 6);
  pz::SlotPolicy policy(1, 0.15f);
  pz::ItemMask taken(30);
  std::vector<pz::SlotChoice> choices;
  for (std::uint64_t n = 0; n < 100; ++n) {
    policy.choose(setting.ranking, setting.pool, {}, 12, pz::CounterRandom(1, n), taken, choices);
    REQUIRE(choices.size() == 12);
    for (std::size_t i = 0; i < 6; ++i) CHECK(choices[i].explored);
    float above = std::numeric_limits<float>::infinity();
    for (std::size_t i = 6; i < 12; ++i) {
      CHECK_FALSE(choices[i].explored);
      CHECK(choices[i].propensity == 1.0f);
      CHECK(choices[i].pick.score <= above);
      above = choices[i].pick.score;
    }
  }
}

TEST_CASE("a slate holds every item once, and the mask is as it was") {
  std::mt19937 random(5);
  const Setting setting = random_setting(random, 12, 12);
  pz::SlotPolicy policy(0.7f, 0.3f);
  pz::ItemMask taken(12);
  std::vector<pz::SlotChoice> choices;
  for (std::uint64_t n = 0; n < 1000; ++n) {
    policy.choose(setting.ranking, setting.pool, {}, 20, pz::CounterRandom(1, n), taken, choices);
    REQUIRE(choices.size() == 12);
    std::vector<int> seen(12);
    for (const pz::SlotChoice& choice : choices) ++seen[choice.pick.item];
    CHECK(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
    CHECK(taken.word(0) == 0);
  }
}

TEST_CASE("a pool whose items lie far apart is still drawn to the end") {
  std::vector<pz::ScoredItem> pool;
  for (std::uint32_t i = 0; i < 6; ++i) pool.push_back({i, -500.0f * static_cast<float>(i)});
  pz::SlotPolicy policy(1, 0.15f);
  pz::ItemMask taken(6);
  std::vector<pz::SlotChoice> choices;
  policy.choose({}, pool, {}, 6, pz::CounterRandom(1, 1), taken, choices);
  REQUIRE(choices.size() == 6);
  for (std::uint32_t i = 0; i < 6; ++i) {
    CHECK(choices[i].pick.item == i);
    CHECK(choices[i].propensity == doctest::Approx(1));
  }
}

TEST_CASE("calibration finds the slope and intercept that made the data") {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<pz::CalibrationSample> samples;
  for (int i = 0; i < 100'000; ++i) {
    const float relevance = -2.0f + normal(random), adjustment = 0.3f * normal(random);
    const float examination = 1.0f / std::log2(2.0f + static_cast<float>(i % 10));
    const double rate =
        static_cast<double>(examination) *
        std::exp(0.6 * static_cast<double>(relevance) - 1.0 + static_cast<double>(adjustment));
    samples.push_back({relevance, adjustment, examination, uniform(random) < rate});
  }
  const pz::Calibration fitted = pz::fit_calibration(samples);
  CHECK(static_cast<double>(fitted.slope) == doctest::Approx(0.6).epsilon(0.05));
  CHECK(static_cast<double>(fitted.intercept) == doctest::Approx(-1.0).epsilon(0.05));
}

TEST_CASE("calibration without data, or with hostile data, stays within its bounds") {
  CHECK(pz::fit_calibration({}).slope == doctest::Approx(1));
  CHECK(pz::fit_calibration({}).intercept == doctest::Approx(0));
  std::vector<pz::CalibrationSample> always(1000, {-5, 0, 1, true}), never(1000, {-5, 0, 1, false});
  for (const auto& samples : {always, never}) {
    const pz::Calibration fitted = pz::fit_calibration(samples);
    CHECK(fitted.slope >= 0.1f);
    CHECK(fitted.slope <= 4.0f);
    CHECK(std::abs(fitted.intercept) <= 20.0f);
  }
}

TEST_CASE("the prior's strength and mean are those of the population that made the counts") {
  std::mt19937 random(13);
  for (const double strength : {1.5, 6.0}) {
    const double mean = 0.8;
    std::gamma_distribution<double> quality(strength, mean / strength);
    std::vector<pz::ItemFeedback> items;
    for (int i = 0; i < 5000; ++i) {
      const double expected = 0.5 + 0.01 * static_cast<double>(random() % 1000);
      std::poisson_distribution<int> clicks(quality(random) * expected);
      items.push_back({static_cast<double>(clicks(random)), expected});
    }
    const pz::GammaPrior fitted = pz::fit_prior(items, {2, 1});
    CHECK(fitted.mean == doctest::Approx(mean).epsilon(0.05));
    CHECK(fitted.strength == doctest::Approx(strength).epsilon(0.15));
  }
}

TEST_CASE("few counts move a prior by as much as they tell") {
  const pz::GammaPrior start{4, 0.5};
  const std::vector<pz::ItemFeedback> items{{1, 0.5}, {0, 0.8}, {3, 1.1}, {0, 0.2}, {2, 1.6}};
  double positive = 5, total = 10;
  for (const auto& item : items) positive += item.positive, total += item.expected;
  const double mean = positive / total;
  // The moment of (n - x)^2 - x, where x is expected, is x^2 / strength; each item weighs what its
  // x^2 tells, one at most, and what was known before 20.
  double moments = 20 / start.strength, weights = 20;
  for (const auto& item : items) {
    const double x = mean * item.expected, square = x * x, weight = std::min(1.0, square);
    moments += weight * ((item.positive - x) * (item.positive - x) - x) / square;
    weights += weight;
  }
  const pz::GammaPrior fitted = pz::fit_prior(items, start);
  CHECK(fitted.mean == doctest::Approx(mean));
  CHECK(fitted.strength == doctest::Approx(weights / moments));
}

TEST_CASE("the posterior moves from the prior to the observed ratio, ever more certain") {
  const pz::GammaPrior prior{2, 1};
  const auto none = pz::posterior(prior, {});
  CHECK(none.mean == doctest::Approx(0));
  CHECK(none.deviation == doctest::Approx(std::sqrt(std::log(1.5))));
  const auto ignored = pz::posterior(prior, {0, 5}), liked = pz::posterior(prior, {10, 5});
  CHECK(ignored.mean < none.mean);
  CHECK(liked.mean > none.mean);
  CHECK(liked.deviation < none.deviation);
  CHECK(pz::posterior(prior, {2000, 1000}).mean == doctest::Approx(std::log(2.0)).epsilon(0.01));
}

TEST_CASE("the vector correction solves its ridge equations") {
  constexpr std::size_t d = 6;
  std::mt19937 random(17);
  std::normal_distribution<double> normal;
  // M = mean of q q^T.
  std::vector<double> moment(d * d);
  for (int n = 0; n < 50; ++n) {
    std::array<double, d> q;
    for (double& v : q) v = normal(random);
    for (std::size_t i = 0; i < d; ++i)
      for (std::size_t j = 0; j < d; ++j) moment[i * d + j] += q[i] * q[j] / 50;
  }
  double trace = 0;
  for (std::size_t i = 0; i < d; ++i) trace += moment[i * d + i];
  const pz::VectorCorrection correction(moment, d);
  std::vector<float> residual(d), delta(d);
  for (float& v : residual) v = static_cast<float>(normal(random));
  for (const double expected : {0.0, 1.0, 1000.0}) {
    correction.solve(residual, expected, delta);
    // (ridge trace I + expected M) delta / damping = residual
    for (std::size_t i = 0; i < d; ++i) {
      double left = 0;
      for (std::size_t j = 0; j < d; ++j)
        left +=
            (expected * moment[i * d + j] + (i == j ? pz::VectorCorrection::ridge * trace : 0)) *
            static_cast<double>(delta[j]) / pz::VectorCorrection::damping;
      CHECK(left == doctest::Approx(static_cast<double>(residual[i])).epsilon(1e-4));
    }
  }
}

TEST_CASE("the vector correction is nothing where no query was ever seen") {
  const pz::VectorCorrection correction(std::vector<double>(9), 3);
  const std::vector<float> residual{1, 2, 3};
  std::vector<float> delta{9, 9, 9};
  correction.solve(residual, 1, delta);
  CHECK(delta == std::vector<float>{0, 0, 0});
}

namespace {

constexpr std::int64_t day = 86'400;
// The newest interaction of small_model's data.
constexpr std::int64_t start = 1'600'000'000 + 49 + 1000;

pz::Recommender make(pz::RecommenderOptions options = {}, const small_model::Shape& shape = {}) {
  if (options.update_interval == std::chrono::hours{2}) options.update_interval = {};
  auto shop = pz::Recommender::create(small_model::model(shape), options);
  REQUIRE(shop);
  return std::move(*shop);
}

void learn(pz::Recommender& shop, std::string_view user, std::string_view item) {
  REQUIRE(shop.record({.user = user, .item = item, .timestamp = start}));
}

std::size_t rank_of(pz::Recommender& shop, std::string_view user, std::string_view item) {
  const auto slate = shop.recommend({.user = user, .count = 50, .timestamp = start});
  REQUIRE(slate);
  for (std::size_t i = 0; i < slate->items.size(); ++i)
    if (slate->items[i].item == item) return i;
  FAIL("not in the slate");
  return 0;
}

}  // namespace

TEST_CASE("options outside their ranges are refused, and the error names the range") {
  const auto refused = [](const pz::RecommenderOptions& options, std::string_view text) {
    const auto shop = pz::Recommender::create(small_model::model(), options);
    REQUIRE_FALSE(shop);
    CHECK(shop.error().code == pz::Errc::invalid_argument);
    CHECK(shop.error().message.find(text) != std::string::npos);
  };
  refused({.exploration_weight = -0.01f}, "[0, 1]");
  refused({.exploration_weight = 1.01f}, "[0, 1]");
  refused({.exploration_weight = std::nanf("")}, "[0, 1]");
  refused({.exploration_item_age_cut_off = std::chrono::seconds{0}}, "above 0");
  refused({.examination = {1.0f, 0.0f}}, "(0, 1]");
  refused({.update_interval = std::chrono::seconds{-1}}, "update_interval");
  refused({.remembered_slates = 0}, "[1, 2^28]");
  refused({.slate_expiry = std::chrono::seconds{0}}, "above 0");
}

TEST_CASE("served slates come up as often as their propensities say") {
  // Scores close together, so that many slates are likely.
  pz::ModelParts parts = small_model::parts({.items = 12});
  for (float& v : parts.item_vectors.f32()) v *= 0.1f;
  for (float& bias : parts.biases) bias *= 0.1f;
  const auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  auto created =
      pz::Recommender::create(*model, {.exploration_weight = 0.6f, .update_interval = {}});
  REQUIRE(created);
  pz::Recommender shop = std::move(*created);
  learn(shop, "u", "i3");
  constexpr int slates = 60'000;
  std::map<std::vector<std::string>, std::pair<int, double>> seen;
  pz::Slate slate;
  for (int n = 0; n < slates; ++n) {
    REQUIRE(shop.recommend({.user = "u", .count = 2, .timestamp = start}, slate));
    std::vector<std::string> ids;
    double product = 1;
    for (const pz::Pick& pick : slate.items) {
      ids.emplace_back(pick.item);
      product *= static_cast<double>(pick.propensity);
    }
    REQUIRE(slate.propensity == doctest::Approx(product));
    ++seen[ids].first;
    seen[ids].second = slate.propensity;
  }
  CHECK(seen.size() > 10);
  double stated = 0;
  for (const auto& [ids, observed] : seen) {
    const auto [times, propensity] = observed;
    stated += propensity;
    const double deviation = std::sqrt(propensity * (1 - propensity) / slates);
    CHECK(std::abs(static_cast<double>(times) / slates - propensity) < 5 * deviation + 1e-4);
  }
  CHECK(stated == doctest::Approx(1).epsilon(0.01));
}

TEST_CASE("weight 0 is the ranking by u, which explain takes apart") {
  auto shop = make({.exploration_weight = 0});
  for (const char* user : {"u", "v", "w"}) learn(shop, user, "i3");
  // Some feedback, so that every part has something to say.
  for (const char* user : {"u", "v", "w"}) {
    const auto slate = shop.recommend({.user = user, .count = 20, .timestamp = start});
    REQUIRE(shop.record({.user = user,
                         .item = slate->items[7].item,
                         .timestamp = start,
                         .recommendation_id = slate->id}));
  }
  REQUIRE(shop.update(start));
  for (const char* user : {"u", "nobody"}) {
    const auto slate = shop.recommend({.user = user, .count = 50, .timestamp = start});
    REQUIRE(slate->items.size() == 50);
    CHECK(slate->propensity == 1);
    bool discounted = false, corrected = false, rated = false;
    for (std::size_t i = 0; i < 50; ++i) {
      const auto parts = shop.explain({.user = user, .timestamp = start}, slate->items[i].item);
      REQUIRE(parts);
      CHECK(parts->relevance + parts->quality + parts->taste - parts->discount ==
            doctest::Approx(static_cast<double>(parts->score)).epsilon(1e-3));
      if (i > 0) CHECK(slate->items[i].score <= slate->items[i - 1].score);
      discounted = discounted || parts->discount > 0;
      corrected = corrected || parts->taste != 0;
      rated = rated || parts->quality != 0;
      if (std::string_view(user) == "u")
        CHECK(parts->score == doctest::Approx(static_cast<double>(slate->items[i].score)));
    }
    CHECK(rated);
    CHECK(discounted == (std::string_view(user) == "u"));
    CHECK(corrected == (std::string_view(user) == "u"));
  }
}

TEST_CASE("explain gives relevance, quality, discount, uncertainty and age as they are defined") {
  auto shop = make({.exploration_weight = 0.5f});
  auto bare = make({.exploration_weight = 0, .feedback = false});
  for (auto* each : {&shop, &bare}) learn(*each, "u", "i3");
  REQUIRE(shop.put_item({.item = "new", .creation_timestamp = start - day}));
  REQUIRE(shop.update(start));
  const std::vector<std::string_view> shown{"i7", "i9"};
  for (int n = 0; n < 3; ++n)
    REQUIRE(shop.record_impression({.user = "u", .items = shown, .timestamp = start}));
  const pz::Request request{.user = "u", .timestamp = start};
  const auto i7 = shop.explain(request, "i7"), i8 = shop.explain(request, "i8");
  const auto fresh = shop.explain(request, "new");
  REQUIRE(fresh);
  for (const char* item : {"i7", "i8"})
    CHECK(shop.explain(request, item)->relevance ==
          doctest::Approx(static_cast<double>(bare.explain(request, item)->score)).epsilon(1e-3));
  // Not updated since: slope 1, and nothing learnt yet but what this user ignored.
  CHECK(i7->discount == doctest::Approx(3 * 0.4));
  CHECK(i8->discount == 0);
  CHECK(i7->taste != 0);  // the user's leaning
  CHECK(i7->positive == 0);
  CHECK(i7->expected > 0);
  CHECK(i8->expected == 0);
  // sqrt(ln(1 + 1 / (a mu + C))) with the priors before any feedback: a = 2 for the new item.
  CHECK(fresh->uncertainty == doctest::Approx(std::sqrt(std::log(1.5))).epsilon(1e-4));
  CHECK(fresh->age == day);
  CHECK(fresh->explorable);
  CHECK_FALSE(shop.explain(request, "no such item"));
}

TEST_CASE("weight 1 explores every place while the pool lasts, for cold users too") {
  auto shop = make({.exploration_weight = 1});
  learn(shop, "u", "i3");
  for (const char* user : {"u", "nobody"}) {
    const auto slate = shop.recommend({.user = user, .count = 50, .timestamp = start});
    for (const pz::Pick& pick : slate->items) CHECK(pick.reason == pz::Reason::exploration);
  }
}

TEST_CASE("items older than the cut-off are not explored, and age runs to the latest interaction") {
  auto shop = make({.exploration_weight = 1, .exploration_item_age_cut_off = std::chrono::days{2}});
  learn(shop, "u", "i3");
  const auto explored = [&] {
    const auto slate = shop.recommend({.user = "u", .count = 50, .timestamp = start + 9 * day});
    return std::count_if(slate->items.begin(), slate->items.end(), [](const pz::Pick& pick) {
      return pick.reason == pz::Reason::exploration;
    });
  };
  CHECK(explored() == 50);
  REQUIRE(shop.put_item({.item = "new", .creation_timestamp = start + 3 * day}));
  REQUIRE(shop.update(start));
  // The clock alone ages nothing; an interaction does.
  CHECK(explored() == 50);
  REQUIRE(shop.record({.user = "v", .item = "i4", .timestamp = start + 3 * day}));
  CHECK(explored() == 1);
}

TEST_CASE("an item leaves the pool once it has had enough feedback") {
  auto shop = make({.exploration_weight = 1}, {.items = 8});
  const auto explorable = [&](std::string_view item) {
    return shop.explain({.user = "u", .timestamp = start}, item)->explorable;
  };
  CHECK(explorable("i1"));
  const std::vector<std::string_view> shown{"i1"};
  for (int n = 0; n < 2000; ++n) {
    const std::string user = "u" + std::to_string(n);
    REQUIRE(shop.record_impression({.user = user, .items = shown, .timestamp = start}));
  }
  REQUIRE(shop.update(start));
  CHECK_FALSE(explorable("i1"));
  CHECK(explorable("i2"));
}

TEST_CASE("a new item takes part after the update, near the items it is like") {
  auto shop = make({.exploration_weight = 0});
  learn(shop, "u", "i3");
  REQUIRE(shop.put_item({.item = "new_bow",
                         .creation_timestamp = start,
                         .fields = {{"GENRE", "bow|shield"}, {"PRICE", "2.0"}}}));
  CHECK_FALSE(shop.model()->find_item("new_bow"));
  const auto record = [&] {
    const auto recorded = shop.record({.user = "v", .item = "new_bow", .timestamp = start});
    REQUIRE(recorded);
    return *recorded;
  };
  CHECK(record() == pz::Recorded::pending_item);
  REQUIRE(shop.update(start));
  CHECK(shop.model()->item_count() == 51);
  CHECK(record() == pz::Recorded::learned);
  const auto slate = shop.recommend({.user = "u", .count = 51, .timestamp = start});
  CHECK(slate->items.size() == 51);
  const auto explained = shop.explain({.user = "u", .timestamp = start}, "new_bow");
  REQUIRE(explained);
  CHECK(explained->explorable == false);  // weight 0 has no pool
  CHECK(explained->age == 0);
  CHECK_FALSE(shop.put_item({.item = ""}));
}

TEST_CASE("in requests, an automatic update comes when its interval has passed by the clock") {
  std::int64_t clock = start;
  auto shop = pz::Recommender::create(small_model::model(), {.exploration_weight = 0,
                                                             .updates = pz::Updates::in_requests,
                                                             .clock = [&] { return clock; }});
  REQUIRE(shop);
  REQUIRE(shop->record({.user = "u", .item = "i3", .timestamp = start}));
  REQUIRE(shop->put_item({.item = "new", .creation_timestamp = start}));
  // An event's own time moves nothing.
  REQUIRE(shop->record({.user = "u", .item = "i3", .timestamp = start + 7200}));
  clock = start + 7199;
  REQUIRE(shop->record({.user = "u", .item = "i3", .timestamp = start}));
  CHECK(shop->item_count() == 50);
  CHECK_FALSE(shop->update_due());
  clock = start + 7200;
  CHECK(shop->update_due());
  REQUIRE(shop->record({.user = "u", .item = "i3", .timestamp = start}));
  CHECK(shop->item_count() == 51);
  CHECK_FALSE(shop->update_due());
  CHECK(shop->update_report().items_added == 1);
}

TEST_CASE("an item that is shown and ignored falls for similar users, one that is clicked rises") {
  const auto expected_rank = [](pz::Recommender& shop, std::string_view item) {
    double sum = 0;
    for (int n = 0; n < 20; ++n) {
      const std::string user = "similar" + std::to_string(n);
      learn(shop, user, "i3");
      sum += static_cast<double>(rank_of(shop, user, item));
    }
    return sum / 20;
  };
  auto shop = make({.exploration_weight = 0});
  learn(shop, "u", "i3");
  const auto slate = shop.recommend({.user = "u", .count = 10, .timestamp = start});
  const std::string ignored(slate->items[1].item), clicked(slate->items[8].item);
  const double ignored_before = expected_rank(shop, ignored);
  const double clicked_before = expected_rank(shop, clicked);
  for (int n = 0; n < 50; ++n) {
    const std::string user = "user" + std::to_string(n);
    learn(shop, user, "i3");
    const auto shown = shop.recommend({.user = user, .count = 10, .timestamp = start});
    REQUIRE(shop.record(
        {.user = user, .item = clicked, .timestamp = start, .recommendation_id = shown->id}));
  }
  REQUIRE(shop.update(start));
  CHECK(expected_rank(shop, ignored) > ignored_before + 2);
  CHECK(expected_rank(shop, clicked) < clicked_before - 2);
}

TEST_CASE("what was learnt of an item fades with time alone") {
  std::int64_t clock = start;
  auto shop = make({.exploration_weight = 0, .clock = [&] { return clock; }});
  const std::vector<std::string_view> shown{"i7"};
  for (int n = 0; n < 40; ++n)
    REQUIRE(shop.record({.user = "u" + std::to_string(n), .item = "i7", .impressions = shown}));
  const auto quality = [&] {
    REQUIRE(shop.update());
    return static_cast<double>(shop.explain({.user = "x"}, "i7")->quality);
  };
  const double learnt = quality();
  CHECK(learnt > 0.5);
  // Nobody touches it again; others are.
  for (const int half_lives : {1, 8, 16}) {
    clock = start + half_lives * 14 * day;
    learn(shop, "w" + std::to_string(half_lives), "i9");
    if (half_lives > 1) CHECK(std::abs(quality()) < learnt / 4);
  }
  clock += 14 * day;
  CHECK(std::abs(quality()) < learnt / 100);
}

TEST_CASE("the calibration learns from what was seen, and not from the rest of a slate") {
  float expected = 0;
  auto shop = make({.exploration_weight = 0, .log = [&](const pz::LogEntry& entry) {
                      if (!entry.positive && entry.position == 1) expected = entry.expected;
                    }});
  // Of each slate the first pick is seen, and chosen; nine others are not.
  const auto round = [&](int number) {
    for (int n = 0; n < 200; ++n) {
      const std::string user = std::to_string(number) + "u" + std::to_string(n);
      learn(shop, user, "i" + std::to_string(n % 50));
      const auto slate = shop.recommend({.user = user, .count = 10, .timestamp = start});
      REQUIRE(slate);
      const std::vector<std::string_view> shown{slate->items[0].item};
      REQUIRE(shop.record({.user = user,
                           .item = shown[0],
                           .timestamp = start,
                           .recommendation_id = slate->id,
                           .impressions = shown}));
    }
    return static_cast<double>(expected);
  };
  const double before = round(0);
  REQUIRE(shop.update(start));
  CHECK(round(1) > before);
}

TEST_CASE("an item that one user ignores falls for that user at once") {
  auto shop = make({.exploration_weight = 0});
  learn(shop, "u", "i3");
  const auto slate = shop.recommend({.user = "u", .count = 1, .timestamp = start});
  const std::vector<std::string_view> shown{slate->items[0].item};
  for (int n = 0; n < 50; ++n)
    REQUIRE(shop.record_impression({.user = "u", .items = shown, .timestamp = start}));
  CHECK(rank_of(shop, "u", shown[0]) > 5);
  learn(shop, "v", "i3");
  CHECK(rank_of(shop, "v", shown[0]) == 0);
}

TEST_CASE("what a user passes over or chooses moves the score of what is like it") {
  // Counters and corrections, which are those of all users, wait for an update.
  auto shop = make({.exploration_weight = 0});
  for (const char* user : {"u", "v", "w"}) learn(shop, user, "i3");
  const auto taste = [&](const char* user, std::string_view item) {
    const auto parts = shop.explain({.user = user, .timestamp = start}, item);
    REQUIRE(parts);
    return static_cast<double>(parts->taste);
  };
  const auto slate = shop.recommend({.user = "u", .count = 1, .timestamp = start});
  const std::vector<std::string_view> shown{slate->items[0].item};
  REQUIRE(shop.record_impression({.user = "u", .items = shown, .timestamp = start}));
  REQUIRE(shop.record_impression({.user = "v", .items = shown, .timestamp = start}));
  REQUIRE(shop.record({.user = "v", .item = shown[0], .timestamp = start}));

  const pz::Matrix& vectors = shop.model()->parts().item_vectors;
  const auto d = vectors.columns();
  const auto shown_index = *shop.model()->find_item(shown[0]);
  const auto product = [&](std::uint32_t a, std::uint32_t b) {
    double sum = 0;
    for (std::size_t c = 0; c < d; ++c)
      sum += static_cast<double>(vectors.at(a, c)) * static_cast<double>(vectors.at(b, c));
    return sum;
  };
  double mean_square = 0;
  for (std::uint32_t i = 0; i < vectors.rows(); ++i)
    mean_square += product(i, i) / static_cast<double>(vectors.rows());
  // Before any update the slope is 1, and what is expected of the impression is what the model
  // alone expects.
  const double expected = shop.explain({.user = "w", .timestamp = start}, shown[0])->expected / 2;
  REQUIRE(expected > 0);
  REQUIRE(expected < 1);
  for (std::uint32_t i = 0; i < 50; ++i) {
    const std::string id(shop.model()->item_id(i));
    const double step = 0.6 * product(i, shown_index) / mean_square;
    CAPTURE(id);
    CHECK(taste("u", id) == doctest::Approx(-expected * step).epsilon(1e-3));
    // The event itself then lets go of a twentieth.
    CHECK(taste("v", id) == doctest::Approx(0.95 * (1 - expected) * step).epsilon(1e-3));
    CHECK(taste("w", id) == 0);
  }

  // A visitor's leaning becomes the user's as it is.
  REQUIRE(shop.record({.session = "s", .item = "i3", .timestamp = start}));
  REQUIRE(shop.record_impression({.session = "s", .items = shown, .timestamp = start}));
  REQUIRE(*shop.merge_session("s", "x"));
  CHECK(taste("x", shown[0]) ==
        doctest::Approx(-expected * 0.6 * product(shown_index, shown_index) / mean_square)
            .epsilon(1e-3));

  auto bare = make({.exploration_weight = 0, .feedback = false});
  learn(bare, "u", "i3");
  const float before = bare.explain({.user = "u", .timestamp = start}, shown[0])->score;
  (void)bare.record_impression({.user = "u", .items = shown, .timestamp = start});
  CHECK(bare.explain({.user = "u", .timestamp = start}, shown[0])->score == before);
}

TEST_CASE("the same seed, model, calls and timestamps give the same slates") {
  const auto run = [](std::uint64_t seed) {
    auto shop =
        pz::Recommender::create(small_model::model(), {.exploration_weight = 0.5f, .seed = seed});
    REQUIRE(shop);
    std::vector<std::pair<std::string, float>> picks;
    for (int n = 0; n < 200; ++n) {
      const std::int64_t t = start + n * 600;
      const std::string user = "u" + std::to_string(n % 7);
      const auto slate = shop->recommend({.user = user, .count = 5, .timestamp = t});
      for (const pz::Pick& pick : slate->items)
        picks.emplace_back(std::string(pick.item), pick.score + pick.propensity);
      REQUIRE(shop->record({.user = user,
                            .item = slate->items[static_cast<std::size_t>(n % 5)].item,
                            .timestamp = t,
                            .recommendation_id = slate->id}));
    }
    return picks;
  };
  CHECK(run(1) == run(1));
  CHECK(run(1) != run(2));
}

TEST_CASE("the log has every impression and positive event with its propensity") {
  struct Line {
    std::string item, id;
    std::uint32_t position;
    bool positive;
    float propensity;
  };
  std::vector<Line> lines;
  std::string csv;
  auto shop =
      make({.exploration_weight = 0.5f, .log = [&](const pz::LogEntry& entry) {
              lines.push_back({std::string(entry.item), std::string(entry.recommendation_id),
                               entry.position, entry.positive, entry.choice.propensity});
              pz::append_csv(entry, csv);
            }});
  learn(shop, "u,1", "i3");
  const auto slate = shop.recommend({.user = "u,1", .count = 4, .timestamp = start});
  REQUIRE(shop.record({.user = "u,1",
                       .item = slate->items[2].item,
                       .timestamp = start,
                       .recommendation_id = slate->id}));
  REQUIRE(lines.size() == 5);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(lines[i].item == slate->items[i].item);
    CHECK(lines[i].id == slate->id);
    CHECK(lines[i].position == i + 1);
    CHECK_FALSE(lines[i].positive);
    CHECK(lines[i].propensity == slate->items[i].propensity);
  }
  CHECK(lines[4].positive);
  CHECK(lines[4].item == slate->items[2].item);
  CHECK(lines[4].position == 3);
  CHECK(csv.find("\"u,1\"") != std::string::npos);
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 5);
  const std::string first = csv.substr(0, csv.find('\n'));
  // One quoted comma more than the header has.
  CHECK(std::count(first.begin(), first.end(), ',') ==
        std::count(pz::log_csv_header.begin(), pz::log_csv_header.end(), ',') + 1);
}

TEST_CASE("recording, recommending, decaying, updating and growing at once") {
  std::atomic<int> logged{0};
  auto shop = pz::Recommender::create(small_model::model(),
                                      {.exploration_weight = 0.5f,
                                       .update_interval = std::chrono::seconds{600},
                                       .remembered_slates = 64,
                                       .log = [&](const pz::LogEntry&) { ++logged; }});
  REQUIRE(shop);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      pz::Slate slate;
      for (int n = 0; n < 300; ++n) {
        // Over 75 days: counters age by five half-lives while others add to them.
        const std::int64_t time = start + n * day / 4;
        const std::string user = "u" + std::to_string((n + t) % 5);
        if (!shop->recommend({.user = user, .count = 10, .timestamp = time}, slate)) ++failures;
        if (!shop->record({.user = user,
                           .item = slate.items[static_cast<std::size_t>(n % 10)].item,
                           .timestamp = time,
                           .recommendation_id = slate.id}))
          ++failures;
        if (!shop->explain({.user = user, .timestamp = time}, "i1")) ++failures;
        if (!shop->record_impression(
                {.user = user, .recommendation_id = slate.id, .timestamp = time}))
          ++failures;
      }
    });
  threads.emplace_back([&] {
    for (int n = 0; n < 20; ++n) {
      const std::string item = "new" + std::to_string(n);
      if (!shop->put_item({.item = item, .creation_timestamp = start})) ++failures;
      if (!shop->update(start + n * 4 * day)) ++failures;
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(logged > 0);
  CHECK(shop->model()->item_count() == 70);
}

}  // namespace exploration_tests
