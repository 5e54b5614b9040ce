//! exp, ln, sine and cosine of eight floats: the scalar formulas, operation by operation.

use std::arch::x86_64::*;

use super::{WIDTH, load, store};
use crate::scalar::transcendental as f32s;
use crate::scalar::trigonometry as f64s;

/// e^x; see [`crate::scalar::transcendental::exp`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn exp(x: __m256) -> __m256 {
    let round = _mm256_set1_ps(f32s::ROUND);
    let clamped = _mm256_max_ps(
        _mm256_min_ps(x, _mm256_set1_ps(f32s::EXP_MAX)),
        _mm256_set1_ps(f32s::EXP_MIN),
    );
    let shifted = _mm256_fmadd_ps(clamped, _mm256_set1_ps(f32s::LOG2_E), round);
    let n = _mm256_sub_ps(shifted, round);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-f32s::LN_2_HIGH), clamped);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-f32s::LN_2_LOW), r);
    let p = polynomial(&f32s::EXP_TERMS, r);
    let n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(round));
    let bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(n));
    let underflow = _mm256_cmpgt_epi32(_mm256_set1_epi32(f32s::MIN_NORMAL_BITS), bits);
    let infinity = _mm256_castps_si256(_mm256_set1_ps(f32::INFINITY));
    let value = _mm256_andnot_si256(underflow, _mm256_min_epi32(bits, infinity));
    _mm256_blendv_ps(_mm256_castsi256_ps(value), x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

/// e^x of one float.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn exp_of_one(x: f32) -> f32 {
    _mm256_cvtss_f32(exp(_mm256_set1_ps(x)))
}

/// ln x; see [`crate::scalar::transcendental::ln`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn ln(x: __m256) -> __m256 {
    let zero = _mm256_setzero_ps();
    let infinity = _mm256_set1_ps(f32::INFINITY);
    let subnormal = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(f32::MIN_POSITIVE));
    let scaled = _mm256_mul_ps(x, _mm256_set1_ps(f32s::SUBNORMAL_SCALE));
    let normal = _mm256_castps_si256(_mm256_blendv_ps(x, scaled, subnormal));
    let less = _mm256_and_si256(_mm256_castps_si256(subnormal), _mm256_set1_epi32(23));

    let sqrt_half = _mm256_set1_epi32(f32s::SQRT_HALF_BITS as i32);
    let above = _mm256_sub_epi32(normal, sqrt_half);
    let e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srai_epi32::<23>(above), less));
    let mantissa = _mm256_and_si256(above, _mm256_set1_epi32(0x007f_ffff));
    let one_plus_f = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, sqrt_half));
    let f = _mm256_sub_ps(one_plus_f, _mm256_set1_ps(1.0));

    let s = _mm256_div_ps(f, _mm256_add_ps(_mm256_set1_ps(2.0), f));
    let z = _mm256_mul_ps(s, s);
    let r = _mm256_mul_ps(z, polynomial(&f32s::LN_TERMS, z));
    let half_square = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5), f), f);
    let e_low = _mm256_mul_ps(e, _mm256_set1_ps(f32s::LN_2_LOW));
    let low = _mm256_fmadd_ps(s, _mm256_add_ps(half_square, r), e_low);
    let high = _mm256_sub_ps(f, _mm256_sub_ps(half_square, low));
    let value = _mm256_fmadd_ps(e, _mm256_set1_ps(f32s::LN_2_HIGH), high);

    let negative = _mm256_cmp_ps::<_CMP_LT_OQ>(x, zero);
    let value = _mm256_blendv_ps(value, _mm256_set1_ps(f32::NAN), negative);
    let is_zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(x, zero);
    let value = _mm256_blendv_ps(value, _mm256_set1_ps(f32::NEG_INFINITY), is_zero);
    // Infinity or NaN: not below infinity, and negative infinity has become NaN already.
    _mm256_blendv_ps(value, x, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, infinity))
}

/// sin(x + quarters π/2); see [`crate::scalar::trigonometry`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn sin_of_quarters(x: __m256, quarters: u32) -> __m256 {
    let low = sin_of_quarters_f64(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), quarters);
    let high = sin_of_quarters_f64(_mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x)), quarters);
    let value = _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));

    let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let huge = _mm256_cmp_ps::<_CMP_NLT_UQ>(magnitude, _mm256_set1_ps(f64s::MAX_SMALL));
    if _mm256_movemask_ps(huge) == 0 {
        return value;
    }
    // Huge, infinite or NaN: too rare to be worth vectors.
    let (mut xs, mut values) = ([0.0; WIDTH], [0.0; WIDTH]);
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

/// Four values of magnitude below 2^28, before the rounding to f32.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sin_of_quarters_f64(x: __m256d, quarters: u32) -> __m256d {
    let round = _mm256_set1_pd(f64s::ROUND);
    let shifted = _mm256_fmadd_pd(x, _mm256_set1_pd(f64s::FRAC_2_PI), round);
    let n = _mm256_sub_pd(shifted, round);
    let r = _mm256_fmadd_pd(_mm256_set1_pd(-f64s::FRAC_PI_2_HIGH), n, x);
    let r = _mm256_fmadd_pd(_mm256_set1_pd(-f64s::FRAC_PI_2_LOW), n, r);
    let quarters = _mm256_set1_epi64x(i64::from(quarters));
    let quadrant = _mm256_add_epi64(_mm256_castpd_si256(shifted), quarters);

    let z = _mm256_mul_pd(r, r);
    let sine = _mm256_mul_pd(polynomial_f64(&f64s::SIN_TERMS, z), r);
    let cosine = polynomial_f64(&f64s::COS_TERMS, z);
    // Bit 0 of the quadrant chooses the cosine, bit 1 the sign; each is moved to the sign bit.
    let odd = _mm256_castsi256_pd(_mm256_slli_epi64::<63>(quadrant));
    let magnitude = _mm256_blendv_pd(sine, cosine, odd);
    let sign = _mm256_slli_epi64::<62>(_mm256_and_si256(quadrant, _mm256_set1_epi64x(2)));
    _mm256_xor_pd(magnitude, _mm256_castsi256_pd(sign))
}

/// Horner's rule, terms from the highest power down.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn polynomial(terms: &[f32], z: __m256) -> __m256 {
    let mut sum = _mm256_set1_ps(terms[0]);
    for term in &terms[1..] {
        sum = _mm256_fmadd_ps(sum, z, _mm256_set1_ps(*term));
    }
    sum
}

/// Horner's rule, terms from the highest power down.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn polynomial_f64(terms: &[f64], z: __m256d) -> __m256d {
    let mut sum = _mm256_set1_pd(terms[0]);
    for term in &terms[1..] {
        sum = _mm256_fmadd_pd(sum, z, _mm256_set1_pd(*term));
    }
    sum
}
