//! AVX2 with FMA, F16C and BMI1: the token that proves them, the one way into each kernel, and the loads
//! and stores. What the kernels do is in the modules below.
#![expect(unsafe_code, reason = "calls behind the detected token, vector loads and stores")]

pub(super) mod attend;
mod attention;
mod elementwise;
mod functions;
mod group;
mod head;
mod lookup;
mod noise;
mod probe;
mod quantise;
pub(super) mod reduce;
mod screen;
pub(super) mod sparse;
pub(super) mod ternary;

use std::arch::x86_64::*;
use std::ops::Range;

use crate::backend::NotFinite;
use crate::float_matrix::FloatMatrix;
use crate::screen::{Kept, ScreenInput, ScreenMatrix, Threshold};
use crate::ternary_columns::TernaryColumns;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{AttentionState, Columns, KvBlock, KvBlockMut, Quantised};
use crate::workspace::Workspace;

/// Proof that this CPU has AVX2, FMA, F16C and BMI1: only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Errors
    ///
    /// The instruction set that this CPU or its operating system lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        // Those of every `target_feature` of this folder; BMI1 came with the same CPUs.
        require!("avx2", "fma", "f16c", "bmi1");
        Ok(Self(()))
    }

    /// Whether sums are looked up for `n` rows of activations.
    pub(crate) fn looks_up(self, n: usize) -> bool {
        n >= lookup::LEAST_TOKENS
    }
}

/// Makes each kernel a method of the token.
macro_rules! entries {
    ($($module:ident :: $name:ident ( $($argument:ident : $type:ty),* ) $(-> $result:ty)?;)*) => {
        impl Avx2 {
            $(pub(crate) fn $name(self, $($argument: $type),*) $(-> $result)? {
                // SAFETY: `self` exists, so AVX2, FMA, F16C and BMI1 were detected on this CPU.
                unsafe { $module::$name($($argument),*) }
            })*
        }
    };
}

entries! {
    quantise::quantise(x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite>;
    ternary::ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>);
    lookup::ternary_many(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>, workspace: &mut Workspace);
    sparse::ternary_rows(w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]);
    sparse::ternary_columns(w: TernaryColumns<'_>, columns: &[u32], x: Quantised<'_>, sums: &mut [i32]);
    sparse::positive(x: &[f32], first: u32, out: &mut [u32]) -> usize;
    sparse::nonzero(q: &[i8], out: &mut [u32]) -> usize;
    head::head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>);
    screen::screen(
        w: ScreenMatrix<'_>, group: usize, x: ScreenInput<'_>, thresholds: &[Threshold<'_>],
        kept: &mut [Kept]
    ) -> usize;
    screen::pack(rows: &[&[f32]], cols: usize, out: &mut [u8]);
    screen::head_rows(w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]);
    noise::noise(key: u64, first: u32, out: &mut [f32]);
    reduce::dot(a: &[f32], b: &[f32]) -> f32;
    reduce::sum(x: &[f32]) -> f32;
    reduce::rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);
    elementwise::add(x: &mut [f32], y: &[f32]);
    elementwise::squared_relu_mul(gate: &[f32], up: &[f32], y: &mut [f32]);
    elementwise::silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]);
    elementwise::rope_table(f: &[f32], position: u32, cos: &mut [f32], sin: &mut [f32]);
    elementwise::rope(x: &mut [f32], cos: &[f32], sin: &[f32]);
    elementwise::map_exp(x: &[f32], y: &mut [f32]);
    elementwise::map_ln(x: &[f32], y: &mut [f32]);
    elementwise::map_sin(x: &[f32], y: &mut [f32]);
    elementwise::map_cos(x: &[f32], y: &mut [f32]);
    attention::store_kv(k: &[f32], v: &[f32], slot: usize, block: KvBlockMut<'_>);
    attend::attend_block(q: &[f32], block: KvBlock<'_>, filled: usize, s: &mut AttentionState<'_>);
    attend::attend_group(q: &[f32], block: KvBlock<'_>, next: Option<KvBlock<'_>>, filled: &[u8], states: &mut [f32]);
    attention::attend_merge(into: &mut AttentionState<'_>, other: &AttentionState<'_>);
    attention::attend_finish(state: &AttentionState<'_>, out: &mut [f32]);
    probe::probe_read(words: &[u64]) -> u64;
    probe::probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> u16;
    probe::probe_fma(w: &[f32; 32], x: &[f32], rounds: usize) -> f32;
}

/// Floats in a register.
const WIDTH: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load(x: &[f32; WIDTH]) -> __m256 {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store(y: &mut [f32; WIDTH], value: __m256) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_ps(y.as_mut_ptr(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn load_u8(x: &[u8; 32]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn load_i8(x: &[i8; 32]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn store_u8(y: &mut [u8; 32], value: __m256i) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_si256(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_i8(y: &mut [i8; 32], value: __m256i) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_si256(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn store_i32x4(value: __m128i) -> [i32; 4] {
    let mut y = [0; 4];
    // SAFETY: the array covers exactly the 16 bytes written; `storeu` needs no alignment.
    unsafe { _mm_storeu_si128(y.as_mut_ptr().cast(), value) }
    y
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_i8x16(x: &[i8; 16]) -> __m128i {
    // SAFETY: the reference covers exactly the 16 bytes read; `loadu` needs no alignment.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_i16(x: &[i16; 16]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_i16(y: &mut [i16; 16], value: __m256i) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_si256(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_u64x2(value: __m128i) -> [u64; 2] {
    let mut y = [0; 2];
    // SAFETY: the array covers exactly the 16 bytes written; `storeu` needs no alignment.
    unsafe { _mm_storeu_si128(y.as_mut_ptr().cast(), value) }
    y
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_i32x4(x: &[i32; 4]) -> __m128i {
    // SAFETY: the reference covers exactly the 16 bytes read; `loadu` needs no alignment.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn store_x4(value: __m128) -> [f32; 4] {
    let mut y = [0.0; 4];
    // SAFETY: the array covers exactly the 16 bytes written; `storeu` needs no alignment.
    unsafe { _mm_storeu_ps(y.as_mut_ptr(), value) }
    y
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_i32x8(x: &[i32; WIDTH]) -> __m256i {
    // SAFETY: the reference covers exactly the 32 bytes read; `loadu` needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_i32x8(y: &mut [i32; WIDTH], value: __m256i) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_si256(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_u32x8(y: &mut [u32; WIDTH], value: __m256i) {
    // SAFETY: the reference covers exactly the 32 bytes written; `storeu` needs no alignment.
    unsafe { _mm256_storeu_si256(y.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_u16(x: &[u16; WIDTH]) -> __m128i {
    // SAFETY: the reference covers exactly the 16 bytes read; `loadu` needs no alignment.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_u16(y: &mut [u16; WIDTH], value: __m128i) {
    // SAFETY: the reference covers exactly the 16 bytes written; `storeu` needs no alignment.
    unsafe { _mm_storeu_si128(y.as_mut_ptr().cast(), value) }
}

/// Asks for the cache line `bytes` past `place`, which may lie outside any allocation.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn prefetch<T>(place: *const T, bytes: usize) {
    _mm_prefetch::<_MM_HINT_T0>(place.wrapping_byte_add(bytes).cast());
}
