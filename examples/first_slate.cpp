// Loads a model, tells it what one user did, prints what to show next.
// usage: first_slate MODEL.pzm USER ITEM [ITEM ...]
#include <cstdio>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "first_slate: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: first_slate MODEL.pzm USER ITEM [ITEM ...]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string file = arguments[1], user = arguments[2];

  // twelve lines: begin
  auto model = pz::Model::load(file);
  if (!model) return fail(model.error());
  auto recommender = pz::Recommender::create(*model);
  if (!recommender) return fail(recommender.error());
  for (const char* item : arguments.subspan(3)) {
    auto recorded = recommender->record({.user = user, .item = item, .event_type = "click"});
    if (!recorded) return fail(recorded.error());
    if (*recorded == pz::Recorded::unknown_item) std::fprintf(stderr, "%s: no such item\n", item);
  }
  auto slate = recommender->recommend({.user = user, .count = 10, .exclude_interacted = true});
  if (!slate) return fail(slate.error());
  for (const pz::Pick& pick : slate->items)
    std::printf("%.*s %.4f\n", int(pick.item.size()), pick.item.data(), double(pick.score));
  // twelve lines: end
  return 0;
}
