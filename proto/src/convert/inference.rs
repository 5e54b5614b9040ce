//! Requests, answers and status.

use bytes::Bytes;

use super::{WireError, bounded, bounded_text};
use crate::generate::{
    Candidate, ChatMessage, Delta, FinishReason, Finished, GenerateEvent, GenerateRequest,
    Logprobs, Priority, Prompt, Sampling, Started, Timings,
};
use crate::limits;
use crate::pb;
use crate::status::{
    ClusterStatus, ModelStatus, PipelineStatus, PlanStatus, QueueStatus, RateStatus,
    SamplingStatus, StageStatus, StepBudget, WaitCause, Waiting, WorkerStatus,
};

/// A request as it goes over the wire.
pub fn encode_generate(request: &GenerateRequest) -> pb::GenerateRequest {
    use pb::generate_request::Prompt as Wire;
    let prompt = match &request.prompt {
        Prompt::Text(text) => Wire::Text(text.clone()),
        Prompt::Tokens(ids) => Wire::Tokens(pb::TokenIds { ids: ids.clone() }),
        Prompt::Conversation { messages, template_arguments_json } => {
            Wire::Conversation(pb::Conversation {
                messages: messages
                    .iter()
                    .map(|message| pb::ChatMessage {
                        role: message.role.clone(),
                        content: message.content.clone(),
                    })
                    .collect(),
                template_arguments_json: template_arguments_json.clone(),
            })
        }
    };
    let sampling = &request.sampling;
    pb::GenerateRequest {
        model: request.model.clone(),
        prompt: Some(prompt),
        max_tokens: request.max_tokens,
        sampling: Some(pb::Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling
                .logit_bias
                .iter()
                .map(|&(token, bias)| pb::Bias { token, bias })
                .collect(),
        }),
        stop: request.stop.clone(),
        stop_token_ids: request.stop_token_ids.clone(),
        ignore_eos: request.ignore_eos,
        seed: request.seed,
        idempotency_key: request.idempotency_key.clone(),
        class: request.class.clone(),
        resume_index: request.resume_index,
        received_ids: request.received_ids.clone(),
        top_logprobs: request.top_logprobs,
        min_tokens: request.min_tokens,
        include_stop: request.include_stop,
        deadline_ms: request.deadline_ms,
        score_prompt: request.score_prompt,
        cache_salt: request.cache_salt.clone(),
        user: request.user.clone(),
        priority: match request.priority {
            Priority::Interactive => pb::Priority::Interactive,
            Priority::Batch => pb::Priority::Batch,
        }
        .into(),
    }
}

