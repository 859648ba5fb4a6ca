#include "data/dataset.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string_view>
#include <unordered_set>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "data/csv.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace dataset {

constexpr std::int64_t earliest_creation = -62'135'596'800;  // 0001-01-01
constexpr std::string_view timestamp_option = "--timestamp-format",
                           creation_option = "--creation-timestamp-format";

struct Row {
  std::uint32_t user, item, event_type;
  float value;  // EVENT_VALUE; NaN where there is none
  std::int64_t timestamp;
  std::uint64_t digest;  // of the whole row
};

std::string date_of(std::int64_t timestamp) {
  using namespace std::chrono;
  const year_month_day date{floor<days>(sys_seconds(seconds(timestamp)))};
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%04d-%02u-%02u", static_cast<int>(date.year()),
                static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()));
  return text.data();
}

// The beginning of a file's description: "events.csv (gzip): ".
std::string file_and_forms(const CsvReader& reader, Dataset& data) {
  std::string text;
  for (const std::string& form : reader.forms()) text += (text.empty() ? " (" : ", ") + form;
  data.guessed = data.guessed || !text.empty();
  return reader.name() + text + (text.empty() ? ": " : "): ");
}

// "USER_ID (id)", and "user (USER_ID, id)" where the header spells it otherwise.
std::string known_column(const CsvReader& reader, std::size_t column, const std::string& name,
                         const std::string& use, Dataset& data) {
  const std::string& found = reader.columns()[column];
  if (found == name) return name + " (" + use + ")";
  data.guessed = true;
  return printable(found) + " (" + name + ", " + use + ")";
}

std::string shown_name(const CsvReader& reader, std::size_t column) {
  const std::string& found = reader.columns()[column];
  return found.empty() ? "column " + std::to_string(column + 1) : printable(found);
}

std::string joined(const std::vector<std::string>& parts) {
  constexpr std::size_t most = 40;
  std::string text;
  for (std::size_t i = 0; i < std::min(parts.size(), most); ++i)
    text += (i == 0 ? "" : ", ") + parts[i];
  return parts.size() <= most ? text
                              : text + " and " + count_of(parts.size() - most, "more column");
}

// Ids with blanks around them: they were taken without.
class Blanks {
 public:
  std::string_view id(const CsvReader& reader, std::size_t column) {
    const std::string_view id = id_field(reader, column);
    count_ += id.size() != reader.field(column).size() ? 1 : 0;
    return id;
  }
  void warn(const CsvReader& reader, Dataset& data) const {
    if (count_ > 0)
      data.warnings.push_back(reader.name() + ": " + count_of(count_, "id") +
                              " with blanks around them were taken without the blanks");
  }

 private:
  std::uint64_t count_ = 0;
};

void warn_left_out_values(const CsvReader& reader, Dataset& data) {
  if (reader.left_out_values() > 0)
    data.warnings.push_back(reader.name() + ": " + count_of(reader.left_out_values(), "value") +
                            " of keys that none of the first objects has were left out");
}

// The interactions file on its way into rows.
class Interactions {
 public:
  Interactions(const DatasetOptions& options, const ColumnChoices& choices, Dataset& data)
      : options_(options), choices_(choices), data_(data), reader_(options.interactions) {
    if (!reader_.column("USER_ID") && !reader_.column("TIMESTAMP") && reader_.column("ITEM_ID"))
      throw Failure(reader_.name() +
                    ": has ITEM_ID but neither USER_ID nor TIMESTAMP: an items "
                    "file, which goes to --items; interactions are wanted here");
    user_ = reader_.require("USER_ID");
    item_ = reader_.require("ITEM_ID");
    time_ = reader_.require("TIMESTAMP");
    type_ = wanted("EVENT_TYPE");
    value_ = wanted("EVENT_VALUE");
    choices.check_schema(ColumnChoices::File::interactions, reader_);
    if (!type_ && !options.event_type_filter.empty())
      throw Failure(place() + ": no column EVENT_TYPE to choose '" + options.event_type_filter +
                    "' from");
    if (!value_ && options.event_value_threshold)
      throw Failure(place() + ": no column EVENT_VALUE for --event-value-threshold");
  }

