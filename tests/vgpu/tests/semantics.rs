//! Instructions against what PTX says of them, on a few values each. (Those that the kernels have, on many: `opcodes`.)

use annulus_vgpu::{Arguments, Fault, Launch, Memory, Module, Options, run};

/// Runs `body` with one thread: `%ra..%rc` (b32), `%da..%dc` (b64), `%fa..%fc` (f32) and `%ga..%gc` (f64) hold the low bits of the
/// inputs; the result is what it leaves in `%out` (b64).
fn try_evaluate(body: &str, inputs: [u64; 3]) -> Result<u64, Fault> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 o, .param .u64 a, .param .u64 b, .param .u64 c)\n{{\n\
        .reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b32 %ra, %rb, %rc; .reg .f32 %fa, %fb, %fc, %f;\n\
        .reg .b64 %da, %db, %dc, %out, %address; .reg .f64 %ga, %gb, %gc;\n\
        ld.param.u64 %address, [o]; ld.param.u64 %da, [a]; ld.param.u64 %db, [b]; ld.param.u64 %dc, [c];\n\
        cvt.u32.u64 %ra, %da; cvt.u32.u64 %rb, %db; cvt.u32.u64 %rc, %dc;\n\
        mov.b32 %fa, %ra; mov.b32 %fb, %rb; mov.b32 %fc, %rc; mov.b64 %ga, %da; mov.b64 %gb, %db; mov.b64 %gc, %dc;\n\
        mov.b64 %out, 0;\n{body}\nst.global.u64 [%address], %out;\nret;\n}}\n"
    );
    let module = Module::parse(&text)?;
    let mut memory = Memory::new();
    let out = memory.alloc(&[0; 8]);
    let [a, b, c] = inputs;
    let launch = Launch::new(module.kernel("k")?, 1, 1, Arguments::new().u64(out).u64(a).u64(b).u64(c));
    run(&[launch], &mut memory, &Options::default())?;
    Ok(u64::from_le_bytes(memory.read(out, 8).unwrap().try_into().unwrap()))
}

#[track_caller]
fn check(body: &str, inputs: [u64; 3], expected: u64) {
    let actual = try_evaluate(body, inputs).unwrap_or_else(|fault| panic!("{body}: {fault}"));
    assert_eq!(actual, expected, "{body} of {inputs:x?}: {actual:#x}, expected {expected:#x}");
}

/// An operation on 32-bit integer registers.
#[track_caller]
fn word(operation: &str, inputs: [u32; 3], expected: u32) {
    check(&format!("{operation}\ncvt.u64.u32 %out, %r0;"), inputs.map(u64::from), expected.into());
}

/// An operation on f32 registers.
#[track_caller]
fn single(operation: &str, inputs: [f32; 3], expected_bits: u32) {
    let body = format!("{operation}\nmov.b32 %r0, %f;\ncvt.u64.u32 %out, %r0;");
    check(&body, inputs.map(|x| x.to_bits().into()), expected_bits.into());
}

#[test]
fn integers_wrap() {
    word("add.s32 %r0, %ra, %rb;", [u32::MAX, 2, 0], 1);
    word("sub.u32 %r0, %ra, %rb;", [1, 2, 0], u32::MAX);
    word("mul.lo.s32 %r0, %ra, %rb;", [0x1_0001, 0x1_0001, 0], 0x0002_0001);
    word("mul.hi.u32 %r0, %ra, %rb;", [u32::MAX, u32::MAX, 0], u32::MAX - 1);
    word("mul.hi.s32 %r0, %ra, %rb;", [u32::MAX, 5, 0], u32::MAX);
    word("mad.lo.u32 %r0, %ra, %rb, %rc;", [u32::MAX, 3, 4], 1);
    check("mul.wide.u32 %out, %ra, %rb;", [0xffff_ffff, 2, 0], 0x1_ffff_fffe);
    check("mul.wide.s32 %out, %ra, %rb;", [0xffff_ffff, 2, 0], u64::MAX - 1);
    check("mad.wide.u32 %out, %ra, %rb, %dc;", [0xffff_ffff, 2, 1 << 40], (1 << 40) + 0x1_ffff_fffe);
    check("mul.hi.u64 %out, %da, %db;", [u64::MAX, u64::MAX, 0], u64::MAX - 1);
    check("add.s64 %out, %da, %db;", [u64::MAX, 1, 0], 0);
    word("neg.s32 %r0, %ra;", [0x8000_0000, 0, 0], 0x8000_0000);
    word("abs.s32 %r0, %ra;", [u32::MAX - 6, 0, 0], 7);
}

