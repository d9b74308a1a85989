//! Running launches: threads, blocks, and the scheduler that interleaves them.

mod access;
mod arith;
mod convert;
mod sectors;
mod step;
mod warp;

use crate::fault::{Fault, Site};
use crate::outside::Outside;
use crate::ptx::Kernel;
use crate::race::Detector;
use sectors::Sectors;

/// Threads of a warp.
const WARP_THREADS: usize = 32;
/// Instructions that a thread may run between two choices of the scheduler, unless it must wait.
const LONGEST_BURST: u64 = 32;
/// What registers and shared memory hold before they are written.
const UNWRITTEN: u8 = 0xd5;

/// The bytes of a kernel's arguments, each at its natural alignment.
#[derive(Debug, Clone, Default)]
pub struct Arguments(Vec<u8>);

impl Arguments {
    /// No argument.
    pub fn new() -> Arguments {
        Arguments::default()
    }

    /// Appends little-endian bytes at the next multiple of their number (a power of two).
    pub fn push<const N: usize>(mut self, bytes: [u8; N]) -> Arguments {
        self.0.resize(self.0.len().next_multiple_of(N.max(1)), 0);
        self.0.extend(bytes);
        self
    }

    /// The bytes of all parameters as the kernel's parameter space holds them.
    pub fn from_bytes(bytes: Vec<u8>) -> Arguments {
        Arguments(bytes)
    }

    /// Appends an address or a 64-bit length.
    pub fn u64(self, value: u64) -> Arguments {
        self.push(value.to_le_bytes())
    }

    /// Appends a 32-bit integer.
    pub fn u32(self, value: u32) -> Arguments {
        self.push(value.to_le_bytes())
    }

    /// Appends an f32.
    pub fn f32(self, value: f32) -> Arguments {
        self.push(value.to_le_bytes())
    }
}

/// One kernel launch on one virtual device.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// What to run.
    pub kernel: &'a Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads in a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    /// The arguments' bytes.
    pub arguments: Arguments,
    /// The device; threads on different devices need `.sys` to be ordered.
    pub device: usize,
}

impl<'a> Launch<'a> {
    /// A one-dimensional launch on device 0 without dynamic shared memory.
    pub fn new(kernel: &'a Kernel, blocks: u32, threads: u32, arguments: Arguments) -> Launch<'a> {
        Launch { kernel, grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0, arguments, device: 0 }
    }
}

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Chooses the interleaving; the same seed gives the same run.
    pub seed: u64,
    /// Whether to look for races.
    pub detect_races: bool,
    /// After so many instructions of all threads together the run counts as hung.
    pub budget_instructions: u64,
    /// Blocks of one launch that run at the same time; the others wait for their end, as on a small device.
    pub resident_blocks: usize,
    /// Whether to count memory transactions, which takes time and memory.
    pub counts_sectors: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            seed: 1,
            detect_races: true,
            budget_instructions: 200_000_000,
            resident_blocks: usize::MAX,
            counts_sectors: false,
        }
    }
}

/// What a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Instructions executed by all threads.
    pub instructions: u64,
    /// Bytes loaded from global memory.
    pub loaded_bytes: u64,
    /// Bytes stored to global memory.
    pub stored_bytes: u64,
    /// Transactions of 32 bytes by which warps load; 0 if they are not counted.
    pub loaded_sectors: u64,
    /// Transactions of 32 bytes by which warps store; 0 if they are not counted.
    pub stored_sectors: u64,
}

/// Runs all launches together, as kernels that are in flight at the same time. Kernels that a stream orders one after the
/// other are separate runs.
///
/// # Errors
/// The first [`Fault`] of the interleaving that the seed chooses. Global memory then holds what the kernels had written so far.
pub fn run(launches: &[Launch<'_>], outside: &mut dyn Outside, options: &Options) -> Result<Report, Fault> {
    let mut machine = Machine::new(launches, outside, options)?;
    machine.run()?;
    Ok(machine.report)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its block is not resident yet.
    Pending,
    Ready,
    /// At the block's barrier of this number, with so many threads; 0 for all that run.
    Barrier {
        number: u64,
        len_threads: u64,
    },
    /// At a warp instruction that the threads of this mask execute together.
    Warp(u32),
    Exited,
}

#[derive(Debug)]
struct Thread {
    block: usize,
    /// Number in the block, x first.
    index: usize,
    pc: usize,
    state: State,
    registers: Vec<u64>,
    local: Vec<u8>,
}

#[derive(Debug)]
struct Block {
    launch: usize,
    index: [u32; 3],
    first_thread: usize,
    len_threads: usize,
    running: usize,
    shared: Vec<u8>,
}

/// What follows an instruction.
enum Next {
    /// The same thread goes on.
    Go,
    /// Another thread may come between.
    Yield,
    /// The thread waits or has ended.
    Stop,
}

struct Machine<'a> {
    launches: &'a [Launch<'a>],
    outside: &'a mut dyn Outside,
    options: &'a Options,
    threads: Vec<Thread>,
    blocks: Vec<Block>,
    /// Indices of threads that can go on.
    ready: Vec<usize>,
    detector: Option<Detector>,
    sectors: Option<Sectors>,
    random: u64,
    report: Report,
}