  const CsvReader& reader() const { return reader_; }

  std::vector<Row> read(StringTable& users, StringTable& items, StringTable& types,
                        Progress* progress) {
    std::vector<Row> rows;
    for_each_row(reader_, data_.bad_rows, [&] {
      const std::string_view user_id = blanks_.id(reader_, user_),
                             item_id = blanks_.id(reader_, item_);
      const std::int64_t timestamp =
          timestamp_field(reader_, time_, 0, options_.timestamps, timestamp_option);
      if (const auto number = read_number(trimmed(reader_.field(time_)));
          options_.timestamps == TimestampFormat::seconds && number)
        fractions_ += *number != std::floor(*number) ? 1 : 0;
      const std::string_view type = type_ ? blanks_.id(reader_, *type_) : std::string_view{};
      const float value = event_value();
      if (!options_.event_type_filter.empty() && type != options_.event_type_filter) {
        ++of_other_types_;
        return;
      }
      if (options_.event_value_threshold && !(value >= *options_.event_value_threshold)) {
        ++below_threshold_;
        return;
      }
      rows.push_back({number_of(users, user_id), number_of(items, item_id),
                      type_ ? number_of(types, type) : 0, value, timestamp, reader_.digest()});
      if (progress && rows.size() % 65536 == 0)
        progress->update(0, std::to_string(rows.size()) + " interactions");
    });
    return rows;
  }

  // To end the message that no row is left.
  std::string why_none() const {
    std::string text;
    if (of_other_types_ > 0)
      text += " whose EVENT_TYPE is '" + options_.event_type_filter + "' (" +
              count_of(of_other_types_, "row") + " of other types)";
    if (below_threshold_ > 0)
      text += " whose EVENT_VALUE reaches the threshold (" + count_of(below_threshold_, "row") +
              " below it or without one)";
    return text;
  }

  // `rows` are in order of time.
  void describe(const std::vector<Row>& rows, std::uint64_t duplicates) {
    const auto known = [&](std::size_t column, const char* name, const std::string& use) {
      return known_column(reader_, column, name, use, data_);
    };
    std::vector<std::string> parts;
    for (std::size_t c = 0; c < reader_.columns().size(); ++c) {
      if (c == user_)
        parts.push_back(known(c, "USER_ID", "id"));
      else if (c == item_)
        parts.push_back(known(c, "ITEM_ID", "id"));
      else if (c == time_)
        parts.push_back(known(c, "TIMESTAMP", time_text()));
      else if (c == type_)
        parts.push_back(known(c, "EVENT_TYPE", type_text()));
      else if (c == value_)
        parts.push_back(known(c, "EVENT_VALUE", value_text()));
      else
        parts.push_back(shown_name(reader_, c) + " (left out: " + reason(c) + ")");
    }
    data_.description.push_back(file_and_forms(reader_, data_) +
                                count_of(data_.interactions, "interaction") + " of " +
                                count_of(data_.user_ids.size(), "user") + " with " +
                                count_of(data_.items.size(), "item") + "; " + joined(parts));
    if (duplicates > 0)
      data_.warnings.push_back(reader_.name() + ": " + count_of(duplicates, "row") +
                               (duplicates == 1 ? " is an exact duplicate of another and was"
                                                : " are exact duplicates of others and were") +
                               " left out");
    if (of_other_types_ > 0)
      data_.warnings.push_back(reader_.name() + ": " + count_of(of_other_types_, "row") +
                               " of other event types than '" + options_.event_type_filter +
                               "' were left out");
    if (below_threshold_ > 0)
      data_.warnings.push_back(reader_.name() + ": " + count_of(below_threshold_, "row") +
                               " below the threshold of EVENT_VALUE or without one were left out");
    if (rows.size() > 1 && data_.first_timestamp == data_.last_timestamp)
      data_.warnings.push_back(reader_.name() + ": every TIMESTAMP is " +
                               std::to_string(data_.first_timestamp) +
                               ": the rows' order in the file is taken for their order in time");
    if (fractions_ > 0)
      data_.warnings.push_back(reader_.name() + ": fractions of a second were dropped from " +
                               count_of(fractions_, "TIMESTAMP"));
    warn_low_values(rows);
    blanks_.warn(reader_, data_);
    warn_left_out_values(reader_, data_);
  }

