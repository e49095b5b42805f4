/// Tiles of 64 keys in a split, such that `blocks` rows of splits (items times key/value heads), the longest of `tiles` tiles, fill `places` thread
/// blocks that run side by side: the fewest splits whose waves waste at most 15% more of the card than the best number does
/// (FlashAttention's rule).
pub(crate) fn split_tiles(blocks: usize, tiles: usize, places: usize) -> usize {
    let tiles = tiles.max(1);
    // Nearly full as it is: to split only adds partial results.
    if blocks * 5 >= places * 4 {
        return tiles;
    }
    let filled = |splits: usize| {
        let waves = (blocks.max(1) * splits) as f64 / places as f64;
        waves / waves.ceil()
    };
    // Of numbers that give splits of one length only the smallest counts.
    let worth = |splits: &usize| *splits == 1 || tiles.div_ceil(*splits) != tiles.div_ceil(splits - 1);
    let candidates = || (1..=tiles.min(places)).filter(worth);
    let best = candidates().map(filled).fold(0.0, f64::max);
    let splits = candidates().find(|splits| filled(*splits) >= 0.85 * best);
    tiles.div_ceil(splits.expect("the best one is one of them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_card_and_no_more() {
        // One sequence of 1024 keys over 8 heads: every tile a block of its own, 128 of 264 places.
        assert_eq!(split_tiles(8, 16, 264), 1);
        // Of 8192 keys: 32 splits of 4 tiles are 256 blocks.
        assert_eq!(split_tiles(8, 128, 264), 4);
        // Four sequences: 7 splits of up to 19, 224 blocks; an eighth would fill 256.
        assert_eq!(split_tiles(32, 128, 264), 19);
        // A full card is not split, nor is nothing.
        assert_eq!(split_tiles(256, 128, 264), 128);
        assert_eq!(split_tiles(8, 1, 264), 1);
        assert_eq!(split_tiles(0, 0, 264), 1);
    }

    #[test]
    fn the_batch_moves_the_splits() {
        let lengths: Vec<usize> = [1, 2, 4, 8, 16, 32].map(|seqs| split_tiles(8 * seqs, 128, 264)).to_vec();
        assert!(lengths.is_sorted() && lengths[0] < lengths[5], "{lengths:?}");
    }
}
