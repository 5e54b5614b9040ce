//! Steps, replies, results and preparation.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::{WireError, bounded, bounded_text, clipped, uncounted};
use crate::codec::{check_result_set, check_row_set};
use crate::held::{Description, HeldStage, HeldState};
use crate::ids::{
    BlockId, Epoch, Generation, Incarnation, ModelId, PipelineId, PipelineRef, PrefixHash,
    SequenceId, StepId, Term,
};
use crate::limits;
use crate::pb;
use crate::plan::{KvType, StagePlan};
use crate::step::{
    Output, Prepare, ResultSource, Row, RowResult, RowStatus, RowValue, Sampled,
    SamplingParameters, StageTime, Step, StepHeader, StepReply, StepResult, StepVerdict,
    TokenLogprob,
};

/// CRC32C over epoch and step (u64 little endian each), the encoded rows, the activations.
///
/// Epoch and step are in it so that a payload can never pass under another step's header.
pub fn step_crc32c(epoch: u64, step: u64, rows: &[u8], activations: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&epoch.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &step.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, rows);
    crc32c::crc32c_append(crc, activations)
}

/// A step as it goes over the wire. The activations are not copied.
pub fn encode_step(step: &Step) -> pb::StepMessage {
    let header = step.header;
    let rows = pb::RowSet {
        rows: step.rows.iter().map(encode_row).collect(),
        ended_sequences: step.ended_sequences.iter().map(|id| id.0).collect(),
        stage_times: step.stage_times.iter().map(encode_time).collect(),
    };
    let rows = Bytes::from(rows.encode_to_vec());
    let payload_crc32c = step_crc32c(header.epoch.0, header.step.0, &rows, &step.activations);
    pb::StepMessage {
        pipeline: header.pipeline.0,
        epoch: header.epoch.0,
        term: header.term.0,
        dst_incarnation: Bytes::copy_from_slice(&header.dst_incarnation.0),
        step: header.step.0,
        acked_step: header.acked_step.0,
        // Rounded up: a step that has time left must not arrive as expired.
        deadline_remaining_ms: header
            .deadline_remaining
            .as_nanos()
            .div_ceil(1_000_000)
            .try_into()
            .unwrap_or(u32::MAX),
        payload_crc32c,
        rows,
        activations: step.activations.clone(),
        acknowledge: false,
    }
}

/// Only what every message carries: enough to judge epoch and incarnation before anything else.
///
/// # Errors
///
/// [`WireError::Id`] if the incarnation has the wrong length.
pub fn decode_step_header(message: &pb::StepMessage) -> Result<StepHeader, WireError> {
    Ok(StepHeader {
        pipeline: PipelineId(message.pipeline),
        epoch: Epoch(message.epoch),
        term: Term(message.term),
        dst_incarnation: Incarnation::try_from(&message.dst_incarnation[..])?,
        step: StepId(message.step),
        acked_step: StepId(message.acked_step),
        deadline_remaining: Duration::from_millis(message.deadline_remaining_ms.into()),
    })
}

/// A step as it arrived.
///
/// # Errors
///
/// [`WireError::Corrupt`] if the checksum disagrees, else what is wrong with the first wrong field.
pub fn decode_step(message: pb::StepMessage) -> Result<Step, WireError> {
    let header = decode_step_header(&message)?;
    let pb::StepMessage { rows, activations, payload_crc32c: expected, .. } = message;
    let found = step_crc32c(header.epoch.0, header.step.0, &rows, &activations);
    if found != expected {
        return Err(WireError::Corrupt { step: header.step.0, expected, found });
    }
    // Before it is built: a peer who knows the key is not to be believed that it sends few.
    check_row_set(&rows).map_err(|error| uncounted("rows", error))?;
    let set = pb::RowSet::decode(rows)
        .map_err(|source| WireError::Undecodable { field: "rows", source })?;
    bounded("rows", set.rows.len(), limits::STEP_ROWS)?;
    bounded("ended_sequences", set.ended_sequences.len(), limits::ENDED_SEQUENCES)?;
    let rows = set.rows.into_iter().map(decode_row).collect::<Result<Vec<_>, _>>()?;
    let tokens = rows.iter().map(|row| row.tokens.len()).sum();
    bounded("tokens of the step", tokens, limits::STEP_TOKENS)?;
    if activations.len() % 4 != 0 {
        return Err(WireError::Invalid {
            field: "activations",
            expected: "whole f32 values",
            found: format!("{} bytes", activations.len()),
        });
    }
    Ok(Step {
        header,
        rows,
        ended_sequences: set.ended_sequences.into_iter().map(SequenceId).collect(),
        stage_times: decode_times(set.stage_times)?,
        activations,
    })
}

