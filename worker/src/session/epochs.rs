//! PURE. Which epochs a worker serves, and under which coordinator: at most one active stage, and
//! beside it one that is prepared to take over.
//!
//! Terms and epochs are revisions of the registry and can be compared within one history of it. A
//! registry that was lost or restored from a backup begins another: its cluster id is new, or a
//! reading of it shows what a later one never can (a leader of a lower term, a lower revision).
//! Then what was seen before says nothing any more, and what was held is let go.

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
    /// The registry was read later for another cluster.
    #[error("this worker serves cluster {own:?} by now, not {found:?}")]
    OtherCluster { own: String, found: String },
    /// The registry was lost or went back while the stage was built.
    #[error("the registry began anew while the stage of epoch {epoch} was built")]
    OtherHistory { epoch: Epoch },
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

/// The reading of the registry by which a control call was believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sighting {
    /// Readings are numbered in the order in which they were made; none is older than the one before.
    pub(crate) number: u64,
    /// The registry's revision.
    pub(crate) revision: u64,
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
    /// The registry's, as the last `Prepare` named it.
    cluster: Option<String>,
    /// Number of the last reading by which a call was believed.
    sighted: u64,
    /// How often all this began anew.
    history: u64,
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
            sighted: 0,
            history: 0,
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

    /// Whether a call that names this term, and perhaps asks for this stage, can be true in another
    /// history of the registry only: then it takes a reading that was made for it.
    ///
    /// # Errors
    ///
    /// If it is not for this process, whoever sent it.
    pub(crate) fn doubts(
        &self,
        incarnation: Incarnation,
        term: Term,
        prepare: Option<&Prepare>,
    ) -> Result<bool, EpochError> {
        self.check_incarnation(incarnation)?;
        let doubtful = prepare.is_some_and(|request| {
            self.is_elsewhere(&request.cluster_id) || self.judge_prepare(request).is_err()
        });
        Ok(term < self.term || doubtful)
    }

    /// Which history of the registry this is, counted from 0.
    pub(crate) fn history(&self) -> u64 {
        self.history
    }

    fn is_elsewhere(&self, cluster: &str) -> bool {
        self.cluster.as_deref().is_some_and(|own| own != cluster)
    }

    /// Begins anew if the registry did. Returns whether.
    fn follow_registry(&mut self, cluster: Option<&str>, term: Term, sighting: Sighting) -> bool {
        if sighting.number < self.sighted {
            // The registry said something else later. This reading tells nothing new.
            return false;
        }
        self.sighted = sighting.number;
        let is_elsewhere = cluster.is_some_and(|cluster| self.is_elsewhere(cluster));
        let went_back = term < self.term || sighting.revision < self.newest().0;
        if !is_elsewhere && !went_back {
            return false;
        }
        self.term = Term::default();
        self.over = Epoch::default();
        self.active = None;
        self.prepared = None;
        self.history += 1;
        true
    }

    /// Judges a `Prepare` before anything is built.
    pub(crate) fn prepare(
        &mut self,
        request: &Prepare,
        sighting: Sighting,
    ) -> Result<PrepareAction, EpochError> {
        self.check_incarnation(request.dst_incarnation)?;
        let began_anew = self.follow_registry(Some(&request.cluster_id), request.term, sighting);
        if began_anew || self.cluster.is_none() {
            self.cluster = Some(request.cluster_id.clone());
        }
        self.check_cluster(&request.cluster_id)?;
        self.check_sender(request.term, request.dst_incarnation)?;
        let action = self.judge_prepare(request)?;
        if action == PrepareAction::Build {
            // A newer epoch supersedes it, whether or not its engine can be built.
            self.prepared = None;
        }
        Ok(action)
    }

    fn check_cluster(&self, found: &str) -> Result<(), EpochError> {
        match &self.cluster {
            Some(own) if own != found => {
                Err(EpochError::OtherCluster { own: own.clone(), found: found.into() })
            }
            _ => Ok(()),
        }
    }

    /// Judges it again after the engine was built, which takes a while, and takes it in. `history` is
    /// the one in which it was asked for.
    pub(crate) fn install(&mut self, request: Prepare, history: u64) -> Result<(), EpochError> {
        if history != self.history {
            return Err(EpochError::OtherHistory { epoch: request.epoch });
        }
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
        sighting: Sighting,
    ) -> Result<(), EpochError> {
        self.check_incarnation(incarnation)?;
        self.follow_registry(None, term, sighting);
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
        sighting: Sighting,
    ) -> Result<(), EpochError> {
        self.check_incarnation(incarnation)?;
        let began_anew = self.follow_registry(None, term, sighting);
        self.check_sender(term, incarnation)?;
        if began_anew {
            // Nothing is held, and an epoch of before is no number of this history.
            return Ok(());
        }
        self.over = self.over.max(epoch);
        self.active.take_if(|held| held.epoch <= epoch);
        self.prepared.take_if(|held| held.epoch <= epoch);
        Ok(())
    }

    /// The newest epoch that has ended by word of a coordinator.
    pub(crate) fn over(&self) -> Epoch {
        self.over
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

    /// Whether a step is of an epoch or of a coordinator that is over, whatever else can be said of it.
    pub(crate) fn outdates(&self, header: &StepHeader) -> bool {
        header.epoch <= self.over || header.term < self.term
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

#[cfg(test)]
mod tests;
