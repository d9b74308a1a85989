//! `annulus bench`: times and verifies collectives, with the table of nccl-tests.

mod arguments;
mod case;
mod inputs;
mod operand;
mod report;

use std::process::ExitCode;

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::Stream;
use annulus::world::launch::{self, LaunchOptions};
use annulus::world::{Environment, Launcher, World, WorldOptions};
use annulus::{DType, Element, Error, Result};
use half::{bf16, f16};

use arguments::{Op, Places, Switch};
use case::{Case, Place};
use report::{Measured, Report, Row};

pub(crate) use arguments::Arguments;

/// Ranks that it starts by itself if not told how many.
const DEFAULT_RANKS: u32 = 2;
/// Codes up to this one are a rank's own, which has said why.
const OWN_EXIT_CODES: i32 = 2;

/// # Errors
/// What is wrong with the arguments or the environment. What goes wrong later is printed and is exit code 1.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let environment = Environment::detect()?;
    let ranks = match (environment.launcher, arguments.ranks) {
        (Launcher::Single, ranks) => ranks.unwrap_or(DEFAULT_RANKS),
        (_, Some(ranks)) if ranks != environment.world_size => {
            return Err(Error::InvalidArgument {
                argument: "--ranks",
                value: format!("{ranks}, but {} has started {}", environment.launcher, environment.world_size),
                accepted: "leave it out under a launcher",
            });
        }
        _ => environment.world_size,
    };
    arguments.check(ranks)?;
    if let Some(path) = arguments.json.as_ref().filter(|_| environment.rank == 0) {
        report::create(path)?;
    }
    if environment.launcher == Launcher::Single && ranks != 1 {
        let outcome = launch::spawn_self(ranks, &LaunchOptions { prefix: false, ..LaunchOptions::default() })?;
        if let Some(failure) = outcome.failure.filter(|_| outcome.code > OWN_EXIT_CODES) {
            eprintln!("annulus: {failure}; the other ranks were ended");
        }
        return Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(1)));
    }
    let rank = environment.rank;
    Ok(match bench(environment, arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("annulus: rank {rank}: {error}");
            ExitCode::FAILURE
        }
    })
}

/// This rank's part. Returns how many elements were wrong, the same on every rank.
fn bench(environment: Environment, arguments: &Arguments) -> Result<u64> {
    let world = World::join(environment, WorldOptions::default())?;
    let timeout = world.options().timeout;
    let options = CollectiveOptions {
        algorithm: arguments.algorithm.into(),
        partials: arguments.partials.into(),
        ..CollectiveOptions::default()
    };
    let mut communicator = Communicator::new(&world, options)?;
    let wrong = match arguments.dtype {
        DType::F32 => sizes::<f32>(arguments, &world, &mut communicator),
        DType::F16 => sizes::<f16>(arguments, &world, &mut communicator),
        DType::BF16 => sizes::<bf16>(arguments, &world, &mut communicator),
        DType::F64 => sizes::<f64>(arguments, &world, &mut communicator),
        DType::I32 => sizes::<i32>(arguments, &world, &mut communicator),
        DType::I64 => sizes::<i64>(arguments, &world, &mut communicator),
        DType::U8 => sizes::<u8>(arguments, &world, &mut communicator),
    }
    // What one rank alone has met must not leave the others waiting.
    .map_err(|error| world.raise(error))?;
    drop(communicator);
    world.teardown(timeout)?;
    Ok(wrong)
}

fn sizes<T: Element>(arguments: &Arguments, world: &World, communicator: &mut Communicator) -> Result<u64> {
    let stream = if arguments.stream { Stream::new("bench")? } else { Stream::immediate("bench") };
    let lengths_elems = arguments.lengths_elems(world.world_size());
    let places: Vec<Place> = match arguments.places() {
        Places::Out => vec![Place::OutOfPlace],
        Places::In => vec![Place::InPlace],
        Places::Both => vec![Place::OutOfPlace, Place::InPlace],
    };
    let places: Vec<Place> = places.into_iter().filter(|place| place.has(arguments.op, arguments.memory)).collect();

    let mut pids = vec![0i64; world.world_size() as usize];
    communicator.all_gather_slice(&[i64::from(std::process::id())], &mut pids)?;
    let measurements = (lengths_elems.len() * places.len()) as u64;
    let mut report = match world.rank() {
        0 => Some(Report::begin(arguments, world, &pids, measurements)?),
        _ => None,
    };
    let mut wrong = 0;
    for len_elems in lengths_elems {
        let size_bytes = len_elems * T::DTYPE.size_bytes();
        let mut row = Row { size_bytes, out_of_place: None, in_place: None };
        for place in &places {
            report.iter().for_each(|report| report.announce(size_bytes, *place));
            let mut case = Case::<T>::new(arguments, communicator, &stream, *place, len_elems)?;
            let verifies = arguments.check == Switch::On && arguments.op != Op::Barrier;
            let before = if verifies { case.verify()? } else { 0 };
            let times = case.time()?;
            let after = if verifies { case.verify()? } else { 0 };
            wrong += before + after;
            row.set(*place, Measured { times, wrong: verifies.then_some(before + after) });
            report.iter().for_each(Report::advance);
        }
        report.as_mut().map_or(Ok(()), |report| report.row(row))?;
        let in_vain = report.as_ref().is_some_and(Report::is_unread);
        if world.reduce_boolean(in_vain, false, world.options().timeout)? {
            break;
        }
    }
    report.map_or(Ok(wrong), Report::end)
}
