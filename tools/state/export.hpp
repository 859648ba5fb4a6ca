// `personalize state export`.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace personalize::tools {

enum class EventFormat { csv, jsonl };

struct StateExport {
  std::string path, output;  // a folder or a state file; empty: standard output
  EventFormat format = EventFormat::csv;
  std::optional<std::string> session_prefix =
      {};                         // CSV: sessions are users whose ids begin with it
  std::string unknown_type = {};  // CSV: of events of no type that the model knew
};

// Returns what there is to say of it. Throws Failure; then the output is not there.
std::vector<std::string> export_state(const StateExport& options);

}  // namespace personalize::tools
