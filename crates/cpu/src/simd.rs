//! Row functions of `ops::exact`, compiled once per instruction set. The bits are the same by construction:
//! the source is one, and vectorising it moves no operation.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use bitfast_ops::{RowSample, SampleRow, bf16, exact};

/// How fp32 becomes bf16: what [`exact::narrow`] defines, by whatever instructions.
pub(crate) trait Narrow {
    /// `dst[i] = bf16(src[i])`.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn narrow<const N: usize>(src: &[f32; N], dst: &mut [bf16; N]);
}

/// By the definition.
pub(crate) struct Defined;

impl Narrow for Defined {
    #[inline(always)]
    unsafe fn narrow<const N: usize>(src: &[f32; N], dst: &mut [bf16; N]) {
        exact::narrow(src, dst);
    }
}

/// By VCVTNEPS2BF16, a fifth of the instructions. It would flush denormals, so these are looked for; NaN and all else
/// are as defined, whatever MXCSR says.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512Bf16;

#[cfg(target_arch = "x86_64")]
impl Narrow for Avx512Bf16 {
    #[inline(always)]
    unsafe fn narrow<const N: usize>(src: &[f32; N], dst: &mut [bf16; N]) {
        const DENORMAL: i32 = 0x20;
        let (blocks, rest) = src.as_chunks::<16>();
        let (out, out_rest) = dst.as_chunks_mut::<16>();
        let mut denormal = 0;
        for (x, out) in blocks.iter().zip(out) {
            // SAFETY: sixteen numbers each, of any alignment; the caller's promise.
            unsafe {
                let x = _mm512_loadu_ps(x.as_ptr());
                denormal |= _mm512_fpclass_ps_mask::<DENORMAL>(x);
                out.as_mut_ptr().cast::<__m256bh>().write_unaligned(_mm512_cvtneps_pbh(x));
            }
        }
        exact::narrow(rest, out_rest);
        if denormal != 0 {
            narrow_rarely(src, dst);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[cold]
fn narrow_rarely(src: &[f32], dst: &mut [bf16]) {
    exact::narrow(src, dst);
}

/// Whether [`Avx512Bf16`] is for this machine.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// Defines `name(isa, args..)`, which runs `body` compiled for `isa`.
macro_rules! per_isa {
    ($( $(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block )+) => { $(
        $(#[$doc])*
        #[inline]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match isa {
                // SAFETY: a backend is only built for a path that `Isa::require` found available.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Amx | $crate::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    )+ };
}
pub(crate) use per_isa;

/// The same with a [`Narrow`] that suits the instruction set as a parameter of the body.
macro_rules! per_isa_narrow {
    ($( $(#[$doc:meta])* $vis:vis fn $name:ident<$n:ident>($($arg:ident: $ty:ty),* $(,)?) $body:block )+) => { $(
        $(#[$doc])*
        #[inline]
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) {
            use $crate::simd::Defined;
            #[inline(always)]
            fn body<$n: $crate::simd::Narrow>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            fn avx512_bf16($($arg: $ty),*) { body::<$crate::simd::Avx512Bf16>($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) { body::<Defined>($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) { body::<Defined>($($arg),*) }
            match isa {
                // SAFETY: a backend is only built for a path that `Isa::require` found available; the machine was asked
                // for the rest.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Amx | $crate::Isa::Avx512 if $crate::simd::has_avx512_bf16() => unsafe {
                    avx512_bf16($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Amx | $crate::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<Defined>($($arg),*),
            }
        }
    )+ };
}
pub(crate) use per_isa_narrow;

per_isa! {
    /// fp32 values of a bf16 row.
    pub(crate) fn widen(src: &[bf16], dst: &mut [f32]) { exact::widen(src, dst) }

    /// One head: the optional norm, then the rotation.
    pub(crate) fn norm_rope(head: &mut [bf16], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) {
        if let Some((w, eps)) = norm {
            exact::rms_norm_in_place(head, w, eps);
        }
        // The common sizes as constants: the loop becomes a few vectors.
        match cos.len() {
            32 if head.len() >= 64 => exact::rope(&mut head[..64], &cos[..32], &sin[..32]),
            64 if head.len() >= 128 => exact::rope(&mut head[..128], &cos[..64], &sin[..64]),
            _ => exact::rope(head, cos, sin),
        }
    }

    /// One sampling request; overwrites its logits.
    pub(crate) fn sample_row(logits: &mut [f32], row: &SampleRow<'_>) -> RowSample {
        bitfast_ops::sample_row(logits, row)
    }
}

per_isa_narrow! {
    /// One row of an RMSNorm, as [`exact::rms_norm`].
    pub(crate) fn rms_norm<N>(x: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
        scale_row::<N>(x, w, eps, out);
    }

    /// One row of residual add and RMSNorm, as [`exact::add_rms_norm`].
    pub(crate) fn add_rms_norm<N>(residual: &mut [bf16], delta: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
        assert_eq!(residual.len(), delta.len(), "add_rms_norm: lengths differ");
        let (blocks, rest) = residual.as_chunks_mut::<BLOCK>();
        let (deltas, delta_rest) = delta.as_chunks::<BLOCK>();
        for (r, d) in blocks.iter_mut().zip(deltas) {
            let mut sum = [0f32; BLOCK];
            for (sum, (r, d)) in sum.iter_mut().zip(r.iter().zip(d)) {
                *sum = exact::bf16_to_f32(*r) + exact::bf16_to_f32(*d);
            }
            // SAFETY: `body` is compiled with the instructions of `N`.
            unsafe { N::narrow(&sum, r) };
        }
        exact::add_residual(rest, delta_rest);
        scale_row::<N>(residual, w, eps, out);
    }
}

/// Elements that are rounded together: two registers of sums.
const BLOCK: usize = 32;

/// `out = bf16((x * r) * w)`, for functions that are compiled with the instructions of `N`.
#[inline(always)]
fn scale_row<N: Narrow>(x: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
    assert_eq!((x.len(), x.len()), (w.len(), out.len()), "rms_norm: lengths differ");
    let r = exact::rms_scale(x, eps);
    let (x, x_rest) = x.as_chunks::<BLOCK>();
    let (w, w_rest) = w.as_chunks::<BLOCK>();
    let (out, out_rest) = out.as_chunks_mut::<BLOCK>();
    for ((x, w), out) in x.iter().zip(w).zip(out) {
        let mut y = [0f32; BLOCK];
        for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(w)) {
            *y = scaled(*x, r, *w);
        }
        // SAFETY: the caller has the instructions.
        unsafe { N::narrow(&y, out) };
    }
    for ((x, w), out) in x_rest.iter().zip(w_rest).zip(out_rest) {
        *out = exact::f32_to_bf16(scaled(*x, r, *w));
    }
}

#[inline(always)]
fn scaled(x: bf16, r: f32, w: f32) -> f32 {
    (exact::bf16_to_f32(x) * r) * w
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Every upper half with lower halves around each way to round: denormals, infinities and NaN too.
    #[test]
    fn the_processor_rounds_as_defined() {
        if !has_avx512_bf16() || !is_x86_feature_detected!("avx512dq") {
            println!("SKIPPED: no AVX512_BF16 here");
            return;
        }
        let mut different_alone = false;
        for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
            for first in (0..=0xFFFFu32).step_by(40) {
                let src: [f32; 40] = std::array::from_fn(|i| f32::from_bits((first + i as u32) << 16 | low));
                let (mut got, mut expected) = ([bf16::ZERO; 40], [bf16::ZERO; 40]);
                // SAFETY: the machine has the instructions.
                unsafe { Avx512Bf16::narrow(&src, &mut got) };
                exact::narrow(&src, &mut expected);
                let bits = |x: [bf16; 40]| x.map(bf16::to_bits);
                assert_eq!(bits(got), bits(expected), "from {first:04x} {low:04x}");
                different_alone |= src.iter().zip(expected).any(|(s, e)| s.is_subnormal() && e != bf16::ZERO);
            }
        }
        assert!(different_alone, "no denormal that matters was among them");
    }
}
