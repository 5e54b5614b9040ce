//! What is done to each element by itself: gates, residual addition, RoPE. Every operation rounds
//! by itself; nothing is contracted.

use super::transcendental::{exp, ln};
use super::trigonometry::{cos, sin};

pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

pub(crate) fn squared_relu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        let relu = if *gate > 0.0 { *gate } else { 0.0 };
        *y = (relu * relu) * up;
    }
}

pub(crate) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = (gate / (1.0 + exp(-gate))) * up;
    }
}

pub(crate) fn rope_table(
    frequencies: &[f32],
    position: u32,
    cosines: &mut [f32],
    sines: &mut [f32],
) {
    for ((f, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
        let angle = position as f32 * f;
        *cosine = cos(angle);
        *sine = sin(angle);
    }
}

pub(crate) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = x.split_at_mut(cos.len());
    rotate(first, second, cos, sin);
}

/// Rotates each pair of elements (a, b) by its angle.
pub(crate) fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

pub(crate) fn map_exp(x: &[f32], y: &mut [f32]) {
    map(exp, x, y);
}

pub(crate) fn map_ln(x: &[f32], y: &mut [f32]) {
    map(ln, x, y);
}

pub(crate) fn map_sin(x: &[f32], y: &mut [f32]) {
    map(sin, x, y);
}

pub(crate) fn map_cos(x: &[f32], y: &mut [f32]) {
    map(cos, x, y);
}

fn map(f: fn(f32) -> f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = f(*x);
    }
}
