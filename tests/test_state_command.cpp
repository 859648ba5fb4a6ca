// What `personalize state` says of folders, what it saves of damaged ones, and the events that it
// exports.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "random_calls.hpp"
#include "refusal.hpp"
#include "remembered.hpp"
#include "small_model.hpp"
#include "state/contents.hpp"
#include "state/export.hpp"
#include "state/folder.hpp"
#include "state/repair.hpp"
#include "state/report.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace state_command_tests {

namespace pz = personalize;
namespace fs = std::filesystem;
using namespace personalize::tools;
using random_calls::Calls;
using random_calls::Clock;

namespace {

// Whose users all stay, with all of their events.
pz::RecommenderOptions all_remembered(const Clock& clock) {
  auto options = random_calls::options(clock);
  options.history_length = 65535;
  options.max_users = 1 << 20;
  options.user_bytes = 1 << 28;
  return options;
}

pz::Recommender open(const std::string& folder, const pz::RecommenderOptions& options) {
  auto shop = pz::Recommender::open(folder, small_model::model(), options);
  if (!shop) FAIL(shop.error().message);
  return std::move(*shop);
}

// USER_ID and what follows, sorted by user; the events of one stay in their order.
std::vector<std::string> rows_of(const std::string& path) {
  std::ifstream in(path);
  std::vector<std::string> rows;
  for (std::string line; std::getline(in, line);) rows.push_back(line);
  REQUIRE(!rows.empty());
  CHECK(rows[0] == "USER_ID,ITEM_ID,EVENT_TYPE,TIMESTAMP");
  rows.erase(rows.begin());
  std::stable_sort(rows.begin(), rows.end(), [](const std::string& a, const std::string& b) {
    return a.substr(0, a.find(',')) < b.substr(0, b.find(','));
  });
  return rows;
}

// The same by what export_user says.
std::vector<std::string> rows_of(const pz::Recommender& shop) {
  std::vector<std::string> rows;
  const auto add = [&](const std::string& user, const std::string& session) {
    for (const std::string& event : remembered(shop, user, session))
      rows.push_back((user.empty() ? "visitor " + session : user) + ',' + event);
  };
  for (int u = 0; u < 500; ++u) add("u" + std::to_string(u), {});
  for (int s = 0; s < 50; ++s) add({}, "s" + std::to_string(s));
  std::stable_sort(rows.begin(), rows.end(), [](const std::string& a, const std::string& b) {
    return a.substr(0, a.find(',')) < b.substr(0, b.find(','));
  });
  return rows;
}

std::vector<std::string> exported(const std::string& folder, const TemporaryFolder& to) {
  (void)export_state(
      {.path = folder, .output = to.file("events.csv"), .session_prefix = std::string("visitor ")});
  return rows_of(to.file("events.csv"));
}

std::string journal(const std::string& folder, std::uint64_t number) {
  return folder + "/" + pz::detail::Keeper::journal_name(number);
}
std::string state(const std::string& folder, std::uint64_t number) {
  return folder + "/" + pz::detail::Keeper::state_name(number);
}

void flip(const std::string& path, std::uint64_t at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const char byte = static_cast<char>(file.get() ^ 0x10);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(byte);
  REQUIRE(file.flush());
}

std::map<std::string, std::string> files_of(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    files[entry.path().filename().string()] = bytes_of(entry.path().string());
  return files;
}

// A folder with a state, `calls` calls after it and no end in peace.
std::string make_folder(const TemporaryFolder& folder, int calls, const Clock& clock) {
  auto shop = open(folder.file("live"), all_remembered(clock));
  Calls made(7, clock);
  std::vector<std::string> said;
  for (int c = 0; c < 400; ++c) made.call({&shop}, said);
  REQUIRE(shop.save());
  for (int c = 0; c < calls; ++c) made.call({&shop}, said);
  copy_folder(folder.file("live"), folder.file("crashed"));
  return folder.file("crashed");
}

}  // namespace

