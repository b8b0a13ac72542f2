//! Matrix products, by cuBLAS: 16-bit operands, f32 accumulation.

use std::ffi::c_void;
use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use cudarc::cublas::{result, sys};
use cudarc::driver::CudaStream;

use crate::device::{Element, Gemm, GemmOps, Transpose, View, ViewMut};

use super::memory::Tables;
use super::{Cuda, HalfType, asked};

/// Workspace of cuBLAS; one of a fixed size makes its choice of algorithm the same on every run.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// cuBLAS bound to one stream.
pub struct Blas {
    handle: sys::cublasHandle_t,
    /// The handle uses these for as long as it lives.
    _stream: Arc<CudaStream>,
    _workspace: Arc<Tables>,
}

// SAFETY: the handle is used by one thread at a time: `Cuda` is owned by the engine of one rank.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub fn new(stream: Arc<CudaStream>, tables: Arc<Tables>) -> Result<Blas> {
        let handle = result::create_handle().map_err(|e| anyhow!("cuBLAS: {e:?}"))?;
        // SAFETY: stream and workspace are kept beside the handle.
        unsafe {
            result::set_stream(handle, stream.cu_stream().cast()).map_err(|e| anyhow!("cuBLAS: {e:?}"))?;
            sys::cublasSetWorkspace_v2(handle, tables.workspace().0 as *mut c_void, WORKSPACE_BYTES)
                .result()
                .map_err(|e| anyhow!("cuBLAS: {e:?}"))?;
            // Partial sums of a product split over k stay f32: rounded to 16 bits they would cost three times its
            // error.
            sys::cublasSetMathMode(handle, sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)
                .result()
                .map_err(|e| anyhow!("cuBLAS: {e:?}"))?;
        }
        Ok(Blas { handle, _stream: stream, _workspace: tables })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created in `new`, used no more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// cuBLAS's name of an element type.
pub trait BlasType: Element {
    const TYPE: sys::cudaDataType;
}
impl BlasType for half::bf16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType_t::CUDA_R_16BF;
}
impl BlasType for half::f16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType_t::CUDA_R_16F;
}
impl BlasType for f32 {
    const TYPE: sys::cudaDataType = sys::cudaDataType_t::CUDA_R_32F;
}

impl<A: HalfType> GemmOps for Cuda<A> {
    fn gemm(&self, args: Gemm<'_, Cuda<A>, A, A, A>) -> Result<()> {
        self.product(args)
    }

    fn gemm_grad(&self, args: Gemm<'_, Cuda<A>, A, A, f32>) -> Result<()> {
        self.product(args)
    }
}

impl<A: HalfType> Cuda<A> {
    /// [`Gemm`] with C in either type.
    fn product<C: BlasType>(&self, args: Gemm<'_, Cuda<A>, A, A, C>) -> Result<()> {
        args.check()?;
        let Gemm { c, a, b, transpose_a, transpose_b, m, n, k, alpha, beta } = args;
        let b_stride = if transpose_b == Transpose::Yes { k } else { n };
        let a_stride = if transpose_a == Transpose::Yes { m } else { k };
        self.gemm_strided(c, (a, a_stride, transpose_a), (b, b_stride, transpose_b), [m, n, k], alpha, beta)
    }

    /// [`Gemm`] with operands whose rows are apart by a stride.
    pub(super) fn gemm_strided<C: BlasType>(
        &self,
        c: ViewMut<'_, Cuda<A>, C>,
        (a, a_stride, transpose_a): (View<'_, Cuda<A>, A>, usize, Transpose),
        (b, b_stride, transpose_b): (View<'_, Cuda<A>, A>, usize, Transpose),
        [m, n, k]: [usize; 3],
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        if m == 0 || n == 0 {
            return Ok(());
        }
        let operation = |transpose| match transpose {
            Transpose::No => sys::cublasOperation_t::CUBLAS_OP_N,
            Transpose::Yes => sys::cublasOperation_t::CUBLAS_OP_T,
        };
        let int = |size: usize| i32::try_from(size);
        let operand = A::TYPE;
        let reach = |stride: usize, transpose, rows: usize, columns: usize| match (transpose, rows * columns) {
            (_, 0) => 0,
            (Transpose::No, _) => (rows - 1) * stride + columns,
            (Transpose::Yes, _) => (columns - 1) * stride + rows,
        };
        ensure!(
            m * n <= c.len()
                && reach(a_stride, transpose_a, m, k) <= a.len()
                && reach(b_stride, transpose_b, k, n) <= b.len(),
            "gemm m {m} n {n} k {k}: strides a {a_stride} b {b_stride} reach beyond a {} or b {}, or c {} is too short",
            a.len(),
            b.len(),
            c.len()
        );
        asked::launched();
        // SAFETY: cuBLAS counts in columns, so that it sees Cᵀ = op(B)ᵀ · op(A)ᵀ of the same memory; sizes and
        // strides were checked against the views; alpha and beta are read before the call returns.
        unsafe {
            result::gemm_ex(
                self.blas.handle,
                operation(transpose_b),
                operation(transpose_a),
                int(n)?,
                int(m)?,
                int(k)?,
                std::ptr::from_ref(&alpha).cast(),
                b.addr() as *const c_void,
                operand,
                int(b_stride)?,
                a.addr() as *const c_void,
                operand,
                int(a_stride)?,
                std::ptr::from_ref(&beta).cast(),
                c.addr() as *mut c_void,
                C::TYPE,
                int(n)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| anyhow!("matrix product [{m}, {k}] x [{k}, {n}]: {e:?}"))
    }
}
