//! 16-bit floats by their bits: the roundings of IEEE 754, equal to what F16C does. No flush of
//! subnormals in either direction.

/// The value of binary16 bits, exact. A signalling NaN becomes quiet.
pub(crate) fn widen_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = bits >> 10 & 0x1f;
    let mantissa = u32::from(bits & 0x3ff);
    let magnitude = match exponent {
        // Units of 2^-24; the product is exact.
        0 => (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        0x1f if mantissa == 0 => f32::INFINITY.to_bits(),
        0x1f => 0x7fc0_0000 | mantissa << 13,
        // The exponent's bias grows from 15 to 127.
        _ => (u32::from(exponent) + 112) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// The binary16 nearest to `x`, ties to even; 65520 and more become infinite. A NaN becomes quiet
/// and keeps the upper bits of its payload.
pub(crate) fn narrow_f16(x: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
    const FIRST_INFINITE: u32 = 0x477f_f000; // 65520, halfway between 65504 and 65536
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    let rounded = if magnitude > f32::INFINITY.to_bits() {
        0x7e00 | (magnitude >> 13) as u16 & 0x3ff
    } else if magnitude >= FIRST_INFINITE {
        0x7c00
    } else if magnitude >= SMALLEST_NORMAL {
        // Half a unit less one, plus one if the kept part is odd: ties go to even. A carry out of
        // the mantissa moves to the next exponent, which is right.
        let odd = magnitude >> 13 & 1;
        ((magnitude - (112 << 23) + 0xfff + odd) >> 13) as u16
    } else {
        // One unit of 0.5 is 2^-24, the unit of binary16's subnormals, so the addition rounds.
        ((f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()) as u16
    };
    sign | rounded
}

/// The value of bfloat16 bits, exact.
pub(crate) fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