TEST_CASE("what is exported is what a recommender remembers, the journal's events included") {
  for (const std::uint64_t seed : {1u, 2u, 3u, 4u}) {
    CAPTURE(seed);
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    auto shop = open(folder.file("a"), all_remembered(clock));
    Calls calls(seed, clock);
    std::vector<std::string> said;
    for (int round = 0; round < 6; ++round) {
      for (int c = 0; c < 500; ++c) calls.call({&shop}, said);
      const auto before = files_of(folder.file("a"));
      const auto rows = exported(folder.file("a"), folder);  // while it is open
      CHECK(rows == rows_of(shop));
      CHECK(rows.size() > 40);
      CHECK(files_of(folder.file("a")) == before);
      if (round % 2 == 1) REQUIRE(shop.save());
    }
  }
}

TEST_CASE(
    "what is exported after a swap that no state was saved of is what a recommender remembers") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto shop = open(folder.file("a"), all_remembered(clock));
  Calls calls(5, clock);
  std::vector<std::string> said;
  for (int c = 0; c < 600; ++c) calls.call({&shop}, said);
  // Where no file can be put then.
  for (const std::uint64_t n : {2u, 3u}) fs::create_directory(state(folder.file("a"), n));
  for (const std::uint64_t seed : {2u, 3u}) {
    const auto swapped = shop.swap(small_model::model({.items = 60 + seed, .seed = seed}));
    REQUIRE(swapped);
    CHECK(swapped->save_error);
    for (const char* item : {"i58", "i61", "i62"})
      REQUIRE(
          shop.record({.user = "u1", .item = item, .event_type = "click", .timestamp = *clock}));
    for (int c = 0; c < 600; ++c) calls.call({&shop}, said);
    copy_folder(folder.file("a"), folder.file("b"));
    for (const std::uint64_t n : {2u, 3u}) fs::remove(state(folder.file("b"), n));
    CHECK(exported(folder.file("b"), folder) == rows_of(shop));
  }
}

TEST_CASE("events on items that wait for an update are left out of what is exported, and counted") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = all_remembered(clock);
  options.updates = pz::Updates::by_caller;
  auto shop = open(folder.file("a"), options);
  const auto record = [&](const char* item) {
    REQUIRE(shop.record({.user = "u1", .item = item, .event_type = "click", .timestamp = *clock}));
  };
  const auto left_out = [&]() -> std::string {
    const auto says = export_state({.path = folder.file("a"), .output = folder.file("out.csv")});
    return says.size() == 1 ? "none" : says.at(1).substr(0, says.at(1).find(" they"));
  };
  record("i1");
  CHECK(left_out() == "none");
  for (const char* item : {"new1", "new2"}) REQUIRE(shop.put_item({.item = item}));
  for (const char* item : {"new1", "new1", "new2"}) record(item);
  CHECK(left_out() == "warning: 3 events were left out:");
  REQUIRE(shop.save());
  CHECK(left_out() == "warning: 3 events were left out:");
  record("new2");
  CHECK(left_out() == "warning: 4 events were left out:");
  REQUIRE(shop.remove_item("new1"));
  REQUIRE(shop.update(*clock));
  record("i2");  // and with it all that came before is handed to the system
  CHECK(left_out() == "none");
  CHECK(rows_of(folder.file("out.csv")).size() == 4);
}

TEST_CASE("a user who is imported replaces one of the same id in what is exported") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto shop = open(folder.file("a"), all_remembered(clock));
  auto other = pz::Recommender::create(small_model::model(), all_remembered(clock));
  REQUIRE(other);
  const auto record = [&](pz::Recommender& in, const char* item) {
    REQUIRE(in.record({.user = "u1", .item = item, .event_type = "click", .timestamp = *clock}));
  };
  record(shop, "i1");
  REQUIRE(shop.save());
  record(shop, "i2");
  record(*other, "i3");
  const auto blob = other->export_user("u1");
  REQUIRE(blob);
  REQUIRE(shop.import_user(*blob));
  record(shop, "i4");
  const auto rows = exported(folder.file("a"), folder);
  CHECK(rows == rows_of(shop));
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].starts_with("u1,i3,"));
}

