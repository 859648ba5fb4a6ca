// What a recommender makes of a folder whose files were damaged, cut short, mixed up or taken away,
// and of such blobs: it refuses them by name, or goes on without the torn end and says so.
#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace state_damage_tests {

namespace fs = std::filesystem;
namespace pz = personalize;

namespace {

constexpr std::int64_t now = 1'700'000'000;
const std::string first_state = "state-000000000001.pzs",
                  first_journal = "journal-000000000001.pzj",
                  second_state = "state-000000000002.pzs",
                  second_journal = "journal-000000000002.pzj";

const std::shared_ptr<const pz::Model>& model() {
  static const auto made = small_model::model({.items = 6, .dimension = 3, .hidden = 2});
  return made;
}

// So that a folder is opened in some 100 us.
pz::RecommenderOptions options() {
  pz::RecommenderOptions options;
  options.clock = [] { return now; };
  options.updates = pz::Updates::by_caller;
  options.recommendation_key = {{1, 2}};
  options.slate_log_bytes = options.context_bytes = 1 << 16;
  options.remembered_slates = 8;
  options.remembered_event_ids = 64;
  options.durability = pz::Durability::none;
  return options;
}

pz::Result<pz::Recommender> open(const std::string& folder) {
  return pz::Recommender::open(folder, model(), options());
}
pz::Recommender opened(const std::string& folder) {
  auto shop = open(folder);
  REQUIRE_MESSAGE(shop, (shop ? "" : shop.error().message));
  return std::move(*shop);
}

// The files of a folder, by name.
using Image = std::map<std::string, std::string>;
Image image_of(const std::string& folder) {
  Image image;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().filename() != "lock")
      image[entry.path().filename().string()] = bytes_of(entry.path().string());
  return image;
}
void lay_down(const Image& image, const std::string& folder) {
  fs::remove_all(folder);
  fs::create_directory(folder);
  for (const auto& [name, bytes] : image)
    std::ofstream(folder + "/" + name, std::ios::binary) << bytes;
}

// What is known of all users and items, bit for bit.
std::string contents_of(pz::Recommender& shop) {
  std::string text =
      std::to_string(shop.user_count()) + " " + std::to_string(shop.item_count()) + "\n";
  const auto add = [&](auto value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  for (const char* user : {"u0", "u1", "u2", "imported"}) {
    for (const char* item : {"i0", "i1", "i2", "i3", "i4", "i5", "new"}) {
      const auto parts = shop.explain({.user = user}, item);
      if (!parts) {
        text += parts.error().message;
        continue;
      }
      for (const float part : {parts->score, parts->relevance, parts->quality, parts->taste,
                               parts->discount, parts->uncertainty})
        add(part);
      add(parts->positive);
      add(parts->expected);
    }
    const auto blob = shop.export_user(user);
    REQUIRE(blob);
    text.append(reinterpret_cast<const char*>(blob->data()), blob->size());
  }
  return text;
}

// Some calls, each of which writes one record.
void call(pz::Recommender& shop, int number, std::vector<std::string>& slates) {
  const std::string user = "u" + std::to_string(number % 3), event = "e" + std::to_string(number);
  const std::string item = "i" + std::to_string(number * 5 % 6);
  switch (number % 7) {
    case 0: {
      const auto slate = shop.recommend({.user = user, .count = 3});
      REQUIRE(slate);
      slates.push_back(slate->id);
      return;
    }
    case 3:
      REQUIRE(shop.record_impression(
          {.user = "u" + std::to_string((number - 3) % 3), .recommendation_id = slates.back()}));
      return;
    case 5:
      REQUIRE(shop.put_item({.item = "new", .fields = {{"GENRE", "bow"}}}));
      return;
    default:
      REQUIRE(shop.record({.user = user, .item = item, .event_type = "click", .event_id = event}));
  }
}

struct Known {
  Image image;
  // What was known when the journal had so many bytes.
  std::map<std::size_t, std::string> by_size;
  std::string contents;  // of all
};

// A folder as it is left by a process that is killed: a state, and some calls in the journal.
Known make(const std::string& folder) {
  Known known;
  std::vector<std::string> slates;
  auto shop = opened(folder);
  // Whoever asks leaves a record of it: a twin without a folder is asked.
  auto twin = pz::Recommender::create(model(), options());
  REQUIRE(twin);
  int number = 0;
  const auto call_both = [&] {
    auto same = slates;
    call(shop, number, slates);
    call(*twin, number, same);
    REQUIRE(same == slates);
    ++number;
  };
  while (number < 9) call_both();
  REQUIRE(shop.update());
  REQUIRE(twin->update());
  REQUIRE(shop.save());
  const std::string journal = folder + "/" + second_journal;
  known.by_size[fs::file_size(journal)] = contents_of(*twin);
  while (number < 21) {
    call_both();
    known.by_size[fs::file_size(journal)] = known.contents = contents_of(*twin);
  }
  known.image = image_of(folder);
  REQUIRE(known.image.size() == 2);
  return known;
}

bool names(const pz::Error& error, const std::string& file) {
  return error.message.find(file) != std::string::npos;
}

// Of many equal checks only what fails is told.
struct Tally {
  std::size_t tried = 0;
  std::map<std::string, std::size_t> failed;  // and the first place where it did
  void check(bool kept, const std::string& promise, std::size_t place) {
    ++tried;
    if (!kept) failed.try_emplace(promise, place);
  }
  ~Tally() {
    CHECK(tried > 0);
    for (const auto& [promise, place] : failed) FAIL_CHECK(promise << ": at byte " << place);
  }
};

constexpr std::array<char, 2> flips{0x01, static_cast<char>(0xff)};

}  // namespace