#[test]
fn division_truncates_and_refuses_zero() {
    word("div.s32 %r0, %ra, %rb;", [-7i32 as u32, 2, 0], -3i32 as u32);
    word("rem.s32 %r0, %ra, %rb;", [-7i32 as u32, 2, 0], -1i32 as u32);
    word("div.u32 %r0, %ra, %rb;", [-7i32 as u32, 2, 0], 0x7fff_fffc);
    word("div.s32 %r0, %ra, %rb;", [0x8000_0000, u32::MAX, 0], 0x8000_0000);
    let fault = try_evaluate("div.u32 %r0, %ra, %rb;", [1, 0, 0]).unwrap_err();
    assert!(matches!(fault, Fault::Undefined { .. }), "{fault}");
}

#[test]
fn shifts_clamp_at_the_width() {
    word("shl.b32 %r0, %ra, %rb;", [1, 31, 0], 0x8000_0000);
    word("shl.b32 %r0, %ra, %rb;", [1, 32, 0], 0);
    word("shr.u32 %r0, %ra, %rb;", [0x8000_0000, 1000, 0], 0);
    word("shr.s32 %r0, %ra, %rb;", [0x8000_0000, 1000, 0], u32::MAX);
    check("shl.b64 %out, %da, %rb;", [1, 63, 0], 1 << 63);
    check("shl.b64 %out, %da, %rb;", [1, 64, 0], 0);
    check("shr.s64 %out, %da, %rb;", [1 << 63, 64, 0], u64::MAX);
    word("shf.l.wrap.b32 %r0, %ra, %rb, %rc;", [0x8000_0000, 1, 33], 3);
    word("shf.r.clamp.b32 %r0, %ra, %rb, %rc;", [5, 7, 40], 7);
}

#[test]
fn bits() {
    word("not.b32 %r0, %ra;", [0, 0, 0], u32::MAX);
    word("popc.b32 %r0, %ra;", [0xf0f0, 0, 0], 8);
    word("clz.b32 %r0, %ra;", [1, 0, 0], 31);
    word("clz.b32 %r0, %ra;", [0, 0, 0], 32);
    word("brev.b32 %r0, %ra;", [1, 0, 0], 0x8000_0000);
    word("prmt.b32 %r0, %ra, %rb, 0x7610;", [0x3322_1100, 0x7766_5544, 0], 0x7766_1100);
    word("prmt.b32 %r0, %ra, %rb, 0x8888;", [0x80, 0, 0], u32::MAX);
    word("lop3.b32 %r0, %ra, %rb, %rc, 0x96;", [0b1100, 0b1010, 0b0110], 0b1100 ^ 0b1010 ^ 0b0110);
    word("bfe.u32 %r0, %ra, 4, 8;", [0xabcd, 0, 0], 0xbc);
    word("bfe.s32 %r0, %ra, 4, 4;", [0x80, 0, 0], 0xffff_fff8);
    word("bfi.b32 %r0, %ra, %rb, 8, 4;", [0xff, 0, 0], 0xf00);
}

