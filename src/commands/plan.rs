//! `tercet plan`: which pipelines there are, or would be, and what each worker does in them.

mod live;
mod nodes;

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use client::command::TextWriter;
use client::endpoint::{OperatorArgs, Orders};
use client::status::columns;
use client::waiting::Notices;
use coordinator::planner::{
    self, Deployment, Incumbent, Objective, Options, PlanError, Problem, WorkerSpec,
};
use coordinator::{CONVERSATION_TOKENS, PlanFor};
use node::config::Duration;
use proto::BLOCK_TOKENS;
use proto::plan::KvType;
use serde::Serialize;
use tokio::time::Instant;

use crate::commands::{ModelArgs, operate};
use crate::{Failure, settings};
use nodes::Change;

/// Shows who would run which layers, or who does; or has the coordinator plan now.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet plan --endpoint rack1:7420
  tercet plan --endpoint rack1:7420 --what-if add:new=old,remove:slow
  tercet plan --endpoint rack1:7420 --apply
  tercet plan --nodes rack.toml --model store/
  tercet plan --nodes rack.toml --model synth:2b4t --objective latency
  tercet plan --nodes rack.toml --model store/ --what-if add:new=old,remove:slow --json")]
pub(crate) struct PlanCommand {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Have the coordinator plan now, without a hold-down and however little it gains, and wait until
    /// that serves
    #[arg(long, conflicts_with_all = ["nodes", "what_if"])]
    apply: bool,
    /// With --apply: give up waiting after this time; what was begun goes on
    #[arg(long, value_name = "TIME", requires = "apply", default_value = "5m")]
    timeout: Duration,
    /// What the plan would become: add:NAME=NODE (a copy of NODE) or remove:NODE
    #[arg(long, value_name = "CHANGE", value_delimiter = ',')]
    what_if: Vec<Change>,
    /// Plan for the machines in this TOML file, without a cluster
    #[arg(long, value_name = "FILE", conflicts_with_all = ["endpoint", "admin"])]
    nodes: Option<PathBuf>,
    #[command(flatten)]
    wishes: Wishes,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is planned for the machines of a file.
#[derive(Debug, Args)]
#[command(next_help_heading = "With --nodes")]
struct Wishes {
    #[command(flatten)]
    model: ModelArgs,
    /// How keys and values are stored: f16 or f32 [default: f16]
    #[arg(long, value_name = "TYPE", requires = "nodes")]
    kv_type: Option<KvType>,
    /// Exactly so many stages in every pipeline [default: what is best]
    #[arg(long, value_name = "N", requires = "nodes",
          value_parser = clap::value_parser!(u32).range(1..))]
    stages: Option<u32>,
    /// Exactly so many pipelines [default: what is best]
    #[arg(long, value_name = "N", requires = "nodes",
          value_parser = clap::value_parser!(u32).range(1..))]
    pipelines: Option<u32>,
    /// The most tokens per second of all, or the least time per token of one [default: throughput]
    #[arg(long, value_name = "WHAT", requires = "nodes")]
    objective: Option<PlanFor>,
    /// No pipeline may take longer for a token of one answer, such as 200ms [default: any time]
    #[arg(long, value_name = "TIME", requires = "nodes")]
    token_time: Option<Duration>,
    /// Tokens of prompt and answer that people use [default: 2048, or the model's context]
    #[arg(long, value_name = "TOKENS", requires = "nodes",
          value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
}

/// Runs `tercet plan`.
pub(crate) async fn run(command: PlanCommand) -> Result<(), Failure> {
    let PlanCommand { operator, apply, timeout, what_if, nodes, wishes, json } = command;
    let Some(nodes) = nodes else {
        if wishes.model.model.is_some() {
            return Err(Failure::usage("--model needs --nodes: a cluster has its own model"));
        }
        if apply {
            let operator = operate::connect(&operator).await?;
            return Ok(client::operator::run_apply(&operator, timeout.get(), json).await?);
        }
        if !what_if.is_empty() {
            let question = operate::connect(&operator).await?.question().await?;
            return print(&live_what_if(live::problem(&question)?, &what_if)?, json);
        }
        return show(&operator, json).await;
    };
    let objective = wishes.objective()?;
    let workers = nodes::read(&nodes)?;
    let after = nodes::changed(&workers, &what_if)?;
    let store = wishes.model.open(json)?;
    let context = wishes.context.unwrap_or(CONVERSATION_TOKENS).min(store.config().context);
    let limits = coordinator::LimitsConfig::default();
    let before = Problem {
        model: coordinator::model_costs(&store, wishes.kv_type.unwrap_or_default()),
        workers,
        options: Options {
            stages: wishes.stages,
            pipelines: wishes.pipelines,
            min_kv_blocks: coordinator::least_kv_blocks(context, limits.kv_blocks),
            max_kv_blocks: limits.kv_blocks,
            context_tokens: context,
            objective,
            incumbent: Vec::new(),
        },
    };
    let shown = match what_if.is_empty() {
        true => planned(&before)?,
        false => after_change(&before, after)?,
    };
    print(&shown, json)
}

