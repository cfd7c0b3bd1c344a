//! Strings that have a shape, as types: a driver's name can't be passed where a disk's is wanted.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $pattern:literal, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "minLength": 1, "maxLength": $max, "pattern": $pattern})
            }
        }
    };
}

name_type!(
    /// Name of a snapshot driver, such as `overlay`. Any well-shaped name is accepted by the API; one that no agent
    /// knows leads to condition `Accepted=False`, reason `UnknownDriver`.
    DriverName,
    r"^[a-z][a-z0-9-]*$",
    63
);
name_type!(
    /// Name of a VM's disk as the VMTarget lists it: the `-device` id in QEMU, else the `-drive` id.
    DiskName,
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    63
);
name_type!(
    /// Name of a Kubernetes node.
    NodeName,
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
    253
);
name_type!(
    /// What a driver needs to find an artifact again: a path or a volume's name on the node. Opaque to everybody else.
    SnapshotHandle,
    r"^[^\x00-\x1f]+$",
    4096
);
