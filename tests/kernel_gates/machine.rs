//! Gates on the machine code that `ptxas` makes, as `nvdisasm` shows it. Where one of them is missing its gates are skipped, with a
//! line that says so; `ANNULUS_REQUIRE_GATES=1` makes that a failure, for machines that must have both (CI).

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use annulus::kernels;

use crate::flow::{Access, Instruction, loops};
use crate::hot::{check, count, hot_loops};
use crate::{KERNELS, is_collective};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// The architecture whose figures are told.
const TOLD: &str = "sm_90";

/// A program of the toolkit.
fn tool(name: &str) -> Option<PathBuf> {
    let in_home = |home: &str| env::var_os(home).map(|home| Path::new(&home).join("bin"));
    let beside_nvcc = env::var_os("NVCC").and_then(|nvcc| Path::new(&nvcc).parent().map(Path::to_owned));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [beside_nvcc, in_home("CUDA_HOME"), in_home("CUDA_PATH")].into_iter().flatten();
    folders.chain(env::split_paths(&path)).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// `tool`, or none where its gates may be skipped.
fn or_skip(tool: Option<PathBuf>, skipped: &str, is_required: bool) -> Option<PathBuf> {
    if tool.is_none() {
        assert!(!is_required, "ANNULUS_REQUIRE_GATES is set, and {skipped}");
        eprintln!("skipped: {skipped}");
    }
    tool
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
fn machine_code_spills_nothing_keeps_within_its_registers_and_moves_16_bytes() {
    let is_required = env::var_os("ANNULUS_REQUIRE_GATES").is_some_and(|value| value == "1");
    let nowhere = "in CUDA_HOME/bin, CUDA_PATH/bin, beside NVCC or in PATH";
    let Some(ptxas) = or_skip(tool("ptxas"), &format!("no ptxas {nowhere}"), is_required) else { return };
    let nvdisasm = or_skip(tool("nvdisasm"), &format!("instructions: no nvdisasm {nowhere}"), is_required);
    let folder = tempfile::tempdir().unwrap();
    println!("{TITLE}");
    for (name, text) in kernels::ALL {
        let source = folder.path().join(format!("{name}.ptx"));
        fs::write(&source, text).unwrap();
        for arch in ARCHITECTURES {
            let cubin = source.with_extension(arch);
            let report = output_of(Command::new(&ptxas).args(["-v", "-arch", arch, "-o"]).arg(&cubin).arg(&source));
            let registers = registers_of(&report, arch);
            assert_eq!(registers.len(), text.matches(".visible .entry").count(), "{name} on {arch}: {report}");
            let Some(nvdisasm) = &nvdisasm else { continue };
            let disassembly = output_of(Command::new(nvdisasm).arg("-c").arg(&cubin));
            let sections = sections_of(&disassembly);
            assert_eq!(sections.len(), registers.len(), "kernels of {name} on {arch}");
            for (kernel, section) in sections {
                check_instructions(kernel, section, arch);
                let code = parse(section);
                check(kernel, &code).unwrap_or_else(|missing| panic!("{arch}: {missing}"));
                if arch == TOLD {
                    println!("{}", row(kernel, registers[kernel], &code));
                }
            }
        }
    }
}

/// The registers of each kernel that `ptxas -v` tells of; none may have a stack or spill.
fn registers_of<'a>(report: &'a str, arch: &str) -> HashMap<&'a str, u32> {
    let mut kernel = "";
    let mut registers = HashMap::new();
    for line in report.lines() {
        if let Some(rest) = line.split("entry function '").nth(1) {
            kernel = rest.split('\'').next().unwrap_or("");
        } else if line.contains("bytes stack frame") {
            let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert_eq!(line.trim(), clean, "{kernel} on {arch}");
        } else if let Some(rest) = line.split("Used ").nth(1) {
            let used: u32 = rest.split(' ').next().unwrap().parse().unwrap();
            let most = KERNELS.iter().find(|known| known.name == kernel).unwrap().registers;
            assert!(used <= most, "{kernel} on {arch}: {used} registers, at most {most}");
            registers.insert(kernel, used);
        }
    }
    registers
}

/// The kernels of a module: name and text.
fn sections_of(disassembly: &str) -> Vec<(&str, &str)> {
    let sections = disassembly.split(".section\t.text.").skip(1);
    sections.map(|section| (section.split(',').next().unwrap_or(""), section)).collect()
}

fn check_instructions(kernel: &str, section: &str, arch: &str) {
    let has = |instruction: &str| section.contains(instruction);
    assert!(!has("LDL") && !has("STL"), "{kernel} on {arch} uses local memory");
    if is_collective(kernel) {
        // Loads that may be moved above a wait are marked CONSTANT.
        assert!(!section.lines().any(|line| line.contains("LDG") && line.contains("CONSTANT")), "{kernel} on {arch}");
        for needed in ["STG.E.STRONG.SYS", "LDG.E.STRONG.SYS", "MEMBAR.ALL.SYS"] {
            assert!(has(needed), "{kernel} on {arch} has no {needed}");
        }
    }
}

// ---- instructions ------------------------------------------------------------------------------------------------------

