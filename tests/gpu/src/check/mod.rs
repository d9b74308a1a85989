//! Every front end of `annulus::ops::cuda` against `annulus::ops` on the host, bit for bit.

pub mod cast;
pub mod long;
pub mod norm;
pub mod update;

use std::time::Duration;

use annulus::DType;

use crate::part::Scale;
use crate::tensor::Values;

/// Lengths: none, one, odd, primes, around a run of 2,048, around a chunk of 32,768.
fn lengths(scale: Scale) -> &'static [usize] {
    const ALL: [usize; 13] = [0, 1, 2, 31, 129, 1021, 2047, 2048, 4099, 32_768, 65_569, 262_147, 3_000_017];
    match scale {
        Scale::Short => &[0, 1, 31, 1021, 2048],
        Scale::Quick => &ALL[..12],
        Scale::Full => &ALL,
    }
}

/// Distances from 16 bytes at which tensors begin: every one there is, or one that is not aligned.
fn shifts(scale: Scale, dtype: DType) -> impl Iterator<Item = usize> {
    let most = 16 / dtype.size_bytes();
    (0..most).filter(move |shift| scale != Scale::Short || *shift == 1)
}

/// What each comparison may take: all of a part together less than [`Part::limit`](crate::part::Part::limit).
fn limit(scale: Scale) -> Duration {
    Duration::from_secs(match scale {
        Scale::Short => 5,
        Scale::Quick => 3,
        Scale::Full => 6,
    })
}

const VALUES: [Values; 2] = [Values::Ordinary, Values::Wide];

/// Where a value that is no number can hide in a tensor of this length.
fn hiding_places(len_elems: usize) -> Vec<usize> {
    let mut places: Vec<usize> = [0, 1, 127, 2047, 2048].into_iter().filter(|at| *at < len_elems).collect();
    places.extend(len_elems.checked_sub(1));
    places.sort_unstable();
    places.dedup();
    places
}
