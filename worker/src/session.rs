//! PURE. What a worker believes of the steps it is sent, and what it refuses.
//!
//! The checks, in their order, and where each is made:
//!
//! ```text
//! step ─▶ a key that is none's       grpc.rs     FENCED or the end      the whole step
//!      ─▶ epoch, incarnation, term   epochs.rs   FENCED, NOT_PREPARED   the whole step
//!      ─▶ the key of its stage       stage.rs    the stream ends        the whole step
//!      ─▶ CRC32C                     grpc.rs     CORRUPT                the whole step
//!      ─▶ contents, sizes            grpc.rs     INVALID                the whole step
//!      ─▶ number, acknowledgement    ledger.rs   INVALID or CORRUPT     the whole step
//!      ─▶ tokens drawn elsewhere     draws.rs    INVALID                the whole step
//!      ─▶ number                     ledger.rs   BUSY, or a duplicate   the whole step
//!      ─▶ expiry                     here        EXPIRED                every row
//!      ─▶ contract                   here        INVALID                one row
//!      ─▶ generation                 table.rs    STALE                  one row
//!      ─▶ chain of blocks            blocks.rs   NEED_STATE             one row
//! ```
//!
//! Who shows no key of a stage that is held hears FENCED if his epoch or term is over, as a coordinator that
//! was deposed must; else his stream ends.
//!
//! A refused row travels on as its status; the others are computed. What a row wrote is recorded
//! only after the engine computed it, in place of what its slots held before, and a row that
//! failed leaves its slots unlinked: between steps a record says what the slots really hold.

mod blocks;
pub(crate) mod draws;
pub(crate) mod epochs;
pub(crate) mod ledger;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, PrefixHash, SequenceId};
use proto::step::{Output, Row, RowStatus};

use blocks::{Blocks, Overlay};
use table::Table;

/// What the rows of one engine may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowLimits {
    /// Block ids are `0..kv_blocks`.
    pub(crate) kv_blocks: u32,
    /// Longest sequence in tokens.
    pub(crate) context: u32,
    /// Token ids are `0..vocab`.
    pub(crate) vocab: u32,
    /// The most tokens of rows that want all logits, in one step: their result must fit a message.
    pub(crate) logits_tokens: u32,
}

/// The blocks and generations of one engine.
#[derive(Debug)]
pub(crate) struct Sessions {
    limits: RowLimits,
    blocks: Blocks,
    generations: Table,
}

impl Sessions {
    /// Of an engine whose KV cache is empty.
    pub(crate) fn new(limits: RowLimits) -> Self {
        Self {
            limits,
            blocks: Blocks::new(limits.kv_blocks),
            // A bound on memory and no more: beyond as many sequences as there are blocks the one that was
            // silent longest is forgotten, as one that was preempted may be. The chain of its blocks is
            // judged all the same.
            generations: Table::new(limits.kv_blocks.max(1) as usize),
        }
    }

    /// Decides which rows of a step may be computed: the others get a status and a reason. After
    /// this the engine computes the rows and [`commit`](Self::commit) ends the step.
    #[must_use]
    pub(crate) fn admit(&mut self, rows: &mut [Row], expired: bool) -> Admitted {
        let mut overlay = Overlay::default();
        let mut used = HashMap::new();
        let mut logits_tokens = 0;
        let mut admit_row = |row: &mut Row| {
            if row.status != RowStatus::Ok {
                return false;
            }
            let verdict = if expired {
                Err(Refusal::new(RowStatus::Expired, "the deadline of its step had passed"))
            } else {
                self.judge(row, &mut overlay, &mut used, &mut logits_tokens)
            };
            if let Err(Refusal { status, detail }) = verdict {
                row.status = status;
                row.detail = detail;
                return false;
            }
            true
        };
        Admitted(rows.iter_mut().map(&mut admit_row).collect())
    }

