// What every subcommand shares: how a job ends, and how it shows that it is alive.
#pragma once

#include <chrono>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
}

namespace personalize::tools {

// The job failed. Exit status 1; the text is the line on standard error.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The command was called wrongly. Exit status 2.
struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A signal ended the job early, after what it leaves was written. Exit status 128 + signal; an
// empty text prints no line.
struct Interrupted : std::runtime_error {
  Interrupted(int number, const std::string& text) : std::runtime_error(text), signal(number) {}
  int signal;
};

// The number to six digits, with a decimal point in every locale.
std::string number_text(double value);

// "[1, 10000]"
std::string range_text(double low, double high);
// "1.5 is outside [0, 0.9]", or nothing where low <= value <= high.
std::string range_refusal(double value, double low, double high);
// Throws Usage "--dropout: 1.5 is outside [0, 0.9]" unless low <= value <= high.
void require_range(std::string_view option, double value, double low, double high);

// One line on standard error that does not end the job: "personalize train: warning: ...".
void note(std::string_view subcommand, std::string_view text);

// The arguments with `help` and `help SUBCOMMAND` as --help and SUBCOMMAND --help.
std::vector<std::string> arguments_of(int argc, const char* const* argv);

// A program of these subcommands: each entry adds one. Parses, runs, and returns the exit status,
// with one line on standard error where it is not 0: 1 also where standard output did not take what
// was printed. Signals end it with 128 + signal, nothing left half-written; so does a reader of
// standard output that went away.
int run(std::vector<std::string> arguments, std::initializer_list<void (*)(CLI::App&)> subcommands);

// For --help: a subcommand that another program runs.
void describe(CLI::App& app, const char* name, const char* description);

// Goes on as the program of this name that lies beside the running one. Returns exit status 1, with
// a line on standard error, only where it cannot be run.
int become(const char* program, std::vector<std::string> arguments);

// How far a job is, on standard error: on a terminal one line that rewrites itself, elsewhere plain
// lines, one in 30 seconds. What happens a few times in a job gets a line of its own there; after
// the first hundred of them these wait for their time as well, so that a log stays readable.
class Progress {
 public:
  explicit Progress(std::string title);
  void start(std::string_view text);
  void update(double fraction, std::string_view text);
  void milestone(double fraction, std::string_view text);
  void finish(std::string_view text);  // nothing is shown of an empty text

 private:
  void show(double fraction, std::string_view text);

  std::string title_;
  bool terminal_;
  int milestones_ = 0;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace personalize::tools
