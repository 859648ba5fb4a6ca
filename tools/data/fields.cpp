#include "data/fields.hpp"

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>

namespace personalize::tools {
namespace fields {

template <class T>
std::optional<T> whole(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

struct Unit {
  TimestampFormat format;
  std::string_view name;
  std::int64_t per_second;
};
constexpr Unit units[] = {{TimestampFormat::seconds, "seconds", 1},
                          {TimestampFormat::milliseconds, "milliseconds", 1'000},
                          {TimestampFormat::microseconds, "microseconds", 1'000'000},
                          {TimestampFormat::nanoseconds, "nanoseconds", 1'000'000'000}};

// Which finer unit makes a time between April 1970 and now of the value.
std::optional<TimestampFormat> finer_unit(double value, std::int64_t now) {
  constexpr double earliest = 1e7;
  for (const Unit& unit : units) {
    const double seconds = std::abs(value) / static_cast<double>(unit.per_second);
    if (unit.per_second > 1 && seconds >= earliest && seconds <= static_cast<double>(now))
      return unit.format;
  }
  return std::nullopt;
}

// Takes the number of that many digits from the front.
std::optional<int> take_digits(std::string_view& text, std::size_t digits) {
  int value = 0;
  if (text.size() < digits) return std::nullopt;
  for (std::size_t i = 0; i < digits; ++i) {
    if (text[i] < '0' || text[i] > '9') return std::nullopt;
    value = value * 10 + (text[i] - '0');
  }
  text.remove_prefix(digits);
  return value;
}

bool take(std::string_view& text, char c) {
  if (!text.starts_with(c)) return false;
  text.remove_prefix(1);
  return true;
}

// "2023-11-14", "2023-11-14T22:13", "2023-11-14 22:13:20.5+01:00"; without a zone it is UTC.
std::optional<std::int64_t> iso_8601(std::string_view text) {
  using namespace std::chrono;
  const auto year = take_digits(text, 4);
  if (!year || !take(text, '-')) return std::nullopt;
  const auto month = take_digits(text, 2);
  if (!month || !take(text, '-')) return std::nullopt;
  const auto day = take_digits(text, 2);
  if (!day) return std::nullopt;
  const year_month_day date{std::chrono::year(*year),
                            std::chrono::month(static_cast<unsigned>(*month)),
                            std::chrono::day(static_cast<unsigned>(*day))};
  if (!date.ok()) return std::nullopt;
  std::int64_t seconds = sys_days(date).time_since_epoch().count() * std::int64_t{86'400};
  if (text.empty()) return seconds;
  if (!take(text, 'T') && !take(text, ' ')) return std::nullopt;
  const auto hour = take_digits(text, 2);
  if (!hour || !take(text, ':')) return std::nullopt;
  const auto minute = take_digits(text, 2);
  if (!minute || *hour > 24 || *minute > 59) return std::nullopt;
  seconds += *hour * 3600 + *minute * 60;
  if (take(text, ':')) {
    const auto second = take_digits(text, 2);
    if (!second || *second > 60) return std::nullopt;  // a leap second is 60
    seconds += *second;
    if (take(text, '.') || take(text, ',')) {
      if (!take_digits(text, 1)) return std::nullopt;
      while (take_digits(text, 1)) {
      }
    }
  }
  take(text, ' ');
  if (text.empty() || text == "Z" || text == "UTC") return seconds;
  const int sign = take(text, '-') ? -1 : 1;
  if (sign > 0 && !take(text, '+')) return std::nullopt;
  const auto hours = take_digits(text, 2);
  if (!hours || *hours > 23) return std::nullopt;
  take(text, ':');
  const auto minutes = text.empty() ? std::optional(0) : take_digits(text, 2);
  if (!minutes || *minutes > 59 || !text.empty()) return std::nullopt;
  return seconds - sign * (*hours * 3600 + *minutes * 60);
}

// The text's number of units in whole seconds, downwards; nothing where it is no number or one that
// no clock shows.
std::optional<std::int64_t> whole_seconds(std::string_view text, std::int64_t per_second) {
  if (const auto value = whole<std::int64_t>(text))
    return *value / per_second - (*value % per_second < 0 ? 1 : 0);
  const auto value = whole<double>(text);
  if (!value || !(std::abs(*value) < 9e18)) return std::nullopt;
  return static_cast<std::int64_t>(std::floor(*value / static_cast<double>(per_second)));
}

std::int64_t timestamp(const CsvReader& reader, std::size_t column, std::int64_t earliest,
                       TimestampFormat format, std::string_view option) {
  const std::string_view text = trimmed(reader.field(column));
  const bool iso = format == TimestampFormat::iso_8601;
  const std::int64_t per_second = iso ? 1 : units[static_cast<std::size_t>(format)].per_second;
  const auto value = iso ? iso_8601(text) : whole_seconds(text, per_second);
  const std::int64_t now = std::chrono::duration_cast<std::chrono::seconds>(
                               std::chrono::system_clock::now().time_since_epoch())
                               .count();
  if (value && *value >= earliest && *value <= now + clock_skew) return *value;

  const std::string quoted = "'" + std::string(text.substr(0, 40)) + "' ";
  const auto looks_like = [&](TimestampFormat other) {
    const std::string like = "; it looks like " + std::string(name(other));
    return option.empty() ? like
                          : like + ", which " + std::string(option) + " " +
                                std::string(name(other)) + " reads";
  };
  if (!value) {
    if (iso)
      reader.refuse(column, quoted + "is not a date or time as ISO 8601 writes it" +
                                (whole<double>(text) ? looks_like(TimestampFormat::seconds) : ""));
    reader.refuse(column, quoted + "is not a whole number of Unix " +
                              (per_second == 1 ? "seconds" : std::string(name(format))) +
                              (iso_8601(text) ? looks_like(TimestampFormat::iso_8601) : ""));
  }
  const auto finer = [&]() -> std::string {
    if (iso) return "";
    const auto unit = finer_unit(whole<double>(text).value_or(0), now);
    return unit && *unit != format ? looks_like(*unit) : "";
  };
  if (*value < earliest)
    reader.refuse(column, quoted + "lies before the earliest Unix second that is taken, " +
                              std::to_string(earliest) + finer());
  reader.refuse(column, quoted + "lies over a day in the future (this machine's clock: " +
                            std::to_string(now) + ")" + finer());
}

}  // namespace fields

std::string_view name(TimestampFormat format) {
  return format == TimestampFormat::iso_8601 ? "iso-8601"
                                             : fields::units[static_cast<std::size_t>(format)].name;
}

std::string_view id_field(const CsvReader& reader, std::size_t column) {
  const std::string_view id = trimmed(reader.field(column));
  if (id.empty()) reader.refuse(column, "is empty");
  if (id.size() > max_id_bytes) reader.refuse(column, "has more than 256 bytes");
  if (!detail::valid_id(id)) reader.refuse(column, "holds a control character");
  return id;
}

std::int64_t timestamp_field(const CsvReader& reader, std::size_t column, std::int64_t earliest) {
  return fields::timestamp(reader, column, earliest, TimestampFormat::seconds, "");
}

std::int64_t timestamp_field(const CsvReader& reader, std::size_t column, std::int64_t earliest,
                             TimestampFormat format, std::string_view option) {
  return fields::timestamp(reader, column, earliest, format, option);
}

std::optional<double> read_number(std::string_view text) { return fields::whole<double>(text); }

std::string count_of(std::uint64_t count, const std::string& thing) {
  return std::to_string(count) + " " + thing + (count == 1 ? "" : "s");
}

std::string lower_case(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return lower;
}

std::uint32_t number_of(StringTable& table, std::string_view text) {
  if (const auto found = table.find(text)) return *found;
  const auto added = table.add(text);
  if (!added) throw Failure(added.error().message);
  return *added;
}

double number_field(const CsvReader& reader, std::size_t column) {
  const auto value = read_number(trimmed(reader.field(column)));
  if (!value || std::isnan(*value))
    reader.refuse(column,
                  "'" + std::string(reader.field(column).substr(0, 40)) + "' is not a number");
  return *value;
}

void BadRows::add(const CsvReader& reader, const BadRow& row) {
  const std::string text = reader.name() + ":" + std::to_string(row.line) + ": " + row.what();
  if (!skip) throw Failure(text + "; correct the row or pass --skip-bad-rows");
  if (++count <= 10) reports.push_back(text);
}

std::string BadRows::reason() const {
  if (count == 0) return "";
  return "; " + std::to_string(count) + " bad rows were skipped, the first: " + reports.front();
}

void BadRows::report(std::string_view command) const {
  if (count > 0)
    std::fprintf(stderr, "personalize %.*s: skipped %llu bad rows; the first: %s\n",
                 static_cast<int>(command.size()), command.data(),
                 static_cast<unsigned long long>(count), reports.front().c_str());
}

}  // namespace personalize::tools
