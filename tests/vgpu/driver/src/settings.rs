//! What the environment says about the machine to pretend.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

/// What peers can do with each other's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peers {
    All,
    None,
    /// The driver says yes, and stores are dropped on the way.
    Lossy,
}

/// What is done about races between streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Races {
    /// They are told, and the process is ended.
    End,
    /// They are told.
    Tell,
    /// They are not looked for.
    Ignore,
}

pub(crate) struct Settings {
    pub devices: usize,
    pub memory_bytes: usize,
    pub driver_version: i32,
    pub peers: Peers,
    /// VMM memory can be exported.
    pub shares_descriptors: bool,
    /// Streams wait for values in memory and write them.
    pub orders_by_memory: bool,
    pub lost: Option<PathBuf>,
    pub watchdog: Duration,
    /// Functions are loaded when they are needed.
    pub loads_lazily: bool,
    pub calls: Option<PathBuf>,
    pub tally: Option<PathBuf>,
    pub refuse: Option<PathBuf>,
    pub races: Races,
    pub drop_wait: Option<PathBuf>,
    /// Kernels of this process run to their end one after another, whatever their streams and devices.
    pub one_at_a_time: bool,
}

pub(crate) static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings {
    devices: number("ANNULUS_VGPU_DEVICES", 1),
    memory_bytes: number("ANNULUS_VGPU_MEMORY_BYTES", 256 << 20),
    driver_version: number("ANNULUS_VGPU_DRIVER_VERSION", 13_000),
    peers: match std::env::var("ANNULUS_VGPU_PEERS").as_deref() {
        Ok("none") => Peers::None,
        Ok("lossy") => Peers::Lossy,
        Ok("all") | Err(_) => Peers::All,
        Ok(other) => refuse("ANNULUS_VGPU_PEERS", other),
    },
    shares_descriptors: all_or_none("ANNULUS_VGPU_DESCRIPTORS"),
    orders_by_memory: all_or_none("ANNULUS_VGPU_MEMORY_OPERATIONS"),
    lost: std::env::var_os("ANNULUS_VGPU_LOST").map(PathBuf::from),
    watchdog: Duration::from_millis(number("ANNULUS_VGPU_WATCHDOG_MS", 60_000)),
    loads_lazily: match std::env::var("CUDA_MODULE_LOADING").as_deref() {
        Ok("EAGER") => false,
        Ok("LAZY") | Err(_) => true,
        Ok(other) => refuse("CUDA_MODULE_LOADING", other),
    },
    calls: std::env::var_os("ANNULUS_VGPU_CALLS").map(PathBuf::from),
    tally: std::env::var_os("ANNULUS_VGPU_TALLY").map(PathBuf::from),
    refuse: std::env::var_os("ANNULUS_VGPU_REFUSE").map(PathBuf::from),
    races: match std::env::var("ANNULUS_VGPU_RACES").as_deref() {
        Ok("end") | Err(_) => Races::End,
        Ok("tell") => Races::Tell,
        Ok("ignore") => Races::Ignore,
        Ok(other) => refuse("ANNULUS_VGPU_RACES", other),
    },
    drop_wait: std::env::var_os("ANNULUS_VGPU_DROP_WAIT").map(PathBuf::from),
    one_at_a_time: number("ANNULUS_VGPU_ONE_AT_A_TIME", false),
});

/// Whether devices have a feature: they do, if nothing is said.
fn all_or_none(variable: &str) -> bool {
    match std::env::var(variable).as_deref() {
        Ok("none") => false,
        Ok("all") | Err(_) => true,
        Ok(other) => refuse(variable, other),
    }
}

fn number<T: std::str::FromStr>(variable: &str, default: T) -> T {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| refuse(variable, &text)),
        Err(_) => default,
    }
}

/// A test that misspells its machine must not pass on another one.
fn refuse(variable: &str, value: &str) -> ! {
    eprintln!("virtual GPU: {variable}={value} is not understood");
    std::process::abort()
}
