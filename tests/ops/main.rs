//! The host operations against `annulus::reference`: over dtypes, lengths, alignments, special values and CPU levels.

mod casts;
mod clipping;
mod inputs;
mod norms;
mod optimizers;
mod scaling;
