// Slates for many users at once: a nightly mail, a cache to fill. One pass over the item vectors
// serves 32 users.
// usage: batch MODEL.pzm EVENTS.tsv > slates.csv
// EVENTS.tsv has a line an event, in the order of time: user, item, Unix seconds.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <span>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "batch: %s\n", message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: batch MODEL.pzm EVENTS.tsv > slates.csv\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  // Nothing will be heard of these slates, so nothing is remembered of them or tried in them.
  auto recommender = pz::Recommender::create(*model, {.feedback = false});
  if (!recommender) return fail(recommender.error().message);

  std::vector<std::string> users;
  std::unordered_set<std::string> seen;
  std::size_t unknown = 0;
  std::ifstream file(arguments[2]);
  for (std::string line, user, item; std::getline(file, line);) {
    std::istringstream fields(line);
    std::int64_t time = 0;
    if (!std::getline(fields, user, '\t') || !std::getline(fields, item, '\t') || !(fields >> time))
      return fail(std::string(arguments[2]) + ": this is not user, item, time: " + line);
    auto recorded = recommender->record({.user = user, .item = item, .timestamp = time});
    if (!recorded) return fail(recorded.error().message);
    unknown += *recorded == pz::Recorded::unknown_item ? 1 : 0;
    if (seen.insert(user).second) users.push_back(user);
  }
  if (!file.eof()) return fail(std::string(arguments[2]) + ": cannot read");
  std::fprintf(stderr, "%zu users; %zu events are on items that the model does not have\n",
               users.size(), unknown);

  std::puts("USER_ID,ITEM_ID");
  std::array<pz::Request, 64> requests;
  std::array<pz::Slate, 64> slates;  // used again and again: their memory is taken once
  for (std::size_t begin = 0; begin < users.size(); begin += requests.size()) {
    const std::size_t count = std::min(requests.size(), users.size() - begin);
    for (std::size_t i = 0; i < count; ++i)
      requests[i] = {.user = users[begin + i], .count = 3, .exclude_interacted = true};
    if (auto done = recommender->recommend(std::span(requests).first(count), slates); !done)
      return fail(done.error().message);
    for (std::size_t i = 0; i < count; ++i)
      for (const pz::Pick& pick : slates[i].items)
        std::printf("%s,%s\n", users[begin + i].c_str(), std::string(pick.item).c_str());
  }
  return std::fflush(stdout) == 0 ? 0 : fail("cannot write the slates");
}
