//! `tercet status`: the cluster as the coordinator sees it, as a table or as JSON.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use node::Chain;
use node::config::printable;
use proto::status::{
    ClusterStatus, PipelineStatus, PlanStatus, QueueStatus, SamplingStatus, StageStatus,
    StepBudget, WorkerStatus,
};

use crate::command::TextWriter;
use crate::{Client, ClientError, CommandError};

/// Clears a terminal and goes to its top left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Hexadecimal digits shown of an id: enough to tell ids apart by eye.
const SHORT_ID_DIGITS: usize = 12;

/// What `tercet status` is told, beside whom to ask.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct StatusArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Ask again every SECONDS, until stopped
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub watch: Option<u32>,
}

/// Runs the command.
///
/// # Errors
///
/// If the coordinator does not say (who watches goes on once it has), or the answer cannot be written.
pub async fn run(client: &Client, args: &StatusArgs) -> Result<(), CommandError> {
    let say = |reason: &str| writeln!(std::io::stderr(), "{reason}");
    show(async || client.status().await, args, &mut TextWriter::stdout(), say).await
}

/// Asks and shows, once or again and again. What keeps a coordinator from answering is told to `say`
/// while somebody watches: that is when it is looked at.
async fn show(
    mut ask: impl AsyncFnMut() -> Result<ClusterStatus, ClientError>,
    args: &StatusArgs,
    writer: &mut TextWriter<impl Write>,
    mut say: impl FnMut(&str) -> io::Result<()>,
) -> Result<(), CommandError> {
    let mut has_answered = false;
    loop {
        match ask().await {
            Ok(status) if args.json => writer.json(&status)?,
            Ok(status) => {
                if args.watch.is_some() && writer.is_terminal() {
                    writer.control(CLEAR)?;
                }
                writer.text(&table(&status))?;
            }
            // One that never answered is likely not where it was looked for.
            Err(error) if args.watch.is_none() || !has_answered => return Err(error.into()),
            Err(error) => {
                let reason =
                    format!("no status, asking again: {}", printable(&Chain(&error).to_string()));
                say(&reason).map_err(CommandError::Output)?;
            }
        }
        has_answered = true;
        let Some(seconds) = args.watch else { return Ok(()) };
        tokio::time::sleep(Duration::from_secs(seconds.into())).await;
    }
}

/// Prints the plan in force: what `tercet plan` shows of a running cluster.
///
/// # Errors
///
/// If it cannot be written.
pub fn show_plan(plan: &PlanStatus, json: bool) -> Result<(), CommandError> {
    let mut writer = TextWriter::stdout();
    if json {
        return writer.json(plan);
    }
    writer.text(&plan_table(plan))
}

/// The plan in force for people: its pipelines and its reason.
pub fn plan_table(plan: &PlanStatus) -> String {
    let mut text: String =
        plan.pipelines.iter().map(|pipeline| pipeline_table(pipeline) + "\n").collect();
    if plan.pipelines.is_empty() {
        text.push_str("no pipelines\n\n");
    }
    let sum: f64 = plan.pipelines.iter().map(|pipeline| pipeline.predicted_tokens_per_s).sum();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "predicted {sum:.1} tokens/s in all");
    if !plan.reason.is_empty() {
        let _ = writeln!(text, "plan: {}", plan.reason);
    }
    text
}

/// The cluster for people.
pub fn table(status: &ClusterStatus) -> String {
    let mut text = String::new();
    let ready = if status.ready { "ready" } else { "not ready" };
    let model = &status.model;
    let tokenizer = if model.has_tokenizer { "" } else { ", no tokenizer" };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "cluster  {} ({ready}), term {}", status.cluster, status.term);
    if let Some(waiting) = &status.waiting {
        let _ = writeln!(text, "waiting  {}", waiting.detail);
    }
    let _ = writeln!(
        text,
        "model    {} ({}), {} layers, context {}{tokenizer}",
        model.name,
        short(&model.id),
        model.layers,
        model.context
    );
    if model.sampling != SamplingStatus::default() {
        let _ = writeln!(text, "sampling {}, unless a request says otherwise", model.sampling);
    }
    if !status.class.is_empty() {
        let _ = writeln!(text, "class    {}", short(&status.class));
    }
    let _ = writeln!(text, "queue    {}", queue_line(&status.queue));
    let rates = &status.rates;
    let _ = writeln!(
        text,
        "rates    prompt {:.1} tokens/s, generated {:.1} tokens/s; {} requests finished, {} failed",
        rates.prompt_tokens_per_s,
        rates.generated_tokens_per_s,
        rates.requests_finished,
        rates.requests_failed
    );
    text.push('\n');
    text.push_str(&workers_table(&status.workers));
    for pipeline in &status.plan.pipelines {
        text.push('\n');
        text.push_str(&pipeline_table(pipeline));
    }
    // Without a plan its reason is what is waited for, and stands above.
    let is_new = status.waiting.as_ref().is_none_or(|w| w.detail != status.plan.reason);
    if is_new && !status.plan.reason.is_empty() {
        let _ = writeln!(text, "\nplan: {}", status.plan.reason);
    }
    text
}

