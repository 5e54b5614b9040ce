//! A collector that is not there harms nobody, and wrong telemetry is refused.
//!
//! One test, for a process has one telemetry.

use std::time::Duration;

use node::Chain;
use node::telemetry::{self, LogFormat, TelemetryConfig, propagation};
use tracing::info_span;

#[tokio::test]
async fn a_missing_collector_harms_nobody() {
    // What makes no sense is refused before anything is started.
    let default = TelemetryConfig::default();
    let wrong = TelemetryConfig { sample_ratio: 1.5, ..default.clone() };
    let error = telemetry::init("tercet-test", &wrong).unwrap_err();
    assert_eq!(error.to_string(), "sample_ratio must be from 0 to 1, not 1.5");
    let wrong = TelemetryConfig { log: Some("node=loud".to_owned()), ..default.clone() };
    let error = telemetry::init("tercet-test", &wrong).unwrap_err();
    assert!(Chain(&error).to_string().starts_with("\"node=loud\" is not a log filter: "));
    let wrong = TelemetryConfig { otlp_endpoint: Some("no url".to_owned()), ..default.clone() };
    let error = telemetry::init("tercet-test", &wrong).unwrap_err();
    assert!(error.to_string().starts_with("\"no url\" is not an OTLP endpoint"), "{error}");
    assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
    assert!("xml".parse::<LogFormat>().is_err());

    // A port that nobody listens on.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let config = TelemetryConfig {
        log_format: LogFormat::Json,
        otlp_endpoint: Some(format!("http://{nobody}")),
        sample_ratio: 0.0,
        ..default
    };
    let guard = telemetry::init("tercet-test", &config).unwrap();
    let twice = telemetry::init("tercet-test", &config).unwrap_err();
    assert!(twice.to_string().contains("twice"), "{twice}");

    // None of our own is kept, but what was kept elsewhere is.
    let own = info_span!("own");
    assert_eq!(propagation::traceparent(&own), None);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let kept = info_span!("kept");
    assert!(propagation::set_parent(&kept, parent));
    let own_parent = propagation::traceparent(&kept).unwrap();
    assert_eq!(own_parent[..36], parent[..36], "the same trace");
    assert_ne!(own_parent, parent, "another span");
    drop((own, kept));

    let before = std::time::Instant::now();
    guard.shutdown(Duration::from_secs(2)).await;
    assert!(before.elapsed() < Duration::from_secs(20), "it gives up");
}
