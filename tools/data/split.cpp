#include "data/split.hpp"

#include <algorithm>
#include <span>
#include <string>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

std::string_view name(Protocol protocol) {
  switch (protocol) {
    case Protocol::leave_one_out:
      return "leave-one-out";
    case Protocol::holdout:
      return "holdout";
    case Protocol::all:
      return "all";
  }
  return "";
}

Protocol parse_protocol(std::string_view text) {
  for (const Protocol protocol : {Protocol::leave_one_out, Protocol::holdout, Protocol::all})
    if (text == name(protocol)) return protocol;
  throw Usage("option --protocol: '" + std::string(text) +
              "' is not one of leave-one-out, holdout, all");
}

UserSplit split_user(Protocol protocol, std::uint64_t seed, std::string_view user_id,
                     std::size_t events) {
  const UserSplit trained{events, false, events};
  switch (protocol) {
    case Protocol::leave_one_out:
      return events < 3 ? trained : UserSplit{events - 2, true, events - 1};
    case Protocol::holdout: {
      if (xxh64(std::as_bytes(std::span(user_id)), seed) % 10 != 0) break;
      if (events < 2) return {0, false, events};
      const std::size_t newest = std::clamp<std::size_t>((events + 9) / 10, 1, events - 1);
      return {0, false, events - newest};
    }
    case Protocol::all:
      break;
  }
  return events < 3 ? trained : UserSplit{events - 1, true, events};
}

}  // namespace personalize::tools
