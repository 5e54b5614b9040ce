//! Measures how fast this worker computes a layer and the head, for the planner. Not pure: it looks
//! at the clock.

use std::ops::Range;
use std::time::{Duration, Instant};

use model::Store;
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, SamplingParameters};

use crate::engine::{Engine, EngineConfig, EngineError, Placement, StageModel};

/// Tokens that each row has behind it: a short conversation.
const CONTEXT_TOKENS: u32 = 4 * BLOCK_TOKENS;

/// Rows of the larger of the two steps that are timed.
const MANY_ROWS: u32 = 16;

/// How long one kind of step is repeated. There are four kinds, so a start is delayed by less than
/// a second on a machine that is fast enough to be of use.
const TIME_PER_KIND: Duration = Duration::from_millis(100);

/// Times of one layer, and of final norm and head with greedy sampling, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerTimes {
    /// One layer for one row.
    pub layer_ns: u64,
    /// One layer for a step of 16 rows.
    pub layer_16_ns: u64,
    /// Norm and head for one row.
    pub head_ns: u64,
    /// Norm and head for a step of 16 rows.
    pub head_16_ns: u64,
}

/// Times steps through the model's last layer, with and without the head, on an engine like that of
/// `config` but with a KV cache and steps of its own size. Blocks the caller for about half a second.
///
/// # Errors
///
/// [`EngineError`] if the layer cannot be opened or there is no memory for it.
pub fn measure_layer_ns(store: &Store, config: &EngineConfig) -> Result<LayerTimes, EngineError> {
    let last = store.config().layers.saturating_sub(1);
    let model = StageModel::open(store, last..store.config().layers)?;
    let context = CONTEXT_TOKENS.min(store.config().context);
    let blocks_each = context.div_ceil(BLOCK_TOKENS);
    let mut engine = Engine::new(
        model,
        EngineConfig {
            kv_type: KvType::default(),
            kv_blocks: MANY_ROWS * blocks_each,
            max_step_tokens: MANY_ROWS,
            // One layer says nothing about memory, and is gone in a second.
            placement: Placement { pin: config.placement.pin, ..Placement::default() },
            ..*config
        },
    )?;
    let rows = |count: u32, output: &Output| -> Vec<Row> {
        (0..count)
            .map(|index| {
                let blocks = index * blocks_each..(index + 1) * blocks_each;
                row(index, context - 1, blocks, output.clone())
            })
            .collect()
    };
    let sample = Output::Sample(Box::<SamplingParameters>::default());
    let layer = time(&mut engine, &rows(1, &Output::None));
    let layer_16 = time(&mut engine, &rows(MANY_ROWS, &Output::None));
    let whole = time(&mut engine, &rows(1, &sample));
    let whole_16 = time(&mut engine, &rows(MANY_ROWS, &sample));
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
    Ok(LayerTimes {
        layer_ns: nanos(layer),
        layer_16_ns: nanos(layer_16),
        head_ns: nanos(whole.saturating_sub(layer)),
        head_16_ns: nanos(whole_16.saturating_sub(layer_16)),
    })
}

/// One token of a sequence of its own. What its cache holds does not matter for time.
fn row(sequence: u32, position: u32, blocks: Range<u32>, output: Output) -> Row {
    Row {
        sequence: SequenceId(u64::from(sequence)),
        generation: Generation(0),
        position,
        tokens: vec![0],
        prefix_hash_before: PrefixHash::EMPTY,
        prefix_hash_after: PrefixHash::EMPTY,
        blocks: blocks.map(BlockId).collect(),
        output,
        status: RowStatus::Ok,
        detail: String::new(),
        traceparent: String::new(),
    }
}

/// The median time of a step, after one that only warms caches and maps pages.
fn time(engine: &mut Engine, rows: &[Row]) -> Duration {
    let input = if engine.is_first() { 0 } else { rows.len() * engine.hidden() };
    // Not zeros, so that no product is cheaper than it would be.
    let input: Vec<f32> = (0..input).map(|index| (index % 7) as f32 - 3.0).collect();
    engine.forward(rows, &input);
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || begin.elapsed() < TIME_PER_KIND {
        let start = Instant::now();
        engine.forward(rows, &input);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}
