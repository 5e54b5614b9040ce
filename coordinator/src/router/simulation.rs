//! Router and schedulers against toy pipelines: steps execute in order, their results come back
//! late, in any order and more than once, clients come and go, pipelines come, go and die. The toy's
//! next token is a hash of all tokens before it as its KV holds them, so whatever is lost, doubled,
//! stale or misplaced changes an answer.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use proptest::prelude::*;
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, Epoch, Incarnation, PrefixHash, StepId};
use proto::step::{
    Output, Row, RowResult, RowStatus, RowValue, Sampled, SamplingParameters, Step, StepResult,
};

use super::*;
use crate::scheduler::{
    Line, PipelineScheduler, PipelineShape, Request, StepCost, in_flight_limit,
};

const VOCAB: u64 = 40;
const STOP: u32 = 7;
const LIMITS: Limits = Limits {
    waiting_requests: 6,
    waiting_tokens: 1500,
    wait: Duration::from_secs(3600),
    running_requests: 12,
    step_tokens: 24,
    context_tokens: 300,
    step_time: Duration::from_millis(200),
    step_deadline: Duration::from_secs(30),
    prefix_cache: true,
};

fn number(hash: PrefixHash, salt: u64) -> u64 {
    let mixed = hash.then(salt as u32).then((salt >> 32) as u32);
    u64::from_le_bytes(mixed.0[..8].try_into().unwrap())
}

/// The toy's sampler: a hash of all tokens, the seed, and the counts if there are penalties.
fn sample(hash: PrefixHash, sampling: &SamplingParameters) -> u32 {
    let counts = sampling.prompt_counts.iter().chain(&sampling.output_counts);
    let salt = counts.fold(sampling.seed, |salt, &(token, count)| {
        salt.wrapping_mul(31).wrapping_add(u64::from(token) * 100 + u64::from(count))
    });
    (number(hash, salt) % VOCAB) as u32
}

fn score(hash: PrefixHash, target: u32) -> f32 {
    -((number(hash, u64::from(target)) % 1000) as f32) / 100.0
}

/// The answer of a request that is alone in the world, by definition.
fn solo(request: &Request) -> (Vec<f32>, Vec<u32>) {
    let prompt = &request.prompt;
    let scores = (1..prompt.len())
        .map(|i| score(PrefixHash::EMPTY.then_all(&prompt[..i]), prompt[i]))
        .collect();
    let count = |tokens: &[u32]| -> Vec<(u32, u32)> {
        (0..VOCAB as u32)
            .map(|token| (token, tokens.iter().filter(|&&t| t == token).count() as u32))
            .filter(|&(_, count)| count > 0)
            .collect()
    };
    let mut output = request.forced.clone();
    while output.len() < request.max_tokens as usize {
        let mut sampling = request.sampling.clone();
        if sampling.repetition_penalty != 1.0 {
            sampling.prompt_counts = count(prompt);
            sampling.output_counts = count(&output);
        } else if sampling.frequency_penalty != 0.0 {
            sampling.output_counts = count(&output);
        }
        let token = sample(PrefixHash::EMPTY.then_all(prompt).then_all(&output), &sampling);
        output.push(token);
        if output.len() > request.min_tokens as usize && request.stop_tokens.contains(&token) {
            break;
        }
    }
    (scores, output)
}

/// What a client has seen of its request.
#[derive(Debug)]
struct Client {
    request: Request,
    /// What it must see.
    want: (Vec<f32>, Vec<u32>),
    scores: Option<Vec<f32>>,
    output: Vec<u32>,
    end: Option<End>,
    /// Pipelines that died while they worked for it, since its last token.
    deaths: u32,
    /// How many tokens it had when that last happened.
    died_at: usize,
    /// Rows of it that found nothing to go on from.
    overtaken: u32,
    /// The pipeline that has had rows of it since it was last given back.
    ran_on: Option<PipelineId>,
}

#[derive(Clone, Debug, PartialEq)]
enum End {
    Finished,
    Failed,
    Cancelled,
}

