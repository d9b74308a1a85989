//! Which numbers a model is trained in.
//!
//! | precision | model weights | master weights | gradients | loss scaling |
//! |---|---|---|---|---|
//! | `F32True` | f32 | the model's | f32 | no |
//! | `Bf16Mixed` | bf16 | f32 | f32 | no |
//! | `F16Mixed` | f16 | f32 | f32 | dynamic |
//! | `Bf16True` | bf16 | none | bf16 | no |
//! | `F16True` | f16 | none | f16 | no |
//!
//! Moments are f32 throughout. In the mixed modes the step is computed on the f32 master weights and then rounded into the
//! model weights, once: what Fabric's autocast does to f32 weights at every use. Gradients of the mixed modes are kept in
//! f32, so that accumulation over micro-batches loses nothing; `StrategyOptions::gradient_dtype` makes them 16 bits wide, which
//! halves what the ranks exchange (PyTorch's `bf16_compress_hook`). The true modes have no master weights: the step is
//! computed in f32 and rounded into the weights.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// The precision of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32True,
    /// bf16 weights over f32 master weights.
    Bf16Mixed,
    /// f16 weights over f32 master weights, with a dynamically scaled loss.
    F16Mixed,
    /// bf16 weights only.
    Bf16True,
    /// f16 weights only.
    F16True,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Precision; 5] =
        [Precision::F32True, Precision::Bf16Mixed, Precision::F16Mixed, Precision::Bf16True, Precision::F16True];

    /// Type of the weights that the forward pass reads.
    pub const fn model_dtype(self) -> DType {
        match self {
            Precision::F32True => DType::F32,
            Precision::Bf16Mixed | Precision::Bf16True => DType::BF16,
            Precision::F16Mixed | Precision::F16True => DType::F16,
        }
    }

    /// Type in which gradients are accumulated and reduced, unless the options say otherwise.
    pub const fn gradient_dtype(self) -> DType {
        match self {
            Precision::F32True | Precision::Bf16Mixed | Precision::F16Mixed => DType::F32,
            Precision::Bf16True => DType::BF16,
            Precision::F16True => DType::F16,
        }
    }

    /// Whether each parameter has f32 weights behind the model's.
    pub const fn has_master(self) -> bool {
        matches!(self, Precision::Bf16Mixed | Precision::F16Mixed)
    }

    /// Whether the loss is scaled: f16 gradients of an unscaled loss would vanish.
    pub const fn scales_loss(self) -> bool {
        matches!(self, Precision::F16Mixed)
    }

    /// Type of state that is not trained (running means and the like).
    pub const fn buffer_dtype(self) -> DType {
        if self.has_master() { DType::F32 } else { self.model_dtype() }
    }

    /// The name Fabric gives it.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32True => "32-true",
            Precision::Bf16Mixed => "bf16-mixed",
            Precision::F16Mixed => "16-mixed",
            Precision::Bf16True => "bf16-true",
            Precision::F16True => "16-true",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Precision::ALL.into_iter().find(|precision| precision.name() == name).ok_or_else(|| Error::InvalidArgument {
            argument: "precision",
            value: name.to_owned(),
            accepted: "one of 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true",
        })
    }
}
