//! Our own sine and cosine over the full range of f32, computed in f64 and rounded once. f64
//! operations are as exactly specified as f32 ones, so every machine gives the same bits.

/// 2/π, π/2 and what is missing to π/2, each rounded to f64.
pub(crate) const FRAC_2_PI: f64 = f64::from_bits(0x3fe4_5f30_6dc9_c883);
pub(crate) const FRAC_PI_2_HIGH: f64 = f64::from_bits(0x3ff9_21fb_5444_2d18);
pub(crate) const FRAC_PI_2_LOW: f64 = f64::from_bits(0x3c91_a626_3314_5c07);
/// 1.5 * 2^52: leaves the nearest integer in the low bits of the sum.
pub(crate) const ROUND: f64 = 6_755_399_441_055_744.0;
/// Up to here two parts of π/2 suffice: what is left out of it, times 2^28, is below 1e-24.
pub(crate) const MAX_SMALL: f32 = 268_435_456.0;
/// (-1)^j / (2j + 1)! for j = 6 down to 0: sin r = r (1 - r²/6 + …), a product, so that zero keeps
/// its sign. The first term left out is below 2.1e-14 for r up to π/4.
pub(crate) const SIN_TERMS: [f64; 7] = [
    1.0 / 6_227_020_800.0,
    -1.0 / 39_916_800.0,
    1.0 / 362_880.0,
    -1.0 / 5_040.0,
    1.0 / 120.0,
    -1.0 / 6.0,
    1.0,
];
/// (-1)^j / (2j)! for j = 7 down to 0. The first term left out is below 1.1e-15.
pub(crate) const COS_TERMS: [f64; 8] = [
    -1.0 / 87_178_291_200.0,
    1.0 / 479_001_600.0,
    -1.0 / 3_628_800.0,
    1.0 / 40_320.0,
    -1.0 / 720.0,
    1.0 / 24.0,
    -0.5,
    1.0,
];

/// The first 256 bits after the point of 2/π.
const TWO_OVER_PI: [u128; 2] =
    [0xa2f9_836e_4e44_1529_fc27_57d1_f534_ddc0, 0xdb62_9599_3c43_9041_fe51_63ab_debb_c561];

/// sin x; infinity and NaN give NaN, and zero keeps its sign.
pub(crate) fn sin(x: f32) -> f32 {
    sin_of_quarters(x, 0)
}

/// cos x; infinity and NaN give NaN.
pub(crate) fn cos(x: f32) -> f32 {
    sin_of_quarters(x, 1)
}

/// sin(x + quarters π/2).
pub(crate) fn sin_of_quarters(x: f32, quarters: u32) -> f32 {
    if !x.is_finite() {
        return f32::NAN;
    }
    let (quadrant, r) = if x.abs() < MAX_SMALL { reduce_small(x) } else { reduce_huge(x) };
    let quadrant = quadrant.wrapping_add(quarters);
    let magnitude = match quadrant & 1 {
        0 => polynomial(&SIN_TERMS, r * r) * r,
        _ => polynomial(&COS_TERMS, r * r),
    };
    let value = if quadrant & 2 == 0 { magnitude } else { -magnitude };
    value as f32
}

/// x = quadrant π/2 + r (modulo 2π) with |r| <= π/4, give or take a rounding.
fn reduce_small(x: f32) -> (u32, f64) {
    let x = f64::from(x);
    let shifted = x.mul_add(FRAC_2_PI, ROUND);
    let n = shifted - ROUND;
    // Subtracting zero, not adding it, keeps the sign of a zero x.
    let r = (-FRAC_PI_2_LOW).mul_add(n, (-FRAC_PI_2_HIGH).mul_add(n, x));
    (shifted.to_bits() as u32, r)
}

/// The same for a magnitude of 2^28 and more, after Payne and Hanek: x is an integer M 2^e, so of
/// 2/π only the bits that reach below 4 matter.
fn reduce_huge(x: f32) -> (u32, f64) {
    let m = u128::from(x.to_bits() & 0x007f_ffff | 0x0080_0000);
    let e = (x.to_bits() >> 23 & 0xff) - 150; // 5 ..= 104
    // The 96 bits of 2/π 2^e from weight 2 down: two before the point, 94 after it.
    let skipped = e - 2;
    let [high, low] = TWO_OVER_PI;
    let window = (high << skipped | low >> (128 - skipped)) >> 32;
    // |x| 2/π modulo 4, in units of 2^-94: M has 24 bits, so the product fits.
    let turns = (m * window) & ((1 << 96) - 1);
    let quadrant = (turns + (1 << 93)) >> 94;
    let fraction = turns as i128 - ((quadrant as i128) << 94);
    let unit = f64::from_bits((1023 - 94) << 52);
    let r = fraction as f64 * unit * FRAC_PI_2_HIGH;
    // sin and cos of -x: turn the other way.
    if x.is_sign_negative() { ((quadrant as u32).wrapping_neg(), -r) } else { (quadrant as u32, r) }
}

/// Horner's rule, terms from the highest power down.
fn polynomial(terms: &[f64], z: f64) -> f64 {
    terms[1..].iter().fold(terms[0], |sum, term| sum.mul_add(z, *term))
}
