// Streaming reader of tables: CSV and its kin, bounded memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "data/source.hpp"

namespace personalize::tools {

// A malformed row. The reader goes on with the next row after it was thrown.
struct BadRow : std::runtime_error {
  BadRow(std::uint64_t row_line, std::string row_column, std::string row_reason);
  std::uint64_t line;
  std::string column;  // name, or empty where the row as a whole is malformed
  std::string reason;
};

// CSV as RFC 4180 has it, from whatever TextSource reads: quoted fields (doubled quotes, embedded
// line ends), a header row; blank lines are skipped. Taken from the header row and what follows:
// commas, semicolons, tabs or bars between fields, line ends of LF, CRLF or CR. Flat JSON objects,
// a line each or in an array, are rows as well: the keys of the first ones are the columns, arrays
// are joined by '|'. Refused: NUL bytes, invalid UTF-8, rows over 1 MiB (fields and separators),
// another number of fields than the header has.
class CsvReader {
 public:
  static constexpr std::size_t max_row_bytes = std::size_t{1} << 20;

  // Reads the header row. Throws Failure: cannot open, no header, damaged, another kind of file.
  explicit CsvReader(const std::string& path);
  // The same for bytes in memory, which must outlive the reader; `name` stands in messages.
  CsvReader(std::string name, std::span<const char> bytes);
  ~CsvReader();
  CsvReader(const CsvReader&) = delete;
  CsvReader& operator=(const CsvReader&) = delete;

  const std::string& name() const { return name_; }
  // Without blanks around them. A column may have no name.
  const std::vector<std::string>& columns() const { return columns_; }
  // The column of that name; else the one whose name differs in case, blanks, hyphens and
  // underscores alone, or ends in RecBole's ":token"; else one with another usual name for an id,
  // time or event type. Throws Failure where two fit.
  std::optional<std::size_t> column(std::string_view name) const;
  // Throws Failure where there is no such column.
  std::size_t require(std::string_view name) const;
  // What the file was taken for, where it is not plain comma-separated UTF-8; empty otherwise.
  const std::vector<std::string>& forms() const { return forms_; }
  // Values of JSON keys that none of the first rows has: they belong to no column.
  std::uint64_t left_out_values() const { return left_out_values_; }

  // The next row; false at the end. Throws BadRow, or Failure where the stream itself is damaged.
  bool next();
  // Valid until next().
  std::string_view field(std::size_t column) const;
  // Of all fields of the row.
  std::uint64_t digest() const;
  // 1-based line on which the row begins; before the first next(), the header.
  std::uint64_t line() const { return row_line_; }
  // Throws BadRow for this row: "column X: reason".
  [[noreturn]] void refuse(std::size_t column, const std::string& reason) const;

 private:
  void read_header();
  void take_layout();
  bool read_row();
  int get();
  int peek();
  void skip_rest_of_row(bool quoted, bool at_field_begin);

  using Object = nlohmann::json;
  void read_keys();
  bool read_object(Object& object);
  void take_object(const Object& object);
  void end_field();

  std::string name_;
  TextSource source_;
  std::span<const char> buffer_;
  std::size_t at_ = 0;
  std::uint64_t line_ = 1, row_line_ = 1, left_out_values_ = 0;
  char delimiter_ = ',';
  bool lone_cr_ = false, json_ = false;
  std::vector<std::string> columns_, forms_;
  std::string object_text_;
  std::string row_;                // the fields' text, one behind the other
  std::vector<std::size_t> ends_;  // of each field in row_
  struct Waiting;                  // the rows from which the keys were taken
  std::deque<Waiting> waiting_;
};

// The name's letters and digits in upper case, to compare names by.
std::string letters_of(std::string_view name);

// Without ASCII blanks, tabs and no-break spaces around it.
std::string_view trimmed(std::string_view text);

}  // namespace personalize::tools
