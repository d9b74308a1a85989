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
// A small all-reduce is two entries: the whole vector to everybody, then all terms in rank order. One trip over the links
// instead of two, and the bits of Direct.
//
// The numeric contract is lane.cuh's. Direct adds in rank order 0..N-1; the ring in the order of the hops.
//
// Waits: thread p watches peer p's flag, thread p + 32 the credit of peer p, then a barrier. Every wait ends at a deadline
// or by the abort word; the first thread that gives up writes the block's fault record, and the block returns.
// Counters live in device memory and only grow; so a captured graph can be replayed.
//
// An operation may also be cut into kernels, one that greets and one a step, for ranks whose kernels do not run at the same
// time. Then each begins when its stream has seen in the host's memory that the peers are far enough (`tell`), so that no wait
// in it lasts; one that finds the job aborted does nothing, and tells nothing.
//
// Cost per rank of S bytes, N ranks: all-reduce 2(N-1)/N S over the link each way (ring of f32 partials for 16-bit elements
// 1.5 times that), and in local memory reads of S and writes of S besides the staging. See src/schedule/mod.rs.
// Sources: Patarasuk & Yuan 2009 (ring); NCCL src/device/prims_simple.h and prims_ll.h (fused steps, two protocols).
#include "move.cuh"

template <class T, class Wire>
struct Run {
  const Channel channel;
  const Arguments& arguments;
  const RankArguments& mine;
  Block& block;
  const Patience patience;
  Move<T, Wire> move;
  uint32_t meetings;   // of the block so far
  Cause cause;         // why this thread gave up

