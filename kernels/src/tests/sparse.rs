//! Products that skip zeros against those that do not, and the matrix by columns.

use proptest::prelude::*;

use super::layout::{ARRANGEMENTS, pack};
use super::linear::{random_codes, random_trits};
use super::{Random, SPECIAL, check, scalar};
use crate::{
    Arrangement, Backend, ColumnPacker, Columns, LayoutError, Quantised, TernaryColumns,
    TernaryMatrix, padded_cols, padded_rows,
};

/// Packs `trits`, `[rows][cols]`, by columns.
fn pack_columns(trits: &[i8], cols: usize) -> Vec<u8> {
    let mut packer = ColumnPacker::new(trits.len() / cols, cols).unwrap();
    // Any order of rows will do.
    for (row, trits) in trits.chunks(cols).enumerate().rev() {
        packer.row(row, trits);
    }
    packer.finish()
}

proptest! {
    #[test]
    fn what_was_packed_by_columns_is_unpacked(
        rows in 1usize..=600, cols in 1usize..=9, seed in 1u64..,
    ) {
        let trits = random_trits(&mut Random(seed), rows * cols);
        let bytes = pack_columns(&trits, cols);
        prop_assert_eq!(Some(bytes.len()), TernaryColumns::packed_bytes(rows, cols));
        let w = TernaryColumns::new(&bytes, rows, cols, 1.0).unwrap();
        prop_assert_eq!(w.check_codes(), Ok(()));
        let mut column = vec![0; rows];
        for col in 0..cols {
            w.unpack_column(col, &mut column);
            prop_assert!(column.iter().zip(trits.chunks(cols)).all(|(t, row)| *t == row[col]));
        }
    }
}

#[test]
fn the_layout_by_columns_is_the_documented_one() {
    // 257 rows of two columns: trit 1 at rows 0, 33, 128 and 256 of column 1, -1 at row 96.
    let mut trits = vec![0i8; 257 * 2];
    for (row, trit) in [(0, 1), (33, 1), (128, 1), (256, 1), (96, -1)] {
        trits[row * 2 + 1] = trit;
    }
    let bytes = pack_columns(&trits, 2);
    assert_eq!(bytes.len(), 2 * 128);
    assert_eq!(bytes[128], 0b00_01_01_10);
    assert_eq!(bytes[128 + 1], 0b01_01_10_01);
    assert_eq!(bytes[128 + 32], 0b01_01_01_10);
    assert_eq!(bytes[128 + 64], 0b01_01_01_10);
    assert_eq!(bytes.iter().filter(|byte| **byte == 0x55).count(), 256 - 4);
}

#[test]
fn bad_columns_are_found() {
    let mut bytes = pack_columns(&[0; 300 * 2], 2);
    let check = |bytes: &[u8]| TernaryColumns::new(bytes, 300, 2, 1.0).unwrap().check_codes();
    assert_eq!(check(&bytes), Ok(()));
    bytes[128 + 32 + 3] |= 0b10 << 2;
    assert_eq!(check(&bytes), Err(LayoutError::Code { row: 128 + 35, col: 1 }));
    bytes[128 + 32 + 3] = 0x55;
    bytes[64 + 12] ^= 0b11 << 2;
    assert_eq!(check(&bytes), Err(LayoutError::Padding { row: 300, col: 0 }));
    assert!(TernaryColumns::new(&bytes[1..], 300, 2, 1.0).is_err());
    assert_eq!(TernaryColumns::packed_bytes(2_560, 6_912), Some(2_560 * 6_912 / 4));
    for (rows, cols) in [(0, 8), (8, 0), (1, usize::MAX), (usize::MAX, 1 << 22)] {
        assert_eq!(TernaryColumns::packed_bytes(rows, cols), None, "{rows}x{cols}");
    }
}

#[test]
fn chunks_cover_the_rows() {
    let bytes = pack_columns(&[0; 600], 1);
    let w = TernaryColumns::new(&bytes, 600, 1, 1.0).unwrap();
    assert_eq!(w.padded_rows(), 768);
    assert_eq!([1, 256, 257].map(padded_rows), [256, 256, 512]);
}

/// The non-zero places of `q`, found the slow way.
fn places(q: &[i8]) -> Vec<u32> {
    (0..).zip(q).filter(|(_, q)| **q != 0).map(|(place, _)| place).collect()
}

