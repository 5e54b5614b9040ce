//! The tiles of AMX: eight registers of up to 16 rows of 64 bytes, and the few instructions that are
//! needed of them. Stable Rust has no intrinsics for them, hence inline assembly. The compiler itself
//! never uses tiles, so what one block of assembly leaves in them the next one finds.
//!
//! | tiles | hold |
//! |---|---|
//! | 0 to 3 | sums, `[rows of activations][16 rows of weights]`: 2 x 2 |
//! | 4, 5 | activations, `[rows of activations][64 columns]` |
//! | 6, 7 | codes, `[four columns][16 rows of weights][column]` |

use std::arch::asm;

use crate::x86_64::avx512::band::{CHUNK_COLS, Chunk, FOURS, LANES, Sums};

/// Rows of activations in a tile.
pub(super) const TILE_TOKENS: usize = 16;
/// Rows of activations in two tiles, the most that [`Tiles`] multiplies at once.
pub(super) const TOKENS: usize = 2 * TILE_TOKENS;
/// Groups of 16 rows of weights that [`Tiles`] multiplies at once.
pub(super) const GROUPS: usize = 2;
/// Bytes of a row of a tile.
const ROW_BYTES: usize = 64;
/// Bytes from one row of activations' sums to the next.
const SUMS_STRIDE: usize = size_of::<Sums<GROUPS>>();

/// Whether this process may use tiles, after asking for it.
pub(super) fn permitted() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, of the kernel's documentation
    /// `arch/x86/xstate.rst`.
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: the call asks for permission to use more registers and touches no memory of ours; a
    // system that does not know it returns an error. `syscall` overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Shapes of the tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tiles, shaped for some rows of activations. They are released in the end, so that the system
/// has less to save.
pub(super) struct Tiles {
    tokens: usize,
}

