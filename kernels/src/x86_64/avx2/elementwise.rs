//! Gates, residual addition, RoPE and functions, eight elements at a time; what is left over goes
//! through the scalar code, which gives the same bits.

use std::arch::x86_64::*;

use super::{WIDTH, functions, load, store};
use crate::scalar::elementwise as scalar;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    let (x_chunks, x_tail) = x.as_chunks_mut::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks::<WIDTH>();
    for (x, y) in x_chunks.iter_mut().zip(y_chunks) {
        store(x, _mm256_add_ps(load(x), load(y)));
    }
    scalar::add(x_tail, y_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn squared_relu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (g_chunks, g_tail) = gate.as_chunks::<WIDTH>();
    let (u_chunks, u_tail) = up.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for ((y, gate), up) in y_chunks.iter_mut().zip(g_chunks).zip(u_chunks) {
        // `max` gives its second operand, +0, for a NaN and for zeros of either sign.
        let relu = _mm256_max_ps(load(gate), _mm256_setzero_ps());
        store(y, _mm256_mul_ps(_mm256_mul_ps(relu, relu), load(up)));
    }
    scalar::squared_relu_mul(g_tail, u_tail, y_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (g_chunks, g_tail) = gate.as_chunks::<WIDTH>();
    let (u_chunks, u_tail) = up.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for ((y, gate), up) in y_chunks.iter_mut().zip(g_chunks).zip(u_chunks) {
        let gate = load(gate);
        let negated = _mm256_xor_ps(gate, _mm256_set1_ps(-0.0));
        let below = _mm256_add_ps(_mm256_set1_ps(1.0), functions::exp(negated));
        store(y, _mm256_mul_ps(_mm256_div_ps(gate, below), load(up)));
    }
    scalar::silu_mul(g_tail, u_tail, y_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rope_table(
    frequencies: &[f32],
    position: u32,
    cosines: &mut [f32],
    sines: &mut [f32],
) {
    let (f_chunks, f_tail) = frequencies.as_chunks::<WIDTH>();
    let (c_chunks, c_tail) = cosines.as_chunks_mut::<WIDTH>();
    let (s_chunks, s_tail) = sines.as_chunks_mut::<WIDTH>();
    for ((frequency, cosine), sine) in f_chunks.iter().zip(c_chunks).zip(s_chunks) {
        let angle = _mm256_mul_ps(_mm256_set1_ps(position as f32), load(frequency));
        store(cosine, functions::sin_of_quarters(angle, 1));
        store(sine, functions::sin_of_quarters(angle, 0));
    }
    scalar::rope_table(f_tail, position, c_tail, s_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = x.split_at_mut(cos.len());
    let (a_chunks, a_tail) = first.as_chunks_mut::<WIDTH>();
    let (b_chunks, b_tail) = second.as_chunks_mut::<WIDTH>();
    let (c_chunks, c_tail) = cos.as_chunks::<WIDTH>();
    let (s_chunks, s_tail) = sin.as_chunks::<WIDTH>();
    for (((a, b), cos), sin) in a_chunks.iter_mut().zip(b_chunks).zip(c_chunks).zip(s_chunks) {
        let (x, y, cos, sin) = (load(a), load(b), load(cos), load(sin));
        store(a, _mm256_sub_ps(_mm256_mul_ps(x, cos), _mm256_mul_ps(y, sin)));
        store(b, _mm256_add_ps(_mm256_mul_ps(y, cos), _mm256_mul_ps(x, sin)));
    }
    scalar::rotate(a_tail, b_tail, c_tail, s_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn map_exp(x: &[f32], y: &mut [f32]) {
    map(|x| functions::exp(x), x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn map_ln(x: &[f32], y: &mut [f32]) {
    map(|x| functions::ln(x), x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn map_sin(x: &[f32], y: &mut [f32]) {
    map(|x| functions::sin_of_quarters(x, 0), x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn map_cos(x: &[f32], y: &mut [f32]) {
    map(|x| functions::sin_of_quarters(x, 1), x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn map(f: impl Fn(__m256) -> __m256, x: &[f32], y: &mut [f32]) {
    let (x_chunks, x_tail) = x.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for (y, x) in y_chunks.iter_mut().zip(x_chunks) {
        store(y, f(load(x)));
    }
    // The rest, with zeros behind it, through the same vectors.
    let mut padded = [0.0; WIDTH];
    padded[..x_tail.len()].copy_from_slice(x_tail);
    let padded_x = padded;
    store(&mut padded, f(load(&padded_x)));
    y_tail.copy_from_slice(&padded[..y_tail.len()]);
}
