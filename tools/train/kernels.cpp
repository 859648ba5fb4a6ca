#include "train/kernels.hpp"

#include <bit>
#include <cmath>

#include "data/random.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

// ifunc resolvers run before a sanitizer's runtime is ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PERSONALIZE_KERNEL \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define PERSONALIZE_KERNEL
#endif
#define TRAIN_INLINE __attribute__((always_inline)) inline

namespace personalize::tools {
namespace {

// e^x, relative error below 2e-7, branch-free so that loops over it vectorise (Cephes' polynomial).
TRAIN_INLINE float exponential(float x) noexcept {
  x = x < -87.0F ? -87.0F : x;
  x = x > 88.0F ? 88.0F : x;
  // 1.5 * 2^23: adding it rounds to an integer held in the low bits.
  constexpr float magic = 12582912.0F;
  const float t = x * 1.44269504088896341F + magic;
  const float n = t - magic;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) +
                              (std::bit_cast<std::uint32_t>(t) << 23U));
}

TRAIN_INLINE float sigmoid(float x) noexcept { return 1.0F / (1.0F + exponential(-x)); }
TRAIN_INLINE float hyperbolic_tangent(float x) noexcept {
  return 1.0F - 2.0F / (exponential(2.0F * x) + 1.0F);
}

constexpr std::size_t lanes = 32;  // independent partial sums, so that the reductions vectorise

}  // namespace

PERSONALIZE_KERNEL void gru_step(float* input, const float* hidden, const float* previous,
                                 float* next, std::size_t rows, std::size_t h) noexcept {
  for (std::size_t row = 0; row < rows; ++row) {
    float* __restrict r = input + row * 3 * h;
    float* __restrict z = r + h;
    float* __restrict n = z + h;
    const float* __restrict hr = hidden + row * 3 * h;
    const float* __restrict hz = hr + h;
    const float* __restrict hn = hz + h;
    const float* __restrict p = previous + row * h;
    float* __restrict y = next + row * h;
    for (std::size_t i = 0; i < h; ++i) {
      const float gr = sigmoid(r[i] + hr[i]);
      const float gz = sigmoid(z[i] + hz[i]);
      const float gn = hyperbolic_tangent(n[i] + gr * hn[i]);
      r[i] = gr;
      z[i] = gz;
      n[i] = gn;
      y[i] = gn + gz * (p[i] - gn);
    }
  }
}

PERSONALIZE_KERNEL void gru_step_gradient(const float* gates, const float* hidden_n,
                                          const float* previous, const float* d_output,
                                          float* carry, float* d_input, float* d_hidden,
                                          std::size_t rows, std::size_t h) noexcept {
  for (std::size_t row = 0; row < rows; ++row) {
    const float* __restrict r = gates + row * 3 * h;
    const float* __restrict z = r + h;
    const float* __restrict n = z + h;
    const float* __restrict hn = hidden_n + row * 3 * h;
    const float* __restrict p = previous + row * h;
    const float* __restrict dy = d_output + row * h;
    float* __restrict c = carry + row * h;
    float* __restrict di = d_input + row * 3 * h;
    float* __restrict dh = d_hidden + row * 3 * h;
    for (std::size_t i = 0; i < h; ++i) {
      const float d = dy[i] + c[i];
      const float dn = d * (1.0F - z[i]) * (1.0F - n[i] * n[i]);
      const float dz = d * (p[i] - n[i]) * z[i] * (1.0F - z[i]);
      const float dr = dn * hn[i] * r[i] * (1.0F - r[i]);
      di[i] = dr;
      di[h + i] = dz;
      di[2 * h + i] = dn;
      dh[i] = dr;
      dh[h + i] = dz;
      dh[2 * h + i] = dn * r[i];
      c[i] = d * z[i];
    }
  }
}

PERSONALIZE_KERNEL float softmax_cross_entropy(float* scores, const float* bias, std::size_t n,
                                               std::size_t target, float scale) noexcept {
  const std::size_t whole = n - n % lanes;
  float maxima[lanes];
  for (float& m : maxima) m = -INFINITY;
  for (std::size_t i = 0; i < whole; i += lanes)
    for (std::size_t l = 0; l < lanes; ++l) {
      const float s = scores[i + l] + bias[i + l];
      scores[i + l] = s;
      maxima[l] = maxima[l] < s ? s : maxima[l];
    }
  float maximum = -INFINITY;
  for (std::size_t i = whole; i < n; ++i) {
    scores[i] += bias[i];
    maximum = maximum < scores[i] ? scores[i] : maximum;
  }
  for (const float m : maxima) maximum = maximum < m ? m : maximum;

  const float target_score = scores[target];
  float sums[lanes] = {};
  for (std::size_t i = 0; i < whole; i += lanes)
    for (std::size_t l = 0; l < lanes; ++l) {
      const float e = exponential(scores[i + l] - maximum);
      scores[i + l] = e;
      sums[l] += e;
    }
  float sum = 0;
  for (std::size_t i = whole; i < n; ++i) {
    scores[i] = exponential(scores[i] - maximum);
    sum += scores[i];
  }
  for (const float s : sums) sum += s;

  const float factor = scale / sum;
  for (std::size_t i = 0; i < n; ++i) scores[i] *= factor;
  scores[target] -= scale;
  return std::log(sum) + maximum - target_score;
}

PERSONALIZE_KERNEL void dropout(const float* in, float* out, std::size_t n, float p,
                                std::uint64_t seed) noexcept {
  const auto threshold = static_cast<std::uint32_t>(std::lround(p * 65536.0F));
  const float keep = 65536.0F / static_cast<float>(65536U - threshold);
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const std::uint64_t bits = mix(seed + i);
    for (std::size_t l = 0; l < 4; ++l)
      out[i + l] = in[i + l] * ((bits >> (16U * l) & 0xFFFFU) < threshold ? 0.0F : keep);
  }
  const std::uint64_t bits = mix(seed + i);
  for (std::size_t l = 0; i + l < n; ++l)
    out[i + l] = in[i + l] * ((bits >> (16U * l) & 0xFFFFU) < threshold ? 0.0F : keep);
}

PERSONALIZE_KERNEL void adamw(float* parameter, const float* gradient, float* first_moment,
                              float* second_moment, std::size_t n, const AdamStep& step) noexcept {
  const float decay = 1.0F - step.learning_rate * step.weight_decay;
  const float rate = step.learning_rate / step.correction1;
  const float root = 1.0F / std::sqrt(step.correction2);
  const float b1 = step.beta1;
  const float b2 = step.beta2;
  const float scale = step.gradient_scale;
  const float epsilon = step.epsilon;
  float* __restrict x = parameter;
  float* __restrict m = first_moment;
  float* __restrict v = second_moment;
  for (std::size_t i = 0; i < n; ++i) {
    const float g = gradient[i] * scale;
    m[i] = b1 * m[i] + (1.0F - b1) * g;
    v[i] = b2 * v[i] + (1.0F - b2) * g * g;
    x[i] = x[i] * decay - rate * m[i] / (std::sqrt(v[i]) * root + epsilon);
  }
}

}  // namespace personalize::tools
