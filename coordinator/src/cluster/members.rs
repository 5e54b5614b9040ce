//! The workers that are known: their records, what probes say, and who is kept out for a while.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proto::ids::{Incarnation, KnownAnswer, ModelId, NumericsClass};
use proto::plan::{KvType, StagePlan, WorkerModel, WorkerRecord};

use super::types::{Action, Options};
use super::{PROBE_PATIENCE, backoff};
use crate::planner::single::{STEP_ROWS, Stage, WorkerSpec};
use crate::scheduler::{Line, StepCost};
use crate::tick::Tick;

/// A worker evicted so often ...
const FLAPS: usize = 3;
/// ... within this time is kept out ...
const FLAP_WINDOW: Duration = Duration::from_secs(600);
/// ... for this long, doubled each time it happens again ...
const QUARANTINE_FIRST: Duration = Duration::from_secs(60);
/// ... up to this.
const QUARANTINE_LIMIT: Duration = Duration::from_secs(3600);
/// A worker that could not take its stage is kept out for this long, doubled each time.
const REFUSAL_FIRST: Duration = Duration::from_secs(5);

/// Leases that end within one TTL count as ended at once.
const VANISH_WINDOW: Duration = Duration::from_secs(5);
/// Evictions for lost leases stay frozen so long, unless the workers come back before.
const FREEZE: Duration = Duration::from_secs(60);

/// Between two probes of a stage that is watched.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
pub(super) struct Members {
    by_id: BTreeMap<String, Member>,
    /// Outlives the records: a worker that flaps has a new one every time.
    standing: BTreeMap<String, Standing>,
    /// Whose leases ended unexpectedly within [`VANISH_WINDOW`], or since the freeze, and when.
    vanished: BTreeMap<String, Tick>,
    frozen_until: Option<Tick>,
    last_arrival: Tick,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) record: WorkerRecord,
    /// Its key is there. A stage is remembered without: a lease is a hint.
    pub(super) has_lease: bool,
    /// Why this process start is not planned until it answers a probe.
    pub(super) suspect: Option<String>,
    asked_at: Option<Tick>,
    next_probe: Tick,
    failed_probes: u32,
}

/// What a worker's past means for plans.
#[derive(Debug, Default)]
struct Standing {
    evictions: VecDeque<Tick>,
    /// Quarantines and refusals so far.
    times_kept_out: u32,
    kept_out_until: Tick,
    /// For a refusal: another process start is free of it.
    by_refusal: bool,
    why: String,
}

/// What everyone in a pipeline must agree on, beside the model.
type Kernels = (u32, KnownAnswer);

impl Members {
    pub(super) fn put(&mut self, now: Tick, record: WorkerRecord) {
        self.vanished.remove(&record.id);
        match self.by_id.get_mut(&record.id) {
            Some(member) if member.record.incarnation == record.incarnation => {
                member.record = record;
                member.has_lease = true;
            }
            _ => {
                self.last_arrival = now;
                // What one process refused another may take.
                if let Some(standing) = self.standing.get_mut(&record.id) {
                    standing.forgive_refusal();
                }
                let member = Member {
                    has_lease: true,
                    suspect: None,
                    asked_at: None,
                    next_probe: now,
                    failed_probes: 0,
                    record,
                };
                self.by_id.insert(member.record.id.clone(), member);
            }
        }
        let here = self.by_id.values().filter(|member| member.has_lease).count();
        if self.vanished.len() <= here {
            self.frozen_until = None;
        }
    }

