//! `ld.acquire.sys.global.u32` and its like to [`Op`]. Every modifier must be understood: one that is left over is an error.

use super::Parsed;
use crate::ptx::{
    Access, AtomicFunction, Combine, Compare, Compute, Half, Kind, Op, Order, Round, Scope, Shuffle, Space, Test, Type,
    Vote,
};

/// A type's name without its dot.
pub(super) fn ty(name: &str) -> Option<Type> {
    let (kind, digits) = match name {
        "pred" => return Some(Type { kind: Kind::Predicate, bytes: 1, lanes: 1 }),
        "f16x2" => return Some(Type { kind: Kind::Float, bytes: 4, lanes: 2 }),
        "bf16x2" => return Some(Type { kind: Kind::Brain, bytes: 4, lanes: 2 }),
        "bf16" => (Kind::Brain, "16"),
        _ => {
            let kind = match name.chars().next()? {
                'b' => Kind::Bits,
                'u' => Kind::Unsigned,
                's' => Kind::Signed,
                'f' => Kind::Float,
                _ => return None,
            };
            (kind, &name[1..])
        }
    };
    let bytes = match digits {
        "8" => 1,
        "16" => 2,
        "32" => 4,
        "64" => 8,
        _ => return None,
    };
    (kind != Kind::Float || bytes > 1).then_some(Type { kind, bytes, lanes: 1 })
}

/// The modifiers of one instruction that are not yet understood.
struct Modifiers<'a>(Vec<&'a str>);

impl Modifiers<'_> {
    fn take(&mut self, name: &str) -> bool {
        let at = self.0.iter().position(|modifier| *modifier == name);
        at.map(|at| self.0.remove(at)).is_some()
    }

    fn choice<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(name, _)| self.take(name)).map(|(_, value)| *value)
    }

    fn ty(&mut self) -> Parsed<Type> {
        let at = self.0.iter().position(|modifier| ty(modifier).is_some()).ok_or("no type")?;
        ty(self.0.remove(at)).ok_or_else(|| "no type".to_owned())
    }

    fn scope(&mut self) -> Option<Scope> {
        self.choice(&[("cta", Scope::Cta), ("gpu", Scope::Gpu), ("gl", Scope::Gpu), ("sys", Scope::Sys)])
    }

    fn space(&mut self) -> Space {
        let spaces =
            [("param", Space::Param), ("global", Space::Global), ("shared", Space::Shared), ("local", Space::Local)];
        self.choice(&spaces).unwrap_or(Space::Generic)
    }

    /// f32 and f64 arithmetic must say that it rounds to nearest, or not round at all.
    fn rounded(&mut self, ty: Type, required: bool) -> Parsed<()> {
        match self.take("rn") || !required || !ty.is_float() {
            true => Ok(()),
            false => Err("only the rounding .rn is supported".to_owned()),
        }
    }
}

