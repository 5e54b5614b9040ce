//! Single rules of the router, by cases.

use std::time::Duration;

use proto::generate::FinishReason;
use proto::ids::{Epoch, Incarnation, PrefixHash};

use super::*;
use crate::scheduler::{PipelineScheduler, PipelineShape, Request, StepCost};

const CLASS: NumericsClass = NumericsClass([1; 32]);
const OTHER: NumericsClass = NumericsClass([2; 32]);

fn request(prompt: usize, max_tokens: u32) -> Request {
    Request { prompt: vec![1; prompt], max_tokens, ..Request::probe(0) }
}

fn sequence(prompt: usize, max_tokens: u32) -> Box<Sequence> {
    Box::new(Sequence::new(request(prompt, max_tokens)).unwrap())
}

fn take(router: &mut Router, prompt: usize, max_tokens: u32, now: Tick) -> SequenceId {
    let wish = Wish::default();
    router.submit(sequence(prompt, max_tokens), wish, now).unwrap().sequence
}

/// With pipelines of so many blocks, named from 1.
fn router(limits: Limits, kv_blocks: &[u32]) -> Router {
    let mut router = Router::new(limits);
    for (id, &blocks) in (1..).zip(kv_blocks) {
        router.set_pipeline(PipelineId(id), blocks, CLASS);
    }
    router
}

fn placed(router: &mut Router) -> Vec<(u64, u64)> {
    let assigned = router.assign();
    assigned.iter().map(|a| (a.sequence.id().0, a.pipeline.0)).collect()
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let limits = Limits { waiting_requests: 1, context_tokens: 100, ..Limits::default() };
    let mut router = Router::new(limits);
    let submit = |router: &mut Router, request: Request, wish: Wish| {
        router.submit(Box::new(Sequence::new(request).unwrap()), wish, Tick::ZERO)
    };
    let wish = Wish::default();
    assert_eq!(submit(&mut router, request(1, 1), wish), Err(Rejected::NoPipeline));
    router.set_pipeline(PipelineId(1), 3, CLASS);
    router.set_pipeline(PipelineId(2), 2, CLASS);
    let too_long = submit(&mut router, request(90, 7), wish).unwrap_err();
    assert_eq!(
        too_long.to_string(),
        "the prompt of 90 tokens and an answer of 7 make 97 tokens, more than the 96 that this \
         cluster can hold"
    );
    assert!(Sequence::new(request(0, 7)).is_err(), "a prompt without tokens");
    let complete =
        |finish, max_tokens| Err(Rejected::Complete { finish, class: CLASS, max_tokens });
    let stop = Request { forced: vec![4, 2], stop_tokens: vec![2], ..request(3, 9) };
    let finish = Finish { reason: FinishReason::Stop, stop_token: Some(2) };
    assert_eq!(submit(&mut router, stop, wish), complete(finish, 9));
    let length = Request { forced: vec![4, 2], ..request(3, 2) };
    let finish = Finish { reason: FinishReason::Length, stop_token: None };
    assert_eq!(submit(&mut router, length, wish), complete(finish, 2));
    let scores = Request { score_prompt: true, ..request(1, 0) };
    assert_eq!(submit(&mut router, scores, wish), complete(finish, 0), "one token has no score");
    let wanted = Wish { class: Some(OTHER), ..wish };
    let other = Rejected::Class { wanted: OTHER, served: CLASS };
    assert_eq!(submit(&mut router, request(1, 1), wanted), Err(other));
    let fits = Wish { as_many_as_fit: true, class: None };
    let taken = submit(&mut router, request(40, 0), fits).unwrap();
    assert_eq!((taken.max_tokens, taken.class), (56, CLASS));
    assert_eq!(submit(&mut router, request(1, 1), wish), Err(Rejected::Full { limit: 1 }));
    router.close();
    assert_eq!(submit(&mut router, request(1, 1), wish), Err(Rejected::Draining));
}

