//! The head for positions that draw a token and ask for nothing else: a screen with proven bounds
//! (`docs/screening.md`) leaves out rows that cannot be drawn, and the others are computed exactly.
//!
//! A row is left out when its bound is below a *threshold*: a value that enough exact logits have
//! reached, after penalties and bias, or the best exact score, which is a logit with the draw's noise.
//! Tokens that penalties or bias name are always computed. Left out logits become -inf, which the
//! sampler passes over; all others are those of the whole head, bit for bit. Where cuts need a sum over
//! all tokens, the bounds of left out logits are kept beside them, for `settle`. Which rows are left out
//! depends on how far threads have come, the result does not.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use kernels::{
    Backend, Columns, FloatMatrix, Kept, SCREEN_POSITIONS_MAX, ScreenInput, ScreenMatrix,
    ScreenQuery, Threshold, draw_key, gumbel,
};
use proto::step::{Output, SamplingParameters};

use super::super::buffers::{HEAD_POSITIONS, Local};
use super::super::rows::Wanted;
use super::super::sampler;
use super::super::shared::Member;
use super::super::step::{Step, share};
use super::settle;

/// Most tokens that top-k may keep of a screened position: more are seldom asked for, and each
/// thread keeps as many thresholds in order.
const TOP_K_MAX: usize = 128;

/// Rows that a thread gathers before it computes them, so that it asks for some while others come.
const PENDING_ROWS: usize = 8;

const _: () = assert!(HEAD_POSITIONS <= SCREEN_POSITIONS_MAX, "all positions fit one screening");

/// What is needed of a position's logits, if not all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Need {
    /// So many of the greatest.
    Greatest { count: usize },
    /// The one of the greatest score at this temperature, whatever cuts would leave.
    Score { temperature: f64 },
    /// That one, and bounds of all others, of which `settle` sees what the cuts leave.
    Cut { temperature: f64 },
}

impl Need {
    /// What an output needs; `None` if it is the whole distribution.
    pub(super) fn of(output: &Output, vocab: usize) -> Option<Self> {
        let (Output::Sample(parameters) | Output::Draw(parameters)) = output else { return None };
        let top_k = parameters.top_k as usize;
        let temperature = f64::from(parameters.temperature);
        if parameters.top_logprobs.is_some() {
            None
        } else if temperature == 0.0 {
            Some(Self::Greatest { count: 1 })
        } else if !sampler::has_cuts(parameters, vocab) {
            Some(Self::Score { temperature })
        } else if (1..vocab.min(TOP_K_MAX + 1)).contains(&top_k) {
            // Whatever the other cuts: all other tokens weigh +0.
            Some(Self::Greatest { count: top_k })
        } else {
            Some(Self::Cut { temperature })
        }
    }

    /// Whether `settle` decides the position.
    pub(super) fn is_cut(self) -> bool {
        matches!(self, Self::Cut { .. })
    }
}

/// What the threads of a step tell one another of the screened positions of a group.
pub(in super::super) struct Progress {
    /// The greatest thresholds so far, in the order of [`in_order`].
    thresholds: [AtomicU64; HEAD_POSITIONS],
    /// Of the group's wanted positions: whether what was computed does not decide it.
    unsettled: [AtomicBool; HEAD_POSITIONS],
    /// Positions of the step whose cuts were to be settled, and those of them that were not.
    cuts: AtomicU32,
    open: AtomicU32,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            thresholds: [const { AtomicU64::new(0) }; HEAD_POSITIONS],
            unsettled: [const { AtomicBool::new(false) }; HEAD_POSITIONS],
            cuts: AtomicU32::new(0),
            open: AtomicU32::new(0),
        }
    }
}

impl Progress {
    /// Begins a screened position.
    fn reset(&self, position: usize) {
        self.thresholds[position].store(in_order(f64::NEG_INFINITY), Relaxed);
    }

    /// Takes in a thread's threshold and gives the greatest.
    fn raise(&self, position: usize, threshold: f64) -> f64 {
        let threshold = in_order(threshold);
        out_of_order(self.thresholds[position].fetch_max(threshold, Relaxed).max(threshold))
    }

    /// Counts a position whose cuts were to be settled.
    pub(super) fn count_cut(&self, is_open: bool) {
        self.cuts.fetch_add(1, Relaxed);
        self.open.fetch_add(u32::from(is_open), Relaxed);
    }

    /// How many were counted in the step, and how many of them stayed open.
    pub(in super::super) fn cuts(&self) -> (u32, u32) {
        (self.cuts.load(Relaxed), self.open.load(Relaxed))
    }

