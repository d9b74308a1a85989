// Does what one rank writes into a peer's memory arrive there, whole and in order?
//
//   inbox of the peer [i] = pattern(rank, generation, i)      every thread; then a barrier
//   flag of the peer      = generation                        thread 0
//   wait own flag >= generation                               thread 0; then a barrier
//   wrong = number of i with own inbox[i] != pattern(peer, generation, i)
//
// cuDeviceCanAccessPeer may say yes where PCIe access control or an IOMMU drops or corrupts peer writes
// (NVIDIA/open-gpu-kernel-modules issue 1257), so every pair is tried with data before a collective trusts it. Both
// ranks of a pair run this at the same time; a pair that fails ends at the deadline.
//
// Cost: 4 * len_words bytes written over the link and read once, each way. One block.
// Source: vLLM's `can_actually_p2p` (distributed/device_communicators/custom_all_reduce_utils.py) fills 1 KiB of a peer over
// CUDA IPC, and both sides compare. Here kernels write, every word has its own value, and data and flag must come in order.
#include "signal.cuh"

// src/abi/probe.rs
struct ProbeArguments {
  uint32_t* peer_inbox;
  uint32_t* peer_flag;
  const uint32_t* inbox;
  const uint32_t* flag;
  const uint32_t* abort;
  struct ProbeReport* report;
  uint64_t timeout_ns;
  uint64_t len_words;
  uint32_t rank;
  uint32_t peer;
  uint32_t generation;
};

struct ProbeReport {
  uint32_t verdict;
  uint32_t seen;         // generation of the flag when the wait ended
  uint32_t wrong_words;  // meaningful if the peer arrived
};

// The finalizer of MurmurHash3 (Appleby, public domain): neighbouring words differ in about half of their bits.
DEVICE uint32_t pattern(uint32_t rank, uint32_t generation, uint64_t index) {
  uint32_t mixed = static_cast<uint32_t>(index) * 0x9e3779b9u + rank * 0x85ebca77u + generation;
  mixed = (mixed ^ mixed >> 16) * 0x85ebca6bu;
  mixed = (mixed ^ mixed >> 13) * 0xc2b2ae35u;
  return mixed ^ mixed >> 16;
}

extern "C" __global__ void __launch_bounds__(256) probe_peer(const __grid_constant__ ProbeArguments arguments) {
  __shared__ uint32_t verdict, seen, wrong_words;
  for (uint64_t i = threadIdx.x; i < arguments.len_words; i += blockDim.x) {
    arguments.peer_inbox[i] = pattern(arguments.rank, arguments.generation, i);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    post(arguments.peer_flag, arguments.generation);
    wrong_words = 0;
    uint32_t last;
    verdict = wait(arguments.flag, arguments.generation, {arguments.abort, arguments.timeout_ns}, last);
    seen = last;
  }
  __syncthreads();
  if (verdict == ARRIVED) {
    uint32_t wrong = 0;
    for (uint64_t i = threadIdx.x; i < arguments.len_words; i += blockDim.x) {
      wrong += arguments.inbox[i] != pattern(arguments.peer, arguments.generation, i);
    }
    if (wrong != 0) atomicAdd(&wrong_words, wrong);
  }
  __syncthreads();
  if (threadIdx.x == 0) *arguments.report = {verdict, seen, wrong_words};
}
