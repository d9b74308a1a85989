//! PTX as text: what nvcc writes, less all that depends on the machine or asks for a newer driver than the code needs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::nvcc::{FLAGS, PINNED_VERSION};

/// The PTX ISA that drivers of CUDA 12.2 read (PTX ISA 9.0, release notes). nvcc 13.0 writes 9.0, which they refuse
/// whatever the instructions are; CI assembles the result with the ptxas of 12.2, so nothing newer is in it.
pub const ISA_VERSION: &str = "8.2";

/// What nvcc 13.0 calls its ISA.
const NVCC_ISA_VERSION: &str = "9.0";

/// The `.cu` files of `folder`, sorted.
pub fn sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<BTreeSet<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "cu")).collect())
}

/// `x.ptx` for `kernels/x.cu`.
pub fn file_name(source: &Path) -> PathBuf {
    source.with_extension("ptx").file_name().map(PathBuf::from).unwrap_or_default()
}

/// A number that changes with `source`, the headers beside it that it includes, and how it is compiled (FNV-1a, 64 bits).
pub fn digest(source: &Path) -> io::Result<u64> {
    let mut files = BTreeSet::new();
    include(source, &mut files)?;
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            digest = (digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    for file in &files {
        eat(&fs::read(file)?);
    }
    FLAGS.iter().chain([&PINNED_VERSION, &ISA_VERSION]).for_each(|word| eat(word.as_bytes()));
    Ok(digest)
}

/// Adds `file` and what it includes by `#include "name"` (not by `<name>`, which is the toolkit's).
fn include(file: &Path, files: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    if !files.insert(file.to_owned()) {
        return Ok(());
    }
    for line in fs::read_to_string(file)?.lines() {
        if let Some(name) = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) {
            include(&file.with_file_name(name), files)?;
        }
    }
    Ok(())
}

/// The digest in the first line of normalized text.
pub fn digest_of(text: &str) -> Option<u64> {
    let word = text.lines().next()?.rsplit(' ').next()?;
    u64::from_str_radix(word, 16).ok()
}

/// Makes nvcc's text the same on every machine, and readable by older drivers:
/// - `.version` is lowered, and the pragma that 12.2 does not know is left out (it tells `ptxas` about unused bytes);
/// - `.file` keeps no folder of the machine;
/// - `.loc` keeps file, line and column, not the chain of inlined calls, whose names hold a hash of the path;
/// - names of internal linkage (a static function's shared variable) lose the hash of the source's path;
/// - comments and empty lines go.
pub fn normalize(text: &str, digest: u64) -> Result<String, String> {
    let version = format!(".version {NVCC_ISA_VERSION}");
    if !text.lines().any(|line| line == version) {
        return Err(format!("nvcc {PINNED_VERSION} was expected to write `{version}`"));
    }
    let mut lines = vec![format!("// nvcc {PINNED_VERSION}, lowered to PTX ISA {ISA_VERSION}; sources {digest:016x}")];
    let mut text = text.lines();
    while let Some(line) = text.next() {
        let line = line.trim_end();
        let words = line.trim_start();
        if words.is_empty() || words.starts_with("//") || words.starts_with(".pragma \"used_bytes_mask") {
            continue;
        }
        if words.starts_with(".section") {
            // `.debug_str`, which only the chains of inlined calls use.
            text.by_ref().find(|line| line.trim() == "}");
            continue;
        }
        let line = match words {
            words if words == version => format!(".version {ISA_VERSION}"),
            words if words.starts_with(".loc") => {
                // Of several in a row the last one holds.
                lines.pop_if(|last| last.trim_start().starts_with(".loc"));
                line.split(',').next().unwrap_or(line).to_owned()
            }
            words if words.starts_with(".file") => file_without_folder(words),
            _ => without_path_hash(line),
        };
        lines.push(line);
    }
    Ok(lines.join("\n") + "\n")
}

/// `.file 1 "/home/me/annulus/kernels/norm.cu"` to `.file 1 "kernels/norm.cu"`, and of the toolkit's headers the name.
fn file_without_folder(directive: &str) -> String {
    let mut parts = directive.splitn(3, '"');
    let (Some(head), Some(path)) = (parts.next(), parts.next()) else { return directive.to_owned() };
    let name = path.rsplit('/').next().unwrap_or(path);
    let folder = if path.ends_with(&format!("kernels/{name}")) { "kernels/" } else { "" };
    format!("{head}\"{folder}{name}\"")
}

/// `_ZZN40_INTERNAL_462b1c02_7_norm_cu_742797163sumEvE4sums` with zeros for the two hashes.
fn without_path_hash(line: &str) -> String {
    let mut line = line.to_owned();
    let mut from = 0;
    while let Some(at) = line[from..].find("_INTERNAL_").map(|at| from + at + "_INTERNAL_".len()) {
        from = at;
        for begin in [Some(at), line[at..].find("_cu_").map(|name| at + name + "_cu_".len())].into_iter().flatten() {
            let hash = begin..begin + 8;
            if line.get(hash.clone()).is_some_and(|hash| hash.bytes().all(|byte| byte.is_ascii_hexdigit())) {
                line.replace_range(hash, "00000000");
            }
        }
    }
    line
}
