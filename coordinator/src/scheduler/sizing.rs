//! How long steps take, and how much of which prompts fits into one: by what workers measured, and by
//! what the stages of this pipeline took since.

use std::time::Duration;

use proto::step::StageTime;

use super::epoch::SentRow;
use super::microbatch::StepCost;

/// Of each step that comes back the memory of all before it counts so much: the last fifty or so.
const KEPT: f64 = 0.98;

/// How far the fit may depart from what workers measured, either way: what is beyond is a stall, or a
/// machine that is another one, of which the planner hears.
const MOST_SCALE: f64 = 16.0;

/// Below this the attention of a token to another is not told from noise, in nanoseconds.
const LEAST_ATTENTION_NS: f64 = 1e-3;

/// A chunk is a multiple of so many tokens where that fits: the kernels take tokens by panels of so many, and
/// those beside full panels cost up to half as much again.
const PANEL: u64 = 32;

/// The shortest chunk for the sake of time: below it a step costs more than its tokens.
const LEAST_CHUNK: u64 = 8;

/// What a step takes on the slowest stage: `scale × (what workers measured for its rows) + attention ×
/// (tokens × tokens before each)`, by least squares over the last steps. Chunks of any size give the same
/// tokens, so nothing but time depends on it.
#[derive(Clone, Debug, Default)]
pub(super) struct Fit {
    /// Sums over steps of products of the two terms, and of them with the time.
    xx: f64,
    xz: f64,
    zz: f64,
    xt: f64,
    zt: f64,
}

/// Coefficients of [`Fit`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    pub(super) scale: f64,
    /// Of one token with one before it, in nanoseconds.
    pub(super) attention_ns: f64,
}

impl Fit {
    /// Takes note of a step that came back.
    pub(super) fn learn(&mut self, cost: &StepCost, rows: &[SentRow], times: &[StageTime]) {
        let Some(took) = times.iter().map(|time| time.compute).max() else { return };
        let (decodes, reads): (Vec<_>, Vec<_>) =
            rows.iter().filter(|row| !row.is_draw).partition(|row| row.token_count == 1);
        let read: u64 = reads.iter().map(|row| u64::from(row.token_count)).sum();
        let line = step_ns(cost, decodes.len() as u64, read) as f64;
        let context: f64 = rows.iter().map(SentRow::context).sum();
        if line <= 0.0 || took.is_zero() || rows.iter().any(|row| row.is_draw) {
            return;
        }
        let took = took.as_nanos() as f64;
        for (sum, more) in [
            (&mut self.xx, line * line),
            (&mut self.xz, line * context),
            (&mut self.zz, context * context),
            (&mut self.xt, line * took),
            (&mut self.zt, context * took),
        ] {
            *sum = *sum * KEPT + more;
        }
    }

    /// As it is known by now: what workers measured, as long as nothing came back.
    pub(super) fn rate(&self) -> Rate {
        let bounded = |scale: f64| match scale.is_finite() {
            true => scale.clamp(1.0 / MOST_SCALE, MOST_SCALE),
            false => 1.0,
        };
        let alone = if self.xx > 0.0 { bounded(self.xt / self.xx) } else { 1.0 };
        // Where contexts grew with rows the two terms cannot be told apart.
        let apart = self.xx * self.zz - self.xz * self.xz;
        if apart <= 1e-6 * self.xx * self.zz {
            return Rate { scale: alone, attention_ns: 0.0 };
        }
        let scale = (self.xt * self.zz - self.zt * self.xz) / apart;
        let attention_ns = (self.zt * self.xx - self.xt * self.xz) / apart;
        if !attention_ns.is_finite() || attention_ns < LEAST_ATTENTION_NS || scale <= 0.0 {
            return Rate { scale: alone, attention_ns: 0.0 };
        }
        Rate { scale: bounded(scale), attention_ns }
    }
}

impl SentRow {
    /// Pairs of its tokens and those before each.
    fn context(&self) -> f64 {
        let (before, count) = (f64::from(self.position), f64::from(self.token_count));
        count * before + count * count / 2.0
    }
}

