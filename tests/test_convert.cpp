// Reading models from elsewhere. tests/convert/ compares whole conversions with PyTorch.
#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "../personalize_runtime.hpp"
#include "command/command.hpp"
#include "command/output.hpp"
#include "convert/archive.hpp"
#include "convert/build.hpp"
#include "convert/check.hpp"
#include "convert/mapping.hpp"
#include "convert/tensors.hpp"
#include "data/dataset.hpp"
#include "refusal.hpp"
#include "small_model.hpp"
#include "strings.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;
using namespace personalize::tools;

namespace {

Catalogue catalogue_of(const std::vector<std::string>& ids) {
  Catalogue catalogue;
  catalogue.items.items.resize(ids.size());
  for (const std::string& id : ids) REQUIRE(catalogue.items.item_ids.add(id));
  return catalogue;
}

// A safetensors file in memory.
struct Safetensors {
  std::string bytes;
  Safetensors(const std::string& header, std::span<const std::byte> data) {
    const std::uint64_t length = header.size();
    bytes.assign(reinterpret_cast<const char*>(&length), 8);
    bytes += header;
    bytes.append(reinterpret_cast<const char*>(data.data()), data.size());
  }
  // It must outlive what is read from it.
  TensorFile open() const& {
    return open_tensors({"model", std::as_bytes(std::span(bytes.data(), bytes.size()))});
  }
  TensorFile open() const&& = delete;
};

// A file of f32 tensors with ascending values, named and shaped as given.
Safetensors model_of(const std::vector<std::pair<std::string, std::vector<int>>>& tensors) {
  std::string header;
  std::size_t at = 0;
  for (const auto& [name, shape] : tensors) {
    std::size_t size = 4;
    std::string dimensions;
    for (const int n : shape) {
      size *= static_cast<std::size_t>(n);
      dimensions += (dimensions.empty() ? "" : ",") + std::to_string(n);
    }
    header += (header.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":"F32","shape":[)" +
              dimensions + R"(],"data_offsets":[)" + std::to_string(at) + "," +
              std::to_string(at + size) + "]}";
    at += size;
  }
  std::vector<float> values(at / 4);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) / 64;
  return {header + "}", std::as_bytes(std::span(values))};
}

Mapping mapping_of(const std::string& json) {
  const TemporaryFolder folder;
  return read_mapping(folder.write("mapping.json", json));
}

}  // namespace

TEST_CASE("what PyTorch and NumPy wrote of one model becomes the same model") {
  // The files and the expected state are of torch.nn.Embedding(4, 2) and torch.nn.GRU(2, 2) of
  // PyTorch 1.13, run over items 0, 3, 2.
  constexpr std::array<float, 2> hidden{-0.5528836250305176f, -0.021374069154262543f};
  pz::Vector<std::byte> first;
  for (const char* name :
       {"model.safetensors", "model.npz", "model.pt", "model_old.pt", "model.onnx"}) {
    CAPTURE(name);
    TensorFile file = open_tensors({std::string("golden/convert/") + name});
    const Mapping mapping = file.graph ? trace_graph(file) : recognise(file);
    pz::ModelParts parts =
        build_model(file, mapping, catalogue_of({"a", "b", "c", "d"}), pz::ElementType::f32).parts;
    CHECK(parts.biases == pz::Vector<float>{0.5f, -0.25f, 0, 1});
    parts.metadata = "{}";  // names the file
    const auto bytes = pz::write_model(parts, {.element_type = pz::ElementType::f32});
    REQUIRE(bytes);
    if (first.empty()) first = *bytes;
    CHECK(*bytes == first);
    const auto model = pz::Model::from_parts(std::move(parts));
    REQUIRE(model);
    const pz::Encoder encoder(**model);
    auto workspace = encoder.make_workspace();
    std::vector<float> state(encoder.state_size());
    for (const std::uint32_t item : {0u, 3u, 2u}) encoder.step({.item = item}, state, workspace);
    for (std::size_t c = 0; c < 2; ++c)
      CHECK(double{encoder.query(state)[c]} == doctest::Approx(double{hidden[c]}).epsilon(1e-6));
  }
}

TEST_CASE("an array in Fortran's order reads row by row") {
  TensorFile file = open_tensors({"golden/convert/array.npy"});
  REQUIRE(file.tensors.size() == 1);
  CHECK(file.tensors[0].describe() == "array f32 [2, 3]");
  CHECK(read_values(file, file.tensors[0]) == std::vector<float>{0, 1, 2, 3, 4, 5});
}

