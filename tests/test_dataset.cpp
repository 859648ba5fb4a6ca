// Interactions and items as read from CSV.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/dataset.hpp"
#include "refusal.hpp"
#include "strings.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace personalize::tools;
using Strings = std::vector<std::string>;

struct Files {
  TemporaryFolder folder;
  DatasetOptions options;

  explicit Files(std::string_view interactions, std::string_view items = {}) {
    options.interactions = folder.write("events.csv", interactions);
    if (!items.empty()) options.items = folder.write("items.csv", items);
  }
  Dataset read() const { return read_dataset(options); }
  // What read() says, without the folder.
  std::string failure() const {
    try {
      read();
    } catch (const Failure& failure) {
      return relative(failure.what());
    }
    return "";
  }
  std::string relative(std::string text) const {
    const std::string prefix = folder.path.string() + "/";
    for (std::size_t at = 0; (at = text.find(prefix)) != std::string::npos;)
      text.erase(at, prefix.size());
    return text;
  }
};

// "item@timestamp" of each event.
Strings history(const Dataset& data, std::string_view user) {
  const auto found = data.user_ids.find(user);
  REQUIRE(found);
  Strings events;
  for (const Event& event : data.histories[*found])
    events.push_back(std::string(data.item_ids[event.item]) + "@" +
                     std::to_string(event.timestamp));
  return events;
}

const ItemInfo& item(const Dataset& data, std::string_view id) {
  const auto found = data.item_ids.find(id);
  REQUIRE(found);
  return data.items[*found];
}

std::int64_t now() { return static_cast<std::int64_t>(std::time(nullptr)); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

const std::string milliseconds = "; it looks like milliseconds";

constexpr std::string_view header = "USER_ID,ITEM_ID,TIMESTAMP\n";
constexpr std::string_view two_users =
    "USER_ID,ITEM_ID,TIMESTAMP\nu1,a,10\nu1,b,20\nu2,b,30\nu2,c,40\n";

}  // namespace

TEST_CASE("histories are in order of time, and of the file where timestamps are equal") {
  const Files files(
      "TIMESTAMP,USER_ID,ITEM_ID\n"
      "50,u2,x\n30,u1,c\n30,u1,b\n10,u1,d\n30,u1,a\n50,u2,w\n50,u3,x\n");
  const Dataset data = files.read();
  CHECK(strings(data.user_ids) == Strings{"u1", "u2", "u3"});
  CHECK(strings(data.item_ids) == Strings{"d", "c", "b", "a", "x", "w"});
  CHECK(history(data, "u1") == Strings{"d@10", "c@30", "b@30", "a@30"});
  CHECK(history(data, "u2") == Strings{"x@50", "w@50"});
  CHECK(history(data, "u3") == Strings{"x@50"});
  CHECK(data.interactions == 7);
  CHECK(data.first_timestamp == 10);
  CHECK(data.last_timestamp == 50);
  CHECK(data.event_types.size() == 0);
  CHECK(data.bad_rows.count == 0);
  CHECK(item(data, "x").interactions == 2);
  CHECK(item(data, "x").first == 50);
  CHECK(item(data, "a").last == 30);
  CHECK_FALSE(item(data, "a").creation_timestamp.has_value());
}

TEST_CASE("event types are indexed, and one of them can be chosen") {
  Files files(
      "USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE\n"
      "u1,a,1,view\nu1,b,2,buy\nu2,c,3,view\nu2,d,4,view\nu3,e,5,buy\n");
  const Dataset all = files.read();
  CHECK(strings(all.event_types) == Strings{"view", "buy"});
  CHECK(all.histories[0][1].event_type == 1);
  CHECK(all.histories[1][0].event_type == 0);
  files.options.event_type_filter = "view";
  const Dataset views = files.read();
  CHECK(strings(views.event_types) == Strings{"view"});
  CHECK(strings(views.user_ids) == Strings{"u1", "u2"});
  CHECK(strings(views.item_ids) == Strings{"a", "c", "d"});
  CHECK(views.interactions == 3);
  files.options.event_type_filter = "rent";
  CHECK(files.failure() == "events.csv: holds no interactions whose EVENT_TYPE is 'rent'");
  Files without(two_users);
  without.options.event_type_filter = "view";
  CHECK(without.failure() == "events.csv:1: no column EVENT_TYPE to choose 'view' from");
}

