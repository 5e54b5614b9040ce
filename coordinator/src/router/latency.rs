//! Who waits how long: router and scheduler before one stage of which every step takes the time that its
//! rows cost, so that hours pass in no time and every run is the same.

use std::collections::VecDeque;
use std::time::Duration;

use proto::ids::{Epoch, Incarnation, PrefixHash};
use proto::step::{StageTime, Step};

use super::*;
use crate::scheduler::{Line, PipelineScheduler, PipelineShape, Request, StepCost, testing};

const CLASS: NumericsClass = NumericsClass([7; 32]);
const MS: u64 = 1_000_000;

/// 20 ms a step, 10 ms a row: a model of which a row costs half as much as reading its weights.
const COST: Line = Line { step_ns: 20 * MS, row_ns: 10 * MS };

/// A token's attention to a thousand before it.
const CONTEXT_NS: u64 = 2 * MS;

struct World {
    router: Router,
    scheduler: PipelineScheduler,
    now: Tick,
    /// On their way, and when each comes back.
    open: VecDeque<(Tick, Duration, Step)>,
    seen: BTreeMap<SequenceId, Seen>,
    longest_step: Duration,
    computed: u64,
}

/// What a client has seen.
#[derive(Clone, Copy, Debug)]
struct Seen {
    asked: Tick,
    first: Option<Tick>,
    last: Option<Tick>,
    tokens: u32,
    ended: bool,
}

impl World {
    fn new(limits: Limits, kv_blocks: u32) -> Self {
        let shape = PipelineShape {
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            term: Term(1),
            first_incarnation: Incarnation([1; 16]),
            stages: 1,
            kv_blocks,
            first_draws: false,
            cost: StepCost { decode: COST, prompt: COST },
        };
        let mut router = Router::new(limits);
        router.set_pipeline(PipelineId(1), kv_blocks, CLASS);
        Self {
            router,
            scheduler: PipelineScheduler::new(limits, shape),
            now: Tick::ZERO,
            open: VecDeque::new(),
            seen: BTreeMap::new(),
            longest_step: Duration::ZERO,
            computed: 0,
        }
    }

    fn ask(&mut self, request: Request) -> SequenceId {
        let sequence = Box::new(Sequence::new(request).unwrap());
        let taken = self.router.submit(sequence, Wish::default(), self.now).unwrap();
        let seen = Seen { asked: self.now, first: None, last: None, tokens: 0, ended: false };
        self.seen.insert(taken.sequence, seen);
        taken.sequence
    }

    fn place(&mut self) {
        self.router.charge(&self.scheduler.take_charges());
        self.router.set_growth(PipelineId(1), self.scheduler.growth());
        for Assigned { sequence, .. } in self.router.assign() {
            self.scheduler.admit(sequence);
        }
    }

    /// Sends what may be sent.
    fn send(&mut self) {
        self.place();
        while let Some(scheduled) = self.scheduler.next_step(self.now) {
            let took = time_of(&scheduled.step);
            let begins = self.open.back().map_or(self.now, |&(ends, ..)| ends.max(self.now));
            self.longest_step = self.longest_step.max(took);
            self.open.push_back((begins + took, took, scheduled.step));
        }
        for sequence in self.scheduler.take_pushed_out() {
            self.router.returned(sequence);
        }
    }

    /// Until the next step has come back. Whether one was on its way.
    fn step(&mut self) -> bool {
        self.send();
        let Some((ends, took, step)) = self.open.pop_front() else { return false };
        self.now = ends;
        let mut result = testing::result(&step, testing::of_history);
        let none = Duration::ZERO;
        result.stage_times = vec![StageTime { stage: 0, compute: took, wait: none, behind: none }];
        self.computed += step.rows.iter().map(|row| row.tokens.len() as u64).sum::<u64>();
        for Emission { sequence, event } in self.scheduler.complete(result, self.now) {
            let seen = self.seen.get_mut(&sequence).unwrap();
            match event {
                EmissionEvent::Token { .. } => {
                    seen.first.get_or_insert(ends);
                    seen.last = Some(ends);
                    seen.tokens += 1;
                }
                EmissionEvent::Finished { .. } => {
                    seen.ended = true;
                    self.router.charge(&self.scheduler.take_charges());
                    self.router.ended(sequence);
                }
                other => panic!("{other:?}"),
            }
        }
        true
    }

