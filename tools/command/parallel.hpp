// Jobs on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace personalize::tools {

// What --threads asks for: 0 is a thread a core.
inline unsigned thread_count(unsigned asked) {
  return asked > 0 ? asked : std::max(1u, std::thread::hardware_concurrency());
}

// Runs job(0) ... job(count - 1), each once, on up to `threads` threads, of which this is one. Each
// thread makes its own job by make_job(). The first exception ends all threads after the jobs that
// they are at, and is thrown again here.
template <class MakeJob>
void for_each_parallel(std::size_t count, std::size_t threads, const MakeJob& make_job) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      auto job = make_job();
      for (std::size_t i; (i = next.fetch_add(1)) < count;) job(i);
    } catch (...) {
      const std::lock_guard lock{mutex};
      if (!failure) failure = std::current_exception();
      next = count;
    }
  };
  {
    std::vector<std::jthread> others;
    others.reserve(std::min(threads, count));
    try {
      for (std::size_t t = 1; t < std::min(threads, count); ++t) others.emplace_back(work);
    } catch (const std::system_error&) {
      // No more threads to be had: those that there are do the work.
    }
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace personalize::tools
