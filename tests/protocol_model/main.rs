//! Every interleaving of small worlds: the real schedules over a model of the flag protocol.
//!
//! - `protocol`: the model. Slots, generations of three bits compared on the circle (so that they wrap within one
//!   operation), the death of any one rank at any point, and the two ways in which survivors learn of it.
//! - `program`: what each rank executes.
//! - `value`: what moves, and which results are exact.
//! - `staged`: the host's protocol for `Direct`, where several ranks read one slot.
//! - `meeting`: the host's meetings, and what runs behind them without staging: one step, mapped memory, barriers.
//! - `calls`: what ranks call there.
//! - `worlds`: what is checked, for worlds of 1 to 4 ranks.
//! - `mutants`: protocols with one fault each, which the checker must refuse.
//!
//! The model is sequentially consistent: it proves the protocol, not the memory orders (`tests/loom.rs` does that).

mod calls;
mod meeting;
mod mutants;
mod program;
mod protocol;
mod staged;
mod value;
mod worlds;
