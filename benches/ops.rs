//! The host operations on one thread beside the memory floor: the same bytes read and written by the plainest loop.
//!
//! ```text
//! cargo bench --bench ops                              100 M elements, 2.3 GB
//! ANNULUS_BENCH_ELEMS=100000 cargo bench --bench ops   in cache: shows the arithmetic instead
//! cargo bench --bench ops -- table                     the table alone
//! ```
//!
//! Criterion keeps each operation's history. The table at the end is measured apart: each operation, its floor and, where
//! `python3` has torch, PyTorch's version on one thread (`ops_pytorch.py`) by turns and over the same memory, because a
//! virtual machine's bandwidth changes from second to second and from page to page. It gives medians; the ratio is what to
//! read.
//!
//! Bytes are what the program reads and writes; the line a store fetches before it is overwritten is not counted.

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use annulus::NormType;
use annulus::ops::{
    AdamWOptions, NormSlots, Rounding, RoundingKey, Saturate, SgdOptions, Slice, SliceMut, StepSignal, Weights,
    adamw_step, cast, cast_stochastic, grad_norm, scale_in_place, sgd_step,
};
use criterion::{Criterion, Throughput};
use half::{bf16, f16};
use memmap2::MmapMut;
use rustix::fs::MemfdFlags;

/// Rounds of the table. Odd, so that the median is one of them.
const ROUNDS: usize = 11;

/// The tensors all operations share, PyTorch's among them: on a virtual machine the same loop over two ranges of memory
/// differs by a half, so both libraries work on the same pages.
struct Tensors {
    gradient: Shared<f32>,
    master: Shared<f32>,
    exp_avg: Shared<f32>,
    exp_avg_sq: Shared<f32>,
    model: Shared<bf16>,
    half: Shared<f16>,
    slots: NormSlots,
}

/// Elements in memory that a child process maps, too, through the descriptor it inherits.
struct Shared<T> {
    fd: OwnedFd,
    map: MmapMut,
    element: PhantomData<T>,
}

impl<T: bytemuck::Pod> Shared<T> {
    fn new(name: &str, len_elems: usize, element: impl Fn(usize) -> T) -> std::io::Result<Shared<T>> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::empty())?;
        rustix::fs::ftruncate(&fd, (len_elems * size_of::<T>()) as u64)?;
        // SAFETY: nobody truncates the memfd, and the only other process that maps it works when this one waits for it.
        let map = unsafe { MmapMut::map_mut(&fd)? };
        let mut shared = Shared { fd, map, element: PhantomData };
        for (i, x) in shared.iter_mut().enumerate() {
            *x = element(i);
        }
        Ok(shared)
    }
}

impl<T: bytemuck::Pod> std::ops::Deref for Shared<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map)
    }
}

impl<T: bytemuck::Pod> std::ops::DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map)
    }
}

impl Tensors {
    fn new(len_elems: usize) -> std::io::Result<Tensors> {
        let gradient = |i: usize| ((i * 7919) % 2003) as f32 * 1e-3 - 1.0;
        Ok(Tensors {
            gradient: Shared::new("gradient", len_elems, gradient)?,
            master: Shared::new("master", len_elems, |i| gradient(i) * 0.1)?,
            exp_avg: Shared::new("exp_avg", len_elems, |_| 1e-3)?,
            exp_avg_sq: Shared::new("exp_avg_sq", len_elems, |_| 1e-6)?,
            model: Shared::new("model", len_elems, |_| bf16::ONE)?,
            half: Shared::new("half", len_elems, |_| f16::ONE)?,
            slots: NormSlots::new(&[len_elems]).expect("the length fits"),
        })
    }

    /// Descriptors, in the order in which `ops_pytorch.py` takes them.
    fn fds(&self) -> [&OwnedFd; 6] {
        [&self.gradient.fd, &self.master.fd, &self.exp_avg.fd, &self.exp_avg_sq.fd, &self.model.fd, &self.half.fd]
    }
}

/// An operation, the bytes an element costs it, and the loop that moves as many the same way.
struct Case {
    name: &'static str,
    bytes_per_elem: usize,
    run: fn(&mut Tensors),
    floor: fn(&mut Tensors),
}

