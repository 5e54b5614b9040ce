//! PURE. Which epochs a worker serves, and under which coordinator: at most one active stage, and
//! beside it one that is prepared to take over.

use proto::held::HeldState;
use proto::ids::{Epoch, Incarnation, PipelineId, Term};
use proto::step::{Prepare, StepHeader, StepVerdict};

/// Why a control call or a reader of results is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum EpochError {
    /// A deposed coordinator.
    #[error("term {found} is over, this worker has seen term {seen}")]
    OldTerm { seen: Term, found: Term },
    /// It was meant for an earlier start of this worker.
    #[error("meant for incarnation {found}, this is {own}")]
    OtherIncarnation { own: Incarnation, found: Incarnation },
    /// Epochs of another cluster cannot be compared with ours.
    #[error("this worker serves cluster {own:?}, not {found:?}; restart it to move it")]
    OtherCluster { own: String, found: String },
    /// A newer epoch took its place.
    #[error("epoch {found} is over, this worker is at epoch {own}")]
    OldEpoch { own: Epoch, found: Epoch },
    /// The epoch is held with other stages, model or sizes.
    #[error("epoch {epoch} is prepared differently here")]
    Differs { epoch: Epoch },
    /// Nothing was prepared for it.
    #[error("this worker was not prepared for epoch {epoch} of pipeline {pipeline}")]
    NotPrepared { pipeline: PipelineId, epoch: Epoch },
    /// The worker is about to stop.
    #[error("this worker is draining")]
    Draining,
}

/// Why a step is refused as a whole.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StepRefusal {
    pub(crate) verdict: StepVerdict,
    /// The worker's own epoch when it fenced.
    pub(crate) epoch: Epoch,
    pub(crate) detail: String,
}

/// Who a control call is for, and whose it claims to be.
#[derive(Debug)]
pub(crate) struct ControlCall<'a> {
    pub(crate) incarnation: Incarnation,
    pub(crate) term: Term,
    /// Named by a `Prepare` only.
    pub(crate) cluster: Option<&'a str>,
}

/// What a `Prepare` asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PrepareAction {
    /// It was done before.
    Nothing,
    /// An engine is needed; then [`Epochs::install`] decides again.
    Build,
}

/// Of what a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Standby,
    Prepared,
    Active,
    Draining,
}

impl State {
    /// As it is written on the wire.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Prepared => "prepared",
            Self::Active => "active",
            Self::Draining => "draining",
        }
    }
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Epochs {
    incarnation: Incarnation,
    /// The highest of any control call, each confirmed by the registry before it comes here. Steps do not raise it: their term is not under the
    /// checksum, and one flipped bit must not lock out every coordinator to come.
    term: Term,
    /// Of the first `Prepare`.
    cluster: Option<String>,
    /// This epoch and all older ones are over.
    over: Epoch,
    prepared: Option<Prepare>,
    active: Option<Prepare>,
    draining: bool,
}