fn print(shown: &Shown, json: bool) -> Result<(), Failure> {
    let mut writer = TextWriter::stdout();
    if json {
        return Ok(writer.json(shown)?);
    }
    Ok(writer.text(&shown.text())?)
}

/// Prints the plan in force.
async fn show(operator: &OperatorArgs, json: bool) -> Result<(), Failure> {
    let variable = settings::endpoint_variable();
    match operator.resolve(variable.as_deref()).map_err(Failure::config)? {
        Orders::At(_) => {
            let status = operate::connect(operator).await?.status().await?;
            Ok(client::status::show_plan(&status.plan, json)?)
        }
        Orders::AsSaidBy(endpoint) => {
            let client = Notices::stderr().connect(&endpoint).await?;
            Ok(client::status::show_plan(&client.status().await?.plan, json)?)
        }
    }
}

impl Wishes {
    fn objective(&self) -> Result<Objective, Failure> {
        let objective = self.objective.unwrap_or_default().objective(self.token_time);
        objective.map_err(|_| Failure::usage("--token-time is for --objective throughput"))
    }
}

/// The plan, and how long it took to make.
fn planned(problem: &Problem) -> Result<Shown, PlanError> {
    let begin = Instant::now();
    let found = planner::deploy(problem)?;
    let planning_ms = begin.elapsed().as_secs_f64() * 1e3;
    Ok(Shown { planning_ms, ..Shown::from(found) })
}

/// The plan after a change of the one before.
fn after_change(before: &Problem, workers: Vec<WorkerSpec>) -> Result<Shown, PlanError> {
    // Without a plan before the change nothing serves yet.
    let (served, incumbents) = match planner::deploy(before) {
        Ok(found) => (found.tokens_per_s, found.pipelines),
        Err(error) => {
            tracing::warn!(error = %node::Chain(&error), "there is no plan without the change");
            (0.0, Vec::new())
        }
    };
    let incumbent = incumbents
        .into_iter()
        .map(|old| Incumbent { stages: old.stages, kv_blocks: old.kv_blocks })
        .collect();
    let options = Options { incumbent, ..before.options.clone() };
    let after = Problem { model: before.model, workers, options };
    let shown = planned(&after)?;
    Ok(Shown { before_tokens_per_s: Some(served), ..shown })
}

/// The plan that a cluster's would become, of the question that its planner would be asked now.
fn live_what_if(now: Problem, changes: &[Change]) -> Result<Shown, Failure> {
    let workers = nodes::changed(&now.workers, changes)?;
    // Without a plan nothing is predicted of what serves either.
    let served = planner::deploy(&now).map_or(0.0, |found| found.incumbent_tokens_per_s);
    let shown = planned(&Problem { workers, ..now })?;
    Ok(Shown { before_tokens_per_s: Some(served), ..shown })
}

/// A deployment as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    pipelines: Vec<ShownPipeline>,
    left_out: Vec<ShownLeftOut>,
    tokens_per_s: f64,
    /// With `--what-if`: before the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    before_tokens_per_s: Option<f64>,
    /// With `--what-if`: to be loaded where they were not before.
    layers_moved: u32,
    reason: String,
    /// What the planner took on this machine.
    planning_ms: f64,
}

#[derive(Debug, Serialize)]
struct ShownPipeline {
    stages: Vec<ShownStage>,
    kv_blocks: u32,
    kv_tokens: u64,
    step_rows: u32,
    bottleneck_ms: f64,
    token_ms: f64,
    tokens_per_s: f64,
    reason: String,
}

#[derive(Debug, Serialize)]
struct ShownStage {
    worker: String,
    layers: [u32; 2],
    busy: f64,
    tokens_per_s: f64,
}

#[derive(Debug, Serialize)]
struct ShownLeftOut {
    worker: String,
    reason: String,
}

