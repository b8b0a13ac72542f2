//! The CUDA device: 16-bit activations and dense weights (bf16, or fp16 for GPUs and recipes that want it), f32 sums, one compute
//! stream.
//!
//! The binary needs nothing of CUDA to be built or started: driver, NVRTC and cuBLAS are loaded at run time
//! ([`libraries`]), the kernels (`kernels/*.cu`) compiled at first start ([`compile`]). Each op is that of `cpu/<stem>.rs`.
#![expect(unsafe_code, reason = "calls CUDA")]

mod adamw;
pub mod asked;
mod attention;
mod attention_hopper;
pub mod compile;
mod cross_entropy;
mod elementwise;
mod gated;
mod gemm;
mod launch;
pub mod libraries;
mod lora;
mod lora_hopper;
mod memory;
mod nf4;
mod rms_norm;
mod rope;
mod rows;
mod uniform;

use std::collections::HashMap;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::result::device;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, sys};
use cudarc::nvrtc::Ptx;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::quant::record::Dtype;

use attention_hopper::Hopper;
pub use compile::HEAD_DIMS;
use compile::{AttentionVariant, Source};
use launch::{Grid, args};
pub use nf4::DEQUANTIZED_TOGETHER;

/// Bytes of a GPU's memory that a process takes before it has allocated anything: the driver's context, the kernels, cuBLAS and its
/// workspace.
pub const CONTEXT_BYTES: usize = 512 << 20;

/// Bytes that libraries take later, when they are first used: cuBLAS loads some kernels late.
pub const LIBRARY_BYTES: usize = 128 << 20;

/// Bytes that NCCL's communicator takes with two H100 over NVLink; it takes less where ranks talk through the host. `plan` uses this
/// figure, a run measures it.
pub const NCCL_BYTES: usize = 1308 << 20;

/// Bytes that NCCL's communicator takes where ranks talk through sockets: two ranks on an H100 (2026-11-25).
pub const NCCL_SOCKET_BYTES: usize = 450 << 20;

/// Bytes of pinned memory that take one byte of the GPU: the driver maps each page of 4 KiB there with eight bytes. This was right to
/// 5 MiB with 49 and 220 GB on H100s.
pub const PINNED_BYTES_OF_A_TABLE_BYTE: usize = 512;

/// The oldest GPUs that have what the kernels use: bf16 matrix instructions.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// A type of activations and dense weights on a GPU.
pub trait HalfType: gemm::BlasType + Into<f32> {
    const NAME: &'static str;
    const DTYPE: Dtype;
    /// The option that the kernels are compiled with.
    const COMPILE_OPTION: Option<&'static str>;
    /// True when gradients are so small for its exponent that the loss must be scaled.
    const NEEDS_LOSS_SCALING: bool;
    /// Rounds to nearest; the lengths are equal.
    fn round(to: &mut [Self], from: &[f32]);
}

impl HalfType for bf16 {
    const NAME: &'static str = "bf16";
    const DTYPE: Dtype = Dtype::Bf16;
    const COMPILE_OPTION: Option<&'static str> = None;
    const NEEDS_LOSS_SCALING: bool = false;
    fn round(to: &mut [bf16], from: &[f32]) {
        to.convert_from_f32_slice(from);
    }
}

impl HalfType for f16 {
    const NAME: &'static str = "fp16";
    const DTYPE: Dtype = Dtype::F16;
    const COMPILE_OPTION: Option<&'static str> = Some("-DACT_F16");
    const NEEDS_LOSS_SCALING: bool = true;
    fn round(to: &mut [f16], from: &[f32]) {
        to.convert_from_f32_slice(from);
    }
}

/// One GPU of this process, computing in `A`; clones are the same GPU.
pub struct Cuda<A: HalfType> {
    blas: Arc<gemm::Blas>,
    kernels: Arc<Kernels>,
    tables: Arc<memory::Tables>,
    /// Set on a Hopper, which has kernels of its own.
    hopper: Option<Hopper>,
    compute: Arc<CudaStream>,
    context: Arc<CudaContext>,
    _act: PhantomData<fn() -> A>,
}

