/// What the CUDA backend can fail with.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// libcuda could not be loaded: no NVIDIA driver on this machine.
    #[error("no NVIDIA driver: {0}")]
    NoDriver(String),
    /// The driver or NVRTC lacks a function that Bitfast needs.
    #[error("{library} is too old: it has no {symbol} (CUDA 12.4 or newer is needed)")]
    MissingSymbol {
        /// Which library.
        library: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// The driver or NVRTC is older than what Bitfast was written for.
    #[error("{library} is of CUDA {major}.{minor}; 12.4 or newer is needed")]
    TooOld {
        /// Which library.
        library: &'static str,
        /// Its version.
        major: i32,
        /// Its version.
        minor: i32,
    },
    /// The compiler's kernels are not for this driver.
    #[error(
        "NVRTC is of CUDA {compiler}, the driver of CUDA {driver}, which runs no kernels of a newer major version: update the driver, or name \
         an NVRTC of CUDA {driver} in BITFAST_NVRTC"
    )]
    NewerCompiler {
        /// NVRTC's major version.
        compiler: i32,
        /// The driver's.
        driver: i32,
    },
    /// There is a driver but no such device.
    #[error("no CUDA device {ordinal}: the driver sees {count}")]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is of an architecture without kernels or without a proven numerics class.
    #[error("{name} has compute capability {major}.{minor}; Bitfast's hopper class needs 9.0 (H100, H200)")]
    Architecture {
        /// Device name.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// The device does not compute what the law assumes.
    #[error("{name} does not compute what the hopper class is defined by ({finding}); it must not serve")]
    Numerics {
        /// Device name.
        name: String,
        /// What differed.
        finding: String,
    },
    /// A driver call failed.
    #[error("{call} failed: {name} ({message})")]
    Call {
        /// The driver function.
        call: &'static str,
        /// The error's name.
        name: String,
        /// The driver's words.
        message: String,
    },
    /// NVRTC could not be loaded.
    #[error("NVRTC not found ({0}); install the CUDA runtime compiler (libnvrtc) of CUDA 12.4 or newer")]
    NoNvrtc(String),
    /// cuBLASLt, which only the unconstrained mode needs, could not be loaded.
    #[error(
        "cuBLASLt not found ({0}); the unconstrained mode multiplies with libcublasLt of CUDA 12 or 13: install it (the \
         wheel nvidia-cublas has it too) or name its file in BITFAST_CUBLASLT"
    )]
    NoCublasLt(String),
    /// A kernel did not compile: a bug.
    #[error("kernel {kernel} did not compile:\n{log}")]
    Compile {
        /// Kernel name and its macros.
        kernel: String,
        /// The compiler's words.
        log: String,
    },
    /// A compiled kernel could not be kept; it is compiled again at the next start.
    #[error("compiled kernels are not kept: {path}: {source}")]
    Cache {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Result of this crate.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// What the loader says of a library that it could not load, and which.
pub(crate) fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |words| words.to_string())
}