/// A request as it arrived. Ranges of parameters are the coordinator's to check: only sizes are
/// checked here.
///
/// # Errors
///
/// What is wrong with the first wrong field.
pub fn decode_generate(request: pb::GenerateRequest) -> Result<GenerateRequest, WireError> {
    use pb::generate_request::Prompt as Wire;
    let prompt = match request.prompt.ok_or(WireError::Missing { field: "prompt" })? {
        Wire::Text(text) => Prompt::Text(text),
        Wire::Tokens(tokens) => {
            bounded("prompt tokens", tokens.ids.len(), limits::PROMPT_TOKENS)?;
            Prompt::Tokens(tokens.ids)
        }
        Wire::Conversation(conversation) => {
            bounded("messages", conversation.messages.len(), limits::CHAT_MESSAGES)?;
            Prompt::Conversation {
                messages: conversation
                    .messages
                    .into_iter()
                    .map(|message| {
                        let role = bounded_text("role", message.role, limits::NAME_BYTES)?;
                        Ok(ChatMessage { role, content: message.content })
                    })
                    .collect::<Result<_, WireError>>()?,
                template_arguments_json: conversation.template_arguments_json,
            }
        }
    };
    bounded("stop", request.stop.len(), limits::STOP_STRINGS)?;
    for stop in &request.stop {
        bounded("a stop string", stop.len(), limits::STOP_STRING_BYTES)?;
    }
    bounded("stop_token_ids", request.stop_token_ids.len(), limits::STOP_TOKENS)?;
    bounded("received_ids", request.received_ids.len(), limits::PROMPT_TOKENS)?;
    if request.resume_index != request.received_ids.len() as u64 {
        return Err(WireError::Invalid {
            field: "resume_index",
            expected: "the number of received_ids",
            found: format!("{} of {}", request.resume_index, request.received_ids.len()),
        });
    }
    let sampling = request.sampling.unwrap_or_default();
    bounded("logit_bias", sampling.logit_bias.len(), limits::LOGIT_BIAS)?;
    Ok(GenerateRequest {
        model: bounded_text("model", request.model, limits::NAME_BYTES)?,
        prompt,
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        sampling: Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(|bias| (bias.token, bias.bias)).collect(),
        },
        stop: request.stop,
        stop_token_ids: request.stop_token_ids,
        include_stop: request.include_stop,
        ignore_eos: request.ignore_eos,
        seed: request.seed,
        idempotency_key: bounded_text(
            "idempotency_key",
            request.idempotency_key,
            limits::NAME_BYTES,
        )?,
        class: bounded_text("class", request.class, limits::NAME_BYTES)?,
        resume_index: request.resume_index,
        received_ids: request.received_ids,
        top_logprobs: request.top_logprobs,
        score_prompt: request.score_prompt,
        deadline_ms: request.deadline_ms,
        cache_salt: bounded_text("cache_salt", request.cache_salt, limits::CALLER_BYTES)?,
        user: bounded_text("user", request.user, limits::CALLER_BYTES)?,
        priority: decode_priority(request.priority)?,
    })
}

fn decode_priority(priority: i32) -> Result<Priority, WireError> {
    match pb::Priority::try_from(priority) {
        Ok(pb::Priority::Unspecified | pb::Priority::Interactive) => Ok(Priority::Interactive),
        Ok(pb::Priority::Batch) => Ok(Priority::Batch),
        Err(_) => Err(WireError::Invalid {
            field: "priority",
            expected: "PRIORITY_INTERACTIVE or PRIORITY_BATCH",
            found: priority.to_string(),
        }),
    }
}

/// An event as it goes over the wire.
pub fn encode_event(event: &GenerateEvent) -> pb::GenerateEvent {
    use pb::generate_event::Event as Wire;
    let event = match event {
        GenerateEvent::Started(started) => Wire::Started(pb::Started {
            request_id: started.request_id.clone(),
            model: started.model.clone(),
            class: started.class.clone(),
            seed: started.seed,
            prompt_tokens: started.prompt_tokens,
            max_tokens: started.max_tokens,
            prompt_logprobs: started.prompt_logprobs.iter().map(encode_logprobs).collect(),
        }),
        GenerateEvent::Delta(delta) => Wire::Delta(pb::Delta {
            index: delta.index,
            tokens: delta.tokens.clone(),
            text: delta.text.clone(),
            logprobs: delta.logprobs.iter().map(encode_logprobs).collect(),
        }),
        GenerateEvent::Finished(finished) => Wire::Finished(pb::Finished {
            finish_reason: finished.reason.name().into(),
            prompt_tokens: finished.prompt_tokens,
            completion_tokens: finished.completion_tokens,
            timings: Some(pb::Timings {
                queue_us: finished.timings.queue_us,
                prefill_us: finished.timings.prefill_us,
                decode_us: finished.timings.decode_us,
                cached_tokens: finished.timings.cached_tokens,
            }),
            stop_reason: finished.stop_reason.clone(),
        }),
    };
    pb::GenerateEvent { event: Some(event) }
}

