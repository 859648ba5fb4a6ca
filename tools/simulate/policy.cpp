#include "simulate/policy.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <unordered_set>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

constexpr std::int64_t cold_age = 30 * World::day;
constexpr double cold_expected = 3;
constexpr std::size_t slate_length = World::slate_length;
constexpr std::size_t normalising_items = 32;  // as in the runtime

std::string user_id(std::uint32_t user) { return "u" + std::to_string(user + 1); }

std::uint32_t item_of(std::string_view id) {
  return static_cast<std::uint32_t>(std::stoul(std::string(id.substr(1))) - 1);
}

template <class T>
T value(Result<T> result) {
  if (!result) throw Failure(result.error().message);
  return std::move(*result);
}

void require(const Result<void>& result) {
  if (!result) throw Failure(result.error().message);
}

void put_item(Recommender& shop, const World& world, std::uint32_t item) {
  const std::string id = world.item_id(item);
  const std::string genre = world.genre_name(world.items()[item].genre);
  require(shop.put_item({.item = id,
                         .creation_timestamp = world.items()[item].created,
                         .fields = {{"GENRE", genre}}}));
}

void replay(Recommender& shop, const World& world) {
  for (const World::Event& event : world.history())
    (void)value(shop.record({.user = user_id(event.user),
                             .item = world.item_id(event.item),
                             .timestamp = event.timestamp}));
}

// What the runtime would explore: young items of which few clicks were expected so far.
class ColdItems {
 public:
  explicit ColdItems(const World& world) : world_(world) {}
  // expected(item): clicks that its impressions let expect.
  template <class Expected>
  void update(std::int64_t now, std::size_t items, Expected expected) {
    cold_.clear();
    for (std::uint32_t i = 0; i < items; ++i)
      if (now - world_.items()[i].created <= cold_age && expected(i) < cold_expected)
        cold_.push_back(i);
  }
  // Each place becomes a random cold item with probability epsilon.
  template <class Excluded>
  void mix_in(double epsilon, Random& random, Excluded excluded,
              std::vector<std::uint32_t>& slate) const {
    for (std::uint32_t& place : slate) {
      if (random.uniform() >= epsilon || cold_.empty()) continue;
      const std::uint32_t item = cold_[random.below(cold_.size())];
      if (!excluded(item) && std::find(slate.begin(), slate.end(), item) == slate.end())
        place = item;
    }
  }

 private:
  const World& world_;
  std::vector<std::uint32_t> cold_;
};

// The header's recommender, alone or with epsilon-greedy on top.
class RuntimePolicy : public Policy {
 public:
  RuntimePolicy(const World& world, const PolicyOptions& options, double weight, double epsilon)
      : cold_(world),
        epsilon_(epsilon),
        random_(options.seed),
        shop_(value(Recommender::create(
            world.model(), {.exploration_weight = static_cast<float>(weight),
                            .update_interval = {},
                            .seed = options.seed,
                            .recommendation_key = std::array<std::uint64_t, 2>{options.seed, 1},
                            .log = options.log}))) {
    replay(shop_, world);
    for (const World::Event& event : world.history()) clicked_.insert(key(event.user, event.item));
    find_cold(world.start());
  }

  void add_item(const World& world, std::uint32_t item) override { put_item(shop_, world, item); }

  void update(std::int64_t now) override {
    require(shop_.update(now));
    find_cold(now);
  }

  void choose(const World::Visit& visit, std::vector<std::uint32_t>& slate) override {
    require(shop_.recommend({.user = user_id(visit.user),
                             .count = slate_length,
                             .exclude_interacted = true,
                             .timestamp = visit.timestamp},
                            served_));
    slate.clear();
    for (const Pick& pick : served_.items) slate.push_back(item_of(pick.item));
    if (epsilon_ > 0)
      cold_.mix_in(
          epsilon_, random_,
          [&](std::uint32_t item) { return clicked_.contains(key(visit.user, item)); }, slate);
  }

  void learn(const World::Visit& visit, const std::vector<std::uint32_t>& slate,
             const std::vector<bool>& clicked) override {
    const std::string user = user_id(visit.user);
    std::vector<std::string> ids;
    for (const std::uint32_t item : slate) ids.push_back("i" + std::to_string(item + 1));
    const std::vector<std::string_view> shown(ids.begin(), ids.end());
    // Where epsilon-greedy has changed the slate, the id is no longer its own.
    const std::string_view id = epsilon_ > 0 ? std::string_view{} : std::string_view(served_.id);
    (void)value(shop_.record_impression(
        {.user = user, .recommendation_id = id, .items = shown, .timestamp = visit.timestamp}));
    for (std::size_t place = 0; place < slate.size(); ++place) {
      if (!clicked[place]) continue;
      clicked_.insert(key(visit.user, slate[place]));
      (void)value(shop_.record({.user = user,
                                .item = ids[place],
                                .timestamp = visit.timestamp,
                                .recommendation_id = id}));
    }
  }