impl Tiles {
    /// Shapes them for `tokens` rows of activations, 1 to [`TOKENS`], and clears them.
    ///
    /// # Safety
    ///
    /// The CPU has AMX, the process may use it, and no other [`Tiles`] lives in this thread.
    pub(super) unsafe fn new(tokens: usize) -> Self {
        assert!((1..=TOKENS).contains(&tokens), "{tokens} rows of activations");
        let upper = tokens.min(TILE_TOKENS) as u8;
        // A tile of no rows is not allowed; without a lower half its tiles are not used.
        let lower = (tokens.saturating_sub(TILE_TOKENS)).max(1) as u8;
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(ROW_BYTES as u16);
        let all = FOURS as u8;
        config.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, all, all]);
        // SAFETY: palette 1 has eight tiles of at most 16 rows of 64 bytes, which these are; by the
        // caller's word the CPU has the instruction.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
        }
        Self { tokens }
    }

    /// Sets all sums to 0.
    pub(super) fn clear(&mut self) {
        // SAFETY: `self` exists, so tiles can be used; only tiles are written.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack),
            );
        }
    }

    /// Adds the products of `strip` with the rows of activations that begin at `x`, `stride` bytes
    /// apart, to the sums in the tiles.
    ///
    /// # Panics
    ///
    /// If `x` does not hold as many columns of every row as the strip has.
    pub(super) fn multiply(&mut self, strip: &[Chunk<GROUPS>], x: &[i8], stride: usize) {
        let Some(last) = strip.len().checked_sub(1) else { return };
        let needed = (self.tokens - 1) * stride + strip.len() * CHUNK_COLS;
        assert!(x.len() >= needed, "{} activations of {needed}", x.len());
        let upper = x.as_ptr();
        let lower = upper.wrapping_add(TILE_TOKENS * stride);
        if self.tokens > TILE_TOKENS {
            // SAFETY: `self` exists, so tiles can be used and have their shapes. Chunk after chunk, 64
            // bytes of `tokens` rows of `x` are read, which `needed` covers, and the chunks of `strip`;
            // nothing is written but tiles.
            unsafe {
                asm!(
                    "2:",
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm6, [{codes} + {row}]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{codes} + {row} + 1024]",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{lower} + {stride}]",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    "add {upper}, 64",
                    "add {lower}, 64",
                    "add {codes}, 2048",
                    "sub {count}, 1",
                    "jnc 2b",
                    upper = inout(reg) upper => _,
                    lower = inout(reg) lower => _,
                    codes = inout(reg) strip.as_ptr() => _,
                    count = inout(reg) last => _,
                    stride = in(reg) stride,
                    row = in(reg) ROW_BYTES,
                    options(nostack, readonly),
                );
            }
        } else {
            // SAFETY: as above, for the upper half alone.
            unsafe {
                asm!(
                    "2:",
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm6, [{codes} + {row}]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{codes} + {row} + 1024]",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "add {upper}, 64",
                    "add {codes}, 2048",
                    "sub {count}, 1",
                    "jnc 2b",
                    upper = inout(reg) upper => _,
                    codes = inout(reg) strip.as_ptr() => _,
                    count = inout(reg) last => _,
                    stride = in(reg) stride,
                    row = in(reg) ROW_BYTES,
                    options(nostack, readonly),
                );
            }
        }
    }

    /// Takes up the sums of every row of activations.
    ///
    /// # Panics
    ///
    /// If there are not as many as the tiles are shaped for.
    pub(super) fn load(&mut self, sums: &[Sums<GROUPS>]) {
        assert_eq!(sums.len(), self.tokens, "one row of sums per row of activations");
        const { assert!(GROUPS == 2 && size_of::<[i32; LANES]>() == ROW_BYTES) };
        let upper = sums.as_ptr().cast::<u8>();
        // SAFETY: `self` exists, so tiles can be used. Rows of 64 bytes are read at two places of each
        // of the first rows of `sums`, at most 16.
        unsafe {
            asm!(
                "tileloadd tmm0, [{upper} + {stride}]",
                "tileloadd tmm1, [{upper} + {stride} + 64]",
                upper = in(reg) upper,
                stride = in(reg) SUMS_STRIDE,
                options(nostack, readonly),
            );
        }
        if self.tokens > TILE_TOKENS {
            let lower = upper.wrapping_add(TILE_TOKENS * SUMS_STRIDE);
            // SAFETY: as above, for the rows from the 16th on.
            unsafe {
                asm!(
                    "tileloadd tmm2, [{lower} + {stride}]",
                    "tileloadd tmm3, [{lower} + {stride} + 64]",
                    lower = in(reg) lower,
                    stride = in(reg) SUMS_STRIDE,
                    options(nostack, readonly),
                );
            }
        }
    }

    /// Writes the sums of every row of activations.
    ///
    /// # Panics
    ///
    /// If there are not as many as the tiles are shaped for.
    pub(super) fn store(&self, sums: &mut [Sums<GROUPS>]) {
        assert_eq!(sums.len(), self.tokens, "one row of sums per row of activations");
        let upper = sums.as_mut_ptr().cast::<u8>();
        // SAFETY: `self` exists, so tiles can be used. Rows of 64 bytes are written at two places of
        // each of the first rows of `sums`, at most 16.
        unsafe {
            asm!(
                "tilestored [{upper} + {stride}], tmm0",
                "tilestored [{upper} + {stride} + 64], tmm1",
                upper = in(reg) upper,
                stride = in(reg) SUMS_STRIDE,
                options(nostack),
            );
        }
        if self.tokens > TILE_TOKENS {
            let lower = upper.wrapping_add(TILE_TOKENS * SUMS_STRIDE);
            // SAFETY: as above, for the rows from the 16th on.
            unsafe {
                asm!(
                    "tilestored [{lower} + {stride}], tmm2",
                    "tilestored [{lower} + {stride} + 64], tmm3",
                    lower = in(reg) lower,
                    stride = in(reg) SUMS_STRIDE,
                    options(nostack),
                );
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `self` exists, so tiles can be used; nobody needs what is in them.
        unsafe { asm!("tilerelease", options(nomem, nostack)) }
    }
}
