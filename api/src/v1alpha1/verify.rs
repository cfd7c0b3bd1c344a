//! How thoroughly a snapshot's data is checked before it is called ready.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How thoroughly each disk's data is checked before the snapshot is called ready. What fails a check fails the snapshot,
/// with reason `VerifyFailed`, and is taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verify {
    /// Only what the drivers have to know to finish.
    None,
    /// The image is there, in its format, and as large as the disk.
    #[default]
    Quick,
    /// The image's metadata is checked too, where its format can be, and all of its data is read once. It takes as long
    /// as reading the disk does; the snapshot is `Completing` meanwhile.
    Full,
    /// As `Quick`; then a throw-away QEMU without a network starts from the disks, and changes nothing. How far it came
    /// is in `status.boot`, and fails nothing: the data is whole all the same. The snapshot is `Completing` meanwhile.
    Boot,
}
