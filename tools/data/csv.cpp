#include "data/csv.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>
#include <utility>

#include "command/command.hpp"
#include "command/json.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

BadRow::BadRow(std::uint64_t row_line, std::string row_column, std::string row_reason)
    : std::runtime_error((row_column.empty() ? "" : "column " + row_column + ": ") + row_reason),
      line(row_line),
      column(std::move(row_column)),
      reason(std::move(row_reason)) {}

namespace csv {

constexpr std::string_view delimiters = ",;\t|";  // the likeliest first

const char* name_of(char delimiter) {
  return delimiter == ';' ? "semicolons" : delimiter == '\t' ? "tabs" : "bars";
}

// Of the text's first lines: how often each delimiter stands there, outside quotes.
struct Line {
  std::array<std::size_t, delimiters.size()> counts{};
  bool lone_cr = false;
};

std::vector<Line> first_lines(std::string_view text) {
  constexpr std::size_t enough = 21;
  std::vector<Line> lines;
  Line line;
  bool quoted = false, blank = true;
  for (std::size_t at = 0; at < text.size() && lines.size() < enough; ++at) {
    const char c = text[at];
    if (c == '"') quoted = !quoted;
    if ((c != '\n' && c != '\r') || quoted) {
      blank = false;
      if (const std::size_t d = delimiters.find(c); d != delimiters.npos && !quoted)
        ++line.counts[d];
      continue;
    }
    const std::size_t other = std::min(text.find_first_not_of('\r', at), text.size());
    line.lone_cr = c == '\r' && (other == text.size() || text[other] != '\n');
    if (!blank) lines.push_back(std::exchange(line, {}));
    blank = true;
  }
  if (!blank && lines.size() < enough) lines.push_back(line);
  return lines;
}

// The one that the following lines have as often as the header; of several, the most frequent one.
char delimiter_of(const std::vector<Line>& lines) {
  std::size_t best = 0;
  std::pair<std::size_t, std::size_t> most{0, 0};
  for (std::size_t d = 0; d < delimiters.size(); ++d) {
    const std::size_t count = lines.front().counts[d];
    if (count == 0) continue;
    std::size_t alike = 0;
    for (const Line& line : lines) alike += line.counts[d] == count ? 1 : 0;
    if (std::pair{alike, count} > most) {
      most = {alike, count};
      best = d;
    }
  }
  return delimiters[best];
}

// What text that is not UTF-8 looks like. A letter with an accent stands between plain ones in the
// languages of Western Europe.
std::string encoding_hint(std::string_view text) {
  std::size_t high = 0, alone = 0, controls = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto is_high = [&](std::size_t at) {
      return at < text.size() && static_cast<unsigned char>(text[at]) >= 0x80;
    };
    if (!is_high(i)) continue;
    ++high;
    if (!(i > 0 && is_high(i - 1)) && !is_high(i + 1)) ++alone;
    if (static_cast<unsigned char>(text[i]) < 0xA0) ++controls;
  }
  if (alone * 2 < high)
    return "not valid UTF-8 but another encoding (such as GB18030, Shift_JIS or Windows-1251); "
           "convert the file to UTF-8 with iconv";
  const std::string likely = controls > 0 ? "Windows-1252" : "Latin-1";
  return "not valid UTF-8; it looks like " + likely + ": convert the file with iconv -f " +
         (controls > 0 ? "WINDOWS-1252" : "LATIN1") + " -t UTF-8";
}

// Other names in use for the columns that have a meaning, by their letters.
struct Synonyms {
  std::string_view name;
  std::vector<std::string_view> letters;
};

const std::vector<Synonyms>& synonyms() {
  static const std::vector<Synonyms> all = {
      {"USER_ID",
       {"USER", "UID", "CUSTOMERID", "CUSTOMER", "VISITORID", "REVIEWERID", "PLAYERID",
        "MEMBERID"}},
      {"ITEM_ID",
       {"ITEM", "IID", "MOVIEID", "PRODUCTID", "ARTICLEID", "BOOKID", "GAMEID", "TRACKID", "SONGID",
        "VIDEOID", "NEWSID", "ASIN", "SKU"}},
      {"TIMESTAMP",
       {"TS", "TIME", "UNIXTIME", "UNIXTIMESTAMP", "UNIXREVIEWTIME", "EVENTTIME", "EVENTTIMESTAMP",
        "RATINGTIME", "RATINGTIMESTAMP", "INTERACTIONTIME", "DATETIME", "SENTAT"}},
      {"EVENT_TYPE", {"EVENT", "EVENTNAME", "ACTION", "ACTIONTYPE", "BEHAVIORTYPE"}},
      {"EVENT_VALUE", {"RATING"}},
      {"CREATION_TIMESTAMP", {"CREATIONTIME", "CREATIONDATE", "CREATEDAT"}},
      {"IMPRESSION", {"IMPRESSIONS"}},
  };
  return all;
}

