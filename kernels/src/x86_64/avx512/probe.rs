//! What the machine can do at best with registers of 64 bytes: see AVX2's `probe.rs`.

use std::arch::x86_64::*;

use super::{load, load_codes, store};
use crate::scalar::reduce::LANES;

/// Independent chains of additions: more than latency times throughput of two units.
const CHAINS: usize = 16;
/// Rounds that share what they load: two loads of 64 bytes a cycle are more than a first-level cache
/// gives for long, and a register tile needs less than one for two products.
const TOGETHER: usize = 2;
/// Vectors that are loaded before the chains begin again.
const LOADS: usize = CHAINS / TOGETHER;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn probe_read(words: &[u64]) -> u64 {
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    let (chunks, rest) = words.as_chunks::<{ 8 * CHAINS }>();
    for chunk in chunks {
        // Nothing is asked for ahead: reading strictly in order, the CPU does that better itself.
        for (sum, words) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *sum = _mm512_xor_si512(*sum, load_words(words));
        }
    }
    let mut all = _mm512_setzero_si512();
    for sum in sums {
        all = _mm512_xor_si512(all, sum);
    }
    let mut words = [0; 64];
    super::store_codes(&mut words, all);
    let sums = words.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes));
    sums.chain(rest.iter().copied()).fold(0, |all, word| all ^ word)
}

/// By `vpdpbusd`, each operand from the first-level cache serving two.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
    let [first, second] = codes.as_chunks::<64>().0 else { unreachable!("128 are twice 64") };
    let codes = [load_codes(first), load_codes(second)];
    let again = std::hint::black_box(codes);
    let mut sums = [[_mm512_setzero_si512(); TOGETHER]; LOADS];
    for _ in 0..rounds / TOGETHER {
        for x in x.as_chunks::<{ 64 * LOADS }>().0 {
            for (load, (sums, x)) in sums.iter_mut().zip(x.as_chunks::<64>().0).enumerate() {
                let x = load_signed(x);
                sums[0] = _mm512_dpbusd_epi32(sums[0], codes[load % 2], x);
                // Of another round, which the compiler must not take for the same.
                sums[1] = _mm512_dpbusd_epi32(sums[1], again[load % 2], x);
            }
        }
    }
    if rounds % TOGETHER == 1 {
        for x in x.as_chunks::<{ 64 * LOADS }>().0 {
            for (load, (sums, x)) in sums.iter_mut().zip(x.as_chunks::<64>().0).enumerate() {
                sums[0] = _mm512_dpbusd_epi32(sums[0], codes[load % 2], load_signed(x));
            }
        }
    }
    let sums = sums.as_flattened();
    let mut all = _mm512_setzero_si512();
    for sum in sums {
        all = _mm512_add_epi32(all, *sum);
    }
    _mm512_reduce_add_epi32(all) as u16
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn probe_fma(w: &[f32; 32], x: &[f32], rounds: usize) -> f32 {
    let [first, second] = w.as_chunks::<LANES>().0 else { unreachable!("32 are twice 16") };
    let w = [load(first), load(second)];
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for x in x.as_chunks::<{ LANES * CHAINS }>().0 {
            for (chain, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<LANES>().0).enumerate() {
                *sum = _mm512_fmadd_ps(w[chain % 2], load(x), *sum);
            }
        }
    }
    let mut all = _mm512_setzero_ps();
    for sum in sums {
        all = _mm512_add_ps(all, sum);
    }
    let mut lanes = [0.0; LANES];
    store(&mut lanes, all);
    lanes.iter().sum()
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_words(words: &[u64; 8]) -> __m512i {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_signed(x: &[i8; 64]) -> __m512i {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}
