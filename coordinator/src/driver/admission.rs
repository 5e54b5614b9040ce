//! Requests on their way into the scheduler, and those that wait for a pipeline to be there.

use proto::BLOCK_TOKENS;
use proto::status::WaitCause;
use tokio::sync::oneshot;

use super::{Admitted, Driver, RequestError, Submission, stopping};
use crate::scheduler::Rejected;
use crate::tick::Tick;

/// A request that came while no pipeline served.
pub(crate) struct Parked {
    submission: Submission,
    reply: oneshot::Sender<Result<Admitted, RequestError>>,
    since: Tick,
}

impl Driver {
    /// Takes a request, lets it wait for a pipeline, or refuses it.
    pub(super) fn submit(
        &mut self,
        submission: Submission,
        reply: oneshot::Sender<Result<Admitted, RequestError>>,
    ) {
        if self.stop.is_cancelled() {
            let _ = reply.send(Err(stopping()));
        } else if self.pipeline.is_some() {
            let since = self.now();
            let outcome = self.admit(submission, since);
            let _ = reply.send(outcome);
        } else if let Some(told) = &self.no_plan {
            // What was told may have changed, and who leads may have become known since.
            let lasts = self.waiting().filter(|waiting| waiting.cause != WaitCause::Starting);
            let reason = lasts.map_or_else(|| told.clone(), |waiting| waiting.detail);
            let _ = reply.send(Err(RequestError::Unavailable { reason }));
        } else if self.parked.len() >= self.config.limits.waiting_requests as usize {
            let limit = self.config.limits.waiting_requests;
            let _ = reply.send(Err(RequestError::Full { limit }));
        } else {
            let since = self.now();
            self.parked.push_back(Parked { submission, reply, since });
        }
    }

    /// A pipeline serves: those who waited for it go first.
    pub(super) fn admit_parked(&mut self) {
        for Parked { submission, reply, since } in std::mem::take(&mut self.parked) {
            if reply.is_closed() {
                continue;
            }
            let outcome = self.admit(submission, since);
            let _ = reply.send(outcome);
        }
    }

    /// Refuses everyone who waits for a pipeline.
    pub(super) fn refuse_parked(&mut self, why: impl Fn() -> RequestError) {
        for parked in std::mem::take(&mut self.parked) {
            let _ = parked.reply.send(Err(why()));
        }
    }

    /// Refuses those who waited for too long, forgets those who went away.
    pub(super) fn expire_parked(&mut self, now: Tick) {
        let patience = self.config.limits.wait;
        let reason = self.cluster.unavailable().unwrap_or("no pipeline is serving").to_owned();
        for parked in std::mem::take(&mut self.parked) {
            if parked.reply.is_closed() {
                continue;
            }
            let waited = now.since(parked.since);
            if waited < patience.min(parked.submission.time_limit) {
                self.parked.push_back(parked);
                continue;
            }
            let reason = format!("waited {} s for a pipeline: {reason}", waited.as_secs());
            let _ = parked.reply.send(Err(RequestError::Unavailable { reason }));
        }
    }

    fn admit(&mut self, submission: Submission, since: Tick) -> Result<Admitted, RequestError> {
        let Submission { mut request, arrived, as_many_as_fit, time_limit, class: wanted } =
            submission;
        let Some(class) = self.pipeline.as_ref().map(|pipeline| pipeline.class) else {
            return Err(RequestError::Unavailable { reason: "no pipeline is serving".into() });
        };
        if let Some(wanted) = wanted.filter(|&wanted| wanted != class) {
            return Err(RequestError::ClassMismatch { wanted, served: class });
        }
        let kv_tokens = self.scheduler.stats().kv_blocks_total.saturating_mul(BLOCK_TOKENS);
        let limit = self.config.limits.context_tokens.min(kv_tokens);
        if as_many_as_fit {
            request.max_tokens = limit.saturating_sub(request.prompt.len() as u32).max(1);
        }
        request.deadline = Some(since + time_limit);
        let (max_tokens, prompt_tokens) = (request.max_tokens, request.prompt.len() as u32);
        let arrived = Tick(arrived.saturating_duration_since(self.started));
        let now = self.now();
        match self.scheduler.submit(request, now) {
            Ok(sequence) => {
                let tokens = self.clients.add(sequence, arrived, prompt_tokens);
                Ok(Admitted { class, max_tokens, answer: Ok(tokens) })
            }
            Err(Rejected::Complete { finish }) => {
                Ok(Admitted { class, max_tokens, answer: Err(finish) })
            }
            Err(rejected) => Err(refused(rejected)),
        }
    }
}

/// What the scheduler's refusal means to a client.
fn refused(rejected: Rejected) -> RequestError {
    match rejected {
        Rejected::Full { limit } => RequestError::Full { limit },
        Rejected::TooLong { prompt_tokens, max_tokens, limit } => RequestError::ContextLength {
            limit: limit.into(),
            prompt_tokens: prompt_tokens.into(),
            requested: u64::from(prompt_tokens) + u64::from(max_tokens),
        },
        Rejected::EmptyPrompt => RequestError::invalid("prompt", rejected.to_string()),
        Rejected::Draining => stopping(),
        _ => RequestError::Unavailable { reason: rejected.to_string() },
    }
}
