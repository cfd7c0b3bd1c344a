//! The per-node agent of Freezeframe.
//!
//! [`targets`] publishes the VMs of this node; [`orders`] watches this node's work orders: [`controller`] runs one
//! [`session`] for each snapshot, [`restore`] brings disks back; both work on one VM's [`hypervisor`], a session through
//! [`drivers`].

pub mod args;
pub mod boot;
mod controller;
pub mod crash;
pub mod drivers;
pub mod fill;
pub mod governor;
pub mod hypervisor;
pub mod locks;
pub mod metrics;
pub mod orders;
mod report;
pub mod restore;
pub mod session;
pub mod targets;

use freezeframe_qemu::causes;
