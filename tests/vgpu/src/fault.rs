//! What can be wrong with a module, a launch, or a run.

use std::fmt;

/// Where a thread was: line of the PTX, line of the source if the PTX has `.loc`, kernel, rank, block and thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Kernel name.
    pub kernel: String,
    /// Line of the PTX text, from 1.
    pub ptx_line: u32,
    /// `file:line` of the CUDA source, from `.loc`.
    pub source: Option<String>,
    /// Index of the launch in the run.
    pub launch: usize,
    /// Block index.
    pub block: [u32; 3],
    /// Thread in the block, counted x first.
    pub thread: u32,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Site { kernel, ptx_line, source, launch, block: [x, y, z], thread } = self;
        write!(f, "{kernel}, PTX line {ptx_line}")?;
        if let Some(source) = source {
            write!(f, " ({source})")?;
        }
        write!(f, ", launch {launch}, block {x},{y},{z}, thread {thread}")
    }
}

/// One way in which a module cannot be read or a run is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The text is outside the subset of PTX that is understood.
    #[error("PTX line {line}: {what}")]
    Parse {
        /// Line of the PTX text, from 1.
        line: u32,
        /// What is not understood, quoted.
        what: String,
    },
    /// The module has no kernel of this name.
    #[error("no kernel `{name}` in the module, which has {present}")]
    NoKernel {
        /// Asked for.
        name: String,
        /// The names there are.
        present: String,
    },
    /// A launch that a driver would refuse.
    #[error("launch of {kernel}: {what}")]
    Launch {
        /// Kernel name.
        kernel: String,
        /// What is wrong with it.
        what: String,
    },
    /// An access outside every allocation, or across the end of one.
    #[error(
        "{site}: access to {len_bytes} bytes at {address:#x} in {space} memory is out of bounds; nearest: {nearest}"
    )]
    OutOfBounds {
        /// Who.
        site: Box<Site>,
        /// First byte.
        address: u64,
        /// Bytes.
        len_bytes: usize,
        /// State space.
        space: &'static str,
        /// The allocation at or below the address.
        nearest: String,
    },
    /// An address that is no multiple of the access's size.
    #[error("{site}: access to {len_bytes} bytes at {address:#x} is misaligned")]
    Misaligned {
        /// Who.
        site: Box<Site>,
        /// First byte.
        address: u64,
        /// Bytes.
        len_bytes: usize,
    },
    /// An operation whose result PTX does not define.
    #[error("{site}: {what}")]
    Undefined {
        /// Who.
        site: Box<Site>,
        /// Which.
        what: &'static str,
    },
    /// Two conflicting accesses that nothing orders and that are not morally strong.
    #[error("data race at {address:#x}: {what}; {site} and, before it, {earlier}")]
    Race {
        /// The later access.
        site: Box<Site>,
        /// The earlier access.
        earlier: Box<Site>,
        /// First byte of the later access.
        address: u64,
        /// Which kinds of access.
        what: &'static str,
    },
    /// Threads wait and none can go on.
    #[error("deadlock: {waiting} threads wait for ever, the first at {site}")]
    Deadlock {
        /// The first thread that waits.
        site: Box<Site>,
        /// How many.
        waiting: usize,
    },
    /// The run did not end within its budget: a wait that nothing ends.
    #[error("no end after {instructions} instructions; a thread is at {site}")]
    Hang {
        /// The budget.
        instructions: u64,
        /// One of the threads that still run.
        site: Box<Site>,
    },
}
