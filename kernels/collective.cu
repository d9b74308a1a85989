// One rank's part of any collective: all_reduce, reduce_scatter, all_gather, broadcast, barrier; ring or direct.
//
// The kernel knows none of these words. It runs a table of steps that src/abi/collective.rs makes of a Schedule, the same
// data that the host executor and the protocol model run:
//
//   greet every peer with {generation of the operation, hash of its descriptor}
//   for round in 0..rounds, for step in table:
//     wait   for what the step receives (all terms at once where it adds them), and for a free slot where it sends
//     make   input | result | received                          as it is            -> own output, peer's slot
//            widen(own) | received op widen(own)                a partial sum       ->             peer's slot
//            received op widen(own) | own term and all others'  finished, narrowed  -> own output, peer's slot
//     post   what was sent, give back what was taken
//   before anything of another rank is used or any output written: every peer's greeting must hold the same hash
//
// A step's receive and the next step's send of the same chunk are one entry of the table, so a ring reads a slot once and
// writes its successor's directly (it then holds two slots, so links have at least two). Blocks are channels: each has its
// own piece of every chunk, its own slots and flags, and waits for nobody but the same channel of other ranks.
//
// The numeric contract is lane.cuh's. Direct adds in rank order 0..N-1; the ring in the order of the hops.
//
// Waits: thread p watches peer p's flag, thread p + 32 the credit of peer p, then a barrier. Every wait ends at a deadline
// or by the abort word; the first thread that gives up writes the block's fault record, and the block returns.
// Counters live in device memory and only grow; so a captured graph can be replayed.
//
// Cost per rank of S bytes, N ranks: all-reduce 2(N-1)/N S over the link each way (ring of f32 partials for 16-bit elements
// 1.5 times that), and in local memory reads of S and writes of S besides the staging. See src/schedule/mod.rs.
// Sources: Patarasuk & Yuan 2009 (ring); NCCL src/device/prims_simple.h and prims_ll.h (fused steps, two protocols).
#include "wire.cuh"

constexpr uint32_t MAX_RANKS = 64;
constexpr uint32_t MAX_STEPS = 192;        // 3 * 64 - 2 of a direct all-reduce
constexpr uint32_t MAX_RANKS_IN_GRID = 8;
constexpr uint32_t FLAG_STRIDE = 16;       // u32s from one channel's flag to the next: 64 bytes
constexpr uint32_t NOBODY = 0xff;
constexpr uint32_t MAX_THREADS = 512;
// Packs that a thread has in flight in copies, and in sums, where each is read from two places or more. A pack of bytes
// has 16 sums: two of them would spill registers.
constexpr uint32_t COPY_UNROLL = 4;
template <class T>
constexpr uint32_t SUM_UNROLL = sizeof(T) == 1 ? 1 : 2;

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

struct Shard {
  uint64_t offset_elems;
  uint64_t len_elems;
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
  uint8_t send_peer;  // or NOBODY
  uint8_t chunk;      // by its owner
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

struct RankArguments {
  unsigned char* input;        // where element 0 of the whole vector is or would be
  unsigned char* output;       // likewise
  unsigned char* cast_output;  // likewise, of another float type; or null
  const Link* links;           // [world_size]
  const Step* steps;
  RankState* state;
  const uint32_t* abort;
  FaultRecord* faults;         // [channels], host-visible
  double* squares;             // [channels]; or null
  double* sum_squares;         // of the finished chunks' elements; written at the end if `squares` is there
  uint32_t* found_nonfinite;   // or null
  uint32_t len_steps;
  uint32_t rank;
};

struct Arguments {
  const Shard* shards;  // [world_size]
  uint64_t rounds;
  uint64_t round_elems;
  uint64_t piece_elems;  // of a chunk that one channel moves; a multiple of 16
  uint64_t slot_bytes;
  uint64_t timeout_ns;
  double factor;
  uint32_t world_size;
  uint32_t channels;
  uint32_t slots;
  uint32_t words_protocol;
  uint32_t op;
  uint32_t native_partials;
  uint32_t descriptor;
  uint32_t cast_dtype;
  RankArguments ranks[MAX_RANKS_IN_GRID];
};

// What a block keeps in shared memory.
struct Block {
  Link links[MAX_RANKS];
  Progress progress[MAX_RANKS];
  Shard shards[MAX_RANKS];
  Step steps[MAX_STEPS];
  double squares[MAX_THREADS / 32];
  uint32_t operation;
  uint32_t gave_up[2];  // before the next even or odd barrier; see `meet`
  uint32_t has_record;
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

template <class T, class Wire>
struct Run {
  using Acc = typename Lane<T>::Acc;
  template <uint32_t W>
  struct Accs {
    Acc lanes[W];
  };

