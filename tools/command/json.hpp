// JSON that comes from files, and JSON and text on their way to a terminal.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace personalize::tools {

// Throws Failure: "WHERE is not JSON", nests deeper than 32 levels, or has a key twice in an
// object.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// On standard output, indented, keys in the order in which they were added.
void print_json(const nlohmann::ordered_json& json);

// A number of 64 bits, which as a number not every reader of JSON would keep.
std::string hexadecimal(std::uint64_t value);

// The text, with what is no UTF-8 and control characters as \xNN.
std::string printable(std::string_view text);

}  // namespace personalize::tools
