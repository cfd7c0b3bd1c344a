//! Scripted monitors.
