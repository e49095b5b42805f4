use super::{AttentionSpec, BLOCK_TOKENS};
use crate::jit::{KernelSource, SMEM_LIMIT};
use crate::rows::MATH;

const SHARED: &str = include_str!("../../kernels/attention.cuh");
const RING: &str = include_str!("../../kernels/attention_ring.cuh");
const PAGED: &[&str] = &[MATH, SHARED, RING, include_str!("../../kernels/attention_paged.cu")];
const SLICED: &[&str] = &[MATH, SHARED, include_str!("../../kernels/attention_sliced.cu")];
const PREFILL: &[&str] = &[MATH, SHARED, RING, include_str!("../../kernels/attention_prefill.cu")];

/// What the ring of each of two blocks may take that share a multiprocessor, bytes.
const HALF_RING: usize = 110_000;
/// The same beside the fold of a block that takes whole rows, bytes.
const HALF_RING_AND_FOLD: usize = 96_000;
/// Rows of a prefill block.
const PREFILL_ROWS: usize = 128;
/// Elements of the output that a block of a cluster may have: 16 for each of up to four warps.
const SLICES: [usize; 3] = [16, 32, 64];
/// Tiles of a split.
const SPLIT_TILES: usize = bitfast_ops::contract::ATTN_SPLIT_KEYS / BLOCK_TOKENS;
const _: () = assert!(SPLIT_TILES == 8 && BLOCK_TOKENS == 64, "kernels/attention.cuh is written for these");

/// How attention is computed; never what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tiling {
    /// A block streams the keys of its rows through a ring.
    Paged(Paged),
    /// Blocks share a split by slices of the output, for few rows in all.
    Sliced(Sliced),
    /// Warpgroups, for many rows.
    Prefill(Prefill),
}

/// Products of single warps, keys and values through a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Paged {
    /// Warps over rows, 16 each. A row is a (token, head of the group) pair.
    pub row_warps: usize,
    /// Warps over the output's elements; each computes the scores anew.
    pub dim_warps: usize,
    /// Ring slots (64 keys or values each).
    pub slots: usize,
    /// Blocks that share a multiprocessor.
    pub min_ctas: usize,
    /// What one block computes.
    pub share: Share,
}

/// The part of a row's keys that one block takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// One split of 512; the last block of a row joins them.
    Split,
    /// All splits, one after the other.
    Whole,
    /// As `Split`, for at most 8 rows.
    HalfSplit,
    /// As `Split`, but splits are as long as an item says: the unconstrained mode, with bits of its own.
    FreeSplit,
    /// As `FreeSplit`, for at most 8 rows.
    FreeHalfSplit,
}

/// Blocks that each have a slice of a split's output, and all or some of its scores to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sliced {
    /// Rows of an item: 8 or 16.
    pub rows: usize,
    /// Blocks of a split: 2, 4 or 8, with 16, 32 or 64 elements of the output for each.
    pub slices: usize,
    /// Whether they share scores out among them, as a cluster; else each computes all.
    pub share_scores: bool,
    /// Splits of a cluster: 1, or all that any item of a launch has; at most 8 blocks in all.
    pub joined: usize,
}

/// All splits of 128 rows, on two warpgroups with a pipeline of their own; for heads of up to 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefill {
    /// Ring slots (64 keys or values each), at least 4.
    pub slots: usize,
}

impl Tiling {
    /// For few rows a sequence (decode): splits go to blocks of their own.
    pub fn decode(spec: &AttentionSpec) -> Self {
        Self::Paged(Paged::decode(spec))
    }

    /// As [`decode`](Self::decode) for a launch of so few items, of at most `splits` splits each, that multiprocessors would stay idle.
    /// None if there are more.
    pub fn decode_few(spec: &AttentionSpec, items: usize, splits: usize) -> Option<Self> {
        let units = items * splits * spec.kv_heads;
        let found =
            Sliced::choices(spec).find(|(s, most)| (s.joined == 1 || s.joined == splits) && units <= *most);
        found.map(|(sliced, _)| Self::Sliced(sliced))
    }

    /// As [`decode`](Self::decode), with splits of any length: for the unconstrained mode.
    pub fn unconstrained(spec: &AttentionSpec) -> Self {
        let share = if spec.group() <= 8 { Share::FreeHalfSplit } else { Share::FreeSplit };
        Self::Paged(Paged { share, ..Paged::decode(spec) })
    }

    /// As [`decode`](Self::decode), with all splits of a row in one block: no partial results, for steps that would have too many.
    pub fn decode_whole(spec: &AttentionSpec) -> Self {
        let slots = HALF_RING_AND_FOLD / tile_bytes(spec);
        Self::Paged(Paged { row_warps: 1, dim_warps: 4, slots, min_ctas: 2, share: Share::Whole })
    }

