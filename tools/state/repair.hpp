// `personalize state repair`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace personalize::tools {

struct StateRepair {
  std::string folder, from;  // from: a copy made by save(path); empty: of what is there
  bool dry_run = false;
};

struct StateRepaired {
  std::vector<std::string> steps;                  // in words; none: the folder is sound
  std::uint64_t lost_bytes = 0, lost_records = 0;  // of journals; whole records
};

// Throws Failure where the folder cannot be repaired, or another process has it open; then nothing
// was changed.
StateRepaired repair_state(const StateRepair& options);

}  // namespace personalize::tools
