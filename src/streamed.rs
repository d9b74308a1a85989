//! Stores past the caches: whole lines go to memory, and what a line held before is not fetched first.

/// What is stored at once.
pub(crate) const LINE_BYTES: usize = 64;

/// Stores one line.
///
/// # Safety
/// Both are valid for [`LINE_BYTES`] and disjoint; `to` lies on a line, which nobody else accesses until [`fence`] is behind this.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn store_line(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
    // SAFETY: four parts of a line each; SSE2 is part of x86-64.
    unsafe {
        let parts = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
        for (part, value) in parts.into_iter().enumerate() {
            _mm_stream_si128(to.add(part), value);
        }
    }
}

/// Copies; whole lines of the target are streamed.
///
/// # Safety
/// Both are valid for `len_bytes` and disjoint, and nobody else accesses them until [`fence`] is behind this.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len_bytes: usize) {
    let head = to.align_offset(LINE_BYTES).min(len_bytes);
    let lines = (len_bytes - head) / LINE_BYTES;
    let tail = head + lines * LINE_BYTES;
    // SAFETY: head, lines and tail are `len_bytes` together; `to + head` lies on a line.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        for line in 0..lines {
            let at = head + line * LINE_BYTES;
            store_line(from.add(at), to.add(at));
        }
        std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), len_bytes - tail);
    }
}

/// No release orders streamed stores: this comes between them and whatever tells others of them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn fence() {
    // SAFETY: SSE is part of x86-64.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// # Safety
/// Both are valid for `len_bytes` and disjoint, and nobody else accesses them.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len_bytes: usize) {
    // SAFETY: the caller's promises.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) }
}

/// # Safety
/// Both are valid for [`LINE_BYTES`] and disjoint, and nobody else accesses them.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn store_line(from: *const u8, to: *mut u8) {
    // SAFETY: the caller's promises.
    unsafe { std::ptr::copy_nonoverlapping(from, to, LINE_BYTES) }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn fence() {}
