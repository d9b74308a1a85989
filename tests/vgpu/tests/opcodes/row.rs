//! One instruction and what it must do; and the kernel that does it to all combinations of sources.

use annulus_vgpu::{Arguments, Launch, Memory, Module, Options, run};

use crate::values::Value;

pub struct Row {
    /// As `names_of` gives it.
    pub name: &'static str,
    pub check: Box<dyn Fn()>,
}

impl Row {
    pub fn new(name: &'static str, check: impl Fn() + 'static) -> Row {
        Row { name, check: Box::new(check) }
    }
}

/// `name d, a, b, ..;` with `expected` of the sources in `d`.
pub fn row<S: Sources, R: Value>(name: &'static str, expected: fn(S) -> R) -> Row {
    let sources = ["", ", %a", ", %a, %b", ", %a, %b, %c", ", %a, %b, %c, %e"][S::REGISTERS.len()];
    Row::new(name, move || evaluate(&format!("{name} %d{sources};"), expected))
}

/// As [`row`], of an instruction that is written otherwise, or that needs others around it: `%a`, `%b`, `%c`, `%e` are the
/// sources, `%d` the result, `%x` the address of 32 bytes, `%h`, `%r`, `%s`, `%y` registers to spare.
pub fn row_by<S: Sources, R: Value>(name: &'static str, body: &'static str, expected: fn(S) -> R) -> Row {
    Row::new(name, move || evaluate(body, expected))
}

/// Where sources are loaded from: how registers are declared, and how they are moved.
type Register = (&'static str, &'static str);

const NAMES: [&str; 4] = ["%a", "%b", "%c", "%e"];
const SOURCE_BYTES: usize = 32;

/// A tuple of values.
pub trait Sources: Copy + 'static {
    const REGISTERS: &'static [Register];

    /// All combinations.
    fn all() -> Vec<Self>;

    fn to_bits(self) -> [u64; 4];
}

macro_rules! sources {
    ($($ty:ident $value:ident),+; $($pad:literal),*) => {
        impl<$($ty: Value),+> Sources for ($($ty,)+) {
            const REGISTERS: &'static [Register] = &[$(($ty::DECLARED, $ty::MOVED)),+];

            fn all() -> Vec<Self> {
                let mut all = Vec::new();
                sources!(@loop all, ($($value,)+); $($ty $value,)+);
                all
            }

            fn to_bits(self) -> [u64; 4] {
                let ($($value,)+) = self;
                [$($value.to_bits(),)+ $($pad),*]
            }
        }
    };
    (@loop $all:ident, $tuple:expr;) => {
        $all.push($tuple)
    };
    (@loop $all:ident, $tuple:expr; $ty:ident $value:ident, $($rest:tt)*) => {
        for $value in $ty::hard() {
            sources!(@loop $all, $tuple; $($rest)*);
        }
    };
}

sources!(A a; 0, 0, 0);
sources!(A a, B b; 0, 0);
sources!(A a, B b, C c; 0);
sources!(A a, B b, C c, E e;);

/// Threads of one launch; the virtual GPU looks through its blocks for the next one to start.
const LAUNCH: usize = 1024;

/// Runs `body` on all sources, one thread in a block of its own for each.
fn evaluate<S: Sources, R: Value>(body: &str, expected: fn(S) -> R) {
    let module = Module::parse(&text::<S, R>(body)).unwrap_or_else(|fault| panic!("{body}: {fault}"));
    for some in S::all().chunks(LAUNCH) {
        for (sources, result) in some.iter().zip(results(&module, some, body)) {
            let (wanted, bits) = (expected(*sources), &sources.to_bits()[..S::REGISTERS.len()]);
            assert!(wanted.is_in(result), "{body} of {bits:#x?}: {result:#x}, not {:#x}", wanted.to_bits());
        }
    }
}

fn results<S: Sources>(module: &Module, sources: &[S], body: &str) -> Vec<u64> {
    let (len, mut memory) = (sources.len(), Memory::new());
    let bytes: Vec<u8> = sources.iter().flat_map(|sources| sources.to_bits()).flat_map(u64::to_le_bytes).collect();
    let (sources, results) = (memory.alloc(&bytes), memory.alloc(&vec![0; 8 * len]));
    let arguments = Arguments::new().u64(sources).u64(results);
    let launch = Launch::new(module.kernel("k").unwrap(), len as u32, 1, arguments);
    let options = Options { detect_races: false, ..Options::default() };
    run(&[launch], &mut memory, &options).unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let words = memory.read(results, 8 * len).unwrap().chunks_exact(8);
    words.map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn text<S: Sources, R: Value>(body: &str) -> String {
    let mut text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 sources, .param .u64 results)\n{{\n\
        .reg .b16 %h; .reg .b32 %i, %r, %s; .reg .b64 %x, %y, %z, %offset; .reg {} %d;\n\
        ld.param.u64 %x, [sources]; ld.param.u64 %z, [results]; mov.u32 %i, %ctaid.x;\n\
        mul.wide.u32 %offset, %i, {SOURCE_BYTES}; add.s64 %x, %x, %offset; mul.wide.u32 %offset, %i, 8; add.s64 %z, %z, %offset;\n",
        R::DECLARED
    );
    for (i, ((declared, moved), name)) in S::REGISTERS.iter().zip(NAMES).enumerate() {
        text += &match *moved {
            "pred" => format!(".reg .pred {name}; ld.global.u32 %i, [%x+{}]; setp.ne.u32 {name}, %i, 0;\n", 8 * i),
            moved => format!(".reg {declared} {name}; ld.global.{moved} {name}, [%x+{}];\n", 8 * i),
        };
    }
    text += body;
    text += &match R::MOVED {
        "pred" => "\nselp.u32 %i, 1, 0, %d; st.global.u32 [%z], %i;\nret;\n}\n".to_owned(),
        moved => format!("\nst.global.{moved} [%z], %d;\nret;\n}}\n"),
    };
    text
}
