//! When a plan is made, what the planner is asked, and what becomes of its answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{Epoch, NumericsClass, PipelineId, PipelineRef};
use proto::operator::Planned;
use proto::plan::{PLAN_FORMAT, PipelinePlan, Plan, StagePlan};
use proto::status::{WaitCause, Waiting};

use super::fleet::{Candidate, Reserve};
use super::pipelines::Pipeline;
use super::types::{Action, Options, Ticket};
use super::{BACKOFF_FIRST, Cluster, Loss, STABLE, backoff, waits};
use crate::planner::{self, Deployment, Incumbent, PlanError, Prediction, Problem, Stage};
use crate::tick::Tick;

/// A planner that does not answer for so long is asked again: its thread is gone.
const DEPLOY_TIMEOUT: Duration = Duration::from_secs(60);

/// A speed counts as another one when it changed by so many per cent for
/// [`drift_time`](super::Options::drift_time) ...
const DRIFT_PERCENT: u64 = 25;
/// ... or so many times, as that of a machine with a tenth of its cores ...
const LARGE_DRIFT: u64 = 4;
/// ... for such a part of it: whoever waits for that machine waits for all that time.
const LARGE_DRIFT_PART: u32 = 4;

/// A fleet that never comes to rest is planned for after so many times the hold-down.
const HOLD_DOWN_LIMIT: u32 = 6;

/// The longest wait before something is planned anew that broke again and again while its workers
/// answer. Nobody knows what mends it, and every plan costs those who run there a replay.
const BROKEN_LIMIT: Duration = Duration::from_secs(60);

/// How long pipelines must serve well, at most, until what broke before is forgotten.
const STABLE_LIMIT: Duration = Duration::from_secs(640);

/// A worker that ends, and without which no plan is possible, serves on for so long: somebody who takes
/// its place may be on the way, and most answers end meanwhile. Less than service managers wait until
/// they kill it.
const GIVE_WAY_AFTER: Duration = Duration::from_secs(10);

/// Who ended so is waited for that long: a restart, and the reading of a large model.
pub(super) const EXPECTED_BACK: Duration = Duration::from_secs(60);

/// Said of a plan for which those were not enough that nothing is said against.
const IN_NEED: &str = "no plan is possible without workers that are kept out, or that are to go once they \
                       can be spared";

/// Why a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Nothing serves and nothing is on its way to.
    NothingServes,
    /// A pipeline was lost.
    Lost,
    /// A worker of a pipeline is draining.
    Draining,
    /// A person asked.
    Requested,
    /// The fleet is another than the plan was made for.
    Changed,
}

impl Cause {
    /// Whether it stays until a plan has worked.
    pub(super) fn is_loss(self) -> bool {
        matches!(self, Self::NothingServes | Self::Lost)
    }
}

/// A person wants a plan now.
#[derive(Clone, Copy, Debug)]
struct Request {
    /// However little it gains.
    any_gain: bool,
}

#[derive(Debug, Default)]
pub(super) struct Planning {
    asked: Option<Asked>,
    /// What is being written or carried out was made for this.
    pub(super) cause: Option<Cause>,
    /// Plans that came to nothing in a row, and when the next may be made.
    failures: u32,
    /// Pipelines that broke while their workers answer, since all was well for long enough.
    breaks: u32,
    /// What is lost is not planned anew before this because of them.
    broken_until: Tick,
    not_before: Tick,
    /// A pipeline was lost and no plan without it was made yet.
    pub(super) lost: bool,
    requested: Option<Request>,
    /// What came of the last question to the planner.
    outcome: Planned,
    /// What is being written changes nothing but the orders beside the plan.
    pub(super) writes_orders: bool,
    /// How often in a row that was not written, and when it is tried again.
    orders_failures: u32,
    orders_not_before: Tick,
    /// The registry has no plan, and something serves.
    pub(super) is_missing: bool,
    /// The fleet that the last decision was made for.
    decided: Option<Basis>,
    /// That was while a switch had workers of its own: when it ends there is more to decide.
    decided_in_part: bool,
    /// Since when a change of the fleet waits for the hold-down, and one of a speed for its time.
    change_since: Option<Tick>,
    drift_since: Option<Tick>,
    /// Why no plan was possible, by the last decision.
    infeasible: Option<Waiting>,
    /// Of those that nothing is said against, no plan was possible: as long as it is these, others are
    /// counted on too.
    short: Option<Basis>,
    /// Since when somebody ends without whom none is.
    cannot_spare_since: Option<Tick>,
    /// Until when one who ended so is expected back.
    expected_back: Option<Tick>,
    /// Why the plan is as it is.
    pub(super) reason: String,
    /// Why who is in no pipeline, by the last plan.
    pub(super) left_out: BTreeMap<String, String>,
    /// What each worker was predicted to do, by the last plan that it was in.
    predicted: BTreeMap<String, Prediction>,
}

