// What journals keep through a crash, and the folder that they lie in.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../personalize_runtime.hpp"
#include "journal_files.hpp"
#include "temporary_folder.hpp"

namespace fs = std::filesystem;
namespace pz = personalize;

using journals::append, journals::begin, journals::next_file, journals::read;
using pz::Durability, pz::Errc;
using pz::detail::Folder, pz::detail::Journal, pz::detail::JournalFile;
using Texts = std::vector<std::string>;

namespace {

// A journal's file with these records, as it lies on the disk.
std::string journal_of(const Texts& texts,
                       const pz::detail::JournalHeader& header = journals::header) {
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  {
    const auto journal = begin(path, {}, header);
    for (const std::string& text : texts) REQUIRE(journal->commit(append(*journal, text)));
  }
  return bytes_of(path);
}

}  // namespace

TEST_CASE("a folder is made for its owner alone, in a folder that is there") {
  const TemporaryFolder above;
  const std::string path = above.file("state");
  {
    const auto folder = Folder::open(path);
    REQUIRE(folder);
    struct stat status {};
    REQUIRE(::stat(path.c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0700);
    CHECK(folder->sync());
  }
  CHECK(Folder::open(path));
  const auto missing = Folder::open(above.file("a/b"));
  REQUIRE_FALSE(missing);
  CHECK(missing.error().code == Errc::io);
  CHECK(missing.error().message.starts_with(above.file("a/b: cannot make the folder: ")));
  CHECK_FALSE(Folder::open(above.write("file", "text")));
}

TEST_CASE("a folder has one owner at a time, who may end in any way") {
  const TemporaryFolder above;
  const std::string path = above.file("state");
  std::array<int, 2> ready{};
  REQUIRE(::pipe(ready.data()) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto folder = Folder::open(path);
    (void)!::write(ready[1], folder ? "y" : "n", 1);
    for (;;) ::pause();
  }
  char answer = 0;
  REQUIRE(::read(ready[0], &answer, 1) == 1);
  CHECK(answer == 'y');
  const auto refused = Folder::open(path);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == Errc::io);
  CHECK(refused.error().message ==
        path + ": another process, or another recommender of this one, has it open");
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  ::close(ready[0]);
  ::close(ready[1]);

  auto first = Folder::open(path);
  REQUIRE(first);
  CHECK_FALSE(Folder::open(path));
  const Folder moved = *std::move(first);
  CHECK_FALSE(Folder::open(path));
}

TEST_CASE("a folder lists its files in order, and removes them and what writers left") {
  const TemporaryFolder above;
  const auto folder = Folder::open(above.file("state"));
  REQUIRE(folder);
  CHECK(folder->list()->empty());
  for (const char* name : {"b", "c.0123456789abcdef.part", "a", "parts", "\xC3\xA4"})
    REQUIRE(pz::write_file(folder->path_of(name), {}));
  CHECK(*folder->list() == Texts{"a", "b", "c.0123456789abcdef.part", "parts", "\xC3\xA4"});
  CHECK(folder->remove_parts());
  CHECK(folder->remove("a"));
  CHECK(*folder->list() == Texts{"b", "parts", "\xC3\xA4"});
  const auto missing = folder->remove("a");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().message.starts_with(folder->path_of("a") + ": cannot remove: "));
  fs::remove_all(above.path / "state");
  CHECK_FALSE(folder->list());
}

