//! A module as data: what the parser makes and the executor runs.

use crate::fault::Fault;

/// The interpretation of a value's bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bits,
    Unsigned,
    Signed,
    Float,
    /// bf16
    Brain,
    Predicate,
}

/// An instruction type: `.u32`, `.f16x2`, `.pred` ...
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Type {
    pub kind: Kind,
    pub bytes: usize,
    /// 2 for `.f16x2` and `.bf16x2`.
    pub lanes: u8,
}

impl Type {
    pub fn is_float(self) -> bool {
        matches!(self.kind, Kind::Float | Kind::Brain)
    }

    pub fn is_signed(self) -> bool {
        self.kind == Kind::Signed
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Param,
    Global,
    Shared,
    Local,
}

/// Who is meant by an order: the block, the device, everyone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Cta,
    Gpu,
    Sys,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    /// `ld.global.nc`: outside the memory model; defined only for memory that nobody writes during the launch.
    NonCoherent,
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

/// What a load, store or atomic touches, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub space: Space,
    pub ty: Type,
    pub lanes: usize,
    pub order: Order,
    pub scope: Scope,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Low,
    High,
    Wide,
}

/// Operations on registers alone, of up to four operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compute {
    Add,
    Sub,
    Mul(Half),
    Mad(Half),
    Fma,
    Div,
    Rem,
    Neg,
    Abs,
    /// `true`: `.NaN`
    Min(bool),
    Max(bool),
    And,
    Or,
    Xor,
    Not,
    Shl,
    Shr,
    Sqrt,
    Rcp,
    Popc,
    Clz,
    Brev,
    Prmt,
    Lop3,
    Bfe,
    Bfi,
    /// Funnel shifts: `true` wraps the count, `false` clamps it.
    ShfLeft(bool),
    ShfRight(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// A comparison; `unordered`: the value it has when a float operand is NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    Compare { compare: Compare, unsigned: bool, unordered: bool },
    IsNan { expected: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Combine {
    None,
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// No modifier, or `.rn`: to the nearest, ties to even, where something is lost.
    Nearest,
    IntegerNearest,
    IntegerZero,
    IntegerDown,
    IntegerUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicFunction {
    Add,
    Min,
    Max,
    Exchange,
    CompareSwap,
    And,
    Or,
    Xor,
    Increment,
    Decrement,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Compute(Compute, Type),
    Test {
        test: Test,
        combine: Combine,
        ty: Type,
    },
    Select(Type),
    Convert {
        round: Round,
        saturate: bool,
        to: Type,
        from: Type,
    },
    Move(Type),
    /// `cvta`: `to` is from generic to the space.
    Generic {
        space: Space,
        to: bool,
    },
    Load(Access),
    Store(Access),
    Atomic {
        function: AtomicFunction,
        access: Access,
        returns: bool,
    },
    Barrier,
    WarpBarrier,
    Shuffle(Shuffle),
    Vote(Vote),
    Fence(Scope),
    Sleep,
    Branch(usize),
    Exit,
    Trap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    /// `%clock`, `%clock64`, `%globaltimer`: instructions executed so far, by all threads.
    Time,
}

#[derive(Debug, Clone)]
pub(crate) enum Operand {
    Register(usize),
    Immediate(u64),
    Special(Special),
    Vector(Vec<Operand>),
    Address {
        base: Box<Operand>,
        offset: i64,
    },
    /// Where the launch's dynamic shared memory begins.
    DynamicShared,
    /// `_`
    Sink,
}

#[derive(Debug, Clone)]
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Option<Guard>,
    pub operands: Vec<Operand>,
    pub ptx_line: u32,
    /// (file, line) of the last `.loc`.
    pub source: Option<(u32, u32)>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    pub register: usize,
    pub negated: bool,
}

/// One `.entry` of a module.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) parameter_bytes: usize,
    /// Offset and length of each parameter, in bytes.
    pub(crate) parameters: Vec<(usize, usize)>,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) registers: usize,
    pub(crate) shared_bytes: usize,
    pub(crate) local_bytes: usize,
    /// From `.maxntid` or `.reqntid`.
    pub(crate) max_threads: Option<u32>,
    /// Names of `.file` numbers.
    pub(crate) files: Vec<(u32, String)>,
}

impl Kernel {
    /// The name of the entry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offset and length of each parameter in the parameter space, in bytes.
    pub fn parameters(&self) -> &[(usize, usize)] {
        &self.parameters
    }

    /// Bytes of all parameters together.
    pub fn parameter_bytes(&self) -> usize {
        self.parameter_bytes
    }

    /// Threads a block may have at most, if the kernel says so.
    pub fn max_threads(&self) -> Option<u32> {
        self.max_threads
    }

    /// Static shared memory of a block.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Local memory of a thread.
    pub fn local_bytes(&self) -> usize {
        self.local_bytes
    }

    /// Virtual registers of a thread.
    pub fn len_registers(&self) -> usize {
        self.registers
    }

    /// How many instructions the kernel's text has.
    pub fn len_instructions(&self) -> usize {
        self.instructions.len()
    }

    /// Where an instruction is: its line of the PTX, and `file:line` of the source if the PTX has `.loc`.
    pub fn place(&self, instruction: usize) -> String {
        let Some(instruction) = self.instructions.get(instruction) else { return "the end".to_owned() };
        let source = self.source(instruction).map(|source| format!(" ({source})")).unwrap_or_default();
        format!("PTX line {}{source}", instruction.ptx_line)
    }

    pub(crate) fn source(&self, instruction: &Instruction) -> Option<String> {
        let (file, line) = instruction.source?;
        let name = self.files.iter().find(|(number, _)| *number == file).map_or("?", |(_, name)| name);
        Some(format!("{name}:{line}"))
    }
}

/// The kernels of one PTX text.
#[derive(Debug, Clone, Default)]
pub struct Module {
    pub(crate) kernels: Vec<Kernel>,
}

impl Module {
    /// Reads PTX text as nvcc writes it.
    ///
    /// # Errors
    /// [`Fault::Parse`] with the line and the text that is not understood.
    pub fn parse(text: &str) -> Result<Module, Fault> {
        crate::parse::module(text)
    }

    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`Fault::NoKernel`].
    pub fn kernel(&self, name: &str) -> Result<&Kernel, Fault> {
        self.kernels.iter().find(|kernel| kernel.name == name).ok_or_else(|| Fault::NoKernel {
            name: name.to_owned(),
            present: self.kernels.iter().map(|kernel| kernel.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// All kernels, in the order of the text.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }
}
