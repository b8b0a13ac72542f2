//! LoRA's products of an MLP's gate and up with their activation.

use super::*;

/// The modules gate and up, which read one input x.
struct Mlp<D: Ops> {
    x: Buffer<D, D::Act>,
    /// W, u and B of gate and of up.
    modules: [[Buffer<D, D::Act>; 3]; 2],
    /// Tokens and out.
    sizes: [usize; 2],
    lora_rank: usize,
    /// Up has the scale 0.5.
    scale_of_gate: f32,
}

impl<D: Ops> Mlp<D>
where
    D::Act: Into<f32>,
{
    fn new(d: &D, [tokens, out, features]: [usize; 3], lora_rank: usize, scale_of_gate: f32) -> Self {
        let module = |seed: u64| {
            [
                put_act(d, &random(out * features, 0.1, seed)),
                put_act(d, &random(tokens * lora_rank, 1.0, seed + 1)),
                put_act(d, &random(out * lora_rank, 0.1, seed + 2)),
            ]
        };
        let x = put_act(d, &random(tokens * features, 1.0, 1));
        Self { x, modules: [module(10), module(20)], sizes: [tokens, out], lora_rank, scale_of_gate }
    }

    fn linear<'a>(&'a self, y: &'a mut Buffer<D, D::Act>, of: usize) -> LoraLinear<'a, D> {
        let [weight, u, b] = &self.modules[of];
        LoraLinear {
            y: y.view_mut(),
            x: self.x.view(),
            weight: weight.view(),
            bias: None,
            u: u.view(),
            b: b.view(),
            lora_rank: self.lora_rank,
            scale: [self.scale_of_gate, 0.5][of],
            output_scale: 0.22,
            finish: Finish::Nothing,
        }
    }

    /// act, gate and up of one op. The activation is left out without `act`; gate and up are zeros where the device leaves them out.
    fn together(&self, d: &D, activation: Activation, act: bool, keeps_inputs: bool) -> [Vec<f32>; 3] {
        let [mut y, mut gate, mut up] = [(); 3].map(|()| buffer(d, self.sizes.iter().product()));
        d.lora_gated_forward(LoraGatedForward {
            act: act.then(|| y.view_mut()),
            gate: self.linear(&mut gate, 0),
            up: self.linear(&mut up, 1),
            activation,
            keeps_inputs,
        })
        .unwrap();
        [y, gate, up].map(|buffer| get_act(d, &buffer))
    }

    /// act, gate and up of three ops.
    fn apart(&self, d: &D, activation: Activation) -> [Vec<f32>; 3] {
        let [mut y, mut gate, mut up] = [(); 3].map(|()| buffer(d, self.sizes.iter().product()));
        d.lora_linear(self.linear(&mut gate, 0)).unwrap();
        d.lora_linear(self.linear(&mut up, 1)).unwrap();
        d.gated_forward(GatedForward { y: y.view_mut(), gate: gate.view(), up: up.view(), activation }).unwrap();
        [y, gate, up].map(|buffer| get_act(d, &buffer))
    }
}

/// One op gives what three give. The bits are equal where a device has the same kernels for both.
pub fn lora_gated_forward<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    // A Hopper has kernels of its own for all but the first two sizes. For the last one it has none for a module alone.
    for (sizes, lora_rank, scale_of_gate, same_kernels) in [
        ([7, 264, 64], 16, 0.5, true),
        ([131, 576, 1536], 24, 0.5, true),
        ([1000, 4096, 72], 8, 0.5, true),
        ([1023, 4096, 200], 16, 0.5, true),
        ([1024, 4096, 136], 136, 0.5, true),
        ([1024, 4096, 72], 16, 2.0, true),
        ([256, 8448, 64], 8, 0.5, false),
    ] {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let what = format!("{sizes:?} r {lora_rank} scale {scale_of_gate} {activation:?}");
            let mlp = Mlp::new(&cuda, sizes, lora_rank, scale_of_gate);
            let whole = mlp.together(&cuda, activation, true, true);
            let [act, gate, up] = &whole;
            if same_kernels {
                assert!(whole == mlp.apart(&cuda, activation), "{what}: three ops");
            } else {
                let cpu = Cpu::new(1);
                let reference = Mlp::new(&cpu, sizes, lora_rank, scale_of_gate).apart(&cpu, activation);
                for (part, result, reference) in
                    [("act", act, &reference[0]), ("gate", gate, &reference[1]), ("up", up, &reference[2])]
                {
                    close::<A>(&format!("{what}: {part}"), result, reference, 3.0);
                }
            }
            assert!(mlp.together(&cuda, activation, true, false)[0] == *act, "{what}: gate and up are left out");
            let [_, gate_alone, up_alone] = mlp.together(&cuda, activation, false, true);
            assert!(gate_alone == *gate && up_alone == *up, "{what}: the activation is left out");
        }
    }
}
