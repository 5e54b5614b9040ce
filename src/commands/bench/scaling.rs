//! `tercet bench scaling`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use client::command::TextWriter;
use node::signals::Signals;
use tokio::task::JoinSet;

use crate::Failure;
use crate::bench::scaling::{Arrangement, Figures, Form, Measured, Options, Quota, measure};
use crate::commands::{ModelArgs, threads};
use crate::local::threads_each;
use crate::progress::Progress;

/// Most workers that make sense on one machine.
const WORKERS_MAX: i64 = 64;

/// Requests at once, for each worker: a coordinator runs no more on a pipeline.
const REQUESTS_MAX: i64 = 256;

/// Rounds: more take days.
const ROUNDS_MAX: i64 = 1000;

/// Measures how near several workers come to the sum of what each gives alone.
///
/// Starts etcd, a coordinator and workers as processes of this machine, in one arrangement after the
/// other: each kind of worker alone, then several as replicas and as stages of one pipeline. Processes
/// and control groups are removed at the end, whatever ends it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench scaling --model synth:2b4t --quota 0.5,0.5,0.5
  tercet bench scaling --model synth:2b4t --quota 0.2,0.4,0.8 --workers 3 --json
  tercet bench scaling --workers 1,2 --form replicas --window 5s")]
pub(crate) struct ScalingCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// How many workers work together, as 1,2,3 [default: 2 and so on up to the number of quotas;
    /// without quotas 1,2,3]
    #[arg(long, value_name = "N,…", value_delimiter = ',',
          value_parser = clap::value_parser!(u32).range(1..=WORKERS_MAX))]
    workers: Vec<u32>,
    /// CPUs of each worker, as 0.2,0.4,0.8, kept by control groups with a period of 10 ms; needs root
    #[arg(long, value_name = "CPUS,…", value_delimiter = ',', value_parser = Quota::parse)]
    quota: Vec<Quota>,
    /// How they work together: replicas, pipeline [default: both]
    #[arg(long, value_name = "FORM,…", value_delimiter = ',', value_parser = form)]
    form: Vec<Form>,
    /// Sequences that decode at once, for each worker
    #[arg(long, value_name = "N", default_value = "32",
          value_parser = clap::value_parser!(u32).range(1..=REQUESTS_MAX))]
    sequences: u32,
    /// Tokens of each of their answers; when one ends, another begins
    #[arg(long, value_name = "G", default_value = "256",
          value_parser = clap::value_parser!(u32).range(2..))]
    generate: u32,
    /// Prompts that are read at once, for each worker
    #[arg(long, value_name = "N", default_value = "4",
          value_parser = clap::value_parser!(u32).range(1..=REQUESTS_MAX))]
    prompts: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "P", default_value = "256",
          value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Times every arrangement is measured, in turn; the middle counts
    #[arg(long, value_name = "N", default_value = "3",
          value_parser = clap::value_parser!(u32).range(1..=ROUNDS_MAX))]
    rounds: u32,
    /// How long each is warmed up before it is measured
    #[arg(long, value_name = "TIME", default_value = "5s")]
    warm_up: node::config::Duration,
    /// How long each is measured
    #[arg(long, value_name = "TIME", default_value = "20s")]
    window: node::config::Duration,
    /// Compute threads of each worker, at most [default: with quotas as many as they allow, else the
    /// cores, shared by the workers]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Kernels to compute with [default: auto, the fastest for each operation]
    #[arg(long, value_name = "ISA")]
    isa: Option<String>,
    /// etcd's endpoints, separated by commas [default: one is started]
    #[arg(long, value_name = "URL")]
    etcd: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn form(text: &str) -> Result<Form, String> {
    match text {
        "replicas" => Ok(Form::Replicas),
        "pipeline" => Ok(Form::Pipeline),
        _ => Err("expected replicas or pipeline".to_owned()),
    }
}

impl ScalingCommand {
    fn options(&self, store: &model::Store) -> Options {
        let workers = match (&self.workers[..], self.quota.len() as u32) {
            ([], 0) => vec![1, 2, 3],
            ([], 1) => vec![1],
            ([], quotas) => (2..=quotas).collect(),
            (asked, _) => asked.to_vec(),
        };
        let most = workers.iter().copied().max().unwrap_or(1);
        let forms = match self.form.is_empty() {
            true => vec![Form::Replicas, Form::Pipeline],
            false => self.form.clone(),
        };
        let shared = match self.quota.is_empty() {
            true => threads_each(most),
            // A worker takes as many as its quota allows.
            false => threads_each(1),
        };
        let config = store.config();
        Options {
            store: store.dir().to_owned(),
            model: config.name.clone(),
            layers: config.layers,
            context: config.context,
            quotas: self.quota.clone(),
            workers,
            forms,
            sequences: self.sequences,
            generate: self.generate,
            prompts: self.prompts,
            prompt: self.prompt,
            rounds: self.rounds,
            warm_up: Duration::from(self.warm_up),
            window: Duration::from(self.window),
            threads: self.threads.unwrap_or(shared),
            // They share the machine, and one alone has no more than in company.
            memory_bytes: worker::Config::default().memory_bytes / u64::from(most),
            isa: self.isa.clone(),
            etcd: self.etcd.clone(),
        }
    }
}

