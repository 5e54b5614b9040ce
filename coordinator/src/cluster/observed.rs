//! What workers hold, as far as it is known: from what they say and from what they were told.
//!
//! Compared with what is intended it tells what must be retired: stages of a dead epoch, of an
//! earlier coordinator, and of pipelines that were stopped to make room. This is the only place
//! that retires anything.
//!
//! A worker leaves an epoch together with all older ones. So nothing is retired that is newer than
//! a stage which the worker shall keep; the next `Prepare` takes the place of such a leftover.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use proto::ids::{Incarnation, ModelId, PipelineRef, Term};
use proto::plan::KvType;

use super::fleet::Fleet;
use super::types::{Action, Held};
use super::{PROBE_TIMEOUT, backoff};
use crate::tick::Tick;

/// A stage whose worker does not say that it left an epoch is not waited for any longer.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Tries of one `Retire` before the worker is asked again what it holds ...
const RETIRE_TRIES: u32 = 4;

/// ... so much later.
const ASK_PAUSE: Duration = Duration::from_secs(10);

/// What decides what a worker holds for a stage. Stages of equal shape share it, over epochs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) model: ModelId,
    pub(super) kv_type: KvType,
    pub(super) layers: Range<u32>,
    pub(super) kv_blocks: u32,
    pub(super) draws: bool,
}

/// Which stages each worker shall hold.
pub(super) type Intended = BTreeMap<String, BTreeMap<PipelineRef, Shape>>;

#[derive(Debug, Default)]
pub(super) struct Observed {
    by_worker: BTreeMap<String, Seen>,
}

/// What one process start holds.
#[derive(Debug)]
struct Seen {
    incarnation: Incarnation,
    /// The shape where it is known.
    held: BTreeMap<PipelineRef, Option<Shape>>,
    /// It is to be asked, from this moment on.
    ask_from: Option<Tick>,
    /// That began since the last look.
    asks_anew: bool,
    retiring: Option<Retiring>,
}

#[derive(Debug)]
struct Retiring {
    at: PipelineRef,
    since: Tick,
    tries: u32,
    /// Told and not answered; or told again from this moment on.
    retry_at: Option<Tick>,
}

impl Seen {
    fn ask(&mut self, now: Tick) {
        if self.ask_from.is_none_or(|from| from > now) {
            self.ask_from = Some(now);
            self.asks_anew = true;
        }
    }
}

impl Observed {
    /// Follows who is in the fleet; whoever is new is asked.
    pub(super) fn follow(&mut self, now: Tick, fleet: &Fleet) {
        self.by_worker.retain(|worker, seen| {
            fleet.get(worker).is_some_and(|member| member.record.incarnation == seen.incarnation)
        });
        for member in fleet.iter() {
            if !self.by_worker.contains_key(&member.record.id) {
                let seen = Seen {
                    incarnation: member.record.incarnation,
                    held: BTreeMap::new(),
                    ask_from: Some(now),
                    asks_anew: true,
                    retiring: None,
                };
                self.by_worker.insert(member.record.id.clone(), seen);
            }
        }
    }

    /// Everyone is to be asked.
    pub(super) fn ask_all(&mut self, now: Tick) {
        self.by_worker.values_mut().for_each(|seen| seen.ask(now));
    }

    /// This worker is to be asked.
    pub(super) fn ask(&mut self, now: Tick, worker: &str) {
        if let Some(seen) = self.by_worker.get_mut(worker) {
            seen.ask(now);
        }
    }

    /// Who is to be asked since the last look.
    pub(super) fn take_new_asks(&mut self) -> Vec<String> {
        let asks_anew = |seen: &mut Seen| std::mem::take(&mut seen.asks_anew);
        let by_worker = self.by_worker.iter_mut();
        by_worker.filter_map(|(id, seen)| asks_anew(seen).then(|| id.clone())).collect()
    }

    /// Who is to be asked now.
    pub(super) fn to_ask(&self, now: Tick) -> impl Iterator<Item = &String> {
        let due = move |seen: &Seen| seen.ask_from.is_some_and(|from| now >= from);
        self.by_worker.iter().filter(move |(_, seen)| due(seen)).map(|(worker, _)| worker)
    }

    fn find(&mut self, worker: &str, incarnation: Incarnation) -> Option<&mut Seen> {
        self.by_worker.get_mut(worker).filter(|seen| seen.incarnation == incarnation)
    }

    /// A worker said what it holds. What it is told meanwhile it may not know yet.
    pub(super) fn described(
        &mut self,
        worker: &str,
        incarnation: Incarnation,
        held: &[Held],
        intended: &Intended,
        shape_of: impl Fn(PipelineRef, &str) -> Option<Shape>,
    ) {
        let Some(seen) = self.find(worker, incarnation) else { return };
        seen.ask_from = None;
        let shall = intended.get(worker);
        let mut before = std::mem::take(&mut seen.held);
        let mut now_held = BTreeMap::new();
        for Held { at } in held {
            let known = before.remove(at).flatten();
            now_held.insert(*at, known.or_else(|| shape_of(*at, worker)));
        }
        before.retain(|at, _| shall.is_some_and(|shall| shall.contains_key(at)));
        now_held.append(&mut before);
        seen.held = now_held;
    }

    /// A worker is told to prepare a stage: from now on it may hold it.
    pub(super) fn expect(
        &mut self,
        worker: &str,
        incarnation: Incarnation,
        at: PipelineRef,
        shape: Shape,
    ) {
        if let Some(seen) = self.find(worker, incarnation) {
            seen.held.insert(at, Some(shape));
        }
    }