#[test]
fn floats_round_to_nearest_even() {
    single("add.rn.f32 %f, %fa, %fb;", [1.0, 2f32.powi(-24), 0.0], 1f32.to_bits());
    single("add.rn.f32 %f, %fa, %fb;", [1.0, 1.5 * 2f32.powi(-24), 0.0], 0x3f80_0001);
    single("mul.f32 %f, %fa, %fb;", [1e30, 1e30, 0.0], f32::INFINITY.to_bits());
    single("div.rn.f32 %f, %fa, %fb;", [1.0, 3.0, 0.0], 0x3eaa_aaab);
    single("sqrt.rn.f32 %f, %fa;", [2.0, 0.0, 0.0], 0x3fb5_04f3);
    // One rounding: the product's low bits survive.
    let x = 1.0 + 2f32.powi(-12);
    single("fma.rn.f32 %f, %fa, %fb, %fc;", [x, x, -1.0 - 2f32.powi(-11)], 2f32.powi(-24).to_bits());
    check("fma.rn.f64 %out, %ga, %gb, %gc;", [3f64, 5.0, 0.5].map(f64::to_bits), 15.5f64.to_bits());
    // Denormals are kept.
    single("mul.f32 %f, %fa, %fb;", [f32::MIN_POSITIVE, 0.5, 0.0], 0x0040_0000);
}

#[test]
fn nan_is_canonical_and_signs_are_bits() {
    single("sub.f32 %f, %fa, %fb;", [f32::INFINITY, f32::INFINITY, 0.0], 0x7fff_ffff);
    single("add.f32 %f, %fa, %fb;", [f32::from_bits(0xffc0_1234), 1.0, 0.0], 0x7fff_ffff);
    single("neg.f32 %f, %fa;", [0.0, 0.0, 0.0], 0x8000_0000);
    single("abs.f32 %f, %fa;", [-0.0, 0.0, 0.0], 0);
    single("max.f32 %f, %fa, %fb;", [f32::NAN, 1.0, 0.0], 1f32.to_bits());
    single("max.NaN.f32 %f, %fa, %fb;", [f32::NAN, 1.0, 0.0], 0x7fff_ffff);
    single("max.f32 %f, %fa, %fb;", [-0.0, 0.0, 0.0], 0);
    single("min.f32 %f, %fa, %fb;", [0.0, -0.0, 0.0], 0x8000_0000);
}

#[test]
fn conversions_round_saturate_and_extend() {
    let to_int = |code: &str, x: f32, expected: u32| {
        check(&format!("cvt.{code} %r0, %fa; cvt.u64.u32 %out, %r0;"), [x.to_bits().into(), 0, 0], expected.into());
    };
    to_int("rzi.s32.f32", -1.9, -1i32 as u32);
    to_int("rni.s32.f32", 2.5, 2);
    to_int("rmi.s32.f32", -1.1, -2i32 as u32);
    to_int("rpi.s32.f32", 1.1, 2);
    to_int("rzi.s32.f32", 1e20, i32::MAX as u32);
    to_int("rzi.u32.f32", -1.0, 0);
    to_int("rzi.s32.f32", f32::NAN, 0);
    check("cvt.rzi.s64.f32 %out, %fa;", [f32::NAN.to_bits().into(), 0, 0], 1 << 63);
    check("cvt.s64.s32 %out, %ra;", [0x8000_0000, 0, 0], 0xffff_ffff_8000_0000);
    check("cvt.u64.u8 %out, %ra;", [0x1ff, 0, 0], 0xff);
    check("cvt.sat.u8.s32 %r0, %ra; cvt.u64.u32 %out, %r0;", [u64::from(-5i32 as u32), 0, 0], 0);
    check("cvt.rn.f32.u32 %f, %ra; mov.b32 %r0, %f; cvt.u64.u32 %out, %r0;", [0x0100_0001, 0, 0], 0x4b80_0000);
    check("cvt.f64.f32 %out, %fa;", [1.5f32.to_bits().into(), 0, 0], 1.5f64.to_bits());
    check("cvt.rn.f32.f64 %f, %ga; mov.b32 %r0, %f; cvt.u64.u32 %out, %r0;", [1e-50f64.to_bits(), 0, 0], 0);
    check(
        "cvt.rni.f32.f32 %f, %fa; mov.b32 %r0, %f; cvt.u64.u32 %out, %r0;",
        [3.5f32.to_bits().into(), 0, 0],
        4f32.to_bits().into(),
    );
}

