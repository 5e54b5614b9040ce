//! Decides (planner, cluster, scheduler) and answers clients (gRPC, HTTP).

// Pure: events in, actions out.
pub mod cluster;
pub mod planner;
pub mod scheduler;
pub mod tick;
pub mod token_log;
