// The norm of a list of gradients of mixed dtypes, the clip coefficient, and whether the step may be made.
//
//   every team:   for its chunks:  slots[chunk] = the chunk's part of sum |g|^p             norm.cuh
//   last block:   total_norm, clip_coef, found_inf = from all slots, in index order          combine.cuh
//
// A slot is a function of the elements of its chunk, and the result a function of the slots: the bits depend neither on
// the grid, nor on the device, nor on how tensors were bucketed, and are those of src/ops/norm.rs. Replicas that hold
// the same gradients get the same coefficient. Values of 1e19 and more do not overflow; a NaN is never lost.
//
// The last block is found with a counter (atom.acq_rel that wraps), so blocks need not be resident together, and a
// captured graph can be replayed. A bucket can be measured as soon as it is reduced (`finishes` = 0), the last one finishes.
//
// Cost: every element read once, 16 bytes written for 32,768 elements and read again. Other exponents than 1 to 6 and inf
// read twice, the second time mostly from the cache, and are bound by f64 arithmetic.
// Source: the method of partial sums by index of PyTorch's foreach norm, with f64 above four elements.
#include "combine.cuh"

// src/abi/norm.rs: NormTensor
struct NormTensor {
  uint64_t gradient;  // address
  uint64_t len_elems;
  uint32_t dtype;
  uint32_t padding;
};
static_assert(sizeof(NormTensor) == 24, "src/abi/norm.rs");

// src/abi/norm.rs: NormArguments
struct NormArguments {
  const NormTensor* tensors;
  ChunkRange range;
  CombineArguments combine;
};
static_assert(sizeof(NormArguments) == 112, "src/abi/norm.rs");

template <Terms TERMS, uint32_t BYTES>
DEVICE NormSlot measure(const NormTensor& tensor, uint32_t chunk, const Team& team, Exponent exponent) {
  const Span span = {tensor.gradient, tensor.gradient + tensor.len_elems * BYTES};
  const Elements<BYTES> elements = {span, tensor.gradient + chunk * (CHUNK_ELEMS * BYTES), tensor.dtype};
  return measure_chunk<TERMS>(elements, team, exponent);
}

template <Terms TERMS>
DEVICE void measure_tensors(const NormArguments& arguments) {
  measure_all<TERMS>(arguments.range, arguments.combine, [&](ChunkRef chunk, const Team& team, Exponent exponent) {
    const NormTensor tensor = arguments.tensors[chunk.tensor];
    switch (tensor.dtype) {
      case F64: return measure<TERMS, 8>(tensor, chunk.index, team, exponent);
      case F32: return measure<TERMS, 4>(tensor, chunk.index, team, exponent);
      default: return measure<TERMS, 2>(tensor, chunk.index, team, exponent);
    }
  });
}

// Norm types 1, 2 and inf.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) measure_norm(
    const __grid_constant__ NormArguments arguments) {
  measure_tensors<Terms::SUMS>(arguments);
}

// Exponents 3, 4, 5 and 6.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) measure_norm_products(
    const __grid_constant__ NormArguments arguments) {
  measure_tensors<Terms::PRODUCTS>(arguments);
}

// Any other exponent.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 2) measure_norm_p(
    const __grid_constant__ NormArguments arguments) {
  measure_tensors<Terms::POWERS>(arguments);
}
