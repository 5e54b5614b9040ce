//! When a request arrived, and from where: times of requests count from there, the reading of its head and
//! body, parsing and tokenising included. It goes with the task, so that nothing in between names it.

use std::net::IpAddr;

use axum::http::Extensions;
use node::serve::FirstByte;
use tokio::time::Instant;
use tonic::transport::server::TcpConnectInfo;

tokio::task_local! {
    static ARRIVAL: Arrival;
}

/// When a request arrived, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    at: Instant,
    peer: Option<IpAddr>,
}

/// Of the request with these extensions, as far as its connection tells.
pub(crate) fn of(extensions: &Extensions) -> Arrival {
    let at = extensions.get().map_or_else(Instant::now, |FirstByte(came)| *came);
    let peer = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
    Arrival { at, peer: peer.map(|peer| peer.ip()) }
}

/// Runs `request`, which arrived so.
pub(crate) fn scope<F: Future>(arrival: Arrival, request: F) -> impl Future<Output = F::Output> {
    ARRIVAL.scope(arrival, request)
}

/// When the request that this task serves arrived; now, outside of [`scope`].
pub(crate) fn of_this_request() -> Instant {
    ARRIVAL.try_with(|arrival| arrival.at).unwrap_or_else(|_| Instant::now())
}

/// Where the request that this task serves came from; `None` outside of [`scope`].
pub(crate) fn peer_of_this_request() -> Option<IpAddr> {
    ARRIVAL.try_with(|arrival| arrival.peer).ok().flatten()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_within_a_request_began_with_its_first_byte() {
        let second = Duration::from_secs(1);
        let mut extensions = Extensions::new();
        assert_eq!(of(&extensions), Arrival { at: Instant::now(), peer: None });
        let remote_addr = Some(std::net::SocketAddr::from(([10, 0, 0, 7], 1)));
        extensions.insert(TcpConnectInfo { local_addr: None, remote_addr });
        extensions.insert(FirstByte(Instant::now()));
        // Its head takes a while.
        tokio::time::sleep(second).await;
        let waited = scope(of(&extensions), async {
            tokio::time::sleep(second).await;
            (of_this_request().elapsed(), peer_of_this_request())
        });
        assert_eq!(waited.await, (2 * second, Some(IpAddr::from([10, 0, 0, 7]))));
        assert_eq!((of_this_request().elapsed(), peer_of_this_request()), (Duration::ZERO, None));
    }
}
