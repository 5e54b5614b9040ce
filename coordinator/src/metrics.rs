//! What a coordinator measures of itself. Names follow vLLM's where the meaning is the same.

use std::time::Duration;

use ::metrics::{
    Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use proto::generate::Timings;
use proto::ids::PipelineRef;
use proto::status::{QueueStatus, StepBudget};

use crate::driver::Counted;
use crate::scheduler::PipelineStats;

/// Says once what every metric means.
pub(crate) fn describe() {
    describe_gauge!("tercet_build_info", "1; the version is a label");
    describe_gauge!("tercet_requests_running", "requests that were sent to a pipeline");
    describe_gauge!("tercet_requests_waiting", "requests that wait for KV or a pipeline");
    describe_gauge!(
        "tercet_waiting_tokens",
        "tokens that are expected of requests that wait, prompts and answers"
    );
    describe_gauge!(
        "tercet_pipeline_step_budget_tokens",
        "tokens of a prompt's beginning that one of its steps reads at most"
    );
    describe_gauge!(
        "tercet_pipeline_step_budget_seconds",
        "how long such a step should take on its slowest stage"
    );
    describe_gauge!(
        "tercet_pipeline_step_time_scale",
        "how many times as long as its workers measured its steps take"
    );
    describe_gauge!("tercet_kv_cache_usage_ratio", "share of the KV blocks that are taken");
    describe_gauge!("tercet_steps_in_flight", "steps between the coordinator and the last stage");
    describe_gauge!("tercet_pipeline_id", "which pipeline serves in a place, 0 if none does");
    describe_gauge!("tercet_pipeline_epoch", "its epoch");
    describe_gauge!("tercet_pipeline_requests_running", "requests that run on it");
    describe_gauge!(
        "tercet_pipeline_kv_usage_ratio",
        "share of its KV blocks that are held or named by a step on its way"
    );
    describe_gauge!("tercet_pipeline_steps_in_flight", "its steps on their way");
    describe_gauge!(
        "tercet_membership_epoch",
        "newest epoch of the pipelines that serve, 0 without one"
    );
    describe_gauge!("tercet_membership_term", "this coordinator's reign, 0 when it does not lead");
    describe_counter!("tercet_plans_written_total", "plans that this coordinator wrote");
    describe_gauge!(
        "tercet_ready",
        "1 when a token came through a pipeline within the last seconds, and nothing stops"
    );
    describe_counter!("tercet_prompt_tokens_total", "prompt tokens computed");
    describe_counter!("tercet_generation_tokens_total", "tokens sampled");
    describe_counter!(
        "tercet_preemptions_total",
        "answers that gave their KV back, to go on later"
    );
    describe_counter!(
        "tercet_prefix_cache_queries_total",
        "prompt tokens that were looked for in the prefix cache"
    );
    describe_counter!("tercet_prefix_cache_hits_total", "prompt tokens that were found there");
    describe_counter!("tercet_request_success_total", "answers that ended, by why");
    describe_counter!(
        "tercet_request_failure_total",
        "answers that were taken and broke off, by why; requests that were refused are not among them"
    );
    describe_counter!(
        "tercet_requests_refused_total",
        "requests that were refused before an answer was taken, by cause, protocol and endpoint"
    );
    describe_histogram!(
        "tercet_request_refusal_seconds",
        "from the first byte of a request to its refusal, by cause"
    );
    describe_histogram!("tercet_request_queue_seconds", "from submission to the first KV blocks");
    describe_histogram!(
        "tercet_request_prefill_seconds",
        "from the first KV blocks to the first token"
    );
    describe_histogram!("tercet_request_decode_seconds", "from the first token to the last");
    describe_histogram!(
        "tercet_request_prompt_tokens",
        "tokens of the prompts of answers that ended"
    );
    describe_histogram!("tercet_request_generation_tokens", "tokens of answers that ended");
    describe_counter!("tercet_request_cancelled_total", "answers whose clients went away");
    describe_histogram!(
        "tercet_time_to_first_token_seconds",
        "from the first byte of a request to its first token"
    );
    describe_histogram!("tercet_inter_token_latency_seconds", "between tokens of one answer");
    describe_histogram!(
        "tercet_e2e_request_latency_seconds",
        "from the first byte of a request to its last token"
    );
    describe_histogram!(
        "tercet_task_poll_seconds",
        "how long the tasks that everybody waits for computed at once, by task"
    );
    describe_histogram!(
        "tercet_step_seconds",
        "of one step from the coordinator through the pipeline and back"
    );
    describe_histogram!(
        "tercet_step_added_seconds",
        "of that, neither computing nor waiting for earlier steps to be computed"
    );
    describe_histogram!("tercet_stage_compute_seconds", "of one step in one stage's engine");
    describe_histogram!("tercet_stage_wait_seconds", "of one step before one stage's engine");
    gauge!("tercet_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

/// How full everything is, and how many steps are on their way.
pub(crate) fn queue(queue: &QueueStatus, steps_in_flight: u32) {
    gauge!("tercet_requests_running").set(f64::from(queue.running));
    gauge!("tercet_requests_waiting").set(f64::from(queue.waiting));
    gauge!("tercet_waiting_tokens").set(queue.waiting_tokens as f64);
    let total = f64::from(queue.kv_blocks_total.max(1));
    gauge!("tercet_kv_cache_usage_ratio").set(f64::from(queue.kv_blocks_used) / total);
    gauge!("tercet_steps_in_flight").set(f64::from(steps_in_flight));
}

/// How the pipeline in a slot is. Slots are used again, so that there are no more values of the label
/// than pipelines that served at a time; ids would become more for as long as the process lives.
pub(crate) fn pipeline(slot: u32, at: PipelineRef, stats: &PipelineStats) {
    let slot = slot.to_string();
    gauge!("tercet_pipeline_id", "pipeline" => slot.clone()).set(at.id.0 as f64);
    gauge!("tercet_pipeline_epoch", "pipeline" => slot.clone()).set(at.epoch.0 as f64);
    let running = f64::from(stats.running);
    gauge!("tercet_pipeline_requests_running", "pipeline" => slot.clone()).set(running);
    let used = f64::from(stats.kv_blocks_used) / f64::from(stats.kv_blocks_total.max(1));
    gauge!("tercet_pipeline_kv_usage_ratio", "pipeline" => slot.clone()).set(used);
    let steps = f64::from(stats.steps_in_flight);
    gauge!("tercet_pipeline_steps_in_flight", "pipeline" => slot).set(steps);
}

/// How much of prompts the steps of the pipeline in a slot read, and how long that should take.
pub(crate) fn step_budget(slot: u32, budget: &StepBudget) {
    let slot = slot.to_string();
    let tokens = f64::from(budget.chunk_tokens);
    gauge!("tercet_pipeline_step_budget_tokens", "pipeline" => slot.clone()).set(tokens);
    let seconds = budget.target_ms / 1e3;
    gauge!("tercet_pipeline_step_budget_seconds", "pipeline" => slot.clone()).set(seconds);
    gauge!("tercet_pipeline_step_time_scale", "pipeline" => slot).set(budget.scale);
}

/// What all pipelines have done since start.
pub(crate) fn tokens(counted: Counted) {
    counter!("tercet_prompt_tokens_total").absolute(counted.prompt_tokens);
    counter!("tercet_generation_tokens_total").absolute(counted.generated_tokens);
    counter!("tercet_preemptions_total").absolute(counted.preemptions);
    counter!("tercet_prefix_cache_queries_total").absolute(counted.prefix_queries);
    counter!("tercet_prefix_cache_hits_total").absolute(counted.prefix_hits);
}

/// Where the polls of a task of the driver are counted: `control` or `lane`.
pub(crate) fn task_poll(task: &'static str) -> Histogram {
    histogram!("tercet_task_poll_seconds", "task" => task)
}

/// Who leads and what serves.
pub(crate) fn membership(term: u64, epoch: u64, ready: bool) {
    gauge!("tercet_membership_term").set(term as f64);
    gauge!("tercet_membership_epoch").set(epoch as f64);
    gauge!("tercet_ready").set(f64::from(u8::from(ready)));
}

/// This coordinator wrote a plan.
pub(crate) fn plan_written() {
    counter!("tercet_plans_written_total").increment(1);
}

/// Where rounds of steps are counted: the whole of each, and what is added to computing.
pub(crate) fn step_times() -> (Histogram, Histogram) {
    (histogram!("tercet_step_seconds"), histogram!("tercet_step_added_seconds"))
}

/// Where one stage's parts of steps are counted: computing and waiting.
pub(crate) fn stage_times(slot: u32, stage: u32) -> (Histogram, Histogram) {
    let labels = [("pipeline", slot.to_string()), ("stage", stage.to_string())];
    (
        histogram!("tercet_stage_compute_seconds", &labels),
        histogram!("tercet_stage_wait_seconds", &labels),
    )
}

/// The first token of an answer.
pub(crate) fn first_token(since_arrival: Duration) {
    histogram!("tercet_time_to_first_token_seconds").record(since_arrival);
}

/// A later token of an answer.
pub(crate) fn next_token(since_last: Duration) {
    histogram!("tercet_inter_token_latency_seconds").record(since_last);
}

/// What an answer took that ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) reason: &'static str,
    /// Since the request's first byte arrived.
    pub(crate) since_arrival: Duration,
    pub(crate) timings: Timings,
    pub(crate) prompt_tokens: u32,
    pub(crate) generated_tokens: u32,
}

/// An answer ended.
pub(crate) fn finished(ended: Ended) {
    let Ended { reason, since_arrival, timings, prompt_tokens, generated_tokens } = ended;
    counter!("tercet_request_success_total", "finished_reason" => reason).increment(1);
    histogram!("tercet_e2e_request_latency_seconds").record(since_arrival);
    let seconds = Duration::from_micros;
    histogram!("tercet_request_queue_seconds").record(seconds(timings.queue_us));
    histogram!("tercet_request_prefill_seconds").record(seconds(timings.prefill_us));
    histogram!("tercet_request_decode_seconds").record(seconds(timings.decode_us));
    histogram!("tercet_request_prompt_tokens").record(f64::from(prompt_tokens));
    histogram!("tercet_request_generation_tokens").record(f64::from(generated_tokens));
}

/// An operator's call was refused.
pub(crate) fn refused_order(cause: &'static str) {
    counter!(
        "tercet_requests_refused_total",
        "cause" => cause,
        "protocol" => "grpc",
        "endpoint" => "operator",
    )
    .increment(1);
}

/// A request was refused: no answer was taken for it. All three are of closed sets.
pub(crate) fn refused(
    cause: &'static str,
    protocol: &'static str,
    endpoint: &'static str,
    since_arrival: Duration,
) {
    counter!(
        "tercet_requests_refused_total",
        "cause" => cause,
        "protocol" => protocol,
        "endpoint" => endpoint,
    )
    .increment(1);
    histogram!("tercet_request_refusal_seconds", "cause" => cause).record(since_arrival);
}

/// An answer broke off.
pub(crate) fn failed(kind: &'static str) {
    counter!("tercet_request_failure_total", "error_type" => kind).increment(1);
}

/// A client went away.
pub(crate) fn cancelled() {
    counter!("tercet_request_cancelled_total").increment(1);
}
