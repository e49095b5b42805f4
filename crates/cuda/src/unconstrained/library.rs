use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;

use crate::driver::{CublasLtApi, Device, Handle};
use crate::error::loader_words;
use crate::jit::Jit;
use crate::{CudaError, Result};

/// Names under which the loader may know it, newest first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// Where CUDA's own installer puts it.
const INSTALLED: &str = "/usr/local/cuda/lib64/libcublasLt.so";

/// cuBLASLt on one device; cheap to clone.
#[derive(Clone)]
pub struct CublasLt {
    inner: Arc<Inner>,
}

struct Inner {
    /// Never unloaded: it keeps state of its own for the device.
    api: ManuallyDrop<CublasLtApi>,
    handle: Handle,
    version: [c_int; 3],
    device: Device,
}

// SAFETY: the library's calls are thread-safe; the handle is only passed to them.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl CublasLt {
    /// Loads the library: `named`, or else from where the loader finds it, beside NVRTC (pip keeps both in one folder, or in `cublas/lib` next to
    /// NVRTC's), or CUDA's own folder.
    ///
    /// # Errors
    /// It is not there, lacks a function, or does not work with the driver.
    pub fn open(device: &Device, jit: &Jit, named: Option<&Path>) -> Result<Self> {
        let api = load(named, file_of(jit.address()).as_deref())?;
        device.bind()?;
        let (mut version, mut handle) = ([0; 3], std::ptr::null_mut());
        for (which, value) in version.iter_mut().enumerate() {
            // SAFETY: writes one int.
            check("cublasLtGetProperty", unsafe { (api.property)(which as c_int, value) })?;
        }
        // SAFETY: writes one handle; the device's context is current.
        check("cublasLtCreate", unsafe { (api.create)(&raw mut handle) })?;
        let api = ManuallyDrop::new(api);
        Ok(Self { inner: Arc::new(Inner { api, handle, version, device: device.clone() }) })
    }

    /// Major, minor and patch version.
    pub fn version(&self) -> [i32; 3] {
        self.inner.version
    }

    pub(super) fn api(&self) -> &CublasLtApi {
        &self.inner.api
    }

    pub(super) fn handle(&self) -> Handle {
        self.inner.handle
    }

    pub(super) fn device(&self) -> &Device {
        &self.inner.device
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: created in `open`; whatever uses it holds an Arc of this.
        unsafe { (self.api.destroy)(self.handle) };
    }
}

/// A descriptor of the library's, destroyed on drop.
pub(super) struct Owned {
    lt: CublasLt,
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
}

// SAFETY: descriptors are plain host memory of the library's.
unsafe impl Send for Owned {}

impl Owned {
    /// `create` writes a descriptor that `destroy` ends.
    pub fn new(
        lt: &CublasLt,
        call: &'static str,
        destroy: unsafe extern "C" fn(Handle) -> c_int,
        create: impl FnOnce(&CublasLtApi, *mut Handle) -> c_int,
    ) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        check(call, create(lt.api(), &raw mut handle))?;
        Ok(Self { lt: lt.clone(), handle, destroy })
    }

    pub fn handle(&self) -> Handle {
        self.handle
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _alive = &self.lt;
        // SAFETY: created in `new` together with its destructor.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// The library's status as an error.
pub(super) fn check(call: &'static str, status: c_int) -> Result<()> {
    let name = match status {
        0 => return Ok(()),
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        _ => "an unknown status",
    };
    Err(CudaError::Call { call, name: name.to_owned(), message: format!("cuBLASLt's status {status}") })
}

/// `named`, or the first that is found; `nvrtc` is NVRTC's file.
fn load(named: Option<&Path>, nvrtc: Option<&Path>) -> Result<CublasLtApi> {
    let candidates = named.map_or_else(|| places(nvrtc), |path| vec![path.to_owned()]);
    let mut failures = Vec::new();
    for path in candidates {
        // SAFETY: a vendor library without initialisers of note.
        match unsafe { Library::new(&path) } {
            Ok(library) => {
                let missing = |symbol| CudaError::MissingSymbol { library: "cuBLASLt", symbol };
                return CublasLtApi::new(library).map_err(missing);
            }
            Err(e) => failures.push(loader_words(&e)),
        }
    }
    Err(CudaError::NoCublasLt(failures.join("; ")))
}

/// Where it may be: names for the loader, then files.
fn places(nvrtc: Option<&Path>) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = NAMES.map(PathBuf::from).to_vec();
    let folder = nvrtc.and_then(Path::parent);
    // .../nvidia/cu13/lib has both; .../nvidia/cuda_nvrtc/lib has NVRTC, .../nvidia/cublas/lib has cuBLASLt.
    let wheels = folder.and_then(|lib| lib.ancestors().nth(2)).map(|nvidia| nvidia.join("cublas/lib"));
    for folder in folder.map(Path::to_owned).into_iter().chain(wheels) {
        places.extend(NAMES.map(|name| folder.join(name)).into_iter().filter(|file| file.is_file()));
    }
    places.push(INSTALLED.into());
    places
}

