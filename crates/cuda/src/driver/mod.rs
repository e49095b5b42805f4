//! A thin, typed layer over the CUDA driver API: one [`Device`], from which everything else is made.
//!
//! Nothing here chooses numerics. Handles are freed on drop; every call checks its result.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;

use libloading::Library;

mod ffi;
mod memory;
mod staging;
mod stream;

pub(crate) use ffi::{CublasLtApi, CublasLtChoice, Handle, NvrtcApi};
pub use memory::{Buffer, Pinned, TensorMap, TensorMapDesc, TensorMapElement};
pub use staging::Staging;
pub use stream::{Event, Graph, Stream};

use crate::error::loader_words;
use crate::{CudaError, Result};
use ffi::{ATTRIBUTE_PROGRAMMATIC_SERIALIZATION, DriverApi, LaunchAttribute, LaunchConfig};

/// An opened GPU: its primary context and the driver's functions. Cheap to clone.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    api: DriverApi,
    context: Handle,
    ordinal: c_int,
    name: String,
    version: (i32, i32),
    sms: usize,
}

// SAFETY: the driver API is thread-safe; the context handle is only passed to it.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// The oldest CUDA whose driver and compiler are taken.
pub(crate) const OLDEST: (i32, i32) = (12, 4);
const NO_DEVICE: c_int = 100;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;
const MULTIPROCESSOR_COUNT: c_int = 16;

/// Whether the machine has a driver at all; a device needs more.
pub(crate) fn has_driver() -> bool {
    load_driver().is_ok()
}

fn load_driver() -> Result<Library> {
    // SAFETY: libcuda's initialisers have no preconditions.
    unsafe { Library::new("libcuda.so.1") }.map_err(|e| CudaError::NoDriver(loader_words(&e)))
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// No driver, an old one, no such device, or one that is not an H100 or H200.
    pub fn open(ordinal: usize) -> Result<Self> {
        let api = DriverApi::new(load_driver()?)
            .map_err(|symbol| CudaError::MissingSymbol { library: "the NVIDIA driver", symbol })?;
        let check = |call, code| check(&api, call, code);
        let (mut version, mut count, mut device, mut context) = (0, 0, 0, std::ptr::null_mut());
        // SAFETY: every pointer is to a live local of the type that the call writes.
        let version = unsafe {
            check("cuDriverGetVersion", (api.version)(&raw mut version))?;
            let version = (version / 1000, version % 1000 / 10);
            if version < OLDEST {
                let (major, minor) = version;
                return Err(CudaError::TooOld { library: "the NVIDIA driver", major, minor });
            }
            match (api.init)(0) {
                NO_DEVICE => return Err(CudaError::NoDevice { ordinal, count: 0 }),
                code => check("cuInit", code)?,
            }
            check("cuDeviceGetCount", (api.device_count)(&raw mut count))?;
            if ordinal >= count as usize {
                return Err(CudaError::NoDevice { ordinal, count: count as usize });
            }
            check("cuDeviceGet", (api.device_get)(&raw mut device, ordinal as c_int))?;
            version
        };
        let mut name = [0 as c_char; 128];
        // SAFETY: the buffer's length is passed along; the driver writes a terminated string.
        let name = unsafe {
            check("cuDeviceGetName", (api.device_name)(name.as_mut_ptr(), name.len() as c_int, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one int.
            check("cuDeviceGetAttribute", unsafe { (api.device_attribute)(&raw mut value, which, device) })
                .map(|()| value)
        };
        let (major, minor) = (attribute(COMPUTE_CAPABILITY_MAJOR)?, attribute(COMPUTE_CAPABILITY_MINOR)?);
        if (major, minor) != (9, 0) {
            return Err(CudaError::Architecture { name, major, minor });
        }
        let sms = attribute(MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: writes one handle.
        check("cuDevicePrimaryCtxRetain", unsafe { (api.context_retain)(&raw mut context, device) })?;
        let device = Self { inner: Arc::new(Inner { api, context, ordinal: device, name, version, sms }) };
        device.bind()?;
        Ok(device)
    }

    /// The device's name, e.g. "NVIDIA H100 80GB HBM3".
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The (major, minor) of the CUDA that the driver is of.
    pub fn version(&self) -> (i32, i32) {
        self.inner.version
    }

    /// Number of multiprocessors.
    pub fn sms(&self) -> usize {
        self.inner.sms
    }

    /// Makes this device's context current on the calling thread; to be called once on each thread that uses it.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is alive while `inner` is.
        self.check("cuCtxSetCurrent", unsafe { (self.api().context_set)(self.inner.context) })
    }

    /// Makes the context current for giving something back, on whatever thread the last owner is: without one the driver would keep it.
    fn bind_to_free(&self) {
        // A device that fails here has lost all that it held.
        let _ = self.bind();
    }

    /// Free and total bytes of device memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        self.check("cuMemGetInfo", unsafe { (self.api().mem_info)(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Loads a cubin and finds its kernel `entry`, which may use up to `smem_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// The driver's: a cubin for another architecture, too much shared memory.
    pub fn kernel(&self, cubin: &[u8], entry: &str, smem_bytes: usize) -> Result<Kernel> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin is an ELF image that carries its own length; the driver validates it.
        self.check("cuModuleLoadData", unsafe {
            (self.api().module_load)(&raw mut module, cubin.as_ptr().cast())
        })?;
        let mut kernel = Kernel { device: self.clone(), module, function: std::ptr::null_mut(), smem_bytes };
        let entry = CString::new(entry).expect("a kernel name has no NUL");
        // SAFETY: the module was just loaded; the name is a terminated string.
        self.check("cuModuleGetFunction", unsafe {
            (self.api().module_function)(&raw mut kernel.function, module, entry.as_ptr())
        })?;
        // SAFETY: the function belongs to the live module.
        self.check("cuFuncSetAttribute", unsafe {
            (self.api().function_set)(kernel.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes as c_int)
        })?;
        Ok(kernel)
    }

    fn api(&self) -> &DriverApi {
        &self.inner.api
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        check(self.api(), call, code)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; whatever was made from the device holds an Arc of this.
        unsafe { (self.api.context_release)(self.ordinal) };
    }
}

fn check(api: &DriverApi, call: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let text = |f: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
        let mut p = std::ptr::null();
        // SAFETY: the driver writes a pointer to a static string, or null for an unknown code.
        unsafe {
            f(code, &raw mut p);
            if p.is_null() {
                format!("code {code}")
            } else {
                CStr::from_ptr(p).to_string_lossy().into_owned()
            }
        }
    };
    Err(CudaError::Call { call, name: text(api.error_name), message: text(api.error_string) })
}

