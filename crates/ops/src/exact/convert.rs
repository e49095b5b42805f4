use half::bf16;

/// The value of a bf16, exactly.
#[inline(always)]
pub fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// Round to nearest even. Denormals are rounded like any other value (so VCVTNEPS2BF16, which flushes them, is
/// not this function); a NaN keeps its sign and upper payload and becomes quiet.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let quieted = bits | 0x0040_0000;
    let chosen = if bits & 0x7FFF_FFFF > 0x7F80_0000 { quieted } else { rounded };
    bf16::from_bits((chosen >> 16) as u16)
}

/// `dst[i] = src[i]`, exactly.
#[inline(always)]
pub fn widen(src: &[bf16], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len(), "widen: lengths differ");
    for (d, s) in dst.iter_mut().zip(src) {
        *d = bf16_to_f32(*s);
    }
}

/// `dst[i] = bf16(src[i])`, by [`f32_to_bf16`].
#[inline(always)]
pub fn narrow(src: &[f32], dst: &mut [bf16]) {
    assert_eq!(src.len(), dst.len(), "narrow: lengths differ");
    for (d, s) in dst.iter_mut().zip(src) {
        *d = f32_to_bf16(*s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `half` implements the same rounding by other means.
    #[test]
    fn rounding_matches_half_on_borders_and_a_grid() {
        let mut seen_tie = false;
        for high in 0..=0xFFFFu32 {
            for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(high << 16 | low);
                let (ours, theirs) = (f32_to_bf16(x), bf16::from_f32(x));
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{:08x}", x.to_bits());
                seen_tie |= low == 0x8000 && ours.to_bits() as u32 == high;
            }
        }
        assert!(seen_tie, "no tie went to the even side");
    }

    #[test]
    fn slices_round_trip() {
        let values: Vec<bf16> = (0..=0xFFFFu16).map(bf16::from_bits).filter(|x| !x.is_nan()).collect();
        let (mut wide, mut back) = (vec![0.0; values.len()], vec![bf16::ZERO; values.len()]);
        widen(&values, &mut wide);
        narrow(&wide, &mut back);
        assert_eq!(values, back);
    }
}
