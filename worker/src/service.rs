//! The worker behind its gRPC service: holds its stages, prepares and retires them, and sends
//! each step to the stage that it is for. Decisions are those of [`Epochs`].

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use kernels::KERNEL_REVISION;
use model::{Store, WeightFile};
use node::Chain;
use proto::held::{HeldStage, HeldState};
use proto::ids::{
    Epoch, Incarnation, KeyDigest, KnownAnswer, ModelId, NumericsClass, PipelineId, PipelineRef,
    StepId, Term,
};
use proto::key::CoordinatorKey;
use proto::limits;
use proto::plan::KvType;
use proto::step::{Prepare, StepHeader};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::bridge::{EngineFailure, EngineHandle, IN_FLIGHT_MAX};
use crate::callers::Caller;
use crate::engine::{
    Engine, EngineConfig, EngineError, StageModel, WeightMemory, kv_bytes, stage_weight_bytes,
    weight_copies, working_bytes,
};
use crate::error::ServiceError;
use crate::executor::Executor;
use crate::pace::Pace;
use crate::reserve::{Charge, Reserve, Shortage};
use crate::session::epochs::{EpochError, Epochs, PrepareAction, Sighting, State, StepRefusal};
use crate::stage::{ResultReader, Stage};
use crate::stub::{self, StubExecutor, StubProfile};
use crate::witness::{Claim, Witness, WitnessError};
use crate::{link, verify};

/// Room in a step's message for everything that is not activations.
const STEP_OVERHEAD_BYTES: usize = 16 << 20;

/// How long an engine that is built waits for whoever asked for it: several times what a coordinator lets
/// pass between two tries.
const UNCLAIMED_FOR: Duration = Duration::from_secs(180);

/// Calls that wait for their turn to prepare: one for every stage that may be held. Their messages are
/// held meanwhile.
const PREPARES_WAITING: usize = limits::HELD_STAGES;

/// Whether the holder of a key is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquaintance {
    /// Its key is that of a stage's coordinator.
    Known,
    /// There is a stage that asks for no key, or there is none: who calls does not tell anything.
    Unclear,
    /// It shows another key than that of every stage, or none.
    Stranger,
}

/// Who this worker is; none of it changes while the process lives.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) incarnation: Incarnation,
    /// How every engine computes; KV and step sizes are those of its stage, and threads those of
    /// [`Service::threads`].
    pub(crate) engine: EngineConfig,
    /// For weights, KV and the working memory of steps together.
    pub(crate) memory_bytes: u64,
    pub(crate) known_answer: KnownAnswer,
    pub(crate) stores: Vec<Arc<Store>>,
    /// Nothing is computed, and neither weights nor keys and values are held.
    pub(crate) stub: Option<StubProfile>,
}

/// Bytes for weights and KV of `memory_bytes`: the rest is for what engines write beside those,
/// whichever of the models and whichever of its stages is held.
pub(crate) fn offered_bytes(
    memory_bytes: u64,
    stores: &[Arc<Store>],
    engine: &EngineConfig,
) -> u64 {
    let working = stores.iter().map(|store| working_bytes(store.config(), true, engine)).max();
    memory_bytes.saturating_sub(working.unwrap_or(0))
}

/// What a worker says of itself.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) state: State,
    pub(crate) term: Term,
    pub(crate) held: Option<Prepare>,
    /// Everything that it holds, `held` among it.
    pub(crate) stages: Vec<HeldStage>,
    /// Executed since the process started.
    pub(crate) steps: u64,
    /// Bytes of weights that were hashed and read into memory for stages since then.
    pub(crate) prepared_bytes: u64,
}

/// What became of a `Prepare`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared {
    pub(crate) class: NumericsClass,
    pub(crate) weight_bytes: u64,
    pub(crate) kv_bytes: u64,
}

/// An engine with everything that decides what it holds. Epochs that ask for the same share it:
/// an unchanged stage keeps its KV.
#[derive(Debug)]
pub(crate) struct Holding {
    shape: HoldingShape,
    engine: EngineHandle,
    hidden: usize,
    weights: Vec<WeightFile>,
    weight_bytes: u64,
    kv_bytes: u64,
    /// That it computes with, however many others may have.
    threads: usize,
    /// Held by the engine's thread as well, until it has ended.
    charge: Arc<Charge>,
}

