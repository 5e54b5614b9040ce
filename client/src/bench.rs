//! `tercet bench pipeline`: how fast a running cluster reads prompts and generates, seen from
//! outside.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Instant, SystemTime};

use futures::StreamExt;
use futures::future::{try_join, try_join_all};
use proto::generate::{GenerateEvent, GenerateRequest, Prompt, Sampling};
use serde::Serialize;
use tokio::sync::Notify;

use crate::command::TextWriter;
use crate::{Client, ClientError, CommandError};

/// Tokens of the prompt of a request that generates: so few that reading them takes no time to
/// speak of.
const SHORT_PROMPT: u32 = 16;

/// Requests at once: more wait in any coordinator's queue.
const BATCH_MAX: i64 = 256;

/// Repeats: more take hours.
const REPEATS_MAX: i64 = 1000;

/// What `tercet bench pipeline` is told, beside whom to ask.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Tokens of the prompt whose reading is measured
    #[arg(long, value_name = "P", default_value = "512",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Tokens that every request generates
    #[arg(long, value_name = "G", default_value = "32",
          value_parser = clap::value_parser!(u32).range(2..))]
    pub generate: u32,
    /// Requests at once, as 1,8,16
    #[arg(long, value_name = "B,…", value_delimiter = ',', default_value = "1,8,16",
          value_parser = clap::value_parser!(u32).range(1..=BATCH_MAX))]
    pub batch: Vec<u32>,
    /// Times everything is measured; the middle counts
    #[arg(long, value_name = "N", default_value = "3",
          value_parser = clap::value_parser!(u32).range(1..=REPEATS_MAX))]
    pub repeat: u32,
    /// Prompts are random token ids below this; every model has 256
    #[arg(long, value_name = "N", default_value = "256",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub vocab: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was measured: what `--json` prints. Rates are medians.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Name of the model.
    pub model: String,
    /// Compute threads of each stage's worker, in the order of stages, of every pipeline.
    pub stage_threads: Vec<Vec<u32>>,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens that every request generated.
    pub generate: u32,
    /// Times everything was measured.
    pub repeats: u32,
    /// The prompt's tokens over the time to the first token of its answer.
    pub prefill_tokens_per_s: f64,
    /// Of one request.
    pub decode_tokens_per_s: f64,
    /// Of several requests, all of them together.
    pub batched: Vec<Batched>,
    /// How busy the stages were while one prompt was read, while one request generated.
    pub stages: Stages,
    /// What the repeats gave.
    pub spread: Spreads,
}

/// How busy the stages were in the parts of a measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stages {
    /// While prompts were read.
    pub prefill: Vec<StageShare>,
    /// While one request generated.
    pub decode: Vec<StageShare>,
}

/// One stage while something was measured: from the request to the first token, or while all
/// requests generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageShare {
    /// Steps that it computed.
    pub steps: u64,
    /// The part of the time that its engine computed; the rest it stood still.
    pub busy: f64,
    /// Its engine's time for one of them, in milliseconds.
    pub step_ms: f64,
}

/// Several requests at once.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Batched {
    /// How many.
    pub batch: u32,
    /// Of all of them together, while all of them generate.
    pub tokens_per_s: f64,
    /// How busy the stages were meanwhile.
    pub stages: Vec<StageShare>,
    /// What the repeats gave.
    pub spread: Spread,
}

/// What the repeats gave, in tokens per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spreads {
    /// Of prefill.
    pub prefill: Spread,
    /// Of one request.
    pub decode: Spread,
}

/// The least, the middle and the most of some repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The middle one; of an even number, the mean of the middle two.
    pub median: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
            return Self::default();
        };
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Self { min, median: (low + high) / 2.0, max }
    }
}

