//! The harness: real processes, real etcd, real sockets. What the tests in `tests/tests` share.

pub mod attack;
pub mod chain;
pub mod cluster;
pub mod collector;
pub mod etcd;
pub mod honest;
pub mod http;
pub mod model;
pub mod process;
pub mod python;
pub mod rack;
pub mod scrape;
pub mod slow;
pub mod streams;
