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
// slates. Needs GCC or Clang with C++20, a little-endian 64-bit target, xsimd (>= 8.1) and zstd
// (>= 1.5.4).
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
// Contents (each room uses only earlier rooms; its banner says which)
//   0 preamble          version, macros, what a compiler must offer
//   1 errors            Errc, Error, Result<T>
//   2 basics            bytes and files, text and numbers, hashes, random numbers, tables of
//   strings 3 instruction sets  integer products, scores and sums of each, scalar first 4 kernels
//   row scoring, matrix-vector products, gates, norms; dispatch 5 container         checked,
//   compressed sections of a file 6 model             item vectors, statistics, metadata, encoder
//   operations: plain data, checks 7 model file        reading and writing; Model 8 encoder one
//   event in, new user state out 9 filters           which items may be ranked
//  10 scorer            exact top-k over the eligible items
//  11 feedback          decayed counters, recent impressions, the slates behind recommendation ids
//  12 exploration       calibration, posterior, vector correction, slots with propensities
//  13 catalogue         the items as feedback has shaped them, and how the next generation is built
//  14 users             users and sessions within a budget in bytes
//  15 state             (reserved for what outlives the process: save, restore, journal)
//  16 recommender       record, recommend, rank, put_item, update
#ifndef PERSONALIZE_RUNTIME_HPP
#define PERSONALIZE_RUNTIME_HPP

// ============================================================================================
// Room 0: preamble. Owns the version, every macro, and what a compiler must offer.
// ============================================================================================

#define PERSONALIZE_VERSION_MAJOR 0
#define PERSONALIZE_VERSION_MINOR 1
#define PERSONALIZE_VERSION_PATCH 0

// Set by the user, before the include or on the command line, alike in all of a program:
//   PERSONALIZE_NO_XSIMD  build with the scalar kernels only; xsimd is not included
//   PERSONALIZE_NO_ZSTD   read and write stored (uncompressed) sections only; zstd is not included
//   PERSONALIZE_DISPATCH  the kernels are chosen when the program runs, from those that the library
//                         personalize::kernels holds; that CMake target defines it
//
// Found out here:
//   PERSONALIZE_HAS_EXCEPTIONS  0 under -fno-exceptions: then memory that cannot be had ends the
//                               program, as the standard library's containers do; 1: it is an Error
//   PERSONALIZE_HAS_POSIX       1 where files have descriptors, modes and links, and /dev/urandom
//   is PERSONALIZE_AVX512_VNNI     1 where the flags allow the AVX-512 kernels PERSONALIZE_INLINE,
//   PERSONALIZE_UNROLL  hints to the compiler

#if defined(_MSC_VER) && !defined(__clang__)
#error "personalize_runtime.hpp needs GCC or Clang; with Visual Studio, its clang-cl toolset does."
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "personalize_runtime.hpp needs a little-endian target: model files are read as they lie."
#endif
#if __SIZEOF_POINTER__ < 8
#error "personalize_runtime.hpp needs a 64-bit target: models may be larger than 4 GiB."
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

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define PERSONALIZE_HAS_POSIX 1
#else
#include <random>
#if defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall MoveFileExA(const char*, const char*, unsigned long);
#endif
#define PERSONALIZE_HAS_POSIX 0
#endif

// GCC 12 takes the deliberately undefined operands in its own AVX-512 intrinsics for mistakes (GCC
// bug 105593) when they are inlined into code with -Wmaybe-uninitialized.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#ifndef PERSONALIZE_NO_XSIMD
#include <xsimd/xsimd.hpp>
#endif
#ifndef PERSONALIZE_NO_ZSTD
#include <zstd.h>
#endif

#if !defined(PERSONALIZE_NO_XSIMD) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#if XSIMD_WITH_AVX512BW
#define PERSONALIZE_AVX512_VNNI 1
#endif
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

namespace personalize {
inline namespace v1 {

static_assert(std::numeric_limits<float>::is_iec559 && sizeof(float) == 4);

// ============================================================================================
// Room 1: errors. Owns Errc, Error and Result. Uses nothing.
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
  std::optional<std::uint64_t> offset = std::nullopt;
};

// A value or an Error. Never throws; reading the wrong side is a programming error (asserted). Of a
// Result that is about to go, * gives the value itself, so that a loop over `(*call()).items` has
// something to go over; what -> gives lives no longer than the Result.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  explicit operator bool() const noexcept { return state_.index() == 0; }
  bool has_value() const noexcept { return state_.index() == 0; }
  T& operator*() & noexcept { return *pointer(); }
  const T& operator*() const& noexcept { return *pointer(); }
  T operator*() && { return std::move(*pointer()); }
  T* operator->() noexcept { return pointer(); }
  const T* operator->() const noexcept { return pointer(); }
  const Error& error() const noexcept {
    assert(!has_value());
    return *std::get_if<1>(&state_);
  }

 private:
  T* pointer() noexcept {
    assert(has_value());
    return std::get_if<0>(&state_);
  }
  const T* pointer() const noexcept {
    assert(has_value());
    return std::get_if<0>(&state_);
  }
  std::variant<T, Error> state_;
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

}  // namespace detail

// ============================================================================================
// Room 2: basics. Owns what knows nothing of recommendations: bytes and files, text and numbers,
// hashes, random numbers, aligned memory, tables of distinct strings. Uses room 1.
// ============================================================================================

// "major.minor.patch"
inline constexpr std::string_view version = PERSONALIZE_DOTTED(
    PERSONALIZE_VERSION_MAJOR, PERSONALIZE_VERSION_MINOR, PERSONALIZE_VERSION_PATCH);

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

template <class T>
T load_integer(const std::byte* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
void append_integer(std::vector<std::byte>& out, T value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}

inline std::optional<std::uint64_t> checked_product(std::uint64_t a, std::uint64_t b) noexcept {
  if (b != 0 && a > std::numeric_limits<std::uint64_t>::max() / b) return std::nullopt;
  return a * b;
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

// From a line of the cache on: a load that straddles two lines costs twice as much, and a row that
// does comes from memory as two. What is large begins at a huge page and asks Linux for such pages:
// a row anywhere in 64 MB would wait for its page's address first.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::size_t large = std::size_t{1} << 22;  // bytes
  static constexpr std::align_val_t line{64}, huge_page{std::size_t{1} << 21};

  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) noexcept {}
  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    void* const p = ::operator new(bytes, alignment(bytes));
#if defined(MADV_HUGEPAGE)
    if (bytes >= large) (void)::madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, std::size_t count) noexcept {
    ::operator delete(p, alignment(count * sizeof(T)));
  }
  static constexpr std::align_val_t alignment(std::size_t bytes) noexcept {
    return bytes >= large ? huge_page : line;
  }
  friend bool operator==(const LineAllocator&, const LineAllocator&) noexcept { return true; }
};
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

// The same, of which resize() leaves what it adds as it is: memory that nothing was written to
// takes no pages, and costs nothing to take.
template <class T>
struct BareAllocator : LineAllocator<T> {
  BareAllocator() = default;
  template <class Other>
  BareAllocator(const BareAllocator<Other>&) noexcept {}
  template <class U>
  void construct(U* p) noexcept {
    static_assert(std::is_trivially_default_constructible_v<U>);
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class V>
  void construct(U* p, V&& value) noexcept {
    ::new (static_cast<void*>(p)) U(std::forward<V>(value));
  }
  template <class U>
  struct rebind {
    using other = BareAllocator<U>;
  };
};
template <class T>
using BareVector = std::vector<T, BareAllocator<T>>;

// The largest magnitude; infinite where a value is not finite. Without an exit inside the loop:
// compilers make vectors of it.
inline float largest(std::span<const float> values) noexcept {
  std::uint32_t most = 0;
  for (const float v : values) most = std::max(most, std::bit_cast<std::uint32_t>(v) & 0x7fffffff);
  return std::bit_cast<float>(std::min(most, 0x7f800000u));
}

inline bool all_finite(std::span<const float> values) noexcept {
  return largest(values) < std::numeric_limits<float>::infinity();
}

}  // namespace detail

namespace detail {

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

}  // namespace detail

inline constexpr std::size_t max_id_bytes = 256;

// Distinct strings, numbered in the order they were added. Lookup O(1); one allocation for the
// text.
class StringTable {
 public:
  // The index of the new string. Errors: empty, over 256 bytes, not UTF-8 or with a control
  // character (invalid_argument); already there, or made to fall together with others (corrupt);
  // out of memory. The table is then as it was.
  Result<std::uint32_t> add(std::string_view text) {
    return detail::catching_bad_alloc([&]() -> Result<std::uint32_t> {
      if (auto checked = check_text(text); !checked) return checked.error();
      if ((size() + 1) * 4 > slots_.size() * 3)
        if (auto grown = rehash(size(), std::max<std::size_t>(16, slots_.size() * 2)); !grown)
          return grown.error();
      const std::uint64_t hash = hash_of(text);
      const std::size_t slot = find_slot(text, hash);
      if (auto checked = check_free(text, slot); !checked) return checked.error();
      text_.resize(empty() ? begin_ : ends_.back());
      text_.insert(text_.end(), text.begin(), text.end());
      ends_.push_back(text_.size());
      slots_[slot] = entry(hash, size());
      return static_cast<std::uint32_t>(size() - 1);
    });
  }

  std::optional<std::uint32_t> find(std::string_view text) const noexcept {
    if (slots_.empty()) return std::nullopt;
    const std::size_t slot = find_slot(text, hash_of(text));
    if (slot == npos || slots_[slot] == 0) return std::nullopt;
    return number_in(slots_[slot]);
  }

  // Valid until the next add.
  std::string_view operator[](std::size_t index) const noexcept {
    const std::uint64_t begin = index == 0 ? begin_ : ends_[index - 1];
    return {text_.data() + begin, ends_[index] - begin};
  }

  std::size_t size() const noexcept { return ends_.size(); }
  bool empty() const noexcept { return ends_.empty(); }

  // For a reader of files, on an empty table: room for `count` strings of `bytes` bytes together,
  // which takes pages only as it is written. Their u16 lengths go to [0], their text to [1], which
  // lies directly behind; then number() makes a table of them.
  std::array<std::span<std::byte>, 2> make_room(std::size_t count, std::size_t bytes) {
    begin_ = count * sizeof(std::uint16_t);
    ends_.resize(count);
    text_.resize(begin_ + bytes);
    const auto raw = std::as_writable_bytes(std::span(text_));
    return {raw.first(begin_), raw.subspan(begin_)};
  }

  // How far number() has come.
  struct Numbering {
    std::size_t strings = 0;
  };

  // Numbers the strings that lie in the first `arrived` bytes of what make_room() gave, from where
  // the last call stopped: so a file is refused at its first bad string, for memory in proportion
  // to the good ones. Errors (corrupt): lengths that do not add up to the text; a string that add()
  // would refuse. The table can then only be destroyed.
  Result<void> number(Numbering& numbering, std::uint64_t arrived) {
    return detail::catching_bad_alloc([&] { return number_strings(numbering, arrived); });
  }
  Result<void> number() {
    Numbering all;
    return number(all, text_.size());
  }

 private:
  static constexpr std::size_t npos = std::numeric_limits<std::size_t>::max();
  // At three quarters' load no honest table comes near this; a file made to collide stops here.
  static constexpr std::size_t max_probes = 512;

  std::uint64_t length_of(std::size_t index) const noexcept {
    std::uint16_t length;
    std::memcpy(&length, text_.data() + index * sizeof length, sizeof length);
    return length;
  }

  Result<void> number_strings(Numbering& numbering, std::uint64_t arrived) {
    if (arrived < begin_) return {};
    std::size_t& next = numbering.strings;
    // A batch of slots comes out of memory while the next strings are hashed.
    constexpr std::size_t batch = 32;
    std::array<std::uint64_t, batch> hashes;
    for (std::size_t begin = next; begin < size(); begin = next) {
      if (auto grown = make_slots(begin, std::min(begin + batch, size())); !grown) return grown;
      std::uint64_t end = begin == 0 ? begin_ : ends_[begin - 1];
      std::size_t count = 0;
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
                       "string " + std::to_string(next) + ": " + checked.error().message};
        slots_[slot] = entry(hashes[i], next + 1);
      }
      if (count == 0) break;
    }
    const std::uint64_t end = next == 0 ? begin_ : ends_[next - 1];
    if (arrived == text_.size() && (next != size() || end != arrived))
      return Error{Errc::corrupt, "the strings' lengths do not add up to their text"};
    return {};
  }

  // Room for `wanted` strings, of which the first `numbered` have their slots. Grows in large
  // steps, at most to what all strings of a file need.
  Result<void> make_slots(std::size_t numbered, std::size_t wanted) {
    if (wanted * 4 <= slots_.size() * 3) return {};
    std::size_t most = 16;
    while (size() * 4 > most * 3) most *= 2;
    return rehash(numbered, std::min(most, std::max<std::size_t>(1 << 14, 8 * slots_.size())));
  }

  static std::uint64_t hash_of(std::string_view text) noexcept {
    return xxh64(std::as_bytes(std::span(text)));
  }
  // Half of the hash, so that other strings are seldom looked at, and the number + 1.
  static std::uint64_t entry(std::uint64_t hash, std::size_t number) noexcept {
    return (hash >> 32) << 32 | number;
  }
  static std::uint32_t number_in(std::uint64_t entry) noexcept {
    return static_cast<std::uint32_t>(entry) - 1;
  }

  static Result<void> check_text(std::string_view text) {
    if (text.empty() || text.size() > max_id_bytes)
      return Error{Errc::invalid_argument,
                   "an id has 1 to 256 bytes, this one has " + std::to_string(text.size())};
    if (!detail::valid_id(text))
      return Error{Errc::invalid_argument,
                   "an id is UTF-8 without control characters, this one is not"};
    return {};
  }

  Result<void> check_free(std::string_view text, std::size_t slot) const {
    if (slot == npos)
      return Error{Errc::corrupt, "too many ids fall together; they look made to collide"};
    if (slots_[slot] != 0) return Error{Errc::corrupt, "'" + std::string(text) + "' stands twice"};
    return {};
  }

  PERSONALIZE_INLINE void prefetch(std::uint64_t hash) const noexcept {
    __builtin_prefetch(slots_.data() + (static_cast<std::size_t>(hash) & (slots_.size() - 1)), 1);
  }

  std::size_t find_slot(std::string_view text, std::uint64_t hash) const noexcept {
    const std::size_t mask = slots_.size() - 1;
    std::size_t slot = static_cast<std::size_t>(hash) & mask;
    for (std::size_t probe = 0; probe < max_probes; ++probe, slot = (slot + 1) & mask) {
      const std::uint64_t there = slots_[slot];
      if (there == 0 || (there >> 32 == hash >> 32 && (*this)[number_in(there)] == text))
        return slot;
    }
    return npos;
  }

  // For the first `count` strings. Where they do not fit, the slots are as they were.
  Result<void> rehash(std::size_t count, std::size_t slots) {
    std::vector<std::uint64_t> old(slots);
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

  std::uint64_t begin_ = 0;  // of the first string in text_; a file's lengths lie before it
  detail::BareVector<char> text_;
  detail::BareVector<std::uint64_t> ends_;
  std::vector<std::uint64_t> slots_;  // 0 where free; a power of two
};

namespace detail {

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

inline Error io_error(const std::string& path, const char* what) {
  return {Errc::io, path + ": " + what + ": " + std::strerror(errno)};
}

inline bool seek(std::FILE* file, std::uint64_t offset, int from) noexcept {
#if defined(_WIN32)
  return ::_fseeki64(file, static_cast<std::int64_t>(offset), from) == 0;
#else
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
    source.file_.reset(std::fopen(path.c_str(), "rb"));
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
  std::vector<std::byte> bytes;
};

// A file that replaces `path` at once or not at all: written beside it under a name of its own,
// synced, renamed; of several writers the last wins whole. A link is followed, and what it names
// replaced. What is there and no regular file (a device, a pipe) is written to, at commit().
class FileSink final : public ByteSink {
 public:
  explicit FileSink(const std::string& path) : path_(path) {
#if PERSONALIZE_HAS_POSIX
    struct stat there {};
    const bool exists = ::stat(path_.c_str(), &there) == 0;
    direct_ = (exists && !S_ISREG(there.st_mode) && !S_ISDIR(there.st_mode)) || !follow_links();
    if (error_ || direct_) return;
    create(exists ? there.st_mode & 0777u : 0666u);
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
    std::remove(part_.c_str());
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
#endif
    written = std::fclose(file_.release()) == 0 && written;
    if (written && replace()) return {};
    const Error error = io_error(path_, "cannot write");
    std::remove(part_.c_str());
    return error;
  }

 private:
  void move_to(std::uint64_t offset, int from) {
    if (!error_ && !seek(file_.get(), offset, from)) error_ = io_error(path_, "cannot write");
  }

  std::string folder() const {
    const std::size_t slash = path_.find_last_of('/');
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
      part_ = start + "." + digits.data() + ".part";
#if PERSONALIZE_HAS_POSIX
      const int descriptor =
          ::open(part_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                 static_cast<mode_t>(mode));
      if (descriptor >= 0) {
        file_.reset(::fdopen(descriptor, "wb"));
        if (file_) return;
        ::close(descriptor);
        std::remove(part_.c_str());
        break;
      }
#else
      file_.reset(std::fopen(part_.c_str(), "wbx"));
      if (file_) return;
#endif
      if (errno != EEXIST) break;
    }
    error_ = io_error(part_, "cannot create");
  }

