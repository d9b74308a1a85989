//! The GPUs of this machine, for `annulus info`: driver, devices, and what each pair can do.

/// One thing that was looked for.
pub(crate) struct Finding {
    pub(crate) what: String,
    pub(crate) found: bool,
    pub(crate) detail: String,
}

/// Looks for a driver and devices, and probes every pair of them with data.
#[cfg(feature = "cuda")]
pub(crate) fn look() -> Vec<Finding> {
    use annulus::device::cuda::{Driver, OLDEST_DRIVER};

    let version = |number: u32| format!("{}.{}", number / 1000, number % 1000 / 10);
    let driver = match Driver::open() {
        Ok(driver) => driver,
        Err(error) => return vec![refused("NVIDIA driver", &error)],
    };
    let detail = format!("of CUDA {}; {} or later is needed", version(driver.version()), version(OLDEST_DRIVER));
    let mut findings = vec![Finding { what: "NVIDIA driver".into(), found: true, detail }];
    let mut usable = Vec::new();
    for ordinal in 0..driver.len_devices() {
        match describe(&driver, ordinal) {
            Ok((kernels, detail)) => {
                usable.push(kernels);
                findings.push(Finding { what: format!("device {ordinal}"), found: true, detail });
            }
            Err(error) => findings.push(refused(&format!("device {ordinal}"), &error)),
        }
    }
    for (index, first) in usable.iter().enumerate() {
        findings.extend(usable[index + 1..].iter().map(|second| pair([first, second])));
    }
    findings
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn look() -> Vec<Finding> {
    let detail = "this program was built without the feature `cuda`".into();
    vec![Finding { what: "NVIDIA driver".into(), found: false, detail }]
}

#[cfg(feature = "cuda")]
fn refused(what: &str, error: &annulus::Error) -> Finding {
    Finding { what: what.to_owned(), found: false, detail: error.to_string() }
}

/// Loads the kernels on a device, which shows that it works, and describes it.
#[cfg(feature = "cuda")]
fn describe(
    driver: &annulus::device::cuda::Driver,
    ordinal: u32,
) -> annulus::Result<(annulus::device::cuda::Kernels, String)> {
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
    Ok((annulus::device::cuda::Kernels::load(&device)?, detail))
}

#[cfg(feature = "cuda")]
fn pair(kernels: [&annulus::device::cuda::Kernels; 2]) -> Finding {
    use annulus::device::cuda::{Link, probe_pair};

    let [first, second] = kernels.map(|kernels| kernels.device().ordinal());
    let what = format!("devices {first} and {second}");
    let link = match probe_pair(kernels, std::time::Duration::from_secs(2)) {
        Ok(link) => link,
        Err(error) => return refused(&what, &error),
    };
    let detail = match link {
        Link::Sound => "reach each other's memory, tried just now with data".into(),
        Link::NoAccess => "do not reach each other's memory, says the driver: bytes go through the host".into(),
        Link::Silent { waited_ms } => {
            format!("the driver claims peer access, but what one wrote did not reach the other in {waited_ms} ms")
        }
        Link::Corrupt { wrong_words, of_words } => {
            format!("the driver claims peer access, but {wrong_words} of {of_words} words arrived wrong")
        }
    };
    Finding { what, found: link == Link::Sound, detail }
}
