// personalize_runtime.hpp - sequence-model recommendations inside your own process.
//
// Loads a compact model file, keeps one recurrent state a user, and answers with exact top-k
// slates. Version 0.1.0. MIT licence (see LICENSE). Needs C++20, xsimd (>= 8.1) and zstd
// (>= 1.5.4).
//
//   #include "personalize_runtime.hpp"
//   namespace pz = personalize;
//
//   auto model = pz::Model::load("model.pzm");
//   if (!model) return fail(model.error().message);
//   auto shop = pz::Recommender::create(*model);
//   if (!shop) return fail(shop.error().message);
//
//   shop->record({.user = "u1", .item = "sword", .event_type = "click", .timestamp = now});
//   auto slate = shop->recommend({.user = "u1", .count = 25, .exclude_interacted = true});
//   if (!slate) return fail(slate.error().message);
//   for (const pz::Pick& pick : slate->items) show(pick.item, pick.score, pz::name(pick.reason));
//
// Contents (each room uses only earlier rooms; 7 impressions and 8 exploration are kept free)
//   0 preamble      version, configuration macros
//   1 errors        Errc, Error, Result<T>
//   2 kernels       SIMD and scalar forms of row scoring, matrix-vector product, gates, norms
//   3 model file    container of checked, compressed sections; XXH64
//   4 model         item ids, vectors, statistics, metadata, encoder weights
//   5 encoder       one event in, new user state out
//   6 scorer        exact top-k over the eligible items
//   9 recommender   users and sessions: record, recommend, rank
#ifndef PERSONALIZE_RUNTIME_HPP
#define PERSONALIZE_RUNTIME_HPP

// ============================================================================================
// Room 0: preamble. Owns the version and every configuration macro.
// ============================================================================================

#define PERSONALIZE_VERSION_MAJOR 0
#define PERSONALIZE_VERSION_MINOR 1
#define PERSONALIZE_VERSION_PATCH 0

// Set by the user, before the include or on the command line:
//   PERSONALIZE_NO_XSIMD  build with the scalar kernels only; xsimd is not included
//   PERSONALIZE_NO_ZSTD   read and write stored (uncompressed) sections only; zstd is not included

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#define PERSONALIZE_HAS_FSYNC 1
#else
#define PERSONALIZE_HAS_FSYNC 0
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

namespace personalize {
inline namespace v1 {

static_assert(std::endian::native == std::endian::little,
              "the model file is little-endian and is read without conversion");
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
};

// What went wrong, in words for a log line. `offset` is a byte position in the file where one is
// known.
struct Error {
  Errc code;
  std::string message;
  std::optional<std::uint64_t> offset = std::nullopt;
};

// A value or an Error. Never throws; reading the wrong side is a programming error (asserted).
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  explicit operator bool() const noexcept { return state_.index() == 0; }
  bool has_value() const noexcept { return state_.index() == 0; }
  T& operator*() & noexcept { return *pointer(); }
  const T& operator*() const& noexcept { return *pointer(); }
  T&& operator*() && noexcept { return std::move(*pointer()); }
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

// ============================================================================================
// Room 2: kernels. Owns the arithmetic on rows and vectors, once for each instruction set and once
// in scalar form as the reference. Uses nothing.
//
// Vectors are padded to a multiple of `lanes` floats. A kernel may read the padding, and may read
// up to `lanes` elements past a row of a matrix: Matrix (room 4) keeps that slack.
// ============================================================================================

namespace kernels {

inline constexpr std::size_t lanes = 16;

constexpr std::size_t padded(std::size_t n) noexcept { return (n + lanes - 1) / lanes * lanes; }

// The plain-C++ form of every kernel; what the SIMD forms are compared with.
struct Scalar {};

template <class Arch>
struct Kernels;

template <>
struct Kernels<Scalar> {
  // scores[r] = scale[r] * sum_c query[c] * rows[r, c] + bias[r].
  // rows: [count, columns] row-major; query: [padded(columns)], zero beyond columns.
  template <class Element>
  static void score_rows(const Element* rows, std::size_t columns, std::size_t count,
                         const float* query, const float* scales, const float* biases,
                         float* scores) noexcept {
    for (std::size_t r = 0; r < count; ++r) {
      float sum = 0;
      for (std::size_t c = 0; c < columns; ++c)
        sum += query[c] * static_cast<float>(rows[r * columns + c]);
      scores[r] = (scales ? scales[r] : 1.0f) * sum + biases[r];
    }
  }

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

  // GRU in PyTorch's convention. input, recurrent: gates r, z, n, `stride` floats apart:
  // r = sigmoid(i_r + h_r), z = sigmoid(i_z + h_z), n = tanh(i_n + r h_n), h = (1 - z) n + z h.
  static void gru_gates(std::size_t size, std::size_t stride, const float* input,
                        const float* recurrent, float* hidden) noexcept {
    for (std::size_t j = 0; j < size; ++j) {
      const float r = logistic(input[j] + recurrent[j]);
      const float z = logistic(input[stride + j] + recurrent[stride + j]);
      const float n = std::tanh(input[2 * stride + j] + r * recurrent[2 * stride + j]);
      hidden[j] = n + z * (hidden[j] - n);
    }
  }

  // x = (x - mean) / sqrt(variance + epsilon) * weight + bias, over the first `size` elements.
  static void layer_norm(std::size_t size, float epsilon, const float* weight, const float* bias,
                         float* x) noexcept {
    float sum = 0;
    for (std::size_t j = 0; j < size; ++j) sum += x[j];
    const float mean = sum / static_cast<float>(size);
    float squares = 0;
    for (std::size_t j = 0; j < size; ++j) squares += (x[j] - mean) * (x[j] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + epsilon);
    for (std::size_t j = 0; j < size; ++j) x[j] = (x[j] - mean) * scale * weight[j] + bias[j];
  }

  static void sigmoid(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = logistic(x[j]);
  }
  static void tanh(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = std::tanh(x[j]);
  }
  static void relu(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j) x[j] = x[j] > 0 ? x[j] : 0;
  }
  // Hendrycks and Gimpel 2016, the exact form: x / 2 (1 + erf(x / sqrt 2)).
  static void gelu(std::size_t size, float* x) noexcept {
    for (std::size_t j = 0; j < size; ++j)
      x[j] = 0.5f * x[j] * (1.0f + std::erf(x[j] * 0.70710678f));
  }

 private:
  static float logistic(float x) noexcept { return 1.0f / (1.0f + std::exp(-x)); }
};

#ifndef PERSONALIZE_NO_XSIMD

// Sign-extends one batch of int8 to float. xsimd 8 has no such load, so each family brings its own.
template <class Arch>
xsimd::batch<float, Arch> widen(const std::int8_t* p, xsimd::generic) noexcept {
  alignas(64) std::array<float, xsimd::batch<float, Arch>::size> values;
  for (std::size_t l = 0; l < values.size(); ++l) values[l] = static_cast<float>(p[l]);
  return xsimd::batch<float, Arch>::load_aligned(values.data());
}
#if XSIMD_WITH_SSE2
template <class Arch>
xsimd::batch<float, Arch> widen(const std::int8_t* p, xsimd::sse2) noexcept {
  std::int32_t four;
  std::memcpy(&four, p, sizeof four);
  __m128i v = _mm_cvtsi32_si128(four);
  v = _mm_unpacklo_epi8(v, v);
  v = _mm_unpacklo_epi16(v, v);
  return _mm_cvtepi32_ps(_mm_srai_epi32(v, 24));
}
#endif
#if XSIMD_WITH_AVX2
template <class Arch>
xsimd::batch<float, Arch> widen(const std::int8_t* p, xsimd::avx2) noexcept {
  std::int64_t eight;
  std::memcpy(&eight, p, sizeof eight);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
}
#endif
#if XSIMD_WITH_AVX512F
template <class Arch>
xsimd::batch<float, Arch> widen(const std::int8_t* p, xsimd::avx512f) noexcept {
  __m128i sixteen;
  std::memcpy(&sixteen, p, sizeof sixteen);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
}
#endif
#if XSIMD_WITH_NEON64
template <class Arch>
xsimd::batch<float, Arch> widen(const std::int8_t* p, xsimd::neon64) noexcept {
  std::uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
#endif

template <class Arch>
struct Kernels {
  using Batch = xsimd::batch<float, Arch>;
  static constexpr std::size_t width = Batch::size;
  static_assert(lanes % width == 0);

  template <class Element>
  static void score_rows(const Element* rows, std::size_t columns, std::size_t count,
                         const float* query, const float* scales, const float* biases,
                         float* scores) noexcept {
    std::size_t r = 0;
    for (; r + 4 <= count; r += 4)
      score_some<4>(rows + r * columns, columns, query, scales ? scales + r : nullptr, biases + r,
                    scores + r);
    for (; r < count; ++r)
      score_some<1>(rows + r * columns, columns, query, scales ? scales + r : nullptr, biases + r,
                    scores + r);
  }

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

  static void gru_gates(std::size_t size, std::size_t stride, const float* input,
                        const float* recurrent, float* hidden) noexcept {
    for (std::size_t j = 0; j < size; j += width) {
      const auto at = [j](const float* p) { return Batch::load_unaligned(p + j); };
      const Batch r = logistic(at(input) + at(recurrent));
      const Batch z = logistic(at(input + stride) + at(recurrent + stride));
      const Batch n =
          xsimd::tanh(xsimd::fma(r, at(recurrent + 2 * stride), at(input + 2 * stride)));
      xsimd::fma(z, at(hidden) - n, n).store_unaligned(hidden + j);
    }
  }

  static void layer_norm(std::size_t size, float epsilon, const float* weight, const float* bias,
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
    const Batch scale(1.0f / std::sqrt(square / static_cast<float>(size) + epsilon));
    for (std::size_t j = 0; j < size; j += width) {
      const Batch centred = (Batch::load_unaligned(x + j) - Batch(mean)) * scale;
      xsimd::fma(centred, Batch::load_unaligned(weight + j), Batch::load_unaligned(bias + j))
          .store_unaligned(x + j);
    }
  }

  static void sigmoid(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return logistic(v); });
  }
  static void tanh(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return xsimd::tanh(v); });
  }
  static void relu(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) { return xsimd::max(v, Batch(0.0f)); });
  }
  static void gelu(std::size_t size, float* x) noexcept {
    transform(size, x, [](const Batch& v) {
      return Batch(0.5f) * v * (Batch(1.0f) + xsimd::erf(v * Batch(0.70710678f)));
    });
  }

 private:
  static Batch load(const float* p) noexcept { return Batch::load_unaligned(p); }
  static Batch load(const std::int8_t* p) noexcept { return widen<Arch>(p, Arch{}); }

  static float add_lanes(const Batch& v) noexcept {
#if XSIMD_VERSION_MAJOR >= 9
    return xsimd::reduce_add(v);
#else
    return xsimd::hadd(v);
#endif
  }

  static Batch logistic(const Batch& x) noexcept {
    return Batch(1.0f) / (Batch(1.0f) + xsimd::exp(-x));
  }

  template <std::size_t Rows, class Element>
  static void score_some(const Element* rows, std::size_t columns, const float* query,
                         const float* scales, const float* biases, float* scores) noexcept {
    std::array<Batch, Rows> sums;
    sums.fill(Batch(0.0f));
    for (std::size_t c = 0; c < columns; c += width) {
      const Batch q = Batch::load_unaligned(query + c);
      for (std::size_t r = 0; r < Rows; ++r)
        sums[r] = xsimd::fma(q, load(rows + r * columns + c), sums[r]);
    }
    for (std::size_t r = 0; r < Rows; ++r)
      scores[r] = (scales ? scales[r] : 1.0f) * add_lanes(sums[r]) + biases[r];
  }

  template <std::size_t Blocks>
  static void multiply_blocks(const float* packed, const float* bias, std::size_t inputs,
                              const float* x, float* y) noexcept {
    constexpr std::size_t parts = lanes / width;
    std::array<Batch, Blocks * parts> sums;
    for (std::size_t s = 0; s < sums.size(); ++s) sums[s] = Batch::load_unaligned(bias + s * width);
    for (std::size_t i = 0; i < inputs; ++i) {
      const Batch input(x[i]);
      for (std::size_t b = 0; b < Blocks; ++b)
        for (std::size_t p = 0; p < parts; ++p)
          sums[b * parts + p] =
              xsimd::fma(Batch::load_unaligned(packed + (b * inputs + i) * lanes + p * width),
                         input, sums[b * parts + p]);
    }
    for (std::size_t s = 0; s < sums.size(); ++s) sums[s].store_unaligned(y + s * width);
  }

  template <class Function>
  static void transform(std::size_t size, float* x, Function function) noexcept {
    for (std::size_t j = 0; j < size; j += width)
      function(Batch::load_unaligned(x + j)).store_unaligned(x + j);
  }
};

