//! The strategy contract, row by row (`row_..`), on one rank and on several, and what it promises beyond a row.

mod collectives;
mod defaults;
mod gradients;
mod model;
mod nonfinite;
mod own_rule;
mod precision;
mod rows;
mod state;
mod statistics;
mod training;
