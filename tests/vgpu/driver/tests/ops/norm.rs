//! Norms, their signal, and the records that the host reads while they run.

use std::sync::mpsc;
use std::time::Duration;

use annulus::device::cuda::View;
use annulus::ops::cuda::{GradientNorm, Measure, NormReport, Skip, Ticket, UnscaleNorm};
use annulus::ops::{NormResult, NormSlots, clip_coef, grad_norm};
use annulus::{DType, Error, NormType};

use crate::gpu::{Gpu, PATIENCE};
use crate::support::on_virtual_gpu;
use crate::tensors::{Random, Tensor};

const TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::P(3.5)];

fn of(norm_type: NormType) -> Measure<'static> {
    Measure { norm_type, max_norm: 1.0, grad_scale: None, skip: Skip::Nonfinite }
}

fn ordinary(dtype: DType, len_elems: usize, seed: u64) -> Tensor {
    let mut random = Random(seed);
    Tensor::from_fn(dtype, len_elems, |_| random.spread(1.0, 20.0))
}

/// Several chunks, all dtypes, empty and odd ones between.
fn mixed() -> Vec<Tensor> {
    let lens = [
        (DType::BF16, 32768 + 33),
        (DType::F32, 0),
        (DType::F16, 32768),
        (DType::F64, 531),
        (DType::F32, 1),
        (DType::F32, 33_003),
    ];
    lens.iter().enumerate().map(|(i, (dtype, len))| ordinary(*dtype, *len, i as u64)).collect()
}

/// Each at another distance from 16 bytes.
fn place_all(gpu: &Gpu, tensors: &[Tensor]) -> Vec<View> {
    tensors.iter().enumerate().map(|(i, tensor)| gpu.place_at(tensor, i)).collect()
}

fn host(tensors: &[Tensor], norm_type: NormType) -> NormResult {
    let lens: Vec<usize> = tensors.iter().map(Tensor::len_elems).collect();
    let slices: Vec<_> = tensors.iter().map(Tensor::slice).collect();
    grad_norm(&slices, norm_type, &mut NormSlots::new(&lens).unwrap()).unwrap()
}

#[track_caller]
fn check(report: NormReport, expected: NormResult, what: &str) {
    let bits = |norm: f64| if norm.is_nan() { f64::NAN.to_bits() } else { norm.to_bits() };
    assert_eq!(bits(report.total_norm), bits(expected.total_norm), "{what}: {report:?}");
    assert_eq!(report.first_nonfinite, expected.first_nonfinite, "{what}");
    assert_eq!(report.found_inf, expected.nonfinite, "{what}");
    let coef = if expected.nonfinite { 1.0 } else { clip_coef(expected.total_norm, 1.0) };
    assert_eq!(report.clip_coef.to_bits(), coef.to_bits(), "{what}");
}

#[test]
fn norms_have_the_bits_of_the_host_whole_and_by_bucket() {
    on_virtual_gpu("norm::norms_have_the_bits_of_the_host_whole_and_by_bucket", &[], || {
        let (gpu, tensors) = (Gpu::new(), mixed());
        let views = place_all(&gpu, &tensors);
        let mut norm = GradientNorm::new(&gpu.kernels, &views).unwrap();
        for norm_type in TYPES {
            let expected = host(&tensors, norm_type);
            let how = of(norm_type);
            let ticket = norm.measure(&gpu.stream, &how).unwrap();
            check(ticket.wait(PATIENCE).unwrap(), expected, &format!("{norm_type:?}"));
            norm.measure_part(&gpu.stream, &how, 3..6).unwrap();
            norm.measure_part(&gpu.stream, &how, 1..2).unwrap();
            let ticket = norm.measure_last(&gpu.stream, &how, 0..3).unwrap();
            check(ticket.wait(PATIENCE).unwrap(), expected, &format!("{norm_type:?} by bucket"));
            norm.measure_part(&gpu.stream, &how, 0..6).unwrap();
            let ticket = norm.measure_last(&gpu.stream, &how, 6..6).unwrap();
            check(ticket.wait(PATIENCE).unwrap(), expected, &format!("{norm_type:?} combined alone"));
        }
        let mut none = GradientNorm::new(&gpu.kernels, &[]).unwrap();
        let ticket = none.measure(&gpu.stream, &of(NormType::L2)).unwrap();
        assert_eq!(ticket.wait(PATIENCE).unwrap().total_norm, 0.0);
    });
}

