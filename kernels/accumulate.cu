// Gradients from where a backward left them into where they are reduced: the first micro-batch replaces, later ones add.
//
//   stage_tensors        dst = round(src * factor)
//   accumulate_tensors   dst = round(dst + src * factor)
//
// In f32, each operation rounded, the result rounded once more to the dtype of `dst`; f32, f16 and bf16 in any pair. A factor of
// 1 is exact, so `dst` has then the bits of a cast, or of a sum in f32. Chunks go to blocks in turn; how each is read and
// written: elementwise.cuh. The tensors are a table in device memory, or some in the argument: gradients that lie somewhere
// else in every step, without an upload that the host would have to wait for. A block finds its tensor by halving.
//
// Cost: every source element read once, every result written once; to accumulate, read once before.
// Source: src/strategy/gradient.rs, `contribute`.
#include "elementwise.cuh"

constexpr uint32_t MAX_STAGED = 64;

// src/abi/accumulate.rs: StagedTensor
struct StagedTensor {
  uint64_t src;  // address
  uint64_t dst;  // address
  uint64_t len_elems;
  uint32_t first_chunk;  // of this launch
  uint16_t src_dtype;
  uint16_t dst_dtype;
};
static_assert(sizeof(StagedTensor) == 32, "src/abi/accumulate.rs");

// src/abi/accumulate.rs: AccumulateArguments
struct AccumulateArguments {
  const CastTensor* tensors;
  ChunkRange range;  // `chunks` null: those of `staged`, one after the other
  float factor;
  uint32_t len_staged;
  StagedTensor staged[MAX_STAGED];  // none is empty
};
static_assert(sizeof(AccumulateArguments) == 2088, "src/abi/accumulate.rs");

template <uint32_t BYTES, uint32_t PACKS, uint32_t LANES>
DEVICE void widen_group(const Pack (&packs)[PACKS], uint32_t dtype, float (&x)[LANES]) {
  constexpr uint32_t ELEMS = PACK_BYTES / BYTES;
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) {
    float part[ELEMS];
    widen<BYTES>(packs[i], dtype, part);
#pragma unroll
    for (uint32_t k = 0; k < ELEMS; ++k) x[i * ELEMS + k] = part[k];
  }
}

template <uint32_t SRC_BYTES, uint32_t DST_BYTES, bool ADDS>
struct Contribution {
  using G = Group<SRC_BYTES, DST_BYTES>;
  uint32_t src_dtype, dst_dtype;
  float factor;

  MEMBER void operator()(const typename G::Source& source, typename G::Target& target, int32_t) const {
    float x[G::LANES];
    widen_group<SRC_BYTES>(source, src_dtype, x);
#pragma unroll
    for (uint32_t k = 0; k < G::LANES; ++k) x[k] = x[k] * factor;
    if constexpr (ADDS) {
      float sum[G::LANES];
      widen_group<DST_BYTES>(target, dst_dtype, sum);
#pragma unroll
      for (uint32_t k = 0; k < G::LANES; ++k) x[k] = sum[k] + x[k];
    }
    if constexpr (DST_BYTES == 2) target[0] = narrow_pack(x, dst_dtype);
    if constexpr (DST_BYTES == 4) {
#pragma unroll
      for (uint32_t k = 0; k < G::LANES; ++k) target[k / 4].words[k % 4] = __float_as_uint(x[k]);
    }
  }
};

template <uint32_t SRC_BYTES, bool ADDS>
DEVICE void contribute(const CastTensor& tensor, const Piece& piece, float factor) {
  if (tensor.dst_dtype == F32) {
    const Contribution<SRC_BYTES, 4, ADDS> op = {tensor.src_dtype, tensor.dst_dtype, factor};
    return map_chunk<SRC_BYTES, 4, ADDS>(piece, op);
  }
  const Contribution<SRC_BYTES, 2, ADDS> op = {tensor.src_dtype, tensor.dst_dtype, factor};
  map_chunk<SRC_BYTES, 2, ADDS>(piece, op);
}

// The tensor in the argument that chunk `at` of the launch is of.
DEVICE const StagedTensor& staged_at(const AccumulateArguments& arguments, uint64_t at) {
  uint32_t low = 0, end = arguments.len_staged;
#pragma unroll 1
  while (end - low > 1) {
    const uint32_t middle = (low + end) / 2;
    const bool is_before = arguments.staged[middle].first_chunk <= at;
    low = is_before ? middle : low;
    end = is_before ? end : middle;
  }
  return arguments.staged[low];
}

template <bool ADDS>
DEVICE void contribute_all(const AccumulateArguments& arguments) {
  const ChunkRange& range = arguments.range;
#pragma unroll 1
  for (uint64_t at = blockIdx.x; at < range.len_chunks; at += gridDim.x) {
    CastTensor tensor;
    uint32_t index;
    if (range.chunks == nullptr) {
      const StagedTensor& staged = staged_at(arguments, at);
      tensor = {staged.src, staged.dst, staged.len_elems, 0, staged.src_dtype, staged.dst_dtype};
      index = static_cast<uint32_t>(at) - staged.first_chunk;
    } else {
      const ChunkRef chunk = range.chunks[range.first_chunk + at];
      tensor = arguments.tensors[chunk.tensor];
      index = chunk.index;
    }
    const Piece piece = piece_of(tensor, index);
    if (tensor.src_dtype == F32) {
      contribute<4, ADDS>(tensor, piece, arguments.factor);
    } else {
      contribute<2, ADDS>(tensor, piece, arguments.factor);
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) stage_tensors(
    const __grid_constant__ AccumulateArguments arguments) {
  contribute_all<false>(arguments);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) accumulate_tensors(
    const __grid_constant__ AccumulateArguments arguments) {
  contribute_all<true>(arguments);
}
