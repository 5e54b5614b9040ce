//! PURE. The steps of one epoch at one stage: which are known, what they gave, and what of it is
//! still to be sent. An output is kept until a later step acknowledges it, so that a step which
//! comes again is answered with the same bytes and computed no second time.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::StepId;

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

#[derive(Debug)]
enum Entry<T> {
    Pending,
    Kept(T),
}

/// `T` is what a step gives: the step for the next stage, or the result.
#[derive(Debug)]
pub(crate) struct Ledger<T> {
    /// The most steps that may be known and not acknowledged.
    limit: usize,
    /// This step and all before it are acknowledged.
    acked: StepId,
    steps: BTreeMap<StepId, Entry<T>>,
    /// Kept outputs that are to be sent, in the order of their numbers.
    outbox: BTreeSet<StepId>,
}

impl<T> Ledger<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, acked: StepId::default(), steps: BTreeMap::new(), outbox: BTreeSet::new() }
    }

    /// Notes a step and what it acknowledges. `acked` is less than `step`.
    pub(crate) fn arrive(&mut self, step: StepId, acked: StepId) -> Arrival {
        debug_assert!(acked < step, "a step cannot acknowledge itself");
        self.acknowledge(acked);
        if step <= self.acked {
            return Arrival::Acknowledged;
        }
        match self.steps.get(&step) {
            Some(Entry::Pending) => Arrival::Pending,
            Some(Entry::Kept(_)) => {
                self.outbox.insert(step);
                Arrival::Again
            }
            None if self.steps.len() >= self.limit => Arrival::Busy,
            None => {
                self.steps.insert(step, Entry::Pending);
                Arrival::New
            }
        }
    }

    /// Takes back an arrival that could not be handed on.
    pub(crate) fn withdraw(&mut self, step: StepId) {
        self.steps.remove(&step);
    }

    /// Keeps what a step gave and queues it. Not if it was acknowledged meanwhile.
    pub(crate) fn keep(&mut self, step: StepId, output: T) {
        if step > self.acked {
            self.steps.insert(step, Entry::Kept(output));
            self.outbox.insert(step);
        }
    }

    /// Everything up to `acked` needs no keeping any more.
    pub(crate) fn acknowledge(&mut self, acked: StepId) {
        if acked > self.acked {
            self.acked = acked;
            let after = StepId(acked.0.saturating_add(1));
            self.steps = self.steps.split_off(&after);
            self.outbox = self.outbox.split_off(&after);
        }
    }

    /// Queues everything that is kept: a new connection knows nothing.
    pub(crate) fn resend_all(&mut self) {
        self.resend_after(StepId::default());
    }

    /// Queues what is kept of the steps after `after`, and nothing else.
    pub(crate) fn resend_after(&mut self, after: StepId) {
        let kept = self.steps.iter().filter(|(_, entry)| matches!(entry, Entry::Kept(_)));
        self.outbox = kept.map(|(&step, _)| step).filter(|&step| step > after).collect();
    }

    /// Queues one kept output again.
    pub(crate) fn resend(&mut self, step: StepId) {
        if matches!(self.steps.get(&step), Some(Entry::Kept(_))) {
            self.outbox.insert(step);
        }
    }

    /// The next output to send; it stays kept.
    pub(crate) fn next_to_send(&mut self) -> Option<&T> {
        let step = self.outbox.pop_first()?;
        match self.steps.get(&step) {
            Some(Entry::Kept(output)) => Some(output),
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
        ledger.resend(StepId(1));
        assert_eq!(drain(&mut ledger), [20]);
        ledger.acknowledge(StepId(3));
        ledger.keep(StepId(3), 30);
        assert_eq!(drain(&mut ledger), [0; 0], "acknowledged before it was computed");
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
                let kept = ledger.steps.iter().filter(|(_, e)| matches!(e, Entry::Kept(_)));
                let kept: Vec<u64> = kept.map(|(step, _)| step.0).collect();
                ledger.resend_all();
                prop_assert_eq!(drain(&mut ledger), kept);
            }
        }
    }
}
