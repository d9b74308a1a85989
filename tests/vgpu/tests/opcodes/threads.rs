//! What threads do together, where they go, and who they are.

use annulus_vgpu::{Arguments, Launch, Memory, Module, Options, Outside, run};

use crate::row::{Row, row_by};

pub fn rows() -> Vec<Row> {
    [shuffles(), votes(), barriers(), ways(), special_registers(), elsewhere()].into_iter().flatten().collect()
}

/// What `body` leaves in `%d` of every thread. `%i` is the thread's number in the block, `%r`, `%s`, `%t`, `%p`, `%q` are to
/// spare, `%at` is the address of the thread's word in shared memory, which begins with `sh`.
fn words(body: &str, blocks: u32, threads: u32) -> Vec<u32> {
    let module = Module::parse(&format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 results)\n{{\n.reg .pred %p, %q;\n\
        .reg .b32 %d, %i, %n, %at, %r, %s, %t; .reg .b64 %z, %offset, %x, %y; .shared .align 4 .b8 sh[{}];\n\
        ld.param.u64 %z, [results]; mov.u32 %i, %tid.x; mov.u32 %n, %ctaid.x; mad.lo.u32 %n, %n, {threads}, %i;\n\
        mul.wide.u32 %offset, %n, 4; add.s64 %z, %z, %offset; mul.lo.u32 %at, %i, 4; mov.u32 %r, sh; add.s32 %at, %at, %r;\n\
        {body}\nst.global.u32 [%z], %d;\nret;\n}}\n",
        4 * threads
    ))
    .unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let mut memory = Memory::new();
    let len_bytes = (blocks * threads) as usize * 4;
    let results = memory.alloc(&vec![0xff; len_bytes]);
    let launch = Launch::new(module.kernel("k").unwrap(), blocks, threads, Arguments::new().u64(results));
    run(&[launch], &mut memory, &Options::default()).unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let words = memory.read(results, len_bytes).unwrap().chunks_exact(4);
    words.map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// `body` by two warps.
fn by_warps(name: &'static str, body: String, expected: impl Fn(u32) -> u32 + 'static) -> Row {
    Row::new(name, move || {
        let expected: Vec<u32> = (0..64).map(&expected).collect();
        assert_eq!(words(&body, 1, 64), expected, "{body}");
    })
}

/// Lanes of a warp, or of a part of it, exchange a word; whoever has no partner keeps its own and is told so.
fn shuffles() -> Vec<Row> {
    let mut rows = Vec::new();
    // The widths that CUDA knows: `c` is (32 - width) << 8 | 31.
    for width in [32, 16, 8, 2] {
        let parts = (32 - width) << 8 | 31;
        for offset in [0, 1, 2, 4, 16, 31] {
            let mut shuffle = |name: &'static str, partner: fn(u32, u32) -> u32| {
                let body = format!(
                    "mul.lo.u32 %r, %i, 3; {name} %s|%p, %r, {offset}, {parts}, -1;\n\
                    selp.u32 %t, 1000, 0, %p; add.u32 %d, %s, %t;"
                );
                rows.push(by_warps(name, body, move |thread| {
                    let (part, lane) = (thread / width * width, thread % width);
                    match partner(lane, offset) {
                        partner if partner < width => 3 * (part + partner) + 1000,
                        _ => 3 * thread,
                    }
                }));
            };
            // Beyond the part there is nobody; `bfly` reaches below it too, but only whole parts, which are never asked for.
            if offset < width {
                shuffle("shfl.sync.bfly.b32", |lane, offset| lane ^ offset);
            }
            shuffle("shfl.sync.down.b32", |lane, offset| lane + offset);
        }
    }
    // The word, not what is above it in a register, and of the lanes of the mask alone.
    rows.push(by_warps(
        "shfl.sync.bfly.b32",
        "mov.u32 %d, 5; setp.lt.u32 %p, %i, 4; @!%p bra OUT; shfl.sync.bfly.b32 %d, %i, 2, 31, 15;\nOUT:".to_owned(),
        |thread| if thread < 4 { thread ^ 2 } else { 5 },
    ));
    rows
}

