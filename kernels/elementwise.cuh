// Element-wise work on one chunk by a block of 256 threads.
//
//   group = LANES elements: 16 bytes of the narrower side, 16 or more of the wider one
//   groups begin where `dst` lies on 16 bytes:     | head |  group | group | .. | tail |
//   thread t: groups t, t + 256, ..                four packs loaded before the first is stored
//
// So every store is 16 bytes but for the chunk's head and tail. A source that lies otherwise is read with shifted pairs
// of aligned loads (pack.cuh). `src` and `dst` are the same memory or do not overlap. Where a side has two packs in a
// group, two threads move their groups together (pack.cuh).
#pragma once
#include "table.cuh"

constexpr uint32_t BLOCK_THREADS = 256;

// src/abi/cast.rs: CastTensor
struct CastTensor {
  uint64_t src;  // address
  uint64_t dst;  // address
  uint64_t len_elems;
  uint64_t first_index;  // global index of the first element
  uint32_t src_dtype;
  uint32_t dst_dtype;
};
static_assert(sizeof(CastTensor) == 40, "src/abi/cast.rs");

// One chunk: addresses of its first element.
struct Piece {
  uint64_t src;
  uint64_t dst;
  Span src_span;  // of the whole tensor
  uint32_t len_elems;
};

template <uint32_t SRC_BYTES, uint32_t DST_BYTES>
struct Group {
  static constexpr uint32_t LANES = PACK_BYTES / (SRC_BYTES < DST_BYTES ? SRC_BYTES : DST_BYTES);
  static constexpr uint32_t SRC_PACKS = LANES * SRC_BYTES / PACK_BYTES;
  static constexpr uint32_t DST_PACKS = LANES * DST_BYTES / PACK_BYTES;
  static constexpr uint32_t IN_FLIGHT = 4 / SRC_PACKS;
  using Source = Pack[SRC_PACKS];
  using Target = Pack[DST_PACKS];
};

// Elements `first ..` of the piece, some of which may lie outside it: those are zero.
template <uint32_t BYTES, uint32_t PACKS>
DEVICE void load_group(const Piece& piece, int32_t first, bool is_whole, Pack (&packs)[PACKS]) {
  constexpr int32_t ELEMS = PACK_BYTES / BYTES;
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) {
    const int32_t index = first + static_cast<int32_t>(i) * ELEMS;
    const uint64_t address = piece.src + static_cast<int64_t>(index) * BYTES;
    if (is_whole && load_wide(piece.src_span, address, packs[i])) continue;
    packs[i] = {};
#pragma unroll
    for (int32_t k = 0; k < ELEMS; ++k) {
      const bool is_inside = index + k >= 0 && index + k < static_cast<int32_t>(piece.len_elems);
      if (is_inside) set_element<BYTES>(packs[i], k, load_bits<BYTES>(address + k * BYTES));
    }
  }
}

template <uint32_t BYTES, uint32_t PACKS>
DEVICE void store_group(const Piece& piece, int32_t first, bool is_whole, const Pack (&packs)[PACKS]) {
  constexpr int32_t ELEMS = PACK_BYTES / BYTES;
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) {
    const int32_t index = first + static_cast<int32_t>(i) * ELEMS;
    const uint64_t address = piece.dst + static_cast<int64_t>(index) * BYTES;
    if (is_whole) {
      store_pack(address, packs[i]);
      continue;
    }
#pragma unroll
    for (int32_t k = 0; k < ELEMS; ++k) {
      const bool is_inside = index + k >= 0 && index + k < static_cast<int32_t>(piece.len_elems);
      if (is_inside) store_bits<BYTES>(address + k * BYTES, element<BYTES>(packs[i], k));
    }
  }
}

// What stands where `store_group` will store.
template <uint32_t BYTES, uint32_t PACKS>
DEVICE void load_target(const Piece& piece, int32_t first, bool is_whole, Pack (&packs)[PACKS]) {
  constexpr int32_t ELEMS = PACK_BYTES / BYTES;
#pragma unroll
  for (uint32_t i = 0; i < PACKS; ++i) {
    const int32_t index = first + static_cast<int32_t>(i) * ELEMS;
    const uint64_t address = piece.dst + static_cast<int64_t>(index) * BYTES;
    if (is_whole) {
      packs[i] = load_pack(address);
      continue;
    }
    packs[i] = {};
#pragma unroll
    for (int32_t k = 0; k < ELEMS; ++k) {
      const bool is_inside = index + k >= 0 && index + k < static_cast<int32_t>(piece.len_elems);
      if (is_inside) set_element<BYTES>(packs[i], k, load_bits<BYTES>(address + k * BYTES));
    }
  }
}

