//! The system's allocator, which counts what is allocated, by any thread of the program, while it is asked to. Memory of a library that
//! the program opens is that library's own affair.

#![allow(dead_code, reason = "every test uses a part of it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::together::Together;

const ATTEMPTS: usize = 4;

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LARGEST_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Counts from 0 on.
pub fn start() {
    ALLOCATIONS.store(0, Ordering::SeqCst);
    LARGEST_BYTES.store(0, Ordering::SeqCst);
    IS_COUNTING.store(true, Ordering::SeqCst);
}

/// Counts no more.
pub fn stop() {
    IS_COUNTING.store(false, Ordering::SeqCst);
}

/// Allocations and reallocations that were counted.
pub fn allocations() -> usize {
    ALLOCATIONS.load(Ordering::SeqCst)
}

/// The largest that was allocated meanwhile.
pub fn largest_bytes() -> usize {
    LARGEST_BYTES.load(Ordering::SeqCst)
}

/// What all of `together` allocate while each runs `steps`. What a thread makes when it first waits, perhaps only now on a busy
/// machine, it makes once: so they run again until it is nothing, a few times.
pub fn allocations_of(together: &Together, mut steps: impl FnMut()) -> usize {
    for attempt in 1.. {
        if together.wait() {
            start();
        }
        together.wait();
        steps();
        together.wait();
        stop();
        together.wait();
        if allocations() == 0 || attempt == ATTEMPTS {
            break;
        }
        together.wait();
    }
    allocations()
}

struct Counting;

impl Counting {
    fn count(size_bytes: usize) {
        if IS_COUNTING.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
            LARGEST_BYTES.fetch_max(size_bytes, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Counting::count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size_bytes: usize) -> *mut u8 {
        Counting::count(size_bytes);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size_bytes) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
