//! The randomness of draws: a hash of the draw and the token, the Gumbel noise that it stands for, and
//! a bound of that noise which costs a few operations. `docs/numerics.md`, section "Sampling".

use crate::scalar::transcendental::ln64;

/// One half of 2^-52, the distance of two values of u: u is the middle of its interval.
const HALF: f64 = 0.5;
/// 2^-52.
const UNIT: f64 = f64::EPSILON;

/// The bound where the upper 24 bits of the complement are all zero: u is at most 1 - 2^-53 and the
/// noise at most 53 ln 2 = 36.74.
pub(crate) const NOISE_MOST: f32 = 37.0;
/// The bits of 2^24 as a float.
const TWO_TO_24_BITS: i32 = (127 + 24) << 23;
/// ln 2 * 2^-23, rounded to f32: noise for each unit that bits are below those.
const LN_2_OF_UNIT: f32 = f32::from_bits(0x33b1_7218);
/// Covers four roundings of numbers up to 17 (at most 4.1e-6) and those of the noise itself.
const SLACK: f32 = 1e-4;

/// The state from which every token's hash of one draw begins: the token of choice `choice` at
/// `position` of an answer with this seed.
///
/// The hash is rounds of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
/// Generators", 2014), one for each part. Each round is a bijection of its state, so two positions of
/// one answer, or two tokens of one draw, never share a hash. Stable for ever: a change would change
/// answers.
pub fn draw_key(seed: u64, choice: u32, position: u32) -> u64 {
    mix(mix(mix(seed) ^ u64::from(choice)) ^ u64::from(position))
}

/// The Gumbel noise of a token in the draw of `key`: -ln(-ln u) with u in (0, 1) from 52 bits of the
/// token's hash. From -3.6 to 36.8.
pub fn gumbel(key: u64, token: u32) -> f64 {
    -ln64(-ln64(uniform(hash(key, token))))
}

/// Writes an upper bound of [`gumbel`] for each of the tokens from `first` on. Compiled for each
/// backend from this one source.
///
/// With v = 1 - u, -ln u is at least v, so the noise is at most -ln v. v is at least m 2^-24, where m
/// is the number in the upper 24 bits of the complement of the hash. As a float, m = 2^e (1 + f), its
/// bits are (127 + e + f) 2^23, and log2 m is at least e + f, the chord of the logarithm. So -ln v is
/// at most ln 2 (24 - e - f), and at most 0.06 less than that where v is small.
#[inline(always)]
pub(crate) fn noise(key: u64, first: u32, out: &mut [f32]) {
    for (place, bound) in out.iter_mut().enumerate() {
        let m = (!hash(key, first.wrapping_add(place as u32)) >> 40) as i32;
        let distance = TWO_TO_24_BITS - (m as f32).to_bits() as i32;
        let chord = distance as f32 * LN_2_OF_UNIT + SLACK;
        *bound = if m == 0 { NOISE_MOST } else { chord };
    }
}

#[inline(always)]
fn hash(key: u64, token: u32) -> u64 {
    mix(key ^ u64::from(token))
}

/// The middle of one of 2^52 equal parts of (0, 1). Exact.
fn uniform(hash: u64) -> f64 {
    ((hash >> 12) as f64 + HALF) * UNIT
}

/// One output of SplitMix64 from state `z`.
#[inline(always)]
pub(crate) fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
