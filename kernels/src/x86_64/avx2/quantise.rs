//! Activations to int8, 32 at a time.

use std::arch::x86_64::*;

use super::{WIDTH, load, store_i8, store_i32x4};
use crate::backend::NotFinite;
use crate::scalar::quantise::{MIN_ABSMAX, round};

/// Activations in a register of int8.
const BATCH: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
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
    let mut sums = _mm256_setzero_si256();
    for (q, x) in q_batches.iter_mut().zip(x_batches) {
        let (x, _) = x.as_chunks::<WIDTH>();
        let [a, b, c, d] = [&x[0], &x[1], &x[2], &x[3]].map(|x| round_eight(load(x), s));
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(a, b));
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(c, d));
        // Packing works within 128-bit halves and leaves groups of four in the order
        // a0 b0 c0 d0 a1 b1 c1 d1.
        let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        store_i8(q, _mm256_permutevar8x32_epi32(packed, order));
    }
    let halves = (_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let mut sum: i32 = store_i32x4(_mm_add_epi32(halves.0, halves.1)).iter().sum();
    for (q, x) in q_tail.iter_mut().zip(x_tail) {
        *q = round(*x, s);
        sum += i32::from(*q);
    }
    Ok((s, sum))
}

/// The greatest magnitude; infinite or NaN if an element is. Without its sign, a float's bits order
/// as an integer's do, and NaNs lie above infinity.
#[target_feature(enable = "avx2,fma,f16c")]
fn absmax(x: &[f32]) -> f32 {
    const MAGNITUDE: u32 = 0x7fff_ffff;
    let (chunks, tail) = x.as_chunks::<WIDTH>();
    let mut greatest = _mm256_setzero_si256();
    for x in chunks {
        let bits = _mm256_castps_si256(load(x));
        let magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(MAGNITUDE as i32));
        greatest = _mm256_max_epi32(greatest, magnitude);
    }
    let halves = (_mm256_castsi256_si128(greatest), _mm256_extracti128_si256::<1>(greatest));
    let four = store_i32x4(_mm_max_epi32(halves.0, halves.1)).map(|bits| bits as u32);
    let tail = tail.iter().map(|x| x.to_bits() & MAGNITUDE);
    f32::from_bits(four.into_iter().chain(tail).fold(0, u32::max))
}

/// clamp(round-half-even(x s), -128, 127) as i32; the conversion rounds half to even.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn round_eight(x: __m256, s: f32) -> __m256i {
    let rounded = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(s)));
    let bounded = _mm256_min_epi32(rounded, _mm256_set1_epi32(127));
    _mm256_max_epi32(bounded, _mm256_set1_epi32(-128))
}
