#include "train/gru.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "train/kernels.hpp"

namespace personalize::tools {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::size_t index(std::int64_t n) { return static_cast<std::size_t>(n); }

void clear_rows(float* rows, const std::uint8_t* reset, std::int64_t batch, std::int64_t width) {
  for (std::int64_t b = 0; b < batch; ++b)
    if (reset[b] != 0) std::fill_n(rows + b * width, width, 0.0F);
}

struct GruFunction : torch::autograd::Function<GruFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x_any,
                            const at::Tensor& state, const at::Tensor& w_ih, const at::Tensor& w_hh,
                            const at::Tensor& b_ih, const at::Tensor& b_hh,
                            const at::Tensor& reset) {
    const at::Tensor x = x_any.contiguous();
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t h = w_hh.size(1);
    at::Tensor gates =
        at::addmm(b_ih, x.view({steps * batch, x.size(2)}), w_ih.t()).view({steps, batch, 3 * h});
    at::Tensor hidden = at::empty({steps, batch, 3 * h}, x.options());
    at::Tensor previous = at::empty({steps, batch, h}, x.options());
    at::Tensor output = at::empty({steps, batch, h}, x.options());
    const at::Tensor w_hh_t = w_hh.t();
    const std::uint8_t* begins = reset.data_ptr<std::uint8_t>();
    for (std::int64_t t = 0; t < steps; ++t) {
      at::Tensor before = previous[t];
      before.copy_(t == 0 ? state : output[t - 1]);
      clear_rows(before.data_ptr<float>(), begins + t * batch, batch, h);
      at::Tensor product = hidden[t];
      at::addmm_out(product, b_hh, before, w_hh_t);
      float* in = gates[t].data_ptr<float>();
      const float* hid = product.data_ptr<float>();
      const float* old = before.data_ptr<float>();
      float* out = output[t].data_ptr<float>();
      gru_step(in, hid, old, out, index(batch), index(h));
    }
    context->save_for_backward({x, w_ih, w_hh, reset, gates, hidden, previous});
    return output;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor& w_ih = saved[1];
    const at::Tensor& w_hh = saved[2];
    const at::Tensor& reset = saved[3];
    const at::Tensor& gates = saved[4];
    const at::Tensor& hidden = saved[5];
    const at::Tensor& previous = saved[6];
    const at::Tensor d_output = gradients[0].contiguous();
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t h = w_hh.size(1);
    at::Tensor d_input = at::empty_like(gates);
    at::Tensor d_hidden = at::empty_like(gates);
    at::Tensor carry = at::zeros({batch, h}, x.options());
    const std::uint8_t* begins = reset.data_ptr<std::uint8_t>();
    for (std::int64_t t = steps; t-- > 0;) {
      const float* gate = gates[t].data_ptr<float>();
      const float* hidden_n = hidden[t].data_ptr<float>() + 2 * h;
      const float* old = previous[t].data_ptr<float>();
      const float* dy = d_output[t].data_ptr<float>();
      float* di = d_input[t].data_ptr<float>();
      at::Tensor d_product = d_hidden[t];
      float* dh = d_product.data_ptr<float>();
      float* c = carry.data_ptr<float>();
      gru_step_gradient(gate, hidden_n, old, dy, c, di, dh, index(batch), index(h));
      carry.addmm_(d_product, w_hh);
      clear_rows(c, begins + t * batch, batch, h);
    }
    const at::Tensor di = d_input.view({steps * batch, 3 * h});
    const at::Tensor dh = d_hidden.view({steps * batch, 3 * h});
    const at::Tensor flat = x.view({steps * batch, x.size(2)});
    return {at::mm(di, w_ih).view(x.sizes()),
            carry,
            at::mm(di.t(), flat),
            at::mm(dh.t(), previous.view({steps * batch, h})),
            di.sum(0),
            dh.sum(0),
            at::Tensor()};
  }
};

at::Tensor apply_dropout(const at::Tensor& x_any, double p, std::uint64_t seed) {
  const at::Tensor x = x_any.contiguous();
  at::Tensor y = at::empty_like(x);
  dropout(x.data_ptr<float>(), y.data_ptr<float>(), index(x.numel()), static_cast<float>(p), seed);
  return y;
}

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, double p,
                            std::int64_t seed) {
    context->saved_data["p"] = p;
    context->saved_data["seed"] = seed;
    return apply_dropout(x, p, static_cast<std::uint64_t>(seed));
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto seed = static_cast<std::uint64_t>(context->saved_data["seed"].toInt());
    return {apply_dropout(gradients[0], context->saved_data["p"].toDouble(), seed), at::Tensor(),
            at::Tensor()};
  }
};

}  // namespace

at::Tensor gru(const at::Tensor& x, const at::Tensor& state, const at::Tensor& w_ih,
               const at::Tensor& w_hh, const at::Tensor& b_ih, const at::Tensor& b_hh,
               const at::Tensor& reset) {
  return GruFunction::apply(x, state, w_ih, w_hh, b_ih, b_hh, reset);
}

at::Tensor seeded_dropout(const at::Tensor& x, double p, std::uint64_t seed) {
  return DropoutFunction::apply(x, p, static_cast<std::int64_t>(seed));
}

}  // namespace personalize::tools
