#include "data/source.hpp"

#include <zip.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "command/command.hpp"
#include "command/json.hpp"

namespace personalize::tools {

class TextSource::Bytes {
 public:
  virtual ~Bytes() = default;
  // Valid until the next call; empty at the end. Throws Failure.
  virtual std::span<const char> next() = 0;
};

// Lets the first bytes be looked at before they are read.
class TextSource::Ahead : public Bytes {
 public:
  explicit Ahead(std::unique_ptr<Bytes> inner) : inner_(std::move(inner)) {}
  // As many, or all that there are.
  std::string_view head(std::size_t size) {
    while (head_.size() < size && !ended_) {
      const auto piece = inner_->next();
      ended_ = piece.empty();
      head_.append(piece.data(), piece.size());
    }
    return std::string_view(head_).substr(0, size);
  }
  void skip(std::size_t size) { begin_ = size; }
  std::span<const char> next() override {
    if (begin_ < head_.size()) return std::span(head_).subspan(std::exchange(begin_, head_.size()));
    return ended_ ? std::span<const char>{} : inner_->next();
  }

 private:
  std::unique_ptr<Bytes> inner_;
  std::string head_;
  std::size_t begin_ = 0;
  bool ended_ = false;
};

namespace source {

constexpr std::size_t piece = std::size_t{1} << 18;
using Bytes = TextSource::Bytes;

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

class FileBytes : public Bytes {
 public:
  explicit FileBytes(std::string path)
      : path_(std::move(path)), file_(std::fopen(path_.c_str(), "rb")), buffer_(piece) {
    if (!file_) throw Failure(path_ + ": cannot open: " + std::strerror(errno));
  }
  std::span<const char> next() override {
    const std::size_t got = std::fread(buffer_.data(), 1, buffer_.size(), file_.get());
    if (got == 0 && std::ferror(file_.get()))
      throw Failure(path_ + ": cannot read: " + std::strerror(errno));
    return std::span(buffer_).first(got);
  }

 private:
  std::string path_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  std::vector<char> buffer_;
};

class MemoryBytes : public Bytes {
 public:
  explicit MemoryBytes(std::span<const char> bytes) : bytes_(bytes) {}
  std::span<const char> next() override {
    const auto first = bytes_.first(std::min(bytes_.size(), piece));
    bytes_ = bytes_.subspan(first.size());
    return first;
  }

 private:
  std::span<const char> bytes_;
};

class ZstdBytes : public Bytes {
 public:
  ZstdBytes(std::string name, std::unique_ptr<Bytes> inner)
      : name_(std::move(name)),
        inner_(std::move(inner)),
        stream_(ZSTD_createDStream()),
        plain_(piece) {
    if (!stream_) throw std::bad_alloc();
    // A frame may ask for a window of up to 2 GiB; 128 MiB is what `zstd -d` grants unasked.
    ZSTD_DCtx_setParameter(stream_.get(), ZSTD_d_windowLogMax, 27);
  }
  std::span<const char> next() override {
    for (;;) {
      if (input_.empty()) input_ = inner_->next();
      if (input_.empty()) {
        if (!inside_frame_) return {};
        throw Failure(name_ + ": the zstd stream ends early; copy the file again");
      }
      ZSTD_inBuffer in{input_.data(), input_.size(), 0};
      ZSTD_outBuffer out{plain_.data(), plain_.size(), 0};
      const std::size_t left = ZSTD_decompressStream(stream_.get(), &out, &in);
      if (ZSTD_isError(left))
        throw Failure(name_ + ": damaged zstd stream (" + ZSTD_getErrorName(left) + ")");
      inside_frame_ = left != 0;
      input_ = input_.subspan(in.pos);
      if (out.pos > 0) return std::span(plain_).first(out.pos);
    }
  }

