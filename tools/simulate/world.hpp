// A world to try recommendation policies in: items that arrive every day, users with tastes that
// drift, and clicks that depend on taste, quality, position and how often an item was ignored.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "data/random.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

struct Scenario {
  std::string name = "default";
  double metadata = 0.6;         // share of an item's character that its metadata tells
  double fatigue = 0.25;         // log-odds of a click lost an ignored impression
  std::uint32_t new_items = 50;  // a day
};

// "default", "weak-metadata", "strong-metadata", "no-fatigue", "fast-catalogue". Throws Usage.
Scenario scenario_of(const std::string& name);

// Unix seconds at which a simulation of so many days begins: 2023-11-14 or, where that would take
// it past 2026-08-10 and so perhaps into the future, earlier.
constexpr std::int64_t simulated_start(std::uint32_t days) {
  return 1'700'000'000 - std::int64_t{86'400} * (days > 1000 ? days - 1000 : 0);
}

struct WorldOptions {
  Scenario scenario = {};
  std::uint32_t users = 1000, items = 2000, days = 30;
  std::uint32_t slates = 2000;  // a day
  std::uint64_t seed = 1;
};

class World {
 public:
  static constexpr std::size_t dimension = 16;
  static constexpr std::size_t slate_length = 10;
  static constexpr std::size_t ticks = 12;     // a day: new items arrive, policies update
  static constexpr std::int64_t day = 86'400;  // seconds
  using Vector = std::array<double, dimension>;

  explicit World(const WorldOptions& options);

  struct Item {
    std::size_t genre;
    Vector character;  // length 1
    double quality;    // in log-odds
    std::int64_t created;
  };
  const std::vector<Item>& items() const { return items_; }
  std::string item_id(std::size_t item) const { return "i" + std::to_string(item + 1); }
  std::string genre_name(std::size_t genre) const { return "g" + std::to_string(genre + 1); }

  // What training on the past would give: good but not exact vectors and biases of the items that
  // exist from the start, embeddings of their metadata, and an encoder that averages the items of a
  // user's recent events.
  std::shared_ptr<const Model> model() const { return model_; }
  // Events before the start, in order of time.
  struct Event {
    std::uint32_t user, item;
    std::int64_t timestamp;
  };
  const std::vector<Event>& history() const { return history_; }

  // Moves on to the next tick; new items are those from the returned index on.
  std::size_t advance();
  std::int64_t now() const { return now_; }
  std::int64_t start() const { return start_; }

  // A visit: who comes at which second. The same in every run with the same seed.
  struct Visit {
    std::uint32_t user;
    std::int64_t timestamp;
  };
  const std::vector<Visit>& visits() const { return visits_; }  // of the present tick, in order

  // The user sees these items. Returns which are clicked, and remembers those that are not. The
  // same user, time and item are clicked or not by the same random number, whatever the policy.
  std::vector<bool> show(const Visit& visit, const std::vector<std::uint32_t>& slate);
  // Of a click, if the item stands at this place; nothing is remembered.
  double click_probability(const Visit& visit, std::uint32_t item, std::size_t place) const;
  // Mean over users of the probability that one who looks at the item clicks.
  double appeal(std::size_t item) const;

 private:
  double log_odds(std::uint32_t user, const Item& item) const;
  Item make_item(std::int64_t created);
  void make_model();
  void make_history();
  static std::uint64_t pair(std::uint32_t user, std::uint32_t item) {
    return std::uint64_t{user} << 32 | item;
  }

  struct Ignored {
    double count;
    std::int64_t timestamp;
  };

  WorldOptions options_;
  Random random_;
  std::vector<Vector> genres_;
  std::vector<Item> items_;
  std::vector<Vector> tastes_;
  std::unordered_map<std::uint64_t, Ignored> ignored_;
  std::shared_ptr<const Model> model_;
  std::vector<Event> history_;
  std::vector<Visit> visits_;
  std::int64_t start_ = simulated_start(options_.days);
  std::int64_t now_ = start_ - day / static_cast<std::int64_t>(ticks);
};

}  // namespace personalize::tools
