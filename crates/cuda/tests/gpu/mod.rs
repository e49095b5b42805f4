//! What GPU tests share: opening the card, inputs, transfers.
#![allow(dead_code, reason = "every test binary compiles this and uses its own part of it")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitfast_cuda::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_ops::bf16;

pub struct Gpu {
    pub device: Device,
    pub stream: Stream,
    pub jit: Jit,
    /// Bytes of NaN behind an input: what reads past its end and uses it shows. None in tests that run under memcheck, which sees the reading.
    pub behind: usize,
}

/// The card; panics where there is none. Under racecheck `BITFAST_RACECHECK` has kernels order their lanes in a way that it understands.
pub fn gpu() -> Gpu {
    let device = Device::open(0).unwrap_or_else(|e| panic!("this test needs a GPU: {e}"));
    let stream = device.stream().expect("a stream");
    let mut jit = Jit::new(None, Some(cache())).expect("NVRTC");
    if std::env::var_os("BITFAST_RACECHECK").is_some() {
        jit = jit.define("RACECHECK", 1);
    }
    Gpu { device, stream, jit, behind: 1 << 20 }
}

/// [`gpu`] for tests that run under compute-sanitizer: inputs end where their buffers do.
pub fn exact_gpu() -> Gpu {
    Gpu { behind: 0, ..gpu() }
}

/// A word that looks random (SplitMix64).
pub fn word(i: u64, salt: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

/// Uniform in [-scale, scale), rounded to bf16.
pub fn uniform(n: usize, salt: u64, scale: f32) -> Vec<bf16> {
    let value = |i| ((word(i, salt) >> 40) as f32 / 8_388_608.0 - 1.0) * scale;
    (0..n as u64).map(|i| bf16::from_f32(value(i))).collect()
}

/// Both signs, exponents from 2^`low` over `span` binary orders of magnitude.
pub fn wide(n: usize, salt: u64, low: i32, span: u64) -> Vec<bf16> {
    (0..n as u64)
        .map(|i| {
            let w = word(i, salt);
            let exponent = (127 + low) as u64 + (w >> 16) % span;
            bf16::from_bits((w & 0x807F | exponent << 7) as u16)
        })
        .collect()
}

pub fn bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect()
}

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Runs `task(0..count)` on every core.
pub fn parallel(count: usize, task: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(4, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    task(i);
                }
            });
        }
    });
}

impl Gpu {
    pub fn upload(&self, data: &[u8]) -> Buffer {
        let buffer = self.device.alloc(data.len()).expect("memory");
        buffer.write(&self.stream, 0, data).expect("upload");
        buffer
    }

    /// `data`, with NaN behind it.
    pub fn input(&self, data: &[u8]) -> Buffer {
        let buffer = self.poisoned(data.len() + self.behind);
        buffer.write(&self.stream, 0, data).expect("upload");
        buffer
    }

    /// `bytes` bytes of 0xFF: NaN as bf16 and as fp32.
    pub fn poisoned(&self, bytes: usize) -> Buffer {
        let buffer = self.device.alloc(bytes).expect("memory");
        buffer.fill(&self.stream, 0xFF).expect("poison");
        buffer
    }

    pub fn read(&self, buffer: &Buffer) -> Vec<u8> {
        let mut out = vec![0; buffer.len()];
        buffer.read(&self.stream, 0, &mut out).expect("a kernel that ran");
        out
    }

    /// Compiles in parallel into the cache.
    pub fn prepare(&self, sources: &[KernelSource]) {
        let jit = &self.jit;
        parallel(sources.len(), |i| {
            jit.cubin(&sources[i]).expect("a kernel");
        });
    }

    /// What is wrong with `got`, if anything: it must start with `expected`, bit for bit, and be untouched poison behind it.
    pub fn difference(&self, got: &Buffer, expected: &[u8]) -> Option<String> {
        let got = self.read(got);
        let (got, rest) = got.split_at(expected.len());
        if let Some(first) = got.iter().zip(expected).position(|(a, b)| a != b) {
            let differing = got.iter().zip(expected).filter(|(a, b)| a != b).count();
            return Some(format!("{differing} of {} bytes differ, the first is {first}", expected.len()));
        }
        (!rest.iter().all(|b| *b == 0xFF)).then(|| "wrote past its rows".to_owned())
    }

    /// Asserts that `got` starts with `expected`, bit for bit, and is untouched poison behind it.
    pub fn assert_equal(&self, what: &str, got: &Buffer, expected: &[u8]) {
        if let Some(difference) = self.difference(got, expected) {
            panic!("{what}: {difference}");
        }
    }
}

/// Counts elements that differ, and elements of the first matrix that are still poison.
const COMPARE: &str = r#"
template <class T> __device__ void compare_as(const T* a, const T* b, u64 n, u64 written, u32* found) {
    u32 differ = 0, poison = 0;
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)
        differ += a[i] != b[i], poison += i < written && a[i] == (T)~0u;
    if (differ) atomicAdd(found, differ);
    if (poison) atomicAdd(found + 1, poison);
}
extern "C" __global__ void compare(const void* a, const void* b, u64 n, u64 written, int wide, u32* found) {
    if (wide) compare_as((const u32*)a, (const u32*)b, n, written, found);
    else compare_as((const unsigned short*)a, (const unsigned short*)b, n, written, found);
}
"#;

/// Compares outputs where they lie.
pub struct Compare {
    kernel: Kernel,
    found: Buffer,
}

impl Compare {
    pub fn new(gpu: &Gpu) -> Self {
        let source = KernelSource { name: "compare", parts: &[COMPARE], defines: vec![], wgmma_n: None };
        let cubin = gpu.jit.cubin(&source).expect("a kernel");
        let kernel = gpu.device.kernel(&cubin, "compare", 0).expect("a kernel");
        Self { kernel, found: gpu.device.alloc(8).expect("memory") }
    }

    /// Elements (of `width` bytes, 2 or 4) of `got` that differ from `expected`, and those of the first `written` that nobody wrote.
    pub fn run(&self, gpu: &Gpu, got: &Buffer, expected: &Buffer, width: usize, written: usize) -> [u32; 2] {
        assert_eq!(got.len(), expected.len());
        self.found.fill(&gpu.stream, 0).expect("zeros");
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let count = got.len() / width;
        let wide = i32::from(width == 4);
        let [a, b, n, written, found] =
            [got.ptr(), expected.ptr(), count as u64, written as u64, self.found.ptr()].map(Arg::Ptr);
        // SAFETY: the kernel reads `count` elements of both buffers and adds to two words.
        unsafe { self.kernel.launch(&gpu.stream, launch, &[a, b, n, written, Arg::I32(wide), found]) }
            .expect("launch");
        let words = gpu.read(&self.found);
        [0, 4].map(|at| u32::from_le_bytes(words[at..at + 4].try_into().expect("4 bytes")))
    }
}

/// Compiles `sources` with NVRTC, GPU or not, into the cache that the other tests use.
pub fn compile(sources: &[KernelSource]) {
    let jit = Jit::new(None, Some(cache())).unwrap_or_else(|e| panic!("this test needs NVRTC: {e}"));
    parallel(sources.len(), |i| {
        jit.cubin(&sources[i]).expect("a kernel");
    });
    println!("{} kernels compile", sources.len());
}

fn cache() -> PathBuf {
    std::env::temp_dir().join("bitfast-twin")
}
