//! `lvm`: disks that are logical volumes, thin or thick, by LVM's own snapshots.
//!
//! The snapshots are made in the window, one command after the other for each volume group, whose lock they would
//! only wait for otherwise; the virtual CPUs stand still, so together they are one instant. They are made inactive
//! where LVM can, and become devices afterwards.
//!
//! A thick snapshot has a fixed space for what changes in the origin. Once that is used up the snapshot is worth
//! nothing, and [`fill`] says so: it is for whoever watches it.

pub mod commands;
mod in_flight;
mod parameters;
pub mod report;
mod space;
mod state;
pub mod tags;
pub mod target;
pub mod volume;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;

use super::{
    Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, Fill, HostCut, Need, Pool, PoolFree, Removal, Result,
    SnapshotDriver, Verdict,
};
use crate::hypervisor::Vm;
use crate::hypervisor::device::{self, BlockDevice, LogicalVolume};
use crate::hypervisor::image::{ImageError, ImageRoots};
use commands::Space;
use in_flight::{InFlight, is_in_flight};
use parameters::Parameters;
use report::Row;
use state::State;
use volume::{NameError, Volume};

/// The driver.
pub struct Lvm;

#[async_trait]
impl SnapshotDriver for Lvm {
    fn name(&self) -> &'static str {
        "lvm"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        Parameters::parse(parameters).map(drop)
    }

    fn can_take(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Verdict {
        let volume = match &disk.device {
            Err(why) => return Verdict::Unusable(format!("not a logical volume: {why}")),
            Ok(BlockDevice { path, volume: None }) => {
                return Verdict::Unusable(format!("{} is not a logical volume", path.display()));
            }
            Ok(BlockDevice { volume: Some(volume), .. }) => volume,
        };
        let sized = Parameters::parse(parameters).is_ok_and(|parameters| parameters.size.is_some());
        match volume {
            LogicalVolume { volume, thin: true } => {
                Verdict::Usable(format!("{volume} is thin: a snapshot in its pool"))
            }
            LogicalVolume { volume, .. } if sized => {
                Verdict::Usable(format!("{volume} is thick: a snapshot with space set apart for changes"))
            }
            LogicalVolume { volume, .. } => Verdict::Unusable(format!(
                "{volume} is thick: needs a class that says how much space to set apart (parameter `size`)"
            )),
        }
    }

    fn plan(&self, task: &mut DiskTask, graph: &BlockGraph, _: &ImageRoots) -> Result<()> {
        let gone = || DriverError::NotNow(format!("disk {} is not there any more", task.disk));
        let node = graph.node(&task.node).ok_or_else(gone)?;
        let device = BlockDevice::of(node, graph, 0).map_err(DriverError::NotNow)?;
        let LogicalVolume { volume: origin, thin } = device.volume.ok_or_else(gone)?;
        let size = if thin { None } else { Parameters::parse(&task.parameters)?.size };
        let snapshot = origin.snapshot(&task.id)?;
        task.set_state(&State { origin, snapshot, thin, size, device: device.path, needs: None, pool: None })
    }

    async fn prepare(&self, _: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        let rows = commands::volumes(state.origin.group()).await?;
        let origin = find(&rows, &state.origin)
            .ok_or_else(|| DriverError::NotNow(format!("LVM has no volume {}", state.origin)))?;
        if find(&rows, &state.snapshot).is_some() {
            return Err(DriverError::NotNow(format!("there is a volume {} already", state.snapshot)));
        }
        space::check_health(origin, state.origin.group())?;
        if state.thin {
            state.pool = Some(space::check_pool(&rows, origin, &state, &Parameters::parse(&task.parameters)?)?);
        } else {
            state.needs = space::thick_needs(origin, &state)?;
        }
        // The host's cache is written out now, so that little is left for the window.
        flush(state.clone()).await?;
        task.set_state(&state)
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let mut by_group: BTreeMap<String, Vec<(String, State, String)>> = BTreeMap::new();
        for task in group {
            let state: State = task.state()?;
            let volumes = by_group.entry(state.origin.group().to_owned()).or_default();
            volumes.push((task.disk.clone(), state, task.id.clone()));
        }
        for (name, volumes) in &by_group {
            let needs: Vec<_> = volumes.iter().filter_map(|(_, state, _)| state.needs).collect();
            space::check_group(name, &needs)?;
        }
        let host = by_group.into_values().map(host_cut).collect::<Result<_>>()?;
        Ok(Cut { host, ..Cut::default() })
    }

    fn needs_pause(&self) -> bool {
        true
    }

    async fn complete(&self, _: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        let row = ours(&state, task).await?;
        verify(&row, &state, task)?;
        if state.thin {
            commands::activate(&state.snapshot, &row).await?;
        }
        let handle = state.snapshot.path();
        device::number_of(&handle).map_err(DriverError::Verify)?;
        task.artifact = Some(Artifact { handle, format: task.format.clone() });
        Ok(())
    }

    fn needs(&self, _: &DiskTask) -> Option<Need> {
        None
    }

    fn area(&self, task: &DiskTask) -> Option<u64> {
        task.state::<State>().ok()?.needs.map(|needs| needs.bytes)
    }

    fn pool(&self, task: &DiskTask) -> Option<Pool> {
        task.state::<State>().ok()?.pool
    }

    async fn fill(&self, task: &DiskTask) -> Result<Option<Fill>> {
        fill(task).await
    }

    async fn remove(&self, _: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        if is_in_flight(&state.snapshot) {
            return Err(DriverError::NotNow(format!("LVM is still making {}", state.snapshot)));
        }
        let rows = commands::volumes(state.snapshot.group()).await?;
        match find(&rows, &state.snapshot) {
            // Somebody else's volume of that name: ours was never made, or is gone. The origin's name proves nothing:
            // it may have got another one, or be gone.
            Some(row) if !row.is_ours(&task.id) => Ok(Removal::Done),
            None => Ok(Removal::Done),
            Some(row) if row.is_open() => {
                Err(DriverError::NotNow(format!("{} is in use; close it first", state.snapshot.path().display())))
            }
            Some(row) => {
                let replaced = put_away_for(row, &rows, state.snapshot.group())?;
                commands::remove(replaced.as_ref().unwrap_or(&state.snapshot)).await?;
                Ok(Removal::Again)
            }
        }
    }
}