/// One pipeline: its scheduler and its toy.
struct Pipe {
    scheduler: PipelineScheduler,
    shape: PipelineShape,
    /// The KV of the toy: the token at each slot, as the last row wrote it, and the salt of the
    /// sequence that did.
    kv: HashMap<(BlockId, u32), (u32, PrefixHash)>,
    /// Executed, result not delivered.
    open: BTreeMap<StepId, (Step, StepResult)>,
    delivered: Vec<StepResult>,
}

impl Pipe {
    /// Whether a later row of its sequence came back well: its result, which is still on its way, was
    /// overtaken, and its blocks are written. What they hold may be forgotten since.
    fn has_computed(&self, row: &Row) -> bool {
        let rows = self.delivered.iter().filter(|result| result.epoch == self.shape.epoch);
        rows.flat_map(|result| &result.rows).any(|later| {
            let is_later = later.position > row.position && later.status == RowStatus::Ok;
            is_later && (later.sequence, later.generation) == (row.sequence, row.generation)
        })
    }
}

struct World {
    router: Router,
    limits: Limits,
    now: Tick,
    epoch: u64,
    cost: StepCost,
    pipes: BTreeMap<PipelineId, Pipe>,
    /// Results of pipelines that are gone.
    late: Vec<StepResult>,
    clients: BTreeMap<SequenceId, Client>,
    /// Everything that was done, to compare two worlds.
    journal: Vec<String>,
}

const CLASS: NumericsClass = NumericsClass([7; 32]);

/// As often as a sequence is replayed without a token in between.
const MAX_OVERTAKEN: u32 = 8;

impl World {
    fn new(limits: Limits, pipelines: u64, stages: u32, kv_blocks: u32, cost: StepCost) -> Self {
        let mut world = Self {
            router: Router::new(limits),
            limits,
            now: Tick::ZERO,
            epoch: 0,
            cost,
            pipes: BTreeMap::new(),
            late: Vec::new(),
            clients: BTreeMap::new(),
            journal: Vec::new(),
        };
        for id in 1..=pipelines {
            world.serve(PipelineId(id), stages, kv_blocks);
        }
        world
    }

    fn shape(&mut self, pipeline: PipelineId, stages: u32, kv_blocks: u32) -> PipelineShape {
        self.epoch += 1;
        PipelineShape {
            pipeline,
            epoch: Epoch(self.epoch),
            term: Term(1),
            first_incarnation: Incarnation([1; 16]),
            stages,
            kv_blocks,
            first_draws: stages.is_multiple_of(2),
            cost: self.cost,
        }
    }

    /// A pipeline comes, or goes on with another epoch.
    fn serve(&mut self, id: PipelineId, stages: u32, kv_blocks: u32) {
        let shape = self.shape(id, stages, kv_blocks);
        let now = self.now;
        self.router.set_pipeline(id, kv_blocks, CLASS);
        let Some(pipe) = self.pipes.get_mut(&id) else {
            let pipe = Pipe {
                scheduler: PipelineScheduler::new(self.limits, shape),
                shape,
                kv: HashMap::new(),
                open: BTreeMap::new(),
                delivered: Vec::new(),
            };
            self.pipes.insert(id, pipe);
            return;
        };
        // What is still open is fenced: its results come late and count for nothing.
        pipe.delivered.extend(std::mem::take(&mut pipe.open).into_values().map(|(_, r)| r));
        pipe.kv.clear();
        pipe.shape = shape;
        let surplus = pipe.scheduler.switch(shape, now);
        // Everyone begins again: who has sent nothing since does not die with the pipeline.
        for client in self.clients.values_mut().filter(|client| client.ran_on == Some(id)) {
            client.ran_on = None;
        }
        let stats = pipe.scheduler.stats();
        assert_eq!((stats.kv_blocks_used, stats.steps_in_flight), (0, 0));
        for sequence in surplus {
            self.router.returned(sequence);
        }
    }

