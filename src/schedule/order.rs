//! Which rank stands beside which on a ring.

/// Rings of up to so many ranks are compared one by one: 5040 of them at most.
const EXHAUSTIVE: usize = 8;

/// The order in which `ranks` ranks stand on a ring so that its worst link is as good as can be and, among such rings, the
/// sum of all links. `closeness(a, b)` is larger where more bytes get through; of the two directions the worse counts.
///
/// It is advice for who numbers the ranks, as `annulus info` gives it. A communicator's own ring is always `0, 1, 2, ..`: a ring
/// adds in the order in which the ranks stand, so the bits of a sum would depend on the machine, and would not be those of the
/// host.
///
/// The first is rank 0, and among equals the order is the first in the dictionary, so `0, 1, 2, ..` where all links are
/// alike. It depends on nothing but the arguments: every rank that knows all links finds the same. Exact up to 8 ranks;
/// above that never worse than `0, 1, 2, ..`, and better where reversing parts of the ring helps (2-opt: Croes, "A method
/// for solving traveling-salesman problems", Operations Research 6, 1958).
///
/// Costs up to 5040 rings, or some passes over `ranks^2 / 2` reversals, and memory: call it at setup.
pub fn ring_order(ranks: usize, closeness: impl Fn(usize, usize) -> u32) -> Vec<usize> {
    let link = |one: usize, other: usize| closeness(one, other).min(closeness(other, one));
    let natural: Vec<usize> = (0..ranks).collect();
    if ranks <= EXHAUSTIVE { exhaustive(natural, &link) } else { reversals(natural, &link) }
}

/// The worst link, then the sum: compared in this order.
fn quality(ring: &[usize], link: &impl Fn(usize, usize) -> u32) -> (u32, u64) {
    let links = || ring.iter().zip(ring.iter().cycle().skip(1)).map(|(one, other)| link(*one, *other));
    (links().min().unwrap_or(0), links().map(u64::from).sum())
}

fn exhaustive(natural: Vec<usize>, link: &impl Fn(usize, usize) -> u32) -> Vec<usize> {
    let (mut best, mut ring) = (natural.clone(), natural);
    let mut best_quality = quality(&best, link);
    while next_permutation(ring.get_mut(1..).unwrap_or_default()) {
        let found = quality(&ring, link);
        if found > best_quality {
            (best_quality, best) = (found, ring.clone());
        }
    }
    best
}

/// The next in the dictionary; false after the last.
fn next_permutation(items: &mut [usize]) -> bool {
    let Some(rise) = items.windows(2).rposition(|pair| pair[0] < pair[1]) else { return false };
    // There is one: the item after `rise`, at least.
    let larger = items.iter().rposition(|item| *item > items[rise]).unwrap_or(rise + 1);
    items.swap(rise, larger);
    items[rise + 1..].reverse();
    true
}

fn reversals(mut ring: Vec<usize>, link: &impl Fn(usize, usize) -> u32) -> Vec<usize> {
    let mut best = quality(&ring, link);
    loop {
        let before = best;
        for from in 1..ring.len() {
            for to in from + 1..ring.len() {
                ring[from..=to].reverse();
                let found = quality(&ring, link);
                if found > best {
                    best = found;
                } else {
                    ring[from..=to].reverse();
                }
            }
        }
        // Each pass but the last gains, and there are finitely many qualities.
        if best == before {
            return ring;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order<const N: usize>(links: [[u32; N]; N]) -> Vec<usize> {
        ring_order(N, |one, other| links[one][other])
    }

    #[test]
    fn equal_links_keep_the_natural_order() {
        for ranks in [0, 1, 2, 3, 5, 8, 9, 64] {
            assert_eq!(ring_order(ranks, |_, _| 7), (0..ranks).collect::<Vec<_>>(), "{ranks}");
        }
    }

    #[test]
    fn pairs_of_close_ranks_stand_together() {
        // 0-2 and 1-3 share a switch each: the natural order would leave it at every step.
        assert_eq!(order([[0, 1, 5, 1], [1, 0, 1, 5], [5, 1, 0, 1], [1, 5, 1, 0]]), [0, 1, 3, 2]);
    }

    #[test]
    fn the_worst_link_counts_before_the_sum() {
        // Through the link of 100 one has to take that of 1; the ring without both has 2 everywhere.
        assert_eq!(order([[0, 100, 2, 2], [100, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]), [0, 2, 1, 3]);
        // Of two rings with the same worst link, the sum decides.
        assert_eq!(order([[0, 2, 2, 2], [2, 0, 2, 9], [2, 2, 0, 2], [2, 9, 2, 0]]), [0, 1, 3, 2]);
    }

    #[test]
    fn the_worse_direction_counts() {
        let links = [[0, 9, 9, 5], [1, 0, 9, 9], [9, 9, 0, 9], [5, 9, 9, 0]];
        assert_eq!(order(links), [0, 2, 1, 3], "one direction of 0-1 has 1");
    }

    /// A cube mesh of eight GPUs with NVLinks of one and two lanes, as in the DGX-1.
    const CUBE: [[u32; 8]; 8] = [
        [0, 1, 1, 2, 2, 0, 0, 0],
        [1, 0, 2, 1, 0, 2, 0, 0],
        [1, 2, 0, 2, 0, 0, 1, 0],
        [2, 1, 2, 0, 0, 0, 0, 1],
        [2, 0, 0, 0, 0, 1, 1, 2],
        [0, 2, 0, 0, 1, 0, 2, 1],
        [0, 0, 1, 0, 1, 2, 0, 2],
        [0, 0, 0, 1, 2, 1, 2, 0],
    ];

    #[test]
    fn a_cube_mesh_has_a_ring_of_double_links() {
        let ring = order(CUBE);
        assert_eq!(ring, [0, 3, 2, 1, 5, 6, 7, 4]);
        assert_eq!(quality(&ring, &|one, other| CUBE[one][other]), (2, 16));
    }

    #[test]
    fn many_ranks_on_few_devices_are_grouped() {
        // Rank r uses device r % 4: reversing parts of the ring must bring each device's ranks together.
        let same_device = |one: usize, other: usize| if one % 4 == other % 4 { 70 } else { 3 };
        let ring = ring_order(16, same_device);
        let (worst, sum) = quality(&ring, &same_device);
        assert_eq!((worst, sum), (3, 12 * 70 + 4 * 3), "{ring:?}");
        assert_eq!(ring[0], 0);
        let mut sorted = ring.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..16).collect::<Vec<_>>());
        assert_eq!(ring, ring_order(16, same_device));
    }
}
