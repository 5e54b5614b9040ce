//! Computes the layers of one stage: rows of many sequences in, activations or results out.
//!
//! Pure: no clock, no socket, no file but the mapped shards, no randomness. What a row's result is
//! depends on its tokens, its KV and its parameters alone: not on the other rows of the step, on
//! how a prompt was cut into chunks, on the number of stages or of threads, nor on the CPU
//! (`docs/numerics.md`).
//!
//! ```text
//! rows, input ──▶ rows::Batch ──▶ step: every thread walks all phases ──▶ StepOutput
//!                 (checked,        embed │ per layer: norm, q k v, KV,      (rows that failed
//!                  packed)         or x  │ attention, o, norm, FFN │ head     have a status)
//! ```
//!
//! * `stage_model` the weights; `cache` the KV blocks; `buffers` everything else that is written
//! * `step` the walk of one thread; `attention`, `feed_forward` and `head` its larger parts; `sampler`
//! * `shared` and `barrier` make it safe and quick for many threads
//! * `profile` what a step spent its time on, for those who bring a clock

mod attention;
mod barrier;
mod buffers;
mod cache;
mod feed_forward;
mod head;
mod placement;
mod profile;
mod rows;
mod sampler;
mod shared;
mod stage_model;
mod step;

use std::ops::Range;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::{io, mem};

use bytes::Bytes;
use kernels::Backend;
use model::{ModelConfig, StoreError, WeightFile};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, RowValue};

use crate::topology::Seats;

use self::buffers::{Buffers, Local, Samplers};
use self::cache::KvCache;
use self::head::PositionResult;
pub use self::placement::weight_copies;
use self::profile::Part;
pub use self::profile::{Clock, StepProfile};
use self::rows::Batch;
use self::shared::{Buffer, NoMemory};
pub use self::stage_model::StageModel;
pub(crate) use self::stage_model::stage_weight_bytes;

/// Times that a step is computed before weights to which somebody writes all the time are given up.
const VERIFIED_TRIES: usize = 3;

/// How an engine computes. None of it but the KV type changes a result.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Which kernels.
    pub backend: Backend,
    /// Threads that compute.
    pub threads: usize,
    /// How keys and values are rounded and stored.
    pub kv_type: KvType,
    /// Block ids are `0..kv_blocks`.
    pub kv_blocks: u32,
    /// The most tokens in one step; working memory is allocated for as many.
    pub max_step_tokens: u32,
    /// Which work is left out where that cannot be seen.
    pub shortcuts: Shortcuts,
    /// Where weights and threads are.
    pub placement: Placement,
}

/// Work that need not be done, because what it would give is known already. Exact: results have the
/// same bits with and without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortcuts {
    /// Rows of up whose gate is zero, and columns of down whose input is zero.
    pub zeros: bool,
    /// Rows of the head that provably do not win.
    pub screen: bool,
}

impl Default for Shortcuts {
    /// All of them.
    fn default() -> Self {
        Self { zeros: true, screen: true }
    }
}

/// Where an engine's weights and threads are. None of it changes a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Where weights are read from.
    pub weights: WeightMemory,
    /// Weights stay in memory, whatever else wants it.
    pub lock: bool,
    /// Every thread stays on a core of its own, as long as there are cores.
    pub pin: bool,
}

/// Where weights are read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightMemory {
    /// The files of the store, mapped: shared with every other process, and with the page cache.
    #[default]
    Map,
    /// A private copy on huge pages, one for each memory node of the machine.
    Copy,
}

