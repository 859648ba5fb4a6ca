// Every member function of a Recommender at once, from many threads. PERSONALIZE_STRESS_SECONDS
// says for how long each test does so (default 3). The thread sanitizer sees a race where results
// would not show it.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;

namespace {

constexpr std::int64_t start = 1'700'000'000;
constexpr std::size_t thread_count = 8;

// The recommender's clock, which all callers move on.
class Clock {
 public:
  std::int64_t now() const noexcept { return now_.load(std::memory_order_relaxed); }
  std::int64_t advance(std::int64_t seconds) noexcept {
    return now_.fetch_add(seconds, std::memory_order_relaxed) + seconds;
  }

 private:
  std::atomic<std::int64_t> now_{start};
};

// The first promise that any thread saw broken; asserts that throw must not be used on threads.
class Promises {
 public:
  void require(bool kept, const char* promise) noexcept {
    if (!kept) broken_.store(promise);
  }
  const char* broken() const noexcept { return broken_; }

 private:
  std::atomic<const char*> broken_{nullptr};
};

std::shared_ptr<const pz::Model> young_model(const small_model::Shape& shape = {.items = 200,
                                                                                .hidden = 16}) {
  pz::ModelParts parts = small_model::quantised(small_model::parts(shape));
  for (std::size_t i = 0; i < parts.statistics.size(); ++i)
    parts.statistics[i] = {i % 2 == 0 ? 0u : 100u, start - 86'400, start, start - 86'400};
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  return *model;
}

// Of which one follows on another.
using Models = std::array<std::shared_ptr<const pz::Model>, 3>;

// One thread's calls, drawn at random, some of them dated a little back.
class Caller {
 public:
  // folder: beside the recommender's own; null where it has none.
  Caller(pz::Recommender& shop, Clock& clock, Promises& promises, const Models& models,
         const std::string* folder, std::uint64_t seed)
      : shop_(shop),
        clock_(clock),
        promises_(promises),
        models_(models),
        folder_(folder),
        random_(seed) {}

  void call() {
    now_ = clock_.advance(random_.below(20)) - random_.below(60);
    switch (random_.below(16)) {
      case 0:
      case 1:
      case 2:
        return record();
      case 3:
        return record_impression();
      case 4:
      case 5:
      case 6:
        return recommend();
      case 7:
        return recommend_many();
      case 8:
        return rank();
      case 9:
        return explain();
      case 10:
        return change_items();
      case 11:
        return update();
      case 12:
        return change_users();
      case 13:
        return swap();
      case 14:
        return keep();
      default:
        return look();
    }
  }

 private:
  std::string user() { return "u" + std::to_string(random_.below(40)); }
  std::string session() { return "s" + std::to_string(random_.below(40)); }
  // One in ten is not in the catalogue, or only for a while.
  std::string item() {
    return random_.below(10) == 0 ? "new" + std::to_string(random_.below(20))
                                  : "i" + std::to_string(random_.below(200));
  }

  void check(const pz::Slate& slate, std::size_t count) {
    promises_.require(slate.items.size() <= count, "a slate is no longer than asked for");
    std::set<std::string_view> items;
    for (const pz::Pick& pick : slate.items) {
      items.insert(pick.item);
      promises_.require(std::isfinite(pick.score), "scores are finite");
      promises_.require(pick.propensity > 0 && pick.propensity <= 1, "propensities are in (0, 1]");
      promises_.require(pick.item.starts_with("i") || pick.item.starts_with("new"),
                        "a slate holds the ids of its picks");
    }
    promises_.require(items.size() == slate.items.size(), "items are distinct");
  }

  void record() {
    const std::string user_id = user(), session_id = session(), item_id = item();
    const auto recorded = shop_.record(
        {.user = user_id,
         .session = random_.below(4) == 0 ? std::string_view(session_id) : std::string_view{},
         .item = item_id,
         .event_type = random_.below(2) == 0 ? "click" : "view",
         .timestamp = now_,
         .recommendation_id = slate_.id});
    promises_.require(recorded.has_value(), "a right event is recorded");
  }