TEST_CASE("halves, bfloat16, doubles and integers read as the numbers they are") {
  const std::array<unsigned char, 38> data{
      0x00, 0x3c, 0x00, 0xc0, 0x01, 0x00, 0xff, 0x7b,   // f16: 1, -2, 2^-24, 65504
      0x80, 0x3f, 0x40, 0xc0,                           // bf16: 1, -3
      0,    0,    0,    0,    0,    0,    0xe0, 0x3f,   // f64: 0.5
      0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,   // i64: -1
      0x80, 0x7f,                                       // i8: -128, 127
      0,    0,    0x80, 0x3f, 0,    0,    0,    0x40};  // c64: 1 + 2i
  const Safetensors model(R"({"f16":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},)"
                          R"("bf16":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},)"
                          R"("f64":{"dtype":"F64","shape":[],"data_offsets":[12,20]},)"
                          R"("i64":{"dtype":"I64","shape":[1],"data_offsets":[20,28]},)"
                          R"("i8":{"dtype":"I8","shape":[2],"data_offsets":[28,30]},)"
                          R"("c64":{"dtype":"C64","shape":[1],"data_offsets":[30,38]}})",
                          std::as_bytes(std::span(data)));
  TensorFile file = model.open();
  const auto values = [&](const char* name) { return read_values(file, file.at(name)); };
  CHECK(values("f16") == std::vector<float>{1, -2, 0x1p-24f, 65504});
  CHECK(values("bf16") == std::vector<float>{1, -3});
  CHECK(values("f64") == std::vector<float>{0.5f});
  CHECK(values("i64") == std::vector<float>{-1});
  CHECK(values("i8") == std::vector<float>{-128, 127});
  CHECK(file.at("c64").shape == std::vector<std::uint64_t>{1, 2});
  CHECK(values("c64") == std::vector<float>{1, 2});
}

TEST_CASE("a model that is not recognised is told with its tensors and the nearest architecture") {
  const auto told = [](const std::vector<std::pair<std::string, std::vector<int>>>& tensors) {
    const Safetensors model = model_of(tensors);
    TensorFile file = model.open();
    return refusal([&] { recognise(file); });
  };
  const std::string lstm = told(
      {{"emb.weight", {9, 4}}, {"lstm.weight_ih_l0", {16, 4}}, {"lstm.weight_hh_l0", {16, 4}}});
  CHECK(contains(lstm, "nearest is torch gru"));
  CHECK(contains(lstm, "an LSTM has no counterpart"));
  CHECK(contains(lstm, "lstm.weight_hh_l0 f32 [16, 4]"));
  CHECK(contains(lstm, "--mapping"));
  const std::string both_ways = told({{"emb.weight", {9, 4}},
                                      {"gru.weight_ih_l0", {12, 4}},
                                      {"gru.weight_hh_l0", {12, 4}},
                                      {"gru.weight_ih_l0_reverse", {12, 4}},
                                      {"gru.weight_hh_l0_reverse", {12, 4}}});
  CHECK(contains(both_ways, "bidirectional"));
  // One tensor too many: nothing is left out in silence.
  const std::string two = told({{"emb.weight", {9, 4}},
                                {"gru.weight_ih_l0", {12, 4}},
                                {"gru.weight_hh_l0", {12, 4}},
                                {"positions", {50, 4}}});
  CHECK(contains(two, "could be the embedding, emb.weight f32 [9, 4] and positions f32 [50, 4]"));
  // A number an item is added to the scores where it is called a bias only.
  const std::string counts = told({{"emb.weight", {9, 4}},
                                   {"gru.weight_ih_l0", {12, 4}},
                                   {"gru.weight_hh_l0", {12, 4}},
                                   {"popularity", {9}}});
  CHECK(contains(counts, "nearest is torch gru: it has no place for popularity f32 [9]"));
  CHECK(contains(told({{"blocks.0.attention.weight", {4, 4}}}), "not a known architecture; say"));
}

TEST_CASE("names that stand twice are refused, wherever a format has them") {
  const std::array<float, 2> values{1, 2};
  const Safetensors model(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                          R"("t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                          std::as_bytes(std::span(values)));
  CHECK(refusal([&] { model.open(); }) == "model: its safetensors header has the key \"t\" twice");
  const Safetensors other = model_of({{"t", {1}}});
  TensorFile file = other.open();
  CHECK(refusal([&] { file.add({.name = "t", .shape = {}, .strides = {}}); }) ==
        "model: tensor 't' stands twice");
}

