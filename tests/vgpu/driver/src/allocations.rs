//! Which addresses mean what: the allocations of this process, and the view of them that a kernel has.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::time::Instant;

use annulus_vgpu::{Manner, Outside};

use crate::device;
use crate::mapping::{Mapping, MemoryId, new_memory};
use crate::races::{self, Watch};
use crate::settings::{Peers, SETTINGS};
use crate::status::{Result, Status, refuse};

/// How an allocation came to be, which decides what may be done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `cuMemAlloc`
    Device,
    /// `cuMemAllocAsync`
    Pool,
    /// `cuIpcOpenMemHandle`
    Imported,
    /// `cuMemMap`; bit d: `cuMemSetAccess` lets device d in.
    Virtual { access: u64 },
    /// `cuMemHostAlloc`
    Pinned,
    /// `cuMemHostRegister`
    Registered,
}

impl Kind {
    pub fn is_host(self) -> bool {
        matches!(self, Kind::Pinned | Kind::Registered)
    }
}

#[derive(Clone)]
pub(crate) struct Allocation {
    pub mapping: Arc<Mapping>,
    pub len_bytes: usize,
    pub kind: Kind,
    /// Where the memory is; for host memory, whose context made it.
    pub device: usize,
}

/// Allocations by address. A kernel keeps the table of its launch, and with it every mapping in it.
type Table = BTreeMap<u64, Allocation>;

static TABLE: LazyLock<RwLock<Arc<Table>>> = LazyLock::new(RwLock::default);

pub(crate) fn table() -> Arc<Table> {
    Arc::clone(&TABLE.read().unwrap_or_else(PoisonError::into_inner))
}

/// Changes the table for calls and launches to come.
pub(crate) fn change<T>(work: impl FnOnce(&mut Table) -> Result<T>) -> Result<T> {
    work(Arc::make_mut(&mut TABLE.write().unwrap_or_else(PoisonError::into_inner)))
}

/// New memory of a device, or of the host, in the table.
pub(crate) fn allocate(len_bytes: usize, kind: Kind, number: usize) -> Result<u64> {
    // DAPI 6.13, `cuMemAlloc`: "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE."
    if len_bytes == 0 {
        return Err(Status::INVALID_VALUE);
    }
    if !kind.is_host() {
        device::charge(number, len_bytes)?;
    }
    let made = new_memory(len_bytes, number).and_then(|memory| Mapping::of_memory(memory, len_bytes));
    // DAPI 6.13: among the codes of `cuMemAlloc` and `cuMemHostAlloc`.
    let Ok(mapping) = made else {
        if !kind.is_host() {
            device::give_back(number, len_bytes);
        }
        return Err(Status::OUT_OF_MEMORY);
    };
    let address = mapping.address();
    let allocation = Allocation { mapping: Arc::new(mapping), len_bytes, kind, device: number };
    change(|table| Ok(table.insert(address, allocation)))?;
    Ok(address)
}

/// Takes the allocation that begins at `address` out of the table, if it is of a kind that `accepts`. DAPI 6.13, `cuMemFree`
/// and its like: the pointer "must have been returned by a previous call" of the function that goes with it; and
/// CUDA_ERROR_INVALID_VALUE is among the codes.
pub(crate) fn remove(address: u64, call: &str, accepts: impl Fn(Kind) -> bool) -> Result<Allocation> {
    let removed = change(|table| match table.get(&address) {
        Some(allocation) if accepts(allocation.kind) => table.remove(&address).ok_or(Status::INVALID_VALUE),
        Some(allocation) => refuse(Status::INVALID_VALUE, &format!("{call} of {:?} memory", allocation.kind)),
        None => refuse(Status::INVALID_VALUE, &format!("{call} of {address:#x}, where no allocation begins")),
    })?;
    if matches!(removed.kind, Kind::Device | Kind::Pool) {
        if removed.mapping.is_announced() {
            // DAPI 6.13, `cuIpcOpenMemHandle`: "Calling cuMemFree on an exported memory region before calling
            // cuIpcCloseMemHandle in the importing context will result in undefined behavior."
            eprintln!("virtual GPU: {call} of {address:#x}, which another process has still open");
            std::process::abort();
        }
        device::give_back(removed.device, removed.len_bytes);
        races::access(&removed.mapping, 0, removed.len_bytes, true, call);
        // Whoever still uses it in this process reads rubbish.
        removed.mapping.fill(0, removed.len_bytes, 0xdb);
    }
    if matches!(removed.kind, Kind::Imported | Kind::Virtual { .. }) {
        // Nothing says that their unmapping waits for kernels: one that still uses the address faults.
        removed.mapping.close();
    }
    Ok(removed)
}

/// The allocation with these bytes, and their offset in it.
pub(crate) fn find(table: &Table, address: u64, len_bytes: usize) -> Option<(&Allocation, usize)> {
    let (start, allocation) = table.range(..=address).next_back()?;
    let offset = usize::try_from(address - start).ok()?;
    (offset.checked_add(len_bytes)? <= allocation.len_bytes).then_some((allocation, offset))
}

