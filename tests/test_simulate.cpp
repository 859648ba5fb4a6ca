// The generated data set.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/csv.hpp"
#include "../tools/data/dataset.hpp"
#include "../tools/simulate/simulate.hpp"
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
    CHECK(data.event_types == std::vector<std::string>{"play"});
    CHECK(data.bad_rows == 0);
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
    CHECK(ids == std::set<std::string>(data.user_ids.begin(), data.user_ids.end()));
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
  const auto number = [&](const Event& e) { return std::stoi(data.item_ids[e.item].substr(1)); };
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
