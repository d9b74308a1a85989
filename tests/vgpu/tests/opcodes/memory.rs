//! Loads, stores and atomics: which bytes, in which order, of which space. (Bounds and alignment: `semantics.rs`.)

use annulus_vgpu::{Arguments, Fault, Launch, Memory, Module, Options, run};

use crate::row::{Row, row_by};

pub fn rows() -> Vec<Row> {
    LOADS.into_iter().map(load).chain(STORES.into_iter().map(store)).chain(atomics()).chain(addresses()).collect()
}

/// Orders change no value; what they order, `races.rs` says.
const LOADS: [&str; 33] = [
    "ld.acquire.sys.global.u32",
    "ld.global.f32",
    "ld.global.cs.v4.u32",
    "ld.global.f64",
    "ld.global.u16",
    "ld.global.u32",
    "ld.global.u64",
    "ld.global.u8",
    "ld.global.v2.f32",
    "ld.global.v2.f64",
    "ld.global.v2.u32",
    "ld.global.v2.u64",
    "ld.global.v2.u8",
    "ld.global.v4.f32",
    "ld.global.v4.u32",
    "ld.param.f32",
    "ld.param.f64",
    "ld.param.u32",
    "ld.param.u64",
    "ld.param.u8",
    "ld.param.v2.u16",
    "ld.param.v2.u32",
    "ld.relaxed.sys.global.u32",
    "ld.relaxed.sys.global.u64",
    "ld.shared.f32",
    "ld.shared.f64",
    "ld.shared.u16",
    "ld.shared.u32",
    "ld.shared.u64",
    "ld.shared.u8",
    "ld.shared.v2.u32",
    "ld.shared.v2.u8",
    "ld.u32",
];

const STORES: [&str; 25] = [
    "st.global.cs.v4.u32",
    "st.global.f32",
    "st.global.f64",
    "st.global.u16",
    "st.global.u32",
    "st.global.u64",
    "st.global.u8",
    "st.global.v2.f32",
    "st.global.v2.u32",
    "st.global.v4.u32",
    "st.relaxed.sys.global.u32",
    "st.relaxed.sys.global.u64",
    "st.release.sys.global.u32",
    "st.shared.f32",
    "st.shared.f64",
    "st.shared.u16",
    "st.shared.u32",
    "st.shared.u64",
    "st.shared.u8",
    "st.shared.v2.u32",
    "st.shared.v2.u8",
    "st.shared.v4.u16",
    "st.shared.v4.u8",
    "st.shared.v4.u32",
    "st.u32",
];

/// Bytes of the memory that is read or written.
const LEN: usize = 64;
/// Where in it the base register points: what is touched lies behind or before it.
const BASE: usize = 32;
/// What stands where nothing was stored.
const UNTOUCHED: u8 = 0x5c;

/// All different, most with the highest bit.
fn pattern() -> [u8; LEN] {
    std::array::from_fn(|i| 0x87 ^ (i as u8).wrapping_mul(0x1d))
}

/// Lanes, their type and their bytes.
struct Shape {
    lanes: usize,
    ty: &'static str,
    lane_bytes: usize,
}

fn shape(name: &'static str) -> Shape {
    let lanes = name.split('.').find_map(|part| part.strip_prefix('v')?.parse().ok()).unwrap_or(1);
    let ty = name.rsplit('.').next().unwrap();
    Shape { lanes, ty, lane_bytes: ty[1..].parse::<usize>().unwrap() / 8 }
}

/// Runs `body` by one thread. `%x` is the address of the pattern, of which `bytes` is a copy in parameter space and `sh` one in
/// shared memory; `%z` is that of the results, 64 bytes, which are returned.
fn try_run(body: &str) -> Result<[u8; LEN], Fault> {
    let lines = |line: fn(usize) -> String| (0..LEN).map(line).collect::<String>();
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .align 16 .b8 bytes[{LEN}], .param .u64 from, \
        .param .u64 results)\n{{\n.reg .b64 %x, %z, %base, %wide; .reg .b32 %r, %s; .reg .b16 %h;\n\
        .shared .align 16 .b8 before[16]; .shared .align 16 .b8 sh[{LEN}];\nld.param.u64 %x, [from]; ld.param.u64 %z, [results];\n\
        {}{body}\nret;\n}}\n",
        lines(|i| format!("ld.global.u8 %h, [%x+{i}]; st.shared.u8 [sh+{i}], %h;\n")),
    );
    let module = Module::parse(&text)?;
    let mut memory = Memory::new();
    let (from, results) = (memory.alloc(&pattern()), memory.alloc(&[UNTOUCHED; LEN]));
    let arguments = [pattern().to_vec(), from.to_le_bytes().to_vec(), results.to_le_bytes().to_vec()].concat();
    run(&[Launch::new(module.kernel("k")?, 1, 1, Arguments::from_bytes(arguments))], &mut memory, &Options::default())?;
    Ok(memory.read(results, LEN).unwrap().try_into().unwrap())
}

