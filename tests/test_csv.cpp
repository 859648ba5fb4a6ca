// The CSV reader: what it reads, what it refuses, and where it goes on.
#include <doctest/doctest.h>
#include <unistd.h>
#include <zip.h>
#include <zlib.h>
#include <zstd.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/csv.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace personalize::tools;
using Rows = std::vector<std::vector<std::string>>;

std::string zstd(std::string_view text, bool checksum = true) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum ? 1 : 0);
  out.resize(ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size()));
  ZSTD_freeCCtx(context);
  return out;
}

std::string gzip(std::string_view text) {
  ::z_stream stream{};
  constexpr int gzip_header = 16;
  ::deflateInit2(&stream, 9, Z_DEFLATED, 15 + gzip_header, 8, Z_DEFAULT_STRATEGY);
  std::string out(::deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  ::deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  ::deflateEnd(&stream);
  return out;
}

using Entries = std::vector<std::pair<std::string, std::string>>;

std::string zip_archive(const Entries& entries) {
  const TemporaryFolder folder;
  int error = 0;
  ::zip_t* archive = ::zip_open(folder.file("t.zip").c_str(), ZIP_CREATE, &error);
  for (const auto& [name, text] : entries)
    ::zip_file_add(archive, name.c_str(), ::zip_source_buffer(archive, text.data(), text.size(), 0),
                   ZIP_FL_ENC_UTF_8);
  ::zip_close(archive);
  return bytes_of(folder.file("t.zip"));
}

std::string utf16(std::string_view ascii, bool big_endian) {
  std::string out;
  for (const char c : ascii) {
    if (big_endian) out += '\0';
    out += c;
    if (!big_endian) out += '\0';
  }
  return out;
}

struct Content {
  std::vector<std::string> columns;
  Rows rows;
  std::vector<std::uint64_t> lines;  // of the rows
  std::vector<std::string> bad;      // "line: what"
  bool operator==(const Content&) const = default;
};

Content read_all(CsvReader& reader) {
  Content content{reader.columns(), {}, {}, {}};
  for (;;) {
    try {
      if (!reader.next()) return content;
      std::vector<std::string> row;
      for (std::size_t c = 0; c < reader.columns().size(); ++c) row.emplace_back(reader.field(c));
      content.rows.push_back(std::move(row));
      content.lines.push_back(reader.line());
    } catch (const BadRow& bad) {
      content.bad.push_back(std::to_string(bad.line) + ": " + bad.what());
    }
  }
}

Content read_text(std::string_view text) {
  CsvReader reader("t.csv", std::span(text));
  return read_all(reader);
}

std::string failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

std::string failure_reading(std::string_view text) {
  return failure_of([&] { read_text(text); });
}

std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

TEST_CASE("quoted fields hold commas, doubled quotes and newlines") {
  const Content got = read_text(
      "A,B,C\n"
      "\"a,b\",\"say \"\"hi\"\"\",\"two\nlines\"\n"
      "\"\",\"\"\"\",x\n");
  CHECK(got.bad.empty());
  CHECK(got.columns == std::vector<std::string>{"A", "B", "C"});
  CHECK(got.rows == Rows{{"a,b", "say \"hi\"", "two\nlines"}, {"", "\"", "x"}});
  CHECK(got.lines == std::vector<std::uint64_t>{2, 4});
}

TEST_CASE("LF, CRLF, a byte-order mark, blank lines and a missing last newline change nothing") {
  const Rows rows{{"1", "2"}, {"3", ""}};
  for (const std::string_view text : {"A,B\n1,2\n3,\n", "A,B\r\n1,2\r\n3,\r\n",
                                      "\xEF\xBB\xBF"
                                      "A,B\n1,2\n3,\n",
                                      "A,B\n1,2\n3,", "\n\nA,B\n\n1,2\r\n\r\n\n3,\n\n",
                                      "\"A\",\"B\"\r\n\"1\",\"2\"\r\n\"3\",\"\"\r\n",
                                      "\xEF\xBB\xBF\"A\",\"B\"\n1,2\n\"3\",\"\""}) {
    CAPTURE(text);
    const Content got = read_text(text);
    CHECK(got.columns == std::vector<std::string>{"A", "B"});
    CHECK(got.rows == rows);
    CHECK(got.bad.empty());
  }
  CHECK(read_text("A,B\n\"1\r\n\",2\r\n").rows == Rows{{"1\r\n", "2"}});
}

TEST_CASE("a bad row is told with its line, and the reader goes on with the next row") {
  const auto check = [](std::string_view row, std::string_view reason) {
    CAPTURE(row);
    const Content got = read_text("A,B\nfirst,1\n" + std::string(row) + "\nlast,2\n");
    REQUIRE(got.bad.size() == 1);
    CHECK(got.bad[0] == "3: " + std::string(reason));
    CHECK(got.rows == Rows{{"first", "1"}, {"last", "2"}});
  };
  check("1", "1 fields, the header has 2");
  check("1,2,3", "3 fields, the header has 2");
  check("\"a\nb\"", "1 fields, the header has 2");
  check(std::string_view("a\0,1", 4), "a NUL byte; is this a text file?");
  check(std::string_view("\"a\0\n\"\"\",1", 9), "a NUL byte; is this a text file?");
  check("a\xFF,1",
        "column A: not valid UTF-8; it looks like Latin-1: convert the file with iconv -f LATIN1 "
        "-t UTF-8");
  check("a,caf\xE9 \x80",
        "column B: not valid UTF-8; it looks like Windows-1252: convert the file with iconv -f "
        "WINDOWS-1252 -t UTF-8");
  check("a,\xC4\xE3\xBA\xC3",
        "column B: not valid UTF-8 but another encoding (such as GB18030, Shift_JIS or "
        "Windows-1251); convert the file to UTF-8 with iconv");
  constexpr std::string_view inside =
      "a quote inside an unquoted field; quote the field and double the quote";
  check("5\" disc,1", inside);
  check("the \"best\" one,1", inside);
  check("3\" by 5\" by 7\",1", inside);
  check("a\"b,\"c\nd\"", inside);
  check("\"5\" disc\",1", "text behind a closing quote");
  check("\"5\" disc,\"1\"", "text behind a closing quote");
  check("\"a\"b,\"c\nd\"", "text behind a closing quote");
}

TEST_CASE("a quote that is never closed is a bad row at the line where the row begins") {
  const Content got = read_text("A,B\n1,2\n\"3,4\n5,6\n");
  CHECK(got.rows == Rows{{"1", "2"}});
  CHECK(got.bad == std::vector<std::string>{"3: a quoted field is not closed before the end"});
}

TEST_CASE("a row far too long is refused in less memory than it has bytes") {
  constexpr std::size_t length = 48 << 20;
  const std::string x(length, 'x');
  const auto check = [&](const std::string& text, const char* cure = "") {
    const std::string compressed = zstd(text);
    const std::size_t before = resident_bytes();
    CsvReader reader("t.csv", std::span(compressed));
    const std::string told = std::string("the row is longer than 1 MiB") + cure;
    CHECK_THROWS_WITH_AS(reader.next(), told.c_str(), BadRow);
    CHECK(resident_bytes() < before + length);
    REQUIRE(reader.next());
    CHECK(reader.field(0) == "last");
    CHECK_FALSE(reader.next());
  };
  check("A,B\n" + x + ",1\nlast,1\n");
  check("A,B\n\"" + x + "\n\"\"" + "\",1\nlast,1\n", "; is a quote not closed?");
  check("A,B\n" + std::string(length, ',') + "\"\n\"\nlast,1\n");
}

TEST_CASE("the longest row is 1 MiB, and wherever a longer one is given up no quote is misread") {
  constexpr std::size_t longest = CsvReader::max_row_bytes;
  CHECK(read_text("A\n" + std::string(longest, 'x') + "\n").rows[0][0].size() == longest);
  CHECK(read_text("A\n" + std::string(longest + 1, 'x') + "\n").bad ==
        std::vector<std::string>{"2: the row is longer than 1 MiB"});
  constexpr std::string_view tail = ",\"a\n\"\"\n\",,\"\"\"\n\",\"\",b,\"\n\"";
  for (std::size_t before = 0; before <= tail.size(); ++before) {
    const std::string row = std::string(longest - before, 'x') + std::string(tail);
    const Content got = read_text("A\n" + row + "\nlast\n");
    CAPTURE(before);
    CHECK(got.bad.size() == 1);
    CHECK(got.rows == Rows{{"last"}});
  }
}

TEST_CASE("no header, two equal headers and a missing column are failures that say where") {
  CHECK(failure_reading("") == "t.csv: the file is empty; a header row is needed");
  CHECK(failure_reading("\r\n\n") == "t.csv: the file is empty; a header row is needed");
  CHECK(failure_reading("\xEF\xBB\xBF") == "t.csv: the file is empty; a header row is needed");
  CHECK(failure_reading("\xEF\xBB"
                        "A\n1\n")
            .starts_with("t.csv:1: not valid UTF-8"));
  CHECK(failure_reading("A,B,A\n") == "t.csv:1: two columns are named 'A'; rename one");
  CHECK(failure_reading("\nA\"\n") ==
        "t.csv:2: a quote inside an unquoted field; quote the field and double the quote");
  constexpr std::string_view text = "\nA,B\n1,2\n";
  CsvReader reader("t.csv", std::span(text));
  CHECK(reader.require("B") == 1);
  CHECK(reader.column("A") == 0);
  CHECK_FALSE(reader.column("C").has_value());
  CHECK(failure_of([&] { (void)reader.require("C"); }) ==
        "t.csv:2: no column C (found: A, B); name it so in the header row");
  REQUIRE(reader.next());
  CHECK_THROWS_WITH_AS(reader.refuse(1, "is odd"), "column B: is odd", BadRow);
}

TEST_CASE("files that cannot be read are failures with the reason") {
  const TemporaryFolder folder;
  CHECK(failure_of([&] { CsvReader reader(folder.file("none.csv")); }) ==
        folder.file("none.csv") + ": cannot open: No such file or directory");
  CHECK(failure_of([&] { CsvReader reader(folder.path.string()); }) ==
        folder.path.string() + ": cannot read: Is a directory");
}

TEST_CASE("a header of very many columns is read in no time") {
  std::string header;
  for (std::size_t c = 0; c < 150'000; ++c) header += (c == 0 ? "" : ",") + std::to_string(c);
  CHECK(read_text(header + "\n").columns.size() == 150'000);
}

TEST_CASE("zstd is recognised by content: one frame, many, and pzstd's skippable ones") {
  constexpr std::string_view text = "A,B\n1,\"2\n3\"\n4,5\n";
  const Content plain = read_text(text);
  CHECK(plain.rows.size() == 2);
  CHECK(read_text(zstd(text)) == plain);
  std::string frames;
  for (const char c : text) frames += zstd(std::string_view(&c, 1));
  CHECK(read_text(frames) == plain);
  const std::string skippable("\x50\x2A\x4D\x18\x04\0\0\0abcd", 12);
  CHECK(read_text(skippable + zstd(text)) == plain);
  CHECK(read_text(zstd(text.substr(0, 7)) + skippable + zstd(text.substr(7))) == plain);
}

TEST_CASE("a zstd stream that is cut or damaged anywhere is a failure, never another table") {
  std::string text = "A,B\n";
  small_model::Random random{5};
  for (int i = 0; i < 40; ++i) text += std::to_string(random.bits()) + ",x\n";
  const std::string first = zstd(text), both = first + zstd("last,1\n");
  const Content whole = read_text(both);
  CHECK(whole.rows.size() == 41);
  for (std::size_t size = 4; size < both.size(); ++size) {
    if (size == first.size()) continue;
    CAPTURE(size);
    CHECK(failure_reading(std::string_view(both).substr(0, size)) ==
          "t.csv: the zstd stream ends early; copy the file again");
  }
  for (std::size_t at = 4; at < both.size(); ++at) {
    std::string damaged = both;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    CAPTURE(at);
    // Some bits of the format mean nothing.
    if (failure_reading(damaged).empty()) CHECK(read_text(damaged) == whole);
  }
  CHECK(failure_reading(first + "no frame") ==
        "t.csv: damaged zstd stream (Unknown frame descriptor)");
  // An empty frame that asks for a window of 256 MiB.
  CHECK(failure_reading(std::string_view("\x28\xB5\x2F\xFD\0\x90\x01\0\0", 9)) ==
        "t.csv: damaged zstd stream (Frame requires too much memory for decoding)");
}

TEST_CASE("random rows come back as they were written, from memory, from a file and from zstd") {
  const std::vector<std::string> pieces{"a",
                                        "Z",
                                        "0",
                                        " ",
                                        "|",
                                        ",",
                                        "\"",
                                        "\n",
                                        "\r",
                                        "\r\n",
                                        "\xC3\xA9",
                                        "\xE2\x82\xAC",
                                        "\xF0\x9D\x84\x9E"};
  const TemporaryFolder folder;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    small_model::Random random{seed};
    // The first one spans several of the reader's pieces of 256 KiB.
    const std::size_t rows = seed == 1 ? 40'000 : 1 + random.below(300);
    const std::size_t columns = 2 + random.below(5);
    std::string text;
    Content want;
    std::uint64_t line = 1;
    const auto append = [&](std::string_view bytes) {
      for (const char c : bytes) line += c == '\n' ? 1 : 0;
      text += bytes;
    };
    for (std::size_t c = 0; c < columns; ++c) {
      want.columns.push_back("C" + std::to_string(c));
      append((c == 0 ? "" : ",") + want.columns.back());
    }
    for (std::size_t r = 0; r < rows; ++r) {
      append(random.below(2) == 0 ? "\n" : "\r\n");
      while (random.below(10) == 0) append(random.below(2) == 0 ? "\n" : "\r\n");
      want.lines.push_back(line);
      auto& row = want.rows.emplace_back(columns);
      for (std::size_t c = 0; c < columns; ++c) {
        for (std::uint32_t n = random.below(8); n > 0; --n)
          row[c] += pieces[random.below(static_cast<std::uint32_t>(pieces.size()))];
        const bool quote =
            row[c].find_first_of(",\"\r\n") != std::string::npos || random.below(4) == 0;
        std::string field = row[c];
        for (std::size_t at = 0; (at = field.find('"', at)) != std::string::npos; at += 2)
          field.insert(at, 1, '"');
        append(c == 0 ? "" : ",");
        append(quote ? "\"" + field + "\"" : field);
      }
    }
    if (random.below(2) == 0) append("\n");
    CAPTURE(seed);
    CHECK((read_text(text) == want));
    CsvReader plain(folder.write("plain", text));
    CHECK((read_all(plain) == want));
    const std::size_t cut = random.below(static_cast<std::uint32_t>(text.size()));
    const std::string frames = zstd(text.substr(0, cut)) + zstd(text.substr(cut));
    CsvReader compressed(folder.write("compressed", frames));
    CHECK((read_all(compressed) == want));
  }
}

TEST_CASE("what is taken for UTF-8 is exactly the well-formed sequences of RFC 3629") {
  // Of one, two and three bytes: counted against the number of ways to put them together.
  constexpr std::uint64_t one = 0x80, two = 0x800 - 0x80, three = 0x10000 - 0x800 - 0x800;
  std::uint64_t valid1 = 0, valid2 = 0, valid3 = 0;
  char s[4] = {};
  const auto valid = [&s](std::size_t length) {
    return personalize::detail::valid_utf8(std::string_view(s, length)) ? std::uint64_t{1}
                                                                        : std::uint64_t{0};
  };
  for (int a = 0; a < 256; ++a) {
    s[0] = static_cast<char>(a);
    valid1 += valid(1);
    for (int b = 0; b < 256; ++b) {
      s[1] = static_cast<char>(b);
      valid2 += valid(2);
      for (int c = 0; c < 256; ++c) {
        s[2] = static_cast<char>(c);
        valid3 += valid(3);
      }
    }
  }
  CHECK(valid1 == one);
  CHECK(valid2 == one * one + two);
  CHECK(valid3 == one * one * one + 2 * one * two + three);
  // Of four bytes: every code point, and what lies next to the borders.
  std::uint64_t accepted = 0;
  for (std::uint32_t code = 0x10000; code <= 0x10FFFF; ++code) {
    s[0] = static_cast<char>(0xF0 | code >> 18);
    s[1] = static_cast<char>(0x80 | (code >> 12 & 0x3F));
    s[2] = static_cast<char>(0x80 | (code >> 6 & 0x3F));
    s[3] = static_cast<char>(0x80 | (code & 0x3F));
    accepted += valid(4);
  }
  CHECK(accepted == 0x100000);
  for (const std::string_view bad :
       {"\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xF8\x88\x80\x80\x80",
        "\xF0\x90\x80", "\xF0\x90\x80\x41", "\xF0\x90\x41\x80", "\xF0\x41\x80\x80",
        "\xF0\x90\x80\xC0", "a\xED\xA0\x80\xED\xB0\x80", "\xC0\x80", "ok\xFF"}) {
    CAPTURE(bad);
    CHECK_FALSE(personalize::detail::valid_utf8(bad));
  }
  CHECK(personalize::detail::valid_utf8(""));
  CHECK(personalize::detail::valid_utf8("ok \xC3\xA9 \xE2\x82\xAC \xF4\x8F\xBF\xBF"));
}

TEST_CASE(
    "gzip is read: one member, many, and the zeros behind them, a cut or damaged one is not") {
  std::string text = "A,B\n";
  small_model::Random random{7};
  for (int i = 0; i < 20'000; ++i) text += std::to_string(random.bits()) + ",x\n";
  const Content plain = read_text(text);
  CHECK(plain.rows.size() == 20'000);
  CHECK((read_text(gzip(text)) == plain));
  CHECK((read_text(gzip(text.substr(0, 99)) + gzip("") + gzip(text.substr(99)) +
                   std::string(512, '\0')) == plain));
  CsvReader reader("t.csv", std::span(std::as_const(text)));
  CHECK(reader.forms().empty());
  const std::string small = gzip("A,B\n1,2\n");
  CsvReader compressed("t.csv", std::span(std::as_const(small)));
  CHECK(compressed.forms() == std::vector<std::string>{"gzip"});
  for (std::size_t size = 2; size < small.size(); ++size) {
    CAPTURE(size);
    CHECK(failure_reading(std::string_view(small).substr(0, size)) ==
          "t.csv: the gzip stream ends early; copy the file again");
  }
  std::string damaged = small;
  damaged[damaged.size() - 6] ^= 1;  // of the checksum
  CHECK(failure_reading(damaged).starts_with("t.csv: damaged gzip stream (incorrect data check"));
  CHECK(failure_reading(small + "no member").starts_with("t.csv: damaged gzip stream"));
}

TEST_CASE("a zip archive of one file is read, and of others it is told what they hold") {
  const std::string text = "A,B\n1,2\n";
  CHECK((read_text(
             zip_archive({{"folder/", ""}, {"folder/t.csv", text}, {"__MACOSX/._t.csv", "x"}})) ==
         read_text(text)));
  CHECK(failure_reading(zip_archive({{"a.csv", text}, {"b.csv", text}})) ==
        "t.csv: a zip archive of 2 files (a.csv, b.csv); unzip it and name the one to read");
  CHECK(failure_reading(zip_archive({{"1", text}, {"2", text}, {"3", text}, {"4", text}})) ==
        "t.csv: a zip archive of 4 files (1, 2, 3, ...); unzip it and name the one to read");
  CHECK(
      failure_reading(zip_archive({{"[Content_Types].xml", "<x>"}, {"xl/workbook.xml", "<x>"}})) ==
      "t.csv: an Excel workbook; save the sheet as CSV (UTF-8)");
  CHECK(failure_reading(zip_archive({{"t.csv.gz", gzip(text)}})) ==
        "t.csv: compressed twice; unpack it once");
  std::string damaged = zip_archive({{"t.csv", text}});
  damaged[damaged.find("1,2")] = '7';
  CHECK(failure_reading(damaged) == "t.csv: the zip archive is damaged; copy it again");
  const TemporaryFolder folder;
  CsvReader file(folder.write("t.zip", zip_archive({{"t.csv", text}})));
  CHECK((read_all(file) == read_text(text)));
}

TEST_CASE("UTF-16 is read, with and without a byte-order mark, of either endianness") {
  constexpr std::string_view text = "A,B\n1,\"2\n3\"\n";
  for (const bool big : {false, true}) {
    CAPTURE(big);
    CHECK((read_text((big ? "\xFE\xFF" : "\xFF\xFE") + utf16(text, big)) == read_text(text)));
    CHECK((read_text(utf16(text, big)) == read_text(text)));
  }
  // U+E9, U+20AC and U+1D11E, which takes two units.
  CHECK(read_text(std::string_view("\xFE\xFF\0A\0\n\0\xE9\x20\xAC\xD8\x34\xDD\x1E\0\n", 16)).rows ==
        Rows{{"\xC3\xA9\xE2\x82\xAC\xF0\x9D\x84\x9E"}});
  CHECK(failure_reading(std::string_view("\xFE\xFF\0A\0\n\xD8\x34\0\n", 10)) ==
        "t.csv: damaged UTF-16 text; save it as UTF-8");
  CHECK(failure_reading(std::string_view("\xFE\xFF\0A\0\n\0", 7)) ==
        "t.csv: the UTF-16 text ends inside a character; copy the file again");
}

TEST_CASE("files of other kinds are named with the way out") {
  const auto named = [](std::string_view begin, const std::string& kind) {
    CAPTURE(kind);
    const std::string told = failure_reading(std::string(begin) + std::string("\x15\0\x15\n", 4));
    CHECK(told.starts_with("t.csv: " + kind));
    CHECK(told.find("; ") != told.npos);
  };
  named("PAR1", "a Parquet file");
  named("Obj\x01", "an Avro file");
  named("ORC", "an ORC file");
  named("ARROW1", "an Arrow or Feather file");
  named(std::string_view("SQLite format 3\0", 16), "an SQLite database");
  named("\xD0\xCF\x11\xE0\xA1\xB1\x1A\xE1", "an old Excel workbook");
  named("\x89HDF\r\n\x1A\n", "an HDF5 file");
  named("\x93NUMPY", "a NumPy array");
  named("RDX3\n", "an R data file");
  named("\x80\x04\x95", "a Python pickle");
  named("BZh9", "compressed with bzip2");
  named("\xFD\x37zXZ", "compressed with xz");
  named("\x89PZM\r\n\x1A\n", "a model file");
  named("%PDF-1.7", "a PDF document");
  named("version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS");
  named("<!DOCTYPE html>\n", "a web page");
  named("<?xml version=\"1.0\"?>", "an XML document");
  named(std::string(257, 'x') + "ustar", "a tar archive");
  named(std::string_view("\xFF\xFE\0\0A\0\0\0", 8), "UTF-32 text");
  // Words that begin alike.
  CHECK(read_text("ORC,PAR1\n1,2\n").rows.size() == 1);
  CHECK(read_text("PAR1,ORC\n1,2\n").rows.size() == 1);
}

TEST_CASE("semicolons, tabs and bars between fields, and carriage returns alone, are recognised") {
  const Rows rows{{"1", "a,b"}, {"2", "c|d"}, {"3", ""}};
  const auto check = [&](std::string_view text, const std::vector<std::string>& forms) {
    CAPTURE(text);
    CsvReader reader("t.csv", std::span(text));
    CHECK(reader.forms() == forms);
    const Content got = read_all(reader);
    CHECK(got.columns == std::vector<std::string>{"A", "B"});
    CHECK(got.rows == rows);
    CHECK(got.bad.empty());
  };
  check("A,B\n1,\"a,b\"\n2,c|d\n3,\n", {});
  check("A;B\n1;a,b\n2;c|d\n3;\n", {"semicolons between fields"});
  check("A\tB\r\n1\ta,b\r\n2\tc|d\r\n3\t\r\n", {"tabs between fields"});
  check("A|B\n1|a,b\n2|\"c|d\"\n3|\n", {"bars between fields"});
  check("sep=;\nA;B\n1;a,b\n2;c|d\n3;\n", {"semicolons between fields"});
  check("A,B\r1,\"a,b\"\r2,c|d\r3,\r", {"carriage returns alone end the lines"});
  check("A;B\r1;a,b\r2;c|d\r3;",
        {"carriage returns alone end the lines", "semicolons between fields"});
  // The rows tell which of two separates.
  CHECK(read_text("A;B,C\n1;2\n3;4\n").columns == std::vector<std::string>{"A", "B,C"});
  CHECK(read_text("A;B,C\n1,2\n3,4\n").columns == std::vector<std::string>{"A;B", "C"});
  CHECK(read_text("A,B\r1,2\r3\r").bad ==
        std::vector<std::string>{"3: 1 fields, the header has 2"});
}

TEST_CASE("JSON objects are rows, whose keys are the columns") {
  CHECK(read_text("{\"user\": \"u,1\", \"n\": 1, \"on\": true, \"tags\": [\"a\", \"b\"], "
                  "\"none\": null}\n{\"n\": 2.5, \"none\": \"x\", \"user\": \"u2\"}\n")
            .rows == Rows{{"1", "", "true", "a|b", "u,1"}, {"2.5", "x", "", "", "u2"}});
  // In an array, over several lines, all in one line.
  for (const std::string_view text :
       {"[\n {\"A\": \"}\\\"\",\n  \"B\": 1},\n {\"A\": \"2\", \"B\": {\"c\": [3]}}\n]\n",
        "[{\"A\":\"}\\\"\",\"B\":1},{\"A\":\"2\",\"B\":{\"c\":[3]}}]"}) {
    CAPTURE(text);
    CsvReader reader("t.csv", std::span(text));
    CHECK(reader.forms() == std::vector<std::string>{"JSON objects"});
    const Content got = read_all(reader);
    CHECK(got.columns == std::vector<std::string>{"A", "B"});
    CHECK(got.rows == Rows{{"}\"", "1"}, {"2", "{\"c\":[3]}"}});
  }
  const Content bad = read_text(
      "{\"A\": 1}\n{\"A\": }\nno object\n{\"A\": 2, \"A\": 3}\n{\"A\": \"\\u0000\"}\n{\"A\": 4}\n"
      "{\"A\": 5");
  CHECK(bad.rows == Rows{{"1"}, {"4"}});
  CHECK(bad.bad == std::vector<std::string>{
                       "2: the object is not JSON", "3: not a JSON object, as the rows before are",
                       "4: the object has the key \"A\" twice", "5: a NUL character",
                       "7: the JSON object is not closed before the end"});
  CHECK(failure_reading("{\"A\": }\n") == "t.csv:1: the object is not JSON");
  CHECK(failure_reading("{}\n") == "t.csv:1: no JSON object has a key");
  std::string late;
  for (int i = 0; i < 1000; ++i) late += "{\"A\": 1}\n";
  late += "{\"A\": 2, \"B\": 3}\n";
  CsvReader reader("t.csv", std::span(std::as_const(late)));
  CHECK(read_all(reader).rows.size() == 1001);
  CHECK(reader.left_out_values() == 1);
}

TEST_CASE("a column is found under another spelling or another usual name, if only one fits") {
  const auto found = [](std::string_view header, std::string_view name) {
    const std::string text = std::string(header) + "\n";
    CsvReader reader("t.csv", std::span(std::as_const(text)));
    return reader.column(name);
  };
  for (const char* const header :
       {"X,USER_ID", "X,user_id", "X,userId", "X, User ID ", "X,\"user-id\"", "X,UserID",
        "X,user_id:token", "X,user", "X,visitorid", "user,USER_ID", "userId,USER_ID"}) {
    CAPTURE(header);
    CHECK(found(header, "USER_ID") == 1);
  }
  CHECK(found("movieId,rating", "ITEM_ID") == 0);
  CHECK(found("movieId,rating", "EVENT_VALUE") == 1);
  CHECK(found("unixReviewTime", "TIMESTAMP") == 0);
  CHECK_FALSE(found("USERS,SESSION,TITLE", "USER_ID").has_value());
  CHECK_FALSE(found("item", "TITLE").has_value());
  CHECK(failure_of([&] { found("userId,user-id", "USER_ID"); }) ==
        "t.csv:1: columns 'userId' and 'user-id' can both be USER_ID; rename the one that is");
  CHECK(failure_of([&] { found("movieId,asin", "ITEM_ID"); }) ==
        "t.csv:1: columns 'movieId' and 'asin' can both be ITEM_ID; rename the one that is");
  CHECK(failure_of([&] {
          constexpr std::string_view text = "196\t242\t3\t881250949\n";
          CsvReader reader("t.csv", std::span(text));
          (void)reader.require("USER_ID");
        }) ==
        "t.csv:1: no column USER_ID (found: 196, 242, 3, 881250949); the first row seems to be "
        "data: put a header row before it");
}
