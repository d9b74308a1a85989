//! Puts this whole test program where the virtual driver is: before its main function it runs itself again with the library
//! of this package as libcuda.so, because the loader reads its search path only once, at the start.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Set in the program that has the driver: the folder that holds it.
const INSIDE: &str = "ANNULUS_VGPU_INSIDE";

#[used]
#[unsafe(link_section = ".init_array")]
static ENTER: extern "C" fn() = enter;

extern "C" fn enter() {
    if std::env::var_os(INSIDE).is_some() {
        return;
    }
    // Rust's own arguments may not be there yet.
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).filter(|argument| !argument.is_empty()).collect();
    let failed = match folder() {
        Ok(folder) => Command::new("/proc/self/exe")
            .args(arguments.iter().skip(1).map(|argument| String::from_utf8_lossy(argument).into_owned()))
            .env("LD_LIBRARY_PATH", &folder)
            .env("ANNULUS_VGPU_DEVICES", "4")
            .env(INSIDE, folder)
            .exec(),
        Err(error) => error,
    };
    eprintln!("cannot run on virtual GPUs: {failed}");
    std::process::exit(1);
}

/// A folder with the driver under the name of the real one, beside this executable.
fn folder() -> std::io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let name = "libannulus_vgpu_driver.so";
    let library = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    let library = library.ok_or_else(|| std::io::Error::other("the package's library was not built"))?;
    let folder = own.with_extension("driver");
    std::fs::create_dir_all(&folder)?;
    match std::os::unix::fs::symlink(library, folder.join("libcuda.so")) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(folder),
    }
}
