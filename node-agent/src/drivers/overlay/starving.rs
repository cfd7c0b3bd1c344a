//! A merge that makes way for snapshots again and again gets done all the same.
//!
//! QEMU's commit begins at the first byte each time, so it never ends if snapshots come faster than it takes. The other
//! way, the snapshot's own data copied up into the layer above, goes on where it was: what has been copied is that layer's
//! from then on. It is as safe after merges that were given up: what those wrote into the snapshot's file is in the layer
//! above as well, and so isn't copied.

use super::place::Place;
use super::state::State;
use super::upwards::{may_take, room};
use crate::drivers::Env;
use crate::hypervisor::image::ImageDirectory;

/// So often a merge is begun anew before the other way is looked at.
const BEGUN_ANEW: u32 = 2;

/// Whether the snapshot's data is to be copied up, though it could be merged into.
pub fn is_better_upwards(env: &Env<'_>, directory: &ImageDirectory, state: &State, place: &Place<'_>) -> bool {
    let Some(above) = place.at.checked_sub(1) else { return false };
    let sizes = (place.chain[place.at].actual_size, place.chain[above].actual_size);
    // One that keeps its name isn't ours to unlink.
    !state.keeps_name()
        && is_worth_it(sizes.0, sizes.1, state.made_way)
        && may_take(place, above)
        && room(env, place, place.at..place.at + 1, directory).is_ok()
}

/// The oftener a merge made way, the more may be copied in its stead. The layer above only grows, so one that goes up
/// once goes on doing so.
fn is_worth_it(snapshot: u64, above: u64, made_way: u32) -> bool {
    made_way >= BEGUN_ANEW && snapshot <= above.saturating_mul(made_way.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oftener_a_merge_made_way_the_larger_a_snapshot_is_copied_up() {
        assert!(!is_worth_it(1, 100, 0) && !is_worth_it(1, 100, 1));
        assert!(is_worth_it(200, 100, 2) && !is_worth_it(201, 100, 2) && is_worth_it(201, 100, 3));
    }
}
