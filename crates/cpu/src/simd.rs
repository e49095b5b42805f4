//! Row functions of `ops::exact`, compiled once per instruction set. The bits are the same by construction:
//! the source is one, and vectorising it moves no operation.

use bitfast_ops::{RowSample, SampleRow, bf16, exact};

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

per_isa! {
    /// fp32 values of a bf16 row.
    pub(crate) fn widen(src: &[bf16], dst: &mut [f32]) { exact::widen(src, dst) }

    /// One row of an RMSNorm.
    pub(crate) fn rms_norm(x: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) { exact::rms_norm(x, w, eps, out) }

    /// One row of residual add and RMSNorm.
    pub(crate) fn add_rms_norm(residual: &mut [bf16], delta: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
        exact::add_rms_norm(residual, delta, w, eps, out)
    }

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
