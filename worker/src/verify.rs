//! Compares a store with its manifest, and says how it goes on and how long it took.

use std::ops::Range;
use std::time::{Duration, Instant};

use model::{Progress, Store, StoreError};

/// How often it is said how far it is: reading a large model from a slow disk takes minutes.
const REPORT_EVERY: Duration = Duration::from_secs(3);

/// Everything in it, as [`Store::verify_files`].
///
/// # Errors
///
/// The first file that is wrong.
pub(crate) fn all(store: &Store) -> Result<(), StoreError> {
    let mut report = Report::begin(store);
    store.verify_files(|now| report.progress(now))?;
    report.end();
    Ok(())
}

/// What a stage of these layers computes with, as [`Store::verify_stage`]; `read` hears of every piece how
/// many bytes it has. Says nothing if all of it was known to be right.
///
/// # Errors
///
/// The first file that is wrong.
pub(crate) fn stage(
    store: &Store,
    layers: &Range<u32>,
    has_head: bool,
    mut read: impl FnMut(u64),
) -> Result<(), StoreError> {
    let mut report = Report::begin(store);
    store.verify_stage(layers, has_head, |now| {
        read(now.done.saturating_sub(report.read_bytes));
        report.progress(now);
    })?;
    report.end();
    Ok(())
}

struct Report<'a> {
    store: &'a Store,
    begin: Instant,
    said: Instant,
    read_bytes: u64,
}

impl<'a> Report<'a> {
    fn begin(store: &'a Store) -> Self {
        let begin = Instant::now();
        Self { store, begin, said: begin, read_bytes: 0 }
    }

    fn progress(&mut self, now: &Progress<'_>) {
        let Progress { what, done, total } = *now;
        self.read_bytes = done;
        if self.said.elapsed() >= REPORT_EVERY {
            self.said = Instant::now();
            let path = self.store.dir().display();
            tracing::info!(%path, file = what, done, total, "verifying");
        }
    }

    fn end(self) {
        if self.read_bytes > 0 {
            let path = self.store.dir().display();
            tracing::info!(%path, bytes = self.read_bytes, took = ?self.begin.elapsed(), "verified");
        }
    }
}
