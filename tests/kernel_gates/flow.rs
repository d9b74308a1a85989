//! The loops of a kernel, from the jumps between its instructions: the same for PTX and machine code.
//!
//! ```text
//! header:  ..            a jump back to an instruction that every way to the jump leads through closes a loop:
//!          ..            all instructions from which the jump is reached without passing the header
//!   inner: ..            a loop in a loop has its own instructions; they are not those of the outer one
//!          jump inner
//!          jump header
//! ```
//! Source: Cooper, Harvey & Kennedy, "A Simple, Fast Dominance Algorithm" (2001); natural loops as in Muchnick, "Advanced
//! Compiler Design and Implementation" (1997), 7.4.

use std::collections::BTreeMap;

/// A load or store of global memory, or of an address that may be global.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub is_store: bool,
    pub bytes: u32,
}

impl Access {
    pub const fn load(bytes: u32) -> Access {
        Access { is_store: false, bytes }
    }

    pub const fn store(bytes: u32) -> Access {
        Access { is_store: true, bytes }
    }
}

#[derive(Debug, Default)]
pub struct Instruction {
    pub access: Option<Access>,
    /// Indices of those that may come after it.
    pub next: Vec<usize>,
}

/// The instructions that belong to each loop and to no loop in it.
pub fn loops(code: &[Instruction]) -> Vec<Vec<usize>> {
    let order = reverse_postorder(code);
    let mut rank = vec![usize::MAX; code.len()];
    order.iter().enumerate().for_each(|(position, &at)| rank[at] = position);
    let mut before = vec![Vec::new(); code.len()];
    order.iter().for_each(|&at| code[at].next.iter().for_each(|&next| before[next].push(at)));
    let dominator = dominators(&order, &rank, &before);

    let mut members: BTreeMap<usize, Vec<bool>> = BTreeMap::new();
    for &jump in &order {
        for &header in code[jump].next.iter().filter(|&&next| rank[next] <= rank[jump]) {
            assert!(dominates(header, jump, &dominator), "instruction {jump} jumps back into the middle of a loop");
            let body = members.entry(header).or_insert_with(|| vec![false; code.len()]);
            body[header] = true;
            let mut found = vec![jump];
            while let Some(at) = found.pop() {
                if !std::mem::replace(&mut body[at], true) {
                    found.extend(&before[at]);
                }
            }
        }
    }
    let own = |(header, body): (&usize, &Vec<bool>)| {
        let inner: Vec<_> = members.iter().filter(|(other, _)| *other != header && body[**other]).collect();
        let is_own = |at: &usize| body[*at] && !inner.iter().any(|(_, inner)| inner[*at]);
        (0..code.len()).filter(is_own).collect()
    };
    members.iter().map(own).collect()
}

/// The instructions that are reached from the first one; each before those that it leads to, loops aside.
fn reverse_postorder(code: &[Instruction]) -> Vec<usize> {
    let mut order = Vec::new();
    let mut seen = vec![false; code.len()];
    let mut path = vec![(0, 0)];
    seen[0] = true;
    while let Some((at, taken)) = path.last_mut() {
        if let Some(&next) = code[*at].next.get(*taken) {
            *taken += 1;
            if !std::mem::replace(&mut seen[next], true) {
                path.push((next, 0));
            }
        } else {
            order.push(*at);
            path.pop();
        }
    }
    order.reverse();
    order
}

/// For each instruction the last one that every way to it leads through; the first one's is itself.
fn dominators(order: &[usize], rank: &[usize], before: &[Vec<usize>]) -> Vec<usize> {
    const UNKNOWN: usize = usize::MAX;
    let mut dominator = vec![UNKNOWN; rank.len()];
    dominator[order[0]] = order[0];
    let mut changes = true;
    while changes {
        changes = false;
        for &at in &order[1..] {
            let known = before[at].iter().copied().filter(|&before| dominator[before] != UNKNOWN);
            let common = known.reduce(|mut a, mut b| {
                while a != b {
                    if rank[a] > rank[b] {
                        a = dominator[a];
                    } else {
                        b = dominator[b];
                    }
                }
                a
            });
            let common = common.expect("one before it comes first in this order");
            changes |= std::mem::replace(&mut dominator[at], common) != common;
        }
    }
    dominator
}

fn dominates(above: usize, mut at: usize, dominator: &[usize]) -> bool {
    while at != above && dominator[at] != at {
        at = dominator[at];
    }
    at == above
}
