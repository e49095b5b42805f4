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
    /// Balanced binary tree, so that a tensor-parallel rank holds a subtree.
    Tree,
    /// Left fold, ascending.
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

/// K order of a row-parallel layer (attention output, MLP down, expert down): the largest of 8, 4, 2, 1
/// leaves that are multiples of [`LEAF_MULTIPLE`]; joined as a balanced tree in every class.
pub fn row_parallel_order(k: usize) -> KOrder {
    let leaves = [8, 4, 2].into_iter().find(|l| k.is_multiple_of(l * LEAF_MULTIPLE)).unwrap_or(1);
    KOrder { leaves, join: Join::Tree }
}

/// K order of a layer whose tensor-parallel shards need no reduction, from its global `n` outputs and `k`.
///
/// `portable` has one leaf. `hopper` takes the smallest power of two with `n / 16 * leaves >= 1024`, at most 8
/// and with leaves of at least 256 products: enough independent 16-row tiles to fill the card at decode.
pub fn column_parallel_order(class: Class, n: usize, k: usize) -> KOrder {
    let leaves = match class {
        Class::Portable => 1,
        Class::Hopper => {
            let mut leaves = 1;
            while n / 16 * leaves < 1024
                && leaves < 8
                && k.is_multiple_of(leaves * 2 * 64)
                && k / (leaves * 2) >= 256
            {
                leaves *= 2;
            }
            leaves
        }
    };
    KOrder { leaves, join: Join::Fold }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_parallel_leaves_are_multiples_of_128() {
        for (k, leaves) in
            [(576, 1), (1536, 4), (2048, 8), (4096, 8), (6144, 8), (14336, 8), (768, 2), (100, 1)]
        {
            assert_eq!(row_parallel_order(k).leaves, leaves, "k = {k}");
        }
    }

    #[test]
    fn column_parallel_leaves_depend_on_class_and_global_shape_only() {
        assert_eq!(column_parallel_order(Class::Portable, 4096, 2048).leaves, 1);
        assert_eq!(column_parallel_order(Class::Hopper, 4096, 2048).leaves, 4);
        assert_eq!(column_parallel_order(Class::Hopper, 12288, 2048).leaves, 2);
        assert_eq!(column_parallel_order(Class::Hopper, 16384, 2048).leaves, 1);
        assert_eq!(column_parallel_order(Class::Hopper, 151_936, 2048).leaves, 1);
        assert_eq!(column_parallel_order(Class::Hopper, 960, 576).leaves, 1);
    }
}
