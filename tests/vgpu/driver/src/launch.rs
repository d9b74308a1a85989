//! Kernel launches and the stream's own memory operations.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use annulus_vgpu::{Arguments, Launch, Options, run};

use crate::allocations::{self, View};
use crate::capture;
use crate::device::{self, BLOCKS_PER_MULTIPROCESSOR, MULTIPROCESSORS, SHARED_BYTES_PER_MULTIPROCESSOR};
use crate::device::{THREADS_PER_BLOCK, THREADS_PER_MULTIPROCESSOR};
use crate::module::Function;
use crate::races::{self, Watch};
use crate::settings::SETTINGS;
use crate::status::{Result, Status, refuse};
use crate::stream::Stream;
use crate::tally;

pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: usize,
    pub cooperative: bool,
}

/// Instructions that the interpreter runs in a millisecond at most; turns the watchdog's time into a budget.
const INSTRUCTIONS_PER_MS: u64 = 50_000;

/// Whose turn it is, where kernels run one at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Blocks of `block_threads` threads and `shared_bytes` of shared memory, static and dynamic, that one multiprocessor holds
/// at a time.
pub(crate) fn resident_blocks(block_threads: usize, shared_bytes: usize) -> usize {
    let by_threads = THREADS_PER_MULTIPROCESSOR / block_threads.max(1);
    by_threads.min(SHARED_BYTES_PER_MULTIPROCESSOR / shared_bytes.max(1)).min(BLOCKS_PER_MULTIPROCESSOR)
}

/// Checks a launch as the call does, before anything is queued. CUDA_ERROR_INVALID_VALUE is among the codes of
/// `cuLaunchKernel` (DAPI 6.22): for sizes beyond the device's attributes (MAX_THREADS_PER_BLOCK, MAX_GRID_DIM_Y and _Z,
/// DAPI 6.5), for "more threads per block than its launch bound" (CUDA C++ Programming Guide 12.2, "Launch Bounds"), and where
/// "the user-specified dynamic shared memory size is larger than" CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES (DAPI 6.1).
fn check(function: &Function, shape: &Shape) -> Result<usize> {
    let product = |sizes: [u32; 3]| sizes.iter().try_fold(1usize, |all, size| all.checked_mul(*size as usize));
    let (Some(blocks), Some(threads)) = (product(shape.grid), product(shape.block)) else {
        return Err(Status::INVALID_VALUE);
    };
    if blocks == 0 || threads == 0 || threads > THREADS_PER_BLOCK || shape.grid[1] > 65_535 || shape.grid[2] > 65_535 {
        let Shape { grid, block, .. } = shape;
        return refuse(Status::INVALID_VALUE, &format!("launch of grid {grid:?}, block {block:?}"));
    }
    let kernel = function.kernel();
    if kernel.max_threads().is_some_and(|most| threads > most as usize) {
        return refuse(
            Status::INVALID_VALUE,
            &format!("{threads} threads exceed the launch bounds of {}", kernel.name()),
        );
    }
    if shape.shared_bytes > function.max_dynamic_shared_bytes {
        return refuse(Status::INVALID_VALUE, "more dynamic shared memory than was asked for with cuFuncSetAttribute");
    }
    let resident = MULTIPROCESSORS * resident_blocks(threads, shape.shared_bytes + kernel.shared_bytes());
    // DAPI 6.22, `cuLaunchCooperativeKernel`: no more blocks than the device holds at a time.
    if shape.cooperative && blocks > resident {
        return refuse(
            Status::COOPERATIVE_LAUNCH_TOO_LARGE,
            &format!("{blocks} blocks of {threads} threads in a cooperative launch, at most {resident} fit"),
        );
    }
    Ok(resident)
}

