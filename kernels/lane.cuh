// The seven element types of a collective: what their sums are made in, and how they get there and back.
//
// | element       | accumulator | sum                          | min, max                        | average, factor |
// |---------------|-------------|------------------------------|---------------------------------|-----------------|
// | f32, f16, bf16| f32         | round to nearest             | NaN wins, -0.0 is below +0.0    | yes             |
// | f64           | f64         | round to nearest             | as above                        | yes             |
// | i32, i64, u8  | the same    | wraps                        | as integers                     | no              |
//
// Widening is exact and narrowing is to nearest, ties to even, so an f16 or bf16 sum is rounded once. This is the numeric
// contract of src/reference.rs; IEEE 754 fixes every bit but NaN payloads.
#pragma once
#include <cstdint>

#include "signal.cuh"

// src/abi/collective.rs: ReduceCode
enum Reduce : uint32_t { SUM = 0, AVG = 1, MIN = 2, MAX = 3, PREMUL_SUM = 4 };

struct Half {
  uint16_t bits;
};

struct Brain {
  uint16_t bits;
};

DEVICE float minimum(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}

DEVICE float maximum(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// PTX has no min.NaN.f64.
DEVICE double minimum(double a, double b) { return a != a ? a : b != b ? b : fmin(a, b); }
DEVICE double maximum(double a, double b) { return a != a ? a : b != b ? b : fmax(a, b); }

DEVICE int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }
DEVICE int32_t maximum(int32_t a, int32_t b) { return a > b ? a : b; }
DEVICE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
DEVICE uint32_t minimum(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE uint32_t maximum(uint32_t a, uint32_t b) { return a > b ? a : b; }

DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }
DEVICE int32_t plus(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
DEVICE int64_t plus(int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }
DEVICE uint32_t plus(uint32_t a, uint32_t b) { return a + b; }

DEVICE float times(float a, double factor) { return __fmul_rn(a, __double2float_rn(factor)); }
DEVICE double times(double a, double factor) { return __dmul_rn(a, factor); }
DEVICE float over(float a, uint32_t divisor) { return __fdiv_rn(a, static_cast<float>(divisor)); }
DEVICE double over(double a, uint32_t divisor) { return __ddiv_rn(a, static_cast<double>(divisor)); }

template <class T>
struct Lane {  // f32, f64, i32, i64: what is in memory is what is added
  using Acc = T;
  DEVICE Acc widen(T value) { return value; }
  DEVICE T narrow(Acc value) { return value; }
};

template <>
struct Lane<uint8_t> {
  using Acc = uint32_t;  // its low byte is the wrapped sum
  DEVICE Acc widen(uint8_t value) { return value; }
  DEVICE uint8_t narrow(Acc value) { return static_cast<uint8_t>(value); }
};

template <>
struct Lane<Half> {
  using Acc = float;
  DEVICE Acc widen(Half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
  }
  DEVICE Half narrow(Acc value) {
    Half narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
  }
};

template <>
struct Lane<Brain> {
  using Acc = float;
  DEVICE Acc widen(Brain value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
  DEVICE Brain narrow(Acc value) {
    Brain narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
  }
};

template <class Acc>
constexpr bool IS_FLOAT = static_cast<Acc>(0.5) != static_cast<Acc>(0);