/// Of a step of so many decode rows and tokens of prompts, by what workers measured.
fn step_ns(cost: &StepCost, decodes: u64, read: u64) -> u64 {
    let fixed = match decodes {
        0 => cost.prompt.step_ns,
        _ => cost.decode.step_ns,
    };
    let rows = cost.decode.row_ns.saturating_mul(decodes);
    fixed.saturating_add(rows).saturating_add(cost.prompt.row_ns.saturating_mul(read))
}

/// What is left of a step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    cost: StepCost,
    rate: Rate,
    tokens: u64,
    /// Nanoseconds that it may take for its own sake, and for others'.
    time_ns: f64,
    fair_ns: f64,
    /// That decode rows may take, beside that.
    decodes_ns: f64,
    /// Decode rows that are in it whatever they take of that.
    least_decodes: u64,
    /// What is in it takes so long.
    spent_ns: f64,
}

impl Room {
    /// Of a step of `tokens` at most, that takes no longer than `time` for the prompts that it reads, and in
    /// no case longer than `fair`.
    pub(super) fn new(
        cost: StepCost,
        rate: Rate,
        tokens: usize,
        time: Duration,
        fair: Option<u64>,
    ) -> Self {
        let fixed_ns = rate.scale * cost.decode.step_ns.min(cost.prompt.step_ns) as f64;
        let fair_ns = fair.map_or(f64::INFINITY, |fair| rate.scale * fair as f64 - fixed_ns);
        let time_ns = time.as_nanos() as f64 - fixed_ns;
        let (decodes_ns, least_decodes, tokens) = (f64::INFINITY, 0, tokens as u64);
        let spent_ns = fixed_ns;
        Self { cost, rate, tokens, time_ns, fair_ns, decodes_ns, least_decodes, spent_ns }
    }

    /// Decode rows of a context of `position` that still have room.
    pub(super) fn decodes(&self, position: usize) -> bool {
        let took = self.decode_ns(position);
        let is_among_least = self.least_decodes > 0;
        self.tokens > 0 && self.fair_ns >= took && (is_among_least || self.decodes_ns >= took)
    }

    /// From here on decode rows take no more of the time together than so many of so many parts; but as
    /// many fit in any case as cost what a step costs without them: with fewer, most of the time would go
    /// to reading weights, however long a step takes.
    pub(super) fn limit_decodes(&mut self, parts: usize, of: usize) {
        let line = self.cost.decode;
        if line.row_ns > 0 {
            self.decodes_ns = self.time_ns.max(0.0) * parts as f64 / of.max(1) as f64;
            self.least_decodes = line.step_ns.div_ceil(line.row_ns);
        }
    }

    /// From here on decode rows are bound by tokens and by what is fair.
    pub(super) fn free_decodes(&mut self) {
        (self.decodes_ns, self.least_decodes) = (f64::INFINITY, 0);
    }

    /// Tokens that it still has.
    pub(super) fn tokens(&self) -> usize {
        self.tokens as usize
    }

    /// How long what is in it takes; nothing if nobody knows.
    pub(super) fn spent(&self) -> Duration {
        Duration::from_nanos(self.spent_ns.clamp(0.0, u64::MAX as f64) as u64)
    }

    fn decode_ns(&self, position: usize) -> f64 {
        let context = self.rate.attention_ns * position as f64;
        self.rate.scale * self.cost.decode.row_ns as f64 + context
    }

    /// One decode row is in it. What it costs: see [`Self::cost`].
    pub(super) fn take_decode(&mut self, position: usize) -> u64 {
        let took = self.decode_ns(position);
        self.tokens = self.tokens.saturating_sub(1);
        self.decodes_ns -= took;
        self.least_decodes = self.least_decodes.saturating_sub(1);
        self.take(took);
        self.cost(1, took)
    }

    /// What a caller is charged: time, in microseconds, or tokens where nobody knows what they take.
    fn cost(&self, tokens: u64, took_ns: f64) -> u64 {
        match self.cost.prompt.row_ns > 0 {
            true => (took_ns / 1e3) as u64,
            false => tokens,
        }
    }