/// An event as it arrived.
///
/// # Errors
///
/// What is wrong with the first wrong field.
pub fn decode_event(event: pb::GenerateEvent) -> Result<GenerateEvent, WireError> {
    use pb::generate_event::Event as Wire;
    Ok(match event.event.ok_or(WireError::Missing { field: "event" })? {
        Wire::Started(started) => GenerateEvent::Started(Started {
            request_id: started.request_id,
            model: started.model,
            class: started.class,
            seed: started.seed,
            prompt_tokens: started.prompt_tokens,
            max_tokens: started.max_tokens,
            prompt_logprobs: started.prompt_logprobs.into_iter().map(decode_logprobs).collect(),
        }),
        Wire::Delta(delta) => GenerateEvent::Delta(Delta {
            index: delta.index,
            tokens: delta.tokens,
            text: delta.text,
            logprobs: delta.logprobs.into_iter().map(decode_logprobs).collect(),
        }),
        Wire::Finished(finished) => {
            let reason = match finished.finish_reason.as_str() {
                "stop" => FinishReason::Stop,
                "length" => FinishReason::Length,
                _ => {
                    return Err(WireError::Invalid {
                        field: "finish_reason",
                        expected: "stop or length",
                        found: super::clipped(finished.finish_reason, limits::NAME_BYTES),
                    });
                }
            };
            let timings = finished.timings.unwrap_or_default();
            GenerateEvent::Finished(Finished {
                reason,
                stop_reason: finished.stop_reason,
                prompt_tokens: finished.prompt_tokens,
                completion_tokens: finished.completion_tokens,
                timings: Timings {
                    queue_us: timings.queue_us,
                    prefill_us: timings.prefill_us,
                    decode_us: timings.decode_us,
                    cached_tokens: timings.cached_tokens,
                },
            })
        }
    })
}

fn encode_logprobs(logprobs: &Logprobs) -> pb::Logprobs {
    pb::Logprobs {
        token: logprobs.token,
        logprob: logprobs.logprob,
        token_bytes: Bytes::copy_from_slice(&logprobs.token_bytes),
        top: logprobs
            .top
            .iter()
            .map(|candidate| pb::Candidate {
                token: candidate.token,
                logprob: candidate.logprob,
                token_bytes: Bytes::copy_from_slice(&candidate.token_bytes),
            })
            .collect(),
    }
}

fn decode_logprobs(logprobs: pb::Logprobs) -> Logprobs {
    Logprobs {
        token: logprobs.token,
        logprob: logprobs.logprob,
        token_bytes: logprobs.token_bytes.into(),
        top: logprobs
            .top
            .into_iter()
            .map(|candidate| Candidate {
                token: candidate.token,
                logprob: candidate.logprob,
                token_bytes: candidate.token_bytes.into(),
            })
            .collect(),
    }
}

fn encode_sampling_defaults(sampling: &SamplingStatus) -> pb::SamplingDefaults {
    let SamplingStatus { temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens } =
        *sampling;
    pb::SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens }
}

fn decode_sampling_defaults(sampling: pb::SamplingDefaults) -> SamplingStatus {
    let pb::SamplingDefaults {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        max_new_tokens,
    } = sampling;
    SamplingStatus { temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens }
}

