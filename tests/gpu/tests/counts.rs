//! What every timed operation costs, and those that are timed only as part of a step, as far as it can be known without a GPU:
//! bytes that the kernels load and store, and those of the memory transactions by which they do, beside the least that there is,
//! and instructions.
//!
//!     cargo test -p annulus-gpu --test counts -- --nocapture

#[path = "../../vgpu/driver/tests/support/mod.rs"]
mod support;

use std::path::Path;

use annulus::DType;
use annulus::ops::cuda::{Contribution, Contributions};
use annulus_gpu::Result;
use annulus_gpu::site::Site;
use annulus_gpu::time::cases::{CASES, Work};
use annulus_gpu::time::model::tensors;
use support::on_virtual_gpu;

/// Whole chunks, a part of one, an odd length.
const LENS: [usize; 3] = [32_768, 20_000, 1021];

/// Bytes an element beside the least: tables, slots, and the heads and tails that are read in small pieces.
const BESIDE: f64 = 1.4;

/// Name, least bytes an element, and what makes ready.
type Operation = (&'static str, u64, fn(&Site, &[usize]) -> Result<Work>);

fn operations() -> impl Iterator<Item = Operation> {
    let timed = CASES.iter().map(|case| (case.what, case.bytes_per_elem, case.prepare));
    timed.chain([("stage bf16 into f32", 6, stage as _)])
}

/// The first micro-batch into buckets.
fn stage(site: &Site, lens: &[usize]) -> Result<Work> {
    let [sources, targets] = [tensors(site, DType::BF16, lens)?, tensors(site, DType::F32, lens)?];
    let pairs: Vec<_> = sources.into_iter().zip(targets).collect();
    let list = Contributions::new(&site.kernels, &pairs)?;
    Ok(Box::new(move |stream| Ok(list.launch(stream, Contribution::Replace, 0.25)?)))
}

#[derive(Default)]
struct Cost {
    kernels: Vec<String>,
    instructions: u64,
    loaded_bytes: u64,
    stored_bytes: u64,
    /// Of 32 bytes.
    transactions: u64,
}

/// What the launches since `before` bytes of the tally did.
fn cost_since(tally: &str, before: usize) -> Cost {
    let mut cost = Cost::default();
    for line in tally[before..].lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [instructions, loaded, stored, loads, stores] = [1, 2, 3, 4, 5].map(|at| words[at].parse::<u64>().unwrap());
        cost.kernels.push(words[0].to_owned());
        cost.instructions += instructions;
        cost.loaded_bytes += loaded;
        cost.stored_bytes += stored;
        cost.transactions += loads + stores;
    }
    cost
}

fn measure() -> Result<()> {
    let path = std::env::var("ANNULUS_VGPU_TALLY")?;
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    let site = Site::open()?;
    let len_elems: usize = LENS.iter().sum();
    let mut table =
        "| operation | kernels | least B | loaded + stored B | of least | transactions | instructions |\n".to_owned();
    table += "|---|---|---:|---:|---:|---:|---:|\n";
    for (what, least, prepare) in operations() {
        let mut work = prepare(&site, &LENS)?;
        site.synchronize()?;
        let before = read().len();
        work(&site.stream)?;
        site.synchronize()?;
        let Cost { kernels, instructions, loaded_bytes, stored_bytes, transactions } = cost_since(&read(), before);
        let per_elem = |count: u64| count as f64 / len_elems as f64;
        let (least, moved) = (least as f64, per_elem(loaded_bytes + stored_bytes));
        let transferred = per_elem(32 * transactions);
        table += &format!(
            "| {what} | `{}` | {least:.0} | {:.2} + {:.2} | {:.3} | {:.3} | {:.1} |\n",
            kernels.join("`, `"),
            per_elem(loaded_bytes),
            per_elem(stored_bytes),
            moved / least,
            transferred / least,
            per_elem(instructions)
        );
        assert!(!kernels.is_empty() && moved >= least, "{what}: {moved} bytes an element");
        assert!(moved <= least + BESIDE, "{what}: {moved} bytes an element, {least} would do");
        assert!(transferred <= 1.1 * least, "{what}: transactions of {transferred} bytes an element, {least} would do");
    }
    std::fs::write(Path::new(&path).with_extension("md"), table)?;
    Ok(())
}

#[test]
fn no_operation_moves_a_byte_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tally");
    let variables = [("ANNULUS_VGPU_TALLY", path.to_str().unwrap())];
    on_virtual_gpu("no_operation_moves_a_byte_twice", &variables, || measure().unwrap());
    // Not in the process on the virtual GPU, which was given another file.
    if let Ok(table) = std::fs::read_to_string(path.with_extension("md")) {
        println!("{table}");
    }
}