TEST_CASE("an LRU's lambda lies in the unit circle however it is rounded") {
  // params_log: nu, theta, gamma. exp(-exp(-30)) is 1 but for 1e-13.
  constexpr std::uint64_t pairs = 64;
  std::vector<float> values(3 * pairs);
  for (std::size_t j = 0; j < pairs; ++j) {
    values[j] = -30;
    values[pairs + j] = -static_cast<float>(j) / 10;
  }
  std::vector<float> rest(4 * pairs + pairs * 4 + 2 * pairs * 2 * 2, 0.5f);
  values.insert(values.end(), rest.begin(), rest.end());
  const auto n = std::to_string(pairs), n3 = std::to_string(12 * pairs);
  const auto at = [](std::uint64_t floats) { return std::to_string(4 * floats); };
  const std::string header = R"({"p":{"dtype":"F32","shape":[3,)" + n + R"(],"data_offsets":[0,)" +
                             n3 + R"(]},"in":{"dtype":"F32","shape":[)" + n +
                             R"(,2,2],"data_offsets":[)" + n3 + "," + at(7 * pairs) +
                             R"(]},"out":{"dtype":"F32","shape":[2,)" + n +
                             R"(,2],"data_offsets":[)" + at(7 * pairs) + "," + at(11 * pairs) +
                             R"(]},"e":{"dtype":"F32","shape":[2,2],"data_offsets":[)" +
                             at(11 * pairs) + "," + at(11 * pairs + 4) + "]}}";
  const auto build = [&] {
    const Safetensors model(header, std::as_bytes(std::span(values)));
    TensorFile file = model.open();
    return build_model(file, mapping_of(R"({"embedding": "e", "layers": [{"type": "lru",
                         "params_log": "p", "in_proj": "in", "out_proj": "out"}]})"),
                       catalogue_of({"a", "b"}), pz::ElementType::f32)
        .parts;
  };
  const pz::ModelParts parts = build();
  const pz::Matrix& lambda = parts.weights[0];
  for (std::size_t j = 0; j < pairs; ++j) {
    const double real{lambda.at(0, j)}, imaginary{lambda.at(0, pairs + j)};
    CHECK(real * real + imaginary * imaginary <= 1);
    CHECK(real * real + imaginary * imaginary > 1 - 1e-6);
  }
  values[pairs + 3] = 800;
  CHECK(contains(refusal(build), "layer 0: params_log 3 is too large to be a log"));
}

TEST_CASE("rows, padding and items must fit one another") {
  const Safetensors model = model_of(
      {{"emb.weight", {5, 4}}, {"gru.weight_ih_l0", {12, 4}}, {"gru.weight_hh_l0", {12, 4}}});
  TensorFile file = model.open();
  const auto build = [&](Mapping mapping, std::size_t items) {
    std::vector<std::string> ids;
    for (std::size_t i = 0; i < items; ++i) ids.push_back("i" + std::to_string(i));
    return build_model(file, mapping, catalogue_of(ids), pz::ElementType::f32);
  };
  const Mapping mapping = recognise(file);
  CHECK(build(mapping, 5).rows.front() == 0);
  // The first row is not zero and therefore no padding.
  CHECK(contains(refusal([&] { build(mapping, 4); }), "5 rows"));
  CHECK(contains(refusal([&] { build(mapping, 6); }), "check the items file"));
  Mapping offset = mapping;
  offset.index_offset = 1;
  const Built built = build(offset, 4);
  CHECK(built.rows.front() == 1);
  CHECK(built.parts.item_vectors.at(0, 0) == 4.0f / 64);
  Mapping padded = mapping;
  padded.padding_row = 2;
  CHECK(build(padded, 4).parts.item_vectors.at(2, 0) == 12.0f / 64);
  Mapping sliced = mapping;
  sliced.embedding.slice = {1, 4};
  CHECK(build(sliced, 3).parts.item_vectors.at(2, 3) == 15.0f / 64);
  sliced.embedding.slice = {3, 6};
  CHECK(contains(refusal([&] { build(sliced, 3); }), "has no rows [3, 6)"));
}