pub(super) fn decode(code: &str) -> Parsed<Op> {
    let mut parts = code.split('.');
    let name = parts.next().unwrap_or("");
    let mut modifiers = Modifiers(parts.collect());
    let op = match name {
        "ld" | "st" => memory(name, &mut modifiers)?,
        "atom" | "red" => atomic(name == "atom", &mut modifiers)?,
        "setp" => test(&mut modifiers)?,
        "cvt" => convert(&mut modifiers)?,
        "selp" => Op::Select(modifiers.ty()?),
        "mov" => Op::Move(modifiers.ty()?),
        "cvta" => {
            let op = Op::Generic { to: modifiers.take("to"), space: modifiers.space() };
            modifiers.ty()?;
            op
        }
        "bar" | "barrier" => {
            let warp = modifiers.take("warp");
            modifiers.take("cta");
            modifiers.take("aligned");
            if !modifiers.take("sync") {
                return Err("only .sync is supported".to_owned());
            }
            if warp { Op::WarpBarrier } else { Op::Barrier }
        }
        "shfl" => {
            modifiers.take("sync");
            let modes =
                [("up", Shuffle::Up), ("down", Shuffle::Down), ("bfly", Shuffle::Butterfly), ("idx", Shuffle::Index)];
            let mode = modifiers.choice(&modes).ok_or("no shuffle mode")?;
            modifiers.take("b32");
            Op::Shuffle(mode)
        }
        "vote" => {
            modifiers.take("sync");
            let modes = [("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uniform), ("ballot", Vote::Ballot)];
            let mode = modifiers.choice(&modes).ok_or("no vote mode")?;
            modifiers.ty()?;
            Op::Vote(mode)
        }
        "membar" => Op::Fence(modifiers.scope().ok_or("no scope")?),
        "fence" => {
            if !modifiers.take("acq_rel") {
                modifiers.take("sc");
            }
            Op::Fence(modifiers.scope().ok_or("no scope")?)
        }
        "nanosleep" => {
            modifiers.ty()?;
            Op::Sleep
        }
        "bra" => {
            modifiers.take("uni");
            Op::Branch(usize::MAX)
        }
        "ret" | "exit" => {
            modifiers.take("uni");
            Op::Exit
        }
        "trap" => Op::Trap,
        _ => compute(name, &mut modifiers)?,
    };
    match modifiers.0.first() {
        Some(left) => Err(format!("modifier .{left} is not supported")),
        None => Ok(op),
    }
}

fn compute(name: &str, modifiers: &mut Modifiers<'_>) -> Parsed<Op> {
    let half = |modifiers: &mut Modifiers<'_>| {
        let halves = [("lo", Half::Low), ("hi", Half::High), ("wide", Half::Wide)];
        modifiers.choice(&halves).unwrap_or(Half::Low)
    };
    let nan = modifiers.take("NaN");
    let compute = match name {
        "add" => Compute::Add,
        "sub" => Compute::Sub,
        "mul" => Compute::Mul(half(modifiers)),
        "mad" => Compute::Mad(half(modifiers)),
        "fma" => Compute::Fma,
        "div" => Compute::Div,
        "rem" => Compute::Rem,
        "neg" => Compute::Neg,
        "abs" => Compute::Abs,
        "min" => Compute::Min(nan),
        "max" => Compute::Max(nan),
        "and" => Compute::And,
        "or" => Compute::Or,
        "xor" => Compute::Xor,
        "not" => Compute::Not,
        "shl" => Compute::Shl,
        "shr" => Compute::Shr,
        "sqrt" => Compute::Sqrt,
        "rcp" => Compute::Rcp,
        "popc" => Compute::Popc,
        "clz" => Compute::Clz,
        "brev" => Compute::Brev,
        "prmt" => Compute::Prmt,
        "lop3" => Compute::Lop3,
        "bfe" => Compute::Bfe,
        "bfi" => Compute::Bfi,
        "shf" => {
            let (left, _) = (modifiers.take("l"), modifiers.take("r"));
            let wrap = modifiers.take("wrap");
            modifiers.take("clamp");
            if left { Compute::ShfLeft(wrap) } else { Compute::ShfRight(wrap) }
        }
        _ => return Err("unknown instruction".to_owned()),
    };
    let ty = modifiers.ty()?;
    if nan && !ty.is_float() {
        return Err("modifier .NaN on integers".to_owned());
    }
    if ty.is_float() && (ty.kind == Kind::Brain || ty.bytes == 2 || ty.lanes == 2) {
        return Err("16-bit float arithmetic is not supported".to_owned());
    }
    let integers_only = !matches!(
        compute,
        Compute::Add
            | Compute::Sub
            | Compute::Mul(Half::Low)
            | Compute::Fma
            | Compute::Div
            | Compute::Neg
            | Compute::Abs
            | Compute::Min(_)
            | Compute::Max(_)
            | Compute::Sqrt
            | Compute::Rcp
    );
    let floats_only = matches!(compute, Compute::Fma | Compute::Sqrt | Compute::Rcp);
    if (integers_only && ty.is_float()) || (floats_only && !ty.is_float()) {
        return Err("no such instruction for this type".to_owned());
    }
    // add, sub and mul without a rounding mean .rn too, but leave `ptxas` free to contract them.
    modifiers.rounded(ty, matches!(compute, Compute::Fma | Compute::Div | Compute::Sqrt | Compute::Rcp))?;
    Ok(Op::Compute(compute, ty))
}

fn test(modifiers: &mut Modifiers<'_>) -> Parsed<Op> {
    let compare = |compare, unsigned, unordered| Test::Compare { compare, unsigned, unordered };
    let tests = [
        ("eq", compare(Compare::Eq, false, false)),
        ("ne", compare(Compare::Ne, false, false)),
        ("lt", compare(Compare::Lt, false, false)),
        ("le", compare(Compare::Le, false, false)),
        ("gt", compare(Compare::Gt, false, false)),
        ("ge", compare(Compare::Ge, false, false)),
        ("lo", compare(Compare::Lt, true, false)),
        ("ls", compare(Compare::Le, true, false)),
        ("hi", compare(Compare::Gt, true, false)),
        ("hs", compare(Compare::Ge, true, false)),
        ("equ", compare(Compare::Eq, false, true)),
        ("neu", compare(Compare::Ne, false, true)),
        ("ltu", compare(Compare::Lt, false, true)),
        ("leu", compare(Compare::Le, false, true)),
        ("gtu", compare(Compare::Gt, false, true)),
        ("geu", compare(Compare::Ge, false, true)),
        ("num", Test::IsNan { expected: false }),
        ("nan", Test::IsNan { expected: true }),
    ];
    let test = modifiers.choice(&tests).ok_or("no comparison")?;
    let combines = [("and", Combine::And), ("or", Combine::Or), ("xor", Combine::Xor)];
    let combine = modifiers.choice(&combines).unwrap_or(Combine::None);
    let ty = modifiers.ty()?;
    if ty.is_float() && (ty.bytes == 2 || ty.lanes == 2 || ty.kind == Kind::Brain) {
        return Err("16-bit float comparison is not supported".to_owned());
    }
    Ok(Op::Test { test, combine, ty })
}

fn convert(modifiers: &mut Modifiers<'_>) -> Parsed<Op> {
    let rounds = [
        ("rn", Round::Nearest),
        ("rni", Round::IntegerNearest),
        ("rzi", Round::IntegerZero),
        ("rmi", Round::IntegerDown),
        ("rpi", Round::IntegerUp),
    ];
    let round = modifiers.choice(&rounds);
    let saturate = modifiers.take("sat") || modifiers.take("satfinite");
    let (to, from) = (modifiers.ty()?, modifiers.ty()?);
    let wide = |ty: Type| ty.kind == Kind::Float && ty.bytes >= 4 && ty.lanes == 1;
    let supported = match (to.is_float(), from.is_float()) {
        (false, false) => true,
        (true, false) => wide(to),
        (false, true) => from.lanes == 1 && round.is_some_and(|round| round != Round::Nearest),
        // To 16 bits only from f32; pairs take two sources.
        (true, true) if wide(to) => from.lanes == 1 && !saturate,
        (true, true) => from == Type { kind: Kind::Float, bytes: 4, lanes: 1 } && round == Some(Round::Nearest),
    };
    match supported {
        true => Ok(Op::Convert { round: round.unwrap_or(Round::Nearest), saturate, to, from }),
        false => Err("this conversion is not supported".to_owned()),
    }
}

fn order(modifiers: &mut Modifiers<'_>) -> Option<Order> {
    modifiers.choice(&[
        ("relaxed", Order::Relaxed),
        ("acquire", Order::Acquire),
        ("release", Order::Release),
        ("acq_rel", Order::AcquireRelease),
        ("weak", Order::Weak),
    ])
}

fn memory(name: &str, modifiers: &mut Modifiers<'_>) -> Parsed<Op> {
    let volatile = modifiers.take("volatile");
    let non_coherent = modifiers.take("nc");
    let written = order(modifiers);
    let (order, scope) = match (volatile, non_coherent, written) {
        // PTX ISA 8.2: volatile is relaxed with system scope, as far as the memory model goes.
        (true, false, None) => (Order::Relaxed, Scope::Sys),
        (false, true, None) => (Order::NonCoherent, Scope::Cta),
        (false, false, None | Some(Order::Weak)) => (Order::Weak, Scope::Cta),
        (false, false, Some(order)) => (order, modifiers.scope().ok_or("an order without a scope")?),
        _ => return Err("contradictory orders".to_owned()),
    };
    match (name, order) {
        ("ld", Order::Release | Order::AcquireRelease) | ("st", Order::Acquire | Order::AcquireRelease) => {
            return Err("no such order here".to_owned());
        }
        ("st", Order::NonCoherent) => return Err("no such order here".to_owned()),
        _ => {}
    }
    let space = modifiers.space();
    // Hints about caches change no value.
    for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate", "L1", "L2::128B", "L2::256B"] {
        modifiers.take(hint);
    }
    let lanes = modifiers.choice(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
    let access = Access { space, ty: modifiers.ty()?, lanes, order, scope };
    Ok(if name == "ld" { Op::Load(access) } else { Op::Store(access) })
}

fn atomic(returns: bool, modifiers: &mut Modifiers<'_>) -> Parsed<Op> {
    let order = order(modifiers).unwrap_or(Order::Relaxed);
    let scope = modifiers.scope().unwrap_or(Scope::Gpu);
    let space = modifiers.space();
    let functions = [
        ("add", AtomicFunction::Add),
        ("min", AtomicFunction::Min),
        ("max", AtomicFunction::Max),
        ("exch", AtomicFunction::Exchange),
        ("cas", AtomicFunction::CompareSwap),
        ("and", AtomicFunction::And),
        ("or", AtomicFunction::Or),
        ("xor", AtomicFunction::Xor),
        ("inc", AtomicFunction::Increment),
        ("dec", AtomicFunction::Decrement),
    ];
    let function = modifiers.choice(&functions).ok_or("no atomic function")?;
    let access = Access { space, ty: modifiers.ty()?, lanes: 1, order, scope };
    if access.ty.is_float() {
        return Err("atomics on floats are not supported: their result depends on the order of threads".to_owned());
    }
    Ok(Op::Atomic { function, access, returns })
}

/// How many operands an instruction may have.
pub(super) fn operand_counts(op: &Op) -> std::ops::RangeInclusive<usize> {
    match op {
        Op::Compute(compute, _) => {
            let n = match compute {
                Compute::Neg | Compute::Abs | Compute::Not | Compute::Sqrt | Compute::Rcp => 2,
                Compute::Popc | Compute::Clz | Compute::Brev => 2,
                Compute::Mad(_) | Compute::Fma | Compute::Prmt | Compute::Bfe => 4,
                Compute::ShfLeft(_) | Compute::ShfRight(_) => 4,
                Compute::Lop3 | Compute::Bfi => 5,
                _ => 3,
            };
            n..=n
        }
        Op::Test { combine: Combine::None, .. } => 3..=3,
        Op::Test { .. } | Op::Select(_) => 4..=4,
        Op::Convert { to, .. } => usize::from(to.lanes) + 1..=usize::from(to.lanes) + 1,
        Op::Move(_) | Op::Generic { .. } | Op::Load(_) | Op::Store(_) => 2..=2,
        Op::Atomic { function, returns, .. } => {
            let n = 2 + usize::from(*returns) + usize::from(*function == AtomicFunction::CompareSwap);
            n..=n
        }
        Op::Barrier => 1..=2,
        Op::WarpBarrier | Op::Sleep => 1..=1,
        Op::Shuffle(_) => 5..=5,
        Op::Vote(_) => 3..=3,
        Op::Fence(_) | Op::Branch(_) | Op::Exit | Op::Trap => 0..=0,
    }
}
