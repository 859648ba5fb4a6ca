// A restart: each event that counted goes to a journal, and the next start tells it again.
//
// A replay brings back every user's state and history, and what is popular. It does not bring back
// what impressions taught (quality, taste, discounts), nor recommendation ids. The journal is an
// interactions file, so it can be trained on as well.
// usage: restart MODEL.pzm JOURNAL.tsv USER [ITEM ...]
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(std::string_view message) {
  std::fprintf(stderr, "restart: %.*s\n", int(message.size()), message.data());
  return 1;
}

static constexpr std::string_view header = "USER_ID\tITEM_ID\tTIMESTAMP\tEVENT_TYPE\n";

// What record() took has no control characters: tabs and line ends part fields and events.
static std::string line_of(const pz::Interaction& event) {
  return std::string(event.user) + '\t' + std::string(event.item) + '\t' +
         std::to_string(event.timestamp.value_or(0)) + '\t' + std::string(event.event_type) + '\n';
}

static pz::Result<std::size_t> replay(std::string_view journal, pz::Recommender& recommender) {
  std::size_t unknown = 0;
  for (std::size_t begin = header.size(), end; begin < journal.size(); begin = end + 1) {
    end = journal.find('\n', begin);
    std::string_view rest = journal.substr(begin, end - begin), fields[4];
    for (std::string_view& field : fields) {
      field = rest.substr(0, rest.find('\t'));
      rest.remove_prefix(std::min(field.size() + 1, rest.size()));
    }
    std::int64_t time = 0;
    const auto [stop, bad] =
        std::from_chars(fields[2].data(), fields[2].data() + fields[2].size(), time);
    if (bad != std::errc{} || stop != fields[2].data() + fields[2].size())
      return pz::Error{pz::Errc::format,
                       "byte " + std::to_string(begin) + " of the journal begins no event"};
    auto told = recommender.record(
        {.user = fields[0], .item = fields[1], .event_type = fields[3], .timestamp = time});
    if (!told) return told.error();
    unknown += *told == pz::Recorded::unknown_item ? 1 : 0;
  }
  return unknown;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: restart MODEL.pzm JOURNAL.tsv USER [ITEM ...]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string path = arguments[2], user = arguments[3];

  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  // Without exploration, so that the slate before a restart is the slate after it.
  auto recommender = pz::Recommender::create(*model, {.exploration_weight = 0});
  if (!recommender) return fail(recommender.error().message);

  std::string journal;
  if (std::ifstream file(path, std::ios::binary); file)
    journal.assign(std::istreambuf_iterator<char>(file), {});
  if (!journal.starts_with(header) && !header.starts_with(journal))
    return fail(path + ": this is no journal");
  // Where the process died while it wrote, the last line has no end, and its event had no answer.
  if (const std::size_t whole = journal.rfind('\n') + 1; whole < journal.size()) {
    std::fprintf(stderr, "restart: a torn line at the end of the journal is left out\n");
    journal.resize(whole);
    std::filesystem::resize_file(path, whole);
  }
  const auto unknown = replay(journal, *recommender);
  if (!unknown) return fail(unknown.error().message);
  std::printf("%zu users came back; %zu events are on items that the model does not have\n",
              recommender->user_count(), *unknown);

  std::ofstream log(path, std::ios::binary | std::ios::app);
  if (journal.empty()) log << header;
  for (const std::string_view item : arguments.subspan(4)) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const pz::Interaction event{
        .user = user,
        .item = item,
        .event_type = "click",
        .timestamp = std::chrono::duration_cast<std::chrono::seconds>(now).count()};
    // With several threads these two steps go under one mutex, so that the journal has their order.
    auto recorded = recommender->record(event);
    if (!recorded) return fail(recorded.error().message);
    if (*recorded != pz::Recorded::unknown_item) log << line_of(event);
    std::printf("%s: %s\n", std::string(item).c_str(), std::string(pz::name(*recorded)).c_str());
  }
  if (!log.flush()) return fail("cannot write " + path);

  auto slate = recommender->recommend({.user = user, .count = 10, .exclude_interacted = true});
  if (!slate) return fail(slate.error().message);
  for (const pz::Pick& pick : slate->items)
    std::printf("%s %.4f\n", std::string(pick.item).c_str(), double(pick.score));
  return 0;
}
