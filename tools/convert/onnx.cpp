// ONNX models: the protocol buffer's fields that carry weights and the graph (onnx.proto, IR 3 to
// 10). Tensors stay in the file and are read when they are needed.
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <set>

#include "command/command.hpp"
#include "convert/tensors.hpp"

namespace personalize::tools {
namespace {

namespace io = google::protobuf::io;

// Hands a ByteSource to protobuf in blocks.
class SourceStream : public io::CopyingInputStream {
 public:
  explicit SourceStream(ByteSource& source) : source_(source) {}
  int Read(void* buffer, int size) override {
    const auto count = static_cast<std::size_t>(
        std::min<std::uint64_t>(static_cast<std::uint64_t>(size), source_.size() - at_));
    source_.read(at_, {static_cast<std::byte*>(buffer), count});
    at_ += count;
    return static_cast<int>(count);
  }
  int Skip(int count) override {
    const std::uint64_t skipped =
        std::min<std::uint64_t>(static_cast<std::uint64_t>(count), source_.size() - at_);
    at_ += skipped;
    return static_cast<int>(skipped);
  }

 private:
  ByteSource& source_;
  std::uint64_t at_ = 0;
};

struct OnnxType {
  DType dtype;
  std::string_view name = {};  // of a foreign one
};

OnnxType type_of(std::uint64_t type) {
  switch (type) {  // TensorProto.DataType
    case 1:
      return {DType::f32};
    case 2:
    case 9:
      return {DType::u8};
    case 3:
      return {DType::i8};
    case 4:
      return {DType::u16};
    case 5:
      return {DType::i16};
    case 6:
      return {DType::i32};
    case 7:
      return {DType::i64};
    case 8:
      return {DType::text, "STRING"};
    case 10:
      return {DType::f16};
    case 11:
      return {DType::f64};
    case 12:
      return {DType::u32};
    case 13:
      return {DType::u64};
    case 14:
      return {DType::foreign, "COMPLEX64"};
    case 15:
      return {DType::foreign, "COMPLEX128"};
    case 16:
      return {DType::bf16};
    case 17:
      return {DType::foreign, "FLOAT8E4M3FN"};
    case 18:
      return {DType::foreign, "FLOAT8E4M3FNUZ"};
    case 19:
      return {DType::foreign, "FLOAT8E5M2"};
    case 20:
      return {DType::foreign, "FLOAT8E5M2FNUZ"};
    case 21:
      return {DType::foreign, "UINT4"};
    case 22:
      return {DType::foreign, "INT4"};
    case 23:
      return {DType::foreign, "FLOAT4E2M1"};
    default:
      return {DType::foreign, "an unknown element type"};
  }
}

// What a subgraph defines gets names of its own, so that two branches may use the same.
void rename(Graph& graph, const std::set<std::string>& defined, const std::string& prefix) {
  const auto change = [&](std::string& name) {
    if (defined.count(name)) name = prefix + name;
  };
  for (GraphNode& node : graph.nodes) {
    for (std::string& input : node.inputs) change(input);
    for (std::string& output : node.outputs) change(output);
    for (auto& [attribute, nested] : node.graphs) rename(*nested, defined, prefix);
  }
  for (std::string& output : graph.outputs) change(output);
}

class OnnxReader {
 public:
  explicit OnnxReader(TensorFile& file)
      : file_(file), stream_(*file.sources[0]), adaptor_(&stream_, 1 << 16), in_(&adaptor_) {
    in_.SetTotalBytesLimit(std::numeric_limits<int>::max());
  }

  void read() {
    bool has_graph = false;
    message(static_cast<int>(file_.sources[0]->size()), [&](int field, int wire) {
      if (field != 7) return skip(wire);
      has_graph = true;
      if (!file_.graph) file_.graph.emplace();
      nested(wire, [&](int f, int w) { graph_field(*file_.graph, f, w); });
    });
    if (!has_graph) refuse("holds no graph; is it a model in ONNX's format?");
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Failure(file_.name + ": ONNX: " + what);
  }
  [[noreturn]] void damaged() const { refuse("is damaged or cut off; copy it again"); }