    fn take(&mut self, took: f64) {
        self.time_ns -= took;
        self.fair_ns -= took;
        self.spent_ns += took;
    }

    /// Leaves that part of the time to prompts, at least.
    pub(super) fn keep_for_prompts(&mut self, time: Duration) {
        self.time_ns = self.time_ns.max(time.as_nanos() as f64);
    }

    /// May have no more tokens than this.
    pub(super) fn limit(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens as u64);
    }

    /// Tokens of a prompt that fit, of `wanted` behind `position`.
    pub(super) fn chunk(&self, position: usize, wanted: usize, first: bool) -> usize {
        let most = self.tokens.min(wanted as u64);
        let (time, fair) = (self.fits(self.time_ns, position), self.fits(self.fair_ns, position));
        // One that is short for time alone goes on by a few tokens, one that is short for others by one.
        let least = if first { LEAST_CHUNK } else { 0 };
        let fits = time.max(least).min(fair.max(u64::from(first)));
        let whole = match fits >= most || fits < PANEL {
            true => fits,
            false => fits / PANEL * PANEL,
        };
        whole.min(most) as usize
    }

    /// Tokens behind `position` that take so long: `c / 2 n² + (row + c × position) n = left`.
    fn fits(&self, left_ns: f64, position: usize) -> u64 {
        let Rate { scale, attention_ns: pair } = self.rate;
        let token = scale * self.cost.prompt.row_ns as f64 + pair * position as f64;
        if left_ns == f64::INFINITY || token <= 0.0 {
            return u64::MAX;
        }
        let left = left_ns.max(0.0);
        match pair > 0.0 {
            true => (((token * token + 2.0 * pair * left).sqrt() - token) / pair) as u64,
            false => (left / token) as u64,
        }
    }

    /// A chunk of so many tokens behind `position` is in it. What it costs.
    pub(super) fn take_chunk(&mut self, position: usize, tokens: usize) -> u64 {
        let count = tokens as f64;
        let pairs = count * position as f64 + count * count / 2.0;
        let token_ns = self.rate.scale * self.cost.prompt.row_ns as f64;
        let took = token_ns * count + self.rate.attention_ns * pairs;
        self.tokens = self.tokens.saturating_sub(tokens as u64);
        self.take(took);
        self.cost(tokens as u64, took)
    }

    pub(super) fn is_full(&self) -> bool {
        self.tokens == 0
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{Generation, SequenceId};

    use super::super::epoch::Wants;
    use super::super::microbatch::Line;
    use super::*;

    const MS: u64 = 1_000_000;

    fn cost() -> StepCost {
        let line = Line { step_ns: 5 * MS, row_ns: 7 * MS };
        StepCost { decode: line, prompt: line }
    }

    fn row(position: u32, token_count: u32) -> SentRow {
        SentRow {
            sequence: SequenceId(1),
            generation: Generation(0),
            position,
            token_count,
            wants: Wants::Nothing,
            is_draw: false,
            blocks: Vec::new(),
        }
    }

    fn took(ns: f64) -> Vec<StageTime> {
        let compute = Duration::from_nanos(ns as u64);
        let none = Duration::ZERO;
        vec![StageTime { stage: 0, compute, wait: none, behind: none }]
    }

    #[test]
    fn what_steps_took_says_how_long_the_next_ones_take() {
        let mut fit = Fit::default();
        assert_eq!(fit.rate(), Rate { scale: 1.0, attention_ns: 0.0 });
        // Twice as slow as measured, and 3 us for each pair of tokens.
        for step in 0..200u32 {
            let rows = [row(step * 37 % 3000, 1), row(step * 64 % 4096, 8 + step % 56)];
            let line = 5e6 + 7e6 + 7e6 * f64::from(rows[1].token_count);
            let pairs: f64 = rows.iter().map(SentRow::context).sum();
            fit.learn(&cost(), &rows, &took(2.0 * line + 3000.0 * pairs));
        }
        let Rate { scale, attention_ns } = fit.rate();
        assert!((scale - 2.0).abs() < 1e-3, "{scale}");
        assert!((attention_ns - 3000.0).abs() < 1.0, "{attention_ns}");
        // A stall is bounded, and nothing that is told makes it senseless.
        for _ in 0..500 {
            fit.learn(&cost(), &[row(0, 32)], &took(1e15));
            fit.learn(&cost(), &[row(0, 32)], &[]);
            fit.learn(&StepCost::default(), &[row(0, 32)], &took(1e6));
        }
        let Rate { scale, attention_ns } = fit.rate();
        assert!(scale <= MOST_SCALE && attention_ns >= 0.0 && attention_ns.is_finite());
    }

    #[test]
    fn chunks_shrink_with_context_so_that_steps_take_equally_long() {
        let rate = Rate { scale: 1.0, attention_ns: 2000.0 };
        let time = Duration::from_millis(400);
        let chunk = |position| {
            let room = Room::new(cost(), rate, 512, time, None);
            let chunk = room.chunk(position, 4096, true);
            let pairs = (chunk * position + chunk * chunk / 2) as f64;
            (chunk, 5.0 + 7.0 * chunk as f64 + 2e-3 * pairs)
        };
        let chunks = [0, 1000, 2000, 4000, 20_000].map(chunk);
        assert!(chunks.is_sorted_by(|a, b| a.0 >= b.0), "{chunks:?}");
        assert!(chunks[0].0 == 32 && chunks[4].0 < 16, "{chunks:?}");
        assert!(chunks.iter().all(|&(_, ms)| ms <= 400.0), "{chunks:?}");
        assert_eq!(chunk(1 << 20).0, LEAST_CHUNK as usize, "it goes on, however long it takes");
    }

    #[test]
    fn a_step_that_takes_long_in_any_case_has_as_many_decode_rows_as_pay_for_it() {
        // 300 ms for weights alone, of 200: a large model on one machine.
        let line = Line { step_ns: 300 * MS, row_ns: 10 * MS };
        let rate = Rate { scale: 1.0, attention_ns: 20_000.0 };
        let cost = StepCost { decode: line, prompt: line };
        let mut room = Room::new(cost, rate, 64, Duration::from_millis(200), None);
        room.limit_decodes(1, 2);
        let mut rows = || {
            let mut fits = 0;
            while room.decodes(4000) && room.take_decode(4000) > 0 {
                fits += 1;
            }
            fits
        };
        assert_eq!(rows(), 30, "whatever context they have");
        room.free_decodes();
        assert!(room.decodes(4000));
    }

    #[test]
    fn a_step_has_no_more_than_its_tokens_its_time_and_what_is_fair() {
        let rate = Rate { scale: 1.0, attention_ns: 0.0 };
        let long = Duration::from_secs(9);
        let mut room = Room::new(cost(), rate, 100, long, None);
        assert_eq!(room.chunk(0, 4096, true), 100, "panels are for what time cuts");
        room.take_chunk(0, 96);
        assert_eq!((room.chunk(0, 4096, false), room.chunk(0, 3, false)), (4, 3));
        // Two callers: twice the 12 ms of one row.
        let mut room = Room::new(cost(), rate, 100, long, Some(24 * MS));
        assert_eq!(room.chunk(0, 4096, true), 2);
        for _ in 0..2 {
            assert!(room.decodes(0));
            room.take_decode(0);
        }
        assert!(!room.decodes(0));
        assert_eq!((room.chunk(0, 9, true), room.chunk(0, 9, false)), (1, 0));
        let mut room = Room::new(cost(), rate, 100, long, None);
        room.limit_decodes(15, 8995);
        assert_eq!(
            (0..9).take_while(|_| room.decodes(0) && room.take_decode(0) == 7000).count(),
            2
        );
        assert_eq!((room.spent(), room.chunk(0, 9, true)), (Duration::from_millis(19), 9));
        let mut unknown = Room::new(StepCost::default(), rate, 64, Duration::ZERO, Some(0));
        assert_eq!(unknown.chunk(0, 4096, true), 64, "nobody knows what it takes");
        assert!(unknown.decodes(0));
        unknown.limit(3);
        assert_eq!(unknown.chunk(0, 4096, true), 3);
    }
}
