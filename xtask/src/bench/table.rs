//! Measurements, and the least, the middle and the greatest of them.

use anyhow::Result;
use freezeframe_e2e::WorldConfig;
use serde::Serialize;

use super::layer::Layers;

/// Size of every disk.
pub const DISK_MIB: u64 = 512;

/// One snapshot; times in milliseconds.
#[derive(Serialize)]
pub struct Sample {
    /// Freeze sent to freeze answered: the guest's part.
    pub freeze: f64,
    /// Freeze answered to thaw sent: the part of whoever cuts.
    pub hold: f64,
    /// The cuts of all disks alone.
    pub skew: f64,
    /// How long the virtual CPUs were stopped.
    pub pause: f64,
    /// The longest time that the guest's writer stood still, the flush before the freeze included.
    pub gap: f64,
    /// Creation to Ready; a bare script has none.
    pub ready: Option<f64>,
    /// Writes to the API besides the user's own.
    pub writes: Option<f64>,
}

/// All snapshots of one guest in one way.
#[derive(Serialize)]
pub struct Row {
    layers: String,
    disks: usize,
    load: String,
    way: &'static str,
    pub samples: Vec<Sample>,
}

impl Row {
    pub fn new(config: &WorldConfig, layers: Layers, way: &'static str) -> Self {
        let load = format!("{:?}", config.load).to_lowercase();
        Self { layers: layers.name(), disks: config.disks.len(), load, way, samples: vec![] }
    }
}

/// Everything that was measured.
#[derive(Default, Serialize)]
pub struct Results {
    pub rows: Vec<Row>,
    /// Resident memory of each program at the end, in MiB.
    pub resident: Vec<(&'static str, f64)>,
}

type Column = (&'static str, fn(&Sample) -> Option<f64>);

const COLUMNS: [Column; 7] = [
    ("freeze", |sample| Some(sample.freeze)),
    ("hold", |sample| Some(sample.hold)),
    ("pause", |sample| Some(sample.pause)),
    ("cut", |sample| Some(sample.skew)),
    ("writer's gap", |sample| Some(sample.gap)),
    ("to Ready", |sample| sample.ready),
    ("API writes", |sample| sample.writes),
];

impl Results {
    /// The table, as Markdown.
    pub fn print(&self) {
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        println!("\nmin / median / max in ms; programs of the {profile} profile, guest by TCG\n");
        let names: Vec<_> = COLUMNS.iter().map(|(name, _)| format!("{name:>20}")).collect();
        println!("| layers  | disks | load  | way          | {} |", names.join(" | "));
        println!(
            "|---------|------:|-------|--------------|{}",
            "---------------------:|".repeat(COLUMNS.len()).replace("--|", "-|")
        );
        for row in &self.rows {
            let cells: Vec<_> = COLUMNS.iter().map(|(_, of)| format!("{:>20}", spread(&row.samples, *of))).collect();
            println!(
                "| {:7} | {:>5} | {:5} | {:12} | {} |",
                row.layers,
                row.disks,
                row.load,
                row.way,
                cells.join(" | ")
            );
        }
        let resident: Vec<_> = self.resident.iter().map(|(name, mib)| format!("{name} {mib:.1} MiB")).collect();
        println!("\nresident memory at the end: {}\n", resident.join(", "));
    }

    /// Every measurement.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

fn spread(samples: &[Sample], of: fn(&Sample) -> Option<f64>) -> String {
    let mut values: Vec<f64> = samples.iter().filter_map(of).collect();
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(greatest)) = (values.first(), values.last()) else { return "-".to_owned() };
    format!("{least:.1} / {:.1} / {greatest:.1}", values[values.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found_in_any_order() {
        let sample = |hold| Sample { freeze: 0.0, hold, skew: 0.0, pause: 0.0, gap: 0.0, ready: None, writes: None };
        let samples: Vec<_> = [5.0, 1.0, 2.0].map(sample).into();
        assert_eq!(spread(&samples, |sample| Some(sample.hold)), "1.0 / 2.0 / 5.0");
        assert_eq!(spread(&samples, |sample| sample.ready), "-");
    }
}