fn encode_row(row: &Row) -> pb::Row {
    let mut drawn = None;
    let (output, sampling, score_targets) = match &row.output {
        Output::None => (pb::Output::None, None, Vec::new()),
        Output::State => (pb::Output::State, None, Vec::new()),
        Output::Draw(sampling) => (pb::Output::Draw, Some(encode_sampling(sampling)), Vec::new()),
        Output::Drawn(sampled) => {
            drawn = Some(pb::Drawn {
                token: sampled.token,
                logprob: sampled.logprob,
                top_logprobs: encode_top(&sampled.top),
            });
            (pb::Output::Drawn, None, Vec::new())
        }
        Output::Sample(sampling) => {
            (pb::Output::Sample, Some(encode_sampling(sampling)), Vec::new())
        }
        Output::Score(targets) => (pb::Output::Score, None, targets.clone()),
        Output::Logits => (pb::Output::Logits, None, Vec::new()),
    };
    pb::Row {
        sequence: row.sequence.0,
        generation: row.generation.0,
        position: row.position,
        tokens: row.tokens.clone(),
        prefix_hash_before: Bytes::copy_from_slice(&row.prefix_hash_before.0),
        prefix_hash_after: Bytes::copy_from_slice(&row.prefix_hash_after.0),
        block_ids: row.blocks.iter().map(|id| id.0).collect(),
        output: output.into(),
        sampling,
        score_targets,
        status: encode_status(row.status).into(),
        detail: row.detail.clone(),
        traceparent: row.traceparent.clone(),
        drawn,
    }
}

fn encode_top(top: &[TokenLogprob]) -> Vec<pb::TokenLogprob> {
    let one = |top: &TokenLogprob| pb::TokenLogprob { token: top.token, logprob: top.logprob };
    top.iter().map(one).collect()
}

fn decode_top(top: Vec<pb::TokenLogprob>) -> Result<Vec<TokenLogprob>, WireError> {
    bounded("top_logprobs", top.len(), limits::TOP_LOGPROBS as usize)?;
    let one = |top: pb::TokenLogprob| TokenLogprob { token: top.token, logprob: top.logprob };
    Ok(top.into_iter().map(one).collect())
}

fn decode_row(row: pb::Row) -> Result<Row, WireError> {
    bounded("tokens of a row", row.tokens.len(), limits::STEP_TOKENS)?;
    bounded("block_ids", row.block_ids.len(), limits::ROW_BLOCKS)?;
    bounded("score_targets", row.score_targets.len(), limits::STEP_TOKENS)?;
    let output = match row.output() {
        pb::Output::None => Output::None,
        pb::Output::Sample => {
            let sampling = row.sampling.ok_or(WireError::Missing { field: "sampling" })?;
            Output::Sample(Box::new(decode_sampling(sampling)?))
        }
        pb::Output::Score => Output::Score(row.score_targets),
        pb::Output::Logits => Output::Logits,
        pb::Output::State => Output::State,
        pb::Output::Draw => {
            let sampling = row.sampling.ok_or(WireError::Missing { field: "sampling" })?;
            Output::Draw(Box::new(decode_sampling(sampling)?))
        }
        pb::Output::Drawn => {
            let drawn = row.drawn.ok_or(WireError::Missing { field: "drawn" })?;
            let (token, logprob) = (drawn.token, drawn.logprob);
            let top = decode_top(drawn.top_logprobs)?;
            Output::Drawn(Box::new(Sampled { token, logprob, top }))
        }
    };
    // An enum value of a later version reads as the first one; here that would change a meaning.
    known("output", row.output, pb::Output::try_from(row.output).is_ok())?;
    let status = decode_status(row.status)?;
    Ok(Row {
        sequence: SequenceId(row.sequence),
        generation: Generation(row.generation),
        position: row.position,
        tokens: row.tokens,
        prefix_hash_before: PrefixHash::try_from(&row.prefix_hash_before[..])?,
        prefix_hash_after: PrefixHash::try_from(&row.prefix_hash_after[..])?,
        blocks: row.block_ids.into_iter().map(BlockId).collect(),
        output,
        status,
        detail: clipped(row.detail, limits::DETAIL_BYTES),
        traceparent: bounded_text("traceparent", row.traceparent, limits::NAME_BYTES)?,
    })
}

