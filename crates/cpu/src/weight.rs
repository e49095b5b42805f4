//! Weights, packed once at load for the micro-kernels.
//!
//! Layout: panels of 2 tiles (the last may be narrower; a gate tile is with its up tile); in a panel, chunk after chunk; in a chunk, its tiles
//! side by side; a tile is `[16 pairs of k][16 outputs][2]` bf16 = 1 KiB. What a thread reads in an op is thus
//! one stream through memory.

use bitfast_ops::contract::KOrder;
use bitfast_ops::{BackendError, Class, HostTensor, LinearDesc, LinearKind, Result, bf16};

use crate::memory::Memory;
use crate::micro::{B_TILE, CHUNK, TILE_N};
use crate::pool::share;

/// Tiles per panel.
pub(crate) const PANEL: usize = 2;
/// Matrices from this size on are packed by several threads.
const PARALLEL_PACK: usize = 1 << 20;

/// A weight matrix in the packed layout.
pub struct Weight {
    desc: LinearDesc,
    order: KOrder,
    memory: Memory,
    tiles: usize,
    chunks: usize,
}

impl Weight {
    /// Packs the global matrix `[n, k]`; its order is that of `class`.
    pub(crate) fn pack(
        class: Class,
        desc: &LinearDesc,
        data: &HostTensor<'_>,
        threads: usize,
    ) -> Result<Self> {
        if desc.experts.is_some() {
            return Err(BackendError::Unsupported { backend: "cpu", op: "mixture of experts" });
        }
        assert_eq!(data.dims2(), (desc.n, desc.k), "weight {}: [n, k]", desc.name);
        let order = desc.k_order(class);
        let tiles = match desc.kind {
            LinearKind::GateUp => {
                assert!(desc.n.is_multiple_of(2), "gate_up {} with {} outputs", desc.name, desc.n);
                2 * (desc.n / 2).div_ceil(TILE_N)
            }
            _ => desc.n.div_ceil(TILE_N),
        };
        let chunks = desc.k.div_ceil(CHUNK);
        let memory = Memory::zeroed(tiles * chunks * B_TILE, || format!("weight {}", desc.name))?;
        let weight = Self { desc: desc.clone(), order, memory, tiles, chunks };
        let threads = if data.data.len() < PARALLEL_PACK { 1 } else { threads };
        std::thread::scope(|scope| {
            for part in 1..threads {
                let weight = &weight;
                scope.spawn(move || weight.pack_tiles(share(tiles, threads, part), &data.data));
            }
            weight.pack_tiles(share(tiles, threads, 0), &data.data);
        });
        Ok(weight)
    }

    /// Name, kind and global shape.
    pub fn desc(&self) -> &LinearDesc {
        &self.desc
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    pub(crate) fn order(&self) -> KOrder {
        self.order
    }

    pub(crate) fn tiles(&self) -> usize {
        self.tiles
    }

    pub(crate) fn chunks(&self) -> usize {
        self.chunks
    }

    /// Where tile `tile` of chunk `chunk` begins, and the bytes to the same tile of the next chunk.
    pub(crate) fn tile(&self, tile: usize, chunk: usize) -> (*const u8, usize) {
        assert!(tile < self.tiles && chunk < self.chunks, "tile ({tile}, {chunk}) of {}", self.desc.name);
        let (panel, in_panel) = (tile / PANEL, tile % PANEL);
        let chunk_bytes = PANEL.min(self.tiles - panel * PANEL) * B_TILE;
        let offset = panel * PANEL * self.chunks * B_TILE + chunk * chunk_bytes + in_panel * B_TILE;
        // SAFETY: within the memory, by the assertion.
        (unsafe { self.memory.ptr().add(offset) }, chunk_bytes)
    }

    /// Row `row` of a matrix that is not `GateUp`, gathered out of the tiles.
    pub(crate) fn unpack_row(&self, row: usize, out: &mut [bf16]) {
        assert!(row < self.desc.n && out.len() == self.desc.k, "row {row} of {}", self.desc.name);
        for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
            let (tile, _) = self.tile(row / TILE_N, chunk);
            for (i, out) in out.iter_mut().enumerate() {
                // SAFETY: element (pair i / 2, output row % 16, half i % 2) of the tile.
                *out = unsafe { *tile.cast::<bf16>().add((i / 2 * TILE_N + row % TILE_N) * 2 + i % 2) };
            }
        }
    }

