// Named tensors of a model file, whatever its format: safetensors, NumPy, PyTorch or ONNX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace personalize::tools {

// c64 counts as two f32: its tensors have a last dimension of 2, real and imaginary part.
enum class DType : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  foreign,  // numbers of a type that is not read, such as F8_E4M3
  text,     // no numbers
};

std::string_view name(DType dtype);
std::size_t element_bytes(DType dtype);  // 0: foreign or text
bool is_real(DType dtype);               // floating point, foreign included: may be a weight

// Bytes that tensors lie in. Reading forwards is fast; backwards may start again.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual std::uint64_t size() const = 0;
  // Fills `out`. Throws Failure: damaged, or `out` reaches past size().
  virtual void read(std::uint64_t offset, std::span<std::byte> out) = 0;
};

// A file by its path, or one that lies in memory under a name for messages.
struct Input {
  std::string name;
  std::optional<std::span<const std::byte>> memory = std::nullopt;

  // Throws Failure: cannot open.
  std::unique_ptr<ByteSource> open() const;
};

struct Tensor {
  std::string name;
  DType dtype = DType::foreign;
  std::vector<std::uint64_t> shape;
  std::size_t source = 0;              // index into TensorFile::sources
  std::uint64_t offset = 0;            // of the first element, in bytes
  std::vector<std::uint64_t> strides;  // in elements; empty: row-major
  std::string type_name = {};          // foreign or text: as its format calls the type

  std::uint64_t elements() const;  // checked when the file was opened
  std::string describe() const;    // "name f32 [3, 4]"
};

struct Graph;

// A node of an ONNX graph.
struct GraphNode {
  std::string operation, name = {};
  std::vector<std::string> inputs = {}, outputs = {};
  std::map<std::string, std::int64_t> integers = {};
  std::map<std::string, float> floats = {};
  std::map<std::string, std::vector<std::int64_t>> integer_lists = {};
  std::map<std::string, std::string> strings = {};  // string lists: joined by ','
  // Of If, Loop and Scan. What a subgraph defines has names that nothing else has.
  std::map<std::string, std::shared_ptr<Graph>> graphs = {};

  std::string describe() const;  // "MatMul '/out/MatMul'"
};

struct GraphInput {
  std::string name;
  // -1: any size. Absent: any shape.
  std::optional<std::vector<std::int64_t>> shape = std::nullopt;
};

struct Graph {
  std::vector<GraphNode> nodes;  // in an order that computes
  std::vector<GraphInput> inputs;
  std::vector<std::string> outputs;
};

struct TensorFile {
  std::string name, format;
  std::vector<Tensor> tensors;
  std::vector<std::unique_ptr<ByteSource>> sources;
  std::map<std::string, std::string> text;  // safetensors: its metadata
  std::optional<Graph> graph;               // ONNX only

  const Tensor* find(std::string_view tensor) const;
  // Throws Failure where there is no such tensor.
  const Tensor& at(std::string_view tensor) const;

  // Checks a tensor's size against its source, then adds it. Throws Failure: the shape overflows,
  // the tensor reaches past its source, or its name is there already.
  void add(Tensor tensor);
  // A tensor whose bytes do not lie in the file as they are.
  void add(Tensor tensor, std::vector<std::byte> bytes);
};

// Reads a tensor's elements in row-major order as f32. Throws Failure: an element is not finite as
// f32, the element type is not numeric, or the source is damaged.
class TensorReader {
 public:
  TensorReader(TensorFile& file, const Tensor& tensor);
  void read(std::span<float> out);

 private:
  void convert(std::span<const std::byte> bytes, std::span<float> out) const;
  TensorFile& file_;
  const Tensor& tensor_;
  std::uint64_t at_ = 0;
  std::vector<std::byte> buffer_;
  std::vector<float> gathered_;  // of a tensor with strides
};

std::vector<float> read_values(TensorFile& file, const Tensor& tensor);

// Whether two tensors of as many elements hold the same numbers in the same order.
bool same_values(TensorFile& file, const Tensor& a, const Tensor& b);

// Opens a file in any known format, told by its content. Reads its structure and no tensor. Throws
// Failure, which says what a file of another kind is.
TensorFile open_tensors(const Input& input);

// What a file is that none of the formats' readers takes, by its first bytes, or by its name one
// that holds a part of a model; what a folder is. As "a Git LFS pointer, ...; run `git lfs pull`".
// Empty where it is not known.
std::string foreign_kind(const std::string& path, std::string_view head);
std::string shard_kind(const std::string& path);
std::string folder_kind(const std::string& path);

// One a format.
TensorFile open_safetensors(const Input& input);
TensorFile open_npy(const Input& input);
TensorFile open_zip(const Input& input);             // .npz, or PyTorch's .pt
TensorFile open_legacy_pytorch(const Input& input);  // of PyTorch before 1.6
TensorFile open_onnx(const Input& input);

// Limits that keep a hostile file from taking memory.
inline constexpr std::size_t max_tensors = 4096;
inline constexpr std::size_t max_expanded = std::size_t{1} << 24;  // numbers that share storage
inline constexpr std::size_t max_structure_bytes = std::size_t{32} << 20;  // pickles, graphs
inline constexpr std::size_t max_json_bytes = std::size_t{2} << 20;  // parsed, up to 64 times that

}  // namespace personalize::tools
