//! The exporter, with a word to the operator when the collector goes away or comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// Passes spans on to `inner`, whose own complaints are switched off: they come with every batch.
#[derive(Debug)]
pub(super) struct Telling<E> {
    inner: E,
    endpoint: String,
    away: AtomicBool,
}

impl<E> Telling<E> {
    pub(super) fn new(inner: E, endpoint: String) -> Self {
        Self { inner, endpoint, away: AtomicBool::new(false) }
    }
}

impl<E: SpanExporter> SpanExporter for Telling<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let outcome = self.inner.export(batch).await;
        let was_away = self.away.swap(outcome.is_err(), Ordering::Relaxed);
        let endpoint = &self.endpoint;
        match &outcome {
            Err(error) if !was_away => {
                tracing::warn!(endpoint, %error, "spans are lost: the collector does not take them");
            }
            Ok(()) if was_away => tracing::info!(endpoint, "the collector takes spans again"),
            _ => {}
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