  void record_impression() {
    const std::string user_id = user(), first = item(), second = item();
    const std::array<std::string_view, 2> items{first, second};
    promises_.require(
        shop_.record_impression({.user = user_id, .items = items, .timestamp = now_}).has_value(),
        "a right impression is recorded");
  }

  void recommend() {
    const std::string user_id = user();
    const std::uint32_t count = 1 + random_.below(30);
    const auto done = shop_.recommend({.user = user_id,
                                       .count = count,
                                       .exclude_interacted = random_.below(2) == 0,
                                       .timestamp = now_},
                                      slate_);
    promises_.require(done.has_value(), "a right request is answered");
    check(slate_, count);
    if (slate_.items.empty()) return;
    const pz::Interaction event{.user = user_id,
                                .item = slate_.items[0].item,
                                .event_type = "click",
                                .timestamp = now_,
                                .recommendation_id = slate_.id};
    // Its slate may have been displaced, the user forgotten.
    promises_.require(shop_.record(event).has_value(), "an answer to a slate is recorded");
  }

  void recommend_many() {
    const std::string a = user(), b = user(), c = session();
    const std::array<pz::Request, 3> requests{
        pz::Request{.user = a, .count = 10, .timestamp = now_},
        pz::Request{.user = b, .count = 3, .timestamp = now_},
        pz::Request{.session = c, .count = 25, .timestamp = now_}};
    promises_.require(shop_.recommend(requests, slates_).has_value(),
                      "right requests are answered");
    for (std::size_t i = 0; i < requests.size(); ++i) check(slates_[i], requests[i].count);
  }

  void rank() {
    const std::string user_id = user(), first = item(), second = item();
    const std::array<std::string_view, 3> items{first, second, "no such item"};
    pz::Slate order;
    promises_.require(shop_.rank({.user = user_id, .timestamp = now_}, items, order).has_value() &&
                          order.items.size() == items.size(),
                      "rank() keeps the number of items");
  }

  void explain() {
    const std::string user_id = user();
    const auto parts = shop_.explain({.user = user_id, .timestamp = now_},
                                     "i" + std::to_string(random_.below(200)));
    promises_.require(
        parts ? std::isfinite(parts->score) : parts.error().code == pz::Errc::unknown_item,
        "items of the catalogue are explained");
  }

  void change_items() {
    const std::string item_id = item();
    if (random_.below(3) == 0)
      return promises_.require(shop_.remove_item(item_id).has_value(), "an item can be removed");
    promises_.require(shop_
                          .put_item({.item = item_id,
                                     .creation_timestamp = now_,
                                     .fields = {{"GENRE", "bow|sword"}, {"PRICE", "2"}}})
                          .has_value(),
                      "a right item is put");
  }

  void update() {
    const bool due = shop_.update_due();
    if (due || random_.below(4) == 0)
      promises_.require(shop_.update().has_value(), "an update succeeds");
    promises_.require(!shop_.update_report().error, "an update reports no error");
    if (random_.below(8) == 0)
      promises_.require(shop_.item_count() >= 200, "an update loses no item");
  }

  void swap() {
    if (random_.below(8) != 0) return;
    promises_.require(shop_.swap(models_[random_.below(3)]).has_value(), "a right model is taken");
  }

  void change_users() {
    const std::string user_id = user(), session_id = session();
    promises_.require(shop_.merge_session(session_id, user_id).has_value(),
                      "a session can be merged");
    if (random_.below(4) == 0) (void)shop_.forget(user_id);
    if (random_.below(4) == 0) (void)shop_.forget({}, session_id);
  }

  // What outlives the process.
  void keep() {
    const std::string user_id = user(), session_id = session();
    const bool visitor = random_.below(2) == 0;
    const std::string_view none, of_user = visitor ? none : user_id,
                                 of_session = visitor ? session_id : none;
    const auto blob = shop_.export_user(of_user, of_session);
    promises_.require(blob.has_value(), "a user is exported");
    if (blob && !blob->empty())
      promises_.require(shop_.import_user(*blob).has_value(), "who was exported comes in again");
    const pz::PersistenceStatus status = shop_.persistence();
    promises_.require(status.durable && !status.error, "all that is acknowledged is durable");
    if (random_.below(8) == 0 && folder_)
      promises_.require(shop_.save().has_value(), "a state is saved into the folder");
    if (random_.below(16) == 0 && folder_)
      promises_.require(
          shop_.save(*folder_ + "/state" + std::to_string(random_.below(4))).has_value(),
          "a state is saved beside it");
  }