    /// A pipeline goes: as was planned, or it dies.
    fn leave(&mut self, which: usize, dies: bool) {
        let Some(&id) = self.pipes.keys().nth(which % self.pipes.len().max(1)) else { return };
        let mut pipe = self.pipes.remove(&id).unwrap();
        self.late.extend(pipe.delivered);
        self.late.extend(pipe.open.into_values().map(|(_, result)| result));
        let returned = match dies {
            true => {
                let lost = pipe.scheduler.lose("a stage died", self.now);
                for emission in &lost.emissions {
                    let client = self.clients.get_mut(&emission.sequence).unwrap();
                    assert_eq!(client.deaths, 1, "once is forgiven");
                    assert_eq!(client.died_at, client.output.len(), "so is what comes further");
                }
                self.hear(lost.emissions);
                lost.returned
            }
            false => pipe.scheduler.take_all(self.now),
        };
        assert!(returned.is_sorted_by_key(|sequence| sequence.id()));
        for sequence in returned {
            let client = self.clients.get_mut(&sequence.id()).unwrap();
            if dies && client.ran_on == Some(id) {
                let tokens = client.output.len();
                client.deaths = if client.died_at == tokens { client.deaths + 1 } else { 1 };
                client.died_at = tokens;
                assert!(client.deaths <= 1, "a second time without a token is not forgiven");
            }
            client.ran_on = None;
            self.router.returned(sequence);
        }
        self.router.remove_pipeline(id);
    }

