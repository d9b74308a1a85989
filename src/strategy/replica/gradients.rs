//! Backward: gradients into buckets, full buckets into reduction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Replica, ReplicatedModule};
use crate::collective::Communicator;
use crate::device::{Event, Stream};
use crate::dtype::ReduceOp;
use crate::error::{Error, Result};
use crate::ops::{Slice, SliceMut};
use crate::strategy::bucket::Gradients;
use crate::strategy::cuda::DeviceReceiver;
use crate::strategy::gate::{Gate, lock};
use crate::strategy::gradient::{BucketProgress, GradSink, Receiver, contribute};
use crate::strategy::module::{Module, Parameter};
use crate::strategy::statistics::Counters;
use crate::telemetry::trace::now_ns;

/// While it lives, backward of its module accumulates gradients without reducing them. Made by
/// `Strategy::no_backward_sync`.
#[must_use = "gradients are reduced again as soon as it is dropped"]
#[derive(Debug)]
pub struct NoSyncGuard {
    /// The module's count of guards; none if this one was made disabled. A count, because guards may be dropped in any
    /// order.
    guards: Option<Arc<AtomicU32>>,
}

impl Drop for NoSyncGuard {
    fn drop(&mut self) {
        if let Some(guards) = &self.guards {
            // Relaxed: read by the thread that calls backward, which is the one that holds the strategy.
            guards.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Replica {
    pub fn no_backward_sync(&self, module: &dyn Module, enabled: bool) -> Result<NoSyncGuard> {
        let number = self.module_number(module)?;
        let guards = enabled.then(|| Arc::clone(&self.modules[number].no_sync_guards));
        if let Some(guards) = &guards {
            // Relaxed: see the guard.
            guards.fetch_add(1, Ordering::Relaxed);
        }
        Ok(NoSyncGuard { guards })
    }

    /// Ends the job with an error of this rank's `part` of a step: the other ranks wait for reductions that this one will not
    /// start.
    pub(super) fn fail_together(&self, part: &str, error: Error) -> Error {
        if self.world.world_size() > 1 {
            self.world.raise(Error::RankFailed { rank: self.world.rank(), reason: format!("in {part}: {error}") });
            self.gate.fail(error.clone());
        }
        error
    }

    /// Reports the error of a norm that was to be reported by the next call.
    pub(super) fn report_deferred(&mut self) -> Result<()> {
        let Some(slot) = self.deferred.take() else { return Ok(()) };
        slot.wait(self.gate.timeout())?;
        slot.take_nonfinite().map_or(Ok(()), Err)
    }

    pub fn run_backward(
        &mut self,
        module: &dyn Module,
        body: &mut dyn FnMut(&mut GradSink<'_>) -> Result<()>,
    ) -> Result<()> {
        let number = self.module_number(module)?;
        self.check()?;
        self.report_deferred()?;
        if self.device.is_none() {
            // The loss scale is that which the step in flight leaves behind. On a device it is read there.
            self.gate.wait()?;
        }
        let span = self.options.timeline.open(self.track, "backward", self.backwards, 0);
        let ReplicatedModule { gradients, no_sync_guards, .. } = &mut self.modules[number];
        let synchronize = !self.reduces || no_sync_guards.load(Ordering::Relaxed) == 0;
        let reduces = self.reduces && synchronize;
        let done = match &mut self.device {
            Some(device) => device
                .begin_backward(number, gradients, reduces, synchronize, &self.gate)
                .and_then(|mut backward| body(&mut GradSink::new(&mut backward)).and_then(|()| backward.finish())),
            None => {
                if !gradients.has_any() {
                    gradients.loss_scale = match self.options.precision.scales_loss() {
                        true => lock(&self.scaler).scale(),
                        false => 1.0,
                    };
                }
                gradients.begin();
                let mut backward = RunningBackward {
                    number,
                    gradients,
                    communicator: &mut self.communicator,
                    reduces,
                    synchronize,
                    compute: &self.compute,
                    communication: &self.communication,
                    filled: &self.filled,
                    gate: &self.gate,
                    counters: &self.counters,
                };
                body(&mut GradSink::new(&mut backward)).and_then(|()| backward.finish())
            }
        };
        let gradients = &mut self.modules[number].gradients;
        if let Err(error) = done {
            let all = 0..gradients.parameters.len();
            gradients.discard(all);
            return Err(if reduces { self.fail_together("backward", error) } else { error });
        }
        gradients.unreduced = !synchronize;
        Counters::add(&self.counters.backwards, 1);
        let start_ns = span.start_ns();
        Counters::add(&self.counters.backward_ns, span.close().saturating_sub(start_ns));
        self.backwards = self.backwards.wrapping_add(1);
        Ok(())
    }
}

/// A backward that is going on.
struct RunningBackward<'r> {
    number: usize,
    gradients: &'r mut Gradients,
    communicator: &'r mut Communicator,
    /// Whether full buckets are reduced.
    reduces: bool,
    /// Whether gradients are complete after this backward.
    synchronize: bool,
    compute: &'r Stream,
    communication: &'r Stream,
    filled: &'r Event,
    gate: &'r Gate,
    counters: &'r Arc<Counters>,
}

impl Receiver for RunningBackward<'_> {
    fn receive(&mut self, parameter: &Parameter, gradient: Slice<'_>, is_last: bool) -> Result<()> {
        self.gate.check()?;
        let index = self.gradients.expect(self.number, self.gate, parameter, gradient.len_elems())?;
        let replace = !self.gradients.has(index);
        let place = &self.gradients.host_gradients()[index];
        self.compute.run(|| place.write(|target| contribute(target, gradient, replace)))??;
        self.gradients.touch(index);
        if is_last {
            self.gradients.set_ready(index);
            self.launch_full()?;
        }
        Ok(())
    }

    fn loss_scale(&self) -> Result<f32> {
        Ok(self.gradients.loss_scale)
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceReceiver> {
        None
    }

    fn is_synchronizing(&self) -> bool {
        self.synchronize
    }

    fn buckets(&self) -> BucketProgress {
        let launched = self.gradients.launched();
        let reduced = match self.reduces {
            true => self.gradients.host_buckets()[..launched].iter().filter(|bucket| bucket.is_reduced()).count(),
            false => 0,
        };
        BucketProgress { total: self.gradients.len_buckets(), launched, reduced }
    }
}

impl RunningBackward<'_> {
    /// Starts the reductions whose turn has come.
    fn launch_full(&mut self) -> Result<()> {
        if !self.reduces {
            return Ok(());
        }
        while let Some(bucket) = self.gradients.take_full() {
            let size_bytes = self.gradients.bucket_bytes(bucket) as u64;
            // The whole overlap: what fills the next bucket goes on while this one is reduced behind the event.
            self.compute.record(self.filled)?;
            self.communication.wait(self.filled)?;
            let counters = Arc::clone(self.counters);
            self.communication.enqueue(move || counters.reduction_start_ns.store(now_ns(), Ordering::Relaxed))?;
            let (communicator, communication) = (&mut *self.communicator, self.communication);
            self.gradients.host_buckets()[bucket]
                .launch(|buffer| communicator.all_reduce(buffer, ReduceOp::Avg, communication))?;
            let counters = Arc::clone(self.counters);
            self.communication.enqueue(move || {
                let start_ns = counters.reduction_start_ns.load(Ordering::Relaxed);
                Counters::add(&counters.reduction_ns, now_ns().saturating_sub(start_ns));
                Counters::add(&counters.reduced_bytes, size_bytes);
            })?;
            self.gradients.unjoined = true;
        }
        Ok(())
    }

    /// No gradient comes any more.
    fn finish(&mut self) -> Result<()> {
        for index in 0..self.gradients.parameters.len() {
            // A parameter that was not used has a gradient of zero, on every rank or on this one only: the average needs
            // it. Without a reduction what earlier micro-batches left is complete as it is.
            if self.synchronize && !self.gradients.has(index) {
                let place = &self.gradients.host_gradients()[index];
                self.compute.run(|| {
                    place.write(|target| {
                        match target {
                            SliceMut::F32(elements) => elements.fill(0.0),
                            SliceMut::F16(elements) => elements.fill(half::f16::ZERO),
                            SliceMut::BF16(elements) => elements.fill(half::bf16::ZERO),
                            SliceMut::F64(elements) => elements.fill(0.0),
                        }
                        Ok(())
                    })
                })??;
                self.gradients.touch(index);
            }
            self.gradients.set_ready(index);
            self.launch_full()?;
        }
        Ok(())
    }
}
