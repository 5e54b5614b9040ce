//! The way of steps to the workers and of results back: two links, and what was sent and not
//! answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::Histogram;
use proto::ids::{PipelineRef, StepId, Term};
use proto::key::CoordinatorKey;
use proto::plan::StagePlan;
use proto::step::{RowValue, StageTime, Step, StepReply, StepResult, StepVerdict};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::scheduler::PipelineShape;
use crate::workers::{LinkEvent, LinkId, ResultsLink, ResultsWanted, SentStep, StepsLink};

/// The most that one step's times move the mean of its stage.
const STAGE_TIME_WEIGHT: f64 = 0.1;

/// How often each stage may refuse a step as of an earlier reign of this coordinator after that has
/// ended: what was on its way to it, and what a link that was opened again had sent again. More often
/// somebody else rules there.
const FENCES_PER_STAGE: u32 = 2;

/// Opens links. A trait, so that a lane can be tried without workers.
pub(in crate::driver) trait Wire: Send {
    fn steps(&self, id: LinkId, address: &str, events: &mpsc::Sender<LinkEvent>) -> StepsLink;

    fn results(
        &self,
        id: LinkId,
        address: &str,
        wanted: ResultsWanted,
        events: &mpsc::Sender<LinkEvent>,
    ) -> ResultsLink;
}

/// Links to workers, which are shown this key.
pub(in crate::driver) struct ToWorkers(pub(in crate::driver) CoordinatorKey);

impl Wire for ToWorkers {
    fn steps(&self, id: LinkId, address: &str, events: &mpsc::Sender<LinkEvent>) -> StepsLink {
        StepsLink::open(id, self.0, address.to_owned(), events.clone())
    }

    fn results(
        &self,
        id: LinkId,
        address: &str,
        wanted: ResultsWanted,
        events: &mpsc::Sender<LinkEvent>,
    ) -> ResultsLink {
        ResultsLink::open(id, self.0, address.to_owned(), wanted, events.clone())
    }
}

/// What a link's event comes to.
pub(super) enum Heard {
    Nothing,
    Result(StepResult),
    /// A stage is not reached.
    Broken {
        stage: u32,
        detail: String,
    },
    /// What a stage computed cannot be of the model that is served.
    Strange {
        stage: u32,
        detail: String,
    },
    /// Somebody newer rules a stage.
    Fenced {
        detail: String,
    },
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The way of steps and results of one pipeline.
pub(super) struct Path {
    shape: PipelineShape,
    stages: Vec<StagePlan>,
    wire: Box<dyn Wire>,
    events: mpsc::Sender<LinkEvent>,
    /// `None` while it is broken.
    steps: Option<StepsLink>,
    /// `None` while it is broken.
    results: Option<ResultsLink>,
    last_link: u64,
    /// Sent, and no result yet.
    unanswered: BTreeMap<StepId, Sent>,
    last_sent: StepId,
    stage_times: Vec<StageMeans>,
    trips: Trips,
    /// Of its lane, for metrics.
    slot: u32,
    histograms: Vec<(Histogram, Histogram)>,
    /// Of whole rounds, and of what is added in them to computing.
    rounds: (Histogram, Histogram),
    /// Token ids are below.
    vocab: u32,
}

struct Sent {
    step: SentStep,
    /// For the first time.
    at: Instant,
    /// It arrived damaged once.
    damaged: bool,
    /// A stage refused it for now, or one before it: it is sent again at the next tick, in order.
    again: bool,
    /// It was sent in an earlier reign: so often a stage may refuse it for that and gets it again.
    fences_left: u32,
}

/// Where the times of each stage are counted.
fn histograms(slot: u32, stages: &[StagePlan]) -> Vec<(Histogram, Histogram)> {
    let numbers = 0..stages.len() as u32;
    numbers.map(|stage| crate::metrics::stage_times(slot, stage)).collect()
}

/// Moving means over steps, and sums over all of the epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::driver) struct StageMeans {
    pub(in crate::driver) compute_ms: f64,
    pub(in crate::driver) wait_ms: f64,
    pub(in crate::driver) steps: u64,
    pub(in crate::driver) busy_ms: f64,
    pub(in crate::driver) waited_ms: f64,
}

