// Folders that are opened with another model than the one that their last process had: what came
// after the last state, by the journal alone, is on the same items as in a state of then.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "random_calls.hpp"
#include "remembered.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace other_model_tests {

namespace fs = std::filesystem;
namespace pz = personalize;

namespace {

using random_calls::Calls;
using random_calls::Clock;
using ModelPointer = std::shared_ptr<const pz::Model>;

constexpr std::uint32_t users = 60;

pz::RecommenderOptions options_of(const Clock& clock) {
  auto options = random_calls::options(clock);
  options.history_length = 1000;
  options.user_bytes = std::uint64_t{1} << 26;
  options.max_users = 1 << 20;
  return options;
}

pz::Recommender open(const std::string& folder, const ModelPointer& model,
                     const pz::RecommenderOptions& options) {
  auto shop = pz::Recommender::open(folder, model, options);
  if (!shop) FAIL(shop.error().message);
  return std::move(*shop);
}

// Items i0 to i<items - 1>, of a seed's own; types: event types beside those of all models.
ModelPointer model_of(std::size_t items, std::uint64_t seed, std::vector<std::string> types = {}) {
  auto parts = small_model::parts({.items = items, .seed = seed});
  for (const std::string& type : types) {
    REQUIRE(parts.event_types.add(type));
    const std::size_t columns = parts.event_type_embedding.columns();
    pz::Matrix more = pz::Matrix::zeros(parts.event_type_embedding.rows() + 1, columns);
    std::vector<float> row(columns);
    for (std::size_t r = 0; r + 1 < more.rows(); ++r) {
      parts.event_type_embedding.row(r, row);
      more.set_row(r, row);
    }
    more.set_row(more.rows() - 1, std::vector<float>(columns, 0.25f));
    parts.event_type_embedding = std::move(more);
  }
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  return *model;
}

// Each event that a user or session remembers, and what is counted of each item, by name.
struct Known {
  std::vector<std::string> events;
  // Positive and expected, of items that are there.
  std::map<std::string, std::array<double, 2>> counts;
  std::vector<std::string> numbered;
};
Known known_of(pz::Recommender& shop) {
  Known known;
  REQUIRE(shop.update());  // what waits comes in
  const auto add = [&](const std::string& user, const std::string& session) {
    for (const std::string& event : remembered(shop, user, session))
      known.events.push_back(user + "," + session + "," + event);
  };
  for (std::uint32_t u = 0; u < users; ++u) add("u" + std::to_string(u), {});
  for (int s = 0; s < 40; ++s) add({}, "s" + std::to_string(s));
  for (int i = 0; i < 80; ++i) {
    const std::string item = "i" + std::to_string(i);
    if (shop.find_item(item)) known.numbered.push_back(item);
    const auto parts = shop.explain({.user = "nobody"}, item);
    if (parts) known.counts[item] = {parts->positive, parts->expected};
  }
  return known;
}

void check_same(const Known& journal, const Known& state) {
  CHECK(journal.events == state.events);
  CHECK(journal.numbered == state.numbered);
  REQUIRE(journal.counts.size() == state.counts.size());
  for (const auto& of_item : state.counts) {
    CAPTURE(of_item.first);
    REQUIRE(journal.counts.contains(of_item.first));
    for (const std::size_t c : {0u, 1u})
      CHECK(journal.counts.at(of_item.first)[c] ==
            doctest::Approx(of_item.second[c]).epsilon(1e-4));
  }
}

// Opens copies of two folders: one has a state of all, and of the other's journal what came after
// its state is told.
void check_same(const TemporaryFolder& folder, const ModelPointer& model,
                const pz::RecommenderOptions& options) {
  copy_folder(folder.file("journal"), folder.file("a"));
  copy_folder(folder.file("state"), folder.file("b"));
  auto by_journal = open(folder.file("a"), model, options),
       by_state = open(folder.file("b"), model, options);
  CHECK(by_journal.recovery().records > 500);
  CHECK(by_state.recovery().records == 0);
  const Known known = known_of(by_state);
  CHECK(known.events.size() > 100);
  check_same(known_of(by_journal), known);
}

}  // namespace

