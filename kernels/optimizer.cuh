// One optimizer step over the chunks of a launch, whatever the rule.
//
//   thread t of a block: elements 4t .. 4t + 3 of every 1,024 of the chunk; two such groups are loaded before one is stored
//       g, weight, states = load;   weight, states = rule(g, weight, states);   store
//
// Four elements are 16 bytes of every f32 stream, which is most of what moves, and 8 of a 16-bit one: both are read and
// written without a gap. Groups begin where the master weights (else the states, else the model weights) lie on 16 bytes; if
// another stream does not, and at both ends of a chunk, elements go one by one.
#pragma once
#include "philox.cuh"
#include "step.cuh"
#include "table.cuh"

constexpr uint32_t BLOCK_THREADS = 256;
constexpr int32_t LANES = 4;
constexpr int32_t STEP_ELEMS = BLOCK_THREADS * LANES;

// src/abi/optimizer.rs: OptimizerTensor. Addresses; 0 where there is none.
struct OptimizerTensor {
  uint64_t gradient;
  uint64_t master;     // f32; none: the model weights are widened, updated and rounded back
  uint64_t model;      // f16 or bf16
  uint64_t states[2];  // f32
  uint64_t len_elems;
  uint64_t first_index;  // global, for stochastic rounding
  uint32_t gradient_dtype;
  uint32_t model_dtype;
  uint32_t decays;  // weight decay applies
  uint32_t padding;
};
static_assert(sizeof(OptimizerTensor) == 72, "src/abi/optimizer.rs");

// src/abi/optimizer.rs: OptimizerState. In device memory: what the bias correction and the rounding depend on.
struct OptimizerState {
  uint64_t steps;          // made
  uint64_t skipped_steps;
  uint32_t arrivals;       // wraps to 0
  uint32_t padding;
};
static_assert(sizeof(OptimizerState) == 24, "src/abi/optimizer.rs");

// src/abi/optimizer.rs: OptimizerArguments
struct OptimizerArguments {
  const OptimizerTensor* tensors;
  ChunkRange range;
  const void* rule;  // AdamWRule or SgdRule, in device memory: a learning rate may change under a captured graph
  OptimizerState* state;
  const StepSignal* signal;  // null: gradients as they are
  uint64_t rounding_seed;
  uint32_t is_stochastic;  // model weights without master
  uint32_t padding;
};
static_assert(sizeof(OptimizerArguments) == 72, "src/abi/optimizer.rs");

// One chunk: addresses of its first element; 0 stays 0.
struct Streams {
  uint64_t gradient, master, model, states[2];
  uint64_t index;  // global
  uint32_t gradient_dtype, model_dtype;
  int32_t len_elems;
  bool decays;
};

struct Rounding {
  RoundingKey key;
  bool is_stochastic;
};

// ---- four elements of one stream -----------------------------------------------------------------------------------

// Elements `first + k` that lie in the chunk.
DEVICE bool is_inside(const Streams& streams, int32_t index) { return index >= 0 && index < streams.len_elems; }

template <bool WHOLE>
DEVICE void load_single(const Streams& streams, uint64_t address, int32_t first, float (&x)[LANES]) {
  address += static_cast<int64_t>(first) * 4;
  if constexpr (WHOLE) {
    const Pack pack = load_pack(address);
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) x[k] = __uint_as_float(pack.words[k]);
  } else {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) {
      x[k] = is_inside(streams, first + k) ? __uint_as_float(load_bits<4>(address + k * 4)) : 0.0f;
    }
  }
}

template <bool WHOLE>
DEVICE void load_half(const Streams& streams, uint64_t address, uint32_t dtype, int32_t first, float (&x)[LANES]) {
  address += static_cast<int64_t>(first) * 2;
  uint64_t bits = 0;
  if constexpr (WHOLE) {
    bits = load_bits<8>(address);
  } else {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) {
      if (is_inside(streams, first + k)) bits |= static_cast<uint64_t>(load_bits<2>(address + k * 2)) << 16 * k;
    }
  }
  if (dtype == F16) {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) x[k] = widen_half(static_cast<uint16_t>(bits >> 16 * k));
  } else {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) x[k] = __uint_as_float(static_cast<uint32_t>(bits >> 16 * k) << 16);
  }
}