TEST_CASE(
    "JSON lines name users and sessions, and CSV takes sessions along where they get a prefix") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto shop = open(folder.file("a"), all_remembered(clock));
  REQUIRE(shop.record({.user = "u, \"1\"", .item = "i1", .timestamp = *clock}));
  REQUIRE(shop.record({.session = "s1", .item = "i2", .timestamp = *clock}));
  (void)export_state({.path = folder.file("a"), .output = folder.file("a.csv")});
  CHECK(rows_of(folder.file("a.csv")) ==
        std::vector<std::string>{"\"u, \"\"1\"\"\",i1,,1700000000"});
  (void)export_state({.path = folder.file("a"),
                      .output = folder.file("a.csv"),
                      .session_prefix = {},
                      .unknown_type = "none"});
  CHECK(rows_of(folder.file("a.csv"))[0].ends_with(",i1,none,1700000000"));
  (void)export_state({.path = folder.file("a"),
                      .output = folder.file("a.jsonl"),
                      .format = EventFormat::jsonl,
                      .session_prefix = {}});
  std::ifstream in(folder.file("a.jsonl"));
  std::map<std::string, std::string> items;
  for (std::string line; std::getline(in, line);) {
    const auto one = nlohmann::json::parse(line);
    items[one.contains("user") ? one["user"] : one["session"]] = one["events"][0]["item"];
    CHECK(one["events"][0]["timestamp"] == 1700000000);
  }
  CHECK(items == std::map<std::string, std::string>{{"u, \"1\"", "i1"}, {"s1", "i2"}});
}

TEST_CASE("inspect counts what there is") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const auto options = random_calls::options(clock);
  {
    auto shop = open(folder.file("a"), options);
    Calls calls(5, clock);
    std::vector<std::string> said;
    for (int c = 0; c < 3000; ++c) calls.call({&shop}, said);
    REQUIRE(shop.save());
    const auto says = inspect_state(folder.file("a")).says;
    const auto& of = says["state"];
    CHECK(of["users"].get<std::size_t>() + of["sessions"].get<std::size_t>() == shop.user_count());
    CHECK(of["items"] == shop.item_count());
    CHECK(of["saved_at"] == *clock);
    CHECK(of["with_events"] > 100);
    CHECK(of["with_state"] > 100);
    CHECK(of["slates"] > 50);
    CHECK(of["context_rows"] > 20);
    CHECK(of["event_ids"] > 50);
    CHECK(of["counters"]["interactions"] > 100.0);
    CHECK(of["event_types"].size() == shop.model()->parts().event_types.size());
    CHECK(says["ended_in_peace"] == false);
    CHECK(says["journals"][0]["records"] == 0);
    for (int c = 0; c < 100; ++c) calls.call({&shop}, said);
  }
  const auto report = inspect_state(folder.file("a"));
  CHECK(report.failure.empty());
  CHECK(report.says["ended_in_peace"] == true);
  CHECK(report.says["journals"][0]["by_type"]["close"] == 1);
  CHECK(report.says["files"].size() == 2);
  CHECK(inspect_state(state(folder.file("a"), 2)).says["state"]["number"] == 2);
  CHECK(inspect_state(journal(folder.file("a"), 2)).says["journals"][0]["by_type"]["close"] == 1);
}

TEST_CASE("a sound folder is verified, and a repair changes nothing of it") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const std::string crashed = make_folder(folder, 300, clock);
  CHECK(verify_state(crashed).failure.empty());
  const auto before = files_of(crashed);
  CHECK(repair_state({.folder = crashed, .from = {}}).steps.empty());
  CHECK(files_of(crashed) == before);
  // A torn tail is what crashes leave.
  const std::string path = journal(crashed, 2);
  fs::resize_file(path, fs::file_size(path) - 3);
  const auto torn = verify_state(crashed);
  CHECK(torn.failure.empty());
  CHECK(torn.says["files"][1]["says"].get<std::string>().find("was not acknowledged") !=
        std::string::npos);
  CHECK(repair_state({.folder = crashed, .from = {}}).steps.empty());
  (void)open(crashed, all_remembered(clock));
}

