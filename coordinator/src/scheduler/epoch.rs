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
    /// For how many rows more than the last stage the first has drawn.
    draws_ahead: i64,
}

#[derive(Debug)]
pub(super) struct SentStep {
    pub(super) sent: Tick,
    pub(super) rows: Vec<SentRow>,
    kind: StepKind,
}

/// What a step holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepKind {
    /// Some of its rows go on with answers, each by one token.
    pub(super) decodes: bool,
    /// None of its rows is interactive.
    pub(super) only_batch: bool,
    /// How long it should take on the slowest stage; zero if nobody knows.
    pub(super) takes: Duration,
}

/// What the result of a row must match.
#[derive(Debug)]
pub(super) struct SentRow {
    pub(super) sequence: SequenceId,
    pub(super) generation: Generation,
    pub(super) position: u32,
    pub(super) token_count: u32,
    pub(super) wants: Wants,
    /// Its token was computed by an earlier row.
    pub(super) is_draw: bool,
    /// Named by the row.
    pub(super) blocks: Vec<BlockId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    Scores,
    Token,
    /// The residual stream, to draw from.
    State,
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
            draws_ahead: 0,
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
        self.in_flight.values().filter(|step| step.kind.decodes).count()
    }

    /// How long the last step should take that was sent and is on its way.
    pub(super) fn last_took(&self) -> Duration {
        self.in_flight.last_key_value().map_or(Duration::ZERO, |(_, step)| step.kind.takes)
    }

    /// Steps on their way that hold batch alone.
    pub(super) fn batch_steps(&self) -> usize {
        self.in_flight.values().filter(|step| step.kind.only_batch).count()
    }

    /// Makes a step of `rows`, and remembers what its result must match.
    pub(super) fn send(
        &mut self,
        rows: Vec<Row>,
        activations: Bytes,
        kind: StepKind,
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
        let sent: Vec<_> = rows.iter().map(SentRow::of).collect();
        let is_draw = sent.iter().any(|row| row.is_draw);
        self.in_flight.insert(header.step, SentStep { sent: now, rows: sent, kind });
        // Later stages take no notice of a step that the first has drawn.
        let ended = if is_draw { 0 } else { self.ended.len().min(ENDED_PER_STEP) };
        Step {
            header,
            rows,
            ended_sequences: self.ended.drain(..ended).collect(),
            stage_times: Vec::new(),
            activations,
        }
    }

    /// Lets the first stage draw for the rows of a step that sample, if it is its turn: half of the
    /// rows are its own. One step alone waits for nobody, and is drawn where it ends.
    pub(super) fn share_draws(&mut self, rows: &mut [Row], decoding: usize) {
        let samples = |row: &&mut Row| matches!(row.output, Output::Sample(_));
        let count = rows.iter_mut().filter(samples).count();
        if !self.shape.first_draws || count == 0 || count >= decoding {
            return;
        }
        if self.draws_ahead < 0 {
            self.draws_ahead += count as i64;
            rows.iter_mut().filter(samples).for_each(|row| row.output = Output::State);
        } else {
            self.draws_ahead -= count as i64;
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
                Output::None | Output::Logits | Output::Drawn(_) => Wants::Nothing,
                Output::Score(_) => Wants::Scores,
                Output::Sample(_) | Output::Draw(_) => Wants::Token,
                Output::State => Wants::State,
            },
            is_draw: matches!(row.output, Output::Draw(_)),
            blocks: row.blocks.clone(),
        }
    }
}