    /// For many rows a sequence (prefill).
    pub fn prefill(spec: &AttentionSpec) -> Self {
        if spec.head_dim <= 128 {
            return Self::Prefill(Prefill { slots: 8 });
        }
        // Larger heads: more warps over the output, so that a warp's sums stay in registers.
        Self::Paged(Paged { row_warps: 2, dim_warps: 4, slots: 4, min_ctas: 1, share: Share::Whole })
    }

    /// All that plans of the contract's mode may pick for `spec`.
    pub fn planned(spec: &AttentionSpec) -> Vec<Self> {
        let sliced = Sliced::choices(spec).map(|(sliced, _)| Self::Sliced(sliced));
        sliced.chain([Self::decode(spec), Self::prefill(spec)]).collect()
    }

    /// Rows of an item of work.
    pub fn rows(&self) -> usize {
        match self {
            Self::Paged(paged) if paged.is_half() => 8,
            Self::Paged(paged) => 16 * paged.row_warps,
            Self::Sliced(sliced) => sliced.rows,
            Self::Prefill(_) => PREFILL_ROWS,
        }
    }

    /// Whether the items say how long splits are.
    pub(crate) fn is_free(&self) -> bool {
        matches!(self, Self::Paged(Paged { share: Share::FreeSplit | Share::FreeHalfSplit, .. }))
    }

    /// Whether a block takes all splits of its rows.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self, Self::Paged(Paged { share: Share::Whole, .. }) | Self::Prefill(_))
    }

    /// Threads of a block: with a producer warp, or warpgroup, where there is a ring.
    pub fn threads(&self) -> usize {
        match self {
            Self::Paged(paged) => 32 * (paged.row_warps * paged.dim_warps + 1),
            Self::Sliced(_) => 256,
            Self::Prefill(_) => 2 * PREFILL_ROWS + 128,
        }
    }

    /// Blocks of a launch whose items have at most `max_splits` splits: for each item and key/value head.
    pub(crate) fn blocks(&self, max_splits: usize) -> usize {
        match self {
            Self::Sliced(c) => max_splits.next_multiple_of(c.joined) * c.slices,
            _ if self.is_whole() => 1,
            _ => max_splits,
        }
    }

    /// The kernel's source for `spec`.
    pub fn source(&self, spec: &AttentionSpec) -> KernelSource {
        assert!(spec.head_dim.is_multiple_of(64), "heads of {}", spec.head_dim);
        let (name, parts, own) = match self {
            Self::Paged(paged) => ("attention_paged", PAGED, paged.macros(spec)),
            Self::Sliced(sliced) => ("attention_sliced", SLICED, sliced.macros(spec)),
            Self::Prefill(prefill) => ("attention_prefill", PREFILL, prefill.macros(spec)),
        };
        let heads = [("D", spec.head_dim), ("GROUP", spec.group()), ("KV_HEADS", spec.kv_heads)];
        let defines = heads.into_iter().chain(own).map(|(name, value)| (name, value as i64)).collect();
        KernelSource { name, parts, defines, wgmma_n: None }
    }

    /// Dynamic shared memory of a block; panics if a block cannot have so much.
    pub fn smem_bytes(&self, spec: &AttentionSpec) -> usize {
        // A slot has two barriers.
        let ring = |slots: usize| slots * (tile_bytes(spec) + 16);
        let fold = if self.is_whole() { self.rows() * spec.head_dim * 4 } else { 0 };
        let bytes = match self {
            Self::Paged(paged) => ring(paged.slots) + fold,
            Self::Sliced(sliced) => sliced.smem_bytes(spec),
            Self::Prefill(prefill) => ring(prefill.slots) + fold,
        };
        assert!(bytes <= SMEM_LIMIT, "{self:?} needs {bytes} bytes of shared memory for {spec:?}");
        bytes
    }

    /// Bytes of one split's partial results over all key/value heads, where there are any.
    pub(crate) fn partial_bytes(&self, spec: &AttentionSpec) -> usize {
        if self.is_whole() {
            return 0;
        }
        let copies = if let Self::Sliced(sliced) = self { sliced.slices } else { 1 };
        spec.kv_heads * self.rows() * (spec.head_dim + 2 * copies) * 4
    }

    /// Counts of arrivals for each item and key/value head.
    pub(crate) fn counts(&self) -> usize {
        if let Self::Sliced(sliced) = self { sliced.slices } else { 1 }
    }
}

