use half::bf16;

use crate::exact;
use crate::{NormDesc, RopeTable};

/// `out[r] = table[token_ids[r]]`, rows of `d`.
pub fn embed(table: &[bf16], d: usize, token_ids: &[u32]) -> Vec<bf16> {
    token_ids.iter().flat_map(|id| &table[*id as usize * d..][..d]).copied().collect()
}

/// RMSNorm of every row; `w` as stored, one row long.
pub fn rms_norm(x: &[bf16], w: &[bf16], desc: NormDesc) -> Vec<bf16> {
    let factors = exact::norm_weights(desc, w);
    let mut out = vec![bf16::ZERO; x.len()];
    for (x, out) in x.chunks(w.len()).zip(out.chunks_mut(w.len())) {
        exact::rms_norm(x, &factors, desc.eps, out);
    }
    out
}

/// `residual = bf16(residual + delta)`, then RMSNorm of every row of it.
pub fn add_rms_norm(residual: &mut [bf16], delta: &[bf16], w: &[bf16], desc: NormDesc) -> Vec<bf16> {
    exact::add_residual(residual, delta);
    rms_norm(residual, w, desc)
}

/// RMSNorm of every head (`w` is one head long), in place. `heads: [.., head_dim]`
pub fn qk_norm(heads: &mut [bf16], w: &[bf16], desc: NormDesc) {
    let factors = exact::norm_weights(desc, w);
    heads.chunks_mut(w.len()).for_each(|head| exact::rms_norm_in_place(head, &factors, desc.eps));
}

/// Rotates `x: [rows, heads, head_dim]` in place; row `r` is at `positions[r]`.
pub fn rope(x: &mut [bf16], head_dim: usize, table: &RopeTable, positions: &[u32]) {
    let row_len = x.len() / positions.len().max(1);
    for (row, pos) in x.chunks_mut(row_len.max(1)).zip(positions) {
        let (cos, sin) = table.row(*pos as usize);
        row.chunks_mut(head_dim).for_each(|head| exact::rope(head, cos, sin));
    }
}

/// `bf16(silu(g) * u)`, element by element.
pub fn silu_mul(g: &[bf16], u: &[bf16]) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; g.len()];
    exact::silu_mul(g, u, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    #[test]
    fn rows_and_heads_are_independent() {
        let desc = NormDesc { eps: 1e-5, unit_offset: false };
        let (x, delta, w) = (values(3 * 96, 1, 2.0), values(3 * 96, 2, 1.0), values(96, 3, 1.0));
        let mut residual = x.clone();
        let all = add_rms_norm(&mut residual, &delta, &w, desc);
        for r in 0..3 {
            let row = r * 96..(r + 1) * 96;
            let mut alone = x[row.clone()].to_vec();
            assert_eq!(add_rms_norm(&mut alone, &delta[row.clone()], &w, desc), all[row.clone()]);
            assert_eq!(alone, residual[row.clone()]);
            assert_eq!(rms_norm(&alone, &w, desc), all[row]);
        }
        let (mut heads, head_w) = (x.clone(), &w[..32]);
        qk_norm(&mut heads, head_w, desc);
        for (head, x) in heads.chunks(32).zip(x.chunks(32)) {
            assert_eq!(head, rms_norm(x, head_w, desc));
        }
    }

    #[test]
    fn rope_takes_each_row_s_position() {
        let table = RopeTable::new(&[1.0, 0.1, 0.01, 0.001], 50);
        let x = values(3 * 2 * 8, 4, 1.0);
        let mut all = x.clone();
        rope(&mut all, 8, &table, &[0, 49, 7]);
        assert_eq!(all[..16], x[..16]);
        for (r, pos) in [(1, 49), (2, 7)] {
            let mut head = x[r * 16 + 8..][..8].to_vec();
            exact::rope(&mut head, table.row(pos).0, table.row(pos).1);
            assert_eq!(all[r * 16 + 8..][..8], head);
            assert_ne!(x[r * 16 + 8..][..8], head);
        }
    }

    #[test]
    fn embed_gathers() {
        let table = values(5 * 4, 5, 1.0);
        assert_eq!(embed(&table, 4, &[3, 0, 3]), [&table[12..16], &table[..4], &table[12..16]].concat());
    }
}
