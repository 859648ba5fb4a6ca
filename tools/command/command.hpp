// What every subcommand shares: how a job ends, and how it shows that it is alive.
#pragma once

#include <chrono>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

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

// A signal ended the job early, after what it leaves was written. Exit status 128 + signal.
struct Interrupted : std::runtime_error {
  Interrupted(int number, const std::string& text) : std::runtime_error(text), signal(number) {}
  int signal;
};

// The number to six digits, with a decimal point in every locale.
std::string number_text(double value);

// Throws Usage "option --dropout: 1.5 is outside [0, 0.9]" unless low <= value <= high.
void require_range(std::string_view option, double value, double low, double high);

// A program of these subcommands: each entry adds one. Parses, runs, and returns the exit status,
// with one line on standard error where it is not 0: 1 also where standard output did not take what
// was printed. Signals end it with 128 + signal, nothing left half-written.
int run(int argc, char** argv, std::initializer_list<void (*)(CLI::App&)> subcommands);

// For --help: a subcommand that another program runs.
void describe(CLI::App& app, const char* name, const char* description);

// Goes on as the program of this name that lies beside the running one. Returns exit status 1, with
// a line on standard error, only where it cannot be run.
int become(const char* program, char** argv);

// One line on standard error that rewrites itself. On anything but a terminal nothing is shown, or,
// with log, a plain line at most every 30 seconds.
class Progress {
 public:
  explicit Progress(std::string title, bool log = false);
  void update(double fraction, std::string_view text);
  void finish(std::string_view text);

 private:
  std::string title_;
  bool terminal_, log_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace personalize::tools
