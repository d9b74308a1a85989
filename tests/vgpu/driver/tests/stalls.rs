//! A peer that stops inside an operation, behind its greeting: whoever waits for it is told where, and what for.
//!
//! It stops because its memory ends before the vector does: its kernel greets, moves what there is, and dies of the first
//! element beyond. So it is known to the step where it stops. Its process goes on, and its monitor beats.

#[path = "support/operations.rs"]
mod operations;
#[path = "support/ranks.rs"]
mod ranks;
mod support;
#[path = "../../../together/mod.rs"]
mod together;
#[path = "support/trouble.rs"]
mod trouble;

use std::time::Duration;

use annulus::collective::cuda::{Communicator, Options, Way};
use annulus::device::cuda::{Buffer, View};
use annulus::schedule::Algorithm;
use annulus::world::{Environment, launch};
use annulus::{DType, Error, ReduceOp, Result};
use operations::every_operation;
use ranks::{PATIENCE, Rank};
use support::on_virtual_gpu;
use together::Together;
use trouble::is_poisoned_and_usable;

/// Of a kernel that dies no host is told what it has done, so whatever follows it looks like a race.
const THREE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "3"), ("ANNULUS_VGPU_RACES", "ignore")];
/// Of a wait: longer than two interpreted kernels are ever apart.
const TIMEOUT: Duration = Duration::from_secs(3);

/// What two ranks do, and where one of them stops.
struct Stall {
    way: Way,
    /// All-reduce from one buffer to another, or else a broadcast of rank 0's.
    reduces: bool,
    algorithm: Option<Algorithm>,
    len_elems: usize,
    stops: usize,
    /// Elements that there are of the input and the output of the rank that stops; of a broadcast, of its one buffer.
    sound_elems: [usize; 2],
    /// Where the other one waits.
    place: &'static str,
    /// What it waits for, and what there is.
    generations: [u32; 2],
}

/// Of so many elements, the first `sound_elems` of which are there.
fn cut_off(rank: &Rank, len_elems: usize, sound_elems: usize) -> Buffer {
    let device = rank.kernels.device();
    let sound = Buffer::zeroed(device, DType::F32, sound_elems).unwrap();
    // SAFETY: none beyond the sound elements, of which a kernel dies: that is what is tested, and the driver is virtual.
    unsafe { Buffer::foreign(device, sound.address(), DType::F32, len_elems, Box::new(sound)) }.unwrap()
}

impl Stall {
    fn issue(&self, rank: &Rank, communicator: &mut Communicator, [src, dst]: [&View; 2]) -> Result<()> {
        match self.reduces {
            true => communicator.all_reduce_into(src, dst, ReduceOp::Sum, &rank.stream),
            false => communicator.broadcast(src, 0, &rank.stream),
        }
    }

    fn test(&self, name: &str) {
        on_virtual_gpu(name, THREE, || {
            let met = Together::new(2);
            launch::threads(2, |environment| {
                let rank = Rank::join(environment);
                let (timeout, way, algorithm) = (Some(TIMEOUT), Some(self.way), self.algorithm);
                let options = Options { timeout, way, algorithm, ..Options::default() };
                let mut communicator = rank.communicator(options);
                communicator.barrier(&rank.stream).unwrap();
                communicator.synchronize(PATIENCE).unwrap();
                if rank.number() == self.stops {
                    self.stop(&rank, &mut communicator, &met);
                } else {
                    self.wait(&rank, &mut communicator, &met);
                }
            })
            .unwrap();
        });
    }

    fn stop(&self, rank: &Rank, communicator: &mut Communicator, met: &Together) {
        let [src, dst] = self.sound_elems.map(|sound_elems| cut_off(rank, self.len_elems, sound_elems));
        self.issue(rank, communicator, [&src.view(), &dst.view()]).unwrap();
        let fault = rank.stream.synchronize(PATIENCE).unwrap_err();
        assert!(matches!(fault, Error::KernelFault { .. }), "{fault:?}");
        met.wait();
        let told = communicator.check().unwrap_err();
        assert!(matches!(told, Error::PeerStalled { rank, .. } if rank as usize == self.stops), "{told:?}");
    }

    fn wait(&self, rank: &Rank, communicator: &mut Communicator, met: &Together) {
        let [src, dst] = [(); 2].map(|()| Buffer::zeroed(rank.kernels.device(), DType::F32, self.len_elems).unwrap());
        self.issue(rank, communicator, [&src.view(), &dst.view()]).unwrap();
        let error = communicator.synchronize(PATIENCE).unwrap_err();
        let Error::PeerStalled { rank: peer, sequence, operation, place, waited_ms, expected, seen } = &error else {
            panic!("{error:?}");
        };
        assert_eq!((*peer as usize, *sequence), (self.stops, 2), "{error}");
        assert!(operation.contains(&format!("({} x f32", self.len_elems)), "{error}");
        assert_eq!((place.as_str(), [*expected, *seen]), (self.place, self.generations), "{error}");
        assert_eq!(u128::from(*waited_ms), TIMEOUT.as_millis());
        is_poisoned_and_usable(rank, communicator);
        met.wait();
        a_new_job(rank);
    }
}

