//! Kubernetes Events of a VM's target: one when its space runs out or a chain becomes too deep, and none for as long as
//! that lasts.

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::VMTargetStatus;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use crate::causes::chain;
use crate::report::call;

/// Longest note that the API takes, in bytes.
const NOTE_LENGTH: usize = 1024;

/// Publishes what is new.
pub struct Events(Recorder);

impl Events {
    /// Events of one node's agent.
    pub fn new(client: Client, node: &str) -> Self {
        Self(Recorder::new(
            client,
            Reporter { controller: "freezeframe-agent".into(), instance: Some(node.to_owned()) },
        ))
    }

    /// Publishes the events that the change of a target's status deserves. One that is lost is no reason to fail: the
    /// status says the same.
    pub async fn publish(&self, before: Option<&VMTargetStatus>, now: &VMTargetStatus, target: &ObjectReference) {
        for (reason, message) in news(before, now) {
            let (action, note) = ("Watch".to_owned(), Some(cut(&message)));
            let event = Event { type_: EventType::Warning, action, reason: reason.to_owned(), note, secondary: None };
            if let Err(error) = call("an event", self.0.publish(&event, target)).await {
                tracing::warn!(error = chain(&error), reason, "event lost");
            }
        }
    }
}

/// Whether anything is new that deserves an event.
pub fn is_news(before: Option<&VMTargetStatus>, now: &VMTargetStatus) -> bool {
    news(before, now).next().is_some()
}

/// What is wrong now and was not before: a reason each, and the message.
fn news<'a>(
    before: Option<&'a VMTargetStatus>,
    now: &'a VMTargetStatus,
) -> impl Iterator<Item = (&'static str, String)> + 'a {
    let is_new = move |(reason, _): &(&'static str, String)| {
        !before.is_some_and(|before| wrong(before).any(|(known, _)| known == *reason))
    };
    wrong(now).filter(is_new)
}

fn wrong(status: &VMTargetStatus) -> impl Iterator<Item = (&'static str, String)> + '_ {
    let while_true = |type_: &'static str| {
        let found = find(&status.conditions, type_).filter(|condition| condition.status == "True")?;
        Some((type_, found.message.clone()))
    };
    let stopped = find(&status.conditions, types::READY).filter(|ready| ready.reason == reasons::NO_SPACE);
    let stopped = stopped.map(|ready| (reasons::NO_SPACE, ready.message.clone()));
    [while_true(types::SPACE_LOW), while_true(types::CHAIN_TOO_DEEP), stopped].into_iter().flatten()
}

fn cut(note: &str) -> String {
    let fits = |(start, char): &(usize, char)| start + char.len_utf8() <= NOTE_LENGTH;
    note.char_indices().take_while(fits).map(|(_, char)| char).collect()
}

#[cfg(test)]
mod tests {
    use freezeframe_api::conditions::{condition, set};
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn status(told: &[(&str, bool, &str)]) -> VMTargetStatus {
        let mut status = VMTargetStatus::default();
        for (type_, is, reason) in told {
            set(&mut status.conditions, condition(type_, *is, reason, "why", None, Timestamp::now()));
        }
        status
    }

    fn reasons_of(before: Option<&VMTargetStatus>, now: &VMTargetStatus) -> Vec<&'static str> {
        news(before, now).map(|(reason, _)| reason).collect()
    }

    #[test]
    fn what_becomes_wrong_is_an_event_and_what_stays_or_ends_is_none() {
        let good =
            status(&[(types::READY, true, reasons::COMPLETED), (types::SPACE_LOW, false, reasons::ENOUGH_SPACE)]);
        let low = status(&[(types::READY, true, reasons::COMPLETED), (types::SPACE_LOW, true, reasons::SPACE_LOW)]);
        let full = status(&[(types::READY, false, reasons::NO_SPACE), (types::SPACE_LOW, true, reasons::SPACE_LOW)]);
        let deep = status(&[(types::CHAIN_TOO_DEEP, true, reasons::NEEDED_BY_SNAPSHOTS)]);
        assert_eq!(reasons_of(None, &low), ["SpaceLow"]);
        assert_eq!(reasons_of(Some(&good), &low), ["SpaceLow"]);
        assert_eq!(reasons_of(Some(&low), &full), ["NoSpace"]);
        assert_eq!(reasons_of(Some(&good), &deep), ["ChainTooDeep"]);
        for (before, now) in [(&low, &low), (&full, &good), (&full, &full), (&full, &low)] {
            assert!(!is_news(Some(before), now));
        }
    }
}
