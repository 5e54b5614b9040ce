//! A group of workers that make a pipeline: whether they can keep a bound on the time per token, and
//! how they share the layers then.
//!
//! For a bound on that time, and KV for so many sequences, every worker can take so many layers, in
//! each place; the bound is feasible if there is a first and a last worker with whom these add up to
//! all layers, and whose loop obeys it too.

mod offers;

use super::costs::{Costs, FIRST, HOP_OTHER_RACK_NS, LAST, MIDDLE, ONLY, Spread};
use super::pipeline::{Cut, Steps};
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
    /// Over how many racks and machines the members are spread.
    spread: Spread,
    /// The way through all members, whichever the ends are, in ns: no way is shorter.
    hops_ns: u64,
    /// Of the steps looked at, for each member: most layers by memory, time of a layer and the head.
    lots: Vec<Lot>,
    /// Members by the time of a layer in those steps, and by that of a single row.
    quick: Vec<usize>,
    quick_single: Vec<usize>,
}

#[derive(Clone, Copy, Default)]
struct Lot {
    layer_ns: u64,
    /// A layer for a single row.
    single_ns: u64,
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
        let spread = costs.spread(members);
        let lot = |&w: &usize| Lot { single_ns: costs.workers[w].layer_ns(1), ..Lot::default() };
        let lots: Vec<_> = members.iter().map(lot).collect();
        let mut quick_single = Vec::new();
        if single_limit_ns < u64::MAX {
            quick_single.extend(0..members.len());
            quick_single.sort_by_key(|&member| (lots[member].single_ns, member));
        }
        Self {
            costs,
            members,
            single_limit_ns,
            hops_ns: spread.least_hops_ns(),
            spread,
            lots,
            quick: (0..members.len()).collect(),
            quick_single,
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
        self.costs.worked(self.lots.len());
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

    /// Shares the layers out between these ends, to the first of `order` first. `each` hears the layers
    /// of every member. `None` if not every layer has a place.
    fn fill(
        &self,
        order: &[usize],
        (first, last): (usize, usize),
        mut each: impl FnMut(usize, u64),
    ) -> Option<()> {
        self.costs.worked(self.lots.len());
        let mut left = self.costs.layers().checked_sub(self.lots.len() as u64)?;
        for &member in order {
            let more = self.most(member, first, last).checked_sub(1)?.min(left);
            left -= more;
            each(member, 1 + more);
        }
        (left == 0).then_some(())
    }

    /// The time of a step's way through all stages between these ends without the hops, in ns, and of a
    /// single sequence's one. `None` if not every layer has a place.
    fn ways_ns(&self, order: &[usize], ends: (usize, usize)) -> Option<(u64, u64)> {
        let (first, last) = ends;
        let mut loop_ns = self.lots[first].head_first_ns + self.lots[last].head_last_ns;
        // A single row is drawn where it ends.
        let mut single_ns = self.costs.head_ns(self.members[last], LAST, 1, 1);
        self.fill(order, ends, |member, layers| {
            let lot = &self.lots[member];
            loop_ns = loop_ns.saturating_add(lot.layer_ns.saturating_mul(layers));
            single_ns = single_ns.saturating_add(lot.single_ns.saturating_mul(layers));
        })?;
        Some((loop_ns, single_ns))
    }

    /// The least time of a step's way through all stages and back, in ns: with no ends it is less.
    fn least_loop_ns(&self) -> Option<u64> {
        let mut left = self.costs.layers().checked_sub(self.lots.len() as u64)?;
        let first_ns = self.lots.iter().map(|lot| lot.head_first_ns).min()?;
        let last_ns = self.lots.iter().map(|lot| lot.head_last_ns).min()?;
        let mut loop_ns = self.hops_ns.saturating_add(first_ns).saturating_add(last_ns);
        for &member in &self.quick {
            let lot = &self.lots[member];
            let more = lot.most[0].checked_sub(1)?.min(left);
            left -= more;
            loop_ns = loop_ns.saturating_add(lot.layer_ns.saturating_mul(1 + more));
        }
        (left == 0).then_some(loop_ns)
    }

    /// The way from the coordinator through all members between these ends and back, in ns.
    fn way_ns(&self, (first, last): (usize, usize)) -> u64 {
        self.costs.way_ns(&self.spread, self.members[first], self.members[last])
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

    /// In which order members are filled so that these ends obey the bounds with what
    /// [`Self::measure`] found; `None` if in none that is tried.
    fn with_ends(&self, token_ns: u64, ends: (usize, usize)) -> Option<&[usize]> {
        let mut hops_ns = None;
        let is_free = self.single_limit_ns == u64::MAX;
        let orders = [&self.quick, &self.quick_single];
        // What is quick for many rows is so for one, more often than not.
        orders.into_iter().take(if is_free { 1 } else { 2 }).map(Vec::as_slice).find(|order| {
            let Some((loop_ns, single_ns)) = self.ways_ns(order, ends) else { return false };
            if loop_ns.saturating_add(self.hops_ns) > token_ns {
                return false;
            }
            let hops_ns = *hops_ns.get_or_insert_with(|| self.way_ns(ends));
            loop_ns.saturating_add(hops_ns) <= token_ns
                && (is_free || single_ns.saturating_add(hops_ns) <= self.single_limit_ns)
        })
    }

    /// The layers of every member between these ends, if those obey the bounds.
    fn shape(&self, token_ns: u64, ends: (usize, usize)) -> Option<Shape> {
        let order = self.with_ends(token_ns, ends)?;
        let mut layers = vec![0; self.lots.len()];
        self.fill(order, ends, |member, share| layers[member] = share)?;
        Some(Shape { first: ends.0, last: ends.1, layers })
    }

    /// Whether a bound on the time per token is feasible for the steps that were made ready.
    fn is_feasible(&mut self, steps: Steps, token_ns: u64, care: Care) -> bool {
        let stage_ns = token_ns / u64::from(steps.in_flight);
        if !self.measure(stage_ns) {
            return false;
        }
        let Some(ends) = self.roomiest_ends() else { return false };
        // No loop is longer than so many of the slowest stages and the hops.
        let all_ns = stage_ns.saturating_mul(u64::from(self.stages()));
        let far_ns = HOP_OTHER_RACK_NS * u64::from(self.stages() + 1);
        let is_free = self.single_limit_ns == u64::MAX;
        if is_free && all_ns.saturating_add(far_ns) <= token_ns {
            return true;
        }
        if care == Care::Coarse && is_free {
            let loop_ns = self.ways_ns(&self.quick, ends).map(|(loop_ns, _)| loop_ns);
            return loop_ns.is_some_and(|ns| ns.saturating_add(self.hops_ns) <= token_ns);
        }
        if self.with_ends(token_ns, ends).is_some() {
            return true;
        }
        let is_searched = self.lots.len() <= ENDS_WORKERS || !is_free;
        is_searched
            && self.least_loop_ns().is_some_and(|ns| ns <= token_ns)
            && self.ends(ends).any(|ends| self.with_ends(token_ns, ends).is_some())
    }

    /// Ends to choose from: all pairs, or with many members those with one of the roomiest.
    fn ends(&self, (first, last): (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
        let count = self.lots.len();
        let is_small = count <= ENDS_WORKERS;
        let pairs = (0..if is_small { count } else { 0 })
            .flat_map(move |first| (0..count).map(move |last| (first, last)));
        let some = (0..if is_small { 0 } else { count })
            .flat_map(move |member| [(first, member), (member, last)]);
        pairs.chain(some).filter(move |(first, last)| first != last || count == 1)
    }
}
