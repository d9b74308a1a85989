//! The schedules, checked as data.
//!
//! - `plans`: small collectives written out by hand.
//! - `simulator`: runs any plan symbolically, over links with few slots and with ranks at arbitrary relative speeds. It
//!   knows peers, spans and actions, but not how a plan is computed.
//! - `properties`: what holds for every collective, world size, length, round and alignment.
//! - `mutants`: plans and machines with one fault each. The simulator must refuse all of them.

mod mutants;
mod plans;
mod properties;
mod simulator;
