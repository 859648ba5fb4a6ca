#include "convert/archive.hpp"

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

// A tensor to write: its bytes come in pieces, so that no second copy of a matrix is needed.
struct Outgoing {
  std::string name;
  const char* dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t bytes;
  std::function<void(const std::function<void(std::span<const std::byte>)>&)> write;
};

class Writer {
 public:
  template <class Values>
  void values(std::string name, const char* dtype, std::vector<std::uint64_t> shape,
              const Values& data) {
    tensors_.push_back({std::move(name), dtype, std::move(shape), std::span(data).size_bytes(),
                        [&data](const auto& sink) { sink(std::as_bytes(std::span(data))); }});
  }
  void matrix(std::string name, const Matrix& m) {
    tensors_.push_back({std::move(name),
                        "F32",
                        {m.rows(), m.columns()},
                        std::uint64_t{m.rows()} * m.columns() * sizeof(float),
                        [&m](const auto& sink) {
                          std::vector<float> row(m.columns());
                          for (std::size_t r = 0; r < m.rows(); ++r) {
                            m.row(r, row);
                            sink(std::as_bytes(std::span(row)));
                          }
                        }});
  }
  void strings(std::string name, const StringTable& table) {
    const std::uint64_t bytes = detail::string_bytes(table);
    tensors_.push_back({std::move(name), "U8", {bytes}, bytes, [&table](const auto& sink) {
                          detail::write_strings(table, sink);
                        }});
  }

  void save(OutputFile& file, const std::string& metadata) const {
    nlohmann::ordered_json header;
    header["__metadata__"] = {{"format", "personalize"}, {"version", "1"}, {"metadata", metadata}};
    std::uint64_t at = 0;
    for (const Outgoing& tensor : tensors_) {
      header[tensor.name] = {{"dtype", tensor.dtype},
                             {"shape", tensor.shape},
                             {"data_offsets", {at, at + tensor.bytes}}};
      at += tensor.bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // the format aligns data to 8 bytes
    const auto sink = [&](std::span<const std::byte> bytes) { file.append(bytes); };
    const std::uint64_t length = text.size();
    sink(std::as_bytes(std::span(&length, 1)));
    sink(std::as_bytes(std::span(text)));
    for (const Outgoing& tensor : tensors_) tensor.write(sink);
  }

 private:
  std::vector<Outgoing> tensors_;
};

std::string field_name(std::size_t field, const char* part) {
  return "fields." + std::to_string(field) + "." + part;
}
std::string weight_name(std::size_t weight) { return "encoder.weights." + std::to_string(weight); }

class Reader {
 public:
  Reader(TensorFile& file, ElementType type) : file_(file), type_(type) {}

  bool has(const std::string& name) const { return file_.find(name) != nullptr; }

  Matrix matrix(const std::string& name, ElementType type = ElementType::f32) {
    const Tensor& tensor = of_type(name, DType::f32);
    if (tensor.shape.size() != 2) refuse(name);
    Matrix m = Matrix::zeros(0, static_cast<std::size_t>(tensor.shape[1]));
    if (type == ElementType::i8) m = m.quantised();
    m.resize_rows(static_cast<std::size_t>(tensor.shape[0]));
    TensorReader reader(file_, tensor);
    std::vector<float> row(m.columns());
    for (std::size_t r = 0; r < m.rows(); ++r) {
      reader.read(row);
      m.set_row(r, row);
    }
    return m;
  }
  Matrix large_matrix(const std::string& name) { return matrix(name, type_); }

  template <class T>
  std::vector<T> values(const std::string& name, DType dtype) {
    const Tensor& tensor = of_type(name, dtype);
    std::vector<T> out(static_cast<std::size_t>(tensor.elements()));
    file_.sources[tensor.source]->read(tensor.offset, std::as_writable_bytes(std::span(out)));
    return out;
  }

  // count: known from a tensor with a row a string.
  StringTable strings(const std::string& name, std::size_t count) {
    const auto bytes = values<char>(name, DType::u8);
    if (count > bytes.size() / 2) refuse(name);
    StringTable table;
    std::size_t at = 2 * count;
    for (std::size_t i = 0; i < count; ++i) {
      std::uint16_t length;
      std::memcpy(&length, bytes.data() + 2 * i, 2);
      if (length > bytes.size() - at) refuse(name);
      if (const auto added = table.add({bytes.data() + at, length}); !added)
        throw Failure(file_.name + ": tensor '" + name + "': " + added.error().message);
      at += length;
    }
    if (at != bytes.size()) refuse(name);
    return table;
  }

 private:
  [[noreturn]] void refuse(const std::string& name) const {
    throw Failure(file_.name + ": tensor '" + name + "' does not have the shape that " +
                  "personalize convert --to safetensors writes");
  }
  const Tensor& of_type(const std::string& name, DType dtype) const {
    const Tensor& tensor = file_.at(name);
    if (tensor.dtype != dtype) refuse(name);
    return tensor;
  }
  TensorFile& file_;
  ElementType type_;
};

}  // namespace

