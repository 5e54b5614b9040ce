//! Work that only measures the machine: what every backend's version of it must yield.

/// Exclusive or of the 64-bit words.
pub(crate) fn probe_read(words: &[u64]) -> u64 {
    words.iter().fold(0, |all, word| all ^ word)
}

/// `rounds` times `Σ codes[j mod 128] x[j]`, modulo 2^16.
pub(crate) fn probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
    let mut sum = 0i32;
    for _ in 0..rounds {
        for x in x.as_chunks::<128>().0 {
            let products = codes.iter().zip(x).map(|(code, x)| i32::from(*code) * i32::from(*x));
            sum = sum.wrapping_add(products.sum());
        }
    }
    sum as u16
}

/// `rounds` times `Σ w[j mod 32] x[j]` by fused multiply-adds in lanes of no fixed order: exact
/// while every sum is.
pub(crate) fn probe_fma(w: &[f32; 32], x: &[f32], rounds: usize) -> f32 {
    let mut lanes = [0.0f32; 32];
    for _ in 0..rounds {
        for x in x.as_chunks::<32>().0 {
            for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
                *lane = w.mul_add(*x, *lane);
            }
        }
    }
    lanes.iter().sum()
}
