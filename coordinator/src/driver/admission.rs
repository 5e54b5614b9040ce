//! Requests on their way into the router, and those that wait for a first pipeline to be there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use tokio::sync::oneshot;

use super::control::{CHORES_AT_ONCE, Driver};
use super::{Admitted, RequestError, Submission, stopping};
use crate::cluster::Availability;
use crate::router::{Rejected, Taken};
use crate::scheduler::{EmissionEvent, SequenceError};
use crate::tick::Tick;

/// Requests that one look for gone clients asks, in a row of all of them.
const LOOK: usize = 1024;

/// How a request is answered.
pub(super) type Reply = oneshot::Sender<Result<Admitted, RequestError>>;

/// Requests that came while no pipeline served, in order of arrival.
#[derive(Default)]
pub(super) struct Parking {
    parked: BTreeMap<u64, Parked>,
    /// When each has waited for too long.
    late: BTreeSet<(Tick, u64)>,
    last: u64,
    /// The last whose client was looked for.
    looked_at: Option<u64>,
}

struct Parked {
    submission: Box<Submission>,
    reply: Reply,
    since: Tick,
    late_at: Tick,
}

impl Parking {
    pub(super) fn len(&self) -> usize {
        self.parked.len()
    }

    fn park(&mut self, submission: Box<Submission>, reply: Reply, since: Tick, wait: Duration) {
        let late_at = since + wait.min(submission.time_limit);
        self.last += 1;
        self.late.insert((late_at, self.last));
        self.parked.insert(self.last, Parked { submission, reply, since, late_at });
    }

    fn remove(&mut self, number: u64) -> Option<Parked> {
        let parked = self.parked.remove(&number)?;
        self.late.remove(&(parked.late_at, number));
        Some(parked)
    }

    fn pop_first(&mut self) -> Option<Parked> {
        let (&number, _) = self.parked.first_key_value()?;
        self.remove(number)
    }

    fn pop_late(&mut self, now: Tick) -> Option<Parked> {
        let &(at, number) = self.late.first()?;
        if at > now {
            return None;
        }
        self.late.pop_first();
        self.remove(number)
    }

    /// Forgets those whose clients went away; looks at [`LOOK`] of them.
    fn forget_gone(&mut self) {
        let from = self.looked_at.map_or(Bound::Unbounded, Bound::Excluded);
        let looked_at = self.parked.range((from, Bound::Unbounded)).take(LOOK);
        let (mut count, mut last, mut gone) = (0, None, Vec::new());
        for (&number, parked) in looked_at {
            (count, last) = (count + 1, Some(number));
            if parked.reply.is_closed() {
                gone.push(number);
            }
        }
        self.looked_at = last.filter(|_| count == LOOK);
        for number in gone {
            self.remove(number);
        }
    }
}

impl Driver {
    /// Takes a request, lets it wait for a pipeline, or refuses it.
    pub(super) fn submit(&mut self, submission: Box<Submission>, reply: Reply) {
        let now = self.now();
        let limit = self.config.limits.waiting_requests;
        if self.is_closed() {
            let _ = reply.send(Err(stopping()));
        } else if self.serves() && self.parking.len() == 0 {
            let outcome = self.admit(*submission, now);
            let _ = reply.send(outcome);
        } else if !self.serves() && matches!(self.cluster.availability(), Availability::No(_)) {
            let reason = self.why_unavailable();
            let _ = reply.send(Err(RequestError::Unavailable { reason }));
        } else if self.parking.len() >= limit as usize {
            let retry_after = self.retry_after();
            let _ = reply.send(Err(RequestError::Full { limit, retry_after }));
        } else {
            self.parking.park(submission, reply, now, self.config.limits.wait);
        }
    }

    /// Whether a pipeline serves.
    pub(super) fn serves(&self) -> bool {
        !self.lanes.serving().is_empty()
    }

    /// Whether those who wait for a pipeline may go on.
    pub(super) fn may_unpark(&self) -> bool {
        self.parking.len() > 0 && self.serves()
    }

    /// A pipeline serves: those who waited for it go first, some at a time.
    pub(super) fn unpark(&mut self) {
        for _ in 0..CHORES_AT_ONCE {
            let Some(Parked { submission, reply, since, .. }) = self.parking.pop_first() else {
                return;
            };
            if !reply.is_closed() {
                let outcome = self.admit(*submission, since);
                let _ = reply.send(outcome);
            }
        }
    }

    /// Refuses those who wait for a pipeline, some at a time.
    pub(super) fn refuse_parked(&mut self) {
        for _ in 0..CHORES_AT_ONCE {
            let (Some(why), Some(parked)) = (&self.refusing, self.parking.pop_first()) else {
                self.refusing = None;
                return;
            };
            let _ = parked.reply.send(Err(RequestError::Unavailable { reason: why.clone() }));
        }
    }