fn known(field: &'static str, found: i32, is_known: bool) -> Result<(), WireError> {
    if is_known { Ok(()) } else { Err(unknown(field, found)) }
}

fn unknown(field: &'static str, found: i32) -> WireError {
    WireError::Invalid { field, expected: "a value of this version", found: found.to_string() }
}

/// An index of a stage of some pipeline.
fn decode_stage_index(stage: u32) -> Result<u32, WireError> {
    if (stage as usize) < limits::STAGES {
        return Ok(stage);
    }
    let most = limits::STAGES as u64 - 1;
    Err(WireError::TooLarge { field: "stage", found: stage.into(), limit: most })
}

fn encode_sampling(sampling: &SamplingParameters) -> pb::SamplingParameters {
    let count = |&(token, count): &(u32, u32)| pb::TokenCount { token, count };
    pb::SamplingParameters {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        choice: sampling.choice,
        logit_bias: sampling
            .logit_bias
            .iter()
            .map(|&(token, bias)| pb::TokenBias { token, bias })
            .collect(),
        prompt_counts: sampling.prompt_counts.iter().map(count).collect(),
        output_counts: sampling.output_counts.iter().map(count).collect(),
        top_logprobs: sampling.top_logprobs,
    }
}

fn decode_sampling(sampling: pb::SamplingParameters) -> Result<SamplingParameters, WireError> {
    bounded("logit_bias", sampling.logit_bias.len(), limits::LOGIT_BIAS)?;
    bounded("prompt_counts", sampling.prompt_counts.len(), limits::TOKEN_COUNTS)?;
    bounded("output_counts", sampling.output_counts.len(), limits::TOKEN_COUNTS)?;
    let top = sampling.top_logprobs.unwrap_or(0);
    bounded("top_logprobs", top as usize, limits::TOP_LOGPROBS as usize)?;
    let count = |count: pb::TokenCount| (count.token, count.count);
    Ok(SamplingParameters {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        choice: sampling.choice,
        logit_bias: sampling.logit_bias.into_iter().map(|bias| (bias.token, bias.bias)).collect(),
        prompt_counts: sampling.prompt_counts.into_iter().map(count).collect(),
        output_counts: sampling.output_counts.into_iter().map(count).collect(),
        top_logprobs: sampling.top_logprobs,
    })
}

fn encode_status(status: RowStatus) -> pb::RowStatus {
    match status {
        RowStatus::Ok => pb::RowStatus::Ok,
        RowStatus::Stale => pb::RowStatus::Stale,
        RowStatus::NeedState => pb::RowStatus::NeedState,
        RowStatus::Expired => pb::RowStatus::Expired,
        RowStatus::NotFinite => pb::RowStatus::NotFinite,
        RowStatus::Invalid => pb::RowStatus::Invalid,
    }
}

fn decode_status(status: i32) -> Result<RowStatus, WireError> {
    Ok(match pb::RowStatus::try_from(status) {
        Ok(pb::RowStatus::Unspecified) => return Err(WireError::Missing { field: "status" }),
        Ok(pb::RowStatus::Ok) => RowStatus::Ok,
        Ok(pb::RowStatus::Stale) => RowStatus::Stale,
        Ok(pb::RowStatus::NeedState) => RowStatus::NeedState,
        Ok(pb::RowStatus::Expired) => RowStatus::Expired,
        Ok(pb::RowStatus::NotFinite) => RowStatus::NotFinite,
        Ok(pb::RowStatus::Invalid) => RowStatus::Invalid,
        Err(_) => return Err(unknown("status", status)),
    })
}

fn encode_time(time: &StageTime) -> pb::StageTime {
    let us = |duration: Duration| duration.as_micros().try_into().unwrap_or(u64::MAX);
    pb::StageTime {
        stage: time.stage,
        compute_us: us(time.compute),
        wait_us: us(time.wait),
        behind_us: us(time.behind),
    }
}

