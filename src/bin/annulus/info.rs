//! `annulus info`: which backends there are, what was found and what not, and why.

use std::borrow::Cow;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::kernels;
use annulus::ops::Level;
use annulus::world::{Environment, GROUP_AREA_BYTES, MAX_GROUPS, MAX_RANKS, World, WorldOptions, launch};
use annulus::{ReduceOp, Result};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{PidfdFlags, Resource};
use serde::Serialize;

use crate::gpus;
use crate::machine::{self, Machine};

/// Show what this machine and this build offer: backends, launcher, limits; what is missing, and why.
///
/// Ends with 1 if the host backend does not work here, with 2 if the environment's variables are malformed.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Info {
    version: &'static str,
    machine: Machine,
    backends: Vec<Backend>,
    /// Nothing where there is no management library.
    links: Option<gpus::Links>,
    environment: Detected,
    limits: Vec<Limit>,
}

#[derive(Serialize)]
struct Backend {
    name: &'static str,
    available: bool,
    summary: String,
    probes: Vec<Probe>,
}

/// One thing that was looked for.
#[derive(Serialize)]
struct Probe {
    what: Cow<'static, str>,
    found: bool,
    detail: String,
}

#[derive(Serialize)]
struct Detected {
    launcher: String,
    rank: Option<u32>,
    world_size: Option<u32>,
    error: Option<String>,
    /// Launchers' variables that are set.
    variables: Vec<(String, String)>,
}

#[derive(Serialize)]
struct Limit {
    what: &'static str,
    value: String,
}

/// Ends with the exit code that the help tells.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let machine = Machine::look();
    let (cuda, links) = cuda();
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        backends: vec![host(&machine), cuda],
        links,
        environment: environment(),
        limits: limits(&machine),
        machine,
    };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&info).unwrap_or_else(|error| error.to_string()),
        false => describe(&info),
    };
    if let Err(error) = std::io::Write::write_all(&mut std::io::stdout(), format!("{text}\n").as_bytes()) {
        eprintln!("annulus: writing to standard output: {error}");
        return ExitCode::FAILURE;
    }
    match (info.backends[0].available, info.environment.error) {
        (false, _) => ExitCode::FAILURE,
        (true, Some(_)) => ExitCode::from(super::USAGE_ERROR),
        (true, None) => ExitCode::SUCCESS,
    }
}

fn describe(info: &Info) -> String {
    let mut lines = vec![format!("annulus {} on {}", info.version, info.machine.describe()), String::new()];
    for backend in &info.backends {
        let state = if backend.available { "available" } else { "not available" };
        lines.push(format!("backend {}: {state}: {}", backend.name, backend.summary));
        let mark = |found| if found { "yes" } else { "no" };
        lines.extend(backend.probes.iter().map(|probe| {
            format!("  {:<26} {:<4} {}", probe.what, mark(probe.found), probe.detail).trim_end().to_owned()
        }));
        lines.push(String::new());
    }
    if let Some(links) = &info.links {
        lines.push("links between GPUs, as nvidia-smi topo -m names and numbers them".to_owned());
        lines.extend(links.text.lines().map(|line| format!("  {line}").trim_end().to_owned()));
        lines.push(String::new());
    }
    let environment = &info.environment;
    lines.push(match (&environment.error, environment.rank, environment.world_size) {
        (Some(error), ..) => format!("environment: {error}"),
        (None, Some(rank), Some(world_size)) => {
            format!("environment: {}: rank {rank} of {world_size}", environment.launcher)
        }
        _ => format!("environment: {}", environment.launcher),
    });
    if environment.variables.is_empty() {
        lines.push("  no variable of a launcher is set: a program is one rank, or starts its own".to_owned());
    }
    lines.extend(environment.variables.iter().map(|(name, value)| format!("  {name}={value}")));
    lines.extend([String::new(), "limits".to_owned()]);
    lines.extend(info.limits.iter().map(|limit| format!("  {:<26} {}", limit.what, limit.value)));
    lines.join("\n")
}

// ---- the host backend --------------------------------------------------------------------------------------------------

fn host(machine: &Machine) -> Backend {
    let mut probes = vec![
        probe("sealed memory (memfd)", sealed_memory(), "shared memory without a name"),
        probe("process handles (pidfd)", pidfd(), "a dead rank is noticed"),
        probe("futex", futex(), "ranks that wait long sleep"),
        probe("socket credentials", credentials(), "other users are refused"),
        Probe { what: "vector instructions".into(), found: Level::detected() > Level::Portable, detail: vectors() },
    ];
    let meeting = two_ranks();
    let available = meeting.is_ok();
    probes.push(match meeting {
        Ok(took) => Probe {
            what: "two ranks meet and sum".into(),
            found: true,
            detail: format!("tried just now, with threads: {:.1} ms in all", took.as_secs_f64() * 1e3),
        },
        Err(error) => Probe { what: "two ranks meet and sum".into(), found: false, detail: error.to_string() },
    });
    let memory = match (machine.memory_bytes, machine.available_bytes) {
        (Some(all), Some(available)) => format!("{} of {} free", machine::size(available), machine::size(all)),
        _ => "memory unknown".to_owned(),
    };
    let cache = machine.last_level_cache.as_deref().unwrap_or("unknown cache");
    Backend { name: "host", available, summary: format!("{} cores, {cache}, {memory}", machine.cores), probes }
}

fn probe(what: &'static str, tried: rustix::io::Result<()>, purpose: &str) -> Probe {
    match tried {
        Ok(()) => Probe { what: what.into(), found: true, detail: purpose.to_owned() },
        Err(errno) => Probe { what: what.into(), found: false, detail: format!("{errno}; needed so that {purpose}") },
    }
}

