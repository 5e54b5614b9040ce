//! What belongs to one epoch of a pipeline: its steps on their way, its blocks, its pace.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{BlockId, Generation, SequenceId, StepId};
use proto::step::{Output, Row, Step, StepHeader};

use super::blocks::BlockPool;
use super::microbatch::in_flight_limit;
use super::types::PipelineShape;
use crate::tick::Tick;

/// Ids of ended sequences that one step carries; the rest go with the next ones.
const ENDED_PER_STEP: usize = 1024;

/// A step is overdue after so many times the slowest of the last [`PACE_STEPS`] steps ...
const OVERDUE_FACTOR: u32 = 8;
/// ... which are remembered ...
const PACE_STEPS: usize = 64;
/// ... but never sooner than this, whatever the pace: a probe costs little, a false one nothing ...
const OVERDUE_FLOOR: Duration = Duration::from_millis(500);
/// ... and so long before the first result: weights may still come from the disk.
const FIRST_STEP_PATIENCE: Duration = Duration::from_secs(5);

/// What belongs to one epoch.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) shape: PipelineShape,
    pub(super) blocks: BlockPool,
    pub(super) in_flight: BTreeMap<StepId, SentStep>,
    next_step: StepId,
    /// Had rows in this epoch and have none any more; workers were not told yet.
    pub(super) ended: VecDeque<SequenceId>,
    /// How long the last steps took, newest last.
    pace: VecDeque<Duration>,
}

#[derive(Debug)]
pub(super) struct SentStep {
    pub(super) sent: Tick,
    pub(super) rows: Vec<SentRow>,
    /// Some of its rows go on with answers, each by one token.
    decodes: bool,
}

/// What the result of a row must match.
#[derive(Debug)]
pub(super) struct SentRow {
    pub(super) sequence: SequenceId,
    pub(super) generation: Generation,
    pub(super) position: u32,
    pub(super) token_count: u32,
    pub(super) wants: Wants,
    /// Named by the row.
    pub(super) blocks: Vec<BlockId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    Scores,
    Token,
}

impl Active {
    pub(super) fn new(shape: PipelineShape) -> Self {
        Self {
            shape,
            blocks: BlockPool::new(shape.kv_blocks),
            in_flight: BTreeMap::new(),
            next_step: StepId(1),
            ended: VecDeque::new(),
            pace: VecDeque::new(),
        }
    }

    /// Every step up to this one has completed.
    fn acked_step(&self) -> StepId {
        let first_open = self.in_flight.keys().next().unwrap_or(&self.next_step);
        StepId(first_open.0 - 1)
    }

    /// Counted from the oldest open step, so that stages keep at most so many outputs.
    pub(super) fn has_room(&self) -> bool {
        let open = self.next_step.0 - 1 - self.acked_step().0;
        open < u64::from(in_flight_limit(self.shape.stages))
    }

    /// Steps on their way that go on with answers.
    pub(super) fn decoding_steps(&self) -> usize {
        self.in_flight.values().filter(|step| step.decodes).count()
    }

    /// Makes a step of `rows`, the first `decode_rows` of which go on with answers, and remembers what its result must match.
    pub(super) fn send(
        &mut self,
        rows: Vec<Row>,
        decode_rows: usize,
        now: Tick,
        deadline_remaining: Duration,
    ) -> Step {
        let header = StepHeader {
            pipeline: self.shape.pipeline,
            epoch: self.shape.epoch,
            term: self.shape.term,
            dst_incarnation: self.shape.first_incarnation,
            step: self.next_step,
            acked_step: self.acked_step(),
            deadline_remaining,
        };
        self.next_step.0 += 1;
        for row in &rows {
            self.blocks.pin(&row.blocks);
        }
        let sent = rows.iter().map(SentRow::of).collect();
        self.in_flight
            .insert(header.step, SentStep { sent: now, rows: sent, decodes: decode_rows > 0 });
        let ended = self.ended.len().min(ENDED_PER_STEP);
        Step {
            header,
            rows,
            ended_sequences: self.ended.drain(..ended).collect(),
            stage_times: Vec::new(),
            activations: Bytes::new(),
        }
    }

    /// The step is on its way no more.
    pub(super) fn take_sent(&mut self, id: StepId, now: Tick) -> Option<SentStep> {
        let step = self.in_flight.remove(&id)?;
        for row in &step.rows {
            self.blocks.unpin(&row.blocks);
        }
        if self.pace.len() == PACE_STEPS {
            self.pace.pop_front();
        }
        self.pace.push_back(now.since(step.sent));
        Some(step)
    }

    pub(super) fn patience(&self) -> Duration {
        match self.pace.iter().max() {
            Some(&slowest) => (slowest * OVERDUE_FACTOR).max(OVERDUE_FLOOR),
            None => FIRST_STEP_PATIENCE,
        }
    }
}

impl SentRow {
    fn of(row: &Row) -> Self {
        Self {
            sequence: row.sequence,
            generation: row.generation,
            position: row.position,
            token_count: row.tokens.len() as u32,
            wants: match row.output {
                Output::None | Output::Logits => Wants::Nothing,
                Output::Score(_) => Wants::Scores,
                Output::Sample(_) => Wants::Token,
            },
            blocks: row.blocks.clone(),
        }
    }
}