  const Arguments& arguments;
  const RankArguments& mine;
  Block& block;
  const uint32_t channel;
  const Patience patience;
  double squares;      // of the finished elements of this thread
  uint32_t meetings;   // of the block so far
  Cause cause;         // why this thread gave up
  uint32_t lost_peer;  // whose word among all terms did not come

  __device__ __forceinline__ Run(const Arguments& arguments, const RankArguments& mine, Block& block, uint32_t channel)
      : arguments(arguments), mine(mine), block(block), channel(channel),
        patience{MUTANT(NO_ABORT) ? &mine.state->blocks : mine.abort, arguments.timeout_ns},
        squares(0), meetings(0), cause{}, lost_peer(NOBODY) {}

  // ---- waits and posts: thread p for what peer p sends, thread p + 32 for what goes to it (another warp) -------------

  static __device__ __forceinline__ bool receives_from(uint32_t peer) { return threadIdx.x == peer % blockDim.x; }
  static __device__ __forceinline__ bool sends_to(uint32_t peer) { return threadIdx.x == (peer + 32) % blockDim.x; }

  // The block's barrier. False if a thread gave up before it: then all threads return. Two words in turn, because a
  // thread may give up after this meeting while another has yet to read the word of it.
  __device__ __forceinline__ bool meet() {
    __syncthreads();
    return block.gave_up[meetings++ % 2] == 0;
  }

  // Ends the block at its next meeting.
  __device__ __forceinline__ void give_up(uint32_t reason, uint32_t awaited, uint32_t peer, uint32_t expected,
                                          uint32_t seen) {
    cause = {reason, awaited, peer, expected, seen};
    atomicExch(&block.gave_up[meetings % 2], 1);
  }

  // After a meeting that said no: one of the threads that gave up tells why. The host waits for `reason`.
  __device__ __forceinline__ void report(const Step& step, uint64_t round) {
    if (cause.reason == 0 || atomicExch(&block.has_record, 1) != 0) return;
    FaultRecord* record = mine.faults + channel;
    record->operation = block.operation + 1;
    record->rank = mine.rank;
    record->peer = cause.peer;
    record->awaited = cause.awaited;
    record->phase = step.phase;
    record->index = step.index;
    record->chunk = step.chunk;
    record->round = round;
    record->expected = cause.expected;
    record->seen = cause.seen;
    post(&record->reason, cause.reason);
  }

  __device__ __forceinline__ void await_flag(const uint32_t* flags, uint32_t generation, uint32_t awaited,
                                             uint32_t peer) {
    uint32_t seen;
    const Verdict verdict = wait(flags + channel * FLAG_STRIDE, generation, patience, seen);
    if (verdict != ARRIVED) give_up(verdict, awaited, peer, generation, seen);
  }

  // Tells every peer what this rank is about to do. One block greets for all.
  __device__ __forceinline__ void greet() {
    if (channel != 0) return;
    const uint32_t generation = block.operation + 1;
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      if (peer == mine.rank) continue;
      post_word(block.links[peer].peer_greeting + generation % 2, arguments.descriptor, generation);
    }
  }

  // Waits for every peer's greeting. It stays until this rank has greeted the peer again (hence two places): a peer
  // cannot end its next operation before.
  __device__ __forceinline__ void agree() {
    const uint32_t generation = block.operation + 1;
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      if (peer == mine.rank) continue;
      uint64_t word = 0;
      const uint64_t* greeting = block.links[peer].greeting + generation % 2;
      const Verdict verdict = wait_until(patience, [&] {
        return static_cast<uint32_t>((word = look_word(greeting)) >> 32) == generation;
      });
      if (verdict != ARRIVED) {
        give_up(verdict, GREETING, peer, generation, static_cast<uint32_t>(word >> 32));
      } else if (static_cast<uint32_t>(word) != arguments.descriptor && !MUTANT(ANY_DESCRIPTOR)) {
        give_up(FAULT_MISMATCH, GREETING, peer, arguments.descriptor, static_cast<uint32_t>(word));
      }
    }
  }

