//! Lanes on toy pipelines: the links lead to the test.

use std::sync::Mutex;

use proto::ids::{Epoch, Incarnation, PipelineId, StepId};
use proto::step::{StepReply, StepVerdict};

use super::*;
use crate::driver::Tokens;
use crate::driver::lanes::{Lanes, Left};
use crate::driver::timed::testing::{LONGEST_POLL, Longest, cpu_time};
use crate::scheduler::testing::{of_history, result};
use crate::scheduler::{Request, StepCost};
use crate::workers::{LinkId, ResultsLink, ResultsWanted, SentStep, StepsLink};

mod recovery;

const CLASS: NumericsClass = NumericsClass([4; 32]);

/// Tokens of toys are below.
const VOCAB: u32 = 50_000;

/// The workers' ends of one pipeline's links.
#[derive(Default)]
struct Ends {
    steps: Option<(LinkId, mpsc::Receiver<SentStep>)>,
    results: Option<(LinkId, mpsc::Sender<LinkEvent>)>,
}

#[derive(Clone, Default)]
struct Toy(Arc<Mutex<Ends>>);

impl Wire for Toy {
    fn steps(&self, id: LinkId, _: &str, _: &mpsc::Sender<LinkEvent>) -> StepsLink {
        let (link, steps) = StepsLink::to_nobody(id);
        self.0.lock().unwrap().steps = Some((id, steps));
        link
    }

    fn results(
        &self,
        id: LinkId,
        _: &str,
        _: ResultsWanted,
        events: &mpsc::Sender<LinkEvent>,
    ) -> ResultsLink {
        self.0.lock().unwrap().results = Some((id, events.clone()));
        ResultsLink::from_nobody(id)
    }
}

impl Toy {
    /// The steps that have come.
    fn steps(&self) -> Vec<Arc<proto::step::Step>> {
        let mut ends = self.0.lock().unwrap();
        let Some((_, steps)) = &mut ends.steps else { return Vec::new() };
        std::iter::from_fn(|| steps.try_recv().ok()).map(|sent| sent.step).collect()
    }

    fn say(&self, event: impl FnOnce(LinkId, LinkId) -> LinkEvent) {
        let ends = self.0.lock().unwrap();
        let (Some((steps, _)), Some((results, events))) = (&ends.steps, &ends.results) else {
            panic!("no links")
        };
        events.try_send(event(*steps, *results)).unwrap();
    }

    fn answer(&self, step: &proto::step::Step) {
        let result = result(step, of_history);
        self.say(|_, link| LinkEvent::Result { link, result });
    }
}

/// Lanes with a toy each, as the control task holds them.
struct World {
    lanes: Lanes,
    said: mpsc::Receiver<LaneEvent>,
    toys: Arc<Mutex<std::collections::BTreeMap<PipelineId, Toy>>>,
    clients: Clients,
    started: Instant,
    /// CPU time of the longest poll of a lane.
    longest_poll: Longest,
}

impl World {
    fn new() -> Self {
        let started = Instant::now();
        let longest_poll = Longest::default();
        let longest = longest_poll.clone();
        let config = LaneConfig {
            limits: Limits { context_tokens: 1 << 17, ..Limits::default() },
            started,
            first_token: 1,
            vocab: VOCAB,
            totals: Arc::default(),
        };
        let toys: Arc<Mutex<std::collections::BTreeMap<PipelineId, Toy>>> = Arc::default();
        let all = Arc::clone(&toys);
        let (lanes, said) = Lanes::new(Box::new(move |served, ends, tasks| {
            let toy = Toy::default();
            all.lock().unwrap().insert(served.shape.pipeline, toy.clone());
            let lane = Lane::new(config.clone(), served, Box::new(toy), ends);
            tasks.spawn(timed(lane.work(), cpu_time, longest.observe()));
        }));
        Self { lanes, said, toys, clients: Clients::new(Arc::default()), started, longest_poll }
    }

    fn toy(&self, pipeline: u64) -> Toy {
        self.toys.lock().unwrap()[&PipelineId(pipeline)].clone()
    }

