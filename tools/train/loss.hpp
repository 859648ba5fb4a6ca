// Cross-entropy over the whole catalogue in bounded memory.
#pragma once

#include <ATen/core/Tensor.h>

namespace personalize::tools {

// Mean over the rows with target >= 0 of -log softmax(hidden . vectors^T + bias)[target]; the other
// rows count for nothing. hidden [n, d], vectors [N, d], bias [N], target int64 [n]. The gradient
// is taken together with the loss, a block of rows at a time, so that n * N scores never exist at
// once.
at::Tensor catalogue_cross_entropy(const at::Tensor& hidden, const at::Tensor& vectors,
                                   const at::Tensor& bias, const at::Tensor& target,
                                   std::int64_t rows_per_block = 0 /* 0: by size */);

}  // namespace personalize::tools
