//! The ops: one struct per kernel, whose comments are the contract (formula, shapes, what may alias), outputs first.
//!
//! T tokens, H hidden size. All matrices are row-major. `Act` is the device's activation type; statistics, losses and
//! gradients of parameters are f32. A T of 0 is allowed everywhere and does nothing.

use anyhow::Result;

pub use super::attention::*;
use super::{Device, View, ViewMut, lora};
use crate::quant::record::Encoding;

/// A sum of squares is that of so many parts of equal length, one after the other; each is that of so many lanes: lane i sums
/// elements i, i + SUM_LANES, …, and then the upper half of the lanes is added to the lower until one is left.
pub const SUM_PARTS: usize = 128;
pub const SUM_LANES: usize = 1024;

/// One operand of [`Ops::gemm`] as it lies in memory, or transposed.
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

/// Records of one tensor, back to back, to dense weights (`quant::record` has the byte layout). The number of weights is
/// that of `weights`; every record but the last holds `RECORD_WEIGHTS` of them.
pub struct Dequantize<'a, D, T> {
    pub weights: ViewMut<'a, D, T>,
    pub records: View<'a, D, u8>,
    pub encoding: Encoding,
}

/// Codes and absmax of a tensor of n weights ([`crate::quant::nf4`]): codes u8 `[ceil(n / 2)]`, the first weight in the high
/// nibble; absmax f32 `[ceil(n / 64)]`.
pub struct QuantizeNf4<'a, D> {
    pub codes: ViewMut<'a, D, u8>,
    pub absmax: ViewMut<'a, D, f32>,
    pub weights: View<'a, D, f32>,
}

/// absmax − offset in 8 bits ([`crate::quant::double`]): codes u8 and absmax f32 `[n]`, nested_absmax f32 `[ceil(n / 256)]`.
pub struct QuantizeAbsmax<'a, D> {
    pub codes: ViewMut<'a, D, u8>,
    pub nested_absmax: ViewMut<'a, D, f32>,
    pub absmax: View<'a, D, f32>,
    pub offset: f32,
}

/// `y[i]` = a number in ±half_width that looks random and depends on seed (below 2²⁴) and first + i alone.
pub struct Uniform<'a, D> {
    pub y: ViewMut<'a, D, f32>,
    pub seed: u64,
    pub first: u64,
    pub half_width: f32,
}

/// y = x · rstd · weight per row, rstd = 1 / sqrt(mean(x²) + eps). x, y `[T, H]`; rstd `[T]`; weight `[H]`.
pub struct RmsNormForward<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub rstd: ViewMut<'a, D, f32>,
    pub x: Normed<'a, D>,
    pub weight: View<'a, D, f32>,
    pub eps: f32,
}

/// The input of a norm, `[T, H]`.
pub enum Normed<'a, D: Device> {
    Plain(View<'a, D, D::Act>),
    /// sum += addend first: the residual stream.
    Sum {
        sum: ViewMut<'a, D, D::Act>,
        addend: View<'a, D, D::Act>,
    },
}

impl<D: Device> Normed<'_, D> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Normed::Plain(x) => x.len(),
            Normed::Sum { sum, .. } => sum.len(),
        }
    }

    /// True for an input of no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// d_x += rstd · (d_y·w − x · rstd² · mean(d_y·w·x)) per row. All `[T, H]`; d_x holds the residual's gradient before.
pub struct RmsNormBackward<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub d_y: View<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub rstd: View<'a, D, f32>,
    pub weight: View<'a, D, f32>,
}

/// Rotates each head's pairs (i, i + head_dim/2) in place, as `transformers` pairs them; `inverse` rotates back, which
/// is the backward. x `[T, num_heads · head_dim]`; cos, sin `[T, head_dim / 2]` with any attention scaling in them.
pub struct Rope<'a, D: Device> {
    pub x: ViewMut<'a, D, D::Act>,
    pub cos: View<'a, D, f32>,
    pub sin: View<'a, D, f32>,
    pub num_heads: usize,
    pub head_dim: usize,
    pub inverse: bool,
}

/// y = silu(gate) · up, elementwise.
pub struct SwigluForward<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub gate: View<'a, D, D::Act>,
    pub up: View<'a, D, D::Act>,
}

/// d_gate = d_y · up · silu'(gate), d_up = d_y · silu(gate).
pub struct SwigluBackward<'a, D: Device> {
    pub d_gate: ViewMut<'a, D, D::Act>,
    pub d_up: ViewMut<'a, D, D::Act>,
    pub d_y: View<'a, D, D::Act>,
    pub gate: View<'a, D, D::Act>,
    pub up: View<'a, D, D::Act>,
}

