// A few words into device memory in the order of a stream: what the host decides between steps, such as a learning rate.
//
//   target[i] = words[i]
//
// The words travel as the kernel's argument, which the driver copies at the launch: no staging memory that a later change
// could overwrite before it is read, and no wait for it to be free, as a copy from host memory would need.
// Cost: one thread, up to 40 bytes.
// Source: CUDA Driver API 12.2, 6.22, `cuLaunchKernel`: kernelParams point to memory "from which the actual kernel parameter
// will be copied"; and 2, "API synchronization behavior": a copy from pageable memory "may synchronize with the stream".
#include <cstdint>

#include "signal.cuh"

constexpr uint32_t MOST_WORDS = 5;

// src/abi/store.rs: StoreArguments
struct StoreArguments {
  uint64_t* target;
  uint64_t words[MOST_WORDS];
  uint32_t len_words;
  uint32_t padding;
};
static_assert(sizeof(StoreArguments) == 56, "src/abi/store.rs");

extern "C" __global__ void __launch_bounds__(32) store_words(const __grid_constant__ StoreArguments arguments) {
  if (threadIdx.x != 0) return;
#pragma unroll
  for (uint32_t i = 0; i < MOST_WORDS; ++i) {
    if (i < arguments.len_words) arguments.target[i] = arguments.words[i];
  }
}