#[derive(Debug)]
struct Asked {
    ticket: Ticket,
    since: Tick,
    cause: Cause,
    basis: Basis,
    reserve: Reserve,
    incumbents: Vec<PipelineId>,
    /// Pipelines that the answer does not touch.
    fixed: BTreeSet<PipelineRef>,
}

/// What a plan is made of.
#[derive(Clone, Debug)]
struct Basis {
    class: NumericsClass,
    candidates: Vec<Candidate>,
}

/// How much a speed changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Drift {
    /// By [`DRIFT_PERCENT`].
    Small,
    /// By [`LARGE_DRIFT`] times.
    Large,
}

impl Basis {
    /// The same workers with the same memory in the same places, whatever their speeds.
    fn is_same_fleet(&self, other: &Self) -> bool {
        let same = |a: &Candidate, b: &Candidate| {
            a.spec.id == b.spec.id
                && a.incarnation == b.incarnation
                && a.spec.memory_bytes == b.spec.memory_bytes
                && a.spec.machine == b.spec.machine
        };
        self.class == other.class
            && self.candidates.len() == other.candidates.len()
            && self.candidates.iter().zip(&other.candidates).all(|(a, b)| same(a, b))
            && self.has_equal_racks(other)
    }

    /// Of the same workers: whether the same stand together, whatever their racks are called. An inferred
    /// one has its name from one of its workers, who may go.
    fn has_equal_racks(&self, other: &Self) -> bool {
        let (mut names, mut names_before) = (BTreeMap::new(), BTreeMap::new());
        self.candidates.iter().zip(&other.candidates).all(|(before, now)| {
            let (before, now) = (before.spec.rack.as_str(), now.spec.rack.as_str());
            *names.entry(before).or_insert(now) == now
                && *names_before.entry(now).or_insert(before) == before
        })
    }

    /// Of the same fleet: by how much the speed that changed most did, if it counts.
    fn drift(&self, now: &Self) -> Option<Drift> {
        let drifts = self.candidates.iter().zip(&now.candidates).filter_map(|(before, now)| {
            now.times_since(before)
                .filter_map(|(before_ns, now_ns)| between(before_ns, now_ns))
                .max()
        });
        drifts.max()
    }
}

/// How much a time changed, if it counts.
fn between(before_ns: u64, now_ns: u64) -> Option<Drift> {
    let (slow, fast) = (before_ns.max(now_ns), before_ns.min(now_ns));
    let (slow, fast) = (u128::from(slow) * 100, u128::from(fast));
    // Times of nothing are equal, however large a multiple one is of the other.
    if slow > 0 && slow >= fast * u128::from(100 * LARGE_DRIFT) {
        return Some(Drift::Large);
    }
    (slow > fast * u128::from(100 + DRIFT_PERCENT)).then_some(Drift::Small)
}

impl Planning {
    /// Whom plans may count on that are on their way.
    pub(super) fn reserve(&self) -> Reserve {
        if self.short.is_some() { Reserve::All } else { Reserve::Untouched }
    }

    fn decide(&mut self, basis: Basis, in_part: bool) {
        self.decided = Some(basis);
        self.decided_in_part = in_part;
    }

    /// A switch has ended: what was decided without its workers is decided again.
    pub(super) fn reconsider(&mut self) {
        if std::mem::take(&mut self.decided_in_part) {
            self.decided = None;
        }
    }

