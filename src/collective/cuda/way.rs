//! Who makes ranks that share a device progress together: chosen once, from where the ranks are.
//!
//! A kernel that waits for another one only ends if both run at the same time. CUDA promises that of kernels on devices of
//! their own and of the blocks of one cooperative grid, and of nothing else on one device: streams of a process may share a
//! hardware queue, and processes take turns.

use serde::{Deserialize, Serialize};

use super::geometry::Geometry;
use crate::abi::collective::MAX_RANKS_IN_GRID;
use crate::device::cuda::Uuid;
use crate::error::{Error, Result};

/// How the kernels of an operation come to run together.
///
/// # Several communicators
/// Kernels of different communicators may run at the same time, and in a different order on each device. Where they wait for
/// peers ([`Persistent`](Way::Persistent), [`Cooperative`](Way::Cooperative)), those of all communicators alive in a process
/// therefore fit on a device together: a communicator takes at most half of the blocks that the others have left, and one for
/// which none is left is refused on every rank, [`Error::InvalidArgument`]. The rest is up to the caller: **every rank issues
/// the operations of all its communicators in the same order**. Streams of a process may share a hardware queue
/// (`CUDA_DEVICE_MAX_CONNECTIONS`), where one operation waits for whatever was issued before it; in different orders, two ranks
/// can wait for each other until the deadline. So can ranks that have kernels of their own in between which never end, or
/// wait for an operation that was issued behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Way {
    /// Every rank has a device of its own and one kernel for the whole operation, which waits for the peers.
    Persistent,
    /// Ranks are threads of one process. Those on one device, at most 8, are one cooperative grid: whoever issues an
    /// operation waits on the host until the others on its device have issued it, too.
    Cooperative,
    /// A kernel for each step of the schedule, which begins when the stream has seen that the peers have done their parts; no
    /// kernel waits. For processes that share a device. Slower: a launch and some stream waits per step. Not for threads of
    /// one process on one device, unless it has as many hardware queues as they have streams (`CUDA_DEVICE_MAX_CONNECTIONS`):
    /// one rank's wait may hold back the kernel of another that it waits for, until the deadline.
    Stepped,
}

/// What a rank says of itself.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) uuid: [u8; 16],
    pub(super) channels: u32,
    /// Blocks of a collective that the device holds at a time, and how many of them other communicators have set aside.
    pub(super) resident_blocks: u32,
    pub(super) taken_blocks: u32,
    /// Whether its streams wait for memory.
    pub(super) orders_by_memory: bool,
    /// What the user asks for.
    pub(super) way: Option<Way>,
}

/// Where the ranks are, and what follows from it. The same on every rank.
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) way: Way,
    devices: Vec<Uuid>,
}

impl Layout {
    /// The layout of ranks that have said `hellos`, with channels for which there is room on every device.
    pub(super) fn new(hellos: &[Hello], is_one_process: bool, geometry: Geometry) -> Result<Layout> {
        let devices: Vec<Uuid> = hellos.iter().map(|hello| Uuid(hello.uuid)).collect();
        let mut layout = Layout { geometry, way: Way::Persistent, devices };
        layout.way = layout.choose(hellos, is_one_process)?;
        let mut channels = u32::MAX;
        for (rank, hello) in (0..).zip(hellos) {
            channels = channels.min(hello.channels).min(layout.room(rank, hello)?);
        }
        layout.geometry = geometry.with_channels(channels.max(1));
        Ok(layout)
    }

    /// Whether the kernels of an operation wait for each other.
    pub(super) fn kernels_wait(&self) -> bool {
        self.way != Way::Stepped && self.devices.len() > 1
    }

    /// Channels for which there is room on the device of `rank`, beside other communicators and leaving half for those to come.
    fn room(&self, rank: u32, hello: &Hello) -> Result<u32> {
        let Hello { resident_blocks, taken_blocks, .. } = *hello;
        let grid_ranks = if self.way == Way::Cooperative { self.on_device_of(rank).count() } else { 1 };
        if grid_ranks > MAX_RANKS_IN_GRID {
            return Err(Error::InvalidArgument {
                argument: "ranks of one process on a device",
                value: format!("{grid_ranks} on {}", Uuid(hello.uuid)),
                accepted: "must be at most 8",
            });
        }
        if !self.kernels_wait() {
            return Ok(resident_blocks);
        }
        let (grid_ranks, free) = (grid_ranks as u32, resident_blocks.saturating_sub(taken_blocks));
        if free < grid_ranks {
            return Err(Error::InvalidArgument {
                argument: "communicators alive on a device",
                value: format!(
                    "{taken_blocks} of the {resident_blocks} blocks that {} holds at a time are theirs",
                    Uuid(hello.uuid)
                ),
                accepted: "must leave one for each rank of another: their kernels wait for each other and must fit together",
            });
        }
        Ok((free / 2 / grid_ranks).max(1))
    }

    /// Refuses steps where a device cannot do what they are made of.
    fn check_steps(hellos: &[Hello]) -> Result<Way> {
        let Some((rank, without)) = (0..).zip(hellos).find(|(_, hello)| !hello.orders_by_memory) else {
            return Ok(Way::Stepped);
        };
        let rank: u32 = rank;
        Err(Error::InvalidArgument {
            argument: "way",
            value: format!(
                "stepped, and of {}, rank {rank}'s device, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS is 0",
                Uuid(without.uuid)
            ),
            accepted: "streams of every device must be able to wait for words of memory; without that, ranks that are \
                       processes must not share a device",
        })
    }

