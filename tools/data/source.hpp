// The bytes of a file that holds text: unpacked and decoded as its first bytes say, not its name.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace personalize::tools {

// zstd, gzip, a zip archive of one file, UTF-16 and byte-order marks are read, piece by piece in
// bounded memory; files of other kinds are a Failure that names the kind and the cure.
class TextSource {
 public:
  // Throws Failure, as next() does: cannot open or read, damaged, or another kind of file.
  explicit TextSource(const std::string& path);
  // The same for bytes in memory, which must outlive the source; `name` stands in messages.
  TextSource(const std::string& name, std::span<const char> bytes);
  ~TextSource();
  TextSource(const TextSource&) = delete;
  TextSource& operator=(const TextSource&) = delete;

  // Valid until the next call; empty at the end.
  std::span<const char> next();
  // What it was taken for, where it is not plain UTF-8: "gzip", "UTF-16".
  const std::vector<std::string>& forms() const { return forms_; }

  class Bytes;

 private:
  class Ahead;
  void unpack(const std::string& name, std::unique_ptr<Bytes> raw,
              std::optional<std::span<const char>> memory);
  std::unique_ptr<Bytes> bytes_;
  std::vector<std::string> forms_;
};

}  // namespace personalize::tools
