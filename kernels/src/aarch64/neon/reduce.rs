//! The 16-lane rule in four registers: lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.

use std::arch::aarch64::*;

use super::{WIDTH, load, store};
use crate::scalar::reduce::{LANES, fold_lanes, inverse_rms};

/// A float for each lane of the rule.
pub(super) type Lanes = [float32x4_t; LANES / WIDTH];

/// Lanes of +0.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn zeros() -> Lanes {
    [vdupq_n_f32(0.0); LANES / WIDTH]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_lanes(x: &[f32; LANES]) -> Lanes {
    let (registers, _) = x.as_chunks::<WIDTH>();
    std::array::from_fn(|at| load(&registers[at]))
}

/// Adds `a * b` to each lane, fused.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn multiply_add(lanes: &mut Lanes, a: Lanes, b: Lanes) {
    for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
        *lane = vfmaq_f32(*lane, a, b);
    }
}

#[target_feature(enable = "neon")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = zeros();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        multiply_add(&mut lanes, load_lanes(a), load_lanes(b));
    }
    finish(lanes, a_tail.iter().copied().zip(b_tail.iter().copied()))
}

#[target_feature(enable = "neon")]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut lanes = zeros();
    for x in chunks {
        // x * 1 + lane, fused, is x + lane.
        for (lane, x) in lanes.iter_mut().zip(load_lanes(x)) {
            *lane = vaddq_f32(x, *lane);
        }
    }
    finish(lanes, tail.iter().map(|x| (*x, 1.0)))
}

#[target_feature(enable = "neon")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = inverse_rms(x, eps, |a, b| dot(a, b));
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = (x * r) * weight;
    }
}

/// Adds the products of `tail`, fewer than sixteen, to their lanes and folds the lanes. Lanes
/// without a product are not touched: adding +0 would turn a lane's -0 into +0.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn finish(lanes: Lanes, tail: impl ExactSizeIterator<Item = (f32, f32)>) -> f32 {
    if tail.len() == 0 {
        return fold(lanes);
    }
    let mut floats = [0.0; LANES];
    let (registers, _) = floats.as_chunks_mut::<WIDTH>();
    for (register, lanes) in registers.iter_mut().zip(lanes) {
        store(register, lanes);
    }
    for (lane, (a, b)) in floats.iter_mut().zip(tail) {
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(floats)
}

/// Adds lanes i and i + 8, then +4, +2, +1.
#[target_feature(enable = "neon")]
#[inline]
fn fold([a, b, c, d]: Lanes) -> f32 {
    let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
    let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
}
