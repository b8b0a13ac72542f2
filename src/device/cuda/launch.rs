//! The one place that starts kernels.

use std::ffi::c_void;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaFunction, CudaStream, result, sys};

use crate::device::{Element, View, ViewMut};

use super::memory::TableAddr;
use super::{Cuda, HalfType, asked};

/// One argument of a kernel, in the low bytes: an address, a number, an array of structs or a tensor map.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Arg([u64; 16]);
const _: () = assert!(size_of::<Arg>() == size_of::<sys::CUtensorMap>());

impl Arg {
    fn bits(bits: u64) -> Arg {
        let mut arg = [0; 16];
        arg[0] = bits;
        Arg(arg)
    }
}

macro_rules! number_args {
    ($($t:ty: $bits:expr),*) => {
        $(impl From<$t> for Arg {
            fn from(value: $t) -> Arg {
                let bits: fn($t) -> u64 = $bits;
                Arg::bits(bits(value))
            }
        })*
    };
}
number_args!(u32: u64::from, u64: |v| v, i32: |v| u64::from(v as u32), f32: |v| u64::from(v.to_bits()));

impl<A: HalfType, T: Element> From<View<'_, Cuda<A>, T>> for Arg {
    fn from(view: View<'_, Cuda<A>, T>) -> Arg {
        Arg::bits(view.addr() as u64)
    }
}

impl<A: HalfType, T: Element> From<ViewMut<'_, Cuda<A>, T>> for Arg {
    fn from(view: ViewMut<'_, Cuda<A>, T>) -> Arg {
        Arg::bits(view.addr() as u64)
    }
}

/// An optional view: address 0 stands for `None`.
impl<A: HalfType, T: Element> From<Option<View<'_, Cuda<A>, T>>> for Arg {
    fn from(view: Option<View<'_, Cuda<A>, T>>) -> Arg {
        Arg::bits(view.map_or(0, |view| view.addr() as u64))
    }
}

/// An array of structs of three words, no more than five of them.
impl From<&[[u64; 3]]> for Arg {
    fn from(structs: &[[u64; 3]]) -> Arg {
        let (words, mut arg) = (structs.as_flattened(), [0; 16]);
        arg[..words.len()].copy_from_slice(words);
        Arg(arg)
    }
}

impl From<TableAddr> for Arg {
    fn from(addr: TableAddr) -> Arg {
        Arg::bits(addr.0)
    }
}

/// The tensor map that a Hopper's copies need, of a matrix whose rows are `width` elements of 16 bits: boxes of 64 rows and as many
/// columns as `hopper.cuh` has in a row of a tile `[.., tile_width]`. A part of a box that lies outside of the matrix becomes zeros.
pub(super) fn tile_map<A: HalfType>(matrix: View<'_, Cuda<A>, A>, width: usize, tile_width: usize) -> Result<Arg> {
    let (columns, swizzle) = if tile_width.is_multiple_of(64) {
        (64, sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B)
    } else {
        (32, sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B)
    };
    ensure!(
        matrix.addr().is_multiple_of(16) && width.is_multiple_of(8),
        "a matrix at {:x} of width {width}, allowed: multiples of 16 and 8",
        matrix.addr()
    );
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays have the lengths that two dimensions take (one stride); the map is written, the matrix is
    // not read.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            matrix.addr() as *mut c_void,
            [width as u64, (matrix.len() / width) as u64].as_ptr(),
            [(width * size_of::<A>()) as u64].as_ptr(),
            [columns as u32, 64].as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    encoded.result().map_err(|e| anyhow!("a tensor map of {} × {width}: {e}", matrix.len() / width))?;
    Ok(Arg(map.opaque))
}

/// The threads of a launch: blocks (x, y), threads of a block, dynamic shared memory.
#[derive(Clone, Copy)]
pub struct Grid {
    pub blocks: (usize, usize),
    pub threads: u32,
    pub shared_bytes: u32,
}

impl Grid {
    /// Makes blocks of 256 threads, one thread an element; where these are too many, the kernels loop.
    pub fn elements(len: usize) -> Grid {
        Grid { blocks: (len.div_ceil(256).min(1 << 20), 1), threads: 256, shared_bytes: 0 }
    }

    /// Makes one block of 256 threads a row.
    pub fn rows(num_rows: usize) -> Grid {
        Grid { blocks: (num_rows, 1), threads: 256, shared_bytes: 0 }
    }
}

/// An argument list for [`Cuda::launch`].
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(crate::device::cuda::launch::Arg::from($arg)),*] };
}
pub(super) use args;

impl<A: HalfType> Cuda<A> {
    /// Starts a kernel on the compute stream; a grid without blocks starts none.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, in its order, and what it reaches through them, in a grid of
    /// this size, lies in the views that they were made of. Memory is freed when the GPU is idle, so that views need
    /// not outlive the call.
    pub(super) unsafe fn launch<const N: usize>(&self, name: &str, grid: Grid, args: [Arg; N]) -> Result<()> {
        // SAFETY: the caller's duty.
        unsafe { self.launch_on(&self.compute, name, grid, args) }
    }

    /// Starts a kernel on a stream.
    ///
    /// # Safety
    /// The caller's duty is that of [`Cuda::launch`].
    pub(super) unsafe fn launch_on<const N: usize>(
        &self,
        stream: &CudaStream,
        name: &str,
        grid: Grid,
        args: [Arg; N],
    ) -> Result<()> {
        let kernel = self.kernels.common.get(name).with_context(|| format!("no kernel is named {name}"))?;
        // SAFETY: the caller's duty.
        unsafe { launch_kernel(stream, kernel, name, grid, args) }
    }
}

/// Starts a kernel, `name` in errors, on a stream; none for a grid without blocks.
///
/// # Safety
/// As for [`Cuda::launch`].
pub(super) unsafe fn launch_kernel<const N: usize>(
    stream: &CudaStream,
    kernel: &CudaFunction,
    name: &str,
    grid: Grid,
    args: [Arg; N],
) -> Result<()> {
    if grid.blocks.0 == 0 || grid.blocks.1 == 0 {
        return Ok(());
    }
    let mut pointers = args.each_ref().map(|arg| std::ptr::from_ref(&arg.0).cast::<c_void>().cast_mut());
    let (x, y) = (u32::try_from(grid.blocks.0)?, u32::try_from(grid.blocks.1)?);
    // SAFETY: the caller vouches for the arguments; each is as large as any that a kernel declares.
    let launched = unsafe {
        result::launch_kernel(
            kernel.cu_function(),
            (x, y, 1),
            (grid.threads, 1, 1),
            grid.shared_bytes,
            stream.cu_stream(),
            &mut pointers,
        )
    };
    asked::launched();
    launched.map_err(|e| anyhow!("kernel {name}: {e}"))
}

/// Allows a kernel more dynamic shared memory than the 48 KiB that every kernel may have.
pub(super) fn allow_shared_bytes(kernel: &CudaFunction, name: &str, bytes: u32) -> Result<()> {
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.set_attribute(attribute, bytes as i32).map_err(|e| anyhow!("{bytes} bytes of shared memory for {name}: {e}"))
}
