//! Measures how fast this worker computes a layer and the head, for steps of several numbers of rows,
//! for the planner. Not pure: it looks at the clock.

use std::ops::Range;
use std::time::{Duration, Instant};

use model::Store;
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::plan::{KvType, StepTime};
use proto::step::{Output, Row, RowStatus, SamplingParameters};

use crate::engine::{Engine, EngineConfig, EngineError, Placement, StageModel};

/// Tokens that each row has behind it: a short conversation.
const CONTEXT_TOKENS: u32 = 4 * BLOCK_TOKENS;

/// Rows of the steps that are timed: what decodes alone, and what shows how rows share the reading
/// of weights. Each has four times as many as the one before, so a step takes at most four times as
/// long.
pub const ROWS: [u32; 4] = [1, 4, 16, 64];

/// So many of [`ROWS`] are timed however slow they are: a line needs two points.
const FEWEST: usize = 2;

/// Layers that are timed together: more than a last-level cache keeps, for a stage of a pipeline
/// reads its weights from memory in every step.
const LAYERS: u32 = 4;

/// How long steps are repeated, all kinds in turn. The least time of each kind counts: whatever else
/// ran meanwhile, as another worker on this machine that measures itself, only added to the others. So
/// did the stops of a CPU quota, which long steps meet and short ones do not: a time is never more than
/// what this process computed in it.
const TIME: Duration = Duration::from_millis(600);

/// Times that each kind is repeated at least, however slow it is.
const ROUNDS: usize = 2;

/// The layers that are timed, with the head: the model's last.
pub(crate) fn measured_layers(store: &Store) -> Range<u32> {
    let end = store.config().layers;
    end - LAYERS.min(end)..end
}

/// Times steps through the model's last layers, with and without the head, on an engine like that of
/// `config` but with a KV cache and steps of its own size. Blocks the caller for about a second; a
/// machine for which that is too little leaves the largest of [`ROWS`] out.
///
/// # Errors
///
/// [`EngineError`] if the layer cannot be opened or there is no memory for it.
pub fn measure_steps(store: &Store, config: &EngineConfig) -> Result<Vec<StepTime>, EngineError> {
    let model = StageModel::open(store, measured_layers(store))?;
    let layers = model.layer_count();
    let context = CONTEXT_TOKENS.min(store.config().context);
    let blocks_each = context.div_ceil(BLOCK_TOKENS);
    let most_rows = ROWS.into_iter().max().unwrap_or(1);
    let mut engine = Engine::new(
        model,
        EngineConfig {
            kv_type: KvType::default(),
            kv_blocks: most_rows * blocks_each,
            max_step_tokens: most_rows,
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
    let kinds: Vec<_> =
        ROWS.iter().map(|&count| [rows(count, &Output::None), rows(count, &sample)]).collect();
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
    let step_time = |(&rows, [layers_only, whole]): (&u32, [Duration; 2])| StepTime {
        rows,
        layer_ns: nanos(layers_only / layers.max(1)),
        head_ns: nanos(whole.saturating_sub(layers_only)),
    };
    Ok(ROWS.iter().zip(least_times(&mut engine, &kinds)).map(step_time).collect())
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
/// Kinds at the end of the list are left out when those before them took the whole [`TIME`].
fn least_times<const N: usize>(engine: &mut Engine, kinds: &[[Vec<Row>; N]]) -> Vec<[Duration; N]> {
    let most_rows = kinds.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let input = if engine.is_first() { 0 } else { most_rows * engine.hidden() };
    // Not zeros, so that no product is cheaper than it would be.
    let input: Vec<f32> = (0..input).map(|index| (index % 7) as f32 - 3.0).collect();
    let mut step = |rows: &[Row]| {
        let used = if input.is_empty() { 0 } else { rows.len() * engine.hidden() };
        let (start, before) = (Instant::now(), cpu_time());
        engine.forward(rows, &input[..used]);
        let elapsed = start.elapsed();
        let computed = before.zip(cpu_time()).and_then(|(before, now)| now.checked_sub(before));
        computed.map_or(elapsed, |computed| computed.min(elapsed))
    };
    let begin = Instant::now();
    let mut least = Vec::with_capacity(kinds.len());
    for kind in kinds {
        if least.len() >= FEWEST && begin.elapsed() >= TIME {
            break;
        }
        for rows in kind {
            step(rows);
        }
        least.push([Duration::MAX; N]);
    }
    let begin = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS || begin.elapsed() < TIME {
        for (rows, least) in kinds.iter().flatten().zip(least.iter_mut().flatten()) {
            *least = step(rows).min(*least);
        }
        rounds += 1;
    }
    least
}

/// What all threads of this process have computed together; `None` where the system does not say.
#[cfg(target_os = "linux")]
fn cpu_time() -> Option<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).ok()?;
    let (seconds, nanos) =
        (u64::try_from(time.tv_sec()).ok()?, u32::try_from(time.tv_nsec()).ok()?);
    Some(Duration::new(seconds, nanos))
}

#[cfg(not(target_os = "linux"))]
fn cpu_time() -> Option<Duration> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn computing_takes_cpu_time() {
        let before = cpu_time().unwrap();
        let mut sum = 0_u64;
        while cpu_time().unwrap() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_time().unwrap() > before);
    }
}
