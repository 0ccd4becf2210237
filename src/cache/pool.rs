//! Which blocks are free, who holds the others, and which full blocks hold a known prefix. Knows no tensors.
//!
//! A full block is known by the hash of all tokens up to its end, so whoever begins with the same tokens can share it.
//! A block that nobody holds keeps its content until it is needed: the least recently held goes first.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

/// What a full block holds: a hash of its tokens and of all before them. Half of SHA-256, so that nobody can make two
/// prefixes share blocks that should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 16]);

impl Key {
    /// The key of a block with `tokens` that follows the block of `before`.
    pub fn of(before: Option<Key>, tokens: &[u32]) -> Key {
        let mut hash = Sha256::new();
        if let Some(Key(before)) = before {
            hash.update(before);
        }
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hash.finalize()[..16]);
        Key(key)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    /// When it was given back, in `idle`, where nobody holds it but its content is known.
    since: u64,
    /// Its content, once full.
    key: Option<Key>,
}

/// One rank's blocks. Every rank's pool takes the same decisions because the coordinator takes them.
#[derive(Debug, Clone)]
pub struct Pool {
    blocks: Vec<Block>,
    /// Held by nobody, content unknown.
    empty: Vec<u32>,
    /// Held by nobody, content known; least recently held first.
    idle: BTreeMap<u64, u32>,
    known: HashMap<Key, u32>,
    clock: u64,
}

impl Pool {
    /// A pool of `total` free blocks, `0..total`.
    pub fn new(total: usize) -> Pool {
        Pool {
            blocks: vec![Block::default(); total],
            empty: (0..total as u32).rev().collect(),
            idle: BTreeMap::new(),
            known: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks nobody holds, whatever they contain.
    pub fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Takes `count` blocks to write, or none at all when fewer are free. Known content is forgotten last.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free() {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let block = match self.empty.pop() {
                Some(block) => block,
                None => {
                    let (_, block) = self.idle.pop_first()?;
                    if let Some(key) = self.blocks[block as usize].key.take() {
                        self.known.remove(&key);
                    }
                    block
                }
            };
            self.blocks[block as usize].holders = 1;
            taken.push(block);
        }
        Some(taken)
    }

    /// The blocks that hold the beginning of a sequence whose full blocks have `keys`: how many, and how many of those
    /// nobody holds at present.
    pub fn find(&self, keys: &[Key]) -> (usize, usize) {
        let found = keys.iter().map_while(|k| self.known.get(k));
        found.fold((0, 0), |(all, idle), b| (all + 1, idle + usize::from(self.blocks[*b as usize].holders == 0)))
    }

    /// Holds the blocks of `keys`, all of which [`find`](Pool::find) has found.
    pub fn share(&mut self, keys: &[Key]) -> Vec<u32> {
        let mut shared = Vec::with_capacity(keys.len());
        for block in keys.iter().map_while(|k| self.known.get(k)) {
            let b = &mut self.blocks[*block as usize];
            if b.holders == 0 {
                self.idle.remove(&b.since);
            }
            b.holders += 1;
            shared.push(*block);
        }
        shared
    }

    /// From now on `block`, which is held and full, is known by `key`. Where another block has the same content
    /// already, that one stays the known one.
    pub fn know(&mut self, block: u32, key: Key) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.known.entry(key) {
            entry.insert(block);
            self.blocks[block as usize].key = Some(key);
        }
    }

    /// Gives a sequence's blocks back, in its order. Each must be held.
    pub fn give(&mut self, blocks: impl DoubleEndedIterator<Item = u32>) {
        // The end of a prefix is of use to fewer than its beginning, and of none without it: it goes first.
        for block in blocks.rev() {
            let b = &mut self.blocks[block as usize];
            debug_assert!(b.holders > 0, "block {block} is given back twice");
            b.holders = b.holders.saturating_sub(1);
            if b.holders > 0 {
                continue;
            }
            if b.key.is_some() {
                self.clock += 1;
                b.since = self.clock;
                self.idle.insert(self.clock, block);
            } else {
                self.empty.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(prefix: &[u32]) -> Vec<Key> {
        let mut last = None;
        prefix
            .iter()
            .map(|t| {
                last = Some(Key::of(last, &[*t]));
                last.unwrap()
            })
            .collect()
    }

    #[test]
    fn a_key_depends_on_everything_before_it() {
        assert_eq!(keys(&[1, 2])[..], keys(&[1, 2, 3])[..2]);
        assert_ne!(keys(&[1, 2])[1], keys(&[2, 2])[1]);
        assert_ne!(keys(&[2])[0], keys(&[1, 2])[1]);
    }

    #[test]
    fn known_blocks_are_shared_and_the_least_recent_is_forgotten_first() {
        let mut pool = Pool::new(3);
        let k = keys(&[7, 8]);
        let a = pool.take(2).unwrap();
        pool.know(a[0], k[0]);
        pool.know(a[1], k[1]);
        assert_eq!(pool.find(&k), (2, 0));
        assert_eq!(pool.share(&k), a);
        pool.give(a.clone().into_iter());
        assert_eq!((pool.free(), pool.find(&k)), (1, (2, 0)), "still held by the other");
        pool.give(a.clone().into_iter());
        assert_eq!((pool.free(), pool.find(&k)), (3, (2, 2)));
        // The empty block first, then the end of the prefix.
        assert_eq!(pool.take(2).unwrap().len(), 2);
        assert_eq!(pool.find(&k), (1, 1));
        assert_eq!(pool.take(2), None);
        assert_eq!(pool.share(&k[..1]), a[..1]);
        assert_eq!(pool.free(), 0);
    }
}
