// From slots to the norm, the clip coefficient and the decision to skip: the last block of a launch, 256 threads.
//
//   lane t: slots t, t + 256, t + 512, ..  in order                       f64, as COMBINE_LANES of src/ops/norm.rs
//   sum   = tree over the 256 lanes, halves onto halves
//   norm  = sum, sqrt(sum), sum^(1/p)  times the common scale;  NaN if there is a NaN, else infinite if there is an infinity
//   total_norm = norm / grad_scale
//   clip_coef  = min(1, max_norm / (total_norm + 1e-6)), rounded once     1 if the step is skipped
//
// Slots of unequal scale (other exponents, f64 out of range) are brought to the largest one in a second walk.
// Cost: 16 bytes for each 32,768 elements, read once. The signal stays on the device; the record goes to pinned host memory.
#pragma once
#include "norm.cuh"
#include "step.cuh"

// src/abi/norm.rs: NormRecord. One of a ring in pinned host memory.
struct NormRecord {
  StepSignal signal;
  uint32_t generation;  // posted last; 0 while the record is written
  uint32_t padding;
};
static_assert(sizeof(NormRecord) == 40, "src/abi/norm.rs");

// src/abi/norm.rs: NormState. In device memory, zero at first, so a captured graph can be replayed.
struct NormState {
  uint32_t arrivals;    // wraps to 0
  uint32_t generation;  // norms finished so far
};
static_assert(sizeof(NormState) == 8, "src/abi/norm.rs");

// src/abi/norm.rs: norm_skip. What skips the step.
enum NormSkip : uint32_t {
  NEVER = 0,
  NONFINITE = 1,          // a NaN or an infinity
  NONFINITE_OR_BEFORE = 2,  // that, or what the signal says already, of these gradients before they were clipped by value
};

// src/abi/norm.rs: CombineArguments
struct CombineArguments {
  NormSlot* slots;
  NormState* state;
  StepSignal* signal;
  NormRecord* records;
  const float* grad_scale;  // null: 1
  double max_norm;
  double p;
  uint64_t len_slots;
  uint32_t len_records;
  uint32_t kind;       // NormKind
  uint32_t finishes;   // 0: slots only, another launch finishes
  uint32_t skips;      // NormSkip
};
static_assert(sizeof(CombineArguments) == 80, "src/abi/norm.rs");

// What a thread, then the block, knows of the slots.
struct Survey {
  double largest_scale;
  double least_scale;
  double largest;      // of the sums, which are maxima for LARGEST
  uint64_t first_bad;  // slot that is not finite
  bool has_nan;
};

DEVICE void merge(Survey& into, const Survey& other) {
  into.largest_scale = fmax(into.largest_scale, other.largest_scale);
  into.least_scale = fmin(into.least_scale, other.least_scale);
  into.largest = fmax(into.largest, other.largest);
  into.first_bad = min(into.first_bad, other.first_bad);
  into.has_nan |= other.has_nan;
}

// A slot without a term has nothing to scale: its scale does not count, and 0 times any ratio would be added.
DEVICE double powered(double ratio, NormKind kind, double p) {
  return kind == L2 ? ratio * ratio : kind == POWER ? power(ratio, p) : ratio;
}

struct CombineBoard {
  double lanes[BLOCK_THREADS];
  Survey surveys[BLOCK_THREADS / 32];
};

DEVICE NormSlot read_slot(const NormSlot* slots, uint64_t index) {
  const Pack pack = load_pack(reinterpret_cast<uint64_t>(slots + index));
  double parts[2];
  widen<8>(pack, F64, parts);
  return {parts[0], parts[1]};
}

// Sums the thread's slots, eight loads in flight, and surveys them.
DEVICE double walk(const CombineArguments& arguments, Survey& survey) {
  double sum = 0.0;
  for (uint64_t first = threadIdx.x; first < arguments.len_slots; first += 8 * BLOCK_THREADS) {
    NormSlot slots[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const uint64_t index = first + i * BLOCK_THREADS;
      slots[i] = index < arguments.len_slots ? read_slot(arguments.slots, index) : NormSlot{0.0, 1.0};
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const NormSlot slot = slots[i];
      sum += slot.sum;
      if (slot.sum == 0.0) continue;
      const bool bad = !is_finite(slot.sum);
      const Survey one = {slot.scale, slot.scale, slot.sum, bad ? first + i * BLOCK_THREADS : UINT64_MAX,
                          slot.sum != slot.sum};
      merge(survey, one);
    }
  }
  return sum;
}

// As `walk`, for slots that do not all have the scale `scale`.
DEVICE double walk_scaled(const CombineArguments& arguments, double scale) {
  double sum = 0.0;
#pragma unroll 1
  for (uint64_t index = threadIdx.x; index < arguments.len_slots; index += BLOCK_THREADS) {
    const NormSlot slot = read_slot(arguments.slots, index);
    if (slot.sum == 0.0) continue;
    const NormKind kind = static_cast<NormKind>(arguments.kind);
    sum += slot.scale == scale ? slot.sum : slot.sum * powered(slot.scale / scale, kind, arguments.p);
  }
  return sum;
}

