// What it costs that a recommender outlives its process and its model: swaps, saves, restarts and
// the journal, beside requests at full speed. Prints one JSON line a figure, as figures.cpp does.
// Not pinned: requests and what goes on beside them share the machine's cores.
// usage: persistence [NAME...] [--folder PATH] [--seconds N]
#include <zstd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../personalize_runtime.hpp"
#include "measure.hpp"
#if defined(__linux__)
#include <sys/resource.h>
#endif
#if defined(PERSONALIZE_BENCH_SQLITE)
#include <sqlite3.h>
#endif

namespace {

constexpr std::int64_t start = 1'700'000'000;
constexpr std::size_t items = 100'000, hidden = 128, d = 64, events_a_user = 50;
namespace fs = std::filesystem;

fs::path folder = fs::temp_directory_path() / "personalize_bench";
double seconds_wanted = 0;  // 0: as long as the figure says

[[noreturn]] void fail(const char* what, const std::string& why) {
  std::fprintf(stderr, "persistence: %s: %s\n", what, why.c_str());
  std::exit(1);
}
template <class T>
T take(const char* what, pz::Result<T> result) {
  if (!result) fail(what, result.error().message);
  return std::move(*result);
}

// How often this thread has waited for something: for a lock or a file, not for a core.
long waits() {
#if defined(__linux__)
  rusage usage{};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
#else
  return 0;
#endif
}

// Times in microseconds, in buckets a 64th of a doubling wide.
class Histogram {
 public:
  void add(double microseconds) {
    const double place = 64 * std::log2(std::max(microseconds * 16, 1.0));
    ++counts_[std::min(static_cast<std::size_t>(place), counts_.size() - 1)];
    most_ = std::max(most_, microseconds);
  }
  void add(const Histogram& other) {
    for (std::size_t b = 0; b < counts_.size(); ++b) counts_[b] += other.counts_[b];
    most_ = std::max(most_, other.most_);
  }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t c : counts_) sum += c;
    return sum;
  }
  double quantile(double part) const {
    if (part >= 1) return most_;
    const double wanted = part * static_cast<double>(count());
    double sum = 0;
    for (std::size_t b = 0; b < counts_.size(); ++b)
      if ((sum += static_cast<double>(counts_[b])) > wanted)
        return std::exp2((static_cast<double>(b) + 0.5) / 64) / 16;
    return most_;
  }

 private:
  std::array<std::uint64_t, 64 * 32> counts_{};
  double most_ = 0;
};

// A GRU of 128 before vectors of 64. Items `first` and on; some of them are young. Models of
// different seeds share neither the encoder nor the item space.
std::shared_ptr<const pz::Model> model_of(unsigned seed, std::size_t first = 0) {
  using Kind = pz::EncoderOp::Kind;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  pz::ModelParts parts;
  parts.metadata = "{}";
  for (std::size_t i = first; i < first + items; ++i) {
    if (!parts.item_ids.add("i" + std::to_string(i))) std::abort();
    const std::int64_t created = start - (i % 1000 == 0 ? 1 : 400) * 86'400;
    parts.statistics.push_back({i % 1000 == 0 ? 0 : 1 + 1'000'000 / (i + 1),
                                i % 1000 == 0 ? pz::no_timestamp : created,
                                i % 1000 == 0 ? pz::no_timestamp : start, created});
    parts.biases.push_back(0.1f * normal(random));
  }
  parts.item_vectors = random_matrix(items, d, random).quantised();
  parts.operations = {{Kind::embed_sum}, {Kind::gru}, {Kind::linear}};
  for (const auto& [rows, columns] : {std::pair{3 * hidden, d},
                                      {3 * hidden, hidden},
                                      {std::size_t{1}, 3 * hidden},
                                      {1, 3 * hidden},
                                      {d, hidden},
                                      {1, d}}) {
    const pz::Matrix m = random_matrix(rows, columns, random);
    parts.weights.push_back(rows > 1 ? m.quantised() : m);
  }
  if (!parts.event_types.add("click")) std::abort();
  parts.event_type_embedding = random_matrix(1, d, random);
  return take("model", pz::Model::from_parts(std::move(parts)));
}