/// An engine that is being built, or was and nobody took it yet: whoever asked for it may have gone
/// away, and come back.
#[derive(Debug)]
struct Build {
    shape: HoldingShape,
    /// Of the call that asked for it last, and when.
    epoch: Epoch,
    asked: Instant,
    done: JoinHandle<Result<Holding, ServiceError>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct HoldingShape {
    model: ModelId,
    layers: Range<u32>,
    kv_type: KvType,
    kv_blocks: u32,
    max_step_tokens: u32,
    draws: bool,
}

/// No engine is built while it lives.
#[derive(Debug)]
pub(crate) struct Resting<'a> {
    _building: tokio::sync::MutexGuard<'a, Option<Build>>,
}

/// A stage and its tasks, which end with it.
#[derive(Debug)]
struct Running {
    stage: Arc<Stage>,
    holding: Arc<Holding>,
    _tasks: JoinSet<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stage.retire();
    }
}

#[derive(Debug)]
struct Held {
    epochs: Epochs,
    running: Vec<Running>,
}

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Service {
    identity: Identity,
    witness: Witness,
    held: Mutex<Held>,
    /// One call prepares at a time, and one engine is built at a time. A call that is given up leaves
    /// what it began to the next.
    preparing: tokio::sync::Mutex<Option<Build>>,
    /// [`PREPARES_WAITING`].
    prepares: Semaphore,
    /// See [`Description::prepared_bytes`].
    prepared_bytes: Arc<AtomicU64>,
    reserve: Arc<Reserve>,
    failures: mpsc::Sender<EngineFailure>,
    pace: Arc<Pace>,
    /// Of engines that are built from now on.
    threads: AtomicUsize,
    /// Every stream ends when it fires.
    closing: CancellationToken,
    /// The process drains and ends when it fires.
    stop: CancellationToken,
}

