// The kernels of every instruction set that this processor runs, against the scalar reference:
// integers are the same, what defines scores has the same bits, floats keep the stated bounds.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

namespace {

using pz::kernels::Table;

void require(bool held, const Table& table, const char* what) {
  if (held) return;
  std::fprintf(stderr, "%s: %s\n", table.name, what);
  std::abort();
}

// The input, read from front to back; zeros behind its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  // Any float at all, or, of most inputs, one of a usual size.
  float any() {
    std::uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  float usual() { return static_cast<float>(static_cast<std::int8_t>(byte())) / 16; }
  std::int8_t integer(int most) { return static_cast<std::int8_t>(byte() % (2 * most + 1) - most); }

  template <class T, class Function>
  std::vector<T> vector(std::size_t count, Function next) {
    std::vector<T> v(pz::kernels::padded(count) + pz::kernels::lanes);
    for (std::size_t i = 0; i < count; ++i) v[i] = next();
    return v;
  }
  std::vector<float> usuals(std::size_t count) {
    return vector<float>(count, [&] { return usual(); });
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }
bool close(float a, float b, float bound) {
  return same(a, b) || std::abs(a - b) <= bound * std::max({1.0f, std::abs(a), std::abs(b)});
}

template <int Bits>
void scans(Input& input, const Table& table, const Table& reference) {
  using Real = std::conditional_t<Bits == 8, float, std::uint16_t>;
  const auto real = [](float v) {
    if constexpr (Bits == 8)
      return v;
    else
      return pz::detail::bfloat16(v);
  };
  const std::size_t d = 1 + input.byte() % 80, panels = 1 + input.byte() % 20;
  const std::size_t all = panels * pz::kernels::panel_rows, count = 1 + input.byte() % 9;
  std::vector<std::uint8_t> bytes(panels * pz::kernels::panel_bytes<Bits>(d));
  std::vector<Real> scales, biases;
  for (std::size_t r = 0; r < all; ++r) {
    const auto row =
        input.vector<std::int8_t>(d, [&] { return input.integer(Bits == 8 ? 127 : 7); });
    pz::kernels::put_in_panel<Bits>(
        bytes.data() + r / pz::kernels::panel_rows * pz::kernels::panel_bytes<Bits>(d),
        r % pz::kernels::panel_rows, row.data(), d);
    scales.push_back(real(std::abs(input.usual()) / 16));
    biases.push_back(
        real(input.byte() % 8 == 0 ? std::numeric_limits<float>::quiet_NaN() : input.usual()));
  }
  const pz::kernels::PanelRows<Real> rows{bytes.data(), scales.data(), biases.data(), d,
                                          input.byte()};
  const int most = Bits == 8 ? std::min(table.query_limit, reference.query_limit) : 127;
  std::vector<std::vector<std::int8_t>> values;
  for (std::size_t q = 0; q < count; ++q)
    values.push_back(input.vector<std::int8_t>(d, [&] { return input.integer(most); }));
  const float limit = input.usual() * 8, margin = std::abs(input.usual());
  struct Found {
    std::vector<std::uint32_t> rows;
    std::vector<float> lower, upper;
  };
  const auto scan = [&](const Table& with, float at) {
    std::vector<Found> found(
        count, {std::vector<std::uint32_t>(all), std::vector<float>(all), std::vector<float>(all)});
    std::vector<pz::kernels::PanelQuery> queries(count);
    std::vector<pz::kernels::PanelQuery*> pointers;
    for (std::size_t q = 0; q < count; ++q) {
      std::int32_t sum = 0;
      for (const std::int8_t v : values[q]) sum += v;
      queries[q] = {values[q].data(), (Bits == 8 ? -128 : -8) * sum, 1.0f / 64, at, margin};
      queries[q].rows = found[q].rows.data();
      queries[q].lower = found[q].lower.data();
      queries[q].upper = found[q].upper.data();
      pointers.push_back(&queries[q]);
    }
    if constexpr (Bits == 8)
      with.scan_8bit(rows, 0, panels, &rows, pointers.data(), count);
    else
      with.scan_4bit(rows, 0, panels, &rows, pointers.data(), count);
    for (std::size_t q = 0; q < count; ++q) {
      found[q].rows.resize(queries[q].found);
      found[q].lower.resize(queries[q].found);
      found[q].upper.resize(queries[q].found);
    }
    return found;
  };
  // Rounding may decide about a score that lies on the limit, about no other.
  const float slack = 1e-5f * (std::abs(limit) + 64.0f * static_cast<float>(d));
  const auto got = scan(table, limit), more = scan(reference, limit - slack),
             fewer = scan(reference, limit + slack);
  for (std::size_t q = 0; q < count; ++q) {
    const auto within = [](const std::vector<std::uint32_t>& a,
                           const std::vector<std::uint32_t>& b) {
      return std::includes(a.begin(), a.end(), b.begin(), b.end());
    };
    require(within(more[q].rows, got[q].rows) && within(got[q].rows, fewer[q].rows), table,
            Bits == 8 ? "scan_8bit finds other rows" : "scan_4bit finds other rows");
    if (Bits == 4) continue;
    for (std::size_t i = 0, at = 0; i < got[q].rows.size(); ++i) {
      while (more[q].rows[at] != got[q].rows[i]) ++at;
      require(std::abs(got[q].lower[i] - more[q].lower[at]) <= slack &&
                  std::abs(got[q].upper[i] - more[q].upper[at]) <= slack,
              table, "scan_8bit has other bounds");
    }
  }
}

void rows_and_queries(Input& input, const Table& table, const Table& reference) {
  const std::size_t d = 1 + input.byte() % 150, count = 1 + input.byte() % 7;
  std::vector<std::vector<std::int8_t>> i8;
  std::vector<std::vector<float>> f32;
  std::vector<const std::int8_t*> i8_rows;
  std::vector<const float*> f32_rows;
  for (std::size_t r = 0; r < count; ++r) {
    i8.push_back(input.vector<std::int8_t>(d, [&] { return input.integer(127); }));
    f32.push_back(input.usuals(d));
  }
  for (std::size_t r = 0; r < count; ++r) {
    i8_rows.push_back(i8[r].data());
    f32_rows.push_back(f32[r].data());
  }
  const auto x = input.usuals(d);
  const std::vector<double> wide(x.begin(), x.end());
  std::vector<double> exact(count), exact_reference(count);
  table.dots_i8(i8_rows.data(), d, wide.data(), exact.data(), count);
  reference.dots_i8(i8_rows.data(), d, wide.data(), exact_reference.data(), count);
  require(exact == exact_reference, table, "dots_i8 differs");
  table.dots_f32(f32_rows.data(), d, wide.data(), exact.data(), count);
  reference.dots_f32(f32_rows.data(), d, wide.data(), exact_reference.data(), count);
  require(exact == exact_reference, table, "dots_f32 differs");
  std::vector<std::int8_t> q(pz::kernels::padded(d)), q_reference(q.size());
  std::int32_t sum = 0, sum_reference = 0;
  const float step = table.quantise(d, x.data(), 127, q.data(), sum);
  require(step == reference.quantise(d, x.data(), 127, q_reference.data(), sum_reference) &&
              q == q_reference && sum == sum_reference,
          table, "quantise differs");
  std::vector<std::int32_t> dots(count), dots_reference(count);
  table.row_dots(i8_rows.data(), d, q.data(), -128 * sum, dots.data(), count);
  reference.row_dots(i8_rows.data(), d, q.data(), -128 * sum, dots_reference.data(), count);
  require(dots == dots_reference, table, "row_dots differs");
}

void values(Input& input, const Table& table, const Table& reference) {
  const std::size_t n = 1 + input.byte() % 100, stride = pz::kernels::padded(n);
  const auto any = input.vector<float>(n, [&] { return input.any(); });
  const auto curve = [&](auto form, auto form_reference, float bound, const char* what) {
    auto a = any, b = any;
    form(n, a.data());
    form_reference(n, b.data());
    for (std::size_t i = 0; i < n; ++i) require(close(a[i], b[i], bound), table, what);
  };
  curve(table.tanh, reference.tanh, 1e-6f, "tanh differs");
  curve(table.sigmoid, reference.sigmoid, 1e-6f, "sigmoid differs");
  curve(table.gelu, reference.gelu, 3e-6f, "gelu differs");
  curve(table.relu, reference.relu, 0, "relu differs");

  auto candidates = any;
  candidates.resize(stride);
  std::fill(candidates.begin() + static_cast<std::ptrdiff_t>(n), candidates.end(),
            -std::numeric_limits<float>::infinity());
  const auto numbers = static_cast<std::size_t>(std::count_if(
      candidates.begin(), candidates.end(), [](float v) { return std::isfinite(v); }));
  if (numbers > 0) {
    const std::size_t k = 1 + input.byte() % numbers;
    const float low = -std::numeric_limits<float>::infinity();
    const float found = table.kth_largest(stride, candidates.data(), k, low);
    const float want = reference.kth_largest(stride, candidates.data(), k, low);
    require(static_cast<std::size_t>(std::count_if(candidates.begin(), candidates.end(),
                                                   [&](float v) { return v >= found; })) >= k,
            table, "fewer than k reach kth_largest");
    // A half below the least normal float is exact only within a fused multiply-add.
    require(same(found, want) || std::abs(found - want) <= std::numeric_limits<float>::min(), table,
            "kth_largest differs");
  }

  const auto inputs = input.usuals(3 * stride), recurrent = input.usuals(3 * stride);
  auto hidden = input.usuals(stride), hidden_reference = hidden;
  table.gru_gates(n, stride, inputs.data(), recurrent.data(), hidden.data());
  reference.gru_gates(n, stride, inputs.data(), recurrent.data(), hidden_reference.data());
  for (std::size_t i = 0; i < n; ++i)
    require(close(hidden[i], hidden_reference[i], 2e-5f), table, "gru_gates differs");

  const std::size_t blocks = 1 + input.byte() % 9, outputs = blocks * pz::kernels::lanes;
  const auto packed = input.usuals(n * outputs), bias = input.usuals(outputs);
  const auto x = input.usuals(n);
  std::vector<float> y(outputs), y_reference(outputs);
  // Sums of so few sixteenths' products are exact.
  table.matrix_vector(packed.data(), bias.data(), n, blocks, x.data(), y.data());
  reference.matrix_vector(packed.data(), bias.data(), n, blocks, x.data(), y_reference.data());
  require(y == y_reference, table, "matrix_vector differs");
  table.rows_vector(packed.data(), bias.data(), n, pz::kernels::lanes, x.data(), y.data());
  reference.rows_vector(packed.data(), bias.data(), n, pz::kernels::lanes, x.data(),
                        y_reference.data());
  require(y == y_reference, table, "rows_vector differs");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::size_t count = 0;
  const Table* const* const tables = pz::kernels::available(count);
  const Table& reference = *tables[count - 1];
  for (std::size_t t = 0; t + 1 < count; ++t) {
    Input input(data, size);
    switch (input.byte() % 4) {
      case 0:
        scans<8>(input, *tables[t], reference);
        break;
      case 1:
        scans<4>(input, *tables[t], reference);
        break;
      case 2:
        rows_and_queries(input, *tables[t], reference);
        break;
      default:
        values(input, *tables[t], reference);
    }
  }
  return 0;
}