fn decode_times(times: Vec<pb::StageTime>) -> Result<Vec<StageTime>, WireError> {
    bounded("stage_times", times.len(), limits::STAGES)?;
    let one = |time: pb::StageTime| {
        Ok(StageTime {
            stage: decode_stage_index(time.stage)?,
            compute: Duration::from_micros(time.compute_us),
            wait: Duration::from_micros(time.wait_us),
            behind: Duration::from_micros(time.behind_us),
        })
    };
    times.into_iter().map(one).collect()
}

/// A reply as it goes over the wire.
pub fn encode_reply(reply: &StepReply) -> pb::StepReply {
    let verdict = match reply.verdict {
        StepVerdict::Accepted => pb::StepVerdict::Accepted,
        StepVerdict::Fenced => pb::StepVerdict::Fenced,
        StepVerdict::NotPrepared => pb::StepVerdict::NotPrepared,
        StepVerdict::Corrupt => pb::StepVerdict::Corrupt,
        StepVerdict::DownstreamLost => pb::StepVerdict::DownstreamLost,
        StepVerdict::Busy => pb::StepVerdict::Busy,
        StepVerdict::Invalid => pb::StepVerdict::Invalid,
    };
    pb::StepReply {
        pipeline: reply.at.id.0,
        epoch: reply.at.epoch.0,
        step: reply.step.0,
        stage: reply.stage,
        verdict: verdict.into(),
        detail: reply.detail.clone(),
    }
}

/// A reply as it arrived.
///
/// # Errors
///
/// [`WireError`] if there is no verdict or none of this version, or a stage that no pipeline has.
pub fn decode_reply(reply: pb::StepReply) -> Result<StepReply, WireError> {
    let verdict = match pb::StepVerdict::try_from(reply.verdict) {
        Ok(pb::StepVerdict::Unspecified) => return Err(WireError::Missing { field: "verdict" }),
        Ok(pb::StepVerdict::Accepted) => StepVerdict::Accepted,
        Ok(pb::StepVerdict::Fenced) => StepVerdict::Fenced,
        Ok(pb::StepVerdict::NotPrepared) => StepVerdict::NotPrepared,
        Ok(pb::StepVerdict::Corrupt) => StepVerdict::Corrupt,
        Ok(pb::StepVerdict::DownstreamLost) => StepVerdict::DownstreamLost,
        Ok(pb::StepVerdict::Busy) => StepVerdict::Busy,
        Ok(pb::StepVerdict::Invalid) => StepVerdict::Invalid,
        Err(_) => return Err(unknown("verdict", reply.verdict)),
    };
    Ok(StepReply {
        at: PipelineRef { id: PipelineId(reply.pipeline), epoch: Epoch(reply.epoch) },
        step: StepId(reply.step),
        stage: decode_stage_index(reply.stage)?,
        verdict,
        detail: clipped(reply.detail, limits::DETAIL_BYTES),
    })
}

/// CRC32C over everything that a result says: see `StepResult` in the schema.
pub(super) fn result_crc32c(message: &pb::StepResult) -> u32 {
    let numbers = [message.pipeline, message.epoch, message.term, message.step];
    let crc = numbers.iter().fold(0, |crc, n| crc32c::crc32c_append(crc, &n.to_le_bytes()));
    let crc = crc32c::crc32c_append(crc, &message.src_incarnation);
    crc32c::crc32c_append(crc, &message.payload)
}

/// A result as it goes over the wire.
pub fn encode_result(source: ResultSource, result: &StepResult) -> pb::StepResult {
    let set = pb::ResultSet {
        rows: result.rows.iter().map(encode_row_result).collect(),
        stage_times: result.stage_times.iter().map(encode_time).collect(),
    };
    let mut message = pb::StepResult {
        epoch: result.epoch.0,
        step: result.step.0,
        pipeline: source.pipeline.0,
        term: source.term.0,
        src_incarnation: Bytes::copy_from_slice(&source.incarnation.0),
        payload_crc32c: 0,
        payload: set.encode_to_vec().into(),
    };
    message.payload_crc32c = result_crc32c(&message);
    message
}

fn encode_row_result(row: &RowResult) -> pb::RowResult {
    let mut encoded = pb::RowResult {
        sequence: row.sequence.0,
        generation: row.generation.0,
        position: row.position,
        token_count: row.token_count,
        status: encode_status(row.status).into(),
        detail: row.detail.clone(),
        ..Default::default()
    };
    match &row.value {
        RowValue::None => {}
        RowValue::Sampled(sampled) => {
            encoded.token = Some(sampled.token);
            encoded.logprob = sampled.logprob;
            encoded.top_logprobs = encode_top(&sampled.top);
        }
        RowValue::Scores(scores) => encoded.scores = scores.clone(),
        RowValue::Logits(logits) => encoded.logits = logits.clone(),
        RowValue::State(state) => encoded.state = state.clone(),
    }
    encoded
}