/// A loaded kernel.
pub struct Kernel {
    device: Device,
    module: Handle,
    function: Handle,
    smem_bytes: usize,
}

// SAFETY: module and function handles may be used from any thread with the context current.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Whether a launch may start before the one ahead of it in the stream has ended. The kernel itself waits
/// (`griddepcontrol.wait`) before it reads what the other wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlap {
    /// Starts after the previous kernel.
    None,
    /// Programmatic dependent launch.
    WithPrevious,
}

/// Grid, block and ordering of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Order.
    pub overlap: Overlap,
}

/// One kernel argument.
pub enum Arg<'a> {
    /// A device address.
    Ptr(u64),
    /// An int.
    I32(i32),
    /// A float.
    F32(f32),
    /// A tensor map, by value.
    Map(&'a TensorMap),
}

impl Kernel {
    /// Launches on `stream`.
    ///
    /// # Safety
    /// `args` must match the kernel's parameters, and its addresses must be live device memory of the sizes that
    /// the kernel reads and writes, until the stream has passed the launch.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn launch(&self, stream: &Stream, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        let mut params: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Ptr(p) => std::ptr::from_ref(p).cast_mut().cast(),
                Arg::I32(v) => std::ptr::from_ref(v).cast_mut().cast(),
                Arg::F32(v) => std::ptr::from_ref(v).cast_mut().cast(),
                Arg::Map(m) => std::ptr::from_ref(&m.raw).cast_mut().cast(),
            })
            .collect();
        let mut attribute =
            LaunchAttribute { id: ATTRIBUTE_PROGRAMMATIC_SERIALIZATION, pad: 0, value: [0; 16] };
        attribute.value[0] = 1;
        let config = LaunchConfig {
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            smem_bytes: self.smem_bytes as u32,
            stream: stream.handle(),
            attributes: &raw mut attribute,
            num_attributes: u32::from(launch.overlap == Overlap::WithPrevious),
        };
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        self.device.check("cuLaunchKernelEx", unsafe {
            (self.device.api().launch)(
                &raw const config,
                self.function,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.device.bind_to_free();
        // SAFETY: loaded in `Device::kernel`; the function is not used after this.
        unsafe { (self.device.api().module_unload)(self.module) };
    }
}
