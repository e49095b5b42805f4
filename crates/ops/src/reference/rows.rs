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
