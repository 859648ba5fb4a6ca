// What the project's CSV files have in common: ids, timestamps, numbers, and rows that are bad.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "command/command.hpp"
#include "data/csv.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

// 1 to 256 bytes without control characters; blanks around it do not belong to it. Throws BadRow.
std::string_view id_field(const CsvReader& reader, std::size_t column);

// A clock that runs ahead, or a time zone, explains a day; more is another unit or a typing error.
inline constexpr std::int64_t clock_skew = 86'400;  // seconds

// Unix seconds from `earliest` to the system's clock and clock_skew; fractions are dropped. Throws
// BadRow.
std::int64_t timestamp_field(const CsvReader& reader, std::size_t column,
                             std::int64_t earliest = 0);

// How a file writes its times. One is taken for the whole file, as it is told: a number does not
// say its unit.
enum class TimestampFormat { seconds, milliseconds, microseconds, nanoseconds, iso_8601 };

std::string_view name(TimestampFormat format);

// timestamp_field for a command with an option to say the format, which the message of a bad row
// advises.
std::int64_t timestamp_field(const CsvReader& reader, std::size_t column, std::int64_t earliest,
                             TimestampFormat format, std::string_view option);

// All of the text as a number, an infinity or NaN: no blanks, a decimal point in every locale.
std::optional<double> read_number(std::string_view text);

// "480 rows", "1 row".
std::string count_of(std::uint64_t count, const std::string& thing);

// Letters of ASCII alone.
std::string lower_case(std::string_view text);

// The number of a string of 1 to 256 bytes, which joins the table where it is new.
std::uint32_t number_of(StringTable& table, std::string_view text);

// A number or an infinity. Throws BadRow.
double number_field(const CsvReader& reader, std::size_t column);

// Rows that could not be used: the first ends the job or, with skip, they are counted.
struct BadRows {
  bool skip = false;
  std::uint64_t count = 0;
  std::vector<std::string> reports = {};  // the first ten: file, line, column, reason
  void add(const CsvReader& reader, const BadRow& row);
  // "; 3 bad rows were skipped, the first: ..." or nothing, to end the message that nothing is
  // left.
  std::string reason() const;
  // One line on standard error, where rows were skipped.
  void report(std::string_view command) const;
};

// Runs `row` for every row of the reader that is not bad.
template <class Function>
void for_each_row(CsvReader& reader, BadRows& bad, Function row) {
  for (;;) {
    try {
      if (!reader.next()) return;
      row();
    } catch (const BadRow& problem) {
      bad.add(reader, problem);
    }
  }
}

// The same where each row counts, such as one a row of a matrix: the first bad one is a Failure.
template <class Function>
void for_every_row(CsvReader& reader, Function row) {
  try {
    while (reader.next()) row();
  } catch (const BadRow& bad) {
    throw Failure(reader.name() + ":" + std::to_string(bad.line) + ": " + bad.what());
  }
}

}  // namespace personalize::tools
