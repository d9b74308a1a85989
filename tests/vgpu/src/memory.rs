//! Global memory: allocations in one 64-bit address space that every virtual device shares.

use std::collections::BTreeMap;

use crate::outside::Outside;

const FIRST_ADDRESS: u64 = 0x7000_0000_0000;
/// Allocations begin at multiples of this, as `cuMemAlloc` promises, and are at least as far apart.
const ALLOCATION_ALIGN_BYTES: u64 = 256;

/// The allocations that kernels may reach.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: BTreeMap<u64, Vec<u8>>,
    end: u64,
}

impl Memory {
    /// No allocation.
    pub fn new() -> Memory {
        Memory { allocations: BTreeMap::new(), end: FIRST_ADDRESS }
    }

    /// Allocates a copy of `bytes` and returns its address, a multiple of 256. No two allocations touch.
    pub fn alloc(&mut self, bytes: &[u8]) -> u64 {
        let address = self.end.max(FIRST_ADDRESS);
        self.end = (address + bytes.len() as u64).next_multiple_of(ALLOCATION_ALIGN_BYTES) + ALLOCATION_ALIGN_BYTES;
        self.allocations.insert(address, bytes.to_vec());
        address
    }

    /// Allocates a copy of `bytes` at `address`, below everything that [`Memory::alloc`] gives: pieces of a tensor that is
    /// larger than this machine's memory.
    ///
    /// # Panics
    /// If the bytes would lie in or touch another allocation, or above the first address of [`Memory::alloc`].
    pub fn alloc_at(&mut self, address: u64, bytes: &[u8]) {
        let end = address + bytes.len() as u64;
        let below = self.allocations.range(..end).next_back();
        assert!(end < FIRST_ADDRESS && below.is_none_or(|(start, below)| start + (below.len() as u64) < address));
        self.allocations.insert(address, bytes.to_vec());
    }

    /// The `len_bytes` bytes at `address`, if they lie in one allocation.
    pub fn read(&self, address: u64, len_bytes: usize) -> Option<&[u8]> {
        let (start, bytes) = self.allocations.range(..=address).next_back()?;
        let offset = usize::try_from(address - start).ok()?;
        bytes.get(offset..offset.checked_add(len_bytes)?)
    }

    /// As [`Memory::read`], to change them.
    pub fn write(&mut self, address: u64, len_bytes: usize) -> Option<&mut [u8]> {
        let (start, bytes) = self.allocations.range_mut(..=address).next_back()?;
        let offset = usize::try_from(address - start).ok()?;
        bytes.get_mut(offset..offset.checked_add(len_bytes)?)
    }
}

impl Outside for Memory {
    fn contains(&self, address: u64, len_bytes: usize) -> bool {
        self.read(address, len_bytes).is_some()
    }

    fn load(&self, address: u64, into: &mut [u8]) -> bool {
        self.read(address, into.len()).map(|bytes| into.copy_from_slice(bytes)).is_some()
    }

    fn store(&mut self, address: u64, bytes: &[u8]) -> bool {
        self.write(address, bytes.len()).map(|place| place.copy_from_slice(bytes)).is_some()
    }

    fn update(&mut self, address: u64, len_bytes: usize, change: &dyn Fn(u64) -> u64) -> Option<u64> {
        let place = self.write(address, len_bytes)?;
        let mut old = [0; 8];
        old[..len_bytes].copy_from_slice(place);
        let old = u64::from_le_bytes(old);
        place.copy_from_slice(&change(old).to_le_bytes()[..len_bytes]);
        Some(old)
    }

    fn nearest(&self, address: u64) -> String {
        match self.allocations.range(..=address).next_back() {
            Some((start, bytes)) => format!("{} bytes at {start:#x}", bytes.len()),
            None => "none below".to_owned(),
        }
    }
}
