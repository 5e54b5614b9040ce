//! The 16-lane rule in two registers: lanes 0 to 7 and lanes 8 to 15.

use std::arch::x86_64::*;

use super::{WIDTH, load, store};
use crate::scalar::reduce::{LANES, fold_lanes, inverse_rms};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let (mut low, mut high) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        let ([a_low, a_high], [b_low, b_high]) = (halves(a), halves(b));
        low = _mm256_fmadd_ps(load(a_low), load(b_low), low);
        high = _mm256_fmadd_ps(load(a_high), load(b_high), high);
    }
    finish(low, high, a_tail.iter().copied().zip(b_tail.iter().copied()))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (mut low, mut high) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for x in chunks {
        // x * 1 + lane, fused, is x + lane.
        let [x_low, x_high] = halves(x);
        low = _mm256_add_ps(load(x_low), low);
        high = _mm256_add_ps(load(x_high), high);
    }
    finish(low, high, tail.iter().map(|x| (*x, 1.0)))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = inverse_rms(x, eps, |a, b| dot(a, b));
    let (x_chunks, x_tail) = x.as_chunks::<WIDTH>();
    let (w_chunks, w_tail) = weight.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for ((y, x), w) in y_chunks.iter_mut().zip(x_chunks).zip(w_chunks) {
        store(y, _mm256_mul_ps(_mm256_mul_ps(load(x), _mm256_set1_ps(r)), load(w)));
    }
    for ((y, x), w) in y_tail.iter_mut().zip(x_tail).zip(w_tail) {
        *y = (x * r) * w;
    }
}

/// The two registers' worth of sixteen floats.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn halves(x: &[f32; LANES]) -> [&[f32; WIDTH]; 2] {
    let (halves, _) = x.as_chunks::<WIDTH>();
    [&halves[0], &halves[1]]
}

/// Adds the products of `tail`, fewer than sixteen, to their lanes and folds the lanes. Lanes
/// without a product are not touched: adding +0 would turn a lane's -0 into +0.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn finish(
    low: __m256,
    high: __m256,
    tail: impl ExactSizeIterator<Item = (f32, f32)>,
) -> f32 {
    if tail.len() == 0 {
        return fold(low, high);
    }
    let mut lanes = [0.0; LANES];
    let (registers, _) = lanes.as_chunks_mut::<WIDTH>();
    store(&mut registers[0], low);
    store(&mut registers[1], high);
    for (lane, (a, b)) in lanes.iter_mut().zip(tail) {
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(lanes)
}

/// Adds lanes i and i + 8, then +4, +2, +1.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(in crate::x86_64) fn fold(low: __m256, high: __m256) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    let one = _mm_add_ss(two, _mm_movehdup_ps(two));
    _mm_cvtss_f32(one)
}