 private:
  std::string place() const { return reader_.name() + ":" + std::to_string(reader_.line()); }

  bool ignored(std::size_t column) const {
    const auto choice = choices_.of(ColumnChoices::File::interactions, reader_.columns()[column]);
    return choice && choice->kind == ColumnKind::ignored;
  }

  std::optional<std::size_t> wanted(std::string_view name) const {
    const auto column = reader_.column(name);
    return column && ignored(*column) ? std::nullopt : column;
  }

  float event_value() const {
    if (!value_) return std::nanf("");
    const std::string_view text = trimmed(reader_.field(*value_));
    const auto value = read_number(text);
    if (!value && !text.empty()) {
      if (options_.event_value_threshold) reader_.refuse(*value_, "is not a number");
      return std::nanf("");
    }
    return value ? static_cast<float>(*value) : std::nanf("");
  }

  std::string time_text() const {
    return "time, " +
           (options_.timestamps == TimestampFormat::iso_8601
                ? "ISO 8601, UTC where no zone is given"
                : "Unix " + std::string(name(options_.timestamps))) +
           ", " + date_of(data_.first_timestamp) + " to " + date_of(data_.last_timestamp);
  }

  std::string type_text() const {
    return "event type, " + count_of(data_.event_types.size(), "value");
  }

  std::string value_text() const {
    return options_.event_value_threshold
               ? "event value, at least " + number_text(*options_.event_value_threshold)
               : "left out: all events count alike, whatever their value; "
                 "--event-value-threshold keeps those from a value on";
  }

  std::string reason(std::size_t column) const {
    const std::string& name = reader_.columns()[column];
    const auto choice = choices_.of(ColumnChoices::File::interactions, name);
    if (choice && choice->kind == ColumnKind::ignored) return choice->reason;
    if (reader_.column("IMPRESSION") == column)
      return "impressions are learnt from at run time, not in training";
    if (name.empty() || name.starts_with("Unnamed: ")) return "a column without a name";
    return "contextual metadata is not learnt from";
  }

  void warn_low_values(const std::vector<Row>& rows) {
    if (!value_ || options_.event_value_threshold) return;
    float least = INFINITY, most = -INFINITY;
    for (const Row& row : rows)
      if (std::isfinite(row.value)) {
        least = std::min(least, row.value);
        most = std::max(most, row.value);
      }
    if (!(least < most)) return;
    const float middle = least + (most - least) / 2;
    const auto low = static_cast<std::uint64_t>(std::count_if(
        rows.begin(), rows.end(), [&](const Row& row) { return row.value < middle; }));
    if (low > 0)
      data_.warnings.push_back(reader_.name() + ": " + std::to_string(low) + " of " +
                               count_of(rows.size(), "interaction") +
                               " have an EVENT_VALUE in the lower half of " +
                               number_text(double{least}) + " to " + number_text(double{most}) +
                               " and count as wishes like all others; --event-value-threshold " +
                               number_text(double{middle}) + " leaves them out");
  }

  const DatasetOptions& options_;
  const ColumnChoices& choices_;
  Dataset& data_;
  CsvReader reader_;
  Blanks blanks_;
  std::size_t user_ = 0, item_ = 0, time_ = 0;
  std::optional<std::size_t> type_, value_;
  std::uint64_t of_other_types_ = 0, below_threshold_ = 0, fractions_ = 0;
};

// Of rows that agree in everything one is kept, as Amazon Personalize does. `rows` are in order of
// time.
std::uint64_t remove_duplicates(std::vector<Row>& rows) {
  const auto key = [](const Row& row) {
    return std::tuple(row.digest, row.user, row.item, row.event_type);
  };
  std::vector<std::size_t> order;
  std::vector<char> twice(rows.size(), 0);
  for (std::size_t begin = 0, end; begin < rows.size(); begin = end) {
    end = begin + 1;
    while (end < rows.size() && rows[end].timestamp == rows[begin].timestamp) ++end;
    order.resize(end - begin);
    std::iota(order.begin(), order.end(), begin);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return std::pair(key(rows[a]), a) < std::pair(key(rows[b]), b);
    });
    for (std::size_t i = 1; i < order.size(); ++i)
      twice[order[i]] = key(rows[order[i]]) == key(rows[order[i - 1]]) ? 1 : 0;
  }
  std::size_t kept = 0;
  for (std::size_t r = 0; r < rows.size(); ++r)
    if (!twice[r]) rows[kept++] = rows[r];
  const std::size_t removed = rows.size() - kept;
  rows.resize(kept);
  return removed;
}