using Default = xsimd::default_arch;
#else
using Default = Scalar;
#endif

}  // namespace kernels

// ============================================================================================
// Room 3: model file. Owns the container: header, section table, checksums, compression, limits.
// Uses room 1.
//
// All integers little-endian. Header, 64 bytes:
//
//   offset size field
//        0    8 magic           89 50 5A 4D 0D 0A 1A 0A  ("\x89PZM\r\n\x1a\n": shows a text-mode
//        copy) 8    2 major version   1; a reader refuses a greater one
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
//        8    1 codec           0 stored, 1 zstd (one frame that declares its content size)
//        9    1 element type    ElementType
//       10    1 rank            1 to 3
//       11    5 reserved        zero
//       16   24 shape           3 x u64; unused dimensions are 1
//       40    8 offset          sections lie back to back, in table order, up to the total size
//       48    8 stored size
//       56    8 raw size        size after decompression; follows from element type and shape
//       64    8 checksum        XXH64 of the stored bytes
//
// Every byte of a file is covered by a checksum or must be zero, so a flipped bit anywhere is seen.
// What the sections hold stands in room 4.
// ============================================================================================

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

enum class ElementType : std::uint8_t {
  u8 = 0,
  i8 = 1,  // rows of int8 with one f32 scale a row: the scales of all rows, then the rows
  f32 = 2,
  i64 = 3,
  u32 = 4,
  string = 5,  // the u16 lengths of all strings, then their bytes (UTF-8)
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
  }
  return "unknown";
}

// The most a reader will take memory for, checked before it is taken.
struct LoadLimits {
  std::uint64_t file_bytes = std::uint64_t{16} << 30;
  std::uint64_t raw_bytes = std::uint64_t{16} << 30;  // of all sections together, decompressed
  std::uint32_t sections = 4096;
  std::uint64_t items = 100'000'000;
  std::uint32_t dimension = 4096;  // of any vector in the model
};

enum class Codec : std::uint8_t { stored = 0, zstd = 1 };

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
inline constexpr std::uint16_t format_major = 1, format_minor = 0;
inline constexpr std::size_t header_size = 64, entry_size = 72;

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

inline Error section_error(Errc code, const SectionInfo& section, const std::string& what) {
  return {code, "section " + section.label() + ": " + what, section.offset};
}

}  // namespace detail

// The section table of a model file, checked: every entry lies inside the file and within `limits`,
// and every stored byte matches its checksum. Reads the whole file once.
inline Result<std::vector<SectionInfo>> list_sections(std::span<const std::byte> file,
                                                      const LoadLimits& limits = {}) {
  using namespace detail;
  if (file.size() < model_magic.size() ||
      std::memcmp(file.data(), model_magic.data(), model_magic.size()) != 0)
    return Error{Errc::format, "not a model file: the first 8 bytes are not a .pzm header's", 0};
  if (file.size() < header_size)
    return Error{Errc::truncated, "the file ends inside its 64-byte header", file.size()};
  const std::byte* head = file.data();
  if (xxh64(file.first(56)) != load_integer<std::uint64_t>(head + 56))
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
  if (file.size() < total)
    return Error{Errc::truncated,
                 "the file has " + std::to_string(file.size()) + " of its " +
                     std::to_string(total) + " bytes; copy it again",
                 file.size()};
  if (file.size() > total) return Error{Errc::corrupt, "bytes follow the end of the model", total};
  const std::uint64_t table_size = std::uint64_t{count} * entry_size;
  if (table_size > total - header_size)
    return Error{Errc::corrupt, "header: the section table is larger than the file", 12};
  const auto table = file.subspan(header_size, static_cast<std::size_t>(table_size));
  if (xxh64(table) != load_integer<std::uint64_t>(head + 24))
    return Error{Errc::checksum, "section table: checksum mismatch; the file is damaged",
                 header_size};

  std::vector<SectionInfo> sections(count);
  std::uint64_t expected_offset = header_size + table_size, raw_total = 0;
  for (std::uint32_t s = 0; s < count; ++s) {
    SectionInfo& section = sections[s];
    const std::byte* p = table.data() + s * entry_size;
    std::memcpy(section.tag.data(), p, 4);
    section.index = load_integer<std::uint32_t>(p + 4);
    const auto codec = load_integer<std::uint8_t>(p + 8);
    const auto type = load_integer<std::uint8_t>(p + 9);
    section.codec = static_cast<Codec>(codec);
    section.element_type = static_cast<ElementType>(type);
    section.rank = load_integer<std::uint8_t>(p + 10);
    for (std::size_t d = 0; d < 3; ++d)
      section.shape[d] = load_integer<std::uint64_t>(p + 16 + 8 * d);
    section.offset = load_integer<std::uint64_t>(p + 40);
    section.stored_size = load_integer<std::uint64_t>(p + 48);
    section.raw_size = load_integer<std::uint64_t>(p + 56);
    section.checksum = load_integer<std::uint64_t>(p + 64);
    if (section.rank < 1 || section.rank > 3 ||
        std::any_of(p + 11, p + 16, [](std::byte b) { return b != std::byte{0}; }))
      return section_error(Errc::corrupt, section, "bad table entry");
    if (section.offset != expected_offset || section.stored_size > total - expected_offset)
      return section_error(Errc::corrupt, section, "does not lie where the table's order puts it");
    expected_offset += section.stored_size;
    if (section.raw_size > limits.raw_bytes - raw_total)
      return section_error(Errc::limit, section, "decompressed size is over LoadLimits::raw_bytes");
    raw_total += section.raw_size;
    if (codec == 0 && section.raw_size != section.stored_size)
      return section_error(Errc::corrupt, section,
                           "stored and raw size differ without compression");
    const auto stored = file.subspan(static_cast<std::size_t>(section.offset),
                                     static_cast<std::size_t>(section.stored_size));
    if (xxh64(stored) != section.checksum)
      return section_error(Errc::checksum, section, "checksum mismatch; the file is damaged");
    for (std::uint32_t other = 0; other < s; ++other)
      if (sections[other].tag == section.tag && sections[other].index == section.index)
        return section_error(Errc::corrupt, section, "stands twice in the section table");
  }
  if (expected_offset != total)
    return Error{Errc::corrupt, "bytes follow the last section", expected_offset};
  return sections;
}

namespace detail {

// The raw bytes of one section. Takes section.raw_size bytes, which list_sections has checked.
inline Result<std::vector<std::byte>> read_section(std::span<const std::byte> file,
                                                   const SectionInfo& section) {
  const auto stored = file.subspan(static_cast<std::size_t>(section.offset),
                                   static_cast<std::size_t>(section.stored_size));
  if (section.codec == Codec::stored) return std::vector<std::byte>(stored.begin(), stored.end());
  if (section.codec != Codec::zstd)
    return section_error(Errc::unsupported, section, "unknown codec");
#ifndef PERSONALIZE_NO_ZSTD
  if (ZSTD_getFrameContentSize(stored.data(), stored.size()) != section.raw_size)
    return section_error(Errc::compression, section,
                         "the zstd frame does not declare the table's raw size");
  std::vector<std::byte> raw(static_cast<std::size_t>(section.raw_size));
  const std::size_t size = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(size) || size != raw.size())
    return section_error(Errc::compression, section, "does not decompress to its declared size");
  return raw;
#else
  return section_error(Errc::unsupported, section,
                       "compressed, and this build has PERSONALIZE_NO_ZSTD");
#endif
}

