//! The working memory of an engine: allocated once for the largest step, lent to every step.

use std::slice;
use std::sync::{Mutex, PoisonError};

use kernels::{
    ATTENTION_STATE_HEADER, Quantised, ScreenQuery, TernaryMatrix, Workspace, padded_cols,
    padded_rows, screen_cols,
};
use model::ModelConfig;

use super::head::PositionResult;
use super::profile::Record;
use super::shared::{Buffer, Member, NoMemory, Shared, Team, zeros};
use super::{EngineConfig, EngineError, StageModel, head, sampler};

/// Tokens in an attention segment (`docs/numerics.md`): segments may run on different threads.
pub(super) const SEGMENT_TOKENS: usize = 256;

/// Positions whose logits are computed at once: enough that the head is limited by arithmetic and
/// not by reading it, few enough that the logits of a large vocabulary stay within some MiB.
pub(super) const HEAD_POSITIONS: usize = 16;

/// Up to so many units (token, KV head) a thread, attention is split into segments as well.
pub(super) const UNITS_PER_THREAD: usize = 4;

/// Bytes of partial states of attention, at most, unless the heads of one token need more: with many
/// threads and a long context there could be half a gigabyte, of steps that would hardly be faster.
const PARTIAL_STATE_BYTES: usize = 128 << 20;

/// Query rows (tokens times heads of one KV head) that attend to a block together: enough that
/// fetching the block costs little, few enough that they stay near while block after block passes.
const GROUP_ROWS: usize = 24;

/// [`GROUP_ROWS`] of whole tokens, at least one, with `group` heads each.
fn group_rows(group: usize) -> usize {
    (GROUP_ROWS / group).max(1) * group
}

/// Gate values of all tokens that a thread computes before it goes on to their up values: with
/// those they stay in the second-level or a share of the last-level cache, and yet are so many that
/// reading the activations again for every chunk does not matter.
const CHUNK_FLOATS: usize = 1 << 16;

/// Floats in a thread's chunk of gate values: [`CHUNK_FLOATS`], or one tile for every token.
fn chunk_floats(config: &EngineConfig) -> usize {
    CHUNK_FLOATS.max(TernaryMatrix::TILE_ROWS.saturating_mul(config.max_step_tokens as usize))
}

/// Everything that a step writes beside KV and results. Shapes in tokens `n` of the step.
pub(super) struct Buffers {
    widths: Widths,
    residual: Buffer<f32>,
    product: Buffer<f32>,
    query: Buffer<f32>,
    key: Buffer<f32>,
    value: Buffer<f32>,
    attended: Buffer<f32>,
    gated: Buffer<f32>,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    hidden_codes: CodesBuffer,
    attended_codes: CodesBuffer,
    ffn_codes: CodesBuffer,
    column_sums: Buffer<i32>,
    partial_states: Buffer<f32>,
    head_input: Buffer<f32>,
    logits: Buffer<f32>,
    screen_codes: Buffer<i8>,
    screen_queries: Buffer<ScreenQuery>,
}

/// [`Buffers`] in the hands of a team.
pub(super) struct Planes<'a> {
    /// `[n][hidden]`: the residual stream.
    pub(super) residual: Shared<'a, f32>,
    /// `[n][hidden]`: what is to be added to it.
    pub(super) product: Shared<'a, f32>,
    /// `[n][heads * d]`, before RoPE.
    pub(super) query: Shared<'a, f32>,
    /// `[n][kv heads * d]`, before RoPE.
    pub(super) key: Shared<'a, f32>,
    /// `[n][kv heads * d]`.
    pub(super) value: Shared<'a, f32>,
    /// `[n * heads][d]`: one row for each pair of token and head.
    pub(super) attended: Shared<'a, f32>,
    /// `[n][ffn]`: up times the activation of gate.
    pub(super) gated: Shared<'a, f32>,
    /// `[n][d / 2]`.
    pub(super) cos: Shared<'a, f32>,
    /// `[n][d / 2]`.
    pub(super) sin: Shared<'a, f32>,
    /// `[n][hidden]`: what enters q, k, v, gate and up.
    pub(super) hidden_codes: Codes<'a>,
    /// `[n][heads * d]`: what enters o.
    pub(super) attended_codes: Codes<'a>,
    /// `[n][ffn]`: what enters down.
    pub(super) ffn_codes: Codes<'a>,
    /// `[threads][hidden, padded]`: every thread's sums of some columns of down.
    pub(super) column_sums: Shared<'a, i32>,
    /// `[units * segments][group * (2 + d)]`: attention of single segments.
    pub(super) partial_states: Shared<'a, f32>,
    /// `[HEAD_POSITIONS][hidden]`.
    pub(super) head_input: Shared<'a, f32>,
    /// `[2 * HEAD_POSITIONS][vocab]`: logits, then upper bounds of those that a screen left out.
    pub(super) logits: Shared<'a, f32>,
    /// `[HEAD_POSITIONS][two planes]`: what is screened.
    pub(super) screen_codes: Shared<'a, i8>,
    /// `[HEAD_POSITIONS]`: what bounds need to know of it.
    pub(super) screen_queries: Shared<'a, ScreenQuery>,
}

