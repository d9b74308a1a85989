//! What the kernels' code must have and must not have: gates on the PTX, which run anywhere, and on what `ptxas` makes of it,
//! where the toolkit is (`CUDA_HOME`, `CUDA_PATH`, beside `NVCC`, or `PATH`; CI installs it). Presence and upper bounds are
//! pinned, not counts: a compiler may do better.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use annulus::kernels;

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// Kernels that move tensors and the most registers that they may use; the bound keeps as many threads on a
/// multiprocessor of 65,536 registers as the kernel is launched with.
const BULK: [(&str, u32); 18] = [
    ("accumulate_tensors", 80),
    ("cast_tensors", 64),
    ("cast_stochastic", 64),
    ("clamp_tensors", 64),
    ("scale_tensors", 64),
    ("collective_f32", 128),
    ("collective_f16", 128),
    ("collective_bf16", 128),
    ("collective_f64", 128),
    ("collective_i32", 128),
    ("collective_i64", 128),
    ("collective_u8", 128),
    ("measure_norm", 96),
    ("measure_norm_p", 128),
    ("stage_tensors", 64),
    ("step_adamw", 96),
    ("step_sgd", 96),
    ("unscale_norm", 128),
];

/// Kernels of one block or one thread.
const SMALL: [(&str, u32); 3] = [("probe_peer", 32), ("store_words", 32), ("update_scaler", 32)];

fn is_collective(kernel: &str) -> bool {
    kernel.starts_with("collective_")
}

/// The text of every kernel of every module, by name.
fn entries() -> Vec<(String, String)> {
    let of_module = |(_, text): &(&str, &'static str)| {
        let entries = text.split(".visible .entry ").skip(1);
        entries.map(|entry| (entry.split('(').next().unwrap_or("").to_owned(), entry.to_owned())).collect::<Vec<_>>()
    };
    kernels::ALL.iter().flat_map(of_module).collect()
}

// ---- PTX ---------------------------------------------------------------------------------------------------------------

#[test]
fn the_gates_know_every_kernel() {
    let mut present: Vec<_> = entries().into_iter().map(|(name, _)| name).collect();
    let mut known: Vec<_> = BULK.iter().chain(&SMALL).map(|(name, _)| (*name).to_owned()).collect();
    present.sort();
    known.sort();
    assert_eq!(present, known);
}

#[test]
fn no_kernel_approximates_calls_spills_or_reads_past_the_memory_model() {
    for (kernel, text) in entries() {
        for (forbidden, why) in [
            (".approx", "results must have the bits of the host"),
            (".ftz", "denormals are values"),
            (".local", "an array in local memory, where registers were meant"),
            ("call", "everything is inlined"),
            ("ld.global.nc", "other kernels and peers write what is read; ptxas may move such a load above a wait"),
            ("trap", "a trap costs the context"),
        ] {
            assert!(!text.contains(forbidden), "{kernel} has `{forbidden}`: {why}");
        }
    }
}

#[test]
fn tensors_move_in_accesses_of_16_bytes() {
    for (kernel, text) in entries().iter().filter(|(kernel, _)| BULK.iter().any(|(bulk, _)| bulk == kernel)) {
        for access in ["ld.global.v4", "st.global.v4"] {
            // A norm writes nothing of the kind.
            let is_needed = access.starts_with("ld") || !kernel.starts_with("measure_norm");
            assert!(!is_needed || text.contains(access), "{kernel} has no {access}");
        }
    }
}

#[test]
fn collectives_post_and_wait_at_system_scope_with_a_deadline() {
    for (kernel, text) in entries().iter().filter(|(kernel, _)| is_collective(kernel) || kernel == "probe_peer") {
        for needed in ["st.release.sys.global.u32", "ld.acquire.sys.global.u32", "%globaltimer", "ld.relaxed.sys"] {
            assert!(text.contains(needed), "{kernel} has no {needed}");
        }
        for line in text.lines().filter(|line| line.contains(".release") || line.contains(".acquire")) {
            assert!(line.contains(".sys."), "{kernel} orders less than the system: {line}");
        }
        // Remote atomics are not used: PCIe peers may lack them.
        let remote = |line: &&str| line.contains("atom.") || line.contains("red.");
        for line in text.lines().filter(remote) {
            assert!(line.contains(".gpu.") || line.contains(".shared."), "{kernel} has a remote atomic: {line}");
        }
    }
    for (kernel, text) in entries().iter().filter(|(kernel, _)| is_collective(kernel)) {
        for needed in ["atom.acq_rel.gpu.global.inc", "st.relaxed.sys.global.u64", "ld.relaxed.sys.global.u64"] {
            assert!(text.contains(needed), "{kernel} has no {needed}");
        }
    }
}

#[test]
fn only_one_file_names_memory_orders() {
    for entry in fs::read_dir("kernels").unwrap() {
        let path = entry.unwrap().path();
        let is_source = path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh");
        if !is_source || path.ends_with("signal.cuh") {
            continue;
        }
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            for order in ["acquire", "release.", "acq_rel", "relaxed.", "membar", "fence", "memory_order"] {
                assert!(!code.contains(order), "{}:{}: {order} outside signal.cuh", path.display(), number + 1);
            }
        }
    }
}

