//! Decides (planner, cluster, scheduler) and answers clients (gRPC, HTTP).