#[test]
fn sixteen_bit_floats() {
    let narrow = |code: &str, x: f32, expected: u64| {
        check(&format!("cvt.{code} %h0, %fa; cvt.u64.u16 %out, %h0;"), [x.to_bits().into(), 0, 0], expected);
    };
    narrow("rn.bf16.f32", f32::from_bits(0x3f80_8000), 0x3f80); // ties to even
    narrow("rn.bf16.f32", f32::from_bits(0x3f81_8000), 0x3f82);
    narrow("rn.bf16.f32", f32::NAN, 0x7fff);
    narrow("rn.bf16.f32", f32::MAX, 0x7f80);
    narrow("rn.satfinite.bf16.f32", f32::MAX, 0x7f7f);
    narrow("rn.f16.f32", 65520.0, 0x7c00);
    narrow("rn.satfinite.f16.f32", 65520.0, 0x7bff);
    narrow("rn.f16.f32", 2f32.powi(-25), 0); // a tie with zero
    narrow("rn.f16.f32", 3.0 * 2f32.powi(-25), 2);
    let pair = "cvt.rn.bf16x2.f32 %r0, %fa, %fb; cvt.u64.u32 %out, %r0;";
    check(pair, [1f32.to_bits().into(), 2f32.to_bits().into(), 0], 0x3f80_4000);
    check(
        "cvt.u16.u32 %h0, %ra; cvt.f32.bf16 %f, %h0; mov.b32 %r0, %f; cvt.u64.u32 %out, %r0;",
        [0x4000, 0, 0],
        0x4000_0000,
    );
    check("cvt.u16.u32 %h0, %ra; cvt.f32.f16 %f, %h0; mov.b32 %r0, %f; cvt.u64.u32 %out, %r0;", [1, 0, 0], 0x3380_0000);
}

#[test]
fn predicates_and_selection() {
    let holds = |test: &str, inputs: [u64; 3], expected: u64| {
        check(&format!("setp.{test} %p0, %ra, %rb; selp.b64 %out, 1, 0, %p0;"), inputs, expected);
    };
    holds("lt.s32", [0xffff_ffff, 0, 0], 1);
    holds("lt.u32", [0xffff_ffff, 0, 0], 0);
    holds("lo.s32", [0xffff_ffff, 0, 0], 0);
    let nan = f32::NAN.to_bits().into();
    let float = |test: &str, a: u64, expected: u64| {
        check(&format!("setp.{test}.f32 %p0, %fa, %fb; selp.b64 %out, 1, 0, %p0;"), [a, 0, 0], expected);
    };
    float("lt", nan, 0);
    float("ltu", nan, 1);
    float("ne", nan, 0);
    float("neu", nan, 1);
    float("nan", nan, 1);
    float("eq", 0x8000_0000, 1); // -0 equals +0
    check("setp.eq.u32 %p1, %ra, %ra; setp.eq.and.u32 %p0, %ra, %rb, %p1; @!%p0 mov.b64 %out, 7;", [1, 2, 0], 7);
    check("setp.eq.u32 %p0, %ra, %rb; @%p0 bra L; mov.b64 %out, 7;\nL:", [1, 1, 0], 0);
}

#[test]
fn moves_pack_and_unpack() {
    check("mov.b64 %out, {%ra, %rb};", [1, 2, 0], 0x2_0000_0001);
    check("mov.b64 {%r0, %r1}, %da; cvt.u64.u32 %out, %r1;", [0x5_0000_0001, 0, 0], 5);
    check("{.reg .b16 %x; mov.b32 {_, %x}, %ra; cvt.u64.u16 %out, %x;}", [0x1234_5678, 0, 0], 0x1234);
}

