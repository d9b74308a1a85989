//! The trial that every pair of devices passes before a collective trusts their link, between two areas of one device: one side
//! after the other, as nothing promises that two kernels run at the same time.

use std::time::Duration;

use annulus::device::cuda::{Arena, Link, PeerArena, ProbeArea, Sharing};

use crate::Result;
use crate::record::Tally;
use crate::site::{PATIENCE, Site};

/// The first side finds nobody, the second what the first has left.
pub fn compare(tally: &mut Tally) -> Result<()> {
    let site = Site::open()?;
    let arena = Arena::new(&site.device, 2 * ProbeArea::LEN_BYTES, Sharing::Handle)?;
    let peer = PeerArena::of_this_process(&site.device, &arena)?;
    let mut first = ProbeArea::new(&arena)?;
    let mut second = ProbeArea::new(&arena)?;
    let offsets = [&first, &second].map(ProbeArea::offset_bytes);
    let mut side = |is_first: bool, ranks: (u32, u32)| -> Result<Link> {
        let (area, theirs) = if is_first { (&mut first, offsets[1]) } else { (&mut second, offsets[0]) };
        let patience = if is_first { Duration::from_millis(50) } else { PATIENCE };
        area.start(&site.kernels, &site.stream, &peer, theirs, ranks, patience)?;
        Ok(area.finish(&site.stream)?)
    };
    for _ in 0..2 {
        expect(side(true, (3, 4))?, "silence", |link| matches!(link, Link::Silent { .. }))?;
        expect(side(false, (4, 3))?, "a sound link", |link| link == Link::Sound)?;
        tally.agreed();
    }
    expect(side(true, (3, 4))?, "silence", |link| matches!(link, Link::Silent { .. }))?;
    // Words of rank 3, where those of rank 5 should be: hardly one is right by chance.
    let is_corrupt = |link| matches!(link, Link::Corrupt { wrong_words, of_words } if wrong_words > of_words / 10 * 9);
    expect(side(false, (4, 5))?, "a corrupt link", is_corrupt)?;
    tally.agreed();
    Ok(())
}

fn expect(link: Link, what: &str, is_it: impl Fn(Link) -> bool) -> Result<()> {
    if is_it(link) { Ok(()) } else { Err(format!("{link:?} instead of {what}").into()) }
}
