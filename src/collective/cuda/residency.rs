//! Blocks of a device that kernels which wait for each other may take at a time, among all communicators of this process.
//!
//! CUDA runs kernels that are ready and fit; it promises nothing of two that do not fit together, also where each is one
//! cooperative grid. Two communicators could then each wait, on two devices, for the kernel that the other keeps out. So every
//! communicator sets its blocks aside as long as it lives, and none is made that would not fit beside the others: in
//! whatever order their kernels begin, all that are ready run, and the first in the order of issue finds its peers.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::cuda::Uuid;

/// By device.
static TAKEN: Mutex<Vec<(Uuid, u32)>> = Mutex::new(Vec::new());

fn lock() -> MutexGuard<'static, Vec<(Uuid, u32)>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks of a device, set aside until this is dropped.
pub(super) struct Blocks {
    device: Uuid,
    count: u32,
}

impl Blocks {
    pub(super) fn set_aside(device: Uuid, count: u32) -> Blocks {
        let taken = &mut *lock();
        match taken.iter_mut().find(|(other, _)| *other == device) {
            Some((_, blocks)) => *blocks += count,
            None => taken.push((device, count)),
        }
        Blocks { device, count }
    }

    /// Those that are set aside on `device`.
    pub(super) fn taken(device: Uuid) -> u32 {
        lock().iter().find(|(other, _)| *other == device).map_or(0, |(_, blocks)| *blocks)
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        if let Some((_, blocks)) = lock().iter_mut().find(|(other, _)| *other == self.device) {
            *blocks -= self.count;
        }
    }
}
