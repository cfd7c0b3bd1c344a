//! A crash came while names changed hands: whether the rest may follow, or the old images get their names back.
//!
//! The VM's owner may have started it without the disk that was missing, and have written to the others. What they wrote
//! is kept nowhere, so then everything goes back. Once a new image has a disk's name, no old one has any.

use freezeframe_api::conditions::reasons;

use super::Restores;
use super::names::NamesError;
use super::record::{DiskRestore, RestoreRecord};
use super::source::failed;
use super::stop::{hold_images, not_running};
use super::switch::{all, check_kept, check_unchanged};
use crate::crash;
use crate::hypervisor::lock::ImageLock;
use crate::session::outcome::Failure;

/// What is to be done.
pub enum Rest {
    /// Go on; nobody uses the old images that still have their names while the locks live.
    GoesOn(Vec<ImageLock>),
    /// Give the old images their names back, for this reason. Nobody uses them while the locks live.
    GoesBack(Failure, Vec<ImageLock>),
}

/// Looks at the disks whose turn hasn't come yet, with the VM stopped. Where every disk has its new image the VM may run.
pub async fn look(restores: &Restores, record: &RestoreRecord) -> Result<Rest, Failure> {
    let (mut rest, mut strange) = (vec![], None);
    let (mut finished, mut has_new) = (true, false);
    for (names, disk) in all(restores, record).map_err(|error| failed(&error))?.iter().zip(&record.disks) {
        let places = names.places().await.map_err(|error| failed(&error))?;
        finished &= places.is_finished();
        has_new |= places.made_is_in;
        if places.replaced_is_in {
            rest.push(disk.clone());
        } else if places.made_waits && places.is_taken {
            strange = Some(Failure::new(reasons::VM_CHANGED, format!("{names} is another image than before")));
        }
    }
    if finished {
        return Ok(Rest::GoesOn(vec![]));
    }
    not_running(restores, &record.order.vm).await?;
    let held = hold_images(restores, &rest).await?;
    not_running(restores, &record.order.vm).await?;
    let fine = match strange {
        Some(strange) => Err(strange),
        None => are_unchanged(restores, record, &rest).await,
    };
    match fine {
        Ok(()) => Ok(Rest::GoesOn(held)),
        Err(why) if !has_new && [reasons::VM_CHANGED, reasons::PRE_RESTORE_FAILED].contains(&why.reason) => {
            Ok(Rest::GoesBack(why, held))
        }
        Err(why) => Err(why),
    }
}

async fn are_unchanged(restores: &Restores, record: &RestoreRecord, rest: &[DiskRestore]) -> Result<(), Failure> {
    if rest.is_empty() {
        return Ok(());
    }
    let kept = check_kept(restores, record)?;
    for disk in rest {
        check_unchanged(restores, disk, &kept).await?;
    }
    Ok(())
}

/// Gives the old images that are away their names back. May be called again and again.
pub async fn put_back(restores: &Restores, record: &RestoreRecord) -> Result<(), NamesError> {
    for names in all(restores, record)? {
        if names.put_back().await? {
            crash::point("restore-put-back");
        }
    }
    Ok(())
}
