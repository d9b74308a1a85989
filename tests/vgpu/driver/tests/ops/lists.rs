//! Casts, clipping and contributions; and what the launches of a step do not do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use annulus::abi::{PROBE_THREADS, ProbeArguments};
use annulus::device::cuda::{Buffer, Event, Shape, View};
use annulus::ops::cuda::{
    CastList, ClipList, Contribution, Contributions, GradientNorm, LossScale, Measure, OptimizerStep, Rule, Skip,
    StochasticCastList, contribute,
};
use annulus::ops::{self, GradScaler, RoundingKey, Saturate, SgdOptions};
use annulus::{DType, Error, NormType};
use bytemuck::Zeroable;

use crate::gpu::{Gpu, PATIENCE};
use crate::step::Parameter;
use crate::support::on_virtual_gpu;
use crate::tensors::{FLOATS, Random, Tensor};

const SINGLES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const LENS: [usize; 5] = [0, 1, 31, 4099, 32768 + 5];

fn hard(dtype: DType, len_elems: usize, seed: u64) -> Tensor {
    let mut random = Random(seed);
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 1e-45, 7e4];
    Tensor::from_fn(dtype, len_elems, |i| if i % 37 == 0 { bad[i / 37 % 6] } else { random.spread(1e3, 30.0) })
}

/// Every pair of `dtypes`, of several lengths and distances from 16 bytes.
fn pairs(dtypes: &[DType]) -> Vec<(Tensor, Tensor)> {
    let combinations = dtypes.iter().flat_map(|from| dtypes.iter().map(move |to| (*from, *to)));
    let pair = |(i, (from, to)): (usize, (DType, DType))| {
        let len_elems = LENS[i % LENS.len()];
        (hard(from, len_elems, i as u64), hard(to, len_elems, 100 + i as u64))
    };
    combinations.enumerate().map(pair).collect()
}

fn place_pairs(gpu: &Gpu, pairs: &[(Tensor, Tensor)]) -> Vec<(View, View)> {
    let place = |(i, (src, dst)): (usize, &(Tensor, Tensor))| (gpu.place_at(src, i % 3), gpu.place_at(dst, i % 5));
    pairs.iter().enumerate().map(place).collect()
}

#[track_caller]
fn compare(gpu: &Gpu, views: &[(View, View)], expected: &[(Tensor, Tensor)], what: &str) {
    for ((src, dst), (_, expected)) in views.iter().zip(expected) {
        let (from, to, len_elems) = (src.dtype(), dst.dtype(), dst.len_elems());
        assert_eq!(gpu.read(dst).bits(), expected.bits(), "{what}: {from} to {to}, {len_elems} elements");
    }
}

#[test]
fn casts_round_as_the_host() {
    on_virtual_gpu("lists::casts_round_as_the_host", &[], || {
        let gpu = Gpu::new();
        let mut host = pairs(&FLOATS);
        let views = place_pairs(&gpu, &host);
        let list = CastList::new(&gpu.kernels, &views).unwrap();
        for saturate in [Saturate::No, Saturate::Yes] {
            list.cast(&gpu.stream, saturate).unwrap();
            host.iter_mut().for_each(|(src, dst)| ops::cast(src.slice(), dst.slice_mut(), saturate).unwrap());
            compare(&gpu, &views, &host, "cast");
        }
        let mut host: Vec<_> =
            [DType::F16, DType::BF16].map(|to| (hard(DType::F32, 4099, 3), Tensor::zeros(to, 4099))).into();
        let views = place_pairs(&gpu, &host);
        let triples: Vec<_> = views.iter().map(|(src, dst)| (src.clone(), dst.clone(), 77)).collect();
        let list = StochasticCastList::new(&gpu.kernels, &triples).unwrap();
        let key = RoundingKey { seed: 9, step: 3 };
        list.cast(&gpu.stream, key, Saturate::No).unwrap();
        for (src, dst) in &mut host {
            ops::cast_stochastic(src.slice(), dst.slice_mut(), key, 77, Saturate::No).unwrap();
        }
        compare(&gpu, &views, &host, "stochastic");
        let triple = [(views[0].0.clone(), views[0].1.clone(), u64::MAX)];
        assert!(matches!(StochasticCastList::new(&gpu.kernels, &triple), Err(Error::SizeOverflow { .. })));
    });
}