// Collects sections and lays them out as a file.
class FileBuilder {
 public:
  explicit FileBuilder(int zstd_level) : zstd_level_(zstd_level) {}

  void add(std::string_view tag, std::uint32_t index, ElementType type,
           std::initializer_list<std::uint64_t> shape, std::vector<std::byte> raw) {
    SectionInfo section;
    std::copy_n(tag.begin(), 4, section.tag.begin());
    section.index = index;
    section.element_type = type;
    section.rank = static_cast<std::uint8_t>(shape.size());
    std::copy(shape.begin(), shape.end(), section.shape.begin());
    section.raw_size = raw.size();
    std::vector<std::byte> stored = std::move(raw);
#ifndef PERSONALIZE_NO_ZSTD
    if (zstd_level_ != 0) {
      std::vector<std::byte> packed(ZSTD_compressBound(stored.size()));
      const std::size_t size =
          ZSTD_compress(packed.data(), packed.size(), stored.data(), stored.size(), zstd_level_);
      if (!ZSTD_isError(size) && size < stored.size()) {
        packed.resize(size);
        stored = std::move(packed);
        section.codec = Codec::zstd;
      }
    }
#endif
    section.stored_size = stored.size();
    section.checksum = xxh64(stored);
    sections_.push_back(section);
    payloads_.push_back(std::move(stored));
  }

  std::vector<std::byte> finish() && {
    std::vector<std::byte> table;
    std::uint64_t offset = header_size + sections_.size() * entry_size;
    for (const SectionInfo& section : sections_) {
      for (const char c : section.tag) table.push_back(static_cast<std::byte>(c));
      append_integer(table, section.index);
      append_integer(table, static_cast<std::uint8_t>(section.codec));
      append_integer(table, static_cast<std::uint8_t>(section.element_type));
      append_integer(table, section.rank);
      table.insert(table.end(), 5, std::byte{0});
      for (const std::uint64_t d : section.shape) append_integer(table, d);
      append_integer(table, offset);
      append_integer(table, section.stored_size);
      append_integer(table, section.raw_size);
      append_integer(table, section.checksum);
      offset += section.stored_size;
    }
    std::vector<std::byte> file;
    file.reserve(static_cast<std::size_t>(offset));
    for (const unsigned char c : model_magic) file.push_back(static_cast<std::byte>(c));
    append_integer(file, format_major);
    append_integer(file, format_minor);
    append_integer(file, static_cast<std::uint32_t>(sections_.size()));
    append_integer(file, offset);
    append_integer(file, xxh64(table));
    file.insert(file.end(), 24, std::byte{0});
    append_integer(file, xxh64(file));
    file.insert(file.end(), table.begin(), table.end());
    for (const auto& payload : payloads_) file.insert(file.end(), payload.begin(), payload.end());
    return file;
  }

 private:
  [[maybe_unused]] int zstd_level_;  // not used in a build without zstd
  std::vector<SectionInfo> sections_;
  std::vector<std::vector<std::byte>> payloads_;
};

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

inline Error io_error(const std::string& path, const char* what) {
  return {Errc::io, path + ": " + what + ": " + std::strerror(errno)};
}

}  // namespace detail

// The bytes of a file of at most `limit` bytes.
inline Result<std::vector<std::byte>> read_file(const std::string& path, std::uint64_t limit) {
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
}

// Replaces `path` by `bytes` or leaves it as it was: writes beside it, syncs, renames.
inline Result<void> write_file(const std::string& path, std::span<const std::byte> bytes) {
  const std::string part = path + ".part";
  detail::File file{std::fopen(part.c_str(), "wb")};
  if (!file) return detail::io_error(part, "cannot create");
  bool written = std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size() &&
                 std::fflush(file.get()) == 0;
#if PERSONALIZE_HAS_FSYNC
  written = written && ::fsync(::fileno(file.get())) == 0;
#endif
  written = std::fclose(file.release()) == 0 && written;
  if (!written || std::rename(part.c_str(), path.c_str()) != 0) {
    const Error error = detail::io_error(path, "cannot write");
    std::remove(part.c_str());
    return error;
  }
  return {};
}

// ============================================================================================
// Room 4: model. Owns what a model file holds: as plain data to build and write (ModelParts), and
// immutable and shared to serve from (Model). Uses rooms 1 to 3.
//
//   tag  index element  shape    content
//   META 0     u8       [bytes]  JSON: recipe, parameters, metrics, provenance, time range
//   IIDS 0     string   [N]      item ids, distinct, 1 to 256 bytes; the order is the item index
//   IVEC 0     i8, f32  [N, d]   item vectors, their metadata embeddings summed in
//   BIAS 0     f32      [N]      item biases
//   STAT 0     i64      [N, 4]   interactions, first, last and creation timestamp (INT64_MIN: none)
//   EVTY 0     string   [E]      event types                                       (optional)
//   EVTE 0     i8, f32  [E, d]   their embeddings                                  (with EVTY)
//   GAPE 0     i8, f32  [B, d]   time-gap embeddings, see time_gap_bucket          (optional)
//   FLDN 0     string   [F]      names of the item metadata fields                 (optional)
//   FLDK 0     u8       [F]      0 categorical, 1 numeric                          (with FLDN)
//   FVOC f     string   [V]      values of categorical field f
//   FBND f     f32      [B]      ascending bucket boundaries of numeric field f
//   FEMB f     i8, f32  [V, d]   embeddings of field f: one a value, or B + 1 buckets
//   ENCO 0     u32      [n, 2]   encoder operations: kind, argument (EncoderOp)
//   ENCW k     i8, f32  [r, c]   encoder weights, k-th in the order of the operations
// ============================================================================================

inline constexpr std::int64_t no_timestamp = std::numeric_limits<std::int64_t>::min();
inline constexpr std::size_t max_id_bytes = 256;

// Distinct strings, numbered in the order they were added. Lookup O(1); one allocation for the
// text.
class StringTable {
 public:
  // The index of the new string. Errors: empty, over 256 bytes, or already there (corrupt).
  Result<std::uint32_t> add(std::string_view text) {
    if (text.empty() || text.size() > max_id_bytes)
      return Error{Errc::invalid_argument,
                   "an id has 1 to 256 bytes, this one has " + std::to_string(text.size())};
    if ((size() + 1) * 2 > slots_.size()) rehash(std::max<std::size_t>(16, slots_.size() * 2));
    const std::size_t slot = find_slot(text);
    if (slot == npos)
      return Error{Errc::corrupt, "too many ids fall together; they look made to collide"};
    if (slots_[slot] != 0) return Error{Errc::corrupt, "'" + std::string(text) + "' stands twice"};
    text_.append(text);
    ends_.push_back(text_.size());
    slots_[slot] = static_cast<std::uint32_t>(ends_.size());
    return slots_[slot] - 1;
  }

  std::optional<std::uint32_t> find(std::string_view text) const noexcept {
    if (slots_.empty()) return std::nullopt;
    const std::size_t slot = find_slot(text);
    if (slot == npos || slots_[slot] == 0) return std::nullopt;
    return slots_[slot] - 1;
  }

  // Valid until the next add.
  std::string_view operator[](std::size_t index) const noexcept {
    const std::size_t begin = index == 0 ? 0 : ends_[index - 1];
    return std::string_view(text_).substr(begin, ends_[index] - begin);
  }

  std::size_t size() const noexcept { return ends_.size(); }
  bool empty() const noexcept { return ends_.empty(); }

 private:
  static constexpr std::size_t npos = std::numeric_limits<std::size_t>::max();
  // At half load no honest table comes near this; a file made to collide stops here.
  static constexpr std::size_t max_probes = 512;

  std::size_t find_slot(std::string_view text) const noexcept {
    const std::size_t mask = slots_.size() - 1;
    std::size_t slot = static_cast<std::size_t>(xxh64(std::as_bytes(std::span(text)))) & mask;
    for (std::size_t probe = 0; probe < max_probes; ++probe, slot = (slot + 1) & mask)
      if (slots_[slot] == 0 || (*this)[slots_[slot] - 1] == text) return slot;
    return npos;
  }

  void rehash(std::size_t slots) {
    slots_.assign(slots, 0);
    for (std::size_t i = 0; i < size(); ++i)
      if (const std::size_t slot = find_slot((*this)[i]); slot != npos)
        slots_[slot] = static_cast<std::uint32_t>(i + 1);
  }

  std::string text_;
  std::vector<std::size_t> ends_;
  std::vector<std::uint32_t> slots_;  // index + 1, 0 where free; a power of two
};

// Row-major [rows, columns], f32 or int8 with a scale a row (value = scale[row] * int8).
class Matrix {
 public:
  Matrix() = default;