    /// Says whether the wanted position `index` of the group needs all logits after all.
    pub(super) fn note_unsettled(&self, index: usize, is_unsettled: bool) {
        self.unsettled[index].store(is_unsettled, Relaxed);
    }

    /// What [`Self::note_unsettled`] said in an earlier phase.
    pub(super) fn is_unsettled(&self, index: usize) -> bool {
        self.unsettled[index].load(Relaxed)
    }
}

/// An integer for each float, in the same order.
fn in_order(x: f64) -> u64 {
    let bits = x.to_bits();
    if bits >> 63 == 0 { bits | 1 << 63 } else { !bits }
}

fn out_of_order(key: u64) -> f64 {
    f64::from_bits(if key >> 63 == 1 { key & !(1 << 63) } else { !key })
}

/// What a thread knows of one position while it screens.
struct Tracker {
    /// The greatest logits computed, after penalties and bias, or scores; ascending.
    greatest: Vec<f64>,
    need: Need,
    /// Of the draw.
    key: u64,
    /// Bounds of the noise of a group's rows.
    noise: [f32; ScreenMatrix::GROUP_ROWS],
    /// Rows to compute.
    pending: Vec<u32>,
}

impl Tracker {
    fn new() -> Self {
        Self {
            greatest: Vec::with_capacity(TOP_K_MAX),
            need: Need::Greatest { count: 1 },
            key: 0,
            noise: [0.0; ScreenMatrix::GROUP_ROWS],
            pending: Vec::with_capacity(PENDING_ROWS + ScreenMatrix::GROUP_ROWS),
        }
    }

    /// Begins a position whose draw has the key `key`.
    fn begin(&mut self, need: Need, key: u64) {
        self.greatest.clear();
        self.pending.clear();
        (self.need, self.key) = (need, key);
    }

    /// Below this a logit or a score does not matter.
    fn least(&self) -> f64 {
        let count = match self.need {
            Need::Greatest { count } => count,
            Need::Score { .. } | Need::Cut { .. } => 1,
        };
        match self.greatest.len() < count {
            true => f64::NEG_INFINITY,
            false => self.greatest[0],
        }
    }

    /// The threshold for the group of rows from `first` on, if what does not matter is below `least`.
    fn threshold(&mut self, backend: Backend, first: u32, least: f64) -> Threshold<'_> {
        let threshold = match self.need {
            Need::Greatest { .. } => Threshold::of_logits(least),
            Need::Score { temperature } | Need::Cut { temperature } => {
                backend.noise(self.key, first, &mut self.noise);
                Threshold::of_scores(least, temperature, &self.noise)
            }
        };
        match self.need.is_cut() || least == f64::NEG_INFINITY {
            true => threshold.with_bounds(),
            false => threshold,
        }
    }

    /// Of the rows `mask` of the group of the last threshold, whose logits have these bounds, those that
    /// may still matter; and the one of the greatest bound among them.
    fn promising(&self, bounds: &[f32; ScreenMatrix::GROUP_ROWS], mask: u64) -> (u64, Option<u32>) {
        let least = self.least();
        let (mut left, mut best) = (0, None);
        for row in (0..u64::BITS).filter(|row| mask >> row & 1 == 1) {
            let (bound, noise) = (bounds[row as usize], f64::from(self.noise[row as usize]));
            let value = match self.need {
                Need::Greatest { .. } => f64::from(bound),
                Need::Score { temperature } | Need::Cut { temperature } => {
                    sampler::noisy(bound, temperature, noise)
                }
            };
            // A bound that is NaN keeps its row.
            let is_out = value < least;
            left |= u64::from(!is_out) << row;
            if best.is_none_or(|(most, _)| value > most) {
                best = Some((value, row));
            }
        }
        (left, best.map(|(_, row)| row))
    }

    /// Takes in the logit of a token, after penalties and bias.
    fn offer(&mut self, token: u32, logit: f32) {
        let (count, value) = match self.need {
            Need::Greatest { count } => (count, f64::from(logit)),
            Need::Score { temperature } | Need::Cut { temperature } => {
                (1, sampler::noisy(logit, temperature, gumbel(self.key, token)))
            }
        };
        if self.greatest.len() == count {
            if value <= self.greatest[0] {
                return;
            }
            self.greatest.remove(0);
        }
        let place = self.greatest.partition_point(|other| *other < value);
        self.greatest.insert(place, value);
    }
}

/// What a thread needs to screen.
pub(in super::super) struct Scratch {
    trackers: Vec<Tracker>,
    values: Vec<f32>,
    pub(super) settle: settle::Scratch,
}

