//! What the loops that move whole vectors must be: a loop is hot if it loads or stores 16 bytes at a time, and nothing
//! narrower but what its kernel is allowed. So a hot loop that gets a narrow access stops being one, and is then missing.
//!
//! Loops with wide and narrow accesses are not hot: they take what lies off the 16 bytes and both ends of a chunk.

use crate::KERNELS;
use crate::flow::{Access, Instruction, loops};

/// Loads and stores of 16 bytes that a loop has at least.
pub type Wide = (usize, usize);

/// The hot loops of the code of a kernel, as the accesses of each.
pub fn hot_loops(code: &[Instruction], narrower: &[Access]) -> Vec<Vec<Access>> {
    let accesses = |own: Vec<usize>| own.iter().filter_map(|&at| code[at].access).collect::<Vec<_>>();
    let is_hot = |accesses: &Vec<Access>| {
        let is_allowed = |access: &Access| access.bytes >= 16 || narrower.contains(access);
        accesses.iter().any(|access| access.bytes >= 16) && accesses.iter().all(is_allowed)
    };
    loops(code).into_iter().map(accesses).filter(is_hot).collect()
}

pub fn count(accesses: &[Access], is_store: bool, least_bytes: u32) -> usize {
    accesses.iter().filter(|access| access.is_store == is_store && access.bytes >= least_bytes).count()
}

/// Whether the code of `kernel` has a hot loop of its own for each one that is wanted; else what is missing.
pub fn check(kernel: &str, code: &[Instruction]) -> Result<(), String> {
    let known = KERNELS.iter().find(|known| known.name == kernel).ok_or("not a kernel")?;
    let wide = |accesses: &Vec<Access>| (count(accesses, false, 16), count(accesses, true, 16));
    let present: Vec<Wide> = hot_loops(code, known.narrower).iter().map(wide).collect();
    // The most demanding first, and for each the least loop that will do.
    let mut wanted = known.hot.to_vec();
    wanted.sort_by_key(|(loads, stores)| std::cmp::Reverse(loads + stores));
    let mut left = present.clone();
    for (loads, stores) in wanted {
        let fit = (0..left.len()).filter(|&at| left[at].0 >= loads && left[at].1 >= stores);
        let best = fit.min_by_key(|&at| left[at].0 + left[at].1);
        let missing =
            || format!("{kernel} has no hot loop of {loads} loads and {stores} stores of 16 bytes; it has {present:?}");
        left.swap_remove(best.ok_or_else(missing)?);
    }
    Ok(())
}