 private:
  struct Free {
    void operator()(ZSTD_DStream* stream) const { ZSTD_freeDStream(stream); }
  };
  std::string name_;
  std::unique_ptr<Bytes> inner_;
  std::span<const char> input_;
  bool inside_frame_ = false;
  std::unique_ptr<ZSTD_DStream, Free> stream_;
  std::vector<char> plain_;
};

class GzipBytes : public Bytes {
 public:
  GzipBytes(std::string name, std::unique_ptr<Bytes> inner)
      : name_(std::move(name)), inner_(std::move(inner)), plain_(piece) {
    constexpr int gzip_only = 16;
    if (::inflateInit2(&stream_, MAX_WBITS + gzip_only) != Z_OK) throw std::bad_alloc();
  }
  ~GzipBytes() override { ::inflateEnd(&stream_); }
  std::span<const char> next() override {
    for (;;) {
      if (stream_.avail_in == 0) {
        const auto part = inner_->next();
        if (part.empty()) {
          if (!inside_member_) return {};
          throw Failure(name_ + ": the gzip stream ends early; copy the file again");
        }
        // zlib's interface of 1995 does not say const.
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(part.data()));
        stream_.avail_in = static_cast<uInt>(part.size());
      }
      if (!inside_member_) {
        if (any_ && *stream_.next_in == 0) {  // tapes and block devices fill up with zeros
          ++stream_.next_in;
          --stream_.avail_in;
          continue;
        }
        inside_member_ = any_ = true;
      }
      stream_.next_out = reinterpret_cast<Bytef*>(plain_.data());
      stream_.avail_out = static_cast<uInt>(plain_.size());
      const int status = ::inflate(&stream_, Z_NO_FLUSH);
      if (status == Z_STREAM_END) {
        ::inflateReset(&stream_);
        inside_member_ = false;
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        throw Failure(name_ + ": damaged gzip stream (" +
                      (stream_.msg ? stream_.msg : "a preset dictionary") + ")");
      }
      const std::size_t got = plain_.size() - stream_.avail_out;
      if (got > 0) return std::span(plain_).first(got);
    }
  }

 private:
  std::string name_;
  std::unique_ptr<Bytes> inner_;
  ::z_stream stream_{};
  bool inside_member_ = false, any_ = false;
  std::vector<char> plain_;
};

// The one file of a zip archive.
class ZipBytes : public Bytes {
 public:
  // Of the file of that name, or of bytes in memory.
  ZipBytes(std::string name, std::optional<std::span<const char>> memory)
      : name_(std::move(name)), plain_(piece) {
    ::zip_error_t error;
    ::zip_error_init(&error);
    ::zip_source_t* from =
        memory ? ::zip_source_buffer_create(memory->data(), memory->size(), 0, &error)
               : ::zip_source_file_create(name_.c_str(), 0, -1, &error);
    if (from) archive_.reset(::zip_open_from_source(from, ZIP_RDONLY, &error));
    if (!archive_) {
      const std::string reason = ::zip_error_strerror(&error);
      ::zip_error_fini(&error);
      if (from) ::zip_source_free(from);
      throw Failure(name_ + ": not a whole zip archive (" + reason + "); copy it again");
    }
    ::zip_error_fini(&error);
    file_.reset(::zip_fopen_index(archive_.get(), only_file(), 0));
    if (!file_)
      throw Failure(name_ + ": the file in the zip archive cannot be opened (" +
                    ::zip_strerror(archive_.get()) + "); unzip it");
  }
  std::span<const char> next() override {
    const auto got = ::zip_fread(file_.get(), plain_.data(), plain_.size());
    if (got < 0) throw Failure(name_ + ": the zip archive is damaged; copy it again");
    return std::span(plain_).first(static_cast<std::size_t>(got));
  }

 private:
  struct Discard {
    void operator()(::zip_t* archive) const { ::zip_discard(archive); }
  };
  struct Close {
    void operator()(::zip_file_t* file) const { ::zip_fclose(file); }
  };

  std::uint64_t only_file() const {
    std::vector<std::pair<std::uint64_t, std::string>> files;
    const auto count = ::zip_get_num_entries(archive_.get(), 0);
    std::size_t all = 0;
    for (std::uint64_t i = 0; i < static_cast<std::uint64_t>(std::max<::zip_int64_t>(count, 0));
         ++i) {
      const char* const raw = ::zip_get_name(archive_.get(), i, 0);
      const std::string_view entry = raw ? raw : "";
      if (entry.starts_with("xl/"))
        throw Failure(name_ + ": an Excel workbook; save the sheet as CSV (UTF-8)");
      if (entry == "content.xml")
        throw Failure(name_ + ": an OpenDocument file; save the sheet as CSV");
      if (entry.ends_with('/') || entry.starts_with("__MACOSX/") || entry.ends_with(".DS_Store"))
        continue;
      ++all;
      if (files.size() < 3) files.emplace_back(i, entry);
    }
    if (all == 1) return files.front().first;
    std::string names;
    for (const auto& [index, entry] : files)
      names += (names.empty() ? " (" : ", ") + printable(entry);
    throw Failure(name_ + ": a zip archive of " + std::to_string(all) + " files" + names +
                  (all > files.size() ? ", ...)"
                   : all > 0          ? ")"
                                      : "") +
                  "; unzip it and name the one to read");
  }

