//! LoRA's products and dropout. A device without kernels of its own, or without one for a shape, makes them of other ops.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::{
    Device, ElementwiseOps, GatedForward, GatedOps, Gemm, GemmOps, LoraGatedBackward, LoraGatedForward, Rope, RopeOps,
    Rotation, Transpose, View, ViewMut, lora_mlp, product,
};

use Transpose::{No, Yes};

/// Names the dropout masks of a step, one for each module: the element (token, feature) is kept or dropped by a number that depends on the
/// seed, the step, the token's global sample and position, the module's number and the feature, and on nothing else.
pub struct DropoutMask<'a, D> {
    pub probability: f32,
    pub seed: u64,
    pub step: u32,
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
    /// Number of the module.
    pub module: u32,
    pub accumulate: bool,
}

/// y = output_scale · (x · Wᵀ + bias + scale · u · Bᵀ), and its finish. x `[T, in]`, W `[out, in]`, bias `[out]`, u `[T, r]`, B `[out, r]`, y
/// `[T, out]`. The order of these sums is the device's own.
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
    pub finish: Finish<'a, D>,
}

/// The last step on the output y of a linear module. It takes the values of y as they are rounded.
pub enum Finish<'a, D: Device> {
    Nothing,
    /// y += this.
    Add(View<'a, D, D::Act>),
    /// The heads of y turn to their positions.
    Rotate(Rotation<'a, D>),
}

impl<D: ElementwiseOps + RopeOps> Finish<'_, D> {
    /// Takes the step as an op of its own.
    pub fn run(self, ops: &D, y: ViewMut<'_, D, D::Act>) -> Result<()> {
        match self {
            Finish::Nothing => Ok(()),
            Finish::Add(x) => ops.add(y, x),
            Finish::Rotate(rotation) => ops.rope(Rope { x: y, rotation, inverse: false }),
        }
    }
}

/// u = dropout(x) · Aᵀ of modules that share x `[T, in]`, without dropout where there is no mask. With a mask, scratch is at least as long
/// as x.
pub struct LoraDown<'a, 'm, D: Device> {
    pub modules: &'m mut [DownModule<'a, D>],
    pub x: View<'a, D, D::Act>,
    pub mask: Option<DropoutMask<'a, D>>,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// One of the modules of [`LoraDown`]: u `[T, r]`, A `[r, in]`, its rank r, and the module's number.
pub struct DownModule<'a, D: Device> {
    pub u: ViewMut<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub lora_rank: usize,
    pub number: u32,
}

/// d_u = scale · d_y · B, or d_u += that with `accumulate`, and d_B += scale · d_yᵀ · u in f32. d_y `[T, out]`, B and d_B `[out, r]`, u and
/// d_u `[T, r]`. Scratch is at least as long as d_y.
pub struct LoraOutput<'a, D: Device> {
    pub d_u: ViewMut<'a, D, D::Act>,
    pub d_b: ViewMut<'a, D, f32>,
    pub d_y: View<'a, D, D::Act>,
    pub u: View<'a, D, D::Act>,
    pub b: View<'a, D, D::Act>,
    pub lora_rank: usize,
    pub scale: f32,
    pub accumulate: bool,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// The gradient of an input x `[T, in]` that modules share: d_x = Σ (output_scale · d_y · W + mask ∘ (d_u · A)) over them, or d_x += that
/// with `accumulate`; and d_A += d_uᵀ · dropout(x) in f32, in a range of `grads`. The order of these sums is the device's own. Scratch is at
/// least as long as x where a module has an adapter.
pub struct LoraInput<'a, 'm, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub accumulate: bool,
    pub grads: ViewMut<'a, D, f32>,
    pub modules: &'m [InputModule<'a, D>],
    pub x: Input<'a, D>,
    pub in_features: usize,
    pub mask: Option<DropoutMask<'a, D>>,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// The input x of modules.
pub enum Input<'a, D: Device> {
    Plain(View<'a, D, D::Act>),
    /// An MLP's activation that is not there. A device makes it as it reads gate and up, or puts it where these arguments say.
    Gated(GatedForward<'a, D>),
}

/// One of the modules of [`LoraInput`].
pub struct InputModule<'a, D: Device> {
    /// Rows of W `[rows, in]` and the gradient of what they give, d_y `[T, rows]`.
    pub outputs: Vec<[View<'a, D, D::Act>; 2]>,
    pub output_scale: f32,
    /// `None` for a module that is no target.
    pub lora: Option<InputLora<'a, D>>,
}

/// The adapter of an [`InputModule`]: d_u `[T, r]`, A `[r, in]`, the place of d_A among the gradients, its rank r, and the module's
/// number.
pub struct InputLora<'a, D: Device> {
    pub d_u: View<'a, D, D::Act>,
    pub a: View<'a, D, D::Act>,
    pub a_range: Range<usize>,
    pub lora_rank: usize,
    pub number: u32,
}

