#include "command/command.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>

#include "command/output.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace command {

int fail(const CLI::App& app, int status, const std::string& text) {
  const auto chosen = app.get_subcommands();
  const std::string command =
      chosen.empty() ? "personalize" : "personalize " + chosen[0]->get_name();
  const std::string line = text.substr(0, text.find('\n'));
  std::fprintf(stderr, "%s: %s%s\n", command.c_str(), line.c_str(),
               status == 2 ? (" (see " + command + " --help)").c_str() : "");
  return status;
}

}  // namespace command

int run(int argc, char** argv, std::initializer_list<void (*)(CLI::App&)> subcommands) {
  CLI::App app{"Train, measure and inspect recommendation models for personalize_runtime.hpp",
               "personalize"};
  app.set_version_flag("--version", "personalize " + std::to_string(PERSONALIZE_VERSION_MAJOR) +
                                        "." + std::to_string(PERSONALIZE_VERSION_MINOR) + "." +
                                        std::to_string(PERSONALIZE_VERSION_PATCH));
  app.require_subcommand(1);
  try {
    watch_signals();
    for (const auto add : subcommands) add(app);
    try {
      app.parse(argc, argv);
    } catch (const CLI::Success& help) {  // --help, --version
      app.exit(help);
    }
    require_printed();
    return 0;
  } catch (const Interrupted& interrupted) {
    return command::fail(app, 128 + interrupted.signal, interrupted.what());
  } catch (const CLI::ParseError& error) {
    return command::fail(app, 2, error.what());
  } catch (const Usage& error) {
    return command::fail(app, 2, error.what());
  } catch (const std::bad_alloc&) {
    return command::fail(app, 1, "out of memory");
  } catch (const std::exception& error) {
    return command::fail(app, 1, error.what());
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

int become(const char* program, char** argv) {
  std::error_code ignored;
  const std::string path =
      std::filesystem::read_symlink("/proc/self/exe", ignored).replace_filename(program);
  ::execv(path.c_str(), argv);
  std::fprintf(stderr, "personalize: %s: cannot run: %s\n", path.c_str(), std::strerror(errno));
  return 1;
}

void require_range(std::string_view option, double value, double low, double high) {
  if (!(value >= low && value <= high))
    throw Usage("option " + std::string(option) + ": " + number_text(value) + " is outside [" +
                number_text(low) + ", " + number_text(high) + "]");
}

Progress::Progress(std::string title, bool log)
    : title_(std::move(title)),
      terminal_(::isatty(STDERR_FILENO) == 1),
      log_(log),
      last_(std::chrono::steady_clock::now() - std::chrono::hours(1)) {}

void Progress::update(double fraction, std::string_view text) {
  const auto now = std::chrono::steady_clock::now();
  const auto pause = terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(30'000);
  if ((!terminal_ && !log_) || now - last_ < pause) return;
  last_ = now;
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
    std::fprintf(stderr, "%s %3d %%  %.*s\n", title_.c_str(), percent,
                 static_cast<int>(text.size()), text.data());
  }
  std::fflush(stderr);
}

void Progress::finish(std::string_view text) {
  if (terminal_) std::fputs("\r\033[K", stderr);
  if ((terminal_ || log_) && !text.empty())
    std::fprintf(stderr, "%s: %.*s\n", title_.c_str(), static_cast<int>(text.size()), text.data());
  std::fflush(stderr);
}

}  // namespace personalize::tools