impl FromStr for WeightMemory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "map" => Ok(Self::Map),
            "copy" => Ok(Self::Copy),
            _ => Err("must be map or copy".to_owned()),
        }
    }
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A stage has some of the model's layers.
    #[error("a stage cannot have layers {}..{} of a model of {model_layers}", layers.start, layers.end)]
    Layers {
        /// What was asked for.
        layers: Range<u32>,
        /// What there is.
        model_layers: u32,
    },
    /// The store does not give the weights.
    #[error("failed to open the weights of a stage")]
    Store(#[from] StoreError),
    /// The weights are not any more what they were when they were opened.
    #[error("the weights of a stage were changed while it served")]
    Changed(#[source] StoreError),
    /// Somebody writes to the files all the time, though what they hold was right whenever it was
    /// compared.
    #[error("the files of a stage's weights are written to all the time")]
    Restless,
    /// Something must be at least one.
    #[error("{what} must be at least 1")]
    Zero {
        /// What was 0.
        what: &'static str,
    },
    /// There is not so much memory.
    #[error("failed to get {bytes} bytes of memory for {what}")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much; `u64::MAX` when it cannot be counted.
        bytes: u64,
    },
    /// There is no memory for a copy of the weights.
    #[error("failed to copy {bytes} bytes of weights")]
    Copy {
        /// How much.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// The operating system does not let this process lock so much memory.
    #[error(
        "failed to lock {bytes} bytes of weights in memory: the limit on locked memory \
         (ulimit -l, LimitMEMLOCK of systemd) must be at least as much"
    )]
    Lock {
        /// How much.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// The operating system does not put threads on cores.
    #[error("failed to put a compute thread on a core")]
    Seat(#[source] io::Error),
    /// The operating system gave no threads.
    #[error("failed to start {threads} compute threads")]
    Threads {
        /// How many.
        threads: usize,
        /// Why not.
        source: rayon::ThreadPoolBuildError,
    },
}

/// What a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Its layers, and on the last stage norm, head and sampler.
    Layers,
    /// Norm, head and sampler alone.
    Draw,
}

/// What one step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// `[tokens of the step][hidden]`, zeros for rows that are not OK; empty on the last stage.
    pub activations: Vec<f32>,
    /// One for every row, in their order.
    pub rows: Vec<RowOutcome>,
}

/// How one row went.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOutcome {
    /// What it came in with, unless something happened here.
    pub status: RowStatus,
    /// For people, when it is not OK.
    pub detail: String,
    /// What was asked for; only on the last stage, and when the status is OK.
    pub value: RowValue,
}

/// One stage's weights, KV cache and threads.
pub struct Engine {
    /// One for each memory node on which threads sit; at least one.
    models: Vec<StageModel>,
    /// Held for its threads.
    _seats: Seats,
    config: EngineConfig,
    cache: KvCache,
    buffers: Buffers,
    /// `[wanted positions]`; on the last stage.
    results: Buffer<PositionResult>,
    samplers: Samplers,
    /// With cuts of the steps before.
    luck: head::Luck,
    /// One for each thread, which holds it for a whole step.
    locals: Vec<Mutex<Local>>,
    pool: rayon::ThreadPool,
}

