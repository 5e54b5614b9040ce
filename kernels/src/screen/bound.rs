//! Which rows of a head can be left out: an upper bound of every logit against a threshold. The
//! letters and the proof are those of `docs/screening.md`. Compiled for each backend from this one
//! source; f64 throughout, whose own roundings two slack factors cover.

use super::{GROUP_ROWS, Numbers, ScreenMatrix, TILE_ROWS, screen_cols};

/// Covers the roundings of a norm or an error computed in f64: more than 2^20 of them.
pub(super) const INFLATION: f64 = 1.0 + 1.0 / (1 << 20) as f64;
/// Covers the roundings of the approximate logit, relative to it.
const CENTRE_SLACK: f64 = 1.0 / (1 << 22) as f64;
/// One int8 plane of activations is enough when it leaves an error of at most this share of their
/// norm: half of what six bits leave of normal weights.
const COARSE_SHARE: f64 = 1.0 / 64.0;
/// Products whose absolute values add up to less than this overflow nowhere.
const SAFE_SUM: f64 = f32::MAX as f64 / 4.0;
/// Most positions that are screened at once.
pub const SCREEN_POSITIONS_MAX: usize = 16;
/// Most int8 vectors of that many positions.
const VECTORS_MAX: usize = PLANES * SCREEN_POSITIONS_MAX;
/// int8 planes of activations.
const PLANES: usize = 2;

/// What bounds need to know of the activations of one position: x̃ = scale (128 hi + lo), or
/// scale q with a single plane.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScreenQuery {
    planes: usize,
    scale: f64,
    /// Σ of the integers.
    sum: f64,
    /// At least ‖x‖.
    norm: f64,
    /// Multiplies the error of a row: ‖x‖ + ‖x - x̃‖.
    of_error: f64,
    /// Multiplies the norm of a row: ‖x - x̃‖ + γ ‖x‖.
    of_norm: f64,
    /// What underflow may add.
    floor: f64,
}

impl ScreenQuery {
    /// Codes `x` into `codes`: two planes of [`screen_cols`] each, of which the second may stay
    /// unused. `None` if an activation is not finite.
    ///
    /// # Panics
    ///
    /// If `codes` has another length.
    pub fn new(x: &[f32], codes: &mut [i8]) -> Option<Self> {
        assert_eq!(codes.len(), PLANES * screen_cols(x.len()), "two planes of codes");
        let greatest = x.iter().fold(0u32, |greatest, x| greatest.max(x.to_bits() << 1 >> 1));
        let greatest = f32::from_bits(greatest);
        if !greatest.is_finite() {
            return None;
        }
        let norm = lane_sum(x, |x| x * x).sqrt() * INFLATION;
        codes.fill(0);
        let (high, low) = codes.split_at_mut(screen_cols(x.len()));
        let (mut scale, mut error) = (0.0, norm);
        let mut planes = 1;
        if greatest > 0.0 {
            (scale, error) = Self::code(x, greatest / 127.0, 127.0, norm, |at, z| {
                high[at] = z as i8;
            });
            if error > COARSE_SHARE * norm {
                planes = 2;
                (scale, error) = Self::code(x, greatest / 16_256.0, 16_256.0, norm, |at, z| {
                    let z = z as i32;
                    let upper = (z + 64) >> 7;
                    high[at] = upper as i8;
                    low[at] = (z - 128 * upper) as i8;
                });
            }
        }
        let total = |plane: &[i8]| plane.iter().map(|q| i32::from(*q)).sum::<i32>() as f64;
        let sum = if planes == 1 { total(high) } else { 128.0 * total(high) + total(low) };
        // A lane's chain of fused multiply-adds, and the four additions at the end.
        let roundings = (x.len().div_ceil(16) + 4) as f64 / (1 << 24) as f64;
        let gamma = roundings / (1.0 - roundings);
        Some(Self {
            planes,
            scale,
            sum,
            norm,
            of_error: (norm + error) * INFLATION,
            of_norm: (error + gamma * norm) * INFLATION,
            floor: x.len() as f64 * f64::from(f32::from_bits(1)) * 2.0,
        })
    }

