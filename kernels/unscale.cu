// Gradients without their loss scale, in the dtype they are wanted in, and the norm of the result, in one read.
//
//   every team:   for its chunks, run by run:  dst = round(src * inv_scale);  slot += |dst|^p     norm.cuh, same order
//   last block:   total_norm, clip_coef, found_inf                                               combine.cuh
//
// What is measured is what was written, after its rounding, so the norm has the bits of `measure_norm` on `dst`, and of
// src/ops/host/unscale.rs. Norm types 1, 2 and inf; for another exponent the caller runs this with kind inf and without
// finishing, then measure_norm_products or measure_norm_p.
//
// A thread keeps the same elements from the load to the store, and reads again (where f32 is not enough for a run) only what
// it wrote itself: so source and destination may be the same memory. Rows off the 16 bytes go element by element.
//
// Cost: every source element read once, every result written once, 16 bytes for 32,768 elements written and read.
// Source: apex's multi_tensor_unscale_l2norm fuses the same two; there the norm is f32 and the result is not written.
#include "combine.cuh"

// src/abi/norm.rs: UnscaleTensor
struct UnscaleTensor {
  uint64_t src;  // address
  uint64_t dst;  // address
  uint64_t len_elems;
  uint32_t src_dtype;
  uint32_t dst_dtype;
};
static_assert(sizeof(UnscaleTensor) == 32, "src/abi/norm.rs");

// src/abi/norm.rs: UnscaleArguments
struct UnscaleArguments {
  const UnscaleTensor* tensors;
  ChunkRange range;
  CombineArguments combine;  // its grad_scale is that of the result: none
  const float* scale;        // of the source
};
static_assert(sizeof(UnscaleArguments) == 120, "src/abi/norm.rs");

// The 16 bytes at `address`, touching no byte beside them; zeros behind `end`.
template <uint32_t BYTES>
DEVICE Pack load_alone(uint64_t end, uint64_t address) {
  if (address % PACK_BYTES == 0 && address + PACK_BYTES <= end) return load_pack(address);
  Pack pack = {};
#pragma unroll
  for (uint32_t i = 0; i < PACK_BYTES / BYTES; ++i) {
    if (address + i * BYTES < end) set_element<BYTES>(pack, i, load_bits<BYTES>(address + i * BYTES));
  }
  return pack;
}

// A tensor that is measured as it is made: what `Elements` is to norm.cu.
template <uint32_t SRC_BYTES, uint32_t DST_BYTES>
struct Unscaled {
  static constexpr uint32_t LANES = PACK_BYTES / (SRC_BYTES < DST_BYTES ? SRC_BYTES : DST_BYTES);
  static constexpr uint32_t SRC_PACKS = LANES * SRC_BYTES / PACK_BYTES;
  static constexpr uint32_t DST_PACKS = LANES * DST_BYTES / PACK_BYTES;
  static constexpr uint32_t SRC_ELEMS = PACK_BYTES / SRC_BYTES;
  static constexpr uint32_t DST_ELEMS = PACK_BYTES / DST_BYTES;
  static constexpr bool TOGETHER = SRC_PACKS + DST_PACKS > 2;
  using Real = typename Wide<DST_BYTES>::Type;
  struct Raw {
    Pack packs[SRC_PACKS];
  };

  uint64_t src, dst;          // of the chunk
  uint64_t src_end, dst_end;  // of the tensor
  uint32_t src_dtype, dst_dtype;
  float inv_scale;

  MEMBER bool has(uint64_t index) const { return dst + index * DST_BYTES < dst_end; }
  MEMBER bool is_whole(uint64_t run_begin) const {
    return src % PACK_BYTES == 0 && dst % PACK_BYTES == 0 && dst + (run_begin + RUN_ELEMS) * DST_BYTES <= dst_end;
  }

  template <bool WHOLE>
  MEMBER Raw fetch(uint64_t index) const {
    Raw raw;
    const uint64_t group = src + index * SRC_BYTES;
    if constexpr (WHOLE) load_together(group, raw.packs);
    if constexpr (!WHOLE) {
#pragma unroll
      for (uint32_t i = 0; i < SRC_PACKS; ++i) raw.packs[i] = load_alone<SRC_BYTES>(src_end, group + i * PACK_BYTES);
    }
    return raw;
  }