#[test]
fn a_nan_is_found_by_the_tensor_that_has_it() {
    on_virtual_gpu("norm::a_nan_is_found_by_the_tensor_that_has_it", &[], || {
        let gpu = Gpu::new();
        let with = |at: usize, bad: f64| {
            let mut tensors = mixed();
            tensors[at] = Tensor::from_fn(DType::F32, 40_000, |i| if i == 39_999 { bad } else { 1.0 });
            tensors
        };
        for (at, bad) in [(0, f64::NAN), (1, f64::INFINITY), (5, f64::NEG_INFINITY)] {
            let tensors = with(at, bad);
            let views = place_all(&gpu, &tensors);
            let mut norm = GradientNorm::new(&gpu.kernels, &views).unwrap();
            let report = norm.measure(&gpu.stream, &of(NormType::L2)).unwrap().wait(PATIENCE).unwrap();
            assert_eq!(report.first_nonfinite, Some(at));
            check(report, host(&tensors, NormType::L2), &format!("{bad} in {at}"));
            // Propagated as PyTorch does: the step is made with it.
            let how = Measure { skip: Skip::Never, ..of(NormType::L2) };
            let report = norm.measure(&gpu.stream, &how).unwrap().wait(PATIENCE).unwrap();
            assert!(!report.found_inf && report.first_nonfinite == Some(at), "{report:?}");
            let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            assert_eq!(bits(report.clip_coef), bits(clip_coef(report.total_norm, 1.0)));
        }
    });
}

#[test]
fn a_skip_outlasts_a_second_look_at_the_same_gradients_only() {
    on_virtual_gpu("norm::a_skip_outlasts_a_second_look_at_the_same_gradients_only", &[], || {
        let gpu = Gpu::new();
        let view = gpu.place(&Tensor::F32(vec![f32::INFINITY, 1.0]));
        let mut norm = GradientNorm::new(&gpu.kernels, std::slice::from_ref(&view)).unwrap();
        let mut found = |skip| {
            let how = Measure { skip, max_norm: f64::INFINITY, ..of(NormType::L2) };
            norm.measure(&gpu.stream, &how).unwrap().wait(PATIENCE).unwrap()
        };
        assert!(found(Skip::Nonfinite).found_inf);
        gpu.write(&view, &Tensor::F32(vec![3.0, 4.0])); // clipped by value
        let again = found(Skip::NonfiniteOrBefore);
        assert!(again.found_inf && again.first_nonfinite.is_none() && again.clip_coef == 1.0, "{again:?}");
        assert_eq!(again.total_norm, 5.0);
        assert!(!found(Skip::Nonfinite).found_inf);
        assert!(!found(Skip::NonfiniteOrBefore).found_inf);
    });
}

