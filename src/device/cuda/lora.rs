//! LoRA's products and dropout: the masks of `cpu/lora.rs`, the formulas of `device/lora.rs`.

use anyhow::{Result, ensure};

use crate::device::{
    Activation, DownModule, DropoutMask, ElementwiseOps, GatedBackward, GatedForward, Input, InputLora, InputModule,
    LoraDown, LoraDropout, LoraGatedBackward, LoraGatedForward, LoraInput, LoraLinear, LoraOps, LoraOutput,
    Transpose::{No, Yes},
    ViewMut, lora, lora_mlp, product,
};

use super::launch::{Arg, Grid, args};
use super::{Cuda, HalfType};

/// The kernels of one rank of LoRA.
#[derive(Clone, Copy)]
struct Kernels {
    lora_rank: usize,
    /// Most modules that one kernel of `lora_down` and of `lora_input` takes.
    max_modules: usize,
    /// Tokens and threads of a block of `lora_down`.
    down_tokens: usize,
    down_threads: u32,
    /// Warps of a block of `lora_output`, and of its forms with a gated activation, if there are such kernels.
    output_warps: Option<usize>,
}

impl Kernels {
    const ALL: [Kernels; 4] = [
        Kernels { lora_rank: 8, max_modules: 3, down_tokens: 16, down_threads: 512, output_warps: Some(16) },
        Kernels { lora_rank: 16, max_modules: 3, down_tokens: 16, down_threads: 512, output_warps: Some(16) },
        Kernels { lora_rank: 32, max_modules: 1, down_tokens: 32, down_threads: 256, output_warps: Some(8) },
        Kernels { lora_rank: 64, max_modules: 1, down_tokens: 32, down_threads: 256, output_warps: None },
    ];

    /// The kernels for a rank and a number of features, if there are any.
    fn find(lora_rank: usize, features: usize) -> Option<Kernels> {
        Kernels::ALL.into_iter().find(|kernels| kernels.lora_rank == lora_rank && features.is_multiple_of(8))
    }
}

/// Features and threads of a block of `lora_input`, which takes one part of the tokens; the fewest tokens of a part, and the most parts.
const INPUT_FEATURES: usize = 32;
const INPUT_THREADS: u32 = 128;
const INPUT_MIN_TOKENS: usize = 256;
const INPUT_MAX_PARTS: usize = 4;
/// The division of `lora_output` into blocks: features of a warp, fewest tokens of a block, and the number of blocks that fills a large GPU.
#[derive(Clone, Copy)]
struct OutputBlocks {
    warp_features: usize,
    min_tokens: usize,
    blocks: usize,
}

const OUTPUT: OutputBlocks = OutputBlocks { warp_features: 64, min_tokens: 128, blocks: 128 };
/// A warp has its features of two outputs. More blocks than multiprocessors use the memory better (`benches/results.md`).
const GATED_OUTPUT: OutputBlocks = OutputBlocks { warp_features: 32, min_tokens: 256, blocks: 256 };
/// Tokens that a warp takes at a time.
const CHUNK_TOKENS: usize = 16;
/// Modules that a kernel declares.
const MODULES: usize = 3;

/// Tokens of each of about `num_parts` parts.
fn part_tokens(tokens: usize, num_parts: usize) -> usize {
    tokens.div_ceil(num_parts).next_multiple_of(CHUNK_TOKENS)
}

/// The six arguments of a mask; a kernel without dropout gets null pointers, a threshold of 0 and a scale of 1.
fn mask_args<A: HalfType>(mask: Option<DropoutMask<'_, Cuda<A>>>) -> [Arg; 6] {
    let (step, seed) = mask.map_or((0, 0), |mask| (mask.step, mask.seed));
    let (threshold, scale) = mask.map_or((0, 1.0), |mask| mask.threshold_and_scale());
    let (sample_idx, positions) = (mask.map(|mask| mask.sample_idx), mask.map(|mask| mask.positions));
    args![sample_idx, positions, seed, step, threshold, scale]
}

/// The nine arguments of modules, each with u or d_u, A and its number.
fn module_args(modules: impl Iterator<Item = [Arg; 3]>) -> [Arg; 3 * MODULES] {
    let mut args = [Arg::from(0u64); 3 * MODULES];
    for (i, module) in modules.enumerate() {
        for (j, arg) in module.into_iter().enumerate() {
            args[MODULES * j + i] = arg;
        }
    }
    args
}

