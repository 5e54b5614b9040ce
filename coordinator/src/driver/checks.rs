//! What readiness is made of, for people who ask why.

use super::control::{Driver, READY_WITHIN};

/// One of the things that must hold for requests to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    /// Whether it holds.
    pub(crate) passes: bool,
    /// Whether readiness needs it: a coordinator that has a pipeline serves without the others.
    pub(crate) needed: bool,
    /// How it is, for people.
    pub(crate) detail: String,
}

impl Driver {
    /// All checks, those first that readiness needs.
    pub(super) fn checks(&self) -> Vec<Check> {
        let reports = self.lanes.reports();
        let stopping = self.is_stopping();
        let names: Vec<_> = reports.iter().map(|report| report.at.to_string()).collect();
        let silent_for = self.lanes.proven().map(|proven| self.now().since(proven));
        let waiting = self.waiting().map(|waiting| waiting.detail);
        let term = self.leadership.as_ref().map(|leadership| leadership.term);
        vec![
            Check {
                name: "process",
                passes: !stopping,
                needed: true,
                detail: if stopping { "it was told to stop" } else { "it runs" }.to_owned(),
            },
            Check {
                name: "pipelines",
                passes: !names.is_empty(),
                needed: true,
                detail: match (names.is_empty(), waiting) {
                    (false, _) => format!("{} serve: {}", names.len(), names.join(", ")),
                    (true, Some(why)) => format!("none serves: {why}"),
                    (true, None) => "none serves".to_owned(),
                },
            },
            Check {
                name: "tokens",
                passes: silent_for.is_some_and(|silent| silent < READY_WITHIN),
                needed: true,
                detail: match silent_for {
                    Some(silent) => {
                        format!("the last came through {:.1} s ago", silent.as_secs_f64())
                    }
                    None => "none has come through".to_owned(),
                },
            },
            Check {
                name: "leadership",
                passes: term.is_some(),
                needed: false,
                detail: match (term, &self.leader) {
                    (Some(term), _) => format!("leads in term {term}"),
                    (None, Some(leader)) => format!("the coordinator at {leader} leads"),
                    (None, None) => "does not lead".to_owned(),
                },
            },
            Check {
                name: "registry",
                passes: matches!(self.registry, Some((_, None))),
                needed: false,
                detail: match &self.registry {
                    None => "was not asked yet".to_owned(),
                    Some((at, None)) => {
                        format!("answered {} s ago", self.now().since(*at).as_secs())
                    }
                    Some((at, Some(fault))) => {
                        format!("failed {} s ago: {fault}", self.now().since(*at).as_secs())
                    }
                },
            },
        ]
    }
}
