//! Rows against a toy engine whose KV slots hold the hash of everything before them: whatever is
//! sent, in whatever order, an accepted row must find exactly its own prefix.

use std::collections::HashMap;

use proptest::prelude::*;
use proto::ids::Generation;

use super::*;

const LIMITS: RowLimits = RowLimits { kv_blocks: 6, context: 96, vocab: 10, logits_tokens: 4 };

/// Token `position` of stream `stream`. Streams agree on their first 40 tokens.
fn token(stream: u64, position: u32) -> u32 {
    if position < 40 { position % 3 } else { (stream as u32 + position) % 3 }
}

fn tokens(stream: u64, range: std::ops::Range<u32>) -> Vec<u32> {
    range.map(|position| token(stream, position)).collect()
}

/// A row of the right form: tokens `position..position + count` of a stream.
fn row(stream: u64, position: u32, count: u32, blocks: &[u32]) -> Row {
    let before = PrefixHash::EMPTY.then_all(&tokens(stream, 0..position));
    let tokens = tokens(stream, position..position + count);
    Row {
        sequence: SequenceId(stream),
        generation: Generation(1),
        position,
        prefix_hash_before: before,
        prefix_hash_after: before.then_all(&tokens),
        tokens,
        blocks: blocks.iter().copied().map(BlockId).collect(),
        output: Output::None,
        status: RowStatus::Ok,
        detail: String::new(),
        traceparent: String::new(),
    }
}

fn blocks_for(end: u32, pool: &[u32]) -> Vec<u32> {
    pool[..end.div_ceil(BLOCK_TOKENS) as usize].to_vec()
}

/// Sends one step of rows; the engine computes all that were admitted.
fn send(sessions: &mut Sessions, rows: &mut [Row]) -> Vec<RowStatus> {
    let admitted = sessions.admit(rows, false);
    sessions.commit(rows, admitted, &[]);
    rows.iter().map(|row| row.status).collect()
}

fn send_one(sessions: &mut Sessions, row: Row) -> RowStatus {
    send(sessions, &mut [row])[0]
}

#[test]
fn chunks_and_single_tokens_chain() {
    let mut sessions = Sessions::new(LIMITS);
    let pool = [3, 1, 4];
    for (position, count) in [(0, 40), (40, 1), (41, 1), (42, 30)] {
        let blocks = blocks_for(position + count, &pool);
        assert_eq!(send_one(&mut sessions, row(1, position, count, &blocks)), RowStatus::Ok);
    }
    assert_eq!(sessions.filled_blocks(), 3);
    // A gap, a wrong history, and wrong blocks are refused.
    assert_eq!(send_one(&mut sessions, row(1, 73, 1, &[3, 1, 4])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(2, 72, 1, &[3, 1, 4])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(1, 72, 1, &[1, 3, 4])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(1, 72, 1, &[3, 1, 4])), RowStatus::Ok);
}

#[test]
fn rewinding_and_running_again_are_allowed() {
    let mut sessions = Sessions::new(LIMITS);
    assert_eq!(send_one(&mut sessions, row(1, 0, 60, &[0, 1])), RowStatus::Ok);
    // The same tokens again change nothing: what follows them stands.
    assert_eq!(send_one(&mut sessions, row(1, 10, 5, &[0])), RowStatus::Ok);
    assert_eq!(send_one(&mut sessions, row(1, 60, 1, &[0, 1])), RowStatus::Ok);
    // Other tokens from 45 on: what followed is forgotten.
    let mut other = row(1, 45, 2, &[0, 1]);
    other.tokens = vec![9, 9];
    other.prefix_hash_after = other.prefix_hash_before.then_all(&other.tokens);
    assert_eq!(send_one(&mut sessions, other), RowStatus::Ok);
    assert_eq!(send_one(&mut sessions, row(1, 61, 1, &[0, 1])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(1, 45, 1, &[0, 1])), RowStatus::Ok);
}