TEST_CASE("a state file of which any byte is damaged is refused by name, and nothing is changed") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  Image image = known.image;
  std::string& bytes = image[second_state];
  lay_down(image, damaged);
  const std::string path = damaged + "/" + second_state;
  Tally tally;
  for (std::size_t place = 0; place < bytes.size(); ++place)
    for (const char flip : flips) {
      std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
      file.seekp(static_cast<std::streamoff>(place));
      file.put(static_cast<char>(bytes[place] ^ flip));
      file.flush();
      const auto shop = open(damaged);
      tally.check(!shop, "it is refused", place);
      if (!shop) tally.check(names(shop.error(), second_state), "the error names the file", place);
      file.seekp(static_cast<std::streamoff>(place));
      file.put(bytes[place]);
    }
  CHECK(image_of(damaged) == known.image);
  auto shop = opened(damaged);
  CHECK(contents_of(shop) == known.contents);
}

TEST_CASE("a state file that was cut short anywhere, or goes on, is refused by name") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  Image image = known.image;
  const std::string bytes = image[second_state], path = damaged + "/" + second_state;
  lay_down(image, damaged);
  Tally tally;
  const auto check = [&](std::size_t place) {
    const auto shop = open(damaged);
    tally.check(!shop, "it is refused", place);
    if (!shop) tally.check(names(shop.error(), second_state), "the error names the file", place);
  };
  std::ofstream(path, std::ios::binary | std::ios::app) << '\0';
  check(bytes.size() + 1);
  for (std::size_t size = bytes.size(); size-- > 0;) {
    fs::resize_file(path, size);
    check(size);
  }
  image[second_state].clear();
  CHECK(image_of(damaged) == image);
}

