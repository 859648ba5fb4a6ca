// Where a command's results go: a file that appears whole or not at all, a device, or standard
// output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "personalize_runtime.hpp"

namespace personalize::tools {

// One output. A regular file, or a path where there is none, is written beside it and put in its
// place by commit(); of a symlink, the file that it names. What is no regular file (a device, a
// fifo, /dev/stdout) is written to directly. Without commit(), and where a signal ends the program,
// nothing is left beside it. Belongs to one thread. Every function throws Failure.
class OutputFile {
 public:
  // An empty path is standard output.
  explicit OutputFile(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void append(std::span<const std::byte> bytes);
  void append(std::string_view text) { append(std::as_bytes(std::span(text))); }
  // A whole model in place of append(); streamed where the output is a file.
  void append_model(const ModelParts& parts, const WriteOptions& options);
  std::uint64_t size() const { return size_; }  // bytes that were appended
  void commit();

  // Whether the path names no regular file, so that what was written cannot be read again.
  bool direct() const { return staging_.empty(); }
  bool standard_output() const { return standard_output_; }

 private:
  [[noreturn]] void fail(std::string message) const;
  [[noreturn]] void cannot_write() const;
  void open_device();
  void stage();
  std::string staged() const { return staging_ + "/" + name_; }

  std::string path_;           // as it was given
  std::string target_, name_;  // what is replaced: the whole path, and its last part
  std::string staging_;        // the folder beside it; empty: written to directly
  bool standard_output_ = false;
  std::unique_ptr<detail::FileSink> sink_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> device_{nullptr, nullptr};
  std::uint64_t size_ = 0;
};

// Whether an output at this path would be written to directly; whether it is standard output.
bool is_device(const std::string& path);
bool is_standard_output(const std::string& path);

// Throws Failure unless an output can be made at this path; takes nothing and leaves nothing.
void require_writable(const std::string& path);

// A file of this text. Throws Failure.
void write_text(const std::string& path, std::string_view text);

// Throws Failure where standard output did not take all that was printed, and Interrupted without a
// text where its reader went away.
void require_printed();

// Standard streams that are closed become such that refuse what is written, so that no file that is
// opened later stands in their place.
void open_standard_streams();

// From now on signals that would end the program (unless ignored) remove what outputs have staged
// and end it with exit status 128 + signal. A reader that went away, and a file that may not grow
// any more, are errors of what is written instead.
void watch_signals();

// From now on the first of these signals is only noted.
void note_signals();
int noted_signal();  // 0: none came

}  // namespace personalize::tools