/// What is as wide as the model says.
#[derive(Clone, Copy)]
struct Widths {
    hidden: usize,
    heads: usize,
    /// Query heads of one KV head.
    group: usize,
    head_dim: usize,
    kv: usize,
    ffn: usize,
    vocab: usize,
    partial_states: usize,
    head_positions: usize,
}

impl Widths {
    fn new(shape: &ModelConfig, has_head: bool, config: &EngineConfig) -> Self {
        let segments = (shape.context as usize).div_ceil(SEGMENT_TOKENS);
        Self {
            hidden: shape.hidden as usize,
            heads: shape.heads as usize,
            group: (shape.heads / shape.kv_heads) as usize,
            head_dim: shape.head_dim as usize,
            kv: shape.kv_heads as usize * shape.head_dim as usize,
            ffn: shape.ffn as usize,
            vocab: shape.vocab as usize,
            partial_states: {
                let a_state = (shape.heads / shape.kv_heads) as usize
                    * (ATTENTION_STATE_HEADER + shape.head_dim as usize)
                    * size_of::<f32>();
                let one_token = segments.saturating_mul(shape.kv_heads as usize);
                UNITS_PER_THREAD
                    .saturating_mul(config.threads)
                    .saturating_mul(segments)
                    .min((PARTIAL_STATE_BYTES / a_state).max(one_token))
            },
            head_positions: match has_head {
                true => HEAD_POSITIONS.min(config.max_step_tokens as usize),
                false => 0,
            },
        }
    }

    /// A little more than [`Buffers::new`] allocates, for some of the codes count as floats, with
    /// a [`Local`] for every thread.
    fn bytes(&self, config: &EngineConfig) -> u64 {
        let Self { hidden, heads, group, head_dim, kv, ffn, vocab, .. } = *self;
        let Self { partial_states, head_positions, .. } = *self;
        let state = ATTENTION_STATE_HEADER + head_dim;
        let a_token = 4 * hidden + 4 * heads * head_dim + 2 * kv + 2 * ffn + head_dim;
        let a_token = a_token + size_of::<PositionResult>().div_ceil(size_of::<f32>());
        let screen = if head_positions == 0 { 0 } else { head::Scratch::WORDS };
        let widest = hidden.max(ffn).max(heads * head_dim);
        let attention = group_rows(group) * (head_dim + 2 * state + 1);
        let attention = attention + Workspace::BYTES.div_ceil(size_of::<f32>());
        let a_thread = 2 * widest
            + hidden
            + padded_rows(hidden)
            + ffn
            + 2 * chunk_floats(config)
            + head_dim
            + attention
            + screen;
        let words = u128::from(config.max_step_tokens) * a_token as u128
            + partial_states as u128 * (group * state) as u128
            + head_positions as u128 * (hidden + screen_cols(hidden) + 2 * vocab) as u128
            + samplers(head_positions, config.threads) as u128
                * (sampler::SCRATCH_WORDS * vocab) as u128
            + config.threads as u128 * a_thread as u128;
        u64::try_from(4 * words).unwrap_or(u64::MAX)
    }
}

/// See [`super::working_bytes`].
pub(super) fn working_bytes(shape: &ModelConfig, has_head: bool, config: &EngineConfig) -> u64 {
    Widths::new(shape, has_head, config).bytes(config)
}

impl Buffers {
    /// Gets memory for steps of `config.max_step_tokens`.
    ///
    /// # Errors
    ///
    /// [`EngineError::Memory`].
    pub(super) fn new(model: &StageModel, config: &EngineConfig) -> Result<Self, EngineError> {
        let widths = Widths::new(model.config(), model.has_head(), config);
        Self::get(widths, config).map_err(|NoMemory| working_memory(model, config))
    }

