// The elementwise loops of training on raw pointers, without libtorch: GRU gates, softmax, dropout,
// AdamW.
#pragma once

#include <cstddef>
#include <cstdint>

namespace personalize::tools {

// One GRU step for `rows` sequences of width `h`, PyTorch's gate order r, z, n.
// input:  x W_ih^T + b_ih [rows, 3h] in; the activations r, z, n out.
// hidden: h W_hh^T + b_hh [rows, 3h].
// previous: the state before the step; next: the state after it.
void gru_step(float* input, const float* hidden, const float* previous, float* next,
              std::size_t rows, std::size_t h) noexcept;

// Its gradient. gates: r, z, n as gru_step left them [rows, 3h]; hidden_n: the n columns of
// `hidden` of the forward step, row stride 3h. carry: dL/d(next) from later steps in, the direct
// part z * dL/d(next) out. d_output: dL/d(next) of the step's own output. d_input, d_hidden [rows,
// 3h].
void gru_step_gradient(const float* gates, const float* hidden_n, const float* previous,
                       const float* d_output, float* carry, float* d_input, float* d_hidden,
                       std::size_t rows, std::size_t h) noexcept;

// scores [n] in, scale * (softmax(scores + bias) - onehot(target)) out; returns -log
// softmax(target).
float softmax_cross_entropy(float* scores, const float* bias, std::size_t n, std::size_t target,
                            float scale) noexcept;

// out[i] = in[i] / (1 - p) or 0, decided by a hash of (seed, i): the gradient needs no stored mask.
void dropout(const float* in, float* out, std::size_t n, float p, std::uint64_t seed) noexcept;

struct AdamStep {
  float learning_rate, weight_decay, beta1 = 0.9F, beta2 = 0.999F, epsilon = 1e-8F;
  float correction1, correction2;  // 1 - beta^step
  float gradient_scale = 1;        // < 1 where the gradient's norm is clipped
};
// AdamW (Loshchilov and Hutter 2019), decoupled weight decay.
void adamw(float* parameter, const float* gradient, float* first_moment, float* second_moment,
           std::size_t n, const AdamStep& step) noexcept;

}  // namespace personalize::tools
