//! What kernels reach outside their registers and their block's memory.

/// How an access is made that an [`Outside`] is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// Number of the instruction in the kernel, for [`Kernel::place`](crate::Kernel::place).
    pub instruction: usize,
    /// Among which threads it is strong, and orders what it orders.
    pub reach: Reach,
    /// What it reads from was released to it.
    pub acquires: bool,
    /// All that its thread has done and observed is released to who acquires it.
    pub releases: bool,
}

/// Who an access is strong for, of threads beyond the block (PTX ISA 9.0, 8.5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reach {
    /// Nobody: it is weak, or made for its own block.
    #[default]
    Nobody,
    /// The device.
    Device,
    /// Everyone.
    System,
}

/// Global memory and time, as the threads of a run find them.
///
/// [`Memory`](crate::Memory) is the one for runs that own everything they touch. A driver over the interpreter has another:
/// mappings that the host, other streams and other processes reach at the same time.
pub trait Outside {
    /// Whether the `len_bytes` bytes at `address` lie in one allocation.
    fn contains(&self, address: u64, len_bytes: usize) -> bool;

    /// Reads `into.len()` bytes at `address`; false, and nothing is read, if they do not lie in one allocation. Up to 8
    /// bytes that are aligned to their number come from one store.
    fn load(&self, address: u64, into: &mut [u8]) -> bool;

    /// Writes `bytes` at `address`; false, and nothing is written, if they do not lie in one allocation. Up to 8 bytes that
    /// are aligned to their number are seen all at once.
    fn store(&mut self, address: u64, bytes: &[u8]) -> bool;

    /// Replaces the little-endian value of 2, 4 or 8 bytes at `address` by what `change` makes of it, with no store in
    /// between, and returns the old one; `None` as for [`store`](Outside::store). `change` may be called again if others
    /// store at the same time.
    fn update(&mut self, address: u64, len_bytes: usize, change: &dyn Fn(u64) -> u64) -> Option<u64>;

    /// Says how the [`load`](Outside::load), [`store`](Outside::store) or [`update`](Outside::update) is made that comes next:
    /// for an outside that looks for races between runs.
    fn announce(&self, manner: Manner) {
        let _ = manner;
    }

    /// The allocation at or below `address`, for messages.
    fn nearest(&self, address: u64) -> String;

    /// What `%globaltimer` and the clocks show, in nanoseconds; `None` for the number of instructions executed so far, which
    /// makes runs repeatable.
    fn time_ns(&self) -> Option<u64> {
        None
    }

    /// A thread executes `nanosleep` or reads the time: a chance for others, outside the run, to go on.
    fn rest(&self) {}
}
