//! Our own exponential and natural logarithms: the same bits on every machine, within one unit in
//! the last place of the true value.

/// log2(e), rounded to f32.
pub(crate) const LOG2_E: f32 = f32::from_bits(0x3fb8_aa3b);
/// The upper 17 bits of ln 2: its product with a small integer is exact.
pub(crate) const LN_2_HIGH: f32 = f32::from_bits(0x3f31_7180);
/// ln 2 minus [`LN_2_HIGH`], rounded to f32.
pub(crate) const LN_2_LOW: f32 = f32::from_bits(0x3717_f7d1);
/// 1.5 * 2^23: added to a float of magnitude below 2^22, it leaves the nearest integer (ties to
/// even) in the low bits of the sum.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Beyond these, the result is infinite or +0; within, the exponent is added without overflow.
pub(crate) const EXP_MAX: f32 = 89.0;
pub(crate) const EXP_MIN: f32 = -88.0;
/// 1 / j! for j = 7 down to 0, rounded to f32. The first term left out is below 5.3e-9, 0.09 of a
/// unit in the last place, for arguments up to ln(2) / 2.
pub(crate) const EXP_TERMS: [f32; 8] = [
    f32::from_bits(0x3950_0d01),
    f32::from_bits(0x3ab6_0b61),
    f32::from_bits(0x3c08_8889),
    f32::from_bits(0x3d2a_aaab),
    f32::from_bits(0x3e2a_aaab),
    0.5,
    1.0,
    1.0,
];
/// The bits of the smallest normal float, 2^-126.
pub(crate) const MIN_NORMAL_BITS: i32 = 0x0080_0000;

/// e^x over the full range: exp(0) = 1, results below 2^-126 are +0, a NaN gives a NaN.
pub(crate) fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let x = x.clamp(EXP_MIN, EXP_MAX);
    // x = n ln 2 + r with |r| <= ln(2) / 2.
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut p = EXP_TERMS[0];
    for term in &EXP_TERMS[1..] {
        p = p.mul_add(r, *term);
    }
    // p * 2^n, by adding n to the exponent of p; n is at most 128, so the sum stays positive or is
    // an underflow.
    let n = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let bits = p.to_bits() as i32 + (n << 23);
    if bits < MIN_NORMAL_BITS {
        0.0
    } else {
        f32::from_bits(bits.min(f32::INFINITY.to_bits() as i32) as u32)
    }
}

/// sqrt(1/2), rounded down to f32: the least mantissa of the reduced argument.
pub(crate) const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
/// 2/9, 2/7, 2/5, 2/3, rounded to f32: 2 artanh(s) = 2s + s (2/3 s² + 2/5 s⁴ + …).
pub(crate) const LN_TERMS: [f32; 4] = [2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0];
/// 2^23, which makes a subnormal normal.
pub(crate) const SUBNORMAL_SCALE: f32 = 8_388_608.0;

/// The natural logarithm over the full range: 0 gives -inf, less gives NaN, inf gives inf.
pub(crate) fn ln(x: f32) -> f32 {
    if x.is_nan() || x == f32::INFINITY {
        return x;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x < 0.0 {
        return f32::NAN;
    }
    let subnormal = x < f32::MIN_POSITIVE;
    let (x, less) = if subnormal { (x * SUBNORMAL_SCALE, 23) } else { (x, 0) };
    // x = 2^e (1 + f) with 1 + f from sqrt(1/2) to sqrt(2).
    let above = x.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let e = ((above as i32 >> 23) - less) as f32;
    let f = f32::from_bits((above & 0x007f_ffff) + SQRT_HALF_BITS) - 1.0;
    // ln(1 + f) = 2 artanh(s) with s = f / (2 + f), written as f - (f²/2 - s (f²/2 + R)), which
    // keeps the leading f exact (the arrangement of fdlibm).
    let s = f / (2.0 + f);
    let z = s * s;
    let mut series = LN_TERMS[0];
    for term in &LN_TERMS[1..] {
        series = series.mul_add(z, *term);
    }
    let r = z * series;
    let half_square = (0.5 * f) * f;
    let low = s.mul_add(half_square + r, e * LN_2_LOW);
    e.mul_add(LN_2_HIGH, f - (half_square - low))
}

/// sqrt(1/2), rounded down to f64: the least mantissa of the reduced argument.
const SQRT_HALF_BITS_64: u64 = 0x3fe6_a09e_667f_3bcc;
/// The upper 32 bits of ln 2: its product with an exponent is exact.
const LN_2_HIGH_64: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
/// ln 2 minus [`LN_2_HIGH_64`], rounded to f64.
const LN_2_LOW_64: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
/// 2 artanh(s) = 2s + s (2/3 s² + 2/5 s⁴ + …), from the highest power down: fdlibm's coefficients, which
/// leave less than 2^-58.45 of the series for |s| up to 0.1716.
const LN_TERMS_64: [f64; 7] = [
    f64::from_bits(0x3fc2_f112_df3e_5244),
    f64::from_bits(0x3fc3_9a09_d078_c69f),
    f64::from_bits(0x3fc7_4664_96cb_03de),
    f64::from_bits(0x3fcc_71c5_1d8e_78af),
    f64::from_bits(0x3fd2_4924_9422_9359),
    f64::from_bits(0x3fd9_9999_9997_fa04),
    f64::from_bits(0x3fe5_5555_5555_5593),
];

/// The natural logarithm of a normal `x` above 0, in f64. Arranged as [`ln`].
pub(crate) fn ln64(x: f64) -> f64 {
    debug_assert!(x.is_normal() && x > 0.0, "ln64({x:e})");
    let above = x.to_bits().wrapping_sub(SQRT_HALF_BITS_64);
    let e = (above as i64 >> 52) as f64;
    let f = f64::from_bits((above & 0x000f_ffff_ffff_ffff) + SQRT_HALF_BITS_64) - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let mut series = LN_TERMS_64[0];
    for term in &LN_TERMS_64[1..] {
        series = series.mul_add(z, *term);
    }
    let r = z * series;
    let half_square = (0.5 * f) * f;
    let low = s.mul_add(half_square + r, e * LN_2_LOW_64);
    e.mul_add(LN_2_HIGH_64, f - (half_square - low))
}
