//! The stream to the next stage, on a connection of its own: connects and connects again, sends
//! what the stage keeps, and passes refusals of later stages back. No decisions about steps.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::Chain;
use proto::convert::{decode_reply, encode_step};
use proto::key::CoordinatorKey;
use proto::pb::stage_client::StageClient;
use proto::plan::StagePlan;
use proto::step::{StepReply, StepVerdict};
use proto::{limits, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::stage::Stage;

/// A neighbour on the same network answers in milliseconds; one that is gone refuses at once.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// Pause before the first new attempt; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// Longest pause: a neighbour that restarts is found soon, one that is gone costs little.
const BACKOFF_MAX: Duration = Duration::from_millis(320);

/// How long a link may be down before the coordinator hears of it, should nothing say that nobody is
/// there: a request must fail within five seconds, and one attempt more may be under way.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// Steps that wait in the connection: one being sent, one ready. The rest waits in the ledger.
const QUEUE_LEN: usize = 1;

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{address:?} is not an address")]
    Address { address: String, source: tonic::transport::Error },
    #[error("failed to connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("no stream within {CONNECT_TIMEOUT:?}")]
    TimedOut,
    #[error("the stream broke")]
    Stream(#[from] tonic::Status),
    #[error("the next stage ended the stream")]
    Ended,
}

impl LinkError {
    /// Whether what answered says that nobody serves at that address, or nothing that keeps a
    /// connection: waiting brings nobody back.
    fn says_nobody(&self) -> bool {
        match self {
            Self::Connect(error) => is_refusal(error),
            // A worker that refuses says so; only a broken connection has a cause.
            Self::Stream(status) => std::error::Error::source(status).is_some(),
            Self::Address { .. } | Self::TimedOut | Self::Ended => false,
        }
    }
}

/// Whether the operating system refused or broke a connection.
fn is_refusal(error: &(dyn std::error::Error + 'static)) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|error| {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        matches!(kind, Some(ConnectionRefused | ConnectionReset | ConnectionAborted))
    })
}

/// Carries steps from `stage` to `next` until the stage is retired.
pub(crate) async fn run(stage: Arc<Stage>, next: StagePlan) {
    let carry = async {
        let mut outage = Outage::new(Instant::now());
        loop {
            let (error, is_nobody) = match connect(&next, stage.key()).await {
                Ok((steps, replies)) => {
                    tracing::info!(next = next.worker, address = next.address, "link is up");
                    stage.metrics().connected();
                    let up = Instant::now();
                    let error = pump(&stage, steps, replies).await;
                    outage.link_ended(up, Instant::now());
                    // Why a link broke says little: the next attempt finds who is there.
                    (error, false)
                }
                Err(error) => {
                    let is_nobody = error.says_nobody();
                    (error, is_nobody)
                }
            };
            let detail = format!("link to {} at {}: {}", next.worker, next.address, Chain(&error));
            tracing::info!(%detail, "link is down");
            if stage.takes_more_while_lost() {
                outage.report_again();
            }
            if outage.is_to_be_reported(Instant::now(), is_nobody) {
                stage.downstream_lost(detail);
            }
            tokio::time::sleep(outage.pause()).await;
        }
    };
    stage.retired().run_until_cancelled(carry).await.unwrap_or(());
}

/// One time without a link.
struct Outage {
    since: Instant,
    reported: bool,
    pause: Duration,
}

impl Outage {
    fn new(since: Instant) -> Self {
        Self { since, reported: false, pause: BACKOFF_FIRST }
    }

    /// A link that was up from `up` on is down again. One that broke at once ended no outage.
    fn link_ended(&mut self, up: Instant, now: Instant) {
        self.reported = false;
        if now.saturating_duration_since(up) >= LOST_AFTER {
            *self = Self::new(now);
        }
    }

    /// Whether nobody is there or it has lasted too long, the first time that it is so.
    fn is_to_be_reported(&mut self, now: Instant, is_nobody: bool) -> bool {
        let is_lost = is_nobody || now.saturating_duration_since(self.since) >= LOST_AFTER;
        is_lost && !std::mem::replace(&mut self.reported, is_lost)
    }

