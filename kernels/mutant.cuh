// Ways for the collective to be broken on purpose, for the tests of the tests (tests/vgpu/tests/collective/mutants.rs lists them
// and what catches each).
//
// With -DMUTANTS every place that says MUTANT(NAME) goes wrong if the number below, which the tests replace in the PTX, is
// that of NAME: one PTX text holds all mutants. Without it MUTANT(NAME) is false and leaves no trace in the kernel.
// Wrong memory orders are not here: the tests replace them in the text of the kernel itself.
#pragma once
#include <cstdint>

#ifdef MUTANTS
static __device__ __forceinline__ uint32_t mutant() {
  uint32_t number;
  asm volatile("mov.u32 %0, 3735928559;" : "=r"(number));
  return number;
}
#define MUTANT(name) (mutant() == Mutant::name)
#else
#define MUTANT(name) false
#endif

enum Mutant : uint32_t {
  NONE = 0,
  NO_CREDIT = 1,             // a slot is written before the peer has taken what it held
  EARLY_CREDIT = 2,          // a slot is given back before it is read
  EARLY_FLAG = 3,            // the flag is posted before the data
  STALE_WAIT = 4,            // the wait is for the transfer before
  NO_BARRIER_AFTER_WAIT = 5,
  NO_BARRIER_BEFORE_POST = 6,
  NONCOHERENT_STAGING = 7,   // slots are read by ld.global.nc
  TORN_WORD = 8,             // payload and generation of a word in two stores
  NEXT_CHUNK = 9,            // the chunk of the next owner
  ONE_ELEMENT_MORE = 10,     // a piece is one element too long
  ANY_DESCRIPTOR = 11,       // greetings are not compared
  EARLY_OUTPUT = 12,         // outputs are written before all have agreed
  NO_ABORT = 13,             // a wait that lasts does not look at the abort word
  EARLY_TELL = 14,           // peers' streams are told of one transfer more than was made
};
