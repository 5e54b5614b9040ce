//! Activations to int8, 16 at a time.

use std::arch::aarch64::*;

use super::{WIDTH, load, store_i8};
use crate::backend::NotFinite;
use crate::scalar::quantise::{MIN_ABSMAX, round};

/// Activations in a register of int8.
const BATCH: usize = 16;

#[target_feature(enable = "neon")]
pub(super) fn quantise(x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite> {
    let absmax = absmax(x);
    if !absmax.is_finite() {
        let index = x.iter().position(|x| !x.is_finite()).unwrap_or_default();
        return Err(NotFinite { index });
    }
    let s = 127.0 / absmax.max(MIN_ABSMAX);

    let (q, padding) = q.split_at_mut(x.len());
    padding.fill(0);
    let (x_batches, x_tail) = x.as_chunks::<BATCH>();
    let (q_batches, q_tail) = q.as_chunks_mut::<BATCH>();
    let mut sums = vdupq_n_s32(0);
    for (q, x) in q_batches.iter_mut().zip(x_batches) {
        let (x, _) = x.as_chunks::<WIDTH>();
        let [a, b, c, d] = [&x[0], &x[1], &x[2], &x[3]].map(|x| round_four(load(x), s));
        let codes = vcombine_s8(vqmovn_s16(join(a, b)), vqmovn_s16(join(c, d)));
        sums = vpadalq_s16(sums, vpaddlq_s8(codes));
        store_i8(q, codes);
    }
    let mut sum = vaddvq_s32(sums);
    for (q, x) in q_tail.iter_mut().zip(x_tail) {
        *q = round(*x, s);
        sum += i32::from(*q);
    }
    Ok((s, sum))
}

/// The greatest magnitude; infinite or NaN if an element is. Without its sign, a float's bits order
/// as an integer's do, and NaNs lie above infinity.
#[target_feature(enable = "neon")]
fn absmax(x: &[f32]) -> f32 {
    const MAGNITUDE: u32 = 0x7fff_ffff;
    let (chunks, tail) = x.as_chunks::<WIDTH>();
    let mut greatest = vdupq_n_u32(0);
    for x in chunks {
        let bits = vreinterpretq_u32_f32(load(x));
        greatest = vmaxq_u32(greatest, vandq_u32(bits, vdupq_n_u32(MAGNITUDE)));
    }
    let tail = tail.iter().map(|x| x.to_bits() & MAGNITUDE);
    f32::from_bits(tail.fold(vmaxvq_u32(greatest), u32::max))
}

/// round-half-even(x s) as i32.
#[target_feature(enable = "neon")]
#[inline]
fn round_four(x: float32x4_t, s: f32) -> int32x4_t {
    vcvtnq_s32_f32(vmulq_n_f32(x, s))
}

/// Eight i32 as i16, bounded to its range.
#[target_feature(enable = "neon")]
#[inline]
fn join(low: int32x4_t, high: int32x4_t) -> int16x8_t {
    vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))
}