    /// A plan came to nothing.
    pub(super) fn failed(&mut self, now: Tick) {
        self.not_before = now + backoff(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.decided = None;
    }

    /// Orders were to be written beside the plan, and were or were not.
    pub(super) fn wrote_orders(&mut self, now: Tick, is_written: bool) {
        self.writes_orders = false;
        self.orders_not_before = match is_written {
            true => Tick::ZERO,
            false => now + backoff(self.orders_failures),
        };
        self.orders_failures = if is_written { 0 } else { self.orders_failures.saturating_add(1) };
    }

    /// A pipeline was lost. One that was young, or that broke while its workers answer, counts as a
    /// plan that came to nothing, so that plans which do not last are made more and more seldom.
    pub(super) fn pipeline_lost(&mut self, now: Tick, loss: Loss, is_young: bool) {
        match (loss, is_young) {
            (Loss::Gone, true) => self.failed(now),
            (Loss::Gone, false) => self.not_before = now,
            (Loss::Broken, _) => {
                // The first time at once: it may have been chance.
                let wait = match self.breaks {
                    0 => Duration::ZERO,
                    before => BACKOFF_FIRST * 2u32.saturating_pow(before.min(16)),
                };
                self.broken_until = now + wait.min(BROKEN_LIMIT);
                self.breaks = self.breaks.saturating_add(1);
            }
        }
        self.decided = None;
    }

    /// A worker came: what was not possible may be, and what broke may work.
    pub(super) fn worker_came(&mut self) {
        self.infeasible = None;
        self.cannot_spare_since = None;
        self.broken_until = Tick::ZERO;
    }

    /// Everything that serves is well, and has served for so long.
    pub(super) fn serves_well(&mut self, span: Duration) {
        if span >= STABLE {
            self.failures = 0;
        }
        // Twice as long for every break, so that what breaks now and then is not planned anew each
        // time at once.
        if span >= (STABLE * 2u32.saturating_pow(self.breaks.min(16))).min(STABLE_LIMIT) {
            self.breaks = 0;
        }
    }

    /// The answer to the open question is not wanted any more.
    pub(super) fn forget_question(&mut self) {
        self.asked = None;
    }

    /// A person wants a plan now; who is content with any gain is not less so if asked twice.
    pub(super) fn request(&mut self, any_gain: bool) {
        let before = self.requested.is_some_and(|request| request.any_gain);
        self.requested = Some(Request { any_gain: any_gain || before });
    }

    /// Who leads next decides anew, if only to find that nothing needs to change: what was decided in
    /// this reign may never have been written.
    pub(super) fn end_reign(&mut self) {
        (self.asked, self.requested, self.decided) = (None, None, None);
        self.writes_orders = false;
    }

    /// Whether a plan is wanted or being made.
    pub(super) fn is_open(&self) -> bool {
        self.lost || self.requested.is_some() || self.asked.is_some()
    }

    pub(super) fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// A plan is written, or none is wanted: what asked for it is done with.
    pub(super) fn carried_out(&mut self) {
        (self.lost, self.requested, self.is_missing) = (false, None, false);
        self.infeasible = None;
    }

    /// A plan is written that changes nothing: why nothing was to be changed still holds.
    pub(super) fn written_as_it_is(&mut self) {
        (self.lost, self.requested, self.is_missing) = (false, None, false);
    }
}

impl Cluster {
    /// Asks the planner if there is a cause to.
    pub(super) fn plan(&mut self, now: Tick, actions: &mut Vec<Action>) {
        if self.planning.asked.as_ref().is_some_and(|asked| now.since(asked.since) > DEPLOY_TIMEOUT)
        {
            self.planning.asked = None;
            self.planning.failed(now);
        }
        if self.planning.asked.is_some()
            || self.ledger.ready().is_none()
            || !self.listed
            || !self.terms_agree()
        {
            return;
        }
        let (basis, reserve) = self.basis(now);
        let Some(cause) = self.cause(now, &basis) else { return };
        // Who leaves, or asks, has nothing to do with what breaks.
        let waits_for_breaks = !matches!(cause, Cause::Requested | Cause::Draining);
        if now < self.planning.not_before || waits_for_breaks && now < self.planning.broken_until {
            return;
        }
        self.ask_planner(now, cause, (basis, reserve), actions);
    }

    /// What a plan is made of now. Those who are kept out, or to go, are counted on only where no plan is
    /// possible without.
    fn basis(&mut self, now: Tick) -> (Basis, Reserve) {
        let untouched = self.basis_with(now, Reserve::Untouched);
        match &self.planning.short {
            Some(short) if short.is_same_fleet(&untouched) => {
                let reserve = self.reserve();
                (self.basis_with(now, reserve), reserve)
            }
            _ => {
                self.planning.short = None;
                (untouched, Reserve::Untouched)
            }
        }
    }

    fn basis_with(&self, now: Tick, reserve: Reserve) -> Basis {
        let Options { model, kv_type, .. } = self.options;
        let (class, candidates) = self.fleet.candidates(now, model, kv_type, reserve);
        Basis { class, candidates }
    }

