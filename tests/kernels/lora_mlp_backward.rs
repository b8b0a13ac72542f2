//! The backward of a gated activation together with LoRA's products of gate and up.

use super::*;

/// Tokens, features, and the ranks of gate and up: sizes that fill no tile, ranks without a kernel and ranks that differ,
/// real ones.
const SHAPES: [(usize, usize, [usize; 2]); 11] = [
    (1, 8, [8; 2]),
    (7, 264, [16; 2]),
    (33, 576, [24; 2]),
    (40, 320, [32; 2]),
    (131, 1000, [8, 16]),
    (131, 1000, [64; 2]),
    (300, 520, [16; 2]),
    (257, 1032, [32; 2]),
    (700, 1536, [8; 2]),
    (1500, 4096, [16; 2]),
    (1000, 14_336, [32; 2]),
];

/// Elements by which the scratch is longer than its contract says: without them small sizes have no kernel.
const LONGER: usize = 1 << 20;

/// One case. In `one_module` gate and up are rows of a module, which has the rank of gate.
#[derive(Clone, Copy)]
struct Case {
    tokens: usize,
    features: usize,
    ranks: [usize; 2],
    one_module: bool,
    activation: Activation,
    longer: usize,
}

/// gate and up after the op are their gradients.
#[derive(PartialEq)]
struct Results {
    gate: Vec<f32>,
    up: Vec<f32>,
    d_u: Vec<f32>,
    d_b: Vec<f32>,
}

impl Case {
    /// gate, up and d_y.
    fn inputs(&self) -> [Vec<f32>; 3] {
        let len = self.tokens * self.features;
        [random(len, 2.0, 1), random(len, 1.0, 2), random(len, 0.1, 3)]
    }

    /// Runs the op, or with `products_alone` LoRA's products with gate and up as they are.
    fn run<D: Ops>(&self, d: &D, [gate, up, d_y]: &[Vec<f32>; 3], products_alone: bool) -> Results
    where
        D::Act: Into<f32>,
    {
        let Case { tokens, features, ranks, one_module, activation, longer } = *self;
        let [r, r_up] = if one_module { [ranks[0]; 2] } else { ranks };
        let (mut gate, mut up, d_y) = (put_act(d, gate), put_act(d, up), put_act(d, d_y));
        let [u, u_up] = [(r, 4), (r_up, 5)].map(|(r, seed)| put_act(d, &random(tokens * r, 0.1, seed)));
        let [b, b_up] = [(r, 6), (r_up, 7)].map(|(r, seed)| put_act(d, &random(features * r, 0.1, seed)));
        let num_d_u = if one_module { tokens * r } else { tokens * (r + r_up) };
        let mut d_u = buffer(d, num_d_u);
        let mut grads = put(d, &random(features * (r + r_up), 1.0, 8));
        let mut scratch = buffer(d, tokens * features + longer);
        let of_gate = OutputLora {
            d_u_range: 0..tokens * r,
            b_range: 0..features * r,
            u: u.view(),
            b: b.view(),
            lora_rank: r,
            scale: 0.5,
            accumulate: false,
        };
        let of_up = OutputLora {
            d_u_range: if one_module { 0..tokens * r } else { tokens * r..num_d_u },
            b_range: features * r..features * (r + r_up),
            u: if one_module { u.view() } else { u_up.view() },
            b: b_up.view(),
            lora_rank: r_up,
            scale: 0.25,
            accumulate: one_module,
        };
        let (mut d_u_out, mut grads_out, mut scratch) = (d_u.view_mut(), grads.view_mut(), scratch.view_mut());
        if products_alone {
            for (lora, d_y) in [(of_gate, &gate), (of_up, &up)] {
                d.lora_output(lora.output(d_y.view(), &mut d_u_out, &mut grads_out, &mut scratch)).unwrap();
            }
        } else {
            d.lora_gated_backward(LoraGatedBackward {
                backward: GatedBackward { gate: gate.view_mut(), up: up.view_mut(), d_y: d_y.view(), activation },
                d_u: d_u_out,
                grads: grads_out,
                gate: Some(of_gate),
                up: Some(of_up),
                scratch,
            })
            .unwrap();
        }
        Results { gate: get_act(d, &gate), up: get_act(d, &up), d_u: get_act(d, &d_u), d_b: get(d, &grads) }
    }
}

/// Returns what the backward of the activation alone puts in the places of gate and up.
fn gradients<D: Ops>(d: &D, [gate, up, d_y]: &[Vec<f32>; 3], activation: Activation) -> [Vec<f32>; 2]
where
    D::Act: Into<f32>,
{
    let (mut gate, mut up, d_y) = (put_act(d, gate), put_act(d, up), put_act(d, d_y));
    d.gated_backward(GatedBackward { gate: gate.view_mut(), up: up.view_mut(), d_y: d_y.view(), activation }).unwrap();
    [get_act(d, &gate), get_act(d, &up)]
}

pub fn lora_gated_backward<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    let cpu = Cpu::new(1);
    for (tokens, features, ranks) in SHAPES.into_iter().filter(|(t, f, ..)| is_run(t * f)) {
        for (activation, one_module, longer) in [
            (Activation::Silu, false, LONGER),
            (Activation::Silu, true, LONGER),
            (Activation::GeluTanh, false, LONGER),
            (Activation::Silu, false, 0),
        ] {
            let case = Case { tokens, features, ranks, one_module, activation, longer };
            let what =
                format!("[{tokens}, {features}] r {ranks:?} {activation:?} one module {one_module} longer {longer}");
            let inputs = case.inputs();
            let result = case.run(&cuda, &inputs, false);
            assert!(case.run(&cuda, &inputs, false) == result, "{what}: the same bits again");
            let [d_gate, d_up] = gradients(&cuda, &inputs, activation);
            assert!(result.gate == d_gate, "{what}: d_gate has the bits of the activation's backward");
            assert!(result.up == d_up, "{what}: d_up has the bits of the activation's backward");
            // The products take the gradients as they are rounded.
            let [_, _, d_y] = inputs;
            let reference = case.run(&cpu, &[d_gate, d_up, d_y], true);
            // Where the second output adds to d_u of the first, it is rounded twice.
            close::<A>(&format!("{what}: d_u"), &result.d_u, &reference.d_u, if one_module { 4.0 } else { 3.0 });
            within(&format!("{what}: d_b"), &result.d_b, &reference.d_b, 1e-5);
        }
    }
}

/// The op of the CPU is the activation's backward and then the products, to the bit.
#[test]
fn lora_gated_backward_of_the_cpu_are_those_of_the_ops_it_is_made_of() {
    let cpu = Cpu::new(2);
    for one_module in [false, true] {
        let (ranks, activation) = ([8, 3], Activation::Silu);
        let case = Case { tokens: 13, features: 40, ranks, one_module, activation, longer: 0 };
        let inputs = case.inputs();
        let [d_gate, d_up] = gradients(&cpu, &inputs, activation);
        let [_, _, d_y] = inputs.clone();
        assert!(
            case.run(&cpu, &inputs, false) == case.run(&cpu, &[d_gate, d_up, d_y], true),
            "one module {one_module}"
        );
    }
}
