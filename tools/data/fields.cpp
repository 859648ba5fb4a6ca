#include "data/fields.hpp"

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace fields {

template <class T>
std::optional<T> whole(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Which finer unit makes a time between 1973 and now of the value: "; it looks like milliseconds".
std::string unit_hint(std::int64_t value, std::int64_t now) {
  constexpr double earliest = 1e8;
  const double size = std::abs(static_cast<double>(value));
  for (const auto& [unit, per_second] :
       {std::pair{"milliseconds", 1e3}, {"microseconds", 1e6}, {"nanoseconds", 1e9}})
    if (size / per_second >= earliest && size / per_second <= static_cast<double>(now))
      return std::string("; it looks like ") + unit;
  return "";
}

}  // namespace fields

std::string_view id_field(const CsvReader& reader, std::size_t column) {
  const std::string_view id = reader.field(column);
  if (id.empty()) reader.refuse(column, "is empty");
  if (id.size() > max_id_bytes) reader.refuse(column, "has more than 256 bytes");
  if (!detail::valid_id(id)) reader.refuse(column, "holds a control character");
  return id;
}

std::int64_t timestamp_field(const CsvReader& reader, std::size_t column, std::int64_t earliest) {
  const std::string_view text = reader.field(column);
  const auto value = fields::whole<std::int64_t>(text);
  if (!value)
    reader.refuse(
        column, "'" + std::string(text.substr(0, 40)) + "' is not a whole number of Unix seconds");
  const std::int64_t now = std::chrono::duration_cast<std::chrono::seconds>(
                               std::chrono::system_clock::now().time_since_epoch())
                               .count();
  const std::string quoted = "'" + std::string(text) + "' ";
  if (*value < earliest)
    reader.refuse(column, quoted + "lies before the earliest Unix second that is taken, " +
                              std::to_string(earliest) + fields::unit_hint(*value, now));
  if (*value > now + clock_skew)
    reader.refuse(column, quoted + "lies over a day in the future (this machine's clock: " +
                              std::to_string(now) + ")" + fields::unit_hint(*value, now));
  return *value;
}

std::optional<double> read_number(std::string_view text) { return fields::whole<double>(text); }

double number_field(const CsvReader& reader, std::size_t column) {
  const auto value = read_number(reader.field(column));
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
