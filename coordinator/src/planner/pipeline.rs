//! One pipeline of given workers: how its layers are cut, and how fast it is then.
//!
//! `in_flight` steps of `rows` rows go round. All of them are back after the time per token of one
//! answer, `max(loop, in_flight × slowest stage)`: either a step's way through all stages and back,
//! or what the slowest stage takes for all steps. For a bound on that time, and KV for so many
//! sequences, every worker can take so many layers, in each place; the bound is feasible if there
//! is a first and a last worker with whom these add up to all layers, and whose loop obeys it too.
//! The least bound is found by bisection, for every number of rows that can still be the best.

use std::ops::Range;

use super::costs::{Costs, FIRST, HOP_OTHER_RACK_NS, LAST, MIDDLE, ONLY, Place};
use crate::scheduler::in_flight_limit;

/// A pipeline counts as so many per mille slower for every hop to another rack between its stages,
/// and less in proportion for nearer ones: a stage more is one more that can die and that noise
/// holds up, and nobody should be in it who brings no more than that.
const HOP_PER_MILLE: f64 = 1.0;

/// Pipelines of more workers than this are not searched for a better pair of ends when the loop of
/// the roomiest one is too long: so many workers have layers enough to choose from.
const ENDS_WORKERS: usize = 8;

/// Eighths of the most rows that a coarse search looks at: fewer may leave room for a better cut.
const COARSE_ROWS: [u32; 5] = [8, 7, 6, 4, 2];

/// Which steps go round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    pub(super) rows: u32,
    pub(super) in_flight: u32,
}

impl Steps {
    fn sequences(self) -> u32 {
        self.rows * self.in_flight
    }
}

/// How fast a pipeline is with the steps that suit it best.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) steps: Steps,
    pub(super) bottleneck_ns: u64,
    pub(super) token_ns: u64,
}

impl Pace {
    pub(super) fn tokens_per_s(&self) -> f64 {
        f64::from(self.steps.sequences()) * 1e9 / self.token_ns as f64
    }

    /// More tokens in the same time, then less time per token, then smaller steps.
    fn is_better_than(&self, other: &Self) -> bool {
        let crossed = |a: &Self, b: &Self| u128::from(a.steps.sequences()) * u128::from(b.token_ns);
        let key = |a: &Self, b: &Self| {
            (crossed(a, b), std::cmp::Reverse(a.token_ns), std::cmp::Reverse(a.steps.rows))
        };
        key(self, other) > key(other, self)
    }
}

/// Workers with their layers, in stage order, and the KV that they all hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// A worker and its layers for each stage.
    pub(super) stages: Vec<(usize, Range<u32>)>,
    pub(super) kv_blocks: u32,
}

impl Cut {
    pub(super) fn workers(&self) -> impl Iterator<Item = usize> {
        self.stages.iter().map(|stage| stage.0)
    }
}

/// How much a search looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    /// A few numbers of rows, times to a thousandth: to compare many groups.
    Coarse,
    /// Every number of rows, times to the nanosecond.
    Exact,
}

/// What a group of workers can do together, all of them taking part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    steps: Steps,
    token_ns: u64,
    /// Tokens per second less what its hops count for: what groups are compared by.
    pub(super) worth: f64,
}

impl Offer {
    pub(super) fn tokens_per_s(&self) -> f64 {
        f64::from(self.steps.sequences()) * 1e9 / self.token_ns as f64
    }
}

/// The time in ns of a single sequence's step through these stages and back, which nobody can be
/// faster than.
pub(super) fn single_ns(costs: &Costs<'_>, cut: &Cut) -> u64 {
    loop_ns(costs, cut, Steps { rows: 1, in_flight: 1 })
}

