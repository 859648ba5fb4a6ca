// A checkpoint is a file of little-endian fields, read and written in one order:
//   magic "PZCHECK" 0, u32 version
//   a field each: u16 length of its name, the name, then
//     an integer: i64; a number: f64; a text: u64 length, bytes
//     a list of tensors: u64 their number, each u8 element type (0: f32), u8 dimensions, i64 sizes,
//     the elements in row-major order
//   u64 XXH64 of all before, piece by piece: the hash of a piece is the seed of the next one's.
// It holds numbers only: nothing in it is run.
#include "train/checkpoint.hpp"

#include <ATen/ATen.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>

#include "command/command.hpp"
#include "command/output.hpp"

namespace personalize::tools {
namespace checkpoint {

static_assert(std::endian::native == std::endian::little);
constexpr std::array<char, 8> magic{'P', 'Z', 'C', 'H', 'E', 'C', 'K', '\0'};
constexpr std::uint32_t version = 2;
constexpr std::uint8_t f32 = 0;

// One list of what a checkpoint holds, for writing and for reading.
template <class Archive, class Fields>
void each_field(Archive& archive, Fields& c) {
  archive.field("recipe", c.recipe);
  archive.field("epoch", c.epoch);
  archive.field("chunk", c.chunk);
  archive.field("step", c.step);
  archive.field("epoch_events", c.epoch_events);
  archive.field("best_epoch", c.best_epoch);
  archive.field("stale_epochs", c.stale_epochs);
  archive.field("epoch_loss", c.epoch_loss);
  archive.field("last_loss", c.last_loss);
  archive.field("best_ndcg10", c.best_ndcg10);
  archive.field("best_recall10", c.best_recall10);
  archive.field("elapsed_seconds", c.elapsed_seconds);
  archive.field("fraction", c.fraction);
  archive.field("parameters", c.parameters);
  archive.field("first_moments", c.first_moments);
  archive.field("second_moments", c.second_moments);
  archive.field("best_parameters", c.best_parameters);
  archive.field("state", c.state);
}

class Writer {
 public:
  explicit Writer(OutputFile& file) : file_(file) {
    bytes(std::as_bytes(std::span(magic)));
    value(version);
  }
  template <class T>
  void field(std::string_view name, const T& content) {
    value(static_cast<std::uint16_t>(name.size()));
    bytes(std::as_bytes(std::span(name)));
    write(content);
  }
  void finish() { file_.append(std::as_bytes(std::span(&hash_, 1))); }

 private:
  void bytes(std::span<const std::byte> piece) {
    hash_ = xxh64(piece, hash_);
    file_.append(piece);
  }
  template <class T>
  void value(const T& number) {
    bytes(std::as_bytes(std::span(&number, 1)));
  }
  void write(std::int64_t number) { value(number); }
  void write(double number) { value(number); }
  void write(const std::string& text) {
    value(std::uint64_t{text.size()});
    bytes(std::as_bytes(std::span(text)));
  }
  void write(const std::vector<at::Tensor>& tensors) {
    value(std::uint64_t{tensors.size()});
    for (const at::Tensor& tensor : tensors) {
      const at::Tensor whole = tensor.detach().to(at::kFloat).contiguous();
      value(f32);
      value(static_cast<std::uint8_t>(whole.dim()));
      for (const std::int64_t size : whole.sizes()) value(size);
      bytes(std::as_bytes(
          std::span(whole.data_ptr<float>(), static_cast<std::size_t>(whole.numel()))));
    }
  }

  OutputFile& file_;
  std::uint64_t hash_ = 0;
};

struct Damaged {};

class Reader {
 public:
  explicit Reader(const std::string& path) : file_(std::fopen(path.c_str(), "rb")) {
    std::error_code error;
    left_ = std::filesystem::file_size(path, error);
    std::array<char, 8> begin{};
    if (!file_ || error) throw Failure(path + ": cannot open");
    if (left_ < begin.size()) throw Damaged{};
    bytes(std::as_writable_bytes(std::span(begin)));
    if (begin != magic) throw Damaged{};
    known = value<std::uint32_t>() == version;
  }
  template <class T>
  void field(std::string_view name, T& content) {
    std::string found(value<std::uint16_t>(), '\0');
    bytes(std::as_writable_bytes(std::span(found)));
    if (found != name) throw Damaged{};
    read(content);
  }
  void finish() {
    const std::uint64_t wanted = hash_;
    if (value<std::uint64_t>() != wanted || left_ != 0) throw Damaged{};
  }

  bool known = false;  // whether the version is this program's

 private:
  void bytes(std::span<std::byte> piece) {
    if (piece.size() > left_ ||
        std::fread(piece.data(), 1, piece.size(), file_.get()) != piece.size())
      throw Damaged{};
    left_ -= piece.size();
    hash_ = xxh64(piece, hash_);
  }
  template <class T>
  T value() {
    T number;
    bytes(std::as_writable_bytes(std::span(&number, 1)));
    return number;
  }
  // Before memory is taken: no more than the file holds.
  std::size_t size_of(std::uint64_t count, std::uint64_t bytes_each) const {
    if (count > left_ / bytes_each) throw Damaged{};
    return static_cast<std::size_t>(count);
  }
  void read(std::int64_t& number) { number = value<std::int64_t>(); }
  void read(double& number) { number = value<double>(); }
  void read(std::string& text) {
    text.resize(size_of(value<std::uint64_t>(), 1));
    bytes(std::as_writable_bytes(std::span(text)));
  }
  void read(std::vector<at::Tensor>& tensors) {
    tensors.resize(size_of(value<std::uint64_t>(), 2));
    for (at::Tensor& tensor : tensors) {
      if (value<std::uint8_t>() != f32) throw Damaged{};
      std::vector<std::int64_t> sizes(value<std::uint8_t>());
      std::uint64_t count = 1;
      for (std::int64_t& size : sizes) {
        size = value<std::int64_t>();
        if (size <= 0) throw Damaged{};
        count = size_of(static_cast<std::uint64_t>(size), sizeof(float)) * count;
        count = size_of(count, sizeof(float));
      }
      tensor = at::empty(sizes, at::kFloat);
      bytes(std::as_writable_bytes(
          std::span(tensor.data_ptr<float>(), static_cast<std::size_t>(count))));
    }
  }

  detail::File file_;
  std::uint64_t left_ = 0;  // bytes
  std::uint64_t hash_ = 0;
};

}  // namespace checkpoint

void save_checkpoint(const Checkpoint& state, const std::string& path) {
  OutputFile file(path);
  checkpoint::Writer writer(file);
  checkpoint::each_field(writer, state);
  writer.finish();
  file.commit();
}

Checkpoint load_checkpoint(const std::string& path) {
  if (!std::filesystem::exists(path))
    throw Failure(path +
                  ": no such checkpoint, nothing to resume (a run that ends by itself removes its "
                  "checkpoint); start without --resume");
  Checkpoint state;
  try {
    checkpoint::Reader reader(path);
    if (!reader.known)
      throw Failure(path +
                    ": a checkpoint of another version, or a damaged one; remove it and start "
                    "without --resume");
    checkpoint::each_field(reader, state);
    reader.finish();
  } catch (const checkpoint::Damaged&) {
    throw Failure(path +
                  ": not a checkpoint, or a damaged one; remove it and start without --resume");
  }
  return state;
}

}  // namespace personalize::tools
