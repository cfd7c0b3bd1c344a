//! The driver's functions one by one: called twice, and dropped half way.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use freezeframe_node_agent::drivers::{DiskTask, Env, Pace, Removal, SnapshotDriver};
use freezeframe_node_agent::hypervisor::Vm;
use freezeframe_node_agent::hypervisor::disks::disks;
use freezeframe_node_agent::session::window;
use std::time::Duration;

use crate::cases::{Case, drivers, for_every_case, parameters};
use crate::content::SIZE;
use crate::storage::Kind;
use crate::world::World;

const SOON: Duration = Duration::from_secs(30);
const MOST_STEPS: usize = 32;

/// A driver with its tasks, each function called on all of them.
struct Steps {
    driver: Arc<dyn SnapshotDriver>,
    tasks: Vec<DiskTask>,
}

impl Steps {
    async fn new(world: &World, case: Case) -> Self {
        let driver = drivers().find(case.driver).unwrap().clone();
        let found = disks(&world.vm().await, &world.sessions.roots).await.unwrap().found;
        let task = |(index, disk): (usize, freezeframe_node_agent::hypervisor::disks::FoundDisk)| DiskTask {
            disk: disk.name,
            driver: case.driver.into(),
            reason: String::new(),
            parameters: parameters(case.driver, world.copies.path()),
            id: "0123456789ab".into(),
            index,
            node: disk.node,
            format: disk.facts.format,
            size: disk.size,
            path: disk.facts.path.ok(),
            chain: disk.facts.chain.into_iter().flatten().map(|image| image.layer).collect(),
            vm: World::key(),
            snapshot: "snapshot-1".into(),
            target: None,
            start_with: None,
            state: serde_json::Value::Null,
            artifact: None,
        };
        Self { driver, tasks: found.into_iter().enumerate().map(task).collect() }
    }

    async fn plan(&mut self, world: &World) {
        let graph = world.vm().await.graph().await.unwrap();
        for task in &mut self.tasks {
            self.driver.plan(task, &graph, &world.sessions.roots).unwrap();
        }
    }

    async fn prepare(&mut self, world: &World) {
        let vm = world.vm().await;
        for task in &mut self.tasks {
            self.driver.prepare(&vm, &world.sessions.roots, task).await.unwrap();
        }
    }

    /// What the window does, without a guard: nobody else is there to break it. With `names` false it stops short of
    /// the exchange, as a crash would.
    async fn cut(&self, world: &World, names: bool) {
        let group: Vec<_> = self.tasks.iter().collect();
        let mut cut = self.driver.cut(&group, &world.sessions.roots).unwrap();
        // So that a copy is still under way when the next function is called.
        for backup in cut.actions.iter_mut().filter(|action| action["type"] == "blockdev-backup") {
            backup["data"]["speed"] = serde_json::json!(SIZE);
        }
        world.machine().stop().await;
        if !cut.actions.is_empty() {
            world.vm().await.qmp().transaction(&cut.actions, SOON).await.unwrap();
        }
        for host in &cut.host {
            (host.run)().unwrap();
        }
        for exchange in cut.exchanges.iter().filter(|_| names) {
            exchange.apply().unwrap();
        }
        world.machine().cont().await;
    }

    async fn complete(&mut self, world: &World) {
        let vm = world.vm().await;
        for task in &mut self.tasks {
            self.driver.complete(&vm, &world.sessions.roots, task).await.unwrap();
        }
    }

    async fn remove(&mut self, world: &World) {
        for task in &mut self.tasks {
            remove(self.driver.as_ref(), task, world).await;
        }
    }
}

