//! A small random number generator whose state goes into checkpoints.
//!
//! xoshiro256++ 1.0 (Blackman & Vigna 2019, <https://prng.di.unimi.it>), seeded through SplitMix64 as its authors
//! advise. Not for secrets.

use serde::{Deserialize, Serialize};

/// Random numbers for initial weights, sampling and dropout: same seed, same numbers, on every machine.
///
/// ```
/// use annulus::strategy::Rng;
/// let mut rng = Rng::new(7);
/// rng.next_u64();
/// let mut resumed: Rng = serde_json::from_str(&serde_json::to_string(&rng)?)?;
/// assert_eq!(resumed.next_u64(), rng.next_u64());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    state: [u64; 4],
}

/// One step of SplitMix64: a bijection that scatters every bit.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Rng {
    /// A generator of its own for each seed.
    pub fn new(seed: u64) -> Rng {
        let mut state = [0; 4];
        let mut word = seed;
        for slot in &mut state {
            *slot = mix(word);
            word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
        }
        Rng { state }
    }

    /// A generator for `stream` (a rank, an epoch) of a run seeded with `seed`.
    pub fn for_stream(seed: u64, stream: u64) -> Rng {
        Rng::new(mix(seed).wrapping_add(mix(stream ^ 0x5851_F42D_4C95_7F2D)))
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number in `0..bound`, each equally likely; 0 if `bound` is 0. Lemire 2019, "Fast Random Integer Generation in an
    /// Interval".
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        // The low half below `threshold` marks the few products that would make some results likelier.
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A number in `[0, 1)`, a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// A normally distributed number with mean 0 and deviation 1 (Box & Muller 1958).
    pub fn normal(&mut self) -> f64 {
        // 1 - uniform lies in (0, 1]: its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Puts `items` into random order, each order equally likely (Fisher & Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xoshiro_reference_values() {
        // First outputs of the authors' xoshiro256plusplus.c for the state {1, 2, 3, 4}.
        let mut rng = Rng { state: [1, 2, 3, 4] };
        let expected = [41943041, 58720359, 3588806011781223, 3591011842654386, 9228616714210784205];
        assert_eq!(expected.map(|_| rng.next_u64()), expected);
    }

    #[test]
    fn every_order_of_four_is_equally_likely() {
        let mut rng = Rng::new(1);
        let mut counts = std::collections::HashMap::new();
        let draws = 24_000;
        for _ in 0..draws {
            let mut items = [0, 1, 2, 3];
            rng.shuffle(&mut items);
            *counts.entry(items).or_insert(0_i64) += 1;
        }
        assert_eq!(counts.len(), 24);
        // Chi-square with 23 degrees of freedom: above 49.7 once in a thousand seeds, and this seed is fixed.
        let expected = draws as f64 / 24.0;
        let chi_square: f64 = counts.values().map(|n| (*n as f64 - expected).powi(2) / expected).sum();
        assert!(chi_square < 49.7, "{chi_square}");
    }

    #[test]
    fn moments_of_uniform_and_normal() {
        let mut rng = Rng::new(2);
        let n = 100_000;
        let (mut mean, mut normal_mean, mut normal_var) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let u = rng.uniform();
            assert!((0.0..1.0).contains(&u));
            mean += u / f64::from(n);
            let z = rng.normal();
            normal_mean += z / f64::from(n);
            normal_var += z * z / f64::from(n);
        }
        assert!((mean - 0.5).abs() < 0.005 && normal_mean.abs() < 0.02 && (normal_var - 1.0).abs() < 0.02);
    }
}
