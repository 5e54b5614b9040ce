//! The threads of lanes and links: whatever is computed for clients on the others, steps are not
//! delayed by it.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime for lanes; ends, with whatever runs in it, when it is dropped.
pub(crate) struct LaneRuntime(Option<Runtime>);

impl LaneRuntime {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub(crate) fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(node::threads::for_network())
            .thread_name("tercet-lane")
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// The way to start tasks on it.
    pub(crate) fn handle(&self) -> Handle {
        // It is there until the drop.
        self.0.as_ref().map_or_else(Handle::current, |runtime| runtime.handle().clone())
    }
}

impl Drop for LaneRuntime {
    fn drop(&mut self) {
        // Waits for nobody: it may be dropped in a task, which must not block.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
