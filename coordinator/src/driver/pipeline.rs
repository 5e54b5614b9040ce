//! The pipeline that serves: its links, the steps on their way, and its self-test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{Epoch, NumericsClass, SequenceId, StepId};
use proto::plan::PipelinePlan;
use proto::step::{SamplingParameters, StepReply, StepResult, StepVerdict};

use super::{Driver, LinkEvent};
use crate::cluster;
use crate::metrics;
use crate::scheduler::{Class, EmissionEvent, PipelineShape, Request, Running};
use crate::tick::Tick;
use crate::workers::{LinkId, ResultsLink, ResultsWanted, SentStep, StepsLink};

/// Between self-tests that failed.
const SELF_TEST_PAUSE: Duration = Duration::from_secs(1);

/// The most that one step's times move the mean of its stage.
const STAGE_TIME_WEIGHT: f64 = 0.1;

/// The pipeline that serves.
pub(super) struct Pipeline {
    pub(super) shape: PipelineShape,
    pub(super) plan: PipelinePlan,
    pub(super) class: NumericsClass,
    /// `None` while it is broken.
    steps: Option<StepsLink>,
    /// `None` while it is broken.
    results: Option<ResultsLink>,
    /// Sent, and no result yet.
    unanswered: BTreeMap<StepId, Sent>,
    last_sent: StepId,
    pub(super) stage_times: Vec<StageMeans>,
    self_test: SelfTest,
}

struct Sent {
    step: SentStep,
    /// It arrived damaged once.
    damaged: bool,
    /// The first stage had no room; it is sent again at the next tick.
    again: bool,
}

enum SelfTest {
    Due(Tick),
    Running(SequenceId),
    Passed,
}

/// Moving means over steps, and sums over all of the epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StageMeans {
    pub(super) compute_ms: f64,
    pub(super) wait_ms: f64,
    pub(super) steps: u64,
    pub(super) busy_ms: f64,
}

impl Pipeline {
    pub(super) fn epoch(&self) -> Epoch {
        self.shape.epoch
    }

    fn last_stage(&self) -> u32 {
        self.shape.stages.saturating_sub(1)
    }

    /// Results up to this one are known.
    fn known_results(&self) -> StepId {
        let oldest = self.unanswered.keys().next();
        oldest.map_or(self.last_sent, |step| StepId(step.0.saturating_sub(1)))
    }
}

impl Driver {
    /// Opens the links of a pipeline that is active, and tests it.
    pub(super) fn serve(&mut self, shape: PipelineShape, plan: PipelinePlan, class: NumericsClass) {
        tracing::info!(epoch = %shape.epoch, stages = shape.stages, %class, "pipeline is active");
        let now = self.now();
        let reason = Running::Fail("the pipeline was replaced".into());
        let emissions = self.scheduler.set_pipeline(shape, reason, now);
        self.ready.send_replace(false);
        self.no_plan = None;
        self.pipeline = Some(Pipeline {
            shape,
            stage_times: vec![StageMeans::default(); plan.stages.len()],
            plan,
            class,
            steps: None,
            results: None,
            unanswered: BTreeMap::new(),
            last_sent: StepId(0),
            self_test: SelfTest::Due(now),
        });
        self.emit(emissions);
        self.open_results();
        self.open_steps();
        self.test_pipeline();
        self.admit_parked();
    }

    /// Opens again the links that touch a stage and are broken.
    pub(super) fn reconnect(&mut self, epoch: Epoch, stage: u32) {
        let Some(pipeline) = self.pipeline.as_ref().filter(|p| p.epoch() == epoch) else { return };
        let (last, steps_broken, results_broken) =
            (pipeline.last_stage(), pipeline.steps.is_none(), pipeline.results.is_none());
        // Results first: what they bring need not be sent again.
        if stage == last && results_broken {
            self.open_results();
        }
        if stage == 0 && steps_broken {
            self.open_steps();
        } else if stage != 0 && !steps_broken {
            // A link between stages lost what it carried: the first stage passes it on again.
            self.resend_unanswered();
        }
    }