impl Epochs {
    pub(crate) fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            term: Term::default(),
            cluster: None,
            over: Epoch::default(),
            prepared: None,
            active: None,
            draining: false,
        }
    }

    pub(crate) fn term(&self) -> Term {
        self.term
    }

    pub(crate) fn state(&self) -> State {
        match (self.draining, &self.active, &self.prepared) {
            (true, ..) => State::Draining,
            (_, Some(_), _) => State::Active,
            (_, None, Some(_)) => State::Prepared,
            (_, None, None) => State::Standby,
        }
    }

    /// What is active, else what is prepared.
    pub(crate) fn held(&self) -> Option<&Prepare> {
        self.active.as_ref().or(self.prepared.as_ref())
    }

    /// Everything that is active or prepared.
    pub(crate) fn all_held(&self) -> impl Iterator<Item = (HeldState, &Prepare)> {
        let active = self.active.iter().map(|held| (HeldState::Active, held));
        active.chain(self.prepared.iter().map(|held| (HeldState::Prepared, held)))
    }

    pub(crate) fn holds(&self, epoch: Epoch) -> bool {
        self.find(epoch).is_some()
    }

    /// From now on nothing new is prepared. What is held goes on.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// What can be said against a control call without asking who sent it.
    pub(crate) fn check_claim(&self, call: &ControlCall<'_>) -> Result<(), EpochError> {
        self.check_incarnation(call.incarnation)?;
        let other_cluster = call.cluster.is_some_and(|found| self.is_elsewhere(found));
        if call.term < self.term && !other_cluster {
            return Err(EpochError::OldTerm { seen: self.term, found: call.term });
        }
        Ok(())
    }

    fn is_elsewhere(&self, cluster: &str) -> bool {
        self.cluster.as_deref().is_some_and(|own| own != cluster)
    }

    /// Judges a `Prepare` before anything is built.
    pub(crate) fn prepare(&mut self, request: &Prepare) -> Result<PrepareAction, EpochError> {
        self.check_incarnation(request.dst_incarnation)?;
        self.check_cluster(&request.cluster_id)?;
        self.check_sender(request.term, request.dst_incarnation)?;
        let action = self.judge_prepare(request)?;
        if action == PrepareAction::Build {
            // A newer epoch supersedes it, whether or not its engine can be built.
            self.prepared = None;
        }
        Ok(action)
    }

    /// A worker without a stage may be taken over by another cluster, as after a new registry;
    /// the numbers of the old one mean nothing then.
    fn check_cluster(&mut self, found: &str) -> Result<(), EpochError> {
        match &self.cluster {
            Some(own) if own == found => return Ok(()),
            Some(own) if self.held().is_some() => {
                return Err(EpochError::OtherCluster { own: own.clone(), found: found.into() });
            }
            _ => {}
        }
        self.cluster = Some(found.into());
        self.term = Term::default();
        self.over = Epoch::default();
        Ok(())
    }

    /// Judges it again after the engine was built, which takes a while, and takes it in.
    pub(crate) fn install(&mut self, request: Prepare) -> Result<(), EpochError> {
        self.check_sender(request.term, request.dst_incarnation)?;
        if self.judge_prepare(&request)? == PrepareAction::Build {
            self.prepared = Some(request);
        }
        Ok(())
    }

    fn judge_prepare(&self, request: &Prepare) -> Result<PrepareAction, EpochError> {
        if let Some(held) = self.find(request.epoch) {
            // A new coordinator may ask again for what an earlier one prepared.
            let same = Prepare { term: held.term, ..request.clone() } == *held;
            return if same {
                Ok(PrepareAction::Nothing)
            } else {
                Err(EpochError::Differs { epoch: request.epoch })
            };
        }
        let newest = self.newest();
        if request.epoch <= newest {
            return Err(EpochError::OldEpoch { own: newest, found: request.epoch });
        }
        if self.draining {
            return Err(EpochError::Draining);
        }
        Ok(PrepareAction::Build)
    }

    /// Makes a prepared epoch the only one. Saying so twice changes nothing.
    pub(crate) fn activate(
        &mut self,
        pipeline: PipelineId,
        epoch: Epoch,
        term: Term,
        incarnation: Incarnation,
    ) -> Result<(), EpochError> {
        self.check_sender(term, incarnation)?;
        if self.active.as_ref().is_some_and(|a| a.epoch == epoch && a.pipeline == pipeline) {
            return Ok(());
        }
        match self.prepared.take_if(|p| p.epoch == epoch && p.pipeline == pipeline) {
            Some(prepared) => {
                // Epochs are revisions of one registry: all that came before are over.
                self.over = Epoch(epoch.0.saturating_sub(1)).max(self.over);
                self.active = Some(prepared);
                Ok(())
            }
            None if epoch <= self.over => {
                Err(EpochError::OldEpoch { own: self.newest(), found: epoch })
            }
            None => Err(EpochError::NotPrepared { pipeline, epoch }),
        }
    }

    /// Ends this epoch and all older ones. Ending what is not held changes nothing.
    pub(crate) fn retire(
        &mut self,
        epoch: Epoch,
        term: Term,
        incarnation: Incarnation,
    ) -> Result<(), EpochError> {
        self.check_sender(term, incarnation)?;
        self.over = self.over.max(epoch);
        self.active.take_if(|held| held.epoch <= epoch);
        self.prepared.take_if(|held| held.epoch <= epoch);
        Ok(())
    }

    /// Judges who a step is for. Epoch first, then incarnation, then term.
    pub(crate) fn judge(&self, header: &StepHeader) -> Result<(), StepRefusal> {
        let fenced = |detail: String| {
            Err(StepRefusal { verdict: StepVerdict::Fenced, epoch: self.newest(), detail })
        };
        if header.epoch <= self.over {
            let own = self.newest();
            let error = EpochError::OldEpoch { own, found: header.epoch };
            return fenced(error.to_string());
        }
        if let Err(error) = self.check_incarnation(header.dst_incarnation) {
            return fenced(error.to_string());
        }
        if header.term < self.term {
            let (seen, found) = (self.term, header.term);
            return fenced(EpochError::OldTerm { seen, found }.to_string());
        }
        self.check_prepared(header.pipeline, header.epoch).map_err(|error| StepRefusal {
            verdict: StepVerdict::NotPrepared,
            epoch: header.epoch,
            detail: error.to_string(),
        })
    }

    /// Judges who may read results.
    pub(crate) fn judge_reader(
        &self,
        pipeline: PipelineId,
        epoch: Epoch,
        term: Term,
        incarnation: Incarnation,
    ) -> Result<(), EpochError> {
        if epoch <= self.over {
            return Err(EpochError::OldEpoch { own: self.newest(), found: epoch });
        }
        self.check_incarnation(incarnation)?;
        if term < self.term {
            return Err(EpochError::OldTerm { seen: self.term, found: term });
        }
        self.check_prepared(pipeline, epoch)
    }

    fn check_prepared(&self, pipeline: PipelineId, epoch: Epoch) -> Result<(), EpochError> {
        match self.find(epoch) {
            Some(held) if held.pipeline == pipeline => Ok(()),
            _ => Err(EpochError::NotPrepared { pipeline, epoch }),
        }
    }

    /// The highest term wins, from the first call that carries it.
    fn check_sender(&mut self, term: Term, incarnation: Incarnation) -> Result<(), EpochError> {
        self.check_incarnation(incarnation)?;
        if term < self.term {
            return Err(EpochError::OldTerm { seen: self.term, found: term });
        }
        self.term = term;
        Ok(())
    }

    fn check_incarnation(&self, found: Incarnation) -> Result<(), EpochError> {
        if found == self.incarnation {
            Ok(())
        } else {
            Err(EpochError::OtherIncarnation { own: self.incarnation, found })
        }
    }

    fn find(&self, epoch: Epoch) -> Option<&Prepare> {
        [&self.active, &self.prepared].into_iter().flatten().find(|held| held.epoch == epoch)
    }

    /// The newest epoch this worker knows of.
    fn newest(&self) -> Epoch {
        [&self.active, &self.prepared]
            .into_iter()
            .flatten()
            .map(|held| held.epoch)
            .fold(self.over, Epoch::max)
    }
}