/// One piece of the vocabulary of a streaming cross-entropy, in the manner of flash attention. With logits = x · Wᵀ of
/// this piece: the running maximum and sum of exponentials are updated; acc = acc · exp(old max − new max) +
/// exp(logits − new max) · W; target_logit is set where the target lies in the piece. x `[N, H]`, W `[rows, H]`,
/// acc `[N, H]` f32; max, sum, target_logit, target_ids `[N]`; `logits` is scratch `[N, rows]`.
/// Before the first piece max = −∞, sum = 0, acc = 0. Without `acc` only the log-probability is wanted.
pub struct CrossEntropyPiece<'a, D: Device> {
    pub max: ViewMut<'a, D, f32>,
    pub sum: ViewMut<'a, D, f32>,
    pub target_logit: ViewMut<'a, D, f32>,
    pub acc: Option<ViewMut<'a, D, f32>>,
    pub logits: ViewMut<'a, D, f32>,
    pub x: View<'a, D, D::Act>,
    pub weight: View<'a, D, D::Act>,
    pub target_ids: View<'a, D, u32>,
    /// Vocabulary id of the piece's first row.
    pub first_id: usize,
}

/// `target_rows[i] = W[target]` where the target of row i lies in this piece, `[N, H]`; other rows are left as they are. The
/// rows are kept apart from `acc`, which is rescaled until the last piece.
pub struct GatherTargetRows<'a, D: Device> {
    pub target_rows: ViewMut<'a, D, D::Act>,
    pub weight: View<'a, D, D::Act>,
    pub target_ids: View<'a, D, u32>,
    pub first_id: usize,
}

/// `d_x = coefficient · (acc / sum − W[target])` per row, `[N, H]`: the gradient of −coefficient · log p(target).
pub struct CrossEntropyFinish<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub acc: View<'a, D, f32>,
    pub sum: View<'a, D, f32>,
    pub target_rows: View<'a, D, D::Act>,
    pub coefficients: View<'a, D, f32>,
}

/// Names one dropout mask: the element (token, feature) is kept or dropped by a number that depends on the seed, the
/// step, the token's global sample and position, the module and the feature, and on nothing else.
pub struct DropoutMask<'a, D> {
    pub probability: f32,
    pub seed: u64,
    pub step: u32,
    /// layer · 7 + projection.
    pub module: u32,
    /// Global sample of each token, `[T]`.
    pub sample_idx: View<'a, D, u64>,
    /// Position of each token in its document, `[T]`.
    pub positions: View<'a, D, u32>,
}

impl<D> Clone for DropoutMask<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for DropoutMask<'_, D> {}

impl<D> DropoutMask<'_, D> {
    /// 16-bit threshold below which an element is dropped, and 1 / (1 − p).
    pub fn threshold_and_scale(&self) -> (u32, f32) {
        ((self.probability * 65_536.0).round() as u32, 1.0 / (1.0 - self.probability))
    }
}

/// y = x · mask / (1 − p), or, with `accumulate`, y += x · mask / (1 − p). x, y `[T, features]`.
pub struct LoraDropout<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub mask: DropoutMask<'a, D>,
    pub accumulate: bool,
}

/// y = x · Wᵀ + bias + scale · u · Bᵀ. x `[T, in]`, W `[out, in]`, bias `[out]`, u `[T, r]`, B `[out, r]`, y `[T, out]`. The order of
/// these sums is the device's own.
pub struct LoraLinear<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub weight: View<'a, D, D::Act>,
    pub bias: Option<View<'a, D, f32>>,
    pub u: View<'a, D, D::Act>,
    pub b: View<'a, D, D::Act>,
    pub lora_rank: usize,
    pub scale: f32,
}

/// u = dropout(x) · Aᵀ, without dropout where there is no mask. x `[T, in]`, A `[r, in]`, u `[T, r]`; scratch is at least as long as x.
pub struct LoraDown<'a, D: Device> {
    pub u: ViewMut<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// d_A += d_uᵀ · dropout(x) in f32. d_u `[T, r]`, x `[T, in]`, d_A `[r, in]`; scratch is at least as long as x.
pub struct LoraGradA<'a, D: Device> {
    pub d_a: ViewMut<'a, D, f32>,
    pub d_u: View<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// d_x += mask ∘ (d_u · A). d_u `[T, r]`, A `[r, in]`, d_x `[T, in]`; scratch is at least as long as d_x.