std::int64_t seconds_since_begin() {
  static const auto begun = Clock::now();
  return start + static_cast<std::int64_t>(since(begun) / 1e6);
}

pz::RecommenderOptions options_of(pz::Durability durability = pz::Durability::interval) {
  pz::RecommenderOptions options;
  options.user_bytes = std::uint64_t{4} << 30;
  options.recommendation_key = {{1, 2}};
  options.clock = seconds_since_begin;
  options.durability = durability;
  options.journal_bytes = std::uint64_t{16} << 30;  // saves are the figures' own
  return options;
}

std::string user_name(std::size_t user) {
  const std::string digits = std::to_string(user);
  return "user" + std::string(8 - digits.size(), '0') + digits;
}

// A user's blob as that of another, whose name is as long. It has a head of 9 bytes, of which the
// fifth says whether zstd has packed what follows, and the last 4 how long it is unpacked; and
// XXH64 of all before it at its end.
std::vector<std::byte> renamed(const std::vector<std::byte>& blob, const std::string& from,
                               const std::string& to) {
  std::uint32_t size = 0;
  std::memcpy(&size, blob.data() + 5, sizeof size);
  std::vector<std::byte> other(blob.begin(), blob.begin() + 9);
  other.resize(9 + size + 8);
  if (blob[4] == std::byte{0})
    std::memcpy(other.data() + 9, blob.data() + 9, size);
  else if (ZSTD_decompress(other.data() + 9, size, blob.data() + 9, blob.size() - 17) != size)
    std::abort();
  other[4] = std::byte{0};
  char* const text = reinterpret_cast<char*>(other.data());
  const std::size_t at = std::string_view(text, other.size()).find(from);
  if (at == std::string_view::npos || from.size() != to.size()) std::abort();
  std::memcpy(text + at, to.data(), to.size());
  const std::uint64_t checksum = pz::xxh64(std::span<const std::byte>(other).first(9 + size));
  std::memcpy(other.data() + 9 + size, &checksum, sizeof checksum);
  return other;
}

