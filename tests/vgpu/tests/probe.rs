//! `kernels/probe.cu` between two virtual devices: a link that works, one that loses writes, a peer that never comes.

use annulus::abi::{PROBE_THREADS, ProbeArguments, ProbeReport, Verdict};
use annulus_vgpu::{Arguments, Launch, Memory, Module, Options, run};
use bytemuck::Zeroable;

const SEEDS: std::ops::Range<u64> = 0..4;
/// In the virtual GPU a nanosecond is an instruction.
const TIMEOUT_NS: u64 = 200_000;

/// Memory of one rank: what the peer writes, and the report.
#[derive(Clone, Copy)]
struct Rank {
    inbox: u64,
    flag: u64,
    abort: u64,
    report: u64,
}

struct Pair {
    memory: Memory,
    ranks: [Rank; 2],
    len_words: usize,
}

impl Pair {
    fn new(len_words: usize) -> Pair {
        let mut memory = Memory::new();
        let ranks = [0, 1].map(|_| Rank {
            inbox: memory.alloc(&vec![0; len_words * 4]),
            flag: memory.alloc(&[0; 4]),
            abort: memory.alloc(&[0; 4]),
            report: memory.alloc(&[0xff; size_of::<ProbeReport>()]),
        });
        Pair { memory, ranks, len_words }
    }

    fn arguments(&self, rank: usize) -> ProbeArguments {
        let (mine, peer) = (self.ranks[rank], self.ranks[1 - rank]);
        ProbeArguments {
            peer_inbox: peer.inbox,
            peer_flag: peer.flag,
            inbox: mine.inbox,
            flag: mine.flag,
            abort: mine.abort,
            report: mine.report,
            timeout_ns: TIMEOUT_NS,
            len_words: self.len_words as u64,
            rank: rank as u32,
            peer: 1 - rank as u32,
            generation: 1,
            ..ProbeArguments::zeroed()
        }
    }

    fn run(&mut self, arguments: &[(usize, ProbeArguments)], seed: u64) {
        let module = Module::parse(annulus::kernels::PROBE).unwrap();
        let kernel = module.kernel("probe_peer").unwrap();
        let launches = arguments.iter().map(|(device, arguments)| {
            let words: &[u64] = bytemuck::cast_slice(std::slice::from_ref(arguments));
            let arguments = words.iter().fold(Arguments::new(), |arguments, word| arguments.u64(*word));
            Launch { device: *device, ..Launch::new(kernel, 1, PROBE_THREADS, arguments) }
        });
        let options = Options { seed, ..Options::default() };
        run(&launches.collect::<Vec<_>>(), &mut self.memory, &options).unwrap();
    }

    fn report(&self, rank: usize) -> ProbeReport {
        bytemuck::pod_read_unaligned(self.memory.read(self.ranks[rank].report, size_of::<ProbeReport>()).unwrap())
    }
}

const CLEAN: ProbeReport = ProbeReport { verdict: Verdict::Arrived as u32, seen: 1, wrong_words: 0 };

#[test]
fn both_sides_of_a_sound_link_find_every_word() {
    for len_words in [0, 1, 1000] {
        for seed in SEEDS {
            let mut pair = Pair::new(len_words);
            pair.run(&[(0, pair.arguments(0)), (1, pair.arguments(1))], seed);
            assert_eq!([pair.report(0), pair.report(1)], [CLEAN; 2], "{len_words} words, seed {seed}");
        }
    }
}

#[test]
fn lost_writes_are_counted() {
    let mut pair = Pair::new(300);
    let mut lossy = pair.arguments(0);
    // The last 44 words of rank 0 go nowhere that rank 1 would look.
    lossy.len_words = 256;
    pair.run(&[(0, lossy), (1, pair.arguments(1))], 1);
    assert_eq!(pair.report(0), CLEAN);
    assert_eq!(pair.report(1), ProbeReport { wrong_words: 44, ..CLEAN });
}

#[test]
fn a_peer_that_never_comes_ends_at_the_deadline_and_by_the_abort_word() {
    let mut pair = Pair::new(10);
    pair.run(&[(0, pair.arguments(0))], 1);
    assert_eq!(pair.report(0), ProbeReport { verdict: Verdict::Late as u32, seen: 0, wrong_words: 0 });

    pair.memory.write(pair.ranks[0].abort, 4).unwrap().fill(1);
    pair.run(&[(0, ProbeArguments { timeout_ns: u64::MAX, ..pair.arguments(0) })], 1);
    assert_eq!(pair.report(0).verdict, Verdict::Aborted as u32);
}
