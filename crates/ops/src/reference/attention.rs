use half::bf16;

use super::{chunk_k, dot, mat_step};
use crate::AttnDesc;
use crate::contract::{ATTN_SPLIT_KEYS, ATTN_TILE_KEYS, Class};
use crate::exact::{exp2_poly3, f32_to_bf16, pow2i};

/// Causal attention of one sequence's rows at positions `first_pos ..` over its keys and values.
///
/// `q: [rows, heads, head_dim]`; `k, v: [tokens, kv_heads, head_dim]` with `tokens >= first_pos + rows`, keys
/// behind a row's own position are not read. Query head h uses key/value head `h / (heads / kv_heads)`. Returns
/// `[rows, heads, head_dim]`.
pub fn attention(
    class: Class,
    desc: AttnDesc,
    first_pos: usize,
    q: &[bf16],
    k: &[bf16],
    v: &[bf16],
) -> Vec<bf16> {
    let AttnDesc { heads, kv_heads, head_dim, scale_log2, .. } = desc;
    assert!(heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads} key/value heads");
    let group = heads / kv_heads;
    let mut out = Vec::with_capacity(q.len());
    for (r, q_row) in q.chunks(heads * head_dim).enumerate() {
        for (h, q) in q_row.chunks(head_dim).enumerate() {
            let head =
                |x| Head { data: x, stride: kv_heads * head_dim, start: h / group * head_dim, head_dim };
            out.extend(attend(class, scale_log2, q, head(k), head(v), first_pos + r + 1));
        }
    }
    out
}

/// One key or value head of a sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    data: &'a [bf16],
    stride: usize,
    start: usize,
    head_dim: usize,
}

impl<'a> Head<'a> {
    fn row(self, token: usize) -> &'a [bf16] {
        &self.data[token * self.stride + self.start..][..self.head_dim]
    }
}

/// The state of a softmax over some keys: `out / l` is the attention output, both scaled by 2^-max.
struct Partial {
    max: f32,
    l: f32,
    out: Vec<f32>,
}

/// One query head over the first `keys` keys.
fn attend(class: Class, scale_log2: f32, q: &[bf16], k: Head<'_>, v: Head<'_>, keys: usize) -> Vec<bf16> {
    let splits = (0..keys)
        .step_by(ATTN_SPLIT_KEYS)
        .map(|first| split(class, scale_log2, q, k, v, first, (first + ATTN_SPLIT_KEYS).min(keys)));
    let total = splits.reduce(fold).expect("a row attends at least its own key");
    let inverse = 1.0 / total.l;
    // The last add makes the sign of a zero canonical.
    total.out.iter().map(|o| f32_to_bf16(o * inverse + 0.0)).collect()
}

/// The keys `first .. end` of one split.
fn split(
    class: Class,
    scale_log2: f32,
    q: &[bf16],
    k: Head<'_>,
    v: Head<'_>,
    first: usize,
    end: usize,
) -> Partial {
    let mut max = f32::NEG_INFINITY;
    let mut l = [0f32; 4];
    let mut out = vec![0f32; v.head_dim];
    for tile in (first..end).step_by(ATTN_TILE_KEYS) {
        let keys = tile..(tile + ATTN_TILE_KEYS).min(end);
        let scores: Vec<f32> = keys.clone().map(|j| dot(class, 0.0, q, k.row(j))).collect();
        let tile_max = scores.iter().fold(f32::NEG_INFINITY, |m, s| larger(m, *s));
        let new_max = larger(max, (tile_max * scale_log2).ceil());
        let rescale = pow2i(max - new_max);
        out.iter_mut().for_each(|o| *o *= rescale);
        l.iter_mut().for_each(|l| *l *= rescale);
        max = new_max;

        let mut p = [bf16::ZERO; ATTN_TILE_KEYS];
        for (j, score) in scores.iter().enumerate() {
            let t = score.mul_add(scale_log2, -max);
            let weight = exp2_poly3(larger(-125.0, t));
            l[j % 8 / 2] += weight;
            p[j] = f32_to_bf16(weight);
        }
        accumulate(class, &mut out, &p, v, keys);
    }
    Partial { max, l: (l[0] + l[1]) + (l[2] + l[3]), out }
}

/// `out += p v` over one tile, in the class's order; masked keys are +0 in `p` and in `v`.
fn accumulate(class: Class, out: &mut [f32], p: &[bf16], v: Head<'_>, keys: std::ops::Range<usize>) {
    let chunk = chunk_k(class);
    for (d, out) in out.iter_mut().enumerate() {
        let column: Vec<bf16> = keys.clone().map(|j| v.row(j)[d]).collect();
        for (i, p) in p.chunks(chunk).enumerate() {
            let v = column.get(i * chunk..).unwrap_or(&[]);
            let v = &v[..v.len().min(chunk)];
            *out = mat_step(class, *out, &p[..v.len()], v);
        }
    }
}

/// Joins two partial results; the earlier split is on the left.
fn fold(a: Partial, b: Partial) -> Partial {
    let max = larger(a.max, b.max);
    let (wa, wb) = (pow2i(a.max - max), pow2i(b.max - max));
    let join = |x: f32, y: f32| x.mul_add(wa, y * wb);
    Partial { max, l: join(a.l, b.l), out: a.out.iter().zip(&b.out).map(|(x, y)| join(*x, *y)).collect() }
}

/// The larger one; a NaN in `b` does not count.
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[cfg(test)]
mod tests;
