//! The functions of the library, one file per topic of the driver API, and the C values that they take.
//!
//! That pointers are what the API's documentation says they are is the caller's contract with any CUDA driver; [`Out`],
//! [`In`] and [`Text`] are where it is relied on.
#![allow(non_snake_case, reason = "the names are the driver API's")]

mod context;
mod copies;
mod events;
mod graphs;
mod launches;
mod memory;
mod modules;
mod sharing;
mod streams;
mod symbols;

use std::ffi::{CStr, c_char};

use crate::status::{Result, Status};

/// A place for a result.
#[repr(transparent)]
struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Fills the place; CUDA_ERROR_INVALID_VALUE for a null one, as for any parameter that is "not within an acceptable range
    /// of values" (DAPI 6.1). [`In`] and [`Text`] likewise.
    fn give(&self, value: T) -> Result<()> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the driver API asks its caller for null or a place that holds a T.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Fills the place, if the caller wants the value.
    fn give_if_wanted(&self, value: T) {
        let _ = self.give(value); // null means unwanted
    }
}

/// A value, or an array, passed by pointer.
#[repr(transparent)]
struct In<T>(*const T);

impl<T: Copy> In<T> {
    fn get(&self) -> Result<T> {
        self.at(0)
    }

    /// The `index`-th of an array.
    fn at(&self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the driver API asks its caller for null or so many values; `index` is below the number it was told.
        Ok(unsafe { self.0.wrapping_add(index).read_unaligned() })
    }
}

/// A zero-terminated string.
#[repr(transparent)]
struct Text(*const c_char);

impl Text {
    fn get(&self) -> Result<String> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the driver API asks its caller for null or a string that ends in a zero.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}