    /// Whom may be counted on where no plan is possible else. Who is to go once it can be spared cannot
    /// be while nothing serves; while something does it is that which goes on.
    fn reserve(&self) -> Reserve {
        if self.pipelines.is_empty() { Reserve::All } else { Reserve::Flapping }
    }

    fn cause(&mut self, now: Tick, basis: &Basis) -> Option<Cause> {
        let is_quiet = self.switches.is_empty();
        let planning = &self.planning;
        if let Some(request) = planning.requested
            && is_quiet
        {
            return Some(if request.any_gain { Cause::Requested } else { Cause::Changed });
        }
        let is_same = planning.decided.as_ref().is_some_and(|decided| decided.is_same_fleet(basis));
        if is_quiet && self.pipelines.is_empty() {
            let is_due = !is_same && self.has_settled(now, basis);
            return is_due.then_some(Cause::NothingServes);
        }
        let is_lost = planning.lost && !is_same;
        if is_lost && now >= planning.broken_until {
            return Some(Cause::Lost);
        }
        let changes = |id| self.switches.iter().any(|switch| switch.old.contains(id));
        let mut staying = self.pipelines.iter().filter(|(id, _)| !changes(id));
        if !is_same && staying.any(|(_, pipeline)| self.is_leaving(pipeline)) {
            return Some(Cause::Draining);
        }
        if is_lost {
            return Some(Cause::Lost);
        }
        if !is_quiet {
            return None;
        }
        self.has_changed(now, basis, is_same).then_some(Cause::Changed)
    }

    /// While nothing serves workers that come together are planned together.
    fn has_settled(&self, now: Tick, basis: &Basis) -> bool {
        let known = |id: &String| basis.candidates.iter().any(|member| member.spec.id == *id);
        let mut planned = self
            .ledger
            .plan()
            .into_iter()
            .flat_map(|plan| &plan.pipelines)
            .flat_map(|pipeline| &pipeline.stages)
            .map(|stage| &stage.worker)
            .peekable();
        self.options.stages.is_some()
            || now >= self.fleet.last_arrival() + self.options.settle
            || (planned.peek().is_some() && planned.all(known))
    }

    /// Whether the fleet is another than what was decided for, and has been at rest.
    fn has_changed(&mut self, now: Tick, basis: &Basis, is_same: bool) -> bool {
        let planning = &mut self.planning;
        let decided = planning.decided.as_ref().filter(|_| is_same);
        let has_drifted = match decided.and_then(|decided| decided.drift(basis)) {
            None => {
                planning.drift_since = None;
                false
            }
            Some(drift) => {
                let since = *planning.drift_since.get_or_insert(now);
                now.since(since)
                    >= match drift {
                        Drift::Small => self.options.drift_time,
                        Drift::Large => self.options.drift_time / LARGE_DRIFT_PART,
                    }
            }
        };
        if is_same && !has_drifted && !planning.is_missing {
            planning.change_since = None;
            return false;
        }
        let since = *planning.change_since.get_or_insert(now);
        let hold_down = self.options.hold_down;
        now.since(self.fleet.last_change()) >= hold_down
            || now.since(since) >= hold_down * HOLD_DOWN_LIMIT
    }

    /// Whether a worker of it is draining.
    pub(super) fn is_leaving(&self, pipeline: &Pipeline) -> bool {
        let mut stages = pipeline.placed.plan.stages.iter();
        stages.any(|stage| self.fleet.is_draining(&stage.worker))
    }