    /// Until it has ended.
    fn run(&mut self, id: SequenceId) -> Seen {
        while !self.seen[&id].ended {
            assert!(self.step(), "{id} is forgotten");
        }
        self.seen[&id]
    }

    fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until && self.step() {}
    }
}

impl Seen {
    fn to_first(self) -> Duration {
        self.first.unwrap().since(self.asked)
    }

    fn whole(self) -> Duration {
        self.last.unwrap().since(self.asked)
    }
}

fn time_of(step: &Step) -> Duration {
    let rows: u64 = step.rows.iter().map(|row| row.tokens.len() as u64).sum();
    let pairs: u64 = step
        .rows
        .iter()
        .map(|row| {
            let count = row.tokens.len() as u64;
            count * u64::from(row.position) + count * count / 2
        })
        .sum();
    Duration::from_nanos(COST.step_ns + COST.row_ns * rows + CONTEXT_NS * pairs / 1000)
}

/// Of a caller, each with a prompt of its own.
fn request(caller: u8, number: u32, prompt: u32, max_tokens: u32) -> Request {
    Request {
        prompt: (0..prompt).map(|i| number * 10_000 + i).collect(),
        max_tokens,
        caller: Caller([caller; 16]),
        salt: PrefixHash([caller; 16]),
        ..Request::probe(0)
    }
}

fn limits() -> Limits {
    Limits { waiting_requests: 2000, waiting_tokens: u64::MAX, ..Limits::default() }
}

