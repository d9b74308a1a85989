//! Who this process is in the job: rank and world size, as its launcher's variables say.
//!
//! | launcher | rank, world size | ranks of one job know |
//! | --- | --- | --- |
//! | `annulus launch` | `ANNULUS_RANK`, `ANNULUS_WORLD_SIZE` | `ANNULUS_JOB` and inherited sockets |
//! | torchrun | `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `MASTER_ADDR`, `MASTER_PORT`, `TORCHELASTIC_RUN_ID`, `.._RESTART_COUNT` |
//! | srun | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID`, `SLURM_NODEID` | `SLURM_JOB_ID`, `SLURM_STEP_ID` |
//! | Open MPI, PRRTE | `OMPI_COMM_WORLD_RANK`, `.._SIZE`, `.._LOCAL_RANK`, `.._LOCAL_SIZE` | `PMIX_NAMESPACE` |
//! | MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` | the proxy that started them |
//!
//! They are asked in this order; the first that is there decides, and another that is there too must say the same,
//! because ranks that follow different launchers meet never or meet wrongly. Two nestings are no contradiction:
//! torchrun started by srun or mpirun (it numbers its own workers), and anything in a Slurm step of one task (a shell).
//!
//! A Slurm allocation is not a launch: without srun, in a batch script or in the shell of `salloc`, a program is one
//! rank, whatever `SLURM_NTASKS` says. That is told by the step's number, never by the job's name (`interactive` is
//! also the name under which `srun` in that shell runs). Under srun there are `SLURM_*` and `PMIX_*`, no `OMPI_*`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::FileType;

use crate::error::{Error, Result};
use crate::world::board::MAX_RANKS;
use crate::world::frame::from_hex;
use crate::world::meeting::{Place, folder_path, socket_name};

/// Variables of `annulus launch`.
pub(crate) mod variable {
    pub(crate) const RANK: &str = "ANNULUS_RANK";
    pub(crate) const WORLD_SIZE: &str = "ANNULUS_WORLD_SIZE";
    /// Random, hexadecimal.
    pub(crate) const JOB: &str = "ANNULUS_JOB";
    /// Descriptor of the listening socket; rank 0 only.
    pub(crate) const LISTEN_FD: &str = "ANNULUS_LISTEN_FD";
    /// O_PATH descriptor of the socket's inode.
    pub(crate) const CONNECT_FD: &str = "ANNULUS_CONNECT_FD";
    /// Read end of a pipe whose other end only the launcher has.
    pub(crate) const LIFELINE_FD: &str = "ANNULUS_LIFELINE_FD";
    /// Variables by which some launcher numbers its processes. Our launcher takes them away from its ranks, so that
    /// what a rank finds of them comes from a launcher inside.
    pub(crate) const OF_OTHER_LAUNCHERS: &[&str] = &[
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "NODE_RANK",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_PROCID",
        "SLURM_STEP_ID",
        "SLURM_STEPID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "PMIX_RANK",
        "PMIX_NAMESPACE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
    ];
}

/// Slurm numbers the steps that are no launch (batch script, interactive shell, extern) from here on.
const SLURM_SPECIAL_STEPS: u64 = 0xffff_fff0;

/// What started the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// Nothing did: one rank.
    Single,
    /// [`launch::threads`](crate::world::launch::threads): ranks are threads of this process.
    Threads,
    /// `annulus launch`, or a program that runs itself again.
    Annulus,
    /// torchrun, or its variables set by hand.
    Torchrun,
    /// srun.
    Slurm,
    /// mpirun of Open MPI, or prterun.
    OpenMpi,
    /// mpiexec of MPICH, Intel MPI and others that speak PMI.
    Mpich,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Single => "no launcher",
            Launcher::Threads => "threads",
            Launcher::Annulus => "annulus launch",
            Launcher::Torchrun => "torchrun",
            Launcher::Slurm => "srun",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Mpich => "MPICH",
        })
    }
}

/// One rank's place in the job. Made by [`detect`](Environment::detect) or by a launcher of this crate.
#[derive(Debug, Clone)]
pub struct Environment {
    /// This rank, from 0.
    pub rank: u32,
    /// Ranks of the job, 1 to 64.
    pub world_size: u32,
    /// This rank among those of its machine.
    pub local_rank: u32,
    /// Ranks on this machine.
    pub local_world_size: u32,
    /// This machine among those of the job.
    pub node_rank: u32,
    /// What started the ranks.
    pub launcher: Launcher,
    /// Where the ranks meet.
    pub(crate) place: Place,
    /// What all ranks of the job, and no others, know.
    pub(crate) job: String,
    /// Hangs up when the launcher is gone.
    pub(crate) lifeline: Option<Arc<OwnedFd>>,
}

