use crate::exact::cap;

/// Orders like the capped value, -0 and +0 alike.
#[inline(always)]
fn value_key(x: f32) -> u32 {
    let bits = (cap(x) + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Orders by (value descending, id ascending) when sorted descending.
#[inline(always)]
fn key(id: usize, x: f32) -> u64 {
    (value_key(x) as u64) << 32 | !(id as u32) as u64
}

/// The id of the first entry whose capped value equals `value`; 0 if there is none.
#[inline(always)]
pub(super) fn first_at(x: &[f32], value: f32) -> u32 {
    x.iter().position(|x| cap(*x) == value).unwrap_or(0) as u32
}

/// The `k` best entries of a NaN-free row, (id, capped value), by (value descending, id ascending).
#[inline(always)]
pub(super) fn best(x: &[f32], k: usize) -> Vec<(u32, f32)> {
    let k = k.min(x.len());
    let mut keys = if k == 0 { Vec::new() } else { best_keys(x, k) };
    keys.sort_unstable_by(|a, b| b.cmp(a));
    keys.truncate(k);
    keys.into_iter()
        .map(|key| {
            let id = !(key as u32);
            (id, cap(x[id as usize]))
        })
        .collect()
}

/// A superset of the `k >= 1` best keys, in no order, of fewer than 2k + 64 entries.
#[inline(always)]
fn best_keys(x: &[f32], k: usize) -> Vec<u64> {
    const BLOCK: usize = 64;
    let limit = 2 * k;
    let mut keys: Vec<u64> = Vec::with_capacity((limit + BLOCK).min(x.len()));
    // Once k keys are known, only a value above the k-th best can enter: later ids lose ties.
    let mut floor: Option<f32> = None;
    for (b, block) in x.chunks(BLOCK).enumerate() {
        let floor_value = floor.unwrap_or(f32::NEG_INFINITY);
        if floor.is_some() && !block.iter().fold(false, |any, x| any | (cap(*x) > floor_value)) {
            continue;
        }
        for (i, x) in block.iter().enumerate() {
            if floor.is_none() || cap(*x) > floor_value {
                keys.push(key(b * BLOCK + i, *x));
            }
        }
        if keys.len() >= limit {
            keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            keys.truncate(k);
            floor = Some(cap(x[!(keys[k - 1] as u32) as usize]));
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_tie_and_infinity_is_capped() {
        assert_eq!(best(&[-0.0, 0.0, -0.0], 2), vec![(0, -0.0), (1, 0.0)]);
        assert_eq!(best(&[f32::MAX, f32::INFINITY], 2), vec![(0, f32::MAX), (1, f32::MAX)]);
        assert_eq!(best(&[f32::NEG_INFINITY, -1.0], 5), vec![(1, -1.0), (0, f32::NEG_INFINITY)]);
        assert_eq!(best(&[1.0], 0), vec![]);
        assert_eq!(first_at(&[1.0, f32::INFINITY, f32::MAX], f32::MAX), 1);
    }
}