    /// One row, after those before it in its step. `used` holds, of every block that those name,
    /// how many slots they read or write.
    fn judge(
        &mut self,
        row: &Row,
        overlay: &mut Overlay,
        used: &mut HashMap<BlockId, u32>,
        logits_tokens: &mut u32,
    ) -> Result<(), Refusal> {
        check_contract(row, self.limits)?;
        if row.output == Output::Logits {
            *logits_tokens += row.tokens.len() as u32;
            if *logits_tokens > self.limits.logits_tokens {
                return Err(Refusal::invalid(format!(
                    "a step can give back all logits of {} tokens",
                    self.limits.logits_tokens
                )));
            }
        }
        let hashes = hashes_of(row);
        if hashes.last() != Some(&row.prefix_hash_after) {
            return Err(Refusal::invalid("its tokens do not lead to its hash after"));
        }
        self.generations.admit(row.sequence, row.generation).map_err(|seen| {
            Refusal::new(RowStatus::Stale, format!("generation {seen} has been seen"))
        })?;
        if !self.blocks.holds_prefix(overlay, row) {
            return Err(Refusal::new(
                RowStatus::NeedState,
                format!("its blocks do not hold the {} tokens before it", row.position),
            ));
        }
        // The rows of a step share the engine's pass over each layer: a slot that one of them
        // reads or writes must not be written by a later one.
        let rewritten = segments(row).find(|s| used.get(&s.block).is_some_and(|&u| u > s.begin));
        if let Some(segment) = rewritten {
            return Err(Refusal::invalid(format!(
                "block {} is in use by an earlier row of the step",
                segment.block
            )));
        }
        let end = row.position + row.tokens.len() as u32;
        for (index, &block) in row.blocks.iter().enumerate() {
            let slots = (end - index as u32 * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let most = used.entry(block).or_default();
            *most = slots.max(*most);
        }
        self.blocks.write_tentatively(overlay, row, &hashes);
        Ok(())
    }

    /// Records what the engine computed: the rows have its statuses now. A row that built on one
    /// that failed becomes NEED_STATE, because what it computed was not of its prefix.
    pub(crate) fn commit(&mut self, rows: &mut [Row], admitted: Admitted, ended: &[SequenceId]) {
        assert_eq!(rows.len(), admitted.0.len(), "one verdict for every row");
        let no_overlay = Overlay::default();
        for (row, _) in rows.iter_mut().zip(admitted.0).filter(|(_, admitted)| *admitted) {
            if row.status == RowStatus::Ok && !self.blocks.holds_prefix(&no_overlay, row) {
                row.status = RowStatus::NeedState;
                row.detail = "an earlier row of its step failed".into();
            }
            if row.status == RowStatus::Ok {
                let hashes = hashes_of(row);
                self.blocks.write(row, &hashes);
            } else {
                // The engine started on it: its slots may hold half of it.
                self.blocks.forget(row);
            }
        }
        for &sequence in ended {
            self.generations.end(sequence);
            self.blocks.end(sequence);
        }
    }

    /// Blocks that hold at least one token.
    pub(crate) fn filled_blocks(&self) -> usize {
        self.blocks.filled()
    }
}

/// Which rows of a step the engine computes; made by [`Sessions::admit`], spent by
/// [`Sessions::commit`].
#[derive(Debug)]
pub(crate) struct Admitted(Vec<bool>);

/// Why a row is not computed.
struct Refusal {
    status: RowStatus,
    detail: String,
}

impl Refusal {
    fn new(status: RowStatus, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }

    fn invalid(detail: impl Into<String>) -> Self {
        Self::new(RowStatus::Invalid, detail)
    }
}

/// What must hold of a row whatever came before it.
fn check_contract(row: &Row, limits: RowLimits) -> Result<(), Refusal> {
    let RowLimits { kv_blocks, context, vocab, .. } = limits;
    let count = row.tokens.len();
    let end = u32::try_from(count).ok().and_then(|count| row.position.checked_add(count));
    let Some(end) = end.filter(|&end| count > 0 && end <= context) else {
        return Err(Refusal::invalid(format!(
            "{count} tokens from position {} do not fit a context of {context}",
            row.position
        )));
    };
    if let Some(token) = row.tokens.iter().find(|&&token| token >= vocab) {
        return Err(Refusal::invalid(format!("token {token} is not in a vocabulary of {vocab}")));
    }
    if row.blocks.len() != end.div_ceil(BLOCK_TOKENS) as usize {
        return Err(Refusal::invalid(format!(
            "{} blocks are named for {end} tokens",
            row.blocks.len()
        )));
    }
    if let Some(block) = row.blocks.iter().find(|block| block.0 >= kv_blocks) {
        return Err(Refusal::invalid(format!("block {block} is not among {kv_blocks}")));
    }
    if let Some(segment) =
        segments(row).find(|s| row.blocks.iter().filter(|&&block| block == s.block).count() > 1)
    {
        return Err(Refusal::invalid(format!("block {} is named twice", segment.block)));
    }
    if matches!(row.output, Output::Draw(_) | Output::Drawn(_)) {
        return Err(Refusal::invalid("rows that are drawn from make steps of their own"));
    }
    if let Output::Score(targets) = &row.output {
        if targets.len() != count {
            return Err(Refusal::invalid(format!("{} targets for {count} tokens", targets.len())));
        }
        if let Some(target) = targets.iter().find(|&&target| target >= vocab) {
            return Err(Refusal::invalid(format!("target {target} is not a token")));
        }
    }
    Ok(())
}

/// The hash after each token of a row.
fn hashes_of(row: &Row) -> Vec<PrefixHash> {
    row.tokens
        .iter()
        .scan(row.prefix_hash_before, |hash, &token| {
            *hash = hash.then(token);
            Some(*hash)
        })
        .collect()
}

/// The slots of one block that a row writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    block: BlockId,
    /// First slot.
    begin: u32,
    /// One past the last slot, at most [`BLOCK_TOKENS`].
    end: u32,
    /// Index of the row's token that goes to `begin`.
    first_token: usize,
}

/// What a row of valid shape writes, block by block.
fn segments(row: &Row) -> impl Iterator<Item = Segment> + '_ {
    let row_end = row.position + row.tokens.len() as u32;
    let first = row.position / BLOCK_TOKENS;
    (first..row_end.div_ceil(BLOCK_TOKENS)).map(move |index| {
        let base = index * BLOCK_TOKENS;
        let begin = row.position.max(base);
        Segment {
            block: row.blocks[index as usize],
            begin: begin - base,
            end: (row_end - base).min(BLOCK_TOKENS),
            first_token: (begin - row.position) as usize,
        }
    })
}
