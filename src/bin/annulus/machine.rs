//! What this machine is: for the head of tables and for `annulus info`.

use std::fs;

/// Name, processors and memory.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Machine {
    pub(crate) host: String,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    /// Processors that this process may run on.
    pub(crate) cores: usize,
    pub(crate) last_level_cache: Option<String>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) available_bytes: Option<u64>,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let uname = rustix::system::uname();
        let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        Machine {
            host: text(uname.nodename()),
            kernel: format!("{} {}", text(uname.sysname()), text(uname.release())),
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| text(uname.machine())),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            last_level_cache: last_level_cache(),
            memory_bytes: memory_bytes("MemTotal"),
            available_bytes: memory_bytes("MemAvailable"),
        }
    }

    /// One line.
    pub(crate) fn describe(&self) -> String {
        format!("{} ({} cores of {}, {})", self.host, self.cores, self.cpu, self.kernel)
    }
}

/// The first value of `name: value` in a file of /proc.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))?.1;
    Some(value.trim().to_owned())
}

fn memory_bytes(name: &str) -> Option<u64> {
    let kibibytes: u64 = field("/proc/meminfo", name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The cache that lies before memory.
fn last_level_cache() -> Option<String> {
    let read = |index: u32, file: &str| {
        fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{file}")).ok()
    };
    let last = (0..8).filter(|index| read(*index, "size").is_some()).max_by_key(|index| read(*index, "level"))?;
    let kibibytes: u64 = read(last, "size")?.trim().strip_suffix('K')?.parse().ok()?;
    Some(format!("{} L{}", size(kibibytes << 10), read(last, "level")?.trim()))
}

/// A number of bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let (mut number, mut unit) = (bytes as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if number < 1024.0 {
            break;
        }
        (number, unit) = (number / 1024.0, larger);
    }
    let decimals = usize::from(number < 100.0 && number.fract() != 0.0);
    format!("{number:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(64 << 30), "64 GiB");
    }

    #[test]
    fn this_machine_is_found() {
        let machine = Machine::look();
        assert!(machine.cores > 0 && machine.memory_bytes > machine.available_bytes);
    }
}