void append_text(const nlohmann::json& value, std::string& row) {
  if (value.is_string())
    row += value.get_ref<const std::string&>();
  else if (!value.is_null())
    row += value.dump();
}

}  // namespace csv

std::string letters_of(std::string_view name) {
  for (const std::string_view suffix : {":token", ":token_seq", ":float", ":float_seq"})
    if (name.ends_with(suffix)) {
      name.remove_suffix(suffix.size());
      break;
    }
  std::string letters;
  for (const char c : name) {
    if (c >= 'a' && c <= 'z')
      letters += static_cast<char>(c - 'a' + 'A');
    else if (c != '_' && c != '-' && c != ' ')
      letters += c;
  }
  return letters;
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view wide = "\xC2\xA0";
  for (;;) {
    if (text.starts_with(' ') || text.starts_with('\t'))
      text.remove_prefix(1);
    else if (text.ends_with(' ') || text.ends_with('\t'))
      text.remove_suffix(1);
    else if (text.starts_with(wide))
      text.remove_prefix(wide.size());
    else if (text.ends_with(wide))
      text.remove_suffix(wide.size());
    else
      return text;
  }
}

// A row that was read before its turn.
struct CsvReader::Waiting {
  std::uint64_t line;
  Object object;
  std::string problem;  // of a bad row
};

CsvReader::CsvReader(const std::string& path) : name_(path), source_(path) { read_header(); }

CsvReader::CsvReader(std::string name, std::span<const char> bytes)
    : name_(std::move(name)), source_(name_, bytes) {
  read_header();
}

CsvReader::~CsvReader() = default;

int CsvReader::peek() {
  if (at_ == buffer_.size()) {
    buffer_ = source_.next();
    at_ = 0;
    if (buffer_.empty()) return EOF;
  }
  const char c = buffer_[at_];
  return lone_cr_ && c == '\r' ? '\n' : static_cast<unsigned char>(c);
}

int CsvReader::get() {
  const int c = peek();
  if (c != EOF) {
    ++at_;
    if (c == '\n') ++line_;
  }
  return c;
}

void CsvReader::skip_rest_of_row(bool quoted, bool at_field_begin) {
  for (int c; (c = get()) != EOF;) {
    if (c == '"' && quoted) {
      if (peek() == '"')
        get();
      else
        quoted = false;
    } else if (c == '"' && at_field_begin) {
      quoted = true;
    } else if (c == '\n' && !quoted) {
      return;
    }
    at_field_begin = c == delimiter_ && !quoted;
  }
}

void CsvReader::end_field() { ends_.push_back(row_.size()); }

bool CsvReader::read_row() {
  row_.clear();
  ends_.clear();
  while (peek() == '\n' || peek() == '\r') get();
  row_line_ = line_;
  if (peek() == EOF) return false;
  bool quoted = false;      // inside quotes
  bool was_quoted = false;  // this field began with a quote, which has been closed
  std::size_t begin = 0;    // of this field in row_
  const auto malformed = [&](const std::string& reason, bool at_field_begin = false) {
    skip_rest_of_row(quoted, at_field_begin);
    throw BadRow(row_line_, "", reason);
  };
  for (;;) {
    if (row_.size() + ends_.size() > max_row_bytes)
      malformed(quoted ? "the row is longer than 1 MiB; is a quote not closed?"
                       : "the row is longer than 1 MiB",
                row_.size() == begin);
    const int c = get();
    if (c == 0) malformed("a NUL byte; is this a text file?");
    if (quoted) {
      if (c == EOF) throw BadRow(row_line_, "", "a quoted field is not closed before the end");
      if (c != '"') {
        row_.push_back(static_cast<char>(c));
      } else if (peek() == '"') {
        get();
        row_.push_back('"');
      } else {
        quoted = false;
        was_quoted = true;
      }
      continue;
    }
    if (c == '"') {
      if (row_.size() != begin || was_quoted)
        malformed("a quote inside an unquoted field; quote the field and double the quote");
      quoted = true;
      continue;
    }
    if (c == delimiter_ || c == '\n' || c == EOF) {
      if (c != delimiter_ && !was_quoted && row_.size() > begin && row_.back() == '\r')
        row_.pop_back();
      end_field();
      begin = row_.size();
      was_quoted = false;
      if (c != delimiter_) break;
      continue;
    }
    if (was_quoted && c == '\r' && (peek() == '\n' || peek() == EOF)) continue;
    if (was_quoted) malformed("text behind a closing quote");
    row_.push_back(static_cast<char>(c));
  }
  for (std::size_t c = 0; c < ends_.size(); ++c)
    if (!detail::valid_utf8(field(c)))
      throw BadRow(row_line_, c < columns_.size() ? columns_[c] : "", csv::encoding_hint(field(c)));
  return true;
}

