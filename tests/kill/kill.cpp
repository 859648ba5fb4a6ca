// Kills a process that serves from a folder, again and again, and looks each time whether all that
// was acknowledged is there when the folder is opened again.
//
// usage: kill FOLDER [KILLS [SEED [DURABILITY]]]
//
// For each durability, or one, so many times (default 15): a child opens the folder; two of its
// threads record events and ask for slates as fast as they can, save, update, put items and in
// every third round go over to another model. What a call acknowledged they tell the parent, after
// the call, by a pipe. The parent ends the child by SIGKILL at a random moment, opens the folder
// itself, and asks for all that it was told of in this round and the one before. A power cut is
// another matter: see tests/test_state_faults.cpp.
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../small_model.hpp"

namespace {

namespace pz = personalize;
using Clock = std::chrono::steady_clock;

constexpr std::uint32_t user_count = 400, event_window = 1 << 18, slate_window = 1 << 17;

// What a thread of the child was told: 64 bytes, which a pipe takes whole or not at all.
struct Acknowledged {
  enum class Kind : std::uint32_t { event, slate, user, started };
  Kind kind;
  std::uint32_t user;
  std::uint64_t number;         // of the event
  std::array<char, 48> text{};  // the slate's id
};
static_assert(sizeof(Acknowledged) == 64);

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "kill: %s\n", message.c_str());
  std::_Exit(1);
}

std::string user_of(std::uint32_t number) { return "u" + std::to_string(number); }
std::string event_of(std::uint64_t number) { return "e" + std::to_string(number); }

std::array<std::shared_ptr<const pz::Model>, 2> models() {
  return {small_model::model({.items = 60, .dimension = 8, .hidden = 8}),
          small_model::model({.items = 64, .dimension = 8, .hidden = 12, .seed = 2})};
}

pz::RecommenderOptions options(pz::Durability durability) {
  pz::RecommenderOptions options;
  options.durability = durability;
  options.update_interval = std::chrono::seconds{1};
  options.recommendation_key = {{1, 2}};
  options.remembered_event_ids = event_window;
  options.remembered_slates = slate_window;
  options.context_bytes = 1 << 20;
  options.slate_log_bytes = std::uint64_t{64} << 20;
  options.journal_bytes = 1 << 20;
  return options;
}

pz::Recommender open(const std::string& folder, const std::shared_ptr<const pz::Model>& model,
                     pz::Durability durability) {
  auto shop = pz::Recommender::open(folder, model, options(durability));
  if (!shop) fail("the folder cannot be opened: " + shop.error().message);
  return std::move(*shop);
}

void tell(int pipe, const Acknowledged& what) {
  for (;;) {
    const auto written = ::write(pipe, &what, sizeof what);
    if (written == sizeof what) return;
    if (written >= 0 || errno != EINTR) std::_Exit(0);  // the parent has gone
  }
}

void work(pz::Recommender& shop, std::uint64_t seed, std::uint32_t thread, bool swaps, int pipe) {
  small_model::Random random(seed);
  const auto both = models();
  // No two of all rounds and threads are alike.
  std::uint64_t number = seed << 24;
  for (;;) {
    const std::uint32_t who = 2 * random.below(user_count / 2) + thread;
    const std::string user = user_of(who), item = "i" + std::to_string(random.below(66));
    const auto require = [&](const auto& result, const char* what) {
      if (!result) fail(std::string(what) + ": " + result.error().message);
    };
    switch (const std::uint32_t what = random.below(2000)) {
      case 0:
        require(shop.save(), "save");
        break;
      case 1:
        require(shop.update(), "update");
        break;
      case 2:
        if (swaps) require(shop.swap(both[random.below(2)]), "swap");
        break;
      case 3:
        require(shop.put_item({.item = "put" + std::to_string(random.below(9)),
                               .fields = {{"GENRE", "bow"}}}),
                "put_item");
        break;
      case 4:
        require(shop.remove_item("put" + std::to_string(random.below(9))), "remove_item");
        break;
      case 5: {
        const std::string other = user_of(who + user_count);  // of whom nobody else knows
        require(shop.record({.user = other, .item = "i1"}), "record");
        const auto blob = shop.export_user(other);
        require(blob, "export_user");
        require(shop.import_user(*blob), "import_user");
        (void)shop.forget(other);
        break;
      }
      default:
        if (what % 3 == 0) {
          const auto slate = shop.recommend({.user = user, .count = 5});
          require(slate, "recommend");
          Acknowledged told{Acknowledged::Kind::slate, who, 0};
          if (slate->id.empty() || slate->id.size() >= told.text.size()) fail("an id's size");
          std::memcpy(told.text.data(), slate->id.data(), slate->id.size());
          tell(pipe, told);
        } else {
          // Of an item that every model has.
          const auto known = shop.record({.user = user,
                                          .item = "i" + std::to_string(random.below(60)),
                                          .event_type = "click",
                                          .event_id = event_of(++number)});
          require(known, "record");
          if (*known != pz::Recorded::learned) fail("an event is not new");
          tell(pipe, {Acknowledged::Kind::event, who, number});
        }
    }
  }
}

