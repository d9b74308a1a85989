//! Devices, their primary contexts, and errors that stick to them.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use annulus_vgpu::Fault;

use crate::settings::{Peers, SETTINGS};
use crate::status::{Result, Status, refuse};

/// Streaming multiprocessors: few, so that a persistent grid is small.
pub(crate) const MULTIPROCESSORS: usize = 4;
pub(crate) const THREADS_PER_MULTIPROCESSOR: usize = 2048;
pub(crate) const BLOCKS_PER_MULTIPROCESSOR: usize = 32;
pub(crate) const SHARED_BYTES_PER_MULTIPROCESSOR: usize = 228 << 10;
pub(crate) const THREADS_PER_BLOCK: usize = 1024;
/// Without opting in (DAPI 6.5, `CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK`).
pub(crate) const SHARED_BYTES_PER_BLOCK: usize = 48 << 10;
pub(crate) const SHARED_BYTES_PER_BLOCK_OPTIN: usize = 227 << 10;
/// Numerically lower is more urgent (DAPI 6.8, `cuCtxGetStreamPriorityRange`).
pub(crate) const LEAST_PRIORITY: i32 = 0;
pub(crate) const GREATEST_PRIORITY: i32 = -5;

/// A device and its primary context, whose handle is [`context_of`] its number.
#[derive(Debug, Default)]
pub(crate) struct Device {
    /// How often the primary context is retained.
    retained: AtomicU32,
    /// The code of the first error that stuck.
    sticky: AtomicU32,
    /// Bit d: kernels of this context may reach memory of device d.
    peers: AtomicU64,
    /// Memory allocated by this process.
    pub used_bytes: Mutex<usize>,
}

static INITIALIZED: AtomicBool = AtomicBool::new(false);
static DEVICES: LazyLock<Vec<Device>> = LazyLock::new(|| (0..SETTINGS.devices).map(|_| Device::default()).collect());

thread_local! {
    /// The context that is current to the thread; 0: none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// Contexts' handles begin here, so that a device number is never one.
const FIRST_CONTEXT: u64 = 0xc0de_0000;

pub(crate) fn context_of(device: usize) -> u64 {
    FIRST_CONTEXT + device as u64
}

/// DAPI 6.3: "If cuInit() has not been called, any function from the driver API will return CUDA_ERROR_NOT_INITIALIZED."
pub(crate) fn check_initialized() -> Result<()> {
    if INITIALIZED.load(Ordering::Relaxed) { Ok(()) } else { Err(Status::NOT_INITIALIZED) }
}

pub(crate) fn initialize() -> Result<()> {
    // DAPI 6.1: "no CUDA-capable devices were detected by the installed CUDA driver".
    if DEVICES.is_empty() {
        return Err(Status::NO_DEVICE);
    }
    INITIALIZED.store(true, Ordering::Relaxed);
    Ok(())
}

/// DAPI 6.1, CUDA_ERROR_INVALID_DEVICE: "the device ordinal supplied by the user does not correspond to a valid CUDA device".
pub(crate) fn device(number: i32) -> Result<&'static Device> {
    check_initialized()?;
    usize::try_from(number).ok().and_then(|number| DEVICES.get(number)).ok_or(Status::INVALID_DEVICE)
}

pub(crate) fn retain(number: i32) -> Result<u64> {
    device(number)?.retained.fetch_add(1, Ordering::Relaxed);
    Ok(context_of(number as usize))
}

/// DAPI 6.7, `cuDevicePrimaryCtxRelease`: releasing one that is not retained is CUDA_ERROR_INVALID_CONTEXT.
pub(crate) fn release(number: i32) -> Result<()> {
    let less = |count: u32| count.checked_sub(1);
    match device(number)?.retained.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
        Ok(_) => Ok(()),
        Err(_) => refuse(Status::INVALID_CONTEXT, "a primary context is released more often than it was retained"),
    }
}

/// The device of a context's handle. DAPI 6.1, CUDA_ERROR_INVALID_CONTEXT: "if the context passed to an API call is not a
/// valid handle".
pub(crate) fn device_of(context: u64) -> Result<usize> {
    check_initialized()?;
    let number = context.checked_sub(FIRST_CONTEXT).and_then(|number| usize::try_from(number).ok());
    let alive = |number: &usize| DEVICES.get(*number).is_some_and(|device| device.retained.load(Ordering::Relaxed) > 0);
    number.filter(alive).ok_or(Status::INVALID_CONTEXT)
}

pub(crate) fn set_current(context: u64) -> Result<()> {
    if context != 0 {
        device_of(context)?;
    }
    CURRENT.set(context);
    Ok(())
}

pub(crate) fn current_handle() -> u64 {
    CURRENT.get()
}