    fn submit(&mut self, request: Request) {
        let sequence = Box::new(Sequence::new(request.clone()).unwrap());
        let outcome = self.router.submit(sequence, Wish::default(), self.now);
        let gave_way = self.router.take_gave_way();
        self.hear(gave_way);
        match outcome {
            Ok(taken) => {
                let output = request.forced.clone();
                let want = solo(&request);
                let client = Client {
                    request,
                    want,
                    scores: None,
                    output,
                    end: None,
                    deaths: 0,
                    died_at: 0,
                    overtaken: 0,
                    ran_on: None,
                };
                assert!(self.clients.insert(taken.sequence, client).is_none());
            }
            Err(Rejected::Complete { .. }) => {
                // The whole answer was known.
                let whole = solo(&Request { forced: Vec::new(), ..request.clone() }).1;
                assert_eq!(whole, request.forced);
                assert!(
                    !request.score_prompt || request.max_tokens > 0 || request.prompt.len() == 1
                );
            }
            Err(Rejected::Full { .. }) => {
                // More than the limit only where a pipeline's end sent runners back to the queue.
                assert!(self.router.stats().waiting >= LIMITS.waiting_requests);
            }
            Err(Rejected::FullOfTokens { waiting, limit }) => {
                assert!(waiting > 0 && limit == LIMITS.waiting_tokens);
            }
            Err(Rejected::TooLong { .. }) => {}
            Err(Rejected::NoPipeline) => assert!(self.pipes.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }

    /// Tells the router what the pipelines hold.
    fn report(&mut self) {
        for (&id, pipe) in &mut self.pipes {
            self.router.charge(&pipe.scheduler.take_charges());
            self.router.set_growth(id, pipe.scheduler.growth());
        }
    }

    fn send_all(&mut self) {
        self.report();
        for Assigned { sequence, pipeline } in self.router.assign() {
            self.journal.push(format!("{} to {pipeline}", sequence.id()));
            self.pipes.get_mut(&pipeline).unwrap().scheduler.admit(sequence);
        }
        let ids: Vec<_> = self.pipes.keys().copied().collect();
        for id in ids {
            let mut pipe = self.pipes.remove(&id).unwrap();
            while let Some(scheduled) = pipe.scheduler.next_step(self.now) {
                self.journal.push(format!("{id}: {:?}", scheduled.step));
                for row in &scheduled.step.rows {
                    self.clients.get_mut(&row.sequence).unwrap().ran_on = Some(id);
                }
                self.check_step(&pipe, &scheduled.step);
                let salt = |row: &Row| self.clients[&row.sequence].request.salt;
                pipe.execute_step(scheduled.step, salt);
            }
            // Who was preempted begins again, here or elsewhere.
            for (&sequence, client) in &mut self.clients {
                if client.ran_on == Some(id) && !pipe.scheduler.has_run(sequence) {
                    client.ran_on = None;
                }
            }
            let pushed_out = pipe.scheduler.take_pushed_out();
            self.pipes.insert(id, pipe);
            for sequence in pushed_out {
                self.journal.push(format!("{} makes room on {id}", sequence.id()));
                self.router.returned(sequence);
            }
        }
    }

    fn check_step(&self, pipe: &Pipe, step: &Step) {
        let limit = in_flight_limit(pipe.shape.stages);
        let header = &step.header;
        assert!((pipe.open.len() as u32) < limit);
        assert!(header.step.0 - header.acked_step.0 <= u64::from(limit), "outputs to keep");
        assert!(pipe.open.keys().all(|&open| open > header.acked_step));
        assert!(pipe.open.keys().all(|&open| open < header.step), "numbers ascend");
        let tokens: usize = step.rows.iter().map(|row| row.tokens.len()).sum();
        assert!(tokens > 0 && tokens <= LIMITS.step_tokens as usize);

        let running = pipe.scheduler.stats().running;
        let is_draw = |row: &&Row| matches!(row.output, Output::Draw(_));
        let draws = step.rows.iter().filter(is_draw).count();
        assert!(draws == 0 || draws == step.rows.len() && step.ended_sequences.is_empty());
        let decodes = |row: &&Row| self.is_decode(row) && !is_draw(row);
        let decode = step.rows.iter().filter(decodes).count() as u32;
        assert!(decode <= running.div_ceil(pipe.shape.stages), "{decode} of {running} clump");
        // What a row reads or writes nobody else may write at the same time.
        let is_known = |block: BlockId| pipe.scheduler.is_known(block);
        let written = |row: &Row| match row.output {
            Output::Draw(_) => Vec::new(),
            _ => row.blocks[(row.position / BLOCK_TOKENS) as usize..].to_vec(),
        };
        for row in &step.rows {
            let known = written(row).into_iter().find(|&block| is_known(block));
            assert_eq!(known, None, "{} writes what others may read", row.sequence);
            assert_eq!(step.rows.iter().filter(|other| other.sequence == row.sequence).count(), 1);
            assert!(!step.ended_sequences.contains(&row.sequence));
            let others = pipe.open.values().flat_map(|(step, _)| &step.rows);
            for other in others.chain(&step.rows) {
                if other.sequence != row.sequence {
                    let one = written(row).into_iter().find(|block| other.blocks.contains(block));
                    assert_eq!(one, None, "{} writes, {} reads", row.sequence, other.sequence);
                    let mut one = written(other).into_iter().filter(|_| !pipe.has_computed(other));
                    let one = one.find(|block| row.blocks.contains(block));
                    assert_eq!(one, None, "{} writes, {} reads", other.sequence, row.sequence);
                } else if other.generation == row.generation && other.position != row.position {
                    assert!(other.position < row.position, "sent in order");
                    let samples = !matches!(other.output, Output::None | Output::Score(_));
                    assert!(!samples, "a sequence has at most one sampling row on its way");
                }
            }
        }
    }

    fn is_decode(&self, row: &Row) -> bool {
        let client = &self.clients[&row.sequence];
        let start = client.request.prompt.len() + client.request.forced.len();
        row.generation.0 == 0 && row.position as usize >= start
    }

    fn deliver(&mut self, which: usize) {
        let open = self.pipes.iter().flat_map(|(&id, p)| p.open.keys().map(move |&s| (id, s)));
        let open: Vec<_> = open.collect();
        let Some(&(id, step)) = open.get(which % open.len().max(1)) else { return };
        let pipe = self.pipes.get_mut(&id).unwrap();
        let (_, result) = pipe.open.remove(&step).unwrap();
        let emissions = pipe.scheduler.complete(result.clone(), self.now);
        pipe.delivered.push(result);
        self.hear(emissions);
    }

    /// Also to a pipeline that never asked.
    fn deliver_again(&mut self, which: usize) {
        for pipe in self.pipes.values_mut() {
            let known = pipe.delivered.iter().chain(&self.late);
            if let Some(result) = known.clone().nth(which % known.count().max(1)) {
                assert_eq!(pipe.scheduler.complete(result.clone(), self.now), []);
            }
        }
    }

    fn hear(&mut self, emissions: Vec<Emission>) {
        for Emission { sequence, event } in emissions {
            self.journal.push(format!("{sequence}: {event:?}"));
            let client = self.clients.get_mut(&sequence).unwrap();
            assert_eq!(client.end, None, "nothing comes after the end");
            match event {
                EmissionEvent::PromptScores(scores) => {
                    assert_eq!(client.output.len(), client.request.forced.len());
                    assert!(client.scores.replace(scores).is_none(), "told once");
                }
                EmissionEvent::Token { index, sampled } => {
                    assert_eq!(index as usize, client.output.len(), "no gap, no double");
                    client.output.push(sampled.token);
                }
                EmissionEvent::Finished { finish, .. } => {
                    client.end = Some(End::Finished);
                    let last = client.output.last().copied();
                    assert!(finish.stop_token.is_none() || finish.stop_token == last);
                    self.router.ended(sequence);
                }
                EmissionEvent::Failed(_) => {
                    client.end = Some(End::Failed);
                    self.router.ended(sequence);
                }
            }
            let (scores, output) = &client.want;
            assert!(output.starts_with(&client.output), "the answer is that of the solo run");
            assert!(client.scores.as_ref().is_none_or(|found| found == scores));
            if client.end == Some(End::Finished) {
                assert_eq!(*output, client.output);
                assert_eq!(client.scores.is_some(), client.request.score_prompt);
            }
        }
    }

    /// A row came before the one that it goes on from, or its stage has lost that.
    fn overtake(&mut self, which: usize) {
        let rows = self.pipes.iter_mut().flat_map(|(_, pipe)| pipe.open.values_mut());
        let mut rows: Vec<_> = rows
            .flat_map(|(_, result)| &mut result.rows)
            .filter(|row| row.position > 0 && row.status == RowStatus::Ok)
            .collect();
        let count = rows.len().max(1);
        let Some(row) = rows.get_mut(which % count) else { return };
        let client = self.clients.get_mut(&row.sequence).unwrap();
        // More often in a row is a fault of the pipeline.
        if client.overtaken < MAX_OVERTAKEN {
            client.overtaken += 1;
            (row.status, row.value) = (RowStatus::NeedState, RowValue::None);
        }
    }

    fn cancel(&mut self, which: usize) {
        let live: Vec<_> =
            self.clients.iter().filter(|(_, c)| c.end.is_none()).map(|(&id, _)| id).collect();
        let Some(&id) = live.get(which % live.len().max(1)) else { return };
        match self.router.pipeline_of(id) {
            Some(pipeline) => {
                let scheduler = &mut self.pipes.get_mut(&pipeline).unwrap().scheduler;
                match which % 2 {
                    0 => assert!(scheduler.cancel(id)),
                    _ => assert!(scheduler.finish(id, self.now).is_some()),
                }
                assert_eq!(scheduler.finish(id, self.now), None, "it is gone");
                self.router.ended(id);
            }
            None => assert!(self.router.withdraw(id).is_some()),
        }
        self.clients.get_mut(&id).unwrap().end = Some(End::Cancelled);
    }

    fn check(&self) {
        let stats = self.router.stats();
        let running: u32 = self.pipes.values().map(|pipe| pipe.scheduler.stats().running).sum();
        assert_eq!(stats.running, running, "router and schedulers agree on who runs");
        assert!(stats.kv_blocks_used <= stats.kv_blocks_total);
        for pipe in self.pipes.values() {
            let stats = pipe.scheduler.stats();
            assert!(stats.running <= LIMITS.running_requests);
            assert_eq!(stats.steps_in_flight as usize, pipe.open.len());
            pipe.scheduler.check_counts();
        }
        let live = self.clients.values().filter(|c| c.end.is_none()).count();
        assert_eq!((running + stats.waiting) as usize, live, "nobody is lost");
    }

    /// No more comes from outside: everything must end.
    fn settle(&mut self, mut order: usize) {
        if self.pipes.is_empty() {
            self.serve(PipelineId(9), 2, 30);
        }
        for _ in 0..20_000 {
            self.send_all();
            if self.pipes.values().all(|pipe| pipe.open.is_empty()) {
                break;
            }
            self.deliver(order);
            order = order.wrapping_mul(31).wrapping_add(7);
        }
        self.check();
        // What fits on none of those that are left was put aside, and fails when its time is up.
        let largest = self.pipes.values().map(|pipe| pipe.shape.kv_blocks).max().unwrap();
        for late in self.router.expire(self.now + LIMITS.wait, usize::MAX) {
            let EmissionEvent::Failed(SequenceError::NeverFits { needed_blocks, .. }) = late.event
            else {
                panic!("starved: {late:?}")
            };
            assert!(needed_blocks > largest);
            self.clients.get_mut(&late.sequence).unwrap().end = Some(End::Failed);
        }
        // One that has begun waits on for a pipeline that holds it.
        for (&id, client) in self.clients.iter_mut().filter(|(_, client)| client.end.is_none()) {
            let tokens = client.request.prompt.len() as u32 + client.request.max_tokens;
            assert!(
                tokens.div_ceil(BLOCK_TOKENS) > largest,
                "sequence {id} never ended: {client:?}"
            );
            assert!(self.router.withdraw(id).is_some_and(|sequence| sequence.was_admitted()));
            client.end = Some(End::Cancelled);
        }
        self.report();
        let stats = self.router.stats();
        assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0));
        assert!(self.router.is_empty());
        for pipe in self.pipes.values() {
            assert_eq!(pipe.scheduler.stats().kv_blocks_used, 0, "no block is lost");
            assert!(pipe.scheduler.is_idle());
        }
    }
}