/// LoRA's products. Where a device has no kernel of its own, they are made of other ops.
pub trait LoraOps: GemmOps + ElementwiseOps + GatedOps + RopeOps {
    /// See [`LoraDropout`].
    fn lora_dropout(&self, args: LoraDropout<'_, Self>) -> Result<()>;

    /// See [`LoraLinear`]: the base first, then the bias, then LoRA, and the finish last.
    fn lora_linear(&self, args: LoraLinear<'_, Self>) -> Result<()> {
        let [m, n, k] = args.sizes()?;
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale, output_scale, finish } = args;
        product(self, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], output_scale, 0.0)?;
        if let Some(bias) = bias {
            self.add_bias(y.range_mut(0..m * n), bias, output_scale)?;
        }
        product(self, y.range_mut(0..m * n), u, (b, Yes), [m, n, r], output_scale * scale, 1.0)?;
        finish.run(self, y)
    }

    /// See [`LoraGatedForward`]: gate first, then up, then the activation.
    fn lora_gated_forward(&self, args: LoraGatedForward<'_, Self>) -> Result<()> {
        lora_mlp::forward(self, args)
    }

    /// See [`LoraDown`].
    fn lora_down(&self, args: LoraDown<'_, '_, Self>) -> Result<()> {
        down(self, args)
    }

    /// See [`LoraOutput`].
    fn lora_output(&self, args: LoraOutput<'_, Self>) -> Result<()> {
        output(self, args)
    }

    /// See [`LoraGatedBackward`].
    fn lora_gated_backward(&self, args: LoraGatedBackward<'_, Self>) -> Result<()> {
        lora_mlp::backward(self, args)
    }

    /// See [`LoraInput`].
    fn lora_input(&self, args: LoraInput<'_, '_, Self>) -> Result<()> {
        input(self, args)
    }
}

/// [`LoraDown`] by other ops.
pub(super) fn down<D: LoraOps>(ops: &D, args: LoraDown<'_, '_, D>) -> Result<()> {
    let [m, k] = args.sizes()?;
    let LoraDown { modules, x, mask, mut scratch } = args;
    for DownModule { u, a, lora_rank: r, number } in modules {
        let x = dropout(ops, mask, *number, x, &mut scratch)?;
        product(ops, u.range_mut(0..m * *r), x, (*a, Yes), [m, *r, k], 1.0, 0.0)?;
    }
    Ok(())
}

/// [`LoraOutput`] by other ops.
pub(super) fn output<D: LoraOps>(ops: &D, args: LoraOutput<'_, D>) -> Result<()> {
    let [m, n] = args.sizes()?;
    let LoraOutput { d_u, d_b, d_y, u, b, lora_rank: r, scale, accumulate, .. } = args;
    product(ops, d_u, d_y, (b, No), [m, r, n], scale, if accumulate { 1.0 } else { 0.0 })?;
    // A sum over tokens: [out, T] · [T, r].
    let (transpose_a, transpose_b, beta, alpha) = (Yes, No, 1.0, scale);
    ops.gemm_grad(Gemm { c: d_b, a: d_y, b: u, transpose_a, transpose_b, m: n, n: r, k: m, alpha, beta })
}

/// [`LoraInput`] by other ops: one module after the other, its base first.
pub(super) fn input<D: LoraOps>(ops: &D, args: LoraInput<'_, '_, D>) -> Result<()> {
    let [m, k] = args.sizes()?;
    let LoraInput { mut d_x, accumulate, mut grads, modules, x, mask, mut scratch, .. } = args;
    // Without an adapter nobody reads x.
    let x = match x {
        Input::Plain(x) => x,
        Input::Gated(args) if modules.iter().all(|module| module.lora.is_none()) => args.gate,
        Input::Gated(args) => args.made(ops)?,
    };
    let mut beta = if accumulate { 1.0 } else { 0.0 };
    for InputModule { outputs, output_scale, lora } in modules {
        for &[weight, d_y] in outputs {
            product(ops, d_x.range_mut(0..m * k), d_y, (weight, No), [m, k, weight.len() / k], *output_scale, beta)?;
            beta = 1.0;
        }
        let Some(InputLora { d_u, a, a_range, lora_rank, number }) = lora else { continue };
        let r = *lora_rank;
        let b = dropout(ops, mask, *number, x, &mut scratch)?;
        let (c, transpose_a, transpose_b) = (grads.range_mut(a_range.clone()), Yes, No);
        ops.gemm_grad(Gemm { c, a: *d_u, b, transpose_a, transpose_b, m: r, n: k, k: m, alpha: 1.0, beta: 1.0 })?;
        let d_x = d_x.range_mut(0..m * k);
        let Some(mask) = mask else {
            product(ops, d_x, *d_u, (*a, No), [m, k, r], 1.0, 1.0)?;
            continue;
        };
        product(ops, scratch.range_mut(0..m * k), *d_u, (*a, No), [m, k, r], 1.0, 0.0)?;
        let x = scratch.view().range(0..m * k);
        ops.lora_dropout(LoraDropout { y: d_x, x, mask, module: *number, accumulate: true })?;
    }
    Ok(())
}

