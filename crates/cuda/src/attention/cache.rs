use super::AttentionSpec;

/// Tokens of a block of the cache: one attention tile.
pub const BLOCK_TOKENS: usize = 64;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// Bytes of one block of one layer: `[kv_heads][K, V][head_dim / 64][64 tokens][64 elements]` bf16, a row of 64 elements (128 bytes) in
/// eight chunks, chunk `c` of token `t` at place `c ^ (t mod 8)`: the 128-byte swizzle of the tensor core's operands. A (head, K
/// or V) tile is contiguous, so one bulk copy brings it to shared memory ready for use.
pub fn block_bytes(spec: &AttentionSpec) -> usize {
    spec.kv_heads * 2 * BLOCK_TOKENS * spec.head_dim * 2
}

/// Byte offset of one element in a layer's cache; `slot` = block * 64 + token.
pub fn element_offset(spec: &AttentionSpec, slot: usize, kv_head: usize, which: Cached, dim: usize) -> usize {
    let (block, token) = (slot / BLOCK_TOKENS, slot % BLOCK_TOKENS);
    let tile = (block * spec.kv_heads + kv_head) * 2 + usize::from(which == Cached::Value);
    let in_tile =
        dim / 64 * (BLOCK_TOKENS * 128) + token * 128 + ((dim / 8 % 8) ^ (token % 8)) * 16 + dim % 8 * 2;
    tile * BLOCK_TOKENS * spec.head_dim * 2 + in_tile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_pair_of_a_block_is_one_element() {
        for head_dim in [64, 128, 256] {
            let spec = AttentionSpec { heads: 4, kv_heads: 2, head_dim };
            let mut seen = vec![false; block_bytes(&spec) / 2];
            for slot in BLOCK_TOKENS..2 * BLOCK_TOKENS {
                for (kv_head, which) in
                    [(0, Cached::Key), (0, Cached::Value), (1, Cached::Key), (1, Cached::Value)]
                {
                    for dim in 0..head_dim {
                        let at = element_offset(&spec, slot, kv_head, which, dim) - block_bytes(&spec);
                        assert!(at.is_multiple_of(2) && !std::mem::replace(&mut seen[at / 2], true), "{at}");
                    }
                }
            }
            assert!(seen.iter().all(|s| *s));
        }
    }
}
