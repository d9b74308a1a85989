//! What ranks that are threads of one process hand to each other: the thing itself, by a number that can be told.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

type Offers = HashMap<u64, Box<dyn Any + Send>>;

/// The last number given, and what is on offer.
static ON_OFFER: Mutex<(u64, Option<Offers>)> = Mutex::new((0, None));

/// Something on offer, until this is dropped.
pub(super) struct OnOffer(u64);

impl OnOffer {
    pub(super) fn new<T: Any + Clone + Send>(thing: &T) -> OnOffer {
        let mut offers = ON_OFFER.lock().unwrap_or_else(PoisonError::into_inner);
        offers.0 += 1;
        let number = offers.0;
        offers.1.get_or_insert_default().insert(number, Box::new(thing.clone()));
        OnOffer(number)
    }

    pub(super) fn number(&self) -> u64 {
        self.0
    }

    /// What is on offer under `number`, if it is a `T`.
    pub(super) fn take_up<T: Any + Clone + Send>(number: u64) -> Option<T> {
        let offers = ON_OFFER.lock().unwrap_or_else(PoisonError::into_inner);
        offers.1.as_ref()?.get(&number)?.downcast_ref().cloned()
    }
}

impl Drop for OnOffer {
    fn drop(&mut self) {
        if let Some(offers) = &mut ON_OFFER.lock().unwrap_or_else(PoisonError::into_inner).1 {
            offers.remove(&self.0);
        }
    }
}
