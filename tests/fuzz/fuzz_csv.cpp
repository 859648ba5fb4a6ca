// Bytes from anywhere as a table, in every form that is read: reading to the end stays inside
// bounds, and what is read is what the reader promises.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "command/command.hpp"
#include "data/csv.hpp"
#include "personalize_runtime.hpp"

using namespace personalize::tools;

namespace {

void require(bool promise) {
  if (!promise) std::abort();
}

void read(std::span<const char> bytes) {
  CsvReader reader("fuzz.csv", bytes);
  std::uint64_t line = reader.line();
  // Several JSON objects may share a line.
  const auto& forms = reader.forms();
  const bool lines = std::find(forms.begin(), forms.end(), "JSON objects") == forms.end();
  if (!lines) line = 0;
  for (const char* const name : {"USER_ID", "TIMESTAMP"}) {
    const auto column = reader.column(name);
    require(!column || *column < reader.columns().size());
  }
  for (;;) {
    try {
      if (!reader.next()) return;
      require(lines ? reader.line() > line : reader.line() >= line);
      line = reader.line();
      for (std::size_t c = 0; c < reader.columns().size(); ++c) {
        const std::string_view field = reader.field(c);
        require(field.size() <= CsvReader::max_row_bytes);
        require(personalize::detail::valid_utf8(field) &&
                field.find('\0') == std::string_view::npos);
      }
    } catch (const BadRow& bad) {
      require(bad.line == reader.line() && (lines ? bad.line > line : bad.line >= line));
      line = bad.line;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    read(std::span(reinterpret_cast<const char*>(data), size));
  } catch (const Failure&) {
    return 0;
  }
  return 0;
}
