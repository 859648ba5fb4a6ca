#include "command/json.hpp"

#include <algorithm>
#include <cstdio>
#include <set>
#include <vector>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace json_text {

constexpr int deepest = 32;

}  // namespace json_text

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects that are open, by depth
  bool deep = false;
  std::string twice;
  auto json = nlohmann::json::parse(
      text.begin(), text.end(),
      [&](int depth, Event event, nlohmann::json& value) {
        if (depth >= json_text::deepest) {
          deep = deep || event == Event::object_start || event == Event::array_start;
          return false;
        }
        const auto level = static_cast<std::size_t>(depth);
        if (event == Event::object_start) {
          keys.resize(std::max(keys.size(), level + 2));
          keys[level + 1].clear();
        }
        if (event == Event::key && !keys[level].insert(value.get<std::string>()).second &&
            twice.empty())
          twice = value.get<std::string>();
        return true;
      },
      /*allow_exceptions=*/false);
  if (deep)
    throw Failure(where + " nests deeper than " + std::to_string(json_text::deepest) + " levels");
  if (json.is_discarded()) throw Failure(where + " is not JSON");
  if (!twice.empty())
    throw Failure(where + " has the key \"" + printable(twice.substr(0, 100)) + "\" twice");
  return json;
}

std::string hexadecimal(std::uint64_t value) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(value));
  return digits;
}

void print_json(const nlohmann::ordered_json& json) {
  // Bytes that are no UTF-8 would be an exception.
  const std::string text =
      json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  std::printf("%s\n", text.c_str());
}

std::string printable(std::string_view text) {
  std::string out;
  const auto escape = [&](char c) {
    constexpr std::string_view digits = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(c);
    out += "\\x";
    out += digits[byte >> 4];
    out += digits[byte & 15];
  };
  while (!text.empty()) {
    const std::size_t size = std::max<std::size_t>(detail::utf8_character(text), 1);
    const std::string_view character = text.substr(0, size);
    if (!detail::valid_id(character))
      for (const char c : character) escape(c);
    else
      out += character;
    text.remove_prefix(size);
  }
  return out;
}

}  // namespace personalize::tools
