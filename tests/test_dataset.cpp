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

const std::string milliseconds = "; it looks like milliseconds";

// The description and the warnings, a line each.
std::string said(const Files& files) {
  const Dataset data = files.read();
  std::string text;
  for (const auto* const lines : {&data.description, &data.warnings})
    for (const std::string& line : *lines) text += line + "\n";
  return files.relative(text);
}

// What is said of column X of an items file with these values of items a, b, c, p0, p1, ...
std::string said_of(const Strings& values, const std::string& name = "X",
                    const ColumnOptions& columns = {});

constexpr std::string_view header = "USER_ID,ITEM_ID,TIMESTAMP\n";
constexpr std::string_view two_users =
    "USER_ID,ITEM_ID,TIMESTAMP\nu1,a,10\nu1,b,20\nu2,b,30\nu2,c,40\n";

std::string items_with(const Strings& values, const std::string& name) {
  std::string items = "ITEM_ID," + name + "\n";
  for (std::size_t i = 0; i < values.size(); ++i)
    items += (i < 3 ? std::string(1, static_cast<char>('a' + i)) : "p" + std::to_string(i - 3)) +
             ",\"" + values[i] + "\"\n";
  return items;
}

std::string said_of(const Strings& values, const std::string& name, const ColumnOptions& columns) {
  Files files(two_users, items_with(values, name));
  files.options.columns = columns;
  const std::string text = said(files);
  const std::size_t begin = text.find("ITEM_ID (id), ", text.find("items.csv")) + 14;
  return text.substr(begin, text.find('\n', begin) - begin);
}

// first, first + step, ...
Strings numbers(std::size_t count, int first, int step, const std::string& behind = "") {
  Strings all;
  for (std::size_t i = 0; i < count; ++i)
    all.push_back(std::to_string(first + step * static_cast<int>(i)) + behind);
  return all;
}

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
  CHECK(files.failure() ==
        "events.csv: holds no interactions whose EVENT_TYPE is 'rent' (5 rows of other types)");
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
  check("u1,b,1,5", "4 fields, the header has 3");
  check("u1,b,nan", "column TIMESTAMP: 'nan' is not a whole number of Unix seconds");
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
  CHECK(Files("USER_ID,ITEMS,TIMESTAMP\n").failure() ==
        "events.csv:1: no column ITEM_ID (found: USER_ID, ITEMS, TIMESTAMP); name it so in the "
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
        "second that is taken, -62135596800; it looks like milliseconds, which "
        "--creation-timestamp-format milliseconds reads; correct the row or pass --skip-bad-rows");
}

TEST_CASE("an item that stands twice in the items file is a bad row") {
  CHECK(Files(two_users, "ITEM_ID\na\nq\nb\nq\n").failure() ==
        "items.csv:5: column ITEM_ID: 'q' stands twice; correct the row or pass --skip-bad-rows");
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
  CHECK(contains(data.description[1],
                 "GENRES (categorical, 3 values, 1 without one), NOTHING (left out: no values), "
                 "BARS (left out: no values), STARS (categorical, 2 values, 1 without one)"));
}

TEST_CASE("many distinct numbers fall into buckets of about as many items each") {
  std::string items = "ITEM_ID,PRICE\n";
  constexpr std::size_t count = 320;
  for (std::size_t i = 0; i < count; ++i)
    items += "p" + std::to_string(i) + "," + std::to_string(i * i % 1009) + ".25\n";
  const Dataset data = Files(two_users, items + "a,\n").read();
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
  CHECK(price.values.front().empty());
}

TEST_CASE("what is no number in a column of numbers is left out and named, and words mean none") {
  for (const std::string& odd : Strings{"1e300", "inf", "12 EUR", "0x10"}) {
    CAPTURE(odd);
    Strings values = numbers(40, 3, 7);
    values.push_back(odd);
    CHECK(said_of(values) ==
          "X (numeric, 1 value left out as no number: '" + odd + "' of item p37)");
    const Dataset data = Files(two_users, items_with(values, "X")).read();
    REQUIRE(data.metadata.size() == 1);
    CHECK(data.metadata[0].numeric);
    CHECK(data.metadata[0].values.back().empty());
    CHECK_FALSE(data.metadata[0].values.front().empty());
  }
  for (const std::string& none :
       Strings{"nan", "NaN", "NULL", "None", "N/A", "<NA>", "-", "", "\\N"}) {
    CAPTURE(none);
    Strings values = numbers(40, 3, 7);
    values.push_back(none);
    values.push_back(none);
    CHECK(said_of(values) == "X (numeric, 2 without a value)");
  }
  Strings half = numbers(30, 3, 7);
  for (int i = 0; i < 15; ++i)
    half.push_back("size " + std::string(1, static_cast<char>('a' + i % 5)));
  CHECK(contains(said_of(half),
                 "X (categorical, 35 values, of which some are numbers: --numeric leaves out 15 "
                 "values like 'size a'"));
}