/// Steps of the epoch that came back.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::driver) struct Trips {
    pub(in crate::driver) steps: u64,
    /// From the sending of each to its result, in all.
    pub(in crate::driver) on_way_ms: f64,
}

impl Path {
    pub(super) fn new(
        shape: PipelineShape,
        stages: Vec<StagePlan>,
        slot: u32,
        wire: Box<dyn Wire>,
        events: mpsc::Sender<LinkEvent>,
    ) -> Self {
        Self {
            shape,
            stage_times: vec![StageMeans::default(); stages.len()],
            trips: Trips::default(),
            slot,
            histograms: histograms(slot, &stages),
            rounds: crate::metrics::step_times(),
            stages,
            wire,
            events,
            steps: None,
            results: None,
            last_link: 0,
            unanswered: BTreeMap::new(),
            last_sent: StepId(0),
            vocab: u32::MAX,
        }
    }

    /// Results with other token ids than `0..vocab` are no results.
    pub(super) fn with_vocab(self, vocab: u32) -> Self {
        Self { vocab, ..self }
    }

    /// Opens both links.
    pub(super) fn open(&mut self) {
        self.open_results();
        self.open_steps();
    }

    /// Closes both, and forgets what was sent.
    pub(super) fn close(&mut self) {
        (self.steps, self.results) = (None, None);
        self.unanswered.clear();
    }

    /// Another epoch: steps are numbered anew.
    pub(super) fn switch(&mut self, shape: PipelineShape, stages: Vec<StagePlan>) {
        self.close();
        self.stage_times = vec![StageMeans::default(); stages.len()];
        self.trips = Trips::default();
        self.histograms = histograms(self.slot, &stages);
        (self.shape, self.stages) = (shape, stages);
        self.last_sent = StepId(0);
        self.open();
    }

    pub(super) fn stage_times(&self) -> &[StageMeans] {
        &self.stage_times
    }

    pub(super) fn trips(&self) -> Trips {
        self.trips
    }

    /// What is sent again is sent in this reign.
    pub(super) fn set_term(&mut self, term: Term) {
        self.shape.term = term;
        let fences_left = self.shape.stages.saturating_mul(FENCES_PER_STAGE);
        for sent in self.unanswered.values_mut() {
            Arc::make_mut(&mut sent.step.step).header.term = term;
            sent.fences_left = fences_left;
        }
    }

    pub(super) fn send(&mut self, step: Step, deadline: Instant) {
        let number = step.header.step;
        let step = SentStep { step: Arc::new(step), deadline };
        // Not past one that was refused and is sent again: its rows may go on from that one's.
        let again = self.unanswered.values().any(|sent| sent.again);
        if !again && let Some(link) = &self.steps {
            link.send(step.clone());
        }
        self.last_sent = number;
        let at = Instant::now();
        let sent = Sent { step, at, damaged: false, again, fences_left: 0 };
        self.unanswered.insert(number, sent);
    }

    /// Sends again what a stage refused for now, and what waits behind it.
    pub(super) fn retry(&mut self) {
        let Some(link) = &self.steps else { return };
        for sent in self.unanswered.values_mut().filter(|sent| sent.again) {
            sent.again = false;
            link.send(sent.step.clone());
        }
    }

    /// Opens again the links that touch a stage and are broken.
    pub(super) fn reconnect(&mut self, stage: u32) {
        // Results first: what they bring need not be sent again.
        if stage == self.last_stage() && self.results.is_none() {
            self.open_results();
        }
        if stage == 0 && self.steps.is_none() {
            self.open_steps();
        } else if stage != 0 && self.steps.is_some() {
            // A link between stages lost what it carried: the first stage passes it on again.
            self.resend();
        }
    }

