//! DAPI 6.7, 6.8, 6.31: primary contexts, the current context, peers.

use std::ffi::{c_int, c_uint};

use super::Out;
use crate::capture;
use crate::device::{self, GREATEST_PRIORITY, LEAST_PRIORITY};
use crate::status::{Status, answer};
use crate::stream::Stream;

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<u64>, number: c_int) -> u32 {
    answer(|| context.give(device::retain(number)?))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(number: c_int) -> u32 {
    answer(|| device::release(number))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: u64) -> u32 {
    answer(|| device::set_current(context))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: Out<u64>) -> u32 {
    answer(|| {
        device::check_initialized()?;
        context.give(device::current_handle())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(out: Out<c_int>) -> u32 {
    // Seen to work in a context that has failed.
    answer(|| out.give(device::device_of(device::current_handle())? as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_context_question(number)?;
        Stream::synchronize_device(number)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) -> u32 {
    answer(|| {
        device::current()?;
        least.give_if_wanted(LEAST_PRIORITY);
        greatest.give_if_wanted(GREATEST_PRIORITY);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceCanAccessPeer(answered: Out<c_int>, number: c_int, peer: c_int) -> u32 {
    answer(|| answered.give(device::can_access_peer(number, peer)?.into()))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxEnablePeerAccess(peer: u64, flags: c_uint) -> u32 {
    answer(|| match flags {
        0 => device::enable_peer(device::current()?, device::device_of(peer)?),
        // DAPI 6.31: "if Flags is not 0".
        _ => Err(Status::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDisablePeerAccess(peer: u64) -> u32 {
    answer(|| device::disable_peer(device::current()?, device::device_of(peer)?))
}
