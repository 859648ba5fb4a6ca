// The generated data set, and the worlds in which policies are compared.
#include <doctest/doctest.h>
#include <array>
#include <regex>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/csv.hpp"
#include "../tools/data/dataset.hpp"
#include "../tools/simulate/simulate.hpp"
#include "../tools/simulate/simulation.hpp"
#include "strings.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace personalize::tools;

constexpr std::int64_t start = 1'700'000'000, day = 86'400;

Dataset read(const TemporaryFolder& folder) {
  DatasetOptions files;
  files.interactions = folder.file("interactions.csv");
  files.items = folder.file("items.csv");
  return read_dataset(files);
}

}  // namespace

TEST_CASE("the same options give the same files, another seed gives others") {
  const TemporaryFolder a, b, c;
  write_dataset({.users = 40, .items = 30, .days = 20, .seed = 7}, a.path.string());
  write_dataset({.users = 40, .items = 30, .days = 20, .seed = 7}, b.path.string());
  write_dataset({.users = 40, .items = 30, .days = 20, .seed = 8}, c.path.string());
  for (const char* name : {"interactions.csv", "items.csv", "users.csv"}) {
    CAPTURE(name);
    CHECK(bytes_of(a.file(name)) == bytes_of(b.file(name)));
    CHECK(bytes_of(a.file(name)) != bytes_of(c.file(name)));
  }
}

TEST_CASE("generated files are a data set of the size asked for, within the days asked for") {
  for (const SimulationOptions& options :
       {SimulationOptions{}, SimulationOptions{.users = 300, .items = 120, .days = 7, .seed = 3},
        SimulationOptions{.users = 100, .items = 2000, .days = 400, .seed = 5}}) {
    const TemporaryFolder folder;
    write_dataset(options, folder.path.string());
    const Dataset data = read(folder);
    CAPTURE(options.days);
    CHECK(data.user_ids.size() == options.users);
    CHECK(data.item_ids.size() == options.items);
    CHECK(data.first_timestamp >= start);
    CHECK(data.last_timestamp < start + options.days * day);
    // Activity goes on to the end.
    CHECK(data.last_timestamp > start + options.days * day / 2);
    CHECK(strings(data.event_types) == std::vector<std::string>{"play"});
    CHECK(data.bad_rows.count == 0);
    for (const auto& history : data.histories) {
      CHECK(history.size() >= 2);
      std::set<std::uint32_t> seen;
      for (const Event& event : history) {
        CHECK(seen.insert(event.item).second);
        CHECK(data.items[event.item].creation_timestamp.value() <= event.timestamp);
      }
    }
    REQUIRE(data.metadata.size() >= 2);
    CHECK(data.metadata[0].name == "GENRES");
    CHECK(data.metadata[0].vocabulary.size() == 12);
    CHECK(data.metadata[1].name == "PRICE");
    CHECK(data.metadata[1].numeric);

    CsvReader users(folder.file("users.csv"));
    const std::size_t id = users.require("USER_ID"), platform = users.require("PLATFORM");
    std::set<std::string> ids, platforms;
    while (users.next()) {
      ids.emplace(users.field(id));
      platforms.emplace(users.field(platform));
    }
    CHECK(ids.size() == data.user_ids.size());
    for (const std::string& user : ids) CHECK(data.user_ids.find(user));
    CHECK(platforms == std::set<std::string>{"console", "pc", "phone"});
  }
}

TEST_CASE("the smallest worlds can be read and hold a sequence") {
  for (std::uint64_t seed = 0; seed < 40; ++seed)
    for (const std::uint32_t days : {1u, 60u, 3650u}) {
      const TemporaryFolder folder;
      write_dataset({.users = 2, .items = 10, .days = days, .seed = seed}, folder.path.string());
      CAPTURE(seed);
      CAPTURE(days);
      CHECK_NOTHROW(read(folder));
    }
}

