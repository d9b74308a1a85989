//! What launches did, for who compares it with the least there is: a line each in the file that `ANNULUS_VGPU_TALLY` names.

use std::fs::OpenOptions;
use std::io::Write;

use annulus_vgpu::Report;

use crate::settings::SETTINGS;

/// Writes down a launch that has ended: kernel, instructions, bytes loaded, bytes stored.
pub(crate) fn add(kernel: &str, report: &Report) {
    let Some(path) = &SETTINGS.tally else { return };
    let Report { instructions, loaded_bytes, stored_bytes, .. } = report;
    let line = format!("{kernel} {instructions} {loaded_bytes} {stored_bytes}\n");
    let written =
        OpenOptions::new().create(true).append(true).open(path).and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        // A tally with a hole would be believed.
        eprintln!("virtual GPU: ANNULUS_VGPU_TALLY={}: {error}", path.display());
        std::process::abort();
    }
}
