//! When the head of a request arrived: times of requests count from there, the reading of its body,
//! parsing and tokenising included. It goes with the task, so that nothing in between names it.

use tokio::time::Instant;

tokio::task_local! {
    static ARRIVED: Instant;
}

/// Runs `request`, whose head arrives now.
pub(crate) fn scope<F: Future>(request: F) -> impl Future<Output = F::Output> {
    ARRIVED.scope(Instant::now(), request)
}

/// When the head of the request that this task serves arrived; now, outside of [`scope`].
pub(crate) fn of_this_request() -> Instant {
    ARRIVED.try_with(|arrived| *arrived).unwrap_or_else(|_| Instant::now())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_within_a_request_began_with_its_head() {
        let second = Duration::from_secs(1);
        let waited = scope(async {
            tokio::time::sleep(second).await;
            of_this_request().elapsed()
        });
        assert_eq!(waited.await, second);
        assert_eq!(of_this_request().elapsed(), Duration::ZERO);
    }
}
