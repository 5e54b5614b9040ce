//! Checks the rows of a step and packs the tokens that are to be computed. No arithmetic.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use model::ModelConfig;
use proto::BLOCK_TOKENS;
use proto::ids::{Generation, SequenceId};
use proto::step::{Output, Row, RowStatus, RowValue};

use super::head::PositionResult;
use super::{EngineConfig, RowOutcome, sampler};

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    /// Index of its row in the step.
    pub(super) row: usize,
    /// Its place among all tokens of the step, those of refused rows included.
    pub(super) place: usize,
    /// In its sequence.
    pub(super) position: u32,
    /// Which token.
    pub(super) id: u32,
}

/// One position whose logits are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Index among the tokens to compute.
    pub(super) token: usize,
    /// Index within its row.
    pub(super) offset: usize,
}

/// The rows of a step, checked.
pub(super) struct Batch<'r> {
    rows: &'r [Row],
    /// Why a row is not computed; `None`: it is.
    refusals: Vec<Option<(RowStatus, String)>>,
    tokens: Vec<Token>,
    wanted: Vec<Wanted>,
    place_count: usize,
    /// Rows that stopped being finite. Threads set it, each for itself; it only ever says "failed",
    /// and barriers order it for those who look afterwards.
    failed: Vec<AtomicBool>,
}

impl<'r> Batch<'r> {
    /// Checks `rows` one by one, in their order.
    pub(super) fn new(rows: &'r [Row], model: &ModelConfig, config: &EngineConfig) -> Self {
        let mut batch = Self {
            rows,
            refusals: Vec::with_capacity(rows.len()),
            tokens: Vec::new(),
            wanted: Vec::new(),
            place_count: 0,
            failed: rows.iter().map(|_| AtomicBool::new(false)).collect(),
        };
        // Where the rows of a sequence so far end, and whether all of them are computed.
        let mut ends: HashMap<(SequenceId, Generation), (u32, bool)> = HashMap::new();
        for (index, row) in rows.iter().enumerate() {
            let key = (row.sequence, row.generation);
            let earlier = ends.get(&key).copied();
            let refusal = batch.refuse(row, earlier, model, config).err();
            let end = row.position.saturating_add(row.tokens.len() as u32);
            let so_far = earlier.unwrap_or((0, true));
            ends.insert(key, (so_far.0.max(end), so_far.1 && refusal.is_none()));
            if refusal.is_none() {
                batch.pack(index, row);
            }
            batch.refusals.push(refusal);
            batch.place_count += row.tokens.len();
        }
        batch
    }

    /// The tokens to compute, in the order of rows.
    pub(super) fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// The positions whose logits are needed, in the order of rows.
    pub(super) fn wanted(&self) -> &[Wanted] {
        &self.wanted
    }

    /// Tokens of all rows, computed or not.
    pub(super) fn place_count(&self) -> usize {
        self.place_count
    }

    /// The row that token `token` of [`Self::tokens`] belongs to.
    pub(super) fn row_of(&self, token: usize) -> &'r Row {
        &self.rows[self.tokens[token].row]
    }

    /// Gives up row `row`: a number of it is not finite.
    pub(super) fn fail(&self, row: usize) {
        self.failed[row].store(true, Relaxed);
    }

    /// Whether row `row` was given up.
    pub(super) fn has_failed(&self, row: usize) -> bool {
        self.failed[row].load(Relaxed)
    }

    fn pack(&mut self, index: usize, row: &Row) {
        let first = self.tokens.len();
        for (offset, (&id, position)) in row.tokens.iter().zip(row.position..).enumerate() {
            self.tokens.push(Token { row: index, place: self.place_count + offset, position, id });
        }
        self.wanted.extend(wanted(row).map(|offset| Wanted { token: first + offset, offset }));
    }

    fn refuse(
        &self,
        row: &Row,
        earlier: Option<(u32, bool)>,
        model: &ModelConfig,
        config: &EngineConfig,
    ) -> Result<(), (RowStatus, String)> {
        if row.status != RowStatus::Ok {
            return Err((row.status, row.detail.clone()));
        }
        check(row, model, config).map_err(|detail| (RowStatus::Invalid, detail))?;
        let room = config.max_step_tokens as usize - self.tokens.len();
        if row.tokens.len() > room {
            let most = config.max_step_tokens;
            return Err((RowStatus::Invalid, format!("the step has more than {most} tokens")));
        }
        match earlier {
            // All keys of a step are stored before any is used, so an earlier row would see them.
            Some((end, _)) if row.position < end => {
                let position = row.position;
                let detail = format!(
                    "an earlier row of this step has the sequence's tokens up to {end}, \
                     this one begins at {position}"
                );
                Err((RowStatus::Invalid, detail))
            }
            Some((_, false)) => Err((RowStatus::NeedState, DEPENDENT.into())),
            _ => Ok(()),
        }
    }

    /// What became of every row, given the results of the wanted positions (none but on the last
    /// stage).
    pub(super) fn finish(
        self,
        mut results: impl Iterator<Item = PositionResult>,
    ) -> Vec<RowOutcome> {
        let mut broken: HashSet<(SequenceId, Generation)> = HashSet::new();
        let mut outcomes = Vec::with_capacity(self.rows.len());
        for ((row, refusal), failed) in self.rows.iter().zip(self.refusals).zip(&self.failed) {
            if let Some((status, detail)) = refusal {
                outcomes.push(RowOutcome { status, detail, value: RowValue::None });
                continue;
            }
            let value = gather(&row.output, results.by_ref().take(wanted(row).len()));
            let key = (row.sequence, row.generation);
            outcomes.push(if failed.load(Relaxed) {
                broken.insert(key);
                failure(RowStatus::NotFinite, NOT_FINITE)
            } else if broken.contains(&key) {
                failure(RowStatus::NeedState, DEPENDENT)
            } else {
                RowOutcome { status: RowStatus::Ok, detail: String::new(), value }
            });
        }
        outcomes
    }
}

