#include "command/command.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <sstream>

namespace personalize::tools {
namespace {

std::string number(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

}  // namespace

void require_range(std::string_view option, double value, double low, double high) {
  if (!(value >= low && value <= high))
    throw Usage("option " + std::string(option) + ": " + number(value) + " is outside [" +
                number(low) + ", " + number(high) + "]");
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
