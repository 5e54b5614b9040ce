//! The wire to workers: control calls, the stream of steps to the first stage, the stream of
//! results from the last. Each on a connection of its own, so that none waits behind another.
//! No decisions: what happens is told to the driver, which answers with what to do.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use proto::convert;
use proto::held::Description;
use proto::ids::{Epoch, Incarnation, NumericsClass, PipelineId, PipelineRef, StepId, Term};
use proto::key::CoordinatorKey;
use proto::limits;
use proto::pb;
use proto::pb::stage_client::StageClient;
use proto::plan::StagePlan;
use proto::step::{Prepare, ResultSource, Step, StepReply, StepResult, StepVerdict};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::cluster::{Failure, PREPARE_LIMIT, PROBE_TIMEOUT, Target};

/// Opening a connection on a LAN takes a millisecond.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// A worker hashes its shards, reads them into memory and makes room for KV: minutes, from a cold disk. It
/// may take [`PREPARE_LIMIT`] as long as it gets further, and for so long it need not ...
const PREPARE_PATIENCE: Duration = Duration::from_secs(60);

/// ... which it is asked this often.
const PREPARE_LOOK: Duration = Duration::from_secs(10);

/// Activating and retiring only change a worker's mind.
const SWITCH_PATIENCE: Duration = Duration::from_secs(5);

/// Steps that may lie between the driver and the wire. More than are ever in flight, so that the
/// driver never waits for a link: `in_flight_limit` of the longest pipeline, and all of it again
/// after a reconnection.
const STEPS_QUEUED: usize = 2 * (3 * limits::STAGES / 2 + 2);

/// Replies and results that may wait for the driver; then the link waits.
pub(crate) const LINK_EVENTS: usize = 1024;

/// Why a control call failed.
#[derive(Debug)]
pub(crate) struct CallError {
    /// What may be done about it.
    pub(crate) failure: Failure,
    pub(crate) detail: String,
}

impl CallError {
    fn of_status(status: &Status) -> Self {
        let failure = match status.code() {
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::Unknown => Failure::Transient,
            Code::ResourceExhausted => Failure::Memory,
            _ => Failure::Refused,
        };
        Self { failure, detail: status_words(status) }
    }

    fn transient(detail: impl Into<String>) -> Self {
        Self { failure: Failure::Transient, detail: detail.into() }
    }
}

/// What a link tells the driver.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// What a stage says of a step.
    Reply { link: LinkId, reply: StepReply },
    /// A step's result.
    Result { link: LinkId, result: StepResult },
    /// The link is gone; it tells nothing more.
    Broken { link: LinkId, detail: String },
}

/// Tells links apart, also those to the same stage at the same epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkId(pub(crate) u64);

/// A step on its way, and when workers drop it.
#[derive(Clone, Debug)]
pub(crate) struct SentStep {
    pub(crate) step: Arc<Step>,
    pub(crate) deadline: Instant,
}

/// The stream of steps to a first stage; closed when it is dropped.
pub(crate) struct StepsLink {
    pub(crate) id: LinkId,
    queue: mpsc::Sender<SentStep>,
    /// Aborts the task when it is dropped.
    _task: JoinSet<()>,
}

impl StepsLink {
    /// Connects in the background; steps sent before that wait.
    pub(crate) fn open(
        id: LinkId,
        key: CoordinatorKey,
        address: String,
        events: mpsc::Sender<LinkEvent>,
    ) -> Self {
        let (queue, steps) = mpsc::channel(STEPS_QUEUED);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let detail = match carry_steps(id, key, &address, steps, &events).await {
                Ok(()) => "the worker ended the stream".to_owned(),
                Err(detail) => detail,
            };
            // Without a driver nobody needs to know.
            let _ = events.send(LinkEvent::Broken { link: id, detail }).await;
        });
        Self { id, queue, _task: task }
    }

    /// A link to nobody: what is sent on it comes out of the receiver.
    #[cfg(test)]
    pub(crate) fn to_nobody(id: LinkId) -> (Self, mpsc::Receiver<SentStep>) {
        let (queue, steps) = mpsc::channel(STEPS_QUEUED);
        (Self { id, queue, _task: JoinSet::new() }, steps)
    }

    /// Sends a step, in order. Steps that a broken link takes are lost; the driver keeps them.
    pub(crate) fn send(&self, step: SentStep) {
        if self.queue.try_send(step).is_err() {
            // Closed: its end was told already. Full: cannot be, see `STEPS_QUEUED`.
            tracing::debug!("a step was given to a link that is closed");
        }
    }
}

