// Casts between float types, in-place scaling by the clip coefficient, and clipping by value, for a list of tensors.
//
//   cast_tensors     dst = round(src)            to nearest, ties to even, once; NaN quiet, its sign kept; saturated on request
//   cast_stochastic  dst = round(src, random)    f32 to f16 or bf16; random bits from (seed, step, global element index)
//   scale_tensors    x = round(x * clip_coef)    nothing is read or written if the coefficient is 1
//   clamp_tensors    x = min(max(x, -limit), limit), limit rounded to the dtype; NaN and -0.0 stay
//
// Chunks of 32,768 elements go to blocks in turn; how each is read and written: elementwise.cuh.
// Cost: every source element read once, every result written once.
// Source: src/reference.rs, and src/ops/host/{lane,elementwise,philox}.rs for the operations on bits.
#include "elementwise.cuh"
#include "philox.cuh"
#include "step.cuh"

// src/abi/cast.rs: CastArguments
struct CastArguments {
  const CastTensor* tensors;
  ChunkRange range;
  RoundingKey key;
  uint32_t saturates;
  uint32_t padding;
};
static_assert(sizeof(CastArguments) == 56, "src/abi/cast.rs");

// src/abi/cast.rs: ScaleArguments
struct ScaleArguments {
  const CastTensor* tensors;  // `dst` is read and written
  ChunkRange range;
  const StepSignal* signal;
};
static_assert(sizeof(ScaleArguments) == 40, "src/abi/cast.rs");

// src/abi/cast.rs: ClampArguments
struct ClampArguments {
  const CastTensor* tensors;  // `dst` is read and written
  ChunkRange range;
  const StepSignal* signal;  // null: limit as it is
  double limit;              // of unscaled gradients
};
static_assert(sizeof(ClampArguments) == 48, "src/abi/cast.rs");

// ---- one element or group ------------------------------------------------------------------------------------------

constexpr uint32_t INFINITY_F32 = 0x7f800000;
constexpr uint64_t INFINITY_F64 = 0x7ff0000000000000;

// Infinity becomes the largest finite value, which has the bits below it.
DEVICE uint32_t finite(uint32_t bits) { return bits - static_cast<uint32_t>((bits & ~0x80000000u) == INFINITY_F32); }
DEVICE uint64_t finite(uint64_t bits) { return bits - static_cast<uint64_t>((bits & ~(1ull << 63)) == INFINITY_F64); }

// Of f16 elements that were widened: NaN gets back the sign that `cvt` drops.
DEVICE void keep_signs(const Pack& pack, float (&x)[8]) {
#pragma unroll
  for (uint32_t k = 0; k < 8; ++k) {
    if (x[k] != x[k]) x[k] = widen_signed(element<2>(pack, k), F16);
  }
}

struct CastOptions {
  uint32_t src_dtype, dst_dtype;
  bool saturates;
};

// f16, bf16, f32 into each other.
template <uint32_t SRC_BYTES, uint32_t DST_BYTES>
struct CastGroup {
  using G = Group<SRC_BYTES, DST_BYTES>;
  CastOptions options;

  MEMBER void operator()(const typename G::Source& source, typename G::Target& target, int32_t) const {
    float x[G::LANES];
    if constexpr (SRC_BYTES == 2) {
      widen<2>(source[0], options.src_dtype, x);
      if (options.src_dtype == F16) keep_signs(source[0], x);
    } else {
#pragma unroll
      for (uint32_t k = 0; k < G::LANES; ++k) x[k] = __uint_as_float(source[k / 4].words[k % 4]);
    }
    if constexpr (DST_BYTES == 4) {
#pragma unroll
      for (uint32_t k = 0; k < G::LANES; ++k) target[k / 4].words[k % 4] = __float_as_uint(x[k]);
      if (options.saturates) {
#pragma unroll
        for (uint32_t k = 0; k < G::LANES; ++k) target[k / 4].words[k % 4] = finite(target[k / 4].words[k % 4]);
      }
    }
    if constexpr (DST_BYTES == 2) {
      target[0] = narrow_pack(x, options.dst_dtype);
      if (options.saturates) make_finite(target[0], options.dst_dtype);
    }
  }
};