#[test]
fn an_answer_of_open_length_fits_every_pipeline_with_room_for_one() {
    let limits = Limits { wait: Duration::from_secs(9), ..Limits::default() };
    // 1056, 1600 and 4000 tokens.
    let mut router = router(limits, &[33, 50, 125]);
    let wish = Wish { as_many_as_fit: true, class: None };
    let open = |router: &mut Router, prompt| {
        let request = Request { max_tokens: 0, ..request(prompt, 1) };
        router.submit(Box::new(Sequence::new(request).unwrap()), wish, Tick::ZERO).unwrap()
    };
    let taken = [10, 100, 1000].map(|prompt| open(&mut router, prompt));
    assert_eq!(taken.map(|taken| taken.max_tokens), [1046, 1500, 3000]);
    assert_eq!(placed(&mut router), [(1, 1), (2, 2), (3, 3)], "not all wait for the largest");
    // One that is resumed needs more than it has.
    let resumed = Request { forced: vec![1; 1500], ..request(100, 0) };
    let taken = router.submit(Box::new(Sequence::new(resumed).unwrap()), wish, Tick::ZERO);
    assert_eq!(taken.unwrap().max_tokens, 3900);
}

#[test]
fn an_answer_of_open_length_is_shortened_when_what_held_it_does_not_come_back() {
    let limits = Limits { wait: Duration::from_secs(9), ..Limits::default() };
    let mut router = router(limits, &[125]);
    let wish = Wish { as_many_as_fit: true, class: None };
    let open = router.submit(sequence(100, 0), wish, Tick::ZERO).unwrap();
    let asked = take(&mut router, 100, 3900, Tick::ZERO);
    assert_eq!(open.max_tokens, 3900);
    router.remove_pipeline(PipelineId(1));
    router.set_pipeline(PipelineId(2), 10, CLASS);
    assert_eq!(placed(&mut router), [], "the one that held them may come back");
    let late = router.expire(Tick::from_millis(9000), 8);
    let error = SequenceError::NeverFits { needed_blocks: 125, kv_blocks: 10 };
    let event = EmissionEvent::Failed(error);
    assert_eq!(late, [Emission { sequence: asked, event }], "it asked for so many");
    let assigned = router.assign();
    assert_eq!(
        (assigned[0].sequence.id(), assigned[0].sequence.max_tokens()),
        (open.sequence, 220)
    );
}

#[test]
fn names_differ_from_reign_to_reign() {
    let mut router = router(Limits::default(), &[100]);
    router.begin_term(Term(3));
    let first = take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(first, SequenceId((3 << 32) + 1));
    router.begin_term(Term(4));
    assert_eq!(take(&mut router, 1, 1, Tick::ZERO), SequenceId((4 << 32) + 1));
    router.begin_term(Term(2));
    assert_eq!(take(&mut router, 1, 1, Tick::ZERO), SequenceId((4 << 32) + 2), "they ascend");
}

#[test]
fn each_goes_where_most_is_free_in_proportion() {
    // Their prompts are equal.
    let limits = Limits { prefix_cache: false, ..Limits::default() };
    let mut router = router(limits, &[10, 20]);
    for _ in 0..6 {
        take(&mut router, 32, 32, Tick::ZERO);
    }
    assert_eq!(placed(&mut router), [(1, 1), (2, 2), (3, 2), (4, 1), (5, 2), (6, 2)]);
    let stats = router.stats();
    assert_eq!((stats.kv_blocks_used, stats.kv_blocks_total, stats.running), (12, 30, 6));
    router.ended(SequenceId(1));
    router.ended(SequenceId(1));
    assert_eq!(router.stats().kv_blocks_used, 10);
    assert_eq!(router.pipeline_of(SequenceId(1)), None);
}

#[test]
fn the_first_in_the_queue_is_not_overtaken_where_it_could_run() {
    let mut router = router(Limits::default(), &[4, 2]);
    let [running, large, small] = [(64, 64), (64, 64), (1, 1)]
        .map(|(prompt, max)| take(&mut router, prompt, max, Tick::ZERO).0);
    // The second needs the first pipeline, which is full; the third does not keep it waiting.
    assert_eq!(placed(&mut router), [(running, 1), (small, 2)]);
    let later = take(&mut router, 33, 0x40 - 33, Tick::ZERO).0;
    assert_eq!(placed(&mut router), [], "the second pipeline has one block");
    router.ended(SequenceId(small));
    assert_eq!(placed(&mut router), [(later, 2)]);
    let tiny = take(&mut router, 1, 1, Tick::ZERO).0;
    router.withdraw(SequenceId(running));
    router.ended(SequenceId(running));
    assert_eq!(placed(&mut router), [(large, 1)]);
    router.withdraw(SequenceId(tiny)).unwrap();
    assert_eq!(router.stats().waiting, 0);
}

