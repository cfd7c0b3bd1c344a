//! `cargo xtask bench`: what a snapshot costs the guest, beside a bare QMP script that cuts the same disks of the same guest.

mod bare;
mod cost;
mod ours;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};
use freezeframe_e2e::{DiskSpec, Filesystem, Format, Guest, Load, World, WorldConfig};

use crate::progress::say;
use crate::{demo, setup};
use table::{Results, Row};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Snapshots of each kind
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Numbers of disks, at most four each
    #[arg(long, value_delimiter = ',', default_value = "1,2,4", value_parser = clap::value_parser!(u8).range(1..=4))]
    disks: Vec<u8>,
    /// Write every single measurement to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints; nothing is judged.
pub fn run(options: &Options) -> Result<()> {
    setup::run()?;
    demo::build_programs()?;
    let results = tokio::runtime::Runtime::new()?.block_on(measure(options))?;
    results.print();
    if let Some(path) = &options.json {
        std::fs::write(path, results.json()?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

async fn measure(options: &Options) -> Result<Results> {
    let combinations = options.disks.iter().flat_map(|disks| [(*disks, Load::Light), (*disks, Load::Heavy)]);
    let mut world: Option<World> = None;
    let mut results = Results::default();
    for (disks, load) in combinations {
        let config = configuration(disks, load);
        let guest = if let Some(world) = &world {
            world.boot(&config).await?
        } else {
            let started = world.insert(World::start(config.clone()).await?);
            started.guest.take().context("the world has no guest")?
        };
        let world = world.as_mut().context("there is no world")?;
        results.rows.extend(compare(world, &guest, &config, options.rounds).await?);
        // What is left of a VM that is gone would be probed on and on.
        let sockets = guest.config().socket_directory();
        drop(guest);
        std::fs::remove_dir_all(sockets)?;
    }
    results.resident = cost::resident(&world.context("nothing was to be measured")?.programs)?;
    Ok(results)
}

fn configuration(disks: u8, load: Load) -> WorldConfig {
    let filesystem = |index: u8| if index.is_multiple_of(2) { Filesystem::Ext4 } else { Filesystem::Xfs };
    let disk = |index| DiskSpec { format: Format::Qcow2, filesystem: filesystem(index), mib: table::DISK_MIB };
    WorldConfig {
        namespace: "bench".into(),
        vm: format!("{disks}-disks-{load:?}").to_lowercase(),
        disks: (0..disks).map(disk).collect(),
        load,
        ..WorldConfig::default()
    }
}

/// One guest, cut in all ways; the agent is away while the bare script has the sockets.
async fn compare(world: &mut World, guest: &Guest, config: &WorldConfig, rounds: u32) -> Result<Vec<Row>> {
    let mut rows = vec![];
    if world.programs.agent.is_running()? {
        world.programs.agent.kill_9()?;
    }
    for (way, flush) in [("bare", false), ("bare, synced", true)] {
        say(format_args!("{}: {way}", config.vm));
        let scratch = world.directory().join("bare");
        let mut row = Row::new(config, way);
        let mut script = bare::Script::new(guest, &scratch).await?;
        for _ in 0..rounds {
            row.samples.push(script.round(flush).await?);
        }
        rows.push(row);
    }
    say(format_args!("{}: freezeframe", config.vm));
    world.programs.agent.restart()?;
    world.programs.agent.await_ready().await?;
    let mut row = Row::new(config, "freezeframe");
    ours::await_target(world, &config.vm).await?;
    for round in 0..rounds {
        row.samples.push(ours::round(world, guest, &config.vm, round).await?);
    }
    rows.push(row);
    Ok(rows)
}