impl<'a> Machine<'a> {
    fn new(
        launches: &'a [Launch<'a>],
        outside: &'a mut dyn Outside,
        options: &'a Options,
    ) -> Result<Machine<'a>, Fault> {
        let mut machine = Machine {
            launches,
            outside,
            options,
            threads: Vec::new(),
            blocks: Vec::new(),
            ready: Vec::new(),
            detector: None,
            sectors: options.counts_sectors.then(Sectors::default),
            random: options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            report: Report::default(),
        };
        for (number, launch) in launches.iter().enumerate() {
            machine.place(number, launch)?;
        }
        if options.detect_races {
            let place = |thread: &Thread| (launches[machine.blocks[thread.block].launch].device, thread.block);
            machine.detector = Some(Detector::new(&machine.threads.iter().map(place).collect::<Vec<_>>()));
        }
        for launch in 0..launches.len() {
            for _ in 0..options.resident_blocks {
                if !machine.start_block(launch) {
                    break;
                }
            }
        }
        Ok(machine)
    }

    /// Checks a launch and lays out its blocks and threads.
    fn place(&mut self, number: usize, launch: &Launch<'_>) -> Result<(), Fault> {
        let kernel = launch.kernel;
        let refuse = |what: String| Fault::Launch { kernel: kernel.name.clone(), what };
        let len_threads = launch.block.iter().map(|n| u64::from(*n)).product::<u64>();
        let limit = u64::from(kernel.max_threads.unwrap_or(1024).min(1024));
        if !(1..=limit).contains(&len_threads) || launch.grid.contains(&0) {
            return Err(refuse(format!("{len_threads} threads a block, at most {limit}; grid {:?}", launch.grid)));
        }
        if launch.arguments.0.len() != kernel.parameter_bytes {
            let (given, needed) = (launch.arguments.0.len(), kernel.parameter_bytes);
            return Err(refuse(format!("{given} bytes of arguments, and the kernel takes {needed}")));
        }
        let [columns, rows, layers] = launch.grid;
        for z in 0..layers {
            for y in 0..rows {
                for x in 0..columns {
                    let block = self.blocks.len();
                    let (first_thread, len_threads) = (self.threads.len(), len_threads as usize);
                    let shared_bytes = kernel.shared_bytes.next_multiple_of(16) + launch.shared_bytes;
                    self.threads.extend((0..len_threads).map(|index| Thread {
                        block,
                        index,
                        pc: 0,
                        state: State::Pending,
                        registers: vec![u64::from_le_bytes([UNWRITTEN; 8]); kernel.registers],
                        local: vec![UNWRITTEN; kernel.local_bytes],
                    }));
                    self.blocks.push(Block {
                        launch: number,
                        index: [x, y, z],
                        first_thread,
                        len_threads,
                        running: len_threads,
                        shared: vec![UNWRITTEN; shared_bytes],
                    });
                }
            }
        }
        Ok(())
    }

    /// Makes the next pending block of `launch` resident; false if there is none.
    fn start_block(&mut self, launch: usize) -> bool {
        let pending =
            |block: &Block| block.launch == launch && self.threads[block.first_thread].state == State::Pending;
        let Some(block) = self.blocks.iter().find(|block| pending(block)) else {
            return false;
        };
        for thread in block.first_thread..block.first_thread + block.len_threads {
            self.threads[thread].state = State::Ready;
            self.ready.push(thread);
        }
        true
    }

    fn run(&mut self) -> Result<(), Fault> {
        while !self.ready.is_empty() {
            let chosen = (self.random() % self.ready.len() as u64) as usize;
            let thread = self.ready.swap_remove(chosen);
            let mut burst = self.random() % LONGEST_BURST;
            loop {
                if self.report.instructions >= self.options.budget_instructions {
                    let instructions = self.report.instructions;
                    return Err(Fault::Hang { instructions, site: self.site(thread, self.threads[thread].pc) });
                }
                self.report.instructions += 1;
                match self.step(thread)? {
                    Next::Go => {}
                    Next::Yield if burst > 0 => burst -= 1,
                    Next::Yield => {
                        self.ready.push(thread);
                        break;
                    }
                    Next::Stop => break,
                }
            }
        }
        let mut waiting = self.threads.iter().enumerate().filter(|(_, thread)| thread.state != State::Exited);
        match waiting.next() {
            Some((first, thread)) => {
                let site = self.site(first, thread.pc.saturating_sub(1));
                Err(Fault::Deadlock { site, waiting: 1 + waiting.count() })
            }
            None => Ok(()),
        }
    }

    /// xorshift64 (Marsaglia 2003).
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 11
    }

    fn kernel_of(&self, thread: usize) -> &'a Kernel {
        self.launches[self.blocks[self.threads[thread].block].launch].kernel
    }

    fn site(&self, thread: usize, instruction: usize) -> Box<Site> {
        let block = &self.blocks[self.threads[thread].block];
        let kernel = self.kernel_of(thread);
        let instruction = kernel.instructions.get(instruction.min(kernel.instructions.len().saturating_sub(1)));
        Box::new(Site {
            kernel: kernel.name.clone(),
            ptx_line: instruction.map_or(0, |instruction| instruction.ptx_line),
            source: instruction.and_then(|instruction| kernel.source(instruction)),
            launch: block.launch,
            block: block.index,
            thread: self.threads[thread].index as u32,
        })
    }
}
