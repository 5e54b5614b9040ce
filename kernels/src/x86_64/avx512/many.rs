//! Many rows of activations by `vpdpbusd`, a register tile at a time: 64 rows of weights by up to
//! [`TOKENS`] of activations, four sums for each. Of 32 registers 24 hold sums, four hold codes, and one
//! the four activations that are multiplied next: ten loads for 24 products.

use std::arch::x86_64::*;
use std::ops::Range;

use super::band::{CHUNK_COLS, FOURS, LANES, Strip, Sums, by_bands, load_i32};
use super::load_codes;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};
use crate::workspace::Workspace;
use crate::x86_64::vnni::groups;

/// Rows of activations of a register tile.
const TOKENS: usize = 6;
/// Rows of activations from which on weights are unpacked to memory; fewer share them in registers.
pub(super) const LEAST_TOKENS: usize = 48;
/// Groups of 16 rows of weights of a register tile.
const GROUPS: usize = 4;
/// Rows of weights that are unpacked together.
pub(super) const BAND_ROWS: usize = GROUPS * LANES;

/// The activations of a chunk, four columns at a time.
type Fours = [[i8; 4]; FOURS];

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn ternary_many(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
    workspace: &mut Workspace,
) {
    if x.rows() < LEAST_TOKENS {
        return super::ternary::ternary(w, tiles, x, y);
    }
    by_bands(w, tiles, x, &mut y, workspace, &mut |strip, x, sums| {
        multiply_strip(strip, x, sums);
    });
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_strip(strip: Strip<'_, GROUPS>, x: Quantised<'_>, sums: &mut [Sums<GROUPS>]) {
    for tokens in groups(x.rows(), TOKENS) {
        let sums = &mut sums[tokens.clone()];
        macro_rules! by {
            ($($n:literal)*) => {
                match tokens.len() {
                    $($n => multiply::<$n>(strip, x, tokens.start, sums),)*
                    n => unreachable!("a group of {n}"),
                }
            };
        }
        by!(1 2 3 4 5 6);
    }
}

/// The register tile: `N` rows of activations from `first` on.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply<const N: usize>(
    strip: Strip<'_, GROUPS>,
    x: Quantised<'_>,
    first: usize,
    sums: &mut [Sums<GROUPS>],
) {
    let mut rows: [&[Fours]; N] = [&[]; N];
    for (i, row) in rows.iter_mut().enumerate() {
        let x = &x.row(first + i)[strip.first_col..][..strip.chunks.len() * CHUNK_COLS];
        *row = x.as_chunks().0.as_chunks().0;
    }
    let mut totals = [[_mm512_setzero_si512(); GROUPS]; N];
    if !strip.is_first {
        for (totals, sums) in totals.iter_mut().zip(&*sums) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = load_i32(sum);
            }
        }
    }
    for (at, chunk) in strip.chunks.iter().enumerate() {
        for four in 0..FOURS {
            let (a, b) = (load_codes(&chunk[0][four]), load_codes(&chunk[1][four]));
            let (c, d) = (load_codes(&chunk[2][four]), load_codes(&chunk[3][four]));
            for i in 0..N {
                let x = _mm512_set1_epi32(i32::from_le_bytes(rows[i][at][four].map(|x| x as u8)));
                totals[i][0] = _mm512_dpbusd_epi32(totals[i][0], a, x);
                totals[i][1] = _mm512_dpbusd_epi32(totals[i][1], b, x);
                totals[i][2] = _mm512_dpbusd_epi32(totals[i][2], c, x);
                totals[i][3] = _mm512_dpbusd_epi32(totals[i][3], d, x);
            }
        }
    }
    for (totals, sums) in totals.iter().zip(sums) {
        for (total, sum) in totals.iter().zip(sums) {
            store_i32(sum, *total);
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_i32(y: &mut [i32; LANES], value: __m512i) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), value) }
}