DEVICE Survey survey_of_block(CombineBoard& board, Survey survey) {
#pragma unroll
  for (uint32_t threads = 16; threads > 0; threads /= 2) {
    const Survey other = {__shfl_xor_sync(0xffffffffu, survey.largest_scale, threads),
                          __shfl_xor_sync(0xffffffffu, survey.least_scale, threads),
                          __shfl_xor_sync(0xffffffffu, survey.largest, threads),
                          __shfl_xor_sync(0xffffffffu, survey.first_bad, threads),
                          __shfl_xor_sync(0xffffffffu, static_cast<int>(survey.has_nan), threads) != 0};
    merge(survey, other);
  }
  if (threadIdx.x % 32 == 0) board.surveys[threadIdx.x / 32] = survey;
  __syncthreads();
#pragma unroll
  for (uint32_t warp = 0; warp < BLOCK_THREADS / 32; ++warp) merge(survey, board.surveys[warp]);
  return survey;
}

DEVICE double tree_of_block(CombineBoard& board, double sum) {
  board.lanes[threadIdx.x] = sum;
  for (uint32_t width = BLOCK_THREADS / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) board.lanes[threadIdx.x] += board.lanes[threadIdx.x + width];
  }
  __syncthreads();
  return board.lanes[0];
}

// Writes what the step needs, and posts a copy for the host.
DEVICE void report(const CombineArguments& arguments, double norm, const Survey& survey) {
  const float grad_scale = arguments.grad_scale == nullptr ? 1.0f : *arguments.grad_scale;
  StepSignal signal;
  signal.total_norm = norm / static_cast<double>(grad_scale);
  signal.first_nonfinite = survey.first_bad;
  signal.nonfinite = survey.first_bad != UINT64_MAX;
  const bool before = arguments.skips == NONFINITE_OR_BEFORE && arguments.signal->found_inf != 0;
  signal.found_inf = before || (signal.nonfinite != 0 && arguments.skips != NEVER);
  const double coef = arguments.max_norm / (signal.total_norm + 1e-6);
  signal.clip_coef = signal.found_inf != 0 || coef > 1.0 ? 1.0f : static_cast<float>(coef);
  signal.grad_scale = grad_scale;
  *arguments.signal = signal;
  const uint32_t generation = arguments.state->generation + 1;
  arguments.state->generation = generation;
  if (arguments.len_records == 0) return;
  NormRecord* const record = arguments.records + generation % arguments.len_records;
  retract(&record->generation);
  record->signal = signal;
  post(&record->generation, generation);
}

// The last block to come here combines the slots of all. Every thread of every block comes here; `arrivals` counts them.
template <Terms TERMS>
DEVICE void combine(const CombineArguments& arguments, CombineBoard& board, uint32_t& is_last) {
  if (arguments.finishes == 0) return;
  __syncthreads();
  if (threadIdx.x == 0) is_last = is_last_in(&arguments.state->arrivals, gridDim.x);
  __syncthreads();
  if (is_last == 0) return;
  const double infinity = __longlong_as_double(0x7ff0000000000000);
  Survey survey = {0.0, infinity, 0.0, UINT64_MAX, false};
  double sum = walk(arguments, survey);
  survey = survey_of_block(board, survey);
  const double scale = survey.largest_scale;
  if (survey.first_bad == UINT64_MAX && survey.least_scale < scale) sum = walk_scaled(arguments, scale);
  sum = tree_of_block(board, sum);
  if (threadIdx.x != 0) return;
  const NormKind kind = static_cast<NormKind>(arguments.kind);
  double norm = kind == L2 ? sqrt(sum) * scale : sum * scale;
  if constexpr (TERMS != Terms::SUMS) norm = power(sum, 1.0 / arguments.p) * scale;
  if (kind == LARGEST) norm = survey.largest;
  if (scale == 0.0) norm = 0.0;
  if (survey.first_bad != UINT64_MAX) norm = survey.has_nan ? __longlong_as_double(0x7ff8000000000000) : infinity;
  report(arguments, norm, survey);
}

// The body of a kernel that measures: every team takes its chunks (table.cuh), then the last block combines.
// `measure(chunk, team, exponent)` gives a chunk's slot; all threads of the team come there.
template <Terms TERMS, class Measure>
DEVICE void measure_all(const ChunkRange& range, const CombineArguments& arguments, const Measure& measure) {
  __shared__ TeamBoard boards[TEAMS];
  __shared__ CombineBoard combine_board;
  __shared__ uint32_t is_last;
  const uint32_t number = threadIdx.x / TEAM_THREADS;
  const Team team = {&boards[number], number, threadIdx.x % TEAM_THREADS};
  const Exponent exponent = {static_cast<NormKind>(arguments.kind), arguments.p};
  uint64_t at = blockIdx.x + static_cast<uint64_t>(gridDim.x) * number;
#pragma unroll 1
  for (; at < range.len_chunks; at += static_cast<uint64_t>(gridDim.x) * TEAMS) {
    const NormSlot slot = measure(range.chunks[range.first_chunk + at], team, exponent);
    if (team.thread == 0) arguments.slots[range.first_chunk + at] = slot;
  }
  combine<TERMS>(arguments, combine_board, is_last);
}