template <bool WHOLE>
DEVICE void store_single(const Streams& streams, uint64_t address, int32_t first, const float (&x)[LANES]) {
  address += static_cast<int64_t>(first) * 4;
  if constexpr (WHOLE) {
    Pack pack;
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) pack.words[k] = __float_as_uint(x[k]);
    store_pack(address, pack);
  } else {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) {
      if (is_inside(streams, first + k)) store_bits<4>(address + k * 4, __float_as_uint(x[k]));
    }
  }
}

template <bool WHOLE>
DEVICE void store_half(const Streams& streams, uint64_t address, int32_t first, const uint32_t (&words)[LANES / 2]) {
  address += static_cast<int64_t>(first) * 2;
  if constexpr (WHOLE) {
    store_bits<8>(address, static_cast<uint64_t>(words[1]) << 32 | words[0]);
  } else {
#pragma unroll
    for (int32_t k = 0; k < LANES; ++k) {
      const uint16_t bits = static_cast<uint16_t>(words[k / 2] >> k % 2 * 16);
      if (is_inside(streams, first + k)) store_bits<2>(address + k * 2, bits);
    }
  }
}

// ---- four elements of all streams ----------------------------------------------------------------------------------

template <class Rule>
struct Quad {
  float gradient[LANES], weight[LANES], states[Rule::STATES][LANES];
};

template <bool WHOLE, class Rule>
DEVICE void load_quad(const Streams& streams, const Rule& rule, int32_t first, Quad<Rule>& quad) {
  if (streams.gradient_dtype == F32) {
    load_single<WHOLE>(streams, streams.gradient, first, quad.gradient);
  } else {
    load_half<WHOLE>(streams, streams.gradient, streams.gradient_dtype, first, quad.gradient);
  }
  if (streams.master != 0) {
    load_single<WHOLE>(streams, streams.master, first, quad.weight);
  } else {
    load_half<WHOLE>(streams, streams.model, streams.model_dtype, first, quad.weight);
  }
#pragma unroll
  for (uint32_t s = 0; s < Rule::STATES; ++s) {
    if (rule.keeps_state()) load_single<WHOLE>(streams, streams.states[s], first, quad.states[s]);
  }
}

template <bool WHOLE, class Rule>
DEVICE void update_quad(const Streams& streams, const Rule& rule, const Rounding& rounding, int32_t first,
                        Quad<Rule>& quad) {
#pragma unroll
  for (int32_t k = 0; k < LANES; ++k) {
    float states[Rule::STATES];
#pragma unroll
    for (uint32_t s = 0; s < Rule::STATES; ++s) states[s] = quad.states[s][k];
    quad.weight[k] = rule.update(quad.gradient[k], quad.weight[k], states, streams.decays);
#pragma unroll
    for (uint32_t s = 0; s < Rule::STATES; ++s) quad.states[s][k] = states[s];
  }
#pragma unroll
  for (uint32_t s = 0; s < Rule::STATES; ++s) {
    if (rule.keeps_state()) store_single<WHOLE>(streams, streams.states[s], first, quad.states[s]);
  }
  if (streams.master != 0) store_single<WHOLE>(streams, streams.master, first, quad.weight);
  if (streams.model == 0) return;
  uint32_t words[LANES / 2] = {};
  if (streams.master == 0 && rounding.is_stochastic) {
    const Pack random = random_bits<LANES>(streams.index + static_cast<int64_t>(first), rounding.key);
#pragma unroll
    for (uint32_t k = 0; k < LANES; ++k) {
      const uint16_t bits = round_stochastic(quad.weight[k], element<2>(random, k), streams.model_dtype);
      words[k / 2] |= static_cast<uint32_t>(bits) << k % 2 * 16;
    }
  } else {
    narrow_all(quad.weight, streams.model_dtype, words);
  }
  store_half<WHOLE>(streams, streams.model, first, words);
}

