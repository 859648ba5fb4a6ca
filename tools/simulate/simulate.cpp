#include "simulate/simulate.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "command/output.hpp"
#include "command/parallel.hpp"
#include "data/csv.hpp"
#include "data/random.hpp"
#include "simulate/simulation.hpp"

namespace personalize::tools {
namespace simulate_command {

constexpr std::int64_t seconds_a_day = World::day;
constexpr std::uint32_t least_items_of_a_world = 100, most_items = 1'000'000;

constexpr std::array<std::string_view, 12> genres{"Adventure", "Building", "Cards",  "Cooking",
                                                  "Farming",   "Mystery",  "Puzzle", "Racing",
                                                  "Rhythm",    "Space",    "Sports", "Strategy"};
constexpr std::array<std::string_view, 16> adjectives{
    "Amber", "Brave", "Clever", "Distant", "Electric", "Frozen", "Golden", "Hidden",
    "Iron",  "Jolly", "Lunar",  "Mighty",  "Quiet",    "Rapid",  "Silver", "Wandering"};
constexpr std::array<std::string_view, 16> nouns{
    "Archive", "Bakery",  "Canyon",  "Dragon",  "Empire",   "Forest",  "Garden", "Harbour",
    "Island",  "Journey", "Kitchen", "Lantern", "Mountain", "Orchard", "Palace", "Voyage"};

struct Item {
  std::size_t genre, second_genre;
  std::size_t series, part;  // part from 0
  std::int64_t created;
  double appeal;
  int price;  // cents
};

class GeneratedCatalogue {
 public:
  explicit GeneratedCatalogue(const SimulationOptions& options)
      : options_(options), random_(options.seed), impressions_(~options.seed) {
    for (std::size_t series = 0; items_.size() < options.items; ++series) {
      const std::size_t genre = random_.below(genres.size()), second = random_.below(genres.size());
      const std::size_t parts = 1 + random_.below(5);
      const double appeal = std::pow(random_.uniform(), 3) + 0.05;
      const bool launched = random_.uniform() < 0.7;
      for (std::size_t part = 0; part < parts && items_.size() < options.items; ++part) {
        const std::int64_t created =
            launched
                ? start_ - static_cast<std::int64_t>(random_.below(200)) * seconds_a_day
                : start_ + static_cast<std::int64_t>(random_.below(options.days)) * seconds_a_day;
        items_.push_back({genre, second, series, part, created, appeal,
                          99 + 100 * static_cast<int>(random_.below(40))});
      }
    }
    for (std::size_t genre = 0; genre < genres.size(); ++genre) {
      double total = 0;
      for (const Item& item : items_) {
        const double match = item.genre == genre ? 1.0 : item.second_genre == genre ? 0.3 : 0.002;
        total += item.appeal * match;
        by_genre_[genre].push_back(total);
      }
    }
  }

  const std::vector<Item>& items() const { return items_; }

  struct Event {
    std::int64_t timestamp;
    std::uint32_t user;
    std::size_t item;
    std::vector<std::size_t> shown;  // first place first; the item is among them
  };

  std::vector<Event> events() {
    std::vector<Event> events;
    const std::int64_t end = start_ + static_cast<std::int64_t>(options_.days) * seconds_a_day;
    for (std::uint32_t user = 0; user < options_.users; ++user) {
      std::array<std::size_t, 3> likes{};
      for (std::size_t& like : likes) like = random_.below(genres.size());
      const std::size_t visits = 3 + random_.below(12);
      std::int64_t now =
          start_ + static_cast<std::int64_t>(random_.below(options_.days)) * seconds_a_day / 2;
      std::size_t mood = likes[0];
      std::vector<char> seen(items_.size(), 0);
      for (std::size_t visit = 0; visit < visits; ++visit) {
        if (random_.uniform() < 0.4) mood = likes[random_.below(likes.size())];
        if (random_.uniform() < 0.05)
          likes[random_.below(likes.size())] = random_.below(genres.size());
        std::size_t item = pick(random_, mood, now, seen);
        for (std::size_t step = 2 + random_.below(9); step > 0 && item < items_.size() && now < end;
             --step) {
          seen[item] = 1;
          events.push_back({now, user, item, slate_with(item, mood, now, seen)});
          now += 60 + static_cast<std::int64_t>(random_.below(1800));
          const std::size_t next = item + 1;
          const bool follows = next < items_.size() && items_[next].series == items_[item].series &&
                               items_[next].created <= now && !seen[next];
          item = follows && random_.uniform() < 0.7 ? next : pick(random_, mood, now, seen);
        }
        now += seconds_a_day / 2 + static_cast<std::int64_t>(
                                       random_.below(static_cast<std::size_t>(4 * seconds_a_day)));
      }
    }
    std::stable_sort(events.begin(), events.end(),
                     [](const Event& a, const Event& b) { return a.timestamp < b.timestamp; });
    return events;
  }