// How ids that are written in two ways are made one.
struct Spelling {
  const char* what;
  std::string (*plain)(std::string_view id);
};

std::string without_zero_fraction(std::string_view id) {
  const std::size_t point = id.find('.');
  const bool number = point != id.npos && point > 0 &&
                      id.find_first_not_of("0", point + 1) == id.npos &&
                      id.find_first_not_of("0123456789") == point;
  return std::string(number ? id.substr(0, point) : id);
}

std::string without_leading_zeros(std::string_view id) {
  const std::size_t first = std::min(id.find_first_not_of('0'), id.size() - 1);
  return std::string(id.find_first_not_of("0123456789") == id.npos ? id.substr(first) : id);
}

constexpr Spelling spellings[] = {
    {"where a fraction of zero ('.0') is left out, as pandas adds it to whole numbers: read the "
     "ids as text (dtype=str)",
     &without_zero_fraction},
    {"where leading zeros are left out, as spreadsheets do: keep the ids as text",
     &without_leading_zeros},
    {"where capitals are small letters: write them alike", &lower_case}};

// Items [0, interacted) of the table have interactions; `in_file` says which stand in the items
// file.
void compare_ids(const CsvReader& reader, const Dataset& data, const StringTable& items,
                 std::size_t interacted, const std::vector<char>& in_file, std::size_t rows,
                 std::vector<std::string>& warnings) {
  std::vector<std::size_t> alone, unknown;  // of the file alone; of the interactions alone
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i >= interacted)
      alone.push_back(i);
    else if (!in_file[i])
      unknown.push_back(i);
  }
  const std::size_t common = rows - alone.size();
  std::string cure;
  if (!alone.empty() && !unknown.empty())
    for (const Spelling& spelling : spellings) {
      std::unordered_set<std::string> there;
      for (const std::size_t i : unknown) there.insert(spelling.plain(items[i]));
      std::size_t met = 0;
      for (const std::size_t i : alone) met += there.contains(spelling.plain(items[i])) ? 1 : 0;
      if (met * 2 > std::min(alone.size(), unknown.size()) && cure.empty())
        cure = "; " + std::to_string(met) + " more would " + spelling.what;
    }
  std::size_t users = 0;
  for (const std::size_t i : alone) users += data.user_ids.find(items[i]) ? 1 : 0;
  if (cure.empty() && !alone.empty() && users * 2 > alone.size())
    cure = "; " + std::to_string(users) +
           " of them stand in USER_ID: are the two columns swapped in one of the files?";
  std::uint64_t events = 0;
  for (const std::size_t i : unknown) events += data.items[i].interactions;
  const std::string examples = alone.empty() || unknown.empty()
                                   ? ""
                                   : " ('" + printable(items[alone.front()]) + "' here, '" +
                                         printable(items[unknown.front()]) + "' there)";
  if (common == 0)
    throw Failure(reader.name() + ": none of its " + count_of(rows, "item") +
                  " occurs in the interactions" + examples + cure);
  if (!unknown.empty())
    warnings.push_back(reader.name() + ": " + std::to_string(unknown.size()) + " of " +
                       count_of(interacted, "item") + " of the interactions (" +
                       count_of(events, "interaction") + ") have no row here" + examples + cure);
}