/// The cluster's status as it goes over the wire.
pub fn encode_status(status: &ClusterStatus) -> pb::StatusResponse {
    pb::StatusResponse {
        cluster: status.cluster.clone(),
        cluster_id: status.cluster_id.clone(),
        term: status.term,
        class: status.class.clone(),
        model: Some(pb::ModelStatus {
            name: status.model.name.clone(),
            id: status.model.id.clone(),
            layers: status.model.layers,
            context: status.model.context,
            has_tokenizer: status.model.has_tokenizer,
            sampling: Some(encode_sampling_defaults(&status.model.sampling)),
        }),
        workers: status
            .workers
            .iter()
            .map(|worker| pb::WorkerStatus {
                id: worker.id.clone(),
                address: worker.address.clone(),
                incarnation: worker.incarnation.clone(),
                state: worker.state.clone(),
                isa: worker.isa.clone(),
                threads: worker.threads,
                memory_bytes: worker.memory_bytes,
                detail: worker.detail.clone(),
                rack: worker.rack.clone(),
            })
            .collect(),
        pipelines: status.plan.pipelines.iter().map(encode_pipeline).collect(),
        queue: Some(pb::QueueStatus {
            running: status.queue.running,
            waiting: status.queue.waiting,
            waiting_limit: status.queue.waiting_limit,
            waiting_tokens: status.queue.waiting_tokens,
            waiting_tokens_limit: status.queue.waiting_tokens_limit,
            kv_blocks_total: status.queue.kv_blocks_total,
            kv_blocks_used: status.queue.kv_blocks_used,
        }),
        rates: Some(pb::RateStatus {
            prompt_tokens_per_s: status.rates.prompt_tokens_per_s,
            generated_tokens_per_s: status.rates.generated_tokens_per_s,
            requests_finished: status.rates.requests_finished,
            requests_failed: status.rates.requests_failed,
            prompt_tokens: status.rates.prompt_tokens,
            generated_tokens: status.rates.generated_tokens,
        }),
        reason: status.plan.reason.clone(),
        version: status.version.clone(),
        ready: status.ready,
        waiting: status.waiting.as_ref().map(encode_waiting),
        admin: status.admin.clone().unwrap_or_default(),
    }
}

fn encode_waiting(waiting: &Waiting) -> pb::Waiting {
    let cause = match waiting.cause {
        WaitCause::Starting => pb::WaitCause::Starting,
        WaitCause::Leadership => pb::WaitCause::Leadership,
        WaitCause::Registry => pb::WaitCause::Registry,
        WaitCause::Workers => pb::WaitCause::Workers,
        WaitCause::Memory => pb::WaitCause::Memory,
        WaitCause::Refused => pb::WaitCause::Refused,
        WaitCause::Lost => pb::WaitCause::Lost,
    };
    pb::Waiting { cause: cause.into(), detail: waiting.detail.clone() }
}

/// A cause that this version does not know reads as one that passes.
fn decode_waiting(waiting: pb::Waiting) -> Waiting {
    let cause = match waiting.cause() {
        pb::WaitCause::Unspecified | pb::WaitCause::Starting => WaitCause::Starting,
        pb::WaitCause::Leadership => WaitCause::Leadership,
        pb::WaitCause::Registry => WaitCause::Registry,
        pb::WaitCause::Workers => WaitCause::Workers,
        pb::WaitCause::Memory => WaitCause::Memory,
        pb::WaitCause::Refused => WaitCause::Refused,
        pb::WaitCause::Lost => WaitCause::Lost,
    };
    Waiting { cause, detail: waiting.detail }
}

fn encode_pipeline(pipeline: &PipelineStatus) -> pb::PipelineStatus {
    pb::PipelineStatus {
        pipeline: pipeline.id,
        epoch: pipeline.epoch,
        state: pipeline.state.clone(),
        stages: pipeline
            .stages
            .iter()
            .map(|stage| pb::StageStatus {
                worker: stage.worker.clone(),
                address: stage.address.clone(),
                layers_begin: stage.layers[0],
                layers_end: stage.layers[1],
                compute_ms: stage.compute_ms,
                wait_ms: stage.wait_ms,
                steps: stage.steps,
                busy_ms: stage.busy_ms,
                waited_ms: stage.waited_ms,
                predicted_busy: stage.predicted_busy,
                predicted_tokens_per_s: stage.predicted_tokens_per_s,
            })
            .collect(),
        predicted_tokens_per_s: pipeline.predicted_tokens_per_s,
        steps: pipeline.steps,
        on_way_ms: pipeline.on_way_ms,
        budget: Some(encode_budget(&pipeline.budget)),
    }
}