/// The stream of results from a last stage; closed when it is dropped.
pub(crate) struct ResultsLink {
    pub(crate) id: LinkId,
    /// Aborts the task when it is dropped.
    _task: JoinSet<()>,
}

/// Which results are wanted.
pub(crate) struct ResultsWanted {
    pub(crate) pipeline: PipelineId,
    pub(crate) epoch: Epoch,
    pub(crate) term: Term,
    pub(crate) incarnation: Incarnation,
    /// Those up to this one are known.
    pub(crate) after_step: StepId,
}

impl ResultsLink {
    /// A link from nobody.
    #[cfg(test)]
    pub(crate) fn from_nobody(id: LinkId) -> Self {
        Self { id, _task: JoinSet::new() }
    }

    /// Connects in the background.
    pub(crate) fn open(
        id: LinkId,
        key: CoordinatorKey,
        address: String,
        wanted: ResultsWanted,
        events: mpsc::Sender<LinkEvent>,
    ) -> Self {
        let mut task = JoinSet::new();
        task.spawn(async move {
            let detail = match carry_results(id, key, &address, wanted, &events).await {
                Ok(()) => "the worker ended the stream".to_owned(),
                Err(detail) => detail,
            };
            let _ = events.send(LinkEvent::Broken { link: id, detail }).await;
        });
        Self { id, _task: task }
    }
}

/// Gets a worker ready for a stage; gives the class it computes with.
///
/// # Errors
///
/// [`CallError`] in the worker's or the network's words.
pub(crate) async fn prepare(
    key: CoordinatorKey,
    request: &Prepare,
) -> Result<NumericsClass, CallError> {
    let stage = request.stages.get(request.stage as usize);
    let address = &stage.ok_or_else(|| CallError::transient("no such stage"))?.address;
    let mut client = connect(address).await?;
    let call = client.prepare(key.attach(convert::encode_prepare(request)));
    let how_far = || {
        let address = address.clone();
        async move { Some(describe(&address, PROBE_TIMEOUT).await.ok()?.prepared_bytes) }
    };
    let response = while_it_gets_further(call, how_far).await?;
    NumericsClass::try_from(&response.numerics_class[..])
        .map_err(|error| CallError { failure: Failure::Refused, detail: error.to_string() })
}

/// Makes a prepared epoch the one that a worker serves.
///
/// # Errors
///
/// [`CallError`] in the worker's or the network's words.
pub(crate) async fn activate(
    key: CoordinatorKey,
    at: PipelineRef,
    term: Term,
    target: &StagePlan,
) -> Result<(), CallError> {
    let mut client = connect(&target.address).await?;
    let call = client.activate(key.attach(pb::ActivateRequest {
        pipeline: at.id.0,
        epoch: at.epoch.0,
        term: term.0,
        dst_incarnation: incarnation_bytes(target.incarnation),
    }));
    within(SWITCH_PATIENCE, call).await.map(drop)
}

/// Tells a worker to leave an epoch and older ones.
///
/// # Errors
///
/// [`CallError`] in the worker's or the network's words.
pub(crate) async fn retire(
    key: CoordinatorKey,
    at: PipelineRef,
    term: Term,
    target: &Target,
) -> Result<(), CallError> {
    let mut client = connect(&target.address).await?;
    let call = client.retire(key.attach(pb::RetireRequest {
        pipeline: at.id.0,
        epoch: at.epoch.0,
        term: term.0,
        dst_incarnation: incarnation_bytes(target.incarnation),
    }));
    within(SWITCH_PATIENCE, call).await.map(drop)
}

