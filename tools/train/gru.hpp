// A gated recurrent unit over time-major sequences with a manual gradient; faster than
// torch::nn::GRU on CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace personalize::tools {

// x [T, B, in], state [B, H], W_ih [3H, in], W_hh [3H, H], b_ih [3H], b_hh [3H] (gate order r, z,
// n); reset: uint8 [T, B], nonzero where a sequence begins: the state before that step is zero.
// Returns the states after each step [T, B, H]; the last one is the state to carry on.
at::Tensor gru(const at::Tensor& x, const at::Tensor& state, const at::Tensor& w_ih,
               const at::Tensor& w_hh, const at::Tensor& b_ih, const at::Tensor& b_hh,
               const at::Tensor& reset);

// Dropout decided by a hash of (seed, position); see kernels.hpp.
at::Tensor seeded_dropout(const at::Tensor& x, double p, std::uint64_t seed);

}  // namespace personalize::tools
