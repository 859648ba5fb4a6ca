// A new model while the server goes on: swap() takes it in, and no request fails or waits.
// usage: new_model MODEL.pzm NEW_MODEL.pzm
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <thread>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "new_model: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: new_model MODEL.pzm NEW_MODEL.pzm\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());
  auto next = pz::Model::load(arguments[2]);
  if (!next) return fail(next.error());
  auto recommender = pz::Recommender::create(*model);
  if (!recommender) return fail(recommender.error());

  std::atomic<bool> stop{false};
  std::atomic<int> events{0}, failed{0};
  std::thread visitors([&] {
    for (int visit = 0; !stop; ++visit) {
      const std::string user = "visitor" + std::to_string(visit);
      const auto item = static_cast<std::uint32_t>(visit) % (*model)->item_count();
      const std::string clicked((*model)->item_id(static_cast<std::uint32_t>(item)));
      if (!recommender->record({.user = user, .item = clicked, .event_type = "click"})) ++failed;
      if (!recommender->recommend({.user = user, .count = 10})) ++failed;
      ++events;
    }
  });
  const auto wait_for = [&](int more) {
    for (const int before = events; events < before + more;)
      std::this_thread::sleep_for(std::chrono::milliseconds{1});
  };
  wait_for(200);
  const auto swapped = recommender->swap(*next);
  wait_for(50);
  stop = true;
  visitors.join();
  if (!swapped) return fail(swapped.error());

  // Users' states of another encoder are made anew from their events, when next used or before.
  const auto slate = recommender->recommend({.user = "visitor7", .count = 10});
  if (!slate) return fail(slate.error());
  std::printf("%d requests and events, %d failed; the new model knows %zu users\n", events.load(),
              failed.load(), recommender->user_count());
  std::printf("%zu items came, %zu went; states %s\n", swapped->items_added, swapped->items_dropped,
              swapped->states_kept ? "are kept" : "are made anew");
  for (const pz::Pick& pick : slate->items)
    std::printf("%s %s\n", std::string(pick.item).c_str(),
                std::string(pz::name(pick.reason)).c_str());
  return failed == 0 ? 0 : 1;
}
