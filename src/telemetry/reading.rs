//! What one GPU shows at one time.
#![forbid(unsafe_code)]

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, PcieUtilCounter, TemperatureSensor};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::now_ns;
use super::nvml::nvlink_kibibytes;

/// Columns of numbers: in CSV, and as counters of the timeline, where the number of the GPU follows. PCIe is as the library
/// says it, over 20 ms; NVLink is the mean since the last reading, over all links together.
pub(super) const MEASURES: [(&str, &str); 11] = [
    ("sm_utilization_percent", "SM utilization (%), GPU"),
    ("memory_utilization_percent", "memory utilization (%), GPU"),
    ("memory_used_bytes", "memory used (bytes), GPU"),
    ("power_watts", "power (W), GPU"),
    ("sm_clock_mhz", "SM clock (MHz), GPU"),
    ("memory_clock_mhz", "memory clock (MHz), GPU"),
    ("temperature_celsius", "temperature (°C), GPU"),
    ("pcie_sent_kb_per_s", "PCIe sent (KB/s), GPU"),
    ("pcie_received_kb_per_s", "PCIe received (KB/s), GPU"),
    ("nvlink_sent_kib_per_s", "NVLink sent (KiB/s), GPU"),
    ("nvlink_received_kib_per_s", "NVLink received (KiB/s), GPU"),
];

/// `None` is what the GPU does not tell.
pub(super) struct Reading {
    /// When it began.
    pub at_ns: u64,
    /// As [`MEASURES`].
    pub values: [Option<f64>; MEASURES.len()],
    /// Names of the reasons for clocks below the highest, split by `|`; "none".
    pub throttle_reasons: Option<String>,
}

/// The last NVLink counters and when they were read.
pub(super) struct Traffic {
    at_ns: u64,
    kibibytes: [Option<u64>; 2],
}

/// Asks a GPU. Takes more than 40 ms where it counts PCIe traffic, which the library does by watching it, 20 ms for each
/// direction.
///
/// # Errors
/// That the GPU is lost. Everything else that goes wrong leaves a value out.
pub(super) fn read(nvml: &Nvml, device: &Device<'_>, last: &mut Option<Traffic>) -> Result<Reading, NvmlError> {
    let at_ns = now_ns();
    let utilization = told(device.utilization_rates())?;
    let memory = told(device.memory_info())?;
    let power = told(device.power_usage())?;
    let sm_clock = told(device.clock_info(Clock::SM))?;
    let memory_clock = told(device.clock_info(Clock::Memory))?;
    let temperature = told(device.temperature(TemperatureSensor::Gpu))?;
    let throttle_reasons = told(device.current_throttle_reasons())?.map(names);
    let [nvlink_sent, nvlink_received] = nvlink_rates(nvml, device, last);
    let pcie_sent = told(device.pcie_throughput(PcieUtilCounter::Send))?;
    let pcie_received = told(device.pcie_throughput(PcieUtilCounter::Receive))?;
    let values = [
        utilization.as_ref().map(|rates| f64::from(rates.gpu)),
        utilization.as_ref().map(|rates| f64::from(rates.memory)),
        memory.map(|memory| memory.used as f64),
        power.map(|milliwatts| f64::from(milliwatts) / 1e3),
        sm_clock.map(f64::from),
        memory_clock.map(f64::from),
        temperature.map(f64::from),
        pcie_sent.map(f64::from),
        pcie_received.map(f64::from),
        nvlink_sent,
        nvlink_received,
    ];
    Ok(Reading { at_ns, values, throttle_reasons })
}

/// `None` for what is not supported or missing from the library.
fn told<T>(asked: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match asked {
        Ok(value) => Ok(Some(value)),
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => Err(error),
        Err(_) => Ok(None),
    }
}

fn names(reasons: ThrottleReasons) -> String {
    let names: Vec<&str> = reasons.iter_names().map(|(name, _)| name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join("|") }
}

/// KiB per second since the last reading; `None` in the first, and where a counter went back.
fn nvlink_rates(nvml: &Nvml, device: &Device<'_>, last: &mut Option<Traffic>) -> [Option<f64>; 2] {
    let now = Traffic { at_ns: now_ns(), kibibytes: nvlink_kibibytes(nvml, device) };
    let rates = std::array::from_fn(|way| {
        let before = last.as_ref()?;
        let kibibytes = now.kibibytes[way]?.checked_sub(before.kibibytes[way]?)?;
        let seconds = now.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
        (seconds > 0.0).then(|| kibibytes as f64 / seconds)
    });
    *last = Some(now);
    rates
}