  // Calls field(number, wire type) for every field of a message of `length` bytes.
  template <class Function>
  void message(int length, Function field) {
    const int end = in_.CurrentPosition() + length;
    while (in_.CurrentPosition() < end) {
      const std::uint32_t tag = in_.ReadTag();
      if (tag == 0) damaged();
      field(static_cast<int>(tag >> 3), static_cast<int>(tag & 7));
    }
    if (in_.CurrentPosition() != end) damaged();
  }

  template <class Function>
  void nested(int wire, Function field) {
    const int bytes = length(wire);
    const auto limit = in_.PushLimit(bytes);
    message(bytes, field);
    in_.PopLimit(limit);
  }

  int length(int wire) {
    int bytes = 0;
    if (wire != 2 || !in_.ReadVarintSizeAsInt(&bytes) || left() < bytes) damaged();
    return bytes;
  }
  int left() const { return static_cast<int>(file_.sources[0]->size()) - in_.CurrentPosition(); }

  void skip(int wire) {
    std::uint64_t ignored64;
    std::uint32_t ignored32;
    bool good = false;
    if (wire == 0) good = in_.ReadVarint64(&ignored64);
    if (wire == 1) good = in_.ReadLittleEndian64(&ignored64);
    if (wire == 2) good = in_.Skip(length(wire));
    if (wire == 5) good = in_.ReadLittleEndian32(&ignored32);
    if (!good) damaged();
  }

  std::uint64_t varint(int wire) {
    std::uint64_t value = 0;
    if (wire != 0 || !in_.ReadVarint64(&value)) damaged();
    return value;
  }

