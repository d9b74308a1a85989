//! Named ranges for NVIDIA's profilers (Nsight Systems and its like), on the domain "annulus".
//!
//! A profiler names the library that wants to hear of ranges in `NVTX_INJECTION64_PATH`, or has it in the process already.
//! Without one a range is one load and one branch: nothing is opened. This is the application's side of NVTX 3, which in C
//! is a header; the crate `nvtx` wraps that header and needs libclang to build.
//!
//! ```text
//! first range ──> InitializeInjectionNvtx2(get_export_table) ──> the tool asks for tables of slots and fills in functions
//! every range ──> DomainRangePushEx(domain, {name, index})        ..   DomainRangePop(domain)
//! ```
//! Source: NVTX 3, `nvToolsExt.h`, `nvtxDetail/nvtxTypes.h` and `nvtxInit.h` (github.com/NVIDIA/NVTX).

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::Library;

const INJECTION_PATH: &str = "NVTX_INJECTION64_PATH";
const VERSION: u16 = 3;
const MESSAGE_ASCII: i32 = 1;
const PAYLOAD_U64: i32 = 1;

/// Tables that tools ask for by their number, and numbers of functions in each, 0 (no function) included: nvtxTypes.h.
const LEN_FUNCTIONS: [u32; 7] = [0, 16, 9, 15, 7, 16, 7];
const CORE2: usize = 5;
const DOMAIN_RANGE_PUSH: usize = 4;
const DOMAIN_RANGE_POP: usize = 5;
const DOMAIN_CREATE: usize = 12;
/// The longest table and a null after it.
const LEN_SLOTS: usize = 17;

/// Where a tool puts its function.
type Slot = AtomicPtr<c_void>;

static SLOTS: [[Slot; LEN_SLOTS]; LEN_FUNCTIONS.len()] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; LEN_SLOTS] }; LEN_FUNCTIONS.len()];

/// Pointers to [`SLOTS`], null where there is no function.
struct Tables([[*const Slot; LEN_SLOTS]; LEN_FUNCTIONS.len()]);

// SAFETY: the pointers are to a static of atomics, and are never changed.
unsafe impl Sync for Tables {}

static TABLES: Tables = {
    let mut tables = [[std::ptr::null(); LEN_SLOTS]; LEN_FUNCTIONS.len()];
    let mut module = 0;
    while module < LEN_FUNCTIONS.len() {
        let mut function = 1;
        while function < LEN_FUNCTIONS[module] as usize {
            tables[module][function] = &raw const SLOTS[module][function];
            function += 1;
        }
        module += 1;
    }
    Tables(tables)
};

/// `NvtxExportTableCallbacks`
#[repr(C)]
struct Callbacks {
    size_bytes: usize,
    get_function_table: extern "C" fn(u32, *mut *const *const Slot, *mut u32) -> c_int,
}

/// `NvtxExportTableVersionInfo`
#[repr(C)]
struct VersionInfo {
    size_bytes: usize,
    version: u32,
    reserved: u32,
    set_tool_version: extern "C" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks { size_bytes: size_of::<Callbacks>(), get_function_table };
static VERSION_INFO: VersionInfo =
    VersionInfo { size_bytes: size_of::<VersionInfo>(), version: VERSION as u32, reserved: 0, set_tool_version };

extern "C" fn get_export_table(number: u32) -> *const c_void {
    match number {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION_INFO).cast(),
        _ => std::ptr::null(),
    }
}

extern "C" fn get_function_table(module: u32, table: *mut *const *const Slot, len: *mut u32) -> c_int {
    let Some(found) = TABLES.0.get(module as usize).filter(|_| module > 0) else { return 0 };
    if !table.is_null() {
        // SAFETY: the tool passes null or a place for the pointer.
        unsafe { table.write(found.as_ptr()) };
    }
    if !len.is_null() {
        // SAFETY: the tool passes null or a place for the number.
        unsafe { len.write(LEN_FUNCTIONS[module as usize]) };
    }
    1
}

extern "C" fn set_tool_version(_version: u32) {}

type Initialize = unsafe extern "C" fn(extern "C" fn(u32) -> *const c_void) -> c_int;
type CreateDomain = unsafe extern "C" fn(*const c_char) -> *mut c_void;
type Push = unsafe extern "C" fn(*mut c_void, *const Attributes) -> c_int;
type Pop = unsafe extern "C" fn(*mut c_void) -> c_int;

/// `nvtxEventAttributes_v2`
#[repr(C)]
struct Attributes {
    version: u16,
    size_bytes: u16,
    category: u32,
    color_type: i32,
    color: u32,
    payload_type: i32,
    reserved: i32,
    payload: u64,
    message_type: i32,
    message: *const c_char,
}

