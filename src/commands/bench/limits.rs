//! `tercet bench limits`.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use kernels::Backend;
use serde::Serialize;

use crate::Failure;
use crate::bench::limits::{Measured, measure_all};
use crate::bench::machine::Machine;
use crate::bench::vector_backends;
use crate::commands::{backend, threads};
use crate::progress::Progress;

/// Measures what the machine can do: memory read in order, and multiply-adds with one operand from
/// the first-level cache.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench limits
  tercet bench limits --threads 1,2,4 --isa avx2,avx512 --json")]
pub(crate) struct LimitsCommand {
    /// Numbers of threads [default: one, and every core]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = threads)]
    threads: Vec<usize>,
    /// Kernels whose multiply-adds are measured [default: all that this CPU runs]
    #[arg(long, value_name = "ISA,…", value_delimiter = ',', value_parser = backend)]
    isa: Vec<Backend>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    version: &'static str,
    machine: Machine,
    limits: Vec<OfIsa>,
}

/// The limits of one instruction set.
#[derive(Serialize)]
struct OfIsa {
    isa: &'static str,
    #[serde(flatten)]
    measured: Measured,
}

/// Runs the command.
pub(crate) fn run(command: &LimitsCommand) -> Result<(), Failure> {
    let machine = Machine::this();
    let backends = match command.isa.is_empty() {
        true => vector_backends(),
        false => command.isa.clone(),
    };
    let mut threads = command.threads.clone();
    if threads.is_empty() {
        threads = vec![1, machine.cpus];
        threads.dedup();
    }
    let mut progress = Progress::new("measuring", command.json);
    let limits = measure_all(&backends, &threads, &mut |what, done, total| {
        progress.show(what, done, total);
    });
    progress.finish();
    let of_isa = |(backend, measured): (Backend, Measured)| OfIsa { isa: backend.name(), measured };
    let limits = limits.into_iter().map(of_isa).collect();
    let output = Output { version: env!("CARGO_PKG_VERSION"), machine, limits };
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
    let _ = writeln!(text, "{}; medians (least, most)", output.machine.cpu);
    let _ = writeln!(
        text,
        "{:<12}  {:>7}  {:<24}  {:<28}  {:<28}",
        "ISA", "THREADS", "READ GB/s", "INT8 10^9 MULTIPLY-ADDS/s", "F32 10^9 MULTIPLY-ADDS/s"
    );
    for OfIsa { isa, measured } in &output.limits {
        let show = |spread: crate::bench::Spread| {
            format!("{:.1} ({:.1}, {:.1})", spread.median, spread.min, spread.max)
        };
        let (read, mac, fma) = (show(measured.read), show(measured.mac), show(measured.fma));
        let line =
            format!("{isa:<12}  {:>7}  {read:<24}  {mac:<28}  {fma}", measured.limits.threads);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
