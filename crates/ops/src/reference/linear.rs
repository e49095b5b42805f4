use half::bf16;

use super::dot;
use crate::contract::{Class, KOrder};
use crate::exact::{f32_to_bf16, join_leaves, silu_mul};

/// `y[t, n] = sum_k x[t, k] w[n, k]` in fp32, before any rounding: a chain in the class's order for each of the
/// order's leaves, then the join. `x: [rows, k]`, `w: [n, k]`; `order` from [`crate::LinearDesc::k_order`].
pub fn linear_f32(class: Class, order: KOrder, x: &[bf16], w: &[bf16], k: usize) -> Vec<f32> {
    assert!(k.is_multiple_of(order.leaves), "k = {k} in {} leaves", order.leaves);
    assert!(x.len().is_multiple_of(k) && w.len().is_multiple_of(k), "not rows of k = {k}");
    let leaf = k / order.leaves;
    let mut out = Vec::with_capacity(x.len() / k * (w.len() / k));
    for x in x.chunks(k) {
        for w in w.chunks(k) {
            let mut leaves: Vec<f32> =
                x.chunks(leaf).zip(w.chunks(leaf)).map(|(x, w)| dot(class, 0.0, x, w)).collect();
            out.push(join_leaves(order.join, &mut leaves));
        }
    }
    out
}

/// [`linear_f32`], rounded to bf16.
pub fn linear(class: Class, order: KOrder, x: &[bf16], w: &[bf16], k: usize) -> Vec<bf16> {
    linear_f32(class, order, x, w, k).into_iter().map(f32_to_bf16).collect()
}

/// `bf16(silu(g) * u)` with `[g, u] = bf16(x w^T)`: `w` holds the gate rows, then as many up rows.
pub fn gate_up(class: Class, order: KOrder, x: &[bf16], w: &[bf16], k: usize) -> Vec<bf16> {
    let both = linear(class, order, x, w, k);
    let n = w.len() / k;
    let mut out = vec![bf16::ZERO; both.len() / 2];
    for (both, out) in both.chunks(n).zip(out.chunks_mut(n / 2)) {
        let (g, u) = both.split_at(n / 2);
        silu_mul(g, u, out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Join;
    use crate::testing::values;
    use crate::{LinearDesc, LinearKind};

    #[test]
    fn linear_matches_f64() {
        for (class, per_step) in [(Class::Portable, 1.0), (Class::Hopper, 4.0)] {
            for (k, kind) in [(576, LinearKind::Column), (2048, LinearKind::Row), (100, LinearKind::Vocab)] {
                let (rows, n) = (3, 5);
                let order = LinearDesc { name: String::new(), kind, n, k, experts: None }.k_order(class);
                let (x, w) = (values(rows * k, 1, 1.0), values(n * k, 2, 1.0));
                for (i, got) in linear_f32(class, order, &x, &w, k).iter().enumerate() {
                    let terms = x[i / n * k..][..k].iter().zip(&w[i % n * k..][..k]);
                    let products: Vec<f64> = terms.map(|(x, w)| x.to_f64() * w.to_f64()).collect();
                    let (exact, size) =
                        (products.iter().sum::<f64>(), products.iter().map(|p| p.abs()).sum::<f64>());
                    // Each of the k adds rounds a partial sum below `size` (truncation: up to twice as far).
                    let bound = size * k as f64 * 2f64.powi(-24) * per_step / 8.0;
                    assert!((*got as f64 - exact).abs() <= bound, "{class:?} k {k}: {got} for {exact}");
                }
            }
        }
    }

    #[test]
    fn leaves_and_joins_are_as_ordered() {
        let k = 2048;
        let (x, w) = (values(k, 3, 1.0), values(k, 4, 1.0));
        for class in [Class::Portable, Class::Hopper] {
            let leaf = |i: usize| dot(class, 0.0, &x[i * 512..][..512], &w[i * 512..][..512]);
            let order = |leaves, join| linear_f32(class, KOrder { leaves, join }, &x, &w, k)[0];
            assert_eq!(order(4, Join::Tree), (leaf(0) + leaf(1)) + (leaf(2) + leaf(3)));
            assert_eq!(order(4, Join::Fold), ((leaf(0) + leaf(1)) + leaf(2)) + leaf(3));
            assert_eq!(order(1, Join::Fold), dot(class, 0.0, &x, &w));
        }
    }

    #[test]
    fn the_classes_differ() {
        let (x, w) = (values(2048, 9, 1.0), values(2048, 10, 1.0));
        assert_ne!(dot(Class::Portable, 0.0, &x, &w), dot(Class::Hopper, 0.0, &x, &w));
    }

    /// What a tensor-parallel rank computes is a subtree: two halves join to the whole.
    #[test]
    fn halves_of_a_row_parallel_layer_join_to_the_whole() {
        let k = 2048;
        let (x, w) = (values(k, 5, 1.0), values(k, 6, 1.0));
        for class in [Class::Portable, Class::Hopper] {
            let tree = |leaves, part: std::ops::Range<usize>| {
                let k = part.len();
                linear_f32(class, KOrder { leaves, join: Join::Tree }, &x[part.clone()], &w[part], k)[0]
            };
            assert_eq!(tree(8, 0..k), tree(4, 0..k / 2) + tree(4, k / 2..k));
        }
    }

    #[test]
    fn gate_up_is_linear_then_silu() {
        let (k, inner) = (64, 3);
        let (x, w) = (values(2 * k, 7, 1.0), values(2 * inner * k, 8, 1.0));
        let order = KOrder { leaves: 1, join: Join::Fold };
        let both = linear(Class::Portable, order, &x, &w, k);
        let out = gate_up(Class::Portable, order, &x, &w, k);
        for r in 0..2 {
            for i in 0..inner {
                let (g, u) = (both[r * 6 + i].to_f32(), both[r * 6 + 3 + i].to_f32());
                let exact = g / (1.0 + (-g).exp()) * u;
                assert!((out[r * 3 + i].to_f32() - exact).abs() <= exact.abs() * 0.0041);
            }
        }
    }
}
