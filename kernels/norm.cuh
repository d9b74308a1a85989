// The norm of one chunk by a team of 64 threads: the additions of src/ops/host/sums.rs in the same order.
//
//   run = 2,048 elements, x[quad 0..16][row 0..4][lane 0..32]; zeros behind the end
//   thread of a run: LANES neighbouring lanes of every row       (8 of 16 bits, 4 of f32, 2 of f64)
//       for each quad:  load its 4 rows, then
//           sum[lane] += (t[row 0] + t[row 1]) + (t[row 2] + t[row 3])      f32, added in f64;   t = |x| or x * x
//   run total = tree over the 32 lanes, halves onto halves       shuffles, then registers
//   not trusted (overflow, underflow, NaN)? the run again, row by row in f64
//   slot = run totals in order
//
// A butterfly shuffle adds a + b in one thread and b + a in its partner: the same bits, so all threads know the total.
// Exponents 3 to 6 of f32 and narrower types are products in f64, row by row: their powers fit f64 as they are. Other
// exponents, and f64 sums that left the range, need every magnitude divided by the chunk's largest: a second pass.
#pragma once
#include "power.cuh"
#include "table.cuh"

constexpr uint32_t TEAM_THREADS = 64;
constexpr uint32_t TEAMS = 4;
constexpr uint32_t BLOCK_THREADS = TEAM_THREADS * TEAMS;

constexpr uint32_t ROW_ELEMS = 32;
constexpr uint32_t QUAD_ELEMS = 4 * ROW_ELEMS;
constexpr uint32_t RUN_ELEMS = 16 * QUAD_ELEMS;
constexpr uint32_t CHUNK_RUNS = CHUNK_ELEMS / RUN_ELEMS;

enum NormKind : uint32_t { L1 = 0, L2 = 1, LARGEST = 2, POWER = 3 };
// What a kernel makes of POWER. The others come as sums only.
enum class Terms { SUMS, PRODUCTS, POWERS };

// src/abi/norm.rs: NormSlot. A chunk's part of the sum is sum * scale^p; for the maximum norm `sum` is the maximum.
struct NormSlot {
  double sum;
  double scale;
};
static_assert(sizeof(NormSlot) == 16, "src/abi/norm.rs");

// What a team's threads tell each other about a chunk.
struct TeamBoard {
  double totals[CHUNK_RUNS];
  uint64_t largest[TEAM_THREADS / 32];
};

struct Team {
  TeamBoard* board;
  uint32_t number;
  uint32_t thread;

  // Barriers 1 to TEAMS; 0 is __syncthreads.
  MEMBER void sync() const {
    asm volatile("bar.sync %0, %1;" ::"r"(number + 1), "n"(TEAM_THREADS) : "memory");
  }
};

// One tensor's elements as they lie in memory. `LANES` of a row are one thread's.
template <uint32_t BYTES>
struct Elements {
  static constexpr uint32_t LANES = PACK_BYTES / BYTES;
  static constexpr bool TOGETHER = false;  // whether whole runs are moved by all threads of a warp
  using Real = typename Wide<BYTES>::Type;
  using Raw = Pack;

  Span span;
  uint64_t chunk;  // address
  uint32_t dtype;

  // Whether the elements from `first` on for one run are all there and lie on 16 bytes.
  MEMBER bool is_whole(uint64_t run_begin) const {
    return chunk % PACK_BYTES == 0 && chunk + (run_begin + RUN_ELEMS) * BYTES <= span.end;
  }
  MEMBER bool has(uint64_t index) const { return chunk + index * BYTES < span.end; }

  template <bool WHOLE>
  MEMBER Raw fetch(uint64_t index) const {
    const uint64_t address = chunk + index * BYTES;
    return WHOLE ? load_pack(address) : load_within<BYTES>(span, address);
  }
  template <bool WHOLE>
  MEMBER void take(const Raw& raw, uint64_t, Real (&x)[LANES]) const {
    widen<BYTES>(raw, dtype, x);
  }
  MEMBER void again(uint64_t index, Real (&x)[LANES]) const { widen<BYTES>(fetch<false>(index), dtype, x); }
};