    /// A plan was read: it tells what stages that workers hold are like.
    pub(super) fn learn(&mut self, shape_of: impl Fn(PipelineRef, &str) -> Option<Shape>) {
        for (worker, seen) in &mut self.by_worker {
            for (at, shape) in seen.held.iter_mut().filter(|(_, shape)| shape.is_none()) {
                *shape = shape_of(*at, worker);
            }
        }
    }

    /// A worker has no memory for a stage beside what it holds: so they share nothing.
    pub(super) fn shares_nothing(&mut self, worker: &str, incarnation: Incarnation) {
        if let Some(seen) = self.find(worker, incarnation) {
            seen.held.values_mut().for_each(|shape| *shape = None);
        }
    }

    /// A worker said that it does not hold a stage.
    pub(super) fn refused(&mut self, worker: &str, incarnation: Incarnation, at: PipelineRef) {
        if let Some(seen) = self.find(worker, incarnation) {
            seen.held.remove(&at);
        }
    }

    /// A stage is active: all that came before is over there.
    pub(super) fn activated(&mut self, worker: &str, incarnation: Incarnation, at: PipelineRef) {
        if let Some(seen) = self.find(worker, incarnation) {
            seen.held.retain(|held, _| held.epoch >= at.epoch);
        }
    }

    /// A worker left an epoch and all older ones.
    pub(super) fn retired(
        &mut self,
        now: Tick,
        worker: &str,
        incarnation: Incarnation,
        at: PipelineRef,
    ) {
        let Some(seen) = self.find(worker, incarnation) else { return };
        seen.held.retain(|held, _| held.epoch > at.epoch);
        if seen.retiring.take_if(|retiring| retiring.at == at).is_some() {
            // It may hold more than it had said.
            seen.ask(now);
        }
    }

    pub(super) fn retire_failed(
        &mut self,
        now: Tick,
        worker: &str,
        incarnation: Incarnation,
        at: PipelineRef,
    ) {
        let Some(seen) = self.find(worker, incarnation) else { return };
        let Some(retiring) = seen.retiring.as_mut().filter(|retiring| retiring.at == at) else {
            return;
        };
        if retiring.tries < RETIRE_TRIES {
            retiring.retry_at = Some(now + backoff(retiring.tries - 1));
        } else {
            seen.retiring = None;
            seen.held.retain(|held, _| held.epoch > at.epoch);
            seen.ask_from = Some(now + ASK_PAUSE);
        }
    }

    /// Whether a worker must be waited for before it is given a stage: it is being asked what it
    /// holds, or it is to leave something that takes the memory.
    pub(super) fn is_clearing(&self, now: Tick, worker: &str) -> bool {
        self.by_worker.get(worker).is_some_and(|seen| {
            let is_asked =
                seen.ask_from.is_some_and(|from| now >= from && now.since(from) < PROBE_TIMEOUT);
            let leaves = |retiring: &Retiring| now.since(retiring.since) < RETIRE_TIMEOUT;
            is_asked || seen.retiring.as_ref().is_some_and(leaves)
        })
    }

    /// Workers that hold something which they shall leave.
    pub(super) fn to_leave(&self, intended: &Intended) -> BTreeSet<String> {
        let none = BTreeMap::new();
        let owes = |(worker, seen): &(&String, &Seen)| {
            leaves(&seen.held, intended.get(*worker).unwrap_or(&none)).is_some()
        };
        self.by_worker.iter().filter(owes).map(|(worker, _)| worker.clone()).collect()
    }

    /// Tells workers to leave what nobody intends them to hold. While it `is_open` who will be
    /// placed next, those without a stage keep what they hold: it may be of use.
    pub(super) fn reconcile(
        &mut self,
        now: Tick,
        term: Term,
        intended: &Intended,
        is_open: bool,
        fleet: &Fleet,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let none = BTreeMap::new();
        for (worker, seen) in &mut self.by_worker {
            let Some(target) = fleet.target(worker, seen.incarnation) else { continue };
            let shall = intended.get(worker).unwrap_or(&none);
            if shall.is_empty() && is_open && !fleet.is_draining(worker) {
                seen.retiring = None;
                continue;
            }
            let Some(at) = leaves(&seen.held, shall) else {
                seen.retiring = None;
                continue;
            };
            let (since, tries) = match &seen.retiring {
                Some(Retiring { at: told, since, tries, retry_at }) if *told == at => {
                    let is_due = match retry_at {
                        Some(retry_at) => now >= *retry_at,
                        // Nobody carried the answer back.
                        None => now.since(*since) >= RETIRE_TIMEOUT * *tries,
                    };
                    if !is_due {
                        continue;
                    }
                    (*since, tries + 1)
                }
                _ => (now, 1),
            };
            seen.retiring = Some(Retiring { at, since, tries, retry_at: None });
            actions.push(Action::Retire { at, term, target });
        }
        actions
    }
}

/// The newest stage that is to be left, with all that are older; none if something that shall be
/// kept is older too.
fn leaves(
    held: &BTreeMap<PipelineRef, Option<Shape>>,
    shall: &BTreeMap<PipelineRef, Shape>,
) -> Option<PipelineRef> {
    let oldest_kept = shall.keys().map(|at| at.epoch).min();
    let is_extra = |(at, shape): &(&PipelineRef, &Option<Shape>)| {
        let is_shared = shape.as_ref().is_some_and(|shape| shall.values().any(|s| s == shape));
        let is_newest = oldest_kept.is_none_or(|kept| at.epoch < kept);
        !shall.contains_key(at) && !is_shared && is_newest
    };
    held.iter().filter(is_extra).map(|(at, _)| *at).max_by_key(|at| at.epoch)
}