/// Appends a launch with the bytes of its parameters.
pub(crate) fn launch(stream: &Stream, function: Function, shape: Shape, parameters: Vec<u8>) -> Result<()> {
    let resident_blocks = check(&function, &shape).inspect_err(|_| capture::invalidate(stream))?;
    let number = stream.device;
    stream.submit(move || {
        let launch = Launch {
            kernel: function.kernel(),
            grid: shape.grid,
            block: shape.block,
            shared_bytes: shape.shared_bytes,
            arguments: Arguments::from_bytes(parameters.clone()),
            device: number,
        };
        let watchdog_ms = u64::try_from(SETTINGS.watchdog.as_millis()).unwrap_or(u64::MAX);
        let options = Options {
            detect_races: false,
            budget_instructions: watchdog_ms.saturating_mul(INSTRUCTIONS_PER_MS),
            resident_blocks,
            counts_sectors: SETTINGS.tally.is_some(),
            ..Options::default()
        };
        let _turn = SETTINGS.one_at_a_time.then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner));
        // Taken now: what was freed before the launch's turn is out of its reach.
        let mut view = View::of(number, Watch::new(&function));
        match run(&[launch], &mut view, &options) {
            Ok(report) => {
                view.end();
                tally::add(function.kernel().name(), &report);
            }
            Err(fault) => device::fail(number, &fault),
        }
    })
}

/// When a wait for a value is over (DAPI 6.21, `CUstreamWaitValue_flags`).
fn is_met(flags: u32, seen: u32, value: u32) -> Result<bool> {
    match flags {
        // "(int32_t)(*addr - value) >= 0", which is cyclic.
        0 => Ok(seen.wrapping_sub(value).cast_signed() >= 0),
        1 => Ok(seen == value),
        2 => Ok(seen & value != 0),
        3 => Ok(!(seen | value) != 0),
        // DAPI 6.21: among the codes of `cuStreamWaitValue32`.
        _ => refuse(Status::INVALID_VALUE, "unknown flags of cuStreamWaitValue32"),
    }
}

/// `cuStreamWaitValue32`; no work of the stream goes on before.
pub(crate) fn wait_value(stream: &Stream, address: u64, value: u32, flags: u32) -> Result<()> {
    value_place(address)?;
    is_met(flags, 0, value)?;
    let number = stream.device;
    stream.submit(move || {
        let Some((allocation, offset)) = allocations::range_now(number, address, 4) else { return };
        let start = Instant::now();
        loop {
            let mut seen = [0; 4];
            allocation.mapping.read(offset, &mut seen);
            if is_met(flags, u32::from_le_bytes(seen), value) != Ok(false) || device::check_sticky(number).is_err() {
                return races::wait_value(&allocation.mapping, offset, allocation.kind.is_host());
            }
            // Stricter than CUDA, which waits for ever: a test should end.
            if start.elapsed() > SETTINGS.watchdog {
                eprintln!("virtual GPU (process {}): cuStreamWaitValue32 timed out", std::process::id());
                return device::stick(number, Status::LAUNCH_TIMEOUT);
            }
            // The processor is needed by whoever will write the value.
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    })
}

/// `cuStreamWriteValue32`, after everything the stream did before.
pub(crate) fn write_value(stream: &Stream, address: u64, value: u32, flags: u32) -> Result<()> {
    value_place(address)?;
    // DAPI 6.21, `cuStreamWriteValue32`: INVALID_VALUE is among its codes; flags are DEFAULT and NO_MEMORY_BARRIER.
    if flags > 1 {
        return refuse(Status::INVALID_VALUE, "unknown flags of cuStreamWriteValue32");
    }
    let number = stream.device;
    stream.submit(move || {
        if let Some((allocation, offset)) = allocations::range_now(number, address, 4) {
            // DAPI 6.1, CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER: the write may come before writes of the stream before it.
            races::write_value(&allocation.mapping, offset, flags == 0);
            allocation.mapping.write(offset, &value.to_le_bytes());
        }
    })
}

/// DAPI 6.21: CUDA_ERROR_NOT_SUPPORTED and CUDA_ERROR_INVALID_VALUE are the codes of both functions. Stricter than CUDA: the
/// reference says nothing of a location that is no multiple of 4; it is refused aloud.
fn value_place(address: u64) -> Result<()> {
    if !SETTINGS.orders_by_memory {
        return Err(Status::NOT_SUPPORTED);
    }
    if !address.is_multiple_of(4) {
        return refuse(Status::INVALID_VALUE, "a stream memory operation on a misaligned address");
    }
    allocations::range(address, 4).map(drop)
}