    /// A lease ended. The text of an alarm if that froze evictions.
    pub(super) fn gone(&mut self, now: Tick, id: &str, is_stage: bool) -> Option<String> {
        let member = self.by_id.get_mut(id).filter(|member| member.has_lease)?;
        member.has_lease = false;
        // Who announced that it leaves, or was found dead by its data path, says nothing about
        // the health of the registry, which is what the freeze is for.
        let expected = member.record.draining || member.suspect.is_some();
        if is_stage {
            member.next_probe = now;
        } else {
            self.by_id.remove(id);
        }
        if expected {
            return None;
        }
        if self.frozen_until.is_none() {
            self.vanished.retain(|_, &mut at| now.since(at) <= VANISH_WINDOW);
        }
        self.vanished.insert(id.to_owned(), now);
        let here = self.by_id.values().filter(|member| member.has_lease).count();
        let vanished = self.vanished.len();
        let many = vanished >= 2 && vanished > here;
        if !many || self.frozen_until.is_some() {
            return None;
        }
        self.frozen_until = Some(now + FREEZE);
        Some(format!(
            "{vanished} of {} workers lost their leases at once: nobody is evicted for that until \
             they are back",
            vanished + here
        ))
    }

    pub(super) fn thaw(&mut self, now: Tick) {
        self.frozen_until = self.frozen_until.filter(|&until| now < until);
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen_until.is_some()
    }

    /// Ids with a lease that are not in `here`.
    pub(super) fn listed_except(&self, here: &[String]) -> Vec<String> {
        let listed =
            self.by_id.iter().filter(|(id, member)| member.has_lease && !here.contains(id));
        listed.map(|(id, _)| id.clone()).collect()
    }

    /// Drops those whose key is gone: no pipeline needs them any more.
    pub(super) fn forget_gone(&mut self) {
        self.by_id.retain(|_, member| member.has_lease);
    }

    pub(super) fn last_arrival(&self) -> Tick {
        self.last_arrival
    }

    pub(super) fn lease_is_gone(&self, id: &str) -> bool {
        self.by_id.get(id).is_none_or(|member| !member.has_lease)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.by_id.values()
    }

    // ---- probes

    pub(super) fn probe_at_once(&mut self, now: Tick, id: &str) {
        if let Some(member) = self.by_id.get_mut(id) {
            member.next_probe = now;
        }
    }

    /// Notes an answer; whether it is that of the process start that is known.
    pub(super) fn probe_ok(&mut self, id: &str, incarnation: Incarnation) -> bool {
        let Some(member) = self.by_id.get_mut(id) else { return true };
        member.asked_at = None;
        if member.record.incarnation != incarnation {
            return false;
        }
        member.failed_probes = 0;
        member.suspect = None;
        true
    }

    /// Notes a failure; whether it is about the process start that is known.
    pub(super) fn probe_failed(&mut self, now: Tick, id: &str, incarnation: Incarnation) -> bool {
        let Some(member) = self.by_id.get_mut(id) else { return false };
        if member.record.incarnation != incarnation {
            return false;
        }
        member.asked_at = None;
        member.failed_probes += 1;
        member.next_probe = now + backoff(member.failed_probes);
        true
    }

