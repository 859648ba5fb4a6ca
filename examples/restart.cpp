// A restart: what a recommender knows lies in a folder, and the next start goes on from it, however
// the process ended.
// usage: restart MODEL.pzm FOLDER USER [ITEM ...]
#include <cstdio>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "restart: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: restart MODEL.pzm FOLDER USER [ITEM ...]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string folder = arguments[2], user = arguments[3];

  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());
  // Without exploration, so that the slate before a restart is the slate after it. Once record()
  // has returned, the event survives the process; with each_call a power cut as well.
  auto recommender = pz::Recommender::open(
      folder, *model, {.exploration_weight = 0, .durability = pz::Durability::each_call});
  if (!recommender) return fail(recommender.error());

  const pz::RecoveryReport& found = recommender->recovery();
  if (!found.found) {
    std::puts("the folder is new");
  } else {
    std::printf(
        "%zu users came back, after %llu calls that the journal told again; %s\n",
        recommender->user_count(), static_cast<unsigned long long>(found.records),
        found.clean ? "the process before ended in peace" : "the process before was killed");
    if (found.torn > 0)
      std::printf("%llu bytes of a call that was never acknowledged are gone\n",
                  static_cast<unsigned long long>(found.torn));
  }

  for (const char* item : arguments.subspan(4)) {
    auto recorded = recommender->record({.user = user, .item = item, .event_type = "click"});
    if (!recorded) return fail(recorded.error());
    std::printf("%s: %s\n", item, std::string(pz::name(*recorded)).c_str());
  }
  auto slate = recommender->recommend({.user = user, .count = 10, .exclude_interacted = true});
  if (!slate) return fail(slate.error());
  for (const pz::Pick& pick : slate->items)
    std::printf("%s %.4f\n", std::string(pick.item).c_str(), double(pick.score));
  return 0;
}
