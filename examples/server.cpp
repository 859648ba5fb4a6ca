// The skeleton of a server: a line is a request, a line its answer, with tabs between the fields.
// A program in any language can start it and talk to it through its pipes; in a server of yours
// answer() stands behind the HTTP library, which calls it from as many threads as it has.
//   event USER ITEM TYPE [SLATE]    ok, and what became of the event
//   slate USER COUNT                ok, the slate's id, its items
//   forget USER                     ok
//   save                            ok, and the bytes of the state file
//   model MODEL.pzm                 ok, and the items that came and went
// What it knows lies in FOLDER, and the next start goes on from it. SIGTERM or the end of its input
// ends it in peace; where it is killed, what it had acknowledged is there as well.
// usage: server MODEL.pzm FOLDER
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>
#include <string_view>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "server: %s\n", message.c_str());
  return 1;
}

// Ids, types and messages have no control characters: tabs and line ends are the protocol's own.
static std::string answer(pz::Recommender& recommender, std::string_view line) {
  std::array<std::string_view, 5> fields;
  for (std::string_view& field : fields) {
    field = line.substr(0, line.find('\t'));
    line.remove_prefix(std::min(field.size() + 1, line.size()));
  }
  const auto& [call, user, argument, type, slate_id] = fields;
  const auto error = [](std::string_view message) { return "error\t" + std::string(message); };
  if (call == "event") {
    auto recorded = recommender.record(
        {.user = user, .item = argument, .event_type = type, .recommendation_id = slate_id});
    if (!recorded) return error(recorded.error().message);
    return "ok\t" + std::string(pz::name(*recorded));
  }
  if (call == "slate") {
    std::uint32_t count = 0;
    const char* const end = argument.data() + argument.size();
    if (std::from_chars(argument.data(), end, count).ptr != end || argument.empty())
      return error("COUNT is no number");
    thread_local pz::Slate slate;  // its memory is used again
    if (auto done = recommender.recommend({.user = user, .count = count}, slate); !done)
      return error(done.error().message);
    std::string text = "ok\t" + slate.id;
    for (const pz::Pick& pick : slate.items) text.append("\t").append(pick.item);
    return text;
  }
  if (call == "forget") {
    recommender.forget(user);
    return "ok";
  }
  if (call == "save") {  // not needed: the journal is saved by itself as it grows
    auto saved = recommender.save();
    if (!saved) return error(saved.error().message);
    return "ok\t" + std::to_string(saved->bytes);
  }
  if (call == "model") {
    auto model = pz::Model::load(std::string(user));
    if (!model) return error(model.error().message);
    auto swapped = recommender.swap(*model);
    if (!swapped) return error(swapped.error().message);
    return "ok\t" + std::to_string(swapped->items_added) + '\t' +
           std::to_string(swapped->items_dropped);
  }
  return error("there are event, slate, forget, save and model");
}

// Requests come no more: the read that waits for one, or the next one, fails.
static void stop_reading(int) { close(STDIN_FILENO); }

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: server MODEL.pzm FOLDER\n", stderr);
    return 2;
  }
  struct sigaction stop {};
  stop.sa_handler = stop_reading;
  sigaction(SIGTERM, &stop, nullptr);
  sigaction(SIGINT, &stop, nullptr);

  auto model = pz::Model::load(argv[1]);
  if (!model) return fail(model.error().message);
  auto recommender = pz::Recommender::open(argv[2], *model);
  // Damage, or another process: the message says what to do.
  if (!recommender) return fail(recommender.error().message);
  for (std::string line; std::getline(std::cin, line);)
    std::cout << answer(*recommender, line) << std::endl;  // flushed: the client waits for it
  if (const auto error = recommender->persistence().error)
    std::fprintf(stderr, "server: not all of it is on the disk: %s\n", error->message.c_str());
  return std::cout ? 0 : fail("cannot write");
}
