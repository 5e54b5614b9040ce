//! What a group of workers can do at best: the least bound on the time per token, found by bisection,
//! for every number of rows and of steps in flight that can still be the best.

use super::super::costs::{FIRST, HOP_OTHER_RACK_NS, LAST, MIDDLE, ONLY, Place};
use super::super::pipeline::{Cut, Steps};
use super::{Care, ENDS_WORKERS, Group};
use crate::scheduler::in_flight_limit;

/// A pipeline counts as so many per mille slower for every hop to another rack between its stages,
/// and less in proportion for nearer ones: a stage more is one more that can die and that noise
/// holds up, and nobody should be in it who brings no more than that.
const HOP_PER_MILLE: f64 = 1.0;

/// Eighths of the most rows that a coarse search looks at: fewer may leave room for a better cut.
const COARSE_ROWS: [u32; 5] = [8, 7, 6, 4, 2];

/// Whole layers make a pipeline slower than if they could be divided, by this part of its time at most
/// in most cases.
const NEAR_PART: u64 = 4;

/// What a group of workers can do together, all of them taking part.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Offer {
    steps: Steps,
    token_ns: u64,
    /// Tokens per second less what its hops count for: what groups are compared by.
    pub(in super::super) worth: f64,
}

impl Offer {
    pub(in super::super) fn tokens_per_s(&self) -> f64 {
        f64::from(self.steps.sequences()) * 1e9 / self.token_ns as f64
    }
}

/// What nobody is faster than with steps of so many rows, whatever memory there is.
#[derive(Clone, Copy)]
struct Floor {
    /// The slowest stage.
    stage_ns: f64,
    /// The way through all stages and back.
    loop_ns: f64,
}

impl Floor {
    /// The time per token with so many steps in flight.
    fn token_ns(self, in_flight: u32) -> u64 {
        let token_ns = self.loop_ns.max(self.stage_ns * f64::from(in_flight));
        // What rounding may have added is taken off.
        (token_ns * (1.0 - 1e-9)) as u64
    }
}