/// The device of the current context, if the context still works.
///
/// DAPI 6.1: CUDA_ERROR_INVALID_CONTEXT "most frequently indicates that there is no context bound to the current thread";
/// and CUDA_ERROR_ILLEGAL_ADDRESS and its like leave "the process in an inconsistent state and any further CUDA work will
/// return the same error".
pub(crate) fn current() -> Result<usize> {
    check_initialized()?;
    if CURRENT.get() == 0 {
        return refuse(Status::INVALID_CONTEXT, "a call that needs a context, on a thread that has none");
    }
    let number = device_of(CURRENT.get())?;
    check_sticky(number)?;
    Ok(number)
}

pub(crate) fn check_sticky(number: usize) -> Result<()> {
    if let Some(code) = SETTINGS.lost.as_ref().and_then(|path| std::fs::read_to_string(path).ok()) {
        // What a device that fell off the bus was seen to give.
        stick(number, code.parse().map_or(Status::UNKNOWN, Status));
    }
    match DEVICES[number].sticky.load(Ordering::Acquire) {
        0 => Ok(()),
        code => Err(Status(code)),
    }
}

/// Makes the context of a device return `status` from now on; the first one stays.
pub(crate) fn stick(number: usize, status: Status) {
    let _ = DEVICES[number].sticky.compare_exchange(0, status.0, Ordering::AcqRel, Ordering::Relaxed);
}

/// A kernel's fault becomes the sticky error that a GPU gives (DAPI 6.1), and is told in full on standard error.
pub(crate) fn fail(number: usize, fault: &Fault) {
    eprintln!("virtual GPU (process {}): device {number}: {fault}", std::process::id());
    let status = match fault {
        Fault::OutOfBounds { .. } => Status::ILLEGAL_ADDRESS,
        Fault::Misaligned { .. } => Status::MISALIGNED_ADDRESS,
        Fault::Hang { .. } | Fault::Deadlock { .. } => Status::LAUNCH_TIMEOUT,
        _ => Status::LAUNCH_FAILED,
    };
    stick(number, status);
}

// ---- peers -------------------------------------------------------------------------------------------------------------

/// DAPI 6.31, `cuDeviceCanAccessPeer`; a device is not its own peer.
pub(crate) fn can_access_peer(number: i32, peer: i32) -> Result<bool> {
    device(number)?;
    device(peer)?;
    Ok(number != peer && SETTINGS.peers != Peers::None)
}

/// DAPI 6.31, `cuCtxEnablePeerAccess`: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED if `cuDeviceCanAccessPeer` says so, and as seen, for
/// the current context itself; the reference has CUDA_ERROR_INVALID_CONTEXT. CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED if
/// access "has already been enabled".
pub(crate) fn enable_peer(number: usize, peer: usize) -> Result<()> {
    if number == peer {
        return refuse(Status::PEER_ACCESS_UNSUPPORTED, "cuCtxEnablePeerAccess for the current context itself");
    }
    if SETTINGS.peers == Peers::None {
        return Err(Status::PEER_ACCESS_UNSUPPORTED);
    }
    let before = DEVICES[number].peers.fetch_or(1 << peer, Ordering::Relaxed);
    if before >> peer & 1 == 1 { Err(Status::PEER_ACCESS_ALREADY_ENABLED) } else { Ok(()) }
}

/// DAPI 6.31, `cuCtxDisablePeerAccess`: CUDA_ERROR_PEER_ACCESS_NOT_ENABLED "if direct peer access has not yet been enabled".
pub(crate) fn disable_peer(number: usize, peer: usize) -> Result<()> {
    let before = DEVICES[number].peers.fetch_and(!(1 << peer), Ordering::Relaxed);
    if before >> peer & 1 == 0 { Err(Status::PEER_ACCESS_NOT_ENABLED) } else { Ok(()) }
}

/// Bit d: kernels of device `number` may reach memory of device d.
pub(crate) fn reachable(number: usize) -> u64 {
    DEVICES[number].peers.load(Ordering::Relaxed) | 1 << number
}

// ---- memory accounts ---------------------------------------------------------------------------------------------------

/// Takes memory of a device; DAPI 6.13: CUDA_ERROR_OUT_OF_MEMORY.
pub(crate) fn charge(number: usize, len_bytes: usize) -> Result<()> {
    let mut used = DEVICES[number].used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
    let after = used.checked_add(len_bytes).filter(|after| *after <= SETTINGS.memory_bytes);
    *used = after.ok_or(Status::OUT_OF_MEMORY)?;
    Ok(())
}

pub(crate) fn give_back(number: usize, len_bytes: usize) {
    let mut used = DEVICES[number].used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
    *used = used.saturating_sub(len_bytes);
}

/// Free bytes of a device.
pub(crate) fn free_bytes(number: usize) -> usize {
    SETTINGS.memory_bytes - *DEVICES[number].used_bytes.lock().unwrap_or_else(PoisonError::into_inner)
}
