//! Which rows go into the next step. Pure: continuous batching, chunked prefill, KV blocks,
//! admission; no clock, no sockets, no text.
//!
//! ```text
//! submit ─▶ waiting ──KV reserved──▶ prefilling ──first token──▶ decoding ─▶ finished
//!                                       └──── rows ──▶ next_step ─▶ pipeline ─▶ complete ──┘
//! ```
//!
//! The rules and their reasons are in `docs/scheduling.md`.

use proto::generate::Timings;
use proto::ids::{Epoch, SequenceId, StepId};
use proto::step::StepResult;

use crate::tick::Tick;

mod types;

pub use types::{
    Class, Emission, EmissionEvent, Finish, Limits, PipelineShape, QueueStats, Rejected, Request,
    Running, ScheduledStep, SequenceError,
};

/// Steps that keep a pipeline of `stages` stages busy: ceil(1.5 × stages) + 1. With as many as
/// stages, noise in the stages' times costs 10 to 25 % of the rate; with this 2 to 7 %.
pub fn in_flight_limit(stages: u32) -> u32 {
    (3 * stages).div_ceil(2) + 1
}

/// All requests of one pipeline.
#[derive(Debug)]
pub struct Scheduler {}

impl Scheduler {
    /// A scheduler without a pipeline.
    pub fn new(limits: Limits) -> Self {
        unimplemented!("{limits:?}")
    }

    /// Takes a request into the queue. It is admitted by a later [`Self::next_step`].
    ///
    /// # Errors
    ///
    /// Why it was not taken; nothing is kept of it then.
    pub fn submit(&mut self, request: Request, now: Tick) -> Result<SequenceId, Rejected> {
        unimplemented!("{request:?} {now:?}")
    }

    /// The client went away. Nothing more is emitted for the sequence. Unknown ids are ignored.
    pub fn cancel(&mut self, sequence: SequenceId) {
        unimplemented!("{sequence}")
    }

    /// The caller ends an answer early (a stop string): nothing more is emitted for the sequence.
    /// `None` if it has ended already.
    pub fn finish(&mut self, sequence: SequenceId, now: Tick) -> Option<Timings> {
        unimplemented!("{sequence} {now:?}")
    }

    /// The next step to send, if there is work and room for one more in flight. Call it until it
    /// returns `None`, after everything that may have made work: submit, complete, activation.
    pub fn next_step(&mut self, now: Tick) -> Option<ScheduledStep> {
        unimplemented!("{now:?}")
    }

    /// Takes a step's result. Results of unknown steps, of steps known already and of other
    /// epochs are ignored: sending again is safe.
    pub fn complete(&mut self, result: StepResult, now: Tick) -> Vec<Emission> {
        unimplemented!("{result:?} {now:?}")
    }

    /// Fails what waited or ran for too long. Call it several times a second.
    pub fn expire(&mut self, now: Tick) -> Vec<Emission> {
        unimplemented!("{now:?}")
    }

    /// A pipeline serves from now on. What ran on an earlier one becomes what `running` says;
    /// steps of the earlier epoch are fenced: their results are ignored, their blocks are free.
    pub fn set_pipeline(
        &mut self,
        shape: PipelineShape,
        running: Running,
        now: Tick,
    ) -> Vec<Emission> {
        unimplemented!("{shape:?} {running:?} {now:?}")
    }

    /// No pipeline serves any more. Requests that wait go on waiting; new ones are rejected.
    pub fn clear_pipeline(&mut self, running: Running, now: Tick) -> Vec<Emission> {
        unimplemented!("{running:?} {now:?}")
    }

    /// Fails everyone, running and waiting.
    pub fn fail_all(&mut self, reason: &str) -> Vec<Emission> {
        unimplemented!("{reason}")
    }

    /// While held, nobody is admitted: requests wait and those that run go on.
    pub fn hold_admission(&mut self, hold: bool) {
        unimplemented!("{hold}")
    }

    /// From now on every new request is rejected as [`Rejected::Draining`].
    pub fn close(&mut self) {
        unimplemented!()
    }

    /// Whether nothing runs and nothing is in flight.
    pub fn is_idle(&self) -> bool {
        unimplemented!()
    }

    /// The epoch that serves.
    pub fn epoch(&self) -> Option<Epoch> {
        unimplemented!()
    }

    /// The oldest step that has been on its way for so long that somebody should ask the workers.
    pub fn overdue(&self, now: Tick) -> Option<StepId> {
        unimplemented!("{now:?}")
    }

    /// How full it is.
    pub fn stats(&self) -> QueueStats {
        unimplemented!()
    }
}