  static Matrix zeros(std::size_t rows, std::size_t columns) {
    Matrix m;
    m.rows_ = rows;
    m.columns_ = columns;
    m.f32_.resize(rows * columns + kernels::lanes);
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
  std::span<const std::int8_t> i8() const noexcept {
    return {i8_.data(), i8_.empty() ? 0 : rows_ * columns_};
  }
  // [rows] with i8, empty with f32.
  std::span<const float> scales() const noexcept { return scales_; }

  // Writes row `r`, dequantised, to out[0, columns).
  void row(std::size_t r, std::span<float> out) const noexcept {
    for (std::size_t c = 0; c < columns_; ++c) out[c] = at(r, c);
  }

  float at(std::size_t r, std::size_t c) const noexcept {
    const std::size_t i = r * columns_ + c;
    return type_ == ElementType::i8 ? scales_[r] * static_cast<float>(i8_[i]) : f32_[i];
  }

  // The int8 form: scale = max |row| / 127, values rounded to nearest.
  Matrix quantised() const {
    if (type_ == ElementType::i8) return *this;
    Matrix m;
    m.rows_ = rows_;
    m.columns_ = columns_;
    m.type_ = ElementType::i8;
    m.i8_.resize(rows_ * columns_ + kernels::lanes);
    m.scales_.resize(rows_);
    for (std::size_t r = 0; r < rows_; ++r) {
      float largest = 0;
      for (std::size_t c = 0; c < columns_; ++c) largest = std::max(largest, std::abs(at(r, c)));
      const float scale = largest / 127.0f;
      m.scales_[r] = scale;
      for (std::size_t c = 0; c < columns_ && scale > 0; ++c)
        m.i8_[r * columns_ + c] =
            static_cast<std::int8_t>(std::clamp(std::nearbyint(at(r, c) / scale), -127.0f, 127.0f));
    }
    return m;
  }

  bool finite() const noexcept {
    const auto check = [](float v) { return std::isfinite(v); };
    return std::all_of(f32_.begin(), f32_.end(), check) &&
           std::all_of(scales_.begin(), scales_.end(), check);
  }

  std::vector<std::byte> to_bytes() const {
    std::vector<std::byte> bytes;
    const auto append = [&bytes](auto values) {
      const auto raw = std::as_bytes(values);
      bytes.insert(bytes.end(), raw.begin(), raw.end());
    };
    append(scales());
    append(i8());
    append(f32());
    return bytes;
  }

  // `bytes` has exactly the size that the shape and type imply (the caller has checked).
  static Matrix from_bytes(std::size_t rows, std::size_t columns, ElementType type,
                           std::span<const std::byte> bytes) {
    Matrix m;
    m.rows_ = rows;
    m.columns_ = columns;
    m.type_ = type;
    if (type == ElementType::f32) {
      m.f32_.resize(rows * columns + kernels::lanes);
      if (!bytes.empty()) std::memcpy(m.f32_.data(), bytes.data(), bytes.size());
    } else {
      m.scales_.resize(rows);
      m.i8_.resize(rows * columns + kernels::lanes);
      if (rows > 0) {
        std::memcpy(m.scales_.data(), bytes.data(), rows * sizeof(float));
        std::memcpy(m.i8_.data(), bytes.data() + rows * sizeof(float), rows * columns);
      }
    }
    return m;
  }

 private:
  std::size_t rows_ = 0, columns_ = 0;
  ElementType type_ = ElementType::f32;
  // Each with kernels::lanes zeros behind the last row, so that a kernel may load past it.
  std::vector<float> f32_;
  std::vector<std::int8_t> i8_;
  std::vector<float> scales_;
};

enum class Activation : std::uint32_t { sigmoid = 1, tanh = 2, relu = 3, gelu = 4 };

// One step of the encoder's program. x is the current vector; weights follow in
// ModelParts::weights.
struct EncoderOp {
  enum class Kind : std::uint32_t {
    embed_sum = 1,   // x = item vector + event-type embedding + time-gap embedding; no weights
    linear = 2,      // x = W x + b; W [out, in], b [1, out]
    gru = 3,         // x = h = GRU(x, h); W_ih [3H, in], W_hh [3H, H], b_ih [1, 3H], b_hh [1, 3H],
                     // gates r, z, n as in PyTorch
    layer_norm = 4,  // over x; weight [1, dim], bias [1, dim]; epsilon 1e-5
    activation = 5,  // argument: Activation; gelu in the exact (erf) form
    save = 6,        // r[argument] = x; argument 0 to 7
    add = 7,         // x = x + r[argument]
  };
  Kind kind;
  std::uint32_t argument = 0;
};

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
  std::vector<float> biases;               // [N]
  std::vector<ItemStatistics> statistics;  // [N]
  StringTable event_types;
  Matrix event_type_embedding;  // [E, d], empty without event types
  Matrix time_gap_embedding;    // [buckets >= 2, d] or empty
  std::vector<MetadataField> fields;
  std::vector<EncoderOp> operations;
  std::vector<Matrix> weights;
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

// Walks the encoder's program: dimensions must follow from one another and end at d.
inline Result<void> check_encoder(const ModelParts& parts) {
  const std::size_t d = parts.item_vectors.columns();
  if (parts.operations.empty() || parts.operations.size() > max_operations ||
      parts.operations[0].kind != EncoderOp::Kind::embed_sum)
    return Error{Errc::corrupt, "encoder: has 1 to 256 operations and begins with embed_sum"};
  std::size_t next = 0, dimension = 0;
  std::array<std::size_t, encoder_slots> slots{};
  bool recurrent = false;
  for (std::size_t o = 0; o < parts.operations.size(); ++o) {
    const EncoderOp& op = parts.operations[o];
    const std::string where = "encoder: operation " + std::to_string(o);
    const auto weight = [&](std::size_t rows, std::size_t columns) -> Result<void> {
      if (next >= parts.weights.size())
        return Error{Errc::corrupt, where + ": a weight is missing"};
      const Matrix& m = parts.weights[next++];
      if (m.rows() != rows || m.columns() != columns)
        return shape_error(where + ": weight " + std::to_string(next - 1), m, rows, columns);
      return {};
    };
    const auto rows_of_next = [&]() -> std::size_t {
      return next < parts.weights.size() ? parts.weights[next].rows() : 0;
    };
    switch (op.kind) {
      case EncoderOp::Kind::embed_sum:
        if (o != 0) return Error{Errc::corrupt, where + ": embed_sum stands only first"};
        dimension = d;
        break;
      case EncoderOp::Kind::linear: {
        const std::size_t outputs = rows_of_next();
        if (auto w = weight(outputs, dimension); !w) return w;
        if (auto b = weight(1, outputs); !b) return b;
        dimension = outputs;
        break;
      }
      case EncoderOp::Kind::gru: {
        const std::size_t hidden = rows_of_next() / 3;
        if (auto w = weight(3 * hidden, dimension); !w) return w;
        if (auto w = weight(3 * hidden, hidden); !w) return w;
        if (auto b = weight(1, 3 * hidden); !b) return b;
        if (auto b = weight(1, 3 * hidden); !b) return b;
        dimension = hidden;
        recurrent = true;
        break;
      }
      case EncoderOp::Kind::layer_norm:
        if (auto w = weight(1, dimension); !w) return w;
        if (auto b = weight(1, dimension); !b) return b;
        break;
      case EncoderOp::Kind::activation:
        if (op.argument < 1 || op.argument > 4)
          return Error{Errc::unsupported, where + ": unknown activation"};
        break;
      case EncoderOp::Kind::save:
      case EncoderOp::Kind::add:
        if (op.argument >= encoder_slots)
          return Error{Errc::corrupt, where + ": slot is not in [0, 7]"};
        if (op.kind == EncoderOp::Kind::save)
          slots[op.argument] = dimension;
        else if (slots[op.argument] != dimension)
          return Error{Errc::corrupt, where + ": adds a vector of another length"};
        break;
      default:
        return Error{Errc::unsupported,
                     where + ": unknown kind; use a newer personalize_runtime.hpp"};
    }
    if (dimension == 0) return Error{Errc::corrupt, where + ": an empty vector"};
  }
  if (next != parts.weights.size())
    return Error{Errc::corrupt, "encoder: more weights than its operations use"};
  if (dimension != d)
    return Error{Errc::corrupt, "encoder: ends with " + std::to_string(dimension) +
                                    " values, item vectors have " + std::to_string(d)};
  if (!recurrent) return Error{Errc::corrupt, "encoder: has no recurrent operation"};
  return {};
}

// What must hold between the parts, whether they come from a file or from a trainer.
inline Result<void> check_parts(const ModelParts& parts, const LoadLimits& limits) {
  const std::size_t items = parts.item_ids.size(), d = parts.item_vectors.columns();
  if (items == 0 || d == 0) return Error{Errc::corrupt, "the model has no items or no dimensions"};
  if (items > limits.items || items >= std::numeric_limits<std::uint32_t>::max())
    return Error{Errc::limit, "the model has more items than LoadLimits::items"};
  if (parts.item_vectors.rows() != items)
    return shape_error("section IVEC", parts.item_vectors, items, d);
  if (parts.biases.size() != items)
    return Error{Errc::corrupt, "section BIAS: one bias an item is needed"};
  if (parts.statistics.size() != items)
    return Error{Errc::corrupt, "section STAT: one row an item is needed"};
  if (parts.event_type_embedding.rows() != parts.event_types.size() ||
      (!parts.event_types.empty() && parts.event_type_embedding.columns() != d))
    return shape_error("section EVTE", parts.event_type_embedding, parts.event_types.size(), d);
  if (!parts.time_gap_embedding.empty() &&
      (parts.time_gap_embedding.rows() < 2 || parts.time_gap_embedding.columns() != d))
    return shape_error("section GAPE", parts.time_gap_embedding, 2, d);
  for (const MetadataField& field : parts.fields) {
    const std::size_t rows = field.numeric ? field.boundaries.size() + 1 : field.vocabulary.size();
    if (field.name.empty() || field.name.size() > max_id_bytes)
      return Error{Errc::corrupt, "section FLDN: a field name has 1 to 256 bytes"};
    if (field.embedding.rows() != rows || (rows > 0 && field.embedding.columns() != d))
      return shape_error("section FEMB of field " + field.name, field.embedding, rows, d);
    if (!std::is_sorted(field.boundaries.begin(), field.boundaries.end()))
      return Error{Errc::corrupt, "section FBND of field " + field.name + ": not ascending"};
  }
  const auto check_finite = [](bool finite, const char* what) -> Result<void> {
    if (!finite)
      return Error{Errc::corrupt, std::string(what) + ": holds a value that is not finite"};
    return {};
  };
  if (auto r = check_finite(parts.item_vectors.finite(), "section IVEC"); !r) return r;
  if (auto r = check_finite(std::all_of(parts.biases.begin(), parts.biases.end(),
                                        [](float v) { return std::isfinite(v); }),
                            "section BIAS");
      !r)
    return r;
  if (auto r = check_finite(parts.event_type_embedding.finite(), "section EVTE"); !r) return r;
  if (auto r = check_finite(parts.time_gap_embedding.finite(), "section GAPE"); !r) return r;
  for (const MetadataField& field : parts.fields) {
    if (auto r = check_finite(field.embedding.finite(), "section FEMB"); !r) return r;
    if (auto r = check_finite(std::all_of(field.boundaries.begin(), field.boundaries.end(),
                                          [](float v) { return std::isfinite(v); }),
                              "section FBND");
        !r)
      return r;
  }
  for (const Matrix& weight : parts.weights) {
    if (auto r = check_finite(weight.finite(), "section ENCW"); !r) return r;
    if (weight.columns() > limits.dimension || weight.rows() / 3 > limits.dimension)
      return Error{Errc::limit, "section ENCW: wider than LoadLimits::dimension"};
  }
  if (d > limits.dimension)
    return Error{Errc::limit, "section IVEC: wider than LoadLimits::dimension"};
  return check_encoder(parts);
}

inline std::vector<std::byte> string_bytes(const StringTable& table) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < table.size(); ++i)
    append_integer(bytes, static_cast<std::uint16_t>(table[i].size()));
  for (std::size_t i = 0; i < table.size(); ++i) {
    const auto text = std::as_bytes(std::span(table[i]));
    bytes.insert(bytes.end(), text.begin(), text.end());
  }
  return bytes;
}