 private:
  void find_cold(std::int64_t now) {
    if (epsilon_ == 0) return;
    const auto model = shop_.model();
    cold_.update(now, model->item_count(), [&](std::uint32_t item) {
      return value(shop_.explain({.user = "u1", .timestamp = now}, model->item_id(item))).expected;
    });
  }

  static std::uint64_t key(std::uint32_t user, std::uint32_t item) {
    return std::uint64_t{user} << 32 | item;
  }

  ColdItems cold_;
  double epsilon_;
  Random random_;
  Recommender shop_;
  Slate served_;
  std::unordered_set<std::uint64_t> clicked_;
};

// What the other policies share: the bare model's scores and calibration, the users' states and
// their ignored impressions.
class ModelPolicy : public Policy {
 public:
  ModelPolicy(const World& world, const PolicyOptions& options)
      : world_(world),
        random_(options.seed),
        catalogue_(value(Recommender::create(
            world.model(), {.exploration_weight = 0, .feedback = false, .update_interval = {}}))) {
    refresh();
    for (const World::Event& event : world.history()) click(event.user, event.item);
  }

  void add_item(const World& world, std::uint32_t item) override {
    put_item(catalogue_, world, item);
  }

  void update(std::int64_t now) override {
    require(catalogue_.update(now));
    if (catalogue_.model() != model_) refresh();
    calibration_ = fit_calibration(samples_, calibration_);
    if (samples_.size() > 20'000) samples_.erase(samples_.begin(), samples_.end() - 20'000);
    now_ = now;
  }

  void choose(const World::Visit& visit, std::vector<std::uint32_t>& slate) override {
    User& user = users_.at(visit.user);
    const auto query = encoder_->query(user.state);
    scorer_->top_k(query, normalising_items, {}, scoring_, ranking_);
    double sum = 0;
    const auto largest = static_cast<double>(ranking_[0].score);
    for (const ScoredItem& scored : ranking_)
      sum += std::exp(static_cast<double>(scored.score) - largest);
    normaliser_ = largest + std::log(sum);
    scores_.resize(model_->item_count());
    for (std::uint32_t i = 0; i < scores_.size(); ++i) scores_[i] = scorer_->score(query, i);
    user.impressions.for_each(visit.timestamp, [&](std::uint32_t item, float count) {
      discounts_.push_back({item, count});
    });
    rate(visit, user, scores_);
    discounts_.clear();
    order_.resize(scores_.size());
    std::iota(order_.begin(), order_.end(), 0u);
    for (const std::uint32_t item : user.clicked)
      scores_[item] = -std::numeric_limits<float>::infinity();
    std::partial_sort(order_.begin(), order_.begin() + slate_length, order_.end(),
                      [&](std::uint32_t a, std::uint32_t b) { return scores_[a] > scores_[b]; });
    slate.assign(order_.begin(), order_.begin() + slate_length);
    finish(visit, user, slate);
  }

  void learn(const World::Visit& visit, const std::vector<std::uint32_t>& slate,
             const std::vector<bool>& clicked) override {
    User& user = users_.at(visit.user);
    for (std::size_t place = 0; place < slate.size(); ++place) {
      const float relevance =
          static_cast<float>(static_cast<double>(model_score(user, slate[place])) - normaliser_);
      samples_.push_back({relevance, 0, examination(place), clicked[place]});
      observe(user, slate[place], examination(place), expected(relevance), clicked[place]);
      if (!clicked[place]) user.impressions.add(slate[place], visit.timestamp);
    }
    for (std::size_t place = 0; place < slate.size(); ++place)
      if (clicked[place]) {
        user.impressions.remove(slate[place]);
        click(visit.user, slate[place]);
      }
  }

 protected:
  struct User {
    std::vector<float> state;
    RecentImpressions impressions;
    std::unordered_set<std::uint32_t> clicked;
  };

  // Turns the model's scores into those of the policy.
  virtual void rate(const World::Visit& visit, const User& user, std::vector<float>& scores) = 0;
  virtual void finish(const World::Visit&, const User&, std::vector<std::uint32_t>&) {}
  // expected: positive events of an examined impression, by the model alone.
  virtual void observe(const User&, std::uint32_t, float /*examination*/, float /*expected*/,
                       bool /*clicked*/) {}