TEST_CASE("a mapping is checked key by key") {
  CHECK(contains(refusal([] { mapping_of("{"); }), "is not JSON"));
  CHECK(contains(refusal([] { mapping_of("{}"); }), "needs \"embedding\""));
  const auto with = [](const std::string& layer) {
    return R"({"embedding": "e", "layers": [)" + layer + "]}";
  };
  CHECK(contains(refusal([&] { mapping_of(with(R"({"type": "lstm"})")); }), "unknown type"));
  CHECK(contains(refusal([&] { mapping_of(with(R"({"type": "gru", "w_hh": "a"})")); }),
                 "needs w_ih"));
  CHECK(contains(refusal([&] {
                   mapping_of(
                       with(R"({"type": "gru", "w_ih": "a", "w_hh": "b", "gate_order": "zzr"})"));
                 }),
                 "gate_order"));
  CHECK(contains(refusal([&] { mapping_of(with(R"({"type": "add", "slot": 8})")); }), "[0, 7]"));
  CHECK(contains(refusal([&] { mapping_of(with(R"({"type": "save", "slots": 1})")); }),
                 "unknown key \"slots\""));
  for (const char* keep : {"1.0001", "-1.5", "1e300"})
    CHECK(contains(refusal([&] {
                     mapping_of(with(R"({"type": "save"}, {"type": "decay", "keep": )" +
                                     std::string(keep) + ", \"take\": 1}"));
                   }),
                   "layers[1]: keep is outside [-1, 1]"));
  CHECK(mapping_of(with(R"({"type": "decay", "keep": -1, "take": 2})")).layers[0].keep == -1);
  CHECK(contains(refusal([&] { mapping_of(with(R"({"type": "decay", "take": 1e39})")); }),
                 "take is no number that a float can hold"));
  CHECK(contains(refusal([&] { mapping_of(R"({"embedding": "e", "embedding": "f"})"); }),
                 "has the key \"embedding\" twice"));
  const Mapping keras = mapping_of(
      with(R"({"type": "gru", "w_ih": "k", "w_hh": "r", "gate_order": "zrh", "transpose": true})"));
  CHECK(keras.layers[0].gate_order == "zrn");
  CHECK(keras.layers[0].weights.at("w_ih")[0].transpose);
}

TEST_CASE("items keep the model's order, and interactions give their statistics") {
  const TemporaryFolder folder;
  const std::string order = folder.write("order.csv", "ITEM_ID\nz\na\nm\n");
  const std::string items = folder.write(
      "items.csv", "ITEM_ID,CREATION_TIMESTAMP,GENRE\na,5,rock\nother,6,jazz\nz,,pop|rock\n");
  const std::string interactions = folder.write(
      "interactions.csv", "USER_ID,ITEM_ID,TIMESTAMP\nu,a,30\nu,a,10\nv,other,1\nv,m,20\n");
  const Dataset data =
      read_catalogue({.order = order, .items = items, .interactions = interactions});
  REQUIRE(data.item_ids.size() == 3);
  CHECK(data.item_ids[0] == "z");
  CHECK(data.item_ids[1] == "a");
  CHECK(data.item_ids[2] == "m");
  CHECK(data.items[1].creation_timestamp == 5);
  CHECK(data.items[1].interactions == 2);
  CHECK(data.items[1].first == 10);
  CHECK(data.items[1].last == 30);
  CHECK(data.items[0].interactions == 0);
  CHECK(data.interactions == 3);
  CHECK(data.first_timestamp == 10);
  REQUIRE(data.metadata.size() == 1);
  CHECK(data.metadata[0].values.size() == 3);
  CHECK(data.metadata[0].values[0].size() == 2);
  const std::string twice = folder.write("twice.csv", "USER_ID\nu\nv\nu\n");
  CHECK(contains(refusal([&] { read_ids(twice, "USER_ID"); }), "twice.csv:4"));
}

TEST_CASE("a model goes out as safetensors and comes back byte by byte") {
  const TemporaryFolder folder;
  pz::ModelParts parts = small_model::parts();
  const pz::WriteOptions f32{.element_type = pz::ElementType::f32};
  const auto before = pz::write_model(parts, f32);
  REQUIRE(before);
  {
    OutputFile file(folder.file("model.safetensors"));
    write_archive(parts, file);
    file.commit();
  }
  TensorFile file = open_tensors({folder.file("model.safetensors")});
  CHECK(is_archive(file));
  const auto after = pz::write_model(read_archive(file, pz::ElementType::f32), f32);
  REQUIRE(after);
  CHECK(*after == *before);
}

