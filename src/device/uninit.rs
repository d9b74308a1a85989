//! The promise behind uninitialised memory.

/// Leave to hand out memory whose contents are whatever they are: freshly allocated arena memory holds zeroes, memory
/// that was used before holds what was left in it.
///
/// The strategy layer, which has no `unsafe` code, takes this token as the proof that somebody made the promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uninit(());

impl Uninit {
    /// Makes the promise.
    ///
    /// # Safety
    /// - Every element of every buffer made with this token is written (filled, loaded from a checkpoint, or received by a
    ///   broadcast) before it is read, by this rank or, after `setup_module` has broadcast it, by another.
    pub unsafe fn assume_overwritten() -> Uninit {
        Uninit(())
    }
}
