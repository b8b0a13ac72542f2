//! The CUDA device: bf16 activations and dense weights, f32 sums, one compute stream.
//!
//! The binary needs nothing of CUDA to be built or started: driver, NVRTC and cuBLAS are loaded at run time
//! ([`libraries`]), the kernels (`kernels/*.cu`) compiled at first start ([`compile`]). Each op is that of `cpu/<stem>.rs`.

mod adamw;
mod attention;
pub mod compile;
mod cross_entropy;
mod elementwise;
mod gemm;
mod launch;
pub mod libraries;
mod lora_dropout;
mod memory;
mod nf4;
mod rms_norm;
mod rope;
mod swiglu;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream};
use cudarc::nvrtc::Ptx;
use half::bf16;

use super::ops::*;
use super::{Ops, View, ViewMut};

/// The oldest GPUs that have what the kernels use: bf16 matrix instructions.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// One GPU of this process; clones are the same GPU.
#[derive(Clone)]
pub struct Cuda {
    blas: Arc<gemm::Blas>,
    kernels: Arc<HashMap<&'static str, CudaFunction>>,
    tables: Arc<memory::Tables>,
    compute: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl Cuda {
    /// The GPU of this index. `cache` is a folder for compiled kernels. Fails with what to install or change when there is no
    /// driver, library or GPU, or it is too old.
    pub fn new(ordinal: usize, cache: &Path) -> Result<Cuda> {
        ensure!(libraries::driver_is_there(), "no NVIDIA driver: libcuda.so.1 cannot be loaded");
        let count = CudaContext::device_count().map_err(|e| anyhow!("the NVIDIA driver finds no GPU: {e}"))?;
        ensure!((ordinal as i32) < count, "GPU {ordinal} is asked for, {count} are there");
        libraries::load_nvrtc()?;
        libraries::load_cublas()?;
        let context = CudaContext::new(ordinal).map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        // SAFETY: before any allocation; order between streams is the executor's business.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        ensure!(
            capability >= MIN_COMPUTE_CAPABILITY,
            "GPU {ordinal} has compute capability {}.{}; 8.0 or newer is needed (Ampere, 2020)",
            capability.0,
            capability.1
        );
        let compute = context.new_stream().map_err(|e| anyhow!("GPU {ordinal}: {e}"))?;
        let kernels = Arc::new(load_kernels(&context, (capability.0 * 10 + capability.1) as u32, cache)?);
        let tables = Arc::new(memory::Tables::new(&context)?);
        let blas = Arc::new(gemm::Blas::new(compute.clone(), tables.clone())?);
        let cuda = Cuda { blas, kernels, tables, compute, context };
        cuda.allow_attention_memory()?;
        Ok(cuda)
    }

    /// Name of the GPU.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(|e| anyhow!("GPU: {e}"))
    }

    /// Another stream, for communication.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>> {
        self.context.new_stream().map_err(|e| anyhow!("GPU: {e}"))
    }

    /// The stream that the ops run on.
    pub fn compute(&self) -> &CudaStream {
        &self.compute
    }

    /// What is on `first` now comes before what will be on `then`.
    pub fn order(&self, first: &CudaStream, then: &CudaStream) -> Result<()> {
        then.wait(&first.record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?)
            .map_err(|e| anyhow!("GPU event: {e}"))
    }

    /// Bytes of GPU memory that are free.
    pub fn free_bytes(&self) -> Result<usize> {
        Ok(self.context.mem_get_info().map_err(|e| anyhow!("GPU memory: {e}"))?.0)
    }

    /// Makes this GPU the one of the calling thread.
    pub fn bind_to_thread(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| anyhow!("GPU: {e}"))
    }

    /// Waits for the compute stream; an error of a kernel comes out here at the latest.
    pub fn synchronize(&self) -> Result<()> {
        self.compute.synchronize().map_err(|e| anyhow!("the GPU reports: {e}"))
    }
}

/// GPUs that the driver shows to this process; 0 without a driver.
pub fn num_devices() -> Result<usize> {
    if !libraries::driver_is_there() {
        return Ok(0);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(count as usize),
        Err(error) if error.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(anyhow!("the NVIDIA driver: {error}")),
    }
}

