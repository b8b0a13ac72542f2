//! LoRA's products and dropout, with the masks of the CPU.

use super::*;

/// Tokens, features and ranks of LoRA's products: sizes that fill no tile, a rank without a kernel of its own, real ones.
const SHAPES: [(usize, usize, usize); 8] = [
    (1, 8, 8),
    (7, 264, 16),
    (33, 576, 8),
    (131, 1000, 64),
    (40, 320, 24),
    (257, 4096, 32),
    (1024, 1536, 16),
    (1500, 14_336, 16),
];

pub fn lora_dropout_has_the_masks_of_the_cpu<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, tokens: usize, features: usize, probability: f32, accumulate: bool) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let (x, mut y) =
            (put_act(d, &random(tokens * features, 1.0, 1)), put_act(d, &random(tokens * features, 1.0, 2)));
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let sample_idx: Vec<u64> = (0..tokens as u64).map(|t| t / 3).collect();
        let (positions, sample_idx) = (put(d, &positions), put(d, &sample_idx));
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = DropoutMask { probability, seed: 42 << 33, step: 7, module: 205, sample_idx, positions };
        d.lora_dropout(LoraDropout { y: y.view_mut(), x: x.view(), mask, accumulate }).unwrap();
        get_act(d, &y)
    }
    for (tokens, features) in ROWS {
        let plain = run(&cuda, tokens, features, 0.05, false);
        let reference: Vec<f32> =
            run(&Cpu::new(1), tokens, features, 0.05, false).into_iter().map(rounded::<A>).collect();
        assert!(plain == reference, "dropout of [{tokens}, {features}]");
        let reference = run(&Cpu::new(1), tokens, features, 0.5, true);
        close::<A>("accumulated", &run(&cuda, tokens, features, 0.5, true), &reference, 2.0);
    }
}

/// Products with a mask, and without one where the probability is 0.
struct Products {
    tokens: usize,
    features: usize,
    lora_rank: usize,
    probability: f32,
}

impl Products {
    /// u, dA and d_x; `x` is given so that dropout(x) can be given in its place.
    fn run<D: Ops>(&self, d: &D, x: &[f32]) -> [Vec<f32>; 3]
    where
        D::Act: Into<f32>,
    {
        let Products { tokens, features, lora_rank, probability } = *self;
        let x = put_act(d, x);
        let (a, d_u) =
            (put_act(d, &random(lora_rank * features, 0.1, 2)), put_act(d, &random(tokens * lora_rank, 0.1, 3)));
        let (mut u, mut d_a) = (buffer(d, tokens * lora_rank), put(d, &random(lora_rank * features, 1.0, 4)));
        let mut d_x = put_act(d, &random(tokens * features, 0.1, 5));
        let mut scratch = buffer(d, tokens * features);
        let (positions, sample_idx) = indices(d, tokens);
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = DropoutMask { probability, seed: 42 << 33, step: 7, module: 205, sample_idx, positions };
        let mask = (probability > 0.0).then_some(mask);
        let scratch = &mut scratch;
        d.lora_down(LoraDown {
            u: u.view_mut(),
            x: x.view(),
            a: a.view(),
            mask,
            lora_rank,
            scratch: scratch.view_mut(),
        })
        .unwrap();
        let (d_u, scratch_view) = (d_u.view(), scratch.view_mut());
        d.lora_grad_a(LoraGradA { d_a: d_a.view_mut(), d_u, x: x.view(), mask, lora_rank, scratch: scratch_view })
            .unwrap();
        let scratch_view = scratch.view_mut();
        d.lora_grad_x(LoraGradX { d_x: d_x.view_mut(), d_u, a: a.view(), mask, lora_rank, scratch: scratch_view })
            .unwrap();
        [get_act(d, &u), get(d, &d_a), get_act(d, &d_x)]
    }

    /// dropout(x), as the device rounds it.
    fn dropped<D: Ops>(&self, d: &D, x: &[f32]) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let (mut y, x) = (buffer(d, x.len()), put_act(d, x));
        let (positions, sample_idx) = indices(d, self.tokens);
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask =
            DropoutMask { probability: self.probability, seed: 42 << 33, step: 7, module: 205, sample_idx, positions };
        d.lora_dropout(LoraDropout { y: y.view_mut(), x: x.view(), mask, accumulate: false }).unwrap();
        get_act(d, &y)
    }
}