    /// Sends every step that the scheduler has ready.
    pub(super) fn send_steps(&mut self) {
        while let Some(pipeline) = &mut self.pipeline {
            let now = Tick(self.started.elapsed());
            let Some(scheduled) = self.scheduler.next_step(now) else { break };
            let number = scheduled.step.header.step;
            let deadline = self.started + scheduled.deadline.0;
            let step = SentStep { step: Arc::new(scheduled.step), deadline };
            if let Some(link) = &pipeline.steps {
                link.send(step.clone());
            }
            pipeline.last_sent = number;
            pipeline.unanswered.insert(number, Sent { step, damaged: false, again: false });
        }
    }

    /// Sends again what the first stage had no room for.
    pub(super) fn retry_steps(&mut self) {
        let Some(pipeline) = &mut self.pipeline else { return };
        let Some(link) = &pipeline.steps else { return };
        for sent in pipeline.unanswered.values_mut().filter(|sent| sent.again) {
            sent.again = false;
            link.send(sent.step.clone());
        }
    }

    /// Takes what a link says, unless the link is not in use any more.
    pub(super) fn on_link(&mut self, event: LinkEvent) {
        let Some(pipeline) = &mut self.pipeline else { return };
        let steps = |id: LinkId| pipeline.steps.as_ref().is_some_and(|link| link.id == id);
        let results = |id: LinkId| pipeline.results.as_ref().is_some_and(|link| link.id == id);
        match event {
            LinkEvent::Reply { link, reply } if steps(link) => self.on_reply(reply),
            LinkEvent::Result { link, result } if results(link) => self.on_result(result),
            LinkEvent::Broken { link, detail } if steps(link) => {
                let epoch = pipeline.epoch();
                pipeline.steps = None;
                tracing::info!(%epoch, stage = 0, detail, "steps link broke");
                self.tell_cluster(cluster::Event::StreamBroken { epoch, stage: 0, detail });
            }
            LinkEvent::Broken { link, detail } if results(link) => {
                let (epoch, stage) = (pipeline.epoch(), pipeline.last_stage());
                pipeline.results = None;
                tracing::info!(%epoch, stage, detail, "results link broke");
                self.tell_cluster(cluster::Event::StreamBroken { epoch, stage, detail });
            }
            LinkEvent::Reply { .. } | LinkEvent::Result { .. } | LinkEvent::Broken { .. } => {}
        }
    }

    fn on_result(&mut self, result: StepResult) {
        let Some(pipeline) = &mut self.pipeline else { return };
        let epoch = pipeline.epoch();
        if result.epoch != epoch {
            return;
        }
        if pipeline.unanswered.remove(&result.step).is_some() {
            for time in &result.stage_times {
                metrics::stage_time(time.stage, time.compute, time.wait);
                if let Some(means) = pipeline.stage_times.get_mut(time.stage as usize) {
                    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
                    means.compute_ms += STAGE_TIME_WEIGHT * (ms(time.compute) - means.compute_ms);
                    means.steps += 1;
                    means.busy_ms += ms(time.compute);
                    means.wait_ms += STAGE_TIME_WEIGHT * (ms(time.wait) - means.wait_ms);
                }
            }
        }
        let now = self.now();
        let emissions = self.scheduler.complete(result, now);
        self.emit(emissions);
        self.tell_cluster(cluster::Event::ResultsFlowing { epoch });
    }

    fn on_reply(&mut self, reply: StepReply) {
        let Some(pipeline) = &mut self.pipeline else { return };
        let epoch = pipeline.epoch();
        let StepReply { step, stage, verdict, detail, .. } = reply;
        if verdict != StepVerdict::Accepted {
            tracing::info!(%epoch, %step, stage, ?verdict, detail, "stage refused a step");
        }
        let broken = |stage, detail| cluster::Event::StreamBroken { epoch, stage, detail };
        match verdict {
            StepVerdict::Accepted => {}
            StepVerdict::Busy => {
                if let Some(sent) = pipeline.unanswered.get_mut(&step) {
                    sent.again = true;
                }
            }
            StepVerdict::Corrupt => {
                let Some(sent) = pipeline.unanswered.get_mut(&step) else { return };
                // A later stage has had it twice from the one before it.
                if std::mem::replace(&mut sent.damaged, true) || stage > 0 {
                    self.tell_cluster(broken(stage, detail));
                } else if let Some(link) = &pipeline.steps {
                    link.send(sent.step.clone());
                }
            }
            StepVerdict::Fenced => self.tell_cluster(cluster::Event::Fenced { epoch, detail }),
            StepVerdict::NotPrepared | StepVerdict::Invalid => {
                self.tell_cluster(broken(stage, detail))
            }
            StepVerdict::DownstreamLost => self.tell_cluster(broken(stage + 1, detail)),
        }
    }

