//! Which instructions the kernels may use: found once, then one function body compiled three times.
//!
//! A kernel is a struct of its arguments with [`Kernel::run`]; `dispatch` runs it inside a function that has the CPU's
//! features enabled, where the compiler inlines and vectorises it. No kernel may depend on the level in its results: every
//! lane structure is fixed, fused multiply-adds are written out, and Rust never contracts or reassociates on its own.

use std::cell::Cell;
use std::sync::OnceLock;

/// A set of CPU features the host kernels are compiled for. All levels give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What every CPU of the target architecture has.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (2013 on).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

thread_local! {
    /// Set only by [`Level::with`], and only to a level that the CPU has.
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

impl Level {
    /// Every level, the least first.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    /// The best level of this CPU.
    pub fn detected() -> Level {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    /// Runs `f` with the kernels of this thread held to this level; `None` if the CPU does not have it. For tests and
    /// comparisons.
    pub fn with<R>(self, f: impl FnOnce() -> R) -> Option<R> {
        struct Restore(Option<Level>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        if self > Level::detected() {
            return None;
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        Some(f())
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, _) => Level::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// A kernel with its arguments. `run` and everything it calls per element is `#[inline(always)]`: only what is inlined
/// is compiled for the level (a closure given to `map` is small and called in one place, so it is inlined, too). `level` is a constant
/// there; one above [`Level::Portable`] comes from `dispatch` alone.
pub(crate) trait Kernel {
    type Output;
    fn run(self, level: Level) -> Self::Output;
}

/// Runs `kernel` at the level of this thread.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match FORCED.get().unwrap_or_else(Level::detected) {
        Level::Portable => kernel.run(Level::Portable),
        // SAFETY: `detected` found these features, and a forced level is never above it.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { run_avx512(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        level => kernel.run(level),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Level::Avx2)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Level::Avx512)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Current;
    impl Kernel for Current {
        type Output = Level;
        fn run(self, level: Level) -> Level {
            level
        }
    }

    #[test]
    fn forced_levels_nest_and_are_restored() {
        assert_eq!(dispatch(Current), Level::detected());
        Level::Portable
            .with(|| {
                assert_eq!(dispatch(Current), Level::Portable);
                Level::detected().with(|| assert_eq!(dispatch(Current), Level::detected())).unwrap();
                assert_eq!(dispatch(Current), Level::Portable);
            })
            .unwrap();
        assert_eq!(dispatch(Current), Level::detected());
        for level in Level::ALL {
            assert_eq!(level.with(|| ()).is_some(), level <= Level::detected());
        }
    }
}