    /// Source row of output `lane` of tile `tile`: `GateUp` alternates gate and up tiles.
    fn source_row(&self, tile: usize, lane: usize) -> Option<usize> {
        let (n, first, tile) = match self.desc.kind {
            LinearKind::GateUp => (self.desc.n / 2, tile % 2 * (self.desc.n / 2), tile / 2),
            _ => (self.desc.n, 0, tile),
        };
        let row = tile * TILE_N + lane;
        (row < n).then_some(first + row)
    }

    /// Writes `tiles`; callers on several threads write different ones.
    fn pack_tiles(&self, tiles: std::ops::Range<usize>, data: &[bf16]) {
        let k = self.desc.k;
        for tile in tiles {
            for chunk in 0..self.chunks {
                let (first, last) = (chunk * CHUNK, k.min(chunk * CHUNK + CHUNK));
                // SAFETY: this tile is ours alone, 1 KiB, aligned; the memory is zeroed, so padding stays zero.
                let out =
                    unsafe { &mut *self.tile(tile, chunk).0.cast_mut().cast::<[[[bf16; 2]; TILE_N]; 16]>() };
                for lane in 0..TILE_N {
                    let Some(row) = self.source_row(tile, lane) else { continue };
                    let source = &data[row * k + first..row * k + last];
                    let (pairs, single) = source.as_chunks::<2>();
                    for (out, pair) in out.iter_mut().zip(pairs) {
                        out[lane] = *pair;
                    }
                    if let [single] = single {
                        out[pairs.len()][lane][0] = *single;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(n: usize, k: usize) -> Vec<bf16> {
        (0..n * k).map(|i| bf16::from_bits(i as u16)).collect()
    }

    fn desc(kind: LinearKind, n: usize, k: usize) -> LinearDesc {
        LinearDesc { name: "w".to_owned(), kind, n, k, experts: None }
    }

    #[test]
    fn rows_come_back_out_of_the_tiles() {
        for (n, k) in [(1, 1), (16, 32), (17, 33), (100, 95), (64, 576)] {
            let data = matrix(n, k);
            for threads in [1, 3] {
                let host = HostTensor::new(vec![n, k], data.clone());
                let w =
                    Weight::pack(Class::Portable, &desc(LinearKind::Vocab, n, k), &host, threads).unwrap();
                for row in 0..n {
                    let mut out = vec![bf16::ZERO; k];
                    w.unpack_row(row, &mut out);
                    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&out), bits(&data[row * k..][..k]), "row {row} of [{n}, {k}]");
                }
            }
        }
    }

    #[test]
    fn gate_and_up_tiles_alternate() {
        let data = matrix(40, 32);
        let host = HostTensor::new(vec![40, 32], data.clone());
        let w = Weight::pack(Class::Portable, &desc(LinearKind::GateUp, 40, 32), &host, 1).unwrap();
        assert_eq!(w.tiles(), 4);
        for (tile, lane, row) in
            [(0, 0, Some(0)), (1, 0, Some(20)), (2, 3, Some(19)), (3, 3, Some(39)), (3, 4, None)]
        {
            // SAFETY: the first element of an output in a tile.
            let first = unsafe { *w.tile(tile, 0).0.cast::<bf16>().add(2 * lane) };
            assert_eq!(
                first.to_bits(),
                row.map_or(0, |r: usize| data[r * 32].to_bits()),
                "tile {tile} lane {lane}"
            );
        }
    }
}
