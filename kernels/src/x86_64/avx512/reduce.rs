//! The 16-lane rule in one register.

use std::arch::x86_64::*;

use super::{lanes_of, load, load_tail, store};
use crate::scalar::reduce::{LANES, inverse_rms};
use crate::x86_64::avx2::reduce::fold;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = _mm512_setzero_ps();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        lanes = _mm512_fmadd_ps(load(a), load(b), lanes);
    }
    fold_lanes(add_tail(load_tail(a_tail), load_tail(b_tail), lanes, a_tail.len()))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut lanes = _mm512_setzero_ps();
    for x in chunks {
        // x * 1 + lane, fused, is x + lane.
        lanes = _mm512_add_ps(load(x), lanes);
    }
    fold_lanes(add_tail(load_tail(tail), _mm512_set1_ps(1.0), lanes, tail.len()))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = inverse_rms(x, eps, |a, b| dot(a, b));
    let (x_chunks, x_tail) = x.as_chunks::<LANES>();
    let (w_chunks, w_tail) = weight.as_chunks::<LANES>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<LANES>();
    for ((y, x), w) in y_chunks.iter_mut().zip(x_chunks).zip(w_chunks) {
        store(y, _mm512_mul_ps(_mm512_mul_ps(load(x), _mm512_set1_ps(r)), load(w)));
    }
    for ((y, x), w) in y_tail.iter_mut().zip(x_tail).zip(w_tail) {
        *y = (x * r) * w;
    }
}

/// Adds the products of the last `count` elements, fewer than sixteen, to their lanes. The other
/// lanes are not touched: adding +0 would turn a lane's -0 into +0.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn add_tail(a: __m512, b: __m512, lanes: __m512, count: usize) -> __m512 {
    _mm512_mask3_fmadd_ps(a, b, lanes, lanes_of(count))
}

/// Adds lanes i and i + 8, then +4, +2, +1.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn fold_lanes(lanes: __m512) -> f32 {
    fold(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes))
}
