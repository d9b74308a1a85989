// x^p in f64 from additions, multiplications and divisions alone: src/ops/host/powers.rs operation by operation, so the
// bits are the host's. Built with -fmad=false.
#pragma once
#include "signal.cuh"

constexpr double TWO_52 = 4503599627370496.0;

// Four coefficients at a time, the lowest first: a third of Horner's latency.
template <int N>
DEVICE double polynomial(double x, const double (&coefficients)[N][4]) {
  const double x2 = x * x;
  const double x4 = x2 * x2;
  double sum = 0.0;
#pragma unroll
  for (int i = N - 1; i >= 0; --i) {
    const double* c = coefficients[i];
    sum = sum * x4 + ((c[0] + c[1] * x) + (c[2] + c[3] * x) * x2);
  }
  return sum;
}

// Base-2 logarithm of a normal positive number: ln m = 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)).
DEVICE double log2_series(double x) {
  constexpr double ARTANH[3][4] = {{1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0},
                                   {1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0},
                                   {1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0}};
  constexpr uint64_t SQRT_HALF_BITS = 0x3fe6a09e667f3bcd;
  constexpr double LOG2_E = 1.44269504088896340735992468100189214;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  const uint64_t above = bits - SQRT_HALF_BITS;
  const double m = __longlong_as_double(static_cast<long long>(bits - (above & 0xfff0000000000000)));
  const uint64_t biased = ((above >> 52) + 2048) & 0xfff;
  const uint64_t two_52_bits = 0x4330000000000000;
  const double exponent = __longlong_as_double(static_cast<long long>(biased | two_52_bits)) - (TWO_52 + 2048.0);
  const double s = (m - 1.0) / (m + 1.0);
  return exponent + 2.0 * s * polynomial(s * s, ARTANH) * LOG2_E;
}

// 2^t: the exact power of the nearest integer times the series of the rest; 0 below 2^-1022, infinite from 2^1024 on.
DEVICE double exp2_series(double t) {
  constexpr double EXP[4][4] = {
      {1.0, 1.0, 1.0 / 2.0, 1.0 / 6.0},
      {1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0},
      {1.0 / 40320.0, 1.0 / 362880.0, 1.0 / 3628800.0, 1.0 / 39916800.0},
      {1.0 / 479001600.0, 1.0 / 6227020800.0, 0.0, 0.0},
  };
  constexpr double LN_2 = 0.693147180559945309417232121458176568;
  t = t < -1023.0 ? -1023.0 : t;
  t = t > 1024.0 ? 1024.0 : t;
  const double shifted = t + 1.5 * TWO_52;
  const double rest = (t - (shifted - 1.5 * TWO_52)) * LN_2;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(shifted));
  return polynomial(rest, EXP) * __longlong_as_double(static_cast<long long>((bits + 1023) << 52));
}

// x^p for finite x >= 0 and finite p > 0; values below the normal range count as 0.
DEVICE double power(double x, double p) {
  constexpr double MIN_NORMAL = 2.2250738585072014e-308;
  const double result = exp2_series(p * log2_series(x));
  return x < MIN_NORMAL ? 0.0 : result;
}
