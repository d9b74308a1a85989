//! The race detector: every pair of orders and scopes that does or does not synchronise, and what must never be let through.

use annulus_vgpu::{Arguments, Fault, Launch, Memory, Module, Options, Report, run};

/// Seeds for interleavings.
const SEEDS: std::ops::Range<u64> = 0..8;

/// A kernel of parameters `data` and `flag` (addresses) around `body`.
fn module(name_bodies: &[(&str, &str)]) -> Module {
    let kernels = name_bodies.iter().map(|(name, body)| {
        format!(
            ".visible .entry {name}(.param .u64 data, .param .u64 flag)\n{{\n.reg .b64 %d, %f; .reg .b32 %r<8>; .reg .pred %p<4>;\n\
            .shared .align 4 .b8 sh[128];\nld.param.u64 %d, [data];\nld.param.u64 %f, [flag];\nmov.u32 %r7, %tid.x;\n\
            setp.ne.u32 %p3, %r7, 0;\n{body}\nret;\n}}\n"
        )
    });
    Module::parse(&kernels.collect::<String>()).unwrap()
}

/// One thread writes data and posts the flag; another, at the given distance, waits for the flag and reads.
fn message(post: &str, wait: &str, devices: [usize; 2]) -> Result<Report, Fault> {
    let module = module(&[
        ("sender", &format!("st.global.u32 [%d], 42;\n{post}")),
        ("receiver", &format!("W:\n{wait}\nsetp.eq.u32 %p0, %r0, 0;\n@%p0 bra W;\nAFTER:\nld.global.u32 %r1, [%d];")),
    ]);
    let mut last = Ok(Report::default());
    for seed in SEEDS {
        let mut memory = Memory::new();
        let (data, flag) = (memory.alloc(&[0; 4]), memory.alloc(&[0; 4]));
        let launches = ["sender", "receiver"].iter().zip(devices).map(|(name, device)| Launch {
            device,
            ..Launch::new(module.kernel(name).unwrap(), 1, 1, Arguments::new().u64(data).u64(flag))
        });
        let options = Options { seed, ..Options::default() };
        last = Ok(run(&launches.collect::<Vec<_>>(), &mut memory, &options)?);
    }
    last
}

const SAME_DEVICE: [usize; 2] = [0, 0];
const TWO_DEVICES: [usize; 2] = [0, 1];