    fn get(widths: Widths, config: &EngineConfig) -> Result<Self, NoMemory> {
        let n = config.max_step_tokens as usize;
        let Widths { hidden, heads, group, head_dim, kv, ffn, vocab, .. } = widths;
        let Widths { partial_states, head_positions, .. } = widths;
        let state = ATTENTION_STATE_HEADER + head_dim;
        let floats = |width: usize| Buffer::zeros(n, width);
        Ok(Self {
            widths,
            residual: floats(hidden)?,
            product: floats(hidden)?,
            query: floats(heads * head_dim)?,
            key: floats(kv)?,
            value: floats(kv)?,
            attended: Buffer::zeros(n * heads, head_dim)?,
            gated: floats(ffn)?,
            cos: floats(head_dim / 2)?,
            sin: floats(head_dim / 2)?,
            hidden_codes: CodesBuffer::new(n, hidden)?,
            attended_codes: CodesBuffer::new(n, heads * head_dim)?,
            ffn_codes: CodesBuffer::new(n, ffn)?,
            column_sums: Buffer::zeros(config.threads, padded_rows(hidden))?,
            partial_states: Buffer::zeros(partial_states, group * state)?,
            head_input: Buffer::zeros(head_positions, hidden)?,
            logits: Buffer::zeros(2 * head_positions, vocab)?,
            screen_codes: Buffer::zeros(head_positions, 2 * screen_cols(hidden))?,
            screen_queries: Buffer::filled(ScreenQuery::default(), head_positions, 1)?,
        })
    }

    /// How many partial states of attention a step may have.
    pub(super) fn partial_states_max(&self) -> usize {
        self.widths.partial_states
    }

    /// Lends what a step of `n` tokens needs, and `partial_states`.
    pub(super) fn lend(&mut self, team: &Team, n: usize, partial_states: usize) -> Planes<'_> {
        let w = self.widths;
        Planes {
            residual: self.residual.lend(team, n, w.hidden),
            product: self.product.lend(team, n, w.hidden),
            query: self.query.lend(team, n, w.heads * w.head_dim),
            key: self.key.lend(team, n, w.kv),
            value: self.value.lend(team, n, w.kv),
            attended: self.attended.lend(team, n * w.heads, w.head_dim),
            gated: self.gated.lend(team, n, w.ffn),
            cos: self.cos.lend(team, n, w.head_dim / 2),
            sin: self.sin.lend(team, n, w.head_dim / 2),
            hidden_codes: self.hidden_codes.lend(team, n),
            attended_codes: self.attended_codes.lend(team, n),
            ffn_codes: self.ffn_codes.lend(team, n),
            column_sums: self.column_sums.lend(team, team.threads(), padded_rows(w.hidden)),
            partial_states: self.partial_states.lend(
                team,
                partial_states,
                w.group * (ATTENTION_STATE_HEADER + w.head_dim),
            ),
            head_input: self.head_input.lend(team, w.head_positions, w.hidden),
            logits: self.logits.lend(team, 2 * w.head_positions, w.vocab),
            screen_codes: self.screen_codes.lend(team, w.head_positions, 2 * screen_cols(w.hidden)),
            screen_queries: self.screen_queries.lend(team, w.head_positions, 1),
        }
    }

    /// The residual stream as the last step left it: `[n][hidden]` and more.
    pub(super) fn residual(&self) -> &[f32] {
        self.residual.values()
    }
}

/// int8 activations of every token, with scales and sums.
struct CodesBuffer {
    stride: usize,
    codes: Buffer<i8>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
}

impl CodesBuffer {
    fn new(n: usize, width: usize) -> Result<Self, NoMemory> {
        let stride = padded_cols(width);
        Ok(Self {
            stride,
            codes: Buffer::zeros(n, stride)?,
            scales: Buffer::zeros(n, 1)?,
            sums: Buffer::zeros(n, 1)?,
        })
    }

    fn lend(&mut self, team: &Team, n: usize) -> Codes<'_> {
        Codes {
            stride: self.stride,
            codes: self.codes.lend(team, n, self.stride),
            scales: self.scales.lend(team, n, 1),
            sums: self.sums.lend(team, n, 1),
        }
    }
}

/// [`CodesBuffer`] in the hands of a team.
pub(super) struct Codes<'a> {
    stride: usize,
    codes: Shared<'a, i8>,
    scales: Shared<'a, f32>,
    sums: Shared<'a, i32>,
}

