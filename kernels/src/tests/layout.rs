//! Packing, checking and viewing; the conversions of 16-bit floats.

use proptest::prelude::*;

use super::Random;
use crate::scalar::half::{narrow_f16, widen_bf16, widen_f16};
use crate::{
    Arrangement, Columns, FloatKind, FloatMatrix, LayoutError, TernaryMatrix, pack_tile,
    padded_cols,
};

/// Both orders of blocks.
pub(super) const ARRANGEMENTS: [Arrangement; 2] = [Arrangement::Tiles, Arrangement::Rows];

/// Packs `trits`, `[rows][cols]`.
pub(super) fn pack(arrangement: Arrangement, trits: &[i8], cols: usize) -> Vec<u8> {
    let rows: Vec<&[i8]> = trits.chunks(cols).collect();
    let mut bytes = Vec::new();
    for rows in rows.chunks(TernaryMatrix::TILE_ROWS) {
        let mut tile = vec![0xff; TernaryMatrix::tile_bytes(cols)];
        pack_tile(arrangement, rows, cols, &mut tile);
        bytes.extend(tile);
    }
    bytes
}

/// An arrangement.
fn arrangements() -> impl Strategy<Value = Arrangement> {
    prop::sample::select(&ARRANGEMENTS[..])
}

/// A matrix of trits, `[rows][cols]`, with its columns.
fn matrices() -> impl Strategy<Value = (usize, Vec<i8>)> {
    (1usize..=13, 1usize..=300)
        .prop_flat_map(|(rows, cols)| (Just(cols), prop::collection::vec(-1i8..=1, rows * cols)))
}

