// What outlives the process: state files, journals, users as blobs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "exactness.hpp"
#include "random_calls.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace state_tests {

namespace pz = personalize;

namespace {

using random_calls::Calls;
using random_calls::Clock;

pz::Recommender open(const std::string& folder, const pz::RecommenderOptions& options,
                     const std::shared_ptr<const pz::Model>& model = small_model::model()) {
  auto shop = pz::Recommender::open(folder, model, options);
  if (!shop) MESSAGE(shop.error().message);
  REQUIRE(shop);
  return std::move(*shop);
}

pz::Recommender make(const pz::RecommenderOptions& options,
                     const std::shared_ptr<const pz::Model>& model = small_model::model()) {
  auto shop = pz::Recommender::create(model, options);
  REQUIRE(shop);
  return std::move(*shop);
}

}  // namespace

TEST_CASE("a recommender that is opened again says what one says that never ended") {
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    auto options = random_calls::options(clock);
    Calls calls(seed, clock);
    pz::Recommender never = make(options);
    pz::Recommender kept = open(folder.file("a"), options);
    CHECK_FALSE(kept.recovery().found);
    std::vector<std::string> said;
    small_model::Random random(seed);
    for (int round = 0; round < 6; ++round) {
      const std::uint32_t count = 500 + random.below(1500);
      for (std::uint32_t c = 0; c < count; ++c) {
        calls.call({&never, &kept}, said);
        REQUIRE(said[0] == said[1]);
        if (random.below(400) == 0) {
          const auto saved = kept.save();
          REQUIRE(saved);
        }
      }
      const std::string crashed = folder.file("b");
      copy_folder(folder.file("a"), crashed);
      pz::Recommender again = open(crashed, options);
      CHECK(again.recovery().found);
      CHECK_FALSE(again.recovery().clean);
      const std::string all = calls.everything(never);
      CHECK(calls.everything(again) == all);
      CHECK(calls.everything(kept) == all);
      // And goes on alike.
      for (std::uint32_t c = 0; c < 300; ++c) {
        calls.call({&never, &kept, &again}, said);
        REQUIRE(said[0] == said[1]);
        REQUIRE(said[0] == said[2]);
      }
    }
  }
}

TEST_CASE("a state file holds all that there is, and goes on alike") {
  for (const std::uint64_t seed : {11u, 12u}) {
    CAPTURE(seed);
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    auto options = random_calls::options(clock);
    Calls calls(seed, clock);
    pz::Recommender shop = make(options);
    std::vector<std::string> said;
    for (int c = 0; c < 3000; ++c) calls.call({&shop}, said);
    const auto saved = shop.save(folder.file("state.pzs"));
    REQUIRE(saved);
    CHECK(saved->bytes == std::filesystem::file_size(folder.file("state.pzs")));
    auto again = pz::Recommender::restore(folder.file("state.pzs"), small_model::model(), options);
    if (!again) MESSAGE(again.error().message);
    REQUIRE(again);
    CHECK(again->user_count() == shop.user_count());
    CHECK(calls.everything(*again) == calls.everything(shop));
    for (int c = 0; c < 3000; ++c) {
      calls.call({&shop, &*again}, said);
      REQUIRE(said[0] == said[1]);
    }
  }
}

TEST_CASE("a process that ended in peace, or did not, is told of") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  const auto options = random_calls::options(clock);
  {
    pz::Recommender shop = open(folder.file("a"), options);
    REQUIRE(shop.record({.user = "u", .item = "i1"}));
    copy_folder(folder.file("a"), folder.file("killed"));
    const auto second = pz::Recommender::open(folder.file("a"), small_model::model(), options);
    REQUIRE_FALSE(second);
    CHECK(second.error().code == pz::Errc::io);
    CHECK(second.error().message.find("has it open") != std::string::npos);
  }
  CHECK_FALSE(open(folder.file("killed"), options).recovery().clean);
  const pz::Recommender again = open(folder.file("a"), options);
  CHECK(again.recovery().found);
  CHECK(again.recovery().clean);
  CHECK(again.recovery().records == 2);  // the event, and the end
  CHECK(again.recovery().torn == 0);
  CHECK_FALSE(again.recovery().other_model);
  CHECK(again.persistence().durable);
}