    fn ask_planner(
        &mut self,
        now: Tick,
        cause: Cause,
        (basis, reserve): (Basis, Reserve),
        actions: &mut Vec<Action>,
    ) {
        let may = |id: &str| basis.candidates.iter().any(|member| member.spec.id == id);
        // What serves with a worker that nothing new is given to now stays as it is.
        let stays = |pipeline: &&Pipeline| {
            let mut stages = pipeline.placed.plan.stages.iter();
            !self.is_leaving(pipeline) && !stages.all(|stage| may(&stage.worker))
        };
        let changing: BTreeSet<_> =
            self.switches.iter().flat_map(|switch| switch.old.iter().copied()).collect();
        let (fixed, open): (Vec<_>, Vec<_>) = self
            .pipelines
            .values()
            .filter(|pipeline| !changing.contains(&pipeline.placed.plan.id))
            .partition(|pipeline| stays(pipeline));
        let mut taken: BTreeSet<&str> =
            fixed.iter().flat_map(|p| workers_of(&p.placed.plan)).collect();
        let mut fixed: BTreeSet<PipelineRef> = fixed.iter().map(|pipeline| pipeline.at()).collect();
        // So does what is changing already.
        for switch in &self.switches {
            let old = switch.old.iter().filter_map(|id| self.pipelines.get(id));
            taken.extend(old.flat_map(|pipeline| workers_of(&pipeline.placed.plan)));
            taken.extend(switch.new.iter().flat_map(|new| workers_of(&new.placed.plan)));
            fixed.extend(switch.new.iter().map(|new| new.placed.at()));
        }
        let mut incumbents: Vec<&PipelinePlan> =
            open.iter().map(|pipeline| &pipeline.placed.plan).collect();
        if cause.is_loss() {
            // What was lost may come back on the workers that it was on.
            let planned = self.ledger.plan().into_iter().flat_map(|plan| &plan.pipelines);
            incumbents.extend(planned.filter(|planned| {
                planned.model == self.options.model
                    && !self.pipelines.contains_key(&planned.id)
                    && !fixed.iter().any(|at| at.id == planned.id)
                    && workers_of(planned).all(|worker| !taken.contains(worker))
            }));
        }
        let pipelines = self.options.pipelines.map(|count| count.max(1));
        let still_wanted = pipelines.map(|count| count.saturating_sub(fixed.len() as u32));
        if still_wanted == Some(0) {
            self.planning.decide(basis, !self.switches.is_empty());
            let reason = "as many pipelines serve or come as were asked for".to_owned();
            self.planning.outcome = Planned { possible: true, reason, ..Planned::default() };
            return self.leave_as_it_is(now, cause, actions);
        }
        let incumbent = incumbents.iter().map(|plan| incumbent(plan)).collect();
        let options = self.planner_options(still_wanted, incumbent);
        let workers = basis.candidates.iter().filter(|member| !taken.contains(&*member.spec.id));
        let problem = Problem {
            model: self.options.costs,
            workers: workers.map(|member| member.spec.clone()).collect(),
            options,
        };
        let incumbents = incumbents.iter().map(|plan| plan.id).collect();
        let ticket = self.ledger.ticket();
        actions.push(Action::Deploy { ticket, problem: Box::new(problem) });
        self.planning.asked =
            Some(Asked { ticket, since: now, cause, basis, reserve, incumbents, fixed });
    }

    /// The planner answered.
    pub(super) fn deployed(
        &mut self,
        now: Tick,
        ticket: Ticket,
        result: Result<Deployment, PlanError>,
        actions: &mut Vec<Action>,
    ) {
        let Some(asked) = self.planning.asked.take_if(|asked| asked.ticket == ticket) else {
            return;
        };
        self.planning.change_since = None;
        self.planning.drift_since = None;
        let mut deployment = match result {
            Ok(deployment) => deployment,
            Err(error) => return self.cannot_plan(now, asked, &error, actions),
        };
        if asked.reserve != Reserve::Untouched {
            deployment.reason = format!("{}; {IN_NEED}", deployment.reason);
        }
        let Some(composed) = self.compose(now, &asked, &deployment) else {
            // The world moved on while the planner worked.
            return self.planning.failed(now);
        };
        let keeps = |pipeline: &Pipeline| composed.iter().any(|plan| plan.at() == pipeline.at());
        let is_new = composed.iter().any(|plan| plan.epoch == Epoch(0));
        let changes = is_new || !self.pipelines.values().all(keeps);
        // Measured by what is disturbed for it: of many pipelines one more is little, and costs none of
        // them anything.
        let served = self
            .pipelines
            .values()
            .filter(|pipeline| asked.incumbents.contains(&pipeline.placed.plan.id));
        let rate = |pipeline: &Pipeline| pipeline.placed.plan.predicted_tokens_per_s;
        let moved: f64 = served.clone().filter(|pipeline| !keeps(pipeline)).map(rate).sum();
        let all: f64 = served.map(rate).sum();
        let moved = if all > 0.0 { moved / all } else { 1.0 };
        let least = f64::from(self.options.min_gain_percent) / 100.0 * moved;
        let gains = deployment.tokens_per_s > deployment.incumbent_tokens_per_s * (1.0 + least);
        let is_wanted = changes && (asked.cause != Cause::Changed || gains);
        self.planning.outcome = Planned {
            changes: is_wanted,
            possible: true,
            reason: match changes && !is_wanted {
                true => format!(
                    "the best plan is predicted to gain less than {} % of what changes for it: {}",
                    self.options.min_gain_percent, deployment.reason
                ),
                false => deployment.reason.clone(),
            },
            tokens_per_s: deployment.tokens_per_s,
            before_tokens_per_s: deployment.incumbent_tokens_per_s,
            layers_moved: if is_wanted { deployment.layers_moved } else { 0 },
        };
        self.planning.left_out = deployment
            .left_out
            .iter()
            .map(|left_out| (left_out.worker.clone(), left_out.reason.clone()))
            .collect();
        let predicted = match is_wanted {
            true => deployment.workers,
            false => deployment.incumbent_workers,
        };
        self.keep_predictions(predicted);
        self.planning.decide(asked.basis, !self.switches.is_empty());
        if !changes {
            // What serves is what would be planned now.
            self.planning.reason.clone_from(&deployment.reason);
        }
        if !is_wanted {
            return self.leave_as_it_is(now, asked.cause, actions);
        }
        self.planning.reason = deployment.reason;
        self.write(now, asked.cause, composed, actions);
    }