/// The volume that a disk was when this driver cut it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// It.
    pub volume: Volume,
    /// What QEMU called it.
    pub device: PathBuf,
}

/// The volume that a disk was when this driver cut it; none if another driver did.
#[must_use]
pub fn origin(task: &DiskTask) -> Option<Origin> {
    let state: State = task.state().ok().filter(|_| task.driver == Lvm.name())?;
    Some(Origin { volume: state.origin, device: state.device })
}

/// Looks at the space of a disk's snapshot: its own, or its pool's.
pub async fn fill(task: &DiskTask) -> Result<Option<Fill>> {
    let (state, parameters): (State, _) = (task.state()?, Parameters::parse(&task.parameters)?);
    if state.thin {
        let rows = commands::volumes(state.snapshot.group()).await?;
        let pool = find(&rows, &state.snapshot).and_then(|row| space::pool_of(&rows, row));
        return Ok(pool.map(|pool| space::pool_fill(pool, &parameters)));
    }
    let row = ours(&state, task).await?;
    let (percent, overflowed) = (row.data_used(), row.is_overflowed());
    let warn = f64::from(parameters.warn_percent);
    Ok(Some(Fill { percent, overflowed, low: percent >= warn }))
}

/// What is free in the pools of a group's thin volumes, by the volumes' names. Keeps no window waiting.
pub async fn pools(group: &str) -> Result<BTreeMap<String, PoolFree>> {
    Ok(space::pools_free(&commands::volumes_unlocked(group).await?, group))
}

fn find<'a>(rows: &'a [Row], volume: &Volume) -> Option<&'a Row> {
    rows.iter().find(|row| row.lv_name == volume.name())
}

/// The volume that a restore put away and that nothing but this snapshot needs: both go in one step.
fn put_away_for(snapshot: &Row, rows: &[Row], group: &str) -> Result<Option<Volume>> {
    let origin = rows.iter().find(|row| snapshot.needs(&row.lv_name) && row.is_put_away());
    // A snapshot whose space lies in several pieces has several rows.
    let is_last = |origin: &&Row| {
        let mut needing = rows.iter().filter(|row| row.needs(&origin.lv_name));
        needing.all(|row| row.lv_uuid == snapshot.lv_uuid)
    };
    match origin.filter(is_last) {
        Some(row) if row.is_open() => {
            Err(DriverError::NotNow(format!("{group}/{} is in use; close it first", row.lv_name)))
        }
        Some(row) => Ok(Some(Volume::new(group, &row.lv_name)?)),
        None => Ok(None),
    }
}

