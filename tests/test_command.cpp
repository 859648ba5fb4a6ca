// What the subcommands share: outputs, JSON, threads, numbers in every locale.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <locale>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "command/output.hpp"
#include "command/parallel.hpp"
#include "data/fields.hpp"
#include "evaluate/off_policy.hpp"
#include "refusal.hpp"
#include "simulate/simulation.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;
namespace fs = std::filesystem;
using namespace personalize::tools;

namespace {

std::set<std::string> names_in(const TemporaryFolder& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder.path))
    names.insert(entry.path().filename().string());
  return names;
}

}  // namespace

TEST_CASE("an output appears whole or not at all, and leaves nothing beside it") {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.csv", "old");
  {
    OutputFile given_up(path);
    given_up.append("new");
    CHECK(bytes_of(path) == "old");
  }
  CHECK(bytes_of(path) == "old");
  CHECK(names_in(folder) == std::set<std::string>{"a.csv"});
  OutputFile file(path);
  file.append("ne");
  file.append("w");
  CHECK(bytes_of(path) == "old");
  file.commit();
  CHECK(bytes_of(path) == "new");
  CHECK(file.size() == 3);
  write_text(folder.file("empty"), "");
  CHECK(bytes_of(folder.file("empty")).empty());
  require_writable(folder.file("b"));
  CHECK(refusal([&] { require_writable(folder.path.string()); }) ==
        folder.path.string() + ": is a folder; name a file");
  CHECK(refusal([&] {
          require_writable(folder.file("none/b"));
        }).starts_with(folder.file("none/b") + ": cannot create a file in "));
  OutputFile model(folder.file("m.pzm"));
  model.append_model(small_model::parts(), {});
  model.commit();
  CHECK(model.size() == bytes_of(folder.file("m.pzm")).size());
  CHECK(pz::Model::load(folder.file("m.pzm")));
}

TEST_CASE("an output outlives the file being moved away while it is written") {
  // Two outputs of one name do not meet: the last to be committed counts, whole.
  const TemporaryFolder folder;
  OutputFile first(folder.file("a")), second(folder.file("a"));
  first.append("first");
  second.append("second");
  second.commit();
  first.commit();
  CHECK(bytes_of(folder.file("a")) == "first");
}

TEST_CASE("a symbolic link is written through, also one that names no file yet") {
  const TemporaryFolder folder;
  const std::string target = folder.write("target", "old");
  fs::create_directory(folder.path / "links");
  fs::create_symlink("../target", folder.path / "links" / "link");
  fs::create_symlink("link", folder.path / "links" / "second");
  fs::create_symlink("new", folder.path / "links" / "dangling");
  write_text(folder.file("links/second"), "new");
  CHECK(bytes_of(target) == "new");
  CHECK(fs::is_symlink(folder.path / "links" / "second"));
  CHECK(fs::is_symlink(folder.path / "links" / "link"));
  write_text(folder.file("links/dangling"), "text");
  CHECK(bytes_of(folder.file("links/new")) == "text");
  fs::create_symlink("circle", folder.path / "circle");
  CHECK(refusal([&] { write_text(folder.file("circle"), ""); }) ==
        folder.file("circle") + ": too many symbolic links");
}

TEST_CASE("a file that is replaced keeps its permissions") {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.csv", "old");
  REQUIRE(::chmod(path.c_str(), 0640) == 0);
  write_text(path, "new");
  CHECK(fs::status(path).permissions() == fs::perms(0640));
}

