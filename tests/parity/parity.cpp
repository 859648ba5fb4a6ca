// The header's inference against PyTorch's on the same weights; reference.py writes the cases and
// documents their files.
// usage: parity FOLDER
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "agreement.hpp"
#include "personalize_runtime.hpp"

namespace {

using namespace personalize;

template <class T>
T expect(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().message);
  return std::move(*result);
}

// A file of little-endian values, handed out in order.
template <class T>
class Values {
 public:
  explicit Values(const std::string& path) {
    const std::vector<std::byte> bytes = expect(read_file(path, std::uint64_t{1} << 30U));
    values_.resize(bytes.size() / sizeof(T));
    std::memcpy(values_.data(), bytes.data(), values_.size() * sizeof(T));
  }
  std::span<const T> take(std::size_t count) {
    if (count > values_.size() - next_) throw std::runtime_error("the case's file is too short");
    next_ += count;
    return std::span(values_).subspan(next_ - count, count);
  }
  bool at_end() const { return next_ == values_.size(); }

 private:
  std::vector<T> values_;
  std::size_t next_ = 0;
};

Matrix matrix(Values<float>& floats, std::size_t rows, std::size_t columns) {
  if (rows == 0) return {};
  Matrix m = Matrix::zeros(rows, columns);
  const auto values = floats.take(rows * columns);
  std::copy(values.begin(), values.end(), m.f32().begin());
  return m;
}

StringTable numbered(const char* prefix, std::size_t count) {
  StringTable table;
  for (std::size_t i = 0; i < count; ++i) expect(table.add(prefix + std::to_string(i)));
  return table;
}

struct Shape {
  std::size_t dimension, items, event_types, time_gaps, histories, ranked;
};

ModelParts read_parts(const nlohmann::json& description, const Shape& shape,
                      Values<float>& floats) {
  ModelParts parts;
  parts.metadata = "{}";
  parts.item_ids = numbered("item", shape.items);
  parts.statistics.resize(shape.items);
  parts.event_types = numbered("event", shape.event_types);
  parts.item_vectors = matrix(floats, shape.items, shape.dimension);
  const auto biases = floats.take(shape.items);
  parts.biases.assign(biases.begin(), biases.end());
  parts.event_type_embedding = matrix(floats, shape.event_types, shape.dimension);
  parts.time_gap_embedding = matrix(floats, shape.time_gaps, shape.dimension);
  for (const auto& operation : description.at("operations"))
    parts.operations.push_back({.kind = static_cast<EncoderOp::Kind>(operation.at(0).get<int>()),
                                .argument = operation.at(1).get<std::uint32_t>()});
  for (const auto& weight : description.at("weights"))
    parts.weights.push_back(
        matrix(floats, weight.at(0).get<std::size_t>(), weight.at(1).get<std::size_t>()));
  return parts;
}

parity::Agreement compare(const std::string& folder, const nlohmann::json& description) {
  const auto size = [&](const char* key) { return description.at(key).get<std::size_t>(); };
  const Shape shape{size("dimension"), size("items"),     size("event_types"),
                    size("time_gaps"), size("histories"), size("ranked")};
  const std::string path = folder + "/" + description.at("name").get<std::string>();
  Values<float> floats(path + ".f32");
  Values<std::int64_t> integers(path + ".i64");
  const std::vector<std::byte> file = expect(write_model(
      read_parts(description, shape, floats), {.element_type = ElementType::f32, .zstd_level = 1}));
  const auto model = expect(Model::from_bytes(file));
  const Encoder encoder(*model);
  const Scorer scorer(*model);
  auto scoring = scorer.make_workspace();
  Encoder::Workspace workspace = encoder.make_workspace();
  const auto buckets = static_cast<std::uint32_t>(shape.time_gaps);

  const auto lengths = integers.take(shape.histories);
  std::vector<std::vector<float>> states;
  for (const std::int64_t length : lengths) {
    std::vector<float> state(encoder.state_size());
    std::optional<std::int64_t> previous;
    for (std::int64_t step = 0; step < length; ++step) {
      const auto event = integers.take(3);
      EncoderInput input{.item = static_cast<std::uint32_t>(event[0])};
      if (event[1] >= 0) input.event_type = static_cast<std::uint32_t>(event[1]);
      if (buckets > 0) input.time_gap = time_gap_bucket(previous, event[2], buckets);
      encoder.step(input, state, workspace);
      previous = event[2];
    }
    states.push_back(std::move(state));
  }

  const auto expected_hidden = floats.take(shape.histories * shape.dimension);
  const auto expected_scores = floats.take(shape.histories * shape.items);
  const auto ranked = integers.take(shape.histories * shape.ranked);
  if (!floats.at_end() || !integers.at_end())
    throw std::runtime_error("the case's file is too long");
  parity::Agreement agreement;
  std::vector<float> scores(shape.items);
  std::vector<ScoredItem> top;
  for (std::size_t h = 0; h < shape.histories; ++h) {
    const auto query = encoder.query(states[h]);
    for (std::uint32_t i = 0; i < shape.items; ++i) scores[i] = scorer.score(query, i);
    scorer.top_k(query, parity::top_count, {}, scoring, top);
    agreement.add(query.first(shape.dimension),
                  expected_hidden.subspan(h * shape.dimension, shape.dimension), scores,
                  expected_scores.subspan(h * shape.items, shape.items), top,
                  ranked.subspan(h * shape.ranked, shape.ranked));
  }
  return agreement;
}

int run(const std::string& folder) {
  const std::vector<std::byte> bytes =
      expect(read_file(folder + "/cases.json", std::uint64_t{1} << 20U));
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  bool good = true;
  std::printf("%-24s %9s %12s %14s %12s %8s %9s\n", "largest relative error", "histories",
              "hidden, norm", "hidden, element", "score", "swapped", "different");
  for (const auto& description : nlohmann::json::parse(text, text + bytes.size())) {
    const parity::Agreement a = compare(folder, description);
    std::printf("%-24s %9zu %12.1e %15.1e %12.1e %8zu %9zu%s\n",
                description.at("name").get<std::string>().c_str(), a.histories, a.hidden_norm,
                a.hidden_element, a.score, a.swapped, a.different, a.good() ? "" : "  FAILED");
    good = good && a.good();
  }
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: parity FOLDER\n");
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "parity: %s: %s\n", argv[1], error.what());
    return 1;
  }
}
