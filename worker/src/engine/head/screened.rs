//! The head for positions of whose logits only the greatest matter: a screen with proven bounds
//! (`docs/screening.md`) leaves out rows that cannot be drawn, and the others are computed exactly.
//!
//! A row is left out when its bound is below a *threshold*: a value that enough exact logits have
//! reached, after penalties and bias. Tokens that those name are always computed. Left out logits
//! become -inf, which the sampler passes over; all others are those of the whole head, bit for bit.
//! Which rows are left out depends on how far threads have come, the result does not.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use kernels::{
    Backend, Columns, FloatMatrix, SCREEN_POSITIONS_MAX, ScreenInput, ScreenMatrix, ScreenQuery,
};
use proto::step::{Output, SamplingParameters};

use super::super::buffers::{HEAD_POSITIONS, Local};
use super::super::rows::Wanted;
use super::super::sampler;
use super::super::shared::Member;
use super::super::step::{Step, share};

/// Most tokens that top-k may keep of a screened position: more are seldom asked for, and each
/// thread keeps as many thresholds in order.
const TOP_K_MAX: usize = 128;

/// Least min-p of a screened position: far above where the exponential ends.
const MIN_P_LEAST: f32 = 1e-30;

/// How much lower than ln(min-p) the threshold lies: exponents are below 70 then, and their roundings
/// and those of the exponential and the logarithm together below 2e-5.
const MIN_P_MARGIN: f64 = 1e-3;

/// Rows that a thread gathers before it computes them, so that it asks for some while others come.
const PENDING_ROWS: usize = 8;

const _: () = assert!(HEAD_POSITIONS <= SCREEN_POSITIONS_MAX, "all positions fit one screening");

/// What is needed of a position's logits, if not all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Need {
    /// So many of the greatest.
    count: usize,
    /// And, counting from the last of them, all down to this distance: 0 or negative.
    reach: f64,
}

impl Need {
    /// What an output needs; `None` if it is the whole distribution.
    pub(super) fn of(backend: Backend, output: &Output, vocab: usize) -> Option<Self> {
        let (Output::Sample(parameters) | Output::Draw(parameters)) = output else { return None };
        let SamplingParameters { temperature, top_k, top_p, min_p, top_logprobs, .. } =
            **parameters;
        if top_logprobs.is_some() {
            return None;
        }
        let top_k = top_k as usize;
        if temperature == 0.0 {
            Some(Self { count: 1, reach: 0.0 })
        } else if top_k > 0 && top_k < vocab {
            // Whatever the other cuts: all other tokens weigh +0.
            (top_k <= TOP_K_MAX).then_some(Self { count: top_k, reach: 0.0 })
        } else if top_p == 1.0 && min_p >= MIN_P_LEAST {
            // No sum over all tokens is asked for, and the first that weighs too little ends it.
            let mut ln = [0.0];
            backend.ln(&[min_p], &mut ln);
            let reach = f64::from(temperature) * (f64::from(ln[0]) - MIN_P_MARGIN);
            Some(Self { count: 1, reach })
        } else {
            None
        }
    }
}

/// The thresholds that the threads of a step have reached together, one for each screened position.
pub(in super::super) struct Thresholds([AtomicU32; HEAD_POSITIONS]);

impl Default for Thresholds {
    fn default() -> Self {
        Self([const { AtomicU32::new(0) }; HEAD_POSITIONS])
    }
}

impl Thresholds {
    /// Begins a position.
    pub(super) fn reset(&self, position: usize) {
        self.0[position].store(in_order(f32::NEG_INFINITY), Relaxed);
    }

    /// Takes in a thread's threshold and gives the greatest.
    fn raise(&self, position: usize, threshold: f32) -> f32 {
        let threshold = in_order(threshold);
        out_of_order(self.0[position].fetch_max(threshold, Relaxed).max(threshold))
    }
}