    /// What is predicted of who has a stage, or gets one by this plan; of nobody else.
    fn keep_predictions(&mut self, predicted: Vec<Prediction>) {
        let mut kept = std::mem::take(&mut self.planning.predicted);
        kept.retain(|worker, _| self.stages_of(worker).next().is_some());
        kept.extend(predicted.into_iter().map(|one| (one.worker.clone(), one)));
        self.planning.predicted = kept;
    }

    /// What a worker was predicted to do with these layers.
    pub(super) fn predicted(&self, stage: &StagePlan) -> Option<&Prediction> {
        let predicted = self.planning.predicted.get(&stage.worker);
        predicted.filter(|predicted| predicted.layers == stage.layers)
    }

    /// Nothing is to be changed. If the registry has no plan it is given what serves.
    fn leave_as_it_is(&mut self, now: Tick, cause: Cause, actions: &mut Vec<Action>) {
        let served = self.served();
        if self.planning.is_missing && !served.is_empty() {
            return self.write(now, cause, served, actions);
        }
        self.planning.carried_out();
    }

    fn write(
        &mut self,
        now: Tick,
        cause: Cause,
        pipelines: Vec<PipelinePlan>,
        actions: &mut Vec<Action>,
    ) {
        let Some((term, _)) = self.ledger.ready() else {
            return self.planning.failed(now);
        };
        self.planning.cause = Some(cause);
        let reason = self.planning.reason.clone();
        let drains = self.fleet.orders();
        let plan = Plan { format: PLAN_FORMAT, term, pipelines, reason, drains };
        self.ledger.write(now, plan, actions);
    }

    fn cannot_plan(
        &mut self,
        now: Tick,
        asked: Asked,
        error: &PlanError,
        actions: &mut Vec<Action>,
    ) {
        // Beside something that serves on nobody is missed.
        if asked.fixed.is_empty() && self.planning.short.is_none() {
            // From now on others are counted on too, also those who come later.
            self.planning.short = Some(asked.basis.clone());
            let more = self.basis_with(now, self.reserve());
            if more.candidates.len() > asked.basis.candidates.len() {
                // It is asked again at once.
                self.planning.decided = None;
                return;
            }
        }
        let cause = match error {
            // Whoever was refused is left out, and that is why the rest do not suffice.
            _ if self.fleet.somebody_refused(now) => WaitCause::Refused,
            PlanError::DoesNotFit { .. } | PlanError::TooManyPipelines { .. } => WaitCause::Memory,
            _ => WaitCause::Workers,
        };
        let detail = self.fleet.explain(now, &self.options, &error.to_string());
        // What serves goes on, and people are told why it is not changed.
        self.planning.outcome = Planned { reason: detail.clone(), ..Planned::default() };
        self.planning.decide(asked.basis, !self.switches.is_empty());
        self.leave_as_it_is(now, asked.cause, actions);
        self.planning.infeasible = Some(Waiting { cause, detail });
    }

