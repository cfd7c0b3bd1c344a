//! Random lives of a VM: snapshots, writes, deletions, restarts, and agents that die anywhere, against a model of what
//! every disk and every snapshot must read. After each step every byte is compared.
//!
//! A life is its seed. `CHAIN_SEED=7` lives that one alone; `CHAIN_LIVES=100` lives as many that nobody has lived
//! before. Their seeds are printed.

use std::time::{Duration, SystemTime};

use freezeframe_api::v1alpha1::{ContentPhase, DiskSnapshotState, Limits};
use tokio::time::Instant;

use crate::crashes::cut_off;
use crate::lab::{Lab, Snapshot, Wanted};
use crate::shapes::{Shape, lab};

/// Lives of every run.
const FIXED: [u64; 6] = [1, 2, 3, 4, 5, 6];
const STEPS: u32 = 30;
/// Longer chains only take longer.
const MOST_SNAPSHOTS: usize = 5;
const MOST_RETAINED: usize = 3;
/// A snapshot waits fewer times than this, and a deletion too.
const MOST_POLLS: u64 = 160;

/// Not [`Shape::Legacy`]: there a deletion or a snapshot may have to wait until the VM is restarted.
const SHAPES: [Shape; 7] = [
    Shape::Blockdev,
    Shape::Inline,
    Shape::Direct,
    Shape::Throttled,
    Shape::Iothreads,
    Shape::InlineIothreads,
    Shape::Backed,
];

/// Numbers that look random and are the same for the same seed: splitmix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }

    /// Crashes in the beginning as often as in all the rest.
    fn polls(&mut self) -> usize {
        let most = self.of(&[20, MOST_POLLS]);
        usize::try_from(1 + self.below(most)).unwrap()
    }
}

/// What happens around an agent's death.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    Nothing,
    Write,
    Restart,
    WriteAndRestart,
}

const MEANWHILE: [Meanwhile; 4] =
    [Meanwhile::Nothing, Meanwhile::Write, Meanwhile::Restart, Meanwhile::WriteAndRestart];

#[derive(Clone, Copy, Debug)]
enum Step {
    Write,
    Take,
    /// The agent dies at the given wait; another one goes on.
    TakeCutOff(usize, Meanwhile),
    Delete(u32),
    /// The same; before another agent goes on, a second snapshot's deletion may begin.
    DeleteCutOff(u32, usize, Meanwhile, Option<u32>),
    /// The snapshot goes, and its images are kept.
    Retain(u32),
    /// What no snapshot needs goes out of chains that are too deep.
    Shorten,
    /// The agent dies at the given wait of it; another one goes on.
    ShortenCutOff(usize, Meanwhile),
    Restart,
    Stop,
    Start,
}

fn next(chance: &mut Chance, lab: &mut Lab) -> Step {
    let snapshots: Vec<_> = lab.snapshots.keys().copied().filter(|number| !lab.retained.contains(number)).collect();
    let running = lab.machine.is_running();
    loop {
        return match chance.below(16) {
            0 if running => Step::Write,
            1..=3 if running && snapshots.len() < MOST_SNAPSHOTS => Step::Take,
            4 | 5 if running && snapshots.len() < MOST_SNAPSHOTS => {
                Step::TakeCutOff(chance.polls(), chance.of(&MEANWHILE))
            }
            6 | 7 if !snapshots.is_empty() => Step::Delete(chance.of(&snapshots)),
            8 | 9 if !snapshots.is_empty() => {
                let (gone, polls, meanwhile) = (chance.of(&snapshots), chance.polls(), chance.of(&MEANWHILE));
                let other = Some(chance.of(&snapshots)).filter(|other| *other != gone);
                Step::DeleteCutOff(gone, polls, meanwhile, other)
            }
            10 if running => chance.of(&[Step::Restart, Step::Stop]),
            11 if !running => Step::Start,
            12 if !snapshots.is_empty() && lab.retained.len() < MOST_RETAINED => Step::Retain(chance.of(&snapshots)),
            13 if running && !lab.snapshots.is_empty() => Step::Shorten,
            14 | 15 if running && !lab.retained.is_empty() => {
                Step::ShortenCutOff(chance.polls(), chance.of(&MEANWHILE))
            }
            _ => continue,
        };
    }
}

impl Meanwhile {
    async fn happen(self, lab: &mut Lab) {
        if matches!(self, Self::Write | Self::WriteAndRestart) && lab.machine.is_running() {
            lab.write().await;
        }
        if matches!(self, Self::Restart | Self::WriteAndRestart) {
            lab.restart().await;
        }
    }
}

