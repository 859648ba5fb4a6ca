// `personalize state inspect` and `verify`.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>

namespace personalize::tools {

// Of a folder, or of one .pzs or .pzj file.
struct StateReport {
  nlohmann::ordered_json says;
  std::string failure;  // what is damaged, in a sentence; empty: nothing
};

// Both throw Failure where there is no such folder or file, or it cannot be read.
StateReport inspect_state(const std::string& path);
StateReport verify_state(const std::string& path);

void print_inspected(const StateReport& report);
void print_verified(const StateReport& report);

}  // namespace personalize::tools