// Finds sections by tag and decodes them, checking element type and shape against the raw size.
class SectionReader {
 public:
  SectionReader(std::span<const std::byte> file, const std::vector<SectionInfo>& sections,
                const LoadLimits& limits)
      : file_(file), sections_(sections), limits_(limits) {}

  const SectionInfo* find(std::string_view tag, std::uint32_t index = 0) const noexcept {
    for (const SectionInfo& section : sections_)
      if (std::string_view(section.tag.data(), 4) == tag && section.index == index) return &section;
    return nullptr;
  }

  Result<StringTable> strings(std::string_view tag, std::uint32_t index = 0) const {
    auto bytes = raw(tag, index, {ElementType::string}, 1);
    if (!bytes) return bytes.error();
    const SectionInfo& section = *find(tag, index);
    const std::uint64_t count = section.shape[0];
    if (count > limits_.items || count > bytes->size() / 2)
      return section_error(Errc::corrupt, section, "declares more strings than it holds");
    StringTable table;
    std::size_t at = static_cast<std::size_t>(count) * 2;
    for (std::size_t i = 0; i < count; ++i) {
      const auto length = load_integer<std::uint16_t>(bytes->data() + 2 * i);
      if (length > bytes->size() - at)
        return section_error(Errc::corrupt, section,
                             "string " + std::to_string(i) + " runs past the end");
      const auto added =
          table.add({reinterpret_cast<const char*>(bytes->data() + at), std::size_t{length}});
      if (!added)
        return section_error(Errc::corrupt, section,
                             "string " + std::to_string(i) + ": " + added.error().message);
      at += length;
    }
    if (at != bytes->size())
      return section_error(Errc::corrupt, section, "bytes follow the last string");
    return table;
  }

  Result<Matrix> matrix(std::string_view tag, std::uint32_t index = 0) const {
    auto bytes = raw(tag, index, {ElementType::i8, ElementType::f32}, 2);
    if (!bytes) return bytes.error();
    const SectionInfo& section = *find(tag, index);
    return Matrix::from_bytes(static_cast<std::size_t>(section.shape[0]),
                              static_cast<std::size_t>(section.shape[1]), section.element_type,
                              *bytes);
  }

  template <class T>
  Result<std::vector<T>> vector(std::string_view tag, std::uint32_t index, ElementType type,
                                std::uint8_t rank = 1) const {
    auto bytes = raw(tag, index, {type}, rank);
    if (!bytes) return bytes.error();
    std::vector<T> values(bytes->size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), bytes->data(), bytes->size());
    return values;
  }

 private:
  Result<std::vector<std::byte>> raw(std::string_view tag, std::uint32_t index,
                                     std::initializer_list<ElementType> types,
                                     std::uint8_t rank) const {
    const SectionInfo* section = find(tag, index);
    if (!section) {
      SectionInfo missing;
      std::copy_n(tag.begin(), 4, missing.tag.begin());
      missing.index = index;
      return Error{Errc::corrupt, "section " + missing.label() + ": is missing"};
    }
    if (std::find(types.begin(), types.end(), section->element_type) == types.end())
      return section_error(Errc::corrupt, *section, "unexpected element type");
    if (section->rank != rank) return section_error(Errc::corrupt, *section, "unexpected rank");
    if (!raw_size_fits(*section))
      return section_error(Errc::corrupt, *section, "raw size does not follow from its shape");
    return read_section(file_, *section);
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
      case ElementType::string:
        return true;
    }
    return false;
  }

  std::span<const std::byte> file_;
  const std::vector<SectionInfo>& sections_;
  const LoadLimits& limits_;
};

// Matrices of one row (norms, biases) stay f32: they are small, and every row depends on them.
inline void add_matrix(FileBuilder& builder, std::string_view tag, std::uint32_t index,
                       const Matrix& matrix, ElementType type) {
  const Matrix written = type == ElementType::i8 && matrix.rows() > 1 ? matrix.quantised() : matrix;
  builder.add(tag, index, written.type(), {written.rows(), written.columns()}, written.to_bytes());
}

template <class T>
std::vector<std::byte> value_bytes(const std::vector<T>& values) {
  const auto raw = std::as_bytes(std::span(values));
  return {raw.begin(), raw.end()};
}

}  // namespace detail

struct WriteOptions {
  ElementType element_type = ElementType::i8;  // i8: f32 matrices are quantised; f32: kept
  int zstd_level = 19;                         // 1 to 22; 0 writes stored sections
};

// The bytes of a model file. The same parts and options give the same bytes (with one zstd
// version). Errors: parts that contradict one another.
inline Result<std::vector<std::byte>> write_model(const ModelParts& parts,
                                                  const WriteOptions& options = {}) {
  using namespace detail;
  if (options.element_type != ElementType::i8 && options.element_type != ElementType::f32)
    return Error{Errc::invalid_argument, "WriteOptions::element_type is i8 or f32"};
  if (options.zstd_level < 0 || options.zstd_level > 22)
    return Error{Errc::invalid_argument, "WriteOptions::zstd_level is outside [0, 22]"};
  if (auto checked = check_parts(parts, LoadLimits{}); !checked) return checked.error();
  FileBuilder file{options.zstd_level};
  const auto text = std::as_bytes(std::span(parts.metadata));
  file.add("META", 0, ElementType::u8, {text.size()}, {text.begin(), text.end()});
  file.add("IIDS", 0, ElementType::string, {parts.item_ids.size()}, string_bytes(parts.item_ids));
  add_matrix(file, "IVEC", 0, parts.item_vectors, options.element_type);
  file.add("BIAS", 0, ElementType::f32, {parts.biases.size()}, value_bytes(parts.biases));
  std::vector<std::int64_t> statistics;
  for (const ItemStatistics& s : parts.statistics)
    statistics.insert(statistics.end(),
                      {static_cast<std::int64_t>(s.interactions), s.first_timestamp,
                       s.last_timestamp, s.creation_timestamp});
  file.add("STAT", 0, ElementType::i64, {parts.statistics.size(), 4}, value_bytes(statistics));
  if (!parts.event_types.empty()) {
    file.add("EVTY", 0, ElementType::string, {parts.event_types.size()},
             string_bytes(parts.event_types));
    add_matrix(file, "EVTE", 0, parts.event_type_embedding, options.element_type);
  }
  if (!parts.time_gap_embedding.empty())
    add_matrix(file, "GAPE", 0, parts.time_gap_embedding, options.element_type);
  if (!parts.fields.empty()) {
    StringTable names;
    std::vector<std::byte> kinds;
    for (const MetadataField& field : parts.fields) {
      if (auto added = names.add(field.name); !added) return added.error();
      kinds.push_back(static_cast<std::byte>(field.numeric ? 1 : 0));
    }
    file.add("FLDN", 0, ElementType::string, {names.size()}, string_bytes(names));
    file.add("FLDK", 0, ElementType::u8, {kinds.size()}, kinds);
  }
  for (std::uint32_t f = 0; f < parts.fields.size(); ++f) {
    const MetadataField& field = parts.fields[f];
    if (field.numeric)
      file.add("FBND", f, ElementType::f32, {field.boundaries.size()},
               value_bytes(field.boundaries));
    else
      file.add("FVOC", f, ElementType::string, {field.vocabulary.size()},
               string_bytes(field.vocabulary));
    add_matrix(file, "FEMB", f, field.embedding, options.element_type);
  }
  std::vector<std::uint32_t> operations;
  for (const EncoderOp& op : parts.operations)
    operations.insert(operations.end(), {static_cast<std::uint32_t>(op.kind), op.argument});
  file.add("ENCO", 0, ElementType::u32, {parts.operations.size(), 2}, value_bytes(operations));
  for (std::uint32_t k = 0; k < parts.weights.size(); ++k)
    add_matrix(file, "ENCW", k, parts.weights[k], options.element_type);
  return std::move(file).finish();
}

// Writes the model file, replacing `path` at once or not at all.
inline Result<void> save_model(const ModelParts& parts, const std::string& path,
                               const WriteOptions& options = {}) {
  auto bytes = write_model(parts, options);
  if (!bytes) return bytes.error();
  return write_file(path, *bytes);
}

