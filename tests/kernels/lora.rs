//! LoRA's products and dropout, with the masks of the CPU.

use super::*;

/// Tokens and features of LoRA's products, and the ranks of the modules that share an input: sizes that fill no tile, ranks and groups
/// without a kernel of their own, modules of several ranks, real ones.
const SHAPES: [(usize, usize, &[usize]); 15] = [
    (1, 8, &[8]),
    (7, 264, &[16; 2]),
    (33, 576, &[1]),
    (40, 320, &[24; 3]),
    (131, 1000, &[8; 3]),
    (131, 1000, &[64; 2]),
    (300, 520, &[16; 3]),
    (257, 1032, &[32; 3]),
    (600, 264, &[512]),
    (700, 1536, &[8; 2]),
    (1024, 1536, &[16]),
    (1500, 4096, &[16; 2]),
    (131, 1000, &[8, 64, 64]),
    (300, 520, &[16, 32, 16]),
    (257, 520, &[3, 8, 16]),
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
        let mask = DropoutMask { probability, seed: 42 << 33, step: 7, sample_idx, positions };
        d.lora_dropout(LoraDropout { y: y.view_mut(), x: x.view(), mask, module: 205, accumulate }).unwrap();
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

/// Products of some modules that share an input, with a mask, and without one where the probability is 0. An output is as wide as the
/// input, or [`ROWS_OF_W`] where it is multiplied with the base's weight.
#[derive(Clone, Copy)]
struct Products {
    tokens: usize,
    features: usize,
    ranks: &'static [usize],
    probability: f32,
}

const ROWS_OF_W: usize = 8;

/// Number of the first module.
const FIRST: u32 = 205;

/// The buffers of one module.
struct Buffers<D: Ops> {
    a: Buffer<D, D::Act>,
    b: Buffer<D, D::Act>,
    d_y: Buffer<D, D::Act>,
    u: Buffer<D, D::Act>,
    d_u: Buffer<D, D::Act>,
}

/// Results by module but for d_x.
#[derive(PartialEq)]
struct Results {
    u: Vec<f32>,
    d_u: Vec<f32>,
    d_b: Vec<f32>,
    d_a: Vec<f32>,
    d_x: Vec<f32>,
}

impl Products {
    fn buffers<D: Ops>(&self, d: &D) -> Vec<Buffers<D>> {
        let Products { tokens: t, features: k, ranks, .. } = *self;
        let module = |(i, &r): (u64, &usize)| Buffers {
            a: put_act(d, &random(r * k, 0.1, 10 + i)),
            b: put_act(d, &random(r * k, 0.1, 20 + i)),
            d_y: put_act(d, &random(t * k, 0.1, 30 + i)),
            u: buffer(d, t * r),
            d_u: put_act(d, &random(t * r, 0.1, 40 + i)),
        };
        (0..).zip(ranks).map(module).collect()
    }

    /// Runs the ops one after the other. Each takes inputs of its own and not results of another. With `accumulate` d_x is added to.
    fn run<D: Ops>(&self, d: &D, x: &[f32], accumulate: bool) -> Results
    where
        D::Act: Into<f32>,
    {
        let Products { tokens: t, features: k, ranks, probability } = *self;
        let num_values = k * ranks.iter().sum::<usize>();
        // The place of a module's A or B among those of all.
        let place = |i: usize| k * ranks[..i].iter().sum::<usize>()..k * ranks[..=i].iter().sum::<usize>();
        let x = put_act(d, x);
        let mut modules = self.buffers(d);
        let weight = put_act(d, &random(ROWS_OF_W * k, 0.1, 6));
        let (mut d_x, mut scratch) = (put_act(d, &random(t * k, 0.1, 5)), buffer(d, t * k));
        let (mut d_a, mut d_b) = (put(d, &random(num_values, 1.0, 4)), put(d, &random(num_values, 1.0, 3)));
        let (positions, sample_idx) = indices(d, t);
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = DropoutMask { probability, seed: 42 << 33, step: 7, sample_idx, positions };
        let mask = (probability > 0.0).then_some(mask);
        let mut downs: Vec<_> = modules
            .iter_mut()
            .zip(ranks.iter().zip(FIRST..))
            .map(|(Buffers { u, a, .. }, (&lora_rank, number))| DownModule {
                u: u.view_mut(),
                a: a.view(),
                lora_rank,
                number,
            })
            .collect();
        let scratch_view = scratch.view_mut();
        d.lora_down(LoraDown { modules: &mut downs, x: x.view(), mask, scratch: scratch_view }).unwrap();
        let u: Vec<f32> = modules.iter().flat_map(|module| get_act(d, &module.u)).collect();
        let mut d_u = Vec::new();
        for (i, Buffers { b, d_y, d_u: given, .. }) in modules.iter().enumerate() {
            // An output of the same width, whose u is the d_u that is given; the second module adds to it.
            let r = ranks[i];
            let mut out = put_act(d, &random(t * r, 0.1, 50));
            d.lora_output(LoraOutput {
                d_u: out.view_mut(),
                d_b: d_b.view_mut().into_range(place(i)),
                d_y: d_y.view(),
                u: given.view(),
                b: b.view(),
                lora_rank: r,
                scale: 0.5,
                accumulate: i == 1,
                scratch: scratch.view_mut(),
            })
            .unwrap();
            d_u.extend(get_act(d, &out));
        }
        let inputs: Vec<_> = modules
            .iter()
            .enumerate()
            .map(|(i, Buffers { a, d_y, d_u, .. })| InputModule {
                outputs: vec![[weight.view(), d_y.first(t * ROWS_OF_W)]],
                output_scale: 0.5,
                lora: Some(InputLora {
                    d_u: d_u.view(),
                    a: a.view(),
                    a_range: place(i),
                    lora_rank: ranks[i],
                    number: FIRST + i as u32,
                }),
            })
            .collect();
        d.lora_input(LoraInput {
            d_x: d_x.view_mut(),
            accumulate,
            grads: d_a.view_mut(),
            modules: &inputs,
            x: Input::Plain(x.view()),
            in_features: k,
            mask,
            scratch: scratch.view_mut(),
        })
        .unwrap();
        Results { u, d_u, d_b: get(d, &d_b), d_a: get(d, &d_a), d_x: get_act(d, &d_x) }
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
    for (tokens, features, ranks) in SHAPES.into_iter().filter(|(t, f, ..)| is_run(t * f)) {
        let x = random(tokens * features, 1.0, 1);
        for (probability, accumulate) in [(0.0, false), (0.05, true), (0.5, false)] {
            let products = Products { tokens, features, ranks, probability };
            let what = format!("lora products [{tokens}, {features}] r {ranks:?} p {probability}");
            let (result, reference) = (products.run(&cuda, &x, accumulate), products.run(&cpu, &x, accumulate));
            // Ops that a rank or a size has no kernel for round dropout(x), or each sum.
            close::<A>(&format!("{what}: u"), &result.u, &reference.u, 3.0);
            close::<A>(&format!("{what}: d_u"), &result.d_u, &reference.d_u, 3.0);
            close::<A>(&format!("{what}: d_x"), &result.d_x, &reference.d_x, 4.0);
            within(&format!("{what}: d_b"), &result.d_b, &reference.d_b, 1e-5);
            let plain = error(&reference.u.iter().map(|&u| rounded::<A>(u)).collect::<Vec<_>>(), &reference.u);
            within(&format!("{what}: d_a"), &result.d_a, &reference.d_a, plain.max(1e-5));
            assert!(products.run(&cuda, &x, accumulate) == result, "{what}: the same bits again");
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
        let finish = Finish::Nothing;
        d.lora_linear(LoraLinear { y: y_out, x, weight, bias, u, b, lora_rank, scale: 0.5, output_scale, finish })
            .unwrap();
        get_act(d, &y)
    }
    let cpu = Cpu::new(1);
    // Few numbers would say little about an error: one row has many columns.
    // A Hopper has a kernel of its own for the sizes from the fourth on; those before leave too many of its multiprocessors idle.
    const SIZES: [([usize; 3], usize); 7] = [
        ([1, 4096, 64], 8),
        ([7, 264, 64], 16),
        ([131, 576, 1536], 24),
        ([1000, 4096, 72], 8),
        ([250, 16_640, 64], 16),
        ([2040, 4096, 200], 16),
        ([500, 8136, 136], 136),
    ];
    for (sizes, lora_rank) in SIZES {
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
            let result = run(&cuda, sizes, lora_rank, [1.0, 1.0, bias, scale]);
            close_as(&what, &result, &plain, &reference, 2.0);
            assert!(run(&cuda, sizes, lora_rank, [1.0, 1.0, bias, scale]) == result, "{what}: the same bits again");
        }
    }
}

/// A product that is finished is the product and then the op, to the bit, whether a size has a kernel for it or not.
pub fn lora_linear_and_its_finish<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    let d = &cuda;
    const LORA_RANK: usize = 16;
    // Tokens, features, heads, head_dim and rotary_dim. All but the first two fill a Hopper's tiles.
    for [tokens, k, num_heads, head_dim, rotary_dim] in [
        [7, 64, 3, 128, 128],
        [1, 72, 2, 64, 64],
        [1000, 72, 32, 128, 128],
        [1023, 200, 32, 128, 128],
        [1024, 64, 64, 64, 64],
        [1024, 64, 16, 256, 256],
        [1024, 64, 32, 128, 64],
    ] {
        let n = num_heads * head_dim;
        let (x, weight) = (put_act(d, &random(tokens * k, 1.0, 1)), put_act(d, &random(n * k, 0.1, 2)));
        let (u, b) = (put_act(d, &random(tokens * LORA_RANK, 1.0, 3)), put_act(d, &random(n * LORA_RANK, 0.1, 4)));
        let (bias, residual) = (put(d, &random(n, 1.0, 5)), put_act(d, &random(tokens * n, 1.0, 6)));
        let angles = random(tokens * rotary_dim / 2, 3.0, 7);
        let cos = put(d, &angles.iter().map(|angle| angle.cos()).collect::<Vec<_>>());
        let sin = put(d, &angles.iter().map(|angle| angle.sin()).collect::<Vec<_>>());
        let rotation = Rotation { cos: cos.view(), sin: sin.view(), num_heads, head_dim, rotary_dim };
        for i in 0..3 {
            let finish = || match i {
                0 => Finish::Nothing,
                1 => Finish::Add(residual.view()),
                _ => Finish::Rotate(rotation),
            };
            let run = |together: bool| {
                let mut y = buffer(d, tokens * n);
                let [now, later] = match together {
                    true => [finish(), Finish::Nothing],
                    false => [Finish::Nothing, finish()],
                };
                d.lora_linear(LoraLinear {
                    y: y.view_mut(),
                    x: x.view(),
                    weight: weight.view(),
                    bias: Some(bias.view()),
                    u: u.view(),
                    b: b.view(),
                    lora_rank: LORA_RANK,
                    scale: 0.5,
                    output_scale: 0.22,
                    finish: now,
                })
                .unwrap();
                later.run(d, y.view_mut()).unwrap();
                get_act(d, &y)
            };
            assert!(
                run(true) == run(false),
                "finish {i} of [{tokens}, {k}] · {num_heads} heads of {head_dim}, {rotary_dim} turn"
            );
        }
    }
}

/// An activation that is not there gives the gradients of one that is, to the bit, whether a rank has a kernel for it or not.
pub fn lora_input_of_a_gated_activation<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    let d = &cuda;
    for (tokens, features, ranks) in
        [(133, 576, &[16][..]), (300, 520, &[8]), (257, 1032, &[64]), (40, 320, &[24]), (64, 72, &[16; 2])]
    {
        let len = tokens * features;
        let [gate, up] = [1, 2].map(|seed| put_act(d, &random(len, 2.0, seed)));
        for (activation, probability) in [(Activation::Silu, 0.0), (Activation::Silu, 0.1), (Activation::GeluTanh, 0.1)]
        {
            let weight = put_act(d, &random(ROWS_OF_W * features, 0.1, 3));
            let d_y = put_act(d, &random(tokens * ROWS_OF_W, 0.1, 7));
            let run = |is_there: bool| {
                let (mut act, mut d_x, mut scratch) = (buffer(d, len), buffer(d, len), buffer(d, len));
                let mut d_a = put(d, &random(features * ranks.iter().sum::<usize>(), 1.0, 4));
                let of: Vec<_> = ranks
                    .iter()
                    .map(|&r| (put_act(d, &random(tokens * r, 0.1, 5)), put_act(d, &random(r * features, 0.1, 6))))
                    .collect();
                let (positions, sample_idx) = indices(d, tokens);
                let (sample_idx, positions) = (sample_idx.view(), positions.view());
                let mask = DropoutMask { probability, seed: 42 << 33, step: 7, sample_idx, positions };
                let mut before = 0;
                let mut modules = Vec::new();
                for ((d_u, a), &lora_rank) in of.iter().zip(ranks) {
                    let a_range = before..before + lora_rank * features;
                    before = a_range.end;
                    let lora = InputLora { d_u: d_u.view(), a: a.view(), a_range, lora_rank, number: FIRST };
                    let outputs = vec![[weight.view(), d_y.view()]];
                    modules.push(InputModule { outputs, output_scale: 1.0, lora: Some(lora) });
                }
                let args = GatedForward { y: act.view_mut(), gate: gate.view(), up: up.view(), activation };
                let x = match is_there {
                    true => {
                        d.gated_forward(args).unwrap();
                        Input::Plain(act.view())
                    }
                    false => Input::Gated(args),
                };
                d.lora_input(LoraInput {
                    d_x: d_x.view_mut(),
                    accumulate: false,
                    grads: d_a.view_mut(),
                    modules: &modules,
                    x,
                    in_features: features,
                    mask: (probability > 0.0).then_some(mask),
                    scratch: scratch.view_mut(),
                })
                .unwrap();
                (get_act(d, &d_x), get(d, &d_a))
            };
            assert!(run(false) == run(true), "[{tokens}, {features}] r {ranks:?} p {probability} {activation:?}");
        }
    }
}
