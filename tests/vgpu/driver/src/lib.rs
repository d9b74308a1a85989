//! A CUDA driver library over the virtual GPU: what an unmodified program that opens `libcuda.so` finds on a machine
//! without a GPU.
//!
//! ```text
//! program --dlopen--> cu* (entry/)  --> machine: devices, contexts, sticky errors
//!                                   --> allocations: address -> mapping of a memfd, so that other processes can map it
//!                                   --> stream: one worker thread each, in order --> PTX interpreter (annulus-vgpu)
//! ```
//! Launches on different streams run on their streams' threads at the same time, and those of other processes in theirs: a
//! kernel that spins does not keep others from running. Memory is sequentially consistent between them. What streams of this
//! process do to the same memory with nothing to order it ends the process (`races`), however it came out; races between
//! threads of a launch are the interpreter's to find, when it runs one alone (`annulus_vgpu::run`).
//!
//! It is strict where CUDA is: what the driver API's documentation (CUDA Driver API Reference Manual 12.2, chapter 6;
//! "DAPI 6.13" and the like below) calls an error is one here, with the code named there. What it leaves undefined, this
//! driver makes as visible as it can. Each refusal stands beside its source; where this driver refuses what CUDA may not, the
//! words "stricter than CUDA" and the reason do.
//!
//! | variable | meaning | if not set |
//! |---|---|---|
//! | `ANNULUS_VGPU_DEVICES` | number of devices | 1 |
//! | `ANNULUS_VGPU_MEMORY_BYTES` | memory of each device, counted in each process | 256 MiB |
//! | `ANNULUS_VGPU_DRIVER_VERSION` | as `cuDriverGetVersion` tells it | 13000 |
//! | `ANNULUS_VGPU_PEERS` | `all`; `none`: no peer access; `lossy`: claimed, but stores to a peer are lost | `all` |
//! | `ANNULUS_VGPU_DESCRIPTORS` | `all`; `none`: devices cannot share memory by POSIX descriptors | `all` |
//! | `ANNULUS_VGPU_MEMORY_OPERATIONS` | `all`; `none`: streams cannot wait for values in memory, nor write them | `all` |
//! | `ANNULUS_VGPU_LOST` | path of a file: once it exists, every call of a device fails with the code in it; empty: 999, as if the device were gone | none |
//! | `ANNULUS_VGPU_WATCHDOG_MS` | after so long a kernel or a wait for a value is ended as timed out | 60000 |
//! | `CUDA_MODULE_LOADING` | CUDA's own: `LAZY`, `EAGER` | `LAZY` |
//! | `ANNULUS_VGPU_CALLS` | a file that gets a line for each call of the driver: its name | none |
//! | `ANNULUS_VGPU_REFUSE` | a file: once it exists, it holds the name of a function and which call of it is refused | none |
//! | `ANNULUS_VGPU_RACES` | of races between streams, kernels and copies: `end`: they are told, and the process is ended; `tell`; `ignore` | `end` |
//! | `ANNULUS_VGPU_DROP_WAIT` | a file: once it exists, it holds the number of a device and which `cuStreamWaitEvent` of its streams is forgotten | none |
//! | `ANNULUS_VGPU_ONE_AT_A_TIME` | `true`: kernels of different streams of a device do not run at the same time | `false` |
//! | `ANNULUS_VGPU_TALLY` | a file that gets a line for each launch: kernel, instructions, bytes loaded, bytes stored, 32-byte transactions that load, that store | none |
//!
//! Limits: primary contexts only; no textures, managed memory or kernels from cubins; graphs come from stream capture, without
//! memory nodes or graphs in them.

mod allocations;
mod capture;
mod device;
mod entry;
mod event;
mod graph;
mod handles;
mod ipc;
mod launch;
mod mapping;
mod module;
mod races;
mod refusal;
mod settings;
mod status;
mod stream;
mod tally;
mod virtual_memory;