 private:
  // An item of the genre that exists by now and is new to the user; items_.size() where none is
  // found.
  std::size_t pick(Random& random, std::size_t genre, std::int64_t now,
                   const std::vector<char>& seen) const {
    for (int attempt = 0; attempt < 50; ++attempt) {
      const std::size_t item = random.draw(by_genre_[genre]);
      if (items_[item].created <= now && !seen[item]) return item;
    }
    return items_.size();
  }

  // The chosen item among others that the user might have chosen; further up more often, as users
  // look there more often (1 / log2(place + 1)).
  std::vector<std::size_t> slate_with(std::size_t chosen, std::size_t genre, std::int64_t now,
                                      const std::vector<char>& seen) {
    static const std::vector<double> cumulative = [] {
      std::vector<double> sums;
      for (std::size_t place = 1; place <= shown_items; ++place)
        sums.push_back((sums.empty() ? 0.0 : sums.back()) +
                       1 / std::log2(static_cast<double>(place) + 1));
      return sums;
    }();
    std::vector<std::size_t> slate;
    for (std::size_t place = 1; place < shown_items; ++place) {
      const std::size_t other = pick(impressions_, genre, now, seen);
      if (other == items_.size()) break;
      if (std::find(slate.begin(), slate.end(), other) == slate.end()) slate.push_back(other);
    }
    const std::size_t place = std::min(impressions_.draw(cumulative), slate.size());
    slate.insert(slate.begin() + static_cast<std::ptrdiff_t>(place), chosen);
    return slate;
  }

  static constexpr std::size_t shown_items = 6;
  SimulationOptions options_;
  std::int64_t start_ = simulated_start(options_.days);
  Random random_, impressions_;  // apart, so that what is shown does not change what is chosen
  std::vector<Item> items_;
  std::array<std::vector<double>, genres.size()> by_genre_;  // cumulative appeal
};

std::string title(const Item& item) {
  constexpr std::array<std::string_view, 5> numerals{"", " II", " III", " IV", " V"};
  std::string text{adjectives[item.series % adjectives.size()]};
  text += ' ';
  text += nouns[item.series / adjectives.size() % nouns.size()];
  if (const std::size_t round = item.series / (adjectives.size() * nouns.size()); round > 0)
    text += " " + std::to_string(2000 + round);
  return text + std::string(numerals[item.part]);
}

// Tells the progress of a single run, day by day.
std::function<void()> days_shown(Progress* progress, const WorldOptions& world) {
  return [progress, days = world.days, day = 0u]() mutable {
    ++day;
    if (progress)
      progress->update(static_cast<double>(day) / days,
                       "day " + std::to_string(day) + " of " + std::to_string(days));
  };
}

constexpr const char* interactions_header = "USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE,IMPRESSION\n";

// "i3|i17\n", of item numbers from 0.
template <class Items>
void append_impression(const Items& items, std::string& text) {
  for (std::size_t i = 0; i < items.size(); ++i)
    text += (i > 0 ? "|i" : "i") + std::to_string(items[i] + 1);
  text += '\n';
}

// The files of a data set: they can be made, and appear together at the end.
class DatasetFiles {
 public:
  explicit DatasetFiles(const std::string& directory) {
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) throw Failure(directory + ": cannot create: " + error.message());
    for (std::size_t f = 0; f < names.size(); ++f)
      files_[f] = std::make_unique<OutputFile>(directory + "/" + names[f]);
  }
  void write(const std::string& interactions, const std::string& items, const std::string& users) {
    files_[0]->append(interactions);
    files_[1]->append(items);
    files_[2]->append(users);
    for (const auto& file : files_) file->commit();
  }

