use super::{Few, LinearSpec, Narrow, Output, SMEM_LIMIT, Variant, Wide};

/// The fastest variant for `tokens` rows on a card of `sms` multiprocessors; bits do not depend on it.
///
/// Thresholds and costs are of an H100 (LOG.md, "linears of 97 rows and more", "linears of 65 to 256 rows").
pub fn plan(spec: &LinearSpec, tokens: usize, sms: usize) -> Variant {
    // TMA wants rows of whole 16 bytes.
    if !spec.k.is_multiple_of(8) || !spec.n.is_multiple_of(8) {
        return Variant::Reference;
    }
    let too_few_narrow_tiles = spec.n.div_ceil(64) * 3 < sms;
    if tokens <= 8 && spec.order.leaves > 1 && too_few_narrow_tiles {
        let tiles = if spec.order.leaves > 4 { 1 } else { 2 };
        if let Some(few) = Few::fitting(spec, tokens, tiles, SMEM_LIMIT) {
            return Variant::Few(few);
        }
    }
    match tokens {
        0..=64 => Variant::Narrow(narrow(spec, tokens, sms)),
        // Short rows of few outputs are faster in many small tiles.
        65..=96 if !too_few_narrow_tiles || is_long(spec) => Variant::Narrow(narrow(spec, tokens, sms)),
        // Two tiles of 96 rows are less than two of 128.
        129..=192 if is_long(spec) => Variant::Narrow(narrow(spec, tokens, sms)),
        _ => Variant::Wide(wide(spec, tokens, sms)),
    }
}

/// Whether a tile's leaves are worth more than one block.
fn is_long(spec: &LinearSpec) -> bool {
    spec.order.leaves > 1 && spec.k >= 4096
}

/// One tile over the tokens, so that weights are read once; of more than 96 tokens two.
fn narrow(spec: &LinearSpec, tokens: usize, sms: usize) -> Narrow {
    let tile = [8, 16, 32, 48, 64].into_iter().find(|t| tokens <= *t).unwrap_or(96);
    let tiles = spec.n.div_ceil(64);
    // With a block for each multiprocessor a deep ring; with more, two blocks share one, or larger tiles save activations.
    let (groups, stages, min_ctas) = match (tile, tiles > sms) {
        (8 | 16, false) => (1, 20, 1),
        (32, false) => (1, 16, 1),
        (48, _) => (1, 12, 1),
        (64, false) => (1, 11, 1),
        (_, false) => (1, 9, 1),
        (8 | 16, true) => (1, 10, 2),
        (32, true) => (1, 8, 2),
        (64, true) => (1, 5, 2),
        (_, true) => (2, 6, 1),
    };
    // Few tiles of long rows: the leaves of each are shared by two blocks. Of the longest rows also where one block each would take half the
    // multiprocessors: faster alone, but behind another layer slower (LOG.md, "a decode step taken apart").
    let shared = tiles * 3 < sms || (tile <= 64 && tiles * 2 <= sms && spec.k >= 8192);
    let ksplit = if shared && is_long(spec) { 2 } else { 1 };
    let plan = Narrow { tokens: tile, groups, stages, ksplit, min_ctas };
    // A shared fold keeps its leaves in shared memory: fewer ring slots.
    let with = |stages| Narrow { stages, ..plan };
    (1..=stages).rev().map(with).find(|p| p.smem_bytes(spec) <= SMEM_LIMIT).unwrap_or(with(1))
}

/// The tile whose waves over the card take least time.
fn wide(spec: &LinearSpec, tokens: usize, sms: usize) -> Wide {
    // (outputs of a tile, its time against the largest's).
    const TILES: [(usize, usize); 8] =
        [(32, 34), (64, 37), (96, 45), (128, 56), (160, 66), (192, 79), (224, 89), (256, 100)];
    let token_tiles = tokens.div_ceil(Wide::TOKENS);
    let cost = |tile: usize, time: usize| (token_tiles * spec.n.div_ceil(tile)).div_ceil(sms) * time;
    let (tile, _) = TILES
        .into_iter()
        // The smallest tiles read the rows most often.
        .filter(|(tile, _)| *tile > 32 || token_tiles == 1 || token_tiles * spec.n.div_ceil(32) * 2 <= sms)
        .min_by_key(|(tile, time)| (cost(*tile, *time), usize::MAX - tile))
        .expect("eight tiles");
    // Two blocks share each weight tile where weights come from memory rather than the second-level cache.
    let streams = spec.n * spec.k * 2 >= 100_000_000;
    let cluster = if streams && token_tiles.is_multiple_of(2) { 2 } else { 1 };
    let out_cols = if spec.output == Output::SiluMul && !tile.is_multiple_of(64) { 16 } else { 32 };
    let regs = [(tile / 2).min(104); 3];
    let with = |stages| Wide { tile, stages, cluster, raster: 16 / cluster, out_cols, regs };
    let most = if tile == 32 { 10 } else { 8 };
    (1..=most).rev().map(with).find(|p| p.smem_bytes(spec) <= SMEM_LIMIT).unwrap_or(with(1))
}

