// Zip archives through libzip: the containers of .npz and of PyTorch's .pt.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "convert/tensors.hpp"

struct zip;

namespace personalize::tools {

class ZipArchive : public std::enable_shared_from_this<ZipArchive> {
 public:
  // Throws Failure: no zip archive, or one that contradicts itself.
  static std::shared_ptr<ZipArchive> open(const Input& input);
  ~ZipArchive();
  ZipArchive(const ZipArchive&) = delete;
  ZipArchive& operator=(const ZipArchive&) = delete;

  struct Entry {
    std::string name;
    std::uint64_t index, size;
  };
  const std::vector<Entry>& entries() const { return entries_; }
  const Entry* find(std::string_view name) const;
  // The entry's bytes, decompressed as they are read; the source keeps the archive open.
  std::unique_ptr<ByteSource> source(const Entry& entry);
  const std::string& name() const { return name_; }

 private:
  friend class ZipEntrySource;
  ZipArchive() = default;
  std::string name_;
  ::zip* archive_ = nullptr;
  std::vector<Entry> entries_;
};

}  // namespace personalize::tools