impl Service {
    /// A worker that stands by. A panic of an engine goes to `failures`; it fires `stop` when the
    /// coordinator dismisses it.
    pub(crate) fn new(
        identity: Identity,
        witness: Witness,
        failures: mpsc::Sender<EngineFailure>,
        closing: CancellationToken,
        stop: CancellationToken,
    ) -> Self {
        let epochs = Epochs::new(identity.incarnation);
        Self {
            reserve: Reserve::new(identity.memory_bytes),
            threads: AtomicUsize::new(identity.engine.threads),
            identity,
            witness,
            held: Mutex::new(Held { epochs, running: Vec::new() }),
            preparing: tokio::sync::Mutex::default(),
            prepares: Semaphore::new(PREPARES_WAITING),
            prepared_bytes: Arc::default(),
            failures,
            pace: Arc::default(),
            closing,
            stop,
        }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How long its steps take.
    pub(crate) fn pace(&self) -> &Pace {
        &self.pace
    }

    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Gets ready to be one stage of a pipeline, beside what is active.
    ///
    /// # Errors
    ///
    /// [`ServiceError`]; what was held before is held still, except what was only prepared.
    pub(crate) async fn prepare(
        &self,
        request: Prepare,
        caller: Caller,
    ) -> Result<Prepared, ServiceError> {
        let Caller { key, address } = caller;
        let cluster = Some(request.cluster_id.as_str());
        let claim = Claim { term: request.term, epoch: request.epoch, key, address, cluster };
        let sighting = self.confirm(request.dst_incarnation, Some(&request), claim).await?;
        let _place = self.prepares.try_acquire().map_err(|_| ServiceError::Crowded {
            calls: "preparations",
            limit: PREPARES_WAITING,
        })?;
        let mut building = self.preparing.lock().await;
        let shape = self.check_request(&request)?;
        let (same, history) = {
            let mut held = self.held();
            let action = held.change(|epochs| epochs.prepare(&request, sighting))?;
            if action == PrepareAction::Nothing {
                let running = held.running.iter().find(|r| r.serves(request.epoch));
                // Of the coordinator that asks now, should another have asked before.
                running.iter().for_each(|running| running.stage.belongs_to(key));
                let holding = running.map(|running| running.holding.clone());
                return holding.map(|h| self.prepared(&h)).ok_or(ServiceError::Gone);
            }
            let same = held.running.iter().find(|running| running.holding.shape == shape);
            let same = same.map(|running| running.holding.clone());
            // What was prepared and is now superseded makes room; what is active stays.
            held.forget_what_is_over();
            (same, held.epochs.history())
        };
        let holding = match same {
            Some(holding) => {
                Self::forget_unclaimed(&mut building);
                holding
            }
            None => Arc::new(self.built(&mut building, shape, request.epoch).await?),
        };
        let prepared = self.prepared(&holding);
        let running = self.start(request.clone(), key, holding);
        let mut held = self.held();
        held.epochs.install(request, history)?;
        held.running.push(running);
        Ok(prepared)
    }

    /// Believes a control call, or says why not.
    async fn confirm(
        &self,
        incarnation: Incarnation,
        prepare: Option<&Prepare>,
        claim: Claim<'_>,
    ) -> Result<Sighting, ServiceError> {
        let afresh = self.held().epochs.doubts(incarnation, claim.term, prepare)?;
        let confirmed = self.witness.confirm(claim, afresh).await;
        let seen = self.held().epochs.term();
        match confirmed {
            Err(WitnessError::NotTheLeader { found, .. }) if found < seen => {
                Err(EpochError::OldTerm { seen, found }.into())
            }
            confirmed => Ok(confirmed?),
        }
    }

    /// What can be said against a request without looking at what is held.
    fn check_request(&self, request: &Prepare) -> Result<HoldingShape, ServiceError> {
        let own = &request.stages[request.stage as usize];
        if own.worker != self.identity.id || own.incarnation != self.identity.incarnation {
            return Err(ServiceError::NotThisWorker {
                stage: request.stage,
                worker: own.worker.clone(),
                incarnation: own.incarnation,
                own: self.identity.id.clone(),
            });
        }
        if request.max_in_flight > IN_FLIGHT_MAX {
            return Err(ServiceError::InFlight { found: request.max_in_flight });
        }
        let store = self.store(request.model)?;
        let config = store.config();
        let planned_layers = request.stages.last().map_or(0, |stage| stage.layers.end);
        if planned_layers != config.layers {
            return Err(ServiceError::Layers { planned_layers, model_layers: config.layers });
        }
        let row_bytes = config.hidden as usize * size_of::<f32>();
        let tokens_max = (limits::MESSAGE_BYTES - STEP_OVERHEAD_BYTES) / row_bytes;
        if request.max_step_tokens as usize > tokens_max {
            return Err(ServiceError::StepTokens {
                found: request.max_step_tokens,
                most: tokens_max as u32,
            });
        }
        Ok(HoldingShape {
            model: request.model,
            layers: own.layers.clone(),
            kv_type: request.kv_type,
            kv_blocks: request.kv_blocks,
            max_step_tokens: request.max_step_tokens,
            draws: request.draws,
        })
    }

    fn store(&self, model: ModelId) -> Result<&Arc<Store>, ServiceError> {
        let mut stores = self.identity.stores.iter();
        stores.find(|store| store.id().0 == model.0).ok_or(ServiceError::UnknownModel { model })
    }

    /// The engine of this shape: the one that an earlier call began, or a new one. May be given up at
    /// any moment and called again.
    async fn built(
        &self,
        building: &mut Option<Build>,
        shape: HoldingShape,
        epoch: Epoch,
    ) -> Result<Holding, ServiceError> {
        if let Some(other) = building.as_mut().filter(|build| build.shape != shape) {
            // It cannot be stopped, and two at a time would need the memory of both.
            drop((&mut other.done).await);
            *building = None;
        }
        if let Some(build) = building.take_if(|build| build.done.is_finished()) {
            // Of a call that was given up, however long ago: what failed then may go well now.
            match build.done.await {
                Ok(Ok(holding)) => return Ok(holding),
                Ok(Err(error)) => match self.judge_failure(error) {
                    damaged @ ServiceError::Damaged { .. } => return Err(damaged),
                    error => tracing::info!(error = %Chain(&error), "an earlier build had failed"),
                },
                Err(error) => tracing::warn!(%error, "an earlier build had panicked"),
            }
        }
        let build = match building {
            Some(build) => build,
            None => {
                // Counted and built with as many threads, also should that change meanwhile.
                let config = self.engine_config(&shape);
                let charge = self.charge(&shape, &config).await?;
                building.insert(self.begin_build(shape, config, epoch, charge)?)
            }
        };
        (build.epoch, build.asked) = (epoch, Instant::now());
        let built = (&mut build.done).await;
        *building = None;
        built.map_err(ServiceError::Build)?.map_err(|error| self.judge_failure(error))
    }

    /// Ends the worker if a store holds something else than when it was opened: nobody must plan with
    /// it again and again.
    fn judge_failure(&self, error: ServiceError) -> ServiceError {
        match error {
            ServiceError::Engine(EngineError::Store(source)) if source.is_damage() => {
                let error = ServiceError::Damaged { detail: Chain(&source).to_string() };
                // A failure that is there already ends it as well.
                let failure = EngineFailure::Refused(EngineError::Changed(source));
                drop(self.failures.try_send(failure));
                error
            }
            error => error,
        }
    }

    /// Lets go of an engine that was built and that nobody came back for.
    fn forget_unclaimed(building: &mut Option<Build>) {
        drop(building.take_if(|build| build.done.is_finished()));
    }

    /// Lets go of an engine that was built and whose epoch is over, or that nobody asked for in a long time.
    pub(crate) fn forget_unwanted(&self) {
        // Whoever prepares at the moment decides itself.
        let Ok(mut building) = self.preparing.try_lock() else { return };
        let over = self.held().epochs.over();
        let is_unwanted =
            |build: &Build| build.epoch <= over || build.asked.elapsed() >= UNCLAIMED_FOR;
        let Some(build) = building.take_if(|build| build.done.is_finished() && is_unwanted(build))
        else {
            return;
        };
        if let Some(Ok(Err(error))) = build.done.now_or_never() {
            // Nobody was there to hear it; damaged weights end this worker all the same.
            let error = self.judge_failure(error);
            tracing::info!(error = %Chain(&error), "an engine that nobody waited for was not built");
        }
    }

    /// Memory for an engine of this shape, beside what is held.
    async fn charge(
        &self,
        shape: &HoldingShape,
        config: &EngineConfig,
    ) -> Result<Charge, ServiceError> {
        let needed_bytes = self.needed_bytes(shape, config)?;
        let kept_bytes = self.holdings().iter().map(|holding| holding.charge.bytes()).sum();
        let taken = self.reserve.take(needed_bytes, kept_bytes).await;
        taken.map_err(|Shortage { needed_bytes, available_bytes }| ServiceError::Memory {
            needed_bytes,
            available_bytes,
        })
    }

    fn needed_bytes(
        &self,
        shape: &HoldingShape,
        config: &EngineConfig,
    ) -> Result<u64, ServiceError> {
        if self.identity.stub.is_some() {
            return Ok(stub::kept_bytes(&shape.layers, shape.kv_blocks));
        }
        let store = self.store(shape.model)?;
        let has_head = shape.draws || shape.layers.end == store.config().layers;
        let weights = stage_weight_bytes(store, &shape.layers, has_head)
            .saturating_mul(weight_copies(config));
        let working = working_bytes(store.config(), has_head, config);
        Ok(weights.saturating_add(shape.kv_bytes(store)).saturating_add(working))
    }

    fn engine_config(&self, shape: &HoldingShape) -> EngineConfig {
        EngineConfig {
            kv_type: shape.kv_type,
            kv_blocks: shape.kv_blocks,
            max_step_tokens: shape.max_step_tokens,
            threads: self.threads(),
            ..self.identity.engine
        }
    }

    /// Compute threads of engines that are built from now on.
    pub(crate) fn threads(&self) -> usize {
        self.threads.load(Ordering::Relaxed)
    }

    /// Engines that are built from now on have so many threads.
    pub(crate) fn set_threads(&self, threads: usize) {
        self.threads.store(threads, Ordering::Relaxed);
    }

    /// Compute threads that steps really have: no more than the engine that is held was built with.
    pub(crate) fn threads_in_use(&self) -> usize {
        let built = self.holdings().iter().map(|holding| holding.threads).min();
        built.map_or(self.threads(), |built| built.min(self.threads()))
    }

    /// Keeps this worker from building an engine for as long as the guard lives; `None` if it has a
    /// stage or is building one.
    pub(crate) fn rest(&self) -> Option<Resting<'_>> {
        let building = self.preparing.try_lock().ok()?;
        let is_idle = building.is_none() && !self.holds_a_stage();
        is_idle.then_some(Resting { _building: building })
    }