/// Returns x itself where there is no mask, else dropout(x), which is made in `scratch`.
fn dropout<'a, D: LoraOps>(
    ops: &D,
    mask: Option<DropoutMask<'_, D>>,
    module: u32,
    x: View<'a, D, D::Act>,
    scratch: &'a mut ViewMut<'_, D, D::Act>,
) -> Result<View<'a, D, D::Act>> {
    let (Some(mask), len) = (mask, x.len()) else { return Ok(x) };
    ops.lora_dropout(LoraDropout { y: scratch.range_mut(0..len), x, mask, module, accumulate: false })?;
    Ok(scratch.view().range(0..len))
}

impl<D: Device> DropoutMask<'_, D> {
    /// Checks that the mask is one of T tokens, and that its counters hold the features and the module.
    fn check(&self, tokens: usize, features: usize, module: u32) -> Result<()> {
        let found = [self.sample_idx.len(), self.positions.len()];
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
        self.mask.check(tokens, features, self.module)?;
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
        match &self.finish {
            Finish::Nothing => {}
            Finish::Add(x) => ensure!(x.len() == y, "lora_linear: {} elements to add to y {y}", x.len()),
            Finish::Rotate(rotation) => drop(rotation.num_tokens(y)?),
        }
        Ok([m, n, k])
    }
}

impl<D: Device> LoraDown<'_, '_, D> {
    /// Checks all lengths; returns T and in.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let first = self.modules.first().map_or([0; 3], |module| [module.lora_rank, module.u.len(), module.a.len()]);
        let [r, u, a] = first;
        ensure!(r > 0 && a > 0, "lora_down: a rank of {r}, {} modules, A {a}", self.modules.len());
        let [tokens, features] = [u / r, a / r];
        for DownModule { u, a, lora_rank: r, number } in &*self.modules {
            let lens = [u.len(), a.len(), self.x.len()];
            ensure!(
                *r > 0 && lens == [tokens * r, features * r, tokens * features],
                "lora_down: u, A, x {lens:?} for a rank of {r}"
            );
            check_mask("lora_down", &self.mask, &self.scratch, [tokens, features], *number)?;
        }
        Ok([tokens, features])
    }
}

impl<D: Device> LoraOutput<'_, D> {
    /// Checks all lengths; returns T and out.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let r = self.lora_rank;
        ensure!(r > 0, "lora_output: a rank of 0");
        let lens = [self.d_u.len(), self.u.len(), self.d_b.len(), self.b.len(), self.d_y.len()];
        let [m, n] = [self.u.len() / r, self.b.len() / r];
        ensure!(
            lens == [m * r, m * r, n * r, n * r, m * n] && self.scratch.len() >= m * n,
            "lora_output: d_u, u, d_B, B, d_y {lens:?} for a rank of {r}, scratch {}",
            self.scratch.len()
        );
        Ok([m, n])
    }
}

impl<D: Device> LoraInput<'_, '_, D> {
    /// Checks all lengths; returns T and in.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let k = self.in_features;
        ensure!(k > 0, "lora_input: no features");
        let x = match &self.x {
            Input::Plain(x) => x.len(),
            Input::Gated(args) => args.num_elements()?,
        };
        let m = x / k;
        ensure!([x, self.d_x.len()] == [m * k; 2], "lora_input: x {x} d_x {}", self.d_x.len());
        for InputModule { outputs, lora, .. } in self.modules {
            for [weight, d_y] in outputs {
                let [weight, d_y, n] = [weight.len(), d_y.len(), weight.len() / k];
                ensure!([weight, d_y] == [n * k, m * n], "lora_input: W {weight} d_y {d_y} for x [{m}, {k}]");
            }
            let Some(InputLora { d_u, a, a_range, lora_rank: r, number }) = lora else { continue };
            let lens = [d_u.len(), a.len(), a_range.len()];
            ensure!(
                *r > 0 && lens == [m * r, r * k, r * k] && a_range.end <= self.grads.len(),
                "lora_input: d_u, A, d_A {lens:?} for x [{m}, {k}] and a rank of {r}"
            );
            check_mask("lora_input", &self.mask, &self.scratch, [m, k], *number)?;
        }
        Ok([m, k])
    }
}

