//! The part of the CUDA driver API, of NVRTC and of cuBLASLt that Bitfast calls, resolved when a device is opened.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;

use libloading::Library;

/// Result code; 0 is success.
pub type CuResult = c_int;
/// Any opaque handle.
pub type Handle = *mut c_void;
/// Address in device memory.
pub type DevicePtr = u64;

/// A `CUtensorMap`: 128 opaque bytes.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct RawTensorMap(pub [u64; 16]);

/// A `CUlaunchAttribute`: the id, padding, and 64 bytes of value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LaunchAttribute {
    /// `CUlaunchAttributeID`.
    pub id: c_uint,
    /// Unused.
    pub pad: c_uint,
    /// The union's bytes.
    pub value: [c_uint; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
pub const ATTRIBUTE_PROGRAMMATIC_SERIALIZATION: c_uint = 6;

/// A `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [c_uint; 3],
    /// Threads of a block.
    pub block: [c_uint; 3],
    /// Dynamic shared memory, bytes.
    pub smem_bytes: c_uint,
    /// Stream.
    pub stream: Handle,
    /// Attributes.
    pub attributes: *mut LaunchAttribute,
    /// How many.
    pub num_attributes: c_uint,
}

macro_rules! api {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal ( $($arg:ty),* );)* }) => {
        $(#[$doc])*
        pub struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> CuResult,)*
            // Never unloaded: these libraries leave destructors with the threads that called them, which run when such a thread ends,
            // after the last of our handles is gone.
            _library: ManuallyDrop<Library>,
        }

        impl $name {
            /// Resolves every function of `library`.
            ///
            /// # Errors
            /// The name of the first symbol that is missing.
            pub fn new(library: Library) -> Result<Self, &'static str> {
                // SAFETY: the signatures below are those of cuda.h, nvrtc.h and cublasLt.h for these exact symbol names,
                // whose ABI the vendor keeps; the library lives as long as the pointers, in `_library`.
                unsafe {
                    Ok(Self {
                        $($field: *library
                            .get::<unsafe extern "C" fn($($arg),*) -> CuResult>(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| $symbol)?,)*
                        _library: ManuallyDrop::new(library),
                    })
                }
            }
        }
    };
}

api! {
    /// libcuda.
    DriverApi {
        init = "cuInit"(c_uint);
        version = "cuDriverGetVersion"(*mut c_int);
        error_name = "cuGetErrorName"(CuResult, *mut *const c_char);
        error_string = "cuGetErrorString"(CuResult, *mut *const c_char);
        device_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        context_set = "cuCtxSetCurrent"(Handle);
        mem_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        mem_alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
        mem_free = "cuMemFree_v2"(DevicePtr);
        host_alloc = "cuMemAllocHost_v2"(*mut *mut c_void, usize);
        host_free = "cuMemFreeHost"(*mut c_void);
        memset_d8 = "cuMemsetD8Async"(DevicePtr, u8, usize, Handle);
        copy_to_device = "cuMemcpyHtoDAsync_v2"(DevicePtr, *const c_void, usize, Handle);
        copy_to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePtr, usize, Handle);
        module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
        module_unload = "cuModuleUnload"(Handle);
        module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
        function_set = "cuFuncSetAttribute"(Handle, c_int, c_int);
        launch = "cuLaunchKernelEx"(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
        stream_create = "cuStreamCreate"(*mut Handle, c_uint);
        stream_destroy = "cuStreamDestroy_v2"(Handle);
        stream_synchronize = "cuStreamSynchronize"(Handle);
        capture_begin = "cuStreamBeginCapture_v2"(Handle, c_int);
        capture_end = "cuStreamEndCapture"(Handle, *mut Handle);
        graph_instantiate = "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
        graph_launch = "cuGraphLaunch"(Handle, Handle);
        graph_upload = "cuGraphUpload"(Handle, Handle);
        graph_destroy = "cuGraphDestroy"(Handle);
        graph_exec_destroy = "cuGraphExecDestroy"(Handle);
        event_create = "cuEventCreate"(*mut Handle, c_uint);
        event_destroy = "cuEventDestroy_v2"(Handle);
        event_record = "cuEventRecord"(Handle, Handle);
        event_synchronize = "cuEventSynchronize"(Handle);
        event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
        tensor_map_tiled = "cuTensorMapEncodeTiled"(
            *mut RawTensorMap, c_int, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32,
            c_int, c_int, c_int, c_int
        );
    }
}

api! {
    /// libnvrtc.
    NvrtcApi {
        version = "nvrtcVersion"(*mut c_int, *mut c_int);
        create = "nvrtcCreateProgram"(
            *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        );
        destroy = "nvrtcDestroyProgram"(*mut Handle);
        compile = "nvrtcCompileProgram"(Handle, c_int, *const *const c_char);
        log_size = "nvrtcGetProgramLogSize"(Handle, *mut usize);
        log = "nvrtcGetProgramLog"(Handle, *mut c_char);
        cubin_size = "nvrtcGetCUBINSize"(Handle, *mut usize);
        cubin = "nvrtcGetCUBIN"(Handle, *mut c_char);
    }
}

api! {
    /// libcublasLt: matrices are column-major, scalars on the host.
    CublasLtApi {
        property = "cublasLtGetProperty"(c_int, *mut c_int);
        create = "cublasLtCreate"(*mut Handle);
        destroy = "cublasLtDestroy"(Handle);
        product_create = "cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int);
        product_set = "cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize);
        product_destroy = "cublasLtMatmulDescDestroy"(Handle);
        layout_create = "cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64);
        layout_destroy = "cublasLtMatrixLayoutDestroy"(Handle);
        preference_create = "cublasLtMatmulPreferenceCreate"(*mut Handle);
        preference_set = "cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize);
        preference_destroy = "cublasLtMatmulPreferenceDestroy"(Handle);
        heuristic = "cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut CublasLtChoice, *mut c_int
        );
        multiply = "cublasLtMatmul"(
            Handle, Handle, *const f32, DevicePtr, Handle, DevicePtr, Handle, *const f32, DevicePtr, Handle,
            DevicePtr, Handle, *const [u64; 8], DevicePtr, usize, Handle
        );
    }
}

/// A `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CublasLtChoice {
    /// A `cublasLtMatmulAlgo_t`: opaque, without pointers.
    pub algorithm: [u64; 8],
    /// Bytes that it needs.
    pub workspace: usize,
    /// 0: the rest is valid.
    pub state: CuResult,
    /// Waves of blocks over the card.
    pub waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<CublasLtChoice>() == 96);