#[test]
fn clipping_in_place_goes_by_the_signal() {
    on_virtual_gpu("lists::clipping_in_place_goes_by_the_signal", &[], || {
        let gpu = Gpu::new();
        let scale = gpu.place(&Tensor::F32(vec![8.0]));
        let gradients: Vec<Tensor> = FLOATS
            .map(|dtype| {
                let mut random = Random(4);
                Tensor::from_fn(dtype, 4099, |_| random.spread(8.0, 9.0))
            })
            .into();
        let views: Vec<View> = gradients.iter().enumerate().map(|(i, g)| gpu.place_at(g, i)).collect();
        let mut norm = GradientNorm::new(&gpu.kernels, &views).unwrap();
        let list = ClipList::new(&gpu.kernels, &views).unwrap();
        let measure = |norm: &mut GradientNorm, max_norm| {
            let (grad_scale, skip) = (Some(&scale), Skip::Nonfinite);
            let how = Measure { norm_type: NormType::L2, max_norm, grad_scale, skip };
            norm.measure(&gpu.stream, &how).unwrap().wait(PATIENCE).unwrap()
        };
        let mut expected = gradients.clone();
        let compare = |expected: &[Tensor], what: &str| {
            for (view, expected) in views.iter().zip(expected) {
                assert_eq!(gpu.read(view).bits(), expected.bits(), "{what}, {}", expected.dtype());
            }
        };
        let report = measure(&mut norm, f64::INFINITY);
        list.scale(&gpu.stream, norm.signal()).unwrap();
        compare(&expected, "a coefficient of 1");
        let report = measure(&mut norm, report.total_norm / 3.0);
        assert!(report.clip_coef < 0.34, "{report:?}");
        list.clamp(&gpu.stream, 0.25, Some(norm.signal())).unwrap();
        let limit = (0.25f32 as f64 * 8.0 / f64::from(report.clip_coef)) as f32;
        expected.iter_mut().for_each(|gradient| ops::clip_value(gradient.slice_mut(), limit).unwrap());
        compare(&expected, "by value, before what the norm found is multiplied in");
        list.scale(&gpu.stream, norm.signal()).unwrap();
        expected.iter_mut().for_each(|gradient| ops::scale_in_place(gradient.slice_mut(), report.clip_coef));
        compare(&expected, "by norm");
        list.clamp(&gpu.stream, 0.5, None).unwrap();
        expected.iter_mut().for_each(|gradient| ops::clip_value(gradient.slice_mut(), 0.5).unwrap());
        compare(&expected, "by value");
        assert!(matches!(list.clamp(&gpu.stream, f32::NAN, None), Err(Error::InvalidArgument { .. })));
        assert!(ClipList::new(&gpu.kernels, &[views[0].clone(), views[0].clone()]).is_err(), "twice");
    });
}

/// `dst = src * factor` or `dst += src * factor`, each operation in f32, the result rounded once.
fn contribute_on_host(src: &Tensor, dst: &mut Tensor, how: Contribution, factor: f32) {
    let widened = |tensor: &Tensor| tensor.values().into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    let mut sums = widened(src);
    sums.iter_mut().for_each(|x| *x *= factor);
    if how == Contribution::Add {
        sums.iter_mut().zip(widened(dst)).for_each(|(x, sum)| *x += sum);
    }
    ops::cast(Tensor::F32(sums).slice(), dst.slice_mut(), Saturate::No).unwrap();
}

