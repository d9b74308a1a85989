// The list of tensors that one launch works through, and how its blocks share it.
//
//   tensors[]  address, length and dtype of each, in device memory: any number of them, of any dtype and alignment
//   chunks[]   {tensor, index}: 32,768 elements each, tensor after tensor; the last of a tensor may be shorter
//
//   team t of block b of B blocks with T teams takes chunks  b + B * t, b + B * (t + T), ..
//
// So a launch of few chunks spreads over all blocks before any block gets a second one. Which block works on a chunk
// changes nothing in the result.
#pragma once
#include "pack.cuh"

constexpr uint64_t CHUNK_ELEMS = 32768;  // src/ops/host/sums.rs

// src/abi/table.rs: ChunkRef
struct ChunkRef {
  uint32_t tensor;
  uint32_t index;
};
static_assert(sizeof(ChunkRef) == 8, "src/abi/table.rs");

// src/abi/table.rs: ChunkRange. The chunks that this launch works on: a bucket's, or all.
struct ChunkRange {
  const ChunkRef* chunks;
  uint64_t first_chunk;
  uint64_t len_chunks;
};
static_assert(sizeof(ChunkRange) == 24, "src/abi/table.rs");

DEVICE uint32_t size_bytes(uint32_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }
