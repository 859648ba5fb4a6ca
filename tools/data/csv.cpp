#include "data/csv.hpp"

#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

BadRow::BadRow(std::uint64_t row_line, std::string row_column, std::string row_reason)
    : std::runtime_error((row_column.empty() ? "" : "column " + row_column + ": ") + row_reason),
      line(row_line),
      column(std::move(row_column)),
      reason(std::move(row_reason)) {}

// Yields the decompressed bytes piece by piece.
class CsvReader::Source {
 public:
  Source(std::string name, std::FILE* file, std::span<const char> memory)
      : name_(std::move(name)), file_(file, &close), memory_(memory), raw_(file ? piece : 0) {
    refill();
    std::uint32_t magic = 0;
    if (input_.size() >= sizeof magic) std::memcpy(&magic, input_.data(), sizeof magic);
    // pzstd begins its files with a skippable frame.
    if (magic == ZSTD_MAGICNUMBER ||
        (magic & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START) {
      zstd_.reset(ZSTD_createDStream());
      if (!zstd_) throw std::bad_alloc();
      // A frame may ask for a window of up to 2 GiB; 128 MiB is what `zstd -d` grants unasked.
      ZSTD_DCtx_setParameter(zstd_.get(), ZSTD_d_windowLogMax, 27);
      plain_.resize(piece);
    }
  }

  // Empty at the end. Throws Failure.
  std::span<const char> next() {
    if (!zstd_) {
      const auto result = input_;
      refill();
      return result;
    }
    for (;;) {
      if (input_.empty()) {
        if (!inside_frame_) return {};
        throw Failure(name_ + ": the zstd stream ends early; copy the file again");
      }
      ZSTD_inBuffer in{input_.data(), input_.size(), 0};
      ZSTD_outBuffer out{plain_.data(), plain_.size(), 0};
      const std::size_t left = ZSTD_decompressStream(zstd_.get(), &out, &in);
      if (ZSTD_isError(left))
        throw Failure(name_ + ": damaged zstd stream (" + ZSTD_getErrorName(left) + ")");
      inside_frame_ = left != 0;
      input_ = input_.subspan(in.pos);
      if (input_.empty()) refill();
      if (out.pos > 0) return {plain_.data(), out.pos};
    }
  }

 private:
  static constexpr std::size_t piece = std::size_t{1} << 18;
  static void close(std::FILE* file) { std::fclose(file); }
  struct FreeStream {
    void operator()(ZSTD_DStream* stream) const { ZSTD_freeDStream(stream); }
  };

  void refill() {
    if (!file_) {
      input_ = memory_;
      memory_ = {};
      return;
    }
    // Two halves, so that the piece handed out stays valid while the next one is read.
    half_ = !half_;
    auto& into = half_ ? raw_ : other_;
    into.resize(piece);
    const std::size_t got = std::fread(into.data(), 1, into.size(), file_.get());
    if (got == 0 && std::ferror(file_.get()))
      throw Failure(name_ + ": cannot read: " + std::strerror(errno));
    input_ = {into.data(), got};
  }

  std::string name_;
  std::unique_ptr<std::FILE, void (*)(std::FILE*)> file_;
  std::span<const char> memory_, input_;
  std::vector<char> raw_, other_, plain_;
  bool half_ = false, inside_frame_ = false;
  std::unique_ptr<ZSTD_DStream, FreeStream> zstd_;
};

CsvReader::CsvReader(const std::string& path) : name_(path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw Failure(path + ": cannot open: " + std::strerror(errno));
  source_ = std::make_unique<Source>(name_, file, std::span<const char>{});
  read_header();
}

CsvReader::CsvReader(std::string name, std::span<const char> bytes) : name_(std::move(name)) {
  source_ = std::make_unique<Source>(name_, nullptr, bytes);
  read_header();
}

CsvReader::~CsvReader() = default;

int CsvReader::peek() {
  if (at_ == buffer_.size()) {
    buffer_ = source_->next();
    at_ = 0;
    if (buffer_.empty()) return EOF;
  }
  return static_cast<unsigned char>(buffer_[at_]);
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
    at_field_begin = c == ',' && !quoted;
  }
}

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
      malformed("the row is longer than 1 MiB", row_.size() == begin);
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
    if (c == ',' || c == '\n' || c == EOF) {
      if (c != ',' && !was_quoted && row_.size() > begin && row_.back() == '\r') row_.pop_back();
      ends_.push_back(row_.size());
      begin = row_.size();
      was_quoted = false;
      if (c != ',') break;
      continue;
    }
    if (was_quoted && c == '\r' && (peek() == '\n' || peek() == EOF)) continue;
    if (was_quoted) malformed("text behind a closing quote");
    row_.push_back(static_cast<char>(c));
  }
  for (std::size_t c = 0; c < ends_.size(); ++c)
    if (!detail::valid_utf8(field(c)))
      throw BadRow(row_line_, c < columns_.size() ? columns_[c] : "",
                   "not valid UTF-8; convert the file to UTF-8");
  return true;
}

void CsvReader::read_header() {
  if (peek() == 0xEF) {
    get();
    if (get() != 0xBB || get() != 0xBF) throw Failure(name_ + ":1: not valid UTF-8");
  }
  try {
    if (!read_row()) throw Failure(name_ + ": the file is empty; a header row is needed");
  } catch (const BadRow& row) {
    throw Failure(name_ + ":" + std::to_string(row.line) + ": " + row.what());
  }
  for (std::size_t c = 0; c < ends_.size(); ++c) columns_.emplace_back(field(c));
  std::set<std::string_view> names;
  for (const std::string& column : columns_)
    if (!names.insert(column).second)
      throw Failure(name_ + ":" + std::to_string(row_line_) + ": two columns are named '" + column +
                    "'; rename one");
}

std::optional<std::size_t> CsvReader::column(std::string_view name) const {
  const auto found = std::find(columns_.begin(), columns_.end(), name);
  if (found == columns_.end()) return std::nullopt;
  return static_cast<std::size_t>(found - columns_.begin());
}

std::size_t CsvReader::require(std::string_view name) const {
  if (const auto found = column(name)) return *found;
  std::string have;
  for (const std::string& column : columns_) have += (have.empty() ? "" : ", ") + column;
  if (have.size() > 200) have = have.substr(0, 200) + "...";
  throw Failure(name_ + ":" + std::to_string(row_line_) + ": no column " + std::string(name) +
                " (found: " + have + "); name it so in the header row");
}

bool CsvReader::next() {
  if (!read_row()) return false;
  if (ends_.size() != columns_.size())
    throw BadRow(row_line_, "",
                 std::to_string(ends_.size()) + " fields, the header has " +
                     std::to_string(columns_.size()));
  return true;
}

std::string_view CsvReader::field(std::size_t column) const {
  const std::size_t begin = column == 0 ? 0 : ends_[column - 1];
  return std::string_view(row_).substr(begin, ends_[column] - begin);
}

void CsvReader::refuse(std::size_t column, const std::string& reason) const {
  throw BadRow(row_line_, columns_[column], reason);
}

}  // namespace personalize::tools