impl Pipe {
    fn execute_step(&mut self, step: Step, salt: impl Fn(&Row) -> PrefixHash) {
        let mut states = step.activations.chunks(size_of::<PrefixHash>());
        let rows = step.rows.iter().map(|row| self.execute(row, salt(row), &mut states)).collect();
        assert_eq!(states.next(), None, "a state for every row that is drawn from");
        let result = StepResult {
            epoch: step.header.epoch,
            step: step.header.step,
            rows,
            stage_times: Vec::new(),
        };
        self.open.insert(step.header.step, (step, result));
    }

    /// What the stages would do: check the prefix against the KV, write, answer.
    fn execute<'s>(
        &mut self,
        row: &Row,
        salt: PrefixHash,
        states: &mut impl Iterator<Item = &'s [u8]>,
    ) -> RowResult {
        let value = match &row.output {
            Output::Draw(sampling) => {
                assert!(self.shape.first_draws);
                let state = states.next().expect("what to draw from");
                assert_eq!(state, row.prefix_hash_after.0, "of the same tokens");
                let token = sample(row.prefix_hash_after, sampling);
                RowValue::Sampled(Sampled { token, logprob: None, top: Vec::new() })
            }
            _ => self.compute(row, salt),
        };
        RowResult {
            sequence: row.sequence,
            generation: row.generation,
            position: row.position,
            token_count: row.tokens.len() as u32,
            status: RowStatus::Ok,
            detail: String::new(),
            value,
        }
    }

    /// Of a row that goes through all layers.
    fn compute(&mut self, row: &Row, salt: PrefixHash) -> RowValue {
        let mut hash = PrefixHash::EMPTY;
        for position in 0..row.position {
            let slot = (row.blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS);
            let (token, of) = self.kv[&slot];
            assert_eq!(of, salt, "{} reads what is not of its salt", row.sequence);
            hash = hash.then(token);
        }
        assert_eq!(hash, row.prefix_hash_before, "NEED_STATE");
        let mut scores = Vec::new();
        for (i, &token) in row.tokens.iter().enumerate() {
            let position = row.position + i as u32;
            let slot = (row.blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS);
            self.kv.insert(slot, (token, salt));
            hash = hash.then(token);
            if let Output::Score(targets) = &row.output {
                scores.push(score(hash, targets[i]));
            }
        }
        assert_eq!(hash, row.prefix_hash_after);
        assert_eq!(row.blocks.len() as u32, (row.position + row.tokens.len() as u32).div_ceil(32));
        match &row.output {
            Output::None => RowValue::None,
            Output::Score(_) => RowValue::Scores(scores),
            Output::Sample(sampling) => RowValue::Sampled(Sampled {
                token: sample(hash, sampling),
                logprob: None,
                top: Vec::new(),
            }),
            Output::State => RowValue::State(hash.0.to_vec().into()),
            Output::Draw(_) | Output::Drawn(_) | Output::Logits => panic!("never asked for"),
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Box<Request>),
    Send,
    Deliver(usize),
    DeliverAgain(usize),
    Cancel(usize),
    Overtake(usize),
    /// A pipeline comes, or goes on with another epoch.
    Serve {
        id: u64,
        stages: u32,
        kv_blocks: u32,
    },
    Leave {
        which: usize,
        dies: bool,
    },
}

