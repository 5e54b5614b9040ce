//! PURE. The steps of one epoch at one stage: which are known, what they gave, and what of it is
//! still to be sent. An output is kept until a later step acknowledges it, so that a step which
//! comes again is answered with the same bytes and computed no second time.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{StepId, Term};

/// What to do with a step that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Compute it.
    New,
    /// It waits or is being computed.
    Pending,
    /// Its output is kept and was queued to be sent again.
    Again,
    /// Its result was acknowledged: nobody waits for it.
    Acknowledged,
    /// More steps are unacknowledged than was agreed.
    Busy,
}

/// Why a step cannot have been sent by who keeps to what was agreed. Nothing changes by it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum OutOfOrder {
    /// Its result was not made yet.
    #[error("step {acked} is acknowledged, the last that came is step {last}")]
    Unsent { acked: StepId, last: StepId },
    /// Too many before it are not acknowledged.
    #[error("step {found} came, with {limit} in flight none can come beyond step {most}")]
    Ahead { found: StepId, most: StepId, limit: usize },
}

#[derive(Debug)]
enum Entry<T> {
    Pending,
    Kept {
        output: T,
        /// It was sent again because it arrived damaged.
        repaired: bool,
    },
}

/// `T` is what a step gives: the step for the next stage, or the result.
#[derive(Debug)]
pub(crate) struct Ledger<T> {
    /// The most steps that may be known and not acknowledged.
    limit: usize,
    /// This step and all before it are acknowledged.
    acked: StepId,
    /// The highest that ever came.
    last: StepId,
    steps: BTreeMap<StepId, Entry<T>>,
    /// The latest reign in which each of them came.
    terms: BTreeMap<StepId, Term>,
    /// Kept outputs that are to be sent, in the order of their numbers.
    outbox: BTreeSet<StepId>,
}

