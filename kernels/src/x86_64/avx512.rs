//! AVX-512 (F, BW, DQ, VL) with VNNI: the token that proves them, the one way into each kernel, and
//! the loads. What has no kernel here is done by those of AVX2, which the token implies.
#![expect(unsafe_code, reason = "calls behind the detected token, vector loads")]

mod attend;
pub(super) mod band;
mod elementwise;
mod functions;
mod head;
mod many;
mod noise;
mod probe;
mod quantise;
mod reduce;
pub(super) mod screen;
mod sparse;
mod ternary;

use std::arch::x86_64::*;
use std::ops::{Deref, Range};

use super::avx2::Avx2;
use crate::backend::NotFinite;
use crate::float_matrix::FloatMatrix;
use crate::scalar::reduce::LANES;
use crate::screen::{Kept, ScreenInput, ScreenMatrix, Threshold};
use crate::ternary_columns::TernaryColumns;
use crate::ternary_matrix::{ROW_BLOCK_BYTES, TernaryMatrix};
use crate::views::{AttentionState, Columns, KvBlock, Quantised};
use crate::workspace::Workspace;

/// Proof that this CPU has AVX-512 F, BW, DQ, VL and VNNI, POPCNT, and what [`Avx2`] proves: only
/// [`Avx512::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    /// # Errors
    ///
    /// The instruction set that this CPU or its operating system lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        let avx2 = Avx2::detect()?;
        // Those of every `target_feature` of this folder, and F, which they imply.
        require!("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "popcnt");
        Ok(Self(avx2))
    }

    /// Rows of weights that are unpacked together for `n` rows of activations.
    pub(crate) fn band_rows(self, n: usize) -> Option<usize> {
        (n >= many::LEAST_TOKENS).then_some(many::BAND_ROWS)
    }
}

impl Deref for Avx512 {
    type Target = Avx2;

    fn deref(&self) -> &Avx2 {
        &self.0
    }
}

/// Makes each kernel a method of the token.
macro_rules! entries {
    ($($module:ident :: $name:ident ( $($argument:ident : $type:ty),* ) $(-> $result:ty)?;)*) => {
        impl Avx512 {
            $(pub(crate) fn $name(self, $($argument: $type),*) $(-> $result)? {
                // SAFETY: `self` exists, so AVX-512 F, BW, DQ, VL, VNNI and POPCNT were detected.
                unsafe { $module::$name($($argument),*) }
            })*
        }
    };
}

entries! {
    quantise::quantise(x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite>;
    ternary::ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>);
    many::ternary_many(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>, workspace: &mut Workspace);
    sparse::ternary_rows(w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]);
    sparse::ternary_columns(w: TernaryColumns<'_>, columns: &[u32], x: Quantised<'_>, sums: &mut [i32]);
    sparse::positive(x: &[f32], first: u32, out: &mut [u32]) -> usize;
    sparse::nonzero(q: &[i8], out: &mut [u32]) -> usize;
    head::head_rows(w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]);
    head::head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>);
    screen::screen(
        w: ScreenMatrix<'_>, group: usize, x: ScreenInput<'_>, thresholds: &[Threshold<'_>],
        kept: &mut [Kept]
    ) -> usize;
    probe::probe_read(words: &[u64]) -> u64;
    probe::probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16;
    probe::probe_fma(w: &[f32; 32], x: &[f32], rounds: usize) -> f32;
    noise::noise(key: u64, first: u32, out: &mut [f32]);
    reduce::dot(a: &[f32], b: &[f32]) -> f32;
    reduce::sum(x: &[f32]) -> f32;
    reduce::rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);
    elementwise::silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]);
    elementwise::rope_table(f: &[f32], position: u32, cos: &mut [f32], sin: &mut [f32]);
    elementwise::map_exp(x: &[f32], y: &mut [f32]);
    elementwise::map_ln(x: &[f32], y: &mut [f32]);
    elementwise::map_sin(x: &[f32], y: &mut [f32]);
    elementwise::map_cos(x: &[f32], y: &mut [f32]);
    attend::attend_block(q: &[f32], block: KvBlock<'_>, filled: usize, s: &mut AttentionState<'_>);
    attend::attend_group(q: &[f32], block: KvBlock<'_>, next: Option<KvBlock<'_>>, filled: &[u8], states: &mut [f32]);
}

/// Aligned so that no load crosses a cache line.
#[repr(align(64))]
struct Lines<T>(T);

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load(x: &[f32; LANES]) -> __m512 {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store(y: &mut [f32; LANES], value: __m512) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_ps(y.as_mut_ptr(), value) }
}

/// The lanes of fewer than sixteen elements.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn lanes_of(elements: usize) -> __mmask16 {
    assert!(elements < LANES, "{elements} are a register or more");
    (1 << elements) - 1
}

/// Fewer than sixteen floats; the other lanes are +0.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_tail(x: &[f32]) -> __m512 {
    let lanes = lanes_of(x.len());
    // SAFETY: only the lanes of the mask are read, and the slice has as many elements.
    unsafe { _mm512_maskz_loadu_ps(lanes, x.as_ptr()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_u16(x: &[u16; LANES]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// Fewer than sixteen integers; the other lanes are 0.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_u16_tail(x: &[u16]) -> __m256i {
    let lanes = lanes_of(x.len());
    // SAFETY: only the lanes of the mask are read, and the slice has as many elements.
    unsafe { _mm256_maskz_loadu_epi16(lanes, x.as_ptr().cast()) }
}

/// The same 32 bytes in both halves.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_i8_twice(x: &[i8; ROW_BLOCK_BYTES]) -> __m512i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    let half = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
    _mm512_broadcast_i64x4(half)
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_codes(x: &[u8; 64]) -> __m512i {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn store_codes(y: &mut [u8; 64], value: __m512i) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), value) }
}

/// The sum of the lanes of each half, each half being a row of a tile of four.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn across(sums: [__m512i; 2]) -> __m128i {
    let [first, second] = sums;
    let (a, b) = (_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64::<1>(first));
    let (c, d) = (_mm512_castsi512_si256(second), _mm512_extracti64x4_epi64::<1>(second));
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}

/// As many floats as there is room for, fewer than sixteen: the first lanes.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_tail(y: &mut [f32], value: __m512) {
    let lanes = lanes_of(y.len());
    // SAFETY: only the lanes of the mask are written, and the slice has as many elements.
    unsafe { _mm512_mask_storeu_ps(y.as_mut_ptr(), lanes, value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_i8(x: &[i8; 64]) -> __m512i {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_i8(y: &mut [i8; 64], value: __m512i) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_i32(y: &mut [i32; LANES], value: __m512i) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_u32(y: &mut [u32; LANES], value: __m512i) {
    // SAFETY: the reference covers exactly the 64 bytes written; `storeu` needs no alignment.
    unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), value) }
}
