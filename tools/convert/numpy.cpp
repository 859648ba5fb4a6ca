// NumPy's .npy (format versions 1 to 3) and .npz, a zip archive of them.
#include <array>
#include <cctype>
#include <charconv>
#include <cstring>
#include <unordered_map>

#include "command/command.hpp"
#include "convert/pytorch.hpp"
#include "convert/zip.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

// The header is a Python literal: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, std::string where) : text_(text), where_(std::move(where)) {}

  void parse() {
    expect('{');
    while (!accept('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr") {
        if (peek() != '\'' && peek() != '"') refuse("is a structured array");
        descr = quoted();
      } else if (key == "fortran_order") {
        fortran_order = word() == "True";
      } else if (key == "shape") {
        tuple();
      } else {
        refuse("has a header with an unknown key");
      }
      if (!accept(',') && peek() != '}') refuse("has a malformed header");
    }
    if (descr.empty() || !has_shape_) refuse("has a header without descr or shape");
  }

  std::string descr;
  bool fortran_order = false;
  std::vector<std::uint64_t> shape;

 private:
  [[noreturn]] void refuse(const std::string& what) const { throw Failure(where_ + " " + what); }

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    if (at_ == text_.size()) refuse("has a header that ends too early");
    return text_[at_];
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) refuse("has a malformed header");
  }
  std::string quoted() {
    const char quote = peek();
    if (quote != '\'' && quote != '"') refuse("has a malformed header");
    const std::size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) refuse("has a malformed header");
    const std::string value(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return value;
  }
  std::string word() {
    peek();
    const std::size_t begin = at_;
    while (at_ < text_.size() && std::isalpha(static_cast<unsigned char>(text_[at_]))) ++at_;
    return std::string(text_.substr(begin, at_ - begin));
  }
  void tuple() {
    has_shape_ = true;
    expect('(');
    while (!accept(')')) {
      peek();
      std::uint64_t value = 0;
      const auto [end, error] =
          std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
      if (error != std::errc{}) refuse("has a dimension that is not a natural number");
      at_ = static_cast<std::size_t>(end - text_.data());
      shape.push_back(value);
      if (!accept(',') && peek() != ')') refuse("has a malformed header");
    }
  }

  std::string_view text_;
  std::string where_;
  std::size_t at_ = 0;
  bool has_shape_ = false;
};

DType dtype_of(std::string_view descr) {
  static const std::unordered_map<std::string_view, DType> types{
      {"<f8", DType::f64}, {"<f4", DType::f32}, {"<f2", DType::f16}, {"<i8", DType::i64},
      {"<i4", DType::i32}, {"<i2", DType::i16}, {"|i1", DType::i8},  {"<u8", DType::u64},
      {"<u4", DType::u32}, {"<u2", DType::u16}, {"|u1", DType::u8},  {"|b1", DType::u8},
      {"<c8", DType::f32}};
  if (const auto found = types.find(descr); found != types.end()) return found->second;
  // Text, bytes, dates and spans of time; f, c and V (bfloat16 and the like) may be weights.
  return descr.size() > 1 && std::string_view("USMm").find(descr[1]) != std::string_view::npos
             ? DType::text
             : DType::foreign;
}

std::string type_name(std::string_view descr) {
  const std::string quoted = "'" + std::string(descr) + "'";
  if (descr == "<f16" || descr == "<f12") return quoted + " (long double)";
  if (descr == "<c16") return quoted + " (complex128)";
  if (descr == "|V2") return quoted + " (void; bfloat16?)";
  return quoted;
}