TEST_CASE("decimal commas are read where no other reading is left") {
  Strings prices;
  for (int i = 0; i < 40; ++i)
    prices.push_back(std::to_string(i + 1) + ",5" + std::to_string(i % 10));
  CHECK(said_of(prices) == "X (numeric, decimal commas)");
  prices.push_back("1.234,50");
  const Dataset data = Files(two_users, items_with(prices, "X")).read();
  REQUIRE(data.metadata.size() == 1);
  REQUIRE(data.metadata[0].numeric);
  // 1234.5 is the largest: above every boundary.
  CHECK(data.metadata[0].values.back()[0] == data.metadata[0].boundaries.size());
  CHECK(data.metadata[0].boundaries.back() < 41);
  CHECK(data.metadata[0].boundaries.front() > 1);
  Strings thousands;
  for (int i = 0; i < 40; ++i) thousands.push_back(std::to_string(i + 1) + ",500");
  CHECK(contains(said_of(thousands), "X (categorical, 40 values, each of one item"));
}

TEST_CASE("whole numbers under a name for codes are categories, and options decide otherwise") {
  Strings codes;
  for (int i = 0; i < 40; ++i) codes.push_back(std::to_string(1000 + 97 * (i % 20)));
  for (const char* const name : {"CATEGORY_ID", "categoryId", "BRAND", "genre code"}) {
    CAPTURE(name);
    CHECK(said_of(codes, name) == std::string(name) + " (categorical, 20 values)");
  }
  CHECK(said_of(codes, "WEIGHT") == "WEIGHT (numeric)");
  CHECK(said_of(codes, "WEIGHT", {.categorical = {"weight"}}) == "WEIGHT (categorical, 20 values)");
  CHECK(said_of(codes, "CATEGORY_ID", {.numeric = {"CATEGORY_ID"}}) == "CATEGORY_ID (numeric)");
  CHECK(said_of(codes, "CATEGORY_ID", {.text = {"CATEGORY_ID"}}) ==
        "CATEGORY_ID (left out: text, which is not learnt from)");
  CHECK(said_of(codes, "CATEGORY_ID", {.ignore = {"CATEGORY_ID"}}) ==
        "CATEGORY_ID (left out: --ignore)");
  Strings zeros;
  for (int i = 0; i < 40; ++i) zeros.push_back("0" + std::to_string(100 + i % 20));
  CHECK(said_of(zeros, "SHELF") == "SHELF (categorical, 20 values)");
  // Amazon's reserved names.
  CHECK(said_of({"3", "4", "5"}, "PRICE") == "PRICE (numeric)");
  CHECK(said_of(codes, "GENRES") == "GENRES (categorical, 20 values)");
  CHECK(said_of({"x", "y", "z"}, "PRODUCT_DESCRIPTION") ==
        "PRODUCT_DESCRIPTION (left out: text, by Amazon's name; it is not learnt from)");
}

TEST_CASE("columns that tell nothing are left out with the reason") {
  for (const char* const name : {"", "Unnamed: 0", "index"}) {
    CAPTURE(name);
    CHECK(contains(said_of(numbers(20, 0, 1), name), "(left out: row numbers"));
  }
  CHECK(said_of({"x", "y", "z"}, "") == "column 2 (left out: a column without a name)");
  CHECK(said_of(numbers(20, 0, 2), "index") == "index (numeric)");
  CHECK(said_of(numbers(20, 0, 1), "index", {.numeric = {"index"}}) == "index (numeric)");
  CHECK(said_of({"same", "same", "same"}) == "X (left out: the same value in every row)");
  CHECK(said_of({"same", "same", ""}) == "X (categorical, 1 value, 1 without one)");
  CHECK(said_of({"nan", "", "NULL"}) == "X (left out: no values)");
  Strings dear;
  for (int i = 0; i < 20; ++i) dear.push_back("$" + std::to_string(i) + ".99");
  CHECK(
      said_of(dear) ==
      "X (categorical, 20 values, each of one item; they look like numbers with a unit: write the "
      "numbers alone)");
  CHECK(said_of({"old\nand worn", "new|a\tb", "new"}) ==
        "X (categorical, 1 value, 2 values left out with a control character or over 256 bytes)");
  Strings titles;
  for (int i = 0; i < 1001; ++i) titles.push_back("Title " + std::to_string(i));
  CHECK(contains(said_of(titles, "TITLE"),
                 "TITLE (left out: free text: 1001 distinct values for 1001 items"));
  CHECK(said_of(titles, "TITLE", {.categorical = {"TITLE"}}) ==
        "TITLE (categorical, 1001 values, each of one item)");
}