/// Measures the cluster behind `client`. `report` is told what is next, and how many of how many
/// parts are done.
///
/// # Errors
///
/// The first error of a request.
pub async fn measure(
    client: &Client,
    args: &BenchArgs,
    report: &mut (dyn FnMut(&str, u64, u64) + Send),
) -> Result<Measured, ClientError> {
    let status = client.status().await?;
    let threads = |id: &str| {
        status.workers.iter().find(|worker| worker.id == id).map_or(0, |worker| worker.threads)
    };
    let stage_threads = status.plan.pipelines.iter().map(|pipeline| {
        pipeline.stages.iter().map(|stage| threads(&stage.worker)).collect::<Vec<_>>()
    });
    let stage_threads = stage_threads.collect();

    let mut prompts = Prompts::new(0, args.vocab).of_this_run();
    let total = u64::from(args.repeat) * (2 + args.batch.len() as u64) + 1;
    let mut done = 0;
    let mut next = |what: &str| {
        report(what, done, total);
        done += 1;
    };
    next("first steps");
    requests(client, &mut prompts, 1, SHORT_PROMPT, 2).await?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let mut batched = vec![Vec::new(); args.batch.len()];
    let mut work = vec![Work::default(); 2 + args.batch.len()];
    for _ in 0..args.repeat {
        next("prefill");
        let meter = Meter::new(client).await?;
        let begin = Instant::now();
        let (answers, _) = requests(client, &mut prompts, 1, args.prompt, 1).await?;
        let first = answers.iter().flatten().next().copied().unwrap_or_else(Instant::now);
        let seconds = first.duration_since(begin).as_secs_f64();
        prefill.push(f64::from(args.prompt) / seconds.max(1e-9));
        work[0].add(&meter.read(client).await?);
        next("decode");
        let (answers, done) =
            requests(client, &mut prompts, 1, SHORT_PROMPT, args.generate).await?;
        decode.push(rate(&answers));
        work[1].add(&done);
        for ((&batch, rates), work) in args.batch.iter().zip(&mut batched).zip(&mut work[2..]) {
            next(&format!("batch of {batch}"));
            let (answers, done) =
                requests(client, &mut prompts, batch, SHORT_PROMPT, args.generate).await?;
            rates.push(rate(&answers));
            work.add(&done);
        }
    }
    let spread = Spreads { prefill: Spread::of(prefill), decode: Spread::of(decode) };
    let batched = args.batch.iter().zip(batched).zip(&work[2..]).map(|((&batch, rates), work)| {
        let spread = Spread::of(rates);
        Batched { batch, tokens_per_s: spread.median, stages: work.shares(), spread }
    });
    Ok(Measured {
        model: status.model.name,
        stage_threads,
        prompt: args.prompt,
        generate: args.generate,
        repeats: args.repeat,
        prefill_tokens_per_s: spread.prefill.median,
        decode_tokens_per_s: spread.decode.median,
        batched: batched.collect(),
        stages: Stages { prefill: work[0].shares(), decode: work[1].shares() },
        spread,
    })
}

/// What the stages had done when a part of a measurement began.
struct Meter {
    begin: Instant,
    counts: Vec<(u64, f64)>,
}

/// What the stages did in one part, all repeats together.
#[derive(Clone, Debug, Default)]
struct Work {
    seconds: f64,
    /// Of each stage: steps, and milliseconds that they took.
    stages: Vec<(u64, f64)>,
}

impl Meter {
    async fn new(client: &Client) -> Result<Self, ClientError> {
        Ok(Self { counts: Self::counts(client).await?, begin: Instant::now() })
    }

    async fn counts(client: &Client) -> Result<Vec<(u64, f64)>, ClientError> {
        let pipelines = client.status().await?.plan.pipelines;
        let stages = pipelines.iter().flat_map(|pipeline| &pipeline.stages);
        Ok(stages.map(|stage| (stage.steps, stage.busy_ms)).collect())
    }

    /// What they have done since.
    async fn read(&self, client: &Client) -> Result<Work, ClientError> {
        let seconds = self.begin.elapsed().as_secs_f64();
        let counts = Self::counts(client).await?;
        let pairs = counts.iter().zip(&self.counts);
        // A pipeline that was replaced meanwhile counts from its beginning.
        let stages = pairs.map(|(now, before)| match now.0.checked_sub(before.0) {
            Some(steps) => (steps, now.1 - before.1),
            None => *now,
        });
        Ok(Work { seconds, stages: stages.collect() })
    }
}

impl Work {
    fn add(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.stages.resize(self.stages.len().max(other.stages.len()), (0, 0.0));
        for (sum, stage) in self.stages.iter_mut().zip(&other.stages) {
            *sum = (sum.0 + stage.0, sum.1 + stage.1);
        }
    }

    fn shares(&self) -> Vec<StageShare> {
        let share = |&(steps, busy_ms): &(u64, f64)| StageShare {
            steps,
            busy: busy_ms / 1000.0 / self.seconds.max(1e-9),
            step_ms: busy_ms / (steps.max(1) as f64),
        };
        self.stages.iter().map(share).collect()
    }
}

