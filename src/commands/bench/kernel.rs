//! `tercet bench kernel`.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use kernels::Backend;
use serde::Serialize;

use crate::Failure;
use crate::bench::kernel::{Options, ROWS_MAX, Shape, Timing, Timings, measure};
use crate::bench::machine::Machine;
use crate::commands::{backend, threads};
use crate::progress::Progress;

/// Measures each product on the shapes of BitNet b1.58 2B4T, with weights that no cache holds.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench kernel --rows 1 --threads 1,2
  tercet bench kernel --shape gate,down --rows 1,2,4,8,16,32 --isa avx2 --json")]
pub(crate) struct KernelCommand {
    /// Rows of activations
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,2,4,8,16,32",
          value_parser = rows)]
    rows: Vec<usize>,
    /// Products: q, kv, o, gate (and up), down, head [default: all]
    #[arg(long, value_name = "SHAPE,…", value_delimiter = ',')]
    shape: Vec<Shape>,
    /// Kernels [default: all that this CPU runs; those marked * are chosen]
    #[arg(long, value_name = "ISA,…", value_delimiter = ',', value_parser = backend)]
    isa: Vec<Backend>,
    /// Numbers of threads, which share the rows of the weights [default: every core]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = threads)]
    threads: Vec<usize>,
    /// Fail if the chosen kernels are more than a tenth slower than others
    #[arg(long)]
    check: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn rows(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rows) if (1..=ROWS_MAX).contains(&rows) => Ok(rows),
        _ => Err(format!("must be a number from 1 to {ROWS_MAX}")),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    version: &'static str,
    machine: Machine,
    #[serde(flatten)]
    timings: Timings,
}

/// Other kernels were faster by more than a tenth.
#[derive(Debug, thiserror::Error)]
#[error("badly chosen kernels: {0}")]
struct BadlyChosen(String);

/// Runs the command.
pub(crate) fn run(command: &KernelCommand) -> Result<(), Failure> {
    let mut options = Options { rows: command.rows.clone(), ..Options::default() };
    if !command.shape.is_empty() {
        options.shapes.clone_from(&command.shape);
    }
    if !command.isa.is_empty() {
        options.backends.clone_from(&command.isa);
    }
    if !command.threads.is_empty() {
        options.threads.clone_from(&command.threads);
    }
    let mut progress = Progress::new("measuring", command.json);
    let timings = measure(&options, &mut |what, done, total| progress.show(what, done, total));
    progress.finish();
    let output = Output { version: env!("CARGO_PKG_VERSION"), machine: Machine::this(), timings };
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&output)?;
    } else {
        writer.text(&table(&output))?;
    }
    let bad = output.timings.badly_chosen();
    if command.check && !bad.is_empty() {
        let say = |(chosen, fastest): (&Timing, &Timing)| {
            let (shape, rows, threads) = (chosen.shape.name(), chosen.rows, chosen.threads);
            let times = fastest.mac_g_per_s / chosen.mac_g_per_s;
            format!(
                "{shape} of {rows} rows, {threads} threads: {} is {times:.2} times as fast as {}",
                fastest.isa, chosen.isa
            )
        };
        let bad: Vec<_> = bad.into_iter().map(say).collect();
        return Err(BadlyChosen(bad.join("; ")).into());
    }
    Ok(())
}

/// For people.
fn table(output: &Output) -> String {
    // Writing to a String cannot fail.
    let mut text = format!("{}; medians\n", output.machine.cpu);
    for limits in &output.timings.limits {
        let isa = limits.isa;
        let limits = limits.limits;
        let _ = writeln!(
            text,
            "limits of {} threads, {isa}: read {:.1} GB/s, int8 {:.1}, f32 {:.1} x 10^9 \
             multiply-adds/s",
            limits.threads, limits.read_gb_per_s, limits.mac_g_per_s, limits.fma_g_per_s
        );
    }
    let _ = writeln!(
        text,
        "{:<5} {:>6} x {:<5} {:>4} {:<12} {:>7} {:>10} {:>8} {:>6} {:>8} {:>6}",
        "SHAPE", "M", "K", "ROWS", "ISA", "THREADS", "us", "GMAC/s", "OF MAX", "GB/s", "OF MAX"
    );
    for timing in &output.timings.kernels {
        let _ = writeln!(
            text,
            "{:<5} {:>6} x {:<5} {:>4} {:<12} {:>7} {:>10.1} {:>8.1} {:>5.0}% {:>8.1} {:>5.0}%",
            timing.shape.name(),
            timing.m,
            timing.k,
            timing.rows,
            format!("{}{}", timing.isa, if timing.chosen { "*" } else { "" }),
            timing.threads,
            timing.us.median,
            timing.mac_g_per_s,
            timing.share_of_mac * 100.0,
            timing.gb_per_s,
            timing.share_of_read * 100.0,
        );
    }
    text
}
