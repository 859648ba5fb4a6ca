#include "simulate/world.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

constexpr std::size_t genre_count = 20;
constexpr double taste_gain = 4.0, base_log_odds = -4.2, quality_deviation = 0.8;
constexpr double fatigue_half_life = 7.0 * 86'400;

World::Vector direction(Random& random) {
  World::Vector v;
  double square = 0;
  for (double& x : v) {
    x = random.normal();
    square += x * x;
  }
  for (double& x : v) x /= std::sqrt(square);
  return v;
}

World::Vector normalised(World::Vector v) {
  const double length = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
  for (double& x : v) x /= length;
  return v;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Probability of looking at a place, from 0. Not the one that the runtime assumes by default.
double examination(std::size_t place) { return std::pow(static_cast<double>(place) + 1, -0.6); }

}  // namespace

Scenario scenario_of(const std::string& name) {
  Scenario scenario;
  scenario.name = name;
  if (name == "weak-metadata")
    scenario.metadata = 0.2;
  else if (name == "strong-metadata")
    scenario.metadata = 0.9;
  else if (name == "no-fatigue")
    scenario.fatigue = 0;
  else if (name == "fast-catalogue")
    scenario.new_items = 200;
  else if (name != "default")
    throw Usage("--scenario: '" + name +
                "' is none of default, weak-metadata, strong-metadata, no-fatigue, fast-catalogue");
  return scenario;
}

World::World(const WorldOptions& options) : options_(options), random_(options.seed) {
  for (std::size_t g = 0; g < genre_count; ++g) genres_.push_back(direction(random_));
  for (std::size_t i = 0; i < options.items; ++i)
    items_.push_back(
        make_item(start_ - static_cast<std::int64_t>(random_.uniform() * 365 * double{day})));
  for (std::size_t u = 0; u < options.users; ++u) {
    Vector taste{};
    for (int like = 0; like < 2; ++like) {
      const Vector& genre = genres_[random_.below(genre_count)];
      for (std::size_t c = 0; c < dimension; ++c) taste[c] += genre[c];
    }
    const Vector own = direction(random_);
    for (std::size_t c = 0; c < dimension; ++c) taste[c] += 0.5 * own[c];
    tastes_.push_back(normalised(taste));
  }
  make_model();
  make_history();
}

World::Item World::make_item(std::int64_t created) {
  Item item{random_.below(genre_count), {}, quality_deviation * random_.normal(), created};
  const Vector own = direction(random_);
  const double metadata = std::sqrt(options_.scenario.metadata);
  const double rest = std::sqrt(1 - options_.scenario.metadata);
  for (std::size_t c = 0; c < dimension; ++c)
    item.character[c] = metadata * genres_[item.genre][c] + rest * own[c];
  item.character = normalised(item.character);
  return item;
}

void World::make_model() {
  using Kind = EncoderOp::Kind;
  ModelParts parts;
  parts.metadata = R"({"recipe": "simulated"})";
  parts.item_vectors = Matrix::zeros(items_.size(), dimension);
  MetadataField genre;
  genre.name = "GENRE";
  genre.embedding = Matrix::zeros(genre_count, dimension);
  for (std::size_t g = 0; g < genre_count; ++g) {
    if (auto added = genre.vocabulary.add(genre_name(g)); !added)
      throw Failure(added.error().message);
    for (std::size_t c = 0; c < dimension; ++c)
      genre.embedding.f32()[g * dimension + c] =
          static_cast<float>(std::sqrt(options_.scenario.metadata) * genres_[g][c]);
  }
  parts.fields.push_back(std::move(genre));
  for (std::size_t i = 0; i < items_.size(); ++i) {
    if (auto added = parts.item_ids.add(item_id(i)); !added) throw Failure(added.error().message);
    for (std::size_t c = 0; c < dimension; ++c)
      parts.item_vectors.f32()[i * dimension + c] =
          static_cast<float>(items_[i].character[c] + 0.08 * random_.normal());
    parts.biases.push_back(static_cast<float>(items_[i].quality + 0.3 * random_.normal()));
    ItemStatistics statistics;
    statistics.interactions = 50 + static_cast<std::uint64_t>(200 * std::exp(items_[i].quality));
    statistics.first_timestamp = items_[i].created;
    statistics.last_timestamp = start_;
    statistics.creation_timestamp = items_[i].created;
    parts.statistics.push_back(statistics);
  }
  // h = 0.85 h + 0.15 tanh(x / 10), almost linear; the query is some 10 taste_gain h.
  constexpr std::size_t d = dimension;
  Matrix input = Matrix::zeros(3 * d, d), recurrent = Matrix::zeros(3 * d, d);
  Matrix input_bias = Matrix::zeros(1, 3 * d), recurrent_bias = Matrix::zeros(1, 3 * d);
  Matrix output = Matrix::zeros(d, d), output_bias = Matrix::zeros(1, d);
  for (std::size_t c = 0; c < d; ++c) {
    input_bias.f32()[d + c] = static_cast<float>(std::log(0.85 / 0.15));
    input.f32()[(2 * d + c) * d + c] = 0.1f;
    output.f32()[c * d + c] = static_cast<float>(10 * 1.5 * taste_gain);
  }
  parts.operations = {{Kind::embed_sum}, {Kind::gru}, {Kind::linear}};
  for (Matrix* weight : {&input, &recurrent, &input_bias, &recurrent_bias, &output, &output_bias})
    parts.weights.push_back(std::move(*weight));
  auto model = Model::from_parts(std::move(parts));
  if (!model) throw Failure(model.error().message);
  model_ = *model;
}

