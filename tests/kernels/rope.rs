//! Rotary position embedding, forward and back.

use super::*;

pub fn rope<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, tokens: usize, num_heads: usize, head_dim: usize, inverse: bool) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let mut x = put_act(d, &random(tokens * num_heads * head_dim, 1.0, 1));
        let angles = tokens * head_dim / 2;
        let (cos, sin) = (put(d, &random(angles, 0.5, 2)), put(d, &random(angles, 0.5, 3)));
        d.rope(Rope { x: x.view_mut(), cos: cos.view(), sin: sin.view(), num_heads, head_dim, inverse }).unwrap();
        get_act(d, &x)
    }
    for (tokens, heads, head_dim) in [(1, 1, 64), (7, 9, 64), (131, 3, 96), (257, 32, 128)] {
        for inverse in [false, true] {
            let reference = run(&Cpu::new(1), tokens, heads, head_dim, inverse);
            close::<A>("rope", &run(&cuda, tokens, heads, head_dim, inverse), &reference, 2.0);
        }
    }
}
