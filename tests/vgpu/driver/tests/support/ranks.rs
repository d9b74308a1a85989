//! Ranks with devices, buffers with canaries, inputs.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::time::Duration;

use annulus::Element;
use annulus::collective::cuda::{Communicator, Options};
use annulus::device::cuda::{Buffer, Driver, Kernels, Priority, Stream, View};
use annulus::world::{Environment, World, WorldOptions};

/// No wait of a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What lies around every buffer, and must stay.
const CANARY_ELEMS: usize = 16;

/// A rank with the device of its number.
pub struct Rank {
    pub world: World,
    pub kernels: Kernels,
    pub stream: Stream,
}

impl Rank {
    pub fn join(environment: Environment) -> Rank {
        Rank::on(environment.rank, environment)
    }

    pub fn on(device: u32, environment: Environment) -> Rank {
        // Interpreted kernels keep the cores busy, and the monitors with them from beating.
        let options = WorldOptions { timeout: PATIENCE, heartbeat_limit: None, ..WorldOptions::default() };
        Rank::on_device(device, environment, options)
    }

    pub fn on_device(device: u32, environment: Environment, options: WorldOptions) -> Rank {
        let world = World::join(environment, options).unwrap();
        let device = Driver::open().unwrap().device(device).unwrap();
        let kernels = Kernels::load(&device).unwrap();
        let stream = Stream::new(&device, "test", Priority::High).unwrap();
        Rank { world, kernels, stream }
    }

    pub fn communicator(&self, options: Options) -> Communicator {
        Communicator::new(&self.world, &self.kernels, options).unwrap()
    }

    pub fn number(&self) -> usize {
        self.world.rank() as usize
    }

    /// A buffer of `elements` that begins `shift_elems` behind a 16-byte boundary.
    pub fn framed<T: Element>(&self, elements: &[T], shift_elems: usize) -> Framed {
        let canary = T::from_f64(77.0);
        let before = CANARY_ELEMS + shift_elems;
        let all = [&vec![canary; before], elements, &[canary; CANARY_ELEMS]].concat();
        let mut buffer = Buffer::zeroed(self.kernels.device(), T::DTYPE, all.len()).unwrap();
        buffer.write(&all, &self.stream).unwrap();
        let view = buffer.view().slice(before, elements.len()).unwrap();
        Framed { buffer, view, before }
    }
}

/// A view with canaries before and behind.
pub struct Framed {
    buffer: Buffer,
    pub view: View,
    before: usize,
}

impl Framed {
    /// Waits for the rank's stream; then the view holds `expected`, and nothing around it has changed.
    pub fn check<T: Element>(&self, rank: &Rank, expected: &[T], what: &str) {
        let all: Vec<T> = self.buffer.read(&rank.stream, PATIENCE).unwrap();
        let (frame, rest) = all.split_at(self.before);
        let (actual, frame_behind) = rest.split_at(self.view.len_elems());
        let canary = T::from_f64(77.0);
        let is_whole = frame.iter().chain(frame_behind).all(|element| same(*element, canary));
        assert!(is_whole, "rank {} wrote outside of {what}", rank.number());
        assert_eq!(actual.len(), expected.len(), "{what}");
        let wrong = (0..actual.len()).find(|i| !same(actual[*i], expected[*i]));
        if let Some(i) = wrong {
            panic!("rank {}, {what}, element {i}: {:?}, not {:?}", rank.number(), actual[i], expected[i]);
        }
    }
}

/// Whether two elements are the same bits, or both NaN: a GPU keeps no payloads.
pub fn same<T: Element>(a: T, b: T) -> bool {
    let is_nan = |x: T| T::DTYPE.is_float() && x.to_f64().is_nan();
    bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b) || (is_nan(a) && is_nan(b))
}

/// Values whose sums depend on the order, a few that are special among them.
pub fn rough<T: Element>(rank: usize, i: usize) -> T {
    let mixed = (i as u64 * 0x9e37_79b9 + rank as u64 * 0x85eb_ca6b + 1).wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
    match mixed % 97 {
        0 if i.is_multiple_of(5) => T::from_f64(f64::NAN),
        1 => T::from_f64(f64::INFINITY),
        2 => T::from_f64(-0.0),
        _ if T::DTYPE.is_float() => {
            T::from_f64((mixed % 4001) as f64 * 2f64.powi((mixed >> 20) as i32 % 9 - 4) / 7.0 - 90.0)
        }
        _ => T::from_f64((mixed % 0xffff_ffff) as f64 - 2e9),
    }
}

/// The terms of every rank.
pub fn inputs<T: Element>(world_size: usize, len_elems: usize) -> Vec<Vec<T>> {
    (0..world_size).map(|rank| (0..len_elems).map(|i| rough(rank, i)).collect()).collect()
}