 private:
  static constexpr std::array<const char*, 3> names{"interactions.csv", "items.csv", "users.csv"};
  std::array<std::unique_ptr<OutputFile>, names.size()> files_;
};

}  // namespace simulate_command

void write_dataset(const SimulationOptions& options, const std::string& directory) {
  using namespace simulate_command;
  DatasetFiles files(directory);
  GeneratedCatalogue world(options);
  std::string items = "ITEM_ID,CREATION_TIMESTAMP,GENRES,PRICE,TITLE\n";
  for (std::size_t i = 0; i < world.items().size(); ++i) {
    const Item& item = world.items()[i];
    items += "i" + std::to_string(i + 1) + "," + std::to_string(item.created) + "," +
             std::string(genres[item.genre]);
    if (item.second_genre != item.genre) items += "|" + std::string(genres[item.second_genre]);
    const std::string cents = std::to_string(100 + item.price % 100).substr(1);
    items += "," + std::to_string(item.price / 100) + "." + cents + ",";
    detail::append_csv_field(title(item), items);
    items += '\n';
  }
  std::string interactions = interactions_header;
  for (const GeneratedCatalogue::Event& event : world.events()) {
    interactions += "u" + std::to_string(event.user + 1) + ",i" + std::to_string(event.item + 1) +
                    "," + std::to_string(event.timestamp) + ",play,";
    append_impression(event.shown, interactions);
  }
  std::string users = "USER_ID,PLATFORM\n";
  Random random(options.seed + 1);
  for (std::uint32_t user = 0; user < options.users; ++user)
    users += "u" + std::to_string(user + 1) + "," +
             (random.below(3) == 0   ? "console"
              : random.below(2) == 0 ? "phone"
                                     : "pc") +
             "\n";
  files.write(interactions, items, users);
}

void write_world(const std::string& policy, const WorldOptions& options, double weight,
                 const std::string& directory, Progress* progress) {
  using namespace simulate_command;
  DatasetFiles files(directory);
  std::string interactions = interactions_header;
  std::string items = "ITEM_ID,CREATION_TIMESTAMP,GENRE\n", users = "USER_ID\n";
  const auto row = [&](std::uint32_t user, std::size_t item, std::int64_t timestamp) {
    interactions += "u" + std::to_string(user + 1) + ",i" + std::to_string(item + 1) + "," +
                    std::to_string(timestamp) + ",click,";
  };
  std::size_t written = 0;
  (void)run_policy(
      policy, options, {.weight = weight, .seed = options.seed},
      [&](const World& world, const World::Visit& visit, const std::vector<std::uint32_t>& slate,
          const std::vector<bool>& clicked) {
        if (written == 0)
          for (const World::Event& event : world.history()) {
            row(event.user, event.item, event.timestamp);
            interactions += '\n';
          }
        for (; written < world.items().size(); ++written) {
          const World::Item& item = world.items()[written];
          items += world.item_id(written) + "," + std::to_string(item.created) + "," +
                   world.genre_name(item.genre) + "\n";
        }
        for (std::size_t place = 0; place < slate.size(); ++place) {
          if (!clicked[place]) continue;
          row(visit.user, slate[place], visit.timestamp);
          append_impression(slate, interactions);
        }
      },
      days_shown(progress, options));
  for (std::uint32_t user = 0; user < options.users; ++user)
    users += "u" + std::to_string(user + 1) + "\n";
  files.write(interactions, items, users);
}

