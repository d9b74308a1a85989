//! What the GPUs do while a run goes on, into a CSV file and the timeline: for who watches with nvidia-smi, and afterwards.
//!
//! ```text
//! monotonic_ns,gpu,uuid,sm_utilization_percent, .. ,throttle_reasons
//! 81230001122,0,GPU-6f..,97, .. ,SW_POWER_CAP
//! ```
//! One thread for each GPU: a sample takes 40 ms of waiting where the GPU counts PCIe traffic. What a GPU does not tell is an
//! empty cell. Times are [`now_ns`](super::now_ns), the timeline's clock.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;

use super::nvml::{failed, open};
use super::reading::{MEASURES, Reading, read};
use super::trace::Timeline;
use crate::error::{Error, Result};

/// How often samples are taken, if nothing else is wanted.
pub const DEFAULT_PERIOD: Duration = Duration::from_millis(100);
/// How long stopping waits for samples that are being taken. One that takes longer belongs to a GPU that does not answer.
const STOP_LIMIT: Duration = Duration::from_millis(500);

/// Samples all GPUs of the machine until it is stopped or dropped; one for a machine is enough.
#[derive(Debug)]
pub struct Sampler {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    csv: File,
    timeline: Timeline,
    period: Duration,
    state: Mutex<State>,
    /// `stops` was set, or `sampling` has one less.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    stops: bool,
    /// GPUs that are being sampled.
    sampling: Vec<u32>,
    /// Why GPUs are not sampled any more.
    ended: Vec<String>,
}

impl Sampler {
    /// Begins to append samples to the file at `path`, which is made with a line of names if it is not there, and to record
    /// them as counters of `timeline`: every `period`, or as fast as the GPUs answer.
    ///
    /// # Errors
    /// [`Error::Management`] if there is no management library or no GPU; [`Error::Io`] if the file cannot be written.
    pub fn start(path: &Path, period: Duration, timeline: Timeline) -> Result<Sampler> {
        let nvml = Arc::new(open()?);
        let count = nvml.device_count().map_err(|error| failed("counting GPUs", &error))?;
        if count == 0 {
            return Err(Error::Management { operation: "counting GPUs", reason: "there is none".to_owned() });
        }
        let file = |error| Error::io(format!("writing {}", path.display()), error);
        let csv = OpenOptions::new().create(true).append(true).open(path).map_err(file)?;
        if csv.metadata().map_err(file)?.len() == 0 {
            let names = MEASURES.map(|(name, _)| name).join(",");
            (&csv).write_all(format!("monotonic_ns,gpu,uuid,{names},throttle_reasons\n").as_bytes()).map_err(file)?;
        }
        let state = Mutex::new(State { stops: false, sampling: (0..count).collect(), ended: Vec::new() });
        let shared = Arc::new(Shared { path: path.to_owned(), csv, timeline, period, state, changed: Condvar::new() });
        // From here on a drop stops the threads that there are.
        let sampler = Sampler { shared: Arc::clone(&shared) };
        for gpu in 0..count {
            let (shared, nvml) = (Arc::clone(&shared), Arc::clone(&nvml));
            let body = move || shared.run(&nvml, gpu);
            let thread = std::thread::Builder::new().name(format!("annulus-gpu{gpu}"));
            thread.spawn(body).map_err(|error| {
                sampler.shared.lock().sampling.retain(|sampled| *sampled < gpu);
                Error::io("starting the sampler's thread", error)
            })?;
        }
        Ok(sampler)
    }

    /// Stops, within 500 ms, and returns a line for each GPU that was not sampled to the end: it was lost, the file could not
    /// be written, or it does not answer.
    pub fn stop(self) -> Vec<String> {
        let silent = self.shared.stop();
        let mut ended = std::mem::take(&mut self.shared.lock().ended);
        ended.extend(silent.iter().map(|gpu| format!("GPU {gpu} is not sampled to the end: it does not answer")));
        ended
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the GPUs that do not answer. Their threads end when they do.
    fn stop(&self) -> Vec<u32> {
        let mut state = self.lock();
        state.stops = true;
        self.changed.notify_all();
        let wait = self.changed.wait_timeout_while(state, STOP_LIMIT, |state| !state.sampling.is_empty());
        wait.unwrap_or_else(PoisonError::into_inner).0.sampling.clone()
    }

    /// A GPU's thread.
    fn run(&self, nvml: &Nvml, gpu: u32) {
        let ended = self.sample(nvml, gpu).err();
        let mut state = self.lock();
        state.sampling.retain(|sampled| *sampled != gpu);
        if let Some(reason) = ended {
            tracing::warn!(gpu, reason, "a GPU is not sampled any more");
            state.ended.push(format!("GPU {gpu} is not sampled to the end: {reason}"));
        }
        self.changed.notify_all();
    }

    /// Until it is to stop, or cannot go on.
    fn sample(&self, nvml: &Nvml, gpu: u32) -> std::result::Result<(), String> {
        let device = nvml.device_by_index(gpu).map_err(|error| error.to_string())?;
        let uuid = device.uuid().map_err(|error| error.to_string())?;
        let mut traffic = None;
        loop {
            let begin = Instant::now();
            let reading = read(nvml, &device, &mut traffic).map_err(|error| error.to_string())?;
            self.write(gpu, &uuid, &reading).map_err(|error| format!("{}: {error}", self.path.display()))?;
            let rest = self.period.saturating_sub(begin.elapsed());
            let wait = self.changed.wait_timeout_while(self.lock(), rest, |state| !state.stops);
            if wait.unwrap_or_else(PoisonError::into_inner).0.stops {
                return Ok(());
            }
        }
    }

    fn write(&self, gpu: u32, uuid: &str, reading: &Reading) -> io::Result<()> {
        let mut line = format!("{},{gpu},{uuid}", reading.at_ns);
        for (value, (_, counter)) in reading.values.iter().zip(MEASURES) {
            line.push(',');
            if let Some(value) = value {
                line += &value.to_string();
                self.timeline.counter_of(counter, gpu, reading.at_ns, *value);
            }
        }
        line.push(',');
        line += reading.throttle_reasons.as_deref().unwrap_or_default();
        line.push('\n');
        // Opened to append: lines of several threads do not mix.
        (&self.csv).write_all(line.as_bytes())
    }
}
