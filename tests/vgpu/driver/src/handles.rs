//! Handles of things that a program makes and destroys.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::status::{Result, Status, refuse};

/// Values by handle. A handle is never given out twice, so a stale one is found out.
pub(crate) struct Handles<T> {
    values: LazyLock<Mutex<HashMap<u64, Arc<T>>>>,
    next: AtomicU64,
    what: &'static str,
    /// What the reference says of a handle that is none.
    unknown: Status,
}

impl<T> Handles<T> {
    /// `what`: the noun for messages; handles count up from `first`.
    pub const fn new(what: &'static str, first: u64, unknown: Status) -> Handles<T> {
        Handles { values: LazyLock::new(Mutex::default), next: AtomicU64::new(first), what, unknown }
    }

    fn values(&self) -> MutexGuard<'_, HashMap<u64, Arc<T>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, value: T) -> u64 {
        let handle = self.next.fetch_add(0x10, Ordering::Relaxed);
        self.values().insert(handle, Arc::new(value));
        handle
    }

    pub fn get(&self, handle: u64) -> Result<Arc<T>> {
        let found = self.values().get(&handle).cloned();
        found.map_or_else(|| refuse(self.unknown, &format!("{handle:#x} is no {}", self.what)), Ok)
    }

    pub fn remove(&self, handle: u64) -> Result<()> {
        let removed = self.values().remove(&handle);
        removed.map(drop).map_or_else(|| refuse(self.unknown, &format!("{handle:#x} is no {}", self.what)), Ok)
    }
}
