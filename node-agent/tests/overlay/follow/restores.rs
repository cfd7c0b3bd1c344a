//! Bringing such snapshots back.

use std::path::PathBuf;
use std::sync::Arc;

use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, RestoreStep};
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::restore::{Restores, Turn};
use freezeframe_node_agent::session::Sessions;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use tokio::sync::watch;

use crate::lab::{Lab, Snapshot, Wanted};
use crate::machine::view_as;
use crate::restore_order;

use super::{Base, check, lab};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_back_as_a_new_vms_disk_and_not_in_place() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = [lab.take().await, lab.take().await];
        come_back_as_a_new_vms_alone(&lab, taken).await;
        check(&mut lab, base).await;
    }
}

/// Restores each snapshot in every way, and sees that what is made reads right.
pub async fn come_back_as_a_new_vms_alone(lab: &Lab, taken: [u32; 2]) {
    let Lab { sessions, snapshots, .. } = lab;
    let sessions = Sessions {
        vm_root: sessions.vm_root.clone(),
        roots: sessions.roots.clone(),
        guard: sessions.guard.clone(),
        journal: sessions.journal.clone(),
        restores: sessions.restores.clone(),
        drivers: sessions.drivers.clone(),
        stopped: StoppedVms::with_files_only(),
        boots: sessions.boots.clone(),
        space: SpaceWatch::default(),
    };
    let (boots, journal) = (sessions.boots.clone(), sessions.restores.clone());
    let restores = Restores { sessions: Arc::new(sessions), journal, boots };
    let advance =
        async |order: &RestoreOrder| match restores.advance(order, &Wanted, &watch::Sender::new(None)).await.unwrap() {
            Turn::Over(status) => *status,
            Turn::Again(status) => panic!("not over: {status:?}"),
        };
    let mut number = 0;
    for taken in taken {
        let Snapshot { order, views } = &snapshots[&taken];
        for mode in [RestoreMode::Linked, RestoreMode::Full] {
            number += 1;
            let new_vm = Some(VmKey { namespace: "shop".into(), name: format!("new-{number}") });
            let status = advance(&RestoreOrder { new_vm, mode, ..restore_order::order(number, order) }).await;
            assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
            let made = PathBuf::from(&status.disks[0].path.0);
            assert_eq!(view_as(&status.disks[0].format, &made), views[0]);
            std::fs::remove_file(made).unwrap();
        }
        number += 1;
        let status = advance(&RestoreOrder { step: RestoreStep::Plan, ..restore_order::order(number, order) }).await;
        assert_eq!(status.phase, Some(RestoreContentPhase::Failed), "{:?}", status.conditions);
    }
}
