//! The parts that the end-to-end tests, the demo and the benchmarks are made of: a real control plane, real guests, real
//! programs, and a witness that looks at the resulting images from outside.
//!
//! Everything that is started here ends with its owner: on drop, and also when the owning process dies without dropping.
//! The tests use this crate as a whole; `xtask setup` uses [`Cache`] to know where to put what it builds.

mod admin;
mod cache;
mod certificates;
mod control_plane;
mod disk;
mod guest;
mod heartbeat;
mod loop_mount;
mod monitor;
mod node_vm;
mod ports;
mod process;
mod programs;
pub mod restores;
pub mod snapshots;
mod tool;
mod wait;
pub mod witness;
mod world;

pub use cache::Cache;
pub use control_plane::{ControlPlane, Controllers};
pub use disk::{Disk, Filesystem, Format};
pub use guest::{Agent, Guest, GuestConfig, Load, Stopped, Style, Trouble, Verified, verify_by_booting};
pub use heartbeat::{Beat, Heartbeat};
pub use loop_mount::{HostFilesystem, LoopMount};
pub use monitor::Monitor;
pub use node_vm::{Ended, NodeVm, NodeVmConfig};
pub use ports::free_port;
pub use process::{Invocation, Process};
pub use programs::{Program, Programs, Site};
pub use tool::run;
pub use wait::await_condition;
pub use world::{DiskSpec, Place, World, WorldConfig, await_object};