TEST_CASE("records come back as they were appended, with their numbers and types") {
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const std::string large(3'000'000, 'x');
  {
    const auto journal = begin(path);
    CHECK(journal->next_sequence() == 10);
    CHECK(append(*journal, "one", 7) == 10);
    CHECK(append(*journal, "") == 11);
    CHECK(append(*journal, large, 0xffffffff) == 12);
    auto numbers = journal->reserve(100);
    CHECK(numbers.room() == 100);
    numbers.add_integer(std::uint32_t{0x64636261});
    CHECK(numbers.room() == 96);
    CHECK(journal->append(std::move(numbers), 2) == 13);
    CHECK(journal->status().pending_bytes > large.size());
    REQUIRE(journal->commit(13));
    const auto status = journal->status();
    CHECK(status.durable == 14);
    CHECK(status.written == 14);
    CHECK(status.next == 14);
    CHECK(status.pending_bytes == 0);
    CHECK(status.file_bytes == fs::file_size(path));
    CHECK_FALSE(status.error);
    CHECK_FALSE(status.broken);
  }
  const auto got =
      read(path, {.lineage = journals::header.lineage, .number = 3, .first_record = 10});
  REQUIRE(got.end);
  CHECK(got.texts == Texts{"one", "", large, "abcd"});
  CHECK(got.numbers == std::vector<std::uint64_t>{10, 11, 12, 13});
  CHECK(got.types == std::vector<std::uint32_t>{7, 1, 0xffffffff, 2});
  CHECK(got.end->header.lineage == journals::header.lineage);
  CHECK(got.end->header.number == 3);
  CHECK(got.end->header.first_sequence == 10);
  CHECK(got.end->header.model == journals::header.model);
  CHECK(got.end->end == fs::file_size(path));
  CHECK(got.end->first_record == 10);
  CHECK(got.end->next_sequence == 14);
  CHECK(got.end->torn == 0);
}

TEST_CASE("a journal's file has the bytes that the format's table says") {
  std::string wanted("\x89PZJ\r\n\x1a\n\x01\0\0\0\0\0\0\0", 16);
  wanted += std::string("\x88\x77\x66\x55\x44\x33\x22\x11\x03\0\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0", 24);
  wanted += std::string("\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0", 16);
  const auto add_checksum = [&](std::size_t from, std::uint64_t seed) {
    const std::uint64_t sum =
        pz::xxh64(pz::detail::text_bytes(std::string_view(wanted).substr(from)), seed);
    wanted.append(reinterpret_cast<const char*>(&sum), sizeof sum);
  };
  add_checksum(0, 0);
  wanted += std::string("\x03\0\0\0\x01\0\0\0\x0a\0\0\0\0\0\0\0one", 19);
  add_checksum(64, 0x1122334455667788 ^ 3);
  CHECK(journal_of({"one"}) == wanted);
}

TEST_CASE("a file is not made anew where one is, and has an owner alone") {
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  { const auto journal = begin(path); }
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  const auto again = Journal::create(path, journals::header, {});
  REQUIRE_FALSE(again);
  CHECK(again.error().code == Errc::io);
  CHECK(again.error().message.starts_with(path + ": cannot create: "));
  CHECK_FALSE(Journal::create(folder.file("missing/journal"), journals::header, {}));
  const auto empty = read(path);
  REQUIRE(empty.end);
  CHECK(empty.end->next_sequence == 10);
  CHECK(empty.end->end == 64);
}

TEST_CASE("wherever a file ends, the records that are whole are read and the rest is torn") {
  const TemporaryFolder folder;
  const std::string whole = journal_of({"first", "", "the third"});
  const std::array<std::size_t, 4> ends{64, 64 + 24 + 5, 64 + 2 * 24 + 5, 64 + 3 * 24 + 14};
  REQUIRE(whole.size() == ends[3]);
  for (std::size_t size = 0; size <= whole.size(); ++size) {
    CAPTURE(size);
    const auto got = read(folder.write("cut", whole.substr(0, size)));
    if (size < 64) {
      REQUIRE_FALSE(got.end);
      CHECK(got.end.error().code == Errc::truncated);
      CHECK(
          got.end.error().message.ends_with(": a journal with a torn header: it was never begun"));
      continue;
    }
    REQUIRE(got.end);
    const auto records = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), size) -
                                                  ends.begin() - 1);
    CHECK(got.texts.size() == records);
    CHECK(got.end->end == ends[records]);
    CHECK(got.end->torn == size - ends[records]);
    CHECK(got.end->next_sequence == 10 + records);
    // What a power cut may leave of bytes that the system had not written.
    const auto blank = read(folder.write("blank", whole.substr(0, size) + std::string(5000, '\0')));
    REQUIRE(blank.end);
    CHECK(blank.end->end == ends[records]);
    CHECK(blank.end->torn == size - ends[records] + 5000);
  }
  CHECK(read(folder.write("blank", std::string(64, '\0'))).end.error().code == Errc::truncated);
  CHECK(read(folder.write("blank", std::string(65, '\0'))).end.error().code == Errc::format);
  CHECK(read(folder.file("missing")).end.error().code == Errc::io);
}