impl<A: HalfType> LoraOps for Cuda<A> {
    fn lora_dropout(&self, args: LoraDropout<'_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        ensure!(features.is_multiple_of(8), "lora_dropout: {features} features, allowed: a multiple of 8");
        let LoraDropout { y, x, mask, module, accumulate } = args;
        let (eights, row, accumulate) = (tokens * features / 8, (features / 8) as u32, u32::from(accumulate));
        let [sample_idx, positions, seed, step, threshold, scale] = mask_args(Some(mask));
        let args =
            args![y, x, sample_idx, positions, seed, step, threshold, scale, module, eights as u64, row, accumulate];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("lora_dropout", Grid::elements(eights), args) }
    }

    /// Without a kernel, LoRA's part is written first, and the base product adds to it, which saves the pass over y of a separate sum.
    fn lora_linear(&self, args: LoraLinear<'_, Cuda<A>>) -> Result<()> {
        let [m, n, k] = args.sizes()?;
        if let Some(grid) = self.hopper_linear_grid([m, n, k], args.lora_rank) {
            return self.hopper_lora_linear(args, [m, n, k], grid);
        }
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale, output_scale, finish } = args;
        product(self, y.range_mut(0..m * n), u, (b, Yes), [m, n, r], output_scale * scale, 0.0)?;
        product(self, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], output_scale, 1.0)?;
        if let Some(bias) = bias {
            self.add_bias(y.range_mut(0..m * n), bias, output_scale)?;
        }
        finish.run(self, y)
    }

    fn lora_gated_forward(&self, args: LoraGatedForward<'_, Cuda<A>>) -> Result<()> {
        let sizes = args.sizes()?;
        match self.hopper_gated_grid(&args, sizes) {
            Some(grid) => self.hopper_lora_gated_forward(args, sizes, grid),
            None => lora_mlp::forward(self, args),
        }
    }

    /// Modules of one rank share a kernel. Where a rank has none, all is made of other ops.
    fn lora_down(&self, args: LoraDown<'_, '_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        let kernels = |module: &DownModule<'_, _>| Kernels::find(module.lora_rank, features);
        if args.modules.iter().any(|module| kernels(module).is_none()) {
            return lora::down(self, args);
        }
        let LoraDown { modules, x, mask, .. } = args;
        for modules in modules.chunk_by_mut(|a, b| a.lora_rank == b.lora_rank) {
            let Some(kernels) = modules.first().and_then(kernels) else { continue };
            let (t, eights) = (tokens as u32, (features / 8) as u32);
            let grid = Grid { threads: kernels.down_threads, ..Grid::rows(tokens.div_ceil(kernels.down_tokens)) };
            for modules in modules.chunks_mut(kernels.max_modules) {
                let name = format!("lora_down_{}_{}", kernels.lora_rank, modules.len());
                let each = |DownModule { u, a, number, .. }: &mut DownModule<'_, Cuda<A>>| args![u.view(), *a, *number];
                let [u0, u1, u2, a0, a1, a2, n0, n1, n2] = module_args(modules.iter_mut().map(each));
                let [sample_idx, positions, seed, step, threshold, scale] = mask_args(mask);
                let args = args![
                    u0, u1, u2, a0, a1, a2, n0, n1, n2, x, sample_idx, positions, seed, step, threshold, scale, t,
                    eights
                ];
                // SAFETY: the lengths were checked above; the kernel writes each u, and reads x and each A.
                unsafe { self.launch(&name, grid, args) }?;
            }
        }
        Ok(())
    }

    fn lora_output(&self, args: LoraOutput<'_, Cuda<A>>) -> Result<()> {
        let Some(parts) = OutputParts::new(args.sizes()?, args.lora_rank, OUTPUT) else {
            return lora::output(self, args);
        };
        let Some(scratch) = Scratch::new(&args.scratch, parts.len(1)) else { return lora::output(self, args) };
        let LoraOutput { d_u, d_b, d_y, u, b, scale, accumulate, .. } = args;
        let [parts_u, parts_b] = parts.places(&scratch, [0, 1]);
        let [t, eights, part_tokens] = parts.args();
        let args = args![parts_u, parts_b, d_y, b, u, t, eights, part_tokens];
        // SAFETY: the lengths were checked above, the scratch holds both kinds of parts, and nothing else uses it.
        unsafe { self.launch(&format!("lora_output_{}", parts.lora_rank), parts.grid(), args) }?;
        // SAFETY: as above; the kernel before has written all parts.
        unsafe { self.add_output(d_u, d_b, [parts_u, parts_b], &parts, scale, accumulate) }
    }

    /// One kernel reads d_y, gate and up once where both adapters have one rank.
    fn lora_gated_backward(&self, mut args: LoraGatedBackward<'_, Cuda<A>>) -> Result<()> {
        let (sizes, lora_rank) = (args.shared_sizes()?, args.gate.as_ref().map(|lora| lora.lora_rank));
        let parts = sizes.zip(lora_rank).and_then(|(sizes, r)| OutputParts::new(sizes, r, GATED_OUTPUT));
        let scratch = parts.as_ref().and_then(|parts| Scratch::new(&args.scratch, parts.len(2)));
        let (backward, mut d_u, mut grads) = (args.backward, args.d_u, args.grads);
        let (Some(parts), Some(scratch), Some(of_gate), Some(of_up)) = (parts, scratch, &args.gate, &args.up) else {
            return lora_mlp::backward(self, LoraGatedBackward { backward, d_u, grads, ..args });
        };
        let GatedBackward { gate, up, d_y, activation } = backward;
        let [parts_u, parts_b] = parts.places(&scratch, [0, 2]);
        let [t, eights, part_tokens] = parts.args();
        let kernel = match activation {
            Activation::Silu => format!("lora_output_{}_swiglu", parts.lora_rank),
            Activation::GeluTanh => format!("lora_output_{}_geglu", parts.lora_rank),
        };
        let args =
            args![parts_u, parts_b, gate, up, d_y, of_gate.b, of_up.b, of_gate.u, of_up.u, t, eights, part_tokens];
        // SAFETY: the lengths were checked above, the scratch holds both kinds of parts of two outputs, and nothing else
        // uses it.
        unsafe { self.launch(&kernel, parts.grid(), args) }?;
        for (nth, lora) in [of_gate, of_up].into_iter().enumerate() {
            let (d_u, d_b) = (d_u.range_mut(lora.d_u_range.clone()), grads.range_mut(lora.b_range.clone()));
            let sums = parts.places(&scratch, [nth, 2]);
            // SAFETY: as above; the kernel before has written all parts.
            unsafe { self.add_output(d_u, d_b, sums, &parts, lora.scale, lora.accumulate) }?;
        }
        Ok(())
    }

    /// LoRA's part is written first, and the base products add to it. Modules of one rank share a kernel. Where a rank has none, all is
    /// made of other ops.
    fn lora_input(&self, args: LoraInput<'_, '_, Cuda<A>>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        let targets: Vec<_> = args.modules.iter().filter_map(|module| module.lora.as_ref()).collect();
        let parts = |lora: &&InputLora<'_, _>| {
            Some(InputParts::new(tokens, features, Kernels::find(lora.lora_rank, features)?))
        };
        let Some(parts) = targets.iter().map(parts).collect::<Option<Vec<_>>>() else { return lora::input(self, args) };
        let needed = parts.iter().map(|parts| parts.len).max().filter(|_| tokens > 0);
        let scratch = needed.and_then(|len| Scratch::new(&args.scratch, len));
        let Some(scratch) = scratch else { return lora::input(self, args) };
        let LoraInput { mut d_x, mut accumulate, mut grads, modules, x, mask, .. } = args;
        // A kernel makes the input of one module as it reads it.
        let x = match x {
            Input::Gated(args) if targets.len() > 1 => Input::Plain(args.made(self)?),
            x => x,
        };
        let mut at = 0;
        for targets in targets.chunk_by(|a, b| a.lora_rank == b.lora_rank) {
            let parts = parts[at];
            at += targets.len();
            for targets in targets.chunks(parts.kernels.max_modules) {
                let (d_x, grads) = (d_x.range_mut(0..tokens * features), grads.range_mut(0..grads.len()));
                // SAFETY: the lengths were checked above, and the scratch holds the parts of as many modules.
                unsafe { self.lora_part_of_input(d_x, accumulate, grads, targets, &x, mask, &scratch, parts) }?;
                accumulate = true;
            }
        }
        for InputModule { outputs, output_scale, .. } in modules {
            for &[weight, d_y] in outputs {
                let sizes = [tokens, features, weight.len() / features];
                product(self, d_x.range_mut(0..tokens * features), d_y, (weight, No), sizes, *output_scale, 1.0)?;
            }
        }
        Ok(())
    }
}

