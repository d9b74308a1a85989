//! The strategy contract, row by row (`row_..`), on one rank and on several, and what it promises beyond a row.

mod collectives;
mod gradients;
mod model;
mod nonfinite;
mod precision;
mod rows;
mod state;
mod training;
