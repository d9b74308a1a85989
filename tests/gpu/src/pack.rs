//! The folder that goes to another machine: this program, in which is every check and every timing of a card, and a script that
//! runs it. There is nothing else to build or to copy: a part of the program takes the place of a test or bench binary, ranks
//! are the program itself, and the kernels are in it as PTX.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::Result;

/// Most that a pack may weigh.
const MOST_BYTES: u64 = 60 << 20;

const SCRIPT: &str = "#!/bin/sh
# Verifies and times annulus on this machine's NVIDIA GPU: annulus-gpu.json and annulus-gpu.md in this folder.
# --quick takes a minute instead of eight. Needs the driver (CUDA 12.2 or later) and glibc GLIBC or later.
# Uses compute-sanitizer and a python3 with PyTorch where they are.
cd \"$(dirname \"$0\")\" && exec ./annulus-gpu \"$@\"
";

/// What a folder was packed with.
#[derive(Debug)]
pub struct Packed {
    /// Size of program and script.
    pub bytes: u64,
    /// The oldest glibc that the program runs with.
    pub glibc: String,
}

/// Packs this very program, and says so.
///
/// # Errors
/// A debug build, which would time the wrong code; as [`pack_program`].
pub fn pack(folder: &Path) -> Result<()> {
    if cfg!(debug_assertions) {
        return Err("a debug build is not what should be timed: cargo run --release -p annulus-gpu -- pack".into());
    }
    let Packed { bytes, glibc } = pack_program(&std::env::current_exe()?, folder)?;
    let mib = bytes as f64 / (1 << 20) as f64;
    println!("{}: {mib:.1} MiB, glibc {glibc} or later; there: ./run.sh", folder.display());
    Ok(())
}

/// Copies `program`, without its symbols if `strip` is there, and a script into `folder`.
///
/// # Errors
/// The folder cannot be written; the pack is too large.
pub fn pack_program(program: &Path, folder: &Path) -> Result<Packed> {
    fs::create_dir_all(folder)?;
    let copy = folder.join("annulus-gpu");
    fs::copy(program, &copy)?;
    if !Command::new("strip").arg(&copy).status().is_ok_and(|status| status.success()) {
        eprintln!("strip is not there, or fails: the pack keeps its symbols");
    }
    let glibc = oldest_glibc(&fs::read(&copy)?).ok_or("the program names no version of glibc")?;
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT.replace("GLIBC", &glibc))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let bytes = fs::metadata(&copy)?.len() + fs::metadata(&script)?.len();
    if bytes > MOST_BYTES {
        return Err(format!("the pack has {bytes} bytes, at most {MOST_BYTES} are wanted").into());
    }
    Ok(Packed { bytes, glibc })
}

/// The newest version of glibc that a program's symbols ask for: the oldest that it runs with.
fn oldest_glibc(program: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"GLIBC_2.";
    let minor = |at: usize| -> Option<u32> {
        let digits = program[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&program[at..at + digits]).ok()?.parse().ok()
    };
    let starts = program.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK);
    let newest = starts.filter_map(|(at, _)| minor(at + MARK.len())).max()?;
    Some(format!("2.{newest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_symbol_decides() {
        assert_eq!(oldest_glibc(b"x\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.17\0GLIBC_PRIVATE").as_deref(), Some("2.34"));
        assert_eq!(oldest_glibc(b"static"), None);
    }
}
