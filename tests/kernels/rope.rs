//! Rotary position embedding, forward and back, of whole heads and of the first elements of each.

use super::*;

pub fn rope<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, [tokens, num_heads, head_dim, rotary_dim]: [usize; 4], inverse: bool) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let mut x = put_act(d, &random(tokens * num_heads * head_dim, 1.0, 1));
        let angles = tokens * rotary_dim / 2;
        let (cos, sin) = (put(d, &random(angles, 0.5, 2)), put(d, &random(angles, 0.5, 3)));
        let (cos, sin) = (cos.view(), sin.view());
        let rotation = Rotation { cos, sin, num_heads, head_dim, rotary_dim };
        d.rope(Rope { x: x.view_mut(), rotation, inverse }).unwrap();
        get_act(d, &x)
    }
    // Tokens, heads, elements of a head, and how many of them turn.
    for sizes in
        [[1, 1, 64, 64], [7, 9, 64, 64], [131, 3, 96, 96], [257, 32, 128, 128], [61, 24, 128, 96], [5, 3, 96, 48]]
    {
        let [_, _, head_dim, rotary_dim] = sizes;
        for inverse in [false, true] {
            let (result, reference) = (run(&cuda, sizes, inverse), run(&Cpu::new(1), sizes, inverse));
            close::<A>(&format!("rope {sizes:?}"), &result, &reference, 2.0);
            let rest =
                |x: &[f32]| -> Vec<f32> { x.chunks(head_dim).flat_map(|head| &head[rotary_dim..]).copied().collect() };
            assert_eq!(rest(&result), rest(&reference), "rope {sizes:?}: elements that do not turn");
        }
    }
}
