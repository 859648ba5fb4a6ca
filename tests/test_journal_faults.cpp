// What a journal does where the disk is full or fails, and how often it syncs. A program of its
// own: it stands between the library and the system's write, fsync, fdatasync and ftruncate.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
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
using pz::detail::Journal, pz::detail::JournalSettings;
using Texts = std::vector<std::string>;
using namespace std::chrono_literals;

namespace {

// One of the system's functions: how often it was called, and how it fails.
struct Call {
  std::atomic<int> count{0};
  std::atomic<int> error{0};   // what errno is to say; 0: it works
  std::atomic<int> after{0};   // works for so many calls before
  std::atomic<int> one_in{0};  // fails at random, one of so many; 0: always
  std::atomic<int> sleep_ms{0};

  bool fails() {
    ++count;
    if (sleep_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(sleep_ms));
    const int wanted = error;
    if (wanted == 0) return false;
    if (after > 0 && after-- > 0) return false;
    if (one_in > 0) {
      thread_local std::uint64_t state = 88172645463325252u;
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      if (state % static_cast<std::uint64_t>(one_in.load()) != 0) return false;
    }
    errno = wanted;
    return true;
  }
};
Call writes, syncs, cuts;
std::atomic<std::size_t> longest_write{std::size_t{1} << 30};  // bytes that one call takes

// Of files, not of what doctest prints.
bool is_file(int descriptor) {
  struct stat status {};
  return ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && descriptor > 2;
}

struct Healthy {  // a test begins and ends with a disk that works
  Healthy() { reset(); }
  ~Healthy() { reset(); }
  static void reset() {
    for (Call* call : {&writes, &syncs, &cuts})
      call->count = call->error = call->after = call->one_in = call->sleep_ms = 0;
    longest_write = std::size_t{1} << 30;
  }
};

std::string error_of(const pz::Result<void>& result) {
  return result ? std::string("none") : result.error().message;
}

}  // namespace

extern "C" {
ssize_t write(int descriptor, const void* bytes, std::size_t size) {
  if (is_file(descriptor)) {
    if (writes.fails()) return -1;
    size = std::min<std::size_t>(size, longest_write);
  }
  return ::syscall(SYS_write, descriptor, bytes, size);
}
int fsync(int descriptor) {
  return syncs.fails() ? -1 : static_cast<int>(::syscall(SYS_fsync, descriptor));
}
int fdatasync(int descriptor) {
  return syncs.fails() ? -1 : static_cast<int>(::syscall(SYS_fdatasync, descriptor));
}
int ftruncate(int descriptor, off_t size) noexcept {
  return cuts.fails() ? -1 : static_cast<int>(::syscall(SYS_ftruncate, descriptor, size));
}
}

TEST_CASE("with each call a commit returns when its record is synced, and not again") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const auto journal = begin(folder.file("journal"));
  CHECK(syncs.count == 1);  // the header
  const auto first = append(*journal, "a"), last = append(*journal, "b");
  REQUIRE(journal->commit(last));
  CHECK(syncs.count == 2);
  CHECK(writes.count == 2);
  REQUIRE(journal->commit(first));
  REQUIRE(journal->sync());
  CHECK(syncs.count == 2);
  CHECK(writes.count == 2);
}

TEST_CASE("without syncs a commit returns when its record is written, until someone asks") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal"), later = folder.file("later");
  const auto journal = begin(path, {.durability = Durability::none});
  for (int i = 0; i < 10; ++i) REQUIRE(journal->commit(append(*journal, "a")));
  CHECK(read(path).texts.size() == 10);
  CHECK(syncs.count == 1);
  CHECK(journal->status().written == 20);
  CHECK(journal->status().durable == 10);
  REQUIRE(journal->sync());
  CHECK(syncs.count == 2);
  CHECK(journal->status().durable == 20);
  // A file that is left is synced once.
  REQUIRE(journal->commit(append(*journal, "a")));
  journal->switch_to(next_file(later, 4, journal->next_sequence()));
  CHECK(syncs.count == 3);
  REQUIRE(journal->commit(append(*journal, "b")));
  CHECK(syncs.count >= 4);
  const int count = syncs.count;
  REQUIRE(journal->commit(append(*journal, "b")));
  CHECK(syncs.count == count);
  // What is durable elsewhere is durable.
  journal->switch_to(next_file(folder.file("last"), 5, journal->next_sequence()));
  CHECK(journal->status().durable < journal->next_sequence());
  journal->forget_before(5);
  CHECK(journal->status().durable == journal->next_sequence());
}

