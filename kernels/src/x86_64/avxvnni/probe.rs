//! What the machine can do at best with `vpdpbusd` of 32 bytes: see AVX2's `probe.rs`.

use std::arch::x86_64::*;

use crate::x86_64::avx2::{load_i8, load_u8, store_u8};

/// Independent chains of additions: latency times throughput of two units, nearly.
const CHAINS: usize = 8;

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) fn probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
    let codes = codes.as_chunks::<32>().0;
    let codes = [load_u8(&codes[0]), load_u8(&codes[1]), load_u8(&codes[2]), load_u8(&codes[3])];
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..rounds {
        for x in x.as_chunks::<{ 32 * CHAINS }>().0 {
            for (chain, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<32>().0).enumerate() {
                *sum = _mm256_dpbusd_avx_epi32(*sum, codes[chain % codes.len()], load_i8(x));
            }
        }
    }
    let mut all = _mm256_setzero_si256();
    for sum in sums {
        all = _mm256_add_epi32(all, sum);
    }
    let mut lanes = [0; 32];
    store_u8(&mut lanes, all);
    let lanes = lanes.as_chunks::<4>().0.iter().map(|lane| u32::from_ne_bytes(*lane));
    lanes.fold(0, u32::wrapping_add) as u16
}
