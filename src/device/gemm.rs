//! Matrix products.

use anyhow::{Result, ensure};

use super::{Device, Element, View, ViewMut};

/// One operand of [`GemmOps::gemm`] as it lies in memory, or transposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transpose {
    No,
    Yes,
}

/// C = alpha · op(A) · op(B) + beta · C, accumulated in f32. op(A) is `[m, k]`, op(B) `[k, n]`, C `[m, n]`.
/// With beta = 0, C is not read.
pub struct Gemm<'a, D, A, B, C> {
    pub c: ViewMut<'a, D, C>,
    pub a: View<'a, D, A>,
    pub b: View<'a, D, B>,
    pub transpose_a: Transpose,
    pub transpose_b: Transpose,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: f32,
    pub beta: f32,
}

/// Matrix products of activations.
pub trait GemmOps: Device {
    /// The product in the activation type, see [`Gemm`].
    fn gemm(&self, args: Gemm<'_, Self, Self::Act, Self::Act, Self::Act>) -> Result<()>;
    /// The product in f32, such as the gradient of a parameter, see [`Gemm`].
    fn gemm_grad(&self, args: Gemm<'_, Self, Self::Act, Self::Act, f32>) -> Result<()>;

    /// logits = x · Wᵀ in f32: x `[N, H]`, W `[rows, H]`, logits `[N, rows]`.
    fn logits(
        &self,
        logits: ViewMut<'_, Self, f32>,
        x: View<'_, Self, Self::Act>,
        weight: View<'_, Self, Self::Act>,
        hidden_size: usize,
    ) -> Result<()> {
        let (m, n, k) = (x.len() / hidden_size, weight.len() / hidden_size, hidden_size);
        let (transpose_a, transpose_b) = (Transpose::No, Transpose::Yes);
        self.gemm_grad(Gemm { c: logits, a: x, b: weight, transpose_a, transpose_b, m, n, k, alpha: 1.0, beta: 0.0 })
    }
}

impl<D: Device, A: Element, B: Element, C: Element> Gemm<'_, D, A, B, C> {
    /// Checks the lengths of the three matrices.
    pub(super) fn check(&self) -> Result<()> {
        let Gemm { m, n, k, .. } = *self;
        let [a, b, c] = [self.a.len(), self.b.len(), self.c.len()];
        ensure!([c, a, b] == [m * n, m * k, k * n], "gemm m {m} n {n} k {k}: lengths c {c} a {a} b {b}");
        Ok(())
    }
}

/// c `[m, n]` = alpha · a `[m, k]` · b + beta · c, where b is `[k, n]` after its transposition.
pub fn product<D: GemmOps>(
    ops: &D,
    c: ViewMut<'_, D, D::Act>,
    a: View<'_, D, D::Act>,
    (b, transpose_b): (View<'_, D, D::Act>, Transpose),
    [m, n, k]: [usize; 3],
    alpha: f32,
    beta: f32,
) -> Result<()> {
    ops.gemm(Gemm { c, a, b, transpose_a: Transpose::No, transpose_b, m, n, k, alpha, beta })
}