namespace simulate_command {

struct Options {
  std::string directory, svg, log;
  std::optional<std::string> scenario;
  std::vector<std::string> policies;
  std::optional<std::uint32_t> users, items, days;
  std::uint32_t slates = 2000, seeds = 1;
  std::uint64_t seed = 1;
  unsigned threads = 0;
  double weight = 0.3;
  bool json = false;
};

void run_worlds(const Options& options) {
  WorldOptions world;
  world.scenario = scenario_of(options.scenario.value_or("default"));
  world.users = options.users.value_or(world.users);
  world.items = options.items.value_or(world.items);
  world.days = options.days.value_or(world.days);
  world.slates = options.slates;
  world.seed = options.seed;
  require_range("--items", world.items, least_items_of_a_world, most_items);
  if (!options.directory.empty() && options.policies.size() > 1)
    throw Usage("--write-dataset takes one --policy");
  Progress progress("simulate");
  if (!options.directory.empty())
    return write_world(options.policies.empty() ? "runtime" : options.policies.front(), world,
                       options.weight, options.directory, &progress);
  if (!options.log.empty()) {
    OutputFile file(options.log);
    file.append(log_csv_header);
    std::string line;
    (void)run_policy("runtime", world,
                     {.weight = options.weight,
                      .seed = options.seed,
                      .log =
                          [&](const LogEntry& e) {
                            line.clear();
                            append_csv(e, line);
                            file.append(line);
                          }},
                     {}, days_shown(&progress, world));
    file.commit();
    return;
  }
  std::optional<OutputFile> plot;
  if (!options.svg.empty()) {
    if (is_standard_output(options.svg))
      throw Usage("--svg and the comparison cannot both go to standard output");
    plot.emplace(options.svg);
  }
  const Comparison result =
      compare(options.policies.empty() ? policy_names() : options.policies, world, options.weight,
              options.seeds, thread_count(options.threads), &progress);
  progress.finish("");
  if (plot) {
    plot->append(to_svg(result));
    plot->commit();
  }
  if (options.json)
    print_json(to_json(result));
  else
    print_text(result);
}

}  // namespace simulate_command

void add_simulate(CLI::App& app) {
  using namespace simulate_command;
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "simulate", "Compare recommendation policies in a simulated world, or generate a data set");
  auto* policy = command
                     ->add_option("--policy", options->policies,
                                  "Policies to compare, the first with all others")
                     ->default_str("every one");
  command
      ->add_option("--scenario", options->scenario,
                   "default, weak-metadata, strong-metadata, no-fatigue or fast-catalogue")
      ->default_str("default");
  auto* weight = add_number(*command, "--exploration-weight", options->weight,
                            "Of the runtime's policy", 0, 1);
  auto* slates = add_number(*command, "--slates", options->slates, "Slates a day", 1, 100'000'000);
  auto* log = command
                  ->add_option("--write-log", options->log,
                               "Run the runtime's policy once and write its interaction log "
                               "(for evaluate --protocol off-policy)")
                  ->excludes(policy);
  auto* dataset =
      command
          ->add_option("--write-dataset", options->directory,
                       "Generate interactions.csv (with IMPRESSION), items.csv and users.csv in "
                       "this directory: series that users follow or, with --scenario, the clicks "
                       "of that world on the slates of --policy")
          ->excludes(log);
  for (CLI::Option* compared :
       {add_number(*command, "--seeds", options->seeds, "Worlds, with seeds from --seed on", 1,
                   10'000),
        add_threads(*command, options->threads),
        command->add_option("--svg", options->svg, "Plot reward and discovery into this file"),
        add_json(*command, options->json)})
    compared->excludes(log)->excludes(dataset);
  add_number(*command, "--users", options->users, "Users", 2, 10'000'000, "1000");
  add_number(*command, "--items", options->items,
             "Items at the start, of a world at least " + std::to_string(least_items_of_a_world),
             10, most_items, "2000; of a data set of series: 500");
  add_number(*command, "--days", options->days, "Simulated days", 1, 3650,
             "30; of a data set of series: 60");
  command->add_option("--seed", options->seed, "The same seed gives the same result")
      ->capture_default_str();
  command->callback([=] {
    if (options->directory.empty() || options->scenario) return run_worlds(*options);
    for (const CLI::Option* of_a_world : {policy, weight, slates})
      if (of_a_world->count() > 0)
        throw Usage("option " + of_a_world->get_name() +
                    " has no meaning with --write-dataset but for a --scenario");
    SimulationOptions series;
    series.users = options->users.value_or(series.users);
    series.items = options->items.value_or(series.items);
    series.days = options->days.value_or(series.days);
    series.seed = options->seed;
    write_dataset(series, options->directory);
  });
}

}  // namespace personalize::tools
