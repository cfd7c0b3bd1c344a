//! `cargo xtask bench`: what a snapshot costs the guest, beside a bare QMP script that cuts the same disks of the same guest.

mod bare;
mod cost;
mod layer;
mod ours;
mod table;
mod way;

use std::path::PathBuf;

use anyhow::{Context, Result};
use freezeframe_e2e::{DiskSpec, Filesystem, Guest, Load, World, WorldConfig};

use crate::progress::say;
use crate::{demo, setup};
use layer::Layers;
use table::{Results, Row};
use way::Way;

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
            for way in Way::ALL {
                let config = configuration(*layers, disks, load.into(), way);
                say(format_args!("{}", config.vm));
                let guest = boot(&mut world, &config, *layers).await?;
                let world = world.as_mut().context("there is no world")?;
                let mut row = Row::new(&config, *layers, way.name());
                row.samples = way.measure(world, &guest, &config, *layers, options.rounds).await?;
                results.rows.push(row);
                clear(guest)?;
            }
        }
        results.resident = cost::resident(&world.context("nothing was to be measured")?.programs)?;
    }
    Ok(results)
}

fn configuration(layers: Layers, disks: u8, load: Load, way: Way) -> WorldConfig {
    let filesystem = |index: u8| if index.is_multiple_of(2) { Filesystem::Ext4 } else { Filesystem::Xfs };
    let disk = |index: u8| DiskSpec {
        format: layers.of(index.into()).format(),
        filesystem: filesystem(index),
        mib: table::DISK_MIB,
    };
    WorldConfig {
        namespace: "bench".into(),
        vm: format!("{}-{disks}-{load:?}-{way:?}", layers.name()).to_lowercase(),
        disks: (0..disks).map(disk).collect(),
        // More than there are disks: later guests of the same world have more.
        places: (0..8).map(|index| layers.of(index).place()).collect(),
        load,
        ..WorldConfig::default()
    }
}

/// A guest of the world, which is started with the first one.
async fn boot(world: &mut Option<World>, config: &WorldConfig, layers: Layers) -> Result<Guest> {
    if let Some(world) = &world {
        return world.boot(config).await;
    }
    let started = world.insert(World::start(config.clone()).await?);
    started.apply_class(ours::CLASS, &layers.drivers(&started.copies()?))?;
    started.guest.take().context("the world has no guest")
}

/// What is left of a VM that is gone would be probed on and on, and its images fill the file system.
fn clear(guest: Guest) -> Result<()> {
    let config = guest.config().clone();
    drop(guest);
    std::fs::remove_dir_all(config.socket_directory())?;
    config.disks.iter().try_for_each(|disk| Ok(std::fs::remove_file(&disk.path)?))
}
