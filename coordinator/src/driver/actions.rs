//! What the cluster wants done, and how it is done.

use proto::ids::{Epoch, PipelineRef};

use super::control::{Driver, Outcome};
use super::lane::Served;
use crate::cluster::{self, Action, PROBE_PATIENCE};
use crate::workers;

/// The cluster knows one pipeline for now.
fn only(epoch: Epoch) -> PipelineRef {
    PipelineRef { id: cluster::PIPELINE, epoch }
}

impl Driver {
    /// Tells the cluster what happened and carries out what it wants done.
    pub(super) fn tell_cluster(&mut self, event: cluster::Event) {
        let now = self.now();
        for action in self.cluster.handle(now, event) {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, "carries out");
        let key = self.key;
        match action {
            Action::ReadPlan => self.read_plan(),
            Action::WritePlan { term, previous, plan } => self.write_plan(term, previous, &plan),
            Action::Prepare(request) => {
                self.no_plan = None;
                self.calls.spawn(async move {
                    let (epoch, stage) = (request.epoch, request.stage);
                    Outcome::Event(match workers::prepare(key, &request).await {
                        Ok(class) => cluster::Event::Prepared { epoch, stage, class },
                        Err(error) => {
                            let workers::CallError { transient, detail } = error;
                            cluster::Event::PrepareFailed { epoch, stage, transient, detail }
                        }
                    })
                });
            }
            Action::Activate { pipeline, epoch, term, stage, target } => {
                self.calls.spawn(async move {
                    Outcome::Event(
                        match workers::activate(key, pipeline, epoch, term, &target).await {
                            Ok(()) => cluster::Event::Activated { epoch, stage },
                            Err(error) => {
                                let workers::CallError { transient, detail } = error;
                                cluster::Event::ActivateFailed { epoch, stage, transient, detail }
                            }
                        },
                    )
                });
            }
            Action::Retire { pipeline, epoch, term, target } => {
                self.calls.spawn(async move {
                    if let Err(error) = workers::retire(key, pipeline, epoch, term, &target).await {
                        let worker = &target.worker;
                        tracing::debug!(worker, %epoch, error.detail, "worker was not told to retire");
                    }
                    Outcome::Nothing
                });
            }
            Action::Probe { worker, incarnation, address } => {
                self.calls.spawn(async move {
                    Outcome::Event(match workers::describe(&address, PROBE_PATIENCE).await {
                        Ok(found) => {
                            cluster::Event::ProbeOk { worker, incarnation: found.incarnation }
                        }
                        Err(error) => {
                            let detail = error.detail;
                            cluster::Event::ProbeFailed { worker, incarnation, detail }
                        }
                    })
                });
            }
            Action::Serve { shape, plan, class } => {
                self.serve(Served { shape, stages: plan.stages, class });
            }
            Action::Reconnect { epoch, stage } => self.lanes.reconnect(only(epoch), stage),
            Action::FailPipeline { epoch, reason } => self.fail_pipeline(only(epoch), &reason),
            Action::HoldAdmission(hold) => {
                self.router.hold(cluster::PIPELINE, hold);
                self.held = hold.then_some(false);
            }
            Action::NoPlan { reason } => {
                // Who was taken waits for a pipeline that goes on with him, as long as anybody
                // waits; but not here if it is another coordinator's.
                if self.leadership.is_none() {
                    self.failing = Some(reason.clone());
                }
                self.refusing = Some(reason.clone());
                self.no_plan = Some(reason);
            }
            Action::Alarm { text } => tracing::error!(text, "alarm"),
        }
    }

    /// Says once that nothing runs any more while admission is held.
    pub(super) fn tell_if_drained(&mut self) {
        if self.held == Some(false)
            && self.router.is_idle(cluster::PIPELINE)
            && let Some(&PipelineRef { epoch, .. }) = self.lanes.serving().first()
        {
            self.held = Some(true);
            self.tell_cluster(cluster::Event::Drained { epoch });
        }
    }

    /// A pipeline is active: it gets a lane, and those who waited for one go there.
    fn serve(&mut self, served: Served) {
        let at = served.at();
        tracing::info!(pipeline = %at, stages = served.shape.stages, class = %served.class, "pipeline is active");
        self.no_plan = None;
        if !self.is_closed() {
            // Who was not refused yet needs not be.
            (self.failing, self.refusing) = (None, None);
        }
        self.router.set_pipeline(at.id, served.shape.kv_blocks, served.class);
        self.lanes.serve(served);
        // One that is still giving back what it had gets nobody before that.
        self.router.hold(at.id, self.held.is_some() || !self.lanes.is_current(at));
        self.measure_readiness();
    }

    /// A pipeline is lost: whoever ran on it goes on elsewhere.
    fn fail_pipeline(&mut self, at: PipelineRef, reason: &str) {
        if self.lanes.fail(at, reason) {
            tracing::warn!(pipeline = %at, reason, "pipeline failed");
            self.router.hold(at.id, true);
            self.measure_readiness();
        }
    }
}