    /// Takes what a link says, unless the link is not in use any more.
    pub(super) fn take(&mut self, event: LinkEvent) -> Heard {
        let steps = |id: LinkId| self.steps.as_ref().is_some_and(|link| link.id == id);
        let results = |id: LinkId| self.results.as_ref().is_some_and(|link| link.id == id);
        let pipeline = self.at();
        match event {
            LinkEvent::Reply { link, reply } if steps(link) => self.on_reply(reply),
            LinkEvent::Result { link, result } if results(link) => self.on_result(result),
            LinkEvent::Broken { link, detail } if steps(link) => {
                self.steps = None;
                tracing::info!(%pipeline, stage = 0, detail, "steps link broke");
                Heard::Broken { stage: 0, detail }
            }
            LinkEvent::Broken { link, detail } if results(link) => {
                let stage = self.last_stage();
                self.results = None;
                tracing::info!(%pipeline, stage, detail, "results link broke");
                Heard::Broken { stage, detail }
            }
            LinkEvent::Reply { .. } | LinkEvent::Result { .. } | LinkEvent::Broken { .. } => {
                Heard::Nothing
            }
        }
    }

    fn on_result(&mut self, result: StepResult) -> Heard {
        if result.epoch != self.shape.epoch {
            return Heard::Nothing;
        }
        if let Some(token) = beyond(self.vocab, &result) {
            // Nothing of it is believed: whoever drew these may be wrong elsewhere too.
            let sent = self.unanswered.get(&result.step);
            let stage = match sent.is_some_and(|sent| sent.step.step.is_draw()) {
                true => 0,
                false => self.last_stage(),
            };
            let vocab = self.vocab;
            let detail = format!("token {token} came back, the vocabulary has {vocab}");
            return Heard::Strange { stage, detail };
        }
        if let Some(sent) = self.unanswered.remove(&result.step) {
            let round = sent.at.elapsed();
            self.trips.steps += 1;
            self.trips.on_way_ms += ms(round);
            self.rounds.0.record(round);
            self.rounds.1.record(added(round, &result.stage_times));
            for time in &result.stage_times {
                self.count(time);
            }
        }
        Heard::Result(result)
    }

    fn count(&mut self, time: &StageTime) {
        let stage = time.stage as usize;
        if let Some((compute, wait)) = self.histograms.get(stage) {
            compute.record(time.compute);
            wait.record(time.wait);
        }
        if let Some(means) = self.stage_times.get_mut(stage) {
            means.compute_ms += STAGE_TIME_WEIGHT * (ms(time.compute) - means.compute_ms);
            means.steps += 1;
            means.busy_ms += ms(time.compute);
            means.waited_ms += ms(time.wait);
            means.wait_ms += STAGE_TIME_WEIGHT * (ms(time.wait) - means.wait_ms);
        }
    }

    fn on_reply(&mut self, reply: StepReply) -> Heard {
        let pipeline = self.at();
        let StepReply { step, stage, verdict, detail, .. } = reply;
        if verdict != StepVerdict::Accepted {
            tracing::info!(%pipeline, %step, stage, ?verdict, detail, "stage refused a step");
        }
        let sent = self.unanswered.get_mut(&step);
        match verdict {
            StepVerdict::Accepted => Heard::Nothing,
            StepVerdict::Busy => {
                if let Some(sent) = sent {
                    sent.again = true;
                }
                Heard::Nothing
            }
            StepVerdict::Corrupt => {
                let Some(sent) = sent else { return Heard::Nothing };
                // A later stage has had it twice from the one before it.
                if std::mem::replace(&mut sent.damaged, true) || stage > 0 {
                    return self.refused(stage, detail);
                }
                if let Some(link) = &self.steps {
                    link.send(sent.step.clone());
                }
                Heard::Nothing
            }
            StepVerdict::Fenced => {
                // Sent in a reign of this coordinator that has ended, and a worker has heard of the
                // next one.
                if let Some(sent) = sent
                    && let Some(left) = sent.fences_left.checked_sub(1)
                {
                    (sent.fences_left, sent.again) = (left, true);
                    return Heard::Nothing;
                }
                Heard::Fenced { detail }
            }
            StepVerdict::NotPrepared | StepVerdict::Invalid => self.refused(stage, detail),
            // Any number may come from a worker.
            StepVerdict::DownstreamLost => Heard::Broken { stage: stage.saturating_add(1), detail },
        }
    }