/// Who of several requests has begun to generate, and who has ended.
struct Gate {
    to_begin: AtomicU32,
    all_begun: Notify,
    one_ended: Notify,
}

impl Gate {
    fn begin(&self) {
        if self.to_begin.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.all_begun.notify_one();
        }
    }

    /// What the stages do from when the last has begun until the first ends.
    async fn observe(&self, client: &Client) -> Result<Work, ClientError> {
        self.all_begun.notified().await;
        let meter = Meter::new(client).await?;
        self.one_ended.notified().await;
        meter.read(client).await
    }
}

/// Sends `count` requests at once: when each of their tokens came, and what the stages did while all
/// of them generated.
async fn requests(
    client: &Client,
    prompts: &mut Prompts,
    count: u32,
    prompt: u32,
    generate: u32,
) -> Result<(Vec<Vec<Instant>>, Work), ClientError> {
    let requests: Vec<_> = (0..count).map(|_| prompts.request(prompt, generate)).collect();
    let to_begin = AtomicU32::new(count);
    let gate = Gate { to_begin, all_begun: Notify::new(), one_ended: Notify::new() };
    let answers = try_join_all(requests.into_iter().map(|request| answer(client, request, &gate)));
    try_join(answers, gate.observe(client)).await
}

async fn answer(
    client: &Client,
    request: GenerateRequest,
    gate: &Gate,
) -> Result<Vec<Instant>, ClientError> {
    let mut events = client.generate(request).await?;
    let mut times = Vec::new();
    while let Some(event) = events.next().await {
        if let GenerateEvent::Delta(delta) = event? {
            if times.is_empty() && !delta.tokens.is_empty() {
                gate.begin();
            }
            times.extend(std::iter::repeat_n(Instant::now(), delta.tokens.len()));
        }
    }
    if times.is_empty() {
        gate.begin();
    }
    gate.one_ended.notify_one();
    Ok(times)
}

/// Tokens per second of all answers together, from the moment when the last of them has begun to
/// the moment when the first of them ends; if there is no such time, from the first token of all to
/// the last.
fn rate(answers: &[Vec<Instant>]) -> f64 {
    let firsts = || answers.iter().filter_map(|times| times.first().copied());
    let lasts = || answers.iter().filter_map(|times| times.last().copied());
    let between = |begin: Option<Instant>, end: Option<Instant>| {
        let (begin, end) = (begin?, end?);
        let seconds = end.checked_duration_since(begin)?.as_secs_f64();
        let tokens = answers.iter().flatten().filter(|time| begin < **time && **time <= end);
        let tokens = tokens.count();
        (seconds > 0.0 && tokens > 0).then(|| tokens as f64 / seconds)
    };
    let together = between(firsts().max(), lasts().min());
    together.or_else(|| between(firsts().min(), lasts().max())).unwrap_or(0.0)
}

/// Prompts of random token ids, every one different.
#[derive(Clone, Debug)]
pub struct Prompts {
    state: u64,
    vocab: u32,
    cache_salt: String,
}

impl Prompts {
    /// Token ids below `vocab`; each seed gives prompts of its own.
    pub fn new(seed: u64, vocab: u32) -> Self {
        Self { state: seed, vocab, cache_salt: String::new() }
    }

    /// Nothing of these prompts is known to the cluster from an earlier run.
    #[must_use]
    pub fn of_this_run(self) -> Self {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let cache_salt = format!("bench {} {}", std::process::id(), since.as_nanos());
        Self { cache_salt, ..self }
    }

    /// A greedy request that ends after exactly `generate` tokens.
    pub fn request(&mut self, tokens: u32, generate: u32) -> GenerateRequest {
        GenerateRequest {
            prompt: Prompt::Tokens((0..tokens).map(|_| self.token()).collect()),
            max_tokens: generate,
            sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
            ignore_eos: true,
            cache_salt: self.cache_salt.clone(),
            ..GenerateRequest::default()
        }
    }

    /// The upper half of a linear congruential generator (Knuth's MMIX): even enough for a prompt.
    fn token(&mut self) -> u32 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (((self.state >> 32) * u64::from(self.vocab)) >> 32) as u32
    }
}

