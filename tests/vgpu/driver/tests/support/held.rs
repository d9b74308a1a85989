//! Streams that do not get on: each waits for a word of the host.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::sync::atomic::{AtomicU32, Ordering};

use annulus::device::cuda::{Device, Pinned};
use cudarc::driver::{result, sys};

use crate::raw;

/// The streams of one strategy, as the driver names them.
#[derive(Debug)]
pub struct Streams {
    pub compute: u64,
    pub copies: u64,
    pub communication: u64,
}

impl Streams {
    /// Of the one that is set up next, on device 0 and by no more than one thread: it makes them first of all, in this order,
    /// and the virtual driver numbers streams as they are made. What waits for which of them tells that it is so.
    pub fn of_the_next_strategy() -> Streams {
        const STRIDE: u64 = 0x10;
        raw::context();
        let last = result::stream::create(raw::NON_BLOCKING).unwrap() as u64;
        Streams { compute: last + STRIDE, copies: last + 2 * STRIDE, communication: last + 3 * STRIDE }
    }
}

/// What holds any number of streams until it lets go of all.
pub struct Hold(Pinned);

impl Hold {
    pub fn new(device: &Device) -> Hold {
        Hold(Pinned::zeroed(device, size_of::<u32>()).unwrap())
    }

    /// What is enqueued on the stream from now on does not run.
    pub fn stop(&self, stream: u64) {
        let until = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: a stream that lives, or else the virtual driver refuses; the word outlives the wait in every test.
        unsafe { sys::cuStreamWaitValue32_v2(stream as sys::CUstream, self.0.address(), 1, until) }.result().unwrap();
    }

    pub fn let_go(&self) {
        // SAFETY: the only word; driver and host access it by atomics.
        let word = unsafe { AtomicU32::from_ptr(self.0.as_ptr().as_ptr().cast()) };
        word.store(1, Ordering::Release);
    }
}
