//! `tercet bench engine`.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use kernels::Backend;
use proto::plan::KvType;

use crate::Failure;
use crate::bench::Spread;
use crate::bench::engine::{BenchError, Measured, Options, Parts, measure};
use crate::commands::{ModelArgs, PlacementArgs, ShortcutArgs, at_least_one, backend, threads};
use crate::progress::Progress;

/// Most sequences that decode together: more is a slip of the finger.
const BATCH_MAX: usize = 1024;

/// Measures prefill, decode and batched decode of one engine, and what the machine would allow.
///
/// Prompts are random tokens; drawing is greedy if nothing else is asked for. A prompt is cut into chunks as a coordinator's
/// scheduler does that has nothing else to do.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench engine --model synth:2b4t --threads 2 --prompt 512 --generate 32 --batch 1,8,16
  tercet bench engine --model store/ --context 4000 --generate 16 --batch 1 --json")]
pub(crate) struct EngineCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Compute threads [default: every core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Tokens of the prompt whose prefill is measured [default: 512]
    #[arg(long, value_name = "P", value_parser = at_least_one)]
    prompt: Option<usize>,
    /// Tokens that every sequence generates [default: 32]
    #[arg(long, value_name = "G", value_parser = at_least_one)]
    generate: Option<usize>,
    /// Sequences that decode together [default: 1,2,4,8,16]
    #[arg(long, value_name = "B,…", value_delimiter = ',', value_parser = batch)]
    batch: Vec<usize>,
    /// Tokens that every decoding sequence has behind it [default: 16]
    #[arg(long, value_name = "C")]
    context: Option<usize>,
    /// Tokens of a prompt in one step [default: a coordinator's, 64]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    chunk: Option<usize>,
    /// Draw at this temperature [default: 0, greedy]
    #[arg(long, value_name = "T", value_parser = client::request::at_least_zero)]
    temperature: Option<f32>,
    /// Draw from the K most probable tokens only; 0 is off [default: 0]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Draw from the most probable tokens that together have this share [default: 1]
    #[arg(long, value_name = "P", value_parser = client::request::share_above_zero)]
    top_p: Option<f32>,
    /// Times everything is measured; the middle counts [default: 3]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    repeat: Option<usize>,
    /// Kernels to compute with, if this CPU runs them [default: auto, the fastest for each operation]
    #[arg(long, value_name = "ISA", value_parser = backend)]
    isa: Option<Backend>,
    /// How keys and values are stored: f16 or f32 [default: f16]
    #[arg(long, value_name = "TYPE")]
    kv_type: Option<KvType>,
    #[command(flatten)]
    shortcuts: ShortcutArgs,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn batch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(batch) if (1..=BATCH_MAX).contains(&batch) => Ok(batch),
        _ => Err(format!("must be a number from 1 to {BATCH_MAX}")),
    }
}

impl EngineCommand {
    fn options(&self) -> Options {
        let mut options = Options::default();
        options.backend = self.isa.unwrap_or(options.backend);
        options.threads = self.threads.unwrap_or(options.threads);
        options.kv_type = self.kv_type.unwrap_or(options.kv_type);
        options.shortcuts = self.shortcuts.shortcuts();
        options.placement = self.placement.placement();
        options.prompt = self.prompt.unwrap_or(options.prompt);
        options.chunk = self.chunk.unwrap_or(options.chunk);
        options.context = self.context.unwrap_or(options.context);
        options.generate = self.generate.unwrap_or(options.generate);
        options.repeats = self.repeat.unwrap_or(options.repeats);
        let sampling = &mut options.sampling;
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.top_p = self.top_p.unwrap_or(sampling.top_p);
        if !self.batch.is_empty() {
            options.batches.clone_from(&self.batch);
        }
        options
    }
}

