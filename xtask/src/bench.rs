//! `cargo xtask bench`: what a snapshot costs the guest, beside a bare QMP script that cuts the same disks of the same guest.

mod bare;
mod cost;
mod layer;
mod ours;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};
use freezeframe_e2e::{DiskSpec, Filesystem, Guest, Load, World, WorldConfig};

use crate::progress::say;
use crate::{demo, setup};
use layer::Layers;
use table::{Results, Row};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Snapshots of each kind
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Numbers of disks, at most eight each
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u8).range(1..=8))]
    disks: Vec<u8>,
    /// What the disks lie on, and so how they are cut
    #[arg(long, value_enum, value_delimiter = ',', default_value = "overlay,reflink,btrfs,copy,mixed")]
    layers: Vec<Layers>,
    /// What the guest does
    #[arg(long, value_enum, value_delimiter = ',', default_value = "light,heavy")]
    loads: Vec<demo::Load>,
    /// Write every single measurement to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints; nothing is judged.
pub fn run(options: &Options) -> Result<()> {
    setup::run_without_node_vm()?;
    demo::build_programs()?;
    let results = tokio::runtime::Runtime::new()?.block_on(measure(options))?;
    results.print();
    if let Some(path) = &options.json {
        std::fs::write(path, results.json()?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

async fn measure(options: &Options) -> Result<Results> {
    let mut results = Results::default();
    for layers in &options.layers {
        // A world has the file systems of its first guest.
        let mut world: Option<World> = None;
        let combinations = options.disks.iter().flat_map(|disks| options.loads.iter().map(move |load| (*disks, *load)));
        for (disks, load) in combinations {
            let config = configuration(*layers, disks, load.into());
            let guest = if let Some(world) = &world {
                world.boot(&config).await?
            } else {
                let started = world.insert(World::start(config.clone()).await?);
                started.apply_class(ours::CLASS, &layers.drivers(&started.copies()?))?;
                started.guest.take().context("the world has no guest")?
            };
            let world = world.as_mut().context("there is no world")?;
            results.rows.extend(compare(world, &guest, &config, *layers, options.rounds).await?);
            // What is left of a VM that is gone would be probed on and on.
            let sockets = guest.config().socket_directory();
            drop(guest);
            std::fs::remove_dir_all(sockets)?;
        }
        results.resident = cost::resident(&world.context("nothing was to be measured")?.programs)?;
    }
    Ok(results)
}

fn configuration(layers: Layers, disks: u8, load: Load) -> WorldConfig {
    let filesystem = |index: u8| if index.is_multiple_of(2) { Filesystem::Ext4 } else { Filesystem::Xfs };
    let disk = |index: u8| DiskSpec {
        format: layers.of(index.into()).format(),
        filesystem: filesystem(index),
        mib: table::DISK_MIB,
    };
    WorldConfig {
        namespace: "bench".into(),
        vm: format!("{}-{disks}-{load:?}", layers.name()).to_lowercase(),
        disks: (0..disks).map(disk).collect(),
        // More than there are disks: later guests of the same world have more.
        places: (0..8).map(|index| layers.of(index).place()).collect(),
        load,
        ..WorldConfig::default()
    }
}

/// One guest, cut in all ways; the agent is away while the bare script has the sockets.
async fn compare(
    world: &mut World,
    guest: &Guest,
    config: &WorldConfig,
    layers: Layers,
    rounds: u32,
) -> Result<Vec<Row>> {
    let mut rows = vec![];
    if world.programs.agent.is_running()? {
        world.programs.agent.kill_9()?;
    }
    for (way, flush) in [("bare", false), ("bare, synced", true)] {
        say(format_args!("{}: {way}", config.vm));
        let scratch = world.directory().join("bare");
        let mut row = Row::new(config, layers, way);
        let mut script = bare::Script::new(guest, &scratch, layers).await?;
        for _ in 0..rounds {
            row.samples.push(script.round(flush).await?);
        }
        rows.push(row);
    }
    say(format_args!("{}: freezeframe", config.vm));
    world.programs.agent.restart()?;
    world.programs.agent.await_ready().await?;
    let mut row = Row::new(config, layers, "freezeframe");
    ours::await_target(world, &config.vm).await?;
    for round in 0..rounds {
        row.samples.push(ours::round(world, guest, &config.vm, round).await?);
    }
    rows.push(row);
    Ok(rows)
}