    fn assign(&mut self, pipeline: u64, id: u64, request: Request) -> Tokens {
        let mut sequence = Box::new(Sequence::new(request).unwrap());
        let max_tokens = sequence.max_tokens();
        sequence.submit(SequenceId(id), max_tokens, CLASS, Tick::ZERO);
        let tokens = self.clients.add(SequenceId(id), Tick::ZERO, 1);
        let client = self.clients.take(SequenceId(id)).unwrap();
        assert!(self.lanes.assign(PipelineId(pipeline), sequence, client).is_ok());
        tokens
    }

    /// Lets every lane do what it has to do now.
    async fn turn(&mut self) {
        self.lanes.flush().await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    /// Answers whatever steps have come to a pipeline; how many.
    async fn serve_steps(&mut self, pipeline: u64) -> usize {
        self.turn().await;
        let (toy, mut count) = (self.toy(pipeline), 0);
        for step in toy.steps() {
            toy.answer(&step);
            count += 1;
        }
        self.turn().await;
        count
    }

    /// What lanes have said, in words; what was returned is kept for [`Self::hear_returned`].
    fn hear(&mut self) -> Vec<String> {
        self.hear_returned().0
    }

    fn hear_returned(&mut self) -> (Vec<String>, Vec<(Box<Sequence>, Client)>) {
        let (mut words, mut returned) = (Vec::new(), Vec::new());
        while let Ok(LaneEvent { at, says }) = self.said.try_recv() {
            words.push(match says {
                LaneSays::Ended(sequence) => format!("{at} ended {sequence}"),
                LaneSays::Returned(sequences) => {
                    let ids: Vec<_> = sequences.iter().map(|(s, _)| s.id().0).collect();
                    returned.extend(sequences);
                    format!("{at} returned {ids:?}")
                }
                LaneSays::NotHere { sequence, .. } => format!("{at} has no {sequence}"),
                LaneSays::Paused => format!("{at} paused"),
                LaneSays::StreamBroken { stage, .. } => format!("{at} broke at {stage}"),
                LaneSays::Fenced { .. } => format!("{at} fenced"),
                LaneSays::Strange { stage, detail } => format!("{at} strange at {stage}: {detail}"),
                LaneSays::StepOverdue => format!("{at} overdue"),
                LaneSays::Flowing | LaneSays::Charged(_) => continue,
                LaneSays::Ready => format!("{at} ready"),
                LaneSays::Left => format!("{at} left"),
            });
        }
        (words, returned)
    }

    fn now(&self) -> Tick {
        Tick(self.started.elapsed())
    }
}

fn served(id: u64, epoch: u64) -> Served {
    let shape = PipelineShape {
        pipeline: PipelineId(id),
        epoch: Epoch(epoch),
        term: Term(1),
        first_incarnation: Incarnation([1; 16]),
        stages: 2,
        kv_blocks: 100,
        first_draws: false,
        cost: StepCost::default(),
    };
    let stage = |worker: &str, layers| StagePlan {
        worker: worker.to_owned(),
        incarnation: Incarnation([1; 16]),
        address: "toy:1".to_owned(),
        layers,
    };
    Served { shape, stages: vec![stage("a", 0..1), stage("b", 1..2)], class: CLASS }
}

fn at(id: u64, epoch: u64) -> PipelineRef {
    PipelineRef { id: PipelineId(id), epoch: Epoch(epoch) }
}

fn request(tokens: u32) -> Request {
    Request { prompt: vec![5, 6, 7], max_tokens: tokens, ..Request::probe(0) }
}

/// The answer of a pipeline of its own to which nothing happens.
async fn undisturbed(tokens: u32) -> Vec<u32> {
    let mut world = World::new();
    world.lanes.serve(served(1, 1));
    let mut client = world.assign(1, 1, request(tokens));
    let mut found = Vec::new();
    while world.serve_steps(1).await > 0 {
        found.extend(read(&mut client));
    }
    found
}

/// What has come.
fn read(client: &mut Tokens) -> Vec<u32> {
    std::iter::from_fn(|| client.try_next()).map(|(_, sampled)| sampled.token).collect()
}

#[tokio::test(start_paused = true)]
async fn that_results_flow_is_told_of_twice_a_second_however_many_come() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut client = world.assign(1, 1, request(2000));
    let ticks = (5 * FLOWING_INTERVAL).as_millis() / TICK.as_millis();
    let mut told = 0;
    for _ in 0..ticks {
        assert!(world.serve_steps(1).await > 0, "results come all the time");
        read(&mut client);
        tokio::time::advance(TICK).await;
        while let Ok(event) = world.said.try_recv() {
            told += u32::from(matches!(event.says, LaneSays::Flowing));
        }
    }
    assert!((4..=6).contains(&told), "{told} times in 2.5 s");
}

