//! What every program of Freezeframe needs to run: log output, an orderly stop, and the administrative HTTP server.

pub mod admin;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;
