use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use crate::hash::BlockHash;

/// A KV block's index in the pool.
pub type BlockId = u32;

/// One block. A block is in exactly one of three places: held (`refs > 0`), in the LRU list (no refs, cached),
/// or in the free stack (no refs, not cached).
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Sequences whose table has it.
    refs: u32,
    /// Set while the cache finds it.
    hash: Option<BlockHash>,
    /// LRU neighbours; meaningful in the LRU list only.
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

/// The pool of KV blocks: reference counts, the prefix cache, and eviction of the least recently used
/// unreferenced cached block. Everything is allocated at start.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    /// Blocks with no content, last freed on top.
    free: Vec<BlockId>,
    /// Full computed blocks by content. Only looked up, never iterated.
    cache: HashMap<BlockHash, BlockId, BuildHasherDefault<Verbatim>>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    /// Blocks in the LRU list.
    evictable: usize,
    /// Blocks whose content became garbage since the last drain; recorded only when a test asks for it.
    discarded: Option<Vec<BlockId>>,
}

/// A [`BlockHash`] is a keyed hash already: its first half serves as it is, and nothing depends on a process's
/// random state.
#[derive(Debug, Default)]
struct Verbatim(u64);

impl Hasher for Verbatim {
    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64;
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only block hashes are looked up");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl BlockManager {
    /// A pool of `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        let block = Block { refs: 0, hash: None, older: None, newer: None };
        Self {
            blocks: vec![block; num_blocks],
            // Low ids first: a fresh pool hands out 0, 1, 2, ...
            free: (0..num_blocks as u32).rev().collect(),
            cache: HashMap::with_capacity_and_hasher(num_blocks, BuildHasherDefault::default()),
            oldest: None,
            newest: None,
            evictable: 0,
            discarded: None,
        }
    }

    /// Blocks that can be had: free ones and evictable ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable
    }

    /// Blocks held by sequences.
    pub fn used(&self) -> usize {
        self.blocks.len() - self.available()
    }

    /// Blocks that the cache finds, held or not.
    pub fn cached(&self) -> usize {
        self.cache.len()
    }

    /// The block with this content.
    pub fn lookup(&self, hash: BlockHash) -> Option<BlockId> {
        self.cache.get(&hash).copied()
    }

    /// Whether taking `id` needs no eviction: somebody holds it already.
    pub fn is_held(&self, id: BlockId) -> bool {
        self.blocks[id as usize].refs > 0
    }

    /// Takes a reference on a cached block.
    pub fn share(&mut self, id: BlockId) {
        let block = self.blocks[id as usize];
        assert!(block.hash.is_some(), "block {id} is shared but not cached: {block:?}");
        if block.refs == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].refs += 1;
    }

    /// A block for new content: a free one, else the least recently used cached one. `None`: all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.blocks[id as usize].refs = 1;
        Some(id)
    }

    /// Lets the cache find a held, fully computed block. Where another block has the same content already,
    /// that one stays and this one remains private.
    pub fn publish(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id as usize];
        assert!(block.refs > 0 && block.hash.is_none(), "block {id} cannot be published: {block:?}");
        if let Entry::Vacant(entry) = self.cache.entry(hash) {
            entry.insert(id);
            block.hash = Some(hash);
        }
    }

    /// Gives back one sequence's table. Later blocks become older, so that a prefix outlives what continues it.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        while let Some(id) = table.pop() {
            let block = &mut self.blocks[id as usize];
            assert!(block.refs > 0, "block {id} is released but not held: {block:?}");
            block.refs -= 1;
            match (block.refs, block.hash) {
                (0, Some(_)) => self.link_newest(id),
                (0, None) => self.discard(id),
                _ => {}
            }
        }
    }

    /// Forgets every cached content; held blocks stay with their holders.
    pub fn clear_cache(&mut self) {
        while let Some(id) = self.evict() {
            self.free.push(id);
        }
        self.cache.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
    }

    /// From now on, records blocks whose content became garbage.
    pub fn track_discarded(&mut self) {
        self.discarded.get_or_insert_default();
    }

    /// Moves the blocks recorded since the last call into `into`; a block may be in use again already, but
    /// nothing has been written to it before the next step.
    pub fn drain_discarded(&mut self, into: &mut Vec<BlockId>) {
        if let Some(discarded) = &mut self.discarded {
            into.append(discarded);
        }
    }

    /// Asserts the invariants, given the tables of all holders.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut refs = vec![0; self.blocks.len()];
        for id in tables.flatten() {
            refs[*id as usize] += 1;
        }
        let mut place = vec![0; self.blocks.len()];
        for id in &self.free {
            place[*id as usize] += 1;
            assert!(self.blocks[*id as usize].hash.is_none(), "free block {id} is cached");
        }
        let (mut next, mut before, mut length) = (self.oldest, None, 0);
        while let Some(id) = next {
            let block = self.blocks[id as usize];
            assert_eq!(block.older, before, "LRU list is broken at block {id}: {block:?}");
            assert!(block.hash.is_some(), "evictable block {id} is not cached");
            place[id as usize] += 1;
            (before, next, length) = (Some(id), block.newer, length + 1);
        }
        assert_eq!((self.newest, self.evictable), (before, length), "LRU list is broken at its end");
        let mut cached = 0;
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.refs, refs[id], "block {id} has wrong references: {block:?}");
            assert_eq!(place[id], usize::from(block.refs == 0), "block {id} is lost or doubled: {block:?}");
            if let Some(hash) = block.hash {
                cached += 1;
                assert_eq!(self.cache.get(&hash), Some(&(id as u32)), "block {id} is not found by its hash");
            }
        }
        assert_eq!(self.cache.len(), cached, "the cache finds blocks that do not know it");
    }

    /// Takes the least recently used cached block out of the cache.
    fn evict(&mut self) -> Option<BlockId> {
        let id = self.oldest?;
        self.unlink(id);
        let hash = self.blocks[id as usize].hash.take().expect("blocks in the LRU list are cached");
        let removed = self.cache.remove(&hash);
        assert_eq!(removed, Some(id), "the cache had another block for block {id}'s content");
        if let Some(discarded) = &mut self.discarded {
            discarded.push(id);
        }
        Some(id)
    }

    fn discard(&mut self, id: BlockId) {
        self.free.push(id);
        if let Some(discarded) = &mut self.discarded {
            discarded.push(id);
        }
    }

    fn link_newest(&mut self, id: BlockId) {
        let before = self.newest.replace(id);
        match before {
            None => self.oldest = Some(id),
            Some(before) => self.blocks[before as usize].newer = Some(id),
        }
        let block = &mut self.blocks[id as usize];
        (block.older, block.newer) = (before, None);
        self.evictable += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { older, newer, .. } = self.blocks[id as usize];
        match older {
            None => self.oldest = newer,
            Some(older) => self.blocks[older as usize].newer = newer,
        }
        match newer {
            None => self.newest = older,
            Some(newer) => self.blocks[newer as usize].older = older,
        }
        self.evictable -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u32) -> BlockHash {
        BlockHash::root([0, 0], None).child([0, 0], &[n])
    }

    #[test]
    fn least_recently_used_goes_first_and_prefixes_outlive_their_ends() {
        let mut pool = BlockManager::new(4);
        let mut a: Vec<_> = (0..2).map(|_| pool.allocate().unwrap()).collect();
        let mut b: Vec<_> = (0..2).map(|_| pool.allocate().unwrap()).collect();
        for (i, id) in a.iter().chain(&b).enumerate() {
            pool.publish(*id, hash(i as u32));
        }
        assert_eq!(pool.allocate(), None);
        pool.check([a.as_slice(), &b].into_iter());
        pool.release(&mut a);
        pool.release(&mut b);
        pool.check(std::iter::empty());
        assert_eq!((pool.available(), pool.cached()), (4, 4));
        // A hit moves a's first block out of the list; the next evictions take a's end, then b's end.
        pool.share(0);
        assert_eq!(pool.allocate(), Some(1));
        assert_eq!(pool.allocate(), Some(3));
        assert_eq!((pool.lookup(hash(0)), pool.lookup(hash(1))), (Some(0), None));
        pool.check([[0, 1, 3].as_slice()].into_iter());
    }

    #[test]
    fn equal_content_is_published_once() {
        let mut pool = BlockManager::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.publish(a, hash(1));
        pool.publish(b, hash(1));
        assert_eq!(pool.lookup(hash(1)), Some(a));
        pool.release(&mut vec![a]);
        pool.release(&mut vec![b]);
        pool.check(std::iter::empty());
        assert_eq!((pool.cached(), pool.available()), (1, 2));
    }

    #[test]
    fn clearing_keeps_held_blocks() {
        let mut pool = BlockManager::new(2);
        pool.track_discarded();
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.publish(a, hash(1));
        pool.publish(b, hash(2));
        pool.release(&mut vec![b]);
        pool.clear_cache();
        pool.check([[a].as_slice()].into_iter());
        let mut discarded = Vec::new();
        pool.drain_discarded(&mut discarded);
        assert_eq!((discarded, pool.cached(), pool.available()), (vec![b], 0, 1));
        pool.release(&mut vec![a]);
        pool.check(std::iter::empty());
    }

    #[test]
    #[should_panic(expected = "released but not held")]
    fn double_release_is_caught() {
        let mut pool = BlockManager::new(1);
        let a = pool.allocate().unwrap();
        pool.release(&mut vec![a, a]);
    }

    #[test]
    #[should_panic(expected = "wrong references")]
    fn a_lost_table_is_caught() {
        let mut pool = BlockManager::new(1);
        pool.allocate().unwrap();
        pool.check(std::iter::empty());
    }
}