/// Tells a worker to end, as SIGTERM does.
///
/// # Errors
///
/// [`CallError`] in the worker's or the network's words.
pub(crate) async fn dismiss(
    key: CoordinatorKey,
    term: Term,
    target: &Target,
) -> Result<(), CallError> {
    let mut client = connect(&target.address).await?;
    let call = client.dismiss(key.attach(pb::DismissRequest {
        term: term.0,
        dst_incarnation: incarnation_bytes(target.incarnation),
    }));
    within(SWITCH_PATIENCE, call).await.map(drop)
}

/// Asks a worker who it is and what it holds, over a connection of its own: whatever is wrong with the others, this
/// tells whether the process lives.
///
/// # Errors
///
/// [`CallError`] if it does not answer within `patience`, or not in our language.
pub(crate) async fn describe(address: &str, patience: Duration) -> Result<Description, CallError> {
    let asked = async {
        let client = connect(address).await?;
        let mut client = client.max_decoding_message_size(limits::DESCRIPTION_BYTES);
        within(patience, client.describe(pb::DescribeRequest {})).await
    };
    let response = tokio::time::timeout(patience, asked).await.map_err(|_| {
        CallError::transient(format!("no answer within {} ms", patience.as_millis()))
    })??;
    convert::decode_description(response)
        .map_err(|error| CallError { failure: Failure::Refused, detail: chain(&error) })
}

async fn carry_steps(
    link: LinkId,
    key: CoordinatorKey,
    address: &str,
    steps: mpsc::Receiver<SentStep>,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<(), String> {
    let mut client = connect(address).await.map_err(|error| error.detail)?;
    let messages = ReceiverStream::new(steps).map(|sent| encode(&sent));
    let replies =
        client.steps(key.attach(messages)).await.map_err(|status| status_words(&status))?;
    let mut replies = replies.into_inner();
    while let Some(reply) = replies.message().await.map_err(|status| status_words(&status))? {
        let reply =
            convert::decode_reply(reply).map_err(|error| node::Chain(&error).to_string())?;
        // Workers of before answer every step; the lane awaits its result anyway.
        if reply.verdict == StepVerdict::Accepted {
            continue;
        }
        if events.send(LinkEvent::Reply { link, reply }).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn carry_results(
    link: LinkId,
    key: CoordinatorKey,
    address: &str,
    wanted: ResultsWanted,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<(), String> {
    let mut client = connect(address).await.map_err(|error| error.detail)?;
    let request = pb::ResultsRequest {
        pipeline: wanted.pipeline.0,
        epoch: wanted.epoch.0,
        term: wanted.term.0,
        dst_incarnation: incarnation_bytes(wanted.incarnation),
        after_step: wanted.after_step.0,
    };
    let results =
        client.results(key.attach(request)).await.map_err(|status| status_words(&status))?;
    let mut results = results.into_inner();
    while let Some(result) = results.message().await.map_err(|status| status_words(&status))? {
        let result = believe(&wanted, result)?;
        if events.send(LinkEvent::Result { link, result }).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// A result that arrived whole and is of the pipeline, epoch, term and process that it was asked of.
/// Anything else ends the stream: what is missing is read again, after the last result that is known.
fn believe(wanted: &ResultsWanted, message: pb::StepResult) -> Result<StepResult, String> {
    let (source, result) = convert::decode_result(message).map_err(|error| chain(&error))?;
    let ResultsWanted { pipeline, epoch, term, incarnation, .. } = *wanted;
    if (source, result.epoch) == (ResultSource { pipeline, term, incarnation }, epoch) {
        return Ok(result);
    }
    Err(format!(
        "a result of {}@{}, term {}, incarnation {} came, those of {pipeline}@{epoch}, term {term}, \
         incarnation {incarnation} were asked for",
        source.pipeline, result.epoch, source.term, source.incarnation
    ))
}

/// The same bytes each time it is sent, but for the time that is left.
fn encode(sent: &SentStep) -> pb::StepMessage {
    let mut message = convert::encode_step(&sent.step);
    let left_ms = sent.deadline.saturating_duration_since(Instant::now()).as_millis();
    message.deadline_remaining_ms = left_ms.try_into().unwrap_or(u32::MAX);
    message
}

async fn connect(address: &str) -> Result<StageClient<Channel>, CallError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| CallError { failure: Failure::Refused, detail: chain(&error) })?
        .connect_timeout(CONNECT_PATIENCE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES);
    let channel = endpoint.connect().await.map_err(|error| CallError::transient(chain(&error)))?;
    Ok(StageClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES))
}

async fn within<T>(
    patience: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(patience, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CallError::of_status(&status)),
        Err(_) => Err(CallError::transient(format!("no answer within {} s", patience.as_secs()))),
    }
}

/// Waits for `call` for as long as `how_far` its worker is becomes more.
async fn while_it_gets_further<T, L: Future<Output = Option<u64>>>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    how_far: impl Fn() -> L,
) -> Result<T, CallError> {
    let mut call = std::pin::pin!(call);
    let begin = Instant::now();
    let (mut furthest, mut since) = (None, begin);
    loop {
        let look = async {
            tokio::time::sleep(PREPARE_LOOK).await;
            how_far().await
        };
        let done = tokio::select! {
            answer = &mut call => {
                let answer = answer.map_err(|status| CallError::of_status(&status));
                return answer.map(tonic::Response::into_inner);
            }
            done = look => done,
        };
        let now = Instant::now();
        if let Some(done) = done
            && furthest.is_none_or(|furthest| done > furthest)
        {
            // What was read before it was asked for the first time says nothing.
            since = if furthest.is_some() { now } else { since };
            furthest = Some(done);
        }
        let (waited, stuck) = (now - begin, now - since);
        if stuck >= PREPARE_PATIENCE {
            let detail = format!("no answer, and no further for {} s", stuck.as_secs());
            return Err(CallError::transient(detail));
        }
        if waited >= PREPARE_LIMIT {
            let detail = format!("not prepared within {} min", PREPARE_LIMIT.as_secs() / 60);
            return Err(CallError::transient(detail));
        }
    }
}

fn incarnation_bytes(incarnation: Incarnation) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&incarnation.0)
}