// f64 as an f32 that can be rounded once more to 22 bits or less as if it had been rounded once: an inexact result ends
// in an odd bit, so it never lies on a tie (Boldo & Melquiond 2008).
DEVICE float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  const uint32_t toward_zero = __float_as_uint(nearest) - static_cast<uint32_t>(fabs(back) > fabs(value));
  return __uint_as_float(back == value ? __float_as_uint(nearest) : toward_zero | 1);
}

// f64 into any dtype.
template <uint32_t DST_BYTES>
struct CastFromF64 {
  CastOptions options;

  MEMBER typename Bits<DST_BYTES>::Type operator()(uint64_t bits) const {
    const double value = f64_of(bits);
    const float nan = __uint_as_float(static_cast<uint32_t>(bits >> 32) & 0x80000000u | 0x7fc00000u);
    if constexpr (DST_BYTES == 8) return options.saturates ? finite(bits) : bits;
    if constexpr (DST_BYTES == 4) {
      const uint32_t rounded = __float_as_uint(value != value ? nan : static_cast<float>(value));
      return options.saturates ? finite(rounded) : rounded;
    }
    if constexpr (DST_BYTES == 2) {
      const uint16_t rounded = narrow(value != value ? nan : round_to_odd(value), options.dst_dtype);
      return options.saturates ? finite(rounded, options.dst_dtype) : rounded;
    }
  }
};

template <uint32_t SRC_BYTES>
struct CastToF64 {
  CastOptions options;

  MEMBER uint64_t operator()(typename Bits<SRC_BYTES>::Type bits) const {
    float value;
    if constexpr (SRC_BYTES == 4) value = __uint_as_float(bits);
    if constexpr (SRC_BYTES == 2) value = widen_signed(bits, options.src_dtype);
    const uint64_t sign = static_cast<uint64_t>(__float_as_uint(value) & 0x80000000u) << 32;
    const uint64_t wide = value != value ? sign | 0x7ff8000000000000u : bits_of(static_cast<double>(value));
    return options.saturates ? finite(wide) : wide;
  }
};

struct StochasticGroup {
  using G = Group<4, 2>;
  RoundingKey key;
  uint64_t first_index;  // of the piece
  uint32_t dst_dtype;
  bool saturates;

  MEMBER void operator()(const typename G::Source& source, typename G::Target& target, int32_t first) const {
    const Pack random = random_bits<8>(first_index + static_cast<int64_t>(first), key);
    target[0] = {};
#pragma unroll
    for (uint32_t k = 0; k < G::LANES; ++k) {
      const float value = __uint_as_float(source[k / 4].words[k % 4]);
      const uint16_t rounded = round_stochastic(value, element<2>(random, k), dst_dtype);
      set_element<2>(target[0], k, saturates ? finite(rounded, dst_dtype) : rounded);
    }
  }
};

// x = f(x) in f32 (f64 for f64), rounded back.
template <uint32_t BYTES, class Function>
struct UpdateGroup {
  using G = Group<BYTES, BYTES>;
  Function function;
  uint32_t dtype;

  MEMBER void operator()(const typename G::Source& source, typename G::Target& target, int32_t) const {
    typename Wide<BYTES>::Type x[G::LANES];
    widen<BYTES>(source[0], dtype, x);
#pragma unroll
    for (uint32_t k = 0; k < G::LANES; ++k) {
      x[k] = function(x[k]);
      if constexpr (BYTES == 4) set_element<4>(target[0], k, __float_as_uint(x[k]));
      if constexpr (BYTES == 8) set_element<8>(target[0], k, bits_of(x[k]));
    }
    if constexpr (BYTES == 2) target[0] = narrow_pack(x, dtype);
  }
};

struct Times {
  float coef;
  MEMBER float operator()(float x) const { return x * coef; }
  MEMBER double operator()(double x) const { return x * static_cast<double>(coef); }
};

// NaN fails both comparisons.
template <class Real>
struct Within {
  Real limit;
  MEMBER Real operator()(Real x) const {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
  }
};

// ---- one launch ----------------------------------------------------------------------------------------------------

// The same tensor on both sides.
template <class Visit>
DEVICE void for_each_chunk_in_place(const CastTensor* tensors, const ChunkRange& range, const Visit& visit) {
  for_each_chunk(tensors, range, [&](const CastTensor& tensor, Piece piece, uint64_t) {
    const uint64_t end = tensor.dst + tensor.len_elems * size_bytes(tensor.dst_dtype);
    visit(tensor, Piece{piece.dst, piece.dst, {tensor.dst, end}, piece.len_elems});
  });
}