/// An integer for each float, in the same order.
fn in_order(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

fn out_of_order(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// What a thread knows of one position while it screens.
struct Tracker {
    /// The greatest logits computed, after penalties and bias; ascending.
    greatest: Vec<f32>,
    need: Need,
    /// Rows to compute.
    pending: Vec<u32>,
}

impl Tracker {
    fn new() -> Self {
        Self {
            greatest: Vec::with_capacity(TOP_K_MAX),
            need: Need { count: 1, reach: 0.0 },
            pending: Vec::with_capacity(PENDING_ROWS + ScreenMatrix::GROUP_ROWS),
        }
    }

    fn begin(&mut self, need: Need) {
        self.greatest.clear();
        self.pending.clear();
        self.need = need;
    }

    /// Below this a logit does not matter.
    fn threshold(&self) -> f32 {
        if self.greatest.len() < self.need.count {
            return f32::NEG_INFINITY;
        }
        let exact = f64::from(self.greatest[0]) + self.need.reach;
        let nearest = exact as f32;
        if f64::from(nearest) > exact { nearest.next_down() } else { nearest }
    }

    fn offer(&mut self, logit: f32) {
        if self.greatest.len() == self.need.count {
            if logit <= self.greatest[0] {
                return;
            }
            self.greatest.remove(0);
        }
        let place = self.greatest.partition_point(|other| *other < logit);
        self.greatest.insert(place, logit);
    }
}

/// What a thread needs to screen.
pub(in super::super) struct Scratch {
    trackers: Vec<Tracker>,
    values: Vec<f32>,
}

impl Scratch {
    /// Words of four bytes in a [`Scratch`], or a little less.
    pub(in super::super) const WORDS: usize = HEAD_POSITIONS * (TOP_K_MAX + 2 * 64);

    pub(in super::super) fn new() -> Self {
        Self {
            trackers: (0..HEAD_POSITIONS).map(|_| Tracker::new()).collect(),
            values: vec![0.0; PENDING_ROWS + ScreenMatrix::GROUP_ROWS],
        }
    }
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
        self.thresholds.reset(position);
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
            let need = Need::of(self.backend, output, vocab);
            tracker.begin(need.expect("only such positions are screened"));
        }
        let groups = share(vocab.div_ceil(ScreenMatrix::GROUP_ROWS), member);
        let count = groups * ScreenMatrix::GROUP_ROWS;
        while let Some((rows, mut y)) = planes.logits.columns(member, positions.first + n, count) {
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
        let (mut thresholds, mut kept) = ([0.0; HEAD_POSITIONS], [0; HEAD_POSITIONS]);
        let (mut bytes, mut exact_rows) = (0, 0);
        for start in rows.clone().step_by(ScreenMatrix::GROUP_ROWS) {
            for (i, (wanted, tracker)) in positions.iter().zip(&scratch.trackers).enumerate() {
                let has_failed = self.batch.has_failed(self.batch.tokens()[wanted.token].row);
                // Nothing reaches infinity.
                thresholds[i] = match has_failed {
                    true => f32::INFINITY,
                    false => self.thresholds.raise(i, tracker.threshold()),
                };
            }
            let group = start / ScreenMatrix::GROUP_ROWS;
            let kept = &mut kept[..n];
            bytes += self.backend.screen(screen, group, x, &thresholds[..n], kept);
            let end = rows.end.min(start + ScreenMatrix::GROUP_ROWS);
            for (i, (wanted, tracker)) in positions.iter().zip(&mut scratch.trackers).enumerate() {
                let logits = y.row(positions.first + i);
                logits[start - rows.start..end - rows.start].fill(f32::NEG_INFINITY);
                let output = &self.batch.row_of(wanted.token).output;
                let (Output::Sample(parameters) | Output::Draw(parameters)) = output else {
                    continue;
                };
                let mut mask = kept[i];
                if thresholds[i] < f32::INFINITY {
                    let valid = u64::MAX >> (ScreenMatrix::GROUP_ROWS - (end - start));
                    mask |= sampler::touched(parameters, start as u32) & valid;
                }
                while mask != 0 {
                    tracker.pending.push(start as u32 + mask.trailing_zeros());
                    mask &= mask - 1;
                }
                if tracker.pending.len() < PENDING_ROWS && end < rows.end {
                    continue;
                }
                exact_rows += tracker.pending.len();
                let values = &mut scratch.values[..tracker.pending.len()];
                let input = self.planes.head_input.read(member);
                let input = &input[(positions.first + i) * head.cols()..][..head.cols()];
                self.backend.head_rows(head, &tracker.pending, input, values);
                if !sampler::all_finite(values) {
                    self.batch.fail(self.batch.tokens()[wanted.token].row);
                }
                for (at, logit) in values.iter().enumerate() {
                    let row = tracker.pending[at];
                    logits[row as usize - rows.start] = *logit;
                    // What penalties make infinite fails its row later, and says nothing of others.
                    let adjusted = sampler::adjusted(row, *logit, parameters);
                    if adjusted.is_finite() {
                        tracker.offer(adjusted);
                    }
                }
                tracker.pending.clear();
            }
        }
        (bytes, exact_rows)
    }
}

#[cfg(test)]
mod tests;