    /// Who was told relies on the link again: he is to hear of it once more.
    fn report_again(&mut self) {
        self.reported = false;
    }

    fn pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(BACKOFF_MAX);
        pause
    }
}

async fn connect(
    next: &StagePlan,
    key: Option<CoordinatorKey>,
) -> Result<(mpsc::Sender<pb::StepMessage>, tonic::Streaming<pb::StepReply>), LinkError> {
    let channel = endpoint(&next.address)?.connect().await.map_err(LinkError::Connect)?;
    let mut client = client(channel);
    let (steps, outbound) = mpsc::channel(QUEUE_LEN);
    let outbound = ReceiverStream::new(outbound);
    let call = client.steps(match key {
        Some(key) => key.attach(outbound),
        None => tonic::Request::new(outbound),
    });
    let replies =
        tokio::time::timeout(CONNECT_TIMEOUT, call).await.map_err(|_| LinkError::TimedOut)??;
    Ok((steps, replies.into_inner()))
}

/// How this process connects to a worker.
fn endpoint(address: &str) -> Result<Endpoint, LinkError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|source| LinkError::Address { address: address.into(), source })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES))
}

fn client(channel: Channel) -> StageClient<Channel> {
    StageClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

/// Sends and listens until the stream breaks, and says why it did.
async fn pump(
    stage: &Stage,
    steps: mpsc::Sender<pb::StepMessage>,
    mut replies: tonic::Streaming<pb::StepReply>,
) -> LinkError {
    stage.downstream_up();
    let mut ready = None;
    loop {
        if ready.is_none() {
            ready = stage.next_step();
        }
        tokio::select! {
            reply = replies.message() => match reply.map(|reply| reply.map(decode_reply)) {
                Ok(Some(Ok(reply))) => hear(stage, reply),
                Ok(Some(Err(error))) => {
                    tracing::warn!(%error, "the next stage said something that is no reply");
                }
                Ok(None) => return LinkError::Ended,
                Err(status) => return status.into(),
            },
            room = steps.reserve(), if ready.is_some() => match (room, ready.take()) {
                (Ok(room), Some(step)) => {
                    let message = encode_step(&step);
                    stage.metrics().hop(message.rows.len() + message.activations.len());
                    room.send(message);
                }
                _ => return LinkError::Ended,
            },
            () = stage.queued(), if ready.is_none() => {}
        }
    }
}

/// What the next stage says of a step. A step that was damaged on the way is sent once more; all
/// other refusals, and those of later stages, go back to the coordinator.
fn hear(stage: &Stage, mut reply: StepReply) {
    let next = stage.prepare().stage + 1;
    // A worker that holds no stage does not know which it should be.
    reply.stage = reply.stage.max(next);
    let is_next = reply.stage == next;
    match reply.verdict {
        // Workers of before say so of every step.
        StepVerdict::Accepted => {}
        StepVerdict::Corrupt if is_next && stage.repair(reply.step) => {}
        _ => stage.relay(reply),
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{Incarnation, PipelineRef, StepId};
    use proto::step::Step;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::bridge::{Compute, EngineHandle};
    use crate::engine::EngineError;
    use crate::executor::Executed;
    use crate::tests::harness;

    #[test]
    fn an_outage_is_reported_once_and_attempts_slow_down() {
        let start = Instant::now();
        let mut outage = Outage::new(start);
        assert!(!outage.is_to_be_reported(start + LOST_AFTER / 2, false));
        assert!(outage.is_to_be_reported(start + LOST_AFTER, false));
        assert!(!outage.is_to_be_reported(start + LOST_AFTER * 2, false));
        outage.report_again();
        assert!(outage.is_to_be_reported(start + LOST_AFTER * 2, false), "steps came again");
        outage.link_ended(start + LOST_AFTER, start + LOST_AFTER * 3 / 2);
        assert!(outage.is_to_be_reported(start + LOST_AFTER * 3 / 2, false), "it broke at once");
        outage.link_ended(start + LOST_AFTER * 2, start + LOST_AFTER * 4);
        assert!(!outage.is_to_be_reported(start + LOST_AFTER * 4, false), "a new outage");
        let pauses: Vec<u128> = (0..6).map(|_| outage.pause().as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 320]);
    }

    #[test]
    fn that_nobody_is_there_is_reported_at_once_and_once() {
        let start = Instant::now();
        let mut outage = Outage::new(start);
        assert!(!outage.is_to_be_reported(start, false));
        assert!(outage.is_to_be_reported(start, true));
        assert!(!outage.is_to_be_reported(start, true));
        outage.report_again();
        assert!(!outage.is_to_be_reported(start, false), "it is not known any more");
        assert!(outage.is_to_be_reported(start, true));
    }

    #[tokio::test]
    async fn a_refused_or_closed_connection_says_that_nobody_is_there() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let next = StagePlan {
            worker: "b".into(),
            incarnation: Incarnation([0; 16]),
            address: listener.local_addr().unwrap().to_string(),
            layers: 0..1,
        };
        let closes = async {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                drop(connection);
            }
        };
        let closed = tokio::select! {
            () = closes => None,
            outcome = connect(&next, None) => outcome.err(),
        };
        let closed = closed.expect("there is no stream");
        assert!(closed.says_nobody(), "{closed:?}");
        drop(listener);
        let refused = connect(&next, None).await.expect_err("nobody listens");
        assert!(refused.says_nobody(), "{refused:?}");
        assert!(!LinkError::TimedOut.says_nobody());
        assert!(!LinkError::from(tonic::Status::unavailable("it stops")).says_nobody());
    }

    #[test]
    fn an_address_that_is_none_is_refused() {
        let error = endpoint("no host:x").expect_err("it is no address");
        assert!(error.to_string().starts_with("\"no host:x\" is not an address"), "{error}");
    }

    /// Gives every step back as it came.
    struct Echo;

    impl Compute for Echo {
        fn compute(&mut self, step: Step, _expired: bool) -> Result<Executed, EngineError> {
            Ok(Executed { step, values: Vec::new(), filled_blocks: 0 })
        }
    }

    #[tokio::test]
    async fn damaged_steps_are_sent_again_once_and_then_told_of() {
        let plan = |worker: &str, layers| StagePlan {
            worker: worker.into(),
            incarnation: Incarnation([0; 16]),
            address: "127.0.0.1:1".into(),
            layers,
        };
        let prepare = harness::prepare(&[plan("a", 0..1), plan("b", 1..4)], 0, 5);
        let (failures, _) = mpsc::channel(1);
        let engine = EngineHandle::start(Echo, failures).unwrap();
        let retired = CancellationToken::new();
        let (stage, finisher) =
            Stage::new(prepare.clone(), None, 1, engine, Arc::default(), retired);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(finisher);
        let (replies, mut told) = mpsc::channel(8);
        for number in [1, 2] {
            stage.arrive(harness::step(&prepare, number, vec![]), &replies).unwrap();
        }
        let mut sent = Vec::new();
        while sent.len() < 2 {
            match stage.next_step() {
                Some(step) => sent.push(step.header.step),
                None => stage.queued().await,
            }
        }
        let say = |step, verdict| {
            let detail = String::new();
            let at = PipelineRef { id: prepare.pipeline, epoch: prepare.epoch };
            hear(&stage, StepReply { at, step, stage: 1, verdict, detail });
        };
        // Both fail for good, in turns.
        for _ in 0..3 {
            sent.iter().for_each(|&step| say(step, StepVerdict::Corrupt));
        }
        let again: Vec<StepId> =
            std::iter::from_fn(|| stage.next_step()).map(|step| step.header.step).collect();
        assert_eq!(again, sent);
        say(sent[0], StepVerdict::Invalid);
        assert!(stage.next_step().is_none(), "never again what cannot be taken");
        let told: Vec<_> = std::iter::from_fn(|| told.try_recv().ok())
            .map(|reply| (reply.step.0, reply.verdict))
            .collect();
        use StepVerdict::{Corrupt, Invalid};
        assert_eq!(told, [(1, Corrupt), (2, Corrupt), (1, Corrupt), (2, Corrupt), (1, Invalid)]);
    }
}
