// A new model while the server goes on: a second recommender is built beside the first, told what
// users did, and takes its place; requests under way end with the old one.
// usage: new_model MODEL.pzm NEW_MODEL.pzm
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "new_model: %s\n", error.message.c_str());
  return 1;
}

class Service {
 public:
  pz::Result<void> use(std::shared_ptr<const pz::Model> model) {
    auto created = pz::Recommender::create(std::move(model));
    if (!created) return created.error();
    auto next = std::make_shared<pz::Recommender>(std::move(*created));
    std::size_t told = 0;
    // Most of the journal while events go on; what came meanwhile, while they wait.
    for (const bool last : {false, true}) {
      std::unique_lock lock{events_};
      const std::vector<Event> rest(journal_.begin() + std::ptrdiff_t(told), journal_.end());
      if (!last) lock.unlock();
      for (const Event& event : rest)
        if (auto again = tell(*next, event); !again) return again.error();
      told += rest.size();
      if (!last) continue;
      const std::lock_guard swap{swap_};
      current_.swap(next);
    }
    return {};
  }

  // What one request works with, which keeps the recommender alive until it has its answer.
  std::shared_ptr<pz::Recommender> now() const {
    const std::lock_guard lock{swap_};
    return current_;
  }

  pz::Result<pz::Recorded> click(const std::string& user, const std::string& item,
                                 std::int64_t time) {
    const std::lock_guard lock{events_};
    Event event{user, item, time};
    auto recorded = tell(*now(), event);
    if (recorded) journal_.push_back(std::move(event));
    return recorded;
  }

 private:
  // A server keeps its journal in a file, which the next start reads as well: see restart.cpp.
  struct Event {
    std::string user, item;
    std::int64_t time;
  };
  static pz::Result<pz::Recorded> tell(pz::Recommender& recommender, const Event& event) {
    return recommender.record(
        {.user = event.user, .item = event.item, .event_type = "click", .timestamp = event.time});
  }

  std::mutex events_;
  mutable std::mutex swap_;
  std::vector<Event> journal_;
  std::shared_ptr<pz::Recommender> current_;
};

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: new_model MODEL.pzm NEW_MODEL.pzm\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  auto first = pz::Model::load(arguments[1]);
  if (!first) return fail(first.error());
  auto second = pz::Model::load(arguments[2]);
  if (!second) return fail(second.error());
  Service service;
  if (auto used = service.use(*first); !used) return fail(used.error());

  std::atomic<bool> stop{false};
  std::atomic<int> events{0}, failed{0};
  std::thread visitors([&] {
    for (int visit = 0; !stop; ++visit) {
      const std::string user = "visitor" + std::to_string(visit);
      const auto item = static_cast<std::uint32_t>(visit) % (*first)->item_count();
      const std::string clicked((*first)->item_id(static_cast<std::uint32_t>(item)));
      if (!service.click(user, clicked, 1'750'000'000 + visit)) ++failed;
      if (!service.now()->recommend({.user = user, .count = 10})) ++failed;
      ++events;
    }
  });
  while (events < 200) std::this_thread::sleep_for(std::chrono::milliseconds{1});
  auto used = service.use(*second);
  const int before = events;
  while (events < before + 50) std::this_thread::sleep_for(std::chrono::milliseconds{1});
  stop = true;
  visitors.join();
  if (!used) return fail(used.error());

  const auto slate = service.now()->recommend({.user = "visitor7", .count = 10});
  if (!slate) return fail(slate.error());
  std::printf("%d requests and events, %d failed; the new model knows %zu users\n", events.load(),
              failed.load(), service.now()->user_count());
  for (const pz::Pick& pick : slate->items)
    std::printf("%s %s\n", std::string(pick.item).c_str(),
                std::string(pz::name(pick.reason)).c_str());
  return failed == 0 ? 0 : 1;
}
