//! The loop of `half512.rs` and `half256.rs`, which differ in registers and conversions: a macro, because a function that is
//! generic over them would be compiled without the instruction set.

pub(super) const BF16: u8 = 0;
pub(super) const F16: u8 = 1;
/// bf16 on processors that round to it in one instruction.
pub(super) const BF16_NATIVE: u8 = 2;

pub(super) const ADD: u8 = 0;
pub(super) const MIN: u8 = 1;
pub(super) const MAX: u8 = 2;

/// Defines `reduce_blocks` and `BLOCK` for registers of `$words` 16-bit words. `unpack` makes two registers of f32 of one,
/// `pack` one of two, `fold` combines two of f32.
macro_rules! half_blocks {
    ($features:literal, $words:literal, $load:ident, $store:ident, $set1:ident, $mul:ident, $div:ident) => {
        /// Elements of a register of 16-bit words.
        const WORDS: usize = $words;
        /// Elements of a block: two registers.
        pub(super) const BLOCK: usize = 2 * WORDS;

        /// Reduces the leading whole blocks of `terms` into `dests` and returns how many elements that were.
        ///
        /// # Safety
        /// As for [`super::combine::combine`], with elements of `FORMAT`; the processor has the instructions above.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn reduce_blocks<const FORMAT: u8>(
            how: Combine,
            terms: &[*const u8],
            dests: &[*mut u8],
            len_elems: usize,
        ) -> usize {
            let (one, count) = (1.0, how.world_size as f32);
            // SAFETY: the caller's promises.
            unsafe {
                match how.op {
                    ReduceOp::Sum => blocks::<FORMAT, ADD, false, false>(terms, dests, len_elems, one),
                    ReduceOp::Avg => blocks::<FORMAT, ADD, false, true>(terms, dests, len_elems, count),
                    ReduceOp::PremulSum(factor) => {
                        blocks::<FORMAT, ADD, true, false>(terms, dests, len_elems, factor as f32)
                    }
                    ReduceOp::Min => blocks::<FORMAT, MIN, false, false>(terms, dests, len_elems, one),
                    ReduceOp::Max => blocks::<FORMAT, MAX, false, false>(terms, dests, len_elems, one),
                }
            }
        }

        /// # Safety
        /// As for [`reduce_blocks`]. `number` is the factor if `SCALE`, the divisor if `DIVIDE`.
        #[target_feature(enable = $features)]
        unsafe fn blocks<const FORMAT: u8, const OP: u8, const SCALE: bool, const DIVIDE: bool>(
            terms: &[*const u8],
            dests: &[*mut u8],
            len_elems: usize,
            number: f32,
        ) -> usize {
            let Some((first, others)) = terms.split_first() else { return 0 };
            let number = $set1(number);
            let whole = len_elems / BLOCK * BLOCK;
            for at in (0..whole).step_by(BLOCK) {
                // Both registers are read from every term before either is written: twice as many fetches under way.
                let (near, far) = (2 * at, 2 * (at + WORDS));
                // SAFETY: `at + BLOCK <= len_elems` elements are inside every term.
                let load = |term: &*const u8, offset| unsafe {
                    let [a, b] = unpack::<FORMAT>($load(term.add(offset).cast()));
                    if SCALE { [$mul(a, number), $mul(b, number)] } else { [a, b] }
                };
                let (mut acc_near, mut acc_far) = (load(first, near), load(first, far));
                for term in others {
                    let (term_near, term_far) = (load(term, near), load(term, far));
                    acc_near = [fold::<OP>(acc_near[0], term_near[0]), fold::<OP>(acc_near[1], term_near[1])];
                    acc_far = [fold::<OP>(acc_far[0], term_far[0]), fold::<OP>(acc_far[1], term_far[1])];
                }
                if DIVIDE {
                    acc_near = [$div(acc_near[0], number), $div(acc_near[1], number)];
                    acc_far = [$div(acc_far[0], number), $div(acc_far[1], number)];
                }
                let (near_words, far_words) = (pack::<FORMAT>(acc_near), pack::<FORMAT>(acc_far));
                for dest in dests {
                    // SAFETY: as above, for every destination; every term of the block was read.
                    unsafe {
                        $store(dest.add(near).cast(), near_words);
                        $store(dest.add(far).cast(), far_words);
                    }
                }
            }
            whole
        }
    };
}
pub(super) use half_blocks;
