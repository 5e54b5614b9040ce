//! Steps through engine and sessions together: what a row that failed leaves behind.

use kernels::Backend;
use proto::ids::{Epoch, Incarnation, PipelineId, StepId, Term};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, SamplingParameters, StepHeader};

use super::*;
use crate::engine::{EngineConfig, Placement, Shortcuts, StageModel};
use crate::tests::harness::{LONG, row, store};

/// The last two layers of four, so that activations come from outside.
fn later_stage() -> Executor {
    let store = store();
    let config = EngineConfig {
        backend: Backend::detect(),
        threads: 1,
        kv_type: KvType::F32,
        kv_blocks: 16,
        max_step_tokens: 64,
        shortcuts: Shortcuts::default(),
        placement: Placement::default(),
    };
    let model = StageModel::open(&store, 2..4).unwrap();
    Executor::new(Engine::new(model, config).unwrap(), store.config().context)
}

/// A step of `rows`: the first has `value` for all its activations, the others 0.5.
fn step(executor: &Executor, rows: Vec<Row>, value: f32) -> Step {
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
    let hidden = executor.engine.hidden();
    let mut activations = vec![0.5; tokens * hidden];
    activations[..rows[0].tokens.len() * hidden].fill(value);
    Step {
        header: StepHeader {
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            term: Term(1),
            dst_incarnation: Incarnation([0; 16]),
            step: StepId(1),
            acked_step: StepId(0),
            deadline_remaining: LONG,
        },
        rows,
        ended_sequences: Vec::new(),
        stage_times: Vec::new(),
        activations: little_endian(&activations),
    }
}

fn statuses(executed: &Executed) -> Vec<RowStatus> {
    executed.step.rows.iter().map(|row| row.status).collect()
}

/// Runs `failing`, which must end as `status`; after it, nothing builds on its tokens, and when
/// they come again they are computed.
fn check(failing: Row, activation: f32, status: RowStatus) {
    let mut executor = later_stage();
    let end = failing.position + failing.tokens.len() as u32;
    let again = Row { output: Output::None, ..failing.clone() };
    let first = step(&executor, vec![row(0, 0, 5, Output::None)], 0.5);
    assert_eq!(statuses(&executor.execute(first, false).unwrap()), [RowStatus::Ok]);

    let next = || row(0, end, 1, Output::None);
    let failed = step(&executor, vec![failing, next()], activation);
    assert_eq!(statuses(&executor.execute(failed, false).unwrap()), [status, RowStatus::NeedState]);
    let on_it = step(&executor, vec![next()], 0.5);
    assert_eq!(statuses(&executor.execute(on_it, false).unwrap()), [RowStatus::NeedState]);

    let whole = step(&executor, vec![again, next()], 0.5);
    assert_eq!(statuses(&executor.execute(whole, false).unwrap()), [RowStatus::Ok; 2]);
}

#[test]
fn what_is_not_finite_is_not_recorded() {
    check(row(0, 5, 3, Output::None), f32::NAN, RowStatus::NotFinite);
}

/// The session knows nothing of sampling: the engine refuses after the row was admitted.
#[test]
fn what_the_engine_refuses_is_not_recorded() {
    let hot = SamplingParameters { temperature: f32::NAN, ..Default::default() };
    check(row(0, 5, 3, Output::Sample(Box::new(hot))), 0.5, RowStatus::Invalid);
}

/// A block that was written over by a row that failed holds neither the old tokens nor the new.
#[test]
fn a_failed_rewrite_takes_the_old_tokens_with_it() {
    let mut executor = later_stage();
    let first = step(&executor, vec![row(0, 0, 8, Output::None)], 0.5);
    assert_eq!(statuses(&executor.execute(first, false).unwrap()), [RowStatus::Ok]);
    let rewrite = step(&executor, vec![row(0, 4, 4, Output::None)], f32::INFINITY);
    assert_eq!(statuses(&executor.execute(rewrite, false).unwrap()), [RowStatus::NotFinite]);
    for (position, status) in [(8, RowStatus::NeedState), (4, RowStatus::Ok)] {
        let row = row(0, position, 1, Output::None);
        let step = step(&executor, vec![row], 0.5);
        assert_eq!(
            statuses(&executor.execute(step, false).unwrap()),
            [status],
            "position {position}"
        );
    }
}