#[test]
fn the_work_of_a_step_does_not_grow_with_the_context() {
    let blocks = 128;
    let limits = RowLimits { kv_blocks: blocks, context: blocks * BLOCK_TOKENS, ..LIMITS };
    let mut sessions = Sessions::new(limits);
    let pool: Vec<u32> = (0..blocks).collect();
    let mut end = 0;
    while end + 64 <= 120 * BLOCK_TOKENS {
        assert_eq!(
            send_one(&mut sessions, row(1, end, 64, &blocks_for(end + 64, &pool))),
            RowStatus::Ok
        );
        end += 64;
    }
    let before = sessions.blocks.visited();
    for position in end..end + 40 {
        let named = blocks_for(position + 1, &pool);
        assert_eq!(send_one(&mut sessions, row(1, position, 1, &named)), RowStatus::Ok);
    }
    let visited = sessions.blocks.visited() - before;
    // Before and after the engine, the last block or the two about a border.
    assert!(visited <= 4 * 40, "{visited} records were looked at for 40 tokens");
    // What is known is forgotten when a block behind it is used by another.
    assert_eq!(send_one(&mut sessions, row(2, 0, 5, &[7])), RowStatus::Ok);
    let named = blocks_for(end + 41, &pool);
    assert_eq!(send_one(&mut sessions, row(1, end + 40, 1, &named)), RowStatus::NeedState);
}