// ---- one run -------------------------------------------------------------------------------------------------------

DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
DEVICE uint64_t magnitude_bits(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
DEVICE double from_magnitude(uint32_t bits) { return static_cast<double>(__uint_as_float(bits)); }
DEVICE double from_magnitude(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

DEVICE bool is_finite(double x) { return fabs(x) < __longlong_as_double(0x7ff0000000000000); }

// Whether a sum of non-negative terms neither overflowed nor lost to underflow. Not so for NaN.
DEVICE bool is_safe(double sum, double least) { return sum >= least && is_finite(sum); }

// Sums of squares below these may have lost to underflow; sums of magnitudes lose nothing (Square and Magnitude of the host).
DEVICE double least_safe(NormKind kind, float) { return kind == L2 ? 0x1p-100 : 0.0; }
DEVICE double least_safe(NormKind kind, double) { return kind == L2 ? 0x1p-900 : 0.0; }

template <class Real>
DEVICE Real term(Real x, NormKind kind) {
  return kind == L2 ? x * x : fabs(x);
}

// |x|^p for p = 3, 4, 5 or 6: Product of src/ops/host/sums.rs.
DEVICE double product(double x, double p) {
  const double square = x * x;
  const double head = p > 3.0 ? square * square : square;
  return head * (p == 4.0 ? 1.0 : p == 6.0 ? square : fabs(x));
}

struct Exponent {
  NormKind kind;
  double p;
};

// Whether the terms are products in f64 that are summed at once.
template <Terms TERMS, class Element>
constexpr bool IS_PRODUCTS = TERMS == Terms::PRODUCTS && sizeof(typename Element::Real) == 4;

template <class Element>
struct Sums {
  double lanes[Element::LANES];
  // Magnitudes are ordered as their bits, infinity above all numbers and NaN above that.
  typename Bits<sizeof(typename Element::Real)>::Type largest;
};

template <Terms TERMS, class Element>
DEVICE void note_largest(Sums<Element>& sums, const typename Element::Real (&x)[Element::LANES], NormKind kind) {
  if constexpr (IS_PRODUCTS<TERMS, Element>) return;
  if (kind < LARGEST && sizeof(typename Element::Real) == 4) return;
#pragma unroll
  for (uint32_t k = 0; k < Element::LANES; ++k) sums.largest = max(sums.largest, magnitude_bits(x[k]));
}

// Loads four rows, then adds their terms: f32 in pairs, f64 row by row.
template <Terms TERMS, class Element>
DEVICE void add_quad(Sums<Element>& sums, const Element& elements, uint64_t index, Exponent exponent) {
  const NormKind kind = exponent.kind;
  using Real = typename Element::Real;
  constexpr uint32_t LANES = Element::LANES;
  typename Element::Raw raw[4];
#pragma unroll
  for (uint32_t row = 0; row < 4; ++row) raw[row] = elements.template fetch<true>(index + row * ROW_ELEMS);
  Real quad[LANES];
#pragma unroll
  for (uint32_t pair = 0; pair < 2; ++pair) {
    Real x[LANES], y[LANES];
    elements.template take<true>(raw[2 * pair], index + 2 * pair * ROW_ELEMS, x);
    elements.template take<true>(raw[2 * pair + 1], index + (2 * pair + 1) * ROW_ELEMS, y);
    if constexpr (IS_PRODUCTS<TERMS, Element>) {
#pragma unroll
      for (uint32_t k = 0; k < LANES; ++k) {
        sums.lanes[k] = (sums.lanes[k] + product(x[k], exponent.p)) + product(y[k], exponent.p);
      }
      continue;
    }
    note_largest<TERMS>(sums, x, kind);
    note_largest<TERMS>(sums, y, kind);
    if (kind >= LARGEST) continue;
#pragma unroll
    for (uint32_t k = 0; k < LANES; ++k) {
      const Real t = term(x[k], kind), u = term(y[k], kind);
      if constexpr (sizeof(Real) == 8) sums.lanes[k] = (sums.lanes[k] + t) + u;
      if constexpr (sizeof(Real) == 4) {
        if (pair == 1) sums.lanes[k] += static_cast<double>(quad[k] + (t + u));
        quad[k] = t + u;
      }
    }
  }
}

// As `add_quad` for rows off the 16 bytes or at an end of the tensor. One row at a time: a quarter of the code.
template <Terms TERMS, class Element>
DEVICE void add_quad_carefully(Sums<Element>& sums, const Element& elements, uint64_t index, Exponent exponent) {
  const NormKind kind = exponent.kind;
  using Real = typename Element::Real;
  constexpr uint32_t LANES = Element::LANES;
  Real pair[LANES], quad[LANES];
#pragma unroll 1
  for (uint32_t row = 0; row < 4; ++row, index += ROW_ELEMS) {
    Real x[LANES];
    elements.template take<false>(elements.template fetch<false>(index), index, x);
    if constexpr (IS_PRODUCTS<TERMS, Element>) {
#pragma unroll
      for (uint32_t k = 0; k < LANES; ++k) sums.lanes[k] += product(x[k], exponent.p);
      continue;
    }
    note_largest<TERMS>(sums, x, kind);
#pragma unroll
    for (uint32_t k = 0; k < LANES; ++k) {
      const Real t = term(x[k], kind);
      if constexpr (sizeof(Real) == 4) {
        if (row % 2 == 0) pair[k] = t;
        if (row == 1) quad[k] = pair[k] + t;
        if (row == 3) sums.lanes[k] += static_cast<double>(quad[k] + (pair[k] + t));
      } else {
        sums.lanes[k] += t;
      }
    }
  }
}

// The sum over the run's 32 lanes, halves onto halves; the same bits in all threads of the run.
template <uint32_t LANES>
DEVICE double tree(double (&lanes)[LANES]) {
#pragma unroll
  for (uint32_t threads = 16 / LANES; threads > 0; threads /= 2) {
#pragma unroll
    for (uint32_t k = 0; k < LANES; ++k) lanes[k] += __shfl_xor_sync(0xffffffffu, lanes[k], threads);
  }
#pragma unroll
  for (uint32_t width = LANES / 2; width > 0; width /= 2) {
#pragma unroll
    for (uint32_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

// The run row by row in f64, every element divided by `divisor` first.
template <Terms TERMS, class Element>
DEVICE double sum_again(const Element& elements, uint64_t index, Exponent exponent, double divisor) {
  double lanes[Element::LANES] = {};
#pragma unroll 1
  for (uint32_t row = 0; row < RUN_ELEMS / ROW_ELEMS; ++row) {
    if (!elements.has(index + row * ROW_ELEMS)) break;
    typename Element::Real x[Element::LANES];
    elements.again(index + row * ROW_ELEMS, x);
#pragma unroll
    for (uint32_t k = 0; k < Element::LANES; ++k) {
      const double ratio = static_cast<double>(x[k]) / divisor;
      if constexpr (TERMS == Terms::POWERS) lanes[k] += power(fabs(ratio), exponent.p);
      if constexpr (TERMS == Terms::PRODUCTS) lanes[k] += product(ratio, exponent.p);
      if constexpr (TERMS == Terms::SUMS) lanes[k] += term(ratio, exponent.kind);
    }
  }
  return tree(lanes);
}

// One run, of which this thread has the lanes from element `index` on; its total in all threads of the run.
// Every thread of the warp comes here.
template <Terms TERMS, class Element>
DEVICE double measure_run(const Element& elements, uint64_t run_begin, uint64_t index, Exponent exponent,
                          Sums<Element>& sums) {
#pragma unroll
  for (uint32_t k = 0; k < Element::LANES; ++k) sums.lanes[k] = 0.0;
  bool is_whole = elements.is_whole(run_begin);
  if constexpr (Element::TOGETHER) is_whole = __all_sync(0xffffffffu, is_whole);
  if (is_whole) {
#pragma unroll 1
    for (uint32_t quad = 0; quad < RUN_ELEMS / QUAD_ELEMS; ++quad) {
      add_quad<TERMS>(sums, elements, index + quad * QUAD_ELEMS, exponent);
    }
  } else {
#pragma unroll 1
    for (uint32_t quad = 0; quad < RUN_ELEMS / QUAD_ELEMS && elements.has(run_begin + quad * QUAD_ELEMS); ++quad) {
      add_quad_carefully<TERMS>(sums, elements, index + quad * QUAD_ELEMS, exponent);
    }
  }
  if constexpr (IS_PRODUCTS<TERMS, Element>) return tree(sums.lanes);
  if (exponent.kind >= LARGEST) return 0.0;
  double total = tree(sums.lanes);
  if constexpr (sizeof(typename Element::Real) == 4) {
    const bool suspect = elements.has(run_begin) && !is_safe(total, least_safe(exponent.kind, 0.0f));
    if (__any_sync(0xffffffffu, suspect)) {
      const double precise = sum_again<Terms::SUMS>(elements, index, exponent, 1.0);
      total = suspect ? precise : total;
    }
  }
  return total;
}

// ---- one chunk -----------------------------------------------------------------------------------------------------

// The largest magnitude over the team.
template <class Magnitude>
DEVICE double team_largest(const Team& team, Magnitude largest) {
#pragma unroll
  for (uint32_t threads = 16; threads > 0; threads /= 2) {
    largest = max(largest, static_cast<Magnitude>(__shfl_xor_sync(0xffffffffu, largest, threads)));
  }
  if (team.thread % 32 == 0) team.board->largest[team.thread / 32] = largest;
  team.sync();
  return from_magnitude(static_cast<Magnitude>(max(team.board->largest[0], team.board->largest[1])));
}

DEVICE double in_order(const Team& team) {
  double sum = 0.0;
#pragma unroll
  for (uint32_t run = 0; run < CHUNK_RUNS; ++run) sum += team.board->totals[run];
  return sum;
}

// Measures a chunk. Every thread of the team comes here; the board is free again when all have left.
template <Terms TERMS, class Element>
DEVICE NormSlot measure_chunk(const Element& elements, const Team& team, Exponent exponent) {
  using Real = typename Element::Real;
  constexpr uint32_t RUN_THREADS = ROW_ELEMS / Element::LANES;
  constexpr uint32_t RUNS_AT_ONCE = TEAM_THREADS / RUN_THREADS;
  const uint32_t first_run = team.thread / RUN_THREADS;
  const uint32_t lane = team.thread % RUN_THREADS * Element::LANES;
  Sums<Element> sums;
  sums.largest = 0;
#pragma unroll 1
  for (uint32_t run = first_run; run < CHUNK_RUNS; run += RUNS_AT_ONCE) {
    const double total = measure_run<TERMS>(elements, run * RUN_ELEMS, run * RUN_ELEMS + lane, exponent, sums);
    if (lane == 0) team.board->totals[run] = total;
  }
  double largest = 0.0;
  if (!IS_PRODUCTS<TERMS, Element> && (exponent.kind >= LARGEST || sizeof(Real) == 8)) {
    largest = team_largest(team, sums.largest);
  } else {
    team.sync();
  }
  const double sum = in_order(team);
  team.sync();
  if (IS_PRODUCTS<TERMS, Element>) return {sum, 1.0};
  if (exponent.kind == LARGEST) return {largest, 1.0};
  constexpr bool IS_SUMS = TERMS == Terms::SUMS;
  if (IS_SUMS && (sizeof(Real) == 4 || is_safe(sum, least_safe(exponent.kind, 0.0)))) return {sum, 1.0};
  if (largest == 0.0 || !is_finite(largest)) return {largest, 1.0};
  if (!IS_SUMS || sizeof(Real) == 8) {
#pragma unroll 1
    for (uint32_t run = first_run; run < CHUNK_RUNS; run += RUNS_AT_ONCE) {
      const double total = sum_again<TERMS>(elements, run * RUN_ELEMS + lane, exponent, largest);
      if (lane == 0) team.board->totals[run] = total;
    }
    team.sync();
    const double scaled = in_order(team);
    team.sync();
    return {scaled, largest};
  }
  return {sum, 1.0};
}
