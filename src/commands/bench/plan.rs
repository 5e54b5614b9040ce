//! `tercet bench plan`.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use serde::Serialize;

use crate::Failure;
use crate::bench::machine::Machine;
use crate::bench::planning::{Planned, measure_all};
use crate::progress::Progress;

/// Measures how long the planner takes for random fleets of unequal workers, and what its plans give.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench plan
  tercet bench plan --workers 8 --fleets 100 --json")]
pub(crate) struct PlanBenchCommand {
    /// Workers in every fleet
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Fleets of each kind
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    fleets: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    version: &'static str,
    machine: Machine,
    workers: u32,
    planned: Vec<Planned>,
}

/// Runs the command.
pub(crate) fn run(command: &PlanBenchCommand) -> Result<(), Failure> {
    let mut progress = Progress::new("planning", command.json);
    let planned =
        measure_all(command.workers as usize, command.fleets as usize, &mut |what, done, total| {
            progress.show(what, done, total);
        });
    progress.finish();
    let output = Output {
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::this(),
        workers: command.workers,
        planned,
    };
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
    let _ = writeln!(
        text,
        "{}; fleets of {} unequal workers; medians (least, most)",
        output.machine.cpu, output.workers
    );
    let _ = writeln!(
        text,
        "{:<16}  {:<14}  {:>7}  {:<22}  SHARE OF ALL WORKERS' RATES",
        "MEMORY", "OBJECTIVE", "PLANS", "MS"
    );
    for planned in &output.planned {
        let ms = planned.ms;
        let ms = format!("{:.1} ({:.1}, {:.1})", ms.median, ms.min, ms.max);
        let share = planned.share.map_or_else(
            || "-".to_owned(),
            |share| format!("{:.3} ({:.3}, {:.3})", share.median, share.min, share.max),
        );
        let plans = format!("{}/{}", planned.plans, planned.fleets);
        let _ = writeln!(
            text,
            "{:<16}  {:<14}  {plans:>7}  {ms:<22}  {share}",
            planned.memory, planned.objective
        );
    }
    text
}