#[test]
fn who_comes_back_waits_before_those_who_came_later() {
    let mut router = router(Limits { running_requests: 2, ..Limits::default() }, &[100]);
    let ids: Vec<_> = (0..4).map(|_| take(&mut router, 1, 1, Tick::ZERO).0).collect();
    let batch = Request { priority: Priority::Batch, ..request(1, 1) };
    let batch = Box::new(Sequence::new(batch).unwrap());
    router.submit(batch, Wish::default(), Tick::ZERO).unwrap();
    let assigned = router.assign();
    assert_eq!(assigned.len(), 2, "as many as may run");
    router.remove_pipeline(PipelineId(1));
    // In any order: their names say who came first.
    for back in assigned.into_iter().rev() {
        router.returned(back.sequence);
    }
    assert!(router.assign().is_empty());
    router.set_pipeline(PipelineId(7), 100, CLASS);
    assert_eq!(placed(&mut router), [(ids[0], 7), (ids[1], 7)]);
    for id in &ids[..2] {
        router.ended(SequenceId(*id));
    }
    assert_eq!(placed(&mut router), [(ids[2], 7), (ids[3], 7)]);
    router.ended(SequenceId(ids[2]));
    assert_eq!(placed(&mut router), [(ids[3] + 1, 7)], "batch comes last");
}

#[test]
fn waiting_has_an_end_and_a_reason() {
    let limits = Limits { wait: Duration::from_secs(5), ..Limits::default() };
    let mut router = router(limits, &[2]);
    let runs = take(&mut router, 20, 40, Tick::ZERO);
    assert_eq!(router.assign().len(), 1);
    let waits = take(&mut router, 20, 40, Tick::from_millis(1000));
    let mut hurried = sequence(20, 40);
    hurried.set_deadline(Tick::from_millis(3000));
    let hurried = router.submit(hurried, Wish::default(), Tick::from_millis(1000)).unwrap();
    let failed = |sequence, error| [Emission { sequence, event: EmissionEvent::Failed(error) }];
    assert_eq!(router.expire(Tick::from_millis(2999), 9), []);
    let error = SequenceError::DeadlineExceeded { tokens: 0 };
    assert_eq!(router.expire(Tick::from_millis(3000), 9), failed(hurried.sequence, error));
    assert_eq!(router.expire(Tick::from_millis(5999), 9), []);
    let error = SequenceError::WaitedTooLong { waited: Duration::from_secs(5) };
    assert_eq!(router.expire(Tick::from_millis(6000), 9), failed(waits, error));
    assert_eq!(router.pipeline_of(runs), Some(PipelineId(1)));
    assert_eq!(router.stats().failed, 2);
}

#[test]
fn what_no_pipeline_can_hold_keeps_nobody_waiting_and_fails_by_name() {
    let mut router = router(Limits::default(), &[10]);
    let large = take(&mut router, 100, 100, Tick::ZERO);
    let small = take(&mut router, 10, 10, Tick::ZERO).0;
    router.set_pipeline(PipelineId(1), 5, CLASS);
    assert_eq!(placed(&mut router), [(small, 1)]);
    let late = router.expire(Tick::ZERO + Limits::default().wait, 9);
    let error = SequenceError::NeverFits { needed_blocks: 7, kv_blocks: 5 };
    assert_eq!(late, [Emission { sequence: large, event: EmissionEvent::Failed(error) }]);

    // A pipeline that comes in time takes it.
    router.set_pipeline(PipelineId(2), 7, CLASS);
    let large = take(&mut router, 100, 100, Tick::ZERO).0;
    router.remove_pipeline(PipelineId(2));
    assert_eq!(placed(&mut router), []);
    router.set_pipeline(PipelineId(3), 7, CLASS);
    assert_eq!(placed(&mut router), [(large, 3)]);
}

