// The protocols: which events train, validate and test.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "../personalize_runtime.hpp"
#include "../tools/command/command.hpp"
#include "../tools/data/split.hpp"

namespace {

using namespace personalize::tools;

void check(const UserSplit& got, std::size_t train_end, bool validates, std::size_t test_begin) {
  CHECK(got.train_end == train_end);
  CHECK(got.validates == validates);
  CHECK(got.test_begin == test_begin);
}

bool held_out(const std::string& user, std::uint64_t seed) {
  return split_user(Protocol::holdout, seed, user, 5).train_end == 0;
}

// The first of "u0", "u1", ... that is, or is not, held out.
std::string user_held_out(bool wanted, std::uint64_t seed) {
  for (int u = 0;; ++u)
    if (held_out("u" + std::to_string(u), seed) == wanted) return "u" + std::to_string(u);
}

}  // namespace

TEST_CASE("protocols are named as on the command line") {
  for (const Protocol protocol : {Protocol::leave_one_out, Protocol::holdout, Protocol::all})
    CHECK(parse_protocol(name(protocol)) == protocol);
  CHECK(name(Protocol::leave_one_out) == "leave-one-out");
  CHECK_THROWS_WITH_AS(parse_protocol("random"),
                       "option --protocol: 'random' is not one of leave-one-out, holdout, all",
                       Usage);
}

TEST_CASE("leave-one-out tests on the last event and validates on the last but one") {
  for (std::size_t n = 0; n < 3; ++n)
    check(split_user(Protocol::leave_one_out, 1, "u", n), n, false, n);
  for (const std::size_t n : {3u, 4u, 100u})
    check(split_user(Protocol::leave_one_out, 1, "u", n), n - 2, true, n - 1);
}

TEST_CASE("with every event in training, the last one of each user validates") {
  for (std::size_t n = 0; n < 3; ++n) check(split_user(Protocol::all, 1, "u", n), n, false, n);
  for (const std::size_t n : {3u, 4u, 100u})
    check(split_user(Protocol::all, 1, "u", n), n - 1, true, n);
}

TEST_CASE("holdout tests on the newest tenth of a held-out user's events, at least one") {
  const std::string out = user_held_out(true, 7), in = user_held_out(false, 7);
  check(split_user(Protocol::holdout, 7, out, 0), 0, false, 0);
  check(split_user(Protocol::holdout, 7, out, 1), 0, false, 1);
  for (const auto& events :
       {std::pair{2u, 1u}, {3u, 1u}, {10u, 1u}, {11u, 2u}, {20u, 2u}, {21u, 3u}, {1000u, 100u}}) {
    const auto n = events.first, newest = events.second;
    CAPTURE(n);
    check(split_user(Protocol::holdout, 7, out, n), 0, false, n - newest);
    if (n < 3)
      check(split_user(Protocol::holdout, 7, in, n), n, false, n);
    else
      check(split_user(Protocol::holdout, 7, in, n), n - 1, true, n);
  }
}

TEST_CASE(
    "about a tenth of the users is held out: others for another seed, the same for the same") {
  constexpr int users = 20'000;
  int first = 0, second = 0, both = 0;
  for (int u = 0; u < users; ++u) {
    const std::string user = "user-" + std::to_string(u);
    const bool a = held_out(user, 1), b = held_out(user, 2);
    CHECK(a == held_out(user, 1));
    CHECK(a == (personalize::xxh64(std::as_bytes(std::span(user)), 1) % 10 == 0));
    first += a;
    second += b;
    both += a && b;
  }
  // Four standard deviations of the binomial shares.
  CHECK(std::abs(first / double{users} - 0.1) < 0.0085);
  CHECK(std::abs(second / double{users} - 0.1) < 0.0085);
  CHECK(std::abs(both / double{users} - 0.01) < 0.0028);
}

TEST_CASE("no event is both trained on and tested on, under any protocol") {
  for (const Protocol protocol : {Protocol::leave_one_out, Protocol::holdout, Protocol::all})
    for (std::size_t n = 0; n < 60; ++n)
      for (int u = 0; u < 40; ++u) {
        const UserSplit split = split_user(protocol, 3, "u" + std::to_string(u), n);
        CHECK(split.train_end + (split.validates ? 1 : 0) <= split.test_begin);
        CHECK(split.test_begin <= n);
      }
}