    /// Bytes that the planner may give to weights and KV.
    pub(crate) fn offered_bytes(&self) -> u64 {
        let Identity { memory_bytes, stores, engine, .. } = &self.identity;
        offered_bytes(*memory_bytes, stores, &EngineConfig { threads: self.threads(), ..*engine })
    }

    /// Maps and verifies weights and gets memory, off the async threads.
    fn begin_build(
        &self,
        shape: HoldingShape,
        config: EngineConfig,
        epoch: Epoch,
        charge: Charge,
    ) -> Result<Build, ServiceError> {
        let store = self.store(shape.model)?.clone();
        let failures = self.failures.clone();
        let prepared_bytes = self.prepared_bytes.clone();
        let (of, charge) = (shape.clone(), Arc::new(charge));
        let profile = self.identity.stub;
        let threads = config.threads;
        let build = move || {
            if let Some(profile) = profile {
                let model = store.config();
                let hidden = model.hidden as usize;
                let layers = shape.layers.clone();
                let executor = StubExecutor::new(profile, model, layers, shape.kv_blocks);
                let engine = EngineHandle::start_charged(executor, Some(charge.clone()), failures)
                    .map_err(ServiceError::Thread)?;
                let weights = Vec::new();
                let (weight_bytes, kv_bytes) = (0, 0);
                return Ok(Holding {
                    shape,
                    engine,
                    hidden,
                    weights,
                    weight_bytes,
                    kv_bytes,
                    threads,
                    charge,
                });
            }
            let has_head = shape.draws || shape.layers.end == store.config().layers;
            let read = |bytes| _ = prepared_bytes.fetch_add(bytes, Ordering::Relaxed);
            verify::stage(&store, &shape.layers, has_head, read).map_err(EngineError::Store)?;
            let model = match shape.draws {
                true => StageModel::open_to_draw(&store, shape.layers.clone())?,
                false => StageModel::open(&store, shape.layers.clone())?,
            };
            if config.placement.weights == WeightMemory::Map {
                // The engine does it too, and then finds them there; here it is told how far it is.
                model.populate(read);
            }
            let weight_bytes = model.weight_bytes().saturating_mul(weight_copies(&config));
            let kv_bytes = shape.kv_bytes(&store);
            let engine = Engine::new(model, config)?;
            let (hidden, weights) = (engine.hidden(), engine.weight_files());
            let executor = Executor::new(engine, store.config().context);
            let engine = EngineHandle::start_charged(executor, Some(charge.clone()), failures)
                .map_err(ServiceError::Thread)?;
            Ok(Holding { shape, engine, hidden, weights, weight_bytes, kv_bytes, threads, charge })
        };
        let asked = Instant::now();
        Ok(Build { shape: of, epoch, asked, done: tokio::task::spawn_blocking(build) })
    }

