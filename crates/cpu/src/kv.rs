//! The paged cache, laid out as B operands: keys are outputs of q k^T, key positions are products of P V.
//!
//! A (layer, block, kv head) holds K, then V. K: groups of up to 64 keys, `[head_dim / 32 chunks][key tiles][1 KiB]`;
//! V: chunks of 32 keys, `[head_dim / 16 tiles][1 KiB]`. head_dim is padded with zeros.
//!
//! Architecture invariant: the first token written to a block zeroes it, so that whatever lies behind the last
//! token is +0, never what a former owner left.

use bitfast_ops::{BackendError, KvLayout, LayerKv, Result, bf16};

use crate::memory::Memory;
use crate::micro::{B_TILE, CHUNK, TILE_N};
use crate::qkv::MAX_HEAD;

/// Keys per chunk of P V.
pub(crate) const V_CHUNK: usize = 32;

/// Shape of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadShape {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_size: usize,
}

impl HeadShape {
    fn of(layer: LayerKv, block_size: usize) -> Result<Self> {
        let unsupported = |op| Err(BackendError::Unsupported { backend: "cpu", op });
        match layer {
            LayerKv::Gqa { head_dim, .. } if head_dim > MAX_HEAD => {
                unsupported("attention with heads of more than 512 elements")
            }
            LayerKv::Gqa { kv_heads, head_dim } => Ok(Self { kv_heads, head_dim, block_size }),
            LayerKv::Mla { .. } => unsupported("multi-head latent attention"),
            LayerKv::Delta { .. } => unsupported("gated delta rule"),
        }
    }

    /// Chunks of q k^T.
    pub fn k_chunks(self) -> usize {
        self.head_dim.div_ceil(CHUNK)
    }

    /// Tiles of P V.
    pub fn v_tiles(self) -> usize {
        self.head_dim.div_ceil(TILE_N)
    }

    /// Key tiles that lie side by side: a block's, or an attention tile's.
    pub fn group_tiles(self) -> usize {
        (self.block_size / TILE_N).min(4)
    }

    fn k_bytes(self) -> usize {
        self.block_size / TILE_N * self.k_chunks() * B_TILE
    }

    fn v_bytes(self) -> usize {
        self.block_size / V_CHUNK * self.v_tiles() * B_TILE
    }

    fn head_bytes(self) -> usize {
        self.k_bytes() + self.v_bytes()
    }

    fn block_bytes(self) -> usize {
        self.kv_heads * self.head_bytes()
    }
}

/// Bytes of one block over all layers.
pub(crate) fn block_bytes(layout: &KvLayout) -> u64 {
    let layers = layout.layers.iter().filter_map(|l| HeadShape::of(*l, layout.block_size).ok());
    layers.map(|s| s.block_bytes() as u64).sum()
}

/// The paged cache of one model.
pub struct Kv {
    layers: Vec<(HeadShape, Memory)>,
    num_blocks: usize,
}

impl Kv {
    pub(crate) fn new(layout: &KvLayout, num_blocks: usize) -> Result<Self> {
        assert!(crate::BLOCK_SIZES.contains(&layout.block_size), "block size {}", layout.block_size);
        let layers = layout.layers.iter().enumerate().map(|(i, layer)| {
            let shape = HeadShape::of(*layer, layout.block_size)?;
            let bytes = shape.block_bytes() * num_blocks;
            Ok((shape, Memory::zeroed(bytes, || format!("KV cache of layer {i}, {num_blocks} blocks"))?))
        });
        Ok(Self { layers: layers.collect::<Result<_>>()?, num_blocks })
    }

    pub(crate) fn shape(&self, layer: usize) -> HeadShape {
        self.layers[layer].0
    }

    /// The memory of (layer, block, head).
    pub(crate) fn head(&self, layer: usize, block: usize, head: usize) -> HeadBlock {
        let (shape, memory) = &self.layers[layer];
        assert!(
            block < self.num_blocks && head < shape.kv_heads,
            "block {block}, head {head} of layer {layer}"
        );
        let offset = block * shape.block_bytes() + head * shape.head_bytes();
        // SAFETY: within the memory, by the assertion.
        HeadBlock { shape: *shape, start: unsafe { memory.ptr().add(offset) } }
    }

    /// Fills a block of every layer with NaN.
    pub(crate) fn poison(&mut self, block: usize) {
        for layer in 0..self.layers.len() {
            for head in 0..self.layers[layer].0.kv_heads {
                let head = self.head(layer, block, head);
                // SAFETY: this head's part of the block, which `&mut self` makes ours.
                unsafe { std::slice::from_raw_parts_mut(head.start, head.shape.head_bytes()) }.fill(0xff);
            }
        }
    }
}

/// One head's K and V in one block.
#[derive(Clone, Copy)]
pub(crate) struct HeadBlock {
    shape: HeadShape,
    start: *mut u8,
}

impl HeadBlock {
    /// B operand of q k^T for the keys from `first_key` (a multiple of the group's) on, and its chunk stride.
    pub fn keys(self, first_key: usize) -> (*const u8, usize) {
        let s = self.shape;
        let chunk_bytes = s.group_tiles() * B_TILE;
        let group = first_key / (s.group_tiles() * TILE_N);
        (self.start.wrapping_add(group * s.k_chunks() * chunk_bytes), chunk_bytes)
    }

    /// B operand of P V for the chunk of 32 keys from `first_key` on: one chunk of `v_tiles` tiles.
    pub fn values(self, first_key: usize) -> *const u8 {
        let s = self.shape;
        self.start.wrapping_add(s.k_bytes() + first_key / V_CHUNK * s.v_tiles() * B_TILE)
    }

    /// Stores one token's key and value; the one at offset 0 zeroes the block first.
    ///
    /// # Safety
    /// No other thread may access this head's part of the block meanwhile.
    pub unsafe fn store(self, offset: usize, key: &[bf16], value: &[bf16]) {
        let s = self.shape;
        assert!(offset < s.block_size && key.len() == s.head_dim && value.len() == s.head_dim);
        // SAFETY: every offset below stays inside `head_bytes`, which is ours by the caller's promise.
        unsafe {
            if offset == 0 {
                self.start.write_bytes(0, s.head_bytes());
            }
            let group_keys = s.group_tiles() * TILE_N;
            let k = self.keys(offset / group_keys * group_keys).0.cast_mut();
            let k = k.add(offset % group_keys / TILE_N * B_TILE + offset % TILE_N * 4);
            for (chunk, key) in key.chunks(CHUNK).enumerate() {
                let k = k.add(chunk * s.group_tiles() * B_TILE);
                let (pairs, single) = key.as_chunks::<2>();
                for (i, pair) in pairs.iter().enumerate() {
                    *k.add(i * 64).cast::<[bf16; 2]>() = *pair;
                }
                if let [single] = single {
                    *k.add(pairs.len() * 64).cast::<bf16>() = *single;
                }
            }
            let v = self.values(offset).cast_mut().add(offset % V_CHUNK / 2 * 64 + offset % 2 * 2);
            for (tile, value) in value.chunks(TILE_N).enumerate() {
                let v = v.add(tile * B_TILE);
                for (i, x) in value.iter().enumerate() {
                    *v.add(i * 4).cast::<bf16>() = *x;
                }
            }
        }
    }
}