TEST_CASE("a check agrees with the model it is made from and notices another") {
  pz::ModelParts parts = small_model::parts();
  const TemporaryFolder folder;
  std::string csv = "USER_ID,ITEM_ID,TIMESTAMP\n";
  for (int e = 0; e < 40; ++e)
    csv += "u" + std::to_string(e % 5) + "," +
           std::string(parts.item_ids[static_cast<std::size_t>(e * 7 % 50)]) + "," +
           std::to_string(1000 + e * e) + "\n";
  BadRows bad;
  const auto histories = read_histories(folder.write("histories.csv", csv), parts, bad);
  CHECK(histories.size() == 5);
  const auto model = pz::Model::from_parts(parts);
  REQUIRE(model);
  const Agreement same = compare_with_source(**model, parts, histories);
  CHECK(same.hidden_deviation.value() < 1e-5);
  CHECK(same.same_top20.value() == 1);
  parts.weights.back().f32()[0] += 1;
  const Agreement other = compare_with_source(**model, parts, histories);
  CHECK(other.hidden_deviation.value() > 1e-3);
  CHECK(same.agrees());
  CHECK_FALSE(other.agrees());
  CHECK(contains(other.first_difference, "for user 'u0' hidden states differ by"));
}

namespace {

// Fields of a protocol buffer, as ONNX files are made of.
std::string wire_varint(std::uint64_t value) {
  std::string bytes;
  for (; value > 127; value >>= 7) bytes.push_back(static_cast<char>((value & 127) | 128));
  bytes.push_back(static_cast<char>(value));
  return bytes;
}
std::string wire_field(int number, std::uint64_t value) {
  return wire_varint(static_cast<std::uint64_t>(number) << 3) + wire_varint(value);
}
std::string wire_field(int number, const std::string& content) {
  return wire_varint(static_cast<std::uint64_t>(number) << 3 | 2) + wire_varint(content.size()) +
         content;
}

// The bytes must outlive what is read from them.
TensorFile open_text(const std::string& bytes, const std::string& name = "model") {
  return open_tensors({name, std::as_bytes(std::span(bytes))});
}
TensorFile open_text(std::string&& bytes, const std::string& name = "model") = delete;

}  // namespace

TEST_CASE("an ONNX file's numbers read wherever the format lets them lie") {
  const auto tensor = [](const char* name, std::uint64_t size, std::uint64_t type,
                         const std::string& data) {
    return wire_field(
        5, wire_field(1, size) + wire_field(2, type) + wire_field(8, std::string(name)) + data);
  };
  const std::string two{"\0\0\x80\x3f\0\0\0\xc0", 8};  // 1 and -2 as f32
  const std::string one_by_one = "\x25" + two.substr(0, 4) + "\x25" + two.substr(4);
  const std::string graph =
      tensor("f16", 3, 10,
             wire_field(5, wire_varint(0x3c00) + wire_varint(0xc000) + wire_varint(0x7bff))) +
      tensor("bf16", 2, 16, wire_field(5, 0x3f80) + wire_field(5, 0xc040)) +
      tensor("i8", 2, 3, wire_field(5, wire_varint(127) + wire_varint(~std::uint64_t{0}))) +
      tensor("i64", 2, 7, wire_field(7, wire_varint(5) + wire_varint(~std::uint64_t{0} - 1))) +
      tensor("packed", 2, 1, wire_field(4, two)) + tensor("raw", 2, 1, wire_field(9, two)) +
      tensor("separate", 2, 1, one_by_one) +
      tensor("f8", 2, 17, wire_field(5, wire_varint(1) + wire_varint(2)));
  const std::string bytes = wire_field(1, 8) + wire_field(7, graph);
  TensorFile file = open_text(bytes);
  const auto values = [&](const char* name) { return read_values(file, file.at(name)); };
  CHECK(values("f16") == std::vector<float>{1, -2, 65504});
  CHECK(values("bf16") == std::vector<float>{1, -3});
  CHECK(values("i8") == std::vector<float>{127, -1});
  CHECK(values("i64") == std::vector<float>{5, -2});
  for (const char* name : {"packed", "raw", "separate"})
    CHECK(values(name) == std::vector<float>{1, -2});
  CHECK(refusal([&] { values("f8"); }) ==
        "model: tensor 'f8' is FLOAT8E4M3FN, which is not read; save it as F32 or BF16");
}