impl Step {
    async fn happen(self, lab: &mut Lab) {
        match self {
            Self::Write => lab.write().await,
            Self::Take => drop(lab.take().await),
            Self::TakeCutOff(polls, meanwhile) => take_cut_off(lab, polls, meanwhile).await,
            Self::Delete(number) => delete(lab, number).await,
            Self::DeleteCutOff(number, polls, meanwhile, other) => {
                let order = lab.snapshots[&number].order.clone();
                cut_off(Box::pin(lab.sessions.delete(&order)), polls).await;
                meanwhile.happen(lab).await;
                if let Some(other) = other {
                    // It may have to wait for a job that the first agent started; what it does, it does in between.
                    lab.sessions.delete(&lab.snapshots[&other].order).await.unwrap();
                }
                delete(lab, number).await;
                if let Some(other) = other {
                    delete(lab, other).await;
                }
            }
            Self::Retain(number) => {
                lab.retain(number).await;
                lab.retained.insert(number);
            }
            Self::Shorten => println!("{:?}", lab.shorten().await.unwrap()),
            Self::ShortenCutOff(polls, meanwhile) => {
                cut_off(Box::pin(lab.shorten()), polls).await;
                meanwhile.happen(lab).await;
                lab.shorten().await.unwrap();
            }
            Self::Restart => lab.restart().await,
            Self::Stop => lab.machine.kill(),
            Self::Start => lab.machine.start().await,
        }
    }
}

/// Deletes a snapshot; one that a retained image needs is retained, too.
async fn delete(lab: &mut Lab, number: u32) {
    let order = lab.snapshots[&number].order.clone();
    let status = lab.delete_order(&order).await;
    if status.disks.iter().any(|disk| disk.state == DiskSnapshotState::Retained) {
        lab.retained.insert(number);
    } else {
        lab.snapshots.remove(&number);
    }
}

/// What became Ready is of one moment: when the first agent was asked, or when the second one was. The model knows
/// which by the first disk, and the others must agree.
async fn take_cut_off(lab: &mut Lab, polls: usize, meanwhile: Meanwhile) {
    let (number, order) = lab.order();
    let first = lab.views();
    cut_off(Box::pin(lab.sessions.advance(&order, &Wanted)), polls).await;
    meanwhile.happen(lab).await;
    let second = lab.views();
    let status = lab.advance(&order).await;
    assert!(matches!(status.phase, Some(ContentPhase::Ready | ContentPhase::Failed)), "{status:?}");
    if status.phase == Some(ContentPhase::Ready) {
        let found = crate::machine::view(&lab.handles_of(&order)[0]);
        let views = if found == first[0] { first } else { second };
        lab.snapshots.insert(number, Snapshot { order, views });
    } else {
        lab.delete_order(&order).await;
    }
}

/// Says how to live a life again when it ends badly.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("live it again with CHAIN_SEED={}", self.0);
        }
    }
}

async fn live(seed: u64) {
    let _replay = Replay(seed);
    let mut chance = Chance(seed);
    let (shape, disks) = (chance.of(&SHAPES), chance.of(&[1, 2]));
    println!("seed {seed}: {disks} disks, {shape:?}");
    let mut lab = lab(shape, disks).await;
    lab.limits = Limits { max_chain_depth: Some(1), ..Limits::default() };
    for number in 1..=STEPS {
        let step = next(&mut chance, &mut lab);
        println!("seed {seed}, step {number}: {step:?}");
        Box::pin(step.happen(&mut lab)).await;
        lab.check().await;
    }
    if !lab.machine.is_running() {
        lab.machine.start().await;
    }
    while let Some(number) = lab.snapshots.keys().copied().find(|number| !lab.retained.contains(number)) {
        delete(&mut lab, number).await;
        lab.check().await;
    }
}

fn seeds() -> Vec<u64> {
    let number = |variable: &str| std::env::var(variable).ok().map(|value| value.parse::<u64>().unwrap());
    if let Some(seed) = number("CHAIN_SEED") {
        return vec![seed];
    }
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let unknown = (0..number("CHAIN_LIVES").unwrap_or_default()).map(|at| now * 1000 + at);
    FIXED.into_iter().chain(unknown).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_in_whatever_order_every_disk_and_snapshot_reads_as_it_must() {
    for seed in seeds() {
        let started = Instant::now();
        Box::pin(live(seed)).await;
        let took = started.elapsed();
        println!("seed {seed} took {took:?}");
        assert!(took < Duration::from_secs(600), "a life that doesn't end");
    }
}
