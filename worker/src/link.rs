//! The stream to the next stage, on a connection of its own: connects and connects again, sends
//! what the stage keeps, and passes refusals of later stages back. No decisions about steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use node::Chain;
use proto::convert::{decode_reply, encode_step};
use proto::ids::StepId;
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
    let mut sent_again = None;
    let mut ready = None;
    loop {
        if ready.is_none() {
            ready = stage.next_step();
        }
        tokio::select! {
            reply = replies.message() => match reply.map(|reply| reply.map(decode_reply)) {
                Ok(Some(Ok(reply))) => hear(stage, reply, &mut sent_again),
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
fn hear(stage: &Stage, mut reply: StepReply, sent_again: &mut Option<StepId>) {
    let next = stage.prepare().stage + 1;
    // A worker that holds no stage does not know which it should be.
    reply.stage = reply.stage.max(next);
    let is_next = reply.stage == next;
    match reply.verdict {
        StepVerdict::Accepted => {}
        StepVerdict::Corrupt if is_next && *sent_again != Some(reply.step) => {
            *sent_again = Some(reply.step);
            stage.resend(reply.step);
        }
        _ => stage.relay(reply),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
