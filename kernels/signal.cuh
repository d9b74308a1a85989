// Flags between ranks: the only file that names memory orders.
//
//   poster                                  waiter
//   every thread writes payload             thread 0: until reached(look(flag), generation)   (acquire, system scope)
//   __syncthreads()                         __syncthreads()
//   thread 0: post(flag, generation)        every thread reads payload
//             (release, system scope)
//
// Why it cannot race: a release store of one thread is cumulative over everything that thread has observed, and the
// barrier made it observe the whole block's writes; the acquire load and the barrier on the other side do the same for
// the readers (PTX ISA 9.0, 8.8 and 8.9.5, causality order through bar.sync). System scope, because the peer may be
// another device or the host. Every flag has one writer, so no remote atomic is needed: PCIe peers may lack them.
//
// A generation is a count that never goes back; it is compared on the circle of u32, as `reached` of src/world/flag.rs.
#pragma once
#include <cstdint>

#define DEVICE static __device__ __forceinline__

// Whether `seen` has reached `wanted`: true for the 2^31 generations from `wanted` on.
DEVICE bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

// Publishes, under `generation`, all that this thread wrote or has observed. Pairs with `look`.
DEVICE void post(uint32_t* flag, uint32_t generation) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(generation) : "memory");
}

// The generation posted last; what was published under it may be read afterwards. Pairs with `post`.
DEVICE uint32_t look(const uint32_t* flag) {
  uint32_t generation;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(generation) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return generation;
}

// Marks what a flag stands for as being rewritten: nobody who sees a later write of this thread still sees the old
// generation. Pairs with a reader that looks at the flag before and after it reads (a seqlock).
DEVICE void retract(uint32_t* flag) {
  asm volatile(
      "st.relaxed.sys.global.u32 [%0], %1;\n\t"
      "fence.acq_rel.sys;" ::"l"(__cvta_generic_to_global(flag)),
      "r"(0)
      : "memory");
}

// 32 bits of payload and 32 bits of generation in one store of 8 bytes, which no reader can see half of (PTX ISA 9.0,
// 8.2.1: a scalar access is one memory operation). So the payload needs no other order.
DEVICE void post_word(uint64_t* word, uint32_t payload, uint32_t generation) {
  const uint64_t both = static_cast<uint64_t>(generation) << 32 | payload;
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "l"(both) : "memory");
}

// The word's payload (low half) and generation (high half). Pairs with `post_word`.
DEVICE uint64_t look_word(const uint64_t* word) {
  uint64_t both;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(both) : "l"(__cvta_generic_to_global(word)) : "memory");
  return both;
}

// A word that the host or another block may set at any time and that orders nothing: the abort word, a warning flag.
DEVICE uint32_t peek(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(word)) : "memory");
  return value;
}

// Sets bits in a word of this device; many threads may.
DEVICE void raise(uint32_t* word, uint32_t bits) {
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(bits) : "memory");
}

// Counts one of `blocks` blocks in and tells whether it is the last. What any of them wrote before (and made its calling
// thread observe with a barrier) may be read by the last one after its next barrier. The counter wraps to 0 by itself,
// so it needs no reset between launches and a captured graph can be replayed. By one thread of the block.
DEVICE bool is_last_in(uint32_t* counter, uint32_t blocks) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(blocks - 1)
               : "memory");
  return before == blocks - 1;
}

// Nanoseconds of the device's global timer; its step is up to a microsecond.
DEVICE uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// How a wait ends.
enum Verdict : uint32_t {
  ARRIVED = 0,
  LATE = 1,     // the deadline has passed
  ABORTED = 2,  // the host has set the abort word
};

// What ends a wait that nobody answers.
struct Patience {
  const uint32_t* abort;  // not 0: give up
  uint64_t timeout_ns;    // of one wait
};

// Looks between two tests of the abort word, which lies in host memory (a microsecond away), and of the clock.
constexpr uint32_t LOOKS_PER_TEST = 64;

// Calls `has_come` until it is true. Every wait of every kernel is this loop: none is without deadline and abort word.
template <class Condition>
DEVICE Verdict wait_until(const Patience& patience, Condition has_come) {
  if (has_come()) return ARRIVED;
  const uint64_t begin_ns = now_ns();
  for (;;) {
#pragma unroll 1
    for (uint32_t looks = 0; looks < LOOKS_PER_TEST; ++looks) {
      if (has_come()) return ARRIVED;
    }
    if (peek(patience.abort) != 0) return ABORTED;
    if (now_ns() - begin_ns > patience.timeout_ns) return LATE;
  }
}

// Waits until `flag` has reached `generation`; `seen` is the last one seen.
DEVICE Verdict wait(const uint32_t* flag, uint32_t generation, const Patience& patience, uint32_t& seen) {
  return wait_until(patience, [&] { return reached(seen = look(flag), generation); });
}