#[test]
fn unscaling_writes_and_measures_as_the_host() {
    on_virtual_gpu("norm::unscaling_writes_and_measures_as_the_host", &[], || {
        let gpu = Gpu::new();
        let scale = gpu.place(&Tensor::F32(vec![24.0])); // not a power of two
        let inv_scale = (1.0 / 24.0) as f32;
        let sources = mixed();
        let to = [DType::F32, DType::F32, DType::BF16, DType::F64, DType::F16, DType::F16];
        for norm_type in TYPES {
            let pairs: Vec<(View, View)> = place_all(&gpu, &sources)
                .into_iter()
                .zip(&to)
                .map(|(src, to)| {
                    // In place where the type stays, but for one.
                    let in_place = src.dtype() == *to && src.len_elems() != 531;
                    let dst = gpu.place_at(&Tensor::zeros(*to, src.len_elems()), 3);
                    (src.clone(), if in_place { src } else { dst })
                })
                .collect();
            let lens: Vec<usize> = sources.iter().map(Tensor::len_elems).collect();
            let mut slots = NormSlots::new(&lens).unwrap();
            slots.begin(norm_type).unwrap();
            let mut expected: Vec<_> = to.iter().zip(&lens).map(|(to, len)| Tensor::zeros(*to, *len)).collect();
            for (tensor, (src, dst)) in sources.iter().zip(&mut expected).enumerate() {
                slots.unscale_at(tensor, 0, src.slice(), dst.slice_mut(), inv_scale).unwrap();
            }
            let mut norm = UnscaleNorm::new(&gpu.kernels, &pairs).unwrap();
            let ticket = norm.measure(&gpu.stream, &of(norm_type), &scale).unwrap();
            check(ticket.wait(PATIENCE).unwrap(), slots.combine().unwrap(), &format!("{norm_type:?}"));
            for ((_, dst), expected) in pairs.iter().zip(&expected) {
                assert_eq!(gpu.read(dst).bits(), expected.bits(), "{norm_type:?}, {}", expected.dtype());
            }
        }
    });
}

// ---- the records -------------------------------------------------------------------------------------------------------

#[test]
fn records_are_whole_while_they_are_written_over() {
    on_virtual_gpu("norm::records_are_whole_while_they_are_written_over", &[], || {
        const NORMS: usize = 400;
        let gpu = Gpu::new();
        let view = gpu.place(&Tensor::F32(vec![0.0]));
        let mut norm = GradientNorm::new(&gpu.kernels, std::slice::from_ref(&view)).unwrap();
        let (sender, tickets) = mpsc::channel::<(usize, Ticket)>();
        let reader = std::thread::spawn(move || {
            let (mut seen, mut late) = (0, 0);
            let mut open: Vec<(usize, Ticket)> = Vec::new();
            loop {
                match tickets.try_recv() {
                    Ok(ticket) => open.push(ticket),
                    Err(mpsc::TryRecvError::Disconnected) if open.is_empty() => return (seen, late),
                    Err(_) => {}
                }
                open.retain(|(number, ticket)| match ticket.poll() {
                    Ok(None) => true,
                    Ok(Some(report)) => {
                        // Every word says the same number.
                        assert_eq!(report.total_norm, *number as f64);
                        assert_eq!(report.clip_coef, clip_coef(*number as f64, 1.0));
                        seen += 1;
                        false
                    }
                    Err(error) => {
                        assert!(matches!(error, Error::InvalidArgument { argument: "norm to read", .. }), "{error}");
                        late += 1;
                        false
                    }
                });
            }
        });
        for number in 1..=NORMS {
            view.write(&[number as f32], &gpu.stream).unwrap();
            let ticket = norm.measure(&gpu.stream, &of(NormType::Inf)).unwrap();
            sender.send((number, ticket)).unwrap();
        }
        drop(sender);
        let (seen, late) = reader.join().unwrap();
        assert_eq!(seen + late, NORMS);
        assert!(seen > 0, "none was read in time");
    });
}

