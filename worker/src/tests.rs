//! The whole worker.