void CsvReader::take_layout() {
  forms_ = source_.forms();
  if (peek() == EOF) throw Failure(name_ + ": the file is empty; a header row is needed");
  const std::string_view text(buffer_.data(), buffer_.size());
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  const std::size_t second = text.find_first_not_of(" \t\r\n", first + (first != text.npos));
  if (first != text.npos && second != text.npos &&
      ((text[first] == '{' && (text[second] == '"' || text[second] == '}')) ||
       (text[first] == '[' && text[second] == '{'))) {
    json_ = true;
    forms_.emplace_back("JSON objects");
    return;
  }
  auto lines = csv::first_lines(text);
  if (lines.empty()) return;
  lone_cr_ = lines.front().lone_cr;
  if (lone_cr_) forms_.emplace_back("carriage returns alone end the lines");
  delimiter_ = csv::delimiter_of(lines);
  // Excel's own way to say it.
  if (text.size() > first + 5 && text.substr(first, 4) == "sep=" &&
      (text[first + 5] == '\r' || text[first + 5] == '\n')) {
    delimiter_ = text[first + 4];
    skip_rest_of_row(false, false);
    if (csv::delimiters.find(delimiter_) == csv::delimiters.npos)
      throw Failure(name_ + ":1: 'sep=' names no comma, semicolon, tab or bar");
  }
  if (delimiter_ != ',')
    forms_.emplace_back(std::string(csv::name_of(delimiter_)) + " between fields");
}

void CsvReader::read_header() {
  take_layout();
  if (json_) {
    read_keys();
  } else {
    try {
      if (!read_row()) throw Failure(name_ + ": the file is empty; a header row is needed");
    } catch (const BadRow& row) {
      throw Failure(name_ + ":" + std::to_string(row.line) + ": " + row.what());
    }
    for (std::size_t c = 0; c < ends_.size(); ++c) columns_.emplace_back(trimmed(field(c)));
  }
  std::set<std::string_view> names;
  for (const std::string& column : columns_)
    if (!column.empty() && !names.insert(column).second)
      throw Failure(name_ + ":" + std::to_string(row_line_) + ": two columns are named '" +
                    printable(column) + "'; rename one");
}

// The next object, up to its closing brace; false at the end.
bool CsvReader::read_object(Object& object) {
  const auto is_between = [](int c) {
    return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == ',' || c == '[' || c == ']';
  };
  while (is_between(peek())) get();
  row_line_ = line_;
  if (peek() == EOF) return false;
  const auto malformed = [&](const std::string& reason) {
    for (int c; (c = get()) != EOF && c != '\n';) {
    }
    throw BadRow(row_line_, "", reason);
  };
  object_text_.clear();
  if (peek() != '{') malformed("not a JSON object, as the rows before are");
  bool quoted = false, escaped = false;
  for (std::size_t depth = 0; object_text_.empty() || depth > 0;) {
    if (object_text_.size() == max_row_bytes) malformed("the object is longer than 1 MiB");
    const int c = get();
    if (c == EOF) throw BadRow(row_line_, "", "the JSON object is not closed before the end");
    object_text_.push_back(static_cast<char>(c));
    if (escaped)
      escaped = false;
    else if (c == '\\')
      escaped = quoted;
    else if (c == '"')
      quoted = !quoted;
    else if (!quoted && (c == '{' || c == '['))
      ++depth;
    else if (!quoted && (c == '}' || c == ']'))
      --depth;
  }
  try {
    object = parse_json(object_text_, "the object");
  } catch (const Failure& failure) {
    throw BadRow(row_line_, "", failure.what());
  }
  if (!object.is_object()) throw BadRow(row_line_, "", "not a JSON object");
  return true;
}

