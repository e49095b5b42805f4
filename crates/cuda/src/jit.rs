//! NVRTC at run time: kernel source and macros -> cubin for sm_90a, kept on disk.
//!
//! Always a cubin, never PTX: the driver would compile PTX anew, and bits could move with its version. The cache key
//! is a hash of everything that the bytes depend on: source, flags, architecture, NVRTC version.

use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use crate::cache::Cache;
use crate::driver::{Device, NvrtcApi, OLDEST};
use crate::error::loader_words;
use crate::{CudaError, Result};

/// The only architecture that kernels are run on so far.
pub const ARCH: &str = "sm_90a";

/// Shared memory that a block may use there, bytes.
pub(crate) const SMEM_LIMIT: usize = 232_448;

const PRELUDE: &str = include_str!("../kernels/prelude.cuh");
const FLAGS: [&str; 3] = ["--std=c++17", "-default-device", "-fmad=false"];

/// A kernel to compile: one `.cu` file and the macros that specialise it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelSource {
    /// Its name, for errors and cache files.
    pub name: &'static str,
    /// Files it is made of, in order.
    pub parts: &'static [&'static str],
    /// Macros, in order.
    pub defines: Vec<(&'static str, i64)>,
    /// `Some(n)`: provide `wgmma_tb`, one m64n(n)k16 bf16 step.
    pub wgmma_n: Option<usize>,
}

