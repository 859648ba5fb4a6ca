// Interactions and items, read from CSV in Amazon Personalize's conventions and indexed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/columns.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace personalize::tools {

class Progress;

struct Event {
  std::uint32_t item;        // index into Dataset::item_ids
  std::uint32_t event_type;  // index into Dataset::event_types; 0 where there is no such column
  std::int64_t timestamp;    // Unix seconds
};

struct ItemInfo {
  std::optional<std::int64_t> creation_timestamp;
  std::uint64_t interactions = 0;
  std::optional<std::int64_t> first, last;  // timestamps of its interactions
};

struct Dataset {
  StringTable user_ids;                       // in order of first appearance in time
  std::vector<std::vector<Event>> histories;  // per user, by timestamp; ties in file order
  // Items of interactions in order of first appearance in time, then those of the items file alone.
  StringTable item_ids;
  std::vector<ItemInfo> items;
  StringTable event_types;  // empty where there is no EVENT_TYPE column
  std::vector<MetadataColumn> metadata;
  // A line a file: what it was taken for, and each of its columns.
  std::vector<std::string> description;
  bool guessed = false;               // something in a file was read as other than it says
  std::vector<std::string> warnings;  // what does not meet or was left out, with counts
  std::uint64_t interactions = 0;
  std::int64_t first_timestamp = 0, last_timestamp = 0;
  BadRows bad_rows;
};

struct DatasetOptions {
  std::string interactions, items;  // paths; items may be empty
  bool skip_bad_rows = false;
  std::string event_type_filter;                // keep only events of this type; empty: all
  std::optional<double> event_value_threshold;  // keep only events of at least this EVENT_VALUE
  bool may_be_empty = false;                    // no interactions are no Failure
  TimestampFormat timestamps = TimestampFormat::seconds, creation_timestamps = timestamps;
  ColumnOptions columns = {};
};

// Options of every command that reads interactions: which events, and how their times are written.
// The caller keeps `options`.
std::vector<CLI::Option*> add_event_options(CLI::App& command, DatasetOptions& options);

// Options of a command that learns from the items' columns: what they are.
void add_item_options(CLI::App& command, DatasetOptions& options);

// Throws Failure: unreadable files, a bad row (unless skipped), or no interactions.
Dataset read_dataset(const DatasetOptions& options, Progress* progress = nullptr);

// What there must be to learn from. Throws Failure: fewer than two users, or no user with two
// interactions.
void require_sequences(const Dataset& data, const std::string& interactions_path);

// On standard error: the warnings and bad rows, and before them the description, where it is
// wanted or something was guessed.
void report(const Dataset& data, std::string_view command, bool describe = false);

// What describes the items of a model that was trained elsewhere. Paths; only `order` must be
// given.
struct CatalogueFiles {
  std::string order;         // CSV with ITEM_ID, a row an item, in the model's order
  std::string items;         // metadata, in any order; may be the same file
  std::string interactions;  // for statistics: popularity, first and last timestamps
  bool skip_bad_rows = false;
};

// item_ids, items and metadata in the model's order, and the totals over the interactions with
// them; other items' rows are left out. Throws Failure: unreadable files, a bad row (unless
// skipped), or no item.
Dataset read_catalogue(const CatalogueFiles& files);

// One column of a CSV of ids. Throws Failure: unreadable, an empty id or one that stands twice.
StringTable read_ids(const std::string& path, std::string_view column);

}  // namespace personalize::tools
