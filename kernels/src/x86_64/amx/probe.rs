//! What the machine can do at best in tiles: products with activations from the first-level cache and
//! codes that stay where they are.

use super::tiles::{TILE_TOKENS, Tiles};
use crate::x86_64::avx512::band::{CHUNK_COLS, Chunk, FOURS, LANES, Sums};

/// As many rounds are done at once as a tile has rows of weights: all of them are the same.
const ROUNDS: usize = 2 * LANES;
/// Activations of a pass: all rows of two tiles, of both halves of the codes.
const PASS: usize = 4 * TILE_TOKENS * CHUNK_COLS;

/// `rounds / 32` rounds of 32 and what then remains, which is returned beside the sum modulo 2^16.
///
/// # Safety
///
/// The CPU has AMX, and the process may use it.
pub(super) unsafe fn probe_multiply(codes: &[u8; 128], x: &[i8], rounds: usize) -> (u16, usize) {
    if rounds < ROUNDS || !x.len().is_multiple_of(PASS) {
        return (0, rounds);
    }
    // 64 columns each, for every row of weights.
    let mut chunks: [Chunk<2>; 2] = [[[[0; 64]; FOURS]; 2]; 2];
    for (chunk, codes) in chunks.iter_mut().zip(codes.as_chunks::<CHUNK_COLS>().0) {
        for group in chunk {
            for (four, codes) in group.iter_mut().zip(codes.as_chunks::<4>().0) {
                four.as_chunks_mut::<4>().0.fill(*codes);
            }
        }
    }
    // SAFETY: the caller has AMX; these are the only tiles of the call.
    let mut tiles = unsafe { Tiles::new(2 * TILE_TOKENS) };
    for _ in 0..rounds / ROUNDS {
        for x in x.chunks_exact(PASS) {
            tiles.multiply(&chunks, x, 2 * CHUNK_COLS);
        }
    }
    let mut sums: [Sums<2>; 2 * TILE_TOKENS] = [[[0; LANES]; 2]; 2 * TILE_TOKENS];
    tiles.store(&mut sums);
    let sums = sums.as_flattened().as_flattened();
    (sums.iter().fold(0, |all, sum| sum.wrapping_add(all)) as u16, rounds % ROUNDS)
}
