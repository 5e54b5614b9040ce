//! The definitions that take the longest, compiled once more for x86-64 CPUs with FMA: the same
//! source and so the same bits, but there `mul_add` is one instruction and not a call.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "calls behind a detected feature")
)]

use std::ops::Range;

use crate::float_matrix::FloatMatrix;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{AttentionState, Columns, KvBlock, Quantised};

/// Gives each definition its second copy and chooses between them.
macro_rules! fused {
    ($($module:ident :: $name:ident ( $($argument:ident : $type:ty),* );)*) => {
        $(pub(crate) fn $name($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "fma")]
                fn with_fma($($argument: $type),*) {
                    super::$module::$name($($argument),*);
                }
                if is_x86_feature_detected!("fma") {
                    // SAFETY: FMA was detected on this CPU.
                    return unsafe { with_fma($($argument),*) };
                }
            }
            super::$module::$name($($argument),*);
        })*
    };
}

fused! {
    products::ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>);
    products::head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>);
    attention::attend_block(q: &[f32], block: KvBlock<'_>, filled: usize, s: &mut AttentionState<'_>);
    attention::attend_group(q: &[f32], block: KvBlock<'_>, next: Option<KvBlock<'_>>, filled: &[u8], states: &mut [f32]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float_matrix::FloatKind;
    use crate::scalar::{attention, products};
    use crate::views::{ATTENTION_STATE_HEADER, KV_BLOCK_TOKENS};

    /// Floats of many magnitudes and both signs, the same for the same seed.
    fn floats(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(state & 0x8fff_ffff | 0x3800_0000)
        };
        (0..count).map(|_| next()).collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn both_copies_give_the_same_bits() {
        let (rows, cols) = (7, 83);
        let weights: Vec<u16> =
            floats(rows * cols, 1).iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        let w = FloatMatrix::new(FloatKind::Bf16, &weights, rows, cols).unwrap();
        let x = floats(2 * cols, 2);
        let product = |f: fn(FloatMatrix<'_>, Range<usize>, &[f32], Columns<'_>)| {
            let mut y = vec![0.0; 2 * rows];
            f(w, 0..rows, &x, Columns::new(&mut y, rows, 0..rows));
            bits(&y)
        };
        assert_eq!(product(head), product(products::head));

        let d = 24;
        let (k, v) = (floats(d * KV_BLOCK_TOKENS, 3), floats(d * KV_BLOCK_TOKENS, 4));
        let q = floats(d, 5);
        let attend = |f: fn(&[f32], KvBlock<'_>, usize, &mut AttentionState<'_>)| {
            let mut memory = vec![0.0; ATTENTION_STATE_HEADER + d];
            let mut state = AttentionState::over(&mut memory);
            state.reset();
            f(&q, KvBlock::F32 { k: &k, v: &v }, 29, &mut state);
            bits(&memory)
        };
        assert_eq!(attend(attend_block), attend(attention::attend_block));
    }
}