[[noreturn]] void serve(const std::string& folder, std::uint64_t seed, pz::Durability durability,
                        std::size_t model, bool swaps, int pipe) {
  auto shop = open(folder, models()[model], durability);
  tell(pipe, {Acknowledged::Kind::started, 0, 0});
  std::thread other([&] { work(shop, 2 * seed + 1, 1, swaps, pipe); });
  work(shop, 2 * seed, 0, swaps, pipe);
  std::abort();
}

struct Count {
  std::uint64_t kills = 0, events = 0, slates = 0, records = 0, torn = 0;
};

void run(const std::string& folder, pz::Durability durability, const char* name,
         std::uint64_t kills, std::uint64_t seed) {
  small_model::Random random(seed);
  const auto both = models();
  Count count;
  std::vector<Acknowledged> before;
  std::filesystem::remove_all(folder);
  std::filesystem::create_directory(folder);
  for (; count.kills < kills; ++count.kills) {
    const bool swaps = count.kills % 3 == 2;
    const std::size_t model = swaps ? random.below(2) : 0;
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) fail("no pipe");
    const std::uint64_t round = random.bits() >> 28;
    const pid_t child = ::fork();
    if (child < 0) fail("no process");
    if (child == 0) {
      ::close(ends[0]);
      serve(folder, round, durability, model, swaps, ends[1]);
    }
    ::close(ends[1]);
    std::vector<Acknowledged> told;
    std::array<Acknowledged, 64> some;
    std::size_t have = 0;
    bool killed = false;
    // Some while it opens, most under load.
    auto end = Clock::now() + std::chrono::microseconds{random.below(20'000)};
    const bool early = random.below(10) == 0;
    bool started = early;
    for (;;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
      pollfd ready{ends[0], POLLIN, 0};
      if (!killed && started && left.count() <= 0) {
        ::kill(child, SIGKILL);
        killed = true;
      }
      const int wait = killed || !started ? 10'000 : static_cast<int>(left.count()) + 1;
      if (::poll(&ready, 1, wait) == 0) {
        if (killed || !started) fail("the child hangs");
        continue;
      }
      const auto got =
          ::read(ends[0], reinterpret_cast<char*>(some.data()) + have, sizeof some - have);
      if (got < 0) fail("the pipe cannot be read");
      if (got == 0) break;
      have += static_cast<std::size_t>(got);
      const std::size_t whole = have / sizeof(Acknowledged);
      for (std::size_t w = 0; w < whole; ++w) {
        if (some[w].kind == Acknowledged::Kind::started && !started) {
          started = true;
          end = Clock::now() + std::chrono::microseconds{random.below(250'000)};
        }
        told.push_back(some[w]);
      }
      have -= whole * sizeof(Acknowledged);
      std::memmove(some.data(), &some[whole == some.size() ? 0 : whole], have);
    }
    ::close(ends[0]);
    int status = 0;
    if (::waitpid(child, &status, 0) != child) fail("the child is lost");
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) fail("the child ended by itself");

    auto shop = open(folder, both[swaps ? random.below(2) : 0], durability);
    count.records += shop.recovery().records;
    count.torn += shop.recovery().torn > 0;
    std::vector<bool> has_events(user_count), is_there(user_count);
    for (const std::vector<Acknowledged>* all : {&before, &told})
      for (const Acknowledged& a : *all) {
        if (a.kind == Acknowledged::Kind::event) {
          has_events[a.user] = true;
          const std::string user = user_of(a.user), event = event_of(a.number);
          const auto again = shop.record({.user = user, .item = "i1", .event_id = event});
          if (!again || *again != pz::Recorded::duplicate)
            fail("event " + event + " was acknowledged and is not there");
          ++count.events;
        } else if (a.kind == Acknowledged::Kind::slate) {
          const std::string user = user_of(a.user);
          const auto known =
              shop.record_impression({.user = user, .recommendation_id = a.text.data()});
          if (!known || *known != pz::Recorded::learned)
            fail(std::string("slate ") + a.text.data() + " was acknowledged and is not there");
          ++count.slates;
        }
      }
    for (std::uint32_t u = 0; u < user_count; ++u)
      if (has_events[u]) {
        const std::string user = user_of(u);
        const auto blob = shop.export_user(user);
        if (!blob || blob->empty()) fail("user " + user + " has events and is not there");
      }
    before = std::move(told);
  }
  std::printf(
      "%-9s %4llu kills, %llu events and %llu slates were there, %llu records replayed, "
      "%llu torn ends\n",
      name, static_cast<unsigned long long>(count.kills),
      static_cast<unsigned long long>(count.events), static_cast<unsigned long long>(count.slates),
      static_cast<unsigned long long>(count.records), static_cast<unsigned long long>(count.torn));
  std::fflush(stdout);
  if (count.events == 0 || count.slates == 0) fail("nothing was acknowledged");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 5) fail("usage: kill FOLDER [KILLS [SEED [DURABILITY]]]");
  const std::uint64_t kills = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 15;
  const std::uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  const std::string folder = argv[1], only = argc > 4 ? argv[4] : "";
  using pz::Durability;
  const std::array<std::pair<Durability, const char*>, 3> all{{{Durability::each_call, "each_call"},
                                                               {Durability::interval, "interval"},
                                                               {Durability::none, "none"}}};
  for (const auto& [durability, name] : all)
    if (only.empty() || only == name) run(folder, durability, name, kills, seed);
  return 0;
}