// With 50 events each. A thousand of them are recorded, the others are like one of those.
void fill(pz::Recommender& shop, std::size_t users) {
  constexpr std::size_t recorded = 1000;
  std::mt19937 random(1);
  for (std::size_t u = 0; u < recorded; ++u)
    for (std::size_t e = 0; e < events_a_user; ++e)
      (void)take("record",
                 shop.record({.user = user_name(u),
                              .item = "i" + std::to_string(1000 + random() % (items - 1000)),
                              .event_type = "click",
                              .timestamp = start - 86'400 + static_cast<std::int64_t>(e) * 60}));
  std::vector<std::vector<std::byte>> blobs;
  for (std::size_t u = 0; u < recorded; ++u)
    blobs.push_back(take("export", shop.export_user(user_name(u))));
  for (std::size_t u = recorded; u < users; ++u)
    (void)take("import", shop.import_user(
                             renamed(blobs[u % recorded], user_name(u % recorded), user_name(u))));
}

// A folder with so many users, made anew.
fs::path folder_of(std::size_t users, const std::shared_ptr<const pz::Model>& model) {
  const fs::path path = folder / ("users-" + std::to_string(users));
  fs::remove_all(path);
  fs::create_directories(path);
  auto shop =
      take("open", pz::Recommender::open(path.string(), model, options_of(pz::Durability::none)));
  fill(shop, users);
  (void)take("save", shop.save());
  return path;
}

struct Temporary {
  fs::path path;
  explicit Temporary(const char* name) : path(folder / name) {
    fs::remove_all(path);
    fs::create_directories(path);
  }
  ~Temporary() { fs::remove_all(path); }
};

// Two threads that record and ask without pause.
class Load {
 public:
  enum Call { record, recommend, calls };
  static constexpr std::size_t threads = 2, phases = 3;

  Load(pz::Recommender& shop, std::size_t users) {
    for (std::size_t t = 0; t < threads; ++t)
      threads_.emplace_back([this, &shop, users, t] { run(shop, users, t); });
  }
  ~Load() { stop(); }
  void stop() {
    stopping_ = true;
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }
  void enter(std::size_t phase) { phase_ = phase; }

  // After stop().
  Histogram of(std::size_t phase, Call call) const {
    Histogram all;
    for (const auto& of_thread : times_) all.add(of_thread[phase][call]);
    return all;
  }
  // The longest call in which a thread waited for a lock or a file.
  double longest_wait(std::size_t phase, Call call) const {
    double most = 0;
    for (const auto& of_thread : waited_) most = std::max(most, of_thread[phase][call]);
    return most;
  }
  std::uint64_t failures() const { return failures_; }
  std::uint64_t done() const { return done_; }

 private:
  void run(pz::Recommender& shop, std::size_t users, std::size_t t) {
    std::mt19937 random(static_cast<unsigned>(t + 100));
    pz::Slate slate;
    long waits_before = waits();
    const auto timed = [&](Call call, auto work) {
      const std::size_t phase = phase_;
      const auto begin = Clock::now();
      const bool well = work();
      const double time = since(begin);
      failures_ += !well;
      times_[t][phase][call].add(time);
      if (time < 500) return;
      const long now = waits();
      if (std::exchange(waits_before, now) != now)
        waited_[t][phase][call] = std::max(waited_[t][phase][call], time);
    };
    for (std::size_t n = 0; !stopping_; ++n) {
      if (n % 64 == 0) waits_before = waits();
      const std::string user = user_name(random() % users);
      const std::string item = "i" + std::to_string(1000 + random() % (items - 1000));
      timed(record, [&] {
        return shop
            .record(
                {.user = user, .item = item, .event_type = "click", .recommendation_id = slate.id})
            .has_value();
      });
      timed(recommend,
            [&] { return shop.recommend({.user = user, .count = 25}, slate).has_value(); });
      if (n % 4 == 0)
        failures_ +=
            !shop.record_impression({.user = user, .recommendation_id = slate.id}).has_value();
      done_.fetch_add(1, std::memory_order_relaxed);
    }
  }

  std::array<std::array<std::array<Histogram, calls>, phases>, threads> times_{};
  std::array<std::array<std::array<double, calls>, phases>, threads> waited_{};
  std::atomic<std::size_t> phase_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> failures_{0}, done_{0};
  std::vector<std::thread> threads_;
};

enum Phase : std::size_t { unmeasured, without, with };

void report(const Load& load, const std::string& what, const std::string& data) {
  for (const Load::Call call : {Load::record, Load::recommend}) {
    const std::string name = call == Load::record ? "record" : "recommend";
    const Histogram before = load.of(without, call), beside = load.of(with, call);
    for (const double q : {0.5, 0.99, 0.999})
      line(name + "_beside_" + what, data + ", quantile " + std::to_string(q).substr(0, 5),
           beside.quantile(q), "us", "the same without", before.quantile(q));
    line(name + "_longest_wait_beside_" + what,
         data + ", the longest call in which a thread waited for a lock or a file",
         load.longest_wait(with, call) / 1000, "ms", "the same without",
         load.longest_wait(without, call) / 1000);
  }
  line("requests_failed_beside_" + what, data, static_cast<double>(load.failures()), "requests");
}

// The rise of values a minute, of least squares.
double slope(const std::vector<std::pair<double, double>>& points) {
  double n = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (const auto& [minute, value] : points) {
    n += 1, x += minute, y += value;
    xx += minute * minute, xy += minute * value;
  }
  return (n * xy - x * y) / (n * xx - x * x);
}

void rest(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// In turns of 15 s without and 15 s with a swap a second.
void swap_beside_requests() {
  constexpr std::size_t users = 100'000;
  constexpr double turn = 15;
  const std::array<std::shared_ptr<const pz::Model>, 2> models{model_of(1), model_of(2, 1000)};
  auto shop = take("create", pz::Recommender::create(models[0], options_of()));
  fill(shop, users);
  std::vector<std::pair<double, double>> memory;
  std::vector<double> durations;
  const auto begun = Clock::now();
  {
    Load load(shop, users);
    std::size_t n = 0;
    const auto swap = [&] {
      const auto swapped = take("swap", shop.swap(models[++n % 2]));
      durations.push_back(static_cast<double>(swapped.duration.count()) / 1000);
    };
    for (int warm = 0; warm < 2; ++warm) rest(2), swap();
    durations.clear();
    const double all = seconds_wanted > 0 ? seconds_wanted : 120;
    for (int round = 0; round < static_cast<int>(all / turn / 2); ++round) {
      load.enter(unmeasured);
      rest(5);  // states of the last model
      load.enter(without);
      rest(turn);
      load.enter(with);
      for (const auto from = Clock::now(); since(from) < turn * 1e6;) {
        const auto next = Clock::now() + std::chrono::seconds{1};
        swap();
        std::this_thread::sleep_until(next);
        memory.push_back({since(begun) / 60e6, mebibytes(resident())});
      }
    }
    load.stop();
    const std::string data = "100,000 x 64, hidden 128, 100,000 users with 50 events, 2 threads, " +
                             std::to_string(durations.size()) + " swaps, one a second";
    report(load, "swaps", data);
    line("swap_beside_requests", data, quantile(durations, 0.5), "ms");
    line("memory_beside_swaps", data + ", rise of the resident memory", slope(memory),
         "MiB a minute", "resident at the end", memory.back().second);
  }
  // The same with nothing beside it.
  durations.clear();
  for (std::size_t n = 0; n < 10; ++n)
    durations.push_back(
        static_cast<double>(take("swap", shop.swap(models[n % 2])).duration.count()) / 1000);
  line("swap_alone", "100,000 x 64, nothing beside it", quantile(durations, 0.5), "ms");
}

void save_beside_requests() {
  constexpr std::size_t users = 1'000'000;
  const auto model = model_of(1);
  const fs::path path = folder_of(users, model);
  auto shop = take("open", pz::Recommender::open(path.string(), model, options_of()));
  if (shop.user_count() != users) fail("open", "users are missing");
  std::vector<double> durations;
  double bytes = 0;
  Load load(shop, users);
  rest(5);
  const double all = seconds_wanted > 0 ? seconds_wanted : 60;
  for (const auto from = Clock::now(); since(from) < all * 1e6;) {
    load.enter(without);
    rest(5);
    load.enter(with);
    const auto saved = take("save", shop.save());
    load.enter(unmeasured);
    bytes = static_cast<double>(saved.bytes);
    durations.push_back(static_cast<double>(saved.duration.count()) / 1e6);
    rest(2);
  }
  load.stop();
  const std::string data = "1,000,000 users with 50 events, hidden 128, 100,000 items";
  report(load, "saves", data + ", " + std::to_string(durations.size()) + " saves");
  line("save_beside_requests", data + ", 2 threads of requests", quantile(durations, 0.5), "s");
  line("state_file", data, mebibytes(bytes), "MiB");
  durations.clear();
  for (int n = 0; n < 3; ++n)
    durations.push_back(static_cast<double>(take("save", shop.save()).duration.count()) / 1e6);
  line("save_alone", data + ", nothing beside it", quantile(durations, 0.5), "s");
}

// Pinned to one core by bench/run.
void restart() {
  constexpr std::size_t users = 1'000'000;
  const auto model = model_of(1);
  const fs::path path = folder_of(users, model);
  fs::path file;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().extension() == ".pzs") file = entry.path();
  std::vector<double> opens, reads;
  for (int round = 0; round < 4; ++round) {
    std::vector<char> buffer(1 << 20);
    auto begin = Clock::now();
    {
      std::ifstream in(file, std::ios::binary);
      while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size()))) {
      }
    }
    const double read = since(begin) / 1e6;
    begin = Clock::now();
    auto shop = take("open", pz::Recommender::open(path.string(), model, options_of()));
    const double opened = since(begin) / 1e6;
    if (shop.user_count() != users) fail("open", "users are missing");
    if (round == 0) continue;
    reads.push_back(read);
    opens.push_back(opened);
  }
  line("open", "1,000,000 users with 50 events, hidden 128, 100,000 items, file cached",
       quantile(opens, 0.5), "s", "one read of the file", quantile(reads, 0.5));
}

