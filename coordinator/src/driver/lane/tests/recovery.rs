//! Lanes whose steps are refused, whose links break, and that leave while they are spoken to.

use proto::step::{RowValue, Sampled, TokenLogprob};

use super::*;

fn refusal(step: StepId, verdict: StepVerdict) -> impl FnOnce(LinkId, LinkId) -> LinkEvent {
    move |link, _| {
        let (at, stage, detail) = (at(1, 10), 0, String::new());
        LinkEvent::Reply { link, reply: StepReply { at, step, stage, verdict, detail } }
    }
}

#[tokio::test(start_paused = true)]
async fn no_step_is_sent_past_one_that_is_to_be_sent_again() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut client = world.assign(1, 1, Request { prompt: (0..500).collect(), ..request(4) });
    world.turn().await;
    let toy = world.toy(1);
    let sent = toy.steps();
    assert_eq!(sent.len(), 4, "as many as may be in flight");
    toy.say(refusal(sent[1].header.step, StepVerdict::Busy));
    toy.answer(&sent[0]);
    world.turn().await;
    assert_eq!(toy.steps().len(), 0, "the next one would come before the second");
    tokio::time::sleep(2 * TICK).await;
    let again = toy.steps();
    let numbers: Vec<_> = again.iter().map(|step| step.header.step.0).collect();
    assert_eq!(numbers, [2, 5]);
    for step in sent[2..].iter().chain(&again) {
        toy.answer(step);
    }
    while world.serve_steps(1).await > 0 {}
    assert_eq!(read(&mut client).len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_the_model_does_not_have_is_told_to_nobody_but_the_cluster() {
    let spoils: [fn(&mut Sampled); 2] = [
        |sampled| sampled.token = VOCAB,
        |sampled| sampled.top.push(TokenLogprob { token: u32::MAX, logprob: -1.0 }),
    ];
    for spoil in spoils {
        let mut world = World::new();
        world.lanes.serve(served(1, 10));
        let mut client = world.assign(1, 1, request(4));
        world.turn().await;
        let toy = world.toy(1);
        for step in toy.steps() {
            let mut result = result(&step, of_history);
            for row in &mut result.rows {
                if let RowValue::Sampled(sampled) = &mut row.value {
                    spoil(sampled);
                }
            }
            toy.say(|_, link| LinkEvent::Result { link, result });
        }
        world.turn().await;
        assert_eq!(read(&mut client), [0_u32; 0]);
        let said = world.hear();
        let is_strange = |words: &String| words.starts_with("1@10 strange at 1: token ");
        assert!(!said.is_empty() && said.iter().all(is_strange), "{said:?}");
        assert!(said[0].ends_with("came back, the vocabulary has 50000"), "{said:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_of_an_earlier_reign_may_be_refused_by_every_stage() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let _client = world.assign(1, 1, request(4));
    world.turn().await;
    let toy = world.toy(1);
    let step = toy.steps()[0].header.step;
    world.lanes.resume(at(1, 10), Term(7));
    world.turn().await;
    for _ in 0..4 {
        toy.say(refusal(step, StepVerdict::Fenced));
        world.turn().await;
    }
    assert_eq!(world.hear(), [""; 0]);
    toy.say(refusal(step, StepVerdict::Fenced));
    world.turn().await;
    assert_eq!(world.hear(), ["1@10 fenced"], "by somebody else");
}

#[tokio::test(start_paused = true)]
async fn what_the_first_stage_refuses_is_sent_again_when_its_link_is_opened_again() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut client = world.assign(1, 1, request(4));
    world.turn().await;
    let toy = world.toy(1);
    let sent = toy.steps();
    toy.say(refusal(sent[0].header.step, StepVerdict::NotPrepared));
    world.turn().await;
    assert_eq!(world.hear(), ["1@10 broke at 0"]);
    world.lanes.reconnect(at(1, 10), 0);
    world.turn().await;
    let again = toy.steps();
    assert_eq!(again, sent, "all of it, in order");
    for step in &again {
        toy.answer(step);
    }
    while world.serve_steps(1).await > 0 {}
    assert_eq!(read(&mut client).len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_broken_link_is_heard_of_however_much_else_there_is_to_say() {
    let mut world = World::new();
    let mut large = served(1, 10);
    large.shape.kv_blocks = 1 << 12;
    world.lanes.serve(large);
    let many = crate::driver::lanes::LANE_EVENTS as u64 + 2 * UNHEARD as u64;
    for id in 1..=many {
        // Its client is gone already.
        drop(world.assign(1, id, request(4)));
        if id % 32 == 0 {
            world.turn().await;
        }
    }
    for _ in 0..many {
        world.turn().await;
        tokio::time::sleep(TICK).await;
        if world.lanes.reports()[0].stats.running == 0 {
            break;
        }
    }
    world.toy(1).say(|link, _| LinkEvent::Broken { link, detail: "reset".to_owned() });
    world.turn().await;
    let mut said = Vec::new();
    // A lane says one thing at a time.
    loop {
        let more = world.hear();
        if more.is_empty() {
            break;
        }
        said.extend(more);
        world.turn().await;
    }
    let ended = said.iter().filter(|words| words.starts_with("1@10 ended")).count();
    assert_eq!(ended as u64, many);
    assert!(said.contains(&"1@10 broke at 0".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_is_let_go_of_still_says_what_was_asked_of_it() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let _client = world.assign(1, 1, request(50));
    world.turn().await;
    world.hear();
    world.lanes.leave(at(1, 10));
    let (reply, _none) = oneshot::channel();
    world.lanes.finish(PipelineId(1), SequenceId(1), reply);
    world.lanes.flush().await;
    // What it says of this crosses the end of its handle.
    assert_eq!(world.lanes.left(PipelineId(1)), Left::Gone);
    world.turn().await;
    assert_eq!(world.hear(), ["1@10 returned [1]", "1@10 left", "1@10 has no 1"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_told_to_a_pipeline_that_waits_for_its_lane_reaches_it() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    world.turn().await;
    world.lanes.leave(at(1, 10));
    world.lanes.serve(served(1, 11));
    world.lanes.pause(at(1, 11));
    world.turn().await;
    assert_eq!(world.lanes.left(PipelineId(1)), Left::Again);
    world.turn().await;
    world.hear();
    let probe = world.toy(1).steps();
    world.toy(1).answer(&probe[0]);
    world.turn().await;
    assert_eq!(world.hear(), ["1@11 ready", "1@11 paused"]);

    // It is lost before it was there: then it never is.
    world.lanes.leave(at(1, 11));
    world.lanes.serve(served(1, 12));
    assert!(world.lanes.fail(at(1, 12), "a worker died"));
    world.turn().await;
    assert_eq!(world.lanes.left(PipelineId(1)), Left::Gone);

    // In the reign in which it is opened, not in the one in which it was planned.
    world.lanes.serve(served(2, 10));
    world.turn().await;
    world.lanes.leave(at(2, 10));
    world.lanes.serve(served(2, 11));
    world.lanes.resume(at(2, 11), Term(7));
    world.turn().await;
    assert_eq!(world.lanes.left(PipelineId(2)), Left::Again);
    world.turn().await;
    let steps = world.toy(2).steps();
    let _client = world.assign(2, 1, request(4));
    world.turn().await;
    assert!(world.toy(2).steps().iter().all(|step| step.header.term == Term(7)));
    assert_eq!(steps.len(), 1, "its probe, which may be sent again in that reign");
}

#[tokio::test(start_paused = true)]
async fn readiness_outlasts_a_planned_change() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    world.serve_steps(1).await;
    let proven = world.lanes.proven().expect("by its first token");
    // The same pipeline at another epoch.
    world.lanes.pause(at(1, 10));
    world.turn().await;
    world.lanes.serve(served(1, 11));
    tokio::time::sleep(2 * TICK).await;
    assert_eq!(world.lanes.proven(), Some(proven), "it computed a moment ago");
    // Another pipeline in its place.
    world.lanes.leave(at(1, 11));
    assert_eq!(world.lanes.proven(), None, "none serves");
    world.lanes.serve(served(2, 12));
    tokio::time::sleep(2 * TICK).await;
    assert_eq!(world.lanes.proven(), Some(proven));
    world.serve_steps(2).await;
    let own = world.lanes.proven();
    assert!(own > Some(proven), "and then by its own");
    // One that is lost proves nothing for the next.
    world.lanes.fail(at(2, 12), "a worker died");
    world.lanes.serve(served(3, 13));
    world.turn().await;
    assert_eq!(world.lanes.proven(), None);
}