  __device__ __forceinline__ void await_data(uint32_t peer) {
    if (!Wire::HAS_FLAGS || !receives_from(peer)) return;
    const uint32_t generation = block.progress[peer].taken + (MUTANT(STALE_WAIT) ? 0 : 1);
    await_flag(block.links[peer].recv_flags, generation, DATA, peer);
  }

  __device__ __forceinline__ void await_credit(uint32_t peer) {
    if (!sends_to(peer) || MUTANT(NO_CREDIT)) return;
    const uint32_t generation = block.progress[peer].sent + 1 - arguments.slots;
    await_flag(block.links[peer].credits, generation, CREDIT, peer);
  }

  __device__ __forceinline__ void post_data(uint32_t peer) {
    if (!sends_to(peer)) return;
    const uint32_t generation = ++block.progress[peer].sent;
    if (Wire::HAS_FLAGS && !MUTANT(EARLY_FLAG)) post(block.links[peer].send_flags + channel * FLAG_STRIDE, generation);
  }

  __device__ __forceinline__ void give_back(uint32_t peer) {
    if (!receives_from(peer)) return;
    const uint32_t generation = ++block.progress[peer].taken;
    if (!MUTANT(EARLY_CREDIT)) post(block.links[peer].give_back + channel * FLAG_STRIDE, generation);
  }

  // ---- one step --------------------------------------------------------------------------------------------------

  // False: the block has given up.
  __device__ __forceinline__ bool run(const Step& step, uint64_t round, bool& has_agreed) {
    const bool has_send = step.send_peer != NOBODY;
    const bool uses_others = step.recv_peer != NOBODY || step.source == ALL || step.to_output != 0;
    if (uses_others && !has_agreed && !MUTANT(EARLY_OUTPUT)) {
      agree();
      has_agreed = true;
      // No output is written before all have agreed.
      if (!meet()) return false;
    }
    if (step.source == ALL) {
      for (uint32_t peer = 0; peer < arguments.world_size; ++peer) {
        if (peer != mine.rank) await_data(peer);
      }
    } else if (step.recv_peer != NOBODY) {
      await_data(step.recv_peer);
    }
    if (has_send) await_credit(step.send_peer);
    if (!MUTANT(NO_BARRIER_AFTER_WAIT) && !meet()) return false;
    if (MUTANT(EARLY_FLAG) && has_send && sends_to(step.send_peer)) {
      post(block.links[step.send_peer].send_flags + channel * FLAG_STRIDE, block.progress[step.send_peer].sent + 1);
    }
    if (MUTANT(EARLY_CREDIT) && step.recv_peer != NOBODY && receives_from(step.recv_peer)) {
      post(block.links[step.recv_peer].give_back + channel * FLAG_STRIDE, block.progress[step.recv_peer].taken + 1);
    }
    move(step, round);
    if (!MUTANT(NO_BARRIER_BEFORE_POST) && !meet()) return false;
    if (has_send) post_data(step.send_peer);
    if (step.source == ALL) {
      for (uint32_t peer = 0; peer < arguments.world_size; ++peer) {
        if (peer != mine.rank) give_back(peer);
      }
    } else if (step.recv_peer != NOBODY) {
      give_back(step.recv_peer);
    }
    return true;
  }

  // ---- moving data -----------------------------------------------------------------------------------------------

  __device__ __forceinline__ Piece piece(const Step& step, uint64_t round) const {
    const uint32_t owner = MUTANT(NEXT_CHUNK) ? (step.chunk + 1) % arguments.world_size : step.chunk;
    const Shard& shard = block.shards[owner];
    const uint64_t chunk_begin = least(round * arguments.round_elems, shard.len_elems);
    const uint64_t chunk_elems = least(shard.len_elems - chunk_begin, arguments.round_elems);
    const uint64_t begin = least(channel * arguments.piece_elems, chunk_elems);
    const uint64_t end = least(begin + arguments.piece_elems, chunk_elems);
    const uint64_t first = shard.offset_elems + chunk_begin + begin;
    return {first, first + (end - begin) + (MUTANT(ONE_ELEMENT_MORE) && end > begin ? 1 : 0), first / 16 * 16};
  }

