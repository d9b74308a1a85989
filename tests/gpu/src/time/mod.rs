//! How long operations take on the device, beside the time in which the same card copies as many bytes.

mod bare;
pub mod cases;
mod host_cost;
pub mod model;
mod step;
mod stopwatch;
mod trainer;

pub use bare::Bare;
pub use host_cost::{BUCKETS, alone, host_cost};
pub use step::Step;
pub use stopwatch::{Spread, Stopwatch};
pub use trainer::Trainer;

use crate::Result;
use crate::part::Scale;
use crate::record::{Record, Timing, check, figure, say};
use crate::site::Site;
use cases::CASES;

/// Times every case over the tensors of a real model.
///
/// # Errors
/// What keeps the device from being used.
pub fn operations(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    let lens = model::that_fits(&site.device, scale)?;
    let len_elems: usize = lens.iter().sum();
    figure("elements of the model's tensors", len_elems as f64, &format!("in {} tensors", lens.len()));
    let stopwatch = Stopwatch::new(&site, if scale == Scale::Full { 21 } else { 7 })?;
    figure("copy within the card", stopwatch.copy_gb_s(), "GB/s, read and written");
    for case in CASES {
        let timed = (case.prepare)(&site, &lens).and_then(|mut work| {
            let bytes = case.bytes_per_elem * len_elems as u64;
            let Spread { median, least, most } = stopwatch.time(bytes, || work(&site.stream))?;
            say(&Record::Timing(Timing {
                what: case.what.to_owned(),
                bytes,
                us: median,
                range_us: [least, most],
                limit_us: stopwatch.limit_us(bytes),
                goal: case.goal(),
            }));
            Ok(())
        });
        if let Err(error) = timed {
            check(case.what, std::time::Duration::ZERO, |_| Err(error));
        }
    }
    Ok(())
}
