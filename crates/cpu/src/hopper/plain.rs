//! The step in plain Rust, for any machine.

use super::{AStep, BStep, MOST, NO_TERM, STEP, for_steps};
use crate::micro::{TILE_N, Tile};

/// See [`super::product`].
///
/// # Safety
/// As there.
pub(super) unsafe fn product(t: Tile) {
    // SAFETY: rows of C and A are inside the block that the caller vouches for.
    unsafe {
        for_steps(&t, BStep::load, |c, a, b| {
            for row in 0..t.rows {
                step(&mut *c.byte_add(row * t.c_stride).cast(), &*a.byte_add(row * t.a_stride), b);
            }
        });
    }
}

// Lanes side by side read best by index, and compile to vectors.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn step(acc: &mut [f32; TILE_N], a: &AStep, b: &BStep) {
    let mut pairs = [[super::ZERO; 2]; TILE_N];
    for (i, exponents) in b.exponents.iter().enumerate() {
        for lane in 0..TILE_N {
            pairs[lane][0] = pairs[lane][0].max(a.exponents[2 * i] + exponents[lane][0]);
            pairs[lane][1] = pairs[lane][1].max(a.exponents[2 * i + 1] + exponents[lane][1]);
        }
    }
    let mut largest = [0i32; TILE_N];
    let mut outside = [0u32; TILE_N];
    for lane in 0..TILE_N {
        let terms = pairs[lane][0].max(pairs[lane][1]) as i32;
        let own = ((acc[lane].to_bits() >> 23 & 0xFF) as i32).max(1) - 127;
        let e = terms.max(own);
        // Where every term is zero, any exponent will do.
        let nothing = (terms < NO_TERM) & (acc[lane] == 0.0);
        outside[lane] = ((e.abs() > MOST) & !nothing) as u32;
        largest[lane] = e.clamp(-MOST, MOST);
    }
    let mut unit = [0f32; TILE_N];
    for lane in 0..TILE_N {
        unit[lane] = f32::from_bits(((127 + 25 - largest[lane]) as u32) << 23);
    }
    let mut sum = [0i32; TILE_N];
    for i in 0..STEP {
        for lane in 0..TILE_N {
            // 16 products below 4 * 2^25 - 2^18: their sum fits.
            sum[lane] = sum[lane].wrapping_add(truncate(a.values[i] * b.values[i][lane] * unit[lane]));
        }
    }
    let before = *acc;
    for lane in 0..TILE_N {
        let total = sum[lane] as f64 + truncate(acc[lane] * unit[lane]) as f64;
        // Truncated to 24 significant bits; the scaling back is exact.
        let truncated = f64::from_bits(total.to_bits() & !0x1FFF_FFFF) as f32;
        acc[lane] = truncated * f32::from_bits(((127 - 25 + largest[lane]) as u32) << 23);
    }
    let lanes = (0..TILE_N).fold(0, |all, lane| all | outside[lane] << lane);
    if lanes != 0 {
        let fast = *acc;
        *acc = before;
        b.define(lanes, acc, a);
        for lane in (0..TILE_N).filter(|lane| lanes >> lane & 1 == 0) {
            acc[lane] = fast[lane];
        }
    }
}

/// Toward zero. Lanes whose number does not fit are `outside`, and what comes out of them is not used.
#[inline(always)]
fn truncate(x: f32) -> i32 {
    x as i32
}