fn queue_line(queue: &QueueStatus) -> String {
    let tokens = match queue.waiting_tokens {
        0 => String::new(),
        tokens => format!(" ({tokens} tokens)"),
    };
    format!(
        "{} running, {} of {} waiting{tokens}, {} of {} KV blocks in use",
        queue.running,
        queue.waiting,
        queue.waiting_limit,
        queue.kv_blocks_used,
        queue.kv_blocks_total
    )
}

fn workers_table(workers: &[WorkerStatus]) -> String {
    if workers.is_empty() {
        return "no workers\n".into();
    }
    let row = |worker: &WorkerStatus| {
        let state = match worker.detail.as_str() {
            "" => worker.state.clone(),
            detail => format!("{} ({detail})", worker.state),
        };
        [
            worker.id.clone(),
            worker.address.clone(),
            worker.isa.clone(),
            worker.threads.to_string(),
            bytes(worker.memory_bytes),
            short(&worker.incarnation).to_owned(),
            state,
        ]
    };
    let head = ["WORKER", "ADDRESS", "ISA", "THREADS", "MEMORY", "INCARNATION", "STATE"];
    if workers.iter().all(|worker| worker.rack.is_empty()) {
        return columns(head.map(String::from), workers.iter().map(row));
    }
    let beside = |[id, address, isa, threads, memory, incarnation, state]: [String; 7],
                  rack: &str| {
        [id, address, rack.to_owned(), isa, threads, memory, incarnation, state]
    };
    let rows = workers.iter().map(|worker| beside(row(worker), &worker.rack));
    columns(beside(head.map(String::from), "RACK"), rows)
}

fn pipeline_table(pipeline: &PipelineStatus) -> String {
    let PipelineStatus { id, epoch, state, stages, predicted_tokens_per_s, .. } = pipeline;
    let mut text = format!(
        "pipeline {id}, epoch {epoch}: {state}, predicted {predicted_tokens_per_s:.0} tokens/s\n"
    );
    let head = ["STAGE", "WORKER", "ADDRESS", "LAYERS", "PREDICTED", "BUSY", "COMPUTE", "WAIT"];
    let head = head.map(String::from);
    let rows = stages.iter().enumerate().map(|(index, stage)| {
        [
            index.to_string(),
            stage.worker.clone(),
            stage.address.clone(),
            format!("{}..{}", stage.layers[0], stage.layers[1]),
            predicted(stage, format!("{:.1} tokens/s", stage.predicted_tokens_per_s)),
            predicted(stage, format!("{:.0} %", 100.0 * stage.predicted_busy)),
            format!("{:.2} ms", stage.compute_ms),
            format!("{:.2} ms", stage.wait_ms),
        ]
    });
    text.push_str(&columns(head, rows));
    text.push_str(&budget_line(&pipeline.budget));
    text
}

/// How steps are sized, and by what; nothing where that is not known.
fn budget_line(budget: &StepBudget) -> String {
    if budget.target_ms == 0.0 {
        return String::new();
    }
    let StepBudget { target_ms, chunk_tokens, chunk_tokens_last, .. } = budget;
    let mut line = format!(
        "steps read {chunk_tokens} tokens of a prompt, {chunk_tokens_last} at the end of the context: \
         {target_ms} ms"
    );
    if budget.token_ms > 0.0 {
        let (step_ms, token_ms) = (budget.step_ms, budget.token_ms);
        let (scale, context_ms) = (budget.scale, budget.context_ms);
        // Writing to a String cannot fail.
        let _ = write!(
            line,
            " of ({step_ms:.2} ms + {token_ms:.2} ms a token) x {scale:.2}, and {context_ms:.3} ms a token \
             for each 1000 before it"
        );
    }
    line + "\n"
}

/// A prediction, if the coordinator has said one: older ones do not.
fn predicted(stage: &StageStatus, shown: String) -> String {
    if stage.predicted_tokens_per_s > 0.0 { shown } else { "-".to_owned() }
}

/// Rows under a head, every column as wide as its widest cell.
pub fn columns<const N: usize>(
    head: [String; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let table: Vec<[String; N]> = std::iter::once(head).chain(rows).collect();
    let mut widths = [0; N];
    for row in &table {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &table {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The first digits of an id.
fn short(id: &str) -> &str {
    id.get(..SHORT_ID_DIGITS).unwrap_or(id)
}

/// A size for people: `1.5 GiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests;
