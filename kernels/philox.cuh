// Stochastic rounding with Philox4x32-10: the bits of an element are a function of (seed, step, global element index),
// as in src/ops/host/philox.rs. One block of 128 bits serves eight neighbours, 16 bits each, in index order.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once
#include "pack.cuh"

// src/abi/cast.rs: RoundingKey
struct RoundingKey {
  uint64_t seed;
  uint64_t step;
};

DEVICE Pack philox(uint64_t block, const RoundingKey& key) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.step), c3 = static_cast<uint32_t>(key.step >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xd2511f53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random bits of the `LANES` elements (at most 8) from global index `index` on. An index before 0, of an element that is
// not there, wraps.
template <uint32_t LANES>
DEVICE Pack random_bits(uint64_t index, const RoundingKey& key) {
  const Pack low = philox(index >> 3, key);
  const uint32_t phase = static_cast<uint32_t>(index & 7);
  if (phase == 0) return low;
  const Pack high = phase + LANES <= 8 ? Pack{} : philox((index >> 3) + 1 & UINT64_MAX >> 3, key);
  return shifted(low, high, phase * 2);
}

// Up if the value's place in the gap, in units of 2^-16, plus `random` reaches 2^16.
DEVICE uint16_t round_stochastic(float value, uint16_t random, uint32_t dtype) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (dtype == BF16) {
    // The place in the gap is what the low half of the f32 says. Infinity has none and cannot carry.
    rounded = bits + random >> 16;
  } else {
    const uint32_t normal = magnitude - (127 - 15 << 23) + (random >> 3) >> 13;
    // Below 2^-14 the gap is 2^-24: the value in units of 2^-40, cut off, is the result and 16 bits of its place.
    const float small = __uint_as_float(min(magnitude, 127u - 14 << 23));
    const uint32_t units = static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p40f));
    const uint32_t subnormal = units + random >> 16;
    rounded = magnitude < (127u - 14 << 23) ? subnormal : normal;
    rounded = sign | (magnitude >= (127u + 16 << 23) ? 0x7c00u : rounded);
  }
  return value != value ? narrow(value, dtype) : static_cast<uint16_t>(rounded);
}
