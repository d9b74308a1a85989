//! Result codes of the driver API (DAPI 6.1, `CUresult`).

use std::ffi::CStr;

use crate::{refusal, tally};

/// A call's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub u32);

pub(crate) type Result<T> = std::result::Result<T, Status>;

macro_rules! codes {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        impl Status {
            $(pub(crate) const $name: Status = Status($code);)*

            /// `CUDA_ERROR_..` and the sentence for it.
            pub(crate) fn describe(code: u32) -> Option<(&'static CStr, &'static CStr)> {
                match code {
                    0 => Some((c"CUDA_SUCCESS", c"no error")),
                    $($code => {
                        const NAME: &str = concat!("CUDA_ERROR_", stringify!($name), "\0");
                        const TEXT: &str = concat!($text, " (virtual GPU)\0");
                        // Both end in their only zero.
                        Some((CStr::from_bytes_with_nul(NAME.as_bytes()).ok()?, CStr::from_bytes_with_nul(TEXT.as_bytes()).ok()?))
                    })*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_CONTEXT = 201, "invalid device context";
    MAP_FAILED = 205, "mapping of buffer object failed";
    PEER_ACCESS_UNSUPPORTED = 217, "peer access is not supported between these two devices";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain";
    OPERATING_SYSTEM = 304, "OS call failed or operation not supported on this OS";
    INVALID_HANDLE = 400, "invalid resource handle";
    ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated";
    PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled";
    PEER_ACCESS_NOT_ENABLED = 705, "peer access has not been enabled";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    MISALIGNED_ADDRESS = 716, "misaligned address";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    COOPERATIVE_LAUNCH_TOO_LARGE = 720, "too many blocks in cooperative launch";
    NOT_SUPPORTED = 801, "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture";
    STREAM_CAPTURE_MERGE = 902, "operation would result in a merge of separate capture sequences";
    STREAM_CAPTURE_UNMATCHED = 903, "capture was not ended in the same stream as it began";
    STREAM_CAPTURE_UNJOINED = 904, "capturing stream has unjoined work";
    STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream";
    STREAM_CAPTURE_IMPLICIT = 906, "operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT = 907, "operation not permitted on an event last recorded in a capturing stream";
    STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread";
    UNKNOWN = 999, "unknown error";
}

/// What a C caller gets.
pub(crate) fn answer<F: FnOnce() -> Result<()>>(work: F) -> u32 {
    // The type of the closure tells in which function it is.
    let place = std::any::type_name::<F>();
    let name = place.trim_end_matches("::{{closure}}").rsplit("::").next().unwrap_or(place);
    tally::note_call(name);
    match refusal::check(name).and_then(|()| work()) {
        Ok(()) => 0,
        Err(Status(code)) => code,
    }
}

/// Says on standard error why a call was refused, for the reader of a failed test.
pub(crate) fn refuse<T>(status: Status, why: &str) -> Result<T> {
    eprintln!("virtual GPU (process {}): {why}", std::process::id());
    Err(status)
}
