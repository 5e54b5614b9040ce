//! The end of an epoch: what ran goes on with the next one, goes back to the router, or has died
//! too often.

use super::epoch::Active;
use super::{
    Emission, EmissionEvent, Fit, Holders, PipelineScheduler, PipelineShape, Prefixes, Queue,
    Sequence, SequenceError,
};
use crate::tick::Tick;

/// A sequence whose pipeline is lost this often while it runs, without a token in between, fails: it
/// may be what kills them.
pub const MAX_DEATHS: u32 = 2;

/// So does one to which it happens this often in all: what kills pipelines one token after the other
/// gets further each time.
pub(super) const MAX_DEATHS_IN_ALL: u32 = 64;

/// What a lost pipeline leaves.
#[derive(Debug)]
pub struct Lost {
    /// Go on elsewhere, from their token logs; in order of their arrival.
    pub returned: Vec<Box<Sequence>>,
    /// Those that failed.
    pub emissions: Vec<Emission>,
}

impl PipelineScheduler {
    /// The same pipeline goes on with another epoch: sequences are replayed from their token logs,
    /// and tokens that are known are not sampled again. Steps of the earlier epoch are fenced: their
    /// results are ignored, their blocks are free. Gives back those for which the new epoch has no
    /// blocks to begin with: batch before interactive, then the last that arrived.
    pub fn switch(&mut self, shape: PipelineShape, now: Tick) -> Vec<Box<Sequence>> {
        let mut ran = self.take_all(now);
        ran.sort_by_key(|sequence| (sequence.priority(), sequence.id()));
        self.active = Active::new(shape);
        self.last_row = None;
        self.proven = false;
        self.fit = Fit::default();
        let mut free = shape.kv_blocks;
        let mut surplus = Vec::new();
        for sequence in ran {
            let fits = surplus.is_empty() && sequence.blocks_at_most() <= shape.kv_blocks;
            match free.checked_sub(sequence.blocks_to_begin()).filter(|_| fits) {
                Some(left) => {
                    free = left;
                    self.admit(sequence);
                }
                None => surplus.push(sequence),
            }
        }
        surplus
    }

    /// The pipeline ends as was planned: everyone goes back to the router, in order of arrival.
    pub fn take_all(&mut self, now: Tick) -> Vec<Box<Sequence>> {
        for queue in
            [&mut self.arriving, &mut self.prefilling, &mut self.decode_ready, &mut self.draw_ready]
        {
            *queue = Queue::default();
        }
        self.deadlines.clear();
        if let Some(probe) = self.probe.take() {
            self.sequences.remove(&probe);
        }
        (self.begin_demand, self.promised) = Default::default();
        (self.holders, self.prefixes) = (Holders::default(), Prefixes::default());
        // A new pool: what the old one held is named by steps that count no more.
        self.active = Active::new(self.active.shape);
        let mut all = Vec::with_capacity(self.sequences.len());
        for mut sequence in std::mem::take(&mut self.sequences).into_values() {
            sequence.restart(now);
            all.push(sequence);
        }
        if !self.pushed_out.is_empty() {
            all.append(&mut self.pushed_out);
            all.sort_by_key(|sequence| sequence.id());
        }
        all
    }

    /// The pipeline is lost: everyone goes back to the router, but for those that had run and to whom
    /// this has now happened [`MAX_DEATHS`] times without a token in between, or
    /// 64 times.
    pub fn lose(&mut self, reason: &str, now: Tick) -> Lost {
        for sequence in self.sequences.values_mut() {
            sequence.pipeline_died();
        }
        let (returned, died): (Vec<_>, Vec<_>) =
            self.take_all(now).into_iter().partition(|sequence| sequence.may_go_on());
        self.totals.failed += died.len() as u64;
        let failed = |sequence: Box<Sequence>| {
            let error = SequenceError::PipelineLost { reason: reason.to_owned() };
            Emission { sequence: sequence.id(), event: EmissionEvent::Failed(error) }
        };
        Lost { returned, emissions: died.into_iter().map(failed).collect() }
    }

    /// Fails everyone.
    pub fn fail_all(&mut self, reason: &str) -> Vec<Emission> {
        let ids: Vec<_> = self.sequences.keys().copied().collect();
        let mut emissions = Vec::new();
        for pushed_out in self.take_pushed_out() {
            let error = SequenceError::PipelineLost { reason: reason.to_owned() };
            let event = EmissionEvent::Failed(error);
            self.totals.failed += 1;
            emissions.push(Emission { sequence: pushed_out.id(), event });
        }
        for id in ids {
            let error = SequenceError::PipelineLost { reason: reason.to_owned() };
            self.fail(id, error, &mut emissions);
        }
        emissions
    }
}