  float expected(float relevance) const {
    return std::exp(std::min(calibration_.slope * relevance + calibration_.intercept, 0.0f));
  }
  static float examination(std::size_t place) {
    return 1 / std::log2(static_cast<float>(place) + 2);
  }

  const World& world_;
  Random random_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Encoder> encoder_;
  Calibration calibration_;
  double normaliser_ = 0;
  std::int64_t now_ = world_.start();
  std::vector<ScoredItem> discounts_;  // ignored impressions of the user who is served

 private:
  void refresh() {
    model_ = catalogue_.model();
    encoder_ = std::make_unique<Encoder>(*model_);
    workspace_ = encoder_->make_workspace();
    scorer_ = std::make_unique<Scorer>(*model_);
    scoring_ = scorer_->make_workspace();
  }

  float model_score(const User& user, std::uint32_t item) const {
    return scorer_->score(encoder_->query(user.state), item);
  }

  void click(std::uint32_t id, std::uint32_t item) {
    if (users_.size() <= id) users_.resize(id + std::size_t{1});
    User& user = users_[id];
    user.state.resize(encoder_->state_size());
    encoder_->step({.item = item}, user.state, workspace_);
    user.clicked.insert(item);
  }

  Recommender catalogue_;
  std::unique_ptr<Scorer> scorer_;
  Encoder::Workspace workspace_;
  Scorer::Workspace scoring_;
  std::vector<User> users_;
  std::vector<CalibrationSample> samples_;
  std::vector<ScoredItem> ranking_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
};

class Greedy : public ModelPolicy {
 public:
  using ModelPolicy::ModelPolicy;

 protected:
  void rate(const World::Visit&, const User&, std::vector<float>&) override {}
};

class EpsilonGreedy : public Greedy {
 public:
  EpsilonGreedy(const World& world, const PolicyOptions& options)
      : Greedy(world, options), epsilon_(options.weight), cold_(world) {
    update(world.start());
  }
  void update(std::int64_t now) override {
    Greedy::update(now);
    expected_.resize(model_->item_count());
    cold_.update(now, expected_.size(), [&](std::uint32_t item) { return expected_[item]; });
  }

 protected:
  void finish(const World::Visit&, const User& user, std::vector<std::uint32_t>& slate) override {
    cold_.mix_in(
        epsilon_, random_, [&](std::uint32_t item) { return user.clicked.contains(item); }, slate);
  }
  void observe(const User&, std::uint32_t item, float examination, float expected_clicks,
               bool) override {
    expected_[item] += static_cast<double>(examination * expected_clicks);
  }

 private:
  double epsilon_;
  ColdItems cold_;
  std::vector<double> expected_;
};

class Thompson : public ModelPolicy {
 public:
  using ModelPolicy::ModelPolicy;

 protected:
  void rate(const World::Visit&, const User&, std::vector<float>& scores) override {
    counts_.resize(scores.size());
    // Drawing anew for every slate would cost more than it changes.
    if (drawn_.size() != scores.size() || ++served_ % 20 == 0) {
      drawn_.resize(scores.size());
      for (std::size_t i = 0; i < scores.size(); ++i) {
        const double a = random_.gamma(1 + counts_[i].clicks);
        const double b = random_.gamma(1 + std::max(0.0, counts_[i].examined - counts_[i].clicks));
        drawn_[i] = static_cast<float>(a / (a + b));
      }
    }
    scores = drawn_;
  }
  void observe(const User&, std::uint32_t item, float examination, float, bool clicked) override {
    counts_[item].examined += static_cast<double>(examination);
    counts_[item].clicks += clicked ? 1 : 0;
  }

 private:
  struct Count {
    double clicks = 0, examined = 0;
  };
  std::vector<Count> counts_;
  std::vector<float> drawn_;
  std::size_t served_ = 0;
};

// Bonus and discount of the last policy, and the discount of this one, come from a search on seeds
// that are not among the reported ones, by the reward of 30 days; so does the width of this one, at
// a discount of 0.4.
//
// expected + theta . context + width sqrt(context A^-1 context), less the impression discount;
// context: 1 and the user's query at length 1.
class LinUcb : public ModelPolicy {
 public:
  using ModelPolicy::ModelPolicy;

 protected:
  // 1 and the query, and zeros up to whole vector registers.
  static constexpr std::size_t d = (World::dimension + 1 + 3) / 4 * 4;
  static constexpr float width = 0.1f, discount = 0.6f;

