// Elements between memory and registers: 16 bytes at a time, widened to f32 or f64, narrowed back.
//
//   address on 16 bytes          one load of 16 bytes
//   16 bytes across a border     the two aligned loads around them, shifted
//   next to the tensor's ends    element by element; nothing outside the tensor is ever touched
//
// Values are those of src/reference.rs: to nearest, ties to even; NaN becomes the quiet NaN of its sign.
// Source: PTX ISA 9.0, 9.7.9.8 (ld: vectors are aligned to their size) and 9.7.9.22 (cvt).
#pragma once
#include <cstdint>

#include "signal.cuh"

#define MEMBER __device__ __forceinline__

// src/dtype.rs: DType
enum DType : uint32_t { F32 = 0, F16 = 1, BF16 = 2, F64 = 3 };

constexpr uint32_t PACK_BYTES = 16;

struct Pack {
  uint32_t words[4];
};

// The bits of one element of `BYTES` bytes.
template <uint32_t BYTES>
struct Bits;
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<4> {
  using Type = uint32_t;
};
template <>
struct Bits<8> {
  using Type = uint64_t;
};

// What arithmetic on elements of `BYTES` bytes is done in.
template <uint32_t BYTES>
struct Wide {
  using Type = float;
};
template <>
struct Wide<8> {
  using Type = double;
};

DEVICE Pack load_pack(uint64_t address) {
  Pack pack;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(address)
               : "memory");
  return pack;
}

DEVICE void store_pack(uint64_t address, const Pack& pack) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(pack.words[0]), "r"(pack.words[1]),
               "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

template <uint32_t BYTES>
DEVICE typename Bits<BYTES>::Type load_bits(uint64_t address) {
  typename Bits<BYTES>::Type bits;
  if constexpr (BYTES == 2) asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(address) : "memory");
  if constexpr (BYTES == 4) asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
  if constexpr (BYTES == 8) asm volatile("ld.global.u64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
  return bits;
}

template <uint32_t BYTES>
DEVICE void store_bits(uint64_t address, typename Bits<BYTES>::Type bits) {
  if constexpr (BYTES == 2) asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(bits) : "memory");
  if constexpr (BYTES == 4) asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  if constexpr (BYTES == 8) asm volatile("st.global.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
}

// Element `index` of a pack.
template <uint32_t BYTES>
DEVICE typename Bits<BYTES>::Type element(const Pack& pack, uint32_t index) {
  if constexpr (BYTES == 2) return static_cast<uint16_t>(pack.words[index / 2] >> (index % 2 * 16));
  if constexpr (BYTES == 4) return pack.words[index];
  if constexpr (BYTES == 8) {
    return static_cast<uint64_t>(pack.words[2 * index + 1]) << 32 | pack.words[2 * index];
  }
}

// Sets element `index` of a pack that was all zeros there.
template <uint32_t BYTES>
DEVICE void set_element(Pack& pack, uint32_t index, typename Bits<BYTES>::Type bits) {
  if constexpr (BYTES == 2) pack.words[index / 2] |= static_cast<uint32_t>(bits) << (index % 2 * 16);
  if constexpr (BYTES == 4) pack.words[index] = bits;
  if constexpr (BYTES == 8) {
    pack.words[2 * index] = static_cast<uint32_t>(bits);
    pack.words[2 * index + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

// The 16 bytes from byte `shift` on (0 to 15) of two packs, one behind the other.
DEVICE Pack shifted(const Pack& low, const Pack& high, uint32_t shift) {
  const uint32_t words[8] = {low.words[0],  low.words[1],  low.words[2],  low.words[3],
                             high.words[0], high.words[1], high.words[2], high.words[3]};
  // Registers have no index, so the words move by 2 and by 1 under a condition.
  uint32_t by_two[6], by_one[5];
#pragma unroll
  for (int i = 0; i < 6; ++i) by_two[i] = shift & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) by_one[i] = shift & 4 ? by_two[i + 1] : by_two[i];
  Pack pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.words[i] = __funnelshift_r(by_one[i], by_one[i + 1], shift % 4 * 8);
  return pack;
}

// Groups of two packs, one behind the other. Were each thread to access its first pack and then its second, either access
// of the warp would touch half of every 32-byte sector. So two neighbours access the group of the even thread, then that of
// the odd one, and exchange what is the other's. All threads of a warp come here together, the group of thread t + 1 behind
// that of t; a group of one pack is its thread's alone.

template <uint32_t PACKS>
DEVICE uint64_t shared_begin(uint64_t group) {
  static_assert(PACKS <= 2, "one pack or two");
  return PACKS == 1 ? group : group - threadIdx.x % 2 * PACK_BYTES;
}

template <uint32_t PACKS>
DEVICE void load_together(uint64_t group, Pack (&packs)[PACKS]) {
  const uint64_t begin = shared_begin<PACKS>(group);
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) packs[i] = load_pack(begin + i * 2 * PACK_BYTES);
}

template <uint32_t PACKS>
DEVICE void store_together(uint64_t group, const Pack (&packs)[PACKS]) {
  const uint64_t begin = shared_begin<PACKS>(group);
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) store_pack(begin + i * 2 * PACK_BYTES, packs[i]);
}

