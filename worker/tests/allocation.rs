//! A step takes no memory: engine threads allocate nothing, and what the caller's thread allocates does
//! not depend on layers or tokens. What is allocated is what a call returns, the table of its rows, and
//! the entry into the thread pool.
#![expect(clippy::unwrap_used, reason = "everything here is a test or helps one")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use kernels::Backend;
use model::synth::SynthFamily;
use model::{Store, SynthShape, synth};
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, SamplingParameters};
use worker::engine::{Engine, EngineConfig, Placement, Shortcuts, StageModel};

/// Counts allocations: those of each thread, and those of all threads that are not the caller's.
struct Counting;

thread_local! {
    static OWN: Cell<Option<usize>> = const { Cell::new(None) };
}

static OTHERS: AtomicUsize = AtomicUsize::new(0);

fn note() {
    // A thread that is ending has no counter any more, and no step.
    let _ = OWN.try_with(|own| match own.get() {
        Some(count) => own.set(Some(count + 1)),
        None => drop(OTHERS.fetch_add(1, SeqCst)),
    });
}

#[expect(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const BLOCKS_EACH: u32 = 16;

fn row(sequence: u32, position: u32, tokens: u32, output: Output) -> Row {
    let first = sequence * BLOCKS_EACH;
    Row {
        sequence: SequenceId(u64::from(sequence)),
        generation: Generation(1),
        position,
        tokens: (0..tokens).map(|token| (token * 7 + sequence) % 90).collect(),
        prefix_hash_before: PrefixHash::EMPTY,
        prefix_hash_after: PrefixHash::EMPTY,
        blocks: (first..first + BLOCKS_EACH).map(BlockId).collect(),
        output,
        status: RowStatus::Ok,
        detail: String::new(),
        traceparent: String::new(),
    }
}

fn greedy() -> Output {
    Output::Sample(Box::new(SamplingParameters { temperature: 0.0, ..Default::default() }))
}

fn drawn() -> Output {
    let parameters = SamplingParameters { top_k: 5, min_p: 0.01, ..Default::default() };
    Output::Sample(Box::new(parameters))
}

fn engine(layers: u32, family: SynthFamily, threads: usize, kv_type: KvType) -> Engine {
    let shape =
        SynthShape { layers, hidden: 256, ffn: 640, heads: 4, kv_heads: 2, vocab: 97, family };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    synth(&shape, 5, &path, &mut |_| {}).unwrap();
    let store = Store::open(&path).unwrap();
    let config = EngineConfig {
        backend: Backend::detect(),
        threads,
        kv_type,
        kv_blocks: 8 * BLOCKS_EACH,
        max_step_tokens: 512,
        shortcuts: Shortcuts::default(),
        placement: Placement::default(),
    };
    Engine::new(StageModel::open(&store, 0..layers).unwrap(), config).unwrap()
}

/// Allocations of one step: those of this thread, and those of the engine's.
fn allocations(engine: &mut Engine, rows: &[Row]) -> (usize, usize) {
    OTHERS.store(0, SeqCst);
    OWN.set(Some(0));
    let output = engine.forward(rows, &[]);
    let own = OWN.replace(Some(0)).unwrap();
    assert!(output.rows.iter().all(|row| row.status == RowStatus::Ok), "{output:?}");
    (own, OTHERS.load(SeqCst))
}

/// One test, so that no other one allocates meanwhile.
#[test]
fn a_step_takes_no_memory() {
    OWN.set(Some(0));
    for (family, kv_type) in [(SynthFamily::BitNet, KvType::F16), (SynthFamily::Llama, KvType::F32)]
    {
        for threads in [1, 2, 3] {
            let steps: [Vec<Row>; 5] = [
                vec![row(0, 0, 300, greedy())],
                vec![row(0, 300, 1, greedy())],
                vec![row(0, 301, 1, drawn())],
                (0..7).map(|sequence| row(sequence, 0, 33, drawn())).collect(),
                (0..7).map(|sequence| row(sequence, 33, 1, greedy())).collect(),
            ];
            let mut counts = Vec::new();
            for layers in [2, 5] {
                let mut engine = engine(layers, family, threads, kv_type);
                // The pool's own queues grow a few times in their life.
                for _ in 0..3 {
                    for rows in &steps {
                        allocations(&mut engine, rows);
                    }
                }
                let of_steps: Vec<_> =
                    steps.iter().map(|rows| allocations(&mut engine, rows)).collect();
                for (step, (own, others)) in of_steps.iter().enumerate() {
                    let what =
                        format!("{family:?}, {threads} threads, {layers} layers, step {step}");
                    assert_eq!(*others, 0, "{what}: engine threads allocate");
                    assert!(*own < 64, "{what}: {own} allocations by the caller");
                }
                counts.push(of_steps);
            }
            assert_eq!(counts[0], counts[1], "allocations grow with layers");
        }
    }
}