#[test]
fn a_ticket_tells_early_late_and_never_apart() {
    on_virtual_gpu("norm::a_ticket_tells_early_late_and_never_apart", &[], || {
        let gpu = Gpu::new();
        let view = gpu.place(&Tensor::F32(vec![2.0]));
        let mut norm = GradientNorm::new(&gpu.kernels, &[view]).unwrap();
        let first = norm.measure(&gpu.stream, &of(NormType::L2)).unwrap();
        assert_eq!(first.wait(PATIENCE).unwrap().total_norm, 2.0);
        let tickets: Vec<Ticket> = (0..63).map(|_| norm.measure(&gpu.stream, &of(NormType::L2)).unwrap()).collect();
        tickets[62].wait(PATIENCE).unwrap();
        assert_eq!(first.poll().unwrap().unwrap().total_norm, 2.0, "the last moment");
        norm.measure(&gpu.stream, &of(NormType::L2)).unwrap().wait(PATIENCE).unwrap();
        let late = first.poll().unwrap_err();
        assert!(late.to_string().contains("number 1, whose record number 65 was written over"), "{late}");
        assert!(tickets[0].poll().unwrap().is_some());
        // One that never runs, as of a graph that is not replayed.
        let never = norm.replayed();
        assert!(never.poll().unwrap().is_none());
        let error = never.wait(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, Error::TimedOut { waited_ms: 20, .. }), "{error}");
        norm.captured(never);
        assert!(norm.measure(&gpu.stream, &of(NormType::L2)).unwrap().wait(PATIENCE).is_ok(), "numbers go on");
    });
}

#[test]
fn what_cannot_be_measured_is_refused() {
    on_virtual_gpu("norm::what_cannot_be_measured_is_refused", &[("ANNULUS_VGPU_DEVICES", "2")], || {
        let (gpu, other) = (Gpu::new(), Gpu::number(1));
        let refused = |result: annulus::Result<Ticket>, words: &str| {
            let error = result.unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        };
        let ints = annulus::device::cuda::Buffer::filled(gpu.device(), &[1i32]).unwrap();
        assert!(matches!(GradientNorm::new(&gpu.kernels, &[ints.view()]), Err(Error::Unsupported { .. })));
        let foreign = other.place(&Tensor::F32(vec![1.0]));
        let error = GradientNorm::new(&gpu.kernels, std::slice::from_ref(&foreign)).err().unwrap();
        assert!(error.to_string().contains("device 1"), "{error}");

        let view = gpu.place(&Tensor::F32(vec![3.0, 4.0]));
        let mut norm = GradientNorm::new(&gpu.kernels, &[view.clone(), view.clone()]).unwrap();
        let how = of(NormType::L2);
        refused(norm.measure(&gpu.stream, &of(NormType::P(0.0))), "P(0)");
        refused(norm.measure(&gpu.stream, &Measure { max_norm: -1.0, ..how }), "max_norm");
        refused(norm.measure(&gpu.stream, &Measure { grad_scale: Some(&view), ..how }), "loss scale");
        refused(norm.measure(&gpu.stream, &Measure { grad_scale: Some(&foreign), ..how }), "device 1");
        refused(norm.measure(&other.stream, &how), "stream");
        refused(norm.measure_last(&gpu.stream, &how, 1..3), "1..3 of 2");
        refused(norm.measure_last(&gpu.stream, &how, 1..2), "tensor 0 not measured");
        norm.measure_part(&gpu.stream, &how, 0..1).unwrap();
        refused(norm.measure_last(&gpu.stream, &of(NormType::L1), 1..2), "as that of the tensors measured before");
        let report = norm.measure_last(&gpu.stream, &how, 1..2).unwrap().wait(PATIENCE).unwrap();
        assert_eq!(report.total_norm, 50f64.sqrt(), "nothing that was refused left a trace");

        let halves = gpu.place(&Tensor::zeros(DType::F16, 2));
        let doubles = gpu.place(&Tensor::zeros(DType::F64, 2));
        let unscale = |src: &View, dst: &View| UnscaleNorm::new(&gpu.kernels, &[(src.clone(), dst.clone())]).err();
        assert!(matches!(unscale(&view, &doubles), Some(Error::Unsupported { .. })));
        assert!(matches!(unscale(&view, &halves.slice(0, 1).unwrap()), Some(Error::LengthMismatch { .. })));
        let mut norm = UnscaleNorm::new(&gpu.kernels, &[(view.clone(), halves)]).unwrap();
        refused(norm.measure(&gpu.stream, &how, &view), "loss scale");
        let scale = view.slice(0, 1).unwrap();
        refused(norm.measure(&gpu.stream, &Measure { grad_scale: Some(&scale), ..how }, &scale), "grad_scale");
    });
}
