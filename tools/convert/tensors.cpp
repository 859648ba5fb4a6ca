#include "convert/tensors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

class FileSource : public ByteSource {
 public:
  explicit FileSource(const std::string& path)
      : path_(path), file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) throw Failure(path + ": cannot open");
    if (std::filesystem::is_directory(path)) throw Failure(path + ": is " + folder_kind(path));
    if (::fseeko(file_.get(), 0, SEEK_END) != 0 || ::ftello(file_.get()) < 0 ||
        ::ftello(file_.get()) == std::numeric_limits<::off_t>::max())
      throw Failure(path + ": cannot read; is it a file?");
    size_ = static_cast<std::uint64_t>(::ftello(file_.get()));
    position_ = size_;
  }
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, std::span<std::byte> out) override {
    if (offset > size_ || out.size() > size_ - offset)
      throw Failure(path_ + ": ends before what it declares; copy it again");
    if (offset != position_) ::fseeko(file_.get(), static_cast<::off_t>(offset), SEEK_SET);
    if (std::fread(out.data(), 1, out.size(), file_.get()) != out.size())
      throw Failure(path_ + ": cannot read");
    position_ = offset + out.size();
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  std::uint64_t size_ = 0, position_ = 0;
};

class MemorySource : public ByteSource {
 public:
  MemorySource(std::string name, std::span<const std::byte> bytes)
      : name_(std::move(name)), bytes_(bytes) {}
  std::uint64_t size() const override { return bytes_.size(); }
  void read(std::uint64_t offset, std::span<std::byte> out) override {
    if (offset > bytes_.size() || out.size() > bytes_.size() - offset)
      throw Failure(name_ + ": ends before what it declares; copy it again");
    if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
  }

 private:
  std::string name_;
  std::span<const std::byte> bytes_;
};

class BufferSource : public ByteSource {
 public:
  explicit BufferSource(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {}
  std::uint64_t size() const override { return bytes_.size(); }
  void read(std::uint64_t offset, std::span<std::byte> out) override {
    MemorySource("", bytes_).read(offset, out);
  }

 private:
  std::vector<std::byte> bytes_;
};

// IEEE 754 binary16.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half >> 15) << 31;
  const int exponent = half >> 10 & 31;
  const std::uint32_t fraction = half & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return sign ? -magnitude : magnitude;
}

template <class T, class Function>
void convert_each(std::span<const std::byte> bytes, std::span<float> out, Function function) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    out[i] = function(value);
  }
}

template <class T>
void convert_numbers(std::span<const std::byte> bytes, std::span<float> out) {
  convert_each<T>(bytes, out, [](T value) { return static_cast<float>(value); });
}

}  // namespace

std::string_view name(DType dtype) {
  constexpr std::array<std::string_view, 14> names{"f64", "f32", "f16", "bf16", "i64",
                                                   "i32", "i16", "i8",  "u64",  "u32",
                                                   "u16", "u8",  "",    "text"};
  return names[static_cast<std::size_t>(dtype)];
}

std::size_t element_bytes(DType dtype) {
  constexpr std::array<std::size_t, 14> sizes{8, 4, 2, 2, 8, 4, 2, 1, 8, 4, 2, 1, 0, 0};
  return sizes[static_cast<std::size_t>(dtype)];
}

bool is_real(DType dtype) {
  return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::f16 ||
         dtype == DType::bf16 || dtype == DType::foreign;
}

std::unique_ptr<ByteSource> Input::open() const {
  if (memory) return std::make_unique<MemorySource>(name, *memory);
  return std::make_unique<FileSource>(name);
}

std::uint64_t Tensor::elements() const {
  std::uint64_t count = 1;
  for (const std::uint64_t size : shape) count *= size;
  return count;
}

std::string Tensor::describe() const {
  std::string text =
      name + " " + (type_name.empty() ? std::string(tools::name(dtype)) : type_name) + " [";
  for (std::size_t d = 0; d < shape.size(); ++d)
    text += (d == 0 ? "" : ", ") + std::to_string(shape[d]);
  return text + "]";
}

std::string GraphNode::describe() const {
  return operation + " '" + (name.empty() && !outputs.empty() ? outputs[0] : name) + "'";
}

const Tensor* TensorFile::find(std::string_view tensor) const {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const Tensor& t) { return t.name == tensor; });
  return found == tensors.end() ? nullptr : &*found;
}