  // Slot of the transfer after `transfers` on a link's side.
  __device__ __forceinline__ Slot slot(unsigned char* slots, uint32_t transfers) const {
    const uint64_t number = static_cast<uint64_t>(channel) * arguments.slots + transfers % arguments.slots;
    return {slots + number * arguments.slot_bytes, transfers + 1};
  }

  __device__ __forceinline__ Slot received(uint32_t peer) const {
    return slot(block.links[peer].recv_slots, block.progress[peer].taken);
  }

  __device__ __forceinline__ void move(const Step& step, uint64_t round) {
    const Piece piece = this->piece(step, round);
    const bool has_send = step.send_peer != NOBODY;
    const uint32_t to = has_send ? step.send_peer : mine.rank;
    const Slot sent = slot(block.links[to].send_slots, block.progress[to].sent);
    bool lost = false;
    if (step.source <= RECEIVED) {
      copy(step, piece, sent, lost);
    } else {
      reduce(step, piece, sent, lost);
    }
    if (!Wire::HAS_FLAGS) {
      if (has_send) refresh(sent);
      if (lost) {
        const uint32_t peer = lost_peer != NOBODY ? lost_peer : step.recv_peer;
        const uint32_t taken = block.progress[peer].taken;
        give_up(peek(patience.abort) != 0 ? ABORTED : LATE, DATA, peer, taken + 1, taken);
      }
    }
  }

  // See wire.cuh: once in WORDS_REFRESH transfers all words of a slot get the generation.
  __device__ __forceinline__ void refresh(const Slot& sent) {
    if (sent.generation % WORDS_REFRESH >= arguments.slots) return;
    __syncthreads();
    uint64_t* words = reinterpret_cast<uint64_t*>(sent.bytes);
    for (uint64_t i = threadIdx.x; i < arguments.slot_bytes / 8; i += blockDim.x) {
      const uint64_t word = look_word(words + i);
      if (static_cast<uint32_t>(word >> 32) != sent.generation) post_word(words + i, 0, sent.generation);
    }
  }

  // Moves every element of the piece once: body.load<W>, then body.store<W>. Bulk: whole packs, UNROLL loads before their
  // stores, and single elements in front and behind, or everywhere if memory is not `aligned`. Words: word by word,
  // [low, high) being what of it belongs to the piece.
  template <uint32_t UNROLL, class Body>
  __device__ __forceinline__ void sweep(const Piece& piece, bool aligned, Body& body) {
    constexpr uint32_t W = Wire::template WIDTH<T>;
    if constexpr (!Wire::HAS_FLAGS) {
#pragma unroll 1
      for (uint64_t at = piece.begin / W * W + threadIdx.x * W; at < piece.end; at += blockDim.x * W) {
        const uint32_t low = at < piece.begin ? static_cast<uint32_t>(piece.begin - at) : 0;
        const uint32_t high = static_cast<uint32_t>(least(piece.end - at, W));
        body.template store<W>(at, body.template load<W>(at, low, high), low, high);
      }
    } else {
      uint64_t first = (piece.begin + W - 1) / W * W, last = piece.end / W * W;
      if (!aligned || first >= last) first = last = piece.begin;
      const uint64_t stride = static_cast<uint64_t>(blockDim.x) * W;
      uint64_t at = first + threadIdx.x * W;
#pragma unroll 1
      for (; at + (UNROLL - 1) * stride < last; at += UNROLL * stride) {
        decltype(body.template load<W>(at, 0, W)) packs[UNROLL];
#pragma unroll
        for (uint32_t i = 0; i < UNROLL; ++i) packs[i] = body.template load<W>(at + i * stride, 0, W);
#pragma unroll
        for (uint32_t i = 0; i < UNROLL; ++i) body.template store<W>(at + i * stride, packs[i], 0, W);
      }
#pragma unroll 1
      for (; at < last; at += stride) body.template store<W>(at, body.template load<W>(at, 0, W), 0, W);
      const uint64_t head = first - piece.begin;
#pragma unroll 1
      for (uint64_t i = threadIdx.x; i < head + (piece.end - last); i += blockDim.x) {
        const uint64_t edge = i < head ? piece.begin + i : last + (i - head);
        body.template store<1>(edge, body.template load<1>(edge, 0, 1), 0, 1);
      }
    }
  }

