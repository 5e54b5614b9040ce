//! What a planning problem says, made ready to compute with: times by rows, memory by place, and how
//! far workers are from each other.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::grouping::EXACT_WORKERS;
use super::{ModelCosts, Objective, Problem, StepTime, WorkerSpec};

/// Rows of the largest step that a plan is judged by: what a step holds unless a coordinator is
/// told otherwise. Beyond it a row costs as much as it brings.
const MOST_ROWS: u32 = 64;

/// From one stage's engine to the next one's in the same machine: decoding, two wake-ups and the
/// loopback. Assumed, as the next two are: steps take tens of milliseconds.
const HOP_SAME_MACHINE_NS: u64 = 100_000;

/// The same between machines of a rack: a network card on either side, and a switch.
pub(crate) const HOP_SAME_RACK_NS: u64 = 200_000;

/// The same between racks: more switches, and links that others use too.
pub(crate) const HOP_OTHER_RACK_NS: u64 = 400_000;

/// From the coordinator to the first stage, or from the last one back. Nobody knows yet on which
/// machine the coordinator will be, so all pipelines are as far from it.
const HOP_COORDINATOR_NS: u64 = HOP_SAME_RACK_NS;

/// What a stage holds beside its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) first: bool,
    pub(super) last: bool,
}

pub(super) const MIDDLE: Place = Place { first: false, last: false };
pub(super) const FIRST: Place = Place { first: true, last: false };
pub(super) const LAST: Place = Place { first: false, last: true };
pub(super) const ONLY: Place = Place { first: true, last: true };

impl Place {
    /// The place of stage `index` of `count`.
    pub(super) fn of(index: usize, count: usize) -> Self {
        Self { first: index == 0, last: index + 1 == count }
    }
}

/// A worker with its times by rows.
pub(super) struct Worker<'a> {
    pub(super) spec: &'a WorkerSpec,
    /// Of one layer, and of norm and head, in ns: for one row, two rows, and so on.
    times: Vec<(u64, u64)>,
    /// Equal numbers: the same rack.
    pub(super) rack: usize,
    /// Equal numbers: the same machine.
    pub(super) machine: usize,
    /// Workers of equal numbers can stand in for each other in any plan.
    pub(super) kind: usize,
}

impl Worker<'_> {
    /// Rows of the largest step whose time is known.
    pub(super) fn most_rows(&self) -> u32 {
        self.times.len() as u32
    }

    /// One layer of a step, in ns; `rows` must not be more than [`Self::most_rows`].
    pub(super) fn layer_ns(&self, rows: u32) -> u64 {
        self.times[rows as usize - 1].0
    }

    fn whole_head_ns(&self, rows: u32) -> u64 {
        self.times[rows as usize - 1].1
    }
}

/// One planning problem, made ready.
pub(super) struct Costs<'a> {
    pub(super) model: &'a ModelCosts,
    /// Those who can be planned, by id.
    pub(super) workers: Vec<Worker<'a>>,
    /// Every pipeline holds so many at least.
    pub(super) min_kv_blocks: u32,
    /// And so many at most.
    pub(super) max_kv_blocks: u32,
    /// Of one sequence with the context that people use.
    pub(super) sequence_blocks: u32,
    /// A pipeline may take so long for a token of one answer.
    pub(super) token_limit_ns: u64,
    /// For so many workers every partition is looked at.
    pub(super) exact_workers: usize,
    /// Whether the answer is still wanted.
    wanted: &'a dyn Fn() -> bool,
    /// Workers that were looked at, once for every bound on the time of a group that they are in.
    work: Cell<u64>,
}

/// Over how many racks and machines a group of workers is spread.
pub(super) struct Spread {
    workers: u64,
    racks: u64,
    machines: u64,
}

impl Spread {
    /// From stage to stage through all of them with so many visits of racks and machines, in ns.
    fn between_ns(&self, racks: u64, machines: u64) -> u64 {
        (self.workers - machines) * HOP_SAME_MACHINE_NS
            + (machines - racks) * HOP_SAME_RACK_NS
            + (racks - 1) * HOP_OTHER_RACK_NS
    }

