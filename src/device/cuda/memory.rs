//! Device memory, copies and fills.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use crate::device::cpu::{Cpu, HostRegion};
use crate::device::{Asked, Device, Element, SUM_PARTS, View, ViewMut};
use crate::quant::double::DYNAMIC_MAP;
use crate::quant::nf4::{CODEBOOK, THRESHOLDS};
use crate::quant::record::Dtype;

use super::asked::{self, waiting};
use super::{Cuda, HalfType, gemm, libraries};

/// One allocation, freed on drop.
pub struct DeviceRegion {
    addr: u64,
    context: Arc<CudaContext>,
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        // Nothing can be done about an error here: the process ends, or has failed already.
        let _ = self.context.bind_to_thread();
        let _ = self.context.synchronize();
        // SAFETY: allocated in `allocate`; no `Buffer` is left, and nothing runs that was given one.
        let _ = unsafe { result::free_sync(self.addr) };
    }
}

/// Ranges of host memory that the driver holds in place: addresses of the first byte and of what follows the last.
static PINNED: Mutex<Vec<Range<usize>>> = Mutex::new(Vec::new());

fn pinned() -> MutexGuard<'static, Vec<Range<usize>>> {
    PINNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True when the driver may still read a slice after an asynchronous copy from it has returned.
fn is_pinned<T>(slice: &[T]) -> bool {
    let own = slice.as_ptr_range();
    pinned().iter().any(|range| range.start < own.end as usize && (own.start as usize) < range.end)
}

/// Host memory that the driver holds in place; it is let go on drop.
struct Pin {
    addr: usize,
    context: Arc<CudaContext>,
}

impl Pin {
    fn new(context: &Arc<CudaContext>, addr: usize, bytes: usize) -> Result<Pin> {
        context.bind_to_thread().map_err(|e| anyhow!("GPU: {e}"))?;
        // SAFETY: the range is that of a mapping without a file on disk, which outlives the pin (`HostRegion`).
        let status = unsafe { sys::cuMemHostRegister_v2(addr as *mut c_void, bytes, 0) };
        status.result().map_err(|e| {
            anyhow!("the driver cannot pin {bytes} bytes of host memory: {e}; fsdp.host_budget says how many it may be")
        })?;
        pinned().push(addr..addr + bytes);
        Ok(Pin { addr, context: context.clone() })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Nothing can be done about an error here: the process ends, or has failed already.
        let _ = self.context.bind_to_thread();
        let _ = self.context.synchronize();
        // SAFETY: registered in `new`; no buffer of the memory is left, and no copy is under way that was given one.
        let _ = unsafe { sys::cuMemHostUnregister(self.addr as *mut c_void) };
        pinned().retain(|range| range.start != self.addr);
    }
}

/// Address of one of [`Tables`].
#[derive(Clone, Copy)]
pub struct TableAddr(pub(super) u64);

/// Small ranges of the device itself, in one allocation.
pub struct Tables {
    region: DeviceRegion,
}

/// Number of sums of squares that are made before the host reads them.
pub(super) const NUM_SUMS: usize = 128;

/// Offsets of the tables: the NF4 code book, its thresholds, the 8-bit dynamic map, partial sums, the workspace of
/// cuBLAS.
const CODEBOOK_AT: u64 = 0;
const THRESHOLDS_AT: u64 = 64;
const MAP_AT: u64 = 256;
const SUMS_AT: u64 = 4096;
const WORKSPACE_AT: u64 = SUMS_AT + (NUM_SUMS * SUM_PARTS * size_of::<f64>()) as u64;

impl Tables {
    /// Allocates and fills them; the context is bound to this thread.
    pub fn new(context: &Arc<CudaContext>) -> Result<Tables> {
        // SAFETY: the sizes below are those of the allocation.
        let addr = unsafe {
            let addr = result::malloc_sync(WORKSPACE_AT as usize + gemm::WORKSPACE_BYTES)
                .map_err(|e| anyhow!("GPU memory for the workspace of cuBLAS: {e}"))?;
            result::memcpy_htod_sync(addr + CODEBOOK_AT, &CODEBOOK).map_err(|e| anyhow!("copy to the GPU: {e}"))?;
            result::memcpy_htod_sync(addr + THRESHOLDS_AT, &THRESHOLDS).map_err(|e| anyhow!("copy to the GPU: {e}"))?;
            result::memcpy_htod_sync(addr + MAP_AT, &*DYNAMIC_MAP).map_err(|e| anyhow!("copy to the GPU: {e}"))?;
            addr
        };
        // A small copy may return while it is still on its way, and other streams do not wait for it.
        context.synchronize().map_err(|e| anyhow!("copy to the GPU: {e}"))?;
        Ok(Tables { region: DeviceRegion { addr, context: context.clone() } })
    }

