//! NEON: the tokens that prove it, the one way into each kernel, the loads and stores, and the
//! instructions for which stable Rust has no function. What the kernels do is in the modules below;
//! what has none here is taken from the scalar definition, which compilers turn into NEON well
//! enough.
#![expect(
    unsafe_code,
    reason = "calls behind the detected token, vector loads and stores, assembly"
)]

mod attention;
mod elementwise;
mod functions;
mod head;
mod quantise;
mod reduce;
mod ternary;

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::ops::{Deref, Range};

use crate::backend::NotFinite;
use crate::float_matrix::FloatMatrix;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{AttentionState, Columns, KvBlock, Quantised};

/// Proof that this CPU has NEON: only [`Neon::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neon(());

impl Neon {
    /// # Errors
    ///
    /// What this CPU lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        is_aarch64_feature_detected!("neon").then_some(Self(())).ok_or("neon")
    }
}

/// Proof that this CPU has NEON with the dot products of int8 (`FEAT_DotProd`, optional from Armv8.2
/// on): only [`NeonDotprod::detect`] makes one. All but the ternary products are those of [`Neon`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NeonDotprod(Neon);

impl NeonDotprod {
    /// # Errors
    ///
    /// What this CPU lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        let neon = Neon::detect()?;
        is_aarch64_feature_detected!("dotprod").then_some(Self(neon)).ok_or("dotprod")
    }

    pub(crate) fn ternary(
        self,
        w: TernaryMatrix<'_>,
        tiles: Range<usize>,
        x: Quantised<'_>,
        y: Columns<'_>,
    ) {
        // SAFETY: `self` holds a `Neon`, so NEON was detected on this CPU.
        unsafe { ternary::with_dot_products(self, w, tiles, x, y) }
    }
}

impl Deref for NeonDotprod {
    type Target = Neon;

    fn deref(&self) -> &Neon {
        &self.0
    }
}

/// Makes each kernel a method of the token.
macro_rules! entries {
    ($($module:ident :: $name:ident ( $($argument:ident : $type:ty),* ) $(-> $result:ty)?;)*) => {
        impl Neon {
            $(pub(crate) fn $name(self, $($argument: $type),*) $(-> $result)? {
                // SAFETY: `self` exists, so NEON was detected on this CPU.
                unsafe { $module::$name($($argument),*) }
            })*
        }
    };
}

entries! {
    quantise::quantise(x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite>;
    ternary::ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>);
    head::head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>);
    reduce::dot(a: &[f32], b: &[f32]) -> f32;
    reduce::sum(x: &[f32]) -> f32;
    reduce::rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);
    elementwise::silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]);
    elementwise::map_exp(x: &[f32], y: &mut [f32]);
    attention::attend_block(q: &[f32], block: KvBlock<'_>, filled: usize, s: &mut AttentionState<'_>);
    attention::attend_group(q: &[f32], block: KvBlock<'_>, next: Option<KvBlock<'_>>, filled: &[u8], states: &mut [f32]);
}

/// Calls a kernel of the token by its name, or else the scalar definition of that name: an operation
/// gets its own kernel by an entry above and a line here.
macro_rules! neon {
    ($token:ident, quantise, quantise($($argument:expr),*)) => { $token.quantise($($argument),*) };
    ($token:ident, fused, ternary($($argument:expr),*)) => { $token.ternary($($argument),*) };
    ($token:ident, fused, head($($argument:expr),*)) => { $token.head($($argument),*) };
    ($token:ident, fused, attend_block($($argument:expr),*)) => {
        $token.attend_block($($argument),*)
    };
    ($token:ident, fused, attend_group($($argument:expr),*)) => {
        $token.attend_group($($argument),*)
    };
    ($token:ident, reduce, dot($($argument:expr),*)) => { $token.dot($($argument),*) };
    ($token:ident, reduce, sum($($argument:expr),*)) => { $token.sum($($argument),*) };
    ($token:ident, reduce, rms_norm($($argument:expr),*)) => { $token.rms_norm($($argument),*) };
    ($token:ident, elementwise, silu_mul($($argument:expr),*)) => {
        $token.silu_mul($($argument),*)
    };
    ($token:ident, elementwise, map_exp($($argument:expr),*)) => { $token.map_exp($($argument),*) };
    ($token:ident, $($module:ident)::+, $function:ident($($argument:expr),*)) => {{
        let _ = $token;
        $crate::scalar::$($module)::+::$function($($argument),*)
    }};
}
pub(crate) use neon;

/// Floats in a register.
const WIDTH: usize = 4;

#[target_feature(enable = "neon")]
#[inline]
fn load(x: &[f32; WIDTH]) -> float32x4_t {
    // SAFETY: the reference covers exactly the 16 bytes read.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store(y: &mut [f32; WIDTH], value: float32x4_t) {
    // SAFETY: the reference covers exactly the 16 bytes written.
    unsafe { vst1q_f32(y.as_mut_ptr(), value) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_u8(x: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the reference covers exactly the 16 bytes read.
    unsafe { vld1q_u8(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_i8(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: the reference covers exactly the 16 bytes read.
    unsafe { vld1q_s8(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_i8(y: &mut [i8; 16], value: int8x16_t) {
    // SAFETY: the reference covers exactly the 16 bytes written.
    unsafe { vst1q_s8(y.as_mut_ptr(), value) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_u16(x: &[u16; 8]) -> uint16x8_t {
    // SAFETY: the reference covers exactly the 16 bytes read.
    unsafe { vld1q_u16(x.as_ptr()) }
}

/// Adds to each i32 the sum of its four products of int8, exactly.
#[target_feature(enable = "neon")]
#[inline]
fn dot_product(_: NeonDotprod, mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the token exists, so dot products were detected on this CPU; registers alone change.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The values of four binary16, exact; a signalling NaN becomes quiet.
#[target_feature(enable = "neon")]
#[inline]
fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: every AArch64 CPU with NEON has this instruction; registers alone change.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {bits:v}.4h",
            wide = out(vreg) wide,
            bits = in(vreg) bits,
            options(pure, nomem, nostack),
        );
    }
    wide
}

/// The values of eight bfloat16, exact: their bits are the upper halves of a float's.
#[target_feature(enable = "neon")]
#[inline]
fn widen_bf16(bits: uint16x8_t) -> [float32x4_t; 2] {
    let zero = vdupq_n_u16(0);
    [vzip1q_u16(zero, bits), vzip2q_u16(zero, bits)].map(|wide| vreinterpretq_f32_u16(wide))
}
