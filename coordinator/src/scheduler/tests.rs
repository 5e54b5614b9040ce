//! Single rules of the scheduler, by cases.

use std::cell::Cell;
use std::collections::VecDeque;

use proto::ids::{Incarnation, NumericsClass, PipelineId, PrefixHash, Term};
use proto::step::{Output, SamplingParameters, Step};

use super::*;

fn shape(stages: u32, kv_blocks: u32) -> PipelineShape {
    PipelineShape {
        pipeline: PipelineId(1),
        epoch: Epoch(9),
        term: Term(3),
        first_incarnation: Incarnation([7; 16]),
        stages,
        kv_blocks,
        first_draws: false,
        cost: StepCost::default(),
    }
}

pub(super) fn serving(limits: Limits, stages: u32, kv_blocks: u32) -> PipelineScheduler {
    PipelineScheduler::new(limits, shape(stages, kv_blocks))
}

thread_local! {
    /// How many sequences this test has named.
    static NAMED: Cell<u64> = const { Cell::new(0) };
}

/// Admits a sequence as the router would: names ascend.
pub(super) fn admit(scheduler: &mut PipelineScheduler, request: Request) -> SequenceId {
    let id = SequenceId(NAMED.get() + 1);
    NAMED.set(id.0);
    let mut sequence = Box::new(Sequence::new(request).unwrap());
    let (max_tokens, class) = (sequence.max_tokens(), NumericsClass([3; 32]));
    sequence.submit(id, max_tokens, class, Tick::ZERO);
    scheduler.admit(sequence);
    id
}

pub(super) fn request(prompt: usize, max_tokens: u32) -> Request {
    Request {
        prompt: (0..prompt as u32).collect(),
        forced: Vec::new(),
        max_tokens,
        min_tokens: 0,
        sampling: SamplingParameters::default(),
        stop_tokens: Vec::new(),
        score_prompt: false,
        priority: Priority::Interactive,
        caller: Caller::default(),
        salt: PrefixHash::EMPTY,
        deadline: None,
        traceparent: String::new(),
    }
}

/// The result of a step whose every row went well; sampled tokens are `token`.
fn result(step: &Step, token: u32) -> StepResult {
    testing::result(step, |_| token)
}

pub(super) fn send(scheduler: &mut PipelineScheduler) -> Step {
    scheduler.next_step(Tick::ZERO).expect("there is work and room").step
}

fn tokens(step: &Step) -> Vec<usize> {
    step.rows.iter().map(|row| row.tokens.len()).collect()
}

#[test]
fn in_flight_limits() {
    let limits: Vec<_> = (1..=8).map(in_flight_limit).collect();
    assert_eq!(limits, [3, 4, 6, 7, 9, 10, 12, 13]);
}

#[test]
fn a_long_prompt_fills_consecutive_steps_and_only_the_last_chunk_samples() {
    let limits = Limits { step_tokens: 16, ..Limits::default() };
    let mut scheduler = serving(limits, 1, 100);
    let id = admit(&mut scheduler, request(40, 3));
    let steps: Vec<_> = (0..3).map(|_| send(&mut scheduler)).collect();
    assert_eq!(steps.iter().flat_map(tokens).collect::<Vec<_>>(), [16, 16, 8]);
    let samples: Vec<_> =
        steps.iter().map(|s| matches!(s.rows[0].output, Output::Sample(_))).collect();
    assert_eq!(samples, [false, false, true]);
    assert_eq!(scheduler.next_step(Tick::ZERO), None);
    assert_eq!(steps[2].header.dst_incarnation, Incarnation([7; 16]));

    assert_eq!(scheduler.complete(result(&steps[0], 5), Tick::ZERO), []);
    assert_eq!(scheduler.complete(result(&steps[1], 5), Tick::ZERO), []);
    let emissions = scheduler.complete(result(&steps[2], 5), Tick::ZERO);
    let [Emission { sequence, event: EmissionEvent::Token { index: 0, sampled } }] = &emissions[..]
    else {
        panic!("{emissions:?}")
    };
    assert_eq!((*sequence, sampled.token, sampled.logprob), (id, 5, Some(-0.5)));
    let next = send(&mut scheduler);
    assert_eq!((next.rows[0].position, &next.rows[0].tokens[..]), (40, &[5][..]));
    assert_eq!(next.header.acked_step, StepId(3));
}

