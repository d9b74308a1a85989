// What the norm of a step leaves on the device for the kernels that clip, update and scale.
#pragma once
#include <cstdint>

// src/abi/norm.rs: StepSignal
struct StepSignal {
  double total_norm;         // of the unscaled gradients
  uint64_t first_nonfinite;  // slot; UINT64_MAX: none
  float clip_coef;           // 1 if the step is skipped
  float grad_scale;          // still in the gradients
  uint32_t nonfinite;
  uint32_t found_inf;        // the step is skipped
};
static_assert(sizeof(StepSignal) == 32, "src/abi/norm.rs");
