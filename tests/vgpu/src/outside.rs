//! What kernels reach outside their registers and their block's memory.

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
