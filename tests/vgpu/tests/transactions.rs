//! Memory transactions: sectors of 32 bytes, counted by warp.

use annulus_vgpu::{Arguments, Launch, Memory, Module, Options, Report, run};

/// `threads` threads of one block run `body`, with the address of zeroes on a multiple of 256 in `%d` and their number in `%t`.
fn report(body: &str, threads: u32) -> Report {
    let text = format!(
        ".visible .entry k(.param .u64 data)\n{{\n.reg .b64 %d, %o; .reg .b32 %r<8>; .reg .pred %p<4>;\n\
        ld.param.u64 %d, [data];\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap();
    let mut memory = Memory::new();
    let data = 0x100_0000;
    memory.alloc_at(data, &[0; 8192]);
    let launch = Launch::new(module.kernel("k").unwrap(), 1, threads, Arguments::new().u64(data));
    run(&[launch], &mut memory, &Options { counts_sectors: true, ..Options::default() }).unwrap()
}

/// The place of thread t: `stride * t`.
fn at(stride: u32) -> String {
    format!("mul.wide.u32 %o, %r0, {stride};\nadd.s64 %d, %d, %o;\n")
}

#[test]
fn a_warp_s_loads_are_the_sectors_that_they_touch() {
    let load = |stride, what: &str| report(&format!("{}{what}", at(stride)), 32).loaded_sectors;
    assert_eq!(load(4, "ld.global.u32 %r1, [%d];"), 4);
    assert_eq!(load(4, "ld.global.u32 %r1, [%d+4];"), 5, "one more where they begin inside of a sector");
    assert_eq!(load(16, "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d];"), 16);
    assert_eq!(load(16, "ld.global.u32 %r1, [%d];"), 16, "half of each sector for nothing, and more");
    assert_eq!(load(32, "ld.global.u32 %r1, [%d];"), 32);
    assert_eq!(load(0, "ld.global.u32 %r1, [%d];"), 1);
}

#[test]
fn warps_instructions_and_rounds_of_a_loop_count_apart() {
    let stores = "st.global.u32 [%d], 1;\nst.global.u32 [%d+128], 1;";
    let two = report(&format!("{}{stores}", at(4)), 32);
    assert_eq!((two.loaded_sectors, two.stored_sectors), (0, 8));
    assert_eq!(report(&format!("{}ld.global.u32 %r1, [%d];", at(4)), 96).loaded_sectors, 12);
    let looped =
        "mov.u32 %r1, 0;\nL: ld.global.u32 %r2, [%d];\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %p0, %r1, 5;\n@%p0 bra L;";
    assert_eq!(report(&format!("{}{looped}", at(4)), 32).loaded_sectors, 20);
}

#[test]
fn threads_that_stay_away_touch_nothing() {
    let body = "setp.lt.u32 %p0, %r0, 9;\n@%p0 ld.global.u32 %r1, [%d];";
    assert_eq!(report(&format!("{}{body}", at(4)), 32).loaded_sectors, 2);
}