  std::string name_;
  std::unique_ptr<::zip_t, Discard> archive_;
  std::unique_ptr<::zip_file_t, Close> file_;
  std::vector<char> plain_;
};

class Utf16Bytes : public Bytes {
 public:
  Utf16Bytes(std::string name, std::unique_ptr<Bytes> inner, bool big_endian)
      : name_(std::move(name)), inner_(std::move(inner)), big_(big_endian) {}
  std::span<const char> next() override {
    plain_.clear();
    while (plain_.empty()) {
      const auto input = inner_->next();
      if (input.empty()) {
        if (half_ || lead_ != 0)
          throw Failure(name_ + ": the UTF-16 text ends inside a character; copy the file again");
        return {};
      }
      for (const char byte : input) {
        const unsigned value = static_cast<unsigned char>(byte);
        if (!half_) {
          half_ = true;
          first_ = value;
          continue;
        }
        half_ = false;
        unit(big_ ? first_ << 8 | value : value << 8 | first_);
      }
    }
    return std::span(plain_);
  }

 private:
  void unit(std::uint32_t u) {
    const bool low = u >= 0xDC00 && u < 0xE000;
    if (low != (lead_ != 0)) throw Failure(name_ + ": damaged UTF-16 text; save it as UTF-8");
    if (u >= 0xD800 && u < 0xDC00) {
      lead_ = u;
      return;
    }
    const std::uint32_t code = low ? 0x10000 + ((lead_ - 0xD800) << 10) + (u - 0xDC00) : u;
    lead_ = 0;
    const auto put = [&](std::uint32_t byte) { plain_.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xE0 | code >> 12);
      } else {
        put(0xF0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3F));
      }
      put(0x80 | (code >> 6 & 0x3F));
    }
    put(0x80 | (code & 0x3F));
  }

  std::string name_;
  std::unique_ptr<Bytes> inner_;
  bool big_, half_ = false;
  unsigned first_ = 0;
  std::uint32_t lead_ = 0;
  std::string plain_;
};

// What else the first bytes may be, and what to do then; nullptr: text, as far as they tell.
const char* other_kind(std::string_view head) {
  using namespace std::string_view_literals;
  struct Kind {
    std::string_view begin;
    bool binary;  // a text may begin alike
    const char* what;
  };
  static constexpr Kind kinds[] = {
      {"PAR1"sv, true, "a Parquet file; export it as CSV, in pandas by read_parquet and to_csv"},
      {"Obj\x01"sv, true, "an Avro file; export it as CSV"},
      {"ORC"sv, true, "an ORC file; export it as CSV"},
      {"ARROW1"sv, true, "an Arrow or Feather file; export it as CSV"},
      {"FEA1"sv, true, "a Feather file; export it as CSV"},
      {"SQLite format 3\0"sv, true,
       "an SQLite database; export the table as CSV, by sqlite3 -header -csv"},
      {"\xD0\xCF\x11\xE0"sv, true, "an old Excel workbook; save the sheet as CSV (UTF-8)"},
      {"\x89HDF"sv, true, "an HDF5 file; export it as CSV"},
      {"\x93NUMPY"sv, true, "a NumPy array; export it as CSV"},
      {"RDX"sv, true, "an R data file; export it by write.csv with row.names = FALSE"},
      {"\x89PZM"sv, true, "a model file; a CSV is wanted"},
      {"BZh"sv, true, "compressed with bzip2; unpack it, or compress it with gzip or zstd"},
      {"\xFD\x37zXZ"sv, true, "compressed with xz; unpack it, or compress it with gzip or zstd"},
      {"\x04\x22\x4D\x18"sv, true,
       "compressed with lz4; unpack it, or compress it with gzip or zstd"},
      {"\x1F\x9D"sv, true, "compressed with compress; unpack it, or compress it with gzip or zstd"},
      {"\x1F\x8B"sv, true, "compressed twice; unpack it once"},
      {"\x28\xB5\x2F\xFD"sv, true, "compressed twice; unpack it once"},
      {"PK\x03\x04"sv, true, "a zip archive inside another file; unpack it"},
      {"7z\xBC\xAF\x27\x1C"sv, true, "a 7-Zip archive; unpack it"},
      {"Rar!"sv, true, "a RAR archive; unpack it"},
      {"\0\0\xFE\xFF"sv, true, "UTF-32 text; save it as UTF-8"},
      {"\xFF\xFE\0\0"sv, true, "UTF-32 text; save it as UTF-8"},
      {"%PDF-"sv, false, "a PDF document; a CSV is wanted"},
      {"{\\rtf"sv, false, "a Rich Text document; save it as plain text"},
      {"version https://git-lfs"sv, false, "a pointer of Git LFS, not the file; run git lfs pull"},
      {"<?xml"sv, false, "an XML document; export it as CSV"},
      {"<!DOCTYPE"sv, false, "a web page, perhaps an error page; download the file again"},
      {"<!doctype"sv, false, "a web page, perhaps an error page; download the file again"},
      {"<html"sv, false, "a web page, perhaps an error page; download the file again"},
      {"<HTML"sv, false, "a web page, perhaps an error page; download the file again"},
  };
  const bool binary = std::any_of(head.begin(), head.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte < 0x09 || (byte > 0x0D && byte < 0x20);
  });
  for (const Kind& kind : kinds)
    if (head.starts_with(kind.begin) && (binary || !kind.binary)) return kind.what;
  if (head.size() > 262 && head.substr(257, 5) == "ustar") return "a tar archive; unpack it";
  if (head.size() > 1 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5)
    return "a Python pickle; export the data frame as CSV, by to_csv";
  return nullptr;
}

