//! The constants of the numerics contract (NUMERICS.md). Changing one changes bits: it needs a new
//! [`NUMERICS_VERSION`] and new golden digests in the same commit.

/// Version of the contract, part of every `system_fingerprint`.
pub const NUMERICS_VERSION: u32 = 1;

/// Keys per attention tile; the tile grid is anchored at token 0.
pub const ATTN_TILE_KEYS: usize = 64;
/// Keys per attention split; splits are folded left, ascending.
pub const ATTN_SPLIT_KEYS: usize = 512;
/// `portable`: products per chunk of the matrix-product order.
pub const PORTABLE_CHUNK_K: usize = 32;
/// Virtual lanes of the RMSNorm square sum.
pub const NORM_LANES: usize = 1024;
/// Vocabulary entries per log-sum-exp chunk.
pub const LSE_CHUNK: usize = 1024;
/// Leaves of a row-parallel layer are multiples of this many products.
pub const LEAF_MULTIPLE: usize = 128;
/// `hopper`: fewest products of a leaf. Shorter ones cost a large-M kernel more than 3% (LOG.md).
pub const HOPPER_LEAF_MIN: usize = 512;

/// A numerics class: machines of one class give equal bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Every CPU: chunks of 32 products, even and odd fma chains.
    Portable,
    /// NVIDIA H100 and H200: one tensor-core step per 16 products (bf16).
    Hopper,
}

impl Class {
    /// The class's name in fingerprints, flags and reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Portable => "portable",
            Class::Hopper => "hopper",
        }
    }
}

/// How the leaves of a linear layer join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Join {
    /// Balanced binary tree of adjacent pairs. A rank that holds a subtree hands over one partial sum.
    Tree,
    /// Left fold, ascending: a block of outputs needs one running sum beside its accumulator, however many leaves.
    /// A rank hands over each of its leaves, the first rank their fold.
    Fold,
}

/// The K order of one linear layer: `leaves` equal chains, then `join`.
///
/// A pure function of the layer's GLOBAL shape and the class; the number of rows in a batch is not in sight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KOrder {
    /// Number of equal leaves that K is cut into.
    pub leaves: usize,
    /// How they join.
    pub join: Join,
}

/// K order of a row-parallel layer (attention output, MLP down, expert down), whose leaves tensor-parallel ranks share.
///
/// The largest of 8, 4, 2, 1 leaves that are multiples of [`LEAF_MULTIPLE`]. `portable` joins them as a balanced tree. `hopper`
/// folds them, of at least [`HOPPER_LEAF_MIN`] products each: at large M a tree's running sums cost a tensor-core
/// kernel its tile (8% to 32% of the layer's time, measured), a fold's 1% to 6%.
pub fn row_parallel_order(class: Class, k: usize) -> KOrder {
    let (shortest, join) = match class {
        Class::Portable => (LEAF_MULTIPLE, Join::Tree),
        Class::Hopper => (HOPPER_LEAF_MIN, Join::Fold),
    };
    let fits = |leaves: &usize| k.is_multiple_of(leaves * LEAF_MULTIPLE) && k / leaves >= shortest;
    KOrder { leaves: [8, 4, 2].into_iter().find(fits).unwrap_or(1), join }
}

/// K order of a layer whose tensor-parallel shards need no reduction: one chain, in every class.
pub fn column_parallel_order() -> KOrder {
    KOrder { leaves: 1, join: Join::Fold }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_parallel_leaves_are_multiples_of_128() {
        for (k, leaves) in
            [(576, 1), (1536, 4), (2048, 8), (4096, 8), (6144, 8), (14336, 8), (768, 2), (100, 1)]
        {
            let order = row_parallel_order(Class::Portable, k);
            assert_eq!(order, KOrder { leaves, join: Join::Tree }, "k = {k}");
        }
    }

    #[test]
    fn hopper_folds_leaves_of_at_least_512() {
        for (k, leaves) in
            [(576, 1), (1024, 2), (1536, 2), (2048, 4), (3072, 4), (4096, 8), (6144, 8), (14336, 8), (100, 1)]
        {
            let order = row_parallel_order(Class::Hopper, k);
            assert_eq!(order, KOrder { leaves, join: Join::Fold }, "k = {k}");
        }
    }

    #[test]
    fn column_parallel_layers_are_one_chain() {
        assert_eq!(column_parallel_order().leaves, 1);
    }
}