#[test]
fn vectors_loads_and_atomics() {
    let module = Module::parse(
        ".visible .entry k(.param .u64 a)\n{\n.reg .b64 %a; .reg .b32 %r<8>; .reg .b16 %h<4>;\nld.param.u64 %a, [a];\n\
        ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a];\nst.global.v4.u32 [%a+16], {%r3, %r2, %r1, %r0};\n\
        ld.global.s8 %r4, [%a+3];\nst.global.u32 [%a+32], %r4;\nld.global.v2.u16 {%h0, %h1}, [%a];\nst.global.u16 [%a+36], %h1;\n\
        atom.global.inc.u32 %r5, [%a+40], 1;\natom.global.inc.u32 %r5, [%a+40], 1;\natom.global.cas.b32 %r6, [%a+44], 0, 9;\n\
        red.global.max.s32 [%a+48], -1;\nret;\n}",
    )
    .unwrap();
    let mut memory = Memory::new();
    let words = [0x8000_0001u32, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, -5i32 as u32];
    let address = memory.alloc(&words.map(u32::to_le_bytes).concat());
    let launch = Launch::new(module.kernel("k").unwrap(), 1, 1, Arguments::new().u64(address));
    run(&[launch], &mut memory, &Options::default()).unwrap();
    let word = |i: u64| u32::from_le_bytes(memory.read(address + 4 * i, 4).unwrap().try_into().unwrap());
    assert_eq!([word(4), word(5), word(6), word(7)], [4, 3, 2, 0x8000_0001]);
    assert_eq!([word(8), word(9), word(10), word(11), word(12)], [0xffff_ff80, 0x8000, 0, 9, u32::MAX]);
}

#[test]
fn shuffles_and_votes() {
    for (shuffle, expected) in [
        ("bfly.b32 %r1|%p0, %r0, 1, 31", (0..32).map(|lane| lane ^ 1).collect::<Vec<u32>>()),
        ("down.b32 %r1|%p0, %r0, 4, 31", (0..32).map(|lane| if lane < 28 { lane + 4 } else { lane }).collect()),
        ("up.b32 %r1|%p0, %r0, 4, 0", (0..32).map(|lane| if lane < 4 { lane } else { lane - 4 }).collect()),
        ("idx.b32 %r1, %r0, 9, 31", vec![9; 32]),
        ("idx.b32 %r1, %r0, 1, 0x181f", (0..32).map(|lane| (lane & 24) + 1).collect()),
    ] {
        let module = Module::parse(&format!(
            ".visible .entry k(.param .u64 a)\n{{\n.reg .b64 %a, %o; .reg .b32 %r<4>; .reg .pred %p0;\nld.param.u64 %a, [a];\n\
            mov.u32 %r0, %tid.x; mul.wide.u32 %o, %r0, 4; add.s64 %a, %a, %o; shfl.sync.{shuffle}, -1;\n\
            st.global.u32 [%a], %r1;\nsetp.lt.u32 %p0, %r0, 3; vote.sync.ballot.b32 %r2, %p0, -1; st.global.u32 [%a+128], %r2;\n}}"
        ))
        .unwrap();
        let mut memory = Memory::new();
        let address = memory.alloc(&[0; 256]);
        let launch = Launch::new(module.kernel("k").unwrap(), 1, 32, Arguments::new().u64(address));
        run(&[launch], &mut memory, &Options::default()).unwrap();
        let word = |i: u64| u32::from_le_bytes(memory.read(address + 4 * i, 4).unwrap().try_into().unwrap());
        assert_eq!((0..32).map(word).collect::<Vec<_>>(), expected, "{shuffle}");
        assert!((32..64).all(|i| word(i) == 7));
    }
}

