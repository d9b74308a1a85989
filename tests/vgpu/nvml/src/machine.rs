//! The devices and what they measure.
//!
//! Of device `d`, the `n`-th call (from 0) of each function finds:
//!
//! | value | |
//! |---|---|
//! | SM utilisation, percent | `(10 d + n) % 101` |
//! | memory utilisation, percent | `5` |
//! | memory used, bytes | `(d + 1) * 2^30` |
//! | power, milliwatt | `100000 + 1000 d` |
//! | clocks of SM and memory, MHz | `1500`, `2000` |
//! | reasons for low clocks | idle in the first call; then software power cap and hardware thermal slowdown |
//! | PCIe, sent and received, KB/s | `1000`, `2000`, each over 20 ms, which the call takes |
//! | NVLink, sent and received, KiB since the start | `1024 n`, `2048 n` |
//! | temperature, degrees Celsius | `40 + d` |

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::settings::{Between, SETTINGS};

/// What a link of a device leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Far {
    Device(usize),
    Switch,
}

#[derive(Debug, Default)]
pub(crate) struct Device {
    pub(crate) links: Vec<Far>,
    pub(crate) utilization_calls: AtomicU64,
    pub(crate) reasons_calls: AtomicU64,
    pub(crate) nvlink_calls: AtomicU64,
}

pub(crate) static DEVICES: LazyLock<Vec<Device>> = LazyLock::new(|| {
    let links = |row: &Vec<Between>| {
        let mut links = Vec::new();
        let mut to_switch = 0;
        for (other, between) in row.iter().enumerate() {
            match *between {
                Between::Links(count) => links.extend((0..count).map(|_| Far::Device(other))),
                Between::Switch(count) => to_switch = to_switch.max(count),
                Between::Nothing | Between::Level(_) => {}
            }
        }
        links.extend((0..to_switch).map(|_| Far::Switch));
        links
    };
    SETTINGS.between.iter().map(|row| Device { links: links(row), ..Device::default() }).collect()
});

/// The calls of a function before this one.
pub(crate) fn next(calls: &AtomicU64) -> u64 {
    calls.fetch_add(1, Ordering::Relaxed)
}

/// As the virtual driver's devices have it, in NVML's way of writing.
pub(crate) fn uuid(device: usize) -> String {
    let mut bytes = *b"annulus-vgpu-000";
    bytes[12..].copy_from_slice(&(device as u32).to_be_bytes());
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