// ---- one chunk -----------------------------------------------------------------------------------------------------

// How many elements of `BYTES` bytes before the next 16-byte (for 2 bytes: 8-byte) border.
template <uint32_t BYTES>
DEVICE int32_t head_of(uint64_t address) {
  return static_cast<int32_t>((LANES * BYTES - address % (LANES * BYTES)) % (LANES * BYTES) / BYTES);
}

template <class Rule>
DEVICE void update_chunk(const Streams& streams, const Rule& rule, const Rounding& rounding) {
  const int32_t head = streams.master != 0      ? head_of<4>(streams.master)
                       : streams.states[0] != 0 ? head_of<4>(streams.states[0])
                                                : head_of<2>(streams.model);
  bool aligned = streams.gradient_dtype == F32 ? head_of<4>(streams.gradient) == head
                                               : head_of<2>(streams.gradient) == head;
  aligned &= streams.model == 0 || head_of<2>(streams.model) == head;
  aligned &= streams.states[0] == 0 || head_of<4>(streams.states[0]) == head;
  aligned &= streams.states[1] == 0 || head_of<4>(streams.states[1]) == head;
  // The group before the first aligned one holds the head.
  int32_t first = (head == 0 ? 0 : head - LANES) + static_cast<int32_t>(threadIdx.x) * LANES;
#pragma unroll 1
  while (aligned && first >= 0 && first + STEP_ELEMS + LANES <= streams.len_elems) {
    Quad<Rule> quads[2];
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) load_quad<true>(streams, rule, first + i * STEP_ELEMS, quads[i]);
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) update_quad<true>(streams, rule, rounding, first + i * STEP_ELEMS, quads[i]);
    first += 2 * STEP_ELEMS;
  }
#pragma unroll 1
  for (; first < streams.len_elems; first += STEP_ELEMS) {
    Quad<Rule> quad;
    load_quad<false>(streams, rule, first, quad);
    update_quad<false>(streams, rule, rounding, first, quad);
  }
}

// ---- one launch ----------------------------------------------------------------------------------------------------

DEVICE uint64_t advanced(uint64_t address, uint64_t bytes) { return address == 0 ? 0 : address + bytes; }

template <class Rule>
DEVICE void update_all(const OptimizerArguments& arguments, const Rule& rule, uint64_t step) {
  const ChunkRange& range = arguments.range;
  const Rounding rounding = {{arguments.rounding_seed, step}, arguments.is_stochastic != 0};
#pragma unroll 1
  for (uint64_t at = blockIdx.x; at < range.len_chunks; at += gridDim.x) {
    const ChunkRef chunk = range.chunks[range.first_chunk + at];
    const OptimizerTensor& tensor = arguments.tensors[chunk.tensor];
    const uint64_t first = chunk.index * CHUNK_ELEMS;
    Streams streams;
    streams.gradient = tensor.gradient + first * size_bytes(tensor.gradient_dtype);
    streams.master = advanced(tensor.master, first * 4);
    streams.model = advanced(tensor.model, first * 2);
    streams.states[0] = advanced(tensor.states[0], first * 4);
    streams.states[1] = advanced(tensor.states[1], first * 4);
    streams.index = tensor.first_index + first;
    streams.gradient_dtype = tensor.gradient_dtype;
    streams.model_dtype = tensor.model_dtype;
    streams.len_elems = static_cast<int32_t>(min(CHUNK_ELEMS, tensor.len_elems - first));
    streams.decays = tensor.decays != 0;
    update_chunk(streams, rule, rounding);
  }
}

// clip_coef / grad_scale, rounded once.
DEVICE float factor_of(const StepSignal* signal) {
  if (signal == nullptr) return 1.0f;
  return static_cast<float>(static_cast<double>(signal->clip_coef) / static_cast<double>(signal->grad_scale));
}

// Counts the step. Every block has read `steps` before it arrives, so the last one may change it.
DEVICE void count_step(const OptimizerArguments& arguments, uint64_t step) {
  if (threadIdx.x == 0 && is_last_in(&arguments.state->arrivals, gridDim.x)) arguments.state->steps = step;
}