  __device__ __forceinline__ Run(const Arguments& arguments, const RankArguments& mine, Block& block, uint32_t number)
      : channel{arguments, mine, block, number}, arguments(arguments), mine(mine), block(block),
        patience{MUTANT(NO_ABORT) ? &mine.state->blocks : mine.abort, arguments.timeout_ns}, move(channel, patience),
        meetings(0), cause{} {}

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
    FaultRecord* record = mine.faults + channel.number;
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
    const Verdict verdict = wait(flags + channel.number * FLAG_STRIDE, generation, patience, seen);
    if (verdict != ARRIVED) give_up(verdict, awaited, peer, generation, seen);
  }

  // Tells every peer what this rank is about to do. One block greets for all.
  __device__ __forceinline__ void greet() {
    if (channel.number != 0 || !arguments.opens) return;
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
    if (Wire::HAS_FLAGS && !MUTANT(EARLY_FLAG)) post(block.links[peer].send_flags + channel.number * FLAG_STRIDE, generation);
  }

  __device__ __forceinline__ void give_back(uint32_t peer) {
    if (!receives_from(peer)) return;
    const uint32_t generation = ++block.progress[peer].taken;
    if (!MUTANT(EARLY_CREDIT)) post(block.links[peer].give_back + channel.number * FLAG_STRIDE, generation);
  }

  // ---- one step --------------------------------------------------------------------------------------------------

  // False: the block has given up.
  __device__ __forceinline__ bool run(const Step& step, uint64_t round, bool& has_agreed) {
    const bool uses_others = step.recv_peer != NOBODY || step.source == ALL || step.to_output != 0;
    if (uses_others && !has_agreed && !MUTANT(EARLY_OUTPUT)) {
      agree();
      has_agreed = true;
      // No output is written before all have agreed.
      if (!meet()) return false;
    }
    if (step.source == ALL) {
      channel.for_peers([&](uint32_t peer) { await_data(peer); });
    } else if (step.recv_peer != NOBODY) {
      await_data(step.recv_peer);
    }
    channel.for_receivers(step, [&](uint32_t peer) { await_credit(peer); });
    if (!MUTANT(NO_BARRIER_AFTER_WAIT) && !meet()) return false;
    if (MUTANT(EARLY_FLAG)) {
      channel.for_receivers(step, [&](uint32_t peer) {
        if (!sends_to(peer)) return;
        post(block.links[peer].send_flags + channel.number * FLAG_STRIDE, block.progress[peer].sent + 1);
      });
    }
    if (MUTANT(EARLY_CREDIT) && step.recv_peer != NOBODY && receives_from(step.recv_peer)) {
      post(block.links[step.recv_peer].give_back + channel.number * FLAG_STRIDE, block.progress[step.recv_peer].taken + 1);
    }
    if (!move.run(step, round)) {
      const uint32_t taken = block.progress[move.lost_peer].taken;
      give_up(peek(patience.abort) != 0 ? ABORTED : LATE, DATA, move.lost_peer, taken + 1, taken);
    }
    if (!MUTANT(NO_BARRIER_BEFORE_POST) && !meet()) return false;
    channel.for_receivers(step, [&](uint32_t peer) { post_data(peer); });
    if (step.source == ALL) {
      channel.for_peers([&](uint32_t peer) { give_back(peer); });
    } else if (step.recv_peer != NOBODY) {
      give_back(step.recv_peer);
    }
    return true;
  }

  // ---- the whole operation ---------------------------------------------------------------------------------------

  // False: there is nothing to do.
  __device__ __forceinline__ bool begin() {
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      block.links[peer] = mine.links[peer];
      if (peer != mine.rank) block.progress[peer] = mine.links[peer].progress[channel.number];
      else block.progress[peer] = {0, 0};
    }
    for (uint32_t i = threadIdx.x; i < mine.len_steps; i += blockDim.x) block.steps[i] = mine.steps[i];
    if (threadIdx.x == 0) {
      block.operation = mine.state->operation;
      block.gave_up[1] = block.has_record = 0;
      block.gave_up[0] = mine.signals != nullptr && peek(mine.abort) != 0;
    }
    return meet();
  }

  // The counters go back to memory; the last block closes the operation.
  __device__ __forceinline__ void end() {
    __syncthreads();
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      if (peer != mine.rank) block.links[peer].progress[channel.number] = block.progress[peer];
    }
    if (mine.squares != nullptr) move.sum_squares();
    if (mine.signals != nullptr) __syncthreads();  // the counters are read by another block
    if (threadIdx.x == 0) {
      block.is_last = is_last_in(&mine.state->blocks, arguments.channels);
      if (block.is_last && arguments.closes) {
        mine.state->operation = block.operation + 1;
        if (mine.squares != nullptr) {
          double sum = 0;
          for (uint32_t i = 0; i < arguments.channels; ++i) sum = __dadd_rn(sum, mine.squares[i]);
          *mine.sum_squares = sum;
        }
        if (mine.finished != nullptr) post(mine.finished, block.operation + 1);
      }
    }
    if (mine.signals == nullptr) return;
    __syncthreads();
    if (block.is_last) tell();
  }

  // Tells the peers' streams how far this rank is. By its last block, which has observed what the others did.
  __device__ __forceinline__ void tell() {
    for (uint32_t peer = threadIdx.x; peer < arguments.world_size; peer += blockDim.x) {
      if (peer == mine.rank) continue;
      const Progress all = block.links[peer].progress[0];  // channel 0 takes part in every step
      Signals* signals = mine.signals[peer];
      post(&signals->greeted, block.operation + 1);
      post(&signals->taken, all.taken);
      post(&signals->sent, all.sent + (MUTANT(EARLY_TELL) ? 1 : 0));
    }
  }

  __device__ __forceinline__ void operate() {
    if (!begin()) return;
    greet();
    bool has_agreed = false;
    for (uint64_t round = arguments.first_round; round < arguments.rounds; ++round) {
      for (uint32_t i = 0; i < mine.len_steps; ++i) {
        if (!run(block.steps[i], round, has_agreed)) return report(block.steps[i], round);
      }
    }
    if (!has_agreed && arguments.closes) {
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
