//! How a worker goes that was asked to: it says that it drains, serves what it holds until the
//! coordinator has moved that elsewhere, and then leaves the registry.

use std::sync::Arc;
use std::time::Duration;

use node::membership::Membership;
use node::observe::{Condition, Health};
use node::{Chain, TaskError};
use proto::keys::Keys;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::grpc;
use crate::record::Published;
use crate::service::Service;

/// A draining worker to which nobody sent a step for so long is idle: longer than a step of a
/// large model takes to go round its pipeline.
const QUIET: Duration = Duration::from_secs(3);

/// A coordinator that can move what a draining worker holds has begun to within this ...
const MOVED_WITHIN: Duration = Duration::from_secs(10);

/// ... and one that cannot, as with a single worker, only probes a pipeline that is idle: what lies between
/// two probes is longer than this.
const UNUSED: Duration = Duration::from_secs(2);

/// How often it is looked whether everything was retired.
const HELD_POLL: Duration = Duration::from_millis(10);

/// How often the registry is asked whether a coordinator leads, who would retire what is held.
const LEADER_POLL: Duration = Duration::from_secs(1);

/// How long the registry must say that nobody leads: a coordinator that waits for that leads a round
/// trip later ...
const VACANT_FOR: Duration = Duration::from_millis(100);

/// ... and how long it must say nothing: longer than it takes to elect a leader of its own, or to
/// connect to another member of it.
const UNKNOWN_FOR: Duration = Duration::from_secs(3);

/// How long a question to the registry may take, and leaving it; the lease ends by itself if the registry is away.
pub(crate) const REGISTRY_TIMEOUT: Duration = Duration::from_secs(2);

/// What one reading of the leader's key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    /// A coordinator leads.
    Taken,
    /// None does.
    Vacant,
    /// The registry did not say.
    Unknown,
}

/// Since when every reading said that nobody leads, or nothing.
#[derive(Debug, Default)]
struct Vacancy(Option<(Seat, Instant)>);

impl Vacancy {
    /// Takes a reading. Whether those so far prove that there is no coordinator to wait for.
    fn is_certain(&mut self, seat: Seat, now: Instant) -> bool {
        let since = match self.0 {
            Some((last, since)) if last == seat => since,
            _ => now,
        };
        self.0 = Some((seat, since));
        let lasts = now.saturating_duration_since(since);
        match seat {
            Seat::Taken => false,
            Seat::Vacant => lasts >= VACANT_FOR,
            Seat::Unknown => lasts >= UNKNOWN_FOR,
        }
    }

    /// Until the next reading.
    fn pause(&self) -> Duration {
        match self.0 {
            Some((Seat::Vacant, since)) if since.elapsed() < VACANT_FOR => VACANT_FOR,
            _ => LEADER_POLL,
        }
    }
}

/// What is needed to leave well.
pub(crate) struct Leaving {
    pub(crate) id: String,
    pub(crate) published: Arc<Published>,
    pub(crate) membership: Arc<dyn Membership>,
    pub(crate) keys: Keys,
    pub(crate) service: Arc<Service>,
    pub(crate) health: HealthReporter,
    pub(crate) condition: Health,
}

/// Why a draining worker goes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Because {
    /// Nothing is left to serve.
    HoldsNothing,
    /// There is no coordinator to wait for, and nobody sends steps.
    NobodyLeads,
    /// Nobody moved what it holds, and nothing runs on it.
    Unused,
    /// Nobody retired what it holds in time.
    GraceIsOver,
    /// The worker fails, and its streams end.
    Closing,
}

impl Because {
    fn as_str(self) -> &'static str {
        match self {
            Self::HoldsNothing => "it holds no stage",
            Self::NobodyLeads => "no coordinator can be seen to lead, and nobody sends steps",
            Self::Unused => "nobody moved its stages elsewhere, and nothing runs on them",
            Self::GraceIsOver => "nobody retired its stages in time",
            Self::Closing => "it fails",
        }
    }
}