  void look() {
    promises_.require(shop_.user_count() <= 64 + thread_count,
                      "no more users are remembered than allowed");
    promises_.require(!std::string_view(shop_.instruction_set()).empty(),
                      "the instruction set has a name");
    promises_.require(shop_.item_count() >= 200, "the catalogue holds the model's items");
    promises_.require(shop_.memory().catalogue > 0, "the catalogue takes memory");
    promises_.require(shop_.restarted_states() == 0, "the states of users are finite");
  }

  pz::Recommender& shop_;
  Clock& clock_;
  Promises& promises_;
  const Models& models_;
  const std::string* folder_;
  small_model::Random random_;
  std::int64_t now_ = start;
  pz::Slate slate_;
  std::array<pz::Slate, 3> slates_;
};

std::chrono::duration<double> stress_time() {
  const char* seconds = std::getenv("PERSONALIZE_STRESS_SECONDS");
  return std::chrono::duration<double>(seconds ? std::atof(seconds) : 3);
}

void call_from_all_threads(pz::Updates updates, std::optional<pz::Durability> durability = {}) {
  const TemporaryFolder folder;
  const std::string beside = folder.path.string(), within = folder.file("shop");
  std::atomic<std::uint64_t> logged{0};
  Clock clock;
  const Models models{young_model(),
                      young_model({.items = 190, .dimension = 33, .hidden = 9, .seed = 2}),
                      young_model({.items = 215, .hidden = 16, .seed = 3})};
  pz::RecommenderOptions options{.history_length = 20,
                                 .max_users = 64,
                                 .update_interval = std::chrono::minutes{10},
                                 .updates = updates,
                                 .remembered_slates = 100,
                                 .clock = [&] { return clock.now(); },
                                 .log = [&](const pz::LogEntry&) { ++logged; }};
  options.journal_bytes = 1 << 20;  // so that it is compacted
  if (durability) options.durability = *durability;
  auto shop = durability ? pz::Recommender::open(within, models[0], options)
                         : pz::Recommender::create(models[0], options);
  REQUIRE(shop);
  MESSAGE("instruction set " << std::string(shop->instruction_set()));

  Promises promises;
  std::atomic<std::uint64_t> calls{0};
  const auto end = std::chrono::steady_clock::now() + stress_time();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < thread_count; ++t)
    threads.emplace_back([&, t] {
      Caller caller(*shop, clock, promises, models, durability ? &beside : nullptr, t);
      while (std::chrono::steady_clock::now() < end && !promises.broken()) {
        caller.call();
        ++calls;
      }
    });
  for (std::thread& thread : threads) thread.join();

  MESSAGE(calls.load() << " calls");
  const char* broken = promises.broken();
  CHECK_MESSAGE(!broken, std::string(broken ? broken : ""));
  CHECK(calls > 100);
  CHECK(logged > 0);
  CHECK(shop->user_count() <= 64);
  CHECK(shop->item_count() > 200);
  CHECK(shop->model()->item_count() <= shop->item_count());
  // The last update may have come when there was nothing to learn.
  REQUIRE(shop->record({.user = "last", .item = "i1", .timestamp = clock.now()}));
  REQUIRE(shop->update());
  CHECK(shop->update_report().items_learnt > 0);
}

}  // namespace

TEST_CASE("every member function may be called at any time from any thread: a thread updates") {
  call_from_all_threads(pz::Updates::by_thread);
}

TEST_CASE("every member function may be called at any time from any thread: callers update") {
  call_from_all_threads(pz::Updates::by_caller);
}

TEST_CASE("every member function may be called at any time from any thread: requests update") {
  call_from_all_threads(pz::Updates::in_requests);
}

TEST_CASE("every member function may be called at any time from any thread: in a folder, synced") {
  call_from_all_threads(pz::Updates::by_thread, pz::Durability::each_call);
}

TEST_CASE("every member function may be called at any time from any thread: in a folder") {
  call_from_all_threads(pz::Updates::by_thread, pz::Durability::interval);
}
