#include "command/command.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <string>
#include <vector>

#include "command/json.hpp"
#include "command/output.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace command {

// Inserted, left out, exchanged and swapped letters from one word to the other (optimal string
// alignment).
std::size_t edits(std::string_view from, std::string_view to) {
  std::vector<std::vector<std::size_t>> least(from.size() + 1,
                                              std::vector<std::size_t>(to.size() + 1));
  for (std::size_t i = 0; i <= from.size(); ++i)
    for (std::size_t j = 0; j <= to.size(); ++j) {
      std::size_t& here = least[i][j];
      if (i == 0 || j == 0) {
        here = i + j;
        continue;
      }
      here = std::min({least[i - 1][j] + 1, least[i][j - 1] + 1,
                       least[i - 1][j - 1] + (from[i - 1] == to[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1])
        here = std::min(here, least[i - 2][j - 2] + 1);
    }
  return least[from.size()][to.size()];
}

// "; did you mean 'train'?" of the known name that was meant, else which there are.
std::string suggestion(std::string_view word, const std::vector<std::string>& names) {
  std::string nearest, all;
  std::size_t least = std::max<std::size_t>(2, word.size() / 3) + 1;
  for (const std::string& name : names) {
    all += (all.empty() ? "" : ", ") + name;
    const bool begins = word.size() >= 2 && name.starts_with(word);
    if (const std::size_t distance = begins ? 0 : edits(word.substr(0, 64), name);
        distance < least && distance < name.size()) {
      least = distance;
      nearest = name;
    }
  }
  return nearest.empty() ? "; there are " + all : "; did you mean '" + nearest + "'?";
}

// Before CLI11 takes a mistyped option's value for another argument. `command` becomes the name
// that errors begin with. Throws Usage.
void require_known(const CLI::App& app, const std::vector<std::string>& arguments,
                   std::string& command) {
  const CLI::App* chosen = &app;
  std::vector<std::string> names;
  // Subcommands may have some of their own.
  for (std::size_t a = 0; a < arguments.size(); ++a) {
    const auto known = chosen->get_subcommands([](const CLI::App*) { return true; });
    if (known.empty() || arguments[a].starts_with('-')) break;
    const auto named = std::find_if(known.begin(), known.end(), [&](const CLI::App* one) {
      return one->get_name() == arguments[a];
    });
    if (named == known.end()) {
      for (const CLI::App* one : known) names.push_back(one->get_name());
      throw Usage("no subcommand '" + printable(arguments[a]) + "'" +
                  suggestion(arguments[a], names));
    }
    chosen = *named;
    command += " " + chosen->get_name();
  }
  for (const CLI::Option* option : chosen->get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  for (const std::string& argument : arguments) {
    if (argument == "--") return;
    const std::string name = argument.substr(0, argument.find('='));
    // The values of options begin with a single - at most.
    if (!name.starts_with("--") || std::find(names.begin(), names.end(), name) != names.end())
      continue;
    throw Usage("no option '" + printable(name) + "'" + suggestion(name, names));
  }
}

int fail(const std::string& command, int status, const std::string& text) {
  if (text.empty()) return status;
  const std::string line = text.substr(0, text.find('\n'));
  std::fprintf(stderr, "%s: %s%s\n", command.c_str(), line.c_str(),
               status == 2 ? (" (see " + command + " --help)").c_str() : "");
  return status;
}

}  // namespace command

void note(std::string_view subcommand, std::string_view text) {
  std::fprintf(stderr, "personalize %.*s: %.*s\n", static_cast<int>(subcommand.size()),
               subcommand.data(), static_cast<int>(text.size()), text.data());
}

std::vector<std::string> arguments_of(int argc, const char* const* argv) {
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  if (arguments.empty() || arguments[0] != "help") return arguments;
  arguments.erase(arguments.begin());
  // Of a subcommand with some of its own, two.
  arguments.resize(std::min<std::size_t>(arguments.size(), 2));
  arguments.push_back("--help");
  return arguments;
}

int run(std::vector<std::string> arguments,
        std::initializer_list<void (*)(CLI::App&)> subcommands) {
  CLI::App app{"Train, measure and inspect recommendation models for personalize_runtime.hpp",
               "personalize"};
  app.set_version_flag("--version", "personalize " + std::to_string(PERSONALIZE_VERSION_MAJOR) +
                                        "." + std::to_string(PERSONALIZE_VERSION_MINOR) + "." +
                                        std::to_string(PERSONALIZE_VERSION_PATCH));
  app.footer("personalize help SUBCOMMAND shows the options of one.");
  app.get_formatter()->column_width(36);
  app.require_subcommand(1);
  std::string command = "personalize";
  try {
    open_standard_streams();
    watch_signals();
    for (const auto add : subcommands) add(app);
    if (arguments.empty()) {
      std::fputs(app.help().c_str(), stderr);
      return 2;
    }
    command::require_known(app, arguments, command);
    try {
      std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
      app.parse(std::move(arguments));
    } catch (const CLI::Success& help) {  // --help, --version
      app.exit(help);
    }
    require_printed();
    return 0;
  } catch (const Interrupted& interrupted) {
    return command::fail(command, 128 + interrupted.signal, interrupted.what());
  } catch (const CLI::ParseError& error) {
    return command::fail(command, 2, error.what());
  } catch (const Usage& error) {
    return command::fail(command, 2, error.what());
  } catch (const std::bad_alloc&) {
    return command::fail(command, 1, "out of memory");
  } catch (const std::exception& error) {
    return command::fail(command, 1, error.what());
  }
}

std::string number_text(double value) {
  std::array<char, 32> text;
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, 6)
          .ptr;
  return {text.data(), end};
}

void describe(CLI::App& app, const char* name, const char* description) {
  app.add_subcommand(name, description);
}

int become(const char* program, std::vector<std::string> arguments) {
  std::error_code ignored;
  const std::string path =
      std::filesystem::read_symlink("/proc/self/exe", ignored).replace_filename(program);
  std::string name = "personalize";
  std::vector<char*> argv{name.data()};
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  ::execv(path.c_str(), argv.data());
  std::fprintf(stderr, "personalize: %s: cannot run: %s\n", path.c_str(), std::strerror(errno));
  return 1;
}

std::string range_text(double low, double high) {
  const auto bound = [](double value) {
    return value == std::floor(value) && std::abs(value) < 1e15
               ? std::to_string(static_cast<std::int64_t>(value))
               : number_text(value);
  };
  return "[" + bound(low) + ", " + bound(high) + "]";
}

std::string range_refusal(double value, double low, double high) {
  if (value >= low && value <= high) return "";  // a NaN is outside
  return number_text(value) + " is outside " + range_text(low, high);
}

void require_range(std::string_view option, double value, double low, double high) {
  if (const std::string refusal = range_refusal(value, low, high); !refusal.empty())
    throw Usage(std::string(option) + ": " + refusal);
}

namespace command {

constexpr auto pause_on_a_terminal = std::chrono::milliseconds(100);
constexpr auto pause_in_a_log = std::chrono::seconds(30);
constexpr int most_milestones = 100;

}  // namespace command

Progress::Progress(std::string title)
    : title_(std::move(title)),
      terminal_(::isatty(STDERR_FILENO) == 1),
      last_(std::chrono::steady_clock::now()) {}

void Progress::start(std::string_view text) {
  if (terminal_) std::fputs("\r\033[K", stderr);
  std::fprintf(stderr, "%s: %.*s\n", title_.c_str(), static_cast<int>(text.size()), text.data());
}

void Progress::update(double fraction, std::string_view text) {
  const std::chrono::nanoseconds pause =
      terminal_ ? std::chrono::nanoseconds(command::pause_on_a_terminal)
                : std::chrono::nanoseconds(command::pause_in_a_log);
  if (std::chrono::steady_clock::now() - last_ >= pause) show(fraction, text);
}

void Progress::milestone(double fraction, std::string_view text) {
  if (terminal_ || ++milestones_ > command::most_milestones)
    update(fraction, text);
  else
    show(fraction, text);
}

void Progress::show(double fraction, std::string_view text) {
  last_ = std::chrono::steady_clock::now();
  const double share = std::clamp(fraction, 0.0, 1.0);
  const int percent = static_cast<int>(share * 100);
  if (terminal_) {
    constexpr int width = 20;
    const int full = static_cast<int>(share * width);
    std::fprintf(stderr, "\r\033[K%s [%s%s] %3d %%  %.*s", title_.c_str(),
                 std::string(static_cast<std::size_t>(full), '#').c_str(),
                 std::string(static_cast<std::size_t>(width - full), '.').c_str(), percent,
                 static_cast<int>(text.size()), text.data());
  } else {
    std::fprintf(stderr, "%s: %3d %%  %.*s\n", title_.c_str(), percent,
                 static_cast<int>(text.size()), text.data());
  }
  std::fflush(stderr);
}

void Progress::finish(std::string_view text) {
  if (terminal_) std::fputs("\r\033[K", stderr);
  if (!text.empty())
    std::fprintf(stderr, "%s: %.*s\n", title_.c_str(), static_cast<int>(text.size()), text.data());
  std::fflush(stderr);
}

}  // namespace personalize::tools