/// The division of `lora_output`'s sums: those of d_u over features, those of d_B over tokens.
struct OutputParts {
    lora_rank: usize,
    tokens: usize,
    features: usize,
    warps: usize,
    /// Blocks of features.
    blocks: usize,
    /// Tokens of a part.
    part_tokens: usize,
    num_parts: usize,
}

impl OutputParts {
    /// Returns `None` without tokens, and where the rank has no kernel.
    fn new([tokens, features]: [usize; 2], lora_rank: usize, division: OutputBlocks) -> Option<OutputParts> {
        let warps = Kernels::find(lora_rank, features)?.output_warps.filter(|_| tokens > 0)?;
        let blocks = features.div_ceil(warps * division.warp_features);
        let num_parts = (division.blocks / blocks).min(tokens / division.min_tokens).max(1);
        let part_tokens = part_tokens(tokens, num_parts);
        Some(OutputParts {
            lora_rank,
            tokens,
            features,
            warps,
            blocks,
            part_tokens,
            num_parts: tokens.div_ceil(part_tokens),
        })
    }

    /// Numbers of the sums of d_u, and of d_B.
    fn lens(&self) -> [usize; 2] {
        [self.blocks * self.tokens, self.num_parts * self.features].map(|rows| rows * self.lora_rank)
    }

