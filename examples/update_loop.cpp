// A program with a loop of its own, as a game has: no thread of the library, an update where the
// loop has time for it.
// usage: update_loop MODEL.pzm NEW_ITEM FIELD VALUE
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "update_loop: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fputs("usage: update_loop MODEL.pzm NEW_ITEM FIELD VALUE\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string new_item = arguments[2];
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());

  // The game's own time, here a second a frame; left out, the system's. An update falls due a
  // minute after the last one. With Updates::in_requests the request that finds it due would run
  // it.
  std::atomic<std::int64_t> now{1'750'000'000};
  auto game = pz::Recommender::create(*model, {.update_interval = std::chrono::minutes{1},
                                               .updates = pz::Updates::by_caller,
                                               .clock = [&now] { return now.load(); }});
  if (!game) return fail(game.error());

  pz::Slate slate;
  for (int frame = 0; frame < 200; ++frame, ++now) {
    if (frame == 90) {
      if (auto put = game->put_item({.item = new_item, .fields = {{arguments[3], arguments[4]}}});
          !put)
        return fail(put.error());
      std::printf("frame %d: %s was put\n", frame, new_item.c_str());
    }
    if (auto done = game->recommend({.user = "player", .count = 5}, slate); !done)
      return fail(done.error());
    if (frame % 20 == 5 && !slate.items.empty()) {
      auto played = game->record({.user = "player",
                                  .item = slate.items[0].item,
                                  .event_type = "play",
                                  .recommendation_id = slate.id});
      if (!played) return fail(played.error());
    }
    // Where nothing is new, none is due.
    if (!game->update_due()) continue;
    if (auto updated = game->update(); !updated) return fail(updated.error());
    const pz::UpdateReport report = game->update_report();
    std::printf("frame %d: updated in %lld us, %zu items added, %zu learnt from\n", frame,
                static_cast<long long>(report.duration.count()), report.items_added,
                report.items_learnt);
  }
  std::printf("%s is %s\n", new_item.c_str(), game->find_item(new_item) ? "in" : "not in");
  return 0;
}
