//! What workers compute and how fast: the class that most share, and what the planner is told.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{Incarnation, KnownAnswer, ModelId, NumericsClass};
use proto::plan::{KvType, StagePlan, WorkerModel, WorkerRecord};

use super::super::types::Options;
use super::{Fleet, Member, Reserve};
use crate::planner::{Stage, WorkerSpec};
use crate::scheduler::{Line, StepCost};
use crate::tick::Tick;

/// Rows of the larger of the two steps that the scheduler's cost model is drawn through.
const STEP_ROWS: u32 = 16;

/// What everyone in a pipeline must agree on, beside the model.
type Kernels = (u32, KnownAnswer);

/// A worker that may be planned with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Candidate {
    pub(in super::super) spec: WorkerSpec,
    pub(in super::super) incarnation: Incarnation,
}

impl Candidate {
    /// The times of one layer in steps of so many rows, before and now, for each number of rows that was
    /// measured both times: what tells speeds apart.
    pub(in super::super) fn times_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.spec.steps.iter().filter_map(|now| {
            let mut steps = before.spec.steps.iter();
            let then = steps.find(|then| then.rows == now.rows)?;
            Some((then.layer_ns, now.layer_ns))
        })
    }
}

/// The kernels that most workers share, looked up once for all who are compared with them.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Majority(Option<Kernels>);

impl Fleet {
    /// The workers that pipelines may be made of now, if plans count on `reserve`, and their class.
    pub(in super::super) fn candidates(
        &self,
        now: Tick,
        model: ModelId,
        kv_type: KvType,
        reserve: Reserve,
    ) -> (NumericsClass, Vec<Candidate>) {
        let majority = self.majority(model, reserve);
        let (revision, answer) = majority.unwrap_or((0, KnownAnswer([0; 32])));
        let fits = |member: &&Member| {
            self.is_free(now, member, reserve) && Some(kernels(&member.record)) == majority
        };
        let candidate = |member: &Member| {
            let record = &member.record;
            let served = self.serves(record, model)?;
            let mut steps = served.steps.clone();
            steps.sort_unstable_by_key(|step| step.rows);
            let spec = WorkerSpec {
                id: record.id.clone(),
                machine: record.machine.clone(),
                rack: self.rack(member),
                memory_bytes: record.memory_bytes,
                steps,
            };
            Some(Candidate { spec, incarnation: record.incarnation })
        };
        let found = self.by_id.values().filter(fits).filter_map(candidate).collect();
        (NumericsClass::form(model, kv_type, revision, answer), found)
    }

    /// What a step costs the slowest of `stages`, by what their workers measured.
    /// The head's time is halved where `first_draws`.
    pub(in super::super) fn step_cost(
        &self,
        stages: &[StagePlan],
        model: ModelId,
        first_draws: bool,
    ) -> StepCost {
        let mut cost = StepCost::default();
        let (mut slowest, mut slowest_prompt) = (0, 0);
        for (index, stage) in stages.iter().enumerate() {
            let times = self.by_id.get(&stage.worker).and_then(|member| {
                let served = self.serves(&member.record, model)?;
                let at = |rows| Some((served.layer_ns(rows)?, served.head_ns(rows)?));
                Some((at(1)?, at(STEP_ROWS)?))
            });
            let Some(((one, head), (many, head_many))) = times else { continue };
            let layers = u64::from(stage.layers.end.saturating_sub(stage.layers.start));
            let (one, many) = (layers.saturating_mul(one), layers.saturating_mul(many));
            if many > slowest_prompt {
                slowest_prompt = many;
                cost.prompt = Line::through(one, many, STEP_ROWS);
            }
            let is_last = index + 1 == stages.len();
            let halves = match (first_draws, index == 0 || is_last) {
                (true, true) => 1,
                (false, _) if is_last => 2,
                _ => 0,
            };
            let (head, head_many) = (head / 2 * halves, head_many / 2 * halves);
            let (one, many) = (one.saturating_add(head), many.saturating_add(head_many));
            if many > slowest {
                slowest = many;
                cost.decode = Line::through(one, many, STEP_ROWS);
            }
        }
        cost
    }