    /// What is held, each once.
    pub(crate) fn holdings(&self) -> Vec<Arc<Holding>> {
        let held = self.held();
        let mut holdings: Vec<Arc<Holding>> = Vec::with_capacity(held.running.len());
        for running in &held.running {
            // An epoch that follows another may share its engine.
            if !holdings.iter().any(|known| Arc::ptr_eq(known, &running.holding)) {
                holdings.push(running.holding.clone());
            }
        }
        holdings
    }

    fn start(
        &self,
        request: Prepare,
        key: Option<CoordinatorKey>,
        holding: Arc<Holding>,
    ) -> Running {
        let (stage, finisher) = Stage::new(
            request,
            key,
            holding.hidden,
            holding.engine.clone(),
            self.pace.clone(),
            self.closing.child_token(),
        );
        let mut tasks = JoinSet::new();
        tasks.spawn(finisher);
        if let Some(next) = stage.next() {
            tasks.spawn(link::run(stage.clone(), next.clone()));
        }
        Running { stage, holding, _tasks: tasks }
    }

    fn prepared(&self, holding: &Holding) -> Prepared {
        let HoldingShape { model, kv_type, .. } = holding.shape;
        let known_answer = self.identity.known_answer;
        Prepared {
            class: NumericsClass::form(model, kv_type, KERNEL_REVISION, known_answer),
            weight_bytes: holding.weight_bytes,
            kv_bytes: holding.kv_bytes,
        }
    }

