//! A virtual GPU: runs the PTX that nvcc emits for the kernels of annulus, one thread at a time, and finds what a GPU
//! would hide.
//!
//! ```text
//! PTX text --parse--> Module { Kernel { Instruction .. } }
//! Kernel + grid + arguments = Launch;  launches of all ranks run together on one Memory, interleaved by a seeded scheduler
//!     every access: inside an allocation? aligned? ordered with, or morally strong to, every conflicting access before?
//!     nobody can go on: deadlock, with the places where threads wait
//! ```
//!
//! Source: PTX ISA 9.0, chapters 8 (memory consistency model) and 9 (instruction set).
//!
//! What it does not show: values that only a weakly ordered machine could read (each load sees the latest store; the race
//! detector reports the missing order instead), timing, and what `ptxas` makes of the PTX. Threads of a warp are not in
//! lockstep, so a missing `bar.warp.sync` is not hidden. Instructions outside the subset, and modifiers that make results
//! approximate (`.approx`, `.ftz`), are errors that name instruction and line.

mod exec;
mod fault;
mod memory;
mod outside;
mod parse;
mod ptx;
mod race;

pub use exec::{Arguments, Launch, Options, Report, run};
pub use fault::{Fault, Site};
pub use memory::Memory;
pub use outside::{Manner, Outside, Reach};
pub use ptx::{Kernel, Module};