/// Positions and samples of some tokens.
fn indices<D: Ops>(d: &D, tokens: usize) -> (Buffer<D, u32>, Buffer<D, u64>) {
    let positions: Vec<u32> = (0..tokens as u32).map(|t| t % 300).collect();
    let sample_idx: Vec<u64> = (0..tokens as u64).map(|t| t / 300).collect();
    (put(d, &positions), put(d, &sample_idx))
}

pub fn lora_products<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    let cpu = Cpu::new(1);
    for (tokens, features, lora_rank) in SHAPES.into_iter().filter(|(t, f, _)| is_run(t * f)) {
        let x = random(tokens * features, 1.0, 1);
        for probability in [0.0, 0.05, 0.5] {
            let products = Products { tokens, features, lora_rank, probability };
            let what = format!("lora products [{tokens}, {features}] r {lora_rank} p {probability}");
            let (result, reference) = (products.run(&cuda, &x), products.run(&cpu, &x));
            // The plain formula rounds dropout(x) and then its products.
            let plain = match probability > 0.0 {
                true => Products { probability: 0.0, ..products }.run(&cpu, &products.dropped(&cuda, &x)),
                false => products.run(&cpu, &x),
            };
            let rounded_u: Vec<f32> = plain[0].iter().map(|&v| rounded::<A>(v)).collect();
            close_as(&format!("{what}: u"), &result[0], &rounded_u, &reference[0], 2.0);
            let allowed = (3.0 * error(&plain[1], &reference[1])).max(1e-5);
            within(&format!("{what}: d_a"), &result[1], &reference[1], allowed);
            close::<A>(&format!("{what}: d_x"), &result[2], &reference[2], 2.0);
            assert_eq!(products.run(&cuda, &x), result, "{what}: the same bits again");
        }
    }
}

pub fn lora_linear<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    /// Scales of x, u and the bias, of which one of 0 leaves its part out, and of the output.
    type Scales = [f32; 4];
    fn run<D: Ops>(
        d: &D,
        [tokens, out, features]: [usize; 3],
        lora_rank: usize,
        [x, u, bias, output_scale]: Scales,
    ) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let (x, weight) = (put_act(d, &random(tokens * features, x, 1)), put_act(d, &random(out * features, 0.1, 2)));
        let (u, b) = (put_act(d, &random(tokens * lora_rank, u, 3)), put_act(d, &random(out * lora_rank, 0.1, 4)));
        let (bias_values, mut y) = (put(d, &random(out, bias, 5)), buffer(d, tokens * out));
        let bias = (bias > 0.0).then_some(bias_values.view());
        let (x, weight, u, b) = (x.view(), weight.view(), u.view(), b.view());
        let y_out = y.view_mut();
        d.lora_linear(LoraLinear { y: y_out, x, weight, bias, u, b, lora_rank, scale: 0.5, output_scale }).unwrap();
        get_act(d, &y)
    }
    let cpu = Cpu::new(1);
    // Few numbers would say little about an error: one row has many columns.
    for (sizes, lora_rank) in [([1, 4096, 64], 8), ([7, 264, 64], 16), ([131, 576, 1536], 24)] {
        for (bias, scale) in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.22)] {
            let reference = run(&cpu, sizes, lora_rank, [1.0, 1.0, bias, scale]);
            // The plain formula rounds each of its sums.
            let (lora, base) = (
                run(&cpu, sizes, lora_rank, [0.0, 1.0, 0.0, scale]),
                run(&cpu, sizes, lora_rank, [1.0, 0.0, 0.0, scale]),
            );
            let bias_values = random(sizes[1], bias, 5);
            let plain: Vec<f32> = (0..reference.len())
                .map(|i| {
                    rounded::<A>(rounded::<A>(rounded::<A>(lora[i]) + base[i]) + scale * bias_values[i % sizes[1]])
                })
                .collect();
            let what = format!("lora_linear {sizes:?} r {lora_rank} bias {bias} output scale {scale}");
            close_as(&what, &run(&cuda, sizes, lora_rank, [1.0, 1.0, bias, scale]), &plain, &reference, 2.0);
        }
    }
}