impl<A: HalfType> Clone for Cuda<A> {
    fn clone(&self) -> Self {
        let Cuda { blas, kernels, tables, hopper, compute, context, _act } = self;
        let (blas, kernels, tables) = (blas.clone(), kernels.clone(), tables.clone());
        Cuda {
            blas,
            kernels,
            tables,
            hopper: *hopper,
            compute: compute.clone(),
            context: context.clone(),
            _act: PhantomData,
        }
    }
}

impl<A: HalfType> Cuda<A> {
    /// The GPU of this index. `cache` is a folder for compiled kernels. Fails with what to install or change when there is no
    /// driver, library or GPU, or it is too old.
    pub fn new(ordinal: usize, cache: &Path) -> Result<Cuda<A>> {
        ensure!(libraries::driver_is_there(), "no NVIDIA driver: libcuda.so.1 cannot be loaded");
        let count = CudaContext::device_count().map_err(|e| anyhow!("the NVIDIA driver finds no GPU: {e}"))?;
        ensure!((ordinal as i32) < count, "GPU {ordinal} is asked for, {count} are there");
        libraries::load_nvrtc()?;
        libraries::load_cublas()?;
        let context = CudaContext::new(ordinal).map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        // SAFETY: before any allocation; order between streams is the executor's business.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        check_capability(ordinal, capability)?;
        let compute = context.new_stream().map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        let arch = (capability.0 * 10 + capability.1) as u32;
        let kernels = Arc::new(Kernels::load(&context, arch, cache, A::COMPILE_OPTION)?);
        let hopper = if arch == compile::HOPPER { Some(Hopper::new(&context)?) } else { None };
        let tables = Arc::new(memory::Tables::new(&context)?);
        let blas = Arc::new(gemm::Blas::new(compute.clone(), tables.clone())?);
        Ok(Cuda { blas, kernels, tables, hopper, compute, context, _act: PhantomData })
    }

    /// Name of the GPU.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(|e| anyhow!("GPU: {e}"))
    }

    /// Makes another stream, for communication.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>> {
        self.context.new_stream().map_err(|e| anyhow!("GPU: {e}"))
    }

    /// The stream that the ops run on.
    pub fn compute(&self) -> &CudaStream {
        &self.compute
    }

    /// Makes what is put on `then` from now on wait for what is on `first` now.
    pub fn order(&self, first: &CudaStream, then: &CudaStream) -> Result<()> {
        then.wait(&first.record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?)
            .map_err(|e| anyhow!("GPU event: {e}"))
    }

    /// Returns an event of a stream; with drivers from 12.8 on it has a time.
    pub fn mark_on(&self, stream: &CudaStream) -> Result<CudaEvent> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        stream.record_event(flags).map_err(|e| anyhow!("GPU event: {e}"))
    }

    /// Keeps a stream busy for a time, for tests of the order of streams.
    pub fn spin_on(&self, stream: &CudaStream, time: Duration) -> Result<()> {
        if time.is_zero() {
            return Ok(());
        }
        let grid = Grid { blocks: (1, 1), threads: 1, shared_bytes: 0 };
        // SAFETY: the kernel reaches no memory, and declares this argument alone.
        unsafe { self.launch_on(stream, "spin", grid, args![time.as_nanos() as u64]) }
    }

    /// Bytes of GPU memory that are free.
    pub fn free_bytes(&self) -> Result<usize> {
        Ok(self.free_and_total_bytes()?.0)
    }

    fn free_and_total_bytes(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(|e| anyhow!("GPU memory: {e}"))
    }

    /// Makes this GPU the one of the calling thread.
    pub fn bind_to_thread(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| anyhow!("GPU: {e}"))
    }
}

