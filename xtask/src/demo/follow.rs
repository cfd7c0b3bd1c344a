//! One plain line for each thing that happens to a snapshot.

use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotStatus};

/// What the status says that it didn't say before.
#[derive(Default)]
pub struct Story {
    told: Option<VMSnapshotStatus>,
    exists: bool,
}

impl Story {
    /// The line for this version of the object; none when there is nothing new.
    pub fn next(&mut self, snapshot: &VMSnapshot) -> Option<String> {
        let first = !std::mem::replace(&mut self.exists, true);
        let Some(status) = &snapshot.status else { return first.then(|| "created".to_owned()) };
        let old = self.told.replace(status.clone());
        let mut news = vec![];
        if old.as_ref().is_none_or(|old| old.phase != status.phase) {
            news.push(format!("{:?}", status.phase));
        }
        let known = old.map(|old| old.conditions).unwrap_or_default();
        for condition in &status.conditions {
            let same = |old: &&_| {
                let old: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition = old;
                (&old.type_, &old.status, &old.reason) == (&condition.type_, &condition.status, &condition.reason)
            };
            if known.iter().find(same).is_none() {
                news.push(format!("{}={} ({})", condition.type_, condition.status, condition.reason));
            }
        }
        (!news.is_empty()).then(|| news.join("  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn snapshot(status: &serde_json::Value) -> VMSnapshot {
        serde_json::from_value(json!({
            "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshot", "metadata": {"name": "a"},
            "spec": {"vmName": "b"}, "status": status,
        }))
        .unwrap()
    }

    fn ready(status: &str, reason: &str, message: &str) -> serde_json::Value {
        json!([{"type": "Ready", "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    #[test]
    fn only_what_is_new_is_told() {
        let mut story = Story::default();
        let preparing = |message| json!({"phase": "Preparing", "conditions": ready("False", "InProgress", message)});
        assert_eq!(story.next(&snapshot(&json!(null))).as_deref(), Some("created"));
        let first = story.next(&snapshot(&preparing("a")));
        assert_eq!(first.as_deref(), Some("Preparing  Ready=False (InProgress)"));
        assert_eq!(story.next(&snapshot(&preparing("b"))), None);
        let done = json!({"phase": "Ready", "conditions": ready("True", "Completed", "")});
        assert_eq!(story.next(&snapshot(&done)).as_deref(), Some("Ready  Ready=True (Completed)"));
    }
}