fn sealed_memory() -> rustix::io::Result<()> {
    let memory = rustix::fs::memfd_create("annulus-info", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, 4096)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

fn pidfd() -> rustix::io::Result<()> {
    rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).map(drop)
}

fn futex() -> rustix::io::Result<()> {
    let word = AtomicU32::new(0);
    rustix::thread::futex::wake(&word, rustix::thread::futex::Flags::empty(), 1).map(drop)
}

fn credentials() -> rustix::io::Result<()> {
    let (one, _other) = UnixStream::pair()
        .map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))?;
    rustix::net::sockopt::socket_peercred(&one).map(drop)
}

fn vectors() -> String {
    match Level::detected() {
        Level::Portable => "what every processor of this architecture has".into(),
        Level::Avx2 => "AVX2, FMA, F16C".into(),
        Level::Avx512 => "AVX-512 F, BW, DQ, VL".into(),
    }
}

/// All of it at once: sockets, shared memory, flags, a collective.
fn two_ranks() -> Result<Duration> {
    let start = Instant::now();
    let sums = launch::threads(2, |environment| -> Result<f32> {
        let options = WorldOptions { init_timeout: Duration::from_secs(10), ..WorldOptions::default() };
        let world = World::join(environment, options)?;
        let mut communicator = Communicator::new(&world, CollectiveOptions::default())?;
        let mut elements = [world.rank() as f32 + 1.0; 1024];
        communicator.all_reduce_slice(&mut elements, ReduceOp::Sum)?;
        drop(communicator);
        world.teardown(Duration::from_secs(10))?;
        Ok(elements.into_iter().fold(f32::INFINITY, f32::min))
    })?;
    for sum in sums {
        let sum = sum?;
        if sum != 3.0 {
            return Err(annulus::Error::InvalidArgument {
                argument: "the sum of 1 and 2",
                value: sum.to_string(),
                accepted: "must be 3: this machine computes wrongly",
            });
        }
    }
    Ok(start.elapsed())
}

// ---- CUDA --------------------------------------------------------------------------------------------------------------

fn cuda() -> (Backend, Option<gpus::Links>) {
    let (findings, links) = gpus::look();
    let devices = findings.iter().filter(|finding| finding.found && finding.what.starts_with("device ")).count();
    let mut probes: Vec<_> = findings
        .into_iter()
        .map(|finding| Probe { what: finding.what.into(), found: finding.found, detail: finding.detail })
        .collect();
    probes.push(Probe {
        what: "kernels".into(),
        found: true,
        detail: format!("{} modules by {}", kernels::ALL.len(), kernels::origin(kernels::PROBE)),
    });
    let summary = format!("{devices} usable device(s); strategies take them if every rank has one of its own");
    (Backend { name: "cuda", available: devices > 0, summary, probes }, links)
}

// ---- environment and limits --------------------------------------------------------------------------------------------

fn environment() -> Detected {
    let told_by_launchers = |name: &str| {
        ["ANNULUS_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            || ["RANK", "WORLD_SIZE", "GROUP_RANK", "NODE_RANK"].contains(&name)
            || [
                "SLURM_JOB_ID",
                "SLURM_PROCID",
                "SLURM_STEP_ID",
                "SLURM_STEPID",
                "SLURM_STEP_NUM_TASKS",
                "SLURM_LOCALID",
                "SLURM_NODEID",
            ]
            .contains(&name)
    };
    let mut variables: Vec<(String, String)> = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| told_by_launchers(name))
        // What the ranks of a job know and nobody else does.
        .map(|(name, value)| if name == "ANNULUS_JOB" { (name, "<redacted>".to_owned()) } else { (name, value) })
        .collect();
    variables.sort();
    match Environment::detect() {
        Ok(environment) => Detected {
            launcher: environment.launcher.to_string(),
            rank: Some(environment.rank),
            world_size: Some(environment.world_size),
            error: None,
            variables,
        },
        Err(error) => Detected {
            launcher: "contradictory".into(),
            rank: None,
            world_size: None,
            error: Some(error.to_string()),
            variables,
        },
    }
}

fn limits(machine: &Machine) -> Vec<Limit> {
    let options = WorldOptions::default();
    let descriptors = rustix::process::getrlimit(Resource::Nofile);
    let limit = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let cgroup = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let cgroup = cgroup.map(|text| text.trim().parse().map_or_else(|_| "none".to_owned(), machine::size));
    vec![
        Limit { what: "ranks", value: format!("1 to {MAX_RANKS}, on one machine") },
        Limit { what: "communicators alive", value: MAX_GROUPS.to_string() },
        Limit { what: "memory per communicator", value: format!("{} a rank", machine::size(GROUP_AREA_BYTES as u64)) },
        Limit {
            what: "registered buffers",
            value: format!(
                "{} of address space a rank; of memory what is free ({})",
                machine::size(options.arena_bytes as u64),
                machine.available_bytes.map_or_else(|| "unknown".to_owned(), machine::size)
            ),
        },
        Limit { what: "memory of the cgroup", value: cgroup.unwrap_or_else(|| "unknown".into()) },
        Limit {
            what: "open descriptors",
            value: format!("{} now, {} at most", limit(descriptors.current), limit(descriptors.maximum)),
        },
        Limit {
            what: "deadlines",
            value: format!(
                "{} s to meet, {} s for an operation, {} ms without a sign of life",
                options.init_timeout.as_secs(),
                options.timeout.as_secs(),
                options.heartbeat_limit.map_or(0, |limit| limit.as_millis())
            ),
        },
    ]
}
