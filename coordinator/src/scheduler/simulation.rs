//! The scheduler against a toy pipeline: steps execute in order, their results come back late, in
//! any order and more than once, clients come and go, epochs end. The toy's next token is a hash
//! of all tokens before it as its KV holds them, so whatever is lost, doubled, stale or misplaced
//! changes an answer.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use proptest::prelude::*;
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, Epoch, Incarnation, PipelineId, PrefixHash, SequenceId, StepId, Term};
use proto::step::{
    Output, Row, RowResult, RowStatus, RowValue, Sampled, SamplingParameters, Step, StepResult,
};

use super::*;

const VOCAB: u64 = 40;
const STOP: u32 = 7;
const LIMITS: Limits = Limits {
    waiting_requests: 6,
    wait: Duration::from_secs(3600),
    running_requests: 12,
    step_tokens: 24,
    context_tokens: 300,
    step_deadline: Duration::from_secs(30),
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
}

#[derive(Clone, Debug, PartialEq)]
enum End {
    Finished,
    Failed,
    Cancelled,
}

struct World {
    scheduler: Scheduler,
    now: Tick,
    epoch: u64,
    shape: PipelineShape,
    /// The KV of the toy: the token at each slot, as the last row wrote it.
    kv: HashMap<(BlockId, u32), u32>,
    /// Executed, result not delivered.
    open: BTreeMap<StepId, (Step, StepResult)>,
    delivered: Vec<StepResult>,
    clients: BTreeMap<SequenceId, Client>,
}

impl World {
    fn new(stages: u32, kv_blocks: u32, first_draws: bool, cost: StepCost) -> Self {
        let shape = PipelineShape {
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            term: Term(1),
            first_incarnation: Incarnation([1; 16]),
            stages,
            kv_blocks,
            first_draws,
            cost,
        };
        let mut scheduler = Scheduler::new(LIMITS);
        scheduler.set_pipeline(shape, Running::Keep, Tick::ZERO);
        Self {
            scheduler,
            now: Tick::ZERO,
            epoch: 1,
            shape,
            kv: HashMap::new(),
            open: BTreeMap::new(),
            delivered: Vec::new(),
            clients: BTreeMap::new(),
        }
    }

