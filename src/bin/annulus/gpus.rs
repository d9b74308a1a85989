//! The GPUs of this machine, for `annulus info`: driver, devices, links, and what each pair can do.

/// One thing that was looked for.
pub(crate) struct Finding {
    pub(crate) what: String,
    pub(crate) found: bool,
    pub(crate) detail: String,
}

/// The links between all GPUs of the machine, this process's or not.
#[derive(serde::Serialize)]
pub(crate) struct Links {
    /// UUIDs, in nvidia-smi's order.
    gpus: Vec<String>,
    /// In nvidia-smi's words.
    matrix: Vec<Vec<String>>,
    /// The matrix and what its words mean, for people.
    #[serde(skip)]
    pub(crate) text: String,
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn look() -> (Vec<Finding>, Option<Links>) {
    let detail = "this program was built without the feature `cuda`".into();
    (vec![Finding { what: "NVIDIA driver".into(), found: false, detail }], None)
}

#[cfg(feature = "cuda")]
pub(crate) use with_cuda::look;

#[cfg(feature = "cuda")]
mod with_cuda {
    use std::time::Duration;

    use annulus::device::cuda::{Driver, Kernels, Link, OLDEST_DRIVER, probe_pair};
    use annulus::schedule::ring_order;
    use annulus::telemetry::Topology;
    use annulus::telemetry::topology::Path;

    use super::{Finding, Links};

    /// Looks for a driver, devices and links, and probes every pair of devices with data.
    pub(crate) fn look() -> (Vec<Finding>, Option<Links>) {
        let topology = Topology::look();
        let mut findings = vec![match &topology {
            Ok(topology) => {
                let detail = format!("tells the links between {} GPU(s), below", topology.gpus().len());
                Finding { what: "management library".into(), found: true, detail }
            }
            Err(error) => refused("management library", error),
        }];
        let topology = topology.ok();
        match Driver::open() {
            Ok(driver) => devices(&driver, topology.as_ref(), &mut findings),
            Err(error) => findings.push(refused("NVIDIA driver", &error)),
        }
        (findings, topology.map(|topology| links(&topology)))
    }

    fn devices(driver: &Driver, topology: Option<&Topology>, findings: &mut Vec<Finding>) {
        let version = |number: u32| format!("{}.{}", number / 1000, number % 1000 / 10);
        let detail = format!("of CUDA {}; {} or later is needed", version(driver.version()), version(OLDEST_DRIVER));
        findings.push(Finding { what: "NVIDIA driver".into(), found: true, detail });
        let mut usable = Vec::new();
        for ordinal in 0..driver.len_devices() {
            match describe(driver, ordinal) {
                Ok((kernels, detail)) => {
                    usable.push(kernels);
                    findings.push(Finding { what: format!("device {ordinal}"), found: true, detail });
                }
                Err(error) => findings.push(refused(&format!("device {ordinal}"), &error)),
            }
        }
        // 0 where bytes do not get through, whatever lies between.
        let mut closeness = vec![vec![0; usable.len()]; usable.len()];
        for one in 0..usable.len() {
            for other in one + 1..usable.len() {
                let [first, second] = [&usable[one], &usable[other]].map(|kernels| kernels.device().uuid().to_string());
                let path = topology.map_or(Path::Unknown, |topology| topology.path(&first, &second));
                let finding = pair([&usable[one], &usable[other]], path);
                let reached = if finding.found { 1 + path.closeness() } else { 0 };
                (closeness[one][other], closeness[other][one]) = (reached, reached);
                findings.push(finding);
            }
        }
        if usable.len() > 1 {
            let order = ring_order(usable.len(), |one, other| closeness[one][other]);
            let devices = || order.iter().map(|index| usable[*index].device());
            let ordinals: Vec<String> = devices().map(|device| device.ordinal().to_string()).collect();
            let mut detail = format!("{}, and back: its worst link is as good as can be", ordinals.join(" - "));
            if !order.is_sorted() {
                // Ranks take devices in the order in which they see them, and a communicator's ring is that of the ranks.
                let uuids: Vec<String> = devices().map(|device| device.uuid().to_string()).collect();
                detail += &format!("; for ranks in this order, CUDA_VISIBLE_DEVICES={}", uuids.join(","));
            }
            findings.push(Finding { what: "ring of devices".into(), found: true, detail });
        }
    }

    fn links(topology: &Topology) -> Links {
        let mut text = topology.to_string();
        let mut paths: Vec<Path> = topology.rows().iter().flatten().copied().collect();
        paths.sort_by_key(|path| (path.closeness(), path.to_string()));
        paths.dedup();
        for path in paths {
            text += &format!("\n{path:<5}  {}", path.meaning());
        }
        Links {
            gpus: topology.gpus().iter().map(|gpu| gpu.uuid.clone()).collect(),
            matrix: topology.rows().iter().map(|row| row.iter().map(Path::to_string).collect()).collect(),
            text,
        }
    }

    fn refused(what: &str, error: &annulus::Error) -> Finding {
        Finding { what: what.to_owned(), found: false, detail: error.to_string() }
    }

    /// Loads the kernels on a device, which shows that it works, and describes it.
    fn describe(driver: &Driver, ordinal: u32) -> annulus::Result<(Kernels, String)> {
        let device = driver.device(ordinal)?;
        let (major, minor) = device.compute_capability()?;
        let (free_bytes, total_bytes) = device.memory_bytes()?;
        let sharing = if device.shares_descriptors()? { "descriptors" } else { "legacy handles" };
        let size = crate::machine::size;
        let detail = format!(
            "{}, {}, sm_{major}{minor}, {} multiprocessors, {} of {} free, shares memory by {sharing}",
            device.name(),
            device.uuid(),
            device.len_multiprocessors()?,
            size(free_bytes),
            size(total_bytes),
        );
        Ok((Kernels::load(&device)?, detail))
    }

    fn pair(kernels: [&Kernels; 2], path: Path) -> Finding {
        let [first, second] = kernels.map(|kernels| kernels.device().ordinal());
        let what = format!("devices {first} and {second}");
        let link = match probe_pair(kernels, Duration::from_secs(2)) {
            Ok(link) => link,
            Err(error) => return refused(&what, &error),
        };
        let verdict = match link {
            Link::Sound => "reach each other's memory, tried just now with data".into(),
            Link::NoAccess => "do not reach each other's memory, says the driver: bytes go through the host".into(),
            Link::Silent { waited_ms } => {
                format!("the driver claims peer access, but what one wrote did not reach the other in {waited_ms} ms")
            }
            Link::Corrupt { wrong_words, of_words } => {
                format!("the driver claims peer access, but {wrong_words} of {of_words} words arrived wrong")
            }
        };
        let detail = if path == Path::Unknown { verdict } else { format!("{path}: {verdict}") };
        Finding { what, found: link == Link::Sound, detail }
    }
}