#[test]
fn contributions_replace_and_add_in_any_pair_of_types() {
    on_virtual_gpu("lists::contributions_replace_and_add_in_any_pair_of_types", &[], || {
        let gpu = Gpu::new();
        for (how, factor) in [(Contribution::Replace, 1.0), (Contribution::Add, 1.0), (Contribution::Add, 0.3)] {
            let mut host = pairs(&SINGLES);
            let listed = place_pairs(&gpu, &host);
            let single = place_pairs(&gpu, &host);
            let together = place_pairs(&gpu, &host);
            let list = Contributions::new(&gpu.kernels, &listed).unwrap();
            for _ in 0..2 {
                list.launch(&gpu.stream, how, factor).unwrap();
                for pair in &single {
                    contribute(&gpu.kernels, &gpu.stream, std::slice::from_ref(pair), how, factor).unwrap();
                }
                contribute(&gpu.kernels, &gpu.stream, &together, how, factor).unwrap();
                host.iter_mut().for_each(|(src, dst)| contribute_on_host(src, dst, how, factor));
            }
            compare(&gpu, &listed, &host, &format!("{how:?} by {factor}"));
            compare(&gpu, &single, &host, &format!("{how:?} by {factor}, one by one"));
            compare(&gpu, &together, &host, &format!("{how:?} by {factor}, together"));
        }
    });
}