  void rate(const World::Visit&, const User& user, std::vector<float>& scores) override {
    const auto context = context_of(user);
    arms_.resize(scores.size());
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const Arm& arm = arms_[i];
      const auto product = times_inverse(arm, context);
      float mean = 0, variance = 0;
      for (std::size_t r = 0; r < d; ++r) {
        mean += product[r] * arm.reward[r];
        variance += product[r] * context[r];
      }
      const auto relevance = static_cast<float>(static_cast<double>(scores[i]) - normaliser_);
      scores[i] = expected(relevance) + mean + width * std::sqrt(std::max(variance, 0.0f));
    }
    for (const ScoredItem& ignored : discounts_)
      scores[ignored.item] *= std::exp(-discount * ignored.score);
  }

  void observe(const User& user, std::uint32_t item, float examination, float expected_clicks,
               bool clicked) override {
    const auto context = context_of(user);
    Arm& arm = arms_[item];
    // Sherman and Morrison; an impression counts as much as it is likely to be examined.
    const auto product = times_inverse(arm, context);
    float denominator = 1;
    for (std::size_t r = 0; r < d; ++r) denominator += examination * product[r] * context[r];
    for (std::size_t r = 0; r < d; ++r)
      for (std::size_t c = 0; c < d; ++c)
        arm.inverse[r * d + c] -= examination * product[r] * product[c] / denominator;
    const float residual = (clicked ? 1.0f : 0.0f) - examination * expected_clicks;
    for (std::size_t r = 0; r < d; ++r) arm.reward[r] += residual * context[r];
  }

 private:
  struct Arm {
    Arm() {
      for (std::size_t r = 0; r < d; ++r) inverse[r * d + r] = 1;
    }
    std::array<float, d * d> inverse{};
    std::array<float, d> reward{};
  };

  // The inverse is symmetric: column by column, the inner loop has no sum to wait for.
  static std::array<float, d> times_inverse(const Arm& arm, const std::array<float, d>& context) {
    std::array<float, d> product{};
    for (std::size_t c = 0; c < d; ++c)
      for (std::size_t r = 0; r < d; ++r) product[r] += arm.inverse[c * d + r] * context[c];
    return product;
  }

  std::array<float, d> context_of(const User& user) const {
    const auto query = encoder_->query(user.state);
    const float length =
        std::sqrt(std::inner_product(query.begin(), query.end(), query.begin(), 1e-12f));
    std::array<float, d> context{1};
    for (std::size_t c = 0; c < World::dimension; ++c) context[c + 1] = query[c] / length;
    return context;
  }

  std::vector<Arm> arms_;
};

class AgeCountBonus : public ModelPolicy {
 public:
  using ModelPolicy::ModelPolicy;

 protected:
  static constexpr float bonus = 0.15f, discount = 0.6f;

  void rate(const World::Visit&, const User&, std::vector<float>& scores) override {
    impressions_.resize(scores.size());
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const auto age = static_cast<float>(now_ - world_.items()[i].created);
      scores[i] += bonus * std::exp2(-age / (10.0f * World::day)) / std::sqrt(1 + impressions_[i]) /
                   calibration_.slope;
    }
    for (const ScoredItem& ignored : discounts_)
      scores[ignored.item] -= discount * ignored.score / calibration_.slope;
  }
  void observe(const User&, std::uint32_t item, float examination, float, bool) override {
    impressions_[item] += examination;
  }

 private:
  std::vector<float> impressions_;
};

}  // namespace

const std::vector<std::string>& policy_names() {
  static const std::vector<std::string> names{
      "runtime",  "runtime-0", "greedy",         "epsilon-greedy", "epsilon-greedy-feedback",
      "thompson", "linucb",    "age-count-bonus"};
  return names;
}

std::unique_ptr<Policy> make_policy(const std::string& name, const World& world,
                                    const PolicyOptions& options) {
  if (name == "runtime")
    return std::make_unique<RuntimePolicy>(world, options, options.weight, 0.0);
  if (name == "runtime-0") return std::make_unique<RuntimePolicy>(world, options, 0.0, 0.0);
  if (name == "greedy") return std::make_unique<Greedy>(world, options);
  if (name == "epsilon-greedy") return std::make_unique<EpsilonGreedy>(world, options);
  if (name == "epsilon-greedy-feedback")
    return std::make_unique<RuntimePolicy>(world, options, 0.0, options.weight);
  if (name == "thompson") return std::make_unique<Thompson>(world, options);
  if (name == "linucb") return std::make_unique<LinUcb>(world, options);
  if (name == "age-count-bonus") return std::make_unique<AgeCountBonus>(world, options);
  std::string all;
  for (const std::string& known : policy_names()) all += (all.empty() ? "" : ", ") + known;
  throw Usage("--policy: '" + name + "' is none of " + all);
}

}  // namespace personalize::tools