#[track_caller]
fn results_of(body: &str) -> [u8; LEN] {
    try_run(body).unwrap_or_else(|fault| panic!("{body}: {fault}"))
}

/// Whether the instruction has the modifier.
fn has(name: &str, modifier: &str) -> bool {
    name.split('.').any(|part| part == modifier)
}

/// Ways to make `%base` the address of byte [`BASE`] in the memory that `name` reaches: one, or for a generic address several.
fn bases(name: &str, global: &str) -> Vec<String> {
    let shared = format!("mov.u32 %r, sh; cvt.u64.u32 %base, %r; add.s64 %base, %base, {BASE};\n");
    let global = format!("add.s64 %base, {global}, {BASE};\n");
    match name {
        name if has(name, "global") => vec![global],
        name if has(name, "shared") => vec![shared],
        name if has(name, "param") => vec![format!("mov.b64 %base, bytes; add.s64 %base, %base, {BASE};\n")],
        _ => vec![global, format!("{shared}cvta.shared.u64 %base, %base;\n")],
    }
}

/// What is touched, behind and before the base.
fn offsets(shape: &Shape) -> [i64; 2] {
    let len_bytes = (shape.lanes * shape.lane_bytes) as i64;
    [len_bytes, -len_bytes]
}

fn brace(lanes: usize) -> String {
    let names: Vec<String> = (0..lanes).map(|lane| format!("%l{lane}")).collect();
    if lanes == 1 { names.concat() } else { format!("{{{}}}", names.join(", ")) }
}

fn declared(shape: &Shape) -> String {
    let register = match shape.ty {
        "f32" => ".f32",
        "f64" => ".f64",
        ty if ty.ends_with("64") => ".b64",
        ty if ty.ends_with("32") => ".b32",
        _ => ".b16",
    };
    format!(".reg {register} %l<4>;\n")
}

/// Every lane is stored in 64 bits of its own, with zeros above.
fn load(name: &'static str) -> Row {
    Row::new(name, move || {
        let shape = shape(name);
        for base in bases(name, "%x") {
            for offset in offsets(&shape) {
                let mut body = format!("{}{base}{name} {}, [%base+{offset}];\n", declared(&shape), brace(shape.lanes));
                let mut expected = [UNTOUCHED; LEN];
                for lane in 0..shape.lanes {
                    body += &match shape.ty {
                        "f32" => format!("mov.b32 %r, %l{lane}; cvt.u64.u32 %wide, %r; "),
                        "f64" => format!("mov.b64 %wide, %l{lane}; "),
                        ty if ty.ends_with("64") => format!("mov.b64 %wide, %l{lane}; "),
                        ty if ty.ends_with("32") => format!("cvt.u64.u32 %wide, %l{lane}; "),
                        _ => format!("cvt.u64.u16 %wide, %l{lane}; "),
                    };
                    body += &format!("st.global.u64 [%z+{}], %wide;\n", 8 * lane);
                    let at = (BASE as i64 + offset) as usize + lane * shape.lane_bytes;
                    let mut value = [0; 8];
                    value[..shape.lane_bytes].copy_from_slice(&pattern()[at..at + shape.lane_bytes]);
                    expected[8 * lane..8 * lane + 8].copy_from_slice(&value);
                }
                assert_eq!(results_of(&body), expected, "{body}");
            }
        }
    })
}

/// The lanes are the low bits of the pattern's words of 64 bits; every byte beside what is stored must stay.
fn store(name: &'static str) -> Row {
    Row::new(name, move || {
        let shape = shape(name);
        for (way, base) in bases(name, "%z").into_iter().enumerate() {
            let is_shared = has(name, "shared") || way == 1;
            for offset in offsets(&shape) {
                let mut body = format!("{}{base}", declared(&shape));
                let mut expected = if is_shared { pattern() } else { [UNTOUCHED; LEN] };
                for lane in 0..shape.lanes {
                    body += &format!("ld.param.u64 %wide, [bytes+{}]; ", 8 * lane);
                    body += &match shape.ty {
                        "f32" => format!("cvt.u32.u64 %r, %wide; mov.b32 %l{lane}, %r;\n"),
                        "f64" => format!("mov.b64 %l{lane}, %wide;\n"),
                        ty if ty.ends_with("64") => format!("mov.b64 %l{lane}, %wide;\n"),
                        ty if ty.ends_with("32") => format!("cvt.u32.u64 %l{lane}, %wide;\n"),
                        _ => format!("cvt.u16.u64 %l{lane}, %wide;\n"),
                    };
                    let at = (BASE as i64 + offset) as usize + lane * shape.lane_bytes;
                    let low = &pattern()[8 * lane..8 * lane + shape.lane_bytes];
                    expected[at..at + shape.lane_bytes].copy_from_slice(low);
                }
                body += &format!("{name} [%base+{offset}], {};\n", brace(shape.lanes));
                if is_shared {
                    (0..LEN).for_each(|i| body += &format!("ld.shared.u8 %h, [sh+{i}]; st.global.u8 [%z+{i}], %h;\n"));
                }
                assert_eq!(results_of(&body), expected, "{body}");
            }
        }
    })
}