/// Writes what was measured, for people or as JSON.
///
/// # Errors
///
/// [`CommandError::Output`].
pub fn write(measured: &Measured, json: bool) -> Result<(), CommandError> {
    let mut writer = TextWriter::stdout();
    if json { writer.json(measured) } else { writer.text(&table(measured)) }
}

/// For people.
fn table(measured: &Measured) -> String {
    let Measured { model, stage_threads, prompt, generate, repeats, .. } = measured;
    let pipelines: Vec<String> = stage_threads
        .iter()
        .map(|stages| {
            let stages: Vec<_> = stages.iter().map(|threads| format!("{threads}")).collect();
            format!("threads of its stages: {}", stages.join(", "))
        })
        .collect();
    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ = writeln!(text, "{model}; {}", pipelines.join("; "));
    let _ = writeln!(
        text,
        "medians of {repeats}, tokens/s (least, most); how busy each stage was, with steps of so long"
    );
    let mut line = |what: String, spread: Spread, stages: &[StageShare]| {
        let Spread { min, median, max } = spread;
        let range = format!("({min:.1}, {max:.1})");
        let _ = write!(text, "{what:<24} {median:>8.1} {range:>16}");
        for StageShare { busy, step_ms, .. } in stages {
            let _ = write!(text, "  {:>3.0}% of {step_ms:.1} ms", busy * 100.0);
        }
        text.push('\n');
    };
    line(format!("prefill of {prompt}"), measured.spread.prefill, &measured.stages.prefill);
    line(format!("decode of {generate}"), measured.spread.decode, &measured.stages.decode);
    for batched in &measured.batched {
        line(format!("{} requests at once", batched.batch), batched.spread, &batched.stages);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rate_is_that_of_the_time_when_all_generate() {
        let start = Instant::now();
        let at = |ms: &[u64]| ms.iter().map(|ms| start + Duration::from_millis(*ms)).collect();
        let one: Vec<Vec<Instant>> = vec![at(&[0, 100, 200])];
        assert_eq!(rate(&one).round(), 10.0);
        // Both generate from 100 to 300 ms: two tokens of each.
        let two = vec![at(&[0, 100, 200, 300]), at(&[100, 200, 300, 400])];
        assert_eq!(rate(&two).round(), 20.0);
        // One after the other: four tokens after the first, in 300 ms.
        let turns = vec![at(&[0, 100]), at(&[200, 250, 300])];
        assert_eq!(rate(&turns).round(), 13.0);
        assert_eq!(rate(&[]), 0.0);
        assert_eq!(rate(&[at(&[5])]), 0.0);
    }

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let mut prompts = Prompts::new(0, 256);
        let mut tokens = || match prompts.request(100, 3).prompt {
            Prompt::Tokens(tokens) => tokens,
            other => panic!("{other:?}"),
        };
        let (first, second) = (tokens(), tokens());
        assert_ne!(first, second);
        assert!(first.iter().chain(&second).all(|token| *token < 256));
        assert!(first.iter().any(|token| *token > 128) && first.iter().any(|token| *token < 128));
        let [one, other] = [(); 2].map(|()| Prompts::new(0, 256).of_this_run().request(100, 3));
        assert_eq!(one.prompt, other.prompt);
        assert_ne!(one.cache_salt, other.cache_salt, "each run reads its prompts itself");
    }

    #[test]
    fn people_see_a_table() {
        let spread = Spread::of(vec![2.0, 1.0, 4.0, 3.0]);
        assert_eq!(spread, Spread { min: 1.0, median: 2.5, max: 4.0 });
        let mut work = Work { seconds: 1.5, stages: vec![(60, 1200.0)] };
        work.add(&Work { seconds: 0.5, stages: vec![(40, 300.0), (50, 1000.0)] });
        let stages = work.shares();
        let measured = Measured {
            model: "m".into(),
            stage_threads: vec![vec![1, 1]],
            prompt: 512,
            generate: 32,
            repeats: 4,
            batched: vec![Batched { batch: 8, tokens_per_s: 2.5, stages, spread }],
            spread: Spreads { prefill: spread, decode: spread },
            ..Measured::default()
        };
        let text = table(&measured);
        assert!(text.starts_with("m; threads of its stages: 1, 1\n"), "{text}");
        assert!(text.contains("8 requests at once            2.5       (1.0, 4.0)   75% of 15.0 ms   50% of 20.0 ms\n"), "{text}");
    }
}