/// A result as it arrived, and where it says that it comes from.
///
/// # Errors
///
/// [`WireError::Corrupt`] if the checksum disagrees, else what is wrong with the first wrong field.
pub fn decode_result(result: pb::StepResult) -> Result<(ResultSource, StepResult), WireError> {
    let (expected, found) = (result.payload_crc32c, result_crc32c(&result));
    if found != expected {
        return Err(WireError::Corrupt { step: result.step, expected, found });
    }
    let source = ResultSource {
        pipeline: PipelineId(result.pipeline),
        term: Term(result.term),
        incarnation: Incarnation::try_from(&result.src_incarnation[..])?,
    };
    check_result_set(&result.payload).map_err(|error| uncounted("payload", error))?;
    let set = pb::ResultSet::decode(result.payload)
        .map_err(|source| WireError::Undecodable { field: "payload", source })?;
    bounded("rows", set.rows.len(), limits::STEP_ROWS)?;
    let result = StepResult {
        epoch: Epoch(result.epoch),
        step: StepId(result.step),
        rows: set.rows.into_iter().map(decode_row_result).collect::<Result<_, _>>()?,
        stage_times: decode_times(set.stage_times)?,
    };
    Ok((source, result))
}

fn decode_row_result(row: pb::RowResult) -> Result<RowResult, WireError> {
    bounded("scores", row.scores.len(), limits::STEP_TOKENS)?;
    let status = decode_status(row.status)?;
    let top = decode_top(row.top_logprobs)?;
    let value = if let Some(token) = row.token {
        RowValue::Sampled(Sampled { token, logprob: row.logprob, top })
    } else if !row.scores.is_empty() {
        RowValue::Scores(row.scores)
    } else if !row.logits.is_empty() {
        RowValue::Logits(row.logits)
    } else if !row.state.is_empty() {
        RowValue::State(row.state)
    } else {
        RowValue::None
    };
    Ok(RowResult {
        sequence: SequenceId(row.sequence),
        generation: Generation(row.generation),
        position: row.position,
        token_count: row.token_count,
        status,
        detail: clipped(row.detail, limits::DETAIL_BYTES),
        value,
    })
}

/// A preparation as it goes over the wire.
pub fn encode_prepare(prepare: &Prepare) -> pb::PrepareRequest {
    pb::PrepareRequest {
        cluster_id: prepare.cluster_id.clone(),
        pipeline: prepare.pipeline.0,
        epoch: prepare.epoch.0,
        term: prepare.term.0,
        dst_incarnation: Bytes::copy_from_slice(&prepare.dst_incarnation.0),
        model_id: Bytes::copy_from_slice(&prepare.model.0),
        kv_type: prepare.kv_type.name().into(),
        stage: prepare.stage,
        stages: prepare.stages.iter().map(encode_stage).collect(),
        kv_blocks: prepare.kv_blocks,
        max_step_tokens: prepare.max_step_tokens,
        max_in_flight: prepare.max_in_flight,
        draws: prepare.draws,
    }
}

fn encode_stage(stage: &StagePlan) -> pb::StageRef {
    pb::StageRef {
        worker: stage.worker.clone(),
        incarnation: Bytes::copy_from_slice(&stage.incarnation.0),
        address: stage.address.clone(),
        layers_begin: stage.layers.start,
        layers_end: stage.layers.end,
    }
}

