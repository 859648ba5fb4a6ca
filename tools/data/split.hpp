// Which events of a user are trained on, validated on and tested on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace personalize::tools {

enum class Protocol {
  leave_one_out,  // the last event tests, the last but one validates
  holdout,  // Amazon Personalize's: a tenth of the users is not trained on; the newest tenth of
            // their events tests
  all,      // every event trains but each user's last, which validates (for early stopping)
};

std::string_view name(Protocol protocol);

// "leave-one-out", "holdout" or "all"; throws Usage.
Protocol parse_protocol(std::string_view text);

// A history of n events: [0, train_end) trains; event train_end validates if validates;
// [test_begin, n) tests, given all before it (test_begin == n: the user is not evaluated).
struct UserSplit {
  std::size_t train_end;
  bool validates;
  std::size_t test_begin;
};

// Under holdout a user is held out iff xxh64(user_id, seed) is divisible by ten; one with a single
// event neither trains nor tests. Other histories of fewer than 3 events train as they are: less
// an event, there would be no next one to learn.
UserSplit split_user(Protocol protocol, std::uint64_t seed, std::string_view user_id,
                     std::size_t events);

}  // namespace personalize::tools