    /// Gives each x / scale, rounded and cut at `most`; returns the scale and a bound of the error.
    /// With no scale (of subnormal activations) all codes are 0.
    fn code(
        x: &[f32],
        scale: f32,
        most: f64,
        norm: f64,
        mut put: impl FnMut(usize, f64),
    ) -> (f64, f64) {
        // Adding 1.5 * 2^52 rounds to an integer.
        const ROUND: f64 = 6_755_399_441_055_744.0;
        let scale = f64::from(scale);
        if scale == 0.0 {
            return (0.0, norm);
        }
        let inverse = 1.0 / scale;
        let integer = |x: f64| ((x * inverse).clamp(-most, most) + ROUND) - ROUND;
        for (at, x) in x.iter().enumerate() {
            put(at, integer(f64::from(*x)));
        }
        // scale * integer is exact: 24 and 15 bits.
        let difference = |x: f64| x - scale * integer(x);
        let square = lane_sum(x, |x| difference(x) * difference(x));
        (scale, square.sqrt() * INFLATION)
    }
}

/// Σ of a term of every element, in eight lanes.
fn lane_sum(x: &[f32], term: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += term(f64::from(*x));
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| term(f64::from(*x))).sum::<f64>()
}

/// The screened activations of some positions.
#[derive(Clone, Copy, Debug)]
pub struct ScreenInput<'a> {
    codes: &'a [i8],
    queries: &'a [ScreenQuery],
    cols: usize,
}

impl<'a> ScreenInput<'a> {
    /// The positions `queries`, whose codes are those of [`ScreenQuery::new`], one after the other.
    ///
    /// # Panics
    ///
    /// If there is none, or more than [`SCREEN_POSITIONS_MAX`], or `codes` has another length.
    pub fn new(codes: &'a [i8], queries: &'a [ScreenQuery], cols: usize) -> Self {
        let n = queries.len();
        assert!((1..=SCREEN_POSITIONS_MAX).contains(&n), "{n} positions");
        assert_eq!(codes.len(), n * PLANES * screen_cols(cols), "two planes of every position");
        Self { codes, queries, cols }
    }

    /// How many positions.
    pub fn positions(self) -> usize {
        self.queries.len()
    }

    /// Columns of the matrix.
    pub(crate) fn cols(self) -> usize {
        self.cols
    }

    /// All vectors, and from one to the next so many codes, if every position has as many of them; one
    /// whose activations are not finite has none.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn evenly_spaced(self) -> Option<(&'a [i8], usize)> {
        let planes = self.queries.first()?.planes;
        let stride = screen_cols(self.cols) * PLANES.checked_div(planes)?;
        self.queries.iter().all(|query| query.planes == planes).then_some((self.codes, stride))
    }

    /// The vectors of a position: one or two.
    fn vectors(self, position: usize) -> impl Iterator<Item = &'a [i8]> {
        let stride = screen_cols(self.cols);
        let planes = self.codes[position * PLANES * stride..].chunks(stride);
        planes.take(self.queries[position].planes)
    }
}

/// Rows of one form of the codes: what the sums of integers stand for.
#[derive(Clone, Copy)]
struct Form<'a> {
    /// Value of 1 in the sums, in steps.
    unit: f64,
    /// What a code of 0 stands for, negated, in steps.
    centre: f64,
    steps: Numbers<'a>,
    errors: Numbers<'a>,
    norms: Numbers<'a>,
}

