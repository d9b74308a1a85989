// Moves one piece of a chunk: as it is, or adding it up. Arithmetic and accesses; who waits for what is collective.cu's.
#pragma once
#include <cstdint>

#include "channel.cuh"

// Packs that a thread has in flight in copies, and in sums, where each is read from two places or more. A pack of bytes
// has 16 sums: two of them would spill registers.
constexpr uint32_t COPY_UNROLL = 4;
template <class T>
constexpr uint32_t SUM_UNROLL = sizeof(T) == 1 ? 1 : 2;

template <class T, class Wire>
struct Move {
  using Acc = typename Lane<T>::Acc;
  template <uint32_t W>
  struct Accs {
    Acc lanes[W];
  };

  const Channel channel;
  const Arguments& arguments;
  const RankArguments& mine;
  const Patience patience;
  double squares;      // of the finished elements of this thread
  uint32_t lost_peer;  // whose word among all terms did not come

  __device__ __forceinline__ Move(const Channel& channel, const Patience& patience)
      : channel(channel), arguments(channel.arguments), mine(channel.mine), patience(patience), squares(0),
        lost_peer(NOBODY) {}

  // False if a word did not come: then `lost_peer` did not send it.
  __device__ __forceinline__ bool run(const Step& step, uint64_t round) {
    const Piece piece = channel.piece(step, round);
    bool lost = false;
    if (step.source <= RECEIVED) {
      copy(step, piece, lost);
    } else {
      reduce(step, piece, lost);
    }
    if (!Wire::HAS_FLAGS) channel.for_receivers(step, [&](uint32_t peer) { refresh(channel.sent(peer)); });
    if (lost && lost_peer == NOBODY) lost_peer = step.recv_peer;
    return !lost;
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

  // Memory of elements, a whole pack or the part [low, high) of one. Whole packs are of vectors that stream by; the cache is
  // for staging.
  template <uint32_t W>
  static __device__ __forceinline__ Pack<T, W> load_own(const unsigned char* base, uint64_t at, uint32_t low, uint32_t high) {
    const T* from = reinterpret_cast<const T*>(base) + at;
    if constexpr (!Wire::HAS_FLAGS) return load_part<T, W>(from, low, high);
    return load<T, W, EVICT_FIRST>(from);
  }
  template <uint32_t W>
  static __device__ __forceinline__ void store_own(unsigned char* base, uint64_t at, const Pack<T, W>& pack, uint32_t low,
                                                   uint32_t high) {
    T* to = reinterpret_cast<T*>(base) + at;
    if constexpr (!Wire::HAS_FLAGS) return store_part<T, W>(to, pack, low, high);
    store<T, W, EVICT_FIRST>(to, pack);
  }

  // Elements as they are.
  struct Copy {
    Move& move;
    const unsigned char* from;  // own memory; or null: the slot
    unsigned char* to;          // own memory; or null
    Slot received, sent;
    bool has_send;
    uint64_t origin;
    bool& lost;

    template <uint32_t W>
    __device__ __forceinline__ Pack<T, W> load(uint64_t at, uint32_t low, uint32_t high) {
      if (from != nullptr) return load_own<W>(from, at, low, high);
      return Wire::template take<T, W>(received, at - origin, move.patience, lost);
    }
    template <uint32_t W>
    __device__ __forceinline__ void store(uint64_t at, const Pack<T, W>& pack, uint32_t low, uint32_t high) {
      if (has_send) Wire::template put<T, W>(sent, at - origin, pack);
      if (to != nullptr && !lost) store_own<W>(to, at, pack, low, high);
    }
  };

  // The own input to every peer, in words.
  struct Spread {
    Move& move;
    uint64_t origin;

    template <uint32_t W>
    __device__ __forceinline__ Pack<T, W> load(uint64_t at, uint32_t low, uint32_t high) {
      return load_own<W>(move.mine.input, at, low, high);
    }
    template <uint32_t W>
    __device__ __forceinline__ void store(uint64_t at, const Pack<T, W>& pack, uint32_t, uint32_t) {
      move.channel.for_peers([&](uint32_t peer) { Wire::template put<T, W>(move.channel.sent(peer), at - origin, pack); });
    }
  };

  // Of a transfer to one peer; else meaningless.
  __device__ __forceinline__ Slot sent_by(const Step& step) const {
    return channel.sent(step.send_peer < EVERYBODY ? step.send_peer : mine.rank);
  }

  __device__ __forceinline__ void copy(const Step& step, const Piece& piece, bool& lost) {
    if constexpr (!Wire::HAS_FLAGS) {
      if (step.send_peer == EVERYBODY) {
        Spread body = {*this, piece.origin};
        return sweep<1>(piece, true, body);
      }
    }
    const unsigned char* from = step.source == INPUT ? mine.input : step.source == RESULT ? mine.output : nullptr;
    unsigned char* to = step.to_output && mine.output != from ? mine.output : nullptr;
    const Slot received = channel.received(step.recv_peer != NOBODY ? step.recv_peer : mine.rank);
    Copy body = {*this, from, to, received, sent_by(step), step.send_peer != NOBODY, piece.origin, lost};
    sweep<COPY_UNROLL>(piece, on_pack(from) && on_pack(to), body);
  }

  // Partial sums and finished ones.
  struct Sum {
    Move& move;
    Source source;
    bool has_send, to_output;
    Slot received, sent;
    uint64_t origin;
    bool& lost;

    template <uint32_t W>
    __device__ __forceinline__ Accs<W> own(uint64_t at, uint32_t low, uint32_t high) {
      return terms(load_own<W>(move.mine.input, at, low, high));
    }

    // Widens what has not been added yet.
    template <uint32_t W>
    __device__ __forceinline__ Accs<W> terms(const Pack<T, W>& pack) {
      Accs<W> accs;
#pragma unroll
      for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = Lane<T>::widen(pack.lanes[lane]);
      if constexpr (IS_FLOAT<Acc>) {
        if (move.arguments.op == PREMUL_SUM) {
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = times(accs.lanes[lane], move.arguments.factor);
        }
      }
      return accs;
    }

    // Partials of 16-bit floats travel as f32, or by request in the element type.
    template <uint32_t W>
    __device__ __forceinline__ Accs<W> take_partial(uint64_t at) {
      Accs<W> accs;
      if constexpr (sizeof(T) == 2) {
        if (!move.arguments.native_partials) {
          const Pack<float, W> pack = Wire::template take<float, W>(received, at - origin, move.patience, lost);
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = pack.lanes[lane];
          return accs;
        }
      }
      const Pack<T, W> pack = Wire::template take<T, W>(received, at - origin, move.patience, lost);
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
      if (move.arguments.op == MIN) {
#pragma unroll
        for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = minimum(accs.lanes[lane], others.lanes[lane]);
      } else if (move.arguments.op == MAX) {
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
      for (uint32_t rank = 0; rank < move.arguments.world_size; ++rank) {
        Accs<W> term;
        if (rank == move.mine.rank) {
          term = own<W>(at, low, high);
        } else {
          term = terms(Wire::template take<T, W>(move.channel.received(rank), at - origin, move.patience, lost));
          if (lost && move.lost_peer == NOBODY) move.lost_peer = rank;
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
          if (!move.arguments.native_partials) {
            Pack<float, W> pack;
#pragma unroll
            for (uint32_t lane = 0; lane < W; ++lane) pack.lanes[lane] = accs.lanes[lane];
            return Wire::template put<float, W>(sent, at - origin, pack);
          }
        }
        return Wire::template put<T, W>(sent, at - origin, narrow(accs));
      }
      if constexpr (IS_FLOAT<Acc>) {
        if (move.arguments.op == AVG) {
#pragma unroll
          for (uint32_t lane = 0; lane < W; ++lane) accs.lanes[lane] = over(accs.lanes[lane], move.arguments.world_size);
        }
        if (!lost) move.epilogue<W>(at, accs, low, high);
      }
      const Pack<T, W> pack = narrow(accs);
      if (has_send) Wire::template put<T, W>(sent, at - origin, pack);
      if (to_output && !lost) store_own<W>(move.mine.output, at, pack, low, high);
    }
  };

  // Sends to one peer at most.
  __device__ __forceinline__ void reduce(const Step& step, const Piece& piece, bool& lost) {
    const Slot received = channel.received(step.recv_peer != NOBODY ? step.recv_peer : mine.rank);
    Sum body = {*this, static_cast<Source>(step.source), step.send_peer != NOBODY, step.to_output != 0, received,
                sent_by(step), piece.origin, lost};
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
    if (threadIdx.x % 32 == 0) channel.block.squares[threadIdx.x / 32] = squares;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double sum = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) sum = __dadd_rn(sum, channel.block.squares[warp]);
    mine.squares[channel.number] = sum;
  }
};
