//! What a profiler would load for NVTX ranges: writes what it is told to the file in `ANNULUS_VGPU_NVTX_LOG`.
//!
//! ```text
//! domain annulus
//! push norm 7          the thread's ranges by depth: two blanks each
//!   push inner 8
//!   pop
//! pop
//! ```
//! It checks what the tool's side of NVTX 3 may rely on (`nvtxDetail/nvtxTypes.h`): versions, sizes, tables.

#![allow(non_snake_case, reason = "the name is NVTX's")]

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::OpenOptions;
use std::io::Write;

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

/// `NvtxExportTableCallbacks`
#[repr(C)]
struct Callbacks {
    size_bytes: usize,
    get_function_table: extern "C" fn(u32, *mut *mut *mut *const c_void, *mut u32) -> c_int,
}

/// `NvtxExportTableVersionInfo`
#[repr(C)]
struct VersionInfo {
    size_bytes: usize,
    version: u32,
    reserved: u32,
    set_tool_version: extern "C" fn(u32),
}

/// The only domain's handle.
const DOMAIN: *mut c_void = std::ptr::without_provenance_mut(0xd0);

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

fn log(line: &str) {
    let path = std::env::var_os("ANNULUS_VGPU_NVTX_LOG").unwrap_or_default();
    let file = OpenOptions::new().create(true).append(true).open(path);
    let _ = file.and_then(|mut file| writeln!(file, "{line}")); // the test misses the line
}

extern "C" fn domain_create(name: *const c_char) -> *mut c_void {
    // SAFETY: NVTX asks its caller for a string that ends in a zero.
    log(&format!("domain {}", unsafe { CStr::from_ptr(name) }.to_string_lossy()));
    DOMAIN
}

extern "C" fn domain_range_push(domain: *mut c_void, attributes: *const Attributes) -> c_int {
    // SAFETY: NVTX asks its caller for attributes.
    let attributes = unsafe { &*attributes };
    let sizes = (attributes.version, attributes.size_bytes as usize, attributes.payload_type, attributes.message_type);
    if domain != DOMAIN || sizes != (3, size_of::<Attributes>(), 1, 1) {
        log("push with wrong attributes");
        return -1;
    }
    // SAFETY: the type of the message says that it is a string that ends in a zero.
    let message = unsafe { CStr::from_ptr(attributes.message) }.to_string_lossy();
    let depth = DEPTH.replace(DEPTH.get() + 1);
    log(&format!("{}push {message} {}", "  ".repeat(depth), attributes.payload));
    depth as c_int
}

extern "C" fn domain_range_pop(domain: *mut c_void) -> c_int {
    let Some(depth) = DEPTH.get().checked_sub(1).filter(|_| domain == DOMAIN) else {
        log("pop without a push");
        return -2;
    };
    DEPTH.set(depth);
    log(&format!("{}pop", "  ".repeat(depth)));
    depth as c_int
}

/// The entry that NVTX looks for.
#[unsafe(no_mangle)]
extern "C" fn InitializeInjectionNvtx2(get_export_table: extern "C" fn(u32) -> *const c_void) -> c_int {
    if std::env::var_os("ANNULUS_VGPU_NVTX_LOG").is_none() {
        return 0;
    }
    let (callbacks, version) = (get_export_table(1).cast::<Callbacks>(), get_export_table(3).cast::<VersionInfo>());
    if callbacks.is_null() || version.is_null() || !get_export_table(2).is_null() {
        return 0;
    }
    // SAFETY: NVTX gives these tables for these numbers.
    let (callbacks, version) = unsafe { (&*callbacks, &*version) };
    if callbacks.size_bytes < size_of::<Callbacks>() || version.size_bytes < 16 || version.version != 3 {
        return 0;
    }
    (version.set_tool_version)(3);
    // Every table that a tool may ask for, with as many functions as NVTX 3.1 has.
    for (module, expected) in [(1, 16), (2, 9), (3, 15), (4, 7), (5, 16), (6, 7)] {
        let (mut table, mut len) = (std::ptr::null_mut(), 0);
        if (callbacks.get_function_table)(module, &mut table, &mut len) != 1 || len != expected {
            return 0;
        }
        if module == 5 {
            let functions = [
                (4, domain_range_push as *const c_void),
                (5, domain_range_pop as *const c_void),
                (12, domain_create as *const c_void),
            ];
            for (number, function) in functions {
                // SAFETY: the table has `len` pointers to places for functions, of which the first is null.
                unsafe { (*table.add(number)).write(function) };
            }
        }
    }
    if (callbacks.get_function_table)(7, std::ptr::null_mut(), std::ptr::null_mut()) != 0 {
        return 0;
    }
    1
}