impl KernelSource {
    /// What NVRTC is given; `common` macros come first.
    fn program(&self, common: &[(&'static str, i64)]) -> String {
        let mut program = String::from(PRELUDE);
        if let Some(n) = self.wgmma_n {
            program += &wgmma_wrapper(n);
        }
        for (name, value) in common.iter().chain(&self.defines) {
            writeln!(program, "#define {name} {value}").expect("a String grows");
        }
        for part in self.parts {
            // Errors name the part's own lines.
            writeln!(program, "#line 1 \"{}\"", self.name).expect("a String grows");
            program += part;
        }
        program
    }

    /// Name and macros, for errors and reports.
    pub fn label(&self) -> String {
        let mut label = self.name.to_owned();
        for (name, value) in &self.defines {
            write!(label, " {name}={value}").expect("a String grows");
        }
        label
    }
}

/// The compiler, loaded when first needed.
pub struct Jit {
    nvrtc: NvrtcApi,
    version: (i32, i32),
    cache: Option<Cache>,
    /// Macros of every kernel.
    common: Vec<(&'static str, i64)>,
    /// The first failure to keep a cubin.
    unkept: Mutex<Option<CudaError>>,
    /// Compiled ahead of use; never iterated.
    ready: Mutex<HashMap<KernelSource, Vec<u8>>>,
}

impl Jit {
    /// Loads NVRTC, from `library` or else by its usual names, and keeps cubins under `cache` if given.
    ///
    /// # Errors
    /// NVRTC is absent or too old.
    pub fn new(library: Option<&Path>, cache: Option<PathBuf>) -> Result<Self> {
        let nvrtc = NvrtcApi::new(load(library)?)
            .map_err(|symbol| CudaError::MissingSymbol { library: "NVRTC", symbol })?;
        let mut version = (0, 0);
        // SAFETY: writes two ints.
        unsafe { (nvrtc.version)(&raw mut version.0, &raw mut version.1) };
        if version < OLDEST {
            return Err(CudaError::TooOld { library: "NVRTC", major: version.0, minor: version.1 });
        }
        let cache = cache.map(Cache::new);
        let (unkept, ready) = Default::default();
        Ok(Self { nvrtc, version, cache, common: Vec::new(), unkept, ready })
    }

    /// Compiles every kernel with this macro too: for tools that watch kernels.
    #[must_use]
    pub fn define(mut self, name: &'static str, value: i64) -> Self {
        self.common.push((name, value));
        self
    }

    /// Refuses a device whose driver does not run this compiler's kernels.
    ///
    /// # Errors
    /// [`CudaError::NewerCompiler`].
    pub fn require_driver(&self, device: &Device) -> Result<()> {
        let (compiler, driver) = (self.version.0, device.version().0);
        if compiler > driver { Err(CudaError::NewerCompiler { compiler, driver }) } else { Ok(()) }
    }

    /// Why compiled kernels are not kept, if one could not be; told once.
    pub fn unkept(&self) -> Option<CudaError> {
        self.unkept.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// NVRTC's (major, minor).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// An address inside NVRTC: tells where it was found.
    pub(crate) fn address(&self) -> *const std::ffi::c_void {
        self.nvrtc.version as *const std::ffi::c_void
    }

    /// Compiles those of `sources` that are not ready (or finds them in the cache), each once, on `threads` threads, so that
    /// [`cubin`](Self::cubin) has them at hand.
    ///
    /// # Errors
    /// One that [`cubin`](Self::cubin) would give.
    pub fn prepare(&self, sources: &[KernelSource], threads: usize) -> Result<()> {
        let mut missing: Vec<&KernelSource> = Vec::new();
        {
            let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            for source in sources {
                if !ready.contains_key(source) && !missing.contains(&source) {
                    missing.push(source);
                }
            }
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(&source) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                let cubin = self.find(source)?;
                self.ready.lock().unwrap_or_else(PoisonError::into_inner).insert(source.clone(), cubin);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let helpers: Vec<_> =
                (1..threads.clamp(1, missing.len().max(1))).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let theirs = helpers.into_iter().map(|h| h.join().expect("the compiler does not panic"));
            theirs.fold(mine, Result::and)
        })
    }

    /// The cubin of `source`: prepared, from the cache or compiled now.
    ///
    /// # Errors
    /// A compile error (a bug).
    pub fn cubin(&self, source: &KernelSource) -> Result<Vec<u8>> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).remove(source);
        ready.map_or_else(|| self.find(source), Ok)
    }

    fn find(&self, source: &KernelSource) -> Result<Vec<u8>> {
        let program = source.program(&self.common);
        let compile = || self.compile(ARCH, source, &program, &[]).map(|(cubin, _)| cubin);
        let Some(cache) = &self.cache else { return compile() };
        let name = format!("{}-{}.cubin", source.name, self.key(&program));
        if let Some(cubin) = cache.read(&name) {
            return Ok(cubin);
        }
        let cubin = compile()?;
        if let Err(source) = cache.write(&name, &cubin) {
            let path = cache.path(&name).display().to_string();
            let mut unkept = self.unkept.lock().unwrap_or_else(PoisonError::into_inner);
            unkept.get_or_insert(CudaError::Cache { path, source });
        }
        Ok(cubin)
    }

    /// Compiles for `arch` (such as [`ARCH`]) without the cache and returns the assembler's report (registers, spills)
    /// beside the cubin.
    ///
    /// # Errors
    /// A compile error.
    pub fn report(&self, arch: &str, source: &KernelSource) -> Result<(Vec<u8>, String)> {
        self.compile(arch, source, &source.program(&self.common), &["--ptxas-options=-v"])
    }

    fn key(&self, program: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [program, &FLAGS.join(" "), ARCH, &format!("{:?}", self.version)] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex()[..32].to_owned()
    }

    fn compile(
        &self,
        arch: &str,
        source: &KernelSource,
        program: &str,
        extra: &[&str],
    ) -> Result<(Vec<u8>, String)> {
        let arch = format!("--gpu-architecture={arch}");
        let text = CString::new(program).expect("kernel sources have no NUL");
        let name = CString::new(format!("{}.cu", source.name)).expect("kernel names have no NUL");
        let options: Vec<CString> = [&*arch]
            .iter()
            .chain(&FLAGS)
            .chain(extra)
            .map(|o| CString::new(*o).expect("options have no NUL"))
            .collect();
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut handle = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: terminated strings, live over the calls; sizes come from the compiler itself.
        unsafe {
            let created = (self.nvrtc.create)(&raw mut handle, text.as_ptr(), name.as_ptr(), 0, none, none);
            if created != 0 {
                let log = format!("nvrtcCreateProgram: status {created}");
                return Err(CudaError::Compile { kernel: source.label(), log });
            }
            let status = (self.nvrtc.compile)(handle, options.len() as i32, options.as_ptr());
            let mut size = 0;
            (self.nvrtc.log_size)(handle, &raw mut size);
            let mut log = vec![0u8; size];
            (self.nvrtc.log)(handle, log.as_mut_ptr().cast());
            let mut log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            if status != 0 {
                write!(log, "nvrtcCompileProgram: status {status}").expect("a String grows");
            }
            let mut cubin = Vec::new();
            if status == 0 {
                (self.nvrtc.cubin_size)(handle, &raw mut size);
                cubin.resize(size, 0);
                (self.nvrtc.cubin)(handle, cubin.as_mut_ptr().cast());
            }
            (self.nvrtc.destroy)(&raw mut handle);
            if cubin.is_empty() {
                return Err(CudaError::Compile { kernel: source.label(), log });
            }
            Ok((cubin, log))
        }
    }
}

fn load(library: Option<&Path>) -> Result<Library> {
    if let Some(path) = library {
        // NVRTC looks its builtins up by bare name: load them first, from beside it.
        let builtins =
            path.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
        for entry in builtins {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("libnvrtc-builtins.so") {
                // SAFETY: a vendor library without initialisers of note; kept loaded for good.
                if let Ok(lib) = unsafe { Library::new(entry.path()) } {
                    std::mem::forget(lib);
                }
            }
        }
        // SAFETY: as above.
        return unsafe { Library::new(path) }.map_err(|e| CudaError::NoNvrtc(loader_words(&e)));
    }
    let mut last = String::new();
    for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"] {
        // SAFETY: as above.
        match unsafe { Library::new(name) } {
            Ok(lib) => return Ok(lib),
            Err(e) => last = loader_words(&e),
        }
    }
    Err(CudaError::NoNvrtc(last))
}

