//! A toy pipeline for tests of what stands on schedulers.

use proto::step::{
    Output, Row, RowResult, RowStatus, RowValue, Sampled, Step, StepResult, TokenLogprob,
};

/// The result of a step whose every row went well; `token` says what is sampled after a row.
pub(crate) fn result(step: &Step, token: impl Fn(&Row) -> u32) -> StepResult {
    let row = |row: &Row| RowResult {
        sequence: row.sequence,
        generation: row.generation,
        position: row.position,
        token_count: row.tokens.len() as u32,
        status: RowStatus::Ok,
        detail: String::new(),
        value: match &row.output {
            Output::Sample(_) => RowValue::Sampled(Sampled {
                token: token(row),
                logprob: Some(-0.5),
                top: vec![TokenLogprob { token: token(row), logprob: -0.5 }],
            }),
            Output::Score(targets) => RowValue::Scores(vec![-1.0; targets.len()]),
            Output::Draw(_) => {
                RowValue::Sampled(Sampled { token: token(row), logprob: None, top: Vec::new() })
            }
            Output::State => RowValue::State(vec![token(row) as u8; 4].into()),
            Output::None | Output::Logits | Output::Drawn(_) => RowValue::None,
        },
    };
    StepResult {
        epoch: step.header.epoch,
        step: step.header.step,
        rows: step.rows.iter().map(row).collect(),
        stage_times: Vec::new(),
    }
}

/// A token that all tokens before it decide.
pub(crate) fn of_history(row: &Row) -> u32 {
    u32::from_le_bytes(row.prefix_hash_after.0[..4].try_into().expect("four bytes")) % 50_000
}
