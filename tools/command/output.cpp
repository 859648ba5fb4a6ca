#include "command/output.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <mutex>
#include <optional>
#include <set>
#include <system_error>
#include <thread>

#include "command/command.hpp"

namespace personalize::tools {
namespace output {

namespace fs = std::filesystem;

// Folders to remove where the program ends early. Never destroyed: the thread that waits for
// signals outlives main().
struct Staging {
  std::mutex mutex;
  std::set<std::string> folders;
};
Staging& staging() {
  static Staging& staging = *new Staging;
  return staging;
}

std::atomic<bool> noting{false};
std::atomic<int> noted{0};

// /dev/stdout, /dev/fd/3 and the like: opened again, a regular file behind them would be written to
// from its beginning.
std::optional<int> descriptor_of(const std::string& path) {
  if (path == "/dev/stdout") return STDOUT_FILENO;
  if (path == "/dev/stderr") return STDERR_FILENO;
  for (const std::string_view folder : {"/dev/fd/", "/proc/self/fd/"}) {
    if (!path.starts_with(folder)) continue;
    int descriptor = -1;
    const char* end = path.data() + path.size();
    const auto read = std::from_chars(path.data() + folder.size(), end, descriptor);
    if (read.ec == std::errc{} && read.ptr == end && descriptor >= 0) return descriptor;
  }
  return std::nullopt;
}

// Follows symlinks, also one that names no file yet.
std::string followed(const std::string& path) {
  fs::path at = path;
  std::error_code error;
  for (int links = 0; fs::is_symlink(at, error) && !descriptor_of(at.string()); ++links) {
    if (links == 40) throw Failure(path + ": too many symbolic links");
    const fs::path next = fs::read_symlink(at, error);
    if (error) throw Failure(path + ": cannot follow the symbolic link: " + error.message());
    at = next.is_absolute() ? next : at.parent_path() / next;
  }
  return at.string();
}

bool direct(const std::string& target) {
  std::error_code ignored;
  const fs::file_status status = fs::status(target, ignored);
  return descriptor_of(target) ||
         (fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status));
}

fs::path folder_of(const std::string& target) {
  const fs::path folder = fs::path(target).parent_path();
  return folder.empty() ? "." : folder;
}

void remove_folder(const std::string& folder) {
  std::error_code ignored;
  fs::remove_all(folder, ignored);
}

// A handler may do next to nothing, so a thread does the work. Not by sigwait: libraries start
// threads of their own, which do not block the signals, before main().
int signal_pipe[2] = {-1, -1};

extern "C" void pass_on(int signal) {
  const int before = errno;
  const auto byte = static_cast<unsigned char>(signal);
  [[maybe_unused]] const auto written = ::write(signal_pipe[1], &byte, 1);
  errno = before;
}

void wait_for_signals() {
  for (;;) {
    unsigned char signal = 0;
    const auto got = ::read(signal_pipe[0], &signal, 1);
    if (got < 0 && errno == EINTR) continue;
    if (got != 1) return;
    int none = 0;
    if (noting && noted.compare_exchange_strong(none, signal)) continue;
    // Held to the end, so that no output is staged or put in its place any more.
    staging().mutex.lock();
    for (const std::string& folder : staging().folders) remove_folder(folder);
    ::_exit(128 + signal);
  }
}

}  // namespace output

OutputFile::OutputFile(const std::string& path)
    : path_(path.empty() ? "standard output" : path),
      target_(path.empty() ? "/dev/stdout" : output::followed(path)) {
  if (output::direct(target_))
    open_device();
  else
    stage();
}

void OutputFile::open_device() {
  const auto descriptor = output::descriptor_of(target_);
  standard_output_ = descriptor == STDOUT_FILENO;
  std::FILE* file = nullptr;
  if (standard_output_) {
    std::fflush(stdout);
    std::cout.flush();
  }
  if (descriptor) {
    const int copy = ::dup(*descriptor);
    file = copy < 0 ? nullptr : ::fdopen(copy, "wb");
  } else {
    file = std::fopen(target_.c_str(), "wb");
  }
  if (!file) fail(path_ + ": cannot open: " + std::strerror(errno));
  device_ = {file, &std::fclose};
}

void OutputFile::stage() {
  if (output::fs::is_directory(target_)) fail(path_ + ": is a folder; name a file");
  const output::fs::path folder = output::folder_of(target_);
  name_ = output::fs::path(target_).filename().string();
  if (name_.empty()) fail(path_ + ": names no file");
  std::string made = (folder / ".personalize-XXXXXX").string();
  const std::lock_guard lock{output::staging().mutex};
  if (!::mkdtemp(made.data()))
    fail(path_ + ": cannot create a file in " + folder.string() + ": " + std::strerror(errno));
  staging_ = made;
  output::staging().folders.insert(staging_);
}