impl Codes<'_> {
    /// Quantises `x` into row `token`, which becomes all zeros if that cannot be done.
    ///
    /// # Errors
    ///
    /// [`kernels::NotFinite`] if `x` holds a NaN or an infinity.
    pub(super) fn quantise(
        &self,
        member: &Member<'_>,
        backend: kernels::Backend,
        token: usize,
        x: &[f32],
    ) -> Result<(), kernels::NotFinite> {
        let codes = self.codes.row(member, token);
        let outcome = backend.quantise(x, codes);
        let (scale, sum) = outcome.unwrap_or_else(|_| {
            codes.fill(0);
            (1.0, 0)
        });
        self.scales.row(member, token)[0] = scale;
        self.sums.row(member, token)[0] = sum;
        outcome.map(|_| ())
    }

    /// The codes of row `token`, padding included, to read in this phase.
    pub(super) fn row<'m>(&'m self, member: &'m Member<'_>, token: usize) -> &'m [i8] {
        &self.codes.read(member)[token * self.stride..][..self.stride]
    }

    /// Values of a row, padding included.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// All rows, to read in this phase.
    pub(super) fn read<'m>(&'m self, member: &'m Member<'_>) -> Quantised<'m> {
        let codes = self.codes.read(member);
        Quantised::new(codes, self.stride, self.scales.read(member), self.sums.read(member))
    }
}

/// The int8 input of products for the one token of a step, in the memory of one thread.
pub(super) struct OwnCodes {
    /// As wide as the widest product's input.
    codes: Vec<i8>,
    scale: f32,
    sum: i32,
}

impl OwnCodes {
    /// Quantises `x` as a row of `stride` values, all zeros if that cannot be done.
    ///
    /// # Errors
    ///
    /// [`kernels::NotFinite`] if `x` holds a NaN or an infinity.
    pub(super) fn quantise(
        &mut self,
        backend: kernels::Backend,
        stride: usize,
        x: &[f32],
    ) -> Result<(), kernels::NotFinite> {
        let codes = &mut self.codes[..stride];
        let outcome = backend.quantise(x, codes);
        (self.scale, self.sum) = outcome.unwrap_or_else(|_| {
            codes.fill(0);
            (1.0, 0)
        });
        outcome.map(|_| ())
    }

    /// The row of `stride` values.
    pub(super) fn read(&self, stride: usize) -> Quantised<'_> {
        let (scale, sum) = (slice::from_ref(&self.scale), slice::from_ref(&self.sum));
        Quantised::new(self.row(stride), stride, scale, sum)
    }

    /// What the row was multiplied by.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// The codes of the row, padding included.
    pub(super) fn row(&self, stride: usize) -> &[i8] {
        &self.codes[..stride]
    }
}

/// What one thread needs for itself.
pub(super) struct Local {
    /// On which memory node the thread is: which copy of the weights it reads.
    pub(super) node: usize,
    /// `[hidden]`: the residual stream of a step of one token, the same in every thread.
    pub(super) residual: Vec<f32>,
    /// What enters the next product in a step of one token, the same in every thread.
    pub(super) own: OwnCodes,
    /// `[n][rows of a chunk]`, at most [`chunk_floats`].
    pub(super) gate: Vec<f32>,
    /// As `gate`.
    pub(super) up: Vec<f32>,
    /// `[ffn]`: rows of up or columns of down that are not skipped.
    pub(super) places: Vec<u32>,
    /// As wide as the widest product's input.
    pub(super) normed: Vec<f32>,
    /// `[d]`: a key after RoPE.
    pub(super) rotated: Vec<f32>,
    /// `[rows][d]`, at most [`group_rows`], as the three below: queries after RoPE.
    pub(super) queries: Vec<f32>,
    /// `[rows]`: how many tokens of a block each sees.
    pub(super) filled: Vec<u8>,
    /// `[rows][2 + d]`: the segments so far.
    pub(super) states: Vec<f32>,
    /// `[rows][2 + d]`: the current segment.
    pub(super) segments: Vec<f32>,
    /// Of products for many tokens.
    pub(super) workspace: Workspace,
    /// On the last stage.
    pub(super) screen: Option<head::Scratch>,
    /// Of steps that are profiled.
    pub(super) record: Record,
}

impl Local {
    /// Gets memory for one thread, which will sit on memory node `node`.
    ///
    /// # Errors
    ///
    /// [`EngineError::Memory`].
    pub(super) fn new(
        model: &StageModel,
        config: &EngineConfig,
        node: usize,
    ) -> Result<Self, EngineError> {
        Self::get(model, config, node).map_err(|NoMemory| working_memory(model, config))
    }

