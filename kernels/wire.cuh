// How a chunk lies in a staging slot, and how it gets there: two protocols behind one pair of verbs, `put` and `take`.
//
//   Bulk    slot = elements; 16-byte accesses; a flag tells the reader that the whole slot is there.
//   Words   slot = 8-byte words {4 bytes of payload, 4 bytes of generation}; no flag: a word is there when its
//           generation is. Twice the bytes, but one trip over the link instead of two (data, then flag) and no fence.
//
// Words is NCCL's LL protocol, on 8-byte stores whose halves no reader can see apart. Its slots never hold anything but
// such words, and a writer refreshes every word of a slot at least once in WORDS_REFRESH transfers; so a stale word
// cannot be taken for a new one when generations wrap.
//
// Cost on the link: Bulk 1 byte a byte, and a flag line; Words 2 bytes a byte.
#pragma once
#include <cstdint>

#include "lane.cuh"
#include "mutant.cuh"

constexpr uint32_t PACK_BYTES = 16;
constexpr uint32_t WORDS_REFRESH = 1u << 24;

// `W` consecutive elements in registers.
template <class T, uint32_t W>
struct alignas(W * sizeof(T) >= 16 ? 16 : W * sizeof(T)) Pack {
  T lanes[W];
};

// What the second-level cache is asked to do with a line: to keep it, or to give it up before others.
enum Keep { CACHED, EVICT_FIRST };

// `pack = memory` in accesses of 16 bytes where W elements fill them. Never the non-coherent path (`ld.global.nc`): peers
// write staging while the kernel runs, and the compiler may move such a load above the wait. Addresses read from tables
// are generic to the compiler; it is told that they are global.
template <class T, uint32_t W, Keep KEEP = CACHED>
DEVICE Pack<T, W> load(const T* from) {
  __builtin_assume(__isGlobal(from));
  Pack<T, W> pack;
  if constexpr (W * sizeof(T) % PACK_BYTES == 0) {
    uint4* words = reinterpret_cast<uint4*>(&pack);
#pragma unroll
    for (uint32_t i = 0; i < W * sizeof(T) / PACK_BYTES; ++i) {
      const uint4* at = reinterpret_cast<const uint4*>(from) + i;
      if constexpr (KEEP == EVICT_FIRST) {
        asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                     : "l"(__cvta_generic_to_global(at))
                     : "memory");
      } else {
        words[i] = *at;
      }
    }
  } else {
#pragma unroll
    for (uint32_t lane = 0; lane < W; ++lane) pack.lanes[lane] = from[lane];
  }
  return pack;
}

// One instruction for 16 bytes: written as an assignment, the compiler takes the words apart into stores of 4 bytes, each of
// which makes a transaction for every sector of the warp's 512 bytes.
template <class T, uint32_t W, Keep KEEP = CACHED>
DEVICE void store(T* to, const Pack<T, W>& pack) {
  if constexpr (W * sizeof(T) % PACK_BYTES == 0) {
    const uint4* words = reinterpret_cast<const uint4*>(&pack);
#pragma unroll
    for (uint32_t i = 0; i < W * sizeof(T) / PACK_BYTES; ++i) {
      const auto at = __cvta_generic_to_global(reinterpret_cast<uint4*>(to) + i);
      if constexpr (KEEP == EVICT_FIRST) {
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(words[i].x), "r"(words[i].y),
                     "r"(words[i].z), "r"(words[i].w)
                     : "memory");
      } else {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(words[i].x), "r"(words[i].y),
                     "r"(words[i].z), "r"(words[i].w)
                     : "memory");
      }
    }
  } else if constexpr (W * sizeof(T) == 8) {
    const uint2 words = reinterpret_cast<const uint2&>(pack);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y)
                 : "memory");
  } else if constexpr (W * sizeof(T) == 4) {
    const uint32_t word = reinterpret_cast<const uint32_t&>(pack);
    asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(word) : "memory");
  } else {
    __builtin_assume(__isGlobal(to));
#pragma unroll
    for (uint32_t lane = 0; lane < W; ++lane) to[lane] = pack.lanes[lane];
  }
}

