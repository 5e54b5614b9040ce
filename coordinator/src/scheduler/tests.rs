//! Single rules of the scheduler, by cases.

use std::time::Duration;

use proto::ids::{Incarnation, PipelineId, Term};
use proto::step::{Output, Row, SamplingParameters, Step, TokenLogprob};

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

fn serving(limits: Limits, stages: u32, kv_blocks: u32) -> Scheduler {
    let mut scheduler = Scheduler::new(limits);
    assert_eq!(scheduler.set_pipeline(shape(stages, kv_blocks), Running::Keep, Tick::ZERO), []);
    scheduler
}

fn request(prompt: usize, max_tokens: u32) -> Request {
    Request {
        prompt: (0..prompt as u32).collect(),
        forced: Vec::new(),
        max_tokens,
        min_tokens: 0,
        sampling: SamplingParameters::default(),
        stop_tokens: Vec::new(),
        score_prompt: false,
        class: Class::Interactive,
        deadline: None,
        traceparent: String::new(),
    }
}

/// The result of a step whose every row went well; sampled tokens are `token`.
fn result(step: &Step, token: u32) -> StepResult {
    let row = |row: &Row| RowResult {
        sequence: row.sequence,
        generation: row.generation,
        position: row.position,
        token_count: row.tokens.len() as u32,
        status: RowStatus::Ok,
        detail: String::new(),
        value: match &row.output {
            Output::Sample(_) => RowValue::Sampled(Sampled {
                token,
                logprob: Some(-0.5),
                top: vec![TokenLogprob { token, logprob: -0.5 }],
            }),
            Output::Score(targets) => RowValue::Scores(vec![-1.0; targets.len()]),
            Output::Draw(_) => RowValue::Sampled(Sampled { token, logprob: None, top: Vec::new() }),
            Output::State => RowValue::State(vec![token as u8; 4].into()),
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

fn send(scheduler: &mut Scheduler) -> Step {
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
    let id = scheduler.submit(request(40, 3), Tick::ZERO).unwrap();
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
        scheduler.submit(request(1, 50), Tick::ZERO).unwrap();
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
        scheduler.submit(request(1, 50), Tick::ZERO).unwrap();
    }
    for _ in 0..8 {
        let step = send(&mut scheduler);
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    scheduler.submit(request(100, 5), Tick::ZERO).unwrap();
    assert_eq!(tokens(&send(&mut scheduler)), [1, 1, 1, 1], "three decode, one of prefill");
}

#[test]
fn sequences_that_are_ready_apart_join_the_steps_that_are_on_their_way() {
    let line = Line { step_ns: 25_000_000, row_ns: 25_000_000 };
    let cost = StepCost { decode: line, prompt: line };
    let shape = PipelineShape { cost, ..shape(2, 1000) };
    let mut scheduler = Scheduler::new(Limits::default());
    scheduler.set_pipeline(shape, Running::Keep, Tick::ZERO);
    for prompt in [16, 17, 18, 19] {
        for _ in 0..2 {
            scheduler.submit(request(prompt, 50), Tick::ZERO).unwrap();
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
    let mut scheduler = Scheduler::new(Limits::default());
    let shape = PipelineShape { first_draws: true, cost, ..shape(2, 100) };
    scheduler.set_pipeline(shape, Running::Keep, Tick::ZERO);
    let alone = scheduler.submit(request(3, 3), Tick::ZERO).unwrap();
    for _ in 0..3 {
        let step = send(&mut scheduler);
        assert!(matches!(step.rows[0].output, Output::Sample(_)), "one waits for nobody");
        scheduler.complete(result(&step, 1), Tick::ZERO);
    }
    assert_eq!(scheduler.finish(alone, Tick::ZERO), None);
    for _ in 0..4 {
        scheduler.submit(request(8, 50), Tick::ZERO).unwrap();
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
fn the_first_in_the_queue_is_not_overtaken() {
    let mut scheduler = serving(Limits::default(), 1, 4);
    let small = scheduler.submit(request(32, 32), Tick::ZERO).unwrap();
    let large = scheduler.submit(request(64, 64), Tick::ZERO).unwrap();
    let third = scheduler.submit(request(1, 1), Tick::ZERO).unwrap();
    let step = send(&mut scheduler);
    assert_eq!(step.rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [small]);
    assert_eq!(scheduler.stats().waiting, 2, "the third would fit, the second comes first");
    scheduler.cancel(small);
    assert_eq!(scheduler.next_step(Tick::ZERO), None, "its blocks are named by a step on its way");
    assert_eq!(scheduler.complete(result(&step, 1), Tick::ZERO), []);
    let step = send(&mut scheduler);
    assert_eq!(step.rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [large]);
    assert_eq!(step.ended_sequences, [small]);
    scheduler.complete(result(&step, 1), Tick::ZERO);
    assert!(scheduler.finish(large, Tick::ZERO).is_some());
    let step = send(&mut scheduler);
    assert_eq!((step.rows[0].sequence, step.ended_sequences), (third, vec![large]));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let limits = Limits { waiting_requests: 1, context_tokens: 100, ..Limits::default() };
    let mut scheduler = Scheduler::new(limits);
    assert_eq!(scheduler.submit(request(1, 1), Tick::ZERO), Err(Rejected::NoPipeline));
    scheduler.set_pipeline(shape(1, 3), Running::Keep, Tick::ZERO);
    let too_long = scheduler.submit(request(90, 7), Tick::ZERO).unwrap_err();
    assert_eq!(
        too_long.to_string(),
        "the prompt of 90 tokens and an answer of 7 make 97 tokens, more than the 96 that this \
         cluster can hold"
    );
    assert_eq!(scheduler.submit(request(0, 7), Tick::ZERO), Err(Rejected::EmptyPrompt));
    let stop = Request { forced: vec![4, 2], stop_tokens: vec![2], ..request(3, 9) };
    let finish = Finish { reason: FinishReason::Stop, stop_token: Some(2) };
    assert_eq!(scheduler.submit(stop, Tick::ZERO), Err(Rejected::Complete { finish }));
    let length = Request { forced: vec![4, 2], ..request(3, 2) };
    let finish = Finish { reason: FinishReason::Length, stop_token: None };
    assert_eq!(scheduler.submit(length, Tick::ZERO), Err(Rejected::Complete { finish }));
    assert!(scheduler.submit(request(1, 1), Tick::ZERO).is_ok());
    assert_eq!(scheduler.submit(request(1, 1), Tick::ZERO), Err(Rejected::Full { limit: 1 }));
    scheduler.close();
    assert_eq!(scheduler.submit(request(1, 1), Tick::ZERO), Err(Rejected::Draining));
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
        let bad = scheduler.submit(request(3, 4), Tick::ZERO).unwrap();
        let good = scheduler.submit(request(3, 4), Tick::ZERO).unwrap();
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
        scheduler.submit(request(3, 4), Tick::ZERO).unwrap();
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
fn waiting_and_running_have_an_end() {
    let limits = Limits { wait: Duration::from_secs(5), ..Limits::default() };
    let mut scheduler = serving(limits, 1, 2);
    let deadline = Some(Tick::from_millis(7000));
    let runs = scheduler.submit(Request { deadline, ..request(20, 40) }, Tick::ZERO).unwrap();
    let waits = scheduler.submit(request(20, 40), Tick::from_millis(1000)).unwrap();
    send(&mut scheduler);
    assert_eq!(scheduler.expire(Tick::from_millis(5999)), []);
    let waited = Duration::from_secs(5);
    let event = EmissionEvent::Failed(SequenceError::WaitedTooLong { waited });
    assert_eq!(scheduler.expire(Tick::from_millis(6000)), [Emission { sequence: waits, event }]);
    let event = EmissionEvent::Failed(SequenceError::DeadlineExceeded { tokens: 0 });
    assert_eq!(scheduler.expire(Tick::from_millis(7000)), [Emission { sequence: runs, event }]);
    assert_eq!(scheduler.stats().kv_blocks_used, 1, "a step that names one is on its way");
}

#[test]
fn held_admission_lets_running_answers_end() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    let runs = scheduler.submit(request(3, 2), Tick::ZERO).unwrap();
    let step = send(&mut scheduler);
    scheduler.hold_admission(true);
    scheduler.submit(request(3, 2), Tick::ZERO).unwrap();
    scheduler.complete(result(&step, 1), Tick::ZERO);
    let step = send(&mut scheduler);
    assert_eq!(step.rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [runs]);
    assert!(!scheduler.is_idle());
    scheduler.complete(result(&step, 1), Tick::ZERO);
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.next_step(Tick::ZERO), None);
    scheduler.hold_admission(false);
    assert!(scheduler.next_step(Tick::ZERO).is_some());
}

#[test]
fn a_smaller_pipeline_fails_what_it_can_never_hold() {
    let mut scheduler = serving(Limits::default(), 2, 10);
    let large = scheduler.submit(request(100, 100), Tick::ZERO).unwrap();
    let small = scheduler.submit(request(10, 10), Tick::ZERO).unwrap();
    let emissions = scheduler.set_pipeline(shape(2, 5), Running::Keep, Tick::ZERO);
    let error = SequenceError::NeverFits { needed_blocks: 7, kv_blocks: 5 };
    assert_eq!(emissions, [Emission { sequence: large, event: EmissionEvent::Failed(error) }]);
    assert_eq!(send(&mut scheduler).rows[0].sequence, small);
    let emissions = scheduler.fail_all("no worker is left");
    assert_eq!(emissions.len(), 1);
    assert_eq!(scheduler.stats().failed, 2);
}

#[test]
fn a_step_is_overdue_by_the_pace_of_the_last_ones() {
    let mut scheduler = serving(Limits::default(), 1, 100);
    assert_eq!(scheduler.overdue(Tick::from_millis(60_000)), None, "nothing is on its way");
    scheduler.submit(request(3, 100), Tick::ZERO).unwrap();
    let step = send(&mut scheduler);
    assert_eq!(scheduler.overdue(Tick::from_millis(5000)), None);
    assert_eq!(scheduler.overdue(Tick::from_millis(5001)), Some(StepId(1)));
    scheduler.complete(result(&step, 1), Tick::from_millis(100));
    scheduler.next_step(Tick::from_millis(100)).unwrap();
    assert_eq!(scheduler.overdue(Tick::from_millis(900)), None);
    assert_eq!(scheduler.overdue(Tick::from_millis(901)), Some(StepId(2)), "8 times 100 ms");
}