    /// f32 `[16]`
    pub fn codebook(&self) -> TableAddr {
        TableAddr(self.region.addr + CODEBOOK_AT)
    }

    /// f32 `[15]`
    pub fn thresholds(&self) -> TableAddr {
        TableAddr(self.region.addr + THRESHOLDS_AT)
    }

    /// f32 `[256]`
    pub fn map(&self) -> TableAddr {
        TableAddr(self.region.addr + MAP_AT)
    }

    /// f64 `[SUM_PARTS]`, one of [`NUM_SUMS`] such rows.
    pub fn sums(&self, row: usize) -> TableAddr {
        assert!(row < NUM_SUMS, "row {row} of {NUM_SUMS}");
        TableAddr(self.region.addr + SUMS_AT + (row * SUM_PARTS * size_of::<f64>()) as u64)
    }

    /// [`gemm::WORKSPACE_BYTES`]
    pub fn workspace(&self) -> TableAddr {
        TableAddr(self.region.addr + WORKSPACE_AT)
    }
}

impl<A: HalfType> Cuda<A> {
    /// Copies on the device, on a stream; the lengths must be equal. Values depend on the order of streams, which is
    /// the caller's business; memory does not: it is freed when the GPU is idle.
    pub fn copy_on<T: Element>(
        &self,
        stream: &CudaStream,
        dst: ViewMut<'_, Cuda<A>, T>,
        src: View<'_, Cuda<A>, T>,
    ) -> Result<()> {
        ensure!(dst.len() == src.len(), "copy of {} into {}", src.len(), dst.len());
        if src.is_empty() {
            return Ok(());
        }
        let (to, from, bytes) = (dst.addr() as u64, src.addr() as u64, size_of::<T>() * src.len());
        // SAFETY: the lengths are equal; the borrows keep the ranges apart.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
            .map_err(|e| anyhow!("copy on the GPU: {e}"))
    }

    /// Copies pinned host memory to the device, on a stream; the lengths must be equal.
    ///
    /// # Safety
    /// The call returns before the copy is made: nobody writes to `src` until the stream has passed it.
    pub unsafe fn fetch_on<T: Element>(
        &self,
        stream: &CudaStream,
        dst: ViewMut<'_, Cuda<A>, T>,
        src: View<'_, Cpu, T>,
    ) -> Result<()> {
        ensure!(dst.len() == src.len(), "fetch of {} into {}", src.len(), dst.len());
        if src.is_empty() {
            return Ok(());
        }
        // SAFETY: the lengths are equal; the caller keeps the source as it is, and memory of either kind is freed
        // when the GPU is idle.
        unsafe { result::memcpy_htod_async(dst.addr() as u64, src.host(), stream.cu_stream()) }
            .map_err(|e| anyhow!("copy to the GPU: {e}"))
    }

    /// Copies from the device to pinned host memory, on a stream; the lengths must be equal.
    ///
    /// # Safety
    /// The call returns before the copy is made: nobody reads or writes `dst` until the stream has passed it.
    pub unsafe fn put_on<T: Element>(
        &self,
        stream: &CudaStream,
        dst: ViewMut<'_, Cpu, T>,
        src: View<'_, Cuda<A>, T>,
    ) -> Result<()> {
        ensure!(dst.len() == src.len(), "put of {} into {}", src.len(), dst.len());
        if src.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `fetch_on`, with the caller keeping away from the destination.
        unsafe { result::memcpy_dtoh_async(dst.host_mut(), src.addr() as u64, stream.cu_stream()) }
            .map_err(|e| anyhow!("copy from the GPU: {e}"))
    }

    /// Reads what kernels left in the first rows of [`Tables::sums`]. Waits for the compute stream.
    pub(super) fn read_sums(&self, rows: usize) -> Result<Vec<f64>> {
        ensure!(rows <= NUM_SUMS, "{rows} rows of {NUM_SUMS}");
        let mut sums = vec![0f64; rows * SUM_PARTS];
        if sums.is_empty() {
            return Ok(sums);
        }
        // SAFETY: the range holds as many f64, and the copy is waited for.
        unsafe { result::memcpy_dtoh_async(&mut sums, self.tables.sums(0).0, self.compute.cu_stream()) }
            .map_err(|e| anyhow!("copy from the GPU: {e}"))?;
        self.synchronize()?;
        Ok(sums)
    }

