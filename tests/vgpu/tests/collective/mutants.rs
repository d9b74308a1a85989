//! Tests of the tests: the collective broken on purpose, one way at a time, must be caught.
//!
//! Wrong memory orders are made in the text of the PTX that ships; the others are variants that the source names
//! (`kernels/mutant.cuh`), all in one PTX text beside this crate; one slot is an argument.
//!
//! What catches each (the test prints the messages and fails if this table is not true): `race` is the race
//! detector, `bounds` an access outside of an allocation, `result` a comparison with the reference, `record` a fault record that
//! should not be there or is wrong, `hang` a wait that nothing ends. The last column is the first catch with the race detector
//! off: what a GPU might show.
//!
//! | mutant | caught by | without the race detector |
//! |---|---|---|
//! | relaxed post | race | - |
//! | post of device scope | race | - |
//! | relaxed wait | race | - |
//! | wait of device scope | race | - |
//! | word of device scope | race | - |
//! | weak look at a word | race | - |
//! | last block without order | race | - |
//! | no credit | race | result |
//! | credit before use | race | record |
//! | flag before data | race | result |
//! | wait for the transfer before | race | result |
//! | no barrier after the wait | race | result |
//! | no barrier before the post | race | result |
//! | staging by ld.global.nc | race | - |
//! | torn words | race | result |
//! | chunk of the next owner | result | result |
//! | one element too many | result | result |
//! | descriptors not compared | record | record |
//! | output before agreement | result | result |
//! | abort word not looked at | record | record |
//! | data told before they are there | record | record |
//! | one slot | record | record |

use annulus::ReduceOp;
use annulus::abi::collective::{Protocol, Reason};
use annulus::schedule::{Algorithm, Collective};
use annulus_vgpu::{Fault, Module, Options};

use super::steps::steps;
use super::trial::{Failure, inputs, rough, trial};
use super::world::{Epilogue, Operation, Shape, World};

/// The variants of `kernels/mutant.cuh`.
const VARIANTS: &str = include_str!("../../mutants/collective.ptx");
/// The table above.
const TABLE: &str = include_str!("mutants.rs");
/// What `mutant()` returns until the test writes another number.
const PLACE: &str = "3735928559";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// The race detector.
    Race,
    /// An access outside of an allocation.
    Bounds,
    /// A comparison with what should come out.
    Result,
    /// A fault record that should not be there, or is not the right one.
    Record,
    /// A wait that nothing ends.
    Hang,
    Nothing,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            By::Race => "race",
            By::Bounds => "bounds",
            By::Result => "result",
            By::Record => "record",
            By::Hang => "hang",
            By::Nothing => "-",
        }
    }
}

enum Breakage {
    /// One text for another in the PTX of the kernel.
    Text(&'static str, &'static str),
    /// Number in `kernels/mutant.cuh`.
    Variant(u32),
    Slots(u32),
}

struct Mutant {
    name: &'static str,
    breakage: Breakage,
    caught_by: By,
    by_results_alone: By,
}

const fn text(name: &'static str, from: &'static str, to: &'static str, by: By, alone: By) -> Mutant {
    Mutant { name, breakage: Breakage::Text(from, to), caught_by: by, by_results_alone: alone }
}

const fn variant(name: &'static str, number: u32, by: By, alone: By) -> Mutant {
    Mutant { name, breakage: Breakage::Variant(number), caught_by: by, by_results_alone: alone }
}

const MUTANTS: [Mutant; 22] = [
    text("relaxed post", "st.release.sys.", "st.relaxed.sys.", By::Race, By::Nothing),
    text("post of device scope", "st.release.sys.", "st.release.gpu.", By::Race, By::Nothing),
    text("relaxed wait", "ld.acquire.sys.", "ld.relaxed.sys.", By::Race, By::Nothing),
    text("wait of device scope", "ld.acquire.sys.", "ld.acquire.gpu.", By::Race, By::Nothing),
    text("word of device scope", "st.relaxed.sys.global.u64", "st.relaxed.gpu.global.u64", By::Race, By::Nothing),
    text("weak look at a word", "ld.relaxed.sys.global.u64", "ld.global.u64", By::Race, By::Nothing),
    text("last block without order", "atom.acq_rel.gpu.", "atom.relaxed.gpu.", By::Race, By::Nothing),
    variant("no credit", 1, By::Race, By::Result),
    variant("credit before use", 2, By::Race, By::Record),
    variant("flag before data", 3, By::Race, By::Result),
    variant("wait for the transfer before", 4, By::Race, By::Result),
    variant("no barrier after the wait", 5, By::Race, By::Result),
    variant("no barrier before the post", 6, By::Race, By::Result),
    variant("staging by ld.global.nc", 7, By::Race, By::Nothing),
    variant("torn words", 8, By::Race, By::Result),
    variant("chunk of the next owner", 9, By::Result, By::Result),
    variant("one element too many", 10, By::Result, By::Result),
    variant("descriptors not compared", 11, By::Record, By::Record),
    variant("output before agreement", 12, By::Result, By::Result),
    variant("abort word not looked at", 13, By::Record, By::Record),
    variant("data told before they are there", 14, By::Record, By::Record),
    Mutant { name: "one slot", breakage: Breakage::Slots(1), caught_by: By::Record, by_results_alone: By::Record },
];