void add_array(TensorFile& file, std::string name, std::unique_ptr<ByteSource> source) {
  const std::string where = file.name + ": array '" + name.substr(0, 100) + "'";
  std::array<std::byte, 12> head{};
  if (source->size() < 12) throw Failure(where + " is cut off");
  source->read(0, head);
  if (std::memcmp(head.data(), "\x93NUMPY", 6) != 0) throw Failure(where + " is not in .npy form");
  const auto version = static_cast<unsigned>(head[6]);
  if (version < 1 || version > 3) throw Failure(where + ": unknown version of the .npy format");
  const std::size_t begin = version == 1 ? 10 : 12;
  std::uint32_t length = 0;
  std::memcpy(&length, head.data() + 8, version == 1 ? 2 : 4);
  if (length > 65'536 || length > source->size() - begin)
    throw Failure(where + ": its header is longer than the file or than 65536 bytes");
  std::string text(length, '\0');
  source->read(begin, std::as_writable_bytes(std::span(text)));
  HeaderParser header(text, where);
  header.parse();
  if (header.descr.find('O') != std::string::npos)
    throw Failure(where + " holds Python objects; save numbers only");
  if (header.descr.starts_with('>'))
    throw Failure(where + " is big-endian; save it with .astype('<f4')");

  Tensor tensor;
  tensor.name = std::move(name);
  tensor.dtype = dtype_of(header.descr);
  if (element_bytes(tensor.dtype) == 0) tensor.type_name = type_name(header.descr);
  tensor.shape = header.shape;
  tensor.source = file.sources.size();
  tensor.offset = begin + length;
  if (header.fortran_order) {
    std::uint64_t stride = 1;
    for (const std::uint64_t size : tensor.shape) {
      tensor.strides.push_back(stride);
      const auto product = detail::checked_product(stride, size);
      if (!product) throw Failure(where + ": its shape overflows");
      stride = *product;
    }
  }
  if (header.descr == "<c8") {
    for (std::uint64_t& stride : tensor.strides) stride *= 2;
    if (!tensor.strides.empty()) tensor.strides.push_back(1);
    tensor.shape.push_back(2);
  }
  file.sources.push_back(std::move(source));
  file.add(std::move(tensor));
}

// What a zip archive is that holds this entry.
std::string not_npz(const ZipArchive& archive, const ZipArchive::Entry& entry) {
  if (archive.find("model.weights.h5"))
    return "is a Keras file (.keras), which is not read; save its weights by numpy.savez(path, "
           "**{w.path: w.numpy() for w in model.weights}) and name them by --mapping";
  for (const ZipArchive::Entry& other : archive.entries()) {
    if (other.name.ends_with("archive_format"))
      return "is a program of torch.export, which is not read; save model.state_dict() with "
             "torch.save, or export the model as ONNX";
    for (const char* ending : {".onnx", ".pt", ".pth", ".safetensors", ".npz", ".ckpt", ".bin"})
      if (other.name.ends_with(ending))
        return "is a zip archive that holds a model; unpack it and give '" +
               other.name.substr(0, 100) + "'";
  }
  return "entry '" + entry.name.substr(0, 100) +
         "' is neither a NumPy array nor part of a PyTorch file";
}

}  // namespace

TensorFile open_npy(const Input& input) {
  TensorFile file;
  file.name = input.name;
  file.format = "npy";
  const std::size_t slash = input.name.find_last_of('/');
  std::string name = input.name.substr(slash == std::string::npos ? 0 : slash + 1);
  if (name.ends_with(".npy")) name.resize(name.size() - 4);
  add_array(file, std::move(name), input.open());
  return file;
}

TensorFile open_zip(const Input& input) {
  const auto archive = ZipArchive::open(input);
  for (const ZipArchive::Entry& entry : archive->entries())
    if (entry.name.ends_with("/data.pkl") || entry.name == "data.pkl")
      return open_pytorch(archive, entry);
  TensorFile file;
  file.name = input.name;
  file.format = "npz";
  for (const ZipArchive::Entry& entry : archive->entries()) {
    if (!entry.name.ends_with(".npy")) throw Failure(input.name + ": " + not_npz(*archive, entry));
    add_array(file, entry.name.substr(0, entry.name.size() - 4), archive->source(entry));
  }
  return file;
}

}  // namespace personalize::tools