impl Form<'_> {
    /// The rows that may matter to a position with this threshold, or whose logit may not be finite. A
    /// bound that is NaN keeps its row. Writes the bounds if they are asked for.
    #[inline(always)]
    fn kept(
        self,
        query: &ScreenQuery,
        sums: &[[i32; GROUP_ROWS]],
        threshold: &Threshold<'_>,
        out: &mut [f32; GROUP_ROWS],
    ) -> u64 {
        let number = |numbers: Numbers<'_>, row: usize| f64::from(f32::from_le_bytes(numbers[row]));
        let mut bounds = [0.0; GROUP_ROWS];
        for (row, bound) in bounds.iter_mut().enumerate() {
            let sum = match sums {
                [one] => f64::from(one[row]),
                [high, low, ..] => 128.0 * f64::from(high[row]) + f64::from(low[row]),
                [] => 0.0,
            };
            let value = self.unit * sum - self.centre * query.sum;
            let centre = number(self.steps, row) * query.scale * value;
            let (error, norm) = (number(self.errors, row), number(self.norms, row));
            let radius = error * query.of_error + norm * query.of_norm + query.floor;
            *bound = centre + centre.abs() * CENTRE_SLACK + radius;
        }
        if threshold.wants_bounds {
            for (out, bound) in out.iter_mut().zip(&bounds) {
                *out = (*bound + bound.abs() * CENTRE_SLACK + f64::from(f32::MIN_POSITIVE)) as f32;
            }
        }
        if let Some(Noise { temperature, most }) = threshold.noise {
            // The operations of a score: no rounding of theirs reverses an order.
            for (bound, noise) in bounds.iter_mut().zip(most) {
                *bound = *bound / temperature + f64::from(*noise);
            }
        }
        let mut keep = [false; GROUP_ROWS];
        for ((row, keep), bound) in keep.iter_mut().enumerate().zip(&bounds) {
            let is_finite = number(self.norms, row) * query.norm < SAFE_SUM;
            *keep = !((*bound < threshold.least) & is_finite);
        }
        keep.iter().enumerate().fold(0, |mask, (row, keep)| mask | u64::from(*keep) << row)
    }

    /// Whether a logit of 0 would be settled in half of the rows: where it would not, of four rows
    /// hardly ever all are. A guess, on which only the order of reading hangs.
    #[inline(always)]
    fn may_settle(self, query: &ScreenQuery, threshold: &Threshold<'_>) -> bool {
        if threshold.wants_bounds {
            return false;
        }
        let error = |row: usize| f64::from(f32::from_le_bytes(self.errors[row])) * query.of_error;
        let is_settled = |row: usize| match threshold.noise {
            None => error(row) < threshold.least,
            Some(Noise { temperature, most }) => {
                error(row) < (threshold.least - f64::from(most[row])) * temperature
            }
        };
        let count = (0..GROUP_ROWS).map(|row| usize::from(is_settled(row))).sum::<usize>();
        count >= GROUP_ROWS / 2
    }
}

/// Below what a row does not matter to a position.
#[derive(Clone, Copy, Debug)]
pub struct Threshold<'a> {
    least: f64,
    noise: Option<Noise<'a>>,
    wants_bounds: bool,
}

/// What makes scores of the logits of a group.
#[derive(Clone, Copy, Debug)]
struct Noise<'a> {
    temperature: f64,
    /// Upper bounds of the noise of its rows.
    most: &'a [f32; GROUP_ROWS],
}

impl<'a> Threshold<'a> {
    /// Rows do not matter whose logit is below `least`.
    pub fn of_logits(least: f64) -> Self {
        Self { least, noise: None, wants_bounds: false }
    }

    /// Rows do not matter whose score, `f64(logit) / temperature + noise`, is below `least` for noise of
    /// at most `most`, one for each row of the group. The temperature is above 0.
    pub fn of_scores(least: f64, temperature: f64, most: &'a [f32; GROUP_ROWS]) -> Self {
        Self { least, noise: Some(Noise { temperature, most }), wants_bounds: false }
    }

    /// The bounds of all logits are wanted besides, by all six bits.
    pub fn with_bounds(self) -> Self {
        Self { wants_bounds: true, ..self }
    }
}

/// What became of the rows of a group for one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    /// A bit for each row that may matter.
    pub rows: u64,
    /// At least the logit of each row that does not, if the threshold asks for them.
    pub bounds: [f32; GROUP_ROWS],
}

impl Default for Kept {
    fn default() -> Self {
        Self { rows: 0, bounds: [0.0; GROUP_ROWS] }
    }
}

/// Up to so many positions may be judged one after the other, by the high plane first: the group comes
/// from memory for the first and from the second-level cache for the others.
const APART: usize = 3;

