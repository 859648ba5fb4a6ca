// Several event types: all of them move the user's state, as the model learnt; only those that are
// named positive count as a choice of what was shown.
// usage: event_types MODEL.pzm USER
#include <cstdio>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "event_types: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: event_types MODEL.pzm USER\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string user = arguments[2];
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());
  // Of another type than these an event moves the state as one without a type does.
  const pz::StringTable& types = (*model)->parts().event_types;
  std::printf("the model knows %zu event types:", types.size());
  for (std::size_t type = 0; type < types.size(); ++type)
    std::printf(" %s", std::string(types[type]).c_str());
  std::puts("");

  auto recommender = pz::Recommender::create(*model, {.positive_event_types = {"purchase"}});
  if (!recommender) return fail(recommender.error());
  auto slate = recommender->recommend({.user = user, .count = 3});
  if (!slate) return fail(slate.error());
  if (slate->items.size() < 3) {
    std::fputs("event_types: the model has fewer than three items\n", stderr);
    return 1;
  }
  // One is looked at, one is bought, and nothing happens to the third.
  const char* const done[] = {"view", "purchase", ""};
  for (std::size_t place = 0; place < 2; ++place) {
    auto recorded = recommender->record({.user = user,
                                         .item = slate->items[place].item,
                                         .event_type = done[place],
                                         .recommendation_id = slate->id});
    if (!recorded) return fail(recorded.error());
  }
  if (auto updated = recommender->update(); !updated) return fail(updated.error());
  for (std::size_t place = 0; place < 3; ++place) {
    const auto why = recommender->explain({.user = user}, slate->items[place].item);
    if (!why) return fail(why.error());
    std::printf("%s %s: chosen %.0f times, %.2f expected, discount %.2f\n",
                std::string(slate->items[place].item).c_str(), *done[place] ? done[place] : "seen",
                why->positive, why->expected, double(why->discount));
  }
  return 0;
}