type Macros = Vec<(&'static str, usize)>;

/// Bytes of a ring slot: keys or values of a tile.
fn tile_bytes(spec: &AttentionSpec) -> usize {
    BLOCK_TOKENS * spec.head_dim * 2
}

impl Paged {
    fn decode(spec: &AttentionSpec) -> Self {
        let share = if spec.group() <= 8 { Share::HalfSplit } else { Share::Split };
        // As much of the cache is on its way as shared memory holds.
        let slots = HALF_RING / tile_bytes(spec);
        Self { row_warps: 1, dim_warps: 4, slots, min_ctas: 2, share }
    }

    fn is_half(&self) -> bool {
        matches!(self.share, Share::HalfSplit | Share::FreeHalfSplit)
    }

    fn macros(&self, spec: &AttentionSpec) -> Macros {
        assert!(
            (spec.head_dim / self.dim_warps).is_multiple_of(16),
            "{self:?} for heads of {}",
            spec.head_dim
        );
        let mut macros = vec![
            ("SLOTS", self.slots),
            ("ROW_WARPS", self.row_warps),
            ("DIM_WARPS", self.dim_warps),
            ("HALF", usize::from(self.is_half())),
            ("MIN_CTAS", self.min_ctas),
            ("SPLIT", usize::from(self.share != Share::Whole)),
        ];
        macros.extend(matches!(self.share, Share::FreeSplit | Share::FreeHalfSplit).then_some(("FREE", 1)));
        macros
    }
}

impl Sliced {
    /// What [`Tiling::decode_few`] chooses from, each with the most units (splits of items and key/value heads) for which it is the fastest
    /// of those behind it, measured with heads of 128 on 132 multiprocessors. Larger heads were not measured.
    fn choices(spec: &AttentionSpec) -> impl Iterator<Item = (Self, usize)> {
        let rows = if spec.group() <= 8 { 8 } else { 16 };
        let spec = *spec;
        [(4, false, 2, 16), (2, true, 2, 32), (2, false, 4, 32), (4, false, 1, 32), (2, true, 1, 64)]
            .into_iter()
            .map(move |(slices, share_scores, joined, most)| {
                (Self { rows, slices, share_scores, joined }, most)
            })
            .filter(move |(sliced, _)| {
                spec.head_dim <= 128 && sliced.fits(spec.head_dim) && sliced.smem_bytes(&spec) <= SMEM_LIMIT
            })
    }

    fn fits(&self, head_dim: usize) -> bool {
        SLICES.contains(&(head_dim / self.slices)) && self.cluster() <= 8
    }

    fn peers(&self) -> usize {
        if self.share_scores { self.slices } else { 1 }
    }

    fn cluster(&self) -> usize {
        self.peers() * self.joined
    }

    fn macros(&self, spec: &AttentionSpec) -> Macros {
        assert!(
            [8, 16].contains(&self.rows) && self.fits(spec.head_dim),
            "{self:?} for heads of {}",
            spec.head_dim
        );
        vec![("ROWS", self.rows), ("SLICES", self.slices), ("PEERS", self.peers()), ("JOINED", self.joined)]
    }

    /// As the kernel lays it out.
    fn smem_bytes(&self, spec: &AttentionSpec) -> usize {
        let Self { rows, slices, joined, .. } = *self;
        let (keys, slice) = (SPLIT_TILES * BLOCK_TOKENS, spec.head_dim / slices);
        let own_keys = keys / self.peers() * spec.head_dim * 2;
        let weights = rows * (keys + 8) * 6;
        let values = keys * (slice * 2 + 16);
        let scores = rows * keys * 4;
        let factors = (SPLIT_TILES + 2) * rows * 4;
        let join = if joined > 1 { joined * rows * (slice + 2) * 4 } else { 0 };
        own_keys.max(weights) + values + scores + factors + 32 + join
    }
}

impl Prefill {
    fn macros(&self, spec: &AttentionSpec) -> Macros {
        assert!(spec.head_dim <= 128 && self.slots >= 4, "{self:?} for heads of {}", spec.head_dim);
        vec![("SLOTS", self.slots)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN: AttentionSpec = AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 };

    fn few(spec: &AttentionSpec, items: usize, splits: usize) -> Option<(usize, bool, usize)> {
        let Tiling::Sliced(s) = Tiling::decode_few(spec, items, splits)? else { panic!("not by slices") };
        assert!(s.joined == 1 || s.joined == splits, "{splits} splits in clusters of {}", s.joined);
        Some((s.slices, s.share_scores, s.joined))
    }

    #[test]
    fn few_items_share_their_splits_out_and_many_do_not() {
        for (items, splits, expected) in [
            (1, 1, Some((4, false, 1))),
            (1, 2, Some((4, false, 2))),
            (2, 2, Some((2, true, 2))),
            (1, 3, Some((4, false, 1))),
            (1, 4, Some((2, false, 4))),
            (4, 2, Some((2, true, 1))),
            (1, 8, Some((2, true, 1))),
            (8, 2, None),
            (1, 16, None),
        ] {
            assert_eq!(few(&QWEN, items, splits), expected, "{items} items of {splits} splits");
        }
        let large = AttentionSpec { head_dim: 256, ..QWEN };
        assert_eq!(few(&large, 1, 1), None);
    }

    #[test]
    fn whatever_is_planned_fits_a_block() {
        for head_dim in [64, 128, 256] {
            for (heads, kv_heads) in [(1, 1), (9, 3), (32, 8), (16, 1)] {
                let spec = AttentionSpec { heads, kv_heads, head_dim };
                for tiling in Tiling::planned(&spec) {
                    assert!(tiling.smem_bytes(&spec) <= SMEM_LIMIT, "{tiling:?} for {spec:?}");
                }
            }
        }
    }
}