fn stage_times(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> impl Iterator<Item = u64> {
    let count = cut.stages.len();
    cut.stages.iter().enumerate().map(move |(i, (w, layers))| {
        let layers = u64::from(layers.end - layers.start);
        costs.stage_ns(*w, Place::of(i, count), layers, (steps.rows, steps.in_flight))
    })
}

fn loop_ns(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> u64 {
    let path: Vec<_> = cut.workers().collect();
    stage_times(costs, cut, steps)
        .fold(costs.hops_ns(&path), |sum: u64, stage| sum.saturating_add(stage))
}

/// The time of each stage for such a step, in ns.
pub(super) fn stages_ns(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> Vec<u64> {
    stage_times(costs, cut, steps).collect()
}

/// The best pace of a pipeline that is cut already; `None` if it cannot keep the bound on the time
/// per token. Whether its memory holds the cut is not looked at.
pub(super) fn pace(costs: &Costs<'_>, cut: &Cut) -> Option<Pace> {
    let stages = cut.stages.len() as u32;
    let most_rows = cut.workers().map(|w| costs.workers[w].most_rows()).min()?;
    let sequences = costs.sequences(cut.kv_blocks);
    let mut best: Option<Pace> = None;
    for rows in 1..=most_rows.min(sequences) {
        // A single step in flight has the head where it ends, several share it.
        for (begin, end) in [(1, 1), (2, in_flight_limit(stages))] {
            let steps = Steps { rows, in_flight: begin };
            let loop_ns = loop_ns(costs, cut, steps);
            let bottleneck_ns = stage_times(costs, cut, steps).max()?;
            for in_flight in begin..=end.min(sequences / rows) {
                let token_ns = loop_ns.max(bottleneck_ns.saturating_mul(u64::from(in_flight)));
                let steps = Steps { rows, in_flight };
                let found = Pace { steps, bottleneck_ns, token_ns };
                if token_ns <= costs.token_limit_ns
                    && best.as_ref().is_none_or(|best| found.is_better_than(best))
                {
                    best = Some(found);
                }
            }
        }
    }
    best
}

/// A group of workers, with room for what is computed for one bound after the other.
pub(super) struct Group<'a> {
    costs: &'a Costs<'a>,
    /// By number.
    members: &'a [usize],
    /// Bound on the time of a single sequence's step, in ns.
    single_limit_ns: u64,
    hops_ns: u64,
    /// Of the steps looked at, for each member: most layers by memory, time of a layer and the head.
    lots: Vec<Lot>,
    /// Members by the time of a layer.
    quick: Vec<usize>,
}

#[derive(Clone, Copy, Default)]
struct Lot {
    layer_ns: u64,
    head_first_ns: u64,
    head_last_ns: u64,
    /// By memory, as middle, first and last stage.
    room: [u64; 3],
    /// By memory and time, as middle, first and last stage.
    most: [u64; 3],
}

/// The ends of a pipeline, as places in the list of members, and the layers of every member.
struct Shape {
    first: usize,
    last: usize,
    layers: Vec<u64>,
}

impl<'a> Group<'a> {
    pub(super) fn new(costs: &'a Costs<'a>, members: &'a [usize], single_limit_ns: u64) -> Self {
        Self {
            costs,
            members,
            single_limit_ns,
            hops_ns: costs.least_hops_ns(members),
            lots: vec![Lot::default(); members.len()],
            quick: (0..members.len()).collect(),
        }
    }

    fn stages(&self) -> u32 {
        self.members.len() as u32
    }

    /// Makes ready for such steps with so many KV blocks.
    fn prepare(&mut self, steps: Steps, blocks: u32) {
        let costs = self.costs;
        for (lot, &w) in self.lots.iter_mut().zip(self.members) {
            let head_ns = |place| costs.head_ns(w, place, steps.rows, steps.in_flight);
            let room = |place| costs.room(w, place, blocks).min(costs.layers());
            lot.layer_ns = costs.workers[w].layer_ns(steps.rows);
            if self.members.len() == 1 {
                lot.head_last_ns = head_ns(ONLY);
                lot.room = [room(ONLY); 3];
            } else {
                lot.head_first_ns = head_ns(FIRST);
                lot.head_last_ns = head_ns(LAST);
                lot.room = [room(MIDDLE), room(FIRST), room(LAST)];
            }
        }
        let lots = &self.lots;
        self.quick.sort_by_key(|&member| (lots[member].layer_ns, member));
    }

    /// The most layers that every member can take in each place if a stage may take so long.
    /// False if somebody could take none.
    fn measure(&mut self, stage_ns: u64) -> bool {
        for lot in &mut self.lots {
            let by_time = |head_ns: u64| stage_ns.saturating_sub(head_ns) / lot.layer_ns;
            let most = [by_time(0), by_time(lot.head_first_ns), by_time(lot.head_last_ns)];
            for ((taken, by_time), room) in lot.most.iter_mut().zip(most).zip(lot.room) {
                *taken = by_time.min(room);
            }
            if lot.most[0] == 0 {
                return false;
            }
        }
        true
    }

    /// The two ends that take the fewest layers from what all could hold as middle stages, if then
    /// every layer has a place.
    fn roomiest_ends(&self) -> Option<(usize, usize)> {
        let layers = self.costs.layers();
        if let [lot] = &self.lots[..] {
            return (lot.most[2] >= layers).then_some((0, 0));
        }
        // The two members that lose least in the first place, and in the last one.
        let mut best = [[(u64::MAX, usize::MAX); 2]; 2];
        let mut sum = 0_u64;
        for (member, lot) in self.lots.iter().enumerate() {
            sum = sum.saturating_add(lot.most[0]);
            for (end, two) in best.iter_mut().enumerate() {
                let most = lot.most[end + 1];
                if most == 0 {
                    continue;
                }
                let loss = (lot.most[0] - most, member);
                if loss < two[0] {
                    *two = [loss, two[0]];
                } else if loss < two[1] {
                    two[1] = loss;
                }
            }
        }
        let [firsts, lasts] = best;
        let pairs = firsts.iter().flat_map(|first| lasts.iter().map(move |last| (first, last)));
        let (loss, first, last) = pairs
            .filter(|(first, last)| first.1 != last.1 && first.0.max(last.0) < u64::MAX)
            .map(|(first, last)| (first.0 + last.0, first.1, last.1))
            .min()?;
        (sum - loss >= layers).then_some((first, last))
    }

    /// Most layers of a member between these ends, by what [`Self::measure`] found.
    fn most(&self, member: usize, first: usize, last: usize) -> u64 {
        let lot = &self.lots[member];
        match (member == first, member == last) {
            (true, _) if self.lots.len() > 1 => lot.most[1],
            (_, true) => lot.most[2],
            _ => lot.most[0],
        }
    }

    /// The least time of a step's way through all stages between these ends, in ns: the quickest are
    /// filled first. `each` hears the layers of every member. `None` if not every layer has a place.
    fn fill(&self, first: usize, last: usize, mut each: impl FnMut(usize, u64)) -> Option<u64> {
        let mut left = self.costs.layers().checked_sub(self.lots.len() as u64)?;
        let mut loop_ns = self.lots[first].head_first_ns + self.lots[last].head_last_ns;
        for &member in &self.quick {
            let more = self.most(member, first, last).checked_sub(1)?.min(left);
            left -= more;
            each(member, 1 + more);
            loop_ns = loop_ns.saturating_add(self.lots[member].layer_ns.saturating_mul(1 + more));
        }
        (left == 0).then_some(loop_ns)
    }

    /// Whether a cut is among those whose time for one sequence is allowed.
    fn is_quick_enough(&self, shape: &Shape) -> bool {
        self.single_limit_ns == u64::MAX
            || single_ns(self.costs, &self.cut(shape, 0)) <= self.single_limit_ns
    }

    fn cut(&self, shape: &Shape, kv_blocks: u32) -> Cut {
        let (first, last) = (self.members[shape.first], self.members[shape.last]);
        let mut next = 0;
        let stages = self
            .costs
            .path(self.members, first, last)
            .into_iter()
            .map(|w| {
                let begin = next;
                let member = self.members.binary_search(&w).unwrap_or_default();
                next += shape.layers[member] as u32;
                (w, begin..next)
            })
            .collect();
        Cut { stages, kv_blocks }
    }

    /// Whether these ends obey the bound with what [`Self::measure`] found, and the layers then.
    fn with_ends(&self, token_ns: u64, first: usize, last: usize) -> Option<Shape> {
        let loop_ns = self.fill(first, last, |_, _| {})?;
        let path = || self.costs.path(self.members, self.members[first], self.members[last]);
        if loop_ns.saturating_add(self.hops_ns) > token_ns
            || loop_ns.saturating_add(self.costs.hops_ns(&path())) > token_ns
        {
            return None;
        }
        let mut layers = vec![0; self.lots.len()];
        self.fill(first, last, |member, share| layers[member] = share)?;
        let shape = Shape { first, last, layers };
        self.is_quick_enough(&shape).then_some(shape)
    }

    /// Whether a bound on the time per token is feasible for the steps that were made ready.
    fn is_feasible(&mut self, steps: Steps, token_ns: u64, care: Care) -> bool {
        let stage_ns = token_ns / u64::from(steps.in_flight);
        if !self.measure(stage_ns) {
            return false;
        }
        let Some((first, last)) = self.roomiest_ends() else { return false };
        // No loop is longer than so many of the slowest stages and the hops.
        let all_ns = stage_ns.saturating_mul(u64::from(self.stages()));
        let far_ns = HOP_OTHER_RACK_NS * u64::from(self.stages() + 1);
        let is_free = self.single_limit_ns == u64::MAX;
        if is_free && all_ns.saturating_add(far_ns) <= token_ns {
            return true;
        }
        if care == Care::Coarse && is_free {
            let loop_ns = self.fill(first, last, |_, _| {});
            return loop_ns.is_some_and(|ns| ns.saturating_add(self.hops_ns) <= token_ns);
        }
        if self.with_ends(token_ns, first, last).is_some() {
            return true;
        }
        let is_searched = self.lots.len() <= ENDS_WORKERS || !is_free;
        is_searched
            && self
                .ends(first, last)
                .into_iter()
                .any(|(first, last)| self.with_ends(token_ns, first, last).is_some())
    }

    /// Ends to choose from: all pairs, or with many members those with one of the roomiest.
    fn ends(&self, first: usize, last: usize) -> Vec<(usize, usize)> {
        match self.lots.len() {
            ..=ENDS_WORKERS => self.pairs().collect(),
            count => (0..count)
                .flat_map(|member| [(first, member), (member, last)])
                .filter(|(first, last)| first != last)
                .collect(),
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let count = self.lots.len();
        (0..count)
            .flat_map(move |first| (0..count).map(move |last| (first, last)))
            .filter(move |(first, last)| first != last || count == 1)
    }

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
    pub(super) fn least_single_ns(&mut self) -> Option<u64> {
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
    pub(super) fn offer(&mut self, care: Care) -> Option<Offer> {
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
    pub(super) fn settle(&mut self, offer: &Offer) -> Option<Cut> {
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
