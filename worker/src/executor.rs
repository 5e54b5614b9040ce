//! PURE. One step at one stage: session checks, engine, session records.

use bytes::Bytes;
use proto::limits;
use proto::step::{Output, RowStatus, RowValue, Step};

use crate::engine::{Engine, EngineError};
use crate::session::{RowLimits, Sessions};

/// Room in a result's message for everything that is not logits.
const RESULT_OVERHEAD_BYTES: usize = 4 << 20;

/// What a step gave.
#[derive(Debug)]
pub(crate) struct Executed {
    /// The step: its rows with their statuses now, its activations those after this stage's
    /// layers (empty after the last stage).
    pub(crate) step: Step,
    /// What the rows asked for, one for every row; on the last stage only.
    pub(crate) values: Vec<RowValue>,
    /// Blocks of the KV cache that hold tokens.
    pub(crate) filled_blocks: usize,
}

/// What rows may name where there are so many blocks, for a model of this context and vocabulary.
pub(crate) fn row_limits(kv_blocks: u32, context: u32, vocab: u32) -> RowLimits {
    let logits_bytes = limits::MESSAGE_BYTES - RESULT_OVERHEAD_BYTES;
    let token_bytes = size_of::<f32>() * vocab.max(1) as usize;
    RowLimits { kv_blocks, context, vocab, logits_tokens: (logits_bytes / token_bytes) as u32 }
}

/// An engine and what its blocks hold.
pub(crate) struct Executor {
    engine: Engine,
    sessions: Sessions,
    /// `[tokens of the step][hidden]`, kept for its memory.
    input: Vec<f32>,
}

impl Executor {
    /// `context` is the model's longest sequence in tokens.
    pub(crate) fn new(engine: Engine, context: u32) -> Self {
        let limits = row_limits(engine.config().kv_blocks, context, engine.vocab() as u32);
        Self { engine, sessions: Sessions::new(limits), input: Vec::new() }
    }

    /// Runs one step. The sizes of `step` were checked: at most `max_step_tokens`, activations
    /// exactly for its tokens.
    ///
    /// # Errors
    ///
    /// If the weights are not any more what they were: nothing of the step may leave, and there must
    /// be no other.
    pub(crate) fn execute(
        &mut self,
        mut step: Step,
        expired: bool,
    ) -> Result<Executed, EngineError> {
        if step.is_draw() {
            return self.draw(step, expired);
        }
        let admitted = self.sessions.admit(&mut step.rows, expired);
        self.take_input(&step);
        let output = self.engine.forward_verified(&step.rows, &self.input)?;
        let mut values = Vec::with_capacity(step.rows.len());
        for (row, outcome) in step.rows.iter_mut().zip(output.rows) {
            row.status = outcome.status;
            row.detail = outcome.detail;
            values.push(outcome.value);
        }
        self.sessions.commit(&mut step.rows, admitted, &step.ended_sequences);
        step.activations = little_endian(&output.activations);
        Ok(Executed { step, values, filled_blocks: self.sessions.filled_blocks() })
    }

    /// Draws from the residual streams that the step brings. It has no part in what blocks hold: a
    /// row is a function of what comes with it.
    fn draw(&mut self, mut step: Step, expired: bool) -> Result<Executed, EngineError> {
        let mut refuse = |status: RowStatus, detail: &str| {
            for row in step.rows.iter_mut().filter(|row| row.status == RowStatus::Ok) {
                row.status = status;
                row.detail = detail.into();
            }
        };
        if expired {
            refuse(RowStatus::Expired, "the deadline of its step had passed");
        } else if !self.engine.has_head() {
            refuse(RowStatus::Invalid, "this stage has no head to draw with");
        }
        self.take_input(&step);
        let output = self.engine.draw_verified(&step.rows, &self.input)?;
        let mut values = Vec::with_capacity(step.rows.len());
        for (row, outcome) in step.rows.iter_mut().zip(output.rows) {
            row.status = outcome.status;
            row.detail = outcome.detail;
            if let RowValue::Sampled(sampled) = &outcome.value {
                row.output = Output::Drawn(Box::new(sampled.clone()));
            }
            values.push(outcome.value);
        }
        step.activations = Bytes::new();
        Ok(Executed { step, values, filled_blocks: self.sessions.filled_blocks() })
    }

    fn take_input(&mut self, step: &Step) {
        self.input.clear();
        let (words, _) = step.activations.as_chunks();
        self.input.extend(words.iter().map(|&word| f32::from_le_bytes(word)));
    }
}

/// As they travel.
fn little_endian(values: &[f32]) -> Bytes {
    let mut bytes = vec![0; size_of_val(values)];
    let (words, _) = bytes.as_chunks_mut();
    for (word, value) in words.iter_mut().zip(values) {
        *word = value.to_le_bytes();
    }
    bytes.into()
}

#[cfg(test)]
mod tests;