// The elements [low, high) of a pack, the others left as they are (loads: zero).
template <class T, uint32_t W>
DEVICE Pack<T, W> load_part(const T* from, uint32_t low, uint32_t high) {
  __builtin_assume(__isGlobal(from));
  Pack<T, W> pack = {};
#pragma unroll
  for (uint32_t lane = 0; lane < W; ++lane) {
    if (lane >= low && lane < high) pack.lanes[lane] = from[lane];
  }
  return pack;
}

template <class T, uint32_t W>
DEVICE void store_part(T* to, const Pack<T, W>& pack, uint32_t low, uint32_t high) {
  __builtin_assume(__isGlobal(to));
#pragma unroll
  for (uint32_t lane = 0; lane < W; ++lane) {
    if (lane >= low && lane < high) to[lane] = pack.lanes[lane];
  }
}

// Staging of one link and direction during one transfer.
struct Slot {
  unsigned char* bytes;
  uint32_t generation;  // of the transfer, from 1
};

struct Bulk {
  static constexpr bool HAS_FLAGS = true;

  // Elements moved together where nothing is in the way.
  template <class T>
  static constexpr uint32_t WIDTH = PACK_BYTES / sizeof(T);

  template <class T, uint32_t W>
  static __device__ __forceinline__ Pack<T, W> take(const Slot& slot, uint64_t index, const Patience&, bool&) {
    const T* from = reinterpret_cast<const T*>(slot.bytes) + index;
#ifdef MUTANTS
    if constexpr (W * sizeof(T) == PACK_BYTES) {
      if (MUTANT(NONCOHERENT_STAGING)) {
        Pack<T, W> pack;
        uint4* words = reinterpret_cast<uint4*>(&pack);
        asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words->x), "=r"(words->y), "=r"(words->z), "=r"(words->w)
                     : "l"(__cvta_generic_to_global(from))
                     : "memory");
        return pack;
      }
    }
#endif
    return load<T, W>(from);
  }

  template <class T, uint32_t W>
  static __device__ __forceinline__ void put(const Slot& slot, uint64_t index, const Pack<T, W>& pack) {
    store<T, W>(reinterpret_cast<T*>(slot.bytes) + index, pack);
  }
};

struct Words {
  static constexpr bool HAS_FLAGS = false;

  // Whole words: 4, 2, 1, 1 elements of 1, 2, 4, 8 bytes.
  template <class T>
  static constexpr uint32_t WIDTH = sizeof(T) >= 4 ? 1 : 4 / sizeof(T);

  // `lost` becomes true, and the result meaningless, if a word does not come.
  template <class T, uint32_t W>
  static __device__ __forceinline__ Pack<T, W> take(const Slot& slot, uint64_t index, const Patience& patience, bool& lost) {
    static_assert(W * sizeof(T) % 4 == 0, "whole words");
    union {
      Pack<T, W> pack;
      uint32_t payload[W * sizeof(T) / 4];
    } both = {};
    const uint64_t* words = reinterpret_cast<const uint64_t*>(slot.bytes) + index * sizeof(T) / 4;
#pragma unroll
    for (uint32_t i = 0; i < W * sizeof(T) / 4; ++i) {
      uint64_t word = 0;
      const auto has_come = [&] { return static_cast<uint32_t>((word = look_word(words + i)) >> 32) == slot.generation; };
      // One deadline for a thread, not one for each of its words.
      if (!lost && wait_until(patience, has_come) != ARRIVED) lost = true;
      both.payload[i] = static_cast<uint32_t>(word);
    }
    return both.pack;
  }

  template <class T, uint32_t W>
  static __device__ __forceinline__ void put(const Slot& slot, uint64_t index, const Pack<T, W>& pack) {
    union {
      Pack<T, W> pack;
      uint32_t payload[W * sizeof(T) / 4];
    } both = {pack};
    uint64_t* words = reinterpret_cast<uint64_t*>(slot.bytes) + index * sizeof(T) / 4;
#pragma unroll
    for (uint32_t i = 0; i < W * sizeof(T) / 4; ++i) {
      if (MUTANT(TORN_WORD)) {
        post(reinterpret_cast<uint32_t*>(words + i) + 1, slot.generation);
        post(reinterpret_cast<uint32_t*>(words + i), both.payload[i]);
      } else {
        post_word(words + i, both.payload[i], slot.generation);
      }
    }
  }
};