/// What one launcher's variables say; each number with the variable it came from.
#[derive(Debug)]
struct Claim {
    launcher: Launcher,
    rank: (&'static str, u32),
    world_size: (&'static str, u32),
    local_rank: Option<(&'static str, u32)>,
    local_world_size: Option<(&'static str, u32)>,
    /// Whether the launcher says that there is one machine.
    one_node: bool,
}

impl Environment {
    /// A job of one rank.
    pub fn single() -> Environment {
        Environment {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            node_rank: 0,
            launcher: Launcher::Single,
            place: Place::Named { folder: folder_path(), name: socket_name("") },
            job: String::new(),
            lifeline: None,
        }
    }

    /// Reads the variables of this process.
    ///
    /// # Errors
    /// [`Error::Environment`] for a variable that is malformed, missing beside another, or asks for more than one
    /// machine; [`Error::EnvironmentConflict`] for two that disagree.
    pub fn detect() -> Result<Environment> {
        Environment::detect_from(std::env::vars_os())
    }

    /// As [`detect`](Environment::detect), from the given variables.
    ///
    /// # Errors
    /// As [`detect`](Environment::detect).
    pub fn detect_from(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Environment> {
        let names = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value));
        let variables = Variables(variables.into_iter().filter_map(names).collect());

        let claims =
            [annulus(&variables)?, torchrun(&variables)?, slurm(&variables)?, open_mpi(&variables)?, pmi(&variables)?];
        let claims: Vec<Claim> = claims.into_iter().flatten().collect();
        // A Slurm step of one task is a shell for whatever else is there.
        let is_shell = |claim: &Claim| claim.launcher == Launcher::Slurm && claim.world_size.1 == 1;
        let Some(winner) = claims.iter().find(|claim| !is_shell(claim)).or(claims.first()) else {
            variables.refuse_rank_without_size()?;
            return Ok(Environment::single());
        };
        let numbers_its_own = winner.launcher == Launcher::Torchrun && variables.is_set("TORCHELASTIC_RUN_ID");
        for other in claims.iter().filter(|other| other.launcher != winner.launcher && !is_shell(other)) {
            if !numbers_its_own {
                must_agree("the rank", winner.rank, other.rank)?;
                must_agree("the world size", winner.world_size, other.world_size)?;
            }
        }
        if let (Launcher::Slurm | Launcher::OpenMpi, Some(rank)) =
            (winner.launcher, variables.number("PMIX_RANK", 0, MAX_RANKS - 1)?)
        {
            must_agree("the rank", winner.rank, ("PMIX_RANK", rank))?;
        }
        let (place, job) = place(&variables, winner)?;
        let environment = Environment::from_claim(winner, place, job)?;
        match winner.launcher {
            Launcher::Annulus if variables.is_set(variable::LIFELINE_FD) => {
                let lifeline = variables.descriptor(variable::LIFELINE_FD, FileType::Fifo)?;
                Ok(Environment { lifeline: Some(Arc::new(lifeline)), ..environment })
            }
            _ => Ok(environment),
        }
    }

    fn from_claim(claim: &Claim, place: Place, job: String) -> Result<Environment> {
        let ((rank_name, rank), (size_name, world_size)) = (claim.rank, claim.world_size);
        if rank >= world_size {
            return Err(malformed(rank_name, &rank.to_string(), format!("must be below {size_name}={world_size}")));
        }
        if let Some((name, local_world_size)) = claim.local_world_size
            && local_world_size != world_size
        {
            return Err(one_node_only(name, local_world_size, size_name, world_size));
        }
        // Launchers may number the ranks of one machine in another order than those of the job (prterun does when it
        // oversubscribes); only where nothing else tells the machines apart is that a sign of several.
        let known_to_be_one = claim.one_node || claim.local_world_size.is_some();
        let local_rank = match claim.local_rank {
            Some((name, local_rank)) if local_rank >= world_size => {
                return Err(malformed(
                    name,
                    &local_rank.to_string(),
                    format!("must be below {size_name}={world_size}"),
                ));
            }
            Some((name, local_rank)) if local_rank != rank && !known_to_be_one => {
                return Err(one_node_only(name, local_rank, rank_name, rank));
            }
            Some((_, local_rank)) => local_rank,
            None => rank,
        };
        Ok(Environment {
            rank,
            world_size,
            local_rank,
            local_world_size: world_size,
            node_rank: 0,
            launcher: claim.launcher,
            place,
            job,
            lifeline: None,
        })
    }

    /// Rank `rank` of `world_size` on this machine, meeting where the launcher says.
    pub(crate) fn inherited(
        launcher: Launcher,
        rank: u32,
        world_size: u32,
        job: String,
        listener: Option<Arc<OwnedFd>>,
        inode: Arc<OwnedFd>,
    ) -> Environment {
        let place = Place::Inherited { listener, inode };
        Environment {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            launcher,
            place,
            job,
            ..Environment::single()
        }
    }

    /// The fields are public, so they are looked at again where they are used.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=MAX_RANKS).contains(&self.world_size) {
            return Err(Error::InvalidArgument {
                argument: "world_size",
                value: self.world_size.to_string(),
                accepted: "must be from 1 to 64",
            });
        }
        if self.rank >= self.world_size {
            return Err(Error::InvalidArgument {
                argument: "rank",
                value: format!("{} of {}", self.rank, self.world_size),
                accepted: "must be below the world size",
            });
        }
        Ok(())
    }

    /// What is worth keeping once the ranks have met.
    pub(crate) fn without_descriptors(self) -> Environment {
        Environment { place: Environment::single().place, lifeline: None, ..self }
    }
}

// ---- the launchers -----------------------------------------------------------------------------------------------------

fn annulus(variables: &Variables) -> Result<Option<Claim>> {
    variables.claim(Launcher::Annulus, variable::RANK, variable::WORLD_SIZE)
}

fn torchrun(variables: &Variables) -> Result<Option<Claim>> {
    let Some(mut claim) = variables.claim(Launcher::Torchrun, "RANK", "WORLD_SIZE")? else { return Ok(None) };
    claim.local_rank = variables.named_number("LOCAL_RANK", 0, MAX_RANKS - 1)?;
    claim.local_world_size = variables.named_number("LOCAL_WORLD_SIZE", 1, MAX_RANKS)?;
    // `NODE_RANK` is what people set by hand.
    for name in ["GROUP_RANK", "NODE_RANK"] {
        if let Some(node @ 1..) = variables.number(name, 0, u32::MAX)? {
            return Err(malformed(name, &node.to_string(), ONE_NODE.to_owned()));
        }
    }
    Ok(Some(claim))
}

fn slurm(variables: &Variables) -> Result<Option<Claim>> {
    // `SLURM_STEPID` is the older spelling; steps that srun did not make have numbers at the very top.
    let step = match variables.text("SLURM_STEP_ID")? {
        Some(step) => Some(step),
        None => variables.text("SLURM_STEPID")?,
    };
    let Some(step) = step else { return Ok(None) };
    let step: u64 = step.parse().map_err(|_| malformed("SLURM_STEP_ID", &step, "must be a step number".into()))?;
    if step >= SLURM_SPECIAL_STEPS || !variables.is_set("SLURM_PROCID") {
        return Ok(None);
    }
    let size = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"].into_iter().find(|name| variables.is_set(name));
    let mut claim = match variables.claim(Launcher::Slurm, "SLURM_PROCID", size.unwrap_or("SLURM_STEP_NUM_TASKS"))? {
        Some(claim) => claim,
        None => return Ok(None),
    };
    claim.local_rank = variables.named_number("SLURM_LOCALID", 0, MAX_RANKS - 1)?;
    for (name, accepted) in [("SLURM_STEP_NUM_NODES", 1), ("SLURM_NODEID", 0)] {
        if let Some(nodes) = variables.number(name, 0, u32::MAX)?
            && nodes > accepted
        {
            return Err(malformed(name, &nodes.to_string(), ONE_NODE.to_owned()));
        }
    }
    claim.one_node = variables.is_set("SLURM_STEP_NUM_NODES");
    Ok(Some(claim))
}

fn open_mpi(variables: &Variables) -> Result<Option<Claim>> {
    let claim = variables.claim(Launcher::OpenMpi, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
    let Some(mut claim) = claim else { return Ok(None) };
    claim.local_rank = variables.named_number("OMPI_COMM_WORLD_LOCAL_RANK", 0, MAX_RANKS - 1)?;
    claim.local_world_size = variables.named_number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, MAX_RANKS)?;
    Ok(Some(claim))
}

fn pmi(variables: &Variables) -> Result<Option<Claim>> {
    let Some(mut claim) = variables.claim(Launcher::Mpich, "PMI_RANK", "PMI_SIZE")? else { return Ok(None) };
    claim.local_rank = variables.named_number("MPI_LOCALRANKID", 0, MAX_RANKS - 1)?;
    claim.local_world_size = variables.named_number("MPI_LOCALNRANKS", 1, MAX_RANKS)?;
    Ok(Some(claim))
}

/// Where the ranks of the claim meet, and what they and no others know.
fn place(variables: &Variables, claim: &Claim) -> Result<(Place, String)> {
    let single = claim.world_size.1 == 1;
    let key = match claim.launcher {
        Launcher::Annulus if !single => return inherited_place(variables, claim.rank.1),
        _ if single => return Ok((Environment::single().place, String::new())),
        Launcher::Torchrun => {
            let port = variables.required("MASTER_PORT", "RANK")?;
            if !port.parse::<u16>().is_ok_and(|port| port > 0) {
                return Err(malformed("MASTER_PORT", &port, "must be a port, 1 to 65535".into()));
            }
            let address = variables.required("MASTER_ADDR", "RANK")?;
            let run = variables.text("TORCHELASTIC_RUN_ID")?.unwrap_or_default();
            let restart = variables.text("TORCHELASTIC_RESTART_COUNT")?.unwrap_or_default();
            format!("torchrun {address}:{port} run {run} restart {restart}")
        }
        Launcher::Slurm => {
            let job = variables.required("SLURM_JOB_ID", "SLURM_PROCID")?;
            let step = variables.text("SLURM_STEP_ID")?.or(variables.text("SLURM_STEPID")?).unwrap_or_default();
            let restart = variables.text("SLURM_RESTART_COUNT")?.unwrap_or_default();
            format!("slurm {job}.{step} restart {restart}")
        }
        Launcher::OpenMpi => match variables.text("PMIX_NAMESPACE")? {
            Some(namespace) => format!("pmix {namespace}"),
            None => format!("openmpi {}", variables.required("OMPI_MCA_ess_base_jobid", "OMPI_COMM_WORLD_RANK")?),
        },
        _ => format!("pmi proxy {}", starter()),
    };
    let place = Place::Named { folder: folder_path(), name: socket_name(&key) };
    Ok((place, key))
}

/// The sockets that `annulus launch` hands down.
fn inherited_place(variables: &Variables, rank: u32) -> Result<(Place, String)> {
    let job = variables.required(variable::JOB, variable::RANK)?;
    if from_hex(&job).is_none() {
        return Err(malformed(variable::JOB, &job, "must be 32 hexadecimal digits, as annulus launch sets it".into()));
    }
    let inode = variables.descriptor(variable::CONNECT_FD, FileType::Socket)?;
    let listener =
        if rank == 0 { Some(Arc::new(variables.descriptor(variable::LISTEN_FD, FileType::Socket)?)) } else { None };
    Ok((Place::Inherited { listener, inode: Arc::new(inode) }, job))
}

/// The process that started this one's session: under hydra every rank leads a session of its own, also when it runs
/// inside a shell script, and one proxy is the parent of all leaders. Process id and start time, so that it is not
/// mistaken for a later process of that number.
fn starter() -> String {
    let stat = |pid: &str| -> Option<Vec<String>> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command, in parentheses, may hold anything; fields count from behind it: state, parent, group, session
        // ... start time is the 20th.
        Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
    };
    let field = |pid: &str, index: usize| stat(pid).and_then(|fields| fields.get(index).cloned()).unwrap_or_default();
    // Inside a PID namespace whose session was begun outside of it, the session, and perhaps the parent, read 0.
    let leader = match field("self", 3).as_str() {
        "" | "0" => "self".to_owned(),
        leader => leader.to_owned(),
    };
    // The leader may have ended before the ranks that it started.
    let parent = Some(field(&leader, 1)).filter(|parent| !parent.is_empty()).unwrap_or_else(|| field("self", 1));
    let started = field(&parent, 19);
    format!("{parent} started {started}")
}