TEST_CASE("the key of recommendation ids is kept, and another one is refused") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  options.recommendation_key.reset();
  std::string id;
  {
    pz::Recommender shop = open(folder.file("a"), options);
    REQUIRE(shop.record({.user = "u", .item = "i1"}));
    const auto slate = shop.recommend({.user = "u", .count = 3});
    REQUIRE(slate);
    id = slate->id;
  }
  {
    pz::Recommender shop = open(folder.file("a"), options);
    const auto seen = shop.record_impression({.user = "u", .recommendation_id = id});
    REQUIRE(seen);
    CHECK(*seen == pz::Recorded::learned);
  }
  options.recommendation_key = {{3, 4}};
  const auto refused = pz::Recommender::open(folder.file("a"), small_model::model(), options);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == pz::Errc::invalid_argument);
}

TEST_CASE("a state of one model on another is as if that had been swapped in") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  Calls calls(5, clock);
  pz::Recommender shop = make(options);
  std::vector<std::string> said;
  for (int c = 0; c < 2000; ++c) calls.call({&shop}, said);
  REQUIRE(shop.update());
  REQUIRE(shop.save(folder.file("state.pzs")));
  for (const auto& shape :
       {small_model::Shape{.seed = 9},
        small_model::Shape{.items = 40, .dimension = 12, .hidden = 30, .seed = 3},
        small_model::Shape{.items = 70, .event_types = false, .seed = 4}}) {
    auto other = pz::Model::from_parts(small_model::parts(shape));
    REQUIRE(other);
    auto restored = pz::Recommender::restore(folder.file("state.pzs"), *other, options);
    auto twin = pz::Recommender::restore(folder.file("state.pzs"), small_model::model(), options);
    REQUIRE(restored);
    REQUIRE(twin);
    CHECK(restored->recovery().other_model);
    const auto swapped = twin->swap(*other);
    REQUIRE(swapped);
    CHECK(restored->recovery().states_kept == swapped->states_kept);
    CHECK(restored->recovery().sums_kept == swapped->sums_kept);
    Calls more(6, clock);
    for (int c = 0; c < 500; ++c) {
      more.call({&*restored, &*twin}, said);
      REQUIRE(said[0] == said[1]);
    }
  }
}

