//! Starting ranks: as threads of this process, for tests and examples, or as child processes.

mod output;
mod signals;
mod supervise;

use std::ffi::OsString;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Resource;

use crate::error::{Error, Result};
use crate::world::board::MAX_RANKS;
use crate::world::environment::{Environment, Launcher};
use crate::world::frame::{hex, random_nonce};
use crate::world::meeting::Nameless;

/// Fails unless `world_size` is one a job can have.
///
/// # Errors
/// [`Error::InvalidArgument`].
fn check_world_size(world_size: u32) -> Result<()> {
    if (1..=MAX_RANKS).contains(&world_size) {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        argument: "world_size",
        value: world_size.to_string(),
        accepted: "must be from 1 to 64",
    })
}

/// How ranks run as child processes.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// Whether the ranks' output is cut into lines that begin with `[rank]`. If not, they write where this process does.
    pub prefix: bool,
    /// Time for the whole job; none by default. A job that runs out of it ends with exit code 124.
    pub timeout: Option<Duration>,
    /// Time between a signal that ends the job (SIGINT, SIGTERM, SIGHUP, SIGQUIT) and SIGKILL for the ranks that are
    /// left: 30 s, enough for a checkpoint. When a rank has failed the others get 5 s at most.
    pub grace: Duration,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        LaunchOptions { prefix: true, timeout: None, grace: Duration::from_secs(30) }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// 0 if all ranks ended with 0; else the exit code of the first that failed, or 128 + its signal.
    pub code: i32,
    /// What went wrong first, naming the rank; none if the job was ended by a signal to the launcher.
    pub failure: Option<String>,
}

/// Runs `command` (a program and its arguments) as `world_size` processes that meet through inherited sockets, forwards
/// signals to them and their output to this process's, and returns when all have ended. When one fails the others are
/// ended. If this process dies, however it dies, so do they.
///
/// Handlers for SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2 and SIGTSTP are installed; after the call these
/// signals do nothing. The calling thread must not end before the call does, which it cannot: the kernel ties the ranks'
/// lives to it.
///
/// # Errors
/// [`Error::InvalidArgument`] for a world size outside 1..=64 or an empty command; [`Error::Io`] if a rank cannot be
/// started, after the others were ended.
pub fn processes(world_size: u32, command: &[OsString], options: &LaunchOptions) -> Result<Outcome> {
    supervise::supervise(world_size, command, None, options)
}

/// Runs this very program again, with the same arguments, as `world_size` ranks. For programs that want to be started
/// without a launcher:
///
/// ```no_run
/// # use annulus::world::{Environment, Launcher, launch};
/// # fn main() -> annulus::Result<()> {
/// let environment = Environment::detect()?;
/// if environment.launcher == Launcher::Single {
///     std::process::exit(launch::spawn_self(4, &launch::LaunchOptions::default())?.code);
/// }
/// // ... this is one of the ranks
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`processes`].
pub fn spawn_self(world_size: u32, options: &LaunchOptions) -> Result<Outcome> {
    let mut arguments = std::env::args_os();
    let arg0 = arguments.next();
    // Not the path: the file may have been replaced since this program started.
    let command: Vec<OsString> = std::iter::once("/proc/self/exe".into()).chain(arguments).collect();
    supervise::supervise(world_size, &command, arg0, options)
}

/// Runs `rank` once for every rank of a world of `world_size`, each on its own thread, and returns what they returned in
/// rank order. Each rank joins with the [`Environment`] it is given: it meets the others through the same sockets and
/// maps the same segments as a rank that is a process. A panic of a rank is passed on once all have ended.
///
/// # Errors
/// [`Error::InvalidArgument`] for a world size outside 1..=64; [`Error::Io`] if a socket or thread cannot be made.
pub fn threads<T, F>(world_size: u32, rank: F) -> Result<Vec<T>>
where
    T: Send,
    F: Fn(Environment) -> T + Sync,
{
    check_world_size(world_size)?;
    // Half a dozen a rank for good, rank 0's end of every connection, and one rank at a time those of all ranks.
    want_descriptors(512 + 16 * u64::from(world_size));
    let Nameless { listener, inode } = Nameless::bind()?;
    let (mut listener, inode, job) = (Some(Arc::new(listener)), Arc::new(inode), hex(&random_nonce()?));
    std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for number in 0..world_size {
            // Rank 0 alone holds the listener: when it goes, connecting fails at once.
            let environment = Environment::inherited(
                Launcher::Threads,
                number,
                world_size,
                job.clone(),
                listener.take(),
                inode.clone(),
            );
            let rank = &rank;
            let spawned = std::thread::Builder::new()
                .name(format!("rank {number}"))
                .spawn_scoped(scope, move || rank(environment))
                .map_err(|error| Error::io(format!("starting the thread of rank {number}"), error))?;
            handles.push(spawned);
        }
        let results: Vec<std::thread::Result<T>> = handles.into_iter().map(|handle| handle.join()).collect();
        Ok(results.into_iter().map(|result| result.unwrap_or_else(|panic| resume_unwind(panic))).collect())
    })
}

/// Raises the soft limit of open descriptors, if it is lower, as far as the hard limit allows.
fn want_descriptors(wanted: u64) {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        let _ = rustix::process::setrlimit(Resource::Nofile, limit);
    }
}