#[test]
fn a_counted_barrier_lets_its_warps_go_without_the_others() {
    // Warps 0 and 1 meet at barrier 1, twice; warp 2 never comes there. Shared memory written before is read after.
    let kernel = |first: &str| {
        Module::parse(&format!(
            ".visible .entry k(.param .u64 a)\n{{\n.reg .b64 %a, %o; .reg .b32 %r<6>; .reg .pred %p<3>; .shared .align 4 .b8 sh[384];\n\
            ld.param.u64 %a, [a]; mov.u32 %r0, %tid.x; mul.wide.u32 %o, %r0, 4; add.s64 %a, %a, %o; shl.b32 %r1, %r0, 2;\n\
            mov.u32 %r2, sh; add.s32 %r2, %r2, %r1; st.shared.u32 [%r2], %r0; setp.ge.u32 %p0, %r0, 64; @%p0 bra END;\n\
            setp.ge.u32 %p1, %r0, 32;\n{first}\nxor.b32 %r1, %r1, 128; mov.u32 %r2, sh; add.s32 %r2, %r2, %r1; ld.shared.u32 %r3, [%r2];\n\
            mov.u32 %r4, 1; bar.sync %r4, 64;\nEND:\nst.global.u32 [%a], %r3; ret;\n}}"
        ))
        .unwrap()
    };
    let start = |module: &Module| {
        let mut memory = Memory::new();
        let address = memory.alloc(&[0; 384]);
        let launch = Launch::new(module.kernel("k").unwrap(), 1, 96, Arguments::new().u64(address));
        run(&[launch], &mut memory, &Options::default())?;
        let word = |i: u64| u32::from_le_bytes(memory.read(address + 4 * i, 4).unwrap().try_into().unwrap());
        Ok::<_, Fault>((0..64).map(word).collect::<Vec<_>>())
    };
    assert_eq!(start(&kernel("bar.sync 1, 64;")).unwrap(), (0..64).map(|i| i ^ 32).collect::<Vec<u32>>());
    for (first, expected) in [
        ("", "data race"),
        ("@%p1 bar.sync 1, 96;\n@!%p1 bar.sync 1, 64;", "different thread counts"),
        ("bar.sync 1, 48;", "no multiple of the warp"),
        ("bar.sync 16, 64;", "barrier above 15"),
        ("bar.sync 1, 96;", "deadlock"),
    ] {
        let fault = start(&kernel(first)).unwrap_err();
        assert!(fault.to_string().contains(expected), "{first}: {fault}");
    }
}

#[test]
fn what_is_not_understood_is_named() {
    for (body, words) in [
        ("sin.approx.f32 %f, %fa;", "sin.approx.f32"),
        ("add.ftz.f32 %f, %fa, %fb;", ".ftz"),
        ("sqrt.approx.f32 %f, %fa;", ".rn"),
        ("add.f32 %f, %fa;", "2 operands"),
        ("add.s32 %r0, %ra, %nowhere;", "%nowhere"),
        ("bra NOWHERE;", "NOWHERE"),
        ("ld.acquire.global.u32 %r0, [%da];", "without a scope"),
    ] {
        let fault = try_evaluate(body, [0; 3]).unwrap_err();
        assert!(matches!(fault, Fault::Parse { line, .. } if line >= 11), "{fault}");
        assert!(fault.to_string().contains(words), "{fault}");
    }
}

#[test]
fn bounds_and_alignment() {
    for (body, expected) in [
        ("ld.global.u32 %r0, [%address+8];", "out of bounds"),
        ("ld.global.u64 %da, [%address+4];", "misaligned"),
        ("st.global.u8 [%address+-1], %ra;", "out of bounds"),
        ("ld.global.u32 %r0, [%da];", "out of bounds"),
        ("ld.shared.u32 %r0, [%ra];", "out of bounds"),
    ] {
        let fault = try_evaluate(body, [0; 3]).unwrap_err();
        assert!(fault.to_string().contains(expected), "{body}: {fault}");
    }
}
