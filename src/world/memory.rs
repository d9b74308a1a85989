//! How much memory this process can still get: the machine, its control groups, its own limits.

use std::path::{Path, PathBuf};

use rustix::process::Resource;

use crate::error::{Error, Result};

/// Bytes that can still be allocated without anything being killed for it: what the kernel calls available plus free
/// swap, or what a control group has left, whichever is less. `u64::MAX` if nothing can be learnt.
pub(crate) fn available_bytes() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| machine_available_bytes(&text));
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok();
    let group = groups.and_then(|text| group_headroom_bytes(&text, Path::new("/sys/fs/cgroup")));
    machine.unwrap_or(u64::MAX).min(group.unwrap_or(u64::MAX))
}

/// `MemAvailable` + `SwapFree` of `/proc/meminfo`.
fn machine_available_bytes(meminfo: &str) -> Option<u64> {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(field("MemAvailable")?.saturating_add(field("SwapFree").unwrap_or(0)))
}

/// The smallest headroom of the control groups this process is in, from its own up to the root; both hierarchies.
fn group_headroom_bytes(proc_cgroup: &str, mount: &Path) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in proc_cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, limit, usage) = if controllers.is_empty() {
            (mount.to_path_buf(), "memory.max", "memory.current")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (mount.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        let mut group: PathBuf = root.join(path.trim_start_matches('/'));
        loop {
            if let Some(headroom) = one_group_headroom_bytes(&group, limit, usage) {
                least = Some(least.map_or(headroom, |so_far| so_far.min(headroom)));
            }
            if group == root || !group.pop() {
                break;
            }
        }
    }
    least
}

fn one_group_headroom_bytes(group: &Path, limit: &str, usage: &str) -> Option<u64> {
    let number = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(limit)?, number(usage)?); // "max" does not parse: no limit here
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let stat_field = |name: &str| {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok()).unwrap_or(0)
    };
    // Page cache that is not shared memory is given up before anything is killed.
    let reclaimable = stat_field("inactive_file") + stat_field("active_file");
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

/// Fails if a file of `len_bytes` is longer than this process may make one.
pub(crate) fn check_file_size_limit(what: &'static str, len_bytes: u64) -> Result<()> {
    match rustix::process::getrlimit(Resource::Fsize).current {
        Some(limit) if len_bytes > limit => Err(Error::NoSpace { what, need_bytes: len_bytes, have_bytes: limit }),
        _ => Ok(()),
    }
}

/// Address space this process may still map under RLIMIT_AS; 0 where that is not the limit that was met.
pub(crate) fn address_space_left_bytes() -> u64 {
    let Some(limit) = rustix::process::getrlimit(Resource::As).current else { return 0 };
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().next().and_then(|pages| pages.parse().ok()).unwrap_or(0);
    limit.saturating_sub(pages.saturating_mul(rustix::param::page_size() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:   30 kB\nSwapFree: 2 kB\n";
        assert_eq!(machine_available_bytes(text), Some(32 * 1024));
        assert_eq!(machine_available_bytes("MemTotal: 5 kB\n"), None);
        assert!(available_bytes() > 0);
    }

    #[test]
    fn the_tightest_group_on_the_way_up_counts() {
        let mount = tempfile::tempdir().unwrap();
        let (outer, inner) = (mount.path().join("outer"), mount.path().join("outer/inner"));
        std::fs::create_dir_all(&inner).unwrap();
        for (group, max, current) in [(&outer, "1000", "900"), (&inner, "max", "100")] {
            std::fs::write(group.join("memory.max"), format!("{max}\n")).unwrap();
            std::fs::write(group.join("memory.current"), format!("{current}\n")).unwrap();
        }
        assert_eq!(group_headroom_bytes("0::/outer/inner\n", mount.path()), Some(100));
        std::fs::write(outer.join("memory.stat"), "anon 5\ninactive_file 50\n").unwrap();
        assert_eq!(group_headroom_bytes("0::/outer/inner\n", mount.path()), Some(150));
        assert_eq!(group_headroom_bytes("0::/\n", mount.path()), None, "no limit, no figure");
    }

    #[test]
    fn the_first_hierarchy_is_read_too() {
        let mount = tempfile::tempdir().unwrap();
        let group = mount.path().join("memory/job");
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(group.join("memory.limit_in_bytes"), "4096\n").unwrap();
        std::fs::write(group.join("memory.usage_in_bytes"), "96\n").unwrap();
        assert_eq!(group_headroom_bytes("3:cpu:/x\n7:memory:/job\n", mount.path()), Some(4000));
    }
}