TEST_CASE("a folder that cannot be synced says so, but where its file system syncs none") {
  const Healthy healthy;
  const TemporaryFolder above;
  const auto folder = pz::detail::Folder::open(above.file("state"));
  REQUIRE(folder);
  syncs.error = EIO;
  CHECK(error_of(folder->sync()) ==
        above.file("state") + ": cannot sync the folder: Input/output error");
  syncs.error = EINVAL;
  CHECK(folder->sync());
}

TEST_CASE("in intervals what was written is synced by itself, and what is idle costs nothing") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const auto journal = begin(folder.file("journal"), {.durability = Durability::interval});
  for (int round = 0; round < 3; ++round) {
    const int before = syncs.count;
    REQUIRE(journal->commit(append(*journal, "a")));
    const std::uint64_t next = journal->next_sequence();
    for (int i = 0; i < 2000 && journal->status().durable < next; ++i) {
      std::this_thread::sleep_for(1ms);
      // Without threads it is a later commit that syncs.
      if (!pz::detail::has_threads) REQUIRE(journal->commit(next - 1));
    }
    CHECK(journal->status().durable == next);
    CHECK(syncs.count == before + 1);
    std::this_thread::sleep_for(30ms);
    CHECK(syncs.count == before + 1);
  }
}

TEST_CASE("a disk that is full loses nothing, and once it has room all is durable") {
  const Healthy healthy;
  const TemporaryFolder folder;
  for (const std::size_t fits : {0u, 1u, 30u, 1'000u}) {
    Healthy::reset();
    const std::string path = folder.file("journal");
    const auto journal = begin(path);
    REQUIRE(journal->commit(append(*journal, "durable")));
    const auto size = fs::file_size(path);
    longest_write = fits;  // a write is short before the next one fails
    writes.error = ENOSPC;
    writes.after = fits > 0 ? 1 : 0;
    const auto waits = append(*journal, std::string(2'000, 'w'));
    const auto failed = journal->commit(waits);
    REQUIRE_FALSE(failed);
    CHECK(failed.error().code == Errc::io);
    CHECK(failed.error().message ==
          path + ": cannot write: No space left on device; what was not written waits in memory");
    CHECK(fs::file_size(path) == size);
    CHECK(read(path).texts == Texts{"durable"});
    const auto status = journal->status();
    REQUIRE(status.error);
    CHECK(status.error->message == failed.error().message);
    CHECK_FALSE(status.broken);
    CHECK(status.durable == 11);
    CHECK(status.written == 11);
    CHECK(status.next == 12);
    CHECK(status.pending_bytes > 2'000);
    // What is durable is so still.
    CHECK(journal->commit(waits - 1));
    const auto more = append(*journal, "more");
    CHECK_FALSE(journal->commit(more));
    CHECK_FALSE(journal->sync());

    Healthy::reset();
    CHECK(journal->commit(more));
    CHECK_FALSE(journal->status().error);
    CHECK(journal->status().pending_bytes == 0);
    CHECK(journal->status().durable == 13);
    CHECK(read(path).texts == Texts{"durable", std::string(2'000, 'w'), "more"});
    fs::remove(path);
  }
}

TEST_CASE("of what a full disk takes in part, whole pieces stay") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  Texts texts;
  for (int i = 0; i < 50; ++i) {
    texts.push_back(std::string(10'000, static_cast<char>('a' + i % 26)));
    append(*journal, texts.back());
  }
  writes.error = ENOSPC;
  writes.after = 3;
  CHECK(journal->commit(10));
  CHECK_FALSE(journal->commit(59));
  const auto part = read(path);
  REQUIRE(part.end);
  CHECK(part.texts.size() == 18);  // three pieces of 64 KiB
  CHECK(part.end->torn == 0);
  CHECK(journal->status().written == 28);
  // Synced with the first commit that asks for one of them.
  CHECK(journal->commit(27));
  CHECK(journal->status().durable == 28);
  CHECK_FALSE(journal->commit(28));
  Healthy::reset();
  CHECK(journal->commit(59));
  CHECK(read(path).texts == texts);
}

TEST_CASE("writes that are interrupted or short go on") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  longest_write = 7;
  writes.error = EINTR;
  writes.one_in = 3;
  syncs.error = EINTR;
  syncs.one_in = 2;
  const std::string text(1'000, 'x');
  for (int i = 0; i < 20; ++i) REQUIRE(journal->commit(append(*journal, text)));
  CHECK(read(path).texts == Texts(20, text));
}

TEST_CASE("a file that cannot be begun is not left behind") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  for (Call* call : {&writes, &syncs}) {
    call->error = ENOSPC;
    const auto journal = Journal::create(path, journals::header, {});
    REQUIRE_FALSE(journal);
    CHECK(journal.error().message == path + ": cannot write: No space left on device");
    CHECK_FALSE(fs::exists(path));
    Healthy::reset();
  }
  CHECK(Journal::create(path, journals::header, {}));
}

TEST_CASE("where a sync fails the journal is broken until a new file makes the old one needless") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const Healthy healthy;
    const TemporaryFolder folder;
    const std::string path = folder.file("journal"), next = folder.file("next");
    const auto journal = begin(path, {.durability = durability, .interval = 1h});
    REQUIRE(journal->commit(append(*journal, "a")));
    REQUIRE(journal->sync());
    const auto lost = append(*journal, "lost");
    syncs.error = EIO;
    const std::string message =
        path + ": cannot sync: Input/output error; record 11 and those behind it are not durable";
    CHECK(error_of(journal->sync()) == message);
    syncs.error = 0;
    // A sync that succeeds now says nothing of what the failed one left out.
    CHECK(error_of(journal->sync()) == message);
    CHECK(error_of(journal->commit(lost)) == message);
    CHECK(journal->commit(lost - 1));
    auto status = journal->status();
    CHECK(status.broken);
    CHECK(status.durable == 11);
    CHECK(status.error->message == message);
    const auto dropped = append(*journal, "dropped");
    CHECK(journal->status().pending_bytes == 0);
    CHECK(error_of(journal->commit(dropped)) == message);

    journal->switch_to(next_file(next, 4, journal->next_sequence()));
    const auto kept = append(*journal, "kept");
    // Until the state before it is durable, it is of no use.
    CHECK(error_of(journal->commit(kept)) == message);
    CHECK(read(next).texts == Texts{"kept"});
    CHECK(journal->status().broken);
    journal->forget_before(4);
    CHECK(journal->commit(kept));
    REQUIRE(journal->commit(append(*journal, "more")));
    REQUIRE(journal->sync());
    status = journal->status();
    CHECK_FALSE(status.broken);
    CHECK_FALSE(status.error);
    CHECK(status.durable == status.next);
    CHECK(read(path).end);
    const auto got = read(next, {.first_record = kept});
    REQUIRE(got.end);
    CHECK(got.texts == Texts{"kept", "more"});
  }
}

TEST_CASE("where the new file breaks as well, forgetting the old one does not mend") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const auto journal = begin(folder.file("1"));
  syncs.error = EIO;
  CHECK_FALSE(journal->commit(append(*journal, "a")));
  Healthy::reset();
  journal->switch_to(next_file(folder.file("2"), 4, journal->next_sequence()));
  syncs.error = EIO;
  CHECK_FALSE(journal->commit(append(*journal, "b")));
  Healthy::reset();
  journal->forget_before(4);
  CHECK(journal->status().broken);
  const auto refused = journal->commit(append(*journal, "c"));
  CHECK(error_of(refused).starts_with(folder.file("2") + ": cannot sync: "));
  journal->switch_to(next_file(folder.file("3"), 5, journal->next_sequence()));
  journal->forget_before(5);
  CHECK_FALSE(journal->status().broken);
  CHECK(journal->commit(append(*journal, "d")));
  CHECK(read(folder.file("3"), {.first_record = 13}).texts == Texts{"d"});
}

TEST_CASE("where a part of a record cannot be cut off the journal is broken") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  REQUIRE(journal->commit(append(*journal, "a")));
  longest_write = 20;
  writes.error = ENOSPC;
  writes.after = 1;
  cuts.error = EIO;
  const auto torn = append(*journal, "torn");
  CHECK(error_of(journal->commit(torn)) ==
        path +
            ": cannot cut off what was written in part: Input/output error; record 11 and those "
            "behind it are not durable");
  Healthy::reset();
  CHECK_FALSE(journal->commit(torn));
  CHECK(journal->commit(torn - 1));
  CHECK(journal->status().broken);
  CHECK(journal->status().pending_bytes == 0);
  const auto got = read(path);
  REQUIRE(got.end);
  CHECK(got.texts == Texts{"a"});
  CHECK(got.end->torn == 20);
  journal->switch_to(next_file(folder.file("next"), 4, journal->next_sequence()));
  journal->forget_before(4);
  CHECK(journal->commit(append(*journal, "b")));
  CHECK(read(folder.file("next")).texts == Texts{"b"});
}

TEST_CASE("records that wait for a full disk take bounded memory, then the journal is broken") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  for (const bool commits : {false, true}) {
    Healthy::reset();
    constexpr std::uint64_t most = 100'000;
    const auto journal = begin(path, {.most_pending = most});
    REQUIRE(journal->commit(append(*journal, "a")));
    writes.error = ENOSPC;
    CHECK_FALSE(journal->commit(append(*journal, "b")));
    for (int i = 0; i < 1'000; ++i) {
      const auto number = append(*journal, std::string(500, 'x'));
      if (commits) CHECK_FALSE(journal->commit(number));
      CHECK(journal->status().pending_bytes <= most);
    }
    CHECK(journal->status().broken);
    CHECK(journal->status().pending_bytes == 0);
    Healthy::reset();
    CHECK(error_of(journal->commit(append(*journal, "x"))) ==
          path +
              ": cannot write: No space left on device; record 11 and those behind it are not "
              "durable");
    CHECK(read(path).texts == Texts{"a"});

    const std::string next = folder.file("next");
    journal->switch_to(next_file(next, 4, journal->next_sequence()));
    const auto kept = append(*journal, "kept");
    CHECK_FALSE(journal->commit(kept));
    // A disk that works takes any number of them.
    const std::string larger(2 * most, 'x');
    const auto last = append(*journal, larger);
    CHECK(journal->status().pending_bytes > most);
    CHECK_FALSE(journal->commit(last));
    journal->forget_before(4);
    CHECK(journal->commit(last));
    CHECK(read(next, {.first_record = kept}).texts == Texts{"kept", larger});
    fs::remove(path);
    fs::remove(next);
  }
}

TEST_CASE("a record that was written before its file was lost is synced all the same") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path, {.most_pending = 3'000});
  const auto first = append(*journal, std::string(60'000, 'a'));
  const auto second = append(*journal, std::string(60'000, 'b'));
  writes.error = ENOSPC;
  writes.after = 1;
  const int before = syncs.count;
  CHECK_FALSE(journal->commit(second));
  CHECK(journal->status().broken);
  CHECK(journal->commit(first));
  CHECK(syncs.count == before + 1);
  CHECK(journal->status().durable == first + 1);
}

TEST_CASE("while a full disk holds up one file the next one waits its turn") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string one = folder.file("1"), two = folder.file("2");
  const auto journal = begin(one);
  append(*journal, "a");
  journal->switch_to(next_file(two, 4, journal->next_sequence()));
  writes.error = ENOSPC;
  CHECK_FALSE(journal->commit(append(*journal, "b")));
  CHECK(read(one).texts.empty());
  CHECK(read(two).texts.empty());
  SUBCASE("and both are written") {
    Healthy::reset();
    CHECK(journal->sync());
    CHECK(read(one).texts == Texts{"a"});
  }
  SUBCASE("but where the first is needless") {
    journal->forget_before(4);
    CHECK_FALSE(journal->sync());
    Healthy::reset();
    CHECK(journal->sync());
    CHECK(read(one).texts.empty());
  }
  CHECK(read(two, {.first_record = 11}).texts == Texts{"b"});
}

#ifndef PERSONALIZE_NO_THREADS
TEST_CASE("threads that commit at the same time share a sync") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  syncs.sleep_ms = 2;
  constexpr int threads = 8, records = 25;
  std::vector<std::thread> writers;
  for (int t = 0; t < threads; ++t)
    writers.emplace_back([&] {
      for (int r = 0; r < records; ++r)
        if (!journal->commit(append(*journal, "text"))) std::abort();
    });
  for (std::thread& writer : writers) writer.join();
  CHECK(journal->status().durable == 10 + threads * records);
  CHECK(syncs.count < threads * records / 2);
  CHECK(read(path).texts.size() == threads * records);
}

TEST_CASE("of threads that wait for a write each is told that it failed") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const std::string path = folder.file("journal");
  const auto journal = begin(path);
  for (int round = 0; round < 20; ++round) {
    writes.error = ENOSPC;
    writes.sleep_ms = 1;
    std::vector<std::thread> writers;
    std::atomic<int> failed{0};
    for (int t = 0; t < 6; ++t)
      writers.emplace_back([&] { failed += !journal->commit(append(*journal, "text")); });
    for (std::thread& writer : writers) writer.join();
    CHECK(failed == 6);
    Healthy::reset();
    CHECK(journal->sync());
    CHECK(read(path).texts.size() == static_cast<std::size_t>(6 * (round + 1)));
  }
}

TEST_CASE("a sync under way does not hold up those who only write") {
  const Healthy healthy;
  const TemporaryFolder folder;
  const auto journal = begin(folder.file("journal"), {.durability = Durability::none});
  append(*journal, "a");
  syncs.sleep_ms = 500;
  const int before = syncs.count;
  std::thread syncing([&] { (void)!journal->sync(); });
  while (syncs.count == before) std::this_thread::yield();
  const auto begun = std::chrono::steady_clock::now();
  CHECK(journal->commit(append(*journal, "b")));
  CHECK(journal->status().durable == 10);  // the sync is still under way
  CHECK(std::chrono::steady_clock::now() - begun < 400ms);
  syncing.join();
}

TEST_CASE("a disk that fails now and then loses nothing that was acknowledged") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const Healthy healthy;
    const TemporaryFolder folder;
    const std::string path = folder.file("journal");
    const auto journal = begin(path, {.durability = durability, .interval = 1ms});
    longest_write = 50;
    writes.error = ENOSPC;
    writes.one_in = 8;
    std::vector<std::thread> writers;
    for (int t = 0; t < 4; ++t)
      writers.emplace_back([&] {
        for (int r = 0; r < 300; ++r) {
          const auto number = append(*journal, "some text");
          if (journal->commit(number) && journal->status().written <= number) std::abort();
        }
      });
    for (std::thread& writer : writers) writer.join();
    Healthy::reset();
    CHECK(journal->sync());
    CHECK_FALSE(journal->status().error);
    CHECK(read(path).texts == Texts(1200, "some text"));
  }
}

TEST_CASE("whatever fails, new files mend the journal, and what was acknowledged can be read") {
  for (const Durability durability :
       {Durability::each_call, Durability::interval, Durability::none}) {
    const Healthy healthy;
    const TemporaryFolder folder;
    const auto path = [&](std::uint64_t number) { return folder.file(std::to_string(number)); };
    auto header = journals::header;
    header.number = 0;
    const auto journal =
        begin(path(0), {.durability = durability, .interval = 1ms, .most_pending = 2'000}, header);
    std::shared_mutex appending;
    std::atomic<std::uint64_t> acknowledged{0};
    std::atomic<int> left{4};
    std::vector<std::thread> writers;
    for (int t = 0; t < 4; ++t)
      writers.emplace_back([&] {
        for (int r = 0; r < 400; ++r) {
          std::uint64_t number = 0;
          {
            const std::shared_lock lock{appending};
            number = append(*journal, std::string(100, 'x'));
          }
          if (journal->commit(number)) ++acknowledged;
        }
        --left;
      });
    // What a recommender does: a new file, its state's save, which makes earlier files needless.
    std::uint64_t files = 0, saved = 10;
    while (left > 0) {
      longest_write = 60;
      for (Call* call : {&writes, &syncs, &cuts}) call->error = EIO, call->one_in = 10;
      std::this_thread::sleep_for(3ms);
      Healthy::reset();
      auto file = next_file(path(files + 1), files + 1, journal->next_sequence());
      {
        const std::unique_lock lock{appending};
        journal->switch_to(std::move(file));
        saved = journal->next_sequence();
      }
      journal->forget_before(++files);
    }
    for (std::thread& writer : writers) writer.join();
    CHECK(acknowledged > 0);
    CHECK(journal->sync());
    CHECK_FALSE(journal->status().broken);
    const auto got = read(path(files), {.number = files, .first_record = saved});
    REQUIRE(got.end);
    CHECK(got.end->next_sequence == journal->next_sequence());
    for (std::uint64_t file = 0; file < files; ++file) CHECK(read(path(file)).end);
  }
}
#endif
