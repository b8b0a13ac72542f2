//! SwiGLU and its backward.

use super::*;

pub fn swiglu<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, len: usize) -> [Vec<f32>; 3]
    where
        D::Act: Into<f32>,
    {
        let (gate, up, d_y) =
            (put_act(d, &random(len, 3.0, 1)), put_act(d, &random(len, 1.0, 2)), put_act(d, &random(len, 1.0, 3)));
        let (mut y, mut d_gate, mut d_up) = (buffer(d, len), buffer(d, len), buffer(d, len));
        d.swiglu_forward(SwigluForward { y: y.view_mut(), gate: gate.view(), up: up.view() }).unwrap();
        let (gate, up) = (gate.view(), up.view());
        let args = SwigluBackward { d_gate: d_gate.view_mut(), d_up: d_up.view_mut(), d_y: d_y.view(), gate, up };
        d.swiglu_backward(args).unwrap();
        [get_act(d, &y), get_act(d, &d_gate), get_act(d, &d_up)]
    }
    for len in [8, 13 * 8, 257 * 8, 512 * 14_336].into_iter().filter(|&n| is_run(n)) {
        let (results, references) = (run(&cuda, len), run(&Cpu::new(1), len));
        for (what, times, (result, reference)) in [("y", 2.0, 0), ("d_gate", 3.0, 1), ("d_up", 3.0, 2)]
            .map(|(what, times, i)| (what, times, (&results[i], &references[i])))
        {
            close::<A>(what, result, reference, times);
        }
    }
}