    fn choose(&self, hellos: &[Hello], is_one_process: bool) -> Result<Way> {
        let ranks = 0..hellos.len() as u32;
        let shared = ranks.clone().find(|rank| self.leader(*rank) != *rank);
        let wanted = hellos.first().and_then(|hello| hello.way);
        let refuse = |value: String, accepted| Err(Error::InvalidArgument { argument: "way", value, accepted });
        if hellos.iter().any(|hello| hello.way != wanted) {
            return refuse("not the same on every rank".to_owned(), "every rank must pass the same options");
        }
        match (wanted, shared) {
            _ if hellos.len() == 1 => Ok(Way::Persistent),
            (Some(Way::Persistent), Some(rank)) => refuse(
                format!("persistent, and ranks {} and {rank} share a device", self.leader(rank)),
                "every rank must have a device of its own",
            ),
            (Some(Way::Cooperative), _) if !is_one_process => {
                refuse("cooperative".to_owned(), "ranks must be threads of one process")
            }
            (Some(Way::Stepped), _) => Layout::check_steps(hellos),
            (Some(way), _) => Ok(way),
            (None, None) => Ok(Way::Persistent),
            (None, Some(_)) if is_one_process => Ok(Way::Cooperative),
            (None, Some(_)) => Layout::check_steps(hellos),
        }
    }

    /// The ranks on the device of `rank`, in order.
    pub(super) fn on_device_of(&self, rank: u32) -> impl Iterator<Item = u32> {
        let device = self.devices.get(rank as usize);
        (0..).zip(&self.devices).filter(move |(_, other)| Some(*other) == device).map(|(other, _)| other)
    }

    /// The first rank on the device of `rank`, which tries links for all of them.
    pub(super) fn leader(&self, rank: u32) -> u32 {
        self.on_device_of(rank).next().unwrap_or(rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hellos(devices: &[u8], resident_blocks: u32, way: Option<Way>) -> Vec<Hello> {
        let hello = |device: &u8| Hello {
            uuid: [*device; 16],
            channels: 32,
            resident_blocks,
            taken_blocks: 0,
            orders_by_memory: true,
            way,
        };
        devices.iter().map(hello).collect()
    }

    fn layout(devices: &[u8], way: Option<Way>, is_one_process: bool) -> Result<Layout> {
        Layout::new(&hellos(devices, 132, way), is_one_process, Geometry::on_device(132, None))
    }

    #[test]
    fn the_way_follows_from_the_devices() {
        for (devices, is_one_process, way, channels) in [
            (&[1, 2, 3][..], true, Way::Persistent, 32),
            (&[1, 2, 3], false, Way::Persistent, 32),
            (&[1, 2, 1], true, Way::Cooperative, 32),
            (&[1; 8], true, Way::Cooperative, 8),
            (&[1, 2, 1], false, Way::Stepped, 32),
        ] {
            let found = layout(devices, None, is_one_process).unwrap();
            assert_eq!((found.way, found.geometry.channels), (way, channels), "{devices:?}");
        }
        let leaders: Vec<u32> = (0..4).map(|rank| layout(&[7, 9, 9, 7], None, true).unwrap().leader(rank)).collect();
        assert_eq!(leaders, [0, 1, 1, 0]);
    }

    /// Ten communicators of 132 multiprocessors, each of which holds one block.
    #[test]
    fn all_communicators_of_a_device_fit_together() {
        let mut hellos = hellos(&[1, 2], 132, None);
        let mut channels = Vec::new();
        let refused = loop {
            match Layout::new(&hellos, true, Geometry::on_device(132, None)) {
                Ok(layout) => {
                    channels.push(layout.geometry.channels);
                    hellos[1].taken_blocks += layout.geometry.channels;
                }
                Err(refused) => break refused.to_string(),
            }
        };
        assert_eq!(channels, [32, 32, 32, 18, 9, 4, 2, 1, 1, 1]);
        assert!(refused.contains("132 of the 132 blocks") && refused.contains("GPU-02020202"), "{refused}");
        let steps =
            Layout::new(&[Hello { way: Some(Way::Stepped), ..hellos[1] }; 2], true, Geometry::on_device(132, None));
        assert_eq!(steps.unwrap().geometry.channels, 32, "kernels of steps do not wait");
    }

    #[test]
    fn steps_need_streams_that_wait_for_memory() {
        for (devices, is_one_process, way) in
            [(&[1, 1][..], false, None), (&[1, 2], true, Some(Way::Stepped)), (&[1, 2], true, None)]
        {
            let mut hellos = hellos(devices, 132, way);
            hellos[1].orders_by_memory = false;
            let layout = Layout::new(&hellos, is_one_process, Geometry::on_device(132, None));
            assert_eq!(layout.is_ok(), way.is_none() && is_one_process, "{devices:?} {way:?}");
            let told = layout.err().map_or_else(String::new, |error| error.to_string());
            assert!(told.is_empty() || told.contains("rank 1's device, CU_DEVICE_ATTRIBUTE"), "{told}");
        }
    }

    #[test]
    fn what_cannot_progress_is_refused() {
        assert!(layout(&[1, 1], Some(Way::Persistent), true).is_err());
        assert!(layout(&[1, 2], Some(Way::Cooperative), false).is_err());
        assert!(layout(&[1; 9], None, true).is_err());
        assert!(layout(&[1; 9], None, false).is_ok());
        assert!(Layout::new(&hellos(&[1; 3], 2, None), true, Geometry::on_device(132, None)).is_err());
        let mut differing = hellos(&[1, 2], 132, None);
        differing[1].way = Some(Way::Stepped);
        assert!(Layout::new(&differing, true, Geometry::on_device(132, None)).is_err());
    }
}
