//! Every backend against the scalar definition, bit for bit, and the definition against what is
//! known to be right. A new backend is tested by being in [`Backend::available`].

mod attention;
mod elements;
mod functions;
mod layout;
mod linear;
mod noise;
mod probe;
mod screen;
mod sparse;

use crate::{Backend, known_answer};

/// A fixed sequence of test values.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.bits() >> 33) as usize % limit
    }

    /// From -1 to 1.
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    /// Finite values of every magnitude, subnormals and zeros of both signs among them.
    fn extreme(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| match self.below(8) {
                0 => 0.0 * self.float(),
                1 => f32::from_bits(self.bits() as u32 & 0x807f_ffff),
                _ => f32::from_bits((self.bits() >> 32) as u32 & 0xff7f_ffff),
            })
            .collect()
    }

    /// Ordinary values with some of [`SPECIAL`] among them.
    fn special(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| match self.below(4) {
                0 => SPECIAL[self.below(SPECIAL.len())],
                _ => self.float(),
            })
            .collect()
    }

    /// The three kinds of rows that every operation is tested on.
    fn kinds(&mut self, count: usize) -> [Vec<f32>; 3] {
        [self.floats(count), self.extreme(count), self.special(count)]
    }
}

/// Where float arithmetic has its edges.
const SPECIAL: [f32; 20] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    f32::from_bits(1),
    f32::from_bits(0x807f_ffff),
    f32::EPSILON,
    65_504.0,
    65_520.0,
    88.72284,
    -87.33655,
    -103.98,
];

/// Lengths round every multiple of a register, and none.
const LENGTHS: [usize; 17] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 64, 100, 257, 1_000];

/// The same bits; where the definition says NaN, any NaN.
#[track_caller]
fn check(backend: Backend, what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(same, "{}: {what}: element {i} is {got:e}, not {want:e}", backend.name());
    }
}

fn scalar() -> Backend {
    Backend::by_name("scalar").unwrap()
}

#[test]
fn a_backend_is_found_by_its_name_only() {
    for backend in Backend::available() {
        assert_eq!(Backend::by_name(backend.name()), Some(backend));
    }
    assert_eq!(Backend::available().next(), Some(scalar()));
    assert_eq!(Backend::by_name("auto"), Some(Backend::detect()));
    assert_eq!(Backend::available().last().map(Backend::isa), Some(Backend::detect().isa()));
    assert_eq!(Backend::by_name("mmx"), None);
}

/// FNV-1a of the known answer. If a change alters it, the numerics changed: say so in
/// `docs/numerics.md` and raise `KERNEL_REVISION`.
const KNOWN_ANSWER_HASH: u64 = 0x7974_2c95_bfdb_a746;

#[test]
fn the_known_answer_is_the_same_everywhere() {
    for backend in Backend::available() {
        let (mut hash, mut bytes) = (0xcbf2_9ce4_8422_2325u64, 0);
        known_answer(backend, &mut |result| {
            bytes += result.len();
            for byte in result {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        });
        assert!(bytes > 40_000, "{}: only {bytes} bytes", backend.name());
        assert_eq!(hash, KNOWN_ANSWER_HASH, "{}: {hash:#x}", backend.name());
    }
}
