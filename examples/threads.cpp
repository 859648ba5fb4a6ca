// One recommender and as many threads as there are: every member may be called from any of them.
// usage: threads MODEL.pzm THREADS REQUESTS
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "threads: %s\n", message.c_str());
  return 1;
}

static bool read(std::string_view text, std::size_t& number) {
  const char* const end = text.data() + text.size();
  const auto [stop, bad] = std::from_chars(text.data(), end, number);
  return bad == std::errc{} && stop == end && number > 0;
}

int main(int argc, char** argv) {
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  std::size_t count = 0, requests = 0;
  if (argc != 4 || !read(arguments[2], count) || !read(arguments[3], requests)) {
    std::fputs("usage: threads MODEL.pzm THREADS REQUESTS\n", stderr);
    return 2;
  }
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  auto recommender = pz::Recommender::create(*model);
  if (!recommender) return fail(recommender.error().message);

  std::atomic<std::size_t> next{0}, picks{0}, failed{0};
  const auto work = [&] {
    pz::Slate slate;  // one a thread: once it has its size, a request takes no memory
    std::string user;
    for (std::size_t request; (request = next++) < requests;) {
      user = "user" + std::to_string(request % 1000);
      const auto item = static_cast<std::uint32_t>(request % (*model)->item_count());
      // An event and the next request of the same user may come on different threads.
      const bool done =
          recommender->record(
              {.user = user, .item = (*model)->item_id(item), .event_type = "click"}) &&
          recommender->recommend({.user = user, .count = 10}, slate);
      failed += done ? 0 : 1;
      picks += done ? slate.items.size() : 0;
    }
  };
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < count; ++t) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::printf("%zu requests, %zu picks, %zu failed, %zu users, %.0f requests a second\n", requests,
              picks.load(), failed.load(), recommender->user_count(),
              double(requests) / took.count());
  return failed == 0 ? 0 : 1;
}
