// The vectors of plain values, against std::vector.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <list>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

namespace {

struct Three {
  std::uint32_t a = 7, b = 8, c = 9;
  friend bool operator==(const Three&, const Three&) = default;
};

template <class T>
T made(std::uint32_t n) {
  if constexpr (std::is_same_v<T, Three>)
    return {n, n + 1, n + 2};
  else if constexpr (std::is_same_v<T, std::string>)
    return std::string(n, 's');
  else
    return static_cast<T>(n);
}

template <class Ours, class T>
void require_same(const Ours& ours, const std::vector<T>& theirs) {
  REQUIRE(ours.size() == theirs.size());
  REQUIRE(ours.empty() == theirs.empty());
  REQUIRE(ours.capacity() >= ours.size());
  REQUIRE(std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end()));
  REQUIRE(std::equal(ours.rbegin(), ours.rend(), theirs.rbegin(), theirs.rend()));
}

// Random calls, the same on both. resize: whether what it adds is known.
template <class Ours>
void compare_with_std(std::uint64_t seed, bool resize) {
  using T = typename Ours::value_type;
  std::mt19937_64 random(seed);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  Ours ours, other;
  std::vector<T> theirs, their_other;
  for (int step = 0; step < 4000; ++step) {
    const T value = made<T>(static_cast<std::uint32_t>(random() % 100));
    const std::size_t at = below(theirs.size() + 1);
    const auto place = static_cast<std::ptrdiff_t>(at);
    auto told = ours.begin();  // where calls said that it happened
    bool tells = false;
    switch (below(16)) {
      case 0:
      case 1:
      case 2:
        ours.push_back(value);
        theirs.push_back(value);
        break;
      case 3:
        ours.emplace_back(value);
        theirs.emplace_back(value);
        break;
      case 4: {  // an element of its own, which may move meanwhile
        if (theirs.empty()) break;
        ours.push_back(ours[at % theirs.size()]);
        theirs.push_back(T(theirs[at % theirs.size()]));
        break;
      }
      case 5:
        if (theirs.empty()) break;
        told = ours.insert(ours.begin() + place, ours.back());
        tells = true;
        theirs.insert(theirs.begin() + place, T(theirs.back()));
        break;
      case 6: {
        const std::size_t count = below(5);
        told = ours.insert(ours.begin() + place, count, value);
        tells = true;
        theirs.insert(theirs.begin() + place, count, value);
        break;
      }
      case 7: {
        const std::list<T> more(below(6), value);
        ours.insert(ours.begin() + place, more.begin(), more.end());
        theirs.insert(theirs.begin() + place, more.begin(), more.end());
        break;
      }
      case 8:
        if (at == theirs.size()) break;
        told = ours.erase(ours.begin() + place);
        tells = true;
        theirs.erase(theirs.begin() + place);
        break;
      case 9: {
        const auto last = place + static_cast<std::ptrdiff_t>(below(theirs.size() + 1 - at));
        ours.erase(ours.begin() + place, ours.begin() + last);
        theirs.erase(theirs.begin() + place, theirs.begin() + last);
        break;
      }
      case 10: {
        const std::size_t size = resize ? below(60) : std::min(theirs.size(), below(60));
        ours.resize(size);
        theirs.resize(size);
        break;
      }
      case 11: {
        const std::size_t size = below(60);
        ours.resize(size, value);
        theirs.resize(size, value);
        break;
      }
      case 12:
        ours.swap(other);
        theirs.swap(their_other);
        break;
      case 13:
        other = ours;
        their_other = theirs;
        REQUIRE(other == ours);
        break;
      case 14:
        if (below(2) == 0) {
          ours.assign(below(9), value);
          theirs.assign(ours.size(), value);
        } else {
          ours = Ours(std::as_const(other));
          theirs = their_other;
        }
        break;
      default:
        if (!theirs.empty()) {
          ours.pop_back();
          theirs.pop_back();
        }
        if (below(8) == 0) ours.shrink_to_fit();
        if (below(8) == 0) ours.reserve(below(80));
    }
    if (tells) REQUIRE(told == ours.begin() + place);
    require_same(ours, theirs);
  }
}

}  // namespace

