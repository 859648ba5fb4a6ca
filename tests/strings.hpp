// String tables against plain lists, and what a text contains.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "personalize_runtime.hpp"

inline personalize::StringTable table_of(std::initializer_list<std::string_view> texts) {
  personalize::StringTable table;
  for (const std::string_view text : texts)
    if (!table.add(text)) std::abort();
  return table;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline std::vector<std::string> strings(const personalize::StringTable& table) {
  std::vector<std::string> all;
  for (std::size_t i = 0; i < table.size(); ++i) all.emplace_back(table[i]);
  return all;
}
