//! What a disk should read: patterns in blocks, so that each epoch of a test is told from all others.

use std::path::Path;
use std::process::Command;

/// Virtual size of every disk.
pub const SIZE: u64 = 8 << 20;
const BLOCKS: usize = 16;
const STRIDE: u64 = SIZE / BLOCKS as u64;
const LENGTH: u64 = 64 << 10;

/// The pattern of each block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content([u8; BLOCKS]);

impl Content {
    /// Overwrites a block that every epoch overwrites, one that the epoch before wrote too, and one of its own;
    /// returns `qemu-io`'s commands for it.
    pub fn write(&mut self, epoch: u8) -> Vec<String> {
        let own = 1 + usize::from(epoch) % (BLOCKS - 1);
        let next = 1 + (usize::from(epoch) + 1) % (BLOCKS - 1);
        [0, own, next].into_iter().map(|block| self.write_block(block, epoch)).collect()
    }

    fn write_block(&mut self, block: usize, pattern: u8) -> String {
        self.0[block] = pattern;
        format!("write -P {pattern} {} {LENGTH}", block as u64 * STRIDE)
    }

    /// `qemu-io`'s commands that check it.
    pub fn reads(&self) -> Vec<String> {
        let read = |(block, pattern): (usize, &u8)| format!("read -P {pattern} {} {LENGTH}", block as u64 * STRIDE);
        self.0.iter().enumerate().map(read).collect()
    }

    /// Whether an image reads so; else what `qemu-io` says.
    pub fn check(&self, image: &Path, format: &str) -> Result<(), String> {
        qemu_io(image, format, &["-r", "-U"], &self.reads())
    }
}

/// Runs `qemu-io` commands on an image.
pub fn qemu_io(image: &Path, format: &str, options: &[&str], commands: &[String]) -> Result<(), String> {
    let mut program = Command::new("qemu-io");
    program.args(options).args(["-f", format]).args(commands.iter().flat_map(|command| ["-c", command.as_str()]));
    let output = program.arg(image).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let good = output.status.success() && !said.contains("fail") && !said.contains("rror");
    if good { Ok(()) } else { Err(format!("{}: {said}", image.display())) }
}
