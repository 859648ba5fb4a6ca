#include "train/loss.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "train/kernels.hpp"

namespace personalize::tools {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// 8 MiB: stays within the last-level cache.
constexpr std::int64_t scores_per_block = std::int64_t{1} << 21;

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden_any,
                            const at::Tensor& vectors, const at::Tensor& bias,
                            const at::Tensor& target, std::int64_t rows_per_block) {
    const at::Tensor hidden = hidden_any.contiguous();
    const std::int64_t n = hidden.size(0);
    const std::int64_t items = vectors.size(0);
    const std::int64_t* targets = target.data_ptr<std::int64_t>();
    const auto counted = std::count_if(targets, targets + n, [](std::int64_t t) { return t >= 0; });
    const float scale = counted > 0 ? 1.0F / static_cast<float>(counted) : 0.0F;
    if (rows_per_block == 0) rows_per_block = std::max<std::int64_t>(64, scores_per_block / items);
    rows_per_block = std::min(rows_per_block, n);

    at::Tensor d_hidden = at::empty_like(hidden);
    at::Tensor d_vectors = at::zeros_like(vectors);
    at::Tensor d_bias = at::zeros_like(bias);
    at::Tensor block = at::empty({rows_per_block, items}, hidden.options());
    const at::Tensor ones = at::ones({rows_per_block}, hidden.options());
    const at::Tensor vectors_t = vectors.t();
    const float* b = bias.data_ptr<float>();
    double total = 0;
    for (std::int64_t begin = 0; begin < n; begin += rows_per_block) {
      const std::int64_t rows = std::min(rows_per_block, n - begin);
      at::Tensor scores = block.narrow(0, 0, rows);
      const at::Tensor h = hidden.narrow(0, begin, rows);
      at::mm_out(scores, h, vectors_t);
      float* s = scores.data_ptr<float>();
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t t = targets[begin + row];
        float* out = s + row * items;
        if (t < 0) {
          std::fill_n(out, items, 0.0F);
          continue;
        }
        total += static_cast<double>(softmax_cross_entropy(out, b, static_cast<std::size_t>(items),
                                                           static_cast<std::size_t>(t), scale));
      }
      at::Tensor d_rows = d_hidden.narrow(0, begin, rows);
      at::mm_out(d_rows, scores, vectors);
      d_vectors.addmm_(scores.t(), h);
      d_bias.addmv_(scores.t(), ones.narrow(0, 0, rows));
    }
    context->save_for_backward({d_hidden, d_vectors, d_bias});
    return at::full({}, total * static_cast<double>(scale), hidden.options());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const float factor = gradients[0].item<float>();
    variable_list result{saved[0], saved[1], saved[2], at::Tensor(), at::Tensor()};
    if (factor != 1.0F)
      for (std::size_t i = 0; i < 3; ++i) result[i] = saved[i] * factor;
    return result;
  }
};

}  // namespace

at::Tensor catalogue_cross_entropy(const at::Tensor& hidden, const at::Tensor& vectors,
                                   const at::Tensor& bias, const at::Tensor& target,
                                   std::int64_t rows_per_block) {
  return CrossEntropyFunction::apply(hidden, vectors, bias, target, rows_per_block);
}

}  // namespace personalize::tools
