//! `tercet bench limits`.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use kernels::Backend;
use serde::Serialize;

use crate::Failure;
use crate::bench::limits::{Measured, measure_all};
use crate::bench::machine::Machine;
use crate::commands::{backend, threads};
use crate::progress::Progress;

/// Measures what the machine can do: memory read in order, and multiply-adds with one operand from
/// the first-level cache.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench limits
  tercet bench limits --threads 1,2,4 --json")]
pub(crate) struct LimitsCommand {
    /// Numbers of threads [default: one, and every core]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = threads)]
    threads: Vec<usize>,
    /// Kernels whose multiply-adds are measured [default: the fastest]
    #[arg(long, value_name = "ISA", value_parser = backend)]
    isa: Option<Backend>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    version: &'static str,
    machine: Machine,
    isa: &'static str,
    limits: Vec<Measured>,
}

/// Runs the command.
pub(crate) fn run(command: &LimitsCommand) -> Result<(), Failure> {
    let machine = Machine::this();
    let backend = command.isa.unwrap_or_else(Backend::detect);
    let mut threads = command.threads.clone();
    if threads.is_empty() {
        threads = vec![1, machine.cpus];
        threads.dedup();
    }
    let mut progress = Progress::new("measuring", command.json);
    let limits = measure_all(backend, &threads, &mut |what, done, total| {
        progress.show(what, done, total);
    });
    progress.finish();
    let version = env!("CARGO_PKG_VERSION");
    let output = Output { version, machine, isa: backend.name(), limits };
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&output)?;
    } else {
        writer.text(&table(&output))?;
    }
    Ok(())
}

/// For people.
fn table(output: &Output) -> String {
    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ = writeln!(text, "{}, {}; medians (least, most)", output.machine.cpu, output.isa);
    let _ = writeln!(
        text,
        "{:>7}  {:<24}  {:<28}  {:<28}",
        "THREADS", "READ GB/s", "INT8 10^9 MULTIPLY-ADDS/s", "F32 10^9 MULTIPLY-ADDS/s"
    );
    for measured in &output.limits {
        let show = |spread: crate::bench::Spread| {
            format!("{:.1} ({:.1}, {:.1})", spread.median, spread.min, spread.max)
        };
        let (read, mac, fma) = (show(measured.read), show(measured.mac), show(measured.fma));
        let line = format!("{:>7}  {read:<24}  {mac:<28}  {fma}", measured.limits.threads);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
