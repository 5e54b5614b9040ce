//! What is made of exp, four elements at a time. Other gates, additions and RoPE are simple enough
//! for the compiler to find the same vectors in the scalar definition.

use std::arch::aarch64::*;

use super::{WIDTH, functions, load, store};
use crate::scalar::elementwise as scalar;

#[target_feature(enable = "neon")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (g_chunks, g_tail) = gate.as_chunks::<WIDTH>();
    let (u_chunks, u_tail) = up.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for ((y, gate), up) in y_chunks.iter_mut().zip(g_chunks).zip(u_chunks) {
        let gate = load(gate);
        let below = vaddq_f32(vdupq_n_f32(1.0), functions::exp(vnegq_f32(gate)));
        store(y, vmulq_f32(vdivq_f32(gate, below), load(up)));
    }
    scalar::silu_mul(g_tail, u_tail, y_tail);
}

#[target_feature(enable = "neon")]
pub(super) fn map_exp(x: &[f32], y: &mut [f32]) {
    let (x_chunks, x_tail) = x.as_chunks::<WIDTH>();
    let (y_chunks, y_tail) = y.as_chunks_mut::<WIDTH>();
    for (y, x) in y_chunks.iter_mut().zip(x_chunks) {
        store(y, functions::exp(load(x)));
    }
    scalar::map_exp(x_tail, y_tail);
}
