//! What a group of workers can do at best: the least bound on the time per token, found by bisection,
//! for every number of rows and of steps in flight that can still be the best.

use super::super::costs::{HOP_OTHER_RACK_NS, Place};
use super::super::pipeline::{Cut, Steps};
use super::{Care, ENDS_WORKERS, Group};
use crate::scheduler::in_flight_limit;

/// A pipeline counts as so many per mille slower for every hop to another rack between its stages,
/// and less in proportion for nearer ones: a stage more is one more that can die and that noise
/// holds up, and nobody should be in it who brings no more than that.
const HOP_PER_MILLE: f64 = 1.0;

/// Eighths of the most rows that a coarse search looks at: fewer may leave room for a better cut.
const COARSE_ROWS: [u32; 5] = [8, 7, 6, 4, 2];

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

impl Group<'_> {
    /// The least time per token of such steps, if it is less than `below_ns`.
    fn least_token_ns(&mut self, steps: Steps, below_ns: u64, care: Care) -> Option<u64> {
        let blocks = self.costs.needed_blocks(steps.sequences());
        if blocks > self.costs.max_kv_blocks {
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
        // Everybody computes all the time: nobody is faster than that.
        let speed: f64 = self.lots.iter().map(|lot| 1.0 / lot.layer_ns as f64).sum();
        let ideal = self.costs.layers() as f64 / speed * f64::from(steps.in_flight);
        let mut too_small = (ideal as u64).saturating_sub(2).min(enough - 1);
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

    /// The least time of a single sequence's step, in ns: the quickest members hold what their memory
    /// allows. `None` if memory is short.
    pub(in super::super) fn least_single_ns(&mut self) -> Option<u64> {
        let steps = Steps { rows: 1, in_flight: 1 };
        self.prepare(steps, self.costs.needed_blocks(1));
        if !self.measure(u64::MAX) {
            return None;
        }
        let (first, last) = self.roomiest_ends()?;
        let mut least = None;
        for (first, last) in self.ends(first, last) {
            let Some(loop_ns) = self.fill(first, last, |_, _| {}) else { continue };
            if least.is_some_and(|least| loop_ns.saturating_add(self.hops_ns) >= least) {
                continue;
            }
            let path = self.costs.path(self.members, self.members[first], self.members[last]);
            let single_ns = loop_ns.saturating_add(self.costs.hops_ns(&path));
            least = Some(least.map_or(single_ns, |least: u64| least.min(single_ns)));
        }
        least
    }

    /// The steps with the most tokens per second, all members taking part; `None` if memory is short
    /// or the bounds on time cannot be kept.
    pub(in super::super) fn offer(&mut self, care: Care) -> Option<Offer> {
        let most_rows = self.members.iter().map(|&w| self.costs.workers[w].most_rows()).min()?;
        let mut best: Option<(Steps, u64)> = None;
        for steps in self.candidates(most_rows, care) {
            // As many tokens in less time, by a thousandth where that is near enough.
            let below_ns = best.map_or(u64::MAX, |(least, token_ns)| {
                let even = u128::from(token_ns) * u128::from(steps.sequences())
                    / u128::from(least.sequences());
                let even = u64::try_from(even).unwrap_or(u64::MAX);
                if care == Care::Exact { even } else { even - (even >> 10) }
            });
            if let Some(token_ns) = self.least_token_ns(steps, below_ns, care) {
                best = Some((steps, token_ns));
            }
        }
        let (steps, token_ns) = best?;
        let offer = Offer { steps, token_ns, worth: 0.0 };
        let far = self.costs.least_between_ns(self.members) as f64 / HOP_OTHER_RACK_NS as f64;
        let worth = offer.tokens_per_s() * (1.0 - HOP_PER_MILLE / 1e3 * far);
        Some(Offer { worth, ..offer })
    }

    /// Steps that may be the best, those first that often are.
    fn candidates(&mut self, all_rows: u32, care: Care) -> Vec<Steps> {
        let stages = self.stages();
        let sequences = self.costs.sequences(self.costs.max_kv_blocks);
        let limit = in_flight_limit(stages);
        let numbers: Vec<u32> = match care {
            Care::Exact if self.lots.len() <= ENDS_WORKERS => {
                (stages..=limit).chain((1..stages).rev()).collect()
            }
            // Fewer steps than stages where memory is so short that these leave room for a better
            // cut.
            Care::Exact => vec![stages, stages + 1, limit, stages.div_ceil(2), 1],
            Care::Coarse => vec![stages, stages + 1, 1],
        };
        let mut all = Vec::new();
        for in_flight in numbers {
            let most =
                self.most_rows(in_flight, all_rows.min((sequences / in_flight).max(1)), care);
            let rows: Vec<u32> = match care {
                Care::Exact => (1..=most).rev().collect(),
                Care::Coarse => {
                    let mut rows = COARSE_ROWS.map(|part| (most * part).div_ceil(8)).to_vec();
                    rows.dedup();
                    rows.retain(|&rows| rows > 0);
                    rows
                }
            };
            all.extend(rows.into_iter().map(|rows| Steps { rows, in_flight }));
        }
        all
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
        let (first, last) = self.roomiest_ends()?;
        let ends = self.ends(first, last);
        let (first, last) = ends
            .into_iter()
            .filter(|&(first, last)| self.with_ends(token_ns, first, last).is_some())
            .min_by_key(|&(first, last)| {
                let (first, last) = (self.members[first], self.members[last]);
                let path = self.costs.path(self.members, first, last);
                (self.costs.between_ns(&path), first, std::cmp::Reverse(last))
            })?;
        let (mut enough, mut too_many) = (needed, self.costs.max_kv_blocks + 1);
        while too_many - enough > 1 {
            let middle = enough + (too_many - enough) / 2;
            self.prepare(steps, middle);
            let fits = self.measure(token_ns / u64::from(steps.in_flight))
                && self.with_ends(token_ns, first, last).is_some();
            if fits {
                enough = middle;
            } else {
                too_many = middle;
            }
        }
        self.prepare(steps, enough);
        self.measure(token_ns / u64::from(steps.in_flight));
        let shape = self.with_ends(token_ns, first, last)?;
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
