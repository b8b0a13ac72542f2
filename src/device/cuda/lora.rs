//! LoRA's products and dropout: the masks of `cpu/lora.rs`, the formulas of `device/lora.rs`.

use anyhow::{Result, ensure};

use crate::device::{
    DropoutMask, ElementwiseOps, LoraDown, LoraDropout, LoraGradA, LoraGradX, LoraLinear, LoraOps, Transpose::Yes,
    lora, product,
};

use super::launch::{Arg, Grid, args};
use super::{Cuda, HalfType};

/// The kernels of one rank of LoRA.
#[derive(Clone, Copy)]
struct Kernels {
    lora_rank: usize,
    down: &'static str,
    grad_a: &'static str,
    grad_x: &'static str,
    /// Tokens of a block of `down`.
    down_tokens: usize,
    /// Threads of a block of `down` and of `grad_a`.
    threads: u32,
}

impl Kernels {
    const ALL: [Kernels; 4] = [
        Kernels::new(8, ["lora_down_8", "lora_grad_a_8", "lora_grad_x_8"], 16, 512),
        Kernels::new(16, ["lora_down_16", "lora_grad_a_16", "lora_grad_x_16"], 16, 512),
        Kernels::new(32, ["lora_down_32", "lora_grad_a_32", "lora_grad_x_32"], 32, 256),
        Kernels::new(64, ["lora_down_64", "lora_grad_a_64", "lora_grad_x_64"], 32, 256),
    ];

    const fn new(lora_rank: usize, names: [&'static str; 3], down_tokens: usize, threads: u32) -> Kernels {
        let [down, grad_a, grad_x] = names;
        Kernels { lora_rank, down, grad_a, grad_x, down_tokens, threads }
    }

    /// The kernels for a rank and a number of features, if there are any.
    fn find(lora_rank: usize, features: usize) -> Option<Kernels> {
        Kernels::ALL.into_iter().find(|kernels| kernels.lora_rank == lora_rank && features.is_multiple_of(8))
    }
}

/// Features of a block of `lora_grad_a`.
const GRAD_A_FEATURES: usize = 32;
/// Tokens and features of a block of `lora_grad_x`.
const GRAD_X_TOKENS: usize = 64;
const GRAD_X_FEATURES: usize = 256;

/// The seven arguments of a mask; a kernel without dropout gets null pointers and a scale of 1.
fn mask_args<A: HalfType>(mask: Option<DropoutMask<'_, Cuda<A>>>) -> [Arg; 7] {
    let (module, step, seed) = mask.map_or((0, 0, 0), |mask| (mask.module, mask.step, mask.seed));
    let (threshold, scale) = mask.map_or((0, 1.0), |mask| mask.threshold_and_scale());
    let (sample_idx, positions) = (mask.map(|mask| mask.sample_idx), mask.map(|mask| mask.positions));
    args![sample_idx, positions, seed, module, step, threshold, scale]
}

impl<A: HalfType> LoraOps for Cuda<A> {
    fn lora_dropout(&self, args: LoraDropout<'_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        ensure!(features.is_multiple_of(8), "lora_dropout: {features} features, allowed: a multiple of 8");
        let LoraDropout { y, x, mask, accumulate } = args;
        let (eights, row, accumulate) = (tokens * features / 8, (features / 8) as u32, u32::from(accumulate));
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(Some(mask));
        let args =
            args![y, x, sample_idx, positions, seed, module, step, threshold, scale, eights as u64, row, accumulate];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("lora_dropout", Grid::elements(eights), args) }
    }

    /// LoRA's part is written first, and the base product adds to it: one pass over y less than a second sum would take.
    fn lora_linear(&self, args: LoraLinear<'_, Cuda<A>>) -> Result<()> {
        let [m, n, k] = args.sizes()?;
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale, output_scale } = args;
        product(self, y.range_mut(0..m * n), u, (b, Yes), [m, n, r], output_scale * scale, 0.0)?;
        product(self, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], output_scale, 1.0)?;
        bias.map_or(Ok(()), |bias| self.add_bias(y, bias, output_scale))
    }

    fn lora_down(&self, args: LoraDown<'_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::down(self, args) };
        let LoraDown { u, x, a, mask, .. } = args;
        let grid = Grid { threads: kernels.threads, ..Grid::rows(tokens.div_ceil(kernels.down_tokens)) };
        // SAFETY: the lengths were checked above; the kernel writes u and reads x and A.
        unsafe { self.launch_product(kernels.down, grid, args![u, x, a], mask, [tokens, features]) }
    }

    fn lora_grad_a(&self, args: LoraGradA<'_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::grad_a(self, args) };
        let LoraGradA { d_a, d_u, x, mask, .. } = args;
        let grid = Grid { threads: kernels.threads, ..Grid::rows(features.div_ceil(GRAD_A_FEATURES)) };
        // SAFETY: the lengths were checked above; the kernel adds to d_a and reads d_u and x.
        unsafe { self.launch_product(kernels.grad_a, grid, args![d_a, d_u, x], mask, [tokens, features]) }
    }

    fn lora_grad_x(&self, args: LoraGradX<'_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::grad_x(self, args) };
        let LoraGradX { d_x, d_u, a, mask, .. } = args;
        let blocks = (tokens.div_ceil(GRAD_X_TOKENS), features.div_ceil(GRAD_X_FEATURES));
        let grid = Grid { blocks, threads: 256, shared_bytes: 0 };
        // SAFETY: the lengths were checked above; the kernel adds to d_x and reads d_u and A.
        unsafe { self.launch_product(kernels.grad_x, grid, args![d_x, d_u, a], mask, [tokens, features]) }
    }
}

impl<A: HalfType> Cuda<A> {
    /// Starts one of [`Kernels`]: all take three matrices, the mask, T and the features in eights.
    ///
    /// # Safety
    /// The matrices are those that the kernel declares, in its order, and of these sizes, as the mask is.
    unsafe fn launch_product(
        &self,
        kernel: &str,
        grid: Grid,
        [out, left, right]: [Arg; 3],
        mask: Option<DropoutMask<'_, Cuda<A>>>,
        [tokens, features]: [usize; 2],
    ) -> Result<()> {
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(mask);
        let (t, eights) = (tokens as u32, (features / 8) as u32);
        let args = args![out, left, right, sample_idx, positions, seed, module, step, threshold, scale, t, eights];
        // SAFETY: the caller's duty; every kernel of `Kernels` declares these arguments in this order.
        unsafe { self.launch(kernel, grid, args) }
    }
}
