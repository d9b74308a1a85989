//! The operations of `annulus::ops::cuda` in criterion's statistics, by the device's clock.
//!
//! ```text
//! cargo bench -p annulus-gpu --bench cuda
//! ```
//! Cases, bytes and models are those of `annulus-gpu`, which also judges them. Before each stands what it moves, how long this
//! card's copy takes for as many bytes, and how long PyTorch took, both in this run. Says so and ends where there is no GPU.

use std::time::Duration;

use annulus::device::cuda::{Stream, Timer};
use annulus_gpu::card::Card;
use annulus_gpu::part::Scale;
use annulus_gpu::record::{Peer, Record};
use annulus_gpu::site::{PATIENCE, Site};
use annulus_gpu::time::cases::CASES;
use annulus_gpu::time::{Stopwatch, model};
use annulus_gpu::{pytorch, report};
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};

/// Of a copy, and of PyTorch's versions.
const ROUNDS: usize = 11;

/// Time between two points of a stream.
struct DeviceTime {
    timer: Timer,
    stream: Stream,
}

impl Measurement for DeviceTime {
    type Intermediate = ();
    type Value = Duration;

    fn start(&self) {
        self.timer.start(&self.stream).expect("the device works");
    }

    fn end(&self, (): ()) -> Duration {
        self.timer.stop(&self.stream).and_then(|()| self.timer.elapsed(PATIENCE)).expect("the device works")
    }

    fn add(&self, v1: &Duration, v2: &Duration) -> Duration {
        *v1 + *v2
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn main() -> annulus_gpu::Result<()> {
    let card = match Card::look() {
        Ok(card) if !card.is_virtual() => card,
        Ok(card) => return skip(&format!("{} has no speed to measure", card.name)),
        Err(error) => return skip(&error.to_string()),
    };
    let site = Site::open()?;
    let lens = model::that_fits(&site.device, Scale::Quick)?;
    let len_elems: usize = lens.iter().sum();
    // Before anything of this process is in the card's memory.
    let peers = pytorch::ask(&lens, ROUNDS, Duration::from_secs(60), |record| {
        if !matches!(record, Record::Peer(_)) {
            eprintln!("PyTorch: {}", report::line(record));
        }
    });
    let copy_gb_s = Stopwatch::new(&site, ROUNDS)?.copy_gb_s();
    println!("{}: copy {copy_gb_s:.0} GB/s, {len_elems} elements in {} tensors", card.name, lens.len());
    let measurement = DeviceTime { timer: Timer::new(&site.device)?, stream: site.stream.clone() };
    let mut criterion = Criterion::default().with_measurement(measurement).configure_from_args();
    let mut group = criterion.benchmark_group("cuda");
    group.sample_size(20);
    for case in CASES {
        let bytes = case.bytes_per_elem * len_elems as u64;
        group.throughput(Throughput::BytesDecimal(bytes));
        let mut prepared = None; // not for cases that are filtered out
        group.bench_function(case.what, |b| {
            let work = prepared.get_or_insert_with(|| {
                println!("\n{}", beside(case.what, bytes, copy_gb_s, &peers));
                (case.prepare)(&site, &lens).expect("the model fits")
            });
            b.iter(|| work(&site.stream).expect("the device works"));
        });
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// What a case stands beside.
fn beside(what: &str, bytes: u64, copy_gb_s: f64, peers: &[Record]) -> String {
    let peer = peers.iter().find_map(|record| match record {
        Record::Peer(peer) if peer.what == what => Some(peer),
        _ => None,
    });
    let by_peer = peer.map_or("PyTorch: not timed".to_owned(), |Peer { how, us, .. }| format!("{us:.1} us by {how}"));
    let by_copy = bytes as f64 / copy_gb_s / 1e3;
    format!("{what}: {bytes} bytes; {by_copy:.1} us by a copy of {copy_gb_s:.0} GB/s; {by_peer}")
}

fn skip(why: &str) -> annulus_gpu::Result<()> {
    eprintln!("skipped: {why}");
    Ok(())
}