const NOT_FINITE: &str = "a number of the row is infinite or not a number";
const DEPENDENT: &str = "an earlier row of its sequence in this step was not computed";

fn failure(status: RowStatus, detail: &str) -> RowOutcome {
    RowOutcome { status, detail: detail.into(), value: RowValue::None }
}

/// Which of the row's tokens need logits.
fn wanted(row: &Row) -> Range<usize> {
    let len = row.tokens.len();
    match row.output {
        Output::None | Output::State | Output::Drawn(_) => len..len,
        Output::Sample(_) | Output::Draw(_) => len - 1..len,
        Output::Score(_) | Output::Logits => 0..len,
    }
}

/// One row's value from the results of its positions.
fn gather(output: &Output, results: impl Iterator<Item = PositionResult>) -> RowValue {
    let mut scores = Vec::new();
    let mut logits = Vec::new();
    for result in results {
        match result {
            PositionResult::Nothing => {}
            PositionResult::Sampled(sampled) => return RowValue::Sampled(sampled),
            PositionResult::Score(score) => scores.push(score),
            PositionResult::Logits(bytes) => logits.extend(bytes),
        }
    }
    match output {
        Output::Score(_) if !scores.is_empty() => RowValue::Scores(scores),
        Output::Logits if !logits.is_empty() => RowValue::Logits(Bytes::from(logits)),
        _ => RowValue::None,
    }
}

/// Refuses a row that breaks the contract, in words.
fn check(row: &Row, model: &ModelConfig, config: &EngineConfig) -> Result<(), String> {
    let len = row.tokens.len();
    if len == 0 {
        return Err("the row has no tokens".into());
    }
    if len > config.max_step_tokens as usize {
        return Err(format!("the row has {len} tokens, a step at most {}", config.max_step_tokens));
    }
    let end = row.position as usize + len;
    if end > model.context as usize {
        return Err(format!("the row ends at {end}, the model's context is {}", model.context));
    }
    let vocab = model.vocab;
    if let Some(token) = row.tokens.iter().find(|&&token| token >= vocab) {
        return Err(format!("token {token} is not below the vocabulary of {vocab}"));
    }
    let needed = end.div_ceil(BLOCK_TOKENS as usize);
    let Some(blocks) = row.blocks.get(..needed) else {
        return Err(format!(
            "{end} tokens need {needed} blocks, the row names {}",
            row.blocks.len()
        ));
    };
    if let Some(block) = blocks.iter().find(|block| block.0 >= config.kv_blocks) {
        return Err(format!("block {block} is not below the {} there are", config.kv_blocks));
    }
    match &row.output {
        Output::None | Output::Logits | Output::State => Ok(()),
        Output::Sample(parameters) => sampler::check(parameters, vocab),
        Output::Draw(_) if len != 1 => Err(format!("one token is drawn from, not {len}")),
        Output::Draw(parameters) => sampler::check(parameters, vocab),
        Output::Drawn(_) => Err("the row was drawn already".into()),
        Output::Score(targets) if targets.len() != len => {
            Err(format!("the row has {len} tokens and {} targets", targets.len()))
        }
        Output::Score(targets) => match targets.iter().find(|&&target| target >= vocab) {
            Some(target) => Err(format!("target {target} is not below the vocabulary of {vocab}")),
            None => Ok(()),
        },
    }
}
