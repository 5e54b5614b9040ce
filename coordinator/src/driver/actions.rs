//! What the cluster wants done, and how it is done.

use super::control::{Driver, Outcome};
use super::lane::Served;
use crate::cluster::{self, Action, Availability, Failure, Held, PROBE_TIMEOUT};
use crate::planner;
use crate::workers::{self, CallError};
use proto::ids::PipelineRef;
use tokio_util::sync::CancellationToken;

impl Driver {
    /// Tells the cluster what happened and carries out what it wants done.
    pub(super) fn tell_cluster(&mut self, event: cluster::Event) {
        let now = self.now();
        let actions = self.cluster.handle(now, event);
        let changes = |action: &Action| {
            matches!(action, Action::Serve { .. } | Action::Leave { .. } | Action::Fail { .. })
        };
        let serves_otherwise = actions.iter().any(changes);
        for action in actions {
            self.carry_out(action);
        }
        // Not in between: one may go and another come in its place.
        if serves_otherwise {
            self.measure_readiness();
        }
        self.heed_availability();
        self.answer_planners();
    }

    fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, "carries out");
        let key = self.key;
        match action {
            Action::ReadPlan { ticket } => self.read_plan(ticket),
            Action::WritePlan { ticket, term, previous, plan } => {
                self.write_plan(ticket, term, previous, &plan);
            }
            Action::Deploy { ticket, problem } => {
                // Tens of milliseconds for many workers: not on a thread that others wait for. The
                // plan before, if it is still being made, is given up.
                let wanted = CancellationToken::new();
                self.deploying = Some(wanted.clone().drop_guard());
                self.calls.spawn_blocking(move || {
                    let result = planner::deploy_while(&problem, &|| !wanted.is_cancelled());
                    Outcome::Event(cluster::Event::Deployed { ticket, result })
                });
            }
            Action::Prepare(request) => {
                self.history.names(request.pipeline);
                self.calls.spawn(async move {
                    let at = PipelineRef { id: request.pipeline, epoch: request.epoch };
                    let stage = request.stage;
                    Outcome::Event(match workers::prepare(key, &request).await {
                        Ok(class) => cluster::Event::Prepared { at, stage, class },
                        Err(CallError { failure, detail }) => {
                            cluster::Event::PrepareFailed { at, stage, failure, detail }
                        }
                    })
                });
            }
            Action::Activate { at, term, stage, target } => {
                self.calls.spawn(async move {
                    Outcome::Event(match workers::activate(key, at, term, &target).await {
                        Ok(()) => cluster::Event::Activated { at, stage },
                        Err(CallError { failure, detail }) => {
                            cluster::Event::ActivateFailed { at, stage, failure, detail }
                        }
                    })
                });
            }
            Action::Retire { at, term, target } => {
                self.calls.spawn(async move {
                    let outcome = workers::retire(key, at, term, &target).await;
                    let cluster::Target { worker, incarnation, .. } = target;
                    Outcome::Event(match outcome {
                        Ok(()) => cluster::Event::Retired { worker, incarnation, at },
                        Err(CallError { detail, .. }) => {
                            tracing::debug!(worker, pipeline = %at, detail, "worker did not retire");
                            cluster::Event::RetireFailed { worker, incarnation, at, detail }
                        }
                    })
                });
            }
            Action::Dismiss { term, target } => {
                tracing::info!(worker = target.worker, "tells a drained worker to end");
                self.calls.spawn(async move {
                    let outcome = workers::dismiss(key, term, &target).await;
                    let cluster::Target { worker, incarnation, .. } = target;
                    let fault = outcome.err().map(|error| error.detail);
                    if let Some(detail) = &fault {
                        tracing::info!(worker, detail, "worker does not know that it is to end");
                    }
                    Outcome::Event(cluster::Event::Dismissed { worker, incarnation, fault })
                });
            }
            Action::Probe { worker, incarnation, address } => {
                self.calls.spawn(async move {
                    Outcome::Event(match workers::describe(&address, PROBE_TIMEOUT).await {
                        Ok(found) => cluster::Event::Described {
                            worker,
                            incarnation: found.incarnation,
                            held: found.held.iter().map(|stage| Held { at: stage.at }).collect(),
                        },
                        Err(CallError { detail, failure: Failure::Transient }) => {
                            cluster::Event::ProbeFailed { worker, incarnation, detail }
                        }
                        // It answers, so it lives, though what it says is not understood.
                        Err(CallError { detail, .. }) => {
                            tracing::warn!(worker, detail, "worker does not say what it holds");
                            cluster::Event::Described { worker, incarnation, held: Vec::new() }
                        }
                    })
                });
            }
            Action::Serve { shape, plan, class } => {
                self.serve(Served { shape, stages: plan.stages, class });
            }
            // Nobody is sent to a lane that stands still.
            Action::Pause { at } => {
                self.lanes.pause(at);
                self.router.hold(at.id, true);
            }
            Action::Resume { at, term } => {
                self.lanes.resume(at, term);
                // One that waits for its lane gets nobody before that.
                self.router.hold(at.id, !self.lanes.is_current(at));
            }
            Action::Leave { at } => {
                if self.lanes.leave(at) {
                    tracing::info!(pipeline = %at, "pipeline leaves");
                    self.router.hold(at.id, true);
                }
            }
            Action::Fail { at, reason } => self.fail_pipeline(at, &reason),
            Action::Reconnect { at, stage } => self.lanes.reconnect(at, stage),
            Action::Resign { detail } => {
                tracing::error!(detail, "the registry is not what it was");
                self.end_history(detail);
            }
            Action::Alarm { text } => tracing::error!(text, "alarm"),
        }
    }

    /// Refuses those who wait for a pipeline when there will be none before the world has changed.
    fn heed_availability(&mut self) {
        if self.is_closed() {
            return;
        }
        if self.serves() || !matches!(self.cluster.availability(), Availability::No(_)) {
            // Who was not refused yet needs not be.
            (self.failing, self.refusing) = (None, None);
            return;
        }
        let reason = self.why_unavailable();
        // Who was taken waits for a pipeline that goes on with him, as long as anybody waits; but
        // not here if it is another coordinator's.
        if self.leadership.is_none() {
            self.failing = Some(reason.clone());
        }
        self.refusing = Some(reason);
    }

    /// A pipeline is active: it gets a lane, and those who waited for one go there.
    fn serve(&mut self, served: Served) {
        let at = served.at();
        tracing::info!(pipeline = %at, stages = served.shape.stages, class = %served.class, "pipeline is active");
        self.router.set_pipeline(at.id, served.shape.kv_blocks, served.class);
        self.lanes.serve(served);
        // One that is still giving back what it had gets nobody before that.
        self.router.hold(at.id, !self.lanes.is_current(at));
    }

    /// A pipeline is lost: whoever ran on it goes on elsewhere.
    fn fail_pipeline(&mut self, at: PipelineRef, reason: &str) {
        if self.lanes.fail(at, reason) {
            tracing::warn!(pipeline = %at, reason, "pipeline failed");
            self.router.hold(at.id, true);
        }
    }
}