fn arb_request() -> impl Strategy<Value = Request> {
    // Some answers grow by blocks and blocks.
    let max_tokens = prop_oneof![4 => 0u32..40, 1 => 40u32..150];
    let shape = (1usize..90, max_tokens, 0u32..6, 0usize..5, any::<(bool, bool, bool)>());
    // Prompts begin alike, for the length of blocks or not at all.
    let alike = (prop_oneof![Just(0usize), 20usize..90], 0u8..3);
    (shape, alike, 0u32..4, any::<u32>()).prop_map(|(shape, (alike, salt), penalties, seed)| {
        let (prompt, max_tokens, min_tokens, forced, (score_prompt, stops, batch)) = shape;
        let seed = u64::from(seed);
        let token = |i: usize| {
            let of = if i < alike { 0 } else { seed };
            ((of + i as u64 * i as u64 * 7) % VOCAB) as u32
        };
        let mut request = Request {
            prompt: (0..prompt).map(token).collect(),
            forced: Vec::new(),
            max_tokens,
            min_tokens,
            sampling: SamplingParameters {
                seed,
                repetition_penalty: if penalties == 1 { 1.1 } else { 1.0 },
                frequency_penalty: if penalties == 2 { 0.5 } else { 0.0 },
                ..SamplingParameters::default()
            },
            stop_tokens: if stops { vec![STOP] } else { Vec::new() },
            score_prompt,
            priority: if batch { Priority::Batch } else { Priority::Interactive },
            caller: Caller([(seed % 3) as u8; 16]),
            // One of three has the other salt.
            salt: PrefixHash([salt / 2; 16]),
            deadline: None,
            traceparent: String::new(),
        };
        let whole = solo(&request).1;
        request.forced = whole[..forced.min(whole.len())].to_vec();
        request
    })
}

