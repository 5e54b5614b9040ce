//! The workers that are known: their records and leases, whether they answer, and who may be
//! planned with.

mod class;
mod probe;
mod racks;
mod standing;

pub(super) use class::{Candidate, Majority};

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::Incarnation;
use proto::plan::{DrainOrder, StagePlan, WorkerRecord};

use super::Loss;
use super::types::{Action, Target};
use crate::tick::Tick;
use probe::{PROBE_INTERVAL, Probe};
use racks::Racks;
use standing::FlapHistories;

/// Leases that end within one TTL count as ended at once.
const VANISH_WINDOW: Duration = Duration::from_secs(5);
/// Evictions for lost leases stay frozen so long, unless the workers come back before.
const FREEZE: Duration = Duration::from_secs(60);
/// Who was told to end and is still there is told again after as long as such a call may take.
const DISMISS_PAUSE: Duration = Duration::from_secs(5);
/// The least time between two looks at where everybody stands.
const INFER_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Fleet {
    by_id: BTreeMap<String, Member>,
    flaps: FlapHistories,
    /// Orders of earlier reigns, as the plan that was read says; `None` before one was in this reign.
    recalled: Option<Orders>,
    /// Whose leases ended unexpectedly within [`VANISH_WINDOW`], or since the freeze, and when.
    vanished: BTreeMap<String, Tick>,
    frozen_until: Option<Tick>,
    last_arrival: Tick,
    last_change: Tick,
    /// Workers that compute nothing are planned with.
    allows_stubs: bool,
    racks: Racks,
    /// Somebody came, went, or measured anew since those were looked at.
    racks_are_due: bool,
    /// When they were inferred last.
    racks_inferred: Option<Tick>,
}

/// A worker that is in the registry, or was and has a stage still.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) record: WorkerRecord,
    /// Its key is there. A stage is remembered without: a lease is a hint.
    pub(super) has_lease: bool,
    /// A person wants this process start used no more.
    order: Option<Order>,
    /// It was told to end for that.
    dismissed: Option<Dismissed>,
    /// Why this process start is not planned until it answers a probe.
    pub(super) suspect: Option<String>,
    probe: Probe,
}

/// How a worker is to be drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Order {
    /// Also where nobody can take its place.
    force: bool,
}

/// By worker, for which process start.
type Orders = BTreeMap<String, (Incarnation, Order)>;

/// Whom plans may count on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Reserve {
    /// Those that nothing is said against.
    #[default]
    Untouched,
    /// Also those that are kept out because they were lost too often: no plan is possible without.
    Flapping,
    /// Also those that are to go once they can be spared: nothing serves.
    All,
}

/// A worker that was told to end.
#[derive(Debug)]
struct Dismissed {
    /// When it is told again.
    again: Tick,
    /// Why it does not know, as far as that is known.
    fault: Option<String>,
}

impl Member {
    /// What is known of the end of a worker that has no stage, if a person ordered it.
    pub(super) fn end(&self) -> Option<String> {
        let dismissed = self.dismissed.as_ref()?;
        Some(match &dismissed.fault {
            None => "it was told to end".to_owned(),
            Some(fault) => format!("it is told to end and does not hear: {fault}"),
        })
    }

    /// It finishes what it has and takes nothing new.
    pub(super) fn is_draining(&self) -> bool {
        self.record.draining || self.order.is_some()
    }

    /// Whether it ends, with or without what is planned for it.
    fn ends(&self) -> bool {
        self.record.draining || self.is_forced()
    }

    fn is_forced(&self) -> bool {
        self.order.is_some_and(|order| order.force)
    }

    /// Whether it takes something new, if plans count on `reserve`.
    fn is_willing(&self, reserve: Reserve) -> bool {
        let stays = reserve == Reserve::All && !self.ends() && self.dismissed.is_none();
        stays || !self.is_draining()
    }
}

impl Fleet {
    /// Of which nobody is known yet.
    pub(super) fn new(allows_stubs: bool) -> Self {
        Self { allows_stubs, ..Self::default() }
    }

