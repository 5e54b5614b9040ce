//! Random models, and engines chained to a pipeline as the services chain them.

use std::ops::Range;
use std::path::Path;

use kernels::Backend;
use model::synth::SynthFamily;
use model::{Store, SynthShape, synth};
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, RowValue};
use worker::engine::{
    Engine, EngineConfig, Placement, RowOutcome, Shortcuts, StageModel, StepOutput,
};

/// Layers of [`tiny`].
pub(crate) const LAYERS: u32 = 4;

/// Vocabulary of [`tiny`].
pub(crate) const VOCAB: u32 = 97;

/// A random model with odd sizes: two query heads for each KV head, no width a multiple of a block.
pub(crate) fn tiny(family: SynthFamily) -> (tempfile::TempDir, Store) {
    let shape = SynthShape {
        layers: LAYERS,
        hidden: 72,
        ffn: 150,
        heads: 4,
        kv_heads: 2,
        vocab: VOCAB,
        family,
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    synth(&shape, 11, &path, &mut |_| {}).unwrap();
    let store = open(&path);
    (dir, store)
}

pub(crate) fn open(path: &Path) -> Store {
    Store::open(path).unwrap()
}

/// One thread, the scalar definition, exact KV.
pub(crate) fn plain() -> EngineConfig {
    EngineConfig {
        backend: Backend::by_name("scalar").unwrap(),
        threads: 1,
        kv_type: KvType::F32,
        kv_blocks: 256,
        max_step_tokens: 1024,
        shortcuts: Shortcuts::default(),
        placement: Placement::default(),
    }
}

/// All stages of a model.
pub(crate) struct Pipeline(pub(crate) Vec<Engine>);

impl Pipeline {
    /// The layers as evenly cut as can be.
    pub(crate) fn open(store: &Store, stages: u32, config: EngineConfig) -> Self {
        let layers = store.config().layers;
        let cut = |stage: u32| stage * layers / stages;
        let engine = |stage| engine(store, cut(stage)..cut(stage + 1), config);
        Self((0..stages).map(engine).collect())
    }

    /// One step through every stage, statuses carried along.
    pub(crate) fn step(&mut self, rows: &[Row]) -> Vec<RowOutcome> {
        let mut rows = rows.to_vec();
        let mut activations = Vec::new();
        let mut outcomes = Vec::new();
        for engine in &mut self.0 {
            let output = engine.forward(&rows, &activations);
            for (row, outcome) in rows.iter_mut().zip(&output.rows) {
                row.status = outcome.status;
                row.detail.clone_from(&outcome.detail);
            }
            StepOutput { activations, rows: outcomes } = output;
        }
        outcomes
    }

    /// The logits after every one of `tokens`, computed in chunks.
    pub(crate) fn logits(&mut self, sequence: &Sequence, chunk: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for start in (0..sequence.tokens.len()).step_by(chunk) {
            let end = (start + chunk).min(sequence.tokens.len());
            let outcomes = self.step(&[sequence.row(start..end, Output::Logits)]);
            logits.extend(floats(&outcomes[0]));
        }
        logits
    }
}

pub(crate) fn engine(store: &Store, layers: Range<u32>, config: EngineConfig) -> Engine {
    Engine::new(StageModel::open(store, layers).unwrap(), config).unwrap()
}

/// The logits of a row that went well.
pub(crate) fn floats(outcome: &RowOutcome) -> Vec<f32> {
    assert_eq!(outcome.status, RowStatus::Ok, "{}", outcome.detail);
    let RowValue::Logits(bytes) = &outcome.value else { panic!("{:?}", outcome.value) };
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Tokens and where their KV is.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) id: u64,
    pub(crate) tokens: Vec<u32>,
    pub(crate) blocks: Vec<BlockId>,
}

impl Sequence {
    /// `len` tokens that look random, in blocks of its own that are in no order: up to eight
    /// sequences fit 256 blocks.
    pub(crate) fn new(id: u64, len: usize) -> Self {
        let mut state = id + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
            (state >> 33) as u32
        };
        let tokens = (0..len).map(|_| next() % VOCAB).collect();
        let needed = (len as u32).div_ceil(BLOCK_TOKENS);
        assert!(needed <= 32, "a sequence has 32 blocks");
        // 13 has no factor in common with 32, so each block comes once.
        let blocks = (0..needed).map(|i| BlockId(id as u32 * 32 + (5 + 13 * i) % 32)).collect();
        Self { id, tokens, blocks }
    }

    /// The row of the tokens `range`.
    pub(crate) fn row(&self, range: Range<usize>, output: Output) -> Row {
        Row {
            sequence: SequenceId(self.id),
            generation: Generation(1),
            position: range.start as u32,
            tokens: self.tokens[range.clone()].to_vec(),
            prefix_hash_before: PrefixHash::EMPTY,
            prefix_hash_after: PrefixHash::EMPTY,
            blocks: self.blocks[..range.end.div_ceil(BLOCK_TOKENS as usize)].to_vec(),
            output,
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: String::new(),
        }
    }
}

/// Compares floats by their bits and says where they differ first.
pub(crate) fn assert_same_bits(found: &[f32], want: &[f32], what: &str) {
    assert_eq!(found.len(), want.len(), "{what}");
    for (index, (found, want)) in found.iter().zip(want).enumerate() {
        assert!(found.to_bits() == want.to_bits(), "{what}: {found} is not {want} at {index}");
    }
}
