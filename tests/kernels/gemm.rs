//! Matrix products in all transpositions, with and without accumulation.

use super::*;

pub fn gemm_of_all_transpositions<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    use Transpose::{No, Yes};
    fn run<D: Ops>(d: &D, [m, n, k]: [usize; 3], transpose: [Transpose; 2], beta: f32) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let (a, b) = (put_act(d, &random(m * k, 1.0, 1)), put_act(d, &random(k * n, 1.0, 2)));
        let (mut c, mut grad) = (put_act(d, &random(m * n, 1.0, 3)), put(d, &random(m * n, 1.0, 4)));
        let [transpose_a, transpose_b] = transpose;
        let (a, b, alpha) = (a.view(), b.view(), 0.5);
        d.gemm(Gemm { c: c.view_mut(), a, b, transpose_a, transpose_b, m, n, k, alpha, beta }).unwrap();
        d.gemm_grad(Gemm { c: grad.view_mut(), a, b, transpose_a, transpose_b, m, n, k, alpha, beta }).unwrap();
        [get_act(d, &c), get(d, &grad)]
    }
    for sizes in [[1, 8, 8], [7, 16, 576], [131, 1536, 576], [512, 4096, 64]] {
        for transpose in [[No, No], [No, Yes], [Yes, No], [Yes, Yes]] {
            let product = run(&Cpu::new(1), sizes, transpose, 0.0);
            let before = random(sizes[0] * sizes[1], 1.0, 3);
            for beta in [0.0, 1.0] {
                let what = format!("gemm {sizes:?} {transpose:?} beta {beta}");
                let results = run(&cuda, sizes, transpose, beta);
                let references = run(&Cpu::new(1), sizes, transpose, beta);
                // Plain: the product is rounded, then the sum.
                let plain = product[0].iter().zip(&before).map(|(p, c)| rounded::<A>(rounded::<A>(*p) + beta * c));
                close_as(&what, &results[0], &plain.collect::<Vec<_>>(), &references[0], 2.0);
                within(&what, &results[1], &references[1], 1e-5);
            }
        }
    }
}
