/// Tiles of 64 keys in a split, such that `blocks` rows of splits (items times key/value heads), the longest of `tiles` tiles, fill `places` thread
/// blocks that run side by side: the fewest splits whose waves leave at most 10% more of the card idle than the best number does. Its last block
/// folds a row's splits one by one, so that more than the root of its length are slower however idle the card is (LOG.md, "the unconstrained mode").
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
    let most = (1.5 * (tiles as f64).sqrt()).ceil() as usize;
    let candidates = || (1..=tiles.min(most)).filter(worth);
    let best = candidates().map(filled).fold(0.0, f64::max);
    let splits = candidates().find(|splits| filled(*splits) >= 0.9 * best);
    tiles.div_ceil(splits.expect("the best one is one of them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_card_and_no_more() {
        // One sequence over 8 heads cannot fill it: 1024 keys are 6 splits, 8192 are 15.
        assert_eq!(split_tiles(8, 16, 264), 3);
        assert_eq!(split_tiles(8, 128, 264), 9);
        // Four sequences: 8 splits of 16 tiles, 256 blocks; sixteen: two halves.
        assert_eq!(split_tiles(32, 128, 264), 16);
        assert_eq!(split_tiles(128, 128, 264), 64);
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