#[test]
fn nobody_goes_on_with_another_class() {
    let mut router = router(Limits::default(), &[10]);
    let id = take(&mut router, 10, 10, Tick::ZERO);
    router.remove_pipeline(PipelineId(1));
    router.set_pipeline(PipelineId(2), 10, OTHER);
    assert_eq!(placed(&mut router), []);
    let waited = Limits::default().wait;
    let error = SequenceError::NoPipeline { class: CLASS, waited };
    let event = EmissionEvent::Failed(error);
    assert_eq!(router.expire(Tick::ZERO + waited, 9), [Emission { sequence: id, event }]);
}

#[test]
fn a_held_pipeline_gets_nobody_new() {
    let mut router = router(Limits::default(), &[10, 10]);
    take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(placed(&mut router), [(1, 1)]);
    router.hold(PipelineId(2), true);
    take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(placed(&mut router), [(2, 1)]);
    assert!(router.is_idle(PipelineId(2)) && !router.is_idle(PipelineId(1)));
    router.hold(PipelineId(1), true);
    take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(placed(&mut router), []);
    router.hold(PipelineId(2), false);
    assert_eq!(placed(&mut router), [(3, 2)]);
    assert_eq!(router.fail_waiting("none", 9), []);
    for _ in 0..3 {
        take(&mut router, 100, 100, Tick::ZERO);
    }
    assert_eq!(router.fail_waiting("none", 2).len(), 2);
    assert_eq!(router.stats().waiting, 1);
    assert!(router.expire(Tick::ZERO + Limits::default().wait, 0).is_empty());
    assert_eq!(router.fail_waiting("none", 2).len(), 1);
}

/// One that a pipeline has begun, and gives back at `now`.
fn begun(router: &mut Router, now: Tick) -> Box<Sequence> {
    let assigned = router.assign().pop().expect("there is room");
    let shape = PipelineShape {
        pipeline: assigned.pipeline,
        epoch: Epoch(1),
        term: Term(1),
        first_incarnation: Incarnation([1; 16]),
        stages: 1,
        kv_blocks: 100,
        first_draws: false,
        cost: StepCost::default(),
    };
    let mut scheduler = PipelineScheduler::new(Limits::default(), shape);
    scheduler.admit(assigned.sequence);
    assert!(scheduler.next_step(now).is_some());
    scheduler.take_all(now).pop().expect("it ran")
}

#[test]
fn who_has_run_waits_until_his_own_deadline_and_takes_no_newcomers_place() {
    let limits = Limits { wait: Duration::from_secs(5), waiting_requests: 1, ..Limits::default() };
    let mut router = router(limits, &[10]);
    let mut sequence = sequence(20, 40);
    sequence.set_deadline(Tick::from_millis(60_000));
    let ran = router.submit(sequence, Wish::default(), Tick::ZERO).unwrap().sequence;
    let sequence = begun(&mut router, Tick::ZERO);
    router.hold(PipelineId(1), true);
    router.returned(sequence);
    let new = take(&mut router, 1, 1, Tick::ZERO);
    let full = router.submit(self::sequence(1, 1), Wish::default(), Tick::ZERO);
    assert_eq!(full, Err(Rejected::Full { limit: 1 }));
    let late = router.expire(Tick::from_millis(5000), 9);
    assert_eq!(late.iter().map(|late| late.sequence).collect::<Vec<_>>(), [new]);
    take(&mut router, 1, 1, Tick::from_millis(5000));
    assert_eq!(router.expire(Tick::from_millis(9999), 9), []);
    router.expire(Tick::from_millis(59_999), 9);
    let error = SequenceError::DeadlineExceeded { tokens: 0 };
    let failed = Emission { sequence: ran, event: EmissionEvent::Failed(error) };
    assert_eq!(router.expire(Tick::from_millis(60_000), 9), [failed]);
}

#[test]
fn who_waits_behind_a_held_pipeline_does_not_hear_of_kv() {
    let mut router = router(Limits::default(), &[10]);
    router.hold(PipelineId(1), true);
    let id = take(&mut router, 1, 1, Tick::ZERO);
    let waited = Limits::default().wait;
    let error = SequenceError::NoPipeline { class: CLASS, waited };
    let event = EmissionEvent::Failed(error);
    assert_eq!(router.expire(Tick::ZERO + waited, 9), [Emission { sequence: id, event }]);
}