    /// From stage to stage of the best way through all of them, whichever its ends are, in ns: no
    /// less than every rack and every machine once.
    pub(super) fn least_between_ns(&self) -> u64 {
        self.between_ns(self.racks, self.machines)
    }

    /// [`Self::least_between_ns`] with the ways from and to the coordinator.
    pub(super) fn least_hops_ns(&self) -> u64 {
        self.least_between_ns() + 2 * HOP_COORDINATOR_NS
    }
}

impl<'a> Costs<'a> {
    pub(super) fn new(problem: &'a Problem, wanted: &'a dyn Fn() -> bool) -> Self {
        let Problem { model, options, .. } = problem;
        assert!(model.layers > 0 && model.layer_bytes > 0, "a model has layers with weights");
        let token_limit_ns = match options.objective {
            Objective::Throughput { token_time: Some(limit) } => {
                u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)
            }
            Objective::Throughput { token_time: None } | Objective::Latency => u64::MAX,
        };
        let mut specs: Vec<_> =
            problem.workers.iter().filter(|spec| !times_by_rows(&spec.steps).is_empty()).collect();
        specs.sort_by(|a, b| a.id.cmp(&b.id));
        let (mut racks, mut machines) = (Numbers::default(), Numbers::default());
        let mut workers: Vec<_> = specs
            .into_iter()
            .map(|spec| Worker {
                spec,
                times: times_by_rows(&spec.steps),
                rack: racks.of(spec.rack.clone()),
                // A worker that does not name its machine shares it with nobody.
                machine: match spec.machine.is_empty() {
                    true => machines.of((String::new(), spec.id.clone())),
                    false => machines.of((spec.rack.clone(), spec.machine.clone())),
                },
                kind: 0,
            })
            .collect();
        let mut shared: BTreeMap<usize, u32> = BTreeMap::new();
        for worker in &workers {
            *shared.entry(worker.machine).or_default() += 1;
        }
        let mut kinds = Numbers::default();
        for worker in &mut workers {
            let company = (shared[&worker.machine] > 1).then_some(worker.machine);
            let looks = (worker.spec.memory_bytes, worker.times.clone(), worker.rack, company);
            worker.kind = kinds.of(looks);
        }
        let min_kv_blocks = options.min_kv_blocks.max(1);
        Self {
            model,
            workers,
            min_kv_blocks,
            max_kv_blocks: options.max_kv_blocks.max(min_kv_blocks),
            sequence_blocks: options.context_tokens.div_ceil(proto::BLOCK_TOKENS).max(1),
            token_limit_ns,
            exact_workers: EXACT_WORKERS,
            wanted,
            work: Cell::new(0),
        }
    }

    /// The same workers without a bound on the time per token.
    pub(super) fn without_limit(&self, problem: &'a Problem) -> Self {
        Self { token_limit_ns: u64::MAX, ..Self::new(problem, self.wanted) }
    }

    /// Whether the answer is still wanted; if not, whoever searches may find nothing.
    pub(super) fn is_wanted(&self) -> bool {
        (self.wanted)()
    }

    /// So many workers were looked at.
    pub(super) fn worked(&self, workers: usize) {
        self.work.set(self.work.get() + workers as u64);
    }

    /// How many workers were looked at so far, those twice that were so twice: what planning costs,
    /// on any machine.
    pub(super) fn work(&self) -> u64 {
        self.work.get()
    }

    pub(super) fn find(&self, id: &str) -> Option<usize> {
        self.workers.binary_search_by(|worker| worker.spec.id.as_str().cmp(id)).ok()
    }

    pub(super) fn layers(&self) -> u64 {
        u64::from(self.model.layers)
    }

    /// What norm and head take of a step's time in this place, in the mean of many steps. Where a
    /// single step is in flight its rows are drawn where they end.
    pub(super) fn head_ns(&self, worker: usize, place: Place, rows: u32, in_flight: u32) -> u64 {
        let head_ns = self.workers[worker].whole_head_ns(rows);
        let shared = self.model.tied_head && in_flight > 1;
        match (place.first, place.last) {
            (true, true) => head_ns,
            (true, false) if shared => head_ns / 2,
            (false, true) if shared => head_ns.div_ceil(2),
            (false, true) => head_ns,
            _ => 0,
        }
    }

    /// A step through a stage, in ns.
    pub(super) fn stage_ns(
        &self,
        worker: usize,
        place: Place,
        layers: u64,
        (rows, in_flight): (u32, u32),
    ) -> u64 {
        let layer_ns = self.workers[worker].layer_ns(rows);
        layer_ns.saturating_mul(layers).saturating_add(self.head_ns(worker, place, rows, in_flight))
    }

    /// Weights beside the layers.
    pub(super) fn fixed_bytes(&self, place: Place) -> u64 {
        let model = self.model;
        let embedding = if place.first { model.embedding_bytes } else { 0 };
        let has_head = place.last || (place.first && model.tied_head);
        let head = if has_head { model.head_bytes } else { 0 };
        match model.tied_head {
            true => embedding.max(head),
            false => embedding.saturating_add(head),
        }
    }

    /// Layers that fit into a worker's memory beside what its place needs, each with `blocks` KV
    /// blocks.
    pub(super) fn room(&self, worker: usize, place: Place, blocks: u32) -> u64 {
        let memory = self.workers[worker].spec.memory_bytes;
        let kv_bytes = self.model.kv_block_layer_bytes.saturating_mul(u64::from(blocks));
        let layer_bytes = self.model.layer_bytes.saturating_add(kv_bytes);
        memory.saturating_sub(self.fixed_bytes(place)) / layer_bytes
    }

    /// KV blocks that fit beside so many layers; `None` if not even the layers do.
    pub(super) fn blocks(&self, worker: usize, place: Place, layers: u64) -> Option<u32> {
        let weights =
            self.model.layer_bytes.saturating_mul(layers).saturating_add(self.fixed_bytes(place));
        let room = self.workers[worker].spec.memory_bytes.checked_sub(weights)?;
        let block_bytes = self.model.kv_block_layer_bytes.max(1).saturating_mul(layers.max(1));
        Some(u32::try_from(room / block_bytes).unwrap_or(u32::MAX).min(self.max_kv_blocks))
    }

    /// Sequences that a pipeline with so many blocks can hold: one at least, if a short one.
    pub(super) fn sequences(&self, kv_blocks: u32) -> u32 {
        (kv_blocks / self.sequence_blocks).max(1)
    }

    /// KV blocks that so many sequences need.
    pub(super) fn needed_blocks(&self, sequences: u32) -> u32 {
        let needed = match sequences {
            // Where there is no room for one of the usual length there may be for a short one.
            0 | 1 => 0,
            more => more.saturating_mul(self.sequence_blocks),
        };
        needed.max(self.min_kv_blocks)
    }

    /// From stage to stage along these workers, in ns.
    pub(super) fn between_ns(&self, path: &[usize]) -> u64 {
        path.windows(2).map(|pair| self.hop_ns(pair[0], pair[1])).sum()
    }

    /// From the coordinator along these workers and back, in ns.
    pub(super) fn hops_ns(&self, path: &[usize]) -> u64 {
        self.between_ns(path) + 2 * HOP_COORDINATOR_NS
    }

    fn hop_ns(&self, from: usize, to: usize) -> u64 {
        let (from, to) = (&self.workers[from], &self.workers[to]);
        match (from.machine == to.machine, from.rack == to.rack) {
            (true, _) => HOP_SAME_MACHINE_NS,
            (false, true) => HOP_SAME_RACK_NS,
            (false, false) => HOP_OTHER_RACK_NS,
        }
    }

    /// The way through all of `members` from `first` to `last` with the fewest changes of racks, then
    /// of machines: a rack's workers follow each other, and so do a machine's. If both ends share a
    /// rack or a machine and others lie between, that one is visited twice.
    pub(super) fn path(&self, members: &[usize], first: usize, last: usize) -> Vec<usize> {
        if first == last {
            return vec![first];
        }
        let (begin, end) = (&self.workers[first], &self.workers[last]);
        let mut inner: Vec<_> =
            members.iter().copied().filter(|&w| w != first && w != last).collect();
        inner.sort_by_key(|&w| {
            let worker = &self.workers[w];
            // Who is with an end is beside it; the first one takes those who are with both, but
            // leaves the other machines of the last one's rack to that.
            let rack = match (worker.rack == begin.rack, worker.rack == end.rack) {
                (true, _) => 0,
                (false, false) => 1,
                (false, true) => 2,
            };
            let machine = match (worker.machine == begin.machine, worker.machine == end.machine) {
                (true, _) => 0,
                (false, false) => 1,
                (false, true) if end.rack == begin.rack => 3,
                (false, true) => 2,
            };
            // Of a rack with both ends and others between, the last one's machine comes at the end.
            let rack = if machine == 3 { 3 } else { rack };
            (rack, worker.rack, machine, worker.machine, w)
        });
        [vec![first], inner, vec![last]].concat()
    }

    /// How `members` are spread: one worker at least.
    pub(super) fn spread(&self, members: &[usize]) -> Spread {
        let mut places: Vec<_> =
            members.iter().map(|&w| (self.workers[w].rack, self.workers[w].machine)).collect();
        places.sort_unstable();
        places.dedup();
        let machines = places.len() as u64;
        places.dedup_by_key(|place| place.0);
        Spread { workers: members.len() as u64, racks: places.len() as u64, machines }
    }

    /// [`Self::hops_ns`] of [`Self::path`] through a group that is spread so: every rack and every
    /// machine is visited once, but one that has both ends, if there are others, twice.
    pub(super) fn way_ns(&self, spread: &Spread, first: usize, last: usize) -> u64 {
        let (begin, end) = (&self.workers[first], &self.workers[last]);
        let twice = |is_same: bool, count: u64| u64::from(first != last && is_same && count > 1);
        let racks = spread.racks + twice(begin.rack == end.rack, spread.racks);
        let machines = spread.machines + twice(begin.machine == end.machine, spread.machines);
        spread.between_ns(racks, machines) + 2 * HOP_COORDINATOR_NS
    }
}

