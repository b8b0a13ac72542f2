//! The CPU device: f32, deterministic, the reference for every kernel and the default where there is no GPU.
//!
//! Nothing here depends on the number of threads: work is split by rows, heads or documents, never across a sum.

mod adamw;
mod attention;
mod cross_entropy;
mod elementwise;
mod gated;
mod gemm;
mod lora;
mod math;
mod memory;
mod nf4;
mod rms_norm;
mod rope;
mod rows;
pub mod uniform;

use std::time::Instant;

use anyhow::Result;
pub use gemm::product;
pub use memory::{HostRegion, SharedFile, SharedWords};
pub use nf4::dequantize_records;
use rayon::prelude::*;

use crate::quant::record::Dtype;

use super::{Device, Element, View, ViewMut};

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

    const ACT: Dtype = Dtype::F32;
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