#[test]
fn those_of_a_held_pipeline_hide_nobody() {
    let mut router = router(Limits::default(), &[10, 5]);
    router.hold(PipelineId(1), true);
    let large: Vec<_> =
        (0..2 * LOOK_AHEAD).map(|_| take(&mut router, 200, 50, Tick::ZERO).0).collect();
    let small = take(&mut router, 1, 1, Tick::ZERO).0;
    assert_eq!(placed(&mut router), [(small, 2)]);
    router.hold(PipelineId(1), false);
    assert_eq!(placed(&mut router), [(large[0], 1)], "in their order");
}

#[test]
fn a_prompt_goes_where_its_beginning_was_computed_unless_many_run_there() {
    let mut router = router(Limits::default(), &[1000, 1000]);
    let ask = |router: &mut Router, first: u32, salt: u8| {
        let prompt = std::iter::once(first).chain(1..1100).collect();
        let request = Request { prompt, salt: PrefixHash([salt; 16]), ..request(0, 1) };
        let sequence = Box::new(Sequence::new(request).unwrap());
        router.submit(sequence, Wish::default(), Tick::ZERO).unwrap();
        placed(router)[0].1
    };
    assert_eq!(ask(&mut router, 7, 0), 1);
    assert_eq!(ask(&mut router, 7, 0), 1, "it is known there");
    assert_eq!(ask(&mut router, 7, 1), 2, "not to those of another salt");
    assert_eq!(ask(&mut router, 8, 0), 2, "not what begins otherwise");
    let homes: Vec<_> = (0..20).map(|_| ask(&mut router, 7, 0)).collect();
    assert_eq!(homes[..8], [1; 8]);
    assert!(homes[8..].contains(&2), "the other computes it, too: {homes:?}");
    // 35 blocks each: one pipeline is not filled while the other is empty.
    let mut router = super::tests::router(Limits::default(), &[140, 140]);
    let homes: Vec<_> = (0..4).map(|_| ask(&mut router, 7, 0)).collect();
    assert_eq!(homes, [1, 1, 1, 2]);
    let off = Limits { prefix_cache: false, ..Limits::default() };
    let mut router = super::tests::router(off, &[1000, 1000]);
    assert_eq!([ask(&mut router, 7, 0), ask(&mut router, 7, 0)], [1, 2]);
}

#[test]
fn one_begins_where_a_block_stays_free_for_each_that_grows() {
    let mut router = router(Limits::default(), &[8]);
    for _ in 0..4 {
        take(&mut router, 1, 63, Tick::ZERO);
    }
    assert_eq!(
        placed(&mut router),
        [(1, 1), (2, 1), (3, 1), (4, 1)],
        "one block each, and one kept"
    );
    take(&mut router, 1, 1, Tick::ZERO);
    // Two of them took their second block, one of these has ended.
    router.set_growth(PipelineId(1), Growth { blocks: 2, grown_up: 2, ..Growth::default() });
    assert_eq!(placed(&mut router), [], "two blocks are left for two");
    router.set_growth(PipelineId(1), Growth { blocks: 1, grown_up: 1, ..Growth::default() });
    router.ended(SequenceId(2));
    assert_eq!(router.stats().kv_blocks_used, 4);
    assert_eq!(placed(&mut router), [(5, 1)], "four blocks are left for three");
    // Their blocks are promised to nobody, whatever the report says.
    router.set_growth(PipelineId(1), Growth { blocks: -100, grown_up: 100, ..Growth::default() });
    assert_eq!(router.stats().kv_blocks_used, 0);
}

