//! Single rules of shares between callers and classes, by cases.

use proto::step::{StageTime, Step};

use super::tests::{admit, request, serving};
use super::*;

const MS: u64 = 1_000_000;

/// One stage, 20 ms a step and 10 ms a row.
fn measured(limits: Limits) -> PipelineScheduler {
    let line = Line { step_ns: 20 * MS, row_ns: 10 * MS };
    let mut scheduler = serving(limits, 1, 1 << 10);
    scheduler.active.shape.cost = StepCost { decode: line, prompt: line };
    scheduler
}

fn of(caller: u8, prompt: usize, max_tokens: u32) -> Request {
    let mut request = request(prompt, max_tokens);
    request.prompt.iter_mut().for_each(|token| *token += u32::from(caller) * 10_000);
    Request { caller: Caller([caller; 16]), ..request }
}

fn batch(request: Request) -> Request {
    Request { priority: Priority::Batch, ..request }
}

/// Sends what may be sent, and completes it.
fn turn(scheduler: &mut PipelineScheduler) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(scheduled) = scheduler.next_step(Tick::ZERO) {
        steps.push(scheduled.step);
    }
    for step in &steps {
        scheduler.complete(testing::result(step, testing::of_history), Tick::ZERO);
    }
    scheduler.check_counts();
    steps
}

fn tokens_of(steps: &[Step], id: SequenceId) -> usize {
    let rows = steps.iter().flat_map(|step| &step.rows);
    rows.filter(|row| row.sequence == id).map(|row| row.tokens.len()).sum()
}

#[test]
fn steps_of_batch_alone_are_as_full_as_those_of_one_caller() {
    let fullest = |priority: Priority| {
        let mut scheduler = measured(Limits::default());
        for _ in 0..64 {
            let request = Request { priority, ..of(1, 1, 300) };
            admit(&mut scheduler, request);
        }
        let steps = (0..60).flat_map(|_| turn(&mut scheduler));
        steps.map(|step| step.rows.len()).max().unwrap()
    };
    assert_eq!([fullest(Priority::Interactive), fullest(Priority::Batch)], [64, 64]);
}

#[test]
fn batch_goes_on_beside_a_caller_who_only_reads() {
    let mut scheduler = measured(Limits::default());
    let ids: Vec<_> =
        (0..8).map(|number| admit(&mut scheduler, batch(of(1, 8 + number, 300)))).collect();
    for _ in 0..20 {
        turn(&mut scheduler);
    }
    admit(&mut scheduler, of(2, 3000, 5));
    let steps = turn(&mut scheduler);
    let rows: usize = ids.iter().map(|&id| tokens_of(&steps[..1], id)).sum();
    assert!(rows >= 4, "{rows} rows of batch in the first step");
    // Where the rest of a step is small, prompts of batch still have a part of it.
    let reads = admit(&mut scheduler, batch(of(1, 500, 5)));
    let steps: Vec<_> = (0..4).flat_map(|_| turn(&mut scheduler)).collect();
    assert!(tokens_of(&steps, reads) > 0);
}

#[test]
fn a_step_whose_rows_were_refused_teaches_nothing() {
    let mut scheduler = measured(Limits::default());
    admit(&mut scheduler, of(1, 8, 4));
    let step = scheduler.next_step(Tick::ZERO).unwrap().step;
    let mut result = testing::result(&step, |_| 1);
    let compute = Duration::from_micros(3);
    let none = Duration::ZERO;
    result.stage_times = vec![StageTime { stage: 0, compute, wait: none, behind: none }];
    (result.rows[0].status, result.rows[0].value) = (RowStatus::Stale, RowValue::None);
    scheduler.complete(result, Tick::ZERO);
    assert_eq!(scheduler.fit.rate(), Fit::default().rate());
}

#[test]
fn an_interactive_request_waits_for_no_prefix_that_batch_computes() {
    let mut scheduler = measured(Limits::default());
    let slow = admit(&mut scheduler, batch(of(1, 3000, 5)));
    turn(&mut scheduler);
    let chat = admit(&mut scheduler, of(1, 3000, 5));
    let second = admit(&mut scheduler, batch(of(1, 3000, 5)));
    let steps = turn(&mut scheduler);
    assert!(tokens_of(&steps, chat) > 0 && tokens_of(&steps, second) == 0);
    assert!(tokens_of(&steps, chat) >= tokens_of(&steps, slow));
}

#[test]
fn a_prefix_that_batch_holds_is_batch_s_whoever_filled_it() {
    let mut scheduler = measured(Limits::default());
    let first = admit(&mut scheduler, batch(of(1, 320, 2)));
    while scheduler.stats().running > 0 {
        turn(&mut scheduler);
    }
    let hits: Vec<_> = (0..3).map(|_| admit(&mut scheduler, batch(of(1, 320, 40)))).collect();
    turn(&mut scheduler);
    assert!(scheduler.stats().prefix_hits > 0, "{first} has filled them");
    let Growth { blocks, batch_blocks, .. } = scheduler.growth();
    assert_eq!(blocks, batch_blocks, "{hits:?} make room");
    assert!(scheduler.holders.share(Priority::Batch, Caller([1; 16])).held_blocks >= 30);
}

#[test]
fn what_was_decoded_for_a_caller_before_does_not_keep_his_next_prompt_from_being_read() {
    let mut scheduler = measured(Limits::default());
    for number in 0..2 {
        admit(&mut scheduler, of(1, 8 + number, 2000));
    }
    for _ in 0..400 {
        turn(&mut scheduler);
    }
    admit(&mut scheduler, of(2, 4000, 5));
    turn(&mut scheduler);
    let late = admit(&mut scheduler, of(1, 40, 5));
    let mut steps = Vec::new();
    while tokens_of(&steps, late) == 0 {
        steps.extend(turn(&mut scheduler));
        assert!(steps.len() <= 8, "others have been read for {} steps", steps.len());
    }
}