    /// Makes a prepared epoch the only one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Epoch`].
    pub(crate) async fn activate(
        &self,
        pipeline: PipelineId,
        epoch: Epoch,
        term: Term,
        incarnation: Incarnation,
        caller: Caller,
    ) -> Result<(), ServiceError> {
        let Caller { key, address } = caller;
        let claim = Claim { term, epoch, key, address, cluster: None };
        let sighting = self.confirm(incarnation, None, claim).await?;
        let mut held = self.held();
        held.change(|epochs| epochs.activate(pipeline, epoch, term, incarnation, sighting))?;
        held.forget_what_is_over();
        tracing::info!(%pipeline, %epoch, %term, "epoch is active");
        Ok(())
    }

    /// Ends an epoch and all older ones.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Epoch`].
    pub(crate) async fn retire(
        &self,
        PipelineRef { id: pipeline, epoch }: PipelineRef,
        term: Term,
        incarnation: Incarnation,
        caller: Caller,
    ) -> Result<(), ServiceError> {
        // What is held may be of before the registry was lost, and beyond its revision now; that it ends
        // locks nobody out.
        let claimed = if self.held().epochs.holds(epoch) { Epoch::default() } else { epoch };
        let Caller { key, address } = caller;
        let claim = Claim { term, epoch: claimed, key, address, cluster: None };
        let sighting = self.confirm(incarnation, None, claim).await?;
        let mut held = self.held();
        held.change(|epochs| epochs.retire(epoch, term, incarnation, sighting))?;
        held.forget_what_is_over();
        if let Ok(mut building) = self.preparing.try_lock() {
            Self::forget_unclaimed(&mut building);
        }
        tracing::info!(%pipeline, %epoch, %term, "epoch is over");
        Ok(())
    }

    /// Begins to end the process, as SIGTERM does: what it holds is served until it was moved.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if the call is not the leading coordinator's, or meant for another process.
    pub(crate) async fn dismiss(
        &self,
        term: Term,
        incarnation: Incarnation,
        caller: Caller,
    ) -> Result<(), ServiceError> {
        let Caller { key, address } = caller;
        let claim = Claim { term, epoch: Epoch::default(), key, address, cluster: None };
        self.confirm(incarnation, None, claim).await?;
        tracing::info!(%term, "the coordinator wants nothing more of this worker");
        self.stop.cancel();
        Ok(())
    }

    pub(crate) fn describe(&self) -> Description {
        let held = self.held();
        Description {
            state: held.epochs.state(),
            term: held.epochs.term(),
            held: held.epochs.held().cloned(),
            stages: held.stages(),
            steps: self.pace.steps(),
            prepared_bytes: self.prepared_bytes.load(Ordering::Relaxed),
        }
    }

    /// What the key of this digest tells of who shows it.
    pub(crate) fn acquaintance(&self, shown: Option<KeyDigest>) -> Acquaintance {
        let held = self.held();
        let mut admits = held.running.is_empty();
        for Running { stage, .. } in &held.running {
            match stage.admits(shown) {
                true if stage.has_key() => return Acquaintance::Known,
                stage_admits => admits |= stage_admits,
            }
        }
        if admits { Acquaintance::Unclear } else { Acquaintance::Stranger }
    }

    /// The stage that a step is for, and the index under which this worker speaks if it is for
    /// none.
    pub(crate) fn judge(&self, header: &StepHeader) -> Result<Arc<Stage>, (StepRefusal, u32)> {
        let held = self.held();
        let speaks_as = held.epochs.held().map_or(0, |prepare| prepare.stage);
        held.epochs.judge(header).map_err(|refusal| (refusal, speaks_as))?;
        let running = held.running.iter().find(|running| running.serves(header.epoch));
        Ok(running.expect("every epoch that is held runs").stage.clone())
    }

    /// Whether a step is of an epoch or of a coordinator that is over.
    pub(crate) fn outdates(&self, header: &StepHeader) -> bool {
        self.held().epochs.outdates(header)
    }