TEST_CASE(
    "a journal of which any byte is damaged is refused, or loses its last record and says so") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  const std::string& bytes = known.image.at(second_journal);
  const std::string path = damaged + "/" + second_journal;
  REQUIRE(known.by_size.size() == 13);
  REQUIRE(known.by_size.rbegin()->first == bytes.size());
  const std::size_t last = std::next(known.by_size.rbegin())->first;  // where the last one begins
  lay_down(known.image, damaged);
  Tally tally;
  for (std::size_t place = 0; place < bytes.size(); ++place)
    for (const char flip : flips) {
      {
        std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
        file.seekp(static_cast<std::streamoff>(place));
        file.put(static_cast<char>(bytes[place] ^ flip));
      }
      auto shop = open(damaged);
      tally.check(shop.has_value() == (place >= last),
                  "it is refused but where the last record is damaged", place);
      if (shop) {
        tally.check(shop->recovery().torn == bytes.size() - last && !shop->recovery().clean,
                    "it is told how many bytes were torn", place);
        tally.check(contents_of(*shop) == known.by_size.at(last), "all before it is there", place);
        lay_down(known.image, damaged);
        continue;
      }
      tally.check(names(shop.error(), second_journal), "the error names the file", place);
      if (place >= 64) {
        std::size_t begin = 0;  // of the record
        for (const auto& [size, contents] : known.by_size)
          if (size <= place) begin = size;
        tally.check(shop.error().message.find("damaged at byte " + std::to_string(begin)) !=
                        std::string::npos,
                    "the error names the place", place);
      }
      std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
      file.seekp(static_cast<std::streamoff>(place));
      file.put(bytes[place]);
    }
  CHECK(image_of(damaged) == known.image);
}

TEST_CASE(
    "of a journal that was cut short anywhere all whole records count, and the rest is told") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  const std::string& bytes = known.image.at(second_journal);
  const std::string path = damaged + "/" + second_journal;
  Tally tally;
  for (std::size_t size = 0; size <= bytes.size(); ++size) {
    lay_down(known.image, damaged);
    fs::resize_file(path, size);
    auto shop = open(damaged);
    tally.check(shop.has_value() == (size >= 64), "it is refused without its header", size);
    if (!shop) {
      tally.check(names(shop.error(), second_journal), "the error names the file", size);
      continue;
    }
    const auto whole = std::prev(known.by_size.upper_bound(size));
    tally.check(shop->recovery().torn == size - whole->first && !shop->recovery().clean,
                "it is told how many bytes were torn", size);
    tally.check(fs::file_size(path) == whole->first, "the torn end is cut off", size);
    tally.check(contents_of(*shop) == whole->second, "all whole records count", size);
    // And it goes on behind them.
    if (size % 16 != 0) continue;
    tally.check(shop->record({.user = "u0", .item = "i3", .event_id = "later"}).has_value(),
                "events are recorded", size);
    const std::string contents = contents_of(*shop);
    const Image image = image_of(damaged);
    lay_down(image, folder.file("again"));
    auto again = open(folder.file("again"));
    tally.check(again && again->recovery().torn == 0 && contents_of(*again) == contents,
                "what comes after a torn end is kept", size);
  }
}

TEST_CASE(
    "bytes that stand behind a journal's last record are cut off, records of others as well") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound")), other = make(folder.file("other"));
  const std::string& bytes = known.image.at(second_journal);
  for (const std::string& behind :
       {std::string(1, '\0'), std::string(4096, '\0'), std::string(70'000, '\xff'),
        other.image.at(second_journal).substr(64), other.image.at(second_journal)}) {
    Image image = known.image;
    image[second_journal] += behind;
    lay_down(image, damaged);
    auto shop = opened(damaged);
    CHECK(shop.recovery().torn == behind.size());
    CHECK(fs::file_size(damaged + "/" + second_journal) == bytes.size());
    CHECK(contents_of(shop) == known.contents);
  }
}

