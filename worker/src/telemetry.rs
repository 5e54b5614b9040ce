//! What a worker counts: counters end in `_total`, units come last.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use proto::step::{Prepare, Row, RowStatus, StepVerdict};

use crate::error::UnreadableCause;

/// Says once what every name means; calling it again changes nothing.
pub(crate) fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_histogram!(
        "tercet_stage_compute_seconds",
        metrics::Unit::Seconds,
        "Time that a step spent in the engine"
    );
    describe_histogram!(
        "tercet_stage_wait_seconds",
        metrics::Unit::Seconds,
        "Time that a step waited for the engine"
    );
    describe_counter!("tercet_steps_total", "Steps that arrived, by what was said of them");
    describe_counter!(
        "tercet_unreadable_messages_total",
        "Streams of steps that ended because a message was too long, not of the schema, or cut off"
    );
    describe_counter!(
        "tercet_calls_refused_total",
        "Calls of the stage service that were refused, by method and cause"
    );
    describe_counter!("tercet_rows_total", "Rows of executed steps, by status");
    describe_counter!("tercet_stage_tokens_total", "Tokens of rows that were computed");
    describe_counter!(
        "tercet_hop_bytes_total",
        metrics::Unit::Bytes,
        "Payload sent to the next stage"
    );
    describe_counter!("tercet_link_connects_total", "Connections made to the next stage");
    describe_gauge!("tercet_kv_blocks", "Blocks of the KV cache");
    describe_gauge!("tercet_kv_blocks_filled", "Blocks of the KV cache that hold tokens");
    describe_gauge!("tercet_build_info", "Always 1; what runs is in the labels");
}

/// Which program with which kernels.
pub(crate) fn build_info(worker: &str, isa: &'static str) {
    gauge!(
        "tercet_build_info",
        "role" => "worker",
        "worker" => worker.to_owned(),
        "isa" => isa,
        "version" => env!("CARGO_PKG_VERSION"),
    )
    .set(1.0);
}

/// A step that no stage of this worker took.
pub(crate) fn refused(worker: &str, verdict: StepVerdict) {
    counter!(
        "tercet_steps_total",
        "worker" => worker.to_owned(),
        "verdict" => verdict_name(verdict),
    )
    .increment(1);
}

/// A call was refused.
pub(crate) fn call_refused(worker: &str, method: &'static str, cause: &'static str) {
    counter!(
        "tercet_calls_refused_total",
        "worker" => worker.to_owned(),
        "method" => method,
        "cause" => cause,
    )
    .increment(1);
}

/// A message of a stream of steps could not be read, so the stream ended.
pub(crate) fn unreadable(worker: &str, cause: UnreadableCause) {
    counter!(
        "tercet_unreadable_messages_total",
        "worker" => worker.to_owned(),
        "cause" => cause.name(),
    )
    .increment(1);
}

/// The counters of one stage.
#[derive(Debug)]
pub(crate) struct StageMetrics {
    worker: String,
    compute: Histogram,
    wait: Histogram,
    tokens: Counter,
    hop_bytes: Counter,
    connects: Counter,
    filled_blocks: Gauge,
}

impl StageMetrics {
    pub(crate) fn new(prepare: &Prepare) -> Self {
        let worker = prepare.stages[prepare.stage as usize].worker.clone();
        let labels = [("worker", worker.clone()), ("stage", prepare.stage.to_string())];
        gauge!("tercet_kv_blocks", &labels).set(prepare.kv_blocks);
        Self {
            compute: histogram!("tercet_stage_compute_seconds", &labels),
            wait: histogram!("tercet_stage_wait_seconds", &labels),
            tokens: counter!("tercet_stage_tokens_total", &labels),
            hop_bytes: counter!("tercet_hop_bytes_total", &labels),
            connects: counter!("tercet_link_connects_total", &labels),
            filled_blocks: gauge!("tercet_kv_blocks_filled", &labels),
            worker,
        }
    }

    /// A step arrived.
    pub(crate) fn verdict(&self, verdict: StepVerdict) {
        refused(&self.worker, verdict);
    }

    /// A step was executed.
    pub(crate) fn step(
        &self,
        compute: Duration,
        wait: Duration,
        rows: &[Row],
        filled_blocks: usize,
    ) {
        self.compute.record(compute);
        self.wait.record(wait);
        self.filled_blocks.set(filled_blocks as f64);
        for row in rows {
            counter!(
                "tercet_rows_total",
                "worker" => self.worker.clone(),
                "status" => status_name(row.status),
            )
            .increment(1);
            if row.status == RowStatus::Ok {
                self.tokens.increment(row.tokens.len() as u64);
            }
        }
    }

    /// A step was sent on.
    pub(crate) fn hop(&self, bytes: usize) {
        self.hop_bytes.increment(bytes as u64);
    }

    /// A link was made.
    pub(crate) fn connected(&self) {
        self.connects.increment(1);
    }
}

fn verdict_name(verdict: StepVerdict) -> &'static str {
    match verdict {
        StepVerdict::Accepted => "accepted",
        StepVerdict::Fenced => "fenced",
        StepVerdict::NotPrepared => "not_prepared",
        StepVerdict::Corrupt => "corrupt",
        StepVerdict::DownstreamLost => "downstream_lost",
        StepVerdict::Busy => "busy",
        StepVerdict::Invalid => "invalid",
    }
}

fn status_name(status: RowStatus) -> &'static str {
    match status {
        RowStatus::Ok => "ok",
        RowStatus::Stale => "stale",
        RowStatus::NeedState => "need_state",
        RowStatus::Expired => "expired",
        RowStatus::NotFinite => "not_finite",
        RowStatus::Invalid => "invalid",
    }
}
