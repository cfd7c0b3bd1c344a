//! The ways in which the same disks are cut. Each has a guest of its own: an image that was cloned and written to lies in
//! more pieces, and what is cut later would pay for it.

use anyhow::Result;
use freezeframe_e2e::{Guest, World, WorldConfig};

use super::layer::Layers;
use super::table::Sample;
use super::{bare, ours};

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A script.
    Bare,
    /// The same, which has the guest write out what is dirty before.
    Synced,
    /// A VMSnapshot.
    Freezeframe,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::Bare, Self::Synced, Self::Freezeframe];

    /// As the table has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Synced => "bare, synced",
            Self::Freezeframe => "freezeframe",
        }
    }

    /// Cuts a guest's disks so often; the agent is away while the script has the sockets.
    pub async fn measure(
        self,
        world: &mut World,
        guest: &Guest,
        config: &WorldConfig,
        layers: Layers,
        rounds: u32,
    ) -> Result<Vec<Sample>> {
        if self == Self::Freezeframe {
            world.programs.agent.restart()?;
            world.programs.agent.await_ready().await?;
            return ours::rounds(world, guest, &config.vm, rounds).await;
        }
        if world.programs.agent.is_running()? {
            world.programs.agent.kill_9()?;
        }
        let scratch = world.directory().join("bare");
        let mut script = bare::Script::new(guest, &scratch, layers).await?;
        let mut samples = vec![];
        for _ in 0..rounds {
            samples.push(script.round(self == Self::Synced).await?);
        }
        Ok(samples)
    }
}
