//! The screen of a head: equal on every backend, and never wrong about a row, whatever the rows and
//! the activations are made to look like.

use super::{Random, scalar};
use crate::screen::{ROW_BYTES, TILE_ROWS};
use crate::{
    Backend, Columns, FloatKind, FloatMatrix, Kept, ScreenInput, ScreenMatrix, ScreenQuery,
    Threshold, draw_key, gumbel, pack_screen_group, screen_cols,
};

const GROUP: usize = ScreenMatrix::GROUP_ROWS;

/// A bf16 head with its screen.
struct Head {
    bits: Vec<u16>,
    wide: Vec<f32>,
    screen: Vec<u8>,
    rows: usize,
    cols: usize,
}

impl Head {
    /// Rounds `weights` to bf16 and packs them.
    fn new(weights: &[f32], cols: usize) -> Self {
        let rows = weights.len() / cols;
        let bits: Vec<u16> = weights.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
        let wide: Vec<f32> = bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect();
        let mut screen = vec![0xaa; ScreenMatrix::packed_bytes(rows, cols).unwrap()];
        let groups = screen.chunks_mut(ScreenMatrix::group_bytes(cols));
        for (group, weights) in groups.zip(wide.chunks(GROUP * cols)) {
            let views: Vec<&[f32]> = weights.chunks(cols).collect();
            pack_screen_group(&views, cols, group);
        }
        Self { bits, wide, screen, rows, cols }
    }

    fn matrix(&self) -> FloatMatrix<'_> {
        FloatMatrix::new(FloatKind::Bf16, &self.bits, self.rows, self.cols).unwrap()
    }

    fn screen(&self) -> ScreenMatrix<'_> {
        ScreenMatrix::new(&self.screen, self.rows, self.cols).unwrap()
    }

    fn logits(&self, backend: Backend, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; self.rows];
        backend.head(self.matrix(), 0..self.rows, x, Columns::new(&mut y, self.rows, 0..self.rows));
        y
    }

    /// The rows that each of the positions `x` keeps.
    fn kept(&self, backend: Backend, x: &[Vec<f32>], thresholds: &[f32]) -> Vec<Vec<bool>> {
        let (codes, queries) = coded(x);
        let input = ScreenInput::new(&codes, &queries, self.cols);
        let thresholds: Vec<Threshold<'_>> =
            thresholds.iter().map(|least| Threshold::of_logits(f64::from(*least))).collect();
        let mut kept = vec![vec![]; x.len()];
        for group in 0..self.rows.div_ceil(GROUP) {
            let mut masks = vec![Kept::default(); x.len()];
            let bytes = backend.screen(self.screen(), group, input, &thresholds, &mut masks);
            assert!(bytes <= ScreenMatrix::group_bytes(self.cols));
            let rows = GROUP.min(self.rows - group * GROUP);
            for (kept, Kept { rows: mask, .. }) in kept.iter_mut().zip(masks) {
                assert!(rows == GROUP || mask >> rows == 0, "rows that are not there");
                kept.extend((0..rows).map(|row| mask >> row & 1 == 1));
            }
        }
        kept
    }

    /// What the six bits of a row stand for.
    fn decoded(&self, row: usize) -> Vec<f32> {
        let (group, row) = (row / GROUP, row % GROUP);
        let step = f32::from_le_bytes(self.screen().numbers(group)[0][row]);
        let (tile, row) = (row / TILE_ROWS, row % TILE_ROWS);
        let byte = |plane: &[u8], col: usize, per_byte: usize| {
            let block = col / (per_byte * ROW_BYTES);
            let (part, byte) = (col / ROW_BYTES % per_byte, col % ROW_BYTES);
            plane[(block * TILE_ROWS + row) * ROW_BYTES + byte] >> (8 / per_byte * part)
        };
        let code = |col: usize| {
            let high = byte(self.screen().high(group, tile), col, 2) & 15;
            4 * high + (byte(self.screen().low(group, tile), col, 4) & 3)
        };
        (0..self.cols).map(|col| step * (f32::from(code(col)) - 31.5)).collect()
    }
}

fn coded(x: &[Vec<f32>]) -> (Vec<i8>, Vec<ScreenQuery>) {
    let stride = 2 * screen_cols(x[0].len());
    let mut codes = vec![1; x.len() * stride];
    let positions = x.iter().zip(codes.chunks_mut(stride));
    let queries = positions.map(|(x, codes)| ScreenQuery::new(x, codes).unwrap()).collect();
    (codes, queries)
}