TEST_CASE("the next part of a series follows far more often than chance would have it") {
  const TemporaryFolder folder;
  write_dataset({}, folder.path.string());
  const Dataset data = read(folder);
  // Parts of a series are numbered one behind the other.
  const auto number = [&](const Event& e) {
    return std::stoi(std::string(data.item_ids[e.item].substr(1)));
  };
  double follows = 0, precedes = 0, pairs = 0;
  for (const auto& history : data.histories)
    for (std::size_t e = 1; e < history.size(); ++e) {
      const int step = number(history[e]) - number(history[e - 1]);
      follows += step == 1 ? 1 : 0;
      precedes += step == -1 ? 1 : 0;
      pairs += 1;
    }
  CHECK(follows / pairs > 0.2);
  CHECK(follows > 10 * precedes);
}

TEST_CASE("a folder that cannot be made is a failure that names it") {
  const TemporaryFolder folder;
  const std::string path = folder.write("file", "") + "/below";
  CHECK_THROWS_WITH_AS(write_dataset({}, path), (path + ": cannot create: Not a directory").c_str(),
                       Failure);
}

namespace {

// Calls visit(item, its slate) for every row that has an IMPRESSION.
template <class Visit>
void for_each_impression(const std::string& path, Visit visit) {
  CsvReader reader(path);
  const std::size_t item = reader.require("ITEM_ID"), column = reader.require("IMPRESSION");
  while (reader.next()) {
    std::vector<std::string> shown;
    const std::string text(reader.field(column));
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find('|', begin), text.size());
      shown.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
    if (!shown.empty()) visit(std::string(reader.field(item)), shown);
  }
}

const WorldOptions small_world{.users = 200, .items = 400, .days = 6, .slates = 400, .seed = 3};

}  // namespace

TEST_CASE("each generated event has its impressions: the item among others that had been made") {
  const TemporaryFolder folder;
  write_dataset({}, folder.path.string());
  const Dataset data = read(folder);
  std::map<std::string, std::int64_t> created;
  for (std::size_t i = 0; i < data.item_ids.size(); ++i)
    created[std::string(data.item_ids[i])] = data.items[i].creation_timestamp.value();
  std::vector<double> chosen(6);
  double rows = 0, shown_items = 0;
  for_each_impression(folder.file("interactions.csv"), [&](const std::string& item,
                                                           const std::vector<std::string>& shown) {
    const auto at = std::find(shown.begin(), shown.end(), item);
    REQUIRE(at != shown.end());
    REQUIRE(shown.size() <= chosen.size());
    REQUIRE(std::set<std::string>(shown.begin(), shown.end()).size() == shown.size());
    for (const std::string& other : shown) REQUIRE(created.contains(other));
    chosen[static_cast<std::size_t>(at - shown.begin())] += 1;
    rows += 1;
    shown_items += static_cast<double>(shown.size());
  });
  std::size_t events = 0;
  for (const auto& history : data.histories) events += history.size();
  CHECK(rows == static_cast<double>(events));
  CHECK(shown_items / rows > 4);
  for (std::size_t place = 1; place < chosen.size(); ++place)
    CHECK(chosen[place] < chosen[place - 1]);
}

TEST_CASE("a world is written with every click and the slate that it was made on") {
  const TemporaryFolder folder;
  WorldOptions options = small_world;
  options.scenario = scenario_of("fast-catalogue");
  write_world("epsilon-greedy", options, 0.3, folder.path.string());
  const Dataset data = read(folder);
  CHECK(data.user_ids.size() == options.users);
  CHECK(data.item_ids.size() == options.items + 200 * options.days);
  const PolicyRun run =
      run_policy("epsilon-greedy", options, {.weight = 0.3, .seed = options.seed});
  double clicks = 0;
  for_each_impression(folder.file("interactions.csv"),
                      [&](const std::string& item, const std::vector<std::string>& shown) {
                        REQUIRE(shown.size() == World::slate_length);
                        REQUIRE(std::find(shown.begin(), shown.end(), item) != shown.end());
                        clicks += 1;
                      });
  CHECK(clicks == std::accumulate(run.reward.begin(), run.reward.end(), 0.0));
  CHECK(clicks > 100);
  CHECK_THROWS_AS(write_world("no such policy", options, 0.3, folder.path.string()), Usage);
  CHECK_THROWS_AS(scenario_of("no such scenario"), Usage);
}