impl Group<'_> {
    /// The least time per token of such steps, if it is less than `below_ns`.
    fn least_token_ns(&mut self, steps: Steps, below_ns: u64, care: Care) -> Option<u64> {
        let blocks = self.costs.needed_blocks(steps.sequences());
        let floor_ns = self.floor(steps).token_ns(steps.in_flight);
        if blocks > self.costs.max_kv_blocks || floor_ns >= below_ns {
            return None;
        }
        self.prepare(steps, blocks);
        // Beyond the time in which a single worker could do everything no bound changes anything.
        let lots = self.lots.iter();
        let slowest = lots.map(|lot| {
            let head_ns = lot.head_first_ns.saturating_add(lot.head_last_ns);
            lot.layer_ns.saturating_mul(self.costs.layers()).saturating_add(head_ns)
        });
        let steps_or_stages = u64::from(steps.in_flight.max(self.stages()));
        let ample = slowest.max()?.saturating_mul(steps_or_stages).saturating_add(
            self.hops_ns.saturating_add(HOP_OTHER_RACK_NS * u64::from(self.stages())),
        );
        let mut enough = ample.min(below_ns.saturating_sub(1)).min(self.costs.token_limit_ns);
        if !self.is_feasible(steps, enough, care) {
            return None;
        }
        let mut too_small = floor_ns.saturating_sub(2).min(enough.saturating_sub(1));
        // It is seldom far above what nobody is faster than.
        let near = floor_ns.saturating_add(floor_ns / NEAR_PART);
        if near < enough {
            match self.is_feasible(steps, near, care) {
                true => enough = near,
                false => too_small = near,
            }
        }
        let step = |enough: u64| if care == Care::Exact { 1 } else { (enough >> 10).max(1) };
        while enough - too_small > step(enough) {
            let middle = too_small + (enough - too_small) / 2;
            match self.is_feasible(steps, middle, care) {
                true => enough = middle,
                false => too_small = middle,
            }
        }
        Some(enough)
    }

    /// What nobody is faster than with such steps.
    fn floor(&self, steps: Steps) -> Floor {
        let costs = self.costs;
        let (rows, in_flight) = (steps.rows, steps.in_flight);
        let (first, last) = if self.members.len() == 1 { (MIDDLE, ONLY) } else { (FIRST, LAST) };
        // The heads cost as many layers, and so much time, at the least.
        let mut least = [(f64::INFINITY, f64::INFINITY); 2];
        let (mut speed, mut all_ns, mut quickest_ns) = (0.0, 0.0, f64::INFINITY);
        for &w in self.members {
            let layer_ns = costs.workers[w].layer_ns(rows) as f64;
            speed += 1.0 / layer_ns;
            all_ns += layer_ns;
            quickest_ns = layer_ns.min(quickest_ns);
            for (place, least) in [first, last].into_iter().zip(&mut least) {
                let head_ns = costs.head_ns(w, place, rows, in_flight) as f64;
                *least = (least.0.min(head_ns / layer_ns), least.1.min(head_ns));
            }
        }
        let [first, last] = least;
        let layers = costs.layers() as f64;
        let others = layers - self.members.len() as f64;
        Floor {
            stage_ns: (layers + first.0 + last.0) / speed,
            loop_ns: all_ns + others * quickest_ns + first.1 + last.1 + self.hops_ns as f64,
        }
    }

    /// The least time of a single sequence's step, in ns: the quickest members hold what their memory
    /// allows. If it is not less than `below_ns` something between that and it. `None` if memory is
    /// short.
    pub(in super::super) fn least_single_ns(&mut self, below_ns: u64) -> Option<u64> {
        let steps = Steps { rows: 1, in_flight: 1 };
        self.prepare(steps, self.costs.needed_blocks(1));
        if !self.measure(u64::MAX) {
            return None;
        }
        let ends = self.roomiest_ends()?;
        let floor_ns = self.least_loop_ns()?;
        if floor_ns >= below_ns {
            return Some(floor_ns);
        }
        let mut least: Option<u64> = None;
        for ends in self.ends(ends) {
            let Some((loop_ns, _)) = self.ways_ns(&self.quick, ends) else { continue };
            let single_ns = loop_ns.saturating_add(self.way_ns(ends));
            least = Some(least.map_or(single_ns, |least| least.min(single_ns)));
            if least == Some(floor_ns) {
                break;
            }
        }
        least
    }

    /// The steps with the most tokens per second, all members taking part; `None` if memory is short
    /// or the bounds on time cannot be kept.
    pub(in super::super) fn offer(&mut self, care: Care) -> Option<Offer> {
        let limit_ns = self.single_limit_ns;
        if limit_ns < u64::MAX && self.least_single_ns(limit_ns + 1)? > limit_ns {
            return None;
        }
        let all_rows = self.members.iter().map(|&w| self.costs.workers[w].most_rows()).min()?;
        let sequences = self.costs.sequences(self.costs.max_kv_blocks);
        let mut best: Option<(Steps, u64)> = None;
        // Whether memory or a bound on the time keeps steps smaller than they could be.
        let mut is_short = false;
        for in_flight in self.numbers(care) {
            // Fewer steps than stages leave memory, and time, for a better cut.
            if in_flight == 0 || care == Care::Coarse && in_flight < self.stages() && !is_short {
                continue;
            }
            let most =
                self.most_rows(in_flight, all_rows.min((sequences / in_flight).max(1)), care);
            is_short |= most < all_rows;
            let known = best.filter(|_| in_flight > self.stages() && !is_short);
            for rows in rows(most, care, known) {
                let steps = Steps { rows, in_flight };
                // As many tokens in less time, by a thousandth where that is near enough.
                let below_ns = best.map_or(u64::MAX, |(least, token_ns)| {
                    let even = u128::from(token_ns) * u128::from(steps.sequences())
                        / u128::from(least.sequences());
                    let even = u64::try_from(even).unwrap_or(u64::MAX);
                    if care == Care::Exact { even } else { even - (even >> 10) }
                });
                if let Some(token_ns) = self.least_token_ns(steps, below_ns, care) {
                    best = Some((steps, token_ns));
                    is_short |= self.is_full();
                }
            }
        }
        let (steps, token_ns) = best?;
        let offer = Offer { steps, token_ns, worth: 0.0 };
        let far = self.spread.least_between_ns() as f64 / HOP_OTHER_RACK_NS as f64;
        let worth = offer.tokens_per_s() * (1.0 - HOP_PER_MILLE / 1e3 * far);
        Some(Offer { worth, ..offer })
    }

    /// Whether somebody's memory is full by what [`Self::measure`] found.
    fn is_full(&self) -> bool {
        let layers = self.costs.layers();
        self.lots.iter().any(|lot| lot.room[0] < layers && lot.most[0] == lot.room[0])
    }

    /// Numbers of steps in flight that may be the best, those first that often are.
    fn numbers(&self, care: Care) -> Vec<u32> {
        let stages = self.stages();
        let limit = in_flight_limit(stages);
        match care {
            Care::Exact if self.lots.len() <= ENDS_WORKERS => {
                (stages..=limit).chain((1..stages).rev()).collect()
            }
            Care::Exact => vec![stages, stages + 1, limit, stages.div_ceil(2), 1],
            Care::Coarse => vec![stages, stages + 1, stages - 1, 1],
        }
    }

    /// The most rows that memory and the bounds on time allow, for so many steps.
    fn most_rows(&mut self, in_flight: u32, most_rows: u32, care: Care) -> u32 {
        let (mut fits, mut too_many) = (0, most_rows + 1);
        while too_many - fits > 1 {
            // The most, if there is no want of memory.
            let rows =
                if fits == 0 && too_many > most_rows { most_rows } else { (fits + too_many) / 2 };
            let steps = Steps { rows, in_flight };
            self.prepare(steps, self.costs.needed_blocks(steps.sequences()));
            match self.is_feasible(steps, self.costs.token_limit_ns, care) {
                true => fits = rows,
                false => too_many = rows,
            }
        }
        fits
    }

    /// How the members share the layers for an offer: the ends between which the way is shortest,
    /// and then as much KV as the time allows.
    pub(in super::super) fn settle(&mut self, offer: &Offer) -> Option<Cut> {
        let steps = offer.steps;
        let below_ns = offer.token_ns.saturating_add(1);
        let token_ns = self.least_token_ns(steps, below_ns, Care::Exact)?;
        let needed = self.costs.needed_blocks(steps.sequences());
        self.prepare(steps, needed);
        self.measure(token_ns / u64::from(steps.in_flight));
        let ends = self.roomiest_ends()?;
        let ends = self
            .ends(ends)
            .filter(|&ends| self.with_ends(token_ns, ends).is_some())
            .min_by_key(|&(first, last)| {
                let (begin, end) = (self.members[first], self.members[last]);
                (self.way_ns((first, last)), begin, std::cmp::Reverse(end))
            })?;
        let (mut enough, mut too_many) = (needed, self.costs.max_kv_blocks + 1);
        while too_many - enough > 1 {
            let middle = enough + (too_many - enough) / 2;
            self.prepare(steps, middle);
            let fits = self.measure(token_ns / u64::from(steps.in_flight))
                && self.with_ends(token_ns, ends).is_some();
            if fits {
                enough = middle;
            } else {
                too_many = middle;
            }
        }
        self.prepare(steps, enough);
        self.measure(token_ns / u64::from(steps.in_flight));
        let shape = self.shape(token_ns, ends)?;
        let mut cut = self.cut(&shape, 0);
        let count = cut.stages.len();
        let blocks = cut.stages.iter().enumerate().map(|(i, (w, layers))| {
            let layers = u64::from(layers.end - layers.start);
            self.costs.blocks(*w, Place::of(i, count), layers).unwrap_or(0)
        });
        cut.kv_blocks = blocks.min()?;
        Some(cut)
    }
}

/// Numbers of rows that may be the best, those first that often are; `known` has the best of fewer
/// steps.
fn rows(most: u32, care: Care, known: Option<(Steps, u64)>) -> Vec<u32> {
    match (care, known) {
        (Care::Exact, _) => (1..=most).rev().collect(),
        (Care::Coarse, Some((steps, _))) => vec![steps.rows],
        (Care::Coarse, None) => {
            let mut rows = COARSE_ROWS.map(|part| (most * part).div_ceil(8)).to_vec();
            rows.dedup();
            rows.retain(|&rows| rows > 0);
            rows
        }
    }
}
