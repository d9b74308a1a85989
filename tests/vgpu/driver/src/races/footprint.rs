//! The bytes that a kernel touches between two points at which it learns or tells something: marks, one a byte, because most
//! bytes are touched by many instructions and next to others.

use std::collections::HashMap;
use std::ops::Range;

use annulus_vgpu::Reach;

use crate::mapping::MemoryId;

const LINE_BYTES: u64 = 64;
const LINES: usize = 64;
const PAGE_BYTES: u64 = LINE_BYTES * LINES as u64;
/// Pages looked for without a hash: more than the tensors that a kernel goes through at a time.
const RECENT: usize = 64;

/// How bytes are touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Mode {
    pub writes: bool,
    pub reach: Reach,
}

type Key = (MemoryId, Mode, u64);

/// Which bytes of a page, and of each line the instruction that touched it first.
struct Marks {
    bytes: [u64; LINES],
    instructions: [u32; LINES],
}

/// Bytes in a row, touched in one way.
pub(crate) struct Run {
    pub memory: MemoryId,
    pub bytes: Range<u64>,
    pub mode: Mode,
    /// That touched the first of them.
    pub instruction: u32,
}

pub(crate) struct Footprint {
    pages: HashMap<Key, usize>,
    marks: Vec<Marks>,
    recent: [Option<(Key, usize)>; RECENT],
}

impl Footprint {
    pub fn new() -> Footprint {
        Footprint { pages: HashMap::new(), marks: Vec::new(), recent: [None; RECENT] }
    }

    pub fn touch(&mut self, memory: MemoryId, offset: u64, len_bytes: u64, mode: Mode, instruction: u32) {
        let (mut at, end) = (offset, offset + len_bytes);
        while at < end {
            let line_end = (at / LINE_BYTES + 1) * LINE_BYTES;
            let len = end.min(line_end) - at;
            let mask = (u64::MAX >> (LINE_BYTES - len)) << (at % LINE_BYTES);
            let marks = self.page((memory, mode, at / PAGE_BYTES));
            let line = (at % PAGE_BYTES / LINE_BYTES) as usize;
            if marks.bytes[line] == 0 {
                marks.instructions[line] = instruction;
            }
            marks.bytes[line] |= mask;
            at += len;
        }
    }

    fn page(&mut self, key: Key) -> &mut Marks {
        let place = (key.2 as usize ^ (key.0.1 as usize) << 3 ^ usize::from(key.1.writes)) % RECENT;
        let number = match self.recent[place] {
            Some((recent, number)) if recent == key => number,
            _ => {
                let new = self.marks.len();
                let number = *self.pages.entry(key).or_insert(new);
                if number == new {
                    self.marks.push(Marks { bytes: [0; LINES], instructions: [0; LINES] });
                }
                self.recent[place] = Some((key, number));
                number
            }
        };
        &mut self.marks[number]
    }

    /// The instruction that touched the line of a byte first.
    pub fn instruction(&self, memory: MemoryId, mode: Mode, offset: u64) -> Option<u32> {
        let number = self.pages.get(&(memory, mode, offset / PAGE_BYTES))?;
        Some(self.marks[*number].instructions[(offset % PAGE_BYTES / LINE_BYTES) as usize])
    }

    /// All that was touched, reads of a memory before its writes.
    pub fn runs(&self) -> Vec<Run> {
        let mut pages: Vec<(&Key, &usize)> = self.pages.iter().collect();
        pages.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for ((memory, mode, page), number) in pages {
            let Marks { bytes, instructions } = &self.marks[*number];
            for (line, (bits, instruction)) in bytes.iter().zip(instructions).enumerate() {
                let base = page * PAGE_BYTES + line as u64 * LINE_BYTES;
                for Range { start, end } in ones(*bits) {
                    let (start, end) = (base + start, base + end);
                    match runs.last_mut() {
                        Some(last) if last.memory == *memory && last.mode == *mode && last.bytes.end == start => {
                            last.bytes.end = end;
                        }
                        _ => runs.push(Run {
                            memory: *memory,
                            bytes: start..end,
                            mode: *mode,
                            instruction: *instruction,
                        }),
                    }
                }
            }
        }
        runs
    }

    pub fn clear(&mut self) {
        self.pages.clear();
        self.marks.clear();
        self.recent = [None; RECENT];
    }
}

/// The runs of ones in a word.
fn ones(mut bits: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let zeros = u64::from(bits.trailing_zeros());
        if zeros == 64 {
            return None;
        }
        let start = at + zeros;
        let len = u64::from((bits >> zeros).trailing_ones());
        at = start + len;
        bits = bits.checked_shr((zeros + len) as u32).unwrap_or(0);
        Some(start..at)
    })
}