/// Roughly normal, deviation 1.
fn normal(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (0..6).map(|_| random.float()).sum::<f32>() * 0.707).collect()
}

/// No row whose logit reaches a threshold may be left out, at any of several thresholds, alone or
/// with other positions. Returns the share of rows left out at the greatest logit.
#[track_caller]
fn check(head: &Head, x: &[Vec<f32>], random: &mut Random) -> f64 {
    let backend = Backend::detect();
    let logits: Vec<_> = x.iter().map(|x| head.logits(backend, x)).collect();
    let best = |l: &Vec<f32>| l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut left_out = 0;
    for round in 0..3 {
        let pick = |l: &Vec<f32>, random: &mut Random| match round {
            0 => best(l),
            _ => l[random.below(l.len())],
        };
        let thresholds: Vec<f32> = logits.iter().map(|l| pick(l, random)).collect();
        let together = head.kept(backend, x, &thresholds);
        for (i, logits) in logits.iter().enumerate() {
            let alone = head.kept(backend, &x[i..=i], &thresholds[i..=i]).remove(0);
            for kept in [&together[i], &alone] {
                for (row, (kept, logit)) in kept.iter().zip(logits).enumerate() {
                    let is_out = logit.is_finite() && *logit < thresholds[i];
                    assert!(*kept || is_out, "row {row}: {logit:e} against {:e}", thresholds[i]);
                }
            }
            if round == 0 {
                left_out += alone.iter().filter(|kept| !**kept).count();
            }
        }
    }
    left_out as f64 / (x.len() * head.rows) as f64
}

#[test]
fn every_backend_keeps_the_same_rows() {
    let mut random = Random(31);
    for cols in [1, 31, 64, 127, 128, 129, 500, 1_100, 1_500, 2_700] {
        for rows in if cols < 1_500 { &[1, 5, 64, 131][..] } else { &[131] } {
            let rows = *rows;
            let head = Head::new(&normal(&mut random, rows * cols), cols);
            for n in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
                let x: Vec<_> = (0..n).map(|_| normal(&mut random, cols)).collect();
                let scalar = Backend::by_name("scalar").unwrap();
                let thresholds: Vec<f32> = x
                    .iter()
                    .map(|x| 0.8 * head.logits(scalar, x).into_iter().fold(-1e9, f32::max))
                    .collect();
                let want = head.kept(scalar, &x, &thresholds);
                for backend in Backend::available() {
                    let found = head.kept(backend, &x, &thresholds);
                    assert_eq!(found, want, "{}: {rows}x{cols} by {n}", backend.name());
                }
            }
        }
    }
}