// ---- SASS --------------------------------------------------------------------------------------------------------------

/// A program of the toolkit.
fn tool(name: &str) -> Option<PathBuf> {
    let in_home = |home: &str| env::var_os(home).map(|home| Path::new(&home).join("bin"));
    let beside_nvcc = env::var_os("NVCC").and_then(|nvcc| Path::new(&nvcc).parent().map(Path::to_owned));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [beside_nvcc, in_home("CUDA_HOME"), in_home("CUDA_PATH")].into_iter().flatten();
    folders.chain(env::split_paths(&path)).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Runs a tool; what it printed on both outputs.
fn output_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// Prints the machine code of every kernel in figures (`--nocapture`): those of BENCHMARKS.md.
#[test]
fn machine_code_spills_nothing_and_keeps_within_its_registers() {
    let Some(ptxas) = tool("ptxas") else {
        eprintln!("skipped: no ptxas in CUDA_HOME/bin, CUDA_PATH/bin, beside NVCC or in PATH");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    println!("| kernel ({TOLD}) | registers | instructions | loads | of 16 B | stores | of 16 B |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for (name, text) in kernels::ALL {
        let source = folder.path().join(format!("{name}.ptx"));
        fs::write(&source, text).unwrap();
        for arch in ARCHITECTURES {
            let cubin = source.with_extension(arch);
            let report = output_of(Command::new(&ptxas).args(["-v", "-arch", arch, "-o"]).arg(&cubin).arg(&source));
            let mut kernel = "";
            let mut measured = HashMap::new();
            for line in report.lines() {
                if let Some(rest) = line.split("entry function '").nth(1) {
                    kernel = rest.split('\'').next().unwrap_or("");
                } else if line.contains("bytes stack frame") {
                    let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
                    assert_eq!(line.trim(), clean, "{kernel} on {arch}");
                } else if let Some(rest) = line.split("Used ").nth(1) {
                    let registers: u32 = rest.split(' ').next().unwrap().parse().unwrap();
                    let bound = BULK.iter().chain(&SMALL).find(|(known, _)| *known == kernel).unwrap().1;
                    assert!(registers <= bound, "{kernel} on {arch}: {registers} registers, at most {bound}");
                    measured.insert(kernel, registers);
                }
            }
            assert_eq!(measured.len(), text.matches(".visible .entry").count(), "{name} on {arch}: {report}");
            if let Some(nvdisasm) = tool("nvdisasm") {
                let disassembly = output_of(Command::new(nvdisasm).arg("-c").arg(&cubin));
                assert_eq!(check_instructions(&disassembly, arch), measured.len(), "kernels of {name} on {arch}");
                if arch == TOLD {
                    tell(&disassembly, &measured);
                }
            } else {
                eprintln!("instructions of {name} on {arch} not checked: no nvdisasm beside ptxas or in PATH");
            }
        }
    }
}

/// The kernels of a module as `nvdisasm` shows them: name and text.
fn kernels_of(disassembly: &str) -> impl Iterator<Item = (&str, &str)> + Clone {
    let sections = disassembly.split(".section\t.text.").skip(1);
    sections.map(|section| (section.split(',').next().unwrap_or(""), section))
}

/// The architecture whose figures are told.
const TOLD: &str = "sm_90";

fn tell(disassembly: &str, registers: &HashMap<&str, u32>) {
    for (kernel, section) in kernels_of(disassembly) {
        let code = section.lines().filter(|line| line.trim_start().starts_with("/*")).map(str::trim_end);
        let code: Vec<&str> = code.filter(|line| line.contains(';')).collect();
        let count = |instruction: &str| code.iter().filter(|line| line.contains(instruction)).count();
        let [loads, loads_128, stores, stores_128] = ["LDG.", "LDG.E.128", "STG.", "STG.E.128"].map(count);
        let registers = registers.get(kernel).copied().unwrap_or(0);
        println!("| `{kernel}` | {registers} | {} | {loads} | {loads_128} | {stores} | {stores_128} |", code.len());
    }
}

/// Checks what `nvdisasm` shows of one module; the number of its kernels.
fn check_instructions(disassembly: &str, arch: &str) -> usize {
    let sections = kernels_of(disassembly);
    sections.clone().for_each(|(kernel, section)| {
        let has = |instruction: &str| section.contains(instruction);
        assert!(!has("LDL") && !has("STL"), "{kernel} on {arch} uses local memory");
        if is_collective(kernel) {
            // Loads that may be moved above a wait are marked CONSTANT.
            assert!(
                !section.lines().any(|line| line.contains("LDG") && line.contains("CONSTANT")),
                "{kernel} on {arch}"
            );
            for needed in ["LDG.E.128", "STG.E.128", "STG.E.STRONG.SYS", "LDG.E.STRONG.SYS", "MEMBAR.ALL.SYS"] {
                assert!(has(needed), "{kernel} on {arch} has no {needed}");
            }
        }
    });
    sections.count()
}
