//! Activations to int8, 64 at a time.

use std::arch::x86_64::*;

use super::{load, load_tail, store_i8};
use crate::backend::NotFinite;
use crate::scalar::quantise::MIN_ABSMAX;
use crate::scalar::reduce::LANES;

/// Activations in a register of int8.
const BATCH: usize = 64;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
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
    let mut sums = _mm512_setzero_si512();
    for (q, x) in q_batches.iter_mut().zip(x_batches) {
        let packed = round_batch(x, s);
        // The products of these bytes by ones, four to a lane.
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), packed);
        store_i8(q, packed);
    }
    if !x_tail.is_empty() {
        // With zeros behind it, which round to 0 and so add nothing.
        let (mut padded, mut rounded) = ([0.0; BATCH], [0; BATCH]);
        padded[..x_tail.len()].copy_from_slice(x_tail);
        let packed = round_batch(&padded, s);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), packed);
        store_i8(&mut rounded, packed);
        q_tail.copy_from_slice(&rounded[..q_tail.len()]);
    }
    Ok((s, _mm512_reduce_add_epi32(sums)))
}

/// The greatest magnitude; infinite or NaN if an element is. Without its sign, a float's bits order
/// as an integer's do, and NaNs lie above infinity.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn absmax(x: &[f32]) -> f32 {
    let magnitude = |x: __m512| _mm512_castps_si512(_mm512_abs_ps(x));
    let (pairs, rest) = x.as_chunks::<{ 2 * LANES }>();
    let mut greatest = [_mm512_setzero_si512(); 2];
    for pair in pairs {
        let (pair, _) = pair.as_chunks::<LANES>();
        greatest[0] = _mm512_max_epi32(greatest[0], magnitude(load(&pair[0])));
        greatest[1] = _mm512_max_epi32(greatest[1], magnitude(load(&pair[1])));
    }
    let (chunk, tail) = rest.as_chunks::<LANES>();
    for x in chunk {
        greatest[0] = _mm512_max_epi32(greatest[0], magnitude(load(x)));
    }
    greatest[1] = _mm512_max_epi32(greatest[1], magnitude(load_tail(tail)));
    let greatest = _mm512_reduce_max_epi32(_mm512_max_epi32(greatest[0], greatest[1]));
    f32::from_bits(greatest as u32)
}

/// clamp(round-half-even(x s), -128, 127) as int8: the conversion rounds half to even, packing
/// clamps.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn round_batch(x: &[f32; BATCH], s: f32) -> __m512i {
    let s = _mm512_set1_ps(s);
    let (x, _) = x.as_chunks::<LANES>();
    let a = _mm512_cvtps_epi32(_mm512_mul_ps(load(&x[0]), s));
    let b = _mm512_cvtps_epi32(_mm512_mul_ps(load(&x[1]), s));
    let c = _mm512_cvtps_epi32(_mm512_mul_ps(load(&x[2]), s));
    let d = _mm512_cvtps_epi32(_mm512_mul_ps(load(&x[3]), s));
    // Packing works within 128-bit quarters and leaves groups of four in the order
    // a0 b0 c0 d0 a1 b1 c1 d1 …
    let packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, packed)
}