#[test]
fn decode_rows_spread_over_the_steps_in_flight_and_leave_room_for_prefill() {
    let limits = Limits { step_tokens: 16, ..Limits::default() };
    let mut scheduler = serving(limits, 1, 1000);
    for _ in 0..16 {
        admit(&mut scheduler, request(1, 50));
    }
    let first = send(&mut scheduler);
    assert_eq!(first.rows.len(), 16);
    scheduler.complete(result(&first, 1), Tick::ZERO);
    // 16 running, 3 in flight: 6 rows a step, then what is left.
    let sizes: Vec<_> = (0..3).map(|_| send(&mut scheduler).rows.len()).collect();
    assert_eq!(sizes, [6, 6, 4]);
    assert_eq!(scheduler.next_step(Tick::ZERO), None, "the limit of a pipeline of one stage is 3");

    let mut scheduler = serving(Limits { step_tokens: 4, ..Limits::default() }, 1, 1000);
    for _ in 0..30 {
        admit(&mut scheduler, request(1, 50));
    }
    for _ in 0..8 {
        let step = send(&mut scheduler);
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    admit(&mut scheduler, request(100, 5));
    assert_eq!(tokens(&send(&mut scheduler)), [1, 1, 1, 1], "three decode, one of prefill");
}

#[test]
fn sequences_that_are_ready_apart_join_the_steps_that_are_on_their_way() {
    let line = Line { step_ns: 25_000_000, row_ns: 25_000_000 };
    let cost = StepCost { decode: line, prompt: line };
    let shape = PipelineShape { cost, ..shape(2, 1000) };
    let mut scheduler = PipelineScheduler::new(Limits::default(), shape);
    for prompt in [16, 17, 18, 19] {
        for _ in 0..2 {
            admit(&mut scheduler, request(prompt, 50));
        }
    }
    // Prompts come back as their chunks do: not all become ready at once.
    let mut flying = VecDeque::new();
    let mut decoding = Vec::new();
    for _ in 0..40 {
        while let Some(scheduled) = scheduler.next_step(Tick::ZERO) {
            flying.push_back(scheduled.step);
        }
        assert!(flying.len() <= in_flight_limit(2) as usize);
        let step = flying.pop_front().expect("there is always work");
        decoding.push(step.rows.len());
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    assert_eq!(decoding[decoding.len() - 8..], [4; 8], "two steps of four rows: {decoding:?}");
    assert_eq!(flying.len(), 1, "the other one of the two");
}

#[test]
fn the_first_stage_draws_for_every_other_step() {
    let line = Line { step_ns: 25_000_000, row_ns: 25_000_000 };
    let cost = StepCost { decode: line, prompt: line };
    let shape = PipelineShape { first_draws: true, cost, ..shape(2, 100) };
    let mut scheduler = PipelineScheduler::new(Limits::default(), shape);
    let alone = admit(&mut scheduler, request(3, 3));
    for _ in 0..3 {
        let step = send(&mut scheduler);
        assert!(matches!(step.rows[0].output, Output::Sample(_)), "one waits for nobody");
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    assert_eq!(scheduler.finish(alone, Tick::ZERO), None);
    for _ in 0..4 {
        admit(&mut scheduler, request(8, 50));
    }
    let mut flying = VecDeque::new();
    let (mut by_last, mut by_first) = (0, 0);
    for _ in 0..60 {
        while let Some(scheduled) = scheduler.next_step(Tick::ZERO) {
            flying.push_back(scheduled.step);
        }
        let step: Step = flying.pop_front().expect("there is always work");
        for row in &step.rows {
            match row.output {
                Output::Sample(_) => by_last += 1,
                Output::Draw(_) => by_first += 1,
                _ => {}
            }
        }
        if step.is_draw() {
            assert_eq!(step.activations.len(), 4 * step.rows.len());
            assert_eq!(tokens(&step), vec![1; step.rows.len()]);
        } else {
            assert!(step.activations.is_empty());
        }
        let emissions = scheduler.complete(result(&step, 9), Tick::ZERO);
        let failed = |e: &&Emission| matches!(e.event, EmissionEvent::Failed(_));
        assert_eq!(emissions.iter().find(failed), None);
    }
    assert!(by_first > 20 && i32::abs_diff(by_first, by_last) <= 8, "{by_first} and {by_last}");
}

#[test]
fn who_arrives_gets_blocks_once_no_step_names_them() {
    let mut scheduler = serving(Limits::default(), 1, 4);
    let first = admit(&mut scheduler, request(32, 32));
    let step = send(&mut scheduler);
    assert!(scheduler.cancel(first));
    assert!(!scheduler.cancel(first), "it is gone");
    // Its blocks are named by a step: three are free.
    let large = admit(&mut scheduler, request(96, 32));
    let small = admit(&mut scheduler, request(1, 1));
    assert_eq!(scheduler.next_step(Tick::ZERO), None, "the blocks are named by a step");
    assert_eq!(scheduler.complete(result(&step, 1), Tick::ZERO), []);
    let step = send(&mut scheduler);
    assert_eq!(step.rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [large]);
    assert_eq!(step.ended_sequences, [first]);
    scheduler.complete(result(&step, 1), Tick::ZERO);
    assert!(scheduler.finish(large, Tick::ZERO).is_some());
    let step = send(&mut scheduler);
    assert_eq!((step.rows[0].sequence, step.ended_sequences), (small, vec![large]));
}

#[test]
fn a_refused_row_fails_its_request_and_no_other() {
    for status in [
        RowStatus::Stale,
        RowStatus::NeedState,
        RowStatus::Expired,
        RowStatus::NotFinite,
        RowStatus::Invalid,
    ] {
        let mut scheduler = serving(Limits::default(), 2, 100);
        let bad = admit(&mut scheduler, request(3, 4));
        let good = admit(&mut scheduler, request(3, 4));
        let step = send(&mut scheduler);
        let mut result = result(&step, 8);
        result.rows[0].status = status;
        result.rows[0].detail = "why".to_owned();
        result.rows[0].value = RowValue::None;
        let emissions = scheduler.complete(result, Tick::ZERO);
        let error = SequenceError::Row { status, position: 0, detail: "why".to_owned() };
        assert_eq!(emissions[0], Emission { sequence: bad, event: EmissionEvent::Failed(error) });
        assert_eq!((emissions.len(), emissions[1].sequence), (2, good));
        assert_eq!(scheduler.stats().failed, 1);
    }
}

/// The result of a step whose first row found nothing to go on from.
fn without_state(step: &Step) -> StepResult {
    let mut result = result(step, 1);
    (result.rows[0].status, result.rows[0].value) = (RowStatus::NeedState, RowValue::None);
    result
}

#[test]
fn a_chunk_that_overtook_the_one_before_it_is_replayed_and_fails_nobody() {
    let limits = Limits { step_tokens: 16, ..Limits::default() };
    let mut scheduler = serving(limits, 1, 4);
    let id = admit(&mut scheduler, request(40, 60));
    let steps: Vec<_> = (0..3).map(|_| send(&mut scheduler)).collect();
    // The first was refused and is sent again; the second came before it.
    assert_eq!(scheduler.complete(without_state(&steps[1]), Tick::ZERO), []);
    assert_eq!(scheduler.complete(without_state(&steps[2]), Tick::ZERO), [], "of the life before");
    assert_eq!(scheduler.next_step(Tick::ZERO), None, "the blocks are named by the first");
    assert_eq!(scheduler.complete(result(&steps[0], 7), Tick::ZERO), []);
    let steps: Vec<_> = (0..3).map(|_| send(&mut scheduler)).collect();
    let rows: Vec<_> = steps.iter().map(|step| &step.rows[0]).collect();
    assert!(rows.iter().all(|row| (row.sequence, row.generation.0) == (id, 1)));
    assert_eq!(rows.iter().map(|row| row.position).collect::<Vec<_>>(), [0, 16, 32]);
    let told: Vec<_> = steps
        .iter()
        .flat_map(|step| scheduler.complete(result(step, 7), Tick::ZERO))
        .map(|emission| emission.event)
        .collect();
    assert!(matches!(told[..], [EmissionEvent::Token { index: 0, .. }]), "{told:?}");

    // It is replayed with the token that is known, and has an end if nothing helps.
    let mut replays = 0;
    let failed = loop {
        let step = send(&mut scheduler);
        let refused = step.rows[0].position > 0;
        let answer = if refused { without_state(&step) } else { result(&step, 7) };
        let emissions = scheduler.complete(answer, Tick::ZERO);
        replays += u32::from(refused);
        assert!(replays <= MAX_REPLAYS + 1, "without an end");
        if let Some(emission) = emissions.into_iter().next() {
            break emission;
        }
    };
    assert_eq!(replays, MAX_REPLAYS + 1);
    let EmissionEvent::Failed(SequenceError::Row { status, .. }) = failed.event else {
        panic!("{failed:?}")
    };
    assert_eq!((status, scheduler.stats().failed), (RowStatus::NeedState, 1));
}

#[test]
fn a_result_that_does_not_match_fails_what_it_names() {
    type Spoil = fn(&mut StepResult);
    let cases: [Spoil; 5] = [
        |result| result.rows.clear(),
        |result| result.rows[0].position += 1,
        |result| result.rows[0].sequence.0 += 1,
        |result| result.rows[0].token_count += 1,
        |result| result.rows[0].value = RowValue::None,
    ];
    for spoil in cases {
        let mut scheduler = serving(Limits::default(), 1, 100);
        admit(&mut scheduler, request(3, 4));
        let step = send(&mut scheduler);
        let mut result = result(&step, 8);
        spoil(&mut result);
        let emissions = scheduler.complete(result, Tick::ZERO);
        let [Emission { event: EmissionEvent::Failed(SequenceError::BadResult { .. }), .. }] =
            &emissions[..]
        else {
            panic!("{emissions:?}")
        };
        assert_eq!(scheduler.stats().kv_blocks_used, 0);
    }
}

#[test]
fn running_has_an_end() {
    let mut scheduler = serving(Limits::default(), 1, 2);
    let deadline = Some(Tick::from_millis(7000));
    let runs = admit(&mut scheduler, Request { deadline, ..request(20, 40) });
    send(&mut scheduler);
    assert_eq!(scheduler.expire(Tick::from_millis(6999)), []);
    let event = EmissionEvent::Failed(SequenceError::DeadlineExceeded { tokens: 0 });
    assert_eq!(scheduler.expire(Tick::from_millis(7000)), [Emission { sequence: runs, event }]);
    assert_eq!(scheduler.expire(Tick::from_millis(7000)), []);
    assert_eq!(scheduler.stats().kv_blocks_used, 1, "a step that names one is on its way");
}

#[test]
fn a_paused_pipeline_sends_nothing_and_takes_what_comes_back() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let id = admit(&mut scheduler, request(3, 2));
    let step = send(&mut scheduler);
    scheduler.pause(true);
    assert_eq!(scheduler.complete(result(&step, 1), Tick::ZERO).len(), 1);
    assert_eq!(scheduler.next_step(Tick::ZERO), None);
    assert_eq!(scheduler.stats().steps_in_flight, 0);
    scheduler.pause(false);
    scheduler.set_term(Term(8));
    let step = send(&mut scheduler);
    assert_eq!((step.rows[0].sequence, step.header.term), (id, Term(8)));
}

#[test]
fn a_switch_replays_what_is_known_and_samples_nothing_again() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let id = admit(&mut scheduler, request(3, 9));
    for token in [11, 12] {
        let step = send(&mut scheduler);
        scheduler.complete(result(&step, token), Tick::ZERO);
    }
    let late = send(&mut scheduler);
    let next = PipelineShape { epoch: Epoch(12), term: Term(4), ..shape(2, 100) };
    assert!(scheduler.switch(next, Tick::ZERO).is_empty());
    assert_eq!(scheduler.complete(result(&late, 13), Tick::ZERO), [], "of a fenced epoch");
    let step = send(&mut scheduler);
    assert_eq!((step.header.epoch, step.header.step), (Epoch(12), StepId(1)));
    let row = &step.rows[0];
    assert_eq!((row.sequence, row.generation.0, row.position), (id, 1, 0));
    assert_eq!(row.tokens, [0, 1, 2, 11, 12], "forced");
    let emissions = scheduler.complete(result(&step, 13), Tick::ZERO);
    let EmissionEvent::Token { index, .. } = emissions[0].event else { panic!("{emissions:?}") };
    assert_eq!((emissions.len(), index), (1, 2));
}

#[test]
fn a_smaller_epoch_gives_back_the_last_that_came() {
    let mut scheduler = serving(Limits::default(), 1, 10);
    let ids: Vec<_> = (0..3).map(|_| admit(&mut scheduler, request(40, 40)).0).collect();
    let given_back = |scheduler: &mut PipelineScheduler, kv_blocks| -> Vec<u64> {
        let surplus = scheduler.switch(shape(1, kv_blocks), Tick::ZERO);
        surplus.iter().map(|sequence| sequence.id().0).collect()
    };
    assert_eq!(given_back(&mut scheduler, 5), ids[2..], "two begin with two blocks each");
    assert_eq!(send(&mut scheduler).rows[0].sequence.0, ids[0]);
    assert_eq!(given_back(&mut scheduler, 2), ids[..2], "its answer may need three");
}

/// The answers of sequences, and how often each began again.
pub(super) type Answers = BTreeMap<SequenceId, (Vec<u32>, u32)>;

pub(super) fn run_out(scheduler: &mut PipelineScheduler) -> Answers {
    run_on(scheduler, Vec::new())
}

/// Completes those steps that were sent, and every other at once until nothing is left to do.
pub(super) fn run_on(scheduler: &mut PipelineScheduler, mut sent: Vec<Step>) -> Answers {
    let mut answers = Answers::new();
    while let Some(step) = sent.pop().or_else(|| Some(scheduler.next_step(Tick::ZERO)?.step)) {
        for row in &step.rows {
            answers.entry(row.sequence).or_default().1 = row.generation.0;
        }
        for emission in scheduler.complete(testing::result(&step, testing::of_history), Tick::ZERO)
        {
            let (tokens, _) = answers.entry(emission.sequence).or_default();
            match emission.event {
                EmissionEvent::Token { index, sampled } => {
                    assert_eq!(index as usize, tokens.len(), "no gap, no double");
                    tokens.push(sampled.token);
                }
                EmissionEvent::Finished { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(scheduler.is_idle());
    let stats = scheduler.stats();
    assert_eq!((stats.kv_blocks_used, stats.growth), (0, Growth::default()), "no block is lost");
    answers
}

#[test]
fn kv_grows_with_answers_and_the_last_that_came_makes_room() {
    let alone = |request: Request| {
        let mut scheduler = serving(Limits::default(), 1, 100);
        admit(&mut scheduler, request);
        run_out(&mut scheduler).into_values().next().unwrap().0
    };
    let mut scheduler = serving(Limits::default(), 1, 8);
    let ids: Vec<_> = (0..3).map(|_| admit(&mut scheduler, request(32, 200))).collect();
    let step = send(&mut scheduler);
    let begun: Vec<_> = step.rows.iter().map(|row| row.sequence).collect();
    assert_eq!(begun, ids[..2], "the third would leave nothing to grow into");
    assert_eq!(scheduler.stats().kv_blocks_used, 4, "for what is known, not for 232 tokens");
    let answers = run_on(&mut scheduler, vec![step]);
    let whole = alone(request(32, 200));
    assert_eq!(answers[&ids[0]].1, 0, "the first is never asked");
    assert!(answers[&ids[1]].1 >= 1, "the second made room");
    for id in ids {
        assert_eq!(answers[&id].0, whole, "{id}");
    }
    let preempted = scheduler.stats().preempted;
    assert!((1..=4).contains(&preempted), "{preempted}: nobody goes in and out");
}

/// Both are ready for the same step when the later one takes the blocks of the first, whose row must
/// not be in it: a stage would write it into blocks of another.
#[test]
fn who_gives_blocks_back_has_no_row_in_the_same_step() {
    // A step costs the same however many rows it has: they all go into one.
    let line = Line { step_ns: 1_000_000, row_ns: 0 };
    let shape = PipelineShape { cost: StepCost { decode: line, prompt: line }, ..shape(1, 4) };
    let mut scheduler = PipelineScheduler::new(Limits::default(), shape);
    let batch = Request { priority: Priority::Batch, ..request(33, 31) };
    let batch = admit(&mut scheduler, batch);
    let step = send(&mut scheduler);
    scheduler.complete(testing::result(&step, testing::of_history), Tick::ZERO);
    // It begins with the two blocks that are left, and needs a third for its third token.
    let late = Request { prompt: (100..163).collect(), ..request(0, 30) };
    let late = admit(&mut scheduler, late);
    let rows_sent = |scheduler: &mut PipelineScheduler| -> Vec<_> {
        let step = send(scheduler);
        scheduler.complete(testing::result(&step, testing::of_history), Tick::ZERO);
        step.rows.iter().map(|row| (row.sequence, row.blocks.len())).collect()
    };
    // Batch has what the interactive one leaves.
    assert_eq!(rows_sent(&mut scheduler), [(late, 2), (batch, 2)]);
    assert_eq!(rows_sent(&mut scheduler), [(late, 2), (batch, 2)]);
    assert_eq!(rows_sent(&mut scheduler), [(late, 3)]);
    assert_eq!(scheduler.stats().preempted, 1);
    while scheduler.stats().running > 0 {
        rows_sent(&mut scheduler);
    }
}

#[test]
fn who_begins_again_comes_before_later_ones_of_his_priority_and_after_others() {
    let mut scheduler = serving(Limits::default(), 1, 3);
    let batch = Request { priority: Priority::Batch, ..request(33, 60) };
    let batch = admit(&mut scheduler, batch);
    let step = send(&mut scheduler);
    // As when a stage lost what it held.
    let late = Request { priority: Priority::Batch, ..request(33, 60) };
    let late = admit(&mut scheduler, late);
    let interactive = admit(&mut scheduler, request(33, 60));
    scheduler.begin_again(batch, Tick::ZERO);
    let order: Vec<_> = scheduler.arriving.iter().map(|(_, id)| id).collect();
    assert_eq!(order, [interactive, batch, late]);
    let answers = run_on(&mut scheduler, vec![step]);
    assert_eq!(answers[&interactive].1, 0);
    assert_eq!(answers[&batch].0, answers[&interactive].0, "whatever was sent before");
    assert_eq!(answers[&late].0, answers[&interactive].0);
}

#[test]
fn batch_makes_room_before_interactive() {
    let mut scheduler = serving(Limits::default(), 1, 8);
    let batch = Request { priority: Priority::Batch, ..request(32, 200) };
    let [early, late] = [batch, request(32, 200)].map(|request| admit(&mut scheduler, request));
    let answers = run_out(&mut scheduler);
    assert_eq!((answers[&early].1 > 0, answers[&late].1), (true, 0));
    assert_eq!(answers[&early].0, answers[&late].0);
}

#[test]
fn who_ran_on_two_lost_pipelines_fails_and_who_waited_does_not() {
    let limits = Limits { step_tokens: 4, ..Limits::default() };
    let mut first = serving(limits, 1, 100);
    let ran = admit(&mut first, request(4, 4));
    let waited = admit(&mut first, request(4, 4));
    send(&mut first);
    let lost = first.lose("a stage died", Tick::ZERO);
    assert_eq!(lost.emissions, []);
    let back: Vec<_> = lost.returned.iter().map(|sequence| sequence.id()).collect();
    assert_eq!(back, [ran, waited], "in order of arrival");
    assert_eq!(first.stats().kv_blocks_used, 0);

    let mut second = serving(limits, 1, 100);
    for sequence in lost.returned {
        second.admit(sequence);
    }
    send(&mut second);
    let lost = second.lose("another died", Tick::ZERO);
    let error = SequenceError::PipelineLost { reason: "another died".to_owned() };
    let event = EmissionEvent::Failed(error);
    assert_eq!(lost.emissions, [Emission { sequence: ran, event }]);
    assert_eq!(lost.returned.len(), 1);
    assert_eq!(lost.returned[0].id(), waited);
}

#[test]
fn a_probe_passes_everyone_and_proves_the_pipeline() {
    let limits = Limits { step_tokens: 8, ..Limits::default() };
    let mut scheduler = serving(limits, 1, 100);
    admit(&mut scheduler, request(100, 4));
    let step = send(&mut scheduler);
    scheduler.complete(result(&step, 1), Tick::ZERO);
    assert_eq!(scheduler.proven(), None, "a part of a prompt proves no head");
    let before = scheduler.stats();
    scheduler.probe(5);
    scheduler.probe(5);
    let step = send(&mut scheduler);
    assert_eq!(tokens(&step), [1, 7], "the probe, then the prompt");
    assert_eq!(scheduler.complete(result(&step, 1), Tick::from_millis(5)), [], "told to nobody");
    assert_eq!(scheduler.proven(), Some(Tick::from_millis(5)));
    let after = scheduler.stats();
    assert_eq!((after.generated_tokens, after.running), (0, before.running));
    let probe = step.rows[0].sequence;
    let step = send(&mut scheduler);
    assert_eq!(step.ended_sequences, [probe]);
    scheduler.probe(5);
    let step = send(&mut scheduler);
    assert_ne!(step.rows[0].sequence, probe, "workers remember");
    assert!(
        scheduler.switch(shape(1, 50), Tick::ZERO).is_empty(),
        "a probe is given back to nobody"
    );
    assert_eq!(scheduler.proven(), None);
}

#[test]
fn a_step_is_overdue_by_the_pace_of_the_last_ones() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    assert_eq!(scheduler.overdue(Tick::from_millis(60_000)), None, "nothing is on its way");
    admit(&mut scheduler, request(3, 100));
    let step = send(&mut scheduler);
    assert_eq!(scheduler.overdue(Tick::from_millis(5000)), None);
    assert_eq!(scheduler.overdue(Tick::from_millis(5001)), Some(StepId(1)));
    scheduler.complete(result(&step, 1), Tick::from_millis(100));
    scheduler.next_step(Tick::from_millis(100)).unwrap();
    assert_eq!(scheduler.overdue(Tick::from_millis(900)), None);
    assert_eq!(scheduler.overdue(Tick::from_millis(901)), Some(StepId(2)), "8 times 100 ms");
}

#[test]
fn one_that_is_held_gets_no_rows_and_counts_for_no_step() {
    let mut scheduler = serving(Limits::default(), 2, 100);
    let ids: Vec<_> = (0..3).map(|_| admit(&mut scheduler, request(1, 50))).collect();
    let first = send(&mut scheduler);
    // One whose row is on its way, and two that are ready.
    scheduler.hold(ids[0]);
    scheduler.complete(result(&first, 1), Tick::ZERO);
    scheduler.hold(ids[1]);
    scheduler.check_counts();
    for _ in 0..4 {
        let step = send(&mut scheduler);
        let rows: Vec<_> = step.rows.iter().map(|row| row.sequence).collect();
        assert_eq!(rows, [ids[2]]);
        assert_eq!(scheduler.next_step(Tick::ZERO), None);
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    scheduler.release(ids[0]);
    scheduler.release(ids[0]);
    scheduler.cancel(ids[1]);
    scheduler.release(ids[1]);
    scheduler.check_counts();
    let mut rows = Vec::new();
    while let Some(scheduled) = scheduler.next_step(Tick::ZERO) {
        rows.extend(scheduled.step.rows.iter().map(|row| (row.sequence, row.position)));
    }
    rows.sort();
    assert_eq!(rows, [(ids[0], 1), (ids[2], 5)], "each goes on where it was");
}