TEST_CASE("what a journal tells is on the same items, whatever model its folder is opened with") {
  const ModelPointer first = model_of(45, 1);
  // Of more items and fewer, some of which were put before; of other types; an update of the first,
  // whose fingerprints it has.
  auto parts = model_of(58, 1)->parts();
  parts.fingerprints = first->fingerprints();
  const auto updated = pz::Model::from_parts(std::move(parts));
  REQUIRE(updated);
  const std::vector<ModelPointer> models{first, model_of(70, 2, {"tap", "hold"}), model_of(30, 3),
                                         model_of(52, 4, {"swipe"}), *updated};
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    const auto options = options_of(clock);
    const std::string live = folder.file("live"), journal = folder.file("journal");
    auto shop = open(live, first, options);
    Calls calls(seed, clock, users);
    std::vector<std::string> said;
    for (int c = 0; c < 300; ++c) calls.call({&shop}, said);
    REQUIRE(shop.save());
    for (int c = 0; c < 1200; ++c) calls.call({&shop}, said);
    copy_folder(live, journal);
    REQUIRE(shop.save());
    copy_folder(live, folder.file("state"));
    for (std::size_t m = 0; m < models.size(); ++m) {
      CAPTURE(seed);
      CAPTURE(m);
      check_same(folder, models[m], options);
    }
  }
}

TEST_CASE("a model that came between a state and a crash numbers what comes after it") {
  const std::vector<ModelPointer> models{model_of(45, 1), model_of(70, 2, {"tap"}),
                                         model_of(52, 3, {"swipe"})};
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    const auto options = options_of(clock);
    const std::string live = folder.file("live"), journal = folder.file("journal");
    auto shop = open(live, models[0], options);
    Calls calls(seed, clock, users);
    std::vector<std::string> said;
    for (int c = 0; c < 300; ++c) calls.call({&shop}, said);
    // Where a folder stands no state file can be put.
    const auto block = [&](const std::string& where) {
      for (int n = 2; n < 9; ++n)
        fs::create_directory(where + "/" + pz::detail::Keeper::state_name(std::uint64_t(n)));
    };
    const auto unblock = [&](const std::string& where) {
      for (int n = 2; n < 9; ++n)
        fs::remove(where + "/" + pz::detail::Keeper::state_name(std::uint64_t(n)));
    };
    block(live);
    for (const std::size_t m : {1u, 2u, 0u, 1u}) {
      const auto swapped = shop.swap(models[m]);
      REQUIRE(swapped);
      CHECK(swapped->save_error);
      for (int i = 60; i < 80; i += 3)  // on items that only some models have
        REQUIRE(shop.record({.user = "u1",
                             .item = "i" + std::to_string(i),
                             .event_type = i % 2 == 0 ? "tap" : "click",
                             .timestamp = *clock}));
      for (int c = 0; c < 400; ++c) calls.call({&shop}, said);
    }
    copy_folder(live, journal);
    unblock(journal);
    unblock(live);
    REQUIRE(shop.save());
    copy_folder(live, folder.file("state"));
    for (std::size_t m = 0; m < models.size(); ++m) {
      CAPTURE(seed);
      CAPTURE(m);
      check_same(folder, models[m], options);
    }
  }
}

TEST_CASE("a folder is opened with less room for what waits, and loses nothing of it") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = options_of(clock);
  auto shop = open(folder.file("live"), model_of(45, 1), options);
  for (int i = 0; i < 20; ++i)
    REQUIRE(shop.put_item({.item = "new" + std::to_string(i), .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop.record({.user = "u1", .item = "new7", .timestamp = *clock}));
  REQUIRE(shop.update());
  for (int i = 0; i < 20; ++i)
    REQUIRE(shop.record({.user = "u2", .item = "new" + std::to_string(i), .timestamp = *clock}));
  REQUIRE(shop.put_item({.item = "newest"}));
  copy_folder(folder.file("live"), folder.file("crashed"));
  options.pending_bytes = 1 << 12;
  auto again = open(folder.file("crashed"), model_of(45, 1), options);
  check_same(known_of(again), known_of(shop));
  REQUIRE(again.update());
  CHECK(again.find_item("newest"));
  CHECK_FALSE(again.put_item({.item = "more", .fields = {{"GENRE", std::string(1 << 12, 'x')}}}));
}

}  // namespace other_model_tests
