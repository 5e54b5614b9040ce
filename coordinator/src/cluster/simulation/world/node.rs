//! A worker as the rules of `worker::session::epochs` make it.

use std::ops::Range;

use proto::ids::{Epoch, PipelineRef, Term};
use proto::plan::WorkerRecord;
use proto::step::Prepare;

use super::super::super::Failure;

/// What a worker holds for a stage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) at: PipelineRef,
    pub(super) engine: (Range<u32>, u32, bool),
}

/// A worker as it really is: the rules of `worker::session::epochs`.
pub(super) struct Node {
    pub(super) record: WorkerRecord,
    pub(super) alive: bool,
    pub(super) has_lease: bool,
    /// So many engines fit.
    pub(super) engines: usize,
    pub(super) term: Term,
    pub(super) over: Epoch,
    pub(super) prepared: Option<Stored>,
    pub(super) active: Option<Stored>,
}

impl Node {
    pub(super) fn held(&self) -> impl Iterator<Item = &Stored> {
        self.active.iter().chain(&self.prepared)
    }

    /// It was told to end, and has nothing to do any more.
    pub(super) fn has_gone(&self) -> bool {
        self.record.draining && self.held().next().is_none()
    }

    pub(super) fn newest(&self) -> Epoch {
        self.held().map(|stored| stored.at.epoch).fold(self.over, Epoch::max)
    }

    pub(super) fn prepare(&mut self, request: &Prepare) -> Result<(), Failure> {
        if self.record.draining {
            return Err(Failure::Refused);
        }
        self.term = self.term.max(request.term);
        let layers = request.stages[request.stage as usize].layers.clone();
        let at = PipelineRef { id: request.pipeline, epoch: request.epoch };
        let stored = Stored { at, engine: (layers, request.kv_blocks, request.draws) };
        if self.held().any(|held| held.at == at) {
            return if self.held().any(|held| *held == stored) {
                Ok(())
            } else {
                Err(Failure::Refused)
            };
        }
        if request.epoch <= self.newest() {
            return Err(Failure::Refused);
        }
        self.prepared = None;
        let shares = self.active.as_ref().is_some_and(|active| active.engine == stored.engine);
        if !shares && usize::from(self.active.is_some()) + 1 > self.engines {
            return Err(Failure::Memory);
        }
        self.prepared = Some(stored);
        Ok(())
    }

    pub(super) fn activate(&mut self, at: PipelineRef, term: Term) -> Result<(), Failure> {
        self.term = self.term.max(term);
        if self.active.as_ref().is_some_and(|active| active.at == at) {
            return Ok(());
        }
        let Some(prepared) = self.prepared.take_if(|prepared| prepared.at == at) else {
            return Err(Failure::Refused);
        };
        self.over = self.over.max(Epoch(at.epoch.0 - 1));
        self.active = Some(prepared);
        Ok(())
    }

    pub(super) fn retire(&mut self, at: PipelineRef, term: Term) {
        self.term = self.term.max(term);
        self.over = self.over.max(at.epoch);
        self.active.take_if(|held| held.at.epoch <= at.epoch);
        self.prepared.take_if(|held| held.at.epoch <= at.epoch);
    }

    pub(super) fn takes_steps(&self, at: PipelineRef, term: Term) -> bool {
        self.alive
            && at.epoch > self.over
            && term >= self.term
            && self.held().any(|held| held.at == at)
    }
}