impl Scratch {
    /// Words of four bytes in a [`Scratch`], or a little less.
    pub(in super::super) const WORDS: usize =
        HEAD_POSITIONS * (2 * TOP_K_MAX + 3 * 64) + settle::Scratch::WORDS;

    pub(in super::super) fn new() -> Self {
        Self {
            trackers: (0..HEAD_POSITIONS).map(|_| Tracker::new()).collect(),
            values: vec![0.0; PENDING_ROWS + ScreenMatrix::GROUP_ROWS],
            settle: settle::Scratch::new(),
        }
    }
}

/// Where in the plane of logits, of so many rows, the bounds for the logits of row `place` are.
pub(super) fn bounds_row(rows: usize, place: usize) -> usize {
    rows / 2 + place
}

/// The positions of a group that are screened.
#[derive(Clone, Copy)]
pub(super) struct Positions<'a> {
    /// All wanted ones of the group.
    pub(super) wanted: &'a [Wanted],
    /// Which of them are screened.
    pub(super) order: &'a [usize],
    /// Their rows of `head_input` and `logits` are those from here on.
    pub(super) first: usize,
}

impl<'a> Positions<'a> {
    fn iter(self) -> impl Iterator<Item = Wanted> + use<'a> {
        self.order.iter().map(move |index| self.wanted[*index])
    }
}