TEST_CASE("an option that names no column says which there are") {
  const auto told = [](const ColumnOptions& columns, std::string_view items = "ITEM_ID,X\na,1\n") {
    Files files(two_users, items);
    files.options.columns = columns;
    return files.failure();
  };
  CHECK(told({.categorical = {"Y"}}) ==
        "--categorical Y: no such column of the items: items.csv has ITEM_ID, X");
  CHECK(told({.ignore = {"Y"}}) ==
        "--ignore Y: no such column: events.csv has USER_ID, ITEM_ID, TIMESTAMP; items.csv has "
        "ITEM_ID, X");
  CHECK(told({.numeric = {"X"}}, "") ==
        "--numeric X: no such column of the items: --items is not given");
  CHECK(told({.ignore = {"USER_ID"}}) ==
        "--ignore USER_ID: the column is read as USER_ID and no metadata");
  CHECK(told({.numeric = {"item_id"}}) ==
        "--numeric item_id: the column is read as ITEM_ID and no metadata");
  CHECK_THROWS_WITH_AS(ColumnChoices({.numeric = {"X"}, .text = {"x"}}),
                       "column x is given to --numeric and to --text", Usage);
  Files types("USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE\nu1,a,1,v\nu1,b,2,w\nu2,a,3,v\n");
  types.options.columns.ignore = {"EVENT_TYPE"};
  CHECK(types.read().event_types.empty());
}

TEST_CASE("a schema of Amazon Personalize says what the columns are") {
  Files files("USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE,DEVICE\nu1,a,1,v,x\nu1,b,2,w,x\nu2,a,3,v,y\n",
              "ITEM_ID,YEAR,KIND,STORY,OWNER,EXTRA\na,1999,1,s,o,e\nb,2001,2,t,p,f\n");
  const auto items_schema = [](const std::string& fields) {
    return R"({"type": "record", "name": "Items", "namespace": "com.amazonaws.personalize.schema",
      "fields": [{"name": "ITEM_ID", "type": "string"})" +
           fields + R"(], "version": "1.0"})";
  };
  const std::string all = items_schema(
      R"(,{"name": "YEAR", "type": ["null", "long"]},
          {"name": "KIND", "type": ["null", "string"], "categorical": true},
          {"name": "STORY", "type": "string", "textual": true},
          {"name": "OWNER", "type": "string"})");
  const std::string interactions = R"({"type": "record", "name": "Interactions", "fields": [
      {"name": "USER_ID", "type": "string"}, {"name": "ITEM_ID", "type": "string"},
      {"name": "TIMESTAMP", "type": "long"}, {"name": "EVENT_TYPE", "type": "string"}]})";
  files.options.columns.schemas = {files.folder.write("i.json", all),
                                   files.folder.write("e.json", interactions)};
  const std::string text = said(files);
  CHECK(contains(text,
                 "YEAR (numeric), KIND (categorical, 2 values, each of one item), STORY (left out: "
                 "text, which is not learnt from), OWNER (left out: a string that the schema calls "
                 "neither categorical nor textual), EXTRA (left out: not in the schema)"));
  CHECK(contains(text, "EVENT_TYPE (event type, 2 values), DEVICE (left out: not in the schema)"));
  const auto refused = [&](const std::string& schema) {
    files.options.columns.schemas = {files.folder.write("s.json", schema)};
    return files.failure();
  };
  CHECK(refused(items_schema(R"(,{"name": "SIZE", "type": "float"})")) ==
        "s.json: field SIZE is no column: items.csv has ITEM_ID, YEAR, KIND, STORY, OWNER, EXTRA");
  CHECK(contains(refused(items_schema(R"(,{"name": "YEAR", "type": "date"})")),
                 "s.json: field YEAR has the type 'date'; a schema is"));
  CHECK(contains(refused(items_schema(R"(,{"name": "YEAR", "type": "string", "textual": 1})")),
                 "s.json: field YEAR: 'textual' is neither true nor false"));
  CHECK(contains(refused(R"({"fields": [{"name": "USER_ID", "type": "string"}]})"),
                 "s.json: describes users, whose file is not read"));
  CHECK(contains(refused("[]"), "s.json: has no list of fields"));
  CHECK(refused("{") == "s.json is not JSON");
}

