// personalize_runtime.hpp - sequence-model recommendations inside your own process.
//
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the personalize_runtime authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software
// and associated documentation files (the "Software"), to deal in the Software without
// restriction, including without limitation the rights to use, copy, modify, merge, publish,
// distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
// Software is furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or
// substantial portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
// BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
// DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
//
// Loads a compact model file, keeps one recurrent state a user, and answers with exact top-k
// slates. Needs GCC or Clang with C++20, a little-endian target of 32 or 64 bits, xsimd
// (>= 8.1) and zstd (>= 1.5.4).
//
//   #include "personalize_runtime.hpp"
//   namespace pz = personalize;
//
//   auto model = pz::Model::load("model.pzm");
//   if (!model) return fail(model.error().message);
//   auto recommender = pz::Recommender::create(*model);
//   if (!recommender) return fail(recommender.error().message);
//
//   auto learned = recommender->record({.user = "u1", .item = "sword", .event_type = "click"});
//   if (!learned) return fail(learned.error().message);
//   auto slate = recommender->recommend({.user = "u1", .count = 25});
//   if (!slate) return fail(slate.error().message);
//   for (const pz::Pick& pick : slate->items) show(pick.item, pick.score, pz::name(pick.reason));
//
// How to think about it
//
//   A model file holds what training found: a vector and a bias for each item, and an encoder,
//   which is a short program of layers. It is immutable; load it once and share it.
//
//   A recommender serves it. For each user it keeps a state of fixed size, the encoder's hidden
//   vector. An event (record) moves that state by one step, whatever the length of the history. A
//   request (recommend) takes the state's query vector h and finds the items with the largest
//   u = h . v + b, exactly. Someone of whom nothing is known gets what is popular.
//
//   A session is a user without a name. It has a state of its own until merge_session, or an event
//   that names both, makes its events the user's.
//
//   A slate is what recommend returns: picks in order. Its id lets later events say what they
//   answer: that the slate was seen (impressions), and which pick was chosen (a positive event).
//   From these the recommender learns how much better or worse an item does than the model expects
//   (quality), who likes it (taste), and what this user passed over (discount): explain takes a
//   score apart.
//
//   The pool are young items of which little is known. Each place of a slate may go to one of them,
//   with a probability that exploration_weight sets and Pick::propensity tells. Where an item's
//   impressions have taught enough, it leaves the pool and stands by its own score.
//
//   An update folds in what was learnt and takes in items that were put or removed. It builds a new
//   generation of the catalogue, which shares with the old one what has not changed, and publishes
//   it by one pointer; requests never wait for it. A thread runs updates, unless RecommenderOptions
//   says otherwise; the model's weights change only by training.
//
//   Times are Unix seconds. Each event has its own, which concerns its user; everything that all
//   users share goes by one clock, and what lies ahead of it is refused.
//
//   Memory has budgets in bytes (RecommenderOptions): users, slates, contexts, items that wait.
//   Where one is used up the least recently used goes. memory() tells what was taken.
//
//   What comes from a client (ids, times, counts, lists) and from a file is hostile and checked;
//   what the program itself passes (options, callbacks, masks) is not. Errors are values: Result<T>
//   holds a T or an Error, a code and a sentence. Nothing is thrown or printed.
//
// clang-format off
// Contents (each room uses only earlier rooms; its banner says which)
//   0 preamble          version, macros, what a compiler must offer
//   1 interface         Errc, Error, Result<T>; options, items, events, requests, slates
//   2 basics            bytes and files, text and numbers, hashes, locks
//   3 instruction sets  integer products, scores and sums of each, scalar first
//   4 kernels           row scoring, matrix-vector products, gates, norms; dispatch
//   5 container         checked, compressed sections of a file
//   6 model             ids, item vectors, statistics, metadata, encoder operations; checks
//   7 model file        reading and writing; Model
//   8 encoder           one event in, new user state out
//   9 filters and rows  which items may be ranked; ids and vectors, shared between generations
//  10 scorer            exact top-k over the eligible items
//  11 counters          what is counted of items, by whom it was shown to and chosen; cuts
//  12 slates            recent impressions, the slates behind recommendation ids, the log
//  13 exploration       calibration, posterior, vector correction, slots with propensities; scratch
//  14 catalogue         the items as feedback has shaped them; how generations are built
//  15 lanes             how threads share a generation, each with the memory of its request
//  16 user              one user or session: state, remembered events and impressions
//  17 users             all of them, within a budget in bytes
//  18 blobs             users outside of a recommender, by names
//  19 gates             the window of event ids; the gate of time
//  20 folder            a folder that one process holds; files that grow at their end
//  21 journal           records that survive a crash: their format, reading, writing in groups
//  22 put items         items that were put and removed, and what waits for an update
//  23 state             all that a recommender knows, and turns to change it; how items rank
//  24 events            what events and slates change: resolved, noted in a journal, applied; users
//                       who leave, come back or move
//  25 updates           the next generation, by what was learnt or by another model; its thread
//  26 state file        all that is known, written beside traffic and read onto any model
//  27 persistence       a folder with a state file and a journal: opening, replaying, saving
//  28 recommender       Recommender: record, recommend, rank, put_item, update, swap, save
//  29 calls             its bodies
// clang-format on
#ifndef PERSONALIZE_RUNTIME_HPP
#define PERSONALIZE_RUNTIME_HPP

// ============================================================================================
// Room 0: preamble. Owns the version, every macro, and what a compiler must offer.
// ============================================================================================

#define PERSONALIZE_VERSION_MAJOR 0
#define PERSONALIZE_VERSION_MINOR 1
#define PERSONALIZE_VERSION_PATCH 0

// Set by the user, before the include or on the command line, alike in all of a program:
//   PERSONALIZE_NO_XSIMD  build with the scalar kernels only; xsimd is not included. Set by itself
//                         where xsimd knows nothing of the target
//   PERSONALIZE_NO_ZSTD   read and write stored (uncompressed) sections only; zstd is not included
//   PERSONALIZE_NO_THREADS  one thread calls, and none is started: Updates::by_thread is as
//                         in_requests. Set by itself where the standard library has no threads
//                         (WASI, Emscripten without -pthread)
//   PERSONALIZE_DISPATCH  the kernels are chosen when the program runs, from those that the library
//                         personalize::kernels holds; that CMake target defines it
//   PERSONALIZE_DECLARATIONS_ONLY  only what a program calls, which compiles in a second: errors,
//                         options, requests and slates, Model and its parts, ItemMask, Recommender,
//                         the log. One unit of the program has the bodies, or the library
//                         personalize::runtime_static, which defines this macro for its users
//   PERSONALIZE_IMPLEMENTATION  in that one unit, before the include: the bodies, for the others
//
// Found out here:
//   PERSONALIZE_HAS_EXCEPTIONS  0 under -fno-exceptions: then memory that cannot be had ends the
//                               program, as the standard library's containers do; 1: it is an Error
//   PERSONALIZE_HAS_POSIX       1 where files have descriptors, modes and links, and /dev/urandom
//   PERSONALIZE_AVX512_VNNI     1 where the flags allow the AVX-512 kernels
//   PERSONALIZE_INLINE, PERSONALIZE_UNROLL  hints to the compiler
//   PERSONALIZE_HAS_BODIES      0 for a unit that sees declarations only
//   PERSONALIZE_API             before each body of what is declared to such units: inline, but not
//                               in the one unit that has the bodies for all
//   PERSONALIZE_NAMESPACE       what a unit's flags allow, as a name: units with other flags share
//                               no function. Units with declarations only and the one with the
//                               bodies share theirs

#if defined(_MSC_VER) && !defined(__clang__)
#error "personalize_runtime.hpp needs GCC or Clang; with Visual Studio, its clang-cl toolset does."
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "personalize_runtime.hpp needs a little-endian target: model files are read as they lie."
#endif
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error \
    "personalize_runtime.hpp cannot be built with -ffast-math: it tells finite values from others."
#endif

#if defined(__cpp_exceptions)
#define PERSONALIZE_HAS_EXCEPTIONS 1
#else
#define PERSONALIZE_HAS_EXCEPTIONS 0
#endif

#if defined(__unix__) || defined(__APPLE__)
#define PERSONALIZE_HAS_POSIX 1
#else
#define PERSONALIZE_HAS_POSIX 0
#endif

#if defined(PERSONALIZE_IMPLEMENTATION)
#define PERSONALIZE_HAS_BODIES 1
#define PERSONALIZE_API
#elif defined(PERSONALIZE_DECLARATIONS_ONLY)
#define PERSONALIZE_HAS_BODIES 0
#else
#define PERSONALIZE_HAS_BODIES 1
#define PERSONALIZE_API inline
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>
#if PERSONALIZE_HAS_POSIX
#include <sys/mman.h>
#endif

#if PERSONALIZE_HAS_BODIES
#include <bitset>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <unordered_map>

#if !defined(PERSONALIZE_NO_THREADS)
#if (defined(__wasi__) && !defined(_REENTRANT)) ||                                                \
    (defined(__EMSCRIPTEN__) && !defined(__EMSCRIPTEN_PTHREADS__)) ||                             \
    (defined(_LIBCPP_VERSION) && (defined(_LIBCPP_HAS_NO_THREADS) ||                              \
                                  (defined(_LIBCPP_HAS_THREADS) && _LIBCPP_HAS_THREADS == 0))) || \
    (defined(__GLIBCXX__) && !defined(_GLIBCXX_HAS_GTHREADS))
#define PERSONALIZE_NO_THREADS
#endif
#endif
#if !defined(PERSONALIZE_NO_THREADS)
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

#if PERSONALIZE_HAS_POSIX
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <random>
#if defined(_WIN32)
#include <direct.h>
#include <fcntl.h>
#include <io.h>
#include <share.h>
#include <sys/stat.h>
extern "C" {
__declspec(dllimport) int __stdcall MoveFileExW(const wchar_t*, const wchar_t*, unsigned long);
__declspec(dllimport) unsigned long __stdcall GetLastError();
__declspec(dllimport) int __stdcall MultiByteToWideChar(unsigned, unsigned long, const char*, int,
                                                        wchar_t*, int);
__declspec(dllimport) int __stdcall WideCharToMultiByte(unsigned, unsigned long, const wchar_t*,
                                                        int, char*, int, const char*, int*);
}
#endif
#endif
#endif  // PERSONALIZE_HAS_BODIES

// GCC 12 takes the deliberately undefined operands in its own AVX-512 intrinsics for mistakes (GCC
// bug 105593) when they are inlined into code with -Wmaybe-uninitialized.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if PERSONALIZE_HAS_BODIES && !defined(PERSONALIZE_NO_XSIMD)
#include <xsimd/xsimd.hpp>
#if defined(XSIMD_NO_SUPPORTED_ARCHITECTURE)
#define PERSONALIZE_NO_XSIMD
#endif
#endif
#if PERSONALIZE_HAS_BODIES && !defined(PERSONALIZE_NO_ZSTD)
#include <zstd.h>
#endif

#if PERSONALIZE_HAS_BODIES && !defined(PERSONALIZE_NO_XSIMD) && defined(__AVX512VNNI__) && \
    defined(__AVX512VL__)
#if XSIMD_WITH_AVX512BW
#define PERSONALIZE_AVX512_VNNI 1
#endif
#endif

#if !defined(PERSONALIZE_NO_XSIMD) && defined(XSIMD_VERSION_MAJOR)
#if XSIMD_VERSION_MAJOR < 8 || (XSIMD_VERSION_MAJOR == 8 && XSIMD_VERSION_MINOR < 1)
#error "personalize_runtime.hpp needs xsimd 8.1 or newer, or PERSONALIZE_NO_XSIMD."
#endif
#endif
#if !defined(PERSONALIZE_NO_ZSTD) && defined(ZSTD_VERSION_NUMBER) && ZSTD_VERSION_NUMBER < 10504
#error "personalize_runtime.hpp needs zstd 1.5.4 or newer, or PERSONALIZE_NO_ZSTD."
#endif

// Short loops over registers; at -O2 GCC would keep such an array in memory.
#if defined(__clang__)
#define PERSONALIZE_UNROLL _Pragma("unroll")
#else
#define PERSONALIZE_UNROLL _Pragma("GCC unroll 16")
#endif
// Also of every function that only prefetches: GCC takes one for without effect and leaves its
// calls out.
#define PERSONALIZE_INLINE __attribute__((always_inline))
#define PERSONALIZE_QUOTED(x) #x
#define PERSONALIZE_DOTTED(a, b, c) PERSONALIZE_QUOTED(a.b.c)

// The name of what flags allow: a hexadecimal digit for each four macros, a bit for each that is
// 1. Those of instruction sets that compilers use by themselves, then what functions depend on.
// clang-format off
#define PERSONALIZE_DIGIT_0000 0
#define PERSONALIZE_DIGIT_0001 1
#define PERSONALIZE_DIGIT_0010 2
#define PERSONALIZE_DIGIT_0011 3
#define PERSONALIZE_DIGIT_0100 4
#define PERSONALIZE_DIGIT_0101 5
#define PERSONALIZE_DIGIT_0110 6
#define PERSONALIZE_DIGIT_0111 7
#define PERSONALIZE_DIGIT_1000 8
#define PERSONALIZE_DIGIT_1001 9
#define PERSONALIZE_DIGIT_1010 a
#define PERSONALIZE_DIGIT_1011 b
#define PERSONALIZE_DIGIT_1100 c
#define PERSONALIZE_DIGIT_1101 d
#define PERSONALIZE_DIGIT_1110 e
#define PERSONALIZE_DIGIT_1111 f
#define PERSONALIZE_COMMA_1 0,
#define PERSONALIZE_SECOND(first, second, ...) second
#define PERSONALIZE_SECOND_OF(...) PERSONALIZE_SECOND(__VA_ARGS__)
#define PERSONALIZE_BIT_OF(comma) PERSONALIZE_SECOND_OF(comma 1, 0, 0)
#define PERSONALIZE_BIT(x) PERSONALIZE_BIT_OF(PERSONALIZE_PASTE(PERSONALIZE_COMMA_, x))
#define PERSONALIZE_PASTED(a, b) a##b
#define PERSONALIZE_PASTE(a, b) PERSONALIZE_PASTED(a, b)
#define PERSONALIZE_JOINED(a, b, c, d) a##b##c##d
#define PERSONALIZE_JOIN(a, b, c, d) PERSONALIZE_JOINED(a, b, c, d)
#define PERSONALIZE_DIGIT(a, b, c, d) PERSONALIZE_PASTE(PERSONALIZE_DIGIT_, \
  PERSONALIZE_JOIN(PERSONALIZE_BIT(a), PERSONALIZE_BIT(b), PERSONALIZE_BIT(c), PERSONALIZE_BIT(d)))
#define PERSONALIZE_FLAGS \
  PERSONALIZE_PASTE(flags_, PERSONALIZE_PASTE(PERSONALIZE_JOIN( \
    PERSONALIZE_DIGIT(__SSE__, __SSE2__, __SSE3__, __SSSE3__), \
    PERSONALIZE_DIGIT(__SSE4_1__, __SSE4_2__, __POPCNT__, __AVX__), \
    PERSONALIZE_DIGIT(__FMA__, __F16C__, __BMI__, __BMI2__), \
    PERSONALIZE_DIGIT(__LZCNT__, __MOVBE__, __AVX2__, __AVXVNNI__)), \
  PERSONALIZE_PASTE(PERSONALIZE_JOIN( \
    PERSONALIZE_DIGIT(__AVX512F__, __AVX512CD__, __AVX512BW__, __AVX512DQ__), \
    PERSONALIZE_DIGIT(__AVX512VL__, __AVX512VNNI__, __AVX512VBMI__, __FMA4__), \
    PERSONALIZE_DIGIT(__ARM_NEON, __ARM_FEATURE_FMA, __ARM_FEATURE_DOTPROD, __ARM_FEATURE_ATOMICS), \
    PERSONALIZE_DIGIT(__ARM_FEATURE_SVE, __wasm_simd128__, __EXCEPTIONS, __GXX_RTTI)), \
    PERSONALIZE_DIGIT(PERSONALIZE_WITHOUT_XSIMD, PERSONALIZE_WITHOUT_ZSTD, \
                      PERSONALIZE_WITHOUT_THREADS, 0))))
// clang-format on
#if defined(PERSONALIZE_NO_XSIMD)
#define PERSONALIZE_WITHOUT_XSIMD 1
#endif
#if defined(PERSONALIZE_NO_ZSTD)
#define PERSONALIZE_WITHOUT_ZSTD 1
#endif
#if defined(PERSONALIZE_NO_THREADS)
#define PERSONALIZE_WITHOUT_THREADS 1
#endif
#if defined(PERSONALIZE_IMPLEMENTATION) || defined(PERSONALIZE_DECLARATIONS_ONLY)
#define PERSONALIZE_NAMESPACE separate
#elif defined(PERSONALIZE_DISPATCH)
#define PERSONALIZE_NAMESPACE PERSONALIZE_PASTE(PERSONALIZE_FLAGS, _dispatched)
#else
#define PERSONALIZE_NAMESPACE PERSONALIZE_FLAGS
#endif
// Rooms 3 and 4 bear the names of instruction sets; the library has them for units of any flags.
#if defined(PERSONALIZE_DISPATCH)
#define PERSONALIZE_KERNELS_NAMESPACE dispatched
#else
#define PERSONALIZE_KERNELS_NAMESPACE PERSONALIZE_NAMESPACE
#endif

// The 387's registers round a float later than all others do: slates would not be the same.
#if defined(__i386__) && !defined(__SSE2_MATH__)
#if defined(__clang__)
#error "personalize_runtime.hpp needs SSE2 on 32-bit x86: add -msse2 -mfpmath=sse."
#endif
#pragma GCC push_options
#pragma GCC target("sse2,fpmath=sse")
#endif

namespace personalize {
inline namespace v1 {
inline namespace PERSONALIZE_NAMESPACE {

static_assert(std::numeric_limits<float>::is_iec559 && sizeof(float) == 4);

#if PERSONALIZE_HAS_BODIES

namespace detail {

#ifndef PERSONALIZE_NO_THREADS
inline constexpr bool has_threads = true;
using std::adopt_lock, std::try_to_lock;
using std::atomic, std::memory_order_relaxed, std::memory_order_acquire, std::memory_order_release;
using std::condition_variable, std::mutex, std::lock_guard, std::unique_lock;
using std::thread;
inline std::size_t thread_number() noexcept {
  return std::hash<thread::id>{}(std::this_thread::get_id());
}
inline void yield() noexcept { std::this_thread::yield(); }
#else
// What the same calls are where there is one thread: nobody to wait for, to wake or to exclude.
inline constexpr bool has_threads = false;
inline constexpr int memory_order_relaxed = 0, memory_order_acquire = 0, memory_order_release = 0;
template <class T>
class atomic {
 public:
  static constexpr bool is_always_lock_free = true;
  constexpr atomic(T value = {}) noexcept : value_(value) {}
  atomic(const atomic&) = delete;
  atomic& operator=(const atomic&) = delete;
  T operator=(T value) noexcept { return value_ = value; }
  T load(int = 0) const noexcept { return value_; }
  void store(T value, int = 0) noexcept { value_ = value; }
  T exchange(T value, int = 0) noexcept { return std::exchange(value_, value); }
  T fetch_add(T value, int = 0) noexcept { return std::exchange(value_, value_ + value); }
  T fetch_or(T value, int = 0) noexcept { return std::exchange(value_, value_ | value); }
  bool compare_exchange_strong(T& expected, T value, int = 0) noexcept {
    return compare_exchange_weak(expected, value);
  }
  bool compare_exchange_weak(T& expected, T value, int = 0) noexcept {
    const bool same = value_ == expected;
    (same ? value_ : expected) = same ? value : value_;
    return same;
  }

 private:
  T value_;
};
inline void yield() noexcept {}
struct mutex {
  void lock() noexcept {}
  bool try_lock() noexcept { return true; }
  void unlock() noexcept {}
};
struct try_to_lock_t {};
inline constexpr try_to_lock_t try_to_lock{};
struct adopt_lock_t {};
inline constexpr adopt_lock_t adopt_lock{};
// Holds what it was given for as long as it is there.
template <class Mutex>
class unique_lock {
 public:
  explicit unique_lock(Mutex& held) : mutex_(held) { lock(); }
  unique_lock(Mutex& held, try_to_lock_t) : mutex_(held), held_(held.try_lock()) {}
  unique_lock(Mutex& held, adopt_lock_t) : mutex_(held), held_(true) {}
  unique_lock(const unique_lock&) = delete;
  unique_lock& operator=(const unique_lock&) = delete;
  ~unique_lock() {
    if (held_) mutex_.unlock();
  }
  explicit operator bool() const noexcept { return held_; }
  void lock() {
    mutex_.lock();
    held_ = true;
  }
  void unlock() {
    mutex_.unlock();
    held_ = false;
  }
  void release() noexcept { held_ = false; }

 private:
  Mutex& mutex_;
  bool held_ = false;
};
template <class Mutex>
struct lock_guard : unique_lock<Mutex> {
  explicit lock_guard(Mutex& held) : unique_lock<Mutex>(held) {}
};
struct condition_variable {
  void notify_one() noexcept {}
  void notify_all() noexcept {}
  template <class Lock, class Until>
  void wait(Lock&, Until) noexcept {}
  template <class Lock, class Time, class Until>
  bool wait_for(Lock&, Time, Until until) {
    return until();
  }
};
struct thread {  // none of which is ever started
  thread() = default;
  template <class Call>
  explicit thread(Call) noexcept {}
  bool joinable() const noexcept { return false; }
  void join() noexcept {}
};
inline std::size_t thread_number() noexcept { return 0; }
#endif

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 1: interface. Owns what goes into a recommender and what comes out of it, as plain data:
// errors, options, items, events, requests and slates. Uses nothing.
// ============================================================================================

enum class Errc : std::uint8_t {
  io,                // a file cannot be opened, read, written or renamed
  format,            // the bytes are not a model file
  version,           // the file was written for a newer major version of the format
  truncated,         // the file ends before what it declares
  checksum,          // the bytes differ from those that were written
  compression,       // a section does not decompress to its declared size
  corrupt,           // sizes, shapes or values contradict one another
  limit,             // the file asks for more than LoadLimits allows
  unsupported,       // this build lacks what is needed (zstd), or an unknown operation
  invalid_argument,  // an argument is outside its stated range
  unknown_item,      // no such item in the catalogue
  out_of_memory,     // memory could not be had; nothing was changed
  cancelled,         // LoadOptions::progress asked to stop
};

constexpr std::string_view name(Errc code) noexcept {
  switch (code) {
    case Errc::io:
      return "io";
    case Errc::format:
      return "format";
    case Errc::version:
      return "version";
    case Errc::truncated:
      return "truncated";
    case Errc::checksum:
      return "checksum";
    case Errc::compression:
      return "compression";
    case Errc::corrupt:
      return "corrupt";
    case Errc::limit:
      return "limit";
    case Errc::unsupported:
      return "unsupported";
    case Errc::invalid_argument:
      return "invalid argument";
    case Errc::unknown_item:
      return "unknown item";
    case Errc::out_of_memory:
      return "out of memory";
    case Errc::cancelled:
      return "cancelled";
  }
  return "unknown";
}

// What went wrong, in words for a log line. `offset` is a byte position in the file where one is
// known.
struct Error {
  Errc code;
  std::string message;
  std::optional<std::uint64_t> offset;

  // Out of line, since a hundred functions return errors and each would compile them.
  [[gnu::noinline]] Error(Errc which, const char* text) : code(which), message(text) {}
  [[gnu::noinline]] Error(Errc which, std::string text,
                          std::optional<std::uint64_t> at = std::nullopt) noexcept
      : code(which), message(std::move(text)), offset(at) {}
  [[gnu::noinline]] Error(const Error& other) = default;
  [[gnu::noinline]] Error(Error&& other) noexcept = default;
  [[gnu::noinline]] Error& operator=(const Error& other) = default;
  [[gnu::noinline]] Error& operator=(Error&& other) noexcept = default;
  [[gnu::noinline]] ~Error() = default;
};

// A value or an Error. Never throws; reading the wrong side is a programming error (asserted). Of a
// Result that is about to go, * gives the value itself, so that a loop over `(*call()).items` has
// something to go over; what -> gives lives no longer than the Result.
template <class T>
class [[nodiscard]] Result {
  static_assert(std::is_nothrow_move_constructible_v<T>);

 public:
  Result(T value) noexcept : value_(std::move(value)), has_value_(true) {}
  Result(Error error) noexcept : error_(std::move(error)), has_value_(false) {}
  Result(const Result& other) requires std::is_copy_constructible_v<T>
      : has_value_(other.has_value_) {
    if (has_value_)
      ::new (static_cast<void*>(&value_)) T(other.value_);
    else
      ::new (static_cast<void*>(&error_)) Error(other.error_);
  }
  Result(Result&& other) noexcept { take(other); }
  Result& operator=(Result other) noexcept {
    destroy();
    take(other);
    return *this;
  }
  ~Result() { destroy(); }

  explicit operator bool() const noexcept { return has_value_; }
  bool has_value() const noexcept { return has_value_; }
  T& operator*() & noexcept { return *pointer(); }
  const T& operator*() const& noexcept { return *pointer(); }
  T operator*() && { return std::move(*pointer()); }
  T* operator->() noexcept { return pointer(); }
  const T* operator->() const noexcept { return pointer(); }
  const Error& error() const noexcept {
    assert(!has_value_);
    return error_;
  }

 private:
  T* pointer() noexcept {
    assert(has_value_);
    return &value_;
  }
  const T* pointer() const noexcept {
    assert(has_value_);
    return &value_;
  }
  void take(Result& other) noexcept {
    has_value_ = other.has_value_;
    if (has_value_)
      ::new (static_cast<void*>(&value_)) T(std::move(other.value_));
    else
      ::new (static_cast<void*>(&error_)) Error(std::move(other.error_));
  }
  void destroy() noexcept {
    if (has_value_)
      value_.~T();
    else
      error_.~Error();
  }

  union {
    T value_;
    Error error_;
  };
  bool has_value_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}
  explicit operator bool() const noexcept { return !error_.has_value(); }
  bool has_value() const noexcept { return !error_.has_value(); }
  const Error& error() const noexcept {
    assert(error_.has_value());
    return *error_;
  }

 private:
  std::optional<Error> error_;
};

namespace detail {

// Where a PlainVector's elements lie. From a line of the cache on: a load that straddles two lines
// costs twice as much, and a row that does comes from memory as two. What is large then begins at a
// huge page and asks Linux for such pages: a row anywhere in 64 MB would wait for its page's
// address first.
enum class Layout : std::uint8_t {
  anywhere,
  lines,
  bare,  // lines, of which resize() leaves what it adds as it is: memory that nothing was written
         // to takes no pages, and costs nothing to take
};

inline constexpr std::align_val_t cache_line{64};
inline constexpr std::size_t huge_bytes = std::size_t{1} << 22, huge_page = std::size_t{1} << 21;

// The most that one program can hold, of whatever.
inline constexpr std::size_t most_memory = std::numeric_limits<std::ptrdiff_t>::max();

#if defined(__linux__)
// A multiple of any page's size.
inline std::size_t whole_pages(std::size_t bytes) noexcept {
  constexpr std::size_t pages = std::size_t{1} << 16;
  return (bytes + pages - 1) / pages * pages;
}

// What is large is mapped on its own, and goes back to the system at once: glibc takes arrays of up
// to 32 MB from its heaps, where models and catalogues that come and go would leave holes.
// Null where there is none.
inline void* map_memory(std::size_t bytes) noexcept {
  const std::size_t wanted = whole_pages(bytes);
  void* const mapped = ::mmap(nullptr, wanted + huge_page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const std::size_t before = (0 - reinterpret_cast<std::uintptr_t>(mapped)) % huge_page;
  auto* const memory = static_cast<std::byte*>(mapped) + before;
  if (before > 0) (void)::munmap(mapped, before);
  (void)::munmap(memory + wanted, huge_page - before);
#if defined(MADV_HUGEPAGE)
  (void)::madvise(memory, wanted, MADV_HUGEPAGE);
#endif
  return memory;
}
#endif

[[noreturn]] inline void no_memory() {
#if PERSONALIZE_HAS_EXCEPTIONS
  throw std::bad_alloc();
#else
  std::terminate();
#endif
}

inline void* take_memory(std::size_t bytes, bool lines) {
  if (bytes >= most_memory) no_memory();
#if defined(__linux__)
  if (bytes >= huge_bytes) {
    void* const memory = map_memory(bytes);
    if (!memory) no_memory();
    return memory;
  }
#endif
  return lines ? ::operator new(bytes, cache_line) : ::operator new(bytes);
}

inline void give_memory(void* memory, std::size_t bytes, bool lines) noexcept {
#if defined(__linux__)
  if (bytes >= huge_bytes) {
    (void)::munmap(memory, whole_pages(bytes));
    return;
  }
#endif
  if (lines)
    ::operator delete(memory, cache_line);
  else
    ::operator delete(memory);
}

// The sizes of a PlainVector in bytes, and what changes them: one function for all types.
struct RawVector {
  void* data = nullptr;
  std::size_t used = 0, capacity = 0;

  [[gnu::noinline]] void move_to(std::size_t bytes, bool lines) {
    void* const fresh = take_memory(bytes, lines);
    if (used > 0) std::memcpy(fresh, data, used);
    if (data) give_memory(data, capacity, lines);
    data = fresh;
    capacity = bytes;
  }
  // For so many more, by doubling.
  [[gnu::noinline]] void grow(std::size_t more, bool lines) {
    const std::size_t doubled = used > most_memory / 2 ? most_memory : 2 * used;
    move_to(more > most_memory - used ? most_memory : std::max(doubled, used + more), lines);
  }
};

// A std::vector of what memcpy copies. It is ours so that units with other flags share no function,
// that all types share what little there is to compile, and that memory can be left as it is.
template <class T, Layout layout>
class PlainVector {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(layout != Layout::bare || std::is_trivially_default_constructible_v<T>);
  static_assert(alignof(T) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);

 public:
  using value_type = T;
  using size_type = std::size_t;
  using difference_type = std::ptrdiff_t;
  using reference = T&;
  using const_reference = const T&;
  using pointer = T*;
  using const_pointer = const T*;
  using iterator = T*;
  using const_iterator = const T*;

  PlainVector() = default;
  explicit PlainVector(std::size_t size) { resize(size); }
  PlainVector(std::size_t size, const T& value) { resize(size, value); }
  template <std::forward_iterator Iterator>
  PlainVector(Iterator first, Iterator last) {
    assign(first, last);
  }
  PlainVector(std::initializer_list<T> values) { assign(values.begin(), values.end()); }
  PlainVector(const std::vector<T>& values) { assign(values.begin(), values.end()); }
  PlainVector(const PlainVector& other) { assign(other.begin(), other.end()); }
  PlainVector(PlainVector&& other) noexcept : raw_(std::exchange(other.raw_, {})) {}
  PlainVector& operator=(const PlainVector& other) {
    if (this != &other) assign(other.begin(), other.end());
    return *this;
  }
  PlainVector& operator=(PlainVector&& other) noexcept {
    PlainVector(std::move(other)).swap(*this);
    return *this;
  }
  ~PlainVector() {
    if (raw_.data) give_memory(raw_.data, raw_.capacity, lines);
  }
  operator std::vector<T>() const { return std::vector<T>(begin(), end()); }

  T* data() noexcept { return static_cast<T*>(raw_.data); }
  const T* data() const noexcept { return static_cast<const T*>(raw_.data); }
  std::size_t size() const noexcept { return raw_.used / sizeof(T); }
  std::size_t capacity() const noexcept { return raw_.capacity / sizeof(T); }
  bool empty() const noexcept { return raw_.used == 0; }
  T* begin() noexcept { return data(); }
  const T* begin() const noexcept { return data(); }
  T* end() noexcept { return data() + size(); }
  const T* end() const noexcept { return data() + size(); }
  auto rbegin() noexcept { return std::reverse_iterator(end()); }
  auto rbegin() const noexcept { return std::reverse_iterator(end()); }
  auto rend() noexcept { return std::reverse_iterator(begin()); }
  auto rend() const noexcept { return std::reverse_iterator(begin()); }
  T& operator[](std::size_t at) noexcept {
    assert(at < size());
    return data()[at];
  }
  const T& operator[](std::size_t at) const noexcept {
    assert(at < size());
    return data()[at];
  }
  T& front() noexcept { return (*this)[0]; }
  const T& front() const noexcept { return (*this)[0]; }
  T& back() noexcept { return (*this)[size() - 1]; }
  const T& back() const noexcept { return (*this)[size() - 1]; }

  void swap(PlainVector& other) noexcept { std::swap(raw_, other.raw_); }
  void clear() noexcept { raw_.used = 0; }
  void reserve(std::size_t size) {
    if (size > capacity()) raw_.move_to(bytes_of(size), lines);
  }
  void shrink_to_fit() {
    if (empty())
      PlainVector().swap(*this);
    else if (raw_.capacity > raw_.used)
      raw_.move_to(raw_.used, lines);
  }
  void resize(std::size_t size) {
    T* const old_end = reach(size);
    if constexpr (layout != Layout::bare)
      for (T* each = old_end; each < end(); ++each) ::new (static_cast<void*>(each)) T();
  }
  void resize(std::size_t size, const T& value) {
    const T copy = value;  // it may lie in here
    for (T* each = reach(size); each < end(); ++each) ::new (static_cast<void*>(each)) T(copy);
  }
  void push_back(const T& value) {
    const T copy = value;
    if (raw_.capacity - raw_.used < sizeof(T)) raw_.grow(sizeof(T), lines);
    ::new (static_cast<void*>(end())) T(copy);
    raw_.used += sizeof(T);
  }
  template <class... Values>
  T& emplace_back(Values&&... values) {
    push_back(T{std::forward<Values>(values)...});
    return back();
  }
  void pop_back() noexcept {
    assert(!empty());
    raw_.used -= sizeof(T);
  }
  template <std::forward_iterator Iterator>
  void assign(Iterator first, Iterator last) {
    clear();
    insert(end(), first, last);
  }
  void assign(std::size_t size, const T& value) {
    const T copy = value;
    clear();
    resize(size, copy);
  }
  // No element of this vector is among those that are inserted.
  template <std::forward_iterator Iterator>
  T* insert(const T* at, Iterator first, Iterator last) {
    T* const gap = open(at, static_cast<std::size_t>(std::distance(first, last)));
    std::uninitialized_copy(first, last, gap);
    return gap;
  }
  T* insert(const T* at, std::size_t count, const T& value) {
    const T copy = value;
    T* const gap = open(at, count);
    std::uninitialized_fill_n(gap, count, copy);
    return gap;
  }
  T* insert(const T* at, const T& value) { return insert(at, 1, value); }
  T* erase(const T* at) noexcept { return erase(at, at + 1); }
  T* erase(const T* first, const T* last) noexcept {
    T* const to = data() + (first - data());
    const auto after = static_cast<std::size_t>(end() - last) * sizeof(T);
    if (after > 0 && first != last) std::memmove(static_cast<void*>(to), last, after);
    raw_.used -= static_cast<std::size_t>(last - first) * sizeof(T);
    return to;
  }
  friend bool operator==(const PlainVector& a, const PlainVector& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

 private:
  static constexpr bool lines = layout != Layout::anywhere;

  static std::size_t bytes_of(std::size_t size) noexcept {
    return size > most_memory / sizeof(T) ? most_memory : size * sizeof(T);
  }
  // Of another size; where what is new in it begins.
  T* reach(std::size_t size) {
    const std::size_t bytes = bytes_of(size), old = std::min(raw_.used, bytes);
    if (bytes > raw_.capacity) raw_.grow(bytes - raw_.used, lines);
    raw_.used = bytes;
    return data() + old / sizeof(T);
  }
  T* open(const T* at, std::size_t count) {
    const std::size_t before = static_cast<std::size_t>(at - data()) * sizeof(T),
                      bytes = bytes_of(count), after = raw_.used - before;
    if (bytes > raw_.capacity - raw_.used) raw_.grow(bytes, lines);
    auto* const gap = static_cast<std::byte*>(raw_.data) + before;
    if (after > 0) std::memmove(gap + bytes, gap, after);
    raw_.used += bytes;
    return static_cast<T*>(static_cast<void*>(gap));
  }

  RawVector raw_;
};

template <class T>
using LineVector = PlainVector<T, Layout::lines>;
template <class T>
using BareVector = PlainVector<T, Layout::bare>;

// For what memcpy cannot copy.
template <class T>
struct UnitAllocator {
  using value_type = T;
  UnitAllocator() = default;
  template <class Other>
  UnitAllocator(const UnitAllocator<Other>&) noexcept {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T))); }
  void deallocate(T* p, std::size_t) noexcept { ::operator delete(p); }
  friend bool operator==(const UnitAllocator&, const UnitAllocator&) noexcept { return true; }
};

}  // namespace detail

// A std::vector of types that are not this library's, of which units with other flags share no
// function: std::vector<float> has one name in all of them. What is plain compiles faster in it,
// and lies in it within the library; in the interface types of ours lie in a std::vector.
template <class T>
struct Vector : std::vector<T, detail::UnitAllocator<T>> {
  using std::vector<T, detail::UnitAllocator<T>>::vector;
  Vector(const std::vector<T>& other) : Vector(other.begin(), other.end()) {}
  operator std::vector<T>() const { return {this->begin(), this->end()}; }
};
template <class T>
requires(std::is_trivially_copyable_v<T>&& std::is_copy_constructible_v<T>) struct Vector<T>
    : detail::PlainVector<T, detail::Layout::anywhere> {
  using detail::PlainVector<T, detail::Layout::anywhere>::PlainVector;
};

class ItemMask;
struct LogEntry;

// Of a time that is not known.
inline constexpr std::int64_t no_timestamp = std::numeric_limits<std::int64_t>::min();

// Who runs automatic updates.
enum class Updates : std::uint8_t {
  by_thread,    // a thread that create() starts and the destructor joins; while requests are under
                // way it rests between pieces of a millisecond, so that they hardly notice it.
                // Without threads (PERSONALIZE_NO_THREADS): as in_requests
  by_caller,    // the caller: update() when update_due() says so, from a scheduler of its own
  in_requests,  // the record or recommend that finds one due, which then takes that much longer
};

// What a call that was acknowledged survives. Its bytes were handed to the operating system, so the
// end of the process, however it comes, costs nothing; what a power cut or the system's end costs:
enum class Durability : std::uint8_t {
  each_call,  // nothing: what was written is synced before; calls at the same time share a sync
  interval,   // at most what was acknowledged in the last interval: a sync every 10 ms
  none,       // what the system had not written by itself, on Linux usually half a minute's
};

struct RecommenderOptions {
  std::uint32_t history_length = 200;  // events remembered a user, [1, 65535]
  // Users and sessions remembered: at most so many, [64, 2^40], in so many bytes, [2^16, 2^50]; the
  // least recently used go. At a hidden dimension of 128 a user with 50 events takes 2 KiB.
  std::uint64_t max_users = 10'000'000;
  std::uint64_t user_bytes = std::uint64_t{256} << 20;
  // Probability that a place of a slate may go to an item with little feedback, [0, 1].
  float exploration_weight = 0.3f;
  // Older items are not explored, > 0. Age is counted from an item's creation (where unknown, its
  // first interaction) to the latest interaction of all.
  std::chrono::seconds exploration_item_age_cut_off = std::chrono::days{30};
  // Learn from impressions. Off: the slate is the model's own ranking, without exploration, which
  // could not end, and has no id.
  bool feedback = true;
  // Event types that count as a choice of the item; empty: all of them.
  Vector<std::string> positive_event_types = {};
  // Probability that a user looks at the first, second, ... place, each in (0, 1]; the last holds
  // for all further ones. Empty: 1 / log2(place + 1), the discount of DCG (Jarvelin, Kekalainen
  // 2002).
  Vector<float> examination = {};
  // An automatic update falls due so long after the last one, by the clock; 0: never, whoever
  // `updates` names. [0, 2^32]. Items that were put come in at once where a thread runs updates.
  std::chrono::seconds update_interval = std::chrono::hours{2};
  Updates updates = Updates::by_thread;
  // Slates whose recommendation ids are known: at most so many, [1, 2^28], in so many bytes,
  // [2^16, 2^50] (of 32-bit programs 2^31 - 1), which are taken at once, for so long, > 0 and at
  // most 2^32.
  std::uint32_t remembered_slates = 65'536;
  std::uint64_t slate_log_bytes = std::uint64_t{64} << 20;
  std::chrono::seconds slate_expiry = std::chrono::days{1};
  std::uint32_t remembered_event_ids = 262'144;  // [64, 2^28]
  // Of the contexts in which items were shown and chosen, 8 d + 32 an item. [2^16, 2^50]
  std::uint64_t context_bytes = std::uint64_t{64} << 20;
  // Of items that were put and wait for an update, and of events on them. [2^12, 2^50]
  std::uint64_t pending_bytes = std::uint64_t{16} << 20;
  // Unix seconds now; empty: the system's clock. For replays and simulations; called in every
  // request, from any thread.
  std::function<std::int64_t()> clock = {};
  // Times so much ahead of the clock are taken; later ones are an error. [0, 2^40]
  std::chrono::seconds clock_skew = std::chrono::days{1};
  std::uint64_t seed = 0;  // of exploration: the same seed, calls and timestamps, the same slates
  // Makes recommendation ids unforgeable, and users' and items' hashes unforeseeable. Missing:
  // taken from the system's random source.
  std::optional<std::array<std::uint64_t, 2>> recommendation_key = {};
  // Called for every impression and positive event of a remembered slate, on the recording thread,
  // which holds no lock. Must not throw.
  std::function<void(const LogEntry&)> log = {};
  // With Recommender::open. What an acknowledgement means:
  Durability durability = Durability::interval;
  std::chrono::milliseconds sync_interval{10};  // of Durability::interval, [1, 2^22]
  // The journal may grow to so many bytes, or as many as the state file has, before a save begins a
  // new one (by whom updates are run, also without an interval), [2^16, 2^50]; and so many of it
  // wait in memory while the disk takes none, [2^16, 2^50].
  std::uint64_t journal_bytes = std::uint64_t{256} << 20;
  std::uint64_t pending_journal_bytes = std::uint64_t{64} << 20;
  // A user who leaves memory, user_bytes being used up, as a blob for import_user or find_user: one
  // of user and session is empty. Called on the thread whose call it was, which holds no lock;
  // after a crash perhaps once more. Must not throw.
  std::function<void(std::string_view user, std::string_view session,
                     std::span<const std::byte> blob)>
      on_evict = {};
  // Looks for a user who is not in memory, before a call goes on as with a new one: true, and their
  // blob. Any thread, no lock; must not throw.
  std::function<bool(std::string_view user, std::string_view session, std::vector<std::byte>& blob)>
      find_user = {};
  // Look up what each item contributes to the first GRU's gates: a shorter step for 12 bytes x
  // items x hidden dimension (padded to 16) of memory. See Encoder::looks_up_gates for which
  // programs.
  bool gate_lookup = false;
  // The kernels to compute with, named as Recommender::instruction_set() does; they must be in this
  // program and run on this processor. Empty: kernels::chosen(), the best, or with
  // personalize::kernels what the environment variable PERSONALIZE_KERNELS names.
  std::string instruction_set = {};
};

// An item that enters the catalogue, or is changed in it, at the next update. What is left out
// stays as it is: a creation timestamp that is missing, fields that are not named.
struct NewItem {
  std::string_view item = {};  // 1 to 256 bytes of UTF-8 without control characters
  std::optional<std::int64_t> creation_timestamp = {};  // of a new item: the time of the call
  // Name and value of metadata fields, categories separated by '|'. At most 64 KiB together.
  Vector<std::pair<std::string_view, std::string_view>> fields = {};
};

// What the last update did. An update that had nothing to do leaves the report of the one before.
struct UpdateReport {
  std::int64_t timestamp = no_timestamp;  // it learnt for
  std::chrono::microseconds duration{0};  // with the rests that the recommender's own thread takes
  std::size_t items_added = 0, items_changed = 0, items_removed = 0;
  std::size_t items_learnt = 0;     // with feedback, whose scores it set anew
  std::size_t events_replayed = 0;  // that came for items which were put and not in yet
  std::size_t events_lost = 0;      // of those, where memory ran out
  std::size_t values_unknown = 0;   // of the fields of items: no embedding in the model
  std::size_t items_refused = 0;
  std::vector<std::pair<std::string, Error>> refused = {};  // the first 100 of them, and why
  std::optional<Error> error = {};  // of an update that could not be made; the catalogue stayed
};

// What Recommender::swap did.
struct SwapReport {
  std::size_t items_added = 0;    // of the model, which nobody knew before
  std::size_t items_put = 0;      // that the model lacks, and that stay by the fields they had
  std::size_t items_dropped = 0;  // that the model lacks, and of which no fields are known
  bool states_kept = false;  // users' states are good for the model, by its fingerprint; else they
                             // are made anew from remembered events, when next used or before
  bool sums_kept = false;    // so are users' offsets and the sums behind Explanation::taste
  std::chrono::microseconds duration{0};
  // With a folder: why no state of the new model could be saved. The swap stands, and the journal
  // goes on.
  std::optional<Error> save_error = {};
};

// What Recommender::save did.
struct SaveReport {
  std::uint64_t bytes = 0;  // of the state file
  std::chrono::microseconds duration{0};
};

// What Recommender::open or restore found.
struct RecoveryReport {
  bool found = false;         // a state; else it begins anew
  bool clean = false;         // the process before ended in peace; of restore(): always
  std::size_t users = 0;      // of the state file
  std::uint64_t records = 0;  // of the journal, that came after it
  std::uint64_t torn = 0;     // bytes at its end, of a record that was not acknowledged: cut off
  bool other_model = false;   // the state is of another model, as by swap()
  bool states_kept = false, sums_kept = false;  // see SwapReport
  std::chrono::microseconds duration{0};
};

// How it stands with what is to outlive the process.
struct PersistenceStatus {
  bool durable = true;              // all that was acknowledged is as safe as Durability says
  std::uint64_t journal_bytes = 0;  // of the present journal
  std::uint64_t pending_bytes = 0;  // of it, that wait in memory for a disk that takes none
  std::uint64_t saves = 0;          // that were made
  std::optional<Error> error = {};  // why it is not durable, or why the last save failed
};

// What Recommender::import_user did.
struct ImportReport {
  std::string user, session;       // one of them is empty
  std::size_t events = 0;          // remembered now
  std::size_t events_dropped = 0;  // on items that the catalogue does not know
};

// Why an item stands in a slate.
enum class Reason : std::uint8_t {
  relevance,    // the model's score for this user, with what feedback taught
  exploration,  // drawn from the items with little feedback
  popular,      // nothing is known of this user: most interactions first
  unknown,      // rank() only: not in the catalogue, so it could not be ranked
  excluded,     // rank() only: not eligible, or an item that was to be left out
};

constexpr std::string_view name(Reason reason) noexcept {
  switch (reason) {
    case Reason::relevance:
      return "relevance";
    case Reason::exploration:
      return "exploration";
    case Reason::popular:
      return "popular";
    case Reason::unknown:
      return "unknown item";
    case Reason::excluded:
      return "excluded";
  }
  return "";
}

// `item` is valid as long as the slate holds it: until the slate is used again, or ends. From
// rank() it is the caller's own.
struct Pick {
  std::string_view item;
  float score;  // u, see Recommender; popular: exp(u), the share of all interactions, times what
                // feedback taught
  Reason reason;
  float propensity = 1;  // probability of this pick at its place, given the picks above it
};

struct Slate {
  std::vector<Pick> items;
  std::string id;         // the recommendation id; empty with feedback off, and from rank()
  double propensity = 1;  // probability of the whole slate: the product over its picks
  std::shared_ptr<const void> ids;  // what `items` point into
};

// Times are Unix seconds; where missing, the clock's. One more than RecommenderOptions::clock_skew
// ahead of the clock is an error: invalid_argument, and nothing is changed.
struct Interaction {
  std::string_view user = {};     // empty for an anonymous visitor, who then needs a session
  std::string_view session = {};  // with a user: this session's events become the user's
  std::string_view item = {};
  std::string_view event_type = {};
  std::optional<std::int64_t> timestamp = {};
  // Slate::id of the slate that the event answers: without `impressions`, all its picks count as
  // seen. An event without it is attributed to the user's remembered impression of the item.
  std::string_view recommendation_id = {};
  // The items that were shown, first place first, at most 10,000; what they say wins over the
  // recommendation id. An item that is listed again counts once.
  std::span<const std::string_view> impressions = {};
  // The same id of the same user counts once, among the last remembered_event_ids of all users.
  std::string_view event_id = {};
};

// Items that a user was shown, first place first, without an event.
struct Impression {
  std::string_view user = {};
  std::string_view session = {};
  std::string_view recommendation_id = {};       // the slate that they came from, if any
  std::span<const std::string_view> items = {};  // empty: all picks of that slate
  std::optional<std::int64_t> timestamp = {};
};

// What became of a recorded event.
enum class Recorded : std::uint8_t {
  learned,        // the user's state has advanced (an impression: it was counted)
  unknown_item,   // the item is not in the catalogue; the state is as it was
  duplicate,      // an event with this event_id came before; nothing was changed
  unknown_slate,  // learned, but the recommendation id is none that this user was given
  expired_slate,  // learned, but the slate is no longer remembered
  pending_item,   // the item was put and is not in yet: the event counts when it is
};

constexpr std::string_view name(Recorded recorded) noexcept {
  switch (recorded) {
    case Recorded::learned:
      return "learned";
    case Recorded::unknown_item:
      return "unknown item";
    case Recorded::duplicate:
      return "duplicate";
    case Recorded::unknown_slate:
      return "unknown slate";
    case Recorded::expired_slate:
      return "expired slate";
    case Recorded::pending_item:
      return "pending item";
  }
  return "";
}

struct Request {
  std::string_view user = {};
  std::string_view session = {};
  std::uint32_t count = 25;         // [1, 10000]
  bool exclude_interacted = false;  // leave out the items of the user's remembered events
  // Bits by Recommender::find_item(), at most item_count() of them; items beyond its size are left
  // out; null: every item.
  const ItemMask* eligible = nullptr;
  std::optional<std::int64_t> timestamp = {};
};

// What a pick's score is made of. In units of score: score = relevance + quality + taste -
// discount.
struct Explanation {
  float score;                // u; of a user without events Pick::score shows exp(u)
  float relevance;            // h . v + b of the model; without events, log share of interactions
  float quality;              // m: more or less chosen than the model expects, over all users
  float taste;                // h . delta + g . v: by users like this one, and by this user
  float discount;             // for impressions that this user ignored
  float uncertainty;          // standard deviation of the log of the item's quality
  double positive, expected;  // decayed counters: events, and what the model expected
  std::optional<std::int64_t> age;  // seconds, to the latest interaction of all
  bool explorable;                  // in the pool of items with little feedback
};

// Bytes that a recommender has taken, beside the model and what its callers hold.
struct MemoryUse {
  std::size_t users = 0;      // users and sessions: RecommenderOptions::user_bytes
  std::size_t event_ids = 0;  // at most some 30 bytes x remembered_event_ids
  std::size_t slates = 0;     // slate_log_bytes
  std::size_t contexts = 0;   // context_bytes
  std::size_t pending = 0;    // pending_bytes, and the fields of items that were put and are in
  std::size_t catalogue = 0;  // the present generation and those that readers still hold
  std::size_t scratch = 0;    // of requests: one a thread that asks at the same time
  std::size_t total() const noexcept {
    return users + event_ids + slates + contexts + pending + catalogue + scratch;
  }
};

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Text, or a whole number as digits.
class Piece {
 public:
  Piece(const char* text) : text_(text) {}
  Piece(std::string_view text) : text_(text) {}
  Piece(const std::string& text) : text_(text) {}
  template <std::integral Number>
  Piece(Number number)
      : Piece(number < 0 ? 0 - static_cast<std::uint64_t>(number)
                         : static_cast<std::uint64_t>(number),
              number < 0) {}
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;
  std::string_view text() const noexcept { return text_; }

 private:
  [[gnu::noinline]] Piece(std::uint64_t magnitude, bool negative) {
    std::size_t first = digits_.size();
    do {
      digits_[--first] = static_cast<char>('0' + magnitude % 10);
    } while ((magnitude /= 10) != 0);
    if (negative) digits_[--first] = '-';
    text_ = {digits_.data() + first, digits_.size() - first};
  }

  std::array<char, 20> digits_;
  std::string_view text_;
};

// Of pieces: the standard library's functions for it have one name in units of all flags.
inline std::string joined(std::initializer_list<Piece> pieces) {
  std::string all;
  for (const Piece& piece : pieces) all.append(piece.text().data(), piece.text().size());
  return all;
}

// What `call` returns, a Result; where it runs out of memory, that as an error. The message is
// short enough to need none.
template <class Call>
auto catching_bad_alloc(Call call) -> decltype(call()) {
#if PERSONALIZE_HAS_EXCEPTIONS
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return Error{Errc::out_of_memory, "out of memory"};
  } catch (const std::length_error&) {
    return Error{Errc::out_of_memory, "out of memory"};
  }
#else
  return call();
#endif
}

inline Result<void> check_options(const RecommenderOptions& options) {
  const auto error = [](const char* text) {
    return Error{Errc::invalid_argument, joined({"RecommenderOptions::", text})};
  };
  const auto outside = [](std::uint64_t value, unsigned low, unsigned high) {
    return value < std::uint64_t{1} << low || value > std::uint64_t{1} << high;
  };
  const auto within = [](std::chrono::seconds value, std::int64_t low, std::int64_t high) {
    return value.count() >= low && value.count() <= high;
  };
  if (options.history_length < 1 || options.history_length > 65535)
    return error("history_length is outside [1, 65535]");
  if (outside(options.max_users, 6, 40)) return error("max_users is outside [64, 2^40]");
  if (outside(options.user_bytes, 16, 50)) return error("user_bytes is outside [2^16, 2^50]");
  if (!(options.exploration_weight >= 0 && options.exploration_weight <= 1))
    return error("exploration_weight is outside [0, 1]");
  if (options.exploration_item_age_cut_off.count() <= 0)
    return error("exploration_item_age_cut_off is not above 0");
  for (const float probability : options.examination)
    if (!(probability > 0 && probability <= 1))
      return error("examination has a probability outside (0, 1]");
  if (!within(options.update_interval, 0, std::int64_t{1} << 32))
    return error("update_interval is outside [0, 2^32] seconds");
  if (options.updates > Updates::in_requests) return error("updates is none of the three");
  if (outside(options.remembered_slates, 0, 28))
    return error("remembered_slates is outside [1, 2^28]");
  if (outside(options.slate_log_bytes, 16, 50))
    return error("slate_log_bytes is outside [2^16, 2^50]");
  if (options.slate_log_bytes > std::numeric_limits<std::size_t>::max() / 2)
    return error("slate_log_bytes, which are taken at once, are more than a 32-bit program has");
  if (!within(options.slate_expiry, 1, std::int64_t{1} << 32))
    return error("slate_expiry is not above 0, or above 2^32 seconds");
  if (outside(options.remembered_event_ids, 6, 28))
    return error("remembered_event_ids is outside [64, 2^28]");
  if (outside(options.context_bytes, 16, 50)) return error("context_bytes is outside [2^16, 2^50]");
  if (outside(options.pending_bytes, 12, 50)) return error("pending_bytes is outside [2^12, 2^50]");
  if (options.durability > Durability::none) return error("durability is none of the three");
  if (options.sync_interval.count() < 1 || options.sync_interval.count() > 1 << 22)
    return error("sync_interval is outside [1, 2^22] milliseconds");
  if (outside(options.journal_bytes, 16, 50)) return error("journal_bytes is outside [2^16, 2^50]");
  if (outside(options.pending_journal_bytes, 16, 50))
    return error("pending_journal_bytes is outside [2^16, 2^50]");
  if (!within(options.clock_skew, 0, std::int64_t{1} << 40))
    return error("clock_skew is outside [0, 2^40] seconds");
  return {};
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 2: basics. Owns what knows nothing of recommendations: bytes and files, text and numbers,
// hashes, random numbers, aligned memory, tables of distinct strings. Uses room 1.
// ============================================================================================

// "major.minor.patch"
inline constexpr std::string_view version = PERSONALIZE_DOTTED(
    PERSONALIZE_VERSION_MAJOR, PERSONALIZE_VERSION_MINOR, PERSONALIZE_VERSION_PATCH);

inline constexpr std::size_t max_id_bytes = 256;

#if PERSONALIZE_HAS_BODIES

// XXH64 (Yann Collet, xxHash specification 0.1.1). A checksum, not a cryptographic hash.
inline std::uint64_t xxh64(std::span<const std::byte> bytes, std::uint64_t seed = 0) noexcept {
  constexpr std::uint64_t p1 = 11400714785074694791u, p2 = 14029467366897019727u,
                          p3 = 1609587929392839161u, p4 = 9650029242287828579u,
                          p5 = 2870177450012600261u;
  const auto read = [](const std::byte* p, auto value) {
    std::memcpy(&value, p, sizeof value);
    return static_cast<std::uint64_t>(value);
  };
  const auto round = [](std::uint64_t sum, std::uint64_t input) {
    return std::rotl(sum + input * p2, 31) * p1;
  };
  const std::byte* p = bytes.data();
  std::size_t left = bytes.size();
  std::uint64_t hash;
  if (left >= 32) {
    std::array<std::uint64_t, 4> sums{seed + p1 + p2, seed + p2, seed, seed - p1};
    for (; left >= 32; left -= 32)
      for (std::uint64_t& sum : sums) {
        sum = round(sum, read(p, std::uint64_t{}));
        p += 8;
      }
    hash = std::rotl(sums[0], 1) + std::rotl(sums[1], 7) + std::rotl(sums[2], 12) +
           std::rotl(sums[3], 18);
    for (const std::uint64_t sum : sums) hash = (hash ^ round(0, sum)) * p1 + p4;
  } else {
    hash = seed + p5;
  }
  hash += bytes.size();
  for (; left >= 8; left -= 8, p += 8)
    hash = std::rotl(hash ^ round(0, read(p, std::uint64_t{})), 27) * p1 + p4;
  if (left >= 4) {
    hash = std::rotl(hash ^ (read(p, std::uint32_t{}) * p1), 23) * p2 + p3;
    left -= 4;
    p += 4;
  }
  for (; left > 0; --left, ++p)
    hash = std::rotl(hash ^ (static_cast<std::uint64_t>(*p) * p5), 11) * p1;
  hash = (hash ^ (hash >> 33)) * p2;
  hash = (hash ^ (hash >> 29)) * p3;
  return hash ^ (hash >> 32);
}

namespace detail {

// As std::bit_cast, which libc++ has only from version 14 on.
template <class To, class From>
constexpr To bit_cast(const From& from) noexcept {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

template <class T>
T load_integer(const std::byte* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// std::span takes no text in libc++ 14.
inline std::span<const std::byte> text_bytes(std::string_view text) noexcept {
  return std::as_bytes(std::span(text.data(), text.size()));
}

template <class T>
void append_integer(Vector<std::byte>& out, T value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}

// For algorithms over numbers: with std::less their functions have one name in units of all flags.
struct Less {
  template <class Number>
  bool operator()(Number a, Number b) const noexcept {
    return a < b;
  }
};
struct Greater {
  template <class Number>
  bool operator()(Number a, Number b) const noexcept {
    return a > b;
  }
};

// Sorting such is compiled once, whatever they stand for.
struct Keyed {
  std::uint64_t key;
  std::uint32_t index;
  friend bool operator<(const Keyed& a, const Keyed& b) noexcept {
    return a.key != b.key ? a.key < b.key : a.index < b.index;
  }
};
inline void sort_by_key(Vector<Keyed>& values) { std::sort(values.begin(), values.end()); }

inline std::optional<std::uint64_t> checked_product(std::uint64_t a, std::uint64_t b) noexcept {
  if (b != 0 && a > std::numeric_limits<std::uint64_t>::max() / b) return std::nullopt;
  return a * b;
}

// Of a budget, what there can be of it.
inline std::size_t to_memory(std::uint64_t budget) noexcept {
  return static_cast<std::size_t>(std::min<std::uint64_t>(budget, most_memory));
}

// Elements of an array; more than there can be where the product is: so that memory runs out, and
// none is taken that is too short.
inline std::size_t elements(std::uint64_t rows, std::uint64_t columns) noexcept {
  return to_memory(checked_product(rows, columns).value_or(most_memory));
}

using HashKey = std::array<std::uint64_t, 2>;

// SipHash-2-4 (Aumasson and Bernstein 2012): without the key its values cannot be foretold.
inline std::uint64_t siphash(const HashKey& key, std::span<const std::byte> data) noexcept {
  std::uint64_t v0 = key[0] ^ 0x736F6D6570736575u, v1 = key[1] ^ 0x646F72616E646F6Du;
  std::uint64_t v2 = key[0] ^ 0x6C7967656E657261u, v3 = key[1] ^ 0x7465646279746573u;
  const auto round = [&] {
    v0 += v1, v1 = std::rotl(v1, 13) ^ v0, v0 = std::rotl(v0, 32);
    v2 += v3, v3 = std::rotl(v3, 16) ^ v2;
    v0 += v3, v3 = std::rotl(v3, 21) ^ v0;
    v2 += v1, v1 = std::rotl(v1, 17) ^ v2, v2 = std::rotl(v2, 32);
  };
  const auto absorb = [&](std::uint64_t word) {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  };
  std::size_t at = 0;
  for (; at + 8 <= data.size(); at += 8) absorb(load_integer<std::uint64_t>(data.data() + at));
  std::uint64_t last = static_cast<std::uint64_t>(data.size()) << 56;
  for (std::size_t i = 0; at + i < data.size(); ++i)
    last |= std::to_integer<std::uint64_t>(data[at + i]) << (8 * i);
  absorb(last);
  v2 ^= 0xFF;
  for (int i = 0; i < 4; ++i) round();
  return v0 ^ v1 ^ v2 ^ v3;
}

}  // namespace detail

// Philox4x32-10 (Salmon et al. 2011): random bits as a function of key and counter.
class CounterRandom {
 public:
  CounterRandom(std::uint64_t key, std::uint64_t stream) noexcept : key_(key), stream_(stream) {}

  // Two uniform numbers in [0, 1); the same for the same key, stream and index.
  std::array<double, 2> uniform(std::uint64_t index) const noexcept {
    const auto [a, b, c, d] = block(key_, {index, stream_});
    const auto unit = [](std::uint32_t high, std::uint32_t low) {
      return static_cast<double>((std::uint64_t{high} << 32 | low) >> 11) * 0x1p-53;
    };
    return {unit(a, b), unit(c, d)};
  }

  static std::array<std::uint32_t, 4> block(std::uint64_t key,
                                            const std::array<std::uint64_t, 2>& counter) noexcept {
    const auto low = [](std::uint64_t v) { return static_cast<std::uint32_t>(v); };
    const auto high = [](std::uint64_t v) { return static_cast<std::uint32_t>(v >> 32); };
    std::array<std::uint32_t, 4> c{low(counter[0]), high(counter[0]), low(counter[1]),
                                   high(counter[1])};
    std::uint32_t k0 = low(key), k1 = high(key);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
      c = {high(p1) ^ c[1] ^ k0, low(p1), high(p0) ^ c[3] ^ k1, low(p0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }

 private:
  std::uint64_t key_, stream_;
};

namespace detail {

// The largest magnitude; infinite where a value is not finite. Without an exit inside the loop:
// compilers make vectors of it.
inline float largest(std::span<const float> values) noexcept {
  std::uint32_t most = 0;
  for (const float v : values) most = std::max(most, bit_cast<std::uint32_t>(v) & 0x7fffffff);
  return bit_cast<float>(std::min(most, 0x7f800000u));
}

// One added to an exponent of all ones carries into the sign. Four values a step: compilers do not
// make vectors of it by themselves at -O2.
inline bool all_finite(std::span<const float> values) noexcept {
  using Four = std::uint32_t __attribute__((vector_size(16)));
  constexpr std::uint32_t magnitude = 0x7fffffff, one = 0x00800000;
  Four carries{};
  std::size_t i = 0;
  for (; i + 4 <= values.size(); i += 4) {
    Four bits;
    std::memcpy(&bits, values.data() + i, sizeof bits);
    carries |= (bits & magnitude) + one;
  }
  std::uint32_t carry = carries[0] | carries[1] | carries[2] | carries[3];
  for (; i < values.size(); ++i) carry |= (bit_cast<std::uint32_t>(values[i]) & magnitude) + one;
  return carry <= magnitude;
}

// A decimal number, `1.5` or `-2e-3`, correct but for the last bit of a rare one.
inline std::optional<double> parse_decimal(std::string_view text) noexcept {
  const bool negative = text.starts_with('-');
  if (negative) text.remove_prefix(1);
  double digits = 0;
  int exponent = 0, count = 0;
  const auto take_digits = [&](int each) {
    for (; !text.empty() && text[0] >= '0' && text[0] <= '9'; text.remove_prefix(1), ++count) {
      // Those behind the first 17 change no bit.
      if (digits < 1e17)
        digits = 10 * digits + (text[0] - '0'), exponent += each;
      else
        exponent += each + 1;
    }
  };
  take_digits(0);
  if (text.starts_with('.')) {
    text.remove_prefix(1);
    take_digits(-1);
  }
  if (count == 0) return std::nullopt;
  if (text.starts_with('e') || text.starts_with('E')) {
    text.remove_prefix(1);
    if (text.starts_with('+')) text.remove_prefix(1);
    int power = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), power);
    if (error != std::errc{} || std::abs(power) > 9999) return std::nullopt;
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    exponent += power;
  }
  if (!text.empty()) return std::nullopt;
  // In two steps, so that 10^-330 does not become 0 before it is multiplied.
  const int half = exponent / 2;
  const double value = digits * std::pow(10.0, half) * std::pow(10.0, exponent - half);
  return negative ? -value : value;
}

// A finite decimal number as a float, whatever the locale says; blanks and a plus may precede it.
inline std::optional<float> parse_float(std::string_view text) noexcept {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
#if defined(__cpp_lib_to_chars)
  float value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc{} && end == text.data() + text.size() && std::isfinite(value))
    return value;
  if (error != std::errc::result_out_of_range) return std::nullopt;
#endif
  // Also tells what is too small, which is 0, from what is too large.
  const auto number = parse_decimal(text);
  if (!number || !(std::abs(*number) <= double{std::numeric_limits<float>::max()}))
    return std::nullopt;
  return static_cast<float>(*number);
}

}  // namespace detail

// UTF-8 (Unicode 15, table 3-7), and its control characters.
namespace detail {

// The bytes of the character that `text` begins with; 0 where they are not UTF-8. text: not empty.
inline std::size_t utf8_character(std::string_view text) noexcept {
  const auto byte = [&](std::size_t i) -> unsigned { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < size) return 0;
  // Overlong forms, surrogates and what lies behind U+10FFFF show in the second byte.
  const unsigned least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < least || byte(1) > most) return 0;
  for (std::size_t i = 2; i < size; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  return size;
}

inline bool valid_utf8(std::string_view text) noexcept {
  for (std::size_t size; !text.empty(); text.remove_prefix(size))
    if (size = utf8_character(text); size == 0) return false;
  return true;
}

// Whether text may stand in a table of ids, in a line of a log and in JSON: UTF-8 without control
// characters (U+0000 to U+001F, U+007F to U+009F). Says nothing of its length. Some 2 ns for an
// ASCII id of 16 bytes.
inline bool valid_id(std::string_view text) noexcept {
  constexpr std::uint64_t each = 0x0101010101010101u, high = 0x80 * each;
  while (!text.empty()) {
    if (text.size() >= 8) {
      std::uint64_t word;
      std::memcpy(&word, text.data(), 8);
      // All of 0x20 to 0x7E: neither over 0x7F, nor under 0x20, nor 0x7F.
      if (((word | (word - 0x20 * each) | (word + each)) & high) == 0) {
        text.remove_prefix(8);
        continue;
      }
    }
    const std::size_t size = utf8_character(text);
    if (size == 0) return false;
    const auto first = static_cast<unsigned char>(text[0]);
    if (size == 1 && (first < 0x20 || first == 0x7F)) return false;
    if (first == 0xC2 && static_cast<unsigned char>(text[1]) < 0xA0) return false;
    text.remove_prefix(size);
  }
  return true;
}
// As the interface takes them: one; and of whom something is, a user, a session or both.
inline bool is_id(std::string_view text) noexcept {
  return !text.empty() && text.size() <= max_id_bytes && valid_id(text);
}
inline bool are_ids(std::string_view user, std::string_view session) noexcept {
  return (user.empty() || is_id(user)) && (session.empty() || is_id(session)) &&
         !(user.empty() && session.empty());
}

}  // namespace detail

namespace detail {

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

inline Error io_error(const std::string& path, const char* what) {
  return {Errc::io, joined({path, ": ", what, ": ", std::strerror(errno)})};
}

#if defined(_WIN32)
// Paths are UTF-8, whatever the code page; what is not becomes a name that no file has.
inline std::wstring native_path(const std::string& path) {
  const int size = static_cast<int>(path.size());
  std::wstring wide(path.size(), L'\0');
  const int length = ::MultiByteToWideChar(65001, 0, path.data(), size, wide.data(), size);
  wide.resize(static_cast<std::size_t>(length));
  return wide;
}
inline std::FILE* open_file(const std::string& path, const char* mode) {
  return ::_wfopen(native_path(path).c_str(), native_path(mode).c_str());
}
// A file that is not there yet.
inline std::FILE* create_file(const std::string& path) {
  const int descriptor =
      ::_wopen(native_path(path).c_str(), _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT,
               _S_IREAD | _S_IWRITE);
  return descriptor < 0 ? nullptr : ::_wfdopen(descriptor, L"wb");
}
inline bool sync_file(std::FILE* file) noexcept { return ::_commit(::_fileno(file)) == 0; }
inline bool replace_file(const std::string& from, const std::string& to) {
  // MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH
  if (::MoveFileExW(native_path(from).c_str(), native_path(to).c_str(), 1 | 8) != 0) return true;
  const unsigned long error = ::GetLastError();
  errno = error == 2 || error == 3      ? ENOENT
          : error == 5 || error == 32   ? EACCES  // denied, or open elsewhere
          : error == 39 || error == 112 ? ENOSPC
                                        : EIO;
  return false;
}
inline void remove_file(const std::string& path) { ::_wremove(native_path(path).c_str()); }
#else
inline std::FILE* open_file(const std::string& path, const char* mode) {
  return std::fopen(path.c_str(), mode);
}
inline void remove_file(const std::string& path) { std::remove(path.c_str()); }
#if !PERSONALIZE_HAS_POSIX
inline std::FILE* create_file(const std::string& path) { return open_file(path, "wbx"); }
inline bool sync_file(std::FILE*) noexcept { return true; }
inline bool replace_file(const std::string& from, const std::string& to) {
  return std::rename(from.c_str(), to.c_str()) == 0;
}
#endif
#endif

inline bool seek(std::FILE* file, std::uint64_t offset, int from) noexcept {
#if defined(_WIN32)
  return ::_fseeki64(file, static_cast<std::int64_t>(offset), from) == 0;
#else
  if (offset > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) {
    errno = EFBIG;
    return false;
  }
  return ::fseeko(file, static_cast<off_t>(offset), from) == 0;
#endif
}

// Where the file stands; below 0 where it cannot tell.
inline std::int64_t position(std::FILE* file) noexcept {
#if defined(_WIN32)
  return ::_ftelli64(file);
#else
  return ::ftello(file);
#endif
}

// A file's bytes from front to back, out of memory or off the disk.
class ByteSource {
 public:
  explicit ByteSource(std::span<const std::byte> bytes) : bytes_(bytes), size_(bytes.size()) {}

  static Result<ByteSource> open(const std::string& path) {
    ByteSource source{{}};
    source.file_.reset(open_file(path, "rb"));
    if (!source.file_) return io_error(path, "cannot open");
    const std::int64_t size =
        seek(source.file_.get(), 0, SEEK_END) ? position(source.file_.get()) : -1;
    if (size < 0 || !seek(source.file_.get(), 0, SEEK_SET))
      return io_error(path, "cannot tell its size");
    source.size_ = static_cast<std::uint64_t>(size);
    source.path_ = path;
    return source;
  }

  std::uint64_t size() const noexcept { return size_; }

  // The next `count` bytes, where they lie or in `buffer`, which where it is too short becomes
  // twice as long as it was, at most `room` bytes, but no less than count. The caller has compared
  // with size().
  Result<std::span<const std::byte>> take(std::size_t count, BareVector<std::byte>& buffer,
                                          std::size_t room) {
    if (!file_) {
      const auto taken = bytes_.first(count);
      bytes_ = bytes_.subspan(count);
      return taken;
    }
    if (buffer.size() < count) {
      const std::size_t size = std::max(count, std::min(2 * buffer.size(), room));
      buffer = {};
      buffer.resize(size);
    }
    if (std::fread(buffer.data(), 1, count, file_.get()) != count) {
      if (std::ferror(file_.get())) return io_error(path_, "cannot read");
      return Error{Errc::truncated, "the file became shorter while it was read"};
    }
    return std::span<const std::byte>(buffer).first(count);
  }

 private:
  std::span<const std::byte> bytes_;
  File file_;
  std::string path_;
  std::uint64_t size_ = 0;
};

// Where a file's bytes go, front to back; what was written can be written over.
class ByteSink {
 public:
  virtual ~ByteSink() = default;
  virtual void append(std::span<const std::byte> bytes) = 0;
  virtual void overwrite(std::uint64_t offset, std::span<const std::byte> bytes) = 0;
};

class MemorySink final : public ByteSink {
 public:
  void append(std::span<const std::byte> more) override {
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
  void overwrite(std::uint64_t offset, std::span<const std::byte> with) override {
    std::copy(with.begin(), with.end(), bytes.begin() + static_cast<std::ptrdiff_t>(offset));
  }
  Vector<std::byte> bytes;
};

// A file that replaces `path` at once or not at all: written beside it under a name of its own,
// synced, renamed; of several writers the last wins whole. A link is followed, and what it names
// replaced. What is there and no regular file (a device, a pipe) is written to, at commit().
class FileSink final : public ByteSink {
 public:
  // mode: of a file that is not there yet, less what umask takes.
  explicit FileSink(const std::string& path, [[maybe_unused]] unsigned mode = 0666) : path_(path) {
#if PERSONALIZE_HAS_POSIX
    struct stat there {};
    const bool exists = ::stat(path_.c_str(), &there) == 0;
    direct_ = (exists && !S_ISREG(there.st_mode) && !S_ISDIR(there.st_mode)) || !follow_links();
    if (error_ || direct_) return;
    create(exists ? there.st_mode & 0777u : mode);
    if (file_ && exists && ::fchmod(::fileno(file_.get()), there.st_mode & 0777) != 0)
      error_ = io_error(part_, "cannot give it the mode of the file that it replaces");
#else
    create(0);
#endif
  }
  FileSink(const FileSink&) = delete;
  FileSink& operator=(const FileSink&) = delete;
  ~FileSink() override {
    if (!file_) return;
    file_.reset();
    remove_file(part_);
  }

  void append(std::span<const std::byte> bytes) override {
    if (direct_) return kept_.append(bytes);
    if (!error_ && std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size())
      error_ = io_error(path_, "cannot write");
  }
  void overwrite(std::uint64_t offset, std::span<const std::byte> bytes) override {
    if (direct_) return kept_.overwrite(offset, bytes);
    move_to(offset, SEEK_SET);
    append(bytes);
    move_to(0, SEEK_END);
  }

  Result<void> commit() {
    if (error_) return *error_;
#if PERSONALIZE_HAS_POSIX
    if (direct_) return write_through();
#endif
    bool written = std::fflush(file_.get()) == 0;
#if PERSONALIZE_HAS_POSIX
    written = written && ::fsync(::fileno(file_.get())) == 0;
#else
    written = written && sync_file(file_.get());
#endif
    written = std::fclose(file_.release()) == 0 && written;
    if (written && replace()) return {};
    const Error error = io_error(path_, "cannot write");
    remove_file(part_);
    return error;
  }

 private:
  void move_to(std::uint64_t offset, int from) {
    if (!error_ && !seek(file_.get(), offset, from)) error_ = io_error(path_, "cannot write");
  }

  std::string folder() const {
#if defined(_WIN32)
    const std::size_t slash = path_.find_last_of("/\\:");
#else
    const std::size_t slash = path_.find_last_of('/');
#endif
    return slash == std::string::npos ? "" : path_.substr(0, slash + 1);
  }

  // Opens a new file beside path_. mode: its permissions, of which umask takes its share.
  void create([[maybe_unused]] unsigned mode) {
    // Names are distinct, not secret: what is there already is not opened.
    std::uint64_t number =
        static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
    number ^= reinterpret_cast<std::uintptr_t>(this) << 20;
#if PERSONALIZE_HAS_POSIX
    number ^= static_cast<std::uint64_t>(::getpid()) << 40;
#endif
    // With what is added, no longer than file systems allow.
    folder_ = folder();
    const std::string start = folder_ + path_.substr(folder_.size()).substr(0, 200);
    if (folder_.empty()) folder_ = ".";
    for (int tries = 0; tries < 100; ++tries) {
      number = xxh64(std::as_bytes(std::span(&number, 1)));
      std::array<char, 17> digits{};
      std::snprintf(digits.data(), digits.size(), "%016llx",
                    static_cast<unsigned long long>(number));
      part_ = joined({start, ".", digits.data(), ".part"});
#if PERSONALIZE_HAS_POSIX
      const int descriptor =
          ::open(part_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                 static_cast<mode_t>(mode));
      if (descriptor >= 0) {
        file_.reset(::fdopen(descriptor, "wb"));
        if (file_) return;
        ::close(descriptor);
        remove_file(part_);
        break;
      }
#else
      file_.reset(create_file(part_));
      if (file_) return;
#endif
      if (errno != EEXIST) break;
    }
    error_ = io_error(part_, "cannot create");
  }

  bool replace() {
#if PERSONALIZE_HAS_POSIX
    if (std::rename(part_.c_str(), path_.c_str()) != 0) return false;
    // So that the new name outlives a power cut. The file is whole with or without.
    const int descriptor = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor >= 0) {
      (void)::fsync(descriptor);
      ::close(descriptor);
    }
    return true;
#else
    return replace_file(part_, path_);
#endif
  }

#if PERSONALIZE_HAS_POSIX
  // Makes path_ what its links lead to. false: to an open file of some process (/dev/stdout,
  // /dev/fd/3), which has no name to replace.
  bool follow_links() {
    for (int links = 0;; ++links) {
      if (path_.starts_with("/proc/") || path_.starts_with("/dev/fd/")) return false;
      struct stat there {};
      if (::lstat(path_.c_str(), &there) != 0 || !S_ISLNK(there.st_mode)) return true;
      std::array<char, 4096> target;
      const auto size = ::readlink(path_.c_str(), target.data(), target.size());
      if (links == 40) errno = ELOOP;
      if (size < 0 || links == 40) {
        error_ = io_error(path_, "cannot follow");
        return true;
      }
      const std::string_view name{target.data(), static_cast<std::size_t>(size)};
      path_ = name.starts_with('/') ? std::string(name) : joined({folder(), name});
    }
  }

  Result<void> write_through() {
    // A pipe that nobody reads is an error, and not a wait.
    const int descriptor =
        ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor >= 0) (void)::fcntl(descriptor, F_SETFL, O_APPEND);
    const File file{descriptor < 0 ? nullptr : ::fdopen(descriptor, "ab")};
    if (!file) {
      const Error error = io_error(path_, "cannot open");
      if (descriptor >= 0) ::close(descriptor);
      return error;
    }
    const std::span<const std::byte> bytes{kept_.bytes};
    if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size() ||
        std::fflush(file.get()) != 0)
      return io_error(path_, "cannot write");
    return {};
  }
#endif

  std::string path_, part_, folder_;
  File file_;
  bool direct_ = false;
  MemorySink kept_;  // what goes to a device at commit()
  std::optional<Error> error_;
};

}  // namespace detail

// The bytes of a file of at most `limit` bytes.
inline Result<Vector<std::byte>> read_file(const std::string& path, std::uint64_t limit) {
  return detail::catching_bad_alloc([&]() -> Result<Vector<std::byte>> {
    const detail::File file{detail::open_file(path, "rb")};
    if (!file) return detail::io_error(path, "cannot open");
    Vector<std::byte> bytes;
    constexpr std::size_t piece = std::size_t{1} << 20;
    for (;;) {
      const std::size_t have = bytes.size();
      if (bytes.capacity() < have + piece) bytes.reserve(2 * have + piece);
      bytes.resize(have + piece);
      const std::size_t got = std::fread(bytes.data() + have, 1, piece, file.get());
      bytes.resize(have + got);
      if (bytes.size() > limit)
        return Error{Errc::limit, detail::joined({path, ": larger than ", limit, " bytes"})};
      if (got < piece) {
        if (std::ferror(file.get())) return detail::io_error(path, "cannot read");
        return bytes;
      }
    }
  });
}

// Replaces `path` by `bytes` or leaves it as it was: writes beside it, syncs, renames. Links are
// followed, a file keeps its permissions; devices and pipes are written to as they are.
inline Result<void> write_file(const std::string& path, std::span<const std::byte> bytes) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    detail::FileSink file{path};
    file.append(bytes);
    return file.commit();
  });
}

namespace detail {

// Seconds from one time to a later one, 0 where it is not later; without overflow at either end.
inline std::int64_t elapsed(std::int64_t from, std::int64_t to) noexcept {
  if (from >= to) return 0;
  const std::uint64_t seconds = static_cast<std::uint64_t>(to) - static_cast<std::uint64_t>(from);
  return static_cast<std::int64_t>(
      std::min<std::uint64_t>(seconds, std::numeric_limits<std::int64_t>::max()));
}

// What a usual allocator takes for a block of so many bytes, its own words included.
constexpr std::size_t allocated(std::size_t bytes) noexcept {
  return bytes == 0 ? 0 : std::max<std::size_t>((bytes + 8 + 15) / 16 * 16, 32);
}
template <class T, class Allocator>
std::size_t allocated(const std::vector<T, Allocator>& values) noexcept {
  return allocated(values.capacity() * sizeof(T));
}
template <class T, Layout layout>
std::size_t allocated(const PlainVector<T, layout>& values) noexcept {
  const std::size_t bytes = values.capacity() * sizeof(T);
#if defined(__linux__)
  if (bytes >= huge_bytes) return whole_pages(bytes);
#endif
  return allocated(bytes);
}
// Of a string of that capacity, beside the object itself, in which short ones lie.
inline std::size_t allocated_text(std::size_t capacity) noexcept {
  return capacity <= std::string{}.capacity() ? 0 : allocated(capacity + 1);
}

// IEEE 754 half precision, rounded to nearest; what is too large becomes the largest.
inline std::uint16_t half_of(float value) noexcept {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const std::uint32_t half =
      magnitude < 0x38800000  // subnormal: the sum's last bits are those of the half
          ? bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000
          : std::min((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13, 0x7bffu);
  return static_cast<std::uint16_t>(sign | half);
}
inline float float_of(std::uint16_t half) noexcept {
  // 2^112 moves the exponent's origin, of subnormals as well.
  const float magnitude = bit_cast<float>(std::uint32_t{half & 0x7fffu} << 13) * 0x1p112f;
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// Seven bits a byte, least first; the highest bit of all bytes but the last is set.
inline constexpr std::size_t longest_varint = 10;
inline std::byte* write_varint(std::byte* out, std::uint64_t value) noexcept {
  for (; value >= 0x80; value >>= 7) *out++ = static_cast<std::byte>(value | 0x80);
  *out++ = static_cast<std::byte>(value);
  return out;
}
inline const std::byte* read_varint(const std::byte* in, std::uint64_t& value) noexcept {
  value = 0;
  for (unsigned shift = 0;; shift += 7) {
    const auto byte = std::to_integer<std::uint64_t>(*in++);
    value |= (byte & 0x7f) << shift;
    if (byte < 0x80) return in;
  }
}

// What goes to a file or a record, and comes back: each owner names its fields once, in a function
// each_field(archive, self), for both directions. Numbers lie as they do in memory.
class FieldWriter {
 public:
  static constexpr bool reads = false;
  explicit FieldWriter(Vector<std::byte>& out) noexcept : out_(out) {}

  template <class... Values>
  void operator()(const Values&... values) {
    (one(values), ...);
  }
  void bytes(std::span<const std::byte> raw) { out_.insert(out_.end(), raw.begin(), raw.end()); }

 private:
  template <class T>
  void one(const T& value) {
    if constexpr (std::is_same_v<T, std::string> || std::is_same_v<T, std::string_view>) {
      one(static_cast<std::uint64_t>(value.size()));
      bytes(text_bytes(value));
    } else if constexpr (std::is_trivially_copyable_v<T>) {
      static_assert(!std::is_pointer_v<T>);
      bytes(std::as_bytes(std::span(&value, 1)));
    } else {
      static_assert(std::is_trivially_copyable_v<typename T::value_type>);
      one(static_cast<std::uint64_t>(value.size()));
      bytes(std::as_bytes(std::span(value)));
    }
  }
  Vector<std::byte>& out_;
};

// The same the other way, of bytes that may say anything: what they do not hold stays as it was,
// and ok() is false from there on.
class FieldReader {
 public:
  static constexpr bool reads = true;
  explicit FieldReader(std::span<const std::byte> in) noexcept : in_(in) {}

  template <class... Values>
  void operator()(Values&... values) {
    (one(values), ...);
  }
  // The next `count` bytes where they lie; empty where there are fewer.
  std::span<const std::byte> bytes(std::uint64_t count) noexcept {
    if (!ok_ || count > in_.size()) {
      ok_ = false;
      return {};
    }
    const auto taken = in_.first(static_cast<std::size_t>(count));
    in_ = in_.subspan(taken.size());
    return taken;
  }
  // A text where it lies.
  std::string_view text() noexcept {
    std::uint64_t size = 0;
    one(size);
    const auto raw = bytes(size);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }
  bool ok() const noexcept { return ok_; }
  void fail() noexcept { ok_ = false; }
  bool at_end() const noexcept { return ok_ && in_.empty(); }
  std::size_t left() const noexcept { return ok_ ? in_.size() : 0; }

 private:
  template <class T>
  void one(T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
      const std::string_view read = text();
      if (ok_) value.assign(read.data(), read.size());
    } else if constexpr (std::is_same_v<T, std::string_view>) {
      const std::string_view read = text();
      if (ok_) value = read;
    } else if constexpr (std::is_trivially_copyable_v<T>) {
      const auto raw = bytes(sizeof value);
      if (ok_) std::memcpy(&value, raw.data(), sizeof value);
      if constexpr (std::is_same_v<T, bool>) {
        unsigned char bit = 0;
        if (ok_) std::memcpy(&bit, raw.data(), 1);
        value = bit == 1;
        if (bit > 1) ok_ = false;
      }
    } else {
      using Element = typename T::value_type;
      std::uint64_t count = 0;
      one(count);
      const auto raw = bytes(checked_product(count, sizeof(Element)).value_or(most_memory));
      if (!ok_) return;
      value.resize(static_cast<std::size_t>(count));
      if (!raw.empty()) std::memcpy(value.data(), raw.data(), raw.size());
    }
  }
  std::span<const std::byte> in_;
  bool ok_ = true;
};

// The same of bytes that may say anything; null where they hold none.
inline const std::byte* read_varint(const std::byte* in, const std::byte* end,
                                    std::uint64_t& value) noexcept {
  const std::byte* last = in;
  while (last != end && std::to_integer<unsigned>(*last) >= 0x80) ++last;
  if (last == end || static_cast<std::size_t>(last - in) >= longest_varint) return nullptr;
  return read_varint(in, value);
}

#ifndef NDEBUG
// Of the locks that this thread holds, a bit a rank.
inline unsigned& held_ranks() noexcept {
  static thread_local unsigned ranks = 0;
  return ranks;
}
#endif

// A mutex with a place in the order of all locks: a thread takes only one whose rank is higher than
// those it holds. Programs with assertions check it.
template <unsigned Rank>
class RankedMutex {
 public:
  void lock() {
    assert(held_ranks() >> Rank == 0);
    mutex_.lock();
    note(true);
  }
  bool try_lock() {
    if (!mutex_.try_lock()) return false;
    note(true);
    return true;
  }
  void unlock() noexcept {
    note(false);
    mutex_.unlock();
  }
  // Until `until` holds, which this thread sees with the mutex; others have it meanwhile.
  template <class Until>
  void wait(condition_variable& changed, Until until) {
    unique_lock<mutex> held{mutex_, adopt_lock};
    changed.wait(held, until);
    held.release();
  }
  template <class Time, class Until>
  void wait_for(condition_variable& changed, Time time, Until until) {
    unique_lock<mutex> held{mutex_, adopt_lock};
    changed.wait_for(held, time, until);
    held.release();
  }
  // For one more of this rank, while the first is held, in an order that all keep to.
  void lock_further() { mutex_.lock(); }
  void unlock_further() noexcept { mutex_.unlock(); }

 private:
  static void note([[maybe_unused]] bool held) noexcept {
#ifndef NDEBUG
    held_ranks() = held ? held_ranks() | 1u << Rank : held_ranks() & ~(1u << Rank);
#endif
  }
  mutex mutex_;
};

// Long work in pieces, so that those who wait for the same cores hardly notice: after each piece of
// a millisecond, `rest` is to let fifteen times as long pass. Without a rest there is none.
class Pace {
 public:
  using Clock = std::chrono::steady_clock;
  using Rest = std::function<void(Clock::duration)>;
  static constexpr std::chrono::microseconds piece{1000};
  static constexpr int rests = 15;

  Pace() = default;
  explicit Pace(Rest rest, std::chrono::microseconds work = piece, int times = rests)
      : rest_(std::move(rest)), piece_(work), rests_(times) {}

  // Between two steps of the work, which may take microseconds each.
  void step() {
    if (rest_ && Clock::now() - begun_ >= piece_) rest();
  }
  // The same for step n of many that take less.
  void step(std::size_t n) {
    if (n % 64 == 0) step();
  }
  // For what was worked since the last time.
  void rest() {
    if (!rest_) return;
    rest_(rests_ * (Clock::now() - begun_));
    begun_ = Clock::now();
  }

 private:
  Rest rest_;
  std::chrono::microseconds piece_ = piece;
  int rests_ = rests;
  Clock::time_point begun_ = Clock::now();
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 3: instruction sets. Owns the operations on integers, scores and sums that each instruction
// set brings: once for each, under a tag of its own, and once in scalar form as the reference. Uses
// nothing.
//
// Rows of int8 lie in panels (so that one instruction works on 16 rows):
// [panels][groups of 4 columns][16 rows][4 columns], stored as value + 128 in a u8. Rows of 4 bits
// lie in panels as well, two groups of columns to a byte: the first in the low half, stored as
// value + 8. What stands behind the last column does not matter, where the query is zero. Dot
// products with such rows are exact integers, the same on every instruction set.
//
// Nothing in rooms 3 and 4 calls an inline function of the standard library: they are compiled with
// the flags of several instruction sets into one program, and the linker would be free to keep the
// copy that only the newest processor can run.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

}  // namespace PERSONALIZE_NAMESPACE
}  // namespace v1
}  // namespace personalize
namespace personalize {
inline namespace v1 {
inline namespace PERSONALIZE_KERNELS_NAMESPACE {
namespace kernels {

inline constexpr std::size_t lanes = 16;
inline constexpr std::size_t panel_rows = 16;

PERSONALIZE_INLINE constexpr std::size_t padded(std::size_t n) noexcept {
  return (n + lanes - 1) / lanes * lanes;
}
// A panel is a sequence of steps of 64 bytes: four columns of 8 bits or eight columns of 4 bits.
inline constexpr std::size_t step_bytes = panel_rows * 4;
template <int Bits>
PERSONALIZE_INLINE constexpr std::size_t steps(std::size_t columns) noexcept {
  return Bits == 8 ? (columns + 3) / 4 : (columns + 7) / 8;
}
template <int Bits>
PERSONALIZE_INLINE constexpr std::size_t panel_bytes(std::size_t columns) noexcept {
  return steps<Bits>(columns) * step_bytes;
}

// The scalar reference.
struct Scalar {
  static constexpr const char* name = "scalar";
};
#ifndef PERSONALIZE_NO_XSIMD
#if XSIMD_WITH_SSE2
struct Sse2 {
  static constexpr const char* name = "sse2";
  using simd = xsimd::sse2;
};
#endif
#if XSIMD_WITH_FMA3_AVX2
struct Avx2 {
  static constexpr const char* name = "avx2+fma";
  using simd = xsimd::fma3<xsimd::avx2>;
};
#if defined(__AVXVNNI__)
struct AvxVnni : Avx2 {
  static constexpr const char* name = "avx2+fma+vnni";
};
#endif
#endif
#if defined(PERSONALIZE_AVX512_VNNI)
struct Avx512Vnni {
  static constexpr const char* name = "avx512+vnni";
  using simd = xsimd::avx512bw;
};
#endif
#if XSIMD_WITH_NEON64
struct Neon {
  static constexpr const char* name = "neon";
  using simd = xsimd::neon64;
};
#if defined(__ARM_FEATURE_DOTPROD)
struct NeonDot : Neon {
  static constexpr const char* name = "neon+dotprod";
};
#endif
#endif
#if XSIMD_WITH_WASM
struct Wasm {
  static constexpr const char* name = "wasm simd128";
  using simd = xsimd::wasm;
};
#endif
#endif

// The newest that the including translation unit's flags allow.
#if defined(PERSONALIZE_NO_XSIMD)
using Default = Scalar;
#elif defined(PERSONALIZE_AVX512_VNNI)
using Default = Avx512Vnni;
#elif defined(__AVXVNNI__) && XSIMD_WITH_FMA3_AVX2
using Default = AvxVnni;
#elif XSIMD_WITH_FMA3_AVX2
using Default = Avx2;
#elif XSIMD_WITH_SSE2
using Default = Sse2;
#elif XSIMD_WITH_NEON64 && defined(__ARM_FEATURE_DOTPROD)
using Default = NeonDot;
#elif XSIMD_WITH_NEON64
using Default = Neon;
#elif XSIMD_WITH_WASM
using Default = Wasm;
#else
using Default = Scalar;
#endif

// Rows in panels; Real is float, or std::uint16_t for bfloat16. The scores of a panel's sixteen
// rows with a query are query.scale * scales[r] * dot + biases[r]. Padding rows have a NaN for a
// bias.
template <class Real>
struct PanelRows {
  const std::uint8_t* panels;
  const Real* scales;  // [16] a panel
  const Real* biases;  // [16] a panel
  std::size_t columns;
  std::size_t first_row = 0;  // the number that the first of them goes by
};

// A query on its way through panels, and what it found there.
struct PanelQuery {
  const std::int8_t* values;  // [padded(columns)], zero behind the last column
  std::int32_t offset;  // takes back what rows were raised by: -128 (of 4 bits -8) * sum of values
  float scale;
  float limit = 0;
  float margin = 0;
  // Out: the rows whose scores reach the limit, ascending, and with rows of 8 bits these scores
  // less the margin and plus it, from `found` on, which counts on. Room for every row scanned.
  std::uint32_t* rows = nullptr;
  float* lower = nullptr;
  float* upper = nullptr;
  std::size_t found = 0;
};

// Integer dot products, conversion and comparison, one set an instruction set.
template <class Tag>
struct Ops;

template <>
struct Ops<Scalar> {
  static constexpr std::size_t panels = 1;
  static constexpr std::size_t most_sums = 1;  // panels x queries of four queries
  static constexpr int query_limit = 127;
  struct Sums {
    std::int32_t v[panel_rows];
  };
  static void start(Sums& s, std::int32_t offset) noexcept {
    for (std::int32_t& v : s.v) v = offset;
  }
  // A step of a panel, and the four columns of a query that it is multiplied with.
  using Rows = const std::uint8_t*;
  using Four = const std::int8_t*;
  static Rows load(const std::uint8_t* rows) noexcept { return rows; }
  static Four spread(const std::int8_t* query) noexcept { return query; }
  static void step(Sums& s, Rows rows, Four query) noexcept {
    for (std::size_t r = 0; r < panel_rows; ++r)
      for (std::size_t c = 0; c < 4; ++c) s.v[r] += rows[r * 4 + c] * query[c];
  }
  static void step_4bit(Sums& s, Rows rows, Four low, Four high) noexcept {
    for (std::size_t r = 0; r < panel_rows; ++r)
      for (std::size_t c = 0; c < 4; ++c)
        s.v[r] += (rows[r * 4 + c] & 15) * low[c] + (rows[r * 4 + c] >> 4) * high[c];
  }
  // Of a panel's rows.
  struct Scores {
    float v[panel_rows];
  };
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    for (std::size_t r = 0; r < panel_rows; ++r)
      scores.v[r] = static_cast<float>(s.v[r]) * scale * wide(scales[r]) + wide(biases[r]);
    return scores;
  }
  // Bit r tells whether row r's score does.
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    std::uint32_t mask = 0;
    for (std::size_t r = 0; r < panel_rows; ++r)
      mask |= static_cast<std::uint32_t>(s.v[r] >= limit) << r;
    return mask;
  }
  static void store(const Scores& s, float* out) noexcept {
    for (std::size_t r = 0; r < panel_rows; ++r) out[r] = s.v[r];
  }
  static float wide(float v) noexcept { return v; }
  static float wide(std::uint16_t v) noexcept {
    return __builtin_bit_cast(float, std::uint32_t{v} << 16);
  }
  // Of a row with a query, both signed; offset: -128 * sum of query.
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t /*offset*/) noexcept {
    std::int32_t sum = 0;
    for (std::size_t c = 0; c < columns; ++c) sum += row[c] * query[c];
    return sum;
  }
  // q[0, 16) = x / step, rounded to nearest.
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    for (std::size_t l = 0; l < lanes; ++l)
      q[l] = static_cast<std::int8_t>(__builtin_lrintf(x[l] * inverse));
  }
  // Eight partial sums in double: products of a float with an int8 or a float are exact in double,
  // so a fused multiply-add changes nothing, and every instruction set gets the same bits.
  struct Doubles {
    double v[8];
  };
  static void clear(Doubles& s) noexcept {
    for (double& v : s.v) v = 0;
  }
  template <class Element>
  static void multiply(Doubles& s, const Element* row, const double* query) noexcept {
    for (std::size_t l = 0; l < 8; ++l) s.v[l] += static_cast<double>(row[l]) * query[l];
  }
  static void store(const Doubles& s, double* out) noexcept {
    for (std::size_t l = 0; l < 8; ++l) out[l] = s.v[l];
  }
};

#ifndef PERSONALIZE_NO_XSIMD
#if XSIMD_WITH_SSE2
template <>
struct Ops<Sse2> {
  static constexpr std::size_t panels = 1;
  static constexpr std::size_t most_sums = 1;
  static constexpr int query_limit = 127;
  struct Sums {
    __m128i v[8];  // two rows each, two partial sums a row
    __m128i offset;
  };
  static void start(Sums& s, std::int32_t offset) noexcept {
    PERSONALIZE_UNROLL
    for (__m128i& v : s.v) v = _mm_setzero_si128();
    s.offset = _mm_set1_epi32(offset);
  }
  struct Rows {
    __m128i v[4];
  };
  using Four = __m128i;  // widened, twice
  static Rows load(const std::uint8_t* rows) noexcept {
    Rows loaded;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      loaded.v[p] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + 16 * p));
    return loaded;
  }
  static Four spread(const std::int8_t* query) noexcept {
    std::int32_t four;
    __builtin_memcpy(&four, query, 4);
    const __m128i bytes = _mm_cvtsi32_si128(four);
    const __m128i words = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    return _mm_unpacklo_epi64(words, words);
  }
  static void add_products(Sums& s, std::size_t p, __m128i rows, __m128i q) noexcept {
    const __m128i low = _mm_unpacklo_epi8(rows, _mm_setzero_si128());
    const __m128i high = _mm_unpackhi_epi8(rows, _mm_setzero_si128());
    s.v[2 * p] = _mm_add_epi32(s.v[2 * p], _mm_madd_epi16(low, q));
    s.v[2 * p + 1] = _mm_add_epi32(s.v[2 * p + 1], _mm_madd_epi16(high, q));
  }
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) add_products(s, p, rows.v[p], query);
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    const __m128i nibble = _mm_set1_epi8(15);
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
      add_products(s, p, _mm_and_si128(rows.v[p], nibble), low);
      add_products(s, p, _mm_and_si128(_mm_srli_epi16(rows.v[p], 4), nibble), high);
    }
  }
  static __m128 four_dots(const Sums& s, std::size_t p, float scale) noexcept {
    const __m128 a = _mm_castsi128_ps(s.v[2 * p]), b = _mm_castsi128_ps(s.v[2 * p + 1]);
    const __m128i even = _mm_castps_si128(_mm_shuffle_ps(a, b, 0x88));
    const __m128i odd = _mm_castps_si128(_mm_shuffle_ps(a, b, 0xdd));
    return _mm_mul_ps(_mm_cvtepi32_ps(_mm_add_epi32(_mm_add_epi32(even, odd), s.offset)),
                      _mm_set1_ps(scale));
  }
  struct Scores {
    __m128 v[4];
  };
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      scores.v[p] = _mm_add_ps(_mm_mul_ps(four_dots(s, p, scale), wide(scales + 4 * p)),
                               wide(biases + 4 * p));
    return scores;
  }
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    std::uint32_t mask = 0;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      mask |= static_cast<std::uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(s.v[p], _mm_set1_ps(limit))))
              << (4 * p);
    return mask;
  }
  static void store(const Scores& s, float* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) _mm_storeu_ps(out + 4 * p, s.v[p]);
  }
  static __m128 wide(const float* four) noexcept { return _mm_loadu_ps(four); }
  static __m128 wide(const std::uint16_t* four) noexcept {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(
        _mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(four))));
  }
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t /*offset*/) noexcept {
    __m128i sum = _mm_setzero_si128();
    for (std::size_t c = 0; c < columns; c += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c));
      const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(query + c));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8),
                                              _mm_srai_epi16(_mm_unpacklo_epi8(q, q), 8)));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(v, v), 8),
                                              _mm_srai_epi16(_mm_unpackhi_epi8(q, q), 8)));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    const auto four = [&](std::size_t p) {
      return _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4 * p), _mm_set1_ps(inverse)));
    };
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(q),
        _mm_packs_epi16(_mm_packs_epi32(four(0), four(1)), _mm_packs_epi32(four(2), four(3))));
  }
  struct Doubles {
    __m128d v[4];
  };
  static void clear(Doubles& s) noexcept {
    PERSONALIZE_UNROLL
    for (__m128d& v : s.v) v = _mm_setzero_pd();
  }
  static void add(Doubles& s, std::size_t p, __m128d row, const double* query) noexcept {
    s.v[p] = _mm_add_pd(s.v[p], _mm_mul_pd(row, _mm_loadu_pd(query + 2 * p)));
  }
  static void multiply(Doubles& s, const std::int8_t* row, const double* query) noexcept {
    __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
    v = _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8);
    const __m128i low = _mm_srai_epi32(_mm_unpacklo_epi16(v, v), 16);
    const __m128i high = _mm_srai_epi32(_mm_unpackhi_epi16(v, v), 16);
    add(s, 0, _mm_cvtepi32_pd(low), query);
    add(s, 1, _mm_cvtepi32_pd(_mm_shuffle_epi32(low, 0xee)), query);
    add(s, 2, _mm_cvtepi32_pd(high), query);
    add(s, 3, _mm_cvtepi32_pd(_mm_shuffle_epi32(high, 0xee)), query);
  }
  static void multiply(Doubles& s, const float* row, const double* query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p) {
      const __m128 v = _mm_loadu_ps(row + 4 * p);
      add(s, 2 * p, _mm_cvtps_pd(v), query);
      add(s, 2 * p + 1, _mm_cvtps_pd(_mm_movehl_ps(v, v)), query);
    }
  }
  static void store(const Doubles& s, double* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) _mm_storeu_pd(out + 2 * p, s.v[p]);
  }
};
#endif

#if XSIMD_WITH_FMA3_AVX2
template <>
struct Ops<Avx2> {
  static constexpr std::size_t panels = 4;
  static constexpr std::size_t most_sums = 4;
  // 255 * 63 * 2 fits the 16 bits that maddubs saturates at.
  static constexpr int query_limit = 63;
  struct Sums {
    __m256i v[2];
  };
  static void start(Sums& s, std::int32_t offset) noexcept {
    s.v[0] = s.v[1] = _mm256_set1_epi32(offset);
  }
  struct Rows {
    __m256i v[2];
  };
  using Four = __m256i;  // eight times
  static Rows load(const std::uint8_t* rows) noexcept {
    return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)),
             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 32))}};
  }
  static Four spread(const std::int8_t* query) noexcept {
    std::int32_t four;
    __builtin_memcpy(&four, query, 4);
    return _mm256_set1_epi32(four);
  }
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p) {
      const __m256i pairs = _mm256_maddubs_epi16(rows.v[p], query);
      s.v[p] = _mm256_add_epi32(s.v[p], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    const __m256i nibble = _mm256_set1_epi8(15);
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p) {
      const __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(rows.v[p], nibble), low);
      const __m256i second =
          _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(rows.v[p], 4), nibble), high);
      s.v[p] = _mm256_add_epi32(
          s.v[p], _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)));
    }
  }
  static __m256 eight_dots(const Sums& s, std::size_t p, float scale) noexcept {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(s.v[p]), _mm256_set1_ps(scale));
  }
  struct Scores {
    __m256 v[2];
  };
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p)
      scores.v[p] =
          _mm256_fmadd_ps(eight_dots(s, p, scale), wide(scales + 8 * p), wide(biases + 8 * p));
    return scores;
  }
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    const auto eight = [&](std::size_t p) {
      return static_cast<std::uint32_t>(
          _mm256_movemask_ps(_mm256_cmp_ps(s.v[p], _mm256_set1_ps(limit), _CMP_GE_OQ)));
    };
    return eight(0) | eight(1) << 8;
  }
  static void store(const Scores& s, float* out) noexcept {
    _mm256_storeu_ps(out, s.v[0]);
    _mm256_storeu_ps(out + 8, s.v[1]);
  }
  static __m256 wide(const float* eight) noexcept { return _mm256_loadu_ps(eight); }
  static __m256 wide(const std::uint16_t* eight) noexcept {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t /*offset*/) noexcept {
    __m256i sums = _mm256_setzero_si256();
    for (std::size_t c = 0; c < columns; c += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c));
      const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(query + c));
      sums = _mm256_add_epi32(sums,
                              _mm256_madd_epi16(_mm256_cvtepi8_epi16(v), _mm256_cvtepi8_epi16(q)));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    const __m256i low =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
    const __m256i high =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), _mm256_set1_ps(inverse)));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(q),
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  struct Doubles {
    __m256d v[2];
  };
  static void clear(Doubles& s) noexcept { s.v[0] = s.v[1] = _mm256_setzero_pd(); }
  static void multiply(Doubles& s, const std::int8_t* row, const double* query) noexcept {
    const __m256i wide =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
    s.v[0] = _mm256_fmadd_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(wide)),
                             _mm256_loadu_pd(query), s.v[0]);
    s.v[1] = _mm256_fmadd_pd(_mm256_cvtepi32_pd(_mm256_extracti128_si256(wide, 1)),
                             _mm256_loadu_pd(query + 4), s.v[1]);
  }
  static void multiply(Doubles& s, const float* row, const double* query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p)
      s.v[p] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(row + 4 * p)),
                               _mm256_loadu_pd(query + 4 * p), s.v[p]);
  }
  static void store(const Doubles& s, double* out) noexcept {
    _mm256_storeu_pd(out, s.v[0]);
    _mm256_storeu_pd(out + 4, s.v[1]);
  }
};
#if defined(__AVXVNNI__)
template <>
struct Ops<AvxVnni> : Ops<Avx2> {
  static constexpr int query_limit = 127;
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p) s.v[p] = _mm256_dpbusd_avx_epi32(s.v[p], rows.v[p], query);
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    const __m256i nibble = _mm256_set1_epi8(15);
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 2; ++p) {
      s.v[p] = _mm256_dpbusd_avx_epi32(s.v[p], _mm256_and_si256(rows.v[p], nibble), low);
      s.v[p] = _mm256_dpbusd_avx_epi32(
          s.v[p], _mm256_and_si256(_mm256_srli_epi16(rows.v[p], 4), nibble), high);
    }
  }
};
#endif
#endif

#if defined(PERSONALIZE_AVX512_VNNI)
template <>
struct Ops<Avx512Vnni> {
  static constexpr std::size_t panels = 8;
  static constexpr std::size_t most_sums = 16;
  static constexpr int query_limit = 127;
  struct Sums {
    __m512i v;
  };
  static void start(Sums& s, std::int32_t offset) noexcept { s.v = _mm512_set1_epi32(offset); }
  using Rows = __m512i;
  using Four = __m512i;  // sixteen times
  static Rows load(const std::uint8_t* rows) noexcept { return kept(_mm512_loadu_si512(rows)); }
  static Four spread(const std::int8_t* query) noexcept {
    std::int32_t four;
    __builtin_memcpy(&four, query, 4);
    return _mm512_set1_epi32(four);
  }
  static void step(Sums& s, Rows rows, Four query) noexcept {
    s.v = kept(_mm512_dpbusd_epi32(s.v, rows, query));
  }
  static void step_4bit(Sums& s, Rows rows, Four low, Four high) noexcept {
    const __m512i nibble = _mm512_set1_epi8(15);
    s.v = _mm512_dpbusd_epi32(s.v, _mm512_and_si512(rows, nibble), low);
    s.v =
        kept(_mm512_dpbusd_epi32(s.v, _mm512_and_si512(_mm512_srli_epi16(rows, 4), nibble), high));
  }
  // In one register: left alone, GCC 12 loads rows again for each query, copies sums to and fro and
  // runs out of registers over it.
  static __m512i kept(__m512i v) noexcept {
    asm("" : "+v"(v));
    return v;
  }
  struct Scores {
    __m512 v;
  };
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    const __m512 dots = _mm512_mul_ps(_mm512_cvtepi32_ps(s.v), _mm512_set1_ps(scale));
    return {_mm512_fmadd_ps(dots, wide(scales), wide(biases))};
  }
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    return _mm512_cmp_ps_mask(s.v, _mm512_set1_ps(limit), _CMP_GE_OQ);
  }
  static void store(const Scores& s, float* out) noexcept { _mm512_storeu_ps(out, s.v); }
  static __m512 wide(const float* sixteen) noexcept { return _mm512_loadu_ps(sixteen); }
  static __m512 wide(const std::uint16_t* sixteen) noexcept {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sixteen));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t offset) noexcept {
    __m512i sums = _mm512_setzero_si512();
    for (std::size_t c = 0; c < columns; c += 64) {
      const __mmask64 inside =
          columns - c >= 64 ? ~__mmask64{0} : (__mmask64{1} << (columns - c)) - 1;
      const __m512i v =
          _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, row + c), _mm512_set1_epi8(-128));
      sums = _mm512_dpbusd_epi32(sums, v, _mm512_maskz_loadu_epi8(inside, query + c));
    }
    return _mm512_reduce_add_epi32(sums) + offset;
  }
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    const __m512i wide =
        _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(wide));
  }
  struct Doubles {
    __m512d v;
  };
  static void clear(Doubles& s) noexcept { s.v = _mm512_setzero_pd(); }
  static void multiply(Doubles& s, const std::int8_t* row, const double* query) noexcept {
    const __m256i wide =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
    s.v = _mm512_fmadd_pd(_mm512_cvtepi32_pd(wide), _mm512_loadu_pd(query), s.v);
  }
  static void multiply(Doubles& s, const float* row, const double* query) noexcept {
    s.v = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(row)), _mm512_loadu_pd(query), s.v);
  }
  static void store(const Doubles& s, double* out) noexcept { _mm512_storeu_pd(out, s.v); }
};
#endif

#if XSIMD_WITH_NEON64
template <>
struct Ops<Neon> {
  static constexpr std::size_t panels = 2;
  static constexpr std::size_t most_sums = 2;
  static constexpr int query_limit = 127;
  struct Sums {
    int32x4_t v[8];  // two rows each, two partial sums a row
    std::int32_t offset;
  };
  static void start(Sums& s, std::int32_t offset) noexcept {
    PERSONALIZE_UNROLL
    for (int32x4_t& v : s.v) v = vdupq_n_s32(0);
    s.offset = offset;
  }
  struct Rows {
    uint8x16_t v[4];
  };
  using Four = int16x8_t;  // widened, twice
  static Rows load(const std::uint8_t* rows) noexcept {
    return {{vld1q_u8(rows), vld1q_u8(rows + 16), vld1q_u8(rows + 32), vld1q_u8(rows + 48)}};
  }
  static Four spread(const std::int8_t* query) noexcept {
    std::int32_t four;
    __builtin_memcpy(&four, query, 4);
    return vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  }
  static void add_products(Sums& s, std::size_t p, uint8x16_t rows, int16x8_t q) noexcept {
    s.v[2 * p] = pairs(s.v[2 * p], vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(rows))), q);
    s.v[2 * p + 1] = pairs(s.v[2 * p + 1], vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(rows))), q);
  }
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) add_products(s, p, rows.v[p], query);
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
      add_products(s, p, vandq_u8(rows.v[p], vdupq_n_u8(15)), low);
      add_products(s, p, vshrq_n_u8(rows.v[p], 4), high);
    }
  }
  static int32x4_t pairs(int32x4_t sum, int16x8_t a, int16x8_t q) noexcept {
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(q)),
                                     vmull_s16(vget_high_s16(a), vget_high_s16(q))));
  }
  static int32x4_t dots(const Sums& s, std::size_t p) noexcept {
    return vaddq_s32(vpaddq_s32(s.v[2 * p], s.v[2 * p + 1]), vdupq_n_s32(s.offset));
  }
  struct Scores {
    float32x4_t v[4];
  };
  template <class Real>
  static float32x4_t four_scores(int32x4_t dots, float scale, const Real* scales,
                                 const Real* biases) noexcept {
    return vfmaq_f32(wide(biases), vmulq_n_f32(vcvtq_f32_s32(dots), scale), wide(scales));
  }
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      scores.v[p] = four_scores(dots(s, p), scale, scales + 4 * p, biases + 4 * p);
    return scores;
  }
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    const uint32x4_t weights{1, 2, 4, 8};
    std::uint32_t mask = 0;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      mask |= vaddvq_u32(vandq_u32(vcgeq_f32(s.v[p], vdupq_n_f32(limit)), weights)) << (4 * p);
    return mask;
  }
  static void store(const Scores& s, float* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) vst1q_f32(out + 4 * p, s.v[p]);
  }
  static float32x4_t wide(const float* four) noexcept { return vld1q_f32(four); }
  static float32x4_t wide(const std::uint16_t* four) noexcept {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(four), 16));
  }
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t /*offset*/) noexcept {
    int32x4_t sum = vdupq_n_s32(0);
    for (std::size_t c = 0; c < columns; c += 16) {
      const int8x16_t v = vld1q_s8(row + c), q = vld1q_s8(query + c);
      sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(v), vget_low_s8(q)));
      sum = vpadalq_s16(sum, vmull_high_s8(v, q));
    }
    return vaddvq_s32(sum);
  }
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    const auto four = [&](std::size_t p) {
      return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * p), inverse)));
    };
    vst1q_s8(q, vcombine_s8(vqmovn_s16(vcombine_s16(four(0), four(1))),
                            vqmovn_s16(vcombine_s16(four(2), four(3)))));
  }
  struct Doubles {
    float64x2_t v[4];
  };
  static void clear(Doubles& s) noexcept {
    PERSONALIZE_UNROLL
    for (float64x2_t& v : s.v) v = vdupq_n_f64(0);
  }
  static void add(Doubles& s, std::size_t p, float64x2_t row, const double* query) noexcept {
    s.v[p] = vfmaq_f64(s.v[p], row, vld1q_f64(query + 2 * p));
  }
  static void multiply(Doubles& s, const std::int8_t* row, const double* query) noexcept {
    const int16x8_t wide = vmovl_s8(vld1_s8(row));
    const int32x4_t low = vmovl_s16(vget_low_s16(wide)), high = vmovl_s16(vget_high_s16(wide));
    add(s, 0, vcvtq_f64_s64(vmovl_s32(vget_low_s32(low))), query);
    add(s, 1, vcvtq_f64_s64(vmovl_s32(vget_high_s32(low))), query);
    add(s, 2, vcvtq_f64_s64(vmovl_s32(vget_low_s32(high))), query);
    add(s, 3, vcvtq_f64_s64(vmovl_s32(vget_high_s32(high))), query);
  }
  static void multiply(Doubles& s, const float* row, const double* query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) add(s, p, vcvt_f64_f32(vld1_f32(row + 2 * p)), query);
  }
  static void store(const Doubles& s, double* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) vst1q_f64(out + 2 * p, s.v[p]);
  }
};
#if defined(__ARM_FEATURE_DOTPROD)
template <>
struct Ops<NeonDot> : Ops<Neon> {
  static constexpr std::size_t panels = 4;
  static constexpr std::size_t most_sums = 4;
  struct Sums {
    int32x4_t v[4];
  };
  // The rows come back to their sign for sdot, so there is nothing to take back.
  static void start(Sums& s, std::int32_t) noexcept {
    PERSONALIZE_UNROLL
    for (int32x4_t& v : s.v) v = vdupq_n_s32(0);
  }
  using Four = int8x16_t;  // four times
  static Four spread(const std::int8_t* query) noexcept {
    std::int32_t four;
    __builtin_memcpy(&four, query, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      s.v[p] = vdotq_s32(s.v[p], vreinterpretq_s8_u8(veorq_u8(rows.v[p], vdupq_n_u8(0x80))), query);
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    const auto lowered = [](uint8x16_t v) {
      return vsubq_s8(vreinterpretq_s8_u8(v), vdupq_n_s8(8));
    };
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
      s.v[p] = vdotq_s32(s.v[p], lowered(vandq_u8(rows.v[p], vdupq_n_u8(15))), low);
      s.v[p] = vdotq_s32(s.v[p], lowered(vshrq_n_u8(rows.v[p], 4)), high);
    }
  }
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      scores.v[p] = four_scores(s.v[p], scale, scales + 4 * p, biases + 4 * p);
    return scores;
  }
};
#endif
#endif

#if XSIMD_WITH_WASM
template <>
struct Ops<Wasm> {
  static constexpr std::size_t panels = 1;
  static constexpr std::size_t most_sums = 1;
  static constexpr int query_limit = 127;
  struct Sums {
    v128_t v[8];  // two rows each, two partial sums a row
    v128_t offset;
  };
  static void start(Sums& s, std::int32_t offset) noexcept {
    PERSONALIZE_UNROLL
    for (v128_t& v : s.v) v = wasm_i32x4_splat(0);
    s.offset = wasm_i32x4_splat(offset);
  }
  struct Rows {
    v128_t v[4];
  };
  using Four = v128_t;  // widened, twice
  static Rows load(const std::uint8_t* rows) noexcept {
    return {{wasm_v128_load(rows), wasm_v128_load(rows + 16), wasm_v128_load(rows + 32),
             wasm_v128_load(rows + 48)}};
  }
  static Four spread(const std::int8_t* query) noexcept {
    return wasm_i16x8_extend_low_i8x16(wasm_v128_load32_splat(query));
  }
  static void add_products(Sums& s, std::size_t p, v128_t rows, v128_t q) noexcept {
    const v128_t low = wasm_u16x8_extend_low_u8x16(rows);
    const v128_t high = wasm_u16x8_extend_high_u8x16(rows);
    s.v[2 * p] = wasm_i32x4_add(s.v[2 * p], wasm_i32x4_dot_i16x8(low, q));
    s.v[2 * p + 1] = wasm_i32x4_add(s.v[2 * p + 1], wasm_i32x4_dot_i16x8(high, q));
  }
  static void step(Sums& s, const Rows& rows, Four query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) add_products(s, p, rows.v[p], query);
  }
  static void step_4bit(Sums& s, const Rows& rows, Four low, Four high) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
      add_products(s, p, wasm_v128_and(rows.v[p], wasm_i8x16_splat(15)), low);
      add_products(s, p, wasm_u8x16_shr(rows.v[p], 4), high);
    }
  }
  static v128_t four_dots(const Sums& s, std::size_t p, float scale) noexcept {
    const v128_t even = wasm_i32x4_shuffle(s.v[2 * p], s.v[2 * p + 1], 0, 2, 4, 6);
    const v128_t odd = wasm_i32x4_shuffle(s.v[2 * p], s.v[2 * p + 1], 1, 3, 5, 7);
    const v128_t dots = wasm_i32x4_add(wasm_i32x4_add(even, odd), s.offset);
    return wasm_f32x4_mul(wasm_f32x4_convert_i32x4(dots), wasm_f32x4_splat(scale));
  }
  struct Scores {
    v128_t v[4];
  };
  template <class Real>
  static Scores scores(const Sums& s, float scale, const Real* scales,
                       const Real* biases) noexcept {
    Scores scores;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      scores.v[p] = wasm_f32x4_add(wasm_f32x4_mul(four_dots(s, p, scale), wide(scales + 4 * p)),
                                   wide(biases + 4 * p));
    return scores;
  }
  static std::uint32_t reaching(const Scores& s, float limit) noexcept {
    std::uint32_t mask = 0;
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      mask |= static_cast<std::uint32_t>(
                  wasm_i32x4_bitmask(wasm_f32x4_ge(s.v[p], wasm_f32x4_splat(limit))))
              << (4 * p);
    return mask;
  }
  static void store(const Scores& s, float* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) wasm_v128_store(out + 4 * p, s.v[p]);
  }
  static v128_t wide(const float* four) noexcept { return wasm_v128_load(four); }
  static v128_t wide(const std::uint16_t* four) noexcept {
    return wasm_i32x4_shl(wasm_u32x4_load16x4(four), 16);
  }
  static std::int32_t dot(const std::int8_t* row, const std::int8_t* query, std::size_t columns,
                          std::int32_t /*offset*/) noexcept {
    v128_t sum = wasm_i32x4_splat(0);
    for (std::size_t c = 0; c < columns; c += 16) {
      const v128_t v = wasm_v128_load(row + c), q = wasm_v128_load(query + c);
      sum =
          wasm_i32x4_add(sum, wasm_i32x4_extadd_pairwise_i16x8(wasm_i16x8_extmul_low_i8x16(v, q)));
      sum =
          wasm_i32x4_add(sum, wasm_i32x4_extadd_pairwise_i16x8(wasm_i16x8_extmul_high_i8x16(v, q)));
    }
    return wasm_i32x4_extract_lane(sum, 0) + wasm_i32x4_extract_lane(sum, 1) +
           wasm_i32x4_extract_lane(sum, 2) + wasm_i32x4_extract_lane(sum, 3);
  }
  static void quantise(const float* x, float inverse, std::int8_t* q) noexcept {
    const auto four = [&](std::size_t p) {
      return wasm_i32x4_trunc_sat_f32x4(
          wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(x + 4 * p), wasm_f32x4_splat(inverse))));
    };
    wasm_v128_store(q, wasm_i8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(four(0), four(1)),
                                               wasm_i16x8_narrow_i32x4(four(2), four(3))));
  }
  struct Doubles {
    v128_t v[4];
  };
  static void clear(Doubles& s) noexcept {
    PERSONALIZE_UNROLL
    for (v128_t& v : s.v) v = wasm_f64x2_splat(0);
  }
  static void add(Doubles& s, std::size_t p, v128_t row, const double* query) noexcept {
    s.v[p] = wasm_f64x2_add(s.v[p], wasm_f64x2_mul(row, wasm_v128_load(query + 2 * p)));
  }
  static void multiply(Doubles& s, const std::int8_t* row, const double* query) noexcept {
    const v128_t v = wasm_i16x8_load8x8(row);
    const v128_t low = wasm_i32x4_extend_low_i16x8(v), high = wasm_i32x4_extend_high_i16x8(v);
    add(s, 0, wasm_f64x2_convert_low_i32x4(low), query);
    add(s, 1, wasm_f64x2_convert_low_i32x4(wasm_i32x4_shuffle(low, low, 2, 3, 2, 3)), query);
    add(s, 2, wasm_f64x2_convert_low_i32x4(high), query);
    add(s, 3, wasm_f64x2_convert_low_i32x4(wasm_i32x4_shuffle(high, high, 2, 3, 2, 3)), query);
  }
  static void multiply(Doubles& s, const float* row, const double* query) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p)
      add(s, p, wasm_f64x2_promote_low_f32x4(wasm_v128_load64_zero(row + 2 * p)), query);
  }
  static void store(const Doubles& s, double* out) noexcept {
    PERSONALIZE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) wasm_v128_store(out + 2 * p, s.v[p]);
  }
};
#endif
#endif  // PERSONALIZE_NO_XSIMD

}  // namespace kernels

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 4: kernels. Owns the arithmetic on rows and vectors, made of an instruction set's
// operations, and which instruction set a program uses. Uses room 3.
//
// Vectors are padded to a multiple of `lanes` floats. A kernel may read the padding, and may read
// up to `lanes` elements past a row of a matrix: Matrix (room 6) keeps that slack.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace kernels {

// Halves [low, high] for Vectors::kth_largest. count_at_least(limit): how many values reach it; k
// reach low. least: of the values above -inf, not below it where there are none. The tag keeps each
// instruction set's copy apart.
template <class Tag, class Count>
float halve(std::size_t k, float low, float least, float high, Count count_at_least) noexcept {
  if (low < least) low = least < high ? least : high;
  for (int step = 0; step < 20; ++step) {
    const float middle = low + 0.5f * (high - low);
    if (!(middle > low && middle < high)) break;
    const std::size_t count = count_at_least(middle);
    (count >= k ? low : high) = middle;
    if (count >= k && count <= k + k / 16) break;
  }
  return low;
}

// The curves of gates and activations, each an odd rational function fitted for the least relative
// error (iteratively reweighted least squares) where the curve still differs from 1 in f32; beyond,
// the fraction passes 1 and is cut off, so that all three are exact there. Bounds over all finite
// floats, as the tests measure them against double precision, on every instruction set:
//   tanh     relative 5e-7
//   sigmoid  absolute 3e-7; within [0, 1]
//   gelu     absolute 1e-6 for x < 2, relative 5e-7 beyond
// A NaN stays one. Arithmetic: Value, fma, limited(v, m) for min(max(v, -m), m), of a NaN anything,
// and unless_nan(x, y): y, or x where it is a NaN.
template <class Arithmetic>
struct Curves {
  using Value = typename Arithmetic::Value;

  static Value tanh(const Value& x) noexcept {
    return odd(x, 9.47f,
               Terms<5>{9.999999792e-1f, 1.337971633e-1f, 3.494032382e-3f, 2.058343932e-5f,
                        1.331900700e-8f},
               Terms<5>{1.0f, 4.671303161e-1f, 2.587106552e-2f, 3.283088975e-4f, 7.761994116e-7f});
  }
  static Value sigmoid(const Value& x) noexcept {
    const Value half(0.5f);
    return Arithmetic::fma(tanh(x * half), half, half);
  }
  // Hendrycks and Gimpel 2016, the exact form: x / 2 (1 + erf(x / sqrt 2)).
  static Value gelu(const Value& x) noexcept {
    const Value half = x * Value(0.5f);
    return Arithmetic::fma(half, erf(x * Value(0.70710678f)), half);
  }

 private:
  template <std::size_t Count>
  struct Terms {
    float of[Count];
  };

  static Value erf(const Value& x) noexcept {
    return odd(x, 4.12f,
               Terms<6>{1.128379145f, 1.907785452e-1f, 5.278956967e-2f, 3.779376125e-3f,
                        2.848023689e-4f, 2.041999631e-6f},
               Terms<6>{1.0f, 5.024058047e-1f, 1.142553212e-1f, 1.499697363e-2f, 1.165154200e-3f,
                        3.800404498e-5f});
  }
  // x P(x^2) / Q(x^2), cut off at 1, which it passes before |x| = reach. Ascending powers.
  template <std::size_t Count>
  static Value odd(const Value& x, float reach, const Terms<Count>& p,
                   const Terms<Count>& q) noexcept {
    const Value v = Arithmetic::limited(x, reach), t = v * v;
    const Value curve = Arithmetic::limited(v * polynomial(t, p) / polynomial(t, q), 1.0f);
    return Arithmetic::unless_nan(x, curve);
  }
  template <std::size_t Count>
  static Value polynomial(const Value& t, const Terms<Count>& terms) noexcept {
    Value sum(terms.of[Count - 1]);
    PERSONALIZE_UNROLL
    for (std::size_t i = Count - 1; i > 0; --i)
      sum = Arithmetic::fma(sum, t, Value(terms.of[i - 1]));
    return sum;
  }
};

// The f32 vector work of the encoder and the scorer, in batches where there is xsimd.
template <class Tag>
struct Vectors;

template <>
struct Vectors<Scalar> {
  // y = W x + bias. packed: [blocks][inputs][lanes], the outputs of a block side by side;
  // bias, y: [blocks * lanes].
  static void matrix_vector(const float* packed, const float* bias, std::size_t inputs,
                            std::size_t blocks, const float* x, float* y) noexcept {
    for (std::size_t b = 0; b < blocks; ++b) {
      for (std::size_t l = 0; l < lanes; ++l) {
        float sum = bias[b * lanes + l];
        for (std::size_t i = 0; i < inputs; ++i) sum += packed[(b * inputs + i) * lanes + l] * x[i];
        y[b * lanes + l] = sum;
      }
    }
  }

  // y[r] = rows[r] . x + bias[r]. rows: [count, columns] row-major; x: [padded(columns)], zero
  // beyond columns.
  static void rows_vector(const float* rows, const float* bias, std::size_t columns,
                          std::size_t count, const float* x, float* y) noexcept {
    for (std::size_t r = 0; r < count; ++r) {
      float sum = bias[r];
      for (std::size_t c = 0; c < columns; ++c) sum += rows[r * columns + c] * x[c];
      y[r] = sum;
    }
  }

  // GRU in PyTorch's convention. input, recurrent: gates r, z, n, `stride` floats apart:
  // r = sigmoid(i_r + h_r), z = sigmoid(i_z + h_z), n = tanh(i_n + r h_n), h = (1 - z) n + z h.
  static void gru_gates(std::size_t size, std::size_t stride, const float* input,
                        const float* recurrent, float* hidden) noexcept {
    for (std::size_t j = 0; j < size; ++j) {
      const float r = Curve::sigmoid(input[j] + recurrent[j]);
      const float z = Curve::sigmoid(input[stride + j] + recurrent[stride + j]);
      const float n = Curve::tanh(input[2 * stride + j] + r * recurrent[2 * stride + j]);
      hidden[j] = n + z * (hidden[j] - n);
    }
  }

  // x = (x - mean) / sqrt(variance + epsilon) * weight + bias, over the first `size` elements.
  // Returns 1 / sqrt(variance + epsilon).
  static float layer_norm(std::size_t size, float epsilon, const float* weight, const float* bias,
                          float* x) noexcept {
    float sum = 0;
    for (std::size_t j = 0; j < size; ++j) sum += x[j];
    const float mean = sum / static_cast<float>(size);
    float squares = 0;
    for (std::size_t j = 0; j < size; ++j) squares += (x[j] - mean) * (x[j] - mean);
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + epsilon);
    for (std::size_t j = 0; j < size; ++j) x[j] = (x[j] - mean) * scale * weight[j] + bias[j];
    return scale;
  }

  // y = scale * (rows[0] + ... + rows[count - 1]) + bias, over `size` elements, a multiple of
  // `lanes`.
  static void scaled_sum(std::size_t size, const float* const* rows, std::size_t count, float scale,
                         const float* bias, float* y) noexcept {
    for (std::size_t j = 0; j < size; ++j) {
      float sum = rows[0][j];
      for (std::size_t r = 1; r < count; ++r) sum += rows[r][j];
      y[j] = sum * scale + bias[j];
    }
  }

  static void sigmoid(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = Curve::sigmoid(x[j]);
  }
  static void tanh(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = Curve::tanh(x[j]);
  }
  static void relu(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = x[j] > 0 ? x[j] : 0;
  }
  static void gelu(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = Curve::gelu(x[j]);
  }
  // A value that at least k of x[0, size) reach, and few more: below the k-th largest by some
  // places at most, unless many are alike. Halves the range between the largest and `low`, which k
  // must reach; -inf stands for the smallest that is not -inf. A NaN reaches nothing. size: a
  // multiple of `lanes`.
  static float kth_largest(std::size_t size, const float* x, std::size_t k, float low) noexcept {
    float high = -__builtin_inff(), least = __builtin_inff();
    for (std::size_t j = 0; j < size; ++j) {
      high = x[j] > high ? x[j] : high;
      least = x[j] < least && x[j] > -__builtin_inff() ? x[j] : least;
    }
    return halve<Scalar>(k, low, least, high, [&](float limit) {
      std::size_t count = 0;
      for (std::size_t j = 0; j < size; ++j) count += x[j] >= limit;
      return count;
    });
  }
  // The largest |x|.
  static float largest(std::size_t size, const float* x) noexcept {
    float most = 0;
    for (std::size_t j = 0; j < size; ++j) {
      const float magnitude = __builtin_fabsf(x[j]);
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }

 private:
  struct Arithmetic {
    using Value = float;
    static float fma(float a, float b, float c) noexcept { return a * b + c; }
    static float limited(float v, float most) noexcept {
      return v > most ? most : v < -most ? -most : v;
    }
    static float unless_nan(float x, float y) noexcept { return x == x ? y : x; }
  };
  using Curve = Curves<Arithmetic>;
};

#ifndef PERSONALIZE_NO_XSIMD
template <class Tag>
struct Vectors {
  using Batch = xsimd::batch<float, typename Tag::simd>;
  static constexpr std::size_t width = Batch::size;
  static_assert(lanes % width == 0);

  static void matrix_vector(const float* packed, const float* bias, std::size_t inputs,
                            std::size_t blocks, const float* x, float* y) noexcept {
    constexpr std::size_t group = width / 2;  // eight accumulators on every instruction set
    std::size_t b = 0;
    for (; b + group <= blocks; b += group)
      multiply_blocks<group>(packed + b * inputs * lanes, bias + b * lanes, inputs, x,
                             y + b * lanes);
    for (; b < blocks; ++b)
      multiply_blocks<1>(packed + b * inputs * lanes, bias + b * lanes, inputs, x, y + b * lanes);
  }

  static void rows_vector(const float* rows, const float* bias, std::size_t columns,
                          std::size_t count, const float* x, float* y) noexcept {
    std::size_t r = 0;
    for (; r + 4 <= count; r += 4)
      multiply_rows<4>(rows + r * columns, bias + r, columns, x, y + r);
    for (; r < count; ++r) multiply_rows<1>(rows + r * columns, bias + r, columns, x, y + r);
  }

  static void gru_gates(std::size_t size, std::size_t stride, const float* input,
                        const float* recurrent, float* hidden) noexcept {
    for (std::size_t j = 0; j < size; j += width) {
      const auto at = [j](const float* p) { return Batch::load_unaligned(p + j); };
      const Batch r = Curve::sigmoid(at(input) + at(recurrent));
      const Batch z = Curve::sigmoid(at(input + stride) + at(recurrent + stride));
      const Batch n =
          Curve::tanh(xsimd::fma(r, at(recurrent + 2 * stride), at(input + 2 * stride)));
      xsimd::fma(z, at(hidden) - n, n).store_unaligned(hidden + j);
    }
  }

  static float layer_norm(std::size_t size, float epsilon, const float* weight, const float* bias,
                          float* x) noexcept {
    const std::size_t whole = size / width * width;
    Batch sums(0.0f);
    for (std::size_t j = 0; j < whole; j += width) sums += Batch::load_unaligned(x + j);
    float sum = add_lanes(sums);
    for (std::size_t j = whole; j < size; ++j) sum += x[j];
    const float mean = sum / static_cast<float>(size);
    Batch squares(0.0f);
    for (std::size_t j = 0; j < whole; j += width) {
      const Batch centred = Batch::load_unaligned(x + j) - Batch(mean);
      squares = xsimd::fma(centred, centred, squares);
    }
    float square = add_lanes(squares);
    for (std::size_t j = whole; j < size; ++j) square += (x[j] - mean) * (x[j] - mean);
    const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(size) + epsilon);
    const Batch scale(factor);
    for (std::size_t j = 0; j < size; j += width) {
      const Batch centred = (Batch::load_unaligned(x + j) - Batch(mean)) * scale;
      xsimd::fma(centred, Batch::load_unaligned(weight + j), Batch::load_unaligned(bias + j))
          .store_unaligned(x + j);
    }
    return factor;
  }

  static void scaled_sum(std::size_t size, const float* const* rows, std::size_t count, float scale,
                         const float* bias, float* y) noexcept {
    for (std::size_t j = 0; j < size; j += width) {
      Batch sum = Batch::load_unaligned(rows[0] + j);
      for (std::size_t r = 1; r < count; ++r) sum += Batch::load_unaligned(rows[r] + j);
      xsimd::fma(sum, Batch(scale), Batch::load_unaligned(bias + j)).store_unaligned(y + j);
    }
  }

  static void sigmoid(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return Curve::sigmoid(v); });
  }
  static void tanh(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return Curve::tanh(v); });
  }
  static void relu(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return greater(v, Batch(0.0f)); });
  }
  static void gelu(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return Curve::gelu(v); });
  }
  static float kth_largest(std::size_t size, const float* x, std::size_t k, float low) noexcept {
    Batch most(-__builtin_inff()), smallest(__builtin_inff());
    for (std::size_t j = 0; j < size; j += width) {
      const Batch v = Batch::load_unaligned(x + j);
      most = greater(v, most);
      smallest = xsimd::select(v < smallest && v > Batch(-__builtin_inff()), v, smallest);
    }
    float highs[width], lows[width];
    most.store_unaligned(highs);
    smallest.store_unaligned(lows);
    float high = highs[0], least = lows[0];
    for (std::size_t l = 1; l < width; ++l) {
      high = highs[l] > high ? highs[l] : high;
      least = lows[l] < least ? lows[l] : least;
    }
    return halve<Tag>(k, low, least, high, [&](float limit) {
      Batch counts(0.0f);
      for (std::size_t j = 0; j < size; j += width)
        counts +=
            xsimd::select(Batch::load_unaligned(x + j) >= Batch(limit), Batch(1.0f), Batch(0.0f));
      return static_cast<std::size_t>(add_lanes(counts));
    });
  }
  static float largest(std::size_t size, const float* x) noexcept {
    const std::size_t whole = size / width * width;
    Batch most(0.0f);
    for (std::size_t j = 0; j < whole; j += width)
      most = greater(xsimd::abs(Batch::load_unaligned(x + j)), most);
    float parts[width];
    most.store_unaligned(parts);
    float result = parts[0];
    for (const float part : parts) result = part > result ? part : result;
    for (std::size_t j = whole; j < size; ++j) {
      const float magnitude = __builtin_fabsf(x[j]);
      result = magnitude > result ? magnitude : result;
    }
    return result;
  }

 private:
  // v where it is greater, else other. What min and max make of a NaN depends on the instruction
  // set and on which operand xsimd hands over first.
  static Batch greater(const Batch& v, const Batch& other) noexcept {
    return xsimd::select(v > other, v, other);
  }
  static float add_lanes(const Batch& v) noexcept {
#if XSIMD_VERSION_MAJOR >= 9
    return xsimd::reduce_add(v);
#else
    return xsimd::hadd(v);
#endif
  }

  struct Arithmetic {
    using Value = Batch;
    static Batch fma(const Batch& a, const Batch& b, const Batch& c) noexcept {
      return xsimd::fma(a, b, c);
    }
    static Batch limited(const Batch& v, float most) noexcept {
      return xsimd::max(Batch(-most), xsimd::min(Batch(most), v));
    }
    static Batch unless_nan(const Batch& x, const Batch& y) noexcept {
      return xsimd::select(x == x, y, x);
    }
  };
  using Curve = Curves<Arithmetic>;

  template <std::size_t Blocks>
  static void multiply_blocks(const float* packed, const float* bias, std::size_t inputs,
                              const float* x, float* y) noexcept {
    constexpr std::size_t parts = lanes / width, count = Blocks * parts;
    Batch sums[count];
    PERSONALIZE_UNROLL
    for (std::size_t s = 0; s < count; ++s) sums[s] = Batch::load_unaligned(bias + s * width);
    for (std::size_t i = 0; i < inputs; ++i) {
      const Batch input(x[i]);
      PERSONALIZE_UNROLL
      for (std::size_t b = 0; b < Blocks; ++b) PERSONALIZE_UNROLL
      for (std::size_t p = 0; p < parts; ++p)
        sums[b * parts + p] =
            xsimd::fma(Batch::load_unaligned(packed + (b * inputs + i) * lanes + p * width), input,
                       sums[b * parts + p]);
    }
    PERSONALIZE_UNROLL
    for (std::size_t s = 0; s < count; ++s) sums[s].store_unaligned(y + s * width);
  }

  template <std::size_t Rows>
  static void multiply_rows(const float* rows, const float* bias, std::size_t columns,
                            const float* x, float* y) noexcept {
    Batch sums[Rows];
    PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r) sums[r] = Batch(0.0f);
    for (std::size_t c = 0; c < columns; c += width) {
      const Batch v = Batch::load_unaligned(x + c);
      PERSONALIZE_UNROLL
      for (std::size_t r = 0; r < Rows; ++r)
        sums[r] = xsimd::fma(v, Batch::load_unaligned(rows + r * columns + c), sums[r]);
    }
    for (std::size_t r = 0; r < Rows; ++r) y[r] = add_lanes(sums[r]) + bias[r];
  }

  template <class Function>
  static void transform(std::size_t size, float* x, Function function) noexcept {
    for (std::size_t j = 0; j < size; j += width)
      function(Batch::load_unaligned(x + j)).store_unaligned(x + j);
  }
};
#endif

// Calls f(0), .., f(Count - 1) with constants: what it indexes can stay in registers.
template <std::size_t Count, class Function>
PERSONALIZE_INLINE inline void unrolled(const Function& f) noexcept {
  [&]<std::size_t... I>(std::index_sequence<I...>) PERSONALIZE_INLINE {
    (f(std::integral_constant<std::size_t, I>{}), ...);
  }
  (std::make_index_sequence<Count>{});
}

template <class Tag>
struct Kernels : Vectors<Tag> {
  using O = Ops<Tag>;

  // The largest magnitude that a query multiplied with rows of 8 bits may have; with 4 bits 127.
  static constexpr int query_limit = O::query_limit;

  // Queries through the panels [first, last): two, and more so four, share the loads of the rows.
  // next: as many of its panels come from memory meanwhile, unless it is null.
  static void scan_8bit(const PanelRows<float>& rows, std::size_t first, std::size_t last,
                        const PanelRows<float>* next, PanelQuery* const* queries,
                        std::size_t count) noexcept {
    in_groups<8>(rows, first, last, next, queries, count);
  }
  static void scan_4bit(const PanelRows<std::uint16_t>& rows, std::size_t first, std::size_t last,
                        const PanelRows<std::uint16_t>* next, PanelQuery* const* queries,
                        std::size_t count) noexcept {
    in_groups<4>(rows, first, last, next, queries, count);
  }

  // out[i] = rows[i] . query, in integers. rows: [count] of [columns]; query: [padded(columns)],
  // zero beyond columns; offset: -128 * sum of query.
  static void row_dots(const std::int8_t* const* rows, std::size_t columns,
                       const std::int8_t* query, std::int32_t offset, std::int32_t* out,
                       std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) out[i] = O::dot(rows[i], query, columns, offset);
  }

  // The scores of all rows of `panels` panels of 8 bits to y.
  static void matrix_vector_i8(const PanelRows<float>& rows, std::size_t panels,
                               const PanelQuery& query, float* y) noexcept {
    const PanelQuery* const one = &query;
    const auto finish = [&](std::size_t p, auto& sums) PERSONALIZE_INLINE {
      unrolled<sizeof sums[0] / sizeof sums[0][0]>([&](auto b) PERSONALIZE_INLINE {
        const std::size_t row = (p + b) * panel_rows;
        O::store(O::scores(sums[0][b], query.scale, rows.scales + row, rows.biases + row), y + row);
      });
    };
    for_panels<8, 1>(rows, 0, panels, &one, finish);
  }

  // q = x * (limit / largest |x|), rounded; x, q: [padded(size)], x zero beyond size. Returns the
  // step between two values (0 where x is zero) and the sum of q.
  static float quantise(std::size_t size, const float* x, int limit, std::int8_t* q,
                        std::int32_t& sum) noexcept {
    const float most = Vectors<Tag>::largest(size, x);
    const float inverse = most > 0 ? static_cast<float>(limit) / most : 0.0f;
    for (std::size_t j = 0; j < size; j += lanes) O::quantise(x + j, inverse, q + j);
    sum = 0;
    for (std::size_t j = 0; j < size; ++j) sum += q[j];
    return most / static_cast<float>(limit);
  }

  // The dot products that define scores, of some rows: eight partial sums in double, column c in
  // sum c mod 8, in ascending order, added up as a tree. The same bits on every instruction set.
  // rows: as in row_dots; query: [padded(columns)], zero beyond columns; out: [count].
  static void dots_i8(const std::int8_t* const* rows, std::size_t columns, const double* query,
                      double* out, std::size_t count) noexcept {
    dots(rows, columns, query, out, count);
  }
  static void dots_f32(const float* const* rows, std::size_t columns, const double* query,
                       double* out, std::size_t count) noexcept {
    dots(rows, columns, query, out, count);
  }

 private:
  static constexpr std::size_t together = 4;  // rows that share the loads of the query

  template <class Element>
  static void dots(const Element* const* rows, std::size_t columns, const double* query,
                   double* out, std::size_t count) noexcept {
    std::size_t i = 0;
    for (; i + together <= count; i += together)
      dot_some<together>(rows + i, columns, query, out + i);
    for (; i < count; ++i) dot_some<1>(rows + i, columns, query, out + i);
  }

  template <std::size_t Rows, class Element>
  static void dot_some(const Element* const* all, std::size_t columns, const double* query,
                       double* out) noexcept {
    const Element* rows[Rows];
    typename O::Doubles sums[Rows];
    PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r) {
      rows[r] = all[r];
      O::clear(sums[r]);
    }
    for (std::size_t c = 0; c < columns; c += 8) PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r) O::multiply(sums[r], rows[r] + c, query + c);
    PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r) {
      double s[8];
      O::store(sums[r], s);
      out[r] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
  }

  template <int Bits, class Real>
  static void in_groups(const PanelRows<Real>& rows, std::size_t first, std::size_t last,
                        const PanelRows<Real>* next, PanelQuery* const* queries,
                        std::size_t count) noexcept {
    std::size_t q = count / 4 * 4;
    if (q > 0) scan_together<Bits, 4>(rows, first, last, next, queries, q);
    if (q + 2 <= count) {
      scan_together<Bits, 2, Real>(rows, first, last, nullptr, queries + q, 2);
      q += 2;
    }
    if (q < count) scan_alone<Bits>(rows, first, last, *queries[q]);
  }

  static constexpr std::size_t word_panels = 4;  // whose masks make up a word
  // Bytes that a query alone is ahead of rows of 4 bits, which come out of memory: a tenth faster
  // than what the processor fetches by itself. 1 to 8 KiB do the same.
  static constexpr std::size_t memory_ahead = 4096;

  // Adds the rows of a mask to what the query found. row: the first one's index; scores: from the
  // first one's on.
  template <int Bits>
  static void collect(PanelQuery& query, std::uint64_t mask, std::size_t row,
                      const float* scores) noexcept {
    for (; mask != 0; mask &= mask - 1) {
      const auto r = static_cast<std::size_t>(__builtin_ctzll(mask));
      if constexpr (Bits == 8) {
        query.lower[query.found] = scores[r] - query.margin;
        query.upper[query.found] = scores[r] + query.margin;
      }
      query.rows[query.found++] = static_cast<std::uint32_t>(row + r);
    }
  }

  // One query alone waits for its rows, so that looking at each mask costs nothing.
  template <int Bits, class Real>
  static void scan_alone(const PanelRows<Real>& rows, std::size_t first, std::size_t last,
                         PanelQuery& query) noexcept {
    const PanelQuery* const one = &query;
    const auto finish = [&](std::size_t p, auto& sums) PERSONALIZE_INLINE {
      constexpr std::size_t panels = sizeof sums[0] / sizeof sums[0][0];
      constexpr std::size_t words = (panels + word_panels - 1) / word_panels;
      const auto scores = [&](std::size_t b) PERSONALIZE_INLINE {
        const std::size_t row = (p + b) * panel_rows;
        return O::scores(sums[0][b], query.scale, rows.scales + row, rows.biases + row);
      };
      std::uint64_t masks[words]{}, any = 0;
      unrolled<panels>([&](auto b) PERSONALIZE_INLINE {
        const std::uint64_t mask = O::reaching(scores(b), query.limit);
        masks[b / word_panels] |= mask << (b % word_panels * panel_rows);
        any |= mask;
      });
      if (any == 0) return;
      float all[panels * panel_rows];
      if constexpr (Bits == 8)
        unrolled<panels>([&](auto b)
                             PERSONALIZE_INLINE { O::store(scores(b), all + b * panel_rows); });
      for (std::size_t w = 0; w < words; ++w)
        collect<Bits>(query, masks[w], rows.first_row + (p + w * word_panels) * panel_rows,
                      all + w * word_panels * panel_rows);
    };
    for_panels<Bits, 1>(rows, first, last, &one, finish);
  }

  static constexpr std::size_t strip = 16;

  // The scores of a group of queries with a strip of panels, and which of them reach the limits.
  template <std::size_t Queries>
  struct Strip {
    static constexpr std::size_t cells = Queries * strip;  // [query][panel]
    alignas(64) float scores[cells * panel_rows];
    alignas(64) std::uint16_t masks[cells]{};
    PanelQuery* const* queries = nullptr;
    std::size_t first_row = 0;

    std::uint64_t word(std::size_t cell) const noexcept {
      std::uint64_t mask;
      __builtin_memcpy(&mask, masks + cell, sizeof mask);
      return mask;
    }
  };

  // Several queries wait for the multiplication. Nothing predicts where rows are found, and what is
  // under way when a prediction fails costs more than a panel: so the scores and masks of a strip
  // are kept, and looked through when the next group of queries keeps the multiplier busy. rows by
  // value, scales and limits copied: of what others might point at a compiler fears that storing
  // scores changes it.
  template <int Bits, std::size_t Queries, class Real>
  static void scan_together(const PanelRows<Real> rows, std::size_t first, std::size_t last,
                            const PanelRows<Real>* next, PanelQuery* const* queries,
                            std::size_t count) noexcept {
    Strip<Queries> strips[2];
    std::size_t turn = 0;
    for (std::size_t begin = first; begin < last; begin += strip) {
      const std::size_t end = last - begin < strip ? last : begin + strip;
      for (std::size_t g = 0; g < count; g += Queries, turn ^= 1) {
        if (next) fetch<Bits>(*next, begin - first, end - begin, g / Queries, count / Queries);
        float scale[Queries], limit[Queries];
        for (std::size_t q = 0; q < Queries; ++q) {
          scale[q] = queries[g + q]->scale;
          limit[q] = queries[g + q]->limit;
        }
        Strip<Queries>& now = strips[turn];
        now.queries = queries + g;
        now.first_row = rows.first_row + begin * panel_rows;
        if (end - begin < strip) __builtin_memset(now.masks, 0, sizeof now.masks);
        const auto finish = [&](std::size_t p, auto& sums) PERSONALIZE_INLINE {
          constexpr std::size_t panels = sizeof sums[0] / sizeof sums[0][0];
          unrolled<Queries>([&](auto q) PERSONALIZE_INLINE {
            unrolled<panels>([&](auto b) PERSONALIZE_INLINE {
              const std::size_t row = (p + b) * panel_rows, cell = q * strip + (p + b - begin);
              const auto sixteen =
                  O::scores(sums[q][b], scale[q], rows.scales + row, rows.biases + row);
              if constexpr (Bits == 8) O::store(sixteen, now.scores + cell * panel_rows);
              now.masks[cell] = static_cast<std::uint16_t>(O::reaching(sixteen, limit[q]));
            });
          });
        };
        for_panels<Bits, Queries>(rows, begin, end, queries + g, finish);
        look_through<Bits>(strips[turn ^ 1]);
      }
    }
    look_through<Bits>(strips[turn ^ 1]);
  }

  template <int Bits, std::size_t Queries>
  static void look_through(const Strip<Queries>& found) noexcept {
    std::size_t hits[Strip<Queries>::cells / word_panels], count = 0;
    for (std::size_t cell = 0; cell < Strip<Queries>::cells; cell += word_panels) {
      hits[count] = cell;
      count += found.word(cell) != 0;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t cell = hits[i];
      collect<Bits>(*found.queries[cell / strip], found.word(cell),
                    found.first_row + cell % strip * panel_rows, found.scores + cell * panel_rows);
    }
  }

  // Has part `part` of `parts` of the rows of some panels come from memory: of hundreds of
  // prefetches at once a processor drops most.
  template <int Bits, class Real>
  PERSONALIZE_INLINE static void fetch(const PanelRows<Real>& rows, std::size_t panel,
                                       std::size_t panels, std::size_t part,
                                       std::size_t parts) noexcept {
    const auto lines = [&](const void* start, std::size_t bytes) PERSONALIZE_INLINE {
      const auto* const first = static_cast<const std::uint8_t*>(start);
      const std::size_t count = bytes / 64;
      for (std::size_t l = count * part / parts; l < count * (part + 1) / parts; ++l)
        __builtin_prefetch(first + l * 64);
    };
    const std::size_t row = panel * panel_rows, of_rows = panels * panel_rows * sizeof(Real);
    const std::size_t of_panel = panel_bytes<Bits>(rows.columns);
    lines(rows.panels + panel * of_panel, panels * of_panel);
    lines(rows.scales + row, of_rows);
    lines(rows.biases + row, of_rows);
  }

  // finish(p, sums): sums[q][b] are the dot products of query q with panel p + b.
  template <int Bits, std::size_t Queries, class Real, class Finish>
  static void for_panels(const PanelRows<Real>& rows, std::size_t first, std::size_t last,
                         const PanelQuery* const* queries, const Finish& finish) noexcept {
    // Rows of 4 bits come out of memory, which is fastest from one end to the other.
    constexpr std::size_t sums = Queries == 4                ? O::most_sums
                                 : Bits == 4 && Queries == 1 ? 1
                                                             : O::panels;
    constexpr std::size_t some = sums > Queries ? sums / Queries : 1;
    std::size_t p = first;
    for (; p + some <= last; p += some)
      multiply_panels<Bits, Queries, some>(rows, p, queries, finish);
    for (; p < last; ++p) multiply_panels<Bits, Queries, 1>(rows, p, queries, finish);
  }

  template <int Bits, std::size_t Queries, std::size_t Panels, class Real, class Finish>
  static void multiply_panels(const PanelRows<Real>& all, std::size_t p,
                              const PanelQuery* const* queries, const Finish& finish) noexcept {
    constexpr std::size_t columns_a_step = Bits == 8 ? 4 : 8;
    const std::size_t count = steps<Bits>(all.columns), stride = panel_bytes<Bits>(all.columns);
    const std::int8_t* values[Queries];
    typename O::Sums sums[Queries][Panels];
    unrolled<Queries>([&](auto q) PERSONALIZE_INLINE {
      values[q] = queries[q]->values;
      unrolled<Panels>([&](auto b)
                           PERSONALIZE_INLINE { O::start(sums[q][b], queries[q]->offset); });
    });
    const std::uint8_t* panels = all.panels + p * stride;
    for (std::size_t s = 0; s < count; ++s) {
      typename O::Rows rows[Panels];
      unrolled<Panels>([&](auto b) PERSONALIZE_INLINE {
        const std::uint8_t* const row = panels + b * stride + s * step_bytes;
        if constexpr (Bits == 4 && Queries == 1)
          __builtin_prefetch(
              reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row) + memory_ahead));
        rows[b] = O::load(row);
      });
      unrolled<Queries>([&](auto q) PERSONALIZE_INLINE {
        const std::int8_t* const query = values[q] + s * columns_a_step;
        const auto four = O::spread(query);
        if constexpr (Bits == 8) {
          unrolled<Panels>([&](auto b) PERSONALIZE_INLINE { O::step(sums[q][b], rows[b], four); });
        } else {
          const auto high = O::spread(query + 4);
          unrolled<Panels>(
              [&](auto b) PERSONALIZE_INLINE { O::step_4bit(sums[q][b], rows[b], four, high); });
        }
      });
    }
    finish(p, sums);
  }
};

// Writes row `lane` of a panel of 8 bits (or, with values in [-8, 7], of 4 bits that was zero).
template <int Bits>
PERSONALIZE_INLINE inline void put_in_panel(std::uint8_t* panel, std::size_t lane,
                                            const std::int8_t* row, std::size_t columns) noexcept {
  const auto put = [&](std::size_t c, std::size_t count) {
    std::uint8_t* const four =
        panel + (Bits == 8 ? c / 4 : c / 8) * step_bytes + lane * (step_bytes / panel_rows);
    for (std::size_t i = 0; i < count; ++i)
      if constexpr (Bits == 8)
        four[i] = static_cast<std::uint8_t>(row[c + i] + 128);
      else
        four[i] |= static_cast<std::uint8_t>((row[c + i] + 8) << (c % 8));
  };
  const std::size_t whole = columns / 4 * 4;
  for (std::size_t c = 0; c < whole; c += 4) put(c, 4);  // compilers make one move of the four
  put(whole, columns - whole);
}

// The kernels of one instruction set, chosen once and called through pointers.
struct Table {
  const char* name;
  int query_limit;
  decltype(&Kernels<Scalar>::scan_8bit) scan_8bit;
  decltype(&Kernels<Scalar>::scan_4bit) scan_4bit;
  decltype(&Kernels<Scalar>::row_dots) row_dots;
  decltype(&Kernels<Scalar>::kth_largest) kth_largest;
  decltype(&Kernels<Scalar>::matrix_vector_i8) matrix_vector_i8;
  decltype(&Kernels<Scalar>::quantise) quantise;
  decltype(&Kernels<Scalar>::dots_i8) dots_i8;
  decltype(&Kernels<Scalar>::dots_f32) dots_f32;
  decltype(&Kernels<Scalar>::matrix_vector) matrix_vector;
  decltype(&Kernels<Scalar>::rows_vector) rows_vector;
  decltype(&Kernels<Scalar>::gru_gates) gru_gates;
  decltype(&Kernels<Scalar>::layer_norm) layer_norm;
  decltype(&Kernels<Scalar>::scaled_sum) scaled_sum;
  decltype(&Kernels<Scalar>::sigmoid) sigmoid;
  decltype(&Kernels<Scalar>::tanh) tanh;
  decltype(&Kernels<Scalar>::relu) relu;
  decltype(&Kernels<Scalar>::gelu) gelu;
};

template <class Tag>
inline constexpr Table table_of{Tag::name,
                                Kernels<Tag>::query_limit,
                                &Kernels<Tag>::scan_8bit,
                                &Kernels<Tag>::scan_4bit,
                                &Kernels<Tag>::row_dots,
                                &Kernels<Tag>::kth_largest,
                                &Kernels<Tag>::matrix_vector_i8,
                                &Kernels<Tag>::quantise,
                                &Kernels<Tag>::dots_i8,
                                &Kernels<Tag>::dots_f32,
                                &Kernels<Tag>::matrix_vector,
                                &Kernels<Tag>::rows_vector,
                                &Kernels<Tag>::gru_gates,
                                &Kernels<Tag>::layer_norm,
                                &Kernels<Tag>::scaled_sum,
                                &Kernels<Tag>::sigmoid,
                                &Kernels<Tag>::tanh,
                                &Kernels<Tag>::relu,
                                &Kernels<Tag>::gelu};

#ifdef PERSONALIZE_DISPATCH
// Defined by the target personalize::kernels: the best this processor can run, or the one that the
// environment variable PERSONALIZE_KERNELS names. Never fails; an unknown or unsupported name falls
// back to the best.
const Table& chosen() noexcept;
// All that this program holds and this processor can run, best first; `count` of them.
const Table* const* available(std::size_t& count) noexcept;
#else
inline const Table& chosen() noexcept { return table_of<Default>; }
inline const Table* const* available(std::size_t& count) noexcept {
  static constexpr const Table* tables[]{&table_of<Default>, &table_of<Scalar>};
  count = std::is_same_v<Default, Scalar> ? 1 : 2;
  return tables;
}
#endif

}  // namespace kernels
}  // namespace PERSONALIZE_KERNELS_NAMESPACE
}  // namespace v1
}  // namespace personalize
namespace personalize {
inline namespace v1 {
inline namespace PERSONALIZE_NAMESPACE {

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 5: container. Owns the file formats' outside: header, section table, checksums, compression,
// limits. Uses rooms 1 and 2.
//
// All integers little-endian. Header, 64 bytes:
//
//   offset size field
//        0    8 magic           89 50 5A 4D 0D 0A 1A 0A  ("\x89PZM\r\n\x1a\n": shows a text-mode
//                               copy); of state files 89 50 5A 53 0D 0A 1A 0A
//        8    2 major version   2, of state files 1; a reader refuses a greater one
//       10    2 minor version   1, of state files 0; a greater one adds sections that older readers
//                               skip
//       12    4 section count
//       16    8 total size      bytes of the whole file
//       24    8 table checksum  XXH64 of the section table
//       32   24 reserved        zero
//       56    8 header checksum XXH64 of bytes 0 to 55
//
// Section table, 72 bytes an entry, directly behind the header:
//
//        0    4 tag
//        4    4 index           distinguishes sections of one tag; 0 where there is one
//        8    1 codec           0 stored, 1 zstd
//        9    1 element type    ElementType
//       10    1 rank            1 to 3
//       11    1 chunk size      c, 6 to 24: chunks of 2^c raw bytes
//       12    4 reserved        zero
//       16   24 shape           3 x u64; unused dimensions are 1
//       40    8 offset          sections lie back to back, in table order, up to the total size
//       48    8 stored size     of the chunk directory and the chunks
//       56    8 raw size        size after decompression; follows from element type and shape
//       64    8 checksum        XXH64 of the chunk directory
//
// A section's raw bytes are cut into chunks of 2^c bytes, the last one shorter (element type i4: of
// as many whole rows as 2^c bytes hold, at least one, of at most 2^24 bytes). It begins with its
// chunk directory, 12 bytes a chunk; behind it lie the chunks, back to back:
//
//        0    4 stored size     of the chunk
//        4    8 checksum        XXH64 of the chunk's stored bytes
//
// A chunk is stored as it is where its stored size equals its raw size, which is always so with
// codec 0; else it is one zstd frame that declares its content size and is smaller, but no smaller
// than zstd can make it: by 2^15 (a block of 128 KiB in four bytes).
//
// Major version 1 of model files had no chunks: the byte at 11 was zero, a section was its stored
// bytes, one zstd frame with codec 1, and the checksum was theirs. It is still read.
//
// Every byte of a file is covered by a checksum or must be zero, so a flipped bit anywhere is seen.
// A file is read once, from front to back. What a model's sections hold stands in room 6.
// ============================================================================================

enum class ElementType : std::uint8_t {
  u8 = 0,
  i8 = 1,  // rows of int8 with one f32 scale a row: the scales of all rows, then the rows
  f32 = 2,
  i64 = 3,
  u32 = 4,
  string = 5,  // the u16 lengths of all strings, then their bytes (UTF-8, no control characters)
  // Rows of 4 bits with one f32 scale a row and 4 bits of scale a group of 24 columns (room 7); by
  // chunk: the scales of its rows, their group scales, then the rows.
  i4 = 6,
};

// As the command line spells them.
constexpr std::string_view name(ElementType type) noexcept {
  switch (type) {
    case ElementType::u8:
      return "uint8";
    case ElementType::i8:
      return "int8";
    case ElementType::f32:
      return "f32";
    case ElementType::i64:
      return "int64";
    case ElementType::u32:
      return "uint32";
    case ElementType::string:
      return "string";
    case ElementType::i4:
      return "int4";
  }
  return "unknown";
}

// The most a reader will take memory for, checked before it is taken.
struct LoadLimits {
  std::uint64_t file_bytes = std::uint64_t{16} << 30;
  std::uint64_t raw_bytes = std::uint64_t{16} << 30;  // of all sections together, decoded
  std::uint32_t sections = 4096;
  std::uint64_t items = 100'000'000;  // and users
  std::uint32_t dimension = 4096;     // of any vector in the model
  // Raw bytes a byte of the file; 256 MiB are allowed whatever its size. A million items with
  // vectors of 128 zeros in f32, and ids that differ in a number only, come to some 1,000.
  std::uint32_t expansion = 2048;

  std::uint64_t raw_bytes_of(std::uint64_t file_size) const noexcept {
    const std::uint64_t least = std::uint64_t{256} << 20;
    return std::min(raw_bytes, file_size > raw_bytes / std::max(expansion, 1u)
                                   ? raw_bytes
                                   : std::max(least, file_size * expansion));
  }
};

// How a model is read. Memory: that of the finished model (the sections' raw bytes, i4 as i8;
// tables of strings some 20 to 30 bytes a string more) and, for each thread, one chunk as it is
// stored and one decompressed, at most 32 MiB (files of format version 1: the largest section). A
// section's memory is taken when its first chunk has proved sound, and pages of it as the others
// come; with several threads, while one looks at a bad chunk, the others go on.
struct LoadOptions {
  LoadLimits limits = {};
  // That decode, [1, 64]: the calling one, and threads - 1 more that end before the call returns.
  // Without threads (PERSONALIZE_NO_THREADS) the calling one alone.
  unsigned threads = 1;
  // Called on the calling thread from time to time, and at the end, with the bytes of the file that
  // are dealt with and all of them. false: the call ends with Errc::cancelled.
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress = {};
};

enum class Codec : std::uint8_t { stored = 0, zstd = 1 };

// The file's layout of i4 rows.
struct FourBitRows {
  static constexpr std::size_t group = 24;  // columns that share a scale
  static constexpr std::uint64_t least_columns = 16;
  static constexpr std::uint64_t group_bytes(std::uint64_t columns) noexcept {
    return ((columns + group - 1) / group + 1) / 2;
  }
  static constexpr std::uint64_t value_bytes(std::uint64_t columns) noexcept {
    return (columns + 1) / 2;
  }
  static constexpr std::uint64_t row_bytes(std::uint64_t columns) noexcept {
    return sizeof(float) + group_bytes(columns) + value_bytes(columns);
  }
  // In a chunk of 2^log2 bytes.
  static constexpr std::uint64_t rows_in_chunk(std::uint64_t columns, unsigned log2) noexcept {
    const std::uint64_t rows = (std::uint64_t{1} << log2) / row_bytes(columns);
    return rows == 0 ? 1 : rows;
  }
};

struct SectionInfo {
  std::array<char, 4> tag{};
  std::uint32_t index = 0;
  Codec codec = Codec::stored;
  ElementType element_type = ElementType::u8;
  std::uint8_t rank = 1;
  std::array<std::uint64_t, 3> shape{1, 1, 1};
  std::uint64_t offset = 0;
  std::uint64_t stored_size = 0;
  std::uint64_t raw_size = 0;
  std::uint64_t checksum = 0;
  std::uint8_t chunk_log2 = 0;  // 0: in one piece, without a directory (format version 1)

  // Of all chunks but the last.
  std::uint64_t chunk_raw_size() const noexcept {
    if (chunk_log2 == 0) return raw_size;
    return element_type == ElementType::i4
               ? FourBitRows::rows_in_chunk(shape[1], chunk_log2) * FourBitRows::row_bytes(shape[1])
               : std::uint64_t{1} << chunk_log2;
  }
  std::uint64_t chunk_count() const noexcept {
    if (chunk_log2 == 0) return 1;
    return raw_size / chunk_raw_size() + (raw_size % chunk_raw_size() != 0);
  }

  std::string label() const;
};

// The section table of a model file. Reads the whole file once: every stored byte matches its
// checksum.
Result<std::vector<SectionInfo>> list_sections(std::span<const std::byte> file,
                                               const LoadLimits& limits = {});

#if PERSONALIZE_HAS_BODIES

PERSONALIZE_API std::string SectionInfo::label() const {
  std::string text(tag.data(), tag.size());
  for (char& c : text)
    if (c < 32 || c > 126) c = '?';
  return index == 0 ? text : detail::joined({text, "[", index, "]"});
}

namespace detail {

struct FileKind {
  std::array<unsigned char, 8> magic;
  std::string_view holds, suffix;
  std::uint16_t major, minor;   // that are written; the greatest major that is read
  std::uint16_t chunked_major;  // the first with chunks
};
inline constexpr FileKind model_file{
    {0x89, 'P', 'Z', 'M', '\r', '\n', 0x1a, '\n'}, "model", ".pzm", 2, 1, 2};
inline constexpr FileKind state_file{
    {0x89, 'P', 'Z', 'S', '\r', '\n', 0x1a, '\n'}, "state", ".pzs", 1, 0, 1};

inline constexpr std::size_t header_size = 64, entry_size = 72, directory_entry_size = 12;
inline constexpr unsigned least_chunk_log2 = 6, most_chunk_log2 = 24;
inline constexpr std::uint64_t most_chunk_bytes = std::uint64_t{1} << most_chunk_log2;
// The most that zstd makes of a byte: a block of 128 KiB out of four.
inline constexpr std::uint64_t most_zstd_ratio = std::uint64_t{1} << 15;

inline Error section_error(Errc code, const SectionInfo& section, std::string_view what) {
  return {code, joined({"section ", section.label(), ": ", what}), section.offset};
}

// Errors: the header is not that of a file of that kind and `size` bytes that this reader knows and
// allows.
inline Result<void> check_header(std::span<const std::byte> header, std::uint64_t size,
                                 const FileKind& kind, const LoadLimits& limits) {
  if (header.size() < kind.magic.size() ||
      std::memcmp(header.data(), kind.magic.data(), kind.magic.size()) != 0)
    return Error{Errc::format,
                 joined({"not a ", kind.holds, " file: the first 8 bytes are not a ", kind.suffix,
                         " header's"}),
                 0};
  if (header.size() < header_size)
    return Error{Errc::truncated, "the file ends inside its 64-byte header", size};
  const std::byte* head = header.data();
  if (xxh64(header.first(56)) != load_integer<std::uint64_t>(head + 56))
    return Error{Errc::checksum, "header: checksum mismatch; the file is damaged", 0};
  const auto major = load_integer<std::uint16_t>(head + 8);
  if (major == 0 || major > kind.major)
    return Error{Errc::version,
                 joined({"header: format version ", major, ", this reader knows up to ", kind.major,
                         "; use a newer personalize_runtime.hpp"}),
                 8};
  const auto count = load_integer<std::uint32_t>(head + 12);
  if (count > limits.sections)
    return Error{Errc::limit,
                 joined({"header: ", count, " sections, the limit is ", limits.sections}), 12};
  if (std::any_of(head + 32, head + 56, [](std::byte b) { return b != std::byte{0}; }))
    return Error{Errc::corrupt, "header: reserved bytes are not zero", 32};
  const auto total = load_integer<std::uint64_t>(head + 16);
  if (total > limits.file_bytes)
    return Error{Errc::limit, "header: the file is larger than LoadLimits::file_bytes", 16};
  if (size < total)
    return Error{Errc::truncated,
                 joined({"the file has ", size, " of its ", total, " bytes; copy it again"}), size};
  if (size > total)
    return Error{Errc::corrupt, joined({"bytes follow the end of the ", kind.holds}), total};
  if (total > most_memory)
    return Error{Errc::limit, "header: the file is larger than a 32-bit program can hold", 16};
  if (std::uint64_t{count} * entry_size > total - header_size)
    return Error{Errc::corrupt, "header: the section table is larger than the file", 12};
  return {};
}

// An entry of the section table, whose values may be any. Errors: reserved bytes, rank or chunk
// size that none has.
inline Result<SectionInfo> read_entry(const std::byte* p, bool chunked) {
  SectionInfo section;
  std::memcpy(section.tag.data(), p, 4);
  section.index = load_integer<std::uint32_t>(p + 4);
  section.codec = static_cast<Codec>(load_integer<std::uint8_t>(p + 8));
  section.element_type = static_cast<ElementType>(load_integer<std::uint8_t>(p + 9));
  section.rank = load_integer<std::uint8_t>(p + 10);
  section.chunk_log2 = load_integer<std::uint8_t>(p + 11);
  for (std::size_t d = 0; d < 3; ++d)
    section.shape[d] = load_integer<std::uint64_t>(p + 16 + 8 * d);
  section.offset = load_integer<std::uint64_t>(p + 40);
  section.stored_size = load_integer<std::uint64_t>(p + 48);
  section.raw_size = load_integer<std::uint64_t>(p + 56);
  section.checksum = load_integer<std::uint64_t>(p + 64);
  const bool four_bits = section.element_type == ElementType::i4;
  if (section.rank < 1 || section.rank > 3 ||
      std::any_of(p + 12, p + 16, [](std::byte b) { return b != std::byte{0}; }) ||
      (chunked ? section.chunk_log2 < least_chunk_log2 || section.chunk_log2 > most_chunk_log2
               : section.chunk_log2 != 0) ||
      (four_bits && (!chunked || section.rank != 2 || section.shape[1] > most_chunk_bytes ||
                     section.chunk_raw_size() > most_chunk_bytes)))
    return section_error(Errc::corrupt, section, "bad table entry");
  return section;
}

// Errors: the section's sizes contradict one another, or are none that its codec could have made.
inline Result<void> check_sizes(const SectionInfo& section) {
  std::uint64_t stored = section.stored_size;
  if (section.chunk_log2 != 0) {
    const auto directory = checked_product(section.chunk_count(), directory_entry_size);
    if (!directory || *directory > stored || stored - *directory > section.raw_size)
      return section_error(Errc::corrupt, section,
                           "stored and raw size contradict the number of chunks");
    stored -= *directory;
  }
  if (section.codec == Codec::stored && section.raw_size != stored)
    return section_error(Errc::corrupt, section, "stored and raw size differ without compression");
  if (section.codec == Codec::zstd && section.raw_size / most_zstd_ratio > stored)
    return section_error(Errc::compression, section,
                         "is smaller than zstd can make what it claims to hold");
  return {};
}

inline std::uint64_t section_key(std::string_view tag, std::uint32_t index) noexcept {
  std::uint64_t key = 0;
  for (const char c : tag) key = key << 8 | static_cast<unsigned char>(c);
  return key << 32 | index;
}

// By tag and index: find_section() looks them up.
using SectionOrder = Vector<Keyed>;
inline SectionOrder order_of(std::span<const SectionInfo> sections) {
  SectionOrder order;
  order.reserve(sections.size());
  for (std::uint32_t s = 0; s < sections.size(); ++s)
    order.push_back({section_key({sections[s].tag.data(), 4}, sections[s].index), s});
  sort_by_key(order);
  return order;
}

inline const SectionInfo* find_section(std::span<const SectionInfo> sections,
                                       const SectionOrder& order, std::string_view tag,
                                       std::uint32_t index) noexcept {
  const std::uint64_t key = section_key(tag, index);
  const auto found = std::lower_bound(order.begin(), order.end(), Keyed{key, 0});
  return found == order.end() || found->key != key ? nullptr : &sections[found->index];
}

// Header and section table of a file, checked: every entry lies inside the file and within
// `limits`. Leaves the source at the first section.
inline Result<std::vector<SectionInfo>> read_table(ByteSource& source, const FileKind& kind,
                                                   const LoadLimits& limits) {
  BareVector<std::byte> head_buffer, table_buffer;
  const std::uint64_t size = source.size(), raw_limit = limits.raw_bytes_of(size);
  const auto header =
      source.take(static_cast<std::size_t>(std::min<std::uint64_t>(size, header_size)), head_buffer,
                  header_size);
  if (!header) return header.error();
  if (auto checked = check_header(*header, size, kind, limits); !checked) return checked.error();
  const bool chunked = load_integer<std::uint16_t>(header->data() + 8) >= kind.chunked_major;
  const auto count = load_integer<std::uint32_t>(header->data() + 12);
  const std::size_t table_size = std::size_t{count} * entry_size;
  const auto table = source.take(table_size, table_buffer, table_size);
  if (!table) return table.error();
  if (xxh64(*table) != load_integer<std::uint64_t>(header->data() + 24))
    return Error{Errc::checksum, "section table: checksum mismatch; the file is damaged",
                 header_size};

  std::vector<SectionInfo> sections(count);
  std::uint64_t expected_offset = header_size + table_size, raw_total = 0;
  for (std::uint32_t s = 0; s < count; ++s) {
    const auto entry = read_entry(table->data() + s * entry_size, chunked);
    if (!entry) return entry.error();
    const SectionInfo& section = sections[s] = *entry;
    if (section.offset != expected_offset || section.stored_size > size - expected_offset)
      return section_error(Errc::corrupt, section, "does not lie where the table's order puts it");
    expected_offset += section.stored_size;
    // i4 becomes i8 when it is read.
    std::optional<std::uint64_t> decoded = section.raw_size;
    if (section.element_type == ElementType::i4)
      decoded = checked_product(section.shape[0], section.shape[1] + sizeof(float));
    if (!decoded || *decoded > raw_limit - raw_total)
      return section_error(Errc::limit, section,
                           "decompressed size is over LoadLimits::raw_bytes, or over "
                           "LoadLimits::expansion times the file");
    raw_total += *decoded;
    if (auto checked = check_sizes(section); !checked) return checked.error();
    // What a section becomes is counted in std::size_t from here on.
    if (sizeof(std::size_t) < 8 &&
        (raw_total > most_memory ||
         std::any_of(section.shape.begin(), section.shape.end(),
                     [](std::uint64_t extent) { return extent > most_memory; })))
      return section_error(Errc::limit, section, "larger than a 32-bit program can hold");
  }
  if (expected_offset != size)
    return Error{Errc::corrupt, "bytes follow the last section", expected_offset};
  const SectionOrder order = order_of(sections);
  for (std::uint32_t s = 1; s < count; ++s)
    if (order[s - 1].key == order[s].key)
      return section_error(Errc::corrupt, sections[order[s].index],
                           "stands twice in the section table");
  return sections;
}

// Where the raw bytes of a section go.
struct SectionTarget {
  bool wanted = false;  // else its checksums are compared and nothing more
  // Called once, on any thread, when the first chunk's checksum was right: takes the memory and
  // returns where the raw bytes go, one area behind the other, as long together as the section.
  // Without areas expand takes them.
  using Areas = std::array<std::span<std::byte>, 2>;
  std::function<Areas()> take = {};
  // Takes a chunk's raw bytes and its number, on any thread.
  std::function<void(std::uint64_t, std::span<const std::byte>)> expand = {};
  // Called on any thread, one call at a time, when the section's first `bytes` bytes have come:
  // more each time, at the end all. Not called for a section in chunks that has none. An error
  // (corrupt) without an offset gets the section's.
  std::function<Result<void>(std::uint64_t bytes)> arrived = {};
};

#ifndef PERSONALIZE_NO_ZSTD
struct FreeZstd {
  void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
};
#endif

// Reads the sections of a file in one pass: whichever thread is free takes the next chunk and
// brings it to its place.
class SectionDecoder {
 public:
  // targets: one a section, in the table's order. All must outlive the decoder.
  SectionDecoder(ByteSource& source, std::span<const SectionInfo> sections,
                 std::span<const SectionTarget> targets, const LoadOptions& options)
      : source_(source), sections_(sections), targets_(targets), options_(options) {}

  Result<void> run() {
    progress_.resize(sections_.size());
    done_ = header_size + sections_.size() * entry_size;
    std::uint64_t chunks = 0;
    for (std::size_t s = 0; s < sections_.size(); ++s) {
      chunks += sections_[s].chunk_count();
      if (sections_[s].chunk_count() == 0 && targets_[s].take) targets_[s].take();
    }
    {
      Threads others;
      if (has_threads)
        others.start(static_cast<std::size_t>(std::min<std::uint64_t>(options_.threads, chunks)),
                     [this] { work(false); });
      work(true);
    }
    if (error_) return std::move(*error_);
    if (options_.progress && !options_.progress(source_.size(), source_.size())) return stop();
    return {};
  }

 private:
  struct Chunk {
    std::size_t section;
    std::uint64_t number;   // in the section
    std::uint64_t ordinal;  // in the file
    std::span<const std::byte> stored;
    std::size_t raw_size;
    std::uint64_t checksum;
  };
  struct Worker {
    BareVector<std::byte> stored, raw;
#ifndef PERSONALIZE_NO_ZSTD
    std::unique_ptr<ZSTD_DCtx, FreeZstd> zstd;
#endif
  };
  struct Threads {
    // All but one: the caller's own.
    template <class Work>
    void start(std::size_t count, Work work) {
      if (count > 1) threads.reserve(count - 1);
#if PERSONALIZE_HAS_EXCEPTIONS
      try {
        while (threads.size() + 1 < count) threads.emplace_back(work);
      } catch (const std::system_error&) {  // as many as there are to be had
      }
#else
      while (threads.size() + 1 < count) threads.emplace_back(work);
#endif
    }
    ~Threads() {
      for (thread& thread : threads) thread.join();
    }
    std::vector<thread> threads;
  };

  static Error stop() { return {Errc::cancelled, "cancelled by LoadOptions::progress"}; }

  // Takes chunks until there are none. Errors (the earliest of the file) go to error_.
  void work(bool reports) {
    std::uint64_t ordinal = 0;
    const auto done = catching_bad_alloc([&]() -> Result<void> {
      Worker worker;
      for (;;) {
        const auto chunk = next(worker.stored, ordinal);
        if (!chunk) return chunk.error();
        if (!*chunk) return {};
        if (auto placed = place(**chunk, worker); !placed) return placed;
        if (auto finished = finish(**chunk); !finished) return finished;
        if (reports && options_.progress) {
          std::uint64_t position;
          {
            const lock_guard lock{mutex_};
            position = done_;
          }
          if (!options_.progress(position, source_.size())) return stop();
        }
      }
    });
    if (done) return;
    const lock_guard lock{mutex_};
    stopped_ = true;
    if (!error_ || ordinal < error_ordinal_) {
      error_ = done.error();
      error_ordinal_ = ordinal;
    }
  }

  // The next chunk of the file, its stored bytes in `buffer` or where they lie; nothing at the end.
  Result<std::optional<Chunk>> next(BareVector<std::byte>& buffer, std::uint64_t& ordinal) {
    const lock_guard lock{mutex_};
    ordinal = ordinal_;
    if (stopped_) return std::optional<Chunk>{};
    // Until this is done: what an error or a lack of memory leaves half done is not for others.
    stopped_ = true;
    while (chunk_ == chunks_) {
      if (section_ == sections_.size()) return std::optional<Chunk>{};
      if (auto opened = open_section(buffer); !opened) return opened.error();
    }
    const std::size_t s = section_ - 1;
    const SectionInfo& section = sections_[s];
    Chunk chunk{s, chunk_, ordinal_++, {}, 0, section.checksum};
    std::uint64_t stored = section.stored_size, raw = section.raw_size;
    if (section.chunk_log2 != 0) {
      const std::byte* entry = directory_.data() + chunk_ * directory_entry_size;
      stored = load_integer<std::uint32_t>(entry);
      chunk.checksum = load_integer<std::uint64_t>(entry + 4);
      raw =
          std::min(section.raw_size - chunk_ * section.chunk_raw_size(), section.chunk_raw_size());
    }
    ++chunk_;
    chunk.raw_size = static_cast<std::size_t>(raw);
    const auto taken = source_.take(static_cast<std::size_t>(stored), buffer,
                                    static_cast<std::size_t>(std::min(section.stored_size, raw)));
    if (!taken) return taken.error();
    chunk.stored = *taken;
    stopped_ = false;
    return std::optional(chunk);
  }

  // Reads the next section's directory; the caller holds the lock. It is as long as the table says,
  // so that the chunks, where their sizes add up, lie inside the section.
  Result<void> open_section(BareVector<std::byte>& buffer) {
    const SectionInfo& section = sections_[section_++];
    chunk_ = 0;
    chunks_ = section.chunk_count();
    if (section.chunk_log2 == 0) return {};
    const auto size = static_cast<std::size_t>(chunks_ * directory_entry_size);
    const auto bytes = source_.take(size, buffer, size);
    if (!bytes) return bytes.error();
    if (xxh64(*bytes) != section.checksum)
      return section_error(Errc::checksum, section,
                           "checksum mismatch of the chunk directory; the file is damaged");
    directory_.assign(bytes->begin(), bytes->end());
    done_ += directory_.size();
    std::uint64_t sum = directory_.size();
    for (std::uint64_t c = 0; c < chunks_; ++c) {
      const std::uint64_t stored =
          load_integer<std::uint32_t>(directory_.data() + c * directory_entry_size);
      const std::uint64_t raw =
          std::min(section.raw_size - c * section.chunk_raw_size(), section.chunk_raw_size());
      if (stored > raw || (section.codec == Codec::stored && stored != raw))
        return section_error(Errc::corrupt, section,
                             joined({"chunk ", c, " has an impossible stored size"}));
      if (section.codec == Codec::zstd && raw > stored * most_zstd_ratio)
        return section_error(Errc::compression, section,
                             joined({"chunk ", c, " is smaller than zstd can make it"}));
      sum += stored;
    }
    if (sum != section.stored_size)
      return section_error(Errc::corrupt, section, "its chunks do not add up to its stored size");
    return {};
  }

  Result<void> place(const Chunk& chunk, Worker& worker) {
    const SectionInfo& section = sections_[chunk.section];
    const SectionTarget& target = targets_[chunk.section];
    if (xxh64(chunk.stored) != chunk.checksum)
      return section_error(Errc::checksum, section, "checksum mismatch; the file is damaged");
    if (!target.wanted) return {};
    const std::uint64_t at = chunk.number * section.chunk_raw_size();
    if (section.codec == Codec::stored ||
        (section.chunk_log2 != 0 && chunk.stored.size() == chunk.raw_size)) {
      copy(target, areas_of(chunk.section), chunk.number, at, chunk.stored);
      return {};
    }
    if (auto checked = check_frame(section, chunk); !checked) return checked;
    const SectionTarget::Areas areas = areas_of(chunk.section);
    std::span<std::byte> raw = in_one_area(areas, at, chunk.raw_size);
    const bool direct = raw.size() == chunk.raw_size && !target.expand;
    if (!direct) {
      if (worker.raw.size() < chunk.raw_size) {
        worker.raw = {};
        worker.raw.resize(chunk.raw_size);
      }
      raw = std::span(worker.raw).first(chunk.raw_size);
    }
    if (auto unpacked = decompress(section, chunk.stored, raw, worker); !unpacked) return unpacked;
    if (!direct) copy(target, areas, chunk.number, at, raw);
    return {};
  }

  // Where the section's bytes go, for which the first to ask takes the memory.
  SectionTarget::Areas areas_of(std::size_t section) {
    const lock_guard lock{mutex_};
    Progress& of = progress_[section];
    if (!of.taken && targets_[section].take) of.areas = targets_[section].take();
    of.taken = true;
    return of.areas;
  }

  static Result<void> check_frame([[maybe_unused]] const SectionInfo& section,
                                  [[maybe_unused]] const Chunk& chunk) {
#ifndef PERSONALIZE_NO_ZSTD
    if (ZSTD_getFrameContentSize(chunk.stored.data(), chunk.stored.size()) != chunk.raw_size)
      return section_error(Errc::compression, section,
                           "the zstd frame does not declare the table's raw size");
#endif
    return {};
  }

  static Result<void> decompress(const SectionInfo& section, std::span<const std::byte> stored,
                                 std::span<std::byte> raw, Worker& worker) {
#ifndef PERSONALIZE_NO_ZSTD
    if (!worker.zstd) worker.zstd.reset(ZSTD_createDCtx());
    if (!worker.zstd) return Error{Errc::out_of_memory, "out of memory"};
    const std::size_t size = ZSTD_decompressDCtx(worker.zstd.get(), raw.data(), raw.size(),
                                                 stored.data(), stored.size());
    if (ZSTD_isError(size) || size != raw.size())
      return section_error(Errc::compression, section, "does not decompress to its declared size");
    return {};
#else
    (void)stored, (void)raw, (void)worker;
    return section_error(Errc::unsupported, section,
                         "compressed, and this build has PERSONALIZE_NO_ZSTD");
#endif
  }

  // Empty where [at, at + size) crosses from one area to the other.
  static std::span<std::byte> in_one_area(const SectionTarget::Areas& areas, std::uint64_t at,
                                          std::size_t size) noexcept {
    const std::uint64_t first = areas[0].size();
    if (at + size <= first) return areas[0].subspan(static_cast<std::size_t>(at), size);
    if (at < first || at - first + size > areas[1].size()) return {};
    return areas[1].subspan(static_cast<std::size_t>(at - first), size);
  }

  static void copy(const SectionTarget& target, const SectionTarget::Areas& areas,
                   std::uint64_t number, std::uint64_t at, std::span<const std::byte> raw) {
    if (target.expand) return target.expand(number, raw);
    const auto first = static_cast<std::size_t>(areas[0].size());
    const std::size_t begin = static_cast<std::size_t>(at);
    const std::size_t in_first = begin < first ? std::min(first - begin, raw.size()) : 0;
    if (in_first > 0) std::memcpy(areas[0].data() + begin, raw.data(), in_first);
    if (in_first < raw.size())
      std::memcpy(areas[1].data() + (begin + in_first - first), raw.data() + in_first,
                  raw.size() - in_first);
  }

  // Tells the section's target how far it is filled from its beginning, where this chunk was what
  // was missing and no other thread is about to.
  Result<void> finish(const Chunk& chunk) {
    const SectionInfo& section = sections_[chunk.section];
    const SectionTarget& target = targets_[chunk.section];
    Progress& progress = progress_[chunk.section];
    unique_lock lock{mutex_};
    done_ += chunk.stored.size();
    if (!target.arrived) return {};
    progress.ahead.push_back(chunk.number);
    std::push_heap(progress.ahead.begin(), progress.ahead.end(), Greater{});
    if (progress.telling) return {};
    progress.telling = true;
    for (;;) {
      const std::uint64_t before = progress.chunks;
      while (!progress.ahead.empty() && progress.ahead.front() == progress.chunks) {
        std::pop_heap(progress.ahead.begin(), progress.ahead.end(), Greater{});
        progress.ahead.pop_back();
        ++progress.chunks;
      }
      if (progress.chunks == before) break;
      const std::uint64_t bytes =
          std::min(section.raw_size, progress.chunks * section.chunk_raw_size());
      lock.unlock();
      auto told = target.arrived(bytes);
      if (!told && told.error().code == Errc::corrupt && !told.error().offset)
        return section_error(Errc::corrupt, section, told.error().message);
      if (!told) return told;
      lock.lock();
    }
    progress.telling = false;
    return {};
  }

  struct Progress {
    bool taken = false;
    SectionTarget::Areas areas{};
    std::uint64_t chunks = 0;     // that have come, without a gap
    Vector<std::uint64_t> ahead;  // numbers of the others, a heap with the least first
    bool telling = false;
  };

  ByteSource& source_;
  std::span<const SectionInfo> sections_;
  std::span<const SectionTarget> targets_;
  const LoadOptions& options_;
  mutex mutex_;                           // over all that follows
  std::size_t section_ = 0;               // that chunks come from, + 1
  std::uint64_t chunk_ = 0, chunks_ = 0;  // of it: the next one, and how many it has
  std::uint64_t ordinal_ = 0;
  Vector<std::byte> directory_;     // of it
  std::vector<Progress> progress_;  // of each section
  std::uint64_t done_ = 0;
  bool stopped_ = false;
  std::optional<Error> error_;
  std::uint64_t error_ordinal_ = 0;
};

}  // namespace detail

PERSONALIZE_API Result<std::vector<SectionInfo>> list_sections(std::span<const std::byte> file,
                                                               const LoadLimits& limits) {
  return detail::catching_bad_alloc([&]() -> Result<std::vector<SectionInfo>> {
    detail::ByteSource source{file};
    auto sections = detail::read_table(source, detail::model_file, limits);
    if (!sections) return sections;
    const std::vector<detail::SectionTarget> ignored(sections->size());
    const LoadOptions options{.limits = limits};
    if (auto read = detail::SectionDecoder{source, *sections, ignored, options}.run(); !read)
      return read.error();
    return sections;
  });
}

namespace detail {

// Reads a file section by section, in its order, and shows each to `visit` when all of it has
// proved sound, with one in memory at a time. Uses one thread, whatever the options say. An error
// of visit ends it, and gets the section's name and offset where it has none.
inline Result<void> read_each_section(
    ByteSource& source, const FileKind& kind, const LoadOptions& options,
    const std::function<Result<void>(const SectionInfo&, std::span<const std::byte>)>& visit) {
  return catching_bad_alloc([&]() -> Result<void> {
    const auto sections = read_table(source, kind, options.limits);
    if (!sections) return sections.error();
    BareVector<std::byte> raw;
    std::size_t next = 0;  // to be visited
    const auto visit_next = [&](std::span<const std::byte> bytes) -> Result<void> {
      const SectionInfo& section = (*sections)[next++];
      auto visited = visit(section, bytes);
      if (visited || visited.error().offset || visited.error().code == Errc::out_of_memory)
        return visited;
      return section_error(visited.error().code, section, visited.error().message);
    };
    // Those without a chunk, of which the decoder tells nothing.
    const auto visit_empty = [&](std::size_t end) -> Result<void> {
      while (next < end)
        if (auto visited = visit_next({}); !visited) return visited;
      return {};
    };
    std::vector<SectionTarget> targets(sections->size());
    for (std::size_t s = 0; s < targets.size(); ++s) {
      const SectionInfo& section = (*sections)[s];
      if (section.codec != Codec::stored && section.codec != Codec::zstd)
        return section_error(Errc::unsupported, section, "unknown codec");
      if (section.chunk_count() == 0) continue;
      targets[s].wanted = true;
      targets[s].take = [&raw, size = static_cast<std::size_t>(section.raw_size)] {
        if (raw.capacity() < size) raw = {};
        raw.resize(size);
        return SectionTarget::Areas{std::span(raw)};
      };
      targets[s].arrived = [&, s, size = section.raw_size](std::uint64_t bytes) -> Result<void> {
        if (bytes < size) return {};
        if (auto visited = visit_empty(s); !visited) return visited;
        return visit_next(raw);
      };
    }
    const LoadOptions alone{options.limits, 1, options.progress};
    if (auto read = SectionDecoder{source, *sections, targets, alone}.run(); !read) return read;
    return visit_empty(sections->size());
  });
}

#ifndef PERSONALIZE_NO_ZSTD
struct FreeZstdCompression {
  void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
};
#endif

// Lays sections out as a file, a chunk at a time.
class FileBuilder {
 public:
  FileBuilder(ByteSink& sink, const FileKind& kind, int zstd_level, unsigned chunk_log2) noexcept
      : sink_(&sink),
        kind_(&kind),
        zstd_level_(zstd_level),
        chunk_log2_(static_cast<std::uint8_t>(chunk_log2)) {}

  // A section's raw bytes go, in their order and pieces of any size, to the function it is given.
  using Append = std::function<void(std::span<const std::byte>)>;

  // write: called by finish(), once; appends raw_size bytes.
  void add(std::string_view tag, std::uint32_t index, ElementType type,
           std::initializer_list<std::uint64_t> shape, std::uint64_t raw_size,
           std::function<void(const Append&)> write) {
    SectionInfo section;
    std::copy_n(tag.begin(), 4, section.tag.begin());
    section.index = index;
    section.codec = available(Codec::zstd);
    section.element_type = type;
    section.rank = static_cast<std::uint8_t>(shape.size());
    std::copy(shape.begin(), shape.end(), section.shape.begin());
    section.raw_size = raw_size;
    section.chunk_log2 = chunk_log2_;
    sections_.push_back({section, std::move(write), {}});
  }

  // The same of bytes that outlive finish().
  void add(std::string_view tag, std::uint32_t index, ElementType type,
           std::initializer_list<std::uint64_t> shape, std::span<const std::byte> raw) {
    add(tag, index, type, shape, raw.size(), [raw](const Append& append) { append(raw); });
  }

  // A section of bytes (u8) that are made when it is written: memory for the largest of such is
  // taken, and no more. make: called by finish(), once, with an empty vector. codec: stored also
  // where the others are compressed, for what zstd does not make smaller.
  void add_made(std::string_view tag, std::uint32_t index,
                std::function<Result<void>(Vector<std::byte>&)> make, Codec codec = Codec::zstd) {
    add(tag, index, ElementType::u8, {0}, 0, {});
    sections_.back().info.codec = available(codec);
    sections_.back().make = std::move(make);
  }

  std::uint64_t size() const noexcept { return size_; }  // of what was written

  // Errors: out of memory (zstd's, too); those of make. What was written is then no file.
  Result<void> finish() {
    put(Vector<std::byte>(header_size + sections_.size() * entry_size));
    Vector<std::byte> table;
    for (Section& planned : sections_) {
      if (planned.make) {
        made_.clear();
        if (auto made = planned.make(made_); !made) return made;
        planned.info.shape[0] = planned.info.raw_size = made_.size();
      }
      write(planned);
      if (error_) return std::move(*error_);
      const SectionInfo& section = planned.info;
      for (const char c : section.tag) table.push_back(static_cast<std::byte>(c));
      append_integer(table, section.index);
      append_integer(table, static_cast<std::uint8_t>(section.codec));
      append_integer(table, static_cast<std::uint8_t>(section.element_type));
      append_integer(table, section.rank);
      append_integer(table, section.chunk_log2);
      table.resize(table.size() + 4);
      for (const std::uint64_t d : section.shape) append_integer(table, d);
      append_integer(table, section.offset);
      append_integer(table, section.stored_size);
      append_integer(table, section.raw_size);
      append_integer(table, section.checksum);
    }
    Vector<std::byte> head;
    for (const unsigned char c : kind_->magic) head.push_back(static_cast<std::byte>(c));
    append_integer(head, kind_->major);
    append_integer(head, kind_->minor);
    append_integer(head, static_cast<std::uint32_t>(sections_.size()));
    append_integer(head, size_);
    append_integer(head, xxh64(table));
    head.resize(head.size() + 24);
    append_integer(head, xxh64(head));
    head.insert(head.end(), table.begin(), table.end());
    sink_->overwrite(0, head);
    return {};
  }

 private:
  struct Section {
    SectionInfo info;
    std::function<void(const Append&)> write;
    std::function<Result<void>(Vector<std::byte>&)> make;  // to made_, instead of write
  };

  void put(std::span<const std::byte> bytes) {
    sink_->append(bytes);
    size_ += bytes.size();
  }

  void write(Section& section) {
    SectionInfo& info = section.info;
    info.offset = size_;
    put(Vector<std::byte>(static_cast<std::size_t>(info.chunk_count()) * directory_entry_size));
    Vector<std::byte> directory, gathered;
    const auto chunk_size =
        static_cast<std::size_t>(std::min(info.chunk_raw_size(), info.raw_size));
    const auto store = [&](std::span<const std::byte> raw) {
      const auto stored = packed(raw, info.codec);
      append_integer(directory, static_cast<std::uint32_t>(stored.size()));
      append_integer(directory, xxh64(stored));
      put(stored);
    };
    const auto append = [&](std::span<const std::byte> raw) {
      while (!raw.empty()) {
        const auto part = raw.first(std::min(raw.size(), chunk_size - gathered.size()));
        raw = raw.subspan(part.size());
        if (part.size() == chunk_size) {
          store(part);
          continue;
        }
        gathered.insert(gathered.end(), part.begin(), part.end());
        if (gathered.size() < chunk_size) continue;
        store(gathered);
        gathered.clear();
      }
    };
    section.make ? append(made_) : section.write(append);
    if (!gathered.empty()) store(gathered);
    sink_->overwrite(info.offset, directory);
    info.stored_size = size_ - info.offset;
    info.checksum = xxh64(directory);
  }

  // What there is of it.
  Codec available([[maybe_unused]] Codec wanted) const noexcept {
#ifndef PERSONALIZE_NO_ZSTD
    if (zstd_level_ != 0) return wanted;
#else
    (void)zstd_level_;
#endif
    return Codec::stored;
  }

  // The chunk as it is stored; valid until the next call.
  std::span<const std::byte> packed(std::span<const std::byte> raw, [[maybe_unused]] Codec codec) {
#ifndef PERSONALIZE_NO_ZSTD
    if (codec == Codec::zstd) {
      if (!zstd_) zstd_.reset(ZSTD_createCCtx());
      packed_.resize(ZSTD_compressBound(raw.size()));
      // It has room enough for any outcome: what is left to go wrong is its own memory.
      const std::size_t size = zstd_
                                   ? ZSTD_compressCCtx(zstd_.get(), packed_.data(), packed_.size(),
                                                       raw.data(), raw.size(), zstd_level_)
                                   : 0;
      if (!zstd_ || ZSTD_isError(size)) error_ = Error{Errc::out_of_memory, "out of memory"};
      if (!error_ && size < raw.size()) return std::span(packed_).first(size);
    }
#endif
    return raw;
  }

  ByteSink* sink_;
  const FileKind* kind_;
  int zstd_level_;
  std::uint8_t chunk_log2_;
  std::uint64_t size_ = 0;
  std::vector<Section> sections_;
  Vector<std::byte> made_;
  BareVector<std::byte> packed_;
  std::optional<Error> error_;
#ifndef PERSONALIZE_NO_ZSTD
  std::unique_ptr<ZSTD_CCtx, FreeZstdCompression> zstd_;
#endif
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 6: model. Owns what a model file holds, as plain data, and what must hold between its parts.
// Uses rooms 1, 2, 3 and 5.
//
//   tag  index element  shape    content
//   META 0     u8       [bytes]  JSON: recipe, parameters, metrics, provenance, time range; at most
//                                16 MiB, nested at most 64 deep
//   FGPR 0     i64      [2]      Fingerprints: encoder, items; from version 2.1 on (optional)
//   IIDS 0     string   [N]      item ids; the order is the item index. All strings: distinct, 1 to
//                                256 bytes of UTF-8 without control characters
//   IVEC 0     matrix   [N, d]   item vectors, their metadata embeddings summed in
//   IINP 0     matrix   [N, e]   what the encoder takes in for an item, where not IVEC (optional)
//   BIAS 0     f32      [N]      item biases
//   STAT 0     i64      [N, 4]   interactions, first, last and creation timestamp (INT64_MIN: none)
//   EVTY 0     string   [E]      event types                                       (optional)
//   EVTE 0     matrix   [E, e]   their embeddings; e = d without IINP              (with EVTY)
//   GAPE 0     matrix   [B, e]   time-gap embeddings, see time_gap_bucket; B in [2, 1024]
//                                                                                  (optional)
//   FLDN 0     string   [F]      names of the item metadata fields                 (optional)
//   FLDK 0     u8       [F]      0 categorical, 1 numeric                          (with FLDN)
//   FVOC f     string   [V]      values of categorical field f
//   FBND f     f32      [B]      ascending bucket boundaries of numeric field f
//   FEMB f     matrix   [V, d]   embeddings of field f: one a value, or B + 1 buckets
//   ENCO 0     u32      [n, 2]   encoder operations: kind, argument (EncoderOp)
//   ENCW k     matrix   [r, c]   encoder weights, k-th in the order of the operations
//   USID 0     string   [U]      users who come with a state                       (optional)
//   USTA 0     matrix   [U, s]   the hidden states of all recurrent operations, then the query
//                                                                                  (with USID)
//
// A matrix has the element type i4, i8 or f32. Sections stand in this order, those of one field
// together: what is wrong with ids and program is seen before the vectors are read. Others may
// stand anywhere.
// ============================================================================================

// Distinct strings, numbered in the order they were added. Lookup O(1); one allocation for the
// text.
class StringTable {
 public:
  // The index of the new string. Errors: empty, over 256 bytes, not UTF-8 or with a control
  // character (invalid_argument); already there, or made to fall together with others (corrupt);
  // out of memory. The table is then as it was.
  Result<std::uint32_t> add(std::string_view text);

  std::optional<std::uint32_t> find(std::string_view text) const noexcept;

  // Valid until the next add.
  std::string_view operator[](std::size_t index) const noexcept {
    const std::size_t begin = index == 0 ? begin_ : ends_[index - 1];
    return {text_.data() + begin, ends_[index] - begin};
  }

  std::size_t size() const noexcept { return ends_.size(); }
  bool empty() const noexcept { return ends_.empty(); }

  // For a reader of files, on an empty table: room for `count` strings of `bytes` bytes together,
  // which takes pages only as it is written. Their u16 lengths go to [0], their text to [1], which
  // lies directly behind; then number() makes a table of them.
  std::array<std::span<std::byte>, 2> make_room(std::size_t count, std::size_t bytes);

  // How far number() has come.
  struct Numbering {
    std::size_t strings = 0;
  };

  // Numbers the strings that lie in the first `arrived` bytes of what make_room() gave, from where
  // the last call stopped: so a file is refused at its first bad string, for memory in proportion
  // to the good ones. Errors (corrupt): lengths that do not add up to the text; a string that add()
  // would refuse. The table can then only be destroyed.
  Result<void> number(Numbering& numbering, std::uint64_t arrived);
  Result<void> number();

 private:
  static constexpr std::size_t npos = std::numeric_limits<std::size_t>::max();
  // At three quarters' load no honest table comes near this; a file made to collide stops here.
  static constexpr std::size_t max_probes = 512;
  static constexpr std::size_t most_growth = 32;

  std::size_t length_of(std::size_t index) const noexcept;

  Result<void> number_strings(Numbering& numbering, std::uint64_t arrived);

  // Room for `wanted` strings, of which the first `numbered` have their slots. Grows in large
  // steps, at most to what all strings of a file need.
  Result<void> make_slots(std::size_t numbered, std::size_t wanted);

  static std::uint64_t hash_of(std::string_view text) noexcept;
  // Half of the hash, so that other strings are seldom looked at, and the number + 1.
  static std::uint64_t entry(std::uint64_t hash, std::size_t number) noexcept {
    return (hash >> 32) << 32 | number;
  }
  static std::uint32_t number_in(std::uint64_t entry) noexcept {
    return static_cast<std::uint32_t>(entry) - 1;
  }

  static Result<void> check_text(std::string_view text);

  Result<void> check_free(std::string_view text, std::size_t slot) const;

  PERSONALIZE_INLINE void prefetch(std::uint64_t hash) const noexcept {
    __builtin_prefetch(slots_.data() + (static_cast<std::size_t>(hash) & (slots_.size() - 1)), 1);
  }

  std::size_t find_slot(std::string_view text, std::uint64_t hash) const noexcept;

  // For the first `count` strings. Where they do not fit, the slots are as they were.
  Result<void> rehash(std::size_t count, std::size_t slots);

  std::size_t begin_ = 0;  // of the first string in text_; a file's lengths lie before it
  detail::BareVector<char> text_;
  detail::BareVector<std::size_t> ends_;
  Vector<std::uint64_t> slots_;  // 0 where free; a power of two
};

// The largest magnitude of anything in a model that is multiplied or added: a product of two stays
// finite, as does a sum of some hundred such products.
inline constexpr float max_magnitude = 1e18f;

// Row-major [rows, columns], f32 or int8 with a scale a row (value = scale[row] * int8).
class Matrix {
 public:
  Matrix() = default;

  // type: f32 or i8.
  static Matrix zeros(std::size_t rows, std::size_t columns, ElementType type = ElementType::f32);

  std::size_t rows() const noexcept { return rows_; }
  std::size_t columns() const noexcept { return columns_; }
  bool empty() const noexcept { return rows_ == 0; }
  ElementType type() const noexcept { return type_; }

  // [rows * columns]; empty where type() is the other one.
  std::span<float> f32() noexcept { return {f32_.data(), f32_.empty() ? 0 : rows_ * columns_}; }
  std::span<const float> f32() const noexcept {
    return {f32_.data(), f32_.empty() ? 0 : rows_ * columns_};
  }
  std::span<std::int8_t> i8() noexcept { return {i8_.data(), i8_.empty() ? 0 : rows_ * columns_}; }
  std::span<const std::int8_t> i8() const noexcept {
    return {i8_.data(), i8_.empty() ? 0 : rows_ * columns_};
  }
  // [rows] with i8, empty with f32.
  std::span<float> scales() noexcept { return scales_; }
  std::span<const float> scales() const noexcept { return scales_; }

  // Writes row `r`, dequantised, to out[0, columns).
  void row(std::size_t r, std::span<float> out) const noexcept;

  // Adds row `r`, dequantised, to out[0, columns).
  void add_row(std::size_t r, std::span<float> out) const noexcept;

  // Replaces row `r`; int8 rows get a scale of their own, as in quantised(), infinite where a value
  // is not finite (then finite() is false). values: [columns].
  void set_row(std::size_t r, std::span<const float> values) noexcept;

  // Rows that are added are zero.
  void resize_rows(std::size_t rows);

  // Row i is this matrix's row rows[i], bit for bit; zeros where that is no_row.
  static constexpr std::uint32_t no_row = std::numeric_limits<std::uint32_t>::max();
  Matrix select(std::span<const std::uint32_t> rows) const;

  // For a reader of files, who writes every value and then calls end_rows(): memory that takes
  // pages only as it is written.
  static Matrix unwritten(std::size_t rows, std::size_t columns, ElementType type);
  void end_rows() noexcept;

  float at(std::size_t r, std::size_t c) const noexcept {
    const std::size_t i = r * columns_ + c;
    return type_ == ElementType::i8 ? scales_[r] * static_cast<float>(i8_[i]) : f32_[i];
  }

  // The int8 form: scale = max |row| / 127, values rounded to nearest.
  Matrix quantised() const;

  // At least every |value|, and no more than the largest possible with these scales; infinite where
  // a value is not finite.
  float magnitude() const noexcept;
  bool finite() const noexcept { return magnitude() < std::numeric_limits<float>::infinity(); }

  friend bool operator==(const Matrix&, const Matrix&) = default;

  // Its bytes as sections of type() hold them, to append(std::span<const std::byte>).
  void write(const auto& append) const {
    append(std::as_bytes(scales()));
    append(std::as_bytes(i8()));
    append(std::as_bytes(f32()));
  }

 private:
  std::size_t rows_ = 0, columns_ = 0;
  ElementType type_ = ElementType::f32;
  // Each with kernels::lanes zeros behind the last row, so that a kernel may load past it.
  detail::BareVector<float> f32_;
  detail::BareVector<std::int8_t> i8_;
  detail::BareVector<float> scales_;
};

enum class Activation : std::uint32_t {
  sigmoid = 1,
  tanh = 2,
  relu = 3,
  gelu = 4,  // in the exact (erf) form
  last = gelu
};

// How a GRU differs from PyTorch's.
struct GruForm {
  static constexpr std::uint32_t reset_before = 1;  // n = tanh(i_n + W_hn (r h) + b_hn)
  static constexpr std::uint32_t gate_input = 2;    // x [3H] is W_ih's product; W_ih is left out
  static constexpr std::uint32_t all = 3;
};

// One step of the encoder's program. x is the current vector; weights follow in
// ModelParts::weights.
struct EncoderOp {
  enum class Kind : std::uint32_t {
    embed_sum = 1,   // x = item's input + event-type embedding + time-gap embedding; no weights
    linear = 2,      // x = W x + b; W [out, in], b [1, out]
    gru = 3,         // x = h = GRU(x, h); W_ih [3H, in], W_hh [3H, H], b_ih [1, 3H], b_hh [1, 3H],
                     // gates r, z, n as in PyTorch; argument: 0 or a sum of GruForm
    layer_norm = 4,  // over x; weight [1, dim], bias [1, dim]; epsilon 1e-5
    activation = 5,  // argument: Activation
    save = 6,        // r[argument] = x; argument 0 to 7
    add = 7,         // x = x + r[argument]
    lru = 8,         // complex h = l h + B x + b, x = (Re h, Im h) of 2H values; l [1, 2H],
                     // B [2H, in], b [1, 2H], each with the real parts first; |l| <= 1. Linear
                     // recurrent unit: Orvieto et al., ICML 2023
    decay = 9,       // x = h = a h + b x by element; a [1, dim], b [1, dim]; |a| <= 1
  };
  Kind kind;
  std::uint32_t argument = 0;
};

constexpr std::string_view name(EncoderOp::Kind kind) noexcept {
  switch (kind) {
    case EncoderOp::Kind::embed_sum:
      return "embed_sum";
    case EncoderOp::Kind::linear:
      return "linear";
    case EncoderOp::Kind::gru:
      return "gru";
    case EncoderOp::Kind::layer_norm:
      return "layer_norm";
    case EncoderOp::Kind::activation:
      return "activation";
    case EncoderOp::Kind::save:
      return "save";
    case EncoderOp::Kind::add:
      return "add";
    case EncoderOp::Kind::lru:
      return "lru";
    case EncoderOp::Kind::decay:
      return "decay";
  }
  return "unknown";
}

constexpr std::string_view name(Activation activation) noexcept {
  switch (activation) {
    case Activation::sigmoid:
      return "sigmoid";
    case Activation::tanh:
      return "tanh";
    case Activation::relu:
      return "relu";
    case Activation::gelu:
      return "gelu";
  }
  return "unknown";
}

// A metadata field of the items. Categorical: one embedding a value. Numeric: one a bucket, bucket
// = the number of boundaries <= value.
struct MetadataField {
  std::string name;
  bool numeric = false;
  StringTable vocabulary;
  Vector<float> boundaries;
  Matrix embedding;
};

// Timestamps are Unix seconds; no_timestamp where unknown.
struct ItemStatistics {
  std::uint64_t interactions = 0;
  std::int64_t first_timestamp = no_timestamp;
  std::int64_t last_timestamp = no_timestamp;
  std::int64_t creation_timestamp = no_timestamp;
};

// Which of what was learnt with one model is good for another: it is where these agree. XXH64 of
// what it depends on, as it lies in memory.
struct Fingerprints {
  std::uint64_t encoder = 0;  // users' states: operations, weights, event types, time gaps, inputs
  std::uint64_t items = 0;    // sums of queries, users' offsets: item ids, vectors and biases
  friend bool operator==(const Fingerprints&, const Fingerprints&) = default;
};

// Everything that a model file holds. N items, vectors of d floats.
struct ModelParts {
  std::string metadata;  // JSON
  StringTable item_ids;
  Matrix item_vectors;                     // [N, d]
  Matrix input_vectors;                    // [N, e], empty where they are the item vectors
  Vector<float> biases;                    // [N]
  std::vector<ItemStatistics> statistics;  // [N]
  StringTable event_types;
  Matrix event_type_embedding;  // [E, e], empty without event types
  Matrix time_gap_embedding;    // [buckets >= 2, e] or empty
  std::vector<MetadataField> fields;
  std::vector<EncoderOp> operations;
  std::vector<Matrix> weights;
  StringTable user_ids;  // users who come with a state
  Matrix user_states;    // [U, s]: hidden states, then the query; BasicEncoder::load lays them out
  // Absent: follow from the content. A file keeps those of the parts it was written from, whatever
  // they were rounded to; who changes numbers of parts that were read resets them.
  std::optional<Fingerprints> fingerprints;

  // What embed_sum looks items up in.
  const Matrix& inputs() const noexcept {
    return input_vectors.empty() ? item_vectors : input_vectors;
  }
};

// Those that the parts bear or, where they bear none, those of their content. Some 0.15 ns a byte.
Fingerprints fingerprints_of(const ModelParts& parts) noexcept;

#if PERSONALIZE_HAS_BODIES

PERSONALIZE_API Result<std::uint32_t> StringTable::add(std::string_view text) {
  return detail::catching_bad_alloc([&]() -> Result<std::uint32_t> {
    if (auto checked = check_text(text); !checked) return checked.error();
    if ((size() + 1) * 4 > slots_.size() * 3)
      if (auto grown = rehash(size(), std::max<std::size_t>(16, slots_.size() * 2)); !grown)
        return grown.error();
    const std::uint64_t hash = hash_of(text);
    std::size_t slot = find_slot(text, hash);
    // Ids that were made to fall together part in a larger table, unless their whole hashes
    // agree.
    for (std::size_t larger = 2; slot == npos && larger <= most_growth; larger *= 2)
      if (rehash(size(), slots_.size() * larger)) slot = find_slot(text, hash);
    if (auto checked = check_free(text, slot); !checked) return checked.error();
    text_.resize(empty() ? begin_ : ends_.back());
    text_.insert(text_.end(), text.begin(), text.end());
    ends_.push_back(text_.size());
    slots_[slot] = entry(hash, size());
    return static_cast<std::uint32_t>(size() - 1);
  });
}

PERSONALIZE_API std::optional<std::uint32_t> StringTable::find(
    std::string_view text) const noexcept {
  if (slots_.empty()) return std::nullopt;
  const std::size_t slot = find_slot(text, hash_of(text));
  if (slot == npos || slots_[slot] == 0) return std::nullopt;
  return number_in(slots_[slot]);
}

PERSONALIZE_API std::array<std::span<std::byte>, 2> StringTable::make_room(std::size_t count,
                                                                           std::size_t bytes) {
  begin_ = count * sizeof(std::uint16_t);
  ends_.resize(count);
  text_.resize(begin_ + bytes);
  const auto raw = std::as_writable_bytes(std::span(text_));
  return {raw.first(begin_), raw.subspan(begin_)};
}

PERSONALIZE_API Result<void> StringTable::number(Numbering& numbering, std::uint64_t arrived) {
  return detail::catching_bad_alloc([&] { return number_strings(numbering, arrived); });
}

PERSONALIZE_API Result<void> StringTable::number() {
  Numbering all;
  return number(all, text_.size());
}

PERSONALIZE_API std::size_t StringTable::length_of(std::size_t index) const noexcept {
  std::uint16_t length;
  std::memcpy(&length, text_.data() + index * sizeof length, sizeof length);
  return length;
}

PERSONALIZE_API Result<void> StringTable::number_strings(Numbering& numbering,
                                                         std::uint64_t arrived) {
  if (arrived < begin_) return {};
  std::size_t& next = numbering.strings;
  // A batch of slots comes out of memory while the next strings are hashed.
  constexpr std::size_t batch = 32;
  std::array<std::uint64_t, batch> hashes;
  for (std::size_t begin = next; begin < size(); begin = next) {
    if (auto grown = make_slots(begin, std::min(begin + batch, size())); !grown) return grown;
    std::size_t end = begin == 0 ? begin_ : ends_[begin - 1], count = 0;
    for (; count < std::min(batch, size() - begin); ++count) {
      end += length_of(begin + count);
      if (end > arrived) break;
      ends_[begin + count] = end;
      hashes[count] = hash_of((*this)[begin + count]);
      prefetch(hashes[count]);
    }
    for (std::size_t i = 0; i < count; ++i, ++next) {
      const std::string_view text = (*this)[next];
      const std::size_t slot = find_slot(text, hashes[i]);
      auto checked = check_text(text);
      if (checked) checked = check_free(text, slot);
      if (!checked)
        return Error{Errc::corrupt,
                     detail::joined({"string ", next, ": ", checked.error().message})};
      slots_[slot] = entry(hashes[i], next + 1);
    }
    if (count == 0) break;
  }
  const std::size_t end = next == 0 ? begin_ : ends_[next - 1];
  if (arrived == text_.size() && (next != size() || end != arrived))
    return Error{Errc::corrupt, "the strings' lengths do not add up to their text"};
  return {};
}

PERSONALIZE_API Result<void> StringTable::make_slots(std::size_t numbered, std::size_t wanted) {
  if (wanted * 4 <= slots_.size() * 3) return {};
  std::size_t most = 16;
  while (size() * 4 > most * 3) most *= 2;
  return rehash(numbered, std::min(most, std::max<std::size_t>(1 << 14, 16 * slots_.size())));
}

PERSONALIZE_API std::uint64_t StringTable::hash_of(std::string_view text) noexcept {
  return xxh64(detail::text_bytes(text));
}

PERSONALIZE_API Result<void> StringTable::check_text(std::string_view text) {
  if (text.empty() || text.size() > max_id_bytes)
    return Error{Errc::invalid_argument,
                 detail::joined({"an id has 1 to 256 bytes, this one has ", text.size()})};
  if (!detail::valid_id(text))
    return Error{Errc::invalid_argument,
                 "an id is UTF-8 without control characters, this one is not"};
  return {};
}

PERSONALIZE_API Result<void> StringTable::check_free(std::string_view text,
                                                     std::size_t slot) const {
  if (slot == npos)
    return Error{Errc::corrupt, "too many ids fall together; they look made to collide"};
  if (slots_[slot] != 0) return Error{Errc::corrupt, detail::joined({"'", text, "' stands twice"})};
  return {};
}

PERSONALIZE_API std::size_t StringTable::find_slot(std::string_view text,
                                                   std::uint64_t hash) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  std::size_t slot = static_cast<std::size_t>(hash) & mask;
  for (std::size_t probe = 0; probe < max_probes; ++probe, slot = (slot + 1) & mask) {
    const std::uint64_t there = slots_[slot];
    if (there == 0 || (there >> 32 == hash >> 32 && (*this)[number_in(there)] == text)) return slot;
  }
  return npos;
}

PERSONALIZE_API Result<void> StringTable::rehash(std::size_t count, std::size_t slots) {
  Vector<std::uint64_t> old(slots);
  old.swap(slots_);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t hash = hash_of((*this)[i]);
    const std::size_t slot = find_slot((*this)[i], hash);
    if (slot == npos) {
      slots_.swap(old);
      return check_free((*this)[i], slot);
    }
    slots_[slot] = entry(hash, i + 1);
  }
  return {};
}

PERSONALIZE_API Matrix Matrix::zeros(std::size_t rows, std::size_t columns, ElementType type) {
  Matrix m;
  m.columns_ = columns;
  m.type_ = type;
  m.resize_rows(rows);
  return m;
}

PERSONALIZE_API void Matrix::row(std::size_t r, std::span<float> out) const noexcept {
  if (type_ == ElementType::i8) {
    const float scale = scales_[r];
    for (std::size_t c = 0; c < columns_; ++c)
      out[c] = scale * static_cast<float>(i8_[r * columns_ + c]);
  } else {
    std::copy_n(f32_.data() + r * columns_, columns_, out.data());
  }
}

PERSONALIZE_API void Matrix::add_row(std::size_t r, std::span<float> out) const noexcept {
  for (std::size_t c = 0; c < columns_; ++c) out[c] += at(r, c);
}

PERSONALIZE_API void Matrix::set_row(std::size_t r, std::span<const float> values) noexcept {
  if (type_ == ElementType::f32) {
    std::copy(values.begin(), values.end(), f32_.data() + r * columns_);
    return;
  }
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  if (!detail::all_finite(values)) largest = std::numeric_limits<float>::infinity();
  const float scale = largest / 127.0f;
  scales_[r] = scale;
  for (std::size_t c = 0; c < columns_; ++c)
    i8_[r * columns_ + c] = scale > 0 && scale < std::numeric_limits<float>::infinity()
                                ? static_cast<std::int8_t>(std::clamp(
                                      std::nearbyint(values[c] / scale), -127.0f, 127.0f))
                                : std::int8_t{0};
}

PERSONALIZE_API void Matrix::resize_rows(std::size_t rows) {
  const std::size_t kept = std::min(rows, rows_) * columns_;
  if (type_ == ElementType::f32) {
    f32_.resize(detail::elements(rows, columns_) + kernels::lanes);
    std::fill(f32_.begin() + static_cast<std::ptrdiff_t>(kept), f32_.end(), 0.0f);
  } else {
    scales_.resize(rows);
    if (rows > rows_)
      std::fill(scales_.begin() + static_cast<std::ptrdiff_t>(rows_), scales_.end(), 0.0f);
    i8_.resize(detail::elements(rows, columns_) + kernels::lanes);
    std::fill(i8_.begin() + static_cast<std::ptrdiff_t>(kept), i8_.end(), std::int8_t{0});
  }
  rows_ = rows;
}

PERSONALIZE_API Matrix Matrix::unwritten(std::size_t rows, std::size_t columns, ElementType type) {
  Matrix m;
  m.columns_ = columns;
  m.type_ = type;
  m.rows_ = rows;
  if (type == ElementType::f32) {
    m.f32_.resize(detail::elements(rows, columns) + kernels::lanes);
  } else {
    m.scales_.resize(rows);
    m.i8_.resize(detail::elements(rows, columns) + kernels::lanes);
  }
  return m;
}

PERSONALIZE_API void Matrix::end_rows() noexcept {
  if (!f32_.empty()) std::fill_n(f32_.end() - kernels::lanes, kernels::lanes, 0.0f);
  if (!i8_.empty()) std::fill_n(i8_.end() - kernels::lanes, kernels::lanes, std::int8_t{0});
}

PERSONALIZE_API Matrix Matrix::select(std::span<const std::uint32_t> rows) const {
  Matrix m = unwritten(rows.size(), columns_, type_);
  const auto copy = [&](const auto& from, auto& to, std::size_t width) {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const auto out = to.begin() + static_cast<std::ptrdiff_t>(r * width);
      if (rows[r] == no_row)
        std::fill_n(out, width, typename std::remove_cvref_t<decltype(to)>::value_type{});
      else
        std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(rows[r] * width), width, out);
    }
  };
  if (type_ == ElementType::f32) {
    copy(f32_, m.f32_, columns_);
  } else {
    copy(scales_, m.scales_, 1);
    copy(i8_, m.i8_, columns_);
  }
  m.end_rows();
  return m;
}

PERSONALIZE_API Matrix Matrix::quantised() const {
  if (type_ == ElementType::i8) return *this;
  Matrix m = zeros(rows_, columns_, ElementType::i8);
  for (std::size_t r = 0; r < rows_; ++r) m.set_row(r, f32().subspan(r * columns_, columns_));
  return m;
}

PERSONALIZE_API float Matrix::magnitude() const noexcept {
  return detail::largest(f32_.empty() ? std::span<const float>(scales_) : f32()) *
         (f32_.empty() ? 127.0f : 1.0f);
}

namespace detail {

// XXH64 of pieces, each of which takes in its length and the hash of those before it.
struct ContentHash {
  std::uint64_t value = 0;

  void add(std::span<const std::byte> piece) noexcept { value = xxh64(piece, value); }
  void add(std::uint64_t number) noexcept { add(std::as_bytes(std::span(&number, 1))); }
  void add(const StringTable& table) noexcept {
    for (std::size_t i = 0; i < table.size(); ++i) add(text_bytes(table[i]));
    add(table.size());
  }
  void add(const Matrix& matrix) noexcept {
    for (const std::uint64_t number :
         {static_cast<std::uint64_t>(matrix.type()), std::uint64_t{matrix.rows()},
          std::uint64_t{matrix.columns()}})
      add(number);
    matrix.write([this](std::span<const std::byte> piece) { add(piece); });
  }
};

}  // namespace detail

PERSONALIZE_API Fingerprints fingerprints_of(const ModelParts& parts) noexcept {
  if (parts.fingerprints) return *parts.fingerprints;
  detail::ContentHash inputs, vectors, encoder, items;
  inputs.add(parts.inputs());
  vectors = inputs;
  if (!parts.input_vectors.empty()) {
    vectors = {};
    vectors.add(parts.item_vectors);
  }
  encoder.add(std::as_bytes(std::span(parts.operations)));
  for (const Matrix& weight : parts.weights) encoder.add(weight);
  encoder.add(parts.event_types);
  encoder.add(parts.event_type_embedding);
  encoder.add(parts.time_gap_embedding);
  encoder.add(inputs.value);
  encoder.add(parts.item_vectors.columns());
  items.add(parts.item_ids);
  items.add(vectors.value);
  items.add(std::as_bytes(std::span<const float>(parts.biases)));
  return {encoder.value, items.value};
}

// 0: no previous event; else 1 + min(floor(log2(max(gap, 0) + 1)), buckets - 2), gap in seconds.
inline std::uint32_t time_gap_bucket(std::optional<std::int64_t> previous, std::int64_t timestamp,
                                     std::uint32_t buckets) noexcept {
  if (!previous) return 0;
  // Unsigned subtraction: hostile timestamps at both ends of the range must not overflow.
  const std::uint64_t gap = timestamp > *previous ? static_cast<std::uint64_t>(timestamp) -
                                                        static_cast<std::uint64_t>(*previous)
                                                  : 0;
  const auto magnitude = static_cast<std::uint32_t>(std::bit_width(gap + 1) - 1);
  return 1 + std::min(magnitude, buckets - 2);
}

namespace detail {

inline Error shape_error(std::string_view what, const Matrix& m, std::size_t rows,
                         std::size_t columns) {
  return {Errc::corrupt, joined({what, " has shape [", m.rows(), ", ", m.columns(), "], expected [",
                                 rows, ", ", columns, "]"})};
}

inline constexpr std::uint32_t encoder_slots = 8;
inline constexpr std::size_t max_operations = 256;
inline constexpr std::size_t max_time_gaps = 1024;  // time_gap_bucket tells 66
// A recurrence's |a| or |lambda| may exceed 1 by what int8 and f32 round.
inline constexpr double max_modulus = 1 + 1e-3;

}  // namespace detail

// What an encoder operation takes and makes, of vectors of `inputs` values: the one place that
// knows. The loader checks weights by it, Encoder packs them and lays out states by it.
//
// A new operation touches these 8 places: its enumerator and name (room 6), shape_of() below,
// Encoder::step (room 8); DirectEncoder in tests/test_encoder.cpp; in tools/convert, for models
// from elsewhere: parse_layer (mapping.cpp), add_layer (build.cpp), its type (mapping.hpp), and
// DirectEncoder (check.cpp).
struct OpShape {
  struct Weight {
    std::size_t rows = 0, columns = 0;
    friend bool operator==(const Weight&, const Weight&) = default;
  };
  // Weights that are used together: x -> W x + b, or by element.
  struct Layer {
    static constexpr std::size_t none = ~std::size_t{0};
    std::size_t weights = none, bias = none;  // their numbers among the operation's
    std::size_t gates = 0;  // groups of rows, each padded on its own; 0: vectors by element
  };
  // What weight 0 must keep to, so that the state cannot grow without bound.
  enum class Recurrence : std::uint8_t { none, real, complex };

  std::size_t inputs = 0, outputs = 0;  // values of x before and behind it
  std::size_t state = 0;                // values of a user's state
  std::array<Weight, 4> weights{};      // in their order in ModelParts::weights
  std::size_t weight_count = 0;
  std::array<Layer, 2> layers{};
  std::size_t layer_count = 0;
  Recurrence recurrence = Recurrence::none;
};

// first: the shape of the operation's first weight, which the sizes follow from. Nothing for a kind
// or argument that this version does not know.
inline std::optional<OpShape> shape_of(const EncoderOp& op, std::size_t inputs,
                                       OpShape::Weight first) noexcept {
  OpShape shape{.inputs = inputs, .outputs = inputs};
  const auto weigh = [&](std::initializer_list<OpShape::Weight> weights,
                         std::initializer_list<OpShape::Layer> layers) {
    std::copy(weights.begin(), weights.end(), shape.weights.begin());
    std::copy(layers.begin(), layers.end(), shape.layers.begin());
    shape.weight_count = weights.size();
    shape.layer_count = layers.size();
  };
  switch (op.kind) {
    case EncoderOp::Kind::embed_sum:
      return shape;
    case EncoderOp::Kind::linear:
      shape.outputs = first.rows;
      weigh({{first.rows, inputs}, {1, first.rows}}, {{0, 1, 1}});
      return shape;
    case EncoderOp::Kind::gru: {
      if (op.argument > GruForm::all) return std::nullopt;
      const std::size_t hidden = first.rows / 3, gates = 3 * hidden;
      shape.outputs = shape.state = hidden;
      if (op.argument & GruForm::gate_input)
        weigh({{gates, hidden}, {1, gates}, {1, gates}}, {{OpShape::Layer::none, 1, 0}, {0, 2, 3}});
      else
        weigh({{gates, inputs}, {gates, hidden}, {1, gates}, {1, gates}}, {{0, 2, 3}, {1, 3, 3}});
      return shape;
    }
    case EncoderOp::Kind::layer_norm:
      weigh({{1, inputs}, {1, inputs}}, {{0, 1, 0}});
      return shape;
    case EncoderOp::Kind::activation:
      if (op.argument < 1 || op.argument > static_cast<std::uint32_t>(Activation::last))
        return std::nullopt;
      return shape;
    case EncoderOp::Kind::save:
    case EncoderOp::Kind::add:
      return shape;
    case EncoderOp::Kind::lru: {
      const std::size_t pair = first.columns / 2 * 2;
      shape.outputs = shape.state = pair;
      shape.recurrence = OpShape::Recurrence::complex;
      weigh({{1, pair}, {pair, inputs}, {1, pair}}, {{0, OpShape::Layer::none, 0}, {1, 2, 1}});
      return shape;
    }
    case EncoderOp::Kind::decay:
      shape.state = inputs;
      shape.recurrence = OpShape::Recurrence::real;
      weigh({{1, inputs}, {1, inputs}}, {{0, 1, 0}});
      return shape;
  }
  return std::nullopt;
}

namespace detail {

// An encoder's program with what its operations take, once checked.
struct Program {
  Vector<OpShape> shapes;  // one an operation
  std::size_t state = 0;   // values of all hidden states
};

// Walks the program: dimensions must follow from one another, beginning with e (`inputs`) and
// ending at d (`outputs`). weights: the shapes of all.
inline Result<Program> check_program(std::span<const EncoderOp> operations,
                                     std::span<const OpShape::Weight> weights, std::size_t inputs,
                                     std::size_t outputs, const LoadLimits& limits) {
  if (operations.empty() || operations.size() > max_operations ||
      operations[0].kind != EncoderOp::Kind::embed_sum)
    return Error{Errc::corrupt, "encoder: has 1 to 256 operations and begins with embed_sum"};
  Program program;
  std::size_t next = 0, dimension = inputs;
  std::array<std::size_t, encoder_slots> slots{};
  for (std::size_t o = 0; o < operations.size(); ++o) {
    const EncoderOp& op = operations[o];
    const auto fail = [&](Errc code, std::string_view what) {
      return Error{code, joined({"encoder: operation ", o, ": ", what})};
    };
    const std::string label{name(op.kind)};
    const auto shape =
        shape_of(op, dimension, next < weights.size() ? weights[next] : OpShape::Weight{});
    if (!shape)
      return fail(Errc::unsupported, joined({"unknown kind or argument (", label,
                                             "); use a newer personalize_runtime.hpp"}));
    if (op.kind == EncoderOp::Kind::embed_sum && o != 0)
      return fail(Errc::corrupt, "embed_sum stands only first");
    if (op.kind == EncoderOp::Kind::gru && (op.argument & GruForm::gate_input) != 0 &&
        dimension != 3 * shape->outputs)
      return fail(Errc::corrupt, "the input is not as long as the gates");
    if (op.kind == EncoderOp::Kind::save || op.kind == EncoderOp::Kind::add) {
      if (op.argument >= encoder_slots) return fail(Errc::corrupt, "slot is not in [0, 7]");
      if (op.kind == EncoderOp::Kind::save)
        slots[op.argument] = dimension;
      else if (slots[op.argument] != dimension)
        return fail(Errc::corrupt, "adds a vector of another length");
    }
    for (std::size_t w = 0; w < shape->weight_count; ++w, ++next) {
      if (next == weights.size()) return fail(Errc::corrupt, "a weight is missing");
      const auto& [rows, columns] = shape->weights[w];
      if (weights[next] != shape->weights[w])
        return fail(Errc::corrupt,
                    joined({"weight ", next, " has shape [", weights[next].rows, ", ",
                            weights[next].columns, "], expected [", rows, ", ", columns, "]"}));
    }
    dimension = shape->outputs;
    if (dimension == 0) return fail(Errc::corrupt, "an empty vector");
    if (dimension / 3 > limits.dimension || shape->state > limits.dimension)
      return fail(Errc::limit, "wider than LoadLimits::dimension");
    program.state += shape->state;
    program.shapes.push_back(*shape);
  }
  if (next != weights.size())
    return Error{Errc::corrupt, "encoder: more weights than its operations use"};
  if (dimension != outputs)
    return Error{Errc::corrupt, joined({"encoder: ends with ", dimension,
                                        " values, item vectors have ", outputs})};
  if (program.state == 0) return Error{Errc::corrupt, "encoder: has no recurrent operation"};
  return program;
}

inline Result<Program> check_program(const ModelParts& parts, const LoadLimits& limits) {
  Vector<OpShape::Weight> weights;
  for (const Matrix& weight : parts.weights) weights.push_back({weight.rows(), weight.columns()});
  return check_program(parts.operations, weights, parts.inputs().columns(),
                       parts.item_vectors.columns(), limits);
}

// Errors: a recurrence that lets a state grow from event to event.
inline Result<void> check_recurrences(const ModelParts& parts, const Program& program) {
  std::size_t next = 0;
  for (std::size_t o = 0; o < program.shapes.size(); ++o) {
    const OpShape& shape = program.shapes[o];
    const bool complex = shape.recurrence == OpShape::Recurrence::complex;
    const std::size_t values = complex ? shape.state / 2 : shape.state;
    for (std::size_t j = 0; j < values; ++j) {
      if (shape.recurrence == OpShape::Recurrence::none) break;
      const Matrix& weight = parts.weights[next];
      const double real = weight.at(0, j), imaginary = complex ? weight.at(0, j + values) : 0.0f;
      if (!(std::hypot(real, imaginary) <= max_modulus))
        return Error{Errc::corrupt,
                     joined({"encoder: operation ", o, " (", name(parts.operations[o].kind),
                             "): a recurrent weight of magnitude over 1 lets users' "
                             "states grow without bound"})};
    }
    next += shape.weight_count;
  }
  return {};
}

inline constexpr std::size_t max_metadata_bytes = std::size_t{1} << 24;
inline constexpr int max_metadata_depth = 64;

// Errors: metadata that a JSON parser should not be given. Whether it is JSON is for the parser to
// say.
inline Result<void> check_metadata(std::string_view json) {
  if (json.size() > max_metadata_bytes) return Error{Errc::limit, "section META: is over 16 MiB"};
  if (!valid_utf8(json)) return Error{Errc::corrupt, "section META: is not UTF-8"};
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (quoted && c == '\\')
      ++i;
    else if (c == '"')
      quoted = !quoted;
    else if (!quoted && (c == '[' || c == '{') && ++depth > max_metadata_depth)
      return Error{Errc::limit, "section META: nests deeper than 64"};
    else if (!quoted && (c == ']' || c == '}'))
      --depth;
  }
  return {};
}

// Errors: shapes that contradict one another. program: of the encoder, checked.
inline Result<void> check_shapes(const ModelParts& parts, const Program& program) {
  const std::size_t items = parts.item_ids.size(), d = parts.item_vectors.columns();
  const std::size_t e = parts.inputs().columns();
  if (parts.item_vectors.rows() != items)
    return shape_error("section IVEC", parts.item_vectors, items, d);
  if (parts.inputs().rows() != items || e == 0)
    return shape_error("section IINP", parts.input_vectors, items, e);
  if (parts.biases.size() != items)
    return Error{Errc::corrupt, "section BIAS: one bias an item is needed"};
  if (parts.statistics.size() != items)
    return Error{Errc::corrupt, "section STAT: one row an item is needed"};
  if (parts.event_type_embedding.rows() != parts.event_types.size() ||
      (!parts.event_types.empty() && parts.event_type_embedding.columns() != e))
    return shape_error("section EVTE", parts.event_type_embedding, parts.event_types.size(), e);
  if (!parts.time_gap_embedding.empty() &&
      (parts.time_gap_embedding.rows() < 2 || parts.time_gap_embedding.columns() != e))
    return shape_error("section GAPE", parts.time_gap_embedding, 2, e);
  if (parts.time_gap_embedding.rows() > max_time_gaps)
    return Error{Errc::limit, "section GAPE: has over 1024 rows"};
  for (const MetadataField& field : parts.fields) {
    const std::size_t rows = field.numeric ? field.boundaries.size() + 1 : field.vocabulary.size();
    if (!is_id(field.name))
      return Error{Errc::corrupt,
                   "section FLDN: a field name has 1 to 256 bytes of UTF-8 without control "
                   "characters"};
    if (field.embedding.rows() != rows || (rows > 0 && field.embedding.columns() != d))
      return shape_error(joined({"section FEMB of field ", field.name}), field.embedding, rows, d);
  }
  const std::size_t stored = program.state + d;
  if (parts.user_states.rows() != parts.user_ids.size() ||
      (!parts.user_ids.empty() && parts.user_states.columns() != stored))
    return shape_error("section USTA", parts.user_states, parts.user_ids.size(), stored);
  return {};
}

inline Result<void> check_finite(float magnitude, std::string_view what) {
  if (!(magnitude < std::numeric_limits<float>::infinity()))
    return Error{Errc::corrupt, joined({what, ": holds a value that is not finite"})};
  return {};
}

// Errors: a value that is not finite, or boundaries that do not ascend; where served, one over
// max_magnitude. What metadata adds up to is looked at when an item is put.
inline Result<void> check_values(const ModelParts& parts, bool served) {
  const auto check = [served](float magnitude, const char* what) -> Result<void> {
    if (served && std::isfinite(magnitude) && magnitude > max_magnitude)
      return Error{Errc::corrupt, joined({what, ": holds a value over 1e18 in magnitude"})};
    return check_finite(magnitude, what);
  };
  if (auto r = check(parts.item_vectors.magnitude(), "section IVEC"); !r) return r;
  if (auto r = check(parts.input_vectors.magnitude(), "section IINP"); !r) return r;
  if (auto r = check(parts.user_states.magnitude(), "section USTA"); !r) return r;
  if (auto r = check(largest(parts.biases), "section BIAS"); !r) return r;
  if (auto r = check(parts.event_type_embedding.magnitude(), "section EVTE"); !r) return r;
  if (auto r = check(parts.time_gap_embedding.magnitude(), "section GAPE"); !r) return r;
  for (const Matrix& weight : parts.weights)
    if (auto r = check(weight.magnitude(), "section ENCW"); !r) return r;
  for (const MetadataField& field : parts.fields) {
    if (auto r = check_finite(field.embedding.magnitude(), "section FEMB"); !r) return r;
    if (!all_finite(field.boundaries))
      return Error{Errc::corrupt, "section FBND: holds a value that is not finite"};
    if (!std::is_sorted(field.boundaries.begin(), field.boundaries.end()))
      return Error{Errc::corrupt,
                   joined({"section FBND of field ", field.name, ": not ascending"})};
  }
  return {};
}

// What must hold between the parts, whether they come from a file or from a trainer. served: also
// that no state can grow without bound, for which a file is written but not read.
inline Result<void> check_parts(const ModelParts& parts, const LoadLimits& limits,
                                bool served = true) {
  const std::size_t items = parts.item_ids.size(), d = parts.item_vectors.columns();
  const std::size_t e = parts.inputs().columns();
  if (items == 0 || d == 0) return Error{Errc::corrupt, "the model has no items or no dimensions"};
  if (items > limits.items || items >= std::numeric_limits<std::uint32_t>::max())
    return Error{Errc::limit, "the model has more items than LoadLimits::items"};
  if (d > limits.dimension || e / 3 > limits.dimension)
    return Error{Errc::limit, "section IVEC or IINP: wider than LoadLimits::dimension"};
  if (auto checked = check_metadata(parts.metadata); !checked) return checked;
  const auto program = check_program(parts, limits);
  if (!program) return program.error();
  if (auto checked = check_shapes(parts, *program); !checked) return checked;
  if (auto checked = check_values(parts, served); !checked || !served) return checked;
  return check_recurrences(parts, *program);
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 7: model file. Owns how a model is read and written, Model, which serves from memory, and
// how it takes on the order of other ids. Uses rooms 1, 2, 5 and 6.
// ============================================================================================

struct WriteOptions {
  // f32: matrices as they are. i8: f32 matrices of more than one row in 8 bits (one of one row is a
  // norm or bias: small, and every row depends on it). i4: matrices of more than one row in 4 bits;
  // in 8 where they have fewer than 16 columns, and users' states.
  ElementType element_type = ElementType::i8;
  int zstd_level = 19;                   // 1 to 22; 0 writes stored sections
  std::uint32_t chunk_bytes = 1u << 20;  // a power of two in [2^6, 2^24]; see LoadOptions
};

// The bytes of a model file. The same parts and options give the same bytes (with one zstd
// version). limits: those of who will read it. Errors: parts that contradict one another or are
// over a limit; out of memory.
Result<Vector<std::byte>> write_model(const ModelParts& parts, const WriteOptions& options = {},
                                      const LoadLimits& limits = {});

// Writes the model file, replacing `path` at once or not at all (as write_file does). Takes memory
// for two chunks and, where f32 matrices are to be written in 8 bits, for the largest of them in
// that form.
Result<void> save_model(const ModelParts& parts, const std::string& path,
                        const WriteOptions& options = {}, const LoadLimits& limits = {});

// The parts of a model file in memory, every value checked. Errors name the section and the reason.
Result<ModelParts> read_model(std::span<const std::byte> file, const LoadOptions& options = {});

// The same of a file on disk, of which no more than a chunk at a time is held in memory.
Result<ModelParts> read_model(const std::string& path, const LoadOptions& options = {});

// An immutable model: share it between threads and recommenders freely.
class Model {
 public:
  // Reads and checks a model file, as read_model does.
  static Result<std::shared_ptr<const Model>> load(const std::string& path,
                                                   const LoadOptions& options = {});
  static Result<std::shared_ptr<const Model>> from_bytes(std::span<const std::byte> file,
                                                         const LoadOptions& options = {});
  // limits: how many items and dimensions are allowed.
  static Result<std::shared_ptr<const Model>> from_parts(ModelParts parts,
                                                         const LoadLimits& limits = {});

  std::size_t item_count() const noexcept { return parts_.item_ids.size(); }
  std::size_t dimension() const noexcept { return parts_.item_vectors.columns(); }
  std::string_view item_id(std::uint32_t item) const noexcept { return parts_.item_ids[item]; }
  std::optional<std::uint32_t> find_item(std::string_view id) const noexcept {
    return parts_.item_ids.find(id);
  }
  const ModelParts& parts() const noexcept { return parts_; }
  const Fingerprints& fingerprints() const noexcept { return *parts_.fingerprints; }

  // The vector of an item that has only metadata: the sum of its values' embeddings, to out[0, d).
  // fields: name and value, categories separated by '|', numbers with a point whatever the locale.
  // Unknown fields and values add nothing; the number of values that were known is returned.
  std::size_t metadata_vector(std::span<const std::pair<std::string_view, std::string_view>> fields,
                              std::span<float> out) const;

 private:
  explicit Model(ModelParts parts) noexcept : parts_(std::move(parts)) {}

  static Result<std::shared_ptr<const Model>> of(Result<ModelParts> parts);

  ModelParts parts_;  // with fingerprints
};

#if PERSONALIZE_HAS_BODIES

namespace detail {

// The bytes of a section of strings, and how many there are.
void write_strings(const StringTable& table, const auto& append) {
  Vector<std::byte> lengths;
  for (std::size_t i = 0; i < table.size(); ++i)
    append_integer(lengths, static_cast<std::uint16_t>(table[i].size()));
  append(std::span<const std::byte>(lengths));
  for (std::size_t i = 0; i < table.size(); ++i) append(text_bytes(table[i]));
}
inline std::uint64_t string_bytes(const StringTable& table) {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < table.size(); ++i) bytes += 2 + table[i].size();
  return bytes;
}

// The 4-bit form of rows: value = scale * group scale (1 to 15) * value (-8 to 7), the latter two
// in a nibble each, the first of a pair low, values + 8. The product of group scale and value is
// an int8, so a reader gets the very same numbers as rows of int8.
//
// A row's scale and those of its groups are those of a few (row) and of all (groups) that leave the
// least squared error.
class FourBitWriter {
 public:
  explicit FourBitWriter(const Matrix& matrix)
      : matrix_(&matrix),
        columns_(matrix.columns()),
        row_(columns_),
        values_(columns_),
        best_values_(columns_),
        groups_((columns_ + FourBitRows::group - 1) / FourBitRows::group),
        best_groups_(groups_.size()) {}

  void write(const FileBuilder::Append& append, unsigned chunk_log2) {
    std::array<Vector<std::byte>, 3> parts;  // scales, groups, values
    const auto in_chunk =
        static_cast<std::size_t>(FourBitRows::rows_in_chunk(columns_, chunk_log2));
    for (std::size_t r = 0; r < matrix_->rows(); ++r) {
      append_integer(parts[0], quantise(r));
      append_nibbles(parts[1], std::span<const std::uint8_t>(best_groups_));
      append_nibbles(parts[2], std::span<const std::uint8_t>(best_values_));
      if ((r + 1) % in_chunk != 0 && r + 1 != matrix_->rows()) continue;
      for (Vector<std::byte>& part : parts) {
        append(part);
        part.clear();
      }
    }
  }

 private:
  static constexpr float most = 15;  // of a group's scale

  static void append_nibbles(Vector<std::byte>& out, std::span<const std::uint8_t> nibbles) {
    for (std::size_t c = 0; c < nibbles.size(); c += 2)
      out.push_back(
          static_cast<std::byte>(nibbles[c] | (c + 1 < nibbles.size() ? nibbles[c + 1] << 4 : 0)));
  }

  // Row r to best_groups_ and best_values_; returns its scale. Works on the row times that power of
  // two which takes its largest magnitude to [1, 2), where neither steps nor squares leave a
  // float's range.
  float quantise(std::size_t r) {
    matrix_->row(r, row_);
    float largest = 0;
    for (const float v : row_) largest = std::max(largest, std::abs(v));
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    largest = std::scalbn(largest, -exponent);
    for (float& v : row_) v = std::scalbn(v, -exponent);
    float best_scale = 0;
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](float scale) {
      if (!(scale > 0) || least == 0) return;
      const double error = quantise_with(scale);
      if (error >= least) return;
      least = error;
      best_scale = scale;
      best_groups_ = groups_;
      best_values_ = values_;
    };
    // What came out of a 4-bit file goes back as it was.
    if (matrix_->type() == ElementType::i8) consider(std::scalbn(matrix_->scales()[r], -exponent));
    for (const float part : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.65f})
      consider(largest * part / (most * 7.0f));
    best_scale = std::scalbn(best_scale, exponent);
    if (best_scale == 0) {
      std::fill(best_groups_.begin(), best_groups_.end(), std::uint8_t{1});
      std::fill(best_values_.begin(), best_values_.end(), std::uint8_t{8});
    }
    return best_scale;
  }

  // The squared error with this scale of the row; fills groups_ and values_.
  double quantise_with(float scale) {
    double sum = 0;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      const std::size_t begin = g * FourBitRows::group;
      const std::size_t end = std::min(begin + FourBitRows::group, columns_);
      float least = std::numeric_limits<float>::infinity();
      std::uint8_t best = 1;
      for (std::uint8_t m = 1; m <= 15; ++m) {
        const float step = scale * static_cast<float>(m), inverse = 1.0f / step;
        float error = 0;
        for (std::size_t c = begin; c < end; ++c) {
          const float e = row_[c] - scale * (static_cast<float>(m) * nearest(row_[c] * inverse));
          error += e * e;
        }
        if (error < least) {
          least = error;
          best = m;
        }
      }
      groups_[g] = best;
      const float inverse = 1.0f / (scale * static_cast<float>(best));
      for (std::size_t c = begin; c < end; ++c)
        values_[c] = static_cast<std::uint8_t>(nearest(row_[c] * inverse) + 8.0f);
      sum += static_cast<double>(least);
    }
    return sum;
  }

  static float nearest(float v) noexcept { return std::clamp(std::nearbyint(v), -8.0f, 7.0f); }

  const Matrix* matrix_;
  std::size_t columns_;
  Vector<float> row_;
  Vector<std::uint8_t> values_, best_values_, groups_, best_groups_;
};

// The rows of one chunk, as FourBitWriter writes it, to `target` from row `first` on.
inline void expand_four_bits(std::span<const std::byte> chunk, std::size_t first, Matrix& target) {
  const std::size_t columns = target.columns();
  const auto group_bytes = static_cast<std::size_t>(FourBitRows::group_bytes(columns));
  const auto value_bytes = static_cast<std::size_t>(FourBitRows::value_bytes(columns));
  const std::size_t rows = chunk.size() / static_cast<std::size_t>(FourBitRows::row_bytes(columns));
  std::memcpy(target.scales().data() + first, chunk.data(), rows * sizeof(float));
  const std::byte* groups = chunk.data() + rows * sizeof(float);
  const std::byte* values = groups + rows * group_bytes;
  std::int8_t* out = target.i8().data() + first * columns;
  for (std::size_t r = 0; r < rows; ++r, groups += group_bytes, values += value_bytes)
    for (std::size_t begin = 0; begin < columns; begin += FourBitRows::group) {
      const std::size_t g = begin / FourBitRows::group;
      const int scale = std::to_integer<int>(groups[g / 2]) >> (g % 2 * 4) & 15;
      const std::size_t end = std::min(begin + FourBitRows::group, columns);
      for (std::size_t c = begin; c < end; ++c)
        *out++ = static_cast<std::int8_t>(
            scale * ((std::to_integer<int>(values[c / 2]) >> (c % 2 * 4) & 15) - 8));
    }
}

// Decides where each section goes, in the file's order, checking element type and shape against raw
// size and limits; the memory is taken when its first bytes come. The first error stays; later
// calls then do nothing.
class SectionPlan {
 public:
  SectionPlan(std::span<const SectionInfo> sections, const LoadLimits& limits)
      : sections_(sections),
        order_(order_of(sections)),
        limits_(limits),
        targets_(sections.size()) {}

  const SectionInfo* find(std::string_view tag, std::uint32_t index = 0) const noexcept {
    return find_section(sections_, order_, tag, index);
  }
  // Of a section's shape; 0 where there is no such section.
  std::uint64_t extent(std::string_view tag, std::size_t axis,
                       std::uint32_t index = 0) const noexcept {
    const SectionInfo* const section = find(tag, index);
    return section ? section->shape[axis] : 0;
  }
  std::size_t section_count() const noexcept { return sections_.size(); }

  void strings(StringTable& table, std::string_view tag, std::uint32_t index = 0) {
    const std::uint64_t count = extent(tag, 0, index);
    SectionTarget* target = target_of(tag, index, {ElementType::string}, {count});
    if (!target) return;
    const SectionInfo& section = *find(tag, index);
    if (count > limits_.items)
      return fail(section_error(Errc::limit, section, "more strings than LoadLimits::items"));
    if (count > section.raw_size / 3)  // a length and a byte each
      return fail(section_error(Errc::corrupt, section, "declares more strings than it holds"));
    const auto bytes = static_cast<std::size_t>(section.raw_size - 2 * count);
    target->take = [&table, count, bytes]() -> SectionTarget::Areas {
      const auto [lengths, text] = table.make_room(static_cast<std::size_t>(count), bytes);
      return {std::span(lengths.data(), lengths.size() + text.size())};
    };
    target->arrived = [&table, numbering = StringTable::Numbering{}](std::uint64_t size) mutable {
      return table.number(numbering, size);
    };
  }

  // shape: the expected one; a matrix without rows may have any number of columns.
  void matrix(Matrix& matrix, std::string_view tag, std::uint32_t index,
              std::array<std::uint64_t, 2> shape) {
    if (shape[0] == 0) shape[1] = extent(tag, 1, index);
    SectionTarget* target = target_of(
        tag, index, {ElementType::i8, ElementType::f32, ElementType::i4}, {shape[0], shape[1]});
    if (!target) return;
    const SectionInfo& section = *find(tag, index);
    const auto rows = static_cast<std::size_t>(shape[0]);
    const auto columns = static_cast<std::size_t>(shape[1]);
    const bool f32 = section.element_type == ElementType::f32;
    const bool four_bits = section.element_type == ElementType::i4;
    target->take = [&matrix, rows, columns, f32, four_bits]() -> SectionTarget::Areas {
      matrix = Matrix::unwritten(rows, columns, f32 ? ElementType::f32 : ElementType::i8);
      if (rows == 0) matrix.end_rows();
      if (four_bits) return {};
      if (f32) return {std::as_writable_bytes(matrix.f32())};
      return {std::as_writable_bytes(matrix.scales()), std::as_writable_bytes(matrix.i8())};
    };
    target->arrived = [&matrix, all = section.raw_size](std::uint64_t bytes) -> Result<void> {
      if (bytes == all) matrix.end_rows();
      return {};
    };
    if (!four_bits) return;
    const auto in_chunk =
        static_cast<std::size_t>(FourBitRows::rows_in_chunk(columns, section.chunk_log2));
    target->expand = [&matrix, in_chunk](std::uint64_t chunk, std::span<const std::byte> raw) {
      expand_four_bits(raw, static_cast<std::size_t>(chunk) * in_chunk, matrix);
    };
  }

  // Elements lie in memory as they do in the file: Element is T, or a struct of shape[1] T. check:
  // of the whole, when it has come.
  template <class Container>
  void values(Container& container, std::string_view tag, std::uint32_t index, ElementType type,
              std::initializer_list<std::uint64_t> shape,
              std::function<Result<void>()> check = {}) {
    static_assert(std::is_trivially_copyable_v<typename Container::value_type>);
    const auto resize = [](void* any, std::size_t size) {
      auto& values = *static_cast<Container*>(any);
      values.resize(size);
      return std::as_writable_bytes(std::span(values.data(), size));
    };
    values_of(&container, resize, tag, index, type, shape, std::move(check));
  }

  void fail(Error error) {
    if (!error_) error_ = std::move(error);
  }
  const std::optional<Error>& error() const noexcept { return error_; }
  std::span<const SectionTarget> targets() const noexcept { return targets_; }

 private:
  void values_of(void* container, std::span<std::byte> (*resize)(void*, std::size_t),
                 std::string_view tag, std::uint32_t index, ElementType type,
                 std::initializer_list<std::uint64_t> shape, std::function<Result<void>()> check) {
    SectionTarget* target = target_of(tag, index, {type}, shape);
    if (!target) return;
    target->take = [container, resize,
                    size = static_cast<std::size_t>(*shape.begin())]() -> SectionTarget::Areas {
      return {resize(container, size)};
    };
    if (!check) return;
    target->arrived = [check = std::move(check),
                       all = find(tag, index)->raw_size](std::uint64_t bytes) -> Result<void> {
      return bytes == all ? check() : Result<void>{};
    };
  }

  SectionTarget* target_of(std::string_view tag, std::uint32_t index,
                           std::initializer_list<ElementType> types,
                           std::initializer_list<std::uint64_t> shape) {
    if (error_) return nullptr;
    const SectionInfo* section = find(tag, index);
    if (!section) {
      SectionInfo missing;
      std::copy_n(tag.begin(), 4, missing.tag.begin());
      missing.index = index;
      fail({Errc::corrupt, joined({"section ", missing.label(), ": is missing"})});
      return nullptr;
    }
    if (std::find(types.begin(), types.end(), section->element_type) == types.end()) {
      fail(section_error(Errc::corrupt, *section, "unexpected element type"));
    } else if (section->rank != shape.size()) {
      fail(section_error(Errc::corrupt, *section, "unexpected rank"));
    } else if (!std::equal(shape.begin(), shape.end(), section->shape.begin())) {
      fail(section_error(
          Errc::corrupt, *section,
          joined({"has shape ", text_of(std::span(section->shape).first(shape.size())),
                  ", expected ", text_of(shape)})));
    } else if (!raw_size_fits(*section)) {
      fail(section_error(Errc::corrupt, *section, "raw size does not follow from its shape"));
    } else if (last_ && section < last_) {
      fail(section_error(Errc::corrupt, *section,
                         joined({"stands before section ", last_->label(), ", which it follows"})));
    } else if (section->codec != Codec::stored && section->codec != Codec::zstd) {
      fail(section_error(Errc::unsupported, *section, "unknown codec"));
    }
    if (error_) return nullptr;
    last_ = section;
    SectionTarget& target = targets_[static_cast<std::size_t>(section - sections_.data())];
    target.wanted = true;
    return &target;
  }

  static std::string text_of(std::span<const std::uint64_t> shape) {
    std::string text;
    for (const std::uint64_t extent : shape) text += joined({(text.empty() ? "[" : ", "), extent});
    return joined({text, "]"});
  }

  static bool raw_size_fits(const SectionInfo& section) noexcept {
    std::uint64_t count = 1;
    for (std::size_t d = 0; d < section.rank; ++d) {
      const auto product = checked_product(count, section.shape[d]);
      if (!product) return false;
      count = *product;
    }
    const auto equals = [&](std::optional<std::uint64_t> size) {
      return size && *size == section.raw_size;
    };
    switch (section.element_type) {
      case ElementType::u8:
        return equals(count);
      case ElementType::u32:
      case ElementType::f32:
        return equals(checked_product(count, 4));
      case ElementType::i64:
        return equals(checked_product(count, 8));
      case ElementType::i8: {
        const auto scales = checked_product(section.shape[0], 4);
        return scales && *scales <= section.raw_size && section.raw_size - *scales == count;
      }
      case ElementType::i4:
        return section.shape[1] >= FourBitRows::least_columns &&
               equals(checked_product(section.shape[0], FourBitRows::row_bytes(section.shape[1])));
      case ElementType::string:
        return true;
    }
    return false;
  }

  std::span<const SectionInfo> sections_;
  SectionOrder order_;
  const LoadLimits& limits_;
  std::vector<SectionTarget> targets_;
  const SectionInfo* last_ = nullptr;  // that was planned
  std::optional<Error> error_;
};

template <class Values>
std::span<const std::byte> bytes_of(const Values& values) noexcept {
  return std::as_bytes(std::span(values));
}

}  // namespace detail

namespace detail {

inline Result<void> check_options(const WriteOptions& options) {
  if (options.element_type != ElementType::i8 && options.element_type != ElementType::f32 &&
      options.element_type != ElementType::i4)
    return Error{Errc::invalid_argument, "WriteOptions::element_type is i4, i8 or f32"};
  if (options.zstd_level < 0 || options.zstd_level > 22)
    return Error{Errc::invalid_argument, "WriteOptions::zstd_level is outside [0, 22]"};
  if (!std::has_single_bit(options.chunk_bytes) || options.chunk_bytes < 1u << least_chunk_log2 ||
      options.chunk_bytes > most_chunk_bytes)
    return Error{Errc::invalid_argument,
                 "WriteOptions::chunk_bytes is not a power of two in [64, 2^24]"};
  return {};
}

inline Result<void> write_parts(const ModelParts& parts, const WriteOptions& options,
                                const LoadLimits& limits, ByteSink& sink) {
  if (auto checked = check_options(options); !checked) return checked;
  if (auto checked = check_parts(parts, limits, false); !checked) return checked;
  const auto chunk_log2 = static_cast<unsigned>(std::bit_width(options.chunk_bytes)) - 1;
  FileBuilder file{sink, model_file, options.zstd_level, chunk_log2};
  const auto add_matrix = [&](std::string_view tag, std::uint32_t index, const Matrix& matrix,
                              ElementType type) {
    if (type == ElementType::i4 && matrix.columns() < FourBitRows::least_columns)
      type = ElementType::i8;
    if (matrix.rows() <= 1 || (type == ElementType::f32 && matrix.type() == ElementType::i8))
      type = matrix.type();
    const std::uint64_t rows = matrix.rows(), columns = matrix.columns();
    switch (type) {
      case ElementType::i4:
        file.add(tag, index, type, {rows, columns}, rows * FourBitRows::row_bytes(columns),
                 [&matrix, chunk_log2](const FileBuilder::Append& append) {
                   FourBitWriter{matrix}.write(append, chunk_log2);
                 });
        break;
      case ElementType::i8:
        file.add(tag, index, type, {rows, columns}, rows * (sizeof(float) + columns),
                 [&matrix](const FileBuilder::Append& append) {
                   if (matrix.type() == ElementType::i8)
                     matrix.write(append);
                   else
                     matrix.quantised().write(append);
                 });
        break;
      default:
        file.add(tag, index, type, {rows, columns}, rows * columns * sizeof(float),
                 [&matrix](const FileBuilder::Append& append) { matrix.write(append); });
    }
  };
  const auto add_strings = [&](std::string_view tag, std::uint32_t index,
                               const StringTable& table) {
    file.add(tag, index, ElementType::string, {table.size()}, string_bytes(table),
             [&table](const FileBuilder::Append& append) { write_strings(table, append); });
  };
  const ElementType type = options.element_type;
  const Fingerprints fingerprints = fingerprints_of(parts);
  const std::array<std::uint64_t, 2> values{fingerprints.encoder, fingerprints.items};
  file.add("META", 0, ElementType::u8, {parts.metadata.size()}, text_bytes(parts.metadata));
  file.add("FGPR", 0, ElementType::i64, {values.size()}, bytes_of(values));
  add_strings("IIDS", 0, parts.item_ids);
  add_matrix("IVEC", 0, parts.item_vectors, type);
  if (!parts.input_vectors.empty()) add_matrix("IINP", 0, parts.input_vectors, type);
  file.add("BIAS", 0, ElementType::f32, {parts.biases.size()}, bytes_of(parts.biases));
  file.add("STAT", 0, ElementType::i64, {parts.statistics.size(), 4}, bytes_of(parts.statistics));
  if (!parts.event_types.empty()) {
    add_strings("EVTY", 0, parts.event_types);
    add_matrix("EVTE", 0, parts.event_type_embedding, type);
  }
  if (!parts.time_gap_embedding.empty()) add_matrix("GAPE", 0, parts.time_gap_embedding, type);
  StringTable names;
  Vector<std::byte> kinds;
  for (const MetadataField& field : parts.fields) {
    if (auto added = names.add(field.name); !added) return added.error();
    kinds.push_back(static_cast<std::byte>(field.numeric ? 1 : 0));
  }
  if (!parts.fields.empty()) {
    add_strings("FLDN", 0, names);
    file.add("FLDK", 0, ElementType::u8, {kinds.size()}, kinds);
  }
  for (std::uint32_t f = 0; f < parts.fields.size(); ++f) {
    const MetadataField& field = parts.fields[f];
    if (field.numeric)
      file.add("FBND", f, ElementType::f32, {field.boundaries.size()}, bytes_of(field.boundaries));
    else
      add_strings("FVOC", f, field.vocabulary);
    add_matrix("FEMB", f, field.embedding, type);
  }
  file.add("ENCO", 0, ElementType::u32, {parts.operations.size(), 2}, bytes_of(parts.operations));
  for (std::uint32_t k = 0; k < parts.weights.size(); ++k)
    add_matrix("ENCW", k, parts.weights[k], type);
  if (!parts.user_ids.empty()) {
    add_strings("USID", 0, parts.user_ids);
    add_matrix("USTA", 0, parts.user_states, type == ElementType::i4 ? ElementType::i8 : type);
  }
  return file.finish();
}

}  // namespace detail

namespace detail {

// What a file's sections become.
struct FileParts {
  ModelParts model;
  StringTable field_names;
  Vector<std::uint8_t> field_kinds;
  Vector<OpShape::Weight> weight_shapes;
  Vector<std::uint64_t> fingerprints;
};

// Items, event types and time gaps.
inline void plan_vectors(SectionPlan& plan, ModelParts& parts, const LoadLimits& limits) {
  plan.strings(parts.item_ids, "IIDS");
  const std::uint64_t items = plan.extent("IIDS", 0), d = plan.extent("IVEC", 1);
  if (items == 0 || d == 0) plan.fail({Errc::corrupt, "the model has no items or no dimensions"});
  const bool inputs = plan.find("IINP") != nullptr;
  const std::uint64_t e = inputs ? plan.extent("IINP", 1) : d;
  if (d > limits.dimension || e / 3 > limits.dimension)
    plan.fail({Errc::limit, "section IVEC or IINP: wider than LoadLimits::dimension"});
  plan.matrix(parts.item_vectors, "IVEC", 0, {items, d});
  if (inputs) plan.matrix(parts.input_vectors, "IINP", 0, {items, e});
  plan.values(parts.biases, "BIAS", 0, ElementType::f32, {items});
  plan.values(parts.statistics, "STAT", 0, ElementType::i64, {items, 4});
  if (plan.find("EVTY")) {
    plan.strings(parts.event_types, "EVTY");
    plan.matrix(parts.event_type_embedding, "EVTE", 0, {plan.extent("EVTY", 0), e});
  }
  const std::uint64_t gaps = plan.extent("GAPE", 0);
  if (gaps > max_time_gaps) plan.fail({Errc::limit, "section GAPE: has over 1024 rows"});
  if (plan.find("GAPE")) plan.matrix(parts.time_gap_embedding, "GAPE", 0, {gaps, e});
}

inline void plan_fields(SectionPlan& plan, FileParts& parts) {
  if (!plan.find("FLDN")) return;
  const std::uint64_t fields = plan.extent("FLDN", 0), d = plan.extent("IVEC", 1);
  plan.strings(parts.field_names, "FLDN");
  plan.values(parts.field_kinds, "FLDK", 0, ElementType::u8, {fields});
  if (fields > plan.section_count())
    plan.fail({Errc::corrupt, "section FLDN: more fields than sections"});
  if (plan.error()) return;
  parts.model.fields.resize(static_cast<std::size_t>(fields));
  for (std::uint32_t f = 0; f < fields; ++f) {
    MetadataField& field = parts.model.fields[f];
    field.numeric = plan.find("FBND", f) != nullptr;
    const char* const rows_of = field.numeric ? "FBND" : "FVOC";
    const std::uint64_t rows = plan.extent(rows_of, 0, f) + (field.numeric ? 1 : 0);
    if (field.numeric)
      plan.values(field.boundaries, "FBND", f, ElementType::f32, {rows - 1});
    else
      plan.strings(field.vocabulary, "FVOC", f);
    plan.matrix(field.embedding, "FEMB", f, {rows, d});
  }
}

// The encoder, whose program is checked against all shapes as soon as it is there, and users.
inline void plan_encoder(SectionPlan& plan, FileParts& parts, const LoadLimits& limits) {
  const std::uint64_t operations = plan.extent("ENCO", 0);
  if (operations > max_operations)
    plan.fail({Errc::corrupt, "encoder: has 1 to 256 operations and begins with embed_sum"});
  std::uint32_t weights = 0;
  while (plan.find("ENCW", weights)) ++weights;
  if (weights > operations * OpShape{}.weights.size())
    plan.fail({Errc::corrupt, "encoder: more weights than its operations use"});
  if (plan.error()) return;
  for (std::uint32_t k = 0; k < weights; ++k) {
    const std::uint64_t rows = plan.extent("ENCW", 0, k), columns = plan.extent("ENCW", 1, k);
    if (rows / 3 > limits.dimension || columns / 3 > limits.dimension)
      return plan.fail({Errc::limit, "section ENCW: wider than LoadLimits::dimension"});
    parts.weight_shapes.push_back(
        {static_cast<std::size_t>(rows), static_cast<std::size_t>(columns)});
  }
  const auto d = static_cast<std::size_t>(plan.extent("IVEC", 1));
  const auto e = plan.find("IINP") ? static_cast<std::size_t>(plan.extent("IINP", 1)) : d;
  const bool users = plan.find("USID") != nullptr;
  const std::uint64_t stored = plan.extent("USTA", 1);
  plan.values(parts.model.operations, "ENCO", 0, ElementType::u32, {operations, 2},
              [&parts, &limits, d, e, users, stored]() -> Result<void> {
                const auto program =
                    check_program(parts.model.operations, parts.weight_shapes, e, d, limits);
                if (!program) return program.error();
                if (users && stored != program->state + d)
                  return Error{Errc::corrupt,
                               joined({"users' states have ", stored,
                                       " values, the encoder's have ", program->state + d})};
                return {};
              });
  parts.model.weights.resize(weights);
  for (std::uint32_t k = 0; k < weights; ++k)
    plan.matrix(parts.model.weights[k], "ENCW", k,
                {parts.weight_shapes[k].rows, parts.weight_shapes[k].columns});
  if (!users) return;
  plan.strings(parts.model.user_ids, "USID");
  plan.matrix(parts.model.user_states, "USTA", 0, {plan.extent("USID", 0), stored});
}

inline Result<ModelParts> read_parts(ByteSource& source, const LoadOptions& options) {
  if (options.threads < 1 || options.threads > 64)
    return Error{Errc::invalid_argument, "LoadOptions::threads is outside [1, 64]"};
  const LoadLimits& limits = options.limits;
  const auto sections = read_table(source, model_file, limits);
  if (!sections) return sections.error();
  // Statistics and operations are read into place.
  static_assert(sizeof(ItemStatistics) == 4 * 8 && sizeof(EncoderOp) == 2 * 4);
  SectionPlan plan{*sections, limits};
  FileParts parts;
  if (plan.extent("META", 0) > max_metadata_bytes)
    plan.fail({Errc::limit, "section META: is over 16 MiB"});
  plan.values(parts.model.metadata, "META", 0, ElementType::u8, {plan.extent("META", 0)});
  if (plan.find("FGPR")) plan.values(parts.fingerprints, "FGPR", 0, ElementType::i64, {2});
  plan_vectors(plan, parts.model, limits);
  plan_fields(plan, parts);
  plan_encoder(plan, parts, limits);
  if (plan.error()) return *plan.error();

  if (auto read = SectionDecoder{source, *sections, plan.targets(), options}.run(); !read)
    return read.error();
  ModelParts& model = parts.model;
  for (const ItemStatistics& s : model.statistics)
    if (s.interactions > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      return Error{Errc::corrupt, "section STAT: a negative number of interactions"};
  for (std::size_t f = 0; f < model.fields.size(); ++f) {
    if (parts.field_kinds[f] > 1)
      return Error{Errc::unsupported, "section FLDK: unknown kind of field"};
    if (model.fields[f].numeric != (parts.field_kinds[f] == 1))
      return Error{Errc::corrupt, "section FLDK: a kind does not fit what its field has"};
    model.fields[f].name = parts.field_names[f];
  }
  if (!parts.fingerprints.empty())
    model.fingerprints = Fingerprints{parts.fingerprints[0], parts.fingerprints[1]};
  if (auto checked = check_parts(model, limits); !checked) return checked.error();
  return std::move(model);
}

}  // namespace detail

PERSONALIZE_API Result<Vector<std::byte>> write_model(const ModelParts& parts,
                                                      const WriteOptions& options,
                                                      const LoadLimits& limits) {
  return detail::catching_bad_alloc([&]() -> Result<Vector<std::byte>> {
    detail::MemorySink sink;
    if (auto written = detail::write_parts(parts, options, limits, sink); !written)
      return written.error();
    return std::move(sink.bytes);
  });
}

PERSONALIZE_API Result<void> save_model(const ModelParts& parts, const std::string& path,
                                        const WriteOptions& options, const LoadLimits& limits) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    detail::FileSink file{path};
    if (auto written = detail::write_parts(parts, options, limits, file); !written) return written;
    return file.commit();
  });
}

PERSONALIZE_API Result<ModelParts> read_model(std::span<const std::byte> file,
                                              const LoadOptions& options) {
  return detail::catching_bad_alloc([&]() -> Result<ModelParts> {
    detail::ByteSource source{file};
    return detail::read_parts(source, options);
  });
}

PERSONALIZE_API Result<ModelParts> read_model(const std::string& path, const LoadOptions& options) {
  return detail::catching_bad_alloc([&]() -> Result<ModelParts> {
    auto source = detail::ByteSource::open(path);
    if (!source) return source.error();
    auto parts = detail::read_parts(*source, options);
    if (parts || parts.error().code == Errc::out_of_memory || parts.error().code == Errc::io)
      return parts;
    Error error = parts.error();
    error.message = detail::joined({path, ": ", error.message});
    return error;
  });
}

PERSONALIZE_API Result<std::shared_ptr<const Model>> Model::load(const std::string& path,
                                                                 const LoadOptions& options) {
  return of(read_model(path, options));
}

PERSONALIZE_API Result<std::shared_ptr<const Model>> Model::from_bytes(
    std::span<const std::byte> file, const LoadOptions& options) {
  return of(read_model(file, options));
}

PERSONALIZE_API Result<std::shared_ptr<const Model>> Model::from_parts(ModelParts parts,
                                                                       const LoadLimits& limits) {
  return detail::catching_bad_alloc([&]() -> Result<std::shared_ptr<const Model>> {
    if (auto checked = detail::check_parts(parts, limits); !checked) return checked.error();
    return of(std::move(parts));
  });
}

PERSONALIZE_API Result<std::shared_ptr<const Model>> Model::of(Result<ModelParts> parts) {
  if (!parts) return parts.error();
  parts->fingerprints = fingerprints_of(*parts);
  return detail::catching_bad_alloc([&]() -> Result<std::shared_ptr<const Model>> {
    return std::shared_ptr<const Model>(new Model(std::move(*parts)));
  });
}

PERSONALIZE_API std::size_t Model::metadata_vector(
    std::span<const std::pair<std::string_view, std::string_view>> fields,
    std::span<float> out) const {
  std::fill(out.begin(), out.end(), 0.0f);
  std::size_t known = 0;
  const auto add = [&](const MetadataField& field, std::size_t row) {
    for (std::size_t c = 0; c < dimension(); ++c) out[c] += field.embedding.at(row, c);
    ++known;
  };
  for (const auto& [name, value] : fields) {
    for (const MetadataField& field : parts_.fields) {
      if (field.name != name) continue;
      if (field.numeric) {
        const auto number = detail::parse_float(value);
        if (!number) continue;
        const auto at = std::upper_bound(field.boundaries.begin(), field.boundaries.end(), *number);
        add(field, static_cast<std::size_t>(at - field.boundaries.begin()));
        continue;
      }
      for (std::size_t begin = 0; begin <= value.size();) {
        const std::size_t end = std::min(value.find('|', begin), value.size());
        if (const auto row = field.vocabulary.find(value.substr(begin, end - begin)))
          add(field, *row);
        begin = end + 1;
      }
    }
  }
  return known;
}

namespace detail {

// The names of a table behind those of a list, each once.
struct NamesInOrder {
  StringTable names;
  Vector<std::uint32_t> rows;     // their numbers in the table; Matrix::no_row where it lacks one
  Vector<std::uint32_t> lacking;  // numbers of those that it lacks, ascending
};

inline bool begins_with(const StringTable& table, std::span<const std::string_view> names) {
  if (names.size() > table.size()) return false;
  for (std::size_t i = 0; i < names.size(); ++i)
    if (table[i] != names[i]) return false;
  return true;
}

// Errors: over 2^31 names (limit); a name that stands twice or that no table takes.
inline Result<NamesInOrder> order_names(const StringTable& table,
                                        std::span<const std::string_view> first, Pace& pace) {
  constexpr std::uint64_t most = std::uint64_t{1} << 31;
  const Error too_many{Errc::limit, "a model in another order has over 2^31 names"};
  if (first.size() > most) return too_many;
  NamesInOrder order;
  order.rows.reserve(std::max(first.size(), table.size()));
  Vector<std::uint8_t> listed(table.size());
  const auto add = [&](std::string_view name, std::uint32_t row) -> Result<void> {
    const auto added = order.names.add(name);
    if (!added) return added.error();
    order.rows.push_back(row);
    return {};
  };
  for (std::uint32_t i = 0; i < first.size(); ++i) {
    pace.step(i);
    const std::optional<std::uint32_t> found = table.find(first[i]);
    if (auto added = add(first[i], found.value_or(Matrix::no_row)); !added) return added.error();
    if (found)
      listed[*found] = 1;
    else
      order.lacking.push_back(i);
  }
  if (table.size() + order.lacking.size() > most) return too_many;
  for (std::uint32_t row = 0; row < table.size(); ++row)
    if (listed[row] == 0)
      if (auto added = add(table[row], row); !added) return added.error();
  return order;
}

struct ModelInOrder {
  std::shared_ptr<const Model> model;
  Vector<std::uint32_t> lacking;  // numbers of the items that it did not have, ascending
};

// The model with its items and event types in the order of these, those that are not among them
// behind, in its own order. What it lacks gets rows of zeros, a bias of 0 and no statistics; all
// else is the model's, rows bit for bit. The same model where that is its order already. O(N d);
// takes memory for one more copy. Errors: over 2^31 names (limit); one that stands twice (corrupt)
// or is no id (invalid_argument); out of memory.
inline Result<ModelInOrder> in_order(const std::shared_ptr<const Model>& model,
                                     std::span<const std::string_view> items,
                                     std::span<const std::string_view> event_types,
                                     Pace* given_pace = nullptr) {
  Pace without_rests;
  Pace& pace = given_pace ? *given_pace : without_rests;
  const ModelParts& from = model->parts();
  if (begins_with(from.item_ids, items) && begins_with(from.event_types, event_types))
    return ModelInOrder{model, {}};
  return catching_bad_alloc([&]() -> Result<ModelInOrder> {
    auto of_items = order_names(from.item_ids, items, pace);
    if (!of_items) return of_items.error();
    auto of_types = order_names(from.event_types, event_types, pace);
    if (!of_types) return of_types.error();
    const Vector<std::uint32_t>& rows = of_items->rows;
    const bool inputs = !from.input_vectors.empty(), types = !from.event_types.empty();
    ModelParts parts{.metadata = from.metadata,
                     .item_ids = std::move(of_items->names),
                     .item_vectors = from.item_vectors.select(rows),
                     .input_vectors = inputs ? from.input_vectors.select(rows) : Matrix{},
                     .biases = {},
                     .statistics = {},
                     .event_types = std::move(of_types->names),
                     .event_type_embedding =
                         types ? from.event_type_embedding.select(of_types->rows)
                               : Matrix::zeros(of_types->rows.size(), from.inputs().columns()),
                     .time_gap_embedding = from.time_gap_embedding,
                     .fields = from.fields,
                     .operations = from.operations,
                     .weights = from.weights,
                     .user_ids = from.user_ids,
                     .user_states = from.user_states,
                     .fingerprints = from.fingerprints};
    for (const std::uint32_t row : rows) {
      const bool lacks = row == Matrix::no_row;
      parts.biases.push_back(lacks ? 0.0f : from.biases[row]);
      parts.statistics.push_back(lacks ? ItemStatistics{} : from.statistics[row]);
    }
    pace.step();
    constexpr LoadLimits whatever{.items = std::numeric_limits<std::uint32_t>::max(),
                                  .dimension = std::numeric_limits<std::uint32_t>::max()};
    auto ordered = Model::from_parts(std::move(parts), whatever);
    if (!ordered) return ordered.error();
    pace.step();
    return ModelInOrder{std::move(*ordered), std::move(of_items->lacking)};
  });
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 8: encoder. Owns the step from one event and the old user state to the new one. Uses rooms
// 1, 2, 3, 4, 5, 6 and 7.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

inline constexpr std::uint32_t no_event_type = std::numeric_limits<std::uint32_t>::max();

// One event as the encoder sees it: an item index, an event type's index (or no_event_type), and
// the bucket of time_gap_bucket.
struct EncoderInput {
  std::uint32_t item;  // below Model::item_count(), or, with `input`, not looked at
  std::uint32_t event_type = no_event_type;
  std::uint32_t time_gap = 0;
  // [e], the item's input vector where the item is none of the model's.
  std::span<const float> input = {};
};

// Immutable and shared between threads; each thread brings its own Workspace. A step costs O(1) in
// the length of the history. Weights that the file holds as int8 are multiplied as int8, with the
// input rounded to the instruction set's query_limit steps; f32 weights are multiplied in f32.
class Encoder {
 public:
  struct Workspace {
    Vector<float> values;
    Vector<std::int8_t> quantised;
  };

  // The model must outlive the encoder. gate_lookup: see looks_up_gates().
  explicit Encoder(const Model& model, const kernels::Table& table = kernels::chosen(),
                   bool gate_lookup = false)
      : parts_(&model.parts()), table_(&table) {
    std::size_t dimension = parts_->inputs().columns();
    width_ = kernels::padded(std::max(dimension, model.dimension()));
    const Matrix* weights = parts_->weights.data();
    for (const EncoderOp& op : parts_->operations) {
      // The model was checked: every operation is known, and has its weights.
      const bool more = weights != parts_->weights.data() + parts_->weights.size();
      const auto shape =
          shape_of(op, dimension,
                   more ? OpShape::Weight{weights->rows(), weights->columns()} : OpShape::Weight{});
      Step step{op,           shape->inputs,   shape->outputs,     {},
                shape->state, recurrent_size_, shape->weight_count};
      for (std::size_t l = 0; l < shape->layer_count; ++l)
        step.layers.push_back(make_layer(shape->layers[l], weights));
      weights += shape->weight_count;
      recurrent_size_ += kernels::padded(step.state);
      dimension = step.outputs;
      width_ = std::max(width_, kernels::padded(dimension));
      steps_.push_back(std::move(step));
    }
    can_overflow_ = can_overflow();
    if (gate_lookup) build_lookup();
  }

  // Whether the input half of the first GRU's gates is looked up and not multiplied. The products
  // of its weights with each item's input vector (and with event types and time gaps, which are
  // added) are then kept: 12 bytes x items x hidden dimension (padded to 16), for which the
  // constructor takes 3 x items x hidden x input dimension multiplications. The hidden state is the
  // same to rounding; int8 weights are multiplied with inputs that are not rounded to steps. Holds
  // where it was asked for and the program begins with embed_sum, then nothing, a layer norm or a
  // linear layer, then any saves, then a GRU with weights for its input: that is what `personalize
  // train` makes.
  bool looks_up_gates() const noexcept { return lookup_.has_value(); }

  // Floats of one user's state: the hidden states of all recurrent operations, then the query (see
  // query()).
  std::size_t state_size() const noexcept {
    return recurrent_size_ + kernels::padded(parts_->item_vectors.columns());
  }

  // That it holds beside the model.
  std::size_t bytes() const noexcept {
    const auto of = [](const Layer& layer) {
      return detail::allocated(layer.weights.capacity() * sizeof(float)) +
             detail::allocated(layer.panels.capacity()) +
             detail::allocated((layer.scales.capacity() + layer.bias.capacity()) * sizeof(float));
    };
    std::size_t sum = detail::allocated(sizeof *this) + detail::allocated(steps_);
    for (const Step& step : steps_)
      for (const Layer& layer : step.layers) sum += sizeof layer + of(layer);
    if (lookup_)
      for (const auto* rows : {&lookup_->items, &lookup_->event_types, &lookup_->gaps})
        sum += detail::allocated(rows->capacity() * sizeof(float));
    return sum;
  }

  // Writes the state that user `row` of the model's stored states comes with to `state`
  // ([state_size()]).
  void load(std::uint32_t row, std::span<float> state) const noexcept {
    std::fill(state.begin(), state.end(), 0.0f);
    std::size_t column = 0;
    const auto take = [&](std::size_t offset, std::size_t count) {
      for (std::size_t c = 0; c < count; ++c)
        state[offset + c] = parts_->user_states.at(row, column++);
    };
    for (const Step& step : steps_) take(step.state_offset, step.state);
    take(recurrent_size_, parts_->item_vectors.columns());
  }

  // What item vectors are multiplied with: [padded(d)], zero beyond d.
  std::span<const float> query(std::span<const float> state) const noexcept {
    return state.subspan(recurrent_size_);
  }

  // Of the widest vector that a workspace has room for.
  std::size_t width() const noexcept { return width_; }
  Workspace make_workspace() const {
    return {Vector<float>(width_ * areas), Vector<std::int8_t>(width_)};
  }

  // Advances `state` ([state_size()], zeros for a new user) by one event, and returns whether all
  // of the new state is finite: where not, weights and inputs were too large for a float, and the
  // state stays so. The item is one of the model's, and the state and workspace this encoder's
  // (asserted). Allocates nothing.
  bool step(const EncoderInput& input, std::span<float> state,
            Workspace& workspace) const noexcept {
    const bool own_input = !input.input.empty();
    assert(own_input ? input.input.size() == parts_->inputs().columns()
                     : input.item < parts_->inputs().rows());
    assert(state.size() == state_size());
    assert(workspace.values.size() >= width_ * areas && workspace.quantised.size() >= width_);
    const GateLookup* const lookup = lookup_ && !own_input ? &*lookup_ : nullptr;
    const auto area = [&](std::size_t a) { return workspace.values.data() + a * width_; };
    std::int8_t* q = workspace.quantised.data();
    float* x = area(0);
    float* y = area(1);
    float norm = 1;  // factor of the last layer norm
    for (std::size_t s = lookup ? lookup->first : 0; s < steps_.size(); ++s) {
      const Step& step = steps_[s];
      switch (step.op.kind) {
        case EncoderOp::Kind::embed_sum:
          embed(input, x);
          break;
        case EncoderOp::Kind::linear:
          multiply(step.layers[0], step.inputs, x, y, q);
          std::swap(x, y);
          break;
        case EncoderOp::Kind::gru: {
          float* hidden = state.data() + step.state_offset;
          const std::size_t stride = kernels::padded(step.outputs);
          if (lookup && s == lookup->gru)
            look_up(input, norm, area(2));
          else
            gate_inputs(step, x, area(2), q);
          multiply(step.layers[1], step.outputs, hidden, area(5), q);
          if (step.op.argument & GruForm::reset_before)
            reset_before(step, hidden, area(2), area(5), y, q);
          table_->gru_gates(step.outputs, stride, area(2), area(5), hidden);
          std::copy_n(hidden, stride, x);
          break;
        }
        case EncoderOp::Kind::lru: {
          float* hidden = state.data() + step.state_offset;
          const float* l = step.layers[0].weights.data();
          const std::size_t pairs = step.outputs / 2;
          multiply(step.layers[1], step.inputs, x, y, q);
          for (std::size_t j = 0; j < pairs; ++j) {
            const float real = hidden[j], imaginary = hidden[pairs + j];
            hidden[j] = l[j] * real - l[pairs + j] * imaginary + y[j];
            hidden[pairs + j] = l[j] * imaginary + l[pairs + j] * real + y[pairs + j];
          }
          std::copy_n(hidden, kernels::padded(step.outputs), x);
          break;
        }
        case EncoderOp::Kind::decay: {
          float* hidden = state.data() + step.state_offset;
          for (std::size_t j = 0; j < step.outputs; ++j) {
            hidden[j] = step.layers[0].weights[j] * hidden[j] + step.layers[0].bias[j] * x[j];
            x[j] = hidden[j];
          }
          break;
        }
        case EncoderOp::Kind::layer_norm:
          norm = table_->layer_norm(step.outputs, 1e-5f, step.layers[0].weights.data(),
                                    step.layers[0].bias.data(), x);
          break;
        case EncoderOp::Kind::activation:
          activate(step, x);
          break;
        case EncoderOp::Kind::save:
          std::copy_n(x, kernels::padded(step.outputs), area(8 + step.op.argument));
          break;
        case EncoderOp::Kind::add: {
          const float* saved = area(8 + step.op.argument);
          for (std::size_t j = 0; j < step.outputs; ++j) x[j] += saved[j];
          break;
        }
      }
    }
    const std::size_t d = parts_->item_vectors.columns();
    std::copy_n(x, d, state.data() + recurrent_size_);
    std::fill(state.begin() + static_cast<std::ptrdiff_t>(recurrent_size_ + d), state.end(), 0.0f);
    return !can_overflow_ || detail::all_finite(state);
  }

 private:
  struct Layer {
    std::size_t blocks = 0;
    detail::LineVector<float> weights = {};  // [blocks][inputs][lanes], as matrix_vector wants them
    detail::LineVector<std::uint8_t> panels = {};  // int8 weights, as matrix_vector_i8 wants them
    detail::LineVector<float> scales = {};         // [blocks * lanes], with panels
    detail::LineVector<float> bias = {};           // [blocks * lanes]
  };
  struct Step {
    EncoderOp op;
    std::size_t inputs, outputs;
    std::vector<Layer> layers;
    std::size_t state, state_offset;  // values in a user's state, and where they lie
    std::size_t weights;              // how many of the model's are its own
  };
  // Of a workspace: two vectors, the two halves of a GRU's gates, the slots.
  static constexpr std::size_t areas = 2 + 6 + detail::encoder_slots;

  // Of W x + b, the input half of a GRU's gates, where x is the sum of an item's, an event type's
  // and a time gap's row v: W (sum of v) + b. After a layer norm with weight g and bias c,
  //   factor * (sum of W diag(g) (v - mean v)) + (W c + b),
  // after a linear layer, sum of W L v + (W l + b).
  struct GateLookup {
    std::size_t first;                                   // step to begin with
    std::size_t gru;                                     // step that looks up
    detail::LineVector<float> items, event_types, gaps;  // [rows][3 * padded(hidden)]
    detail::LineVector<float> constant;                  // [3 * padded(hidden)]
  };

  // Whether values may grow beyond what floats can hold: bounds on them, operation by operation. Of
  // an LRU and a decay, whose states are sums over all events, nothing is known.
  bool can_overflow() const noexcept {
    using Kind = EncoderOp::Kind;
    constexpr double large = 1e15;  // its square is summed, too
    const ModelParts& p = *parts_;
    double x = static_cast<double>(p.inputs().magnitude()) +
               static_cast<double>(p.event_type_embedding.magnitude()) +
               static_cast<double>(p.time_gap_embedding.magnitude());
    // A GRU's state lies between the one before and 1.
    const double hidden = std::max(1.0, static_cast<double>(p.user_states.magnitude()));
    std::array<double, detail::encoder_slots> saved{};
    const Matrix* weights = p.weights.data();
    for (const Step& step : steps_) {
      double most = 0;
      for (std::size_t w = step.weights; w > 0; --w, ++weights)
        most = std::max(most, static_cast<double>(weights->magnitude()));
      const auto inputs = static_cast<double>(std::max(step.inputs, step.outputs));
      switch (step.op.kind) {
        case Kind::lru:
        case Kind::decay:
          return true;
        case Kind::linear:
          x = most * (x * inputs + 1);
          break;
        case Kind::gru:
          if (!(x + most * ((x + hidden) * inputs + 2) < large)) return true;
          x = hidden;
          break;
        case Kind::layer_norm:
          x = most * (std::sqrt(inputs) + 1);
          break;
        case Kind::save:
          saved[step.op.argument] = x;
          break;
        case Kind::add:
          x += saved[step.op.argument];
          break;
        case Kind::embed_sum:
        case Kind::activation:  // at most 1 or its input
          x = std::max(x, 1.0);
          break;
      }
      if (!(x < large)) return true;
    }
    return false;
  }

  void build_lookup() {
    using Kind = EncoderOp::Kind;
    const auto kind = [&](std::size_t s) {
      return s < steps_.size() ? steps_[s].op.kind : Kind::activation;
    };
    if (kind(0) != Kind::embed_sum) return;
    const bool layer_norm = kind(1) == Kind::layer_norm, linear = kind(1) == Kind::linear;
    const std::size_t between = layer_norm || linear ? 1 : 0;
    std::size_t gru = 1 + between;
    while (kind(gru) == Kind::save) ++gru;
    if (kind(gru) != Kind::gru || (steps_[gru].op.argument & GruForm::gate_input) != 0) return;
    const auto* w = parts_->weights.data();
    const Matrix& input_weights = w[2 * between];
    const Matrix& input_bias = w[2 * between + 2];
    const std::size_t gates = input_weights.rows(), inner = input_weights.columns();
    const std::size_t inputs = parts_->inputs().columns();
    Matrix product = Matrix::zeros(gates, inputs), constant = Matrix::zeros(1, gates);
    for (std::size_t g = 0; g < gates; ++g) {
      double sum = input_bias.at(0, g);
      for (std::size_t c = 0; between == 1 && c < inner; ++c)
        sum += static_cast<double>(input_weights.at(g, c)) * w[1].at(0, c);
      constant.f32()[g] = static_cast<float>(sum);
      for (std::size_t i = 0; i < inputs; ++i) {
        double value = 0;
        if (linear)
          for (std::size_t c = 0; c < inner; ++c)
            value += static_cast<double>(input_weights.at(g, c)) * w[0].at(c, i);
        else
          value = static_cast<double>(input_weights.at(g, i)) * (layer_norm ? w[0].at(0, i) : 1);
        product.f32()[g * inputs + i] = static_cast<float>(value);
      }
    }
    const Layer layer = pack(product, constant, 3);
    const bool needs_input = layer_norm || gru > 1 + between;
    lookup_.emplace(
        GateLookup{needs_input ? 0 : gru, gru, products(layer, parts_->inputs(), layer_norm),
                   products(layer, parts_->event_type_embedding, layer_norm),
                   products(layer, parts_->time_gap_embedding, layer_norm), layer.bias});
  }

  detail::LineVector<float> products(const Layer& layer, const Matrix& rows, bool centred) const {
    const std::size_t inputs = rows.columns(), size = layer.blocks * kernels::lanes;
    detail::LineVector<float> result;
    result.assign(detail::elements(rows.rows(), size), 0.0f);
    const Vector<float> zeros(size);
    Vector<float> row(kernels::padded(inputs) + kernels::lanes);
    for (std::size_t r = 0; r < rows.rows(); ++r) {
      rows.row(r, {row.data(), inputs});
      const double mean =
          std::accumulate(row.data(), row.data() + inputs, 0.0) / static_cast<double>(inputs);
      if (centred)
        for (std::size_t c = 0; c < inputs; ++c)
          row[c] = static_cast<float>(static_cast<double>(row[c]) - mean);
      table_->matrix_vector(layer.weights.data(), zeros.data(), inputs, layer.blocks, row.data(),
                            result.data() + r * size);
    }
    return result;
  }

  void look_up(const EncoderInput& input, float factor, float* gates) const noexcept {
    const std::size_t size = 3 * kernels::padded(steps_[lookup_->gru].outputs);
    std::array<const float*, 3> rows{lookup_->items.data() + input.item * size};
    std::size_t count = 1;
    if (input.event_type < parts_->event_type_embedding.rows())
      rows[count++] = lookup_->event_types.data() + input.event_type * size;
    if (input.time_gap < parts_->time_gap_embedding.rows())
      rows[count++] = lookup_->gaps.data() + input.time_gap * size;
    table_->scaled_sum(size, rows.data(), count, factor, lookup_->constant.data(), gates);
  }

  static Layer make_layer(const OpShape::Layer& layer, const Matrix* weights) {
    constexpr std::size_t none = OpShape::Layer::none;
    if (layer.gates != 0) return pack(weights[layer.weights], weights[layer.bias], layer.gates);
    Layer by_element;
    if (layer.weights != none) by_element.weights = pad(weights[layer.weights]);
    if (layer.bias != none) by_element.bias = pad(weights[layer.bias]);
    return by_element;
  }

  static detail::LineVector<float> pad(const Matrix& row) {
    detail::LineVector<float> values;
    values.assign(kernels::padded(row.columns()) + kernels::lanes, 0.0f);
    row.row(0, {values.data(), row.columns()});
    return values;
  }

  // The rows of `weights` come in `gates` groups; each group is padded on its own.
  static Layer pack(const Matrix& weights, const Matrix& bias, std::size_t gates) {
    static_assert(kernels::lanes == kernels::panel_rows);
    const std::size_t size = weights.rows() / gates, stride = kernels::padded(size);
    const std::size_t inputs = weights.columns();
    const bool int8 = weights.type() == ElementType::i8;
    Layer layer{.blocks = gates * stride / kernels::lanes};
    layer.bias.assign(gates * stride, 0.0f);
    if (int8) {
      layer.panels.assign(detail::elements(layer.blocks, kernels::panel_bytes<8>(inputs)), 128);
      layer.scales.assign(gates * stride, 0.0f);
    } else {
      layer.weights.assign(detail::elements(gates * stride, inputs), 0.0f);
    }
    for (std::size_t g = 0; g < gates; ++g)
      for (std::size_t j = 0; j < size; ++j) {
        const std::size_t out = g * stride + j, row = g * size + j;
        const std::size_t block = out / kernels::lanes, lane = out % kernels::lanes;
        layer.bias[out] = bias.at(0, row);
        if (int8) {
          layer.scales[out] = weights.scales()[row];
          kernels::put_in_panel<8>(layer.panels.data() + block * kernels::panel_bytes<8>(inputs),
                                   lane, weights.i8().data() + row * inputs, inputs);
        } else {
          for (std::size_t i = 0; i < inputs; ++i)
            layer.weights[(block * inputs + i) * kernels::lanes + lane] = weights.at(row, i);
        }
      }
    return layer;
  }

  // y = W x + b; of the blocks from `first` on. x: [padded(inputs)], zeroed behind inputs; q:
  // scratch.
  void multiply(const Layer& layer, std::size_t inputs, float* x, float* y, std::int8_t* q,
                std::size_t first = 0) const noexcept {
    const std::size_t blocks = layer.blocks - first, row = first * kernels::lanes;
    if (layer.panels.empty()) {
      table_->matrix_vector(layer.weights.data() + row * inputs, layer.bias.data() + row, inputs,
                            blocks, x, y);
      return;
    }
    // A kernel may have left anything behind the last value.
    std::fill(x + inputs, x + kernels::padded(inputs), 0.0f);
    std::int32_t sum = 0;
    const float scale = table_->quantise(inputs, x, table_->query_limit, q, sum);
    table_->matrix_vector_i8({layer.panels.data() + first * kernels::panel_bytes<8>(inputs),
                              layer.scales.data() + row, layer.bias.data() + row, inputs},
                             blocks, {q, -128 * sum, scale}, y);
  }

  void gate_inputs(const Step& step, float* x, float* gates, std::int8_t* q) const noexcept {
    const Layer& layer = step.layers[0];
    if ((step.op.argument & GruForm::gate_input) == 0) {
      multiply(layer, step.inputs, x, gates, q);
      return;
    }
    const std::size_t stride = kernels::padded(step.outputs);
    std::fill_n(gates, 3 * stride, 0.0f);
    for (std::size_t g = 0; g < 3; ++g)
      for (std::size_t j = 0; j < step.outputs; ++j)
        gates[g * stride + j] = x[g * step.outputs + j] + layer.bias[g * step.outputs + j];
  }

  // Adds W_hn (r h) + b_hn to the candidate's input and clears its recurrent half, so that
  // gru_gates has nothing left to reset. scratch: [padded(outputs)].
  void reset_before(const Step& step, const float* hidden, float* input, float* recurrent,
                    float* scratch, std::int8_t* q) const noexcept {
    const std::size_t size = step.outputs, stride = kernels::padded(size);
    const Layer& layer = step.layers[1];
    for (std::size_t j = 0; j < size; ++j) scratch[j] = input[j] + recurrent[j];
    table_->sigmoid(size, scratch);
    for (std::size_t j = 0; j < size; ++j) scratch[j] *= hidden[j];
    multiply(layer, size, scratch, recurrent + 2 * stride, q, 2 * stride / kernels::lanes);
    for (std::size_t j = 0; j < size; ++j) input[2 * stride + j] += recurrent[2 * stride + j];
    std::fill_n(recurrent + 2 * stride, stride, 0.0f);
  }

  void activate(const Step& step, float* x) const noexcept {
    switch (static_cast<Activation>(step.op.argument)) {
      case Activation::sigmoid:
        table_->sigmoid(step.outputs, x);
        break;
      case Activation::tanh:
        table_->tanh(step.outputs, x);
        break;
      case Activation::relu:
        table_->relu(step.outputs, x);
        break;
      case Activation::gelu:
        table_->gelu(step.outputs, x);
        break;
    }
  }

  void embed(const EncoderInput& input, float* x) const noexcept {
    const Matrix& inputs = parts_->inputs();
    if (input.input.empty())
      inputs.row(input.item, {x, inputs.columns()});
    else
      std::copy(input.input.begin(), input.input.end(), x);
    if (input.event_type < parts_->event_type_embedding.rows())
      parts_->event_type_embedding.add_row(input.event_type, {x, inputs.columns()});
    if (input.time_gap < parts_->time_gap_embedding.rows())
      parts_->time_gap_embedding.add_row(input.time_gap, {x, inputs.columns()});
  }

  const ModelParts* parts_;
  const kernels::Table* table_;
  std::vector<Step> steps_;
  std::optional<GateLookup> lookup_;
  std::size_t recurrent_size_ = 0;
  bool can_overflow_ = true;
  std::size_t width_ = 0;
};

// |h| of most queries: after a last layer norm it hardly depends on the user.
inline float usual_query_length(const Model& model) noexcept {
  const ModelParts& parts = model.parts();
  const std::size_t d = parts.item_vectors.columns();
  if (parts.operations.back().kind != EncoderOp::Kind::layer_norm)
    return std::sqrt(static_cast<float>(d));
  const Matrix& weight = parts.weights[parts.weights.size() - 2];
  const Matrix& bias = parts.weights.back();
  float squares = 0;
  for (std::size_t c = 0; c < d; ++c)
    squares += weight.at(0, c) * weight.at(0, c) + bias.at(0, c) * bias.at(0, c);
  return std::sqrt(squares);
}

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 9: filters and rows. Owns which items may be ranked, and their ids and vectors, as
// generations of a catalogue share them: row by row, and in panels for the scan. Uses rooms 1, 2,
// 3, 4, 5, 6 and 7.
// ============================================================================================

// One bit an item.
class ItemMask {
 public:
  explicit ItemMask(std::size_t items, bool value = false)
      : items_(items),
        count_(value ? items : 0),
        words_((items + 63) / 64, value ? ~std::uint64_t{0} : 0) {
    clear_behind();
  }

  std::size_t size() const noexcept { return items_; }
  // How many items are in it; O(1).
  std::size_t count() const noexcept { return count_; }
  // Items that are added are not in the mask. O(items).
  void resize(std::size_t items) {
    words_.resize((items + 63) / 64);
    items_ = items;
    clear_behind();
    count_ = 0;
    for (const std::uint64_t word : words_) count_ += static_cast<std::size_t>(std::popcount(word));
  }
  // False, and nothing changes, where item >= size().
  bool set(std::uint32_t item) noexcept {
    if (item >= items_) return false;
    count_ += !test(item);
    words_[item / 64] |= bit(item);
    return true;
  }
  bool reset(std::uint32_t item) noexcept {
    if (item >= items_) return false;
    count_ -= test(item);
    words_[item / 64] &= ~bit(item);
    return true;
  }
  // An item behind the last is not in the mask.
  bool test(std::uint32_t item) const noexcept {
    return item < items_ && (words_[item / 64] & bit(item)) != 0;
  }
  // Bits of items [64 w, 64 w + 64); 0 behind the last.
  std::uint64_t word(std::size_t w) const noexcept { return w < words_.size() ? words_[w] : 0; }

 private:
  static std::uint64_t bit(std::uint32_t item) noexcept { return std::uint64_t{1} << (item % 64); }
  void clear_behind() noexcept {
    if (items_ % 64 != 0) words_.back() &= (std::uint64_t{1} << (items_ % 64)) - 1;
  }

  std::size_t items_, count_;
  Vector<std::uint64_t> words_;
};

struct ScoredItem {
  std::uint32_t item;
  float score;
};

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Numbers found again by the hash of what they stand for: open addressing with linear probing, half
// of the hash kept beside each number. Not thread-safe. Inserting takes no memory: whoever inserts
// looks at full() first and, where it says so, replaces the table by grown().
class HashIndex {
 public:
  // equal(number): whether it is the one looked for.
  template <class Equal>
  std::optional<std::uint32_t> find(std::uint64_t hash, Equal equal) const noexcept {
    if (slots_.empty()) return std::nullopt;
    for (std::size_t s = home(tag_of(hash)); slots_[s] != 0; s = next(s))
      if (slots_[s] >> 32 == tag_of(hash) && equal(number_in(slots_[s])))
        return number_in(slots_[s]);
    return std::nullopt;
  }

  bool full() const noexcept { return (size_ + 1) * 4 > slots_.size() * 3; }
  std::size_t capacity() const noexcept { return slots_.size(); }
  // An empty table. slots: a power of two, or what is rounded up to one.
  static HashIndex of_capacity(std::size_t slots) {
    HashIndex table;
    table.slots_.resize(std::bit_ceil(std::max<std::size_t>(16, slots)));
    return table;
  }
  HashIndex grown() const {
    HashIndex table = of_capacity(2 * slots_.size());
    table.take(*this);
    return table;
  }
  // What other holds, and nothing else; this one has room for it.
  void take(const HashIndex& other) noexcept {
    std::fill(slots_.begin(), slots_.end(), 0);
    size_ = other.size_;
    for (const std::uint64_t slot : other.slots_)
      if (slot != 0) slots_[free_from(home(slot >> 32))] = slot;
  }

  // Not there yet, and the table not full().
  void insert(std::uint64_t hash, std::uint32_t number) noexcept {
    slots_[free_from(home(tag_of(hash)))] = tag_of(hash) << 32 | (std::uint64_t{number} + 1);
    ++size_;
  }

  void erase(std::uint64_t hash, std::uint32_t number) noexcept {
    if (slots_.empty()) return;
    const std::uint64_t slot = tag_of(hash) << 32 | (std::uint64_t{number} + 1);
    std::size_t hole = home(tag_of(hash));
    while (slots_[hole] != slot) {
      if (slots_[hole] == 0) return;
      hole = next(hole);
    }
    // What was pushed behind the hole moves up (linear probing: Knuth, 6.4, algorithm R).
    for (std::size_t s = next(hole); slots_[s] != 0; s = next(s)) {
      const std::size_t mask = slots_.size() - 1;
      if (((s - home(slots_[s] >> 32)) & mask) < ((s - hole) & mask)) continue;
      slots_[hole] = slots_[s];
      hole = s;
    }
    slots_[hole] = 0;
    --size_;
  }

  std::size_t size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return allocated(slots_); }

 private:
  static std::uint64_t tag_of(std::uint64_t hash) noexcept { return hash >> 32; }
  static std::uint32_t number_in(std::uint64_t slot) noexcept {
    return static_cast<std::uint32_t>(slot) - 1;
  }
  std::size_t home(std::uint64_t tag) const noexcept {
    return static_cast<std::size_t>(tag) & (slots_.size() - 1);
  }
  std::size_t next(std::size_t s) const noexcept { return (s + 1) & (slots_.size() - 1); }
  std::size_t free_from(std::size_t s) const noexcept {
    while (slots_[s] != 0) s = next(s);
    return s;
  }

  Vector<std::uint64_t> slots_;  // the hash's upper half, then the number + 1; 0: free
  std::size_t size_ = 0;
};

}  // namespace detail

// An array whose copies share their pages: a copy costs O(pages), a changed element one page.
// Copies may be read by any number of threads; one that is being changed belongs to one thread. The
// pages of an array made over a `base` lie in it.
template <class T>
class PagedArray {
 public:
  static constexpr std::size_t page_size = 1024;  // elements

  PagedArray() = default;
  // base: kept alive by owner.
  PagedArray(const std::shared_ptr<const void>& owner, std::span<const T> base) : base_(base) {
    size_ = base.size();
    pages_.reserve(page_count(size_));
    for (std::size_t begin = 0; begin < size_; begin += page_size)
      pages_.push_back(std::shared_ptr<const void>(owner, base.data() + begin));
    owned_.resize(pages_.size());
  }
  PagedArray(const PagedArray& other)
      : size_(other.size_), base_(other.base_), pages_(other.pages_) {
    owned_.resize(pages_.size());
  }
  PagedArray(PagedArray&&) noexcept = default;
  PagedArray& operator=(PagedArray other) noexcept {
    size_ = other.size_;
    base_ = other.base_;
    pages_.swap(other.pages_);
    owned_.swap(other.owned_);
    return *this;
  }

  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  const T& operator[](std::size_t i) const noexcept {
    return page_at(i / page_size)[i % page_size];
  }
  // The elements of page p that there are.
  std::span<const T> page(std::size_t p) const noexcept {
    return {page_at(p), std::min(page_size, size_ - p * page_size)};
  }
  std::size_t pages() const noexcept { return pages_.size(); }

  // To change element i: copies its page where that is shared. References stay valid until the
  // array is copied.
  T& edit(std::size_t i) { return own(i / page_size)[i % page_size]; }

  void push_back(const T& value) {
    if (size_ % page_size == 0) {
      if (pages_.size() == pages_.capacity()) pages_.reserve(2 * pages_.size() + 1);
      owned_.reserve(pages_.capacity());
      pages_.push_back(make_page());
      owned_.push_back(true);
    }
    own(size_ / page_size)[size_ % page_size] = value;
    ++size_;
  }

  // Of all that does not lie in the base; pages that copies share count for each. O(pages).
  std::size_t bytes() const noexcept {
    constexpr std::size_t counts = 24;  // of a pointer that is shared
    std::size_t made = 0;
    for (std::size_t p = 0; p < pages_.size(); ++p)
      made += p * page_size >= base_.size() || page_at(p) != base_.data() + p * page_size;
    return detail::allocated(pages_) +
           made * (detail::allocated(page_size * sizeof(T)) + detail::allocated(counts));
  }

 private:
  struct Delete {
    void operator()(const T* page) const noexcept { delete[] page; }
  };
  static std::shared_ptr<const void> make_page() {
    std::unique_ptr<T[], Delete> page(new T[page_size]());
    return std::shared_ptr<const void>(std::move(page));
  }
  const T* page_at(std::size_t p) const noexcept { return static_cast<const T*>(pages_[p].get()); }
  static std::size_t page_count(std::size_t size) noexcept {
    return (size + page_size - 1) / page_size;
  }
  T* own(std::size_t p) {
    assert(!owned_[p] || pages_[p].use_count() == 1);
    if (owned_[p]) return const_cast<T*>(page_at(p));  // made by this array, and not const
    std::shared_ptr<const void> copy = make_page();
    T* const made = const_cast<T*>(static_cast<const T*>(copy.get()));
    const auto from = page(p);
    std::copy(from.begin(), from.end(), made);
    pages_[p] = std::move(copy);
    owned_[p] = true;
    return made;
  }

  std::size_t size_ = 0;
  std::span<const T> base_;
  Vector<std::shared_ptr<const void>> pages_;
  Vector<std::uint8_t> owned_;  // pages that no other array has seen
};

// The order of a ranking: by score, ties by item index.
inline bool ranks_before(const ScoredItem& a, const ScoredItem& b) noexcept {
  return a.score > b.score || (a.score == b.score && a.item < b.item);
}

// Which items may be ranked: all, less those missing from `eligible`, less those in `excluded` and
// in `excluded_items`. Masks may be shorter than the catalogue: behind its end an item is missing
// from `eligible`, and not in `excluded`.
struct Eligibility {
  const ItemMask* eligible = nullptr;
  const ItemMask* excluded = nullptr;
  // How many are in `excluded` at most, where that is known. With a few a scan asks only of what is
  // left at its end whether they are among it.
  std::size_t excluded_count = unknown;
  // Ascending. For a few: no mask has to be made, and only candidates are looked up, each in
  // O(log n).
  std::span<const std::uint32_t> excluded_items = {};
  static constexpr std::size_t unknown = ~std::size_t{0};

  // Bits of items [64 w, 64 w + 64), as ItemMask::word.
  std::uint64_t word(std::size_t w) const noexcept {
    std::uint64_t bits =
        (eligible ? eligible->word(w) : ~std::uint64_t{0}) & ~(excluded ? excluded->word(w) : 0);
    auto item = std::lower_bound(excluded_items.begin(), excluded_items.end(),
                                 static_cast<std::uint32_t>(w * 64), detail::Less{});
    for (; item != excluded_items.end() && *item / 64 == w; ++item)
      bits &= ~(std::uint64_t{1} << (*item % 64));
    return bits;
  }
  bool test(std::uint32_t item) const noexcept {
    return !(eligible && !eligible->test(item)) && !(excluded && excluded->test(item)) &&
           (excluded_items.empty() ||
            !std::binary_search(excluded_items.begin(), excluded_items.end(), item,
                                detail::Less{}));
  }
  bool all() const noexcept { return !eligible && !excluded && excluded_items.empty(); }
  // How many are excluded at most.
  std::size_t most_excluded() const noexcept {
    const std::size_t of_mask = excluded ? excluded_count : 0;
    return of_mask > unknown - excluded_items.size() ? unknown : of_mask + excluded_items.size();
  }
};

// Vectors of items, [rows, columns], f32 or int8 with a scale a row. Copies share the pages of
// page_rows rows that neither of them has changed since: a copy costs O(pages), a changed
// row one page. Copies may be read by any number of threads; one that is being changed belongs to
// one thread.
class ItemRows {
 public:
  static constexpr std::size_t page_rows = 256;

  ItemRows() = default;
  // No copy: the pages lie in base.
  explicit ItemRows(std::shared_ptr<const Matrix> base)
      : rows_(base->rows()), columns_(base->columns()), type_(base->type()) {
    made_.resize((rows_ + page_rows - 1) / page_rows);
    own_.resize(made_.size());
    elsewhere_.resize((made_.size() + 63) / 64);
    base_ = std::move(base);
    base_i8_ = base_->i8().data();
    base_f32_ = base_->f32().data();
  }
  ItemRows(const ItemRows& other)
      : rows_(other.rows_),
        columns_(other.columns_),
        type_(other.type_),
        base_(other.base_),
        base_i8_(other.base_i8_),
        base_f32_(other.base_f32_),
        made_(other.made_),
        elsewhere_(other.elsewhere_),
        own_(other.own_.size()) {
    other.shared_.store(true, detail::memory_order_relaxed);
  }
  ItemRows(ItemRows&& other) noexcept { swap(other); }
  ItemRows& operator=(ItemRows other) noexcept {
    swap(other);
    return *this;
  }
  ~ItemRows() = default;

  std::size_t rows() const noexcept { return rows_; }
  std::size_t columns() const noexcept { return columns_; }
  ElementType type() const noexcept { return type_; }
  bool empty() const noexcept { return rows_ == 0; }

  // [columns] values of row r; of the type that type() says.
  const std::int8_t* i8(std::size_t r) const noexcept {
    return elsewhere(r) ? page(r).i8().data() + r % page_rows * columns_ : base_i8_ + r * columns_;
  }
  const float* f32(std::size_t r) const noexcept {
    return elsewhere(r) ? page(r).f32().data() + r % page_rows * columns_
                        : base_f32_ + r * columns_;
  }
  // 1 where rows are f32.
  float scale(std::size_t r) const noexcept {
    if (type_ == ElementType::f32) return 1.0f;
    return elsewhere(r) ? page(r).scales()[r % page_rows] : base_->scales()[r];
  }
  float at(std::size_t r, std::size_t c) const noexcept {
    return type_ == ElementType::i8 ? scale(r) * static_cast<float>(i8(r)[c]) : f32(r)[c];
  }
  // Row r, dequantised, to out[0, columns).
  void row(std::size_t r, std::span<float> out) const noexcept {
    if (type_ == ElementType::f32) {
      std::copy_n(f32(r), columns_, out.data());
      return;
    }
    const std::int8_t* const values = i8(r);
    const float step = scale(r);
    for (std::size_t c = 0; c < columns_; ++c) out[c] = step * static_cast<float>(values[c]);
  }
  // Row r as it is stored, without its scale.
  std::span<const std::byte> stored(std::size_t r) const noexcept {
    return type_ == ElementType::i8 ? std::as_bytes(std::span(i8(r), columns_))
                                    : std::as_bytes(std::span(f32(r), columns_));
  }

  // values: [columns]; quantised as Matrix::set_row does. Copies the page that the row lies in, if
  // this object has not done so since it was last copied: pointers to its rows end there.
  void set_row(std::size_t r, std::span<const float> values) {
    assert(r < rows_ && values.size() == columns_);
    own_page(r / page_rows).set_row(r % page_rows, values);
  }
  // Row r as stored() and scale() gave it; false where it holds what no row can.
  bool set_stored(std::size_t r, std::span<const std::byte> values, float scale) {
    assert(r < rows_ && values.size() == stored(r).size());
    Matrix& page = own_page(r / page_rows);
    const std::size_t at = r % page_rows * columns_;
    if (type_ == ElementType::i8) {
      std::memcpy(page.i8().data() + at, values.data(), values.size());
      page.scales()[r % page_rows] = scale;
      return scale >= 0 && scale <= max_magnitude;
    }
    float* const row = page.f32().data() + at;
    std::memcpy(row, values.data(), values.size());
    return detail::largest({row, columns_}) <= max_magnitude;
  }
  // Rows that lie in pages of their own, to visit(r).
  template <class Visit>
  void for_each_moved(Visit visit) const {
    for (std::size_t p = 0; p < made_.size(); ++p)
      for (std::size_t r = p * page_rows; made_[p] && r < std::min((p + 1) * page_rows, rows_); ++r)
        visit(r);
  }
  void push_back(std::span<const float> values) {
    assert(values.size() == columns_);
    if (rows_ % page_rows == 0) {
      disown_shared();
      auto page = std::make_shared<Matrix>(Matrix::zeros(page_rows, columns_, type_));
      const std::size_t pages = made_.size() + 1;
      elsewhere_.resize((pages + 63) / 64);
      own_.reserve(pages);
      made_.push_back(std::move(page));
      own_.push_back(true);
      move_out(pages - 1);
    }
    own_page(rows_ / page_rows).set_row(rows_ % page_rows, values);
    ++rows_;
  }

  // Of all that does not lie in the base; without the pages that `counted` has as well. O(pages).
  std::size_t bytes(const ItemRows* counted = nullptr) const noexcept {
    const std::size_t values = page_rows * columns_;
    const std::size_t page =
        detail::allocated(sizeof(Matrix) + 16) +
        (type_ == ElementType::i8
             ? detail::allocated(values) + detail::allocated(page_rows * sizeof(float))
             : detail::allocated(values * sizeof(float)));
    std::size_t made = 0;
    for (std::size_t p = 0; p < made_.size(); ++p)
      made += made_[p] && !(counted && p < counted->made_.size() && counted->made_[p] == made_[p]);
    return detail::allocated(made_) + detail::allocated(elsewhere_) + made * page;
  }

 private:
  // Most rows lie in base_, and are found there without a look at the pages.
  bool elsewhere(std::size_t r) const noexcept {
    const std::size_t p = r / page_rows;
    return (elsewhere_[p / 64] >> (p % 64) & 1) != 0;
  }
  const Matrix& page(std::size_t r) const noexcept { return *made_[r / page_rows]; }
  void move_out(std::size_t p) noexcept { elsewhere_[p / 64] |= std::uint64_t{1} << (p % 64); }

  void swap(ItemRows& other) noexcept {
    std::swap(rows_, other.rows_);
    std::swap(columns_, other.columns_);
    std::swap(type_, other.type_);
    base_.swap(other.base_);
    std::swap(base_i8_, other.base_i8_);
    std::swap(base_f32_, other.base_f32_);
    made_.swap(other.made_);
    elsewhere_.swap(other.elsewhere_);
    own_.swap(other.own_);
    const bool shared = shared_.load();
    shared_.store(other.shared_.load());
    other.shared_.store(shared);
  }
  // Who copied this object reads the pages that were there.
  void disown_shared() noexcept {
    if (!shared_.load(detail::memory_order_relaxed)) return;
    std::fill(own_.begin(), own_.end(), false);
    shared_.store(false, detail::memory_order_relaxed);
  }
  Matrix& own_page(std::size_t p) {
    disown_shared();
    if (!own_[p]) {
      auto page = std::make_shared<Matrix>(Matrix::zeros(page_rows, columns_, type_));
      const std::size_t first = p * page_rows, count = std::min(page_rows, rows_ - first);
      if (type_ == ElementType::i8) {
        std::copy_n(i8(first), count * columns_, page->i8().data());
        for (std::size_t r = 0; r < count; ++r) page->scales()[r] = scale(first + r);
      } else {
        std::copy_n(f32(first), count * columns_, page->f32().data());
      }
      made_[p] = std::move(page);
      own_[p] = true;
      move_out(p);
    }
    return const_cast<Matrix&>(*made_[p]);  // made by this object, and not const
  }

  std::size_t rows_ = 0, columns_ = 0;
  ElementType type_ = ElementType::f32;
  std::shared_ptr<const Matrix> base_;
  const std::int8_t* base_i8_ = nullptr;
  const float* base_f32_ = nullptr;
  std::vector<std::shared_ptr<const Matrix>> made_;  // of [page_rows, columns]; null: in base_
  Vector<std::uint64_t> elsewhere_;                  // a bit a page: made_ has it
  Vector<std::uint8_t> own_;  // pages that no other object has seen, unless shared_
  mutable detail::atomic<bool> shared_{false};
};

namespace detail {

// Of a chunk's rows, or of all rows from a chunk on.
struct RowBounds {
  float norm = 0;      // largest |v|
  float residual = 0;  // largest |r|
  float least_residual = std::numeric_limits<float>::infinity();
  float bias = -std::numeric_limits<float>::infinity();  // largest

  void add(const RowBounds& other) noexcept {
    norm = std::max(norm, other.norm);
    residual = std::max(residual, other.residual);
    least_residual = std::min(least_residual, other.least_residual);
    bias = std::max(bias, other.bias);
  }
};

// What a score takes besides the row's values, together: of one line from memory, not of three.
struct Place {
  std::uint32_t item;
  float scale, bias;  // scale 1 where rows are f32
};

// bfloat16: the upper half of a float.
inline float wide(std::uint16_t v) noexcept { return bit_cast<float>(std::uint32_t{v} << 16); }
inline std::uint16_t bfloat16(float v) noexcept {
  return static_cast<std::uint16_t>(bit_cast<std::uint32_t>(v) >> 16);
}
// No lower than v, which is no NaN.
inline std::uint16_t bfloat16_above(float v) noexcept {
  const std::uint16_t below = bfloat16(v);
  return static_cast<std::uint16_t>(wide(below) < v ? below + 1 : below);
}

// Bits that compare as the floats do; -0 is 0. Not for a NaN.
inline std::uint32_t ordered_bits(float v) noexcept {
  const auto bits = bit_cast<std::uint32_t>(v + 0.0f);
  return bits ^ (bits >> 31 ? ~std::uint32_t{0} : std::uint32_t{1} << 31);
}

// Ascending by the upper halves; what is alike there keeps its order. Three passes of a radix sort.
inline void sort_by_upper_half(Vector<std::uint64_t>& keys) {
  constexpr int bits = 11, passes = 3;
  constexpr std::size_t buckets = std::size_t{1} << bits;
  Vector<std::uint32_t> starts(passes * buckets);
  const auto digit = [](std::uint64_t key, int pass) {
    return static_cast<std::size_t>(key >> (32 + bits * pass)) & (buckets - 1);
  };
  for (const std::uint64_t key : keys)
    for (int pass = 0; pass < passes; ++pass)
      ++starts[static_cast<std::size_t>(pass) * buckets + digit(key, pass)];
  Vector<std::uint64_t> other(keys.size());
  for (int pass = 0; pass < passes; ++pass) {
    std::uint32_t* const start = starts.data() + static_cast<std::size_t>(pass) * buckets;
    std::exclusive_scan(start, start + buckets, start, 0u);
    for (const std::uint64_t key : keys) other[start[digit(key, pass)]++] = key;
    keys.swap(other);
  }
}

// f(sixteen) for each sixteen of row[0, count), the last filled up with zeros. Loops of a known
// length over them are what compilers make vectors of.
template <class Element, class Function>
void for_sixteens(const Element* row, std::size_t count, Function f) {
  constexpr std::size_t together = 16;
  std::size_t c = 0;
  for (; c + together <= count; c += together) f(row + c);
  if (c == count) return;
  std::array<Element, together> last{};
  std::copy(row + c, row + count, last.begin());
  f(last.data());
}

// |v| of a row, from above; not finite where one of its values is not.
inline double norm_above(const std::int8_t* row, float scale, std::size_t columns) noexcept {
  std::array<std::int32_t, 16> sums{};
  std::int64_t squares = 0;
  std::size_t blocks = 0;
  const auto flush = [&] {
    squares = std::accumulate(sums.begin(), sums.end(), squares);
    sums.fill(0);
  };
  for_sixteens(row, columns, [&](const std::int8_t* v) {
    for (std::size_t l = 0; l < 16; ++l) sums[l] += v[l] * v[l];
    if (++blocks % (1 << 16) == 0) flush();  // the sums fit 32 bits
  });
  flush();
  return static_cast<double>(scale) * std::sqrt(static_cast<double>(squares)) * (1 + 1e-6);
}
inline double norm_above(const float* row, float scale, std::size_t columns) noexcept {
  std::array<double, 16> sums{};
  for_sixteens(row, columns, [&](const float* v) {
    for (std::size_t l = 0; l < 16; ++l)
      sums[l] += static_cast<double>(v[l]) * static_cast<double>(v[l]);
  });
  return static_cast<double>(scale) * std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0)) *
         (1 + 1e-6);
}

// The rows of some items in panels, by the largest score that they could have with a query of the
// usual length; any order is correct, this one ends a scan soonest. Immutable.
struct Panels {
  static constexpr std::size_t chunk_panels = 16;
  static constexpr std::size_t chunk_rows = chunk_panels * kernels::panel_rows;

  // An item that is to stand in panels. Its bias and |v| are finite.
  struct Source {
    Place place;
    float norm;
    std::uint16_t short_scale;  // of 4 bits, where it is known; 0: not
  };

  // sources: ascending by item. usual_length: of queries. O(n d).
  Panels(const ItemRows& rows, std::span<const Source> sources, int width, float usual_length,
         Pace& pace)
      : bits(width),
        columns(rows.columns()),
        bytes_a_panel(bits == 8 ? kernels::panel_bytes<8>(columns)
                                : kernels::panel_bytes<4>(columns)) {
    const std::size_t count = sources.size(), padded = kernels::padded(count);
    Vector<std::uint64_t> keys(count);
    for (std::size_t i = 0; i < count; ++i) {
      const float reach = usual_length * sources[i].norm + sources[i].place.bias;
      keys[i] = std::uint64_t{~ordered_bits(reach)} << 32 | i;
    }
    sort_by_upper_half(keys);
    order.resize(padded);
    by_item.resize(count);
    bytes.resize(padded / kernels::panel_rows * bytes_a_panel);
    constexpr float never = std::numeric_limits<float>::quiet_NaN();
    if (bits == 8) {
      scales.resize(padded);
      biases.resize(padded, never);
    } else {
      short_scales.resize(padded);
      raised_biases.resize(padded, bfloat16(never));
    }
    chunks.resize((padded + chunk_rows - 1) / chunk_rows);
    Vector<std::int8_t> values(kernels::padded(columns));
    const auto source_at = [&](std::size_t p) -> const Source& {
      return sources[static_cast<std::uint32_t>(keys[p])];
    };
    constexpr std::size_t ahead = 12;  // sources, and rows behind them, come from memory meanwhile
    for (std::size_t p = 0; p < count; ++p) {
      pace.step(p);
      if (p + 2 * ahead < count) __builtin_prefetch(&source_at(p + 2 * ahead));
      if (p + ahead < count) {
        const auto next = rows.stored(source_at(p + ahead).place.item);
        for (std::size_t at = 0; at < next.size(); at += 64) __builtin_prefetch(&next[at]);
      }
      const Source& source = source_at(p);
      order[p] = source.place;
      by_item[static_cast<std::uint32_t>(keys[p])] = static_cast<std::uint32_t>(p);
      const float residual =
          rows.type() == ElementType::i8
              ? put(p, rows.i8(source.place.item), source, values, usual_length)
              : put(p, rows.f32(source.place.item), source, values, usual_length);
      chunks[p / chunk_rows].add({source.norm, residual, residual, source.place.bias});
      largest_bias = std::max(largest_bias, std::abs(source.place.bias));
    }
    from = chunks;
    for (std::size_t c = from.size(); c-- > 1;) from[c - 1].add(from[c]);
  }

  // The item's position; nowhere, where it has none.
  static constexpr std::size_t nowhere = ~std::size_t{0};
  std::size_t find(std::uint32_t item) const noexcept {
    // As many items are missing below it at most as are missing at all.
    const std::size_t count = by_item.size();
    if (count == 0) return nowhere;
    const std::size_t missing = std::size_t{order[by_item.back()].item} + 1 - count;
    const auto at = [&](std::size_t i) {
      return by_item.begin() + static_cast<std::ptrdiff_t>(std::min(i, count));
    };
    const auto found =
        std::lower_bound(at(item - std::min<std::size_t>(item, missing)), at(std::size_t{item} + 1),
                         item, [&](std::uint32_t position, std::uint32_t wanted) {
                           return order[position].item < wanted;
                         });
    return found != by_item.end() && order[*found].item == item ? *found : nowhere;
  }

  std::size_t memory() const noexcept {
    return order.size() * sizeof(Place) + bytes.size() + 4 * (scales.size() + biases.size()) +
           2 * (short_scales.size() + raised_biases.size()) + 4 * by_item.size() +
           (chunks.size() + from.size()) * sizeof(RowBounds);
  }

  int bits;
  std::size_t columns, bytes_a_panel;
  LineVector<Place> order;           // by position, padded to whole panels
  Vector<std::uint32_t> by_item;     // positions, ascending by their items
  LineVector<std::uint8_t> bytes;    // see kernels::PanelRows
  LineVector<float> scales, biases;  // of 8 bits
  // Of 4 bits. Biases are raised by usual_length |r|: what a query of the usual length needs for a
  // margin, each row its own.
  LineVector<std::uint16_t> short_scales, raised_biases;
  Vector<RowBounds> chunks, from;  // of each chunk of chunk_rows positions; and all later ones
  float largest_bias = 0;

 private:
  // A scale without an inverse in f32 stands for 0.
  static float inverse_of(float scale) noexcept { return scale > 1e-37f ? 1.0f / scale : 0.0f; }

  // v^ = row / scale to nearest, in [-most, most], to values; returns |row - scale v^|. In units of
  // the scale, whose squares neither overflow nor vanish. The row is its elements times row_scale.
  template <class Element>
  static float quantise(const Element* row, std::size_t columns, float row_scale, float scale,
                        float most, std::int8_t* values) noexcept {
    const float factor = row_scale * inverse_of(scale);
    std::array<float, 16> sums{};
    for_sixteens(row, columns, [&](const Element* some) {
      for (std::size_t l = 0; l < 16; ++l) {
        const float v = static_cast<float>(some[l]) * factor, low = v < most ? v : most;
        // Adding 1.5 * 2^23 leaves no bits for the fraction.
        const float integer = ((low > -most ? low : -most) + 12582912.0f) - 12582912.0f;
        const float e = v - integer;
        sums[l] += e * e;
        values[l] = static_cast<std::int8_t>(integer);
      }
      values += 16;
    });
    return scale * std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0f));
  }

  template <class Element>
  static float largest_of(const Element* row, std::size_t columns, float row_scale) noexcept {
    std::array<float, 16> most{};
    for_sixteens(row, columns, [&](const Element* some) {
      for (std::size_t l = 0; l < 16; ++l) {
        const float v = std::abs(static_cast<float>(some[l]));
        most[l] = v > most[l] ? v : most[l];
      }
    });
    return row_scale * *std::max_element(most.begin(), most.end());
  }

  // The scale that leaves least of a row in 4 bits, as bfloat16. It pays to cut off the largest.
  template <class Element>
  static std::uint16_t best_scale(const Element* row, std::size_t columns, float row_scale,
                                  std::int8_t* values) noexcept {
    const float largest = largest_of(row, columns, row_scale);
    std::uint16_t best = 0;
    float least = std::numeric_limits<float>::infinity();
    for (const float part : {1.0f, 0.9f, 0.8f, 0.7f}) {
      const std::uint16_t scale = bfloat16(largest * part / 7);
      if (!(inverse_of(wide(scale)) > 0)) break;
      const float residual = quantise(row, columns, row_scale, wide(scale), 7, values);
      if (residual >= least) continue;
      least = residual;
      best = scale;
    }
    return best;
  }

  // Writes the row of position p; its |r|, from above. values: [padded(columns)], for what lies
  // between.
  template <class Element>
  float put(std::size_t p, const Element* row, const Source& source, std::span<std::int8_t> values,
            float usual_length) {
    std::uint8_t* const panel = bytes.data() + p / kernels::panel_rows * bytes_a_panel;
    const std::size_t lane = p % kernels::panel_rows;
    const float row_scale = source.place.scale;
    if (bits == 8) {
      biases[p] = source.place.bias;
      if constexpr (std::is_same_v<Element, std::int8_t>) {
        scales[p] = row_scale;
        kernels::put_in_panel<8>(panel, lane, row, columns);
        return 0;
      }
    }
    float scale;
    if (bits == 8) {
      const float largest = largest_of(row, columns, row_scale);
      scale = scales[p] = inverse_of(largest / 127) > 0 ? largest / 127 : 0.0f;
    } else {
      short_scales[p] = source.short_scale ? source.short_scale
                                           : best_scale(row, columns, row_scale, values.data());
      scale = wide(short_scales[p]);
    }
    float residual =
        quantise(row, columns, row_scale, scale, bits == 8 ? 127.0f : 7.0f, values.data());
    // Rounding of v / scale adds 3 * 2^-24 |v|, of the sum of squares some d / 16.
    residual = scale > 0 ? residual * (1 + 1e-6f + 4e-9f * static_cast<float>(columns)) +
                               3e-7f * source.norm
                         : source.norm;
    if (bits == 8) {
      kernels::put_in_panel<8>(panel, lane, values.data(), columns);
    } else {
      kernels::put_in_panel<4>(panel, lane, values.data(), columns);
      raised_biases[p] = bfloat16_above(source.place.bias + usual_length * residual);
    }
    return residual;
  }
};

// The ids of a model's items and of those that were put since, numbered in that order. A copy
// shares what it does not change; read by any number of threads, changed by one.
class ItemIds {
 public:
  ItemIds(std::shared_ptr<const Model> model, const HashKey& key)
      : model_(std::move(model)), key_(key) {}
  ItemIds(const ItemIds& other)
      : model_(other.model_), key_(other.key_), added_(other.added_), parts_(other.parts_) {}
  ItemIds& operator=(const ItemIds&) = delete;

  std::size_t size() const noexcept { return model_->item_count() + added_.size(); }

  std::string_view operator[](std::uint32_t item) const noexcept {
    const std::size_t base = model_->item_count();
    return item < base ? model_->item_id(item) : std::string_view(added_[item - base]);
  }

  std::optional<std::uint32_t> find(std::string_view id) const noexcept {
    if (const auto item = model_->find_item(id)) return item;
    if (added_.empty()) return std::nullopt;
    const std::uint64_t hash = hash_of(id);
    const auto& part = parts_[part_of(hash)];
    if (!part) return std::nullopt;
    const auto found = part->find(hash, [&](std::uint32_t n) { return added_[n] == id; });
    if (!found) return std::nullopt;
    return static_cast<std::uint32_t>(*found + model_->item_count());
  }

  // The number of an id that is not there yet.
  std::uint32_t add(std::string_view id) {
    const std::uint64_t hash = hash_of(id);
    const std::size_t p = part_of(hash);
    if (!owned_.test(p) || parts_[p]->full()) {
      const HashIndex& old = parts_[p] ? *parts_[p] : HashIndex{};
      parts_[p] = std::make_shared<HashIndex>(old.full() ? old.grown() : old);
      owned_.set(p);
    }
    added_.push_back(std::string(id));
    const auto number = static_cast<std::uint32_t>(added_.size() - 1);
    parts_[p]->insert(hash, number);
    return static_cast<std::uint32_t>(number + model_->item_count());
  }

  std::size_t bytes() const noexcept {
    std::size_t sum = allocated(sizeof *this) + added_.bytes();
    for (const auto& part : parts_)
      if (part) sum += allocated(sizeof(HashIndex) + 16) + part->bytes();
    for (std::size_t i = 0; i < added_.size(); ++i) sum += allocated_text(added_[i].capacity());
    return sum;
  }

 private:
  std::uint64_t hash_of(std::string_view id) const noexcept {
    return siphash(key_, text_bytes(id));
  }
  std::size_t part_of(std::uint64_t hash) const noexcept {
    return static_cast<std::size_t>(hash % parts_.size());
  }

  std::shared_ptr<const Model> model_;
  HashKey key_;
  PagedArray<std::string> added_;
  std::array<std::shared_ptr<HashIndex>, 256> parts_;
  std::bitset<256> owned_;  // parts that no other copy has seen
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 10: scorer. Owns the exact top-k over the eligible items. Uses rooms 1, 2, 3, 4, 5, 6, 7
// and 9.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

// Immutable; one for all threads, each with its own Workspace. The score of an item is
//   f32(b_i + scale_i * sum_c q_c v_ic), summed in double as Kernels::dot says,
// the same bits on every instruction set. top_k never returns anything but the head of a full sort
// by these scores, ties by item index.
//
// The scan reads a copy of the vectors in panels of 16 rows, ordered by the largest score they
// could have, and multiplies in integers. With the query q = s q^ + e (q^ int8) and the vector
// v = t v^ + r (v^ of 8 or 4 bits), Cauchy and Schwarz bound what that leaves out:
//   | q . v - s t q^ . v^ | = | e . t v^ + q . r | <= |e| (|v| + |r|) + |q| |r|.
// The k-th largest lower bound of those seen so far is a lower bound of the k-th best score: an
// item whose upper bound stays below it is out. (Where only a few items are excluded, m of them, so
// is the k + m-th of all, whichever they are.) What passes in 4 bits is looked at in 8, and what is
// left at the end gets its exact score. The scan ends where |q| max |v| + max b of all later rows
// stays below. A sample of the rows, seen first, tells where the k-th best score will lie; if
// in the end fewer than k lower bounds reach that, the scan is done again without.
//
// A scorer of a changed catalogue shares all panels but those of what changed: changed() gives the
// rows of these items' old selves a bias that never reaches anything, and puts the new ones in
// panels of their own. Each part is more than `ratio` times as large as all newer ones together, or
// is made anew with them, so that there are few parts, and an item is moved O(log N) times.
class Scorer {
  struct Search;

 public:
  // One query of a batch.
  struct Query {
    std::span<const float> query;  // [padded(d)], zero beyond d
    std::size_t k;
    Eligibility eligibility;
    std::vector<ScoredItem>* top;  // replaced by the k best, best first
  };

  // Belongs to no scorer: whichever uses it makes it as large as it needs, and it stays so.
  struct Workspace {
    Vector<double> query;
    std::vector<Search> searches;
    Vector<Search*> active;
    std::size_t bytes() const noexcept;
  };

  // Bytes of int8 vectors up to which the scan is in 8 bits. Larger catalogues come from main
  // memory or nearly so, and half the bytes are worth a second look at what passes.
  static constexpr std::size_t usual_largest_8bit = std::size_t{1} << 24;

  // rows: [N, d], biases: [N]; an item whose bias or vector is not finite never ranks, which is how
  // an item is removed (bias NaN). usual_query_length: a guess at |q|, which decides only how early
  // a scan ends. Takes N * (d + 24) bytes up to largest_8bit = N * d, N * (d / 2 + 20) beyond.
  Scorer(ItemRows rows, PagedArray<float> biases, float usual_query_length,
         const kernels::Table& table = kernels::chosen(),
         std::size_t largest_8bit = usual_largest_8bit, detail::Pace* given_pace = nullptr)
      : rows_(std::move(rows)),
        biases_(std::move(biases)),
        table_(&table),
        largest_8bit_(largest_8bit),
        length_(std::isfinite(usual_query_length) ? std::max(usual_query_length, 0.0f) : 0.0f) {
    assert(biases_.size() == rows_.rows());
    detail::Pace without_rests;
    start_afresh({}, given_pace ? *given_pace : without_rests);
  }

  explicit Scorer(const std::shared_ptr<const Model>& model,
                  const kernels::Table& table = kernels::chosen())
      : Scorer(ItemRows({model, &model->parts().item_vectors}),
               PagedArray<float>(model, model->parts().biases), usual_query_length(*model), table) {
  }
  // The model must outlive the scorer.
  explicit Scorer(const Model& model, const kernels::Table& table = kernels::chosen())
      : Scorer(model.parts().item_vectors, model.parts().biases, usual_query_length(model), table) {
  }
  // vectors: [N, d], biases: [N]; both must outlive the scorer.
  Scorer(const Matrix& vectors, std::span<const float> biases, float usual_query_length,
         const kernels::Table& table = kernels::chosen())
      : Scorer(ItemRows({std::shared_ptr<const void>(), &vectors}), PagedArray<float>({}, biases),
               usual_query_length, table) {}

  // A scorer of `rows` and `biases`, which differ from this one's at most in the items of `changed`
  // (ascending, distinct; another row, another bias or both) and in items behind this one's last.
  // Shares what is unchanged; this one stays as it is. O(N / 1024 + n d log N) for n changed and
  // added items, counted over many calls; where n is large against N, O(N d).
  Scorer changed(ItemRows rows, PagedArray<float> biases, std::span<const std::uint32_t> changed,
                 detail::Pace* given_pace = nullptr) const {
    detail::Pace without_rests;
    detail::Pace& pace = given_pace ? *given_pace : without_rests;
    assert(biases.size() == rows.rows() && rows.rows() >= rows_.rows());
    assert(rows_.empty() || (rows.columns() == rows_.columns() && rows.type() == rows_.type()));
    Scorer next(*this);
    next.rows_ = std::move(rows);
    next.biases_ = std::move(biases);
    const std::size_t added = next.rows_.rows() - rows_.rows();
    if (parts_.empty() || (changed.size() + added) * ratio >= parts_.front().live) {
      Vector<std::uint16_t> known = short_scales();
      if (!known.empty())
        for (const std::uint32_t item : changed)
          if (!same_row(next.rows_, item)) known[item] = 0;
      next.start_afresh(known, pace);
      return next;
    }
    Vector<Source> fresh;
    fresh.reserve(changed.size() + added);
    for (const std::uint32_t item : changed) {
      assert(item < rows_.rows());
      pace.step();
      const std::uint16_t short_scale = next.take_out(item);
      next.take_in(item, same_row(next.rows_, item) ? short_scale : std::uint16_t{0}, fresh);
    }
    for (std::size_t item = rows_.rows(); item < next.rows_.rows(); ++item)
      next.take_in(static_cast<std::uint32_t>(item), 0, fresh);
    next.add(std::move(fresh), pace);
    return next;
  }

  // Of the panels and what belongs to them, parts that other scorers share included; without the
  // rows and biases that the scorer was given.
  std::size_t bytes() const noexcept {
    std::size_t sum = sizeof *this + unbounded_.capacity() * sizeof(std::uint32_t);
    for (const Part& part : parts_) sum += sizeof part + part.memory();
    return sum;
  }

  Workspace make_workspace() const {
    Workspace workspace;
    workspace.query.resize(padded());
    workspace.searches.resize(1);
    fit(workspace.searches[0]);
    workspace.active.reserve(1);
    return workspace;
  }

  // Replaces `top` by the k best eligible items, best first. query: [padded(d)], zero beyond d. An
  // item whose score is not finite is left out. At most one pass over the panels; allocates only
  // while top and workspace grow to k and some 6 k + 700.
  void top_k(std::span<const float> query, std::size_t k, const Eligibility& eligibility,
             Workspace& workspace, std::vector<ScoredItem>& top) const {
    const Query one{query, k, eligibility, &top};
    top_k({&one, 1}, workspace);
  }

  // Many queries in one pass, each exactly as alone: the rows come from memory once, and stay in
  // the core's cache while all queries see them. The workspace grows to the largest batch.
  void top_k(std::span<const Query> queries, Workspace& workspace) const {
    if (workspace.searches.size() < queries.size()) workspace.searches.resize(queries.size());
    workspace.active.clear();
    for (std::size_t i = 0; i < queries.size(); ++i) {
      Search& search = workspace.searches[i];
      begin(queries[i], search);
      if (search.k == 0) continue;
      if (bounded(search) && !few_eligible(search.eligibility))
        workspace.active.push_back(&search);
      else
        look_at_all(search);
    }
    scan(workspace.active);
    // While one query's candidates get exact scores, the next one's come from memory.
    if (!queries.empty()) complete(workspace.searches[0]);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      if (i + 1 < queries.size()) complete(workspace.searches[i + 1]);
      finish(workspace.searches[i], *queries[i].top);
    }
  }

  // The scores of `items`, in their order, to scores; of one that was removed NaN.
  void score(std::span<const float> query, std::span<const std::uint32_t> items,
             Workspace& workspace, std::span<float> scores) const {
    if (workspace.query.size() < padded()) workspace.query.resize(padded());
    widen(query, workspace.query);
    std::array<Place, exact_together> places;
    for (std::size_t begin = 0; begin < items.size(); begin += places.size()) {
      const std::size_t count = std::min(places.size(), items.size() - begin);
      for (std::size_t i = 0; i < count; ++i) places[i] = place_of(items[begin + i]);
      exact(workspace.query.data(), {places.data(), count}, scores.data() + begin);
    }
  }

  // Of one item, without a workspace; many are faster together.
  float score(std::span<const float> query, std::uint32_t item) const noexcept {
    std::array<double, 8> s{};
    const auto add = [&](const auto* row) {
      for (std::size_t c = 0; c < rows_.columns(); ++c)
        s[c % 8] += static_cast<double>(query[c]) * static_cast<double>(row[c]);
    };
    if (rows_.type() == ElementType::i8)
      add(rows_.i8(item));
    else
      add(rows_.f32(item));
    return score_of_dot(place_of(item),
                        ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
  }

  const ItemRows& rows() const noexcept { return rows_; }
  const PagedArray<float>& biases() const noexcept { return biases_; }
  const char* instruction_set() const noexcept { return table_->name; }

 private:
  using Place = detail::Place;
  using Bounds = detail::RowBounds;
  using Panels = detail::Panels;
  using Source = Panels::Source;

  static constexpr std::size_t chunk_panels = Panels::chunk_panels;
  static constexpr std::size_t chunk_rows = Panels::chunk_rows;
  static constexpr float lowest = -std::numeric_limits<float>::infinity();
  static constexpr std::size_t ratio = 16;        // of a part to all newer ones, at least
  static constexpr std::size_t second_look = 64;  // items, in which time their rows come
  static constexpr std::size_t most_waiting = second_look + 2 * chunk_rows;
  static constexpr std::size_t most_together = 64;   // queries through a chunk
  static constexpr std::size_t exact_together = 64;  // items that get exact scores
  static constexpr std::size_t chunks_a_look = 8;    // at which searches later rows still concern
  static constexpr std::size_t least_to_fetch = 16;  // queries, in whose time the next chunk comes

  // Panels, and which of their rows still hold: the others have a NaN for a bias here.
  struct Part {
    explicit Part(std::shared_ptr<const Panels> made)
        : order(made->order),
          panels(std::move(made)),
          biases(panels, panels->biases),
          raised_biases(panels, panels->raised_biases),
          live(panels->by_item.size()) {}

    std::size_t rows() const noexcept { return order.size(); }
    bool holds(std::size_t position) const noexcept {
      return panels->bits == 8 ? !std::isnan(biases[position])
                               : !std::isnan(detail::wide(raised_biases[position]));
    }
    void drop(std::size_t position) {
      constexpr float never = std::numeric_limits<float>::quiet_NaN();
      if (panels->bits == 8)
        biases.edit(position) = never;
      else
        raised_biases.edit(position) = detail::bfloat16(never);
      --live;
    }
    kernels::PanelRows<float> rows_8bit(std::size_t chunk) const noexcept {
      const std::size_t row = chunk * chunk_rows;
      return {panels->bytes.data() + chunk * chunk_panels * panels->bytes_a_panel,
              panels->scales.data() + row, &biases[row], panels->columns, first + row};
    }
    kernels::PanelRows<std::uint16_t> rows_4bit(std::size_t chunk) const noexcept {
      const std::size_t row = chunk * chunk_rows;
      return {panels->bytes.data() + chunk * chunk_panels * panels->bytes_a_panel,
              panels->short_scales.data() + row, &raised_biases[row], panels->columns, first + row};
    }
    std::size_t memory() const noexcept {
      const auto pages = [](const auto& array, const auto& base) {
        std::size_t sum = array.pages() * sizeof(std::shared_ptr<const void>);
        for (std::size_t p = 0; p < array.pages(); ++p)
          if (const auto page = array.page(p);
              page.data() != base.data() + p * std::decay_t<decltype(array)>::page_size)
            sum += page.size_bytes();
        return sum;
      };
      return panels->memory() + pages(biases, panels->biases) +
             pages(raised_biases, panels->raised_biases);
    }

    std::span<const Place> order;
    std::size_t first = 0;  // its first row's position among all parts'
    std::shared_ptr<const Panels> panels;
    PagedArray<float> biases;                 // of 8 bits
    PagedArray<std::uint16_t> raised_biases;  // of 4 bits
    std::size_t live;                         // rows that hold
  };

  // One query on its way through the panels.
  struct Search {
    kernels::PanelQuery scan{};  // of 8 bits finds candidates, of 4 bits what waits
    float norm = 0, error = 0;   // |q|, |e|
    float slack = 0;             // for rounding in f32
    float threshold = 0;         // no higher than the k-th best score, unless guessed
    bool guessed = false;
    std::size_t k = 0;
    // So many lower bounds make sure of k items that may be ranked: k, and as many as may turn out
    // to be excluded.
    std::size_t needed = 0;
    std::size_t wanted = 0;      // needed, or how many of the best so many a sample holds at most
    std::size_t next_raise = 0;  // found, when the threshold is raised again
    // Candidates: bounds of their scores, positions; up to settled the places there, all of which
    // may be ranked. lower is -inf from found to the next multiple of kernels::lanes.
    std::size_t found = 0, settled = 0;
    Vector<float> lower, upper;
    Vector<std::uint32_t> positions;
    Vector<Place> places;
    Eligibility eligibility;
    Vector<double> query;  // [padded(d)]
    Vector<std::int8_t> quantised;
    Vector<std::uint64_t> keys, best;  // of the candidates and of the k best, once resolved
    // Positions for a second look and how far off that can be; up to `ready` the places there.
    // [most_waiting] with panels of 4 bits.
    std::size_t waiting = 0, ready = 0;
    Vector<std::uint32_t> waiting_positions;
    Vector<float> waiting_margins;
    Vector<Place> waiting_places;

    // Whether candidates go through the filter before their bounds are counted.
    bool filtered() const noexcept { return needed == k && !eligibility.all(); }
    std::size_t growth() const noexcept { return std::max<std::size_t>(wanted, 64); }
    void put_off_raise() noexcept { next_raise = std::max(wanted, found) + growth(); }
    void add(const Place& place, float low, float high) noexcept {
      lower[found] = low;
      upper[found] = high;
      places[found++] = place;
      settled = found;
    }
  };

  std::size_t padded() const noexcept { return kernels::padded(rows_.columns()); }

  // Looks at what is taken last of each group: memory may have run out before.
  void fit(Search& search) const {
    if (search.quantised.size() < padded()) {
      search.query.resize(padded());
      search.quantised.resize(padded());
    }
    if (bits_ == 4 && search.waiting_places.size() < most_waiting) {
      search.waiting_positions.resize(most_waiting);
      search.waiting_margins.resize(most_waiting);
      search.waiting_places.resize(most_waiting);
    }
    // Of the most that `needed` may be, so that it does not grow with a user's history.
    const std::size_t most = std::max<std::size_t>(2 * search.k, 64);
    const std::size_t capacity = kernels::padded(3 * most + 2 * chunk_rows);
    if (search.best.capacity() < capacity) {
      search.lower.resize(capacity);
      search.upper.resize(capacity);
      search.positions.resize(capacity);
      search.places.resize(capacity);
      search.keys.reserve(capacity);
      search.best.reserve(capacity);
    }
  }

  // ------------------------------------------------------------------------------------------
  // The parts
  // ------------------------------------------------------------------------------------------

  bool same_row(const ItemRows& rows, std::uint32_t item) const noexcept {
    const auto mine = rows_.stored(item), other = rows.stored(item);
    return mine.data() == other.data() || (rows_.scale(item) == rows.scale(item) &&
                                           std::equal(mine.begin(), mine.end(), other.begin()));
  }

  // The scales of all items' rows in 4 bits, 0 where they have none; empty with 8 bits.
  Vector<std::uint16_t> short_scales() const {
    Vector<std::uint16_t> known(bits_ == 4 ? rows_.rows() : 0);
    if (bits_ == 4)
      for (const Part& part : parts_)
        for (const std::uint32_t position : part.panels->by_item)
          if (part.holds(position))
            known[part.order[position].item] = part.panels->short_scales[position];
    return known;
  }

  // Makes one part of all items. known: as from short_scales().
  void start_afresh(std::span<const std::uint16_t> known, detail::Pace& pace) {
    parts_.clear();
    unbounded_.clear();
    Vector<Source> fresh;
    fresh.reserve(rows_.rows());
    for (std::size_t item = 0; item < rows_.rows(); ++item) {
      pace.step(item);
      take_in(static_cast<std::uint32_t>(item),
              item < known.size() ? known[item] : std::uint16_t{0}, fresh);
    }
    add(std::move(fresh), pace);
  }

  // Adds the item to `fresh`, if it may rank.
  void take_in(std::uint32_t item, std::uint16_t short_scale, Vector<Source>& fresh) {
    const Place place = place_of(item);
    const double norm = norm_of(place);
    if (!std::isfinite(place.bias) || !std::isfinite(norm)) return;
    if (norm < static_cast<double>(std::numeric_limits<float>::max()))
      fresh.push_back({place, static_cast<float>(norm), short_scale});
    else
      unbounded_.insert(
          std::lower_bound(unbounded_.begin(), unbounded_.end(), item, detail::Less{}), item);
  }

  double norm_of(const Place& place) const noexcept {
    return rows_.type() == ElementType::i8
               ? detail::norm_above(rows_.i8(place.item), place.scale, rows_.columns())
               : detail::norm_above(rows_.f32(place.item), place.scale, rows_.columns());
  }

  // From the part that holds it; its scale there in 4 bits, else 0.
  std::uint16_t take_out(std::uint32_t item) {
    for (auto part = parts_.rbegin(); part != parts_.rend(); ++part) {
      const std::size_t position = part->panels->find(item);
      if (position == Panels::nowhere || !part->holds(position)) continue;
      part->drop(position);
      return bits_ == 4 ? part->panels->short_scales[position] : std::uint16_t{0};
    }
    const auto found = std::lower_bound(unbounded_.begin(), unbounded_.end(), item, detail::Less{});
    if (found != unbounded_.end() && *found == item) unbounded_.erase(found);
    return 0;
  }

  // Makes a part of `fresh`, ascending, and of the newest parts that became small against it or
  // lost much.
  void add(Vector<Source> fresh, detail::Pace& pace) {
    const int bits = rows_.rows() * rows_.columns() <= largest_8bit_ ? 8 : 4;
    std::size_t kept = parts_.size();
    std::size_t newer = fresh.size();
    for (std::size_t p = parts_.size(); p-- > 0;) {
      const std::size_t live = parts_[p].live, lost = parts_[p].panels->by_item.size() - live;
      if (bits != bits_ || newer * ratio >= live || lost * ratio >= live) kept = p;
      newer += live;
    }
    for (; parts_.size() > kept; parts_.pop_back()) take_over(parts_.back(), bits, fresh);
    bits_ = bits;
    if (!fresh.empty())
      parts_.emplace_back(std::make_shared<const Panels>(rows_, fresh, bits, length_, pace));
    std::size_t first = 0;
    all_ = {};
    largest_bias_ = 0;
    for (Part& part : parts_) {
      part.first = first;
      first += part.rows();
      all_.add(part.panels->from[0]);
      largest_bias_ = std::max(largest_bias_, part.panels->largest_bias);
    }
  }

  // Merges what a part holds into `fresh`.
  void take_over(const Part& part, int bits, Vector<Source>& fresh) const {
    const Panels& panels = *part.panels;
    Vector<Source> held;
    held.reserve(part.live);
    for (const std::uint32_t position : panels.by_item) {
      if (!part.holds(position)) continue;
      const Place& place = panels.order[position];
      held.push_back(
          {place, static_cast<float>(norm_of(place)),
           bits == 4 && panels.bits == 4 ? panels.short_scales[position] : std::uint16_t{0}});
    }
    Vector<Source> merged(fresh.size() + held.size());
    std::merge(fresh.begin(), fresh.end(), held.begin(), held.end(), merged.begin(),
               [](const Source& a, const Source& b) { return a.place.item < b.place.item; });
    fresh.swap(merged);
  }

  const Place& place_at(std::uint32_t position) const noexcept {
    const Part* part = parts_.data();
    while (position - part->first >= part->order.size()) ++part;
    return part->order[position - part->first];
  }

  // ------------------------------------------------------------------------------------------
  // The scan
  // ------------------------------------------------------------------------------------------

  // Keys compare as ranks_before does: the score's bits in an order-preserving form above the
  // complement of the item.
  static std::uint64_t key_of(float score, std::uint32_t item) noexcept {
    return std::uint64_t{detail::ordered_bits(score)} << 32 | (~item & 0xffffffffu);
  }
  static std::uint32_t item_of(std::uint64_t key) noexcept {
    return ~static_cast<std::uint32_t>(key);
  }
  static float score_of(std::uint64_t key) noexcept {
    const auto ordered = static_cast<std::uint32_t>(key >> 32);
    return detail::bit_cast<float>(ordered ^
                                   (ordered >> 31 ? std::uint32_t{1} << 31 : ~std::uint32_t{0}));
  }

  void widen(std::span<const float> query, std::span<double> wide) const noexcept {
    for (std::size_t c = 0; c < padded(); ++c) wide[c] = static_cast<double>(query[c]);
  }

  void begin(const Query& query, Search& search) const {
    search.k = search.needed = query.k;
    search.eligibility = query.eligibility;
    // A second look at rows of 4 bits filters them without further cost.
    if (const std::size_t excluded = query.eligibility.most_excluded();
        !query.eligibility.eligible && bits_ == 8 && excluded <= search.k)
      search.needed += excluded;
    start(search);
    fit(search);
    widen(query.query, search.query);
    const std::size_t d = rows_.columns();
    const bool bytes = bits_ == 8;
    std::int32_t sum = 0;
    const float step = table_->quantise(d, query.query.data(), bytes ? table_->query_limit : 127,
                                        search.quantised.data(), sum);
    search.scan = {search.quantised.data(), (bytes ? -128 : -8) * sum, step};
    search.scan.rows = bytes ? search.positions.data() : search.waiting_positions.data();
    search.scan.lower = search.lower.data();
    search.scan.upper = search.upper.data();
    double squares = 0, errors = 0;
    for (std::size_t c = 0; c < d; ++c) {
      const double q = search.query[c];
      const double e = q - static_cast<double>(step) * search.quantised[c];
      squares += q * q;
      errors += e * e;
    }
    search.norm = static_cast<float>(std::sqrt(squares)) * (1 + 1e-6f);
    search.error = static_cast<float>(std::sqrt(errors)) * (1 + 1e-6f);
    // Rounding in f32 of the approximate score (4 roundings), the exact one (1), its bounds (2),
    // margins and limits (5), each at most 2^-24 of the largest magnitude involved.
    search.slack = 1e-6f * ((search.norm + search.error + length_) * (all_.norm + all_.residual) +
                            largest_bias_);
  }

  static void start(Search& search) noexcept {
    search.found = search.settled = search.waiting = search.ready = 0;
    search.threshold = lowest;
    search.guessed = false;
    search.wanted = search.next_raise = search.needed;
  }

  // To what needs an exact score, which is fetched.
  void complete(Search& search) const {
    if (search.k == 0) return;
    catch_up(search);
    if (search.guessed) {
      start(search);
      Search* one = &search;
      scan_parts({&one, 1}, 0);
      catch_up(search);
    }
    look_up(search);
    if (search.needed > search.k) {
      search.wanted = search.k;
      raise_threshold(search);
    }
    read_ahead(search);
  }

  void finish(Search& search, std::vector<ScoredItem>& top) const {
    top.clear();
    if (search.k == 0) return;
    resolve(search);
    top.reserve(search.best.size());
    for (const std::uint64_t key : search.best) top.push_back({item_of(key), score_of(key)});
  }

  void exact(const double* query, std::span<const Place> places, float* scores) const noexcept {
    std::array<double, exact_together> dots;
    for (std::size_t begin = 0; begin < places.size(); begin += dots.size()) {
      const auto some = places.subspan(begin, std::min(dots.size(), places.size() - begin));
      const auto multiply = [&](auto kernel, auto row) {
        std::array<decltype(row(0)), exact_together> rows;
        for (std::size_t i = 0; i < some.size(); ++i) rows[i] = row(some[i].item);
        kernel(rows.data(), rows_.columns(), query, dots.data(), some.size());
      };
      if (rows_.type() == ElementType::i8)
        multiply(table_->dots_i8, [&](std::uint32_t item) { return rows_.i8(item); });
      else
        multiply(table_->dots_f32, [&](std::uint32_t item) { return rows_.f32(item); });
      for (std::size_t i = 0; i < some.size(); ++i)
        scores[begin + i] = score_of_dot(some[i], dots[i]);
    }
  }

  static float score_of_dot(const Place& place, double dot) noexcept {
    return static_cast<float>(
        std::fma(static_cast<double>(place.scale), dot, static_cast<double>(place.bias)));
  }

  Place place_of(std::uint32_t item) const noexcept {
    return {item, rows_.scale(item), biases_[item]};
  }

  // Has the candidates' rows come from memory, by reading them: of hundreds of prefetches at a time
  // processors drop most.
  void read_ahead(const Search& search) const noexcept {
    unsigned sum = 0;
    for (const Place& place : std::span(search.places.data(), search.found)) {
      const auto row = rows_.stored(place.item);
      for (std::size_t at = 0; at < row.size(); at += 64) sum += static_cast<unsigned>(row[at]);
    }
    asm volatile("" : : "r"(sum));  // or the reads would be left out
  }

  // Whether margins mean anything; not where a query or a vector is not finite or nearly so.
  bool bounded(const Search& search) const noexcept {
    return search.slack < 1e30f && unbounded_.empty();
  }

  // Where a filter leaves little, looking at each of those items is faster than the scan.
  bool few_eligible(const Eligibility& eligibility) const noexcept {
    return eligibility.eligible && eligibility.eligible->count() < rows_.rows() / 16;
  }

  void look_at_all(Search& search) const {
    const std::size_t items = rows_.rows();
    const std::size_t words =
        (search.eligibility.eligible ? std::min(items, search.eligibility.eligible->size())
                                     : items) +
        63;
    std::array<Place, exact_together> some;
    std::size_t count = 0;
    const auto look = [&] {
      std::array<float, exact_together> scores;
      exact(search.query.data(), {some.data(), count}, scores.data());
      for (std::size_t i = 0; i < count; ++i)
        if (std::isfinite(scores[i]) && scores[i] >= search.threshold)
          search.add(some[i], scores[i], scores[i]);
      count = 0;
      if (search.found >= search.next_raise) raise_threshold(search);
    };
    for (std::size_t w = 0; w < words / 64; ++w) {
      std::uint64_t allowed = search.eligibility.word(w);
      if (items - w * 64 < 64) allowed &= (std::uint64_t{1} << (items - w * 64)) - 1;
      for (; allowed != 0; allowed &= allowed - 1) {
        some[count++] = place_of(static_cast<std::uint32_t>(w * 64) +
                                 static_cast<std::uint32_t>(std::countr_zero(allowed)));
        if (count == some.size()) look();
      }
    }
    look();
  }

  // First a sample of the chunks, from which each query guesses where its k-th best score will lie,
  // on the low side: with that for a threshold a third fewer items become candidates. complete()
  // finds out whether the guess was too high.
  void scan(std::span<Search*> active) const {
    if (active.empty() || parts_.empty()) return;
    const std::size_t stride = sample_stride(active.front()->needed);
    if (stride != 0) scan_sample(active, stride);
    scan_parts(active, stride);
  }

  // Of the oldest part, which holds nearly all.
  void scan_sample(std::span<Search* const> searches, std::size_t stride) const {
    const Part& part = parts_.front();
    const std::size_t chunks = part.panels->chunks.size();
    const std::size_t count = (chunks - stride / 2 + stride - 1) / stride;
    for (Search* search : searches) {
      // Of the best so many are in the sample, and three standard deviations.
      const double mean = static_cast<double>(search->needed * count) / static_cast<double>(chunks);
      const auto most = static_cast<std::size_t>(mean + 3 * std::sqrt(mean) + 3);
      search->wanted = search->next_raise = std::min(search->needed, most);
    }
    for (std::size_t chunk = stride / 2; chunk < chunks; chunk += stride)
      scan_in_turn(part, chunk, chunk + stride, searches);
    for (Search* search : searches) {
      catch_up(*search);
      search->guessed = search->wanted < search->needed && search->threshold > lowest;
      search->wanted = search->needed;
      search->put_off_raise();
    }
  }

  // All parts, but of the oldest the chunks of a sample. stride: see sample_stride. The newest come
  // first: a threshold from them ends the scan of the others sooner.
  void scan_parts(std::span<Search*> active, std::size_t stride) const {
    for (std::size_t p = parts_.size(); p-- > 0;)
      scan_chunks(parts_[p], active, p == 0 ? stride : 0);
  }

  // Leaves `active` in another order.
  void scan_chunks(const Part& part, std::span<Search*> active, std::size_t stride) const {
    const auto first_from = [&](std::size_t chunk) {
      return chunk + (stride != 0 && chunk % stride == stride / 2);
    };
    std::size_t chunk = first_from(0);
    for (std::size_t visited = 0; chunk < part.panels->chunks.size(); ++visited) {
      if (visited % chunks_a_look == 0) {
        for (std::size_t i = 0; i < active.size();) {
          if (may_reach(*active[i], part.panels->from[chunk])) {
            ++i;
            continue;
          }
          std::swap(active[i], active.back());
          active = active.first(active.size() - 1);
        }
        if (active.empty()) return;
      }
      const std::size_t next = first_from(chunk + 1);
      scan_in_turn(part, chunk, next, active);
      chunk = next;
    }
  }

  // What was found and put off.
  void catch_up(Search& search) const {
    make_ready(search);
    second_looks(search);
    raise_threshold(search);
  }

  // Scans a chunk for those searches that it may concern. In a batch, `next`, the chunk that will
  // follow, comes from memory meanwhile.
  void scan_in_turn(const Part& part, std::size_t chunk, std::size_t next,
                    std::span<Search* const> searches) const {
    bool ahead = searches.size() >= least_to_fetch && (next + 1) * chunk_rows <= part.rows();
    while (!searches.empty()) {
      const std::size_t count = std::min(searches.size(), most_together);
      scan_chunk(part, chunk, next, std::exchange(ahead, false), searches.first(count));
      searches = searches.subspan(count);
    }
  }

  // Every so many chunks one of the sample, 0: none. Where the best rows stand in front, the scan
  // finds a threshold there and ends soon.
  std::size_t sample_stride(std::size_t k) const noexcept {
    const Vector<Bounds>& from = parts_.front().panels->from;
    const std::size_t chunks = from.size();
    const auto reach = [&](std::size_t chunk) {
      return length_ * from[chunk].norm + from[chunk].bias;
    };
    if (chunks < 32 || !(reach(chunks / 8) > 0.6f * reach(0))) return 0;
    return chunks / std::clamp<std::size_t>(6 * chunks / k, 4, chunks / 8);
  }

  static bool may_reach(const Search& search, const Bounds& b) noexcept {
    return search.norm * b.norm + b.bias + search.slack >= search.threshold;
  }

  // ahead: chunk `next` comes from memory meanwhile.
  void scan_chunk(const Part& part, std::size_t chunk, std::size_t next, bool ahead,
                  std::span<Search* const> searches) const {
    const Bounds& bounds = part.panels->chunks[chunk];
    const std::size_t panels =
        std::min(chunk_panels, part.rows() / kernels::panel_rows - chunk * chunk_panels);
    const bool bytes = bits_ == 8;
    std::array<Search*, most_together> some;
    std::array<kernels::PanelQuery*, most_together> queries;
    std::size_t count = 0;
    for (Search* search : searches) {
      Search& s = *search;
      float margin = s.error * (bounds.norm + bounds.residual) + s.slack;
      if (bytes) {
        margin += s.norm * bounds.residual;
        s.scan.found = s.found;
      } else {
        const float longer = s.norm - length_;
        margin += longer * (longer > 0 ? bounds.residual : bounds.least_residual);
        s.scan.found = s.waiting;
      }
      s.scan.limit = s.threshold - margin;
      s.scan.margin = margin;
      some[count] = search;
      queries[count] = &s.scan;
      count += may_reach(s, bounds);
    }
    if (bytes) {
      kernels::PanelRows<float> after;
      if (ahead) after = part.rows_8bit(next);
      table_->scan_8bit(part.rows_8bit(chunk), 0, panels, ahead ? &after : nullptr, queries.data(),
                        count);
      for (Search* search : std::span(some.data(), count)) {
        search->found = search->scan.found;
        if (search->found >= search->next_raise) raise_threshold(*search);
      }
    } else {
      kernels::PanelRows<std::uint16_t> after;
      if (ahead) after = part.rows_4bit(next);
      table_->scan_4bit(part.rows_4bit(chunk), 0, panels, ahead ? &after : nullptr, queries.data(),
                        count);
      for (Search* search : std::span(some.data(), count))
        note_waiting(*search, search->error * bounds.norm + search->slack);
    }
  }

  // What the scan of a chunk found. What stands at a position is looked up later, many at a time:
  // one alone would wait for memory.
  void note_waiting(Search& search, float margin) const {
    make_ready(search);
    for (; search.waiting < search.scan.found; ++search.waiting) {
      __builtin_prefetch(&place_at(search.waiting_positions[search.waiting]));
      search.waiting_margins[search.waiting] = margin;
    }
    if (search.ready >= second_look) second_looks(search);
    if (search.found >= search.next_raise) raise_threshold(search);
  }

  // Candidates' positions become places, less those that may not be ranked.
  void look_up(Search& search) const noexcept {
    std::size_t kept = search.settled;
    for (std::size_t i = kept; i < search.found; ++i) {
      search.lower[kept] = search.lower[i];
      search.upper[kept] = search.upper[i];
      search.places[kept] = place_at(search.positions[i]);
      kept += search.eligibility.test(search.places[kept].item);
    }
    search.found = search.settled = kept;
  }

  // The same for what waits; the rows are fetched.
  void make_ready(Search& search) const noexcept {
    for (; search.ready < search.waiting; ++search.ready) {
      const Place& place = place_at(search.waiting_positions[search.ready]);
      search.waiting_places[search.ready] = place;
      const auto row = rows_.stored(place.item);
      __builtin_prefetch(row.data());
      __builtin_prefetch(row.data() + std::min<std::size_t>(row.size() - 1, 64));
    }
  }

  // At what is ready: in 8 bits where the rows are of 8 bits, exactly otherwise.
  void second_looks(Search& search) const {
    if (search.ready == 0) return;
    std::array<Place, most_waiting> places;
    std::array<float, most_waiting> margins, scores;
    const bool integers = rows_.type() == ElementType::i8;
    std::size_t count = 0;
    for (std::size_t i = 0; i < search.ready; ++i) {
      places[count] = search.waiting_places[i];
      margins[count] = integers ? search.waiting_margins[i] : 0.0f;
      count += search.eligibility.test(places[count].item);
    }
    const std::size_t left = search.waiting - search.ready;
    for (std::size_t i = 0; i < left; ++i) {
      search.waiting_positions[i] = search.waiting_positions[search.ready + i];
      search.waiting_margins[i] = search.waiting_margins[search.ready + i];
    }
    search.waiting = left;
    search.ready = 0;
    if (integers) {
      std::array<const std::int8_t*, most_waiting> rows;
      std::array<std::int32_t, most_waiting> dots;
      for (std::size_t i = 0; i < count; ++i) rows[i] = rows_.i8(places[i].item);
      // In 8 bits rows are raised by 128 for the product, in 4 by 8.
      table_->row_dots(rows.data(), rows_.columns(), search.quantised.data(),
                       16 * search.scan.offset, dots.data(), count);
      for (std::size_t i = 0; i < count; ++i)
        scores[i] =
            static_cast<float>(dots[i]) * search.scan.scale * places[i].scale + places[i].bias;
    } else {
      exact(search.query.data(), {places.data(), count}, scores.data());
    }
    for (std::size_t i = 0; i < count; ++i)
      if (scores[i] + margins[i] >= search.threshold)
        search.add(places[i], scores[i] - margins[i], scores[i] + margins[i]);
  }

  // Raises the threshold to the k-th largest lower bound and drops what stays below it. Where that
  // drops little (ties), exact scores do.
  void raise_threshold(Search& search) const {
    if (search.filtered()) look_up(search);
    const auto reach = [&](float threshold) {
      if (threshold < search.threshold) return;
      search.threshold = threshold;
      search.guessed = false;
    };
    if (search.found >= search.wanted) {
      const std::size_t size = kernels::padded(search.found);
      std::fill(search.lower.begin() + static_cast<std::ptrdiff_t>(search.found),
                search.lower.begin() + static_cast<std::ptrdiff_t>(size), lowest);
      reach(table_->kth_largest(size, search.lower.data(), search.wanted,
                                search.guessed ? lowest : search.threshold));
      std::size_t kept = 0;
      const auto keep = [&](std::size_t begin, std::size_t end, auto& where) {
        for (std::size_t i = begin; i < end; ++i) {
          const float upper = search.upper[i];
          search.lower[kept] = search.lower[i];
          search.upper[kept] = upper;
          where[kept] = where[i];
          kept += upper >= search.threshold;
        }
        return kept;
      };
      const std::size_t settled = search.settled;
      search.settled = keep(0, settled, search.places);
      search.found = keep(settled, search.found, search.positions);
    }
    if (search.found > search.needed + search.growth()) {
      look_up(search);
      resolve(search);
      for (std::size_t i = 0; i < search.best.size(); ++i) {
        search.places[i] = place_of(item_of(search.best[i]));
        search.lower[i] = search.upper[i] = score_of(search.best[i]);
      }
      search.found = search.settled = search.best.size();
      if (search.found == search.k) reach(score_of(search.best.back()));
    }
    search.put_off_raise();
  }

  // The keys of the k best candidates, best first.
  void resolve(Search& search) const {
    std::array<float, exact_together> scores;
    const std::span<const Place> places(search.places.data(), search.found);
    search.keys.clear();
    for (std::size_t begin = 0; begin < places.size(); begin += scores.size()) {
      const auto some = places.subspan(begin, std::min(scores.size(), places.size() - begin));
      exact(search.query.data(), some, scores.data());
      for (std::size_t i = 0; i < some.size(); ++i)
        if (std::isfinite(scores[i])) search.keys.push_back(key_of(scores[i], some[i].item));
    }
    sort_best(search.keys, search.k, search.best);
  }

  // The k greatest keys, greatest first. A bucket a key or so, by leading bits of the distance from
  // the greatest, and each bucket sorted: random comparisons, half of them predicted wrongly, took
  // four times as long.
  static void sort_best(std::span<const std::uint64_t> keys, std::size_t k,
                        Vector<std::uint64_t>& best) {
    constexpr int most_bits = 10;
    best.resize(keys.size());
    if (keys.empty()) return;
    const auto [least, most] = std::minmax_element(keys.begin(), keys.end(), detail::Less{});
    const std::uint64_t greatest = *most;
    const int bits = std::min(static_cast<int>(std::bit_width(keys.size())), most_bits);
    const int shift = std::max(static_cast<int>(std::bit_width(greatest - *least)) - bits, 0);
    const auto bucket = [&](std::uint64_t key) { return std::size_t((greatest - key) >> shift); };
    std::array<std::uint32_t, (1 << most_bits) + 1> ends;
    const std::size_t buckets = std::size_t{1} << bits;
    std::fill_n(ends.begin(), buckets + 1, 0u);
    for (const std::uint64_t key : keys) ++ends[bucket(key) + 1];
    for (std::size_t b = 1; b < buckets; ++b) ends[b] += ends[b - 1];
    for (const std::uint64_t key : keys) best[ends[bucket(key)]++] = key;
    const std::size_t count = std::min(k, keys.size());
    const auto at = [&](std::size_t i) { return best.begin() + static_cast<std::ptrdiff_t>(i); };
    for (std::size_t b = 0, begin = 0; begin < count; begin = ends[b++])
      std::sort(at(begin), at(ends[b]), detail::Greater{});
    best.resize(count);
  }

  ItemRows rows_;
  PagedArray<float> biases_;
  const kernels::Table* table_;
  std::size_t largest_8bit_;
  float length_;                     // of a usual query
  int bits_ = 8;                     // of all parts
  std::vector<Part> parts_;          // oldest and largest first
  Vector<std::uint32_t> unbounded_;  // items with a |v| that f32 cannot hold, ascending
  Bounds all_;
  float largest_bias_ = 0;
};

inline std::size_t Scorer::Workspace::bytes() const noexcept {
  std::size_t sum =
      detail::allocated(query) + detail::allocated(searches) + detail::allocated(active);
  for (const Search& s : searches)
    sum += detail::allocated(s.lower) + detail::allocated(s.upper) +
           detail::allocated(s.positions) + detail::allocated(s.places) +
           detail::allocated(s.query) + detail::allocated(s.quantised) + detail::allocated(s.keys) +
           detail::allocated(s.best) + detail::allocated(s.waiting_positions) +
           detail::allocated(s.waiting_margins) + detail::allocated(s.waiting_places);
  return sum;
}

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 11: counters. Owns what is counted of items: decayed counters, sums of the contexts in which
// they were shown and chosen, and the entries of a log; and cuts, by which others see what there
// was at one moment. Uses rooms 1, 2 and 9.
// ============================================================================================

// One place of a slate and how it came about (room 13).
struct SlotChoice {
  ScoredItem pick{};
  ScoredItem best{};      // of the ranking as it stood; the pick where the ranking had ended
  bool explored = false;  // drawn from the pool
  float propensity = 1;   // probability of this pick, given those above it
  float pool_share = 0;   // softmax of the pick in the pool as it stood; 0: not in the pool
  float pool_logit = 0;   // log odds that the pool wins an exploring slot, before the handicap
  float pool_value = 0;   // mean value of the pool, weighted by softmax
};

// One impression or, where `positive`, one positive event on it. With these, other exploration
// weights and other policies can be evaluated (personalize evaluate --protocol off-policy).
struct LogEntry {
  std::int64_t timestamp;
  std::string_view user;  // or session
  std::string_view recommendation_id;
  std::string_view item;
  std::uint32_t position;  // from 1
  bool positive;
  SlotChoice choice;    // propensity and alternatives; pool_value: mean expected of the pool
  float expected;       // positive events expected of the pick if seen, by all that is known
  float best_expected;  // the same had the slot gone to choice.best
};

inline constexpr std::string_view log_csv_header =
    "TIMESTAMP,USER_ID,RECOMMENDATION_ID,ITEM_ID,POSITION,POSITIVE,PROPENSITY,BEST,POOL_SHARE,"
    "POOL_LOGIT,EXPECTED,BEST_EXPECTED,POOL_EXPECTED\n";

// The entry as a line of CSV under log_csv_header, the same in every locale. Appends to `line`.
void append_csv(const LogEntry& entry, std::string& line);

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Nodes by how long ago they were used, each with Links that links(node) finds.
class RecencyList {
 public:
  static constexpr std::uint32_t none = std::numeric_limits<std::uint32_t>::max();
  struct Links {
    std::uint32_t newer = none, older = none;
  };

  template <class LinksOf>
  void add(std::uint32_t node, LinksOf links) noexcept {
    links(node) = {none, newest_};
    if (newest_ != none) links(newest_).newer = node;
    newest_ = node;
    if (oldest_ == none) oldest_ = node;
  }
  template <class LinksOf>
  void remove(std::uint32_t node, LinksOf links) noexcept {
    const Links of = links(node);
    (of.newer == none ? newest_ : links(of.newer).older) = of.older;
    (of.older == none ? oldest_ : links(of.older).newer) = of.newer;
  }
  template <class LinksOf>
  void touch(std::uint32_t node, LinksOf links) noexcept {
    if (node == newest_) return;
    remove(node, links);
    add(node, links);
  }
  std::uint32_t oldest() const noexcept { return oldest_; }

 private:
  std::uint32_t newest_ = none, oldest_ = none;
};

// What something was at a cut: a moment of which a save or an update wants to see all parts, while
// others go on changing them. Under the lock of the part.
template <class T>
class Before {
 public:
  void begin() noexcept { wanted_ = true; }
  // Ahead of a change. copy(): what is there, as a std::unique_ptr<T>.
  template <class Copy>
  void keep(Copy copy) noexcept {
    if (!wanted_ || kept_) return;
#if PERSONALIZE_HAS_EXCEPTIONS
    try {
      kept_ = copy();
    } catch (const std::bad_alloc&) {
      lost_ = true;
      wanted_ = false;
    }
#else
    kept_ = copy();
#endif
  }
  // As of the cut. now: what is there, which it still is where nothing has changed since.
  const T& or_now(const T& now) const noexcept { return kept_ ? *kept_ : now; }
  // Null where nothing has changed since.
  const T* get() const noexcept { return kept_.get(); }
  // Whether memory ran out for it.
  bool lost() const noexcept { return lost_; }
  std::unique_ptr<T> end() noexcept {
    wanted_ = lost_ = false;
    return std::move(kept_);
  }

 private:
  bool wanted_ = false, lost_ = false;
  std::unique_ptr<T> kept_;
};

// Of parts with a `mutex` and a `before` each: begins a cut, until end_cut() of which readers see
// what is there now, while others go on. Who changes a part first keeps a copy of it.
template <class Parts>
void begin_cut(Parts& parts) noexcept {
  for (auto& part : parts) {
    const lock_guard lock{part.mutex};
    part.before.begin();
  }
}
// False where memory ran out for what was there: what was seen is not of one moment.
template <class Parts>
bool end_cut(Parts& parts) noexcept {
  bool whole = true;
  for (auto& part : parts) {
    decltype(part.before.end()) gone;  // freed without the lock
    const lock_guard lock{part.mutex};
    whole = whole && !part.before.lost();
    gone = part.before.end();
  }
  return whole;
}

}  // namespace detail

// A time on the scale of exponential decay: counts made at different times are comparable once each
// is multiplied by 2^(t / half-life) (forward decay: Cormode et al. 2009), here split into a whole
// number of half-lives since 1970 and the rest, in [1, 2).
struct DecayMoment {
  std::uint32_t half_lives;
  double weight;
};

class Decay {
 public:
  // half_life: seconds, > 0.
  explicit Decay(std::int64_t half_life) noexcept : half_life_(half_life) {}

  DecayMoment at(std::int64_t timestamp) const noexcept {
    const std::int64_t last = half_life_ * max_half_lives;
    const std::int64_t t = std::clamp<std::int64_t>(timestamp, 0, last);
    const std::int64_t whole = t / half_life_;
    return {
        static_cast<std::uint32_t>(whole),
        std::exp2(static_cast<double>(t - whole * half_life_) / static_cast<double>(half_life_))};
  }

  static constexpr std::int64_t max_half_lives = 4095;

 private:
  std::int64_t half_life_;
};

// Four decayed counters an item, 32 bytes together. Any number of threads may add and read; no
// increment is lost but for those made 52 half-lives and more before the newest. Nothing sweeps
// over the items: a counter is aged when it is next touched.
class ItemCounters {
 public:
  enum class Kind : std::uint32_t {
    positive,      // events attributed to an impression
    expected,      // of its impressions
    interactions,  // events of any kind
    unconfirmed,   // of the positive ones, those whose impression only the event itself reported
  };

  explicit ItemCounters(std::size_t items = 0) : items_(items) { grow(); }

  // A counter table for more items that shares those that exist already: an increment through
  // either is seen through both.
  ItemCounters grown(std::size_t items) const {
    ItemCounters table = *this;
    table.items_ = std::max(items, items_);
    table.grow();
    return table;
  }

  std::size_t size() const noexcept { return items_; }
  std::size_t bytes() const noexcept {
    return blocks_.size() * detail::allocated(sizeof(Block) + 16) + detail::allocated(blocks_);
  }

  // Begins a cut, while nobody adds: until end_cut(), at_cut() shows the counts that are there now,
  // while others go on adding. Who adds to a block first keeps a copy of it.
  void begin_cut() noexcept {
    for (const auto& block : blocks_) block->cut.store(wanted, detail::memory_order_relaxed);
  }
  // The counts of the cut, for value() and to be written.
  ItemCounters at_cut() const {
    ItemCounters table(*this);
    table.at_cut_ = true;
    return table;
  }
  // The same with `factor` times as many interactions.
  ItemCounters scaled(double factor) const {
    ItemCounters table(*this);
    table.interactions_ = factor;
    return table;
  }
  // False where memory ran out for what was there: what was seen is not of one moment.
  bool end_cut() noexcept {
    bool whole = true;
    for (const auto& block : blocks_) {
      std::uint32_t was = block->cut.load(detail::memory_order_acquire);
      while (was == copying ||
             !block->cut.compare_exchange_weak(was, none, detail::memory_order_acquire))
        was = block->cut.load(detail::memory_order_acquire);
      whole = whole && was != lost;
      block->before.reset();
    }
    return whole;
  }

  // Of one kind, takes each count times factor, in [0, 1]; while nobody adds.
  void scale(Kind kind, double factor) noexcept {
    for (std::uint32_t item = 0; item < items_; ++item) {
      detail::atomic<std::uint64_t>& word = at(kind, item);
      const std::uint64_t old = word.load(detail::memory_order_relaxed);
      if ((old & value_mask) == 0) continue;
      keep(*blocks_[item / block_items]);
      const auto kept = static_cast<std::uint64_t>(static_cast<double>(old & value_mask) * factor);
      word.store((old & ~value_mask) | std::min(kept, value_mask), detail::memory_order_relaxed);
    }
  }

  // Counts are integers, and come back as they were.
  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    std::uint64_t items = self.items_;
    archive(items);
    if constexpr (Archive::reads) {
      // Of what is not there no memory is taken.
      if (items > archive.left() / (kinds * sizeof(std::uint64_t))) return archive.fail();
      self.items_ = static_cast<std::size_t>(items);
      self.blocks_.clear();
      self.grow();
    }
    for (std::size_t b = 0; b < self.blocks_.size(); ++b) {
      Block& block = *self.blocks_[b];
      const std::size_t count = std::min(block_items, self.items_ - b * block_items);
      if constexpr (Archive::reads) {
        for (std::size_t i = 0; i < kinds * count; ++i) {
          std::uint64_t word = 0;
          archive(word);
          block.counts[i].store(word, detail::memory_order_relaxed);
        }
        for (std::size_t w = 0; w < (count + 63) / 64; ++w) {
          std::uint64_t word = 0;
          archive(word);
          if (w == count / 64 && word >> (count % 64) != 0) archive.fail();
          block.touched[w].store(word, detail::memory_order_relaxed);
        }
      } else {
        const Kept* const before = self.at_cut_ ? self.kept(block) : nullptr;
        for (std::size_t i = 0; i < kinds * count; ++i)
          archive(before ? before->counts[i] : block.counts[i].load(detail::memory_order_relaxed));
        for (std::size_t w = 0; w < (count + 63) / 64; ++w)
          archive(before ? before->touched[w]
                         : block.touched[w].load(detail::memory_order_relaxed));
      }
    }
  }

  // Items added to since they were last taken, ascending, appended to `items`. O(size() / 64).
  void take_touched(Vector<std::uint32_t>& items) {
    std::size_t count = 0;
    for (const auto& block : blocks_)
      for (const auto& word : block->touched)
        count += static_cast<std::size_t>(std::popcount(word.load(detail::memory_order_relaxed)));
    items.reserve(items.size() + count + 64);
    for (std::size_t w = 0; w < blocks_.size() * block_items / 64; ++w) {
      auto& word = touched_word(w);
      if (word.load(detail::memory_order_relaxed) == 0) continue;
      // What came meanwhile and has no room is left for the next time.
      if (items.capacity() - items.size() < 64) break;
      keep(*blocks_[w / (block_items / 64)]);
      std::uint64_t bits = word.exchange(0, detail::memory_order_acquire);
      for (; bits != 0; bits &= bits - 1)
        items.push_back(
            static_cast<std::uint32_t>(w * 64 + static_cast<unsigned>(std::countr_zero(bits))));
    }
  }
  void touch(std::uint32_t item) noexcept {
    auto& word = touched_word(item / 64);
    const std::uint64_t bit = std::uint64_t{1} << (item % 64);
    if ((word.load(detail::memory_order_relaxed) & bit) == 0)
      word.fetch_or(bit, detail::memory_order_release);
  }

  // Adds amount >= 0, counted in steps of 2^-22; a counter holds at most 2^29. item < size().
  void add(Kind kind, std::uint32_t item, double amount, const DecayMoment& moment) noexcept {
    keep(*blocks_[item / block_items]);
    detail::atomic<std::uint64_t>& word = at(kind, item);
    const double steps = amount * moment.weight * unit;
    const std::uint64_t whole = rounded(steps);
    std::uint64_t old = word.load(detail::memory_order_relaxed), sum;
    do {
      const std::uint64_t epoch = old >> value_bits, now = moment.half_lives;
      const std::uint64_t value =
          epoch == now ? (old & value_mask) + whole
          : epoch < now
              ? aged(old, now) + whole
              : (old & value_mask) + rounded(std::ldexp(steps, -static_cast<int>(epoch - now)));
      sum = std::max(epoch, now) << value_bits | std::min(value, value_mask);
    } while (!word.compare_exchange_weak(old, sum, detail::memory_order_relaxed));
    touch(item);
  }

  // The count as it has decayed by `moment`.
  double value(Kind kind, std::uint32_t item, const DecayMoment& moment) const noexcept {
    const Kept* const before = at_cut_ ? kept(*blocks_[item / block_items]) : nullptr;
    const std::uint64_t word = before ? before->counts[place(kind, item)]
                                      : at(kind, item).load(detail::memory_order_relaxed);
    if ((word & value_mask) == 0) return 0;
    // A moment long before the last addition is taken for the half-life before it.
    const int age =
        std::min(static_cast<int>(word >> value_bits) - static_cast<int>(moment.half_lives), 1);
    const double factor = kind == Kind::interactions ? interactions_ : 1.0;
    return factor *
           std::ldexp(static_cast<double>(word & value_mask) / (unit * moment.weight), age);
  }

  // Brings the item's counters into the cache ahead of an add.
  PERSONALIZE_INLINE void prefetch(std::uint32_t item) const noexcept {
    __builtin_prefetch(&at(Kind::positive, item), 1);
  }

 private:
  static constexpr unsigned value_bits = 52;
  static constexpr std::uint64_t value_mask = (std::uint64_t{1} << value_bits) - 1;
  static constexpr double unit = 0x1p22;
  static constexpr std::size_t block_items = 4096, kinds = 4;
  // What is to be kept of a block at a cut: nothing; the block as it is; who does is at it; it is
  // in `before`; memory ran out for it.
  static constexpr std::uint32_t none = 0, wanted = 1, copying = 2, done = 3, lost = 4;
  struct Kept {
    std::array<std::uint64_t, kinds * block_items> counts;
    std::array<std::uint64_t, block_items / 64> touched;
  };
  struct Block {
    std::array<detail::atomic<std::uint64_t>, kinds * block_items> counts;
    std::array<detail::atomic<std::uint64_t>, block_items / 64> touched;  // a bit an item
    detail::atomic<std::uint32_t> cut{none};
    std::unique_ptr<Kept> before;
  };
  static_assert(detail::atomic<std::uint64_t>::is_always_lock_free);

  // Ahead of a change.
  static void keep(Block& block) noexcept {
    if (block.cut.load(detail::memory_order_relaxed) != none) keep_now(block);
  }
  static void keep_now(Block& block) noexcept {
    std::uint32_t was = wanted;
    if (!block.cut.compare_exchange_strong(was, copying, detail::memory_order_acquire)) {
      // Another thread is at it, for some microseconds.
      while (block.cut.load(detail::memory_order_acquire) == copying) detail::yield();
      return;
    }
    block.before.reset(new (std::nothrow) Kept);
    if (block.before) {
      for (std::size_t i = 0; i < block.counts.size(); ++i)
        block.before->counts[i] = block.counts[i].load(detail::memory_order_relaxed);
      for (std::size_t w = 0; w < block.touched.size(); ++w)
        block.before->touched[w] = block.touched[w].load(detail::memory_order_relaxed);
    }
    block.cut.store(block.before ? done : lost, detail::memory_order_release);
  }
  // As of the cut; null where there is none, or memory ran out.
  static const Kept* kept(Block& block) noexcept {
    keep(block);
    return block.cut.load(detail::memory_order_acquire) == done ? block.before.get() : nullptr;
  }

  static std::uint64_t rounded(double steps) noexcept {
    // What a file says that is not ours may be less than nothing.
    if (!(steps > 0)) return 0;
    return steps < 0x1p52 - 1 ? static_cast<std::uint64_t>(steps + 0.5) : value_mask;
  }

  static std::uint64_t aged(std::uint64_t word, std::uint64_t epoch) noexcept {
    const std::uint64_t age = epoch - (word >> value_bits);
    return age < value_bits ? (word & value_mask) >> age : 0;
  }

  static std::size_t place(Kind kind, std::uint32_t item) noexcept {
    return kinds * (item % block_items) + static_cast<std::uint32_t>(kind);
  }
  detail::atomic<std::uint64_t>& at(Kind kind, std::uint32_t item) const noexcept {
    return blocks_[item / block_items]->counts[place(kind, item)];
  }
  detail::atomic<std::uint64_t>& touched_word(std::size_t w) const noexcept {
    return blocks_[w / (block_items / 64)]->touched[w % (block_items / 64)];
  }

  void grow() {
    while (blocks_.size() * block_items < items_) blocks_.push_back(std::make_shared<Block>());
  }

  std::size_t items_;
  bool at_cut_ = false;
  double interactions_ = 1;  // factor, see scaled()
  std::vector<std::shared_ptr<Block>> blocks_;
};

// An item's sums over its impressions, decayed as its counters are: of the query where it was
// chosen, and of the query times the expected number of choices. Any number of threads may call;
// items are spread over 64 locks, under which a row is looked up, added to or copied and no more.
// Memory: 8 d + 32 bytes an item, within a budget; the items added to longest ago give way.
class ContextSums {
 public:
  // dimension: d, > 0. budget: bytes; at least one row in each of 64 parts is kept.
  explicit ContextSums(std::size_t dimension, std::size_t budget = std::size_t{64} << 20)
      : dimension_(dimension),
        most_rows_(
            std::clamp<std::size_t>(budget / stripe_count / (2 * dimension * sizeof(float) + 32), 1,
                                    std::size_t{1} << 24)) {}

  // Takes the item's memory, so that adding to it takes none. What is added to an item without is
  // left out.
  void prepare(std::uint32_t item) {
    Stripe& stripe = stripe_of(item);
    for (;;) {
      bool rows_full = false;
      std::size_t rows = 0, index_slots = 0;  // of a new index, or none
      {
        const detail::lock_guard lock{stripe.mutex};
        if (find(stripe, item)) return;
        const bool index_full = stripe.index.full();
        if (index_full) index_slots = std::max<std::size_t>(2 * stripe.index.capacity(), 1);
        rows_full = stripe.free == RecencyList::none && stripe.rows.size() < most_rows_ &&
                    stripe.rows.size() == stripe.blocks.size() * block_rows;
        rows = stripe.rows.size();
        if (!index_full && !rows_full) {
          row_in(stripe, item);
          return;
        }
      }
      grow(stripe, index_slots, rows_full, rows);
    }
  }

  void add_positive(std::uint32_t item, std::span<const float> query,
                    const DecayMoment& moment) noexcept {
    add(item, query, 1.0, 0, moment);
  }
  void add_expected(std::uint32_t item, std::span<const float> query, double expected,
                    const DecayMoment& moment) noexcept {
    add(item, query, expected, dimension_, moment);
  }

  // For for_each() and write_stripe().
  void begin_cut() noexcept { detail::begin_cut(stripes_); }
  bool end_cut() noexcept { return detail::end_cut(stripes_); }

  // Calls visit(item, positive, expected), each sum [d] as it has decayed by `moment`, those of an
  // item's stripe from the least recently added to on; no lock is held meanwhile.
  template <class Visit>
  void for_each(const DecayMoment& moment, Visit visit) const {
    Sums copy;
    for (const Stripe& stripe : stripes_) {
      copy_of(stripe, copy);
      const Vector<Row>& rows = copy.rows;
      Vector<float>& sums = copy.values;
      for (std::size_t r = 0; r < rows.size(); ++r) {
        const double scale =
            std::ldexp(1.0 / moment.weight,
                       static_cast<int>(rows[r].half_lives) - static_cast<int>(moment.half_lives));
        const std::span<float> all(sums.data() + r * 2 * dimension_, 2 * dimension_);
        for (float& sum : all) sum = static_cast<float>(scale * static_cast<double>(sum));
        visit(rows[r].item, std::span<const float>(all.first(dimension_)),
              std::span<const float>(all.subspan(dimension_)));
      }
    }
  }

  // Gives up an item's sums; the memory serves other items.
  void forget(std::uint32_t item) noexcept {
    Stripe& stripe = stripe_of(item);
    const detail::lock_guard lock{stripe.mutex};
    if (const auto row = find(stripe, item)) {
      keep(stripe);
      release(stripe, *row);
    }
  }

  // A part of what is there, to be written: rows by how long ago they were added to. stripe: below
  // stripe_count.
  void write_stripe(std::size_t stripe, detail::FieldWriter& archive) const {
    Sums copy;
    copy_of(stripes_[stripe], copy);
    archive(static_cast<std::uint64_t>(copy.rows.size()));
    for (const Row& row : copy.rows) archive(row.item, row.half_lives);
    for (std::size_t v = 0; v < copy.rows.size() * 2 * dimension_; ++v) archive(copy.values[v]);
  }
  // Into a stripe without rows. items: how many there are.
  void read_stripe(std::size_t number, detail::FieldReader& archive, std::size_t items) {
    Stripe& stripe = stripes_[number];
    Vector<Row> rows;
    std::uint64_t count = 0;
    archive(count);
    if (count > archive.left() / (2 * sizeof(std::uint32_t))) return archive.fail();
    for (std::uint64_t r = 0; r < count; ++r) {
      Row row;
      archive(row.item, row.half_lives);
      if (row.item >= items || row.item % stripe_count != number ||
          row.half_lives > Decay::max_half_lives)
        return archive.fail();
      rows.push_back(row);
    }
    for (const Row& row : rows) {
      {
        const detail::lock_guard lock{stripe.mutex};
        if (find(stripe, row.item)) return archive.fail();
      }
      prepare(row.item);
      const detail::lock_guard lock{stripe.mutex};
      const auto at = find(stripe, row.item);
      if (!at) return archive.fail();
      stripe.rows[*at].half_lives = row.half_lives;
      float* const sums = sums_of(stripe, *at);
      for (std::size_t c = 0; c < 2 * dimension_; ++c) archive(sums[c]);
      if (!detail::all_finite({sums, 2 * dimension_})) return archive.fail();
    }
  }

  static constexpr std::size_t stripe_count = 64;

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Stripe& stripe : stripes_) {
      const detail::lock_guard lock{stripe.mutex};
      sum += stripe.index.bytes() + detail::allocated(stripe.rows) +
             detail::allocated(stripe.blocks) +
             stripe.blocks.size() * detail::allocated(block_rows * 2 * dimension_ * sizeof(float));
    }
    return sum;
  }

 private:
  using RecencyList = detail::RecencyList;
  static constexpr std::size_t block_rows = 16;
  static constexpr std::uint32_t no_item = std::numeric_limits<std::uint32_t>::max();

  struct Row {
    std::uint32_t item = no_item;
    std::uint32_t half_lives = 0;
    RecencyList::Links links;
  };
  // What a stripe holds, in the order in which it was added to.
  struct Sums {
    Vector<Row> rows;
    Vector<float> values;  // [rows, 2 d]
  };
  struct Stripe {
    mutable detail::RankedMutex<2> mutex;
    detail::Before<Sums> before;
    detail::HashIndex index;
    Vector<Row> rows;
    Vector<std::unique_ptr<float[]>> blocks;  // of block_rows rows: positive, then expected
    RecencyList order;
    std::uint32_t free = RecencyList::none;  // a row without an item, its links.older the next
  };

  Stripe& stripe_of(std::uint32_t item) noexcept { return stripes_[item % stripe_count]; }
  static std::uint64_t hash_of(std::uint32_t item) noexcept {
    return (item + std::uint64_t{1}) * 0x9e3779b97f4a7c15u;
  }
  static std::optional<std::uint32_t> find(const Stripe& stripe, std::uint32_t item) noexcept {
    return stripe.index.find(hash_of(item),
                             [&](std::uint32_t row) { return stripe.rows[row].item == item; });
  }
  float* sums_of(const Stripe& stripe, std::uint32_t row) const noexcept {
    return stripe.blocks[row / block_rows].get() + row % block_rows * 2 * dimension_;
  }
  static auto links_in(Stripe& stripe) noexcept {
    return [&stripe](std::uint32_t row) -> RecencyList::Links& { return stripe.rows[row].links; };
  }

  // Ahead of a change, under the lock.
  void keep(Stripe& stripe) const noexcept {
    stripe.before.keep([&] {
      auto copy = std::make_unique<Sums>();
      reserve(stripe, *copy);
      copy_rows(stripe, *copy);
      return copy;
    });
  }
  void reserve(const Stripe& stripe, Sums& copy) const {
    copy.rows.reserve(stripe.rows.size());
    copy.values.reserve(stripe.rows.size() * 2 * dimension_);
  }
  void copy_rows(const Stripe& stripe, Sums& copy) const noexcept {
    copy.rows.clear();
    copy.values.clear();
    for (std::uint32_t r = stripe.order.oldest(); r != RecencyList::none;
         r = stripe.rows[r].links.newer) {
      copy.rows.push_back(stripe.rows[r]);  // reserved
      const float* const sums = sums_of(stripe, r);
      copy.values.insert(copy.values.end(), sums, sums + 2 * dimension_);
    }
  }
  // As of the cut, where there is one. Memory is taken without the lock.
  void copy_of(const Stripe& stripe, Sums& copy) const {
    for (;;) {
      {
        const detail::lock_guard lock{stripe.mutex};
        if (const Sums* const before = stripe.before.get()) {
          copy.rows = before->rows;
          copy.values = before->values;
          return;
        }
        if (copy.rows.capacity() >= stripe.rows.size() &&
            copy.values.capacity() >= stripe.rows.size() * 2 * dimension_)
          return copy_rows(stripe, copy);
      }
      copy.rows.reserve(most_rows_);
      copy.values.reserve(most_rows_ * 2 * dimension_);
    }
  }

  // Memory is taken without the lock.
  void grow(Stripe& stripe, std::size_t index_slots, bool rows, std::size_t count) const {
    detail::HashIndex larger;
    Vector<Row> more_rows;
    Vector<std::unique_ptr<float[]>> blocks;
    std::unique_ptr<float[]> block;
    if (index_slots != 0) larger = detail::HashIndex::of_capacity(index_slots);
    if (rows) {
      more_rows.reserve(count + block_rows);
      blocks.reserve(count / block_rows + 1);
      block.reset(new float[block_rows * 2 * dimension_]);
    }
    const detail::lock_guard lock{stripe.mutex};
    if (stripe.index.full() && larger.capacity() > stripe.index.capacity()) {
      larger.take(stripe.index);
      std::swap(larger, stripe.index);
    }
    if (rows && stripe.rows.size() == count && stripe.blocks.size() * block_rows == count) {
      more_rows.assign(stripe.rows.begin(), stripe.rows.end());
      more_rows.swap(stripe.rows);
      for (auto& old : stripe.blocks) blocks.push_back(std::move(old));
      blocks.push_back(std::move(block));
      blocks.swap(stripe.blocks);
    }
  }

  // The item's row; where it has none, a free one, a new one there is memory for, or the one added
  // to longest ago. The caller holds the lock. None where there is no memory.
  std::optional<std::uint32_t> row_in(Stripe& stripe, std::uint32_t item) noexcept {
    auto row = find(stripe, item);
    keep(stripe);
    if (row) {
      stripe.order.touch(*row, links_in(stripe));
      return row;
    }
    if (stripe.free == RecencyList::none) {
      if (stripe.rows.size() < std::min(most_rows_, stripe.blocks.size() * block_rows)) {
        stripe.rows.emplace_back();  // reserved with its block
        stripe.free = static_cast<std::uint32_t>(stripe.rows.size() - 1);
      } else if (stripe.order.oldest() != RecencyList::none) {
        release(stripe, stripe.order.oldest());
      } else {
        return std::nullopt;
      }
    }
    if (stripe.index.full()) return std::nullopt;
    row = stripe.free;
    stripe.free = stripe.rows[*row].links.older;
    stripe.rows[*row].item = item;
    stripe.rows[*row].half_lives = 0;
    std::fill_n(sums_of(stripe, *row), 2 * dimension_, 0.0f);
    stripe.index.insert(hash_of(item), *row);
    stripe.order.add(*row, links_in(stripe));
    return row;
  }

  static void release(Stripe& stripe, std::uint32_t row) noexcept {
    stripe.index.erase(hash_of(stripe.rows[row].item), row);
    stripe.order.remove(row, links_in(stripe));
    stripe.rows[row].item = no_item;
    stripe.rows[row].links.older = stripe.free;
    stripe.free = row;
  }

  void add(std::uint32_t item, std::span<const float> query, double amount, std::size_t offset,
           const DecayMoment& moment) noexcept {
    Stripe& stripe = stripe_of(item);
    const detail::lock_guard lock{stripe.mutex};
    const auto number = row_in(stripe, item);
    if (!number) return;
    Row& row = stripe.rows[*number];
    float* const sums = sums_of(stripe, *number);
    if (moment.half_lives > row.half_lives) {
      const float scale =
          std::ldexp(1.0f, static_cast<int>(row.half_lives) - static_cast<int>(moment.half_lives));
      for (std::size_t c = 0; c < 2 * dimension_; ++c) sums[c] *= scale;
      row.half_lives = moment.half_lives;
    }
    const auto factor = static_cast<float>(
        std::ldexp(amount * moment.weight,
                   static_cast<int>(moment.half_lives) - static_cast<int>(row.half_lives)));
    for (std::size_t c = 0; c < dimension_; ++c) sums[offset + c] += factor * query[c];
  }

  std::size_t dimension_;
  std::size_t most_rows_;  // a stripe
  std::array<Stripe, stripe_count> stripes_;
};

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 12: slates. Owns each user's recent impressions, the slates behind recommendation ids, and
// the log's entries as lines. Uses rooms 1, 2 and 11.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

// What one user was shown lately and did not choose: at most 64 items, the one shown longest ago
// gives way. The count of an item fades with a half-life of 7 days. Not thread-safe.
class RecentImpressions {
 public:
  static constexpr std::size_t capacity = 64;
  static constexpr std::int64_t half_life = 7 * 86'400;

  struct Entry {
    std::uint32_t item;
    float count;            // as of `seconds`
    std::uint32_t seconds;  // since 1970
  };

  // The same on entries that lie elsewhere: count of them, with room for one more up to capacity.
  static void add(Entry* entries, std::size_t& count, std::uint32_t item,
                  std::int64_t timestamp) noexcept {
    const std::uint32_t seconds = seconds_of(timestamp);
    Entry* entry = find(entries, count, item);
    if (!entry) {
      entry = count < capacity
                  ? entries + count++
                  : std::min_element(entries, entries + count, [](const Entry& a, const Entry& b) {
                      return a.seconds < b.seconds;
                    });
      *entry = {item, 0, seconds};
    }
    entry->count = 1.0f + faded(*entry, timestamp);
    entry->seconds = std::max(entry->seconds, seconds);
  }
  static void remove(Entry* entries, std::size_t& count, std::uint32_t item) noexcept {
    if (Entry* entry = find(entries, count, item)) *entry = entries[--count];
  }
  static Entry* find(Entry* entries, std::size_t count, std::uint32_t item) noexcept {
    Entry* const found = std::find_if(entries, entries + count,
                                      [item](const Entry& entry) { return entry.item == item; });
    return found == entries + count ? nullptr : found;
  }
  static float faded(const Entry& entry, std::int64_t timestamp) noexcept {
    const double age =
        std::max(0.0, static_cast<double>(timestamp) - static_cast<double>(entry.seconds));
    return entry.count * std::exp2(static_cast<float>(-age / half_life));
  }

  void add(std::uint32_t item, std::int64_t timestamp) {
    std::size_t count = entries_.size();
    if (count < capacity) entries_.emplace_back();
    add(entries_.data(), count, item, timestamp);
    entries_.resize(count);
  }
  // The user chose the item: what came before is no longer held against it.
  void remove(std::uint32_t item) noexcept {
    std::size_t count = entries_.size();
    remove(entries_.data(), count, item);
    entries_.resize(count);
  }
  float count(std::uint32_t item, std::int64_t timestamp) const noexcept {
    for (const Entry& entry : entries_)
      if (entry.item == item) return faded(entry, timestamp);
    return 0;
  }
  template <class Visit>
  void for_each(std::int64_t timestamp, Visit visit) const {
    for (const Entry& entry : entries_) visit(entry.item, faded(entry, timestamp));
  }
  std::size_t size() const noexcept { return entries_.size(); }

 private:
  static std::uint32_t seconds_of(std::int64_t timestamp) noexcept {
    return static_cast<std::uint32_t>(
        std::clamp<std::int64_t>(timestamp, 0, std::numeric_limits<std::uint32_t>::max()));
  }
  Vector<Entry> entries_;
};

// One pick of a remembered slate; its place is its index. "Log clicks": the natural logarithm of an
// expected number of positive events.
struct LoggedPick {
  std::uint32_t item = 0;
  float relevance = 0;    // S, the model's score less the user's own normaliser (room 13)
  float adjustment = 0;   // what feedback added when served, in log clicks
  float expected = 0;     // positive events expected of the impression by the model alone
  float value = 0;        // the same by all that is known
  float examination = 1;  // probability that a user looks at this place
  bool explored = false, seen = false, positive = false;

  bool is_finite() const noexcept {
    return detail::all_finite(std::array{relevance, adjustment, expected, value, examination});
  }
  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    archive(self.item, self.relevance, self.adjustment, self.expected, self.value, self.examination,
            self.explored, self.seen, self.positive);
  }
};

// What only RecommenderOptions::log needs of a pick, remembered where it is set.
struct LoggedChoice {
  SlotChoice choice;     // pool_value times examination
  float best_value = 0;  // value, had the slot gone to choice.best

  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    auto& choice = self.choice;
    archive(choice.pick.item, choice.pick.score, choice.best.item, choice.best.score,
            choice.explored, choice.propensity, choice.pool_share, choice.pool_logit,
            choice.pool_value, self.best_value);
  }
};

struct LoggedSlate {
  std::int64_t timestamp = 0;
  Vector<float> query;  // the user's, when served; empty for a user without events
  std::vector<LoggedPick> picks;
  std::vector<LoggedChoice> choices;  // as many as picks, or none

  // Of whose numbers the archive, or who reads, knows already.
  template <class Archive, class Self>
  static void each_pick(Archive& archive, Self& self) {
    for (auto& pick : self.picks) LoggedPick::each_field(archive, pick);
    for (auto& choice : self.choices) LoggedChoice::each_field(archive, choice);
  }
  // Of what was read: whether there are such items, of so many, and numbers that exist.
  bool is_sound(std::size_t items) const noexcept {
    for (const LoggedPick& pick : picks)
      if (pick.item >= items || !pick.is_finite()) return false;
    for (const LoggedChoice& choice : choices)
      if (choice.choice.pick.item >= items || choice.choice.best.item >= items) return false;
    return detail::all_finite(query);
  }
};

enum class SlateStatus : std::uint8_t {
  found,
  expired,  // the id is genuine, but too old or displaced by newer slates
  unknown,  // not an id of this recommender for this user
};

// The last slates, each found again by its recommendation id: its number and a keyed hash of number
// and owner, so that ids can be neither guessed nor used for another user. Any number of threads
// may call. An owner's slates all lie in one of up to 64 parts, each a ring under a lock of its
// own: who asks for many slates displaces those of his part only. Memory: the budget, taken at
// once.
class SlateLog {
 public:
  // capacity: slates, >= 1; expiry: seconds; budget: bytes; dimension: of queries; with_choices:
  // whether LoggedChoice is kept.
  SlateLog(std::size_t capacity, std::int64_t expiry, const detail::HashKey& key,
           std::size_t budget = std::size_t{64} << 20, std::size_t dimension = 0,
           bool with_choices = false)
      : key_(key),
        expiry_(expiry),
        dimension_(dimension),
        with_choices_(with_choices),
        stripes_(std::bit_floor(
            std::clamp<std::size_t>(std::min(capacity / 16, budget >> 18), 1, most_stripes))) {
    const std::size_t slots = std::max<std::size_t>(capacity / stripes_.size(), 1);
    const std::size_t bytes = budget / stripes_.size();
    const std::size_t least = slate_size(1, dimension > 0) * slates_a_ring;
    ring_size_ = std::max(bytes - std::min(bytes, slots * sizeof(Slot)), least);
    for (Stripe& stripe : stripes_) {
      stripe.ring.slots.resize(slots);
      stripe.ring.bytes.resize(ring_size_);
    }
  }

  // Of a slate only so many first places are remembered, so that no slate displaces all others.
  std::size_t most_picks() const noexcept {
    return (ring_size_ / slates_a_ring - slate_size(0, true)) / pick_size();
  }

  // What tells a slate from all others.
  struct Number {
    std::uint64_t number = 0;  // 0: of none
    std::uint64_t order = 0;   // among the slates of all owners
  };

  // The owner's next one.
  Number next(std::string_view owner) noexcept {
    const std::size_t s = stripe_of(owner_hash(owner));
    Stripe& stripe = stripes_[s];
    const detail::lock_guard lock{stripe.mutex};
    keep(stripe);
    return {stripe.ring.next++ * stripes_.size() + s,
            order_.fetch_add(1, detail::memory_order_relaxed)};
  }

  // Remembers the owner's slate under a number that next() gave, here or in the process before;
  // what is behind most_picks() is not read. now: by the clock. Takes no memory.
  void add(const Number& number, std::string_view owner, const LoggedSlate& slate,
           std::int64_t now) noexcept {
    Slot slot;
    slot.number = number.number;
    slot.order = number.order;
    slot.owner = owner_hash(owner);
    slot.served = now;
    Stripe& stripe = stripes_[stripe_of(number.number)];
    const detail::lock_guard lock{stripe.mutex};
    keep(stripe);
    place(stripe, slot, slate);
  }

  // The recommendation id of the owner's slate of that number, to `id`, which has room for 32
  // characters or takes it.
  void write_id(std::uint64_t number, std::string_view owner, std::string& id) const {
    id.resize(32);
    const std::uint64_t of_both = tag(number, owner_hash(owner));
    for (std::size_t i = 0; i < 16; ++i) {
      id[15 - i] = digits[number >> (4 * i) & 15];
      id[31 - i] = digits[of_both >> (4 * i) & 15];
    }
  }

  // The number in an id that was made for this owner.
  std::optional<std::uint64_t> number_of(std::string_view id,
                                         std::string_view owner) const noexcept {
    if (id.size() != 32) return std::nullopt;
    std::array<std::uint64_t, 2> words{};
    for (std::size_t i = 0; i < 32; ++i) {
      const std::size_t digit = digits.find(id[i]);
      if (digit == std::string_view::npos) return std::nullopt;
      words[i / 16] = words[i / 16] << 4 | digit;
    }
    if (words[1] != tag(words[0], owner_hash(owner))) return std::nullopt;
    return words[0];
  }

  // Copies the slate to `slate`, whose memory is reused, where it is still remembered, and whether
  // its impressions were reported to `reported`. timestamp: of the event. A slate that was found
  // expired stays so.
  SlateStatus read(std::uint64_t number, std::int64_t timestamp, std::int64_t now,
                   LoggedSlate& slate, bool& reported) {
    // Memory first, without the lock.
    reserve(slate);
    Stripe& stripe = stripes_[stripe_of(number)];
    const detail::lock_guard lock{stripe.mutex};
    Slot* const slot = find(stripe, number);
    if (!slot) return SlateStatus::expired;
    if (detail::elapsed(slot->timestamp, timestamp) > expiry_ ||
        detail::elapsed(slot->served, now) > expiry_) {
      keep(stripe);
      slot->number = 0;
      return SlateStatus::expired;
    }
    copy(stripe.ring, *slot, slate);
    reported = slot->reported;
    return SlateStatus::found;
  }

  // Marks picks of a slate that read() found: change(place, LoggedPick&) for each, under the lock;
  // it may set what is a bool. Nothing where the slate was displaced meanwhile.
  template <class Change>
  void mark(std::uint64_t number, Change change) noexcept {
    Stripe& stripe = stripes_[stripe_of(number)];
    const detail::lock_guard lock{stripe.mutex};
    Slot* const slot = find(stripe, number);
    if (!slot) return;
    keep(stripe);
    slot->reported = true;
    std::byte* at = bytes_of(stripe.ring, *slot) + query_size(slot->has_query);
    for (std::uint32_t place = 0; place < slot->picks; ++place, at += sizeof(LoggedPick)) {
      LoggedPick pick;
      std::memcpy(&pick, at, sizeof pick);
      change(place, pick);
      std::memcpy(at, &pick, sizeof pick);
    }
  }

  // By id. The owner's.
  void add(std::string_view owner, const LoggedSlate& slate, std::int64_t now, std::string& id) {
    id.resize(32);
    const Number number = next(owner);
    add(number, owner, slate, now);
    write_id(number.number, owner, id);
  }
  SlateStatus read(std::string_view id, std::string_view owner, std::int64_t timestamp,
                   std::int64_t now, LoggedSlate& slate, bool& reported) {
    const auto number = number_of(id, owner);
    return number ? read(*number, timestamp, now, slate, reported) : SlateStatus::unknown;
  }
  template <class Change>
  void mark(std::string_view id, std::string_view owner, Change change) noexcept {
    if (const auto number = number_of(id, owner)) mark(*number, change);
  }

  // Visits remembered slates whose impressions were reported, newest first, at most `limit`; no
  // lock is held meanwhile. Cost: O(capacity) beside the visits.
  template <class Visit>
  void for_each_reported(std::size_t limit, Visit visit) const {
    struct Reported {
      std::uint64_t order, number;
    };
    Vector<Reported> newest;
    for (const Stripe& stripe : stripes_) {
      newest.reserve(newest.size() + stripe.ring.slots.size());
      const detail::lock_guard lock{stripe.mutex};
      const Ring& ring = at_cut(stripe);
      for (const Slot& slot : ring.slots)
        if (slot.reported && find(ring, slot.number)) newest.push_back({slot.order, slot.number});
    }
    const std::size_t count = std::min(limit, newest.size());
    std::partial_sort(newest.begin(), newest.begin() + static_cast<std::ptrdiff_t>(count),
                      newest.end(),
                      [](const Reported& a, const Reported& b) { return a.order > b.order; });
    LoggedSlate slate;
    reserve(slate);
    for (std::size_t i = 0; i < count; ++i) {
      const Stripe& stripe = stripes_[stripe_of(newest[i].number)];
      {
        const detail::lock_guard lock{stripe.mutex};
        const Ring& ring = at_cut(stripe);
        const Slot* slot = find(ring, newest[i].number);
        if (!slot) continue;
        copy(ring, *slot, slate);
      }
      visit(std::as_const(slate));
    }
  }

  // Gives up all slates of an owner.
  void forget(std::string_view owner) noexcept {
    const std::uint64_t of_owner = owner_hash(owner);
    // Those of a process whose log had another number of parts may lie in any of them.
    for (Stripe& stripe : stripes_) {
      const detail::lock_guard lock{stripe.mutex};
      for (Slot& slot : stripe.ring.slots) {
        if (slot.owner != of_owner) continue;
        keep(stripe);
        if (find(stripe, slot.number))
          std::memset(bytes_of(stripe.ring, slot), 0, slate_size(slot.picks, slot.has_query));
        slot = {};
      }
    }
  }

  // For for_each_reported() and write_stripe().
  void begin_cut() noexcept { detail::begin_cut(stripes_); }
  bool end_cut() noexcept { return detail::end_cut(stripes_); }

  // Forgets the queries of all slates, which are those of another model, and goes on with queries
  // of `dimension` or, where a slate has no room for one, without; while nobody else calls, but for
  // most_picks().
  void drop_queries(std::size_t dimension) noexcept {
    for (Stripe& stripe : stripes_) {
      const detail::lock_guard lock{stripe.mutex};
      keep(stripe);
      for (Slot& slot : stripe.ring.slots) {
        if (!slot.has_query) continue;
        slot.begin += query_size(true);
        slot.has_query = false;
      }
    }
    const bool fits = dimension * sizeof(float) + pick_size() <= ring_size_ / slates_a_ring;
    dimension_.store(fits ? dimension : 0, detail::memory_order_relaxed);
  }

  // The slates of a part, from the oldest on, as of the cut.
  std::size_t stripe_count() const noexcept { return stripes_.size(); }
  void write_stripe(std::size_t number, detail::FieldWriter& archive) const {
    const Stripe& stripe = stripes_[number];
    Ring ring;
    LoggedSlate slate;
    reserve(slate);
    ring.slots.reserve(stripe.ring.slots.size());  // without the lock
    ring.bytes.resize(ring_size_);
    {
      const detail::lock_guard lock{stripe.mutex};
      copy(at_cut(stripe), ring);
    }
    Vector<detail::Keyed> order;
    for (std::uint32_t s = 0; s < ring.slots.size(); ++s)
      if (find(ring, ring.slots[s].number)) order.push_back({ring.slots[s].order, s});
    detail::sort_by_key(order);
    archive(shape(), ring.next, ring.head, order_.load(detail::memory_order_relaxed),
            static_cast<std::uint64_t>(order.size()));
    for (const detail::Keyed& each : order) {
      const Slot& slot = ring.slots[each.index];
      copy(ring, slot, slate);
      Slot::each_field(archive, slot);
      for (const float v : slate.query) archive(v);
      LoggedSlate::each_pick(archive, std::as_const(slate));
    }
  }

  // How many slates write_stripe() wrote.
  static std::uint64_t count_written(detail::FieldReader archive) {
    Shape written;
    std::uint64_t next = 0, head = 0, order = 0, count = 0;
    archive(written, next, head, order, count);
    return count;
  }
  // What write_stripe() wrote, into a log that may have another shape: its slates then take their
  // places anew, and without choices where they have none. items: how many there are.
  void read_stripe(std::size_t stripe_number, detail::FieldReader& archive, std::size_t items) {
    Shape written;
    std::uint64_t next = 0, head = 0, order = 0, count = 0;
    archive(written, next, head, order, count);
    const bool same = archive.ok() && written == shape();
    order_.store(std::max(order_.load(), order));
    LoggedSlate slate;
    std::uint64_t last_order = 0;
    for (std::uint64_t i = 0; i < count && archive.ok(); ++i) {
      Slot slot;
      Slot::each_field(archive, slot);
      const bool has_query = slot.has_query;
      // Of what is not there no memory is taken.
      if (slot.number == 0 || (i > 0 && slot.order <= last_order) ||
          slot.picks > archive.left() / sizeof(float) ||
          (has_query && written.dimension > archive.left() / sizeof(float)))
        return archive.fail();
      last_order = slot.order;
      slate.timestamp = slot.timestamp;
      slate.query.resize(has_query ? static_cast<std::size_t>(written.dimension) : 0);
      for (float& v : slate.query) archive(v);
      slate.picks.resize(slot.picks);
      slate.choices.resize(written.choices != 0 ? slot.picks : 0);
      LoggedSlate::each_pick(archive, slate);
      if (!archive.ok() || !slate.is_sound(items)) return archive.fail();
      if (written.dimension != dimension()) slate.query.clear();
      Stripe& stripe = stripes_[stripe_of(slot.number)];
      const detail::lock_guard lock{stripe.mutex};
      if (same) {
        const std::size_t size = slate_size(slot.picks, slot.has_query);
        if (stripe_of(slot.number) != stripe_number) return archive.fail();
        // One that cannot lie where it did, after a journal that was not ours, gets a place anew.
        if (slot.begin >= stripe.ring.head && slot.begin <= head && head - slot.begin >= size &&
            head - slot.begin <= ring_size_ && ring_size_ - slot.begin % ring_size_ >= size)
          stripe.ring.head = slot.begin;
      }
      place(stripe, slot, slate);
    }
    if (!same || !archive.ok()) return;
    Ring& ring = stripes_[stripe_number].ring;
    if (next < ring.next) return archive.fail();
    ring.head = std::max(head, ring.head);
    ring.next = next;
  }

  std::size_t bytes() const noexcept {
    return stripes_.size() * (detail::allocated(ring_size_) +
                              detail::allocated(stripes_[0].ring.slots) + sizeof(Stripe));
  }

 private:
  struct Slot {
    std::uint64_t number = 0;  // 0: not used
    std::uint64_t order = 0;   // among the slates of all parts
    std::uint64_t owner = 0;   // hash
    std::int64_t timestamp = 0, served = 0;
    std::uint64_t begin = 0;  // bytes written to the ring before it
    std::uint32_t picks = 0;
    bool has_query = false;
    bool reported = false;  // an event or a call has said which picks were seen

    template <class Archive, class Self>
    static void each_field(Archive& archive, Self& self) {
      archive(self.number, self.order, self.owner, self.timestamp, self.served, self.begin,
              self.picks, self.has_query, self.reported);
    }
  };
  struct Ring {
    Vector<Slot> slots;
    detail::BareVector<std::byte> bytes;  // slates, each in one piece: query, picks, choices
    std::uint64_t head = 0;               // bytes written in all
    std::uint64_t next = 1;
  };
  struct Stripe {
    mutable detail::RankedMutex<2> mutex;
    detail::Before<Ring> before;
    Ring ring;
  };
  // Between logs of one shape slates can keep their places.
  struct Shape {
    std::uint64_t stripes = 0, slots = 0, ring_size = 0, dimension = 0, choices = 0;
    friend bool operator==(const Shape&, const Shape&) = default;
  };
  static constexpr std::size_t most_stripes = 64;
  static constexpr std::size_t slates_a_ring = 16;  // the largest
  static constexpr std::string_view digits = "0123456789abcdef";
  static_assert(std::is_trivially_copyable_v<LoggedPick> &&
                std::is_trivially_copyable_v<LoggedChoice>);

  Shape shape() const noexcept {
    return {stripes_.size(), stripes_[0].ring.slots.size(), ring_size_, dimension(), with_choices_};
  }
  std::size_t dimension() const noexcept { return dimension_.load(detail::memory_order_relaxed); }
  std::size_t query_size(bool query) const noexcept {
    return query ? dimension() * sizeof(float) : 0;
  }
  std::size_t pick_size() const noexcept {
    return sizeof(LoggedPick) + (with_choices_ ? sizeof(LoggedChoice) : 0);
  }
  std::size_t slate_size(std::size_t picks, bool query) const noexcept {
    return picks * pick_size() + query_size(query);
  }

  // Of an owner's hash, or of a slate's number.
  std::size_t stripe_of(std::uint64_t number) const noexcept {
    return static_cast<std::size_t>(number % stripes_.size());
  }

  // Not displaced: its slot is still its own, and so are its bytes.
  const Slot* find(const Ring& ring, std::uint64_t number) const noexcept {
    const Slot& slot =
        ring.slots[static_cast<std::size_t>(number / stripes_.size() % ring.slots.size())];
    return number != 0 && slot.number == number && slot.begin + ring_size_ >= ring.head ? &slot
                                                                                        : nullptr;
  }
  Slot* find(Stripe& stripe, std::uint64_t number) const noexcept {
    return const_cast<Slot*>(find(std::as_const(stripe.ring), number));
  }
  std::byte* bytes_of(Ring& ring, const Slot& slot) const noexcept {
    return ring.bytes.data() + slot.begin % ring_size_;
  }
  const std::byte* bytes_of(const Ring& ring, const Slot& slot) const noexcept {
    return ring.bytes.data() + slot.begin % ring_size_;
  }

  static const Ring& at_cut(const Stripe& stripe) noexcept {
    return stripe.before.or_now(stripe.ring);
  }
  // Ahead of a change, under the lock.
  void keep(Stripe& stripe) const noexcept {
    stripe.before.keep([&] {
      auto kept = std::make_unique<Ring>();
      kept->slots.reserve(stripe.ring.slots.size());
      kept->bytes.resize(ring_size_);
      copy(stripe.ring, *kept);
      return kept;
    });
  }
  // Into one that has the memory; of the bytes, those that were ever written.
  void copy(const Ring& from, Ring& to) const noexcept {
    to.slots.assign(from.slots.begin(), from.slots.end());
    const auto used = static_cast<std::size_t>(std::min<std::uint64_t>(from.head, ring_size_));
    if (used > 0) std::memcpy(to.bytes.data(), from.bytes.data(), used);
    to.head = from.head;
    to.next = from.next;
  }

  // Puts the slate behind the last one. slot: number, order, owner, served, reported.
  void place(Stripe& stripe, Slot slot, const LoggedSlate& slate) noexcept {
    Ring& ring = stripe.ring;
    const std::size_t picks = std::min(slate.picks.size(), most_picks());
    slot.timestamp = slate.timestamp;
    slot.picks = static_cast<std::uint32_t>(picks);
    slot.has_query = !slate.query.empty();
    const std::size_t size = slate_size(picks, slot.has_query);
    if (ring_size_ - ring.head % ring_size_ < size)
      ring.head += ring_size_ - ring.head % ring_size_;
    slot.begin = ring.head;
    ring.head += size;
    std::byte* at = bytes_of(ring, slot);
    at = put(at, slate.query.data(), slot.has_query ? dimension() : 0);
    at = put(at, slate.picks.data(), picks);
    if (with_choices_) {
      const std::size_t choices = std::min(picks, slate.choices.size());
      at = put(at, slate.choices.data(), choices);
      std::fill_n(at, (picks - choices) * sizeof(LoggedChoice), std::byte{0});
    }
    const std::uint64_t sequence = slot.number / stripes_.size();
    ring.slots[static_cast<std::size_t>(sequence % ring.slots.size())] = slot;
    // Numbers and orders of a journal are not given again.
    ring.next = std::max(ring.next, sequence + 1);
    std::uint64_t order = order_.load(detail::memory_order_relaxed);
    while (order <= slot.order &&
           !order_.compare_exchange_weak(order, slot.order + 1, detail::memory_order_relaxed)) {
    }
  }

  // Room for the largest slate, of whatever dimension.
  void reserve(LoggedSlate& slate) const {
    const std::size_t picks = ring_size_ / slates_a_ring / pick_size();
    slate.query.reserve(dimension());
    slate.picks.reserve(picks);
    if (with_choices_) slate.choices.reserve(picks);
  }

  template <class T>
  static std::byte* put(std::byte* at, const T* values, std::size_t count) noexcept {
    if (count > 0) std::memcpy(at, values, count * sizeof(T));
    return at + count * sizeof(T);
  }
  template <class Values>
  static const std::byte* take(const std::byte* at, Values& values, std::size_t count) noexcept {
    values.resize(count);  // reserved
    const std::size_t bytes = count * sizeof(typename Values::value_type);
    if (count > 0) std::memcpy(values.data(), at, bytes);
    return at + bytes;
  }
  void copy(const Ring& ring, const Slot& slot, LoggedSlate& slate) const noexcept {
    slate.timestamp = slot.timestamp;
    const std::byte* at = bytes_of(ring, slot);
    at = take(at, slate.query, slot.has_query ? dimension() : 0);
    at = take(at, slate.picks, slot.picks);
    take(at, slate.choices, with_choices_ ? slot.picks : 0);
  }

  std::uint64_t owner_hash(std::string_view owner) const noexcept {
    return detail::siphash(key_, detail::text_bytes(owner));
  }
  std::uint64_t tag(std::uint64_t number, std::uint64_t of_owner) const noexcept {
    const std::array<std::uint64_t, 2> both{number, of_owner};
    return detail::siphash(key_, std::as_bytes(std::span(both)));
  }

  detail::HashKey key_;
  std::int64_t expiry_;
  detail::atomic<std::size_t> dimension_;  // of queries; 0: they are not kept
  bool with_choices_;
  std::size_t ring_size_ = 0;
  detail::atomic<std::uint64_t> order_{1};
  std::vector<Stripe> stripes_;
};

namespace detail {

// Appends a field of a CSV, in quotes where it needs them (RFC 4180).
inline void append_csv_field(std::string_view field, std::string& line) {
  if (field.find_first_of(",\"\r\n") == std::string_view::npos) {
    line += field;
    return;
  }
  line += '"';
  for (const char c : field) line.append(c == '"' ? 2 : 1, c);
  line += '"';
}

// The fewest digits that read back as the value, in every locale.
template <class Number>
[[gnu::noinline]] void append_number(Number value, std::string& line) {
  if constexpr (std::is_integral_v<Number>) {
    line.append(Piece(value).text());
  } else {
    std::array<char, 32> text{};
    char* end = text.data();
#if defined(_LIBCPP_VERSION) && _LIBCPP_VERSION < 14000  // has std::to_chars of integers only
    using Limits = std::numeric_limits<Number>;
    for (int digits = Limits::digits10; digits <= Limits::max_digits10; ++digits) {
      end = text.data() +
            std::snprintf(text.data(), text.size(), "%.*g", digits, static_cast<double>(value));
      if (static_cast<Number>(std::strtod(text.data(), nullptr)) == value) break;
    }
    std::replace(text.begin(), text.end(), ',', '.');
#else
    end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
#endif
    line.append(text.data(), static_cast<std::size_t>(end - text.data()));
  }
}

}  // namespace detail

PERSONALIZE_API void append_csv(const LogEntry& entry, std::string& line) {
  const auto quoted = [&line](std::string_view text) {
    detail::append_csv_field(text, line);
    line += ',';
  };
  const auto number = [&line](auto value, char behind) {
    detail::append_number(value, line);
    line += behind;
  };
  number(entry.timestamp, ',');
  quoted(entry.user);
  quoted(entry.recommendation_id);
  quoted(entry.item);
  number(entry.position, ',');
  number(entry.positive ? 1 : 0, ',');
  number(entry.choice.propensity, ',');
  number(entry.choice.pick.item == entry.choice.best.item ? 1 : 0, ',');
  number(entry.choice.pool_share, ',');
  number(entry.choice.pool_logit, ',');
  number(entry.expected, ',');
  number(entry.best_expected, ',');
  number(entry.choice.pool_value, '\n');
}

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 13: exploration. Owns what impressions teach (calibration, posterior, vector correction),
// the random choice of a slate with its probabilities, and the memory in which a request makes it
// up. Uses rooms 1, 2, 3, 4, 8, 9, 10, 11 and 12.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

// From relevance S to expected positive events of an examined impression: exp(slope S + intercept).
struct Calibration {
  float slope = 1.0f;
  float intercept = 0.0f;
};

struct CalibrationSample {
  float relevance;    // S
  float adjustment;   // log clicks that are not the model's own
  float examination;  // > 0
  bool positive;
};

// Poisson regression by Newton's method of positive ~ examination exp(slope S + intercept +
// adjustment), under normal priors: slope ~ (1, 0.5^2), intercept ~ (0, 3^2). slope stays in
// [0.1, 4]. Cost: samples x iterations.
inline Calibration fit_calibration(std::span<const CalibrationSample> samples,
                                   const Calibration& start = {}) {
  constexpr double slope_precision = 4.0, intercept_precision = 1.0 / 9.0;
  double slope = static_cast<double>(start.slope), intercept = static_cast<double>(start.intercept);
  for (int iteration = 0; iteration < 30; ++iteration) {
    double gradient_slope = -slope_precision * (slope - 1), curvature_slope = slope_precision;
    double gradient_intercept = -intercept_precision * intercept;
    double curvature_intercept = intercept_precision, cross = 0;
    for (const CalibrationSample& sample : samples) {
      const auto relevance = static_cast<double>(sample.relevance);
      const double rate =
          static_cast<double>(sample.examination) *
          std::exp(std::min(slope * relevance + intercept + static_cast<double>(sample.adjustment),
                            5.0));
      const double residual = (sample.positive ? 1.0 : 0.0) - rate;
      gradient_slope += residual * relevance;
      gradient_intercept += residual;
      curvature_slope += rate * relevance * relevance;
      curvature_intercept += rate;
      cross += rate * relevance;
    }
    const double determinant = curvature_slope * curvature_intercept - cross * cross;
    const double step_slope =
        (curvature_intercept * gradient_slope - cross * gradient_intercept) / determinant;
    const double step_intercept =
        (curvature_slope * gradient_intercept - cross * gradient_slope) / determinant;
    slope = std::clamp(slope + std::clamp(step_slope, -0.5, 0.5), 0.1, 4.0);
    intercept = std::clamp(intercept + std::clamp(step_intercept, -1.0, 1.0), -20.0, 20.0);
    if (std::abs(step_slope) + std::abs(step_intercept) < 1e-6) break;
  }
  return {static_cast<float>(slope), static_cast<float>(intercept)};
}

// Positive events of an item, and how many its impressions let expect.
struct ItemFeedback {
  double positive = 0, expected = 0;
};

// An item's quality relative to the model: Gamma with shape `strength` and mean `mean`.
struct GammaPrior {
  double strength;
  double mean;
};

// Method of moments for positive ~ negative binomial: E = mu X, Var = mu X + mu^2 X^2 / strength
// (Agarwal, Chen, Elango 2009). Both are drawn towards `expected` as by 10 positive events and 20
// items; strength stays in [0.5, 50], mean in [0.1, 10].
inline GammaPrior fit_prior(std::span<const ItemFeedback> items, const GammaPrior& expected) {
  double positive = 10 * expected.mean, total = 10;
  for (const ItemFeedback& item : items) {
    positive += item.positive;
    total += item.expected;
  }
  const double mean = std::clamp(positive / total, 0.1, 10.0);
  // (residual^2 - x) / x^2 estimates 1 / strength; an item with few expected events tells little.
  double spread = 20 / expected.strength, weights = 20;
  for (const ItemFeedback& item : items) {
    const double x = mean * item.expected, residual = item.positive - x;
    spread += (residual * residual - x) / std::max(1.0, x * x);
    weights += std::min(1.0, x * x);
  }
  const double variance = std::max(spread / weights, 0.0);
  return {std::clamp(1.0 / std::max(variance, 1e-6), 0.5, 50.0), mean};
}

// The Gamma posterior matched to a log-normal: log quality ~ (mean, deviation^2).
struct QualityPosterior {
  float mean, deviation;
};

inline QualityPosterior posterior(const GammaPrior& prior, const ItemFeedback& item) noexcept {
  const double shape = prior.strength * prior.mean + item.positive;
  return {static_cast<float>(std::log(shape / (prior.strength + item.expected))),
          static_cast<float>(std::sqrt(std::log1p(1.0 / shape)))};
}

// Who likes an item, not only how many: a Bayesian linear layer on the queries (neural-linear:
// Riquelme et al. 2018), one second moment of the queries shared by all items.
class VectorCorrection {
 public:
  static constexpr double ridge = 16.0, damping = 0.7;

  // second_moment: [d, d], mean of query query^T. Cost: some 8 d^3.
  VectorCorrection(Vector<double> second_moment, std::size_t dimension,
                   const kernels::Table& table = kernels::chosen())
      : dimension_(dimension), padded_(kernels::padded(dimension)), table_(&table) {
    Vector<double> values(dimension), vectors(dimension * dimension);
    diagonalise(second_moment, vectors, values);
    values_.resize(padded_);
    zeros_.resize(padded_);
    for (std::size_t e = 0; e < dimension; ++e) {
      values_[e] = std::max(static_cast<float>(values[e]), 0.0f);
      trace_ += values_[e];
    }
    // As Kernels::matrix_vector wants them: [blocks][inputs][lanes].
    to_basis_.resize(detail::elements(padded_, dimension));
    from_basis_.resize(detail::elements(padded_, dimension));
    for (std::size_t e = 0; e < dimension; ++e)
      for (std::size_t c = 0; c < dimension; ++c) {
        const auto v = static_cast<float>(vectors[e * dimension + c]);
        to_basis_[(e / lanes * dimension + c) * lanes + e % lanes] = v;
        from_basis_[(c / lanes * dimension + e) * lanes + c % lanes] = v;
      }
    projection_.resize(padded_ + lanes);
    residual_.resize(padded_ + lanes);
    result_.resize(padded_);
  }

  // delta = damping (ridge trace(M) I + expected M)^-1 residual, so that the prior deviation of
  // query . delta is 1 / sqrt(ridge) for a query of average length. residual, delta: [d]. 2 d^2
  // multiplications. One thread at a time.
  void solve(std::span<const float> residual, double expected,
             std::span<float> delta) const noexcept {
    std::fill(delta.begin(), delta.end(), 0.0f);
    if (!(trace_ > 0)) return;
    std::copy(residual.begin(), residual.end(), residual_.begin());
    const std::size_t blocks = padded_ / lanes;
    table_->matrix_vector(to_basis_.data(), zeros_.data(), dimension_, blocks, residual_.data(),
                          projection_.data());
    for (std::size_t e = 0; e < dimension_; ++e)
      projection_[e] *= static_cast<float>(
          damping / (ridge * trace_ + expected * static_cast<double>(values_[e])));
    table_->matrix_vector(from_basis_.data(), zeros_.data(), dimension_, blocks, projection_.data(),
                          result_.data());
    std::copy_n(result_.begin(), dimension_, delta.begin());
  }

 private:
  static constexpr std::size_t lanes = kernels::lanes;

  // a = vectors^T diag(values) vectors, of a symmetric a [n, n], which is used up: Householder's
  // reduction to a tridiagonal matrix, then implicit QL (Golub and Van Loan, 8.3).
  static void diagonalise(Vector<double>& a, Vector<double>& vectors, Vector<double>& values) {
    const std::size_t n = values.size();
    Vector<double> beside(n), scales(n);
    reduce(a, values, beside, scales);
    // Rows of `vectors` are the columns of H_0 H_1 ..., whose Householder vectors lie in a's
    // columns.
    for (std::size_t i = 0; i < n; ++i) vectors[i * n + i] = 1;
    Vector<double> sums(n);
    for (std::size_t k = n > 2 ? n - 2 : 0; k-- > 0;) {
      if (scales[k] == 0) continue;
      for (std::size_t r = k + 1; r < n; ++r) {
        double dot = 0;
        for (std::size_t c = k + 1; c < n; ++c) dot += vectors[r * n + c] * a[k * n + c];
        for (std::size_t c = k + 1; c < n; ++c)
          vectors[r * n + c] -= scales[k] * dot * a[k * n + c];
      }
    }
    iterate(vectors, values, beside);
  }

  // values: the diagonal; beside: what stands next to it, from 0 on. Row k of a, from k + 1 on, is
  // the k-th Householder vector v, H = I - scales[k] v v^T.
  static void reduce(Vector<double>& a, Vector<double>& values, Vector<double>& beside,
                     Vector<double>& scales) {
    const std::size_t n = values.size();
    Vector<double> w(n);
    for (std::size_t k = 0; k < n; ++k) {
      values[k] = a[k * n + k];
      if (k + 1 == n) break;
      double* const v = a.data() + k * n;
      double squares = 0, below = 0;
      for (std::size_t c = k + 1; c < n; ++c) squares += v[c] * v[c];
      for (std::size_t c = k + 2; c < n; ++c) below += v[c] * v[c];
      beside[k] = v[k + 1];
      if (!(below > 0)) continue;
      beside[k] = v[k + 1] > 0 ? -std::sqrt(squares) : std::sqrt(squares);
      v[k + 1] -= beside[k];
      const double scale = 2 / (below + v[k + 1] * v[k + 1]);
      scales[k] = scale;
      double dot = 0;
      for (std::size_t r = k + 1; r < n; ++r) {
        double sum = 0;
        for (std::size_t c = k + 1; c < n; ++c) sum += a[r * n + c] * v[c];
        w[r] = scale * sum;
        dot += w[r] * v[r];
      }
      for (std::size_t r = k + 1; r < n; ++r) w[r] -= 0.5 * scale * dot * v[r];
      for (std::size_t r = k + 1; r < n; ++r)
        for (std::size_t c = k + 1; c < n; ++c) a[r * n + c] -= v[r] * w[c] + w[r] * v[c];
    }
  }

  static void iterate(Vector<double>& vectors, Vector<double>& values, Vector<double>& beside) {
    const std::size_t n = values.size();
    constexpr double epsilon = std::numeric_limits<double>::epsilon();
    const auto small = [&](std::size_t i) {
      return std::abs(beside[i]) <= epsilon * (std::abs(values[i]) + std::abs(values[i + 1]));
    };
    for (std::size_t l = 0; l < n; ++l)
      for (int step = 0; step < 60; ++step) {
        std::size_t m = l;
        while (m + 1 < n && !small(m)) ++m;
        if (m == l) break;
        // Wilkinson's shift, then plane rotations from m up to l.
        const double half = (values[l + 1] - values[l]) / (2 * beside[l]);
        double g =
            values[m] - values[l] + beside[l] / (half + std::copysign(std::hypot(half, 1.0), half));
        double sine = 1, cosine = 1, shift = 0;
        std::size_t i = m;
        while (i-- > l) {
          const double f = sine * beside[i], b = cosine * beside[i];
          const double r = std::hypot(f, g);
          beside[i + 1] = r;
          if (r == 0) break;
          sine = f / r;
          cosine = g / r;
          const double before = values[i + 1] - shift;
          const double s = (values[i] - before) * sine + 2 * cosine * b;
          shift = sine * s;
          values[i + 1] = before + shift;
          g = cosine * s - b;
          double* const upper = vectors.data() + i * n;
          double* const lower = upper + n;
          for (std::size_t c = 0; c < n; ++c) {
            const double x = upper[c], y = lower[c];
            lower[c] = sine * x + cosine * y;
            upper[c] = cosine * x - sine * y;
          }
        }
        if (i < l || i == static_cast<std::size_t>(-1)) {
          values[l] -= shift;
          beside[l] = g;
        } else {
          values[i + 1] -= shift;
        }
        beside[m] = 0;
      }
  }

  std::size_t dimension_, padded_;
  const kernels::Table* table_;
  Vector<float> to_basis_, from_basis_, values_, zeros_;
  double trace_ = 0;
  mutable Vector<float> projection_, residual_, result_;  // while solving
};

// tau, in log clicks. The higher, the more mediocre items of a large pool count together as one
// good item, and the more often one of them is drawn.
inline constexpr float exploration_temperature = 0.07f;

// Chooses slates slot by slot: with probability `weight` a slot may explore; then an item of the
// pool is drawn with probability softmax(l / temperature) (Plackett-Luce) and must beat the best
// remaining item g of the ranking, which it does with probability
//   win = sigmoid(logsumexp(l / temperature) + (handicap - u_g) / temperature),
//   handicap = max(0, -ln(2 (1 - weight))).
// Otherwise the slot takes g. So, given the picks above, with everything taken above removed:
//   propensity(j) = weight win softmax_j + [j = g] (1 - weight win).
// Holds memory for one slate at a time; not thread-safe.
class SlotPolicy {
 public:
  SlotPolicy() = default;
  SlotPolicy(float weight, float temperature, float slope = 1) noexcept {
    configure(weight, temperature, slope);
  }

  std::size_t bytes() const noexcept {
    return detail::allocated(weights_) + detail::allocated(blocks_) + detail::allocated(open_);
  }

  // weight in [0, 1]; temperature > 0, in log clicks; slope > 0: log clicks a unit of score.
  void configure(float weight, float temperature, float slope) noexcept {
    weight_ = weight;
    temperature_ = temperature / slope;
    handicap_ = handicap(weight, temperature);
  }

  // In temperatures.
  static double handicap(float weight, float temperature) noexcept {
    if (weight >= 1) return std::numeric_limits<double>::infinity();
    return std::max(0.0, -std::log(2.0 * (1.0 - static_cast<double>(weight)))) /
           static_cast<double>(temperature);
  }

  // Probability that the pool wins an exploring slot; `logit` as in SlotChoice::pool_logit. An
  // empty pool, logit -inf, wins nothing, not even at weight 1, where the handicap is infinite.
  double win(double logit) const noexcept {
    if (logit == -std::numeric_limits<double>::infinity()) return 0;
    return 1.0 / (1.0 + std::exp(-(logit + handicap_)));
  }

  // ranking: best first by u, distinct, all items that may stand on a slate of `count` without
  // exploration; pool: l of each item, ascending by item, distinct; values: [pool] for
  // SlotChoice::pool_value, or empty. `taken` has a bit an item, all zero, and is left so. Replaces
  // `choices`: `count`, or as many as there are items. Cost: O(ranking + count x pool).
  void choose(std::span<const ScoredItem> ranking, std::span<const ScoredItem> pool,
              std::span<const float> values, std::size_t count, const CounterRandom& random,
              ItemMask& taken, std::vector<SlotChoice>& choices) {
    choices.clear();
    if (weight_ == 0) pool = {};
    if (pool.empty()) values = {};
    open_.assign(pool.size(), 1);
    remaining_ = pool.size();
    weights_.resize(pool.size());
    weigh(pool, values);
    std::size_t next = 0;
    while (choices.size() < count) {
      while (next < ranking.size() && taken.test(ranking[next].item)) ++next;
      const bool has_best = next < ranking.size();
      const bool open = remaining_ > 0 && total_ > 0 && std::isfinite(total_);
      if (!has_best && !open) break;
      if (!open) {
        choices.push_back({ranking[next], ranking[next], false, 1.0f, 0.0f,
                           -std::numeric_limits<float>::infinity(), 0.0f});
        taken.set(ranking[next].item);
        continue;
      }
      const double logit = has_best
                               ? std::log(total_) + (static_cast<double>(largest_) -
                                                     static_cast<double>(ranking[next].score)) /
                                                        static_cast<double>(temperature_)
                               : std::numeric_limits<double>::infinity();
      const double explore = has_best ? static_cast<double>(weight_) * win(logit) : 1.0;
      const auto [which, where] = random.uniform(choices.size());
      std::size_t j = which < explore ? draw(where) : pool.size();
      const bool explored = j < pool.size();
      if (!explored && !has_best) break;
      if (!explored) j = position(pool, ranking[next].item);
      const ScoredItem pick = explored ? pool[j] : ranking[next];
      const bool best = has_best && pick.item == ranking[next].item;
      const double share = j < pool.size() ? static_cast<double>(weights_[j]) / total_ : 0.0;
      choices.push_back({pick, has_best ? ranking[next] : pick, explored,
                         static_cast<float>(explore * share + (best ? 1.0 - explore : 0.0)),
                         static_cast<float>(share), static_cast<float>(logit),
                         static_cast<float>(value_ / total_)});
      taken.set(pick.item);
      if (j < pool.size()) remove(pool, values, j);
    }
    for (const SlotChoice& choice : choices) taken.reset(choice.pick.item);
  }

 private:
  // Weights relative to the largest l of the items that are left.
  void weigh(std::span<const ScoredItem> pool, std::span<const float> values) {
    largest_ = -std::numeric_limits<float>::infinity();
    for (std::size_t j = 0; j < open_.size(); ++j)
      if (open_[j]) largest_ = std::max(largest_, pool[j].score);
    for (std::size_t j = 0; j < open_.size(); ++j)
      weights_[j] = open_[j] ? std::exp((pool[j].score - largest_) / temperature_) : 0.0f;
    add_up(values);
  }

  void add_up(std::span<const float> values) {
    total_ = value_ = 0;
    blocks_.clear();
    for (std::size_t begin = 0; begin < weights_.size(); begin += block) {
      const std::size_t end = std::min(begin + block, weights_.size());
      double sum = 0;
      for (std::size_t j = begin; j < end; ++j) sum += static_cast<double>(weights_[j]);
      blocks_.push_back(sum);
      total_ += sum;
    }
    for (std::size_t j = 0; j < values.size(); ++j)
      value_ += static_cast<double>(weights_[j]) * static_cast<double>(values[j]);
  }

  void remove(std::span<const ScoredItem> pool, std::span<const float> values, std::size_t j) {
    const auto weight = static_cast<double>(weights_[j]);
    open_[j] = 0;
    weights_[j] = 0;
    --remaining_;
    blocks_[j / block] -= weight;
    total_ -= weight;
    if (!values.empty()) value_ -= weight * static_cast<double>(values[j]);
    // A sum that lost most of itself is left with rounding errors.
    if (weight > total_) add_up(values);
    if (total_ < 1e-20) weigh(pool, values);
  }

  // pool.size() where no item has weight.
  std::size_t draw(double where) const noexcept {
    double at = where * total_;
    std::size_t b = 0;
    while (b + 1 < blocks_.size() && at >= blocks_[b]) at -= blocks_[b++];
    // Where rounding leaves nothing in the block that was reached, the last item with weight.
    std::size_t last = weights_.size();
    for (std::size_t j = b * block; j < weights_.size(); ++j) {
      if (!(weights_[j] > 0)) continue;
      last = j;
      at -= static_cast<double>(weights_[j]);
      if (at < 0) return j;
    }
    for (std::size_t j = b * block; last == weights_.size() && j-- > 0;)
      if (weights_[j] > 0) last = j;
    return last;
  }

  std::size_t position(std::span<const ScoredItem> pool, std::uint32_t item) const noexcept {
    if (open_.empty()) return pool.size();
    const auto found = std::lower_bound(
        pool.begin(), pool.end(), item,
        [](const ScoredItem& scored, std::uint32_t wanted) { return scored.item < wanted; });
    if (found == pool.end() || found->item != item) return pool.size();
    return static_cast<std::size_t>(found - pool.begin());
  }

  float weight_ = 0, temperature_ = 1;
  double handicap_ = 0;
  static constexpr std::size_t block = 64;
  Vector<float> weights_;  // softmax numerators of the pool, 0 where taken
  Vector<double> blocks_;  // their sums over blocks
  Vector<char> open_;
  std::size_t remaining_ = 0;
  float largest_ = 0;
  double total_ = 0, value_ = 0;  // sums over weights_, of weights_ x values_
};

namespace detail {

// One event of a user's history.
struct RememberedEvent {
  std::uint32_t item;
  std::uint32_t event_type;
  std::int64_t timestamp;
};

// A pick of a slate that an event says was seen.
struct SeenPick {
  std::uint32_t place;
  LoggedPick pick;
  LoggedChoice logged;
  bool shared;  // others may learn from it
};

// Request-sized memory.
struct Scratch {
  Vector<float> query;             // [padded(d)], h with g
  Vector<float> offset;            // [d], g
  Vector<float> gradient, vector;  // [d], for moving g
  Vector<float> input;             // [e], of an item that is none of the model's
  Encoder::Workspace encoding;
  Scorer::Workspace scoring;
  Vector<std::uint32_t> interacted;
  std::vector<ScoredItem> ignored;  // item and its discount, ascending by item
  std::array<std::uint64_t, 16>
      ignored_filter{};  // a bit set for each, by the item's last ten bits
  std::uint64_t request_number = 0;
  bool drawn_user = false, drawn_session = false;  // whose next number request_number is
  bool grown = false;                              // users have: Settle looks at their budget
  ItemMask taken{0}, excluded{0};                  // all zero between requests
  std::vector<ScoredItem> top, pool;
  Vector<float> pool_scores, pool_expected;
  float normaliser = 0;
  SlotPolicy policy;
  std::vector<SlotChoice> choices;
  LoggedSlate logged;  // of a slate that is made, or that an event answers
  // Of an event: the items listed, with their places; the picks seen, by place.
  std::vector<ScoredItem> listed;  // score: the place
  Vector<SeenPick> seen;
  Vector<RememberedEvent> events;  // of a user
  Vector<float> state;             // the same, as it is made anew
  Vector<std::byte> record;        // of a journal

  std::size_t bytes() const noexcept {
    return allocated(sizeof *this) + allocated(query) + allocated(offset) + allocated(gradient) +
           allocated(vector) + allocated(input) + allocated(encoding.values) +
           allocated(encoding.quantised) + scoring.bytes() + allocated(interacted) +
           allocated(ignored) + 2 * allocated(taken.size() / 8) + allocated(top) + allocated(pool) +
           allocated(pool_scores) + allocated(pool_expected) + allocated(choices) +
           allocated(logged.query) + allocated(logged.picks) + allocated(logged.choices) +
           allocated(listed) + allocated(seen) + allocated(record) + allocated(events) +
           allocated(state) + policy.bytes();
  }

  float discount(std::uint32_t item) const noexcept {
    if ((ignored_filter[item % 1024 / 64] >> (item % 64) & 1) == 0) return 0;
    const auto found = std::lower_bound(
        ignored.begin(), ignored.end(), item,
        [](const ScoredItem& scored, std::uint32_t wanted) { return scored.item < wanted; });
    return found != ignored.end() && found->item == item ? found->score : 0.0f;
  }
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 14: catalogue. Owns the items: one published generation of what is known of them, and how
// the next one is built. Uses all earlier rooms.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

struct PoolItem {
  std::uint32_t item;
  float bonus;  // half the deviation of the log quality, in units of score
  std::int64_t created;
};

// The items as one update left them; immutable once published. Quality, corrections and bonuses are
// in units of score. u = query . vectors + biases. An item that was removed has a NaN for a bias.
//
// An item's number outlives models: `ids` only grows, and another model's rows are put in its order
// (in_order) before a catalogue is made of it. So histories, counters, sums and slates hold numbers
// and nothing has to be translated. Event types likewise.
struct Catalogue {
  static constexpr std::uint64_t well_known = 10;  // interactions
  static constexpr double explored_enough = 3;     // expected positive events
  static constexpr std::size_t max_pool = 4096;    // the newest
  static constexpr std::int64_t half_life = 14 * 86'400;

  std::shared_ptr<const Model> base;
  std::shared_ptr<const ItemIds> ids;
  std::shared_ptr<const Encoder> encoder;  // of the base's items
  std::shared_ptr<ItemCounters> counters;  // positive and expected, with feedback
  std::shared_ptr<ContextSums> contexts;   // of queries of this model
  // A bit a user who came with the model: forgotten since.
  std::shared_ptr<Vector<atomic<std::uint64_t>>> forgotten;
  // Of the models so far that needed other states or other sums; and since which of them the
  // encoder, and the item vectors, have been the same. A user holds the one that was present last.
  std::uint32_t generation = 1, encoder_since = 1, space_since = 1;
  // Items that the model has no row for, but a place; of those, the ones that have not been put
  // since. Null: none.
  std::shared_ptr<const ItemMask> lacking, absent;
  std::int64_t trained_until = no_timestamp;  // the model's latest interaction
  PagedArray<ItemStatistics> statistics;
  ItemRows rows;              // the model's, and those of new items
  ItemRows input_rows;        // what the encoder takes in, where that is not the item's row
  PagedArray<float> offsets;  // the model's biases, and those of new items
  ItemRows vectors;           // rows with corrections
  PagedArray<float> biases;   // offsets with quality and corrections
  PagedArray<float> quality;  // empty without feedback
  PagedArray<std::uint32_t> correction_of;                 // row + 1 of corrections, 0: none
  std::shared_ptr<const Vector<float>> corrections;        // [rows, d + 1]: delta, then a constant
  std::shared_ptr<const Vector<std::uint32_t>> corrected;  // the item of each
  std::shared_ptr<const Scorer> scorer;
  // log of interactions, on the scale of those in training; share of all = exp(popularity + scale)
  PagedArray<float> popularity;
  float popularity_scale = 0;
  double trained_interactions = 0, interactions = 0;  // of all items; on that scale
  std::int64_t started = 0;  // the training's interactions count as of this time
  std::shared_ptr<const Vector<std::uint32_t>> popular;  // by popularity and quality, best first
  Vector<std::uint32_t> popular_later;  // put or changed since that was sorted, best first
  Vector<std::uint32_t> later_items;    // the same, ascending
  Vector<PoolItem> pool;                // ascending by item
  Vector<float> pool_vectors, pool_biases;
  Calibration calibration;
  GammaPrior well_known_prior{10, 1}, cold_prior{2, 1};
  std::shared_ptr<const Vector<double>> second_moment;  // of queries of reported slates
  float mean_square = 0;  // of the lengths of the model's item vectors
  float low_bias = 0;     // of an item of which nothing is known
  // Ascending: items with counts, whose scores each learning sets anew. All others have the quality
  // of items without feedback: 0 where they are well known, else unseen_quality.
  std::shared_ptr<const Vector<std::uint32_t>> active;
  float unseen_quality = 0;
  bool changed_base = false;  // items were put or removed: `base` alone is not the model

  std::size_t size() const noexcept { return ids->size(); }
  std::size_t dimension() const noexcept { return base->dimension(); }
  bool available(std::uint32_t item) const noexcept { return !std::isnan(biases[item]); }
  // Neither the model has a row for it nor has it been put since.
  bool is_absent(std::uint32_t item) const noexcept { return absent && absent->test(item); }

  // Of an item that this generation has or had.
  std::optional<std::uint32_t> number_of(std::string_view id) const noexcept {
    const auto item = ids->find(id);
    return item && *item < size() ? item : std::nullopt;
  }
  std::optional<std::uint32_t> find(std::string_view id) const noexcept {
    const auto item = number_of(id);
    return item && available(*item) ? item : std::nullopt;
  }

  // Whether an item's row is another than the model's own, or the model has none.
  static bool replaced(const ItemRows& rows, const Matrix& own, std::uint32_t item) noexcept {
    if (item >= own.rows()) return true;
    const std::size_t at = item * own.columns();
    return own.type() == ElementType::i8 ? rows.i8(item) != own.i8().data() + at
                                         : rows.f32(item) != own.f32().data() + at;
  }
  // Whether the model has a row for it, and not only a place.
  bool is_of_model(std::string_view id) const noexcept {
    const auto item = base->find_item(id);
    return item && !(lacking && lacking->test(*item));
  }
  // A user's row among those who came with the model, unless forgotten.
  std::optional<std::uint32_t> stored_user(std::string_view user) const noexcept {
    const auto row = user.empty() ? std::nullopt : base->parts().user_ids.find(user);
    if (!row || ((*forgotten)[*row / 64].load(memory_order_relaxed) >> *row % 64 & 1) != 0)
      return std::nullopt;
    return row;
  }

  // The item's input to the encoder, where the model has none or another; else empty. buffer: [e].
  std::span<const float> input_of(std::uint32_t item, std::span<float> buffer) const noexcept {
    const ItemRows& inputs = input_rows.empty() ? rows : input_rows;
    if (!replaced(inputs, base->parts().inputs(), item)) return {};
    inputs.row(item, buffer);
    return buffer;
  }

  const float* correction(std::uint32_t item) const noexcept {
    if (correction_of.empty() || correction_of[item] == 0) return nullptr;
    return corrections->data() + (correction_of[item] - std::size_t{1}) * (dimension() + 1);
  }
  // What this user's likes add to the item's score.
  float taste(std::uint32_t item, std::span<const float> query) const noexcept {
    const float* row = correction(item);
    if (!row) return 0;
    const std::size_t d = dimension();
    return std::inner_product(row, row + d, query.begin(), row[d]);
  }
  float quality_of(std::uint32_t item) const noexcept {
    return quality.empty() ? 0.0f : quality[item];
  }
  // Without events of the user: the log of the item's share of interactions, with its quality.
  float popular_score(std::uint32_t item) const noexcept {
    return popularity[item] + popularity_scale + quality_of(item);
  }

  ItemFeedback feedback_of(std::uint32_t item, const DecayMoment& moment) const noexcept {
    if (item >= counters->size()) return {};
    return {counters->value(ItemCounters::Kind::positive, item, moment),
            counters->value(ItemCounters::Kind::expected, item, moment)};
  }
  // The same less what one user can say alone: of what events report with a list of their own, all
  // but a quarter of the first waits for a second.
  ItemFeedback confirmed_feedback_of(std::uint32_t item, const DecayMoment& moment) const noexcept {
    ItemFeedback feedback = feedback_of(item, moment);
    if (feedback.positive > 0)
      feedback.positive = std::max(
          0.0,
          feedback.positive -
              0.75 * std::min(1.0, counters->value(ItemCounters::Kind::unconfirmed, item, moment)));
    return feedback;
  }
  double interactions_since(std::uint32_t item, const DecayMoment& moment) const noexcept {
    return item < counters->size() ? counters->value(ItemCounters::Kind::interactions, item, moment)
                                   : 0;
  }
  bool is_well_known(std::uint32_t item, const DecayMoment& moment) const noexcept {
    // Counters round to some millionths.
    return static_cast<double>(statistics[item].interactions) + interactions_since(item, moment) >
           static_cast<double>(well_known) - 0.5;
  }
  const GammaPrior& prior_of(std::uint32_t item, const DecayMoment& moment) const noexcept {
    return is_well_known(item, moment) ? well_known_prior : cold_prior;
  }

  // When the item came to be: its creation or its first interaction. An item without either and
  // without interactions is new (Amazon's definition): the end of time. no_timestamp: not known.
  static std::int64_t creation(const ItemStatistics& s) noexcept {
    if (s.creation_timestamp != no_timestamp) return s.creation_timestamp;
    if (s.first_timestamp != no_timestamp || s.interactions > 0) return s.first_timestamp;
    return std::numeric_limits<std::int64_t>::max();
  }
  static bool young(std::int64_t created, std::int64_t latest,
                    std::chrono::seconds cut_off) noexcept {
    return created != no_timestamp && elapsed(created, latest) <= cut_off.count();
  }

  // Items by popular_score, best first, to visit(item) until it returns false.
  template <class Visit>
  void for_popular(Visit visit) const {
    std::size_t later = 0;
    const auto before = [&](std::uint32_t a, std::uint32_t b) {
      return ranks_before({a, popular_score(a)}, {b, popular_score(b)});
    };
    const auto show = [&](std::uint32_t item) { return !available(item) || visit(item); };
    for (const std::uint32_t item : *popular) {
      if (std::binary_search(later_items.begin(), later_items.end(), item, Less{})) continue;
      for (; later < popular_later.size() && before(popular_later[later], item); ++later)
        if (!show(popular_later[later])) return;
      if (!show(item)) return;
    }
    for (; later < popular_later.size(); ++later)
      if (!show(popular_later[later])) return;
  }

  // Vectors and biases of the pool.
  void fill_pool() {
    const std::size_t d = dimension();
    pool_vectors.assign(pool.size() * d + kernels::lanes, 0.0f);
    pool_biases.resize(pool.size());
    for (std::size_t j = 0; j < pool.size(); ++j) {
      vectors.row(pool[j].item, std::span(pool_vectors).subspan(j * d, d));
      pool_biases[j] = biases[pool[j].item];
    }
  }

  // The model with the items of this generation, without those removed. O(items x d).
  Result<std::shared_ptr<const Model>> whole_model() const {
    ModelParts parts = base->parts();  // with its fingerprints: what was learnt stays good
    parts.item_ids = {};
    parts.biases.clear();
    parts.statistics.clear();
    Vector<std::uint32_t> items;
    for (std::uint32_t i = 0; i < size(); ++i) {
      if (!available(i)) continue;
      if (auto added = parts.item_ids.add((*ids)[i]); !added) return added.error();
      parts.biases.push_back(offsets[i]);
      parts.statistics.push_back(statistics[i]);
      items.push_back(i);
    }
    parts.item_vectors = matrix_of(rows, items);
    if (!input_rows.empty()) parts.input_vectors = matrix_of(input_rows, items);
    return Model::from_parts(std::move(parts));
  }
  static Matrix matrix_of(const ItemRows& rows, std::span<const std::uint32_t> items) {
    const std::size_t d = rows.columns();
    Matrix matrix = Matrix::zeros(items.size(), d, rows.type());
    for (std::size_t r = 0; r < items.size(); ++r) {
      if (rows.type() == ElementType::i8) {
        std::copy_n(rows.i8(items[r]), d, matrix.i8().data() + r * d);
        matrix.scales()[r] = rows.scale(items[r]);
      } else {
        std::copy_n(rows.f32(items[r]), d, matrix.f32().data() + r * d);
      }
    }
    return matrix;
  }

  std::size_t bytes() const {
    return allocated(sizeof *this + 16) + ids->bytes() + encoder->bytes() + counters->bytes() +
           (absent ? 2 * allocated(absent->size() / 8) : 0) + allocated(forgotten->size() * 8) +
           scorer->bytes() + statistics.bytes() + rows.bytes() + input_rows.bytes() +
           offsets.bytes() + vectors.bytes(&rows) + biases.bytes() + quality.bytes() +
           correction_of.bytes() + popularity.bytes() +
           (corrections ? allocated(*corrections) : 0) + (corrected ? allocated(*corrected) : 0) +
           allocated(*popular) + allocated(popular_later) + allocated(later_items) +
           allocated(*active) + allocated(pool) + allocated(pool_vectors) + allocated(pool_biases) +
           (second_moment ? allocated(*second_moment) : 0);
  }
};

// The vector that an item's metadata gives by itself, to vector [d], and how many of its values the
// model knows. Errors (invalid_argument): embeddings that add up to what is not finite.
inline Result<std::size_t> metadata_of(const Model& model,
                                       std::span<const std::pair<std::string, std::string>> fields,
                                       std::span<float> vector) {
  const Vector<std::pair<std::string_view, std::string_view>> views(fields.begin(), fields.end());
  const std::size_t known = model.metadata_vector(views, vector);
  for (const float v : vector)
    if (!(std::abs(v) <= max_magnitude))
      return Error{Errc::invalid_argument,
                   "the embeddings of the item's metadata add up to a vector that is not finite"};
  return known;
}

// Builds the generation that follows another one. Belongs to one thread. Costs what changes:
// putting and removing items O(items put x (20,000 d + log)) and copies of the pages they lie in;
// learning a few passes over the items, O(d^2) for each with context sums, and some 8 d^3.
class CatalogueBuilder {
 public:
  using Fields = Vector<std::pair<std::string, std::string>>;
  static constexpr std::size_t calibration_slates = 2048;  // the newest
  static constexpr std::size_t largest_correction = 1024;  // d, beyond which d^3 is too much

  // options, table and pace outlive the builder.
  CatalogueBuilder(const Catalogue& previous, const RecommenderOptions& options,
                   const kernels::Table& table, Pace& pace)
      : options_(options),
        table_(table),
        pace_(pace),
        next_(std::make_shared<Catalogue>(previous)),
        counters_(previous.counters),
        first_added_(static_cast<std::uint32_t>(previous.size())) {}

  CatalogueBuilder(const CatalogueBuilder&) = delete;
  CatalogueBuilder& operator=(const CatalogueBuilder&) = delete;
  // Of a generation that was not published, the counts are left to the next one.
  ~CatalogueBuilder() {
    if (!published_)
      for (const std::uint32_t item : touched_) counters_->touch(item);
  }
  // Items touched since the last time, which are then this builder's to learn of.
  void take_touched() { counters_->take_touched(touched_); }
  void take_touched(Vector<std::uint32_t>& touched) noexcept { touched_.swap(touched); }

  // The first generation, of a model alone; `lacking`: items that it has no row for.
  static std::shared_ptr<Catalogue> first(const std::shared_ptr<const Model>& model,
                                          const RecommenderOptions& options,
                                          const kernels::Table& table, const HashKey& key,
                                          std::int64_t now, std::int64_t latest,
                                          std::span<const std::uint32_t> lacking = {},
                                          Pace* given_pace = nullptr) {
    Pace without_rests;
    Pace& pace = given_pace ? *given_pace : without_rests;
    const ModelParts& parts = model->parts();
    Catalogue c;
    c.base = model;
    c.ids = std::make_shared<const ItemIds>(model, key);
    pace.step();
    c.encoder = std::make_shared<const Encoder>(*model, table, options.gate_lookup);
    c.counters = std::make_shared<ItemCounters>(parts.item_ids.size());
    c.contexts =
        std::make_shared<ContextSums>(model->dimension(), to_memory(options.context_bytes));
    c.forgotten =
        std::make_shared<Vector<atomic<std::uint64_t>>>((parts.user_ids.size() + 63) / 64);
    for (const ItemStatistics& s : parts.statistics)
      c.trained_until = std::max(c.trained_until, s.last_timestamp);
    c.statistics = {model, std::span<const ItemStatistics>(parts.statistics)};
    c.rows = ItemRows(std::shared_ptr<const Matrix>(model, &parts.item_vectors));
    if (!parts.input_vectors.empty())
      c.input_rows = ItemRows(std::shared_ptr<const Matrix>(model, &parts.input_vectors));
    c.offsets = {model, std::span<const float>(parts.biases)};
    c.vectors = c.rows;
    c.biases = c.offsets;
    c.started = std::max(now, latest);
    c.low_bias = tenth_percentile(parts);
    c.active = c.corrected = std::make_shared<const Vector<std::uint32_t>>();
    pace.step();
    if (options.feedback) c.mean_square = mean_square(parts.item_vectors, lacking.size());
    pace.step();
    if (!lacking.empty()) {
      ItemMask absent(c.size());
      for (const std::uint32_t item : lacking) {
        absent.set(item);
        c.offsets.edit(item) = c.low_bias;
        c.biases.edit(item) = std::numeric_limits<float>::quiet_NaN();
      }
      c.lacking = c.absent = std::make_shared<const ItemMask>(std::move(absent));
      c.changed_base = true;
    }
    for (const ItemStatistics& s : parts.statistics) {
      pace.step(c.popularity.size());
      c.popularity.push_back(std::log(std::max(static_cast<float>(s.interactions), 0.5f)));
      c.trained_interactions += static_cast<double>(s.interactions);
      if (!options.feedback) continue;
      c.quality.push_back(0);
      c.correction_of.push_back(0);
    }
    c.scorer = std::make_shared<const Scorer>(c.vectors, c.biases, usual_query_length(*model),
                                              table, Scorer::usual_largest_8bit, &pace);
    c.interactions = c.trained_interactions;
    CatalogueBuilder builder(c, options, table, pace);
    builder.sort_popular();
    builder.choose_pool(now, latest);
    builder.publish();
    return std::move(builder.next_);
  }

  // Puts an item, whose fields are all that is known of it; given: those of this time. Returns its
  // number.
  std::uint32_t put(std::string_view id, std::optional<std::int64_t> created, const Fields& fields,
                    bool given) {
    auto item = next_->ids->find(id);
    const bool absent = item && next_->is_absent(*item), added = !item || absent;
    if (absent) {
      ItemMask others = *next_->absent;
      others.reset(*item);
      next_->absent = std::make_shared<const ItemMask>(std::move(others));
    }
    if (!item) item = add(id);
    ItemStatistics& statistics = next_->statistics.edit(*item);
    if (created) statistics.creation_timestamp = *created;
    if (statistics.interactions == 0 && (added || given)) described_.push_back({*item, &fields});
    if (std::isnan(next_->biases[*item])) restore(*item);
    changed_.push_back(*item);
    next_->changed_base = true;
    return *item;
  }

  // Numbers for items that nobody has put and the model has no row for.
  void add_lacking(std::span<const std::string_view> ids) {
    const auto first = static_cast<std::uint32_t>(next_->size());
    for (const std::string_view id : ids) remove(add(id));
    ItemMask absent(next_->size());
    for (std::uint32_t item = 0; item < next_->size(); ++item)
      if (item >= first || next_->is_absent(item)) absent.set(item);
    next_->absent = std::make_shared<const ItemMask>(std::move(absent));
  }

  void remove(std::uint32_t item) {
    next_->biases.edit(item) = std::numeric_limits<float>::quiet_NaN();
    next_->changed_base = true;
    changed_.push_back(item);
  }

  // Folds the counters into calibration, popularity, quality and corrections. Returns the number of
  // items that have feedback. counters: those of the moment for which it learns. own_queries: those
  // of the slates are of this model's space.
  std::size_t learn(std::int64_t now, const SlateLog& slates,
                    std::shared_ptr<ItemCounters> counters, bool own_queries = true);
  // Of learn(): items whose sums have faded away.
  std::span<const std::uint32_t> faded() const noexcept { return faded_; }

  std::size_t values_unknown() const noexcept { return values_unknown_; }
  void publish() noexcept { published_ = true; }

  // The new generation, which may then be published.
  std::shared_ptr<const Catalogue> finish(std::int64_t now, std::int64_t latest) {
    Catalogue& next = *next_;
    if (ids_) next.ids = ids_;
    describe();
    std::sort(changed_.begin(), changed_.end(), Less{});
    const auto same = [](std::uint32_t a, std::uint32_t b) { return a == b; };
    changed_.erase(std::unique(changed_.begin(), changed_.end(), same), changed_.end());
    // Items that were added are not the old scorer's.
    const auto added = std::lower_bound(changed_.begin(), changed_.end(), first_added_, Less{});
    next.scorer = std::make_shared<const Scorer>(next.scorer->changed(
        next.vectors, next.biases,
        std::span(changed_.data(), static_cast<std::size_t>(added - changed_.begin())), &pace_));
    adjust_popular();
    if (next.pool.size() == Catalogue::max_pool)  // items may wait that were not among the newest
      choose_pool(now, latest);
    else
      adjust_pool(now, latest);
    next.counters = counters_;
    if (next.counters->size() < next.size())
      next.counters = std::make_shared<ItemCounters>(next.counters->grown(next.size()));
    return std::move(next_);
  }

 private:
  struct Described {
    std::uint32_t item;
    const Fields* fields;
  };
  static constexpr std::size_t neighbours = 16, looked_at = 20'000;
  // Of a new item's vector, what comes from its like; the rest is its own metadata, which keeps it
  // apart from other new items with the same neighbours.
  static constexpr float like = 0.7f;

  // lacking: rows that are zero and no item's.
  static float mean_square(const Matrix& vectors, std::size_t lacking) {
    Vector<float> row(vectors.columns());
    double sum = 0;
    for (std::size_t i = 0; i < vectors.rows(); ++i) {
      vectors.row(i, row);
      sum += static_cast<double>(std::inner_product(row.begin(), row.end(), row.begin(), 0.0f));
    }
    const std::size_t rows = vectors.rows() - lacking;
    return rows == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(rows));
  }

  // Of the biases of items with interactions, or of all.
  static float tenth_percentile(const ModelParts& parts) {
    Vector<float> biases;
    for (std::size_t i = 0; i < parts.biases.size(); ++i)
      if (parts.statistics[i].interactions > 0) biases.push_back(parts.biases[i]);
    if (biases.empty()) biases = parts.biases;
    const auto at = biases.begin() + static_cast<std::ptrdiff_t>(biases.size() / 10);
    std::nth_element(biases.begin(), at, biases.end(), Less{});
    return *at;
  }

  std::uint32_t add(std::string_view id) {
    Catalogue& next = *next_;
    if (!ids_) ids_ = std::make_shared<ItemIds>(*next.ids);
    next.ids = ids_;
    const std::uint32_t item = ids_->add(id);
    const Vector<float> zeros(next.dimension());
    next.statistics.push_back({});
    next.rows.push_back(zeros);
    next.vectors.push_back(zeros);
    if (!next.input_rows.empty())
      next.input_rows.push_back(Vector<float>(next.input_rows.columns()));
    next.offsets.push_back(next.low_bias);
    next.biases.push_back(next.low_bias);
    next.popularity.push_back(std::log(0.5f));
    if (options_.feedback) {
      next.quality.push_back(next.unseen_quality);
      next.biases.edit(item) += next.unseen_quality;
      next.correction_of.push_back(0);
    }
    return item;
  }

  void restore(std::uint32_t item) {
    const float* row = next_->correction(item);
    next_->biases.edit(item) =
        next_->offsets[item] + next_->quality_of(item) + (row ? row[next_->dimension()] : 0.0f);
  }

  // Vectors and biases of the items in described_: metadata, moved towards the mean of the 16
  // trained items nearest to it (by cosine), and these items' mean bias. Looks at no more than
  // 20,000 items, evenly chosen, once for all. Of an item of which nothing is known: zero and a low
  // bias.
  void describe() {
    Catalogue& next = *next_;
    const std::size_t d = next.dimension();
    Vector<Described> known;
    Vector<float> own;  // [known, d]
    Vector<float> vector(d);
    for (const Described& one : described_) {
      // What does not fit was refused when it was put.
      const auto values = metadata_of(*next.base, *one.fields, vector);
      values_unknown_ += count_values(*one.fields) - (values ? *values : 0);
      if (!values || *values == 0) continue;
      known.push_back(one);
      own.insert(own.end(), vector.begin(), vector.end());
    }
    if (known.empty()) return;
    const auto nearest = nearest_trained(own, known.size());
    Vector<float> row(d), inputs(next.input_rows.columns()), input(inputs.size());
    for (std::size_t k = 0; k < known.size(); ++k) {
      pace_.step();
      const std::uint32_t item = known[k].item;
      const auto& near = nearest[k];
      std::copy_n(own.data() + k * d, d, vector.data());
      std::fill(inputs.begin(), inputs.end(), 0.0f);
      float bias = near.empty() ? next.low_bias : 0.0f;
      if (!near.empty())
        for (float& v : vector) v *= 1 - like;
      for (const ScoredItem& other : near) {
        const float part = 1.0f / static_cast<float>(near.size());
        bias += part * next.offsets[other.item];
        next.rows.row(other.item, row);
        for (std::size_t c = 0; c < d; ++c) vector[c] += like * part * row[c];
        if (inputs.empty()) continue;
        next.input_rows.row(other.item, input);
        for (std::size_t c = 0; c < inputs.size(); ++c) inputs[c] += part * input[c];
      }
      next.rows.set_row(item, vector);
      if (!inputs.empty()) next.input_rows.set_row(item, inputs);
      if (const float* delta = next.correction(item))
        for (std::size_t c = 0; c < d; ++c) vector[c] += delta[c];
      next.vectors.set_row(item, vector);
      next.offsets.edit(item) = bias;
      restore(item);
    }
  }

  // Those that are not known are one each, as categories and as numbers.
  static std::size_t count_values(const Fields& fields) noexcept {
    std::size_t count = 0;
    for (const auto& [name, value] : fields)
      count += 1 + static_cast<std::size_t>(std::count(value.begin(), value.end(), '|'));
    return count;
  }

  // Of each of `count` vectors [d], the nearest items that were trained on.
  std::vector<std::vector<ScoredItem>> nearest_trained(std::span<const float> vectors,
                                                       std::size_t count) {
    const Catalogue& next = *next_;
    const std::size_t d = next.dimension(), items = next.base->item_count();
    const std::size_t stride = items / looked_at + 1;
    std::vector<std::vector<ScoredItem>> nearest(count);
    Vector<float> row(d);
    for (std::uint32_t i = 0; i < items; i += static_cast<std::uint32_t>(stride)) {
      pace_.step();
      if (next.statistics[i].interactions == 0 || !next.available(i)) continue;
      next.rows.row(i, row);
      const float square = std::inner_product(row.begin(), row.end(), row.begin(), 0.0f);
      const float inverse = square > 0 ? 1 / std::sqrt(square) : 0.0f;
      for (std::size_t k = 0; k < count; ++k) {
        const float* vector = vectors.data() + k * d;
        const ScoredItem scored{i,
                                inverse * std::inner_product(row.begin(), row.end(), vector, 0.0f)};
        auto& best = nearest[k];  // a heap, the worst in front
        if (best.size() < neighbours) {
          best.push_back(scored);
          std::push_heap(best.begin(), best.end(), ranks_before);
        } else if (ranks_before(scored, best.front())) {
          std::pop_heap(best.begin(), best.end(), ranks_before);
          best.back() = scored;
          std::push_heap(best.begin(), best.end(), ranks_before);
        }
      }
    }
    for (auto& best : nearest) std::sort(best.begin(), best.end(), ranks_before);
    return nearest;
  }

  void calibrate(const SlateLog& slates, bool own_queries);
  Vector<std::uint32_t> find_active();
  void learn_popularity(std::span<const std::uint32_t> active, const DecayMoment& moment,
                        std::int64_t now);
  template <class Rate>
  void settle_unseen(float quality, std::span<const std::uint32_t> active,
                     const DecayMoment& moment, Rate rate);
  void correct_vectors(const DecayMoment& moment);

  void sort_popular() {
    Catalogue& next = *next_;
    next.popularity_scale = static_cast<float>(-std::log(std::max(next.interactions, 1.0)));
    Vector<std::uint64_t> keys(next.size());
    for (std::uint32_t i = 0; i < keys.size(); ++i)
      keys[i] = std::uint64_t{~ordered_bits(next.popular_score(i))} << 32 | i;
    sort_by_upper_half(keys);
    Vector<std::uint32_t> popular(keys.size());
    for (std::size_t i = 0; i < keys.size(); ++i) popular[i] = static_cast<std::uint32_t>(keys[i]);
    next.popular = std::make_shared<const Vector<std::uint32_t>>(std::move(popular));
    next.popular_later.clear();
    next.later_items.clear();
  }

  // The order where only changed_ can have changed; sorted anew once that is much.
  void adjust_popular() {
    Catalogue& next = *next_;
    next.popularity_scale = static_cast<float>(-std::log(std::max(next.interactions, 1.0)));
    Vector<std::uint32_t> later;
    std::set_union(next.later_items.begin(), next.later_items.end(), changed_.begin(),
                   changed_.end(), std::back_inserter(later), Less{});
    if (later.size() > std::max<std::size_t>(256, next.size() / 16)) return sort_popular();
    Vector<Keyed> order;
    order.reserve(later.size());
    for (const std::uint32_t i : later) order.push_back({~ordered_bits(next.popular_score(i)), i});
    sort_by_key(order);
    next.later_items = later;
    for (std::size_t j = 0; j < later.size(); ++j) later[j] = order[j].index;
    next.popular_later = std::move(later);
  }

  // The item as it may be explored; nothing where it may not.
  std::optional<PoolItem> pool_item(std::uint32_t item, const DecayMoment& moment,
                                    std::int64_t latest) const {
    const Catalogue& next = *next_;
    const std::int64_t created = Catalogue::creation(next.statistics[item]);
    if (!next.available(item) ||
        !Catalogue::young(created, latest, options_.exploration_item_age_cut_off))
      return std::nullopt;
    const ItemFeedback counted = next.feedback_of(item, moment);
    if (counted.expected >= Catalogue::explored_enough) return std::nullopt;
    const float spread = posterior(next.prior_of(item, moment), counted).deviation;
    return PoolItem{item, spread / (2 * next.calibration.slope), created};
  }

  void choose_pool(std::int64_t now, std::int64_t latest) {
    next_->pool.clear();
    if (options_.exploration_weight > 0) {
      const DecayMoment moment = Decay(Catalogue::half_life).at(now);
      for (std::uint32_t i = 0; i < next_->size(); ++i) {
        pace_.step(i);
        if (const auto candidate = pool_item(i, moment, latest)) next_->pool.push_back(*candidate);
      }
    }
    fill_pool();
  }

  // The pool where only changed_ can have changed.
  void adjust_pool(std::int64_t now, std::int64_t latest) {
    if (!(options_.exploration_weight > 0)) return;
    const DecayMoment moment = Decay(Catalogue::half_life).at(now);
    Vector<std::uint32_t> items, all;
    for (const PoolItem& candidate : next_->pool) items.push_back(candidate.item);
    std::set_union(items.begin(), items.end(), changed_.begin(), changed_.end(),
                   std::back_inserter(all), Less{});
    next_->pool.clear();
    for (const std::uint32_t item : all)
      if (const auto candidate = pool_item(item, moment, latest)) next_->pool.push_back(*candidate);
    fill_pool();
  }

  // No more than the newest, and their vectors.
  void fill_pool() {
    Catalogue& next = *next_;
    auto& pool = next.pool;
    if (pool.size() > Catalogue::max_pool) {
      Vector<Keyed> newest;  // descending by time; the pool ascends by item
      newest.reserve(pool.size());
      for (std::uint32_t j = 0; j < pool.size(); ++j)
        newest.push_back(
            {~(static_cast<std::uint64_t>(pool[j].created) ^ std::uint64_t{1} << 63), j});
      std::nth_element(newest.begin(), newest.begin() + Catalogue::max_pool, newest.end());
      newest.resize(Catalogue::max_pool);
      for (Keyed& each : newest) each.key = each.index;  // as they lay
      sort_by_key(newest);
      for (std::size_t j = 0; j < newest.size(); ++j) pool[j] = pool[newest[j].index];
      pool.resize(Catalogue::max_pool);
    }
    next.fill_pool();
  }

  const RecommenderOptions& options_;
  const kernels::Table& table_;
  Pace& pace_;
  std::shared_ptr<Catalogue> next_;  // its counters are those of the cut until it is finished
  std::shared_ptr<ItemCounters> counters_;  // that go on
  std::uint32_t first_added_;
  std::shared_ptr<ItemIds> ids_;  // where items are added
  Vector<Described> described_;
  Vector<std::uint32_t> changed_;  // another row, bias, popularity or creation
  Vector<std::uint32_t> touched_;  // with counts since the generation before
  Vector<std::uint32_t> faded_;
  std::size_t values_unknown_ = 0;
  bool published_ = false;
};

inline std::size_t CatalogueBuilder::learn(std::int64_t now, const SlateLog& slates,
                                           std::shared_ptr<ItemCounters> counters,
                                           bool own_queries) {
  Catalogue& next = *next_;
  next.counters = std::move(counters);
  const DecayMoment moment = Decay(Catalogue::half_life).at(now);
  Vector<std::uint32_t> active = find_active();
  learn_popularity(active, moment, now);
  if (!options_.feedback) {
    next.active = std::make_shared<const Vector<std::uint32_t>>(std::move(active));
    return next.active->size();
  }
  calibrate(slates, own_queries);

  Vector<ItemFeedback> counted(active.size()), well_known_items, cold_items;
  Vector<std::uint8_t> well_known(active.size());
  for (std::size_t a = 0; a < active.size(); ++a) {
    pace_.step(a);
    well_known[a] = next.is_well_known(active[a], moment);
    counted[a] = next.confirmed_feedback_of(active[a], moment);
    if (counted[a].expected > 0)
      (well_known[a] ? well_known_items : cold_items).push_back(counted[a]);
  }
  next.well_known_prior = fit_prior(well_known_items, next.well_known_prior);
  next.cold_prior = fit_prior(cold_items, next.cold_prior);
  correct_vectors(moment);

  // Quality counts from the mean of well-known items, whose level the calibration has in it.
  const double level = std::log(next.well_known_prior.mean);
  const auto slope = static_cast<double>(next.calibration.slope);
  const auto rate = [&](std::uint32_t item, float quality) {
    if (quality != next.quality[item]) next.quality.edit(item) = quality;
    if (!next.available(item)) return;
    const float before = next.biases[item];
    restore(item);
    if (next.biases[item] != before) changed_.push_back(item);
  };
  settle_unseen(static_cast<float>((std::log(next.cold_prior.mean) - level) / slope), active,
                moment, rate);
  Vector<std::uint32_t> still;
  for (std::size_t a = 0; a < active.size(); ++a) {
    pace_.step(a);
    const GammaPrior& prior = well_known[a] ? next.well_known_prior : next.cold_prior;
    const bool seen = counted[a].expected > 0 || counted[a].positive > 0;
    const double log_quality = static_cast<double>(posterior(prior, counted[a]).mean);
    rate(active[a], seen            ? static_cast<float>((log_quality - level) / slope)
                    : well_known[a] ? 0.0f
                                    : next.unseen_quality);
    if (seen || next.interactions_since(active[a], moment) > 0) still.push_back(active[a]);
  }
  next.active = std::make_shared<const Vector<std::uint32_t>>(std::move(still));
  return well_known_items.size() + cold_items.size();
}

// Items with counts: those of the generation before and those counted since.
inline Vector<std::uint32_t> CatalogueBuilder::find_active() {
  Vector<std::uint32_t> active;
  std::set_union(next_->active->begin(), next_->active->end(), touched_.begin(), touched_.end(),
                 std::back_inserter(active), Less{});
  return active;
}

// Cold items without feedback: their quality follows the prior's mean, where that has moved by more
// than what a ranking would show; each time costs a pass over all items.
template <class Rate>
void CatalogueBuilder::settle_unseen(float quality, std::span<const std::uint32_t> active,
                                     const DecayMoment& moment, Rate rate) {
  constexpr float least = 0.02f;
  Catalogue& next = *next_;
  if (std::abs(quality - next.unseen_quality) <= least) return;
  next.unseen_quality = quality;
  auto counted = active.begin();
  for (std::uint32_t i = 0; i < next.size(); ++i) {
    pace_.step(i);
    if (counted != active.end() && *counted == i)
      ++counted;
    else if (!next.is_well_known(i, moment))
      rate(i, quality);
  }
}

inline void CatalogueBuilder::calibrate(const SlateLog& slates, bool own_queries) {
  Catalogue& next = *next_;
  const std::size_t d = next.dimension();
  Vector<CalibrationSample> samples;
  Vector<double> second_moment(own_queries && d <= largest_correction ? d * d : 0);
  double queries = 0;
  slates.for_each_reported(calibration_slates, [&](const LoggedSlate& slate) {
    pace_.step();
    for (std::size_t place = 0; place < slate.picks.size(); ++place) {
      const LoggedPick& pick = slate.picks[place];
      if (pick.seen && !pick.explored)
        samples.push_back({pick.relevance, pick.adjustment, pick.examination, pick.positive});
    }
    if (slate.query.empty() || second_moment.empty()) return;
    for (std::size_t i = 0; i < d; ++i)
      for (std::size_t j = 0; j < d; ++j)
        second_moment[i * d + j] +=
            static_cast<double>(slate.query[i]) * static_cast<double>(slate.query[j]);
    ++queries;
  });
  if (!samples.empty()) next.calibration = fit_calibration(samples, next.calibration);
  if (queries == 0) return;
  for (double& value : second_moment) value /= queries;
  next.second_moment = std::make_shared<const Vector<double>>(std::move(second_moment));
}

// Interactions at run time count beside those of training, which decay as they do.
inline void CatalogueBuilder::learn_popularity(std::span<const std::uint32_t> active,
                                               const DecayMoment& moment, std::int64_t now) {
  Catalogue& next = *next_;
  const double half_lives =
      static_cast<double>(elapsed(next.started, now)) / static_cast<double>(Catalogue::half_life);
  const double scale = std::exp2(std::min(half_lives, 900.0));
  next.interactions = next.trained_interactions;
  for (std::size_t a = 0; a < active.size(); ++a) {
    pace_.step(a);
    const std::uint32_t item = active[a];
    const double since = next.interactions_since(item, moment);
    next.interactions += since * scale;
    ItemStatistics s = next.statistics[item];
    const auto trained = static_cast<double>(s.interactions);
    const auto popularity = static_cast<float>(std::log(std::max(trained, 0.5) + since * scale));
    if (popularity != next.popularity[item]) {
      next.popularity.edit(item) = popularity;
      changed_.push_back(item);
    }
    if (since == 0 || Catalogue::creation(s) != std::numeric_limits<std::int64_t>::max()) continue;
    s.first_timestamp = now;
    next.statistics.edit(item) = s;
  }
}

// Who likes an item: at fixed quality, its residuals are the queries where it was chosen less those
// where its impressions let expect so. The correction is centred on the contexts in which the item
// was shown, so that it moves the item between users and not for all of them.
inline void CatalogueBuilder::correct_vectors(const DecayMoment& moment) {
  Catalogue& next = *next_;
  if (!next.second_moment) return;
  constexpr double least = 0.1, forgotten = 0.01;  // expected positive events
  const std::size_t d = next.dimension();
  const float slope = next.calibration.slope;
  const VectorCorrection layer(*next.second_moment, d, table_);
  for (const std::uint32_t item : *next.corrected) {
    next.correction_of.edit(item) = 0;
    changed_.push_back(item);
  }
  next.vectors = next.rows;
  Vector<float> corrections, residual(d), row(d);
  Vector<std::uint32_t> corrected;
  next.contexts->for_each(moment, [&](std::uint32_t item, std::span<const float> positive,
                                      std::span<const float> expected) {
    pace_.step();
    if (item >= next.size()) return;
    const ItemFeedback feedback = next.confirmed_feedback_of(item, moment);
    if (feedback.expected < forgotten) faded_.push_back(item);
    if (feedback.expected < least) return;
    const auto quality =
        std::exp(static_cast<double>(posterior(next.prior_of(item, moment), feedback).mean));
    for (std::size_t c = 0; c < d; ++c)
      residual[c] = positive[c] - static_cast<float>(quality) * expected[c];
    const std::size_t begin = corrections.size();
    corrections.resize(begin + d + 1);
    const std::span<float> delta(corrections.data() + begin, d);
    layer.solve(residual, quality * feedback.expected, delta);
    float centre = 0;
    for (std::size_t c = 0; c < d; ++c) {
      delta[c] /= slope;
      centre -= delta[c] * expected[c] / static_cast<float>(feedback.expected);
    }
    if (!all_finite(delta) || !std::isfinite(centre)) return corrections.resize(begin);
    corrections.back() = centre;
    corrected.push_back(item);
    next.correction_of.edit(item) = static_cast<std::uint32_t>(corrected.size());
    next.rows.row(item, row);
    for (std::size_t c = 0; c < d; ++c) row[c] += delta[c];
    next.vectors.set_row(item, row);
    changed_.push_back(item);
  });
  for (const std::uint32_t item : *next.corrected)
    if (next.correction_of[item] == 0 && next.available(item)) restore(item);
  next.corrections = std::make_shared<const Vector<float>>(std::move(corrections));
  next.corrected = std::make_shared<const Vector<std::uint32_t>>(std::move(corrected));
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 15: lanes. Owns how threads share the published generation, each with the memory of its
// request. Uses rooms 1, 2, 3, 11, 13 and 14.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// The published generation and the idle memory of requests, in lanes: the threads of a lane share a
// lock with few others, and count readers on a pointer of their own, which is no traffic between
// cores. Any number of threads.
class Lanes {
 public:
  std::shared_ptr<const Catalogue> current() const {
    Lane& lane = of_thread();
    const lock_guard lock{lane.mutex};
    return lane.catalogue;
  }
  static constexpr std::size_t lane_count = 16;
  // For each lane a pointer with a count of its own.
  using Copies = std::array<std::shared_ptr<const Catalogue>, lane_count>;
  static Copies copies(const std::shared_ptr<const Catalogue>& next) {
    Copies copies;
    for (auto& copy : copies) {
      auto owner = std::make_shared<std::shared_ptr<const Catalogue>>(next);
      copy = std::shared_ptr<const Catalogue>(std::move(owner), next.get());
    }
    return copies;
  }
  // The present ones go to copies.
  void publish(Copies& copies) noexcept {
    for (std::size_t l = 0; l < lane_count; ++l) {
      const lock_guard lock{lanes_[l].mutex};
      lanes_[l].catalogue.swap(copies[l]);
    }
  }
  // Whether a request is under way.
  bool busy() const noexcept {
    return std::any_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) {
      const lock_guard lock{lane.mutex};
      return lane.scratches > lane.idle.size();
    });
  }
  // Of the memory that no request has now.
  std::size_t idle_bytes() const {
    std::size_t sum = 0;
    for (const Lane& lane : lanes_) {
      const lock_guard lock{lane.mutex};
      for (const auto& scratch : lane.idle) sum += scratch->bytes();
    }
    return sum;
  }

 private:
  friend class ScratchLease;
  struct alignas(64) Lane {
    mutable RankedMutex<2> mutex;
    std::shared_ptr<const Catalogue> catalogue;
    std::vector<std::unique_ptr<Scratch>> idle;
    std::size_t scratches = 0;
  };

  Lane& of_thread() const noexcept { return lanes_[thread_number() % lane_count]; }
  mutable std::array<Lane, lane_count> lanes_;
};

// Scratch memory and the catalogue of one request, from the thread's lane and given back clean.
class ScratchLease {
 public:
  explicit ScratchLease(const Lanes& lanes) : ScratchLease(lanes.of_thread()) {
    if (!scratch_) add();
    fit();
  }
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  ~ScratchLease() {
    if (!scratch_) return;
    for (const std::uint32_t item : scratch_->interacted) scratch_->excluded.reset(item);
    for (const SlotChoice& choice : scratch_->choices) scratch_->taken.reset(choice.pick.item);
    scratch_->choices.clear();
    scratch_->interacted.clear();
    scratch_->ignored.clear();
    scratch_->ignored_filter = {};
    const lock_guard lock{lane_.mutex};
    lane_.idle.push_back(std::move(scratch_));
  }
  Scratch& operator*() const noexcept { return *scratch_; }
  Scratch* operator->() const noexcept { return scratch_.get(); }
  const Catalogue& catalogue() const noexcept { return *catalogue_; }
  const std::shared_ptr<const Catalogue>& shared() const noexcept { return catalogue_; }

  // Goes on with another generation, which has room here then.
  void use(std::shared_ptr<const Catalogue> catalogue) {
    catalogue_ = std::move(catalogue);
    fit();
  }
  // With the present one, which most often it has: then no reader is counted anew.
  void use_current() {
    std::shared_ptr<const Catalogue> present;
    {
      const lock_guard lock{lane_.mutex};
      if (lane_.catalogue == catalogue_) return;
      present = lane_.catalogue;
    }
    use(std::move(present));
  }

 private:
  // The public one delegates to it, so that what it throws is no reason to lose the memory.
  explicit ScratchLease(Lanes::Lane& lane) : lane_(lane) {
    const lock_guard lock{lane.mutex};
    catalogue_ = lane.catalogue;
    if (lane.idle.empty()) return;
    scratch_ = std::move(lane.idle.back());
    lane.idle.pop_back();
  }

  void fit() {
    const Catalogue& c = *catalogue_;
    Scratch& scratch = *scratch_;
    scratch.query.resize(kernels::padded(c.dimension()));
    std::fill(scratch.query.begin() + c.dimension(), scratch.query.end(), 0.0f);
    for (Vector<float>* each : {&scratch.offset, &scratch.gradient, &scratch.vector})
      each->resize(c.dimension());
    scratch.input.resize(c.base->parts().inputs().columns());
    if (scratch.encoding.quantised.size() < c.encoder->width())
      scratch.encoding = c.encoder->make_workspace();
    if (scratch.excluded.size() >= c.size()) return;
    scratch.taken.resize(c.size());
    scratch.excluded.resize(c.size());
  }

  // One more, and room among the idle ones for all there are.
  void add() {
    auto made = std::make_unique<Scratch>();
    for (;;) {
      std::vector<std::unique_ptr<Scratch>> room;
      std::size_t wanted = 0;
      {
        const lock_guard lock{lane_.mutex};
        if (lane_.idle.capacity() > lane_.scratches) {
          ++lane_.scratches;
          scratch_ = std::move(made);
          return;
        }
        wanted = 2 * lane_.scratches + 2;
      }
      room.reserve(wanted);
      const lock_guard lock{lane_.mutex};
      if (lane_.idle.capacity() >= wanted) continue;
      for (auto& scratch : lane_.idle) room.push_back(std::move(scratch));
      room.swap(lane_.idle);
    }
  }

  Lanes::Lane& lane_;
  std::shared_ptr<const Catalogue> catalogue_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 16: user. Owns one user or session: the encoder's state, remembered events and impressions,
// and how they are written. Uses rooms 1, 2, 11, 12 and 13.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Users and sessions live in one table; the first byte keeps "u1" the user from "u1" the session.
class UserKey {
 public:
  // Ids of at most max_id_bytes; where both are given, the user's. key: of the hash, without which
  // nobody can make users fall together.
  UserKey(std::string_view user, std::string_view session, const HashKey& key) noexcept {
    const std::string_view id = user.empty() ? session : user;
    size_ = 1 + id.size();
    text_[0] = user.empty() ? 's' : 'u';
    std::copy(id.begin(), id.end(), text_.begin() + 1);
    hash_ = siphash(key, std::as_bytes(std::span(text_.data(), size_)));
  }
  std::string_view text() const noexcept { return {text_.data(), size_}; }
  std::uint64_t hash() const noexcept { return hash_; }

  // Whether it can be the text of a key; and whose it then is, where one of both is empty.
  static bool is_text(std::string_view text) noexcept {
    return !text.empty() && (text[0] == 'u' || text[0] == 's') && is_id(text.substr(1));
  }
  struct Owner {
    std::string_view user, session;
  };
  static Owner owner(std::string_view text) noexcept {
    const std::string_view id = text.substr(1);
    return text[0] == 'u' ? Owner{id, {}} : Owner{{}, id};
  }

 private:
  std::array<char, 1 + max_id_bytes> text_;
  std::size_t size_;
  std::uint64_t hash_;
};

// A user or session: one block of memory with the encoder's state and the key behind it, and a
// second one, the tail, that grows:
//   offset       [d] halves, padded to 4 bytes; once there was an impression
//   impressions  RecentImpressions::Entry each
//   history      events, oldest first, each as varints: item, event type + 1, and the seconds since
//                the event before, with the sign in the lowest bit
// Not thread-safe: Users holds a lock.
class alignas(__STDCPP_DEFAULT_NEW_ALIGNMENT__) User {
 public:
  struct Free {
    void operator()(User* user) const noexcept {
      ::operator delete(user->tail_);
      user->~User();
      ::operator delete(static_cast<void*>(user));
    }
  };
  using Owner = std::unique_ptr<User, Free>;

  // state_size: floats, zero.
  static Owner make(const UserKey& key, std::size_t state_size) {
    return make(key.text(), key.hash(), state_size);
  }
  static Owner make(std::string_view key, std::uint64_t hash, std::size_t state_size) {
    void* const memory = ::operator new(size_of(state_size, key.size()));
    User* const user = new (memory) User;
    user->hash = hash;
    user->state_size_ = static_cast<std::uint32_t>(state_size);
    user->key_size_ = static_cast<std::uint16_t>(key.size());
    std::fill_n(user->floats(), state_size, 0.0f);
    std::memcpy(user->floats() + state_size, key.data(), key.size());
    return Owner(user);
  }
  // All but the key and the state, which may have another size; `other` keeps nothing.
  void take_over(User& other) noexcept {
    links = other.links;
    last_timestamp = other.last_timestamp;
    requests = other.requests;
    spent_events = other.spent_events;
    spent_impressions = other.spent_impressions;
    used = other.used;
    generation = other.generation;
    first_remembered_ = other.first_remembered_;
    std::swap(tail_, other.tail_);
    tail_capacity_ = std::exchange(other.tail_capacity_, 0);
    offset_bytes_ = std::exchange(other.offset_bytes_, 0);
    history_bytes_ = std::exchange(other.history_bytes_, 0);
    offset_scale_ = other.offset_scale_;
    budget_day_ = other.budget_day_;
    history_events_ = std::exchange(other.history_events_, std::uint16_t{0});
    impressions_ = std::exchange(other.impressions_, std::uint8_t{0});
  }

  std::string_view key() const noexcept {
    return {reinterpret_cast<const char*>(floats() + state_size_), key_size_};
  }
  std::span<float> state() noexcept { return {floats(), state_size_}; }
  std::span<const float> state() const noexcept { return {floats(), state_size_}; }

  std::size_t bytes() const noexcept {
    return allocated(size_of(state_size_, key_size_)) + allocated(tail_capacity_);
  }
  bool is_blank() const noexcept {
    return history_events_ == 0 && impressions_ == 0 && requests == 0;
  }

  // Bytes that the tail needs for so many more events and impressions, and for an offset of
  // `dimension` where it is not 0. 0: it has them.
  std::size_t tail_for(std::size_t events, std::size_t impressions,
                       std::size_t dimension) const noexcept {
    const std::size_t entries =
        std::min<std::size_t>(impressions_ + impressions, RecentImpressions::capacity);
    const std::size_t needed = std::max<std::size_t>(offset_bytes_, offset_size(dimension)) +
                               entries * sizeof(RecentImpressions::Entry) + history_bytes_ +
                               events * longest_event;
    return needed <= tail_capacity_ ? 0 : (needed + needed / 16 + 15) / 16 * 16;
  }
  // Moves the tail to `memory`, of `capacity` bytes, which becomes the old one.
  void move_tail(void*& memory, std::size_t capacity) noexcept {
    if (tail_) std::memcpy(memory, tail_, tail_bytes());
    std::swap(memory, tail_);
    tail_capacity_ = static_cast<std::uint32_t>(capacity);
  }

  // There is memory for it (tail_for). limit: events that are remembered, the oldest go.
  void remember(const RememberedEvent& event, std::size_t limit) noexcept {
    const std::uint64_t gap = history_events_ == 0 ? 0
                                                   : static_cast<std::uint64_t>(event.timestamp) -
                                                         static_cast<std::uint64_t>(last_timestamp);
    if (history_events_ == 0) first_remembered_ = event.timestamp;
    std::byte* out = history() + history_bytes_;
    out = write_varint(out, event.item);
    out = write_varint(out, (std::uint64_t{event.event_type} + 1) & 0xffffffffu);
    out = write_varint(out, gap << 1 ^ (0 - (gap >> 63)));
    history_bytes_ = static_cast<std::uint32_t>(out - history());
    last_timestamp = event.timestamp;
    while (history_events_ >= limit) drop_oldest();
    ++history_events_;
  }
  // To visit(RememberedEvent), oldest first.
  template <class Visit>
  void for_each_event(Visit visit) const noexcept {
    const std::byte* in = history();
    std::int64_t timestamp = first_remembered_;
    for (std::uint32_t e = 0; e < history_events_; ++e) visit(read_event(in, timestamp, e == 0));
  }
  // Whether so many remembered events on the item lie within a half-life of the time.
  bool has_events(std::uint32_t item, std::int64_t timestamp, std::size_t count,
                  std::int64_t half_life) const noexcept {
    if (!may_remember(item)) return count == 0;
    const std::byte* in = history();
    std::int64_t then = first_remembered_;
    for (std::uint32_t e = 0; e < history_events_ && count > 0; ++e) {
      const RememberedEvent event = read_event(in, then, e == 0);
      count -= event.item == item &&
               elapsed(std::min(then, timestamp), std::max(then, timestamp)) < half_life;
    }
    return count == 0;
  }
  // Whether an event on the item may be remembered. Most often says no, and then quickly.
  bool may_remember(std::uint32_t item) const noexcept {
    std::array<std::byte, longest_varint> bytes;
    const auto size = static_cast<std::size_t>(write_varint(bytes.data(), item) - bytes.data());
    const std::string_view all(reinterpret_cast<const char*>(history()), history_bytes_);
    return all.find(std::string_view(reinterpret_cast<const char*>(bytes.data()), size)) !=
           std::string_view::npos;
  }
  std::size_t events() const noexcept { return history_events_; }

  std::span<const RecentImpressions::Entry> impressions() const noexcept {
    return {entries(), impressions_};
  }
  // There is memory for one more.
  void add_impression(std::uint32_t item, std::int64_t timestamp) noexcept {
    change_impressions([&](RecentImpressions::Entry* entries, std::size_t& count) {
      RecentImpressions::add(entries, count, item, timestamp);
    });
  }
  void remove_impression(std::uint32_t item) noexcept {
    change_impressions([&](RecentImpressions::Entry* entries, std::size_t& count) {
      RecentImpressions::remove(entries, count, item);
    });
  }
  // Entries of another user; there is memory for them.
  void add_impressions(std::span<const RecentImpressions::Entry> others) noexcept {
    for (const RecentImpressions::Entry& other : others)
      change_impressions([&](RecentImpressions::Entry* entries, std::size_t& count) {
        if (auto* own = RecentImpressions::find(entries, count, other.item)) {
          own->count += other.count;
          own->seconds = std::max(own->seconds, other.seconds);
        } else if (count < RecentImpressions::capacity) {
          entries[count++] = other;
        }
      });
  }

  bool has_offset() const noexcept { return offset_bytes_ != 0; }
  // Adds the user's offset to out [d].
  void add_offset_to(std::span<float> out) const noexcept {
    if (!has_offset()) return;
    const auto* halves = static_cast<const std::byte*>(tail_);
    for (std::size_t c = 0; c < out.size(); ++c)
      out[c] += offset_scale_ * float_of(load_integer<std::uint16_t>(halves + 2 * c));
  }
  // Moves the offset by change [d]; there is memory for it. What is not finite is left out.
  void move_offset(std::span<const float> change) noexcept {
    const std::size_t bytes = offset_size(change.size());
    if (!has_offset()) {
      std::memmove(static_cast<std::byte*>(tail_) + bytes, tail_, tail_bytes());
      std::memset(tail_, 0, bytes);
      offset_bytes_ = static_cast<std::uint32_t>(bytes);
      offset_scale_ = 1;
    }
    auto* halves = static_cast<std::byte*>(tail_);
    for (std::size_t c = 0; c < change.size(); ++c) {
      float value = offset_scale_ * float_of(load_integer<std::uint16_t>(halves + 2 * c));
      if (std::isfinite(change[c])) value += change[c];
      const std::uint16_t half = half_of(value);
      std::memcpy(halves + 2 * c, &half, sizeof half);
    }
    offset_scale_ = 1;
  }
  void fade_offset(float factor) noexcept { offset_scale_ *= factor; }
  void drop_offset() noexcept {
    if (!has_offset()) return;
    const std::size_t left = tail_bytes() - offset_bytes_;
    std::memmove(tail_, static_cast<const std::byte*>(tail_) + offset_bytes_, left);
    offset_bytes_ = 0;
    offset_scale_ = 1;
  }

  // Takes `amount` from what the user may still add to what all users share: `most` in a half-life.
  // False where nothing is left. `spent` is one of spent_events and spent_impressions.
  bool spend(float& spent, float amount, float most, std::int64_t now) noexcept {
    const auto day = static_cast<std::uint16_t>(
        std::clamp<std::int64_t>(now / 86'400, 0, std::numeric_limits<std::uint16_t>::max()));
    if (day > budget_day_) {
      const float kept = std::exp2(-static_cast<float>(day - budget_day_) / 14.0f);
      spent_events *= kept;
      spent_impressions *= kept;
      budget_day_ = day;
    }
    if (spent + amount > most) return false;
    spent += amount;
    return true;
  }

  // Of a file. with_state: the state, too; read() then wants as many floats.
  void write(FieldWriter& archive, bool with_state) const {
    archive(key_size_, with_state);
    archive.bytes(std::as_bytes(std::span(key().data(), key().size())));
    each_field(archive, *this);
    if (with_state) archive.bytes(std::as_bytes(state()));
    archive.bytes({static_cast<const std::byte*>(tail_), tail_bytes()});
  }
  // At most, of what write() writes.
  std::size_t written_bytes() const noexcept {
    return sizeof(User) + key_size_ + state_size_ * sizeof(float) + tail_bytes();
  }
  // What bounds a user of a file. offset_bytes: where there is an offset.
  struct Bounds {
    std::size_t state_size, offset_bytes, items, event_types, events;
    // Users of older generations may have an offset of another size, which goes when they are next
    // used.
    std::uint32_t space_since = 0;
  };
  static std::size_t offset_size(std::size_t dimension) noexcept {
    return (dimension * sizeof(std::uint16_t) + 3) / 4 * 4;
  }

  // What goes with a user wherever they go, beside what they did and saw.
  struct Personal {
    std::int64_t last_timestamp = no_timestamp;
    std::uint64_t requests = 0;
    float spent_events = 0, spent_impressions = 0, offset_scale = 1;
    std::uint16_t budget_day = 0;
    bool encoded = false;

    template <class Archive, class Self>
    static void each_field(Archive& archive, Self&& self) {
      archive(self.last_timestamp, self.requests, self.spent_events, self.spent_impressions,
              self.offset_scale, self.budget_day, self.encoded);
    }
    bool is_sound() const noexcept {
      return spent_events >= 0 && spent_impressions >= 0 && offset_scale >= 0 &&
             offset_scale <= 1 && std::isfinite(spent_events + spent_impressions);
    }
  };
  Personal personal() const noexcept {
    return {last_timestamp, requests,    spent_events, spent_impressions,
            offset_scale_,  budget_day_, encoded};
  }
  void set_personal(const Personal& other) noexcept {
    last_timestamp = other.last_timestamp;
    requests = other.requests;
    spent_events = other.spent_events;
    spent_impressions = other.spent_impressions;
    offset_scale_ = has_offset() ? other.offset_scale : 1;
    budget_day_ = other.budget_day;
    encoded = other.encoded;
  }
  // The offset as it lies; of one who has none, and memory for it (tail_for).
  std::span<const std::byte> offset() const noexcept {
    return {static_cast<const std::byte*>(tail_), offset_bytes_};
  }
  void set_offset(std::span<const std::byte> offset) noexcept {
    auto* const tail = static_cast<std::byte*>(tail_);
    std::memmove(tail + offset.size(), tail, tail_bytes());
    std::memcpy(tail, offset.data(), offset.size());
    offset_bytes_ = static_cast<std::uint32_t>(offset.size());
  }
  // Null, and the archive fails, where it holds no user within the bounds. with_state: whether one
  // was written; else it is zero.
  static Owner read(FieldReader& archive, const HashKey& hash_key, const Bounds& bounds,
                    bool& with_state) {
    std::uint16_t key_size = 0;
    archive(key_size, with_state);
    const auto raw = archive.bytes(key_size);
    const std::string_view key(reinterpret_cast<const char*>(raw.data()), raw.size());
    if (!archive.ok() || !UserKey::is_text(key)) {
      archive.fail();
      return nullptr;
    }
    Owner user = make(key, siphash(hash_key, raw), with_state ? bounds.state_size : 0);
    each_field(archive, *user);
    if (with_state) {
      const auto state = archive.bytes(bounds.state_size * sizeof(float));
      if (archive.ok() && !state.empty()) std::memcpy(user->floats(), state.data(), state.size());
    }
    const std::uint64_t tail = std::uint64_t{user->offset_bytes_} + user->history_bytes_ +
                               user->impressions_ * sizeof(RecentImpressions::Entry);
    const auto bytes = archive.bytes(tail);
    // Histories shrink, their memory does not; but a file is not believed more than so.
    const std::uint64_t capacity = user->tail_capacity_;
    user->tail_capacity_ = 0;
    if (!archive.ok() || capacity < tail || !all_finite(user->state())) {
      archive.fail();
      return nullptr;
    }
    user->tail_capacity_ = static_cast<std::uint32_t>(capacity <= 2 * tail + 256 ? capacity : tail);
    if (user->tail_capacity_ > 0) user->tail_ = ::operator new(user->tail_capacity_);
    if (!bytes.empty()) std::memcpy(user->tail_, bytes.data(), bytes.size());
    if (!user->is_sound(bounds)) {
      archive.fail();
      return nullptr;
    }
    return user;
  }

  std::uint64_t hash = 0;  // of the key
  RecencyList::Links links;
  std::int64_t last_timestamp = no_timestamp;  // of the last event
  std::uint64_t requests = 0;                  // slates drawn
  std::uint64_t used = 0;                      // the larger, the later
  float spent_events = 0, spent_impressions = 0;
  std::uint32_t generation = 0;  // of the models: whose encoder made the state (Catalogue)

 private:
  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    archive(self.last_timestamp, self.requests, self.used, self.spent_events,
            self.spent_impressions, self.generation, self.first_remembered_, self.tail_capacity_,
            self.offset_bytes_, self.history_bytes_, self.offset_scale_, self.budget_day_,
            self.history_events_, self.impressions_, self.encoded);
  }
  // What was read: numbers that exist, and nothing that would be read beyond its end.
  bool is_sound(const Bounds& bounds) const noexcept {
    if (impressions_ > RecentImpressions::capacity || history_events_ > bounds.events ||
        (generation < bounds.space_since
             ? offset_bytes_ % 4 != 0
             : offset_bytes_ != 0 && offset_bytes_ != bounds.offset_bytes) ||
        !personal().is_sound())
      return false;
    for (const RecentImpressions::Entry& entry : impressions())
      if (entry.item >= bounds.items || !(entry.count >= 0) || !std::isfinite(entry.count))
        return false;
    const std::byte* in = history();
    const std::byte* const end = in + history_bytes_;
    for (std::uint32_t e = 0; e < history_events_; ++e) {
      std::uint64_t item = 0, type = 0, gap = 0;
      if (!(in = read_varint(in, end, item)) || !(in = read_varint(in, end, type)) ||
          !(in = read_varint(in, end, gap)) || item >= bounds.items || type > bounds.event_types)
        return false;
    }
    return in == end && (history_events_ > 0 || last_timestamp == no_timestamp);
  }

  static constexpr std::size_t longest_event = 5 + 5 + longest_varint;

  User() = default;
  ~User() = default;

  static std::size_t size_of(std::size_t state_size, std::size_t key_size) noexcept {
    return sizeof(User) + state_size * sizeof(float) + key_size;
  }
  float* floats() noexcept { return reinterpret_cast<float*>(this + 1); }
  const float* floats() const noexcept { return reinterpret_cast<const float*>(this + 1); }

  std::size_t tail_bytes() const noexcept {
    return offset_bytes_ + impressions_ * sizeof(RecentImpressions::Entry) + history_bytes_;
  }
  const RecentImpressions::Entry* entries() const noexcept {
    return reinterpret_cast<const RecentImpressions::Entry*>(static_cast<const std::byte*>(tail_) +
                                                             offset_bytes_);
  }
  const std::byte* history() const noexcept {
    return static_cast<const std::byte*>(tail_) + offset_bytes_ +
           impressions_ * sizeof(RecentImpressions::Entry);
  }
  std::byte* history() noexcept { return const_cast<std::byte*>(std::as_const(*this).history()); }

  // change(entries, count) with room for one more, if there is; the history moves behind them.
  template <class Change>
  void change_impressions(Change change) noexcept {
    std::array<RecentImpressions::Entry, RecentImpressions::capacity> copy;
    std::size_t count = impressions_;
    std::copy_n(entries(), count, copy.begin());
    change(copy.data(), count);
    std::byte* const from = history();
    std::byte* const begin = static_cast<std::byte*>(tail_) + offset_bytes_;
    std::memmove(begin + count * sizeof(copy[0]), from, history_bytes_);
    std::memcpy(begin, copy.data(), count * sizeof(copy[0]));
    impressions_ = static_cast<std::uint8_t>(count);
  }

  static RememberedEvent read_event(const std::byte*& in, std::int64_t& timestamp,
                                    bool first) noexcept {
    std::uint64_t item, type, gap;
    in = read_varint(in, item);
    in = read_varint(in, type);
    in = read_varint(in, gap);
    gap = gap >> 1 ^ (0 - (gap & 1));
    if (!first) timestamp = static_cast<std::int64_t>(static_cast<std::uint64_t>(timestamp) + gap);
    return {static_cast<std::uint32_t>(item), static_cast<std::uint32_t>(type - 1), timestamp};
  }

  void drop_oldest() noexcept {
    const std::byte* in = history();
    std::int64_t timestamp = first_remembered_;
    read_event(in, timestamp, true);
    const std::byte* const second = in;
    read_event(in, timestamp, false);
    first_remembered_ = timestamp;
    const auto dropped = static_cast<std::size_t>(second - history());
    history_bytes_ -= static_cast<std::uint32_t>(dropped);
    std::memmove(history(), second, history_bytes_);
    --history_events_;
  }

  std::uint32_t state_size_ = 0;
  std::int64_t first_remembered_ = 0;  // the oldest event's time
  void* tail_ = nullptr;
  std::uint32_t tail_capacity_ = 0, offset_bytes_ = 0, history_bytes_ = 0;
  float offset_scale_ = 1;
  std::uint16_t budget_day_ = 0;  // since 1970
  std::uint16_t history_events_ = 0;
  std::uint16_t key_size_ = 0;
  std::uint8_t impressions_ = 0;
  static_assert(RecentImpressions::capacity < 256);

 public:
  bool encoded = false;  // whether an event is in the state
};
static_assert(sizeof(User) <= 96);
static_assert(std::is_trivially_copyable_v<RecentImpressions::Entry>);

// Users who have left memory, for whoever wants to hear of them before they end.
class GoneUsers {
 public:
  GoneUsers() = default;
  GoneUsers(const GoneUsers&) = delete;
  GoneUsers& operator=(const GoneUsers&) = delete;
  ~GoneUsers() {
    each([](User&) {});
  }
  // Takes no memory: who is gone needs neither hash nor links.
  void add(User::Owner user) noexcept {
    User* const added = user.release();
    added->hash = bit_cast_pointer(newest_);
    newest_ = added;
  }
  // visit(User&), and an end to each.
  template <class Visit>
  void each(Visit visit) {
    while (newest_) {
      const User::Owner user{std::exchange(newest_, pointer_of(newest_->hash))};
      visit(*user);
    }
  }

 private:
  static std::uint64_t bit_cast_pointer(User* user) noexcept {
    return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(user));
  }
  static User* pointer_of(std::uint64_t bits) noexcept {
    return reinterpret_cast<User*>(static_cast<std::uintptr_t>(bits));
  }
  User* newest_ = nullptr;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 17: users. Owns all users and sessions, within a budget in bytes. Uses rooms 1, 2, 9, 11 and
// 16.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Any number of threads may read. Users are spread over 64 locks by a keyed hash; who changes those
// of one part has the part's turn (room 23), so that nobody else does. A user's memory is taken and
// given back outside of the locks; what is done under one is a look-up and what apply() does.
class Users {
 public:
  using Mutex = RankedMutex<2>;
  static constexpr std::size_t shard_count = 64;

  // budget: bytes, of all users; most: users. The least recently used go first, of each 64th part.
  Users(std::size_t budget, std::size_t most, std::size_t state_size, std::size_t dimension)
      : budget_(budget / shard_count),
        most_(std::max<std::size_t>(most / shard_count, 1)),
        state_size_(state_size),
        dimension_(dimension) {}

  // Of another model, for users that come; while nobody else calls.
  void fit(std::size_t state_size, std::size_t dimension) noexcept {
    state_size_ = state_size;
    dimension_ = dimension;
  }
  static std::size_t shard_of_hash(std::uint64_t hash) noexcept { return hash % shard_count; }

  // Calls look(const User*) under the user's lock, with null where the key is not known, and
  // returns what it returns. look takes no memory and no other lock.
  template <class Look>
  auto read(const UserKey& key, Look look) const {
    const Shard& shard = shard_of(key);
    const lock_guard lock{shard.mutex};
    const auto number = number_of(shard, key);
    return look(number ? static_cast<const User*>(shard.users[*number].get()) : nullptr);
  }

  // The same to change the user, who counts as used unless counts is false.
  template <class Apply>
  auto use(const UserKey& key, Apply apply, bool counts = true) {
    Shard& shard = shard_of(key);
    const lock_guard lock{shard.mutex};
    return apply(find(shard, key, counts));
  }

  // Puts `user` in the place of the one with the same key, whose state it does not take over, and
  // ends that one, where there is one.
  void replace(const UserKey& key, User::Owner user) {
    Shard& shard = shard_of(key);
    const lock_guard lock{shard.mutex};
    const auto number = number_of(shard, key);
    if (!number) return;
    keep(shard, *number);
    User::Owner& place = shard.users[*number];
    shard.bytes -= place->bytes();
    user->take_over(*place);
    place.swap(user);
    shard.bytes += place->bytes();
  }

  // Calls apply(User&) under the user's lock, with memory for so many more events and impressions
  // and, where offset, for the user's offset; returns what it returns. fresh(User&): what a new
  // user begins with. grown: set where memory was taken or was to be, which asks for settle().
  template <class Fresh, class Apply>
  auto change(const UserKey& key, std::size_t events, std::size_t impressions, bool offset,
              Fresh fresh, bool& grown, Apply apply) {
    Shard& shard = shard_of(key);
    const std::size_t dimension = offset ? dimension_ : 0;
    for (;;) {
      std::size_t tail = 0;
      {
        const lock_guard lock{shard.mutex};
        if (User* const user = find(shard, key, true)) {
          tail = user->tail_for(events, impressions, dimension);
          if (tail == 0) return apply(*user);
        }
      }
      grown = true;
      if (tail == 0)
        add(shard, key, fresh);
      else
        grow_tail(shard, key, tail, events, impressions, dimension);
    }
  }

  // Takes out what is over the budget, to `gone`; ends the user of `key` where nothing was recorded
  // of them.
  void settle(const UserKey& key, GoneUsers& gone) noexcept {
    Shard& shard = shard_of(key);
    User::Owner blank;  // freed without the lock
    const lock_guard lock{shard.mutex};
    if (const auto number = number_of(shard, key); number && shard.users[*number]->is_blank())
      blank = remove(shard, *number);
    while (over_budget(shard)) gone.add(remove(shard, shard.order.oldest()));
  }
  // The same of a whole shard.
  void settle(std::size_t number, GoneUsers& gone) noexcept {
    Shard& shard = shards_[number];
    const lock_guard lock{shard.mutex};
    while (over_budget(shard)) gone.add(remove(shard, shard.order.oldest()));
  }

  // The next user of the shard, from slot `at` on, whose state is older than the generation; their
  // key goes to `key`, and `at` behind them. False where there is none.
  bool next_older(std::size_t number, std::uint32_t generation, std::size_t& at,
                  std::string& key) const {
    constexpr std::size_t together = 1024;  // under one lock
    key.reserve(1 + max_id_bytes);          // without the lock
    const Shard& shard = shards_[number];
    for (bool more = true; more;) {
      const lock_guard lock{shard.mutex};
      const std::size_t end = std::min(shard.users.size(), at + together);
      while (at < end) {
        const User* const user = shard.users[at++].get();
        if (!user || user->generation >= generation) continue;
        key.assign(user->key().data(), user->key().size());
        return true;
      }
      more = at < shard.users.size();
    }
    return false;
  }

  // As ContextSums has it, user by user: who changes one that write_shard() has not come to first
  // keeps what was there. cuts: of make_cuts(), so that hardly any memory is taken while all wait.
  // encoder_since: of older generations no states are written.
  class Cuts;
  Cuts make_cuts() const;
  void begin_cut(Cuts cuts, std::uint32_t encoder_since);
  bool end_cut() noexcept {
    bool whole = true;
    for (Shard& shard : shards_) {
      std::unique_ptr<Cut> gone;  // freed without the lock
      const lock_guard lock{shard.mutex};
      gone = std::move(shard.cut);
      whole = whole && !(gone && gone->lost);
    }
    return whole;
  }
  // The users of a shard as of the cut, once.
  void write_shard(std::size_t number, Vector<std::byte>& out, Pace& pace) {
    constexpr std::size_t together = 64;  // under one lock
    Shard& shard = shards_[number];
    FieldWriter archive{out};
    std::vector<Vector<std::byte>> images;
    {
      const lock_guard lock{shard.mutex};
      archive(shard.cut->uses, static_cast<std::uint64_t>(shard.cut->count),
              static_cast<std::uint64_t>(shard.index.capacity()),
              static_cast<std::uint64_t>(shard.users.capacity()),
              static_cast<std::uint64_t>(shard.free.capacity()));
    }
    for (bool more = true; more; pace.step()) {
      // Without the lock.
      constexpr std::size_t room = std::size_t{1} << 19;
      if (out.capacity() - out.size() < room) out.reserve(out.size() + out.size() / 2 + 2 * room);
      const lock_guard lock{shard.mutex};
      Cut& cut = *shard.cut;
      std::size_t written = 0;
      for (; cut.done < cut.slots && written < together; ++cut.done) {
        if (cut.has(cut.done)) continue;
        const User& user = *shard.users[cut.done];
        if (out.capacity() - out.size() < user.written_bytes()) {
          if (written > 0) break;
          out.reserve(out.size() + 2 * user.written_bytes());
        }
        user.write(archive, user.generation >= cut.encoder_since);
        ++written;
      }
      more = cut.done < cut.slots;
      if (!more) images.swap(cut.images);
    }
    for (const Vector<std::byte>& image : images) archive.bytes(image);
  }
  // What write_shard() wrote, into a shard without users. generation: the present one.
  void read_shard(std::size_t number, FieldReader& archive, const HashKey& key,
                  const User::Bounds& bounds, std::uint32_t generation,
                  std::uint32_t encoder_since) {
    Shard& shard = shards_[number];
    std::uint64_t uses = 0, count = 0, index_slots = 0, user_slots = 0, free_slots = 0;
    archive(uses, count, index_slots, user_slots, free_slots);
    // Tables as large as they were, so that budgets are used up as they would be; of such as no
    // budget allows, as large as they must be.
    constexpr std::size_t least = 70;  // bytes of a user
    constexpr std::uint64_t most = std::uint64_t{1} << 40;
    if (count > archive.left() / least) return archive.fail();
    if (index_slots > most || user_slots > most || free_slots > most || user_slots < count ||
        free_slots < count || index_slots * 3 < count * 4 ||
        (index_slots + user_slots) * sizeof(void*) > budget_ + (std::size_t{1} << 16)) {
      index_slots = count == 0 ? 0 : std::bit_ceil(count * 4 / 3 + 2);
      user_slots = free_slots = count;
    }
    const lock_guard lock{shard.mutex};
    if (index_slots > 0)
      shard.index = HashIndex::of_capacity(static_cast<std::size_t>(index_slots));
    shard.users.reserve(static_cast<std::size_t>(user_slots));
    shard.free.reserve(static_cast<std::size_t>(free_slots));
    Vector<Keyed> order;
    order.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t u = 0; u < count; ++u) {
      bool with_state = false;
      User::Owner user = User::read(archive, key, bounds, with_state);
      if (!user || shard_of_hash(user->hash) != number || user->used > uses ||
          user->generation > generation || with_state != (user->generation >= encoder_since) ||
          shard.index.full())
        return archive.fail();
      const std::string_view id = user->key();
      if (shard.index.find(user->hash,
                           [&](std::uint32_t n) { return shard.users[n]->key() == id; }))
        return archive.fail();
      const auto slot = static_cast<std::uint32_t>(shard.users.size());
      order.push_back({user->used, slot});
      shard.bytes += user->bytes();
      shard.index.insert(user->hash, slot);
      shard.users.push_back(std::move(user));
    }
    if (!archive.at_end()) return archive.fail();
    sort_by_key(order);
    for (const Keyed& each : order) shard.order.add(each.index, links_in(shard));
    shard.uses = uses;
  }

  // Calls visit(const User&) for each of a shard, under its lock.
  template <class Visit>
  void for_each(std::size_t number, Visit visit) const {
    const Shard& shard = shards_[number];
    const lock_guard lock{shard.mutex};
    for (const User::Owner& user : shard.users)
      if (user) visit(*user);
  }

  // The user, who is forgotten; null where there is none.
  User::Owner take(const UserKey& key) noexcept {
    Shard& shard = shard_of(key);
    const lock_guard lock{shard.mutex};
    const auto number = number_of(shard, key);
    return number ? remove(shard, *number) : nullptr;
  }
  // Memory for put().
  void make_room(const UserKey& key) {
    Shard& shard = shard_of(key);
    for (;;) {
      std::size_t room = 0;
      {
        const lock_guard lock{shard.mutex};
        if (!shard.index.full() && (!shard.free.empty() || has_room(shard))) return;
        room = shard.index.full() ? shard.index.capacity() : 0;
      }
      grow(shard, room);
    }
  }
  // One who comes from elsewhere, in the place of a user of the same key. Nobody else has added one
  // since make_room().
  void put(const UserKey& key, User::Owner user) noexcept {
    Shard& shard = shard_of(key);
    User::Owner before;  // freed without the lock
    const lock_guard lock{shard.mutex};
    if (const auto number = number_of(shard, key)) before = remove(shard, *number);
    insert(shard, std::move(user));
  }

  std::size_t count() const {
    std::size_t sum = 0;
    for (const Shard& shard : shards_) {
      const lock_guard lock{shard.mutex};
      sum += shard.index.size();
    }
    return sum;
  }
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Shard& shard : shards_) {
      const lock_guard lock{shard.mutex};
      sum += bytes_of(shard);
    }
    return sum;
  }

 private:
  // What a shard was when the cut began: users of slots from `done` on that are not kept yet are as
  // they were.
  struct Cut {
    std::size_t slots = 0, done = 0, count = 0;
    std::uint64_t uses = 0;
    std::uint32_t encoder_since = 0;
    Vector<std::uint64_t> kept;             // a bit a slot: in images, or there was no user
    std::vector<Vector<std::byte>> images;  // as User::write() writes them
    bool lost = false;                      // memory ran out

    bool has(std::size_t slot) const noexcept { return (kept[slot / 64] >> (slot % 64) & 1) != 0; }
  };
  struct alignas(64) Shard {
    mutable Mutex mutex;
    HashIndex index;                 // of users
    std::vector<User::Owner> users;  // null: free
    Vector<std::uint32_t> free;
    RecencyList order;
    std::size_t bytes = 0;   // of the users
    std::uint64_t uses = 0;  // so far, of any of them
    std::unique_ptr<Cut> cut;
  };

  static std::size_t shard_number(const UserKey& key) noexcept { return shard_of_hash(key.hash()); }
  Shard& shard_of(const UserKey& key) noexcept { return shards_[shard_number(key)]; }
  const Shard& shard_of(const UserKey& key) const noexcept { return shards_[shard_number(key)]; }
  struct LinksOf {
    Shard& shard;
    RecencyList::Links& operator()(std::uint32_t n) const noexcept { return shard.users[n]->links; }
  };
  static LinksOf links_in(Shard& shard) noexcept { return {shard}; }
  static std::optional<std::uint32_t> number_of(const Shard& shard, const UserKey& key) noexcept {
    return shard.index.find(key.hash(), [&](std::uint32_t n) {
      return shard.users[n]->hash == key.hash() && shard.users[n]->key() == key.text();
    });
  }
  static User* find(Shard& shard, const UserKey& key, bool use) noexcept {
    const auto number = number_of(shard, key);
    if (!number) return nullptr;
    keep(shard, *number);
    User* const user = shard.users[*number].get();
    if (use) {
      shard.order.touch(*number, links_in(shard));
      user->used = ++shard.uses;
    }
    return user;
  }
  // Ahead of a change of the user in this slot, under the lock.
  static void keep(Shard& shard, std::size_t slot) noexcept {
    Cut* const cut = shard.cut.get();
    if (!cut || slot >= cut->slots || slot < cut->done || cut->has(slot)) return;
    cut->kept[slot / 64] |= std::uint64_t{1} << (slot % 64);
    const auto copy = [&] {
      const User& user = *shard.users[slot];
      Vector<std::byte> image;
      image.reserve(user.written_bytes());
      FieldWriter archive{image};
      user.write(archive, user.generation >= cut->encoder_since);
      cut->images.push_back(std::move(image));
    };
#if PERSONALIZE_HAS_EXCEPTIONS
    try {
      copy();
    } catch (const std::bad_alloc&) {
      cut->lost = true;
    }
#else
    copy();
#endif
  }
  static std::size_t bytes_of(const Shard& shard) noexcept {
    return shard.bytes + shard.index.bytes() + allocated(shard.users) + allocated(shard.free);
  }
  bool over_budget(const Shard& shard) const noexcept {
    return shard.index.size() > 1 && (shard.index.size() > most_ || bytes_of(shard) > budget_);
  }

  // Adds the user unless another thread did. Memory is taken without the lock.
  template <class Fresh>
  void add(Shard& shard, const UserKey& key, Fresh fresh) {
    User::Owner user = User::make(key, state_size_);
    fresh(*user);
    add(shard, key, std::move(user));
  }
  void add(Shard& shard, const UserKey& key, User::Owner user) {
    for (;;) {
      std::size_t room = 0;
      {
        const lock_guard lock{shard.mutex};
        if (number_of(shard, key)) return;
        if (!shard.index.full() && (!shard.free.empty() || has_room(shard))) {
          return insert(shard, std::move(user));
        }
        room = shard.index.full() ? shard.index.capacity() : 0;
      }
      grow(shard, room);
    }
  }
  static bool has_room(const Shard& shard) noexcept {
    return shard.users.size() < shard.users.capacity() &&
           shard.users.size() < shard.free.capacity();
  }
  // The index where it has `full_at` slots (0: stays), and the lists where they are full.
  static void grow(Shard& shard, std::size_t full_at) {
    HashIndex larger;
    std::vector<User::Owner> users;
    Vector<std::uint32_t> free;
    std::size_t size = 0;
    {
      const lock_guard lock{shard.mutex};
      size = shard.users.size();
    }
    if (full_at != 0 || size == 0) larger = HashIndex::of_capacity(2 * full_at);
    const std::size_t room = std::max<std::size_t>(size + size / 4 + 4, 4);
    users.reserve(room);
    free.reserve(room);
    const lock_guard lock{shard.mutex};
    if (shard.index.full() && larger.capacity() > shard.index.capacity()) {
      larger.take(shard.index);
      std::swap(larger, shard.index);
    }
    if (!has_room(shard) && shard.free.empty() && shard.users.size() < room) {
      for (User::Owner& user : shard.users) users.push_back(std::move(user));
      users.swap(shard.users);
      free.swap(shard.free);
    }
  }

  void insert(Shard& shard, User::Owner user) noexcept {
    std::uint32_t number;
    if (shard.free.empty()) {
      number = static_cast<std::uint32_t>(shard.users.size());
      shard.users.emplace_back();
    } else {
      number = shard.free.back();
      shard.free.pop_back();
    }
    shard.bytes += user->bytes();
    shard.index.insert(user->hash, number);
    user->used = ++shard.uses;
    shard.users[number] = std::move(user);
    shard.order.add(number, links_in(shard));
  }

  static User::Owner remove(Shard& shard, std::uint32_t number) noexcept {
    keep(shard, number);
    shard.order.remove(number, links_in(shard));
    User::Owner user = std::move(shard.users[number]);
    shard.index.erase(user->hash, number);
    shard.bytes -= user->bytes();
    shard.free.push_back(number);  // reserved with users
    return user;
  }

  void grow_tail(Shard& shard, const UserKey& key, std::size_t capacity, std::size_t events,
                 std::size_t impressions, std::size_t dimension) {
    struct Delete {
      void operator()(void* memory) const noexcept { ::operator delete(memory); }
    };
    void* memory = ::operator new(capacity);
    std::unique_ptr<void, Delete> owner(memory);
    const lock_guard lock{shard.mutex};
    User* const user = find(shard, key, false);
    if (!user || user->tail_for(events, impressions, dimension) != capacity) return;
    shard.bytes -= user->bytes();
    (void)owner.release();
    user->move_tail(memory, capacity);
    owner.reset(memory);
    shard.bytes += user->bytes();
  }

  std::size_t budget_, most_;  // a shard
  std::size_t state_size_, dimension_;
  std::array<Shard, shard_count> shards_;
};

class Users::Cuts {
  friend class Users;
  std::array<std::unique_ptr<Cut>, shard_count> of_;
};

inline Users::Cuts Users::make_cuts() const {
  Cuts cuts;
  for (std::size_t s = 0; s < shard_count; ++s) {
    cuts.of_[s] = std::make_unique<Cut>();
    std::size_t slots = 0;
    {
      const lock_guard lock{shards_[s].mutex};
      slots = shards_[s].users.capacity();
    }
    cuts.of_[s]->kept.resize((slots + 63) / 64);
  }
  return cuts;
}

inline void Users::begin_cut(Cuts cuts, std::uint32_t encoder_since) {
  for (std::size_t s = 0; s < shard_count; ++s) {
    Shard& shard = shards_[s];
    Cut& cut = *cuts.of_[s];
    const lock_guard lock{shard.mutex};
    cut.encoder_since = encoder_since;
    cut.slots = shard.users.size();
    cut.kept.resize((cut.slots + 63) / 64);
    for (const std::uint32_t slot : shard.free)
      cut.kept[slot / 64] |= std::uint64_t{1} << (slot % 64);
    cut.uses = shard.uses;
    cut.count = shard.index.size();
    shard.cut = std::move(cuts.of_[s]);
  }
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 18: blobs. Owns a user outside of a recommender: how one is written, and read into the
// numbers of another. Uses rooms 1, 2, 5, 6, 8, 12, 13, 14 and 16.
//
// Numbers are those of one recommender, so items and event types go by name:
//
//   offset size field
//        0    4 magic     "PZU" and the version, 1
//        4    1 codec     0 stored, 1 zstd
//        5    4 raw size  of the payload, at most 2^24
//        9      payload   in the order of Blob::write(); counts, sizes and indices are varints
//       +8    8 checksum  XXH64 of all before
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// What a blob says, decoded and checked.
class Blob {
 public:
  // of: whose numbers the user's are.
  static Result<Vector<std::byte>> write(const User& user, const Catalogue& of) {
    Vector<std::byte> raw, events;
    FieldWriter archive{raw};
    const Fingerprints& model = of.base->fingerprints();
    archive(model.encoder, model.items);
    put_text(raw, user.key());
    User::Personal::each_field(archive, user.personal());
    Vector<std::uint32_t> items, types;
    const auto index_in = [](Vector<std::uint32_t>& all, std::uint32_t number) {
      const std::uint32_t* const at = std::find(all.begin(), all.end(), number);
      const auto index = static_cast<std::size_t>(at - all.begin());
      if (index == all.size()) all.push_back(number);
      return index;
    };
    std::int64_t before = 0;
    user.for_each_event([&](const RememberedEvent& event) {
      put_number(events, index_in(items, event.item));
      put_number(events,
                 event.event_type == no_event_type ? 0 : 1 + index_in(types, event.event_type));
      const std::uint64_t gap =
          static_cast<std::uint64_t>(event.timestamp) - static_cast<std::uint64_t>(before);
      put_number(events, gap << 1 ^ (0 - (gap >> 63)));
      before = event.timestamp;
    });
    for (const RecentImpressions::Entry& entry : user.impressions()) index_in(items, entry.item);
    put_number(raw, items.size());
    for (const std::uint32_t item : items) put_text(raw, (*of.ids)[item]);
    put_number(raw, types.size());
    for (const std::uint32_t type : types) put_text(raw, of.base->parts().event_types[type]);
    put_number(raw, user.events());
    archive.bytes(events);
    put_number(raw, user.impressions().size());
    for (const RecentImpressions::Entry& entry : user.impressions()) {
      put_number(raw, index_in(items, entry.item));
      archive(entry.count, entry.seconds);
    }
    const auto offset =
        user.generation >= of.space_since ? user.offset() : std::span<const std::byte>{};
    put_number(raw, offset.size());
    archive.bytes(offset);
    const auto state =
        user.generation >= of.encoder_since ? user.state() : std::span<const float>{};
    put_number(raw, state.size());
    archive.bytes(std::as_bytes(state));
    return packed(raw);
  }

  // Errors: format, version, checksum, compression, limit, corrupt; unsupported (zstd).
  static Result<Blob> read(std::span<const std::byte> bytes) {
    Blob blob;
    if (bytes.size() < head_size + 8 || std::memcmp(bytes.data(), "PZU", 3) != 0)
      return Error{Errc::format, "not a user's blob", 0};
    if (bytes[3] != std::byte{1})
      return Error{Errc::version,
                   "a user's blob of a later version; use a newer personalize_runtime.hpp", 3};
    const auto checked = bytes.first(bytes.size() - 8);
    if (xxh64(checked) != load_integer<std::uint64_t>(bytes.data() + checked.size()))
      return Error{Errc::checksum, "the user's blob is damaged"};
    const auto size = load_integer<std::uint32_t>(bytes.data() + 5);
    const auto stored = checked.subspan(head_size);
    if (size > most_bytes) return Error{Errc::limit, "the user's blob is over 16 MiB", 5};
    if (bytes[4] == std::byte{0})
      blob.raw_.assign(stored.begin(), stored.end());
    else if (auto unpacked = unpack(stored, size, blob.raw_); !unpacked)
      return unpacked.error();
    if (blob.raw_.size() != size || !blob.parse())
      return Error{Errc::corrupt, "the user's blob: its values contradict one another"};
    return blob;
  }

  std::string_view key() const noexcept { return key_; }
  UserKey::Owner owner() const noexcept { return UserKey::owner(key_); }

  // To visit(item, event type, timestamp), oldest first; the type is empty where there is none.
  template <class Visit>
  void for_each_event(Visit visit) const {
    for (const RememberedEvent& event : events_)
      visit(std::string_view(items_[event.item]),
            event.event_type == no_event_type ? std::string_view{}
                                              : std::string_view(types_[event.event_type]),
            event.timestamp);
  }

  // The user in the numbers of a catalogue. limit: events that are remembered. dropped: events on
  // items that it does not know.
  User::Owner make(const UserKey& key, const Catalogue& of, std::size_t limit,
                   std::size_t& dropped) const {
    const Fingerprints& model = of.base->fingerprints();
    const bool same_state =
        model_.encoder == model.encoder && state_.size() == of.encoder->state_size() &&
        largest(state_) <= max_magnitude;  // a larger one could overflow in a step
    const bool same_space =
        model_.items == model.items && offset_.size() == User::offset_size(of.dimension());
    User::Owner user = User::make(key, same_state ? state_.size() : 0);
    if (same_state) std::copy(state_.begin(), state_.end(), user->state().begin());
    user->generation = same_state ? of.generation : 0;
    const std::size_t kept = std::min(events_.size(), limit);
    const auto last = std::span<const RememberedEvent>(events_).last(kept);
    // Memory for what stays: more than a state file takes for a user's would be an error in it.
    const auto known = static_cast<std::size_t>(std::count_if(
        last.begin(), last.end(),
        [&](const RememberedEvent& event) { return number_of(of, event.item).has_value(); }));
    const std::size_t tail =
        user->tail_for(known + 1, impressions_.size(), same_space ? of.dimension() : 0);
    if (tail > 0) {
      void* memory = ::operator new(tail);
      user->move_tail(memory, tail);
    }
    if (same_space) user->set_offset(offset_);
    dropped = 0;
    for (RememberedEvent event : last) {
      const auto item = number_of(of, event.item);
      if (!item) {
        ++dropped;
        continue;
      }
      event.item = *item;
      if (event.event_type != no_event_type)
        event.event_type =
            of.base->parts().event_types.find(types_[event.event_type]).value_or(no_event_type);
      user->remember(event, limit);
    }
    for (RecentImpressions::Entry entry : impressions_) {
      const auto item = number_of(of, entry.item);
      if (!item) continue;
      entry.item = *item;
      user->add_impressions(std::span<const RecentImpressions::Entry>(&entry, 1));
    }
    User::Personal personal = personal_;
    personal.encoded = personal.encoded && same_state;
    if (user->events() == 0) personal.last_timestamp = no_timestamp;
    user->set_personal(personal);
    return user;
  }

 private:
  static constexpr std::size_t head_size = 9, most_bytes = std::size_t{1} << 24;

  Blob() = default;

  std::optional<std::uint32_t> number_of(const Catalogue& of, std::uint32_t index) const noexcept {
    return of.number_of(items_[index]);
  }

  static void put_number(Vector<std::byte>& out, std::uint64_t number) {
    std::array<std::byte, longest_varint> bytes;
    std::byte* const end = write_varint(bytes.data(), number);
    out.insert(out.end(), bytes.data(), end);
  }
  static void put_text(Vector<std::byte>& out, std::string_view text) {
    put_number(out, text.size());
    const auto bytes = text_bytes(text);
    out.insert(out.end(), bytes.begin(), bytes.end());
  }
  static std::uint64_t take_number(FieldReader& archive) noexcept {
    std::uint64_t number = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = archive.bytes(1);
      if (byte.empty()) return 0;
      number |= (std::to_integer<std::uint64_t>(byte[0]) & 0x7f) << shift;
      if (std::to_integer<unsigned>(byte[0]) < 0x80) return number;
    }
    archive.fail();
    return 0;
  }
  // Of so many of `least` bytes each; more than there can be fails.
  static std::size_t take_count(FieldReader& archive, std::size_t least) noexcept {
    const std::uint64_t count = take_number(archive);
    if (count > archive.left() / least) archive.fail();
    return archive.ok() ? static_cast<std::size_t>(count) : 0;
  }
  static void take_names(FieldReader& archive, std::vector<std::string>& names) {
    names.resize(take_count(archive, 2));
    for (std::string& name : names) {
      const auto raw = archive.bytes(take_number(archive));
      name.assign(reinterpret_cast<const char*>(raw.data()), raw.size());
      if (!is_id(name)) archive.fail();
    }
  }

  bool parse() {
    FieldReader archive{raw_};
    archive(model_.encoder, model_.items);
    const auto key = archive.bytes(take_number(archive));
    key_.assign(reinterpret_cast<const char*>(key.data()), key.size());
    if (!UserKey::is_text(key_)) return false;
    User::Personal::each_field(archive, personal_);
    take_names(archive, items_);
    take_names(archive, types_);
    events_.resize(take_count(archive, 3));
    std::int64_t before = 0;
    for (RememberedEvent& event : events_) {
      const std::uint64_t item = take_number(archive), type = take_number(archive);
      std::uint64_t gap = take_number(archive);
      gap = gap >> 1 ^ (0 - (gap & 1));
      before = static_cast<std::int64_t>(static_cast<std::uint64_t>(before) + gap);
      if (item >= items_.size() || type > types_.size()) return false;
      event = {static_cast<std::uint32_t>(item),
               type == 0 ? no_event_type : static_cast<std::uint32_t>(type - 1), before};
    }
    impressions_.resize(take_count(archive, 9));
    if (impressions_.size() > RecentImpressions::capacity) return false;
    for (RecentImpressions::Entry& entry : impressions_) {
      const std::uint64_t item = take_number(archive);
      archive(entry.count, entry.seconds);
      if (item >= items_.size() || !(entry.count >= 0 && entry.count <= max_magnitude))
        return false;
      entry.item = static_cast<std::uint32_t>(item);
    }
    const auto offset = archive.bytes(take_number(archive));
    offset_.assign(offset.begin(), offset.end());
    state_.resize(take_count(archive, sizeof(float)));
    const auto state = archive.bytes(state_.size() * sizeof(float));
    if (!state.empty()) std::memcpy(state_.data(), state.data(), state.size());
    return archive.at_end() && personal_.is_sound() && all_finite(state_);
  }

  static Result<Vector<std::byte>> packed(const Vector<std::byte>& raw) {
    if (raw.size() > most_bytes) return Error{Errc::limit, "the user has over 16 MiB"};
    Vector<std::byte> out;
    for (const char c : std::string_view("PZU\1")) out.push_back(static_cast<std::byte>(c));
    out.push_back(std::byte{0});
    append_integer(out, static_cast<std::uint32_t>(raw.size()));
#ifndef PERSONALIZE_NO_ZSTD
    constexpr int level = 3;
    out.resize(head_size + ZSTD_compressBound(raw.size()));
    const std::size_t size = ZSTD_compress(out.data() + head_size, out.size() - head_size,
                                           raw.data(), raw.size(), level);
    const bool smaller = !ZSTD_isError(size) && size < raw.size();
    out.resize(head_size + (smaller ? size : 0));
    if (smaller)
      out[4] = std::byte{1};
    else
      out.insert(out.end(), raw.begin(), raw.end());
#else
    out.insert(out.end(), raw.begin(), raw.end());
#endif
    append_integer(out, xxh64(out));
    return out;
  }
  static Result<void> unpack([[maybe_unused]] std::span<const std::byte> stored,
                             [[maybe_unused]] std::size_t size,
                             [[maybe_unused]] Vector<std::byte>& raw) {
#ifndef PERSONALIZE_NO_ZSTD
    if (size / most_zstd_ratio > stored.size())
      return Error{Errc::compression,
                   "the user's blob is smaller than zstd can make what it claims to hold", 5};
    raw.resize(size);
    const std::size_t got = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
    if (ZSTD_isError(got) || got != size)
      return Error{Errc::compression, "the user's blob does not decompress to its size", 5};
    return {};
#else
    return Error{Errc::unsupported,
                 "the user's blob is compressed, and this build has PERSONALIZE_NO_ZSTD"};
#endif
  }

  Vector<std::byte> raw_;
  Fingerprints model_;
  std::string key_;
  User::Personal personal_;
  std::vector<std::string> items_, types_;
  Vector<RememberedEvent> events_;                // of indices in items_ and types_
  Vector<RecentImpressions::Entry> impressions_;  // the same
  Vector<std::byte> offset_;
  Vector<float> state_;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 19: gates. Owns what events have to pass: the window of event ids, and the gate of time.
// Uses rooms 1, 2, 9, 11, 14 and 16.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// The last event ids of all users, by keyed hashes, spread over 64 locks by the hash, so that no
// one user fills a part of it alone. Any number of threads may call.
class EventIds {
 public:
  // most: ids remembered, some 24 bytes each, taken as they come.
  explicit EventIds(std::size_t most) : capacity_(std::max<std::size_t>(most / stripe_count, 1)) {}

  // An id while its event is recorded: nobody else can record one of the same id meanwhile.
  // Displaces an older id only where the event counts.
  class Claim {
   public:
    // hash: of hash_of(); 0: there is no id.
    Claim(EventIds& ids, std::uint64_t hash) : hash_(hash) {
      if (hash == 0) return;
      known_ = !ids.claim(hash_);
      if (!known_) ids_ = &ids;
    }
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;
    ~Claim() {
      if (ids_) ids_->end(hash_, false);
    }
    bool is_known() const noexcept { return known_; }
    void keep() noexcept {
      if (ids_) std::exchange(ids_, nullptr)->end(hash_, true);
    }

   private:
    EventIds* ids_ = nullptr;
    std::uint64_t hash_ = 0;
    bool known_ = false;
  };

  static std::uint64_t hash_of(std::string_view id, const UserKey& user,
                               const HashKey& key) noexcept {
    if (id.empty()) return 0;
    const std::array<std::uint64_t, 2> both{siphash(key, text_bytes(id)), user.hash()};
    return std::max<std::uint64_t>(siphash(key, std::as_bytes(std::span(both))), 1);
  }

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Stripe& stripe : stripes_) {
      const lock_guard lock{stripe.mutex};
      sum += stripe.index.bytes() + allocated(stripe.ring.hashes) + allocated(stripe.claimed);
    }
    return sum;
  }
  std::size_t count() const {
    std::size_t sum = 0;
    for (const Stripe& stripe : stripes_) {
      const lock_guard lock{stripe.mutex};
      sum += stripe.ring.hashes.size();
    }
    return sum;
  }

  // For write().
  void begin_cut() noexcept { detail::begin_cut(stripes_); }
  bool end_cut() noexcept { return detail::end_cut(stripes_); }
  // All, those of a stripe from the oldest on.
  void write(FieldWriter& archive) const {
    Ring ring;
    for (const Stripe& stripe : stripes_) {
      ring.hashes.reserve(capacity_);  // without the lock
      {
        const lock_guard lock{stripe.mutex};
        const Ring& from = stripe.before.or_now(stripe.ring);
        ring.hashes.assign(from.hashes.begin(), from.hashes.end());
        ring.next = from.next;
      }
      const std::size_t count = ring.hashes.size();
      archive(static_cast<std::uint64_t>(count));
      const std::size_t oldest = count < capacity_ ? 0 : ring.next;
      for (std::size_t i = 0; i < count; ++i) archive(ring.hashes[(oldest + i) % count]);
    }
  }
  // What write() wrote, into an empty one; of more than there is room for, the latest.
  void read(FieldReader& archive) {
    for (std::size_t s = 0; s < stripe_count; ++s) {
      std::uint64_t count = 0;
      archive(count);
      if (count > archive.left() / sizeof(std::uint64_t)) return archive.fail();
      for (std::uint64_t i = 0; i < count; ++i) {
        std::uint64_t hash = 0;
        archive(hash);
        if (hash % stripe_count != s || !claim(hash)) return archive.fail();
        end(hash, true);
      }
    }
  }

 private:
  static constexpr std::size_t stripe_count = 64;
  struct Ring {
    Vector<std::uint64_t> hashes;  // in the order of arrival
    std::size_t next = 0;
  };
  struct Stripe {
    mutable RankedMutex<2> mutex;
    Before<Ring> before;
    HashIndex index;  // of places in the ring
    Ring ring;
    Vector<std::uint64_t> claimed;  // of events that are being recorded
  };

  // False where the hash is known. Memory for remembering it is taken, without the lock.
  bool claim(std::uint64_t hash) {
    Stripe& stripe = stripes_[hash % stripe_count];
    for (;;) {
      std::size_t ring = 0, claimed = 0;
      {
        const lock_guard lock{stripe.mutex};
        const Vector<std::uint64_t>& hashes = stripe.ring.hashes;
        if (stripe.index.find(hash, [&](std::uint32_t p) { return hashes[p] == hash; }) ||
            std::find(stripe.claimed.begin(), stripe.claimed.end(), hash) != stripe.claimed.end())
          return false;
        ring = std::min(hashes.size() + stripe.claimed.size() + 1, capacity_);
        claimed = stripe.claimed.size() + 1;
        if (ring <= hashes.capacity() && claimed <= stripe.claimed.capacity()) {
          stripe.claimed.push_back(hash);
          return true;
        }
      }
      grow(stripe, std::min(std::max<std::size_t>(2 * ring, 16), capacity_), 2 * claimed);
    }
  }

  static void grow(Stripe& stripe, std::size_t room, std::size_t claimed) {
    HashIndex larger = HashIndex::of_capacity(room + room / 2 + 2);
    Vector<std::uint64_t> hashes, claims;
    hashes.reserve(room);
    claims.reserve(claimed);
    const lock_guard lock{stripe.mutex};
    if (stripe.claimed.capacity() < claims.capacity()) {
      claims.assign(stripe.claimed.begin(), stripe.claimed.end());
      claims.swap(stripe.claimed);
    }
    if (stripe.ring.hashes.capacity() >= room) return;
    hashes.assign(stripe.ring.hashes.begin(), stripe.ring.hashes.end());
    hashes.swap(stripe.ring.hashes);
    larger.take(stripe.index);
    std::swap(larger, stripe.index);
  }

  void end(std::uint64_t hash, bool keep) noexcept {
    Stripe& stripe = stripes_[hash % stripe_count];
    const lock_guard lock{stripe.mutex};
    auto& claimed = stripe.claimed;
    const auto is_it = [hash](std::uint64_t one) { return one == hash; };
    claimed.erase(std::remove_if(claimed.begin(), claimed.end(), is_it), claimed.end());
    if (!keep) return;
    Ring& ring = stripe.ring;
    stripe.before.keep([&] { return std::make_unique<Ring>(ring); });
    const auto place = static_cast<std::uint32_t>(ring.next);
    ring.next = (ring.next + 1) % capacity_;
    if (place == ring.hashes.size()) {
      ring.hashes.push_back(hash);
    } else {
      stripe.index.erase(ring.hashes[place], place);
      ring.hashes[place] = hash;
    }
    stripe.index.insert(hash, place);
  }

  std::size_t capacity_;  // a stripe
  std::array<Stripe, stripe_count> stripes_;
};

// When something happened, checked, and the clock's time.
struct Time {
  std::int64_t timestamp;
  std::int64_t now;
};

// The gate through which every time comes in, and what all users share of it: the time of the
// latest interaction, which no client moves far. Any number of threads.
class TimeGate {
 public:
  // options outlive the gate. latest: of the interactions before, no_timestamp where there are
  // none.
  TimeGate(const RecommenderOptions& options, std::int64_t latest)
      : options_(options), latest_(latest) {}

  std::int64_t now() const {
    if (options_.clock) return options_.clock();
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }

  // what: the argument's name. Errors (invalid_argument): more than clock_skew ahead of the clock.
  Result<Time> check(std::optional<std::int64_t> timestamp, const char* what) const {
    const std::int64_t now = this->now();
    if (!timestamp || *timestamp <= now) return Time{timestamp.value_or(now), now};
    const std::int64_t ahead = elapsed(now, *timestamp);
    if (ahead <= options_.clock_skew.count()) return Time{*timestamp, now};
    std::string text =
        joined({what, " is ", *timestamp, ", ", ahead, " seconds ahead of the clock"});
    for (const auto& [scale, unit] : {std::pair<std::int64_t, const char*>{1'000, "milliseconds"},
                                      {1'000'000, "microseconds"},
                                      {1'000'000'000, "nanoseconds"}})
      if (const std::int64_t seconds = *timestamp / scale;
          now > 0 && seconds > now / 16 && elapsed(now, seconds) <= now) {
        text += joined({"; it looks like ", unit, ", and Unix seconds are wanted"});
        break;
      }
    return Error{Errc::invalid_argument, std::move(text)};
  }

  // The time of the latest interaction.
  std::int64_t latest() const noexcept { return latest_.load(memory_order_relaxed); }
  bool young(std::int64_t created) const noexcept {
    return Catalogue::young(created, latest(), options_.exploration_item_age_cut_off);
  }
  // Of the times that count as young, the earliest.
  std::int64_t oldest_young() const noexcept {
    const std::int64_t last = latest(), first = no_timestamp + 1;
    const std::int64_t cut_off = options_.exploration_item_age_cut_off.count();
    return last < first + cut_off ? first : last - cut_off;
  }
  // The time at which an event counts for what all share: its own, but no later than the clock and,
  // where it lies in the clock's past as in a replay, no more than a week later than the events
  // before it.
  std::int64_t shared(const Time& time) const noexcept {
    const std::int64_t t = std::min(time.timestamp, time.now);
    const std::int64_t last = latest_event_.load(memory_order_relaxed);
    if (last == no_timestamp || elapsed(t, time.now) <= options_.clock_skew.count()) return t;
    return elapsed(last, t) > largest_step ? last + largest_step : t;
  }
  // By an event of a user (a hash), who alone moves it by no more than a week in a replay.
  void advance(const Time& time, std::uint64_t user) noexcept {
    std::int64_t to = shared(time);
    const std::int64_t last = latest_event_.load(memory_order_relaxed);
    if (to <= last) return;
    if (latest_user_.exchange(user, memory_order_relaxed) != user)
      latest_before_.store(last, memory_order_relaxed);
    const std::int64_t before = latest_before_.load(memory_order_relaxed);
    if (before != no_timestamp && elapsed(before, to) > largest_step &&
        elapsed(to, time.now) > options_.clock_skew.count())
      to = before + largest_step;
    raise(latest_event_, to);
    raise(latest_, to);
  }

  // While nobody else calls.
  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    const auto one = [&](auto& shared) {
      auto value = shared.load();
      archive(value);
      if constexpr (Archive::reads) shared.store(value);
    };
    one(self.latest_);
    one(self.latest_event_);
    one(self.latest_user_);
    one(self.latest_before_);
  }
  // Of a state whose clock was ahead.
  void limit(std::int64_t most) noexcept {
    for (atomic<std::int64_t>* each : {&latest_, &latest_event_, &latest_before_})
      each->store(std::min(each->load(), most));
  }
  // Another model's interactions are known of, too.
  void know(std::int64_t latest) noexcept { raise(latest_, latest); }

 private:
  static void raise(atomic<std::int64_t>& highest, std::int64_t to) noexcept {
    std::int64_t old = highest.load(memory_order_relaxed);
    while (old < to && !highest.compare_exchange_weak(old, to, memory_order_relaxed)) {
    }
  }

  static constexpr std::int64_t largest_step = 7 * 86'400;  // of latest_event_, see shared()

  const RecommenderOptions& options_;
  atomic<std::int64_t> latest_;                      // of all interactions
  atomic<std::int64_t> latest_event_{no_timestamp};  // of those that were recorded here
  // Who moved that last, and where it was before.
  atomic<std::uint64_t> latest_user_{0};
  atomic<std::int64_t> latest_before_{no_timestamp};
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 20: folder. Owns the folder that holds what outlives a process, and files that grow at their
// end: what of it a crash or a power cut leaves. Uses rooms 1 and 2.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Files by descriptor. Functions that return an int: 0, or what errno says.
#if defined(_WIN32)
inline constexpr bool has_descriptors = true;
inline int create_descriptor(const std::string& path) {
  return ::_wopen(native_path(path).c_str(),
                  _O_WRONLY | _O_CREAT | _O_EXCL | _O_APPEND | _O_BINARY | _O_NOINHERIT,
                  _S_IREAD | _S_IWRITE);
}
inline int open_descriptor(const std::string& path) {
  return ::_wopen(native_path(path).c_str(), _O_WRONLY | _O_APPEND | _O_BINARY | _O_NOINHERIT);
}
inline void close_descriptor(int descriptor) noexcept { ::_close(descriptor); }
inline std::int64_t write_some(int descriptor, std::span<const std::byte> bytes) noexcept {
  return ::_write(descriptor, bytes.data(), static_cast<unsigned>(bytes.size()));
}
inline int sync_descriptor(int descriptor) noexcept {
  return ::_commit(descriptor) == 0 ? 0 : errno;
}
inline int cut_descriptor(int descriptor, std::uint64_t size) noexcept {
  return ::_chsize_s(descriptor, static_cast<std::int64_t>(size));
}
inline std::int64_t descriptor_size(int descriptor) noexcept {
  return ::_filelengthi64(descriptor);
}
#elif PERSONALIZE_HAS_POSIX
inline constexpr bool has_descriptors = true;
inline int create_descriptor(const std::string& path) {
  return ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_NOFOLLOW | O_CLOEXEC,
                0600);
}
inline int open_descriptor(const std::string& path) {
  return ::open(path.c_str(), O_WRONLY | O_APPEND | O_NOFOLLOW | O_CLOEXEC);
}
inline void close_descriptor(int descriptor) noexcept { ::close(descriptor); }
inline std::int64_t write_some(int descriptor, std::span<const std::byte> bytes) noexcept {
  return ::write(descriptor, bytes.data(), bytes.size());
}
inline int sync_descriptor(int descriptor) noexcept {
#if defined(F_FULLFSYNC)
  // Without it the drive may keep the bytes in a memory that a power cut empties.
  if (::fcntl(descriptor, F_FULLFSYNC) == 0) return 0;
#endif
  for (;;) {
#if defined(__linux__)
    if (::fdatasync(descriptor) == 0) return 0;
#else
    if (::fsync(descriptor) == 0) return 0;
#endif
    if (errno != EINTR) return errno;
  }
}
inline int cut_descriptor(int descriptor, std::uint64_t size) noexcept {
  if (size > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) return EFBIG;
  while (::ftruncate(descriptor, static_cast<off_t>(size)) != 0)
    if (errno != EINTR) return errno;
  return 0;
}
inline std::int64_t descriptor_size(int descriptor) noexcept {
  struct stat status {};
  return ::fstat(descriptor, &status) == 0 ? status.st_size : -1;
}
#else
inline constexpr bool has_descriptors = false;
inline int create_descriptor(const std::string&) noexcept { return -1; }
inline int open_descriptor(const std::string&) noexcept { return -1; }
inline void close_descriptor(int) noexcept {}
inline std::int64_t write_some(int, std::span<const std::byte>) noexcept { return -1; }
inline int sync_descriptor(int) noexcept { return ENOSYS; }
inline int cut_descriptor(int, std::uint64_t) noexcept { return ENOSYS; }
inline std::int64_t descriptor_size(int) noexcept { return -1; }
#endif

inline Error no_descriptors(const std::string& path) {
  return {Errc::unsupported, joined({path, ": this platform has no files that can be synced"})};
}

class Descriptor {
 public:
  explicit Descriptor(int descriptor = -1) noexcept : descriptor_(descriptor) {}
  Descriptor(Descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Descriptor() {
    if (descriptor_ >= 0) close_descriptor(descriptor_);
  }
  explicit operator bool() const noexcept { return descriptor_ >= 0; }
  int operator*() const noexcept { return descriptor_; }

 private:
  int descriptor_;
};

// A file that grows at its end. append, cut and sync return 0, or what errno says: where they are
// called there may be no memory for a sentence.
class AppendFile {
 public:
  // That is not there yet. For its owner alone: records tell of users.
  static Result<AppendFile> create(const std::string& path) {
    if (!has_descriptors) return no_descriptors(path);
    Descriptor file{create_descriptor(path)};
    if (!file) return io_error(path, "cannot create");
    return AppendFile(std::move(file));
  }
  // Cuts off what lies behind `size` bytes and syncs what is left. Errors: truncated, where the
  // file is shorter.
  static Result<AppendFile> open(const std::string& path, std::uint64_t size) {
    if (!has_descriptors) return no_descriptors(path);
    AppendFile file{Descriptor(open_descriptor(path))};
    if (!file.descriptor_) return io_error(path, "cannot open");
    const std::int64_t found = file.size();
    if (found < 0) return io_error(path, "cannot tell its size");
    if (static_cast<std::uint64_t>(found) < size)
      return Error{Errc::truncated, joined({path, ": has ", found, " of ", size, " bytes"})};
    if (static_cast<std::uint64_t>(found) > size && (errno = file.cut(size)) != 0)
      return io_error(path, "cannot cut off its end");
    if ((errno = file.sync()) != 0) return io_error(path, "cannot sync");
    return file;
  }

  // All of them; where it fails, a part of them may stand at the file's end.
  int append(std::span<const std::byte> bytes) noexcept {
    while (!bytes.empty()) {
      const std::int64_t written = write_some(*descriptor_, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return written < 0 ? errno : EIO;
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
    return 0;
  }
  int cut(std::uint64_t size) noexcept { return cut_descriptor(*descriptor_, size); }
  int sync() noexcept { return sync_descriptor(*descriptor_); }
  std::int64_t size() const noexcept { return descriptor_size(*descriptor_); }  // < 0: errno

 private:
  explicit AppendFile(Descriptor descriptor) noexcept : descriptor_(std::move(descriptor)) {}
  Descriptor descriptor_;
};

// A folder that one recommender keeps its state in, for as long as the object lives: a lock on the
// file `lock` in it keeps out other processes and other recommenders of this one. The system gives
// the lock back when the process ends, however it ends.
class Folder {
 public:
  // Makes the folder where it is missing, but not those above it.
  static Result<Folder> open(const std::string& path) {
    if (!has_descriptors) return no_descriptors(path);
    Folder folder;
    folder.path_ = path;
    if (auto opened = folder.open_locked(); !opened) return opened.error();
    return folder;
  }

  std::string path_of(std::string_view name) const { return joined({path_, "/", name}); }
  // Sorted; without the lock.
  Result<std::vector<std::string>> list() const {
    std::vector<std::string> names;
    if (!read_names(names)) return io_error(path_, "cannot list");
    std::erase_if(names, [](const auto& n) { return n == "." || n == ".." || n == lock_name; });
    std::sort(names.begin(), names.end(), [](const auto& a, const auto& b) { return a < b; });
    return names;
  }
  Result<void> remove(std::string_view name) const {
    const std::string path = path_of(name);
#if defined(_WIN32)
    const bool removed = ::_wremove(native_path(path).c_str()) == 0;
#else
    const bool removed = std::remove(path.c_str()) == 0;
#endif
    if (!removed) return io_error(path, "cannot remove");
    return {};
  }
  // What a FileSink left when its process ended.
  Result<void> remove_parts() const {
    const auto names = list();
    if (!names) return names.error();
    for (const std::string& name : *names)
      if (name.ends_with(".part"))
        if (auto removed = remove(name); !removed) return removed;
    return {};
  }
  // Files that were made, renamed and removed in it. NTFS keeps a record of such by itself; file
  // systems that sync no folder say EINVAL.
  Result<void> sync() const {
#if PERSONALIZE_HAS_POSIX
    if (::fsync(*folder_) != 0 && errno != EINVAL) return io_error(path_, "cannot sync the folder");
#endif
    return {};
  }

 private:
  static constexpr std::string_view lock_name = "lock";

  Folder() = default;

#if defined(_WIN32)
  Result<void> open_locked() {
    if (::_wmkdir(native_path(path_).c_str()) != 0 && errno != EEXIST)
      return io_error(path_, "cannot make the folder");
    const std::string path = path_of(lock_name);
    // Nobody else can open it.
    lock_ = Descriptor(::_wsopen(native_path(path).c_str(),
                                 _O_RDWR | _O_CREAT | _O_BINARY | _O_NOINHERIT, _SH_DENYRW,
                                 _S_IREAD | _S_IWRITE));
    if (!lock_) return errno == EACCES ? taken() : io_error(path, "cannot open");
    return {};
  }
  bool read_names(std::vector<std::string>& names) const {
    struct _wfinddata64_t found {};
    const std::intptr_t search = ::_wfindfirst64(native_path(path_of("*")).c_str(), &found);
    if (search == -1) return false;
    do {
      // A name has at most 260 characters of 16 bits.
      std::array<char, 1024> name{};
      ::WideCharToMultiByte(65001, 0, found.name, -1, name.data(), static_cast<int>(name.size()),
                            nullptr, nullptr);
      names.emplace_back(name.data());
    } while (::_wfindnext64(search, &found) == 0);
    const bool all = errno == ENOENT;
    ::_findclose(search);
    return all;
  }
#elif PERSONALIZE_HAS_POSIX
  Result<void> open_locked() {
    const bool made = ::mkdir(path_.c_str(), 0700) == 0;
    if (!made && errno != EEXIST) return io_error(path_, "cannot make the folder");
    folder_ = Descriptor(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!folder_) return io_error(path_, "cannot open the folder");
    if (made) {  // its name lies in the one above
      const Descriptor above{::open(path_of("..").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
      if (above) (void)::fsync(*above);
    }
    const std::string path = path_of(lock_name);
    lock_ = Descriptor(::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (!lock_) return io_error(path, "cannot open");
    while (::flock(*lock_, LOCK_EX | LOCK_NB) != 0) {
      if (errno == EWOULDBLOCK) return taken();
      if (errno != EINTR) return io_error(path, "cannot lock");
    }
    return {};
  }
  bool read_names(std::vector<std::string>& names) const {
    const std::unique_ptr<DIR, CloseListing> listing{::opendir(path_.c_str())};
    if (!listing) return false;
    for (;;) {
      errno = 0;
      const struct dirent* const entry = ::readdir(listing.get());
      if (!entry) return errno == 0;
      names.emplace_back(entry->d_name);
    }
  }
  struct CloseListing {
    void operator()(DIR* listing) const noexcept { ::closedir(listing); }
  };
#else
  Result<void> open_locked() { return no_descriptors(path_); }
  bool read_names(std::vector<std::string>&) const { return false; }
#endif
  Error taken() const {
    return {Errc::io,
            joined({path_, ": another process, or another recommender of this one, has it open"})};
  }

  std::string path_;
  Descriptor folder_, lock_;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 21: journal. Owns what keeps records of bytes through a crash: the format of its files, how
// they are read, and how many threads write them. Knows nothing of what the records say. Uses rooms
// 1, 2 and 20.
//
// A journal is a row of files in one folder. All integers little-endian. Header, 64 bytes:
//
//   offset size field
//        0    8 magic           89 50 5A 4A 0D 0A 1A 0A  ("\x89PZJ\r\n\x1a\n")
//        8    2 major version   1; a reader refuses a greater one
//       10    2 minor version   0; a greater one adds types of records that older readers skip
//       12    4 reserved        zero
//       16    8 lineage         a random number that all files of one folder share
//       24    8 number          of this file in the folder
//       32    8 first sequence  no record of the file has a lesser number. The first may have a
//                               greater one: a file is made before the journal goes over to it
//       40   16 model           2 x u64, a fingerprint of what the records depend on
//       56    8 header checksum XXH64 of bytes 0 to 55
//
// Behind it lie records, back to back, up to the end of the file; their numbers are consecutive:
//
//        0    4 payload size    n, at most 2^26
//        4    4 type
//        8    8 sequence        the record's number
//       16    n payload
//     16+n    8 checksum        XXH64 of the record's bytes before it, with the seed
//                               lineage ^ number: bytes of another file are never taken for it
//
// A crash leaves a record in part, or several, at the end: a torn tail, which is cut off. It is
// told from damage, which is an error, by what follows: no whole record lies behind a torn one.
//
// Who writes: of the threads that call commit() one hands the bytes of all to the system and one
// syncs for all, while the others wait. Both work without the mutex (rank 3), under which there
// are no file operations and nothing is called.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

inline constexpr std::array<unsigned char, 8> journal_magic{0x89, 'P',  'Z',  'J',
                                                            '\r', '\n', 0x1a, '\n'};
inline constexpr std::uint16_t journal_major = 1, journal_minor = 0;
inline constexpr std::size_t journal_header_size = 64;
// Of a record: in front of its payload, and with the checksum behind it.
inline constexpr std::size_t record_head_size = 16, record_frame_size = record_head_size + 8;
inline constexpr std::size_t most_payload = std::size_t{1} << 26;

struct JournalHeader {
  std::uint64_t lineage = 0, number = 0, first_sequence = 0;
  std::array<std::uint64_t, 2> model{};

  std::uint64_t seed() const noexcept { return lineage ^ number; }
};

inline Vector<std::byte> journal_header_bytes(const JournalHeader& header) {
  const auto magic = std::as_bytes(std::span(journal_magic));
  Vector<std::byte> bytes(magic.begin(), magic.end());
  append_integer(bytes, journal_major);
  append_integer(bytes, journal_minor);
  append_integer(bytes, std::uint32_t{0});
  for (const std::uint64_t value :
       {header.lineage, header.number, header.first_sequence, header.model[0], header.model[1]})
    append_integer(bytes, value);
  append_integer(bytes, xxh64(bytes));
  return bytes;
}

// What a file is to be; nothing is asked of what is left out.
struct JournalExpectation {
  std::optional<std::uint64_t> lineage = {}, number = {};
  std::optional<std::uint64_t> first_record =
      {};  // the number of the first record, if there is one
};

// bytes: the first 64 of a file, or all that it has. Errors: truncated, where the file was being
// made when its process or the power ended, so that it never had a record; checksum, format,
// version, corrupt.
inline Result<JournalHeader> read_journal_header(const std::string& path,
                                                 std::span<const std::byte> bytes, bool is_whole,
                                                 const JournalExpectation& expected) {
  const auto error = [&](Errc code, std::string_view what, std::uint64_t at) {
    return Error{code, joined({path, ": ", what}), at};
  };
  const bool blank =
      std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
  if (bytes.size() < journal_header_size || (is_whole && blank))
    return error(Errc::truncated, "a journal with a torn header: it was never begun", bytes.size());
  const std::byte* head = bytes.data();
  if (std::memcmp(head, journal_magic.data(), journal_magic.size()) != 0)
    return error(Errc::format, "not a journal: the first 8 bytes are not a journal's", 0);
  if (xxh64(bytes.first(56)) != load_integer<std::uint64_t>(head + 56))
    return error(Errc::checksum, "the journal's header does not match its checksum", 0);
  const auto major = load_integer<std::uint16_t>(head + 8);
  if (major != journal_major)
    return Error{Errc::version,
                 joined({path, ": a journal of version ", major, ", this reader knows ",
                         journal_major, "; use a newer personalize_runtime.hpp"}),
                 8};
  if (load_integer<std::uint32_t>(head + 12) != 0)
    return error(Errc::corrupt, "reserved bytes of the journal's header are not zero", 12);
  const auto word = [&](std::size_t at) { return load_integer<std::uint64_t>(head + at); };
  const JournalHeader header{word(16), word(24), word(32), {word(40), word(48)}};
  if (expected.lineage && *expected.lineage != header.lineage)
    return error(Errc::corrupt, "a journal that belongs to another folder's state", 16);
  if (expected.number && *expected.number != header.number)
    return Error{Errc::corrupt,
                 joined({path, ": is journal ", header.number, ", not ", *expected.number}), 24};
  return header;
}

// --------------------------------------------------------------------------------------------
// Reading

// A file's bytes through a window that moves forward over it.
class JournalReader {
 public:
  struct Entry {
    std::uint64_t sequence;
    std::uint32_t type;
    std::span<const std::byte> payload;  // until the next call
  };

  static Result<JournalReader> open(const std::string& path) {
    JournalReader reader;
    reader.path_ = path;
    reader.file_.reset(open_file(path, "rb"));
    std::FILE* const file = reader.file_.get();
    if (!file) return io_error(path, "cannot open");
    const std::int64_t size = seek(file, 0, SEEK_END) ? position(file) : -1;
    if (size < 0 || !seek(file, 0, SEEK_SET)) return io_error(path, "cannot tell its size");
    reader.size_ = static_cast<std::uint64_t>(size);
    return reader;
  }
  std::uint64_t size() const noexcept { return size_; }

  // `count` bytes at `offset`, which the file has. Offsets never become less.
  Result<std::span<const std::byte>> at(std::uint64_t offset, std::size_t count) {
    const auto skipped = static_cast<std::size_t>(offset - base_);
    if (skipped + count > have_) {
      constexpr std::size_t piece = std::size_t{1} << 20;
      have_ -= skipped;
      base_ = offset;
      if (have_ > 0) std::memmove(window_.data(), window_.data() + skipped, have_);
      const auto wanted =
          static_cast<std::size_t>(std::min<std::uint64_t>(size_ - base_, count + piece));
      if (window_.size() < wanted) {
        window_.reserve(wanted);
        window_.resize(wanted);
      }
      const std::size_t more = wanted - have_;
      if (std::fread(window_.data() + have_, 1, more, file_.get()) != more) {
        if (std::ferror(file_.get())) return io_error(path_, "cannot read");
        return Error{Errc::truncated, joined({path_, ": became shorter while it was read"})};
      }
      have_ = wanted;
    }
    return std::span<const std::byte>(window_).subspan(static_cast<std::size_t>(offset - base_),
                                                       count);
  }

  // The whole record at `offset`; none where there is no such.
  Result<std::optional<Entry>> entry(std::uint64_t offset, std::uint64_t seed) {
    constexpr auto none = std::nullopt;
    if (size_ - offset < record_frame_size) return std::optional<Entry>{none};
    const auto head = at(offset, record_head_size);
    if (!head) return head.error();
    const auto payload = load_integer<std::uint32_t>(head->data());
    if (payload > most_payload || payload > size_ - offset - record_frame_size)
      return std::optional<Entry>{none};
    const auto bytes = at(offset, record_frame_size + payload);
    if (!bytes) return bytes.error();
    const std::size_t checked = record_head_size + payload;
    const std::byte* const p = bytes->data();
    if (xxh64(bytes->first(checked), seed) != load_integer<std::uint64_t>(p + checked))
      return std::optional<Entry>{none};
    return std::optional<Entry>{Entry{load_integer<std::uint64_t>(p + 8),
                                      load_integer<std::uint32_t>(p + 4),
                                      bytes->subspan(record_head_size, payload)}};
  }

  // Whether a whole record lies behind the bad one at `bad`, which would have the number `least`
  // (where `exact` is false: at least that). What could be one by its size and number is hashed; a
  // file that has so many of those that it must have been made to counts as having one.
  Result<bool> has_entry_behind(std::uint64_t bad, std::uint64_t seed, std::uint64_t least,
                                bool exact) {
    std::uint64_t budget = 4 * (size_ - bad) + (std::uint64_t{1} << 28);
    for (std::uint64_t offset = bad + 1; size_ - offset >= record_frame_size; ++offset) {
      const auto left = size_ - offset;
      const auto window =
          at(offset, static_cast<std::size_t>(std::min<std::uint64_t>(left, 1 << 16)));
      if (!window) return window.error();
      std::uint64_t payload = 0;
      std::size_t i = 0;
      for (; i + record_head_size <= window->size(); ++i) {
        const std::byte* const p = window->data() + i;
        payload = load_integer<std::uint32_t>(p);
        // As many records as can lie between.
        const std::uint64_t most = exact ? (offset + i - bad) / record_frame_size : ~least;
        if (payload <= most_payload && payload + record_frame_size <= left - i &&
            load_integer<std::uint64_t>(p + 8) - least <= most)
          break;
      }
      offset += i;
      if (i + record_head_size > window->size()) {
        --offset;
        continue;
      }
      if (payload + record_frame_size > budget) return true;
      budget -= payload + record_frame_size;
      const auto found = entry(offset, seed);
      if (!found) return found.error();
      if (*found) return true;
    }
    return false;
  }

 private:
  JournalReader() = default;

  std::string path_;
  File file_;
  BareVector<std::byte> window_;  // its first have_ bytes are the file's from base_ on
  std::uint64_t size_ = 0, base_ = 0;
  std::size_t have_ = 0;
};

// Of a journal whose records are not read yet. Errors: as read_journal_header; io.
inline Result<JournalHeader> peek_journal_header(const std::string& path,
                                                 const JournalExpectation& expected) {
  return catching_bad_alloc([&]() -> Result<JournalHeader> {
    auto reader = JournalReader::open(path);
    if (!reader) return reader.error();
    const std::uint64_t size = reader->size();
    const auto head =
        reader->at(0, static_cast<std::size_t>(std::min<std::uint64_t>(size, journal_header_size)));
    if (!head) return head.error();
    return read_journal_header(path, *head, size <= journal_header_size, expected);
  });
}

struct JournalEnd {
  JournalHeader header;
  std::uint64_t end = 0;            // behind the last sound record
  std::uint64_t first_record = 0;   // the number of the first; without records as next_sequence
  std::uint64_t next_sequence = 0;  // of the record that would come next
  std::uint64_t torn = 0;           // bytes behind the end
};

using JournalVisit = std::function<Result<void>(std::uint64_t sequence, std::uint32_t type,
                                                std::span<const std::byte> payload)>;

// Reads a journal's file from front to back and calls `visit` for each record, whose errors end it.
// Takes memory for one record and a MiB. Errors, beside those of the header: corrupt, with the
// offset, where a record is bad or missing and others follow; those before it were visited.
inline Result<JournalEnd> read_journal(const std::string& path, const JournalExpectation& expected,
                                       const JournalVisit& visit) {
  return catching_bad_alloc([&]() -> Result<JournalEnd> {
    auto reader = JournalReader::open(path);
    if (!reader) return reader.error();
    const std::uint64_t size = reader->size();
    const auto head =
        reader->at(0, static_cast<std::size_t>(std::min<std::uint64_t>(size, journal_header_size)));
    if (!head) return head.error();
    const auto header = read_journal_header(path, *head, size <= journal_header_size, expected);
    if (!header) return header.error();

    JournalEnd result{*header, journal_header_size};
    std::uint64_t& next = result.next_sequence;
    next = expected.first_record.value_or(header->first_sequence);
    result.first_record = next;
    bool exact = expected.first_record.has_value();
    const auto damaged = [&](std::initializer_list<Piece> what) {
      return Error{
          Errc::corrupt,
          joined({path, ": damaged at byte ", result.end, ": record ", next, joined(what)}),
          result.end};
    };
    while (result.end < size) {
      const auto entry = reader->entry(result.end, header->seed());
      if (!entry) return entry.error();
      if (!*entry) {
        const auto follows = reader->has_entry_behind(result.end, header->seed(), next, exact);
        if (!follows) return follows.error();
        if (*follows) return damaged({" does not match its checksum; records follow it"});
        result.torn = size - result.end;
        break;
      }
      const auto& [sequence, type, payload] = **entry;
      if (exact ? sequence != next : sequence < next)
        return damaged({" is missing; record ", sequence, " stands in its place"});
      if (!exact) result.first_record = sequence;
      exact = true;
      next = sequence + 1;
      const std::uint64_t behind = result.end + record_frame_size + payload.size();
      if (auto visited = visit(sequence, type, payload); !visited) return visited.error();
      result.end = behind;
    }
    return result;
  });
}

// --------------------------------------------------------------------------------------------
// Writing

// A record that waits to be written. Behind it lie its bytes as the file has them.
struct WaitingRecord {
  WaitingRecord* next = nullptr;
  std::uint64_t sequence = 0;
  std::uint32_t type = 0, payload = 0, capacity = 0;

  std::byte* bytes() noexcept { return reinterpret_cast<std::byte*>(this + 1); }
  std::size_t size() const noexcept { return record_frame_size + payload; }
  std::size_t memory() const noexcept {
    return allocated(sizeof(WaitingRecord) + record_frame_size + capacity);
  }
  // Its bytes, with what stands around the payload.
  std::span<const std::byte> seal(std::uint64_t seed) noexcept {
    std::byte* const p = bytes();
    std::memcpy(p, &payload, 4);
    std::memcpy(p + 4, &type, 4);
    std::memcpy(p + 8, &sequence, 8);
    const std::size_t checked = record_head_size + payload;
    const std::uint64_t checksum = xxh64({p, checked}, seed);
    std::memcpy(p + checked, &checksum, 8);
    return {p, size()};
  }

  static WaitingRecord* take(std::size_t capacity) {
    if (capacity > most_payload) no_memory();
    void* const memory = ::operator new(sizeof(WaitingRecord) + record_frame_size + capacity);
    auto* const record = ::new (memory) WaitingRecord;
    record->capacity = static_cast<std::uint32_t>(capacity);
    return record;
  }
  static void give(WaitingRecord* record) noexcept { ::operator delete(record); }
};

// Records in the order of their numbers.
class RecordQueue {
 public:
  RecordQueue() = default;
  RecordQueue(RecordQueue&& other) noexcept
      : first_(std::exchange(other.first_, nullptr)),
        last_(std::exchange(other.last_, nullptr)),
        memory_(std::exchange(other.memory_, 0)) {}
  RecordQueue& operator=(RecordQueue&&) = delete;
  ~RecordQueue() {
    while (first_) pop();
  }

  WaitingRecord* first() const noexcept { return first_; }
  std::size_t memory() const noexcept { return memory_; }
  void push(WaitingRecord* record) noexcept {
    (first_ ? last_->next : first_) = record;
    last_ = record;
    memory_ += record->memory();
  }
  void pop() noexcept {
    WaitingRecord* const record = first_;
    first_ = record->next;
    memory_ -= record->memory();
    WaitingRecord::give(record);
  }
  void push(RecordQueue&& others) noexcept {
    if (!others.first_) return;
    (first_ ? last_->next : first_) = others.first_;
    last_ = others.last_;
    memory_ += std::exchange(others.memory_, 0);
    others.first_ = nullptr;
  }
  // Those come before these.
  void push_front(RecordQueue&& others) noexcept {
    others.push(std::move(*this));
    first_ = std::exchange(others.first_, nullptr);
    last_ = others.last_;
    memory_ = std::exchange(others.memory_, 0);
  }

 private:
  WaitingRecord *first_ = nullptr, *last_ = nullptr;
  std::size_t memory_ = 0;
};

// Memory for a record, and what is to be its payload. Goes back where the record is not appended.
class Reservation {
 public:
  Reservation(Reservation&& other) noexcept : record_(std::exchange(other.record_, nullptr)) {}
  Reservation& operator=(Reservation&& other) noexcept {
    std::swap(record_, other.record_);
    return *this;
  }
  ~Reservation() {
    if (record_) WaitingRecord::give(record_);
  }

  std::size_t room() const noexcept { return record_->capacity - record_->payload; }
  // No more bytes than room() says.
  void add(std::span<const std::byte> bytes) noexcept {
    assert(bytes.size() <= room());
    if (bytes.empty()) return;
    std::memcpy(record_->bytes() + record_head_size + record_->payload, bytes.data(), bytes.size());
    record_->payload += static_cast<std::uint32_t>(bytes.size());
  }
  template <std::integral Integer>
  void add_integer(Integer value) noexcept {
    add(std::as_bytes(std::span(&value, 1)));
  }

 private:
  friend class Journal;
  explicit Reservation(std::size_t bytes) : record_(WaitingRecord::take(bytes)) {}
  WaitingRecord* record_;
};

// A file of a journal, and the records that wait to be written to it.
class JournalFile {
 public:
  // A new file, whose header is synced; its name is once Folder::sync() was called.
  static Result<std::unique_ptr<JournalFile>> create(const std::string& path,
                                                     const JournalHeader& header) {
    const auto bytes = journal_header_bytes(header);
    auto opened = AppendFile::create(path);
    if (!opened) return opened.error();
    auto file = std::make_unique<JournalFile>(path, header, std::move(*opened), bytes.size());
    errno = file->file_.append(bytes);
    if (errno == 0) errno = file->file_.sync();
    if (errno == 0) return file;
    const Error error = io_error(path, "cannot write");
    file.reset();
    remove_file(path);
    return error;
  }
  // One that goes on at `end`, as read_journal found it; what lies behind is cut off.
  static Result<std::unique_ptr<JournalFile>> resume(const std::string& path,
                                                     const JournalHeader& header,
                                                     std::uint64_t end) {
    auto opened = AppendFile::open(path, end);
    if (!opened) return opened.error();
    return std::make_unique<JournalFile>(path, header, std::move(*opened), end);
  }

  JournalFile(const std::string& path, const JournalHeader& header, AppendFile file,
              std::uint64_t size)
      : path_(path), header_(header), file_(std::move(file)), size_(size) {}

 private:
  friend class Journal;

  // Why what was appended can no longer become durable in this file.
  enum class Loss : std::uint8_t {
    none,
    memory,   // more records waited than may
    partial,  // a record that was written in part cannot be cut off
    sync,     // the system may have dropped what it could not write, and a later sync not say so
  };
  struct Outcome {
    std::uint64_t size;  // of the file, behind the last whole record
    int failure = 0, uncut = 0;
  };

  // Hands records over to the system, the oldest first, and gives back the memory of those that it
  // took; the file ends behind them. Without the mutex.
  Outcome write(RecordQueue& records, std::span<std::byte> buffer) noexcept {
    Outcome outcome{size_};
    while (records.first()) {
      WaitingRecord* record = records.first();
      std::span<const std::byte> piece;
      if (record->size() > buffer.size()) {
        piece = record->seal(header_.seed());
        record = record->next;
      } else {
        std::size_t filled = 0;
        for (; record && record->size() <= buffer.size() - filled; record = record->next) {
          std::memcpy(buffer.data() + filled, record->seal(header_.seed()).data(), record->size());
          filled += record->size();
        }
        piece = buffer.first(filled);
      }
      outcome.failure = file_.append(piece);
      if (outcome.failure != 0) {
        outcome.uncut = file_.cut(outcome.size);
        break;
      }
      outcome.size += piece.size();
      while (records.first() != record) records.pop();
    }
    return outcome;
  }

  Error error() const {
    errno = failure_;
    const char* const what = loss_ == Loss::sync      ? "cannot sync"
                             : loss_ == Loss::partial ? "cannot cut off what was written in part"
                                                      : "cannot write";
    Error told = io_error(path_, what);
    told.message += loss_ == Loss::none
                        ? std::string("; what was not written waits in memory")
                        : joined({"; record ", lost_from_, " and those behind it are not durable"});
    return told;
  }

  const std::string path_;
  const JournalHeader header_;
  AppendFile file_;  // of who writes and of who syncs; all else under the journal's mutex
  std::uint64_t size_;
  std::uint64_t first_ = 0;  // no record in it has a lesser number
  RecordQueue waiting_;
  bool unsynced_ = false;  // written to since the last sync began
  Loss loss_ = Loss::none;
  int failure_ = 0;              // errno of what failed last, until it succeeds
  std::uint64_t lost_from_ = 0;  // with a loss: from this record on nothing is durable
  std::unique_ptr<JournalFile> next_;
};

struct JournalSettings {
  Durability durability = Durability::each_call;
  std::chrono::milliseconds interval{10};  // between syncs, with Durability::interval
  // Of memory for records that a full or failing disk does not take.
  std::uint64_t most_pending = std::uint64_t{64} << 20;
};

struct JournalStatus {
  // Records with lesser numbers: synced; handed over to the system; appended.
  std::uint64_t durable = 0, written = 0, next = 0;
  std::uint64_t file_bytes = 0, pending_bytes = 0;  // of the present file; of memory
  std::optional<Error> error = {};                  // of what fails now
  bool broken = false;  // records are lost: only a new file and forget_before() mend it
};

// Records, made durable in the order in which they were appended. For any number of threads, but
// for switch_to. Where a write fails, the records wait in memory and every later commit tries
// again. Where they become too many, or a sync fails, the file is lost: what is appended to it from
// then on is dropped, and the journal is broken until forget_before() says that the file is not
// needed.
class Journal {
 public:
  // Errors: those of the files; io where no thread can be started.
  static Result<std::unique_ptr<Journal>> create(const std::string& path,
                                                 const JournalHeader& header,
                                                 const JournalSettings& settings) {
    return begin(header.first_sequence, settings,
                 [&] { return JournalFile::create(path, header); });
  }
  // Goes on with a file that read_journal found sound up to `end`.
  static Result<std::unique_ptr<Journal>> resume(const std::string& path,
                                                 const JournalHeader& header, std::uint64_t end,
                                                 std::uint64_t next_sequence,
                                                 const JournalSettings& settings) {
    return begin(next_sequence, settings, [&] { return JournalFile::resume(path, header, end); });
  }
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  // Writes and syncs what it can. Nobody is in a call.
  ~Journal() {
    {
      const lock_guard lock{mutex_};
      stopping_ = true;
    }
    wake_syncer_.notify_all();
    if (syncer_.joinable()) syncer_.join();
    Lock lock{mutex_};
    write_waiting(lock);
    sync_files(lock);
  }

  // Memory for a record with a payload of up to so many bytes, at most most_payload. Throws
  // std::bad_alloc.
  Reservation reserve(std::size_t bytes) const { return Reservation(bytes); }

  // The record's number. Some hundred nanoseconds, and cannot fail.
  std::uint64_t append(Reservation&& reservation, std::uint32_t type) noexcept {
    WaitingRecord* const record = std::exchange(reservation.record_, nullptr);
    record->type = type;
    RecordQueue dropped;
    const lock_guard lock{mutex_};
    record->sequence = next_++;
    tail_->waiting_.push(record);
    pending_bytes_ += record->memory();
    if (!writing_ && find(fails)) drop_lost(dropped);
    return record->sequence;
  }

  // Returns once the record and all before it are handed over to the system, and are synced with
  // Durability::each_call. Errors: io, with the path, where they are not.
  Result<void> commit(std::uint64_t sequence) {
    Lock lock{mutex_};
    return finish(lock, sequence + 1, settings_.durability == Durability::each_call);
  }
  // The same for all that was appended.
  Result<void> commit_all() {
    Lock lock{mutex_};
    return finish(lock, next_, settings_.durability == Durability::each_call);
  }
  // The same without waiting for a sync, whatever the durability is.
  Result<void> hand_over(std::uint64_t sequence) {
    Lock lock{mutex_};
    return finish(lock, sequence + 1, false);
  }
  // The same for all that was appended, synced whatever the durability is.
  Result<void> sync() {
    Lock lock{mutex_};
    return finish(lock, next_, true);
  }

  // Records that are appended from now on go to `file`, those before to the files before. Nobody
  // appends meanwhile. Touches no file.
  void switch_to(std::unique_ptr<JournalFile> file) noexcept {
    const lock_guard lock{mutex_};
    assert(file->header_.first_sequence <= next_);
    file->first_ = next_;
    tail_->next_ = std::move(file);
    tail_ = tail_->next_.get();
  }
  // What was recorded before the journal went over to file `number` is durable elsewhere: earlier
  // files, and records that wait for them, are not needed. Waits for file operations under way.
  void forget_before(std::uint64_t number) noexcept {
    std::unique_ptr<JournalFile> forgotten;
    Lock lock{mutex_};
    mutex_.wait(write_done_, [&] { return !writing_; });
    writing_ = true;
    mutex_.wait(sync_done_, [&] { return !syncing_; });
    while (head_.get() != tail_ && head_->header_.number < number) {
      pending_bytes_ -= head_->waiting_.memory();
      retire_head(forgotten);
    }
    if (head_->header_.number >= number) synced_ = std::max(synced_, head_->first_);
    written_ = first_waiting();
    writing_ = false;
    write_done_.notify_all();
    sync_done_.notify_all();
    lock.unlock();
  }

  std::uint64_t next_sequence() const noexcept {
    const lock_guard lock{mutex_};
    return next_;
  }
  JournalStatus status() const {
    const lock_guard lock{mutex_};
    const JournalFile *const failing = find(fails), *const lost = find(is_lost);
    const std::uint64_t most = lost ? lost->lost_from_ : next_;
    JournalStatus status{std::min(synced_, most), std::min(written_, most), next_};
    status.file_bytes = tail_->size_;
    status.pending_bytes = pending_bytes_;
    if (failing) status.error = (lost ? lost : failing)->error();
    status.broken = lost != nullptr;
    return status;
  }

 private:
  using Mutex = RankedMutex<3>;
  using Lock = unique_lock<Mutex>;
  using Clock = std::chrono::steady_clock;
  using Loss = JournalFile::Loss;

  Journal(std::unique_ptr<JournalFile> file, std::uint64_t next_sequence,
          const JournalSettings& settings)
      : settings_(settings),
        buffer_(std::size_t{1} << 16),
        head_(std::move(file)),
        tail_(head_.get()),
        next_(next_sequence),
        written_(next_sequence),
        synced_(next_sequence) {
    head_->first_ = next_sequence;
  }

  template <class Open>
  static Result<std::unique_ptr<Journal>> begin(std::uint64_t next_sequence,
                                                const JournalSettings& settings, Open open) {
    return catching_bad_alloc([&]() -> Result<std::unique_ptr<Journal>> {
      auto file = open();
      if (!file) return file.error();
      std::unique_ptr<Journal> journal{new Journal(std::move(*file), next_sequence, settings)};
      if (!has_threads || settings.durability != Durability::interval) return journal;
#if PERSONALIZE_HAS_EXCEPTIONS
      try {
        journal->start_syncer();
      } catch (const std::system_error&) {
        return Error{Errc::io, "no thread can be started that syncs the journal"};
      }
#else
      journal->start_syncer();
#endif
      return journal;
    });
  }

  static bool fails(const JournalFile& file) noexcept { return file.failure_ != 0; }
  static bool is_lost(const JournalFile& file) noexcept { return file.loss_ != Loss::none; }
  static bool is_retried(const JournalFile& file) noexcept { return fails(file) && !is_lost(file); }
  static bool is_unsynced(const JournalFile& file) noexcept { return file.unsynced_; }
  static bool has_waiting(const JournalFile& file) noexcept { return file.waiting_.first(); }

  // The first file of which it holds. There are few: those that are not written and synced yet.
  template <class Holds>
  JournalFile* find(Holds holds) const noexcept {
    JournalFile* file = head_.get();
    while (file && !holds(*file)) file = file->next_.get();
    return file;
  }
  std::uint64_t first_waiting() const noexcept {
    const JournalFile* const file = find(has_waiting);
    return file ? file->waiting_.first()->sequence : next_;
  }

  // Up to record `end`, without it. What goes wrong is told where no file operation is under way:
  // there may be no memory for it.
  Result<void> finish(Lock& lock, std::uint64_t end, bool synced) {
    assert(end <= next_);
    const JournalFile* failed = write_until(lock, end);
    while (!failed && synced && synced_ < end) {
      if (syncing_)
        mutex_.wait(sync_done_, [&] { return !syncing_ || synced_ >= end; });
      else
        sync_files(lock);
    }
    if (!failed && !synced && !syncing_ && is_sync_due()) sync_files(lock);
    if (const JournalFile* lost = find(is_lost); lost && end > lost->lost_from_) failed = lost;
    if (!failed) return {};
    return catching_bad_alloc([&]() -> Result<void> { return failed->error(); });
  }
  // Whether a commit syncs though its caller does not wait for that: without the thread for it; and
  // a file that the journal has left, so that it can be closed.
  bool is_sync_due() const noexcept {
    if (settings_.durability == Durability::interval)
      return !has_threads && find(is_unsynced) && Clock::now() - last_sync_ >= settings_.interval;
    const JournalFile* const file = find(is_unsynced);
    return file && file != tail_ && !has_waiting(*file);
  }

  // Null, or the file that does not take what is to be written.
  const JournalFile* write_until(Lock& lock, std::uint64_t end) noexcept {
    while (written_ < end) {
      if (!writing_) {
        if (!write_waiting(lock) && written_ < end) return find(is_retried);
        continue;
      }
      const std::uint64_t before = failures_;
      mutex_.wait(write_done_, [&] { return !writing_ || written_ >= end || failures_ != before; });
      // It was tried with this record, and is not tried once more for each that waits.
      if (failures_ != before && written_ < end && end <= failed_end_)
        if (const JournalFile* const failed = find(is_retried)) return failed;
    }
    return nullptr;
  }

  // Hands over what waits, file by file, while nobody else does; the lock is given up meanwhile.
  // false: a file did not take it, and there is hope that it will.
  bool write_waiting(Lock& lock) noexcept {
    RecordQueue dropped;
    bool taken = true;
    writing_ = true;
    for (JournalFile* file = head_.get(); file && taken; file = file->next_.get()) {
      if (!has_waiting(*file) || is_lost(*file)) continue;
      RecordQueue records{std::move(file->waiting_)};
      const std::size_t memory = records.memory();
      const std::uint64_t end = next_, size = file->size_;
      written_to_ = file;
      lock.unlock();
      const JournalFile::Outcome outcome = file->write(records, buffer_);
      lock.lock();
      written_to_ = nullptr;
      pending_bytes_ -= memory - records.memory();
      file->size_ = outcome.size;
      if (is_lost(*file)) {  // by a sync meanwhile
        file->waiting_.push_front(std::move(records));
        continue;
      }
      file->unsynced_ = file->unsynced_ || outcome.size != size;
      file->failure_ = outcome.failure;
      if (outcome.failure == 0) continue;
      file->waiting_.push_front(std::move(records));
      if (outcome.uncut != 0) {
        lose(*file, Loss::partial, outcome.uncut, file->waiting_.first()->sequence);
        continue;
      }
      ++failures_;
      failed_end_ = end;
      taken = false;
    }
    drop_lost(dropped);
    writing_ = false;
    write_done_.notify_all();
    if (syncer_sleeps_ && find(is_unsynced)) wake_syncer_.notify_one();
    if (!dropped.first()) return taken;
    lock.unlock();
    { const RecordQueue gone{std::move(dropped)}; }
    lock.lock();
    return taken;
  }

  // Syncs what was written, file by file, while nobody else does; the lock is given up meanwhile.
  void sync_files(Lock& lock) noexcept {
    syncing_ = true;
    const std::uint64_t end = written_;
    for (JournalFile* file = head_.get(); file; file = file->next_.get()) {
      if (!file->unsynced_) continue;
      file->unsynced_ = false;
      lock.unlock();
      const int failure = file->file_.sync();
      lock.lock();
      if (failure != 0) lose(*file, Loss::sync, failure, std::max(synced_, file->first_));
    }
    synced_ = std::max(synced_, end);
    last_sync_ = Clock::now();
    std::unique_ptr<JournalFile> finished;
    while (head_.get() != tail_ && head_.get() != written_to_ && !has_waiting(*head_) &&
           !is_unsynced(*head_) && !fails(*head_))
      retire_head(finished);
    RecordQueue dropped;
    if (!writing_) drop_lost(dropped);
    syncing_ = false;
    sync_done_.notify_all();
    if (!finished && !dropped.first()) return;
    lock.unlock();
    finished.reset();  // closes it
    { const RecordQueue gone{std::move(dropped)}; }
    lock.lock();
  }

  static void lose(JournalFile& file, Loss loss, int failure, std::uint64_t from) noexcept {
    file.loss_ = loss;
    file.failure_ = failure;
    file.lost_from_ = from;
  }
  // Takes away what waits for lost files, and loses files until no more waits than may. Nobody
  // writes.
  void drop_lost(RecordQueue& dropped) noexcept {
    for (JournalFile* file = head_.get(); file; file = file->next_.get()) {
      if (!has_waiting(*file)) continue;
      if (!is_lost(*file)) {
        if (pending_bytes_ <= settings_.most_pending || !find(is_retried)) continue;
        lose(*file, Loss::memory, find(is_retried)->failure_, file->waiting_.first()->sequence);
      }
      pending_bytes_ -= file->waiting_.memory();
      dropped.push(std::move(file->waiting_));
    }
    written_ = first_waiting();
  }
  // Takes the first file out of the row, to be closed without the lock.
  void retire_head(std::unique_ptr<JournalFile>& retired) noexcept {
    auto file = std::move(head_);
    head_ = std::move(file->next_);
    file->next_ = std::move(retired);
    retired = std::move(file);
  }

  void start_syncer() {
    syncer_ = thread([this] { run_syncer(); });
  }
  // Sleeps while there is nothing to sync; else syncs so long after the first write.
  void run_syncer() noexcept {
    Lock lock{mutex_};
    while (!stopping_) {
      syncer_sleeps_ = true;
      mutex_.wait(wake_syncer_, [this] { return stopping_ || find(is_unsynced); });
      syncer_sleeps_ = false;
      mutex_.wait_for(wake_syncer_, settings_.interval, [this] { return stopping_; });
      mutex_.wait(sync_done_, [this] { return !syncing_; });
      if (!stopping_) sync_files(lock);
    }
  }

  const JournalSettings settings_;
  BareVector<std::byte> buffer_;  // of who writes: small records leave together

  mutable Mutex mutex_;  // of all below
  condition_variable write_done_, sync_done_, wake_syncer_;
  std::unique_ptr<JournalFile> head_;  // the row of files: those before the last are finished with
  JournalFile* tail_;                  // what is appended goes there
  std::uint64_t next_;                 // record
  // All records before these were handed over or dropped; synced or dropped. A lost file says what
  // was dropped.
  std::uint64_t written_, synced_;
  std::uint64_t pending_bytes_ = 0;
  bool writing_ = false, syncing_ = false;  // one thread each does so, without the mutex
  const JournalFile* written_to_ = nullptr;
  std::uint64_t failures_ = 0, failed_end_ = 0;  // of writes; what the last of them was to write
  Clock::time_point last_sync_ = Clock::now();
  bool stopping_ = false, syncer_sleeps_ = false;
  thread syncer_;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 22: put items. Owns the items that were put and removed: what is known of them, and what
// waits for an update. Uses rooms 1, 2, 7 and 14.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Items that were put and removed: what is known of them, and what waits for the next update. Any
// number of threads.
class PutItems {
 public:
  using Fields = CatalogueBuilder::Fields;

  struct Event {
    std::string user, session, event_type;
    std::int64_t timestamp;
    std::size_t bytes() const noexcept {  // beside its own
      return allocated_text(user.capacity()) + allocated_text(session.capacity()) +
             allocated_text(event_type.capacity());
    }
    template <class Archive, class Self>
    static void each_field(Archive& archive, Self& self) {
      archive(self.user, self.session, self.event_type, self.timestamp);
    }
  };
  struct Item {
    Fields fields;
    std::optional<std::int64_t> created;
    bool waiting = false, given = false;
    bool removed = false;       // from the catalogue, or it waits for that
    std::uint64_t version = 0;  // of the last change
    std::vector<Event> events;  // that wait for the item
    std::size_t bytes = 0;      // its own and its id's, without events
  };
  using Items = std::vector<std::pair<std::string, Item>>;

  PutItems(const HashKey& key, std::uint64_t budget) : budget_(budget), items_(0, Hash{key}) {}

  bool any_waiting() const noexcept { return any_waiting_.load(memory_order_relaxed); }
  std::size_t bytes() const {
    const lock_guard lock{mutex_};
    return waiting_bytes_ + kept_bytes_;
  }
  std::uint64_t version() const {
    const lock_guard lock{mutex_};
    return version_;
  }

  void set_budget(std::uint64_t bytes) {
    const lock_guard lock{mutex_};
    budget_ = bytes;
  }

  // Merges what is given into what is known of the item; where that cannot be taken in, nothing is
  // changed. created: of an item that nobody knows yet. note(): called before anything is changed.
  template <class Note>
  Result<void> put(const NewItem& item, std::optional<std::int64_t> created, const Model& model,
                   Note note) {
    Vector<float> vector(model.dimension());
    const lock_guard lock{mutex_};
    const auto found = items_.find(item.item);
    const bool there = found != items_.end(), waits = there && found->second.waiting;
    Item next;
    if (there) {
      next.fields = found->second.fields;
      next.created = found->second.created;
      next.given = waits && found->second.given;
    }
    for (const auto& [name, value] : item.fields) {
      const std::string_view field = name;
      const auto known = std::find_if(next.fields.begin(), next.fields.end(),
                                      [&](const auto& other) { return other.first == field; });
      if (known != next.fields.end())
        known->second = value;
      else
        next.fields.emplace_back(name, value);
    }
    if (const auto known = metadata_of(model, next.fields, vector); !known) return known.error();
    if (item.creation_timestamp) next.created = item.creation_timestamp;
    if (!next.created) next.created = created;
    next.given = next.given || !item.fields.empty();
    next.waiting = true;
    next.version = version_ + 1;
    next.bytes = bytes_of(item.item, next.fields);
    const std::size_t before = waits ? found->second.bytes : 0;
    if (waiting_bytes_ - before + next.bytes > budget_)
      return Error{Errc::limit,
                   "items that were put fill RecommenderOptions::pending_bytes; put more when an "
                   "update has taken them in"};
    const std::size_t kept = there && !waits ? found->second.bytes : 0, now = next.bytes;
    auto place = found;
    if (!there) place = items_.emplace(item.item, Item{}).first;
    const auto give_up = [&] {
      if (!there) items_.erase(place);
    };
    if (auto noted = noting(note, give_up); !noted) return noted;
    if (there) next.events = std::move(place->second.events);
    place->second = std::move(next);
    waiting_bytes_ += now - before;
    kept_bytes_ -= kept;
    ++version_;
    any_waiting_.store(true, memory_order_relaxed);
    return {};
  }

  // there: whether the catalogue has the item. False where neither it nor these have.
  template <class Note>
  Result<bool> remove(std::string_view id, bool there, Note note) {
    const lock_guard lock{mutex_};
    auto found = items_.find(id);
    const bool known = found != items_.end();
    const bool waits = known && found->second.waiting;
    if (!there && !(waits && !found->second.removed)) return false;
    if (!known) found = items_.emplace(std::string(id), Item{}).first;
    const auto give_up = [&] {
      if (!known) items_.erase(found);
    };
    if (auto noted = noting(note, give_up); !noted) return noted.error();
    Item& item = found->second;
    if (!known) {
      item.bytes = bytes_of(id, {});
      kept_bytes_ += item.bytes;
    }
    if (!waits) {
      kept_bytes_ -= item.bytes;
      waiting_bytes_ += item.bytes;
    }
    item.waiting = item.removed = true;
    item.version = ++version_;
    any_waiting_.store(true, memory_order_relaxed);
    return true;
  }

  // Keeps an event on an item that waits for an update; false where none waits, or there is no
  // room. note(): called before anything is changed.
  template <class Note>
  bool remember(std::string_view id, Event event, Note note) {
    const lock_guard lock{mutex_};
    const auto found = items_.find(id);
    if (found == items_.end() || !found->second.waiting || found->second.removed) return false;
    auto& events = found->second.events;
    const std::size_t room = events.size() < events.capacity()
                                 ? events.capacity()
                                 : std::max<std::size_t>(4, events.size() + events.size() / 2);
    const std::size_t more = event.bytes() + allocated(room * sizeof(Event)) - allocated(events);
    if (waiting_bytes_ + more > budget_) return false;
    const std::size_t held = allocated(events);
    events.reserve(room);
    waiting_bytes_ += allocated(events) - held;
    note();
    waiting_bytes_ += event.bytes();
    events.push_back(std::move(event));
    return true;
  }

  // Copies of what waits, without events, in the order in which it was put. version: as of then.
  // note(items): called before anybody else puts more.
  template <class Note>
  Items waiting(std::uint64_t& version, Note note) const {
    return copies([](const std::string&, const Item& item) { return item.waiting; }, version, note);
  }
  // Of what is known and was taken in: does not wait, or was put again and is there(id).
  template <class There>
  Items taken_in(There there) const {
    std::uint64_t version = 0;
    const auto is_in = [&](const std::string& id, const Item& item) {
      return !item.waiting || (!item.removed && there(id));
    };
    return copies(is_in, version, [](const Items&) {});
  }

  // Of what was taken in: it waits no more, unless it was put again meanwhile.
  void settle(const Items& items) noexcept {
    const lock_guard lock{mutex_};
    for (const auto& [id, taken] : items) {
      const auto found = items_.find(id);
      if (found == items_.end()) continue;
      Item& item = found->second;
      if (item.version != taken.version) continue;
      waiting_bytes_ -= item.bytes;
      item.waiting = item.given = false;
      if (item.removed) {
        for (const Event& event : item.events) waiting_bytes_ -= event.bytes();
        waiting_bytes_ -= allocated(item.events);
        item.events.clear();
        item.events.shrink_to_fit();
        item.fields = {};
        item.created.reset();
        item.bytes = bytes_of(id, {});
      }
      kept_bytes_ += item.bytes;
    }
    any_waiting_.store(std::any_of(items_.begin(), items_.end(),
                                   [](const auto& one) { return one.second.waiting; }),
                       memory_order_relaxed);
  }

  // visit(id, count): how many events wait for an item, or were not recorded yet after it came.
  template <class Visit>
  void each_with_events(Visit visit) const {
    const lock_guard lock{mutex_};
    for (const auto& [id, item] : items_)
      if (!item.events.empty()) visit(id, item.events.size());
  }
  // The first event of an item that waits no more; nothing where there is none.
  std::optional<Event> first_arrived(std::string_view id) const {
    const lock_guard lock{mutex_};
    const auto found = items_.find(id);
    if (found == items_.end() || found->second.waiting || found->second.events.empty())
      return std::nullopt;
    return found->second.events.front();
  }
  void drop_arrived(std::string_view id) noexcept {
    const lock_guard lock{mutex_};
    const auto found = items_.find(id);
    if (found == items_.end() || found->second.events.empty()) return;
    auto& events = found->second.events;
    waiting_bytes_ -= events.front().bytes();
    events.erase(events.begin());
    if (!events.empty()) return;
    waiting_bytes_ -= allocated(events);
    std::vector<Event>{}.swap(events);
  }
  // Ids of items that have such events.
  std::vector<std::string> with_arrived() const {
    std::vector<std::string> ids;
    const lock_guard lock{mutex_};
    for (const auto& [id, item] : items_)
      if (!item.waiting && !item.events.empty()) ids.push_back(id);
    return ids;
  }

  // Keeps others from putting and removing, until it ends.
  class Hold {
   public:
    explicit Hold(RankedMutex<2>& held) : mutex_(&held) { mutex_->lock(); }
    Hold(Hold&& other) noexcept : mutex_(std::exchange(other.mutex_, nullptr)) {}
    Hold& operator=(Hold&&) = delete;
    ~Hold() {
      if (mutex_) mutex_->unlock();
    }

   private:
    RankedMutex<2>* mutex_;
  };
  Hold hold() const { return Hold{mutex_}; }
  void write(FieldWriter& archive, const Hold&) const { each_field(archive, *this); }
  void read(FieldReader& archive) {
    const lock_guard lock{mutex_};
    each_field(archive, *this);
  }

 private:
  struct Hash {
    using is_transparent = void;
    HashKey key;
    std::size_t operator()(std::string_view id) const noexcept {
      return static_cast<std::size_t>(siphash(key, text_bytes(id)));
    }
  };

  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    std::uint64_t count = self.items_.size();
    archive(self.version_, count);
    const auto one = [&](auto& id, auto& item) {
      std::uint64_t fields = item.fields.size(), events = item.events.size();
      std::int64_t created = item.created.value_or(no_timestamp);
      archive(id, item.waiting, item.given, item.removed, item.version, created, fields, events);
      if constexpr (Archive::reads) {
        // Of what is not there no memory is taken.
        if (fields > 1000 || events > archive.left() / 32) return archive.fail();
        if (created != no_timestamp) item.created = created;
        item.fields.resize(static_cast<std::size_t>(fields));
        item.events.resize(static_cast<std::size_t>(events));
      }
      for (auto& [name, value] : item.fields) archive(name, value);
      for (auto& event : item.events) Event::each_field(archive, event);
    };
    if constexpr (Archive::reads) {
      for (std::uint64_t i = 0; i < count && archive.ok(); ++i) {
        std::string id;
        Item item;
        one(id, item);
        if (!archive.ok() || !is_id(id) || self.items_.find(id) != self.items_.end())
          return archive.fail();
        for (const Event& event : item.events)
          if (!are_ids(event.user, event.session) || !valid_id(event.event_type))
            return archive.fail();
        item.bytes = bytes_of(id, item.fields);
        (item.waiting ? self.waiting_bytes_ : self.kept_bytes_) += item.bytes;
        for (const Event& event : item.events) self.waiting_bytes_ += event.bytes();
        self.waiting_bytes_ += allocated(item.events);
        if (item.waiting) self.any_waiting_.store(true, memory_order_relaxed);
        self.items_.emplace(std::move(id), std::move(item));
      }
    } else {
      for (const auto& [id, item] : self.items_) one(id, item);
    }
  }

  // note(), where it fails, after give_up().
  template <class Note, class GiveUp>
  static Result<void> noting(Note& note, GiveUp give_up) {
    auto noted = catching_bad_alloc([&]() -> Result<void> {
      note();
      return {};
    });
    if (!noted) give_up();
    return noted;
  }

  template <class Wanted, class Note>
  Items copies(Wanted wanted, std::uint64_t& version, Note note) const {
    Items items, ordered;
    Vector<Keyed> order;
    const lock_guard lock{mutex_};
    version = version_;
    for (const auto& [id, item] : items_) {
      if (!wanted(id, item)) continue;
      order.push_back({item.version, static_cast<std::uint32_t>(items.size())});
      auto& copy = items.emplace_back(id, Item{}).second;
      copy.fields = item.fields;
      copy.created = item.created;
      copy.removed = item.removed;
      copy.given = item.given;
      copy.version = item.version;
    }
    sort_by_key(order);
    ordered.reserve(items.size());
    for (const Keyed& each : order) ordered.push_back(std::move(items[each.index]));
    note(std::as_const(ordered));
    return ordered;
  }

  // Of an entry, without events.
  static std::size_t bytes_of(std::string_view id, const Fields& fields) noexcept {
    constexpr std::size_t links = 2 * sizeof(void*), buckets = 2 * sizeof(void*);
    std::size_t sum = allocated(sizeof(std::pair<const std::string, Item>) + links) + buckets +
                      allocated_text(id.size()) + allocated(fields);
    for (const auto& [name, value] : fields)
      sum += allocated_text(name.capacity()) + allocated_text(value.capacity());
    return sum;
  }

  mutable RankedMutex<2> mutex_;
  std::uint64_t budget_;
  std::unordered_map<std::string, Item, Hash, std::equal_to<>> items_;
  std::size_t waiting_bytes_ = 0, kept_bytes_ = 0;  // of what waits; of what is in
  std::uint64_t version_ = 0;                       // of the last change
  atomic<bool> any_waiting_{false};
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 23: state. Owns all that a recommender knows, the turns in which it is changed, and how
// items rank for a user. Uses all earlier rooms.
//
// Locks, in the order in which a thread may take them (RankedMutex checks it):
//   0  State::update_mutex   one update, swap or save at a time; no request takes it, but with
//                            Updates::in_requests
//   1  State::turns          one change at a time to what lies in one 32nd of the users, and all of
//                            them for a moment, when a generation is published or a cut begins
//   2  all others            a lane's catalogue and idle memory; a 64th of the users, of the
//                            event ids, of the slates, of the context sums; what waits for an
//                            update
//   3  Journal               what waits to be written
// Under those of rank 2 and 3 there are look-ups, copies and one step of the encoder: no memory is
// taken (but for items and events that wait for an update, and at a cut), nothing is solved, no
// foreign string is hashed. No callback is called under any.
//
// A change (rooms 24 and 25) has three parts. It is resolved: ids become numbers, all memory is
// taken; this may fail. Then State::note() gives its record to the journal, where there is one.
// Then it is applied, which cannot fail and depends on nothing but the record and what is known.
// All that lies within the turns of the users concerned, so that the journal's order is that of the
// changes, and whoever reads it comes to the same end. When the turn is over the caller waits until
// the record is as durable as was asked for.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

inline std::optional<HashKey> random_key() {
  HashKey key{};
#if PERSONALIZE_HAS_POSIX
  const File file(std::fopen("/dev/urandom", "rb"));
  if (!file || std::fread(key.data(), sizeof key, 1, file.get()) != 1) return std::nullopt;
#else
  std::random_device device;
  for (std::uint64_t& word : key) word = std::uint64_t{device()} << 32 | device();
#endif
  return key;
}

// Turns, each for some shards of the users.
class Turns {
 public:
  // ThreadSanitizer follows no more than 64 locks of a thread.
  static constexpr std::size_t count = Users::shard_count / 2;
  static std::size_t turn_of(const UserKey& key) noexcept {
    return Users::shard_of_hash(key.hash()) % count;
  }

  // Of one user, or of two.
  class Lock {
   public:
    Lock(Turns& turns, const UserKey& key) : Lock(turns, key, key) {}
    Lock(Turns& turns, const UserKey& key, const UserKey& other) : turns_(&turns) {
      const std::size_t a = turn_of(key), b = turn_of(other);
      first_ = std::min(a, b);
      second_ = std::max(a, b);
      turns.mutexes_[first_].mutex.lock();
      if (second_ != first_) turns.mutexes_[second_].mutex.lock_further();
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    ~Lock() { end(); }
    void end() noexcept {
      if (!turns_) return;
      if (second_ != first_) turns_->mutexes_[second_].mutex.unlock_further();
      turns_->mutexes_[first_].mutex.unlock();
      turns_ = nullptr;
    }

   private:
    Turns* turns_;
    std::size_t first_, second_;
  };

  class All {
   public:
    explicit All(Turns& turns) : turns_(turns) {
      turns_.mutexes_[0].mutex.lock();
      for (std::size_t t = 1; t < count; ++t) turns_.mutexes_[t].mutex.lock_further();
    }
    All(const All&) = delete;
    All& operator=(const All&) = delete;
    ~All() {
      for (std::size_t t = count; --t > 0;) turns_.mutexes_[t].mutex.unlock_further();
      turns_.mutexes_[0].mutex.unlock();
    }

   private:
    Turns& turns_;
  };

 private:
  struct alignas(64) One {
    RankedMutex<1> mutex;
  };
  std::array<One, count> mutexes_;
};

// What a record of the journal is of.
enum class RecordOf : std::uint32_t {
  event = 1,     // record() or record_impression()
  slate = 2,     // recommend()
  use = 3,       // rank() or explain(): a user counts as used
  merge = 4,     // merge_session()
  forget = 5,    // forget()
  put = 6,       // put_item()
  remove = 7,    // remove_item()
  update = 8,    // an update looks at what there is
  publish = 9,   // and is published
  swap = 10,     // another model looks at what there is
  model = 11,    // and is published
  encode = 12,   // a user's state, by the present encoder
  import = 13,   // import_user(), find_user
  arrived = 14,  // an event that waited for its item
  close = 15,    // the recommender ended in peace
  names = 16,    // items or event types that get the next numbers, by the model or opened behind
  opened = 17,   // numbers from here on are those of a process that opened the folder
};

struct State;

// Who writes state files into a folder. Called under State::update_mutex.
class Saver {
 public:
  virtual ~Saver() = default;
  virtual Result<SaveReport> save(State& state) = 0;
  // Where the journal has grown, or can only be mended so.
  virtual void save_if_due(State& state) noexcept = 0;
};

// What a recommender has, for all threads.
struct State {
  // What one user adds to what all share, in a half-life.
  static constexpr float most_events = 1600, most_shown = 4096;
  static constexpr std::size_t slate_repetitions = 4;  // of events on one item, from slates
  static constexpr float offset_forgotten = 0.05f;     // of the user's offset, an event

  // model, options and table as Recommender::create has checked them.
  State(const Model& model, RecommenderOptions chosen, const kernels::Table& kernel_table)
      : options(std::move(chosen)),
        key(*options.recommendation_key),
        table(kernel_table),
        times(options, latest_of(model)),
        users(to_memory(options.user_bytes), to_memory(options.max_users),
              Encoder(model, table).state_size(), model.dimension()),
        event_ids(options.remembered_event_ids),
        slates(options.feedback ? options.remembered_slates : 1, options.slate_expiry.count(), key,
               options.feedback ? static_cast<std::size_t>(options.slate_log_bytes) : 0,
               model.dimension(), static_cast<bool>(options.log)),
        put_items(key, options.pending_bytes) {}

  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    stop_updater();
    if (!journal) return;
    (void)catching_bad_alloc([&]() -> Result<void> {
      Vector<std::byte> record;
      (void)note(RecordOf::close, record, [](FieldWriter&) {});
      return journal->sync();
    });
  }
  void stop_updater() {
    if (!updater.joinable()) return;
    {
      const lock_guard lock{wake_mutex};
      stopping = true;
    }
    wake.notify_all();
    updater.join();
  }

  bool is_positive(std::string_view event_type) const noexcept {
    const auto& types = options.positive_event_types;
    return types.empty() || std::find(types.begin(), types.end(), event_type) != types.end();
  }
  float examination(std::size_t place) const noexcept {
    const auto& chosen = options.examination;
    if (chosen.empty()) return 1.0f / std::log2(static_cast<float>(place) + 2.0f);
    return chosen[std::min(place, chosen.size() - 1)];
  }

  // Gives a change's record to the journal; 0 where there is none. write(FieldWriter&): its fields.
  // Whoever calls has the turns that the change needs, and has taken all memory for it.
  template <class Write>
  std::uint64_t note(RecordOf what, Vector<std::byte>& record, Write write) {
    if (!journal) return 0;
    record.clear();
    FieldWriter archive{record};
    write(archive);
    Reservation room = journal->reserve(record.size());
    room.add(record);
    return journal->append(std::move(room), static_cast<std::uint32_t>(what));
  }
  // Which items and event types the numbers from these on are of, ahead of the record by which they
  // are. O(them); throws std::bad_alloc.
  void note_names(const Catalogue& of, std::size_t item, std::size_t type) {
    if (!journal) return;
    constexpr std::size_t most_bytes = std::size_t{1} << 20;
    Vector<std::byte> texts, record;
    const auto all = [&](bool items, std::size_t n, std::size_t size, auto name) {
      while (n < size) {
        texts.clear();
        FieldWriter archive{texts};
        std::uint64_t count = 0;
        for (; n < size && texts.size() < most_bytes; ++n, ++count) archive(name(n));
        hand_over(note(RecordOf::names, record, [&](FieldWriter& into) {
          into(items, count);
          into.bytes(texts);
        }));
      }
    };
    all(true, item, of.size(), [&](std::size_t n) -> std::string_view {
      return (*of.ids)[static_cast<std::uint32_t>(n)];
    });
    const StringTable& types = of.base->parts().event_types;
    all(false, type, types.size(), [&](std::size_t n) { return types[n]; });
  }
  // Returns when the record is as durable as RecommenderOptions::durability says. Holds no lock.
  Result<void> durable(std::uint64_t sequence) {
    return journal && sequence != 0 ? journal->commit(sequence) : Result<void>{};
  }
  // The same for all that was noted so far: of a call that finds done what another one, which may
  // still wait or have failed, did.
  Result<void> durable() { return journal ? journal->commit_all() : Result<void>{}; }

  // Of what nobody waits for: a process that ends loses none of it, a power cut may.
  void hand_over(std::uint64_t sequence) {
    if (journal && sequence != 0) (void)journal->hand_over(sequence);
  }

  // What a new user begins with.
  void begin(const Catalogue& of, std::string_view user, std::span<float> state) const noexcept {
    if (const auto row = of.stored_user(user)) of.encoder->load(*row, state);
  }
  void begin(const Catalogue& of, User& user) const noexcept {
    begin(of, UserKey::owner(user.key()).user, user.state());
    user.generation = of.generation;
  }

  // One event more, under the user's lock; there is memory for it.
  void step(User& user, const RememberedEvent& event, Scratch& scratch,
            const Catalogue& of) noexcept {
    if (!of.is_absent(event.item)) {
      encode(event, last_encoded(user, of), user.state(), scratch, of);
      user.encoded = true;
    }
    user.fade_offset(1.0f - offset_forgotten);
    user.remember(event, options.history_length);
  }
  // When the user's last event was on an item that the model has.
  static std::optional<std::int64_t> last_encoded(const User& user, const Catalogue& of) noexcept {
    std::optional<std::int64_t> last;
    if (!of.absent) {
      if (user.last_timestamp != no_timestamp) last = user.last_timestamp;
      return last;
    }
    user.for_each_event([&](const RememberedEvent& event) {
      if (!of.is_absent(event.item)) last = event.timestamp;
    });
    return last;
  }
  void encode(const RememberedEvent& event, std::optional<std::int64_t> previous,
              std::span<float> state, Scratch& scratch, const Catalogue& of) noexcept {
    const auto buckets = static_cast<std::uint32_t>(of.base->parts().time_gap_embedding.rows());
    const std::uint32_t gap =
        buckets == 0 ? 0 : time_gap_bucket(previous, event.timestamp, buckets);
    const auto input = of.input_of(event.item, scratch.input);
    if (of.encoder->step({event.item, event.event_type, gap, input}, state, scratch.encoding))
      return;
    std::fill(state.begin(), state.end(), 0.0f);
    restarted.fetch_add(1, memory_order_relaxed);
  }

  // Users that have left memory, to whoever wants to keep them. Holds no lock.
  void tell(GoneUsers& gone, const Catalogue& of) const {
    gone.each([&](User& user) {
      if (!options.on_evict) return;
      const auto blob = catching_bad_alloc([&] { return Blob::write(user, of); });
      const auto [of_user, of_session] = UserKey::owner(user.key());
      if (blob) options.on_evict(of_user, of_session, std::span(*blob));
    });
  }

  // Whether queries of the catalogue's model are good for the present one's sums.
  bool is_current_space(const Catalogue& of) const {
    return of.generation >= lanes.current()->space_since;
  }
  // Whether the user's state and offset are of the catalogue's model; so is one who is not known.
  bool is_current(const UserKey& of, const Catalogue& by) const {
    return users.read(of,
                      [&](const User* user) { return !user || user->generation == by.generation; });
  }
  // Makes a user's state and offset those of the present model, from the remembered events. The
  // caller has the user's turn; the scratch's catalogue is then the present one.
  void make_current(const UserKey& of, ScratchLease& scratch);
  // The same where the caller has not.
  void bring_up(const UserKey& of, ScratchLease& scratch) {
    if (is_current(of, scratch.catalogue())) return;
    Turns::Lock turn{turns, of};
    make_current(of, scratch);
  }

  // Publishes what publishing() has taken the memory for, while nobody has a turn.
  void publish(Lanes::Copies& copies, std::shared_ptr<const Catalogue> next) noexcept {
    lanes.publish(copies);
    if (catalogue) retired.push_back(std::move(catalogue));  // reserved
    catalogue = std::move(next);
    whole_model.reset();
  }
  Lanes::Copies publishing(const std::shared_ptr<const Catalogue>& next) {
    retired.reserve(retired.size() + 1);
    retired_models.reserve(retired_models.size() + 1);
    return Lanes::copies(next);
  }
  // Ends generations and models that no reader holds any more: here, and not in somebody's request.
  void sweep() noexcept {
    std::erase_if(retired, [](const auto& generation) { return generation.use_count() == 1; });
    std::erase_if(retired_models, [](const auto& one) { return one.use_count() == 1; });
  }

  // Of a caller who waits for an update or its result: one under way takes no rests meanwhile.
  class Hurry {
   public:
    explicit Hurry(State& state) : state_(state) {
      {
        const lock_guard lock{state_.wake_mutex};
        ++state_.in_a_hurry;
      }
      state_.wake.notify_all();
    }
    ~Hurry() {
      const lock_guard lock{state_.wake_mutex};
      --state_.in_a_hurry;
    }
    Hurry(const Hurry&) = delete;
    Hurry& operator=(const Hurry&) = delete;

   private:
    State& state_;
  };
  // update_mutex, and nobody rests who holds it meanwhile.
  unique_lock<RankedMutex<0>> in_turn() {
    const Hurry hurry(*this);
    return unique_lock<RankedMutex<0>>{update_mutex};
  }
  // Of what a caller waits for, and requests should hardly notice: beside them it takes a quarter
  // of the time, in pieces so long that they hit few.
  Pace beside_requests() {
    return Pace([this](Pace::Clock::duration time) { rest(time); }, std::chrono::microseconds{4000},
                3);
  }
  // Of the thread that holds update_mutex, beside requests, until somebody waits for it.
  void rest(Pace::Clock::duration time) {
    if (!lanes.busy()) return;
    unique_lock lock{wake_mutex};
    wake.wait_for(lock, time, [&] { return stopping || in_a_hurry > 0; });
  }
  void wake_updater() {
    if (!updater.joinable()) return;
    {
      const lock_guard lock{wake_mutex};
      woken = true;
    }
    wake.notify_all();  // a save may rest there, too
  }

  static std::int64_t latest_of(const Model& model) noexcept {
    std::int64_t latest = no_timestamp;
    for (const ItemStatistics& s : model.parts().statistics)
      latest = std::max(latest, s.last_timestamp);
    return latest;
  }

  RecommenderOptions options;
  HashKey key;
  const kernels::Table& table;
  TimeGate times;
  Turns turns;
  Users users;
  EventIds event_ids;
  SlateLog slates;
  PutItems put_items;
  Decay decay{Catalogue::half_life};
  Lanes lanes;
  std::unique_ptr<Saver> keeper;     // null: there is no folder
  std::unique_ptr<Journal> journal;  // the same; set while nobody else calls

  // Events or impressions since the last learning. No bool: RISC-V exchanges no bytes without
  // libatomic (GCC 12).
  atomic<std::uint32_t> changed{0};
  atomic<std::int64_t> next_update{no_timestamp};  // by the clock
  atomic<std::uint64_t> restarted{0};

  RankedMutex<0> update_mutex;  // one update, swap or save at a time
  // Under update_mutex:
  std::shared_ptr<const Catalogue> catalogue;
  std::vector<std::shared_ptr<const Catalogue>> retired;     // that readers may still hold
  std::vector<std::shared_ptr<const Model>> retired_models;  // the same
  std::shared_ptr<const Model> whole_model;                  // of `catalogue`, once asked for
  std::int64_t learnt_at = no_timestamp;
  std::size_t learnt_items = 0;
  std::size_t encoded_shard = Users::shard_count, encoded_slot = 0;  // how far they are current

  atomic<std::uint64_t> saves{0};  // by the keeper
  atomic<std::uint32_t> calls{0};  // with Updates::in_requests
  RecoveryReport recovery;

  mutable RankedMutex<2> report_mutex;
  UpdateReport report;
  std::optional<Error> save_error;  // of the last save, where it failed

  mutex wake_mutex;  // of the update thread alone, and of who wakes it
  condition_variable wake, taken_in;
  bool stopping = false, woken = false;
  int in_a_hurry = 0;               // how many Hurry there are
  std::uint64_t taken_version = 0;  // put_items.version() that updates have taken in
  thread updater;
};

inline void State::make_current(const UserKey& of, ScratchLease& scratch) {
  scratch.use_current();
  const Catalogue& present = scratch.catalogue();
  Vector<RememberedEvent>& events = scratch->events;
  events.reserve(options.history_length);
  std::size_t old_size = 0;
  const std::uint32_t generation = users.read(of, [&](const User* user) {
    events.clear();
    if (!user) return present.generation;
    old_size = user->state().size();
    if (user->generation < present.encoder_since)
      user->for_each_event([&](const RememberedEvent& event) { events.push_back(event); });
    return user->generation;
  });
  if (generation == present.generation) return;
  const std::string_view name = UserKey::owner(of.text()).user;
  const bool anew = generation < present.encoder_since;
  const std::size_t state_size = present.encoder->state_size();
  Vector<float>& state = scratch->state;
  bool encoded = false;
  User::Owner other;  // where the state has another size; else it lies where it lay
  if (anew) {
    state.assign(state_size, 0.0f);
    begin(present, name, state);
    // What the model was trained on is in the state that it has for the user.
    const bool stored = present.stored_user(name).has_value();
    std::optional<std::int64_t> previous;
    for (const RememberedEvent& event : events) {
      if (present.is_absent(event.item)) continue;
      if (stored && event.timestamp <= present.trained_until) continue;
      encode(event, previous, state, *scratch, present);
      encoded = true;
      previous = event.timestamp;
    }
    if (old_size != state_size) other = User::make(of, state_size);
  }
  note(RecordOf::encode, scratch->record, [&](FieldWriter& archive) { archive(of.text()); });
  if (other) users.replace(of, std::move(other));
  users.use(
      of,
      [&](User* user) {
        if (!user) return;
        if (anew) std::copy(state.begin(), state.end(), user->state().begin());
        if (anew) user->encoded = encoded;
        if (generation < present.space_since) user->drop_offset();
        user->generation = present.generation;
      },
      false);
}

// How items rank for one user, by one generation: u, and what it is made of. Belongs to one request
// or event, whose memory it works in.
struct Ranking {
  static constexpr std::uint32_t normalising_items = 32;
  static constexpr float ignored_discount = 0.4f;  // rho, in log clicks an impression

  State& state;
  const Catalogue& catalogue;
  Scratch& scratch;
  bool known = false;  // whether there are events of the user: scratch.query is theirs

  // False where a user's state is of another model than the catalogue: State::bring_up() helps.
  bool read_user(const Request& request, const UserKey& key, const UserKey& session_key,
                 std::int64_t timestamp);
  void find_best(std::size_t count, const Eligibility& eligibility);
  void normalise();
  void collect_pool(const Eligibility& eligibility);
  void assess(std::size_t place, const SlotChoice& choice);

  // u. Not finite, of an item that was removed.
  float score(std::uint32_t item) const noexcept {
    return (known ? catalogue.scorer->score(scratch.query, item) : catalogue.popular_score(item)) -
           scratch.discount(item);
  }
  // u of a pick, which in the pool has a bonus.
  float score(const SlotChoice& choice) const noexcept {
    if (!choice.explored) return choice.pick.score;
    const auto found = std::lower_bound(
        scratch.pool.begin(), scratch.pool.end(), choice.pick.item,
        [](const ScoredItem& scored, std::uint32_t item) { return scored.item < item; });
    return scratch.pool_scores[static_cast<std::size_t>(found - scratch.pool.begin())];
  }
  // As users see it: without events, the share of interactions and not its logarithm.
  float shown(float u) const noexcept { return known ? u : std::exp(u); }
  // Quality and taste: what impressions taught, in units of score.
  float learnt(std::uint32_t item) const noexcept {
    return catalogue.quality_of(item) + (known ? catalogue.taste(item, scratch.query) : 0.0f);
  }
  // Positive events expected of an examined impression with score u.
  float value_of(float u) const noexcept {
    const Calibration& calibration = catalogue.calibration;
    const float log_value = calibration.slope * (u - scratch.normaliser) + calibration.intercept;
    return std::exp(std::min(log_value, 3.0f));
  }
};

// Fills scratch.top with the best `count` eligible items and those that may take the place of
// ignored ones.
inline void Ranking::find_best(std::size_t count, const Eligibility& eligibility) {
  const std::size_t wanted = count + scratch.ignored.size();
  if (known) {
    catalogue.scorer->top_k(scratch.query, wanted, eligibility, scratch.scoring, scratch.top);
    return;
  }
  scratch.top.clear();
  catalogue.for_popular([&](std::uint32_t item) {
    if (eligibility.test(item)) scratch.top.push_back({item, catalogue.popular_score(item)});
    return scratch.top.size() < wanted;
  });
}

// Of scratch.top: the normaliser, and the discounts of what the user ignored.
inline void Ranking::normalise() {
  // logsumexp of the model's own scores of the best
  std::array<float, normalising_items> relevance;
  const std::size_t best = std::min<std::size_t>(scratch.top.size(), normalising_items);
  float largest = -std::numeric_limits<float>::infinity(), sum = 0;
  for (std::size_t i = 0; i < best; ++i) {
    relevance[i] = scratch.top[i].score - learnt(scratch.top[i].item);
    largest = std::max(largest, relevance[i]);
  }
  for (std::size_t i = 0; i < best; ++i) sum += std::exp(relevance[i] - largest);
  scratch.normaliser = best == 0 ? 0.0f : largest + std::log(sum);
  if (scratch.ignored.empty()) return;
  for (ScoredItem& scored : scratch.top) scored.score -= scratch.discount(scored.item);
  std::sort(scratch.top.begin(), scratch.top.end(), ranks_before);
}

// Into scratch.pool, what may be explored for this user, with bonuses; without, pool_scores.
inline void Ranking::collect_pool(const Eligibility& eligibility) {
  scratch.pool.clear();
  scratch.pool_scores.clear();
  scratch.pool_expected.clear();
  if (!(state.options.exploration_weight > 0) || catalogue.pool.empty()) return;
  const std::size_t items = catalogue.pool.size();
  // After the scores of the whole pool come those that are kept; the front is written last.
  scratch.pool_scores.resize(items);
  if (known) {
    state.table.rows_vector(catalogue.pool_vectors.data(), catalogue.pool_biases.data(),
                            catalogue.dimension(), items, scratch.query.data(),
                            scratch.pool_scores.data());
  } else {
    for (std::size_t j = 0; j < items; ++j)
      scratch.pool_scores[j] = catalogue.popular_score(catalogue.pool[j].item);
  }
  const std::int64_t oldest = state.times.oldest_young();
  const bool all = eligibility.all();
  for (std::size_t j = 0; j < items; ++j) {
    const PoolItem& candidate = catalogue.pool[j];
    const float u = scratch.pool_scores[j] - scratch.discount(candidate.item);
    if (candidate.created < oldest || !std::isfinite(u) ||
        (!all && !eligibility.test(candidate.item)))
      continue;
    scratch.pool_scores[scratch.pool.size()] = u;
    scratch.pool.push_back({candidate.item, u + candidate.bonus});
  }
  if (!state.options.log) return;
  for (std::size_t j = 0; j < scratch.pool.size(); ++j)
    scratch.pool_expected.push_back(value_of(scratch.pool_scores[j]));
}

// Appends to scratch.logged what is remembered of a pick, to learn from it once it was seen.
inline void Ranking::assess(std::size_t place, const SlotChoice& choice) {
  const std::uint32_t item = choice.pick.item;
  const float discount = scratch.discount(item), u = score(choice);
  const float relevance = u + discount - learnt(item);
  const float examination = state.examination(place);
  LoggedPick pick;
  pick.item = item;
  pick.relevance = relevance - scratch.normaliser;
  pick.adjustment = catalogue.calibration.slope * (u - relevance);
  pick.examination = examination;
  pick.expected = examination * value_of(relevance - discount);
  pick.value = examination * value_of(u);
  pick.explored = choice.explored;
  scratch.logged.picks.push_back(pick);
  if (!state.options.log) return;
  LoggedChoice logged{choice, examination * value_of(choice.best.score)};
  logged.choice.pool_value *= examination;
  scratch.logged.choices.push_back(logged);
}

// Copies what a request needs of the user; not known, where no event is. A request with a user and
// a session is answered from the user where there are events, else from the session. key: of the
// user, or of the session where there is no user.
inline bool Ranking::read_user(const Request& request, const UserKey& key,
                               const UserKey& session_key, std::int64_t timestamp) {
  scratch.request_number = static_cast<std::uint64_t>(timestamp);
  scratch.drawn_user = scratch.drawn_session = false;
  std::fill(scratch.offset.begin(), scratch.offset.end(), 0.0f);
  scratch.ignored.clear();
  scratch.interacted.clear();
  scratch.ignored_filter = {};
  scratch.ignored.reserve(RecentImpressions::capacity);
  if (request.exclude_interacted) scratch.interacted.reserve(state.options.history_length);
  const std::size_t d = catalogue.dimension();
  const auto stored_query = [&](std::string_view user) {
    const auto row = catalogue.stored_user(user);
    if (!row) return false;
    const Matrix& states = catalogue.base->parts().user_states;
    for (std::size_t c = 0; c < d; ++c)
      scratch.query[c] = states.at(*row, states.columns() - d + c);
    return true;
  };
  bool current = true;
  const auto copy = [&](const User* user) {
    if (!user) return false;
    if (user->generation != catalogue.generation) return current = false;
    scratch.request_number = user->requests;
    if (scratch.ignored.empty())
      for (const RecentImpressions::Entry& entry : user->impressions())
        if (entry.item < catalogue.size())  // else of an update that came after this catalogue
          scratch.ignored.push_back(
              {entry.item, ignored_discount * RecentImpressions::faded(entry, timestamp) /
                               catalogue.calibration.slope});
    user->add_offset_to(scratch.offset);
    if (request.exclude_interacted)
      user->for_each_event([&](const RememberedEvent& event) {
        if (event.item < catalogue.size()) scratch.interacted.push_back(event.item);
      });
    if (!user->encoded) return false;
    const auto query = catalogue.encoder->query(user->state());
    std::copy(query.begin(), query.end(), scratch.query.begin());
    return true;
  };
  const auto read = [&](std::string_view user, const UserKey& of, bool& drawn) {
    const auto copy_found = [&](const User* found) {
      drawn = found != nullptr;
      return copy(found);
    };
    if (state.users.read(of, copy_found) || stored_query(user)) return true;
    std::fill(scratch.offset.begin(), scratch.offset.end(), 0.0f);
    scratch.interacted.clear();
    return false;
  };
  known = (!request.user.empty() && read(request.user, key, scratch.drawn_user)) ||
          (!request.session.empty() && read({}, session_key, scratch.drawn_session));
  if (!current) return false;
  // Of the type of ranks_before, whose sort it shares.
  bool (*const by_item)(const ScoredItem&, const ScoredItem&) noexcept =
      [](const ScoredItem& a, const ScoredItem& b) noexcept { return a.item < b.item; };
  std::sort(scratch.ignored.begin(), scratch.ignored.end(), by_item);
  for (const ScoredItem& one : scratch.ignored)
    scratch.ignored_filter[one.item % 1024 / 64] |= std::uint64_t{1} << (one.item % 64);
  if (known)
    for (std::size_t c = 0; c < d; ++c) scratch.query[c] += scratch.offset[c];
  known = known && largest(std::span<const float>(scratch.query).first(d)) <= max_magnitude;
  return true;
}

inline Result<void> check_fields(const NewItem& item, const Model& model) {
  constexpr std::size_t most_bytes = std::size_t{1} << 16, most_fields = 1000;
  const ModelParts& parts = model.parts();
  std::size_t bytes = 0;
  for (const auto& [field, value] : item.fields) bytes += field.size() + value.size();
  if (bytes > most_bytes || item.fields.size() > most_fields)
    return Error{Errc::invalid_argument, "an item has at most 1,000 fields of 64 KiB together"};
  for (const auto& named : item.fields) {
    const std::string_view field = named.first;
    const bool known =
        std::any_of(parts.fields.begin(), parts.fields.end(),
                    [&](const MetadataField& of_model) { return of_model.name == field; });
    if (known) continue;
    std::string names;
    for (const MetadataField& of_model : parts.fields)
      names += (names.empty() ? "" : ", ") + of_model.name;
    return Error{Errc::invalid_argument,
                 joined({"the model has no metadata field '", field.substr(0, 64), "'; it has ",
                         (names.empty() ? "none" : names)})};
  }
  return {};
}

// The kernels that RecommenderOptions::instruction_set names.
inline Result<const kernels::Table*> find_kernels(const std::string& name) {
  if (name.empty()) return &kernels::chosen();
  std::size_t count = 0;
  const kernels::Table* const* tables = kernels::available(count);
  std::string names;
  for (std::size_t t = 0; t < count; ++t) {
    if (name == tables[t]->name) return tables[t];
    names += joined({t == 0 ? "" : ", ", tables[t]->name});
  }
  return Error{Errc::invalid_argument, joined({"RecommenderOptions::instruction_set is '", name,
                                               "'; this program has for this processor: ", names})};
}

// A model file's times come through the same gate.
inline Result<void> check_statistics(const Model& model, const State& state) {
  const std::int64_t now = state.times.now();
  const std::int64_t skew = state.options.clock_skew.count();
  const ModelParts& parts = model.parts();
  for (std::uint32_t i = 0; i < parts.statistics.size(); ++i) {
    const ItemStatistics& s = parts.statistics[i];
    for (const std::int64_t t : {s.first_timestamp, s.last_timestamp, s.creation_timestamp}) {
      if (t == no_timestamp || elapsed(now, t) <= skew) continue;
      const std::string what = joined({"section STAT: a time of item '", model.item_id(i), "'"});
      return state.times.check(t, what.c_str()).error();
    }
  }
  return {};
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 24: events. Owns what happens to users: events, impressions and slates, how each is
// resolved, written to a journal and applied. Uses all earlier rooms.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// The items and event types behind a journal's numbers. Where a folder is opened with a model that
// brings some of its own, these have numbers here before the journal's come to be, so that the
// numbers of the process that wrote it are other ones. Belongs to one thread.
class Numbers {
 public:
  // So many of the state, which have the same numbers here.
  Numbers(std::size_t items, std::size_t types) : of_state_{items, types} { begin(); }

  // To the number here; false where there is none.
  bool take(std::uint32_t& item) const noexcept {
    if (item >= items_.size()) return false;
    item = items_[item];
    return true;
  }
  bool take_type(std::uint32_t& type) const noexcept {
    if (type >= types_.size()) return false;
    type = types_[type];
    return true;
  }
  std::size_t items() const noexcept { return items_.size(); }
  // Whether all have the same numbers here.
  bool same_as(const Catalogue& of) const noexcept {
    return is_identity(items_, of.size()) &&
           is_identity(types_, of.base->parts().event_types.size());
  }

  // The next number is this item's, where it has none.
  void add_item(const Catalogue& of, std::string_view id) {
    const auto number = of.number_of(id);
    if (!number) return;
    const std::uint32_t item = *number;
    if (numbered_.size() < of.size()) numbered_.resize(of.size());
    if (!std::exchange(numbered_[item], std::uint8_t{1})) items_.push_back(item);
  }

  // Those of a record RecordOf::names, for the next model() or opened(). False: a name is none, or
  // came before.
  bool announce(FieldReader& archive) {
    bool of_items = false;
    std::uint64_t count = 0;
    archive(of_items, count);
    for (std::uint64_t n = 0; n < count && archive.ok(); ++n) {
      const std::string_view name = archive.text();
      if (!archive.ok()) break;
      const auto added = (of_items ? coming_items_ : coming_types_).add(name);
      if (!added && added.error().code == Errc::out_of_memory) no_memory();
      if (!added) archive.fail();
    }
    return archive.at_end();
  }
  // What was announced came to nothing.
  void drop_announced() noexcept { coming_items_ = coming_types_ = StringTable{}; }
  const StringTable& announced_items() const noexcept { return coming_items_; }
  const StringTable& announced_types() const noexcept { return coming_types_; }

  // Another model's, which are announced and there, are behind all that there were.
  void model(const Catalogue& of) {
    for (std::size_t i = 0; i < coming_items_.size(); ++i) add_item(of, coming_items_[i]);
    for (std::size_t t = 0; t < coming_types_.size(); ++t)
      types_.push_back(of.base->parts().event_types.find(coming_types_[t]).value_or(no_event_type));
    drop_announced();
  }
  // Those announced are behind the state's.
  void opened(const Catalogue& of) {
    begin();
    model(of);
  }

 private:
  void begin() {
    items_.resize(of_state_[0]);
    types_.resize(of_state_[1]);
    for (std::size_t i = 0; i < items_.size(); ++i) items_[i] = static_cast<std::uint32_t>(i);
    for (std::size_t t = 0; t < types_.size(); ++t) types_[t] = static_cast<std::uint32_t>(t);
    numbered_.assign(items_.size(), 1);
  }
  static bool is_identity(const Vector<std::uint32_t>& numbers, std::size_t size) noexcept {
    if (numbers.size() != size) return false;
    for (std::size_t n = 0; n < size; ++n)
      if (numbers[n] != n) return false;
    return true;
  }

  std::array<std::size_t, 2> of_state_;
  Vector<std::uint32_t> items_, types_;  // here, by the journal's number
  Vector<std::uint8_t> numbered_;        // by the number here: whether that is among them
  StringTable coming_items_, coming_types_;
};

// What was shown and chosen, resolved: items are numbers. The slate's number, or the picks with
// what was expected of them, which lie in Scratch::seen.
struct EventChange {
  static constexpr std::uint32_t no_item = std::numeric_limits<std::uint32_t>::max();

  std::string_view user, session;
  Time time{};
  std::int64_t shared_time = 0;  // at which it counts for what all share
  std::uint64_t event_hash = 0;  // 0: the event has no id
  std::uint32_t item = no_item;  // of the event; none: of an impression, or not known
  std::uint32_t event_type = no_event_type;
  bool learns = false;      // with feedback
  bool positive = false;    // the event is a choice of the item
  bool listed = false;      // items were listed: Scratch::listed
  bool by_slate = false;    // the picks are those of the slate
  bool of_session = false;  // whose slate it is, where there is a user as well
  bool has_query = false;   // Scratch::query is the user's
  std::uint64_t slate = 0;  // its number; 0: none
  // Of an event on an item that was put and is not in yet: the item, and the event's type.
  std::string_view waits_for, waiting_type;
  bool arrived = false;  // the first event that waited for the item

  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    archive(self.user, self.session, self.time.timestamp, self.time.now, self.shared_time,
            self.event_hash, self.item, self.event_type, self.learns, self.positive, self.listed,
            self.by_slate, self.of_session, self.has_query, self.slate, self.waits_for,
            self.waiting_type, self.arrived);
  }
};

// A slate that was drawn.
struct SlateChange {
  std::string_view user, session;
  Time time{};
  SlateLog::Number number;
  bool drawn_user = false, drawn_session = false;  // whose next request this was

  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    archive(self.user, self.session, self.time.timestamp, self.time.now, self.number.number,
            self.number.order, self.drawn_user, self.drawn_session);
  }
};

// Gives back, in the end, users over the budget and one who was added for nothing.
struct Settle {
  Users& users;
  const UserKey& key;
  bool& grown;  // whether there is anything to give back
  GoneUsers& gone;
  ~Settle() {
    if (std::exchange(grown, false)) users.settle(key, gone);
  }
};

// Makes the changes that events and requests are. Belongs to one call, in the memory of its
// scratch; whoever calls has the turns of the users concerned, and uses the present catalogue.
class Changes {
  template <class Apply>
  auto change_user(const UserKey& key, std::size_t events, std::size_t impressions, bool offset,
                   Apply apply) {
    return state_.users.change(
        key, events, impressions, offset, [&](User& fresh) { state_.begin(catalogue(), fresh); },
        scratch_.grown, apply);
  }

 public:
  static constexpr float offset_gain = 0.6f;

  Changes(State& state, ScratchLease& scratch, GoneUsers& gone)
      : state_(state), scratch_(*scratch), lease_(scratch), gone_(gone) {}

  const Catalogue& catalogue() const noexcept { return lease_.catalogue(); }

  // The items of a list that are in the catalogue, each once, with its place; marked in
  // Scratch::taken until unlist().
  void list(std::span<const std::string_view> items) {
    scratch_.listed.clear();
    scratch_.listed.reserve(items.size());
    for (std::size_t place = 0; place < items.size(); ++place) {
      const auto item = catalogue().find(items[place]);
      if (!item || scratch_.taken.test(*item)) continue;
      scratch_.taken.set(*item);
      scratch_.listed.push_back({*item, static_cast<float>(place)});
    }
  }
  void unlist() noexcept {
    for (const ScoredItem& one : scratch_.listed) scratch_.taken.reset(one.item);
  }

  // What is expected of listed items, by the user's present state, to Scratch::seen.
  void assess_list(const EventChange& change, const UserKey& key) {
    scratch_.seen.clear();
    Ranking ranking{state_, catalogue(), scratch_};
    if (!ranking.read_user({.user = change.user, .session = change.session}, key,
                           session_of(change), change.time.timestamp))
      return;  // of another generation, which whoever has the turn sees to
    ranking.find_best(Ranking::normalising_items, {});
    ranking.normalise();
    scratch_.logged.picks.clear();
    scratch_.logged.choices.clear();
    scratch_.seen.reserve(scratch_.listed.size() + 1);
    for (const ScoredItem& one : scratch_.listed) {
      const float u = ranking.score(one.item);
      if (!std::isfinite(u)) continue;
      SlotChoice choice;
      choice.pick = choice.best = {one.item, u};
      const auto place = static_cast<std::uint32_t>(one.score);
      ranking.assess(place, choice);
      scratch_.seen.push_back({place, scratch_.logged.picks.back(), {}, true});
    }
    has_query_ = ranking.known;
    assessed_ = &catalogue();
  }

  // Resolves what the event says was seen, to Scratch::seen and Scratch::query; returns what became
  // of the recommendation id. replayed: Scratch::seen is there, unless it is of a slate.
  Recorded see(EventChange& change, const UserKey& key, bool replayed) {
    const std::optional<std::uint32_t> chosen = chosen_by(change);
    if (!change.learns) {
      scratch_.seen.clear();
      return Recorded::learned;
    }
    SlateStatus status = SlateStatus::unknown;
    bool reported = false;
    if (change.slate != 0)
      status = state_.slates.read(change.slate, change.time.timestamp, change.time.now,
                                  scratch_.logged, reported);
    if (replayed ? change.by_slate : status == SlateStatus::found) {
      change.by_slate = status == SlateStatus::found;
      change.has_query = !scratch_.logged.query.empty();
      std::copy(scratch_.logged.query.begin(), scratch_.logged.query.end(), scratch_.query.begin());
      scratch_.seen.clear();
      if (change.by_slate) see_slate(!change.listed && reported, change.listed, chosen);
    } else if (!replayed) {
      see_list(change, key, chosen);
    }
    if (change.has_query)
      for (const SeenPick& seen : scratch_.seen) catalogue().contexts->prepare(seen.pick.item);
    return change.slate == 0                ? Recorded::learned
           : status == SlateStatus::found   ? Recorded::learned
           : status == SlateStatus::expired ? Recorded::expired_slate
                                            : Recorded::unknown_slate;
  }

  // Takes the memory that apply() needs, of the user only where there is something to apply.
  void prepare(const EventChange& change, const UserKey& key) {
    scratch_.record.reserve(record_bytes(change));
    if (change.item == EventChange::no_item && scratch_.seen.empty()) return;
    change_user(key, change.item != EventChange::no_item, scratch_.seen.size(),
                change.has_query && !scratch_.seen.empty(), [](User&) {});
  }

  void write(const EventChange& change, FieldWriter& archive) const {
    EventChange::each_field(archive, change);
    if (change.listed) archive(scratch_.listed);
    if (!change.learns || change.by_slate) return;
    archive(static_cast<std::uint64_t>(scratch_.seen.size()));
    for (const SeenPick& seen : scratch_.seen)
      archive(seen.place, seen.pick.item, seen.pick.expected, seen.pick.value, seen.pick.seen,
              seen.pick.positive);
    if (!change.has_query || scratch_.seen.empty()) return;
    archive.bytes(std::as_bytes(
        std::span(scratch_.query.data(), static_cast<std::size_t>(catalogue().dimension()))));
  }
  // foreign: the record is of another model, whose queries are of no use.
  void read(EventChange& change, FieldReader& archive, const Numbers& numbers, bool foreign) {
    EventChange::each_field(archive, change);
    scratch_.listed.clear();
    scratch_.seen.clear();
    if (change.listed) {
      archive(scratch_.listed);
      const auto known = [&](ScoredItem& one) { return numbers.take(one.item); };
      if (!std::all_of(scratch_.listed.begin(), scratch_.listed.end(), known)) {
        scratch_.listed.clear();  // and nothing to unlist
        return archive.fail();
      }
      for (const ScoredItem& one : scratch_.listed) {
        if (scratch_.taken.test(one.item)) return archive.fail();
        scratch_.taken.set(one.item);
      }
    }
    if (change.item != EventChange::no_item && !numbers.take(change.item)) return archive.fail();
    if (change.event_type != no_event_type && !numbers.take_type(change.event_type))
      return archive.fail();
    if (!change.learns || change.by_slate) return;
    std::uint64_t count = 0;
    archive(count);
    if (count > archive.left() / 16) return archive.fail();
    for (std::uint64_t i = 0; i < count; ++i) {
      SeenPick seen{0, {}, {}, true};
      archive(seen.place, seen.pick.item, seen.pick.expected, seen.pick.value, seen.pick.seen,
              seen.pick.positive);
      if (!archive.ok() || !numbers.take(seen.pick.item) || !seen.pick.is_finite())
        return archive.fail();
      scratch_.seen.push_back(seen);
    }
    if (change.has_query && count > 0)
      change.has_query = read_query(archive, foreign, scratch_.query);
  }

  void apply(const EventChange& change, const UserKey& key) {
    Settle settle{state_.users, key, scratch_.grown, gone_};
    if (!scratch_.seen.empty()) apply_seen(change, key);
    if (change.item != EventChange::no_item) apply_event(change, key);
  }

  // Makes a visitor's events the user's, after those that the user has. Nothing where there is no
  // such visitor; else the change's place in the journal. The visitor's events are replayed with
  // the present catalogue.
  std::optional<std::uint64_t> merge(std::string_view session, std::string_view user) {
    const UserKey visitor_key{{}, session, state_.key}, user_key{user, {}, state_.key};
    const auto before = state_.users.read(visitor_key, [](const User* found) {
      return found ? std::optional(std::pair(found->events(), found->impressions().size()))
                   : std::nullopt;
    });
    if (!before) return std::nullopt;
    state_.make_current(visitor_key, lease_);
    state_.make_current(user_key, lease_);
    Settle settle{state_.users, user_key, scratch_.grown, gone_};
    Vector<RememberedEvent>& events = scratch_.events;
    events.reserve(state_.options.history_length);
    // Memory first.
    change_user(user_key, before->first, before->second, true, [](User&) {});
    const std::uint64_t sequence = state_.note(
        RecordOf::merge, scratch_.record, [&](FieldWriter& archive) { archive(session, user); });
    const User::Owner visitor = state_.users.take(visitor_key);
    events.clear();
    visitor->for_each_event([&](const RememberedEvent& event) { events.push_back(event); });
    std::fill(scratch_.gradient.begin(), scratch_.gradient.end(), 0.0f);
    visitor->add_offset_to(scratch_.gradient);
    change_user(user_key, events.size(), visitor->impressions().size(), true, [&](User& found) {
      for (const RememberedEvent& event : events) state_.step(found, event, scratch_, catalogue());
      found.add_impressions(visitor->impressions());
      if (visitor->has_offset()) found.move_offset(scratch_.gradient);
    });
    return sequence;
  }

  // Remembers the slate in Scratch::logged, and that its users have asked.
  void apply(const SlateChange& change) noexcept {
    const UserKey key{change.user, change.session, state_.key};
    if (change.number.number != 0)
      state_.slates.add(change.number, key.text(), scratch_.logged, change.time.now);
    const auto draw = [](User* user) {
      if (user) ++user->requests;
    };
    if (change.drawn_user) state_.users.use(key, draw);
    if (change.drawn_session) state_.users.use(UserKey{{}, change.session, state_.key}, draw);
  }
  void write(const SlateChange& change, FieldWriter& archive) const {
    SlateChange::each_field(archive, change);
    const LoggedSlate& slate = scratch_.logged;
    archive(static_cast<std::uint64_t>(slate.picks.size()),
            static_cast<std::uint64_t>(slate.choices.size()), !slate.query.empty());
    LoggedSlate::each_pick(archive, slate);
    archive.bytes(std::as_bytes(std::span(slate.query.data(), slate.query.size())));
  }
  void read(SlateChange& change, FieldReader& archive, const Numbers& numbers, bool foreign) {
    SlateChange::each_field(archive, change);
    LoggedSlate& slate = scratch_.logged;
    std::uint64_t picks = 0, choices = 0;
    bool has_query = false;
    archive(picks, choices, has_query);
    if (picks > archive.left() / 16 || choices > picks) return archive.fail();
    slate.timestamp = change.time.timestamp;
    slate.picks.resize(static_cast<std::size_t>(picks));
    slate.choices.resize(static_cast<std::size_t>(choices));
    slate.query.clear();
    LoggedSlate::each_pick(archive, slate);
    if (has_query) (void)read_query(archive, foreign, slate.query);
    if (!slate.is_sound(numbers.items())) return archive.fail();
    for (LoggedPick& pick : slate.picks)
      if (!numbers.take(pick.item)) return archive.fail();
    for (auto& [choice, best_value] : slate.choices)
      if (!numbers.take(choice.pick.item) || !numbers.take(choice.best.item)) return archive.fail();
  }

 private:
  // What is left of a record, to query; false where it is none of the catalogue's model.
  bool read_query(FieldReader& archive, bool foreign, Vector<float>& query) const {
    const std::size_t d = catalogue().dimension();
    const auto raw = archive.bytes(archive.left());
    if (foreign || raw.size() != d * sizeof(float)) return false;
    query.resize(std::max(query.size(), d));
    std::memcpy(query.data(), raw.data(), raw.size());
    if (!all_finite(std::span<const float>(query).first(d))) archive.fail();
    return true;
  }
  UserKey session_of(const EventChange& change) const noexcept {
    return {{}, change.session, state_.key};
  }
  static std::optional<std::uint32_t> chosen_by(const EventChange& change) noexcept {
    return change.positive && change.item != EventChange::no_item ? std::optional(change.item)
                                                                  : std::nullopt;
  }
  std::size_t record_bytes(const EventChange& change) const noexcept {
    return 256 + change.user.size() + change.session.size() + change.waits_for.size() +
           change.waiting_type.size() + scratch_.listed.size() * sizeof(ScoredItem) +
           scratch_.seen.size() * sizeof(SeenPick) + catalogue().dimension() * sizeof(float);
  }
  // The picks of Scratch::logged that the event says were seen: those listed, or all where nothing
  // is listed and the slate was not reported before; and the one that was chosen.
  void see_slate(bool reported, bool listed, std::optional<std::uint32_t> chosen) {
    scratch_.seen.reserve(scratch_.logged.picks.size());
    for (std::uint32_t place = 0; place < scratch_.logged.picks.size(); ++place) {
      LoggedPick pick = scratch_.logged.picks[place];
      const bool is_chosen = chosen == pick.item && !pick.positive;
      const bool is_shown = listed ? scratch_.taken.test(pick.item) : !reported;
      const bool is_new = (is_shown || is_chosen) && !pick.seen;
      if (!is_new && !is_chosen) continue;
      pick.seen = !is_new;  // what was seen before is not counted again
      pick.positive = is_chosen;
      scratch_.seen.push_back(
          {place, pick,
           scratch_.logged.choices.empty() ? LoggedChoice{} : scratch_.logged.choices[place],
           true});
    }
  }

  // The same without a slate: the listed items; or the chosen one, where an impression of it is
  // remembered.
  void see_list(EventChange& change, const UserKey& key, std::optional<std::uint32_t> chosen) {
    if (!scratch_.listed.empty()) {
      if (assessed_ != &catalogue()) assess_list(change, key);
      change.has_query = has_query_;
      for (SeenPick& seen : scratch_.seen) seen.pick.positive = chosen == seen.pick.item;
      return;
    }
    scratch_.seen.clear();
    if (!chosen || !state_.users.read(key, [&](const User* user) {
          return user && std::any_of(user->impressions().begin(), user->impressions().end(),
                                     [&](const auto& entry) { return entry.item == *chosen; });
        }))
      return;
    Ranking ranking{state_, catalogue(), scratch_};
    (void)ranking.read_user({.user = change.user, .session = change.session}, key,
                            session_of(change), change.time.timestamp);
    change.has_query = ranking.known;
    LoggedPick pick;
    pick.item = *chosen;
    pick.seen = pick.positive = true;
    scratch_.seen.push_back({0, pick, {}, true});
  }

  // Marks the picks of the slate, which tells what was reported before; then the user; then what
  // all share.
  void apply_seen(const EventChange& change, const UserKey& key) {
    const Catalogue& of = catalogue();
    const std::optional<std::uint32_t> chosen = chosen_by(change);
    if (change.by_slate) {
      std::size_t next = 0;
      state_.slates.mark(change.slate, [&](std::uint32_t place, LoggedPick& pick) {
        if (next == scratch_.seen.size() || scratch_.seen[next].place != place) return;
        LoggedPick& seen = scratch_.seen[next++].pick;
        pick.seen = true;
        pick.positive = pick.positive || seen.positive;
      });
    }
    if (change.has_query) pull();
    const std::size_t allowed = change.by_slate ? State::slate_repetitions : 1;
    change_user(key, 0, scratch_.seen.size(), change.has_query, [&](User& user) {
      for (SeenPick& seen : scratch_.seen) {
        const LoggedPick& pick = seen.pick;
        seen.shared =
            !user.has_events(pick.item, change.time.timestamp, allowed, Catalogue::half_life) &&
            (pick.seen ||
             user.spend(user.spent_impressions, 1, State::most_shown, change.time.now));
        // What was shown and not chosen is held against the item for this user.
        if (!pick.seen && chosen != pick.item)
          user.add_impression(pick.item, change.time.timestamp);
      }
      if (chosen) user.remove_impression(*chosen);
      if (change.has_query) user.move_offset(scratch_.gradient);
    });
    const DecayMoment moment = state_.decay.at(change.shared_time);
    for (const SeenPick& seen : scratch_.seen) of.counters->prefetch(seen.pick.item);
    const std::span<const float> query(scratch_.query);
    for (const SeenPick& seen : scratch_.seen) {
      if (!seen.shared) continue;
      const LoggedPick& pick = seen.pick;
      if (!pick.seen) {
        const auto expected = static_cast<double>(pick.expected);
        of.counters->add(ItemCounters::Kind::expected, pick.item, expected, moment);
        if (change.has_query) of.contexts->add_expected(pick.item, query, expected, moment);
      }
      if (pick.positive) {
        of.counters->add(ItemCounters::Kind::positive, pick.item, 1, moment);
        if (!change.by_slate)
          of.counters->add(ItemCounters::Kind::unconfirmed, pick.item, 1, moment);
        if (change.has_query) of.contexts->add_positive(pick.item, query, moment);
      }
    }
    state_.changed.store(1, memory_order_relaxed);
  }

  // Advances the user's state and memory by an event on an item of the catalogue, and counts it.
  void apply_event(const EventChange& change, const UserKey& key) {
    const RememberedEvent event{change.item, change.event_type, change.time.timestamp};
    const bool shared = change_user(key, 1, 0, false, [&](User& found) {
      const bool counts = !found.has_events(event.item, event.timestamp, State::slate_repetitions,
                                            Catalogue::half_life) &&
                          found.spend(found.spent_events, 1, State::most_events, change.time.now);
      state_.step(found, event, scratch_, catalogue());
      return counts;
    });
    state_.times.advance(change.time, key.hash());
    if (!shared) return;
    catalogue().counters->add(ItemCounters::Kind::interactions, event.item, 1,
                              state_.decay.at(change.shared_time));
    state_.changed.store(1, memory_order_relaxed);
  }

  // Into Scratch::gradient, how these impressions move the user's offset. Of vectors so short that
  // steps would be out of all proportion, nothing.
  void pull() noexcept {
    const Catalogue& of = catalogue();
    std::fill(scratch_.gradient.begin(), scratch_.gradient.end(), 0.0f);
    constexpr float least = 1e-8f;
    if (!(of.mean_square > least)) return;
    const float gain = offset_gain * of.calibration.slope / of.mean_square;
    for (const SeenPick& seen : scratch_.seen) {
      // A choice may be reported after its impression: y and p come apart.
      const float surprise = (seen.pick.positive ? 1.0f : 0.0f) -
                             (seen.pick.seen ? 0.0f : std::min(seen.pick.value, 1.0f));
      of.vectors.row(seen.pick.item, scratch_.vector);
      for (std::size_t c = 0; c < scratch_.gradient.size(); ++c)
        scratch_.gradient[c] += gain * surprise * scratch_.vector[c];
    }
  }

  State& state_;
  Scratch& scratch_;
  ScratchLease& lease_;
  GoneUsers& gone_;
  const Catalogue* assessed_ = nullptr;  // by which the list was assessed
  bool has_query_ = false;               // of the assessed list
};

// Takes the marks of a list away in the end.
struct Unlisting {
  Changes& changes;
  ~Unlisting() { changes.unlist(); }
};

// Takes in a user of another process, who replaces one of the same id; only_new: unless there is
// one. bytes: what `blob` was read of. The caller has no turn.
inline ImportReport import_blob(State& state, ScratchLease& scratch, const Blob& blob,
                                std::span<const std::byte> bytes, GoneUsers& gone, bool only_new,
                                std::uint64_t& sequence) {
  ImportReport report;
  report.user = blob.owner().user;
  report.session = blob.owner().session;
  const UserKey key{report.user, report.session, state.key};
  const Turns::Lock turn{state.turns, key};
  scratch.use_current();
  if (only_new && state.users.read(key, [](const User* user) { return user != nullptr; }))
    return report;
  Settle settle{state.users, key, scratch->grown, gone};
  User::Owner user =
      blob.make(key, scratch.catalogue(), state.options.history_length, report.events_dropped);
  report.events = user->events();
  scratch->grown = true;
  state.users.make_room(key);
  sequence = state.note(RecordOf::import, scratch->record,
                        [&](FieldWriter& archive) { archive.bytes(bytes); });
  state.users.put(key, std::move(user));
  return report;
}

// A user as a blob, of whom nothing is changed; empty where there is none.
inline Result<Vector<std::byte>> export_blob(const State& state, const Catalogue& of,
                                             const UserKey& key) {
  // A copy is made under the lock; the rest without.
  Vector<std::byte> image;
  constexpr std::size_t any = std::numeric_limits<std::uint32_t>::max();
  User::Bounds bounds{0, 0, any, any, any};
  for (;;) {
    std::size_t room = 0;
    const bool copied = state.users.read(key, [&](const User* user) {
      if (!user) return true;
      room = user->written_bytes();
      if (image.capacity() < room) return false;
      bounds.state_size = user->state().size();
      bounds.offset_bytes = user->offset().size();
      FieldWriter archive{image};
      user->write(archive, true);
      return true;
    });
    if (copied) break;
    image.reserve(room);
  }
  if (image.empty()) return image;
  FieldReader archive{image};
  bool with_state = false;
  const User::Owner user = User::read(archive, state.key, bounds, with_state);
  if (!user) return Error{Errc::corrupt, "the user's values contradict one another"};
  return Blob::write(*user, of);
}

// Asks for a user who is not in memory. Holds no lock. Where what comes is no blob of this user,
// they begin anew.
inline void find_elsewhere(State& state, ScratchLease& scratch, std::string_view user,
                           std::string_view session, GoneUsers& gone) {
  if (!state.options.find_user || !are_ids(user, session)) return;
  const UserKey key{user, session, state.key};
  if (state.users.read(key, [](const User* found) { return found != nullptr; })) return;
  const UserKey::Owner asked = UserKey::owner(key.text());
  std::vector<std::byte> bytes;
  if (!state.options.find_user(asked.user, asked.session, bytes)) return;
  const auto blob = Blob::read(bytes);
  if (!blob || blob->key() != key.text()) return;
  std::uint64_t sequence = 0;
  (void)import_blob(state, scratch, *blob, bytes, gone, true, sequence);
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 25: updates. Owns how the next generation comes to be: by what events and impressions taught
// and what was put and removed, or by another model; and the thread that sees to it. Uses all
// earlier rooms.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// The next generation, in three steps, of which the first and the last stop all changes for a
// moment and stand in the journal: begin() notes what there is, build() makes a catalogue of it
// while others go on, publish() makes it the present one. Belongs to one thread, which holds
// State::update_mutex.
class Update {
 public:
  // learn: what events and impressions taught as well.
  Update(State& state, std::int64_t now, bool learn, Pace& pace)
      : state_(state), now_(now), learn_(learn), pace_(pace) {
    report.timestamp = now;
  }
  Update(const Update&) = delete;
  Update& operator=(const Update&) = delete;
  // One that was not published leaves everything as it was.
  ~Update() {
    end_cut();
    for (const std::uint32_t item : touched_) state_.catalogue->counters->touch(item);
    if (taught_) state_.changed.store(1);
  }

  // False where there is nothing new. with_items: what was put and removed as well.
  bool begin(bool with_items = true) {
    builder_.emplace(*state_.catalogue, state_.options, state_.table, pace_);
    const Turns::All turns{state_.turns};
    bool any = false;
    const auto look = [&](const PutItems::Items& items) {
      taught_ = learn_ && state_.changed.exchange(0) != 0;
      // Counts fade with time alone.
      const bool faded = learn_ && state_.learnt_items > 0 &&
                         elapsed(state_.learnt_at, now_) > Catalogue::half_life / 64;
      any = !items.empty() || taught_ || faded;
      learn_ = taught_ || faded;
      if (!any) return;
      if (learn_) builder_->take_touched();
      latest_ = state_.times.latest();
      ready(RecordOf::update, [&](FieldWriter& archive) { archive(now_, learn_); });
    };
    if (with_items)
      items_ = state_.put_items.waiting(version_, look);
    else
      look(items_);
    if (any) begin_cut();
    return any;
  }

  // Errors: out of memory.
  Result<void> build() {
    take_in();
    if (learn_) report.items_learnt = builder_->learn(now_, state_.slates, counters_);
    return finish();
  }

  void publish() {
    Lanes::Copies copies = state_.publishing(next_);
    Vector<std::byte> record;
    {
      const Turns::All turns{state_.turns};
      sequence_ = state_.note(RecordOf::publish, record, [](FieldWriter&) {});
      put_in_place(copies);
    }
    state_.hand_over(sequence_);
    if (!learn_) return;
    state_.learnt_at = now_;
    state_.learnt_items = report.items_learnt;
  }

  // Another model, in the catalogue's order; `lacking`: items that it has no row for. Whether
  // users' states are good for it, and the sums.
  void begin_swap(std::shared_ptr<const Model> model, Vector<std::uint32_t> lacking,
                  bool same_encoder, bool same_space) {
    const Catalogue& old = *state_.catalogue;
    model_ = std::move(model);
    lacking_ = std::move(lacking);
    same_encoder_ = same_encoder;
    same_space_ = same_space;
    const Fingerprints& after = model_->fingerprints();
    const Turns::All turns{state_.turns};
    items_ = state_.put_items.taken_in([&](const std::string& id) { return old.find(id); });
    latest_ = std::max(state_.times.latest(), State::latest_of(*model_));
    old.counters->take_touched(touched_);
    ready(RecordOf::swap, [&](FieldWriter& archive) { archive(now_, after.encoder, after.items); });
    begin_cut();
  }

  Result<void> build_swap() {
    const Catalogue& old = *state_.catalogue;
    std::shared_ptr<Catalogue> first = CatalogueBuilder::first(
        model_, state_.options, state_.table, state_.key, now_, latest_, lacking_, &pace_);
    first->generation = old.generation + (same_encoder_ && same_space_ ? 0 : 1);
    first->encoder_since = same_encoder_ ? old.encoder_since : first->generation;
    first->space_since = same_space_ ? old.space_since : first->generation;
    first->counters = old.counters;
    if (first->counters->size() < first->size())
      first->counters = std::make_shared<ItemCounters>(old.counters->grown(first->size()));
    first->calibration = old.calibration;
    first->well_known_prior = old.well_known_prior;
    first->cold_prior = old.cold_prior;
    first->active = old.active;
    carry_ages(old, *first);
    if (same_space_) {
      first->contexts = old.contexts;
      first->second_moment = old.second_moment;
    }
    // Of interactions that the model was trained on, too, only those since then count, as if they
    // had come evenly.
    const std::int64_t until =
        std::clamp(first->trained_until, old.started, std::max(old.started, now_));
    const auto fading = [&](std::int64_t from) {
      return -std::expm1(-static_cast<double>(elapsed(from, now_)) /
                         static_cast<double>(Catalogue::half_life) * std::log(2.0));
    };
    interactions_kept_ = until > old.started ? fading(until) / fading(old.started) : 1.0;
    counters_ = std::make_shared<ItemCounters>(counters_->scaled(interactions_kept_));
    builder_.emplace(*first, state_.options, state_.table, pace_);
    builder_->take_touched(touched_);
    take_in();
    report.items_learnt = builder_->learn(now_, state_.slates, counters_, same_space_);
    return finish();
  }

  void publish_swap() {
    Lanes::Copies copies = state_.publishing(next_);
    Vector<std::byte> record;
    const Fingerprints& of = model_->fingerprints();
    const std::shared_ptr<const Model> old = state_.catalogue->base;
    state_.note_names(*next_, state_.catalogue->size(), old->parts().event_types.size());
    const Turns::All turns{state_.turns};
    sequence_ = state_.note(RecordOf::model, record,
                            [&](FieldWriter& archive) { archive(of.encoder, of.items); });
    carry_forgotten(*state_.catalogue, *next_);
    if (interactions_kept_ < 1)
      next_->counters->scale(ItemCounters::Kind::interactions, interactions_kept_);
    state_.users.fit(next_->encoder->state_size(), model_->dimension());
    if (!same_space_) state_.slates.drop_queries(model_->dimension());
    state_.times.know(
        std::min(State::latest_of(*model_), now_ + state_.options.clock_skew.count()));
    put_in_place(copies);
    if (const auto& models = state_.retired_models;
        old != model_ && std::find(models.begin(), models.end(), old) == models.end())
      state_.retired_models.push_back(old);  // reserved
    state_.learnt_at = now_;
    state_.learnt_items = report.items_learnt;
    if (!same_encoder_ || !same_space_) state_.encoded_shard = state_.encoded_slot = 0;
  }

  // What waited for the items that have come in. One for which there is no memory is lost, and
  // counted.
  void replay_arrived() noexcept;

  std::uint64_t version() const noexcept { return version_; }

  UpdateReport report;

 private:
  // What can fail, ahead of begin_cut().
  template <class Write>
  void ready(RecordOf what, Write write) {
    Vector<std::byte> record;
    counters_ = std::make_shared<ItemCounters>(state_.catalogue->counters->at_cut());
    state_.note(what, record, write);
  }
  void begin_cut() noexcept {
    cut_ = state_.catalogue;
    cut_->counters->begin_cut();
    cut_->contexts->begin_cut();
    state_.slates.begin_cut();
  }
  // False where memory ran out for what there was.
  bool end_cut() noexcept {
    if (!cut_) return true;
    const bool counters = cut_->counters->end_cut(), contexts = cut_->contexts->end_cut(),
               slates = state_.slates.end_cut();
    cut_.reset();
    return counters && contexts && slates;
  }

  void take_in() {
    constexpr std::size_t most_items = std::size_t{1} << 31, most_told = 100;
    const ItemIds& ids = *state_.catalogue->ids;
    const std::size_t size = std::max(ids.size(), model_ ? model_->item_count() : 0);
    for (const auto& [id, item] : items_) {
      const auto there = model_ ? model_->find_item(id) : ids.find(id);
      if (item.removed) {
        if (there) builder_->remove(*there);
        report.items_removed += there.has_value();
      } else if (!there && size + report.items_added >= most_items) {
        ++report.items_refused;
        if (report.refused.size() < most_told)
          report.refused.push_back({id, {Errc::limit, "the catalogue has 2^31 items"}});
      } else {
        builder_->put(id, item.created, item.fields, model_ ? !item.fields.empty() : item.given);
        ++(there ? report.items_changed : report.items_added);
      }
    }
  }

  Result<void> finish() {
    auto next = builder_->finish(now_, latest_);
    report.values_unknown = builder_->values_unknown();
    counters_.reset();
    if (!end_cut()) return Error{Errc::out_of_memory, "out of memory"};
    next_ = std::move(next);
    return {};
  }

  // While nobody has a turn.
  void put_in_place(Lanes::Copies& copies) noexcept {
    for (const std::uint32_t item : builder_->faded()) next_->contexts->forget(item);
    state_.publish(copies, next_);
    if (!model_) state_.put_items.settle(items_);
    builder_->publish();
    taught_ = false;
  }

  // When items came to be of which the model knows nothing; and, of a model that was trained on no
  // later interactions, when those of its training counted.
  static void carry_ages(const Catalogue& old, Catalogue& next) {
    if (next.trained_until <= old.trained_until) next.started = old.started;
    for (std::uint32_t i = 0; i < old.size(); ++i) {
      if (Catalogue::creation(next.statistics[i]) != std::numeric_limits<std::int64_t>::max())
        continue;
      if (const std::int64_t first = old.statistics[i].first_timestamp; first != no_timestamp)
        next.statistics.edit(i).first_timestamp = first;
    }
  }
  // While nobody forgets.
  static void carry_forgotten(const Catalogue& old, const Catalogue& next) noexcept {
    const StringTable &users = old.base->parts().user_ids, &others = next.base->parts().user_ids;
    for (std::size_t w = 0; w < old.forgotten->size(); ++w)
      for (std::uint64_t bits = (*old.forgotten)[w].load(); bits != 0; bits &= bits - 1) {
        const std::size_t row = w * 64 + static_cast<std::size_t>(std::countr_zero(bits));
        if (const auto at = others.find(users[row]))
          (*next.forgotten)[*at / 64].fetch_or(std::uint64_t{1} << (*at % 64));
      }
  }

  State& state_;
  std::int64_t now_;
  bool learn_;
  Pace& pace_;
  std::optional<CatalogueBuilder> builder_;
  PutItems::Items items_;
  std::uint64_t version_ = 0;
  std::int64_t latest_ = no_timestamp;
  bool taught_ = false;
  std::uint64_t sequence_ = 0;                   // of the record that says it is published
  Vector<std::uint32_t> touched_;                // of a swap, until its builder has them
  std::shared_ptr<ItemCounters> counters_;       // of the cut
  std::shared_ptr<const Catalogue> cut_, next_;  // that there is a cut of; that is to be
  // Of a swap:
  std::shared_ptr<const Model> model_;
  Vector<std::uint32_t> lacking_;
  bool same_encoder_ = true, same_space_ = true;
  double interactions_kept_ = 1;
};

inline void write_put(const NewItem& item, std::optional<std::int64_t> created,
                      FieldWriter& archive) {
  archive(item.item, item.creation_timestamp.value_or(no_timestamp), created.value_or(no_timestamp),
          static_cast<std::uint64_t>(item.fields.size()));
  for (const auto& [name, value] : item.fields) archive(name, value);
}

// Forgets what is known of a user or session, whose turn the caller has. False where there was
// none.
inline bool forget(State& state, std::string_view user, const UserKey& key) noexcept {
  bool forgot = state.users.take(key) != nullptr;
  if (!user.empty()) {
    const auto catalogue = state.lanes.current();
    if (const auto row = catalogue->stored_user(user)) {
      (*catalogue->forgotten)[*row / 64].fetch_or(std::uint64_t{1} << (*row % 64));
      forgot = true;
    }
  }
  state.slates.forget(key.text());
  return forgot;
}

// An event that has waited for its item, as it is recorded now.
inline bool record_arrived(State& state, ScratchLease& scratch, const std::string& id) {
  const auto event = state.put_items.first_arrived(id);
  if (!event) return false;
  GoneUsers gone;
  const UserKey key{event->user, event->session, state.key};
  Turns::Lock turn{state.turns, key};
  state.make_current(key, scratch);
  EventChange change;
  change.user = event->user;
  change.session = event->session;
  change.time = {event->timestamp, state.times.now()};
  change.shared_time = state.times.shared(change.time);
  change.waits_for = id;
  change.arrived = true;
  if (const auto item = scratch.catalogue().find(id)) {
    change.item = *item;
    change.event_type = scratch.catalogue()
                            .base->parts()
                            .event_types.find(event->event_type)
                            .value_or(no_event_type);
  }
  Changes changes{state, scratch, gone};
  scratch->seen.clear();
  const Settle settle{state.users, key, scratch->grown, gone};  // where what follows fails
  changes.prepare(change, key);
  state.note(RecordOf::arrived, scratch->record,
             [&](FieldWriter& archive) { changes.write(change, archive); });
  state.put_items.drop_arrived(id);
  changes.apply(change, key);
  turn.end();
  state.tell(gone, scratch.catalogue());
  return true;
}

inline void Update::replay_arrived() noexcept {
  for (const auto& one : items_) {
    for (bool more = true; more;) {
      const auto recorded = catching_bad_alloc([&]() -> Result<void> {
        ScratchLease scratch{state_.lanes};
        more = record_arrived(state_, scratch, one.first);
        report.events_replayed += more;
        return {};
      });
      if (recorded) continue;
      ++report.events_lost;
      state_.put_items.drop_arrived(one.first);
    }
  }
}

// Who makes updates, and when.
class Updater {
 public:
  explicit Updater(State& state) : state_(state) {}

  bool due() const {
    return state_.options.update_interval.count() > 0 &&
           state_.times.now() >= state_.next_update.load() &&
           (state_.changed.load(memory_order_relaxed) != 0 || state_.put_items.any_waiting());
  }

  // Another thread that is at it is not waited for. Errors: out_of_memory; the update is then due
  // again.
  Result<void> update_if_due() {
    constexpr std::uint32_t calls_a_look = 1024;  // at the journal
    if (state_.options.updates != Updates::in_requests) return {};
    const bool look = state_.keeper && state_.calls.fetch_add(1) % calls_a_look == 0;
    if (!due() && !look) return {};
    const unique_lock lock{state_.update_mutex, try_to_lock};
    if (!lock) return {};
    if (look) state_.keeper->save_if_due(state_);
    if (!due()) return {};
    const std::int64_t now = state_.times.now(), before = state_.next_update.load();
    state_.next_update.store(now + state_.options.update_interval.count());
    Pace pace;
    auto updated = run(now, true, pace);
    if (!updated) state_.next_update.store(before);
    encode_some(users_a_time, pace);
    return updated;
  }

  // The caller holds update_mutex. learn: what events and impressions taught as well. Where it
  // fails, everything stays as it was but for the report.
  Result<void> run(std::int64_t now, bool learn, Pace& pace) {
    const auto begun = std::chrono::steady_clock::now();
    UpdateReport report;
    report.timestamp = now;
    bool published = false;
    const auto made = catching_bad_alloc([&]() -> Result<void> {
      state_.sweep();
      Update update(state_, now, learn, pace);
      if (!update.begin()) return {};
      auto built = update.build();
      if (built) {
        update.publish();
        published = true;
        update.replay_arrived();
        {
          const lock_guard lock{state_.wake_mutex};
          state_.taken_version = update.version();
        }
        state_.taken_in.notify_all();
      }
      report = std::move(update.report);
      return built;
    });
    if (!made) report.error = made.error();
    report.duration = std::chrono::duration_cast<std::chrono::microseconds>(
        std::chrono::steady_clock::now() - begun);
    if (published || !made) {
      const lock_guard lock{state_.report_mutex};
      state_.report = std::move(report);
    }
    return made;
  }

  // Makes the states of so many users, at most, those of the present model; false where none is
  // left. The caller holds update_mutex.
  bool encode_some(std::size_t most, Pace& pace) {
    std::string key;
    const auto encoded = catching_bad_alloc([&]() -> Result<void> {
      while (most > 0 && state_.encoded_shard < Users::shard_count) {
        if (!state_.users.next_older(state_.encoded_shard, state_.catalogue->generation,
                                     state_.encoded_slot, key)) {
          ++state_.encoded_shard;
          state_.encoded_slot = 0;
          continue;
        }
        ScratchLease scratch{state_.lanes};
        const auto [user, session] = UserKey::owner(key);
        state_.bring_up(UserKey{user, session, state_.key}, scratch);
        --most;
        pace.step();
      }
      return {};
    });
    return encoded && state_.encoded_shard < Users::shard_count;
  }

  Result<SwapReport> swap(const std::shared_ptr<const Model>& model);

  void start() {
    state_.updater = thread([this_state = &state_] { Updater(*this_state).keep_going(); });
  }

  static constexpr std::size_t users_a_time = 10'000;

 private:
  // What was put is taken in at once, but beside requests updates take a sixteenth of the time.
  void keep_going() {
    State& state = state_;
    constexpr auto after_failure = std::chrono::seconds{1};
    const std::chrono::milliseconds usual{state.options.clock ? 20 : 1000};
    const auto rest = [&state](Pace::Clock::duration time) { state.rest(time); };
    bool more = false;  // users to encode
    unique_lock lock{state.wake_mutex};
    while (!state.stopping) {
      if (!more) state.wake.wait_for(lock, usual, [&] { return state.stopping || state.woken; });
      if (state.stopping) return;
      const bool put = std::exchange(state.woken, false);
      lock.unlock();
      bool made = true;
      const bool is_due = due();
      unique_lock update_lock{state.update_mutex};
      Pace pace(rest);  // what the lock took was no work
      if (is_due || (put && state.options.update_interval.count() > 0)) {
        const std::int64_t now = state.times.now();
        if (is_due) state.next_update.store(now + state.options.update_interval.count());
        made = run(now, is_due, pace).has_value();
      } else {
        state.sweep();
      }
      more = encode_some(256, pace);
      if (state.keeper) state.keeper->save_if_due(state);
      update_lock.unlock();
      pace.rest();
      lock.lock();
      if (!made) state.wake.wait_for(lock, after_failure, [&] { return state.stopping; });
    }
  }

  State& state_;
};

// Where RecommenderOptions wants a thread.
inline Result<void> start_updater(State& state) {
  if (state.options.updates != Updates::by_thread ||
      (state.options.update_interval.count() == 0 && !state.keeper))
    return {};
#if PERSONALIZE_HAS_EXCEPTIONS
  try {
    Updater(state).start();
  } catch (const std::system_error&) {
    return Error{Errc::unsupported,
                 "no thread can be started; set RecommenderOptions::updates to by_caller"};
  }
#else
  Updater(state).start();
#endif
  return {};
}

// The caller holds update_mutex.
inline Result<SwapReport> Updater::swap(const std::shared_ptr<const Model>& model) {
  const auto begun = std::chrono::steady_clock::now();
  state_.sweep();
  const Catalogue& old = *state_.catalogue;
  SwapReport report;
  Vector<std::string_view> items(old.size()), types(old.base->parts().event_types.size());
  for (std::uint32_t i = 0; i < items.size(); ++i) items[i] = (*old.ids)[i];
  for (std::size_t t = 0; t < types.size(); ++t) types[t] = old.base->parts().event_types[t];
  Pace pace = state_.beside_requests();
  auto ordered = in_order(model, items, types, &pace);
  if (!ordered) return ordered.error();
  report.items_added = ordered->model->item_count() - items.size();
  Vector<std::uint32_t> lacking;  // of the items that there are
  for (const std::uint32_t item : ordered->lacking)
    if (old.available(item)) lacking.push_back(item);
  Update update(state_, state_.times.now(), true, pace);
  const Fingerprints &before = old.base->fingerprints(), &after = model->fingerprints();
  report.states_kept =
      before.encoder == after.encoder &&
      Encoder(*ordered->model, state_.table).state_size() == old.encoder->state_size();
  report.sums_kept = before.items == after.items && old.dimension() == model->dimension();
  update.begin_swap(ordered->model, std::move(ordered->lacking), report.states_kept,
                    report.sums_kept);
  if (auto built = update.build_swap(); !built) return built.error();
  update.publish_swap();
  for (const std::uint32_t item : lacking)
    ++(state_.catalogue->available(item) ? report.items_put : report.items_dropped);
  report.duration = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - begun);
  return report;
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 26: state file. Owns how all that a recommender knows is written beside traffic, and read
// onto the same or another model. Uses all earlier rooms.
//
// A state file has the outside of room 5. Its sections are bytes (u8), fields back to back as the
// function each_field of their owner names them, texts behind their u64 size:
//
//   tag  index  content
//   HEAD 0      StateHead: which model, which record of a journal comes next, keys, clocks
//   ITEM 0      u64 count, then the ids of all items so far; their order is the items' numbers
//   TYPE 0      u64 count, then the event types so far
//   FORG 0      u64 count, then users who came with the model and were forgotten
//   CATL 0      what was learnt of items: catalogue_fields()
//   CNTR 0      ItemCounters
//   PUTS 0      PutItems
//   EVID 0      EventIds
//   CTXT s      ContextSums, a 64th of them
//   SLAT s      SlateLog, a part
//   USER s      Users, a 64th of them
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

struct StateHead {
  std::uint64_t lineage = 0, number = 0;  // of the folder's file; 0: of none
  std::uint64_t next_sequence = 0;        // the first record that is not in it
  std::int64_t saved_at = 0;              // by the clock
  HashKey key{};
  Fingerprints model;
  std::uint64_t dimension = 0, state_size = 0;
  std::int64_t learnt_at = no_timestamp, next_update = no_timestamp;
  std::uint64_t learnt_items = 0, restarted = 0;
  std::uint32_t changed = 0;

  template <class Archive, class Self>
  static void each_field(Archive& archive, Self& self) {
    archive(self.lineage, self.number, self.next_sequence, self.saved_at, self.key[0], self.key[1],
            self.model.encoder, self.model.items, self.dimension, self.state_size, self.learnt_at,
            self.next_update, self.learnt_items, self.restarted, self.changed);
  }
};

// All elements; of what is read, those that differ are changed, so that pages stay shared.
template <class T, class Archive, class Array, class Field>
void paged_fields(Archive& archive, Array& array, std::size_t size, Field field) {
  for (std::size_t i = 0; i < size; ++i) {
    T value = array[i];
    field(archive, value);
    if constexpr (Archive::reads) {
      if (!archive.ok()) return;
      if (std::memcmp(&value, &std::as_const(array)[i], sizeof value) != 0) array.edit(i) = value;
    }
  }
}

// Rows that lie in pages of their own, as they are stored.
template <class Archive, class Rows>
void row_fields(Archive& archive, Rows& rows) {
  std::uint64_t count = 0;
  if constexpr (Archive::reads) {
    archive(count);
    const std::size_t bytes = rows.empty() ? 0 : rows.stored(0).size();
    for (std::uint64_t r = 0; r < count && archive.ok(); ++r) {
      std::uint32_t row = 0;
      float scale = 0;
      archive(row, scale);
      const auto values = archive.bytes(bytes);
      if (!archive.ok() || row >= rows.rows() || !rows.set_stored(row, values, scale))
        return archive.fail();
    }
  } else {
    rows.for_each_moved([&](std::size_t) { ++count; });
    archive(count);
    rows.for_each_moved([&](std::size_t r) {
      archive(static_cast<std::uint32_t>(r), rows.scale(r));
      archive.bytes(rows.stored(r));
    });
  }
}

template <class Archive>
void mask_fields(Archive& archive, ItemMask& mask) {
  for (std::size_t w = 0; w < (mask.size() + 63) / 64; ++w) {
    std::uint64_t word = mask.word(w);
    archive(word);
    if constexpr (Archive::reads)
      for (; word != 0; word &= word - 1)
        if (!mask.set(
                static_cast<std::uint32_t>(w * 64 + static_cast<unsigned>(std::countr_zero(word)))))
          archive.fail();
  }
}

// Of all models: what another one goes on from.
template <class Archive, class Self>
void lasting_fields(Archive& archive, Self& self, std::size_t size, std::int64_t most_time) {
  archive(self.generation, self.encoder_since, self.space_since, self.calibration.slope,
          self.calibration.intercept, self.well_known_prior.strength, self.well_known_prior.mean,
          self.cold_prior.strength, self.cold_prior.mean, self.started, self.trained_until);
  paged_fields<ItemStatistics>(archive, self.statistics, size, [&](auto& a, auto& s) {
    a(s.interactions, s.first_timestamp, s.last_timestamp, s.creation_timestamp);
    // A clock that was ahead when it was saved may have been put right.
    if constexpr (Archive::reads)
      for (std::int64_t* t : {&s.first_timestamp, &s.last_timestamp, &s.creation_timestamp})
        *t = std::min(*t, most_time);
  });
  bool moments = self.second_moment != nullptr;
  Vector<std::uint32_t> active = *self.active;
  Vector<double> moment;
  if (moments) moment = *self.second_moment;
  archive(active, moments, moment);
  if constexpr (Archive::reads) {
    const auto ascends = [&](const Vector<std::uint32_t>& items) {
      for (std::size_t i = 0; i < items.size(); ++i)
        if (items[i] >= size || (i > 0 && items[i] <= items[i - 1])) return false;
      return true;
    };
    const auto within = [](double v, double low, double high) { return v >= low && v <= high; };
    bool sound = archive.ok() && ascends(active) && self.generation >= self.encoder_since &&
                 self.generation >= self.space_since && self.encoder_since > 0 &&
                 self.space_since > 0 &&
                 within(static_cast<double>(self.calibration.slope), 0.1, 4) &&
                 within(static_cast<double>(self.calibration.intercept), -20, 20);
    for (const GammaPrior& prior : {self.well_known_prior, self.cold_prior})
      sound = sound && within(prior.strength, 0.5, 50) && within(prior.mean, 0.1, 10);
    for (const double v : moment) sound = sound && std::isfinite(v);
    if (!sound) return archive.fail();
    self.active = std::make_shared<const Vector<std::uint32_t>>(std::move(active));
    self.second_moment.reset();
    if (moments) self.second_moment = std::make_shared<const Vector<double>>(std::move(moment));
  }
}

// Of one model: what was learnt of its items. Of what follows from it nothing is written: biases,
// corrected vectors, the scorer.
template <class Archive, class Self>
void catalogue_fields(Archive& archive, Self& self) {
  const std::size_t size = self.size(), d = self.dimension();
  archive(self.popularity_scale, self.trained_interactions, self.interactions, self.mean_square,
          self.low_bias, self.unseen_quality, self.changed_base);
  const auto number = [](auto& a, auto& v) {
    a(v);
    if constexpr (Archive::reads)
      if (!(std::abs(v) <= max_magnitude)) a.fail();
  };
  paged_fields<float>(archive, self.offsets, size, number);
  paged_fields<float>(archive, self.popularity, size, number);
  bool feedback = !self.quality.empty();
  archive(feedback);
  if constexpr (Archive::reads) {
    // Options may say otherwise now; what was learnt of qualities is then left out.
    if (feedback && self.quality.empty()) {
      (void)archive.bytes(size * sizeof(float));
      feedback = false;
    } else if (feedback) {
      paged_fields<float>(archive, self.quality, size, number);
    }
  } else if (feedback) {
    paged_fields<float>(archive, self.quality, size, number);
  }
  row_fields(archive, self.rows);
  row_fields(archive, self.input_rows);
  ItemMask gone(size), absent(size);
  if constexpr (!Archive::reads) {
    for (std::uint32_t i = 0; i < size; ++i)
      if (!self.available(i)) gone.set(i);
    if (self.absent)
      for (std::uint32_t i = 0; i < size; ++i)
        if (self.absent->test(i)) absent.set(i);
  }
  mask_fields(archive, gone);
  mask_fields(archive, absent);
  Vector<std::uint32_t> corrected = *self.corrected, popular = *self.popular,
                        popular_later = self.popular_later, later_items = self.later_items;
  Vector<float> corrections;
  if (self.corrections) corrections = *self.corrections;
  archive(corrected, corrections, popular, popular_later, later_items);
  std::uint64_t pool = self.pool.size();
  archive(pool);
  if constexpr (Archive::reads) {
    ItemMask seen(size);
    bool sound = archive.ok() && popular.size() <= size &&
                 corrections.size() == corrected.size() * (d + 1) && all_finite(corrections) &&
                 popular_later.size() == later_items.size() && pool <= Catalogue::max_pool &&
                 std::isfinite(self.popularity_scale) && std::isfinite(self.interactions) &&
                 std::isfinite(self.trained_interactions) && std::isfinite(self.mean_square) &&
                 std::isfinite(self.low_bias) && std::isfinite(self.unseen_quality);
    const auto distinct = [&](const Vector<std::uint32_t>& items) {
      ItemMask those(size);
      for (const std::uint32_t item : items)
        if (item >= size || those.test(item) || !those.set(item)) return false;
      return true;
    };
    sound = sound && distinct(corrected) && distinct(popular) && distinct(popular_later) &&
            distinct(later_items) && std::is_sorted(later_items.begin(), later_items.end(), Less{});
    for (const std::uint32_t item : later_items) seen.set(item);
    for (const std::uint32_t item : popular_later) sound = sound && seen.test(item);
    for (const std::uint32_t item : popular) seen.set(item);
    // Each item can be popular.
    sound = sound && seen.count() == size;
    if (!sound) return archive.fail();
    self.pool.clear();
    for (std::uint64_t p = 0; p < pool; ++p) {
      PoolItem item{};
      archive(item.item, item.bonus, item.created);
      if (!archive.ok() || item.item >= size || gone.test(item.item) ||
          (p > 0 && item.item <= self.pool.back().item) || !std::isfinite(item.bonus))
        return archive.fail();
      self.pool.push_back(item);
    }
    self.popular = std::make_shared<const Vector<std::uint32_t>>(std::move(popular));
    self.popular_later = std::move(popular_later);
    self.later_items = std::move(later_items);
    self.absent.reset();
    if (absent.count() > 0) self.absent = std::make_shared<const ItemMask>(std::move(absent));
    self.vectors = self.rows;
    Vector<float> row(d);
    for (std::size_t c = 0; c < corrected.size() && !self.correction_of.empty(); ++c) {
      const std::uint32_t item = corrected[c];
      self.correction_of.edit(item) = static_cast<std::uint32_t>(c + 1);
      self.rows.row(item, row);
      for (std::size_t i = 0; i < d; ++i) row[i] += corrections[c * (d + 1) + i];
      self.vectors.set_row(item, row);
    }
    if (self.correction_of.empty()) corrected.clear(), corrections.clear();
    self.corrections = std::make_shared<const Vector<float>>(std::move(corrections));
    self.corrected = std::make_shared<const Vector<std::uint32_t>>(std::move(corrected));
    for (std::uint32_t i = 0; i < size; ++i) {
      const float* const delta = self.correction(i);
      const float bias = gone.test(i)
                             ? std::numeric_limits<float>::quiet_NaN()
                             : self.offsets[i] + self.quality_of(i) + (delta ? delta[d] : 0.0f);
      if (std::memcmp(&bias, &self.biases[i], sizeof bias) != 0) self.biases.edit(i) = bias;
    }
  } else {
    for (const PoolItem& item : self.pool) archive(item.item, item.bonus, item.created);
  }
}

// Writes a state file beside traffic. Belongs to one thread, which holds State::update_mutex.
class StateWriter {
 public:
  explicit StateWriter(State& state) : state_(state), pace_(state.beside_requests()) {}
  StateWriter(const StateWriter&) = delete;
  StateWriter& operator=(const StateWriter&) = delete;
  ~StateWriter() { end_cut(); }

  // The moment that is written. at_cut(): called in it, while nothing changes; cannot fail.
  template <class AtCut>
  void begin(AtCut at_cut) {
    catalogue_ = state_.catalogue;
    counters_ = std::make_shared<ItemCounters>(catalogue_->counters->at_cut());
    FieldWriter archive{puts_};
    Users::Cuts users = state_.users.make_cuts();
    forgotten_.reserve(catalogue_->forgotten->size());
    const auto lock = [&] {
      const Turns::All turns{state_.turns};
      begun_ = true;
      state_.users.begin_cut(std::move(users), catalogue_->encoder_since);
      catalogue_->counters->begin_cut();
      catalogue_->contexts->begin_cut();
      state_.slates.begin_cut();
      state_.event_ids.begin_cut();
      head_.changed = state_.changed.load();
      head_.restarted = state_.restarted.load();
      FieldWriter times{times_};
      TimeGate::each_field(times, state_.times);
      for (std::size_t w = 0; w < catalogue_->forgotten->size(); ++w)
        forgotten_.push_back((*catalogue_->forgotten)[w].load());
      auto held = state_.put_items.hold();
      at_cut();
      head_.next_sequence = state_.journal ? state_.journal->next_sequence() : 0;
      return held;
    };
    const auto held = lock();
    state_.put_items.write(archive, held);
    head_.key = state_.key;
    head_.model = catalogue_->base->fingerprints();
    head_.dimension = catalogue_->dimension();
    head_.state_size = catalogue_->encoder->state_size();
    head_.saved_at = state_.times.now();
    head_.learnt_at = state_.learnt_at;
    head_.learnt_items = state_.learnt_items;
    head_.next_update = state_.next_update.load();
  }

  // The bytes written. Errors: out_of_memory; what was written is then no file.
  Result<std::uint64_t> write(ByteSink& sink, std::uint64_t lineage, std::uint64_t number) {
    constexpr int zstd_level = 1;
    constexpr unsigned chunk_log2 = 20;
    head_.lineage = lineage;
    head_.number = number;
    PacedSink paced{sink, pace_};
    FileBuilder file{paced, state_file, zstd_level, chunk_log2};
    const Catalogue& of = *catalogue_;
    const auto add = [&](std::string_view tag, std::size_t index, auto make,
                         Codec codec = Codec::zstd) {
      file.add_made(
          tag, static_cast<std::uint32_t>(index),
          [make](Vector<std::byte>& bytes) -> Result<void> {
            FieldWriter archive{bytes};
            make(archive, bytes);
            return {};
          },
          codec);
    };
    using Bytes = Vector<std::byte>;
    add("HEAD", 0, [&](FieldWriter& archive, Bytes&) {
      StateHead::each_field(archive, head_);
      archive.bytes(times_);
    });
    add("ITEM", 0, [&](FieldWriter& archive, Bytes&) {
      archive(static_cast<std::uint64_t>(of.size()));
      for (std::uint32_t i = 0; i < of.size(); ++i) archive((*of.ids)[i]);
    });
    add("TYPE", 0,
        [&](FieldWriter& archive, Bytes&) { write_names(archive, of.base->parts().event_types); });
    add("FORG", 0, [&](FieldWriter& archive, Bytes&) {
      std::uint64_t count = 0;
      for (const std::uint64_t word : forgotten_)
        count += static_cast<std::uint64_t>(std::popcount(word));
      archive(count);
      for (std::size_t w = 0; w < forgotten_.size(); ++w)
        for (std::uint64_t bits = forgotten_[w]; bits != 0; bits &= bits - 1)
          archive(
              of.base->parts().user_ids[w * 64 + static_cast<std::size_t>(std::countr_zero(bits))]);
    });
    add("CATL", 0, [&](FieldWriter& archive, Bytes&) {
      lasting_fields(archive, of, of.size(), 0);
      catalogue_fields(archive, of);
    });
    add("CNTR", 0, [&](FieldWriter& archive, Bytes&) {
      ItemCounters::each_field(archive, std::as_const(*counters_));
    });
    add("PUTS", 0, [&](FieldWriter& archive, Bytes&) { archive.bytes(puts_); });
    add("EVID", 0, [&](FieldWriter& archive, Bytes&) { state_.event_ids.write(archive); });
    for (std::size_t s = 0; s < ContextSums::stripe_count; ++s)
      add("CTXT", s,
          [&, s](FieldWriter& archive, Bytes&) { of.contexts->write_stripe(s, archive); });
    for (std::size_t s = 0; s < state_.slates.stripe_count(); ++s)
      add("SLAT", s,
          [&, s](FieldWriter& archive, Bytes&) { state_.slates.write_stripe(s, archive); });
    // Two thirds of it are floats, of which zstd makes nothing smaller.
    for (std::size_t s = 0; s < Users::shard_count; ++s)
      add(
          "USER", s,
          [&, s](FieldWriter&, Bytes& bytes) { state_.users.write_shard(s, bytes, pace_); },
          Codec::stored);
    if (auto finished = file.finish(); !finished) return finished.error();
    if (!end_cut()) return Error{Errc::out_of_memory, "out of memory"};
    return file.size();
  }

  static void write_names(FieldWriter& archive, const StringTable& names) {
    archive(static_cast<std::uint64_t>(names.size()));
    for (std::size_t i = 0; i < names.size(); ++i) archive(names[i]);
  }

 private:
  struct PacedSink final : ByteSink {
    PacedSink(ByteSink& to, Pace& by) : sink(to), pace(by) {}
    void append(std::span<const std::byte> bytes) override {
      sink.append(bytes);
      pace.step();
    }
    void overwrite(std::uint64_t offset, std::span<const std::byte> bytes) override {
      sink.overwrite(offset, bytes);
    }
    ByteSink& sink;
    Pace& pace;
  };
  // False where memory ran out for what there was.
  bool end_cut() noexcept {
    if (!std::exchange(begun_, false)) return true;
    const bool counters = catalogue_->counters->end_cut(),
               contexts = catalogue_->contexts->end_cut(), slates = state_.slates.end_cut(),
               ids = state_.event_ids.end_cut(), users = state_.users.end_cut();
    return counters && contexts && slates && ids && users;
  }

  State& state_;
  Pace pace_;
  StateHead head_;
  std::shared_ptr<const Catalogue> catalogue_;
  std::shared_ptr<ItemCounters> counters_;  // of the cut
  Vector<std::byte> puts_, times_;
  Vector<std::uint64_t> forgotten_;
  bool begun_ = false;
};

// Writes a state file at once or not at all. The caller holds update_mutex. at_cut: as
// StateWriter::begin().
template <class AtCut>
Result<SaveReport> save_state(State& state, const std::string& path, std::uint64_t lineage,
                              std::uint64_t number, AtCut at_cut) {
  const auto begun = std::chrono::steady_clock::now();
  FileSink file{path, 0600};
  SaveReport report;
  StateWriter writer{state};
  writer.begin(at_cut);
  const auto written = writer.write(file, lineage, number);
  if (!written) return written.error();
  if (auto committed = file.commit(); !committed) return committed.error();
  report.bytes = *written;
  report.duration = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - begun);
  return report;
}

// Makes a State of a state file and a model, which may be another one.
class StateReader {
 public:
  // model, options and table as Recommender::create has checked them; the key may be missing.
  // more_types: event types that are to be known beside the state's and the model's; they outlive
  // the reader.
  StateReader(const std::shared_ptr<const Model>& model, RecommenderOptions options,
              const kernels::Table& table, const StringTable* more_types = nullptr)
      : model_(model), options_(std::move(options)), table_(table), more_types_(more_types) {}

  // Errors: those of a file of sections; corrupt, where values contradict one another;
  // invalid_argument: another recommendation_key than the state's.
  Result<void> read(ByteSource& source) {
    // Of a state's size nothing is said but that there is memory for it.
    LoadOptions options;
    options.limits.file_bytes = options.limits.raw_bytes = std::uint64_t{1} << 44;
    auto done = read_each_section(
        source, state_file, options,
        [&](const SectionInfo& section, std::span<const std::byte> bytes) -> Result<void> {
          return visit(section, bytes);
        });
    if (!done) return done;
    if (seen_ < Part::users || users_ != Users::shard_count)
      return Error{Errc::corrupt, "sections are missing"};
    return finish();
  }
  // What StateWriter::write_names() wrote.
  static Result<void> read_names(FieldReader& archive, StringTable& names) {
    std::uint64_t count = 0;
    archive(count);
    for (std::uint64_t i = 0; i < count && archive.ok(); ++i) {
      const std::string_view name = archive.text();
      if (!archive.ok()) break;
      const auto added = names.add(name);
      if (!added && added.error().code == Errc::out_of_memory) return added.error();
      if (!added) archive.fail();
    }
    return {};
  }

  // How many the state has, once it is read.
  std::size_t items() const noexcept { return items_.size(); }
  std::size_t event_types() const noexcept { return types_of_state_; }

  std::unique_ptr<State> state;
  StateHead head;
  RecoveryReport report;

 private:
  enum class Part {
    none,
    head,
    items,
    types,
    forgotten,
    catalogue,
    counters,
    puts,
    ids,
    contexts,
    slates,
    users
  };

  Result<void> visit(const SectionInfo& section, std::span<const std::byte> bytes) {
    const std::string_view tag(section.tag.data(), section.tag.size());
    FieldReader archive{bytes};
    const auto follows = [&](std::string_view name, Part part, bool repeats = false) {
      if (tag != name) return false;
      const auto before = static_cast<int>(part) - 1;
      const bool first = static_cast<int>(seen_) == before;
      if (!first && !(repeats && seen_ == part)) archive.fail();
      seen_ = part;
      return true;
    };
    Result<void> done;
    if (follows("HEAD", Part::head)) {
      StateHead::each_field(archive, head);
      if (archive.ok()) {
        const auto rest = archive.bytes(archive.left());
        times_.assign(rest.begin(), rest.end());
      }
    } else if (follows("ITEM", Part::items)) {
      done = read_names(archive, items_);
    } else if (follows("TYPE", Part::types)) {
      done = read_names(archive, types_);
      types_of_state_ = types_.size();
      for (std::size_t t = 0; more_types_ && t < more_types_->size() && done; ++t)
        if (!types_.find((*more_types_)[t]))
          if (const auto added = types_.add((*more_types_)[t]); !added) done = added.error();
      if (done && archive.at_end()) done = begin();
    } else if (follows("FORG", Part::forgotten)) {
      read_forgotten(archive);
    } else if (follows("CATL", Part::catalogue)) {
      done = read_catalogue(archive);
    } else if (follows("CNTR", Part::counters)) {
      ItemCounters counters;
      ItemCounters::each_field(archive, counters);
      if (archive.ok() && counters.size() > catalogue_->size()) archive.fail();
      if (archive.ok())
        catalogue_->counters = std::make_shared<ItemCounters>(counters.grown(catalogue_->size()));
    } else if (follows("PUTS", Part::puts)) {
      state->put_items.read(archive);
    } else if (follows("EVID", Part::ids)) {
      state->event_ids.read(archive);
    } else if (follows("CTXT", Part::contexts, true)) {
      if (!same_space_ || section.index >= ContextSums::stripe_count)
        (void)archive.bytes(archive.left());
      else
        catalogue_->contexts->read_stripe(section.index, archive, items_.size());
    } else if (follows("SLAT", Part::slates, true)) {
      if (options_.feedback)
        state->slates.read_stripe(section.index, archive, items_.size());
      else
        (void)archive.bytes(archive.left());
    } else if (follows("USER", Part::users, true)) {
      if (section.index != users_ || users_ >= Users::shard_count) archive.fail();
      ++users_;
      if (archive.ok())
        state->users.read_shard(section.index, archive, state->key, bounds(),
                                catalogue_->generation, catalogue_->encoder_since);
    } else {
      return {};  // of a later version
    }
    if (!done) return done;
    if (!archive.at_end()) return Error{Errc::corrupt, "its values contradict one another"};
    return {};
  }

  // Also one of the same vectors with more items.
  bool other_model() const noexcept {
    return !same_space_ || !same_encoder_ || ordered_->item_count() != items_.size();
  }
  User::Bounds bounds() const noexcept {
    return {static_cast<std::size_t>(head.state_size),
            User::offset_size(static_cast<std::size_t>(head.dimension)),
            items_.size(),
            types_.size(),
            65'535,
            catalogue_->space_since};
  }

  // Once names are known: the state, with the model in their order.
  Result<void> begin() {
    constexpr std::uint64_t most = std::uint64_t{1} << 24;  // of a user's floats
    if (head.state_size > most || head.dimension > most)
      return Error{Errc::corrupt, "section HEAD: a state or a vector is too large"};
    if (options_.recommendation_key && *options_.recommendation_key != head.key)
      return Error{Errc::invalid_argument,
                   "RecommenderOptions::recommendation_key is another than the state's: ids that "
                   "were given would no longer be known"};
    options_.recommendation_key = head.key;
    Vector<std::string_view> items(items_.size()), types(types_.size());
    for (std::size_t i = 0; i < items.size(); ++i) items[i] = items_[i];
    for (std::size_t t = 0; t < types.size(); ++t) types[t] = types_[t];
    auto ordered = in_order(model_, items, types);
    if (!ordered) return ordered.error();
    ordered_ = ordered->model;
    lacking_ = std::move(ordered->lacking);
    state = std::make_unique<State>(*ordered_, options_, table_);
    if (auto checked = check_statistics(*ordered_, *state); !checked) return checked;
    const Fingerprints& model = model_->fingerprints();
    const Encoder encoder(*ordered_, table_);
    same_space_ = model.items == head.model.items && ordered_->dimension() == head.dimension;
    same_encoder_ = model.encoder == head.model.encoder && encoder.state_size() == head.state_size;
    now_ = state->times.now();
    catalogue_ = CatalogueBuilder::first(ordered_, state->options, table_, state->key, now_,
                                         state->times.latest(), lacking_);
    FieldReader times{times_};
    TimeGate::each_field(times, state->times);
    if (!times.at_end()) return Error{Errc::corrupt, "section HEAD: its clocks are missing"};
    state->times.limit(now_ + state->options.clock_skew.count());
    state->times.know(State::latest_of(*ordered_));
    return {};
  }

  void read_forgotten(FieldReader& archive) {
    std::uint64_t count = 0;
    archive(count);
    for (std::uint64_t i = 0; i < count && archive.ok(); ++i)
      if (const auto row = ordered_->parts().user_ids.find(archive.text()))
        (*catalogue_->forgotten)[*row / 64].fetch_or(std::uint64_t{1} << (*row % 64));
  }

  Result<void> read_catalogue(FieldReader& archive) {
    lasting_fields(archive, *catalogue_, items_.size(), now_ + state->options.clock_skew.count());
    if (!archive.ok() || other_model()) {
      if (archive.ok()) (void)archive.bytes(archive.left());
      return {};
    }
    const std::size_t d = catalogue_->dimension();
    if (catalogue_->second_moment && catalogue_->second_moment->size() != d * d) archive.fail();
    catalogue_fields(archive, *catalogue_);
    if (!archive.ok()) return {};
    Catalogue& c = *catalogue_;
    c.scorer =
        std::make_shared<const Scorer>(c.vectors, c.biases, usual_query_length(*c.base), table_);
    c.fill_pool();
    return {};
  }

  Result<void> finish() {
    State& of = *state;
    const std::shared_ptr<const Catalogue> first = catalogue_;
    Lanes::Copies copies = of.publishing(first);
    of.publish(copies, first);
    catalogue_.reset();
    of.learnt_at = head.learnt_at;
    of.learnt_items = static_cast<std::size_t>(head.learnt_items);
    of.restarted = head.restarted;
    of.changed = head.changed != 0 ? 1 : 0;
    // A clock that was ahead may have been put right.
    of.next_update = std::min(head.next_update, now_ + of.options.update_interval.count());
    if (head.next_update == no_timestamp || of.options.update_interval.count() == 0)
      of.next_update = now_ + of.options.update_interval.count();
    of.encoded_shard = of.encoded_slot = 0;
    GoneUsers gone;
    for (std::size_t s = 0; s < Users::shard_count; ++s) of.users.settle(s, gone);
    of.tell(gone, *of.catalogue);
    report.users = of.users.count();
    report.other_model = other_model();
    report.states_kept = same_encoder_;
    report.sums_kept = same_space_;
    if (!report.other_model) return {};
    Pace pace;
    Update update(of, now_, true, pace);
    update.begin_swap(ordered_, lacking_, same_encoder_, same_space_);
    if (auto built = update.build_swap(); !built) return built;
    update.publish_swap();
    return {};
  }

  std::shared_ptr<const Model> model_, ordered_;
  RecommenderOptions options_;
  const kernels::Table& table_;
  Part seen_ = Part::none;
  std::size_t users_ = 0;  // shards read
  StringTable items_, types_;
  std::size_t types_of_state_ = 0;
  const StringTable* more_types_;
  Vector<std::byte> times_;
  Vector<std::uint32_t> lacking_;
  std::shared_ptr<Catalogue> catalogue_;
  bool same_encoder_ = false, same_space_ = false;
  std::int64_t now_ = 0;
};

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 27: persistence. Owns the folder that a recommender keeps its state in: how it is opened,
// its journal applied, and how saves follow one another. Uses all earlier rooms.
//
// A folder has files state-N.pzs and journal-N.pzj. State N is what was known when the journal went
// over to file N; what came after stands in journal N and those that follow. A save makes journal
// N + 1, goes over to it, writes state N + 1, and when that is durable removes what was before. So
// a crash at any moment leaves a state and all that came after it.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

namespace detail {

// Applies the records of a journal to a state that has none yet.
class Replay {
 public:
  // items, types: how many the state had.
  Replay(State& state, std::size_t items, std::size_t types)
      : state_(state), present_(state.catalogue->base->fingerprints()), numbers_(items, types) {
    // What was taken in was taken in, whatever there is room for now.
    state_.put_items.set_budget(std::numeric_limits<std::uint64_t>::max());
  }

  // Records that follow were made with this model.
  void use_model(const std::array<std::uint64_t, 2>& model) noexcept {
    foreign_ = present_.encoder != model[0] || present_.items != model[1];
    other_model = other_model || foreign_;
  }
  // Errors: corrupt, where a record says what cannot be; out_of_memory.
  Result<void> apply(std::uint64_t sequence, std::uint32_t type,
                     std::span<const std::byte> payload) {
    FieldReader archive{payload};
    if (!unknown_types.empty()) return look_for_types(type, archive);
    ++records;
    closed = false;
    auto done = catching_bad_alloc([&]() -> Result<void> {
      switch (static_cast<RecordOf>(type)) {
        case RecordOf::event:
        case RecordOf::arrived:
          return event(archive);
        case RecordOf::slate:
          return slate(archive);
        case RecordOf::use:
          return use(archive);
        case RecordOf::merge:
          return merge(archive);
        case RecordOf::forget:
          return forget(archive);
        case RecordOf::put:
          return put(archive);
        case RecordOf::remove:
          return remove(archive);
        case RecordOf::update:
          return update(archive);
        case RecordOf::publish:
          return publish();
        case RecordOf::swap:
          return swap(archive);
        case RecordOf::model:
          return model(archive);
        case RecordOf::encode:
          return encode(archive);
        case RecordOf::import:
          return import(archive);
        case RecordOf::close:
          closed = true;
          return {};
        case RecordOf::names:
          return numbers_.announce(archive) ? Result<void>{} : contradicts();
        case RecordOf::opened:
          return opened(archive);
      }
      return {};  // of a later version
    });
    // Perhaps once more: nobody knows whether they were told of before the end.
    state_.tell(gone_, *state_.catalogue);
    const bool known = type >= static_cast<std::uint32_t>(RecordOf::event) &&
                       type <= static_cast<std::uint32_t>(RecordOf::opened);
    if (done && known && !archive.at_end()) done = contradicts();
    if (done || done.error().code == Errc::out_of_memory) return done;
    return Error{done.error().code,
                 joined({"record ", sequence, " of type ", type, ": ", done.error().message})};
  }
  // What was under way when the records ended never came to be.
  void end() {
    update_.reset();
    state_.put_items.set_budget(state_.options.pending_bytes);
  }
  // Whether items and event types have those here that they have in the journal.
  bool same_numbers() const noexcept { return numbers_.same_as(*state_.catalogue); }

  // Event types of models that came, which neither the state nor the model knows. Where there are
  // some, what follows was not applied: the state is to be read again, with them.
  StringTable unknown_types;
  std::uint64_t records = 0;
  bool closed = false;       // the last one says that the process ended in peace
  bool other_model = false;  // some were made with another model

 private:
  static Error contradicts() { return {Errc::corrupt, "its values contradict one another"}; }

  Result<void> event(FieldReader& archive) {
    ScratchLease scratch{state_.lanes};
    Changes changes{state_, scratch, gone_};
    EventChange change;
    changes.read(change, archive, numbers_, foreign_);
    const Unlisting unlisting{changes};
    if (!archive.at_end() || !are_ids(change.user, change.session)) return contradicts();
    const UserKey key{change.user, change.session, state_.key};
    EventIds::Claim claim{state_.event_ids, change.event_hash};
    state_.make_current(key, scratch);
    (void)changes.see(change, key, true);
    if (change.item != EventChange::no_item || !scratch->seen.empty()) changes.prepare(change, key);
    const bool waits = !change.waits_for.empty() && !change.arrived;
    if (waits)
      (void)state_.put_items.remember(change.waits_for,
                                      {std::string(change.user), std::string(change.session),
                                       std::string(change.waiting_type), change.time.timestamp},
                                      [] {});
    if (change.arrived) state_.put_items.drop_arrived(change.waits_for);
    if (waits || change.item != EventChange::no_item || !scratch->seen.empty()) claim.keep();
    changes.apply(change, key);
    return {};
  }

  Result<void> slate(FieldReader& archive) {
    ScratchLease scratch{state_.lanes};
    Changes changes{state_, scratch, gone_};
    SlateChange change;
    changes.read(change, archive, numbers_, foreign_);
    if (!archive.at_end() || change.user.size() > max_id_bytes ||
        change.session.size() > max_id_bytes)
      return contradicts();
    changes.apply(change);
    return {};
  }

  Result<void> use(FieldReader& archive) {
    std::string_view user, session;
    archive(user, session);
    if (!archive.ok() || user.size() > max_id_bytes || session.size() > max_id_bytes)
      return contradicts();
    if (!user.empty()) state_.users.use(UserKey{user, {}, state_.key}, [](User*) {});
    if (!session.empty()) state_.users.use(UserKey{{}, session, state_.key}, [](User*) {});
    return {};
  }

  Result<void> merge(FieldReader& archive) {
    std::string_view session, user;
    archive(session, user);
    if (!archive.ok() || session.empty() || user.empty() || !are_ids(user, session))
      return contradicts();
    ScratchLease scratch{state_.lanes};
    (void)Changes{state_, scratch, gone_}.merge(session, user);
    return {};
  }

  Result<void> forget(FieldReader& archive) {
    std::string_view user, session;
    archive(user, session);
    if (!archive.ok() || !are_ids(user, session)) return contradicts();
    (void)detail::forget(state_, user, UserKey{user, session, state_.key});
    return {};
  }

  Result<void> put(FieldReader& archive) {
    NewItem item;
    std::int64_t given = no_timestamp, created = no_timestamp;
    std::uint64_t fields = 0;
    archive(item.item, given, created, fields);
    if (fields > 1000) return contradicts();
    for (std::uint64_t f = 0; f < fields && archive.ok(); ++f) {
      const std::string_view name = archive.text(), value = archive.text();
      item.fields.push_back({name, value});
    }
    if (!archive.ok() || !is_id(item.item)) return contradicts();
    if (given != no_timestamp) item.creation_timestamp = given;
    const auto when = created == no_timestamp ? std::nullopt : std::optional(created);
    const auto take_in = [&] {
      return state_.put_items.put(item, when, *state_.catalogue->base, [] {});
    };
    if (take_in()) return {};
    item.fields.clear();  // another model can make nothing of them
    return take_in();
  }

  Result<void> remove(FieldReader& archive) {
    std::string_view id;
    bool there = false;
    archive(id, there);
    if (!archive.ok() || !is_id(id)) return contradicts();
    (void)state_.put_items.remove(id, there, [] {});
    return {};
  }

  Result<void> update(FieldReader& archive) {
    std::int64_t now = 0;
    bool learn = false;
    archive(now, learn);
    if (!archive.ok()) return contradicts();
    state_.next_update = now + state_.options.update_interval.count();
    std::uint64_t version = 0;
    coming_ = state_.put_items.waiting(version, [](const PutItems::Items&) {});
    return start(now, learn, true);
  }
  // Of another model nothing can be computed; what events taught is learnt for the present one.
  Result<void> swap(FieldReader& archive) {
    std::int64_t now = 0;
    Fingerprints of;
    archive(now, of.encoder, of.items);
    if (!archive.ok()) return contradicts();
    coming_.clear();
    return start(now, true, false);
  }
  Result<void> start(std::int64_t now, bool learn, bool with_items) {
    numbers_.drop_announced();
    update_.reset();
    state_.sweep();
    update_.emplace(state_, now, learn, pace_);
    if (update_->begin(with_items)) return update_->build();
    update_.reset();
    return {};
  }
  Result<void> publish() {
    if (update_) update_->publish();
    update_.reset();
    for (const auto& [id, item] : coming_)
      if (!item.removed) numbers_.add_item(*state_.catalogue, id);
    coming_.clear();
    return {};
  }
  Result<void> model(FieldReader& archive) {
    std::array<std::uint64_t, 2> of{};
    archive(of[0], of[1]);
    if (!archive.ok()) return contradicts();
    if (note_unknown_types()) return {};
    use_model(of);
    if (auto published = publish(); !published) return published;
    know_announced();
    numbers_.model(*state_.catalogue);
    return {};
  }
  Result<void> opened(FieldReader& archive) {
    std::array<std::uint64_t, 2> of{};
    archive(of[0], of[1]);
    if (!archive.ok()) return contradicts();
    if (note_unknown_types()) return {};
    use_model(of);
    update_.reset();
    coming_.clear();
    know_announced();
    numbers_.opened(*state_.catalogue);
    return {};
  }
  Result<void> look_for_types(std::uint32_t type, FieldReader& archive) {
    if (static_cast<RecordOf>(type) != RecordOf::names) return {};
    numbers_.drop_announced();
    if (!numbers_.announce(archive)) return contradicts();
    (void)note_unknown_types();
    return {};
  }
  // Of those announced; whether there are any.
  bool note_unknown_types() {
    const StringTable &known = state_.catalogue->base->parts().event_types,
                      &types = numbers_.announced_types();
    for (std::size_t t = 0; t < types.size(); ++t) {
      if (known.find(types[t]) || unknown_types.find(types[t])) continue;
      const auto added = unknown_types.add(types[t]);
      if (!added && added.error().code == Errc::out_of_memory) no_memory();
    }
    return !unknown_types.empty();
  }
  // Of what another model had, this one may lack some, on which there are events all the same.
  void know_announced() {
    const Catalogue& present = *state_.catalogue;
    const StringTable& ids = numbers_.announced_items();
    Vector<std::string_view> unknown;
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (!present.number_of(ids[i])) unknown.push_back(ids[i]);
    if (unknown.empty()) return;
    CatalogueBuilder builder{present, state_.options, state_.table, pace_};
    builder.add_lacking(unknown);
    const auto next = builder.finish(state_.times.now(), state_.times.latest());
    Lanes::Copies copies = state_.publishing(next);
    state_.publish(copies, next);
    builder.publish();
  }

  Result<void> encode(FieldReader& archive) {
    std::string_view key;
    archive(key);
    if (!archive.ok() || !UserKey::is_text(key)) return contradicts();
    const auto [user, session] = UserKey::owner(key);
    ScratchLease scratch{state_.lanes};
    state_.make_current(UserKey{user, session, state_.key}, scratch);
    return {};
  }

  Result<void> import(FieldReader& archive) {
    const auto bytes = archive.bytes(archive.left());
    const auto blob = Blob::read(bytes);
    if (!blob) return blob.error();
    ScratchLease scratch{state_.lanes};
    std::uint64_t sequence = 0;
    (void)import_blob(state_, scratch, *blob, bytes, gone_, false, sequence);
    return {};
  }

  State& state_;
  Fingerprints present_;
  Numbers numbers_;
  bool foreign_ = false;
  Pace pace_;
  GoneUsers gone_;
  std::optional<Update> update_;
  PutItems::Items coming_;  // that the update under way takes in
};

// The folder that a recommender keeps its state in, and what it does there. Its functions are
// called under State::update_mutex.
class Keeper final : public Saver {
 public:
  static std::string state_name(std::uint64_t number) { return name("state-", number, ".pzs"); }
  static std::string journal_name(std::uint64_t number) { return name("journal-", number, ".pzj"); }
  // Of such a name.
  static std::optional<std::uint64_t> number_of(std::string_view name, std::string_view prefix,
                                                std::string_view suffix) noexcept {
    if (!name.starts_with(prefix) || !name.ends_with(suffix)) return std::nullopt;
    name = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
    std::uint64_t number = 0;
    if (name.size() != 12) return std::nullopt;
    for (const char c : name) {
      if (c < '0' || c > '9') return std::nullopt;
      number = 10 * number + static_cast<std::uint64_t>(c - '0');
    }
    return number;
  }

  // The numbers of the files in a folder, ascending. Errors: io; truncated: a journal that the
  // state needs is missing, or there is none of the states.
  struct Files {
    std::vector<std::uint64_t> states, journals;  // of journals, those that the last state needs
    std::vector<std::string> old;                 // of earlier states
  };
  static Result<Files> files_in(const Folder& folder) {
    const auto names = folder.list();
    if (!names) return names.error();
    Files files;
    for (const std::string& name : *names) {
      if (const auto state = number_of(name, "state-", ".pzs")) files.states.push_back(*state);
      if (const auto journal = number_of(name, "journal-", ".pzj"))
        files.journals.push_back(*journal);
    }
    if (files.states.empty()) return files;
    const std::uint64_t last = files.states.back();
    for (const std::uint64_t state : files.states)
      if (state < last) files.old.push_back(state_name(state));
    std::size_t before = 0;
    for (; before < files.journals.size() && files.journals[before] < last; ++before)
      files.old.push_back(journal_name(files.journals[before]));
    files.journals.erase(files.journals.begin(),
                         files.journals.begin() + static_cast<std::ptrdiff_t>(before));
    for (std::size_t j = 0; j < std::max<std::size_t>(files.journals.size(), 1); ++j)
      if (j >= files.journals.size() || files.journals[j] != last + j)
        return Error{Errc::truncated,
                     joined({folder.path_of(journal_name(last + j)),
                             ": is missing, and with it what came after the state"})};
    return files;
  }

  Keeper(Folder folder, std::uint64_t lineage, std::uint64_t number)
      : folder_(std::move(folder)), lineage_(lineage), number_(number) {}

  // Writes a state file and goes over to a new journal; then the old ones go. Errors: io,
  // out_of_memory: the old ones stay, and with the journal hold all that there is.
  Result<SaveReport> save(State& state) override {
    const auto begun = std::chrono::steady_clock::now();
    const std::uint64_t number = number_ + 1;
    const Fingerprints& model = state.catalogue->base->fingerprints();
    JournalHeader header;
    header.lineage = lineage_;
    header.number = number;
    header.first_sequence = state.journal->next_sequence();
    header.model = {model.encoder, model.items};
    const std::string path = folder_.path_of(journal_name(number));
    remove_file(path);  // of a save that failed while it was made
    auto next = JournalFile::create(path, header);
    if (!next) return next.error();
    number_ = number;
    // An empty journal may stay: the next one follows it.
    if (auto synced = folder_.sync(); !synced) return synced.error();
    auto report = save_state(state, folder_.path_of(state_name(number)), lineage_, number,
                             [&]() noexcept { state.journal->switch_to(std::move(*next)); });
    {
      const lock_guard lock{state.report_mutex};
      state.save_error.reset();
      if (!report) state.save_error = report.error();
    }
    if (!report) return report;
    saved_bytes_ = report->bytes;
    state.journal->forget_before(number);
    state.saves.fetch_add(1);
    // Not before the new one's name is sure to outlive a power cut.
    if (folder_.sync()) remove_old();
    report->duration = std::chrono::duration_cast<std::chrono::microseconds>(
        std::chrono::steady_clock::now() - begun);
    return report;
  }

  void save_if_due(State& state) noexcept override {
    (void)catching_bad_alloc([&]() -> Result<void> {
      const JournalStatus status = state.journal->status();
      const auto now = std::chrono::steady_clock::now();
      // What a save costs grows with the state.
      const std::uint64_t most = std::max(state.options.journal_bytes, saved_bytes_);
      if (!status.broken && status.file_bytes <= most) return {};
      if (failed_ && now - *failed_ < std::chrono::seconds{1}) return {};
      failed_ = now;
      if (auto saved = save(state); !saved) return saved.error();
      failed_.reset();
      return {};
    });
  }

  // Files that are not needed any more. Those that stay are removed at the next save.
  void remove_old() noexcept {
    (void)catching_bad_alloc([&]() -> Result<void> {
      const auto files = files_in(folder_);
      if (!files) return files.error();
      for (const std::string& old : files->old) (void)folder_.remove(old);
      return {};
    });
  }

 private:
  static std::string name(std::string_view prefix, std::uint64_t number, std::string_view suffix) {
    std::string digits(12, '0');
    for (std::size_t d = digits.size(); d-- > 0; number /= 10)
      digits[d] = static_cast<char>('0' + number % 10);
    return joined({prefix, digits, suffix});
  }

  Folder folder_;
  std::uint64_t lineage_, number_;                               // of the last journal's file
  std::uint64_t saved_bytes_ = 0;                                // of the last state, once known
  std::optional<std::chrono::steady_clock::time_point> failed_;  // the last save that was due
};

// How a folder is opened.
class Opening {
 public:
  // model, options and table as Recommender::create has checked them; the key may be missing.
  Opening(std::string path, std::shared_ptr<const Model> model, RecommenderOptions options,
          const kernels::Table& table)
      : path_(std::move(path)),
        model_(std::move(model)),
        options_(std::move(options)),
        table_(table) {}

  const RecommenderOptions& options() const noexcept { return options_; }

  // What the folder holds, without a journal; null where it holds nothing.
  Result<std::unique_ptr<State>> read() {
    const auto begun = std::chrono::steady_clock::now();
    auto folder = Folder::open(path_);
    if (!folder) return folder.error();
    folder_.emplace(std::move(*folder));
    if (auto removed = folder_->remove_parts(); !removed) return removed.error();
    auto files = Keeper::files_in(*folder_);
    if (!files) return files.error();
    if (files->states.empty()) {
      if (auto checked = check_empty(files->journals); !checked) return checked.error();
      return std::unique_ptr<State>{};
    }
    StringTable more_types;
    auto state = read_all(*files, more_types);
    if (state && !more_types.empty()) {
      const StringTable types = std::move(more_types);
      more_types = {};
      state->reset();
      state = read_all(*files, more_types, &types);
    }
    if (!state) return state.error();
    (*state)->recovery.duration = std::chrono::duration_cast<std::chrono::microseconds>(
        std::chrono::steady_clock::now() - begun);
    return state;
  }

  // Goes on with the journal, or makes the first one and a state file.
  Result<void> go_on(State& state) {
    const JournalSettings settings{options_.durability, options_.sync_interval,
                                   options_.pending_journal_bytes};
    const bool found = state.recovery.found;
    if (!found) {
      const auto random = random_key();
      if (!random) return Error{Errc::io, "the system gives no random bytes"};
      lineage_ = (*random)[0];
      const Fingerprints& model = state.catalogue->base->fingerprints();
      number_ = 1;
      header_.lineage = lineage_;
      header_.number = number_;
      header_.first_sequence = 1;
      header_.model = {model.encoder, model.items};
    }
    const std::string path = folder_->path_of(Keeper::journal_name(number_));
    auto journal = found ? Journal::resume(path, header_, end_, next_, settings)
                         : Journal::create(path, header_, settings);
    if (!journal) return journal.error();
    if (auto synced = folder_->sync(); !synced) return synced;
    state.journal = std::move(*journal);
    if (!found) {
      const auto saved = catching_bad_alloc([&] {
        return save_state(state, folder_->path_of(Keeper::state_name(number_)), lineage_, number_,
                          []() noexcept {});
      });
      if (!saved) {
        // Without a record it goes the next time, without a state it must have none.
        state.journal.reset();
        return saved.error();
      }
    }
    auto keeper = std::make_unique<Keeper>(std::move(*folder_), lineage_, number_);
    keeper->remove_old();
    state.keeper = std::move(keeper);
    // What comes from here on is of this model: a state of it is to be there. Where it cannot be
    // written now, persistence() says so, what there is stays, and the journal says what this
    // process's numbers are of.
    if (state.recovery.other_model || !same_numbers_) {
      const lock_guard lock{state.update_mutex};
      if (!state.keeper->save(state)) {
        const Fingerprints& model = state.catalogue->base->fingerprints();
        Vector<std::byte> record;
        state.note_names(*state.catalogue, items_of_state_, types_of_state_);
        state.hand_over(state.note(RecordOf::opened, record, [&](FieldWriter& archive) {
          archive(model.encoder, model.items);
        }));
      }
    }
    // What had come in when the process ended, and was not told its users yet.
    ScratchLease scratch{state.lanes};
    for (const std::string& id : state.put_items.with_arrived())
      while (record_arrived(state, scratch, id)) {
      }
    return {};
  }

  // Errors get the file's name.
  static Result<void> read_file(const std::string& path, StateReader& reader) {
    auto source = ByteSource::open(path);
    if (!source) return source.error();
    auto read = reader.read(*source);
    if (read || read.error().code == Errc::out_of_memory || read.error().code == Errc::io ||
        read.error().code == Errc::invalid_argument)
      return read;
    Error error = read.error();
    error.message = joined({path, ": ", error.message});
    return error;
  }

 private:
  // Journals without a state are of a folder that was being made, and hold nothing.
  Result<void> check_empty(const std::vector<std::uint64_t>& journals) {
    for (const std::uint64_t number : journals) {
      const std::string name = Keeper::journal_name(number);
      bool empty = true;
      const auto read = read_journal(folder_->path_of(name), {},
                                     [&](std::uint64_t, std::uint32_t, std::span<const std::byte>) {
                                       empty = false;
                                       return Result<void>{};
                                     });
      if (!read && read.error().code != Errc::truncated) return read.error();
      if (!empty)
        return Error{Errc::truncated, joined({folder_->path_of(name),
                                              ": the state that it goes on from is missing"})};
      if (auto removed = folder_->remove(name); !removed) return removed;
    }
    return {};
  }

  // The last state and all that came after it. unknown_types: what Replay says, and the state is
  // then none; types: what it said before.
  Result<std::unique_ptr<State>> read_all(const Keeper::Files& files, StringTable& unknown_types,
                                          const StringTable* types = nullptr) {
    const std::uint64_t last = files.states.back();
    StateReader reader{model_, options_, table_, types};
    if (auto read = read_file(folder_->path_of(Keeper::state_name(last)), reader); !read)
      return read.error();
    if (reader.head.number != last)
      return Error{Errc::corrupt, joined({folder_->path_of(Keeper::state_name(last)),
                                          ": is not the file that it is named after"})};
    lineage_ = reader.head.lineage;
    std::unique_ptr<State> state = std::move(reader.state);
    RecoveryReport& report = state->recovery = reader.report;
    Replay replay{*state, reader.items(), reader.event_types()};
    next_ = reader.head.next_sequence;
    for (const std::uint64_t number : files.journals)
      if (auto replayed = read_journal_file(number, replay, report, number == last); !replayed)
        return replayed.error();
    replay.end();
    unknown_types = std::move(replay.unknown_types);
    report.found = true;
    report.clean = replay.closed;
    report.records = replay.records;
    report.other_model = report.other_model || replay.other_model;
    same_numbers_ = replay.same_numbers();
    items_of_state_ = reader.items();
    types_of_state_ = reader.event_types();
    return state;
  }

  Result<void> read_journal_file(std::uint64_t number, Replay& replay, RecoveryReport& report,
                                 bool first) {
    const std::string name = Keeper::journal_name(number), path = folder_->path_of(name);
    const JournalExpectation expected{.lineage = lineage_, .number = number, .first_record = next_};
    if (const auto header = peek_journal_header(path, expected)) replay.use_model(header->model);
    const auto read = read_journal(
        path, expected,
        [&](std::uint64_t sequence, std::uint32_t type,
            std::span<const std::byte> payload) -> Result<void> {
          auto applied = replay.apply(sequence, type, payload);
          if (applied || applied.error().code == Errc::out_of_memory) return applied;
          return Error{applied.error().code, joined({path, ": ", applied.error().message})};
        });
    if (!read) {
      // It was being made when the process ended.
      if (first || read.error().code != Errc::truncated) return read.error();
      return folder_->remove(name);
    }
    header_ = read->header;
    number_ = number;
    end_ = read->end;
    next_ = read->next_sequence;
    report.torn += read->torn;
    return {};
  }
  std::string path_;
  std::shared_ptr<const Model> model_;
  RecommenderOptions options_;
  const kernels::Table& table_;
  std::optional<Folder> folder_;
  std::uint64_t lineage_ = 0;
  // Of the last journal's file: where it goes on.
  JournalHeader header_;
  std::uint64_t number_ = 0, end_ = 0, next_ = 0;
  bool same_numbers_ = true;
  std::size_t items_of_state_ = 0, types_of_state_ = 0;
};

inline Result<std::unique_ptr<State>> restore_state(const std::string& path,
                                                    const std::shared_ptr<const Model>& model,
                                                    RecommenderOptions options,
                                                    const kernels::Table& table) {
  const auto begun = std::chrono::steady_clock::now();
  StateReader reader{model, std::move(options), table};
  if (auto read = Opening::read_file(path, reader); !read) return read.error();
  RecoveryReport& report = reader.state->recovery = reader.report;
  report.found = report.clean = true;
  report.duration = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - begun);
  return std::move(reader.state);
}

}  // namespace detail

#endif  // PERSONALIZE_HAS_BODIES

// ============================================================================================
// Room 28: recommender. Owns Recommender, the interface: answers requests and learns from events.
// Uses all earlier rooms.
// ============================================================================================

namespace detail {

struct Catalogue;
struct Ranking;
struct Scratch;
struct SeenPick;
struct State;
struct Time;
class User;
class UserKey;

}  // namespace detail

// Serves a model to any number of threads: every member function may be called at any time from
// any thread, but for moving and ending it. A moved-from Recommender can only be assigned to or
// end.
//
// The ranking is by u = h . v + b + (h . delta + m - rho ignored) / slope: the model's score and,
// with feedback on, what impressions taught (room 13) in units of the score. rho = 0.4 (impression
// discounting: Lee et al. 2014). With feedback on, h is the encoder's query plus the user's offset
// g, for the encoder sees what was chosen but not what was passed over: each impression y of an
// item moves
//   g by offset_gain slope (y - p) v / mean |v|^2,
// y: 1 if it was chosen, else 0; p: positive events expected by all that is known, at most 1. This
// is a step of constant gain up the log likelihood, as if g . v varied by offset_gain about 0 for
// an item of usual length. Each event of the user moves the encoder's state, and g forgets
// offset_forgotten of itself.
//
// What one user adds to what all share is capped: of an item that the user has chosen within 14
// days, further choices and impressions count for the user alone (where they come from slates of
// this recommender: from the fifth on), and in all 1,600 events and 4,096 impressions in 14 days.
class Recommender {
 public:
  Recommender(Recommender&& other) noexcept;
  Recommender& operator=(Recommender&& other) noexcept;
  ~Recommender();

  // Takes slate_log_bytes and, with Updates::by_thread and an interval, starts the thread. Errors
  // (invalid_argument): an option outside its range; statistics of the model that lie ahead of the
  // clock. io: no random bytes. unsupported: no thread to be had.
  static Result<Recommender> create(std::shared_ptr<const Model> model,
                                    const RecommenderOptions& options = {});

  // The same with everything it knows kept in a folder, which is made where it is missing (not
  // those above it) and belongs to one recommender at a time: goes on from what is there, as if the
  // process had not ended. model may be another one than before, as with swap(). Each call that
  // changes something is written to a journal before it is acknowledged (Durability); where that
  // fails, the call has its effect in memory, and record, put_item and so on return the error,
  // recommend gives a slate without an id; when the disk takes it again, all of it is durable again
  // (persistence()). Reading a state takes a second for 500,000 users, and replaying a journal
  // about as long as its calls took. With one thread that makes the calls, slates are then bit for
  // bit those of a process that never ended; with several, users and counts are, and the sums
  // behind Explanation::taste within rounding. Errors: as create; io, or unsupported where there
  // are no such files; what a state or journal that was damaged says, with file and offset:
  // `personalize state repair` keeps what precedes it; invalid_argument: another recommendation_key
  // than before.
  static Result<Recommender> open(const std::string& folder, std::shared_ptr<const Model> model,
                                  const RecommenderOptions& options = {});

  // A recommender that knows what a state file holds, without a folder: what save(path) wrote, or a
  // folder's state-*.pzs.
  static Result<Recommender> restore(const std::string& path, std::shared_ptr<const Model> model,
                                     const RecommenderOptions& options = {});

  // Advances the user's state by one event; O(1) in the length of the history. With a
  // recommendation id or impressions, also counts what was seen and chosen: O(items shown).
  // Errors (invalid_argument; nothing is changed): no user and no session, an id that is not 1 to
  // 256 bytes of UTF-8 without control characters, over 10,000 impressions, a time ahead of the
  // clock. Where user and session are given, the session's earlier events become the user's first,
  // as by merge_session.
  Result<Recorded> record(const Interaction& event);

  // Counts items as seen without an event. Each pick of a slate counts once. Errors as above, and
  // neither a recommendation id nor items.
  Result<Recorded> record_impression(const Impression& impression);

  // The best `count` items for the user into `slate`, whose memory is reused: once warm, no memory
  // is taken. Fewer where fewer are eligible. One pass over the catalogue and, with exploration,
  // O(count x pool). A user without events gets popular items. Of a slate only the first places,
  // some thousand, can be answered with its id. Errors (invalid_argument): no user and no
  // session, an id of over 256 bytes, a time ahead of the clock, a count or a mask outside its
  // range.
  Result<void> recommend(const Request& request, Slate& slate);
  Result<Slate> recommend(const Request& request);

  // slates[i] for requests[i], each the same as alone. Known users share a pass over the catalogue,
  // 32 at a time, which takes a fraction of the time of one by one, and the request memory of 32
  // threads, which is kept for later calls. Errors as above, and invalid_argument where there are
  // more requests than slates; where memory runs out on the way, the slates that were not reached
  // are empty and count as not asked for.
  Result<void> recommend(std::span<const Request> requests, std::span<Slate> slates);

  // Orders the given items for the user, best first, without exploration. What cannot be ranked
  // comes last, in the given order, with reason unknown or excluded and score 0. Request::count is
  // not used. O(items).
  Result<void> rank(const Request& request, std::span<const std::string_view> items,
                    Slate& slate) const;

  // What makes up an item's score for this user now. Errors: unknown_item; as recommend.
  Result<Explanation> explain(const Request& request, std::string_view item) const;

  // The item enters the catalogue, or is changed in it, at the next update. What was put before and
  // is not named now stays. Of an item that the model was trained on the vector stays as it is. A
  // new item's vector comes from its metadata and the items it is like; where nothing is known, a
  // neutral one and a low bias. Errors: invalid_argument (id, time, fields over 64 KiB, metadata
  // without a finite vector); limit: pending_bytes are used, until an update.
  Result<void> put_item(const NewItem& item);

  // The item leaves the catalogue at the next update; putting it again brings it back with what was
  // learnt of it. False where there is no such item. Errors: as put_item.
  Result<bool> remove_item(std::string_view item);

  // Takes in what was put and removed, and folds in what events and impressions taught since the
  // last time. Readers go on with the old catalogue until the new one is complete. now: the clock's
  // time where missing. Cost: see CatalogueBuilder. Errors: out_of_memory, invalid_argument (now is
  // ahead of the clock); the old catalogue stays. An item that cannot be taken in is no error; it
  // stands in the report.
  Result<void> update(std::optional<std::int64_t> now = {});

  // Goes on with another model, newly trained or converted, while requests are under way: none
  // fails or waits, and those that began with the old model end with it. Users, counts, popularity,
  // slates and their ids, items that were put or removed go on, and items keep their numbers. What
  // was learnt in terms of the old model's vectors (users' offsets, taste) goes where the model's
  // fingerprint differs: the new one was trained on it. Users' states are then made anew from
  // their remembered events, of each user when next used, and of all by the thread or by update().
  // Items that the model lacks stay, by the fields that they were put with, or leave. The old model
  // ends when its last reader is done, at a later update. Errors: invalid_argument (statistics
  // ahead of the clock), out_of_memory: the old model stays. Cost: as create, and as an update.
  Result<SwapReport> swap(std::shared_ptr<const Model> model);

  // Writes all that is known to a state file, beside traffic, which hardly waits for it. Into the
  // folder: the journal begins anew, and what was before goes once the new file is durable; the
  // recommender does so by itself when the journal has grown. To a path: a copy, which restore()
  // reads; `path` is replaced at once or not at all. Users' ids and keys stand in it: it is made
  // for its owner alone. Errors: io, out_of_memory, and nothing that there was is lost;
  // invalid_argument: there is no folder. Memory: twice that of slates and contexts, of users what
  // changes meanwhile.
  Result<SaveReport> save();
  Result<SaveReport> save(const std::string& path) const;
  // O(files) but for `error`.
  PersistenceStatus persistence() const;
  // What open() or restore() found.
  const RecoveryReport& recovery() const noexcept;

  // What is known of a user or, with an empty user, a session, some KiB, for import_user of another
  // recommender; empty where there is none. Items and event types go by name; the state goes along,
  // and is good where the model is the same, else it is made anew from the events. Nothing is
  // forgotten here. Errors: as rank; out_of_memory.
  Result<std::vector<std::byte>> export_user(std::string_view user,
                                             std::string_view session = {}) const;
  // Takes in such a user, in place of one of the same id. Errors: format, version, checksum,
  // compression, limit, corrupt: nothing is changed. io: as record.
  Result<ImportReport> import_user(std::span<const std::byte> blob);

  // Whether update_interval has passed since the last update and there is something new.
  bool update_due() const;
  UpdateReport update_report() const;

  // Makes an anonymous session's events the user's own, after those the user already has, with its
  // impressions, and forgets the session. False where there is no such session.
  Result<bool> merge_session(std::string_view session, std::string_view user);

  // Forgets a user or, with an empty user, a session: state, events, impressions, slates and
  // queries, also those that came with the model. False where there was none. What stays: counts
  // and sums over all users, hashes of event ids, and what RecommenderOptions::log was given.
  bool forget(std::string_view user, std::string_view session = {});

  // Of the kernels in use: "avx512+vnni", "avx2+fma", "sse2", "neon", "scalar" and so on.
  const char* instruction_set() const noexcept;

  std::size_t user_count() const;  // users and sessions remembered now
  std::size_t item_count() const;  // in the catalogue, with those removed
  // An item's number, less than item_count(), which it keeps: its bit in Request::eligible. That of
  // a removed item too. Differs from the number in model() once items were removed. O(1).
  std::optional<std::uint32_t> find_item(std::string_view item) const;
  MemoryUse memory() const;  // O(threads + items / 256 + items that were put)
  // Users whose state was not finite and began anew: a sign of a broken model.
  std::uint64_t restarted_states() const noexcept;

  // The model with the items that updates have added, which can be saved: the model itself where
  // there are none, else a copy, O(items x d), kept until the next update. With Updates::by_thread
  // waits until what was put is in. Null where memory runs out, or all items were removed.
  std::shared_ptr<const Model> model() const;

 private:
  using Catalogue = detail::Catalogue;
  using Ranking = detail::Ranking;
  using Scratch = detail::Scratch;
  using State = detail::State;
  using Time = detail::Time;
  using User = detail::User;
  using UserKey = detail::UserKey;
  struct Prepared;
  struct Beginning;

  static constexpr std::size_t together = 32;  // requests in one pass
  static constexpr std::size_t most_impressions = 10'000;

  explicit Recommender(std::unique_ptr<State> state) noexcept;

  static Result<void> check_ids(std::string_view user, std::string_view session,
                                bool recorded = true);
  static Result<void> check_request(const Request& request);
  static Result<void> check_mask(const Catalogue& catalogue, const Request& request);

  void answer(Prepared& prepared, Slate& slate) const;
  std::uint64_t commit(Prepared& prepared, Slate& slate);
  void count_use(const Prepared& prepared) const;
  std::uint64_t recommend_together(std::span<const Request> requests, std::span<Slate> slates);
  static void clear(Slate& slate) noexcept;
  Result<void> durable(std::uint64_t sequence, std::span<Slate> slates) const;

  Result<Recorded> learn(const Interaction& event, const Impression& shown, const Time& time,
                         bool impression);
  void write_log(const Catalogue& catalogue, const Impression& shown, const Scratch& scratch,
                 std::int64_t timestamp) const;

  std::unique_ptr<State> state_;
};

// ============================================================================================
// Room 29: calls. Owns the bodies of Recommender: how each call is checked, resolved, noted,
// applied and answered. The order of the locks stands at the top of room 23, with the state. Uses
// all earlier rooms.
// ============================================================================================

#if PERSONALIZE_HAS_BODIES

// A request and what was found out about its user.
struct Recommender::Prepared {
  Prepared(State& of, const Request& asked, const Time& at)
      : state(of),
        request(asked),
        time(at),
        key(asked.user, asked.session, of.key),
        session_key({}, asked.session, of.key),
        scratch(of.lanes) {
    if (!state.options.find_user) return;
    detail::GoneUsers gone;
    if (!asked.user.empty()) detail::find_elsewhere(state, scratch, asked.user, {}, gone);
    if (!asked.session.empty()) detail::find_elsewhere(state, scratch, {}, asked.session, gone);
    state.tell(gone, scratch.catalogue());
  }
  void read() {
    for (;;) {
      Ranking ranking = this->ranking();
      const bool current = ranking.read_user(request, key, session_key, time.timestamp);
      known = ranking.known;
      if (current) break;
      state.bring_up(key, scratch);
      if (!request.user.empty() && !request.session.empty()) state.bring_up(session_key, scratch);
    }
    eligibility = {.eligible = request.eligible};
    if (scratch->interacted.empty()) return;
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.set(item);
    eligibility.excluded = &scratch->excluded;
    eligibility.excluded_count = scratch->interacted.size();
  }
  void unread() noexcept {
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.reset(item);
    scratch->interacted.clear();
  }
  Ranking ranking() const noexcept { return {state, scratch.catalogue(), *scratch, known}; }
  std::size_t best() const noexcept {
    return std::max<std::size_t>(request.count, Ranking::normalising_items);
  }

  State& state;
  const Request& request;
  Time time;
  UserKey key, session_key;
  detail::ScratchLease scratch;
  bool known = false;
  Eligibility eligibility;
};

PERSONALIZE_API Recommender::Recommender(std::unique_ptr<State> state) noexcept
    : state_(std::move(state)) {}
PERSONALIZE_API Recommender::Recommender(Recommender&& other) noexcept = default;
PERSONALIZE_API Recommender& Recommender::operator=(Recommender&& other) noexcept = default;
PERSONALIZE_API Recommender::~Recommender() = default;

// What create, open and restore begin with.
struct Recommender::Beginning {
  static Result<const kernels::Table*> check(const std::shared_ptr<const Model>& model,
                                             RecommenderOptions& options);
  static Result<std::unique_ptr<State>> fresh(const std::shared_ptr<const Model>& model,
                                              RecommenderOptions options,
                                              const kernels::Table& table);
};

// The options as they are used, and the kernels.
PERSONALIZE_API Result<const kernels::Table*> Recommender::Beginning::check(
    const std::shared_ptr<const Model>& model, RecommenderOptions& options) {
  if (!model) return Error{Errc::invalid_argument, "the model is null"};
  if (auto checked = detail::check_options(options); !checked) return checked.error();
  if (!detail::has_threads && options.updates == Updates::by_thread)
    options.updates = Updates::in_requests;
  if (!options.feedback) options.exploration_weight = 0;
  return detail::find_kernels(options.instruction_set);
}

// A state that knows nothing but the model.
PERSONALIZE_API Result<std::unique_ptr<detail::State>> Recommender::Beginning::fresh(
    const std::shared_ptr<const Model>& model, RecommenderOptions options,
    const kernels::Table& table) {
  if (!options.recommendation_key) {
    options.recommendation_key = detail::random_key();
    if (!options.recommendation_key)
      return Error{Errc::io,
                   "the system gives no random bytes; set RecommenderOptions::recommendation_key"};
  }
  auto state = std::make_unique<State>(*model, std::move(options), table);
  if (auto checked = detail::check_statistics(*model, *state); !checked) return checked.error();
  const std::int64_t now = state->times.now();
  const std::shared_ptr<const Catalogue> first = detail::CatalogueBuilder::first(
      model, state->options, state->table, state->key, now, state->times.latest());
  detail::Lanes::Copies copies = state->publishing(first);
  state->publish(copies, first);
  state->next_update = now + state->options.update_interval.count();
  return state;
}

PERSONALIZE_API Result<Recommender> Recommender::create(std::shared_ptr<const Model> model,
                                                        const RecommenderOptions& options) {
  return detail::catching_bad_alloc([&]() -> Result<Recommender> {
    RecommenderOptions chosen = options;
    const auto table = Beginning::check(model, chosen);
    if (!table) return table.error();
    auto state = Beginning::fresh(model, std::move(chosen), **table);
    if (!state) return state.error();
    Recommender recommender(std::move(*state));
    if (auto started = detail::start_updater(*recommender.state_); !started) return started.error();
    return recommender;
  });
}

PERSONALIZE_API Result<Recommender> Recommender::restore(const std::string& path,
                                                         std::shared_ptr<const Model> model,
                                                         const RecommenderOptions& options) {
  return detail::catching_bad_alloc([&]() -> Result<Recommender> {
    RecommenderOptions chosen = options;
    const auto table = Beginning::check(model, chosen);
    if (!table) return table.error();
    auto restored = detail::restore_state(path, model, std::move(chosen), **table);
    if (!restored) return restored.error();
    Recommender recommender(std::move(*restored));
    if (auto started = detail::start_updater(*recommender.state_); !started) return started.error();
    return recommender;
  });
}

PERSONALIZE_API Result<Recommender> Recommender::open(const std::string& folder,
                                                      std::shared_ptr<const Model> model,
                                                      const RecommenderOptions& options) {
  return detail::catching_bad_alloc([&]() -> Result<Recommender> {
    RecommenderOptions chosen = options;
    const auto table = Beginning::check(model, chosen);
    if (!table) return table.error();
    detail::Opening opening(folder, model, std::move(chosen), **table);
    auto found = opening.read();
    if (!found) return found.error();
    std::unique_ptr<State> state = std::move(*found);
    if (!state) {
      auto made = Beginning::fresh(model, opening.options(), **table);
      if (!made) return made.error();
      state = std::move(*made);
    }
    if (auto going_on = opening.go_on(*state); !going_on) return going_on.error();
    Recommender recommender(std::move(state));
    if (auto started = detail::start_updater(*recommender.state_); !started) return started.error();
    return recommender;
  });
}

// recorded: as ids that are kept. A request for a user whom nothing can be recorded of is one for
// an unknown user.
PERSONALIZE_API Result<void> Recommender::check_ids(std::string_view user, std::string_view session,
                                                    bool recorded) {
  if (user.empty() && session.empty())
    return Error{Errc::invalid_argument, "neither a user nor a session is given"};
  for (const std::string_view id : {user, session}) {
    if (id.size() > max_id_bytes)
      return Error{Errc::invalid_argument, "a user or session id has more than 256 bytes"};
    if (recorded && !detail::valid_id(id))
      return Error{Errc::invalid_argument,
                   "a user or session id is not UTF-8, or has control characters"};
  }
  return {};
}

PERSONALIZE_API Result<void> Recommender::check_request(const Request& request) {
  if (request.count < 1 || request.count > 10'000)
    return Error{Errc::invalid_argument, "Request::count is outside [1, 10000]"};
  return check_ids(request.user, request.session, false);
}

PERSONALIZE_API Result<void> Recommender::check_mask(const Catalogue& catalogue,
                                                     const Request& request) {
  if (request.eligible && request.eligible->size() > catalogue.size())
    return Error{Errc::invalid_argument,
                 detail::joined({"Request::eligible has ", request.eligible->size(),
                                 " bits, the catalogue ", catalogue.size(), " items"})};
  return {};
}

// --------------------------------------------------------------------------------------------
// Requests

PERSONALIZE_API Result<void> Recommender::recommend(const Request& request, Slate& slate) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    if (auto checked = check_request(request); !checked) return checked;
    const auto time = state_->times.check(request.timestamp, "Request::timestamp");
    if (!time) return time.error();
    if (auto updated = detail::Updater(*state_).update_if_due(); !updated) return updated;
    Prepared prepared{*state_, request, *time};
    if (auto checked = check_mask(prepared.scratch.catalogue(), request); !checked) return checked;
    prepared.read();
    prepared.ranking().find_best(prepared.best(), prepared.eligibility);
    answer(prepared, slate);
    return durable(commit(prepared, slate), std::span(&slate, 1));
  });
}

PERSONALIZE_API Result<Slate> Recommender::recommend(const Request& request) {
  Slate slate;
  if (auto done = recommend(request, slate); !done) return done.error();
  return slate;
}

PERSONALIZE_API Result<void> Recommender::recommend(std::span<const Request> requests,
                                                    std::span<Slate> slates) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    if (slates.size() < requests.size())
      return Error{Errc::invalid_argument, "there are more requests than slates"};
    const auto catalogue = state_->lanes.current();
    for (const Request& request : requests) {
      if (auto checked = check_request(request); !checked) return checked;
      if (auto time = state_->times.check(request.timestamp, "Request::timestamp"); !time)
        return time.error();
      if (auto checked = check_mask(*catalogue, request); !checked) return checked;
    }
    if (auto updated = detail::Updater(*state_).update_if_due(); !updated) return updated;
    for (std::size_t i = 0; i < requests.size(); ++i) clear(slates[i]);
    std::uint64_t last = 0;
    for (std::size_t begin = 0; begin < requests.size(); begin += together)
      last =
          recommend_together(requests.subspan(begin, std::min(together, requests.size() - begin)),
                             slates.subspan(begin));
    return durable(last, slates.first(requests.size()));
  });
}

// All of them or, where memory runs out, none. Returns the last one's place in the journal.
PERSONALIZE_API std::uint64_t Recommender::recommend_together(std::span<const Request> requests,
                                                              std::span<Slate> slates) {
  std::array<std::optional<Prepared>, together> all;
  std::array<Scorer::Query, together> queries;
  std::size_t known = 0;
  const std::int64_t now = state_->times.now();
  for (std::size_t i = 0; i < requests.size(); ++i)
    all[i].emplace(*state_, requests[i], Time{requests[i].timestamp.value_or(now), now});
  // One generation for all: scores of several are not compared, but rows are shared.
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Prepared& prepared = *all[i];
    if (i > 0) prepared.scratch.use(all[0]->scratch.shared());
    prepared.read();
    if (&prepared.scratch.catalogue() == &all[0]->scratch.catalogue()) continue;
    // Another model came, and this user's state is already of it: all begin anew.
    all[0]->scratch.use(prepared.scratch.shared());
    for (std::size_t before = 0; before <= i; ++before) all[before]->unread();
    i = ~std::size_t{0};
  }
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Prepared& prepared = *all[i];
    Scratch& scratch = *prepared.scratch;
    // A user who asks twice draws twice.
    for (std::size_t before = 0; before < i; ++before) {
      const bool same_user = all[before]->key.text() == prepared.key.text();
      scratch.request_number += same_user && (scratch.drawn_user || scratch.drawn_session);
    }
    if (prepared.known)
      queries[known++] = {scratch.query, prepared.best() + scratch.ignored.size(),
                          prepared.eligibility, &scratch.top};
    else
      prepared.ranking().find_best(prepared.best(), prepared.eligibility);
  }
  const Catalogue& catalogue = all[0]->scratch.catalogue();
  catalogue.scorer->top_k(std::span(queries).first(known), all[0]->scratch->scoring);
  for (std::size_t i = 0; i < requests.size(); ++i) answer(*all[i], slates[i]);
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < requests.size(); ++i)
    last = std::max(last, commit(*all[i], slates[i]));
  return last;
}

// Where the journal cannot take them, slates have no ids: one that was given is known again.
PERSONALIZE_API Result<void> Recommender::durable(std::uint64_t sequence,
                                                  std::span<Slate> slates) const {
  if (state_->durable(sequence)) return {};
  for (Slate& slate : slates) slate.id.clear();
  return {};
}

PERSONALIZE_API void Recommender::clear(Slate& slate) noexcept {
  slate.items.clear();
  slate.id.clear();
  slate.propensity = 1;
}

// Makes up the slate, once scratch.top is found, and takes all memory for it.
PERSONALIZE_API void Recommender::answer(Prepared& prepared, Slate& slate) const {
  Scratch& scratch = *prepared.scratch;
  const Catalogue& catalogue = prepared.scratch.catalogue();
  Ranking ranking = prepared.ranking();
  ranking.normalise();
  ranking.collect_pool(prepared.eligibility);
  SlotPolicy& policy = scratch.policy;
  policy.configure(state_->options.exploration_weight, exploration_temperature,
                   catalogue.calibration.slope);
  const CounterRandom random{xxh64(detail::text_bytes(prepared.key.text()), state_->options.seed),
                             scratch.request_number};
  policy.choose(scratch.top, scratch.pool, scratch.pool_expected, prepared.request.count, random,
                scratch.taken, scratch.choices);
  LoggedSlate& logged = scratch.logged;
  logged.query.clear();
  logged.picks.clear();
  logged.choices.clear();
  if (state_->options.feedback) {
    const std::size_t picks = std::min(scratch.choices.size(), state_->slates.most_picks());
    if (prepared.known)
      logged.query.assign(
          scratch.query.begin(),
          scratch.query.begin() + static_cast<std::ptrdiff_t>(catalogue.dimension()));
    for (std::size_t place = 0; place < picks; ++place)
      ranking.assess(place, scratch.choices[place]);
    slate.id.reserve(32);
    if (state_->journal)
      scratch.record.reserve(1024 + picks * (sizeof(LoggedPick) + sizeof(LoggedChoice)) +
                             catalogue.dimension() * sizeof(float));
  }
  slate.items.reserve(scratch.choices.size());
}

// Fills the slate, remembers it and draws its number; takes no memory, but for the journal. Returns
// its place there.
PERSONALIZE_API std::uint64_t Recommender::commit(Prepared& prepared, Slate& slate) {
  State& state = *state_;
  Scratch& scratch = *prepared.scratch;
  const Catalogue& catalogue = prepared.scratch.catalogue();
  detail::SlateChange change;
  change.user = prepared.request.user;
  change.session = prepared.request.session;
  change.time = prepared.time;
  change.drawn_user = scratch.drawn_user;
  change.drawn_session = scratch.drawn_session;
  scratch.logged.timestamp = prepared.time.timestamp;
  std::uint64_t sequence = 0;
  if (state.options.feedback || change.drawn_user || change.drawn_session) {
    const detail::Turns::Lock turn{state.turns, prepared.key,
                                   change.drawn_session ? prepared.session_key : prepared.key};
    // Another model came meanwhile: its sums want no queries of the one before.
    if (!state.is_current_space(catalogue)) scratch.logged.query.clear();
    if (state.options.feedback) change.number = state.slates.next(prepared.key.text());
    detail::GoneUsers gone;
    detail::Changes changes{state, prepared.scratch, gone};
    sequence = state.note(detail::RecordOf::slate, scratch.record,
                          [&](detail::FieldWriter& archive) { changes.write(change, archive); });
    changes.apply(change);
  }
  clear(slate);
  slate.ids = catalogue.ids;
  const Ranking ranking = prepared.ranking();
  for (const SlotChoice& choice : scratch.choices) {
    const Reason reason = choice.explored  ? Reason::exploration
                          : prepared.known ? Reason::relevance
                                           : Reason::popular;
    slate.items.push_back({(*catalogue.ids)[choice.pick.item], ranking.shown(ranking.score(choice)),
                           reason, choice.propensity});
    slate.propensity *= static_cast<double>(choice.propensity);
  }
  if (change.number.number != 0)
    state.slates.write_id(change.number.number, prepared.key.text(), slate.id);
  return sequence;
}

// Who is asked about counts as used.
PERSONALIZE_API void Recommender::count_use(const Prepared& prepared) const {
  State& state = *state_;
  Scratch& scratch = *prepared.scratch;
  if (!scratch.drawn_user && !scratch.drawn_session) return;
  detail::Turns::Lock turn{state.turns, prepared.key,
                           scratch.drawn_session ? prepared.session_key : prepared.key};
  const std::uint64_t sequence =
      state.note(detail::RecordOf::use, scratch.record, [&](detail::FieldWriter& archive) {
        archive(scratch.drawn_user ? prepared.request.user : std::string_view{},
                scratch.drawn_session ? prepared.request.session : std::string_view{});
      });
  if (scratch.drawn_user) state.users.use(prepared.key, [](User*) {});
  if (scratch.drawn_session) state.users.use(prepared.session_key, [](User*) {});
  turn.end();
  state.hand_over(sequence);
}

PERSONALIZE_API Result<void> Recommender::rank(const Request& request,
                                               std::span<const std::string_view> items,
                                               Slate& slate) const {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    if (auto checked = check_ids(request.user, request.session, false); !checked) return checked;
    const auto time = state_->times.check(request.timestamp, "Request::timestamp");
    if (!time) return time.error();
    Prepared prepared{*state_, request, *time};
    if (auto checked = check_mask(prepared.scratch.catalogue(), request); !checked) return checked;
    prepared.read();
    const Catalogue& catalogue = prepared.scratch.catalogue();
    const Ranking ranking = prepared.ranking();
    Scratch& scratch = *prepared.scratch;
    clear(slate);
    slate.ids = nullptr;
    slate.items.reserve(items.size());
    scratch.top.clear();
    for (std::uint32_t position = 0; position < items.size(); ++position) {
      const auto item = catalogue.find(items[position]);
      float u = std::numeric_limits<float>::quiet_NaN();
      if (item && prepared.eligibility.test(*item)) u = ranking.score(*item);
      if (std::isfinite(u))
        scratch.top.push_back({position, u});
      else  // behind those that are ranked
        slate.items.push_back({items[position], 0.0f, item ? Reason::excluded : Reason::unknown});
    }
    std::sort(scratch.top.begin(), scratch.top.end(), ranks_before);
    const std::size_t last = slate.items.size();
    for (const ScoredItem& scored : scratch.top)
      slate.items.push_back({items[scored.item], ranking.shown(scored.score),
                             prepared.known ? Reason::relevance : Reason::popular});
    std::rotate(slate.items.begin(), slate.items.begin() + static_cast<std::ptrdiff_t>(last),
                slate.items.end());
    count_use(prepared);
    return {};
  });
}

PERSONALIZE_API Result<Explanation> Recommender::explain(const Request& request,
                                                         std::string_view id) const {
  return detail::catching_bad_alloc([&]() -> Result<Explanation> {
    if (auto checked = check_ids(request.user, request.session, false); !checked)
      return checked.error();
    const auto time = state_->times.check(request.timestamp, "Request::timestamp");
    if (!time) return time.error();
    Prepared prepared{*state_, request, *time};
    prepared.read();
    const Catalogue& catalogue = prepared.scratch.catalogue();
    const auto item = catalogue.find(id);
    if (!item)
      return Error{Errc::unknown_item, detail::joined({"'", id, "' is not in the catalogue"})};
    const Ranking ranking = prepared.ranking();
    Scratch& scratch = *prepared.scratch;
    const DecayMoment moment = state_->decay.at(time->timestamp);
    const ItemFeedback counted = catalogue.feedback_of(*item, moment);
    Explanation parts{};
    parts.discount = scratch.discount(*item);
    parts.score = ranking.score(*item);
    parts.quality = catalogue.quality_of(*item);
    if (prepared.known) {
      catalogue.rows.row(*item, scratch.vector);
      parts.taste = catalogue.taste(*item, scratch.query) +
                    std::inner_product(scratch.vector.begin(), scratch.vector.end(),
                                       scratch.offset.begin(), 0.0f);
    }
    parts.relevance = parts.score + parts.discount - parts.quality - parts.taste;
    parts.uncertainty = posterior(catalogue.prior_of(*item, moment), counted).deviation;
    parts.positive = counted.positive;
    parts.expected = counted.expected;
    const std::int64_t created = Catalogue::creation(catalogue.statistics[*item]);
    const std::int64_t latest = state_->times.latest();
    if (created != no_timestamp && latest != no_timestamp)
      parts.age = detail::elapsed(created, latest);
    parts.explorable =
        std::any_of(catalogue.pool.begin(), catalogue.pool.end(), [&](const detail::PoolItem& p) {
          return p.item == *item && state_->times.young(p.created);
        });
    count_use(prepared);
    return parts;
  });
}

// --------------------------------------------------------------------------------------------
// Events

PERSONALIZE_API Result<Recorded> Recommender::record(const Interaction& event) {
  return detail::catching_bad_alloc([&]() -> Result<Recorded> {
    State& state = *state_;
    if (auto checked = check_ids(event.user, event.session); !checked) return checked.error();
    if (!detail::valid_id(event.event_id) || !detail::valid_id(event.event_type))
      return Error{Errc::invalid_argument,
                   "an event id or type is not UTF-8, or has control characters"};
    if (event.impressions.size() > most_impressions)
      return Error{Errc::invalid_argument, "more than 10000 impressions are given"};
    const auto time = state.times.check(event.timestamp, "Interaction::timestamp");
    if (!time) return time.error();
    return learn(event, {event.user, event.session, event.recommendation_id, event.impressions, {}},
                 *time, false);
  });
}

PERSONALIZE_API Result<Recorded> Recommender::record_impression(const Impression& impression) {
  return detail::catching_bad_alloc([&]() -> Result<Recorded> {
    State& state = *state_;
    if (auto checked = check_ids(impression.user, impression.session); !checked)
      return checked.error();
    if (impression.items.size() > most_impressions)
      return Error{Errc::invalid_argument, "more than 10000 impressions are given"};
    if (impression.recommendation_id.empty() && impression.items.empty())
      return Error{Errc::invalid_argument,
                   "record_impression needs a recommendation id or the items shown"};
    const auto time = state.times.check(impression.timestamp, "Impression::timestamp");
    if (!time) return time.error();
    if (!state.options.feedback) return Recorded::learned;
    return learn({.user = impression.user, .session = impression.session}, impression, *time, true);
  });
}

// impression: the event says nothing beside who it is of.
PERSONALIZE_API Result<Recorded> Recommender::learn(const Interaction& event,
                                                    const Impression& shown, const Time& time,
                                                    bool impression) {
  State& state = *state_;
  if (auto updated = detail::Updater(state).update_if_due(); !updated) return updated.error();
  const bool both = !event.user.empty() && !event.session.empty();
  const UserKey key{event.user, event.session, state.key},
      session_key = both ? UserKey{{}, event.session, state.key} : key;
  detail::GoneUsers gone;
  detail::ScratchLease scratch{state.lanes};
  detail::find_elsewhere(state, scratch, event.user, event.session, gone);
  detail::Changes changes{state, scratch, gone};
  detail::EventChange change;
  change.user = event.user;
  change.session = event.session;
  change.time = time;
  change.event_hash = detail::EventIds::hash_of(event.event_id, key, state.key);
  change.listed = !shown.items.empty();
  if (state.options.feedback) {
    change.learns = true;
    change.positive = !impression && state.is_positive(event.event_type);
    auto number = state.slates.number_of(shown.recommendation_id, key.text());
    // A visitor's slate, answered after signing in.
    if (!number && both) {
      number = state.slates.number_of(shown.recommendation_id, session_key.text());
      change.of_session = number.has_value();
    }
    change.slate = number.value_or(0);
  }
  changes.list(change.learns ? shown.items : std::span<const std::string_view>{});
  const detail::Unlisting unlisting{changes};
  // A list without a slate takes a pass over the catalogue, better not in the user's turn.
  if (change.learns && change.listed && change.slate == 0) changes.assess_list(change, key);

  Recorded recorded = Recorded::learned;
  std::uint64_t sequence = 0;
  {
    detail::Turns::Lock turn{state.turns, key, session_key};
    detail::EventIds::Claim claim{state.event_ids, change.event_hash};
    if (claim.is_known()) {
      turn.end();
      if (auto kept = state.durable(); !kept) return kept.error();
      return Recorded::duplicate;
    }
    if (both && !impression) changes.merge(event.session, event.user);
    state.make_current(key, scratch);
    if (both && impression) state.make_current(session_key, scratch);
    const Catalogue& catalogue = scratch.catalogue();
    if (const auto item = impression ? std::nullopt : catalogue.find(event.item)) {
      change.item = *item;
      change.event_type =
          catalogue.base->parts().event_types.find(event.event_type).value_or(no_event_type);
    }
    change.shared_time = state.times.shared(time);
    recorded = changes.see(change, key, false);
    if (change.learns && change.slate == 0 && !shown.recommendation_id.empty())
      recorded = Recorded::unknown_slate;
    const bool known = change.item != detail::EventChange::no_item;
    // Where what follows fails.
    const detail::Settle settle{state.users, key, scratch->grown, gone};
    if (known || !scratch->seen.empty()) changes.prepare(change, key);
    const auto note = [&] {
      sequence = state.note(detail::RecordOf::event, scratch->record,
                            [&](detail::FieldWriter& archive) { changes.write(change, archive); });
    };
    bool pending = false;
    if (!known && !impression && state.put_items.any_waiting()) {
      change.waits_for = event.item;
      change.waiting_type = event.event_type;
      pending = state.put_items.remember(event.item,
                                         {std::string(event.user), std::string(event.session),
                                          std::string(event.event_type), time.timestamp},
                                         note);
      if (!pending) change.waits_for = change.waiting_type = {};
    }
    if (!pending && (known || !scratch->seen.empty() || change.slate != 0)) note();
    if (known || pending || !scratch->seen.empty()) claim.keep();
    changes.apply(change, key);
    if (pending)
      recorded = Recorded::pending_item;
    else if (!known && !impression)
      recorded = Recorded::unknown_item;
  }
  state.tell(gone, scratch.catalogue());
  if (state.options.log && change.by_slate)
    write_log(scratch.catalogue(), shown, *scratch, time.timestamp);
  if (auto kept = state.durable(sequence); !kept) return kept.error();
  return recorded;
}

PERSONALIZE_API void Recommender::write_log(const Catalogue& catalogue, const Impression& shown,
                                            const Scratch& scratch, std::int64_t timestamp) const {
  for (const bool positive : {false, true})
    for (const detail::SeenPick& seen : scratch.seen) {
      if (!(positive ? seen.pick.positive : !seen.pick.seen)) continue;
      state_->options.log({timestamp, shown.user.empty() ? shown.session : shown.user,
                           shown.recommendation_id, (*catalogue.ids)[seen.pick.item],
                           seen.place + 1, positive, seen.logged.choice, seen.pick.value,
                           seen.logged.best_value});
    }
}

PERSONALIZE_API Result<bool> Recommender::merge_session(std::string_view session,
                                                        std::string_view user) {
  if (session.empty() || user.empty())
    return Error{Errc::invalid_argument, "merge_session needs a session and a user"};
  if (auto checked = check_ids(user, session); !checked) return checked.error();
  return detail::catching_bad_alloc([&]() -> Result<bool> {
    State& state = *state_;
    const UserKey visitor{{}, session, state.key}, key{user, {}, state.key};
    detail::GoneUsers gone;
    detail::ScratchLease scratch{state.lanes};
    detail::find_elsewhere(state, scratch, user, {}, gone);
    detail::find_elsewhere(state, scratch, {}, session, gone);
    std::optional<std::uint64_t> merged;
    {
      const detail::Turns::Lock turn{state.turns, visitor, key};
      scratch.use_current();
      merged = detail::Changes{state, scratch, gone}.merge(session, user);
    }
    state.tell(gone, scratch.catalogue());
    auto kept = merged ? state.durable(*merged) : state.durable();
    if (!kept) return kept.error();
    return merged.has_value();
  });
}

PERSONALIZE_API bool Recommender::forget(std::string_view user, std::string_view session) {
  if (!check_ids(user, session)) return false;
  State& state = *state_;
  const UserKey key{user, session, state.key};
  const auto forgot = detail::catching_bad_alloc([&]() -> Result<bool> {
    Vector<std::byte> record;
    std::uint64_t sequence = 0;
    bool there = false;
    {
      const detail::Turns::Lock turn{state.turns, key};
      sequence = state.note(detail::RecordOf::forget, record,
                            [&](detail::FieldWriter& archive) { archive(user, session); });
      there = detail::forget(state, user, key);
    }
    if (auto kept = state.durable(sequence); !kept) return kept.error();
    return there;
  });
  return forgot && *forgot;
}

// --------------------------------------------------------------------------------------------
// Items and updates

PERSONALIZE_API Result<void> Recommender::put_item(const NewItem& item) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    State& state = *state_;
    if (!detail::is_id(item.item))
      return Error{Errc::invalid_argument,
                   "an item id has 1 to 256 bytes of UTF-8 without control characters"};
    const auto time = state.times.check(item.creation_timestamp, "NewItem::creation_timestamp");
    if (!time) return time.error();
    const auto catalogue = state.lanes.current();
    if (auto checked = detail::check_fields(item, *catalogue->base); !checked) return checked;
    // Of an item that nobody knows yet; one that is there keeps its own.
    std::optional<std::int64_t> created;
    if (!catalogue->is_of_model(item.item)) created = time->now;
    std::uint64_t sequence = 0;
    Vector<std::byte> record;
    const auto note = [&] {
      sequence = state.note(detail::RecordOf::put, record, [&](detail::FieldWriter& archive) {
        detail::write_put(item, created, archive);
      });
    };
    if (auto put = state.put_items.put(item, created, *catalogue->base, note); !put) return put;
    state.wake_updater();
    return state.durable(sequence);
  });
}

PERSONALIZE_API Result<bool> Recommender::remove_item(std::string_view id) {
  return detail::catching_bad_alloc([&]() -> Result<bool> {
    State& state = *state_;
    const bool there = state.lanes.current()->find(id).has_value();
    std::uint64_t sequence = 0;
    Vector<std::byte> record;
    const auto note = [&] {
      sequence = state.note(detail::RecordOf::remove, record,
                            [&](detail::FieldWriter& archive) { archive(id, there); });
    };
    const auto removed = state.put_items.remove(id, there, note);
    if (!removed) return removed;
    if (*removed) state.wake_updater();
    auto kept = *removed ? state.durable(sequence) : state.durable();
    if (!kept) return kept.error();
    return removed;
  });
}

PERSONALIZE_API Result<void> Recommender::update(std::optional<std::int64_t> now) {
  const auto time = state_->times.check(now, "update: now");
  if (!time) return time.error();
  const auto lock = state_->in_turn();
  state_->next_update.store(time->now + state_->options.update_interval.count());
  detail::Pace pace;
  detail::Updater updater(*state_);
  auto updated = updater.run(time->timestamp, true, pace);
  updater.encode_some(detail::Updater::users_a_time, pace);
  if (state_->keeper) state_->keeper->save_if_due(*state_);
  return updated;
}

PERSONALIZE_API Result<SwapReport> Recommender::swap(std::shared_ptr<const Model> model) {
  return detail::catching_bad_alloc([&]() -> Result<SwapReport> {
    if (!model) return Error{Errc::invalid_argument, "the model is null"};
    if (auto checked = detail::check_statistics(*model, *state_); !checked) return checked.error();
    const auto lock = state_->in_turn();
    auto swapped = detail::Updater(*state_).swap(model);
    // What the journal holds from here on is of this model: a state of it is to be there.
    if (swapped && state_->keeper)
      if (auto saved = state_->keeper->save(*state_); !saved) swapped->save_error = saved.error();
    return swapped;
  });
}

PERSONALIZE_API const char* Recommender::instruction_set() const noexcept {
  return state_->table.name;
}
PERSONALIZE_API std::uint64_t Recommender::restarted_states() const noexcept {
  return state_->restarted.load();
}

PERSONALIZE_API bool Recommender::update_due() const { return detail::Updater(*state_).due(); }

PERSONALIZE_API UpdateReport Recommender::update_report() const {
  const detail::lock_guard lock{state_->report_mutex};
  return state_->report;
}

// --------------------------------------------------------------------------------------------
// What outlives the process

PERSONALIZE_API Result<SaveReport> Recommender::save() {
  return detail::catching_bad_alloc([&]() -> Result<SaveReport> {
    State& state = *state_;
    if (!state.keeper)
      return Error{Errc::invalid_argument,
                   "save: there is no folder; use save(path), or Recommender::open"};
    const auto lock = state.in_turn();
    return state.keeper->save(state);
  });
}

PERSONALIZE_API Result<SaveReport> Recommender::save(const std::string& path) const {
  return detail::catching_bad_alloc([&]() -> Result<SaveReport> {
    State& state = *state_;
    const auto lock = state.in_turn();
    return detail::save_state(state, path, 0, 0, []() noexcept {});
  });
}

PERSONALIZE_API PersistenceStatus Recommender::persistence() const {
  const State& state = *state_;
  PersistenceStatus status;
  if (!state.keeper) return status;
  const detail::JournalStatus journal = state.journal->status();
  status.durable = !journal.error;
  status.journal_bytes = journal.file_bytes;
  status.pending_bytes = journal.pending_bytes;
  status.saves = state.saves.load();
  status.error = journal.error;
  const detail::lock_guard lock{state.report_mutex};
  if (!status.error) status.error = state.save_error;
  return status;
}

PERSONALIZE_API const RecoveryReport& Recommender::recovery() const noexcept {
  return state_->recovery;
}

PERSONALIZE_API Result<std::vector<std::byte>> Recommender::export_user(
    std::string_view user, std::string_view session) const {
  if (auto checked = check_ids(user, session); !checked) return checked.error();
  return detail::catching_bad_alloc([&]() -> Result<std::vector<std::byte>> {
    const UserKey key{user, session, state_->key};
    const auto catalogue = state_->lanes.current();
    const auto blob = detail::export_blob(*state_, *catalogue, key);
    if (!blob) return blob.error();
    return std::vector<std::byte>(blob->begin(), blob->end());
  });
}

PERSONALIZE_API Result<ImportReport> Recommender::import_user(std::span<const std::byte> bytes) {
  return detail::catching_bad_alloc([&]() -> Result<ImportReport> {
    const auto blob = detail::Blob::read(bytes);
    if (!blob) return blob.error();
    detail::GoneUsers gone;
    detail::ScratchLease scratch{state_->lanes};
    std::uint64_t sequence = 0;
    auto report = detail::import_blob(*state_, scratch, *blob, bytes, gone, false, sequence);
    state_->tell(gone, scratch.catalogue());
    if (auto kept = state_->durable(sequence); !kept) return kept.error();
    return report;
  });
}

// --------------------------------------------------------------------------------------------
// What is there

PERSONALIZE_API std::size_t Recommender::user_count() const { return state_->users.count(); }
PERSONALIZE_API std::size_t Recommender::item_count() const {
  return state_->lanes.current()->size();
}
PERSONALIZE_API std::optional<std::uint32_t> Recommender::find_item(std::string_view item) const {
  return state_->lanes.current()->number_of(item);
}

PERSONALIZE_API MemoryUse Recommender::memory() const {
  const State& state = *state_;
  MemoryUse use;
  use.users = state.users.bytes();
  use.event_ids = state.event_ids.bytes();
  use.slates = state.slates.bytes();
  const auto catalogue = state.lanes.current();
  use.contexts = catalogue->contexts->bytes();
  use.pending = state.put_items.bytes();
  use.catalogue = catalogue->bytes();
  use.scratch = state.lanes.idle_bytes();
  return use;
}

PERSONALIZE_API std::shared_ptr<const Model> Recommender::model() const {
  State& state = *state_;
  const State::Hurry hurry(state);
  if (state.updater.joinable()) {
    const std::uint64_t wanted = state.put_items.version();
    detail::unique_lock lock{state.wake_mutex};
    state.taken_in.wait_for(lock, std::chrono::seconds{10},
                            [&] { return state.taken_version >= wanted; });
  }
  const detail::lock_guard lock{state.update_mutex};
  if (!state.catalogue->changed_base) return state.catalogue->base;
  if (!state.whole_model) {
    auto whole = detail::catching_bad_alloc(
        [&]() -> Result<std::shared_ptr<const Model>> { return state.catalogue->whole_model(); });
    if (!whole) return nullptr;
    state.whole_model = *whole;
  }
  return state.whole_model;
}

#endif  // PERSONALIZE_HAS_BODIES

}  // namespace PERSONALIZE_NAMESPACE
}  // namespace v1
}  // namespace personalize

#if defined(__i386__) && !defined(__SSE2_MATH__)
#pragma GCC pop_options
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // PERSONALIZE_RUNTIME_HPP