TEST_CASE("a bad row is a failure with file, line, column, reason and the way out") {
  const auto check = [](const std::string& row, const std::string& reason) {
    CAPTURE(row);
    CHECK(Files(std::string(header) + "u1,a,1\n" + row + "\nu2,a,2\n").failure() ==
          "events.csv:3: " + reason + "; correct the row or pass --skip-bad-rows");
  };
  check("u1,b,", "column TIMESTAMP: '' is not a whole number of Unix seconds");
  check("u1,b,12x", "column TIMESTAMP: '12x' is not a whole number of Unix seconds");
  check("u1,b, 12", "column TIMESTAMP: ' 12' is not a whole number of Unix seconds");
  check("u1,b,1.5", "column TIMESTAMP: '1.5' is not a whole number of Unix seconds");
  check("u1,b,99999999999999999999",
        "column TIMESTAMP: '99999999999999999999' is not a whole number of Unix seconds");
  check("u1,b,-1", "column TIMESTAMP: '-1' lies before the earliest Unix second that is taken, 0");
  check(",b,2", "column USER_ID: is empty");
  check("u1,,2", "column ITEM_ID: is empty");
  check("u1,b\tc,2", "column ITEM_ID: holds a control character");
  check("\"u\n1\",b,2", "column USER_ID: holds a control character");
  check("u1,b\xc2\x85,2", "column ITEM_ID: holds a control character");
  check("u1," + std::string(257, 'b') + ",2", "column ITEM_ID: has more than 256 bytes");
  check(std::string(257, 'u') + ",b,2", "column USER_ID: has more than 256 bytes");
  check("u1,b", "2 fields, the header has 3");
  CHECK(Files("USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE\nu1,a,1,\n").failure() ==
        "events.csv:2: column EVENT_TYPE: is empty; correct the row or pass --skip-bad-rows");
  const std::string longest(256, 'i');
  CHECK(Files(std::string(two_users) + "u1," + longest + "," + std::to_string(now()) + "\n")
            .read()
            .item_ids.find(longest));
}

