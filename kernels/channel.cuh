// What the kernel of kernels/collective.cu is told, what a block keeps, and where a channel's piece of a chunk lies: in the
// vector and in the staging slots.
#pragma once
#include <cstdint>

#include "wire.cuh"

constexpr uint32_t MAX_RANKS = 64;
constexpr uint32_t MAX_STEPS = 192;        // 3 * 64 - 2 of a direct all-reduce
constexpr uint32_t MAX_RANKS_IN_GRID = 8;
constexpr uint32_t FLAG_STRIDE = 16;       // u32s from one channel's flag to the next: 64 bytes
constexpr uint32_t NOBODY = 0xff;
constexpr uint32_t EVERYBODY = 0xfe;  // of words
constexpr uint32_t MAX_THREADS = 512;

// src/abi/collective.rs
struct Link {
  unsigned char* send_slots;       // [channel][slot] of the peer, written here
  uint32_t* send_flags;            // [channel] of the peer: transfers sent
  const uint32_t* credits;         // [channel] here, written by the peer: transfers it has taken
  unsigned char* recv_slots;       // [channel][slot] here, written by the peer
  const uint32_t* recv_flags;      // [channel] here, written by the peer: transfers sent
  uint32_t* give_back;             // [channel] of the peer: transfers taken
  const uint64_t* greeting;        // [2] here, written by the peer
  uint64_t* peer_greeting;         // [2] of the peer
  struct Progress* progress;       // [channel] here, of this kernel alone
};

struct Progress {
  uint32_t sent;
  uint32_t taken;
};

// Where the owners' shards are: owner o has blocks [b(o), b(o + 1)), b(o) = o * blocks_per_shard + min(o, extra_blocks),
// as far as the vector goes.
struct Shards {
  uint64_t len_elems;         // of the vector
  uint64_t block_elems;
  uint64_t blocks_per_shard;
  uint64_t extra_blocks;
};

enum Source : uint8_t {
  INPUT = 0,     // own input as it is
  RESULT = 1,    // own output as it is
  RECEIVED = 2,  // the peer's slot as it is
  START = 3,     // partial: own
  PARTIAL = 4,   // partial: received op own
  FINISH = 5,    // finished: received op own
  ALL = 6,       // finished: own and everybody's terms in rank order
};

struct Step {
  uint8_t recv_peer;  // or NOBODY
  uint8_t send_peer;  // or NOBODY, or EVERYBODY
  uint8_t chunk;      // by its owner; 0 in a broadcast and where everybody gets the whole vector
  uint8_t source;
  uint8_t to_output;
  uint8_t phase;      // for fault records, with `index`
  uint16_t index;
};

struct RankState {
  uint32_t operation;  // operations finished
  uint32_t blocks;     // of the running one that have ended
};

struct FaultRecord {
  uint32_t reason;  // written last: Reason, or 0 for no fault
  uint32_t operation;
  uint32_t rank;
  uint32_t peer;
  uint32_t awaited;
  uint32_t phase;
  uint32_t index;
  uint32_t chunk;
  uint64_t round;
  uint32_t expected;
  uint32_t seen;
};

enum Reason : uint32_t { FAULT_LATE = LATE, FAULT_ABORTED = ABORTED, FAULT_MISMATCH = 3 };
enum Awaited : uint32_t { GREETING = 0, DATA = 1, CREDIT = 2 };

// What a rank tells the streams of a peer, in memory of the host: counts that only grow. In the order of Awaited.
struct Signals {
  uint32_t greeted;  // operations
  uint32_t sent;     // transfers of this link
  uint32_t taken;
};

struct RankArguments {
  unsigned char* input;        // where element 0 of the whole vector is or would be
  unsigned char* output;       // likewise
  unsigned char* cast_output;  // likewise, of another float type; or null
  const Link* links;           // [world_size]
  const Step* steps;
  RankState* state;
  const uint32_t* abort;
  FaultRecord* faults;         // [channels], host-visible
  uint32_t* finished;          // host-visible: operations finished; or null
  double* squares;             // [channels]; or null
  double* sum_squares;         // of the finished chunks' elements; written at the end if `squares` is there
  uint32_t* found_nonfinite;   // or null
  Signals* const* signals;     // [world_size], at the peers; or null: the kernel is the whole operation
  uint32_t len_steps;
  uint32_t rank;
};

