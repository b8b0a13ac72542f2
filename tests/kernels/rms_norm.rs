//! RMSNorm of one input and of a sum, and its backward.

use super::*;

pub fn rms_norm<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, rows: usize, hidden: usize) -> [Vec<f32>; 5]
    where
        D::Act: Into<f32>,
    {
        let (x, weight) = (put_act(d, &random(rows * hidden, 1.0, 1)), put(d, &random(hidden, 1.0, 2)));
        let (mut y, mut rstd) = (buffer(d, rows * hidden), buffer(d, rows));
        let forward = |y: &mut Buffer<D, D::Act>, rstd: &mut Buffer<D, f32>, x: Normed<'_, D>| {
            let (y, rstd, weight) = (y.view_mut(), rstd.view_mut(), weight.view());
            d.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: 1e-5 }).unwrap();
        };
        let (mut sum, addend) =
            (put_act(d, &random(rows * hidden, 1.0, 5)), put_act(d, &random(rows * hidden, 1.0, 6)));
        forward(&mut y, &mut rstd, Normed::Sum { sum: sum.view_mut(), addend: addend.view() });
        let of_sum = get_act(d, &y);
        forward(&mut y, &mut rstd, Normed::Plain(x.view()));
        let (d_y, mut d_x) = (put_act(d, &random(rows * hidden, 1.0, 3)), put_act(d, &random(rows * hidden, 0.5, 4)));
        let (weight, rstd_view) = (weight.view(), rstd.view());
        d.rms_norm_backward(RmsNormBackward {
            d_x: d_x.view_mut(),
            d_y: d_y.view(),
            x: x.view(),
            rstd: rstd_view,
            weight,
        })
        .unwrap();
        [get_act(d, &y), get(d, &rstd), get_act(d, &d_x), get_act(d, &sum), of_sum]
    }
    for (rows, hidden) in ROWS {
        let (results, references) = (run(&cuda, rows, hidden), run(&Cpu::new(1), rows, hidden));
        close::<A>("y", &results[0], &references[0], 2.0);
        within("rstd", &results[1], &references[1], 1e-6);
        close::<A>("d_x", &results[2], &references[2], 3.0);
        let sum: Vec<f32> = references[3].iter().map(|&v| rounded::<A>(v)).collect();
        assert!(results[3] == sum, "the residual stream of [{rows}, {hidden}]");
        // Plain: the sum is rounded before it is normed.
        let weight = random(hidden, 1.0, 2);
        let norm = |row: &[f32]| -> Vec<f32> {
            let rstd = 1.0 / (row.iter().map(|v| v * v).sum::<f32>() / hidden as f32 + 1e-5).sqrt();
            row.iter().zip(&weight).map(|(v, w)| rounded::<A>(v * rstd * w)).collect()
        };
        let plain: Vec<f32> = sum.chunks(hidden).flat_map(norm).collect();
        close_as("norm of a sum", &results[4], &plain, &references[4], 2.0);
    }
}
