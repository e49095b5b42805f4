use crate::contract::Join;

/// Joins the leaves of one output element of a linear layer, by exact-order fp32 adds.
///
/// `Tree` needs a power of two of leaves and leaves scratch values in `leaves`.
#[inline(always)]
pub fn join_leaves(join: Join, leaves: &mut [f32]) -> f32 {
    match join {
        Join::Fold => {
            let mut sum = leaves[0];
            for x in &leaves[1..] {
                sum += x;
            }
            sum
        }
        Join::Tree => {
            let mut n = leaves.len();
            assert!(n.is_power_of_two(), "a tree of {n} leaves");
            while n > 1 {
                n /= 2;
                for i in 0..n {
                    leaves[i] = leaves[2 * i] + leaves[2 * i + 1];
                }
            }
            leaves[0]
        }
    }
}

/// Sums `lanes[..len]`, all of them +0 or positive (or NaN), as a balanced binary tree of adjacent pairs over a
/// power of two of lanes: lane `2i` joins lane `2i + 1`, then pairs join pairs. Lanes from `len` on must be +0;
/// they are the tree's missing lanes, and adding +0 changes nothing, so subtrees of them are skipped.
///
/// `N` is a multiple of 32. Leaves scratch values in `lanes`.
#[inline(always)]
pub fn tree_sum<const N: usize>(lanes: &mut [f32; N], len: usize) -> f32 {
    const { assert!(N.is_multiple_of(32)) };
    assert!(len <= N, "{len} lanes of {N}");
    let mut blocks = len.div_ceil(32);
    loop {
        for b in 0..blocks {
            let mut pairs = [0f32; 32];
            pairs.copy_from_slice(&lanes[32 * b..32 * b + 32]);
            let sums: [f32; 16] = std::array::from_fn(|i| pairs[2 * i] + pairs[2 * i + 1]);
            lanes[16 * b..16 * b + 16].copy_from_slice(&sums);
        }
        if blocks <= 1 {
            break;
        }
        if blocks % 2 == 1 {
            lanes[16 * blocks..16 * blocks + 16].fill(0.0);
        }
        blocks = blocks.div_ceil(2);
    }
    let s: [f32; 8] = std::array::from_fn(|i| lanes[2 * i] + lanes[2 * i + 1]);
    let s: [f32; 4] = std::array::from_fn(|i| s[2 * i] + s[2 * i + 1]);
    (s[0] + s[1]) + (s[2] + s[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(lanes: &[f32]) -> f32 {
        match lanes {
            [x] => *x,
            _ => naive(&lanes[..lanes.len() / 2]) + naive(&lanes[lanes.len() / 2..]),
        }
    }

    #[test]
    fn tree_sum_is_the_recursive_tree() {
        let mut differs_from_fold = false;
        for len in 0..=1024 {
            let mut lanes = [0f32; 1024];
            for (i, x) in lanes[..len].iter_mut().enumerate() {
                *x = ((i * 2_654_435_761 + len) % 1000) as f32 * 0.013 + 1e-3;
            }
            let expected = naive(&lanes);
            differs_from_fold |= expected != lanes.iter().sum::<f32>();
            assert_eq!(tree_sum(&mut lanes, len).to_bits(), expected.to_bits(), "{len} lanes");
        }
        assert!(differs_from_fold, "the test cannot tell a tree from a fold");
    }

    #[test]
    fn leaves_join_in_their_order() {
        let leaves = [1e8f32, 1.0, -1e8, 3.0];
        assert_eq!(join_leaves(Join::Tree, &mut leaves.clone()), (1e8 + 1.0) + (-1e8 + 3.0f32));
        assert_eq!(join_leaves(Join::Fold, &mut leaves.clone()), ((1e8 + 1.0) + -1e8) + 3.0f32);
        assert_ne!(
            join_leaves(Join::Tree, &mut leaves.clone()),
            join_leaves(Join::Fold, &mut leaves.clone())
        );
        assert_eq!(join_leaves(Join::Tree, &mut [-0.0]).to_bits(), (-0.0f32).to_bits());
    }
}
