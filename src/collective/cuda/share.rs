//! How a rank's staging comes to its peers.
//!
//! | ranks are | what crosses | who can map the memory |
//! |---|---|---|
//! | threads of one process | nothing: the arena itself is on offer | this process |
//! | processes | a POSIX descriptor, over the rendezvous' sockets | who was sent it: ranks whose user was checked |
//! | processes, and a device cannot share by descriptors | a legacy handle of 64 bytes, over the job's own pages | whoever reads it |
//!
//! All ranks of a communicator share in one way. Neither descriptors nor handles are ever printed.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::connect::{Meeting, together};
use super::offers::OnOffer;
use crate::device::cuda::{Arena, Exported, PeerAccess, PeerArena, ProbeArea, Sharing, Token};
use crate::error::{Error, Result};
use crate::world::Launcher;

/// What a rank tells of its staging. Not `Debug`: a handle is a right.
#[derive(Serialize, Deserialize)]
pub(super) struct Offer {
    len_bytes: usize,
    /// Where the arena holds the area to probe with, by peer.
    probes: Vec<usize>,
    token: Offered,
}

#[derive(Serialize, Deserialize)]
enum Offered {
    Here(u64),
    /// Sent by itself.
    Descriptor,
    Handle(Vec<u8>),
}

/// What an offer needs until the peers have taken it up.
pub(super) enum Behind {
    Here(#[expect(dead_code, reason = "held for its drop")] OnOffer),
    Descriptor(OwnedFd),
    Nothing,
}

impl Offer {
    /// Where the owner's arena holds the area to probe with `peer`; behind every arena if the owner did not say.
    pub(super) fn probe_offset_bytes(&self, peer: u32) -> usize {
        self.probes.get(peer as usize).copied().unwrap_or(usize::MAX)
    }
}

impl Meeting<'_> {
    pub(super) fn is_one_process(&self) -> bool {
        self.world.environment().launcher == Launcher::Threads
    }

    /// How this group shares.
    pub(super) fn sharing(&self) -> Result<Sharing> {
        if self.is_one_process() {
            return Ok(Sharing::Handle); // which nobody exports
        }
        let can = together(self.world, self.device.shares_descriptors(), self.timeout)?;
        let rank = self.world.rank();
        if self.world.reduce_boolean(can, true, self.timeout)? {
            tracing::info!(rank, "staging crosses between processes as descriptors");
            return Ok(Sharing::Descriptor);
        }
        tracing::warn!(
            rank,
            this_device_can = can,
            "not by descriptors: staging crosses between processes as legacy handles"
        );
        Ok(Sharing::Handle)
    }

    /// What this rank tells of its staging, and what must live until everybody has opened it.
    pub(super) fn offer(&self, staging: &Arena, areas: &[ProbeArea]) -> Result<(Offer, Behind)> {
        let (token, behind) = if self.is_one_process() {
            let here = OnOffer::new(staging);
            (Offered::Here(here.number()), Behind::Here(here))
        } else {
            match staging.export()?.token {
                Token::Descriptor(descriptor) => (Offered::Descriptor, Behind::Descriptor(descriptor)),
                Token::Handle(handle) => (Offered::Handle(handle.to_vec()), Behind::Nothing),
            }
        };
        let probes = areas.iter().map(ProbeArea::offset_bytes).collect();
        Ok((Offer { len_bytes: staging.len_bytes(), probes, token }, behind))
    }

    /// Every peer's staging, by rank; none for this rank's own, and for those that cannot be reached.
    pub(super) fn open(&self, offers: &[Offer], behind: &Behind) -> Result<Vec<Option<PeerArena>>> {
        let mut descriptors: Vec<Option<OwnedFd>> = match behind {
            Behind::Descriptor(own) => {
                self.world.exchange_descriptors(own, self.timeout)?.into_iter().map(Some).collect()
            }
            _ => Vec::new(),
        };
        let open = |(peer, offer): (u32, &Offer)| {
            let descriptor = descriptors.get_mut(peer as usize).and_then(Option::take);
            let opened = if peer == self.world.rank() { Ok(None) } else { self.open_one(offer, descriptor) };
            opened.unwrap_or_else(|error| {
                tracing::debug!(rank = self.world.rank(), peer, %error, "the peer's memory cannot be mapped");
                None
            })
        };
        Ok((0..).zip(offers).map(open).collect())
    }

    fn open_one(&self, offer: &Offer, descriptor: Option<OwnedFd>) -> Result<Option<PeerArena>> {
        let token = match (&offer.token, descriptor) {
            (Offered::Here(number), _) => return self.take_up(*number),
            (Offered::Descriptor, Some(descriptor)) => Token::Descriptor(descriptor),
            (Offered::Descriptor, None) => return Ok(None),
            (Offered::Handle(handle), _) => {
                Token::Handle(handle.as_slice().try_into().map_err(|_| Error::InvalidArgument {
                    argument: "a peer's handle",
                    value: format!("{} bytes", handle.len()),
                    accepted: "must be 64 bytes",
                })?)
            }
        };
        let exported = Exported { uuid: self.device.uuid(), len_bytes: offer.len_bytes, token };
        PeerArena::open(self.device, exported).map(Some)
    }

    fn take_up(&self, number: u64) -> Result<Option<PeerArena>> {
        let Some(arena) = OnOffer::take_up::<Arena>(number) else { return Ok(None) };
        if self.device.peer_access(arena.device())? == PeerAccess::None {
            return Ok(None);
        }
        PeerArena::of_this_process(self.device, &arena).map(Some)
    }
}