#[test]
fn foreign_memory_is_staged_and_what_overlaps_is_refused() {
    on_virtual_gpu("lists::foreign_memory_is_staged_and_what_overlaps_is_refused", &[], || {
        let gpu = Gpu::new();
        let owner = Buffer::filled(gpu.device(), &[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        let address = owner.address() + 4;
        // SAFETY: three elements of the buffer, which is the owner.
        let foreign = unsafe { Buffer::foreign(gpu.device(), address, DType::F32, 3, Box::new(owner)) }.unwrap();
        let bucket = gpu.place(&Tensor::zeros(DType::BF16, 8)).slice(5, 3).unwrap();
        let stage_all =
            |pairs: &[(View, View)]| contribute(&gpu.kernels, &gpu.stream, pairs, Contribution::Replace, 0.5);
        let stage = |src: &View, dst: &View| stage_all(&[(src.clone(), dst.clone())]);
        stage(&foreign.view(), &bucket).unwrap();
        assert_eq!(gpu.read(&bucket).values(), [1.0, 1.5, 2.0]);
        let refused = |src: &View, dst: &View| stage(src, dst).unwrap_err();
        let view = foreign.view();
        let (left, right) = (view.slice(0, 2).unwrap(), view.slice(1, 2).unwrap());
        assert!(matches!(refused(&left, &right), Error::InvalidArgument { .. }));
        assert!(matches!(refused(&left, &bucket), Error::LengthMismatch { .. }));
        let doubles = gpu.place(&Tensor::zeros(DType::F64, 3));
        assert!(matches!(refused(&view, &doubles), Error::Unsupported { dtype: DType::F64, .. }));
        // In one launch: one target twice, and a target that is the next one's source.
        let other = gpu.place(&Tensor::zeros(DType::F32, 3));
        for pairs in [[(&view, &other), (&bucket, &other)], [(&bucket, &other), (&other, &view)]] {
            let pairs = pairs.map(|(src, dst)| (src.clone(), dst.clone()));
            assert!(matches!(stage_all(&pairs), Err(Error::InvalidArgument { .. })));
        }
        // In two launches, as more than 64 pairs are, one comes after the other.
        let nothing = (gpu.place(&Tensor::zeros(DType::F32, 0)), gpu.place(&Tensor::zeros(DType::BF16, 0)));
        let mut many = vec![nothing; 65];
        (many[0], many[64]) = ((view.clone(), other.clone()), (view.clone(), other.clone()));
        contribute(&gpu.kernels, &gpu.stream, &many, Contribution::Add, 0.5).unwrap();
        assert_eq!(gpu.read(&other).values(), [2.0, 3.0, 4.0]);
    });
}

// ---- what a step does not do -------------------------------------------------------------------------------------------

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what this thread allocates. The driver is a library with an allocator of its own.
struct Counting;

// SAFETY: the system's allocator; counting touches no memory that is allocated.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Holds the stream for so long.
fn hold(gpu: &Gpu, words: &Buffer, timeout: Duration) {
    let at = |word: u64| words.address() + 4 * word;
    let timeout_ns = timeout.as_nanos() as u64;
    let (flag, abort, report) = (at(1), at(2), at(3));
    let arguments =
        ProbeArguments { peer_flag: at(0), flag, abort, report, timeout_ns, generation: 1, ..Zeroable::zeroed() };
    let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: false };
    // SAFETY: a probe's own argument; all addresses are of words of the buffer, which outlives the kernel.
    unsafe { gpu.kernels.launch("probe_peer", shape, &gpu.stream, &arguments) }.unwrap();
}

#[test]
fn the_launches_of_a_step_wait_for_nothing_and_allocate_nothing() {
    on_virtual_gpu("lists::the_launches_of_a_step_wait_for_nothing_and_allocate_nothing", &[], || {
        let gpu = Gpu::new();
        let words = Buffer::zeroed(gpu.device(), DType::I32, 64).unwrap();
        let tensors = [300, 5].map(|len| Parameter::new(len, DType::F32, (None, true), 0).place(&gpu, 0));
        let gradients = tensors.each_ref().map(|tensor| tensor.gradient.clone());
        let sources = gradients.each_ref().map(|view| gpu.place(&Tensor::zeros(DType::BF16, view.len_elems())));
        let pairs: Vec<_> = sources.iter().cloned().zip(gradients.iter().cloned()).collect();
        let rule = Rule::Sgd(SgdOptions::default());
        let mut optimizer = OptimizerStep::new(&gpu.kernels, rule, &tensors, None).unwrap();
        let mut norm = GradientNorm::new(&gpu.kernels, &gradients).unwrap();
        let scale = LossScale::new(&gpu.kernels, &GradScaler::default()).unwrap();
        let contributions = Contributions::new(&gpu.kernels, &pairs).unwrap();
        let clips = ClipList::new(&gpu.kernels, &gradients).unwrap();
        let done = Event::new(gpu.device()).unwrap();
        let free_bytes = gpu.device().memory_bytes().unwrap();

        hold(&gpu, &words, Duration::from_secs(5));
        let before = ALLOCATIONS.with(Cell::get);
        for step in 0..3 {
            contributions.launch(&gpu.stream, Contribution::Replace, 1.0).unwrap();
            contributions.launch(&gpu.stream, Contribution::Add, 1.0).unwrap();
            let grad_scale = Some(scale.scale());
            let how = Measure { norm_type: NormType::L2, max_norm: 1.0, grad_scale, skip: Skip::Nonfinite };
            norm.measure_part(&gpu.stream, &how, 1..2).unwrap();
            let ticket = norm.measure_last(&gpu.stream, &how, 0..1).unwrap();
            assert!(ticket.poll().unwrap().is_none(), "the stream is held");
            clips.clamp(&gpu.stream, 0.5, Some(norm.signal())).unwrap();
            optimizer.step(&gpu.stream, Some(norm.signal())).unwrap();
            scale.update(&gpu.stream, norm.signal()).unwrap();
            optimizer.set_learning_rate(&gpu.stream, 0.1 / f64::from(step + 1)).unwrap();
        }
        let allocated = ALLOCATIONS.with(Cell::get) - before;
        gpu.stream.record(&done).unwrap();
        assert!(!done.is_complete(), "a launch has waited for what came before it");
        assert_eq!(allocated, 0);
        assert_eq!(gpu.device().memory_bytes().unwrap(), free_bytes);
        done.synchronize(PATIENCE).unwrap();
        assert_eq!(optimizer.counts(&gpu.stream, PATIENCE).unwrap().steps, 3);
    });
}