    /// Sets every byte of a range to `byte`, on a stream.
    pub fn fill_on<T: Element>(&self, stream: &CudaStream, dst: ViewMut<'_, Cuda<A>, T>, byte: u8) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is that of the view.
        unsafe { result::memset_d8_async(dst.addr() as u64, byte, size_of::<T>() * dst.len(), stream.cu_stream()) }
            .map_err(|e| anyhow!("fill of GPU memory: {e}"))
    }
}

impl<A: HalfType> Device for Cuda<A> {
    type Act = A;
    type Region = DeviceRegion;
    type Mark = CudaEvent;

    const ACT: Dtype = A::DTYPE;
    const IS_HOST: bool = false;
    const NEEDS_LOSS_SCALING: bool = <A as HalfType>::NEEDS_LOSS_SCALING;

    fn allocate(&self, bytes: usize) -> Result<(DeviceRegion, usize)> {
        let (free, total) = self.free_and_total_bytes()?;
        ensure!(bytes <= free, "{bytes} bytes of GPU memory are needed; {free} of {total} are free");
        // SAFETY: the context is bound to this thread; the memory is freed by the region.
        let addr = unsafe { result::malloc_sync(bytes) }.map_err(|e| anyhow!("{bytes} bytes of GPU memory: {e}"))?;
        Ok((DeviceRegion { addr, context: self.context.clone() }, addr as usize))
    }

    fn pin(&self, region: HostRegion) -> Result<HostRegion> {
        let pin = Pin::new(&self.context, region.addr(), region.bytes())?;
        Ok(region.pinned_by(pin))
    }

    fn used_bytes(&self) -> Result<usize> {
        let (free, total) = self.free_and_total_bytes()?;
        Ok(total - free)
    }

    fn asked(&self) -> Asked {
        asked::asked()
    }

    fn synchronize(&self) -> Result<()> {
        waiting(|| self.compute.synchronize()).map_err(|e| anyhow!("the GPU reports: {e}"))
    }

    fn mark(&self) -> Result<CudaEvent> {
        self.mark_on(&self.compute)
    }

    fn seconds_between(&self, first: &CudaEvent, then: &CudaEvent) -> Result<f64> {
        if !libraries::driver_times_events() {
            return Ok(0.0);
        }
        let ms = first.elapsed_ms(then).map_err(|e| anyhow!("GPU event: {e}"))?;
        Ok(f64::from(ms) * 1e-3)
    }

    fn upload<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: &[T]) -> Result<()> {
        ensure!(dst.len() == src.len(), "upload of {} into {}", src.len(), dst.len());
        if src.is_empty() {
            return Ok(());
        }
        // SAFETY: the lengths are equal; from memory that is not pinned the call returns when the source has been
        // read, and otherwise the copy is waited for below.
        unsafe { result::memcpy_htod_async(dst.addr() as u64, src, self.compute.cu_stream()) }
            .map_err(|e| anyhow!("copy to the GPU: {e}"))?;
        if is_pinned(src) { self.synchronize() } else { Ok(()) }
    }

    fn download<T: Element>(&self, dst: &mut [T], src: View<'_, Self, T>) -> Result<()> {
        ensure!(dst.len() == src.len(), "download of {} into {}", src.len(), dst.len());
        if dst.is_empty() {
            return Ok(());
        }
        // SAFETY: the lengths are equal, and the copy is waited for below.
        unsafe { result::memcpy_dtoh_async(dst, src.addr() as u64, self.compute.cu_stream()) }
            .map_err(|e| anyhow!("copy from the GPU: {e}"))?;
        self.synchronize()
    }

    fn copy<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: View<'_, Self, T>) -> Result<()> {
        self.copy_on(&self.compute, dst, src)
    }

    fn fill_bytes<T: Element>(&self, dst: ViewMut<'_, Self, T>, byte: u8) -> Result<()> {
        self.fill_on(&self.compute, dst, byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_that_touches_pinned_memory_is_known() {
        let memory = vec![0u32; 64];
        let begin = memory.as_ptr() as usize;
        pinned().push(begin + 64..begin + 128);
        assert!(!is_pinned(&memory[..16]) && is_pinned(&memory[..17]) && is_pinned(&memory[20..22]));
        assert!(is_pinned(&memory[31..]) && !is_pinned(&memory[32..]));
        pinned().retain(|range| range.start != begin + 64);
        assert!(!is_pinned(&memory));
    }
}
