//! Which links lie between the GPUs of this machine, in the words of `nvidia-smi topo -m`.
//!
//! ```text
//!         GPU0    GPU1    GPU2
//! GPU0     X      NV4     SYS
//! GPU1    NV4      X      SYS
//! GPU2    SYS     SYS      X
//! ```
//! This is what the machine is built like. Whether bytes arrive is another question, which only trying answers:
//! [`probe_pair`](crate::device::cuda::probe_pair).
#![forbid(unsafe_code)]

use std::fmt;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TopologyLevel;

use super::nvml::{ends_in_switch, failed, open};
use crate::error::Result;

/// More NVLinks than any GPU has.
const MAX_NVLINKS: u32 = 64;

/// What lies between two GPUs. NVLink where there is any, else the farthest part of PCIe on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// They are the same.
    Same,
    /// NVLinks: from one to the other, or from both to switches.
    NvLink {
        /// How many.
        links: u32,
        /// "4.0" and the like, where the library tells.
        version: Option<&'static str>,
    },
    /// One board.
    Board,
    /// One PCIe switch.
    Switch,
    /// Several PCIe switches, and no host bridge.
    Switches,
    /// The host bridge of a processor.
    HostBridge,
    /// Several host bridges of one NUMA node.
    Node,
    /// The link between NUMA nodes.
    System,
    /// The library does not tell.
    Unknown,
}

impl Path {
    /// Larger where more bytes get through in the same time.
    pub fn closeness(self) -> u32 {
        match self {
            Path::Unknown => 0,
            Path::System => 1,
            Path::Node => 2,
            Path::HostBridge => 3,
            Path::Switches => 4,
            Path::Switch => 5,
            Path::Board => 6,
            Path::NvLink { links, .. } => 6 + links.min(MAX_NVLINKS),
            Path::Same => 7 + MAX_NVLINKS,
        }
    }

    /// What the name of this path in the matrix means.
    pub fn meaning(self) -> String {
        match self {
            Path::Same => "the same GPU".into(),
            Path::NvLink { links, version: None } => format!("{links} NVLinks"),
            Path::NvLink { links, version: Some(version) } => format!("{links} NVLinks {version}"),
            Path::Board => "PCIe within one board".into(),
            Path::Switch => "PCIe over one switch".into(),
            Path::Switches => "PCIe over several switches, not over a host bridge".into(),
            Path::HostBridge => "PCIe over a host bridge".into(),
            Path::Node => "PCIe over several host bridges of one NUMA node".into(),
            Path::System => "PCIe and the link between NUMA nodes".into(),
            Path::Unknown => "the management library does not tell".into(),
        }
    }
}

impl fmt::Display for Path {
    /// As `nvidia-smi topo -m` names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Same => f.pad("X"),
            Path::NvLink { links, .. } => f.pad(&format!("NV{links}")),
            Path::Board => f.pad("PSB"),
            Path::Switch => f.pad("PIX"),
            Path::Switches => f.pad("PXB"),
            Path::HostBridge => f.pad("PHB"),
            Path::Node => f.pad("NODE"),
            Path::System => f.pad("SYS"),
            Path::Unknown => f.pad("?"),
        }
    }
}

/// A GPU of the machine, whether or not this process may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// `GPU-..`, as [`Uuid`](crate::device::cuda::Uuid) prints it: what to find it by. Numbers differ between nvidia-smi and
    /// a process with `CUDA_VISIBLE_DEVICES`.
    pub uuid: String,
    /// The product.
    pub name: String,
    /// Its place on PCIe.
    pub bus_id: String,
}

/// The GPUs, in nvidia-smi's order, and the paths between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    gpus: Vec<Gpu>,
    /// `paths[i][j]`; symmetric.
    paths: Vec<Vec<Path>>,
}

impl Topology {
    /// Asks the management library. What it does not tell about a pair is [`Path::Unknown`].
    ///
    /// # Errors
    /// [`Error::Management`](crate::Error::Management) if it cannot be opened, or does not name the GPUs.
    pub fn look() -> Result<Topology> {
        let nvml = open()?;
        let count = nvml.device_count().map_err(|error| failed("counting GPUs", &error))?;
        let ends = (0..count).map(|index| End::look(&nvml, index)).collect::<Result<Vec<End<'_>>>>()?;
        let mut paths = vec![vec![Path::Same; ends.len()]; ends.len()];
        for one in 0..ends.len() {
            for other in one + 1..ends.len() {
                let path = ends[one].path(&ends[other]);
                paths[one][other] = path;
                paths[other][one] = path;
            }
        }
        Ok(Topology { gpus: ends.into_iter().map(|end| end.gpu).collect(), paths })
    }

