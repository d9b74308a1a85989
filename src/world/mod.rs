//! How ranks meet, and what happens when one leaves.
//!
//! ```text
//!   environment  who am I, how many are we, where do we meet        (launcher's variables)
//!   meeting, frame, rendezvous   sockets, users checked, descriptors handed over
//!   segment, memory, board       shared memory without names: control page, arenas
//!   fault, liveness              the first error of the job, for every rank; who is still alive
//!   outpost                      kernels that wait for peers: they fail the job, and end with it
//!   flag                         post and wait
//!   control, recorder            barrier, broadcast, decisions; what everybody did last
//!   descriptors                  what else crosses between processes, over the rendezvous' sockets
//!   launch                       ranks as threads, ranks as child processes
//! ```

mod arena;
mod board;
mod control;
mod descriptors;
pub mod environment;
mod fault;
pub mod flag;
mod frame;
pub mod launch;
mod liveness;
mod meeting;
pub(crate) mod memory;
#[cfg_attr(any(not(feature = "cuda"), loom), allow(dead_code, reason = "what waits in outposts are devices"))]
mod outpost;
mod recorder;
mod rendezvous;
mod segment;
pub(crate) mod sync;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use arena::ArenaRange;
pub use board::{GROUP_AREA_BYTES, MAX_GROUPS, MAX_RANKS, Region};
pub use control::GATHER_LIMIT_BYTES;
pub use environment::{Environment, Launcher};
#[cfg(all(feature = "cuda", not(loom)))]
pub(crate) use outpost::{Outpost, Watch};
pub use recorder::{Record, RecordId};
pub use segment::Segment;

use crate::error::{Error, Result};
use board::{Board, RankState};
use flag::Pacing;
use liveness::Monitor;
use rendezvous::Party;

/// Address space that all arenas of one process together may take, of the 128 TiB there are.
const ADDRESS_SPACE_BYTES: usize = 64 << 40;

/// What a rank is doing that is in no operation.
const IDLE: &str = "no operation";

/// How long to wait, and how much to set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorldOptions {
    /// Deadline for all ranks to meet. 60 s.
    pub init_timeout: Duration,
    /// Deadline of an operation. 600 s.
    pub timeout: Duration,
    /// When a wait is worth a warning that names who is missing. 5 s.
    pub warn_after: Duration,
    /// How long a stopped rank may give no sign of life: 100 ms to 1 h, 500 ms by default; none switches the watch off, for
    /// debuggers. One that is not stopped, but frozen or without a processor, has ten times as long. A rank that dies is
    /// noticed all the same.
    pub heartbeat_limit: Option<Duration>,
    /// Length of this rank's arena in address space, rounded up to pages; memory is taken as it is reserved. 64 GiB.
    /// Where ranks are threads of one process it is capped so that all of them fit.
    pub arena_bytes: usize,
}

impl Default for WorldOptions {
    fn default() -> Self {
        WorldOptions {
            init_timeout: Duration::from_secs(60),
            timeout: Duration::from_secs(600),
            warn_after: Duration::from_secs(5),
            heartbeat_limit: Some(Duration::from_millis(500)),
            arena_bytes: 64 << 30,
        }
    }
}

impl WorldOptions {
    fn check(&self) -> Result<()> {
        let accepted = Duration::from_millis(100)..=Duration::from_secs(3600);
        match self.heartbeat_limit {
            Some(limit) if !accepted.contains(&limit) => Err(Error::InvalidArgument {
                argument: "heartbeat_limit",
                value: format!("{limit:?}"),
                accepted: "must be from 100 ms to 1 h, or none",
            }),
            _ => Ok(()),
        }
    }
}

/// The job as one rank sees it. Cheap to clone; the rank leaves when the last clone goes.
///
/// Dropping it never blocks for long and is not an error by itself; but [`teardown`](World::teardown) also waits until
/// nobody needs this rank any more. A rank that is gone is [`Error::PeerLost`] for whoever then waits for it.
#[derive(Debug, Clone)]
pub struct World(Arc<Membership>);

/// Everything that ends with the last clone.
#[derive(Debug)]
struct Membership {
    core: Arc<Core>,
    /// None for a world of one without a launcher.
    monitor: Option<Monitor>,
}

/// What the calling threads and the monitor share.
#[derive(Debug)]
pub(crate) struct Core {
    rank: u32,
    world_size: u32,
    environment: Environment,
    options: WorldOptions,
    pacing: Pacing,
    board: Board,
    arenas: Vec<Segment>,
    /// By rank, where this rank has one: rank 0 to everybody, everybody to rank 0.
    sockets: Vec<Option<Arc<OwnedFd>>>,
    /// What of this rank's arena is taken.
    ranges: arena::Ranges,
    order: Mutex<control::Order>,
    /// Whether this rank has told the fault in the log.
    told: AtomicBool,
    /// Kernels of this rank that wait for peers.
    outposts: outpost::Outposts,
}

