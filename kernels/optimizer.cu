// AdamW and SGD over a list of tensors: unscaling, clipping, the update and the low-precision copy in one pass.
//
//   unless found_inf:
//       g      = gradient * (clip_coef / grad_scale)
//       AdamW  m = fma(1 - beta1, g - m, m);   v = fma((1 - beta2) * g, g, beta2 * v)
//              weight = fma(-lr / (1 - beta1^step), m / fma(sqrt(v), 1 / sqrt(1 - beta2^step), eps), weight * (1 - lr * decay))
//       SGD    g = fma(decay, weight, g);   velocity = fma(momentum, velocity, g)
//              weight = fma(-lr, nesterov ? fma(momentum, velocity, g) : velocity, weight)
//       model  = round(weight)
//       last block: steps += 1
//
// Coefficients are computed in f64 and rounded once, by one thread of each block, from hyper-parameters, step count, clip
// coefficient, loss scale and skip flag that all lie on the device: nothing of a step waits for the host, and a captured
// graph goes on with its next step when it is replayed. The arithmetic is src/reference.rs, bit for bit.
//
// Cost of AdamW with f32 gradients: 16 bytes read and 12 written an element, 2 more for a 16-bit model copy.
// Source: Loshchilov & Hutter 2019, and PyTorch's order of operations as src/reference.rs states it.
#include "optimizer.cuh"

// src/abi/optimizer.rs: AdamWRule
struct AdamWRule {
  double lr, beta1, beta2, eps, weight_decay;
};
static_assert(sizeof(AdamWRule) == 40, "src/abi/optimizer.rs");

// src/abi/optimizer.rs: SgdRule
struct SgdRule {
  double lr, momentum, weight_decay;
  uint32_t nesterov;
  uint32_t padding;
};
static_assert(sizeof(SgdRule) == 32, "src/abi/optimizer.rs");

// base^exponent by squaring, from the lowest bit on: `power` of src/reference.rs.
DEVICE double power_of(double base, uint64_t exponent) {
  double product = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) product *= base;
    base *= base;
  }
  return product;
}

struct AdamW {
  static constexpr uint32_t STATES = 2;
  float factor, beta1_rest, beta2, beta2_rest, correction, eps, step_size, decay;

  MEMBER bool keeps_state() const { return true; }
  MEMBER float update(float gradient, float weight, float (&states)[STATES], bool decays) const {
    const float g = gradient * factor;
    const float m = fmaf(beta1_rest, g - states[0], states[0]);
    const float v = fmaf(beta2_rest * g, g, beta2 * states[1]);
    const float denominator = fmaf(__fsqrt_rn(v), correction, eps);
    states[0] = m;
    states[1] = v;
    return fmaf(-step_size, __fdiv_rn(m, denominator), decays ? weight * decay : weight);
  }
};

DEVICE AdamW coefficients(const AdamWRule& rule, const StepSignal* signal, uint64_t step) {
  AdamW adamw;
  adamw.factor = factor_of(signal);
  adamw.beta1_rest = static_cast<float>(1.0 - rule.beta1);
  adamw.beta2 = static_cast<float>(rule.beta2);
  adamw.beta2_rest = static_cast<float>(1.0 - rule.beta2);
  adamw.correction = static_cast<float>(1.0 / sqrt(1.0 - power_of(rule.beta2, step)));
  adamw.eps = static_cast<float>(rule.eps);
  adamw.step_size = static_cast<float>(rule.lr / (1.0 - power_of(rule.beta1, step)));
  adamw.decay = static_cast<float>(1.0 - rule.lr * rule.weight_decay);
  return adamw;
}

struct Sgd {
  static constexpr uint32_t STATES = 1;
  float factor, lr, momentum, decay;
  bool nesterov;

  MEMBER bool keeps_state() const { return momentum != 0.0f; }
  MEMBER float update(float gradient, float weight, float (&states)[STATES], bool decays) const {
    float g = gradient * factor;
    if (decays && decay != 0.0f) g = fmaf(decay, weight, g);
    if (momentum != 0.0f) {
      states[0] = fmaf(momentum, states[0], g);
      g = nesterov ? fmaf(momentum, states[0], g) : states[0];
    }
    return fmaf(-lr, g, weight);
  }
};

DEVICE Sgd coefficients(const SgdRule& rule, const StepSignal* signal, uint64_t) {
  return {factor_of(signal), static_cast<float>(rule.lr), static_cast<float>(rule.momentum),
          static_cast<float>(rule.weight_decay), rule.nesterov != 0};
}

template <class Coefficients, class Rule>
DEVICE void step_all(const OptimizerArguments& arguments) {
  if (arguments.signal != nullptr && arguments.signal->found_inf != 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) arguments.state->skipped_steps += 1;
    return;
  }
  __shared__ Coefficients shared;
  __shared__ uint64_t shared_step;
  if (threadIdx.x == 0) {
    shared_step = arguments.state->steps + 1;
    shared = coefficients(*static_cast<const Rule*>(arguments.rule), arguments.signal, shared_step);
  }
  __syncthreads();
  const Coefficients rule = shared;
  const uint64_t step = shared_step;
  update_all(arguments, rule, step);
  count_step(arguments, step);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) step_adamw(
    const __grid_constant__ OptimizerArguments arguments) {
  step_all<AdamW, AdamWRule>(arguments);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) step_sgd(
    const __grid_constant__ OptimizerArguments arguments) {
  step_all<Sgd, SgdRule>(arguments);
}
