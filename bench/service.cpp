// What a server pays for updates and what it holds in memory. Prints one JSON line a figure, as
// figures.cpp does. Not pinned: requests and updates share the machine's cores.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
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

namespace {

constexpr std::int64_t start = 1'700'000'000;

// Of this thread, in milliseconds: what the machine's other work does not lengthen.
double processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
#else
  return since(Clock::time_point{}) / 1000;
#endif
}

std::shared_ptr<const pz::Model> model_of(std::size_t items, std::size_t d) {
  pz::ModelParts parts = parts_of(items, d, pz::ElementType::i8);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < items; ++i) {
    parts.statistics[i] = {1 + 1'000'000 / (i + 1), start - 400 * 86'400, start,
                           start - 400 * 86'400};
    parts.biases[i] = 0.1f * normal(random);
  }
  pz::MetadataField field;
  field.name = "GENRE";
  if (!field.vocabulary.add("bow")) std::abort();
  field.embedding = random_matrix(1, d, random);
  parts.fields.push_back(std::move(field));
  auto model = pz::Model::from_parts(std::move(parts));
  if (!model) std::abort();
  return *model;
}

pz::Recommender shop_of(const std::shared_ptr<const pz::Model>& model,
                        pz::RecommenderOptions options = {}) {
  options.recommendation_key = {{1, 2}};
  auto shop = pz::Recommender::create(model, options);
  if (!shop) {
    std::fprintf(stderr, "service: %s\n", shop.error().message.c_str());
    std::exit(1);
  }
  return std::move(*shop);
}

void require(bool done) {
  if (!done) std::abort();
}

void update_one_item() {
  auto shop = shop_of(model_of(1'000'000, 64), {.update_interval = {}});
  std::vector<double> times, bytes;
  for (int n = 0; n < 40; ++n) {
    require(shop.put_item({.item = "new" + std::to_string(n),
                           .creation_timestamp = start,
                           .fields = {{"GENRE", "bow"}}})
                .has_value());
    const double before = bytes_in_use();
    const double begin = processor_time();
    require(shop.update(start).has_value());
    times.push_back(processor_time() - begin);
    bytes.push_back(bytes_in_use() - before);
  }
  line("update_one_item", "one item with metadata into 1,000,000 x 64 int8", quantile(times, 0.5),
       "ms of CPU");
  line("update_one_item_slowest", "the slowest of 40", quantile(times, 1), "ms of CPU");
  line("update_one_item_memory", "taken while readers hold the generation before",
       mebibytes(bytes[0]), "MiB");
}

void update_fold() {
  constexpr std::size_t items = 100'000;
  const auto model = model_of(items, 64);
  auto shop = shop_of(model, {.update_interval = {}});
  std::vector<std::string> ids;
  for (std::size_t i = 0; i < items; ++i) ids.push_back("i" + std::to_string(i));
  std::vector<double> times;
  for (int round = 0; round < 12; ++round) {
    for (std::size_t u = 0; u < 200; ++u) {
      const std::string user = "u" + std::to_string(u + 1000 * static_cast<std::size_t>(round));
      require(shop.record({.user = user, .item = ids[(u * 37) % items], .timestamp = start})
                  .has_value());
      std::vector<std::string_view> shown;
      for (std::size_t i = 0; i < 500; ++i) shown.push_back(ids[(u * 500 + i) % items]);
      require(
          shop.record(
                  {.user = user, .item = shown[u % 500], .timestamp = start, .impressions = shown})
              .has_value());
    }
    const double begin = processor_time();
    require(shop.update(start).has_value());
    times.push_back(processor_time() - begin);
    require(shop.update_report().items_learnt >= 90'000);
  }
  times.erase(times.begin());
  line("update_fold",
       "counters and contexts of 100,000 x 64 items, each shown since the last update",
       quantile(times, 0.5), "ms of CPU");
}

// Two threads of requests at full speed, for five seconds without updates and for five with, by
// turns: one service at default options but for the interval, so that the recommender's own thread
// learns each second, and takes in the items that are put 50 times a second.
void update_beside_requests(std::size_t items) {
  constexpr double each = 5e6;
  const auto model = model_of(items, 64);
  const auto begun = Clock::now();
  // Stands still where no updates are wanted.
  std::atomic<std::int64_t> standing{0};
  const auto clock = [&] {
    const std::int64_t stands = standing;
    return stands != 0 ? stands : start + static_cast<std::int64_t>(since(begun) / 1e6);
  };
  auto shop = shop_of(model, {.update_interval = std::chrono::seconds{1}, .clock = clock});

  enum Phase { unmeasured, without, with };
  std::atomic<Phase> phase{unmeasured};
  std::atomic<bool> stop{false};
  using Latencies =
      std::array<std::array<std::vector<double>, 2>, 3>;  // [phase][record, recommend]
  std::array<Latencies, 2> of_threads;
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 2; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t + 1));
      pz::Slate slate;
      for (std::size_t n = 0; !stop; ++n) {
        const std::string user = "u" + std::to_string(random() % 1000);
        const std::string item = "i" + std::to_string(random() % items);
        auto& mine = of_threads[t][phase.load()];
        auto begin = Clock::now();
        require(
            shop.record({.user = user, .item = item, .recommendation_id = slate.id}).has_value());
        mine[0].push_back(since(begin));
        begin = Clock::now();
        require(shop.recommend({.user = user, .count = 25}, slate).has_value());
        mine[1].push_back(since(begin));
        // Seen by the same user, next time round.
        if (n % 4 == 0)
          require(
              shop.record_impression({.user = user, .recommendation_id = slate.id}).has_value());
      }
    });

  // What untried items are worth is learnt first, in passes over all items.
  for (int n = 0; n < 10; ++n) {
    std::this_thread::sleep_for(std::chrono::seconds{1});
    require(shop.update().has_value());
  }
  std::size_t updates = 0, put = 0;
  for (int round = 0; round < 8; ++round) {
    const bool updating = round % 2 == 1;
    standing = updating ? 0 : clock();
    phase = unmeasured;
    std::this_thread::sleep_for(std::chrono::seconds{2});  // an update may be under way
    phase = updating ? with : without;
    std::int64_t last = shop.update_report().timestamp;
    for (const auto begin = Clock::now(); since(begin) < each;) {
      if (updating)
        require(shop.put_item({.item = "new" + std::to_string(put++),
                               .creation_timestamp = start,
                               .fields = {{"GENRE", "bow"}}})
                    .has_value());
      std::this_thread::sleep_for(std::chrono::milliseconds{20});
      const pz::UpdateReport report = shop.update_report();
      updates += report.items_learnt > 0 && report.timestamp != last;
      last = report.timestamp;
    }
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  const std::string data = std::to_string(items) + " x 64, 2 threads of requests, " +
                           std::to_string(updates) + " times learnt in 20 s, quantile ";
  for (std::size_t call = 0; call < 2; ++call) {
    Latencies all;
    for (const Latencies& of_thread : of_threads)
      for (const Phase p : {without, with})
        all[p][call].insert(all[p][call].end(), of_thread[p][call].begin(),
                            of_thread[p][call].end());
    for (const double q : {0.5, 0.99, 0.999})
      line(std::string(call == 0 ? "record" : "recommend") + "_beside_updates",
           data + std::to_string(q).substr(0, 5), quantile(all[with][call], q), "us",
           "the same without updates", quantile(all[without][call], q));
  }
}