/// The middle of what a caller's requests take, one after the other, in a world that is busy since a while.
fn of_one_after_the_other(world: &mut World, prompt: u32, answer: u32) -> (Duration, Duration) {
    let mut seen = Vec::new();
    for number in 0..7 {
        // At any moment of a step.
        world.run_for(Duration::from_millis(333));
        let id = world.ask(request(9, 5000 + number, prompt, answer));
        seen.push(world.run(id));
    }
    let middle = |of: fn(Seen) -> Duration| {
        let mut times: Vec<_> = seen.iter().map(|&seen| of(seen)).collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    (middle(Seen::to_first), middle(Seen::whole))
}

#[test]
fn a_caller_with_a_thousand_requests_at_most_doubles_what_another_waits() {
    let mut late = Vec::new();
    for (prompt, answer) in [(20, 60), (400, 40), (1500, 10)] {
        let (_, alone) = of_one_after_the_other(&mut World::new(limits(), 4096), prompt, answer);
        // Short and long prompts, short and long answers; KV for all that run, and for few.
        for (others, length, kv_blocks) in
            [(16, 2000, 4096), (1000, 100, 4096), (30, 3000, 400), (3000, 30, 300)]
        {
            let mut world = World::new(limits(), kv_blocks);
            (0..1000).for_each(|number| {
                world.ask(request(1, number, others, length));
            });
            world.run_for(Duration::from_secs(30));
            let (_, beside) = of_one_after_the_other(&mut world, prompt, answer);
            // Chunks are whole tokens: half of a step's time holds less than half of its tokens.
            let most = 2 * alone + alone / 8 + 2 * world.longest_step;
            if beside > most {
                late.push(format!(
                    "{prompt} and {answer} tokens: {beside:?} beside {others} and {length}, {alone:?} \
                     alone, steps of {:?}",
                    world.longest_step
                ));
            }
        }
    }
    assert!(late.is_empty(), "{late:#?}");
}

#[test]
fn an_interactive_request_gets_its_first_token_in_twice_its_idle_time_and_a_step() {
    for prompt in [8, 64, 500, 2000] {
        let (idle, _) = of_one_after_the_other(&mut World::new(limits(), 4096), prompt, 4);
        // With KV for all of batch, and for a tenth.
        for kv_blocks in [4096, 300] {
            let mut world = World::new(limits(), kv_blocks);
            (0..200).for_each(|number| {
                let batch = request(1, number, 200, 300);
                world.ask(Request { priority: Priority::Batch, ..batch });
            });
            world.run_for(Duration::from_secs(60));
            let full = world.router.stats().kv_blocks_used > 250;
            assert!(full, "saturated: {:?}", world.router.stats());
            let (beside, _) = of_one_after_the_other(&mut world, prompt, 4);
            let most = 2 * idle + world.longest_step;
            assert!(beside <= most, "{prompt} tokens: {beside:?} beside batch, {idle:?} alone");
        }
    }
}

#[test]
fn batch_has_what_interactive_requests_leave_and_all_of_it_ends() {
    let mut world = World::new(limits(), 120);
    let batch: Vec<_> = (0..40)
        .map(|number| {
            let batch = request(1, number, 200, 60);
            world.ask(Request { priority: Priority::Batch, ..batch })
        })
        .collect();
    for number in 0..30 {
        world.run_for(Duration::from_secs(3));
        let id = world.ask(request(2, number, 900, 10));
        world.run(id);
    }
    for id in batch {
        assert_eq!(world.run(id).tokens, 60);
    }
    let stats = world.scheduler.stats();
    assert!(stats.preempted > 0, "they made room");
    // What is computed again for them stays within what interactive requests cost.
    let once = 40 * (200 + 59) + 30 * (900 + 9);
    assert!(world.computed < 2 * once, "{} tokens for {once}", world.computed);
}

#[test]
fn callers_who_all_have_more_than_fits_get_equal_shares() {
    let mut world = World::new(limits(), 600);
    for number in 0..600 {
        // Short ones, long prompts, long answers.
        world.ask(request(1, number, 10, 100));
        world.ask(request(2, number, 900, 10));
        world.ask(request(3, number, 50, 800));
    }
    let mut served = BTreeMap::<u64, u64>::new();
    let mut samples = Vec::new();
    for _ in 0..8 {
        world.run_for(Duration::from_secs(120));
        let tokens = |caller: u64| -> u64 {
            let his = world.seen.iter().filter(|(id, _)| (id.0 - 1) % 3 + 1 == caller);
            let prompt = [10, 900, 50][caller as usize - 1];
            his.filter(|(_, seen)| seen.first.is_some())
                .map(|(_, seen)| prompt + u64::from(seen.tokens))
                .sum()
        };
        (1..=3).for_each(|caller| {
            served.insert(caller, tokens(caller));
        });
        samples.push(served.values().copied().collect::<Vec<_>>());
    }
    let last = samples.last().unwrap();
    let (least, most) = (last.iter().min().unwrap(), last.iter().max().unwrap());
    // A few prompts and answers of the longest kind either way.
    assert!(most - least < most / 4 + 4000, "{samples:?}");
}

#[test]
fn steps_of_any_context_take_the_time_that_they_should() {
    let mut world = World::new(Limits { context_tokens: 40_000, ..limits() }, 4096);
    let id = world.ask(request(1, 1, 36_000, 2));
    let mut chunks = Vec::new();
    while !world.seen[&id].ended {
        world.send();
        if let Some((_, took, step)) = world.open.back() {
            chunks.push((step.rows[0].position, step.rows[0].tokens.len(), *took));
        }
        assert!(world.step());
    }
    // The first steps teach what context costs.
    let steady = &chunks[8..chunks.len() - 5];
    let (least, most) = (5, 220);
    for &(position, tokens, took) in steady {
        let enough = tokens <= 8 || took >= Duration::from_millis(200 - 60);
        assert!(tokens >= least && enough, "{tokens} at {position} took {took:?}");
        assert!(
            tokens == 8 || took <= Duration::from_millis(most),
            "{tokens} at {position}: {took:?}"
        );
    }
    let at = |position| steady.iter().find(|chunk| chunk.0 >= position).unwrap().1;
    assert!(at(1000) > at(4000) && at(4000) > 8, "{} {}", at(1000), at(4000));
    let budget = world.scheduler.budget();
    assert!((budget.scale - 1.0).abs() < 0.05, "{budget:?}");
    assert!((budget.context_ms - 2.0).abs() < 0.2, "{budget:?}");
}