    /// A record came. Whether it is of a process start that was not known.
    pub(super) fn put(&mut self, now: Tick, record: WorkerRecord) -> bool {
        self.vanished.remove(&record.id);
        let before = self.by_id.get(&record.id).map(|member| &member.record);
        self.racks_are_due |= before.is_none_or(|before| !racks::stands_equally(before, &record));
        let is_new = match self.by_id.get_mut(&record.id) {
            Some(member) if member.record.incarnation == record.incarnation => {
                if member.record.draining != record.draining || !member.has_lease {
                    self.last_change = now;
                }
                member.record = record;
                member.has_lease = true;
                false
            }
            _ => {
                (self.last_arrival, self.last_change) = (now, now);
                self.flaps.started_again(&record.id);
                let member = Member {
                    has_lease: true,
                    order: self.recalled.as_ref().and_then(|orders| order_of(orders, &record)),
                    dismissed: None,
                    suspect: None,
                    probe: Probe::new(now),
                    record,
                };
                self.by_id.insert(member.record.id.clone(), member);
                true
            }
        };
        if self.is_frozen() {
            let here = self.by_id.values().filter(|member| member.has_lease).count();
            self.frozen_until = self.frozen_until.filter(|_| self.vanished.len() > here);
        }
        is_new
    }

    /// A lease ended. The text of an alarm if that froze evictions.
    pub(super) fn gone(&mut self, now: Tick, id: &str) -> Option<String> {
        let member = self.by_id.get_mut(id).filter(|member| member.has_lease)?;
        member.has_lease = false;
        member.probe.at(now);
        self.last_change = now;
        // Who announced that it leaves, or was found dead by its data path, says nothing about
        // the health of the registry, which is what the freeze is for.
        if member.is_draining() || member.suspect.is_some() {
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

    /// Time passed.
    pub(super) fn tick(&mut self, now: Tick) {
        if self.frozen_until.is_some_and(|until| now >= until) {
            self.frozen_until = None;
            self.vanished.clear();
        }
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen_until.is_some()
    }

    /// A person wants a worker used no more (with `force` also where nobody can take its place), or used
    /// again, unless it was told to end meanwhile. Whether that is news.
    pub(super) fn order_drain(&mut self, now: Tick, id: &str, drain: bool, force: bool) -> bool {
        let Some(member) = self.by_id.get_mut(id) else { return false };
        // Who wants it to go in any case is not contradicted by who only wants it to go.
        let force = force || member.is_forced();
        let order = drain.then_some(Order { force });
        if member.order == order || member.dismissed.is_some() {
            return false;
        }
        member.order = order;
        self.last_change = now;
        true
    }

    /// Whoever leads next reads what was ordered.
    pub(super) fn forget_orders(&mut self) {
        self.recalled = None;
        for member in self.by_id.values_mut() {
            (member.order, member.dismissed) = (None, None);
        }
    }

    /// The plan was read: what was ordered in earlier reigns stands, for the process starts that were
    /// meant. The first reading of a reign counts; what is ordered after it is newer.
    pub(super) fn recall_orders(&mut self, now: Tick, orders: &[DrainOrder]) {
        if self.recalled.is_some() {
            return;
        }
        let orders = by_worker(orders);
        for member in self.by_id.values_mut() {
            if let Some(order) = order_of(&orders, &member.record) {
                member.order = Some(order);
                self.last_change = now;
            }
        }
        self.recalled = Some(orders);
    }

    /// What is ordered, by worker.
    pub(super) fn orders(&self) -> Vec<DrainOrder> {
        let ordered = self.by_id.values().filter_map(|member| {
            let Order { force } = member.order?;
            let WorkerRecord { id, incarnation, .. } = &member.record;
            Some(DrainOrder { worker: id.clone(), incarnation: *incarnation, force })
        });
        ordered.collect()
    }

    /// Whether these orders are those that stand, as far as they are about who is here.
    pub(super) fn are_orders(&self, written: &[DrainOrder]) -> bool {
        let written = by_worker(written);
        self.by_id.values().all(|member| order_of(&written, &member.record) == member.order)
    }

    /// Whether whoever leads next knows of a worker's order, or needs not to.
    pub(super) fn is_order_kept(&self, id: &str, written: &[DrainOrder]) -> bool {
        let written = by_worker(written);
        self.by_id.get(id).is_none_or(|member| {
            member.record.draining || order_of(&written, &member.record) == member.order
        })
    }

    /// Who is drained by order and has nothing left to do: told to end, and told again. While somebody
    /// `is_missed` only those that go in any case: the others may be needed once more.
    pub(super) fn dismissals(
        &mut self,
        now: Tick,
        is_missed: bool,
        has_stage: impl Fn(&str) -> bool,
    ) -> Vec<Target> {
        let mut targets = Vec::new();
        for (id, member) in &mut self.by_id {
            let is_due = member.dismissed.as_ref().is_none_or(|dismissed| now >= dismissed.again);
            let order = member.order.filter(|order| order.force || !is_missed);
            let may_end = order.is_some() && member.has_lease && !has_stage(id);
            // One that drains by itself ends by itself.
            if !may_end || !is_due || member.record.draining {
                continue;
            }
            let fault = member.dismissed.take().and_then(|before| before.fault);
            member.dismissed = Some(Dismissed { again: now + DISMISS_PAUSE, fault });
            targets.push(Target {
                worker: id.clone(),
                incarnation: member.record.incarnation,
                address: member.record.address.clone(),
            });
        }
        targets
    }

    /// A worker was told to end, and whether it knows.
    pub(super) fn dismissed(&mut self, id: &str, incarnation: Incarnation, fault: Option<String>) {
        let member = self.by_id.get_mut(id);
        let member = member.filter(|member| member.record.incarnation == incarnation);
        if let Some(dismissed) = member.and_then(|member| member.dismissed.as_mut()) {
            dismissed.fault = fault;
        }
    }

    /// Ids with a lease that are not in `here`.
    pub(super) fn listed_except(&self, here: &BTreeSet<String>) -> Vec<String> {
        let listed =
            self.by_id.iter().filter(|(id, member)| member.has_lease && !here.contains(*id));
        listed.map(|(id, _)| id.clone()).collect()
    }

    /// Drops those whose key is gone and who have no stage.
    pub(super) fn forget_gone(&mut self, has_stage: impl Fn(&str) -> bool) {
        let before = self.by_id.len();
        self.by_id.retain(|id, member| member.has_lease || has_stage(id));
        self.racks_are_due |= self.by_id.len() < before;
    }

    /// Looks at what workers measured, if that is another than it was. Once for all of an event: it
    /// looks at every pair of them.
    pub(super) fn infer_racks(&mut self, now: Tick) {
        // All figures are looked at: a fleet that starts, each of whom publishes his own, is not looked
        // at for each of them.
        let last = self.racks_inferred;
        if !self.racks_are_due || last.is_some_and(|last| now.since(last) < INFER_EVERY) {
            return;
        }
        (self.racks_are_due, self.racks_inferred) = (false, Some(now));
        let (changed, _) = self.racks.infer(self.by_id.values().map(|member| &member.record));
        if changed {
            // They measure one after another: what all of them know is worth a plan.
            self.last_change = now;
        }
    }

    /// Where a worker stands: its label, or a rack that was inferred; empty: unknown.
    pub(super) fn rack(&self, member: &Member) -> String {
        self.racks.of(&member.record)
    }

    /// When the last process start came that was not known.
    pub(super) fn last_arrival(&self) -> Tick {
        self.last_arrival
    }

    /// When a worker last came, went, failed, began or ended to drain, or was found in another rack.
    pub(super) fn last_change(&self) -> Tick {
        self.last_change
    }

    pub(super) fn get(&self, id: &str) -> Option<&Member> {
        self.by_id.get(id)
    }

    pub(super) fn lease_is_gone(&self, id: &str) -> bool {
        self.by_id.get(id).is_none_or(|member| !member.has_lease)
    }

    pub(super) fn is_draining(&self, id: &str) -> bool {
        self.by_id.get(id).is_some_and(Member::is_draining)
    }

    /// Whether it ends, with or without what is planned for it.
    pub(super) fn ends(&self, id: &str) -> bool {
        self.by_id.get(id).is_some_and(Member::ends)
    }

    /// Whether a person wants that, and at once.
    pub(super) fn is_forced(&self, id: &str) -> bool {
        self.by_id.get(id).is_some_and(Member::is_forced)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.by_id.values()
    }

    /// Where this process start is told things; `None` if it is believed dead.
    pub(super) fn target(&self, id: &str, incarnation: Incarnation) -> Option<Target> {
        let member = self.by_id.get(id)?;
        let lives = member.record.incarnation == incarnation && member.suspect.is_none();
        lives.then(|| Target {
            worker: id.to_owned(),
            incarnation,
            address: member.record.address.clone(),
        })
    }

    // ---- probes

    pub(super) fn probe_at_once(&mut self, now: Tick, id: &str) {
        if let Some(member) = self.by_id.get_mut(id) {
            member.probe.at(now);
        }
    }

    /// Notes an answer; whether it is that of the process start that is known.
    pub(super) fn answered(&mut self, now: Tick, id: &str, incarnation: Incarnation) -> bool {
        let Some(member) = self.by_id.get_mut(id) else { return true };
        member.probe.answered();
        if member.record.incarnation != incarnation {
            return false;
        }
        if member.suspect.take().is_some() {
            self.last_change = now;
        }
        true
    }

    /// Notes a failure; whether it is about the process start that is known.
    pub(super) fn probe_failed(&mut self, now: Tick, id: &str, incarnation: Incarnation) -> bool {
        let Some(member) = self.by_id.get_mut(id) else { return false };
        if member.record.incarnation != incarnation {
            return false;
        }
        member.probe.failed(now);
        true
    }

    /// Probes that are due: of suspects, and of those that are `wanted`.
    pub(super) fn probes(&mut self, now: Tick, wanted: &BTreeSet<String>) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, member) in &mut self.by_id {
            if (member.suspect.is_some() || wanted.contains(id)) && member.probe.take_due(now) {
                actions.push(Action::Probe {
                    worker: id.clone(),
                    incarnation: member.record.incarnation,
                    address: member.record.address.clone(),
                });
            }
        }
        actions
    }