async fn remove(driver: &dyn SnapshotDriver, task: &mut DiskTask, world: &World) {
    for _ in 0..MOST_STEPS {
        let mut vm: Vm = world.vm().await;
        let env = Env { vm: Some(&vm), roots: &world.sessions.roots, siblings: &[], pace: &Pace::default() };
        match driver.remove(&env, task).await.unwrap() {
            Removal::Done => return,
            Removal::Again => {}
            Removal::Switch(switch) => {
                let id = format!("{}-{}", task.id, task.index);
                window::switch(&mut vm, &world.sessions.guard, id, &switch).await.unwrap();
            }
            other => panic!("{other:?}: there is no other snapshot"),
        }
    }
    panic!("removing comes to no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_function_may_be_called_twice() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        let before = world.footprint().await;
        world.write().await;
        let mut steps = Steps::new(&world, case).await;
        steps.plan(&world).await;
        let planned = steps.tasks.clone();
        steps.plan(&world).await;
        assert_eq!(steps.tasks, planned);
        steps.prepare(&world).await;
        let (prepared, footprint) = (steps.tasks.clone(), world.footprint().await);
        steps.prepare(&world).await;
        assert_eq!((&steps.tasks, world.footprint().await), (&prepared, footprint));
        world.write().await;
        let taken = world.contents.clone();
        steps.cut(&world, true).await;
        world.write().await;
        steps.complete(&world).await;
        let (complete, footprint) = (steps.tasks.clone(), world.footprint().await);
        steps.complete(&world).await;
        assert_eq!((&steps.tasks, world.footprint().await), (&complete, footprint));
        for (task, content) in steps.tasks.iter().zip(&taken) {
            let artifact = task.artifact.as_ref().unwrap();
            content.check(&artifact.handle, &artifact.format).unwrap();
        }
        world.check_guest().await;
        steps.remove(&world).await;
        world.check_tidy(&before).await;
        steps.remove(&world).await;
        world.check_tidy(&before).await;
        world.check_guest().await;
    })
    .await;
}

/// Where the agent died, and what its journal knew then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Planned,
    /// Prepared, with a journal that only knows the plan.
    Preparing,
    Prepared,
    /// Cut in QEMU, the names not exchanged.
    Cutting,
    Cut,
    /// Complete, with a journal that only knows the cut.
    Completing,
    Complete,
}

const DEATHS: [Death; 7] =
    [Death::Planned, Death::Preparing, Death::Prepared, Death::Cutting, Death::Cut, Death::Completing, Death::Complete];

#[tokio::test(flavor = "multi_thread")]
async fn wherever_it_is_dropped_removing_leaves_nothing_and_the_vm_goes_on() {
    for_every_case(|case| async move {
        for death in DEATHS {
            let mut world = World::of(case).await;
            world.write().await;
            let before = world.footprint().await;
            let mut steps = Steps::new(&world, case).await;
            live_until(death, &mut steps, &mut world).await;
            steps.remove(&world).await;
            if matches!(death, Death::Planned | Death::Preparing | Death::Prepared) {
                assert_eq!(world.footprint().await, before, "{death:?}");
            }
            world.check_tidy(&before).await;
            world.check_guest().await;
            world.quit().await;
            world.check_images();
        }
    })
    .await;
}

async fn live_until(death: Death, steps: &mut Steps, world: &mut World) {
    steps.plan(world).await;
    let planned = steps.tasks.clone();
    if death == Death::Planned {
        return;
    }
    steps.prepare(world).await;
    match death {
        Death::Preparing => return steps.tasks = planned,
        Death::Prepared => return,
        _ => {}
    }
    steps.cut(world, death != Death::Cutting).await;
    world.write().await;
    if matches!(death, Death::Cutting | Death::Cut) {
        return;
    }
    let cut = steps.tasks.clone();
    steps.complete(world).await;
    if death == Death::Completing {
        steps.tasks = cut;
    }
}

/// Drops `work` at its `polls`th await that had to wait; whether it was done before.
async fn is_done_within(polls: usize, work: impl Future<Output = ()>) -> bool {
    let mut work = pin!(work);
    let mut left = polls;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        work.as_mut().poll(context).map(|()| true)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_copy_may_be_cut_off_again_and_again() {
    let case = Case { driver: "copy", storage: Kind::Plain, format: "raw" };
    let mut world = World::of(case).await;
    world.write().await;
    let taken = world.contents.clone();
    let mut steps = Steps::new(&world, case).await;
    steps.plan(&world).await;
    steps.prepare(&world).await;
    steps.cut(&world, true).await;
    // Each time it comes a little further.
    let mut polls = 1;
    while !is_done_within(polls, steps.complete(&world)).await {
        polls += 1;
    }
    for (task, content) in steps.tasks.iter().zip(&taken) {
        let artifact = task.artifact.as_ref().unwrap();
        content.check(&artifact.handle, &artifact.format).unwrap();
    }
    assert_eq!(world.machine().monitor.query_jobs(SOON).await.unwrap(), vec![]);
}
