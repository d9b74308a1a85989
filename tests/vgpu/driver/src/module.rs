//! Modules: PTX text, and the kernels in it by handle.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::settings::SETTINGS;
use crate::status::{Result, Status, refuse};
use crate::stream::Stream;

/// A kernel of a module, which outlives `cuModuleUnload` while launches are in flight.
#[derive(Clone)]
pub(crate) struct Function {
    module: Arc<annulus_vgpu::Module>,
    index: usize,
    owner: u64,
    /// From `cuFuncSetAttribute`, bytes of dynamic shared memory that a launch may ask for.
    pub max_dynamic_shared_bytes: usize,
}

impl Function {
    pub fn kernel(&self) -> &annulus_vgpu::Kernel {
        &self.module.kernels()[self.index]
    }
}

#[derive(Default)]
struct State {
    modules: HashMap<u64, Arc<annulus_vgpu::Module>>,
    functions: HashMap<u64, Function>,
    /// Kernels whose code is on the device: their module and number.
    loaded: HashSet<(u64, usize)>,
    /// By text: reading one takes longer than most tests run, and the driver's own compiler has a cache, too.
    read: HashMap<String, Arc<annulus_vgpu::Module>>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0x7000_0000);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// PTX ISA versions by the first driver that reads them (PTX ISA 9.0, chapter 13, release notes).
const PTX_BY_DRIVER: [(i32, f32); 9] = [
    (12_020, 8.2),
    (12_030, 8.3),
    (12_040, 8.4),
    (12_050, 8.5),
    (12_070, 8.6),
    (12_080, 8.7),
    (12_090, 8.8),
    (13_000, 9.0),
    (13_010, 9.1),
];

/// The architecture of the device.
const CAPABILITY: u32 = 90;

/// Reads PTX; the second is the text for the JIT's error log. DAPI 6.10, `cuModuleLoadData`; DAPI 6.1:
/// CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "compiled with an unsupported toolchain"; CUDA_ERROR_INVALID_PTX, "compilation failed".
pub(crate) fn load(text: &str) -> std::result::Result<u64, (Status, String)> {
    let newest = PTX_BY_DRIVER.iter().rfind(|(driver, _)| *driver <= SETTINGS.driver_version);
    let newest = newest.map_or(8.1, |(_, version)| *version);
    let version = text.lines().find_map(|line| line.trim().strip_prefix(".version")?.trim().parse::<f32>().ok());
    if version.is_some_and(|version| version > newest) {
        return Err((Status::UNSUPPORTED_PTX_VERSION, format!("PTX .version is newer than {newest}")));
    }
    // Seen for a newer architecture, which would need a compiler for the device that there is.
    let target = text.lines().find_map(|line| line.trim().strip_prefix(".target")?.trim().strip_prefix("sm_"));
    let target = target.map(|target| target.trim_end_matches(|c: char| !c.is_ascii_digit()));
    if target.and_then(|target| target.parse().ok()).is_some_and(|target: u32| target > CAPABILITY) {
        return Err((Status::INVALID_PTX, format!("PTX .target is newer than sm_{CAPABILITY}")));
    }
    // Held while it is read: ranks that start together wait for the first instead of reading the same.
    let mut state = state();
    let module = match state.read.get(text) {
        Some(module) => Arc::clone(module),
        None => {
            let module = annulus_vgpu::Module::parse(text).map_err(|fault| (Status::INVALID_PTX, fault.to_string()))?;
            let module = Arc::new(module);
            state.read.insert(text.to_owned(), Arc::clone(&module));
            module
        }
    };
    let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
    state.modules.insert(handle, module);
    Ok(handle)
}

/// DAPI 6.10, `cuModuleGetFunction`: CUDA_ERROR_NOT_FOUND if there is none of the name. Stricter than CUDA, where use of a
/// module's handle after `cuModuleUnload` "is undefined behavior": CUDA_ERROR_INVALID_HANDLE, so that it is noticed.
pub(crate) fn function(handle: u64, name: &str) -> Result<u64> {
    let mut state = state();
    let Some(module) = state.modules.get(&handle).cloned() else {
        return refuse(Status::INVALID_HANDLE, "no such module");
    };
    let found = module.kernels().iter().position(|kernel| kernel.name() == name);
    let index = found.ok_or(Status::NOT_FOUND)?;
    let function = NEXT.fetch_add(0x10, Ordering::Relaxed);
    // Seen to be what static shared memory leaves.
    let static_bytes = module.kernels()[index].shared_bytes();
    let max_dynamic_shared_bytes = crate::device::SHARED_BYTES_PER_BLOCK.saturating_sub(static_bytes);
    state.functions.insert(function, Function { module, index, owner: handle, max_dynamic_shared_bytes });
    Ok(function)
}

/// The first driver that loads a kernel when it is first launched; those before do it in `cuModuleGetFunction` (CUDA C++
/// Programming Guide 12.2, "Lazy Loading"; DAPI 13.0, `cuModuleGetFunction`: "the function retrieved may be
/// partially loaded").
pub(crate) const FIRST_TO_LOAD_AT_LAUNCH: i32 = 12_040;

/// Puts a function's code on the device, if it is not there. "Loading kernels might require context synchronization"
/// (CUDA C++ Programming Guide 12.2, "Lazy Loading", "Concurrent Execution"): here it always does, so a program that loads
/// while a kernel waits for it is found out. Seen: small kernels do not wait; one with 8 KiB of local memory does at its first
/// launch, also where it was loaded before, which this driver does not show.
pub(crate) fn load_function(function: u64, device: usize) -> Result<()> {
    let function = get(function)?;
    let kernel = (function.owner, function.index);
    if SETTINGS.loads_lazily && !state().loaded.contains(&kernel) {
        Stream::drain_device(device);
        state().loaded.insert(kernel);
    }
    Ok(())
}

/// Stricter than CUDA, as [`function`]: a second `cuModuleUnload` is refused.
pub(crate) fn unload(handle: u64) -> Result<()> {
    let mut state = state();
    if state.modules.remove(&handle).is_none() {
        return refuse(Status::INVALID_HANDLE, "cuModuleUnload of no module");
    }
    state.functions.retain(|_, function| function.owner != handle);
    state.loaded.retain(|(module, _)| *module != handle);
    Ok(())
}

/// DAPI 6.22: CUDA_ERROR_INVALID_HANDLE is what `cuLaunchKernel` and the functions of attributes have for a handle.
pub(crate) fn get(function: u64) -> Result<Function> {
    let found = state().functions.get(&function).cloned();
    found.map_or_else(|| refuse(Status::INVALID_HANDLE, "no such function: is its module unloaded?"), Ok)
}

/// DAPI 6.22, `cuFuncSetAttribute`, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: with the static bytes it "cannot exceed
/// the device attribute CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN".
pub(crate) fn allow_dynamic_shared(function: u64, len_bytes: usize) -> Result<()> {
    let mut state = state();
    let function = state.functions.get_mut(&function).ok_or(Status::INVALID_HANDLE)?;
    if len_bytes + function.kernel().shared_bytes() > crate::device::SHARED_BYTES_PER_BLOCK_OPTIN {
        return refuse(Status::INVALID_VALUE, "more dynamic shared memory than a block can have");
    }
    function.max_dynamic_shared_bytes = len_bytes;
    Ok(())
}