  bool replace() {
#if defined(_WIN32)
    return ::MoveFileExA(part_.c_str(), path_.c_str(), 1 | 8) != 0;  // replace, write through
#else
    if (std::rename(part_.c_str(), path_.c_str()) != 0) return false;
#if PERSONALIZE_HAS_POSIX
    // So that the new name outlives a power cut. The file is whole with or without.
    const int descriptor = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor >= 0) {
      (void)::fsync(descriptor);
      ::close(descriptor);
    }
#endif
    return true;
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
      path_ = name.starts_with('/') ? std::string(name) : folder() + std::string(name);
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
inline Result<std::vector<std::byte>> read_file(const std::string& path, std::uint64_t limit) {
  return detail::catching_bad_alloc([&]() -> Result<std::vector<std::byte>> {
    const detail::File file{std::fopen(path.c_str(), "rb")};
    if (!file) return detail::io_error(path, "cannot open");
    std::vector<std::byte> bytes;
    constexpr std::size_t piece = std::size_t{1} << 20;
    for (;;) {
      const std::size_t have = bytes.size();
      if (bytes.capacity() < have + piece) bytes.reserve(2 * have + piece);
      bytes.resize(have + piece);
      const std::size_t got = std::fread(bytes.data() + have, 1, piece, file.get());
      bytes.resize(have + got);
      if (bytes.size() > limit)
        return Error{Errc::limit, path + ": larger than " + std::to_string(limit) + " bytes"};
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

// An array whose copies share their pages: a copy costs O(pages), a changed element one page.
// Copies may be read by any number of threads; one that is being changed belongs to one thread. The
// pages of an array made over a `base` lie in it.
template <class T>
class PagedArray {
 public:
  static constexpr std::size_t page_size = 1024;  // elements

  PagedArray() = default;
  // base: kept alive by owner.
  PagedArray(const std::shared_ptr<const void>& owner, std::span<const T> base) {
    size_ = base.size();
    pages_.reserve(page_count(size_));
    for (std::size_t begin = 0; begin < size_; begin += page_size)
      pages_.push_back(std::shared_ptr<const T[]>(owner, base.data() + begin));
    owned_.resize(pages_.size());
  }
  PagedArray(const PagedArray& other) : size_(other.size_), pages_(other.pages_) {
    owned_.resize(pages_.size());
  }
  PagedArray(PagedArray&&) noexcept = default;
  PagedArray& operator=(PagedArray other) noexcept {
    size_ = other.size_;
    pages_.swap(other.pages_);
    owned_.swap(other.owned_);
    return *this;
  }

  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  const T& operator[](std::size_t i) const noexcept { return pages_[i / page_size][i % page_size]; }
  // The elements of page p that there are.
  std::span<const T> page(std::size_t p) const noexcept {
    return {pages_[p].get(), std::min(page_size, size_ - p * page_size)};
  }
  std::size_t pages() const noexcept { return pages_.size(); }

  // To change element i: copies its page where that is shared. References stay valid until the
  // array is copied.
  T& edit(std::size_t i) { return own(i / page_size)[i % page_size]; }

  void push_back(const T& value) {
    if (size_ % page_size == 0) {
      pages_.reserve(pages_.size() + 1);
      owned_.reserve(pages_.size() + 1);
      pages_.push_back(std::shared_ptr<const T[]>(new T[page_size]()));
      owned_.push_back(true);
    }
    ++size_;
    edit(size_ - 1) = value;
  }

  // Bytes of the pages that this array made; those of its base and of earlier copies are not in it.
  std::size_t owned_bytes() const noexcept {
    return static_cast<std::size_t>(std::count(owned_.begin(), owned_.end(), true)) * page_size *
           sizeof(T);
  }

 private:
  static std::size_t page_count(std::size_t size) noexcept {
    return (size + page_size - 1) / page_size;
  }
  T* own(std::size_t p) {
    assert(!owned_[p] || pages_[p].use_count() == 1);
    if (!owned_[p]) {
      std::shared_ptr<T[]> copy(new T[page_size]());
      const auto from = page(p);
      std::copy(from.begin(), from.end(), copy.get());
      pages_[p] = std::move(copy);
      owned_[p] = true;
    }
    return const_cast<T*>(pages_[p].get());  // made by this array, and not const
  }

  std::size_t size_ = 0;
  std::vector<std::shared_ptr<const T[]>> pages_;
  std::vector<bool> owned_;  // pages that no other array has seen
};

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

namespace kernels {

inline constexpr std::size_t lanes = 16;
inline constexpr std::size_t panel_rows = 16;
inline constexpr std::size_t nowhere = ~std::size_t{0};

constexpr std::size_t padded(std::size_t n) noexcept { return (n + lanes - 1) / lanes * lanes; }
// A panel is a sequence of steps of 64 bytes: four columns of 8 bits or eight columns of 4 bits.
inline constexpr std::size_t step_bytes = panel_rows * 4;
template <int Bits>
constexpr std::size_t steps(std::size_t columns) noexcept {
  return Bits == 8 ? (columns + 3) / 4 : (columns + 7) / 8;
}
template <int Bits>
constexpr std::size_t panel_bytes(std::size_t columns) noexcept {
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
#endif  // PERSONALIZE_NO_XSIMD

}  // namespace kernels

// ============================================================================================
// Room 4: kernels. Owns the arithmetic on rows and vectors, made of an instruction set's
// operations, and which instruction set a program uses. Uses room 3.
//
// Vectors are padded to a multiple of `lanes` floats. A kernel may read the padding, and may read
// up to `lanes` elements past a row of a matrix: Matrix (room 6) keeps that slack.
// ============================================================================================

namespace kernels {

// Halves [low, high] for Vectors::kth_largest. count_at_least(limit): how many values reach it; k
// reach low. The tag keeps each instruction set's copy apart.
template <class Tag, class Count>
float halve(std::size_t k, float low, float high, Count count_at_least) noexcept {
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
// A NaN stays one. Arithmetic: Value, fma, and limited(v, m) for min(max(v, -m), m).
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
    return Arithmetic::limited(v * polynomial(t, p) / polynomial(t, q), 1.0f);
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
  // must reach; -inf stands for the smallest that is not -inf. size: a multiple of `lanes`.
  static float kth_largest(std::size_t size, const float* x, std::size_t k, float low) noexcept {
    float high = x[0], least = x[0];
    for (std::size_t j = 0; j < size; ++j) {
      high = x[j] > high ? x[j] : high;
      least = x[j] < least && x[j] > -__builtin_inff() ? x[j] : least;
    }
    return halve<Scalar>(k, low > least ? low : least, high, [&](float limit) {
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
    transform(size, x, [](const Batch& v) { return xsimd::max(v, Batch(0.0f)); });
  }
  static void gelu(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return Curve::gelu(v); });
  }
  static float kth_largest(std::size_t size, const float* x, std::size_t k, float low) noexcept {
    Batch most(x[0]), smallest(x[0]);
    for (std::size_t j = 0; j < size; j += width) {
      const Batch v = Batch::load_unaligned(x + j);
      most = xsimd::max(most, v);
      smallest = xsimd::min(smallest, xsimd::select(v > Batch(-__builtin_inff()), v, smallest));
    }
    float highs[width], lows[width];
    most.store_unaligned(highs);
    smallest.store_unaligned(lows);
    float high = highs[0], least = lows[0];
    for (std::size_t l = 1; l < width; ++l) {
      high = highs[l] > high ? highs[l] : high;
      least = lows[l] < least ? lows[l] : least;
    }
    return halve<Tag>(k, low > least ? low : least, high, [&](float limit) {
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
      most = xsimd::max(most, xsimd::abs(Batch::load_unaligned(x + j)));
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
    // In this order a NaN of v passes through x86's min and max.
    static Batch limited(const Batch& v, float most) noexcept {
      return xsimd::max(Batch(-most), xsimd::min(Batch(most), v));
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
  // next: as many panels from there on come from memory meanwhile, unless it is nowhere.
  static void scan_8bit(const PanelRows<float>& rows, std::size_t first, std::size_t last,
                        std::size_t next, PanelQuery* const* queries, std::size_t count) noexcept {
    in_groups<8>(rows, first, last, next, queries, count);
  }
  static void scan_4bit(const PanelRows<std::uint16_t>& rows, std::size_t first, std::size_t last,
                        std::size_t next, PanelQuery* const* queries, std::size_t count) noexcept {
    in_groups<4>(rows, first, last, next, queries, count);
  }

  // out[i] = row items[i] . query, in integers. rows: [.., columns] row-major; query:
  // [padded(columns)], zero beyond columns; offset: -128 * sum of query.
  static void row_dots(const std::int8_t* rows, std::size_t columns, const std::int8_t* query,
                       std::int32_t offset, const std::uint32_t* items, std::size_t count,
                       std::int32_t* out) noexcept {
    for (std::size_t i = 0; i < count; ++i)
      out[i] = O::dot(rows + items[i] * columns, query, columns, offset);
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

  // The dot products that define scores, of the rows `items`: eight partial sums in double, column
  // c in sum c mod 8, in ascending order, added up as a tree. The same bits on every instruction
  // set. query: [padded(columns)], zero beyond columns.
  static void dots_i8(const std::int8_t* rows, std::size_t columns, const double* query,
                      const std::uint32_t* items, std::size_t count, double* out) noexcept {
    dots(rows, columns, query, items, count, out);
  }
  static void dots_f32(const float* rows, std::size_t columns, const double* query,
                       const std::uint32_t* items, std::size_t count, double* out) noexcept {
    dots(rows, columns, query, items, count, out);
  }

 private:
  static constexpr std::size_t together = 4;  // rows that share the loads of the query

  template <class Element>
  static void dots(const Element* rows, std::size_t columns, const double* query,
                   const std::uint32_t* items, std::size_t count, double* out) noexcept {
    std::size_t i = 0;
    for (; i + together <= count; i += together)
      dot_some<together>(rows, columns, query, items + i, out + i);
    for (; i < count; ++i) dot_some<1>(rows, columns, query, items + i, out + i);
  }

  template <std::size_t Rows, class Element>
  static void dot_some(const Element* rows, std::size_t columns, const double* query,
                       const std::uint32_t* items, double* out) noexcept {
    typename O::Doubles sums[Rows];
    PERSONALIZE_UNROLL
    for (auto& sum : sums) O::clear(sum);
    for (std::size_t c = 0; c < columns; c += 8) PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r)
      O::multiply(sums[r], rows + items[r] * columns + c, query + c);
    PERSONALIZE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r) {
      double s[8];
      O::store(sums[r], s);
      out[r] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
  }

  template <int Bits, class Real>
  static void in_groups(const PanelRows<Real>& rows, std::size_t first, std::size_t last,
                        std::size_t next, PanelQuery* const* queries, std::size_t count) noexcept {
    std::size_t q = count / 4 * 4;
    if (q > 0) scan_together<Bits, 4>(rows, first, last, next, queries, q);
    if (q + 2 <= count) {
      scan_together<Bits, 2>(rows, first, last, nowhere, queries + q, 2);
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
        collect<Bits>(query, masks[w], (p + w * word_panels) * panel_rows,
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
    std::size_t begin = 0;

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
                            std::size_t next, PanelQuery* const* queries,
                            std::size_t count) noexcept {
    Strip<Queries> strips[2];
    std::size_t turn = 0;
    for (std::size_t begin = first; begin < last; begin += strip) {
      const std::size_t end = last - begin < strip ? last : begin + strip;
      for (std::size_t g = 0; g < count; g += Queries, turn ^= 1) {
        if (next != nowhere)
          fetch<Bits>(rows, next + (begin - first), end - begin, g / Queries, count / Queries);
        float scale[Queries], limit[Queries];
        for (std::size_t q = 0; q < Queries; ++q) {
          scale[q] = queries[g + q]->scale;
          limit[q] = queries[g + q]->limit;
        }
        Strip<Queries>& now = strips[turn];
        now.queries = queries + g;
        now.begin = begin;
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
                    (found.begin + cell % strip) * panel_rows, found.scores + cell * panel_rows);
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
void put_in_panel(std::uint8_t* panel, std::size_t lane, const std::int8_t* row,
                  std::size_t columns) noexcept {
  for (std::size_t c = 0; c < columns; ++c) {
    if constexpr (Bits == 8)
      panel[c / 4 * step_bytes + lane * 4 + c % 4] = static_cast<std::uint8_t>(row[c] + 128);
    else
      panel[c / 8 * step_bytes + lane * 4 + c % 4] |=
          static_cast<std::uint8_t>((row[c] + 8) << (c % 8 / 4 * 4));
  }
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

// ============================================================================================
// Room 5: container. Owns the file format's outside: header, section table, checksums, compression,
// limits. Uses rooms 1 and 2.
//
// All integers little-endian. Header, 64 bytes:
//
//   offset size field
//        0    8 magic           89 50 5A 4D 0D 0A 1A 0A  ("\x89PZM\r\n\x1a\n": shows a text-mode
//                               copy)
//        8    2 major version   2; a reader refuses a greater one
//       10    2 minor version   0; a greater one adds sections that older readers skip
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
// Major version 1 had no chunks: the byte at 11 was zero, a section was its stored bytes, one zstd
// frame with codec 1, and the checksum was theirs. It is still read.
//
// Every byte of a file is covered by a checksum or must be zero, so a flipped bit anywhere is seen.
// A file is read once, from front to back. What the sections hold stands in room 6.
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

constexpr std::string_view name(ElementType type) noexcept {
  switch (type) {
    case ElementType::u8:
      return "u8";
    case ElementType::i8:
      return "i8";
    case ElementType::f32:
      return "f32";
    case ElementType::i64:
      return "i64";
    case ElementType::u32:
      return "u32";
    case ElementType::string:
      return "string";
    case ElementType::i4:
      return "i4";
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

  std::string label() const {
    std::string text(tag.data(), tag.size());
    for (char& c : text)
      if (c < 32 || c > 126) c = '?';
    return index == 0 ? text : text + "[" + std::to_string(index) + "]";
  }
};

namespace detail {

inline constexpr std::array<unsigned char, 8> model_magic{0x89, 'P',  'Z',  'M',
                                                          '\r', '\n', 0x1a, '\n'};
inline constexpr std::uint16_t format_major = 2, format_minor = 0;
inline constexpr std::size_t header_size = 64, entry_size = 72, directory_entry_size = 12;
inline constexpr unsigned least_chunk_log2 = 6, most_chunk_log2 = 24;
inline constexpr std::uint64_t most_chunk_bytes = std::uint64_t{1} << most_chunk_log2;
// The most that zstd makes of a byte: a block of 128 KiB out of four.
inline constexpr std::uint64_t most_zstd_ratio = std::uint64_t{1} << 15;

inline Error section_error(Errc code, const SectionInfo& section, const std::string& what) {
  return {code, "section " + section.label() + ": " + what, section.offset};
}

// Errors: the header is not that of a file of `size` bytes that this reader knows and allows.
inline Result<void> check_header(std::span<const std::byte> header, std::uint64_t size,
                                 const LoadLimits& limits) {
  if (header.size() < model_magic.size() ||
      std::memcmp(header.data(), model_magic.data(), model_magic.size()) != 0)
    return Error{Errc::format, "not a model file: the first 8 bytes are not a .pzm header's", 0};
  if (header.size() < header_size)
    return Error{Errc::truncated, "the file ends inside its 64-byte header", size};
  const std::byte* head = header.data();
  if (xxh64(header.first(56)) != load_integer<std::uint64_t>(head + 56))
    return Error{Errc::checksum, "header: checksum mismatch; the file is damaged", 0};
  const auto major = load_integer<std::uint16_t>(head + 8);
  if (major == 0 || major > format_major)
    return Error{Errc::version,
                 "header: format version " + std::to_string(major) + ", this reader knows up to " +
                     std::to_string(format_major) + "; use a newer personalize_runtime.hpp",
                 8};
  const auto count = load_integer<std::uint32_t>(head + 12);
  if (count > limits.sections)
    return Error{Errc::limit,
                 "header: " + std::to_string(count) + " sections, the limit is " +
                     std::to_string(limits.sections),
                 12};
  if (std::any_of(head + 32, head + 56, [](std::byte b) { return b != std::byte{0}; }))
    return Error{Errc::corrupt, "header: reserved bytes are not zero", 32};
  const auto total = load_integer<std::uint64_t>(head + 16);
  if (total > limits.file_bytes)
    return Error{Errc::limit, "header: the file is larger than LoadLimits::file_bytes", 16};
  if (size < total)
    return Error{Errc::truncated,
                 "the file has " + std::to_string(size) + " of its " + std::to_string(total) +
                     " bytes; copy it again",
                 size};
  if (size > total) return Error{Errc::corrupt, "bytes follow the end of the model", total};
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

// Numbers of the sections in the order of tag and index: find_section() looks them up.
using SectionOrder = std::vector<std::uint32_t>;
inline std::pair<std::string_view, std::uint32_t> section_key(const SectionInfo& section) noexcept {
  return {std::string_view(section.tag.data(), section.tag.size()), section.index};
}

inline SectionOrder order_of(std::span<const SectionInfo> sections) {
  SectionOrder order(sections.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return section_key(sections[a]) < section_key(sections[b]);
  });
  return order;
}

inline const SectionInfo* find_section(std::span<const SectionInfo> sections,
                                       const SectionOrder& order, std::string_view tag,
                                       std::uint32_t index) noexcept {
  const std::pair key{tag, index};
  const auto found = std::lower_bound(
      order.begin(), order.end(), key,
      [&](std::uint32_t s, const auto& wanted) { return section_key(sections[s]) < wanted; });
  if (found == order.end() || section_key(sections[*found]) != key) return nullptr;
  return &sections[*found];
}

// Header and section table of a file, checked: every entry lies inside the file and within
// `limits`. Leaves the source at the first section.
inline Result<std::vector<SectionInfo>> read_table(ByteSource& source, const LoadLimits& limits) {
  BareVector<std::byte> head_buffer, table_buffer;
  const std::uint64_t size = source.size(), raw_limit = limits.raw_bytes_of(size);
  const auto header =
      source.take(static_cast<std::size_t>(std::min<std::uint64_t>(size, header_size)), head_buffer,
                  header_size);
  if (!header) return header.error();
  if (auto checked = check_header(*header, size, limits); !checked) return checked.error();
  const bool chunked = load_integer<std::uint16_t>(header->data() + 8) > 1;
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
  }
  if (expected_offset != size)
    return Error{Errc::corrupt, "bytes follow the last section", expected_offset};
  const SectionOrder order = order_of(sections);
  for (std::uint32_t s = 1; s < count; ++s)
    if (section_key(sections[order[s - 1]]) == section_key(sections[order[s]]))
      return section_error(Errc::corrupt, sections[order[s]], "stands twice in the section table");
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
  // more each time, at the end all.
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
      for (std::thread& thread : threads) thread.join();
    }
    std::vector<std::thread> threads;
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
            const std::lock_guard lock{mutex_};
            position = done_;
          }
          if (!options_.progress(position, source_.size())) return stop();
        }
      }
    });
    if (done) return;
    const std::lock_guard lock{mutex_};
    stopped_ = true;
    if (!error_ || ordinal < error_ordinal_) {
      error_ = done.error();
      error_ordinal_ = ordinal;
    }
  }

  // The next chunk of the file, its stored bytes in `buffer` or where they lie; nothing at the end.
  Result<std::optional<Chunk>> next(BareVector<std::byte>& buffer, std::uint64_t& ordinal) {
    const std::lock_guard lock{mutex_};
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
                             "chunk " + std::to_string(c) + " has an impossible stored size");
      if (section.codec == Codec::zstd && raw > stored * most_zstd_ratio)
        return section_error(Errc::compression, section,
                             "chunk " + std::to_string(c) + " is smaller than zstd can make it");
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
    const std::lock_guard lock{mutex_};
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
    std::unique_lock lock{mutex_};
    done_ += chunk.stored.size();
    if (!target.arrived) return {};
    progress.ahead.push_back(chunk.number);
    std::push_heap(progress.ahead.begin(), progress.ahead.end(), std::greater<>{});
    if (progress.telling) return {};
    progress.telling = true;
    for (;;) {
      const std::uint64_t before = progress.chunks;
      while (!progress.ahead.empty() && progress.ahead.front() == progress.chunks) {
        std::pop_heap(progress.ahead.begin(), progress.ahead.end(), std::greater<>{});
        progress.ahead.pop_back();
        ++progress.chunks;
      }
      if (progress.chunks == before) break;
      const std::uint64_t bytes =
          std::min(section.raw_size, progress.chunks * section.chunk_raw_size());
      lock.unlock();
      auto told = target.arrived(bytes);
      if (!told && told.error().code == Errc::corrupt)
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
    std::uint64_t chunks = 0;          // that have come, without a gap
    std::vector<std::uint64_t> ahead;  // numbers of the others, a heap with the least first
    bool telling = false;
  };

  ByteSource& source_;
  std::span<const SectionInfo> sections_;
  std::span<const SectionTarget> targets_;
  const LoadOptions& options_;
  std::mutex mutex_;                      // over all that follows
  std::size_t section_ = 0;               // that chunks come from, + 1
  std::uint64_t chunk_ = 0, chunks_ = 0;  // of it: the next one, and how many it has
  std::uint64_t ordinal_ = 0;
  std::vector<std::byte> directory_;  // of it
  std::vector<Progress> progress_;    // of each section
  std::uint64_t done_ = 0;
  bool stopped_ = false;
  std::optional<Error> error_;
  std::uint64_t error_ordinal_ = 0;
};

}  // namespace detail

// The section table of a model file. Reads the whole file once: every stored byte matches its
// checksum.
inline Result<std::vector<SectionInfo>> list_sections(std::span<const std::byte> file,
                                                      const LoadLimits& limits = {}) {
  return detail::catching_bad_alloc([&]() -> Result<std::vector<SectionInfo>> {
    detail::ByteSource source{file};
    auto sections = detail::read_table(source, limits);
    if (!sections) return sections;
    const std::vector<detail::SectionTarget> ignored(sections->size());
    const LoadOptions options{.limits = limits};
    if (auto read = detail::SectionDecoder{source, *sections, ignored, options}.run(); !read)
      return read.error();
    return sections;
  });
}

namespace detail {

#ifndef PERSONALIZE_NO_ZSTD
struct FreeZstdCompression {
  void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
};
#endif

// Lays sections out as a file, a chunk at a time.
class FileBuilder {
 public:
  FileBuilder(ByteSink& sink, int zstd_level, unsigned chunk_log2) noexcept
      : sink_(&sink), zstd_level_(zstd_level), chunk_log2_(static_cast<std::uint8_t>(chunk_log2)) {}

  // A section's raw bytes go, in their order and pieces of any size, to the function it is given.
  using Append = std::function<void(std::span<const std::byte>)>;

  // write: called by finish(), once; appends raw_size bytes.
  void add(std::string_view tag, std::uint32_t index, ElementType type,
           std::initializer_list<std::uint64_t> shape, std::uint64_t raw_size,
           std::function<void(const Append&)> write) {
    SectionInfo section;
    std::copy_n(tag.begin(), 4, section.tag.begin());
    section.index = index;
    section.codec = codec();
    section.element_type = type;
    section.rank = static_cast<std::uint8_t>(shape.size());
    std::copy(shape.begin(), shape.end(), section.shape.begin());
    section.raw_size = raw_size;
    section.chunk_log2 = chunk_log2_;
    sections_.push_back({section, std::move(write)});
  }

  // The same of bytes that outlive finish().
  void add(std::string_view tag, std::uint32_t index, ElementType type,
           std::initializer_list<std::uint64_t> shape, std::span<const std::byte> raw) {
    add(tag, index, type, shape, raw.size(), [raw](const Append& append) { append(raw); });
  }

  // Errors: zstd could not compress (out of memory).
  Result<void> finish() {
    put(std::vector<std::byte>(header_size + sections_.size() * entry_size));
    std::vector<std::byte> table;
    for (Section& planned : sections_) {
      write(planned);
      if (error_) return std::move(*error_);
      const SectionInfo& section = planned.info;
      for (const char c : section.tag) table.push_back(static_cast<std::byte>(c));
      append_integer(table, section.index);
      append_integer(table, static_cast<std::uint8_t>(section.codec));
      append_integer(table, static_cast<std::uint8_t>(section.element_type));
      append_integer(table, section.rank);
      append_integer(table, section.chunk_log2);
      table.insert(table.end(), 4, std::byte{0});
      for (const std::uint64_t d : section.shape) append_integer(table, d);
      append_integer(table, section.offset);
      append_integer(table, section.stored_size);
      append_integer(table, section.raw_size);
      append_integer(table, section.checksum);
    }
    std::vector<std::byte> head;
    for (const unsigned char c : model_magic) head.push_back(static_cast<std::byte>(c));
    append_integer(head, format_major);
    append_integer(head, format_minor);
    append_integer(head, static_cast<std::uint32_t>(sections_.size()));
    append_integer(head, size_);
    append_integer(head, xxh64(table));
    head.insert(head.end(), 24, std::byte{0});
    append_integer(head, xxh64(head));
    head.insert(head.end(), table.begin(), table.end());
    sink_->overwrite(0, head);
    return {};
  }

 private:
  struct Section {
    SectionInfo info;
    std::function<void(const Append&)> write;
  };

  void put(std::span<const std::byte> bytes) {
    sink_->append(bytes);
    size_ += bytes.size();
  }

  void write(Section& section) {
    SectionInfo& info = section.info;
    info.offset = size_;
    put(std::vector<std::byte>(static_cast<std::size_t>(info.chunk_count()) *
                               directory_entry_size));
    std::vector<std::byte> directory, gathered;
    const auto chunk_size =
        static_cast<std::size_t>(std::min(info.chunk_raw_size(), info.raw_size));
    const auto store = [&](std::span<const std::byte> raw) {
      const auto stored = packed(raw);
      append_integer(directory, static_cast<std::uint32_t>(stored.size()));
      append_integer(directory, xxh64(stored));
      put(stored);
    };
    section.write([&](std::span<const std::byte> raw) {
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
    });
    if (!gathered.empty()) store(gathered);
    sink_->overwrite(info.offset, directory);
    info.stored_size = size_ - info.offset;
    info.checksum = xxh64(directory);
  }

  Codec codec() const noexcept {
#ifndef PERSONALIZE_NO_ZSTD
    if (zstd_level_ != 0) return Codec::zstd;
#endif
    return Codec::stored;
  }

  // The chunk as it is stored; valid until the next call.
  std::span<const std::byte> packed(std::span<const std::byte> raw) {
#ifndef PERSONALIZE_NO_ZSTD
    if (zstd_level_ != 0) {
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
  [[maybe_unused]] int zstd_level_;  // not used in a build without zstd
  std::uint8_t chunk_log2_;
  std::uint64_t size_ = 0;
  std::vector<Section> sections_;
  BareVector<std::byte> packed_;
  std::optional<Error> error_;
#ifndef PERSONALIZE_NO_ZSTD
  std::unique_ptr<ZSTD_CCtx, FreeZstdCompression> zstd_;
#endif
};

}  // namespace detail

// ============================================================================================
// Room 6: model. Owns what a model file holds, as plain data, and what must hold between its parts.
// Uses rooms 1, 2, 4 and 5.
//
//   tag  index element  shape    content
//   META 0     u8       [bytes]  JSON: recipe, parameters, metrics, provenance, time range; at most
//                                16 MiB, nested at most 64 deep
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

inline constexpr std::int64_t no_timestamp = std::numeric_limits<std::int64_t>::min();

// The largest magnitude of anything in a model that is multiplied or added: a product of two stays
// finite, as does a sum of some hundred such products.
inline constexpr float max_magnitude = 1e18f;

// Row-major [rows, columns], f32 or int8 with a scale a row (value = scale[row] * int8).
class Matrix {
 public:
  Matrix() = default;

  // type: f32 or i8.
  static Matrix zeros(std::size_t rows, std::size_t columns, ElementType type = ElementType::f32) {
    Matrix m;
    m.columns_ = columns;
    m.type_ = type;
    m.resize_rows(rows);
    return m;
  }

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
  void row(std::size_t r, std::span<float> out) const noexcept {
    if (type_ == ElementType::i8) {
      const float scale = scales_[r];
      for (std::size_t c = 0; c < columns_; ++c)
        out[c] = scale * static_cast<float>(i8_[r * columns_ + c]);
    } else {
      std::copy_n(f32_.data() + r * columns_, columns_, out.data());
    }
  }

  // Adds row `r`, dequantised, to out[0, columns).
  void add_row(std::size_t r, std::span<float> out) const noexcept {
    for (std::size_t c = 0; c < columns_; ++c) out[c] += at(r, c);
  }

  // Replaces row `r`; int8 rows get a scale of their own, as in quantised(), infinite where a value
  // is not finite (then finite() is false). values: [columns].
  void set_row(std::size_t r, std::span<const float> values) noexcept {
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

  // Rows that are added are zero.
  void resize_rows(std::size_t rows) {
    const std::size_t kept = std::min(rows, rows_) * columns_;
    if (type_ == ElementType::f32) {
      f32_.resize(rows * columns_ + kernels::lanes);
      std::fill(f32_.begin() + static_cast<std::ptrdiff_t>(kept), f32_.end(), 0.0f);
    } else {
      scales_.resize(rows);
      if (rows > rows_)
        std::fill(scales_.begin() + static_cast<std::ptrdiff_t>(rows_), scales_.end(), 0.0f);
      i8_.resize(rows * columns_ + kernels::lanes);
      std::fill(i8_.begin() + static_cast<std::ptrdiff_t>(kept), i8_.end(), std::int8_t{0});
    }
    rows_ = rows;
  }

  // For a reader of files, who writes every value and then calls end_rows(): memory that takes
  // pages only as it is written.
  static Matrix unwritten(std::size_t rows, std::size_t columns, ElementType type) {
    Matrix m;
    m.columns_ = columns;
    m.type_ = type;
    m.rows_ = rows;
    if (type == ElementType::f32) {
      m.f32_.resize(rows * columns + kernels::lanes);
    } else {
      m.scales_.resize(rows);
      m.i8_.resize(rows * columns + kernels::lanes);
    }
    return m;
  }
  void end_rows() noexcept {
    if (!f32_.empty()) std::fill_n(f32_.end() - kernels::lanes, kernels::lanes, 0.0f);
    if (!i8_.empty()) std::fill_n(i8_.end() - kernels::lanes, kernels::lanes, std::int8_t{0});
  }

  float at(std::size_t r, std::size_t c) const noexcept {
    const std::size_t i = r * columns_ + c;
    return type_ == ElementType::i8 ? scales_[r] * static_cast<float>(i8_[i]) : f32_[i];
  }

  // The int8 form: scale = max |row| / 127, values rounded to nearest.
  Matrix quantised() const {
    if (type_ == ElementType::i8) return *this;
    Matrix m = zeros(rows_, columns_, ElementType::i8);
    for (std::size_t r = 0; r < rows_; ++r) m.set_row(r, f32().subspan(r * columns_, columns_));
    return m;
  }

  // At least every |value|, and no more than the largest possible with these scales; infinite where
  // a value is not finite.
  float magnitude() const noexcept {
    return detail::largest(f32_.empty() ? std::span<const float>(scales_) : f32()) *
           (f32_.empty() ? 127.0f : 1.0f);
  }
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
  std::vector<float> boundaries;
  Matrix embedding;
};

// Timestamps are Unix seconds; no_timestamp where unknown.
struct ItemStatistics {
  std::uint64_t interactions = 0;
  std::int64_t first_timestamp = no_timestamp;
  std::int64_t last_timestamp = no_timestamp;
  std::int64_t creation_timestamp = no_timestamp;
};

// Everything that a model file holds. N items, vectors of d floats.
struct ModelParts {
  std::string metadata;  // JSON
  StringTable item_ids;
  Matrix item_vectors;                     // [N, d]
  Matrix input_vectors;                    // [N, e], empty where they are the item vectors
  std::vector<float> biases;               // [N]
  std::vector<ItemStatistics> statistics;  // [N]
  StringTable event_types;
  Matrix event_type_embedding;  // [E, e], empty without event types
  Matrix time_gap_embedding;    // [buckets >= 2, e] or empty
  std::vector<MetadataField> fields;
  std::vector<EncoderOp> operations;
  std::vector<Matrix> weights;
  StringTable user_ids;  // users who come with a state
  Matrix user_states;    // [U, s]: hidden states, then the query; BasicEncoder::load lays them out

  // What embed_sum looks items up in.
  const Matrix& inputs() const noexcept {
    return input_vectors.empty() ? item_vectors : input_vectors;
  }
};

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

inline Error shape_error(const std::string& what, const Matrix& m, std::size_t rows,
                         std::size_t columns) {
  return {Errc::corrupt, what + " has shape [" + std::to_string(m.rows()) + ", " +
                             std::to_string(m.columns()) + "], expected [" + std::to_string(rows) +
                             ", " + std::to_string(columns) + "]"};
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
  std::vector<OpShape> shapes;  // one an operation
  std::size_t state = 0;        // values of all hidden states
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
    const auto fail = [&](Errc code, const std::string& what) {
      return Error{code, "encoder: operation " + std::to_string(o) + ": " + what};
    };
    const std::string label{name(op.kind)};
    const auto shape =
        shape_of(op, dimension, next < weights.size() ? weights[next] : OpShape::Weight{});
    if (!shape)
      return fail(Errc::unsupported,
                  "unknown kind or argument (" + label + "); use a newer personalize_runtime.hpp");
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
        return fail(Errc::corrupt, "weight " + std::to_string(next) + " has shape [" +
                                       std::to_string(weights[next].rows) + ", " +
                                       std::to_string(weights[next].columns) + "], expected [" +
                                       std::to_string(rows) + ", " + std::to_string(columns) + "]");
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
    return Error{Errc::corrupt, "encoder: ends with " + std::to_string(dimension) +
                                    " values, item vectors have " + std::to_string(outputs)};
  if (program.state == 0) return Error{Errc::corrupt, "encoder: has no recurrent operation"};
  return program;
}

inline Result<Program> check_program(const ModelParts& parts, const LoadLimits& limits) {
  std::vector<OpShape::Weight> weights;
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
        return Error{Errc::corrupt, "encoder: operation " + std::to_string(o) + " (" +
                                        std::string(name(parts.operations[o].kind)) +
                                        "): a recurrent weight of magnitude over 1 lets users' "
                                        "states grow without bound"};
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
    if (field.name.empty() || field.name.size() > max_id_bytes || !valid_id(field.name))
      return Error{Errc::corrupt,
                   "section FLDN: a field name has 1 to 256 bytes of UTF-8 without control "
                   "characters"};
    if (field.embedding.rows() != rows || (rows > 0 && field.embedding.columns() != d))
      return shape_error("section FEMB of field " + field.name, field.embedding, rows, d);
  }
  const std::size_t stored = program.state + d;
  if (parts.user_states.rows() != parts.user_ids.size() ||
      (!parts.user_ids.empty() && parts.user_states.columns() != stored))
    return shape_error("section USTA", parts.user_states, parts.user_ids.size(), stored);
  return {};
}

// Errors: a value that is not finite or over max_magnitude; boundaries that do not ascend.
inline Result<void> check_values(const ModelParts& parts) {
  const auto check = [](float magnitude, const char* what) -> Result<void> {
    if (!(magnitude < std::numeric_limits<float>::infinity()))
      return Error{Errc::corrupt, std::string(what) + ": holds a value that is not finite"};
    if (magnitude > max_magnitude)
      return Error{Errc::corrupt, std::string(what) + ": holds a value over 1e18 in magnitude"};
    return {};
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
    if (auto r = check(field.embedding.magnitude(), "section FEMB"); !r) return r;
    if (!all_finite(field.boundaries))
      return Error{Errc::corrupt, "section FBND: holds a value that is not finite"};
    if (!std::is_sorted(field.boundaries.begin(), field.boundaries.end()))
      return Error{Errc::corrupt, "section FBND of field " + field.name + ": not ascending"};
  }
  return {};
}

// What must hold between the parts, whether they come from a file or from a trainer.
inline Result<void> check_parts(const ModelParts& parts, const LoadLimits& limits) {
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
  if (auto checked = check_values(parts); !checked) return checked;
  return check_recurrences(parts, *program);
}

}  // namespace detail

// ============================================================================================
// Room 7: model file. Owns how a model is read and written, and Model, which serves from memory.
// Uses rooms 1, 2, 5 and 6.
// ============================================================================================

namespace detail {

// The bytes of a section of strings, and how many there are.
void write_strings(const StringTable& table, const auto& append) {
  std::vector<std::byte> lengths;
  for (std::size_t i = 0; i < table.size(); ++i)
    append_integer(lengths, static_cast<std::uint16_t>(table[i].size()));
  append(std::span<const std::byte>(lengths));
  for (std::size_t i = 0; i < table.size(); ++i) append(std::as_bytes(std::span(table[i])));
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
    std::array<std::vector<std::byte>, 3> parts;  // scales, groups, values
    const std::size_t in_chunk = FourBitRows::rows_in_chunk(columns_, chunk_log2);
    for (std::size_t r = 0; r < matrix_->rows(); ++r) {
      append_integer(parts[0], quantise(r));
      append_nibbles(parts[1], std::span<const std::uint8_t>(best_groups_));
      append_nibbles(parts[2], std::span<const std::uint8_t>(best_values_));
      if ((r + 1) % in_chunk != 0 && r + 1 != matrix_->rows()) continue;
      for (std::vector<std::byte>& part : parts) {
        append(part);
        part.clear();
      }
    }
  }

 private:
  static constexpr float most = 15;  // of a group's scale

  static void append_nibbles(std::vector<std::byte>& out, std::span<const std::uint8_t> nibbles) {
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
  std::vector<float> row_;
  std::vector<std::uint8_t> values_, best_values_, groups_, best_groups_;
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
    SectionTarget* target = target_of(tag, index, {type}, shape);
    if (!target) return;
    static_assert(std::is_trivially_copyable_v<typename Container::value_type>);
    target->take = [&container,
                    size = static_cast<std::size_t>(*shape.begin())]() -> SectionTarget::Areas {
      container.resize(size);
      return {std::as_writable_bytes(std::span(container))};
    };
    if (!check) return;
    target->arrived = [check = std::move(check),
                       all = find(tag, index)->raw_size](std::uint64_t bytes) -> Result<void> {
      return bytes == all ? check() : Result<void>{};
    };
  }

  void fail(Error error) {
    if (!error_) error_ = std::move(error);
  }
  const std::optional<Error>& error() const noexcept { return error_; }
  std::span<const SectionTarget> targets() const noexcept { return targets_; }

 private:
  SectionTarget* target_of(std::string_view tag, std::uint32_t index,
                           std::initializer_list<ElementType> types,
                           std::initializer_list<std::uint64_t> shape) {
    if (error_) return nullptr;
    const SectionInfo* section = find(tag, index);
    if (!section) {
      SectionInfo missing;
      std::copy_n(tag.begin(), 4, missing.tag.begin());
      missing.index = index;
      fail({Errc::corrupt, "section " + missing.label() + ": is missing"});
      return nullptr;
    }
    if (std::find(types.begin(), types.end(), section->element_type) == types.end()) {
      fail(section_error(Errc::corrupt, *section, "unexpected element type"));
    } else if (section->rank != shape.size()) {
      fail(section_error(Errc::corrupt, *section, "unexpected rank"));
    } else if (!std::equal(shape.begin(), shape.end(), section->shape.begin())) {
      fail(section_error(Errc::corrupt, *section,
                         "has shape " + text_of(std::span(section->shape).first(shape.size())) +
                             ", expected " + text_of(shape)));
    } else if (!raw_size_fits(*section)) {
      fail(section_error(Errc::corrupt, *section, "raw size does not follow from its shape"));
    } else if (last_ && section < last_) {
      fail(section_error(Errc::corrupt, *section,
                         "stands before section " + last_->label() + ", which it follows"));
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
    for (const std::uint64_t extent : shape)
      text += (text.empty() ? "[" : ", ") + std::to_string(extent);
    return text + "]";
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

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) noexcept {
  return std::as_bytes(std::span(values));
}

}  // namespace detail

struct WriteOptions {
  // f32: matrices as they are. i8: f32 matrices of more than one row in 8 bits (one of one row is a
  // norm or bias: small, and every row depends on it). i4: matrices of more than one row in 4 bits;
  // in 8 where they have fewer than 16 columns, and users' states.
  ElementType element_type = ElementType::i8;
  int zstd_level = 19;                   // 1 to 22; 0 writes stored sections
  std::uint32_t chunk_bytes = 1u << 20;  // a power of two in [2^6, 2^24]; see LoadOptions
};

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
  if (auto checked = check_parts(parts, limits); !checked) return checked;
  const auto chunk_log2 = static_cast<unsigned>(std::bit_width(options.chunk_bytes)) - 1;
  FileBuilder file{sink, options.zstd_level, chunk_log2};
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
  file.add("META", 0, ElementType::u8, {parts.metadata.size()},
           std::as_bytes(std::span(parts.metadata)));
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
  std::vector<std::byte> kinds;
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

// The bytes of a model file. The same parts and options give the same bytes (with one zstd
// version). limits: those of who will read it. Errors: parts that contradict one another or are
// over a limit; out of memory.
inline Result<std::vector<std::byte>> write_model(const ModelParts& parts,
                                                  const WriteOptions& options = {},
                                                  const LoadLimits& limits = {}) {
  return detail::catching_bad_alloc([&]() -> Result<std::vector<std::byte>> {
    detail::MemorySink sink;
    if (auto written = detail::write_parts(parts, options, limits, sink); !written)
      return written.error();
    return std::move(sink.bytes);
  });
}

// Writes the model file, replacing `path` at once or not at all (as write_file does). Takes memory
// for two chunks and, where f32 matrices are to be written in 8 bits, for the largest of them in
// that form.
inline Result<void> save_model(const ModelParts& parts, const std::string& path,
                               const WriteOptions& options = {}, const LoadLimits& limits = {}) {
  return detail::catching_bad_alloc([&]() -> Result<void> {
    detail::FileSink file{path};
    if (auto written = detail::write_parts(parts, options, limits, file); !written) return written;
    return file.commit();
  });
}

namespace detail {

// What a file's sections become.
struct FileParts {
  ModelParts model;
  StringTable field_names;
  std::vector<std::uint8_t> field_kinds;
  std::vector<OpShape::Weight> weight_shapes;
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
                  return Error{Errc::corrupt, "users' states have " + std::to_string(stored) +
                                                  " values, the encoder's have " +
                                                  std::to_string(program->state + d)};
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
  const auto sections = read_table(source, limits);
  if (!sections) return sections.error();
  // Statistics and operations are read into place.
  static_assert(sizeof(ItemStatistics) == 4 * 8 && sizeof(EncoderOp) == 2 * 4);
  SectionPlan plan{*sections, limits};
  FileParts parts;
  if (plan.extent("META", 0) > max_metadata_bytes)
    plan.fail({Errc::limit, "section META: is over 16 MiB"});
  plan.values(parts.model.metadata, "META", 0, ElementType::u8, {plan.extent("META", 0)});
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
  if (auto checked = check_parts(model, limits); !checked) return checked.error();
  return std::move(model);
}

}  // namespace detail

// The parts of a model file in memory, every value checked. Errors name the section and the reason.
inline Result<ModelParts> read_model(std::span<const std::byte> file,
                                     const LoadOptions& options = {}) {
  return detail::catching_bad_alloc([&]() -> Result<ModelParts> {
    detail::ByteSource source{file};
    return detail::read_parts(source, options);
  });
}

// The same of a file on disk, of which no more than a chunk at a time is held in memory.
inline Result<ModelParts> read_model(const std::string& path, const LoadOptions& options = {}) {
  return detail::catching_bad_alloc([&]() -> Result<ModelParts> {
    auto source = detail::ByteSource::open(path);
    if (!source) return source.error();
    auto parts = detail::read_parts(*source, options);
    if (parts || parts.error().code == Errc::out_of_memory || parts.error().code == Errc::io)
      return parts;
    Error error = parts.error();
    error.message = path + ": " + error.message;
    return error;
  });
}

// An immutable model: share it between threads and recommenders freely.
class Model {
 public:
  // Reads and checks a model file, as read_model does.
  static Result<std::shared_ptr<const Model>> load(const std::string& path,
                                                   const LoadOptions& options = {}) {
    return of(read_model(path, options));
  }

  static Result<std::shared_ptr<const Model>> from_bytes(std::span<const std::byte> file,
                                                         const LoadOptions& options = {}) {
    return of(read_model(file, options));
  }

  // limits: how many items and dimensions are allowed.
  static Result<std::shared_ptr<const Model>> from_parts(ModelParts parts,
                                                         const LoadLimits& limits = {}) {
    return detail::catching_bad_alloc([&]() -> Result<std::shared_ptr<const Model>> {
      if (auto checked = detail::check_parts(parts, limits); !checked) return checked.error();
      return of(std::move(parts));
    });
  }

  std::size_t item_count() const noexcept { return parts_.item_ids.size(); }
  std::size_t dimension() const noexcept { return parts_.item_vectors.columns(); }
  std::string_view item_id(std::uint32_t item) const noexcept { return parts_.item_ids[item]; }
  std::optional<std::uint32_t> find_item(std::string_view id) const noexcept {
    return parts_.item_ids.find(id);
  }
  const ModelParts& parts() const noexcept { return parts_; }

  // The vector of an item that has only metadata: the sum of its values' embeddings, to out[0, d).
  // fields: name and value, categories separated by '|', numbers with a point whatever the locale.
  // Unknown fields and values add nothing; the number of values that were known is returned.
  std::size_t metadata_vector(std::span<const std::pair<std::string_view, std::string_view>> fields,
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
          const auto at =
              std::upper_bound(field.boundaries.begin(), field.boundaries.end(), *number);
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

 private:
  explicit Model(ModelParts parts) noexcept : parts_(std::move(parts)) {}

  static Result<std::shared_ptr<const Model>> of(Result<ModelParts> parts) {
    if (!parts) return parts.error();
    return detail::catching_bad_alloc([&]() -> Result<std::shared_ptr<const Model>> {
      return std::shared_ptr<const Model>(new Model(std::move(*parts)));
    });
  }

  ModelParts parts_;
};

// ============================================================================================
// Room 8: encoder. Owns the step from one event and the old user state to the new one. Uses rooms
// 2, 4, 6 and 7.
// ============================================================================================

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
    std::vector<float> values;
    std::vector<std::int8_t> quantised;
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
      Step step{op, shape->inputs, shape->outputs, {}, shape->state, recurrent_size_};
      for (std::size_t l = 0; l < shape->layer_count; ++l)
        step.layers.push_back(make_layer(shape->layers[l], weights));
      weights += shape->weight_count;
      recurrent_size_ += kernels::padded(step.state);
      dimension = step.outputs;
      width_ = std::max(width_, kernels::padded(dimension));
      steps_.push_back(std::move(step));
    }
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

  Workspace make_workspace() const {
    return {std::vector<float>(width_ * areas), std::vector<std::int8_t>(width_)};
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
    return detail::all_finite(state);
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
    result.assign(rows.rows() * size, 0.0f);
    const std::vector<float> zeros(size);
    std::vector<float> row(kernels::padded(inputs) + kernels::lanes);
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
      layer.panels.assign(layer.blocks * kernels::panel_bytes<8>(inputs), 128);
      layer.scales.assign(gates * stride, 0.0f);
    } else {
      layer.weights.assign(gates * stride * inputs, 0.0f);
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
  std::size_t width_ = 0;
};

// ============================================================================================
// Room 9: filters. Owns which items may be ranked. Uses nothing.
// ============================================================================================

// One bit an item.
class ItemMask {
 public:
  explicit ItemMask(std::size_t items, bool value = false)
      : items_(items), words_((items + 63) / 64, value ? ~std::uint64_t{0} : 0) {}

  std::size_t size() const noexcept { return items_; }
  // Items that are added are not in the mask.
  void resize(std::size_t items) {
    words_.resize((items + 63) / 64);
    if (items > items_ && items_ % 64 != 0)
      words_[items_ / 64] &= (std::uint64_t{1} << (items_ % 64)) - 1;
    items_ = items;
  }
  void set(std::uint32_t item) noexcept { words_[item / 64] |= bit(item); }
  void reset(std::uint32_t item) noexcept { words_[item / 64] &= ~bit(item); }
  bool test(std::uint32_t item) const noexcept { return (words_[item / 64] & bit(item)) != 0; }
  // Bits of items [64 w, 64 w + 64).
  std::uint64_t word(std::size_t w) const noexcept { return words_[w]; }

 private:
  static std::uint64_t bit(std::uint32_t item) noexcept { return std::uint64_t{1} << (item % 64); }
  std::size_t items_;
  std::vector<std::uint64_t> words_;
};

struct ScoredItem {
  std::uint32_t item;
  float score;
};

// The order of a ranking: by score, ties by item index.
inline bool ranks_before(const ScoredItem& a, const ScoredItem& b) noexcept {
  return a.score > b.score || (a.score == b.score && a.item < b.item);
}

// Which items may be ranked: all, less those missing from `eligible`, less those in `excluded`.
struct Eligibility {
  const ItemMask* eligible = nullptr;
  const ItemMask* excluded = nullptr;
  // How many are in `excluded` at most, where that is known. With a few a scan asks only of what is
  // left at its end whether they are among it.
  std::size_t excluded_count = unknown;
  static constexpr std::size_t unknown = ~std::size_t{0};

  std::uint64_t word(std::size_t w) const noexcept {
    return (eligible ? eligible->word(w) : ~std::uint64_t{0}) & ~(excluded ? excluded->word(w) : 0);
  }
  bool test(std::uint32_t item) const noexcept { return (word(item / 64) >> (item % 64) & 1) != 0; }
  bool all() const noexcept { return !eligible && !excluded; }
};

// ============================================================================================
// Room 10: scorer. Owns the exact top-k over the eligible items. Uses rooms 2, 4, 6, 7 and 9.
// ============================================================================================

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

  struct Workspace {
    std::vector<double> query;
    std::vector<Search> searches;
    std::vector<Search*> active;
  };

  // The model must outlive the scorer. Takes N * (d + 20) bytes up to 16 MB of item vectors,
  // N * (d / 2 + 16) beyond.
  explicit Scorer(const Model& model, const kernels::Table& table = kernels::chosen())
      : Scorer(model.parts().item_vectors, model.parts().biases, usual_query_length(model), table) {
  }

  // vectors: [N, d], biases: [N]; both must outlive the scorer. usual_query_length: a guess at |q|,
  // which decides only how early a scan ends.
  Scorer(const Matrix& vectors, std::span<const float> biases, float usual_query_length,
         const kernels::Table& table = kernels::chosen())
      : vectors_(&vectors), biases_by_item_(biases), table_(&table) {
    build(usual_query_length);
  }

  // After a last layer norm a query's length hardly depends on the user.
  static float usual_query_length(const Model& model) noexcept {
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

  Workspace make_workspace() const {
    const std::size_t padded = kernels::padded(vectors_->columns());
    Workspace workspace{std::vector<double>(padded), {}, {}};
    workspace.searches.push_back(make_search());
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
    while (workspace.searches.size() < queries.size()) workspace.searches.push_back(make_search());
    workspace.active.clear();
    for (std::size_t i = 0; i < queries.size(); ++i) {
      Search& search = workspace.searches[i];
      begin(queries[i], search);
      if (search.k == 0) continue;
      if (search.slack < 1e30f && !few_eligible(search.eligibility))
        workspace.active.push_back(&search);
      else
        look_at_all(search);
    }
    scan(workspace.active);
    // While one query's candidates get exact scores, the next one's come from memory.
    if (!queries.empty()) narrow(workspace.searches[0]);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      if (i + 1 < queries.size()) narrow(workspace.searches[i + 1]);
      finish(workspace.searches[i], *queries[i].top);
    }
  }

  // The scores of `items`, in their order, to scores.
  void score(std::span<const float> query, std::span<const std::uint32_t> items,
             Workspace& workspace, std::span<float> scores) const noexcept {
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
    for (std::size_t c = 0; c < vectors_->columns(); ++c)
      s[c % 8] += static_cast<double>(query[c]) *
                  (vectors_->type() == ElementType::i8
                       ? static_cast<double>(vectors_->i8()[item * vectors_->columns() + c])
                       : static_cast<double>(vectors_->f32()[item * vectors_->columns() + c]));
    return score_of_dot(place_of(item),
                        ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
  }

  const char* instruction_set() const noexcept { return table_->name; }

 private:
  // Larger catalogues come from main memory or nearly so, and half the bytes are worth a second
  // look at what passes.
  static constexpr std::size_t largest_8bit = std::size_t{1} << 24;  // bytes of int8 vectors
  static constexpr std::size_t chunk_panels = 16;
  static constexpr std::size_t chunk_rows = chunk_panels * kernels::panel_rows;
  static constexpr float lowest = -std::numeric_limits<float>::infinity();
  static constexpr std::size_t second_look = 64;  // items, in which time their rows come
  static constexpr std::size_t most_waiting = second_look + 2 * chunk_rows;
  static constexpr std::size_t most_together = 64;   // queries through a chunk
  static constexpr std::size_t exact_together = 64;  // items that get exact scores
  static constexpr std::size_t chunks_a_look = 8;    // at which searches later rows still concern
  static constexpr std::size_t least_to_fetch = 16;  // queries, in whose time the next chunk comes

  // Of a chunk's rows, or of all rows from a chunk on.
  struct Bounds {
    float norm = 0;      // largest |v|
    float residual = 0;  // largest |r|
    float least_residual = std::numeric_limits<float>::infinity();
    float bias = lowest;  // largest

    void add(const Bounds& other) noexcept {
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

  // All rows, in order_; see kernels::PanelRows.
  struct Panels {
    int bits = 8;
    std::size_t bytes_a_panel = 0;
    detail::LineVector<std::uint8_t> bytes;
    detail::LineVector<float> scales, biases;  // of 8 bits
    // Of 4 bits. Biases are raised by length_ |r|: what a query of the usual length needs for a
    // margin, each row its own.
    detail::LineVector<std::uint16_t> short_scales, raised_biases;
    std::vector<Bounds> chunks;  // of each chunk of chunk_rows positions
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
    std::size_t enough = 0;
    std::size_t wanted = 0;      // enough, or how many of the best so many a sample holds at most
    std::size_t next_raise = 0;  // found, when the threshold is raised again
    // Candidates: bounds of their scores, positions; up to settled the places there, all of which
    // may be ranked. lower is -inf from found to the next multiple of kernels::lanes.
    std::size_t found = 0, settled = 0;
    std::vector<float> lower, upper;
    std::vector<std::uint32_t> positions;
    std::vector<Place> places;
    Eligibility eligibility;
    std::vector<double> query;  // [padded(d)]
    std::vector<std::int8_t> quantised;
    std::vector<std::uint64_t> keys, best;  // of the candidates and of the k best, once resolved
    // Positions for a second look and how far off that can be; up to `ready` the places there.
    // [most_waiting] with panels of 4 bits.
    std::size_t waiting = 0, ready = 0;
    std::vector<std::uint32_t> waiting_positions;
    std::vector<float> waiting_margins;
    std::vector<Place> waiting_places;

    // Whether candidates go through the filter before their bounds are counted.
    bool filtered() const noexcept { return enough == k && !eligibility.all(); }
    std::size_t growth() const noexcept { return std::max<std::size_t>(wanted, 64); }
    void put_off_raise() noexcept { next_raise = std::max(wanted, found) + growth(); }
    void add(const Place& place, float low, float high) noexcept {
      lower[found] = low;
      upper[found] = high;
      places[found++] = place;
      settled = found;
    }
  };

  Search make_search() const {
    const std::size_t padded = kernels::padded(vectors_->columns());
    Search search;
    search.query.resize(padded);
    search.quantised.resize(padded);
    if (panels_.bits == 4) {
      search.waiting_positions.resize(most_waiting);
      search.waiting_margins.resize(most_waiting);
      search.waiting_places.resize(most_waiting);
    }
    return search;
  }

  // Keys compare as ranks_before does: the score's bits in an order-preserving form above the
  // complement of the item.
  static std::uint64_t key_of(float score, std::uint32_t item) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);  // -0 ties with 0
    const std::uint32_t ordered = bits ^ (bits >> 31 ? ~std::uint32_t{0} : std::uint32_t{1} << 31);
    return std::uint64_t{ordered} << 32 | (~item & 0xffffffffu);
  }
  static std::uint32_t item_of(std::uint64_t key) noexcept {
    return ~static_cast<std::uint32_t>(key);
  }
  static float score_of(std::uint64_t key) noexcept {
    const auto ordered = static_cast<std::uint32_t>(key >> 32);
    return std::bit_cast<float>(ordered ^
                                (ordered >> 31 ? std::uint32_t{1} << 31 : ~std::uint32_t{0}));
  }

  static void widen(std::span<const float> query, std::span<double> wide) noexcept {
    for (std::size_t c = 0; c < wide.size(); ++c) wide[c] = query[c];
  }

  void begin(const Query& query, Search& search) const {
    search.k = search.enough = query.k;
    search.eligibility = query.eligibility;
    // A second look at rows of 4 bits filters them without further cost.
    if (query.eligibility.excluded && !query.eligibility.eligible && panels_.bits == 8 &&
        query.eligibility.excluded_count <= search.k)
      search.enough += query.eligibility.excluded_count;
    start(search);
    // Of the most that `enough` may be, so that it does not grow with a user's history.
    const std::size_t most = std::max<std::size_t>(2 * search.k, 64);
    const std::size_t capacity = kernels::padded(3 * most + 2 * chunk_rows);
    if (search.places.size() < capacity) {
      search.lower.resize(capacity);
      search.upper.resize(capacity);
      search.positions.resize(capacity);
      search.places.resize(capacity);
      search.keys.reserve(capacity);
      search.best.reserve(capacity);
    }
    widen(query.query, search.query);
    const std::size_t d = vectors_->columns();
    const bool bytes = panels_.bits == 8;
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
    const Bounds& all = from_[0];
    search.slack = 1e-6f * ((search.norm + search.error + length_) * (all.norm + all.residual) +
                            largest_bias_);
  }

  static void start(Search& search) noexcept {
    search.found = search.settled = search.waiting = search.ready = 0;
    search.threshold = lowest;
    search.guessed = false;
    search.wanted = search.next_raise = search.enough;
  }

  // To what needs an exact score, which is fetched.
  void narrow(Search& search) const {
    if (search.k == 0) return;
    catch_up(search);
    if (search.guessed) {
      start(search);
      Search* one = &search;
      scan_chunks({&one, 1}, 0);
      catch_up(search);
    }
    settle(search);
    if (search.enough > search.k) {
      search.wanted = search.k;
      raise(search);
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
    const Matrix& vectors = *vectors_;
    const std::size_t d = vectors.columns();
    std::array<std::uint32_t, exact_together> items;
    std::array<double, exact_together> dots;
    for (std::size_t begin = 0; begin < places.size(); begin += items.size()) {
      const auto some = places.subspan(begin, std::min(items.size(), places.size() - begin));
      for (std::size_t i = 0; i < some.size(); ++i) items[i] = some[i].item;
      if (vectors.type() == ElementType::i8)
        table_->dots_i8(vectors.i8().data(), d, query, items.data(), some.size(), dots.data());
      else
        table_->dots_f32(vectors.f32().data(), d, query, items.data(), some.size(), dots.data());
      for (std::size_t i = 0; i < some.size(); ++i)
        scores[begin + i] = score_of_dot(some[i], dots[i]);
    }
  }

  static float score_of_dot(const Place& place, double dot) noexcept {
    return static_cast<float>(
        std::fma(static_cast<double>(place.scale), dot, static_cast<double>(place.bias)));
  }

  Place place_of(std::uint32_t item) const noexcept {
    return {item, vectors_->type() == ElementType::i8 ? vectors_->scales()[item] : 1.0f,
            biases_by_item_[item]};
  }

  std::span<const std::byte> stored_row(std::uint32_t item) const noexcept {
    const Matrix& vectors = *vectors_;
    const std::size_t d = vectors.columns();
    return vectors.type() == ElementType::i8 ? std::as_bytes(vectors.i8().subspan(item * d, d))
                                             : std::as_bytes(vectors.f32().subspan(item * d, d));
  }

  // Has the candidates' rows come from memory, by reading them: of hundreds of prefetches at a time
  // processors drop most.
  void read_ahead(const Search& search) const noexcept {
    unsigned sum = 0;
    for (const Place& place : std::span(search.places.data(), search.found)) {
      const auto row = stored_row(place.item);
      for (std::size_t at = 0; at < row.size(); at += 64) sum += static_cast<unsigned>(row[at]);
    }
    asm volatile("" : : "r"(sum));  // or the reads would be left out
  }

  // Where a filter leaves little, looking at each of those items is faster than the scan.
  bool few_eligible(const Eligibility& eligibility) const noexcept {
    if (!eligibility.eligible) return false;
    const std::size_t items = vectors_->rows();
    std::size_t count = 0;
    for (std::size_t w = 0; w < (items + 63) / 64; ++w)
      count += static_cast<std::size_t>(std::popcount(eligibility.word(w)));
    return count < items / 16;
  }

  void look_at_all(Search& search) const {
    const std::size_t items = vectors_->rows();
    std::array<Place, 64> some;
    std::array<float, 64> scores;
    for (std::size_t begin = 0; begin < items; begin += 64) {
      const std::size_t left = std::min<std::size_t>(64, items - begin);
      std::uint64_t allowed = search.eligibility.word(begin / 64);
      if (left < 64) allowed &= (std::uint64_t{1} << left) - 1;
      std::size_t count = 0;
      for (; allowed != 0; allowed &= allowed - 1)
        some[count++] = place_of(static_cast<std::uint32_t>(begin) +
                                 static_cast<std::uint32_t>(std::countr_zero(allowed)));
      exact(search.query.data(), {some.data(), count}, scores.data());
      for (std::size_t i = 0; i < count; ++i)
        if (std::isfinite(scores[i]) && scores[i] >= search.threshold)
          search.add(some[i], scores[i], scores[i]);
      if (search.found >= search.next_raise) raise(search);
    }
  }

  // First a sample of the chunks, from which each query guesses where its k-th best score will lie,
  // on the low side: with that for a threshold a third fewer items become candidates. narrow()
  // finds out whether the guess was too high.
  void scan(std::span<Search*> active) const {
    if (active.empty()) return;
    const std::size_t stride = sample_stride(active.front()->enough);
    if (stride != 0) scan_sample(active, stride);
    scan_chunks(active, stride);
  }

  void scan_sample(std::span<Search* const> searches, std::size_t stride) const {
    const std::size_t chunks = panels_.chunks.size();
    const std::size_t count = (chunks - stride / 2 + stride - 1) / stride;
    for (Search* search : searches) {
      // Of the best so many are in the sample, and three standard deviations.
      const double mean = static_cast<double>(search->enough * count) / static_cast<double>(chunks);
      const auto most = static_cast<std::size_t>(mean + 3 * std::sqrt(mean) + 3);
      search->wanted = search->next_raise = std::min(search->enough, most);
    }
    for (std::size_t chunk = stride / 2; chunk < chunks; chunk += stride)
      visit(chunk, chunk + stride, searches);
    for (Search* search : searches) {
      catch_up(*search);
      search->guessed = search->wanted < search->enough && search->threshold > lowest;
      search->wanted = search->enough;
      search->put_off_raise();
    }
  }

  // All chunks but those of a sample. stride: see sample_stride.
  void scan_chunks(std::span<Search*> active, std::size_t stride) const {
    const auto first_from = [&](std::size_t chunk) {
      return chunk + (stride != 0 && chunk % stride == stride / 2);
    };
    std::size_t chunk = first_from(0);
    for (std::size_t visited = 0; chunk < panels_.chunks.size(); ++visited) {
      if (visited % chunks_a_look == 0) {
        for (std::size_t i = 0; i < active.size();) {
          if (reaches(*active[i], from_[chunk])) {
            ++i;
            continue;
          }
          active[i] = active.back();
          active = active.first(active.size() - 1);
        }
        if (active.empty()) return;
      }
      const std::size_t next = first_from(chunk + 1);
      visit(chunk, next, active);
      chunk = next;
    }
  }

  // What was found and put off.
  void catch_up(Search& search) const {
    make_ready(search);
    second_looks(search);
    raise(search);
  }

  // Scans a chunk for those searches that it may concern. In a batch, `next`, the chunk that will
  // follow, comes from memory meanwhile.
  void visit(std::size_t chunk, std::size_t next, std::span<Search* const> searches) const {
    const bool ahead =
        searches.size() >= least_to_fetch && (next + 1) * chunk_rows <= order_.size();
    std::size_t fetched = ahead ? next * chunk_panels : kernels::nowhere;
    while (!searches.empty()) {
      const std::size_t count = std::min(searches.size(), most_together);
      scan_chunk(chunk, std::exchange(fetched, kernels::nowhere), searches.first(count));
      searches = searches.subspan(count);
    }
  }

  // Every so many chunks one of the sample, 0: none. Where the best rows stand in front, the scan
  // finds a threshold there and ends soon.
  std::size_t sample_stride(std::size_t k) const noexcept {
    const std::size_t chunks = panels_.chunks.size();
    const auto reach = [&](std::size_t chunk) {
      return length_ * from_[chunk].norm + from_[chunk].bias;
    };
    if (chunks < 32 || !(reach(chunks / 8) > 0.6f * reach(0))) return 0;
    return chunks / std::clamp<std::size_t>(6 * chunks / k, 4, chunks / 8);
  }

  static bool reaches(const Search& search, const Bounds& b) noexcept {
    return search.norm * b.norm + b.bias + search.slack >= search.threshold;
  }

  // next: see Kernels::scan_8bit.
  void scan_chunk(std::size_t chunk, std::size_t next, std::span<Search* const> searches) const {
    const Bounds& bounds = panels_.chunks[chunk];
    const std::size_t first = chunk * chunk_panels;
    const std::size_t last = std::min(first + chunk_panels, order_.size() / kernels::panel_rows);
    const std::size_t d = vectors_->columns();
    const bool bytes = panels_.bits == 8;
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
      count += reaches(s, bounds);
    }
    if (bytes) {
      table_->scan_8bit({panels_.bytes.data(), panels_.scales.data(), panels_.biases.data(), d},
                        first, last, next, queries.data(), count);
      for (Search* search : std::span(some.data(), count)) {
        search->found = search->scan.found;
        if (search->found >= search->next_raise) raise(*search);
      }
    } else {
      table_->scan_4bit(
          {panels_.bytes.data(), panels_.short_scales.data(), panels_.raised_biases.data(), d},
          first, last, next, queries.data(), count);
      for (Search* search : std::span(some.data(), count))
        note_waiting(*search, search->error * bounds.norm + search->slack);
    }
  }

  // What the scan of a chunk found. What stands at a position is looked up later, many at a time:
  // one alone would wait for memory.
  void note_waiting(Search& search, float margin) const {
    make_ready(search);
    for (; search.waiting < search.scan.found; ++search.waiting) {
      __builtin_prefetch(order_.data() + search.waiting_positions[search.waiting]);
      search.waiting_margins[search.waiting] = margin;
    }
    if (search.ready >= second_look) second_looks(search);
    if (search.found >= search.next_raise) raise(search);
  }

  // Candidates' positions become places, less those that may not be ranked.
  void settle(Search& search) const noexcept {
    std::size_t kept = search.settled;
    for (std::size_t i = kept; i < search.found; ++i) {
      search.lower[kept] = search.lower[i];
      search.upper[kept] = search.upper[i];
      search.places[kept] = order_[search.positions[i]];
      kept += search.eligibility.test(search.places[kept].item);
    }
    search.found = search.settled = kept;
  }

  // The same for what waits; the rows are fetched.
  void make_ready(Search& search) const noexcept {
    for (; search.ready < search.waiting; ++search.ready) {
      const Place& place = order_[search.waiting_positions[search.ready]];
      search.waiting_places[search.ready] = place;
      const auto row = stored_row(place.item);
      __builtin_prefetch(row.data());
      __builtin_prefetch(row.data() + std::min<std::size_t>(row.size() - 1, 64));
    }
  }

  // At what is ready: in 8 bits where the rows are of 8 bits, exactly otherwise.
  void second_looks(Search& search) const {
    if (search.ready == 0) return;
    const Matrix& vectors = *vectors_;
    std::array<Place, most_waiting> places;
    std::array<float, most_waiting> margins, scores;
    const bool integers = vectors.type() == ElementType::i8;
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
      std::array<std::uint32_t, most_waiting> items;
      std::array<std::int32_t, most_waiting> dots;
      for (std::size_t i = 0; i < count; ++i) items[i] = places[i].item;
      // In 8 bits rows are raised by 128 for the product, in 4 by 8.
      table_->row_dots(vectors.i8().data(), vectors.columns(), search.quantised.data(),
                       16 * search.scan.offset, items.data(), count, dots.data());
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
  void raise(Search& search) const {
    if (search.filtered()) settle(search);
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
    if (search.found > search.enough + search.growth()) {
      settle(search);
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
                        std::vector<std::uint64_t>& best) {
    constexpr int most_bits = 10;
    best.resize(keys.size());
    if (keys.empty()) return;
    const auto [least, most] = std::minmax_element(keys.begin(), keys.end());
    const std::uint64_t greatest = *most;
    const int bits = std::min(static_cast<int>(std::bit_width(keys.size())), most_bits);
    const int shift = std::max(static_cast<int>(std::bit_width(greatest - *least)) - bits, 0);
    const auto bucket = [&](std::uint64_t key) { return (greatest - key) >> shift; };
    std::array<std::uint32_t, (1 << most_bits) + 1> ends;
    const std::size_t buckets = std::size_t{1} << bits;
    std::fill_n(ends.begin(), buckets + 1, 0u);
    for (const std::uint64_t key : keys) ++ends[bucket(key) + 1];
    for (std::size_t b = 1; b < buckets; ++b) ends[b] += ends[b - 1];
    for (const std::uint64_t key : keys) best[ends[bucket(key)]++] = key;
    const std::size_t count = std::min(k, keys.size());
    const auto at = [&](std::size_t i) { return best.begin() + static_cast<std::ptrdiff_t>(i); };
    for (std::size_t b = 0, begin = 0; begin < count; begin = ends[b++])
      std::sort(at(begin), at(ends[b]), std::greater<>{});
    best.resize(count);
  }

  static float nearest(float v, float most) noexcept {
    // Adding 1.5 * 2^23 leaves no bits for the fraction.
    return (std::clamp(v, -most, most) + 12582912.0f) - 12582912.0f;
  }

  // |v - scale v^|^2 of a row quantised with a scale.
  static double squared_residual(std::span<const float> row, float scale, float most) noexcept {
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    double squares = 0;
    for (const float v : row) {
      const double e = v - static_cast<double>(scale) * nearest(v * inverse, most);
      squares += e * e;
    }
    return squares;
  }

  // The scale that leaves least of a row in 4 bits, as bfloat16. It pays to cut off the largest.
  static std::uint16_t best_scale(std::span<const float> row, float largest) noexcept {
    std::uint16_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (const float part : {1.0f, 0.9f, 0.8f, 0.7f}) {
      const std::uint16_t scale = bfloat16(largest * part / 7);
      const double residual = squared_residual(row, wide(scale), 7);
      if (residual >= least) continue;
      least = residual;
      best = scale;
    }
    return best;
  }

  // Rows by the largest score they could have with a query of the usual length; any order is
  // correct, this one ends the scan soonest.
  void build(float length) {
    length_ = length;
    const Matrix& vectors = *vectors_;
    const std::size_t items = vectors.rows(), d = vectors.columns();
    std::vector<float> row(d), norms(items), reach(items);
    order_.reserve(kernels::padded(items));
    for (std::uint32_t i = 0; i < items; ++i) {
      order_.push_back(place_of(i));
      vectors.row(i, row);
      double squares = 0;
      for (const float v : row) squares += static_cast<double>(v) * v;
      norms[i] = static_cast<float>(std::sqrt(squares)) * (1 + 1e-6f);
      reach[i] = length * norms[i] + biases_by_item_[i];
      if (std::isnan(reach[i])) reach[i] = lowest;
      largest_bias_ = std::max(largest_bias_, std::abs(biases_by_item_[i]));
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](const Place& a, const Place& b) { return reach[a.item] > reach[b.item]; });
    order_.resize(kernels::padded(items));
    panels_ = make_panels(items * d <= largest_8bit ? 8 : 4, norms);
    from_ = panels_.chunks;
    for (std::size_t c = from_.size() - 1; c > 0; --c) from_[c - 1].add(from_[c]);
  }

  Panels make_panels(int bits, std::span<const float> norms) const {
    const Matrix& vectors = *vectors_;
    const std::size_t items = vectors.rows(), d = vectors.columns();
    Panels panels;
    panels.bits = bits;
    panels.bytes_a_panel = bits == 8 ? kernels::panel_bytes<8>(d) : kernels::panel_bytes<4>(d);
    panels.bytes.assign(order_.size() / kernels::panel_rows * panels.bytes_a_panel, 0);
    constexpr float never = std::numeric_limits<float>::quiet_NaN();
    if (bits == 8) {
      panels.scales.assign(order_.size(), 0.0f);
      panels.biases.assign(order_.size(), never);
    } else {
      panels.short_scales.assign(order_.size(), 0);
      panels.raised_biases.assign(order_.size(), bfloat16(never));
    }
    panels.chunks.resize((order_.size() + chunk_rows - 1) / chunk_rows);
    std::vector<float> row(d);
    std::vector<std::int8_t> values(d);
    for (std::size_t p = 0; p < items; ++p) {
      const std::uint32_t item = order_[p].item;
      std::uint8_t* panel = panels.bytes.data() + p / kernels::panel_rows * panels.bytes_a_panel;
      const std::size_t lane = p % kernels::panel_rows;
      float residual = 0;
      if (!std::isfinite(norms[item])) {
        panels.chunks[p / chunk_rows].add({norms[item], 0, 0, biases_by_item_[item]});
        continue;
      }
      if (bits == 8 && vectors.type() == ElementType::i8) {
        panels.scales[p] = vectors.scales()[item];
        kernels::put_in_panel<8>(panel, lane, vectors.i8().data() + item * d, d);
      } else {
        vectors.row(item, row);
        float largest = 0;
        for (const float v : row) largest = std::max(largest, std::abs(v));
        const float most = bits == 8 ? 127.0f : 7.0f;
        float scale = largest / most;
        if (bits == 4) {
          panels.short_scales[p] = best_scale(row, largest);
          scale = wide(panels.short_scales[p]);
        } else {
          panels.scales[p] = scale;
        }
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        for (std::size_t c = 0; c < d; ++c)
          values[c] = static_cast<std::int8_t>(nearest(row[c] * inverse, most));
        residual = static_cast<float>(std::sqrt(squared_residual(row, scale, most))) * (1 + 1e-6f);
        if (bits == 8)
          kernels::put_in_panel<8>(panel, lane, values.data(), d);
        else
          kernels::put_in_panel<4>(panel, lane, values.data(), d);
      }
      if (bits == 8)
        panels.biases[p] = biases_by_item_[item];
      else
        panels.raised_biases[p] = bfloat16_above(biases_by_item_[item] + length_ * residual);
      panels.chunks[p / chunk_rows].add({norms[item], residual, residual, biases_by_item_[item]});
    }
    return panels;
  }

  // bfloat16: the upper half of a float.
  static float wide(std::uint16_t v) noexcept {
    return std::bit_cast<float>(std::uint32_t{v} << 16);
  }
  static std::uint16_t bfloat16(float v) noexcept {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(v) >> 16);
  }
  // No lower than v; a NaN stays one.
  static std::uint16_t bfloat16_above(float v) noexcept {
    const std::uint16_t below = bfloat16(v);
    if (std::isnan(v)) return bfloat16(std::numeric_limits<float>::quiet_NaN());
    return static_cast<std::uint16_t>(wide(below) < v ? below + 1 : below);
  }

  const Matrix* vectors_;
  std::span<const float> biases_by_item_;
  const kernels::Table* table_;
  detail::LineVector<Place> order_;  // by position in the panels, padded to whole panels
  Panels panels_;
  std::vector<Bounds> from_;  // of each chunk and all later ones
  float length_ = 0;          // of a usual query
  float largest_bias_ = 0;
};

// ============================================================================================
// Room 11: feedback. Owns what is remembered of shown items: decayed counters an item, sums of the
// contexts in which it was shown and chosen, each user's recent impressions, the slates behind
// recommendation ids, and the log's entries. Uses rooms 2 and 10.
// ============================================================================================

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

// Two decayed counters an item, 16 bytes together. Any number of threads may add and read; no
// increment is lost. Nothing sweeps over the items: a counter is aged when it is next touched.
class ItemCounters {
 public:
  enum class Kind : std::uint32_t { positive, expected };

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

  // Adds amount >= 0, counted in steps of 2^-22; a counter holds at most 2^29. item < size().
  void add(Kind kind, std::uint32_t item, double amount, const DecayMoment& moment) noexcept {
    std::atomic<std::uint64_t>& word = at(kind, item);
    const double steps = amount * moment.weight * unit;
    const std::uint64_t whole = rounded(steps);
    std::uint64_t old = word.load(std::memory_order_relaxed), sum;
    do {
      const std::uint64_t epoch = old >> value_bits, now = moment.half_lives;
      const std::uint64_t value =
          epoch == now ? (old & value_mask) + whole
          : epoch < now
              ? aged(old, now) + whole
              : (old & value_mask) + rounded(std::ldexp(steps, -static_cast<int>(epoch - now)));
      sum = std::max(epoch, now) << value_bits | std::min(value, value_mask);
    } while (!word.compare_exchange_weak(old, sum, std::memory_order_relaxed));
  }

  // The count as it has decayed by `moment`.
  double value(Kind kind, std::uint32_t item, const DecayMoment& moment) const noexcept {
    const std::uint64_t word = at(kind, item).load(std::memory_order_relaxed);
    // A moment long before the last addition is taken for the half-life before it.
    const int age =
        std::min(static_cast<int>(word >> value_bits) - static_cast<int>(moment.half_lives), 1);
    return std::ldexp(static_cast<double>(word & value_mask) / (unit * moment.weight), age);
  }

  // Brings the item's counters into the cache ahead of an add.
  PERSONALIZE_INLINE void prefetch(std::uint32_t item) const noexcept {
    __builtin_prefetch(&at(Kind::positive, item), 1);
  }

 private:
  static constexpr unsigned value_bits = 52;
  static constexpr std::uint64_t value_mask = (std::uint64_t{1} << value_bits) - 1;
  static constexpr double unit = 0x1p22;
  static constexpr std::size_t block_items = 4096;
  using Block = std::array<std::atomic<std::uint64_t>, 2 * block_items>;
  static_assert(sizeof(Block) == 16 * block_items &&
                std::atomic<std::uint64_t>::is_always_lock_free);

  static std::uint64_t rounded(double steps) noexcept {
    return steps < 0x1p52 - 1 ? static_cast<std::uint64_t>(steps + 0.5) : value_mask;
  }

  static std::uint64_t aged(std::uint64_t word, std::uint64_t epoch) noexcept {
    const std::uint64_t age = epoch - (word >> value_bits);
    return age < value_bits ? (word & value_mask) >> age : 0;
  }

  std::atomic<std::uint64_t>& at(Kind kind, std::uint32_t item) const noexcept {
    return (
        *blocks_[item / block_items])[2 * (item % block_items) + static_cast<std::uint32_t>(kind)];
  }

  void grow() {
    while (blocks_.size() * block_items < items_) blocks_.push_back(std::make_shared<Block>());
  }

  std::size_t items_;
  std::vector<std::shared_ptr<Block>> blocks_;
};

// An item's sums over its impressions, decayed as its counters are: of the query where it was
// chosen, and of the query times the expected number of choices. Any number of threads may call;
// items are spread over 64 locks. Memory: 8 d bytes an item that was ever shown.
class ContextSums {
 public:
  explicit ContextSums(std::size_t dimension) : dimension_(dimension) {}

  // Takes the item's memory, so that adding to it will take none.
  void prepare(std::uint32_t item) {
    Stripe& stripe = stripes_[item % stripes_.size()];
    const std::lock_guard lock{stripe.mutex};
    row_in(stripe, item);
  }

  void add_positive(std::uint32_t item, std::span<const float> query, const DecayMoment& moment) {
    add(item, query, 1.0, 0, moment);
  }
  void add_expected(std::uint32_t item, std::span<const float> query, double expected,
                    const DecayMoment& moment) {
    add(item, query, expected, dimension_, moment);
  }

  // Calls visit(item, positive, expected), each sum [d] as it has decayed by `moment`, in no order.
  template <class Visit>
  void for_each(const DecayMoment& moment, Visit visit) const {
    std::vector<float> sums(2 * dimension_);
    for (const Stripe& stripe : stripes_) {
      const std::lock_guard lock{stripe.mutex};
      for (const auto& [item, row] : stripe.rows) {
        const double scale =
            std::ldexp(1.0 / moment.weight,
                       static_cast<int>(row.half_lives) - static_cast<int>(moment.half_lives));
        for (std::size_t c = 0; c < sums.size(); ++c)
          sums[c] = static_cast<float>(scale * static_cast<double>(row.sums[c]));
        const std::span<const float> all(sums);
        visit(item, all.first(dimension_), all.subspan(dimension_));
      }
    }
  }

 private:
  struct Row {
    std::uint32_t half_lives = 0;
    std::vector<float> sums;  // positive, then expected
  };
  struct Stripe {
    mutable std::mutex mutex;
    std::unordered_map<std::uint32_t, Row> rows;
  };

  Row& row_in(Stripe& stripe, std::uint32_t item) {
    const auto found = stripe.rows.find(item);
    if (found != stripe.rows.end()) return found->second;
    return stripe.rows.emplace(item, Row{0, std::vector<float>(2 * dimension_)}).first->second;
  }

  void add(std::uint32_t item, std::span<const float> query, double amount, std::size_t offset,
           const DecayMoment& moment) {
    Stripe& stripe = stripes_[item % stripes_.size()];
    const std::lock_guard lock{stripe.mutex};
    Row& row = row_in(stripe, item);
    if (moment.half_lives > row.half_lives) {
      const float scale =
          std::ldexp(1.0f, static_cast<int>(row.half_lives) - static_cast<int>(moment.half_lives));
      for (float& sum : row.sums) sum *= scale;
      row.half_lives = moment.half_lives;
    }
    const auto factor = static_cast<float>(
        std::ldexp(amount * moment.weight,
                   static_cast<int>(moment.half_lives) - static_cast<int>(row.half_lives)));
    for (std::size_t c = 0; c < dimension_; ++c) row.sums[offset + c] += factor * query[c];
  }

  std::size_t dimension_;
  std::array<Stripe, 64> stripes_;
};

// What one user was shown lately and did not choose: at most 64 items, the one shown longest ago
// gives way. The count of an item fades with a half-life of 7 days. Not thread-safe.
class RecentImpressions {
 public:
  static constexpr std::size_t capacity = 64;
  static constexpr std::int64_t half_life = 7 * 86'400;

  // Takes the memory that adding `more` items could need.
  void reserve(std::size_t more) {
    const std::size_t wanted = std::min(entries_.size() + more, capacity);
    if (wanted > entries_.capacity())
      entries_.reserve(std::min(std::max(wanted, 2 * entries_.capacity()), capacity));
  }

  void add(std::uint32_t item, std::int64_t timestamp) {
    Entry* entry = find(item);
    if (!entry && entries_.size() < capacity) {
      entry = &entries_.emplace_back(Entry{item, 0, timestamp});
    } else if (!entry) {
      entry = &*std::min_element(
          entries_.begin(), entries_.end(),
          [](const Entry& a, const Entry& b) { return a.timestamp < b.timestamp; });
      *entry = {item, 0, timestamp};
    }
    entry->count = 1.0f + faded(*entry, timestamp);
    entry->timestamp = std::max(entry->timestamp, timestamp);
  }

  // The user chose the item: what came before is no longer held against it.
  void remove(std::uint32_t item) noexcept {
    if (Entry* entry = find(item)) {
      *entry = entries_.back();
      entries_.pop_back();
    }
  }

  float count(std::uint32_t item, std::int64_t timestamp) const noexcept {
    const Entry* entry = const_cast<RecentImpressions*>(this)->find(item);
    return entry ? faded(*entry, timestamp) : 0.0f;
  }

  bool contains(std::uint32_t item) const noexcept {
    return std::any_of(entries_.begin(), entries_.end(),
                       [item](const Entry& entry) { return entry.item == item; });
  }

  template <class Visit>
  void for_each(std::int64_t timestamp, Visit visit) const {
    for (const Entry& entry : entries_) visit(entry.item, faded(entry, timestamp));
  }

  std::size_t size() const noexcept { return entries_.size(); }

 private:
  struct Entry {
    std::uint32_t item;
    float count;  // as of timestamp
    std::int64_t timestamp;
  };

  static float faded(const Entry& entry, std::int64_t timestamp) noexcept {
    const double age =
        std::max(0.0, static_cast<double>(timestamp) - static_cast<double>(entry.timestamp));
    return entry.count * std::exp2(static_cast<float>(-age / half_life));
  }

  Entry* find(std::uint32_t item) noexcept {
    const auto found = std::find_if(entries_.begin(), entries_.end(),
                                    [item](const Entry& entry) { return entry.item == item; });
    return found == entries_.end() ? nullptr : &*found;
  }

  std::vector<Entry> entries_;
};

// One place of a slate and how it came about (room 12).
struct SlotChoice {
  ScoredItem pick{};
  ScoredItem best{};      // of the ranking as it stood; the pick where the ranking had ended
  bool explored = false;  // drawn from the pool
  float propensity = 1;   // probability of this pick, given those above it
  float pool_share = 0;   // softmax of the pick in the pool as it stood; 0: not in the pool
  float pool_logit = 0;   // log odds that the pool wins an exploring slot, before the handicap
  float pool_value = 0;   // mean value of the pool, weighted by softmax
};

// One pick of a logged slate. "Log clicks": the natural logarithm of an expected number of positive
// events.
struct LoggedPick {
  SlotChoice choice;        // with pool_value as the values below
  std::uint32_t place = 0;  // from 0
  float relevance = 0;      // S, the model's score less the user's own normaliser (room 12)
  float adjustment = 0;     // what feedback added when served, in log clicks
  float examination = 1;    // probability that a user looks at this position
  float expected = 0;       // positive events expected of the impression by the model alone
  float value = 0;          // the same by all that is known
  float best_value = 0;     // had the slot gone to choice.best
  bool seen = false;
  bool positive = false;
};

struct LoggedSlate {
  std::int64_t timestamp = 0;
  bool reported = false;     // an event or a call has said which picks were seen
  std::vector<float> query;  // the user's, when served; empty for a user without events
  std::vector<LoggedPick> picks;
};

enum class SlateStatus : std::uint8_t {
  found,
  expired,  // the id is genuine, but too old or displaced by newer slates
  unknown,  // not an id of this recommender for this user
};

// The last slates, each found again by its recommendation id: its number and a keyed hash of number
// and owner, so that ids can be neither guessed nor used for another user. Any number of threads
// may call; a slate is used under one of 64 locks. Memory: `capacity` slates, taken as they come.
class SlateLog {
 public:
  // capacity: slates, >= 1; expiry: seconds.
  SlateLog(std::size_t capacity, std::int64_t expiry, const detail::HashKey& key)
      : key_(key), expiry_(expiry), slots_(capacity) {}

  // Adds a slate that fill(LoggedSlate&) completes; its memory is reused. Writes the id to `id`.
  template <class Fill>
  void add(std::string_view owner, std::int64_t timestamp, std::string& id, Fill fill) {
    const std::uint64_t number = next_.fetch_add(1, std::memory_order_relaxed);
    write_id(number, tag(number, owner), id);
    Slot& slot = slots_[number % slots_.size()];
    const std::lock_guard lock{mutex_of(number)};
    // A thread held up for a whole round of the ring must not displace the newer slate.
    if (slot.number > number) return;
    slot.number = number;
    slot.slate.timestamp = timestamp;
    slot.slate.reported = false;
    slot.slate.query.clear();
    slot.slate.picks.clear();
    fill(slot.slate);
  }

  // Calls use(LoggedSlate&) where the id is one of this owner's slates and still remembered.
  template <class Use>
  SlateStatus use(std::string_view id, std::string_view owner, std::int64_t timestamp, Use use) {
    const auto parsed = read_id(id);
    if (!parsed || parsed->second != tag(parsed->first, owner)) return SlateStatus::unknown;
    const std::uint64_t number = parsed->first;
    Slot& slot = slots_[number % slots_.size()];
    const std::lock_guard lock{mutex_of(number)};
    if (slot.number != number || timestamp - expiry_ > slot.slate.timestamp)
      return SlateStatus::expired;
    use(slot.slate);
    return SlateStatus::found;
  }

  // Visits remembered slates whose impressions were reported, newest first, at most `limit`.
  template <class Visit>
  void for_each_reported(std::size_t limit, Visit visit) const {
    std::uint64_t number = next_.load(std::memory_order_relaxed) - 1;
    for (std::size_t s = 0; s < slots_.size() && number > 0 && limit > 0; ++s, --number) {
      const Slot& slot = slots_[number % slots_.size()];
      const std::lock_guard lock{mutex_of(number)};
      if (slot.number != number || !slot.slate.reported) continue;
      visit(slot.slate);
      --limit;
    }
  }

 private:
  struct Slot {
    std::uint64_t number = 0;  // 0: never used
    LoggedSlate slate;
  };
  static constexpr std::string_view digits = "0123456789abcdef";

  std::mutex& mutex_of(std::uint64_t number) const noexcept {
    return mutexes_[number % slots_.size() % mutexes_.size()];
  }

  std::uint64_t tag(std::uint64_t number, std::string_view owner) const noexcept {
    const std::uint64_t of_owner = detail::siphash(key_, std::as_bytes(std::span(owner)));
    const std::array<std::uint64_t, 2> both{number, of_owner};
    return detail::siphash(key_, std::as_bytes(std::span(both)));
  }

  static void write_id(std::uint64_t number, std::uint64_t tag, std::string& id) {
    id.resize(32);
    for (std::size_t i = 0; i < 16; ++i) {
      id[15 - i] = digits[number >> (4 * i) & 15];
      id[31 - i] = digits[tag >> (4 * i) & 15];
    }
  }

  static std::optional<std::pair<std::uint64_t, std::uint64_t>> read_id(std::string_view id) {
    if (id.size() != 32) return std::nullopt;
    std::array<std::uint64_t, 2> words{};
    for (std::size_t i = 0; i < 32; ++i) {
      const std::size_t digit = digits.find(id[i]);
      if (digit == std::string_view::npos) return std::nullopt;
      words[i / 16] = words[i / 16] << 4 | digit;
    }
    return std::pair{words[0], words[1]};
  }

  detail::HashKey key_;
  std::int64_t expiry_;
  std::atomic<std::uint64_t> next_{1};
  std::vector<Slot> slots_;
  mutable std::array<std::mutex, 64> mutexes_;
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

// The entry as a line of CSV under log_csv_header. Appends to `line`.
inline void append_csv(const LogEntry& entry, std::string& line) {
  const auto quoted = [&line](std::string_view text) {
    if (text.find_first_of(",\"\r\n") == std::string_view::npos) {
      line += text;
    } else {
      line += '"';
      for (const char c : text) line.append(c == '"' ? 2 : 1, c);
      line += '"';
    }
    line += ',';
  };
  line += std::to_string(entry.timestamp) + ',';
  quoted(entry.user);
  quoted(entry.recommendation_id);
  quoted(entry.item);
  std::array<char, 256> rest;
  std::snprintf(
      rest.data(), rest.size(), "%u,%d,%.9g,%d,%.9g,%.9g,%.9g,%.9g,%.9g\n", entry.position,
      entry.positive ? 1 : 0, static_cast<double>(entry.choice.propensity),
      entry.choice.pick.item == entry.choice.best.item ? 1 : 0,
      static_cast<double>(entry.choice.pool_share), static_cast<double>(entry.choice.pool_logit),
      static_cast<double>(entry.expected), static_cast<double>(entry.best_expected),
      static_cast<double>(entry.choice.pool_value));
  line += rest.data();
}

// ============================================================================================
// Room 12: exploration. Owns what impressions teach (calibration, posterior, vector correction) and
// the random choice of a slate with its probabilities. Uses rooms 2, 9, 10 and 11.
// ============================================================================================

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
    const double x = mean * item.expected;
    if (x <= 0) continue;
    const double residual = item.positive - x;
    const double weight = std::min(1.0, x * x);
    spread += weight * (residual * residual - x) / (x * x);
    weights += weight;
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

  // second_moment: [d, d], mean of query query^T. Cost: some 10 d^3.
  VectorCorrection(std::vector<double> second_moment, std::size_t dimension)
      : dimension_(dimension), vectors_(dimension * dimension), values_(dimension) {
    diagonalise(second_moment);
    for (const double value : values_) trace_ += std::max(value, 0.0);
  }

  // delta = damping (ridge trace(M) I + expected M)^-1 residual, so that the prior deviation of
  // query . delta is 1 / sqrt(ridge) for a query of average length. residual, delta: [d].
  void solve(std::span<const float> residual, double expected,
             std::span<float> delta) const noexcept {
    std::fill(delta.begin(), delta.end(), 0.0f);
    if (!(trace_ > 0)) return;
    for (std::size_t e = 0; e < dimension_; ++e) {
      const double* vector = vectors_.data() + e * dimension_;
      double projection = 0;
      for (std::size_t c = 0; c < dimension_; ++c)
        projection += vector[c] * static_cast<double>(residual[c]);
      const double step =
          damping * projection / (ridge * trace_ + expected * std::max(values_[e], 0.0));
      for (std::size_t c = 0; c < dimension_; ++c) delta[c] += static_cast<float>(step * vector[c]);
    }
  }

 private:
  // Cyclic Jacobi rotations (Golub and Van Loan, 8.5); rows of vectors_ are the eigenvectors.
  void diagonalise(std::vector<double>& a) {
    const std::size_t n = dimension_;
    for (std::size_t i = 0; i < n; ++i) vectors_[i * n + i] = 1;
    const auto off_diagonal = [&] {
      double sum = 0;
      for (std::size_t p = 0; p < n; ++p)
        for (std::size_t q = p + 1; q < n; ++q) sum += a[p * n + q] * a[p * n + q];
      return sum;
    };
    double diagonal = 0;
    for (std::size_t i = 0; i < n; ++i) diagonal += a[i * n + i] * a[i * n + i];
    for (int sweep = 0; sweep < 30 && off_diagonal() > 1e-14 * diagonal; ++sweep) {
      for (std::size_t p = 0; p < n; ++p) {
        for (std::size_t q = p + 1; q < n; ++q) {
          if (a[p * n + q] == 0) continue;
          const double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
          const double t =
              (theta < 0 ? -1.0 : 1.0) / (std::abs(theta) + std::sqrt(theta * theta + 1));
          const double cosine = 1 / std::sqrt(t * t + 1), sine = t * cosine;
          const auto rotate = [&](double& x, double& y) {
            const double old = x;
            x = cosine * old - sine * y;
            y = sine * old + cosine * y;
          };
          for (std::size_t k = 0; k < n; ++k) rotate(a[k * n + p], a[k * n + q]);
          for (std::size_t k = 0; k < n; ++k) rotate(a[p * n + k], a[q * n + k]);
          for (std::size_t k = 0; k < n; ++k) rotate(vectors_[p * n + k], vectors_[q * n + k]);
        }
      }
    }
    for (std::size_t i = 0; i < n; ++i) values_[i] = a[i * n + i];
  }

  std::size_t dimension_;
  std::vector<double> vectors_, values_;
  double trace_ = 0;
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

  // Probability that the pool wins an exploring slot; `logit` as in SlotChoice::pool_logit.
  double win(double logit) const noexcept { return 1.0 / (1.0 + std::exp(-(logit + handicap_))); }

  // ranking: best first by u, distinct, all items that may stand on a slate of `count` without
  // exploration; pool: l of each item, ascending by item, distinct; values: [pool] for
  // SlotChoice::pool_value, or empty. `taken` has a bit an item, all zero, and is left so. Replaces
  // `choices`: `count`, or as many as there are items. Cost: O(ranking + count x pool).
  void choose(std::span<const ScoredItem> ranking, std::span<const ScoredItem> pool,
              std::span<const float> values, std::size_t count, const CounterRandom& random,
              ItemMask& taken, std::vector<SlotChoice>& choices) {
    choices.clear();
    if (weight_ == 0) pool = {};
    values_ = pool.empty() ? std::span<const float>{} : values;
    open_.assign(pool.size(), 1);
    remaining_ = pool.size();
    weights_.resize(pool.size());
    weigh(pool);
    std::size_t next = 0;
    while (choices.size() < count) {
      while (next < ranking.size() && taken.test(ranking[next].item)) ++next;
      const bool has_best = next < ranking.size();
      if (!has_best && remaining_ == 0) break;
      if (remaining_ == 0) {
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
      const bool explored = which < explore;
      const std::size_t j = explored ? draw(where) : position(pool, ranking[next].item);
      const ScoredItem pick = explored ? pool[j] : ranking[next];
      const bool best = has_best && pick.item == ranking[next].item;
      const double share = j < pool.size() ? static_cast<double>(weights_[j]) / total_ : 0.0;
      choices.push_back({pick, has_best ? ranking[next] : pick, explored,
                         static_cast<float>(explore * share + (best ? 1.0 - explore : 0.0)),
                         static_cast<float>(share), static_cast<float>(logit),
                         static_cast<float>(value_ / total_)});
      taken.set(pick.item);
      if (j < pool.size()) remove(pool, j);
    }
    for (const SlotChoice& choice : choices) taken.reset(choice.pick.item);
  }

 private:
  // Weights relative to the largest l of the items that are left.
  void weigh(std::span<const ScoredItem> pool) {
    largest_ = -std::numeric_limits<float>::infinity();
    for (std::size_t j = 0; j < open_.size(); ++j)
      if (open_[j]) largest_ = std::max(largest_, pool[j].score);
    for (std::size_t j = 0; j < open_.size(); ++j)
      weights_[j] = open_[j] ? std::exp((pool[j].score - largest_) / temperature_) : 0.0f;
    add_up();
  }

  void add_up() {
    total_ = value_ = 0;
    blocks_.clear();
    for (std::size_t begin = 0; begin < weights_.size(); begin += block) {
      const std::size_t end = std::min(begin + block, weights_.size());
      double sum = 0;
      for (std::size_t j = begin; j < end; ++j) sum += static_cast<double>(weights_[j]);
      blocks_.push_back(sum);
      total_ += sum;
    }
    for (std::size_t j = 0; j < values_.size(); ++j)
      value_ += static_cast<double>(weights_[j]) * static_cast<double>(values_[j]);
  }

  void remove(std::span<const ScoredItem> pool, std::size_t j) {
    const auto weight = static_cast<double>(weights_[j]);
    open_[j] = 0;
    weights_[j] = 0;
    --remaining_;
    blocks_[j / block] -= weight;
    total_ -= weight;
    if (!values_.empty()) value_ -= weight * static_cast<double>(values_[j]);
    // A sum that lost most of itself is left with rounding errors.
    if (weight > total_) add_up();
    if (total_ < 1e-20) weigh(pool);
  }

  std::size_t draw(double where) const noexcept {
    double at = where * total_;
    std::size_t b = 0;
    while (b + 1 < blocks_.size() && at >= blocks_[b]) at -= blocks_[b++];
    // Where rounding leaves nothing in the block that was reached, the next item with weight.
    std::size_t last = weights_.size();
    for (std::size_t j = b * block; j < weights_.size(); ++j) {
      if (!(weights_[j] > 0)) continue;
      last = j;
      at -= static_cast<double>(weights_[j]);
      if (at < 0) return j;
    }
    while (last == weights_.size() || !(weights_[last] > 0)) --last;
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
  std::vector<float> weights_;  // softmax numerators of the pool, 0 where taken
  std::vector<double> blocks_;  // their sums over blocks
  std::vector<char> open_;
  std::span<const float> values_;
  std::size_t remaining_ = 0;
  float largest_ = 0;
  double total_ = 0, value_ = 0;  // sums over weights_, of weights_ x values_
};

// ============================================================================================
// Room 16: recommender. Owns users and sessions and the catalogue as feedback has shaped it, and
// answers requests. Uses all earlier rooms.
// ============================================================================================

// Why an item stands in a slate.
enum class Reason : std::uint8_t {
  relevance,    // the model's score for this user, with what feedback taught
  exploration,  // drawn from the items with little feedback
  popular,      // nothing is known of this user: most interactions first
  unknown,      // rank() only: not in the catalogue, so it could not be ranked
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
  }
  return "";
}

// `item` is valid as long as the slate (which holds the model) or, from rank(), the caller's list.
struct Pick {
  std::string_view item;
  float
      score;  // u, see Recommender; popular: share of all interactions, times what feedback taught
  Reason reason;
  float propensity = 1;  // probability of this pick at its place, given the picks above it
};

struct Slate {
  std::vector<Pick> items;
  std::string id;         // the recommendation id; empty with feedback off, and from rank()
  double propensity = 1;  // probability of the whole slate: the product over its picks
  std::shared_ptr<const Model> model;
};

struct Interaction {
  std::string_view user = {};     // empty for an anonymous visitor, who then needs a session
  std::string_view session = {};  // with a user: this session's events become the user's
  std::string_view item = {};
  std::string_view event_type = {};
  std::optional<std::int64_t> timestamp = {};  // Unix seconds; the system clock where missing
  // Slate::id of the slate that the event answers: without `impressions`, all its picks count as
  // seen. An event without it is attributed to the user's remembered impression of the item.
  std::string_view recommendation_id = {};
  // The items that were shown, first place first; what they say wins over the recommendation id.
  std::span<const std::string_view> impressions = {};
  std::string_view event_id = {};  // the same id of the same user counts once
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
};

// An item that enters the catalogue at the next update.
struct NewItem {
  std::string_view item = {};
  std::optional<std::int64_t> creation_timestamp = {};  // the time of the call where missing
  // Name and value of metadata fields, categories separated by '|'.
  std::vector<std::pair<std::string_view, std::string_view>> fields = {};
};

struct Request {
  std::string_view user = {};
  std::string_view session = {};
  std::uint32_t count = 25;         // [1, 10000]
  bool exclude_interacted = false;  // leave out the items of the user's remembered events
  // At most Model::item_count() bits, items beyond its size are left out; null: every item.
  const ItemMask* eligible = nullptr;
  std::optional<std::int64_t> timestamp = {};  // Unix seconds; the system clock where missing
};

// What a pick's score is made of. In units of score: score = relevance + quality + taste -
// discount.
struct Explanation {
  float score;                // u
  float relevance;            // h . v + b of the model; without events, log share of interactions
  float quality;              // m: more or less chosen than the model expects, over all users
  float taste;                // h . delta + g . v: by users like this one, and by this user
  float discount;             // for impressions that this user ignored
  float uncertainty;          // standard deviation of the log of the item's quality
  double positive, expected;  // decayed counters: events, and what the model expected
  std::optional<std::int64_t> age;  // seconds, to the latest interaction of all
  bool explorable;                  // in the pool of items with little feedback
};

struct RecommenderOptions {
  std::uint32_t history_length = 200;  // events remembered a user, [1, 65535]
  std::uint64_t max_users =
      10'000'000;  // users and sessions; the least recently used go. [64, 2^40]
  // Probability that a place of a slate may go to an item with little feedback, [0, 1].
  float exploration_weight = 0.3f;
  // Older items are not explored, > 0. Age is counted from an item's creation (where unknown, its
  // first interaction) to the latest interaction of all.
  std::chrono::seconds exploration_item_age_cut_off = std::chrono::days{30};
  // Learn from impressions. Off: the slate is the model's own ranking, without exploration, which
  // could not end, and has no id.
  bool feedback = true;
  // Event types that count as a choice of the item; empty: all of them.
  std::vector<std::string> positive_event_types = {};
  // Probability that a user looks at the first, second, ... place, each in (0, 1]; the last holds
  // for all further ones. Empty: 1 / log2(place + 1), the discount of DCG (Jarvelin, Kekalainen
  // 2002).
  std::vector<float> examination = {};
  // How long update() waits for the next record or recommend to run it again; 0: never. [0, 2^32]
  std::chrono::seconds update_interval = std::chrono::hours{2};
  std::uint32_t remembered_slates = 65'536;                  // [1, 2^28]
  std::chrono::seconds slate_expiry = std::chrono::days{1};  // > 0
  std::uint64_t seed = 0;  // of exploration: the same seed, calls and timestamps, the same slates
  // Makes recommendation ids unforgeable. Missing: taken from the system's random source.
  std::optional<std::array<std::uint64_t, 2>> recommendation_key = {};
  // Called for every impression and positive event, on the recording thread, which holds no lock.
  std::function<void(const LogEntry&)> log = {};
  // Look up what each item contributes to the first GRU's gates: a shorter step for 12 bytes x
  // items x hidden dimension (padded to 16) of memory. See Encoder::looks_up_gates for which
  // programs.
  bool gate_lookup = false;
  // The kernels to compute with, named as Recommender::instruction_set() does; they must be in this
  // program and run on this processor. Empty: kernels::chosen(), the best, or with
  // personalize::kernels what the environment variable PERSONALIZE_KERNELS names.
  std::string instruction_set = {};
};

// Serves a model to any number of threads: every member function may be called at any time from
// any thread. Users are spread over 64 locks; scoring runs outside of them.
//
// The ranking is by u = h . v + b + (h . delta + m - rho ignored) / slope: the model's score and,
// with feedback on, what impressions taught (room 12) in units of the score. rho = 0.4 (impression
// discounting: Lee et al. 2014). With feedback on, h is the encoder's query plus the user's leaning
// g, for the encoder sees what was chosen but not what was passed over: each impression y of an
// item moves
//   g by leaning_gain slope (y - p) v / mean |v|^2,
// y: 1 if it was chosen, else 0; p: positive events expected by all that is known, at most 1. This
// is a step of constant gain up the log likelihood, as if g . v varied by leaning_gain about 0 for
// an item of usual length. Each event of the user moves the encoder's state, and g forgets
// leaning_forgotten of itself.
class Recommender {
 public:
  // Errors (invalid_argument): an option outside its stated range.
  static Result<Recommender> create(std::shared_ptr<const Model> model,
                                    const RecommenderOptions& options = {}) {
    return detail::catching_bad_alloc([&]() -> Result<Recommender> {
      if (!model) return Error{Errc::invalid_argument, "the model is null"};
      if (auto checked = check(options); !checked) return checked.error();
      RecommenderOptions chosen = options;
      if (!chosen.feedback) chosen.exploration_weight = 0;
      if (!chosen.recommendation_key) {
        chosen.recommendation_key = random_key();
        if (!chosen.recommendation_key)
          return Error{
              Errc::io,
              "the system gives no random bytes; set RecommenderOptions::recommendation_key"};
      }
      const auto table = find_kernels(options.instruction_set);
      if (!table) return table.error();
      Recommender recommender(
          std::make_unique<State>(std::move(model), std::move(chosen), **table));
      const std::int64_t latest = recommender.state_->latest;
      if (auto built = recommender.rebuild(latest == no_timestamp ? 0 : latest); !built)
        return built.error();
      return recommender;
    });
  }

  // Advances the user's state by one event; O(1) in the length of the history. With a
  // recommendation id or impressions, also counts what was seen and chosen: O(items shown).
  // Errors (invalid_argument; nothing is changed): no user and no session, an id of over 256 bytes,
  // over 10,000 impressions. Where both are given, the session's earlier events become the user's
  // first.
  Result<Recorded> record(const Interaction& event) {
    return detail::catching_bad_alloc([&]() -> Result<Recorded> {
      if (auto checked = check_ids(event.user, event.session); !checked) return checked.error();
      if (auto checked = check_impressions(event.impressions); !checked) return checked.error();
      const std::int64_t timestamp = event.timestamp.value_or(system_seconds());
      if (auto updated = update_if_due(timestamp); !updated) return updated.error();
      const Key key{event.user, event.session};
      Shard& shard = shard_of(event.user, event.session);
      EventId id{shard, event.event_id, key};
      if (id.is_known()) return Recorded::duplicate;
      if (!event.user.empty() && !event.session.empty()) merge(event.session, event.user);
      const auto catalogue = state_->current();
      const auto item = catalogue->model->find_item(event.item);
      // All memory is taken before anything is counted.
      UserLease lease{*this, *catalogue, shard, key};
      if (item) lease.prepare(1, 0, 0);
      Recorded recorded = Recorded::learned;
      if (state_->options.feedback)
        recorded = learn_from(
            *catalogue, {event.user, event.session, event.recommendation_id, event.impressions, {}},
            timestamp, is_positive(event.event_type) ? item : std::nullopt);
      id.keep();
      if (!item) return Recorded::unknown_item;
      raise(state_->latest, timestamp);
      const auto type = catalogue->model->parts().event_types.find(event.event_type);
      const std::lock_guard lock{shard.mutex};
      advance(*catalogue, shard, user_in(*catalogue, shard, key),
              {*item, type.value_or(no_event_type), timestamp});
      return recorded;
    });
  }

  // Counts items as seen without an event. Each pick of a slate counts once.
  // Errors (invalid_argument; nothing is changed): no user and no session, neither a recommendation
  // id nor items, an id of over 256 bytes, over 10,000 items.
  Result<Recorded> record_impression(const Impression& impression) {
    return detail::catching_bad_alloc([&]() -> Result<Recorded> {
      if (auto checked = check_ids(impression.user, impression.session); !checked)
        return checked.error();
      if (auto checked = check_impressions(impression.items); !checked) return checked.error();
      if (impression.recommendation_id.empty() && impression.items.empty())
        return Error{Errc::invalid_argument,
                     "record_impression needs a recommendation id or the items shown"};
      const std::int64_t timestamp = impression.timestamp.value_or(system_seconds());
      if (auto updated = update_if_due(timestamp); !updated) return updated.error();
      if (!state_->options.feedback) return Recorded::learned;
      return learn_from(*state_->current(), impression, timestamp, std::nullopt);
    });
  }

  // The best `count` items for the user into `slate`, whose memory is reused; fewer where fewer are
  // eligible. One pass over the catalogue and, with exploration, O(count x pool). A user without
  // events gets popular items. Errors (invalid_argument): no user and no session, an id of over 256
  // bytes, a count or a mask outside its range.
  Result<void> recommend(const Request& request, Slate& slate) {
    return detail::catching_bad_alloc([&]() -> Result<void> {
      if (auto checked = check_request(request); !checked) return checked;
      const std::int64_t timestamp = request.timestamp.value_or(system_seconds());
      if (auto updated = update_if_due(timestamp); !updated) return updated;
      const auto catalogue = state_->current();
      if (auto checked = check_mask(*catalogue, request); !checked) return checked;
      Asked asked{*this, *catalogue, request, timestamp};
      find_best(*catalogue, asked.known, asked.best(), asked.eligibility, *asked.scratch);
      answer(*catalogue, asked, slate);
      return {};
    });
  }

  // slates[i] for requests[i], each the same as alone but for an update that falls due: it comes
  // before all of them. Known users share a pass over the catalogue, 32 at a time, which takes a
  // fraction of the time of one by one, and the request memory of 32 threads, some 5 bytes an item
  // each, which is kept for later calls. Errors as above, and invalid_argument where there are more
  // requests than slates; where memory runs out on the way, the slates that were not reached are
  // empty.
  Result<void> recommend(std::span<const Request> requests, std::span<Slate> slates) {
    return detail::catching_bad_alloc([&]() -> Result<void> {
      if (slates.size() < requests.size())
        return Error{Errc::invalid_argument, "there are more requests than slates"};
      for (const Request& request : requests)
        if (auto checked = check_request(request); !checked) return checked;
      const std::int64_t now = system_seconds();
      for (const Request& request : requests)
        if (auto updated = update_if_due(request.timestamp.value_or(now)); !updated) return updated;
      const auto catalogue = state_->current();
      for (const Request& request : requests)
        if (auto checked = check_mask(*catalogue, request); !checked) return checked;
      for (std::size_t i = 0; i < requests.size(); ++i) clear(slates[i]);
      for (std::size_t begin = 0; begin < requests.size(); begin += asked_together)
        recommend_together(
            *catalogue, requests.subspan(begin, std::min(asked_together, requests.size() - begin)),
            slates.subspan(begin), now);
      return {};
    });
  }

  Result<Slate> recommend(const Request& request) {
    Slate slate;
    if (auto done = recommend(request, slate); !done) return done.error();
    return slate;
  }

  // Orders the given items for the user, best first, without exploration. Items that are not in the
  // catalogue, not eligible or excluded come last, in the given order, with reason unknown and
  // score 0. Request::count is not used.
  Result<void> rank(const Request& request, std::span<const std::string_view> items, Slate& slate) {
    return detail::catching_bad_alloc([&]() -> Result<void> {
      if (auto checked = check_ids(request.user, request.session); !checked) return checked;
      const auto catalogue = state_->current();
      ScratchLease scratch{*state_, *catalogue};
      if (auto checked = check_mask(*catalogue, request); !checked) return checked;
      const bool known = read_user(*catalogue, request,
                                   request.timestamp.value_or(system_seconds()), nullptr, *scratch);
      const Eligibility eligibility = restrict_to(*catalogue, request, *scratch);
      clear(slate);
      slate.model = catalogue->model;
      scratch->top.clear();
      for (std::uint32_t position = 0; position < items.size(); ++position) {
        const auto item = catalogue->model->find_item(items[position]);
        if (item && eligibility.test(*item))
          scratch->top.push_back({position, score(*catalogue, known, *item, *scratch)});
      }
      std::sort(scratch->top.begin(), scratch->top.end(), ranks_before);
      for (const ScoredItem& scored : scratch->top)
        slate.items.push_back({items[scored.item], shown_score(known, scored.score),
                               known ? Reason::relevance : Reason::popular});
      for (const std::string_view id : items) {
        const auto item = catalogue->model->find_item(id);
        if (!item || !eligibility.test(*item)) slate.items.push_back({id, 0.0f, Reason::unknown});
      }
      return {};
    });
  }

  // What makes up an item's score for this user now. Errors: unknown_item; as recommend.
  Result<Explanation> explain(const Request& request, std::string_view id) {
    return detail::catching_bad_alloc([&]() -> Result<Explanation> {
      if (auto checked = check_ids(request.user, request.session); !checked) return checked.error();
      const std::int64_t timestamp = request.timestamp.value_or(system_seconds());
      const auto catalogue = state_->current();
      const auto item = catalogue->model->find_item(id);
      if (!item)
        return Error{Errc::unknown_item, "'" + std::string(id) + "' is not in the catalogue"};
      ScratchLease scratch{*state_, *catalogue};
      const bool known = read_user(*catalogue, request, timestamp, nullptr, *scratch);
      const ItemFeedback counted = feedback_of(*catalogue, *item, timestamp);
      Explanation parts{};
      parts.score = score(*catalogue, known, *item, *scratch);
      parts.discount = scratch->discount(*item);
      parts.quality = catalogue->quality.empty() ? 0.0f : catalogue->quality[*item];
      parts.taste =
          known ? taste(*catalogue, *item, scratch->query) + leaning_of(*catalogue, *item, *scratch)
                : 0.0f;
      parts.relevance = parts.score + parts.discount - parts.quality - parts.taste;
      parts.uncertainty = posterior(prior_of(*catalogue, *item), counted).deviation;
      parts.positive = counted.positive;
      parts.expected = counted.expected;
      const std::int64_t created = creation(catalogue->model->parts().statistics[*item]);
      const std::int64_t latest = state_->latest.load(std::memory_order_relaxed);
      if (created != no_timestamp && latest != no_timestamp) parts.age = age(created, latest);
      parts.explorable = std::any_of(
          catalogue->pool.begin(), catalogue->pool.end(),
          [&](const PoolItem& p) { return p.item == *item && young(p.created, latest); });
      return parts;
    });
  }

  // The item enters the catalogue, or is changed in it, at the next update: its vector from its
  // metadata and the mean difference of similar items from theirs. The vector of an item that the
  // model was trained on stays as it is. Errors (invalid_argument): an id of 0 or over 256 bytes.
  Result<void> put_item(const NewItem& item) {
    if (item.item.empty() || item.item.size() > max_id_bytes)
      return Error{Errc::invalid_argument, "an item id has 1 to 256 bytes"};
    return detail::catching_bad_alloc([&]() -> Result<void> {
      PendingItem pending{
          std::string(item.item), item.creation_timestamp.value_or(system_seconds()), {}};
      for (const auto& [name, value] : item.fields) pending.fields.emplace_back(name, value);
      const std::lock_guard lock{state_->pending_mutex};
      state_->pending.push_back(std::move(pending));
      return {};
    });
  }

  // Takes in new items and what impressions taught since the last time. Readers go on with the old
  // catalogue until the new one is complete. record and recommend call it when
  // RecommenderOptions::update_interval has passed by their timestamps and there is something new.
  // Cost: a few passes over the items, and some 10 d^3.
  // Errors: what Model::from_parts says of the new items; the old catalogue stays.
  Result<void> update(std::optional<std::int64_t> now = {}) {
    const std::int64_t timestamp = now.value_or(system_seconds());
    const std::lock_guard lock{state_->update_mutex};
    state_->next_update.store(later(timestamp, state_->options.update_interval.count()),
                              std::memory_order_relaxed);
    return detail::catching_bad_alloc([&] { return rebuild(timestamp); });
  }

  // Makes an anonymous session's events the user's own, after those the user already has, and
  // forgets the session. False where there is no such session.
  Result<bool> merge_session(std::string_view session, std::string_view user) {
    if (session.empty() || user.empty())
      return Error{Errc::invalid_argument, "merge_session needs a session and a user"};
    if (auto checked = check_ids(user, session); !checked) return checked.error();
    return detail::catching_bad_alloc([&]() -> Result<bool> { return merge(session, user); });
  }

  // Forgets a user or, with an empty user, a session. False where there was none.
  bool forget(std::string_view user, std::string_view session = {}) {
    if (user.empty() && session.empty()) return false;
    Shard& shard = shard_of(user, session);
    const std::lock_guard lock{shard.mutex};
    const auto found = shard.users.find(Key{user, session}.text());
    if (found == shard.users.end()) return false;
    erase(shard, found);
    return true;
  }

  // Of the kernels in use: "avx512+vnni", "avx2+fma", "sse2", "neon", "scalar" and so on.
  const char* instruction_set() const noexcept { return state_->table.name; }

  // Users and sessions remembered now.
  std::size_t user_count() const {
    std::size_t count = 0;
    for (Shard& shard : state_->shards) {
      const std::lock_guard lock{shard.mutex};
      count += shard.users.size();
    }
    return count;
  }

  // The model with the items that updates have added.
  std::shared_ptr<const Model> model() const { return state_->current()->model; }

 private:
  static constexpr float ignored_discount = 0.4f;  // rho, in log clicks an impression
  static constexpr float leaning_gain = 0.6f, leaning_forgotten = 0.05f;
  static constexpr double explored_enough = 3;   // expected positive events
  static constexpr std::size_t max_pool = 4096;  // the newest
  static constexpr std::uint32_t normalising_items = 32;
  static constexpr std::size_t asked_together = 32;        // requests in one pass
  static constexpr std::uint64_t well_known = 10;          // interactions
  static constexpr std::size_t calibration_slates = 2048;  // the newest

  struct RememberedEvent {
    std::uint32_t item;
    std::uint32_t event_type;
    std::int64_t timestamp;
  };

  struct User {
    std::vector<float> state;              // of the encoder
    std::vector<RememberedEvent> history;  // a ring once it is full
    std::size_t oldest = 0;
    std::int64_t last_timestamp = no_timestamp;
    RecentImpressions impressions;
    std::vector<float> leaning;  // g; empty before the first impression
    std::uint64_t requests = 0;
    std::list<std::string_view>::iterator place;  // in Shard::order

    bool is_blank() const noexcept {
      return history.empty() && impressions.size() == 0 && requests == 0;
    }
  };

  // Users and sessions live in one map; the first byte keeps "u1" the user from "u1" the session.
  class Key {
   public:
    // Ids of at most max_id_bytes.
    Key(std::string_view user, std::string_view session) noexcept {
      const std::string_view id = user.empty() ? session : user;
      size_ = 1 + id.size();
      text_[0] = user.empty() ? 's' : 'u';
      std::copy(id.begin(), id.end(), text_.begin() + 1);
    }
    std::string_view text() const noexcept { return {text_.data(), size_}; }

   private:
    std::array<char, 1 + max_id_bytes> text_;
    std::size_t size_;
  };

  static std::uint64_t key_hash(const Key& key, std::uint64_t seed) noexcept {
    return xxh64(std::as_bytes(std::span(key.text())), seed);
  }

  struct KeyHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view key) const noexcept {
      return static_cast<std::size_t>(xxh64(std::as_bytes(std::span(key))));
    }
  };

  // The last 4096 hashes; all memory is taken with the first.
  class RecentIds {
   public:
    bool insert(std::uint64_t hash) {
      hash = std::max<std::uint64_t>(hash, 1);
      if (ring_.empty()) {
        std::vector<std::uint64_t> slots(slot_count), ring(capacity);
        slots_.swap(slots);
        ring_.swap(ring);
      }
      std::size_t slot = slot_of(hash);
      if (slots_[slot] != 0) return false;
      if (const std::uint64_t oldest = std::exchange(ring_[next_], hash); oldest != 0) {
        erase(oldest);
        slot = slot_of(hash);  // may have moved up
      }
      slots_[slot] = hash;
      next_ = (next_ + 1) % capacity;
      return true;
    }

    void erase(std::uint64_t hash) noexcept {
      std::size_t hole = slot_of(std::max<std::uint64_t>(hash, 1));
      if (slots_[hole] == 0) return;
      // What was pushed behind the hole moves up (linear probing: Knuth, 6.4, algorithm R).
      for (std::size_t slot = next_slot(hole); slots_[slot] != 0; slot = next_slot(slot)) {
        const std::size_t home = slots_[slot] % slot_count;
        if ((slot - home) % slot_count < (slot - hole) % slot_count) continue;
        slots_[hole] = slots_[slot];
        hole = slot;
      }
      slots_[hole] = 0;
    }

   private:
    static constexpr std::size_t capacity = 4096, slot_count = 2 * capacity;
    static_assert(std::has_single_bit(slot_count));

    static std::size_t next_slot(std::size_t slot) noexcept { return (slot + 1) % slot_count; }
    // Where the hash is, or the free slot where it would be.
    std::size_t slot_of(std::uint64_t hash) const noexcept {
      std::size_t slot = hash % slot_count;
      while (slots_[slot] != 0 && slots_[slot] != hash) slot = next_slot(slot);
      return slot;
    }

    std::vector<std::uint64_t> slots_;  // 0: free
    std::vector<std::uint64_t> ring_;   // in the order of arrival; 0: not used yet
    std::size_t next_ = 0;
  };

  struct Shard {
    std::mutex mutex;
    std::unordered_map<std::string, User, KeyHash, std::equal_to<>> users;
    std::list<std::string_view> order;  // keys, most recently used first
    RecentIds event_ids;
    Encoder::Workspace workspace;
  };

  struct PoolItem {
    std::uint32_t item;
    float bonus;  // half the deviation of the log quality, in units of score
    std::int64_t created;
  };

  // The items as one update left them; immutable once published. Quality, corrections and bonuses
  // are in units of score. u = query . vectors + biases.
  struct Catalogue {
    std::shared_ptr<const Model> model;
    std::shared_ptr<const Encoder> encoder;
    std::shared_ptr<ItemCounters> counters;
    Calibration calibration;
    GammaPrior well_known_prior{10, 1}, cold_prior{2, 1};
    Matrix vectors;                            // the model's, corrected; empty: the model's own
    std::vector<float> biases;                 // the model's, with quality and corrections
    std::vector<float> quality;                // [N], or empty without feedback
    std::vector<std::uint32_t> correction_of;  // [N], row + 1 of corrections, 0: none; or empty
    std::vector<float> corrections;            // [rows, d + 1]: delta, then a constant
    std::optional<Scorer> scorer;
    std::vector<float> popularity;       // [N], log share of interactions
    std::vector<std::uint32_t> popular;  // items by popularity and quality, best first
    std::vector<PoolItem> pool;          // ascending by item
    std::vector<float> pool_vectors, pool_biases;
    std::vector<double> second_moment;  // of the queries of reported slates
    float mean_square = 0;              // of the lengths of the model's item vectors
  };

  struct PendingItem {
    std::string item;
    std::int64_t created;
    std::vector<std::pair<std::string, std::string>> fields;
  };

  struct Scratch {
    std::vector<float> query;         // [padded(d)], h with g
    std::vector<float> leaning;       // [d], g
    std::vector<float> pull, vector;  // [d], for moving g
    Scorer::Workspace scoring;
    std::vector<std::uint32_t> interacted;
    std::vector<ScoredItem> ignored;  // item and its discount
    std::uint64_t request_number = 0;
    ItemMask eligible{0};
    // All zero between requests: items of the user's history, items placed, discounts.
    ItemMask excluded{0}, taken{0};
    std::vector<float> discounts;
    std::vector<ScoredItem> top, pool;
    std::vector<float> pool_scores, pool_expected;
    float normaliser = 0;
    SlotPolicy policy;
    std::vector<SlotChoice> choices;
    std::vector<LoggedPick> seen;
    LoggedSlate logged;

    float discount(std::uint32_t item) const noexcept {
      return ignored.empty() ? 0.0f : discounts[item];  // the array seldom is in a cache
    }
  };

  struct State {
    State(std::shared_ptr<const Model> model, RecommenderOptions chosen,
          const kernels::Table& kernel_table)
        : options(std::move(chosen)),
          table(kernel_table),
          contexts(model->dimension()),
          slates(options.feedback ? options.remembered_slates : 1, options.slate_expiry.count(),
                 *options.recommendation_key) {
      auto first = std::make_shared<Catalogue>();
      first->encoder = std::make_shared<const Encoder>(*model, table, options.gate_lookup);
      first->counters = std::make_shared<ItemCounters>(options.feedback ? model->item_count() : 0);
      for (const ItemStatistics& s : model->parts().statistics)
        if (s.last_timestamp != no_timestamp) latest = std::max(latest.load(), s.last_timestamp);
      if (options.feedback) first->mean_square = mean_square(model->parts().item_vectors);
      first->model = std::move(model);
      for (Shard& shard : shards) shard.workspace = first->encoder->make_workspace();
      catalogue = std::move(first);
    }

    std::shared_ptr<const Catalogue> current() const {
      const std::lock_guard lock{catalogue_mutex};
      return catalogue;
    }

    RecommenderOptions options;
    const kernels::Table& table;
    std::array<Shard, 64> shards;
    std::mutex scratch_mutex;
    std::size_t scratches = 0;
    std::vector<std::unique_ptr<Scratch>> idle_scratch;
    Decay decay{14 * 86'400};
    ContextSums contexts;
    SlateLog slates;
    std::atomic<bool> changed{false};                // impressions came since the last update
    std::atomic<std::int64_t> latest{no_timestamp};  // of all interactions
    std::atomic<std::int64_t> next_update{no_timestamp};
    std::mutex pending_mutex;
    std::vector<PendingItem> pending;
    std::mutex update_mutex;             // one update at a time
    mutable std::mutex catalogue_mutex;  // held to copy or replace the pointer only
    std::shared_ptr<const Catalogue> catalogue;
  };

  // Request-sized memory, taken from the idle ones, cleaned and given back.
  class ScratchLease {
   public:
    ScratchLease(State& state, const Catalogue& catalogue) : state_(state) {
      {
        const std::lock_guard lock{state.scratch_mutex};
        if (!state.idle_scratch.empty()) {
          scratch_ = std::move(state.idle_scratch.back());
          state.idle_scratch.pop_back();
        }
      }
      if (!scratch_) {
        scratch_ = std::make_unique<Scratch>();
        const std::lock_guard lock{state.scratch_mutex};
        state.idle_scratch.reserve(state.scratches + 1);  // giving it back takes no memory
        ++state.scratches;
      }
      const std::size_t items = catalogue.model->item_count();
      scratch_->query.resize(kernels::padded(catalogue.model->dimension()));
      for (std::vector<float>* each : {&scratch_->leaning, &scratch_->pull, &scratch_->vector})
        each->resize(catalogue.model->dimension());
      if (scratch_->scoring.query.empty()) scratch_->scoring = catalogue.scorer->make_workspace();
      if (scratch_->discounts.size() >= items) return;
      scratch_->excluded = scratch_->taken = ItemMask(items);
      scratch_->discounts.assign(items, 0.0f);
    }
    ScratchLease(const ScratchLease&) = delete;
    ScratchLease& operator=(const ScratchLease&) = delete;
    ~ScratchLease() {
      for (const std::uint32_t item : scratch_->interacted) scratch_->excluded.reset(item);
      for (const ScoredItem& ignored : scratch_->ignored) scratch_->discounts[ignored.item] = 0;
      for (const SlotChoice& choice : scratch_->choices) scratch_->taken.reset(choice.pick.item);
      scratch_->choices.clear();
      scratch_->interacted.clear();
      scratch_->ignored.clear();
      const std::lock_guard lock{state_.scratch_mutex};
      state_.idle_scratch.push_back(std::move(scratch_));
    }
    Scratch& operator*() noexcept { return *scratch_; }
    Scratch* operator->() noexcept { return scratch_.get(); }

   private:
    State& state_;
    std::unique_ptr<Scratch> scratch_;
  };

  // An event id, remembered for good once the event counts.
  class EventId {
   public:
    EventId(Shard& shard, std::string_view id, const Key& key) : shard_(shard) {
      if (id.empty()) return;
      hash_ = xxh64(std::as_bytes(std::span(id)), key_hash(key, 0));
      const std::lock_guard lock{shard.mutex};
      inserted_ = shard.event_ids.insert(*hash_);
    }
    EventId(const EventId&) = delete;
    EventId& operator=(const EventId&) = delete;
    ~EventId() {
      if (!inserted_) return;
      const std::lock_guard lock{shard_.mutex};
      shard_.event_ids.erase(*hash_);
    }
    bool is_known() const noexcept { return hash_ && !inserted_; }
    void keep() noexcept { inserted_ = false; }

   private:
    Shard& shard_;
    std::optional<std::uint64_t> hash_;
    bool inserted_ = false;
  };

  // Makes sure of a user and of the memory for what will be recorded. A user who was added and had
  // nothing recorded goes again.
  class UserLease {
   public:
    UserLease(Recommender& recommender, const Catalogue& catalogue, Shard& shard, const Key& key)
        : recommender_(recommender), catalogue_(catalogue), shard_(shard), key_(key) {}
    UserLease(const UserLease&) = delete;
    UserLease& operator=(const UserLease&) = delete;
    ~UserLease() {
      if (!added_) return;
      const std::lock_guard lock{shard_.mutex};
      const auto found = shard_.users.find(key_.text());
      if (found != shard_.users.end() && found->second.is_blank()) erase(shard_, found);
      while (shard_.users.size() >
             recommender_.state_->options.max_users / recommender_.state_->shards.size())
        erase(shard_, shard_.users.find(shard_.order.back()));
    }

    // For so many more events and impressions, and for a leaning of this size.
    void prepare(std::size_t events, std::size_t impressions, std::size_t leaning) {
      const std::lock_guard lock{shard_.mutex};
      const std::size_t before = shard_.users.size();
      User& user = user_in(catalogue_, shard_, key_);
      added_ = added_ || shard_.users.size() > before;
      const std::size_t length = recommender_.state_->options.history_length;
      const std::size_t wanted = std::min(user.history.size() + events, length);
      if (wanted > user.history.capacity())
        user.history.reserve(std::min(std::max(wanted, 2 * user.history.capacity()), length));
      user.impressions.reserve(impressions);
      if (user.leaning.size() < leaning) user.leaning.resize(leaning);
    }

   private:
    Recommender& recommender_;
    const Catalogue& catalogue_;
    Shard& shard_;
    const Key& key_;
    bool added_ = false;
  };

  // The numbers that a request for a slate drew; given back where no slate came of it.
  class SlateNumbers {
   public:
    explicit SlateNumbers(Recommender& recommender) : recommender_(recommender) {}
    SlateNumbers(const SlateNumbers&) = delete;
    SlateNumbers& operator=(const SlateNumbers&) = delete;
    ~SlateNumbers() {
      for (const auto& [user, session] : drawn_) {
        if (user.empty() && session.empty()) continue;
        Shard& shard = recommender_.shard_of(user, session);
        const std::lock_guard lock{shard.mutex};
        const auto found = shard.users.find(Key{user, session}.text());
        if (found != shard.users.end() && found->second.requests > 0) --found->second.requests;
      }
    }
    // The caller holds the lock on the user's shard. At most a user's and a session's.
    std::uint64_t draw(User& of, std::string_view user, std::string_view session) noexcept {
      drawn_[user.empty() ? 1 : 0] = {user, session};
      return of.requests++;
    }
    void keep() noexcept { drawn_ = {}; }

   private:
    Recommender& recommender_;
    std::array<std::pair<std::string_view, std::string_view>, 2> drawn_{};
  };

  explicit Recommender(std::unique_ptr<State> state) : state_(std::move(state)) {}

  static std::int64_t system_seconds() noexcept {
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }

  static std::optional<detail::HashKey> random_key() {
    detail::HashKey key{};
#if PERSONALIZE_HAS_POSIX
    const std::unique_ptr<std::FILE, detail::CloseFile> file(std::fopen("/dev/urandom", "rb"));
    if (!file || std::fread(key.data(), sizeof key, 1, file.get()) != 1) return std::nullopt;
#else
    std::random_device device;
    for (std::uint64_t& word : key) word = std::uint64_t{device()} << 32 | device();
#endif
    return key;
  }

  static Result<void> check(const RecommenderOptions& options) {
    const auto error = [](const char* text) {
      return Error{Errc::invalid_argument, std::string("RecommenderOptions::") + text};
    };
    if (options.history_length < 1 || options.history_length > 65535)
      return error("history_length is outside [1, 65535]");
    if (options.max_users < 64 || options.max_users > std::uint64_t{1} << 40)
      return error("max_users is outside [64, 2^40]");
    if (!(options.exploration_weight >= 0 && options.exploration_weight <= 1))
      return error("exploration_weight is outside [0, 1]");
    if (options.exploration_item_age_cut_off.count() <= 0)
      return error("exploration_item_age_cut_off is not above 0");
    for (const float probability : options.examination)
      if (!(probability > 0 && probability <= 1))
        return error("examination has a probability outside (0, 1]");
    if (options.update_interval.count() < 0 || options.update_interval.count() > std::int64_t{1}
                                                                                     << 32)
      return error("update_interval is outside [0, 2^32] seconds");
    if (options.remembered_slates < 1 || options.remembered_slates > 1u << 28)
      return error("remembered_slates is outside [1, 2^28]");
    if (options.slate_expiry.count() <= 0) return error("slate_expiry is not above 0");
    return {};
  }

  static Result<const kernels::Table*> find_kernels(const std::string& name) {
    if (name.empty()) return &kernels::chosen();
    std::size_t count = 0;
    const kernels::Table* const* tables = kernels::available(count);
    std::string names;
    for (std::size_t t = 0; t < count; ++t) {
      if (name == tables[t]->name) return tables[t];
      names += std::string(t == 0 ? "" : ", ") + tables[t]->name;
    }
    return Error{Errc::invalid_argument, "RecommenderOptions::instruction_set is '" + name +
                                             "'; this program has for this processor: " + names};
  }

  static Result<void> check_ids(std::string_view user, std::string_view session) {
    if (user.empty() && session.empty())
      return Error{Errc::invalid_argument, "neither a user nor a session is given"};
    if (user.size() > max_id_bytes || session.size() > max_id_bytes)
      return Error{Errc::invalid_argument, "a user or session id has more than 256 bytes"};
    return {};
  }

  static Result<void> check_impressions(std::span<const std::string_view> items) {
    if (items.size() > 10'000)
      return Error{Errc::invalid_argument, "more than 10000 impressions are given"};
    return {};
  }

  static Result<void> check_mask(const Catalogue& catalogue, const Request& request) {
    if (request.eligible && request.eligible->size() > catalogue.model->item_count())
      return Error{Errc::invalid_argument,
                   "Request::eligible has " + std::to_string(request.eligible->size()) +
                       " bits, the model " + std::to_string(catalogue.model->item_count()) +
                       " items"};
    return {};
  }

  static void raise(std::atomic<std::int64_t>& highest, std::int64_t value) noexcept {
    std::int64_t old = highest.load(std::memory_order_relaxed);
    while (old < value && !highest.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
    }
  }

  static std::int64_t later(std::int64_t timestamp, std::int64_t seconds) noexcept {
    return timestamp > std::numeric_limits<std::int64_t>::max() - seconds
               ? std::numeric_limits<std::int64_t>::max()
               : timestamp + seconds;
  }

  // Unsigned subtraction: hostile timestamps at both ends of the range must not overflow.
  static std::int64_t age(std::int64_t created, std::int64_t latest) noexcept {
    if (created >= latest) return 0;
    const std::uint64_t seconds =
        static_cast<std::uint64_t>(latest) - static_cast<std::uint64_t>(created);
    return static_cast<std::int64_t>(
        std::min<std::uint64_t>(seconds, std::numeric_limits<std::int64_t>::max()));
  }

  bool young(std::int64_t created, std::int64_t latest) const noexcept {
    return created != no_timestamp && latest != no_timestamp &&
           age(created, latest) <= state_->options.exploration_item_age_cut_off.count();
  }

  static std::int64_t creation(const ItemStatistics& s) noexcept {
    return s.creation_timestamp != no_timestamp ? s.creation_timestamp : s.first_timestamp;
  }

  bool is_positive(std::string_view event_type) const noexcept {
    const auto& types = state_->options.positive_event_types;
    return types.empty() || std::find(types.begin(), types.end(), event_type) != types.end();
  }

  float examination(std::size_t place) const noexcept {
    const auto& chosen = state_->options.examination;
    if (chosen.empty()) return 1.0f / std::log2(static_cast<float>(place) + 2.0f);
    return chosen[std::min(place, chosen.size() - 1)];
  }

  ItemFeedback feedback_of(const Catalogue& catalogue, std::uint32_t item,
                           std::int64_t timestamp) const noexcept {
    if (item >= catalogue.counters->size()) return {};
    const DecayMoment moment = state_->decay.at(timestamp);
    return {catalogue.counters->value(ItemCounters::Kind::positive, item, moment),
            catalogue.counters->value(ItemCounters::Kind::expected, item, moment)};
  }

  const GammaPrior& prior_of(const Catalogue& catalogue, std::uint32_t item) const noexcept {
    return catalogue.model->parts().statistics[item].interactions < well_known
               ? catalogue.cold_prior
               : catalogue.well_known_prior;
  }

  static const float* correction(const Catalogue& catalogue, std::uint32_t item) noexcept {
    if (catalogue.correction_of.empty() || catalogue.correction_of[item] == 0) return nullptr;
    return catalogue.corrections.data() +
           (catalogue.correction_of[item] - std::size_t{1}) * (catalogue.model->dimension() + 1);
  }

  static const Matrix& vectors_of(const Catalogue& catalogue) noexcept {
    return catalogue.vectors.empty() ? catalogue.model->parts().item_vectors : catalogue.vectors;
  }

  // What the user's leaning adds to the item's score; the query holds it as well.
  static float leaning_of(const Catalogue& catalogue, std::uint32_t item, Scratch& scratch) {
    catalogue.model->parts().item_vectors.row(item, scratch.vector);
    return std::inner_product(scratch.vector.begin(), scratch.vector.end(), scratch.leaning.begin(),
                              0.0f);
  }

  static float mean_square(const Matrix& vectors) {
    std::vector<float> row(vectors.columns());
    double sum = 0;
    for (std::size_t i = 0; i < vectors.rows(); ++i) {
      vectors.row(i, row);
      sum += static_cast<double>(std::inner_product(row.begin(), row.end(), row.begin(), 0.0f));
    }
    return vectors.rows() == 0 ? 0.0f
                               : static_cast<float>(sum / static_cast<double>(vectors.rows()));
  }

  // What this user's likes add to the item's score.
  static float taste(const Catalogue& catalogue, std::uint32_t item,
                     std::span<const float> query) noexcept {
    const float* row = correction(catalogue, item);
    if (!row) return 0;
    const std::size_t d = catalogue.model->dimension();
    return std::inner_product(row, row + d, query.begin(), row[d]);
  }

  // u before the discount.
  static float undiscounted(const Catalogue& catalogue, bool known, std::uint32_t item,
                            const Scratch& scratch) noexcept {
    if (known) return catalogue.scorer->score(scratch.query, item);
    return catalogue.popularity[item] +
           (catalogue.quality.empty() ? 0.0f : catalogue.quality[item]);
  }

  static float score(const Catalogue& catalogue, bool known, std::uint32_t item,
                     const Scratch& scratch) noexcept {
    return undiscounted(catalogue, known, item, scratch) - scratch.discount(item);
  }

  // A pick's u. In the pool, its score has the bonus as well.
  static float exploitation_score(const Scratch& scratch, const SlotChoice& choice) noexcept {
    if (!choice.explored) return choice.pick.score;
    const auto found = std::lower_bound(
        scratch.pool.begin(), scratch.pool.end(), choice.pick.item,
        [](const ScoredItem& scored, std::uint32_t item) { return scored.item < item; });
    return scratch.pool_scores[static_cast<std::size_t>(found - scratch.pool.begin())];
  }

  // As users see it: without events, the share of interactions and not its logarithm.
  static float shown_score(bool known, float u) noexcept { return known ? u : std::exp(u); }

  // Positive events expected of an examined impression with score u.
  static float value_of(const Catalogue& catalogue, float u, const Scratch& scratch) noexcept {
    return std::exp(std::min(
        catalogue.calibration.slope * (u - scratch.normaliser) + catalogue.calibration.intercept,
        3.0f));
  }

  // A request and what was found out about its user.
  struct Asked {
    Asked(Recommender& recommender, const Catalogue& catalogue, const Request& asked,
          std::int64_t time)
        : request(asked),
          timestamp(time),
          numbers(recommender),
          scratch(*recommender.state_, catalogue),
          known(recommender.read_user(catalogue, request, timestamp, &numbers, *scratch)),
          eligibility(restrict_to(catalogue, request, *scratch)) {}
    std::size_t best() const noexcept {
      return std::max<std::size_t>(request.count, normalising_items);
    }

    const Request& request;
    std::int64_t timestamp;
    SlateNumbers numbers;
    ScratchLease scratch;
    bool known;
    Eligibility eligibility;
  };

  static Result<void> check_request(const Request& request) {
    if (request.count < 1 || request.count > 10'000)
      return Error{Errc::invalid_argument, "Request::count is outside [1, 10000]"};
    return check_ids(request.user, request.session);
  }

  void recommend_together(const Catalogue& catalogue, std::span<const Request> requests,
                          std::span<Slate> slates, std::int64_t now) {
    std::array<std::optional<Asked>, asked_together> all;
    std::array<Scorer::Query, asked_together> queries;
    std::size_t known = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const std::int64_t timestamp = requests[i].timestamp.value_or(now);
      Asked& asked = all[i].emplace(*this, catalogue, requests[i], timestamp);
      Scratch& scratch = *asked.scratch;
      if (asked.known)
        queries[known++] = {scratch.query, asked.best() + scratch.ignored.size(), asked.eligibility,
                            &scratch.top};
      else
        find_best(catalogue, false, asked.best(), asked.eligibility, scratch);
    }
    catalogue.scorer->top_k(std::span(queries).first(known), all[0]->scratch->scoring);
    for (std::size_t i = 0; i < requests.size(); ++i) answer(catalogue, *all[i], slates[i]);
  }

  static void clear(Slate& slate) noexcept {
    slate.items.clear();
    slate.id.clear();
    slate.propensity = 1;
  }

  // The slate, once scratch.top is found.
  void answer(const Catalogue& catalogue, Asked& asked, Slate& slate) {
    Scratch& scratch = *asked.scratch;
    const Key key{asked.request.user, asked.request.session};
    normalise(catalogue, asked.known, scratch);
    collect_pool(catalogue, asked.known, asked.eligibility, scratch);
    SlotPolicy& policy = scratch.policy;
    policy.configure(state_->options.exploration_weight, exploration_temperature,
                     catalogue.calibration.slope);
    const CounterRandom random{key_hash(key, state_->options.seed), scratch.request_number};
    policy.choose(scratch.top, scratch.pool, scratch.pool_expected, asked.request.count, random,
                  scratch.taken, scratch.choices);

    // All memory is taken before the slate is filled and the log gives up an older one.
    LoggedSlate& logged = scratch.logged;
    logged.query.clear();
    logged.picks.clear();
    if (state_->options.feedback) {
      if (asked.known) logged.query.assign(scratch.query.begin(), scratch.query.end());
      for (std::size_t place = 0; place < scratch.choices.size(); ++place)
        logged.picks.push_back(
            assess(catalogue, asked.known, place, scratch.choices[place], scratch));
      slate.id.reserve(32);
    }
    slate.items.reserve(scratch.choices.size());

    clear(slate);
    slate.model = catalogue.model;
    for (const SlotChoice& choice : scratch.choices) {
      const Reason reason = choice.explored ? Reason::exploration
                            : asked.known   ? Reason::relevance
                                            : Reason::popular;
      slate.items.push_back({catalogue.model->item_id(choice.pick.item),
                             shown_score(asked.known, exploitation_score(scratch, choice)), reason,
                             choice.propensity});
      slate.propensity *= static_cast<double>(choice.propensity);
    }
    if (state_->options.feedback)
      state_->slates.add(key.text(), asked.timestamp, slate.id, [&logged](LoggedSlate& kept) {
        kept.query.swap(logged.query);
        kept.picks.swap(logged.picks);
      });
    asked.numbers.keep();
  }

  // Fills scratch.top with the best `count` eligible items and those that may take the place of
  // ignored ones.
  static void find_best(const Catalogue& catalogue, bool known, std::size_t count,
                        const Eligibility& eligibility, Scratch& scratch) {
    const std::size_t wanted = count + scratch.ignored.size();
    if (known) {
      catalogue.scorer->top_k(scratch.query, wanted, eligibility, scratch.scoring, scratch.top);
    } else {
      scratch.top.clear();
      for (const std::uint32_t item : catalogue.popular) {
        if (scratch.top.size() == wanted) break;
        if (eligibility.test(item))
          scratch.top.push_back({item, undiscounted(catalogue, known, item, scratch)});
      }
    }
  }

  // Of scratch.top: the normaliser, and the discounts of what the user ignored.
  static void normalise(const Catalogue& catalogue, bool known, Scratch& scratch) {
    // logsumexp of the model's own scores of the best
    const auto relevance = [&](const ScoredItem& scored) {
      return scored.score - learned(catalogue, known, scored.item, scratch);
    };
    const std::size_t best = std::min<std::size_t>(scratch.top.size(), normalising_items);
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (std::size_t i = 0; i < best; ++i) largest = std::max(largest, relevance(scratch.top[i]));
    for (std::size_t i = 0; i < best; ++i) sum += std::exp(relevance(scratch.top[i]) - largest);
    scratch.normaliser = best == 0 ? 0.0f : largest + std::log(sum);
    if (scratch.ignored.empty()) return;
    for (ScoredItem& scored : scratch.top) scored.score -= scratch.discount(scored.item);
    std::sort(scratch.top.begin(), scratch.top.end(), ranks_before);
  }

  // Quality and taste: what impressions taught, in units of score.
  static float learned(const Catalogue& catalogue, bool known, std::uint32_t item,
                       const Scratch& scratch) noexcept {
    if (catalogue.quality.empty()) return 0;
    return catalogue.quality[item] + (known ? taste(catalogue, item, scratch.query) : 0.0f);
  }

  void collect_pool(const Catalogue& catalogue, bool known, const Eligibility& eligibility,
                    Scratch& scratch) const {
    scratch.pool.clear();
    scratch.pool_scores.clear();
    scratch.pool_expected.clear();
    if (!(state_->options.exploration_weight > 0) || catalogue.pool.empty()) return;
    const std::size_t items = catalogue.pool.size();
    // After the scores of the whole pool come those that are kept; the front is written last.
    scratch.pool_scores.resize(items);
    if (known) {
      state_->table.rows_vector(catalogue.pool_vectors.data(), catalogue.pool_biases.data(),
                                catalogue.model->dimension(), items, scratch.query.data(),
                                scratch.pool_scores.data());
    } else {
      for (std::size_t j = 0; j < items; ++j)
        scratch.pool_scores[j] = undiscounted(catalogue, known, catalogue.pool[j].item, scratch);
    }
    const std::int64_t latest = state_->latest.load(std::memory_order_relaxed);
    for (std::size_t j = 0; j < items; ++j) {
      const PoolItem& candidate = catalogue.pool[j];
      if (!eligibility.test(candidate.item) || !young(candidate.created, latest)) continue;
      const float u = scratch.pool_scores[j] - scratch.discount(candidate.item);
      scratch.pool_scores[scratch.pool.size()] = u;
      scratch.pool.push_back({candidate.item, u + candidate.bonus});
    }
    if (!state_->options.log) return;
    for (std::size_t j = 0; j < scratch.pool.size(); ++j)
      scratch.pool_expected.push_back(value_of(catalogue, scratch.pool_scores[j], scratch));
  }

  // What the log keeps of a pick, to learn from it once it was seen.
  LoggedPick assess(const Catalogue& catalogue, bool known, std::size_t place,
                    const SlotChoice& choice, const Scratch& scratch) const noexcept {
    const std::uint32_t item = choice.pick.item;
    const float slope = catalogue.calibration.slope, discount = scratch.discount(item);
    const float u = exploitation_score(scratch, choice);
    const float relevance = u + discount - learned(catalogue, known, item, scratch);
    LoggedPick pick;
    pick.choice = choice;
    pick.place = static_cast<std::uint32_t>(place);
    pick.relevance = relevance - scratch.normaliser;
    pick.adjustment = slope * (u - relevance);
    pick.examination = examination(place);
    pick.expected = pick.examination * value_of(catalogue, relevance - discount, scratch);
    pick.value = pick.examination * value_of(catalogue, u, scratch);
    pick.best_value = pick.examination * value_of(catalogue, choice.best.score, scratch);
    pick.choice.pool_value *= pick.examination;
    return pick;
  }

  // Counts what was shown: picks of a remembered slate (all of them where none are listed) or,
  // where there is no slate, the listed items. chosen: the item of a positive event.
  Recorded learn_from(const Catalogue& catalogue, const Impression& shown, std::int64_t timestamp,
                      std::optional<std::uint32_t> chosen) {
    if (shown.recommendation_id.empty() && shown.items.empty() &&
        !(chosen && was_shown(shown, *chosen)))
      return Recorded::learned;
    ScratchLease scratch{*state_, catalogue};
    scratch->seen.clear();
    const Key key{shown.user, shown.session};
    UserLease lease{*this, catalogue, shard_of(shown.user, shown.session), key};
    // All memory is taken before anything is counted.
    const auto prepare = [&](std::size_t picks, bool query) {
      if (query && chosen) state_->contexts.prepare(*chosen);
      if (picks > 0 || chosen) lease.prepare(0, picks, query ? catalogue.model->dimension() : 0);
    };
    std::optional<LoggedPick> positive;
    const auto listed = [&](std::uint32_t item) {
      return std::find(shown.items.begin(), shown.items.end(), catalogue.model->item_id(item)) !=
             shown.items.end();
    };
    bool has_query = false;
    const auto look_through = [&](LoggedSlate& slate) {
      has_query = !slate.query.empty();
      scratch->seen.reserve(slate.picks.size());
      prepare(slate.picks.size(), has_query);
      if (has_query)
        for (const LoggedPick& pick : slate.picks) state_->contexts.prepare(pick.choice.pick.item);
      std::copy(slate.query.begin(), slate.query.end(), scratch->query.begin());
      for (LoggedPick& pick : slate.picks) {
        const bool is_chosen = chosen == pick.choice.pick.item && !pick.positive;
        const bool is_shown = shown.items.empty() ? !slate.reported : listed(pick.choice.pick.item);
        if ((is_shown || is_chosen) && !pick.seen) {
          pick.seen = true;
          scratch->seen.push_back(pick);
        }
        if (is_chosen) {
          pick.positive = true;
          positive = pick;
        }
      }
      slate.reported = true;
    };

    SlateStatus status = SlateStatus::unknown;
    if (!shown.recommendation_id.empty()) {
      status = state_->slates.use(shown.recommendation_id, key.text(), timestamp, look_through);
      // A visitor's slate, answered after signing in.
      if (status == SlateStatus::unknown && !shown.user.empty() && !shown.session.empty())
        status = state_->slates.use(shown.recommendation_id, Key{{}, shown.session}.text(),
                                    timestamp, look_through);
    }
    if (status != SlateStatus::found) {
      has_query = read_user(catalogue, {.user = shown.user, .session = shown.session}, timestamp,
                            nullptr, *scratch);
      if (!shown.items.empty()) {
        find_best(catalogue, has_query, normalising_items, {}, *scratch);
        normalise(catalogue, has_query, *scratch);
        for (std::size_t place = 0; place < shown.items.size(); ++place) {
          const auto item = catalogue.model->find_item(shown.items[place]);
          if (!item) continue;
          SlotChoice choice;
          choice.pick = choice.best = {*item, score(catalogue, has_query, *item, *scratch)};
          scratch->seen.push_back(assess(catalogue, has_query, place, choice, *scratch));
          if (chosen == item) positive = scratch->seen.back();
        }
      } else if (chosen && was_shown(shown, *chosen)) {
        positive.emplace().choice.pick.item = *chosen;
      }
      prepare(scratch->seen.size(), has_query);
      if (has_query)
        for (const LoggedPick& pick : scratch->seen)
          state_->contexts.prepare(pick.choice.pick.item);
    }
    count(catalogue, *scratch, has_query, positive, timestamp);
    if (has_query) pull(catalogue, positive, *scratch);
    remember(catalogue, shown, *scratch, has_query, chosen, timestamp);
    if (state_->options.log && status == SlateStatus::found) {
      for (const LoggedPick& pick : scratch->seen)
        write_log(catalogue, shown, pick, timestamp, false);
      if (positive) write_log(catalogue, shown, *positive, timestamp, true);
    }
    return shown.recommendation_id.empty() || status == SlateStatus::found ? Recorded::learned
           : status == SlateStatus::expired                                ? Recorded::expired_slate
                                            : Recorded::unknown_slate;
  }

  bool was_shown(const Impression& shown, std::uint32_t item) {
    Shard& shard = shard_of(shown.user, shown.session);
    const std::lock_guard lock{shard.mutex};
    const auto found = shard.users.find(Key{shown.user, shown.session}.text());
    return found != shard.users.end() && found->second.impressions.contains(item);
  }

  void count(const Catalogue& catalogue, const Scratch& scratch, bool has_query,
             const std::optional<LoggedPick>& positive, std::int64_t timestamp) {
    const DecayMoment moment = state_->decay.at(timestamp);
    for (const LoggedPick& pick : scratch.seen) catalogue.counters->prefetch(pick.choice.pick.item);
    for (const LoggedPick& pick : scratch.seen) {
      const std::uint32_t item = pick.choice.pick.item;
      catalogue.counters->add(ItemCounters::Kind::expected, item,
                              static_cast<double>(pick.expected), moment);
      if (has_query)
        state_->contexts.add_expected(item, scratch.query, static_cast<double>(pick.expected),
                                      moment);
    }
    if (positive) {
      const std::uint32_t item = positive->choice.pick.item;
      catalogue.counters->add(ItemCounters::Kind::positive, item, 1.0, moment);
      if (has_query) state_->contexts.add_positive(item, scratch.query, moment);
    }
    if (positive || !scratch.seen.empty()) state_->changed.store(true, std::memory_order_relaxed);
  }

  // Into scratch.pull, how these impressions move the user's leaning.
  static void pull(const Catalogue& catalogue, const std::optional<LoggedPick>& positive,
                   Scratch& scratch) noexcept {
    std::fill(scratch.pull.begin(), scratch.pull.end(), 0.0f);
    if (!(catalogue.mean_square > 0)) return;
    const float gain = leaning_gain * catalogue.calibration.slope / catalogue.mean_square;
    const auto add = [&](const LoggedPick& pick, float surprise) {
      vectors_of(catalogue).row(pick.choice.pick.item, scratch.vector);
      for (std::size_t c = 0; c < scratch.pull.size(); ++c)
        scratch.pull[c] += gain * surprise * scratch.vector[c];
    };
    // A choice may be reported after its impression: y and p come apart.
    for (const LoggedPick& pick : scratch.seen) add(pick, -std::min(pick.value, 1.0f));
    if (positive) add(*positive, 1.0f);
  }

  // What was shown and not chosen is held against the item for this user.
  void remember(const Catalogue& catalogue, const Impression& shown, const Scratch& scratch,
                bool has_query, std::optional<std::uint32_t> chosen, std::int64_t timestamp) {
    if (scratch.seen.empty() && !chosen) return;
    Shard& shard = shard_of(shown.user, shown.session);
    const std::lock_guard lock{shard.mutex};
    User& user = user_in(catalogue, shard, Key{shown.user, shown.session});
    for (const LoggedPick& pick : scratch.seen)
      if (chosen != pick.choice.pick.item) user.impressions.add(pick.choice.pick.item, timestamp);
    if (chosen) user.impressions.remove(*chosen);
    // Empty for a user who was forgotten meanwhile.
    if (has_query)
      for (std::size_t c = 0; c < user.leaning.size(); ++c) user.leaning[c] += scratch.pull[c];
  }

  void write_log(const Catalogue& catalogue, const Impression& shown, const LoggedPick& pick,
                 std::int64_t timestamp, bool positive) const {
    state_->options.log({timestamp, shown.user.empty() ? shown.session : shown.user,
                         shown.recommendation_id, catalogue.model->item_id(pick.choice.pick.item),
                         pick.place + 1, positive, pick.choice, pick.value, pick.best_value});
  }

  // Runs an update where one is due by this timestamp and there is something new. Another thread
  // that is at it is not waited for.
  // Errors: out_of_memory only; the update is then due again.
  Result<void> update_if_due(std::int64_t timestamp) {
    const std::int64_t interval = state_->options.update_interval.count();
    if (interval == 0) return {};
    std::int64_t due = state_->next_update.load(std::memory_order_relaxed);
    if (due == no_timestamp) {
      state_->next_update.compare_exchange_strong(due, later(timestamp, interval),
                                                  std::memory_order_relaxed);
      return {};
    }
    if (timestamp < due) return {};
    const std::unique_lock lock{state_->update_mutex, std::try_to_lock};
    if (!lock || state_->next_update.load(std::memory_order_relaxed) != due) return {};
    state_->next_update.store(later(timestamp, interval), std::memory_order_relaxed);
    bool has_pending = false;
    {
      const std::lock_guard pending_lock{state_->pending_mutex};
      has_pending = !state_->pending.empty();
    }
    if (!has_pending && !state_->changed.load(std::memory_order_relaxed)) return {};
    auto rebuilt = detail::catching_bad_alloc([&] { return rebuild(timestamp); });
    // What is wrong with a new item is for a caller of update() to hear, not of record().
    if (rebuilt || rebuilt.error().code != Errc::out_of_memory) return {};
    state_->next_update.store(due, std::memory_order_relaxed);
    return rebuilt;
  }

  // The caller holds update_mutex. Where it fails for want of memory, everything stays as it was.
  Result<void> rebuild(std::int64_t now) {
    std::vector<PendingItem> pending;
    {
      const std::lock_guard lock{state_->pending_mutex};
      pending = state_->pending;
    }
    const auto previous = state_->current();
    auto next = std::make_shared<Catalogue>();
    next->model = previous->model;
    next->encoder = previous->encoder;
    next->counters = previous->counters;
    next->calibration = previous->calibration;
    next->second_moment = previous->second_moment;
    next->mean_square = previous->mean_square;
    const auto take_pending = [&] {
      const std::lock_guard lock{state_->pending_mutex};
      state_->pending.erase(state_->pending.begin(),
                            state_->pending.begin() + static_cast<std::ptrdiff_t>(pending.size()));
    };
    if (!pending.empty()) {
      auto model = with_items(*previous->model, pending);
      if (!model) {
        if (model.error().code != Errc::out_of_memory) take_pending();
        return model.error();
      }
      next->model = *model;
      next->encoder =
          std::make_shared<const Encoder>(**model, state_->table, state_->options.gate_lookup);
      if (state_->options.feedback)
        next->counters =
            std::make_shared<ItemCounters>(previous->counters->grown((*model)->item_count()));
    }
    const ModelParts& parts = next->model->parts();
    next->biases = parts.biases;
    const bool changed = state_->changed.exchange(false, std::memory_order_relaxed);
    auto built = detail::catching_bad_alloc([&]() -> Result<void> {
      if (next->model != previous->model) next->mean_square = mean_square(parts.item_vectors);
      if (state_->options.feedback) learn(*next, now);
      next->scorer.emplace(vectors_of(*next), next->biases,
                           Scorer::usual_query_length(*next->model), state_->table);
      order_by_popularity(*next);
      choose_pool(*next, now);
      return {};
    });
    if (!built) {
      if (changed) state_->changed.store(true, std::memory_order_relaxed);
      return built;
    }
    take_pending();
    const std::lock_guard lock{state_->catalogue_mutex};
    state_->catalogue = std::move(next);
    return {};
  }

  // The model with the pending items added; of items that were not trained, what is new replaces
  // what was.
  static Result<std::shared_ptr<const Model>> with_items(const Model& model,
                                                         const std::vector<PendingItem>& pending) {
    ModelParts parts = model.parts();
    std::vector<float> vector(model.dimension());
    for (const PendingItem& item : pending) {
      auto index = parts.item_ids.find(item.item);
      if (!index) {
        const auto added = parts.item_ids.add(item.item);
        if (!added) return added.error();
        index = *added;
        parts.item_vectors.resize_rows(*index + std::size_t{1});
        if (!parts.input_vectors.empty()) parts.input_vectors.resize_rows(*index + std::size_t{1});
        parts.biases.push_back(0);
        parts.statistics.emplace_back();
      }
      parts.statistics[*index].creation_timestamp = item.created;
      if (parts.statistics[*index].interactions > 0) continue;
      const std::vector<std::pair<std::string_view, std::string_view>> fields(item.fields.begin(),
                                                                              item.fields.end());
      model.metadata_vector(fields, vector);
      parts.biases[*index] = add_mean_residual(model.parts(), vector);
      parts.item_vectors.set_row(*index, vector);
    }
    return Model::from_parts(std::move(parts));
  }

  // Adds to `vector` the mean difference of the 16 trained items nearest to it (by cosine) from it,
  // and returns their mean bias. Looks at no more than 20,000 items, evenly chosen.
  static float add_mean_residual(const ModelParts& parts, std::span<float> vector) {
    constexpr std::size_t neighbours = 16, looked_at = 20'000;
    const std::size_t items = parts.item_ids.size(), stride = items / looked_at + 1;
    std::vector<ScoredItem> nearest;
    std::vector<float> row(vector.size());
    for (std::size_t i = 0; i < items; i += stride) {
      if (i >= parts.biases.size() || parts.statistics[i].interactions == 0) continue;
      parts.item_vectors.row(i, row);
      const float dot = std::inner_product(row.begin(), row.end(), vector.begin(), 0.0f);
      const float square = std::inner_product(row.begin(), row.end(), row.begin(), 0.0f);
      nearest.push_back({static_cast<std::uint32_t>(i), square > 0 ? dot / std::sqrt(square) : 0});
    }
    if (nearest.empty()) return 0;
    const std::size_t count = std::min(neighbours, nearest.size());
    std::partial_sort(nearest.begin(), nearest.begin() + static_cast<std::ptrdiff_t>(count),
                      nearest.end(), ranks_before);
    std::fill(vector.begin(), vector.end(), 0.0f);
    float bias = 0;
    for (std::size_t n = 0; n < count; ++n) {
      bias += parts.biases[nearest[n].item] / static_cast<float>(count);
      parts.item_vectors.row(nearest[n].item, row);
      for (std::size_t c = 0; c < vector.size(); ++c)
        vector[c] += row[c] / static_cast<float>(count);
    }
    return bias;
  }

  // Folds the counters into calibration, quality and corrections.
  void learn(Catalogue& next, std::int64_t now) const {
    const ModelParts& parts = next.model->parts();
    const std::size_t items = next.model->item_count(), d = next.model->dimension();
    std::vector<CalibrationSample> samples;
    std::vector<double> second_moment(d * d);
    double queries = 0;
    state_->slates.for_each_reported(calibration_slates, [&](const LoggedSlate& slate) {
      for (const LoggedPick& pick : slate.picks)
        if (pick.seen && !pick.choice.explored)
          samples.push_back({pick.relevance, pick.adjustment, pick.examination, pick.positive});
      if (slate.query.empty()) return;
      for (std::size_t i = 0; i < d; ++i)
        for (std::size_t j = 0; j < d; ++j)
          second_moment[i * d + j] +=
              static_cast<double>(slate.query[i]) * static_cast<double>(slate.query[j]);
      ++queries;
    });
    if (!samples.empty()) next.calibration = fit_calibration(samples, next.calibration);
    if (queries > 0) {
      for (double& value : second_moment) value /= queries;
      next.second_moment = std::move(second_moment);
    }

    std::vector<ItemFeedback> counted(items), well_known_items, cold_items;
    for (std::uint32_t i = 0; i < items; ++i) {
      counted[i] = feedback_of(next, i, now);
      if (counted[i].expected > 0)
        (parts.statistics[i].interactions < well_known ? cold_items : well_known_items)
            .push_back(counted[i]);
    }
    next.well_known_prior = fit_prior(well_known_items, next.well_known_prior);
    next.cold_prior = fit_prior(cold_items, next.cold_prior);

    // Quality counts from the mean of well-known items, whose level the calibration has in it.
    const float slope = next.calibration.slope;
    const auto level = static_cast<float>(std::log(next.well_known_prior.mean));
    next.quality.resize(items);
    for (std::uint32_t i = 0; i < items; ++i) {
      next.quality[i] = (posterior(prior_of(next, i), counted[i]).mean - level) / slope;
      next.biases[i] += next.quality[i];
    }
    if (!next.second_moment.empty()) correct_vectors(next, counted, now);
  }

  // Who likes an item: at fixed quality, its residuals are the queries where it was chosen less
  // those where its impressions let expect so. The correction is centred on the contexts in which
  // the item was shown, so that it moves the item between users and not for all of them.
  void correct_vectors(Catalogue& next, std::span<const ItemFeedback> counted,
                       std::int64_t now) const {
    const std::size_t d = next.model->dimension();
    const float slope = next.calibration.slope;
    const VectorCorrection layer(next.second_moment, d);
    next.correction_of.resize(counted.size());
    std::vector<float> residual(d), row(d);
    next.vectors = next.model->parts().item_vectors;
    state_->contexts.for_each(
        state_->decay.at(now),
        [&](std::uint32_t item, std::span<const float> positive, std::span<const float> expected) {
          if (item >= counted.size() || counted[item].expected < 0.1) return;
          const ItemFeedback& feedback = counted[item];
          const auto quality =
              std::exp(static_cast<double>(posterior(prior_of(next, item), feedback).mean));
          for (std::size_t c = 0; c < d; ++c)
            residual[c] = positive[c] - static_cast<float>(quality) * expected[c];
          const std::size_t begin = next.corrections.size();
          next.corrections.resize(begin + d + 1);
          const std::span<float> delta(next.corrections.data() + begin, d);
          layer.solve(residual, quality * feedback.expected, delta);
          float centre = 0;
          for (std::size_t c = 0; c < d; ++c) {
            delta[c] /= slope;
            centre -= delta[c] * expected[c] / static_cast<float>(feedback.expected);
          }
          next.corrections.back() = centre;
          next.correction_of[item] = static_cast<std::uint32_t>(next.corrections.size() / (d + 1));
          next.vectors.row(item, row);
          for (std::size_t c = 0; c < d; ++c) row[c] += delta[c];
          next.vectors.set_row(item, row);
          next.biases[item] += centre;
        });
  }

  static void order_by_popularity(Catalogue& next) {
    const auto& statistics = next.model->parts().statistics;
    double total = 0;
    for (const ItemStatistics& s : statistics) total += static_cast<double>(s.interactions);
    total = std::max(total, 1.0);
    next.popularity.resize(statistics.size());
    std::vector<float> u(statistics.size());
    for (std::size_t i = 0; i < statistics.size(); ++i) {
      // An item without interactions counts as half of one.
      const double share = std::max(static_cast<double>(statistics[i].interactions), 0.5) / total;
      next.popularity[i] = static_cast<float>(std::log(share));
      u[i] = next.popularity[i] + (next.quality.empty() ? 0.0f : next.quality[i]);
    }
    next.popular.resize(statistics.size());
    std::iota(next.popular.begin(), next.popular.end(), 0u);
    std::sort(next.popular.begin(), next.popular.end(), [&](std::uint32_t a, std::uint32_t b) {
      return ranks_before({a, u[a]}, {b, u[b]});
    });
  }

  void choose_pool(Catalogue& next, std::int64_t now) const {
    if (!(state_->options.exploration_weight > 0)) return;
    const auto& statistics = next.model->parts().statistics;
    const std::int64_t latest = state_->latest.load(std::memory_order_relaxed);
    for (std::uint32_t i = 0; i < statistics.size(); ++i) {
      const std::int64_t created = creation(statistics[i]);
      const ItemFeedback counted = feedback_of(next, i, now);
      if (!young(created, latest) || counted.expected >= explored_enough) continue;
      const float spread = posterior(prior_of(next, i), counted).deviation;
      next.pool.push_back({i, spread / (2 * next.calibration.slope), created});
    }
    if (next.pool.size() > max_pool) {
      std::nth_element(next.pool.begin(), next.pool.begin() + max_pool, next.pool.end(),
                       [](const PoolItem& a, const PoolItem& b) {
                         return a.created > b.created ||
                                (a.created == b.created && a.item < b.item);
                       });
      next.pool.resize(max_pool);
      std::sort(next.pool.begin(), next.pool.end(),
                [](const PoolItem& a, const PoolItem& b) { return a.item < b.item; });
    }
    const Matrix& vectors = vectors_of(next);
    const std::size_t d = vectors.columns();
    next.pool_vectors.resize(next.pool.size() * d + kernels::lanes);
    for (std::size_t j = 0; j < next.pool.size(); ++j) {
      vectors.row(next.pool[j].item, std::span(next.pool_vectors).subspan(j * d, d));
      next.pool_biases.push_back(next.biases[next.pool[j].item]);
    }
  }

  Shard& shard_of(std::string_view user, std::string_view session) const noexcept {
    const std::string_view id = user.empty() ? session : user;
    return state_
        ->shards[xxh64(std::as_bytes(std::span(id)), user.empty() ? 1 : 0) % state_->shards.size()];
  }

  // Finds or adds; the caller holds the shard's lock.
  static User& user_in(const Catalogue& catalogue, Shard& shard, const Key& key) {
    const std::string_view text = key.text();
    if (const auto found = shard.users.find(text); found != shard.users.end()) {
      shard.order.splice(shard.order.begin(), shard.order, found->second.place);
      return found->second;
    }
    std::list<std::string_view> place(1);
    User user;
    user.state.resize(catalogue.encoder->state_size());
    user.place = place.begin();
    if (text[0] == 'u')
      if (const auto row = catalogue.model->parts().user_ids.find(text.substr(1)))
        catalogue.encoder->load(*row, user.state);
    const auto added = shard.users.emplace(text, std::move(user)).first;
    place.front() = added->first;
    shard.order.splice(shard.order.begin(), place);
    return added->second;
  }

  using UserEntry = std::unordered_map<std::string, User, KeyHash, std::equal_to<>>::iterator;
  static void erase(Shard& shard, UserEntry user) noexcept {
    shard.order.erase(user->second.place);
    shard.users.erase(user);
  }

  void advance(const Catalogue& catalogue, Shard& shard, User& user, const RememberedEvent& event) {
    const auto buckets =
        static_cast<std::uint32_t>(catalogue.model->parts().time_gap_embedding.rows());
    const std::optional<std::int64_t> previous =
        user.last_timestamp == no_timestamp ? std::nullopt : std::optional(user.last_timestamp);
    const std::uint32_t gap =
        buckets == 0 ? 0 : time_gap_bucket(previous, event.timestamp, buckets);
    catalogue.encoder->step({event.item, event.event_type, gap}, user.state, shard.workspace);
    user.last_timestamp = event.timestamp;
    for (float& component : user.leaning) component *= 1.0f - leaning_forgotten;
    if (user.history.size() < state_->options.history_length) {
      user.history.push_back(event);
    } else {
      user.history[user.oldest] = event;
      user.oldest = (user.oldest + 1) % user.history.size();
    }
  }

  bool merge(std::string_view session, std::string_view user) {
    const Key visitor_key{{}, session}, key{user, {}};
    Shard& visitors = shard_of({}, session);
    std::size_t events;
    {
      const std::lock_guard lock{visitors.mutex};
      const auto found = visitors.users.find(visitor_key.text());
      if (found == visitors.users.end()) return false;
      events = found->second.history.size();
    }
    const auto catalogue = state_->current();
    Shard& shard = shard_of(user, {});
    UserLease lease{*this, *catalogue, shard, key};
    lease.prepare(events, 0, 0);
    User visitor;
    {
      const std::lock_guard lock{visitors.mutex};
      const auto found = visitors.users.find(visitor_key.text());
      if (found == visitors.users.end()) return false;
      visitor = std::move(found->second);
      erase(visitors, found);
    }
    std::rotate(visitor.history.begin(),
                visitor.history.begin() + static_cast<std::ptrdiff_t>(visitor.oldest),
                visitor.history.end());
    const std::lock_guard lock{shard.mutex};
    User& known = user_in(*catalogue, shard, key);
    for (const RememberedEvent& event : visitor.history) advance(*catalogue, shard, known, event);
    if (known.impressions.size() == 0) known.impressions = std::move(visitor.impressions);
    if (known.leaning.empty()) known.leaning = std::move(visitor.leaning);
    return true;
  }

  // Copies what a request needs of the user; false where no event is known of them. A request with
  // a user and a session is answered from the user where there are events, else from the session.
  // numbers: of a new slate, so that the next one draws other random numbers; or null.
  bool read_user(const Catalogue& catalogue, const Request& request, std::int64_t timestamp,
                 SlateNumbers* numbers, Scratch& scratch) {
    scratch.request_number = static_cast<std::uint64_t>(timestamp);
    std::fill(scratch.leaning.begin(), scratch.leaning.end(), 0.0f);
    const auto read = [&](std::string_view user, std::string_view session) {
      Shard& shard = shard_of(user, session);
      const std::lock_guard lock{shard.mutex};
      const auto found = shard.users.find(Key{user, session}.text());
      if (found == shard.users.end()) return read_stored_query(catalogue, user, scratch.query);
      shard.order.splice(shard.order.begin(), shard.order, found->second.place);
      User& known = found->second;
      scratch.request_number = numbers ? numbers->draw(known, user, session) : known.requests;
      const std::size_t items = catalogue.model->item_count();
      if (scratch.ignored.empty())
        known.impressions.for_each(timestamp, [&](std::uint32_t item, float count) {
          if (item >= items) return;  // of an update that came after this request's catalogue
          scratch.ignored.push_back({item, ignored_discount * count / catalogue.calibration.slope});
          scratch.discounts[item] = scratch.ignored.back().score;
        });
      if (known.last_timestamp != no_timestamp) {
        const auto query = catalogue.encoder->query(known.state);
        std::copy(query.begin(), query.end(), scratch.query.begin());
      } else if (!read_stored_query(catalogue, user, scratch.query)) {
        return false;
      }
      for (std::size_t c = 0; c < known.leaning.size(); ++c) {
        scratch.leaning[c] = known.leaning[c];
        scratch.query[c] += known.leaning[c];
      }
      if (request.exclude_interacted)
        for (const RememberedEvent& event : known.history)
          if (event.item < items) scratch.interacted.push_back(event.item);
      return true;
    };
    return (!request.user.empty() && read(request.user, {})) ||
           (!request.session.empty() && read({}, request.session));
  }

  // The query of a user who comes with the model and has had no event since; false for others.
  static bool read_stored_query(const Catalogue& catalogue, std::string_view user,
                                std::span<float> query) noexcept {
    const ModelParts& parts = catalogue.model->parts();
    const auto row = parts.user_ids.find(user);
    if (!row) return false;
    const std::size_t d = catalogue.model->dimension(), begin = parts.user_states.columns() - d;
    for (std::size_t c = 0; c < d; ++c) query[c] = parts.user_states.at(*row, begin + c);
    return true;
  }

  // Excludes what the user has interacted with, and what the caller's mask leaves out.
  static Eligibility restrict_to(const Catalogue& catalogue, const Request& request,
                                 Scratch& scratch) {
    for (const std::uint32_t item : scratch.interacted) scratch.excluded.set(item);
    const ItemMask* excluded = scratch.interacted.empty() ? nullptr : &scratch.excluded;
    const ItemMask* eligible = request.eligible;
    if (eligible && eligible->size() < catalogue.model->item_count()) {
      scratch.eligible = *eligible;
      scratch.eligible.resize(catalogue.model->item_count());
      eligible = &scratch.eligible;
    }
    return {eligible, excluded, scratch.interacted.size()};
  }

  std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace personalize

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // PERSONALIZE_RUNTIME_HPP
