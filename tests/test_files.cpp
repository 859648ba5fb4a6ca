// How files are replaced.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "../personalize_runtime.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace files_tests {

namespace fs = std::filesystem;
namespace pz = personalize;

namespace {

pz::Result<void> write(const std::string& path, std::string_view text) {
  return pz::write_file(path, std::as_bytes(std::span(text)));
}

std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

mode_t mode_of(const std::string& path) {
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

}  // namespace

TEST_CASE("a file is replaced and nothing stays beside it") {
  const TemporaryFolder folder;
  const std::string path = folder.file("f");
  REQUIRE(write(path, "first"));
  REQUIRE(write(path, "second"));
  CHECK(bytes_of(path) == "second");
  // The name is as long as a file's may be.
  const std::string longest = folder.file(std::string(255, 'n'));
  REQUIRE(write(longest, "text"));
  CHECK(bytes_of(longest) == "text");
  {
    pz::detail::FileSink given_up{path};
    given_up.append(std::as_bytes(std::span("third", 5)));
    CHECK(files_in(folder.path) == 3);
  }
  CHECK(bytes_of(path) == "second");
  CHECK(files_in(folder.path) == 2);
}

TEST_CASE("a path without a folder is one in the working folder") {
  const TemporaryFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(folder.path);
  const auto written = write("f", "text");
  fs::current_path(before);
  REQUIRE(written);
  CHECK(bytes_of(folder.file("f")) == "text");
}

TEST_CASE("of two processes that write one file, the last wins whole") {
  const TemporaryFolder folder;
  const std::string path = folder.file("f");
  const std::array<std::string, 2> texts{std::string(300'000, 'a'), std::string(200'000, 'b')};
  for (int round = 0; round < 50; ++round) {
    std::array<pid_t, 2> children{};
    for (std::size_t c = 0; c < 2; ++c) {
      children[c] = ::fork();
      REQUIRE(children[c] >= 0);
      if (children[c] == 0) {
        pz::detail::FileSink file{path};
        for (std::size_t at = 0; at < texts[c].size(); at += 50'000) {
          file.append(std::as_bytes(std::span(texts[c]).subspan(at, 50'000)));
          ::usleep(static_cast<useconds_t>(round * 5));
        }
        ::_exit(file.commit() ? 0 : 1);
      }
    }
    for (const pid_t child : children) {
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      REQUIRE(status == 0);
    }
    const std::string got = bytes_of(path);
    REQUIRE((got == texts[0] || got == texts[1]));
    REQUIRE(files_in(folder.path) == 1);
  }
}

TEST_CASE("a file keeps its permissions, a new one has those that umask leaves") {
  const TemporaryFolder folder;
  const std::string path = folder.file("f");
  const mode_t mask = ::umask(027);
  REQUIRE(write(path, "new"));
  CHECK(mode_of(path) == 0640);
  for (const mode_t mode : {0600u, 0666u, 0755u, 0444u}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    REQUIRE(write(path, "again"));
    CHECK(mode_of(path) == mode);
  }
  ::umask(mask);
}

TEST_CASE("a link is written through, its target is replaced") {
  const TemporaryFolder folder;
  fs::create_directory(folder.path / "there");
  const std::string target = folder.file("there/target"), link = folder.file("link");
  fs::create_symlink("there/target", link);
  fs::create_symlink(fs::path(link), folder.path / "link to link");
  REQUIRE(write(link, "a new target"));
  CHECK(bytes_of(target) == "a new target");
  REQUIRE(write(folder.file("link to link"), "through two"));
  CHECK(bytes_of(target) == "through two");
  CHECK(fs::is_symlink(link));
  CHECK(fs::is_symlink(folder.path / "link to link"));
  CHECK(files_in(folder.path / "there") == 1);

  fs::create_symlink("b", folder.path / "a");
  fs::create_symlink("a", folder.path / "b");
  const auto circular = write(folder.file("a"), "nowhere");
  REQUIRE_FALSE(circular);
  CHECK(circular.error().code == pz::Errc::io);
}

TEST_CASE("what is put in the way of the file beside is neither followed nor overwritten") {
  const TemporaryFolder folder;
  const std::string precious = folder.write("precious", "precious");
  for (const char* name : {"f.part", "f.partial", "f.tmp"})
    fs::create_symlink("precious", folder.path / name);
  REQUIRE(write(folder.file("f"), "text"));
  CHECK(bytes_of(precious) == "precious");
}

TEST_CASE("a pipe is written to, and stays one") {
  const TemporaryFolder folder;
  const std::string path = folder.file("pipe");
  REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  const auto unread = write(path, "text");
  REQUIRE_FALSE(unread);
  CHECK(unread.error().code == pz::Errc::io);

  const int reader = ::open(path.c_str(), O_RDONLY | O_NONBLOCK);
  REQUIRE(reader >= 0);
  REQUIRE(::fcntl(reader, F_SETFL, 0) == 0);
  // More than a pipe holds.
  const std::string text(300'000, 't');
  pz::Result<void> written;
  std::thread writer([&] { written = write(path, text); });
  std::string got;
  std::array<char, 65536> piece;
  while (got.size() < text.size()) {
    const auto count = ::read(reader, piece.data(), piece.size());
    REQUIRE(count >= 0);
    got.append(piece.data(), static_cast<std::size_t>(count));
  }
  writer.join();
  ::close(reader);
  CHECK(written);
  CHECK(got == text);
  CHECK(fs::is_fifo(path));
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("devices are written to, also by a link, and a full one says so") {
  CHECK(write("/dev/null", "text"));
  CHECK(fs::is_character_file("/dev/null"));
  const TemporaryFolder folder;
  fs::create_symlink("/dev/full", folder.path / "full");
  const auto full = write(folder.file("full"), "text");
  REQUIRE_FALSE(full);
  CHECK(full.error().message.find("No space left") != std::string::npos);
  CHECK(fs::is_symlink(folder.path / "full"));
  CHECK(fs::is_character_file("/dev/full"));
}

TEST_CASE("an open file's number stands for that file, wherever its name is") {
  const TemporaryFolder folder;
  const std::string path = folder.write("output", "before ");
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_APPEND);
  REQUIRE(descriptor >= 0);
  const std::string number = "/dev/fd/" + std::to_string(descriptor);
  REQUIRE(write(number, "text"));
  REQUIRE(::write(descriptor, " after", 6) == 6);
  ::close(descriptor);
  CHECK(bytes_of(path) == "before text after");
}

TEST_CASE("a folder is no file, and a folder that is not there takes none") {
  const TemporaryFolder folder;
  fs::create_directory(folder.path / "d");
  for (const std::string& path : {folder.file("d"), folder.file("no/f")}) {
    const auto refused = write(path, "text");
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == pz::Errc::io);
  }
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("a file that finds no room leaves what was there") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", "before");
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const rlimit limit{1000, 1000};
    (void)::signal(SIGXFSZ, SIG_IGN);
    const bool limited = ::setrlimit(RLIMIT_FSIZE, &limit) == 0;
    const auto written = write(path, std::string(5000, 'x'));
    ::_exit(limited && !written && written.error().code == pz::Errc::io ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(bytes_of(path) == "before");
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("a file over the limit is not read") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", "12345");
  CHECK(pz::read_file(path, 5));
  const auto read = pz::read_file(path, 4);
  REQUIRE_FALSE(read);
  CHECK(read.error().code == pz::Errc::limit);
}

}  // namespace files_tests