// `interactions`: whether data has them.
void read_items(const std::string& path, const DatasetOptions& options,
                const ColumnChoices& choices, Dataset& data, StringTable& items,
                const CsvReader* interactions) {
  CsvReader reader(path);
  if (!reader.column("ITEM_ID") && reader.column("USER_ID"))
    throw Failure(path +
                  ": has USER_ID but no ITEM_ID: a users file, which is not read; an items "
                  "file is wanted here");
  const std::size_t id = reader.require("ITEM_ID");
  const auto has = [&](std::string_view name) {
    return std::any_of(reader.columns().begin(), reader.columns().end(),
                       [&](const std::string& c) { return letters_of(c) == letters_of(name); });
  };
  if (interactions && has("USER_ID") && has("TIMESTAMP"))
    throw Failure(path + ": has USER_ID and TIMESTAMP: interactions; an items file is wanted here");
  choices.check_schema(ColumnChoices::File::items, reader);
  if (interactions) choices.check_names(*interactions, &reader);
  const auto choice = [&](std::size_t c) {
    return choices.of(ColumnChoices::File::items, reader.columns()[c]);
  };
  const auto creation = [&]() -> std::optional<std::size_t> {
    const auto column = reader.column("CREATION_TIMESTAMP");
    const auto chosen = column ? choice(*column) : std::nullopt;
    return chosen && chosen->kind == ColumnKind::ignored ? std::nullopt : column;
  }();
  std::vector<RawColumn> columns(reader.columns().size());
  for (std::size_t c = 0; c < columns.size(); ++c) {
    columns[c].name = reader.columns()[c];
    columns[c].shown = shown_name(reader, c);
    if (columns[c].name.size() > max_id_bytes || !detail::valid_id(columns[c].name))
      throw Failure(path + ":" + std::to_string(reader.line()) + ": the name of column " +
                    std::to_string(c + 1) +
                    (columns[c].name.size() > max_id_bytes ? " has more than 256 bytes"
                                                           : " holds a control character"));
  }
  const std::size_t interacted = data.items.size();
  std::vector<char> seen(interacted, 0);
  std::size_t rows = 0, without_creation = 0;
  Blanks blanks;
  for_each_row(reader, data.bad_rows, [&] {
    const std::string_view item_id = blanks.id(reader, id);
    std::optional<std::int64_t> created;
    if (creation && !trimmed(reader.field(*creation)).empty())
      created = timestamp_field(reader, *creation, earliest_creation, options.creation_timestamps,
                                interactions ? creation_option : "");
    const std::uint32_t item = number_of(items, item_id);
    if (item >= seen.size()) seen.resize(std::max<std::size_t>(item + 1, 2 * seen.size()));
    if (seen[item]) reader.refuse(id, "'" + std::string(item_id) + "' stands twice");
    seen[item] = 1;
    ++rows;
    if (item >= interacted && !created) ++without_creation;
    if (created) {
      if (item >= data.items.size()) data.items.resize(item + 1);
      data.items[item].creation_timestamp = created;
    }
    for (std::size_t c = 0; c < columns.size(); ++c)
      if (c != id && c != creation && !reader.field(c).empty())
        columns[c].values.emplace_back(item, reader.field(c));
  });
  if (rows == 0)
    throw Failure(path + ": holds no items but a header row alone" + data.bad_rows.reason());
  data.items.resize(items.size());
  seen.resize(items.size());
  std::vector<std::string> parts;
  for (std::size_t c = 0; c < columns.size(); ++c) {
    if (c == id)
      parts.push_back(known_column(reader, c, "ITEM_ID", "id", data));
    else if (c == creation)
      parts.push_back(known_column(reader, c, "CREATION_TIMESTAMP", "creation time", data));
    else
      parts.push_back(add_column(std::move(columns[c]), choice(c), rows, items, data.metadata));
  }
  std::string counts = count_of(rows, "item");
  if (interactions)
    counts +=
        ", " + std::to_string(rows - (items.size() - interacted)) + " of them in the interactions";
  data.description.push_back(file_and_forms(reader, data) + counts + "; " + joined(parts));
  blanks.warn(reader, data);
  warn_left_out_values(reader, data);
  if (!interactions) return;
  compare_ids(reader, data, items, interacted, seen, rows, data.warnings);
  if (without_creation > 0)
    data.warnings.push_back(path + ": " + count_of(without_creation, "item") +
                            " without interactions and without CREATION_TIMESTAMP count as new at "
                            "the time of the latest interaction");
}

}  // namespace dataset