/// `wgmma_tb(d, a, b, scale_d)`: d = a b + (scale_d ? d : 0), one bf16 step of 16 k, d in `n / 2` registers a thread.
fn wgmma_wrapper(n: usize) -> String {
    assert!(n.is_multiple_of(8) && (8..=256).contains(&n), "wgmma has no n = {n}");
    let r = n / 2;
    let list = |f: &dyn Fn(usize) -> String| (0..r).map(f).collect::<Vec<_>>().join(", ");
    let (regs, outs) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")));
    format!(
        "__device__ __forceinline__ void wgmma_tb(float (&d)[{r}], u64 a, u64 b, int scale_d) {{\n\
         asm volatile(\"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{}, 0;\\n\
         wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{regs}}}, %{r}, %{}, p, 1, 1, 0, 0;\\n}}\" : {outs} \
         : \"l\"(a), \"l\"(b), \"r\"(scale_d));\n}}\n",
        r + 2,
        r + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(value: i64) -> KernelSource {
        KernelSource { name: "k", parts: &["int x = A;\n"], defines: vec![("A", value)], wgmma_n: Some(64) }
    }

    #[test]
    fn a_program_is_the_prelude_the_macros_and_the_parts() {
        let program = source(3).program(&[("TOOL", 1)]);
        let at = |text: &str| program.find(text).unwrap_or_else(|| panic!("no {text:?}"));
        assert!(at("typedef unsigned char u8;") < at("wgmma_tb(float (&d)[32]"));
        assert!(at("#define TOOL 1") < at("#define A 3"));
        assert!(at("#define A 3") < at("int x = A;"));
        assert_ne!(source(3).program(&[]), source(4).program(&[]));
        assert_ne!(source(3).program(&[]), program);
        assert_eq!(source(3).label(), "k A=3");
    }

    /// Contraction and approximations are other bits, which only a card would show.
    #[test]
    fn no_flag_changes_arithmetic() {
        assert!(FLAGS.contains(&"-fmad=false"));
        let fast = |flag: &&&str| ["fast", "ftz", "prec", "approx"].iter().any(|word| flag.contains(word));
        assert_eq!(FLAGS.iter().find(fast), None);
    }

    #[test]
    fn a_missing_compiler_is_a_typed_error() {
        let Err(error) = Jit::new(Some(Path::new("/nonexistent/libnvrtc.so")), None) else {
            panic!("loaded a library that is not there")
        };
        assert!(matches!(error, CudaError::NoNvrtc(_)), "{error}");
    }
}