#[test]
fn a_full_block_is_shared_by_sequences_that_agree() {
    let mut sessions = Sessions::new(LIMITS);
    assert_eq!(send_one(&mut sessions, row(1, 0, 32, &[5])), RowStatus::Ok);
    let mut rows = [row(1, 32, 20, &[5, 0]), row(2, 32, 20, &[5, 1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Ok; 2]);
    let mut rows = [row(1, 52, 1, &[5, 0]), row(2, 52, 1, &[5, 1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Ok; 2]);
}

#[test]
fn a_reused_block_is_unlinked_from_what_it_held() {
    let mut sessions = Sessions::new(LIMITS);
    assert_eq!(send_one(&mut sessions, row(1, 0, 60, &[0, 1])), RowStatus::Ok);
    assert_eq!(send_one(&mut sessions, row(2, 0, 50, &[2, 1])), RowStatus::Ok);
    assert_eq!(send_one(&mut sessions, row(1, 60, 1, &[0, 1])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(2, 50, 1, &[2, 1])), RowStatus::Ok);
}

#[test]
fn rows_of_one_step_chain_in_their_order() {
    let mut sessions = Sessions::new(LIMITS);
    let mut rows = [row(1, 0, 20, &[0]), row(1, 20, 20, &[0, 1]), row(1, 40, 1, &[0, 1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Ok; 3]);
    let mut rows = [row(1, 42, 1, &[0, 1]), row(1, 41, 1, &[0, 1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::NeedState, RowStatus::Ok]);
    // A later row may not write what an earlier one of the step reads.
    let mut rows = [row(1, 42, 1, &[0, 1]), row(2, 0, 1, &[1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Ok, RowStatus::Invalid]);
    let mut rows = [row(1, 43, 1, &[0, 1]), row(1, 43, 1, &[0, 1])];
    assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Ok, RowStatus::Invalid]);
}

#[test]
fn what_builds_on_a_row_that_failed_needs_state() {
    let mut sessions = Sessions::new(LIMITS);
    let mut rows =
        [row(1, 0, 10, &[0]), row(1, 10, 5, &[0]), row(1, 15, 1, &[0]), row(2, 0, 1, &[1])];
    let admitted = sessions.admit(&mut rows, false);
    rows[1].status = RowStatus::NotFinite;
    sessions.commit(&mut rows, admitted, &[]);
    let statuses = rows.map(|row| row.status);
    let expected = [RowStatus::Ok, RowStatus::NotFinite, RowStatus::NeedState, RowStatus::Ok];
    assert_eq!(statuses, expected);
    assert_eq!(send_one(&mut sessions, row(1, 15, 1, &[0])), RowStatus::NeedState);
    assert_eq!(send_one(&mut sessions, row(1, 10, 5, &[0])), RowStatus::Ok);
}

#[test]
fn older_generations_are_stale_until_the_sequence_ends() {
    let mut sessions = Sessions::new(LIMITS);
    let of = |generation| Row { generation: Generation(generation), ..row(1, 0, 5, &[0]) };
    assert_eq!(send_one(&mut sessions, of(2)), RowStatus::Ok);
    assert_eq!(send_one(&mut sessions, of(1)), RowStatus::Stale);
    let admitted = sessions.admit(&mut [], false);
    sessions.commit(&mut [], admitted, &[SequenceId(1)]);
    assert_eq!(send_one(&mut sessions, of(1)), RowStatus::Ok);
}

#[test]
fn an_expired_step_refuses_all_that_was_not_refused() {
    let mut sessions = Sessions::new(LIMITS);
    let stale = Row { status: RowStatus::Stale, ..row(2, 0, 1, &[1]) };
    let mut rows = [row(1, 0, 5, &[0]), stale];
    let admitted = sessions.admit(&mut rows, true);
    sessions.commit(&mut rows, admitted, &[]);
    assert_eq!(rows.map(|row| row.status), [RowStatus::Expired, RowStatus::Stale]);
    assert_eq!(sessions.filled_blocks(), 0);
}

#[test]
fn a_row_that_breaks_the_contract_is_invalid() {
    let check = |change: fn(&mut Row), words: &str| {
        let mut sessions = Sessions::new(LIMITS);
        let mut rows = [row(1, 0, 40, &[0, 1])];
        change(&mut rows[0]);
        assert_eq!(send(&mut sessions, &mut rows), [RowStatus::Invalid], "{words}");
        assert!(rows[0].detail.contains(words), "{}", rows[0].detail);
    };
    check(|r| r.tokens.clear(), "0 tokens");
    check(|r| r.position = 90, "do not fit");
    check(|r| r.position = u32::MAX, "do not fit");
    check(|r| r.tokens[3] = 10, "vocabulary");
    check(|r| r.blocks.truncate(1), "1 blocks");
    check(|r| r.blocks.push(BlockId(2)), "3 blocks");
    check(|r| r.blocks[1] = BlockId(6), "not among 6");
    check(|r| r.blocks[1] = BlockId(0), "named twice");
    check(|r| r.tokens[3] += 1, "hash after");
    check(|r| r.prefix_hash_after = PrefixHash::EMPTY, "hash after");
    check(|r| r.output = Output::Score(vec![1]), "targets");
    check(|r| r.output = Output::Score(vec![10; 40]), "not a token");
    check(|r| r.output = Output::Logits, "all logits of 4");
    let sample = Output::Sample(Box::default());
    let mut good = row(1, 0, 40, &[0, 1]);
    good.output = sample;
    assert_eq!(send_one(&mut Sessions::new(LIMITS), good), RowStatus::Ok);
}

#[test]
fn a_first_row_with_a_history_is_refused() {
    let mut sessions = Sessions::new(LIMITS);
    let mut first = row(1, 0, 5, &[0]);
    first.prefix_hash_before = PrefixHash([1; 16]);
    first.prefix_hash_after = first.prefix_hash_before.then_all(&first.tokens);
    assert_eq!(send_one(&mut sessions, first), RowStatus::NeedState);
}

/// What the slots of the KV cache really hold.
#[derive(Default)]
struct ToyCache(HashMap<(BlockId, u32), PrefixHash>);

impl ToyCache {
    fn slot(row: &Row, position: u32) -> (BlockId, u32) {
        (row.blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS)
    }

    fn write(&mut self, row: &Row, garbage: bool) {
        for (position, hash) in (row.position..).zip(hashes_of(row)) {
            let hash = if garbage { PrefixHash([0xff; 16]) } else { hash };
            self.0.insert(Self::slot(row, position), hash);
        }
    }

    /// Whether attention of `row` reads exactly the tokens that its stream says.
    fn holds_all(&self, row: &Row) -> bool {
        let stream = row.sequence.0;
        let mut hash = PrefixHash::EMPTY;
        (0..row.position + row.tokens.len() as u32).all(|position| {
            hash = hash.then(token(stream, position));
            self.0.get(&Self::slot(row, position)) == Some(&hash)
        })
    }
}

#[derive(Clone, Debug)]
struct RowPlan {
    stream: u64,
    /// Continue where the stream was left, or jump.
    jump: Option<u32>,
    count: u32,
    generation: u32,
    /// Offset of the block list in the pool, the same for a stream most of the time.
    blocks_from: Option<u32>,
    /// The engine fails on it.
    fails: bool,
    /// Send an earlier row again instead.
    again: Option<usize>,
}

fn row_plan() -> impl Strategy<Value = RowPlan> {
    (
        0u64..3,
        prop::option::weighted(0.3, 0u32..90),
        1u32..50,
        prop_oneof![4 => Just(1u32), 1 => 0u32..3],
        prop::option::weighted(0.15, 0u32..6),
        prop::bool::weighted(0.05),
        prop::option::weighted(0.2, 0usize..40),
    )
        .prop_map(|(stream, jump, count, generation, blocks_from, fails, again)| RowPlan {
            stream,
            jump,
            count,
            generation,
            blocks_from,
            fails,
            again,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Duplicates, reordering, stale rows, stolen blocks, engine failures: a row that is OK in
    /// the end has read its own prefix and nothing else.
    #[test]
    fn no_row_is_accepted_on_a_wrong_chain(
        steps in prop::collection::vec(prop::collection::vec(row_plan(), 1..4), 1..25)
    ) {
        let mut sessions = Sessions::new(LIMITS);
        let mut cache = ToyCache::default();
        let mut left_at = [0u32; 3];
        let mut sent: Vec<Row> = Vec::new();
        for plans in steps {
            let mut rows = Vec::new();
            let mut fails = Vec::new();
            for plan in plans {
                let stream = plan.stream as usize;
                let position = plan.jump.unwrap_or(left_at[stream]).min(95);
                let count = plan.count.min(96 - position);
                let from = plan.blocks_from.unwrap_or(2 * plan.stream as u32);
                let pool = match plan.blocks_from {
                    Some(block @ 5..) => vec![block, block, 0],
                    _ => (0..3).map(|i| (from + i) % 6).collect(),
                };
                let blocks = blocks_for(position + count, &pool);
                let fresh = Row {
                    generation: Generation(plan.generation),
                    ..row(plan.stream, position, count, &blocks)
                };
                let row = plan.again.and_then(|i| sent.get(i).cloned()).unwrap_or(fresh);
                sent.push(row.clone());
                rows.push(row);
                fails.push(plan.fails);
            }
            let admitted = sessions.admit(&mut rows, false);
            // All rows of a step go through a layer together: first everything is written.
            for (row, fails) in rows.iter().zip(&fails).filter(|(row, _)| row.status == RowStatus::Ok) {
                cache.write(row, *fails);
            }
            let reads: Vec<bool> = rows
                .iter()
                .map(|row| row.status == RowStatus::Ok && cache.holds_all(row))
                .collect();
            for (row, _) in rows.iter_mut().zip(&fails).filter(|(r, fails)| **fails && r.status == RowStatus::Ok) {
                row.status = RowStatus::NotFinite;
            }
            sessions.commit(&mut rows, admitted, &[]);
            prop_assert_eq!(sessions.filled_blocks(), sessions.blocks.count_filled());
            for (row, read) in rows.iter().zip(reads) {
                if row.status == RowStatus::Ok {
                    prop_assert!(read, "a wrong prefix was accepted: {row:?}");
                    left_at[row.sequence.0 as usize] = row.position + row.tokens.len() as u32;
                }
            }
        }
    }
}