#[test]
fn a_long_queue_is_sorted_in_portions_and_in_order() {
    const MANY: usize = 10 * SORTED_AT_ONCE;
    let limits = Limits { waiting_requests: MANY as u32, ..Limits::default() };
    let mut router = router(limits, &[10]);
    router.hold(PipelineId(1), true);
    // Each begins with seven blocks of ten: one at a time.
    let ids: Vec<_> = (0..MANY).map(|_| take(&mut router, 200, 100, Tick::ZERO).0).collect();
    let sort = |router: &mut Router| {
        let mut portions = 1;
        while router.is_sorting() {
            router.sort_some();
            portions += 1;
        }
        portions
    };
    assert!(!router.is_sorting());
    router.set_pipeline(PipelineId(2), 1, CLASS);
    assert!(sort(&mut router) > MANY / SORTED_AT_ONCE, "some at a time");
    // One that came later does not overtake those that are not sorted yet.
    for &id in &ids[..SORTED_AT_ONCE] {
        router.withdraw(SequenceId(id));
    }
    router.hold(PipelineId(1), false);
    let first = ids[SORTED_AT_ONCE];
    assert!(router.is_sorting());
    assert_eq!(placed(&mut router), [(first, 1)]);
    router.ended(SequenceId(first));
    take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(placed(&mut router), [(first + 1, 1)]);
    assert!(sort(&mut router) > 1);
}

/// The queue may be as long as the configuration allows: what happens often must not look at all
/// of it. Quadratic work took minutes here.
#[test]
fn a_queue_of_the_longest_kind_costs_no_more_for_each() {
    const MANY: u32 = 1 << 16;
    let limits = Limits { waiting_requests: MANY, ..Limits::default() };
    let mut router = router(limits, &[1]);
    take(&mut router, 1, 1, Tick::ZERO);
    assert_eq!(router.assign().len(), 1);
    let template = sequence(1, 1);
    for _ in 0..MANY {
        router.submit(template.clone(), Wish::default(), Tick::ZERO).unwrap();
    }
    let begin = std::time::Instant::now();
    // Each change of the pipelines looks at some of them at once.
    for change in 0..1000 {
        router.set_pipeline(PipelineId(2), 1 + change % 2, OTHER);
    }
    router.remove_pipeline(PipelineId(2));
    while router.is_sorting() {
        router.sort_some();
    }
    for second in 0..MANY {
        let now = Tick::from_millis(u64::from(second) / 2);
        assert!(router.expire(now, 9).is_empty() && router.assign().is_empty());
    }
    for id in (2..=u64::from(MANY) + 1).rev() {
        assert!(router.withdraw(SequenceId(id)).is_some());
    }
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
}

fn of(caller: u8, prompt: usize, max_tokens: u32) -> Request {
    Request { caller: Caller([caller; 16]), ..request(prompt, max_tokens) }
}

fn ask(router: &mut Router, request: Request) -> Result<u64, Rejected> {
    let sequence = Box::new(Sequence::new(request).unwrap());
    router.submit(sequence, Wish::default(), Tick::ZERO).map(|taken| taken.sequence.0)
}

#[test]
fn callers_take_turns_however_many_requests_each_has() {
    let mut router = router(Limits { running_requests: 1, ..Limits::default() }, &[1000]);
    let many: Vec<_> = (0..50).map(|_| ask(&mut router, of(1, 100, 1)).unwrap()).collect();
    let few: Vec<_> = (0..5).map(|_| ask(&mut router, of(2, 100, 1)).unwrap()).collect();
    let mut order = Vec::new();
    for _ in 0..10 {
        let (id, _) = placed(&mut router)[0];
        order.push(id);
        router.ended(SequenceId(id));
    }
    for (turn, pair) in order.chunks(2).enumerate() {
        assert_eq!(pair, [many[turn], few[turn]], "{order:?}");
    }
    // Answers count as they grow, and what others had computed does not.
    let charge =
        |tokens| Charge { priority: Priority::Interactive, caller: Caller([1; 16]), tokens };
    (0..5).for_each(|_| {
        ask(&mut router, of(2, 100, 1)).unwrap();
    });
    router.charge(&[charge(250)]);
    let next = |router: &mut Router| {
        let (id, _) = placed(router)[0];
        router.ended(SequenceId(id));
        many.contains(&id)
    };
    assert_eq!([(); 4].map(|()| next(&mut router)), [false, false, false, true]);
    router.charge(&[charge(-100)]);
    assert!(next(&mut router));
}

