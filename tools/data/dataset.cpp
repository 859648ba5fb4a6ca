#include "data/dataset.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string_view>

#include "command/command.hpp"
#include "data/csv.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

constexpr std::int64_t earliest_creation = -62'135'596'800;  // 0001-01-01
constexpr std::size_t numeric_buckets = 16;

struct Row {
  std::uint32_t user, item, event_type;
  std::int64_t timestamp;
};

// The number of a string of 1 to 256 bytes, which joins the table where it is new.
std::uint32_t number_of(StringTable& table, std::string_view text) {
  if (const auto found = table.find(text)) return *found;
  const auto added = table.add(text);
  if (!added) throw Failure(added.error().message);
  return *added;
}

std::optional<float> number_in(std::string_view text) {
  const auto value = read_number(text);
  // A NaN fails the comparison.
  if (!value || !(std::abs(*value) <= std::numeric_limits<float>::max())) return std::nullopt;
  return static_cast<float>(*value);
}

std::vector<Row> read_interactions(const DatasetOptions& options, Dataset& data, StringTable& users,
                                   StringTable& items, StringTable& types, Progress* progress) {
  CsvReader reader(options.interactions);
  const std::size_t user = reader.require("USER_ID"), item = reader.require("ITEM_ID"),
                    time = reader.require("TIMESTAMP");
  const auto type = reader.column("EVENT_TYPE");
  if (!type && !options.event_type_filter.empty())
    throw Failure(options.interactions + ":" + std::to_string(reader.line()) +
                  ": no column EVENT_TYPE to choose '" + options.event_type_filter + "' from");
  std::vector<Row> rows;
  for_each_row(reader, data.bad_rows, [&] {
    const std::string_view user_id = id_field(reader, user), item_id = id_field(reader, item);
    const std::int64_t timestamp = timestamp_field(reader, time);
    const std::string_view type_name = type ? id_field(reader, *type) : std::string_view{};
    if (!options.event_type_filter.empty() && type_name != options.event_type_filter) return;
    rows.push_back({number_of(users, user_id), number_of(items, item_id),
                    type ? number_of(types, type_name) : 0, timestamp});
    if (progress && rows.size() % 65536 == 0)
      progress->update(0, std::to_string(rows.size()) + " interactions");
  });
  return rows;
}

// Whole-field values of one metadata column, by item.
struct RawColumn {
  std::string name;
  std::vector<std::pair<std::uint32_t, std::string>> values;
};

void add_column(RawColumn&& raw, std::size_t items, Dataset& data) {
  std::set<std::string_view> distinct;
  bool all_numbers = true;
  for (const auto& [item, value] : raw.values) {
    distinct.insert(value);
    all_numbers = all_numbers && number_in(value).has_value();
  }
  MetadataColumn column;
  column.name = raw.name;
  column.values.resize(items);
  if (distinct.empty()) {
    data.ignored_columns.push_back(raw.name + " (no values)");
    return;
  }
  if (all_numbers && distinct.size() > numeric_buckets) {
    column.numeric = true;
    std::vector<float> sorted;
    for (const auto& [item, value] : raw.values) sorted.push_back(*number_in(value));
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t b = 1; b < numeric_buckets; ++b) {
      const float boundary = sorted[b * sorted.size() / numeric_buckets];
      if (column.boundaries.empty() || boundary > column.boundaries.back())
        column.boundaries.push_back(boundary);
    }
    for (const auto& [item, value] : raw.values) {
      const auto at =
          std::upper_bound(column.boundaries.begin(), column.boundaries.end(), *number_in(value));
      column.values[item] = {static_cast<std::uint32_t>(at - column.boundaries.begin())};
    }
    data.metadata.push_back(std::move(column));
    return;
  }
  if (distinct.size() > 1000 && distinct.size() * 5 > items) {
    data.ignored_columns.push_back(raw.name + " (free text: " + std::to_string(distinct.size()) +
                                   " distinct values for " + std::to_string(items) + " items)");
    return;
  }
  for (const auto& [item, value] : raw.values) {
    for (std::size_t begin = 0; begin <= value.size();) {
      const std::size_t end = std::min(value.find('|', begin), value.size());
      const std::string_view part = std::string_view(value).substr(begin, end - begin);
      if (!part.empty() && part.size() <= max_id_bytes && detail::valid_id(part))
        column.values[item].push_back(number_of(column.vocabulary, part));
      begin = end + 1;
    }
  }
  if (column.vocabulary.size() == 0)
    data.ignored_columns.push_back(raw.name + " (no values)");
  else
    data.metadata.push_back(std::move(column));
}