/// A preparation as it arrived: the stages' layers follow one another from 0 without a gap.
///
/// # Errors
///
/// What is wrong with the first wrong field.
pub fn decode_prepare(request: pb::PrepareRequest) -> Result<Prepare, WireError> {
    bounded("stages", request.stages.len(), limits::STAGES)?;
    bounded("max_step_tokens", request.max_step_tokens as usize, limits::STEP_TOKENS)?;
    let mut next = 0;
    let mut stages = Vec::with_capacity(request.stages.len());
    for stage in request.stages {
        let layers = stage.layers_begin..stage.layers_end;
        if layers.start != next || layers.is_empty() {
            return Err(WireError::Invalid {
                field: "layers of a stage",
                expected: "at least one, following those of the stage before",
                found: format!("{}..{} after {next}", layers.start, layers.end),
            });
        }
        next = layers.end;
        stages.push(StagePlan {
            worker: bounded_text("worker", stage.worker, limits::NAME_BYTES)?,
            incarnation: Incarnation::try_from(&stage.incarnation[..])?,
            address: bounded_text("address", stage.address, limits::NAME_BYTES)?,
            layers,
        });
    }
    if request.stage as usize >= stages.len() {
        return Err(WireError::Invalid {
            field: "stage",
            expected: "an index into stages",
            found: format!("{} of {}", request.stage, stages.len()),
        });
    }
    let at_least_one = |field, value: u32| match value {
        0 => Err(WireError::Invalid { field, expected: "at least 1", found: "0".into() }),
        _ => Ok(value),
    };
    Ok(Prepare {
        cluster_id: bounded_text("cluster_id", request.cluster_id, limits::NAME_BYTES)?,
        pipeline: PipelineId(request.pipeline),
        epoch: Epoch(request.epoch),
        term: Term(request.term),
        dst_incarnation: Incarnation::try_from(&request.dst_incarnation[..])?,
        model: ModelId::try_from(&request.model_id[..])?,
        kv_type: decode_kv_type(&request.kv_type)?,
        stage: request.stage,
        stages,
        kv_blocks: at_least_one("kv_blocks", request.kv_blocks)?,
        max_step_tokens: at_least_one("max_step_tokens", request.max_step_tokens)?,
        max_in_flight: at_least_one("max_in_flight", request.max_in_flight)?,
        draws: request.draws,
    })
}

/// A stage that a worker holds, as it goes over the wire.
pub fn encode_held(held: &HeldStage) -> pb::HeldStage {
    let state = match held.state {
        HeldState::Prepared => pb::HeldState::Prepared,
        HeldState::Active => pb::HeldState::Active,
    };
    pb::HeldStage {
        pipeline: held.at.id.0,
        epoch: held.at.epoch.0,
        term: held.term.0,
        state: state.into(),
        stage: held.stage,
        layers_begin: held.layers.start,
        layers_end: held.layers.end,
        model_id: Bytes::copy_from_slice(&held.model.0),
        kv_type: held.kv_type.name().into(),
        kv_blocks: held.kv_blocks,
        bytes: held.bytes,
    }
}

/// What a worker says of itself, as it arrived.
///
/// # Errors
///
/// What is wrong with the first wrong field.
pub fn decode_description(response: pb::DescribeResponse) -> Result<Description, WireError> {
    bounded("held", response.held.len(), limits::HELD_STAGES)?;
    Ok(Description {
        worker: bounded_text("worker", response.worker, limits::NAME_BYTES)?,
        incarnation: Incarnation::try_from(&response.incarnation[..])?,
        held: response.held.into_iter().map(decode_held).collect::<Result<_, _>>()?,
        prepared_bytes: response.prepared_bytes,
    })
}

fn decode_held(held: pb::HeldStage) -> Result<HeldStage, WireError> {
    let state = match pb::HeldState::try_from(held.state) {
        Ok(pb::HeldState::Unspecified) => return Err(WireError::Missing { field: "state" }),
        Ok(pb::HeldState::Prepared) => HeldState::Prepared,
        Ok(pb::HeldState::Active) => HeldState::Active,
        Err(_) => return Err(unknown("state", held.state)),
    };
    let layers = held.layers_begin..held.layers_end;
    if layers.is_empty() {
        return Err(WireError::Invalid {
            field: "layers of a stage",
            expected: "at least one",
            found: format!("{}..{}", layers.start, layers.end),
        });
    }
    Ok(HeldStage {
        at: PipelineRef { id: PipelineId(held.pipeline), epoch: Epoch(held.epoch) },
        term: Term(held.term),
        state,
        stage: decode_stage_index(held.stage)?,
        layers,
        model: ModelId::try_from(&held.model_id[..])?,
        kv_type: decode_kv_type(&held.kv_type)?,
        kv_blocks: held.kv_blocks,
        bytes: held.bytes,
    })
}

fn decode_kv_type(text: &str) -> Result<KvType, WireError> {
    text.parse().map_err(|_| WireError::Invalid {
        field: "kv_type",
        expected: "f16 or f32",
        found: clipped(text.to_owned(), limits::NAME_BYTES),
    })
}