TEST_CASE("a tensor may repeat its stored numbers, as torch.expand does, within bounds") {
  const std::array<float, 3> values{1, 2, 3};
  const auto file_of = [&](std::vector<std::uint64_t> shape, std::vector<std::uint64_t> strides) {
    TensorFile file;
    file.name = "model";
    file.sources.push_back(Input{"model", std::as_bytes(std::span(values))}.open());
    file.add({.name = "t",
              .dtype = DType::f32,
              .shape = std::move(shape),
              .strides = std::move(strides)});
    return file;
  };
  const auto read = [&](std::vector<std::uint64_t> shape, std::vector<std::uint64_t> strides) {
    TensorFile file = file_of(std::move(shape), std::move(strides));
    return read_values(file, file.tensors[0]);
  };
  CHECK(read({4}, {0}) == std::vector<float>{1, 1, 1, 1});
  CHECK(read({2, 3}, {0, 1}) == std::vector<float>{1, 2, 3, 1, 2, 3});
  CHECK(read({3, 2}, {1, 0}) == std::vector<float>{1, 1, 2, 2, 3, 3});
  CHECK(read({2, 2}, {1, 1}) == std::vector<float>{1, 2, 2, 3});
  CHECK(contains(refusal([&] { read({2, 3}, {1, 1}); }), "more bytes than the file holds"));
  CHECK(contains(refusal([&] { read({max_expanded + 1}, {0}); }),
                 "repeats 1 stored numbers 16777217 times"));
}

TEST_CASE("a checkpoint is looked through, and what lies beside the model is told") {
  const auto recognised = [](const std::vector<std::pair<std::string, std::vector<int>>>& tensors) {
    const Safetensors written = model_of(tensors);
    TensorFile file = written.open();
    return recognise(file);
  };
  using Tensors = std::vector<std::pair<std::string, std::vector<int>>>;
  const auto gru = [](const std::string& prefix) {
    return Tensors{{prefix + "emb.weight", {9, 4}},
                   {prefix + "gru.weight_ih_l0", {12, 4}},
                   {prefix + "gru.weight_hh_l0", {12, 4}}};
  };
  const auto with = [](Tensors tensors, const Tensors& more) {
    tensors.insert(tensors.end(), more.begin(), more.end());
    return tensors;
  };
  const Mapping plain = recognised(gru("net.module."));
  CHECK(plain.embedding.tensor == "net.module.emb.weight");
  CHECK(plain.notes.empty());
  const Mapping model = recognised(with(gru("model."), {{"optimizer.state.0.exp_avg", {9, 4}},
                                                        {"optimizer.state.1.exp_avg", {12, 4}},
                                                        {"best_val_loss", {}}}));
  CHECK(model.embedding.tensor == "model.emb.weight");
  CHECK(model.notes == std::vector<std::string>{"left out: 'best_val_loss' with 1 tensor, "
                                                "'optimizer' with 2 tensors (not under 'model.')"});
  const Mapping scalar = recognised(with(gru(""), {{"logit_scale", {}}}));
  CHECK(scalar.notes == std::vector<std::string>{"left out: logit_scale f32 [] (numbers by "
                                                 "themselves, as hyperparameters are)"});
  // Two models, or a part of one, are not chosen from.
  CHECK(contains(refusal([&] { recognised(with(gru("a."), gru("b."))); }),
                 "not a known architecture"));
  CHECK(contains(refusal([&] {
                   recognised(with(gru("model."), {{"head.positions", {50, 7}}}));
                 }),
                 "not a known architecture"));
  // A loss's weights beside the model are no bias of it.
  const Mapping loss = recognised(with(gru("model."), {{"criterion.weight", {9}}}));
  CHECK_FALSE(loss.output_bias);
  CHECK(loss.notes == std::vector<std::string>{"left out: 'criterion' with 1 tensor (not under "
                                               "'model.')"});
}

TEST_CASE("an embedding that was saved under two names is one") {
  std::vector<float> values(36 + 48 + 48);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7);
  const auto open = [&](float last) {
    std::vector<float> all = values;
    all.insert(all.end(), values.begin(), values.begin() + 36);
    all.back() = last;
    const Safetensors model(
        R"({"emb.weight":{"dtype":"F32","shape":[9,4],"data_offsets":[0,144]},)"
        R"("g.weight_ih_l0":{"dtype":"F32","shape":[12,4],"data_offsets":[144,336]},)"
        R"("g.weight_hh_l0":{"dtype":"F32","shape":[12,4],"data_offsets":[336,528]},)"
        R"("table":{"dtype":"F32","shape":[9,4],"data_offsets":[528,672]}})",
        std::as_bytes(std::span(all)));
    TensorFile file = model.open();
    return recognise(file);
  };
  const Mapping mapping = open(values[35]);
  CHECK(mapping.embedding.tensor == "emb.weight");
  CHECK_FALSE(mapping.output);
  CHECK(mapping.notes == std::vector<std::string>{"left out: table f32 [9, 4] = emb.weight (the "
                                                  "same numbers under a second name)"});
  CHECK(contains(refusal([&] { open(values[35] + 1); }),
                 "could be the embedding, emb.weight f32 [9, 4] and table f32 [9, 4], and they"));
}

