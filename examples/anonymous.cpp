// Visitors without a name: a session has a state of its own, and becomes the user's at sign-in.
// usage: anonymous MODEL.pzm USER ITEM [ITEM ...]
#include <cstdio>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "anonymous: %s\n", error.message.c_str());
  return 1;
}

static void print(const char* who, const pz::Slate& slate) {
  std::printf("%s:", who);
  for (const pz::Pick& pick : slate.items) std::printf(" %s", std::string(pick.item).c_str());
  std::puts("");
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: anonymous MODEL.pzm USER ITEM [ITEM ...]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string user = arguments[2];
  const std::string session = "7f3a90";  // of a cookie: long and random, for it is all that tells
                                         // visitors apart
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error());
  // Without exploration, so that the visitor's slate is the user's.
  auto recommender = pz::Recommender::create(*model, {.exploration_weight = 0});
  if (!recommender) return fail(recommender.error());

  for (const char* item : arguments.subspan(3)) {
    auto recorded = recommender->record({.session = session, .item = item, .event_type = "view"});
    if (!recorded) return fail(recorded.error());
    if (*recorded == pz::Recorded::unknown_item)
      std::fprintf(stderr, "anonymous: %s: no such item\n", item);
  }
  pz::Slate slate;
  if (auto done = recommender->recommend({.session = session, .count = 5}, slate); !done)
    return fail(done.error());
  print("visitor", slate);
  if (auto done = recommender->recommend({.user = user, .count = 5}, slate); !done)
    return fail(done.error());
  print("user before signing in", slate);

  // At sign-in. An event that names both, user and session, does the same.
  auto merged = recommender->merge_session(session, user);
  if (!merged) return fail(merged.error());
  if (auto done = recommender->recommend({.user = user, .count = 5}, slate); !done)
    return fail(done.error());
  print("user", slate);
  auto again = recommender->merge_session(session, user);
  if (!again) return fail(again.error());
  std::printf("merged: %s, and once more: %s\n", *merged ? "yes" : "no", *again ? "yes" : "no");
  return 0;
}