TEST_CASE("times are read in the format that is told, and another one is advised") {
  const auto read = [](const std::string& first, const std::string& second,
                       TimestampFormat format) {
    Files files(std::string(header) + "u1,a," + first + "\nu1,b," + second + "\nu2,a," + second +
                "\n");
    files.options.timestamps = format;
    try {
      const Dataset data = files.read();
      return std::to_string(data.first_timestamp) + " " + std::to_string(data.last_timestamp);
    } catch (const Failure& failure) {
      return files.relative(failure.what());
    }
  };
  CHECK(read("880000000.0", "8.80003600e8", TimestampFormat::seconds) == "880000000 880003600");
  CHECK(read(" 10", "20.75", TimestampFormat::seconds) == "10 20");
  CHECK(read("880000000000", "1700000000999", TimestampFormat::milliseconds) ==
        "880000000 1700000000");
  CHECK(read("880000000000000", "1700000000000000", TimestampFormat::microseconds) ==
        "880000000 1700000000");
  CHECK(read("880000000000000000", "1700000000000000000", TimestampFormat::nanoseconds) ==
        "880000000 1700000000");
  CHECK(read("2023-11-14", "2023-11-14T22:13:20Z", TimestampFormat::iso_8601) ==
        "1699920000 1700000000");
  CHECK(read("2023-11-14 23:13:20.5+01:00", "2023-11-14T17:13:21-0500",
             TimestampFormat::iso_8601) == "1700000000 1700000001");
  for (const char* const bad : {"2023-02-30", "2023-11-14T25:00", "2023-11-14T22:13:20+1",
                                "2023-11-14x", "14.11.2023", "2023-11-14T", "", "2023-1-4"}) {
    CAPTURE(bad);
    CHECK(contains(read(bad, "2023-11-14", TimestampFormat::iso_8601),
                   "is not a date or time as ISO 8601 writes it"));
  }
  CHECK(contains(read("2023-11-14", "2023-11-14", TimestampFormat::seconds),
                 "events.csv:2: column TIMESTAMP: '2023-11-14' is not a whole number of Unix "
                 "seconds; it looks like iso-8601, which --timestamp-format iso-8601 reads"));
  CHECK(contains(read("880000000000", "880000000000", TimestampFormat::seconds),
                 "; it looks like milliseconds, which --timestamp-format milliseconds reads"));
  CHECK(contains(read("1700000000", "1700000000", TimestampFormat::iso_8601),
                 "; it looks like seconds, which --timestamp-format seconds reads"));
  CHECK(contains(read("1700000000", "1700000001", TimestampFormat::milliseconds),
                 "as milliseconds every TIMESTAMP lies before 1973"));
}

TEST_CASE("of rows that agree in everything one is kept, and the others are counted") {
  Files files(
      "USER_ID,ITEM_ID,TIMESTAMP,DEVICE\n"
      "u1,a,10,x\nu1,a,10,x\nu1,a,10,y\nu1,b,10,x\nu2,a,10,x\nu1,a,20,x\nu1,a,10,x\n");
  const Dataset data = files.read();
  CHECK(history(data, "u1") == Strings{"a@10", "a@10", "b@10", "a@20"});
  CHECK(history(data, "u2") == Strings{"a@10"});
  CHECK(
      contains(said(files), "events.csv: 2 rows are exact duplicates of others and were left out"));
  CHECK_FALSE(contains(said(Files(two_users)), "duplicate"));
}