    /// Refuses those who waited for too long, some at a time, and forgets those who went away. How
    /// many were refused.
    pub(super) fn expire_parked(&mut self, now: Tick) -> usize {
        self.parking.forget_gone();
        for count in 0..CHORES_AT_ONCE {
            let Some(late) = self.parking.pop_late(now) else { return count };
            let is_own = late.submission.time_limit <= self.config.limits.wait;
            let error = too_late(now.since(late.since), is_own, &self.why_unavailable());
            let _ = late.reply.send(Err(error));
        }
        CHORES_AT_ONCE
    }

    fn admit(&mut self, submission: Submission, since: Tick) -> Result<Admitted, RequestError> {
        let Submission { mut sequence, wish, arrived, time_limit } = submission;
        sequence.set_deadline(since + time_limit);
        let prompt_tokens = sequence.prompt_tokens();
        let arrived = Tick(arrived.saturating_duration_since(self.started));
        // It has waited since then: waiting for a pipeline and for KV are one wait to its client.
        let outcome = self.router.submit(sequence, wish, since);
        self.tell_gave_way();
        match outcome {
            Ok(Taken { sequence, class, max_tokens }) => {
                let tokens = self.clients.add(sequence, arrived, prompt_tokens);
                Ok(Admitted { class, max_tokens, answer: Ok(tokens) })
            }
            Err(Rejected::Complete { finish, class, max_tokens }) => {
                Ok(Admitted { class, max_tokens, answer: Err(finish) })
            }
            Err(rejected) => Err(refused(rejected, self.retry_after())),
        }
    }

    /// Tells those who were refused for a newcomer.
    fn tell_gave_way(&mut self) {
        let mut emissions = self.router.take_gave_way();
        if emissions.is_empty() {
            return;
        }
        let wait = self.retry_after();
        for emission in &mut emissions {
            if let EmissionEvent::Failed(SequenceError::GaveWay { retry_after, .. }) =
                &mut emission.event
            {
                *retry_after = wait;
            }
        }
        self.emit(emissions);
    }
}

/// What is said of a request that waited for a pipeline for too long. Its own limit is no fault of the
/// cluster's that another try would not meet.
fn too_late(waited: Duration, is_own: bool, why: &str) -> RequestError {
    let reason = format!("waited {} s for a pipeline: {why}", waited.as_secs());
    match is_own {
        true => RequestError::TimedOut {
            reason: format!("the deadline of the request passed: {reason}"),
        },
        false => RequestError::Unavailable { reason },
    }
}

/// What the router's refusal means to a client.
fn refused(rejected: Rejected, retry_after: Duration) -> RequestError {
    match rejected {
        Rejected::Full { limit } => RequestError::Full { limit, retry_after },
        Rejected::FullOfTokens { waiting, limit } => {
            RequestError::FullOfTokens { waiting, limit, retry_after }
        }
        Rejected::TooLong { prompt_tokens, max_tokens, limit } => RequestError::ContextLength {
            limit: limit.into(),
            prompt_tokens: prompt_tokens.into(),
            requested: u64::from(prompt_tokens) + u64::from(max_tokens),
        },
        Rejected::Class { wanted, served } => RequestError::ClassMismatch { wanted, served },
        Rejected::Draining => stopping(),
        _ => RequestError::Unavailable { reason: rejected.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::Wish;
    use crate::scheduler::{Request, Sequence};

    fn submission(limit_ms: u64) -> Box<Submission> {
        Box::new(Submission {
            sequence: Box::new(Sequence::new(Request::probe(1)).unwrap()),
            wish: Wish::default(),
            arrived: tokio::time::Instant::now(),
            time_limit: Duration::from_millis(limit_ms),
        })
    }

    #[test]
    fn a_deadline_of_ones_own_is_told_as_such() {
        let waited = Duration::from_secs(3);
        let own = too_late(waited, true, "no worker is there");
        let RequestError::TimedOut { reason } = own else { panic!("{own}") };
        assert_eq!(
            reason,
            "the deadline of the request passed: waited 3 s for a pipeline: no worker is there"
        );
        assert!(matches!(too_late(waited, false, ""), RequestError::Unavailable { .. }));
    }

    #[test]
    fn those_who_wait_for_a_pipeline_leave_in_order_late_or_unseen() {
        let mut parking = Parking::default();
        let mut clients = Vec::new();
        for (since, limit) in [(0, 9000), (10, 100), (20, 9000), (30, 9000)] {
            let (reply, client) = oneshot::channel();
            let wait = Duration::from_secs(1);
            parking.park(submission(limit), reply, Tick::from_millis(since), wait);
            clients.push(client);
        }
        assert!(parking.pop_late(Tick::from_millis(109)).is_none());
        let late = parking.pop_late(Tick::from_millis(110)).expect("its own limit");
        assert_eq!(late.since, Tick::from_millis(10));
        drop(clients.remove(2));
        parking.forget_gone();
        assert_eq!((parking.len(), parking.late.len()), (2, 2));
        assert_eq!(parking.pop_first().unwrap().since, Tick::ZERO);
        let late = parking.pop_late(Tick::from_millis(1030)).expect("the limit of all");
        assert_eq!(late.since, Tick::from_millis(30));
        assert!(parking.pop_first().is_none() && parking.late.is_empty());
    }
}
