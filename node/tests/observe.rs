//! `/metrics` and `/health` over a real socket.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::net::SocketAddr;
use std::time::Duration;

use node::hosts::Hosts;
use node::observe::{self, Condition, Health};
use node::serve::on_own_thread;
use node::{Supervisor, metrics};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// One HTTP/1.1 request; status line, headers and body as they came.
async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, path, "localhost").await
}

async fn ask(address: SocketAddr, path: &str, host: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn health_and_metrics_are_served_until_the_stop() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let health = Health::starting();
    let mut tasks = Supervisor::new(stop.clone());
    let router = observe::router(health.clone(), Hosts::of(address, None));
    tasks.spawn("observe", |stop| async move {
        Ok(on_own_thread(listener, router, observe::options("observe"), stop).await?)
    });
    let client = async {
        for (condition, code, body) in [
            (Condition::Starting, "503", r#"{"status":"starting"}"#),
            (Condition::Serving, "200", r#"{"status":"ok"}"#),
            (Condition::Stopping, "503", r#"{"status":"stopping"}"#),
        ] {
            health.set(condition);
            assert_eq!(health.get(), condition);
            let answer = get(address, "/health").await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
            assert!(answer.ends_with(body), "{answer}");
        }

        metrics::install().unwrap();
        metrics::install().unwrap();
        ::metrics::counter!("tercet_test_total", "who" => "a").increment(3);
        ::metrics::histogram!("tercet_test_seconds").record(0.02);
        let answer = get(address, "/metrics").await;
        assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
        assert!(answer.contains("tercet_test_total{who=\"a\"} 3"), "{answer}");
        assert!(answer.contains("tercet_test_seconds_bucket{le=\"0.01\"} 0"), "{answer}");
        assert!(answer.contains("tercet_test_seconds_bucket{le=\"0.025\"} 1"), "{answer}");
        let page = "localhost\r\nhost: evil.test";
        assert!(ask(address, "/metrics", page).await.starts_with("HTTP/1.1 400 "));
        assert!(ask(address, "/metrics", "evil.test").await.starts_with("HTTP/1.1 421 "));
        assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404 "));
        // Each was counted, and that it did not serve was not.
        let counted = get(address, "/metrics").await;
        let of_refusals = |line: &&str| line.starts_with("tercet_requests_refused_total{");
        let mut causes: Vec<&str> = counted.lines().filter(of_refusals).collect();
        causes.sort_unstable();
        let wanted =
            [("invalid_request", "probes"), ("misdirected", "probes"), ("unknown_route", "other")];
        assert_eq!(causes.len(), wanted.len(), "{causes:?}");
        for (line, (cause, endpoint)) in causes.iter().zip(wanted) {
            assert!(line.contains(&format!("cause=\"{cause}\"")), "{line}");
            assert!(line.contains(&format!("endpoint=\"{endpoint}\"")), "{line}");
            assert!(line.ends_with(" 1"), "{line}");
        }
        stop.cancel();
    };
    let (outcome, ()) = tokio::join!(tasks.run(Duration::from_secs(30)), client);
    outcome.unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
