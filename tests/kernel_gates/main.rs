//! What the kernels' code must have and must not have: gates on the PTX, which run anywhere, and on what `ptxas` makes of it,
//! where the toolkit is (`CUDA_HOME`, `CUDA_PATH`, beside `NVCC`, or `PATH`; CI installs it, and `ANNULUS_REQUIRE_GATES=1` fails
//! without it). Presence and upper bounds are pinned, not counts: a compiler may do better.

mod flow;
mod hot;
mod machine;
mod ptx;

use flow::Access;
use hot::Wide;

/// What is asked of a kernel.
struct Kernel {
    name: &'static str,
    /// At most; so as many threads fit on a multiprocessor of 65,536 registers as the kernel is launched with.
    registers: u32,
    /// The loops that move whole vectors, the least of each: one for each pair of element sizes, as a rule.
    hot: &'static [Wide],
    /// Narrower accesses that those loops may have.
    narrower: &'static [Access],
}

impl Kernel {
    const fn new(name: &'static str, registers: u32, hot: &'static [Wide]) -> Kernel {
        Kernel { name, registers, hot, narrower: &[] }
    }

    const fn beside(self, narrower: &'static [Access]) -> Kernel {
        Kernel { narrower, ..self }
    }
}

/// Four packs in flight: f32 to f32, 16 bits to 16 bits, f32 to 16 bits, 16 bits to f32.
const CASTS: [Wide; 4] = [(4, 4), (4, 4), (4, 2), (4, 8)];
/// The same, and what stands in the target is read too.
const ADDITIONS: [Wide; 4] = [(8, 4), (8, 4), (6, 2), (12, 8)];
/// In place: f64, f32, 16 bits.
const UPDATES: [Wide; 3] = [(4, 4); 3];
/// Four rows of f64, f32, 16 bits; and the walks of the last block over the slots, which are 16 bytes each.
const NORMS: [Wide; 5] = [(4, 0), (4, 0), (4, 0), (1, 0), (1, 0)];
/// The norms, each written: f64, f32, 16 bits, f32 to 16 bits, 16 bits to f32; and the slots.
const WRITTEN_NORMS: [Wide; 7] = [(4, 4), (4, 4), (4, 4), (8, 4), (4, 8), (1, 0), (1, 0)];

/// Copies of four packs and of one, each from a slot or own memory into a slot and own memory. Sums of two packs and of
/// one, own and received, as a partial or finished one into a slot and as a finished one into own memory; in each of both,
/// a pack of every rank.
const COLLECTIVE: [Wide; 6] = [(8, 8), (2, 2), (4, 6), (2, 3), (1, 0), (1, 0)];
/// Packs of bytes are summed one at a time.
const COLLECTIVE_OF_BYTES: [Wide; 6] = [(8, 8), (2, 2), (2, 3), (2, 3), (1, 0), (1, 0)];

/// Two groups of four elements: gradient, weight and two states read, all but the gradient written.
const ADAMW: [Wide; 1] = [(8, 6)];
const SGD: [Wide; 1] = [(6, 4)];
/// Four elements of 16 bits, beside four of f32 that are 16 bytes.
const HALF_PACKS: [Access; 2] = [Access::load(8), Access::store(8)];
/// The copy of finished sums in a narrower dtype: four of f32 in 16 bits; two of f64 in f32, in 16 bits.
const COPIES_OF_F32: [Access; 1] = [Access::store(8)];
const COPIES_OF_F64: [Access; 2] = [Access::store(8), Access::store(4)];

const KERNELS: [Kernel; 22] = [
    Kernel::new("accumulate_tensors", 80, &ADDITIONS),
    Kernel::new("cast_tensors", 64, &CASTS),
    Kernel::new("cast_stochastic", 80, &[(4, 2)]),
    Kernel::new("clamp_tensors", 64, &UPDATES),
    Kernel::new("scale_tensors", 64, &UPDATES),
    Kernel::new("collective_f32", 128, &COLLECTIVE).beside(&COPIES_OF_F32),
    Kernel::new("collective_f16", 128, &COLLECTIVE),
    Kernel::new("collective_bf16", 128, &COLLECTIVE),
    Kernel::new("collective_f64", 128, &COLLECTIVE).beside(&COPIES_OF_F64),
    Kernel::new("collective_i32", 128, &COLLECTIVE),
    Kernel::new("collective_i64", 128, &COLLECTIVE),
    Kernel::new("collective_u8", 128, &COLLECTIVE_OF_BYTES),
    Kernel::new("measure_norm", 96, &NORMS),
    Kernel::new("measure_norm_products", 80, &NORMS),
    Kernel::new("measure_norm_p", 128, &NORMS),
    Kernel::new("stage_tensors", 64, &CASTS),
    Kernel::new("step_adamw", 96, &ADAMW).beside(&HALF_PACKS),
    Kernel::new("step_sgd", 96, &SGD).beside(&HALF_PACKS),
    Kernel::new("unscale_norm", 128, &WRITTEN_NORMS),
    // Kernels of one block or one thread.
    Kernel::new("probe_peer", 32, &[]),
    Kernel::new("store_words", 32, &[]),
    Kernel::new("update_scaler", 32, &[]),
];

fn is_collective(kernel: &str) -> bool {
    kernel.starts_with("collective_")
}
