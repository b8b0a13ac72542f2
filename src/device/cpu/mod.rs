//! The CPU device: f32, deterministic, the reference for every kernel and the default where there is no GPU.
//!
//! Nothing here depends on the number of threads: work is split by rows, heads or documents, never across a sum.

mod adamw;
mod attention;
mod cross_entropy;
mod elementwise;
mod gemm;
mod lora;
mod math;
mod memory;
mod nf4;
mod rms_norm;
mod rope;
mod swiglu;
mod uniform;

use std::time::Instant;

use anyhow::Result;
pub use memory::{HostRegion, SharedFile, SharedWords};
use rayon::prelude::*;

use super::ops::*;
use super::{Device, Element, Ops, View, ViewMut};

/// A share of the host's cores.
#[derive(Clone)]
pub struct Cpu {
    num_threads: usize,
}

impl Cpu {
    /// Uses `num_threads` threads of the current rayon pool.
    pub fn new(num_threads: usize) -> Self {
        Self { num_threads: num_threads.max(1) }
    }

    /// Splits `num_rows` rows of `width` into one run per thread.
    fn rows_per_thread(&self, num_rows: usize) -> usize {
        num_rows.div_ceil(self.num_threads).max(1)
    }

    /// Calls `f(first_row, rows)` on runs of rows of `y`, on all threads, with the widest vectors of this machine.
    fn for_rows<T: Element>(&self, y: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let rows = self.rows_per_thread(y.len() / width.max(1));
        if self.num_threads == 1 || y.len() <= width {
            return f(0, y);
        }
        y.par_chunks_mut(rows * width.max(1)).enumerate().for_each(|(i, part)| f(i * rows, part));
    }
}

impl Device for Cpu {
    type Act = f32;
    type Region = HostRegion;
    type Mark = Instant;

    const IS_HOST: bool = true;
    const NEEDS_LOSS_SCALING: bool = false;

    fn allocate(&self, bytes: usize) -> Result<(Self::Region, usize)> {
        let region = HostRegion::new(bytes)?;
        let addr = region.addr();
        Ok((region, addr))
    }

    fn pin(&self, region: HostRegion) -> Result<HostRegion> {
        Ok(region)
    }

    fn used_bytes(&self) -> Result<usize> {
        Ok(0)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn seconds_between(&self, first: &Instant, then: &Instant) -> Result<f64> {
        let later = then.saturating_duration_since(*first).as_secs_f64();
        Ok(later - first.saturating_duration_since(*then).as_secs_f64())
    }

    fn upload<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: &[T]) -> Result<()> {
        dst.host_mut().copy_from_slice(src);
        Ok(())
    }

    fn download<T: Element>(&self, dst: &mut [T], src: View<'_, Self, T>) -> Result<()> {
        dst.copy_from_slice(src.host());
        Ok(())
    }

    fn copy<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: View<'_, Self, T>) -> Result<()> {
        dst.host_mut().copy_from_slice(src.host());
        Ok(())
    }

    fn fill_bytes<T: Element>(&self, dst: ViewMut<'_, Self, T>, byte: u8) -> Result<()> {
        bytemuck::cast_slice_mut::<T, u8>(dst.host_mut()).fill(byte);
        Ok(())
    }
}

impl Ops for Cpu {
    fn gemm(&self, args: Gemm<'_, Self, f32, f32, f32>) -> Result<()> {
        self.gemm_f32(args)
    }
    fn gemm_grad(&self, args: Gemm<'_, Self, f32, f32, f32>) -> Result<()> {
        self.gemm_f32(args)
    }
    fn dequantize(&self, args: Dequantize<'_, Self, f32>) -> Result<()> {
        self.dequantize_records(args)
    }
    fn dequantize_f32(&self, args: Dequantize<'_, Self, f32>) -> Result<()> {
        self.dequantize_records(args)
    }
    fn quantize_nf4(&self, args: QuantizeNf4<'_, Self>) -> Result<()> {
        self.quantize_blocks(args)
    }
    fn quantize_absmax(&self, args: QuantizeAbsmax<'_, Self>) -> Result<()> {
        self.quantize_superblocks(args)
    }
    fn uniform(&self, args: Uniform<'_, Self>) -> Result<()> {
        self.uniform_f32(args)
    }
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Self>) -> Result<()> {
        self.rms_norm_forward_f32(args)
    }
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        self.rms_norm_backward_f32(args)
    }
    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        self.rope_f32(args)
    }
    fn swiglu_forward(&self, args: SwigluForward<'_, Self>) -> Result<()> {
        self.swiglu_forward_f32(args)
    }
    fn swiglu_backward(&self, args: SwigluBackward<'_, Self>) -> Result<()> {
        self.swiglu_backward_f32(args)
    }
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Self>) -> Result<()> {
        self.cross_entropy_piece_f32(args)
    }
    fn gather_target_rows(&self, args: GatherTargetRows<'_, Self>) -> Result<()> {
        self.gather_target_rows_f32(args)
    }
    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Self>) -> Result<()> {
        self.cross_entropy_finish_f32(args)
    }
    fn lora_dropout(&self, args: LoraDropout<'_, Self>) -> Result<()> {
        self.lora_dropout_f32(args)
    }
    fn adamw(&self, args: AdamW<'_, Self>) -> Result<()> {
        self.adamw_f32(args)
    }
    fn sum_of_squares(&self, x: View<'_, Self, f32>) -> Result<f64> {
        Ok(self.sum_of_squares_f64(x.host()))
    }
    fn add(&self, y: ViewMut<'_, Self, f32>, x: View<'_, Self, f32>) -> Result<()> {
        self.add_f32(y.host_mut(), x.host())
    }
    fn add_bias(&self, x: ViewMut<'_, Self, f32>, bias: View<'_, Self, f32>) -> Result<()> {
        self.add_bias_f32(x.host_mut(), bias.host())
    }
    fn cast(&self, y: ViewMut<'_, Self, f32>, x: View<'_, Self, f32>) -> Result<()> {
        self.copy(y, x)
    }
    fn round(y: &mut [f32], x: &[f32]) {
        y.copy_from_slice(x);
    }
    fn gather_rows(
        &self,
        y: ViewMut<'_, Self, f32>,
        x: View<'_, Self, f32>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()> {
        self.gather_rows_f32(y.host_mut(), x.host(), rows.host(), width)
    }
    fn scatter_rows(
        &self,
        y: ViewMut<'_, Self, f32>,
        x: View<'_, Self, f32>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()> {
        self.scatter_rows_f32(y.host_mut(), x.host(), rows.host(), width)
    }
    fn logits(
        &self,
        logits: ViewMut<'_, Self, f32>,
        x: View<'_, Self, f32>,
        weight: View<'_, Self, f32>,
        hidden_size: usize,
    ) -> Result<()> {
        let (m, n, k) = (x.len() / hidden_size, weight.len() / hidden_size, hidden_size);
        let (transpose_a, transpose_b) = (Transpose::No, Transpose::Yes);
        self.gemm_f32(Gemm { c: logits, a: x, b: weight, transpose_a, transpose_b, m, n, k, alpha: 1.0, beta: 0.0 })
    }
}