// The parts of a model file, every value checked. Takes at most the file's declared raw size beside
// the largest section.
inline Result<ModelParts> read_model(std::span<const std::byte> file,
                                     const LoadLimits& limits = {}) {
  using namespace detail;
  const auto sections = list_sections(file, limits);
  if (!sections) return sections.error();
  const SectionReader reader{file, *sections, limits};
  ModelParts parts;
  Error error{Errc::corrupt, ""};
  const auto take = [&error](auto& target, auto result) {
    if (!result) {
      error = result.error();
      return false;
    }
    target = std::move(*result);
    return true;
  };

  std::vector<char> metadata;
  std::vector<std::int64_t> statistics;
  std::vector<std::uint32_t> operations;
  if (!take(metadata, reader.vector<char>("META", 0, ElementType::u8)) ||
      !take(parts.item_ids, reader.strings("IIDS")) ||
      !take(parts.item_vectors, reader.matrix("IVEC")) ||
      !take(parts.biases, reader.vector<float>("BIAS", 0, ElementType::f32)) ||
      !take(statistics, reader.vector<std::int64_t>("STAT", 0, ElementType::i64, 2)) ||
      !take(operations, reader.vector<std::uint32_t>("ENCO", 0, ElementType::u32, 2)))
    return error;
  parts.metadata.assign(metadata.begin(), metadata.end());
  if (reader.find("STAT")->shape[1] != 4 || reader.find("ENCO")->shape[1] != 2)
    return Error{Errc::corrupt, "section STAT or ENCO: unexpected number of columns"};
  for (std::size_t i = 0; i < statistics.size(); i += 4) {
    if (statistics[i] < 0)
      return Error{Errc::corrupt, "section STAT: a negative number of interactions"};
    parts.statistics.push_back({static_cast<std::uint64_t>(statistics[i]), statistics[i + 1],
                                statistics[i + 2], statistics[i + 3]});
  }
  for (std::size_t o = 0; o < operations.size(); o += 2)
    parts.operations.push_back({static_cast<EncoderOp::Kind>(operations[o]), operations[o + 1]});
  if (reader.find("EVTY") && (!take(parts.event_types, reader.strings("EVTY")) ||
                              !take(parts.event_type_embedding, reader.matrix("EVTE"))))
    return error;
  if (reader.find("GAPE") && !take(parts.time_gap_embedding, reader.matrix("GAPE"))) return error;
  if (reader.find("FLDN")) {
    StringTable names;
    std::vector<std::uint8_t> kinds;
    if (!take(names, reader.strings("FLDN")) ||
        !take(kinds, reader.vector<std::uint8_t>("FLDK", 0, ElementType::u8)))
      return error;
    if (kinds.size() != names.size())
      return Error{Errc::corrupt, "section FLDK: one kind a field is needed"};
    for (std::uint32_t f = 0; f < names.size(); ++f) {
      MetadataField field;
      field.name = names[f];
      field.numeric = kinds[f] == 1;
      if (kinds[f] > 1) return Error{Errc::unsupported, "section FLDK: unknown kind of field"};
      if (field.numeric ? !take(field.boundaries, reader.vector<float>("FBND", f, ElementType::f32))
                        : !take(field.vocabulary, reader.strings("FVOC", f)))
        return error;
      if (!take(field.embedding, reader.matrix("FEMB", f))) return error;
      parts.fields.push_back(std::move(field));
    }
  }
  for (std::uint32_t k = 0; reader.find("ENCW", k); ++k) {
    Matrix weight;
    if (!take(weight, reader.matrix("ENCW", k))) return error;
    parts.weights.push_back(std::move(weight));
  }
  if (auto checked = check_parts(parts, limits); !checked) return checked.error();
  return parts;
}

// An immutable model: share it between threads and recommenders freely.
class Model {
 public:
  // Reads and checks a model file. Errors name the section and the reason.
  static Result<std::shared_ptr<const Model>> load(const std::string& path,
                                                   const LoadLimits& limits = {}) {
    const auto bytes = read_file(path, limits.file_bytes);
    if (!bytes) return bytes.error();
    auto model = from_bytes(*bytes, limits);
    if (!model) {
      Error error = model.error();
      error.message = path + ": " + error.message;
      return error;
    }
    return model;
  }

  static Result<std::shared_ptr<const Model>> from_bytes(std::span<const std::byte> file,
                                                         const LoadLimits& limits = {}) {
    auto parts = read_model(file, limits);
    if (!parts) return parts.error();
    return std::shared_ptr<const Model>(new Model(std::move(*parts)));
  }

  static Result<std::shared_ptr<const Model>> from_parts(ModelParts parts) {
    if (auto checked = detail::check_parts(parts, LoadLimits{}); !checked) return checked.error();
    return std::shared_ptr<const Model>(new Model(std::move(parts)));
  }

  std::size_t item_count() const noexcept { return parts_.item_ids.size(); }
  std::size_t dimension() const noexcept { return parts_.item_vectors.columns(); }
  std::string_view item_id(std::uint32_t item) const noexcept { return parts_.item_ids[item]; }
  std::optional<std::uint32_t> find_item(std::string_view id) const noexcept {
    return parts_.item_ids.find(id);
  }
  const ModelParts& parts() const noexcept { return parts_; }

  // The vector of an item that has only metadata: the sum of its values' embeddings, to out[0, d).
  // fields: name and value, categories separated by '|'. Unknown fields and values add nothing; the
  // number of values that were known is returned.
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
          const std::string text{value};
          char* end = nullptr;
          const float number = std::strtof(text.c_str(), &end);
          if (end == text.c_str() || *end != '\0' || !std::isfinite(number)) continue;
          const auto at =
              std::upper_bound(field.boundaries.begin(), field.boundaries.end(), number);
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
  explicit Model(ModelParts parts) : parts_(std::move(parts)) {}
  ModelParts parts_;
};

// ============================================================================================
// Room 5: encoder. Owns the step from one event and the old user state to the new one. Uses rooms
// 1, 2 and 4.
// ============================================================================================

inline constexpr std::uint32_t no_event_type = std::numeric_limits<std::uint32_t>::max();

// One event as the encoder sees it: an item index, an event type's index (or no_event_type), and
// the bucket of time_gap_bucket.
struct EncoderInput {
  std::uint32_t item;
  std::uint32_t event_type = no_event_type;
  std::uint32_t time_gap = 0;
};

// Immutable and shared between threads; each thread brings its own Workspace. A step costs O(1) in
// the length of the history: 5 to 10 us at hidden 128 with SSE2, less with AVX.
template <class Arch = kernels::Default>
class BasicEncoder {
 public:
  using Workspace = std::vector<float>;

  // The model must outlive the encoder.
  explicit BasicEncoder(const Model& model) : parts_(&model.parts()) {
    std::size_t next = 0, dimension = model.dimension();
    width_ = kernels::padded(dimension);
    for (const EncoderOp& op : parts_->operations) {
      Step step{op, dimension, dimension, {}, {}};
      const auto& w = parts_->weights;
      switch (op.kind) {
        case EncoderOp::Kind::linear:
          step.outputs = w[next].rows();
          step.layers.push_back(pack(w[next], w[next + 1], 1));
          next += 2;
          break;
        case EncoderOp::Kind::gru:
          step.outputs = w[next].rows() / 3;
          step.layers.push_back(pack(w[next], w[next + 2], 3));
          step.layers.push_back(pack(w[next + 1], w[next + 3], 3));
          step.state_offset = recurrent_size_;
          recurrent_size_ += kernels::padded(step.outputs);
          next += 4;
          break;
        case EncoderOp::Kind::layer_norm:
          step.layers.push_back({1, pad(w[next]), pad(w[next + 1])});
          next += 2;
          break;
        default:
          break;
      }
      dimension = step.outputs;
      width_ = std::max(width_, kernels::padded(dimension));
      steps_.push_back(std::move(step));
    }
  }

  // Floats of one user's state: the hidden states of all GRUs, then the query (see query()).
  std::size_t state_size() const noexcept {
    return recurrent_size_ + kernels::padded(parts_->item_vectors.columns());
  }

  // What item vectors are multiplied with: [padded(d)], zero beyond d.
  std::span<const float> query(std::span<const float> state) const noexcept {
    return state.subspan(recurrent_size_);
  }

  Workspace make_workspace() const { return Workspace(width_ * (2 + 6 + detail::encoder_slots)); }

