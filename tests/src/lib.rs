//! Harness, and what only the whole can show: golden, cluster, wire, tidy.