impl World {
    /// Meets the other ranks of `environment`. Returns on every rank, or on none without an error.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range; [`Error::RanksMissing`] naming who did not come before
    /// `init_timeout`; [`Error::RendezvousRefused`]; [`Error::PeerLost`] if a rank dies meanwhile; [`Error::NoSpace`]
    /// and [`Error::Io`].
    pub fn join(environment: Environment, options: WorldOptions) -> Result<World> {
        options.check()?;
        let (rank, world_size) = (environment.rank, environment.world_size);
        environment.check()?;
        let mut arena_bytes = options.arena_bytes;
        if environment.launcher == Launcher::Threads {
            arena_bytes = arena_bytes.min(ADDRESS_SPACE_BYTES / (world_size * world_size) as usize);
        }
        let page = rustix::param::page_size();
        let arena_bytes = arena_bytes.checked_next_multiple_of(page).ok_or_else(|| Error::SizeOverflow {
            what: "arena",
            detail: format!("{arena_bytes} bytes in pages of {page}"),
        })?;
        let arena = Segment::create("annulus-arena", arena_bytes)?;
        let start = std::time::Instant::now();
        let party = Party {
            rank,
            world_size,
            place: environment.place.clone(),
            job: environment.job.clone(),
            timeout: options.init_timeout,
        };
        let met = rendezvous::meet(&party, arena)?;
        drop(party);
        let lifeline = environment.lifeline.clone();
        met.board.enter(rank, std::process::id());
        let mut sockets = vec![None; world_size as usize];
        met.peers.iter().for_each(|peer| sockets[peer.rank as usize] = peer.socket.clone());
        let core = Arc::new(Core {
            rank,
            world_size,
            environment: environment.without_descriptors(),
            pacing: Pacing::for_ranks(world_size),
            board: met.board,
            ranges: Mutex::new(range_alloc::RangeAllocator::new(0..arena_bytes)),
            arenas: met.arenas,
            sockets,
            order: Mutex::default(),
            told: AtomicBool::new(false),
            outposts: outpost::Outposts::default(),
            options,
        });
        let monitor = match (world_size, &lifeline) {
            (1, None) => None,
            _ => Some(Monitor::start(core.clone(), met.peers, lifeline)?),
        };
        let world = World(Arc::new(Membership { core, monitor }));
        // Everybody has mapped everything before anybody uses it.
        let left = world.core().options.init_timeout.saturating_sub(start.elapsed()).max(Duration::from_secs(1));
        world.barrier("join", left)?;
        Ok(world)
    }

    pub(crate) fn core(&self) -> &Core {
        &self.0.core
    }

    /// This rank, from 0.
    pub fn rank(&self) -> u32 {
        self.core().rank
    }

    /// Whether both are this rank's membership of the same world. Two ranks that are threads of one process have one each.
    pub(crate) fn is_same(&self, other: &World) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// How many ranks the job has.
    pub fn world_size(&self) -> u32 {
        self.core().world_size
    }

    /// This rank among those of its machine.
    pub fn local_rank(&self) -> u32 {
        self.core().environment.local_rank
    }

    /// This rank's machine, from 0.
    pub fn node_rank(&self) -> u32 {
        self.core().environment.node_rank
    }

    /// Where rank and size came from.
    pub fn environment(&self) -> &Environment {
        &self.core().environment
    }

    /// The options this rank joined with.
    pub fn options(&self) -> &WorldOptions {
        &self.core().options
    }

    /// How long this rank's waits spin and yield before they park.
    pub fn pacing(&self) -> Pacing {
        self.core().pacing
    }

    /// Shared memory of communicator `group`: `world_size * GROUP_AREA_BYTES`, zeroed at first, backed by memory from
    /// the first call on. Valid while a clone of this world lives.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a group at or beyond [`MAX_GROUPS`]; [`Error::NoSpace`].
    pub fn group_area(&self, group: u32) -> Result<Region> {
        self.core().board.group_area(group)
    }

    /// Takes the number of a group area that nobody uses. One rank claims and tells the others.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if all [`MAX_GROUPS`] are taken.
    pub fn claim_group(&self) -> Result<u32> {
        self.core().board.claim_group()
    }

    /// Gives a group area back, zeroed and without memory. One rank calls it, once no rank touches the area any more.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a group that does not exist; [`Error::Io`].
    pub fn release_group(&self, group: u32) -> Result<()> {
        self.core().board.release_group(group)
    }