/// What was there before (low half) and what is there afterwards (high half).
fn atomics() -> Vec<Row> {
    fn both(before: u32, after: u32) -> u64 {
        u64::from(after) << 32 | u64::from(before)
    }
    vec![
        // Past the bound it begins again; so a counter of arrivals needs no reset.
        row_by(
            "atom.acq_rel.gpu.global.inc.u32",
            "atom.acq_rel.gpu.global.inc.u32 %r, [%x], %b; ld.global.u32 %s, [%x]; mov.b64 %d, {%r, %s};",
            |(a, b): (u32, u32)| both(a, if a >= b { 0 } else { a + 1 }),
        ),
        row_by(
            "red.relaxed.gpu.global.or.b32",
            "red.relaxed.gpu.global.or.b32 [%x], %b; ld.global.u32 %s, [%x]; mov.b64 %d, {%a, %s};",
            |(a, b): (u32, u32)| both(a, a | b),
        ),
        row_by(
            "atom.shared.add.u32",
            ".shared .align 4 .b32 sh; st.shared.u32 [sh], %a; mov.u32 %s, sh; atom.shared.add.u32 %r, [%s], %b;\n\
            ld.shared.u32 %s, [sh]; mov.b64 %d, {%r, %s};",
            |(a, b): (u32, u32)| both(a, a.wrapping_add(b)),
        ),
        row_by(
            "atom.shared.exch.b32",
            ".shared .align 4 .b32 sh; st.shared.u32 [sh], %a; mov.u32 %s, sh; atom.shared.exch.b32 %r, [%s], %b;\n\
            ld.shared.u32 %s, [sh]; mov.b64 %d, {%r, %s};",
            |(a, b): (u32, u32)| both(a, b),
        ),
    ]
}

fn addresses() -> Vec<Row> {
    vec![
        // Generic addresses of global memory are its own.
        row_by("cvta.to.global.u64", "cvta.to.global.u64 %y, %x; ld.global.u64 %d, [%y];", |(a,): (u64,)| a),
    ]
}

#[test]
fn generic_addresses_of_shared_memory_lead_back_to_it() {
    let bytes = results_of(
        "mov.u32 %r, sh; cvt.u64.u32 %base, %r; cvta.shared.u64 %wide, %base; cvta.to.shared.u64 %wide, %wide;\n\
        sub.s64 %wide, %wide, %base; st.global.u64 [%z], %wide;",
    );
    assert_eq!(bytes[..8], [0; 8]);
}

#[test]
fn arguments_are_read_by_name_and_cannot_be_written() {
    let bytes = results_of("ld.param.u64 %wide, [bytes+8]; st.global.u64 [%z], %wide;");
    assert_eq!(bytes[..8], pattern()[8..16]);
    let fault = try_run("st.param.u64 [bytes], %wide;").unwrap_err();
    assert!(matches!(fault, Fault::OutOfBounds { space: "parameter", .. }), "{fault}");
}

#[test]
fn dynamic_shared_memory_lies_behind_the_static_and_ends_with_the_launch() {
    // 20 bytes are static, so the dynamic ones begin at 32.
    let kernel = |at: usize| {
        Module::parse(&format!(
            ".extern .shared .align 16 .b8 more[];\n.visible .entry k(.param .u64 results)\n{{\n.reg .b64 %z; .reg .b32 %r, %s;\n\
            .shared .align 4 .b8 sh[20];\nld.param.u64 %z, [results];\nmov.u32 %r, sh; st.shared.u32 [%r+16], 7;\n\
            mov.u32 %r, more; st.shared.u32 [%r+{at}], 9; ld.shared.u32 %s, [%r+{at}]; st.global.u32 [%z], %s;\n\
            ld.shared.u32 %s, [sh+16]; st.global.u32 [%z+4], %s; st.global.u32 [%z+8], %r;\nret;\n}}\n"
        ))
        .unwrap()
    };
    let run_with = |at: usize, shared_bytes: usize| {
        let (module, mut memory) = (kernel(at), Memory::new());
        let results = memory.alloc(&[0; 12]);
        let launch =
            Launch { shared_bytes, ..Launch::new(module.kernel("k").unwrap(), 1, 1, Arguments::new().u64(results)) };
        run(&[launch], &mut memory, &Options::default())?;
        let word = |i: u64| u32::from_le_bytes(memory.read(results + 4 * i, 4).unwrap().try_into().unwrap());
        Ok::<_, Fault>([word(0), word(1), word(2)])
    };
    assert_eq!(run_with(0, 4).unwrap(), [9, 7, 32]);
    assert_eq!(run_with(60, 64).unwrap(), [9, 7, 32]);
    for (at, shared_bytes) in [(0, 0), (4, 4), (64, 64)] {
        let fault = run_with(at, shared_bytes).unwrap_err();
        assert!(matches!(fault, Fault::OutOfBounds { space: "shared", .. }), "{fault}");
    }
}
