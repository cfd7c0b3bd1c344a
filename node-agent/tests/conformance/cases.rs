//! Which driver is tried on what: the only place where the suite knows drivers by name.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use freezeframe_node_agent::drivers::{Drivers, registry};
use futures::{StreamExt, stream};

use crate::loopcopy::Loopcopy;
use crate::storage::Kind;

/// All drivers that the suite tries: the product's, and one that only the tests have.
pub fn drivers() -> Drivers {
    let mut all = registry();
    all.push(Box::new(Loopcopy::default()));
    Drivers::new(all)
}

/// What a driver needs to show what it can do.
pub struct Needs {
    pub driver: &'static str,
    pub storage: &'static [Kind],
    pub formats: &'static [&'static str],
    /// Whether the class names a directory for it.
    pub directory: bool,
}

pub const NEEDS: &[Needs] = &[
    Needs { driver: "reflink", storage: &[Kind::Xfs, Kind::Btrfs], formats: &["raw", "qcow2"], directory: false },
    Needs { driver: "btrfs", storage: &[Kind::Btrfs], formats: &["raw", "qcow2"], directory: false },
    Needs { driver: "overlay", storage: &[Kind::Plain], formats: &["qcow2"], directory: false },
    Needs { driver: "copy", storage: &[Kind::Plain], formats: &["raw", "qcow2"], directory: true },
    // Volumes need device-mapper, which not every host has: they are tried in the node VM, `e2e/tests/lvm.rs`. Here it
    // must refuse all files.
    Needs { driver: "lvm", storage: &[], formats: &[], directory: false },
    Needs { driver: "loopcopy", storage: &[Kind::Plain], formats: &["raw"], directory: false },
];

/// One driver on one storage with one format.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub driver: &'static str,
    pub storage: Kind,
    pub format: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} on {:?}", self.driver, self.format, self.storage)
    }
}

/// The class parameters that a driver needs.
pub fn parameters(driver: &str, copies: &Path) -> BTreeMap<String, String> {
    let needs = NEEDS.iter().find(|needs| needs.driver == driver);
    let directory = needs.unwrap_or_else(|| panic!("driver {driver} has no line in NEEDS")).directory;
    directory.then(|| ("directory".to_owned(), copies.display().to_string())).into_iter().collect()
}

fn cases() -> Vec<Case> {
    let all = NEEDS.iter().flat_map(|needs| {
        let of = move |storage| needs.formats.iter().map(move |format| Case { driver: needs.driver, storage, format });
        needs.storage.iter().copied().flat_map(of)
    });
    // To work on one driver; everything else runs all of them.
    match std::env::var("CONFORMANCE_DRIVER") {
        Ok(only) => all.filter(|case| case.driver == only).collect(),
        Err(_) => all.collect(),
    }
}

/// How many cases run at once: they wait for disks and for QEMU more than they compute.
const AT_ONCE: usize = 2;

/// Runs a test on every case, also after one has failed, and says which did.
pub async fn for_every_case<F>(test: impl Fn(Case) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    for_every(cases(), test).await;
}

/// The same for the cases of one format.
pub async fn for_every_case_of<F>(format: &str, test: impl Fn(Case) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    for_every(cases().into_iter().filter(|case| case.format == format), test).await;
}

/// Runs a test on all of `subjects`, some at once.
pub async fn for_every<T, F>(subjects: impl IntoIterator<Item = T>, test: impl Fn(T) -> F)
where
    T: fmt::Display,
    F: Future<Output = ()> + Send + 'static,
{
    let run = |subject: T| {
        let (name, running) = (subject.to_string(), tokio::spawn(test(subject)));
        async move { running.await.map_err(|error| format!("{name}: {}", message(error))) }
    };
    let ended: Vec<_> = stream::iter(subjects.into_iter().map(run)).buffer_unordered(AT_ONCE).collect().await;
    let failed: Vec<_> = ended.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

fn message(error: tokio::task::JoinError) -> String {
    let Ok(panic) = error.try_into_panic() else { return "given up".into() };
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map_or_else(|_| "a panic".into(), |text| (*text).to_owned()),
    }
}

#[test]
fn every_driver_has_a_line_that_names_what_it_needs() {
    for driver in drivers().iter() {
        assert!(NEEDS.iter().any(|needs| needs.driver == driver.name()), "{} has none", driver.name());
    }
}