TEST_CASE(
    "users who leave memory go to on_evict, and come back by find_user as if they had stayed") {
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  options.history_length = 200;
  options.remembered_event_ids = 1 << 16;
  options.feedback = false;  // what one user does changes nothing for the others
  options.max_users = 64;
  std::map<std::string, std::vector<std::byte>> elsewhere;
  std::size_t gone = 0, found = 0;
  options.on_evict = [&](std::string_view user, std::string_view session,
                         std::span<const std::byte> blob) {
    elsewhere[std::string(user) + "/" + std::string(session)].assign(blob.begin(), blob.end());
    ++gone;
  };
  options.find_user = [&](std::string_view user, std::string_view session,
                          std::vector<std::byte>& blob) {
    const auto kept = elsewhere.find(std::string(user) + "/" + std::string(session));
    if (kept == elsewhere.end()) return false;
    blob = kept->second;
    ++found;
    return true;
  };
  auto with_room = options;
  with_room.max_users = 1 << 20;
  with_room.on_evict = {};
  with_room.find_user = {};
  const TemporaryFolder folder;
  pz::Recommender small = open(folder.file("a"), options), large = make(with_room);
  small_model::Random random(3);
  for (int c = 0; c < 4000; ++c) {
    const std::string id = "u" + std::to_string(random.below(300));
    const std::string item = "i" + std::to_string(random.below(50));
    const bool visitor = random.below(4) == 0;
    const std::string_view none, user = visitor ? none : id, session = visitor ? id : none;
    const std::int64_t time = *clock - random.below(100'000);
    for (pz::Recommender* shop : {&small, &large}) {
      const auto recorded =
          shop->record({.user = user, .session = session, .item = item, .timestamp = time});
      if (!recorded) MESSAGE(recorded.error().message);
      REQUIRE(recorded);
    }
    const auto a = small.recommend({.user = user, .session = session, .count = 5});
    const auto b = large.recommend({.user = user, .session = session, .count = 5});
    REQUIRE(a);
    REQUIRE(b);
    for (std::size_t p = 0; p < 5; ++p) {
      REQUIRE(a->items[p].item == b->items[p].item);
      REQUIRE(a->items[p].score == b->items[p].score);
    }
  }
  CHECK(small.user_count() <= 64);
  CHECK(gone > 1000);
  CHECK(found > 1000);
}

TEST_CASE("a user moves between recommenders as a blob of about a KiB, and is the same there") {
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  options.exploration_weight = 0;
  options.history_length = 200;
  const auto model =
      *pz::Model::from_parts(small_model::parts({.items = 500, .dimension = 64, .hidden = 128}));
  pz::Recommender from = make(options, model), to = make(options, model);
  small_model::Random random(1);
  const auto event = [&](pz::Recommender& shop, std::string_view item) {
    REQUIRE(shop.record({.user = "u", .item = item, .event_type = "view"}));
  };
  for (int e = 0; e < 50; ++e) {
    *clock += random.below(5000);
    event(from, "i" + std::to_string(random.below(500)));
  }
  const auto slate = from.recommend({.user = "u", .count = 20});
  REQUIRE(slate);
  REQUIRE(from.record_impression({.user = "u", .recommendation_id = slate->id}));
  const auto blob = from.export_user("u");
  REQUIRE(blob);
  MESSAGE("a user of 50 events and 20 impressions, hidden 128, d 64: ", blob->size(), " bytes");
  CHECK(blob->size() > 500);
  CHECK(blob->size() < 1700);
  CHECK(from.export_user("nobody")->empty());
  REQUIRE(to.record({.user = "u", .item = "i7"}));  // gives way
  const auto imported = to.import_user(*blob);
  REQUIRE(imported);
  CHECK(imported->user == "u");
  CHECK(imported->session.empty());
  CHECK(imported->events == 50);
  CHECK(imported->events_dropped == 0);
  CHECK(to.user_count() == 1);
  const auto same = [&](pz::Recommender& a, pz::Recommender& b) {
    for (std::uint32_t i = 0; i < 500; i += 17) {
      const std::string item = "i" + std::to_string(i);
      const auto x = a.explain({.user = "u"}, item), y = b.explain({.user = "u"}, item);
      REQUIRE(x);
      REQUIRE(y);
      CHECK(x->relevance == y->relevance);
      CHECK(x->taste == y->taste);
      CHECK(x->discount == y->discount);
    }
  };
  same(from, to);
  for (int e = 0; e < 3; ++e)
    for (pz::Recommender* shop : {&from, &to}) event(*shop, "i" + std::to_string(e));
  same(from, to);
  CHECK(from.export_user("u")->size() == to.export_user("u")->size());

  // Where the model is another one, what it knows of goes along.
  pz::Recommender other = make(
      options, *pz::Model::from_parts(
                   small_model::parts({.items = 100, .dimension = 20, .hidden = 24, .seed = 5})));
  const auto there = other.import_user(*blob);
  REQUIRE(there);
  CHECK(there->events + there->events_dropped == 50);
  CHECK(there->events_dropped > 0);
  CHECK(other.recommend({.user = "u", .count = 1})->items[0].reason == pz::Reason::relevance);
}

TEST_CASE("what earlier versions kept is still read: a folder, and a user's blob") {
  // Written by version 1 of both formats: five events of ann and one of a visitor, a slate for ann,
  // an item put, another removed, an update and an event on the new item; a save; a second slate,
  // an answer to the first one, an event of bob, and the visitor's events made bob's.
  const TemporaryFolder folder;
  std::filesystem::copy("golden/folder_v1", folder.file("a"));
  pz::RecommenderOptions options;
  options.clock = [] { return random_calls::start; };
  options.updates = pz::Updates::by_caller;
  options.update_interval = {};
  options.exploration_weight = 0;
  options.durability = pz::Durability::none;
  options.slate_log_bytes = 1 << 18;
  options.remembered_slates = 256;
  pz::Recommender shop = open(folder.file("a"), options);
  CHECK(shop.recovery().found);
  CHECK(shop.recovery().clean);
  CHECK(shop.recovery().users == 2);
  CHECK(shop.recovery().records == 5);
  CHECK_FALSE(shop.recovery().other_model);
  CHECK(shop.user_count() == 2);
  CHECK(shop.item_count() == 51);
  CHECK(shop.find_item("new") == 50);
  const auto slate = shop.recommend({.user = "ann", .count = 100, .exclude_interacted = true});
  REQUIRE(slate);
  CHECK(slate->items.size() == 43);  // of 51 but the removed one, and seven of ann's own
  for (const pz::Pick& pick : slate->items) CHECK(pick.item != "i40");
  for (const char* event : {"e0", "e1", "e2", "e3", "e4", "e5", "e6"}) {
    const auto again = shop.record({.user = "ann", .item = "i30", .event_id = event});
    REQUIRE(again);
    CHECK(*again == pz::Recorded::duplicate);
  }
  for (const char* id : {"0000000000000001200e3c87a961b61a", "000000000000000271c85fc1c0ff6a71"}) {
    const auto seen = shop.record_impression({.user = "ann", .recommendation_id = id});
    REQUIRE(seen);
    CHECK(*seen == pz::Recorded::learned);
  }
  const auto bob = shop.recommend({.user = "bob", .count = 100, .exclude_interacted = true});
  REQUIRE(bob);
  CHECK(bob->items.size() == 48);  // his own event and the visitor's

  const std::string blob = bytes_of("golden/folder_v1/ann.pzu");
  pz::Recommender other = make(options);
  const auto imported = other.import_user(std::as_bytes(std::span(blob.data(), blob.size())));
  REQUIRE(imported);
  CHECK(imported->user == "ann");
  CHECK(imported->events == 6);
  CHECK(imported->events_dropped == 1);  // on the item that was put
}

TEST_CASE("users who were not used since a swap to vectors of another length come back") {
  const TemporaryFolder folder;
  const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  options.exploration_weight = 0;
  const auto longer = small_model::model({.dimension = 28, .seed = 9});
  std::size_t users = 0;
  {
    pz::Recommender shop = open(folder.file("a"), options);
    for (const char* user : {"u1", "u2", "u3", "u4"}) {
      REQUIRE(shop.record({.user = user, .item = "i1", .event_type = "click"}));
      const auto slate = shop.recommend({.user = user, .count = 5});
      REQUIRE(slate);
      // Moves the user's offset.
      REQUIRE(shop.record({.user = user,
                           .item = slate->items[1].item,
                           .event_type = "click",
                           .recommendation_id = slate->id}));
    }
    users = shop.user_count();
    const auto swapped = shop.swap(longer);
    REQUIRE(swapped);
    REQUIRE_FALSE(swapped->save_error);
  }
  for (int start = 0; start < 2; ++start) {
    pz::Recommender again = open(folder.file("a"), options, longer);
    CHECK(again.user_count() == users);
    const auto slate = again.recommend({.user = start == 0 ? "u1" : "u2", .count = 5});
    REQUIRE(slate);
    CHECK(slate->items[0].reason == pz::Reason::relevance);
    REQUIRE(again.save());
  }
}

TEST_CASE("a user who comes without the events that they had does no harm to the state") {
  const TemporaryFolder folder;
  pz::RecommenderOptions options;
  options.update_interval = {};
  options.recommendation_key = {{1, 2}};
  options.history_length = 5000;
  options.slate_log_bytes = options.context_bytes = 1 << 16;
  // The same model, and items of which only one process knows.
  auto here = open(folder.file("here"), options);
  auto there = make(options);
  for (int n = 0; n < 20; ++n) REQUIRE(there.put_item({.item = "put" + std::to_string(n)}));
  REQUIRE(there.update());
  for (int n = 0; n < 3000; ++n) {
    const std::string item = "put" + std::to_string(n % 20);
    REQUIRE(there.record({.user = "u", .item = item}));
    REQUIRE(there.record({.user = "v", .item = n == 1000 ? "i3" : std::string_view(item)}));
  }
  for (const char* user : {"u", "v"}) {
    const auto blob = there.export_user(user);
    REQUIRE(blob);
    const auto report = here.import_user(*blob);
    REQUIRE(report);
    CHECK(report->events == (user[0] == 'v' ? 1 : 0));
    CHECK(report->events_dropped >= 2999);
    const auto again = here.export_user(user);
    CHECK_MESSAGE(again, (again ? "" : again.error().message));
  }
  REQUIRE(here.save());
  copy_folder(folder.file("here"), folder.file("copy"));
  CHECK(open(folder.file("copy"), options).user_count() == here.user_count());
}

TEST_CASE("in every setting a recommender that is opened after a crash is the one that crashed") {
  for (const auto& setting : exactness::settings()) {
    CAPTURE(std::string(setting.name));
    const TemporaryFolder folder;
    CHECK(exactness::check(setting, 5, 1500, 2, folder.path.string()) == "");
  }
}

}  // namespace state_tests
