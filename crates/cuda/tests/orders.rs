//! The orders that layers are computed in are those of NUMERICS.md. Twins take a layer's order from its `LinearSpec`, so that a wrong one
//! would be equal everywhere on a card.

use bitfast_cuda::linear::{LinearSpec, Output};
use bitfast_ops::LinearKind;
use bitfast_ops::contract::{Join, KOrder};

#[test]
fn row_parallel_layers_fold_leaves_and_others_are_one_chain() {
    for (k, leaves) in [
        (576, 1),
        (1024, 2),
        (1536, 2),
        (2048, 4),
        (3072, 4),
        (4096, 8),
        (6144, 8),
        (8192, 8),
        (12288, 8),
        (14336, 8),
        // Halves and quarters that are no whole 128, or shorter than 512.
        (1000, 1),
        (1100, 1),
        (1280, 2),
        (2304, 2),
        (2560, 4),
    ] {
        let order = |kind| LinearSpec::new(kind, 64, k).order;
        assert_eq!(order(LinearKind::Row), KOrder { leaves, join: Join::Fold }, "{k} products");
        for kind in [LinearKind::Column, LinearKind::GateUp, LinearKind::Vocab] {
            assert_eq!(order(kind).leaves, 1, "{kind:?} of {k} products");
        }
    }
}

#[test]
fn gates_and_ups_are_one_launch_where_their_rows_can_be_loaded() {
    let fused = |n, k| LinearSpec::new(LinearKind::GateUp, n, k).fused();
    for (n, k) in [(12288, 2048), (28672, 4096), (16, 8), (3072, 576)] {
        let spec = fused(n, k).expect("whole eights of each");
        assert_eq!((spec.n, spec.outputs(), spec.output), (n, n / 2, Output::SiluMul));
    }
    // Ups would not begin at whole 16 bytes; rows would not; sums are not one chain's.
    assert_eq!([fused(200, 64), fused(24, 64), fused(16, 100)], [None; 3]);
    assert_eq!(LinearSpec::new(LinearKind::Row, 2048, 2048).fused(), None);
}
