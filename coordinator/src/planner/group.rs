//! A group of workers that make a pipeline: whether they can keep a bound on the time per token, and
//! how they share the layers then.
//!
//! For a bound on that time, and KV for so many sequences, every worker can take so many layers, in
//! each place; the bound is feasible if there is a first and a last worker with whom these add up to
//! all layers, and whose loop obeys it too.

mod offers;

use super::costs::{Costs, FIRST, HOP_OTHER_RACK_NS, LAST, MIDDLE, ONLY};
use super::pipeline::{Cut, Steps, single_ns};
pub(super) use offers::Offer;

/// Pipelines of more workers than this are not searched for a better pair of ends when the loop of
/// the roomiest one is too long: so many workers have layers enough to choose from.
const ENDS_WORKERS: usize = 8;

/// How much a search looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    /// A few numbers of rows, times to a thousandth: to compare many groups.
    Coarse,
    /// Every number of rows, times to the nanosecond.
    Exact,
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
}