    /// What a worker says of the model, if it can be planned with.
    fn serves<'a>(&self, record: &'a WorkerRecord, model: ModelId) -> Option<&'a WorkerModel> {
        let mut models = record.models.iter();
        let served = models.find(|served| served.id == model && served.layer_ns(1).is_some());
        served.filter(|_| !self.is_refused_stub(record))
    }

    fn is_refused_stub(&self, record: &WorkerRecord) -> bool {
        record.stub && !self.allows_stubs
    }

    /// The kernels that most workers with the model share; of equal numbers the newest revision.
    /// Those that leave or are believed dead have no vote: they will compute nothing more.
    fn majority(&self, model: ModelId, reserve: Reserve) -> Option<Kernels> {
        let votes = |member: &&Member| {
            member.has_lease && member.is_willing(reserve) && member.suspect.is_none()
        };
        let mut counts: BTreeMap<Kernels, usize> = BTreeMap::new();
        for member in self.by_id.values().filter(votes) {
            #[cfg(test)]
            super::super::view::looked();
            if self.serves(&member.record, model).is_some() {
                *counts.entry(kernels(&member.record)).or_default() += 1;
            }
        }
        counts
            .into_iter()
            .max_by_key(|&(kernels, count)| (count, kernels))
            .map(|(kernels, _)| kernels)
    }

    /// What [`Self::unfit`] compares workers with.
    pub(in super::super) fn standard(&self, model: ModelId) -> Majority {
        Majority(self.majority(model, Reserve::Untouched))
    }

    /// Why a worker can never be part of this model's pipelines as it is.
    pub(in super::super) fn unfit(
        &self,
        record: &WorkerRecord,
        model: ModelId,
        standard: Majority,
    ) -> Option<String> {
        if self.is_refused_stub(record) {
            let why = "it computes nothing (--stub-compute), and this coordinator was not started with \
                       --allow-stub-compute";
            return Some(why.to_owned());
        }
        if self.serves(record, model).is_none() {
            let has_it = record.models.iter().any(|served| served.id == model);
            let why = match has_it {
                true => "it has not said how fast it computes the model",
                false => "it does not have the model",
            };
            return Some(why.to_owned());
        }
        let majority = standard.0?;
        (kernels(record) != majority).then(|| {
            format!(
                "it computes with kernel revision {} and known answer {:.8}, most others with {} and {:.8}",
                record.kernel_revision,
                record.known_answer.to_string(),
                majority.0,
                majority.1.to_string()
            )
        })
    }

    /// The planner's message, and who was left out and why.
    pub(in super::super) fn explain(&self, now: Tick, options: &Options, reason: &str) -> String {
        let mut left_out = BTreeSet::new();
        let standard = self.standard(options.model);
        for member in self.by_id.values() {
            let id = &member.record.id;
            let why = if member.is_draining() {
                Some("it is draining".to_owned())
            } else if let Some(why) = &member.suspect {
                Some(why.clone())
            } else if !member.has_lease {
                Some("its lease is gone".to_owned())
            } else if let Some(why) = self.kept_out(now, id) {
                Some(why.to_owned())
            } else {
                self.unfit(&member.record, options.model, standard)
            };
            left_out.extend(why.map(|why| format!("{id}: {why}")));
        }
        let mut reason = reason.to_owned();
        if !left_out.is_empty() {
            reason.push_str("; left out: ");
            reason.push_str(&left_out.into_iter().collect::<Vec<_>>().join("; "));
        }
        reason
    }

    /// A planned stage with the worker's address; `None` if it is not known any more.
    pub(in super::super) fn place(&self, stage: &Stage) -> Option<StagePlan> {
        let record = &self.by_id.get(&stage.worker)?.record;
        Some(StagePlan {
            worker: stage.worker.clone(),
            incarnation: record.incarnation,
            address: record.address.clone(),
            layers: stage.layers.clone(),
        })
    }
}

fn kernels(record: &WorkerRecord) -> Kernels {
    (record.kernel_revision, record.known_answer)
}