    /// Whether the stage's process start did not answer the last probe.
    pub(super) fn is_silent(&self, stage: &StagePlan) -> bool {
        self.by_id.get(&stage.worker).is_some_and(|member| {
            member.record.incarnation == stage.incarnation && member.probe.is_silent()
        })
    }

    // ---- losses and refusals

    /// Its stage was given up. The text of an alarm if it happens too often.
    pub(super) fn evicted(
        &mut self,
        now: Tick,
        stage: &StagePlan,
        loss: Loss,
        why: &str,
    ) -> Option<String> {
        self.last_change = now;
        if let Some(member) = self.by_id.get_mut(&stage.worker)
            && member.record.incarnation == stage.incarnation
        {
            member.suspect = Some(why.to_owned());
            member.probe.at(now + PROBE_INTERVAL);
        }
        self.flaps.lost(now, &stage.worker, loss, why)
    }

    /// It could not take its stage.
    pub(super) fn refused(&mut self, now: Tick, id: &str, why: &str) {
        self.last_change = now;
        self.flaps.refused(now, id, why);
    }

    /// Why a worker is kept out of plans for now.
    pub(super) fn kept_out(&self, now: Tick, id: &str) -> Option<&str> {
        self.flaps.kept_out(now, id)
    }

    /// Whether somebody is kept out because it could not take its stage.
    pub(super) fn somebody_refused(&self, now: Tick) -> bool {
        self.by_id.keys().any(|id| self.flaps.has_refused(now, id))
    }