TEST_CASE("a file of another kind is told what it is") {
  const auto told = [](const std::string& bytes, const std::string& name = "model") {
    return refusal([&] { open_text(bytes, name); });
  };
  CHECK(told("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n") ==
        "model: is a Git LFS pointer, not the file that it stands for; run `git lfs pull` where it "
        "was cloned");
  for (const char* page :
       {"<!DOCTYPE html>\n<title>404", "\xef\xbb\xbf\n <HTML lang=en>", "<html>"})
    CHECK(contains(told(page), "is an HTML page"));
  CHECK(contains(told("<?xml version=\"1.0\"?><Error>"), "is an XML text"));
  CHECK(contains(told("{\"error\": \"not found\"}"), "is a JSON text, which holds no weights"));
  CHECK(contains(told("{\"metadata\": {}, \"weight_map\": {"),
                 "the index of a model that lies in "
                 "several files (shards)"));
  CHECK(contains(told("{}", "a/model.safetensors.index.json"), "(shards)"));
  CHECK(contains(told("Entry not found"), "is a text that begins 'Entry not found'"));
  CHECK(told("") == "model: is empty; copy it again");
  CHECK(contains(told("\x89HDF\r\n\x1a\n" + std::string(99, '\0')), "HDF5 file (Keras .h5)"));
  CHECK(contains(told("GGUF\x03" + std::string(99, '\0')), "llama.cpp"));
  CHECK(contains(told(std::string("\x1c\0\0\0TFL3", 8)), "TensorFlow Lite"));
  CHECK(contains(told("\x08\x01\x12\x80\x01" + std::string(99, '\0')), "TensorFlow SavedModel"));
  CHECK(contains(told("\x1f\x8b\x08"), "is a compressed file; unpack it"));
  CHECK(contains(told("\x78\x9c"
                      "abc"),
                 "perhaps of joblib"));
  CHECK(contains(told(std::string(257, 'a') + "ustar"), "is a tar archive"));
  CHECK(contains(
      told("\x80\x04\x95" + std::string(8, '\0') + "\x8c\x15sklearn.decomposition\x8c\x03NMF\x93."),
      "names sklearn.decomposition.NMF (a model of scikit-learn's), which could run code"));
  CHECK(contains(
      told("\x80\x04\x95" + std::string(8, '\0') + "\x8c\x15sklearn.decomposition\x8c\x03NMF\x93."),
      "save its matrices by numpy.savez"));
  for (const char* shard : {"model-00001-of-00003.safetensors", "pytorch_model-00002-of-00003.bin"})
    CHECK(contains(told("any", shard), "is one of 3 files that hold a model together (shards)"));
  CHECK(contains(told("any", "model-00001-of-00001.safetensors"), "is a text that begins"));
  const TemporaryFolder folder;
  const auto told_folder = [&] { return refusal([&] { open_tensors({folder.file("")}); }); };
  CHECK(contains(told_folder(), "is a folder; give the model's file"));
  folder.write("model.onnx", "");
  CHECK(contains(told_folder(), "is a folder; give the model in it, "));
  folder.write("saved_model.pb", "");
  CHECK(contains(told_folder(), "is a TensorFlow SavedModel"));
}

