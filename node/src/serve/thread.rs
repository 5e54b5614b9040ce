//! A server on a thread and a runtime of its own: it answers however busy the others are.

use std::io;
use std::thread;

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{Options, serve};

/// Serves as [`serve`] does, on a new thread that is called `options.name`.
///
/// # Errors
///
/// If there is no thread or no runtime to be had, or the thread panics.
pub async fn on_own_thread(
    listener: TcpListener,
    router: Router,
    options: Options,
    stop: CancellationToken,
) -> io::Result<()> {
    // A socket belongs to the runtime that it was made in.
    let listener = listener.into_std()?;
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name(options.name.into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let outcome = runtime.and_then(|runtime| {
            runtime.block_on(async {
                serve(TcpListener::from_std(listener)?, router, options, stop).await;
                Ok(())
            })
        });
        // Nobody listens any more if the process is being torn down.
        let _ = ended.send(outcome);
    })?;
    end.await.map_err(|_| io::Error::other("the thread panicked"))?
}