// ---- variables ---------------------------------------------------------------------------------------------------------

const ONE_NODE: &str = "this version runs on one node only: all ranks must be on this machine";

fn malformed(name: &str, value: &str, accepted: String) -> Error {
    // One line, whatever is in it.
    let shown: String = value.escape_debug().take(200).collect();
    Error::Environment { variable: name.to_owned(), value: shown, accepted }
}

fn one_node_only(local: &str, local_value: u32, global: &str, global_value: u32) -> Error {
    malformed(local, &local_value.to_string(), format!("must equal {global}={global_value}: {ONE_NODE}"))
}

fn must_agree(about: &'static str, first: (&'static str, u32), second: (&'static str, u32)) -> Result<()> {
    if first.1 == second.1 {
        return Ok(());
    }
    Err(Error::EnvironmentConflict {
        about,
        first: first.0.to_owned(),
        first_value: first.1.to_string(),
        second: second.0.to_owned(),
        second_value: second.1.to_string(),
    })
}

struct Variables(HashMap<String, OsString>);

impl Variables {
    fn is_set(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        match value.to_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(malformed(name, &value.to_string_lossy(), "must be UTF-8".into())),
        }
    }

    /// The text of a variable that must be there because `because` is.
    fn required(&self, name: &str, because: &str) -> Result<String> {
        match self.text(name)? {
            Some(text) if !text.is_empty() => Ok(text),
            Some(text) => Err(malformed(name, &text, format!("must not be empty, because {because} is set"))),
            None => Err(malformed(name, "", format!("must be set, because {because} is"))),
        }
    }

    fn number(&self, name: &str, least: u32, most: u32) -> Result<Option<u32>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        // Digits only: u32's own parser takes a plus sign.
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse() {
            Ok(number) if digits && (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(malformed(name, &text, format!("must be an integer from {least} to {most}"))),
        }
    }

    fn named_number(&self, name: &'static str, least: u32, most: u32) -> Result<Option<(&'static str, u32)>> {
        Ok(self.number(name, least, most)?.map(|number| (name, number)))
    }

    /// Rank and size of one launcher: both or neither.
    fn claim(&self, launcher: Launcher, rank: &'static str, size: &'static str) -> Result<Option<Claim>> {
        let world_size = self.number(size, 1, MAX_RANKS)?;
        let number = self.number(rank, 0, MAX_RANKS - 1)?;
        match (number, world_size) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(malformed(size, "", format!("must be set, because {rank} is"))),
            (None, Some(_)) => Err(malformed(rank, "", format!("must be set, because {size} is"))),
            (Some(number), Some(world_size)) => Ok(Some(Claim {
                launcher,
                rank: (rank, number),
                world_size: (size, world_size),
                local_rank: None,
                local_world_size: None,
                one_node: false,
            })),
        }
    }

    /// PMIx gives a rank and no size; that a process is one of several must not be overlooked.
    fn refuse_rank_without_size(&self) -> Result<()> {
        match self.number("PMIX_RANK", 0, MAX_RANKS - 1)? {
            Some(rank) if !self.is_set("SLURM_JOB_ID") => Err(malformed(
                "PMIX_RANK",
                &rank.to_string(),
                "comes without a world size: set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT too".into(),
            )),
            _ => Ok(()),
        }
    }

    /// A copy of the descriptor whose number the variable holds.
    fn descriptor(&self, name: &str, file_type: FileType) -> Result<OwnedFd> {
        let text = self.required(name, variable::RANK)?;
        let raw = text.parse::<RawFd>().ok().filter(|raw| *raw >= 3);
        let raw = raw.ok_or_else(|| malformed(name, &text, "must be the number of an inherited descriptor".into()))?;
        // SAFETY: the descriptor is borrowed for the one call, which refuses a number that is not open. Nobody closes
        // it meanwhile: the launcher opened it for us, and no part of this library takes it over.
        let inherited = unsafe { BorrowedFd::borrow_raw(raw) };
        let copy = rustix::io::fcntl_dupfd_cloexec(inherited, 3).map_err(|errno| {
            malformed(name, &text, format!("must be an open descriptor ({errno}): was it closed on the way here?"))
        })?;
        match rustix::fs::fstat(&copy) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == file_type => Ok(copy),
            _ => Err(malformed(
                name,
                &text,
                format!("must be a {file_type:?}: is this program run by another one of the job?"),
            )),
        }
    }
}
