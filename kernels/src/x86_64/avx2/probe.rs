//! What the machine can do at best: reading in order, and the inner loops that products come down
//! to, with one operand from the first-level cache and nothing to unpack.
//!
//! Every loop keeps eight accumulators, more than latency times throughput of their instructions,
//! and each instruction has an operand of its own in memory, as in a product of many rows.

use std::arch::x86_64::*;

use super::{WIDTH, load, load_i8, load_u8, store, store_u8};

/// Independent chains of additions.
const CHAINS: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn probe_read(words: &[u64]) -> u64 {
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    let (chunks, rest) = words.as_chunks::<{ 4 * CHAINS }>();
    for chunk in chunks {
        // Nothing is asked for ahead: reading strictly in order, the CPU does that better itself.
        for (sum, words) in sums.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *sum = _mm256_xor_si256(*sum, load_words(words));
        }
    }
    let mut words = [0; 32];
    store_u8(
        &mut words,
        sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_xor_si256(a, b)),
    );
    let sums = words.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes));
    sums.chain(rest.iter().copied()).fold(0, |all, word| all ^ word)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
    let codes = codes.as_chunks::<32>().0;
    let codes = [load_u8(&codes[0]), load_u8(&codes[1]), load_u8(&codes[2]), load_u8(&codes[3])];
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..rounds {
        for x in x.as_chunks::<{ 32 * CHAINS }>().0 {
            for (chain, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<32>().0).enumerate() {
                let products = _mm256_maddubs_epi16(codes[chain % codes.len()], load_i8(x));
                *sum = _mm256_add_epi16(*sum, products);
            }
        }
    }
    let sum = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi16(a, b));
    let mut lanes = [0; 32];
    store_u8(&mut lanes, sum);
    let lanes = lanes.as_chunks::<2>().0.iter().map(|lane| u16::from_ne_bytes(*lane));
    lanes.fold(0, u16::wrapping_add)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn probe_fma(w: &[f32; 32], x: &[f32], rounds: usize) -> f32 {
    let w = w.as_chunks::<WIDTH>().0;
    let w = [load(&w[0]), load(&w[1]), load(&w[2]), load(&w[3])];
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for x in x.as_chunks::<{ WIDTH * CHAINS }>().0 {
            for (chain, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<WIDTH>().0).enumerate() {
                *sum = _mm256_fmadd_ps(w[chain % w.len()], load(x), *sum);
            }
        }
    }
    let mut lanes = [0.0; WIDTH];
    store(&mut lanes, sums.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b)));
    lanes.iter().sum()
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_words(words: &[u64; 4]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}
