//! Who has touched a memory last: spans of bytes that the same accesses have touched.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use annulus_vgpu::Reach;

use super::Item;
use super::clock::{Clock, Strand};
use super::footprint::Mode;

/// An access, as those that come later see it.
#[derive(Clone)]
pub(crate) struct Past {
    pub item: Arc<Item>,
    pub strand: Strand,
    pub step: u32,
    pub reach: Reach,
    pub instruction: u32,
}

impl Past {
    fn is_known(&self, clock: &Clock) -> bool {
        clock.knows(self.strand, self.step)
    }

    fn is_like(&self, other: &Past) -> bool {
        (self.strand, self.step, self.reach) == (other.strand, other.step, other.reach)
    }

    /// Both are strong, and each one's scope includes the other's thread: then they are no race (PTX ISA 9.0, 8.7).
    fn is_morally_strong_with(&self, other: &Past) -> bool {
        let needed = if self.item.device == other.item.device { Reach::Device } else { Reach::System };
        self.reach.min(other.reach) >= needed
    }
}

#[derive(Clone)]
struct Span {
    end: u64,
    writes: Vec<Past>,
    reads: Vec<Past>,
}

impl Span {
    fn is_like(&self, other: &Span) -> bool {
        let same = |a: &[Past], b: &[Past]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.is_like(b));
        same(&self.writes, &other.writes) && same(&self.reads, &other.reads)
    }

    /// Notes an access. An earlier one that it is ordered behind need not be remembered: whoever is ordered behind this one is
    /// behind that one, too. Not if a strong one may come beside this one, that is strong enough for it and not for the other.
    fn add(&mut self, new: &Past, writes: bool, clock: &Clock) {
        let is_wide = |old: &Past| match old.reach {
            Reach::System => true,
            reach => reach >= new.reach && old.item.device == new.item.device,
        };
        let is_covered = |old: &Past| old.is_known(clock) && (new.reach == Reach::Nobody || is_wide(old));
        self.reads.retain(|old| !is_covered(old));
        if writes {
            self.writes.retain(|old| !is_covered(old));
            self.writes.push(new.clone());
        } else {
            self.reads.push(new.clone());
        }
    }
}

/// A race: where, and the earlier access.
pub(crate) struct Conflict {
    pub offset: u64,
    pub earlier: Past,
    pub earlier_writes: bool,
}

#[derive(Default)]
pub(crate) struct Shadow {
    spans: BTreeMap<u64, Span>,
}

impl Shadow {
    /// Notes an access to `bytes` by somebody whose clock is `clock`, and tells with whom it races.
    pub fn touch(&mut self, bytes: Range<u64>, mode: Mode, new: &Past, clock: &Clock) -> Option<Conflict> {
        let mut conflict = None;
        self.split(bytes.start);
        self.split(bytes.end);
        let starts: Vec<u64> = self.spans.range(bytes.clone()).map(|(start, _)| *start).collect();
        let mut after: Vec<(u64, Span)> = Vec::with_capacity(starts.len());
        let mut put = |start: u64, mut span: Span| {
            span.add(new, mode.writes, clock);
            match after.last_mut() {
                Some((_, last)) if last.end == start && last.is_like(&span) => last.end = span.end,
                _ => after.push((start, span)),
            }
        };
        let mut at = bytes.start;
        for start in starts {
            let Some(span) = self.spans.remove(&start) else { continue };
            let reads = if mode.writes { span.reads.as_slice() } else { &[] };
            for (earlier, earlier_writes) in
                span.writes.iter().map(|w| (w, true)).chain(reads.iter().map(|r| (r, false)))
            {
                if conflict.is_none() && !earlier.is_known(clock) && !earlier.is_morally_strong_with(new) {
                    conflict = Some(Conflict { offset: start, earlier: earlier.clone(), earlier_writes });
                }
            }
            if at < start {
                put(at, Span { end: start, writes: Vec::new(), reads: Vec::new() });
            }
            at = span.end;
            put(start, span);
        }
        if at < bytes.end {
            put(at, Span { end: bytes.end, writes: Vec::new(), reads: Vec::new() });
        }
        self.spans.extend(after);
        conflict
    }

    /// Makes a span begin at `offset`, if one goes across it.
    fn split(&mut self, offset: u64) {
        let Some((start, span)) = self.spans.range_mut(..offset).next_back() else { return };
        if *start < offset && span.end > offset {
            let behind = span.clone();
            span.end = offset;
            self.spans.insert(offset, behind);
        }
    }
}
