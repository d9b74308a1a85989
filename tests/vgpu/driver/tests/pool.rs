//! `annulus::device::cuda::Pool` between threads.

#[path = "support/linger.rs"]
mod linger;
mod support;

use std::time::{Duration, Instant};

use annulus::device::cuda::{Driver, Kernels, Pinned, Pool, Priority, Stream};
use annulus::{DType, Error};
use linger::{linger, release};
use support::on_virtual_gpu;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

#[test]
fn a_block_that_there_is_does_not_wait_for_room_for_another() {
    let memory = [("ANNULUS_VGPU_MEMORY_BYTES", "8388608")];
    on_virtual_gpu("a_block_that_there_is_does_not_wait_for_room_for_another", &memory, || {
        let device = Driver::open().unwrap().device(0).unwrap();
        let [user, busy] = ["user", "busy"].map(|name| Stream::new(&device, name, Priority::Normal).unwrap());
        let (kernels, area) = (Kernels::load(&device).unwrap(), Pinned::zeroed(&device, 24).unwrap());
        let pool = Pool::new(&device);
        let take = |len_bytes| pool.take(DType::U8, len_bytes, &user, &user);
        let (large, small) = (take(4 * MIB).unwrap(), take(MIB).unwrap());
        linger(&kernels, &busy, area.address(), PATIENCE);
        drop(large);
        std::thread::scope(|scope| {
            // Frees what nobody holds, for which it waits for the kernel, in vain.
            let too_large = scope.spawn(|| take(8 * MIB));
            std::thread::sleep(Duration::from_secs(1));
            drop(small);
            let start = Instant::now();
            take(MIB).unwrap();
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            let refused = too_large.join().unwrap();
            assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        });
        release(&area);
        busy.synchronize(PATIENCE).unwrap();
    });
}