#[cfg(test)]
mod tests {
    use bitfast_ops::LinearKind;

    use super::*;

    const TOKENS: [usize; 14] = [1, 2, 8, 9, 16, 33, 64, 65, 128, 129, 256, 1000, 4096, 16384];

    #[test]
    fn every_plan_fits_the_card() {
        for (n, k) in
            [(64, 64), (576, 1536), (960, 576), (2048, 2048), (2048, 6144), (4096, 14336), (28672, 4096)]
        {
            for kind in [LinearKind::Column, LinearKind::GateUp, LinearKind::Row, LinearKind::Vocab] {
                let spec = LinearSpec::new(kind, n, k);
                let spec =
                    if kind == LinearKind::GateUp { spec.fused().expect("whole eights") } else { spec };
                for tokens in TOKENS {
                    let variant = plan(&spec, tokens, 132);
                    assert!(variant.fits(&spec), "{variant:?} for {tokens} tokens of {spec:?}");
                }
            }
        }
    }

    #[test]
    fn tiles_fill_whole_waves() {
        let tile = |n, tokens| match plan(&LinearSpec::new(LinearKind::GateUp, n, 4096), tokens, 132) {
            Variant::Wide(wide) => (wide.tile, wide.cluster),
            other => panic!("{other:?}"),
        };
        // 4 x 128 tiles are four waves of 132 less sixteen; tiles of 256 would leave most of the fourth empty.
        assert_eq!(tile(28672, 512), (224, 2));
        assert_eq!(tile(28672, 8192), (256, 2));
        assert_eq!(tile(6144, 512), (192, 1));
    }

    #[test]
    fn rows_that_tma_cannot_load_go_to_the_reference() {
        assert_eq!(plan(&LinearSpec::new(LinearKind::Column, 64, 100), 5, 132), Variant::Reference);
        assert_eq!(plan(&LinearSpec::new(LinearKind::Column, 100, 64), 5, 132), Variant::Reference);
    }

    #[test]
    fn many_tokens_take_large_tiles_and_few_take_small_ones() {
        let spec = LinearSpec::new(LinearKind::Column, 4096, 4096);
        assert!(matches!(plan(&spec, 8192, 132), Variant::Wide(Wide { tile: 256, .. })));
        assert!(matches!(plan(&spec, 256, 132), Variant::Wide(Wide { tile: 64, .. })));
        assert!(matches!(plan(&spec, 128, 132), Variant::Wide(Wide { tile: 32, .. })));
        assert!(matches!(plan(&spec, 8, 132), Variant::Narrow(Narrow { tokens: 8, .. })));
        let row = |k| LinearSpec::new(LinearKind::Row, 2048, k);
        assert!(matches!(plan(&row(6144), 8, 132), Variant::Few(_)));
        assert!(matches!(plan(&row(6144), 96, 132), Variant::Narrow(Narrow { tokens: 96, ksplit: 2, .. })));
        assert!(matches!(plan(&row(6144), 192, 132), Variant::Narrow(Narrow { tokens: 96, .. })));
        assert!(matches!(plan(&row(6144), 193, 132), Variant::Wide(Wide { tile: 64, .. })));
        assert!(matches!(plan(&row(2048), 96, 132), Variant::Wide(Wide { tile: 32, .. })));
        assert!(matches!(plan(&row(2048), 129, 132), Variant::Wide(Wide { tile: 64, .. })));
    }

    #[test]
    fn the_longest_rows_are_shared_by_two_blocks() {
        let row = |n, k, tokens| plan(&LinearSpec::new(LinearKind::Row, n, k), tokens, 132);
        for tokens in [1, 64] {
            assert!(matches!(row(4096, 14336, tokens), Variant::Narrow(Narrow { ksplit: 2, .. })));
            assert!(matches!(row(4096, 4096, tokens), Variant::Narrow(Narrow { ksplit: 1, .. })));
        }
        assert!(matches!(row(8192, 14336, 1), Variant::Narrow(Narrow { ksplit: 1, .. })));
    }
}
