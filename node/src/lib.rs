//! Being a good process: config, telemetry, supervisor, membership.