    /// The arena of `rank`. Only that rank reserves memory of it; the others look at what it tells them to.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a rank that does not exist.
    pub fn arena_segment(&self, rank: u32) -> Result<&Segment> {
        self.core().check_rank("rank", rank)?;
        Ok(&self.core().arenas[rank as usize])
    }

    /// The error that stopped the job, if one has. Once there is one it stays. One relaxed load when there is none.
    pub fn fault(&self) -> Option<Error> {
        self.core().fault()
    }

    /// As [`fault`](World::fault), for a wait for `peer`: a peer that has left will not come any more. The caller looks
    /// once more at what it waits for before it believes this: the peer may have come first and left afterwards.
    pub fn fault_of(&self, peer: u32) -> Option<Error> {
        self.core().fault().or_else(|| {
            let gone = peer < self.world_size() && self.core().board.state(peer) == RankState::Left;
            gone.then(|| self.core().lost(peer, self.core().doing()))
        })
    }

    /// Stops the job with `error`: every rank's waits end with it, within 10 ms, and every later call. Returns the fault
    /// that stands, which is an earlier one if there was one.
    pub fn raise(&self, error: Error) -> Error {
        self.core().raise(error)
    }

    /// As [`raise`](World::raise), for an error that this rank tells in its own words.
    #[cold]
    pub(crate) fn fail(&self, error: Error) -> Error {
        self.raise(error.clone());
        error
    }

    /// Notes in the flight recorder that an operation has started at `now_ns`, a reading of
    /// [`telemetry::now_ns`](crate::telemetry::now_ns).
    pub fn record_start(&self, record: &Record<'_>, now_ns: u64) -> RecordId {
        self.core().board.recorder(self.rank()).start(record, now_ns)
    }

    /// Notes that an operation has ended well at `now_ns`. One that failed is left as it is.
    pub fn record_end(&self, id: RecordId, now_ns: u64) {
        self.core().board.recorder(self.rank()).end(id, now_ns);
    }

    /// The last 1,024 operations of `rank`, dead or alive, as JSON with the field names of PyTorch's flight recorder.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a rank that does not exist.
    pub fn flight_record(&self, rank: u32) -> Result<serde_json::Value> {
        self.core().check_rank("rank", rank)?;
        Ok(recorder::dump(self.core().board.recorder(rank), rank, self.world_size()))
    }

    /// Waits until every rank is here, and leaves. Afterwards no rank reaches this one's memory through the library.
    ///
    /// # Errors
    /// [`Error::BarrierTimeout`] naming the ranks that did not come; the job's fault. The rank has left all the same.
    pub fn teardown(self, timeout: Duration) -> Result<()> {
        let done = self.barrier("teardown", timeout);
        let core = self.core();
        core.board.set_state(core.rank, RankState::Left);
        done
    }
}

impl Core {
    fn check_rank(&self, argument: &'static str, rank: u32) -> Result<()> {
        if rank < self.world_size {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument,
            value: rank.to_string(),
            accepted: "must be a rank below the world size",
        })
    }

    fn fault(&self) -> Option<Error> {
        if !self.board.fault_cell().is_set() {
            return None;
        }
        self.told_fault()
    }

    /// The fault, with what this rank is doing; the first time also in the log.
    #[cold]
    fn told_fault(&self) -> Option<Error> {
        let mut error = self.board.fault_cell().get(self.rank)?;
        if let Error::PeerLost { operation, .. } | Error::PeerStopped { operation, .. } = &mut error {
            *operation = self.doing();
        }
        if !self.told.swap(true, Ordering::Relaxed) {
            let last: Vec<String> =
                self.board.recorder(self.rank).last(4).iter().map(recorder::Snapshot::describe).collect();
            tracing::error!(rank = self.rank, %error, last_operations = ?last, "the job has failed");
        }
        Some(error)
    }

    fn raise(&self, error: Error) -> Error {
        self.board.fault_cell().raise(self.rank, &error);
        self.outposts.abort();
        self.told_fault().unwrap_or(error)
    }

    /// The operation this rank is in.
    fn doing(&self) -> String {
        self.board.recorder(self.rank).running().map_or_else(|| IDLE.into(), |record| record.describe())
    }

    fn lost(&self, peer: u32, operation: String) -> Error {
        Error::PeerLost { rank: peer, pid: self.board.pid(peer), operation }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let core = &self.core;
        if std::thread::panicking() {
            core.raise(core.lost(core.rank, "a panic".into()));
        }
        // Before the sockets close with the monitor, so that nobody takes the leaving for a death.
        core.board.set_state(core.rank, RankState::Left);
        drop(self.monitor.take());
    }
}
