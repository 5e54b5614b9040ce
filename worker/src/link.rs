//! The stream to the next stage, on a connection of its own: connects and connects again, sends
//! what the stage keeps, and passes refusals of later stages back. No decisions about steps.

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

/// How long a link may be down before the coordinator hears of it: a request must fail within
/// five seconds, and one attempt more may be under way.
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

/// Carries steps from `stage` to `next` until the stage is retired.
pub(crate) async fn run(stage: Arc<Stage>, next: StagePlan) {
    let carry = async {
        let mut outage = Outage::new(Instant::now());
        loop {
            let error = match connect(&next, stage.key()).await {
                Ok((steps, replies)) => {
                    tracing::info!(next = next.worker, address = next.address, "link is up");
                    stage.metrics().connected();
                    let up = Instant::now();
                    let error = pump(&stage, steps, replies).await;
                    outage.link_ended(up, Instant::now());
                    error
                }
                Err(error) => error,
            };
            let detail = format!("link to {} at {}: {}", next.worker, next.address, Chain(&error));
            tracing::info!(%detail, "link is down");
            if outage.is_to_be_reported(Instant::now()) {
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

    /// Whether it has lasted too long, the first time that it has.
    fn is_to_be_reported(&mut self, now: Instant) -> bool {
        let is_long = now.saturating_duration_since(self.since) >= LOST_AFTER;
        is_long && !std::mem::replace(&mut self.reported, is_long)
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
        StepVerdict::Accepted => {}
        StepVerdict::Corrupt if is_next && stage.repair(reply.step) => {}
        _ => stage.relay(reply),
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{Incarnation, StepId};
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
        assert!(!outage.is_to_be_reported(start + LOST_AFTER / 2));
        assert!(outage.is_to_be_reported(start + LOST_AFTER));
        assert!(!outage.is_to_be_reported(start + LOST_AFTER * 2));
        outage.link_ended(start + LOST_AFTER, start + LOST_AFTER * 3 / 2);
        assert!(outage.is_to_be_reported(start + LOST_AFTER * 3 / 2), "it broke at once");
        outage.link_ended(start + LOST_AFTER * 2, start + LOST_AFTER * 4);
        assert!(!outage.is_to_be_reported(start + LOST_AFTER * 4), "a new outage");
        let pauses: Vec<u128> = (0..6).map(|_| outage.pause().as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 320]);
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
            hear(&stage, StepReply { epoch: prepare.epoch, step, stage: 1, verdict, detail });
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
