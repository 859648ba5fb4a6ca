// A day of a shop: a new item arrives, is tried on some users, and rises where they click. Writes
// the interaction log for `personalize evaluate --protocol off-policy`.
// usage: exploration MODEL.pzm NEW_ITEM FIELD VALUE LOG.csv
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <span>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const pz::Error& error) {
  std::fprintf(stderr, "exploration: %s\n", error.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("usage: exploration MODEL.pzm NEW_ITEM FIELD VALUE LOG.csv\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string file = arguments[1], new_item = arguments[2];

  auto model = pz::Model::load(file);
  if (!model) return fail(model.error());
  std::ofstream log(arguments[5], std::ios::binary);
  log << pz::log_csv_header;
  std::mutex log_mutex;  // for programs that record on several threads, as this one does not
  auto recommender = pz::Recommender::create(
      *model, {.exploration_weight = 0.3f,
               .exploration_item_age_cut_off = std::chrono::days{30},
               .positive_event_types = {"click"},
               .update_interval = {},  // below by hand, so that the output is the same every time
               .recommendation_key = std::array<std::uint64_t, 2>{1, 2},  // leave out in production
               .log = [&](const pz::LogEntry& entry) {
                 std::string line;
                 pz::append_csv(entry, line);
                 const std::lock_guard lock{log_mutex};
                 log << line;
               }});
  if (!recommender) return fail(recommender.error());

  std::int64_t now = 1'750'000'000;
  if (auto put = recommender->put_item(
          {.item = new_item, .creation_timestamp = now, .fields = {{arguments[3], arguments[4]}}});
      !put)
    return fail(put.error());

  pz::Slate slate;
  for (int hour = 0; hour < 12; ++hour) {
    if (auto updated = recommender->update(now); !updated) return fail(updated.error());
    int shown = 0, explored = 0, clicks = 0;
    for (int visit = 0; visit < 100; ++visit, now += 36) {
      const std::string user = "visitor" + std::to_string(visit);
      // What brought the visitor here; the model makes a taste of it.
      const auto liked = static_cast<std::uint32_t>(visit) % (*model)->item_count();
      if (auto recorded =
              recommender->record({.user = user,
                                   .item = (*model)->item_id(static_cast<std::uint32_t>(liked)),
                                   .event_type = "view",
                                   .timestamp = now});
          !recorded)
        return fail(recorded.error());
      if (auto done = recommender->recommend({.user = user, .count = 10, .timestamp = now}, slate);
          !done)
        return fail(done.error());
      const auto found = std::find_if(slate.items.begin(), slate.items.end(),
                                      [&](const pz::Pick& pick) { return pick.item == new_item; });
      if (found == slate.items.end()) {
        // Nothing was clicked; that the slate was seen is worth knowing.
        auto counted = recommender->record_impression(
            {.user = user, .recommendation_id = slate.id, .timestamp = now});
        if (!counted) return fail(counted.error());
        continue;
      }
      ++shown;
      explored += found->reason == pz::Reason::exploration ? 1 : 0;
      // One in two of these visitors likes it. An event with the recommendation id says what was
      // clicked and that the rest of the slate was seen.
      const bool clicked = visit % 2 == 0;
      clicks += clicked ? 1 : 0;
      auto answered = clicked
                          ? recommender->record({.user = user,
                                                 .item = new_item,
                                                 .event_type = "click",
                                                 .timestamp = now,
                                                 .recommendation_id = slate.id})
                          : recommender->record_impression(
                                {.user = user, .recommendation_id = slate.id, .timestamp = now});
      if (!answered) return fail(answered.error());
    }
    const auto parts = recommender->explain({.user = "visitor1", .timestamp = now}, new_item);
    if (!parts) return fail(parts.error());
    std::printf(
        "hour %2d: in %3d of 100 slates (%3d explored), %2d clicks; score %.2f = relevance %.2f + "
        "quality %.2f + taste %.2f - discount %.2f\n",
        hour, shown, explored, clicks, double(parts->score), double(parts->relevance),
        double(parts->quality), double(parts->taste), double(parts->discount));
  }
  log.flush();
  if (!log) {
    std::fprintf(stderr, "exploration: %s: cannot write\n", arguments[5]);
    return 1;
  }
  return 0;
}
