// Streaming CSV reader: plain or zstd-compressed (told by content, not by name), bounded memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace personalize::tools {

// A malformed row. The reader goes on with the next row after it was thrown.
struct BadRow : std::runtime_error {
  BadRow(std::uint64_t row_line, std::string row_column, std::string row_reason);
  std::uint64_t line;
  std::string column;  // name, or empty where the row as a whole is malformed
  std::string reason;
};

// RFC 4180 with LF or CRLF, quoted fields (doubled quotes, embedded newlines), an optional UTF-8
// byte-order mark; blank lines are skipped. Refused: NUL bytes, invalid UTF-8, rows over 1 MiB
// (fields and commas), another number of fields than the header has.
class CsvReader {
 public:
  static constexpr std::size_t max_row_bytes = std::size_t{1} << 20;

  // Reads the header row. Throws Failure: cannot open, no header, damaged compression.
  explicit CsvReader(const std::string& path);
  // The same for bytes in memory, which must outlive the reader; `name` stands in messages.
  CsvReader(std::string name, std::span<const char> bytes);
  ~CsvReader();
  CsvReader(const CsvReader&) = delete;
  CsvReader& operator=(const CsvReader&) = delete;

  const std::string& name() const { return name_; }
  const std::vector<std::string>& columns() const { return columns_; }
  std::optional<std::size_t> column(std::string_view name) const;
  // Throws Failure where there is no such column.
  std::size_t require(std::string_view name) const;

  // The next row; false at the end. Throws BadRow, or Failure where the stream itself is damaged.
  bool next();
  // Valid until next().
  std::string_view field(std::size_t column) const;
  // 1-based line on which the row begins; before the first next(), the header.
  std::uint64_t line() const { return row_line_; }
  // Throws BadRow for this row: "column X: reason".
  [[noreturn]] void refuse(std::size_t column, const std::string& reason) const;

 private:
  class Source;
  void read_header();
  bool read_row();
  int get();
  int peek();
  void skip_rest_of_row(bool quoted, bool at_field_begin);

  std::string name_;
  std::unique_ptr<Source> source_;
  std::span<const char> buffer_;
  std::size_t at_ = 0;
  std::uint64_t line_ = 1, row_line_ = 1;
  std::vector<std::string> columns_;
  std::string row_;                // the fields' text, one behind the other
  std::vector<std::size_t> ends_;  // of each field in row_
};

}  // namespace personalize::tools