  static __device__ __forceinline__ bool on_pack(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % PACK_BYTES == 0;
  }

  // Memory of elements, a whole pack or the part [low, high) of one.
  template <uint32_t W>
  static __device__ __forceinline__ Pack<T, W> load_own(const unsigned char* base, uint64_t at, uint32_t low, uint32_t high) {
    const T* from = reinterpret_cast<const T*>(base) + at;
    if constexpr (!Wire::HAS_FLAGS) return load_part<T, W>(from, low, high);
    return load<T, W>(from);
  }
  template <uint32_t W>
  static __device__ __forceinline__ void store_own(unsigned char* base, uint64_t at, const Pack<T, W>& pack, uint32_t low,
                                                   uint32_t high) {
    T* to = reinterpret_cast<T*>(base) + at;
    if constexpr (!Wire::HAS_FLAGS) return store_part<T, W>(to, pack, low, high);
    store<T, W>(to, pack);
  }

  // Elements as they are.
  struct Copy {
    Run& run;
    const unsigned char* from;  // own memory; or null: the slot
    unsigned char* to;          // own memory; or null
    Slot received, sent;
    bool has_send;
    uint64_t origin;
    bool& lost;

    template <uint32_t W>
    __device__ __forceinline__ Pack<T, W> load(uint64_t at, uint32_t low, uint32_t high) {
      if (from != nullptr) return load_own<W>(from, at, low, high);
      return Wire::template take<T, W>(received, at - origin, run.patience, lost);
    }
    template <uint32_t W>
    __device__ __forceinline__ void store(uint64_t at, const Pack<T, W>& pack, uint32_t low, uint32_t high) {
      if (has_send) Wire::template put<T, W>(sent, at - origin, pack);
      if (to != nullptr && !lost) store_own<W>(to, at, pack, low, high);
    }
  };

  __device__ __forceinline__ void copy(const Step& step, const Piece& piece, const Slot& sent, bool& lost) {
    const unsigned char* from = step.source == INPUT ? mine.input : step.source == RESULT ? mine.output : nullptr;
    unsigned char* to = step.to_output && mine.output != from ? mine.output : nullptr;
    const Slot received = this->received(step.recv_peer != NOBODY ? step.recv_peer : mine.rank);
    Copy body = {*this, from, to, received, sent, step.send_peer != NOBODY, piece.origin, lost};
    sweep<COPY_UNROLL>(piece, on_pack(from) && on_pack(to), body);
  }

  // Partial sums and finished ones.
  struct Sum {
    Run& run;
    Source source;
    bool has_send, to_output;
    Slot received, sent;
    uint64_t origin;
    bool& lost;

    template <uint32_t W>
    __device__ __forceinline__ Accs<W> own(uint64_t at, uint32_t low, uint32_t high) {
      return terms(load_own<W>(run.mine.input, at, low, high));
    }

    // Widens what has not been added yet.
    template <uint32_t W>
    __device__ __forceinline__ Accs<W> terms(const Pack<T, W>& pack) {
      Accs<W> accs;
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = Lane<T>::widen(pack.lanes[lane]);
      if constexpr (IS_FLOAT<Acc>) {
        if (run.arguments.op == PREMUL_SUM) {
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = times(accs.lanes[lane], run.arguments.factor);
        }
      }
      return accs;
    }

    // Partials of 16-bit floats travel as f32, or by request in the element type.
    template <uint32_t W>
    __device__ __forceinline__ Accs<W> take_partial(uint64_t at) {
      Accs<W> accs;
      if constexpr (sizeof(T) == 2) {
        if (!run.arguments.native_partials) {
          const Pack<float, W> pack = Wire::template take<float, W>(received, at - origin, run.patience, lost);
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = pack.lanes[lane];
          return accs;
        }
      }
      const Pack<T, W> pack = Wire::template take<T, W>(received, at - origin, run.patience, lost);
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = Lane<T>::widen(pack.lanes[lane]);
      return accs;
    }

    template <uint32_t W>
    static __device__ __forceinline__ Pack<T, W> narrow(const Accs<W>& accs) {
      Pack<T, W> pack;
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) pack.lanes[lane] = Lane<T>::narrow(accs.lanes[lane]);
      return pack;
    }

