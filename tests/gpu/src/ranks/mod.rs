//! Ranks that share one device, which is all that a machine with one card has.

pub mod processes;