#[test]
fn messages_need_release_and_acquire_of_a_scope_that_includes_both() {
    let scopes = ["cta", "gpu", "sys"];
    for (i, post_scope) in scopes.iter().enumerate() {
        for (j, wait_scope) in scopes.iter().enumerate() {
            for post in ["release", "relaxed"] {
                for wait in ["acquire", "relaxed"] {
                    for (devices, needed) in [(SAME_DEVICE, 1), (TWO_DEVICES, 2)] {
                        let outcome = message(
                            &format!("st.{post}.{post_scope}.global.u32 [%f], 1;"),
                            &format!("ld.{wait}.{wait_scope}.global.u32 %r0, [%f];"),
                            devices,
                        );
                        let ordered = post == "release" && wait == "acquire" && i >= needed && j >= needed;
                        assert_eq!(outcome.is_ok(), ordered, "{post}.{post_scope} {wait}.{wait_scope}: {outcome:?}");
                        if let Err(fault) = outcome {
                            assert!(matches!(fault, Fault::Race { .. }), "{fault}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn fences_make_patterns_of_relaxed_accesses() {
    let (post, wait) = ("st.relaxed.sys.global.u32 [%f], 1;", "ld.relaxed.sys.global.u32 %r0, [%f];");
    let fence = |scope: &str| format!("fence.acq_rel.{scope};");
    for (scope, devices, ordered) in [
        ("sys", TWO_DEVICES, true),
        ("gpu", TWO_DEVICES, false),
        ("gpu", SAME_DEVICE, true),
        ("cta", SAME_DEVICE, false),
    ] {
        let outcome = message(&format!("{}{post}", fence(scope)), &format!("{wait}{}", fence(scope)), devices);
        assert_eq!(outcome.is_ok(), ordered, "{scope}: {outcome:?}");
    }
    assert!(message(&format!("membar.sys;{post}"), &format!("{wait}membar.sys;"), TWO_DEVICES).is_ok());
    assert!(message(post, &format!("{wait}membar.sys;"), TWO_DEVICES).is_err());
    assert!(message(&format!("membar.sys;{post}"), wait, TWO_DEVICES).is_err());
    assert!(message(&format!("{post}membar.sys;"), &format!("{wait}membar.sys;"), TWO_DEVICES).is_err());
}

#[test]
fn volatile_and_weak_flags_order_nothing() {
    let (post, wait) = ("st.release.sys.global.u32 [%f], 1;", "ld.acquire.sys.global.u32 %r0, [%f];");
    assert!(message("st.volatile.global.u32 [%f], 1;", "ld.volatile.global.u32 %r0, [%f];", SAME_DEVICE).is_err());
    assert!(message("st.global.u32 [%f], 1;", wait, SAME_DEVICE).is_err());
    assert!(message(post, "ld.global.u32 %r0, [%f];", SAME_DEVICE).is_err());
    assert!(message(post, wait, TWO_DEVICES).is_ok());
    // A post before the data is no post of the data.
    assert!(message(&format!("{post}st.global.u32 [%d], 43;"), wait, SAME_DEVICE).is_err());
}

#[test]
fn atomics_carry_a_release_and_plain_stores_end_it() {
    let wait = "ld.acquire.gpu.global.u32 %r0, [%f];";
    let release = "st.release.gpu.global.u32 [%f], 1;";
    assert!(message(&format!("{release}atom.relaxed.gpu.global.add.u32 %r0, [%f], 1;"), wait, SAME_DEVICE).is_ok());
    assert!(message("atom.acq_rel.gpu.global.add.u32 %r0, [%f], 1;", wait, SAME_DEVICE).is_ok());
    assert!(message("atom.global.add.u32 %r0, [%f], 1;", wait, SAME_DEVICE).is_err());
}

#[test]
fn noncoherent_loads_of_written_memory_are_refused() {
    let text =
        ("st.release.sys.global.u32 [%f], 1;", "ld.acquire.sys.global.u32 %r0, [%f];\nld.global.nc.u32 %r2, [%d];");
    let fault = message(text.0, text.1, TWO_DEVICES).unwrap_err();
    assert!(fault.to_string().contains("ld.global.nc"), "{fault}");
}

/// Runs one kernel alone on `threads` threads in `blocks` blocks.
fn alone(body: &str, blocks: u32, threads: u32) -> Result<(), Fault> {
    let module = module(&[("k", body)]);
    for seed in SEEDS {
        let mut memory = Memory::new();
        let (data, flag) = (memory.alloc(&[0; 256]), memory.alloc(&[0; 4]));
        let launch = Launch::new(module.kernel("k").unwrap(), blocks, threads, Arguments::new().u64(data).u64(flag));
        let options = Options { seed, budget_instructions: 100_000, ..Options::default() };
        run(&[launch], &mut memory, &options)?;
    }
    Ok(())
}

#[test]
fn barriers_order_a_block() {
    let exchange = |between: &str| {
        format!(
            "shl.b32 %r1, %r7, 2; st.shared.u32 [%r1], %r7;\n{between}\nxor.b32 %r1, %r1, 4; ld.shared.u32 %r2, [%r1];"
        )
    };
    assert!(alone(&exchange("bar.sync 0;"), 2, 32).is_ok());
    assert!(alone(&exchange("bar.warp.sync -1;"), 1, 32).is_ok());
    assert!(matches!(alone(&exchange(""), 1, 32), Err(Fault::Race { .. })));
    // Shuffles order no memory.
    let shuffle = "shfl.sync.bfly.b32 %r3, %r7, 1, 31, -1;";
    assert!(matches!(alone(&exchange(shuffle), 1, 32), Err(Fault::Race { .. })));
}

#[test]
fn writes_of_two_blocks_race_and_strong_ones_do_not() {
    assert!(matches!(alone("st.global.u32 [%d], 1;", 2, 1), Err(Fault::Race { .. })));
    assert!(alone("st.relaxed.gpu.global.u32 [%d], 1;", 2, 1).is_ok());
    assert!(matches!(alone("st.relaxed.cta.global.u32 [%d], 1;", 2, 1), Err(Fault::Race { .. })));
    assert!(alone("atom.global.add.u32 %r0, [%d], 1;", 4, 32).is_ok());
    // The same word, different bytes: no conflict.
    let own_byte = "mov.u32 %r1, %ctaid.x; cvt.u64.u32 %f, %r1; add.s64 %d, %d, %f; st.global.u8 [%d], 1;";
    assert!(alone(own_byte, 4, 1).is_ok());
}

#[test]
fn waits_that_nothing_ends_are_reported() {
    assert!(matches!(
        alone("@%p3 bra E; bar.sync 0;\nE: @%p3 bar.sync 1;", 1, 2),
        Err(Fault::Deadlock { waiting: 2, .. })
    ));
    assert!(matches!(
        alone("@%p3 bra E; shfl.sync.bfly.b32 %r0, %r7, 1, 31, 3;\nE:", 1, 2),
        Err(Fault::Deadlock { .. })
    ));
    let spin = "W: ld.acquire.gpu.global.u32 %r0, [%f]; setp.eq.u32 %p0, %r0, 0; @%p0 bra W;";
    assert!(matches!(alone(spin, 1, 1), Err(Fault::Hang { .. })));
}

#[test]
fn reports_name_the_source_line() {
    let text = ".visible .entry k(.param .u64 a)\n{\n.reg .b64 %a;\n.loc 1 77 3\nld.param.u64 %a, [a];\n.loc 1 78 3\n\
        st.global.u32 [%a+4], 1;\nret;\n}\n.file 1 \"/somewhere/norm.cu\"\n";
    let module = Module::parse(text).unwrap();
    let mut memory = Memory::new();
    let address = memory.alloc(&[0; 4]);
    let launch = Launch::new(module.kernel("k").unwrap(), 1, 1, Arguments::new().u64(address));
    let fault = run(&[launch], &mut memory, &Options::default()).unwrap_err().to_string();
    assert!(fault.contains("PTX line 7 (norm.cu:78)"), "{fault}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let reports: Vec<_> = (0..2)
        .map(|_| {
            message("st.release.gpu.global.u32 [%f], 1;", "ld.acquire.gpu.global.u32 %r0, [%f];", SAME_DEVICE).unwrap()
        })
        .collect();
    assert_eq!(reports[0], reports[1]);
}

/// Every block stores a part; the block that counts last adds the parts. `count` is the order of the counting atomic.
fn last_block_finish(count: &str, resident_blocks: usize) -> Result<u32, Fault> {
    let body = format!(
        "mov.u32 %r1, %ctaid.x; mul.wide.u32 %f, %r1, 4; add.s64 %f, %d, %f; add.u32 %r2, %r1, 1; st.global.u32 [%f], %r2;\n\
        ld.param.u64 %f, [flag];\natom.{count}.gpu.global.inc.u32 %r3, [%f], 2;\nsetp.ne.u32 %p0, %r3, 2;\n@%p0 ret;\n\
        ld.global.u32 %r4, [%d]; ld.global.u32 %r5, [%d+4]; ld.global.u32 %r6, [%d+8];\n\
        add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; st.global.u32 [%d+12], %r4;"
    );
    let module = module(&[("k", &body)]);
    let mut sum = 0;
    for seed in SEEDS {
        let mut memory = Memory::new();
        let (data, flag) = (memory.alloc(&[0; 16]), memory.alloc(&[0; 4]));
        // The counter wraps, so a second launch needs no reset.
        for _ in 0..2 {
            let launch = Launch::new(module.kernel("k").unwrap(), 3, 1, Arguments::new().u64(data).u64(flag));
            run(&[launch], &mut memory, &Options { seed, resident_blocks, ..Options::default() })?;
            sum = u32::from_le_bytes(memory.read(data + 12, 4).unwrap().try_into().unwrap());
        }
    }
    Ok(sum)
}

#[test]
fn a_last_block_finish_needs_order_and_no_coresidency() {
    for resident_blocks in [1, 2, 3] {
        assert_eq!(last_block_finish("acq_rel", resident_blocks), Ok(6));
        for weaker in ["relaxed", "acquire", "release"] {
            let fault = last_block_finish(weaker, resident_blocks).unwrap_err();
            assert!(matches!(fault, Fault::Race { .. }), "{weaker}: {fault}");
        }
    }
}
