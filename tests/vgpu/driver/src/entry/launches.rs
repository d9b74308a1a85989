//! DAPI 6.22, 6.25: launches and occupancy.

use std::ffi::{c_int, c_uint, c_void};

use super::{In, Out};
use crate::device;
use crate::launch::{self, Shape, resident_blocks};
use crate::module;
use crate::status::{Result, Status, answer, refuse};
use crate::stream::Stream;

/// Copies the arguments now: DAPI 6.22, `cuLaunchKernel`, `kernelParams`.
fn parameters(kernel: &annulus_vgpu::Kernel, places: &In<*const u8>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; kernel.parameter_bytes()];
    for (index, (offset, len_bytes)) in kernel.parameters().iter().enumerate() {
        let place = In(places.at(index)?);
        for (at, byte) in bytes[*offset..offset + len_bytes].iter_mut().enumerate() {
            *byte = place.at(at)?;
        }
    }
    Ok(bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: u64,
    arguments: In<*const u8>,
    extra: *const c_void,
) -> u32 {
    answer(|| {
        // Stricter than CUDA, which takes arguments this way, too: nobody here passes them so.
        if !extra.is_null() {
            return refuse(Status::NOT_SUPPORTED, "arguments in the `extra` of cuLaunchKernel");
        }
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        enqueue(
            function,
            Shape { grid, block, shared_bytes: shared_bytes as usize, cooperative: false },
            stream,
            &arguments,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchCooperativeKernel(
    function: u64,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: u64,
    arguments: In<*const u8>,
) -> u32 {
    answer(|| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        enqueue(
            function,
            Shape { grid, block, shared_bytes: shared_bytes as usize, cooperative: true },
            stream,
            &arguments,
        )
    })
}

fn enqueue(function: u64, shape: Shape, stream: u64, arguments: &In<*const u8>) -> Result<()> {
    let stream = Stream::of(stream)?;
    module::load_function(function, stream.device)?;
    let function = module::get(function)?;
    let parameters = parameters(function.kernel(), arguments)?;
    launch::launch(&stream, function, shape, parameters)
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: Out<c_int>,
    function: u64,
    block_threads: c_int,
    shared_bytes: usize,
) -> u32 {
    answer(|| {
        device::current()?;
        let shared_bytes = shared_bytes.saturating_add(module::get(function)?.kernel().shared_bytes());
        match usize::try_from(block_threads) {
            Ok(threads @ 1..) => blocks.give(resident_blocks(threads, shared_bytes) as c_int),
            // DAPI 6.25: among the function's codes.
            _ => refuse(Status::INVALID_VALUE, "the occupancy of blocks without threads"),
        }
    })
}
