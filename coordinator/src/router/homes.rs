//! Where prompts that begin alike were sent: a pipeline keeps the KV of what it has computed for as long
//! as nothing else needs the blocks, and the next one that begins so need not compute it again. A
//! hint, no account: what a pipeline really holds it finds itself.

use std::collections::BTreeMap;

use proto::ids::PipelineId;

use crate::scheduler::{BlockKey, Sequence};

/// Beginnings that are remembered, those that were sent last: about ten of each prompt, so those of
/// more than a thousand prompts in about 2 MB.
const MOST: usize = 1 << 14;

/// The last pipeline that each beginning of a prompt was sent to.
#[derive(Debug, Default)]
pub(super) struct Homes {
    homes: BTreeMap<BlockKey, Home>,
    by_age: BTreeMap<u64, BlockKey>,
    /// Counts what was noted.
    clock: u64,
    /// How far that was when a pipeline began with empty KV: what was noted of it before is void.
    begun: BTreeMap<PipelineId, u64>,
}

#[derive(Clone, Copy, Debug)]
struct Home {
    pipeline: PipelineId,
    noted: u64,
}

impl Homes {
    /// A sequence goes to a pipeline, which will hold its beginnings.
    pub(super) fn note(&mut self, sequence: &Sequence, pipeline: PipelineId) {
        for key in sequence.beginnings() {
            self.clock += 1;
            let noted = self.clock;
            if let Some(before) = self.homes.insert(key, Home { pipeline, noted }) {
                self.by_age.remove(&before.noted);
            }
            self.by_age.insert(noted, key);
            if self.homes.len() > MOST
                && let Some((_, oldest)) = self.by_age.pop_first()
            {
                self.homes.remove(&oldest);
            }
        }
    }

    /// The pipeline that was last sent the longest beginning of a sequence, and how many blocks that is.
    pub(super) fn find(&self, sequence: &Sequence) -> Option<(PipelineId, usize)> {
        let known = sequence.beginnings().map_while(|key| self.homes.get(&key));
        let (index, home) = known.enumerate().last()?;
        let begun = self.begun.get(&home.pipeline).copied().unwrap_or(0);
        // Each beginning is twice the one before.
        (home.noted > begun).then_some((home.pipeline, 1 << index))
    }

    /// A pipeline begins, or begins anew.
    pub(super) fn begins(&mut self, pipeline: PipelineId) {
        self.begun.insert(pipeline, self.clock);
    }

    /// A pipeline is gone.
    pub(super) fn ends(&mut self, pipeline: PipelineId) {
        self.begun.remove(&pipeline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Request;

    fn sequence(prompt: impl Iterator<Item = u32>) -> Sequence {
        Sequence::new(Request { prompt: prompt.collect(), ..Request::probe(0) }).unwrap()
    }

    #[test]
    fn the_longest_beginning_says_where_and_the_oldest_are_forgotten() {
        let mut homes = Homes::default();
        homes.note(&sequence(0..200), PipelineId(1));
        homes.note(&sequence((0..70).chain(500..600)), PipelineId(2));
        assert_eq!(homes.find(&sequence(0..300)), Some((PipelineId(1), 4)), "four blocks are his");
        assert_eq!(
            homes.find(&sequence(0..80)),
            Some((PipelineId(2), 2)),
            "the last that began so"
        );
        homes.begins(PipelineId(2));
        assert_eq!(homes.find(&sequence(0..80)), None, "its KV is empty");
        assert_eq!(homes.find(&sequence(1..80)), None);
        assert_eq!(homes.find(&sequence(0..31)), None, "it fills no block");
        for number in 0..MOST as u32 {
            homes.note(&sequence(std::iter::repeat_n(1000 + number, 33)), PipelineId(3));
        }
        assert_eq!(homes.homes.len(), MOST);
        assert_eq!(homes.by_age.len(), MOST);
        assert_eq!(homes.find(&sequence(0..300)), None);
    }
}
