//! `tercet bench`: what the machine can do, and how near to it kernels, an engine and a cluster
//! come.

mod engine;
mod guard;
mod kernel;
mod limits;
mod pipeline;
mod plan;
mod scaling;

use clap::{Args, Subcommand};

use self::engine::EngineCommand;
use self::guard::GuardCommand;
use self::kernel::KernelCommand;
use self::limits::LimitsCommand;
use self::pipeline::PipelineCommand;
use self::plan::PlanBenchCommand;
use self::scaling::ScalingCommand;
use crate::Failure;

/// Measures: the machine, the kernels, an engine, a cluster, the planner.
#[derive(Debug, Args)]
pub(crate) struct BenchCommand {
    #[command(subcommand)]
    what: BenchWhat,
}

#[derive(Debug, Subcommand)]
enum BenchWhat {
    /// What the machine can do: bandwidth and multiply-adds
    Limits(LimitsCommand),
    /// Each product by shape, rows and instruction set
    Kernel(KernelCommand),
    /// Prefill, decode and batches of one engine in this process, and its share of the limits
    Engine(EngineCommand),
    /// Prefill, decode and concurrent requests of a running cluster
    Pipeline(PipelineCommand),
    /// Several workers, as replicas and as stages, against the sum of what each gives alone
    Scaling(ScalingCommand),
    /// The planner's time for random fleets, and what its plans give
    Plan(PlanBenchCommand),
    /// Not for people: runs a process of `bench scaling`
    #[command(hide = true)]
    Guard(GuardCommand),
}

impl BenchCommand {
    /// Whether it starts processes: told to stop, it ends them first.
    pub(crate) fn starts_processes(&self) -> bool {
        matches!(self.what, BenchWhat::Scaling(_) | BenchWhat::Guard(_))
    }
}

/// Runs the command.
pub(crate) async fn run(command: BenchCommand) -> Result<(), Failure> {
    match command.what {
        BenchWhat::Limits(command) => limits::run(&command),
        BenchWhat::Kernel(command) => kernel::run(&command),
        BenchWhat::Engine(command) => engine::run(&command),
        BenchWhat::Pipeline(command) => pipeline::run(&command).await,
        BenchWhat::Scaling(command) => scaling::run(command).await,
        BenchWhat::Guard(command) => guard::run(command).await,
        BenchWhat::Plan(command) => plan::run(&command),
    }
}