    /// Number of the sums of this many outputs.
    fn len(&self, outputs: usize) -> usize {
        outputs * self.lens().iter().sum::<usize>()
    }

    /// The places of the sums of d_u and of d_B of one of some outputs: those of d_u of all of them come first.
    fn places(&self, scratch: &Scratch, [nth, outputs]: [usize; 2]) -> [Arg; 2] {
        let [len_u, len_b] = self.lens();
        [scratch.at(nth * len_u), scratch.at(outputs * len_u + nth * len_b)]
    }

    /// The kernels' last arguments.
    fn args(&self) -> [u32; 3] {
        [self.tokens, self.features / 8, self.part_tokens].map(|size| size as u32)
    }

    fn grid(&self) -> Grid {
        Grid { blocks: (self.blocks, self.num_parts), threads: 32 * self.warps as u32, shared_bytes: 0 }
    }
}

/// The division of `lora_input`'s sums over tokens.
#[derive(Clone, Copy)]
struct InputParts {
    kernels: Kernels,
    tokens: usize,
    features: usize,
    /// Tokens of a part.
    part_tokens: usize,
    num_parts: usize,
    /// Number of the sums of all parts and modules.
    len: usize,
}

impl InputParts {
    fn new(tokens: usize, features: usize, kernels: Kernels) -> InputParts {
        let part_tokens = part_tokens(tokens, (tokens / INPUT_MIN_TOKENS).clamp(1, INPUT_MAX_PARTS));
        let num_parts = tokens.div_ceil(part_tokens);
        let len = num_parts * kernels.max_modules * kernels.lora_rank * features;
        InputParts { kernels, tokens, features, part_tokens, num_parts, len }
    }
}

/// Scratch memory for sums in f32.
struct Scratch(usize);

impl Scratch {
    /// Returns `None` where less than `len` numbers fit.
    fn new<A: HalfType>(scratch: &ViewMut<'_, Cuda<A>, A>, len: usize) -> Option<Scratch> {
        (scratch.len() * size_of::<A>() >= len * size_of::<f32>()).then_some(Scratch(scratch.addr()))
    }

    /// The address of a number.
    fn at(&self, i: usize) -> Arg {
        Arg::from((self.0 + i * size_of::<f32>()) as u64)
    }
}