impl Step<'_> {
    /// Prepares position `position` of the screened ones, whose final activations are `x`: its row
    /// fails if they are not finite, for then no logit is.
    pub(super) fn begin_screening(
        &self,
        member: &Member<'_>,
        position: usize,
        wanted: Wanted,
        x: &[f32],
    ) {
        let codes = self.planes.screen_codes.row(member, position);
        let query = ScreenQuery::new(x, codes);
        if query.is_none() {
            self.batch.fail(self.batch.tokens()[wanted.token].row);
        }
        self.planes.screen_queries.row(member, position)[0] = query.unwrap_or_default();
        self.progress.reset(position);
    }

    /// The thread's share of the logits of the screened positions.
    pub(super) fn screened(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        head: FloatMatrix<'_>,
        screen: ScreenMatrix<'_>,
        positions: Positions<'_>,
    ) {
        let planes = &self.planes;
        let n = positions.order.len();
        let codes = &planes.screen_codes.read(member)[..n * planes.screen_codes.width()];
        let queries = &planes.screen_queries.read(member)[..n];
        let x = ScreenInput::new(codes, queries, screen.cols());
        let scratch = local.screen.as_mut().expect("the last stage can screen");
        let vocab = planes.logits.width();
        for (wanted, tracker) in positions.iter().zip(&mut scratch.trackers) {
            let output = &self.batch.row_of(wanted.token).output;
            let (Output::Sample(parameters) | Output::Draw(parameters)) = output else { continue };
            let need = Need::of(output, vocab);
            // The token that is drawn stands one after the token it follows.
            let position = self.batch.tokens()[wanted.token].position + 1;
            let key = draw_key(parameters.seed, parameters.choice, position);
            tracker.begin(need.expect("only such positions are screened"), key);
        }
        let groups = share(vocab.div_ceil(ScreenMatrix::GROUP_ROWS), member);
        let count = groups * ScreenMatrix::GROUP_ROWS;
        // Logits, and bounds of them below.
        let height = planes.logits.rows();
        while let Some((rows, mut y)) = planes.logits.columns(member, height, count) {
            let scratch = local.screen.as_mut().expect("it was there above");
            let read = self.screen_rows(member, scratch, head, screen, positions, x, &rows, &mut y);
            let profile = &mut local.record.profile;
            let (screen_bytes, exact_rows) = read;
            let row_bytes = head.cols() * size_of::<u16>();
            profile.weight_bytes += (screen_bytes + exact_rows * row_bytes) as u64;
            profile.exact_rows += exact_rows as u64;
            profile.screened_rows += (rows.len() * n - exact_rows) as u64;
        }
    }

    /// Whole groups of rows, written to the columns `y`. Returns the bytes of the screen that were
    /// read, and how many logits were computed.
    #[expect(clippy::too_many_arguments, reason = "matrices, positions and where results go")]
    fn screen_rows(
        &self,
        member: &Member<'_>,
        scratch: &mut Scratch,
        head: FloatMatrix<'_>,
        screen: ScreenMatrix<'_>,
        positions: Positions<'_>,
        x: ScreenInput<'_>,
        rows: &Range<usize>,
        y: &mut Columns<'_>,
    ) -> (usize, usize) {
        let n = positions.order.len();
        let mut kept = [Kept::default(); HEAD_POSITIONS];
        let (mut bytes, mut exact_rows) = (0, 0);
        for start in rows.clone().step_by(ScreenMatrix::GROUP_ROWS) {
            let (mut failed, mut begins) = ([false; HEAD_POSITIONS], [false; HEAD_POSITIONS]);
            let mut thresholds = [Threshold::of_logits(f64::INFINITY); HEAD_POSITIONS];
            let trackers = &mut scratch.trackers;
            for (i, (wanted, tracker)) in positions.iter().zip(trackers).enumerate() {
                failed[i] = self.batch.has_failed(self.batch.tokens()[wanted.token].row);
                // Nothing reaches infinity, and of a row that failed nothing matters.
                if !failed[i] {
                    let least = self.progress.raise(i, tracker.least());
                    begins[i] = least == f64::NEG_INFINITY;
                    thresholds[i] = tracker.threshold(self.backend, start as u32, least);
                }
            }
            let group = start / ScreenMatrix::GROUP_ROWS;
            let kept = &mut kept[..n];
            bytes += self.backend.screen(screen, group, x, &thresholds[..n], kept);
            let end = rows.end.min(start + ScreenMatrix::GROUP_ROWS);
            for (i, (wanted, tracker)) in positions.iter().zip(&mut scratch.trackers).enumerate() {
                if tracker.need.is_cut() {
                    let bounds = y.row(bounds_row(y.rows(), positions.first + i));
                    bounds[start - rows.start..end - rows.start]
                        .copy_from_slice(&kept[i].bounds[..end - start]);
                }
                let output = &self.batch.row_of(wanted.token).output;
                let (Output::Sample(parameters) | Output::Draw(parameters)) = output else {
                    continue;
                };
                let place = &mut Place {
                    row: positions.first + i,
                    wanted,
                    parameters,
                    first: rows.start,
                    logits: y.row(positions.first + i),
                };
                place.logits[start - rows.start..end - rows.start].fill(f32::NEG_INFINITY);
                let (mut mask, mut done, values) = (kept[i].rows, 0, &mut scratch.values);
                if begins[i]
                    && let (_, Some(best)) = tracker.promising(&kept[i].bounds, mask)
                {
                    // Without a threshold all are kept: the best by its bound spares most others.
                    tracker.pending.push(start as u32 + best);
                    exact_rows += self.compute(member, head, tracker, values, place);
                    done = 1 << best;
                    (mask, _) = tracker.promising(&kept[i].bounds, mask);
                }
                if !failed[i] {
                    let valid = u64::MAX >> (ScreenMatrix::GROUP_ROWS - (end - start));
                    mask |= sampler::touched(parameters, start as u32) & valid;
                }
                mask &= !done;
                while mask != 0 {
                    tracker.pending.push(start as u32 + mask.trailing_zeros());
                    mask &= mask - 1;
                }
                if tracker.pending.len() >= PENDING_ROWS || end == rows.end {
                    exact_rows += self.compute(member, head, tracker, values, place);
                }
            }
        }
        (bytes, exact_rows)
    }

    /// Computes the pending rows of a position and returns how many there were.
    fn compute(
        &self,
        member: &Member<'_>,
        head: FloatMatrix<'_>,
        tracker: &mut Tracker,
        values: &mut [f32],
        place: &mut Place<'_>,
    ) -> usize {
        let count = tracker.pending.len();
        let values = &mut values[..count];
        let input = self.planes.head_input.read(member);
        let input = &input[place.row * head.cols()..][..head.cols()];
        self.backend.head_rows(head, &tracker.pending, input, values);
        if !sampler::all_finite(values) {
            self.batch.fail(self.batch.tokens()[place.wanted.token].row);
        }
        for (at, logit) in values.iter().enumerate() {
            let row = tracker.pending[at];
            place.logits[row as usize - place.first] = *logit;
            // What penalties make infinite fails its row later, and says nothing of others.
            let adjusted = sampler::adjusted(row, *logit, place.parameters);
            if adjusted.is_finite() {
                tracker.offer(row, adjusted);
            }
        }
        tracker.pending.clear();
        count
    }
}

/// Where exact logits of a position go.
struct Place<'a> {
    /// The position's row of `head_input` and `logits`.
    row: usize,
    wanted: Wanted,
    parameters: &'a SamplingParameters,
    /// Those of some tokens, from this one on.
    logits: &'a mut [f32],
    first: usize,
}

#[cfg(test)]
mod tests;
