//! The NVIDIA management library (NVML) of a machine that is not there: what an unmodified program that opens
//! `libnvidia-ml.so.1` finds on a machine without a GPU. And, in [`injection`], what a profiler would load for NVTX ranges.
//!
//! Devices are those of the virtual driver (`annulus-vgpu-driver`), with the same UUIDs. Only the functions that annulus
//! calls are there; the rest is missing, as it is from an old library.
//!
//! | variable | meaning | if not set |
//! |---|---|---|
//! | `ANNULUS_VGPU_DEVICES` | number of devices | 1 |
//! | `ANNULUS_VGPU_LINKS` | a row for each device, split by `;`, of `X`, `NV<n>` (links between the two), `NS<n>` (links to a switch), `PSB`, `PIX`, `PXB`, `PHB`, `NODE`, `SYS` | `PHB` everywhere |
//! | `ANNULUS_VGPU_NVML_ANSWERS` | `nvmlDeviceGetPowerUsage=3,..`: these functions do nothing but return this code (3: not supported, as consumer cards say; 13: the library is too old) | none |
//! | `ANNULUS_VGPU_LOST` | path of a file: once it exists, every device is lost | none |
//! | `ANNULUS_VGPU_NVML_HANG` | path of a file: while it exists, calls about a device do not return | none |
//! | `ANNULUS_VGPU_NVTX_LOG` | file to which the injection library appends what it is told; without it, it refuses to start | none |
//!
//! Values that change do so with every call and not with time, so that tests know them: see [`machine`].

mod entry;
pub mod injection;
pub mod machine;
mod settings;
