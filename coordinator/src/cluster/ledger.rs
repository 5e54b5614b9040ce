//! What is written in the registry, under which term, and the questions about it: the only writer
//! of plans. Questions are numbered, and only the answer to the open one counts.
//!
//! ```text
//! term gained        answer             write             answer
//! ──────────▶ unknown ─read─▶ known at R ────▶ R unchanged? ────▶ known at R'
//!                ▲                                 │ conflict, no answer
//!                └─────────────────────────────────┘
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use proto::ids::{Epoch, PipelineId, PipelineRef, Term};
use proto::plan::{PipelinePlan, Plan};

use super::backoff;
use super::types::{Action, Found, Ticket};
use crate::tick::Tick;

/// A question without an answer for so long is asked again: whoever carried it is gone. Longer
/// than the registry's own timeouts.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Terms of this process that are remembered, to know its own plans by.
const OWN_TERMS: usize = 64;

#[derive(Debug)]
pub(super) struct Ledger {
    term: Option<Term>,
    /// Terms that this process has had, the last ones.
    own_terms: BTreeSet<Term>,
    /// The highest revision of the registry that was seen in any answer or term.
    highest: u64,
    /// The highest mod-revision of the plan that was read or written.
    highest_plan: u64,
    state: State,
    /// The plan as it was last read or written, with epochs filled in.
    plan: Option<Plan>,
    failed_reads: u32,
    read_error: Option<String>,
    /// Why the registry is of no use.
    unusable: Option<String>,
    last_ticket: u64,
}

#[derive(Debug)]
enum State {
    /// Must be read, not before this moment. A write may have been made before.
    Unknown {
        due: Tick,
        written: Option<Box<Write>>,
    },
    Reading {
        ticket: Ticket,
        since: Tick,
        written: Option<Box<Write>>,
    },
    /// Mod-revision of what is there.
    Known(Option<u64>),
    Writing {
        ticket: Ticket,
        since: Tick,
        write: Box<Write>,
    },
}

/// A plan that may have been written.
#[derive(Debug)]
pub(super) struct Write {
    plan: Plan,
    previous: Option<u64>,
}

