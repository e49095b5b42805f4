use std::fmt;
use std::str::FromStr;

/// An instruction-set path of the backend. All of them compute the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// No vector instructions asked for: any machine; slow.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AMX-TILE and AMX-BF16 for the matrix products, AVX-512 for the rest.
    Amx,
}

/// An instruction-set path was asked for that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No path has this name.
    #[error("unknown CPU instruction set {0:?}: expected amx, avx512, avx2 or scalar")]
    Unknown(String),
    /// This machine (or its kernel) lacks it.
    #[error("the instruction set {wanted} was asked for, but this machine's best is {best}")]
    Unavailable {
        /// What was asked for.
        wanted: Isa,
        /// What [`Isa::detect`] finds.
        best: Isa,
    },
}

impl Isa {
    /// Every path, the fastest first.
    pub const ALL: [Isa; 4] = [Isa::Amx, Isa::Avx512, Isa::Avx2, Isa::Scalar];

    /// The fastest path that this machine and its kernel allow.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Isa::Scalar)
    }

    /// Whether this path runs here. For [`Isa::Amx`] the first call asks the kernel for the tile state.
    #[cfg(target_arch = "x86_64")]
    pub fn available(self) -> bool {
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("fma")
        };
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Isa::Avx512 => avx512(),
            Isa::Amx => avx512() && crate::micro::amx::available(),
        }
    }

    /// Whether this path runs here.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn available(self) -> bool {
        self == Isa::Scalar
    }

    /// `self` where it runs; else the typed error.
    pub fn require(self) -> Result<Isa, IsaError> {
        if self.available() {
            Ok(self)
        } else {
            Err(IsaError::Unavailable { wanted: self, best: Isa::detect() })
        }
    }

    /// The name that [`Isa::from_str`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// The path called `name`, whether or not it runs here.
    pub fn parse(name: &str) -> Result<Isa, IsaError> {
        let lower = name.trim().to_ascii_lowercase();
        Isa::ALL.into_iter().find(|isa| isa.name() == lower).ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Isa, IsaError> {
        Isa::parse(name)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_strangers_are_named() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().to_uppercase().parse(), Ok(isa));
        }
        let error = Isa::parse("sse9").unwrap_err();
        assert!(error.to_string().contains("sse9"), "{error}");
    }

    #[test]
    fn an_unavailable_path_is_a_typed_error() {
        for isa in Isa::ALL {
            match isa.require() {
                Ok(got) => assert_eq!(got, isa),
                Err(e) => assert_eq!(e, IsaError::Unavailable { wanted: isa, best: Isa::detect() }),
            }
        }
        assert_eq!(Isa::Scalar.require(), Ok(Isa::Scalar));
    }
}