#[test]
fn batch_makes_room_for_interactive_requests_and_goes_after_them() {
    // Their prompts are equal.
    let limits = Limits { running_requests: 3, prefix_cache: false, ..Limits::default() };
    let mut router = router(limits, &[8]);
    let batch = |prompt| Request { priority: Priority::Batch, ..of(1, prompt, 1) };
    let large = ask(&mut router, batch(250)).unwrap();
    assert_eq!(placed(&mut router), [(large, 1)], "all of it");
    let waits = ask(&mut router, batch(1)).unwrap();
    assert_eq!(placed(&mut router), []);
    let first = ask(&mut router, of(1, 100, 1)).unwrap();
    assert_eq!(placed(&mut router), [(first, 1)], "as if it were not there");
    let second = ask(&mut router, of(1, 150, 1)).unwrap();
    assert_eq!(placed(&mut router), [], "4 and 5 blocks are more than 8");
    router.ended(SequenceId(first));
    router.ended(SequenceId(large));
    assert_eq!(placed(&mut router), [(second, 1), (waits, 1)]);
    // The growth of batch is in nobody's way either.
    router.set_growth(PipelineId(1), Growth { blocks: 2, batch_blocks: 2, ..Growth::default() });
    let third = ask(&mut router, of(2, 90, 1)).unwrap();
    assert_eq!(placed(&mut router), [(third, 1)]);
    ask(&mut router, of(2, 40, 1)).unwrap();
    assert_eq!(placed(&mut router), [], "with that it would have as much as the other");
}

#[test]
fn a_caller_who_has_more_makes_room_for_one_who_has_less() {
    let limits = Limits { running_requests: 4, prefix_cache: false, ..Limits::default() };
    let mut router = router(limits, &[100]);
    let many: Vec<_> = (0..6).map(|_| ask(&mut router, of(1, 1, 1)).unwrap()).collect();
    let mut running = router.assign();
    assert_eq!(running.len(), 4);
    let other: Vec<_> = (0..4).map(|_| ask(&mut router, of(2, 1, 1)).unwrap()).collect();
    assert_eq!(placed(&mut router), [(other[0], 1), (other[1], 1)]);
    assert_eq!(placed(&mut router), [], "two of the first make room for them");
    // The scheduler chose the last of those who have most.
    for _ in 0..2 {
        router.returned(running.pop().unwrap().sequence);
    }
    assert_eq!(placed(&mut router), [], "two each");
    router.ended(SequenceId(many[0]));
    router.ended(SequenceId(many[1]));
    let next = placed(&mut router);
    assert_eq!(next.len(), 2, "{next:?}");
}

#[test]
fn a_full_queue_keeps_nobody_out_who_waits_for_less() {
    let limits = Limits { waiting_requests: 4, ..Limits::default() };
    let mut router = router(limits, &[2]);
    let runs = ask(&mut router, of(1, 33, 1)).unwrap();
    assert_eq!(placed(&mut router), [(runs, 1)]);
    let batch = Request { priority: Priority::Batch, ..of(3, 33, 1) };
    let batch = ask(&mut router, batch).unwrap();
    let mine: Vec<_> = (0..3).map(|_| ask(&mut router, of(1, 33, 1)).unwrap()).collect();
    let gave_way = |router: &mut Router| -> Vec<u64> {
        router.take_gave_way().into_iter().map(|emission| emission.sequence.0).collect()
    };
    assert!(gave_way(&mut router).is_empty());
    // Batch gives way to anybody, then the last of the caller who waits for most.
    ask(&mut router, of(1, 33, 1)).unwrap();
    assert_eq!(gave_way(&mut router), [batch]);
    assert_eq!(ask(&mut router, of(1, 33, 1)), Err(Rejected::Full { limit: 4 }));
    let late = Request { priority: Priority::Batch, ..of(4, 1, 1) };
    assert_eq!(ask(&mut router, late), Err(Rejected::Full { limit: 4 }));
    let first = ask(&mut router, of(2, 33, 1)).unwrap();
    assert_eq!(gave_way(&mut router), [mine[2] + 1]);
    let second = ask(&mut router, of(2, 33, 1)).unwrap();
    assert_eq!(gave_way(&mut router), [mine[2]]);
    assert_eq!(ask(&mut router, of(2, 33, 1)), Err(Rejected::Full { limit: 4 }), "two each");
    assert!(gave_way(&mut router).is_empty());
    assert!(first < second && router.stats().waiting == 4);
}

