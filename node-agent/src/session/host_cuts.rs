//! The cuts outside QEMU: all at once, each on a thread of its own.

use std::time::Instant;

use super::window::WindowError;
use crate::crash;
use crate::drivers::{DriverError, HostCut};

/// Which disks one cut cut, and when it was done.
pub(super) type Made = (Vec<String>, Instant);

/// Makes all cuts outside QEMU at once and waits for the last.
pub(super) async fn host_cuts(cuts: Vec<HostCut>) -> Result<Vec<Made>, WindowError> {
    let made = cuts.into_iter().map(|HostCut { disks, run }| async move {
        let cut = move || {
            crash::point("host-cut");
            run().map(|()| Instant::now())
        };
        let made = tokio::task::spawn_blocking(cut).await;
        let made = made.unwrap_or_else(|_| Err(DriverError::NotNow("the cut was given up".into())));
        match made {
            Ok(at) => Ok((disks, at)),
            Err(error) => Err(WindowError::HostCut(disks.join(", "), Box::new(error))),
        }
    });
    // All of them, also after the first failure: none may be under way when this returns.
    futures::future::join_all(made).await.into_iter().collect()
}
