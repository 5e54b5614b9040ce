//! The noise of draws: the logarithm it is made of, known values, and bounds that hold and are close.

use super::{Backend, LENGTHS, Random, scalar};
use crate::scalar::noise::{NOISE_MOST, mix};
use crate::scalar::transcendental::ln64;
use crate::{draw_key, gumbel};

/// How many times fewer values are looked at where an emulator may run the tests.
const SPARSER: usize = if cfg!(target_arch = "x86_64") { 1 } else { 101 };

#[test]
fn the_logarithm_is_accurate() {
    let mut random = Random(41);
    let mut greatest = 0.0f64;
    let mut look = |x: f64| {
        let (ours, want) = (ln64(x), x.ln());
        let unit = f64::from_bits(want.abs().to_bits() + 1) - want.abs();
        greatest = greatest.max((ours - want).abs() / unit);
    };
    for round in 0..3_000_000 / SPARSER {
        // What a draw asks for, then every magnitude.
        let u = ((random.bits() >> 12) as f64 + 0.5) * f64::EPSILON;
        look(u);
        look(-ln64(u));
        let exponent = (round as u64 % 2_046 + 1) << 52;
        look(f64::from_bits(exponent | random.bits() >> 12));
    }
    for x in [f64::MIN_POSITIVE, f64::MAX, 0.5, 2.0, 1.0 - f64::EPSILON / 2.0, 1.0 + f64::EPSILON] {
        look(x);
    }
    println!("ln64: {greatest} units in the last place, beside the system's");
    // The system's is within one unit itself.
    assert!(greatest <= 2.0, "{greatest} units in the last place");
    assert_eq!(ln64(1.0).to_bits(), 0);
}

/// The hash is part of what a seed means: these values may never change.
#[test]
fn the_hash_is_what_it_was() {
    // The reference generator's first outputs from state 0 are those of states k * gamma.
    assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    for ((seed, choice, position, token), want) in KNOWN {
        let found = gumbel(draw_key(seed, choice, position), token);
        assert_eq!(found, want, "{seed}, {choice}, {position}, {token}");
    }
}

/// Computed by another program from the definition in `docs/numerics.md`, which has them too.
const KNOWN: [((u64, u32, u32, u32), f64); 4] = [
    ((0, 0, 0, 0), -0.7143951177675683),
    ((42, 0, 17, 0), -0.6751294210062997),
    ((42, 1, 17, 0), -0.17163500189092448),
    ((42, 1, 17, 128_000), 0.39267616813930506),
];

/// The state of a token's hash from which [`mix`] makes `hash`.
fn unmix(hash: u64) -> u64 {
    // Inverses of the factors modulo 2^64, by Newton's method; of a xor with a shift, by repeating it.
    let inverse =
        |a: u64| (0..6).fold(a, |x, _| x.wrapping_mul(2u64.wrapping_sub(a.wrapping_mul(x))));
    let unshift =
        |z: u64, by: u32| z ^ z >> by ^ z >> (2 * by) ^ z.checked_shr(3 * by).unwrap_or(0);
    let z = unshift(hash, 31).wrapping_mul(inverse(0x94d0_49bb_1331_11eb));
    let z = unshift(z, 27).wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9));
    unshift(z, 30).wrapping_sub(0x9e37_79b9_7f4a_7c15)
}

/// Noise and its bound of a token with this hash.
fn of_hash(hash: u64) -> (f64, f64) {
    let key = unmix(hash);
    assert_eq!(mix(key), hash);
    let mut bound = [0.0];
    scalar().noise(key, 0, &mut bound);
    (gumbel(key, 0), f64::from(bound[0]))
}

#[test]
fn bounds_hold_and_are_close() {
    let mut bounds = [0.0; 1_000];
    let (mut sum, mut count) = (0.0, 0);
    for key in 0..4_000 / SPARSER as u64 {
        let key = draw_key(key, 3, 1);
        let first = (key >> 40) as u32;
        Backend::detect().noise(key, first, &mut bounds);
        for (token, bound) in (first..).zip(bounds) {
            let (noise, bound) = (gumbel(key, token), f64::from(bound));
            assert!(noise <= bound, "{noise} is above {bound}");
            // Of less, 1 - u is not near -ln u; of more, 24 bits leave few.
            if (5.0..12.0).contains(&noise) {
                assert!(bound - noise < 0.075, "{bound} for {noise}");
            }
            sum += noise;
            count += 1;
        }
    }
    // The mean of the distribution is Euler's constant.
    assert!((sum / f64::from(count) - 0.5772).abs() < 0.02, "{}", sum / f64::from(count));
}

#[test]
fn bounds_hold_at_the_ends() {
    let most = of_hash(u64::MAX);
    assert!((most.0 - 36.7368).abs() < 1e-4 && most.1 == f64::from(NOISE_MOST), "{most:?}");
    let least = of_hash(0);
    assert!((least.0 + 3.604).abs() < 1e-3 && least.1 < 1e-3, "{least:?}");
    let mut random = Random(42);
    for bit in 0..64 {
        for _ in 0..1_000 {
            // Complements of every magnitude, and their neighbours.
            let some = random.bits() >> bit;
            for complement in
                [some, 1 << bit, (1 << bit) - 1, (some | 1) << 40, (some << 40).wrapping_sub(1)]
            {
                let (noise, bound) = of_hash(!complement);
                assert!(noise <= bound, "{complement:#x}: {noise} is above {bound}");
            }
        }
    }
}

#[test]
fn every_backend_bounds_noise_alike() {
    for (seed, length) in LENGTHS.into_iter().enumerate() {
        let key = draw_key(seed as u64, 0, 0);
        for first in [0, 64, u32::MAX - 5] {
            let mut want = vec![0.0; length];
            scalar().noise(key, first, &mut want);
            for backend in Backend::available() {
                let mut found = vec![f32::NAN; length];
                backend.noise(key, first, &mut found);
                super::check(backend, "bounds of noise", &found, &want);
            }
        }
    }
}
