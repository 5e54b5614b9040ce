//! Activations to int8.

use crate::backend::NotFinite;

/// The least absmax: below it, activations are too small to matter and the scale stays finite.
pub(crate) const MIN_ABSMAX: f32 = 1e-5;

/// Writes `q`, padding included; returns s and the sum of `q`.
pub(crate) fn quantise(x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite> {
    let mut absmax = 0.0f32;
    for (index, x) in x.iter().enumerate() {
        if !x.is_finite() {
            return Err(NotFinite { index });
        }
        absmax = absmax.max(x.abs());
    }
    let s = 127.0 / absmax.max(MIN_ABSMAX);

    q.fill(0);
    let mut sum = 0;
    for (q, x) in q.iter_mut().zip(x) {
        *q = round(*x, s);
        sum += i32::from(*q);
    }
    Ok((s, sum))
}

/// One activation, whose magnitude is at most 127 / s.
pub(crate) fn round(x: f32, s: f32) -> i8 {
    (x * s).round_ties_even().clamp(-128.0, 127.0) as i8
}