/// Each warp is asked for itself, and only the lanes of the mask.
fn votes() -> Vec<Row> {
    type Case = (&'static str, fn(u32) -> bool);
    let mut rows = Vec::new();
    for name in ["vote.sync.all.pred", "vote.sync.any.pred"] {
        // Which threads say yes: none, all, all of a warp, one, all but one.
        let cases: [Case; 5] = [
            ("setp.lt.u32 %p, %i, 0;", |_| false),
            ("setp.lt.u32 %p, %i, 64;", |_| true),
            ("setp.lt.u32 %p, %i, 32;", |thread| thread < 32),
            ("setp.eq.u32 %p, %i, 37;", |thread| thread == 37),
            ("setp.ne.u32 %p, %i, 37;", |thread| thread != 37),
        ];
        for (says, yes) in cases {
            for (mask, members) in [("-1", 0..32), ("0xffff", 0..16)] {
                let body = format!(
                    "{says}\nmov.u32 %d, 9; and.b32 %r, %i, 31; setp.ge.u32 %q, %r, {};\n@%q bra OUT;\n{name} %p, %p, {mask};\n\
                    selp.u32 %d, 1, 0, %p;\nOUT:",
                    members.end
                );
                rows.push(by_warps(name, body, move |thread| {
                    let (warp, lane) = (thread / 32 * 32, thread % 32);
                    let mut votes = members.clone().map(|member| yes(warp + member));
                    let carried = if name.contains("all") { votes.all(|yes| yes) } else { votes.any(|yes| yes) };
                    if members.contains(&lane) { carried.into() } else { 9 }
                }));
            }
        }
    }
    rows
}

/// Threads read what others wrote before the barrier. (Without it: `races.rs`, `semantics.rs`.)
fn barriers() -> Vec<Row> {
    let exchange =
        |barrier: &str| format!("st.shared.u32 [%at], %i;\n{barrier}\nxor.b32 %at, %at, 128; ld.shared.u32 %d, [%at];");
    // Two pairs of warps at barriers of their own, of which the second begins later.
    let apart = "shr.u32 %r, %i, 6; setp.eq.u32 %p, %r, 0; add.u32 %r, %r, 1; @%p bra MEET;\nmov.u32 %s, 0;\n\
        LATER: add.u32 %s, %s, 1; setp.lt.u32 %q, %s, 50; @%q bra LATER;\nMEET: bar.sync %r, 64;";
    let apart = exchange(apart);
    vec![
        by_warps("bar.sync", exchange("bar.sync 0;"), |thread| thread ^ 32),
        Row::new("bar.sync a, b", move || {
            assert_eq!(words(&apart, 1, 128), (0..128).map(|thread| thread ^ 32).collect::<Vec<u32>>());
        }),
    ]
}

/// Guards, jumps forward and back, and ends.
fn ways() -> Vec<Row> {
    vec![
        row_by("@p", "selp.u32 %d, 5, 6, %a; @%a mov.u32 %d, 7;", |(a,): (bool,)| if a { 7u32 } else { 6 }),
        row_by("@!p", "selp.u32 %d, 5, 6, %a; @!%a mov.u32 %d, 7;", |(a,): (bool,)| if a { 5u32 } else { 7 }),
        row_by("bra", "mov.u32 %d, 1; @%a bra OVER; add.u32 %d, %d, 1;\nOVER: add.u32 %d, %d, 10;", |(a,): (bool,)| {
            if a { 11u32 } else { 12 }
        }),
        by_warps(
            "bra",
            "mov.u32 %r, 0; mov.u32 %d, 0;\nAGAIN: add.u32 %d, %d, %r; add.u32 %r, %r, 1; setp.le.u32 %p, %r, %i;\n@%p bra AGAIN;"
                .to_owned(),
            |thread| thread * (thread + 1) / 2,
        ),
        row_by("bra.uni", "mov.u32 %d, 1; bra.uni OVER; mov.u32 %d, 2;\nOVER:", |(_,): (bool,)| 1u32),
        by_warps(
            "ret",
            "mov.u32 %d, 3; st.global.u32 [%z], 4; setp.lt.u32 %p, %i, 5; @%p ret;".to_owned(),
            |thread| if thread < 5 { 4 } else { 3 },
        ),
    ]
}

fn special_registers() -> Vec<Row> {
    let by_blocks = |name: &'static str, expected: fn(u32, u32) -> u32| {
        Row::new(name, move || {
            let all = (0..3).flat_map(|block| (0..40).map(move |thread| expected(block, thread)));
            assert_eq!(words(&format!("mov.u32 %d, {name};"), 3, 40), all.collect::<Vec<_>>(), "{name}");
        })
    };
    vec![
        by_blocks("%tid.x", |_, thread| thread),
        by_blocks("%ctaid.x", |block, _| block),
        by_blocks("%ntid.x", |_, _| 40),
        by_blocks("%nctaid.x", |_, _| 3),
        Row::new("%globaltimer", time_goes_on),
    ]
}