    /// Probes that are due: of suspects, and of the stages that are `watched`.
    pub(super) fn probes(&mut self, now: Tick, watched: &[String]) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, member) in &mut self.by_id {
            // An answer that never came must not end all asking.
            let asked = member.asked_at.is_some_and(|at| now.since(at) < 2 * PROBE_PATIENCE);
            let wanted = member.suspect.is_some() || watched.contains(id);
            if !wanted || asked || now < member.next_probe {
                continue;
            }
            member.asked_at = Some(now);
            member.next_probe = now + PROBE_INTERVAL;
            actions.push(Action::Probe {
                worker: id.clone(),
                incarnation: member.record.incarnation,
                address: member.record.address.clone(),
            });
        }
        actions
    }

    /// Whether the stage's process start did not answer the last probe.
    pub(super) fn is_silent(&self, stage: &StagePlan) -> bool {
        self.by_id.get(&stage.worker).is_some_and(|member| {
            member.record.incarnation == stage.incarnation && member.failed_probes > 0
        })
    }

    // ---- standing

    /// Its stage was given up. The text of an alarm if it happens too often.
    pub(super) fn evicted(&mut self, now: Tick, stage: &StagePlan, why: &str) -> Option<String> {
        if let Some(member) = self.by_id.get_mut(&stage.worker)
            && member.record.incarnation == stage.incarnation
        {
            member.suspect = Some(why.to_owned());
            member.next_probe = now + PROBE_INTERVAL;
        }
        let standing = self.standing.entry(stage.worker.clone()).or_default();
        standing.evictions.push_back(now);
        standing.evictions.retain(|&at| now.since(at) <= FLAP_WINDOW);
        if standing.evictions.len() < FLAPS {
            return None;
        }
        standing.evictions.clear();
        let span = standing.keep_out(
            now,
            QUARANTINE_FIRST,
            format!("was lost {FLAPS} times, last: {why}"),
        );
        Some(format!(
            "worker {} was lost {FLAPS} times within {} s and is kept out for {} s",
            stage.worker,
            FLAP_WINDOW.as_secs(),
            span.as_secs()
        ))
    }

    /// It could not take its stage.
    pub(super) fn refused(&mut self, now: Tick, id: &str, why: &str) {
        let standing = self.standing.entry(id.to_owned()).or_default();
        standing.by_refusal = now >= standing.kept_out_until || standing.by_refusal;
        standing.keep_out(now, REFUSAL_FIRST, format!("could not take its stage: {why}"));
    }

    /// Why a worker is kept out of plans for now.
    pub(super) fn kept_out(&self, now: Tick, id: &str) -> Option<&str> {
        let standing = self.standing.get(id)?;
        (now < standing.kept_out_until).then_some(standing.why.as_str())
    }

    /// Whether somebody is kept out because it could not take its stage.
    pub(super) fn somebody_refused(&self, now: Tick) -> bool {
        let here = self.by_id.keys().filter_map(|id| self.standing.get(id));
        here.into_iter().any(|standing| standing.by_refusal && now < standing.kept_out_until)
    }

    // ---- what plans are made of

    /// Whether the stage's process start may be given something to do.
    pub(super) fn is_usable(&self, now: Tick, stage: &StagePlan) -> bool {
        self.by_id.get(&stage.worker).is_some_and(|member| {
            member.record.incarnation == stage.incarnation && self.is_free(now, member)
        })
    }

    fn is_free(&self, now: Tick, member: &Member) -> bool {
        member.has_lease
            && !member.record.draining
            && member.suspect.is_none()
            && self.kept_out(now, &member.record.id).is_none()
    }

    /// Whether the stage's process start is believed dead.
    pub(super) fn is_lost(&self, stage: &StagePlan) -> bool {
        self.by_id.get(&stage.worker).is_none_or(|member| {
            member.record.incarnation != stage.incarnation || member.suspect.is_some()
        })
    }

    /// The workers that one pipeline may be made of now, and its class.
    pub(super) fn eligible(
        &self,
        now: Tick,
        model: ModelId,
        kv_type: KvType,
    ) -> (NumericsClass, Vec<WorkerSpec>) {
        let majority = self.majority(model);
        let (revision, answer) = majority.unwrap_or((0, KnownAnswer([0; 32])));
        let fits = |member: &&Member| {
            self.is_free(now, member) && Some(kernels(&member.record)) == majority
        };
        let spec = |member: &Member| {
            let served = serves(&member.record, model)?;
            Some(WorkerSpec {
                id: member.record.id.clone(),
                memory_bytes: member.record.memory_bytes,
                layer_ns: served.layer_ns(STEP_ROWS)?,
                head_ns: served.head_ns(STEP_ROWS)?,
            })
        };
        let specs = self.by_id.values().filter(fits).filter_map(spec).collect();
        (NumericsClass::form(model, kv_type, revision, answer), specs)
    }

    /// What a step costs the slowest of `stages`, by what their workers measured.
    /// The head's time is halved where `first_draws`.
    pub(super) fn step_cost(
        &self,
        stages: &[StagePlan],
        model: ModelId,
        first_draws: bool,
    ) -> StepCost {
        let mut cost = StepCost::default();
        let (mut slowest, mut slowest_prompt) = (0, 0);
        for (index, stage) in stages.iter().enumerate() {
            let member = self.by_id.get(&stage.worker);
            let Some(times) = member.and_then(|member| {
                let served = serves(&member.record, model)?;
                let at = |rows| Some((served.layer_ns(rows)?, served.head_ns(rows)?));
                Some((at(1)?, at(STEP_ROWS)?))
            }) else {
                continue;
            };
            let layers = u64::from(stage.layers.end.saturating_sub(stage.layers.start));
            let ((one, head), (many, head_many)) = times;
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

    /// The kernels that most workers with the model share; of equal numbers the newest revision.
    fn majority(&self, model: ModelId) -> Option<Kernels> {
        let mut votes: BTreeMap<Kernels, usize> = BTreeMap::new();
        for member in self.by_id.values().filter(|member| member.has_lease) {
            if serves(&member.record, model).is_some() {
                *votes.entry(kernels(&member.record)).or_default() += 1;
            }
        }
        votes
            .into_iter()
            .max_by_key(|&(kernels, count)| (count, kernels))
            .map(|(kernels, _)| kernels)
    }

    /// Why a worker can never be part of this model's pipeline as it is.
    pub(super) fn unfit(&self, record: &WorkerRecord, model: ModelId) -> Option<String> {
        if serves(record, model).is_none() {
            let has_it = record.models.iter().any(|served| served.id == model);
            let why = match has_it {
                true => "it has not said how fast it computes the model",
                false => "it does not have the model",
            };
            return Some(why.to_owned());
        }
        let majority = self.majority(model)?;
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

    /// The planner's words, and who was left out and why.
    pub(super) fn explain(&self, now: Tick, options: &Options, mut reason: String) -> String {
        let mut left_out = BTreeSet::new();
        for member in self.by_id.values() {
            let id = &member.record.id;
            let why = if member.record.draining {
                Some("it is draining".to_owned())
            } else if let Some(why) = &member.suspect {
                Some(why.clone())
            } else if let Some(why) = self.kept_out(now, id) {
                Some(why.to_owned())
            } else {
                self.unfit(&member.record, options.model)
            };
            left_out.extend(why.map(|why| format!("{id}: {why}")));
        }
        if !left_out.is_empty() {
            reason.push_str("; left out: ");
            reason.push_str(&left_out.into_iter().collect::<Vec<_>>().join("; "));
        }
        reason
    }

    /// A planned stage with the worker's address.
    pub(super) fn place(&self, stage: Stage) -> StagePlan {
        let record = &self.by_id[&stage.worker].record;
        StagePlan {
            worker: stage.worker,
            incarnation: record.incarnation,
            address: record.address.clone(),
            layers: stage.layers,
        }
    }
}

impl Standing {
    /// Keeps the worker out for `first`, doubled for every time before. How long that is.
    fn keep_out(&mut self, now: Tick, first: Duration, why: String) -> Duration {
        if now.since(self.kept_out_until) > QUARANTINE_LIMIT {
            self.times_kept_out = 0;
        }
        let span = (first * 2u32.saturating_pow(self.times_kept_out.min(16))).min(QUARANTINE_LIMIT);
        self.times_kept_out += 1;
        self.kept_out_until = self.kept_out_until.max(now + span);
        self.why = why;
        span
    }

    fn forgive_refusal(&mut self) {
        if self.by_refusal {
            self.kept_out_until = Tick::ZERO;
        }
    }
}

fn kernels(record: &WorkerRecord) -> Kernels {
    (record.kernel_revision, record.known_answer)
}

fn serves(record: &WorkerRecord, model: ModelId) -> Option<&WorkerModel> {
    record.models.iter().find(|served| served.id == model && served.layer_ns(1).is_some())
}