#[tokio::test(start_paused = true)]
async fn what_ran_on_a_lost_pipeline_goes_on_on_another_with_the_same_tokens() {
    let want = undisturbed(6).await;
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    world.lanes.serve(served(2, 10));
    let mut moves = world.assign(1, 1, request(6));
    let mut stays = world.assign(2, 2, request(6));
    for _ in 0..3 {
        world.serve_steps(1).await;
        world.serve_steps(2).await;
    }
    assert_eq!(world.hear(), ["1@10 ready", "2@10 ready"]);
    let before = read(&mut moves);
    assert!(!before.is_empty() && before.len() < want.len(), "{before:?}");

    assert!(!world.lanes.fail(at(1, 9), "of another epoch"));
    assert!(world.lanes.fail(at(1, 10), "a stage died"));
    assert!(!world.lanes.is_current(at(1, 10)) && world.lanes.is_current(at(2, 10)));
    // It is to serve again before what it had came back.
    world.lanes.serve(served(1, 11));
    world.turn().await;
    let (words, mut returned) = world.hear_returned();
    assert_eq!(words, ["1@10 returned [1]", "1@10 left"]);
    assert_eq!(world.lanes.left(PipelineId(1)), Left::Again);
    let (sequence, client) = returned.remove(0);
    assert!(world.lanes.assign(PipelineId(2), sequence, client).is_ok());
    while world.serve_steps(2).await > 0 {}
    assert_eq!([before, read(&mut moves)].concat(), want);
    assert_eq!(read(&mut stays), want, "the other pipeline was not touched");
    assert_eq!(world.hear(), ["2@10 ended 2", "2@10 ended 1"]);

    // The second time without a token in between it is the sequence's end.
    let dies = world.assign(1, 3, request(6));
    world.serve_steps(1).await;
    assert!(world.lanes.fail(at(1, 11), "first"));
    world.turn().await;
    let (_, mut returned) = world.hear_returned();
    world.lanes.left(PipelineId(1));
    world.lanes.serve(served(1, 12));
    let (sequence, client) = returned.remove(0);
    assert!(world.lanes.assign(PipelineId(1), sequence, client).is_ok());
    // It works, and no token comes of it.
    world.turn().await;
    world.lanes.fail(at(1, 12), "second");
    world.turn().await;
    let error = dies.end().await.unwrap_err().to_string();
    assert!(error.ends_with("second"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_switch_pauses_at_a_step_replays_and_goes_on() {
    let want = undisturbed(8).await;
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut client = world.assign(1, 1, request(8));
    world.serve_steps(1).await;
    world.serve_steps(1).await;
    world.turn().await;
    let (old, flying) = (world.toy(1), world.toy(1).steps());
    assert!(!flying.is_empty());
    world.hear();
    world.lanes.pause(at(1, 10));
    world.turn().await;
    assert_eq!(world.hear(), [""; 0], "steps are on their way");
    for step in &flying {
        old.answer(step);
    }
    world.turn().await;
    assert_eq!(world.hear(), ["1@10 paused"]);
    assert_eq!(old.steps().len(), 0, "nothing is sent");
    let mut next = served(1, 12);
    next.shape.term = Term(3);
    world.lanes.serve(next);
    world.turn().await;
    let steps = world.toy(1).steps();
    let replayed = steps.iter().flat_map(|step| &step.rows).find(|row| row.sequence.0 == 1);
    let replayed = replayed.expect("it is replayed");
    assert_eq!((replayed.position, replayed.generation.0), (0, 1));
    assert_eq!(steps[0].header.step, StepId(1));
    for step in &steps {
        world.toy(1).answer(step);
    }
    while world.serve_steps(1).await > 0 {}
    assert_eq!(read(&mut client), want);
    assert_eq!(world.hear(), ["1@12 ready", "1@12 ended 1"]);

    // Workers that took too long do not hold up a pause.
    let _client = world.assign(1, 2, request(8));
    world.turn().await;
    world.lanes.pause(at(1, 12));
    world.turn().await;
    assert_eq!(world.hear(), [""; 0]);
    tokio::time::sleep(PAUSE_TIMEOUT + 2 * TICK).await;
    assert!(world.hear().contains(&"1@12 paused".to_owned()));
    world.toy(1).steps();
    world.lanes.resume(at(1, 12), Term(1));
    world.turn().await;
    assert!(world.lanes.is_current(at(1, 12)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_finished_wherever_its_sequence_is() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let _here = world.assign(1, 1, request(50));
    let _gone = world.assign(1, 2, request(50));
    world.serve_steps(1).await;
    world.hear();
    let (reply, timings) = oneshot::channel();
    world.lanes.finish(PipelineId(1), SequenceId(1), reply);
    world.lanes.leave(at(1, 10));
    let (reply, _none) = oneshot::channel();
    world.lanes.finish(PipelineId(1), SequenceId(2), reply);
    world.turn().await;
    assert!(timings.await.unwrap().is_some());
    let said = world.hear();
    assert_eq!(said, ["1@10 ended 1", "1@10 returned [2]", "1@10 left", "1@10 has no 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_is_noticed_within_a_tick() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let client = world.assign(1, 1, request(50));
    world.turn().await;
    drop(client);
    tokio::time::sleep(2 * TICK).await;
    assert_eq!(world.hear(), ["1@10 ended 1"]);
    assert_eq!(world.lanes.reports()[0].stats.running, 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_pipeline_is_probed_and_readiness_is_the_truth() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    assert_eq!(world.lanes.proven(), None);
    world.serve_steps(1).await;
    assert_eq!(world.hear(), ["1@10 ready"]);
    let first = world.lanes.proven().expect("the probe at its start");
    tokio::time::sleep(PROBE_AFTER + 2 * TICK).await;
    assert!(world.serve_steps(1).await > 0, "idle for too long");
    tokio::time::sleep(2 * TICK).await;
    assert!(world.lanes.proven() > Some(first));
    // A pipeline that answers nobody: what it once proved grows old.
    tokio::time::sleep(4 * PROBE_AFTER).await;
    let proven = world.lanes.proven().expect("once");
    assert!(world.now().since(proven) > crate::driver::control::READY_WITHIN);
    assert!(world.hear().contains(&"1@10 overdue".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_regained_term_does_not_fence_a_pipeline_that_lives() {
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut client = world.assign(1, 1, request(4));
    world.turn().await;
    let toy = world.toy(1);
    let old = toy.steps();
    assert!(old.iter().all(|step| step.header.term == Term(1)));
    world.lanes.resume(at(1, 10), Term(7));
    world.turn().await;
    let refused = |step, verdict| {
        move |link: LinkId, _: LinkId| {
            let (stage, detail) = (0, String::new());
            LinkEvent::Reply {
                link,
                reply: StepReply { at: at(1, 10), step, stage, verdict, detail },
            }
        }
    };
    for step in &old {
        toy.say(refused(step.header.step, StepVerdict::Fenced));
    }
    tokio::time::sleep(2 * TICK).await;
    assert_eq!(world.hear(), [""; 0]);
    let again = toy.steps();
    let first: Vec<_> = again.iter().map(|step| step.header.step).take(old.len()).collect();
    assert_eq!(first, old.iter().map(|step| step.header.step).collect::<Vec<_>>());
    assert!(again.iter().all(|step| step.header.term == Term(7)));
    for step in &again {
        toy.answer(step);
    }
    while world.serve_steps(1).await > 0 {}
    assert_eq!(read(&mut client).len(), 4);
    world.hear();

    let _client = world.assign(1, 2, request(4));
    world.turn().await;
    let step = toy.steps()[0].header.step;
    toy.say(refused(step, StepVerdict::Fenced));
    toy.say(|link, _| {
        let (at, stage) = (at(1, 10), u32::MAX);
        let (verdict, detail) = (StepVerdict::DownstreamLost, String::new());
        LinkEvent::Reply { link, reply: StepReply { at, step, stage, verdict, detail } }
    });
    world.turn().await;
    let said = world.hear();
    assert_eq!(said, ["1@10 fenced".to_owned(), format!("1@10 broke at {}", u32::MAX)]);
}

/// Hashing one long prompt in a lane, as was done once, takes longer than is allowed, as is shown.
#[tokio::test(start_paused = true)]
async fn no_poll_of_a_lane_computes_for_long() {
    let mut world = World::new();
    let mut large = served(1, 10);
    large.shape.kv_blocks = 1 << 15;
    world.lanes.serve(large);
    let mut clients = Vec::new();
    for id in 1..=256 {
        let prompt = (0..500 + id as u32).collect();
        clients.push(world.assign(1, id, Request { prompt, ..request(2000) }));
        if id % 32 == 0 {
            world.turn().await;
        }
    }
    for _ in 0..300 {
        world.serve_steps(1).await;
    }
    tokio::time::sleep(3 * TICK).await;
    // They all go away at once.
    let before = world.lanes.reports()[0].stats.running;
    clients.clear();
    tokio::time::sleep(2 * TICK).await;
    assert_eq!((before, world.lanes.reports()[0].stats.running), (256, 0));
    let longest = world.longest_poll.get();
    assert!(longest < LONGEST_POLL, "a lane computed for {longest:?} at once");

    let longest = Longest::default();
    let hashes = async {
        Sequence::new(Request { prompt: vec![1; 1 << 19], ..request(8) }).unwrap();
    };
    timed(hashes, cpu_time, longest.observe()).await;
    let hashing = longest.get();
    assert!(hashing > LONGEST_POLL, "hashing took {hashing:?}: it would not have been seen");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_reads_waits_and_slows_down_none_that_is_read() {
    let want = undisturbed(100).await;
    let mut world = World::new();
    world.lanes.serve(served(1, 10));
    let mut unread = world.assign(1, 1, request(100));
    let mut client = world.assign(1, 2, request(100));
    let mut found = Vec::new();
    while world.serve_steps(1).await > 0 {
        found.extend(read(&mut client));
    }
    assert_eq!(found, want);
    let ended = |world: &mut World| -> Vec<String> {
        world.hear().into_iter().filter(|words| words.contains("ended")).collect()
    };
    assert_eq!(ended(&mut world), ["1@10 ended 2"], "the other waits for its client");

    // It goes on when it is read, wherever it is by then, with the same tokens.
    let mut found = read(&mut unread);
    assert!((30..40).contains(&found.len()), "{}", found.len());
    let wait = |span| async move {
        tokio::time::advance(span).await;
        tokio::task::yield_now().await;
    };
    wait(TICK).await;
    assert!(world.serve_steps(1).await > 0);
    while world.serve_steps(1).await > 0 {}
    world.lanes.fail(at(1, 10), "a stage died");
    world.turn().await;
    let (_, mut returned) = world.hear_returned();
    world.lanes.left(PipelineId(1));
    world.lanes.serve(served(1, 11));
    let (sequence, its_client) = returned.remove(0);
    assert!(world.lanes.assign(PipelineId(1), sequence, its_client).is_ok());
    for _ in 0..20 {
        while world.serve_steps(1).await > 0 {}
        found.extend(read(&mut unread));
        wait(TICK).await;
    }
    assert_eq!(found, want);
    assert_eq!(ended(&mut world), ["1@11 ended 1"]);

    // One that is read now and then is slow, one that never is has ended.
    let mut slow = world.assign(1, 3, request(100));
    let never = world.assign(1, 4, request(100));
    for _ in 0..4 {
        while world.serve_steps(1).await > 0 {}
        slow.try_next();
        wait(HELD_MOST / 2).await;
    }
    world.turn().await;
    assert_eq!(ended(&mut world), ["1@11 ended 4"]);
    let error = never.end().await.unwrap_err().to_string();
    assert!(error.starts_with("the client does not read its answer: "), "{error}");
}