impl Leaving {
    /// After `stop`: says so, refuses what was not prepared before, serves what is held until it was
    /// retired or `grace` is over, leaves the registry, and ends every stream.
    pub(crate) async fn leave_after(
        self,
        stop: CancellationToken,
        grace: Duration,
    ) -> Result<(), TaskError> {
        stop.cancelled().await;
        let end = Instant::now() + grace;
        let closing = self.service.closing().clone();
        let _streams_end = closing.clone().drop_guard();
        tracing::info!(worker = self.id, "draining");
        self.condition.set(Condition::Stopping);
        grpc::set_serving(&self.health, false).await;
        self.service.drain();
        let because = tokio::select! {
            biased;
            () = closing.cancelled() => Because::Closing,
            because = self.until_nothing_is_left() => because,
            () = sleep_until(end) => Because::GraceIsOver,
        };
        tracing::info!(worker = self.id, because = because.as_str(), "leaving");
        if because == Because::Closing {
            // It may not have been said yet: nothing is to be planned with this worker.
            drop(timeout(REGISTRY_TIMEOUT, self.announce()).await);
        }
        self.leave_registry().await;
        if because == Because::GraceIsOver && self.service.is_busy(QUIET) {
            return Err(format!("steps were still in flight after {grace:?}").into());
        }
        Ok(())
    }

    async fn until_nothing_is_left(&self) -> Because {
        self.announce().await;
        tokio::select! {
            biased;
            () = self.holds_nothing() => Because::HoldsNothing,
            () = self.nobody_leads() => Because::NobodyLeads,
            () = self.is_unused() => Because::Unused,
        }
    }

    /// Waits until every stage was retired.
    async fn holds_nothing(&self) {
        while self.service.holds_a_stage() {
            sleep(HELD_POLL).await;
        }
    }

    /// Waits until nothing is in flight and no coordinator can be seen to lead: it would retire what
    /// is held, and until then what is held may be needed.
    async fn nobody_leads(&self) {
        let mut vacancy = Vacancy::default();
        loop {
            let is_certain = vacancy.is_certain(self.look_for_leader().await, Instant::now());
            if is_certain && !self.service.is_busy(QUIET) {
                return;
            }
            sleep(vacancy.pause()).await;
        }
    }

    /// Waits until the coordinator has had the time to move what is held, and nothing runs on it.
    async fn is_unused(&self) {
        sleep(MOVED_WITHIN).await;
        while self.service.is_busy(UNUSED) {
            sleep(HELD_POLL).await;
        }
    }

    async fn look_for_leader(&self) -> Seat {
        let leader = self.keys.leader();
        match timeout(REGISTRY_TIMEOUT, self.membership.list(&leader)).await {
            Ok(Ok(found)) if found.entries.iter().any(|entry| entry.key == leader) => Seat::Taken,
            Ok(Ok(_)) => Seat::Vacant,
            // That etcd is away is said by whoever speaks to it.
            Ok(Err(_)) | Err(_) => Seat::Unknown,
        }
    }

    /// Tells the coordinator. A registry that is away is told when it is back.
    async fn announce(&self) {
        if let Err(error) = self.published.change(|record| record.draining = true).await {
            tracing::info!(error = %Chain(&*error), "the registry does not know yet that we drain");
        }
    }

    /// Best effort: a registry that is away finds out when the lease ends.
    async fn leave_registry(&self) {
        match timeout(REGISTRY_TIMEOUT, self.published.leave()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::info!(error = %Chain(&error), "the registry did not let us go");
            }
            Err(_) => tracing::info!("the registry did not answer in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reading_proves_nothing() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let mut vacancy = Vacancy::default();
        let mut look = |seat, millis| vacancy.is_certain(seat, at(millis));
        assert!(!look(Seat::Unknown, 0), "it did not answer once");
        assert!(!look(Seat::Unknown, 2000));
        assert!(!look(Seat::Taken, 2500));
        assert!(!look(Seat::Unknown, 3500), "it begins anew");
        assert!(!look(Seat::Unknown, 6000));
        assert!(look(Seat::Unknown, 6500), "it is away");
        assert!(!look(Seat::Vacant, 7000), "between two leaders");
        assert!(look(Seat::Vacant, 7100));
        assert!(!look(Seat::Taken, 9000), "one leads after all");
        assert!(!look(Seat::Vacant, 9050));
    }
}