/// Runs the command.
pub(crate) fn run(command: &EngineCommand) -> Result<(), Failure> {
    let store = command.model.open(command.json)?;
    let mut progress = Progress::new("measuring", command.json);
    let measured = measure(&store, &command.options(), &mut |what, done, total| {
        progress.show(what, done, total);
    });
    progress.finish();
    let measured = measured.map_err(|error| match error {
        // What was asked for makes no sense with this model.
        BenchError::Zero { .. } | BenchError::Context { .. } => Failure::usage(error),
        error => error.into(),
    })?;
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
    let Measured { machine, model, isa, threads, kv_type, limits, shares, work, .. } = measured;
    let best = limits.best;
    // Writing to a String cannot fail.
    let mut text = String::new();
    let cpu = &machine.cpu;
    let _ = writeln!(text, "{model} on {cpu}, {isa}, {threads} threads, KV in {kv_type}");
    let drawn = match measured.temperature {
        0.0 => "drawn greedily".to_owned(),
        temperature => {
            let Measured { top_k, top_p, .. } = measured;
            format!("drawn at temperature {temperature}, top-k {top_k}, top-p {top_p}")
        }
    };
    let _ = writeln!(text, "tokens {drawn}");
    let _ = writeln!(
        text,
        "limits: read {:.1} GB/s, int8 {:.0} and f32 {:.0} x 10^9 multiply-adds/s (before: {:.1}, \
         {:.0}, {:.0}; after: {:.1}, {:.0}, {:.0})",
        best.read_gb_per_s,
        best.mac_g_per_s,
        best.fma_g_per_s,
        limits.before.read_gb_per_s,
        limits.before.mac_g_per_s,
        limits.before.fma_g_per_s,
        limits.after.read_gb_per_s,
        limits.after.mac_g_per_s,
        limits.after.fma_g_per_s,
    );
    let _ = writeln!(
        text,
        "a token: {:.0} MB of dense weights, {:.0} + {:.0} x 10^6 multiply-adds",
        work.dense_bytes as f64 / 1e6,
        work.linear_macs as f64 / 1e6,
        work.head_macs as f64 / 1e6
    );
    let bytes = measured.bytes_per_token;
    let _ = writeln!(
        text,
        "one sequence: {:.0} MB of weights and {:.1} MB of keys and values a token, {:.0}% of the \
         bandwidth; zeros: gate {:.0}%, down {:.0}%; {:.0}% of the head's rows screened",
        bytes.weights / 1e6,
        bytes.kv / 1e6,
        shares.read * 100.0,
        measured.zeros.gate * 100.0,
        measured.zeros.down * 100.0,
        measured.screened * 100.0
    );
    let _ = writeln!(
        text,
        "peak memory {:.0} MB, {:.0} MB on huge pages; weights' files {:.0} MB, keys and values \
         {:.0} MB",
        measured.peak_rss_bytes as f64 / 1e6,
        measured.huge_page_bytes as f64 / 1e6,
        measured.weight_bytes as f64 / 1e6,
        measured.kv_bytes as f64 / 1e6
    );
    let _ = writeln!(
        text,
        "{:<28} {:>9} {:>18} {:>9} {:>6}   {:>5} {:>5} {:>5} {:>5} {:>5}",
        "", "TOKENS/s", "(LEAST, MOST)", "LIMIT", "SHARE", "PROJ", "ATTN", "HEAD", "NORMS", "WAIT"
    );
    let mut line = |what: String, spread: Spread, share: f64, parts: Parts| {
        let Spread { min, median, max } = spread;
        let range = format!("({min:.1}, {max:.1})");
        let limit = median / share;
        let _ = write!(
            text,
            "{what:<28} {median:>9.1} {range:>18} {limit:>9.1} {:>5.0}%  ",
            share * 100.0
        );
        let Parts { projections, attention, head, norms, waiting } = parts;
        for part in [projections, attention, head, norms, waiting] {
            let _ = write!(text, " {:>4.0}%", part * 100.0);
        }
        text.push('\n');
    };
    let Measured { prompt, context, chunk, spread, parts, .. } = measured;
    line(format!("prefill of {prompt}, by {chunk}"), spread.prefill, shares.prefill, parts.prefill);
    line(format!("decode after {context}"), spread.decode, shares.decode, parts.decode);
    for batched in &measured.batched {
        let what = format!("decode of {} sequences", batched.batch);
        line(what, batched.spread, batched.share_of_limit, batched.parts);
    }
    text
}
