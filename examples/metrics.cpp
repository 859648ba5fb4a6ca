// What a server shows of itself: the log of impressions and choices, times, memory, updates.
// usage: metrics MODEL.pzm LOG.csv
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "metrics: %s\n", message.c_str());
  return 1;
}

// `personalize evaluate --protocol off-policy` reads it.
class Log {
 public:
  explicit Log(const char* path) : file_(path, std::ios::binary) { file_ << pz::log_csv_header; }

  // Called on each thread that records, several at once: one line is made by each, written by one.
  void write(const pz::LogEntry& entry) {
    thread_local std::string line;
    line.clear();
    pz::append_csv(entry, line);
    const std::lock_guard lock{mutex_};
    file_ << line;
  }
  bool close() {
    file_.close();
    return bool(file_);
  }

 private:
  std::mutex mutex_;
  std::ofstream file_;
};

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: metrics MODEL.pzm LOG.csv\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  Log log(arguments[2]);
  auto recommender = pz::Recommender::create(
      *model, {.log = [&log](const pz::LogEntry& entry) { log.write(entry); }});
  if (!recommender) return fail(recommender.error().message);

  constexpr std::size_t servers = 4, visits = 1000;
  std::vector<std::vector<double>> microseconds(servers);
  std::vector<std::size_t> failed(servers);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < servers; ++t)
    threads.emplace_back([&, t] {
      pz::Slate slate;
      for (std::size_t visit = 0; visit < visits; ++visit) {
        const std::string user = "user" + std::to_string(t) + "-" + std::to_string(visit);
        const auto begin = std::chrono::steady_clock::now();
        const bool answered = bool(recommender->recommend({.user = user, .count = 10}, slate));
        const std::chrono::duration<double, std::micro> took =
            std::chrono::steady_clock::now() - begin;
        microseconds[t].push_back(took.count());
        const bool counted =
            answered && !slate.items.empty() &&
            recommender->record({.user = user,
                                 .item = slate.items[visit % slate.items.size()].item,
                                 .event_type = "click",
                                 .recommendation_id = slate.id});
        failed[t] += counted ? 0 : 1;
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (auto updated = recommender->update(); !updated) return fail(updated.error().message);
  if (!log.close()) return fail(std::string(arguments[2]) + ": cannot write");

  std::vector<double> all;
  for (const auto& of : microseconds) all.insert(all.end(), of.begin(), of.end());
  std::sort(all.begin(), all.end());
  const pz::UpdateReport update = recommender->update_report();
  const pz::MemoryUse memory = recommender->memory();
  std::size_t failures = 0;
  for (const std::size_t of : failed) failures += of;
  std::printf("requests %zu\nfailed %zu\n", all.size(), failures);
  std::printf("recommend_microseconds{quantile=\"0.5\"} %.1f\n", all[all.size() / 2]);
  std::printf("recommend_microseconds{quantile=\"0.99\"} %.1f\n", all[all.size() * 99 / 100]);
  std::printf("users %zu\nitems %zu\n", recommender->user_count(), recommender->item_count());
  std::printf("memory_bytes{of=\"users\"} %zu\nmemory_bytes{of=\"catalogue\"} %zu\n", memory.users,
              memory.catalogue);
  std::printf("memory_bytes{of=\"all\"} %zu\n", memory.total());
  std::printf("update_timestamp %lld\nupdate_items_learnt %zu\nupdate_items_refused %zu\n",
              static_cast<long long>(update.timestamp), update.items_learnt, update.items_refused);
  return failures == 0 ? 0 : 1;
}
