#include "convert/zip.hpp"

#include <zip.h>

#include <algorithm>
#include <array>

#include "command/command.hpp"

namespace personalize::tools {

// Reads one entry forwards; going back opens it again.
class ZipEntrySource : public ByteSource {
 public:
  ZipEntrySource(std::shared_ptr<ZipArchive> archive, const ZipArchive::Entry& entry)
      : archive_(std::move(archive)), entry_(entry) {}
  ~ZipEntrySource() override { close(); }
  ZipEntrySource(const ZipEntrySource&) = delete;
  ZipEntrySource& operator=(const ZipEntrySource&) = delete;

  std::uint64_t size() const override { return entry_.size; }

  void read(std::uint64_t offset, std::span<std::byte> out) override {
    if (offset > entry_.size || out.size() > entry_.size - offset)
      throw Failure(where() + " ends before what it declares");
    if (!file_ || offset < position_) {
      close();
      file_ = ::zip_fopen_index(archive_->archive_, entry_.index, 0);
      if (!file_) throw Failure(where() + " cannot be opened; is it encrypted?");
      position_ = 0;
    }
    std::array<std::byte, 1 << 14> skipped;
    while (position_ < offset)
      fill(std::span(skipped).first(
          static_cast<std::size_t>(std::min<std::uint64_t>(skipped.size(), offset - position_))));
    fill(out);
    // libzip compares the checksum when it meets the end.
    std::byte end;
    if (position_ == entry_.size && ::zip_fread(file_, &end, 1) != 0)
      throw Failure(where() + " is damaged; copy the file again");
  }

 private:
  std::string where() const { return archive_->name() + ": entry '" + entry_.name + "'"; }

  void fill(std::span<std::byte> out) {
    while (!out.empty()) {
      const auto got = ::zip_fread(file_, out.data(), out.size());
      if (got <= 0) throw Failure(where() + " is damaged; copy the file again");
      position_ += static_cast<std::uint64_t>(got);
      out = out.subspan(static_cast<std::size_t>(got));
    }
  }

  void close() {
    if (file_) ::zip_fclose(file_);
    file_ = nullptr;
  }

  std::shared_ptr<ZipArchive> archive_;
  ZipArchive::Entry entry_;
  ::zip_file_t* file_ = nullptr;
  std::uint64_t position_ = 0;
};

std::shared_ptr<ZipArchive> ZipArchive::open(const Input& input) {
  std::shared_ptr<ZipArchive> zip(new ZipArchive);
  zip->name_ = input.name;
  ::zip_error_t error;
  ::zip_error_init(&error);
  ::zip_source_t* source =
      input.memory
          ? ::zip_source_buffer_create(input.memory->data(), input.memory->size(), 0, &error)
          : ::zip_source_file_create(input.name.c_str(), 0, -1, &error);
  if (source) zip->archive_ = ::zip_open_from_source(source, ZIP_RDONLY | ZIP_CHECKCONS, &error);
  if (!zip->archive_) {
    const std::string reason = ::zip_error_strerror(&error);
    const bool twice = ::zip_error_code_zip(&error) == ZIP_ER_EXISTS;
    ::zip_error_fini(&error);
    if (source) ::zip_source_free(source);
    if (twice) throw Failure(input.name + ": two entries of the zip archive have the same name");
    throw Failure(input.name + ": not a whole zip archive (" + reason + "); copy it again");
  }
  ::zip_error_fini(&error);
  const auto count = ::zip_get_num_entries(zip->archive_, 0);
  if (count < 0 || static_cast<std::size_t>(count) > max_tensors)
    throw Failure(input.name + ": has more than " + std::to_string(max_tensors) + " entries");
  for (std::uint64_t i = 0; i < static_cast<std::uint64_t>(count); ++i) {
    ::zip_stat_t stat;
    if (::zip_stat_index(zip->archive_, i, 0, &stat) != 0 || !(stat.valid & ZIP_STAT_NAME) ||
        !(stat.valid & ZIP_STAT_SIZE) || !(stat.valid & ZIP_STAT_COMP_SIZE))
      throw Failure(input.name + ": an entry of the zip archive has no name or size");
    // Weights hardly compress; what does by more is made to fill the memory.
    constexpr std::uint64_t free_bytes = std::uint64_t{64} << 20, ratio = 64;
    if (stat.size > free_bytes && stat.size / ratio > stat.comp_size)
      throw Failure(input.name + ": entry '" + stat.name + "' decompresses to " +
                    std::to_string(stat.size) + " bytes from " + std::to_string(stat.comp_size) +
                    "; save it uncompressed");
    zip->entries_.push_back({stat.name, i, stat.size});
  }
  return zip;
}

ZipArchive::~ZipArchive() {
  if (archive_) ::zip_discard(archive_);
}

const ZipArchive::Entry* ZipArchive::find(std::string_view name) const {
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.name == name; });
  return found == entries_.end() ? nullptr : &*found;
}

std::unique_ptr<ByteSource> ZipArchive::source(const Entry& entry) {
  return std::make_unique<ZipEntrySource>(shared_from_this(), entry);
}

}  // namespace personalize::tools