  float number(int wire) {
    std::uint32_t bits = 0;
    if (wire != 5 || !in_.ReadLittleEndian32(&bits)) damaged();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  std::string text(int wire) {
    const int bytes = length(wire);
    structure_bytes_ += static_cast<std::size_t>(bytes);
    std::string value;
    if (structure_bytes_ > max_structure_bytes) refuse("its graph is too large");
    if (!in_.ReadString(&value, bytes)) damaged();
    return value;
  }

  // A repeated integer, packed or one at a time.
  void integers(int wire, std::vector<std::int64_t>& out) {
    const auto add = [&](std::uint64_t value) {
      structure_bytes_ += sizeof value;
      if (structure_bytes_ > max_structure_bytes) refuse("its graph is too large");
      out.push_back(static_cast<std::int64_t>(value));
    };
    if (wire == 0) return add(varint(wire));
    const int end = length(wire) + in_.CurrentPosition();
    while (in_.CurrentPosition() < end) add(varint(0));
    if (in_.CurrentPosition() != end) damaged();
  }

  void graph_field(Graph& graph, int field, int wire) {
    switch (field) {
      case 1:
        graph.nodes.emplace_back();
        count();
        nested(wire, [&](int f, int w) { node_field(graph.nodes.back(), f, w); });
        if (graph.nodes.back().outputs.empty()) refuse("a node without outputs");
        break;
      case 5:
        tensor(wire, "");
        break;
      case 11:
        graph.inputs.emplace_back();
        count();
        nested(wire, [&](int f, int w) { value_field(graph.inputs.back(), f, w); });
        break;
      case 12: {
        GraphInput output;
        count();
        nested(wire, [&](int f, int w) { value_field(output, f, w); });
        graph.outputs.push_back(output.name);
        break;
      }
      case 15:
        refuse("has sparse initialisers; export them dense");
      default:
        skip(wire);
    }
  }

  void count() {
    structure_bytes_ += 256;  // about what an entry of the graph takes
    if (structure_bytes_ > max_structure_bytes) refuse("its graph is too large");
  }

  // ValueInfoProto: a name, and a type, of which a tensor's shape is kept.
  void value_field(GraphInput& value, int field, int wire) {
    if (field == 1) {
      value.name = text(wire);
      return;
    }
    if (field != 2) return skip(wire);
    nested(wire, [&](int type_field, int w) {
      if (type_field != 1) return skip(w);
      nested(w, [&](int tensor_field, int w2) {
        if (tensor_field != 2) return skip(w2);
        value.shape.emplace();
        nested(w2, [&](int shape_field, int w3) {
          if (shape_field != 1) return skip(w3);
          count();
          value.shape->push_back(-1);
          nested(w3, [&](int dimension_field, int w4) {
            if (dimension_field != 1) return skip(w4);
            value.shape->back() = static_cast<std::int64_t>(varint(w4));
          });
        });
      });
    });
  }

  void node_field(GraphNode& node, int field, int wire) {
    switch (field) {
      case 1:
        count();
        node.inputs.push_back(text(wire));
        break;
      case 2:
        count();
        node.outputs.push_back(text(wire));
        break;
      case 3:
        node.name = text(wire);
        break;
      case 4:
        node.operation = text(wire);
        break;
      case 5:
        attribute(node, wire);
        break;
      case 7:
        if (const std::string domain = text(wire); !domain.empty() && domain != "ai.onnx")
          node.operation = domain + "." + node.operation;
        break;
      default:
        skip(wire);
    }
  }

  void attribute(GraphNode& node, int wire) {
    count();
    std::string name;
    nested(wire, [&](int field, int w) {
      switch (field) {
        case 1:
          name = text(w);
          break;
        case 2:
          node.floats[name] = number(w);
          break;
        case 3:
          node.integers[name] = static_cast<std::int64_t>(varint(w));
          break;
        case 4:
          node.strings[name] = text(w);
          break;
        case 5:
          // The value of a Constant node; its output's name comes before its attributes.
          tensor(w, node.outputs.empty() ? "" : node.outputs[0]);
          break;
        case 6:
          subgraph(node, name, w);
          break;
        case 7:
          numbers(w, name, node);
          break;
        case 8:
          integers(w, node.integer_lists[name]);
          break;
        case 9: {
          std::string& joined = node.strings[name];
          joined += (joined.empty() ? "" : ",") + text(w);
          break;
        }
        default:
          skip(w);
      }
    });
  }

  // A repeated float: of a Constant node its value, else of no interest.
  void numbers(int wire, const std::string& name, const GraphNode& node) {
    std::vector<std::byte> bytes(sizeof(float));
    if (wire == 5) {
      const float value = number(wire);
      std::memcpy(bytes.data(), &value, sizeof value);
    } else {
      bytes.resize(static_cast<std::size_t>(length(wire)));
      if (!in_.ReadRaw(bytes.data(), static_cast<int>(bytes.size()))) damaged();
    }
    structure_bytes_ += bytes.size();
    if (structure_bytes_ > max_structure_bytes) refuse("its graph is too large");
    if (name != "value_floats" || node.outputs.empty()) return;
    const std::uint64_t size = bytes.size() / sizeof(float);
    file_.add(
        {.name = prefix_ + node.outputs[0], .dtype = DType::f32, .shape = {size}, .strides = {}},
        std::move(bytes));
  }

  void subgraph(GraphNode& node, const std::string& name, int wire) {
    constexpr int deepest = 4;
    if (++depth_ > deepest) refuse("its subgraphs are nested too deeply");
    const std::string outer = prefix_;
    prefix_ += name + std::to_string(++subgraphs_) + "/";
    const std::size_t tensors = file_.tensors.size();
    const auto graph = std::make_shared<Graph>();
    nested(wire, [&](int f, int w) { graph_field(*graph, f, w); });
    std::set<std::string> defined;
    for (const GraphNode& inner : graph->nodes)
      defined.insert(inner.outputs.begin(), inner.outputs.end());
    for (std::size_t t = tensors; t < file_.tensors.size(); ++t)
      defined.insert(file_.tensors[t].name.substr(prefix_.size()));
    defined.erase("");
    rename(*graph, defined, prefix_);
    node.graphs[name] = graph;
    prefix_ = outer;
    --depth_;
  }

  void tensor(int wire, const std::string& given_name) {
    Tensor made;
    made.name = given_name;
    std::vector<std::int64_t> dims;
    std::vector<std::byte> values;  // that do not lie in the file as they do in memory
    bool in_file = false, foreign_bytes = false;
    // What int32_data and the like hold, as elements of the tensor's type.
    const auto varints = [&](int w) {
      const std::size_t size = element_bytes(made.dtype);
      if (size == 0) foreign_bytes = true;
      if (size == 8 && made.dtype == DType::f64) damaged();
      const auto add = [&](std::uint64_t value) {
        const auto* bytes = reinterpret_cast<const std::byte*>(&value);
        values.insert(values.end(), bytes, bytes + size);
        if (size == 8 && values.size() > max_structure_bytes) refuse("its graph is too large");
      };
      if (w == 0) return add(varint(w));
      const int end = length(w) + in_.CurrentPosition();
      while (in_.CurrentPosition() < end) add(varint(0));
      if (in_.CurrentPosition() != end) damaged();
    };
    nested(wire, [&](int field, int w) {
      switch (field) {
        case 1:
          integers(w, dims);
          break;
        case 2: {
          const OnnxType type = type_of(varint(w));
          made.dtype = type.dtype;
          made.type_name = type.name;
          break;
        }
        case 8:
          if (const std::string name = text(w); given_name.empty()) made.name = name;
          break;
        case 4:     // float_data, packed: as in memory
        case 9:     // raw_data
        case 10: {  // double_data, packed
          if (w == 5) {
            const float value = number(w);
            const auto* bytes = reinterpret_cast<const std::byte*>(&value);
            values.insert(values.end(), bytes, bytes + sizeof value);
            break;
          }
          const int bytes = length(w);
          made.offset = static_cast<std::uint64_t>(in_.CurrentPosition());
          in_file = true;
          if (!in_.Skip(bytes)) damaged();
          break;
        }
        case 5:   // int32_data: of everything that has at most 32 bits, halves included
        case 7:   // int64_data
        case 11:  // uint64_data
          varints(w);
          break;
        case 13:
          refuse("tensor '" + made.name.substr(0, 100) +
                 "' lies in another file (external data); save the model as one file");
        case 14:
          if (varint(w) != 0)
            refuse("tensor '" + made.name.substr(0, 100) +
                   "' lies in another file (external data); save the model as one file");
          break;
        default:
          skip(w);
      }
    });
    for (const std::int64_t size : dims) {
      if (size < 0) refuse("tensor '" + made.name.substr(0, 100) + "' has a negative dimension");
      made.shape.push_back(static_cast<std::uint64_t>(size));
    }
    if (foreign_bytes && !made.type_name.empty()) values.clear();
    made.name = prefix_ + made.name;
    if (in_file || element_bytes(made.dtype) == 0)
      file_.add(std::move(made));
    else
      file_.add(std::move(made), std::move(values));
  }

  TensorFile& file_;
  SourceStream stream_;
  io::CopyingInputStreamAdaptor adaptor_;
  io::CodedInputStream in_;
  std::size_t structure_bytes_ = 0;
  std::string prefix_;  // of the names that the subgraph being read defines
  int depth_ = 0, subgraphs_ = 0;
};

}  // namespace

TensorFile open_onnx(const Input& input) {
  TensorFile file;
  file.name = input.name;
  file.format = "onnx";
  file.sources.push_back(input.open());
  if (file.sources[0]->size() >= static_cast<std::uint64_t>(std::numeric_limits<int>::max()))
    throw Failure(input.name + ": an ONNX file has less than 2 GiB");
  OnnxReader(file).read();
  return file;
}

}  // namespace personalize::tools