// Makes of what was loaded the own group, and of the own group what is to be stored.
template <uint32_t PACKS>
DEVICE void exchange(Pack (&packs)[PACKS]) {
  if constexpr (PACKS == 2) {
    const bool is_odd = threadIdx.x % 2 == 1;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t given = is_odd ? packs[0].words[i] : packs[1].words[i];
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, given, 1);
      packs[0].words[i] = is_odd ? taken : packs[0].words[i];
      packs[1].words[i] = is_odd ? packs[1].words[i] : taken;
    }
  }
}

// The bytes of one tensor: addresses that may be touched.
struct Span {
  uint64_t begin;
  uint64_t end;
};

// Loads the 16 bytes at `address` if wide loads reach them without touching what lies outside the span.
DEVICE bool load_wide(const Span& span, uint64_t address, Pack& pack) {
  const uint32_t shift = static_cast<uint32_t>(address % PACK_BYTES);
  const uint64_t below = address - shift;
  if (below < span.begin || below + (shift == 0 ? PACK_BYTES : 2 * PACK_BYTES) > span.end) return false;
  pack = load_pack(below);
  if (shift != 0) pack = shifted(pack, load_pack(below + PACK_BYTES), shift);
  return true;
}

// The 16 bytes at `address`, at or behind `span.begin`; zeros where they lie behind `span.end`.
template <uint32_t BYTES>
DEVICE Pack load_within(const Span& span, uint64_t address) {
  Pack pack;
  if (load_wide(span, address, pack)) return pack;
  pack = {};
#pragma unroll
  for (uint32_t i = 0; i < PACK_BYTES / BYTES; ++i) {
    if (address + i * BYTES < span.end) set_element<BYTES>(pack, i, load_bits<BYTES>(address + i * BYTES));
  }
  return pack;
}

// Stores what of the 16 bytes at `address` lies before `span.end`.
template <uint32_t BYTES>
DEVICE void store_within(const Span& span, uint64_t address, const Pack& pack) {
  if (address % PACK_BYTES == 0 && address + PACK_BYTES <= span.end) return store_pack(address, pack);
#pragma unroll
  for (uint32_t i = 0; i < PACK_BYTES / BYTES; ++i) {
    if (address + i * BYTES < span.end) store_bits<BYTES>(address + i * BYTES, element<BYTES>(pack, i));
  }
}

DEVICE float widen_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// The elements of a pack, widened. `dtype` is the same for all threads that come here together.
template <uint32_t BYTES>
DEVICE void widen(const Pack& pack, uint32_t dtype, typename Wide<BYTES>::Type (&values)[PACK_BYTES / BYTES]) {
  if constexpr (BYTES == 2) {
    if (dtype == F16) {
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) values[i] = widen_half(element<2>(pack, i));
    } else {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        values[2 * i] = __uint_as_float(pack.words[i] << 16);
        values[2 * i + 1] = __uint_as_float(pack.words[i] & 0xffff0000u);
      }
    }
  }
  if constexpr (BYTES == 4) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) values[i] = __uint_as_float(pack.words[i]);
  }
  if constexpr (BYTES == 8) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) values[i] = __longlong_as_double(static_cast<long long>(element<8>(pack, i)));
  }
}

// The bits of `value` as f16 or bf16. `cvt` makes 0x7fff of every NaN; here NaN keeps its sign and is the quiet one.
DEVICE uint16_t narrow(float value, uint32_t dtype) {
  uint16_t bits;
  if (dtype == F16) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  } else {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  const uint16_t nan = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000u) | (dtype == F16 ? 0x7e00 : 0x7fc0);
  return value != value ? nan : bits;
}

// `LANES` values rounded to f16 or bf16, two in a word. `dtype` is the same for all threads that come here together.
template <uint32_t LANES>
DEVICE void narrow_all(const float (&values)[LANES], uint32_t dtype, uint32_t* words) {
  bool any_nan = false;
#pragma unroll
  for (uint32_t i = 0; i < LANES; ++i) any_nan |= values[i] != values[i];
#pragma unroll
  for (uint32_t i = 0; i < LANES / 2; ++i) {
    const float low = values[2 * i], high = values[2 * i + 1];
    if (dtype == F16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(high), "f"(low));
    if (dtype != F16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(high), "f"(low));
  }
  if (!any_nan) return;
#pragma unroll
  for (uint32_t i = 0; i < LANES / 2; ++i) {
    words[i] = static_cast<uint32_t>(narrow(values[2 * i + 1], dtype)) << 16 | narrow(values[2 * i], dtype);
  }
}

DEVICE Pack narrow_pack(const float (&values)[8], uint32_t dtype) {
  Pack pack;
  narrow_all(values, dtype, pack.words);
  return pack;
}

// The 16-bit float with infinity replaced by its neighbour, the largest finite value.
DEVICE uint16_t finite(uint16_t bits, uint32_t dtype) {
  const uint16_t infinity = dtype == F16 ? 0x7c00 : 0x7f80;
  return bits - static_cast<uint16_t>((bits & 0x7fff) == infinity);
}

DEVICE void make_finite(Pack& pack, uint32_t dtype) {
  Pack result = {};
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) set_element<2>(result, i, finite(element<2>(pack, i), dtype));
  pack = result;
}

// One element; NaN keeps its sign, which `cvt` drops.
DEVICE float widen_signed(uint16_t bits, uint32_t dtype) {
  if (dtype == BF16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  const float value = widen_half(bits);
  return value != value ? __uint_as_float((bits & 0x8000u) << 16 | 0x7fc00000u) : value;
}

DEVICE double f64_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
DEVICE uint64_t bits_of(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
