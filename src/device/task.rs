//! A unit of work for a stream: a closure stored inline, so that enqueueing allocates nothing.

use std::mem::{ManuallyDrop, MaybeUninit};

/// Room for a closure without a heap allocation; the largest of this crate's own (a collective) is asserted to fit.
pub(crate) const INLINE_BYTES: usize = 256;

type Storage = MaybeUninit<[u64; INLINE_BYTES / 8]>;

/// A `FnOnce() + Send`, moved in once and either run or dropped, never both.
pub(crate) struct Task {
    storage: Storage,
    /// Runs the closure at the pointer and leaves it moved out.
    run: unsafe fn(*mut u8),
    /// Drops the closure at the pointer unrun.
    discard: unsafe fn(*mut u8),
}

// SAFETY: `new` accepts only `Send` closures, and the task owns its closure.
unsafe impl Send for Task {}

impl Task {
    /// Whether `F` is stored without allocating.
    pub(crate) const fn fits<F>() -> bool {
        size_of::<F>() <= INLINE_BYTES && align_of::<F>() <= align_of::<Storage>()
    }

    /// Stores `work`; one that does not fit is boxed.
    pub(crate) fn new<F: FnOnce() + Send + 'static>(work: F) -> Task {
        if Task::fits::<F>() { Task::inline(work) } else { Task::inline(Box::new(work) as Box<dyn FnOnce() + Send>) }
    }

    fn inline<F: FnOnce() + Send + 'static>(work: F) -> Task {
        assert!(Task::fits::<F>());
        let mut storage = Storage::uninit();
        // SAFETY: the storage is large and aligned enough for F (asserted), and nothing else owns it.
        unsafe { storage.as_mut_ptr().cast::<F>().write(work) };
        Task { storage, run: run_at::<F>, discard: discard_at::<F> }
    }

    /// Runs the work.
    pub(crate) fn run(self) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: the storage holds the closure that `run` was made for; `this` is never dropped, so it is read once.
        unsafe { (this.run)(this.storage.as_mut_ptr().cast()) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: the storage still holds the closure: `run` forgets the task instead of dropping it.
        unsafe { (self.discard)(self.storage.as_mut_ptr().cast()) }
    }
}

/// # Safety
/// `at` points to an initialised `F` that nobody uses afterwards.
unsafe fn run_at<F: FnOnce()>(at: *mut u8) {
    // SAFETY: the caller's promise.
    let work = unsafe { at.cast::<F>().read() };
    work();
}

/// # Safety
/// `at` points to an initialised `F` that nobody uses afterwards.
unsafe fn discard_at<F>(at: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { at.cast::<F>().drop_in_place() }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_task_is_run_or_dropped_exactly_once_inline_or_boxed() {
        let owner = Arc::new(());
        let (small, large) = (Arc::clone(&owner), (Arc::clone(&owner), [0u8; 2 * INLINE_BYTES]));
        assert!(Task::fits::<Arc<()>>() && !Task::fits::<(Arc<()>, [u8; 2 * INLINE_BYTES])>());
        let run = Task::new(move || assert!(Arc::strong_count(&small) >= 1));
        let dropped = Task::new(move || drop(large));
        assert_eq!(Arc::strong_count(&owner), 3);
        run.run();
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(dropped);
        assert_eq!(Arc::strong_count(&owner), 1);
    }
}