TEST_CASE("records that were taken out of a journal, or stand in another order, are missed") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  std::vector<std::size_t> ends;
  for (const auto& [size, contents] : known.by_size) ends.push_back(size);
  for (std::size_t r = 0; r + 2 < ends.size(); ++r) {
    CAPTURE(r);
    const std::string& bytes = known.image.at(second_journal);
    const std::string one = bytes.substr(ends[r], ends[r + 1] - ends[r]),
                      two = bytes.substr(ends[r + 1], ends[r + 2] - ends[r + 1]);
    for (const std::string& instead : {std::string(), two + one, one + one + two}) {
      Image image = known.image;
      image[second_journal] = bytes.substr(0, ends[r]) + instead;
      if (instead.empty()) image[second_journal] += two;
      image[second_journal] += bytes.substr(ends[r + 2]);
      lay_down(image, damaged);
      const auto shop = open(damaged);
      REQUIRE_FALSE(shop);
      CHECK(shop.error().code == pz::Errc::corrupt);
      CHECK(names(shop.error(), second_journal));
      CHECK(image_of(damaged) == image);
    }
  }
}

TEST_CASE("files that are missing, or of another folder, number or kind, are refused by name") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound")), other = make(folder.file("other"));
  const std::string state = known.image.at(second_state), journal = known.image.at(second_journal);
  const std::string third_journal = "journal-000000000003.pzj",
                    third_state = "state-000000000003.pzs";
  struct Case {
    const char* name;
    Image image;
    std::string named;
  };
  const std::vector<Case> cases{
      {"a journal without its state", {{second_journal, journal}}, second_journal},
      {"a state without its journal", {{second_state, state}}, second_journal},
      {"an empty state", {{second_state, ""}, {second_journal, journal}}, second_state},
      {"an empty journal", {{second_state, state}, {second_journal, ""}}, second_journal},
      {"another folder's journal",
       {{second_state, state}, {second_journal, other.image.at(second_journal)}},
       second_journal},
      {"another folder's state",
       {{second_state, other.image.at(second_state)}, {second_journal, journal}},
       second_journal},
      {"a journal in the place of a state",
       {{second_state, journal}, {second_journal, journal}},
       second_state},
      {"a state in the place of a journal",
       {{second_state, state}, {second_journal, state}},
       second_journal},
      {"a state that was renamed", {{first_state, state}, {first_journal, journal}}, first_state},
      {"a journal that was renamed",
       {{second_state, state}, {third_journal, journal}},
       second_journal},
      {"a journal that stands there twice",
       {{second_state, state}, {second_journal, journal}, {third_journal, journal}},
       third_journal},
      {"a later state that is no state",
       {{second_state, state},
        {second_journal, journal},
        {third_state, "x"},
        {third_journal, journal}},
       third_state},
      {"a later state without a journal",
       {{second_state, state}, {second_journal, journal}, {third_state, state}},
       third_journal},
  };
  for (const Case& c : cases) {
    CAPTURE(c.name);
    lay_down(c.image, damaged);
    const auto shop = open(damaged);
    REQUIRE_FALSE(shop);
    CHECK_MESSAGE(names(shop.error(), damaged + "/" + c.named), shop.error().message);
    CHECK(image_of(damaged) == c.image);
  }
}

TEST_CASE("a folder in the place of a file, and a file in the place of the folder, are refused") {
  const TemporaryFolder folder;
  const std::string damaged = folder.file("damaged");
  const Known known = make(folder.file("sound"));
  for (const std::string& name : {second_state, second_journal, std::string("lock")}) {
    CAPTURE(name);
    lay_down(known.image, damaged);
    fs::remove(damaged + "/" + name);
    fs::create_directory(damaged + "/" + name);
    const auto shop = open(damaged);
    REQUIRE_FALSE(shop);
    CHECK_MESSAGE(names(shop.error(), damaged + "/" + name), shop.error().message);
  }
  const std::string file = folder.write("file", "text");
  const auto shop = open(file);
  REQUIRE_FALSE(shop);
  CHECK_MESSAGE(names(shop.error(), file), shop.error().message);
  CHECK(bytes_of(file) == "text");
}