async fn ours(state: &State, task: &DiskTask) -> Result<Row> {
    let row = commands::find(&state.snapshot).await?.filter(|row| row.is_ours(&task.id));
    row.ok_or_else(|| DriverError::Verify(format!("disk {}: snapshot {} is missing", task.disk, state.snapshot)))
}

fn verify(row: &Row, state: &State, task: &DiskTask) -> Result<()> {
    let wrong = |what: String| Err(DriverError::Verify(format!("disk {}: {} {what}", task.disk, state.snapshot)));
    if row.origin != state.origin.name() {
        return wrong(format!("is a snapshot of `{}`, not of {}", row.origin, state.origin));
    }
    if row.is_overflowed() {
        let space = row.lv_size;
        return wrong(format!(
            "lost its contents: more changed than the {space} bytes that were set apart; raise `size`"
        ));
    }
    let size = if state.thin { row.lv_size } else { row.origin_size };
    // Within another format the volume's own size says nothing about the disk's.
    if task.format == "raw" && size != task.size {
        return wrong(format!("has {size} bytes, not {}", task.size));
    }
    Ok(())
}

async fn flush(state: State) -> Result<()> {
    let flushed = tokio::task::spawn_blocking(move || sync(&open(&state)?, &state)).await;
    flushed.unwrap_or_else(|error| Err(DriverError::NotNow(error.to_string())))
}

fn open(state: &State) -> Result<File> {
    let io = |source| ImageError::Io { doing: "open", path: state.device.clone(), source };
    Ok(File::open(&state.device).map_err(io)?)
}

fn sync(device: &File, state: &State) -> Result<()> {
    let io = |source| ImageError::Io { doing: "flush", path: state.device.clone(), source };
    Ok(device.sync_data().map_err(io)?)
}

/// The snapshots of one volume group, one after the other.
fn host_cut(volumes: Vec<(String, State, String)>) -> Result<HostCut> {
    let disks = volumes.iter().map(|(disk, ..)| disk.clone()).collect();
    let commands = volumes.into_iter().map(|(_, state, id)| {
        let space = state.size.map_or(Space::Pool, Space::Apart);
        let arguments = commands::snapshot_arguments(&state.origin, &state.snapshot, &id, space);
        Ok((open(&state)?, state, arguments))
    });
    let commands: Vec<_> = commands.collect::<Result<_>>()?;
    // Held until the cut is dropped: one that waits for a thread, or runs on after its window, is still to come.
    let in_flight = InFlight::enter(commands.iter().map(|(_, state, _)| state.snapshot.clone()).collect());
    let made = Mutex::new(0);
    let run = move || {
        let _in_flight = &in_flight;
        // QEMU's `stop` flushes but says nothing of a flush that failed; this one does.
        commands.iter().try_for_each(|(device, state, _)| sync(device, state))?;
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, _, arguments) in &commands[*made..] {
            commands::run_here(arguments)?;
            *made += 1;
        }
        Ok(())
    };
    Ok(HostCut { disks, run: Arc::new(run) })
}

impl From<NameError> for DriverError {
    fn from(error: NameError) -> Self {
        Self::NotNow(format!("the snapshot can't be named: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::report::tests::row;
    use super::*;

    #[test]
    fn a_volume_that_was_put_away_goes_with_the_last_snapshot_of_it_however_many_pieces_that_has() {
        let snapshot = row("t-vmsnap-1");
        let tags = "freezeframe-replaced".into();
        let put_away = Row { lv_name: "t".into(), lv_attr: "owi---s---".into(), lv_tags: tags, ..row("a") };
        let mut rows = vec![put_away, snapshot.clone(), snapshot.clone()];
        let goes_too = put_away_for(&snapshot, &rows, "vg0").unwrap();
        assert_eq!(goes_too, Some(Volume::new("vg0", "t").unwrap()));
        rows.push(Row { lv_uuid: "uuid-other".into(), ..snapshot.clone() });
        assert_eq!(put_away_for(&snapshot, &rows, "vg0").unwrap(), None, "another one needs it");
    }
}