/// The file of the library that `address` is in.
fn file_of(address: *const c_void) -> Option<PathBuf> {
    /// A `Dl_info`.
    #[repr(C)]
    struct Info {
        file: *const c_char,
        base: *mut c_void,
        symbol: *const c_char,
        symbol_address: *mut c_void,
    }
    unsafe extern "C" {
        fn dladdr(address: *const c_void, info: *mut Info) -> c_int;
    }
    let null = std::ptr::null_mut();
    let mut info = Info { file: null, base: null.cast(), symbol: null, symbol_address: null.cast() };
    // SAFETY: writes an Info, or returns 0; the name is a terminated string of a library that stays loaded.
    let file = unsafe {
        if dladdr(address, &raw mut info) == 0 || info.file.is_null() {
            return None;
        }
        CStr::from_ptr(info.file)
    };
    Some(PathBuf::from(file.to_str().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named() {
        let Err(error) = load(Some(Path::new("/nonexistent/libcublasLt.so.13")), None) else {
            panic!("loaded a library that is not there")
        };
        assert!(matches!(&error, CudaError::NoCublasLt(_)), "{error}");
        let text = error.to_string();
        for part in ["cuBLASLt", "/nonexistent/libcublasLt.so.13", "BITFAST_CUBLASLT"] {
            assert!(text.contains(part), "no {part} in {text}");
        }
    }

    #[test]
    fn another_library_lacks_a_function() {
        let error = load(Some(Path::new("libc.so.6")), None).err().expect("libc multiplies no matrices");
        assert!(matches!(error, CudaError::MissingSymbol { library: "cuBLASLt", .. }), "{error}");
    }

    #[test]
    fn it_is_looked_for_beside_nvrtc() {
        let site = tempfile::tempdir().expect("a folder");
        let file = |path: &str| {
            let file = site.path().join("nvidia").join(path);
            std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
            std::fs::write(&file, "no library").expect("a file");
            file
        };
        let of_12 = file("cublas/lib/libcublasLt.so.12");
        let nvrtc_12 = file("cuda_nvrtc/lib/libnvrtc.so.12");
        assert!(places(Some(&nvrtc_12)).contains(&of_12));
        let of_13 = file("cu13/lib/libcublasLt.so.13");
        let found = places(Some(&site.path().join("nvidia/cu13/lib/libnvrtc.so.13")));
        assert!(found.contains(&of_13) && found[0] == Path::new("libcublasLt.so.13"), "{found:?}");
        assert!(!places(None).contains(&of_13));
        // It is found, and is refused because it is no library: nothing else is taken instead when it was named.
        assert!(matches!(load(Some(&of_13), None), Err(CudaError::NoCublasLt(_))));
    }

    #[test]
    fn an_address_knows_its_file() {
        // SAFETY: the C library is loaded anyway.
        let libc = unsafe { Library::new("libc.so.6") }.expect("the C library");
        // SAFETY: only the address is used.
        let symbol = unsafe { libc.get::<unsafe extern "C" fn()>(b"abort\0") }.expect("a symbol");
        let file = file_of(*symbol as *const c_void).expect("a file");
        assert!(file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libc")), "{file:?}");
    }

    #[test]
    fn a_status_has_its_name() {
        assert!(check("x", 0).is_ok());
        let text = check("cublasLtMatmul", 15).unwrap_err().to_string();
        assert!(text.contains("cublasLtMatmul failed: CUBLAS_STATUS_NOT_SUPPORTED"), "{text}");
    }
}
