// What a recommender remembers of whom, by the blobs that it exports.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../personalize_runtime.hpp"

// "item,event type,timestamp" of each event of a user or session, oldest first; of none nothing.
inline std::vector<std::string> remembered(const personalize::Recommender& shop,
                                           const std::string& user, const std::string& session) {
  std::vector<std::string> rows;
  const auto bytes = shop.export_user(user, session);
  REQUIRE(bytes);
  if (bytes->empty()) return rows;
  const auto blob = personalize::detail::Blob::read(*bytes);
  REQUIRE(blob);
  blob->for_each_event([&](std::string_view item, std::string_view type, std::int64_t time) {
    rows.push_back(std::string(item) + ',' + std::string(type) + ',' + std::to_string(time));
  });
  return rows;
}