/// Of itself in instructions, or as whoever holds the memory says.
fn time_goes_on() {
    let body = "mov.u64 %x, %globaltimer; mov.u32 %r, 0;\nAGAIN: add.u32 %r, %r, 1; setp.lt.u32 %p, %r, 100; @%p bra AGAIN;\n\
        mov.u64 %y, %globaltimer; sub.s64 %x, %y, %x; cvt.u32.u64 %d, %x;";
    let [passed] = words(body, 1, 1).try_into().unwrap();
    assert!((300..400).contains(&passed), "{passed}");

    struct Clock(Memory);
    impl Outside for Clock {
        fn contains(&self, address: u64, len_bytes: usize) -> bool {
            self.0.contains(address, len_bytes)
        }
        fn load(&self, address: u64, into: &mut [u8]) -> bool {
            self.0.load(address, into)
        }
        fn store(&mut self, address: u64, bytes: &[u8]) -> bool {
            self.0.store(address, bytes)
        }
        fn update(&mut self, address: u64, len_bytes: usize, change: &dyn Fn(u64) -> u64) -> Option<u64> {
            self.0.update(address, len_bytes, change)
        }
        fn nearest(&self, address: u64) -> String {
            self.0.nearest(address)
        }
        fn time_ns(&self) -> Option<u64> {
            Some(0x0123_4567_89ab_cdef)
        }
    }
    let text = ".visible .entry k(.param .u64 results)\n{\n.reg .b64 %z, %x;\nld.param.u64 %z, [results];\n\
        mov.u64 %x, %globaltimer; st.global.u64 [%z], %x;\nret;\n}\n";
    let module = Module::parse(text).unwrap();
    let mut clock = Clock(Memory::new());
    let results = clock.0.alloc(&[0; 8]);
    let launch = Launch::new(module.kernel("k").unwrap(), 1, 1, Arguments::new().u64(results));
    run(&[launch], &mut clock, &Options::default()).unwrap();
    assert_eq!(clock.0.read(results, 8).unwrap(), 0x0123_4567_89ab_cdef_u64.to_le_bytes());
}

/// What has no value, and is tried where the memory model is.
fn elsewhere() -> Vec<Row> {
    const RACES: &str = include_str!("../races.rs");
    let in_races = |name: &'static str, test: &'static str| {
        Row::new(name, move || assert!(RACES.contains(&format!("#[test]\nfn {test}()")), "no test {test} in races.rs"))
    };
    vec![in_races("fence.acq_rel.sys", "fences_make_patterns_of_relaxed_accesses")]
}