    /// Whoever ends by itself may, also where no plan is possible without it, and whoever is to go in any
    /// case: its pipelines stop in order, and what runs on them waits for somebody to go on with.
    pub(super) fn give_way(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let ends = |pipeline: &&Pipeline| {
            let mut stages = pipeline.placed.plan.stages.iter();
            stages.any(|stage| self.fleet.ends(&stage.worker))
        };
        let cannot = self.planning.infeasible.is_some() && self.switches.is_empty();
        let stuck: Vec<_> = match cannot {
            true => self.pipelines.values().filter(ends).map(Pipeline::at).collect(),
            false => Vec::new(),
        };
        if stuck.is_empty() {
            self.planning.cannot_spare_since = None;
            return;
        }
        let since = *self.planning.cannot_spare_since.get_or_insert(now);
        let has_waited = now.since(since) >= GIVE_WAY_AFTER;
        let goes = |at: &PipelineRef| has_waited || self.is_forced(at.id);
        let stuck: Vec<_> = stuck.into_iter().filter(goes).collect();
        if stuck.is_empty() || !self.may_retire() {
            return;
        }
        for at in stuck {
            actions.push(Action::Leave { at });
            self.pipelines.remove(&at.id);
        }
        self.planning.cannot_spare_since = None;
        self.planning.lost = true;
        self.planning.decided = None;
        self.planning.expected_back = Some(now + EXPECTED_BACK);
    }

    /// Whether a person wants a worker of it to go in any case. Who says so waits for nobody.
    fn is_forced(&self, pipeline: PipelineId) -> bool {
        let stages = self.pipelines.get(&pipeline).map(|pipeline| &pipeline.placed.plan.stages);
        stages.into_iter().flatten().any(|stage| self.fleet.is_forced(&stage.worker))
    }

    /// Writes what is ordered of workers beside the plan as it is, if it is not there: whoever leads next
    /// reads it. A plan that is on its way brings it anyway.
    pub(super) fn keep_orders(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Some((term, _)) = self.ledger.ready() else { return };
        let is_open = self.planning.asked.is_some() || self.planning.is_missing || !self.listed;
        if is_open || now < self.planning.orders_not_before {
            return;
        }
        let plan = self.ledger.plan();
        if self.fleet.are_orders(plan.map_or(&[][..], |plan| &plan.drains)) {
            return;
        }
        let plan = plan.cloned().unwrap_or_default();
        self.planning.writes_orders = true;
        let plan = Plan { format: PLAN_FORMAT, term, drains: self.fleet.orders(), ..plan };
        self.ledger.write(now, plan, actions);
    }

    /// Whether somebody who ended in order is expected back.
    pub(super) fn expects_somebody(&self) -> bool {
        self.planning.expected_back.is_some_and(|until| self.now < until)
    }

    /// The pipelines as they serve now, and as they will where they are changing.
    fn served(&self) -> Vec<PipelinePlan> {
        let changes = |id: &PipelineId| self.switches.iter().any(|switch| switch.old.contains(id));
        let serving = self.pipelines.iter().filter(|(id, _)| !changes(id));
        let serving = serving.map(|(_, pipeline)| &pipeline.placed);
        let starting = self.switches.iter().flat_map(|switch| &switch.new);
        let placed = serving.chain(starting.map(|starting| &starting.placed));
        let mut plans: Vec<_> = placed.map(|placed| placed.plan.clone()).collect();
        plans.sort_by_key(|plan| plan.id);
        plans
    }

