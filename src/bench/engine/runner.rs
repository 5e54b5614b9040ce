//! An engine, and what its steps spent their time on when that is asked.

use std::time::Instant;

use proto::step::{Row, RowStatus, RowValue};
use serde::Serialize;
use worker::engine::{Clock, Engine, StepProfile};

use super::BenchError;

/// Runs the steps of one engine.
pub(super) struct Runner {
    engine: Engine,
    /// Of the steps since somebody asked; `None`: nobody does, and steps are not disturbed.
    profile: Option<StepProfile>,
}

impl Runner {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine, profile: None }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// One step: the tokens that were drawn.
    pub(super) fn forward(&mut self, rows: &[Row]) -> Result<Vec<u32>, BenchError> {
        let output = match &mut self.profile {
            None => self.engine.forward(rows, &[]),
            Some(profile) => {
                let (output, of_step) =
                    self.engine.forward_profiled(rows, &[], &Ticks(Instant::now()));
                profile.add(&of_step);
                output
            }
        };
        let mut drawn = Vec::with_capacity(rows.len());
        for (row, outcome) in rows.iter().zip(output.rows) {
            match (outcome.status, outcome.value) {
                (RowStatus::Ok, RowValue::Sampled(sampled)) => drawn.push(sampled.token),
                (RowStatus::Ok, _) => {}
                (status, _) => {
                    let (position, detail) = (row.position, outcome.detail);
                    return Err(BenchError::Row { position, status, detail });
                }
            }
        }
        Ok(drawn)
    }

    /// What the steps of `work` did.
    pub(super) fn profiled(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), BenchError>,
    ) -> Result<StepProfile, BenchError> {
        self.profile = Some(StepProfile::default());
        let done = work(self);
        let profile = self.profile.take().unwrap_or_default();
        done.map(|()| profile)
    }
}

/// Nanoseconds since its making.
struct Ticks(Instant);

impl Clock for Ticks {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Where the time of all threads goes; the shares add up to one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// Products with ternary matrices, with the activation function between two of them.
    pub projections: f64,
    /// Storing keys and values, and attention.
    pub attention: f64,
    /// Final norm, logits and sampling.
    pub head: f64,
    /// Embedding, norms, quantisation, RoPE and residual additions.
    pub norms: f64,
    /// Waking up, and waiting for other threads.
    pub waiting: f64,
}

impl Parts {
    pub(super) fn of(profile: &StepProfile) -> Self {
        let share = |ns| share(ns, profile.total_ns());
        Self {
            projections: share(profile.projections_ns),
            attention: share(profile.attention_ns),
            head: share(profile.head_ns),
            norms: share(profile.norms_ns),
            waiting: share(profile.waiting_ns),
        }
    }
}

/// `part` of `whole`; nothing of nothing.
pub(super) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_a_whole() {
        let profile = StepProfile {
            projections_ns: 50,
            attention_ns: 10,
            head_ns: 20,
            norms_ns: 15,
            waiting_ns: 5,
            ..StepProfile::default()
        };
        let Parts { projections, attention, head, norms, waiting } = Parts::of(&profile);
        assert_eq!([projections, attention, head, norms, waiting], [0.5, 0.1, 0.2, 0.15, 0.05]);
        assert_eq!(Parts::of(&StepProfile::default()), Parts::default(), "no division by 0");
    }
}