TEST_CASE("users click as often as the world says, less further down and when tired of an item") {
  for (const char* name : {"default", "no-fatigue"}) {
    World world({.scenario = scenario_of(name), .users = 200, .items = 400, .seed = 5});
    std::vector<std::uint32_t> slate(World::slate_length);
    std::iota(slate.begin(), slate.end(), 0u);
    double expected = 0, clicks = 0, variance = 0;
    for (int tick = 0; tick < 24; ++tick) {
      world.advance();
      for (const World::Visit& visit : world.visits()) {
        for (std::uint32_t& item : slate) item = (item + 10) % 400;
        for (std::size_t place = 0; place < slate.size(); ++place) {
          const double p = world.click_probability(visit, slate[place], place);
          expected += p;
          variance += p * (1 - p);
        }
        const std::vector<bool> clicked = world.show(visit, slate);
        clicks += static_cast<double>(std::count(clicked.begin(), clicked.end(), true));
      }
    }
    CHECK(std::abs(clicks - expected) < 4 * std::sqrt(variance));
    const World::Visit visit = world.visits().back();
    CHECK(world.click_probability(visit, 7, 0) > world.click_probability(visit, 7, 1));
    const double before = world.click_probability(visit, 7, 0);
    while (world.show(visit, {7, 8})[0]) {
    }
    CHECK((world.click_probability(visit, 7, 0) < before) == (std::string_view(name) == "default"));
  }
}

TEST_CASE(
    "a comparison is the same on any number of threads, and its ratios are those of its runs") {
  const std::vector<std::string> policies{"runtime", "runtime-0", "greedy", "age-count-bonus"};
  WorldOptions options = small_world;
  options.days = 3;
  const Comparison one = compare(policies, options, 0.3, 2, 1);
  const nlohmann::ordered_json json = to_json(one);
  CHECK(json == to_json(compare(policies, options, 0.3, 2, 3)));
  const auto total = [&](std::size_t policy, std::size_t seed) {
    const std::vector<double>& reward = one.runs[policy][seed].reward;
    return std::accumulate(reward.begin(), reward.end(), 0.0);
  };
  for (std::size_t seed = 0; seed < 2; ++seed) {
    CHECK(json["policies"][1]["first_policy_over_this"]["by_seed"][seed].get<double>() ==
          doctest::Approx(total(0, seed) / total(1, seed)));
    // Weight 0 is the runtime as well, not another policy.
    CHECK(json["first_policy_over_best_other"]["by_seed"][seed].get<double>() ==
          doctest::Approx(total(0, seed) / std::max(total(2, seed), total(3, seed))));
    CHECK(
        json["policies"][2]["first_policy_over_this_on_first_day"]["by_seed"][seed].get<double>() ==
        doctest::Approx(one.runs[0][seed].reward[0] / one.runs[2][seed].reward[0]));
  }
  const std::string svg = to_svg(one);
  std::size_t lines = 0;
  for (std::size_t at = 0; (at = svg.find("<polyline", at)) != std::string::npos; ++at) ++lines;
  CHECK(lines == 2 * policies.size());
  CHECK_THROWS_AS(compare({"runtime", "no such policy"}, options, 0.3, 2, 2), Usage);
}

TEST_CASE("every policy shows full slates of distinct items that the user has not clicked") {
  for (const std::string& name : policy_names()) {
    CAPTURE(name);
    std::map<std::uint32_t, std::set<std::uint32_t>> clicked_before;
    bool begun = false;
    WorldOptions options = small_world;
    options.days = 2;
    const auto check = [&](const World& world, const World::Visit& visit,
                           const std::vector<std::uint32_t>& slate,
                           const std::vector<bool>& clicked) {
      if (!std::exchange(begun, true))
        for (const World::Event& event : world.history())
          clicked_before[event.user].insert(event.item);
      REQUIRE(slate.size() == World::slate_length);
      REQUIRE(std::set<std::uint32_t>(slate.begin(), slate.end()).size() == slate.size());
      for (std::size_t place = 0; place < slate.size(); ++place) {
        REQUIRE(slate[place] < world.items().size());
        REQUIRE_FALSE(clicked_before[visit.user].contains(slate[place]));
        if (clicked[place]) clicked_before[visit.user].insert(slate[place]);
      }
    };
    (void)run_policy(name, options, {.weight = 0.3, .seed = 1}, check);
    CHECK(begun);
  }
}

