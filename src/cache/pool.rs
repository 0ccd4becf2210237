//! Free blocks and who holds them. Knows nothing of what a block contains.

/// The free list of one rank's blocks. Every rank's pool takes the same decisions because the coordinator takes them.
#[derive(Debug, Clone)]
pub struct Pool {
    free: Vec<u32>,
    total: usize,
}

impl Pool {
    /// A pool of `total` free blocks, `0..total`.
    pub fn new(total: usize) -> Pool {
        Pool { free: (0..total as u32).rev().collect(), total }
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Takes `count` blocks, or none at all when there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        (count <= self.free.len()).then(|| self.free.split_off(self.free.len() - count))
    }

    /// Gives blocks back. Each must have been taken from this pool and not given back since.
    pub fn give(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.free.extend(blocks);
        debug_assert!(self.free.len() <= self.total);
    }
}