impl Mutant {
    fn module(&self) -> Module {
        let text = match self.breakage {
            Breakage::Text(from, to) => {
                assert!(annulus::kernels::COLLECTIVE.contains(from), "{}: no {from} in the kernel", self.name);
                annulus::kernels::COLLECTIVE.replace(from, to)
            }
            Breakage::Variant(number) => VARIANTS.replace(PLACE, &number.to_string()),
            Breakage::Slots(_) => annulus::kernels::COLLECTIVE.to_owned(),
        };
        Module::parse(&text).unwrap()
    }

    fn slots(&self) -> u32 {
        if let Breakage::Slots(slots) = self.breakage { slots } else { 2 }
    }
}

/// Runs the battery; what catches the module first, and its words.
fn first_catch(module: &Module, slots: u32, detect_races: bool) -> (By, String) {
    for seed in 1..4 {
        let options = Options { seed, detect_races, budget_instructions: 20_000_000, ..Options::default() };
        for protocol in [Protocol::Bulk, Protocol::Words] {
            for algorithm in [Algorithm::Ring, Algorithm::Direct] {
                let shape = Shape { protocol, slots, slot_bytes: 1024, threads: 64, ..Shape::new(3) };
                for check in [sums, one_step, squares, mismatch, absence, abort, steps] {
                    if let Err(failure) = check(module, shape, algorithm, &options) {
                        return (kind_of(&failure), failure.to_string());
                    }
                }
            }
        }
    }
    (By::Nothing, String::new())
}

/// Faults that the table has no word for (a misaligned access, a barrier that PTX does not define) were never the way to catch
/// one of these.
fn kind_of(failure: &Failure) -> By {
    match failure {
        Failure::Machine(Fault::Race { .. }) => By::Race,
        Failure::Machine(Fault::OutOfBounds { .. }) => By::Bounds,
        Failure::Machine(Fault::Hang { .. } | Fault::Deadlock { .. }) => By::Hang,
        Failure::Machine(fault) => panic!("{fault}"),
        Failure::GaveUp(..) => By::Record,
        Failure::Result(_) => By::Result,
    }
}

type Check = Result<(), Failure>;

/// Two operations, so that a slot, a counter or a word left over from the first one shows in the second.
fn sums(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    let mut world = World::new(shape);
    for len_elems in [300, 75] {
        let operation = Operation {
            timeout_ns: 3_000_000,
            in_place: false,
            op: ReduceOp::Avg,
            ..Operation::new(Collective::AllReduce, algorithm, len_elems)
        };
        trial(&mut world, module, &operation, &inputs::<f32>(&operation, 3, rough), options, false)?;
    }
    Ok(())
}

/// The same where words go to everybody at once.
fn one_step(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    if (shape.protocol, algorithm) != (Protocol::Words, Algorithm::Direct) {
        return Ok(());
    }
    let mut world = World::new(shape);
    for len_elems in [100, 75, 90] {
        let operation = Operation::new(Collective::AllReduce, algorithm, len_elems);
        let operation = Operation { timeout_ns: 3_000_000, one_step: true, ..operation };
        trial(&mut world, module, &operation, &inputs::<f32>(&operation, 3, rough), options, false)?;
    }
    Ok(())
}

fn short(collective: Collective, algorithm: Algorithm) -> Operation {
    Operation { timeout_ns: 300_000, ..Operation::new(collective, algorithm, 30) }
}