impl Engine {
    /// Gets memory and threads. KV pages are zero and untouched until a block is first written.
    ///
    /// # Errors
    ///
    /// [`EngineError::Zero`], [`EngineError::Memory`] and [`EngineError::Threads`]; those of
    /// [`Placement`] if it asks for anything.
    pub fn new(model: StageModel, config: EngineConfig) -> Result<Self, EngineError> {
        for (what, is_zero) in [
            ("the number of threads", config.threads == 0),
            ("the number of KV blocks", config.kv_blocks == 0),
            ("the number of tokens in a step", config.max_step_tokens == 0),
        ] {
            if is_zero {
                return Err(EngineError::Zero { what });
            }
        }
        let cache = KvCache::new(model.config(), model.layer_count(), &config)?;
        let buffers = Buffers::new(&model, &config)?;
        let wanted_max = if model.has_head() { config.max_step_tokens as usize } else { 0 };
        let results = Buffer::filled(PositionResult::Nothing, wanted_max, 1);
        let results = results.map_err(|NoMemory| {
            let bytes = (wanted_max * size_of::<PositionResult>()) as u64;
            EngineError::Memory { what: "the results of a step", bytes }
        })?;
        let seats = placement::seats(&config);
        let local = |thread| Local::new(&model, &config, seats.node(thread)).map(Mutex::new);
        let locals = (0..config.threads).map(local).collect::<Result<_, _>>()?;
        let samplers = Samplers::new(&model, &config)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.threads)
            .thread_name(|index| format!("engine-{index}"))
            .build()
            .map_err(|source| EngineError::Threads { threads: config.threads, source })?;
        let seated = pool.broadcast(|context| seats.sit(context.index()));
        seated.into_iter().collect::<Result<(), _>>().map_err(EngineError::Seat)?;
        let models = placement::place(model, &config, &seats)?;
        let luck = head::Luck::default();
        Ok(Self {
            models,
            _seats: seats,
            config,
            cache,
            buffers,
            results,
            samplers,
            luck,
            locals,
            pool,
        })
    }

    /// Computes one step: `rows` in order, each seeing the KV of earlier rows of its sequence.
    ///
    /// `input` is `[tokens of the step][hidden]` for a later stage, and empty for the first. A row
    /// with a status other than OK is passed over. A row fails alone: with
    /// [`RowStatus::Invalid`] before anything of it is computed, with [`RowStatus::NotFinite`] when
    /// its numbers leave the floats (its own KV is then worthless), or with
    /// [`RowStatus::NeedState`] when it builds on an earlier row of the step that was not computed.
    ///
    /// # Panics
    ///
    /// If `input` has another length: the caller checks sizes first. After a panic in a kernel the
    /// engine can be used again, but what the step's blocks hold is unknown.
    pub fn forward(&mut self, rows: &[Row], input: &[f32]) -> StepOutput {
        self.step(rows, input, Work::Layers, None)
    }

    /// Draws from residual streams: norm, head and sampler of [`Output::Draw`] rows, where norm and
    /// head are. `input` is `[tokens of the step][hidden]`, what [`Output::State`] gave for each. The
    /// tokens are those that the last stage would have drawn.
    ///
    /// # Panics
    ///
    /// If `input` has another length.
    pub fn draw(&mut self, rows: &[Row], input: &[f32]) -> StepOutput {
        self.step(rows, input, Work::Draw, None)
    }

    /// [`Self::forward`] with weights that nobody wrote to meanwhile: a step during which somebody did is
    /// computed again if they are what they were after all (a file got another name, or other rights).
    ///
    /// # Errors
    ///
    /// [`EngineError::Changed`] if they are not, and [`EngineError::Restless`]. Nothing of the step may
    /// be used, and the engine no more.
    ///
    /// # Panics
    ///
    /// As [`Self::forward`].
    pub fn forward_verified(
        &mut self,
        rows: &[Row],
        input: &[f32],
    ) -> Result<StepOutput, EngineError> {
        self.step_verified(rows, input, Work::Layers)
    }

    /// [`Self::draw`] with weights that nobody wrote to meanwhile: see [`Self::forward_verified`].
    ///
    /// # Errors
    ///
    /// As [`Self::forward_verified`].
    ///
    /// # Panics
    ///
    /// As [`Self::draw`].
    pub fn draw_verified(
        &mut self,
        rows: &[Row],
        input: &[f32],
    ) -> Result<StepOutput, EngineError> {
        self.step_verified(rows, input, Work::Draw)
    }

    fn step_verified(
        &mut self,
        rows: &[Row],
        input: &[f32],
        work: Work,
    ) -> Result<StepOutput, EngineError> {
        for _ in 0..VERIFIED_TRIES {
            let output = self.step(rows, input, work, None);
            // Of what came before it is known already: looked at after the last read of a weight.
            if self.models.iter().all(StageModel::is_unchanged) {
                return Ok(output);
            }
            let models = &self.models;
            let verify = || models.iter().try_for_each(StageModel::verify_changed);
            self.pool.install(verify).map_err(EngineError::Changed)?;
            // The step writes what it wrote to the same places of the KV cache.
        }
        Err(EngineError::Restless)
    }

    /// The files whose bytes the weights are, those of all copies.
    pub fn weight_files(&self) -> Vec<WeightFile> {
        self.models.iter().flat_map(StageModel::files).cloned().collect()
    }

    /// [`Self::forward`], and what it spent its time on as told by `clock`.
    ///
    /// # Panics
    ///
    /// As [`Self::forward`].
    pub fn forward_profiled(
        &mut self,
        rows: &[Row],
        input: &[f32],
        clock: &dyn Clock,
    ) -> (StepOutput, StepProfile) {
        let output = self.step(rows, input, Work::Layers, Some(clock));
        let mut profile = StepProfile::default();
        for local in &mut self.locals {
            let local = local.get_mut().unwrap_or_else(PoisonError::into_inner);
            profile.add(&mem::take(&mut local.record).profile);
        }
        (output, profile)
    }

    fn step(
        &mut self,
        rows: &[Row],
        input: &[f32],
        work: Work,
        clock: Option<&dyn Clock>,
    ) -> StepOutput {
        let batch = Batch::new(rows, self.model().config(), &self.config);
        let brings_none = work == Work::Layers && self.model().is_first();
        let input_len = if brings_none { 0 } else { batch.place_count() * self.hidden() };
        assert_eq!(input.len(), input_len, "activations must match the tokens of the step");
        // Nothing of a step that panicked, and of which nobody took the results, is an answer to this one.
        let results = self.results.values_mut().iter_mut().take(batch.wanted().len());
        results.for_each(|result| *result = PositionResult::Nothing);
        if !batch.tokens().is_empty() {
            self.compute(&batch, input, work, clock);
        }
        let goes_on = work == Work::Layers && !self.is_last();
        let activations = if goes_on { self.activations(&batch) } else { Vec::new() };
        let states = if goes_on { Vec::new() } else { self.states(&batch) };
        let results = self.results.values_mut().iter_mut().take(batch.wanted().len());
        let results = results.map(|result| mem::replace(result, PositionResult::Nothing));
        let mut rows = batch.finish(results);
        for (row, state) in states {
            if rows[row].status == RowStatus::Ok {
                rows[row].value = RowValue::State(state);
            }
        }
        StepOutput { activations, rows }
    }

    /// The residual streams that rows want back, by row.
    fn states(&self, batch: &Batch<'_>) -> Vec<(usize, Bytes)> {
        let hidden = self.hidden();
        let lasts = (0..batch.tokens().len()).filter(|&token| {
            let row = batch.row_of(token);
            let is_last = batch.tokens().get(token + 1).map(|next| next.row)
                != Some(batch.tokens()[token].row);
            row.output == Output::State && is_last
        });
        let state = |token: usize| {
            let values = &self.buffers.residual()[token * hidden..][..hidden];
            (batch.tokens()[token].row, values.iter().flat_map(|x| x.to_le_bytes()).collect())
        };
        lasts.map(state).collect()
    }

    /// Enters the pool once, for the whole step.
    fn compute(&mut self, batch: &Batch<'_>, input: &[f32], work: Work, clock: Option<&dyn Clock>) {
        let begin_ns = clock.map(|clock| clock.now_ns());
        let team = shared::Team::new(&self.pool);
        let ends = self.model().has_head() && (work == Work::Draw || self.model().is_last());
        let wanted = if ends { batch.wanted().len() } else { 0 };
        let kv_heads = self.model().config().kv_heads as usize;
        let states_max = self.buffers.partial_states_max();
        let segments = match work {
            Work::Layers => {
                attention::shared_segments(batch, kv_heads, self.config.threads, states_max)
            }
            Work::Draw => None,
        };
        let states = segments.map_or(0, |segments| batch.tokens().len() * kv_heads * segments);
        let step = step::Step {
            backend: self.config.backend,
            model: &self.models[0],
            models: &self.models,
            batch,
            work,
            ends,
            input,
            cache: self.cache.lend(&team),
            planes: self.buffers.lend(&team, batch.tokens().len(), states),
            segments,
            samplers: &self.samplers,
            results: self.results.lend(&team, wanted, 1),
            queue: shared::Queue::default(),
            columns: shared::Queue::default(),
            shortcuts: self.config.shortcuts,
            progress: head::Progress::default(),
            tries_cuts: self.luck.tries(),
            clock,
        };
        let locals = &self.locals;
        shared::run(&self.pool, team, |member| {
            // Not poisoned for good by a step that panicked: nothing in it outlives a step.
            let mut local = locals[member.index()].lock().unwrap_or_else(PoisonError::into_inner);
            begin_ns.inspect(|&now_ns| local.record.begin(now_ns));
            step.lap(&mut local, Part::Waiting);
            step.walk(member, &mut local)
        });
        // A thread that was done early waited for the last one.
        locals.iter().for_each(|local| {
            step.lap(&mut local.lock().unwrap_or_else(PoisonError::into_inner), Part::Waiting);
        });
        self.luck.note(step.progress.cuts());
    }

    /// The residual stream in the places of the step's tokens, zeros where a row failed.
    fn activations(&self, batch: &Batch<'_>) -> Vec<f32> {
        let hidden = self.hidden();
        let mut activations = vec![0.0; batch.place_count() * hidden];
        let computed = self.buffers.residual().chunks_exact(hidden);
        for (token, from) in batch.tokens().iter().zip(computed) {
            if !batch.has_failed(token.row) {
                activations[token.place * hidden..][..hidden].copy_from_slice(from);
            }
        }
        activations
    }

    /// Bytes of the weights of this stage, all copies together.
    pub fn weight_bytes(&self) -> u64 {
        self.models.iter().map(StageModel::weight_bytes).sum()
    }

    /// Bytes of this stage's KV cache when every block was used.
    pub fn kv_bytes(&self) -> u64 {
        let EngineConfig { kv_type, kv_blocks, .. } = self.config;
        kv_bytes(self.model().config(), self.model().layer_count(), kv_type, kv_blocks)
    }

    /// Bytes that it writes beside KV: see [`working_bytes`].
    pub fn working_bytes(&self) -> u64 {
        working_bytes(self.model().config(), self.model().has_head(), &self.config)
    }

    fn model(&self) -> &StageModel {
        &self.models[0]
    }

    /// Whether the model's first layer is here, and so the embedding.
    pub fn is_first(&self) -> bool {
        self.model().is_first()
    }

    /// Whether norm and head are here, to draw with: see [`Self::draw`].
    pub fn has_head(&self) -> bool {
        self.model().has_head()
    }

    /// Whether the model's last layer is here, and so norm, head and sampler.
    pub fn is_last(&self) -> bool {
        self.model().is_last()
    }

    /// The layers of this stage.
    pub fn layers(&self) -> Range<u32> {
        self.model().layers()
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.model().config().hidden as usize
    }

    /// Tokens that the model knows.
    pub fn vocab(&self) -> usize {
        self.model().config().vocab as usize
    }

    /// How it computes.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }
}