    /// A stage took a step for no good: what leads to it is opened again. The link to the first stage is
    /// given up for that, so that it is opened and everything sent again in order.
    fn refused(&mut self, stage: u32, detail: String) -> Heard {
        if stage == 0 {
            self.steps = None;
        }
        Heard::Broken { stage, detail }
    }

    fn at(&self) -> PipelineRef {
        PipelineRef { id: self.shape.pipeline, epoch: self.shape.epoch }
    }

    fn last_stage(&self) -> u32 {
        self.shape.stages.saturating_sub(1)
    }

    /// Results up to this one are known.
    fn known_results(&self) -> StepId {
        let oldest = self.unanswered.keys().next();
        oldest.map_or(self.last_sent, |step| StepId(step.0.saturating_sub(1)))
    }

    fn open_steps(&mut self) {
        let id = self.next_link();
        let Some(first) = self.stages.first() else { return };
        self.steps = Some(self.wire.steps(id, &first.address, &self.events));
        self.resend();
    }

    fn open_results(&mut self) {
        let id = self.next_link();
        let Some(last) = self.stages.last() else { return };
        let wanted = ResultsWanted {
            pipeline: self.shape.pipeline,
            epoch: self.shape.epoch,
            term: self.shape.term,
            incarnation: last.incarnation,
            after_step: self.known_results(),
        };
        self.results = Some(self.wire.results(id, &last.address, wanted, &self.events));
    }

    /// The stages know by their numbers what they have computed.
    fn resend(&mut self) {
        let Some(link) = &self.steps else { return };
        for sent in self.unanswered.values_mut() {
            sent.again = false;
            link.send(sent.step.clone());
        }
    }

    fn next_link(&mut self) -> LinkId {
        self.last_link += 1;
        LinkId(self.last_link)
    }
}

/// A token of a result that is not below `vocab`, if it has any.
fn beyond(vocab: u32, result: &StepResult) -> Option<u32> {
    let sampled = result.rows.iter().filter_map(|row| match &row.value {
        RowValue::Sampled(sampled) => Some(sampled),
        _ => None,
    });
    let mut tokens = sampled.flat_map(|sampled| {
        let top = sampled.top.iter().map(|top| top.token);
        std::iter::once(sampled.token).chain(top)
    });
    tokens.find(|&token| token >= vocab)
}

/// What is added to computing in one step's round: carrying, queues, waking up. A step that waits while
/// a stage computes those before it is not held up by any of that.
fn added(round: Duration, times: &[StageTime]) -> Duration {
    let own = |time: &StageTime| time.compute.saturating_add(time.behind);
    times.iter().fold(round, |left, time| left.saturating_sub(own(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_neither_computing_nor_waiting_for_others_to_be_computed() {
        let ms = Duration::from_millis;
        let time = |compute, wait, behind| StageTime {
            stage: 0,
            compute: ms(compute),
            wait: ms(wait),
            behind: ms(behind),
        };
        assert_eq!(added(ms(20), &[]), ms(20));
        assert_eq!(added(ms(20), &[time(4, 3, 2), time(5, 1, 0)]), ms(9));
        assert_eq!(added(ms(20), &[time(15, 9, 9)]), ms(0), "clocks of others may be wrong");
        let forever = StageTime { compute: Duration::MAX, behind: Duration::MAX, ..time(0, 0, 0) };
        assert_eq!(added(ms(20), &[forever]), ms(0));
    }
}
