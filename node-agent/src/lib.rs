//! The per-node agent of Freezeframe.
//!
//! [`targets`] publishes the VMs of this node; [`controller`] watches this node's work orders and runs one
//! [`session`] for each; a session works through [`drivers`] on one VM's [`hypervisor`].

pub mod args;
pub mod boot;
pub mod controller;
mod crash;
pub mod drivers;
pub mod fill;
pub mod governor;
pub mod hypervisor;
pub mod locks;
pub mod metrics;
mod report;
pub mod restore;
pub mod session;
pub mod targets;
