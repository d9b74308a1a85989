//! What an operation is, in the words on which all ranks must agree before a byte moves.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::{Algorithm, Collective, Schedule};

/// How partial sums of 16-bit floats travel in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Partials {
    /// As f32: rounded once, at the end; 1.5 times the bytes.
    #[default]
    F32,
    /// In the element type: rounded at every hop.
    Native,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    AllReduce = 1,
    ReduceScatter = 2,
    AllGather = 3,
    Broadcast = 4,
    Barrier = 5,
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Kind::AllReduce => "all_reduce",
            Kind::ReduceScatter => "reduce_scatter",
            Kind::AllGather => "all_gather",
            Kind::Broadcast => "broadcast",
            Kind::Barrier => "barrier",
        }
    }

    pub(super) const fn reduces(self) -> bool {
        matches!(self, Kind::AllReduce | Kind::ReduceScatter)
    }

    fn from_code(code: u8) -> Option<Kind> {
        [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::Broadcast, Kind::Barrier]
            .into_iter()
            .find(|kind| *kind as u8 == code)
    }
}

/// An operation as one rank issued it. Plain bytes: ranks compare them as they lie on each other's flag page.
#[derive(Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub(super) struct Descriptor {
    /// Position in the communicator's order, from 1.
    pub(super) sequence: u64,
    /// Elements of the whole vector (reduce-scatter, all-gather: world size times the shard).
    pub(super) len_elems: u64,
    factor_bits: u64,
    pub(super) root: u32,
    kind: u8,
    dtype: u8,
    op: u8,
    /// 0: chosen by the library; else the algorithm asked for.
    algorithm: u8,
    native_partials: u8,
    zero: [u8; 7],
}

const _: () = assert!(size_of::<Descriptor>() == 40);

impl Descriptor {
    pub(super) fn new(
        sequence: u64,
        kind: Kind,
        dtype: DType,
        len_elems: usize,
        op: ReduceOp,
        root: u32,
        (algorithm, partials): (Option<Algorithm>, Partials),
    ) -> Descriptor {
        // What an operation does not look at is no difference.
        let (algorithm, partials) = match kind {
            Kind::Barrier => (None, Partials::F32),
            _ => (algorithm, partials),
        };
        let (op, factor_bits) = match op {
            ReduceOp::Sum => (0, 0),
            ReduceOp::Avg => (1, 0),
            ReduceOp::Min => (2, 0),
            ReduceOp::Max => (3, 0),
            ReduceOp::PremulSum(factor) => (4, factor.to_bits()),
        };
        Descriptor {
            sequence,
            len_elems: len_elems as u64,
            factor_bits,
            root,
            kind: kind as u8,
            dtype: dtype as u8,
            op,
            algorithm: match algorithm {
                None => 0,
                Some(Algorithm::Ring) => 1,
                Some(Algorithm::Direct) => 2,
            },
            native_partials: u8::from(partials == Partials::Native),
            zero: [0; 7],
        }
    }

    /// Of everything but the sequence: equal for operations that can run together. Any two that differ in one field differ.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub(super) fn hash(&self) -> u32 {
        let of_anything = Descriptor { sequence: 0, ..*self };
        crc32fast::hash(bytemuck::bytes_of(&of_anything))
    }

    pub(super) fn kind(&self) -> Kind {
        Kind::from_code(self.kind).unwrap_or(Kind::Barrier)
    }

    pub(super) fn dtype(&self) -> DType {
        DType::from_code(self.dtype).unwrap_or(DType::U8)
    }

    pub(super) fn op(&self) -> ReduceOp {
        match self.op {
            1 => ReduceOp::Avg,
            2 => ReduceOp::Min,
            3 => ReduceOp::Max,
            4 => ReduceOp::PremulSum(f64::from_bits(self.factor_bits)),
            _ => ReduceOp::Sum,
        }
    }

    /// Elements that a rank gives and receives.
    pub(super) fn sizes_elems(&self, world_size: u32) -> (u64, u64) {
        let shard = self.len_elems / u64::from(world_size.max(1));
        match self.kind() {
            Kind::ReduceScatter => (self.len_elems, shard),
            Kind::AllGather => (shard, self.len_elems),
            Kind::AllReduce | Kind::Broadcast | Kind::Barrier => (self.len_elems, self.len_elems),
        }
    }

    /// The algorithm that runs when it does not run over mapped memory or in one step.
    pub(super) fn algorithm(&self) -> Algorithm {
        if self.algorithm == 1 { Algorithm::Ring } else { Algorithm::Direct }
    }

    pub(super) fn partials(&self) -> Partials {
        if self.native_partials == 0 { Partials::F32 } else { Partials::Native }
    }

    /// The plan of this operation with rounds of at most `round_elems` elements of a shard.
    pub(super) fn schedule(&self, world_size: u32, round_elems: usize) -> Result<Schedule> {
        let collective = match self.kind() {
            Kind::AllReduce | Kind::Barrier => Collective::AllReduce,
            Kind::ReduceScatter => Collective::ReduceScatter,
            Kind::AllGather => Collective::AllGather,
            Kind::Broadcast => Collective::Broadcast { root: self.root },
        };
        // Shards of an all-reduce begin on cache lines, so that no two ranks write one line.
        let align_elems = 64 / self.dtype().size_bytes();
        Schedule::new(collective, self.algorithm(), world_size, self.len_elems as usize, round_elems, align_elems)
    }

    /// The error of a rank that finds `theirs` on the page of `peer`.
    #[cold]
    pub(super) fn mismatch(&self, rank: u32, peer: u32, theirs: &Descriptor) -> Error {
        Error::Mismatch { sequence: self.sequence, rank, mine: self.to_string(), peer, theirs: theirs.to_string() }
    }
}

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kind) = Kind::from_code(self.kind) else { return write!(f, "nothing that is known") };
        write!(f, "{}(", kind.name())?;
        if kind != Kind::Barrier {
            write!(f, "{} x {}", self.len_elems, self.dtype())?;
        }
        if kind.reduces() {
            write!(f, ", {}", self.op())?;
        }
        if kind == Kind::Broadcast {
            write!(f, ", root {}", self.root)?;
        }
        match self.algorithm {
            0 => {}
            1 => write!(f, ", ring")?,
            _ => write!(f, ", direct")?,
        }
        if self.native_partials != 0 {
            write!(f, ", native partials")?;
        }
        write!(f, ") at sequence {}", self.sequence)
    }
}