void write_archive(const ModelParts& parts, OutputFile& file) {
  Writer writer;
  const std::uint64_t items = parts.item_ids.size();
  writer.matrix("item_vectors", parts.item_vectors);
  if (!parts.input_vectors.empty()) writer.matrix("input_vectors", parts.input_vectors);
  writer.values("biases", "F32", {items}, parts.biases);
  std::vector<std::int64_t> statistics;
  for (const ItemStatistics& s : parts.statistics)
    statistics.insert(statistics.end(),
                      {static_cast<std::int64_t>(s.interactions), s.first_timestamp,
                       s.last_timestamp, s.creation_timestamp});
  writer.values("statistics", "I64", {items, 4}, statistics);
  if (!parts.event_types.empty()) {
    writer.matrix("event_type_embedding", parts.event_type_embedding);
    writer.strings("event_types", parts.event_types);
  }
  if (!parts.time_gap_embedding.empty())
    writer.matrix("time_gap_embedding", parts.time_gap_embedding);
  StringTable names;
  std::vector<std::uint8_t> numeric;
  for (const MetadataField& field : parts.fields) {
    if (const auto added = names.add(field.name); !added) throw Failure(added.error().message);
    numeric.push_back(field.numeric ? 1 : 0);
  }
  if (!parts.fields.empty()) {
    writer.values("fields.numeric", "U8", {numeric.size()}, numeric);
    writer.strings("fields.names", names);
  }
  for (std::size_t f = 0; f < parts.fields.size(); ++f) {
    const MetadataField& field = parts.fields[f];
    writer.matrix(field_name(f, "embedding"), field.embedding);
    if (field.numeric)
      writer.values(field_name(f, "boundaries"), "F32", {field.boundaries.size()},
                    field.boundaries);
    else
      writer.strings(field_name(f, "vocabulary"), field.vocabulary);
  }
  std::vector<std::int32_t> operations;
  for (const EncoderOp& op : parts.operations)
    operations.insert(operations.end(),
                      {static_cast<std::int32_t>(op.kind), static_cast<std::int32_t>(op.argument)});
  writer.values("encoder.operations", "I32", {parts.operations.size(), 2}, operations);
  for (std::size_t k = 0; k < parts.weights.size(); ++k)
    writer.matrix(weight_name(k), parts.weights[k]);
  writer.strings("item_ids", parts.item_ids);
  if (!parts.user_ids.empty()) {
    writer.matrix("user_states", parts.user_states);
    writer.strings("user_ids", parts.user_ids);
  }
  writer.save(file, parts.metadata);
}

bool is_archive(const TensorFile& file) {
  const auto format = file.text.find("format");
  return format != file.text.end() && format->second == "personalize";
}

ModelParts read_archive(TensorFile& file, ElementType element_type) {
  if (file.text["version"] != "1")
    throw Failure(file.name + ": written by a newer version of personalize; use that one");
  Reader reader(file, element_type);
  ModelParts parts;
  parts.metadata = file.text["metadata"];
  parts.item_vectors = reader.large_matrix("item_vectors");
  if (reader.has("input_vectors")) parts.input_vectors = reader.large_matrix("input_vectors");
  parts.item_ids = reader.strings("item_ids", parts.item_vectors.rows());
  parts.biases = reader.values<float>("biases", DType::f32);
  const auto statistics = reader.values<std::int64_t>("statistics", DType::i64);
  if (statistics.size() % 4 != 0) throw Failure(file.name + ": statistics have four columns");
  for (std::size_t i = 0; i < statistics.size(); i += 4) {
    if (statistics[i] < 0) throw Failure(file.name + ": a negative number of interactions");
    parts.statistics.push_back({static_cast<std::uint64_t>(statistics[i]), statistics[i + 1],
                                statistics[i + 2], statistics[i + 3]});
  }
  if (reader.has("event_type_embedding")) {
    parts.event_type_embedding = reader.matrix("event_type_embedding");
    parts.event_types = reader.strings("event_types", parts.event_type_embedding.rows());
  }
  if (reader.has("time_gap_embedding"))
    parts.time_gap_embedding = reader.matrix("time_gap_embedding");
  if (reader.has("fields.numeric")) {
    const auto numeric = reader.values<std::uint8_t>("fields.numeric", DType::u8);
    const StringTable names = reader.strings("fields.names", numeric.size());
    for (std::size_t f = 0; f < numeric.size(); ++f) {
      MetadataField field;
      field.name = names[f];
      field.numeric = numeric[f] != 0;
      field.embedding = reader.matrix(field_name(f, "embedding"));
      if (field.numeric)
        field.boundaries = reader.values<float>(field_name(f, "boundaries"), DType::f32);
      else
        field.vocabulary = reader.strings(field_name(f, "vocabulary"), field.embedding.rows());
      parts.fields.push_back(std::move(field));
    }
  }
  const auto operations = reader.values<std::int32_t>("encoder.operations", DType::i32);
  if (operations.size() % 2 != 0) throw Failure(file.name + ": operations have two columns");
  for (std::size_t o = 0; o < operations.size(); o += 2)
    parts.operations.push_back({static_cast<EncoderOp::Kind>(operations[o]),
                                static_cast<std::uint32_t>(operations[o + 1])});
  for (std::size_t k = 0; reader.has(weight_name(k)); ++k)
    parts.weights.push_back(reader.matrix(weight_name(k)));
  if (reader.has("user_states")) {
    parts.user_states = reader.large_matrix("user_states");
    parts.user_ids = reader.strings("user_ids", parts.user_states.rows());
  }
  if (const auto checked = detail::check_parts(parts, LoadLimits{}); !checked)
    throw Failure(file.name + ": " + checked.error().message);
  return parts;
}

}  // namespace personalize::tools