TEST_CASE("a reader that went away ends the program as a signal would, a fifo's is told") {
  const auto ignored = std::signal(SIGPIPE, SIG_IGN);
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  ::close(ends[0]);
  const int standard_output = ::dup(STDOUT_FILENO);
  std::fflush(stdout);
  REQUIRE(::dup2(ends[1], STDOUT_FILENO) == STDOUT_FILENO);
  int written = 0, printed = 0;
  try {
    write_text("", std::string(100'000, 'x'));
  } catch (const Interrupted& interrupted) {
    written = interrupted.signal;
  }
  std::printf("%s", std::string(100'000, 'x').c_str());
  try {
    require_printed();
  } catch (const Interrupted& interrupted) {
    printed = interrupted.signal;
  }
  ::dup2(standard_output, STDOUT_FILENO);
  ::close(standard_output);
  std::clearerr(stdout);
  CHECK(written == SIGPIPE);
  CHECK(printed == SIGPIPE);
  const std::string pipe = "/dev/fd/" + std::to_string(ends[1]);
  CHECK(refusal([&] { write_text(pipe, "x"); }) == pipe + ": cannot write: Broken pipe");
  ::close(ends[1]);
  std::signal(SIGPIPE, ignored);
}

TEST_CASE("what is no regular file is written to directly, and stays what it is") {
  const TemporaryFolder folder;
  const std::string fifo = folder.file("fifo");
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  std::string read;
  std::thread reader([&] { read = bytes_of(fifo); });
  {
    OutputFile file(fifo);
    CHECK(file.direct());
    CHECK_FALSE(file.standard_output());
    file.append_model(small_model::parts(), {});
    file.commit();
  }
  reader.join();
  CHECK(fs::is_fifo(fifo));
  const auto expected = pz::write_model(small_model::parts(), {});
  REQUIRE(expected);
  CHECK(read == std::string(reinterpret_cast<const char*>(expected->data()), expected->size()));
  CHECK(names_in(folder) == std::set<std::string>{"fifo"});
  CHECK(refusal([] { write_text("/dev/full", "text"); }) ==
        "/dev/full: cannot write: No space left on device");
  CHECK(fs::is_character_file("/dev/full"));
  write_text("/dev/null", "text");
  CHECK(fs::is_character_file("/dev/null"));
  CHECK(is_standard_output("/dev/stdout"));
  CHECK(is_standard_output("/proc/self/fd/1"));
  CHECK_FALSE(is_standard_output("/dev/stderr"));
  fs::create_symlink("/dev/stdout", folder.path / "out");
  CHECK(is_standard_output(folder.file("out")));
  CHECK_FALSE(is_device("/dev/shm/a-file"));
  // An open file goes on where it was.
  const int file = ::open(folder.file("log").c_str(), O_CREAT | O_WRONLY, 0600);
  REQUIRE(file >= 0);
  REQUIRE(::write(file, "one ", 4) == 4);
  write_text("/dev/fd/" + std::to_string(file), "two");
  ::close(file);
  CHECK(bytes_of(folder.file("log")) == "one two");
}

TEST_CASE("a full disk is told with the output's own name") {
  const TemporaryFolder folder;
  // Files of this process end at 100 bytes for a while.
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 100, before.rlim_max };
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string told =
      refusal([&] { write_text(folder.file("a.csv"), std::string(10'000, 'x')); });
  const std::string model = refusal([&] {
    OutputFile file(folder.file("m.pzm"));
    file.append_model(small_model::parts(), {});
    file.commit();
  });
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(told.starts_with(folder.file("a.csv") + ": cannot write: "));
  CHECK(model.starts_with(folder.file("m.pzm") + ": cannot write: "));
  CHECK(names_in(folder).empty());
}

TEST_CASE("a log shows the start, each of the first hundred milestones and the end, no more") {
  const TemporaryFolder folder;
  const int standard_error = ::dup(STDERR_FILENO);
  const int log = ::open(folder.file("log").c_str(), O_CREAT | O_WRONLY, 0600);
  REQUIRE(::dup2(log, STDERR_FILENO) == STDERR_FILENO);
  {
    Progress progress("train");
    progress.start("begins");
    for (int epoch = 0; epoch < 150; ++epoch) {
      for (int step = 0; step < 10; ++step) progress.update(0.5, "a step");
      progress.milestone(0.25, "epoch " + std::to_string(epoch));
    }
    progress.finish("done");
    Progress("quiet").finish("");
  }
  ::dup2(standard_error, STDERR_FILENO);
  ::close(standard_error);
  ::close(log);
  std::string expected = "train: begins\n";
  for (int epoch = 0; epoch < 100; ++epoch)
    expected += "train:  25 %  epoch " + std::to_string(epoch) + "\n";
  CHECK(bytes_of(folder.file("log")) == expected + "train: done\n");
}

TEST_CASE("an option's number and word are checked and shown in one way") {
  CLI::App app;
  double share = 0.5;
  std::uint32_t count = 7;
  std::optional<std::uint32_t> days;
  pz::ElementType type = pz::ElementType::i8;
  add_number(app, "--share", share, "Of it", 0, 0.9);
  add_number(app, "--count,-n", count, "Items", 1, 10'000'000);
  add_number(app, "--days", days, "Days", 1, 30, "as many as there are");
  add_element_type(app, type);
  const auto says = [&](const std::string& arguments) -> std::string {
    try {
      app.parse(arguments);
    } catch (const CLI::ParseError& error) {
      return error.what();
    }
    return "";
  };
  CHECK(says("--share 1.5") == "--share: 1.5 is outside [0, 0.9]");
  CHECK(says("--share nan") == "--share: nan is outside [0, 0.9]");
  CHECK(says("--share x") == "--share: 'x' is not a number in [0, 0.9]");
  CHECK(says("-n 0") == "--count: 0 is outside [1, 10000000]");
  CHECK(says("-n 1.5") == "--count: '1.5' is not a whole number in [1, 10000000]");
  CHECK(says("--count=-1") == "--count: '-1' is not a whole number in [1, 10000000]");
  CHECK(says("--days 31") == "--days: 31 is outside [1, 30]");
  CHECK(says("--element-type i8") == "--element-type: 'i8' is not one of int8, int4, f32");
  CHECK(says("--share 0.9 -n 10000000 --days 30 --element-type int4") == "");
  CHECK(share == 0.9);
  CHECK(count == 10'000'000);
  CHECK(days == 30);
  CHECK(type == pz::ElementType::i4);
  CHECK(name(type) == "int4");
  // CLI11 2.1 writes a default as "=7", 2.4 as " [7]".
  const std::string help = app.help();
  const bool bracketed = help.find("=") == std::string::npos;
  const auto shows = [&](const std::string& option, const std::string& value) {
    const std::string shown = bracketed ? " [" + value + "]" : "=" + value;
    return help.find(option + shown) != std::string::npos;
  };
  CAPTURE(help);
  CHECK(shows("--share FLOAT", "0.5"));
  CHECK(shows("--count UINT", "7"));
  CHECK(shows("--days UINT", "as many as there are"));
  CHECK(shows("--element-type TEXT", "int8"));
  CHECK(help.find("Of it, [0, 0.9]") != std::string::npos);
  CHECK(help.find("int8, int4, f32") != std::string::npos);
}

TEST_CASE("help and help of a subcommand are --help") {
  const auto of = [](std::vector<const char*> words) {
    words.insert(words.begin(), "personalize");
    return arguments_of(static_cast<int>(words.size()), words.data());
  };
  using Words = std::vector<std::string>;
  CHECK(of({}) == Words{});
  CHECK(of({"help"}) == Words{"--help"});
  CHECK(of({"help", "train"}) == Words{"train", "--help"});
  CHECK(of({"help", "state", "repair"}) == Words{"state", "repair", "--help"});
  CHECK(of({"help", "state", "repair", "x"}) == Words{"state", "repair", "--help"});
  CHECK(of({"train", "help"}) == Words{"train", "help"});
  CHECK(arguments_of(0, nullptr) == Words{});
}

TEST_CASE("JSON of a file is bounded in depth and has each key once") {
  CHECK(parse_json(R"({"a": [1, {"a": 2}], "b": {"a": 3}})", "x")["a"][1]["a"] == 2);
  CHECK(parse_json(R"([{"a": 1}, {"a": 2}])", "x")[1]["a"] == 2);
  CHECK(refusal([] { parse_json("{", "it"); }) == "it is not JSON");
  CHECK(refusal([] { parse_json("", "it"); }) == "it is not JSON");
  CHECK(refusal([] { parse_json(R"({"a": 1, "b": {}, "a": 2})", "it"); }) ==
        "it has the key \"a\" twice");
  CHECK(refusal([] { parse_json(R"([{"b": {"c": 1, "c": 1}}])", "it"); }) ==
        "it has the key \"c\" twice");
  const auto nested = [](std::size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  CHECK(parse_json(nested(32), "it").is_array());
  CHECK(refusal([&] { parse_json(nested(33), "it"); }) == "it nests deeper than 32 levels");
  CHECK(refusal([&] { parse_json(nested(1'000'000), "it"); }) == "it nests deeper than 32 levels");
}

TEST_CASE("what is not UTF-8, and control characters, are printed escaped") {
  CHECK(printable("Käse €  \U0001F600") == "Käse €  \U0001F600");
  CHECK(printable("GE\xff\xfe"
                  "E") == "GE\\xff\\xfeE");
  CHECK(printable(std::string("a\0\x1b[2J\n", 7)) == "a\\x00\\x1b[2J\\x0a");
  CHECK(printable("\xc2\x85|\xe2\x82|\xc0\x80|\xed\xa0\x80") ==
        "\\xc2\\x85|\\xe2\\x82|\\xc0\\x80|\\xed\\xa0\\x80");
  CHECK(printable("\xe2\x82") == "\\xe2\\x82");
}

TEST_CASE("each job runs once, and the first exception of any kind comes through") {
  for (const std::size_t threads : {1u, 3u, 16u}) {
    CAPTURE(threads);
    std::vector<std::atomic<int>> runs(100);
    std::atomic<int> made = 0;
    for_each_parallel(runs.size(), threads, [&] {
      ++made;
      return [&](std::size_t i) { ++runs[i]; };
    });
    for (const auto& count : runs) CHECK(count == 1);
    CHECK(made <= static_cast<int>(threads));
    std::atomic<std::size_t> done = 0;
    CHECK_THROWS_AS(for_each_parallel(1'000'000, threads,
                                      [&] {
                                        return [&](std::size_t i) {
                                          if (i == 10) throw std::bad_alloc();
                                          ++done;
                                        };
                                      }),
                    std::bad_alloc);
    CHECK(done < 1'000'000);
  }
  for_each_parallel(0, 4, [] { return [](std::size_t) { FAIL("no job"); }; });
}

TEST_CASE("numbers are written and read alike where the locale has a decimal comma") {
  const TemporaryFolder folder;
  const std::string make =
      "localedef -i de_DE -f UTF-8 '" + folder.file("de_DE.UTF-8") + "' >/dev/null 2>&1";
  if (std::system(make.c_str()) != 0 || !fs::exists(folder.path / "de_DE.UTF-8")) {
    MESSAGE("SKIPPED: localedef cannot make de_DE.UTF-8");
    return;
  }
  const std::string log = folder.write(
      "log.csv", std::string(pz::log_csv_header) + "1,u,a,x,1,0,0.5,1,0,-inf,0.25,0.3,0\n");
  const auto figures = [&] {
    std::uint64_t incomplete = 0;
    BadRows bad;
    const auto decisions = read_interaction_log(log, 0, incomplete, bad);
    return std::pair{decisions.at(0).at(0).ratio, decisions.at(0).at(0).value};
  };
  const auto plot = [] {
    return to_svg(compare({"greedy"}, {.users = 10, .items = 100, .days = 1, .slates = 20}, 0.3, 1,
                          1, nullptr));
  };
  const auto before = figures();
  const std::string plotted = plot();
  ::setenv("LOCPATH", folder.path.c_str(), 1);
  const char* const set = std::setlocale(LC_ALL, "de_DE.UTF-8");
  ::unsetenv("LOCPATH");
  REQUIRE(set);
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale classic = std::locale::global(std::locale(std::locale::classic(), new Comma));
  const std::string number = number_text(0.25);
  const auto after = figures();
  const std::string plotted_again = plot();
  const auto parsed = read_number("1.5");
  std::locale::global(classic);
  std::setlocale(LC_ALL, "C");
  CHECK(number == "0.25");
  CHECK(parsed == 1.5);
  CHECK(after == before);
  CHECK(after == std::pair{2.0, 0.25});
  CHECK(plotted_again == plotted);
}
