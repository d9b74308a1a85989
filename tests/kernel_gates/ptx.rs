//! Gates on the PTX.

use std::collections::HashMap;
use std::fs;

use annulus::kernels;

use crate::flow::{Access, Instruction, loops};
use crate::hot::{check, hot_loops};
use crate::{KERNELS, is_collective};

/// The text of every kernel of every module, by name.
fn entries() -> Vec<(String, String)> {
    let of_module = |(_, text): &(&str, &'static str)| {
        let entries = text.split(".visible .entry ").skip(1);
        entries.map(|entry| (entry.split('(').next().unwrap_or("").to_owned(), entry.to_owned())).collect::<Vec<_>>()
    };
    kernels::ALL.iter().flat_map(of_module).collect()
}

/// The instructions of a kernel's text.
fn parse(text: &str) -> Vec<Instruction> {
    let mut labels = HashMap::new();
    let mut lines = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, lines.len());
        } else if line.ends_with(';') && !line.starts_with('.') {
            lines.push(line);
        }
    }
    let instruction = |(at, line): (usize, &&str)| {
        let is_guarded = line.starts_with('@');
        let words: Vec<&str> = line.trim_end_matches(';').split_whitespace().skip(usize::from(is_guarded)).collect();
        let target = match words[0].split('.').next() {
            Some("bra") => Some(labels[words[1]]),
            Some("brx") => panic!("the targets of `{line}` are not read"),
            _ => None,
        };
        let falls_through = is_guarded || !["bra", "bra.uni", "ret", "exit"].contains(&words[0]);
        let next = target.into_iter().chain(falls_through.then_some(at + 1)).collect();
        Instruction { access: access(words[0]), next }
    };
    let mut code: Vec<_> = lines.iter().enumerate().map(instruction).collect();
    let end = code.len();
    code.iter_mut().for_each(|instruction| instruction.next.retain(|&next| next < end));
    code
}

/// `ld.relaxed.sys.global.v2.u64`: a load of 16 bytes. An address without a space may be of any.
fn access(operation: &str) -> Option<Access> {
    let parts: Vec<&str> = operation.split('.').collect();
    let is_store = match parts[0] {
        "ld" => false,
        "st" => true,
        _ => return None,
    };
    if parts.iter().any(|part| ["shared", "param", "local", "const"].contains(part)) {
        return None;
    }
    let lanes: u32 = parts.iter().find_map(|part| part.strip_prefix('v')?.parse().ok()).unwrap_or(1);
    let bits: u32 = parts.last()?.trim_start_matches(char::is_alphabetic).parse().unwrap();
    Some(Access { is_store, bytes: lanes * bits / 8 })
}

const LOOP_IN_A_LOOP: &str = "
$L__outer:
	ld.global.u64 	%rd1, [%rd2];
	@%p1 bra 	$L__skip;
	st.shared.u32 	[%r1], %r2;
$L__inner:
	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd1];
	@%p2 bra 	$L__wide;
	ld.global.u16 	%rs1, [%rd1];
	bra.uni 	$L__next;
$L__wide:
	st.global.v2.f64 	[%rd3], {%fd1, %fd2};
$L__next:
	@%p3 bra 	$L__inner;
$L__skip:
	@%p4 bra 	$L__outer;
	ld.global.u32 	%r1, [%rd2];
	ret;
";

#[test]
fn the_loops_of_a_text_are_found() {
    let code = parse(LOOP_IN_A_LOOP);
    assert_eq!(loops(&code), [vec![0, 1, 2, 9], vec![3, 4, 5, 6, 7, 8]]);
    let accesses: Vec<_> = code.iter().filter_map(|instruction| instruction.access).collect();
    let known = [Access::load(8), Access::load(16), Access::load(2), Access::store(16), Access::load(4)];
    assert_eq!(accesses, known);
}

#[test]
fn a_narrow_access_makes_a_loop_cold() {
    assert!(hot_loops(&parse(LOOP_IN_A_LOOP), &[]).is_empty());
    let wide = LOOP_IN_A_LOOP.replace("ld.global.u16 	%rs1", "cvt.u16.u32 	%rs1");
    let [wide_loop] = hot_loops(&parse(&wide), &[]).try_into().unwrap();
    assert_eq!(wide_loop, [Access::load(16), Access::store(16)]);
    assert_eq!(hot_loops(&parse(LOOP_IN_A_LOOP), &[Access::load(2)]).len(), 1, "where the kernel is allowed it");
}

#[test]
fn a_store_of_words_in_place_of_a_pack_is_noticed() {
    for (kernel, text) in entries().iter().filter(|(kernel, _)| kernel == "cast_tensors" || is_collective(kernel)) {
        let narrowed = text.replace("st.global.v4.u32", "st.global.u32");
        assert!(check(kernel, &parse(&narrowed)).is_err(), "{kernel}");
    }
}

#[test]
fn the_gates_know_every_kernel() {
    let mut present: Vec<_> = entries().into_iter().map(|(name, _)| name).collect();
    let mut known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name.to_owned()).collect();
    present.sort();
    known.sort();
    assert_eq!(present, known);
}

#[test]
fn hot_loops_move_16_bytes_at_a_time() {
    for (kernel, text) in entries() {
        check(&kernel, &parse(&text)).unwrap_or_else(|missing| panic!("{missing}"));
    }
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
