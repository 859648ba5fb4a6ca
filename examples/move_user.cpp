// A user moves to another recommender, which may have another model: their events, impressions and
// state go along as some hundred bytes, which in a fleet travel from server to server.
// usage: move_user MODEL.pzm NEW_MODEL.pzm USER ITEM [ITEM ...]
#include <cstddef>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "move_user: %s\n", error.message.c_str());
  return 1;
}

static bool print(const char* who, pz::Recommender& recommender, const std::string& user) {
  const auto slate = recommender.recommend({.user = user, .count = 10, .exclude_interacted = true});
  if (!slate) return false;
  std::printf("%s:", who);
  for (const pz::Pick& pick : slate->items) std::printf(" %s", std::string(pick.item).c_str());
  std::puts("");
  return true;
}

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fputs("usage: move_user MODEL.pzm NEW_MODEL.pzm USER ITEM [ITEM ...]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string user = arguments[3];
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());
  auto other_model = pz::Model::load(arguments[2]);
  if (!other_model) return fail(other_model.error());
  auto from = pz::Recommender::create(*model, {.exploration_weight = 0});
  if (!from) return fail(from.error());
  auto to = pz::Recommender::create(*other_model, {.exploration_weight = 0});
  if (!to) return fail(to.error());

  for (const char* item : arguments.subspan(4)) {
    auto recorded = from->record({.user = user, .item = item, .event_type = "click"});
    if (!recorded) return fail(recorded.error());
  }
  if (!print("there", *from, user)) return 1;

  const auto blob = from->export_user(user);  // empty: there is no such user
  if (!blob) return fail(blob.error());
  const auto imported = to->import_user(*blob);
  if (!imported) return fail(imported.error());
  // Only now, so that the user is never nowhere.
  from->forget(user);
  std::printf("%s moved in %zu bytes: %zu events, %zu on items that are unknown there\n",
              imported->user.c_str(), blob->size(), imported->events, imported->events_dropped);
  return print("here", *to, user) ? 0 : 1;
}
