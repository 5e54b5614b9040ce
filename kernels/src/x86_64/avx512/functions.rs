//! exp, ln, sine and cosine of sixteen floats: the scalar formulas, operation by operation.

use std::arch::x86_64::*;

use super::{load, store};
use crate::scalar::reduce::LANES;
use crate::scalar::transcendental as f32s;
use crate::scalar::trigonometry as f64s;

/// e^x; see [`crate::scalar::transcendental::exp`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn exp(x: __m512) -> __m512 {
    let round = _mm512_set1_ps(f32s::ROUND);
    let clamped = _mm512_max_ps(
        _mm512_min_ps(x, _mm512_set1_ps(f32s::EXP_MAX)),
        _mm512_set1_ps(f32s::EXP_MIN),
    );
    let shifted = _mm512_fmadd_ps(clamped, _mm512_set1_ps(f32s::LOG2_E), round);
    let n = _mm512_sub_ps(shifted, round);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-f32s::LN_2_HIGH), clamped);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-f32s::LN_2_LOW), r);
    let p = polynomial(&f32s::EXP_TERMS, r);
    let n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(round));
    let bits = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32::<23>(n));
    let normal = _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(f32s::MIN_NORMAL_BITS));
    let infinity = _mm512_castps_si512(_mm512_set1_ps(f32::INFINITY));
    let value = _mm512_castsi512_ps(_mm512_maskz_min_epi32(normal, bits, infinity));
    _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), x)
}

/// ln x; see [`crate::scalar::transcendental::ln`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn ln(x: __m512) -> __m512 {
    let zero = _mm512_setzero_ps();
    let subnormal = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(f32::MIN_POSITIVE));
    let scale = _mm512_set1_ps(f32s::SUBNORMAL_SCALE);
    let normal = _mm512_castps_si512(_mm512_mask_mul_ps(x, subnormal, x, scale));
    let less = _mm512_maskz_set1_epi32(subnormal, 23);

    let sqrt_half = _mm512_set1_epi32(f32s::SQRT_HALF_BITS as i32);
    let above = _mm512_sub_epi32(normal, sqrt_half);
    let e = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srai_epi32::<23>(above), less));
    let mantissa = _mm512_and_si512(above, _mm512_set1_epi32(0x007f_ffff));
    let one_plus_f = _mm512_castsi512_ps(_mm512_add_epi32(mantissa, sqrt_half));
    let f = _mm512_sub_ps(one_plus_f, _mm512_set1_ps(1.0));

    let s = _mm512_div_ps(f, _mm512_add_ps(_mm512_set1_ps(2.0), f));
    let z = _mm512_mul_ps(s, s);
    let r = _mm512_mul_ps(z, polynomial(&f32s::LN_TERMS, z));
    let half_square = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5), f), f);
    let e_low = _mm512_mul_ps(e, _mm512_set1_ps(f32s::LN_2_LOW));
    let low = _mm512_fmadd_ps(s, _mm512_add_ps(half_square, r), e_low);
    let high = _mm512_sub_ps(f, _mm512_sub_ps(half_square, low));
    let value = _mm512_fmadd_ps(e, _mm512_set1_ps(f32s::LN_2_HIGH), high);

    let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, zero);
    let value = _mm512_mask_mov_ps(value, negative, _mm512_set1_ps(f32::NAN));
    let is_zero = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(x, zero);
    let value = _mm512_mask_mov_ps(value, is_zero, _mm512_set1_ps(f32::NEG_INFINITY));
    // Infinity or NaN: not below infinity.
    let infinity = _mm512_set1_ps(f32::INFINITY);
    _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, infinity), x)
}

/// sin(x + quarters π/2); see [`crate::scalar::trigonometry`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn sin_of_quarters(x: __m512, quarters: u32) -> __m512 {
    let (low, high) = (_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let low = _mm512_cvtpd_ps(sin_of_quarters_f64(_mm512_cvtps_pd(low), quarters));
    let high = _mm512_cvtpd_ps(sin_of_quarters_f64(_mm512_cvtps_pd(high), quarters));
    let value = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high);

    let most = _mm512_set1_ps(f64s::MAX_SMALL);
    if _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(x), most) == 0 {
        return value;
    }
    // Huge, infinite or NaN: too rare to be worth vectors.
    let (mut xs, mut values) = ([0.0; LANES], [0.0; LANES]);
    store(&mut xs, x);
    store(&mut values, value);
    for (value, x) in values.iter_mut().zip(xs) {
        // A NaN is not below either.
        if x.is_nan() || x.abs() >= f64s::MAX_SMALL {
            *value = f64s::sin_of_quarters(x, quarters);
        }
    }
    load(&values)
}

/// Eight values of magnitude below 2^28, before the rounding to f32.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn sin_of_quarters_f64(x: __m512d, quarters: u32) -> __m512d {
    let round = _mm512_set1_pd(f64s::ROUND);
    let shifted = _mm512_fmadd_pd(x, _mm512_set1_pd(f64s::FRAC_2_PI), round);
    let n = _mm512_sub_pd(shifted, round);
    let r = _mm512_fmadd_pd(_mm512_set1_pd(-f64s::FRAC_PI_2_HIGH), n, x);
    let r = _mm512_fmadd_pd(_mm512_set1_pd(-f64s::FRAC_PI_2_LOW), n, r);
    let quarters = _mm512_set1_epi64(i64::from(quarters));
    let quadrant = _mm512_add_epi64(_mm512_castpd_si512(shifted), quarters);

    let z = _mm512_mul_pd(r, r);
    let sine = _mm512_mul_pd(polynomial_f64(&f64s::SIN_TERMS, z), r);
    let cosine = polynomial_f64(&f64s::COS_TERMS, z);
    // Bit 0 of the quadrant chooses the cosine, bit 1 the sign.
    let odd = _mm512_test_epi64_mask(quadrant, _mm512_set1_epi64(1));
    let magnitude = _mm512_mask_mov_pd(sine, odd, cosine);
    let sign = _mm512_slli_epi64::<62>(_mm512_and_si512(quadrant, _mm512_set1_epi64(2)));
    _mm512_xor_pd(magnitude, _mm512_castsi512_pd(sign))
}

/// Horner's rule, terms from the highest power down.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn polynomial(terms: &[f32], z: __m512) -> __m512 {
    let mut sum = _mm512_set1_ps(terms[0]);
    for term in &terms[1..] {
        sum = _mm512_fmadd_ps(sum, z, _mm512_set1_ps(*term));
    }
    sum
}

/// Horner's rule, terms from the highest power down.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn polynomial_f64(terms: &[f64], z: __m512d) -> __m512d {
    let mut sum = _mm512_set1_pd(terms[0]);
    for term in &terms[1..] {
        sum = _mm512_fmadd_pd(sum, z, _mm512_set1_pd(*term));
    }
    sum
}