const ADAMW: AdamWOptions = AdamWOptions { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const SGD: SgdOptions = SgdOptions { lr: 1e-4, momentum: 0.9, nesterov: false, weight_decay: 0.01 };
/// Not 1, so that nothing is left out, and so near to 1 that thousands of repetitions change no exponent.
const SIGNAL: StepSignal = StepSignal { clip_coef: 0.999_999_9, grad_scale: 1.0, found_inf: false };

const CASES: &[Case] = &[
    Case {
        name: "norm_l2_f32",
        bytes_per_elem: 4,
        run: |t| norm(t, NormType::L2),
        floor: |t| read::<f32>(&t.gradient),
    },
    Case {
        name: "norm_l1_f32",
        bytes_per_elem: 4,
        run: |t| norm(t, NormType::L1),
        floor: |t| read::<f32>(&t.gradient),
    },
    Case {
        name: "norm_inf_f32",
        bytes_per_elem: 4,
        run: |t| norm(t, NormType::Inf),
        floor: |t| read::<f32>(&t.gradient),
    },
    Case {
        name: "norm_p3_f32",
        bytes_per_elem: 4,
        run: |t| norm(t, NormType::P(3.0)),
        floor: |t| read::<f32>(&t.gradient),
    },
    Case {
        name: "norm_p3.5_f32",
        bytes_per_elem: 4,
        run: |t| norm(t, NormType::P(3.5)),
        floor: |t| read::<f32>(&t.gradient),
    },
    Case {
        name: "norm_l2_bf16",
        bytes_per_elem: 2,
        run: |t| {
            black_box(grad_norm(&[Slice::BF16(&t.model)], NormType::L2, &mut t.slots).unwrap());
        },
        floor: |t| read::<bf16>(&t.model),
    },
    Case {
        name: "norm_l2_f16",
        bytes_per_elem: 2,
        run: |t| {
            black_box(grad_norm(&[Slice::F16(&t.half)], NormType::L2, &mut t.slots).unwrap());
        },
        floor: |t| read::<f16>(&t.half),
    },
    Case {
        name: "cast_f32_bf16",
        bytes_per_elem: 6,
        run: |t| cast(Slice::F32(&t.gradient), SliceMut::BF16(&mut t.model), Saturate::No).unwrap(),
        floor: |t| copy(&t.gradient, &mut t.model, &mut t.exp_avg),
    },
    Case {
        name: "cast_bf16_f32",
        bytes_per_elem: 6,
        run: |t| cast(Slice::BF16(&t.model), SliceMut::F32(&mut t.gradient), Saturate::No).unwrap(),
        floor: |t| copy(&t.gradient, &mut t.model, &mut t.exp_avg),
    },
    Case {
        name: "cast_f32_f16",
        bytes_per_elem: 6,
        run: |t| cast(Slice::F32(&t.gradient), SliceMut::F16(&mut t.half), Saturate::No).unwrap(),
        floor: |t| copy(&t.gradient, &mut t.model, &mut t.exp_avg),
    },
    Case {
        name: "cast_f16_f32",
        bytes_per_elem: 6,
        run: |t| cast(Slice::F16(&t.half), SliceMut::F32(&mut t.gradient), Saturate::No).unwrap(),
        floor: |t| copy(&t.gradient, &mut t.model, &mut t.exp_avg),
    },
    Case {
        name: "cast_f32_bf16_stochastic",
        bytes_per_elem: 6,
        run: |t| {
            let (src, dst) = (Slice::F32(&t.gradient), SliceMut::BF16(&mut t.model));
            cast_stochastic(src, dst, RoundingKey { seed: 1, step: 2 }, 0, Saturate::No).unwrap();
        },
        floor: |t| copy(&t.gradient, &mut t.model, &mut t.exp_avg),
    },
    Case {
        name: "clip_scale_f32",
        bytes_per_elem: 8,
        run: |t| scale_in_place(SliceMut::F32(&mut t.gradient), SIGNAL.clip_coef),
        floor: |t| add_one(&mut t.gradient),
    },
    Case {
        name: "clip_scale_f16",
        bytes_per_elem: 4,
        run: |t| scale_in_place(SliceMut::F16(&mut t.half), SIGNAL.clip_coef),
        floor: |t| flip_one_bit(bytemuck::pod_align_to_mut::<f16, u32>(&mut t.half).1),
    },
    Case {
        name: "unscale_norm_f32",
        bytes_per_elem: 8,
        run: |t| {
            t.slots.begin(NormType::L2).unwrap();
            t.slots.unscale_in_place(0, SliceMut::F32(&mut t.gradient), SIGNAL.clip_coef).unwrap();
            black_box(t.slots.combine().unwrap());
        },
        floor: |t| add_one(&mut t.gradient),
    },
    Case {
        name: "adamw_f32",
        bytes_per_elem: 28,
        run: |t| {
            let weights = Weights::Master { master: &mut t.master, model: None };
            let gradient = Slice::F32(&t.gradient);
            adamw_step(&ADAMW, 10, SIGNAL, weights, gradient, &mut t.exp_avg, &mut t.exp_avg_sq).unwrap();
        },
        floor: |t| add_to_three(&t.gradient, &mut t.master, &mut t.exp_avg, &mut t.exp_avg_sq),
    },
    Case {
        name: "adamw_f32_bf16_model",
        bytes_per_elem: 30,
        run: |t| {
            let weights = Weights::Master { master: &mut t.master, model: Some(SliceMut::BF16(&mut t.model)) };
            let gradient = Slice::F32(&t.gradient);
            adamw_step(&ADAMW, 10, SIGNAL, weights, gradient, &mut t.exp_avg, &mut t.exp_avg_sq).unwrap();
        },
        floor: |t| add_to_three(&t.gradient, &mut t.master, &mut t.exp_avg, &mut t.exp_avg_sq),
    },
    Case {
        name: "adamw_bf16_stochastic",
        bytes_per_elem: 24,
        run: |t| {
            let rounding = Rounding::Stochastic { key: RoundingKey { seed: 1, step: 10 }, first_index: 0 };
            let weights = Weights::Model { model: SliceMut::BF16(&mut t.model), rounding };
            let gradient = Slice::F32(&t.gradient);
            adamw_step(&ADAMW, 10, SIGNAL, weights, gradient, &mut t.exp_avg, &mut t.exp_avg_sq).unwrap();
        },
        floor: |t| add_to_three(&t.gradient, &mut t.master, &mut t.exp_avg, &mut t.exp_avg_sq),
    },
    Case {
        name: "sgd_momentum_f32",
        bytes_per_elem: 20,
        run: |t| {
            let weights = Weights::Master { master: &mut t.master, model: None };
            sgd_step(&SGD, SIGNAL, weights, Slice::F32(&t.gradient), &mut t.exp_avg).unwrap();
        },
        floor: |t| add_to_two(&t.gradient, &mut t.master, &mut t.exp_avg),
    },
];

fn norm(tensors: &mut Tensors, norm_type: NormType) {
    black_box(grad_norm(&[Slice::F32(&tensors.gradient)], norm_type, &mut tensors.slots).unwrap());
}

// ---- floors --------------------------------------------------------------------------------------------------------

/// Defines a function and runs it with the widest vectors that the CPU has, as the kernels are run.
macro_rules! widest {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)*) => {$(
        fn $name($($argument: $type),*) {
            #[inline(always)]
            fn body($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) {
                    body($($argument),*)
                }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the feature was just found.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the feature was just found.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    )*};
}