TEST_CASE("a bit that is flipped anywhere is found, and of a journal all before it is kept") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const std::string crashed = make_folder(folder, 300, clock), hurt = folder.file("hurt");
  const std::uint64_t size = fs::file_size(journal(crashed, 2));
  const std::uint64_t records =
      inspect_state(crashed).says["journals"][0]["records"].get<std::uint64_t>();
  small_model::Random random(3);
  for (int t = 0; t < 120; ++t) {
    const std::uint64_t at =
        t < 64 ? static_cast<std::uint64_t>(t) : 64 + random.bits() % (size - 64);
    CAPTURE(at);
    copy_folder(crashed, hurt);
    flip(journal(hurt, 2), at);
    const auto found = verify_state(hurt);
    auto opened =
        pz::Recommender::open(folder.file("hurt"), small_model::model(), all_remembered(clock));
    if (opened) {  // of the last record: torn, and no damage
      CHECK(found.failure.empty());
      continue;
    }
    if (opened.error().code == pz::Errc::version) continue;
    CHECK(found.failure.find(journal(hurt, 2)) != std::string::npos);
    const auto damaged = files_of(hurt);
    const auto told = repair_state({.folder = hurt, .from = {}, .dry_run = true});
    CHECK(files_of(hurt) == damaged);
    const auto done = repair_state({.folder = hurt, .from = {}});
    CHECK(done.steps == told.steps);
    CHECK(done.lost_records == told.lost_records);
    CHECK(bytes_of(journal(hurt, 2) + ".damaged") == damaged.at("journal-000000000002.pzj"));
    CHECK(verify_state(hurt).failure.empty());
    const auto again = open(hurt, all_remembered(clock));
    const std::uint64_t kept = again.recovery().records;
    // All but the record that was hit, and those behind it, of which all are counted.
    CHECK(kept + done.lost_records == (at < 64 ? records : records - 1));
    if (at < 64) CHECK(done.lost_bytes == 0);
  }
}

TEST_CASE("a state that is damaged is named, and a copy takes its place") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const std::string crashed = make_folder(folder, 50, clock), hurt = folder.file("hurt");
  std::vector<std::string> want;
  {
    copy_folder(crashed, folder.file("b"));
    auto shop = open(folder.file("b"), all_remembered(clock));
    REQUIRE(shop.save(folder.file("copy.pzs")));
    want = rows_of(shop);
  }
  const std::uint64_t size = fs::file_size(state(crashed, 2));
  small_model::Random random(4);
  for (int t = 0; t < 150; ++t) {
    const std::uint64_t at = t < 64 ? static_cast<std::uint64_t>(t) : random.bits() % size;
    CAPTURE(at);
    copy_folder(crashed, hurt);
    flip(state(hurt, 2), at);
    if (at == 8 || at == 9) continue;  // the version: see below
    CHECK(verify_state(hurt).failure.find(state(hurt, 2)) != std::string::npos);
  }
  const auto damaged = files_of(hurt);
  CHECK(refusal([&] {
          (void)repair_state({.folder = hurt, .from = {}});
        }).find("--from COPY.pzs") != std::string::npos);
  CHECK(files_of(hurt) == damaged);
  CHECK(refusal([&] {
          (void)repair_state({.folder = hurt, .from = state(hurt, 2)});
        }).find("checksum") != std::string::npos);
  const auto done = repair_state({.folder = hurt, .from = folder.file("copy.pzs")});
  CHECK(done.steps.size() == 4);
  CHECK(verify_state(hurt).failure.empty());
  CHECK(bytes_of(state(hurt, 2) + ".damaged") == damaged.at("state-000000000002.pzs"));
  for (int start = 0; start < 3; ++start) {
    auto shop = open(hurt, all_remembered(clock));
    CHECK(rows_of(shop) == want);
    CHECK(exported(hurt, folder) == want);
    REQUIRE(shop.record({.user = "late", .item = "i1", .timestamp = *clock}));
    REQUIRE(shop.forget("late"));
    if (start == 1) REQUIRE(shop.save());
  }
}

