//! exp of four floats: the scalar formula, operation by operation.

use std::arch::aarch64::*;

use crate::scalar::transcendental as f32s;

/// e^x; see [`crate::scalar::transcendental::exp`].
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn exp(x: float32x4_t) -> float32x4_t {
    let round = vdupq_n_f32(f32s::ROUND);
    let clamped = vmaxq_f32(vminq_f32(x, vdupq_n_f32(f32s::EXP_MAX)), vdupq_n_f32(f32s::EXP_MIN));
    let shifted = vfmaq_f32(round, clamped, vdupq_n_f32(f32s::LOG2_E));
    let n = vsubq_f32(shifted, round);
    let r = vfmsq_f32(clamped, n, vdupq_n_f32(f32s::LN_2_HIGH));
    let r = vfmsq_f32(r, n, vdupq_n_f32(f32s::LN_2_LOW));
    let mut p = vdupq_n_f32(f32s::EXP_TERMS[0]);
    for term in &f32s::EXP_TERMS[1..] {
        p = vfmaq_f32(vdupq_n_f32(*term), p, r);
    }
    let n = vsubq_s32(vreinterpretq_s32_f32(shifted), vreinterpretq_s32_f32(round));
    let bits = vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32::<23>(n));
    let infinity = vreinterpretq_s32_f32(vdupq_n_f32(f32::INFINITY));
    let underflow = vcltq_s32(bits, vdupq_n_s32(f32s::MIN_NORMAL_BITS));
    let value = vbicq_s32(vminq_s32(bits, infinity), vreinterpretq_s32_u32(underflow));
    // Only a NaN is not equal to itself.
    vbslq_f32(vceqq_f32(x, x), vreinterpretq_f32_s32(value), x)
}
