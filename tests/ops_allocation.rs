//! Nothing allocates after setup: every operation is run under an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use annulus::NormType;
use annulus::ops::{
    AdamWOptions, GradScaler, NormSlots, Rounding, RoundingKey, Saturate, SgdOptions, Slice, SliceMut, StepSignal,
    Weights, adamw_step, cast, cast_stochastic, clip_coef, clip_value, grad_norm, scale_in_place, sgd_step,
};
use half::{bf16, f16};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes every call on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LEN: usize = 70_001;

struct Step {
    gradient: Vec<f32>,
    wide: Vec<f64>,
    master: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    model: Vec<bf16>,
    half: Vec<f16>,
    slots: NormSlots,
    scaler: GradScaler,
}

impl Step {
    fn run(&mut self) {
        let Step { gradient, wide, master, exp_avg, exp_avg_sq, model, half, slots, scaler } = self;
        let key = RoundingKey { seed: 1, step: 2 };
        cast(Slice::F32(gradient), SliceMut::F16(half), Saturate::Yes).unwrap();
        cast(Slice::F16(half), SliceMut::F64(wide), Saturate::No).unwrap();
        cast_stochastic(Slice::F32(gradient), SliceMut::BF16(model), key, 3, Saturate::No).unwrap();
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.5)] {
            let tensors = [Slice::F32(gradient), Slice::BF16(model), Slice::F16(half), Slice::F64(wide)];
            grad_norm(&tensors, norm_type, slots).unwrap();
        }
        slots.unscale_at(0, 0, Slice::F16(half), SliceMut::F32(gradient), scaler.inv_scale()).unwrap();
        let norm = slots.combine().unwrap();
        let signal = StepSignal { clip_coef: clip_coef(norm.total_norm, 1.0), ..StepSignal::default() };
        scale_in_place(SliceMut::F32(gradient), signal.clip_coef);
        clip_value(SliceMut::F32(gradient), 0.5).unwrap();
        let weights = Weights::Master { master, model: Some(SliceMut::BF16(model)) };
        adamw_step(&AdamWOptions::default(), 1, signal, weights, Slice::F32(gradient), exp_avg, exp_avg_sq).unwrap();
        let options = SgdOptions { momentum: 0.9, ..SgdOptions::default() };
        let rounding = Rounding::Stochastic { key, first_index: 0 };
        let weights = Weights::Model { model: SliceMut::F16(half), rounding };
        sgd_step(&options, signal, weights, Slice::F32(gradient), exp_avg).unwrap();
        scaler.update(norm.nonfinite);
    }
}

#[test]
fn no_operation_allocates() {
    let mut step = Step {
        gradient: vec![0.25; LEN],
        wide: vec![0.0; LEN],
        master: vec![1.0; LEN],
        exp_avg: vec![0.0; LEN],
        exp_avg_sq: vec![0.0; LEN],
        model: vec![bf16::ZERO; LEN],
        half: vec![f16::ZERO; LEN],
        slots: NormSlots::new(&[LEN; 4]).unwrap(),
        scaler: GradScaler::default(),
    };
    let before = ALLOCATIONS.get();
    step.run();
    assert_eq!(ALLOCATIONS.get(), before);
    drop(vec![0u8; 100]);
    assert_eq!(ALLOCATIONS.get(), before + 1, "the allocator counts");
}