/// The device of a rank that has waited in vain takes part in another job, in this process and context.
fn a_new_job(rank: &Rank) {
    let ordinal = rank.kernels.device().ordinal();
    launch::threads(2, |environment: Environment| {
        let device = if environment.rank == 0 { ordinal } else { 2 };
        let rank = Rank::on(device, environment);
        every_operation::<f32>(&rank, &mut rank.communicator(Options::default()), Algorithm::Direct, 17);
    })
    .unwrap();
}

/// Vectors that travel as words, in 8 rounds of 2048 elements; those in bulk are longer, in 3 rounds.
const WORDS: Stall = Stall {
    way: Way::Persistent,
    reduces: false,
    algorithm: None,
    len_elems: 16_384,
    stops: 0,
    sound_elems: [5_000, 1],
    place: "broadcast step 0, round 2, chunk 0: waiting for data",
    generations: [3, 2],
};
const BULK: Stall = Stall { len_elems: 70_000, ..WORDS };

#[test]
fn words_of_a_broadcast_that_do_not_come_are_waited_for_as_data() {
    WORDS.test("words_of_a_broadcast_that_do_not_come_are_waited_for_as_data");
}

#[test]
fn a_flag_of_a_broadcast_that_does_not_come_is_waited_for_as_data() {
    let stall = Stall {
        sound_elems: [40_000, 1],
        place: "broadcast step 0, round 1, chunk 0: waiting for data",
        generations: [2, 1],
        ..BULK
    };
    stall.test("a_flag_of_a_broadcast_that_does_not_come_is_waited_for_as_data");
}

/// The root may be two slots ahead of who takes nothing any more.
#[test]
fn a_root_whose_words_are_not_taken_waits_for_a_free_slot() {
    let stall = Stall {
        stops: 1,
        place: "broadcast step 0, round 4, chunk 0: waiting for a free slot",
        generations: [3, 2],
        ..WORDS
    };
    stall.test("a_root_whose_words_are_not_taken_waits_for_a_free_slot");
}

#[test]
fn a_root_whose_elements_are_not_taken_waits_for_a_free_slot() {
    let stall = Stall {
        stops: 1,
        sound_elems: [100, 1],
        place: "broadcast step 0, round 2, chunk 0: waiting for a free slot",
        generations: [1, 0],
        ..BULK
    };
    stall.test("a_root_whose_elements_are_not_taken_waits_for_a_free_slot");
}

/// The second half of rank 0's terms, which rank 1 adds.
#[test]
fn a_term_that_does_not_come_is_waited_for_in_reduce_scatter() {
    let stall = Stall {
        reduces: true,
        algorithm: Some(Algorithm::Ring),
        len_elems: 200,
        sound_elems: [100, 200],
        place: "reduce-scatter step 0, round 0, chunk 1: waiting for data",
        generations: [1, 0],
        ..WORDS
    };
    stall.test("a_term_that_does_not_come_is_waited_for_in_reduce_scatter");
}

/// The second half of what rank 0 sends, in the one step of a short vector.
#[test]
fn a_term_that_does_not_come_is_waited_for_in_one_step() {
    let stall = Stall {
        reduces: true,
        len_elems: 200,
        sound_elems: [100, 200],
        place: "one step, round 0: waiting for data",
        generations: [1, 0],
        ..WORDS
    };
    stall.test("a_term_that_does_not_come_is_waited_for_in_one_step");
}

/// Rank 1's shard of the sum, which it has no room for.
const NO_ROOM: Stall = Stall {
    reduces: true,
    algorithm: Some(Algorithm::Ring),
    len_elems: 200,
    stops: 1,
    sound_elems: [200, 100],
    place: "all-gather step 1, round 0, chunk 1: waiting for data",
    generations: [2, 1],
    ..WORDS
};

#[test]
fn a_sum_that_does_not_come_is_waited_for_in_all_gather() {
    NO_ROOM.test("a_sum_that_does_not_come_is_waited_for_in_all_gather");
}

// ---- by steps: streams wait, and the host sees which wait lasts ----------------------------------------------------------

#[test]
fn a_stream_that_waits_for_a_sum_says_so() {
    Stall { way: Way::Stepped, ..NO_ROOM }.test("a_stream_that_waits_for_a_sum_says_so");
}

#[test]
fn a_stream_that_waits_for_a_free_slot_says_so() {
    let stall = Stall {
        way: Way::Stepped,
        stops: 1,
        sound_elems: [100, 1],
        place: "broadcast step 0, round 2, chunk 0: waiting for a free slot",
        generations: [1, 0],
        ..BULK
    };
    stall.test("a_stream_that_waits_for_a_free_slot_says_so");
}
