//! What operators order: who may be told to, and what becomes of it.

use proto::operator::{Drain, DrainState, Drained, Planned};
use tokio::sync::oneshot;

use super::control::Driver;
use crate::cluster;
use crate::planner::Problem;

/// Operators that wait for a plan at once: one person, and a script that goes on without her.
const PLANS_AWAITED: usize = 8;

/// Workers that are named to somebody who asks for one that is not there.
const NAMED_WORKERS: usize = 16;

/// Why an order was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum OrderError {
    /// Another coordinator decides.
    #[error("this coordinator does not lead{}", others(leader.as_deref()))]
    NotLeading {
        /// Where the other is, if that is known.
        leader: Option<String>,
    },
    /// It leads, and does not know yet what there is.
    #[error("this coordinator has only begun to lead: the plan and the workers are being read")]
    Beginning,
    /// Somebody else's cluster is reached.
    #[error("this coordinator is of cluster {own:?}, {meant:?} was meant")]
    OtherCluster {
        /// Its id.
        own: String,
        /// The id in the order.
        meant: String,
    },
    /// There is no such worker.
    #[error("there is no worker {worker:?}; {there}")]
    UnknownWorker {
        /// Who was asked for.
        worker: String,
        /// Who is there, for people.
        there: String,
    },
    /// It cannot be kept any more.
    #[error("worker {worker:?} drains by itself, or was told to end: it goes")]
    TooLate {
        /// Which worker.
        worker: String,
    },
    /// Too many wait.
    #[error("{PLANS_AWAITED} others wait for a plan already")]
    Full,
    /// The process ends.
    #[error("the coordinator is stopping")]
    Stopping,
}

fn others(leader: Option<&str>) -> String {
    leader.map(|leader| format!("; the one at {leader} does")).unwrap_or_default()
}

/// Where the outcome of a plan goes.
pub(super) type PlanReply = oneshot::Sender<Result<Planned, OrderError>>;

impl Driver {
    /// Takes an order about a worker, and tells how far it is. The same order again changes nothing.
    pub(super) fn drain(&mut self, order: &Drain) -> Result<Drained, OrderError> {
        self.may_order(&order.cluster_id)?;
        let Drain { worker, incarnation: meant, cancel, force, .. } = order;
        let gone = |incarnation| {
            let (state, detail) = (DrainState::Gone, String::new());
            Drained { incarnation, state, detail, kept: true }
        };
        let before = self.cluster.drained(worker);
        let there = before.as_ref().map(|drained| drained.incarnation);
        match (there, *meant) {
            (None, None) => {
                let (worker, there) = (worker.clone(), self.who_is_there());
                return Err(OrderError::UnknownWorker { worker, there });
            }
            (there, Some(meant)) if there != Some(meant) => return Ok(gone(meant)),
            _ => {}
        }
        if *cancel || before.is_some_and(|drained| drained.state == DrainState::InUse) {
            tracing::info!(worker, cancel, force, "an operator orders a drain");
        }
        let (drain, force) = (!cancel, *force && !cancel);
        let event = cluster::Event::DrainWorker { worker: worker.clone(), drain, force };
        self.tell_cluster(event);
        let drained = self.cluster.drained(worker);
        let drained = drained.or_else(|| there.map(gone)).ok_or(OrderError::Stopping)?;
        if *cancel && drained.state != DrainState::InUse {
            return Err(OrderError::TooLate { worker: worker.clone() });
        }
        Ok(drained)
    }

    /// Plans because somebody wants it; `reply` hears what came of it once that is decided.
    pub(super) fn plan_now(&mut self, cluster_id: &str, least_gain: bool, reply: PlanReply) {
        self.planners.retain(|waiting| !waiting.is_closed());
        let refused = match self.may_order(cluster_id) {
            Ok(()) if self.planners.len() >= PLANS_AWAITED => Some(OrderError::Full),
            Ok(()) => None,
            Err(error) => Some(error),
        };
        if let Some(error) = refused {
            // Whoever went away needs no answer.
            let _ = reply.send(Err(error));
            return;
        }
        tracing::info!(least_gain, "an operator orders a plan");
        self.planners.push(reply);
        self.tell_cluster(cluster::Event::PlanNow { any_gain: !least_gain });
    }

    /// What the planner would be asked now.
    pub(super) fn question(&self, cluster_id: &str) -> Result<Problem, OrderError> {
        self.may_order(cluster_id)?;
        Ok(self.cluster.question())
    }

    /// Tells those who wait for a plan, once it is decided or will not be here.
    pub(super) fn answer_planners(&mut self) {
        if self.planners.is_empty() {
            return;
        }
        let answer = match (self.cluster.leads(), self.cluster.planned()) {
            (false, _) => Err(self.leader.clone()),
            (true, Some(planned)) => Ok(planned.clone()),
            (true, None) => return,
        };
        for reply in self.planners.drain(..) {
            let answer = answer.clone().map_err(|leader| OrderError::NotLeading { leader });
            let _ = reply.send(answer);
        }
    }

    fn may_order(&self, cluster_id: &str) -> Result<(), OrderError> {
        let own = &self.config.cluster.cluster_id;
        if !cluster_id.is_empty() && cluster_id != own {
            let (own, meant) = (own.clone(), cluster_id.to_owned());
            return Err(OrderError::OtherCluster { own, meant });
        }
        if self.is_stopping() {
            return Err(OrderError::Stopping);
        }
        match (&self.leadership, self.cluster.takes_orders()) {
            (Some(_), true) => Ok(()),
            (Some(_), false) => Err(OrderError::Beginning),
            (None, _) => Err(OrderError::NotLeading { leader: self.leader.clone() }),
        }
    }

    /// The workers that are there, for people.
    fn who_is_there(&self) -> String {
        let workers = self.cluster.view().workers;
        if workers.is_empty() {
            return "there are no workers".to_owned();
        }
        let named: Vec<_> = workers.iter().take(NAMED_WORKERS).map(|one| one.id.as_str()).collect();
        match workers.len() - named.len() {
            0 => format!("there are {}", named.join(", ")),
            more => format!("there are {} and {more} more", named.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests;