/// Runs the command.
pub(crate) async fn run(command: ScalingCommand) -> Result<(), Failure> {
    let signals = Signals::listen()?;
    let stop = signals.stop();
    // A store that is being made on the way disappears then.
    let mut told = JoinSet::new();
    let until = stop.clone();
    told.spawn(async move {
        until.cancelled().await;
        ::model::stop_writing();
    });
    let store = command.model.open(command.json)?;
    let options = command.options(&store);
    options.check().map_err(Failure::usage)?;
    let mut progress = Progress::new("measuring", command.json);
    let measured = measure(&options, &stop, &mut |what, done, total| {
        progress.show(what, done, total);
    })
    .await;
    progress.finish();
    let measured = measured?;
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&measured)?;
    } else {
        writer.text(&table(&measured))?;
    }
    Ok(())
}

/// For people.
fn table(measured: &Measured) -> String {
    let Measured { model, machine, sequences, prompts, prompt, rounds, window_s, .. } = measured;
    let quotas: Vec<_> = measured.quotas.iter().map(ToString::to_string).collect();
    let held = match quotas.is_empty() {
        true => String::new(),
        false => format!("; workers held to {} CPUs", quotas.join(", ")),
    };
    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ = writeln!(text, "{model} on {}, {} CPUs{held}", machine.cpu, machine.cpus);
    let _ = writeln!(
        text,
        "for each worker {sequences} sequences that decode, {prompts} prompts of {prompt} tokens; \
         medians of {rounds} rounds of {window_s} s"
    );
    let _ = writeln!(
        text,
        "{:<18} {:<8} {:>9} {:>18} {:>9} {:>6} {:>7} {:>8} {:>12}  LAYERS",
        "", "", "TOKENS/s", "(LEAST, MOST)", "SUM", "SHARE", "BUBBLE", "NETWORK", "COORDINATOR"
    );
    for arrangement in measured.alone.iter().chain(&measured.together) {
        let Arrangement { workers, layers, decode, prefill, .. } = arrangement;
        let what = match (&workers[..], arrangement.form) {
            ([one], _) => format!("worker {one} alone"),
            (all, Form::Replicas) => format!("{} replicas", all.len()),
            (all, Form::Pipeline) => format!("pipeline of {}", all.len()),
        };
        let cuts: Vec<_> = layers
            .iter()
            .map(|stages| stages.iter().map(u32::to_string).collect::<Vec<_>>().join("+"))
            .collect();
        for (kind, figures, what) in [("decode", decode, what.as_str()), ("prefill", prefill, "")] {
            let Figures { tokens_per_s, spread, sum_tokens_per_s, share, bubble, network, .. } =
                figures;
            let range = format!("({:.1}, {:.1})", spread.min, spread.max);
            let _ = write!(
                text,
                "{what:<18} {kind:<8} {tokens_per_s:>9.1} {range:>18} {sum_tokens_per_s:>9.1} \
                 {share:>6.2} {:>6.1}% {:>7.1}% {:>7.2} CPUs",
                bubble * 100.0,
                network * 100.0,
                figures.coordinator_cpus,
            );
            let _ = match what.is_empty() {
                true => writeln!(text),
                false => writeln!(text, "  {}", cuts.join(", ")),
            };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Harness {
        #[command(flatten)]
        command: ScalingCommand,
    }

    fn parse(flags: &str) -> Result<ScalingCommand, clap::Error> {
        let words = std::iter::once("scaling").chain(flags.split_whitespace());
        Ok(Harness::try_parse_from(words)?.command)
    }

    #[test]
    fn arrangements_follow_from_the_quotas() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let shape = "6x64x128x2x1x96".parse().unwrap();
        ::model::synth(&shape, 0, &path, &mut |_| {}).unwrap();
        let store = ::model::Store::open(&path).unwrap();
        let options = |flags: &str| parse(flags).unwrap().options(&store);
        assert_eq!(options("").workers, [1, 2, 3]);
        assert_eq!(options("--quota 0.5,0.5,0.5").workers, [2, 3]);
        assert_eq!(options("--quota 0.5").workers, [1]);
        let three = options("--quota 0.2,0.4,0.8 --workers 3 --form pipeline --window 500ms");
        assert_eq!((three.workers, three.forms), (vec![3], vec![Form::Pipeline]));
        assert_eq!((three.window, three.quotas[2].cpus()), (Duration::from_millis(500), 0.8));
        for flags in ["--quota 0.01", "--workers 0", "--form ring", "--window 3", "--rounds 0"] {
            assert!(parse(flags).is_err(), "{flags}");
        }
    }

    #[test]
    fn people_see_a_table() {
        let figures =
            Figures { tokens_per_s: 95.0, share: 0.95, bubble: 0.041, ..Figures::default() };
        let arrangement = |form, workers| Arrangement {
            form,
            workers,
            layers: vec![vec![10, 10, 10]],
            decode: figures.clone(),
            prefill: figures.clone(),
        };
        let measured = Measured {
            version: "1",
            machine: crate::bench::machine::Machine::this(),
            model: "m".into(),
            quotas: vec![0.5, 0.5, 0.5],
            sequences: 32,
            generate: 256,
            prompts: 4,
            prompt: 512,
            rounds: 3,
            window_s: 20.0,
            alone: vec![arrangement(Form::Replicas, vec![1])],
            together: vec![arrangement(Form::Pipeline, vec![1, 2, 3])],
        };
        let text = table(&measured);
        assert!(text.contains("workers held to 0.5, 0.5, 0.5 CPUs"), "{text}");
        assert!(text.contains("worker 1 alone     decode"), "{text}");
        assert!(text.contains("pipeline of 3      decode        95.0"), "{text}");
        assert!(text.contains("  0.95    4.1%") && text.contains("  10+10+10\n"), "{text}");
    }
}