CLI::Option* add_timestamp_format(CLI::App& command, std::string_view option, const char* column,
                                  TimestampFormat& format) {
  std::vector<std::pair<std::string, TimestampFormat>> formats;
  for (const TimestampFormat each :
       {TimestampFormat::seconds, TimestampFormat::milliseconds, TimestampFormat::microseconds,
        TimestampFormat::nanoseconds, TimestampFormat::iso_8601})
    formats.emplace_back(name(each), each);
  return add_choice<TimestampFormat>(command, std::string(option), format, formats,
                                     std::string("How the file writes ") + column);
}

std::vector<CLI::Option*> add_event_options(CLI::App& command, DatasetOptions& options) {
  return {
      add_event_type(command, options.event_type_filter),
      command.add_option("--event-value-threshold", options.event_value_threshold,
                         "Keep only events with at least this EVENT_VALUE"),
      add_timestamp_format(command, dataset::timestamp_option, "TIMESTAMP", options.timestamps)};
}

void add_item_options(CLI::App& command, DatasetOptions& options) {
  add_timestamp_format(command, dataset::creation_option, "CREATION_TIMESTAMP",
                       options.creation_timestamps);
  const auto columns = [&](const char* option, std::vector<std::string>& names, const char* text) {
    command.add_option(option, names, text)->type_name("NAME")->allow_extra_args(false);
  };
  columns("--categorical", options.columns.categorical,
          "A column of --items that holds categories, '|' between several; may be repeated");
  columns("--numeric", options.columns.numeric, "One that holds numbers; may be repeated");
  columns("--text", options.columns.text, "One that holds text, not learnt from; may be repeated");
  columns("--ignore", options.columns.ignore, "A column to leave out; may be repeated");
  command
      .add_option("--schema", options.columns.schemas,
                  "Amazon Personalize's schema (Avro JSON) of the interactions or of the items; "
                  "may be repeated")
      ->type_name("FILE")
      ->allow_extra_args(false);
}

Dataset read_dataset(const DatasetOptions& options, Progress* progress) {
  using namespace dataset;
  Dataset data;
  data.bad_rows.skip = options.skip_bad_rows;
  const ColumnChoices choices(options.columns);
  Interactions interactions(options, choices, data);
  if (options.items.empty()) choices.check_names(interactions.reader(), nullptr);
  StringTable users, items_as_read, types;
  std::vector<Row> rows = interactions.read(users, items_as_read, types, progress);
  if (rows.empty() && !options.may_be_empty)
    throw Failure(options.interactions + ": holds no interactions" + interactions.why_none() +
                  data.bad_rows.reason());
  std::stable_sort(rows.begin(), rows.end(),
                   [](const Row& a, const Row& b) { return a.timestamp < b.timestamp; });
  const std::uint64_t duplicates = remove_duplicates(rows);
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
  constexpr std::int64_t year_1973 = 94'694'400;
  if (options.timestamps != TimestampFormat::seconds &&
      options.timestamps != TimestampFormat::iso_8601 && !rows.empty() &&
      data.last_timestamp < year_1973)
    throw Failure(options.interactions + ": as " + std::string(name(options.timestamps)) +
                  " every TIMESTAMP lies before 1973; " + std::string(timestamp_option) +
                  " names too fine a unit");
  interactions.describe(rows, duplicates);
  if (!options.items.empty())
    read_items(options.items, options, choices, data, items, &interactions.reader());
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

void report(const Dataset& data, std::string_view command, bool describe) {
  if (describe || data.guessed)
    for (const std::string& line : data.description) note(command, line);
  for (const std::string& line : data.warnings) note(command, "warning: " + line);
  data.bad_rows.report(command);
}

Dataset read_catalogue(const CatalogueFiles& files) {
  using namespace dataset;
  Dataset data;
  data.bad_rows.skip = files.skip_bad_rows;
  const DatasetOptions options;
  const ColumnChoices choices(options.columns);
  if (files.order == files.items) {
    read_items(files.items, options, choices, data, data.item_ids, nullptr);
  } else {
    data.item_ids = read_ids(files.order, "ITEM_ID");
    StringTable items = data.item_ids;  // and those that the model does not have, behind them
    if (!files.items.empty()) read_items(files.items, options, choices, data, items, nullptr);
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
  using namespace dataset;
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