/// Judges the rows of a group for every position: `kept` gets the rows that may reach the position's
/// threshold. Returns the bytes that were read.
///
/// `high` and `low` give the sums of a tile's upper four bits and lower two by up to two vectors, `both`
/// adds those of all six bits, of the first so many tiles of the group by any number of vectors. The low
/// plane is read by itself, and only where it must be, for few positions of which the high plane may
/// settle much.
#[expect(clippy::too_many_arguments, reason = "three of them are what a backend brings along")]
#[inline(always)]
pub(crate) fn judge<'a>(
    w: ScreenMatrix<'a>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
    high: impl Fn(&'a [u8], &[&[i8]], &mut [[i32; TILE_ROWS]]),
    low: impl Fn(&'a [u8], &[&[i8]], &mut [[i32; TILE_ROWS]]),
    both: impl Fn(usize, &[&[i8]], &mut [[i32; GROUP_ROWS]]),
) -> usize {
    let [steps, errors_of_four, errors_of_six, norms] = w.numbers(group);
    let four = Form { unit: 4.0, centre: 30.0, steps, errors: errors_of_four, norms };
    let six = Form { unit: 1.0, centre: 31.5, steps, errors: errors_of_six, norms };
    let valid = w.valid(group);
    let tiles = (valid.count_ones() as usize).div_ceil(TILE_ROWS);
    let group_bytes = tiles * w.high_tile_bytes();
    let may_settle = |(query, threshold): (&_, &_)| four.may_settle(query, threshold);
    if x.positions() <= APART && x.queries.iter().zip(thresholds).all(may_settle) {
        let mut low_tiles = 0;
        for (position, query) in x.queries.iter().enumerate() {
            let mut vectors: [&[i8]; PLANES] = [&[]; PLANES];
            vectors.iter_mut().zip(x.vectors(position)).for_each(|(vector, x)| *vector = x);
            let vectors = &vectors[..query.planes];
            let mut sums = [[0; GROUP_ROWS]; PLANES];
            let mut of_tile = [[0; TILE_ROWS]; PLANES];
            for tile in 0..tiles {
                high(w.high(group, tile), vectors, &mut of_tile);
                for (sums, of_tile) in sums.iter_mut().zip(&of_tile) {
                    sums.as_chunks_mut::<TILE_ROWS>().0[tile] = *of_tile;
                }
            }
            let (threshold, kept) = (&thresholds[position], &mut kept[position]);
            let of_four = &sums[..query.planes];
            let unsettled = four.kept(query, of_four, threshold, &mut kept.bounds) & valid;
            let mut tiles_read = 0;
            for tile in 0..tiles {
                if unsettled >> (tile * TILE_ROWS) & 0b1111 == 0 {
                    continue;
                }
                low(w.low(group, tile), vectors, &mut of_tile);
                for (sums, of_tile) in sums.iter_mut().zip(&of_tile) {
                    let sums = &mut sums.as_chunks_mut::<TILE_ROWS>().0[tile];
                    for (sum, low) in sums.iter_mut().zip(of_tile) {
                        *sum = 4 * *sum + low;
                    }
                }
                tiles_read += 1;
            }
            kept.rows = match unsettled {
                0 => 0,
                _ => {
                    six.kept(query, &sums[..query.planes], threshold, &mut kept.bounds) & unsettled
                }
            };
            low_tiles = low_tiles.max(tiles_read);
        }
        return group_bytes + low_tiles * w.high_tile_bytes() / 2;
    }
    let mut vectors: [&[i8]; VECTORS_MAX] = [&[]; VECTORS_MAX];
    let all = (0..x.positions()).flat_map(|position| x.vectors(position));
    let count = vectors.iter_mut().zip(all).map(|(vector, x)| *vector = x).count();
    let mut sums = [[0; GROUP_ROWS]; VECTORS_MAX];
    both(tiles, &vectors[..count], &mut sums[..count]);
    let mut sums = &sums[..count];
    for ((query, threshold), kept) in x.queries.iter().zip(thresholds).zip(kept) {
        let (own, rest) = sums.split_at(query.planes);
        kept.rows = six.kept(query, own, threshold, &mut kept.bounds) & valid;
        sums = rest;
    }
    group_bytes + group_bytes / 2
}
