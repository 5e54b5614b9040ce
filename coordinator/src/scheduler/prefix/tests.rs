//! Single rules of the prefix cache, by cases.

use proto::ids::{PrefixHash, SequenceId};
use proto::step::{Row, RowStatus, Step};

use super::super::tests::{admit, request, run_on, run_out, send, serving};
use super::super::{Limits, PipelineScheduler, Request, testing};
use crate::tick::Tick;

/// With `tail` behind the tokens that all have.
fn asks(common: usize, tail: &[u32]) -> Request {
    let mut request = request(common, 5);
    request.prompt.extend_from_slice(tail);
    request
}

fn complete(scheduler: &mut PipelineScheduler, step: &Step) {
    scheduler.complete(testing::result(step, testing::of_history), Tick::ZERO);
    scheduler.check_counts();
}

/// Tokens of prompts that were computed, for each sequence that had rows.
fn fed(rows: &[Row], id: SequenceId) -> usize {
    rows.iter().filter(|row| row.sequence == id).map(|row| row.tokens.len()).sum()
}

#[test]
fn a_prefix_is_computed_once_and_all_answers_are_as_without_a_cache() {
    const MANY: u32 = 200;
    const COMMON: usize = 1000;
    let run = |prefix_cache: bool| {
        let limits = Limits { prefix_cache, ..Limits::default() };
        let mut scheduler = serving(limits, 3, 1 << 14);
        let ids: Vec<_> =
            (0..MANY).map(|number| admit(&mut scheduler, asks(COMMON, &[7, number]))).collect();
        let answers = run_out(&mut scheduler);
        let found: Vec<_> = ids.iter().map(|id| answers[id].0.clone()).collect();
        (found, scheduler.stats())
    };
    let (with, stats) = run(true);
    let (without, plain) = run(false);
    assert_eq!(with, without);
    // 31 blocks are shared; what is behind them each computes for itself.
    let own = COMMON as u64 + 2 - 31 * 32;
    assert_eq!(stats.prompt_tokens, COMMON as u64 + 2 + u64::from(MANY - 1) * own);
    assert_eq!(stats.prefix_hits, u64::from(MANY - 1) * 31 * 32);
    assert_eq!(stats.prefix_queries, u64::from(MANY) * (COMMON as u64 + 2));
    assert_eq!(plain.prompt_tokens, u64::from(MANY) * (COMMON as u64 + 2));
    assert_eq!((plain.prefix_hits, plain.prefix_queries), (0, 0));
}

#[test]
fn who_has_another_salt_shares_nothing_and_waits_for_nobody() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let one = admit(&mut scheduler, asks(40, &[]));
    let other = Request { salt: PrefixHash([1; 16]), ..asks(40, &[]) };
    let other = admit(&mut scheduler, other);
    let equal = admit(&mut scheduler, asks(40, &[]));
    let step = send(&mut scheduler);
    assert_eq!((fed(&step.rows, one), fed(&step.rows, other), fed(&step.rows, equal)), (40, 24, 0));
    assert_eq!(scheduler.next_step(Tick::ZERO).map(|s| s.step.rows.len()), Some(1));
    complete(&mut scheduler, &step);
    let step = send(&mut scheduler);
    let row =
        step.rows.iter().find(|row| row.sequence == equal).expect("what it waited for is known");
    assert_eq!((row.position, row.tokens.len()), (32, 8));
}

#[test]
fn somebody_else_computes_what_a_leaving_one_did_not() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let ids: Vec<_> = (0..3).map(|_| admit(&mut scheduler, asks(70, &[]))).collect();
    let step = send(&mut scheduler);
    assert_eq!((fed(&step.rows, ids[0]), step.rows.len()), (64, 1), "two wait");
    assert!(scheduler.cancel(ids[0]));
    scheduler.check_counts();
    let next = send(&mut scheduler);
    assert_eq!((fed(&next.rows, ids[1]), next.rows.len()), (64, 1), "the result counts for nobody");
    assert!(scheduler.cancel(ids[2]), "while it waits");
    complete(&mut scheduler, &step);
    let answers = run_on(&mut scheduler, vec![next]);
    assert_eq!(answers[&ids[1]].0.len(), 5);
}

#[test]
fn a_reader_keeps_blocks_that_their_writer_gave_back() {
    let mut scheduler = serving(Limits::default(), 1, 8);
    let first = admit(&mut scheduler, asks(70, &[]));
    let step = send(&mut scheduler);
    complete(&mut scheduler, &step);
    let step = send(&mut scheduler);
    complete(&mut scheduler, &step);
    let reader = admit(&mut scheduler, asks(70, &[1]));
    let step = send(&mut scheduler);
    let row = step.rows.iter().find(|row| row.sequence == reader).expect("it goes on at once");
    assert_eq!((row.position, row.tokens.len()), (64, 7));
    let shared = row.blocks[..2].to_vec();
    assert!(scheduler.cancel(first));
    complete(&mut scheduler, &step);
    assert_eq!(scheduler.stats().kv_blocks_used, 3, "of the reader");
    // It takes all others.
    let other = Request { prompt: (500..650).collect(), ..request(0, 5) };
    let other = admit(&mut scheduler, other);
    let mut rows = Vec::new();
    for _ in 0..3 {
        let step = send(&mut scheduler);
        rows.extend(step.rows.clone());
        complete(&mut scheduler, &step);
    }
    assert_eq!(fed(&rows, other), 150);
    let theirs = rows.iter().filter(|row| row.sequence == other).flat_map(|row| &row.blocks);
    assert_eq!(theirs.filter(|block| shared.contains(block)).count(), 0);
    while let Some(next) = scheduler.next_step(Tick::ZERO) {
        complete(&mut scheduler, &next.step);
    }
    assert_eq!(scheduler.stats().finished, 2);
}

#[test]
fn prompts_that_are_scored_are_computed_whole_and_others_share_them() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let scored = |scheduler: &mut PipelineScheduler| {
        let id = admit(scheduler, Request { score_prompt: true, ..asks(40, &[]) });
        let mut rows = Vec::new();
        while let Some(next) = scheduler.next_step(Tick::ZERO) {
            rows.extend(next.step.rows.clone());
            complete(scheduler, &next.step);
        }
        fed(&rows, id)
    };
    assert_eq!(scored(&mut scheduler), 40 + 4);
    assert_eq!(scored(&mut scheduler), 40 + 4, "the prompt is known by now");
    assert_eq!(scheduler.stats().prefix_queries, 0);
    let id = admit(&mut scheduler, asks(40, &[]));
    let step = send(&mut scheduler);
    assert_eq!(fed(&step.rows, id), 8);
}

#[test]
fn what_a_stage_has_lost_is_shared_no_more() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    admit(&mut scheduler, asks(64, &[]));
    run_out(&mut scheduler);
    let id = admit(&mut scheduler, asks(64, &[1]));
    let step = send(&mut scheduler);
    assert_eq!((step.rows[0].position, step.rows[0].tokens.len()), (64, 1));
    let mut result = testing::result(&step, testing::of_history);
    result.rows[0].status = RowStatus::NeedState;
    assert_eq!(scheduler.complete(result, Tick::ZERO), []);
    let step = send(&mut scheduler);
    assert_eq!((fed(&step.rows, id), step.rows[0].position), (64, 0), "from nothing");
}
