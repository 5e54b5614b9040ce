//! SiLU, tables of RoPE and functions, sixteen elements at a time; what is left over has a register of
//! which some lanes are not used. What only loads, adds, multiplies and stores is no faster at this
//! width, and done by AVX2's kernels.

use std::arch::x86_64::*;

use super::{functions, load, load_tail, store, store_tail};
use crate::scalar::reduce::LANES;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (g_chunks, g_tail) = gate.as_chunks::<LANES>();
    let (u_chunks, u_tail) = up.as_chunks::<LANES>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<LANES>();
    for ((y, gate), up) in y_chunks.iter_mut().zip(g_chunks).zip(u_chunks) {
        store(y, silu_mul_sixteen(load(gate), load(up)));
    }
    store_tail(y_tail, silu_mul_sixteen(load_tail(g_tail), load_tail(u_tail)));
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn silu_mul_sixteen(gate: __m512, up: __m512) -> __m512 {
    let negated = _mm512_xor_ps(gate, _mm512_set1_ps(-0.0));
    let below = _mm512_add_ps(_mm512_set1_ps(1.0), functions::exp(negated));
    _mm512_mul_ps(_mm512_div_ps(gate, below), up)
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rope_table(
    frequencies: &[f32],
    position: u32,
    cosines: &mut [f32],
    sines: &mut [f32],
) {
    let position = _mm512_set1_ps(position as f32);
    let (f_chunks, f_tail) = frequencies.as_chunks::<LANES>();
    let (c_chunks, c_tail) = cosines.as_chunks_mut::<LANES>();
    let (s_chunks, s_tail) = sines.as_chunks_mut::<LANES>();
    for ((frequency, cosine), sine) in f_chunks.iter().zip(c_chunks).zip(s_chunks) {
        let angle = _mm512_mul_ps(position, load(frequency));
        store(cosine, functions::sin_of_quarters(angle, 1));
        store(sine, functions::sin_of_quarters(angle, 0));
    }
    let angle = _mm512_mul_ps(position, load_tail(f_tail));
    store_tail(c_tail, functions::sin_of_quarters(angle, 1));
    store_tail(s_tail, functions::sin_of_quarters(angle, 0));
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn map_exp(x: &[f32], y: &mut [f32]) {
    map(|x| functions::exp(x), x, y);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn map_ln(x: &[f32], y: &mut [f32]) {
    map(|x| functions::ln(x), x, y);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn map_sin(x: &[f32], y: &mut [f32]) {
    map(|x| functions::sin_of_quarters(x, 0), x, y);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn map_cos(x: &[f32], y: &mut [f32]) {
    map(|x| functions::sin_of_quarters(x, 1), x, y);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn map(f: impl Fn(__m512) -> __m512, x: &[f32], y: &mut [f32]) {
    let (x_chunks, x_tail) = x.as_chunks::<LANES>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<LANES>();
    for (y, x) in y_chunks.iter_mut().zip(x_chunks) {
        store(y, f(load(x)));
    }
    store_tail(y_tail, f(load_tail(x_tail)));
}