fn status_words(status: &Status) -> String {
    match status.message() {
        "" => chain(status),
        message => message.chars().take(limits::DETAIL_BYTES).collect(),
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    node::Chain(error).to_string()
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    type Answer = Result<tonic::Response<u32>, Status>;

    async fn after(time: Duration) -> Answer {
        tokio::time::sleep(time).await;
        Ok(tonic::Response::new(7))
    }

    /// What comes of a call whose worker gets further with every look until `stuck_after`, and when.
    async fn waits_for(
        call: impl Future<Output = Answer>,
        stuck_after: Duration,
    ) -> (Result<u32, String>, Duration) {
        let (begin, bytes) = (Instant::now(), AtomicU64::new(5_000));
        let how_far = || {
            let more = u64::from(begin.elapsed() <= stuck_after);
            std::future::ready(Some(bytes.fetch_add(more, Ordering::Relaxed) + more))
        };
        let answer = while_it_gets_further(call, how_far).await;
        (answer.map_err(|error| error.detail), begin.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_gets_further_is_waited_for_and_no_other() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let always = Duration::MAX;
        let (answer, took) = waits_for(after(minutes(20)), always).await;
        assert_eq!((answer, took), (Ok(7), minutes(20)), "however long it hashes");
        let (answer, took) = waits_for(pending(), Duration::ZERO).await;
        let stuck = "no answer, and no further for 60 s".to_owned();
        assert_eq!((answer, took), (Err(stuck.clone()), PREPARE_PATIENCE));
        let (answer, took) = waits_for(pending(), minutes(9)).await;
        assert_eq!((answer, took), (Err(stuck), minutes(9) + PREPARE_PATIENCE));
        let (answer, took) = waits_for(pending(), always).await;
        assert_eq!((answer, took), (Err("not prepared within 30 min".to_owned()), PREPARE_LIMIT));
        let refused = async { Err(Status::resource_exhausted("2 GiB are missing")) };
        let (answer, _) = waits_for(refused, always).await;
        assert_eq!(answer, Err("2 GiB are missing".to_owned()));
        // One that does not say how far it is has as long as one that is stuck.
        let silent = while_it_gets_further(pending::<Answer>(), || std::future::ready(None)).await;
        assert_eq!(silent.map_err(|error| error.failure), Err(Failure::Transient));
    }
}