TEST_CASE("a byte that is not what was written is seen, in the last record as a torn tail") {
  const TemporaryFolder folder;
  const std::string whole = journal_of({"first", "the second", "third"});
  const std::size_t second = 64 + 24 + 5, third = second + 24 + 10;
  for (std::size_t at = 0; at < whole.size(); ++at)
    for (const char bit : {'\x01', '\x80', '\xff'}) {
      CAPTURE(at);
      std::string changed = whole;
      changed[at] ^= bit;
      const std::string path = folder.write("changed", changed);
      const auto got = read(path);
      if (at >= third) {
        REQUIRE(got.end);
        CHECK(got.texts == Texts{"first", "the second"});
        CHECK(got.end->end == third);
        CHECK(got.end->torn == whole.size() - third);
        continue;
      }
      REQUIRE_FALSE(got.end);
      const pz::Error& error = got.end.error();
      CHECK(error.message.starts_with(path + ": "));
      if (at < 64) {
        CHECK(error.code == (at < 8 ? Errc::format : Errc::checksum));
        continue;
      }
      CHECK(error.code == Errc::corrupt);
      CHECK(error.offset == (at < second ? 64 : second));
      CHECK(error.message == path +
                                 (at < second ? ": damaged at byte 64: record 10"
                                              : ": damaged at byte 93: record 11") +
                                 " does not match its checksum; records follow it");
      CHECK(got.texts.size() == (at < second ? 0 : 1));
    }
}

TEST_CASE("a header says what is wrong with it") {
  const TemporaryFolder folder;
  const auto with = [&](std::size_t at, char value) {
    std::string bytes = journal_of({"text"});
    bytes[at] = value;
    const std::uint64_t sum =
        pz::xxh64(pz::detail::text_bytes(std::string_view(bytes).substr(0, 56)));
    std::memcpy(bytes.data() + 56, &sum, sizeof sum);
    return read(folder.write("changed", bytes)).end;
  };
  CHECK(with(10, 9));  // a minor version
  CHECK(with(8, 2).error().code == Errc::version);
  CHECK(with(8, 2).error().message.ends_with("use a newer personalize_runtime.hpp"));
  CHECK(with(12, 1).error().code == Errc::corrupt);
  const std::string path = folder.write("right", journal_of({"text"}));
  const auto number = read(path, {.number = 4}).end;
  REQUIRE_FALSE(number);
  CHECK(number.error().message == path + ": is journal 3, not 4");
  const auto lineage = read(path, {.lineage = 1}).end;
  REQUIRE_FALSE(lineage);
  CHECK(lineage.error().message == path + ": a journal that belongs to another folder's state");
}

TEST_CASE("records that are missing or stand twice are damage") {
  const TemporaryFolder folder;
  const std::string whole = journal_of({"aaaa", "bbbb", "cccc"});
  const std::string head = whole.substr(0, 64), a = whole.substr(64, 28), b = whole.substr(92, 28),
                    c = whole.substr(120, 28);
  const std::string path = folder.file("changed");
  const auto error = [&](const std::string& records,
                         const pz::detail::JournalExpectation& expected = {}) {
    const auto end = read(folder.write("changed", head + records), expected).end;
    return end ? std::string("none") : end.error().message;
  };
  CHECK(error(a + c) ==
        path + ": damaged at byte 92: record 11 is missing; record 12 stands in its place");
  CHECK(error(a + b + a) ==
        path + ": damaged at byte 120: record 12 is missing; record 10 stands in its place");
  CHECK(error(b + c, {.first_record = 10}) ==
        path + ": damaged at byte 64: record 10 is missing; record 11 stands in its place");
  // A file may be made before the journal goes over to it.
  CHECK(error(b + c) == "none");
  CHECK(read(path).end->first_record == 11);
  CHECK(error(b + c, {.first_record = 11}) == "none");
  CHECK(error("torn" + c) == path +
                                 ": damaged at byte 64: record 10 does not match its checksum; "
                                 "records follow it");
}

TEST_CASE("bytes of another journal are never taken for a record") {
  const TemporaryFolder folder;
  auto older = journals::header;
  older.number = 2;
  const std::string stale = journal_of({"aaaa", "bbbb", "cccc"}, older);
  const std::string mine = journal_of({"aaaa"});
  const auto got = read(folder.write("journal", mine + stale.substr(92)));
  REQUIRE(got.end);
  CHECK(got.texts == Texts{"aaaa"});
  CHECK(got.end->torn == stale.size() - 92);
}

