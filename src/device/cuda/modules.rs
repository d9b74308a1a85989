//! The kernels, loaded on a device.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};

use super::bindings::{
    cuFuncGetAttribute, cuFuncLoad, cuLaunchCooperativeKernel, cuLaunchKernel, cuModuleGetFunction, cuModuleLoadData,
    cuModuleUnload, cuOccupancyMaxActiveBlocksPerMultiprocessor,
};
use super::context::Device;
use super::stream::Stream;
use crate::error::{Error, Result};
use crate::kernels;

/// Every kernel of this crate on one device. Clones are the same; they are unloaded as an [`Arena`](super::Arena) is freed.
///
/// All functions are loaded here, at setup: with lazy loading, the default since CUDA 12.2, the first use of a kernel may
/// wait for kernels in flight, and one that waits for a peer would never end (CUDA C++ Programming Guide, "Lazy Loading").
#[derive(Clone)]
pub struct Kernels(Arc<Core>);

struct Core {
    device: Device,
    len_multiprocessors: u32,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<String, sys::CUfunction>,
}

// SAFETY: modules and functions may be used from any thread with their context current; the handles are only passed.
unsafe impl Send for Core {}
// SAFETY: as for Send.
unsafe impl Sync for Core {}

/// How many blocks of how many threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Blocks.
    pub blocks: u32,
    /// Threads in a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Whether all blocks must run at the same time; refused by the driver where they do not fit.
    pub cooperative: bool,
}

impl Kernels {
    /// Compiles the PTX of every module for `device` and loads every function in it. The driver waits meanwhile for whatever
    /// runs on the device, as no manual says: not to be done while a kernel there waits for a peer that waits for this.
    ///
    /// # Errors
    /// What the driver says.
    pub fn load(device: &Device) -> Result<Kernels> {
        let len_multiprocessors = device.len_multiprocessors()?;
        let mut core =
            Core { device: device.clone(), len_multiprocessors, modules: Vec::new(), functions: HashMap::new() };
        device.bind()?;
        for (_, ptx) in kernels::ALL {
            core.load(ptx)?;
        }
        Ok(Kernels(Arc::new(core)))
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Streaming multiprocessors of the device: what grids are measured by.
    pub fn len_multiprocessors(&self) -> u32 {
        self.0.len_multiprocessors
    }

    /// Blocks of `threads` threads of the kernel called `name` that the whole device holds at a time, when it does nothing
    /// else.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown kernel; what the driver says.
    pub fn resident_blocks(&self, name: &str, threads: u32) -> Result<u32> {
        let function = self.function(name)?;
        self.0.device.bind()?;
        let threads = i32::try_from(threads).unwrap_or(i32::MAX);
        let mut blocks = 0;
        // SAFETY: writes one integer; a function of a loaded module, whose context is current.
        let asked = unsafe { cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, threads, 0) };
        self.0.device.check(asked)?;
        Ok(u32::try_from(blocks).unwrap_or(0).saturating_mul(self.0.len_multiprocessors))
    }

    fn function(&self, name: &str) -> Result<sys::CUfunction> {
        self.0.functions.get(name).copied().ok_or_else(|| Error::InvalidArgument {
            argument: "kernel",
            value: name.to_owned(),
            accepted: "must be one of this crate's kernels",
        })
    }

    /// Enqueues the kernel called `name`, whose one parameter is `arguments`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown kernel or a stream of another device; what the driver says. What goes wrong
    /// in the kernel is reported by later calls on the device.
    ///
    /// # Safety
    /// - `arguments` is the type that the kernel takes, and every address in it is of memory that this device reaches, of
    ///   the length the kernel uses, until the kernel has ended; if the stream captures, for as long as the graph lives, which
    ///   [`Stream::keep`] sees to.
    /// - Whatever else uses that memory is ordered with the kernel by the stream or by events, or is another side of the
    ///   kernel's own protocol.
    pub unsafe fn launch<T: Pod>(&self, name: &str, shape: Shape, stream: &Stream, arguments: &T) -> Result<()> {
        let function = self.function(name)?;
        if !stream.device().is_same(&self.0.device) {
            return Err(Error::InvalidArgument {
                argument: "stream",
                value: stream.name().to_owned(),
                accepted: "must be of the device that the kernels are loaded on",
            });
        }
        let access = stream.access()?;
        access.keep(self);
        let Shape { blocks, threads, shared_bytes, cooperative } = shape;
        let mut parameter: *mut c_void = std::ptr::from_ref(arguments).cast_mut().cast();
        let (stream, none) = (access.raw(), std::ptr::null_mut());
        // SAFETY: the kernel has one parameter. The driver copies the arguments before it returns; what they say is the
        // caller's promise.
        self.0.device.check(unsafe {
            if cooperative {
                cuLaunchCooperativeKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, &mut parameter)
            } else {
                cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, &mut parameter, none)
            }
        })
    }
}

impl Core {
    fn load(&mut self, ptx: &str) -> Result<()> {
        let invalid = |_| Error::InvalidArgument {
            argument: "PTX",
            value: "text with a zero byte".into(),
            accepted: "must be text",
        };
        let text = CString::new(ptx).map_err(invalid)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: writes one handle; a zero-terminated text, which the driver has read when it returns.
        self.device.check(unsafe { cuModuleLoadData(&mut module, text.as_ptr().cast()) })?;
        self.modules.push(module);
        for name in entries(ptx) {
            let c_name = CString::new(name).map_err(invalid)?;
            let mut function = std::ptr::null_mut();
            // SAFETY: writes one handle; the module was loaded just now, and the name ends in a zero.
            self.device.check(unsafe { cuModuleGetFunction(&mut function, module, c_name.as_ptr()) })?;
            self.force(function)?;
            self.functions.insert(name.to_owned(), function);
        }
        Ok(())
    }

    /// Has the function's code put on the device now.
    fn force(&self, function: sys::CUfunction) -> Result<()> {
        // SAFETY: a function of a loaded module.
        let loaded = unsafe { cuFuncLoad(function) };
        if !loaded.is(CUresult::CUDA_ERROR_NOT_FOUND) {
            return self.device.check(loaded);
        }
        // A driver before CUDA 12.4. Asking for what only the loaded code knows does the same.
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        let mut registers = 0;
        // SAFETY: writes one integer; as above.
        self.device.check(unsafe { cuFuncGetAttribute(&mut registers, attribute, function) })
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let modules: Vec<usize> = self.modules.iter().map(|module| module.expose_provenance()).collect();
        self.device.free("code", (), move |device| {
            device.drain()?;
            modules.into_iter().try_for_each(|module| {
                // SAFETY: loaded by `load`, unloaded once; nobody launches any more, and launches in flight have ended.
                device.check(unsafe { cuModuleUnload(std::ptr::with_exposed_provenance_mut(module)) })
            })
        });
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names: Vec<_> = self.0.functions.keys().collect();
        names.sort();
        f.debug_struct("Kernels").field("device", &self.0.device.ordinal()).field("functions", &names).finish()
    }
}

/// Names of the kernels in a PTX text.
fn entries(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.lines().filter_map(|line| {
        let (_, rest) = line.trim_start().split_once(".entry ")?;
        Some(rest.split('(').next().unwrap_or(rest).trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_in_their_text() {
        assert_eq!(entries(kernels::PROBE).collect::<Vec<_>>(), ["probe_peer"]);
        assert_eq!(entries(".visible .entry a(\n)\n// none\n\t.weak .entry b (").collect::<Vec<_>>(), ["a", "b"]);
    }
}
