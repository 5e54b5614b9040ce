//! Tells a person why nothing comes yet: on standard error, a line for every change of reason.

use std::future::Future;
use std::io::{self, Write};
use std::pin::pin;
use std::time::Duration;

use proto::status::ClusterStatus;

use crate::{Client, ClientError, Endpoint};

/// Who waits for longer wants to know why; and how often it is asked whether the reason changed.
const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// Says reasons, each once.
pub struct Notices<W> {
    output: W,
    said: String,
    after: Duration,
}

impl Notices<io::Stderr> {
    /// On standard error.
    pub fn stderr() -> Self {
        Self::new(io::stderr(), NOTICE_AFTER)
    }
}

impl<W: Write> Notices<W> {
    /// Written to `output`, when something took longer than `after`.
    pub fn new(output: W, after: Duration) -> Self {
        Self { output, said: String::new(), after }
    }

    /// Says that `reason` is waited for, unless that was the last that was said.
    pub fn say(&mut self, reason: &str) {
        if self.said == reason {
            return;
        }
        reason.clone_into(&mut self.said);
        // What others said (a worker's words among them) steers no terminal.
        let plain = reason.replace(|c: char| c.is_control(), "\u{fffd}");
        // A remark beside the answer: that it cannot be written is no failure.
        let _ = writeln!(self.output, "waiting: {plain}");
    }

    /// Connects to the coordinator at `endpoint`, and says if that takes long.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub async fn connect(&mut self, endpoint: &Endpoint) -> Result<Client, ClientError> {
        let mut connecting = pin!(Client::connect(endpoint));
        match tokio::time::timeout(self.after, &mut connecting).await {
            Ok(connected) => connected,
            Err(_) => {
                self.say(&format!("{endpoint} does not answer yet"));
                connecting.await
            }
        }
    }

    /// Waits for `wanted`, which `client` was asked for, and says meanwhile what the cluster waits
    /// for.
    pub async fn until<T>(&mut self, client: &Client, wanted: impl Future<Output = T>) -> T {
        let mut wanted = pin!(wanted);
        loop {
            if let Ok(came) = tokio::time::timeout(self.after, &mut wanted).await {
                return came;
            }
            let status = tokio::select! {
                biased;
                came = &mut wanted => return came,
                status = client.status() => status,
            };
            // A coordinator that does not even say how it is: `wanted` will tell why, or end.
            if let Some(reason) = status.ok().as_ref().and_then(reason) {
                self.say(&reason);
            }
        }
    }
}

/// Why a request that was sent to this cluster may have no answer yet, if it is not just computed.
fn reason(status: &ClusterStatus) -> Option<String> {
    if let Some(waiting) = &status.waiting {
        return Some(format!("the cluster is not ready: {}", waiting.detail));
    }
    let queue = &status.queue;
    (queue.waiting > 0).then(|| {
        format!("{} requests run and {} wait for their turn", queue.running, queue.waiting)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::tests::Scripted;
    use proto::status::{QueueStatus, WaitCause, Waiting};

    fn not_ready(detail: &str) -> ClusterStatus {
        let waiting = Some(Waiting { cause: WaitCause::Workers, detail: detail.to_owned() });
        ClusterStatus { waiting, ..ClusterStatus::default() }
    }

    #[test]
    fn a_reason_is_said_once_and_steers_no_terminal() {
        let mut bytes = Vec::new();
        let mut notices = Notices::new(&mut bytes, NOTICE_AFTER);
        for reason in ["a", "a", "b\u{1b}[2J", "a"] {
            notices.say(reason);
        }
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text, "waiting: a\nwaiting: b\u{fffd}[2J\nwaiting: a\n");
    }

    #[test]
    fn why_nothing_comes() {
        assert_eq!(reason(&ClusterStatus::default()), None);
        assert!(reason(&not_ready("no worker")).unwrap().ends_with("not ready: no worker"));
        let queue = QueueStatus { running: 3, waiting: 2, ..QueueStatus::default() };
        let busy = ClusterStatus { queue, ..ClusterStatus::default() };
        assert_eq!(reason(&busy).unwrap(), "3 requests run and 2 wait for their turn");
    }

    #[tokio::test]
    async fn who_waits_is_told_what_the_cluster_waits_for() {
        let server = Scripted::with_status(not_ready("no worker can serve this model")).await;
        let client = Client::connect(&server.endpoint).await.unwrap();
        let mut bytes = Vec::new();
        let mut notices = Notices::new(&mut bytes, Duration::from_millis(1));
        let wanted = tokio::time::sleep(Duration::from_millis(300));
        notices.until(&client, wanted).await;
        let text = String::from_utf8(bytes).unwrap();
        let want = "waiting: the cluster is not ready: no worker can serve this model\n";
        assert_eq!(text, want);
        // What comes soon needs no words.
        let mut bytes = Vec::new();
        let mut notices = Notices::new(&mut bytes, NOTICE_AFTER);
        assert_eq!(notices.until(&client, async { 7 }).await, 7);
        assert!(bytes.is_empty());
    }
}