/// Numbers for things, equal for equal ones.
struct Numbers<T>(BTreeMap<T, usize>);

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord> Numbers<T> {
    fn of(&mut self, thing: T) -> usize {
        let next = self.0.len();
        *self.0.entry(thing).or_insert(next)
    }
}

/// Times for one row, two rows and so on, up to the largest step that was measured, on straight
/// lines between what was. Fewer rows than were ever measured take as long as the fewest.
fn times_by_rows(steps: &[StepTime]) -> Vec<(u64, u64)> {
    let mut known: Vec<_> = steps
        .iter()
        .filter(|step| step.rows > 0)
        .map(|s| (s.rows, s.layer_ns, s.head_ns))
        .collect();
    known.sort_unstable();
    known.dedup_by_key(|step| step.0);
    let Some(&(most, ..)) = known.last() else { return Vec::new() };
    let at = |rows: u32| {
        let above = known.partition_point(|step| step.0 < rows);
        let (high_rows, high_layer, high_head) = known[above.min(known.len() - 1)];
        let (low_rows, low_layer, low_head) = known[above.saturating_sub(1)];
        if above == 0 || high_rows == rows {
            return (high_layer.max(1), high_head);
        }
        let part = |low: u64, high: u64| {
            let share = i128::from(rows - low_rows) * (i128::from(high) - i128::from(low));
            (i128::from(low) + share / i128::from(high_rows - low_rows)) as u64
        };
        (part(low_layer, high_layer).max(1), part(low_head, high_head))
    };
    (1..=most.min(MOST_ROWS)).map(at).collect()
}