bool begins_zstd(std::string_view head) {
  std::uint32_t magic = 0;
  if (head.size() < sizeof magic) return false;
  std::memcpy(&magic, head.data(), sizeof magic);
  // pzstd begins its files with a skippable frame.
  return magic == ZSTD_MAGICNUMBER ||
         (magic & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START;
}

}  // namespace source

TextSource::TextSource(const std::string& path) {
  unpack(path, std::make_unique<source::FileBytes>(path), std::nullopt);
}

TextSource::TextSource(const std::string& name, std::span<const char> bytes) {
  unpack(name, std::make_unique<source::MemoryBytes>(bytes), bytes);
}

TextSource::~TextSource() = default;

void TextSource::unpack(const std::string& name, std::unique_ptr<Bytes> raw,
                        std::optional<std::span<const char>> memory) {
  using namespace source;
  constexpr std::size_t enough = 512;  // tar's mark stands at 257
  auto ahead = std::make_unique<Ahead>(std::move(raw));
  std::string_view head = ahead->head(enough);
  const auto inside = [&](const char* form, std::unique_ptr<Bytes> unpacked) {
    forms_.emplace_back(form);
    ahead = std::make_unique<Ahead>(std::move(unpacked));
    head = ahead->head(enough);
  };
  if (begins_zstd(head))
    inside("zstd", std::make_unique<ZstdBytes>(name, std::move(ahead)));
  else if (head.starts_with("\x1F\x8B"))
    inside("gzip", std::make_unique<GzipBytes>(name, std::move(ahead)));
  else if (head.starts_with("PK\x03\x04") || head.starts_with("PK\x05\x06"))
    inside("a zip archive", std::make_unique<ZipBytes>(name, memory));
  if (const char* const kind = other_kind(head)) throw Failure(name + ": " + kind);

  if (head.starts_with("\xEF\xBB\xBF")) {
    ahead->skip(3);
  } else if (head.starts_with("\xFF\xFE") || head.starts_with("\xFE\xFF")) {
    ahead->skip(2);
    forms_.emplace_back("UTF-16");
    bytes_ = std::make_unique<Utf16Bytes>(name, std::move(ahead), head[0] == '\xFE');
    return;
  } else if (head.size() >= 4 && (head[0] == 0) != (head[1] == 0) &&
             (head[0] == 0) == (head[2] == 0) && (head[1] == 0) == (head[3] == 0)) {
    // Two characters of ASCII without a byte-order mark.
    forms_.emplace_back("UTF-16");
    bytes_ = std::make_unique<Utf16Bytes>(name, std::move(ahead), head[0] == 0);
    return;
  }
  bytes_ = std::move(ahead);
}

std::span<const char> TextSource::next() { return bytes_->next(); }

}  // namespace personalize::tools