TEST_CASE("a payload that looks like records is no record") {
  const TemporaryFolder folder;
  std::string fake;
  for (std::uint64_t sequence = 10; sequence < 200; ++sequence) {
    fake += std::string("\0\0\0\0\x01\0\0\0", 8);
    fake.append(reinterpret_cast<const char*>(&sequence), 8);
    fake += "checksum";
  }
  const std::string whole = journal_of({"first", fake});
  CHECK(read(folder.write("whole", whole)).texts == Texts{"first", fake});
  const auto cut = read(folder.write("cut", whole.substr(0, whole.size() - 1)));
  REQUIRE(cut.end);
  CHECK(cut.texts == Texts{"first"});
}

TEST_CASE("a file that is full of what could be records is read in seconds") {
  const TemporaryFolder folder;
  // Each four bytes begin a record of 64 KiB by their size, with any number.
  auto header = journals::header;
  header.first_sequence = 0;
  std::string hostile = journal_of({}, header);
  for (int i = 0; i < 1 << 18; ++i) hostile.append("\0\0\1\0", 4);
  const auto end = read(folder.write("hostile", hostile)).end;
  REQUIRE_FALSE(end);
  CHECK(end.error().code == Errc::corrupt);
}

TEST_CASE("an error of the visitor ends the reading") {
  const TemporaryFolder folder;
  int visited = 0;
  const auto end = pz::detail::read_journal(
      folder.write("journal", journal_of({"a", "b", "c"})), {},
      [&](std::uint64_t, std::uint32_t, std::span<const std::byte>) -> pz::Result<void> {
        if (++visited == 2) return pz::Error{Errc::invalid_argument, "enough"};
        return {};
      });
  REQUIRE_FALSE(end);
  CHECK(end.error().message == "enough");
  CHECK(visited == 2);
}

TEST_CASE("a journal goes on where its sound records end") {
  const TemporaryFolder folder;
  const std::string whole = journal_of({"one", "two", "three"});
  const std::string path = folder.write("journal", whole.substr(0, whole.size() - 3));
  for (int round = 0; round < 3; ++round) {
    const auto found = read(path);
    REQUIRE(found.end);
    CHECK(found.texts.size() == static_cast<std::size_t>(2 + round));
    auto journal =
        Journal::resume(path, found.end->header, found.end->end, found.end->next_sequence, {});
    REQUIRE(journal);
    CHECK(fs::file_size(path) == found.end->end);
    CHECK(append(**journal, "more") == found.end->next_sequence);
  }
  CHECK(read(path).texts == Texts{"one", "two", "more", "more", "more"});
  const auto shorter = Journal::resume(path, journals::header, 10'000, 20, {});
  REQUIRE_FALSE(shorter);
  CHECK(shorter.error().code == Errc::truncated);
  CHECK_FALSE(Journal::resume(folder.file("missing"), journals::header, 64, 10, {}));
}

TEST_CASE("what nobody committed is written when the journal ends") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const TemporaryFolder folder;
    const std::string path = folder.file("journal");
    {
      const auto journal = begin(path, {.durability = durability});
      append(*journal, "one");
      append(*journal, "two");
      CHECK(fs::file_size(path) == 64);
    }
    CHECK(read(path).texts == Texts{"one", "two"});
  }
}

TEST_CASE(
    "what is reserved and not appended leaves nothing, and what cannot be had changes nothing") {
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  {
    auto dropped = journal->reserve(1000);
    auto other = journal->reserve(10);
    dropped = std::move(other);
  }
#if PERSONALIZE_HAS_EXCEPTIONS
  CHECK_THROWS_AS((void)journal->reserve(pz::detail::most_payload + 1), std::bad_alloc);
#endif
  REQUIRE(journal->commit(append(*journal, "text")));
  CHECK(read(path).texts == Texts{"text"});
  const std::string largest(pz::detail::most_payload, 'x');
  REQUIRE(journal->commit(append(*journal, largest)));
  CHECK(read(path).texts[1] == largest);
}