#[test]
fn the_tokens_that_wait_are_bounded_too() {
    let limits = Limits { waiting_tokens: 1000, context_tokens: 4096, ..Limits::default() };
    let mut router = router(limits, &[128]);
    // One alone may wait, however long it is.
    let long = ask(&mut router, of(1, 2000, 1000)).unwrap();
    assert_eq!(router.stats().waiting_tokens, 3000);
    let full = Rejected::FullOfTokens { waiting: 3000, limit: 1000 };
    assert_eq!(ask(&mut router, of(1, 1, 1)), Err(full.clone()));
    assert_eq!(ask(&mut router, of(2, 1, 1)), Err(full), "it has one, and so has the other");
    assert_eq!(router.stats().waiting, 1, "nobody was refused in vain");
    router.withdraw(SequenceId(long)).unwrap();
    for _ in 0..10 {
        ask(&mut router, of(1, 50, 50)).unwrap();
    }
    ask(&mut router, of(2, 150, 100)).unwrap();
    assert_eq!(router.take_gave_way().len(), 3);
    assert_eq!(router.stats().waiting_tokens, 950);
    // A length that nobody asked for is expected to be usual.
    let wish = Wish { as_many_as_fit: true, class: None };
    let sequence = Box::new(Sequence::new(Request { max_tokens: 0, ..of(3, 44, 1) }).unwrap());
    let taken = router.submit(sequence, wish, Tick::ZERO).unwrap();
    assert_eq!(taken.max_tokens, 4052);
    assert_eq!(router.stats().waiting_tokens, 950 - 3 * 100 + 300);
}

#[test]
fn what_is_shared_needs_no_room() {
    // 20 blocks of a prompt are equal.
    let mut router = router(Limits::default(), &[30]);
    let ask = |router: &mut Router, last: u32| {
        let prompt = (0..640).chain([last]).collect();
        let request = Request { prompt, ..request(0, 1) };
        router
            .submit(Box::new(Sequence::new(request).unwrap()), Wish::default(), Tick::ZERO)
            .unwrap();
    };
    (0..3).for_each(|last| ask(&mut router, last));
    assert_eq!(placed(&mut router).len(), 2, "its own block and four that may not be known");
    // As the scheduler says: 16 of them are one and the same.
    router.set_growth(PipelineId(1), Growth { blocks: -20, ..Growth::default() });
    assert_eq!(placed(&mut router).len(), 1);
}

/// As many as the configuration allows, of a caller with most of them and of a thousand others.
#[test]
fn a_tick_is_short_however_many_wait_and_for_however_many_callers() {
    const MANY: u32 = 1 << 16;
    let limits = Limits { waiting_requests: MANY, waiting_tokens: u64::MAX, ..Limits::default() };
    let mut router = router(limits, &[64]);
    let template = sequence(40, 8);
    let mut names = Vec::new();
    for number in 0..MANY {
        let mut sequence = template.clone();
        let of = if number % 4 == 0 { number % 1000 } else { 1 << 20 };
        let mut caller = [0; 16];
        caller[..4].copy_from_slice(&of.to_le_bytes());
        sequence.set_caller(Caller(caller));
        let taken = router.submit(sequence, Wish::default(), Tick::ZERO).unwrap();
        names.push(taken.sequence);
    }
    let mut times = Vec::new();
    let mut left = names.clone();
    for tick in 0..400u32 {
        let begin = std::time::Instant::now();
        let now = Tick::from_millis(50 * u64::from(tick));
        let assigned = router.assign();
        for Assigned { sequence, .. } in &assigned {
            let (priority, caller) = (sequence.priority(), sequence.caller());
            router.charge(&[Charge { priority, caller, tokens: 8 }]);
            router.ended(sequence.id());
        }
        assert!(router.expire(now, 32).is_empty());
        // Clients go away at once.
        for _ in 0..32 {
            let gone = left.swap_remove((tick as usize * 7919) % left.len());
            router.withdraw(gone);
        }
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    // Without optimisation, on a busy machine; what looked at everyone would take fifty times as long.
    let middle = times[times.len() / 2];
    assert!(middle < Duration::from_millis(3), "{middle:?}");
}
