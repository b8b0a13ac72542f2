//! Gated activations and their backward.

use super::*;

const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

/// y, d_gate, d_up.
fn run<D: Ops>(d: &D, activation: Activation, [gate, up, d_y]: &[Vec<f32>; 3]) -> [Vec<f32>; 3]
where
    D::Act: Into<f32>,
{
    let len = gate.len();
    let (mut gate, mut up, d_y, mut y) = (put_act(d, gate), put_act(d, up), put_act(d, d_y), buffer(d, len));
    d.gated_forward(GatedForward { y: y.view_mut(), gate: gate.view(), up: up.view(), activation }).unwrap();
    d.gated_backward(GatedBackward { gate: gate.view_mut(), up: up.view_mut(), d_y: d_y.view(), activation }).unwrap();
    [get_act(d, &y), get_act(d, &gate), get_act(d, &up)]
}

pub fn gated_activations<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for len in [8, 13 * 8, 257 * 8, 512 * 14_336].into_iter().filter(|&n| is_run(n)) {
        let inputs = [random(len, 3.0, 1), random(len, 1.0, 2), random(len, 1.0, 3)];
        for activation in ACTIVATIONS {
            let (results, references) = (run(&cuda, activation, &inputs), run(&Cpu::new(1), activation, &inputs));
            for (i, (what, times)) in [("y", 2.0), ("d_gate", 3.0), ("d_up", 3.0)].into_iter().enumerate() {
                close::<A>(&format!("{activation:?}: {what}"), &results[i], &references[i], times);
            }
        }
    }
}

/// f of the contract, in f64.
fn formula(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// The CPU is the reference of the GPU: it is checked against the formula, and its gradients against differences of that formula.
#[test]
fn gated_activations_of_the_cpu_are_those_of_the_formula() {
    const STEP: f64 = 1e-5;
    let gates: Vec<f32> = (-6000..=6000).map(|i| i as f32 / 500.0).collect();
    let inputs = [gates.clone(), random(gates.len(), 1.0, 2), random(gates.len(), 1.0, 3)];
    for activation in ACTIVATIONS {
        let [y, d_gate, d_up] = run(&Cpu::new(2), activation, &inputs);
        for (i, &gate) in gates.iter().enumerate() {
            let (x, up, d_y) = (f64::from(gate), f64::from(inputs[1][i]), f64::from(inputs[2][i]));
            let slope = (formula(activation, x + STEP) - formula(activation, x - STEP)) / (2.0 * STEP);
            let expected = [formula(activation, x) * up, d_y * up * slope, d_y * formula(activation, x)];
            for (found, expected) in [y[i], d_gate[i], d_up[i]].into_iter().zip(expected) {
                let error = (f64::from(found) - expected).abs();
                assert!(error < 2e-6 * (1.0 + expected.abs()), "{activation:?} at {gate}: {found}, not {expected}");
            }
        }
    }
}