TEST_CASE("records go to the file that was the present one when they were appended") {
  const TemporaryFolder folder;
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const std::string one = folder.file("one"), two = folder.file("two"), three = folder.file("3");
    const auto journal = begin(one, {.durability = durability});
    append(*journal, "a");
    // Made while records still go to the first.
    auto second = next_file(two, 4, journal->next_sequence());
    append(*journal, "b");
    journal->switch_to(std::move(second));
    append(*journal, "c");
    journal->switch_to(next_file(three, 5, journal->next_sequence()));
    REQUIRE(journal->commit(append(*journal, "d")));
    CHECK(read(one).texts == Texts{"a", "b"});
    const auto at_two = read(two, {.first_record = 12});
    REQUIRE(at_two.end);
    CHECK(at_two.texts == Texts{"c"});
    CHECK(read(three).texts == Texts{"d"});
    CHECK(read(three).end->next_sequence == 14);
    REQUIRE(journal->sync());
    CHECK(journal->status().durable == 14);
    journal->forget_before(5);
    REQUIRE(journal->commit(append(*journal, "e")));
    CHECK(read(three).texts == Texts{"d", "e"});
    for (const std::string& path : {one, two, three}) fs::remove(path);
  }
}

TEST_CASE("a process that is killed loses nothing that was committed") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const TemporaryFolder folder;
    const std::string path = folder.file("journal");
    std::array<int, 2> acknowledged{};
    REQUIRE(::pipe(acknowledged.data()) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      const auto journal = begin(path, {.durability = durability});
      for (;;) {
        const std::uint64_t number = append(*journal, std::string(100, 'x'));
        if (!journal->commit(number)) ::_exit(1);
        if (::write(acknowledged[1], &number, sizeof number) != sizeof number) ::_exit(1);
      }
    }
    std::uint64_t last = 0;
    for (int i = 0; i < 200; ++i)
      REQUIRE(::read(acknowledged[0], &last, sizeof last) == sizeof last);
    REQUIRE(::kill(child, SIGKILL) == 0);
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    ::close(acknowledged[1]);
    while (::read(acknowledged[0], &last, sizeof last) == sizeof last) {
    }
    ::close(acknowledged[0]);
    const auto got = read(path);
    REQUIRE(got.end);
    CHECK(got.end->next_sequence > last);
  }
}

#ifndef PERSONALIZE_NO_THREADS
TEST_CASE("threads append, commit and change files at the same time, and nothing is lost") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const TemporaryFolder folder;
    const auto path = [&](std::uint64_t number) {
      return folder.file("journal-" + std::to_string(number));
    };
    constexpr int threads = 4, records = 300;
    auto header = journals::header;
    header.number = 0;
    const auto journal = begin(path(0), {.durability = durability}, header);
    std::shared_mutex appending;  // alone: while the journal changes files
    std::atomic<int> left{threads};
    std::vector<std::thread> writers;
    std::vector<std::vector<std::uint64_t>> numbers(threads);
    for (int t = 0; t < threads; ++t)
      writers.emplace_back([&, t] {
        for (int r = 0; r < records; ++r) {
          std::uint64_t number = 0;
          {
            const std::shared_lock lock{appending};
            number = append(*journal, std::to_string(t) + " " + std::to_string(r));
          }
          numbers[static_cast<std::size_t>(t)].push_back(number);
          // Without a check between threads: doctest's are not for that.
          if (r % 3 != 0 && !journal->commit(number)) std::abort();
        }
        --left;
      });
    std::uint64_t files = 0;
    while (left > 0) {
      ++files;
      auto file = next_file(path(files), files, journal->next_sequence());
      const std::unique_lock lock{appending};
      journal->switch_to(std::move(file));
      (void)journal->status();
    }
    for (std::thread& writer : writers) writer.join();
    REQUIRE(journal->sync());
    std::uint64_t next = 10;
    std::array<int, threads> seen{};
    for (std::uint64_t file = 0; file <= files; ++file) {
      const auto got = read(path(file), {.number = file, .first_record = next});
      REQUIRE(got.end);
      CHECK(got.end->torn == 0);
      for (std::size_t i = 0; i < got.texts.size(); ++i) {
        const auto t = static_cast<std::size_t>(got.texts[i][0] - '0');
        CHECK(got.texts[i].substr(2) == std::to_string(seen[t]));
        CHECK(numbers[t][static_cast<std::size_t>(seen[t]++)] == got.numbers[i]);
      }
      next = got.end->next_sequence;
    }
    CHECK(next == 10 + threads * records);
  }
}
#endif