const Tensor& TensorFile::at(std::string_view tensor) const {
  if (const Tensor* found = find(tensor)) return *found;
  throw Failure(name + ": has no tensor '" + std::string(tensor) + "'");
}

void TensorFile::add(Tensor tensor) {
  const std::string where = name + ": tensor '" + tensor.name.substr(0, 100) + "'";
  if (tensors.size() == max_tensors)
    throw Failure(name + ": has more than " + std::to_string(max_tensors) + " tensors");
  if (find(tensor.name)) throw Failure(where + " stands twice");
  if (tensor.shape.size() > 8) throw Failure(where + " has more than 8 dimensions");
  std::uint64_t count = 1;
  for (const std::uint64_t size : tensor.shape) {
    const auto product = detail::checked_product(count, size);
    if (!product) throw Failure(where + ": its shape overflows");
    count = *product;
  }
  if (element_bytes(tensor.dtype) == 0) {
    tensors.push_back(std::move(tensor));
    return;
  }
  const auto too_short = [&] {
    return Failure(where + ": its shape and strides need more bytes than the file holds for it");
  };
  std::uint64_t row_major = 1;
  bool contiguous = true;
  for (std::size_t d = tensor.strides.size(); d-- > 0;) {
    contiguous = contiguous && (tensor.shape[d] == 1 || tensor.strides[d] == row_major);
    row_major *= tensor.shape[d];
  }
  if (contiguous || count == 0) tensor.strides.clear();
  const std::uint64_t available = sources.at(tensor.source)->size();
  std::uint64_t reach = tensor.strides.empty() ? count : 1;  // elements of the storage
  for (std::size_t d = 0; d < tensor.strides.size(); ++d) {
    const auto last = detail::checked_product(tensor.strides[d], tensor.shape[d] - 1);
    if (!last || *last > available || reach > available) throw too_short();
    reach += *last;
  }
  const auto bytes = detail::checked_product(reach, element_bytes(tensor.dtype));
  if (!bytes || tensor.offset > available || *bytes > available - tensor.offset) throw too_short();
  if (count > reach && count > max_expanded)
    throw Failure(where + " repeats " + std::to_string(reach) + " stored numbers " +
                  std::to_string(count) + " times; save what it stands for, with .contiguous()");
  tensors.push_back(std::move(tensor));
}

void TensorFile::add(Tensor tensor, std::vector<std::byte> bytes) {
  tensor.source = sources.size();
  tensor.offset = 0;
  sources.push_back(std::make_unique<BufferSource>(std::move(bytes)));
  add(std::move(tensor));
}

TensorReader::TensorReader(TensorFile& file, const Tensor& tensor) : file_(file), tensor_(tensor) {
  if (tensor.dtype == DType::text)
    throw Failure(file.name + ": tensor '" + tensor.name + "' does not hold numbers");
  if (tensor.dtype == DType::foreign)
    throw Failure(file.name + ": tensor '" + tensor.name + "' is " + tensor.type_name +
                  ", which is not read; save it as F32 or BF16");
  if (tensor.strides.empty() || tensor.elements() == 0) return;
  std::uint64_t last = 0;
  for (std::size_t d = 0; d < tensor.shape.size(); ++d)
    last += tensor.strides[d] * (tensor.shape[d] - 1);
  buffer_.resize(static_cast<std::size_t>(last + 1) * element_bytes(tensor.dtype));
  file.sources[tensor.source]->read(tensor.offset, buffer_);
  std::vector<float> stored(static_cast<std::size_t>(last + 1));
  convert(buffer_, stored);
  gathered_.resize(static_cast<std::size_t>(tensor.elements()));
  std::vector<std::uint64_t> index(tensor.shape.size());
  for (float& value : gathered_) {
    std::uint64_t at = 0;
    for (std::size_t d = 0; d < index.size(); ++d) at += index[d] * tensor.strides[d];
    value = stored[static_cast<std::size_t>(at)];
    for (std::size_t d = index.size(); d-- > 0;) {
      if (++index[d] < tensor.shape[d]) break;
      index[d] = 0;
    }
  }
}