    /// The GPUs, in nvidia-smi's order.
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// What lies between the GPUs with these UUIDs; [`Path::Unknown`] if one is not a GPU of this machine.
    pub fn path(&self, one: &str, other: &str) -> Path {
        let find = |uuid: &str| self.gpus.iter().position(|gpu| gpu.uuid == uuid);
        match (find(one), find(other)) {
            (Some(one), Some(other)) => self.paths[one][other],
            _ => Path::Unknown,
        }
    }

    /// `rows()[i][j]` lies between the `i`-th and the `j`-th GPU.
    pub fn rows(&self) -> &[Vec<Path>] {
        &self.paths
    }
}

impl fmt::Display for Topology {
    /// The matrix.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "     ")?;
        (0..self.gpus.len()).try_for_each(|index| write!(f, " {:^6}", format!("GPU{index}")))?;
        for (index, row) in self.paths.iter().enumerate() {
            write!(f, "\n{:<5}", format!("GPU{index}"))?;
            row.iter().try_for_each(|path| write!(f, " {path:^6}"))?;
        }
        Ok(())
    }
}

/// Where a GPU stands on its buses.
struct End<'nvml> {
    nvml: &'nvml Nvml,
    index: u32,
    gpu: Gpu,
    /// PCI domain, bus and device.
    place: Option<[u32; 3]>,
    /// Of each NVLink that is up: the place at its far end, or `None` for a switch; and the version.
    nvlinks: Vec<(Option<[u32; 3]>, Option<&'static str>)>,
}

impl<'nvml> End<'nvml> {
    fn look(nvml: &'nvml Nvml, index: u32) -> Result<End<'nvml>> {
        let device = nvml.device_by_index(index).map_err(|error| failed("opening a GPU", &error))?;
        let uuid = device.uuid().map_err(|error| failed("asking a GPU for its UUID", &error))?;
        let pci = device.pci_info().ok();
        let gpu = Gpu {
            uuid,
            name: device.name().unwrap_or_else(|error| error.to_string()),
            bus_id: pci.as_ref().map_or_else(|| "unknown".to_owned(), |pci| pci.bus_id.clone()),
        };
        let nvlinks = (0..MAX_NVLINKS)
            .map(|number| (number, device.link_wrapper_for(number)))
            // The first number that is no link, and a GPU without links, are errors.
            .map_while(|(number, link)| link.is_active().ok().map(|is_active| (number, link, is_active)))
            .filter(|(.., is_active)| *is_active)
            .filter_map(|(number, link, _)| {
                let version = link.version().ok().and_then(nvlink_version);
                if ends_in_switch(nvml, &device, number) {
                    return Some((None, version));
                }
                let far = link.remote_pci_info().ok()?;
                Some((Some([far.domain, far.bus, far.device]), version))
            })
            .collect();
        let place = pci.map(|pci| [pci.domain, pci.bus, pci.device]);
        Ok(End { nvml, index, gpu, place, nvlinks })
    }

    fn path(&self, other: &End<'_>) -> Path {
        let to_switches = |end: &End<'_>| end.nvlinks.iter().filter(|(far, _)| far.is_none()).count();
        let direct = self.nvlinks.iter().filter(|(far, _)| far.is_some() && *far == other.place).count();
        // What reaches a switch from one side can leave it on the other.
        let links = direct + to_switches(self).min(to_switches(other));
        if links > 0 {
            return Path::NvLink {
                links: links as u32,
                version: self.nvlinks.iter().find_map(|(_, version)| *version),
            };
        }
        let open = |index| self.nvml.device_by_index(index);
        match open(self.index).and_then(|device| device.topology_common_ancestor(open(other.index)?)) {
            Ok(TopologyLevel::Internal) => Path::Board,
            Ok(TopologyLevel::Single) => Path::Switch,
            Ok(TopologyLevel::Multiple) => Path::Switches,
            Ok(TopologyLevel::HostBridge) => Path::HostBridge,
            Ok(TopologyLevel::Node) => Path::Node,
            Ok(TopologyLevel::System) => Path::System,
            Err(_) => Path::Unknown,
        }
    }
}

/// `nvmlNvlinkVersion_t` of nvml.h.
fn nvlink_version(code: u32) -> Option<&'static str> {
    const VERSIONS: [&str; 7] = ["1.0", "2.0", "2.2", "3.0", "3.1", "4.0", "5.0"];
    VERSIONS.get(usize::try_from(code.checked_sub(1)?).ok()?).copied()
}
