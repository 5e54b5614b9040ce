//! One request is one trace: from the client through the coordinator to every stage.

use std::collections::BTreeSet;
use std::time::Duration;

use tests::cluster::Cluster;
use tests::collector::{Collector, Span};
use tests::model::bundled_store;
use tests::process::{run_with, wait_for};

/// Exporters send every few seconds.
const EXPORT: Duration = Duration::from_secs(30);

#[test]
fn one_trace_covers_client_coordinator_and_every_stage() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str())];
    let cluster = Cluster::start_with(bundled_store(), 3, 3, &environment);
    let output = run_with(
        &["generate", "--endpoint", cluster.grpc(), "--max-tokens", "4", "Tom"],
        |command| {
            command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
        },
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let spans = wait_for("one trace with all parts", EXPORT, || {
        let all = collector.spans();
        let root = all.iter().find(|span| span.service.contains("client"))?;
        let trace: Vec<Span> =
            all.iter().filter(|span| span.trace == root.trace).cloned().collect();
        let stages: BTreeSet<&str> =
            trace.iter().filter_map(|span| span.attribute("stage")).collect();
        let has_coordinator = trace.iter().any(|span| span.service.contains("coordinator"));
        (stages.len() == 3 && has_coordinator).then_some(trace)
    });

    let ids: BTreeSet<&str> = spans.iter().map(|span| span.id.as_str()).collect();
    let roots: Vec<&Span> = spans.iter().filter(|span| span.parent.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{spans:#?}");
    assert!(roots[0].service.contains("client"), "{:?}", roots[0]);
    let request = spans.iter().find(|span| span.service.contains("coordinator")).unwrap();
    assert!(
        request.attributes.iter().any(|(key, _)| key == "gen_ai.operation.name"),
        "{request:?}"
    );
    for span in &spans {
        assert!(
            span.parent.is_empty() || ids.contains(span.parent.as_str()),
            "{span:?} has no parent"
        );
    }
    let workers: BTreeSet<Option<&str>> = spans
        .iter()
        .filter(|span| span.service.contains("worker"))
        .map(|span| span.attribute("stage"))
        .collect();
    assert_eq!(workers, BTreeSet::from([Some("0"), Some("1"), Some("2")]));
    for span in spans.iter().filter(|span| span.service.contains("worker")) {
        for key in ["layers", "tokens", "step"] {
            assert!(span.attribute(key).is_some(), "{span:?} does not say its {key}");
        }
        let parent = spans.iter().find(|other| other.id == span.parent).unwrap();
        assert!(parent.service.contains("coordinator"), "{span:?} is a child of {parent:?}");
    }
    let text = format!("{spans:?}");
    assert!(!text.contains("Tom"), "no prompt in a trace");
}
