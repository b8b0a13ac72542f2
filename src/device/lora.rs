//! LoRA's products and dropout. A device without kernels of its own, or without one for a shape, makes them of other ops.

use anyhow::{Result, ensure};

use super::{Device, ElementwiseOps, Gemm, GemmOps, Transpose, View, ViewMut, product};

use Transpose::{No, Yes};

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

/// y = output_scale · (x · Wᵀ + bias + scale · u · Bᵀ). x `[T, in]`, W `[out, in]`, bias `[out]`, u `[T, r]`, B `[out, r]`, y `[T, out]`. The order of
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
    pub output_scale: f32,
}

/// u = dropout(x) · Aᵀ, without dropout where there is no mask. x `[T, in]`, A `[r, in]`, u `[T, r]`; with a mask,
/// scratch is at least as long as x.
pub struct LoraDown<'a, D: Device> {
    pub u: ViewMut<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// d_A += d_uᵀ · dropout(x) in f32. d_u `[T, r]`, x `[T, in]`, d_A `[r, in]`; with a mask, scratch is at least as long as x.
pub struct LoraGradA<'a, D: Device> {
    pub d_a: ViewMut<'a, D, f32>,
    pub d_u: View<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// d_x += mask ∘ (d_u · A). d_u `[T, r]`, A `[r, in]`, d_x `[T, in]`; with a mask, scratch is at least as long as d_x.
pub struct LoraGradX<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub d_u: View<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub lora_rank: usize,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// LoRA's products. Where a device has no kernel of its own, they are made of other ops.
pub trait LoraOps: GemmOps + ElementwiseOps {
    /// See [`LoraDropout`].
    fn lora_dropout(&self, args: LoraDropout<'_, Self>) -> Result<()>;

    /// See [`LoraLinear`]: the base first, then the bias, then LoRA.
    fn lora_linear(&self, args: LoraLinear<'_, Self>) -> Result<()> {
        let [m, n, k] = args.sizes()?;
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale, output_scale } = args;
        product(self, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], output_scale, 0.0)?;
        if let Some(bias) = bias {
            self.add_bias(y.range_mut(0..m * n), bias, output_scale)?;
        }
        product(self, y, u, (b, Yes), [m, n, r], output_scale * scale, 1.0)
    }

    /// See [`LoraDown`].
    fn lora_down(&self, args: LoraDown<'_, Self>) -> Result<()> {
        down(self, args)
    }

    /// See [`LoraGradA`].
    fn lora_grad_a(&self, args: LoraGradA<'_, Self>) -> Result<()> {
        grad_a(self, args)
    }

    /// See [`LoraGradX`].
    fn lora_grad_x(&self, args: LoraGradX<'_, Self>) -> Result<()> {
        grad_x(self, args)
    }
}

/// [`LoraDown`] by other ops.
pub(super) fn down<D: LoraOps>(ops: &D, args: LoraDown<'_, D>) -> Result<()> {
    let [m, k] = args.sizes()?;
    let LoraDown { u, x, a, mask, lora_rank: r, mut scratch } = args;
    let x = dropout(ops, mask, x, &mut scratch)?;
    product(ops, u, x, (a, Yes), [m, r, k], 1.0, 0.0)
}

/// [`LoraGradA`] by other ops.
pub(super) fn grad_a<D: LoraOps>(ops: &D, args: LoraGradA<'_, D>) -> Result<()> {
    let [k, n] = args.sizes()?;
    let LoraGradA { d_a, d_u, x, mask, lora_rank: r, mut scratch } = args;
    let b = dropout(ops, mask, x, &mut scratch)?;
    let (transpose_a, transpose_b) = (Yes, No);
    ops.gemm_grad(Gemm { c: d_a, a: d_u, b, transpose_a, transpose_b, m: r, n, k, alpha: 1.0, beta: 1.0 })
}

/// [`LoraGradX`] by other ops.
pub(super) fn grad_x<D: LoraOps>(ops: &D, args: LoraGradX<'_, D>) -> Result<()> {
    let [m, n] = args.sizes()?;
    let LoraGradX { d_x, d_u, a, mask, lora_rank: r, mut scratch } = args;
    let Some(mask) = mask else { return product(ops, d_x, d_u, (a, No), [m, n, r], 1.0, 1.0) };
    product(ops, scratch.range_mut(0..m * n), d_u, (a, No), [m, n, r], 1.0, 0.0)?;
    ops.lora_dropout(LoraDropout { y: d_x, x: scratch.view().range(0..m * n), mask, accumulate: true })
}