impl From<Deployment> for Shown {
    fn from(found: Deployment) -> Self {
        let mut workers = found.workers.into_iter();
        let pipeline = |pipeline: planner::Assignment| ShownPipeline {
            stages: workers
                .by_ref()
                .take(pipeline.stages.len())
                .map(|worker| ShownStage {
                    worker: worker.worker,
                    layers: [worker.layers.start, worker.layers.end],
                    busy: worker.busy,
                    tokens_per_s: worker.tokens_per_s,
                })
                .collect(),
            kv_blocks: pipeline.kv_blocks,
            kv_tokens: u64::from(pipeline.kv_blocks) * u64::from(BLOCK_TOKENS),
            step_rows: pipeline.step_rows,
            bottleneck_ms: pipeline.bottleneck_ns as f64 / 1e6,
            token_ms: pipeline.token_ns as f64 / 1e6,
            tokens_per_s: pipeline.predicted_tokens_per_s,
            reason: pipeline.reason,
        };
        let left_out = found.left_out.into_iter();
        Self {
            pipelines: found.pipelines.into_iter().map(pipeline).collect(),
            left_out: left_out
                .map(|left| ShownLeftOut { worker: left.worker, reason: left.reason })
                .collect(),
            tokens_per_s: found.tokens_per_s,
            before_tokens_per_s: None,
            layers_moved: found.layers_moved,
            reason: found.reason,
            planning_ms: 0.0,
        }
    }
}

impl Shown {
    /// For people.
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        for (index, pipeline) in self.pipelines.iter().enumerate() {
            let _ = writeln!(
                text,
                "pipeline {}: {:.1} tokens/s, {:.0} ms a token of one answer, steps of {} rows, KV for {} \
                 tokens\n  {}",
                index + 1,
                pipeline.tokens_per_s,
                pipeline.token_ms,
                pipeline.step_rows,
                pipeline.kv_tokens,
                pipeline.reason
            );
            let head = ["  WORKER", "LAYERS", "BUSY", "TOKENS/S"].map(String::from);
            let row = |stage: &ShownStage| {
                [
                    format!("  {}", stage.worker),
                    format!("{}..{}", stage.layers[0], stage.layers[1]),
                    format!("{:.0} %", 100.0 * stage.busy),
                    format!("{:.1}", stage.tokens_per_s),
                ]
            };
            text.push_str(&columns(head, pipeline.stages.iter().map(row)));
            text.push('\n');
        }
        for left in &self.left_out {
            let _ = writeln!(text, "left out: {}: {}", left.worker, left.reason);
        }
        if let Some(before) = self.before_tokens_per_s {
            let _ = writeln!(
                text,
                "before: {before:.1} tokens/s; {} layers move to where they were not",
                self.layers_moved
            );
        }
        let _ = writeln!(text, "plan: {}\nplanned in {:.1} ms", self.reason, self.planning_ms);
        text
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The example's machines with a model of BitNet b1.58 2B4T's sizes.
    fn example() -> Problem {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/nodes.toml");
        Problem {
            model: crate::bench::planning::MODEL,
            workers: nodes::read(&path).unwrap(),
            options: Options {
                min_kv_blocks: 64,
                max_kv_blocks: 4096,
                context_tokens: CONVERSATION_TOKENS,
                ..Options::default()
            },
        }
    }

    #[test]
    fn the_example_is_planned_as_its_page_says() {
        let shown = Shown::from(planner::deploy(&example()).unwrap());
        let sizes: Vec<_> = shown.pipelines.iter().map(|one| one.stages.len()).collect();
        let text = shown.text();
        assert_eq!(sizes, [1, 1, 1, 3], "{text}");
        assert!(shown.left_out.is_empty(), "{text}");
        for said in ["3 replicas and 1 pipeline of 3 stages on 6 of 6 workers", "small-2", "BUSY"] {
            assert!(text.contains(said), "{text}");
        }
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["pipelines"][3]["stages"][2]["layers"][1], 30, "{json}");
        assert_eq!(json.get("before_tokens_per_s"), None);
    }

    #[test]
    fn what_if_keeps_what_a_change_does_not_touch() {
        let before = example();
        let old = planner::deploy(&before).unwrap();
        let changes = ["add:more=large".parse().unwrap()];
        let shown =
            after_change(&before, nodes::changed(&before.workers, &changes).unwrap()).unwrap();
        let served = shown.before_tokens_per_s.unwrap();
        assert!((served - old.tokens_per_s).abs() < 1e-6);
        assert!(shown.tokens_per_s > served, "{}", shown.text());
        assert_eq!(shown.layers_moved, 30, "only the new one loads: {}", shown.text());
        assert!(shown.text().contains("before: "), "{}", shown.text());
        let stages = |index: usize| {
            let stages = old.pipelines[index].stages.iter();
            stages.map(|stage| stage.worker.clone()).collect::<Vec<_>>()
        };
        for index in 0..old.pipelines.len() {
            let now = shown.pipelines[index].stages.iter();
            assert_eq!(now.map(|stage| stage.worker.clone()).collect::<Vec<_>>(), stages(index));
        }
    }
}