// Events a second, for some seconds: `event` returns false where it fails.
using Event = std::function<bool(std::size_t thread, std::size_t n, std::string_view user,
                                 std::string_view item, std::int64_t time)>;
double rate(std::size_t threads, double seconds, const Event& event) {
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> done{0};
  std::vector<std::thread> all;
  const auto begin = Clock::now();
  for (std::size_t t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t + 1));
      std::uint64_t n = 0;
      for (; !stop; ++n) {
        const std::string user = user_name(random() % 100'000);
        const std::string item = "i" + std::to_string(1000 + random() % (items - 1000));
        if (!event(t, n, user, item, start + static_cast<std::int64_t>(n / 1000)))
          fail("durability", "an event failed");
      }
      done += n;
    });
  rest(seconds);
  stop = true;
  for (std::thread& thread : all) thread.join();
  return static_cast<double>(done) / since(begin) * 1e6;
}

#if defined(PERSONALIZE_BENCH_SQLITE)
// A connection a thread, a transaction an event.
class Rows {
 public:
  Rows(const fs::path& path, const char* synchronous) {
    if (sqlite3_open(path.c_str(), &db_) != SQLITE_OK) fail("sqlite", sqlite3_errmsg(db_));
    sqlite3_busy_timeout(db_, 60'000);
    run("PRAGMA journal_mode = WAL");
    run(std::string("PRAGMA synchronous = ") + synchronous);
    run("CREATE TABLE IF NOT EXISTS events (user TEXT, item TEXT, type TEXT, timestamp INTEGER)");
    if (sqlite3_prepare_v2(db_, "INSERT INTO events VALUES (?, ?, ?, ?)", -1, &insert_, nullptr) !=
        SQLITE_OK)
      fail("sqlite", sqlite3_errmsg(db_));
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  ~Rows() {
    sqlite3_finalize(insert_);
    sqlite3_close(db_);
  }
  bool add(std::string_view user, std::string_view item, std::int64_t time) {
    bind(1, user);
    bind(2, item);
    bind(3, "click");
    sqlite3_bind_int64(insert_, 4, time);
    const bool done = sqlite3_step(insert_) == SQLITE_DONE;
    sqlite3_reset(insert_);
    return done;
  }

 private:
  void run(const std::string& statement) {
    if (sqlite3_exec(db_, statement.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK)
      fail("sqlite", sqlite3_errmsg(db_));
  }
  void bind(int at, std::string_view text) {
    sqlite3_bind_text(insert_, at, text.data(), static_cast<int>(text.size()), SQLITE_STATIC);
  }
  sqlite3* db_ = nullptr;
  sqlite3_stmt* insert_ = nullptr;
};
#endif

// Rounds in which all take turns; medians.
void durability() {
  constexpr double seconds = 2;
  struct Way {
    std::string name;
    std::size_t threads;
    std::function<double()> run;
    std::vector<double> rates = {};
  };
  const auto model = model_of(1);
  std::vector<Way> ways;
  const auto recorded = [&](pz::Recommender& shop, std::size_t threads) {
    return rate(
        threads, seconds,
        [&](std::size_t, std::size_t, std::string_view user, std::string_view item,
            std::int64_t time) {
          return shop.record({.user = user, .item = item, .event_type = "click", .timestamp = time})
              .has_value();
        });
  };
  for (const std::size_t threads : {std::size_t{1}, std::size_t{8}}) {
    ways.push_back({"without a journal", threads, [&, threads] {
                      auto shop = take("create", pz::Recommender::create(model, options_of()));
                      return recorded(shop, threads);
                    }});
    for (const auto& [durability, name] :
         {std::pair{pz::Durability::none, "Durability::none"},
          {pz::Durability::interval, "Durability::interval, 10 ms"},
          {pz::Durability::each_call, "Durability::each_call"}})
      ways.push_back({name, threads, [&, threads, durability = durability] {
                        const Temporary work("durability");
                        auto shop = take("open", pz::Recommender::open(work.path.string(), model,
                                                                       options_of(durability)));
                        return recorded(shop, threads);
                      }});
#if defined(PERSONALIZE_BENCH_SQLITE)
    for (const char* synchronous : {"NORMAL", "FULL"})
      ways.push_back(
          {std::string("SQLite, WAL, synchronous = ") + synchronous, threads,
           [threads, synchronous] {
             const Temporary work("sqlite");
             std::vector<std::unique_ptr<Rows>> rows;
             for (std::size_t t = 0; t < threads; ++t)
               rows.push_back(std::make_unique<Rows>(work.path / "events.db", synchronous));
             return rate(
                 threads, seconds,
                 [&](std::size_t t, std::size_t, std::string_view user, std::string_view item,
                     std::int64_t time) { return rows[t]->add(user, item, time); });
           }});
#endif
  }
  const int rounds = seconds_wanted > 0 ? static_cast<int>(seconds_wanted / seconds) : 5;
  for (int round = 0; round < rounds; ++round)
    for (Way& way : ways) way.rates.push_back(way.run());
  const auto median = [&](std::string_view name, std::size_t threads) {
    for (const Way& way : ways)
      if (way.name == name && way.threads == threads) return quantile(way.rates, 0.5);
    return 0.0;
  };
  for (const Way& way : ways) {
    const std::string peer = std::string("SQLite, WAL, synchronous = ") +
                             (way.name == "Durability::each_call" ? "FULL" : "NORMAL");
    const double peer_rate = median(peer, way.threads);
    line("events_a_second",
         way.name + (way.threads == 1 ? ", 1 thread" : ", 8 threads") +
             ", 100,000 users, 100,000 x 64 items, hidden 128",
         quantile(way.rates, 0.5), "events/s",
         way.name.starts_with("SQLite") || peer_rate == 0 ? "" : peer, peer_rate);
  }
}

// All at once: requests at full speed, updates, saves and swaps.
void soak() {
  constexpr std::size_t users = 20'000;
  const double minutes = (seconds_wanted > 0 ? seconds_wanted : 1800) / 60;
  const std::array<std::shared_ptr<const pz::Model>, 2> models{model_of(1), model_of(2, 1000)};
  const Temporary work("soak");
  pz::RecommenderOptions options = options_of();
  options.history_length = events_a_user;
  options.update_interval = std::chrono::seconds{2};
  auto shop = take("open", pz::Recommender::open(work.path.string(), models[0], options));
  fill(shop, users);
  std::vector<std::pair<double, double>> memory;
  Load load(shop, users);
  const auto begun = Clock::now();
  std::size_t saves = 0, swaps = 0;
  for (std::size_t second = 1; since(begun) < minutes * 60e6; ++second) {
    if (second % 5 == 0) (void)take("save", shop.save()), ++saves;
    if (second % 7 == 0) (void)take("swap", shop.swap(models[++swaps % 2]));
    std::this_thread::sleep_until(begun + second * std::chrono::seconds{1});
    const double minute = since(begun) / 60e6;
    memory.push_back({minute, mebibytes(resident())});
    if (second % 30 == 0)
      std::fprintf(stderr, "minute %.1f: %.1f MiB resident, %llu rounds of requests\n", minute,
                   memory.back().second, static_cast<unsigned long long>(load.done()));
  }
  load.stop();
  const std::string data = std::to_string(static_cast<int>(minutes)) + " minutes, " +
                           std::to_string(load.done()) + " rounds of requests on 2 threads, " +
                           std::to_string(saves) + " saves, " + std::to_string(swaps) +
                           " swaps, an update each 2 s";
  // What budgets let grow has grown in the first third.
  memory.erase(memory.begin(), memory.begin() + static_cast<std::ptrdiff_t>(memory.size() / 3));
  line("soak", data + ": rise of the resident memory", slope(memory), "MiB a minute",
       "resident at the end", memory.back().second);
  line("soak_failed", data, static_cast<double>(load.failures()), "requests");
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::pair<std::string_view, std::function<void()>>> figures{
      {"swap_beside_requests", swap_beside_requests},
      {"save_beside_requests", save_beside_requests},
      {"restart", restart},
      {"durability", durability},
      {"soak", soak},
  };
  std::vector<std::string_view> wanted;
  for (int a = 1; a < count; ++a) {
    const std::string_view argument = arguments[a];
    if (argument == "--folder" && a + 1 < count)
      folder = arguments[++a];
    else if (argument == "--seconds" && a + 1 < count)
      seconds_wanted = std::strtod(arguments[++a], nullptr);
    else
      wanted.push_back(argument);
  }
  const bool made = fs::create_directories(folder);
  for (const auto& [name, run] : figures)
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end()) run();
  if (made) fs::remove_all(folder);
  return 0;
}