  // Advances `state` ([state_size()], zeros for a new user) by one event. Allocates nothing.
  void step(const EncoderInput& input, std::span<float> state,
            Workspace& workspace) const noexcept {
    using K = kernels::Kernels<Arch>;
    const auto area = [&](std::size_t a) { return workspace.data() + a * width_; };
    float* x = area(0);
    float* y = area(1);
    for (const Step& step : steps_) {
      switch (step.op.kind) {
        case EncoderOp::Kind::embed_sum:
          embed(input, x);
          break;
        case EncoderOp::Kind::linear:
          multiply(step.layers[0], step.inputs, x, y);
          std::swap(x, y);
          break;
        case EncoderOp::Kind::gru: {
          float* hidden = state.data() + step.state_offset;
          const std::size_t stride = kernels::padded(step.outputs);
          multiply(step.layers[0], step.inputs, x, area(2));
          multiply(step.layers[1], step.outputs, hidden, area(5));
          K::gru_gates(step.outputs, stride, area(2), area(5), hidden);
          std::copy_n(hidden, stride, x);
          break;
        }
        case EncoderOp::Kind::layer_norm:
          K::layer_norm(step.outputs, 1e-5f, step.layers[0].weights.data(),
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
  }

 private:
  struct Layer {
    std::size_t blocks;
    std::vector<float> weights;  // [blocks][inputs][lanes], as matrix_vector wants them
    std::vector<float> bias;     // [blocks * lanes]
  };
  struct Step {
    EncoderOp op;
    std::size_t inputs, outputs;
    std::vector<Layer> layers;
    std::size_t state_offset;
  };

  static std::vector<float> pad(const Matrix& row) {
    std::vector<float> values(kernels::padded(row.columns()) + kernels::lanes);
    row.row(0, values);
    return values;
  }

  // The rows of `weights` come in `gates` groups; each group is padded on its own.
  static Layer pack(const Matrix& weights, const Matrix& bias, std::size_t gates) {
    const std::size_t size = weights.rows() / gates, stride = kernels::padded(size);
    const std::size_t inputs = weights.columns();
    Layer layer{gates * stride / kernels::lanes, std::vector<float>(gates * stride * inputs),
                std::vector<float>(gates * stride)};
    for (std::size_t g = 0; g < gates; ++g)
      for (std::size_t j = 0; j < size; ++j) {
        const std::size_t out = g * stride + j;
        const std::size_t block = out / kernels::lanes, lane = out % kernels::lanes;
        layer.bias[out] = bias.at(0, g * size + j);
        for (std::size_t i = 0; i < inputs; ++i)
          layer.weights[(block * inputs + i) * kernels::lanes + lane] = weights.at(g * size + j, i);
      }
    return layer;
  }

  static void multiply(const Layer& layer, std::size_t inputs, const float* x, float* y) noexcept {
    kernels::Kernels<Arch>::matrix_vector(layer.weights.data(), layer.bias.data(), inputs,
                                          layer.blocks, x, y);
  }

  static void activate(const Step& step, float* x) noexcept {
    using K = kernels::Kernels<Arch>;
    switch (static_cast<Activation>(step.op.argument)) {
      case Activation::sigmoid:
        K::sigmoid(step.outputs, x);
        break;
      case Activation::tanh:
        K::tanh(step.outputs, x);
        break;
      case Activation::relu:
        K::relu(step.outputs, x);
        break;
      case Activation::gelu:
        K::gelu(step.outputs, x);
        break;
    }
  }

  void embed(const EncoderInput& input, float* x) const noexcept {
    const std::size_t d = parts_->item_vectors.columns();
    parts_->item_vectors.row(input.item, {x, d});
    const auto add = [&](const Matrix& embedding, std::size_t row) {
      for (std::size_t c = 0; c < d; ++c) x[c] += embedding.at(row, c);
    };
    if (input.event_type < parts_->event_type_embedding.rows())
      add(parts_->event_type_embedding, input.event_type);
    if (input.time_gap < parts_->time_gap_embedding.rows())
      add(parts_->time_gap_embedding, input.time_gap);
  }

  const ModelParts* parts_;
  std::vector<Step> steps_;
  std::size_t recurrent_size_ = 0;
  std::size_t width_ = 0;
};

using Encoder = BasicEncoder<>;

// ============================================================================================
// Room 6: scorer. Owns the exact top-k over the eligible items. Uses rooms 2 and 4.
// ============================================================================================

// One bit an item.
class ItemMask {
 public:
  explicit ItemMask(std::size_t items, bool value = false)
      : items_(items), words_((items + 63) / 64, value ? ~std::uint64_t{0} : 0) {}

  std::size_t size() const noexcept { return items_; }
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

  std::uint64_t word(std::size_t w) const noexcept {
    return (eligible ? eligible->word(w) : ~std::uint64_t{0}) & ~(excluded ? excluded->word(w) : 0);
  }
  bool test(std::uint32_t item) const noexcept { return (word(item / 64) >> (item % 64) & 1) != 0; }
};

// Immutable; one for all threads. score(i) = query . v_i + b_i.
template <class Arch = kernels::Default>
class BasicScorer {
 public:
  // The model must outlive the scorer.
  explicit BasicScorer(const Model& model) : parts_(&model.parts()) {}

  // Replaces `top` by the k best eligible items, best first: exactly those of a full sort by
  // ranks_before. query: [padded(d)], zero beyond d. An item whose score is not finite is left out.
  // One pass over the item vectors; allocates only while top grows to max(2 k, k + 256).
  void top_k(std::span<const float> query, std::size_t k, const Eligibility& eligibility,
             std::vector<ScoredItem>& top) const {
    top.clear();
    if (k == 0) return;
    const std::size_t items = parts_->item_ids.size();
    const std::size_t capacity = std::max(2 * k, k + 256);
    if (top.capacity() < capacity) top.reserve(capacity);
    float threshold = -std::numeric_limits<float>::infinity();
    std::array<float, 64> scores;
    for (std::size_t begin = 0; begin < items; begin += 64) {
      const std::size_t count = std::min<std::size_t>(64, items - begin);
      const std::uint64_t allowed = eligibility.word(begin / 64);
      if (allowed == 0) continue;
      score_block(query.data(), begin, count, scores.data());
      for (std::size_t j = 0; j < count; ++j) {
        // Later items lose ties, so the comparison is strict.
        if (!(scores[j] > threshold) || (allowed >> j & 1) == 0 || !std::isfinite(scores[j]))
          continue;
        top.push_back({static_cast<std::uint32_t>(begin + j), scores[j]});
        if (top.size() == capacity) {
          keep_best(top, k);
          threshold = top[k - 1].score;
        }
      }
    }
    keep_best(top, k);
    std::sort(top.begin(), top.end(), ranks_before);
  }

  float score(std::span<const float> query, std::uint32_t item) const noexcept {
    float value;
    score_block(query.data(), item, 1, &value);
    return value;
  }

 private:
  static void keep_best(std::vector<ScoredItem>& top, std::size_t k) noexcept {
    if (top.size() <= k) return;
    std::nth_element(top.begin(), top.begin() + static_cast<std::ptrdiff_t>(k - 1), top.end(),
                     ranks_before);
    top.erase(top.begin() + static_cast<std::ptrdiff_t>(k), top.end());
  }

  void score_block(const float* query, std::size_t begin, std::size_t count,
                   float* scores) const noexcept {
    using K = kernels::Kernels<Arch>;
    const Matrix& vectors = parts_->item_vectors;
    const std::size_t d = vectors.columns();
    const float* biases = parts_->biases.data() + begin;
    if (vectors.type() == ElementType::i8)
      K::score_rows(vectors.i8().data() + begin * d, d, count, query,
                    vectors.scales().data() + begin, biases, scores);
    else
      K::score_rows(vectors.f32().data() + begin * d, d, count, query, nullptr, biases, scores);
  }

  const ModelParts* parts_;
};

using Scorer = BasicScorer<>;

// ============================================================================================
// Room 9: recommender. Owns users and sessions and answers requests. Uses rooms 1, 4, 5 and 6.
// ============================================================================================

// Why an item stands in a slate.
enum class Reason : std::uint8_t {
  relevance,  // the model's score for this user
  popular,    // nothing is known of this user: most interactions first
  unknown,    // rank() only: not in the catalogue, so it could not be ranked
};

constexpr std::string_view name(Reason reason) noexcept {
  switch (reason) {
    case Reason::relevance:
      return "relevance";
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
  float score;  // relevance: logit h . v + b; popular: share of all interactions
  Reason reason;
};

struct Slate {
  std::vector<Pick> items;
  std::shared_ptr<const Model> model;
};

struct Interaction {
  std::string_view user = {};     // empty for an anonymous visitor, who then needs a session
  std::string_view session = {};  // with a user: this session's events become the user's
  std::string_view item = {};
  std::string_view event_type = {};
  std::optional<std::int64_t> timestamp = {};  // Unix seconds; the system clock where missing
};

// What became of a recorded event.
enum class Recorded : std::uint8_t {
  learned,       // the user's state has advanced
  unknown_item,  // the item is not in the catalogue; the state is as it was
};

struct Request {
  std::string_view user = {};
  std::string_view session = {};
  std::uint32_t count = 25;            // [1, 10000]
  bool exclude_interacted = false;     // leave out the items of the user's remembered events
  const ItemMask* eligible = nullptr;  // of Model::item_count() bits; null: every item
};

struct RecommenderOptions {
  std::uint32_t history_length = 200;  // events remembered a user, [1, 65535]
  std::uint64_t max_users =
      10'000'000;  // users and sessions; the least recently used go. [64, 2^40]
};

// Serves one model to any number of threads: every member function may be called at any time from
// any thread. Users are spread over 64 locks; scoring runs outside of them.
class Recommender {
 public:
  static Result<Recommender> create(std::shared_ptr<const Model> model,
                                    const RecommenderOptions& options = {}) {
    if (!model) return Error{Errc::invalid_argument, "the model is null"};
    if (options.history_length < 1 || options.history_length > 65535)
      return Error{Errc::invalid_argument,
                   "RecommenderOptions::history_length is outside [1, 65535]"};
    if (options.max_users < 64 || options.max_users > std::uint64_t{1} << 40)
      return Error{Errc::invalid_argument, "RecommenderOptions::max_users is outside [64, 2^40]"};
    return Recommender(std::make_unique<State>(std::move(model), options));
  }

  // Advances the user's state by one event; O(1) in the length of the history.
  // Errors (invalid_argument; nothing is changed): no user and no session, an id of over 256 bytes.
  // Where both are given, the session's earlier events become the user's first.
  Result<Recorded> record(const Interaction& event) {
    if (auto checked = check_ids(event.user, event.session); !checked) return checked.error();
    const std::int64_t timestamp = event.timestamp.value_or(system_seconds());
    if (!event.user.empty() && !event.session.empty()) merge(event.session, event.user);
    const auto item = state_->model->find_item(event.item);
    if (!item) return Recorded::unknown_item;
    const auto type = state_->model->parts().event_types.find(event.event_type);
    Shard& shard = shard_of(event.user, event.session);
    const std::lock_guard lock{shard.mutex};
    advance(shard, user_in(shard, event.user, event.session),
            {*item, type.value_or(no_event_type), timestamp});
    return Recorded::learned;
  }

  // The best `count` items for the user into `slate`, whose memory is reused; fewer where fewer are
  // eligible. One pass over the catalogue. A user without events gets popular items.
  Result<void> recommend(const Request& request, Slate& slate) {
    if (auto checked = check(request); !checked) return checked;
    if (request.count < 1 || request.count > 10'000)
      return Error{Errc::invalid_argument, "Request::count is outside [1, 10000]"};
    ScratchLease scratch{*state_};
    const bool known = read_user(request, *scratch);
    slate.model = state_->model;
    slate.items.clear();
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.set(item);
    const Eligibility eligibility{request.eligible, &scratch->excluded};
    if (known) {
      state_->scorer.top_k(scratch->query, request.count, eligibility, scratch->top);
      for (const ScoredItem& scored : scratch->top)
        slate.items.push_back(
            {state_->model->item_id(scored.item), scored.score, Reason::relevance});
    } else {
      for (const std::uint32_t item : state_->popular) {
        if (slate.items.size() == request.count) break;
        if (eligibility.test(item))
          slate.items.push_back({state_->model->item_id(item), share(item), Reason::popular});
      }
    }
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.reset(item);
    return {};
  }

  Result<Slate> recommend(const Request& request) {
    Slate slate;
    if (auto done = recommend(request, slate); !done) return done.error();
    return slate;
  }

  // Orders the given items for the user, best first. Items that are not in the catalogue, not
  // eligible or excluded come last, in the given order, with reason unknown and score 0.
  // Request::count is not used.
  Result<void> rank(const Request& request, std::span<const std::string_view> items, Slate& slate) {
    if (auto checked = check(request); !checked) return checked;
    ScratchLease scratch{*state_};
    const bool known = read_user(request, *scratch);
    slate.model = state_->model;
    slate.items.clear();
    scratch->top.clear();
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.set(item);
    const Eligibility eligibility{request.eligible, &scratch->excluded};
    for (std::uint32_t position = 0; position < items.size(); ++position) {
      const auto item = state_->model->find_item(items[position]);
      if (item && eligibility.test(*item))
        scratch->top.push_back(
            {position, known ? state_->scorer.score(scratch->query, *item) : share(*item)});
    }
    std::sort(scratch->top.begin(), scratch->top.end(), ranks_before);
    for (const ScoredItem& scored : scratch->top)
      slate.items.push_back(
          {items[scored.item], scored.score, known ? Reason::relevance : Reason::popular});
    for (const std::string_view id : items) {
      const auto item = state_->model->find_item(id);
      if (!item || !eligibility.test(*item)) slate.items.push_back({id, 0.0f, Reason::unknown});
    }
    for (const std::uint32_t item : scratch->interacted) scratch->excluded.reset(item);
    return {};
  }

  // Makes an anonymous session's events the user's own, after those the user already has, and
  // forgets the session. False where there is no such session.
  Result<bool> merge_session(std::string_view session, std::string_view user) {
    if (session.empty() || user.empty())
      return Error{Errc::invalid_argument, "merge_session needs a session and a user"};
    if (auto checked = check_ids(user, session); !checked) return checked.error();
    return merge(session, user);
  }

  // Forgets a user or, with an empty user, a session. False where there was none.
  bool forget(std::string_view user, std::string_view session = {}) {
    if (user.empty() && session.empty()) return false;
    Shard& shard = shard_of(user, session);
    const std::lock_guard lock{shard.mutex};
    const auto found = shard.users.find(Key{user, session}.text);
    if (found == shard.users.end()) return false;
    shard.order.erase(found->second.place);
    shard.users.erase(found);
    return true;
  }

  // Users and sessions remembered now.
  std::size_t user_count() const {
    std::size_t count = 0;
    for (Shard& shard : state_->shards) {
      const std::lock_guard lock{shard.mutex};
      count += shard.users.size();
    }
    return count;
  }

  const std::shared_ptr<const Model>& model() const noexcept { return state_->model; }

 private:
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
    std::list<std::string_view>::iterator place;  // in Shard::order
  };

  // Users and sessions live in one map; the first byte keeps "u1" the user from "u1" the session.
  struct Key {
    Key(std::string_view user, std::string_view session)
        : text(user.empty() ? std::string(1, 's').append(session)
                            : std::string(1, 'u').append(user)) {}
    std::string text;
  };

  struct Shard {
    std::mutex mutex;
    std::unordered_map<std::string, User> users;
    std::list<std::string_view> order;  // keys, most recently used first
    Encoder::Workspace workspace;
  };

  struct Scratch {
    Scratch(std::size_t items, std::size_t query_size) : query(query_size), excluded(items) {}
    std::vector<float> query;
    std::vector<std::uint32_t> interacted;
    ItemMask excluded;  // all zero between requests
    std::vector<ScoredItem> top;
  };

  struct State {
    State(std::shared_ptr<const Model> shared, const RecommenderOptions& chosen)
        : model(std::move(shared)), options(chosen), encoder(*model), scorer(*model) {
      const auto& statistics = model->parts().statistics;
      popular.resize(model->item_count());
      std::iota(popular.begin(), popular.end(), 0u);
      std::stable_sort(popular.begin(), popular.end(), [&](std::uint32_t a, std::uint32_t b) {
        return statistics[a].interactions > statistics[b].interactions;
      });
      for (const ItemStatistics& s : statistics)
        interactions += static_cast<double>(s.interactions);
      for (Shard& shard : shards) shard.workspace = encoder.make_workspace();
    }

    std::shared_ptr<const Model> model;
    RecommenderOptions options;
    Encoder encoder;
    Scorer scorer;
    std::vector<std::uint32_t> popular;  // item indices, most interactions first
    double interactions = 0;
    std::array<Shard, 64> shards;
    std::mutex scratch_mutex;
    std::vector<std::unique_ptr<Scratch>> idle_scratch;
  };

  // Request-sized memory, taken from the idle ones and given back.
  class ScratchLease {
   public:
    explicit ScratchLease(State& state) : state_(state) {
      const std::lock_guard lock{state.scratch_mutex};
      if (state.idle_scratch.empty()) {
        scratch_ = std::make_unique<Scratch>(state.model->item_count(),
                                             kernels::padded(state.model->dimension()));
      } else {
        scratch_ = std::move(state.idle_scratch.back());
        state.idle_scratch.pop_back();
      }
    }
    ScratchLease(const ScratchLease&) = delete;
    ScratchLease& operator=(const ScratchLease&) = delete;
    ~ScratchLease() {
      const std::lock_guard lock{state_.scratch_mutex};
      state_.idle_scratch.push_back(std::move(scratch_));
    }
    Scratch& operator*() noexcept { return *scratch_; }
    Scratch* operator->() noexcept { return scratch_.get(); }

   private:
    State& state_;
    std::unique_ptr<Scratch> scratch_;
  };

  explicit Recommender(std::unique_ptr<State> state) : state_(std::move(state)) {}

  static std::int64_t system_seconds() noexcept {
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }

  static Result<void> check_ids(std::string_view user, std::string_view session) {
    if (user.empty() && session.empty())
      return Error{Errc::invalid_argument, "neither a user nor a session is given"};
    if (user.size() > max_id_bytes || session.size() > max_id_bytes)
      return Error{Errc::invalid_argument, "a user or session id has more than 256 bytes"};
    return {};
  }

  Result<void> check(const Request& request) const {
    if (auto checked = check_ids(request.user, request.session); !checked) return checked;
    if (request.eligible && request.eligible->size() != state_->model->item_count())
      return Error{Errc::invalid_argument,
                   "Request::eligible has " + std::to_string(request.eligible->size()) +
                       " bits, the model " + std::to_string(state_->model->item_count()) +
                       " items"};
    return {};
  }

  float share(std::uint32_t item) const noexcept {
    const auto count = state_->model->parts().statistics[item].interactions;
    return state_->interactions > 0
               ? static_cast<float>(static_cast<double>(count) / state_->interactions)
               : 0.0f;
  }

  Shard& shard_of(std::string_view user, std::string_view session) const noexcept {
    const std::string_view id = user.empty() ? session : user;
    return state_
        ->shards[xxh64(std::as_bytes(std::span(id)), user.empty() ? 1 : 0) % state_->shards.size()];
  }

  // Finds or adds; the caller holds the shard's lock.
  User& user_in(Shard& shard, std::string_view user, std::string_view session) {
    auto [found, added] = shard.users.try_emplace(Key{user, session}.text);
    if (!added) {
      shard.order.splice(shard.order.begin(), shard.order, found->second.place);
      return found->second;
    }
    shard.order.push_front(found->first);
    found->second.place = shard.order.begin();
    found->second.state.resize(state_->encoder.state_size());
    if (shard.users.size() > state_->options.max_users / state_->shards.size()) {
      shard.users.erase(std::string(shard.order.back()));
      shard.order.pop_back();
    }
    return found->second;
  }

  void advance(Shard& shard, User& user, const RememberedEvent& event) {
    const auto buckets =
        static_cast<std::uint32_t>(state_->model->parts().time_gap_embedding.rows());
    const std::optional<std::int64_t> previous =
        user.last_timestamp == no_timestamp ? std::nullopt : std::optional(user.last_timestamp);
    const std::uint32_t gap =
        buckets == 0 ? 0 : time_gap_bucket(previous, event.timestamp, buckets);
    state_->encoder.step({event.item, event.event_type, gap}, user.state, shard.workspace);
    user.last_timestamp = event.timestamp;
    if (user.history.size() < state_->options.history_length) {
      user.history.push_back(event);
    } else {
      user.history[user.oldest] = event;
      user.oldest = (user.oldest + 1) % user.history.size();
    }
  }

  bool merge(std::string_view session, std::string_view user) {
    std::vector<RememberedEvent> events;
    {
      Shard& shard = shard_of({}, session);
      const std::lock_guard lock{shard.mutex};
      const auto found = shard.users.find(Key{{}, session}.text);
      if (found == shard.users.end()) return false;
      User& visitor = found->second;
      std::rotate(visitor.history.begin(),
                  visitor.history.begin() + static_cast<std::ptrdiff_t>(visitor.oldest),
                  visitor.history.end());
      events = std::move(visitor.history);
      shard.order.erase(visitor.place);
      shard.users.erase(found);
    }
    Shard& shard = shard_of(user, {});
    const std::lock_guard lock{shard.mutex};
    User& known = user_in(shard, user, {});
    for (const RememberedEvent& event : events) advance(shard, known, event);
    return true;
  }

  // Copies what a request needs of the user; false where nothing is known of them. A request with a
  // user and a session is answered from the user where there is one, else from the session.
  bool read_user(const Request& request, Scratch& scratch) {
    scratch.interacted.clear();
    return (!request.user.empty() && read_state(request, request.user, {}, scratch)) ||
           (!request.session.empty() && read_state(request, {}, request.session, scratch));
  }

  bool read_state(const Request& request, std::string_view user, std::string_view session,
                  Scratch& scratch) {
    Shard& shard = shard_of(user, session);
    const std::lock_guard lock{shard.mutex};
    const auto found = shard.users.find(Key{user, session}.text);
    if (found == shard.users.end()) return false;
    shard.order.splice(shard.order.begin(), shard.order, found->second.place);
    const auto query = state_->encoder.query(found->second.state);
    std::copy(query.begin(), query.end(), scratch.query.begin());
    if (request.exclude_interacted)
      for (const RememberedEvent& event : found->second.history)
        scratch.interacted.push_back(event.item);
    return true;
  }

  std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace personalize

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // PERSONALIZE_RUNTIME_HPP