struct Arguments {
  Shards shards;
  uint64_t rounds;
  uint64_t round_elems;
  uint64_t piece_elems;  // of a chunk that one channel moves; a multiple of 16
  uint64_t slot_bytes;
  uint64_t timeout_ns;
  double factor;
  uint64_t first_round;  // rounds [first_round, rounds) are run
  uint32_t world_size;
  uint32_t channels;
  uint32_t slots;
  uint32_t words_protocol;
  uint32_t op;
  uint32_t native_partials;
  uint32_t descriptor;
  uint32_t cast_dtype;
  uint32_t opens;   // 1: this kernel begins the operation
  uint32_t closes;  // 1: and ends it
  RankArguments ranks[MAX_RANKS_IN_GRID];
};

// What a block keeps in shared memory.
struct Block {
  Link links[MAX_RANKS];
  Progress progress[MAX_RANKS];
  Step steps[MAX_STEPS];
  double squares[MAX_THREADS / 32];
  uint32_t operation;
  uint32_t gave_up[2];  // before the next even or odd barrier; see `meet`
  uint32_t has_record;
  uint32_t is_last;     // this block of the rank's
};

// Why a thread gave up; reason 0: it has not.
struct Cause {
  uint32_t reason;
  uint32_t awaited;
  uint32_t peer;
  uint32_t expected;
  uint32_t seen;
};

// A piece of a chunk: elements [begin, end) of the whole vector. In slots, element i lies at index i - origin.
struct Piece {
  uint64_t begin;
  uint64_t end;
  uint64_t origin;  // a multiple of 16, so that vector and slot have the same phase
};

DEVICE uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

// One block's view of its rank.
struct Channel {
  const Arguments& arguments;
  const RankArguments& mine;
  Block& block;
  const uint32_t number;

  __device__ __forceinline__ uint64_t shard_begin(uint64_t owner) const {
    const Shards& shards = arguments.shards;
    return least((owner * shards.blocks_per_shard + least(owner, shards.extra_blocks)) * shards.block_elems,
                 shards.len_elems);
  }

  __device__ __forceinline__ Piece piece(const Step& step, uint64_t round) const {
    const uint32_t owner = MUTANT(NEXT_CHUNK) ? (step.chunk + 1) % arguments.world_size : step.chunk;
    const uint64_t shard_at = shard_begin(owner);
    const uint64_t shard_elems = shard_begin(owner + 1) - shard_at;
    const uint64_t chunk_begin = least(round * arguments.round_elems, shard_elems);
    const uint64_t chunk_elems = least(shard_elems - chunk_begin, arguments.round_elems);
    const uint64_t begin = least(number * arguments.piece_elems, chunk_elems);
    const uint64_t end = least(begin + arguments.piece_elems, chunk_elems);
    const uint64_t first = shard_at + chunk_begin + begin;
    return {first, first + (end - begin) + (MUTANT(ONE_ELEMENT_MORE) && end > begin ? 1 : 0), first / 16 * 16};
  }

  // Slot of the transfer after `transfers` on a link's side.
  __device__ __forceinline__ Slot slot(unsigned char* slots, uint32_t transfers) const {
    const uint64_t index = static_cast<uint64_t>(number) * arguments.slots + transfers % arguments.slots;
    return {slots + index * arguments.slot_bytes, transfers + 1};
  }

  // Calls `body` with every peer that the step sends to.
  template <class Body>
  __device__ __forceinline__ void for_receivers(const Step& step, const Body& body) const {
    if (step.send_peer == EVERYBODY) return for_peers(body);
    if (step.send_peer != NOBODY) body(step.send_peer);
  }

  // And with every peer.
  template <class Body>
  __device__ __forceinline__ void for_peers(const Body& body) const {
#pragma unroll 1
    for (uint32_t peer = 0; peer < arguments.world_size; ++peer) {
      if (peer != mine.rank) body(peer);
    }
  }

  __device__ __forceinline__ Slot received(uint32_t peer) const {
    return slot(block.links[peer].recv_slots, block.progress[peer].taken);
  }

  __device__ __forceinline__ Slot sent(uint32_t peer) const {
    return slot(block.links[peer].send_slots, block.progress[peer].sent);
  }
};