/// Returns x itself where there is no mask, else dropout(x), which is made in `scratch`.
fn dropout<'a, D: LoraOps>(
    ops: &D,
    mask: Option<DropoutMask<'_, D>>,
    x: View<'a, D, D::Act>,
    scratch: &'a mut ViewMut<'_, D, D::Act>,
) -> Result<View<'a, D, D::Act>> {
    let (Some(mask), len) = (mask, x.len()) else { return Ok(x) };
    ops.lora_dropout(LoraDropout { y: scratch.range_mut(0..len), x, mask, accumulate: false })?;
    Ok(scratch.view().range(0..len))
}

impl<D: Device> DropoutMask<'_, D> {
    /// Checks that the mask is one of T tokens, and that its counters hold the features and the module.
    fn check(&self, tokens: usize, features: usize) -> Result<()> {
        let (found, module) = ([self.sample_idx.len(), self.positions.len()], self.module);
        ensure!(found == [tokens; 2], "lora_dropout: samples and positions {found:?} for {tokens} tokens");
        ensure!(features < 8 << 20 && module < 1 << 12, "lora_dropout: {features} features, module {module}");
        Ok(())
    }
}

impl<D: Device> LoraDropout<'_, D> {
    /// Checks all lengths; returns T and the features. Without tokens both are 0.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let (x, y, tokens) = (self.x.len(), self.y.len(), self.mask.positions.len());
        let features = x.checked_div(tokens).unwrap_or(0);
        ensure!([x, y] == [tokens * features; 2], "lora_dropout: y {y} x {x} for {tokens} tokens");
        self.mask.check(tokens, features)?;
        Ok([tokens, features])
    }
}

impl<D: Device> LoraLinear<'_, D> {
    /// Checks all lengths; returns T, out and in.
    pub(super) fn sizes(&self) -> Result<[usize; 3]> {
        let [y, x, weight, u, b] = [self.y.len(), self.x.len(), self.weight.len(), self.u.len(), self.b.len()];
        let r = self.lora_rank;
        ensure!(r > 0 && b >= r, "lora_linear: B {b} for a rank of {r}");
        let [m, n] = [u / r, b / r];
        let k = weight / n;
        ensure!(
            [u, b, weight, x, y] == [m * r, n * r, n * k, m * k, m * n],
            "lora_linear: u {u} B {b} W {weight} x {x} y {y} for a rank of {r}"
        );
        let bias = self.bias.map_or(n, |bias| bias.len());
        ensure!(bias == n, "lora_linear: bias {bias} for {n} features");
        Ok([m, n, k])
    }
}

impl<D: Device> LoraDown<'_, D> {
    /// Checks all lengths; returns T and in.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        narrow_sizes(
            "lora_down: u, A, x",
            self.lora_rank,
            [self.u.len(), self.a.len(), self.x.len()],
            &self.mask,
            &self.scratch,
        )
    }
}

impl<D: Device> LoraGradA<'_, D> {
    /// Checks all lengths; returns T and in.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        narrow_sizes(
            "lora_grad_a: d_u, d_A, x",
            self.lora_rank,
            [self.d_u.len(), self.d_a.len(), self.x.len()],
            &self.mask,
            &self.scratch,
        )
    }
}

impl<D: Device> LoraGradX<'_, D> {
    /// Checks all lengths; returns T and in.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        narrow_sizes(
            "lora_grad_x: d_u, A, d_x",
            self.lora_rank,
            [self.d_u.len(), self.a.len(), self.d_x.len()],
            &self.mask,
            &self.scratch,
        )
    }
}