/// Rows are left out by their scores, and by nothing else; bounds are at least the logits and hardly
/// wider than six bits leave them.
#[test]
fn scores_are_judged_right() {
    let mut random = Random(37);
    let mut left_out = 0;
    for (round, cols) in [40, 130, 300, 700].into_iter().enumerate() {
        let rows = 5 * GROUP - 3;
        let head = Head::new(&normal(&mut random, rows * cols), cols);
        for n in [1, 2, 5] {
            let x: Vec<_> = (0..n).map(|_| normal(&mut random, cols)).collect();
            let (codes, queries) = coded(&x);
            let input = ScreenInput::new(&codes, &queries, cols);
            let logits: Vec<_> = x.iter().map(|x| head.logits(scalar(), x)).collect();
            for (temperature, with_bounds) in
                [(1e-30, false), (0.5, true), (2.0, false), (30.0, true)]
            {
                let key = draw_key(round as u64, n, 9);
                let score = |logit: f32, row: usize| {
                    f64::from(logit) / temperature + gumbel(key, row as u32)
                };
                let scores = |logits: &Vec<f32>| -> Vec<f64> {
                    logits.iter().enumerate().map(|(row, logit)| score(*logit, row)).collect()
                };
                let scores: Vec<_> = logits.iter().map(scores).collect();
                for group in 0..rows.div_ceil(GROUP) {
                    let mut most = [0.0; GROUP];
                    scalar().noise(key, (group * GROUP) as u32, &mut most);
                    let thresholds: Vec<_> = scores
                        .iter()
                        .map(|scores| {
                            let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                            let threshold = Threshold::of_scores(best, temperature, &most);
                            if with_bounds { threshold.with_bounds() } else { threshold }
                        })
                        .collect();
                    let mut want = vec![Kept::default(); x.len()];
                    scalar().screen(head.screen(), group, input, &thresholds, &mut want);
                    for backend in Backend::available() {
                        let mut kept = vec![Kept::default(); x.len()];
                        backend.screen(head.screen(), group, input, &thresholds, &mut kept);
                        assert_eq!(kept, want, "{}", backend.name());
                    }
                    for (at, kept) in want.iter().enumerate() {
                        let best = scores[at].iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        for row in group * GROUP..rows.min((group + 1) * GROUP) {
                            let is_kept = kept.rows >> (row % GROUP) & 1 == 1;
                            assert!(is_kept || scores[at][row] < best, "row {row}");
                            left_out += usize::from(!is_kept);
                            let (logit, bound) = (logits[at][row], kept.bounds[row % GROUP]);
                            if with_bounds {
                                let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
                                let width = norm(&head.wide[row * cols..][..cols]) * norm(&x[at]);
                                assert!((0.0..0.2 * width).contains(&(bound - logit)), "{logit}");
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(left_out > 10_000, "only {left_out} rows were left out");
}

#[test]
fn the_greatest_codes_do_not_overflow() {
    for cols in [2_560, 8_192] {
        // Rows of equal weights have the greatest code everywhere; so do the activations.
        let weights: Vec<f32> =
            (0..8 * cols).map(|at| if at / cols % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let head = Head::new(&weights, cols);
        for sign in [1.0, -1.0] {
            let x = vec![vec![sign * 3.0; cols]; 3];
            check(&head, &x, &mut Random(1));
            let want = 3.0 * cols as f32;
            for backend in Backend::available() {
                let kept = head.kept(backend, &x, &[0.99 * want; 3]);
                for kept in &kept {
                    let rows = kept.iter().enumerate();
                    let right =
                        rows.filter(|(row, kept)| (row % 2 == 0) == (**kept == (sign > 0.0)));
                    assert_eq!(right.count(), 8, "{}", backend.name());
                }
            }
        }
    }
}

#[test]
fn a_million_random_rows_are_judged_right() {
    let mut random = Random(32);
    let (mut rows, mut left_out, mut rounds) = (0, 0.0, 0);
    while rows < 1_000_000 {
        let cols = [40, 64, 96, 200][rounds % 4];
        let mut weights = normal(&mut random, 4_096 * cols);
        // Rows of other sizes, rows with outliers, and rows with few values.
        for (row, weights) in weights.chunks_mut(cols).enumerate() {
            match row % 8 {
                0 => weights.iter_mut().for_each(|w| *w *= 1e-3),
                1 => weights[row % cols] *= 40.0,
                2 => weights.iter_mut().for_each(|w| *w = w.round()),
                _ => {}
            }
        }
        let head = Head::new(&weights, cols);
        let mut x = normal(&mut random, cols);
        if rounds % 3 == 1 {
            x[rounds % cols] *= 100.0;
        }
        left_out += check(&head, &[x], &mut random);
        rows += 4_096;
        rounds += 1;
    }
    assert!(left_out / rounds as f64 > 0.5, "only {} left out", left_out / rounds as f64);
}

#[test]
fn activations_along_a_row_s_error_are_judged_right() {
    let mut random = Random(33);
    for round in 0..60 {
        let cols = [33, 128, 300][round % 3];
        let weights = normal(&mut random, 256 * cols);
        let head = Head::new(&weights, cols);
        // In whole numbers up to 127, which int8 holds without an error of its own.
        let along = |row: usize, sign: f32| -> Vec<f32> {
            let of_row = head.wide[row * cols..][..cols].iter().zip(head.decoded(row));
            let errors: Vec<f32> = of_row.map(|(w, coded)| w - coded).collect();
            let greatest = errors.iter().fold(0.0f32, |greatest, error| greatest.max(error.abs()));
            errors.iter().map(|error| (sign * 127.0 * error / greatest).round()).collect()
        };
        let row = random.below(256);
        // The bound is nearly met there.
        let x = [along(row, 1.0), along(row, -1.0), along((row + 1) % 256, 1e-20)];
        for x in x {
            let logit = head.logits(Backend::detect(), &x)[row];
            let kept = head.kept(Backend::detect(), std::slice::from_ref(&x), &[logit]);
            assert!(kept[0][row], "row {row} of {cols} columns");
            check(&head, &[x], &mut random);
        }
    }
}

#[test]
fn extreme_rows_and_activations_are_judged_right() {
    let mut random = Random(34);
    let cols = 70;
    for round in 0..200 {
        let mut weights = match round % 5 {
            0 => random.extreme(192 * cols),
            // All rows equal: every logit is a tie.
            1 => normal(&mut random, cols).repeat(192),
            2 => vec![0.0; 192 * cols],
            3 => vec![0.37; 192 * cols],
            _ => normal(&mut random, 192 * cols),
        };
        if round % 7 == 3 {
            weights[5 * cols + 1] = f32::INFINITY;
            weights[9 * cols + 2] = f32::NAN;
        }
        if round % 3 == 0 {
            weights[..cols].iter_mut().for_each(|w| *w *= f32::MIN_POSITIVE);
        }
        let head = Head::new(&weights, cols);
        let mut x = match round % 4 {
            0 => random.extreme(cols),
            1 => vec![0.0; cols],
            2 => normal(&mut random, cols).iter().map(|x| x * 1e-44).collect(),
            _ => normal(&mut random, cols),
        };
        if round % 11 == 2 {
            x[3] = f32::MAX;
        }
        let kept_back = vec![x.clone(), normal(&mut random, cols)];
        check(&head, &kept_back, &mut random);
    }
}

#[test]
fn activations_that_are_not_finite_are_refused() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut x = vec![1.0; 40];
        x[39] = bad;
        assert!(ScreenQuery::new(&x, &mut vec![0; 2 * screen_cols(40)]).is_none());
    }
}

#[test]
fn rows_anywhere_equal_the_whole_head() {
    let mut random = Random(35);
    for cols in [16, 75, 300] {
        let head = Head::new(&normal(&mut random, 50 * cols), cols);
        let x = normal(&mut random, cols);
        let rows: Vec<u32> = (0..9).map(|_| random.below(50) as u32).collect();
        for backend in Backend::available() {
            let all = head.logits(backend, &x);
            let want: Vec<f32> = rows.iter().map(|row| all[*row as usize]).collect();
            let mut found = vec![0.0; rows.len()];
            backend.head_rows(head.matrix(), &rows, &x, &mut found);
            super::check(backend, "rows of the head", &found, &want);
        }
    }
}

#[test]
fn packing_gives_the_same_bytes_everywhere() {
    let mut random = Random(36);
    for cols in [7, 64, 301] {
        let weights = normal(&mut random, 3 * cols);
        let rows: Vec<&[f32]> = weights.chunks(cols).collect();
        let mut bytes = [0, 1].map(|byte| vec![byte; ScreenMatrix::group_bytes(cols)]);
        pack_screen_group(&rows, cols, &mut bytes[0]);
        crate::screen::pack(&rows, cols, &mut bytes[1]);
        assert!(bytes[0] == bytes[1], "{cols} columns");
    }
}

#[test]
fn sizes_are_checked() {
    let bytes = ScreenMatrix::packed_bytes(65, 100).unwrap();
    assert_eq!(bytes, 2 * (1024 + 64 * 96));
    assert!(ScreenMatrix::new(&vec![0; bytes], 65, 100).is_ok());
    assert!(ScreenMatrix::new(&vec![0; bytes - 1], 65, 100).is_err());
    assert_eq!(ScreenMatrix::packed_bytes(0, 4), None);
    assert_eq!(ScreenMatrix::packed_bytes(1, 1 << 19), None);
}

#[test]
fn positions_without_activations_are_passed_over() {
    const COLS: usize = 256;
    const N: usize = 16;
    let mut random = Random(31);
    let rows: Vec<_> = (0..64).map(|_| random.floats(COLS)).collect();
    let mut packed = vec![0; ScreenMatrix::group_bytes(COLS)];
    pack_screen_group(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), COLS, &mut packed);
    let w = ScreenMatrix::new(&packed, 64, COLS).unwrap();
    let stride = 2 * screen_cols(COLS);
    for failed in [vec![0], vec![N - 1], vec![0, 7], (0..N).collect()] {
        let mut codes = vec![0; N * stride];
        let mut queries = Vec::new();
        for (i, codes) in codes.chunks_mut(stride).enumerate() {
            let query = ScreenQuery::new(&random.floats(COLS), codes).unwrap();
            // As the engine leaves a row that is not finite.
            queries.push(if failed.contains(&i) { ScreenQuery::default() } else { query });
        }
        let x = ScreenInput::new(&codes, &queries, COLS);
        let thresholds = [Threshold::of_logits(2.0); N];
        let mut want = [Kept::default(); N];
        scalar().screen(w, 0, x, &thresholds, &mut want);
        for backend in Backend::available().chain([Backend::detect()]) {
            let mut kept = [Kept::default(); N];
            backend.screen(w, 0, x, &thresholds, &mut kept);
            assert_eq!(kept, want, "{}, {failed:?}", backend.name());
        }
    }
}