proptest! {
    #[test]
    fn what_was_packed_is_unpacked((cols, trits) in matrices(), arrangement in arrangements()) {
        let rows = trits.len() / cols;
        let bytes = pack(arrangement, &trits, cols);
        prop_assert_eq!(Some(bytes.len()), TernaryMatrix::packed_bytes(rows, cols));
        let w = TernaryMatrix::new(&bytes, arrangement, rows, cols, 1.0).unwrap();
        prop_assert_eq!(w.check_codes(), Ok(()));
        let mut row_trits = vec![0; cols];
        for (row, want) in trits.chunks(cols).enumerate() {
            w.unpack_row(row, &mut row_trits);
            prop_assert_eq!(&row_trits, want);
        }
    }

    #[test]
    fn a_changed_bit_is_seen_or_is_another_trit(
        (cols, trits) in matrices(), arrangement in arrangements(),
        at in any::<prop::sample::Index>(), bit in 0..8,
    ) {
        let rows = trits.len() / cols;
        let mut bytes = pack(arrangement, &trits, cols);
        *at.get_mut(&mut bytes) ^= 1u8 << bit;
        let w = TernaryMatrix::new(&bytes, arrangement, rows, cols, 1.0).unwrap();
        let mut row_trits = vec![0; cols];
        let differs = (0..rows).any(|row| {
            w.unpack_row(row, &mut row_trits);
            row_trits != trits[row * cols..][..cols]
        });
        // Within the shape the trit differs; in the padding only the check can tell.
        prop_assert!(differs || w.check_codes().is_err());
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    // One row of 129: trit 1 at columns 0, 33 and 128, trit -1 at column 96.
    let mut trits = vec![0i8; 129];
    (trits[0], trits[33], trits[128], trits[96]) = (1, 1, 1, -1);
    for (arrangement, second_block) in [(Arrangement::Tiles, 128), (Arrangement::Rows, 32)] {
        let bytes = pack(arrangement, &trits, 129);
        assert_eq!(bytes.len(), 256);
        assert_eq!(bytes[0], 0b00_01_01_10);
        assert_eq!(bytes[1], 0b01_01_10_01);
        assert_eq!(bytes[second_block], 0b01_01_01_10);
        let zero_trits = bytes.iter().filter(|byte| **byte == 0x55).count();
        assert_eq!(zero_trits, 253);
    }
    // The second row of two blocks.
    let mut trits = vec![0i8; 2 * 129];
    trits[129] = 1;
    for (arrangement, second_row) in [(Arrangement::Tiles, 32), (Arrangement::Rows, 64)] {
        assert_eq!(pack(arrangement, &trits, 129)[second_row], 0b01_01_01_10);
    }
}

#[test]
fn bad_codes_and_padding_are_found() {
    // One block a row: both arrangements have the same bytes.
    for arrangement in ARRANGEMENTS {
        let mut bytes = pack(arrangement, &[0; 5 * 100], 100);
        let check = |bytes: &[u8]| {
            TernaryMatrix::new(bytes, arrangement, 5, 100, 1.0).unwrap().check_codes()
        };
        assert_eq!(check(&bytes), Ok(()));
        bytes[128 + 3] |= 0b10 << 2;
        assert_eq!(check(&bytes), Err(LayoutError::Code { row: 4, col: 35 }));
        bytes[128 + 3] = 0x55;
        bytes[32 + 4] ^= 0b11 << 6;
        assert_eq!(check(&bytes), Err(LayoutError::Padding { row: 1, col: 100 }));
        bytes[32 + 4] = 0x55;
        bytes[255] ^= 0b01;
        assert_eq!(check(&bytes), Err(LayoutError::Padding { row: 7, col: 31 }));
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    assert_eq!(TernaryMatrix::packed_bytes(2_560, 2_560), Some(2_560 * 2_560 / 4));
    for (rows, cols) in [(0, 8), (8, 0), (1, usize::MAX), (usize::MAX, 1), (usize::MAX, 1 << 22)] {
        assert_eq!(TernaryMatrix::packed_bytes(rows, cols), None, "{rows}x{cols}");
    }
    let wrong = TernaryMatrix::new(&[0x55; 127], Arrangement::Tiles, 4, 128, 1.0);
    let error = LayoutError::Size { rows: 4, cols: 128, expected: 128, found: 127 };
    assert_eq!(wrong.err(), Some(error));
    let wrong = FloatMatrix::new(FloatKind::F16, &[0; 8], usize::MAX, 2);
    assert_eq!(wrong.err(), Some(LayoutError::Shape { rows: usize::MAX, cols: 2 }));
    assert!(FloatMatrix::new(FloatKind::F16, &[0; 8], 3, 3).is_err());
}

#[test]
fn tiles_cover_the_rows() {
    let bytes = pack(Arrangement::Tiles, &[0; 9], 1);
    let w = TernaryMatrix::new(&bytes, Arrangement::Tiles, 9, 1, 1.0).unwrap();
    assert_eq!(w.tiles(), 3);
    assert_eq!(w.tile_rows(0..2), 0..8);
    assert_eq!(w.tile_rows(1..3), 4..9);
    assert_eq!(w.tile_rows(2..2), 8..8);
    assert_eq!(w.tile_rows(3..3), 9..9);
    assert_eq!(padded_cols(129), 256);
}

#[test]
fn columns_are_written_and_nothing_else() {
    let mut whole = vec![0.0; 3 * 5];
    let mut columns = Columns::new(&mut whole, 5, 1..3);
    assert_eq!(columns.rows(), 3);
    for i in 0..3 {
        columns.row(i).fill(i as f32 + 1.0);
    }
    assert_eq!(whole, [0., 1., 1., 0., 0., 0., 2., 2., 0., 0., 0., 3., 3., 0., 0.]);
}

/// The value of binary16 bits from their definition.
fn f16_value(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    match exponent {
        0 => sign * mantissa * 2f64.powi(-24),
        0x1f if mantissa == 0.0 => sign * f64::INFINITY,
        0x1f => f64::NAN,
        _ => sign * (1.0 + mantissa / 1_024.0) * 2f64.powi(exponent - 15),
    }
}

#[test]
fn every_f16_and_bf16_is_widened_exactly() {
    for bits in 0..=u16::MAX {
        let (got, want) = (widen_f16(bits), f16_value(bits));
        assert!(f64::from(got) == want || got.is_nan() && want.is_nan(), "{bits:#06x}");
        assert_eq!(got.is_sign_negative(), bits & 0x8000 != 0);
        if !got.is_nan() {
            assert_eq!(narrow_f16(got), bits, "and back");
        }
        assert_eq!(widen_bf16(bits).to_bits(), u32::from(bits) << 16);
    }
}

#[test]
fn f16_is_rounded_to_nearest_even() {
    // Between each pair of neighbours: below the middle, the middle, above it.
    for bits in 0..0x7c00u16 {
        let next = if bits == 0x7bff { 65_536.0 } else { f16_value(bits + 1) };
        let middle = ((f16_value(bits) + next) / 2.0) as f32;
        let even = if bits & 1 == 0 { bits } else { bits + 1 };
        for (x, want) in [(middle.next_down(), bits), (middle, even), (middle.next_up(), bits + 1)]
        {
            assert_eq!(narrow_f16(x), want, "{x:e}");
            assert_eq!(narrow_f16(-x), want | 0x8000, "-{x:e}");
        }
    }
    for (x, want) in [(f32::INFINITY, 0x7c00), (f32::MAX, 0x7c00), (f32::from_bits(1), 0)] {
        assert_eq!(narrow_f16(x), want, "{x:e}");
    }
    assert_eq!(narrow_f16(f32::from_bits(0x7f80_0001)), 0x7e00);
    assert_eq!(narrow_f16(f32::from_bits(0xffff_e000)), 0xffff);
}

#[test]
fn a_row_is_widened_by_its_kind() {
    let mut random = Random(1);
    let bits: Vec<u16> = (0..12).map(|_| random.bits() as u16 & 0xbfff).collect();
    let mut row = [0.0; 4];
    FloatMatrix::new(FloatKind::Bf16, &bits, 3, 4).unwrap().widen_row(2, &mut row);
    assert_eq!(row.to_vec(), bits[8..].iter().map(|b| widen_bf16(*b)).collect::<Vec<_>>());
    FloatMatrix::new(FloatKind::F16, &bits, 3, 4).unwrap().widen_row(1, &mut row);
    assert_eq!(row.to_vec(), bits[4..8].iter().map(|b| widen_f16(*b)).collect::<Vec<_>>());
}
