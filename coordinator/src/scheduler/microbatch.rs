//! How large steps are: between few large ones, which read the weights less often, and many small
//! ones, which keep every stage busy.

use super::types::PipelineShape;

/// What a step costs the slowest stage of a pipeline. All zeros: nobody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCost {
    /// A step of rows that decode, where head and sampler have work for each.
    pub decode: Line,
    /// A step of a prompt's tokens, which only the layers work for.
    pub prompt: Line,
}

/// Time by rows, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// Whatever is in the step: weights are read from memory and unpacked.
    pub step_ns: u64,
    /// For every row: multiply-adds.
    pub row_ns: u64,
}

impl Line {
    /// Through the times of one row and of `rows` rows. What was measured backwards, in noise,
    /// reads as rows that cost nothing.
    pub fn through(one_ns: u64, many_ns: u64, rows: u32) -> Self {
        let more_rows = u64::from(rows.max(2) - 1);
        let row_ns = (many_ns.saturating_sub(one_ns) / more_rows).min(one_ns);
        Self { step_ns: one_ns - row_ns, row_ns }
    }

    pub(super) fn at(self, rows: u64) -> u64 {
        self.step_ns.saturating_add(self.row_ns.saturating_mul(rows))
    }
}

/// From one stage's engine to the next one's, or through the coordinator to the first: decoding,
/// two wake-ups and the loopback or a local network. Assumed, not measured: steps take tens of
/// milliseconds.
const HOP_NS: u64 = 300_000;

/// What noise in the stages' times costs a pipeline of two stages with as many steps in flight, in
/// per mille: it grows with the stages and shrinks with every step more. Assumed, between the shares
/// that [`in_flight_limit`] names.
const NOISE_PER_MILLE: u64 = 30;

/// Steps that keep a pipeline of `stages` stages busy: ceil(1.5 × stages) + 1. With as many as
/// stages, noise in the stages' times costs 10 to 25 % of the rate of a long pipeline; with this 2
/// to 7 %.
pub fn in_flight_limit(stages: u32) -> u32 {
    (3 * stages).div_ceil(2) + 1
}

/// Into how many steps in flight `decoding` sequences are divided, at most `step_tokens` in each.
///
/// All of them go once round in `max(m × step, stages × (step + hop))` when they are divided into
/// `m` steps, and noise makes that longer. `m` runs from the stages to [`in_flight_limit`]: fewer
/// leave a stage idle, and more cost more than they bring. Of equal numbers the largest.
pub(super) fn decode_steps(shape: &PipelineShape, decoding: usize, step_tokens: usize) -> usize {
    let (stages, limit) = (u64::from(shape.stages), u64::from(in_flight_limit(shape.stages)));
    let decoding = decoding as u64;
    let fewest = decoding.div_ceil(step_tokens.max(1) as u64).clamp(stages, limit);
    let round_ns = |steps: u64| {
        let step = shape.cost.decode.at(decoding.div_ceil(steps));
        let alone = stages.saturating_mul(step.saturating_add(HOP_NS));
        let round = steps.saturating_mul(step).max(alone);
        let noise = NOISE_PER_MILLE * (stages - 1) / (steps - stages + 1);
        round.saturating_add(round / 1000 * noise)
    };
    (fewest..=limit).rev().min_by_key(|&steps| round_ns(steps)).unwrap_or(limit) as usize
}

/// A chunk is a multiple of so many tokens, and at least as many: the kernels take tokens by panels of
/// so many, and those beside full panels cost up to half as much again.
const CHUNK_UNIT: usize = 32;

/// Tokens of the chunks that prompts of `prompt_tokens` in all are cut into, at most `step_tokens`.
///
/// A prompt of `p` tokens in chunks of `c` needs `p / c + stages - 1` turns of `step + c × row`
/// until its last chunk has left the last stage. That is least at
/// `c = sqrt(p × step / (row × (stages - 1)))`.
pub(super) fn chunk_tokens(
    shape: &PipelineShape,
    prompt_tokens: usize,
    step_tokens: usize,
) -> usize {
    let Line { step_ns, row_ns } = shape.cost.prompt;
    let waits = u64::from(shape.stages.saturating_sub(1)).saturating_mul(row_ns);
    if waits == 0 {
        return step_tokens;
    }
    let square = (prompt_tokens as u128 * u128::from(step_ns)).div_ceil(u128::from(waits));
    let chunk = (square.isqrt() as usize).next_multiple_of(CHUNK_UNIT);
    chunk.clamp(CHUNK_UNIT.min(step_tokens), step_tokens)
}

#[cfg(test)]
mod tests {
    use proto::ids::{Epoch, Incarnation, PipelineId, Term};

    use super::*;

    fn shape(stages: u32, cost: StepCost) -> PipelineShape {
        PipelineShape {
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            term: Term(1),
            first_incarnation: Incarnation([1; 16]),
            stages,
            kv_blocks: 100,
            first_draws: false,
            cost,
        }
    }

    fn both(step_ns: u64, row_ns: u64) -> StepCost {
        let line = Line { step_ns, row_ns };
        StepCost { decode: line, prompt: line }
    }

    const MS: u64 = 1_000_000;

    #[test]
    fn few_sequences_are_divided_into_as_many_steps_as_stages() {
        // A step costs as much as another row or two: as decode does on a CPU.
        let cost = both(15 * MS, 13 * MS);
        let steps = |stages, decoding| decode_steps(&shape(stages, cost), decoding, 64);
        assert_eq!([steps(1, 1), steps(1, 8), steps(1, 64)], [1, 1, 1]);
        assert_eq!([steps(2, 1), steps(2, 8), steps(2, 16)], [2, 2, 2]);
        assert_eq!(steps(2, 256), 4, "a step of 64 rows is bound by them, and by the budget");
        assert_eq!(steps(8, 16), 8);
        assert!(steps(8, 256) > 8, "noise is dearer than steps in a long pipeline");
    }

    #[test]
    fn steps_that_cost_nothing_or_no_more_than_a_hop_are_many() {
        let cost = both(10_000, 10_000);
        assert_eq!(decode_steps(&shape(1, cost), 8, 64), 3);
        for stages in 1..9 {
            let unknown = shape(stages, StepCost::default());
            assert_eq!(decode_steps(&unknown, 8, 64), in_flight_limit(stages) as usize);
            assert_eq!(chunk_tokens(&unknown, 512, 64), 64);
        }
    }

    #[test]
    fn short_prompts_are_cut_small_where_there_are_stages_to_fill() {
        let cost = both(5 * MS, 10 * MS);
        let chunk = |stages, prompt| chunk_tokens(&shape(stages, cost), prompt, 64);
        assert_eq!(chunk(1, 512), 64, "one stage waits for nobody");
        assert_eq!([chunk(2, 16), chunk(2, 512), chunk(2, 4096)], [32, 32, 64]);
        assert_eq!(chunk(8, 4096), 32);
        assert_eq!(chunk_tokens(&shape(2, cost), 100, 8), 8, "never more than a step");
    }

    #[test]
    fn a_line_goes_through_what_was_measured() {
        let line = |one, many, rows| {
            let Line { step_ns, row_ns } = Line::through(one, many, rows);
            (step_ns, row_ns)
        };
        assert_eq!(line(100, 1000, 16), (40, 60));
        assert_eq!(line(100, 90, 16), (100, 0), "noise");
        assert_eq!(line(1, 160, 16), (0, 1), "noise");
        assert_eq!(line(7, 7, 1), (7, 0));
    }
}
