//! Matrix products, by the `gemm` crate.
#![expect(unsafe_code, reason = "calls a matrix product on raw pointers")]

use anyhow::Result;

use crate::device::{Gemm, GemmOps, Transpose};

use super::Cpu;

impl GemmOps for Cpu {
    fn gemm(&self, args: Gemm<'_, Cpu, f32, f32, f32>) -> Result<()> {
        args.check()?;
        let Gemm { c, a, b, transpose_a, transpose_b, m, n, k, alpha, beta } = args;
        let a = (a.host(), strides(transpose_a, m, k));
        let b = (b.host(), strides(transpose_b, k, n));
        let parallelism =
            if self.num_threads > 1 { gemm::Parallelism::Rayon(self.num_threads) } else { gemm::Parallelism::None };
        gemm_strided(c.host_mut(), n, a, b, [m, n, k], alpha, beta, parallelism);
        Ok(())
    }

    fn gemm_grad(&self, args: Gemm<'_, Cpu, f32, f32, f32>) -> Result<()> {
        self.gemm(args)
    }
}

/// C `[m, n]` = A `[m, k]` · B `[k, n]`, all in row-major order, on all threads of the current pool.
pub fn product(c: &mut [f32], a: &[f32], b: &[f32], [m, n, k]: [usize; 3]) {
    gemm_strided(c, n, (a, (k, 1)), (b, (n, 1)), [m, n, k], 1.0, 0.0, gemm::Parallelism::Rayon(0));
}

/// (row stride, column stride) of an operand that is `[rows, columns]` after any transposition.
pub(super) fn strides(transpose: Transpose, rows: usize, columns: usize) -> (usize, usize) {
    match transpose {
        Transpose::No => (columns, 1),
        Transpose::Yes => (1, rows),
    }
}

/// C `[m, n]` with rows `c_stride` apart = alpha·A·B + beta·C, A and B with (row, column) strides.
#[allow(clippy::too_many_arguments)]
pub(super) fn gemm_strided(
    c: &mut [f32],
    c_stride: usize,
    (a, a_strides): (&[f32], (usize, usize)),
    (b, b_strides): (&[f32], (usize, usize)),
    [m, n, k]: [usize; 3],
    alpha: f32,
    beta: f32,
    parallelism: gemm::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last = |(rs, cs): (usize, usize), rows: usize, columns: usize| match rows * columns {
        0 => 0,
        _ => (rows - 1) * rs + (columns - 1) * cs + 1,
    };
    assert!(last((c_stride, 1), m, n) <= c.len(), "C [{m}, {n}] with stride {c_stride} in {} elements", c.len());
    assert!(last(a_strides, m, k) <= a.len() && last(b_strides, k, n) <= b.len(), "operands of gemm {m}x{n}x{k}");
    // SAFETY: the asserts above bound every element that the strides reach; C is exclusively borrowed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            beta != 0.0,
            a.as_ptr(),
            a_strides.1 as isize,
            a_strides.0 as isize,
            b.as_ptr(),
            b_strides.1 as isize,
            b_strides.0 as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_transpositions_and_accumulation() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32).sin()).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i as f32).cos()).collect();
        for ta in [Transpose::No, Transpose::Yes] {
            for tb in [Transpose::No, Transpose::Yes] {
                let (sa, sb) = (strides(ta, m, k), strides(tb, k, n));
                let mut c = vec![1.0; m * n];
                gemm_strided(&mut c, n, (&a, sa), (&b, sb), [m, n, k], 2.0, 1.0, gemm::Parallelism::None);
                for i in 0..m {
                    for j in 0..n {
                        let dot: f32 = (0..k).map(|l| a[i * sa.0 + l * sa.1] * b[l * sb.0 + j * sb.1]).sum();
                        assert!((c[i * n + j] - (2.0 * dot + 1.0)).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
