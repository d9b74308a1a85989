//! A barrier of a test's own among ranks that are threads: not the library's, which is what is tested, and not the standard
//! library's, at which ranks would wait for ever for one that has panicked.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// No rank of a test is later.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where `size` threads meet, any number of times.
pub struct Together {
    size: usize,
    arrived: Mutex<usize>,
    all: Condvar,
}

impl Together {
    pub fn new(size: u32) -> Together {
        Together { size: size as usize, arrived: Mutex::new(0), all: Condvar::new() }
    }

    /// Waits for all. True on the one that came last.
    pub fn wait(&self) -> bool {
        let mut arrived = self.arrived.lock().expect("no rank panics with the lock");
        *arrived += 1;
        let meeting_ends = arrived.div_ceil(self.size) * self.size;
        if *arrived == meeting_ends {
            self.all.notify_all();
            return true;
        }
        let absent = |arrived: &mut usize| *arrived < meeting_ends;
        let (arrived, result) = self.all.wait_timeout_while(arrived, PATIENCE, absent).expect("as above");
        drop(arrived); // a panic with the lock would hide the first one
        assert!(!result.timed_out(), "a rank has not come for {PATIENCE:?}: has it panicked?");
        false
    }
}