TEST_CASE("an element type that is not read is named with its tensor") {
  const std::array<std::byte, 144> zeros{};
  const auto told = [&](const std::string& name, const std::string& type, const char* bytes) {
    const Safetensors model(
        R"({"user.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},"item.weight":{"dtype":"F32","shape":[4,2],"data_offsets":[24,56]},")" +
            name + R"(":{"dtype":")" + type + R"(","shape":[4],"data_offsets":[56,)" + bytes +
            "]}}",
        std::as_bytes(std::span(zeros)));
    return refusal([&] {
      TensorFile file = model.open();
      const Mapping mapping = recognise(file);
      Catalogue catalogue = catalogue_of({"a", "b", "c", "d"});
      for (const char* user : {"x", "y", "z"}) REQUIRE(catalogue.user_ids.add(user));
      build_model(file, mapping, catalogue, pz::ElementType::f32);
    });
  };
  CHECK(told("item_bias", "F32", "72") == "nothing was refused");
  for (const char* type : {"F8_E4M3", "F8_E5M2", "F6_E2M3"})
    CHECK(told("item_bias", type, "60") == "model: tensor 'item_bias' is " + std::string(type) +
                                               ", which is not read; save it as F32 or BF16");
  CHECK(contains(told("other", "F8_E4M3", "60"), "tensor 'other' is F8_E4M3"));
  CHECK(told("counts", "U16", "64") == "nothing was refused");
  const auto array = [](const std::string& descr, std::size_t bytes) {
    const std::string header =
        "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (4,), }";
    const std::string text = "\x93NUMPY\x01" + std::string(1, '\0') +
                             static_cast<char>(header.size()) + std::string(1, '\0') + header +
                             std::string(bytes, '\0');
    TensorFile file = open_text(text);
    return refusal([&] { read_values(file, file.tensors[0]); });
  };
  CHECK(contains(array("<f16", 64), "is '<f16' (long double), which is not read"));
  CHECK(contains(array("<c16", 64), "is '<c16' (complex128), which is not read"));
  CHECK(contains(array("<U3", 48), "does not hold numbers"));
  CHECK(array("<u2", 8) == "nothing was refused");
}

TEST_CASE(
    "pickles of protocols 0 and 1 read, and plain objects beside the tensors are no hindrance") {
  const auto pickled = [](const std::string& object) {
    // torch.save's older format: magic number, protocol, system, object, storages.
    return "L119547037146038801333356L\n.I1001\n.(dp0\n." + object + "(lp0\nV5\np1\na." +
           std::string("\4\0\0\0\0\0\0\0", 8) + std::string("\0\0\x80\x3f\0\0\0\x40", 8) +
           std::string("\0\0\x40\x40\0\0\x80\x40", 8);
  };
  const auto tensor = [](const std::string& name) {
    return "V" + name +
           "\nctorch._utils\n_rebuild_tensor_v2\n(P('storage', <class 'torch.FloatStorage'>, '5', "
           "'cpu', 4, None)\nI0\n(I2\nI2\nt(I2\nI1\ntI00\nccollections\nOrderedDict\n(tRtRs";
  };
  const std::string plain = pickled("(d" + tensor("w\\u00e9") + ".");
  TensorFile file = open_text(plain);
  REQUIRE(file.tensors.size() == 1);
  CHECK(file.tensors[0].describe() == "w\u00e9 f32 [2, 2]");
  CHECK(read_values(file, file.tensors[0]) == std::vector<float>{1, 2, 3, 4});
  const std::string with_options =
      pickled("(d" + tensor("w") +
              "Vargs\nccopy_reg\n_reconstructor\n(cargparse\nNamespace\nc__builtin__\n"
              "object\nNtR(dVlr\nF0.5\nsbs.");
  CHECK(open_text(with_options).tensors.size() == 1);
  const std::string calls = pickled("(dVargs\ncos\nsystem\n(Vtrue\ntRs.");
  CHECK(contains(refusal([&] { open_text(calls); }), "names os.system, which could run code"));
  const std::string storage = pickled("P('storage', <class 'os.system'>, '5', 'cpu', 4)\n.");
  CHECK(contains(refusal([&] { open_text(storage); }), "no tensor storage"));
}

TEST_CASE("a graph that the converted model does not follow is noticed before a file is written") {
  TensorFile file = open_tensors({"golden/convert/model.onnx"});
  const Mapping traced = trace_graph(file);
  const Catalogue catalogue = catalogue_of({"a", "b", "c", "d"});
  const auto verified = [&](const Mapping& mapping) {
    const Built built = build_model(file, mapping, catalogue, pz::ElementType::f32);
    return verify_graph(built.parts, file, mapping, built.rows);
  };
  CHECK(verified(traced).empty());
  Mapping other = traced;
  other.layers[0].gate_order = "rzn";
  const std::string told = refusal([&] { verified(other); });
  CHECK(contains(told, "the graph does what the converted model does not: behind the history '"));
  CHECK(contains(told, "it ranks '"));
  other = traced;
  other.output_bias.reset();
  CHECK(contains(refusal([&] { verified(other); }), "the graph does what"));
  other = traced;
  other.graph_output = "elsewhere";
  CHECK(verified(other) == "the ONNX graph cannot be run: no output has a score for each item");
}