/// Explains why a kernel was not loaded: a driver refuses machine code of a newer CUDA than its own.
fn not_loaded(stem: &str, error: &DriverError) -> anyhow::Error {
    let mut driver = 0;
    // SAFETY: writes one integer.
    let _ = unsafe { sys::cuDriverGetVersion(&mut driver) };
    anyhow!(
        "loading kernels/{stem}.cu: {error}. The driver is of CUDA {}.{}, NVRTC of {}: they should have the same major version",
        driver / 1000,
        driver % 1000 / 10,
        compile::nvrtc_version().unwrap_or_default()
    )
}

fn check_capability(ordinal: usize, (major, minor): (i32, i32)) -> Result<()> {
    let (least_major, least_minor) = MIN_COMPUTE_CAPABILITY;
    ensure!(
        (major, minor) >= MIN_COMPUTE_CAPABILITY,
        "GPU {ordinal} has compute capability {major}.{minor}; {least_major}.{least_minor} or newer is needed (Ampere, 2020); \
         --device cpu does without"
    );
    Ok(())
}

/// Returns the UUIDs of the GPUs that the driver shows to this process, in its order; none without a driver.
pub fn device_uuids() -> Result<Vec<[i8; 16]>> {
    if !libraries::driver_is_there() {
        return Ok(Vec::new());
    }
    let count = match CudaContext::device_count() {
        Ok(count) => count,
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
        Err(error) => return Err(anyhow!("the NVIDIA driver: {error}")),
    };
    let uuid = |ordinal| device::get_uuid(device::get(ordinal)?).map(|uuid| uuid.bytes);
    (0..count).map(|ordinal| uuid(ordinal).map_err(|e| anyhow!("GPU {ordinal}: {e}"))).collect()
}

/// Kernels by name.
type Loaded = HashMap<&'static str, CudaFunction>;

/// The kernels of a GPU that are loaded, and where others come from.
struct Kernels {
    arch: u32,
    /// Folder of compiled kernels.
    cache: PathBuf,
    /// Option that says what type activations have.
    act_option: Option<&'static str>,
    /// Kernels that every model needs.
    common: Loaded,
    attention: Mutex<HashMap<AttentionVariant, Arc<Loaded>>>,
}

impl Kernels {
    fn load(context: &Arc<CudaContext>, arch: u32, cache: &Path, act_option: Option<&'static str>) -> Result<Kernels> {
        let (cache, attention) = (cache.to_path_buf(), Mutex::default());
        let mut kernels = Kernels { arch, cache, act_option, common: Loaded::new(), attention };
        kernels.common = kernels.compiled(context, &compile::SOURCES, &[])?;
        if arch == compile::HOPPER {
            kernels.common.extend(kernels.compiled(context, &compile::HOPPER_SOURCES, &[])?);
            for name in lora_hopper::kernels() {
                launch::allow_shared_bytes(&kernels.common[name], name, attention_hopper::SHARED_BYTES)?;
            }
        }
        Ok(kernels)
    }

    /// Loads some files, compiled with these options and the one of the activations.
    fn compiled(&self, context: &Arc<CudaContext>, sources: &[Source], options: &[String]) -> Result<Loaded> {
        let options: Vec<String> = self.act_option.map(String::from).into_iter().chain(options.to_vec()).collect();
        let mut kernels = Loaded::new();
        for source in sources {
            let code = compile::cached(&self.cache, source, self.arch, &options).context("compiling the kernels")?;
            let module = context.load_module(Ptx::from_binary(code)).map_err(|e| not_loaded(source.stem, &e))?;
            for &name in source.kernels {
                let function = module.load_function(name).map_err(|e| anyhow!("kernel {name}: {e}"))?;
                kernels.insert(name, function);
            }
        }
        Ok(kernels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_gpus_are_refused_with_what_is_needed() {
        assert!(check_capability(0, (8, 0)).is_ok() && check_capability(0, (12, 0)).is_ok());
        let error = check_capability(1, (7, 5)).unwrap_err().to_string();
        assert!(error.starts_with("GPU 1 has compute capability 7.5; 8.0 or newer is needed"), "{error}");
    }
}