    // `accs = accs op others`, lane by lane.
    template <uint32_t W>
    __device__ __forceinline__ void fold_in(Accs<W>& accs, const Accs<W>& others) {
      if (run.arguments.op == MIN) {
#pragma unroll
        for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = minimum(accs.lanes[lane], others.lanes[lane]);
      } else if (run.arguments.op == MAX) {
#pragma unroll
        for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = maximum(accs.lanes[lane], others.lanes[lane]);
      } else {
#pragma unroll
        for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = plus(accs.lanes[lane], others.lanes[lane]);
      }
    }

    template <uint32_t W>
    __device__ __forceinline__ Accs<W> load(uint64_t at, uint32_t low, uint32_t high) {
      if (source == START) return own<W>(at, low, high);
      if (source != ALL) {
        Accs<W> accs = take_partial<W>(at);
        fold_in(accs, own<W>(at, low, high));
        return accs;
      }
      Accs<W> accs;
      for (uint32_t rank = 0; rank < run.arguments.world_size; ++rank) {
        Accs<W> term;
        if (rank == run.mine.rank) {
          term = own<W>(at, low, high);
        } else {
          term = terms(Wire::template take<T, W>(run.received(rank), at - origin, run.patience, lost));
          if (lost && run.lost_peer == NOBODY) run.lost_peer = rank;
        }
        if (rank == 0) {
          accs = term;
        } else {
          fold_in(accs, term);
        }
      }
      return accs;
    }

