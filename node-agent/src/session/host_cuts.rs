//! The cuts outside QEMU: all at once, each on a thread of its own.

use super::window::WindowError;
use crate::drivers::{DriverError, HostCut};

/// Makes all cuts outside QEMU at once and waits for the last.
pub(super) async fn host_cuts(cuts: Vec<HostCut>) -> Result<(), WindowError> {
    let made = cuts.into_iter().map(|HostCut { disks, run }| {
        let disks = disks.join(", ");
        async move {
            let made = tokio::task::spawn_blocking(move || run()).await;
            let made = made.unwrap_or_else(|_| Err(DriverError::NotNow("the cut was given up".into())));
            made.map_err(|error| WindowError::HostCut(disks, Box::new(error)))
        }
    });
    // All of them, also after the first failure: none may be under way when this returns.
    futures::future::join_all(made).await.into_iter().collect()
}