/// What an answer means.
#[derive(Debug)]
pub(super) enum Answer {
    /// Nothing: another question's.
    Ignored,
    /// The plan is known.
    Read {
        /// This process wrote it, in this reign or an earlier one.
        is_own: bool,
        /// A write was on its way, and it was not made.
        write_failed: bool,
    },
    /// Our plan is written, with its epochs filled in.
    Written(Plan),
    /// The registry is of no use: another one, or an older state.
    Unusable(String),
    /// It could not be asked, or nobody knows what came of a write: it is read again.
    Failed,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            term: None,
            own_terms: BTreeSet::new(),
            highest: 0,
            highest_plan: 0,
            state: State::Unknown { due: Tick::ZERO, written: None },
            plan: None,
            failed_reads: 0,
            read_error: None,
            unusable: None,
            last_ticket: 0,
        }
    }

    /// The reign; `None` if this coordinator does not lead.
    pub(super) fn term(&self) -> Option<Term> {
        self.term
    }

    /// Whether this process ever had a term.
    pub(super) fn has_led(&self) -> bool {
        !self.own_terms.is_empty()
    }

    /// The reign and the plan's revision, when both are known and no write is on its way.
    pub(super) fn ready(&self) -> Option<(Term, Option<u64>)> {
        match (self.term, &self.state) {
            (Some(term), State::Known(revision)) => Some((term, *revision)),
            _ => None,
        }
    }

    pub(super) fn is_writing(&self) -> bool {
        match &self.state {
            State::Writing { .. } => true,
            State::Unknown { written, .. } | State::Reading { written, .. } => written.is_some(),
            State::Known(_) => false,
        }
    }

    /// The plan as it was last read or written, with epochs filled in.
    pub(super) fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// Why the plan is not known, once reading it failed.
    pub(super) fn read_error(&self) -> Option<&str> {
        self.read_error.as_deref()
    }

    /// Why the registry is of no use to this process.
    pub(super) fn unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    /// A stage of a pipeline as it is known from the plan.
    pub(super) fn pipeline(&self, at: PipelineRef) -> Option<&PipelinePlan> {
        self.plan.as_ref()?.pipelines.iter().find(|pipeline| pipeline.at() == at)
    }

    /// The number of a new question.
    pub(super) fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }

    /// This process leads.
    ///
    /// # Errors
    ///
    /// Why the term is of no use: terms and revisions count the writes to one registry.
    pub(super) fn term_gained(&mut self, now: Tick, term: Term) -> Result<(), String> {
        if term.0 < self.highest {
            let detail = format!(
                "the registry went back: this coordinator was given term {term} after it had seen \
                 revision {}",
                self.highest
            );
            return Err(self.give_up(detail));
        }
        self.highest = term.0;
        self.unusable = None;
        self.term = Some(term);
        self.own_terms.insert(term);
        if self.own_terms.len() > OWN_TERMS {
            self.own_terms.pop_first();
        }
        self.read_again(now);
        Ok(())
    }

    pub(super) fn term_lost(&mut self) {
        self.term = None;
    }

    /// What is written must be read before anything else is.
    pub(super) fn read_again(&mut self, due: Tick) {
        let state = std::mem::replace(&mut self.state, State::Known(None));
        let written = match state {
            State::Unknown { written, .. } | State::Reading { written, .. } => written,
            State::Writing { write, .. } => Some(write),
            State::Known(_) => None,
        };
        self.state = State::Unknown { due, written };
    }

    fn give_up(&mut self, detail: String) -> String {
        self.term = None;
        self.unusable = Some(detail.clone());
        detail
    }

    fn is_open(&self, answered: Ticket) -> bool {
        match &self.state {
            State::Reading { ticket, .. } | State::Writing { ticket, .. } => *ticket == answered,
            State::Unknown { .. } | State::Known(_) => false,
        }
    }

    pub(super) fn read(&mut self, now: Tick, ticket: Ticket, found: Found) -> Answer {
        if !self.is_open(ticket) || !matches!(self.state, State::Reading { .. }) {
            return Answer::Ignored;
        }
        self.read_again(now);
        let Some(term) = self.term else { return Answer::Failed };
        let State::Unknown { written, .. } = std::mem::replace(&mut self.state, State::Known(None))
        else {
            return Answer::Ignored;
        };
        (self.failed_reads, self.read_error) = (0, None);
        let (revision, plan) = match found {
            Found::Nothing => (None, None),
            // Only its revision matters: a plan takes its place.
            Found::Unreadable { revision, .. } => (Some(revision), None),
            Found::Plan { revision, plan } => (Some(revision), Some(plan)),
        };
        self.state = State::Known(revision);
        if let Some(revision) = revision {
            if revision < self.highest_plan {
                let detail = format!(
                    "the registry went back: its plan is of revision {revision} after one of \
                     revision {} was there",
                    self.highest_plan
                );
                return Answer::Unusable(self.give_up(detail));
            }
            self.highest = self.highest.max(revision);
            self.highest_plan = revision;
        }
        if let Some(plan) = plan.as_ref().filter(|plan| plan.term > term) {
            let detail = format!(
                "the plan in the registry is of term {}, this coordinator leads at term {term} only",
                plan.term
            );
            return Answer::Unusable(self.give_up(detail));
        }
        let is_own = plan.as_ref().is_some_and(|plan| self.own_terms.contains(&plan.term));
        let is_written = match (&written, &plan, revision) {
            (Some(write), Some(found), Some(_)) => {
                same_plan(found, &write.plan) && revision != write.previous
            }
            _ => false,
        };
        self.plan = plan.zip(revision).map(|(plan, revision)| with_epochs(plan, revision));
        match &self.plan {
            Some(plan) if is_written => Answer::Written(plan.clone()),
            _ => Answer::Read { is_own, write_failed: written.is_some() },
        }
    }

    pub(super) fn read_failed(&mut self, now: Tick, ticket: Ticket, detail: &str) -> Answer {
        if !self.is_open(ticket) {
            return Answer::Ignored;
        }
        self.read_error = Some(format!("the plan cannot be read: {detail}"));
        self.read_again(now + backoff(self.failed_reads));
        self.failed_reads = self.failed_reads.saturating_add(1);
        Answer::Failed
    }

    /// A plan that changes what serves. Only when [`Self::ready`].
    pub(super) fn write(&mut self, now: Tick, plan: Plan, actions: &mut Vec<Action>) {
        let Some((term, previous)) = self.ready() else { return };
        let ticket = self.ticket();
        actions.push(Action::WritePlan { ticket, term, previous, plan: plan.clone() });
        let write = Box::new(Write { plan, previous });
        self.state = State::Writing { ticket, since: now, write };
    }

    pub(super) fn written(&mut self, ticket: Ticket, revision: u64) -> Answer {
        if !self.is_open(ticket) {
            return Answer::Ignored;
        }
        let State::Writing { write, .. } = std::mem::replace(&mut self.state, State::Known(None))
        else {
            return Answer::Ignored;
        };
        if revision <= self.highest {
            let detail = format!(
                "the registry went back: a plan was written at revision {revision} after revision \
                 {} had been seen",
                self.highest
            );
            self.state = State::Unknown { due: Tick::ZERO, written: None };
            return Answer::Unusable(self.give_up(detail));
        }
        (self.highest, self.highest_plan) = (revision, revision);
        self.state = State::Known(Some(revision));
        let plan = with_epochs(write.plan, revision);
        self.plan = Some(plan.clone());
        Answer::Written(plan)
    }

    /// Another term or plan was there, or nobody knows: reading back tells who wrote what.
    pub(super) fn not_known(&mut self, now: Tick, ticket: Ticket) -> Answer {
        if !self.is_open(ticket) {
            return Answer::Ignored;
        }
        self.read_again(now);
        Answer::Failed
    }

    /// Questions that are due.
    pub(super) fn advance(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let since = match &self.state {
            State::Reading { since, .. } | State::Writing { since, .. } => Some(*since),
            State::Unknown { .. } | State::Known(_) => None,
        };
        if since.is_some_and(|since| now.since(since) > QUESTION_TIMEOUT) {
            self.read_error = Some("the registry does not answer".to_owned());
            self.read_again(now);
        }
        if let (Some(_), State::Unknown { due, written }) = (self.term, &mut self.state)
            && now >= *due
        {
            let written = written.take();
            let ticket = self.ticket();
            self.state = State::Reading { ticket, since: now, written };
            actions.push(Action::ReadPlan { ticket });
        }
    }

    /// An id that no pipeline of the plan has.
    pub(super) fn highest_pipeline(&self) -> PipelineId {
        let ids = self.plan.iter().flat_map(|plan| &plan.pipelines).map(|pipeline| pipeline.id);
        ids.max().unwrap_or_default()
    }
}

/// The plan with its own revision for the epochs of pipelines that it changed.
fn with_epochs(mut plan: Plan, revision: u64) -> Plan {
    for pipeline in plan.pipelines.iter_mut().filter(|pipeline| pipeline.epoch == Epoch(0)) {
        pipeline.epoch = Epoch(revision);
    }
    plan
}

/// Whether two plans say the same. Predicted rates are left out: a float that went through JSON
/// may differ in its last bit.
fn same_plan(a: &Plan, b: &Plan) -> bool {
    let said = |plan: &Plan| {
        let pipelines = plan.pipelines.iter();
        (
            plan.term,
            plan.drains.clone(),
            pipelines
                .map(|p| (p.at(), p.model, p.kv_type, p.class, p.stages.clone(), p.kv_blocks))
                .collect::<Vec<_>>(),
        )
    };
    said(a) == said(b)
}