TEST_CASE("items of two files that do not meet are refused or counted, with the likely cause") {
  const auto told = [](const std::string& items) {
    Files files("USER_ID,ITEM_ID,TIMESTAMP\nu1,7,10\nu1,8,20\nu2,8,30\nu2,x9,40\nu2,00,50\n",
                items);
    const std::string failure = files.failure();
    return failure.empty() ? said(files) : failure;
  };
  CHECK(contains(told("ITEM_ID\n7.0\n8.0\n"),
                 "items.csv: none of its 2 items occurs in the interactions ('7.0' here, '7' "
                 "there); 2 more would where a fraction of zero ('.0') is left out"));
  CHECK(contains(told("ITEM_ID\n007\n008\n"), "; 2 more would where leading zeros are left out"));
  CHECK(contains(told("ITEM_ID\nX9\n"), "; 1 more would where capitals are small letters"));
  CHECK(contains(told("ITEM_ID\nu1\nu2\n"), "; 2 of them stand in USER_ID: are the two columns"));
  CHECK(told("ITEM_ID\nq\n") ==
        "items.csv: none of its 1 item occurs in the interactions ('q' here, '7' there)");
  const std::string some = told("ITEM_ID\n7\n8\nq\n");
  CHECK(contains(some, "items.csv: 3 items, 2 of them in the interactions; "));
  CHECK(contains(some,
                 "items.csv: 2 of 4 items of the interactions (2 interactions) have no row here"));
  CHECK(contains(some, "items.csv: 1 item without interactions and without CREATION_TIMESTAMP"));
  CHECK_FALSE(contains(told("ITEM_ID\n7\n8\nx9\n00\n"), "no row"));
  CHECK(contains(told("ITEM_ID\n\"7 \"\n\" 8\"\nx9\n00\n"),
                 "items.csv: 2 ids with blanks around them were taken without the blanks"));
}

TEST_CASE("files in each other's place are named for what they are") {
  CHECK(contains(Files("ITEM_ID,GENRE\na,x\n").failure(), "an items file, which goes to --items"));
  CHECK(contains(Files(two_users, "USER_ID,AGE\nu1,3\n").failure(),
                 "items.csv: has USER_ID but no ITEM_ID: a users file"));
  CHECK(contains(Files(two_users, two_users).failure(),
                 "items.csv: has USER_ID and TIMESTAMP: interactions"));
  CHECK(Files(two_users, "ITEM_ID,GENRE\n").failure() ==
        "items.csv: holds no items but a header row alone");
}

TEST_CASE("what is not learnt from in the interactions is said, low values with their count") {
  Files files(
      "userId,ITEM_ID,TIMESTAMP,EVENT_TYPE,rating,IMPRESSION,,DEVICE\n"
      "u1,a,10,v,5,a|b,0,x\nu1,b,20,v,1,b,1,x\nu2,b,30,w,2,,2,x\nu2,c,40,v,4,,3,x\n");
  const std::string all = said(files);
  CHECK(
      contains(all,
               "events.csv: 4 interactions of 2 users with 3 items; userId (USER_ID, id), ITEM_ID "
               "(id), TIMESTAMP (time, Unix seconds, 1970-01-01 to 1970-01-01), EVENT_TYPE (event "
               "type, 2 values), rating (EVENT_VALUE, left out: all events count alike, whatever "
               "their value; --event-value-threshold keeps those from a value on), IMPRESSION "
               "(left out: impressions are learnt from at run time, not in training), column 7 "
               "(left out: a column without a name), DEVICE (left out: contextual metadata is not "
               "learnt from)\n"));
  CHECK(contains(all,
                 "2 of 4 interactions have an EVENT_VALUE in the lower half of 1 to 5 and count as "
                 "wishes like all others; --event-value-threshold 3 leaves them out"));
  files.options.event_value_threshold = 2;
  CHECK(contains(said(files), "1 row below the threshold of EVENT_VALUE or without one were left"));
  CHECK(files.read().interactions == 3);
  files.options.event_value_threshold = 9;
  CHECK(contains(files.failure(), "whose EVENT_VALUE reaches the threshold (4 rows below it"));
  files.options.event_value_threshold.reset();
  files.options.event_type_filter = "v";
  CHECK(contains(said(files), "1 row of other event types than 'v' were left out"));
  Files without(two_users);
  without.options.event_value_threshold = 2;
  CHECK(without.failure() == "events.csv:1: no column EVENT_VALUE for --event-value-threshold");
  CHECK(contains(said(Files(std::string(header) + "u1,a,5\nu1,b,5\nu2,b,5\n")),
                 "events.csv: every TIMESTAMP is 5"));
  CHECK(contains(said(Files(std::string(header) + "u1,a,5.5\nu1,b,6\nu2,b,7.0\n")),
                 "fractions of a second were dropped from 1 TIMESTAMP"));
}
