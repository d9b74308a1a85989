// The dynamic loss scale after a step, on the device: src/ops/scaler.rs.
//
//   good_steps = found_inf ? 0 : good_steps + 1
//   found_inf:                        scale *= backoff_factor
//   good_steps == growth_interval:    scale *= growth_factor; good_steps = 0
//   a scale that is not normal, or whose reciprocal is not, is not taken
//
// Cost: one thread, 24 bytes. Runs behind the optimizer, which still reads the scale that is in the gradients.
// Source: PyTorch's GradScaler.
#include "signal.cuh"
#include "step.cuh"

// src/abi/scaler.rs: LossScaler. The first field is what `CombineArguments::grad_scale` points to.
struct LossScaler {
  float scale;
  float growth_factor;
  float backoff_factor;
  uint32_t growth_interval;
  uint32_t good_steps;
  uint32_t enabled;
};
static_assert(sizeof(LossScaler) == 24, "src/abi/scaler.rs");

// src/abi/scaler.rs: ScalerArguments
struct ScalerArguments {
  LossScaler* scaler;
  const StepSignal* signal;  // of the step
};
static_assert(sizeof(ScalerArguments) == 16, "src/abi/scaler.rs");

DEVICE bool is_normal(float x) {
  const uint32_t exponent = __float_as_uint(x) >> 23 & 0xff;
  return exponent != 0 && exponent != 0xff;
}

DEVICE bool is_usable(float scale) {
  return scale > 0.0f && is_normal(scale) && is_normal(static_cast<float>(1.0 / static_cast<double>(scale)));
}

extern "C" __global__ void __launch_bounds__(32) update_scaler(const __grid_constant__ ScalerArguments arguments) {
  LossScaler* const scaler = arguments.scaler;
  if (threadIdx.x != 0 || scaler->enabled == 0) return;
  const bool found_inf = arguments.signal->found_inf != 0;
  uint32_t good_steps = found_inf ? 0 : scaler->good_steps + 1;
  const bool grows = good_steps == scaler->growth_interval;
  if (grows) good_steps = 0;
  scaler->good_steps = good_steps;
  if (!found_inf && !grows) return;
  const float next = scaler->scale * (found_inf ? scaler->backoff_factor : scaler->growth_factor);
  if (is_usable(next)) scaler->scale = next;
}
