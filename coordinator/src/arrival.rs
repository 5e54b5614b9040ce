//! When a request arrived: times of requests count from there, the reading of its head and body,
//! parsing and tokenising included. It goes with the task, so that nothing in between names it.

use axum::http::Extensions;
use node::serve::FirstByte;
use tokio::time::Instant;

tokio::task_local! {
    static ARRIVED: Instant;
}

/// When the request with these extensions arrived, as far as its connection tells.
pub(crate) fn of(extensions: &Extensions) -> Instant {
    extensions.get().map_or_else(Instant::now, |FirstByte(came)| *came)
}

/// Runs `request`, which arrived then.
pub(crate) fn scope<F: Future>(arrived: Instant, request: F) -> impl Future<Output = F::Output> {
    ARRIVED.scope(arrived, request)
}

/// When the request that this task serves arrived; now, outside of [`scope`].
pub(crate) fn of_this_request() -> Instant {
    ARRIVED.try_with(|arrived| *arrived).unwrap_or_else(|_| Instant::now())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_within_a_request_began_with_its_first_byte() {
        let second = Duration::from_secs(1);
        let mut extensions = Extensions::new();
        assert_eq!(of(&extensions), Instant::now());
        extensions.insert(FirstByte(Instant::now()));
        // Its head takes a while.
        tokio::time::sleep(second).await;
        let waited = scope(of(&extensions), async {
            tokio::time::sleep(second).await;
            of_this_request().elapsed()
        });
        assert_eq!(waited.await, 2 * second);
        assert_eq!(of_this_request().elapsed(), Duration::ZERO);
    }
}