/// Bytes of the KV cache of `layers` layers with `blocks` blocks; `u64::MAX` when it cannot be
/// counted.
pub fn kv_bytes(config: &ModelConfig, layers: u32, kv_type: KvType, blocks: u32) -> u64 {
    let factors = [
        u64::from(layers),
        u64::from(blocks),
        u64::from(proto::BLOCK_TOKENS),
        u64::from(config.kv_heads),
        u64::from(config.head_dim),
        u64::from(kv_type.value_bytes()),
    ];
    // Keys and values.
    factors.into_iter().fold(2, u64::saturating_mul)
}

/// Bytes of the working memory of an engine, all threads together: what a step writes beside KV.
/// Where the head is (`has_head`), some is for logits and the sampler.
pub fn working_bytes(model: &ModelConfig, has_head: bool, config: &EngineConfig) -> u64 {
    buffers::working_bytes(model, has_head, config)
}

#[cfg(test)]
mod tests {
    use model::{Store, SynthShape, synth};
    use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
    use proto::step::Sampled;

    use super::*;

    #[test]
    fn what_a_step_left_when_it_panicked_is_no_answer_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let shape: SynthShape = "tiny".parse().unwrap();
        synth::synth(&shape, 1, &path, &mut |_| {}).unwrap();
        let store = Store::open(&path).unwrap();
        // The first of two stages, which has the head as well: it is tied.
        let model = StageModel::open_to_draw(&store, 0..1).unwrap();
        let config = EngineConfig {
            backend: Backend::detect(),
            threads: 1,
            kv_type: KvType::F16,
            kv_blocks: 1,
            max_step_tokens: 4,
            shortcuts: Shortcuts::default(),
            placement: Placement::default(),
        };
        let mut engine = Engine::new(model, config).unwrap();
        let left = Sampled { token: 7, logprob: None, top: Vec::new() };
        engine.results.values_mut().fill(PositionResult::Sampled(left));
        let row = Row {
            sequence: SequenceId(1),
            generation: Generation(1),
            position: 0,
            tokens: vec![1, 2],
            prefix_hash_before: PrefixHash::EMPTY,
            prefix_hash_after: PrefixHash::EMPTY,
            blocks: [BlockId(0)].into_iter().collect(),
            output: Output::Sample(Box::default()),
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: String::new(),
        };
        let output = engine.forward(&[row], &[]);
        assert_eq!(output.rows[0].value, RowValue::None, "only the last stage draws");
    }
}
