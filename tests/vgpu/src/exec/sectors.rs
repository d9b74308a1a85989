//! Memory transactions: the sectors of 32 bytes that a warp's accesses touch.
//!
//! "The concurrent accesses of the threads of a warp will coalesce into a number of transactions equal to the number of 32-byte
//! transactions necessary to service all of the threads of the warp" (CUDA C++ Best Practices Guide, 10.2.1). Threads of a
//! warp do not run together here, so accesses of a warp are one if the instruction is the same and each thread comes to it
//! for the same time. Where the ways of a warp's threads part, that is a guess.

use std::collections::HashMap;

use super::WARP_THREADS;

const SECTOR_BYTES: u64 = 32;

/// An instruction of a warp, and for which time its threads execute it.
type Access = (usize, usize, u32);

#[derive(Default)]
pub(super) struct Sectors {
    /// How often a thread has come to an instruction.
    visits: HashMap<(usize, usize), u32>,
    /// What the threads that were there have touched, and how many they were.
    open: HashMap<Access, (Vec<u64>, usize)>,
}

impl Sectors {
    /// The sectors that this access adds to those of its warp. `lane`: the thread's place in the block.
    pub(super) fn touch(
        &mut self,
        thread: usize,
        lane: usize,
        instruction: usize,
        address: u64,
        len_bytes: usize,
    ) -> u64 {
        let visit = self.visits.entry((thread, instruction)).or_default();
        *visit += 1;
        let access = (thread - lane % WARP_THREADS, instruction, *visit);
        let (sectors, len_threads) = self.open.entry(access).or_default();
        let touched = address / SECTOR_BYTES..=(address + len_bytes as u64 - 1) / SECTOR_BYTES;
        let before = sectors.len();
        for sector in touched {
            if !sectors.contains(&sector) {
                sectors.push(sector);
            }
        }
        let new = sectors.len() - before;
        *len_threads += 1;
        if *len_threads == WARP_THREADS {
            self.open.remove(&access);
        }
        new as u64
    }
}