impl<A: HalfType> Cuda<A> {
    /// d_u = scale · the sums of its parts, or d_u += that with `accumulate`, and d_B += scale · the sums of its parts.
    ///
    /// # Safety
    /// `sums` are the places of both, with the lengths of `parts`.
    unsafe fn add_output(
        &self,
        d_u: ViewMut<'_, Cuda<A>, A>,
        d_b: ViewMut<'_, Cuda<A>, f32>,
        [parts_u, parts_b]: [Arg; 2],
        parts: &OutputParts,
        scale: f32,
        accumulate: bool,
    ) -> Result<()> {
        let (len_u, len_b, accumulate) = (d_u.len(), d_b.len(), u32::from(accumulate));
        let (blocks, num_parts) = (parts.blocks as u32, parts.num_parts as u32);
        let args = args![d_u, d_b, parts_u, parts_b, len_u as u32, len_b as u32, blocks, num_parts, scale, accumulate];
        // SAFETY: the caller's duty.
        unsafe { self.launch("lora_add_output", Grid::rows((len_u + len_b).div_ceil(256)), args) }
    }

    /// d_x = Σ mask ∘ (d_u · A), or d_x += that with `accumulate`, and d_A += d_uᵀ · dropout(x), of a few modules.
    ///
    /// # Safety
    /// All are of the sizes of `parts`, and the scratch holds its sums.
    #[allow(clippy::too_many_arguments, reason = "a part of one op")]
    unsafe fn lora_part_of_input(
        &self,
        d_x: ViewMut<'_, Cuda<A>, A>,
        accumulate: bool,
        mut grads: ViewMut<'_, Cuda<A>, f32>,
        targets: &[&InputLora<'_, Cuda<A>>],
        x: &Input<'_, Cuda<A>>,
        mask: Option<DropoutMask<'_, Cuda<A>>>,
        scratch: &Scratch,
        parts: InputParts,
    ) -> Result<()> {
        let InputParts { kernels, tokens, features, part_tokens, num_parts, .. } = parts;
        let sums = scratch.at(0);
        let each = |lora: &&InputLora<'_, Cuda<A>>| args![lora.d_u, lora.a, lora.number];
        let [u0, u1, u2, a0, a1, a2, n0, n1, n2] = module_args(targets.iter().map(each));
        let [sample_idx, positions, seed, step, threshold, scale] = mask_args(mask);
        let (t, eights, part_tokens, accumulate) =
            (tokens as u32, (features / 8) as u32, part_tokens as u32, u32::from(accumulate));
        // The kernels' struct Input.
        let (kernel, x) = match x {
            Input::Plain(x) => (targets.len().to_string(), [x.addr() as u64, 0, 0]),
            Input::Gated(GatedForward { gate, up, activation, .. }) => {
                let is_gelu = u64::from(*activation == Activation::GeluTanh);
                ("gated".into(), [gate.addr() as u64, up.addr() as u64, is_gelu])
            }
        };
        let x = &[x][..];
        let args = args![
            d_x,
            sums,
            u0,
            u1,
            u2,
            a0,
            a1,
            a2,
            n0,
            n1,
            n2,
            x,
            sample_idx,
            positions,
            seed,
            step,
            threshold,
            scale,
            t,
            eights,
            part_tokens,
            accumulate
        ];
        let blocks = (features.div_ceil(INPUT_FEATURES), num_parts);
        let grid = Grid { blocks, threads: INPUT_THREADS, shared_bytes: 0 };
        // SAFETY: the caller's duty.
        unsafe { self.launch(&format!("lora_input_{}_{kernel}", kernels.lora_rank), grid, args) }?;
        let mut d_a = [Arg::from(0u64); MODULES];
        for (arg, lora) in d_a.iter_mut().zip(targets) {
            *arg = Arg::from(grads.range_mut(lora.a_range.clone()));
        }
        let [d_a0, d_a1, d_a2] = d_a;
        let len = kernels.lora_rank * features;
        let args = args![d_a0, d_a1, d_a2, sums, targets.len() as u32, num_parts as u32, len as u32];
        let grid = Grid { blocks: (len.div_ceil(256), targets.len()), threads: 256, shared_bytes: 0 };
        // SAFETY: the caller's duty; the kernel before has written all sums, and the ranges of d_A do not overlap.
        unsafe { self.launch("lora_add_input", grid, args) }
    }
}
