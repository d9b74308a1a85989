//! On what all this was measured.

use std::process::Command;
use std::time::{Duration, Instant};

use annulus::device::cuda::Driver;
use serde::{Deserialize, Serialize};

use crate::part::follow;

/// A card, its driver and its state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Card {
    /// Product name.
    pub name: String,
    /// Number of devices the driver shows.
    pub devices: u32,
    /// Compute capability.
    pub compute_capability: [u32; 2],
    /// Memory, all of it.
    pub memory_bytes: u64,
    /// CUDA version of the driver.
    pub cuda: String,
    /// What `nvidia-smi` says of driver, clocks, power and what limits them; none without it.
    pub nvidia_smi: Option<String>,
    /// Day and time, UTC.
    pub date: String,
}

impl Card {
    /// Looks at device 0.
    ///
    /// # Errors
    /// No driver, no device, or what the driver says.
    pub fn look() -> annulus::Result<Card> {
        let driver = Driver::open()?;
        let device = driver.device(0)?;
        let (major, minor) = device.compute_capability()?;
        Ok(Card {
            name: device.name().to_owned(),
            devices: driver.len_devices(),
            compute_capability: [major, minor],
            memory_bytes: device.memory_bytes()?.1,
            cuda: format!("{}.{}", driver.version() / 1000, driver.version() % 1000 / 10),
            nvidia_smi: state_of(&device.uuid().to_string()),
            date: first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M"])).unwrap_or_default(),
        })
    }

    /// Whether it is the tests' interpreter, whose durations say nothing about any card.
    pub fn is_virtual(&self) -> bool {
        self.name == "annulus virtual GPU"
    }

    /// Whether it is the card that the goals in microseconds are meant for.
    pub fn is_h100(&self) -> bool {
        self.name.contains("H100") && !self.name.contains("PCIe")
    }
}

fn state_of(uuid: &str) -> Option<String> {
    let wanted = "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,\
                  power.limit,clocks_throttle_reasons.active,ecc.mode.current,mig.mode.current";
    let query = format!("--query-gpu={wanted}");
    let arguments = [query.as_str(), "--format=csv,noheader", "-i", uuid];
    let values = first_line(Command::new("nvidia-smi").args(arguments))?;
    let named = wanted.split(',').zip(values.split(", ")).map(|(name, value)| format!("{name} {value}"));
    Some(named.collect::<Vec<_>>().join(", "))
}

fn first_line(command: &mut Command) -> Option<String> {
    let mut first = None;
    let ended = follow(command, Instant::now() + Duration::from_secs(10), |line| {
        first.get_or_insert_with(|| line.to_owned());
    });
    ended.ok().filter(std::process::ExitStatus::success).and(first)
}
