//! What was asked of the driver, for who counts: in the file that `ANNULUS_VGPU_CALLS` names a line for each call, and in that
//! of `ANNULUS_VGPU_TALLY` one for each launch, for who compares what it did with the least there is.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use annulus_vgpu::Report;

use crate::settings::SETTINGS;

/// Writes down a launch that has ended: kernel, instructions, bytes loaded, bytes stored, transactions that load, that store.
pub(crate) fn add(kernel: &str, report: &Report) {
    let Some(path) = &SETTINGS.tally else { return };
    let Report { instructions, loaded_bytes, stored_bytes, loaded_sectors, stored_sectors } = report;
    let line = format!("{kernel} {instructions} {loaded_bytes} {stored_bytes} {loaded_sectors} {stored_sectors}\n");
    append(path, &line);
}

/// Writes down a call of the function `name`.
pub(crate) fn note_call(name: &str) {
    let Some(path) = &SETTINGS.calls else { return };
    append(path, &format!("{name}\n"));
}

fn append(path: &Path, line: &str) {
    let file = OpenOptions::new().create(true).append(true).open(path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        // A tally with a hole would be believed.
        eprintln!("virtual GPU: {}: {error}", path.display());
        std::process::abort();
    }
}
