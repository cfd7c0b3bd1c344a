//! Which images of a chain can be left out of it, and what takes their data: pure.

use std::ops::Range;

/// One image of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Whether a snapshot needs it, or may do so.
    pub needed: bool,
    /// Whether it may be copied into.
    pub held: bool,
}

/// Images next to each other that nobody needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: usize,
    base: usize,
}

impl Run {
    /// Where in the chain the layer is that takes their data.
    pub fn top(&self) -> usize {
        self.first - 1
    }

    /// Where the image below them is.
    pub fn base(&self) -> usize {
        self.base
    }

    /// Where they are.
    pub fn images(&self) -> Range<usize> {
        self.first..self.base
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.images().len()
    }
}

/// The runs of a chain, top first, that can be left out, the lowest one first: neither the disk's own image nor the lowest
/// of the chain is in one.
pub fn from_below(images: &[Image]) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    for at in (1..images.len().saturating_sub(1)).filter(|at| !images[*at].needed) {
        match runs.last_mut() {
            Some(run) if run.base == at => run.base = at + 1,
            _ => runs.push(Run { first: at, base: at + 1 }),
        }
    }
    runs.reverse();
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n`: needed; `.`: not.
    fn runs(chain: &str) -> Vec<(usize, Range<usize>, usize)> {
        let images: Vec<_> = chain.chars().map(|image| Image { needed: image == 'n', held: true }).collect();
        from_below(&images).iter().map(|run| (run.top(), run.images(), run.base())).collect()
    }

    #[test]
    fn images_that_nobody_needs_go_into_the_one_above_the_lowest_first() {
        assert_eq!(runs(".n.n"), [(1, 2..3, 3)]);
        assert_eq!(runs(".n..n.n"), [(4, 5..6, 6), (1, 2..4, 4)]);
        assert_eq!(runs("..n"), [(0, 1..2, 2)]);
    }

    #[test]
    fn neither_the_disks_own_image_nor_the_lowest_nor_a_needed_one_goes() {
        for chain in ["", ".", "..", ".n", ".nn.", ".nnn"] {
            assert_eq!(runs(chain), [], "{chain}");
        }
        assert_eq!(runs("...."), [(0, 1..3, 3)]);
    }
}