void read_items(const std::string& path, Dataset& data, StringTable& items) {
  CsvReader reader(path);
  const std::size_t id = reader.require("ITEM_ID");
  const auto creation = reader.column("CREATION_TIMESTAMP");
  std::vector<RawColumn> columns(reader.columns().size());
  for (std::size_t c = 0; c < columns.size(); ++c) {
    columns[c].name = reader.columns()[c];
    if (columns[c].name.empty() || columns[c].name.size() > max_id_bytes)
      throw Failure(path + ":" + std::to_string(reader.line()) +
                    ": a column name has 1 to 256 bytes, that of column " + std::to_string(c + 1) +
                    " has " + std::to_string(columns[c].name.size()));
    if (!detail::valid_id(columns[c].name))
      throw Failure(path + ":" + std::to_string(reader.line()) + ": the name of column " +
                    std::to_string(c + 1) + " holds a control character");
  }
  std::vector<char> seen;
  for_each_row(reader, data.bad_rows, [&] {
    const std::string_view item_id = id_field(reader, id);
    std::optional<std::int64_t> created;
    if (creation && !reader.field(*creation).empty())
      created = timestamp_field(reader, *creation, earliest_creation);
    const std::uint32_t item = number_of(items, item_id);
    if (item >= seen.size()) seen.resize(std::max<std::size_t>(item + 1, 2 * seen.size()));
    if (seen[item]) reader.refuse(id, "'" + std::string(item_id) + "' stands twice");
    seen[item] = 1;
    if (created) {
      if (item >= data.items.size()) data.items.resize(item + 1);
      data.items[item].creation_timestamp = created;
    }
    for (std::size_t c = 0; c < columns.size(); ++c)
      if (c != id && (!creation || c != *creation) && !reader.field(c).empty())
        columns[c].values.emplace_back(item, reader.field(c));
  });
  data.items.resize(items.size());
  for (std::size_t c = 0; c < columns.size(); ++c)
    if (c != id && (!creation || c != *creation))
      add_column(std::move(columns[c]), data.items.size(), data);
}

}  // namespace

Dataset read_dataset(const DatasetOptions& options, Progress* progress) {
  Dataset data;
  data.bad_rows.skip = options.skip_bad_rows;
  StringTable users, items_as_read, types;
  std::vector<Row> rows = read_interactions(options, data, users, items_as_read, types, progress);
  if (rows.empty() && !options.may_be_empty)
    throw Failure(options.interactions + ": holds no interactions" +
                  (options.event_type_filter.empty()
                       ? ""
                       : " whose EVENT_TYPE is '" + options.event_type_filter + "'") +
                  data.bad_rows.reason());
  std::stable_sort(rows.begin(), rows.end(),
                   [](const Row& a, const Row& b) { return a.timestamp < b.timestamp; });
  StringTable items, ordered_users;
  for (Row& row : rows) {
    row.item = number_of(items, items_as_read[row.item]);
    row.user = number_of(ordered_users, users[row.user]);
  }
  data.user_ids = std::move(ordered_users);
  data.event_types = std::move(types);
  data.items.resize(items.size());
  data.histories.resize(data.user_ids.size());
  data.interactions = rows.size();
  if (!rows.empty()) {
    data.first_timestamp = rows.front().timestamp;
    data.last_timestamp = rows.back().timestamp;
  }
  for (const Row& row : rows) {
    ItemInfo& info = data.items[row.item];
    ++info.interactions;
    if (!info.first) info.first = row.timestamp;
    info.last = row.timestamp;
    data.histories[row.user].push_back({row.item, row.event_type, row.timestamp});
  }
  if (!options.items.empty()) read_items(options.items, data, items);
  data.item_ids = std::move(items);
  return data;
}

void require_sequences(const Dataset& data, const std::string& interactions_path) {
  if (data.user_ids.size() < 2)
    throw Failure(interactions_path + ": only one user (" + std::string(data.user_ids[0]) +
                  "); a model needs the interactions of at least two");
  if (std::none_of(data.histories.begin(), data.histories.end(),
                   [](const auto& history) { return history.size() >= 2; }))
    throw Failure(interactions_path +
                  ": no user has two interactions; there is no sequence to learn from");
}

Dataset read_catalogue(const CatalogueFiles& files) {
  Dataset data;
  data.bad_rows.skip = files.skip_bad_rows;
  if (files.order == files.items) {
    read_items(files.items, data, data.item_ids);
  } else {
    data.item_ids = read_ids(files.order, "ITEM_ID");
    StringTable items = data.item_ids;  // and those that the model does not have, behind them
    if (!files.items.empty()) read_items(files.items, data, items);
  }
  if (data.item_ids.empty()) throw Failure(files.order + ": holds no items");
  data.items.resize(data.item_ids.size());
  for (MetadataColumn& column : data.metadata) column.values.resize(data.item_ids.size());
  if (files.interactions.empty()) return data;

  CsvReader reader(files.interactions);
  const std::size_t id = reader.require("ITEM_ID"), time = reader.require("TIMESTAMP");
  for_each_row(reader, data.bad_rows, [&] {
    const auto item = data.item_ids.find(id_field(reader, id));
    const std::int64_t timestamp = timestamp_field(reader, time);
    if (!item) return;
    ItemInfo& info = data.items[*item];
    ++info.interactions;
    info.first = std::min(info.first.value_or(timestamp), timestamp);
    info.last = std::max(info.last.value_or(timestamp), timestamp);
    if (data.interactions++ == 0) data.first_timestamp = data.last_timestamp = timestamp;
    data.first_timestamp = std::min(data.first_timestamp, timestamp);
    data.last_timestamp = std::max(data.last_timestamp, timestamp);
  });
  return data;
}

StringTable read_ids(const std::string& path, std::string_view column) {
  CsvReader reader(path);
  const std::size_t id = reader.require(column);
  StringTable ids;
  for_every_row(reader, [&] {
    const std::size_t before = ids.size();
    number_of(ids, id_field(reader, id));
    if (ids.size() == before)
      reader.refuse(id, "'" + std::string(reader.field(id)) + "' stands twice");
  });
  return ids;
}

}  // namespace personalize::tools