OutputFile::~OutputFile() {
  if (staging_.empty()) return;
  sink_.reset();
  const std::lock_guard lock{output::staging().mutex};
  output::remove_folder(staging_);
  output::staging().folders.erase(staging_);
}

// Messages of the file within the staging folder name the output itself.
void OutputFile::fail(std::string message) const {
  for (std::size_t at; !staging_.empty() && (at = message.find(staged())) != std::string::npos;)
    message.replace(at, staged().size(), path_);
  throw Failure(message);
}

void OutputFile::cannot_write() const {
  if (standard_output_ && errno == EPIPE) throw Interrupted(SIGPIPE, "");
  fail(path_ + ": cannot write: " + std::strerror(errno));
}

void OutputFile::append(std::span<const std::byte> bytes) {
  size_ += bytes.size();
  if (device_) {
    if (std::fwrite(bytes.data(), 1, bytes.size(), device_.get()) != bytes.size()) cannot_write();
    return;
  }
  if (!sink_) sink_ = std::make_unique<detail::FileSink>(staged());
  sink_->append(bytes);
}

void OutputFile::append_model(const ModelParts& parts, const WriteOptions& options) {
  const auto check = [&](const auto& done) {
    if (!done)
      fail(done.error().code == Errc::io ? done.error().message  // begins with the path
                                         : path_ + ": " + done.error().message);
  };
  if (device_) {
    const auto bytes = write_model(parts, options);
    check(bytes);
    return append(*bytes);
  }
  check(save_model(parts, staged(), options));
  size_ = output::fs::file_size(staged());
}

void OutputFile::commit() {
  if (device_) {
    const bool flushed = std::fflush(device_.get()) == 0;
    if (!flushed || std::fclose(device_.release()) != 0) cannot_write();
    return;
  }
  if (size_ == 0) append(std::string_view{});  // an empty file is a file
  if (sink_) {
    if (const auto written = sink_->commit(); !written) fail(written.error().message);
    sink_.reset();
  }
  // Who may read the file that is replaced stays so.
  std::error_code ignored;
  if (const auto before = output::fs::status(target_, ignored); output::fs::exists(before))
    output::fs::permissions(staged(), before.permissions(), ignored);
  const std::lock_guard lock{output::staging().mutex};
  if (std::rename(staged().c_str(), target_.c_str()) != 0) cannot_write();
  if (const detail::File folder{std::fopen(output::folder_of(target_).c_str(), "rb")})
    ::fsync(::fileno(folder.get()));  // the new name outlives a loss of power
}

bool is_device(const std::string& path) { return output::direct(output::followed(path)); }

bool is_standard_output(const std::string& path) {
  return output::descriptor_of(output::followed(path)) == STDOUT_FILENO;
}

void require_writable(const std::string& path) {
  if (!is_device(path)) OutputFile{path};
}

void write_text(const std::string& path, std::string_view text) {
  OutputFile file(path);
  file.append(text);
  file.commit();
}

void require_printed() {
  std::cout.flush();
  errno = 0;
  const bool flushed = std::fflush(stdout) == 0;
  if (flushed && std::cout && !std::ferror(stdout)) return;
  // An earlier write may have been the one that failed, so errno does not tell.
  struct pollfd standard_output {
    STDOUT_FILENO, 0, 0
  };
  if (::poll(&standard_output, 1, 0) == 1 && (standard_output.revents & POLLERR) != 0)
    throw Interrupted(SIGPIPE, "");
  throw Failure("standard output: cannot write" +
                (errno != 0 ? std::string(": ") + std::strerror(errno) : "; is the disk full?"));
}

void open_standard_streams() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    // The lowest that is free is taken: this one.
    if (::fcntl(descriptor, F_GETFD) == -1 && errno == EBADF)
      (void)::open("/dev/null", descriptor == STDIN_FILENO ? O_WRONLY : O_RDONLY);
  }
}

void watch_signals() {
  for (const int signal : {SIGPIPE, SIGXFSZ}) std::signal(signal, SIG_IGN);
  if (::pipe2(output::signal_pipe, O_CLOEXEC) != 0) return;  // they end the program as ever
  std::thread(output::wait_for_signals).detach();
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU}) {
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) != 0 || action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = output::pass_on;
    action.sa_flags = SA_RESTART;
    ::sigaction(signal, &action, nullptr);
  }
}

void note_signals() { output::noting = true; }
int noted_signal() { return output::noted; }

}  // namespace personalize::tools