impl<T> Ledger<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            acked: StepId::default(),
            last: StepId::default(),
            steps: BTreeMap::new(),
            terms: BTreeMap::new(),
            outbox: BTreeSet::new(),
        }
    }

    /// Whether a step came before.
    pub(crate) fn knows(&self, step: StepId) -> bool {
        step <= self.acked || self.steps.contains_key(&step)
    }

    /// Whether a step can come now that acknowledges `acked`. Its sender has at most `limit` steps
    /// without a result, and as many may be kept here whose results came before that of an older
    /// one: no number is further from the last acknowledged one than both together.
    ///
    /// # Errors
    ///
    /// [`OutOfOrder`].
    pub(crate) fn check(&self, step: StepId, acked: StepId) -> Result<(), OutOfOrder> {
        if acked > self.last {
            return Err(OutOfOrder::Unsent { acked, last: self.last });
        }
        let most = StepId(self.acked.max(acked).0.saturating_add(2 * self.limit as u64));
        if step > most {
            return Err(OutOfOrder::Ahead { found: step, most, limit: self.limit });
        }
        Ok(())
    }

    /// Notes a step and what it acknowledges. [`check`](Self::check) had nothing against it, and
    /// `acked` is less than `step`.
    pub(crate) fn arrive(&mut self, step: StepId, acked: StepId) -> Arrival {
        debug_assert!(acked < step, "a step cannot acknowledge itself");
        debug_assert_eq!(self.check(step, acked), Ok(()), "it was checked");
        self.acknowledge(acked);
        if step <= self.acked {
            return Arrival::Acknowledged;
        }
        match self.steps.get(&step) {
            Some(Entry::Pending) => Arrival::Pending,
            Some(Entry::Kept { .. }) => {
                self.outbox.insert(step);
                Arrival::Again
            }
            None if self.steps.len() >= self.limit => Arrival::Busy,
            None => {
                self.steps.insert(step, Entry::Pending);
                self.last = self.last.max(step);
                Arrival::New
            }
        }
    }

    /// A step came, perhaps again, in this reign of its coordinator. Nothing if it is not known.
    pub(crate) fn came_in(&mut self, step: StepId, term: Term) {
        if self.steps.contains_key(&step) {
            let latest = self.terms.entry(step).or_default();
            *latest = term.max(*latest);
        }
    }

    /// The latest reign in which a step came.
    pub(crate) fn term(&self, step: StepId) -> Term {
        self.terms.get(&step).copied().unwrap_or_default()
    }

    /// Takes back an arrival that could not be handed on.
    pub(crate) fn withdraw(&mut self, step: StepId) {
        self.steps.remove(&step);
        self.terms.remove(&step);
    }

    /// Keeps what a step gave and queues it. Not if it was acknowledged meanwhile.
    pub(crate) fn keep(&mut self, step: StepId, output: T) {
        if step > self.acked {
            self.steps.insert(step, Entry::Kept { output, repaired: false });
            self.outbox.insert(step);
        }
    }

    /// Everything up to `acked` needs no keeping any more.
    pub(crate) fn acknowledge(&mut self, acked: StepId) {
        if acked > self.acked {
            self.acked = acked;
            let after = StepId(acked.0.saturating_add(1));
            self.steps = self.steps.split_off(&after);
            self.terms = self.terms.split_off(&after);
            self.outbox = self.outbox.split_off(&after);
        }
    }

    /// Queues everything that is kept: a new connection knows nothing.
    pub(crate) fn resend_all(&mut self) {
        self.resend_after(StepId::default());
    }

    /// Queues what is kept of the steps after `after`, and nothing else.
    pub(crate) fn resend_after(&mut self, after: StepId) {
        let kept = self.steps.iter().filter(|(_, entry)| matches!(entry, Entry::Kept { .. }));
        self.outbox = kept.map(|(&step, _)| step).filter(|&step| step > after).collect();
    }

    /// Queues one kept output again that arrived damaged: once, and never more often. Returns
    /// whether it will be sent.
    pub(crate) fn repair(&mut self, step: StepId) -> bool {
        match self.steps.get_mut(&step) {
            Some(Entry::Kept { repaired, .. }) if !*repaired => {
                *repaired = true;
                self.outbox.insert(step)
            }
            _ => false,
        }
    }

    /// The next output to send; it stays kept.
    pub(crate) fn next_to_send(&mut self) -> Option<&T> {
        let step = self.outbox.pop_first()?;
        match self.steps.get(&step) {
            Some(Entry::Kept { output, .. }) => Some(output),
            _ => None,
        }
    }

    /// Up to where results are known.
    pub(crate) fn acked(&self) -> StepId {
        self.acked
    }

    /// Whether any step waits, is computed, or waits to be sent.
    pub(crate) fn is_busy(&self) -> bool {
        !self.outbox.is_empty() || self.steps.values().any(|entry| matches!(entry, Entry::Pending))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drain(ledger: &mut Ledger<u64>) -> Vec<u64> {
        std::iter::from_fn(|| ledger.next_to_send().copied()).collect()
    }

    #[test]
    fn one_step_after_another() {
        let mut ledger = Ledger::new(2);
        assert_eq!(ledger.arrive(StepId(1), StepId(0)), Arrival::New);
        assert_eq!(ledger.arrive(StepId(1), StepId(0)), Arrival::Pending);
        assert!(ledger.is_busy());
        ledger.keep(StepId(1), 10);
        assert_eq!(drain(&mut ledger), [10]);
        assert!(!ledger.is_busy());
        assert_eq!(ledger.arrive(StepId(1), StepId(0)), Arrival::Again);
        assert_eq!(drain(&mut ledger), [10], "sent on again, not computed again");
        assert_eq!(ledger.arrive(StepId(2), StepId(0)), Arrival::New);
        assert_eq!(ledger.arrive(StepId(3), StepId(0)), Arrival::Busy);
        assert_eq!(ledger.arrive(StepId(3), StepId(1)), Arrival::New, "1 made room");
        assert_eq!(ledger.arrive(StepId(1), StepId(0)), Arrival::Acknowledged);
    }

    #[test]
    fn a_new_connection_gets_what_is_kept_in_order() {
        let mut ledger = Ledger::new(8);
        for step in [3, 1, 2] {
            ledger.arrive(StepId(step), StepId(0));
        }
        ledger.keep(StepId(2), 20);
        ledger.keep(StepId(1), 10);
        assert_eq!(drain(&mut ledger), [10, 20]);
        ledger.resend_all();
        assert_eq!(drain(&mut ledger), [10, 20]);
        ledger.acknowledge(StepId(1));
        ledger.resend_all();
        assert!(!ledger.repair(StepId(1)), "nobody waits for it");
        assert_eq!(drain(&mut ledger), [20]);
        ledger.acknowledge(StepId(3));
        ledger.keep(StepId(3), 30);
        assert_eq!(drain(&mut ledger), [0; 0], "acknowledged before it was computed");
    }

    #[test]
    fn a_step_is_of_the_latest_reign_in_which_it_came() {
        let mut ledger = Ledger::new(2);
        ledger.came_in(StepId(1), Term(9));
        assert_eq!(ledger.term(StepId(1)), Term(0), "it is not known");
        for (term, latest) in [(3, 3), (8, 8), (5, 8)] {
            ledger.arrive(StepId(1), StepId(0));
            ledger.came_in(StepId(1), Term(term));
            assert_eq!(ledger.term(StepId(1)), Term(latest));
            ledger.keep(StepId(1), 10);
        }
        ledger.arrive(StepId(2), StepId(1));
        ledger.came_in(StepId(2), Term(8));
        assert_eq!(ledger.terms.len(), 1, "forgotten with its step");
        ledger.withdraw(StepId(2));
        assert!(ledger.terms.is_empty());
    }

    #[test]
    fn what_was_never_sent_is_neither_taken_nor_acknowledged() {
        let mut ledger = Ledger::<u64>::new(2);
        let highest = ledger.check(StepId(u64::MAX), StepId(u64::MAX - 1));
        let last = StepId(0);
        assert_eq!(highest, Err(OutOfOrder::Unsent { acked: StepId(u64::MAX - 1), last }));
        let (found, most) = (StepId(5), StepId(4));
        let ahead = ledger.check(found, StepId(0));
        assert_eq!(ahead, Err(OutOfOrder::Ahead { found, most, limit: 2 }));
        assert_eq!(ledger.check(StepId(4), StepId(0)), Ok(()), "others may be late or lost");
        assert_eq!(ledger.arrive(StepId(1), StepId(0)), Arrival::New);
        assert!(ledger.check(StepId(3), StepId(2)).is_err(), "2 has not come");
        assert_eq!(ledger.check(StepId(2), StepId(1)), Ok(()));
        assert_eq!(ledger.arrive(StepId(2), StepId(1)), Arrival::New, "nothing was acknowledged");
    }

    #[test]
    fn a_damaged_output_is_sent_again_once() {
        let mut ledger = Ledger::new(4);
        for step in [1, 2] {
            ledger.arrive(StepId(step), StepId(0));
            assert!(!ledger.repair(StepId(step)), "there is nothing yet");
            ledger.keep(StepId(step), step);
        }
        assert_eq!(drain(&mut ledger), [1, 2]);
        // Two that never get through take turns.
        assert!(ledger.repair(StepId(1)) && ledger.repair(StepId(2)));
        assert_eq!(drain(&mut ledger), [1, 2]);
        assert!(!ledger.repair(StepId(1)) && !ledger.repair(StepId(2)));
        ledger.resend_all();
        assert_eq!(drain(&mut ledger), [1, 2], "a new connection gets it all the same");
        assert!(!ledger.repair(StepId(1)));
    }

    proptest! {
        /// Whatever arrives: each step is computed at most once while it is not acknowledged, the
        /// limit holds, and every output that is kept can be had again.
        #[test]
        fn never_computes_twice_nor_keeps_too_much(
            events in prop::collection::vec((1u64..20, 0u64..20, any::<bool>()), 1..200)
        ) {
            let mut ledger = Ledger::new(4);
            let mut computed = std::collections::BTreeSet::new();
            let mut pending = std::collections::BTreeSet::new();
            for (step, acked, finish) in events {
                let acked = acked.min(step - 1);
                if ledger.check(StepId(step), StepId(acked)).is_err() {
                    continue;
                }
                match ledger.arrive(StepId(step), StepId(acked)) {
                    Arrival::New => {
                        prop_assert!(computed.insert(step), "{step} is computed once");
                        pending.insert(step);
                    }
                    Arrival::Busy => prop_assert_eq!(ledger.steps.len(), 4),
                    Arrival::Acknowledged => prop_assert!(StepId(step) <= ledger.acked()),
                    Arrival::Pending | Arrival::Again => prop_assert!(computed.contains(&step)),
                }
                if finish && let Some(step) = pending.pop_first() {
                    ledger.keep(StepId(step), step);
                }
                prop_assert!(ledger.steps.len() <= 4);
                let kept = ledger.steps.iter().filter(|(_, e)| matches!(e, Entry::Kept { .. }));
                let kept: Vec<u64> = kept.map(|(step, _)| step.0).collect();
                ledger.resend_all();
                prop_assert_eq!(drain(&mut ledger), kept);
            }
        }
    }
}
