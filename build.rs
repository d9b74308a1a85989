//! Puts the PTX of every `kernels/*.cu` into `OUT_DIR/ptx`, where `src/kernels.rs` reads it.
//!
//! ```text
//! nvcc of the pinned version found?   kernels/x.cu --nvcc--> text --normalize--> OUT_DIR/ptx/x.ptx
//! else                                kernels/ptx/x.ptx (committed)      --copy--> OUT_DIR/ptx/x.ptx
//! ```
//! Both ways give the same bytes, which CI checks: so nobody needs a CUDA toolkit, and a build does not depend on whether
//! there is one. `ANNULUS_UPDATE_PTX=1` also writes what nvcc made to `kernels/ptx`; it is how a changed kernel is
//! committed. nvcc is looked for in `NVCC`, `CUDA_HOME/bin`, `CUDA_PATH/bin` and `PATH`; `PATH` does not trigger a rebuild.

#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/ptx.rs"]
mod ptx;

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use nvcc::Nvcc;

fn main() {
    if let Err(error) = build() {
        // The line that cargo shows first; a panic would bury it in a backtrace hint.
        eprintln!("kernels: {error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    for path in ["build.rs", "build", "kernels"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "ANNULUS_UPDATE_PTX"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("ptx");
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let update = env::var_os("ANNULUS_UPDATE_PTX").is_some_and(|value| value == "1");
    let nvcc = match Nvcc::find() {
        Ok(nvcc) => Some(nvcc),
        Err(why) if update => return Err(format!("ANNULUS_UPDATE_PTX needs nvcc {}: {why}", nvcc::PINNED_VERSION)),
        Err(why) => {
            if env::var_os("NVCC").is_some() {
                println!("cargo:warning=NVCC is not used: {why}");
            }
            println!("kernels: committed PTX; {why}");
            None
        }
    };
    for source in ptx::sources(Path::new("kernels")).map_err(|error| format!("kernels: {error}"))? {
        let target = out.join(ptx::file_name(&source));
        let committed = Path::new("kernels/ptx").join(ptx::file_name(&source));
        let digest = ptx::digest(&source).map_err(|error| format!("{}: {error}", source.display()))?;
        let text = match &nvcc {
            Some(nvcc) => {
                println!("kernels: {} by {}", source.display(), nvcc.path.display());
                ptx::normalize(&nvcc.compile(&source, &target, &[])?, digest)?
            }
            None => read(&committed)?,
        };
        if nvcc.is_none() && ptx::digest_of(&text) != Some(digest) {
            println!(
                "cargo:warning={} was made from other sources than {}: rebuild with nvcc {} and ANNULUS_UPDATE_PTX=1",
                committed.display(),
                source.display(),
                nvcc::PINNED_VERSION
            );
        }
        write(&target, &text)?;
        if update {
            write(&committed, &text)?;
        }
    }
    match &nvcc {
        Some(nvcc) if update => update_mutants(nvcc, &out),
        _ => Ok(()),
    }
}

/// The variants of the collective that the tests must catch; see `kernels/mutant.cuh`.
fn update_mutants(nvcc: &Nvcc, out: &Path) -> Result<(), String> {
    let source = Path::new("kernels/collective.cu");
    let digest = ptx::digest(source).map_err(|error| format!("{}: {error}", source.display()))?;
    let text = nvcc.compile(source, &out.join("mutants.ptx"), &["-DMUTANTS"])?;
    write(Path::new("tests/vgpu/mutants/collective.ptx"), &ptx::normalize(&text, digest)?)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!(
            "{} is missing; install nvcc {} and build with ANNULUS_UPDATE_PTX=1",
            path.display(),
            nvcc::PINNED_VERSION
        ),
        _ => format!("{}: {error}", path.display()),
    })
}

/// Leaves a file that is right untouched, so that cargo sees no change.
fn write(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