/// T and in of a product of which one side is LoRA's rank, from the lengths of `[T, r]`, `[r, in]` and `[T, in]`.
fn narrow_sizes<D: Device>(
    what: &str,
    r: usize,
    lens: [usize; 3],
    mask: &Option<DropoutMask<'_, D>>,
    scratch: &ViewMut<'_, D, D::Act>,
) -> Result<[usize; 2]> {
    ensure!(r > 0, "{what}: a rank of 0");
    let [tokens, features] = [lens[0] / r, lens[1] / r];
    ensure!(lens == [tokens * r, features * r, tokens * features], "{what} {lens:?} for a rank of {r}");
    if let Some(mask) = mask {
        mask.check(tokens, features)?;
        let needed = tokens * features;
        ensure!(scratch.len() >= needed, "{what}: the scratch has {} elements, {needed} are needed", scratch.len());
    }
    Ok([tokens, features])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Arena;
    use crate::device::cpu::Cpu;

    /// T, out, in and r of the products below.
    const SIZES: [usize; 4] = [3, 5, 8, 2];

    /// Calls every product with buffers of these lengths: y, W, x, u, B, A, positions, scratch and bias; returns the errors.
    fn errors([y, weight, x, u, b, a, positions, scratch, bias]: [usize; 9]) -> [Option<String>; 5] {
        let (cpu, r) = (Cpu::new(1), SIZES[3]);
        let buffer = |len: usize| Arena::carved(&cpu, |arena| arena.carve::<f32>("x", len)).unwrap();
        let [mut y, weight, mut x, mut u, b, mut a, mut scratch, bias] =
            [y, weight, x, u, b, a, scratch, bias].map(buffer);
        let (other_x, other_u, other_a) = (buffer(x.len()), buffer(u.len()), buffer(a.len()));
        let positions = Arena::carved(&cpu, |arena| arena.carve::<u32>("positions", positions)).unwrap();
        let sample_idx = Arena::carved(&cpu, |arena| arena.carve::<u64>("samples", SIZES[0])).unwrap();
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = DropoutMask { probability: 0.5, seed: 1, step: 1, module: 1, sample_idx, positions };
        let linear = LoraLinear {
            y: y.view_mut(),
            x: other_x.view(),
            weight: weight.view(),
            bias: Some(bias.view()),
            u: other_u.view(),
            b: b.view(),
            lora_rank: r,
            scale: 1.0,
            output_scale: 1.0,
        };
        let linear = cpu.lora_linear(linear);
        let (mask, lora_rank) = (Some(mask), r);
        let (a_view, x_view, d_u) = (other_a.view(), other_x.view(), other_u.view());
        let down = LoraDown { u: u.view_mut(), x: x_view, a: a_view, mask, lora_rank, scratch: scratch.view_mut() };
        let down = cpu.lora_down(down);
        let grad_a = LoraGradA { d_a: a.view_mut(), d_u, x: x_view, mask, lora_rank, scratch: scratch.view_mut() };
        let grad_a = cpu.lora_grad_a(grad_a);
        let grad_x = LoraGradX { d_x: x.view_mut(), d_u, a: a_view, mask, lora_rank, scratch: scratch.view_mut() };
        let grad_x = cpu.lora_grad_x(grad_x);
        let dropout = LoraDropout { y: x.view_mut(), x: x_view, mask: mask.unwrap(), accumulate: false };
        let dropout = cpu.lora_dropout(dropout);
        [linear, down, grad_a, grad_x, dropout].map(|result| result.err().map(|error| error.to_string()))
    }

    #[test]
    fn a_length_that_the_contract_does_not_allow_is_refused() {
        let [m, n, k, r] = SIZES;
        let right = [m * n, n * k, m * k, m * r, n * r, r * k, m, m * k, n];
        assert_eq!(errors(right), [const { None }; 5]);
        // Which of linear, down, grad_a, grad_x and dropout look at y, W, x, u, B, A, positions, scratch and bias.
        let looks: [[bool; 5]; 9] = [
            [true, false, false, false, false],
            [true, false, false, false, false],
            [true, true, true, true, true],
            [true, true, true, true, false],
            [true, false, false, false, false],
            [false, true, true, true, false],
            [false, true, true, true, true],
            [false, true, true, true, false],
            [true, false, false, false, false],
        ];
        for (i, looks) in looks.into_iter().enumerate() {
            let mut lens = right;
            lens[i] -= 1;
            assert_eq!(errors(lens).map(|error| error.is_some()), looks, "operand {i} is too short");
        }
    }
}