/// The instructions of a section. A subroutine (a division that is not for the fast path) is left out of the flow: it is
/// called, not jumped to, and comes back.
fn parse(section: &str) -> Vec<Instruction> {
    let mut labels = HashMap::new();
    let mut lines = Vec::new();
    for line in section.lines() {
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, lines.len());
        } else if let Some((_, instruction)) =
            line.trim_start().strip_prefix("/*").and_then(|rest| rest.split_once("*/"))
        {
            lines.push(instruction.trim());
        }
    }
    let instruction = |(at, line): (usize, &&str)| {
        let (guard, rest) = line.split_at(if line.starts_with('@') { line.find(' ').unwrap() } else { 0 });
        let (operation, operands) = rest.trim().split_once([' ', ';']).unwrap();
        let (targets, falls_through) = match operation.split('.').next().unwrap() {
            "BRA" => {
                // Another operand is a condition too: `BRA P1, `(.L_x_0)`, `BRA.DIV UR4, `(.L_x_1)`.
                let (condition, target) = operands.split_once("`(").unwrap();
                (vec![labels[target.split(')').next().unwrap()]], !condition.trim().is_empty())
            }
            "BRX" | "BRXU" => {
                let (_, targets) = operands.split_once("BRANCH_TARGETS ").expect("nvdisasm knows the targets");
                let targets = targets.split('"').next().unwrap().split(',');
                (targets.map(|target| labels[target.trim()]).collect(), false)
            }
            "EXIT" | "RET" => (Vec::new(), false),
            "JMP" | "JMX" | "JMXU" => panic!("the target of `{line}` is not read"),
            // BSYNC goes on behind itself: it stands before the label of its BSSY.
            _ => (Vec::new(), true),
        };
        let next = targets.into_iter().chain((falls_through || !guard.is_empty()).then_some(at + 1)).collect();
        Instruction { access: access(operation), next }
    };
    let mut code: Vec<_> = lines.iter().enumerate().map(instruction).collect();
    let end = code.len();
    code.iter_mut().for_each(|instruction| instruction.next.retain(|&next| next < end));
    code
}

/// `LDG.E.64.STRONG.SYS`: a load of 8 bytes. LD and ST take addresses of any space.
fn access(operation: &str) -> Option<Access> {
    let mut parts = operation.split('.');
    let is_store = match parts.next() {
        Some("LDG" | "LD") => false,
        Some("STG" | "ST") => true,
        _ => return None,
    };
    let bits = parts.find_map(|part| part.trim_start_matches(['U', 'S']).parse::<u32>().ok()).unwrap_or(32);
    Some(Access { is_store, bytes: bits / 8 })
}

const TITLE: &str = "\
| kernel (sm_90) | registers | instructions | loads | stores | hot loops | their loads | of 16 B | their stores | of 16 B |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|";

fn row(kernel: &str, registers: u32, code: &[Instruction]) -> String {
    let narrower = KERNELS.iter().find(|known| known.name == kernel).unwrap().narrower;
    let all: Vec<_> = code.iter().filter_map(|instruction| instruction.access).collect();
    let hot = hot_loops(code, narrower);
    let in_hot = hot.concat();
    let figures = [
        code.len(),
        count(&all, false, 0),
        count(&all, true, 0),
        hot.len(),
        count(&in_hot, false, 0),
        count(&in_hot, false, 16),
        count(&in_hot, true, 0),
        count(&in_hot, true, 16),
    ];
    let figures = figures.map(|figure| format!(" {figure} |")).concat();
    format!("| `{kernel}` | {registers} |{figures}")
}

const LOOPS: &str = "
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_4) ;
.L_x_1:
        /*0030*/               @P0 LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0040*/                   BSSY B0, `(.L_x_3) ;
        /*0050*/                   BRXU UR4 -0x60                         (*\"BRANCH_TARGETS .L_x_2,.L_x_3\"*);
.L_x_2:
        /*0060*/                   STG.E.64.STRONG.SYS desc[UR4][R2.64], R4 ;
        /*0070*/                   BSYNC B0 ;
.L_x_3:
        /*0080*/                   BRA P2, `(.L_x_1) ;
.L_x_4:
        /*0090*/               @P0 EXIT ;
        /*00a0*/                   BRA `(.L_x_0) ;
        /*00b0*/                   ST.E desc[UR4][R2.64], R4 ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
";

#[test]
fn the_loops_of_a_disassembly_are_found() {
    let code = parse(LOOPS);
    assert_eq!(loops(&code), [vec![1, 2, 9, 10], vec![3, 4, 5, 6, 7, 8]]);
    let accesses: Vec<_> = code.iter().filter_map(|instruction| instruction.access).collect();
    assert_eq!(accesses, [Access::load(2), Access::load(16), Access::store(8), Access::store(4)]);
    assert!(hot_loops(&code, &[]).is_empty());
    assert_eq!(hot_loops(&code, &[Access::store(8)]).len(), 1, "where the kernel is allowed it");
}

#[test]
fn a_missing_tool_is_a_failure_only_where_the_gates_are_required() {
    let tool = Some(PathBuf::from("ptxas"));
    assert_eq!(or_skip(tool.clone(), "no ptxas", true), tool);
    assert_eq!(or_skip(None, "no ptxas", false), None);
    let failure = std::panic::catch_unwind(|| or_skip(None, "no ptxas", true)).unwrap_err();
    assert_eq!(failure.downcast_ref::<String>().unwrap(), "ANNULUS_REQUIRE_GATES is set, and no ptxas");
}