  // Scales, rounds and stores the elements, and gives their values.
  template <bool WHOLE>
  MEMBER void take(Raw raw, uint64_t index, Real (&x)[LANES]) const {
    if constexpr (WHOLE) exchange(raw.packs);
#pragma unroll
    for (uint32_t i = 0; i < SRC_PACKS; ++i) {
      Real part[SRC_ELEMS];
      widen<SRC_BYTES>(raw.packs[i], src_dtype, part);
#pragma unroll
      for (uint32_t k = 0; k < SRC_ELEMS; ++k) x[i * SRC_ELEMS + k] = part[k] * static_cast<Real>(inv_scale);
    }
    Pack packs[DST_PACKS] = {};
#pragma unroll
    for (uint32_t i = 0; i < DST_PACKS; ++i) {
      Pack& pack = packs[i];
      Real part[DST_ELEMS];
#pragma unroll
      for (uint32_t k = 0; k < DST_ELEMS; ++k) part[k] = x[i * DST_ELEMS + k];
      if constexpr (DST_BYTES == 2) pack = narrow_pack(part, dst_dtype);
#pragma unroll
      for (uint32_t k = 0; k < DST_ELEMS; ++k) {
        if constexpr (DST_BYTES == 4) set_element<4>(pack, k, __float_as_uint(part[k]));
        if constexpr (DST_BYTES == 8) set_element<8>(pack, k, bits_of(part[k]));
      }
      if constexpr (DST_BYTES == 2) {
        widen<2>(pack, dst_dtype, part);
#pragma unroll
        for (uint32_t k = 0; k < DST_ELEMS; ++k) x[i * DST_ELEMS + k] = part[k];
      }
    }
    const uint64_t group = dst + index * DST_BYTES;
    if constexpr (WHOLE) {
      exchange(packs);
      store_together(group, packs);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < DST_PACKS; ++i) store_within<DST_BYTES>({dst, dst_end}, group + i * PACK_BYTES, packs[i]);
    }
  }

  MEMBER void again(uint64_t index, Real (&x)[LANES]) const {
#pragma unroll
    for (uint32_t i = 0; i < DST_PACKS; ++i) {
      Real part[DST_ELEMS];
      widen<DST_BYTES>(load_alone<DST_BYTES>(dst_end, dst + index * DST_BYTES + i * PACK_BYTES), dst_dtype, part);
#pragma unroll
      for (uint32_t k = 0; k < DST_ELEMS; ++k) x[i * DST_ELEMS + k] = part[k];
    }
  }
};

template <uint32_t SRC_BYTES, uint32_t DST_BYTES>
DEVICE NormSlot unscale(const UnscaleTensor& tensor, uint32_t chunk, const Team& team, Exponent exponent,
                        float inv_scale) {
  Unscaled<SRC_BYTES, DST_BYTES> unscaled;
  unscaled.src = tensor.src + chunk * (CHUNK_ELEMS * SRC_BYTES);
  unscaled.dst = tensor.dst + chunk * (CHUNK_ELEMS * DST_BYTES);
  unscaled.src_end = tensor.src + tensor.len_elems * SRC_BYTES;
  unscaled.dst_end = tensor.dst + tensor.len_elems * DST_BYTES;
  unscaled.src_dtype = tensor.src_dtype;
  unscaled.dst_dtype = tensor.dst_dtype;
  unscaled.inv_scale = inv_scale;
  return measure_chunk<Terms::SUMS>(unscaled, team, exponent);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 2) unscale_norm(
    const __grid_constant__ UnscaleArguments arguments) {
  const float inv_scale = static_cast<float>(1.0 / static_cast<double>(*arguments.scale));
  measure_all<Terms::SUMS>(arguments.range, arguments.combine, [&](ChunkRef chunk, const Team& team, Exponent exponent) {
    const UnscaleTensor tensor = arguments.tensors[chunk.tensor];
    const uint32_t to_bytes = size_bytes(tensor.dst_dtype);
    switch (size_bytes(tensor.src_dtype)) {
      case 8: return unscale<8, 8>(tensor, chunk.index, team, exponent, inv_scale);
      case 4:
        return to_bytes == 4 ? unscale<4, 4>(tensor, chunk.index, team, exponent, inv_scale)
                             : unscale<4, 2>(tensor, chunk.index, team, exponent, inv_scale);
      default:
        return to_bytes == 4 ? unscale<2, 4>(tensor, chunk.index, team, exponent, inv_scale)
                             : unscale<2, 2>(tensor, chunk.index, team, exponent, inv_scale);
    }
  });
}