TEST_CASE("what else lies in a folder is left alone, but for parts of files that were being made") {
  const TemporaryFolder folder;
  const std::string mixed = folder.file("mixed");
  const Known known = make(folder.file("sound"));
  const Image strange{{"notes.txt", "text"},
                      {"state-2.pzs", "x"},
                      {"state-00000000000x.pzs", "x"},
                      {"journal-0000000000002.pzj", "x"},
                      {second_state + ".old", "x"}};
  Image image = known.image;
  image.insert(strange.begin(), strange.end());
  image[second_state + ".0123456789abcdef.part"] = known.image.at(second_state).substr(0, 100);
  lay_down(image, mixed);
  auto shop = opened(mixed);
  image.erase(second_state + ".0123456789abcdef.part");
  CHECK(image_of(mixed) == image);
  CHECK(contents_of(shop) == known.contents);
}

TEST_CASE("of two states the later one counts, and files that only the earlier one needs go") {
  const TemporaryFolder folder;
  const std::string both = folder.file("both");
  const std::string first = folder.file("first");
  Image before, between;
  std::string contents;
  {
    std::vector<std::string> slates;
    auto shop = opened(first);
    for (int number = 0; number < 9; ++number) call(shop, number, slates);
    before = image_of(first);
    REQUIRE(shop.save());
    between = image_of(first);
    contents = contents_of(shop);
  }
  Image image = before;
  image.insert(between.begin(), between.end());
  REQUIRE(image.size() == 4);
  lay_down(image, both);
  {
    auto shop = opened(both);
    CHECK(image_of(both) == between);
    CHECK(contents_of(shop) == contents);
  }
  // As a crash leaves it where the later state was not written yet.
  image = before;
  image[second_journal] = between.at(second_journal);
  lay_down(image, both);
  {
    auto shop = opened(both);
    CHECK(contents_of(shop) == contents);
  }
  // Or where the later journal was only begun.
  for (const std::size_t size : {0u, 1u, 63u}) {
    image[second_journal] = between.at(second_journal).substr(0, size);
    lay_down(image, both);
    auto shop = opened(both);
    CHECK(image_of(both).size() == 2);
    CHECK(contents_of(shop) == contents);
  }
  // A system that lost power may leave zeros.
  image[second_journal] = std::string(64, '\0');
  lay_down(image, both);
  auto shop = opened(both);
  CHECK(contents_of(shop) == contents);
}

TEST_CASE("a user's blob of which any byte is damaged, or that was cut short, is refused") {
  auto shop = pz::Recommender::create(model(), options());
  REQUIRE(shop);
  for (const std::size_t events : {1u, 200u})
    for (std::size_t e = 0; e < events; ++e)
      REQUIRE(shop->record({.user = events == 1 ? "short" : "long",
                            .item = "i" + std::to_string(e % 6),
                            .event_type = "view",
                            .timestamp = now - 1000 + static_cast<std::int64_t>(e)}));
  Tally tally;
  for (const char* user : {"short", "long"}) {
    const auto blob = shop->export_user(user);
    REQUIRE(blob);
    auto other = pz::Recommender::create(model(), options());
    REQUIRE(other);
    for (std::size_t place = 0; place < blob->size(); ++place) {
      for (const char flip : flips) {
        auto damaged = *blob;
        damaged[place] ^= static_cast<std::byte>(flip);
        const auto report = other->import_user(damaged);
        tally.check(!report && !report.error().message.empty(), "it is refused", place);
      }
      const auto cut = other->import_user(std::span(*blob).first(place));
      tally.check(!cut && !cut.error().message.empty(), "it is refused where it is cut", place);
    }
    auto longer = *blob;
    longer.push_back(std::byte{0});
    CHECK_FALSE(other->import_user(longer));
    CHECK(other->user_count() == 0);
    REQUIRE(other->import_user(*blob));
    for (std::size_t e = 0; e < 6; ++e) {
      const pz::Request request{.user = user};
      const auto item = "i" + std::to_string(e);
      CHECK(other->explain(request, item)->score == shop->explain(request, item)->score);
    }
  }
}

}  // namespace state_damage_tests