    fn submit(&mut self, request: Request) {
        match self.scheduler.submit(request.clone(), self.now) {
            Ok(id) => {
                let output = request.forced.clone();
                let want = solo(&request);
                let client = Client { request, want, scores: None, output, end: None };
                assert!(self.clients.insert(id, client).is_none());
            }
            Err(Rejected::Complete { .. }) => {
                assert_eq!(
                    solo(&request).1.len(),
                    request.forced.len().max(solo(&request).1.len())
                );
            }
            Err(Rejected::Full { .. }) => {
                // More than the limit only where an epoch's end sent runners back to the queue.
                assert!(self.scheduler.stats().waiting >= LIMITS.waiting_requests);
            }
            Err(Rejected::TooLong { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn send_all(&mut self) {
        while let Some(scheduled) = self.scheduler.next_step(self.now) {
            let step = scheduled.step;
            self.check_step(&step);
            let mut states = step.activations.chunks(size_of::<PrefixHash>());
            let rows = step.rows.iter().map(|row| self.execute(row, &mut states)).collect();
            assert_eq!(states.next(), None, "a state for every row that is drawn from");
            let result = StepResult {
                epoch: step.header.epoch,
                step: step.header.step,
                rows,
                stage_times: Vec::new(),
            };
            self.open.insert(step.header.step, (step, result));
        }
    }

    fn check_step(&self, step: &Step) {
        let limit = in_flight_limit(self.shape.stages);
        let header = &step.header;
        assert!((self.open.len() as u32) < limit);
        assert!(header.step.0 - header.acked_step.0 <= u64::from(limit), "outputs to keep");
        assert!(self.open.keys().all(|&open| open > header.acked_step));
        assert!(self.open.keys().all(|&open| open < header.step), "numbers ascend");
        let tokens: usize = step.rows.iter().map(|row| row.tokens.len()).sum();
        assert!(tokens > 0 && tokens <= LIMITS.step_tokens as usize);

        let running = self.scheduler.stats().running;
        let is_draw = |row: &&Row| matches!(row.output, Output::Draw(_));
        let draws = step.rows.iter().filter(is_draw).count();
        assert!(draws == 0 || draws == step.rows.len() && step.ended_sequences.is_empty());
        let decodes = |row: &&Row| self.is_decode(row) && !is_draw(row);
        let decode = step.rows.iter().filter(decodes).count() as u32;
        assert!(decode <= running.div_ceil(self.shape.stages), "{decode} of {running} clump");
        for row in &step.rows {
            assert_eq!(step.rows.iter().filter(|other| other.sequence == row.sequence).count(), 1);
            assert!(!step.ended_sequences.contains(&row.sequence));
            let others = self.open.values().flat_map(|(step, _)| &step.rows);
            for other in others.chain(&step.rows) {
                if other.sequence != row.sequence {
                    let shared = row.blocks.iter().find(|block| other.blocks.contains(block));
                    assert_eq!(shared, None, "{} and {}", row.sequence, other.sequence);
                } else if other.position != row.position {
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

    /// What the stages would do: check the prefix against the KV, write, answer.
    fn execute<'s>(&mut self, row: &Row, states: &mut impl Iterator<Item = &'s [u8]>) -> RowResult {
        let value = match &row.output {
            Output::Draw(sampling) => {
                assert!(self.shape.first_draws);
                let state = states.next().expect("what to draw from");
                assert_eq!(state, row.prefix_hash_after.0, "of the same tokens");
                let token = sample(row.prefix_hash_after, sampling);
                RowValue::Sampled(Sampled { token, logprob: None, top: Vec::new() })
            }
            _ => self.compute(row),
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
    fn compute(&mut self, row: &Row) -> RowValue {
        let mut hash = PrefixHash::EMPTY;
        for position in 0..row.position {
            let slot = (row.blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS);
            hash = hash.then(self.kv[&slot]);
        }
        assert_eq!(hash, row.prefix_hash_before, "NEED_STATE");
        let mut scores = Vec::new();
        for (i, &token) in row.tokens.iter().enumerate() {
            let position = row.position + i as u32;
            let slot = (row.blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS);
            self.kv.insert(slot, token);
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

    fn deliver(&mut self, which: usize) {
        if self.open.is_empty() {
            return;
        }
        let id = *self.open.keys().nth(which % self.open.len()).unwrap();
        let (_, result) = self.open.remove(&id).unwrap();
        let emissions = self.scheduler.complete(result.clone(), self.now);
        self.delivered.push(result);
        self.hear(emissions);
    }

    fn deliver_again(&mut self, which: usize) {
        if !self.delivered.is_empty() {
            let result = self.delivered[which % self.delivered.len()].clone();
            assert_eq!(self.scheduler.complete(result, self.now), []);
        }
    }

    fn hear(&mut self, emissions: Vec<Emission>) {
        for Emission { sequence, event } in emissions {
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
                }
                EmissionEvent::Failed(_) => client.end = Some(End::Failed),
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

    fn cancel(&mut self, which: usize) {
        let live: Vec<_> =
            self.clients.iter().filter(|(_, c)| c.end.is_none()).map(|(&id, _)| id).collect();
        if let Some(&id) = live.get(which % live.len().max(1)) {
            match which % 2 {
                0 => self.scheduler.cancel(id),
                _ => assert!(self.scheduler.finish(id, self.now).is_some()),
            }
            assert_eq!(self.scheduler.finish(id, self.now), None, "it is gone");
            self.clients.get_mut(&id).unwrap().end = Some(End::Cancelled);
        }
    }

    fn new_epoch(&mut self, keep: bool, stages: u32) {
        self.epoch += 1;
        // What is still open is fenced: its results come late and count for nothing.
        self.delivered.extend(std::mem::take(&mut self.open).into_values().map(|(_, r)| r));
        self.kv.clear();
        let first_draws = stages.is_multiple_of(2);
        self.shape = PipelineShape { epoch: Epoch(self.epoch), stages, first_draws, ..self.shape };
        let running = match keep {
            true => Running::Keep,
            false => Running::Fail("a stage died".to_owned()),
        };
        let before = self.scheduler.stats();
        let emissions = self.scheduler.set_pipeline(self.shape, running, self.now);
        assert_eq!(emissions.len() as u32, if keep { 0 } else { before.running });
        let after = self.scheduler.stats();
        assert_eq!((after.kv_blocks_used, after.running, after.steps_in_flight), (0, 0, 0));
        self.hear(emissions);
    }

    fn check(&self) {
        let stats = self.scheduler.stats();
        assert!(stats.running <= LIMITS.running_requests);
        assert_eq!(stats.steps_in_flight as usize, self.open.len());
        let live = self.clients.values().filter(|c| c.end.is_none()).count();
        assert_eq!((stats.running + stats.waiting) as usize, live);
        let ended = stats.finished + stats.failed + stats.cancelled;
        assert_eq!(ended as usize + live, self.clients.len());
    }

    /// No more comes from outside: everything must end.
    fn settle(&mut self, mut order: usize) {
        for _ in 0..20_000 {
            self.send_all();
            if self.open.is_empty() {
                break;
            }
            self.deliver(order);
            order = order.wrapping_mul(31).wrapping_add(7);
        }
        self.check();
        for (id, client) in &self.clients {
            assert!(client.end.is_some(), "sequence {id} never ended: {client:?}");
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0));
        assert!(self.scheduler.is_idle());
    }
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Box<Request>),
    Send,
    Deliver(usize),
    DeliverAgain(usize),
    Cancel(usize),
    NewEpoch { keep: bool, stages: u32 },
}

fn arb_request() -> impl Strategy<Value = Request> {
    let shape = (1usize..90, 0u32..40, 0u32..6, 0usize..5, any::<(bool, bool, bool)>());
    (shape, 0u32..4, any::<u32>()).prop_map(|(shape, penalties, seed)| {
        let (prompt, max_tokens, min_tokens, forced, (score_prompt, stops, batch)) = shape;
        let seed = u64::from(seed);
        let token = |i: usize| ((seed + i as u64 * i as u64 * 7) % VOCAB) as u32;
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
            class: if batch { Class::Batch } else { Class::Interactive },
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
        1 => (any::<bool>(), 1u32..5).prop_map(|(keep, stages)| Op::NewEpoch { keep, stages }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_answer_is_that_of_a_solo_run(
        stages in 1u32..6, kv_blocks in 4u32..30, order: usize,
        first_draws: bool, step_ns in 0u64..100_000_000, row_ns in 0u64..20_000_000,
        ops in proptest::collection::vec(arb_op(), 1..120),
    ) {
        let line = Line { step_ns, row_ns };
        let cost = StepCost { decode: line, prompt: line };
        let mut world = World::new(stages, kv_blocks, first_draws && stages > 1, cost);
        for op in ops {
            world.now = world.now + Duration::from_millis(3);
            match op {
                Op::Submit(request) => world.submit(*request),
                Op::Send => world.send_all(),
                Op::Deliver(which) => world.deliver(which),
                Op::DeliverAgain(which) => world.deliver_again(which),
                Op::Cancel(which) => world.cancel(which),
                Op::NewEpoch { keep, stages } => world.new_epoch(keep, stages),
            }
            world.check();
        }
        world.settle(order);
    }
}
