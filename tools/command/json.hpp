// JSON that comes from files, and JSON and text on their way to a terminal.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace personalize::tools {

// Throws Failure: "WHERE is not JSON", nests deeper than 32 levels, or has a key twice in an
// object.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// On standard output, indented, keys in the order in which they were added.
void print_json(const nlohmann::ordered_json& json);

// The text, with what is no UTF-8 and control characters as \xNN.
std::string printable(std::string_view text);

}  // namespace personalize::tools