fn arb_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => arb_request().prop_map(|request| Op::Submit(Box::new(request))),
        8 => Just(Op::Send),
        12 => any::<usize>().prop_map(Op::Deliver),
        1 => any::<usize>().prop_map(Op::DeliverAgain),
        1 => any::<usize>().prop_map(Op::Cancel),
        2 => any::<usize>().prop_map(Op::Overtake),
        1 => (1u64..5, 1u32..5, 4u32..30)
            .prop_map(|(id, stages, kv_blocks)| Op::Serve { id, stages, kv_blocks }),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, dies)| Op::Leave { which, dies }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_answer_is_that_of_a_solo_run(
        pipelines in 1u64..4, stages in 1u32..6, kv_blocks in 4u32..30, order: usize,
        step_ns in 0u64..100_000_000, row_ns in 0u64..20_000_000, prefix_cache: bool,
        ops in proptest::collection::vec(arb_op(), 1..120),
    ) {
        let line = Line { step_ns, row_ns };
        let cost = StepCost { decode: line, prompt: line };
        let run = || {
            let limits = Limits { prefix_cache, ..LIMITS };
            let mut world = World::new(limits, pipelines, stages, kv_blocks, cost);
            for op in ops.clone() {
                world.now = world.now + Duration::from_millis(3);
                world.does(op);
                world.check();
            }
            world.settle(order);
            world.journal
        };
        prop_assert!(run() == run(), "equal events give equal actions");
    }
}

impl World {
    fn does(&mut self, op: Op) {
        match op {
            Op::Submit(request) => self.submit(*request),
            Op::Send => self.send_all(),
            Op::Deliver(which) => self.deliver(which),
            Op::DeliverAgain(which) => self.deliver_again(which),
            Op::Cancel(which) => self.cancel(which),
            Op::Overtake(which) => self.overtake(which),
            Op::Serve { id, stages, kv_blocks } => self.serve(PipelineId(id), stages, kv_blocks),
            Op::Leave { which, dies } => self.leave(which, dies),
        }
    }
}