template <uint32_t SRC_BYTES>
DEVICE void cast_from(const Piece& piece, const CastOptions& options) {
  switch (size_bytes(options.dst_dtype)) {
    case 8: return map_elements<SRC_BYTES, 8>(piece, CastToF64<SRC_BYTES>{options});
    case 4: return map_chunk<SRC_BYTES, 4>(piece, CastGroup<SRC_BYTES, 4>{options});
    default: return map_chunk<SRC_BYTES, 2>(piece, CastGroup<SRC_BYTES, 2>{options});
  }
}

DEVICE void cast_from_f64(const Piece& piece, const CastOptions& options) {
  switch (size_bytes(options.dst_dtype)) {
    case 8: return map_elements<8, 8>(piece, CastFromF64<8>{options});
    case 4: return map_elements<8, 4>(piece, CastFromF64<4>{options});
    default: return map_elements<8, 2>(piece, CastFromF64<2>{options});
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) cast_tensors(
    const __grid_constant__ CastArguments arguments) {
  for_each_chunk(arguments.tensors, arguments.range, [&](const CastTensor& tensor, const Piece& piece, uint64_t) {
    const CastOptions options = {tensor.src_dtype, tensor.dst_dtype, arguments.saturates != 0};
    switch (size_bytes(tensor.src_dtype)) {
      case 8: return cast_from_f64(piece, options);
      case 4: return cast_from<4>(piece, options);
      default: return cast_from<2>(piece, options);
    }
  });
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) cast_stochastic(
    const __grid_constant__ CastArguments arguments) {
  for_each_chunk(arguments.tensors, arguments.range, [&](const CastTensor& tensor, const Piece& piece, uint64_t first) {
    const bool saturates = arguments.saturates != 0;
    const StochasticGroup group = {arguments.key, tensor.first_index + first, tensor.dst_dtype, saturates};
    map_chunk<4, 2>(piece, group);
  });
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) scale_tensors(
    const __grid_constant__ ScaleArguments arguments) {
  const float coef = arguments.signal->clip_coef;
  if (coef == 1.0f) return;
  const auto visit = [&](const CastTensor& tensor, const Piece& piece) {
    const uint32_t dtype = tensor.dst_dtype;
    switch (size_bytes(dtype)) {
      case 8: return map_chunk<8, 8>(piece, UpdateGroup<8, Times>{{coef}, dtype});
      case 4: return map_chunk<4, 4>(piece, UpdateGroup<4, Times>{{coef}, dtype});
      default: return map_chunk<2, 2>(piece, UpdateGroup<2, Times>{{coef}, dtype});
    }
  };
  for_each_chunk_in_place(arguments.tensors, arguments.range, visit);
}

// The limit in the gradients' own units: what clipping by norm found is multiplied in by the step only, and the loss scale
// divided out there.
DEVICE float limit_of(const ClampArguments& arguments) {
  if (arguments.signal == nullptr) return static_cast<float>(arguments.limit);
  const double scale = arguments.signal->grad_scale, coef = arguments.signal->clip_coef;
  return static_cast<float>(arguments.limit * scale / coef);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 3) clamp_tensors(
    const __grid_constant__ ClampArguments arguments) {
  const float limit = limit_of(arguments);
  if (limit != limit) return;  // a NaN norm was propagated: the step makes NaN of everything
  const auto visit = [&](const CastTensor& tensor, const Piece& piece) {
    const uint32_t dtype = tensor.dst_dtype;
    if (dtype == F64) {
      return map_chunk<8, 8>(piece, UpdateGroup<8, Within<double>>{{static_cast<double>(limit)}, dtype});
    }
    if (dtype == F32) return map_chunk<4, 4>(piece, UpdateGroup<4, Within<float>>{{limit}, dtype});
    const float rounded = widen_signed(narrow(limit, dtype), dtype);
    map_chunk<2, 2>(piece, UpdateGroup<2, Within<float>>{{rounded}, dtype});
  };
  for_each_chunk_in_place(arguments.tensors, arguments.range, visit);
}