void CsvReader::read_keys() {
  // A key that is optional should stand in one of so many rows.
  constexpr std::size_t rows = 1000;
  std::set<std::string> known;
  std::string problem;
  const std::size_t most = 4 * max_row_bytes;  // the first objects wait in memory
  std::size_t bytes = 0;
  while (waiting_.size() < rows && bytes < most) {
    Object object;
    try {
      if (!read_object(object)) break;
      for (const auto& [key, value] : object.items())
        if (known.insert(key).second) columns_.push_back(key);
      waiting_.push_back({row_line_, std::move(object), ""});
    } catch (const BadRow& bad) {
      if (problem.empty()) problem = std::to_string(bad.line) + ": " + bad.reason;
      waiting_.push_back({bad.line, {}, bad.reason});
    }
    bytes += object_text_.size();
  }
  if (known.empty())
    throw Failure(name_ + ":" + (problem.empty() ? "1: no JSON object has a key" : problem));
  row_line_ = 1;
}

void CsvReader::take_object(const Object& object) {
  row_.clear();
  ends_.clear();
  std::size_t found = 0;
  for (const std::string& column : columns_) {
    const auto value = object.find(column);
    if (value != object.end()) {
      ++found;
      if (value->is_array()) {
        for (std::size_t i = 0; i < value->size(); ++i) {
          if (i > 0) row_ += '|';
          csv::append_text((*value)[i], row_);
        }
      } else {
        csv::append_text(*value, row_);
      }
    }
    end_field();
  }
  left_out_values_ += object.size() - found;
  if (row_.size() > max_row_bytes) throw BadRow(row_line_, "", "the row is longer than 1 MiB");
  if (row_.find('\0') != row_.npos) throw BadRow(row_line_, "", "a NUL character");
}

std::optional<std::size_t> CsvReader::column(std::string_view name) const {
  const auto exact = std::find(columns_.begin(), columns_.end(), name);
  if (exact != columns_.end()) return static_cast<std::size_t>(exact - columns_.begin());
  std::optional<std::size_t> found;
  const auto fits = [&](std::string_view letters) {
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      if (columns_[c].empty() || letters_of(columns_[c]) != letters) continue;
      if (found)
        throw Failure(name_ + ":1: columns '" + printable(columns_[*found]) + "' and '" +
                      printable(columns_[c]) + "' can both be " + std::string(name) +
                      "; rename the one that is");
      found = c;
    }
  };
  fits(letters_of(name));
  if (found) return found;
  for (const csv::Synonyms& known : csv::synonyms())
    if (letters_of(known.name) == letters_of(name))
      for (const std::string_view letters : known.letters) fits(letters);
  return found;
}

std::size_t CsvReader::require(std::string_view name) const {
  if (const auto found = column(name)) return *found;
  std::string have;
  bool data = false;
  for (const std::string& column : columns_) {
    have += (have.empty() ? "" : ", ") + (column.empty() ? "''" : printable(column));
    data = data || (!column.empty() && column.find_first_not_of("0123456789.") == column.npos);
  }
  if (have.size() > 200) have = have.substr(0, 200) + "...";
  throw Failure(name_ + ":" + std::to_string(row_line_) + ": no column " + std::string(name) +
                " (found: " + have + "); " +
                (data ? "the first row seems to be data: put a header row before it"
                      : "name it so in the header row"));
}

bool CsvReader::next() {
  if (json_) {
    if (!waiting_.empty()) {
      const Waiting row = std::move(waiting_.front());
      waiting_.pop_front();
      row_line_ = row.line;
      if (!row.problem.empty()) throw BadRow(row.line, "", row.problem);
      take_object(row.object);
      return true;
    }
    Object object;
    if (!read_object(object)) return false;
    take_object(object);
    return true;
  }
  if (!read_row()) return false;
  if (ends_.size() != columns_.size())
    throw BadRow(row_line_, "",
                 std::to_string(ends_.size()) + " fields, the header has " +
                     std::to_string(columns_.size()));
  return true;
}

std::uint64_t CsvReader::digest() const {
  return xxh64(std::as_bytes(std::span(row_)), xxh64(std::as_bytes(std::span(ends_)), 0));
}

std::string_view CsvReader::field(std::size_t column) const {
  const std::size_t begin = column == 0 ? 0 : ends_[column - 1];
  return std::string_view(row_).substr(begin, ends_[column] - begin);
}

void CsvReader::refuse(std::size_t column, const std::string& reason) const {
  throw BadRow(row_line_, columns_[column], reason);
}

}  // namespace personalize::tools