void TensorReader::read(std::span<float> out) {
  if (!gathered_.empty()) {
    std::copy_n(gathered_.begin() + static_cast<std::ptrdiff_t>(at_), out.size(), out.begin());
    at_ += out.size();
    return;
  }
  const std::size_t size = element_bytes(tensor_.dtype);
  constexpr std::size_t chunk = 1 << 16;
  for (std::size_t begin = 0; begin < out.size(); begin += chunk) {
    const auto part = out.subspan(begin, std::min(chunk, out.size() - begin));
    buffer_.resize(part.size() * size);
    file_.sources[tensor_.source]->read(tensor_.offset + at_ * size, buffer_);
    convert(buffer_, part);
    at_ += part.size();
  }
}

void TensorReader::convert(std::span<const std::byte> bytes, std::span<float> out) const {
  switch (tensor_.dtype) {
    case DType::f64:
      convert_numbers<double>(bytes, out);
      break;
    case DType::f32:
      if (!out.empty()) std::memcpy(out.data(), bytes.data(), bytes.size());
      break;
    case DType::f16:
      convert_each<std::uint16_t>(bytes, out, half_to_float);
      break;
    case DType::bf16:
      convert_each<std::uint16_t>(bytes, out, [](std::uint16_t value) {
        return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
      });
      break;
    case DType::i64:
      convert_numbers<std::int64_t>(bytes, out);
      break;
    case DType::i32:
      convert_numbers<std::int32_t>(bytes, out);
      break;
    case DType::i16:
      convert_numbers<std::int16_t>(bytes, out);
      break;
    case DType::i8:
      convert_numbers<std::int8_t>(bytes, out);
      break;
    case DType::u64:
      convert_numbers<std::uint64_t>(bytes, out);
      break;
    case DType::u32:
      convert_numbers<std::uint32_t>(bytes, out);
      break;
    case DType::u16:
      convert_numbers<std::uint16_t>(bytes, out);
      break;
    case DType::u8:
      convert_numbers<std::uint8_t>(bytes, out);
      break;
    case DType::foreign:
    case DType::text:
      break;
  }
  if (!std::all_of(out.begin(), out.end(), [](float v) { return std::isfinite(v); }))
    throw Failure(file_.name + ": tensor '" + tensor_.name +
                  "' holds a value that is not finite as f32");
}

std::vector<float> read_values(TensorFile& file, const Tensor& tensor) {
  TensorReader reader(file, tensor);  // refuses what holds no numbers, whose shape nothing bounds
  std::vector<float> values(static_cast<std::size_t>(tensor.elements()));
  reader.read(values);
  return values;
}

bool same_values(TensorFile& file, const Tensor& a, const Tensor& b) {
  if (a.source == b.source && a.offset == b.offset && a.strides == b.strides && a.dtype == b.dtype)
    return true;
  TensorReader one(file, a), two(file, b);
  std::uint64_t left = a.elements();
  std::vector<float> x(1 << 16), y(1 << 16);
  for (; left > 0; left -= x.size()) {
    x.resize(static_cast<std::size_t>(std::min<std::uint64_t>(left, x.size())));
    y.resize(x.size());
    one.read(x);
    two.read(y);
    if (x != y) return false;
  }
  return true;
}

TensorFile open_tensors(const Input& input) {
  if (const std::string kind = shard_kind(input.name); !kind.empty())
    throw Failure(input.name + ": is " + kind);
  const auto source = input.open();
  std::string head(static_cast<std::size_t>(std::min<std::uint64_t>(source->size(), 4096)), '\0');
  source->read(0, std::as_writable_bytes(std::span(head)));
  const auto begins = [&](std::string_view magic) { return head.starts_with(magic); };
  if (begins("PK\x03\x04")) return open_zip(input);
  if (begins("\x93NUMPY")) return open_npy(input);
  // A length that a text does not begin with, and the JSON of that length.
  if (head.size() > 9 && head[8] == '{' && head.find('\0') < 8) return open_safetensors(input);
  // A pickle's protocol opcode, or of protocols 0 and 1 the magic number of torch.save.
  if (begins("\x80") || begins("L1195470371460388013333")) return open_legacy_pytorch(input);
  if (const std::string kind = foreign_kind(input.name, head); !kind.empty())
    throw Failure(input.name + ": is " + kind);
  if (begins("\x08")) return open_onnx(input);  // its version, field 1
  throw Failure(input.name +
                ": none of the known formats (safetensors, .npz, .npy, PyTorch .pt, ONNX)");
}

}  // namespace personalize::tools