    fn get(model: &StageModel, config: &EngineConfig, node: usize) -> Result<Self, NoMemory> {
        let shape = model.config();
        let head_dim = shape.head_dim as usize;
        let attended = shape.heads as usize * head_dim;
        let widest = (shape.hidden as usize).max(shape.ffn as usize).max(attended);
        let state = ATTENTION_STATE_HEADER + head_dim;
        let rows = group_rows((shape.heads / shape.kv_heads) as usize);
        let chunk = chunk_floats(config);
        Ok(Self {
            node,
            residual: zeros(shape.hidden as usize)?,
            own: OwnCodes { codes: zeros(padded_cols(widest))?, scale: 1.0, sum: 0 },
            gate: zeros(chunk)?,
            up: zeros(chunk)?,
            places: zeros(shape.ffn as usize)?,
            normed: zeros(widest)?,
            rotated: zeros(head_dim)?,
            queries: zeros(rows * head_dim)?,
            filled: zeros(rows)?,
            states: zeros(rows * state)?,
            segments: zeros(rows * state)?,
            workspace: Workspace::try_new().map_err(|_| NoMemory)?,
            // Some KiB, as much as any request takes.
            screen: model.has_head().then(head::Scratch::new),
            record: Record::default(),
        })
    }
}

/// How many threads sample at once, at most.
fn samplers(head_positions: usize, threads: usize) -> usize {
    head_positions.min(threads)
}

/// The samplers' working memory: as wide as the vocabulary, so there are no more than threads that can
/// sample at once, and a thread takes whichever is free.
pub(super) struct Samplers(Mutex<Vec<sampler::Scratch>>);

impl Samplers {
    /// For the last stage; none for others.
    ///
    /// # Errors
    ///
    /// [`EngineError::Memory`].
    pub(super) fn new(model: &StageModel, config: &EngineConfig) -> Result<Self, EngineError> {
        let widths = Widths::new(model.config(), model.has_head(), config);
        let scratch = |_| sampler::Scratch::new(widths.vocab);
        let all = (0..samplers(widths.head_positions, config.threads)).map(scratch);
        let all =
            all.collect::<Result<_, _>>().map_err(|NoMemory| working_memory(model, config))?;
        Ok(Self(Mutex::new(all)))
    }

    /// Runs `work` with one of them.
    ///
    /// # Panics
    ///
    /// If this is not the last stage.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut sampler::Scratch) -> R) -> R {
        let mut taken = Taken { samplers: self, scratch: None };
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = taken.scratch.insert(free.pop().expect("as many as threads that sample"));
        drop(free);
        work(scratch)
    }
}

/// One of [`Samplers`], given back when this is dropped, by a panic as well.
struct Taken<'s> {
    samplers: &'s Samplers,
    scratch: Option<sampler::Scratch>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut free = self.samplers.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.scratch.take());
    }
}

/// There is not the memory that an engine works with.
fn working_memory(model: &StageModel, config: &EngineConfig) -> EngineError {
    let bytes = working_bytes(model.config(), model.has_head(), config);
    EngineError::Memory { what: "the working memory of steps", bytes }
}

#[cfg(test)]
mod tests {
    use kernels::Backend;
    use model::{Store, SynthShape, synth};
    use proto::plan::KvType;

    use super::super::{Placement, Shortcuts};
    use super::*;

    #[test]
    fn what_samplers_and_partial_states_take_does_not_grow_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let shape: SynthShape = "tiny".parse().unwrap();
        synth::synth(&shape, 1, &path, &mut |_| {}).unwrap();
        let tiny = Store::open(&path).unwrap().config().clone();
        // As 2B4T, where it matters here.
        let bytes = |threads: usize, context: u32| {
            let config = EngineConfig {
                backend: Backend::detect(),
                threads,
                kv_type: KvType::F16,
                kv_blocks: 1,
                max_step_tokens: 512,
                shortcuts: Shortcuts::default(),
                placement: Placement::default(),
            };
            let shape = ModelConfig {
                vocab: 128_256,
                context,
                heads: 20,
                kv_heads: 5,
                head_dim: 128,
                ..tiny.clone()
            };
            working_bytes(&shape, true, &config)
        };
        let a_thread = (bytes(128, 256) - bytes(64, 256)) / 64;
        assert!(a_thread < 2 << 20, "{a_thread} bytes a thread");
        let long = bytes(128, 131_072) - bytes(128, 256);
        assert!(long <= PARTIAL_STATE_BYTES as u64, "{long} bytes for a long context");
    }
}
