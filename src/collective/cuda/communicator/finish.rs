//! What a rank also makes of the sums of its shard while it has them in f32 (f64 of f64), before they are rounded: no second
//! pass over memory. For optimizers that are sharded as the reduction is: norm, overflow and narrow copy of a shard come with it.
//!
//! `Ddp` asks for none of it. The norm of its steps has the same bits whatever the buckets are, while squares are added here by
//! shard; it finds what is not finite on every rank in the pass over the gradients that it makes anyway; and nobody reads a cast
//! copy of its gradients.

use super::{Communicator, extent};
use crate::collective::cuda::Way;
use crate::collective::descriptor::Kind;
use crate::collective::operands::{all_shards, check_extent};
use crate::device::cuda::{Stream, View};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};

/// What to make of the finished sums of one's own shard.
#[derive(Debug, Clone, Default)]
pub struct Finish {
    /// `[shard]` f32, f16 or bf16, of f64 sums f32 only: the sums, rounded once to that type. Apart from source and result.
    pub cast: Option<View>,
    /// `[1]` f64: the sum of their squares, in f64. The same bits for the same call on views that begin alike behind 16 bytes;
    /// another alignment, world or communicator may add in another order.
    pub sum_squares: Option<View>,
    /// `[1]` i32: becomes 1 if one of them is infinite or NaN, else it stays as it is.
    pub found_nonfinite: Option<View>,
}

/// Where the kernel leaves it: addresses, or 0.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Finishing {
    /// Of what would be element 0 of the whole vector.
    pub cast_output: u64,
    pub cast_dtype: u32,
    pub squares: u64,
    pub sum_squares: u64,
    pub found_nonfinite: u64,
}

impl Communicator {
    /// As [`reduce_scatter`](Communicator::reduce_scatter) of floats, and what `finish` asks for besides, of this rank's shard.
    /// Ranks may ask for different things. Only where every rank has a device of its own ([`Way::Persistent`]).
    ///
    /// # Errors
    /// As [`reduce_scatter`](Communicator::reduce_scatter); [`Error::Unsupported`] for integers and for a copy in another type;
    /// [`Error::InvalidArgument`] where ranks share devices, and for a copy that overlaps source or result.
    pub fn reduce_scatter_finish(
        &mut self,
        src: &View,
        dst: &View,
        op: ReduceOp,
        finish: &Finish,
        stream: &Stream,
    ) -> Result<()> {
        let finishing = self.finishing([src, dst], finish)?;
        let all_elems = all_shards(dst.len_elems(), self.world_size())?;
        check_extent("reduce_scatter_finish: src", extent(src), (dst.dtype(), all_elems))?;
        let call = self.call(Kind::ReduceScatter, src.dtype(), src.len_elems(), op, 0)?;
        let Finish { cast, sum_squares, found_nonfinite } = finish;
        for view in [cast, sum_squares, found_nonfinite].into_iter().flatten() {
            self.check_view(view)?;
        }
        // A graph may outlive the views.
        stream.keep(finish);
        self.issue(call, [src, dst], finishing, stream)
    }

    fn finishing(&self, [src, dst]: [&View; 2], finish: &Finish) -> Result<Finishing> {
        let float = [DType::F32, DType::F16, DType::BF16, DType::F64].contains(&dst.dtype());
        if !float {
            return Err(Error::Unsupported { op: "reduce_scatter_finish".to_owned(), dtype: dst.dtype() });
        }
        if self.way() != Way::Persistent {
            return Err(Error::InvalidArgument {
                argument: "reduce_scatter_finish",
                value: format!("ranks that share devices: {:?}", self.way()),
                accepted: "every rank must have a device of its own",
            });
        }
        let mut finishing = Finishing::default();
        if let Some(cast) = &finish.cast {
            let accepted: &[DType] = match dst.dtype() {
                DType::F64 => &[DType::F32], // two roundings would not be one
                _ => &[DType::F32, DType::F16, DType::BF16],
            };
            if !accepted.contains(&cast.dtype()) {
                return Err(Error::Unsupported { op: "reduce_scatter_finish: cast".to_owned(), dtype: cast.dtype() });
            }
            check_extent("reduce_scatter_finish: cast", extent(cast), (cast.dtype(), dst.len_elems()))?;
            if overlap(cast, src) || overlap(cast, dst) {
                return Err(Error::InvalidArgument {
                    argument: "reduce_scatter_finish: cast",
                    value: "memory of the source or the result".to_owned(),
                    accepted: "must be apart from both",
                });
            }
            // The lengths fit an address, so this does; it is only ever added to.
            let before_bytes = u64::from(self.rank()).wrapping_mul(cast.len_bytes() as u64);
            finishing.cast_output = cast.address().wrapping_sub(before_bytes);
            finishing.cast_dtype = cast.dtype() as u32;
        }
        if let Some(sum) = &finish.sum_squares {
            check_extent("reduce_scatter_finish: sum_squares", extent(sum), (DType::F64, 1))?;
            finishing.squares = self.squares.address();
            finishing.sum_squares = sum.address();
        }
        if let Some(found) = &finish.found_nonfinite {
            check_extent("reduce_scatter_finish: found_nonfinite", extent(found), (DType::I32, 1))?;
            finishing.found_nonfinite = found.address();
        }
        Ok(finishing)
    }
}

fn overlap(one: &View, other: &View) -> bool {
    let end = |view: &View| view.address() + view.len_bytes() as u64;
    one.address() < end(other) && other.address() < end(one)
}