/// Device memory as a copy or a memset needs it: DAPI 6.13, CUDA_ERROR_INVALID_VALUE for anything else.
pub(crate) fn range(address: u64, len_bytes: usize) -> Result<(Allocation, usize)> {
    match find(&table(), address, len_bytes) {
        Some((allocation, offset)) => Ok((allocation.clone(), offset)),
        None => refuse(Status::INVALID_VALUE, &format!("{len_bytes} bytes at {address:#x} are in no allocation")),
    }
}

/// As [`range`], when the stream's or the graph's turn has come: what was freed by then is an illegal address (DAPI 6.1,
/// CUDA_ERROR_ILLEGAL_ADDRESS: "on an invalid memory address").
pub(crate) fn range_now(number: usize, address: u64, len_bytes: usize) -> Option<(Allocation, usize)> {
    let found = range(address, len_bytes).ok();
    if found.is_none() {
        device::stick(number, Status::ILLEGAL_ADDRESS);
    }
    found
}

/// The addresses at which a byte of a memory is mapped, for messages.
pub(crate) fn places_of(memory: MemoryId, offset: u64) -> String {
    let table = table();
    let places = table.iter().filter_map(|(start, allocation)| {
        let (id, base) = allocation.mapping.identity()?;
        let within = offset.checked_sub(base).filter(|within| id == memory && *within < allocation.len_bytes as u64)?;
        let Allocation { len_bytes, kind, device, .. } = allocation;
        Some(format!(
            "{:#x}, byte {within} of {len_bytes} of {kind:?} memory at {start:#x} of device {device}",
            start + within
        ))
    });
    let places: Vec<String> = places.collect();
    if places.is_empty() { "memory that is freed".to_owned() } else { places.join(", also ") }
}

/// What the kernels of one launch reach.
pub(crate) struct View {
    table: Arc<Table>,
    device: usize,
    /// Bit d: memory of device d.
    reachable: u64,
    start: Instant,
    watch: Option<Watch>,
}

impl View {
    pub fn of(number: usize, watch: Option<Watch>) -> View {
        View { table: table(), device: number, reachable: device::reachable(number), start: Instant::now(), watch }
    }

    /// The launch has ended.
    pub fn end(&self) {
        if let Some(watch) = &self.watch {
            watch.note();
        }
    }

    fn before(&self, found: (&Allocation, usize), len_bytes: usize, writes: bool) {
        if let Some(watch) = &self.watch {
            watch.before(&found.0.mapping, found.1, len_bytes, writes);
        }
    }

    fn after(&self, found: (&Allocation, usize)) {
        if let Some(watch) = &self.watch {
            watch.after(&found.0.mapping, found.1, found.0.kind.is_host());
        }
    }

    fn find(&self, address: u64, len_bytes: usize) -> Option<(&Allocation, usize)> {
        let found = find(&self.table, address, len_bytes)?;
        let allowed = match found.0.kind {
            Kind::Virtual { access } => access >> self.device & 1 == 1,
            // Opening it has enabled peer access: CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.
            Kind::Imported | Kind::Pinned | Kind::Registered => true,
            Kind::Device | Kind::Pool => self.reachable >> found.0.device & 1 == 1,
        };
        (allowed && !found.0.mapping.is_closed()).then_some(found)
    }

    /// Whether a store to `allocation` gets lost on the way.
    fn loses(&self, allocation: &Allocation) -> bool {
        SETTINGS.peers == Peers::Lossy && !allocation.kind.is_host() && allocation.device != self.device
    }
}

impl Outside for View {
    fn contains(&self, address: u64, len_bytes: usize) -> bool {
        self.find(address, len_bytes).is_some()
    }

    fn load(&self, address: u64, into: &mut [u8]) -> bool {
        let Some(found) = self.find(address, into.len()) else { return false };
        self.before(found, into.len(), false);
        found.0.mapping.read(found.1, into);
        self.after(found);
        true
    }

    fn store(&mut self, address: u64, bytes: &[u8]) -> bool {
        let Some((allocation, offset)) = self.find(address, bytes.len()) else { return false };
        self.before((allocation, offset), bytes.len(), true);
        if !self.loses(allocation) {
            allocation.mapping.write(offset, bytes);
        }
        true
    }

    fn update(&mut self, address: u64, len_bytes: usize, change: &dyn Fn(u64) -> u64) -> Option<u64> {
        let (allocation, offset) = self.find(address, len_bytes)?;
        self.before((allocation, offset), len_bytes, true);
        let old = allocation.mapping.update(offset, len_bytes, change);
        self.after((allocation, offset));
        old
    }

    fn announce(&self, manner: Manner) {
        if let Some(watch) = &self.watch {
            watch.announce(manner);
        }
    }

    fn nearest(&self, address: u64) -> String {
        match self.table.range(..=address).next_back() {
            Some((start, Allocation { len_bytes, kind, device, .. })) => {
                format!("{len_bytes} bytes of {kind:?} memory, device {device}, at {start:#x}")
            }
            None => "none below".to_owned(),
        }
    }

    fn time_ns(&self) -> Option<u64> {
        u64::try_from(self.start.elapsed().as_nanos()).ok()
    }

    fn rest(&self) {
        std::thread::yield_now();
    }
}
