//! Finding nvcc and calling it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only version that is used: another one writes other text, and the committed PTX must not depend on the machine.
pub const PINNED_VERSION: &str = "13.0.88";

/// A virtual architecture, never the build machine's GPU: drivers compile it for any card from Ampere on. Contraction is
/// off because host and device compute the same bits; source lines are for the virtual GPU, the sanitizer and profilers.
pub const FLAGS: [&str; 7] =
    ["--ptx", "-arch=compute_80", "-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Werror=all-warnings"];

/// An nvcc of the pinned version.
pub struct Nvcc {
    pub path: PathBuf,
}

impl Nvcc {
    /// The first of `NVCC`, `CUDA_HOME`, `CUDA_PATH` and `PATH` that has the pinned version; else why there is none.
    pub fn find() -> Result<Nvcc, String> {
        let in_toolkit = |name: &str| env::var_os(name).map(|home| Path::new(&home).join("bin/nvcc"));
        let path = env::var_os("PATH").unwrap_or_default();
        let candidates = [env::var_os("NVCC").map(PathBuf::from), in_toolkit("CUDA_HOME"), in_toolkit("CUDA_PATH")]
            .into_iter()
            .flatten()
            .chain(env::split_paths(&path).map(|folder| folder.join("nvcc")).filter(|nvcc| nvcc.is_file()));
        let mut refused = Vec::new();
        for path in candidates {
            match version(&path) {
                Ok(version) if version == PINNED_VERSION => return Ok(Nvcc { path }),
                Ok(version) => refused.push(format!("{} is {version}, not {PINNED_VERSION}", path.display())),
                Err(why) => refused.push(why),
            }
        }
        Err(if refused.is_empty() { "no nvcc was found".to_owned() } else { refused.join("; ") })
    }

    /// Compiles `source` to PTX text, by way of `target`.
    pub fn compile(&self, source: &Path, target: &Path, definitions: &[&str]) -> Result<String, String> {
        let mut command = Command::new(&self.path);
        command.args(FLAGS).args(definitions).arg("-o").arg(target).arg(source);
        let output = command.output().map_err(|error| format!("{}: {error}", self.path.display()))?;
        if !output.status.success() {
            return Err(format!("{command:?} failed\n{}", String::from_utf8_lossy(&output.stderr)));
        }
        std::fs::read_to_string(target).map_err(|error| format!("{}: {error}", target.display()))
    }
}

/// `13.0.88` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(nvcc: &Path) -> Result<String, String> {
    let output =
        Command::new(nvcc).arg("--version").output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('V').filter(|v| v.contains('.')));
    version.map(str::to_owned).ok_or_else(|| format!("{} --version names no version", nvcc.display()))
}