widest! {
    fn read_words(words: &[u64]) {
        let mut all = 0;
        for word in words {
            all ^= word;
        }
        black_box(all);
    }

    fn add_one(x: &mut [f32]) {
        for x in x {
            *x += 1e-9;
        }
    }

    fn flip_one_bit(x: &mut [u32]) {
        for x in x {
            *x ^= 1;
        }
    }

    fn add_to_two(g: &[f32], a: &mut [f32], b: &mut [f32]) {
        for ((g, a), b) in g.iter().zip(a).zip(b) {
            *a += g * 1e-9;
            *b += g * 1e-9;
        }
    }

    fn add_to_three(g: &[f32], a: &mut [f32], b: &mut [f32], c: &mut [f32]) {
        for (((g, a), b), c) in g.iter().zip(a).zip(b).zip(c) {
            *a += g * 1e-9;
            *b += g * 1e-9;
            *c += g * 1e-9;
        }
    }
}

fn read<T: bytemuck::Pod>(elements: &[T]) {
    let (_, words, _) = bytemuck::pod_align_to(elements);
    read_words(words);
}

/// `memcpy` of 3 bytes an element: 6 moved, as a cast between f32 and a 16-bit float does.
fn copy(src: &[f32], first: &mut [bf16], second: &mut [f32]) {
    // Into two ranges, because neither alone is both at hand and not an input of the next operation.
    let src: &[u8] = bytemuck::cast_slice(src);
    let (first, second): (&mut [u8], &mut [u8]) = (bytemuck::cast_slice_mut(first), bytemuck::cast_slice_mut(second));
    let half = src.len() * 3 / 8;
    first[..half].copy_from_slice(&src[..half]);
    second[..half].copy_from_slice(&src[half..2 * half]);
}