TEST_CASE("a vector does what std::vector does") {
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    compare_with_std<pz::Vector<std::uint8_t>>(seed, true);
    compare_with_std<pz::Vector<float>>(seed, true);
    compare_with_std<pz::Vector<Three>>(seed, true);
    compare_with_std<pz::Vector<std::string>>(seed, true);  // memcpy does not copy these
    compare_with_std<pz::detail::LineVector<float>>(seed, true);
    compare_with_std<pz::detail::BareVector<std::uint64_t>>(seed, false);
  }
}

TEST_CASE("a vector is what it is made of, and keeps it when it is assigned to itself") {
  const std::vector<float> theirs{1, 2, 3};
  pz::Vector<float> ours = theirs;
  require_same(ours, theirs);
  CHECK(std::vector<float>(ours) == theirs);
  const auto& same = ours;
  ours = same;
  require_same(ours, theirs);
  pz::Vector<float> moved = std::move(ours);
  require_same(moved, theirs);
  CHECK(ours.empty());  // NOLINT(bugprone-use-after-move)
  ours = {4, 5};
  CHECK(ours == pz::Vector<float>{4, 5});
  CHECK_FALSE(ours == pz::Vector<float>{4, 6});
  CHECK(pz::Vector<Three>(2) == pz::Vector<Three>{Three{}, Three{}});
  CHECK(pz::Vector<int>(3, 1) == pz::Vector<int>{1, 1, 1});
  moved.clear();
  CHECK(moved.capacity() >= 3);
  moved.shrink_to_fit();
  CHECK(moved.capacity() == 0);
}

TEST_CASE("vectors for rows begin at a line of the cache, on Linux large ones at a huge page") {
#if defined(__linux__)
  constexpr std::size_t of_large = std::size_t{1} << 21;
#else
  constexpr std::size_t of_large = 64;
#endif
  const auto address = [](const auto& values) {
    return reinterpret_cast<std::uintptr_t>(values.data());
  };
  for (const std::size_t size : {std::size_t{1}, std::size_t{100}, std::size_t{1} << 20}) {
    const pz::detail::LineVector<float> values(size, 1.5f);
    const pz::detail::BareVector<float> bare(size);
    const std::size_t aligned = size < (std::size_t{1} << 20) ? 64 : of_large;
    CHECK(address(values) % aligned == 0);
    CHECK(address(bare) % aligned == 0);
    CHECK(std::count(values.begin(), values.end(), 1.5f) == static_cast<std::ptrdiff_t>(size));
  }
  pz::detail::LineVector<float> grown;  // across the size from which on they lie elsewhere
  for (std::uint32_t i = 0; i < (1u << 20) + 5; ++i) grown.push_back(static_cast<float>(i));
  CHECK(address(grown) % of_large == 0);
  CHECK(grown[1u << 20] == static_cast<float>(1u << 20));
}

#if defined(__linux__)
// From its heaps glibc would give such memory out of between what stays, and keep it.
TEST_CASE("what large vectors held goes back to the system at once") {
  const auto resident = [] {  // MiB
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
      if (line.starts_with("VmRSS:")) return std::stod(line.substr(6)) / 1024;
    return 0.0;
  };
  const auto check = [&](auto empty) {
    using Ours = decltype(empty);
    const double before = resident();
    std::vector<Ours> large;
    std::vector<std::vector<int>> stay;
    large.reserve(24), stay.reserve(24);
    large.emplace_back(8u << 20, 1.0f);
    large.pop_back();
    for (int n = 0; n < 24; ++n) {
      large.emplace_back((5u << 18) + 1, 1.0f);
      stay.emplace_back(1000, n);
    }
    CHECK(resident() - before > 100);
    large.clear();
    CHECK(resident() - before < 20);
  };
  check(pz::Vector<float>());
  check(pz::detail::LineVector<float>());
}
#endif

#if PERSONALIZE_HAS_EXCEPTIONS
TEST_CASE("a vector that cannot be so long says so, and stays as it is") {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  pz::Vector<std::uint64_t> values{1, 2, 3};
  for (const std::size_t size : {most, most / 8 + 1, most / 16 + 1}) {
    CHECK_THROWS_AS(values.resize(size), std::bad_alloc);
    CHECK_THROWS_AS(values.reserve(size), std::bad_alloc);
    CHECK_THROWS_AS(values.insert(values.begin(), size, 4), std::bad_alloc);
    CHECK_THROWS_AS(pz::Vector<std::uint64_t>{}.resize(size), std::bad_alloc);
    CHECK(values == pz::Vector<std::uint64_t>{1, 2, 3});
  }
}
#endif
