#include "convert/build.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

constexpr std::string_view pytorch_gates = "rzn";

struct Shape {
  std::uint64_t rows, columns;
};

std::string shape_text(std::uint64_t rows, std::uint64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

// An empty matrix of the element type; rows are added with resize_rows.
Matrix matrix_of(ElementType type, std::size_t rows, std::size_t columns) {
  Matrix m = Matrix::zeros(0, columns);
  if (type == ElementType::i8) m = m.quantised();
  m.resize_rows(rows);
  return m;
}

class Builder {
 public:
  Builder(TensorFile& file, const Mapping& mapping, ElementType type)
      : file_(file), mapping_(mapping), type_(type) {}

  void add_items(const Catalogue& catalogue) {
    const StringTable& ids = parts_.item_ids = catalogue.items.item_ids;
    const Shape input = shape_of(mapping_.embedding);
    choose_rows(input.rows, ids.size());
    const bool separate = mapping_.output && !same(*mapping_.output, mapping_.embedding);
    if (separate) {
      const Shape output = shape_of(*mapping_.output);
      if (output.rows != input.rows)
        throw Failure(file_.name + ": the embedding has " + std::to_string(input.rows) +
                      " rows, the output " + std::to_string(output.rows));
      parts_.item_vectors = item_rows(*mapping_.output, rows_, nullptr);
    }
    // The input gates of a one-hot model lie in the embedding and take their order from the GRU.
    const Layer* gates =
        !mapping_.layers.empty() && mapping_.layers[0].gate_input ? &mapping_.layers[0] : nullptr;
    if (gates && !separate)
      throw Failure(file_.name + ": an embedding of gates needs an output of its own");
    (separate ? parts_.input_vectors : parts_.item_vectors) =
        item_rows(mapping_.embedding, rows_, gates);
    parts_.biases.resize(ids.size());
    if (mapping_.output_bias) {
      const auto biases = vector(*mapping_.output_bias);
      if (biases.size() != input.rows)
        throw Failure(file_.name + ": tensor '" + mapping_.output_bias->tensor + "' has " +
                      std::to_string(biases.size()) + " values for " + std::to_string(input.rows) +
                      " rows");
      for (std::size_t i = 0; i < ids.size(); ++i)
        parts_.biases[i] = biases[static_cast<std::size_t>(rows_[i])];
    }
    parts_.statistics.resize(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const ItemInfo& info = catalogue.items.items[i];
      parts_.statistics[i] = {.interactions = info.interactions,
                              .first_timestamp = info.first.value_or(no_timestamp),
                              .last_timestamp = info.last.value_or(no_timestamp),
                              .creation_timestamp = info.creation_timestamp.value_or(no_timestamp)};
    }
  }

  void add_encoder() {
    parts_.operations.push_back({EncoderOp::Kind::embed_sum});
    width_ = parts_.inputs().columns();
    for (std::size_t l = 0; l < mapping_.layers.size(); ++l) {
      where_ = file_.name + ": layer " + std::to_string(l);
      add_layer(mapping_.layers[l]);
    }
  }

  void add_users(const StringTable& ids) {
    if (!mapping_.users) return;
    if (mapping_.layers.size() != 1 || mapping_.layers[0].type != Layer::Type::decay)
      throw Failure(file_.name + ": users are for a model whose only layer is decay");
    const Shape shape = shape_of(*mapping_.users);
    const std::size_t d = parts_.item_vectors.columns();
    if (ids.empty())
      throw Failure(file_.name + ": has " + std::to_string(shape.rows) +
                    " users; name them with --users users.csv, a row a user in the model's order");
    const std::uint64_t offset = mapping_.user_index_offset;
    if (shape.columns != d || shape.rows < offset || shape.rows - offset != ids.size())
      throw Failure(file_.name + ": users have shape " + shape_text(shape.rows, shape.columns) +
                    ", expected " + shape_text(ids.size() + offset, d) +
                    "; check --users and user_index_offset");
    parts_.user_ids = ids;
    std::vector<std::uint64_t> rows(ids.size());
    std::iota(rows.begin(), rows.end(), offset);
    // The hidden state of decay, then the query: before the first event, both are the vector.
    parts_.user_states = matrix_of(type_, ids.size(), 2 * d);
    std::vector<float> state(2 * d);
    for_each_row(*mapping_.users, rows, [&](std::size_t user, std::span<float> values) {
      std::copy(values.begin(), values.end(), state.begin());
      std::copy(values.begin(), values.end(), state.begin() + static_cast<std::ptrdiff_t>(d));
      parts_.user_states.set_row(user, state);
    });
  }

  // A value's embedding is the mean vector of its items, over the number of fields: an item that
  // has only metadata starts near the items with the same.
  void add_metadata(const std::vector<MetadataColumn>& columns) {
    const std::size_t d = parts_.item_vectors.columns();
    std::vector<float> row(d);
    for (const MetadataColumn& column : columns) {
      MetadataField field;
      field.name = column.name;
      field.numeric = column.numeric;
      field.boundaries = column.boundaries;
      field.vocabulary = column.vocabulary;
      const std::size_t values =
          column.numeric ? column.boundaries.size() + 1 : column.vocabulary.size();
      field.embedding = Matrix::zeros(values, d);
      std::vector<float> counts(values);
      for (std::size_t item = 0; item < column.values.size(); ++item) {
        if (column.values[item].empty()) continue;
        parts_.item_vectors.row(item, row);
        for (const std::uint32_t value : column.values[item]) {
          counts[value] += 1;
          for (std::size_t c = 0; c < d; ++c) field.embedding.f32()[value * d + c] += row[c];
        }
      }
      for (std::size_t value = 0; value < values; ++value)
        for (std::size_t c = 0; c < d; ++c)
          field.embedding.f32()[value * d + c] /=
              std::max(counts[value], 1.0f) * static_cast<float>(columns.size());
      parts_.fields.push_back(std::move(field));
    }
  }

  Built take(std::string metadata) {
    parts_.metadata = std::move(metadata);
    if (const auto checked = detail::check_parts(parts_, LoadLimits{}); !checked)
      throw Failure(file_.name + ": " + checked.error().message);
    return {std::move(parts_), std::move(rows_)};
  }

 private:
  // Leading dimensions of 1 dropped down to `rank`.
  static std::vector<std::uint64_t> squeezed(const Tensor& tensor, std::size_t rank) {
    std::vector<std::uint64_t> shape = tensor.shape;
    while (shape.size() > rank && shape.front() == 1) shape.erase(shape.begin());
    return shape;
  }

  Shape shape_of(const TensorPart& part) {
    const Tensor& tensor = file_.at(part.tensor);
    const auto shape = squeezed(tensor, 2);
    if (shape.size() != 2 || tensor.elements() == 0)
      throw Failure(file_.name + ": " + tensor.describe() + " is not a matrix");
    if (!part.slice) return part.transpose ? Shape{shape[1], shape[0]} : Shape{shape[0], shape[1]};
    if (part.transpose)
      throw Failure(file_.name + ": " + tensor.describe() + " is either transposed or a slice");
    const auto [first, last] = *part.slice;
    if (first >= last || last > shape[0]) refuse_slice(tensor, part);
    return {last - first, shape[1]};
  }

  // Which rows of the embedding are items, in order.
  void choose_rows(std::uint64_t rows, std::size_t items) {
    std::uint64_t offset = mapping_.index_offset;
    if (mapping_.padding_if_zero && rows == items + std::uint64_t{1} && first_row_is_zero())
      offset = 1;
    for (std::uint64_t row = offset; row < rows && rows_.size() <= items; ++row)
      if (row != mapping_.padding_row) rows_.push_back(row);
    if (!rows_.empty() && rows_.size() == items &&
        rows_.back() + 1 + (mapping_.padding_row == rows - 1) >= rows)
      return;
    throw Failure(file_.name + ": the embedding has " + std::to_string(rows) + " rows, " +
                  (offset > 0 ? "items begin at row " + std::to_string(offset) + ", " : "") +
                  "and there are " + std::to_string(items) +
                  " item ids; one row an item is needed: check the items file, index_offset and "
                  "padding_row");
  }

  bool first_row_is_zero() {
    if (mapping_.embedding.transpose) return false;
    std::vector<float> row(static_cast<std::size_t>(shape_of(mapping_.embedding).columns));
    TensorReader(file_, file_.at(mapping_.embedding.tensor)).read(row);
    return std::all_of(row.begin(), row.end(), [](float v) { return v == 0; });
  }

  // Whether two tensors hold the same values: a tied embedding that was saved twice.
  bool same(const TensorPart& a, const TensorPart& b) {
    const Shape shape = shape_of(a), other = shape_of(b);
    if (shape.rows != other.rows || shape.columns != other.columns) return false;
    if (a.slice || b.slice) return false;
    if (a.transpose != b.transpose) {
      const auto x = matrix({a}), y = matrix({b});
      return x.values == y.values;
    }
    return same_values(file_, file_.at(a.tensor), file_.at(b.tensor));
  }

  // Calls row(n, values) for the n-th of the chosen rows, which ascend.
  template <class Function>
  void for_each_row(const TensorPart& part, const std::vector<std::uint64_t>& rows, Function row) {
    const Tensor& tensor = file_.at(part.tensor);
    const Shape shape = shape_of(part);
    std::vector<float> values(static_cast<std::size_t>(shape.columns));
    if (part.transpose) {
      const auto all = read_values(file_, tensor);
      for (std::size_t n = 0; n < rows.size(); ++n) {
        for (std::size_t c = 0; c < values.size(); ++c)
          values[c] = all[static_cast<std::size_t>(c * shape.rows + rows[n])];
        row(n, std::span(values));
      }
      return;
    }
    TensorReader reader(file_, tensor);
    const std::uint64_t first = part.slice ? part.slice->first : 0;
    const std::size_t columns = values.size();
    const std::uint64_t in_block = std::max<std::uint64_t>(1, (1u << 16) / columns);
    std::size_t n = 0;
    for (std::uint64_t at = 0; n < rows.size();) {
      const std::uint64_t count = std::min(in_block, first + rows.back() + 1 - at);
      values.resize(static_cast<std::size_t>(count) * columns);
      reader.read(values);
      for (at += count; n < rows.size() && first + rows[n] < at; ++n)
        row(n, std::span(values).subspan(
                   static_cast<std::size_t>(first + rows[n] + count - at) * columns, columns));
    }
  }

  Matrix item_rows(const TensorPart& part, const std::vector<std::uint64_t>& rows,
                   const Layer* gates) {
    const Shape shape = shape_of(part);
    if (gates && shape.columns % 3 != 0)
      throw Failure(file_.name + ": the embedding's width is not that of three gates");
    Matrix m = matrix_of(type_, rows.size(), static_cast<std::size_t>(shape.columns));
    for_each_row(part, rows, [&](std::size_t n, std::span<float> values) {
      if (gates) {
        const auto ordered = reorder(*gates, {values.begin(), values.end()}, 1);
        m.set_row(n, ordered);
      } else {
        m.set_row(n, values);
      }
    });
    return m;
  }

  std::vector<float> vector(const TensorPart& part) { return vector(Weight{part}); }

  std::vector<float> vector(const Weight& weight) {
    std::vector<float> joined;
    for (const TensorPart& part : weight) {
      const Tensor& tensor = file_.at(part.tensor);
      const auto shape = squeezed(tensor, 1);
      auto values = read_values(file_, tensor);
      if (part.slice) slice(tensor, part, shape.empty() ? 1 : shape[0], values);
      joined.insert(joined.end(), values.begin(), values.end());
    }
    return joined;
  }

  [[noreturn]] void refuse_slice(const Tensor& tensor, const TensorPart& part) const {
    throw Failure(file_.name + ": " + tensor.describe() + " has no rows [" +
                  std::to_string(part.slice->first) + ", " + std::to_string(part.slice->second) +
                  ")");
  }

  void slice(const Tensor& tensor, const TensorPart& part, std::uint64_t rows,
             std::vector<float>& values) {
    const auto [first, last] = *part.slice;
    if (first >= last || last > rows) refuse_slice(tensor, part);
    const std::size_t stride = values.size() / static_cast<std::size_t>(rows);
    values.erase(values.begin() + static_cast<std::ptrdiff_t>(last * stride), values.end());
    values.erase(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(first * stride));
  }

  struct Loaded {
    std::size_t rows = 0, columns = 0;
    std::vector<float> values;
  };

  Loaded matrix(const Weight& weight) {
    Loaded joined;
    for (const TensorPart& part : weight) {
      const Tensor& tensor = file_.at(part.tensor);
      const auto shape = squeezed(tensor, 2);
      if (shape.size() > 2 || shape.empty() || tensor.elements() == 0)
        throw Failure(file_.name + ": " + tensor.describe() + " is not a matrix");
      auto values = read_values(file_, tensor);
      if (part.slice) slice(tensor, part, shape[0], values);
      std::size_t columns = shape.size() == 2 ? static_cast<std::size_t>(shape[1]) : 1;
      std::size_t rows = values.size() / columns;
      if (part.transpose) {
        std::vector<float> turned(values.size());
        for (std::size_t r = 0; r < rows; ++r)
          for (std::size_t c = 0; c < columns; ++c) turned[c * rows + r] = values[r * columns + c];
        values = std::move(turned);
        std::swap(rows, columns);
      }
      if (!joined.values.empty() && columns != joined.columns)
        throw Failure(file_.name + ": " + tensor.describe() +
                      " is not as wide as the tensor it is joined to");
      joined.columns = columns;
      joined.rows += rows;
      joined.values.insert(joined.values.end(), values.begin(), values.end());
    }
    return joined;
  }

  const Weight* weight(const Layer& layer, const char* role) const {
    const auto found = layer.weights.find(role);
    return found == layer.weights.end() ? nullptr : &found->second;
  }
  const Weight& required(const Layer& layer, const char* role) const {
    if (const Weight* found = weight(layer, role)) return *found;
    throw Failure(where_ + ": needs a tensor for " + role);
  }

  void add_matrix(const Loaded& loaded) {
    Matrix m = Matrix::zeros(loaded.rows, loaded.columns);
    std::copy(loaded.values.begin(), loaded.values.end(), m.f32().begin());
    parts_.weights.push_back(std::move(m));
  }
  void add_row(std::vector<float> values) {
    const std::size_t size = values.size();
    add_matrix({1, size, std::move(values)});
  }
  void add_bias(const Layer& layer, const char* role, std::size_t size) {
    const Weight* given = weight(layer, role);
    auto values = given ? vector(*given) : std::vector<float>(size);
    if (values.size() != size)
      throw Failure(where_ + ": " + role + " has " + std::to_string(values.size()) +
                    " values, expected " + std::to_string(size));
    add_row(layer.type == Layer::Type::gru ? reorder(layer, std::move(values), 1)
                                           : std::move(values));
  }

  // Three gate blocks into PyTorch's order and meaning; sigmoid(-a) = 1 - sigmoid(a).
  static std::vector<float> reorder(const Layer& layer, std::vector<float> values,
                                    std::size_t columns) {
    const std::size_t block = values.size() / 3 / columns * columns;
    std::vector<float> ordered(values.size());
    for (std::size_t from = 0; from < 3; ++from) {
      const std::size_t to = pytorch_gates.find(layer.gate_order[from]);
      const float sign = layer.gate_order[from] == 'z' && !layer.update_keeps ? -1.0f : 1.0f;
      for (std::size_t i = 0; i < block; ++i)
        ordered[to * block + i] = sign * values[from * block + i];
    }
    return ordered;
  }

  void add_gates(const Layer& layer, const char* role, std::size_t columns, std::size_t rows) {
    Loaded loaded = matrix(required(layer, role));
    if (loaded.columns != columns || loaded.rows % 3 != 0 || (rows != 0 && loaded.rows != rows))
      throw Failure(where_ + ": " + role + " has shape " + shape_text(loaded.rows, loaded.columns) +
                    ", expected [3 x hidden, " + std::to_string(columns) + "]; is it transposed?");
    loaded.values = reorder(layer, std::move(loaded.values), loaded.columns);
    add_matrix(loaded);
  }

  void add_gru(const Layer& layer) {
    const Loaded recurrent = matrix(required(layer, "w_hh"));
    const std::size_t hidden = recurrent.columns;
    std::uint32_t form = layer.reset_after ? 0 : GruForm::reset_before;
    if (layer.gate_input) {
      form |= GruForm::gate_input;
      if (width_ != 3 * hidden)
        throw Failure(where_ + ": gates of " + std::to_string(width_ / 3) +
                      " values for a hidden state of " + std::to_string(hidden));
    }
    parts_.operations.push_back({EncoderOp::Kind::gru, form});
    if (!layer.gate_input) add_gates(layer, "w_ih", width_, 3 * hidden);
    add_gates(layer, "w_hh", hidden, 3 * hidden);
    add_bias(layer, "b_ih", 3 * hidden);
    add_bias(layer, "b_hh", 3 * hidden);
    width_ = hidden;
  }

  // LRURec's parameters: rows nu, theta, gamma of params_log; in_proj and out_proj complex, with a
  // last dimension of 2.
  void add_lru(const Layer& layer) {
    const Loaded logs = matrix(required(layer, "params_log"));
    const auto complex = [&](const char* role, std::size_t rows, std::size_t columns) {
      const Weight& given = required(layer, role);
      const Tensor& tensor = file_.at(given[0].tensor);
      if (given.size() != 1 || tensor.shape != std::vector<std::uint64_t>{rows, columns, 2})
        throw Failure(where_ + ": " + tensor.describe() + " is not [" + std::to_string(rows) +
                      ", " + std::to_string(columns) + "] complex numbers");
      return read_values(file_, tensor);
    };
    const std::size_t pairs = logs.columns;
    if (logs.rows != 3) throw Failure(where_ + ": params_log is not [3, hidden]");
    std::vector<float> lambda(2 * pairs), gamma(pairs);
    for (std::size_t j = 0; j < pairs; ++j) {
      double size = std::exp(-std::exp(static_cast<double>(logs.values[j])));
      const double angle = std::exp(static_cast<double>(logs.values[pairs + j]));
      gamma[j] = std::exp(logs.values[2 * pairs + j]);
      if (!std::isfinite(angle) || !std::isfinite(gamma[j]))
        throw Failure(where_ + ": params_log " + std::to_string(j) + " is too large to be a log");
      float &real = lambda[j], &imaginary = lambda[pairs + j];
      do {  // rounding must not take lambda out of the unit circle, where states grow without end
        real = static_cast<float>(size * std::cos(angle));
        imaginary = static_cast<float>(size * std::sin(angle));
        size *= 1 - 0x1p-24;
      } while (double{real} * double{real} + double{imaginary} * double{imaginary} > 1);
    }
    const auto input = complex("in_proj", pairs, width_);
    Loaded in{2 * pairs, width_, std::vector<float>(2 * pairs * width_)};
    for (std::size_t j = 0; j < pairs; ++j)
      for (std::size_t c = 0; c < width_; ++c)
        for (std::size_t part = 0; part < 2; ++part)
          in.values[(part * pairs + j) * width_ + c] =
              gamma[j] * input[(j * width_ + c) * 2 + part];
    std::vector<float> bias(2 * pairs);
    if (const Weight* given = weight(layer, "in_bias")) {
      const auto values = vector(*given);
      if (values.size() != 2 * pairs) throw Failure(where_ + ": in_bias has another length");
      for (std::size_t j = 0; j < pairs; ++j)
        for (std::size_t part = 0; part < 2; ++part)
          bias[part * pairs + j] = gamma[j] * values[2 * j + part];
    }
    parts_.operations.push_back({EncoderOp::Kind::lru});
    add_row(std::move(lambda));
    add_matrix(in);
    add_row(std::move(bias));

    const Tensor& out_tensor = file_.at(required(layer, "out_proj")[0].tensor);
    const auto rows = static_cast<std::size_t>(out_tensor.shape.empty() ? 0 : out_tensor.shape[0]);
    const auto output = complex("out_proj", rows, pairs);
    Loaded out{rows, 2 * pairs, std::vector<float>(rows * 2 * pairs)};
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t j = 0; j < pairs; ++j) {
        out.values[r * 2 * pairs + j] = output[(r * pairs + j) * 2];
        out.values[r * 2 * pairs + pairs + j] = -output[(r * pairs + j) * 2 + 1];
      }
    std::vector<float> out_bias(rows);
    if (const Weight* given = weight(layer, "out_bias")) {
      const auto values = vector(*given);
      if (values.size() != 2 * rows) throw Failure(where_ + ": out_bias has another length");
      for (std::size_t r = 0; r < rows; ++r) out_bias[r] = values[2 * r];
    }
    parts_.operations.push_back({EncoderOp::Kind::linear});
    add_matrix(out);
    add_row(std::move(out_bias));
    width_ = rows;
  }

  void add_layer(const Layer& layer) {
    using Kind = EncoderOp::Kind;
    switch (layer.type) {
      case Layer::Type::gru:
        add_gru(layer);
        break;
      case Layer::Type::lru:
        add_lru(layer);
        break;
      case Layer::Type::linear: {
        const Loaded loaded = matrix(required(layer, "weight"));
        if (loaded.columns != width_)
          throw Failure(where_ + ": weight has shape " + shape_text(loaded.rows, loaded.columns) +
                        ", expected [outputs, " + std::to_string(width_) + "]; is it transposed?");
        parts_.operations.push_back({Kind::linear});
        add_matrix(loaded);
        add_bias(layer, "bias", loaded.rows);
        width_ = loaded.rows;
        break;
      }
      case Layer::Type::layer_norm:
        parts_.operations.push_back({Kind::layer_norm});
        required(layer, "weight");
        add_bias(layer, "weight", width_);
        add_bias(layer, "bias", width_);
        break;
      case Layer::Type::activation: {
        constexpr std::array<std::string_view, 4> names{"sigmoid", "tanh", "relu", "gelu"};
        const auto at = std::find(names.begin(), names.end(), layer.function) - names.begin();
        parts_.operations.push_back({Kind::activation, static_cast<std::uint32_t>(at + 1)});
        break;
      }
      case Layer::Type::save:
        parts_.operations.push_back({Kind::save, layer.slot});
        break;
      case Layer::Type::add:
        parts_.operations.push_back({Kind::add, layer.slot});
        break;
      case Layer::Type::decay:
        parts_.operations.push_back({Kind::decay});
        add_row(std::vector<float>(width_, static_cast<float>(layer.keep)));
        add_row(std::vector<float>(width_, static_cast<float>(layer.take)));
        break;
    }
  }

  TensorFile& file_;
  const Mapping& mapping_;
  ElementType type_;
  ModelParts parts_;
  std::vector<std::uint64_t> rows_;
  std::size_t width_ = 0;
  std::string where_;
};

}  // namespace

Built build_model(TensorFile& file, const Mapping& mapping, const Catalogue& catalogue,
                  ElementType element_type) {
  Builder builder(file, mapping, element_type);
  builder.add_items(catalogue);
  builder.add_encoder();
  builder.add_users(catalogue.user_ids);
  builder.add_metadata(catalogue.items.metadata);
  const std::size_t slash = file.name.find_last_of('/');
  nlohmann::json metadata = {
      {"recipe", "converted"},
      {"provenance",
       {{"source", file.name.substr(slash == std::string::npos ? 0 : slash + 1)},
        {"format", file.format},
        {"architecture", mapping.architecture}}}};
  if (catalogue.items.interactions > 0)
    metadata["data"] = {{"interactions", catalogue.items.interactions},
                        {"first_timestamp", catalogue.items.first_timestamp},
                        {"last_timestamp", catalogue.items.last_timestamp}};
  return builder.take(metadata.dump());
}

}  // namespace personalize::tools