// ---- the table -----------------------------------------------------------------------------------------------------

fn milliseconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(samples: &[f64]) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn print_table(tensors: &mut Tensors, selected: &dyn Fn(&str) -> bool) {
    let len_elems = tensors.gradient.len();
    let mut torch =
        Torch::start(len_elems, tensors.fds()).map_err(|reason| println!("no times of PyTorch: {reason}")).ok();
    println!("\n{len_elems} elements, one thread, medians of {ROUNDS} rounds, all three by turns");
    println!("(floor: the same bytes by a plain loop or memcpy; ratio: time over the floor's, per byte)\n");
    let [a, b, c, d, e, f, g] = ["operation", "bytes/elem", "ms", "GB/s", "floor ms", "ratio", "torch ms"];
    println!("{a:<26}{b:>11}{c:>10}{d:>8}{e:>10}{f:>7}{g:>10}");
    for Case { name, bytes_per_elem, run, floor } in CASES.iter().filter(|case| selected(case.name)) {
        let (mut ours, mut floors, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..=ROUNDS {
            floors.push(milliseconds(|| floor(tensors)));
            ours.push(milliseconds(|| run(tensors)));
            theirs.extend(torch.as_mut().and_then(|torch| torch.milliseconds(name)));
        }
        // Floors of AdamW's variants move 28 bytes an element whatever the variant.
        let floor_bytes = if name.starts_with("adamw") { 28 } else { *bytes_per_elem };
        let ms = median(&ours[1..]);
        let floor_ms = median(&floors[1..]) * *bytes_per_elem as f64 / floor_bytes as f64;
        let gb_s = (len_elems * bytes_per_elem) as f64 / ms / 1e6;
        let torch_ms = theirs.get(1..).map_or("-".to_owned(), |theirs| format!("{:.3}", median(theirs)));
        let ratio = ms / floor_ms;
        println!("{name:<26}{bytes_per_elem:>11}{ms:>10.3}{gb_s:>8.1}{floor_ms:>10.3}{ratio:>7.2}{torch_ms:>10}");
    }
}

/// A Python process that runs one of PyTorch's operations each time it is asked to.
struct Torch {
    process: Child,
    answers: BufReader<ChildStdout>,
    known: Vec<String>,
}

impl Torch {
    fn start(len_elems: usize, fds: [&OwnedFd; 6]) -> Result<Torch, String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/ops_pytorch.py");
        let mut process = Command::new("python3")
            .args([script, &len_elems.to_string()])
            .args(fds.map(|fd| fd.as_raw_fd().to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("python3: {error}"))?;
        let mut answers = BufReader::new(process.stdout.take().ok_or("no pipe")?);
        let mut known = String::new();
        match answers.read_line(&mut known) {
            Ok(1..) => Ok(Torch { process, answers, known: known.split_whitespace().map(str::to_owned).collect() }),
            _ => Err(format!("{script} ended with {:?}: is torch installed?", process.wait())),
        }
    }

    fn milliseconds(&mut self, name: &str) -> Option<f64> {
        if !self.known.iter().any(|known| known == name) {
            return None;
        }
        writeln!(self.process.stdin.as_mut()?, "{name}").ok()?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer).ok()?;
        answer.trim().parse().ok()
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let check_only = arguments.iter().any(|argument| argument == "--test" || argument == "--list");
    let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned().unwrap_or_default();
    let len_elems = match std::env::var("ANNULUS_BENCH_ELEMS") {
        Ok(value) => value.parse().expect("ANNULUS_BENCH_ELEMS is a number of elements"),
        Err(_) if check_only => 10_000,
        Err(_) => 100_000_000,
    };
    let mut tensors = Tensors::new(len_elems).expect("memory for the tensors");

    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let mut group = criterion.benchmark_group("ops");
    for case in CASES {
        group.throughput(Throughput::Bytes((len_elems * case.bytes_per_elem) as u64));
        group.bench_function(case.name, |bencher| bencher.iter(|| (case.run)(&mut tensors)));
    }
    group.finish();
    criterion.final_summary();
    if !check_only {
        print_table(&mut tensors, &|name| filter == "table" || name.contains(&filter));
    }
}