void memory() {
  constexpr std::size_t items = 1'000'000, users = 1'000'000;
  const auto model = model_of(items, 64);
  const double before = resident(), given_before = bytes_in_use();
  auto shop = shop_of(model, {.update_interval = {}});
  std::mt19937 random(1);
  std::vector<std::string> ids;
  for (std::size_t i = 0; i < items; ++i) ids.push_back("i" + std::to_string(i));
  for (std::size_t u = 0; u < users; ++u) {
    const std::string user = "user" + std::to_string(u);
    for (int e = 0; e < 50; ++e)
      require(
          shop.record({.user = user, .item = ids[random() % items], .timestamp = start + e * 60})
              .has_value());
  }
  pz::Slate slate;
  for (std::size_t n = 0; n < 10'000'000; ++n)
    require(shop.recommend(
                    {.user = "cold" + std::to_string(n % 100'000), .count = 5, .timestamp = start},
                    slate)
                .has_value());
  std::vector<std::string>().swap(ids);
#if defined(__GLIBC__)
  ::malloc_trim(0);
#endif
  const pz::MemoryUse use = shop.memory();
  const pz::RecommenderOptions options;
  const double budgets =
      static_cast<double>(options.user_bytes + options.slate_log_bytes + options.context_bytes +
                          options.pending_bytes + use.event_ids + use.catalogue + use.scratch);
  const std::string data =
      "1,000,000 users with 50 events, 1,000,000 items, 10 million slates asked";
  line("resident_growth", data, mebibytes(resident() - before), "MiB",
       "sum of the budgets, the catalogue and scratch", mebibytes(budgets));
  line("memory_reported", data, mebibytes(static_cast<double>(use.total())), "MiB",
       "given by the allocator", mebibytes(bytes_in_use() - given_before));
  std::fprintf(stderr,
               "users %zu: %.0f MiB, slates %.0f, contexts %.0f, event ids %.0f, catalogue %.0f, "
               "scratch %.1f\n",
               shop.user_count(), mebibytes(double(use.users)), mebibytes(double(use.slates)),
               mebibytes(double(use.contexts)), mebibytes(double(use.event_ids)),
               mebibytes(double(use.catalogue)), mebibytes(double(use.scratch)));
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string_view> wanted(arguments + 1, arguments + count);
  const std::vector<std::pair<std::string_view, std::function<void()>>> figures{
      {"update_one_item", update_one_item},
      {"update_fold", update_fold},
      {"update_beside_requests",
       [] {
         for (const std::size_t items : {100'000u, 1'000'000u}) update_beside_requests(items);
       }},
      {"memory", memory},
  };
  for (const auto& [name, run] : figures)
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end()) run();
  return 0;
}