TEST_CASE("a time over a day ahead of the clock is a bad row, and its unit is told") {
  const auto told = [](std::int64_t time, const std::string& column) {
    const Files files =
        column == "TIMESTAMP"
            ? Files(std::string(two_users) + "u1,b," + std::to_string(time) + "\n")
            : Files(two_users, "ITEM_ID,CREATION_TIMESTAMP\nb," + std::to_string(time) + "\n");
    return files.failure();
  };
  for (const char* column : {"TIMESTAMP", "CREATION_TIMESTAMP"}) {
    CAPTURE(column);
    CHECK(told(now() + 86'300, column) == "");
    const std::string late = told(now() + 86'500, column);
    CHECK(contains(late, std::string("column ") + column + ": '"));
    CHECK(contains(late, " lies over a day in the future (this machine's clock: "));
    CHECK_FALSE(contains(late, "looks like"));
    // 1997 and 2023.
    for (const std::int64_t seconds : {880'000'000, 1'700'000'000}) {
      CHECK(contains(told(seconds * 1000, column), ")" + milliseconds));
      CHECK(contains(told(seconds * 1'000'000, column), "; it looks like microseconds"));
      CHECK(contains(told(seconds * 1'000'000'000, column), "; it looks like nanoseconds"));
    }
    CHECK_FALSE(contains(told(4'102'444'801, column), "looks like"));
    CHECK(contains(told(std::numeric_limits<std::int64_t>::max(), column), "in the future"));
  }
  CHECK(contains(told(-1'514'764'800'000, "CREATION_TIMESTAMP"), milliseconds));
}

TEST_CASE("where every row is bad, skipping them says so with the first reason") {
  Files files(std::string(header) + "u1,a,1700000000000\nu2,b,1700000000001\n");
  files.options.skip_bad_rows = true;
  const std::string told = files.failure();
  CHECK(contains(told,
                 "events.csv: holds no interactions; 2 bad rows were skipped, the first: "
                 "events.csv:2: column TIMESTAMP: '1700000000000' lies over a day"));
  CHECK(contains(told, milliseconds));
}

TEST_CASE("metadata values with control characters are no values") {
  const Dataset data =
      Files(two_users, "ITEM_ID,KIND\na,\"old\nand worn\"\nb,\"new|a\tb\"\n").read();
  REQUIRE(data.metadata.size() == 1);
  CHECK(strings(data.metadata[0].vocabulary) == Strings{"new"});
  CHECK(Files(two_users, "ITEM_ID,\"A\nB\"\na,x\n").failure() ==
        "items.csv:1: the name of column 2 holds a control character");
}

TEST_CASE("bad rows can be skipped: all are counted, the first ten are reported") {
  std::string events(two_users), items = "ITEM_ID,CREATION_TIMESTAMP\na,5\n";
  for (int i = 0; i < 9; ++i) events += "u1,x,bad\n";
  events += "u9,z,50\n";
  items += "b,soon\n" + std::string("c,7\nc,8\n") + ",9\n";
  Files files(events, items);
  files.options.skip_bad_rows = true;
  const Dataset data = files.read();
  CHECK(data.bad_rows.count == 12);
  REQUIRE(data.bad_rows.reports.size() == 10);
  CHECK(files.relative(data.bad_rows.reports[0]) ==
        "events.csv:6: column TIMESTAMP: 'bad' is not a whole number of Unix seconds");
  CHECK(files.relative(data.bad_rows.reports[8]).starts_with("events.csv:14: "));
  CHECK(files.relative(data.bad_rows.reports[9]) ==
        "items.csv:3: column CREATION_TIMESTAMP: 'soon' is not a whole number of Unix seconds");
  CHECK(data.interactions == 5);
  CHECK(strings(data.item_ids) == Strings{"a", "b", "c", "z"});
  CHECK(item(data, "c").creation_timestamp == 7);
  CHECK_FALSE(item(data, "b").creation_timestamp.has_value());
}

TEST_CASE("data that nothing can be learnt from is refused") {
  CHECK(Files(header).failure() == "events.csv: holds no interactions");
  const auto to_learn_from = [](const std::string& rows) {
    const Dataset data = Files(std::string(header) + rows).read();
    return refusal([&] { require_sequences(data, "events.csv"); });
  };
  CHECK(to_learn_from("u1,a,1\nu1,b,2\n") ==
        "events.csv: only one user (u1); a model needs the interactions of at least two");
  CHECK(to_learn_from("u1,a,1\nu2,b,2\n") ==
        "events.csv: no user has two interactions; there is no sequence to learn from");
  CHECK(to_learn_from("u1,a,1\nu2,b,2\nu1,b,3\n") == "nothing was refused");
  Files none(header);
  none.options.may_be_empty = true;
  CHECK(none.read().histories.empty());
  CHECK(Files("USER_ID,ITEM,TIMESTAMP\n").failure() ==
        "events.csv:1: no column ITEM_ID (found: USER_ID, ITEM, TIMESTAMP); name it so in the "
        "header row");
  Files missing(two_users);
  missing.options.items = missing.folder.file("items.csv");
  CHECK(missing.failure() == "items.csv: cannot open: No such file or directory");
}

TEST_CASE("items of one file only are kept: those of the items file come last") {
  const Dataset data = Files(two_users, "ITEM_ID,KIND\nz,new\nb,old\ny,new\n").read();
  CHECK(strings(data.item_ids) == Strings{"a", "b", "c", "z", "y"});
  REQUIRE(data.items.size() == 5);
  CHECK(item(data, "z").interactions == 0);
  CHECK_FALSE(item(data, "z").first.has_value());
  CHECK_FALSE(item(data, "z").last.has_value());
  REQUIRE(data.metadata.size() == 1);
  CHECK(strings(data.metadata[0].vocabulary) == Strings{"new", "old"});
  CHECK(data.metadata[0].values == std::vector<std::vector<std::uint32_t>>{{}, {1}, {}, {0}, {0}});
}

TEST_CASE("creation timestamps may be missing, and may lie before 1970") {
  const Dataset data = Files(two_users,
                             "CREATION_TIMESTAMP,ITEM_ID\n"
                             "0,a\n,b\n-1514764800,c\n1700000000,d\n")
                           .read();
  CHECK(item(data, "a").creation_timestamp == 0);
  CHECK_FALSE(item(data, "b").creation_timestamp.has_value());
  CHECK(item(data, "c").creation_timestamp == -1'514'764'800);
  CHECK(item(data, "d").creation_timestamp == 1'700'000'000);
  CHECK(data.metadata.empty());
  CHECK(Files(two_users, "ITEM_ID,CREATION_TIMESTAMP\na,-62135596801\n").failure() ==
        "items.csv:2: column CREATION_TIMESTAMP: '-62135596801' lies before the earliest Unix "
        "second that is taken, -62135596800; correct the row or pass --skip-bad-rows");
}

TEST_CASE("an item that stands twice in the items file is a bad row") {
  CHECK(Files(two_users, "ITEM_ID\na\nq\nb\nq\n").failure() ==
        "items.csv:5: column ITEM_ID: 'q' stands twice; correct the row or pass --skip-bad-rows");
}

TEST_CASE("a column without a name is refused") {
  CHECK(Files(two_users, "ITEM_ID,,KIND\na,1,2\n").failure() ==
        "items.csv:1: a column name has 1 to 256 bytes, that of column 2 has 0");
}

TEST_CASE("categorical metadata is split at '|', and empty values are none") {
  const Dataset data = Files(two_users,
                             "ITEM_ID,GENRES,NOTHING,BARS,STARS\n"
                             "a,Drama|War,,|,3\nb,War,,,5\nc,,,,3\nd,|Drama||Comedy|,,|,\n")
                           .read();
  REQUIRE(data.metadata.size() == 2);
  CHECK(data.metadata[0].name == "GENRES");
  CHECK_FALSE(data.metadata[0].numeric);
  CHECK(strings(data.metadata[0].vocabulary) == Strings{"Drama", "War", "Comedy"});
  CHECK(data.metadata[0].values ==
        std::vector<std::vector<std::uint32_t>>{{0, 1}, {1}, {}, {0, 2}});
  // Few distinct numbers are categories.
  CHECK(data.metadata[1].name == "STARS");
  CHECK_FALSE(data.metadata[1].numeric);
  CHECK(strings(data.metadata[1].vocabulary) == Strings{"3", "5"});
  CHECK(data.ignored_columns == Strings{"NOTHING (no values)", "BARS (no values)"});
}

TEST_CASE("many distinct numbers fall into buckets of about as many items each") {
  std::string items = "ITEM_ID,PRICE\n";
  constexpr std::size_t count = 320;
  for (std::size_t i = 0; i < count; ++i)
    items += "p" + std::to_string(i) + "," + std::to_string(i * i % 1009) + ".25\n";
  const Dataset data = Files(two_users, items + "no_price,\n").read();
  REQUIRE(data.metadata.size() == 1);
  const MetadataColumn& price = data.metadata[0];
  CHECK(price.numeric);
  CHECK(price.vocabulary.size() == 0);
  REQUIRE(price.boundaries.size() == 15);
  CHECK(std::is_sorted(price.boundaries.begin(), price.boundaries.end(), std::less_equal<>()));
  std::vector<std::size_t> filled(16, 0);
  for (std::size_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(i * i % 1009) + 0.25f;
    std::size_t bucket = 0;
    for (const float boundary : price.boundaries) bucket += boundary <= value ? 1 : 0;
    const auto& got = price.values[3 + i];
    REQUIRE(got.size() == 1);
    CHECK(got[0] == bucket);
    ++filled[bucket];
  }
  for (const std::size_t n : filled) CHECK((n >= 16 && n <= 24));
  CHECK(price.values.back().empty());
  CHECK(price.values.front().empty());
}

TEST_CASE("a column is numeric only where every value is a number that a float can hold") {
  for (const std::string_view odd : {"1e300", "nan", "inf", "12 EUR", "0x10"}) {
    std::string items = "ITEM_ID,PRICE\n";
    for (int i = 0; i < 40; ++i) items += "p" + std::to_string(i) + "," + std::to_string(i) + "\n";
    const Dataset data = Files(two_users, items + "odd," + std::string(odd) + "\n").read();
    CAPTURE(odd);
    REQUIRE(data.metadata.size() == 1);
    CHECK_FALSE(data.metadata[0].numeric);
    CHECK(strings(data.metadata[0].vocabulary).back() == odd);
  }
}

TEST_CASE("free text is ignored and said so") {
  std::string items = "ITEM_ID,TITLE\n";
  for (int i = 0; i < 1001; ++i)
    items += "p" + std::to_string(i) + ",Title " + std::to_string(i) + "\n";
  const Dataset data = Files(two_users, items).read();
  CHECK(data.metadata.empty());
  CHECK(data.ignored_columns == Strings{"TITLE (free text: 1001 distinct values for 1004 items)"});
}
