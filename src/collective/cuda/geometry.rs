//! How much moves at once: channels, slots, and the launch that an operation becomes. Every rank computes the same.

use crate::abi::collective::{
    FLAG_STRIDE_BYTES, Link, MAX_COLLECTIVE_THREADS, Protocol, Shards, one_shard, piece_elems, shards, slot_bytes,
};
use crate::collective::descriptor::{Descriptor, Partials};
use crate::error::Result;
use crate::schedule::{Algorithm, Collective, Schedule};
use crate::world::GROUP_AREA_BYTES;

/// Slots of a link, direction and channel: while the peer reads one, the next is written.
pub(super) const SLOTS: u32 = 2;
/// Most blocks of an operation, unless the user allows fewer. More would take multiprocessors from what the collective
/// overlaps with; NCCL uses as many on NVLink.
const MAX_CHANNELS: u32 = 32;
/// Of the multiprocessors of a device, one in so many may be a channel.
const MULTIPROCESSORS_PER_CHANNEL: u32 = 4;
/// Payload of a slot in device memory.
const BULK_SLOT_BYTES: u64 = 128 << 10;
const WORDS_SLOT_BYTES: u64 = 8 << 10;
/// Payload of a slot of words in host memory, and channels there: a few blocks fill a PCIe link.
const HOST_WORDS_SLOT_BYTES: u64 = 1 << 10;
const MAX_HOST_CHANNELS: u64 = 4;
const HOST_CHANNEL_BYTES: u64 = 64 << 10;
/// Vectors up to this length travel as words: one trip over the link in place of two. Not yet measured on a link.
const WORDS_LIMIT_BYTES: u64 = 64 << 10;
/// An all-reduce goes to everybody at once where all its copies together have at most so many bytes: then a trip that is saved is
/// worth more than what they take on the link. 8 KiB among 4 ranks on one H100: the kernel takes 16.4 us, in two trips 27.5. The
/// limit itself is not yet measured on a link.
const ONE_STEP_BYTES: u64 = 128 << 10;
/// What is worth a channel of its own.
const BULK_CHANNEL_BYTES: u64 = 16 << 10;
const WORDS_CHANNEL_BYTES: u64 = 2 << 10;
/// A piece may begin up to 15 elements of 8 bytes into its slot.
const SLACK_BYTES: u64 = 128;
/// Begin of a group area in host memory, which is not staging.
pub(super) const PAGE_BYTES: usize = 64 << 10;
const GREETING_BYTES: u64 = 256;

/// What one rank sets aside for one peer to write, in device memory or in the group's area of the host:
///
/// ```text
///   greeting | bulk: sent, taken flags | words: sent, taken flags | bulk slots [channel][slot] | words slots [channel][slot]
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) channels: u32,
    bulk_slot_bytes: u64,
    words_slot_bytes: u64,
    /// The longest vector that travels as words.
    words_limit_bytes: u64,
}

impl Geometry {
    /// For staging in device memory, on devices that have `multiprocessors`.
    pub(super) fn on_device(multiprocessors: u32, allowed_channels: Option<u32>) -> Geometry {
        let channels = (multiprocessors / MULTIPROCESSORS_PER_CHANNEL).clamp(1, MAX_CHANNELS);
        Geometry {
            channels: channels.min(allowed_channels.unwrap_or(MAX_CHANNELS)).max(1),
            bulk_slot_bytes: BULK_SLOT_BYTES + SLACK_BYTES,
            words_slot_bytes: 2 * (WORDS_SLOT_BYTES + SLACK_BYTES),
            words_limit_bytes: WORDS_LIMIT_BYTES,
        }
    }

    /// The same for operations that run by steps, where flags cost nothing: everything travels in bulk.
    pub(super) fn in_steps(self) -> Geometry {
        Geometry { words_limit_bytes: 0, ..self }
    }

    /// The same with other channels.
    pub(super) fn with_channels(self, channels: u32) -> Geometry {
        Geometry { channels, ..self }
    }