    /// Whether the stage's process start may be given something to do, if plans count on `reserve`.
    pub(super) fn is_usable(&self, now: Tick, stage: &StagePlan, reserve: Reserve) -> bool {
        self.by_id.get(&stage.worker).is_some_and(|member| {
            member.record.incarnation == stage.incarnation && self.is_free(now, member, reserve)
        })
    }

    /// Whether a worker may be planned with, if plans count on `reserve`.
    fn is_free(&self, now: Tick, member: &Member, reserve: Reserve) -> bool {
        let id = &member.record.id;
        member.has_lease
            && member.suspect.is_none()
            && !self.flaps.has_refused(now, id)
            && member.is_willing(reserve)
            && !self.flaps.is_quarantined(now, id, reserve != Reserve::Untouched)
    }
}

fn by_worker(orders: &[DrainOrder]) -> Orders {
    let of = |order: &DrainOrder| {
        let DrainOrder { worker, incarnation, force } = order.clone();
        (worker, (incarnation, Order { force }))
    };
    orders.iter().map(of).collect()
}

/// What of these orders is about the process start of a record.
fn order_of(orders: &Orders, record: &WorkerRecord) -> Option<Order> {
    let (incarnation, order) = orders.get(&record.id)?;
    (*incarnation == record.incarnation).then_some(*order)
}