pub struct LoraGradX<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub d_u: View<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// One AdamW update as `torch.optim.AdamW` does it (decoupled decay, bias correction), all f32 and of one length.
pub struct AdamW<'a, D> {
    pub param: ViewMut<'a, D, f32>,
    pub exp_avg: ViewMut<'a, D, f32>,
    pub exp_avg_sq: ViewMut<'a, D, f32>,
    pub grad: View<'a, D, f32>,
    /// Multiplies the gradient first (clipping).
    pub grad_scale: f32,
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// 1 at the first update.
    pub step: u32,
}

/// One method per kernel. Every call is checked against the sizes of its contract before anything is written.
pub trait Ops: AttentionOps {
    /// Matrix product of activations, see [`Gemm`].
    fn gemm(&self, args: Gemm<'_, Self, Self::Act, Self::Act, Self::Act>) -> Result<()>;
    /// Matrix product that accumulates the gradient of a parameter in f32, see [`Gemm`].
    fn gemm_grad(&self, args: Gemm<'_, Self, Self::Act, Self::Act, f32>) -> Result<()>;
    fn dequantize(&self, args: Dequantize<'_, Self, Self::Act>) -> Result<()>;
    /// The same to f32: norms and biases.
    fn dequantize_f32(&self, args: Dequantize<'_, Self, f32>) -> Result<()>;
    fn quantize_nf4(&self, args: QuantizeNf4<'_, Self>) -> Result<()>;
    fn quantize_absmax(&self, args: QuantizeAbsmax<'_, Self>) -> Result<()>;
    fn uniform(&self, args: Uniform<'_, Self>) -> Result<()>;
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Self>) -> Result<()>;
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()>;
    fn rope(&self, args: Rope<'_, Self>) -> Result<()>;
    fn swiglu_forward(&self, args: SwigluForward<'_, Self>) -> Result<()>;
    fn swiglu_backward(&self, args: SwigluBackward<'_, Self>) -> Result<()>;
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Self>) -> Result<()>;
    fn gather_target_rows(&self, args: GatherTargetRows<'_, Self>) -> Result<()>;
    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Self>) -> Result<()>;
    fn lora_dropout(&self, args: LoraDropout<'_, Self>) -> Result<()>;
    fn lora_linear(&self, args: LoraLinear<'_, Self>) -> Result<()> {
        lora::linear(self, args)
    }
    fn lora_down(&self, args: LoraDown<'_, Self>) -> Result<()> {
        lora::down(self, args)
    }
    fn lora_grad_a(&self, args: LoraGradA<'_, Self>) -> Result<()> {
        lora::grad_a(self, args)
    }
    fn lora_grad_x(&self, args: LoraGradX<'_, Self>) -> Result<()> {
        lora::grad_x(self, args)
    }
    fn adamw(&self, args: AdamW<'_, Self>) -> Result<()>;
    /// Sum of squares in f64, always in the same order ([`SUM_PARTS`], [`SUM_LANES`]). Waits for the compute queue.
    fn sum_of_squares(&self, x: View<'_, Self, f32>) -> Result<f64>;
    /// y += x.
    fn add(&self, y: ViewMut<'_, Self, Self::Act>, x: View<'_, Self, Self::Act>) -> Result<()>;
    /// Each row of x `[T, features]` += bias `[features]`.
    fn add_bias(&self, x: ViewMut<'_, Self, Self::Act>, bias: View<'_, Self, f32>) -> Result<()>;
    /// y = x in the activation type.
    fn cast(&self, y: ViewMut<'_, Self, Self::Act>, x: View<'_, Self, f32>) -> Result<()>;
    /// y = x on the host, in the activation type; of one length.
    fn round(y: &mut [Self::Act], x: &[f32]);
    /// `y[i] = x[rows[i]]`; rows of `width`.
    fn gather_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()>;
    /// `y = 0`, then `y[rows[i]] = x[i]`; rows of `width`, all different.
    fn scatter_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()>;
    /// logits = x · Wᵀ in f32: x `[N, H]`, W `[rows, H]`, logits `[N, rows]`.
    fn logits(
        &self,
        logits: ViewMut<'_, Self, f32>,
        x: View<'_, Self, Self::Act>,
        weight: View<'_, Self, Self::Act>,
        hidden_size: usize,
    ) -> Result<()>;
}