/// Checks that the scratch holds x, and that a mask, if there is one, is of these tokens.
fn check_mask<D: Device>(
    what: &str,
    mask: &Option<DropoutMask<'_, D>>,
    scratch: &ViewMut<'_, D, D::Act>,
    [tokens, features]: [usize; 2],
    module: u32,
) -> Result<()> {
    let needed = tokens * features;
    ensure!(scratch.len() >= needed, "{what}: the scratch has {} elements, {needed} are needed", scratch.len());
    mask.map_or(Ok(()), |mask| mask.check(tokens, features, module))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Arena;
    use crate::device::cpu::Cpu;

    /// T, out, in and r of the products below.
    const SIZES: [usize; 4] = [3, 5, 8, 2];

    /// Calls every op with buffers of these lengths: y, W, x, u, B, A, positions, scratch and bias; returns the errors.
    fn errors([y, weight, x, u, b, a, positions, scratch, bias]: [usize; 9]) -> [Option<String>; 5] {
        let (cpu, r) = (Cpu::new(1), SIZES[3]);
        let buffer = |len: usize| Arena::carved(&cpu, |arena| arena.carve::<f32>("x", len)).unwrap();
        let [mut y, weight, mut x, mut u, mut b, mut a, mut scratch, bias] =
            [y, weight, x, u, b, a, scratch, bias].map(buffer);
        let [other_y, other_x, other_u, other_b, other_a] = [y.len(), x.len(), u.len(), b.len(), a.len()].map(buffer);
        let positions = Arena::carved(&cpu, |arena| arena.carve::<u32>("positions", positions)).unwrap();
        let sample_idx = Arena::carved(&cpu, |arena| arena.carve::<u64>("samples", SIZES[0])).unwrap();
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = DropoutMask { probability: 0.5, seed: 1, step: 1, sample_idx, positions };
        let linear = cpu.lora_linear(LoraLinear {
            y: y.view_mut(),
            x: other_x.view(),
            weight: weight.view(),
            bias: Some(bias.view()),
            u: other_u.view(),
            b: other_b.view(),
            lora_rank: r,
            scale: 1.0,
            output_scale: 1.0,
            finish: Finish::Nothing,
        });
        let (x_view, number, module) = (other_x.view(), 1, 1);
        let down = cpu.lora_down(LoraDown {
            modules: &mut [DownModule { u: u.view_mut(), a: other_a.view(), lora_rank: r, number }],
            x: x_view,
            mask: Some(mask),
            scratch: scratch.view_mut(),
        });
        let output = cpu.lora_output(LoraOutput {
            d_u: u.view_mut(),
            d_b: b.view_mut(),
            d_y: other_y.view(),
            u: other_u.view(),
            b: other_b.view(),
            lora_rank: r,
            scale: 1.0,
            accumulate: false,
            scratch: scratch.view_mut(),
        });
        let lora = InputLora { d_u: other_u.view(), a: other_a.view(), a_range: 0..a.len(), lora_rank: r, number };
        let input = cpu.lora_input(LoraInput {
            d_x: x.view_mut(),
            accumulate: false,
            grads: a.view_mut(),
            modules: &[InputModule {
                outputs: vec![[weight.view(), other_y.view()]],
                output_scale: 1.0,
                lora: Some(lora),
            }],
            x: Input::Plain(x_view),
            in_features: SIZES[2],
            mask: Some(mask),
            scratch: scratch.view_mut(),
        });
        let dropout = cpu.lora_dropout(LoraDropout { y: x.view_mut(), x: x_view, mask, module, accumulate: false });
        [linear, down, output, input, dropout].map(|result| result.err().map(|error| error.to_string()))
    }

    #[test]
    fn a_length_that_the_contract_does_not_allow_is_refused() {
        let [m, n, k, r] = SIZES;
        let right = [m * n, n * k, m * k, m * r, n * r, r * k, m, m * k, n];
        assert_eq!(errors(right), [const { None }; 5]);
        // A line for each of y, W, x, u, B, A, positions, scratch and bias says whether linear, down, output, input and
        // dropout look at it.
        let looks: [[bool; 5]; 9] = [
            [true, false, true, true, false],
            [true, false, false, true, false],
            [true, true, false, true, true],
            [true, true, true, true, false],
            [true, false, true, false, false],
            [false, true, false, true, false],
            [false, true, false, true, true],
            [false, true, false, true, false],
            [true, false, false, false, false],
        ];
        for (i, looks) in looks.into_iter().enumerate() {
            let mut lens = right;
            lens[i] -= 1;
            assert_eq!(errors(lens).map(|error| error.is_some()), looks, "operand {i} is too short");
        }
    }
}