fn load_kernels(context: &Arc<CudaContext>, arch: u32, cache: &Path) -> Result<HashMap<&'static str, CudaFunction>> {
    let mut kernels = HashMap::new();
    for (stem, source, names) in compile::SOURCES {
        let code = compile::cached(cache, stem, source, arch).context("compiling the kernels")?;
        let module =
            context.load_module(Ptx::from_binary(code)).map_err(|e| anyhow!("loading kernels/{stem}.cu: {e}"))?;
        for &name in names {
            let function = module.load_function(name).map_err(|e| anyhow!("kernel {name}: {e}"))?;
            kernels.insert(name, function);
        }
    }
    Ok(kernels)
}

impl Ops for Cuda {
    fn gemm(&self, args: Gemm<'_, Self, bf16, bf16, bf16>) -> Result<()> {
        self.gemm_bf16(args)
    }
    fn gemm_grad(&self, args: Gemm<'_, Self, bf16, bf16, f32>) -> Result<()> {
        self.gemm_bf16(args)
    }
    fn dequantize(&self, args: Dequantize<'_, Self, bf16>) -> Result<()> {
        self.dequantize_records(args, "dequantize_nf4", "convert")
    }
    fn dequantize_f32(&self, args: Dequantize<'_, Self, f32>) -> Result<()> {
        self.dequantize_records(args, "dequantize_nf4_f32", "convert_f32")
    }
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Self>) -> Result<()> {
        self.rms_norm_forward_bf16(args)
    }
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        self.rms_norm_backward_bf16(args)
    }
    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        self.rope_bf16(args)
    }
    fn swiglu_forward(&self, args: SwigluForward<'_, Self>) -> Result<()> {
        self.swiglu_forward_bf16(args)
    }
    fn swiglu_backward(&self, args: SwigluBackward<'_, Self>) -> Result<()> {
        self.swiglu_backward_bf16(args)
    }
    fn attention_forward(&self, args: AttentionForward<'_, Self>) -> Result<()> {
        self.attention_forward_bf16(args)
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        self.attention_backward_bf16(args)
    }
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Self>) -> Result<()> {
        self.cross_entropy_piece_bf16(args)
    }
    fn gather_target_rows(&self, args: GatherTargetRows<'_, Self>) -> Result<()> {
        self.gather_target_rows_bf16(args)
    }
    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Self>) -> Result<()> {
        self.cross_entropy_finish_bf16(args)
    }
    fn lora_dropout(&self, args: LoraDropout<'_, Self>) -> Result<()> {
        self.lora_dropout_bf16(args)
    }
    fn adamw(&self, args: AdamW<'_, Self>) -> Result<()> {
        self.adamw_f32(args)
    }
    fn sum_of_squares(&self, x: View<'_, Self, f32>) -> Result<f64> {
        self.sum_of_squares_f64(x)
    }
    fn add(&self, y: ViewMut<'_, Self, bf16>, x: View<'_, Self, bf16>) -> Result<()> {
        self.add_bf16(y, x)
    }
    fn add_bias(&self, x: ViewMut<'_, Self, bf16>, bias: View<'_, Self, f32>) -> Result<()> {
        self.add_bias_bf16(x, bias)
    }
    fn cast(&self, y: ViewMut<'_, Self, bf16>, x: View<'_, Self, f32>) -> Result<()> {
        self.cast_to_bf16(y, x)
    }
    fn upload_activations(&self, y: ViewMut<'_, Self, bf16>, x: &[f32]) -> Result<()> {
        self.upload_as_bf16(y, x)
    }
    fn gather_rows(
        &self,
        y: ViewMut<'_, Self, bf16>,
        x: View<'_, Self, bf16>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()> {
        self.gather_rows_bf16(y, x, rows, width)
    }
    fn scatter_rows(
        &self,
        y: ViewMut<'_, Self, bf16>,
        x: View<'_, Self, bf16>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()> {
        self.scatter_rows_bf16(y, x, rows, width)
    }
    fn logits(
        &self,
        logits: ViewMut<'_, Self, f32>,
        x: View<'_, Self, bf16>,
        weight: View<'_, Self, bf16>,
        hidden_size: usize,
    ) -> Result<()> {
        let (m, n, k) = (x.len() / hidden_size, weight.len() / hidden_size, hidden_size);
        let (transpose_a, transpose_b) = (Transpose::No, Transpose::Yes);
        self.gemm_bf16(Gemm { c: logits, a: x, b: weight, transpose_a, transpose_b, m, n, k, alpha: 1.0, beta: 0.0 })
    }
}