    /// What of it fits into the group's area in host memory.
    pub(super) fn on_host(self, world_size: u32) -> Geometry {
        let budget = ((GROUP_AREA_BYTES - PAGE_BYTES) as u64 / u64::from(world_size) - GREETING_BYTES) / 256 * 256;
        let channels = (budget / HOST_CHANNEL_BYTES).clamp(1, MAX_HOST_CHANNELS).min(self.channels.into());
        let words_slot_bytes = 2 * (HOST_WORDS_SLOT_BYTES + SLACK_BYTES);
        let flags = 4 * FLAG_STRIDE_BYTES as u64;
        let slot = (budget / channels - flags) / u64::from(SLOTS) - words_slot_bytes;
        let bulk_slot_bytes = (slot / 16 * 16).min(self.bulk_slot_bytes);
        Geometry { channels: channels as u32, bulk_slot_bytes, words_slot_bytes, ..self }
    }

    fn slot_bytes(&self, protocol: Protocol) -> u64 {
        match protocol {
            Protocol::Bulk => self.bulk_slot_bytes,
            Protocol::Words => self.words_slot_bytes,
        }
    }

    fn flags_bytes(&self) -> u64 {
        u64::from(self.channels) * FLAG_STRIDE_BYTES as u64
    }

    fn slots_bytes(&self, protocol: Protocol) -> u64 {
        u64::from(self.channels) * u64::from(SLOTS) * self.slot_bytes(protocol)
    }

    /// Memory for one peer.
    pub(super) fn peer_bytes(&self) -> u64 {
        let all = GREETING_BYTES + 4 * self.flags_bytes();
        let all = all + self.slots_bytes(Protocol::Bulk) + self.slots_bytes(Protocol::Words);
        all.next_multiple_of(256)
    }

    /// The link to a peer: `mine` is what this rank has for it, `theirs` what it has for this rank.
    pub(super) fn link(&self, protocol: Protocol, mine: u64, theirs: u64, progress: u64) -> Link {
        let flags = GREETING_BYTES + protocol as u64 * 2 * self.flags_bytes();
        let slots = GREETING_BYTES + 4 * self.flags_bytes();
        let slots = slots + if protocol == Protocol::Words { self.slots_bytes(Protocol::Bulk) } else { 0 };
        Link {
            send_slots: theirs + slots,
            send_flags: theirs + flags,
            credits: mine + flags + self.flags_bytes(),
            recv_slots: mine + slots,
            recv_flags: mine + flags,
            give_back: theirs + flags + self.flags_bytes(),
            greeting: mine,
            peer_greeting: theirs,
            progress,
        }
    }

    /// How `descriptor` runs among `world_size` ranks.
    pub(super) fn plan(&self, descriptor: &Descriptor, world_size: u32) -> Result<Plan> {
        let element_bytes = descriptor.dtype().size_bytes() as u64;
        let wire_bytes = match (descriptor.algorithm(), descriptor.partials()) {
            (Algorithm::Ring, Partials::F32) if descriptor.dtype().is_half() => 4,
            _ => element_bytes,
        };
        let all = descriptor.len_elems.saturating_mul(element_bytes);
        let protocol =
            if all <= self.words_limit_bytes && self.words_limit_bytes > 0 { Protocol::Words } else { Protocol::Bulk };
        // `slot_bytes` backwards.
        let room = self.slot_bytes(protocol) / if protocol == Protocol::Words { 2 } else { 1 };
        let room_elems = (room / wire_bytes - 16) / 16 * 16;
        let worth_bytes = if protocol == Protocol::Words { WORDS_CHANNEL_BYTES } else { BULK_CHANNEL_BYTES };
        let whole = descriptor.schedule(world_size, usize::MAX)?;
        let is_one_step = (whole.collective(), whole.algorithm()) == (Collective::AllReduce, Algorithm::Direct)
            && protocol == Protocol::Words
            && world_size > 1
            && all.saturating_mul((world_size - 1).into()) <= ONE_STEP_BYTES
            && descriptor.len_elems <= room_elems * u64::from(self.channels); // one round
        let shard_elems = if is_one_step { descriptor.len_elems } else { whole.slot_elems() as u64 };
        let shard_bytes = shard_elems.saturating_mul(element_bytes);
        let channels = shard_bytes.div_ceil(worth_bytes).clamp(1, self.channels.into()) as u32;
        let round_elems = room_elems * u64::from(channels);
        let schedule = descriptor.schedule(world_size, usize::try_from(round_elems).unwrap_or(usize::MAX))?;
        let piece_elems = piece_elems(shard_elems.min(round_elems), channels);
        debug_assert!(
            slot_bytes(piece_elems, wire_bytes as usize, protocol).is_some_and(|b| b <= self.slot_bytes(protocol))
        );
        let access_bytes = if protocol == Protocol::Words { 4 } else { 16 };
        let accesses = (piece_elems * element_bytes).div_ceil(access_bytes);
        Ok(Plan {
            protocol,
            channels,
            threads: (accesses.next_multiple_of(32)).clamp(64, MAX_COLLECTIVE_THREADS.into()) as u32,
            rounds: shard_elems.div_ceil(round_elems),
            round_elems,
            piece_elems,
            slot_bytes: self.slot_bytes(protocol),
            shards: if is_one_step { one_shard(whole.len_elems()) } else { shards(&schedule) },
            is_one_step,
            schedule,
        })
    }
}