    fn open_steps(&mut self) {
        let id = self.next_link();
        let events = self.link_events_sender.clone();
        let Some(pipeline) = &mut self.pipeline else { return };
        let Some(first) = pipeline.plan.stages.first() else { return };
        pipeline.steps = Some(StepsLink::open(id, self.key, first.address.clone(), events));
        self.resend_unanswered();
    }

    fn open_results(&mut self) {
        let id = self.next_link();
        let events = self.link_events_sender.clone();
        let Some(pipeline) = &mut self.pipeline else { return };
        let Some(last) = pipeline.plan.stages.last() else { return };
        let wanted = ResultsWanted {
            pipeline: pipeline.shape.pipeline,
            epoch: pipeline.shape.epoch,
            term: pipeline.shape.term,
            incarnation: last.incarnation,
            after_step: pipeline.known_results(),
        };
        pipeline.results =
            Some(ResultsLink::open(id, self.key, last.address.clone(), wanted, events));
    }

    /// The stages know by their numbers what they have computed.
    fn resend_unanswered(&mut self) {
        let Some(pipeline) = &self.pipeline else { return };
        let Some(link) = &pipeline.steps else { return };
        for sent in pipeline.unanswered.values() {
            link.send(sent.step.clone());
        }
    }

    fn next_link(&mut self) -> LinkId {
        self.next_link += 1;
        LinkId(self.next_link)
    }

    /// Asks the pipeline for one token, when that is due: it is ready when the token has come.
    pub(super) fn test_pipeline(&mut self) {
        let now = self.now();
        let Some(pipeline) = &mut self.pipeline else { return };
        let SelfTest::Due(due) = pipeline.self_test else { return };
        if now < due || self.held.is_some() {
            return;
        }
        let request = Request {
            prompt: vec![self.config.first_token],
            forced: Vec::new(),
            max_tokens: 1,
            min_tokens: 0,
            sampling: SamplingParameters::default(),
            stop_tokens: Vec::new(),
            score_prompt: false,
            class: Class::Interactive,
            deadline: None,
            traceparent: String::new(),
        };
        pipeline.self_test = match self.scheduler.submit(request, now) {
            Ok(sequence) => SelfTest::Running(sequence),
            Err(error) => {
                tracing::debug!(%error, "self-test has to wait");
                SelfTest::Due(now + SELF_TEST_PAUSE)
            }
        };
    }

    /// Whether a sequence is the pipeline's own test.
    pub(super) fn is_self_test(&self, sequence: SequenceId) -> bool {
        let test = self.pipeline.as_ref().map(|pipeline| &pipeline.self_test);
        matches!(test, Some(SelfTest::Running(running)) if *running == sequence)
    }

    /// Takes what came of the test.
    pub(super) fn on_self_test(&mut self, event: EmissionEvent) {
        let now = self.now();
        let Some(pipeline) = &mut self.pipeline else { return };
        match event {
            EmissionEvent::Finished { .. } => {
                pipeline.self_test = SelfTest::Passed;
                tracing::info!(epoch = %pipeline.shape.epoch, "ready: a token came through");
                self.ready.send_replace(true);
            }
            EmissionEvent::Failed(error) => {
                tracing::warn!(error = %node::Chain(&error), "self-test failed");
                pipeline.self_test = SelfTest::Due(now + SELF_TEST_PAUSE);
            }
            EmissionEvent::PromptScores(_) | EmissionEvent::Token { .. } => {}
        }
    }
}
