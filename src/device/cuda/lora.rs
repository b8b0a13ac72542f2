//! LoRA's products and dropout: the masks of `cpu/lora.rs`, the formulas of `device/lora.rs`.

use anyhow::{Result, ensure};

use crate::device::lora;
use crate::device::ops::{DropoutMask, LoraDown, LoraDropout, LoraGradA, LoraGradX, LoraLinear, Ops, Transpose::Yes};

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
fn mask_args<A: HalfType>(mask: Option<DropoutMask<'_, Cuda<A>>>, tokens: usize, features: usize) -> Result<[Arg; 7]> {
    let (module, step, seed) = mask.map_or((0, 0, 0), |mask| (mask.module, mask.step, mask.seed));
    let (threshold, scale) = mask.map_or((0, 1.0), |mask| mask.threshold_and_scale());
    let (sample_idx, positions) = (mask.map(|mask| mask.sample_idx), mask.map(|mask| mask.positions));
    let num_positions = positions.map_or(tokens, |positions| positions.len());
    let num_samples = sample_idx.map_or(tokens, |sample_idx| sample_idx.len());
    ensure!([num_samples, num_positions] == [tokens; 2], "lora_dropout: {tokens} tokens, {num_positions} positions");
    ensure!(features.is_multiple_of(8), "lora_dropout: {features} features, allowed: a multiple of 8");
    ensure!(features < 8 << 20 && module < 1 << 12, "lora_dropout: {features} features, module {module}");
    Ok(args![sample_idx, positions, seed, module, step, threshold, scale])
}

impl<A: HalfType> Cuda<A> {
    pub(super) fn lora_dropout_act(&self, args: LoraDropout<'_, Cuda<A>>) -> Result<()> {
        let LoraDropout { y, x, mask, accumulate } = args;
        let (len, tokens) = (x.len(), mask.positions.len());
        ensure!(y.len() == len, "lora_dropout: y {} x {len}", y.len());
        let Some(features) = len.checked_div(tokens) else { return Ok(()) };
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(Some(mask), tokens, features)?;
        let (eights, row) = ((len / 8) as u64, (features / 8) as u32);
        let args = args![
            y,
            x,
            sample_idx,
            positions,
            seed,
            module,
            step,
            threshold,
            scale,
            eights,
            row,
            u32::from(accumulate)
        ];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("lora_dropout", Grid::elements(len / 8), args) }
    }

    /// LoRA's part is written first, and the base product adds to it: one pass over y less than a second sum would take.
    pub(super) fn lora_linear_act(&self, args: LoraLinear<'_, Cuda<A>>) -> Result<()> {
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale } = args;
        let [m, n, k] = [u.len() / r, b.len() / r, weight.len() * r / b.len()];
        lora::product(self, y.range_mut(0..m * n), u, (b, Yes), [m, n, r], scale, 0.0)?;
        lora::product(self, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], 1.0, 1.0)?;
        bias.map_or(Ok(()), |bias| self.add_bias(y, bias))
    }

    pub(super) fn lora_down_act(&self, args: LoraDown<'_, Cuda<A>>) -> Result<()> {
        let (tokens, features) = (args.u.len() / args.lora_rank, args.a.len() / args.lora_rank);
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::down(self, args) };
        let LoraDown { u, x, a, mask, lora_rank: r, .. } = args;
        ensure!(
            x.len() == tokens * features && [u.len(), a.len()] == [tokens * r, features * r],
            "lora_down: x {} for {tokens} tokens",
            x.len()
        );
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(mask, tokens, features)?;
        let (t, eights) = (tokens as u32, (features / 8) as u32);
        let args = args![u, x, a, sample_idx, positions, seed, module, step, threshold, scale, t, eights];
        let grid = Grid { threads: kernels.threads, ..Grid::rows(tokens.div_ceil(kernels.down_tokens)) };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch(kernels.down, grid, args) }
    }

    pub(super) fn lora_grad_a_f32(&self, args: LoraGradA<'_, Cuda<A>>) -> Result<()> {
        let (tokens, features) = (args.d_u.len() / args.lora_rank, args.d_a.len() / args.lora_rank);
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::grad_a(self, args) };
        let LoraGradA { d_a, d_u, x, mask, lora_rank: r, .. } = args;
        ensure!(
            x.len() == tokens * features && [d_u.len(), d_a.len()] == [tokens * r, features * r],
            "lora_grad_a: x {} for {tokens} tokens",
            x.len()
        );
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(mask, tokens, features)?;
        let (t, eights) = (tokens as u32, (features / 8) as u32);
        let args = args![d_a, d_u, x, sample_idx, positions, seed, module, step, threshold, scale, t, eights];
        let grid = Grid { threads: kernels.threads, ..Grid::rows(features.div_ceil(GRAD_A_FEATURES)) };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch(kernels.grad_a, grid, args) }
    }

    pub(super) fn lora_grad_x_act(&self, args: LoraGradX<'_, Cuda<A>>) -> Result<()> {
        let (tokens, features) = (args.d_u.len() / args.lora_rank, args.a.len() / args.lora_rank);
        let Some(kernels) = Kernels::find(args.lora_rank, features) else { return lora::grad_x(self, args) };
        let LoraGradX { d_x, d_u, a, mask, lora_rank: r, .. } = args;
        ensure!(
            d_x.len() == tokens * features && [d_u.len(), a.len()] == [tokens * r, features * r],
            "lora_grad_x: d_x {} for {tokens} tokens",
            d_x.len()
        );
        let [sample_idx, positions, seed, module, step, threshold, scale] = mask_args(mask, tokens, features)?;
        let (t, eights) = (tokens as u32, (features / 8) as u32);
        let args = args![d_x, d_u, a, sample_idx, positions, seed, module, step, threshold, scale, t, eights];
        let blocks = (tokens.div_ceil(GRAD_X_TOKENS), features.div_ceil(GRAD_X_FEATURES));
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch(kernels.grad_x, Grid { blocks, threads: 256, shared_bytes: 0 }, args) }
    }
}