/// An operation as a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) protocol: Protocol,
    pub(super) channels: u32,
    pub(super) threads: u32,
    pub(super) rounds: u64,
    pub(super) round_elems: u64,
    pub(super) piece_elems: u64,
    pub(super) slot_bytes: u64,
    pub(super) shards: Shards,
    /// Whether all goes to everybody at once, and not as the schedule says.
    pub(super) is_one_step: bool,
    pub(super) schedule: Schedule,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::descriptor::Kind;
    use crate::dtype::{DType, ReduceOp};

    #[test]
    fn what_is_set_aside_fits_the_groups_area() {
        for multiprocessors in [1, 4, 132, 1000] {
            for world_size in 1..=64 {
                let host = Geometry::on_device(multiprocessors, None).on_host(world_size);
                let all = PAGE_BYTES as u64 + u64::from(world_size) * host.peer_bytes();
                assert!(all <= GROUP_AREA_BYTES as u64, "{world_size} ranks: {all} bytes of {GROUP_AREA_BYTES}");
                assert!(host.bulk_slot_bytes >= 8 << 10, "{world_size} ranks: {host:?}");
            }
        }
    }

    #[test]
    fn pieces_fit_their_slots_and_rounds_the_vector() {
        let device = Geometry::on_device(132, None);
        for geometry in [device, device.on_host(2), device.on_host(64)] {
            for (world_size, len_elems) in [(1, 0), (1, 7), (2, 1 << 26), (3, 4_099), (8, 16_384), (64, 1 << 20)] {
                for dtype in [DType::F32, DType::BF16, DType::F64, DType::U8] {
                    for algorithm in [None, Some(Algorithm::Ring)] {
                        let how = (algorithm, Partials::F32);
                        let sum = ReduceOp::Sum;
                        let descriptor = Descriptor::new(1, Kind::AllReduce, dtype, len_elems, sum, 0, how);
                        let plan = geometry.plan(&descriptor, world_size).unwrap();
                        let wire_bytes = if algorithm.is_some() && dtype.is_half() { 4 } else { dtype.size_bytes() };
                        let needed = slot_bytes(plan.piece_elems, wire_bytes, plan.protocol).unwrap();
                        assert!(needed <= plan.slot_bytes, "{plan:?}");
                        assert!(plan.channels <= geometry.channels && plan.threads.is_multiple_of(32));
                        let shard = if plan.is_one_step { len_elems } else { plan.schedule.shard(0).len_elems } as u64;
                        assert!(
                            plan.rounds * plan.round_elems >= shard
                                && plan.rounds.saturating_sub(1) * plan.round_elems < shard.max(1)
                        );
                        assert!(plan.piece_elems * u64::from(plan.channels) >= shard.min(plan.round_elems));
                    }
                }
            }
        }
    }
}
