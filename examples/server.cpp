// The skeleton of a server: a line is a request, a line its answer, with tabs between the fields.
// A program in any language can start it and talk to it through its pipes; in a server of yours
// answer() stands behind the HTTP library, which calls it from as many threads as it has.
//   event USER ITEM TYPE [SLATE]    ok, and what became of the event
//   slate USER COUNT                ok, the slate's id, its items
//   forget USER                     ok
// usage: server MODEL.pzm
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
  return error("there are event, slate and forget");
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: server MODEL.pzm\n", stderr);
    return 2;
  }
  auto model = pz::Model::load(argv[1]);
  if (!model) return fail(model.error().message);
  auto recommender = pz::Recommender::create(*model);
  if (!recommender) return fail(recommender.error().message);
  for (std::string line; std::getline(std::cin, line);)
    std::cout << answer(*recommender, line) << std::endl;  // flushed: the client waits for it
  return std::cout ? 0 : fail("cannot write");
}
