//! The optimizer, to the bit.

use super::*;

pub fn adamw<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, len: usize) -> [Vec<f32>; 3] {
        let mut state = [1, 2, 3].map(|i| put(d, &random(len, 0.1, i).iter().map(|v| v.abs()).collect::<Vec<_>>()));
        let grad = put(d, &random(len, 1.0, 4));
        let [param, exp_avg, exp_avg_sq] = &mut state;
        d.adamw(AdamW {
            param: param.view_mut(),
            exp_avg: exp_avg.view_mut(),
            exp_avg_sq: exp_avg_sq.view_mut(),
            grad: grad.view(),
            grad_scale: 0.7,
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 3,
        })
        .unwrap();
        state.map(|buffer| get(d, &buffer))
    }
    for len in [1, 257, 100_003] {
        for (result, reference) in run(&cuda, len).iter().zip(&run(&Cpu::new(1), len)) {
            assert!(result == reference, "adamw of {len}: the same bits wherever it runs");
        }
    }
}
