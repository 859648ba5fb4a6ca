// What a state file holds, read by the library's own decoders, without a model.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "personalize_runtime.hpp"

namespace personalize::tools {

struct StateContents {
  detail::StateHead head;
  std::uint64_t bytes = 0;
  StringTable items, event_types;  // by number
  std::uint64_t users = 0, sessions = 0;
  std::uint64_t with_state = 0, with_events = 0, remembered_events = 0;  // of both
  std::uint64_t forgotten = 0;  // users who came with the model
  // As they have decayed when the state was saved.
  std::uint64_t items_counted = 0;
  double interactions = 0, positive = 0, expected = 0;
  std::uint64_t slates = 0, contexts = 0, event_ids = 0;
  struct Waiting {
    std::string item;
    bool removed;
  };
  std::vector<Waiting> waiting;                                   // for an update, in its order
  std::unordered_map<std::string, std::uint64_t> waiting_events;  // on an item, for its update
  std::uint64_t known = 0, removed = 0;  // put before and in now; removed before
};

struct StateVisitor {
  // Ahead of the first user, when all else but the users is known.
  std::function<void(const StateContents&)> before_users = {};
  std::function<void(const StateContents&, const detail::User&)> user = {};
};

// Reads every byte, compares every checksum, and decodes every section but what was learnt in terms
// of the model's own vectors (CATL), which only the model can tell. Takes memory for the largest
// section, a 64th of the users, and the tables of items. Errors: those of a file of sections, with
// the offset; corrupt, where sections are missing or out of order, or values contradict one
// another.
Result<void> read_state(detail::ByteSource& source, StateContents& contents,
                        const StateVisitor& visitor = {});

// The same of a file, with its path in the message.
Result<void> read_state(const std::string& path, StateContents& contents,
                        const StateVisitor& visitor = {});

// Whether the error says that bytes are not what was written, and not that they cannot be read
// here.
bool is_damage(const Error& error);

}  // namespace personalize::tools