const _: () = assert!(size_of::<Attributes>() == 48);

/// A tool that listens.
struct Tool {
    /// The tool's handle; only it looks inside.
    domain: *mut c_void,
    push: Push,
    pop: Pop,
}

// SAFETY: NVTX functions may be called from all threads at once, with the same domain.
unsafe impl Send for Tool {}
// SAFETY: as for Send.
unsafe impl Sync for Tool {}

impl Tool {
    fn listening() -> Option<&'static Tool> {
        static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
        TOOL.get_or_init(Tool::find).as_ref()
    }

    fn find() -> Option<Tool> {
        let initialize = Tool::entry()?;
        // SAFETY: NVTX defines the function so; what it gets lives as long as the program.
        if unsafe { initialize(get_export_table) } == 0 {
            tracing::warn!("the profiler's NVTX library does not start");
            return None;
        }
        // Acquire: the tool may fill slots from another thread.
        let function = |number: usize| SLOTS[CORE2][number].load(Ordering::Acquire);
        let (create, push, pop) = (function(DOMAIN_CREATE), function(DOMAIN_RANGE_PUSH), function(DOMAIN_RANGE_POP));
        if create.is_null() || push.is_null() || pop.is_null() {
            return None; // it listens to other things
        }
        // SAFETY: the tool put functions of these types into these slots, as nvtxTypes.h demands of it.
        let (create, push, pop) = unsafe {
            use std::mem::transmute;
            (
                transmute::<*mut c_void, CreateDomain>(create),
                transmute::<*mut c_void, Push>(push),
                transmute::<*mut c_void, Pop>(pop),
            )
        };
        // SAFETY: a name that ends in a zero.
        Some(Tool { domain: unsafe { create(c"annulus".as_ptr()) }, push, pop })
    }

    /// The function that starts the tool.
    fn entry() -> Option<Initialize> {
        const NAME: &[u8] = b"InitializeInjectionNvtx2\0";
        // SAFETY: NVTX reserves the name for a function of this type.
        if let Ok(found) = unsafe { Library::this().get::<Initialize>(NAME) } {
            return Some(*found);
        }
        let path = std::env::var_os(INJECTION_PATH)?;
        let told = |error: libloading::Error| tracing::warn!(%error, "{INJECTION_PATH} names no NVTX library");
        // SAFETY: the user or the profiler asks that this library be loaded and its initialisers run.
        let library = unsafe { Library::new(&path) }.map_err(told).ok()?;
        // SAFETY: as above.
        let initialize = *unsafe { library.get::<Initialize>(NAME) }.map_err(told).ok()?;
        std::mem::forget(library); // its functions are called until the program ends
        Some(initialize)
    }
}

/// A range that is open on the thread that opened it; dropping it closes it.
#[derive(Debug)]
#[must_use = "dropping it closes the range"]
pub struct Range {
    is_open: bool,
    /// Ranges nest per thread.
    _on_this_thread: PhantomData<*const ()>,
}

/// Opens a range called `name`, cut to 63 bytes, with the number `index` (a bucket, a step) as its payload.
#[inline]
pub fn range(name: &str, index: u32) -> Range {
    let tool = Tool::listening();
    if let Some(tool) = tool {
        push(tool, name, index);
    }
    Range { is_open: tool.is_some(), _on_this_thread: PhantomData }
}

#[cold]
fn push(tool: &Tool, name: &str, index: u32) {
    let mut message = [0_u8; 64];
    let len = name.len().min(message.len() - 1);
    message[..len].copy_from_slice(&name.as_bytes()[..len]);
    let attributes = Attributes {
        version: VERSION,
        size_bytes: size_of::<Attributes>() as u16,
        category: 0,
        color_type: 0,
        color: 0,
        payload_type: PAYLOAD_U64,
        reserved: 0,
        payload: u64::from(index),
        message_type: MESSAGE_ASCII,
        message: message.as_ptr().cast(),
    };
    // SAFETY: the tool's own domain; it copies the message, which ends in a zero, before it returns.
    unsafe { (tool.push)(tool.domain, &attributes) };
}

impl Drop for Range {
    #[inline]
    fn drop(&mut self) {
        if let Some(tool) = self.is_open.then(Tool::listening).flatten() {
            // SAFETY: the tool's own domain; ranges of a thread are dropped innermost first, and if not only names are
            // swapped in what the tool shows.
            unsafe { (tool.pop)(tool.domain) };
        }
    }
}