TEST_CASE("journals behind one that is damaged or missing move aside") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const std::string crashed = make_folder(folder, 100, clock), hurt = folder.file("hurt");
  // As saves that failed leave it: journals 2, 3 and 4 behind state 2.
  {
    const auto at = inspect_state(crashed).says;
    std::uint64_t next = at["journals"][0]["last_record"].get<std::uint64_t>() + 1;
    for (const std::uint64_t number : {3u, 4u}) {
      pz::detail::JournalHeader header = *pz::detail::peek_journal_header(journal(crashed, 2), {});
      header.number = number;
      header.first_sequence = next;
      auto made = pz::detail::Journal::create(journal(crashed, number), header, {});
      REQUIRE(made);
      for (int r = 0; r < 2; ++r, ++next) {
        pz::Vector<std::byte> payload;
        pz::detail::FieldWriter archive{payload};
        archive(std::string_view("u1"), std::string_view());
        auto room = (*made)->reserve(payload.size());
        room.add(payload);
        (void)(*made)->append(std::move(room), 3);
      }
      REQUIRE((*made)->sync());
    }
  }
  CHECK(verify_state(crashed).failure.empty());
  SUBCASE("damaged") {
    copy_folder(crashed, hurt);
    flip(journal(hurt, 3), 64);
    const auto done = repair_state({.folder = hurt, .from = {}});
    CHECK(done.lost_records == 1 + 2);
    CHECK(fs::exists(journal(hurt, 3) + ".damaged"));
    CHECK(fs::exists(journal(hurt, 4) + ".damaged"));
    CHECK_FALSE(fs::exists(journal(hurt, 4)));
    (void)open(hurt, all_remembered(clock));
  }
  SUBCASE("missing") {
    copy_folder(crashed, hurt);
    fs::remove(journal(hurt, 3));
    CHECK(verify_state(hurt).failure.find("is missing") != std::string::npos);
    CHECK(repair_state({.folder = hurt, .from = {}}).lost_records == 2);
    (void)open(hurt, all_remembered(clock));
  }
  SUBCASE("the first is missing") {
    copy_folder(crashed, hurt);
    fs::remove(journal(hurt, 2));
    CHECK(repair_state({.folder = hurt, .from = {}}).lost_records == 4);
    const auto shop = open(hurt, all_remembered(clock));
    CHECK(shop.recovery().records == 0);
  }
}

TEST_CASE("a folder that a process has open is not repaired") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const auto shop = open(folder.file("a"), all_remembered(clock));
  CHECK(refusal([&] {
          (void)repair_state({.folder = folder.file("a"), .from = {}});
        }).find("has it open") != std::string::npos);
  CHECK(verify_state(folder.file("a")).failure.empty());
}

TEST_CASE("what is no folder of a recommender is named") {
  const TemporaryFolder folder;
  const std::string text = folder.write("text", "something else");
  CHECK(refusal([&] { (void)verify_state(folder.file("none")); }).find("cannot open") !=
        std::string::npos);
  CHECK(refusal([&] { (void)verify_state(text); }).find("neither a state") != std::string::npos);
  CHECK(refusal([&] { (void)inspect_state(folder.path.string()); }).find("holds no state file") !=
        std::string::npos);
  CHECK(refusal([&] {
          (void)repair_state({.folder = folder.file("none"), .from = {}});
        }).find("cannot open the folder") != std::string::npos);
  CHECK_FALSE(fs::exists(folder.file("none")));
}

}  // namespace state_command_tests