void World::make_history() {
  std::vector<double> cumulative(items_.size());
  for (std::uint32_t user = 0; user < options_.users; ++user) {
    double total = 0;
    for (std::size_t i = 0; i < items_.size(); ++i)
      cumulative[i] = total += sigmoid(log_odds(user, items_[i]));
    for (int event = 0; event < 12; ++event)
      history_.push_back({user, static_cast<std::uint32_t>(random_.draw(cumulative)),
                          start_ - day * (12 - event)});
  }
  std::stable_sort(history_.begin(), history_.end(),
                   [](const Event& a, const Event& b) { return a.timestamp < b.timestamp; });
}

std::size_t World::advance() {
  now_ += day / static_cast<std::int64_t>(ticks);
  const std::size_t tick =
      static_cast<std::size_t>((now_ - start_) / (day / static_cast<std::int64_t>(ticks)));
  if (tick % ticks == 0) {
    for (Vector& taste : tastes_) {
      const Vector drift = direction(random_);
      for (std::size_t c = 0; c < dimension; ++c) taste[c] += 0.08 * drift[c];
      taste = normalised(taste);
    }
  }
  const std::size_t first_new = items_.size();
  const auto due = [&](std::size_t t, std::size_t a_day) { return t * a_day / ticks; };
  for (std::size_t n = due(tick, options_.scenario.new_items);
       n < due(tick + 1, options_.scenario.new_items); ++n)
    items_.push_back(make_item(now_));
  visits_.clear();
  const std::size_t count = due(tick + 1, options_.slates) - due(tick, options_.slates);
  for (std::size_t v = 0; v < count; ++v)
    visits_.push_back(
        {static_cast<std::uint32_t>(random_.below(options_.users)),
         now_ + static_cast<std::int64_t>(v * static_cast<std::size_t>(day) / ticks / count)});
  return first_new;
}

double World::log_odds(std::uint32_t user, const Item& item) const {
  const Vector& taste = tastes_[user];
  return base_log_odds + item.quality +
         taste_gain * std::inner_product(taste.begin(), taste.end(), item.character.begin(), 0.0);
}

double World::click_probability(const Visit& visit, std::uint32_t item, std::size_t place) const {
  double odds = log_odds(visit.user, items_[item]);
  if (const auto found = ignored_.find(pair(visit.user, item)); found != ignored_.end()) {
    const double age = static_cast<double>(visit.timestamp - found->second.timestamp);
    odds -= options_.scenario.fatigue * found->second.count * std::exp2(-age / fatigue_half_life);
  }
  return examination(place) * sigmoid(odds);
}

std::vector<bool> World::show(const Visit& visit, const std::vector<std::uint32_t>& slate) {
  std::vector<bool> clicked;
  for (std::size_t place = 0; place < slate.size(); ++place) {
    Random random(options_.seed ^ pair(visit.user, slate[place]) * 0x9E3779B97F4A7C15u ^
                  static_cast<std::uint64_t>(visit.timestamp) << 20);
    random.bits();
    clicked.push_back(random.uniform() < click_probability(visit, slate[place], place));
  }
  for (std::size_t place = 0; place < slate.size(); ++place) {
    if (clicked[place]) {
      ignored_.erase(pair(visit.user, slate[place]));
      continue;
    }
    auto [found, added] =
        ignored_.try_emplace(pair(visit.user, slate[place]), Ignored{0, visit.timestamp});
    const double age = static_cast<double>(visit.timestamp - found->second.timestamp);
    found->second = {1 + found->second.count * std::exp2(-age / fatigue_half_life),
                     visit.timestamp};
  }
  return clicked;
}

double World::appeal(std::size_t item) const {
  double sum = 0;
  for (std::uint32_t user = 0; user < options_.users; ++user)
    sum += sigmoid(log_odds(user, items_[item]));
  return sum / options_.users;
}

}  // namespace personalize::tools