// dst = op(src) for one chunk. `op(source, target, first)` makes one group; `first` is its first element in the piece,
// negative if the group begins before it. UPDATES: `target` holds what stands in `dst`, and is changed.
template <uint32_t SRC_BYTES, uint32_t DST_BYTES, bool UPDATES = false, class Op>
DEVICE void map_chunk(const Piece& piece, const Op& op) {
  using G = Group<SRC_BYTES, DST_BYTES>;
  constexpr int32_t LANES = G::LANES, IN_FLIGHT = G::IN_FLIGHT;
  const int32_t len_elems = static_cast<int32_t>(piece.len_elems);
  const int32_t head = static_cast<int32_t>((PACK_BYTES - piece.dst % PACK_BYTES) % PACK_BYTES / DST_BYTES);
  const bool same_phase = (piece.src + head * SRC_BYTES) % PACK_BYTES == 0;
  constexpr int32_t STEP = BLOCK_THREADS * LANES;
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  int32_t first = head + static_cast<int32_t>(threadIdx.x) * LANES;
  // The threads of a warp go together.
#pragma unroll 1
  while (same_phase && first + (IN_FLIGHT - 1) * STEP + (32 - lane) * LANES <= len_elems) {
    typename G::Source source[IN_FLIGHT];
    typename G::Target target[IN_FLIGHT];
#pragma unroll
    for (int32_t i = 0; i < IN_FLIGHT; ++i) {
      load_together(piece.src + static_cast<uint32_t>(first + i * STEP) * SRC_BYTES, source[i]);
      if constexpr (UPDATES) load_together(piece.dst + static_cast<uint32_t>(first + i * STEP) * DST_BYTES, target[i]);
    }
#pragma unroll
    for (int32_t i = 0; i < IN_FLIGHT; ++i) {
      exchange(source[i]);
      if constexpr (UPDATES) exchange(target[i]);
      op(source[i], target[i], first + i * STEP);
      exchange(target[i]);
      store_together(piece.dst + static_cast<uint32_t>(first + i * STEP) * DST_BYTES, target[i]);
    }
    first += IN_FLIGHT * STEP;
  }
  // The head is in the group before the first, and the first thread's last.
  bool has_head = head > 0 && threadIdx.x == 0;
#pragma unroll 1
  for (; first < len_elems || has_head; first += STEP) {
    const bool is_head = first >= len_elems;
    has_head &= !is_head;
    const int32_t begin = is_head ? head - LANES : first;
    const bool is_whole = begin >= 0 && begin + LANES <= len_elems;
    typename G::Source source;
    typename G::Target target;
    load_group<SRC_BYTES>(piece, begin, is_whole, source);
    if constexpr (UPDATES) load_target<DST_BYTES>(piece, begin, is_whole, target);
    op(source, target, begin);
    store_group<DST_BYTES>(piece, begin, is_whole, target);
  }
}

// As `map_chunk`, one element at a time: for f64 into another dtype, which no step of a training needs.
template <uint32_t SRC_BYTES, uint32_t DST_BYTES, class Op>
DEVICE void map_elements(const Piece& piece, const Op& op) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < piece.len_elems; i += BLOCK_THREADS) {
    const auto bits = load_bits<SRC_BYTES>(piece.src + i * SRC_BYTES);
    store_bits<DST_BYTES>(piece.dst + i * DST_BYTES, op(bits));
  }
}

DEVICE Piece piece_of(const CastTensor& tensor, uint32_t chunk) {
  const uint64_t first = chunk * CHUNK_ELEMS;
  const uint32_t src_bytes = size_bytes(tensor.src_dtype), dst_bytes = size_bytes(tensor.dst_dtype);
  const uint32_t len_elems = static_cast<uint32_t>(min(CHUNK_ELEMS, tensor.len_elems - first));
  const Span src_span = {tensor.src, tensor.src + tensor.len_elems * src_bytes};
  return {tensor.src + first * src_bytes, tensor.dst + first * dst_bytes, src_span, len_elems};
}

// Calls `visit(tensor, piece, first element)` for the chunks of this block.
template <class Visit>
DEVICE void for_each_chunk(const CastTensor* tensors, const ChunkRange& range, const Visit& visit) {
#pragma unroll 1
  for (uint64_t at = blockIdx.x; at < range.len_chunks; at += gridDim.x) {
    const ChunkRef chunk = range.chunks[range.first_chunk + at];
    const CastTensor tensor = tensors[chunk.tensor];
    visit(tensor, piece_of(tensor, chunk.index), chunk.index * CHUNK_ELEMS);
  }
}