    /// Makes the caller the reader of a last stage's results.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Epoch`], or [`ServiceError::NoResults`] if others come after this stage.
    pub(crate) fn results(
        &self,
        pipeline: PipelineId,
        epoch: Epoch,
        term: Term,
        incarnation: Incarnation,
        after: StepId,
        key: Option<CoordinatorKey>,
    ) -> Result<ResultReader, ServiceError> {
        let held = self.held();
        held.epochs.judge_reader(pipeline, epoch, term, incarnation)?;
        let running = held.running.iter().find(|running| running.serves(epoch));
        let stage = &running.ok_or(ServiceError::Gone)?.stage;
        if !stage.admits(key.map(|key| key.digest())) {
            return Err(ServiceError::Key);
        }
        if !stage.is_last() {
            let prepare = stage.prepare();
            let (stage, stages) = (prepare.stage, prepare.stages.len());
            return Err(ServiceError::NoResults { stage, stages });
        }
        Ok(stage.read(after))
    }

    /// Refuses from now on to prepare what was not prepared before.
    pub(crate) fn drain(&self) {
        self.held().epochs.drain();
    }

    /// Whether any stage is active or prepared.
    pub(crate) fn holds_a_stage(&self) -> bool {
        self.held().epochs.held().is_some()
    }

    /// Whether anything is in flight: somebody who sends steps is connected to a stage, and did so less
    /// than `quiet` ago or waits for what they gave.
    pub(crate) fn is_busy(&self, quiet: Duration) -> bool {
        self.held().running.iter().any(|running| running.stage.is_busy(quiet))
    }

    /// Nothing that may panic runs while it is held.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn stages(&self) -> Vec<HeldStage> {
        let stage = |(state, prepare): (HeldState, &Prepare)| {
            let mut running = self.running.iter();
            let running = running.find(|running| running.serves(prepare.epoch));
            HeldStage {
                at: PipelineRef { id: prepare.pipeline, epoch: prepare.epoch },
                term: prepare.term,
                state,
                stage: prepare.stage,
                layers: prepare.stages[prepare.stage as usize].layers.clone(),
                model: prepare.model,
                kv_type: prepare.kv_type,
                kv_blocks: prepare.kv_blocks,
                // Every epoch that is held runs.
                bytes: running.map_or(0, |running| running.holding.charge.bytes()),
            }
        };
        self.epochs.all_held().map(stage).collect()
    }

    /// Changes the epochs. What was held in an earlier history of the registry ends with it, whatever
    /// comes of the change.
    fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Epochs) -> Result<T, EpochError>,
    ) -> Result<T, EpochError> {
        let (before, seen) = (self.epochs.history(), self.epochs.term());
        let outcome = change(&mut self.epochs);
        if self.epochs.history() != before {
            self.forget_what_is_over();
            let term = self.epochs.term();
            tracing::warn!(%term, %seen, "the registry began anew: nothing of before counts");
        }
        outcome
    }

    fn forget_what_is_over(&mut self) {
        let Self { epochs, running } = self;
        running.retain(|running| epochs.holds(running.stage.prepare().epoch));
    }
}

impl Running {
    fn serves(&self, epoch: Epoch) -> bool {
        self.stage.prepare().epoch == epoch
    }
}

impl Holding {
    /// The files whose bytes the engine computes with.
    pub(crate) fn weight_files(&self) -> &[WeightFile] {
        &self.weights
    }
}

impl HoldingShape {
    fn kv_bytes(&self, store: &Store) -> u64 {
        let layer_count = self.layers.end.saturating_sub(self.layers.start);
        kv_bytes(store.config(), layer_count, self.kv_type, self.kv_blocks)
    }
}

#[cfg(test)]
impl Service {
    /// Bytes that engines have, also those that were retired a moment ago.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.reserve.used_bytes()
    }

    /// Waits until no engine has any memory.
    pub(crate) async fn memory_is_free(&self) {
        self.reserve.is_free().await;
    }

    /// Which task builds an engine, or did for nobody who is there any more.
    pub(crate) async fn build_in_progress(&self) -> Option<tokio::task::Id> {
        self.preparing.lock().await.as_ref().map(|build| build.done.id())
    }

    /// Whether that task is done.
    pub(crate) async fn build_is_done(&self) -> bool {
        self.preparing.lock().await.as_ref().is_some_and(|build| build.done.is_finished())
    }
}