/// The last block of three adds what all have left.
fn squares(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    let mut world = World::new(Shape { channels: 3, threads: 32, ..shape });
    let operation = Operation { timeout_ns: 3_000_000, ..Operation::new(Collective::AllReduce, algorithm, 144) };
    let (mut arguments, mut sums) = (Vec::new(), Vec::new());
    for rank in 0..3 {
        let sum_squares = world.alloc(&[0f64]);
        let epilogue = Epilogue { squares: world.alloc(&[0f64; 3]), sum_squares, ..Epilogue::default() };
        let buffer = world.alloc(&[2f32; 144]);
        sums.push(sum_squares);
        arguments.push(world.arguments::<f32>(&operation, rank, [buffer; 2], epilogue));
    }
    world.launch::<f32>(module, &arguments, options).map_err(Failure::Machine)?;
    let squares = sums.iter().map(|sum| world.read::<f64>(*sum, 1)[0]).sum::<f64>();
    let expected = 144.0 * 36.0;
    if squares == expected { Ok(()) } else { Err(Failure::Result(format!("squares {squares}, not {expected}"))) }
}

/// Runs `operations` by rank in place on `input`s; the world and the addresses of the buffers.
fn in_place(
    module: &Module,
    world: &mut World,
    operations: [Option<Operation>; 3],
    options: &Options,
) -> Result<Vec<bool>, Failure> {
    let (mut arguments, mut buffers) = (Vec::new(), Vec::new());
    for (rank, operation) in operations.iter().enumerate() {
        let Some(operation) = operation else { continue };
        let input = inputs::<f32>(operation, 3, |rank, i| (rank * 100 + i) as f32).swap_remove(rank);
        let buffer = world.alloc(&input);
        buffers.push((buffer, input));
        arguments.push(world.arguments::<f32>(operation, rank as u32, [buffer; 2], Epilogue::default()));
    }
    world.launch::<f32>(module, &arguments, options).map_err(Failure::Machine)?;
    Ok(buffers.into_iter().map(|(buffer, input)| world.read::<f32>(buffer, input.len()) != input).collect())
}

/// Every rank must find that one runs something else.
fn mismatch(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    let mut world = World::new(shape);
    let operation = short(Collective::AllReduce, algorithm);
    let other = Operation { descriptor: 1, ..operation };
    in_place(module, &mut world, [Some(operation), Some(other), Some(operation)], options)?;
    for rank in 0..3 {
        let record = world.faults(rank).first().copied().unwrap_or(bytemuck::Zeroable::zeroed());
        if record.reason != Reason::Mismatch as u32 {
            return Err(Failure::GaveUp(rank, record));
        }
    }
    Ok(())
}

/// Nothing may be written while a rank has not come.
fn absence(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    let mut world = World::new(shape);
    let operation = short(Collective::AllGather, algorithm);
    let changed = in_place(module, &mut world, [Some(operation), Some(operation), None], options)?;
    match changed.iter().position(|changed| *changed) {
        Some(rank) => Err(Failure::Result(format!("rank {rank} wrote before all had come"))),
        None => Ok(()),
    }
}

/// The host's word ends the wait for a rank that does not come, and the record says so.
fn abort(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Check {
    let mut world = World::new(shape);
    let word = world.aborts[0];
    world.memory.write(word, 4).unwrap().fill(1);
    in_place(module, &mut world, [Some(short(Collective::AllReduce, algorithm)), None, None], options)?;
    let record = world.faults(0).first().copied().unwrap_or(bytemuck::Zeroable::zeroed());
    if record.reason == Reason::Aborted as u32 { Ok(()) } else { Err(Failure::GaveUp(0, record)) }
}

#[test]
fn what_is_not_broken_passes() {
    for (name, text) in [("kernel", annulus::kernels::COLLECTIVE), ("variants", &VARIANTS.replace(PLACE, "0"))] {
        let module = Module::parse(text).unwrap();
        assert_eq!(first_catch(&module, 2, true), (By::Nothing, String::new()), "{name}");
    }
}

#[test]
fn every_mutant_is_caught() {
    let mut wrong = Vec::new();
    for mutant in &MUTANTS {
        let module = mutant.module();
        let (by, words) = first_catch(&module, mutant.slots(), true);
        let (alone, _) = first_catch(&module, mutant.slots(), false);
        println!("{:<28} {:<6} {:<6} {words}", mutant.name, by.name(), alone.name());
        let row = format!("//! | {} | {} | {} |\n", mutant.name, by.name(), alone.name());
        let is_as_told = (by, alone) == (mutant.caught_by, mutant.by_results_alone) && TABLE.contains(&row);
        if by == By::Nothing || !is_as_told {
            wrong.push((mutant.name, by, alone));
        }
    }
    assert!(wrong.is_empty(), "not as the table says: {wrong:?}");
}

#[test]
fn the_variants_are_of_these_sources() {
    let digest = |text: &str| text.lines().next().map(str::to_owned);
    assert_eq!(digest(VARIANTS), digest(annulus::kernels::COLLECTIVE), "rebuild with ANNULUS_UPDATE_PTX=1");
    assert!(VARIANTS.contains(PLACE));
}