    template <uint32_t W>
    __device__ __forceinline__ void store(uint64_t at, Accs<W> accs, uint32_t low, uint32_t high) {
      if (source <= PARTIAL) {
        if constexpr (sizeof(T) == 2) {
          if (!run.arguments.native_partials) {
            Pack<float, W> pack;
#pragma unroll
            for (uint32_t lane = 0; lane < W; ++lane) pack.lanes[lane] = accs.lanes[lane];
            return Wire::template put<float, W>(sent, at - origin, pack);
          }
        }
        return Wire::template put<T, W>(sent, at - origin, narrow(accs));
      }
      if constexpr (IS_FLOAT<Acc>) {
        if (run.arguments.op == AVG) {
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = over(accs.lanes[lane], run.arguments.world_size);
        }
        if (!lost) run.epilogue<W>(at, accs, low, high);
      }
      const Pack<T, W> pack = narrow(accs);
      if (has_send) Wire::template put<T, W>(sent, at - origin, pack);
      if (to_output && !lost) store_own<W>(run.mine.output, at, pack, low, high);
    }
  };

  __device__ __forceinline__ void reduce(const Step& step, const Piece& piece, const Slot& sent, bool& lost) {
    const Slot received = this->received(step.recv_peer != NOBODY ? step.recv_peer : mine.rank);
    Sum body = {*this, static_cast<Source>(step.source), step.send_peer != NOBODY, step.to_output != 0, received, sent,
                piece.origin, lost};
    const bool aligned = on_pack(mine.input) && on_pack(mine.output) && on_pack(mine.cast_output);
    sweep<SUM_UNROLL<T>>(piece, aligned, body);
  }

  // ---- what else the owner makes of its finished f32 (f64) sums while it has them ------------------------------------

  template <uint32_t W>
  __device__ __forceinline__ void epilogue(uint64_t at, const Accs<W>& accs, uint32_t low, uint32_t high) {
    if (mine.found_nonfinite != nullptr) {
      bool nonfinite = false;
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) {
        // x - x is 0 for every finite x, and NaN else.
        nonfinite |= lane >= low && lane < high && accs.lanes[lane] - accs.lanes[lane] != 0;
      }
      if (nonfinite) raise(mine.found_nonfinite, 1);
    }
    if (mine.squares != nullptr) {
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) {
        if (lane >= low && lane < high) squares = fma(double{accs.lanes[lane]}, double{accs.lanes[lane]}, squares);
      }
    }
    if (mine.cast_output == nullptr) return;
    if (arguments.cast_dtype == 0) {
      cast<float, W>(at, accs, low, high);
    } else if (arguments.cast_dtype == 1) {
      cast<Half, W>(at, accs, low, high);
    } else {
      cast<Brain, W>(at, accs, low, high);
    }
  }

  template <class To, uint32_t W>
  __device__ __forceinline__ void cast(uint64_t at, const Accs<W>& accs, uint32_t low, uint32_t high) {
    Pack<To, W> pack;
#pragma unroll
    for (uint32_t lane = 0; lane < W; ++lane) pack.lanes[lane] = Lane<To>::narrow(static_cast<float>(accs.lanes[lane]));
    To* to = reinterpret_cast<To*>(mine.cast_output) + at;
    if constexpr (!Wire::HAS_FLAGS) return store_part<To, W>(to, pack, low, high);
    store<To, W>(to, pack);
  }

  // The block's sum of squares: lanes by shuffles, then warps in order.
  __device__ __forceinline__ void sum_squares() {
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
      squares = __dadd_rn(squares, __shfl_down_sync(0xffffffffu, squares, distance));
    }
    if (threadIdx.x % 32 == 0) block.squares[threadIdx.x / 32] = squares;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double sum = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) sum = __dadd_rn(sum, block.squares[warp]);
    mine.squares[channel] = sum;
  }

  // ---- the whole operation ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin() {
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      block.links[peer] = mine.links[peer];
      block.shards[peer] = arguments.shards[peer];
      if (peer != mine.rank) block.progress[peer] = mine.links[peer].progress[channel];
      else block.progress[peer] = {0, 0};
    }
    for (uint32_t i = threadIdx.x; i < mine.len_steps; i += blockDim.x) block.steps[i] = mine.steps[i];
    if (threadIdx.x == 0) {
      block.operation = mine.state->operation;
      block.gave_up[0] = block.gave_up[1] = block.has_record = 0;
    }
    __syncthreads();
  }

  // The counters go back to memory; the last block closes the operation.
  __device__ __forceinline__ void end() {
    __syncthreads();
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      if (peer != mine.rank) block.links[peer].progress[channel] = block.progress[peer];
    }
    if (mine.squares != nullptr) sum_squares();
    if (threadIdx.x == 0) {
      if (is_last_in(&mine.state->blocks, arguments.channels)) {
        mine.state->operation = block.operation + 1;
        if (mine.squares != nullptr) {
          double sum = 0;
          for (uint32_t i = 0; i < arguments.channels; ++i) sum = __dadd_rn(sum, mine.squares[i]);
          *mine.sum_squares = sum;
        }
      }
    }
  }

  __device__ __forceinline__ void operate() {
    begin();
    greet();
    bool has_agreed = false;
    for (uint64_t round = 0; round < arguments.rounds; ++round) {
      for (uint32_t i = 0; i < mine.len_steps; ++i) {
        if (!run(block.steps[i], round, has_agreed)) return report(block.steps[i], round);
      }
    }
    if (!has_agreed) {
      agree();
      if (!meet()) return report({NOBODY, NOBODY, 0, INPUT, 0, 0, 0}, arguments.rounds);
    }
    end();
  }
};

template <class T>
DEVICE void operate(const Arguments& arguments, Block& block) {
  const RankArguments& mine = arguments.ranks[blockIdx.x / arguments.channels];
  const uint32_t channel = blockIdx.x % arguments.channels;
  if (arguments.words_protocol) {
    Run<T, Words>(arguments, mine, block, channel).operate();
  } else {
    Run<T, Bulk>(arguments, mine, block, channel).operate();
  }
}

// Grid: `channels` blocks for one rank, or for each of several ranks in one cooperative grid: the only way to run ranks
// that share a device in one process, because nothing else makes all of them progress (CUDA C++ programming guide,
// forward progress). Block: a multiple of 32 threads, at most MAX_THREADS; one on a multiprocessor is enough, so a thread
// may have 128 registers.
#define COLLECTIVE(name, T)                                            \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)         \
      collective_##name(const __grid_constant__ Arguments arguments) { \
    __shared__ Block block;                                            \
    operate<T>(arguments, block);                                      \
  }

COLLECTIVE(f32, float)
#ifndef MUTANTS
COLLECTIVE(f16, Half)
COLLECTIVE(bf16, Brain)
COLLECTIVE(f64, double)
COLLECTIVE(i32, int32_t)
COLLECTIVE(i64, int64_t)
COLLECTIVE(u8, uint8_t)
#endif
