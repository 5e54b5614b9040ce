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

/// Layers that are timed together: more than a last-level cache keeps, for a stage of a pipeline
/// reads its weights from memory in every step.
const LAYERS: u32 = 4;

/// How long steps are repeated, all kinds in turn. The least time of each kind counts: whatever else
/// ran meanwhile, as another worker on this machine that measures itself, only added to the others.
const TIME: Duration = Duration::from_millis(600);

/// Times that each kind is repeated at least, however slow it is.
const ROUNDS: usize = 2;

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

/// Times steps through the model's last layers, with and without the head, on an engine like that of
/// `config` but with a KV cache and steps of its own size. Blocks the caller for about a second.
///
/// # Errors
///
/// [`EngineError`] if the layer cannot be opened or there is no memory for it.
pub fn measure_layer_ns(store: &Store, config: &EngineConfig) -> Result<LayerTimes, EngineError> {
    let layers = LAYERS.min(store.config().layers);
    let end = store.config().layers;
    let model = StageModel::open(store, end - layers..end)?;
    let context = CONTEXT_TOKENS.min(store.config().context);
    let blocks_each = context.div_ceil(BLOCK_TOKENS);
    let mut engine = Engine::new(
        model,
        EngineConfig {
            kv_type: KvType::default(),
            kv_blocks: MANY_ROWS * blocks_each,
            max_step_tokens: MANY_ROWS,
            // A few layers say nothing about memory, and are gone in a second.
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
    let kinds = [
        rows(1, &Output::None),
        rows(MANY_ROWS, &Output::None),
        rows(1, &sample),
        rows(MANY_ROWS, &sample),
    ];
    let [one, many, one_whole, many_whole] = least_times(&mut engine, &kinds);
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
    let a_layer = |time: Duration| nanos(time / layers.max(1));
    Ok(LayerTimes {
        layer_ns: a_layer(one),
        layer_16_ns: a_layer(many),
        head_ns: nanos(one_whole.saturating_sub(one)),
        head_16_ns: nanos(many_whole.saturating_sub(many)),
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

/// The least time of each kind of step, after one of each that only warms caches and maps pages.
fn least_times<const N: usize>(engine: &mut Engine, kinds: &[Vec<Row>; N]) -> [Duration; N] {
    let most_rows = kinds.iter().map(Vec::len).max().unwrap_or(0);
    let input = if engine.is_first() { 0 } else { most_rows * engine.hidden() };
    // Not zeros, so that no product is cheaper than it would be.
    let input: Vec<f32> = (0..input).map(|index| (index % 7) as f32 - 3.0).collect();
    let mut step = |rows: &[Row]| {
        let used = if input.is_empty() { 0 } else { rows.len() * engine.hidden() };
        let start = Instant::now();
        engine.forward(rows, &input[..used]);
        start.elapsed()
    };
    for rows in kinds {
        step(rows);
    }
    let mut least = [Duration::MAX; N];
    let begin = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS || begin.elapsed() < TIME {
        for (rows, least) in kinds.iter().zip(&mut least) {
            *least = step(rows).min(*least);
        }
        rounds += 1;
    }
    least
}