    /// The pipelines of a deployment and those that it does not touch. One that is to stay as it is
    /// keeps id and epoch; `None` if somebody is not usable any more.
    fn compose(
        &self,
        now: Tick,
        asked: &Asked,
        deployment: &Deployment,
    ) -> Option<Vec<PipelinePlan>> {
        let mut plans: Vec<PipelinePlan> = Vec::new();
        for at in &asked.fixed {
            let serving = self.pipelines.get(&at.id).map(|pipeline| &pipeline.placed.plan);
            let starting = self.switches.iter().find_map(|switch| switch.find(*at));
            let plan = serving.filter(|plan| plan.at() == *at);
            plans.push(plan.or_else(|| starting.map(|new| &new.placed.plan))?.clone());
        }
        // What came to serve while the planner worked is not in the answer.
        let known = |pipeline: &Pipeline| {
            let id = pipeline.placed.plan.id;
            asked.fixed.contains(&pipeline.at())
                || asked.incumbents.contains(&id)
                || self.switches.iter().any(|switch| switch.old.contains(&id))
        };
        if !self.pipelines.values().all(known) {
            return None;
        }
        let mut fresh = Vec::new();
        for assignment in &deployment.pipelines {
            let stages: Option<Vec<StagePlan>> =
                assignment.stages.iter().map(|stage| self.fleet.place(stage)).collect();
            let stages = stages?;
            if !stages.iter().all(|stage| self.fleet.is_usable(now, stage, asked.reserve)) {
                return None;
            }
            let kept = self.pipelines.values().map(|pipeline| &pipeline.placed.plan).find(|plan| {
                plan.stages == stages
                    && plan.kv_blocks == assignment.kv_blocks
                    && plan.class == asked.basis.class
            });
            match kept {
                Some(plan) => plans.push(plan.clone()),
                None => fresh.push((assignment, stages)),
            }
        }
        let ids = self.pipelines.keys().copied().chain(plans.iter().map(|plan| plan.id));
        let ids = ids.chain([self.options.last_pipeline]);
        let mut next = ids.fold(self.ledger.highest_pipeline(), PipelineId::max).0;
        for (assignment, stages) in fresh {
            let class = asked.basis.class;
            let continued = assignment.continues.and_then(|index| asked.incumbents.get(index));
            let continued = continued.copied().filter(|id| {
                let serving = self.pipelines.get(id).map(|pipeline| pipeline.placed.plan.class);
                let is_taken = plans.iter().any(|plan| plan.id == *id);
                let is_usable = !is_taken && *id > self.options.last_pipeline;
                // What was begun in another class cannot go on in this one.
                is_usable && serving.is_none_or(|serving| serving == class)
            });
            let id = continued.unwrap_or_else(|| {
                // Ids of a plan that was read are far below the last: see `Plan::fault`.
                next = next.saturating_add(1);
                PipelineId(next)
            });
            plans.push(PipelinePlan {
                id,
                epoch: Epoch(0),
                model: self.options.model,
                kv_type: self.options.kv_type,
                class,
                stages,
                kv_blocks: assignment.kv_blocks,
                predicted_tokens_per_s: assignment.predicted_tokens_per_s,
            });
        }
        plans.sort_by_key(|plan| plan.id);
        Some(plans)
    }

    /// What came of planning because a person asked; `None` while that is not decided.
    pub fn planned(&self) -> Option<&Planned> {
        self.planning.requested.is_none().then_some(&self.planning.outcome)
    }

    /// What the planner would be asked if a person wanted a plan of everybody now.
    pub fn question(&self) -> Problem {
        let Options { model, kv_type, .. } = self.options;
        let (_, candidates) = self.fleet.candidates(self.now, model, kv_type, Reserve::Untouched);
        let serving = self.pipelines.values().map(|pipeline| &pipeline.placed.plan);
        Problem {
            model: self.options.costs,
            workers: candidates.into_iter().map(|candidate| candidate.spec).collect(),
            options: self.planner_options(
                self.options.pipelines.map(|count| count.max(1)),
                serving.map(incumbent).collect(),
            ),
        }
    }

    fn planner_options(
        &self,
        pipelines: Option<u32>,
        incumbent: Vec<Incumbent>,
    ) -> planner::Options {
        planner::Options {
            stages: self.options.stages,
            pipelines,
            min_kv_blocks: self.options.min_kv_blocks,
            max_kv_blocks: self.options.max_kv_blocks,
            context_tokens: self.options.context_tokens,
            objective: self.options.objective,
            incumbent,
        }
    }

    /// Why no plan is possible with who is here now.
    pub(super) fn infeasible(&self) -> Option<&Waiting> {
        self.planning.infeasible.as_ref()
    }

    /// Why nothing is planned at this moment though something should serve.
    pub(super) fn why_not_planned(&self) -> Waiting {
        if self.planning.asked.is_none()
            && self.now >= self.planning.not_before
            && self.now < self.fleet.last_arrival() + self.options.settle
        {
            return waits(WaitCause::Starting, "waiting for workers to come");
        }
        self.last_failure
            .clone()
            .unwrap_or_else(|| waits(WaitCause::Starting, "a plan is being made"))
    }
}

fn workers_of(plan: &PipelinePlan) -> impl Iterator<Item = &str> {
    plan.stages.iter().map(|stage| stage.worker.as_str())
}

fn incumbent(plan: &PipelinePlan) -> Incumbent {
    let stage =
        |stage: &StagePlan| Stage { worker: stage.worker.clone(), layers: stage.layers.clone() };
    Incumbent { stages: plan.stages.iter().map(stage).collect(), kv_blocks: plan.kv_blocks }
}