fn encode_budget(budget: &StepBudget) -> pb::StepBudget {
    pb::StepBudget {
        target_ms: budget.target_ms,
        chunk_tokens: budget.chunk_tokens,
        chunk_tokens_last: budget.chunk_tokens_last,
        step_ms: budget.step_ms,
        token_ms: budget.token_ms,
        scale: budget.scale,
        context_ms: budget.context_ms,
    }
}

fn decode_budget(budget: pb::StepBudget) -> StepBudget {
    StepBudget {
        target_ms: budget.target_ms,
        chunk_tokens: budget.chunk_tokens,
        chunk_tokens_last: budget.chunk_tokens_last,
        step_ms: budget.step_ms,
        token_ms: budget.token_ms,
        scale: budget.scale,
        context_ms: budget.context_ms,
    }
}

/// The cluster's status as it arrived; what is absent reads as empty.
pub fn decode_status(status: pb::StatusResponse) -> ClusterStatus {
    let model = status.model.unwrap_or_default();
    let queue = status.queue.unwrap_or_default();
    let rates = status.rates.unwrap_or_default();
    ClusterStatus {
        cluster: status.cluster,
        cluster_id: status.cluster_id,
        term: status.term,
        class: status.class,
        ready: status.ready,
        version: status.version,
        model: ModelStatus {
            name: model.name,
            id: model.id,
            layers: model.layers,
            context: model.context,
            has_tokenizer: model.has_tokenizer,
            sampling: model.sampling.map(decode_sampling_defaults).unwrap_or_default(),
        },
        workers: status
            .workers
            .into_iter()
            .map(|worker| WorkerStatus {
                id: worker.id,
                address: worker.address,
                incarnation: worker.incarnation,
                state: worker.state,
                isa: worker.isa,
                threads: worker.threads,
                memory_bytes: worker.memory_bytes,
                detail: worker.detail,
                rack: worker.rack,
            })
            .collect(),
        plan: PlanStatus {
            pipelines: status.pipelines.into_iter().map(decode_pipeline).collect(),
            reason: status.reason,
        },
        queue: QueueStatus {
            running: queue.running,
            waiting: queue.waiting,
            waiting_limit: queue.waiting_limit,
            waiting_tokens: queue.waiting_tokens,
            waiting_tokens_limit: queue.waiting_tokens_limit,
            kv_blocks_total: queue.kv_blocks_total,
            kv_blocks_used: queue.kv_blocks_used,
        },
        rates: RateStatus {
            prompt_tokens_per_s: rates.prompt_tokens_per_s,
            generated_tokens_per_s: rates.generated_tokens_per_s,
            requests_finished: rates.requests_finished,
            requests_failed: rates.requests_failed,
            prompt_tokens: rates.prompt_tokens,
            generated_tokens: rates.generated_tokens,
        },
        waiting: status.waiting.map(decode_waiting),
        admin: Some(status.admin).filter(|admin| !admin.is_empty()),
    }
}

fn decode_pipeline(pipeline: pb::PipelineStatus) -> PipelineStatus {
    PipelineStatus {
        id: pipeline.pipeline,
        epoch: pipeline.epoch,
        state: pipeline.state,
        stages: pipeline
            .stages
            .into_iter()
            .map(|stage| StageStatus {
                worker: stage.worker,
                address: stage.address,
                layers: [stage.layers_begin, stage.layers_end],
                compute_ms: stage.compute_ms,
                wait_ms: stage.wait_ms,
                steps: stage.steps,
                busy_ms: stage.busy_ms,
                waited_ms: stage.waited_ms,
                predicted_busy: stage.predicted_busy,
                predicted_tokens_per_s: stage.predicted_tokens_per_s,
            })
            .collect(),
        predicted_tokens_per_s: pipeline.predicted_tokens_per_s,
        steps: pipeline.steps,
        on_way_ms: pipeline.on_way_ms,
        budget: decode_budget(pipeline.budget.unwrap_or_default()),
    }
}