/// Both products that skip zeros, against the dense one of the definition.
fn check_sparse(trits: &[i8], cols: usize, q: &[i8], random: &mut Random) {
    let (m, stride) = (trits.len() / cols, padded_cols(cols));
    let mut padded = q.to_vec();
    padded.resize(stride, 0);
    let (scale, sum) = ([20.0 + random.float()], [q.iter().map(|q| i32::from(*q)).sum()]);
    let x = Quantised::new(&padded, stride, &scale, &sum);
    let tiles = pack(Arrangement::Tiles, trits, cols);
    let dense = TernaryMatrix::new(&tiles, Arrangement::Tiles, m, cols, 0.37).unwrap();
    let mut want = vec![0.0; m];
    scalar().ternary(dense, 0..dense.tiles(), x, Columns::new(&mut want, m, 0..m));

    let bytes = pack_columns(trits, cols);
    let by_columns = TernaryColumns::new(&bytes, m, cols, 0.37).unwrap();
    let columns = places(q);
    let rows: Vec<u32> = (0..m as u32).filter(|_| random.below(3) == 0).collect();
    let of_rows: Vec<f32> = rows.iter().map(|row| want[*row as usize]).collect();
    for backend in Backend::available() {
        let what = format!("{} of {cols} columns by {m} rows", columns.len());
        for parts in 1..=3 {
            let mut sums = vec![0; parts * by_columns.padded_rows()];
            for (part, sums) in sums.chunks_mut(by_columns.padded_rows()).enumerate() {
                let share = columns.len() * part / parts..columns.len() * (part + 1) / parts;
                let (first, second) =
                    columns[share.clone()].split_at(random.below(share.len() + 1));
                backend.ternary_columns(by_columns, first, x, sums);
                backend.ternary_columns(by_columns, second, x, sums);
            }
            let mut got = vec![f32::NAN; m];
            let (upper, lower) = got.split_at_mut(random.below(m + 1));
            let cut = upper.len();
            backend.end_columns(by_columns, &sums, 0..cut, x, upper);
            backend.end_columns(by_columns, &sums, cut..m, x, lower);
            check(backend, &format!("{what}, {parts} parts, cut at {cut}"), &got, &want);
        }
        for arrangement in ARRANGEMENTS {
            let bytes = pack(arrangement, trits, cols);
            let w = TernaryMatrix::new(&bytes, arrangement, m, cols, 0.37).unwrap();
            let mut got = vec![f32::NAN; rows.len()];
            backend.ternary_rows(w, &rows, x, &mut got);
            check(backend, &format!("rows of {arrangement:?}"), &got, &of_rows);
        }
    }
}

#[test]
fn skipping_zeros_changes_nothing() {
    let mut random = Random(11);
    for m in [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 600, 2_561] {
        for cols in [1, 2, 63, 64, 65, 127, 129, 200, 1_025] {
            let trits = random_trits(&mut random, m * cols);
            let mut q = random_codes(&mut random, cols);
            let kept = 1 + random.below(5);
            q.iter_mut().for_each(|q| *q = if random.below(kept) == 0 { *q } else { 0 });
            check_sparse(&trits, cols, &q, &mut random);
        }
    }
}

#[test]
fn wide_rows_are_computed_whole() {
    let mut random = Random(15);
    for cols in [8_191, 8_192, 8_193, 20_000] {
        let trits = random_trits(&mut random, 9 * cols);
        check_sparse(&trits, cols, &random_codes(&mut random, cols), &mut random);
    }
}

#[test]
fn every_number_of_columns_is_computed() {
    let mut random = Random(12);
    let (m, cols) = (300, 150);
    let trits = random_trits(&mut random, m * cols);
    for count in 0..=cols {
        let mut q = vec![0; cols];
        for place in 0..count {
            q[(place * 7) % cols] = [127, -128, 1, -1][random.below(4)];
        }
        check_sparse(&trits, cols, &q, &mut random);
    }
}

#[test]
fn skipping_products_do_not_overflow() {
    let mut random = Random(13);
    let (m, cols) = (130, 6_912);
    for trit in [1, -1] {
        let trits = vec![trit; m * cols];
        for q in [127, -128, -127] {
            check_sparse(&trits, cols, &vec![q; cols], &mut random);
        }
        check_sparse(&trits, cols, &vec![0; cols], &mut random);
    }
}

#[test]
fn corrupt_columns_give_the_same_sums_everywhere() {
    let m = 256;
    // More, too, than are gathered before sums are divided or widened.
    for cols in [1_000, 140_000] {
        let bytes = vec![0xff; TernaryColumns::packed_bytes(m, cols).unwrap()];
        let w = TernaryColumns::new(&bytes, m, cols, 1.0).unwrap();
        let columns: Vec<u32> = (0..cols as u32).collect();
        for value in [127i8, -128] {
            let mut q = vec![value; cols];
            q.resize(padded_cols(cols), 0);
            let sum = [i32::from(value) * cols as i32];
            let x = Quantised::new(&q, q.len(), &[1.0], &sum);
            for backend in Backend::available() {
                let (mut sums, mut got) = (vec![0; m], vec![f32::NAN; m]);
                backend.ternary_columns(w, &columns, x, &mut sums);
                backend.end_columns(w, &sums, 0..m, x, &mut got);
                check(backend, "code 3", &got, &vec![2.0 * sum[0] as f32; m]);
            }
        }
    }
}

#[test]
fn lists_hold_what_is_wanted() {
    let mut random = Random(14);
    for length in 0..=140 {
        let kept = 1 + random.below(4);
        let x: Vec<f32> = (0..length)
            .map(|_| match random.below(kept) {
                0 => random.float(),
                _ => SPECIAL[random.below(SPECIAL.len())],
            })
            .collect();
        let q: Vec<i8> = random_codes(&mut random, length)
            .into_iter()
            .map(|q| if random.below(kept) == 0 { q } else { 0 })
            .collect();
        let want: Vec<u32> =
            (77..).zip(&x).filter(|(_, x)| **x > 0.0).map(|(place, _)| place).collect();
        for backend in Backend::available() {
            let mut out = vec![u32::MAX; length];
            let count = backend.positive(&x, 77, &mut out);
            assert_eq!(out[..count], want, "{}: above 0", backend.name());
            let count = backend.nonzero(&q, &mut out);
            assert_eq!(out[..count], places(&q), "{}: not 0", backend.name());
        }
    }
}