TEST_CASE("the runtime finds good new items and earns more than the model alone") {
  const Comparison c =
      compare({"runtime", "greedy", "epsilon-greedy"},
              {.users = 200, .items = 400, .days = 15, .slates = 800, .seed = 2}, 0.3, 1, 2);
  const auto total = [&](std::size_t policy) {
    return std::accumulate(c.runs[policy][0].reward.begin(), c.runs[policy][0].reward.end(), 0.0);
  };
  CHECK(total(0) > 1.3 * total(1));
  CHECK(total(0) > 1.3 * total(2));
  CHECK(c.runs[0][0].days_to_discover.size() > 4 * c.runs[1][0].days_to_discover.size());
  CHECK(c.runs[0][0].good_items == 50);
}

TEST_CASE("a plot's ticks are distinct, exact and where they say, its axes end with the run") {
  for (const std::uint32_t days : {1u, 2u, 3u, 4u, 7u, 10u, 13u, 30u, 365u}) {
    CAPTURE(days);
    Comparison c;
    c.world.days = days;
    c.seeds = {1};
    c.policies = {"greedy"};
    // One item is found on the last day that the plot shows.
    const double oldest = std::min<double>(days, 10);
    PolicyRun run;
    run.reward.assign(days, 1.5);
    run.days_to_discover = {oldest};
    run.good_items = 1;
    c.runs = {{run}};
    const std::string svg = to_svg(c);
    struct Label {
      double x, y, value;
      std::string text;
    };
    std::vector<Label> labels;
    const std::regex tick(
        "<text x='([0-9.]+)' y='([0-9.]+)' text-anchor='(middle|end)'>([0-9.]+)<");
    for (std::sregex_iterator at(svg.begin(), svg.end(), tick), end; at != end; ++at)
      labels.push_back({std::stod((*at)[1]), std::stod((*at)[2]), std::stod((*at)[4]), (*at)[4]});
    // Days, clicks, age, share: left panel from 80 to 460, right from 540 to 920, 340 to 40.
    const std::array<double, 4> ends{static_cast<double>(days), 0, oldest, 1};
    std::array<std::vector<Label>, 4> axes;
    for (const Label& label : labels) {
      const bool right = label.x > 500, below = label.y > 350;
      axes[(right ? 2 : 0) + (below ? 0 : 1)].push_back(label);
    }
    for (std::size_t a = 0; a < axes.size(); ++a) {
      CAPTURE(a);
      const auto& axis = axes[a];
      REQUIRE(axis.size() >= 2);
      CHECK(axis.size() <= 6);
      CHECK(axis.front().value == 0);
      std::set<std::string> texts;
      for (const Label& label : axis) {
        texts.insert(label.text);
        if (a % 2 == 0)
          CHECK(label.x == doctest::Approx((a == 0 ? 80 : 540) + 380 * label.value / ends[a]));
        else if (a == 3)
          CHECK(label.y == doctest::Approx(344 - 300 * label.value));
      }
      CHECK(texts.size() == axis.size());
      // Equal steps, so that no label is rounded.
      for (std::size_t i = 1; i < axis.size(); ++i)
        CHECK(axis[i].value == doctest::Approx(static_cast<double>(i) * axis[1].value));
      if (a == 0) CHECK(axis[1].value == std::floor(axis[1].value));
    }
    // Lines: the clicks to the end of the days, the found item at the right edge.
    CHECK(svg.find(" 460,") != std::string::npos);
    CHECK(svg.find(" 920,40 '/>") != std::string::npos);
  }
}
